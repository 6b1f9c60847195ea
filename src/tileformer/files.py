"""Small files: JSON and lines of text read with their damage named, text written whole or not at all, and what an error
shows of either."""

import codecs
import contextlib
import json
import math
import os
from collections.abc import Callable
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


def lines_of(
    content: bytes, path: PathLike, encoding: str = "utf-8", skip_bad_lines: bool = False
) -> list[str | ValueError]:
    """The lines of all of a file, whatever ends them; a byte-order mark of UTF-16 or UTF-32 goes before `encoding`.

    skip_bad_lines: one with bytes that are no text is the ValueError that names it, as long as most lines are text;
    without, and where few are, that of `decode` is raised.
    """
    encoding = _marked(content) or encoding
    try:
        return [*_split(decode(content, path, encoding))]
    except UnreadableError:
        lines = _split(content.decode(encoding, "replace").removeprefix("\ufeff"))
        if not skip_bad_lines or 2 * sum(map(is_damaged, lines)) > sum(bool(line.strip()) for line in lines):
            raise
    return [
        UnreadableError(f"{path}:{number}: {quote(line, 40)} is not {encoding} text") if is_damaged(line) else line
        for number, line in enumerate(lines, 1)
    ]


def _split(text: str) -> list[str]:
    return text.replace("\r\n", "\n").replace("\r", "\n").split("\n")


def is_damaged(line: str) -> bool:
    """Whether a line that was decoded with "replace" had bytes that are no text."""
    return "\ufffd" in line or "\0" in line


class UnreadableError(ValueError):
    """Bytes that are no text in the encoding they were read in."""


def decode(content: bytes, path: PathLike, encoding: str = "utf-8", *, line: int = 1, at: int = 0) -> str:
    """`content`, which stands at byte `at`, in line `line`, of the file `path`, as text without a byte-order mark.

    Raises UnreadableError that names file:line, the byte and its offset, and the encoding that would fit, if one does;
    ValueError for an encoding that Python does not know.
    """
    try:
        text = content.decode(encoding)
    except LookupError:
        raise ValueError(f"{path}: Python knows no encoding {encoding!r}; try utf-8 or gb18030") from None
    except UnicodeError as error:
        start = getattr(error, "start", 0)
    else:
        if "\0" not in text:
            return text if at else text.removeprefix("\ufeff")
        start = content.index(b"\0")
    number = line + content.count(b"\n", 0, start)
    found = f"{path}:{number}: byte 0x{content[start]:02x} at offset {at + start:,} is not {encoding} text"
    if at:  # a line alone says little of what the file is
        with open(path, "rb") as file:
            content = file.read(min(at, 1 << 20)) + content
    raise UnreadableError(f"{found}; {_advice(content, encoding)}")


def _marked(content: bytes) -> str | None:
    """The encoding that a byte-order mark tells, of those that a plain "utf-8" cannot read."""
    marks = {codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32", codecs.BOM_UTF16_LE: "utf-16"}
    marks[codecs.BOM_UTF16_BE] = "utf-16"
    return next((name for mark, name in marks.items() if content.startswith(mark)), None)


def _advice(content: bytes, encoding: str) -> str:
    """What to do about bytes that are no `encoding` text: another encoding only where all read as a text in it."""
    marked = _marked(content)
    for name, end in (("utf-16-le", b"\n\0"), ("utf-16-be", b"\0\n")):
        marked = marked or (name if end in content else None)
    if fits := marked or _encoding_of(content, encoding):
        return f"it reads as {fits}: give that encoding"
    lines = _split(content.decode(encoding, "replace"))
    most = "no usual encoding fits" if _mostly_damaged("".join(lines)) else "most of it is"
    bad = f"{sum(map(is_damaged, lines)):,} of {len(lines):,} lines"
    return f"{most}: mend {bad}, or leave them out with --skip-bad-lines (skip_bad_lines=True)"


def _mostly_damaged(text: str) -> bool:
    return sum(c in "\ufffd\0" for c in text) > sum("\x7f" < c != "\ufffd" for c in text)


# Whether a character is frequent in what people write in an encoding: bytes of another one read as rare ones.
FREQUENT: dict[str, Callable[[str], bool]] = {
    "utf-8": lambda c: True,
    "gb18030": lambda c: b"\xa1" <= c.encode("gb2312", "ignore") < b"\xd8",
    "big5": lambda c: b"\xa1" <= c.encode("big5", "ignore") < b"\xc7",
    "cp1252": lambda c: c.isalpha() or c in "‘’“”–—…€°§«»¿¡·",
}


def _encoding_of(content: bytes, encoding: str) -> str | None:
    """The usual encoding in which all of `content` is a text that people write. None when there is none."""
    for name, frequent in FREQUENT.items():
        if name != "utf-8" and not _mostly_damaged(content.decode(encoding, "replace")):
            return None  # a few bad bytes in a good file
        with contextlib.suppress(UnicodeDecodeError):
            text = content.decode(name)
            beyond = [c for c in text if c > "\x7f"]
            rare = sum(not frequent(c) for c in beyond)
            crowded = name == "cp1252" and 2 * len(beyond) > sum(c.isalpha() for c in text)
            if beyond and "\0" not in text and 10 * rare <= len(beyond) and not crowded:
                return name
    return None
