"""`tileformer finetune`: one run with all it leaves behind, and a table that goes on where it was stopped."""

import argparse
import dataclasses
import itertools
import json
import math
import random
import signal

import pytest

from tileformer.training import checkpoint, generate, train
from tileformer.training.data.text import read_labelled
from tileformer.training.finetune import methods, table, texts
from tileformer.training.finetune import run as finetune
from tileformer.training.finetune.methods import METHODS
from tileformer.training.recipes import reviews

for optional in ("tokenizers", "sklearn", "matplotlib", "peft"):
    pytest.importorskip(optional)

LETTERS = "房间酒店服务早餐位置前台电脑屏幕键盘书内容作者"


@pytest.fixture
def data(tmp_path):
    """A user's file: 400 texts, 好 or 差 somewhere in each."""
    dice = random.Random(0)
    lines = []
    for number in range(400):
        letters = dice.choices(LETTERS, k=dice.randrange(7, 15))
        letters[dice.randrange(len(letters))] = "差好"[number % 2]
        lines.append(f"{('bad', 'good')[number % 2]}\t{''.join(letters)}\n")
    path = tmp_path / "own.tsv"
    path.write_text("".join(lines), "utf-8")
    return path


@pytest.fixture(autouse=True)
def small(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # where no run of anybody lies
    table.load_task.cache_clear()
    make = texts.make_config
    sizes = dict(d_model=16, nhead=2, num_layers=1, dim_feedforward=32)
    monkeypatch.setattr(texts, "make_config", lambda *a, **b: dataclasses.replace(make(*a, **b), **sizes))


def call(verb, *arguments):
    parser = argparse.ArgumentParser()
    verb.add_arguments(parser)
    return verb.main(parser.parse_args(list(map(str, arguments))))


def run(data, *arguments):
    fixed = ("--data", data, "--device", "cpu", "--precision", "fp32")
    return call(finetune, "reviews", *fixed, *arguments)


def test_the_list_names_every_method(capsys):
    assert call(finetune, "--list") == 0
    shown = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in shown] == list(METHODS)
    assert all(len(line.split()) > 4 for line in shown)


def test_one_run_leaves_scores_errors_plots_and_a_model(data, tmp_path, capsys):
    output = tmp_path / "run"
    assert run(data, "--method", "scratch", "--labels", 100, "--output", output) == 0
    shown = capsys.readouterr().out
    scores = json.loads((output / "scores.json").read_text())
    assert scores.keys() == {"scratch", "tfidf"}
    assert f"{scores['scratch']['accuracy']:.2%}" in shown and f"{scores['tfidf']['macro']['f1']:.2%}" in shown
    low, high = scores["tfidf"]["accuracy_interval"]
    assert low <= scores["tfidf"]["accuracy"] <= high
    names = {path.name for path in output.iterdir()}
    assert {"attention.png", "confusion.png", "curves-train.png", "errors.csv", "model.safetensors"} <= names
    assert not list(output.rglob("step-*"))
    errors = (output / "errors.csv").read_text("utf-8-sig").splitlines()[1:]
    assert len(errors) == round((1 - scores["scratch"]["accuracy"]) * scores["scratch"]["examples"])
    assert call(generate, "--checkpoint", output, "酒店好", "书差") == 0
    judged = capsys.readouterr().out.splitlines()
    assert all(line.split()[0] in ("bad", "good") and "%" in line for line in judged) and judged[1].endswith("书差")
    with pytest.raises(ValueError, match="a run is already here"):
        run(data, "--method", "scratch", "--output", output)


def test_a_pretrained_model_starts_a_method_and_is_reported(data, tmp_path, monkeypatch, capsys):
    lines = [line.split("\t")[1] for line in data.read_text("utf-8").splitlines()]
    monkeypatch.setattr(reviews.corpora, "newspaper", lambda: lines[:10])
    monkeypatch.setattr(reviews.corpora, "reviews", lambda: read_labelled(data))
    call(train, "reviews", "--output", tmp_path / "lm", "--tokens", 500, "--device", "cpu")
    arguments = ("--checkpoint", tmp_path / "lm", "--labels", 50, "--device", "cpu", "--output", tmp_path / "out")
    assert call(finetune, "reviews", "--method", "shared", *arguments) == 0
    assert "pretrained weights: " in capsys.readouterr().out
    meta = json.loads((tmp_path / "out" / "state.json").read_text())["meta"]
    assert meta["method"] == "shared" and meta["names"] == ["bad", "good"]


