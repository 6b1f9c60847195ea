"""What an op is to a check and a benchmark, and what its tensors are drawn by."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor

Sizes = Mapping[str, int]
Tensors = dict[str, Tensor]
Options = dict[str, Any]
Build = Callable[..., tuple[Tensors, Options]]
MODES = ("forward", "backward", "both")
AFFINE = ("weight", "bias")
SCALES = ("k_scale", "v_scale")  # of keys and values in 8 bits


class Cost(NamedTuple):
    """Bytes moved and FLOPs of the matrix products of (forward, backward); bytes of `both` if not their sum."""

    bytes: tuple[int, int]
    flops: tuple[int, int] = (0, 0)
    both: int | None = None


@dataclasses.dataclass(frozen=True)
class Op:
    """What is known about an op."""

    axes: tuple[str, ...]  # the names of its sizes, for each number of them
    # Of (generator, sizes, **options): the tensors to differentiate, and the op's other arguments, drawn in float32.
    # Options that name a tensor (mask="boolean") are made into one, the others are passed on.
    build: Build
    cost: Callable[[Sizes, Options, int], Cost]  # of (sizes, options, bytes of an element)
    # Of (tensors, options, results, grad_outputs), float64 on the CPU: for each result whose error budget is not
    # max|result|, the sum of the absolute values of what is added up (bench/check/budget.py).
    error_sizes: Callable[[Tensors, Options, Tensors, Tensors], Mapping[str, Tensor | float]] = lambda *_: {}
    # Of (op, p, seed, a tensor of the dtype and device): (..., rows, columns) from the forward and from the backward,
    # 0 where an element is dropped and else what a 1 becomes. None for an op without dropout.
    draw: Callable[..., tuple[Tensor, Tensor]] | None = None
    differentiable: bool = True  # whether it has a backward


def normal(generator: Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator, device=generator.device)


def uniform(generator: Generator, *shape: int) -> Tensor:
    return torch.rand(shape, generator=generator, device=generator.device)


def largest(x: Tensor) -> float:
    """Largest finite absolute value."""
    return float(torch.where(x.isfinite(), x, 0.0).abs().max()) if x.numel() else 0.0


def key_padding(kind: str, b: int, t_k: int, device: torch.device | str = "cpu") -> Tensor:
    """Boolean (B, T_k), True where a key is real.

    Kinds: "right" (T_k to a third of it real), "quarter" (T_k to a quarter), "left", "holes", "none" (the last batch
    has no real key), "nowhere" (has any), "all" (are real).
    """
    column = torch.arange(t_k, device=device).expand(b, t_k)
    length = torch.linspace(t_k, max(1, t_k // 3), b).long().to(device)[:, None]
    if kind == "quarter":
        evenly = [max(1, t_k - (t_k - t_k // 4) * n // max(b - 1, 1)) for n in range(b)]
        return column < torch.tensor(evenly, device=device)[:, None]
    last = torch.arange(b, device=device)[:, None] == b - 1
    kinds = dict(right=column < length, left=column >= t_k - length, holes=column % 3 != 1)
    return (kinds | dict(none=(column < length) & ~last, nowhere=column < 0, all=column >= 0))[kind]


def real_keys(sizes: Sizes, options: Options) -> list[int]:
    """Number of real keys of each batch."""
    if "padding" not in options:
        return [sizes["T_k"]] * sizes["B"]
    return key_padding(options["padding"], sizes["B"], sizes["T_k"]).sum(1).tolist()


def attended_pairs(sizes: Sizes, options: Options) -> int:
    """(query, key) pairs that are attended to, over batches and heads. Padding lies on the right."""
    t_q, causal, per_head = sizes["T_q"], options.get("causal", False), 0
    offset = sizes["T_k"] - t_q if causal == "bottom_right" else 0
    for length in real_keys(sizes, options):
        if not causal:
            per_head += t_q * length
            continue
        # Row i sees min(length, max(0, i + offset + 1)) keys.
        first = min(max(0, -offset), t_q)  # the first row that sees a key
        full = min(max(first, length - offset), t_q)  # the first row that sees them all
        per_head += (full - first) * (first + full - 1 + 2 * (offset + 1)) // 2 + (t_q - full) * length
    return per_head * sizes["H"]
