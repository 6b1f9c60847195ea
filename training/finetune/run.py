"""Fine-tune a model: one that writes on your pairs or texts; one that classifies beside the TF-IDF baseline.

Examples:
    tileformer finetune pairs --checkpoint FOLDER --data FILE.tsv --method lora    source<TAB>target, a prompt and its
    tileformer finetune text --checkpoint FOLDER --data FILE.txt                   answer to a decoder alone
    tileformer finetune --list
    tileformer train reviews                                   the pretrained model, once
    tileformer finetune reviews --method lora --labels 1000
    tileformer finetune reviews --data FILE --method full      your own texts, one label<TAB>text a line
    tileformer finetune reviews --table --workers 2            every method x 100, 1000, all labels x 3 seeds
"""

import argparse
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from tileformer import arguments
from tileformer.extras import optional_import
from tileformer.files import quote, to_json, write
from tileformer.kernels.info import require_device
from tileformer.training import checkpoint, process
from tileformer.training.finetune import metrics, own, plots, table, texts
from tileformer.training.finetune.methods import METHODS, probabilities
from tileformer.training.recipes import RECIPES

OWN = ("pairs", "text")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `tileformer finetune`."""
    add = parser.add_argument
    add("recipe", nargs="?", help="pairs, text, or what to classify: reviews")
    add("--list", action="store_true", help="list the methods and stop")
    about = "how; --list names them (default full; with --table all, or several: a,b)"
    add("--method", type=arguments.name, metavar="M", help=about)
    add("--labels", default="all", metavar="N", help="texts of the train part whose label is used (default all)")
    about = "your own source<TAB>target, texts, or label<TAB>text instead of the recipe's"
    add("--data", type=arguments.input_file, metavar="FILE", help=about)
    about = "of pairs and text: what to validate on (default 5 %% of --data by hash)"
    add("--valid", type=arguments.input_file, metavar="FILE", help=about)
    add("--tokens", type=arguments.TOKENS, metavar="N", help="of pairs and text: token budget (default three epochs)")
    about = "of pairs and text: tables [settings] and [data], or one key of them (settings.lr=0.001, data.rank=16)"
    add("--config", type=arguments.input_file, metavar="FILE", help=about)
    add("--set", action="append", default=[], metavar="KEY=VALUE", help=about)
    add("--encoding", type=arguments.encoding, default="utf-8", metavar="E", help="of --data (default utf-8)")
    add("--skip-bad-lines", action="store_true", help="leave out lines of --data that cannot be read, and say how many")
    add("--checkpoint", type=arguments.input_path, metavar="PATH", help="the pretrained model (default runs/RECIPE)")
    about = "default runs/RECIPE-METHOD-N-SEED, with --table runs/RECIPE-table"
    add("--output", type=arguments.output_folder, metavar="DIR", help=about)
    about = "go on with the run in the output folder; without it too, if there is one"
    add("--resume", action="store_true", help=about)
    add("--table", action="store_true", help="all methods and sizes; goes on where it was stopped")
    add("--seeds", type=arguments.whole(1, 1000), default=3, metavar="N", help="of --table (default 3)")
    add("--workers", type=arguments.whole(1, 1000), default=1, metavar="N", help="processes of --table (default 1)")
    process.add_arguments(parser)


def main(args: argparse.Namespace) -> int:
    """One run, or the table. ValueError: wrong arguments or input."""
    if args.list:
        width = max(map(len, METHODS))
        for method in METHODS.values():
            print(f"{method.name:<{width}}  {method.about}")
        return 0
    process.require_single()
    again = process.command("finetune", add_arguments, args)
    if args.recipe in OWN:
        return own.main(args, again)
    _check(args)
    args.device = require_device(args.device).type
    args.checkpoint = args.checkpoint or Path("runs") / args.recipe
    if args.checkpoint.exists():
        checkpoint.read_state(checkpoint.latest(args.checkpoint))  # damaged, or none: said before the texts are read
    args.method = args.method or (None if args.table else "full")
    ending = "table" if args.table else f"{args.method}-{args.labels}-{args.seed}"
    args.output = args.output or arguments.output_folder(f"runs/{args.recipe}-{ending}")
    for name in ("sklearn", "scipy", "matplotlib"):  # said before the training, not after it
        optional_import(name)
    if not args.table and ((args.output / checkpoint.STATE).exists() or checkpoint.steps_in(args.output)):
        raise ValueError(f"{args.output}: a run is already here; choose another --output")

    def saved() -> bool:
        """Whether a run was stopped here: a stage of it, or a cell of the table, is kept."""
        return any(args.output.glob("stages/**/step-*")) or any(args.output.glob("cells/*.json"))

    if args.resume and not saved():
        raise ValueError(f"{args.output}: expected a run that was stopped, to resume; it holds none")
    with process.lock(args.output), process.interruptible(again, saved):
        return table.table(args) if args.table else _single(args)


def _single(args: argparse.Namespace) -> int:
    """One method beside the baseline, with everything to look at in the output folder."""
    task = table.load_task(args.recipe, args.data, args.encoding, args.checkpoint, args.skip_bad_lines)
    test = task.parts["test"]
    stages = args.output / "stages"
    probability, spent, model = table.predict(args, task, args.method, args.labels, args.seed, stages)
    scores = {args.method: table.score(task, probability) | {"core_seconds": spent}}
    other, seconds, _ = table.predict(args, task, table.BASELINE, args.labels, args.seed)
    scores[table.BASELINE] = table.score(task, other) | {"core_seconds": seconds}

    valid = task.parts["valid"]
    guessed = probabilities(model, texts.to_rows(task.tokenizer, valid.texts)).argmax(1)
    chosen_by = metrics.classification(valid.labels, guessed.tolist(), valid.names)["accuracy"]
    predicted = probability.argmax(1)
    meta = {"recipe": args.recipe, "method": args.method, "names": test.names}
    texts.save_classifier(args.output, model, task.config, task.tokenizer, **meta)
    write(args.output / "scores.json", to_json(scores, indent=1))
    counts = metrics.confusion(test.labels, predicted, len(test.names))
    plots.confusion(counts, test.names, args.output / "confusion.png")
    for log in sorted(stages.glob("*/log.jsonl")):
        plots.learning_curves(log, args.output / f"curves-{log.parent.name}.png")
        for step in checkpoint.steps_in(log.parent):  # the end of a stage is only the start of the next one
            checkpoint.discard(step)
    (row,) = texts.to_rows(task.tokenizer, [test.texts[0][:30]])
    letters = ["begin", *(task.tokenizer.decode([number]) for number in row[1:])]
    plots.attention(attention_weights(model, row), letters, args.output / "attention.png")
    shares, errors = probability.max(1), args.output / "errors.csv"
    wrong = metrics.errors_csv(errors, test.texts, test.labels, predicted, shares, test.names)
    print(f"test, {len(test):,} texts never seen; {args.labels} labels, seed {args.seed}:")
    for name, scored in scores.items():
        low, high = scored["accuracy_interval"]
        figures = f"accuracy {scored['accuracy']:.2%} ({low:.1%} to {high:.1%}), macro F1 {scored['macro']['f1']:.2%}"
        print(f"  {name:<9} {figures}, {scored['core_seconds']:.1f} core-seconds")
    print(f"valid, {len(valid):,} texts, by which to choose between methods: {args.method} {chosen_by:.2%}")
    print(f"{wrong} errors in {errors}; plots beside it")
    print(f"use it: tileformer generate --checkpoint {args.output} TEXT ...")
    return 0


def attention_weights(model: Any, row: Sequence[int]) -> Any:
    """Weights (H, T, T) of the last layer's attention for one row of ids, of a pre-norm model in eval mode."""
    backbone = model.backbone
    tokens = torch.tensor([list(row)], device=next(model.parameters()).device)
    layer = backbone.layers[-1]
    with torch.no_grad():
        x = layer.norm1(backbone.states(tokens)[-2])
        return layer.self_attn(x, x, x, need_weights=True, causal=True)[1][0]


