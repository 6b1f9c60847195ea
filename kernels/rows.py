"""What the launchers of layer_norm, softmax, cross_entropy and dropout share: rows, their alignment, tiles."""

from __future__ import annotations

import math
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from tileformer.kernels.launch import Tile, pow2

LONG_ROW_TILE = 8192
MOST_ROWS = 128


def rows_of(x: Tensor, n: int) -> Tensor:
    """x as rows (R, n) with a contiguous last axis, as the kernels want it: a view if possible, else a copy."""
    rows = x.reshape(x.numel() // max(n, 1), n)
    return rows if n == 1 or rows.stride(1) == 1 else rows.contiguous()


def row_flags(n: int, *rows: Tensor) -> dict[str, Any]:
    """The type of sums, and the largest power of two up to 8 that divides the row length and every row stride.

    Triton sees divisibility by 16 by itself; with ALIGN, 1000 columns are vector accesses too.
    """
    acc = tl.float64 if rows[0].dtype == torch.float64 else tl.float32
    return {"ACC": acc, "ALIGN": math.gcd(8, n, *(r.stride(0) for r in rows))}


def row_tile(n: int, limit: int, elements: int, per_thread: int) -> Tile:
    """Whole rows, together `elements` at most, or one longer row; a part of a row if it is longer than `limit`."""
    block = pow2(n) if n <= limit else min(limit, LONG_ROW_TILE)
    warps = min(max(4, max(elements, block) // (32 * per_thread)), 32)
    return {"BLOCK_R": min(max(1, elements // block), MOST_ROWS), "BLOCK_N": block, "num_warps": warps}
