"""`tileformer generate` with options: beams, samples, streams, JSON, files, on a model that nothing has trained."""

import dataclasses
import io
import json
import re
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("safetensors", reason="the train extra is not installed")

from tileformer.__main__ import main
from tileformer.decoder import DecoderLM, DecoderLMConfig, Seq2Seq, Seq2SeqConfig, generate
from tileformer.decoder.generation import Options
from tileformer.training import checkpoint
from tileformer.training.data.batches import pad
from tileformer.training.recipes import g2p, poems

WORDS = ["hello", "a", "transformer", "don't", "tiles", "bc"]


def save(folder, model, name, **meta):
    meta |= {"recipe": name, "model": dataclasses.asdict(model.config)}
    checkpoint.save(folder, model, torch.optim.AdamW(model.parameters()), {"step": 1, "meta": meta})
    return str(folder)


@pytest.fixture(scope="module")
def spoken(tmp_path_factory):
    """A g2p model, and where its checkpoint is."""
    torch.manual_seed(3)
    model = Seq2Seq(Seq2SeqConfig(*g2p.SIZES, 16, 2, 1, 1, 32)).eval()
    with torch.no_grad():
        model.transformer.decoder.norm.weight.mul_(3)
        model.tgt_embedding.weight[2] *= 2.5  # some words end
    folder = tmp_path_factory.mktemp("spoken")
    return model, save(folder, model, "g2p", letters=g2p.LETTERS, phones=g2p.PHONE_NAMES)


@pytest.fixture
def say(spoken, monkeypatch, capsys):
    """(status, lines of output, lines of errors) of the command."""

    def run(*words, typed="", folder=spoken[1]):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(typed.encode())))
        status = main(["generate", "--checkpoint", folder, *map(str, words)])
        out, err = capsys.readouterr()
        return status, out.splitlines(), err.splitlines()

    return run


def phones(ids):
    return " ".join(g2p.PHONES[i - g2p.RESERVED] for i in ids if i >= g2p.RESERVED)


def test_objects_have_tokens_scores_and_timing(spoken, say):
    for flags, options in ((["--beams", 3, "--n-best", 2], {"num_beams": 3, "n_best": 2}), ([], {"n_best": 1})):
        status, out, err = say(*flags, "--json", "--max-length", 12, *WORDS)
        assert (status, err) == (0, [])
        found, scores = generate(spoken[0], pad([g2p.encode(word) for word in WORDS]), 12, **options)
        objects = [json.loads(line) for line in out]
        n = options["n_best"]
        assert len({len(x["tokens"]) for x in objects}) > 1
        assert [(x["input"], x["rank"]) for x in objects] == [(w, r + 1) for w in WORDS for r in range(n)]
        for x, ids, score in zip(objects, found.flatten(0, 1).tolist(), scores.flatten().tolist(), strict=True):
            ids = [i for i in ids if i]
            assert (x["tokens"], x["text"]) == (ids, phones(ids)) and x["score"] == pytest.approx(score, abs=1e-4)
            assert x["seconds"] > 0
    plain = say("--beams", 3, "--n-best", 2, "--max-length", 12, *WORDS)[1]
    assert len(plain) == 12 and plain[1].startswith("hello  ")
    assert say("--max-length", 12, *WORDS)[1] == [f"{x['input']}  {x['text']}" for x in objects]


def test_samples_are_the_same_in_any_batch(spoken, say):
    flags = ["--temperature", 1.3, "--top-k", 20, "--top-p", 0.95, "--min-p", 0.01, "--max-length", 9]
    status, whole, _ = say(*flags, "--seed", 5, *WORDS)
    assert status == 0 and whole == say(*flags, "--seed", 5, "--batch-size", 2, *WORDS)[1]
    assert whole[3:4] == say(*flags, "--seed", 8, WORDS[3])[1] != say(*flags, WORDS[3])[1]
    options = Options(temperature=1.3, top_k=20, top_p=0.95, min_p=0.01, seed=5)
    (ids,) = generate(spoken[0], torch.tensor([g2p.encode("hello")]), 9, options=options).tolist()
    assert whole[0] == f"hello  {phones(ids)}"
    three = say(*flags, "--n-best", 3, "hello")[1]
    assert len(three) == 3 and len(set(three)) > 1 and three[:1] == say(*flags, "--seed", 0, "hello")[1]


