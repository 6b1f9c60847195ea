"""Own pairs and texts by the verbs: train, resume, fine-tune, evaluate, generate, search; and what is wrong with a file."""

import json
import math
import re

import pytest
import torch

pytest.importorskip("rapidfuzz", reason="the train extra is not installed")
pytest.importorskip("safetensors", reason="the train extra is not installed")
pytest.importorskip("tokenizers", reason="the train extra is not installed")

from tileformer.__main__ import main
from tileformer.decoder.pretrained import load
from tileformer.training import overrides
from tileformer.training.data import own
from tileformer.training.data.batches import PAD, Frame, PackedBatches, pack
from tileformer.training.finetune.own import METHODS
from tileformer.training.losses import language_loss
from tileformer.training.measure import pair_rows, scored

SMALL = ["--set", "model.d_model=16", "--set", "model.nhead=2", "--set", "model.dim_feedforward=32"]
WORDS = ["anna", "banana", "cab", "dada", "nab", "bad", "can", "band", "canada", "dab"]
PAIRS = [(a + b, (a + b)[::-1]) for a in WORDS for b in WORDS]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("own")
    (folder / "pairs.tsv").write_text("".join(f"{a}\t{b}\n" for a, b in PAIRS))
    (folder / "text.txt").write_text("\n\n".join(" ".join(WORDS[i:] + WORDS[:i]) for i in range(10)))
    return folder


@pytest.fixture
def run(place, monkeypatch, capsys):
    monkeypatch.chdir(place)

    def say(*words, status=0):
        found = main([*map(str, words)])
        out, err = capsys.readouterr()
        assert found == status, err
        return out.splitlines() if status == 0 else err.splitlines()[-1].removeprefix("tileformer: error: ")

    return say


@pytest.fixture(scope="module")
def trained(place):
    """Folders of a model of pairs and of one of texts."""
    for kind, file in (("pairs", "pairs.tsv"), ("text", "text.txt")):
        words = ["train", kind, "--data", place / file, "--output", place / f"runs/{kind}", "--tokens", 4000, *SMALL]
        assert main([*map(str, words)]) == 0
    return place / "runs"


def test_pairs_are_trained_evaluated_and_used(run, trained):
    out = run("generate", "--checkpoint", "runs/pairs", "annacab", "dabdab")
    assert len(out) == 2
    model, tokenizer = load(trained / "pairs")
    (scores,) = map(json.loads, run("evaluate", "--checkpoint", "runs/pairs", "--data", "pairs.tsv", "--json"))
    assert (
        scores["rows"] == 100 and scores["perplexity"] == pytest.approx(math.exp(scores["loss"])) and scores["loss"] < 3
    )
    assert 0 <= scores["exact"] <= 100 and {"cer", "wer"} <= scores.keys()
    with torch.no_grad():
        rows, _ = pair_rows(model, tokenizer, PAIRS, False)
        nats = [
            torch.nn.functional.cross_entropy(
                model(torch.tensor([a]), torch.tensor([[1, *b]]))[0], torch.tensor([*b, 2]), reduction="sum"
            )
            for a, b in rows
        ]
    assert scores["loss"] == pytest.approx(sum(nats).item() / sum(len(b) + 1 for _, b in rows), rel=1e-4)


def test_texts_are_trained_evaluated_and_used(run, trained):
    (line,) = run("generate", "--checkpoint", "runs/text", "--max-length", 5, "banana ")
    assert line.startswith("banana") and len(line) <= 11
    lines = run("evaluate", "--checkpoint", "runs/text", "--data", "text.txt")
    assert re.search(r"loss [\d.]+ nats a token   perplexity [\d.]+   [\d.]+ bits a character", lines[1])
    (scores,) = map(json.loads, run("evaluate", "--checkpoint", "runs/text", "--data", "pairs.tsv", "--json"))
    assert "exact" in scores  # a prompt and its completion


