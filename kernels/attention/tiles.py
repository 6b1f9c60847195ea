"""Which tile each attention kernel uses: found ahead of time by compiling for every architecture (no spills, shared memory fits)."""

from __future__ import annotations

import torch

from tileformer.kernels.launch import INTERPRETED, Tile

# (BLOCK_M, BLOCK_N, num_warps, num_stages)
Row = tuple[int, int, int, int]


def _bucket(head_dim: int) -> int:
    return 64 if head_dim <= 64 else 128 if head_dim <= 128 else 256


def _family(arch: int) -> int:
    """sm_86 and sm_89 share limits, sm_103 is an sm_100, sm_121 an sm_120; a newer architecture takes the newest row."""
    for family in (120, 100, 90, 86):
        if arch >= family:
            return family
    return 80


def tiles_for(table: dict[tuple[int, int, str], list[Row]], arch: int, head_dim: int, dtype: torch.dtype, feature: str) -> list[Tile]:
    """Tiles to try, best first, for a head size, dtype and feature ("plain", "mask" or "dropout")."""
    if arch == INTERPRETED:
        rows = [(32, 32, 4, 1)]
    else:
        kind = "fp32" if dtype == torch.float32 else feature
        key = (_family(arch), _bucket(head_dim), kind)
        rows = [table.get(key) or table[(0, *key[1:])], table[(0, 0, kind)]]
    return [dict(BLOCK_M=m, BLOCK_N=n, num_warps=w, num_stages=s) for m, n, w, s in rows]


# Family 0 holds what an architecture without a row of its own uses; head size 0 the last resort, which fits 99 KB.
FORWARD: dict[tuple[int, int, str], Row] = {
    (0, 64, "plain"): (128, 64, 4, 3),
    (100, 64, "plain"): (128, 128, 8, 3),
    (120, 64, "plain"): (128, 64, 8, 2),
    (0, 64, "mask"): (64, 64, 4, 2),
    (0, 64, "dropout"): (64, 64, 4, 2),
    (0, 128, "plain"): (128, 64, 8, 2),
    (80, 128, "plain"): (128, 64, 8, 3),
    (90, 128, "plain"): (128, 128, 8, 2),
    (100, 128, "plain"): (128, 64, 8, 3),
    (0, 128, "mask"): (64, 64, 8, 2),
    (0, 128, "dropout"): (64, 64, 8, 2),
    (0, 256, "plain"): (64, 32, 8, 2),
    (0, 256, "mask"): (64, 32, 8, 1),
    (0, 256, "dropout"): (64, 32, 8, 1),
    (0, 64, "fp32"): (32, 32, 8, 1),
    (0, 128, "fp32"): (32, 32, 8, 1),
    (0, 256, "fp32"): (16, 32, 8, 1),
    (0, 0, "plain"): (16, 16, 4, 1),
    (0, 0, "mask"): (16, 16, 4, 1),
    (0, 0, "dropout"): (16, 16, 4, 1),
    (0, 0, "fp32"): (16, 16, 4, 1),
}
BACKWARD_DQ: dict[tuple[int, int, str], Row] = dict(FORWARD)
BACKWARD_DKDV: dict[tuple[int, int, str], Row] = dict(FORWARD)
