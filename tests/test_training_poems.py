"""The poems recipe: what a regular poem is, a split without a shared line, the form check, and both verbs on few
poems."""

import argparse
import dataclasses
import io
import json
import math
import random
import tarfile

import pytest
import torch

pytest.importorskip("safetensors", reason="the train extra is not installed")

from tileformer.decoder import DecoderLM, DecoderLMConfig
from tileformer.training import generate, train
from tileformer.training.data import corpora, text
from tileformer.training.recipes import RECIPES, poems
from tileformer.training.recipes.recipe import Scale

CHARACTERS = "春風秋月花鳥山水雲雨天地日夜人心江海松竹梅雪酒詩書劍琴夢"
MOON = ("床前明月光", "疑是地上霜", "舉頭望明月", "低頭思故鄉")


def call(verb, *words):
    parser = argparse.ArgumentParser()
    verb.add_arguments(parser)
    return verb.main(parser.parse_args([str(word) for word in words]))


def poem(*paragraphs):
    return corpora.Poem("title", "author", "tang", paragraphs)


def draw(count, seed=0):
    chosen = random.Random(seed)
    shapes = [*poems.FORMS.values()]
    for _ in range(count):
        lines, length = chosen.choice(shapes)
        yield tuple("".join(chosen.choices(CHARACTERS, k=length)) for _ in range(lines))


@pytest.fixture
def archive(tmp_path):
    """A .tgz as npm packs it, with 800 regular poems and some that are not."""
    found = [[poems.written(lines[i : i + 2]) for i in range(0, len(lines), 2)] for lines in draw(800)]
    found += [["春風秋月花。"], ["春風秋月□，花鳥山水雲。", "雨天地日夜，人心江海松。"], []]
    content = json.dumps([{"title": "t", "author": "a", "paragraphs": p} for p in found]).encode()
    path = tmp_path / "poems.tgz"
    with tarfile.open(path, "w:gz") as tar:
        member = tarfile.TarInfo("package/dist/quantangshi/poet.tang.0.json")
        member.size = len(content)
        tar.addfile(member, io.BytesIO(content))
    return path


def test_regular_poems_are_told_from_others():
    assert poems.lines_of(poem("床前明月光，疑是地上霜。", "舉頭望明月？低頭思故鄉！")) == MOON
    others = [("床前明月光，疑是地上霜。",), ("床前明月光，疑是地上。", "舉頭望明月，低頭思故鄉。"), (), ("，。",)]
    others += [
        ("床前明月□，疑是地上霜。", "舉頭望明月，低頭思故鄉。"),
        ("床前明月a，疑是地上霜。", "舉頭望明月，低頭思故鄉。"),
    ]
    assert all(poems.lines_of(poem(*paragraphs)) is None for paragraphs in others)


def test_the_form_is_checked_to_the_character():
    whole = poems.written(MOON)
    assert whole == "床前明月光，疑是地上霜。舉頭望明月，低頭思故鄉。"
    assert poems.form_of(whole) == "4x5" and poems.form_of(whole * 2) == "8x5"
    wrong = [whole[1:], whole[:-1], whole[:12], whole + "月", whole.replace("，", "。"), whole.replace("光", "□"), ""]
    assert [poems.form_of(text) for text in wrong] == [None] * len(wrong)
    assert {poems.form_of(poems.written(lines)) for lines in draw(40)} == set(poems.FORMS)


def test_split_repeats_nothing_and_shares_no_line():
    everything = [*draw(3000), *draw(50)]  # 50 are there twice
    everything += [(*lines[:-1], lines[-1][::-1]) for lines in everything[:1000]]  # and many with another last line
    parts, characters = poems.split(everything)
    assert set(characters) == set(CHARACTERS) and all(len(part) > 10 for part in parts.values())
    train_lines = {line for lines in parts["train"] for line in lines}
    for name, low, high in (("test", 0, 1), ("valid", 1, 2), ("train", 2, 100)):
        assert all(low <= text.hash_bucket("".join(lines)) < high for lines in parts[name])
        assert len(set(parts[name])) == len(parts[name])
        assert name == "train" or all(train_lines.isdisjoint(lines) for lines in parts[name])
    assert poems.split(reversed(everything))[1] == characters
    rare = ("龍春風秋月", *MOON[1:])
    assert rare not in poems.split([*everything, rare])[0]["train"]
    with pytest.raises(ValueError, match="no poems in the"):
        poems.split([MOON])