def test_a_run_goes_on_with_what_it_was_asked_for(run, place):
    words = ["train", "pairs", "--data", "pairs.tsv", "--output", "runs/again", *SMALL]
    smooth = ["--set", "loss.label_smoothing=0.2", "--set", "data.batch=16"]
    run(*words, *smooth, "--tokens", 2000)
    assert run(*words, *smooth, "--tokens", 2000, "--resume")[-1].startswith("checkpoint ")
    for other in ([], ["--set", "loss.label_smoothing=0.2"], [*smooth, "--set", "loss.label_smoothing=0.3"]):
        assert "asked" in run(*words, *other, "--tokens", 2000, "--resume", status=2)
    before = (place / "runs/again/config.json").read_bytes()
    assert run(*words, "--overwrite", "--set", "model.dmodel=3", status=2) == "no key model.dmodel; there is: d_model"
    assert (place / "runs/again/config.json").read_bytes() == before  # nothing was lost


@pytest.mark.parametrize("method", METHODS)
def test_pairs_are_fine_tuned_by_every_method(run, trained, method):
    if method == "lora":
        pytest.importorskip("peft", reason="the hf extra is not installed")
    folder = f"runs/tuned-{method}"
    words = [
        "finetune",
        "pairs",
        "--checkpoint",
        "runs/pairs",
        "--data",
        "pairs.tsv",
        "--method",
        method,
        "--tokens",
        900,
    ]
    out = run(*words, "--output", folder)
    assert out[0].startswith("before, ") and out[2].startswith(f"after {method}, 900 tokens")
    assert len(run("generate", "--checkpoint", folder, "annacab")) == 1
    (before, _), (after, _) = load(trained / "pairs"), load(trained.parent / folder)
    changed = {n for n, x in before.state_dict().items() if n in (y := after.state_dict()) and not torch.equal(x, y[n])}
    upper = {n for n in changed if "layers.2" in n or n.startswith("transformer.decoder.norm")}
    assert (changed == upper) == (method == "partial") and bool(changed)
    assert hasattr(after, "adapters") == (method == "adapters")


def test_a_decoder_alone_learns_the_completion(run, trained):
    words = ["finetune", "pairs", "--checkpoint", "runs/text", "--data", "pairs.tsv", "--tokens", 1500]
    assert run(*words, "--output", "runs/completes")[2].startswith("after full")
    assert len(run("generate", "--checkpoint", "runs/completes", "--max-length", 3, "annacab")) == 1


def test_labels_in_a_prompt_are_left_out():
    batch = pack([[5, 6, 7, 8], [9, 4]], Frame(ignored=-100), [2, 1])
    assert batch.source.tolist() == [[1, 5, 6, 7, 8, 1, 9, 4]]
    assert batch.labels.tolist() == [[-100, -100, 7, 8, 2, -100, 4, 2]] and batch.label_tokens == 5
    batch = pack([[5, 6, 7], [9, 4]], Frame(9, None, 2, -100), [2, 1])
    assert (batch.source.tolist(), batch.labels.tolist()) == ([[5, 6, 7, 9, 4]], [[-100, 7, 2, 4, 2]])
    assert batch.cu_seqlens.tolist() == [0, 3, 5] and batch.longest == 3 and batch.label_tokens == 4
    with pytest.raises(ValueError, match="a prompt of 3 ids in a row of 2"):
        pack([[5, 6]], prompts=[3])
    with pytest.raises(ValueError, match="a row with a prompt is not cut"):
        PackedBatches([[5, 6]], 8, longest=3, prompts=[1])


def test_the_loss_leaves_out_what_the_frame_says(trained):
    model, _ = load(trained / "text")
    rows = [[4, 5, 6, 7], [8, 9]]
    whole, parts = (PackedBatches(rows, 16, frame=Frame(ignored=-100), prompts=p) for p in ([0, 0], [3, 1]))
    with torch.no_grad():
        (a,), (b,) = iter(whole), iter(parts)
        losses = torch.nn.functional.cross_entropy(
            model(a.source, cu_seqlens=a.cu_seqlens)[0], a.labels[0], reduction="none"
        )
        assert language_loss(model, a).item() == pytest.approx(losses.mean().item(), rel=1e-5)
        assert language_loss(model, b).item() == pytest.approx(losses[[3, 4, 6, 7]].mean().item(), rel=1e-5)


