"""A recipe is a value, and `run` is the only program: read, build, train, measure, say how to go on.

    run(RECIPES["g2p"], ["--tokens", "20000", "--output", "runs/short"])

`tileformer train NAME` runs the recipes of this folder; a value of anybody's own runs the same way.
"""

import argparse
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tileformer import arguments
from tileformer.decoder.command import Decoding
from tileformer.files import quote
from tileformer.kernels.info import require_device
from tileformer.training import checkpoint, process
from tileformer.training.data.text import Labelled
from tileformer.training.loop import AnyBatches, LossFunction, Report, fit, resolve_precision
from tileformer.training.settings import Settings


@dataclass(frozen=True)
class Scale:
    """How large a run is: how to learn, the size of a step's batch, and options of the model's configuration."""

    settings: Settings
    batch: int
    model: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Data:
    """What a recipe has read: batches to learn from and to validate on, and what `Recipe.evaluate` needs beside them.

    vocabulary: what the ids mean. test: what is measured on. facts: lines that a run prints first. meta: JSON that each
    checkpoint keeps; a run is resumed only with the same. files: by name, what is saved (`save(path)`) in the run.
    """

    train: AnyBatches
    valid: AnyBatches | None = None
    vocabulary: Any = None
    test: Any = None
    facts: Sequence[str] = ()
    meta: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Recipe:
    """One task from its data to its scores.

    quick, full: how large a run is, without and with --full. data(args) reads; args are the options of `add_arguments`
    and those that arguments(parser) declares, and `args.scale`, one of the two. config(args, data) is a dataclass, from
    which model(config) makes the model. loss(model, batch): see `fit`. evaluate(model, data, report, args): lines that
    say how good the model is.

    For `tileformer generate`: vocabulary(path, meta, config) is what a checkpoint's ids mean, CheckpointError if they
    do not fit the model; parse(vocabulary, text) is an input or a ValueError; decoding says how its answer is written,
    or show(model, vocabulary, inputs) gives a line for each. For `tileformer finetune`: labelled() are the texts to
    classify. about: its first line is shown by --list.
    """

    name: str
    quick: Scale
    data: Callable[[argparse.Namespace], Data]
    config: Callable[[argparse.Namespace, Data], Any]
    model: Callable[[Any], nn.Module]
    loss: LossFunction
    full: Scale | None = None
    evaluate: Callable[[Any, Data, Report, argparse.Namespace], Iterable[str]] = lambda *_: ()
    arguments: Callable[[Any], None] = lambda parser: None
    config_type: type[Any] | None = None
    vocabulary: Callable[[Path, Mapping[str, Any], Any], Any] = lambda *_: None
    parse: Callable[[Any, str], Any] = lambda vocabulary, text: text
    show: Callable[[Any, Any, Sequence[Any]], Iterable[str]] = lambda model, vocabulary, inputs: inputs
    decoding: Decoding | None = None
    labelled: Callable[[], Labelled] | None = None
    about: str = ""
    example: str = ""


def add_arguments(parser: argparse.ArgumentParser, recipe: Recipe) -> None:
    """The options of every recipe, then those of this one."""
    add = parser.add_argument
    if recipe.full:
        add("--full", action="store_true", help="train for quality instead of the quick start")
    process.add_arguments(parser)
    folder = f"runs/{recipe.name}"
    add("--output", type=arguments.output_folder, default=folder, metavar="DIR", help=f"run folder (default {folder})")
    add("--resume", action="store_true", help="continue the run in the output folder")
    add("--overwrite", action="store_true", help="remove the run in the output folder first")
    add("--tokens", type=arguments.TOKENS, metavar="N", help="token budget instead of the recipe's own")
    recipe.arguments(parser.add_argument_group(f"of {recipe.name}"))


def run(recipe: Recipe, args: argparse.Namespace | Sequence[str] = ()) -> Report:
    """Train a recipe with its parsed options, or with the words of them, and print what came of it.

    Raises ValueError for wrong options or data, or a folder that is in use; FloatingPointError when the run diverges.
    """
    if not isinstance(args, argparse.Namespace):
        parser = argparse.ArgumentParser(recipe.name)
        add_arguments(parser, recipe)
        args = parser.parse_args(args)
    args.scale = recipe.full if recipe.full and args.full else recipe.quick
    process.require_single()
    device, output = require_device(args.device), args.output
    torch.set_num_threads(args.threads)
    if args.resume and args.overwrite:
        raise ValueError("--resume continues a run and --overwrite removes it: choose one")
    if args.resume:
        checkpoint.candidates(output)  # nothing to resume: said before any data are read
    elif (output / checkpoint.STATE).exists():
        raise ValueError(f"{output}: a fine-tuned model is here; choose another --output")
    elif (steps := checkpoint.steps_in(output)) and not args.overwrite:
        raise ValueError(f"{steps[-1]}: a run is already here; add --resume, --overwrite or another --output")
    with process.lock(output):
        data = recipe.data(args)
        for fact in data.facts:
            print(fact)
        for name, content in ({} if args.resume else data.files).items():  # a run keeps its own, `fit` refuses another
            content.save(output / name)
        torch.manual_seed(args.seed)
        config = recipe.config(args, data)
        model = recipe.model(config).to(device)
        tokens = args.tokens or args.scale.settings.tokens
        settings = replace(args.scale.settings, tokens=tokens, precision=args.precision)
        size = sum(parameter.numel() for parameter in model.parameters()) / 1e6
        where = f"{device.type} {resolve_precision(settings.precision, device)}, {torch.get_num_threads()} threads"
        budget = f"budget {tokens:,} tokens, {args.scale.batch:,} a batch, seed {args.seed}"
        print(f"model {size:.2f}M parameters, {where}; {budget}", flush=True)
        meta = {"recipe": recipe.name, "model": asdict(config), **data.meta, "seed": args.seed}
        how: Any = {"folder": output, "resume": args.resume, "overwrite": args.overwrite, "meta": meta}
        report = fit(model, data.train, settings, recipe.loss, valid=data.valid, **how)
        spent = f"{report.core_seconds:.1f} core-seconds ({report.wall_seconds:.1f} s)"
        speed = f"{report.tokens / report.core_seconds:,.0f} tokens per core-second"
        print(f"trained {report.steps:,} steps, {report.tokens:,} tokens in {spent}: {speed}")
        for line in recipe.evaluate(model.eval(), data, report, args):
            print(line, flush=True)
    use = f"; use it: tileformer generate --checkpoint {output} {recipe.example}" if recipe.example else ""
    print(f"checkpoint {report.checkpoint}{use}")
    return report


def load(recipe: Recipe, path: Path, device: torch.device) -> tuple[Any, Any]:
    """Model, in eval mode, and vocabulary of a checkpoint. CheckpointError when it is damaged or another recipe's."""
    meta = checkpoint.read_state(path).get("meta", {})
    if meta.get("recipe") != recipe.name or recipe.config_type is None:
        found = quote(meta.get("recipe"))
        raise checkpoint.CheckpointError(f"{path}: expected a model of the {recipe.name} recipe, found {found}")
    if "method" in meta:
        raise checkpoint.CheckpointError(f"{path}: expected the pretrained language model, found a classifier of it")
    model: Any = checkpoint.build(path, recipe.config_type, recipe.model)
    return model.to(device).eval(), recipe.vocabulary(path, meta, model.config)