def test_perplexity_of_a_model_that_guesses_evenly():
    vocabulary = poems.Vocabulary(CHARACTERS)
    model = DecoderLM(DecoderLMConfig(vocabulary.size, 16, 2, 1, 32, max_length=poems.LONGEST)).eval()
    with torch.no_grad():
        model.embedding.weight.zero_()
    rows = vocabulary.rows(draw(40))
    symbols = sum(len(row) for row in rows)  # without the form, with the end
    characters = sum(len(line) for lines in draw(40) for line in lines)
    wanted = math.exp(math.log(vocabulary.size) * symbols / characters)
    assert poems.perplexity(model, rows) == pytest.approx(wanted, rel=1e-4)


def test_rows_and_back():
    vocabulary = poems.Vocabulary(CHARACTERS)
    row = vocabulary.row("8x7", "春風，")
    assert row == [4 + 3, 10, 11, 8] and vocabulary.decode([1, *row, 3, 2, 0]) == "□春風，□"
    assert vocabulary.size == 4 + 4 + 2 + len(CHARACTERS)
    longest = max(len(row) for row in vocabulary.rows(draw(200)))
    assert longest + 1 == poems.LONGEST  # with begin


def test_train_resume_and_generate(archive, tmp_path, monkeypatch, capsys):
    """The whole command on few poems; quality is not the claim here."""
    monkeypatch.setattr(poems, "SAMPLED", 3)
    sizes = {"dropout": 0.0, "d_model": 32, "nhead": 2, "num_layers": 1, "dim_feedforward": 128}
    quick = Scale(dataclasses.replace(poems.LEARNING, tokens=4000), 1024, sizes)
    monkeypatch.setitem(RECIPES, "poems", dataclasses.replace(poems.RECIPE, quick=quick))
    run = tmp_path / "run"
    arguments = ("poems", "--data", archive, "--output", run, "--device", "cpu", "--threads", torch.get_num_threads())
    assert call(train, *arguments) == 0
    out = capsys.readouterr().out
    wanted = ["800 regular poems", "sha256", "core-seconds", "perplexity", "8x7  form rate", "of 12 sampled poems"]
    assert all(text in out for text in wanted), out
    assert call(train, *arguments, "--resume") == 0
    again = capsys.readouterr().out
    assert (
        again[again.index("  perplexity") :].split(" core-seconds")[0][:300] == out[out.index("  perplexity") :][:300]
    )

    assert call(generate, "--checkpoint", run, "4x5", "8x7：春風", "4x5") == 0
    first, second, third = capsys.readouterr().out.splitlines()
    assert first.startswith("4x5  ") and second.startswith("8x7：春風  春風") and first != third
    for word, message in (
        ("5x5", "no form '5x5'"),
        ("4x5:风", "never learned '风'"),
        ("4x5:" + "春" * 25, "24 symbols"),
    ):
        with pytest.raises(ValueError, match=message):
            call(generate, "--checkpoint", run, word)


def test_a_model_that_has_seen_one_poem_writes_it():
    """Sampling feeds back what it should: a minute model that learned one poem by heart keeps its form."""
    torch.manual_seed(0)
    vocabulary = poems.Vocabulary("".join(sorted({*"".join(MOON)})))
    model = DecoderLM(DecoderLMConfig(vocabulary.size, 32, 2, 1, 64, dropout=0.0, max_length=poems.LONGEST))
    tokens = torch.tensor([[1, *vocabulary.rows([MOON])[0], 2]])
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(80):
        loss = torch.nn.functional.cross_entropy(model(tokens[:, :-1])[0], tokens[0, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    requests = [("4x5", ""), ("4x5", "床前明月光，疑")]
    assert poems.write(model.eval(), vocabulary, requests) == [poems.written(MOON)] * 2
