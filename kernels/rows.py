"""What the launchers of layer_norm, softmax, cross_entropy and dropout share: rows, their alignment, tiles."""

import math
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from tileformer.kernels.launch import Tile, pow2

LONG_ROW_TILE = 8192
MOST_ROWS = 128


def rows_of(x: Tensor, n: int) -> tuple[Tensor, int]:
    """x as the kernels want it, as rows of n elements with a contiguous last axis, and the stride between rows.

    The tensor is x itself, a view, or, if neither serves, a copy; its shape says nothing.
    """
    if x.is_contiguous():
        return x, n
    rows = x.reshape(x.numel() // max(n, 1), n)
    rows = rows if n == 1 or rows.stride(1) == 1 else rows.contiguous()
    return rows, rows.stride(0)


def contiguous_like(x: Tensor, *_: Any, dtype: torch.dtype | None = None) -> Tensor:
    """A contiguous tensor like x, to be filled: also the fake of an op that returns one."""
    return torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)


def row_flags(dtype: torch.dtype, n: int, *strides: int) -> dict[str, Any]:
    """The type of sums, and the largest power of two up to 8 that divides the row length and every row stride.

    Triton sees divisibility by 16 by itself; with ALIGN, 1000 columns are vector accesses too.
    """
    acc = tl.float64 if dtype == torch.float64 else tl.float32
    return {"ACC": acc, "ALIGN": math.gcd(8, n, *strides)}


def row_tile(n: int, limit: int, elements: int, per_thread: int) -> Tile:
    """Whole rows, together `elements` at most, or one longer row; a part of a row if it is longer than `limit`."""
    block = pow2(n) if n <= limit else min(limit, LONG_ROW_TILE)
    warps = min(max(4, max(elements, block) // (32 * per_thread)), 32)
    return {"BLOCK_R": min(max(1, elements // block), MOST_ROWS), "BLOCK_N": block, "num_warps": warps}
