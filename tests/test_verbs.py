"""Every option of every verb with a bad path and a bad value: one line, exit 2, nothing printed before it, nothing
made.

The parsers are walked, so that a new option is tried without being named here. `make verbs` tries all, a plain run a
few.
"""

import argparse
import dataclasses
import importlib
import os
import random
from collections.abc import Iterator
from dataclasses import asdict

import pytest
import torch

from tileformer import __main__ as command
from tileformer import arguments

SAMPLE = 12
BASE = {  # what a verb needs beside the argument that is tried
    "train": ["poems"],
    "search": ["poems"],
    "finetune": ["reviews"],
    "evaluate": ["--checkpoint={model}", "--data={tmp}/file"],
    "generate": ["--checkpoint={model}"],
    "check": ["--quick", "--op=dropout", "--backend=torch", "--device=cpu"],
}
ANYWHERE = {
    "empty": "",
    "blank": " ",
    "NUL": "{tmp}/a\0b",
    "long name": "{tmp}/" + "x" * 300,
    "long path": "{tmp}/" + "x/" * 5000,
    "below a file": "{tmp}/file/x",
    "full": "/dev/full",
    "loop": "{tmp}/loop",
}
NOT_A_FOLDER = ANYWHERE | {
    "file": "{tmp}/file",
    "kernel's": "/proc/x",
    "link": "{tmp}/link",
    "below it": "{tmp}/link/x",
}
NOT_A_FILE = ANYWHERE | {"folder": "{tmp}", "none": "{tmp}/none/x", "kernel's": "/proc/x", "link": "{tmp}/far"}
NOT_THERE = ANYWHERE | {"none": "{tmp}/none", "other": "{tmp}/empty"}
PATHS = {
    arguments.output_folder: NOT_A_FOLDER,
    arguments.output_file: NOT_A_FILE,
    arguments.input_file: NOT_THERE,
    arguments.input_path: NOT_THERE,
    arguments.path: NOT_THERE,
}
VALUES = {"empty": "", "unknown": "no such", "digits": "9" * 5000, "NUL": "no\0such"}
NUMBERS = VALUES | {"nan": "nan", "huge": "1e99", "more": "9" * 30, "letter": "sm_"}


@dataclasses.dataclass(frozen=True)
class Case:
    """One argument (an option, or "" where it has no name) of one verb, and what is wrong with it."""

    words: tuple[str, ...]
    option: str
    kind: str
    value: str

    def __str__(self) -> str:
        return " ".join((*self.words, self.option or "argument", self.kind))

    def argv(self) -> list[str]:
        base = BASE.get(self.words[0], []) if len(self.words) == 1 else []
        if self.words == ("generate",) and self.option == "--checkpoint":
            base = []
        tried = f"{self.option}={self.value}" if self.option else self.value
        if not self.option and self.words[0] != "generate":  # in place of the recipe
            base = base[1:]
        return [*self.words, *base, tried]


def leaves(
    parser: argparse.ArgumentParser, words: tuple[str, ...]
) -> Iterator[tuple[tuple[str, ...], argparse.Action]]:
    """Every argument of a parser and of those below it."""
    if words[:1] == ("search",) and words[1:] not in ((), ("pairs",)):
        return  # the options of `train`, again
    for action in parser._actions:
        if words[:1] == ("search",) and "--data" in action.option_strings:
            continue  # looked at when it is known what to search
        if isinstance(action, argparse._SubParsersAction):
            yield words, action
            for name, below in action.choices.items():
                yield from leaves(below, (*words, name))
        else:
            yield words, action


def bad_values(action: argparse.Action) -> dict[str, str]:
    if action.nargs == 0:
        return {"a value": "x"}
    if action.metavar in ("FILE", "DIR", "PATH"):
        return PATHS.get(action.type, NOT_A_FILE)
    if action.choices or action.type in (None, arguments.name):
        return VALUES
    return NUMBERS if action.type is arguments.SEED else NUMBERS | {"below": "-5", "none": "0"}


def cases() -> list[Case]:
    found = []
    for verb, name in command.VERBS.items():
        parser = argparse.ArgumentParser()
        importlib.import_module(name).add_arguments(parser)
        for words, action in leaves(parser, (verb,)):
            option = action.option_strings[-1] if action.option_strings else ""
            found += [Case(words, option, kind, value) for kind, value in bad_values(action).items()]
    return found


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        found = cases()
        if not metafunc.config.getoption("--all-verbs"):
            found = random.Random(0).sample(found, SAMPLE)
        metafunc.parametrize("case", found, ids=str)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny checkpoint that nothing has trained."""
    pytest.importorskip("rapidfuzz", reason="the data extra is not installed")
    from tileformer.decoder import Seq2Seq, Seq2SeqConfig
    from tileformer.training import checkpoint
    from tileformer.training.recipes import g2p

    folder = tmp_path_factory.mktemp("model")
    config = Seq2SeqConfig(3 + len(g2p.LETTERS), 3 + len(g2p.PHONES), 16, 2, 1, 1, 32)
    made = Seq2Seq(config)
    meta = {"recipe": "g2p", "letters": g2p.LETTERS, "phones": g2p.PHONE_NAMES, "model": asdict(config)}
    checkpoint.save(folder, made, torch.optim.AdamW(made.parameters()), {"step": 1, "meta": meta})
    return str(folder)


def test_a_bad_argument_is_one_line(case, request, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("nowhere")
    (tmp_path / "far").symlink_to("none/x")
    (tmp_path / "loop").symlink_to("loop")
    before = sorted(tmp_path.rglob("*"))
    model = request.getfixturevalue("model") if case.words in (("generate",), ("evaluate",)) else ""
    argv = [word.replace("{tmp}", str(tmp_path)).replace("{model}", model) for word in case.argv()]
    monkeypatch.chdir(tmp_path)
    try:
        status = command.main(argv)
    except SystemExit as stopped:
        status = stopped.code
    out, err = capsys.readouterr()
    assert (status, out) == (2, ""), err
    (line,) = err.splitlines()
    assert line.startswith("tileformer: error: ") and "Errno" not in line and "\0" not in line
    value = argv[-1].removeprefix(f"{case.option}=")
    wanted = [repr(value[:36])[1:-1], *filter(None, [case.option])]
    assert any(part in line for part in wanted), "the line is of something else"
    assert len(value) < 200 or value not in line
    assert sorted(tmp_path.rglob("*")) == before and os.getcwd() == str(tmp_path)


@pytest.mark.parametrize("words", ["train g2p", "finetune reviews", "finetune reviews --table", "bench gpu-day"])
def test_the_folder_of_a_default_is_tried_too(words, tmp_path, monkeypatch, capsys):
    (tmp_path / "runs").touch()
    monkeypatch.chdir(tmp_path)
    try:
        status = command.main([*words.split(), "--device=cpu"] if "bench" not in words else words.split())
    except SystemExit as stopped:
        status = stopped.code
    out, err = capsys.readouterr()
    assert (status, out) == (2, "") and "runs is a file, so nothing can be in it" in err and err.count("\n") == 1
