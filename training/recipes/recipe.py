"""A recipe is a value, and `run` is the only program: read, build, train, measure, say how to go on.

    run(RECIPES["g2p"], ["--tokens", "20000", "--output", "runs/short"])

`tileformer train NAME` runs the recipes of this folder; a value of anybody's own runs the same way.
"""

import argparse
import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tileformer import arguments
from tileformer.decoder.command import Decoding
from tileformer.decoder.pretrained import CONFIG, Writing, model_of, save_pretrained
from tileformer.decoder.recurrent import CELLS, RecurrentConfig
from tileformer.decoder.tokenizer import Tokenizer
from tileformer.files import quote
from tileformer.kernels.info import require_device
from tileformer.training import checkpoint, overrides, process
from tileformer.training.data.text import Labelled
from tileformer.training.loop import AnyBatches, LossFunction, Report, fit, resolve_precision
from tileformer.training.settings import Settings

DECODERS = ("transformer", *(f"{cell}{way}" for cell in CELLS for way in ("", "+attention")))
DECIDED = ("vocab", "src_vocab", "tgt_vocab", "cell", "attention")  # by the data, or by the name of the decoder
REHEARSED = 20_000  # tokens, by which the speed of a run is told


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
    tokens: a budget that fits these data, and longest: the ids of a row, for a recipe of any. tokenizer,
    target_tokenizer, writing: of the folder that a run ends in, see `save_pretrained`.
    """

    train: AnyBatches
    valid: AnyBatches | None = None
    vocabulary: Any = None
    test: Any = None
    facts: Sequence[str] = ()
    meta: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, Any] = field(default_factory=dict)
    tokens: int | None = None
    longest: int | None = None
    tokenizer: Tokenizer | None = None
    target_tokenizer: Tokenizer | None = None
    writing: Writing = Writing()


@dataclass(frozen=True)
class Recipe:
    """One task from its data to its scores.

    quick, full: how large a run is, without and with --full. data(args) reads; args are the options of `add_arguments`
    and those that arguments(parser) declares, and `args.scale`, one of the two. config(args, data) is a dataclass, from
    which model(config) makes the model. loss(model, batch): see `fit`. evaluate(model, data, report, args): lines that
    say how good the model is.

    For `tileformer generate`: vocabulary(path, meta, config) is what a checkpoint's ids mean, CheckpointError if they
    do not fit the model; parse(vocabulary, text) is an input or a ValueError; decoding says how its answer is written,
    or writing, of a vocabulary that is a `Tokenizer`, or show(model, vocabulary, inputs) gives a line for each. For
    `tileformer finetune`: labelled() are the texts to classify. about: its first line is shown by --list. options: what
    --set data.KEY may say, and what it is else; `args.options` has them all.
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
    writing: Writing | None = None
    labelled: Callable[[], Labelled] | None = None
    about: str = ""
    example: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)


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
    about = "budget in minutes of CPU time instead, from the speed of the first steps"
    add("--core-minutes", type=arguments.number(100_000), metavar="M", help=about)
    about = "tables [model], [settings], [loss] and [data] of what to do otherwise"
    add("--config", type=arguments.input_file, metavar="FILE", help=about)
    about = "one key of them, such as model.d_model=256 or settings.lr=0.002; any number of times"
    add("--set", action="append", default=[], metavar="KEY=VALUE", help=about)
    recipe.arguments(parser.add_argument_group(f"of {recipe.name}"))


def configured(args: argparse.Namespace, kind: type[Any], **sizes: Any) -> Any:
    """The configuration of this ``kind`` with the sizes that the data give and what the user asks for; a
    `RecurrentConfig` where that is another decoder.

    Raises ValueError for a key that the configuration does not have, or that the data decide.
    """
    asked = dict(args.asked)
    decoder = asked.pop("decoder", "transformer")
    if decoder not in DECODERS:
        raise ValueError(f"model.decoder must be one of {', '.join(DECODERS)}, got {quote(decoder)}")
    usual = {name: value for name, value in args.scale.model.items() if name not in args.asked}
    if decoder != "transformer":
        kind, usual = RecurrentConfig, {name: usual[name] for name in ("dropout",) if name in usual}
        sizes["vocab"] = sizes.pop("tgt_vocab", None) or sizes["vocab"]
        cell, _, attends = decoder.partition("+")
        sizes |= {"cell": cell, "attention": bool(attends)}
        if sizes.get("src_vocab"):
            sizes["num_encoder_layers"] = asked.get("num_encoder_layers", 2)
        elif attends:
            raise ValueError(f"model.decoder={decoder}: attention is over a source, and {args.recipe} has none")
    decided = {name: sizes.pop(name) for name in DECIDED if name in sizes}
    known = {x.name: None if x.default is MISSING else x.default for x in fields(kind) if x.name not in decided}
    return kind(**decided, **sizes | usual | overrides.check("model", asked, known))


