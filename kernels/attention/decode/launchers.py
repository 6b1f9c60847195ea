"""From tensors to launches of the decoding kernels: registered ops, and what is planned once for each kind of call."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tileformer.kernels import device
from tileformer.kernels.attention.decode.params import DecodeParams
from tileformer.kernels.attention.decode.split import (
    DecodeFeatures,
    Slots,
    _append_kv_kernel,
    _decode_merge_kernel,
    _decode_split_kernel,
)
from tileformer.kernels.attention.mask import Matrix
from tileformer.kernels.attention.params import NO_LIMIT
from tileformer.kernels.attention.tiles import family
from tileformer.kernels.autograd import register
from tileformer.kernels.device import INTERPRETED, arch_of, dot_precision, wider
from tileformer.kernels.launch import Launch, Tile, cdiv, pow2

LEAST_KEYS = 256  # of a split: its partial results are then at most 1/128 of a row's keys and values
MOST_SPLITS = 64
MOST_ROWS = 64  # of a tile; keys are read again for more

Layout = tuple[torch.Size, tuple[int, ...], torch.dtype]


def _layout(x: Tensor | None) -> Layout | None:
    return None if x is None else (x.shape, x.stride(), x.dtype)


def splits_of(programs: int, slots: int, multiprocessors: int) -> int:
    """How many programs share the slots of a head: two on a multiprocessor, LEAST_KEYS slots each, a power of two."""
    wanted = pow2(cdiv(2 * multiprocessors, max(programs, 1)))
    most = max(1, slots // LEAST_KEYS)
    return min(wanted, 1 << (most.bit_length() - 1), MOST_SPLITS)


def tiles_of(
    arch: int, head_dim: int, dtype: torch.dtype, rows: int, pages: bool, words: bool, bias: bool = False
) -> list[Tile]:
    """Tiles to try, best first; the last fits any supported device.

    Args:
        pages, words: a load says where the keys lie, and whether they are read. The copies ahead of time wait for it,
            which costs two stages: with three, pages would leave one tile of keys and one of values in shared memory.
            Words and a bias hold registers, so that more warps share them.
    """
    if arch == INTERPRETED:
        return [dict(BLOCK_M=min(pow2(rows, 16), 32), BLOCK_N=32, num_warps=4, num_stages=1)]
    size = 64 if head_dim <= 64 else 128 if head_dim <= 128 else 256
    wide, tight = dtype.itemsize > 2, family(arch) == 120 and size == 256
    block_m = min(pow2(rows, 16), MOST_ROWS >> wide >> tight)
    block_n = 8192 // size >> wide
    crowded = (words or bias) and (family(arch) != 80 or size == 64)  # on sm_80 four warps of larger heads hold them
    warps = 8 if block_m > 16 or crowded else 4
    return [
        dict(BLOCK_M=block_m, BLOCK_N=block_n, num_warps=warps, num_stages=5 if pages or words else 3),
        dict(BLOCK_M=16, BLOCK_N=16, num_warps=4, num_stages=1),
    ]


class _Plan:
    """The launches of a kind of call: all but the tensors.

    Args:
        layouts: of q, k, v, the page table, the words, the bias and the scales.
        starts: whether there are any.
        settings: the architecture, the precision of float32 dots, the multiprocessors, LEAST_KEYS.
    """

    def __init__(
        self, layouts: Sequence[Layout | None], starts: bool, params: DecodeParams, settings: tuple[int, str, int, int]
    ) -> None:
        q, k, v, table, descends, bias, k_scale, v_scale = layouts
        assert q and k and v
        (rows, h, t_q, d), (dv,) = q[0], v[0][3:]
        beams, step, left, right, scale, softcap = params
        arch, precision, multiprocessors, least = settings
        page = 0 if table is None else k[0][1]
        order = (0, 1, 2) if table is None else (0, 2, 1)  # place, head, slot
        h_kv, capacity = (k[0][1], k[0][2]) if table is None else (k[0][2], table[0][1] * page)
        group, batch = h // max(h_kv, 1), rows // beams
        n_rows = group * beams * t_q
        tiles = tiles_of(arch, max(d, dv), q[2], n_rows, page > 0, descends is not None, bias is not None)
        tile_rows = cdiv(n_rows, tiles[0]["BLOCK_M"])
        low, high = left != NO_LIMIT, right != NO_LIMIT and t_q > 1
        left, right = min(left, capacity), min(right, capacity)
        readable = min(capacity, (left + t_q) * step) if low else capacity
        strides = [q[1], *(tuple(x[1][i] for i in order) for x in (k, v))]
        self.splits = n = splits_of(batch * h_kv * tile_rows, readable, multiprocessors)
        self.features = f = DecodeFeatures(
            PAGE=page, STARTS=starts, DESCENDS=descends is not None, LOW=low, HIGH=high, BIAS=bias is not None,
            INT8=k_scale is not None, SOFTCAP=softcap > 0.0, SPLIT=n > 1, D=d, DV=dv, BLOCK_D=pow2(d, 16),
            BLOCK_DV=pow2(dv, 16), PRECISION=precision, ALIGN=math.gcd(16, *strides[1], *strides[2]),
        )  # fmt: skip
        scale_strides = [(0,) * 3 if x is None else tuple(x[1][i] for i in order) for x in (k_scale, v_scale)]
        table_strides, word_strides = ((0,) if x is None else x[1][:1] for x in (table, descends))
        bias_strides: tuple[int, ...] = (0, 0, 0, 0)
        if bias is not None:
            own = [stride if size > 1 else 0 for size, stride in zip(bias[0], bias[1], strict=True)]
            bias_strides = tuple([0] * (4 - len(own)) + own)
        present = [starts, f.DESCENDS, page > 0, f.BIAS, f.INT8, f.INT8]

        def arrange(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, *rest: Tensor) -> tuple[Any, ...]:
            given = iter(rest)
            starts, words, table, bias, *scales = (next(given) if there else lengths for there in present)
            slots = Slots(lengths, starts, Matrix(words, word_strides), Matrix(table, table_strides))
            caches, scales_there = map(Matrix, (q, k, v), strides), map(Matrix, scales, scale_strides)
            return (*caches, slots, Matrix(bias, bias_strides), *scales_there, *given)

        heads = batch * h_kv
        self.split = Launch(
            _decode_split_kernel, lambda tile: (heads * n * cdiv(n_rows, tile["BLOCK_M"]),), dict(F=f), tiles,
            (h_kv, group, t_q, beams, step, capacity, n, least, left, right, scale, softcap), arrange,
        )  # fmt: skip
        block_dv = pow2(dv)
        warps = min(max(1, n * block_dv // 2048), 8)
        self.merge = Launch(
            _decode_merge_kernel, lambda _: (rows * t_q * h,), dict(SPLITS=n, DV=dv, BLOCK_DV=block_dv),
            [dict(num_warps=warps)], (t_q, h),
        )  # fmt: skip


_plan_launches = functools.lru_cache(maxsize=1024)(_Plan)  # a process may meet new kinds for ever


def _last_contiguous(op: str, **caches: Tensor) -> None:
    for name, x in caches.items():
        if x.stride(-1) != 1 and x.shape[-1] > 1:
            raise ValueError(
                f"{op}: {name} has strides {x.stride()}: its last axis must be contiguous; a copy of a cache at each "
                "step would cost more than the step"
            )


def decode_attention_fwd(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, page_table: Tensor | None, descends: Tensor | None,
    starts: Tensor | None, k_scale: Tensor | None, v_scale: Tensor | None, bias: Tensor | None, ints: Sequence[int],
    floats: Sequence[float],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Output (R, H, T_q, DV) and natural log-sum-exp (R, H, T_q)."""
    _last_contiguous("decode_attention", k=k, v=v)
    q = q if q.stride(-1) == 1 or q.shape[-1] == 1 else q.contiguous()
    params = DecodeParams.of(ints, floats)
    plan = _plan_launches(
        tuple(map(_layout, (q, k, v, page_table, descends, bias, k_scale, v_scale))),
        starts is not None, params,
        (arch_of(q), dot_precision(q), device.multiprocessors(q.device), LEAST_KEYS),
    )  # fmt: skip
    out, lse = _decode_attention_fake(q, k, v)
    others = [x for x in (starts, descends, page_table, bias, k_scale, v_scale) if x is not None]
    if plan.splits == 1:
        plan.split(q, k, v, lengths, *others, out, lse)
    else:
        part = torch.empty((*lse.shape, plan.splits, v.shape[3]), dtype=lse.dtype, device=q.device)
        part_lse = torch.empty((*lse.shape, plan.splits), dtype=lse.dtype, device=q.device)
        plan.split(q, k, v, lengths, *others, part, part_lse)
        plan.merge(part, part_lse, out, lse)
    return out, lse


