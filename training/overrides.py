"""What a user asks for beside a recipe's own: `--set model.d_model=256`, and tables of a `--config FILE.toml`.

[model]                 sizes, and decoder = "transformer" or "lstm+attention": fields of the model's configuration
d_model = 256
[settings]              optimiser, schedule, budget, validation, early stopping: fields of `Settings`
lr = 2e-3
[loss]                  keywords of the recipe's loss
label_smoothing = 0.1
[data]                  batch, and what else the recipe reads
batch = 64
[search]                of `tileformer search`: a list of values, or low and high, with log = true to draw evenly in
"settings.lr" = { low = 1e-4, high = 1e-2, log = true }                                     the logarithm
"""

import difflib
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tileformer.extras import optional_import
from tileformer.files import quote, shorten

SECTIONS = ("model", "settings", "data", "loss")
Tables = dict[str, dict[str, Any]]


def read(file: Path | None, words: Sequence[str] = ()) -> tuple[Tables, dict[str, Any]]:
    """The tables of a file with what the words ``SECTION.KEY=VALUE`` change in them, and the file's ``search``.

    Raises ValueError for a file that is no TOML, a section that is none, and a word of another form.
    """
    tables: Tables = {name: {} for name in SECTIONS}
    search: dict[str, Any] = {}
    if file is not None:
        for name, table in _toml(file.read_text("utf-8"), str(file)).items():
            if name not in (*SECTIONS, "search") or not isinstance(table, dict):
                raise ValueError(f"{file}: {_unknown('section', name, (*SECTIONS, 'search'))}")
            if name == "search":
                search = table
            else:
                tables[name] = dict(table)
    for word in words:
        key, equals, value = word.partition("=")
        section, dot, name = key.strip().partition(".")
        if not (equals and dot and name):
            raise ValueError(f"--set {quote(word)}: expected SECTION.KEY=VALUE, such as settings.lr=0.001")
        if section not in SECTIONS:
            raise ValueError(f"--set {quote(word)}: {_unknown('section', section, SECTIONS)}")
        tables[section][name] = _value(value.strip())
    return tables, search


def put(tables: Tables, parameters: Mapping[str, Any]) -> Tables:
    """``tables`` with other values of ``SECTION.KEY`` names, as a search tries them."""
    changed = {name: dict(table) for name, table in tables.items()}
    for key, value in parameters.items():
        section, _, name = key.partition(".")
        if section not in SECTIONS:
            raise ValueError(f"search: {_unknown('section', section, SECTIONS)}")
        changed[section][name] = value
    return changed


def check(section: str, given: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
    """``given`` with lists as tuples. ValueError for a key that is none of ``known``, which names its neighbours, and
    for a value of another type than the default there (None: any)."""
    checked: dict[str, Any] = {}
    for name, value in given.items():
        if name not in known:
            raise ValueError(_unknown(f"key {section}.", name, known))
        usual = known[name]
        kind = float if isinstance(usual, float) else type(usual)
        value = tuple(value) if isinstance(value, list) else value
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if usual is not None and not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise ValueError(f"{section}.{name} must be {_named(kind)}, got {quote(value)}")
        checked[name] = value
    return checked


def _named(kind: type) -> str:
    return {int: "a whole number", float: "a number", str: "a text", bool: "true or false", tuple: "a list"}.get(
        kind, f"a {kind.__name__}"
    )


def _unknown(what: str, name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, known, 3, 0.5) or sorted(known)
    gap = "" if what.endswith(".") else " "
    return f"no {what}{gap}{shorten(name, 40)}; there is: {', '.join(near)}"


def _value(text: str) -> Any:
    """A value as TOML writes it; what is none is a text."""
    try:
        return _toml(f"value = {text}", "--set")["value"]
    except ValueError:
        return text


def _toml(content: str, where: str) -> dict[str, Any]:
    toml: Any = optional_import("tomllib" if sys.version_info >= (3, 11) else "tomli")
    try:
        return toml.loads(content)
    except toml.TOMLDecodeError as error:
        raise ValueError(f"{where}: no TOML: {shorten(error)}") from None
