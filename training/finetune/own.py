"""Fine-tune a model that writes on your own pairs or texts, by any of six methods, and say what it was worth.

    tileformer finetune pairs --checkpoint FOLDER --data FILE.tsv --method lora

A decoder alone reads a pair as prompt and completion, through its chat template where it has one, and learns the
completion. Rows are framed as the folder says.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tileformer.decoder.adapters import Bottleneck, add_bottlenecks
from tileformer.decoder.pretrained import is_folder, load, load_writing, save_pretrained
from tileformer.extras import optional_import
from tileformer.files import quote
from tileformer.kernels.info import require_device
from tileformer.training import checkpoint, measure, overrides, process
from tileformer.training.data import own
from tileformer.training.finetune.methods import FROZEN_LR, freeze_except
from tileformer.training.loop import fit
from tileformer.training.losses import language_loss, sequence_loss
from tileformer.training.settings import Settings

EPOCHS, LEAST = 3, 20_000  # of the data; tokens
OPTIONS = {"batch": 0, "documents": "auto", "rank": 8, "adapter_size": 32, "factor": 0.6}
Learn = Callable[[Any, "Task"], Any]


class Task:
    """What every method is given: how to learn for some tokens at some rate, and where its stages are kept."""

    def __init__(self, args: argparse.Namespace, train: Any, valid: Any, loss: Any, settings: Settings) -> None:
        self.args, self.train, self.valid, self.loss, self.settings = args, train, valid, loss, settings

    def fit(self, model: nn.Module, share: float = 1.0, rate: float = 1.0, stage: str = "train", **options: Any) -> Any:
        """Train what is not frozen, or go on where that was stopped."""
        folder = self.args.output / "stages" / stage
        tokens = max(1, round(self.settings.tokens * share))
        settings = replace(self.settings, tokens=tokens, lr=self.settings.lr * rate)
        position = self.train.state_dict() | {"epoch": 0, "index": 0}
        self.train.load_state_dict(position)
        meta = {"method": self.args.method, "options": self.args.options, "seed": self.args.seed}
        resume = bool(checkpoint.steps_in(folder))
        return fit(
            model, self.train, settings, self.loss, folder=folder, valid=self.valid, resume=resume, meta=meta, **options
        )


def _floors(model: Any) -> tuple[list[nn.Module], list[nn.Module]]:
    """The layers of a model from the lowest, those of an encoder beside the decoder's, and the final norm."""
    if hasattr(model, "layers") and hasattr(model, "norm"):
        return [*model.layers], [model.norm]
    stacks = getattr(model, "transformer", None)
    if stacks is None:
        raise ValueError(f"a {type(model).__name__} has no layers to choose from: take --method full")
    encoder, decoder = [*stacks["encoder"].layers], [*stacks["decoder"].layers]
    deepest = max(len(encoder), len(decoder))
    pad = [[nn.Identity()] * (deepest - len(x)) + x for x in (encoder, decoder)]
    return [nn.ModuleList(both) for both in zip(*pad, strict=True)], [stacks["decoder"].norm]


def _partial(model: Any, task: Task) -> Any:
    layers, top = _floors(model)
    freeze_except(model, layers[-1], *top)
    task.fit(model, rate=FROZEN_LR / 2)
    return model


def _gradual(model: Any, task: Task) -> Any:
    layers, top = _floors(model)
    for free in range(1, len(layers) + 2):
        freeze_except(model, *top, *layers[max(0, len(layers) - free) :])
        if free > len(layers):
            model.requires_grad_(True)
        task.fit(model, 1 / (len(layers) + 1), stage=f"free-{free}")
    return model


def _decay(model: Any, task: Task) -> Any:
    layers, top = _floors(model)
    above = {id(p) for part in (*layers, *top) for p in part.parameters()}
    below = [p for p in model.parameters() if id(p) not in above]
    stack = [below, *([*part.parameters()] for part in layers)]
    scales = [task.args.options["factor"] ** (len(stack) - 1 - depth) for depth in range(len(stack))]
    task.fit(model, groups=[{"params": x, "lr_scale": scale} for x, scale in zip(stack, scales, strict=True)])
    return model


def _lora(model: Any, task: Task) -> Any:
    peft, rank = optional_import("peft"), task.args.options["rank"]
    attentions = [name for name, x in model.named_modules() if isinstance(x, nn.MultiheadAttention)]
    inside = tuple(f"{name}." for name in attentions)
    maps = [n for n, x in model.named_modules() if isinstance(x, nn.Linear) and not n.startswith(inside or ("/",))]
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=[*attentions, *maps])
    model.requires_grad_(False)
    tuner = peft.LoraModel(model, config, "default")  # puts its layers into the model
    task.fit(model, rate=FROZEN_LR)
    return tuner.merge_and_unload()


def _adapters(model: Any, task: Task) -> Any:
    if not hasattr(model, "adapters"):
        add_bottlenecks(model, task.args.options["adapter_size"])
    norms = (nn.LayerNorm, nn.RMSNorm)
    freeze_except(model, *(x for x in model.modules() if isinstance(x, (Bottleneck, *norms))))
    task.fit(model, rate=FROZEN_LR)
    return model


