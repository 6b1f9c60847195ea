"""Training steps of the recipes' two models: our layers beside torch.nn's, same weights, batches, threads, precision.

Both sides have every dropout of torch.nn (embeddings, attention weights, residuals, hidden layer) and draw fresh bits.
Rounds alternate, so a machine that slows down slows both; the figure is the median of the rounds' ratios.
"""

import argparse
import contextlib
import copy
import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tileformer import arguments
from tileformer.bench.tables import Column, Growing, as_json, head, line
from tileformer.decoder import Classifier, DecoderLM, DecoderLMConfig, Seq2Seq, Seq2SeqConfig, revert
from tileformer.kernels import cross_entropy
from tileformer.kernels.info import require_device

Batch = tuple[Tensor, Tensor]
DROPOUT = 0.1
TABLE = [
    Column("precision", "precision", "<9"),
    Column("threads", "threads", ">7"),
    Column("torch.nn ms", "torch_nn_ms", ">11.1f"),
    Column("tileformer ms", "tileformer_ms", ">13.1f"),
    Column("speed-up", lambda row: f"{row['speedup']:.2f}x", ">8"),
]


@dataclass(frozen=True)
class TrainedModel:
    """A model, its loss on a batch by a cross-entropy that is given, and the batches that a round passes once."""

    about: str
    model: Callable[[], nn.Module]
    loss: Callable[[nn.Module, Callable[..., Tensor], Batch], Tensor]
    batches: Callable[[torch.Generator], list[Batch]]


def _tokens(size: int, longest: int, vocabulary: int, generator: torch.Generator) -> Tensor:
    """(size, longest) token ids of nearly one length, padded with 0 behind."""
    lengths = torch.randint(longest - 2, longest + 1, (size,), generator=generator)
    drawn = torch.randint(3, vocabulary, (size, longest), generator=generator)
    return drawn.masked_fill(torch.arange(longest) >= lengths[:, None], 0)


def _spelling_batches(draw: torch.Generator) -> list[Batch]:
    """As long as words and their phonemes are, 128 of one length in a batch."""
    longest = torch.randint(5, 14, (4,), generator=draw).tolist()
    return [(_tokens(128, n, 32, draw), _tokens(128, n + 1, 48, draw)) for n in longest]


def _reviews_batches(draw: torch.Generator) -> list[Batch]:
    """As long as the 10th, 25th, 50th, 75th and 90th of a hundred reviews, 32 of one length in a batch."""
    return [(_tokens(32, n, 4700, draw), torch.randint(2, (32,), generator=draw)) for n in (16, 27, 47, 94, 128)]


MODELS = {
    "g2p": TrainedModel(
        "encoder-decoder, width 128, 3 + 3 layers, 128 words",
        lambda: Seq2Seq(Seq2SeqConfig(32, 48, d_model=128, nhead=4, dim_feedforward=512, dropout=DROPOUT)),
        lambda model, cross_entropy, batch: cross_entropy(
            model(batch[0], batch[1][:, :-1]).flatten(0, 1), batch[1][:, 1:].flatten(), ignore_index=0
        ),
        _spelling_batches,
    ),
    "reviews": TrainedModel(
        "classifier, width 128, 3 causal layers, 32 reviews",
        lambda: Classifier(DecoderLM(DecoderLMConfig(4700, dropout=DROPOUT, max_length=128)), 2, dropout=DROPOUT),
        lambda model, cross_entropy, batch: cross_entropy(model(batch[0]), batch[1]),
        _reviews_batches,
    ),
}


def stepper(trained: TrainedModel, model: nn.Module, cross_entropy: Callable[..., Tensor], bf16: bool) -> Any:
    """One training step as a function of a batch."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    device = next(model.parameters()).device

    def step(batch: Batch) -> None:
        with torch.autocast(device.type, torch.bfloat16) if bf16 else contextlib.nullcontext():
            loss = trained.loss(model, cross_entropy, (batch[0].to(device), batch[1].to(device)))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def compare(name: str, device: torch.device, bf16: bool, threads: int, rounds: int) -> dict[str, Any]:
    """Median over the rounds of (torch.nn's time / ours), each round one pass of both over the same batches."""
    before, trained = torch.get_num_threads(), MODELS[name]
    torch.set_num_threads(threads)
    try:
        torch.manual_seed(0)
        ours = trained.model().to(device)
        theirs = copy.deepcopy(ours)  # the same weights
        revert(theirs)
        sides = {
            "tileformer": stepper(trained, ours, cross_entropy, bf16),
            "torch.nn": stepper(trained, theirs, F.cross_entropy, bf16),
        }
        work = trained.batches(torch.Generator().manual_seed(0))
        seconds: dict[str, list[float]] = {side: [] for side in sides}
        for n in range(rounds + 1):
            for side in sorted(sides, reverse=bool(n % 2)):
                start = time.perf_counter()
                for batch in work:
                    sides[side](batch)
                if device.type == "cuda":
                    torch.cuda.synchronize()
                seconds[side].append(time.perf_counter() - start)
    finally:
        torch.set_num_threads(before)
    ours_s, theirs_s = seconds["tileformer"][1:], seconds["torch.nn"][1:]  # the first round warms both up
    return dict(
        model=name, device=str(device), precision="bf16" if bf16 else "fp32", threads=threads, rounds=rounds,
        tileformer_ms=statistics.median(ours_s) / len(work) * 1e3,
        torch_nn_ms=statistics.median(theirs_s) / len(work) * 1e3,
        speedup=statistics.median(t / o for o, t in zip(ours_s, theirs_s, strict=True)),
    )  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `tileformer bench step`."""
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), help="default: cuda where torch sees a GPU")
    add("--json", type=arguments.output_file, metavar="FILE", help="also write every figure to FILE")
    add("--threads", type=arguments.THREADS, nargs="+", metavar="N", help="on a CPU (default: 1 and 2)")
    add("--rounds", type=arguments.COUNT, default=12, metavar="N", help="rounds whose median is printed (default: 12)")


def main(args: argparse.Namespace) -> int:
    """Print a row for each model, precision and number of threads; 0."""
    device = require_device(args.device)
    threads = args.threads or ([1, 2] if device.type == "cpu" else [torch.get_num_threads()])
    rows: list[dict[str, Any]] = []
    with Growing(args.json, lambda: as_json(rows)) as file:
        for name, model in MODELS.items():
            print(f"one training step of {name} ({model.about}), dropout {DROPOUT}, median of {args.rounds} rounds")
            print(head(TABLE))
            for bf16, count in itertools.product((False, True), threads):
                rows.append(compare(name, device, bf16, count, args.rounds))
                print(line(TABLE, rows[-1]), flush=True)
                file.write()
    return 0