def _check(args: argparse.Namespace) -> None:
    known = [name for name, recipe in RECIPES.items() if recipe.labelled]
    if args.recipe not in known:
        found = "no recipe given" if args.recipe is None else f"no recipe {quote(args.recipe)}"
        raise ValueError(f"{found}; to fine-tune there is: {', '.join((*OWN, *known))}")
    for name in ("valid", "tokens", "config", "set"):
        if getattr(args, name):
            raise ValueError(f"--{name} is of {' and '.join(OWN)}: a classifier's split and settings are the table's")
    method = args.method or "full"
    names = method.split(",") if args.table else [method]
    allowed = {*METHODS, table.BASELINE} if args.table else {*METHODS}
    if unknown := [name for name in names if name not in allowed]:
        raise ValueError(f"no method {quote(unknown[0])}; there is: {', '.join(METHODS)}")
    if args.labels != "all" and not re.fullmatch("[2-9]|[1-9][0-9]{1,8}", args.labels):
        raise ValueError(f"--labels must be a number above 1 or all, got {quote(args.labels)}")
    if args.labels == "all" and not args.table and METHODS[method].unlabelled:
        raise ValueError(f"{method} needs texts without labels: give --labels N")
    if args.table and (args.labels != "all" or args.seed):
        raise ValueError("--table takes its own --labels and --seed; choose with --method and --seeds")