def test_scores_take_the_closest_reference():
    pairs = [("a", "x y z"), ("a", "x q"), ("b", "m n")]
    found = scored(pairs, {"a": "x q", "b": "m k"})
    assert (found["exact"], found["wer"]) == (50, 25) and found["cer"] == pytest.approx(100 / 6)


def test_what_is_held_out_follows_from_the_rows_alone():
    train, valid = own.hold_out(PAIRS, lambda pair: pair[0])
    assert 3 <= len(valid) <= 12 and len(train) + len(valid) == 100
    again = own.hold_out([*PAIRS[::-1], *PAIRS], lambda pair: pair[0])[1]
    assert {*again} == {*valid} and len(again) == 2 * len(valid)  # copies stay together
    for rows in (["a b", "c d"], [*WORDS, "x" * 1000]):
        train, valid = own.hold_out(rows, str)
        assert train and valid
    with pytest.raises(ValueError, match="all 3 rows are copies of one"):
        own.hold_out(["a b", "A b", "a b!"], str)


def test_a_datasets_rows_and_lists_are_taken_as_they_are():
    assert own.pairs_of([("a", "b"), {"source": "c", "target": "d"}]) == [("a", "b"), ("c", "d")]
    assert own.texts_of(["a", {"text": "b"}, " "]) == ["a", "b"]
    for rows, message in (([("a",)], "row 0: expected a source and a target"), ([], "nothing to read")):
        with pytest.raises(ValueError, match=message):
            own.pairs_of(rows)
    with pytest.raises(ValueError, match="row 0: expected a text"):
        own.texts_of([{"txt": "b"}])


def test_documents_of_a_file(tmp_path):
    (file := tmp_path / "a.txt").write_text("one\ntwo\n\nthree\n")
    texts = {how: own.texts_of(file, documents=how) for how in own.DOCUMENTS}
    assert texts["auto"] == texts["paragraphs"] == ["one\ntwo", "three"]
    assert texts["lines"] == ["one", "two", "three"] and len(texts["files"]) == 1
    file.write_text("one\ntwo\n")
    assert own.texts_of(file) == ["one", "two"]


@pytest.mark.parametrize(
    "content, message",
    [
        (b"one column\n", r"expected source<TAB>target, found 1 column in 'one column'"),
        (b"a\tb\n\na\tb\tc\n", r":3: expected source<TAB>target, found 3 columns"),
        (b"a\t\n", r"found an empty one in"),
        (b"a\tb\n\xff\xfe\xfd\tx\n", r":2: byte 0xff at offset 4 is not utf-8 text"),
        (b"\n \n", r"nothing to read"),
        (b"a\tb\na\tb\n", r"all 2 rows are copies of one"),
    ],
)
def test_a_file_that_is_no_pairs_is_one_line(run, tmp_path, content, message):
    (file := tmp_path / "bad.tsv").write_bytes(content)
    assert re.search(message, run("train", "pairs", "--data", file, "--output", tmp_path / "run", status=2))


