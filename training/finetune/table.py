"""Cells of the table of methods: one method, one number of labels, one seed, scored on the test part, and kept.

A cell is a file of its own, so a table goes on where it was stopped, and several processes fill one.
"""

import argparse
import contextlib
import functools
import hashlib
import io
import math
import multiprocessing
import os
import shutil
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from tileformer.files import read_json, to_json, write
from tileformer.training import checkpoint
from tileformer.training.data import text
from tileformer.training.finetune import baseline, metrics, texts
from tileformer.training.finetune.methods import METHODS, Context, probabilities
from tileformer.training.loop import resolve_precision
from tileformer.training.recipes import RECIPES
from tileformer.training.recipes.recipe import load

SIZES = ("100", "1000", "all")
BASELINE = "tfidf"
_FIGURES = {"method", "labels", "seed", "task", "core_seconds", "accuracy", "accuracy_interval", "macro", "examples"}


@dataclass(frozen=True)
class Task:
    """Labelled texts in parts, and the pretrained model's tokenizer, shape and weights (None: from scratch only).

    fingerprint: of the texts and the weights; the cells of one table must share it.
    """

    parts: dict[str, text.Labelled]
    tokenizer: Any
    config: Any
    weights: dict[str, Any] | None
    fingerprint: str


@functools.lru_cache(maxsize=1)  # a process of the table reads it once
def load_task(name: str, data: Path | None, encoding: str, path: Path, skip_bad_lines: bool = False) -> Task:
    """Read the recipe's texts, or `data`, and the pretrained model at `path` if there is one."""
    recipe = RECIPES[name]
    if data is not None:
        labelled = text.read_labelled(data, encoding=encoding, skip_bad_lines=skip_bad_lines)
    elif recipe.labelled is not None:
        labelled = recipe.labelled()
    parts, facts = texts.split(labelled)
    print(facts)
    digest = hashlib.sha256(repr([(part.texts, part.labels) for part in parts.values()]).encode())
    if path.exists():
        model, tokenizer = load(recipe, checkpoint.latest(path), torch.device("cpu"))
        config, weights = model.config, model.state_dict()
        for tensor in weights.values():
            digest.update(tensor.contiguous().numpy().tobytes())
    else:
        tokenizer, weights = texts.make_tokenizer(parts["train"].texts), None
        config = texts.make_config(tokenizer)
    config = replace(config, dropout=0.1)
    return Task(parts, tokenizer, config, weights, digest.hexdigest()[:16])


def predict(args: argparse.Namespace, task: Task, method: str, size: str, seed: int, folder: Path | None = None) -> Any:
    """(probabilities (N, classes) of the test part, core-seconds of training, the model or None for the baseline).

    Which labels `size` of them are follows from the seed alone, so every method and the baseline see the same ones.
    """
    torch.set_num_threads(args.threads)
    train, test = task.parts["train"], task.parts["test"]
    chosen = train if size == "all" else text.subset(train, int(size), seed)
    if method == BASELINE:
        return *baseline.tfidf(chosen.texts, chosen.labels, test.texts, len(train.names)), None
    known, few = set(chosen.texts), len(chosen) < 300
    context = Context(
        config=task.config,
        weights=task.weights,
        rows=texts.to_rows(task.tokenizer, chosen.texts),
        labels=chosen.labels,
        unlabelled=texts.to_rows(task.tokenizer, [line for line in train.texts if line not in known]),
        classes=len(train.names),
        epochs=20 if few else 6 if len(chosen) < 3000 else 2,  # few texts are read often, many rarely
        batch_size=16 if few else 32,
        seed=seed,
        device=torch.device(args.device),
        precision=args.precision,
        folder=folder,
        meta={"task": task.fingerprint, "method": method, "labels": size, "seed": seed},
    )
    model, report = METHODS[method].start(context)
    if folder is not None and report is not None:
        print(f"pretrained weights: {report}")
    spent = 0.0  # before this process, in the stages of a run that was stopped
    for stage in [] if folder is None else folder.glob("*/"):
        if checkpoint.steps_in(stage):
            spent += checkpoint.read_training_state(checkpoint.latest(stage)).core_seconds
    start = time.process_time()
    model = METHODS[method].learn(context, model).eval()
    spent += time.process_time() - start
    return probabilities(model, texts.to_rows(task.tokenizer, test.texts)).numpy(), spent, model


def score(task: Task, probability: Any) -> dict[str, Any]:
    """Scores on the test part, and the interval that the choice of its texts leaves around the accuracy."""
    test, predicted = task.parts["test"], probability.argmax(1)
    result = metrics.classification(test.labels, predicted, test.names)
    return result | {"accuracy_interval": metrics.bootstrap(test.labels, predicted)}