def _full(model: Any, task: Task) -> Any:
    task.fit(model)
    return model


METHODS: dict[str, Learn] = {
    "full": _full, "partial": _partial, "gradual": _gradual, "decay": _decay, "lora": _lora, "adapters": _adapters,
}  # fmt: skip


def main(args: argparse.Namespace, again: str) -> int:
    """Train, and print the loss of what is held out before and behind. ValueError: wrong arguments or input."""
    args.method = args.method or "full"
    if args.method not in METHODS:
        raise ValueError(f"no method {quote(args.method)} for {args.recipe}; there is: {', '.join(METHODS)}")
    if args.data is None or args.checkpoint is None:
        raise ValueError(f"finetune {args.recipe} wants --checkpoint FOLDER and --data FILE")
    if not is_folder(args.checkpoint):
        raise ValueError(f"{args.checkpoint}: expected the folder of a model, as every run writes one at its end")
    tables, _ = overrides.read(args.config, args.set)
    for name in ("model", "loss"):
        if tables[name]:
            raise ValueError(f"--set {name}.{next(iter(tables[name]))}: a pretrained model has its own")
    args.options = OPTIONS | overrides.check("data", tables["data"], OPTIONS)
    device = require_device(args.device)
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    model, tokenizer = load(args.checkpoint, device=device, dtype=torch.float32)
    if tokenizer is None or not hasattr(model, "eos_id"):
        raise ValueError(f"{args.checkpoint}: expected a model that writes, with its tokenizer")
    args.output = args.output or Path(f"runs/{args.checkpoint.resolve().name}-{args.method}")
    if is_folder(args.output):
        raise ValueError(f"{args.output}: a model is already here; choose another --output")
    writing = load_writing(args.checkpoint)
    how: dict[str, Any] = {"encoding": args.encoding, "skip_bad_lines": args.skip_bad_lines}
    read: Any
    of: Any
    if args.recipe == "pairs":
        read, of = own.pairs_of, lambda pair: pair[0]
    elif model.conditioned:
        raise ValueError("finetune text is for a decoder alone; this model reads a source: finetune pairs")
    else:
        read, of, how["documents"] = own.texts_of, str, args.options["documents"]
    rows = read(args.data, **how)
    train, valid = (rows, read(args.valid, **how)) if args.valid else own.hold_out(rows, of)
    size = args.options["batch"] or (32 if model.conditioned else 1024)
    make: Any = measure.pair_batches if args.recipe == "pairs" else measure.text_batches
    batches: list[Any] = [make(model, tokenizer, train, writing.add_bos, size, args.seed)]
    batches.append(make(model, tokenizer, valid, writing.add_bos, size))
    width = next(p for p in model.parameters() if p.dim() == 2).shape[1]
    each = sum(batch.tokens for batch in batches[0])
    batches[0].load_state_dict(batches[0].state_dict() | {"epoch": 0, "index": 0})
    usual = Settings(max(LEAST, EPOCHS * each), min(1e-3, 0.128 / width), "linear", save_every=10**9, log_every=20)
    known = {x.name: getattr(usual, x.name) for x in fields(Settings)} | {"valid_every": None}
    settings = replace(usual, **overrides.check("settings", tables["settings"], known))
    settings = replace(settings, tokens=args.tokens or settings.tokens, precision=args.precision)
    loss = sequence_loss if model.conditioned else language_loss
    with process.lock(args.output), process.interruptible(again, lambda: any(args.output.glob("stages/*/step-*"))):
        return _run(args, model, tokenizer, writing, Task(args, batches[0], batches[1], loss, settings), valid)


def _run(args: argparse.Namespace, model: Any, tokenizer: Any, writing: Any, task: Task, valid: Sequence[Any]) -> int:
    def measured() -> dict[str, float]:
        if args.recipe == "pairs":
            scores = measure.pair_loss(model, tokenizer, valid, writing.add_bos)
            return scores | measure.measured_pairs(model, tokenizer, valid)[0]
        return measure.text_loss(model, tokenizer, valid, writing.add_bos)

    said = [*measure.lines_about(measured(), f"before, {len(valid):,} {args.recipe} held out:")]
    print(*said, sep="\n", flush=True)
    start, total = time.process_time(), sum(p.numel() for p in model.parameters())
    model = METHODS[args.method](model, task).eval()
    spent = f"{args.method}, {task.settings.tokens:,} tokens, {time.process_time() - start:.0f} core-seconds"
    after = [*measure.lines_about(measured(), f"after {spent}:")]
    print(*after, sep="\n", flush=True)
    model.requires_grad_(True)
    shown = "\n".join(["```", *said, *after, "```"])
    title = f"# {args.checkpoint.resolve().name}, fine-tuned on {args.data.name}"
    card = f"{title}\n\n{total / 1e6:.1f}M parameters.\n\n{shown}"
    target = None if tokenizer.target is tokenizer else tokenizer.target
    save_pretrained(model, args.output, tokenizer=tokenizer, target_tokenizer=target, writing=writing, card=card)
    for folder in args.output.glob("stages/*"):
        for step in checkpoint.steps_in(folder):
            checkpoint.discard(step)
    print(f"use it: tileformer generate --checkpoint {args.output} TEXT")
    return 0
