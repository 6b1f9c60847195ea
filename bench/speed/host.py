"""Microseconds from Python to the launch: what a call costs the host before a GPU has anything to do. Needs no GPU.

CPU tensors stand in for CUDA ones, and a driver whose launch does nothing for the GPU, for us and for liger-kernel;
kernels are compiled for `--arch`. torch's operators do compute, but tensors so small that this is little beside the
call. Time is the process's without garbage collection: the median of interleaved rounds, and of their ratios. What
autograd's engine costs to start is taken off the backward: each round measures it, as a tensor's gradient for itself.
"""

import argparse
import collections
import contextlib
import functools
import gc
import importlib
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from triton.runtime import driver

from tileformer import arguments
from tileformer.bench.ahead import announced
from tileformer.bench.calls import describe
from tileformer.bench.calls.op import AFFINE
from tileformer.bench.recording import ARCH, record
from tileformer.bench.tables import Column, Growing, as_json, head, line
from tileformer.decoder import TransformerDecoderLayer
from tileformer.kernels import attention, cross_entropy, dropout, layer_norm, softmax, use_backend

NAMES = ("tileformer", "liger", "torch")
HOST_CALLS = [
    describe("layer_norm", "host", "", 4, 8, 64, params=AFFINE, axes=1),
    describe("softmax", "host", "", 4, 8, 64),
    describe("cross_entropy", "host", "", 32, 64),
    describe("dropout", "host", "", 4, 8, 64, p=0.1),
    describe("attention", "host", "", 2, 2, 2, 8, 8, 16, causal=True),
    describe("decoder_layer", "host", "", 4, 8, 8, 64, 4, 128, causal=True, dropout=0.1, norm_first=False),
]
TABLE = [
    Column("us a call", "op", "<16"),
    Column("", "pass", "<10"),
    *(Column(name, name, ">12.1f") for name in NAMES),
    *(Column(f"/ {name}", lambda row, name=name: row["over"].get(name), ">12.2f") for name in NAMES[1:]),  # type: ignore[misc]
]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `tileformer bench host`."""
    add, count = parser.add_argument, arguments.COUNT
    add("--arch", default=90, help="compile for this one (default: 90)", **ARCH)
    add("--rounds", type=count, default=40, metavar="N", help="rounds whose median is printed (default: 40)")
    add("--g2p", type=count, metavar="N", help="count compilations over N batch shapes (default: all)")
    add("--json", type=arguments.output_file, metavar="FILE", help="also write every figure to FILE")


def main(args: argparse.Namespace) -> int:
    """Print the table and the compilations of a training run; 0."""
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    figures = dict(arch=args.arch, torch=torch.__version__, rows=rows, compilations=collections.Counter())
    with Growing(args.json, lambda: as_json(figures)) as file:
        try:  # first: Triton does not count what it has compiled before
            figures["compilations"] = counted = compilations(args.arch, args.g2p)
            print(f"distinct compilations of a g2p run: {sum(counted.values())}, {dict(counted)}")
        except ImportError as error:
            print(f"compilations of a g2p run: skipped, {error}")
        file.write()
        rows += measured(args.arch, args.rounds)
    print("\n".join([head(TABLE), *(line(TABLE, row) for row in rows)]))
    return 0


def _functions(target: Tensor) -> dict[str, dict[str, Callable[..., Tensor]]]:
    """Who computes each op, as functions of its tensors: keywords would cost some of what is measured."""
    mask = nn.Transformer.generate_square_subsequent_mask(8)

    def layer(kind: type[nn.Module]) -> Callable[..., Tensor]:
        module = kind(64, 4, 128, batch_first=True, dtype=torch.bfloat16).requires_grad_(False)
        return lambda x, memory: module(x, memory, tgt_mask=mask, tgt_is_causal=True)

    ours: dict[str, Callable[..., Tensor]] = dict(
        layer_norm=lambda x, w, b: layer_norm(x, (64,), w, b),
        softmax=softmax,
        cross_entropy=lambda x: cross_entropy(x, target),
        dropout=lambda x: dropout(x, 0.1),
        attention=lambda q, k, v: attention(q, k, v, causal=True),
        decoder_layer=layer(TransformerDecoderLayer),
    )
    theirs: dict[str, Callable[..., Tensor]] = dict(
        layer_norm=lambda x, w, b: F.layer_norm(x, (64,), w, b),
        softmax=lambda x: F.softmax(x, -1),
        cross_entropy=lambda x: F.cross_entropy(x, target),
        dropout=lambda x: F.dropout(x, 0.1),
        attention=lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
        decoder_layer=layer(nn.TransformerDecoderLayer),
    )
    functions = {op: dict(tileformer=ours[op], torch=theirs[op]) for op in ours}
    try:  # an extra, that type checkers may not find
        liger = importlib.import_module("liger_kernel.transformers.functional")
    except ImportError as error:
        print(f"liger: skipped, {error}")
        return functions
    functions["layer_norm"]["liger"] = lambda x, w, b: liger.liger_layer_norm(x, w, b, 1e-5)
    functions["softmax"]["liger"] = liger.liger_softmax
    functions["cross_entropy"]["liger"] = lambda x: liger.liger_cross_entropy(x, target)
    return functions


def _gradients(function: Callable[..., Tensor], leaves: list[Tensor], dout: Tensor) -> None:
    torch.autograd.grad(function(*leaves), leaves, dout)


def measured(arch: int, rounds: int, calls: int = 20) -> list[dict[str, Any]]:
    """Rows of op, pass, microseconds of each provider (None where it has no such op), ours over each other's."""
    jobs: dict[tuple[str, str, str], Callable[[], Any]] = {}
    leaf = torch.zeros(32, 64, requires_grad=True)
    with record(arch), use_backend("triton"):
        driver.active.launcher_cls = lambda source, metadata: lambda *arguments: None
        drawn = {call.op: call.inputs("cpu", torch.bfloat16) for call in HOST_CALLS}
        for op, functions in _functions(drawn["cross_entropy"][1]["target"]).items():
            tensors = drawn[op][0]
            inputs = [x for name, x in tensors.items() if "." not in name]  # the layers have parameters of their own
            leaves = [x.clone().requires_grad_() for x in inputs]
            for name, function in functions.items():
                dout = torch.ones_like(function(*inputs))
                jobs[op, "forward", name] = functools.partial(function, *inputs)
                jobs[op, "both", name] = functools.partial(_gradients, function, leaves, dout)
        jobs["", "", "engine"] = lambda: torch.autograd.grad(leaf, leaf, leaf)
        times: dict[tuple[str, str, str], list[float]] = {key: [] for key in jobs}
        gc.disable()
        for _ in range(rounds + 1):  # the first compiles
            for key, job in jobs.items():
                job(), job()  # what ran before has left the processor's caches full of other code
                start = time.process_time_ns()
                for _ in range(calls):
                    job()
                times[key].append((time.process_time_ns() - start) / calls / 1000)
            gc.collect()
        gc.enable()
    engine = times.pop(("", "", "engine"))
    rows = []
    for op, mode in dict.fromkeys(key[:2] for key in times):
        of = {name: zip(times[op, mode, name], engine, strict=True) for name in NAMES if (op, mode, name) in times}
        taken = {name: [t - (e if mode == "both" else 0) for t, e in pairs][1:] for name, pairs in of.items()}
        row: dict[str, Any] = {"op": op.replace("_layer", " layer"), "pass": mode, "over": {}}
        for name in NAMES:
            row[name] = statistics.median(taken[name]) if name in taken else None
            if name in taken and name != NAMES[0]:
                row["over"][name] = statistics.median(a / b for a, b in zip(taken[NAMES[0]], taken[name], strict=True))
        rows.append(row)
    return rows


