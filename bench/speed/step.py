"""Training steps of two models, those of the recipes: our layers beside torch.nn's, same weights, batches, threads and precision.

Both sides have every dropout of torch.nn (embeddings, attention weights, residuals, hidden layer) and draw fresh bits at each step. Rounds alternate
between the two, so a machine that slows down slows both; the figure is the median of the rounds' ratios.
"""

from __future__ import annotations

import contextlib
import copy
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tileformer.decoder import Classifier, DecoderLM, DecoderLMConfig, Seq2Seq, Seq2SeqConfig, revert
from tileformer.kernels import cross_entropy

Batch = tuple[Tensor, Tensor]
DROPOUT = 0.1


@dataclass(frozen=True)
class Task:
    """A model, its loss on a batch by a cross-entropy that is given, and the batches that a round passes once."""

    about: str
    model: Callable[[], nn.Module]
    loss: Callable[[nn.Module, Callable[..., Tensor], Batch], Tensor]
    batches: Callable[[int], list[Batch]]  # of a seed


def _tokens(size: int, longest: int, vocabulary: int, generator: torch.Generator) -> Tensor:
    """(size, longest) token ids of nearly one length, padded with 0 behind."""
    lengths = torch.randint(longest - 2, longest + 1, (size,), generator=generator)
    drawn = torch.randint(3, vocabulary, (size, longest), generator=generator)
    return drawn.masked_fill(torch.arange(longest) >= lengths[:, None], 0)


def _spelling_loss(model: nn.Module, cross_entropy: Callable[..., Tensor], batch: Batch) -> Tensor:
    source, target = batch
    logits = model(source, target[:, :-1])
    return cross_entropy(logits.flatten(0, 1), target[:, 1:].flatten(), ignore_index=0)


def _spelling_batches(seed: int) -> list[Batch]:
    """As long as words and their phonemes are, 128 of one length in a batch."""
    generator = torch.Generator().manual_seed(seed)
    longest = torch.randint(5, 14, (4,), generator=generator).tolist()
    return [(_tokens(128, n, 32, generator), _tokens(128, n + 1, 48, generator)) for n in longest]


def _reviews_batches(seed: int) -> list[Batch]:
    """As long as the 10th, 25th, 50th, 75th and 90th of a hundred reviews, 32 of one length in a batch."""
    generator = torch.Generator().manual_seed(seed)
    return [
        (_tokens(32, n, 4700, generator), torch.randint(2, (32,), generator=generator)) for n in (16, 27, 47, 94, 128)
    ]


TASKS = {
    "g2p": Task(
        "encoder-decoder, width 128, 3 + 3 layers, 128 words",
        lambda: Seq2Seq(Seq2SeqConfig(32, 48, d_model=128, nhead=4, dim_feedforward=512, dropout=DROPOUT)),
        _spelling_loss,
        _spelling_batches,
    ),
    "reviews": Task(
        "classifier, width 128, 3 causal layers, 32 reviews",
        lambda: Classifier(DecoderLM(DecoderLMConfig(4700, dropout=DROPOUT, max_length=128)), 2, dropout=DROPOUT),
        lambda model, cross_entropy, batch: cross_entropy(model(batch[0]), batch[1]),
        _reviews_batches,
    ),
}


def stepper(task: Task, model: nn.Module, cross_entropy: Callable[..., Tensor], bf16: bool) -> Callable[[Batch], None]:
    """One training step as a function of a batch."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    device = next(model.parameters()).device

    def step(batch: Batch) -> None:
        moved = (batch[0].to(device), batch[1].to(device))
        with torch.autocast(device.type, torch.bfloat16) if bf16 else contextlib.nullcontext():
            loss = task.loss(model, cross_entropy, moved)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def compare(name: str, device: torch.device, bf16: bool, threads: int, rounds: int) -> dict[str, Any]:
    """Median over the rounds of (torch.nn's time / ours), each round one pass of both over the same batches."""
    before, task = torch.get_num_threads(), TASKS[name]
    torch.set_num_threads(threads)
    try:
        torch.manual_seed(0)
        ours = task.model().to(device)
        theirs = copy.deepcopy(ours)  # the same weights
        revert(theirs)
        sides = {
            "tileformer": stepper(task, ours, cross_entropy, bf16),
            "torch.nn": stepper(task, theirs, F.cross_entropy, bf16),
        }
        work = task.batches(0)
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
        tileformer_ms=statistics.median(ours_s) / len(work) * 1e3, torch_nn_ms=statistics.median(theirs_s) / len(work) * 1e3,
        speedup=statistics.median(t / o for o, t in zip(ours_s, theirs_s, strict=True)),
    )  # fmt: skip


def report(device: torch.device, threads: Sequence[int], rounds: int) -> Iterator[dict[str, Any]]:
    """Print and yield a row for each model, precision and number of threads."""
    for name, task in TASKS.items():
        print(f"one training step of {name} ({task.about}), dropout {DROPOUT}, median of {rounds} rounds")
        print(f"{'precision':<9} {'threads':>7} {'torch.nn ms':>11} {'tileformer ms':>13} {'speed-up':>8}")
        for bf16 in (False, True):
            for count in threads:
                row = compare(name, device, bf16, count, rounds)
                print(
                    f"{row['precision']:<9} {count:>7} {row['torch_nn_ms']:>11.1f} {row['tileformer_ms']:>13.1f} {row['speedup']:>7.2f}x",
                    flush=True,
                )
                yield row
