"""Which tile each attention kernel uses: the largest that compiles without a spill and fits shared memory, found ahead of time.

`tests/test_aot.py` compiles these tables for every architecture. The rows were found for causal attention with a key mask, Triton 3.7.
"""

from __future__ import annotations

import torch

from tileformer.kernels.launch import INTERPRETED, Tile

Row = tuple[int, int, int, int]  # BLOCK_M, BLOCK_N, num_warps, num_stages
Table = dict[int, dict[str, dict[int, Row]]]  # family of architectures -> feature -> head size up to -> tile


def tiles_for(table: Table, arch: int, head_dim: int, dtype: torch.dtype, feature: str) -> list[Tile]:
    """Tiles to try, best first; the last fits any supported device.

    Args:
        feature: "plain" (with causal and key masks), "mask" (2-D), "dropout" or "both"; float32 has rows of its own.

    EDGE is the extent, along the axis that the kernel loops over, of a tile that crosses the causal diagonal or a padded edge.
    """
    if arch == INTERPRETED:
        rows, edge = [(32, 32, 4, 1)], 16
    else:
        bucket = 64 if head_dim <= 64 else 128 if head_dim <= 128 else 256
        if feature == "plain" and head_dim & (head_dim - 1):
            feature = "mask"  # a tile padded to a power of two masks its columns, which holds as many registers
        rows = [table[family(arch)]["fp32" if dtype == torch.float32 else feature][bucket], (16, 16, 4, 1)]
        edge = 64
        if table is BACKWARD_DKDV and feature in ("plain", "dropout"):
            edge = max(16, rows[0][0] // 2)
    tiles = []
    for m, n, warps, stages in rows:
        tiles.append(dict(BLOCK_M=m, BLOCK_N=n, num_warps=warps, num_stages=stages))
        if table is not BACKWARD_BIAS and table is not WEIGHTS:
            tiles[-1]["EDGE"] = min(m if table is BACKWARD_DKDV else n, edge)
    return tiles


def family(arch: int) -> int:
    """The table's row for an architecture: sm_86, 89 and 12x share 99 KB of shared memory; a new one takes the nearest below."""
    if arch in (86, 89) or arch >= 120:
        return 120
    return 100 if arch >= 100 else 90 if arch >= 90 else 80


# float32 dots are IEEE multiply-adds: no matrix instruction, and operands in registers.
_FP32_FORWARD = {64: (32, 32, 8, 1), 128: (16, 32, 8, 1), 256: (16, 16, 4, 1)}
_FP32_DQ = {64: (32, 32, 8, 1), 128: (16, 16, 8, 1), 256: (16, 16, 8, 1)}
_FP32_DKDV = {64: (32, 32, 8, 1), 128: (16, 16, 8, 1), 256: (16, 16, 8, 1)}

FORWARD: Table = {
    80: {
        "plain": {64: (128, 64, 8, 3), 128: (64, 64, 8, 2), 256: (64, 64, 8, 2)},
        "mask": {64: (64, 64, 8, 2), 128: (64, 64, 8, 2), 256: (64, 32, 8, 2)},
        "dropout": {64: (128, 64, 8, 3), 128: (64, 64, 8, 2), 256: (64, 32, 8, 2)},
        "both": {64: (64, 64, 8, 2), 128: (64, 64, 8, 1), 256: (64, 32, 8, 2)},
        "fp32": _FP32_FORWARD,
    },
    90: {
        "plain": {64: (128, 64, 4, 3), 128: (128, 128, 8, 2), 256: (64, 64, 8, 2)},
        "mask": {64: (128, 64, 8, 3), 128: (128, 64, 8, 3), 256: (64, 64, 8, 2)},
        "dropout": {64: (128, 64, 8, 3), 128: (128, 64, 8, 3), 256: (64, 32, 8, 2)},
        "both": {64: (64, 64, 8, 2), 128: (64, 64, 8, 2), 256: (64, 32, 8, 2)},
        "fp32": _FP32_FORWARD,
    },
    100: {
        "plain": {64: (128, 64, 8, 3), 128: (128, 64, 8, 3), 256: (64, 32, 8, 2)},
        "mask": {64: (128, 64, 8, 3), 128: (128, 64, 8, 3), 256: (64, 32, 8, 2)},
        "dropout": {64: (128, 64, 8, 3), 128: (128, 64, 8, 3), 256: (64, 32, 8, 2)},
        "both": {64: (128, 64, 8, 3), 128: (128, 64, 8, 3), 256: (64, 32, 8, 2)},
        "fp32": _FP32_FORWARD,
    },
    120: {
        "plain": {64: (128, 64, 8, 3), 128: (64, 64, 8, 2), 256: (64, 32, 8, 1)},
        "mask": {64: (64, 64, 8, 2), 128: (64, 64, 8, 1), 256: (64, 32, 8, 1)},
        "dropout": {64: (128, 64, 8, 3), 128: (64, 64, 8, 2), 256: (64, 32, 8, 1)},
        "both": {64: (64, 64, 8, 2), 128: (64, 64, 8, 1), 256: (64, 32, 8, 2)},
        "fp32": _FP32_FORWARD,
    },
}
BACKWARD_DQ: Table = {
    80: {
        "plain": {64: (128, 64, 8, 2), 128: (64, 64, 8, 2), 256: (64, 32, 8, 1)},
        "mask": {64: (64, 64, 8, 2), 128: (64, 64, 8, 2), 256: (64, 32, 8, 1)},
        "dropout": {64: (64, 64, 8, 2), 128: (64, 64, 8, 2), 256: (32, 32, 8, 1)},
        "both": {64: (64, 32, 8, 2), 128: (64, 64, 8, 2), 256: (64, 32, 8, 2)},
        "fp32": _FP32_DQ,
    },
    90: {
        "plain": {64: (128, 64, 8, 2), 128: (128, 64, 8, 2), 256: (64, 32, 8, 2)},
        "mask": {64: (128, 64, 8, 2), 128: (128, 64, 8, 2), 256: (64, 32, 8, 2)},
        "dropout": {64: (128, 64, 8, 2), 128: (128, 64, 8, 2), 256: (32, 32, 8, 1)},
        "both": {64: (64, 64, 8, 2), 128: (64, 64, 8, 2), 256: (64, 32, 8, 2)},
        "fp32": _FP32_DQ,
    },
    100: {
        "plain": {64: (128, 64, 8, 2), 128: (128, 64, 8, 2), 256: (64, 32, 8, 1)},
        "mask": {64: (128, 64, 8, 2), 128: (128, 64, 8, 2), 256: (64, 32, 8, 1)},
        "dropout": {64: (128, 64, 8, 2), 128: (128, 64, 8, 2), 256: (64, 32, 8, 1)},
        "both": {64: (128, 64, 8, 2), 128: (128, 64, 8, 2), 256: (32, 32, 8, 1)},
        "fp32": _FP32_DQ,
    },
    120: {
        "plain": {64: (128, 64, 8, 2), 128: (64, 64, 8, 1), 256: (32, 32, 8, 1)},
        "mask": {64: (64, 64, 8, 2), 128: (64, 32, 8, 2), 256: (32, 32, 8, 1)},
        "dropout": {64: (64, 64, 8, 2), 128: (64, 32, 8, 2), 256: (32, 32, 8, 1)},
        "both": {64: (64, 32, 8, 2), 128: (64, 32, 8, 2), 256: (32, 32, 8, 1)},
        "fp32": _FP32_DQ,
    },
}
BACKWARD_DKDV: Table = {
    80: {
        "plain": {64: (32, 128, 8, 2), 128: (64, 64, 8, 1), 256: (16, 32, 8, 1)},
        "mask": {64: (32, 128, 8, 2), 128: (32, 64, 8, 2), 256: (16, 32, 8, 1)},
        "dropout": {64: (32, 128, 8, 2), 128: (32, 32, 8, 1), 256: (16, 32, 8, 1)},
        "both": {64: (32, 64, 8, 2), 128: (32, 64, 8, 2), 256: (16, 16, 8, 1)},
        "fp32": _FP32_DKDV,
    },
    90: {
        "plain": {64: (64, 128, 8, 2), 128: (32, 128, 8, 2), 256: (16, 32, 8, 1)},
        "mask": {64: (32, 128, 8, 2), 128: (32, 64, 8, 2), 256: (16, 32, 8, 1)},
        "dropout": {64: (64, 128, 8, 2), 128: (32, 64, 8, 2), 256: (16, 32, 8, 1)},
        "both": {64: (32, 128, 8, 2), 128: (32, 32, 8, 1), 256: (16, 16, 8, 1)},
        "fp32": _FP32_DKDV,
    },
    100: {
        "plain": {64: (64, 128, 8, 2), 128: (64, 128, 8, 2), 256: (32, 64, 8, 1)},
        "mask": {64: (64, 128, 8, 2), 128: (64, 128, 8, 2), 256: (32, 64, 8, 1)},
        "dropout": {64: (64, 128, 8, 2), 128: (64, 128, 8, 2), 256: (32, 64, 8, 1)},
        "both": {64: (64, 128, 8, 2), 128: (64, 128, 8, 2), 256: (16, 16, 8, 1)},
        "fp32": _FP32_DKDV,
    },
    120: {
        "plain": {64: (32, 128, 8, 2), 128: (64, 64, 8, 1), 256: (16, 32, 8, 1)},
        "mask": {64: (32, 64, 8, 1), 128: (32, 32, 8, 1), 256: (16, 32, 8, 1)},
        "dropout": {64: (32, 64, 8, 2), 128: (32, 32, 8, 1), 256: (16, 32, 8, 1)},
        "both": {64: (32, 64, 8, 2), 128: (32, 32, 8, 1), 256: (16, 16, 8, 1)},
        "fp32": _FP32_DKDV,
    },
}

# Rarely used, and small: one tile fits everywhere.
_SMALL = {64: (64, 64, 8, 1), 128: (64, 32, 8, 1), 256: (32, 32, 8, 1)}
_RARE = dict(dict.fromkeys(("plain", "mask", "dropout", "both"), _SMALL), fp32=_FP32_DQ)
BACKWARD_BIAS: Table = dict.fromkeys((80, 90, 100, 120), _RARE)
WEIGHTS: Table = dict(BACKWARD_BIAS)
