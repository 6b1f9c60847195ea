"""Training steps of one encoder-decoder: our layers beside torch.nn's, same weights, batches, threads and precision.

Both have every dropout of torch.nn (embeddings, attention weights, residuals, hidden layer) and draw fresh bits at each step. Rounds alternate
between the two, so a machine that slows down slows both; the figure is the median of the rounds' ratios.
"""

from __future__ import annotations

import contextlib
import copy
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tileformer.decoder import Seq2Seq, Seq2SeqConfig
from tileformer.kernels import cross_entropy

CONFIG = Seq2SeqConfig(src_vocab=32, tgt_vocab=48, d_model=128, nhead=4, dim_feedforward=512, dropout=0.1)


def twin_of(model: Seq2Seq) -> Seq2Seq:
    """The same model with torch.nn's own Transformer and dropout, and the same weights."""
    config = model.config
    twin = copy.deepcopy(model)
    twin.dropout = nn.Dropout(config.dropout)  # type: ignore[assignment]
    twin.transformer = nn.Transformer(  # type: ignore[assignment]
        config.d_model, config.nhead, config.num_encoder_layers, config.num_decoder_layers, config.dim_feedforward,
        config.dropout, config.activation, batch_first=True, norm_first=config.norm_first,
    )  # fmt: skip
    twin.transformer.load_state_dict(model.transformer.state_dict())
    return twin.train(model.training)


def batches(count: int, size: int, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    """Source and target tokens padded with 0, as long as words and their phonemes are, bucketed by length."""
    generator = torch.Generator().manual_seed(seed)

    def tokens(longest: int, vocabulary: int) -> Tensor:
        lengths = torch.randint(longest - 2, longest + 1, (size,), generator=generator)
        drawn = torch.randint(3, vocabulary, (size, longest), generator=generator)
        return drawn.masked_fill(torch.arange(longest) >= lengths[:, None], 0)

    longest = [int(n) for n in torch.randint(5, 14, (count,), generator=generator)]
    return [(tokens(n, CONFIG.src_vocab), tokens(n + 1, CONFIG.tgt_vocab)) for n in longest]


def stepper(
    model: nn.Module, loss: Callable[..., Tensor], device: torch.device, bf16: bool
) -> Callable[[tuple[Tensor, Tensor]], None]:
    """One training step as a function of a batch."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step(batch: tuple[Tensor, Tensor]) -> None:
        src, tgt = (x.to(device) for x in batch)
        precision = torch.autocast(device.type, torch.bfloat16) if bf16 else contextlib.nullcontext()
        with precision:
            logits = model(src, tgt[:, :-1])
            total = loss(logits.flatten(0, 1), tgt[:, 1:].flatten(), ignore_index=0)
        total.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def compare(device: torch.device, bf16: bool, threads: int, rounds: int, size: int = 128) -> dict[str, Any]:
    """Median over the rounds of (torch.nn's time / ours), each round one pass of both over the same batches."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        torch.manual_seed(0)
        ours = Seq2Seq(CONFIG).to(device)
        sides = {
            "tileformer": stepper(ours, cross_entropy, device, bf16),
            "torch.nn": stepper(twin_of(ours).to(device), F.cross_entropy, device, bf16),
        }
        work = batches(4, size)
        seconds: dict[str, list[float]] = {name: [] for name in sides}
        for n in range(rounds + 1):
            for name in sorted(sides, reverse=bool(n % 2)):
                start = time.perf_counter()
                for batch in work:
                    sides[name](batch)
                if device.type == "cuda":
                    torch.cuda.synchronize()
                seconds[name].append(time.perf_counter() - start)
    finally:
        torch.set_num_threads(before)
    ours_s, theirs_s = seconds["tileformer"][1:], seconds["torch.nn"][1:]  # the first round warms both up
    return dict(
        device=str(device), precision="bf16" if bf16 else "fp32", threads=threads, rounds=rounds, batch=size,
        tileformer_ms=statistics.median(ours_s) / len(work) * 1e3, torch_nn_ms=statistics.median(theirs_s) / len(work) * 1e3,
        speedup=statistics.median(t / o for o, t in zip(ours_s, theirs_s, strict=True)),
    )  # fmt: skip


def report(device: torch.device, threads: list[int], rounds: int) -> list[dict[str, Any]]:
    """Print and return a row for each precision and number of threads."""
    print(
        f"one training step, width {CONFIG.d_model}, 3 + 3 layers, batch 128, dropout {CONFIG.dropout}, median of {rounds} rounds"
    )
    print(f"{'precision':<9} {'threads':>7} {'torch.nn ms':>11} {'tileformer ms':>13} {'speed-up':>8}")
    rows = []
    for bf16 in (False, True):
        for count in threads:
            row = compare(device, bf16, count, rounds)
            rows.append(row)
            print(
                f"{row['precision']:<9} {count:>7} {row['torch_nn_ms']:>11.1f} {row['tileformer_ms']:>13.1f} {row['speedup']:>7.2f}x",
                flush=True,
            )
    return rows
