"""Small files: JSON read with its damage named, text written whole or not at all, and what an error shows of either."""

import json
import math
import os
from pathlib import Path
from typing import Any

PathLike = str | os.PathLike[str]


def shorten(value: object, limit: int = 200) -> str:
    """`value` in one line of at most about `limit` characters: no error repeats a whole file."""
    text = " ".join(str(value).split())
    return text if len(text) <= limit else f"{text[:limit]}... ({len(text):,} characters)"


def quote(value: object, limit: int = 60) -> str:
    """`value` as `repr` shows it, the end left out when it is long."""
    text = repr(value)
    return text if len(text) <= limit else f"{text[:limit]}...{text[-1]}"


def read_json(path: PathLike) -> Any:
    """What a JSON file says. ValueError in one line that names it when it is no JSON; OSError: it cannot be read."""
    try:
        return json.loads(Path(path).read_text("utf-8"))
    except RecursionError:
        raise ValueError(f"{path}: damaged; expected JSON, found lists or objects nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"{path}: damaged or truncated; expected JSON ({shorten(error)})") from None


def to_json(value: Any, **options: Any) -> str:
    """`value` as `json.dumps` writes it, NaN and infinity as null: JSON has no such numbers, and other readers stop."""
    return json.dumps(_without_nan(value), allow_nan=False, **options)


def write(path: Path, content: str) -> None:
    """All or nothing: a stopped process leaves no half of a file."""
    partial = path.with_name(f".partial-{os.getpid()}-{path.name}")
    partial.write_text(content, "utf-8")
    os.replace(partial, path)


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
