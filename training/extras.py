"""Optional libraries: each is imported where it is used, and one that is missing names the extra that holds it."""

import importlib
from typing import Any

EXTRAS = {"peft": "hf"}  # of the libraries that are not in `finetune`


def optional_import(name: str) -> Any:
    """The module `name` of an optional library. ValueError that names the extra when it is not installed."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        extra = EXTRAS.get(name, "finetune")
        raise ValueError(f'{error.name} is not installed: pip install "tileformer[{extra}]"') from None