def _changed(
    recipe: Recipe, args: argparse.Namespace, parameters: Mapping[str, Any] | None = None
) -> tuple[LossFunction, dict[str, Any]]:
    """The loss with what the user, or a search, asks for, and what a checkpoint has to remember; `args.scale` and
    `args.options` are what is asked for."""
    scale = recipe.full if recipe.full and args.full else recipe.quick
    tables = overrides.put(overrides.read(args.config, args.set)[0], parameters or {})
    usual = {x.name: getattr(scale.settings, x.name) for x in fields(Settings)}
    usual["valid_every"] = None
    settings = replace(scale.settings, **overrides.check("settings", tables["settings"], usual))
    known = {"batch": scale.batch, **recipe.options}
    given = overrides.check("data", tables["data"], known)
    args.options = {**recipe.options, **given}
    keywords = dict(recipe.loss.keywords) if isinstance(recipe.loss, partial) else {}
    losses = overrides.check("loss", tables["loss"], {"label_smoothing": 0.0, **keywords})
    if settings.tokens != scale.settings.tokens:
        args.tokens = args.tokens or settings.tokens
    args.asked = tables["model"]
    args.scale = Scale(settings, given.get("batch", scale.batch), {**scale.model, **tables["model"]})
    asked = {name: table for name, table in (("data", given), ("loss", losses)) if table}
    return partial(recipe.loss, **losses) if losses else recipe.loss, asked


def _built(recipe: Recipe, data: Data, args: argparse.Namespace, device: torch.device) -> tuple[Any, Any, Settings]:
    """Configuration, model, and how it learns."""
    torch.manual_seed(args.seed)
    config = recipe.config(args, data)
    tokens = args.tokens or data.tokens or args.scale.settings.tokens
    settings = replace(args.scale.settings, tokens=tokens, precision=args.precision)
    make = model_of if isinstance(config, RecurrentConfig) else recipe.model
    return config, make(config).to(device), settings


def _affordable(args: argparse.Namespace, data: Data, model: nn.Module, settings: Settings, loss: LossFunction) -> int:
    """How many tokens ``args.core_minutes`` pay for: those of the run that is resumed, or by the speed of a rehearsal
    on a copy, from whose state nothing is kept."""
    if args.resume:
        return int(checkpoint.read_training_state(checkpoint.latest(args.output)).settings["tokens"])
    position, spent = data.train.state_dict(), 0.0
    with torch.random.fork_rng():
        rehearsal = copy.deepcopy(model)
        short = replace(settings, schedule="constant", warmup=0.0, valid_every="save", patience=0, keep_best=False)
        for tokens in (1, REHEARSED):  # the first steps pay for what is made once
            report = fit(rehearsal, data.train, replace(short, tokens=tokens, log_every=10**9), loss)
            spent = report.core_seconds
    data.train.load_state_dict(position)
    return max(1, round(report.tokens * 60 * args.core_minutes / max(spent, 1e-6)))


def trial(recipe: Recipe, args: argparse.Namespace, parameters: Mapping[str, Any]) -> float:
    """The validation loss that a recipe comes to with other ``parameters``, by their SECTION.KEY; nothing is kept."""
    args = argparse.Namespace(**vars(args))
    loss, _ = _changed(recipe, args, parameters)
    data = recipe.data(args)
    _, model, settings = _built(recipe, data, args, require_device(args.device))
    report = fit(model, data.train, settings, loss, valid=data.valid)
    if report.valid_loss is None:
        raise ValueError(f"{recipe.name} holds nothing out to choose by")
    return report.valid_loss


