"""Optional libraries: each is imported where it is used, and one that is missing names the extra that holds it."""

import importlib
from typing import Any

from tileformer.extras import advice


def optional_import(name: str) -> Any:
    """The module `name` of an optional library. ValueError that names the extra when it is not installed."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ValueError(f"{error.name} is not installed: {advice(name) or f'pip install {name}'}") from None
