"""Train on thousands of batches, each of another shape, and see whether memory grows; beside the same loop on torch.nn.

    python tests/soak.py [--steps 3000] [--beside torch] [--backend interpret]

Each side runs in a process of its own: ours is `fit` on a `Seq2Seq`, with its log and checkpoints; torch's is a loop
    over torch.nn alone. Prints what each holds at every checkpoint, and how fast that grows once the first third is
    over. Exit 1: ours grows by more than MARGIN beyond torch's (without --beside: beyond nothing).

What both sides gain in the first hundreds of steps is oneDNN's: it keeps what it made for the last 1,024 shapes of GELU
and others, and ONEDNN_PRIMITIVE_CACHE_CAPACITY says how many.
"""

import argparse
import contextlib
import ctypes
import gc
import io
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import numpy
import torch
from torch import Tensor, nn

from tileformer.decoder import Seq2Seq, Seq2SeqConfig
from tileformer.kernels import use_backend
from tileformer.kernels.backend import BACKENDS
from tileformer.training import Batch, Batches, Settings, fit

MARGIN = 0.3  # MiB in 100 steps; pieces of memory that come and go make a slope of 0.1 of nothing
POINTS = 30  # checkpoints of a run
VOCABULARY, WIDTH, LONGEST = 60, 64, 32
MIB = 2**20


class RandomShapes:
    """One epoch of batches, of 1 to 8 pairs of sequences of 1 to LONGEST - 1 symbols; `look` is called before each
    batch."""

    def __init__(self, steps: int, look: Callable[[int], None]) -> None:
        self.steps, self.look = steps, look

    def __iter__(self) -> Iterator[Batch]:
        for step in range(self.steps):
            self.look(step)
            yield self.batch(step)

    def batch(self, step: int) -> Batch:
        draw = random.Random(step)
        rows, *longest = draw.randint(1, 8), draw.randint(1, LONGEST - 1), draw.randint(1, LONGEST - 1)
        pairs = [[draw.choices(range(3, VOCABULARY), k=draw.randint(1, most)) for most in longest] for _ in range(rows)]
        return next(iter(Batches(pairs, rows)))

    def tokens(self) -> int:
        return sum(self.batch(step).tokens for step in range(self.steps))

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


class Plain(nn.Module):
    """The same model in torch.nn alone."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.position = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(LONGEST, WIDTH)
        self.transformer = nn.Transformer(WIDTH, 4, 2, 2, 128, 0.1, "gelu", batch_first=True)
        self.out = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        padding = source == 0
        causal = nn.Transformer.generate_square_subsequent_mask(target.shape[1])
        embedded = (self.embedding(x) + self.position.weight[: x.shape[1]] for x in (source, target))
        options = dict(tgt_mask=causal, src_key_padding_mask=padding, memory_key_padding_mask=padding)
        return self.out(self.transformer(*embedded, **options, tgt_is_causal=True))


def train_ours(batches: RandomShapes) -> None:
    config = Seq2SeqConfig(
        VOCABULARY, VOCABULARY, WIDTH, 4, 2, 2, 128, 0.1, "gelu", norm_first=False, max_length=LONGEST
    )
    model = Seq2Seq(config)
    with (
        tempfile.TemporaryDirectory() as folder,
        contextlib.redirect_stderr(io.StringIO()),
    ):  # the log goes to the folder
        fit(model, batches, Settings(tokens=batches.tokens(), precision="fp32"), folder=folder)


def train_torch(batches: RandomShapes) -> None:
    model, loss_fn = Plain(), nn.CrossEntropyLoss(ignore_index=0)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    for batch in batches:
        loss_fn(model(batch.source, batch.target).flatten(0, 1), batch.labels.flatten()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


class _Malloc(ctypes.Structure):  # mallinfo2 of glibc 2.33
    names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in names.split()]


def held() -> dict[str, float]:
    """What this process holds: resident MiB; MiB that malloc has handed out; blocks of Python's own allocator."""
    gc.collect()
    mallinfo2 = ctypes.CDLL(None).mallinfo2
    mallinfo2.restype = _Malloc
    found = mallinfo2()
    with open("/proc/self/statm") as file:
        resident = int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return dict(resident=resident / MIB, malloc=(found.uordblks + found.hblkhd) / MIB, blocks=sys.getallocatedblocks())


def run_side(side: str, steps: int, backend: str) -> None:
    """In a process of its own: one line of JSON at each checkpoint."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    every = max(1, steps // POINTS)

    def look(step: int) -> None:
        if step % every == 0:
            print(json.dumps(dict(step=step) | held()), flush=True)

    with use_backend(backend):
        {"tileformer": train_ours, "torch": train_torch}[side](RandomShapes(steps, look))
    print(json.dumps(dict(step=steps) | held()), flush=True)


def slope(points: list[dict[str, float]], name: str) -> float:
    """Growth in 100 steps behind the first third, by least squares."""
    late = [point for point in points if point["step"] >= points[-1]["step"] / 3]
    return 100 * float(numpy.polyfit([p["step"] for p in late], [p[name] for p in late], 1)[0])


def verdict(ours: float, theirs: float | None) -> tuple[str, int]:
    """What to say of two slopes in MiB, and the exit status."""
    limit = MARGIN if theirs is None else max(0.0, theirs) + MARGIN
    said, status = ("held", 0) if ours <= limit else ("GROWS", 1)
    return f"{said}: {ours:+.2f} MiB in 100 steps, {limit:.2f} are let pass", status


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--beside", choices=["torch"])
    parser.add_argument("--backend", default="auto", choices=BACKENDS)
    parser.add_argument("--side", choices=["tileformer", "torch"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.steps < POINTS:
        parser.error(f"--steps must be at least {POINTS}, got {args.steps}")
    if args.side:
        run_side(args.side, args.steps, args.backend)
        return 0
    grows = {}
    for side in ["tileformer", *[args.beside] * (args.beside is not None)]:
        points = []
        print(f"{side:>10}    step  resident MiB  malloc MiB  Python blocks", flush=True)
        command = [sys.executable, __file__, "--side", side, "--steps", str(args.steps), "--backend", args.backend]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            for line in process.stdout or ():
                points.append(json.loads(line))
                print("{:10}{step:8}{resident:14.1f}{malloc:12.1f}{blocks:15,}".format("", **points[-1]), flush=True)
        if process.returncode:
            print(f"soak: {side} ended with {process.returncode}", file=sys.stderr)
            return 2
        grows[side] = slope(points, "resident")
        told = f"resident {grows[side]:+.2f} MiB, malloc {slope(points, 'malloc'):+.2f} MiB"
        print(f"{side}: in 100 steps {told}, Python {slope(points, 'blocks'):+,.0f} blocks", flush=True)
    said, status = verdict(grows["tileformer"], grows.get("torch"))
    print(said)
    return status


if __name__ == "__main__":
    sys.exit(main())
