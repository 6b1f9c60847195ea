"""Wheels hold every file of the rooms, whatever became of the links; extras are what the messages say they are."""

import ast
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tileformer import extras

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("kernels", "decoder", "training", "bench")
BUILD = "import sys; from setuptools import build_meta; print(getattr(build_meta, sys.argv[1])(sys.argv[2]))"

setuptools = pytest.importorskip("setuptools", reason="setuptools builds the wheels")
needs_setuptools = pytest.mark.skipif(int(setuptools.__version__.split(".")[0]) < 77, reason="setuptools is too old")


def package_files() -> set[str]:
    """Every file that the package must hold, as its name in a wheel."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", *ROOMS]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.split()
    walked = [str(path.relative_to(ROOT)) for room in ROOMS for path in (ROOT / room).rglob("*")]
    named = [name for name in listed or walked if (ROOT / name).is_file()]  # a copy of the tree has no history
    package = [path.name for path in (ROOT / "src/tileformer").iterdir() if path.is_file()]
    return {f"tileformer/{name}" for name in (*named, *package) if name.endswith((".py", ".toml", "py.typed"))}


def source_tree(folder: Path, links: str) -> Path:
    """What an archive holds of the tree: links as links, as the text files of core.symlinks=false, or not at all."""
    (folder / "src/tileformer").mkdir(parents=True)
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    for file in (ROOT / "src/tileformer").iterdir():
        if file.is_file():
            shutil.copy(file, folder / "src/tileformer")
    for room in ROOMS:
        shutil.copytree(ROOT / room, folder / room, ignore=shutil.ignore_patterns("__pycache__"))
        link = folder / "src/tileformer" / room
        if links == "links":
            link.symlink_to(f"../../{room}")
        elif links == "text files":
            link.write_text(f"../../{room}")
    return folder


def build(kind: str, folder: Path) -> Path:
    """The wheel or source distribution that setuptools builds of `folder`."""
    command = [sys.executable, "-c", BUILD, f"build_{kind}", str(folder / "dist")]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder / "dist" / done.stdout.split()[-1]


def files_of(wheel: Path) -> set[str]:
    return {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}


@needs_setuptools
@pytest.mark.parametrize("links", ["links", "text files", "nothing"])
def test_a_wheel_holds_every_file(tmp_path, links):
    assert files_of(build("wheel", source_tree(tmp_path / "tree", links))) == package_files()


@needs_setuptools
@pytest.mark.parametrize("links", ["links", "text files"])
def test_a_source_distribution_builds_the_same_wheel(tmp_path, links):
    archive = build("sdist", source_tree(tmp_path / "tree", links))
    shutil.unpack_archive(archive, tmp_path, filter="data")
    (unpacked,) = tmp_path.glob("tileformer-*")
    wheel = build("wheel", unpacked)
    assert files_of(wheel) == package_files()
    shutil.unpack_archive(wheel, tmp_path / "installed", "zip")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "installed")}
    command = [sys.executable, "-m", "tileformer", "--help"]  # which reads the first line of every verb's file
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@needs_setuptools
def test_a_tree_without_its_rooms_is_refused_in_one_line(tmp_path):
    folder = source_tree(tmp_path / "tree", "nothing")
    shutil.rmtree(folder / "training")
    done = subprocess.run([sys.executable, "setup.py", "--version"], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 1 and "tileformer is not whole here" in done.stderr.splitlines()[-1]


def listed(extra: str) -> set[str]:
    """The names of an extra's packages in pyproject.toml, those of other extras that it brings too."""
    found = re.search(rf"^{extra} = (\[.*\])", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert found, extra
    names: set[str] = set()
    for line in ast.literal_eval(found[1]):
        own = re.match(r"tileformer\[(.*)\]", line)
        names |= {name for one in own[1].split(",") for name in listed(one)} if own else {re.split(r"[>=;\[]", line)[0]}
    return names


def test_messages_name_the_extra_that_brings_a_package():
    distributions = {"sklearn": "scikit-learn"}
    for extra, packages in extras.PACKAGES.items():
        lacking = {distributions.get(name, name) for name in packages} - listed(extra)
        assert not lacking, f"{extra} does not bring {lacking}"
    assert extras.advice("sklearn.metrics") == 'pip install "tileformer[finetune]"'
    assert extras.advice("no_such_package") == extras.advice(None) == ""


def test_all_is_what_a_user_can_use():
    parts = ("train", "data", "finetune", "hf", "pretrained", "export", "bench")
    assert listed("all") == set().union(*map(listed, parts))
    assert listed("train") == {"rapidfuzz", "rich", "safetensors", "tokenizers"}


def test_the_pinned_versions_fit_the_extras():
    pins = dict(re.findall(r"^([\w-]+)==([\d.]+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    for extra in ("all", "test", "docs", "dev"):
        assert listed(extra) - {"tomli"} <= pins.keys(), listed(extra) - pins.keys()
