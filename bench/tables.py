"""What a program says: tables, line by line on a terminal or as Markdown, and files that grow while it works."""

from __future__ import annotations

import functools
import json
import os
import re
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

Row = Any  # a mapping, or an object with attributes


class Column(NamedTuple):
    """Title, a row's figure (a key, an attribute, a function of it), and its form (">10.4f"). None is shown as "-"."""

    title: str
    value: str | Callable[[Row], Any]
    form: str = ""

    def cell(self, row: Row) -> str:
        """The figure as text, as wide as it is."""
        if callable(self.value):
            x = self.value(row)
        else:
            x = row[self.value] if isinstance(row, dict) else getattr(row, self.value)
        return "-" if x is None else format(x, re.sub(r"^[<>]?\d*", "", self.form))

    def padded(self, text: str) -> str:
        """As wide as the column."""
        return format(text, match[0] if (match := re.match(r"[<>]?\d+", self.form)) else "")


def head(columns: Iterable[Column]) -> str:
    """The titles, over lines that follow one by one."""
    return "  ".join(column.padded(column.title) for column in columns).rstrip()


def line(columns: Iterable[Column], row: Row) -> str:
    """One row under its head."""
    return "  ".join(column.padded(column.cell(row)) for column in columns).rstrip()


def printer(path: str | None) -> Callable[..., None]:
    """`print`, at once; nothing is said where `path` is "-" and standard output is data."""
    return (lambda *_: None) if path == "-" else functools.partial(print, flush=True)


def text(columns: list[Column], rows: list[Row]) -> str:
    """A whole table, each column as wide as what it holds."""
    cells = [[column.title for column in columns], *([column.cell(row) for column in columns] for row in rows)]
    fitted = [Column("", "", f"<{max(map(len, of))}") for of in zip(*cells, strict=True)]
    lines = ("  ".join(column.padded(x) for column, x in zip(fitted, row, strict=True)) for row in cells)
    return "\n".join(line.rstrip() for line in lines)


def markdown(columns: list[Column], rows: Iterable[Row]) -> str:
    """A Markdown table, as lines without a newline at the end."""
    return markdown_cells([column.title for column in columns], ([c.cell(row) for c in columns] for row in rows))


def markdown_cells(titles: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table of rows that are text already."""
    titles = list(titles)
    lines = [titles, ["---"] * len(titles), *([x.replace("|", "\\|") for x in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


class Growing:
    """A file written again as `text()` grows, and at the end of a `with`: a run that is stopped leaves it whole.

    None writes nothing. A device, a pipe or "-", standard output, is written once, at the last.
    """

    def __init__(self, path: str | None, text: Callable[[], str]) -> None:
        self.path, self.text, self.due = path, text, 0.0

    def __enter__(self) -> Growing:
        return self

    def __exit__(self, *_: object) -> None:
        self.write(last=True)

    def write(self, last: bool = False) -> None:
        """Write it, unless that would take more than a twentieth of the time."""
        began = time.monotonic()
        if self.path is None or (not last and began < self.due):
            return
        if self.path == "-":
            print(self.text() if last else "", end="")
        elif os.path.exists(self.path) and not os.path.isfile(self.path):
            if last:
                with open(self.path, "w", encoding="utf-8") as device:
                    device.write(self.text())
        else:
            target = os.path.realpath(self.path)  # of a link, which stays one
            with open(f"{target}.part", "w", encoding="utf-8", newline="") as file:
                file.write(self.text())
            os.replace(f"{target}.part", target)
            self.due = time.monotonic() + 20 * (time.monotonic() - began)


def as_json(data: Any) -> str:
    """Data as a file of ours holds them."""
    return json.dumps(data, indent=1) + "\n"


def earlier(path: Path, option: str, read: Callable[[Any], Any], **same: Any) -> Any:
    """What `read` makes of a file of ours, None where there is none.

    Raises:
        ValueError: if it is damaged, or was written where one of `same` was something else: choose another `option`.
    """
    if not path.exists():
        return None
    try:
        data = json.loads(path.read_text("utf-8"))
        found, there = read(data), {name: data[name] for name in same}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error!r}): move it away, or choose another {option}") from None
    for name, here in same.items():
        if there[name] != here:
            raise ValueError(f"{path} has results of {name} {there[name]}, this is {here}: choose another {option}")
    return found