def _decode_attention_fake(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    shape = (*q.shape[:3], v.shape[3])
    out = torch.empty_permuted(shape, (0, 2, 1, 3), dtype=q.dtype, device=q.device)  # joining the heads copies nothing
    return out, torch.empty(shape[:3], dtype=wider(q.dtype), device=q.device)


@functools.lru_cache(maxsize=1024)
def _append_launch(
    layouts: tuple[Layout, ...], table: Layout | None, scales: tuple[Layout | None, ...], beams: int
) -> Launch:
    k, v, k_cache, v_cache = layouts
    (rows, h, tokens, d), (dv,) = k[0], v[0][3:]
    page = 0 if table is None else k_cache[0][1]
    capacity = k_cache[0][2] if table is None else table[0][1] * page
    order = (0, 1, 2) if table is None else (0, 2, 1)
    strides = [k[1], v[1], *(tuple(x[1][i] for i in order) for x in (k_cache, v_cache))]
    block_d, block_dv = pow2(d), pow2(dv)
    block_h = min(pow2(h), max(1, 2048 // max(block_d, block_dv)))
    strides += [(0,) * 3 if x is None else tuple(x[1][i] for i in order) for x in scales]
    table_strides = (0,) if table is None else table[1][:1]

    def arrange(
        k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, k_scale: Tensor, v_scale: Tensor, lengths: Tensor,
        table: Tensor,
    ) -> tuple[Any, ...]:  # fmt: skip
        everything = map(Matrix, (k, v, k_cache, v_cache, k_scale, v_scale), strides)
        return (*everything, lengths, Matrix(table, table_strides))

    flags = dict(PAGE=page, D=d, DV=dv, BLOCK_D=block_d, BLOCK_DV=block_dv, BLOCK_H=block_h, INT8=scales[0] is not None)
    grid = (rows * tokens * cdiv(h, block_h),)
    return Launch(_append_kv_kernel, lambda _: grid, flags, [dict(num_warps=1)], (h, tokens, beams, capacity), arrange)


def append_kv(
    k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, page_table: Tensor | None,
    k_scale: Tensor | None, v_scale: Tensor | None, beams: int,
) -> None:  # fmt: skip
    """Store the newest tokens in the caches."""
    _last_contiguous("append_kv_cache", k_cache=k_cache, v_cache=v_cache)
    k, v = (x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous() for x in (k, v))
    layouts = tuple((x.shape, x.stride(), x.dtype) for x in (k, v, k_cache, v_cache))
    launch = _append_launch(layouts, _layout(page_table), (_layout(k_scale), _layout(v_scale)), beams)
    # Where there is none, lengths stand in and are never read.
    k_scale, v_scale, page_table = (lengths if x is None else x for x in (k_scale, v_scale, page_table))
    launch(k, v, k_cache, v_cache, k_scale, v_scale, lengths, page_table)


def _append_kv_fake(*_: Any) -> None:
    return None


decode = register(decode_attention_fwd, _decode_attention_fake)
store = register(append_kv, _append_kv_fake, mutates=("k_cache", "v_cache", "k_scale", "v_scale"))