def run(recipe: Recipe, args: argparse.Namespace | Sequence[str] = ()) -> Report:
    """Train a recipe with its parsed options, or with the words of them, and print what came of it.

    Raises ValueError for wrong options or data, or a folder that is in use; FloatingPointError when the run diverges.
    """
    if not isinstance(args, argparse.Namespace):
        parser = argparse.ArgumentParser(recipe.name)
        add_arguments(parser, recipe)
        args = parser.parse_args(args)
    loss, asked = _changed(recipe, args)
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
        config, model, settings = _built(recipe, data, args, device)
        if args.core_minutes:
            settings = replace(settings, tokens=_affordable(args, data, model, settings, loss))
        size = sum(parameter.numel() for parameter in model.parameters()) / 1e6
        where = f"{device.type} {resolve_precision(settings.precision, device)}, {torch.get_num_threads()} threads"
        budget = f"budget {settings.tokens:,} tokens, {args.scale.batch:,} a batch, seed {args.seed}"
        print(f"model {size:.2f}M parameters, {where}; {budget}", flush=True)
        if not args.resume:  # which `fit` may refuse, and nothing is lost
            (output / CONFIG).unlink(missing_ok=True)  # what a run before this one ended in
            for name, content in data.files.items():
                content.save(output / name)
        meta = {"recipe": recipe.name, "model": asdict(config), **data.meta, "seed": args.seed, "asked": asked}
        if isinstance(config, RecurrentConfig):
            meta["decoder"] = config.cell
        how: Any = {"folder": output, "resume": args.resume, "overwrite": args.overwrite, "meta": meta}
        report = fit(model, data.train, settings, loss, valid=data.valid, **how)
        spent = f"{report.core_seconds:.1f} core-seconds ({report.wall_seconds:.1f} s)"
        speed = f"{report.tokens / report.core_seconds:,.0f} tokens per core-second"
        print(f"trained {report.steps:,} steps, {report.tokens:,} tokens in {spent}: {speed}")
        said = [*_printed(recipe.evaluate(model.eval(), data, report, args))]
        if data.tokenizer is not None:
            named: Any = {
                "tokenizer": data.tokenizer,
                "target_tokenizer": data.target_tokenizer,
                "writing": data.writing,
            }
            save_pretrained(model, output, card=_card(recipe, data, report, said), **named)
    use = f"; use it: tileformer generate --checkpoint {output} {recipe.example}" if recipe.example else ""
    print(f"checkpoint {report.checkpoint}{use}")
    return report


def _printed(lines: Iterable[str]) -> Iterator[str]:
    for line in lines:
        print(line, flush=True)
        yield line


def _card(recipe: Recipe, data: Data, report: Report, said: Sequence[str]) -> str:
    """Where a model comes from and how good it is, in Markdown."""
    spent = f"{report.steps:,} steps, {report.tokens:,} tokens, {report.core_seconds:,.0f} core-seconds"
    loss = "" if report.valid_loss is None else f"; validation loss {report.valid_loss:.4f} nats"
    about = recipe.about.splitlines()[0] if recipe.about else recipe.name
    shown = "\n".join(["```", *data.facts, f"trained {spent}{loss}", *said, "```"])
    return f"# {about}\n\nTrained from scratch by `tileformer train {recipe.name}`.\n\n{shown}\n"


def load(recipe: Recipe, path: Path, device: torch.device) -> tuple[Any, Any]:
    """Model, in eval mode, and vocabulary of a checkpoint. CheckpointError when it is damaged or another recipe's."""
    meta = checkpoint.read_state(path).get("meta", {})
    if meta.get("recipe") != recipe.name or recipe.config_type is None:
        found = quote(meta.get("recipe"))
        raise checkpoint.CheckpointError(f"{path}: expected a model of the {recipe.name} recipe, found {found}")
    if "method" in meta:
        raise checkpoint.CheckpointError(f"{path}: expected the pretrained language model, found a classifier of it")
    kind, make = (RecurrentConfig, model_of) if "decoder" in meta else (recipe.config_type, recipe.model)
    model: Any = checkpoint.build(path, kind, make)
    return model.to(device).eval(), recipe.vocabulary(path, meta, model.config)