def test_a_stream_ends_as_the_line(say):
    for flags in ([], ["--temperature", 1.0, "--seed", 3]):
        assert say("--stream", *flags, *WORDS)[:2] == say(*flags, *WORDS)[:2]


def test_files_are_read_and_faults_named_in_objects(say, tmp_path):
    one, two = tmp_path / "one.txt", tmp_path / "two.txt"
    one.write_text("hello\n\nb2b\n")
    two.write_bytes(b"caf\xe9\ntiles\n")
    status, out, err = say("--input", one, "--input", two, "--json", "a")
    objects = [json.loads(line) for line in out]
    assert status == 1 and [x.get("input") for x in objects] == ["a", "hello", "b2b", None, "tiles"]
    assert ["error" in x for x in objects] == [False, False, True, True, False]
    assert re.match(f"tileformer: error: {one}:3: 'b2b': cannot read '2'", err[0]) and len(err) == 2
    assert say("--input", one)[1][::2] == [*say("hello")[1]]  # and an empty line


def test_how_fast_it_was_is_told_where_it_is_asked(say, monkeypatch):
    assert re.fullmatch(r"2 inputs, \d+ tokens in [\d.]+ s: [\d,]+ tokens per second", say("--timing", "a", "bc")[2][0])

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    pytest.importorskip("rich", reason="the train extra is not installed")
    monkeypatch.setattr(sys, "stderr", screen := Terminal())
    monkeypatch.setenv("TERM", "xterm")
    assert say(*WORDS)[0] == 0
    assert "generate" in screen.getvalue() and "6 inputs, " in screen.getvalue().splitlines()[-1]


def test_a_poem_is_sampled_unless_it_is_searched(say, tmp_path):
    torch.manual_seed(0)
    vocabulary = poems.Vocabulary("春風明月山水花鳥")
    model = DecoderLM(DecoderLMConfig(vocabulary.size, 16, 2, 1, 32, max_length=poems.LONGEST))
    folder = save(tmp_path / "run", model, "poems", characters="春風明月山水花鳥")
    words = ["4x5", "8x7:春風", "4x5"]
    status, out, _ = say(*words, folder=folder)
    assert status == 0 and out[0] != out[2] and out[1].startswith("8x7:春風  春風")
    assert out == say(*words, "--batch-size", 1, folder=folder)[1] == say(*words, "--seed", 0, folder=folder)[1]
    searched = say(*words, "--beams", 1, folder=folder)[1]
    assert searched[0] == searched[2] and searched != out
    short = say(*words, "--max-length", 3, "--json", folder=folder)[1]
    assert [len(json.loads(line)["tokens"]) <= 3 for line in short] == [True] * 3


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--stream", "--json"], "--stream prints one text as it comes"),
        (["--stream", "--beams", "2"], "--stream prints one text as it comes"),
        (["--top-k", "3"], "top_k is for sampling: pass a temperature too"),
        (["--beams", "2", "--temperature", "1"], "beams are searched, not sampled"),
        (["--beams", "2", "--n-best", "3"], "between 1 and num_beams 2, got 3"),
        (["--max-length", "500"], "--max-length 500: the model reads and writes at most 64 tokens"),
    ],
)
def test_what_makes_no_sense_is_one_line(say, flags, message):
    status, out, err = say(*flags, "hello")
    assert (status, out) == (2, []) and len(err) == 1 and message in err[0]


def test_a_classifier_writes_nothing_token_by_token(say):
    pytest.importorskip("tokenizers", reason="the finetune extra is not installed")
    folder = str(Path(__file__).parent / "data" / "classifier")
    status, out, err = say("--beams", "2", "--json", "酒店好", folder=folder)
    assert (status, out) == (2, []) and "takes no --beams" in err[0]
    status, out, _ = say("--json", "酒店好", folder=folder)
    assert status == 0 and json.loads(out[0])["text"].endswith("酒店好")
