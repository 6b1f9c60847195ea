"""README and docs/ say what is so: code runs, commands and links exist, every name and every file has its place."""

import argparse
import doctest
import importlib
import importlib.util
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch

from tileformer import __main__ as command
from tileformer import decoder, kernels, training
from tileformer.decoder import huggingface

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
PAGES = {path: path.read_text() for path in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))}
REPOSITORY = re.search(r'^Homepage = "(.*)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]
GENERATED = {"docs/map.md", "docs/changelog.md", "docs/contributing.md"}  # by docs/hooks.py
EXAMPLES = {  # the ten names whose docstrings have one
    "attention": kernels.attention,
    "scaled_dot_product_attention": kernels.scaled_dot_product_attention,
    "layer_norm": kernels.layer_norm,
    "rms_norm": kernels.rms_norm,
    "softmax": kernels.softmax,
    "cross_entropy": kernels.cross_entropy,
    "dropout": kernels.dropout,
    "convert": decoder.convert,
    "huggingface.use": huggingface.use,
    "Seq2Seq": decoder.Seq2Seq,
    "DecoderLM": decoder.DecoderLM,
    "generate": decoder.generate,
    "fit": training.fit,
}


def hooks():
    spec = importlib.util.spec_from_file_location("hooks", ROOT / "docs/hooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def blocks(text: str, kind: str) -> list[str]:
    return re.findall(rf"```{kind}\n(.*?)```", text, re.DOTALL)


# README


def test_the_readme_fits_150_lines():
    assert len(README.splitlines()) <= 150


def test_the_first_lines_print_what_they_say(capsys):
    pytest.importorskip("transformers", reason="the hf extra is not installed")
    first = blocks(README, "python")[0]
    with torch.random.fork_rng():
        exec(first, {})
    assert capsys.readouterr().out.splitlines() == re.findall(r"  # prints (.*)", first)


@pytest.mark.interprets
def test_the_mask_example_agrees_with_torch(capsys):
    with torch.random.fork_rng():
        exec(blocks(README, "python")[1], {})
    shown = re.findall(r"(\w+): largest difference ([\d.e+-]+)", capsys.readouterr().out)
    assert [name for name, _ in shown] == ["torch", "interpret"]
    assert all(float(difference) < 1e-5 for _, difference in shown)


def test_training_on_pairs_of_ones_own(monkeypatch, tmp_path, capsys):
    pytest.importorskip("safetensors", reason="the train extra is not installed")
    monkeypatch.chdir(tmp_path)
    Path("pairs.tsv").write_text(
        "".join(f"{word}\t{word[::-1].upper()}\n" for word in ("abc", "bca", "acb", "cab") * 16)
    )
    code = blocks((ROOT / "docs" / "training.md").read_text(), "python")[0]
    assert len([line for line in code.splitlines() if line]) <= 12 and "tokens=400_000" in code
    with torch.random.fork_rng():
        exec(code.replace("400_000", "8_000"), {})
    assert capsys.readouterr().out.splitlines()[-1] == "abc -> CBA" and Path("runs/pairs").is_dir()


# Links and commands


def test_links_lead_to_files():
    """Absolute ones in what the package index shows, relative ones elsewhere; `make docs` also looks for anchors."""
    for page, text in PAGES.items():
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            if target.startswith(f"{REPOSITORY}/blob/main/"):
                file = ROOT / target.removeprefix(f"{REPOSITORY}/blob/main/").partition("#")[0]
            elif target.startswith(("https://", "#")):
                continue
            else:
                assert page.name != "README.md" or page.parent != ROOT, f"README: {target} is relative"
                file = (page.parent / target.partition("#")[0]).resolve()
            assert file.is_file() or str(file.relative_to(ROOT)) in GENERATED, f"{page.relative_to(ROOT)}: {target}"


def options_of(verb: str) -> set[str]:
    parser = argparse.ArgumentParser(add_help=False)
    importlib.import_module(command.VERBS[verb]).add_arguments(parser)
    parsers, found = [parser], {"--help"}
    for one in parsers:
        found |= one._option_string_actions.keys()
        subparsers = (
            action.choices.values() for action in one._actions if isinstance(action, argparse._SubParsersAction)
        )
        parsers += [parser for choices in subparsers for parser in choices]
    return found


def test_commands_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page, text in PAGES.items():
        told = "\n".join(blocks(text, "sh") + re.findall(r"`([^`\n]+)`", text))
        where = page.relative_to(ROOT)
        for target in re.findall(r"(?:^|(?<=&& ))make ([a-z-]+)", told, re.MULTILINE):
            assert target in targets, f"{where}: make {target}"
        for verb, rest in re.findall(r"(?:^|(?<=&& ))tileformer ([a-z]+)\b([^\n&|]*)", told, re.MULTILINE):
            assert verb in command.VERBS, f"{where}: tileformer {verb}"
            words = shlex.split(rest.split("  #")[0], comments=True)
            given = {word.partition("=")[0] for word in words if word.startswith("--")}
            assert given <= options_of(verb), f"{where}: tileformer {verb} {given - options_of(verb)}"


def test_files_that_are_named_exist():
    folders = ("kernels", "decoder", "training", "bench", "tests", "examples", "src", "docs", "")
    pages = PAGES | {ROOT / "CONTRIBUTING.md": (ROOT / "CONTRIBUTING.md").read_text()}
    for page, text in pages.items():
        for name in re.findall(r"`([a-z_]+(?:/[\w.]+)+\.(?:py|md|toml))`", text):
            if not name.startswith("runs/"):
                assert any((ROOT / top / name).is_file() for top in folders), f"{page.relative_to(ROOT)}: {name}"


def test_python_blocks_are_python():
    for page, text in PAGES.items():
        for code in blocks(text, "python"):
            if "--8<--" not in code:
                compile(code, str(page), "exec")


# The site


def test_every_public_name_has_its_place_in_the_reference():
    for room in (kernels, decoder, training):
        page = PAGES[ROOT / f"docs/api/{room.__name__.rpartition('.')[2]}.md"]
        named = {path.rpartition(".")[2] for path in re.findall(r"^::: ([\w.]+)", page, re.MULTILINE)}
        assert set(room.__all__) <= named


def test_every_example_has_its_tutorial():
    shown = re.findall(r'--8<-- "examples/(\w+)\.py"', PAGES[ROOT / "docs/tutorials.md"])
    assert sorted(shown) == sorted(path.stem for path in (ROOT / "examples").glob("*.py"))


def test_the_file_map_has_a_line_for_every_file():
    lines = re.findall(r"^\| `([\w.]+)` \| (.*) \|$", hooks().file_map(), re.MULTILINE)
    files = [path.name for top in hooks().FOLDERS for path in (ROOT / top).rglob("*.py")]
    assert sorted(name for name, _ in lines) == sorted(files)
    assert not [name for name, line in lines if not line], "no docstring"


def test_the_site_is_built_strictly(tmp_path):
    pytest.importorskip("mkdocs", reason="the docs extra is not installed; make docs builds the site")
    pytest.importorskip("mkdocstrings", reason="the docs extra is not installed; make docs builds the site")
    cli = importlib.import_module("mkdocs.__main__").cli
    cli(
        ["build", "--quiet", "--strict", "--config-file", str(ROOT / "mkdocs.yml"), "--site-dir", str(tmp_path)],
        standalone_mode=False,
    )
    assert (tmp_path / "map/index.html").is_file()


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_example_of_a_docstring_runs(name):
    if name == "huggingface.use":
        pytest.importorskip("transformers", reason="the hf extra is not installed")
    (test,) = doctest.DocTestFinder(recurse=False).find(EXAMPLES[name], name)
    assert test.examples, f"{name} has no example"
    with torch.random.fork_rng():
        result = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(test, out=sys.stderr.write)
    assert not result.failed
