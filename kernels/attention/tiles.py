"""Which tile each attention kernel uses: of those that spill next to nothing the one with the best main loop.

`tests/test_aot.py` compiles these tables for every architecture. The rows were found with Triton 3.7 and the models of
bench/static: those of sm_80 at head sizes 64 and 128, and of dK and dV beyond 128 but for sm_100, by the bound of the
loop (`tileformer bench static --tiles TEXT`), the others as the largest without a spill. Three stages, wherever they
fit: with two, a tile is asked for at the end of one iteration and awaited at the start of the next, so that nothing
hides the way from memory.
"""

import torch

from tileformer.kernels.device import INTERPRETED
from tileformer.kernels.launch import Tile

# The values of _OPTIONS; the last one only where fewer registers let another block in, or let nothing spill.
Row = tuple[int, ...]
_OPTIONS = ("BLOCK_M", "BLOCK_N", "num_warps", "num_stages", "maxnreg")
# Whose row a feature takes that has none of its own; "ragged" is plain where the head size is no power of two.
_LIKE = {"packed": "plain", "overlap": "plain", "ragged": "mask", "all": "both"}
Table = dict[tuple[int, str], dict[int, Row]]  # (family of architectures, feature) -> head size up to -> tile


def tiles_for(table: Table, arch: int, head_dim: int, dtype: torch.dtype, feature: str) -> list[Tile]:
    """Tiles to try, best first; the last fits any supported device.

    Args:
        feature: "plain" (with causal, windows and key masks), "overlap" (plain, whole sequences of 1,024 keys and more
            whose rows tensor descriptors reach), "packed", "mask" (2-D, a bias, ALiBi or a soft cap), "dropout",
            "both", or "all" (dropout, a mask or bias, and ALiBi or a soft cap); float32 has rows of its own.

    BLOCK_MASKED is the extent, along the axis that the kernel loops over, of a tile that crosses a bound. THREADS (of
    the program) lets its loads hold fewer registers: `load_tile`.
    """
    rows: list[Row]
    overlap = feature == "overlap" and table is FORWARD
    spare = table is FORWARD or table is BACKWARD_DQ or table is BACKWARD_DKDV
    if arch == INTERPRETED:
        rows, masked = [(32, 32, 4, 1)], 16
    else:
        bucket = 64 if head_dim <= 64 else 128 if head_dim <= 128 else 256
        if feature in ("plain", "packed") and head_dim & (head_dim - 1):
            feature = "ragged"  # a tile padded to a power of two masks its columns: registers, as a mask's
        row = table.get((family(arch), feature), {}).get(bucket)
        overlap = overlap and row is not None and family(arch) == 90
        spare = spare and family(arch) == 80 and dtype != torch.float32
        row = row or table[family(arch), _LIKE.get(feature, feature)][bucket]
        fp32 = _FP32_FORWARD if table is FORWARD else _FP32
        rows = [fp32[bucket] if dtype == torch.float32 else row, (16, 16, 4, 1)]
        masked = 64 if feature in ("plain", "packed", "overlap") else 32
        if table is BACKWARD_DKDV:
            masked = 16 if feature == "all" else max(16, rows[0][0] // 2)
    tiles = [dict(zip(_OPTIONS, row, strict=False)) for row in rows]
    for tile in tiles:
        if table is not BACKWARD_BIAS and table is not WEIGHTS:
            tile["BLOCK_MASKED"] = min(tile["BLOCK_M" if table is BACKWARD_DKDV else "BLOCK_N"], masked)
    if overlap:
        tiles[0]["OVERLAP"] = 1
    if spare:
        tiles[0]["THREADS"] = 32 * tiles[0]["num_warps"]
    return tiles


def dkdv_apart(arch: int, head_dim: int, dtype: torch.dtype) -> bool:
    """Whether dK and dV are two launches. Beyond 128 columns the two accumulators leave registers for 16 queries by 32
    keys alone, and shared memory takes three times as long as the products; apart they do 5 products for 4, on tiles
    eight times as large. Tensor memory holds both."""
    return head_dim > 128 and (family(arch) != 100 or dtype == torch.float32)


def family(arch: int) -> int:
    """An architecture's row: sm_86, 89 and 12x have 99 KB of shared memory; a new one takes the nearest below."""
    if arch in (86, 89) or arch >= 120:
        return 120
    return 100 if arch >= 100 else 90 if arch >= 90 else 80


# float32 dots are IEEE multiply-adds: no matrix instruction, and operands in registers.
_FP32_FORWARD: dict[int, Row] = {64: (32, 32, 8, 1), 128: (16, 32, 8, 1), 256: (16, 16, 4, 1)}
_FP32: dict[int, Row] = {64: (32, 32, 8, 1), 128: (16, 16, 8, 1), 256: (16, 16, 8, 1)}

FORWARD: Table = {
    (80, "plain"): {64: (128, 64, 8, 3), 128: (128, 64, 8, 3), 256: (64, 32, 8, 3)},
    (80, "overlap"): {128: (128, 32, 4, 3)},
    (80, "packed"): {128: (128, 32, 8, 3)},
    (80, "ragged"): {128: (128, 64, 8, 3)},
    (80, "mask"): {64: (64, 64, 8, 3), 128: (64, 64, 8, 3), 256: (64, 32, 8, 3)},
    (80, "dropout"): {64: (128, 64, 8, 3), 128: (128, 32, 8, 3), 256: (64, 32, 8, 3)},
    (80, "both"): {64: (64, 64, 8, 3), 128: (64, 64, 8, 3), 256: (64, 16, 8, 3)},
    (90, "plain"): {64: (128, 32, 4, 4, 168), 128: (128, 64, 8, 3), 256: (64, 64, 8, 3)},
    (90, "overlap"): {128: (128, 128, 8, 3)},
    (90, "mask"): {64: (128, 64, 8, 3), 128: (128, 64, 8, 3), 256: (64, 32, 8, 3)},
    (90, "dropout"): {64: (128, 64, 8, 3), 128: (128, 64, 8, 3), 256: (64, 32, 8, 3)},
    (90, "both"): {64: (64, 64, 8, 3), 128: (64, 64, 8, 3), 256: (64, 32, 8, 3)},
    (100, "plain"): {64: (128, 64, 8, 3), 128: (128, 64, 8, 3), 256: (64, 32, 8, 3)},
    (100, "mask"): {64: (128, 64, 8, 3), 128: (128, 64, 8, 3), 256: (64, 32, 8, 3)},
    (100, "dropout"): {64: (128, 64, 8, 3), 128: (128, 64, 8, 3), 256: (64, 32, 8, 3)},
    (100, "both"): {64: (128, 64, 8, 3), 128: (128, 64, 8, 3), 256: (64, 32, 8, 3)},
    (120, "plain"): {64: (128, 64, 8, 3), 128: (64, 32, 8, 3), 256: (64, 16, 8, 3)},
    (120, "mask"): {64: (64, 64, 8, 3), 128: (64, 32, 8, 3), 256: (64, 16, 8, 2)},
    (120, "dropout"): {64: (128, 64, 8, 3), 128: (64, 32, 8, 3), 256: (64, 16, 8, 3)},
    (120, "both"): {64: (64, 64, 8, 3), 128: (64, 32, 8, 3), 256: (64, 16, 8, 2)},
}
BACKWARD_DQ: Table = {
    (80, "plain"): {64: (128, 64, 8, 3), 128: (128, 32, 8, 3), 256: (64, 16, 8, 3)},
    (80, "mask"): {64: (64, 64, 8, 3), 128: (64, 64, 8, 3), 256: (64, 16, 8, 2)},
    (80, "dropout"): {64: (64, 32, 8, 3), 128: (64, 32, 8, 3), 256: (32, 16, 8, 3)},
    (80, "both"): {64: (64, 32, 8, 3), 128: (64, 32, 8, 3), 256: (64, 16, 8, 2)},
    (90, "plain"): {64: (128, 32, 8, 3), 128: (128, 64, 8, 3), 256: (64, 32, 8, 3)},
    (90, "mask"): {64: (128, 64, 8, 3), 128: (128, 64, 8, 3), 256: (64, 32, 8, 3)},
    (90, "dropout"): {64: (128, 64, 8, 3), 128: (128, 64, 8, 3), 256: (64, 32, 8, 3)},
    (90, "both"): {64: (64, 64, 8, 3), 128: (64, 64, 8, 3), 256: (64, 16, 8, 3)},
    (90, "all"): {128: (64, 32, 8, 3)},
    (100, "plain"): {64: (128, 64, 8, 3), 128: (128, 64, 8, 3, 168), 256: (64, 32, 8, 3)},
    (100, "mask"): {64: (128, 32, 8, 3), 128: (128, 64, 8, 3), 256: (64, 32, 8, 3)},
    (100, "dropout"): {64: (128, 64, 8, 2), 128: (128, 64, 8, 2), 256: (64, 32, 8, 3)},
    (100, "both"): {64: (128, 64, 8, 3), 128: (128, 64, 8, 3), 256: (32, 32, 8, 3)},
    (120, "plain"): {64: (128, 64, 8, 3), 128: (64, 32, 8, 2), 256: (32, 16, 8, 3)},
    (120, "mask"): {64: (64, 64, 8, 3), 128: (64, 16, 8, 3), 256: (32, 16, 8, 3)},
    (120, "dropout"): {64: (64, 64, 8, 3), 128: (64, 16, 8, 3), 256: (32, 16, 8, 3)},
    (120, "both"): {64: (64, 32, 8, 3), 128: (64, 16, 8, 3), 256: (32, 16, 8, 3)},
}
BACKWARD_DKDV: Table = {
    (80, "plain"): {64: (64, 128, 8, 2), 128: (64, 64, 8, 1), 256: (64, 64, 8, 2)},
    (80, "overlap"): {128: (32, 128, 8, 2)},
    (80, "mask"): {64: (32, 64, 8, 2), 128: (16, 64, 8, 3), 256: (64, 64, 8, 2)},
    (80, "dropout"): {64: (32, 128, 8, 2), 128: (32, 32, 8, 1), 256: (32, 32, 4, 2)},
    (80, "both"): {64: (16, 64, 8, 3), 128: (16, 64, 8, 2), 256: (32, 32, 4, 2)},
    (90, "plain"): {64: (64, 128, 8, 3), 128: (32, 128, 8, 3), 256: (32, 128, 8, 2)},
    (90, "mask"): {64: (32, 128, 8, 3), 128: (32, 64, 8, 3), 256: (32, 128, 8, 2)},
    (90, "dropout"): {64: (64, 128, 8, 3), 128: (32, 64, 8, 3), 256: (32, 128, 8, 2)},
    (90, "both"): {64: (32, 128, 8, 2), 128: (16, 64, 8, 3), 256: (16, 128, 8, 2)},
    (90, "all"): {64: (16, 128, 8, 3), 256: (32, 32, 4, 2)},
    (100, "plain"): {64: (64, 128, 8, 3), 128: (64, 128, 8, 3), 256: (32, 64, 8, 3)},
    (100, "mask"): {64: (64, 128, 8, 3), 128: (64, 128, 8, 3), 256: (32, 64, 8, 3)},
    (100, "dropout"): {64: (64, 128, 8, 3), 128: (64, 128, 8, 2), 256: (32, 64, 8, 3)},
    (100, "both"): {64: (64, 128, 8, 3), 128: (32, 128, 8, 3), 256: (16, 16, 8, 3)},
    (100, "all"): {64: (32, 128, 8, 3)},
    (120, "plain"): {64: (32, 128, 8, 2), 128: (64, 64, 8, 1), 256: (32, 64, 8, 1)},
    (120, "mask"): {64: (32, 64, 8, 3), 128: (16, 32, 8, 3), 256: (32, 32, 4, 2)},
    (120, "dropout"): {64: (32, 64, 8, 2), 128: (32, 32, 8, 1), 256: (32, 32, 8, 1)},
    (120, "both"): {64: (16, 64, 8, 2), 128: (32, 32, 8, 3), 256: (32, 32, 8, 2)},
}

# The kernels of weights.py: small, 64 rows where matrix instructions want them.
_SMALL: dict[int, Row] = {64: (64, 32, 8, 1), 128: (64, 32, 8, 1), 256: (16, 32, 8, 1)}
_SMALL_99KB = _SMALL | {128: (32, 64, 8, 1)}
BACKWARD_BIAS: Table = {
    (arch, feature): _SMALL if arch in (90, 100) else _SMALL_99KB
    for arch in (80, 90, 100, 120)
    for feature in ("plain", "mask", "dropout", "both")
}
WEIGHTS: Table = dict(BACKWARD_BIAS)