def compilations(arch: int, shapes: int | None = None) -> collections.Counter[str]:
    """Distinct specialisations by kernel of `tileformer train g2p --full` in bfloat16, evaluation and decoding too.

    Of every shape of its batches, or about `shapes` of them. ImportError without the recipe's packages.
    """
    from tileformer.decoder import Seq2Seq, Seq2SeqConfig
    from tileformer.training.data.batches import Batches
    from tileformer.training.loop import sequence_loss
    from tileformer.training.recipes import g2p

    entries = g2p.split(g2p.read_entries(g2p.dictionary_file().read_bytes().decode()))
    every = Batches(g2p.to_pairs(entries["train"]), g2p.FULL.batch, seed=0)
    batches = {(x.source.shape, x.target.shape): x for x in every}
    chosen = sorted(batches.values(), key=lambda x: (x.target.shape, x.source.shape))
    chosen = chosen[:: max(1, len(chosen) // shapes)] if shapes else chosen
    letters, phones = g2p.RESERVED + len(g2p.LETTERS), g2p.RESERVED + len(g2p.PHONES)
    model = Seq2Seq(Seq2SeqConfig(letters, phones, max_length=32, **g2p.FULL.model))
    with announced(arch) as seen, torch.autocast("cpu", torch.bfloat16):
        for batch in chosen:
            model.train()
            sequence_loss(model, batch, 0.1).backward()
        with torch.no_grad():
            sequence_loss(model.eval(), chosen[-1], 0.1)
        with contextlib.suppress(FloatingPointError):  # nothing is computed: logits may be what memory held
            g2p.transcribe(model, ["transformer", "a"])
    return collections.Counter(sorted(name.rpartition(".")[2] for name, _ in seen))