def test_the_same_labels_for_every_method_and_none_of_the_others(data, tmp_path, monkeypatch):
    task = table.load_task("reviews", data, "utf-8", tmp_path / "none")
    seen = []
    monkeypatch.setitem(
        METHODS, "scratch", dataclasses.replace(METHODS["scratch"], learn=lambda c, m: seen.append(c) or m)
    )
    args = argparse.Namespace(threads=1, device="cpu", precision="fp32")
    for seed in (0, 0, 1):
        table.predict(args, task, "scratch", "60", seed)
    first, again, other = seen
    assert first.rows == again.rows and first.rows != other.rows and len(first.rows) == 60
    train_rows = texts.to_rows(task.tokenizer, task.parts["train"].texts)
    assert sorted([*first.rows, *first.unlabelled]) == sorted(train_rows)
    test_rows = texts.to_rows(task.tokenizer, task.parts["test"].texts)
    assert not {tuple(row) for row in train_rows} & {tuple(row) for row in test_rows}


def test_a_table_goes_on_where_it_was_stopped(data, tmp_path, monkeypatch, capsys):
    output = tmp_path / "table"
    arguments = ("--table", "--method", "scratch", "--seeds", 2, "--output", output)
    whole, asked = table.predict, []

    def stopped(args, task, method, size, seed, folder=None):
        asked.append((method, size, seed))
        if len(asked) == 4:
            raise KeyboardInterrupt
        return whole(args, task, method, size, seed, folder)

    monkeypatch.setattr(table, "predict", stopped)
    with pytest.raises(KeyboardInterrupt):
        run(data, *arguments)
    assert run(data, *arguments) == 0
    cells = [(method, size, seed) for size in ("100", "all") for seed in (0, 1) for method in ("tfidf", "scratch")]
    assert asked == cells[:4] + cells[3:]  # 1,000 labels are more than there are; the fourth was asked for again
    shown = (output / "table.md").read_text()
    assert shown in capsys.readouterr().out
    assert [line.split("|")[1].strip() for line in shown.splitlines() if "±" in line and "|" in line] == [
        "tfidf",
        "scratch",
    ]
    assert len(json.loads((output / "table.json").read_text())) == 8

    (data.parent / "own.tsv").write_text(data.read_text("utf-8").replace("房", "屋"), "utf-8")
    table.load_task.cache_clear()
    with pytest.raises(ValueError, match="of other texts or another pretrained model"):
        run(data, *arguments)


@pytest.mark.slow  # two processes that import everything
def test_workers_measure_what_one_process_does(data, tmp_path):
    """Processes of their own import the full recipe, so the model is the recipe's own: the baseline needs none."""
    for workers in (1, 2):
        arguments = (
            "--table",
            "--method",
            "tfidf",
            "--seeds",
            1,
            "--workers",
            workers,
            "--output",
            tmp_path / str(workers),
        )
        assert run(data, *arguments) == 0
    cells = [json.loads((tmp_path / str(n) / "cells" / "tfidf-all-0.json").read_text()) for n in (1, 2)]
    assert cells[0] | {"core_seconds": 0} == cells[1] | {"core_seconds": 0}


