"""Types of the command's arguments: a path is tried, a number held to its range when it is read, before any work."""

import argparse
import codecs
import math
import os
import re
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path


class ArgumentError(argparse.ArgumentTypeError, ValueError):
    """What a user gave cannot be used; the message is one line. argparse shows it as it is."""


def _found(text: str) -> os.stat_result | None:
    """What is at a path, links followed; None where nothing is. Raises ArgumentError where nothing can be."""
    if not text.strip():
        raise ArgumentError("the path is empty: name a file or a folder")
    if "\0" in text:
        raise ArgumentError(f"{text!r}: no path has a NUL character in it")
    try:
        return os.stat(text)
    except FileNotFoundError:
        return None
    except NotADirectoryError:
        file = next(folder for folder in Path(text).parents if folder.exists())
        raise ArgumentError(f"{text}: {file} is a file, so nothing can be in it; choose another path") from None
    except OSError as error:
        raise ArgumentError(f"{text}: {_why(error)}; choose another path") from None


def _why(error: OSError) -> str:
    return (error.strerror or str(error)).lower()


def _writable(folder: Path, text: str) -> None:
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ArgumentError(f"{text}: cannot write into {folder} ({_why(error)}); choose another path") from None


def path(text: str) -> Path:
    """A path that may be there or not."""
    _found(text)
    return Path(text)


def input_path(text: str) -> Path:
    """A file or a folder that is there."""
    found = _found(text)
    if found is None:
        raise ArgumentError(f"{text}: there is nothing of that name")
    if stat.S_ISCHR(found.st_mode) or stat.S_ISBLK(found.st_mode):
        raise ArgumentError(f"{text}: a device, which may never end; name a file")
    return Path(text)


def input_file(text: str) -> Path:
    """A file, or a pipe, that can be read."""
    given = input_path(text)
    if given.is_dir():
        raise ArgumentError(f"{text}: a folder; name a file in it")
    if given.is_file():
        try:
            given.open("rb").close()
        except OSError as error:
            raise ArgumentError(f"{text}: cannot be read ({_why(error)})") from None
    return given


def output_file(text: str) -> str:
    """Where a file can be written: in a folder that is there. A device or a pipe is written to as it is."""
    found = _found(text)
    if found and not stat.S_ISREG(found.st_mode):
        if stat.S_ISDIR(found.st_mode):
            raise ArgumentError(f"{text}: a folder; name a file in it")
        if not stat.S_ISFIFO(found.st_mode):  # to open that waits for its reader
            try:
                with open(text, "wb", buffering=0) as device:
                    device.write(b"")  # refused by one that is full
            except OSError as error:
                raise ArgumentError(f"{text}: cannot be written ({_why(error)}); choose another path") from None
        return text
    target = Path(os.path.realpath(text))
    if text.endswith(os.sep) or not target.parent.is_dir():
        folder = target if text.endswith(os.sep) else target.parent
        raise ArgumentError(f"{text}: there is no folder {folder}; make it, or choose another path")
    _found(f"{text}.part")  # its name until it is whole
    if found and not os.access(target, os.W_OK):
        raise ArgumentError(f"{text}: a file that cannot be written; choose another path")
    _writable(target.parent, text)
    return text


def output_folder(text: str) -> Path:
    """A folder that can be written, or be made with those above it."""
    found = _found(text)
    if found and not stat.S_ISDIR(found.st_mode):
        raise ArgumentError(f"{text}: not a folder; choose another path")
    folder = Path(text).absolute()
    folder = next(above for above in (folder, *folder.parents) if os.path.lexists(above))
    if not folder.is_dir():
        raise ArgumentError(f"{text}: {folder} is not a folder, so nothing can be in it; choose another path")
    _writable(folder, text)
    return Path(text)


def whole(low: int, high: int) -> Callable[[str], int]:
    """A whole number from `low` to `high`."""

    def read(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = low - 1
        if not low <= number <= high:
            raise ArgumentError(f"a whole number from {low:,} to {high:,} is needed, got {text!r}")
        return number

    return read


SEED = whole(-(2**63), 2**63 - 1)  # what torch's generators take
THREADS = whole(1, 1024)
TOKENS = whole(1, 10**15)
COUNT = whole(1, 10**6)


def number(high: float) -> Callable[[str], float]:
    """A number above 0 and up to `high`."""

    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = 0.0
        if not 0 < value <= high:
            raise ArgumentError(f"a number above 0 and up to {high:g} is needed, got {text!r}")
        return value

    return read


def seconds(text: str) -> float:
    """A time above 0, of at most thirty years."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number <= 1e9:
        raise ArgumentError(f"a number of seconds above 0 and up to 1e9 is needed, got {text!r}")
    return number


def architecture(text: str) -> int:
    """A GPU's compute capability as 90, sm_90, sm_90a or 9.0."""
    match = re.fullmatch(
        r"(?:sm_?|compute_?)?([1-9]\d{1,2})[af]?|([1-9]\d?)\.(\d)", text.strip(), re.ASCII | re.IGNORECASE
    )
    if not match:
        raise ArgumentError(f"a compute capability such as 90, sm_90 or 9.0 is needed, got {text!r}")
    return int(match[1] or match[2] + match[3])


def name(text: str) -> str:
    """A name, or a part of one, which an empty text would be of everything."""
    if not text.strip():
        raise ArgumentError(f"a name is needed, got {text!r}")
    return text


def encoding(text: str) -> str:
    """A text encoding that Python knows."""
    try:
        known = codecs.lookup(text)._is_text_encoding
    except (LookupError, ValueError):
        known = False
    if not known:
        raise ArgumentError(f"Python knows no text encoding {text!r}; try utf-8 or gb18030")
    return text