@pytest.mark.parametrize(
    "words, message",
    [
        (["train", "pairs"], "your own data are needed: --data FILE"),
        (["train", "pairs", "--data", "pairs.tsv", "--set", "lr=3"], "expected SECTION.KEY=VALUE"),
        (["train", "pairs", "--data", "pairs.tsv", "--set", "setings.lr=3"], "no section setings; there is: settings"),
        (
            ["train", "pairs", "--data", "pairs.tsv", "--set", "settings.lr=fast"],
            "settings.lr must be a number, got 'fast'",
        ),
        (
            ["train", "pairs", "--data", "pairs.tsv", "--set", "settings.warm=1"],
            "no key settings.warm; there is: warmup",
        ),
        (["train", "g2p", "--set", "data.batches=1"], "no key data.batches; there is: batch"),
        (["train", "pairs", "--data", "pairs.tsv", "--set", "data.longest=3"], "all 9\\d pairs are over 3 ids"),
        (["search", "pairs", "--data", "pairs.tsv"], "nothing to search: give --config FILE"),
        (["finetune", "pairs", "--data", "pairs.tsv"], "wants --checkpoint FOLDER and --data FILE"),
        (["finetune", "pairs", "--data", "pairs.tsv", "--checkpoint", "."], "expected the folder of a model"),
        (["finetune", "text", "--data", "text.txt", "--checkpoint", "runs/pairs"], "is for a decoder alone"),
        (
            ["finetune", "pairs", "--data", "pairs.tsv", "--checkpoint", "runs/pairs", "--method", "magic"],
            "no method 'magic'",
        ),
        (["evaluate", "--checkpoint", ".", "--data", "pairs.tsv"], "expected the folder of a model, with config.json"),
        (["generate", "--checkpoint", "runs/pairs", "--chat", "a"], "has no chat template"),
    ],
)
def test_what_makes_no_sense_is_one_line(run, trained, words, message):
    assert re.search(
        message,
        run(
            *words, *(["--output", "runs/none"] if words[0] != "evaluate" and words[0] != "generate" else []), status=2
        ),
    )


def test_a_file_of_settings_and_a_search(run, place):
    pytest.importorskip("optuna", reason="the finetune extra is not installed")
    (place / "a.toml").write_text(
        "[model]\nd_model = 16\nnhead = 2\n[settings]\nlr = 1e-3\n[search]\n'settings.lr' = [1e-3, 5e-3]\n'data.batch' = [16]\n"
    )
    words = ["pairs", "--data", "pairs.tsv", "--tokens", 800, "--config", "a.toml", "--output", "runs/searched"]
    out = run("search", *words)
    assert sorted(re.findall(r"settings.lr=\S+", "".join(out[-2:]))) == ["settings.lr=0.001", "settings.lr=0.005"]
    assert run("search", *words) == out[-3:]  # nothing is tried again
    assert run("train", *words[:-1], "runs/by-file", "--set", "model.d_model=32")[1].startswith("model 0.")
    assert json.loads((place / "runs/by-file/config.json").read_text())["d_model"] == 32
    with pytest.raises(ValueError, match="no section modle; there is: model"):
        (place / "b.toml").write_text("[modle]\n")
        overrides.read(place / "b.toml")
    with pytest.raises(ValueError, match="b.toml: no TOML"):
        (place / "b.toml").write_text("[model\n")
        overrides.read(place / "b.toml")


def test_a_frame_of_another_vocabulary_ignores_no_real_label():
    class Model:
        pad_id, bos_id, eos_id = 2, 1, 2

    assert own.frame_of(Model()) == Frame(2, 1, 2, -100)
    assert own.frame_of(Model(), add_bos=False).bos is None and Frame().ignored == PAD


def test_a_budget_in_minutes_becomes_tokens(run, place, monkeypatch):
    from tileformer.training.recipes import recipe

    monkeypatch.setattr(recipe, "REHEARSED", 300)
    words = ["train", "pairs", "--data", "pairs.tsv", "--output", "runs/minutes", "--core-minutes", "0.01", *SMALL]
    run(*words)
    (step,) = (place / "runs/minutes").glob("step-*")
    tokens = json.loads((step / "state.json").read_text())["settings"]["tokens"]
    assert tokens > 300
    run(*words, "--resume")
    assert json.loads((step / "state.json").read_text())["settings"]["tokens"] == tokens
    first = ["train", "pairs", "--data", "pairs.tsv", "--output", "runs/tokens", "--tokens", tokens, *SMALL]
    run(*first)  # and learns what a run of so many tokens does
    assert all(
        torch.equal(x, load(place / "runs/tokens")[0].state_dict()[name])
        for name, x in load(place / "runs/minutes")[0].state_dict().items()
    )