def test_the_table_shows_mean_and_student_interval():
    cell = {
        "labels": "100",
        "examples": 1753,
        "accuracy_interval": [0.8, 0.84],
        "core_seconds": 90,
        "macro": {"f1": 0.5},
    }
    cells = [cell | {"method": "a", "seed": seed, "accuracy": 0.80 + 0.02 * seed} for seed in range(3)]
    cells += [cell | {"method": "b", "seed": 0, "labels": "all", "accuracy": 0.9}]
    header, _, a, b, *_ = table.render(cells).splitlines()
    half = 100 * 4.302653 * 0.02 / math.sqrt(3)
    assert a == f"| a | 82.00 ± {half:.2f} | 50.00 ± 0.00 | 1.50 | - | - | - |"
    assert b == "| b | - | - | - | 90.00 | 50.00 | 1.50 |"
    assert header.count("core-min") == 2 and "± 2.0 points" in table.render(cells)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "no recipe given; to fine-tune there is: pairs, text, reviews"),
        (["g2p"], "no recipe 'g2p'"),
        (["reviews", "--method", "magic"], "no method 'magic'; there is: scratch"),
        (["reviews", "--method", "full,lora"], "no method 'full,lora'"),
        (["reviews", "--labels", "1"], "a number above 1 or all, got '1'"),
        (["reviews", "--method", "gan"], "gan needs texts without labels: give --labels N"),
        (["reviews", "--table", "--seed", "7"], "--table takes its own"),
        (["reviews", "--checkpoint", "."], "expected a checkpoint .* it holds none"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        call(finetune, *arguments)


def test_without_a_pretrained_model_the_command_for_one_is_named(data, tmp_path):
    with pytest.raises(ValueError, match="full starts from a pretrained model.*tileformer train reviews"):
        run(data, "--labels", 50, "--output", tmp_path / "x")
    with pytest.raises(ValueError, match="full starts from a pretrained model"):
        run(data, "--table", "--method", "scratch,full", "--output", tmp_path / "x")
    assert not list((tmp_path / "x").rglob("*.json")), "found before anything is trained"


def test_a_run_that_was_stopped_can_be_asked_for_again(data, tmp_path, monkeypatch):
    arguments = ("--method", "scratch", "--labels", 50, "--output", tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(table, "probabilities", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(data, *arguments)
    assert list((tmp_path / "run" / "stages").glob("*/step-*"))
    assert run(data, *arguments) == 0


def test_an_interrupted_run_goes_on_to_the_same_bits(data, tmp_path, monkeypatch, capsys):
    arguments = ("--method", "scratch", "--labels", 50, "--output")
    assert run(data, *arguments, tmp_path / "whole") == 0
    whole, calls = methods.fit, itertools.count(1)

    def stops(model, batches, settings, loss_fn, **options):
        def stopping(model, batch):
            if next(calls) == 7:
                signal.raise_signal(signal.SIGINT)
            return loss_fn(model, batch)

        return whole(model, batches, settings, stopping, **options)

    monkeypatch.setattr(methods, "fit", stops)
    with pytest.raises(KeyboardInterrupt):
        run(data, *arguments, tmp_path / "run")
    assert "go on with: tileformer finetune reviews --method scratch --labels 50 " in capsys.readouterr().err
    assert [step.name for step in (tmp_path / "run").glob("stages/*/step-*")] == ["step-00000007"]
    with pytest.raises(checkpoint.CheckpointError, match="meta seed=0; asked to resume with 1"):
        run(data, *arguments, tmp_path / "run", "--seed", 1)
    assert run(data, *arguments, tmp_path / "run", "--resume") == 0
    models = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "run")]
    assert models[0] == models[1] and not list(tmp_path.rglob("step-*"))
    with pytest.raises(ValueError, match="expected a run that was stopped, to resume; it holds none"):
        run(data, *arguments, tmp_path / "none", "--resume")


def test_a_damaged_cell_is_named(data, tmp_path):
    arguments = ("--table", "--method", "tfidf", "--seeds", 1, "--output", tmp_path)
    (tmp_path / "cells").mkdir()
    for content in ("[]", "{", '{"task": null}'):
        (tmp_path / "cells" / "tfidf-100-0.json").write_text(content)
        with pytest.raises(ValueError, match="tfidf-100-0.json: damaged"):
            run(data, *arguments)


def test_no_command_writes_into_a_folder_of_the_other_kind(data, tmp_path):
    model = tmp_path / "model"
    assert run(data, "--method", "scratch", "--labels", 50, "--output", model) == 0
    with pytest.raises(ValueError, match="a fine-tuned model is here"):
        call(train, "reviews", "--output", model, "--device", "cpu")
    with pytest.raises(checkpoint.CheckpointError, match="a model that is ready for use"):
        call(train, "reviews", "--output", model, "--device", "cpu", "--resume")
    (tmp_path / "pretrained" / "step-00000001").mkdir(parents=True)
    with pytest.raises(ValueError, match="a run is already here"):
        run(data, "--method", "scratch", "--output", tmp_path / "pretrained")


def test_texts_that_read_alike_are_on_one_side(tmp_path):
    lines = [f"{'ab'[i % 2]}\t{''.join(random.Random(i).choices(LETTERS, k=9))}\n" for i in range(300)]
    marked = [line.replace("\t", "\t<p>").replace("\n", "</p>\n") for line in lines]
    path = tmp_path / "marked.tsv"
    path.write_text("".join([*lines, *marked, "a\t<br/>\n"]), "utf-8")
    parts, _ = texts.split(read_labelled(path))
    kept = [text for part in parts.values() for text in part.texts]
    assert len(kept) == len(set(kept)) == 300 and all(kept)