def table(args: argparse.Namespace) -> int:
    """Every cell that is not there yet, then the table from all that are."""
    (args.output / "cells").mkdir(parents=True, exist_ok=True)
    names = list(dict.fromkeys([BASELINE, *(args.method.split(",") if args.method else METHODS)]))
    task = load_task(args.recipe, args.data, args.encoding, args.checkpoint, args.skip_bad_lines)
    for name in names:
        if name in METHODS:
            METHODS[name].check(task.weights)
    sizes = [size for size in SIZES if size == "all" or int(size) < len(task.parts["train"])]
    jobs = [
        (args, name, size, seed)
        for size in sizes  # the cheap ones first: a table that is stopped has whole columns
        for seed in range(args.seeds)
        for name in names
        if not (size == "all" and name in METHODS and METHODS[name].unlabelled)
    ]
    if args.workers == 1:
        done = [_cell(job) for job in jobs]
    else:
        with ProcessPoolExecutor(args.workers, multiprocessing.get_context("spawn")) as pool:
            try:
                done = list(pool.map(_cell, jobs))
            except BaseException:  # or the pool would first go through all that is left
                pool.shutdown(wait=False, cancel_futures=True)
                for process in multiprocessing.active_children():
                    process.terminate()
                raise
    shown = render(done)
    write(args.output / "table.md", shown)
    write(args.output / "table.json", to_json(done, indent=1))
    print(shown, end="")
    return 0


def _cell(job: tuple[argparse.Namespace, str, str, int]) -> dict[str, Any]:
    """The scores of one method, size and seed: read if they are there, else measured and written."""
    args, method, size, seed = job
    task = load_task(args.recipe, args.data, args.encoding, args.checkpoint, args.skip_bad_lines)
    how = {"device": args.device, "precision": resolve_precision(args.precision, torch.device(args.device))}
    file = args.output / "cells" / f"{method}-{size}-{seed}.json"
    if file.exists():
        result = read_json(file)
        if not isinstance(result, dict) or not result.keys() >= _FIGURES:
            raise ValueError(f"{file}: damaged; expected the scores of a cell: remove it, and it is measured again")
        if result["task"] != task.fingerprint:
            raise ValueError(f"{file}: of other texts or another pretrained model; choose another --output")
        if (before := {name: result.get(name, now) for name, now in how.items()}) != how:
            raise ValueError(f"{file}: computed with {before}, asked for {how}; choose another --output")
        return result
    stages = args.output / "stages" / f"{method}-{size}-{seed}"
    try:
        quiet = io.StringIO()  # the bars of several processes would draw over each other
        with contextlib.redirect_stderr(quiet), contextlib.redirect_stdout(quiet):
            probability, spent, _ = predict(args, task, method, size, seed, stages)
    except (KeyboardInterrupt, SystemExit):
        if multiprocessing.parent_process() is not None:
            os._exit(1)  # the stage is saved; the pool would hand this process the next cell
        raise
    result = {"method": method, "labels": size, "seed": seed, "task": task.fingerprint, "core_seconds": spent} | how
    result |= score(task, probability)
    write(file, to_json(result, indent=1))
    shutil.rmtree(stages, ignore_errors=True)
    print(f"{method} {size} seed {seed}: accuracy {result['accuracy']:.2%}, {spent:.0f} core-seconds", flush=True)
    return result


def render(cells: Sequence[dict[str, Any]]) -> str:
    """The cells as a Markdown table: a method a row, mean over seeds and its 95 % Student interval."""

    def shown(method: str, size: str) -> str:
        mine = [cell for cell in cells if (cell["method"], cell["labels"]) == (method, size)]
        if not mine:
            return "- | - | -"
        figures = ([cell["accuracy"] for cell in mine], [cell["macro"]["f1"] for cell in mine])
        texts = [
            f"{100 * mean:.2f}" + ("" if math.isnan(half) else f" ± {100 * half:.2f}")
            for mean, half in map(metrics.over_seeds, figures)
        ]
        return " | ".join((*texts, f"{sum(cell['core_seconds'] for cell in mine) / len(mine) / 60:.2f}"))

    sizes = [size for size in SIZES if any(cell["labels"] == size for cell in cells)]
    header = " | ".join(f"{size}: accuracy % | macro F1 % | core-min" for size in sizes)
    rows = [f"| method | {header} |", "| --- |" + " --- |" * 3 * len(sizes)]
    for method in dict.fromkeys(cell["method"] for cell in cells):
        rows.append(f"| {method} | {' | '.join(shown(method, size) for size in sizes)} |")
    seeds, examples = len({cell["seed"] for cell in cells}), cells[0]["examples"]
    widest = max(high - low for low, high in (cell["accuracy_interval"] for cell in cells))
    rows.append("")
    if seeds > 1:
        rows += [f"Mean over {seeds} seeds (labels, weights, order) and the 95 % Student interval of that mean."]
    sample = f"for one model, up to ± {50 * widest:.1f} points (bootstrap)"
    rows.append(f"The {examples:,} test texts are a sample too: {sample}.")
    return "\n".join(rows) + "\n"
