"""Attention of a row's newest tokens over its cache, the keys split among programs (Flash-Decoding), and the store.

A program takes one split of the slots of one key head, against up to BLOCK_M of the rows that read them: the head's
group of query heads, times the beams, times the new tokens. Keys and values are read once for all of them. With s the
base-2 scores, each split keeps running_max = max s, sum = sum 2^(s - running_max) and acc = sum 2^(s - running_max) v;
a second kernel weighs the splits. A single split writes the result itself.

The grid comes from the capacity alone, which splits hold what comes from the lengths on the device: a CUDA graph can be
replayed while rows grow. A split has at least `least` slots, so short rows leave the last ones empty: their log-sum-exp
is -inf, and what else they would have written is not read.

Beams share slots: bit r of a slot's word says that beam r descends from it. A slot that no beam descends from is not
read, and the others' words cost one load a slot.

Keys and values in 8 bits have a scale for each slot and head. Scores are multiplied by those of the keys. Those of the
values weigh the probabilities, as shares of the tile's largest, so that none of them is lost in float16.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from tileformer.kernels.attention.mask import LOG2E, Matrix, soft_cap
from tileformer.kernels.tile_ops import LN2 as _LN2

LN2 = tl.constexpr(_LN2)
ROUND = tl.constexpr(12582912.0)  # 1.5 * 2^23: added, it leaves a float32 no bits behind the point


class DecodeFeatures(NamedTuple):
    """What a kind of call asks of the kernel: one constexpr."""

    PAGE: int  # slots of a page; 0 for contiguous caches
    STARTS: bool
    DESCENDS: bool
    LOW: bool  # a query sees no slot before its own, less a window
    HIGH: bool  # nor one after it
    BIAS: bool
    INT8: bool  # keys and values, each row times a scale
    SOFTCAP: bool
    SPLIT: bool
    D: int
    DV: int
    BLOCK_D: int
    BLOCK_DV: int
    PRECISION: str
    ALIGN: int  # of every stride of keys and values: Triton sees divisibility by 16 alone


class Slots(NamedTuple):
    """Which slots a row reads, and where they lie. Where a feature is off, `lengths` stands in and is never read."""

    lengths: Any
    starts: Any
    descends: Matrix  # (B, slots) by the stride of a row
    table: Matrix  # (B, max_pages)


@triton.jit
def _tile_place(slots, table_ptr, b, at, near, in_tile, F: tl.constexpr, BLOCK_N: tl.constexpr):
    """(place along the first axis of the caches, first slot there, further slots) of the slots at + near."""
    if F.PAGE == 0:
        return b, at.to(tl.int64), near.to(tl.int64)
    elif F.PAGE % BLOCK_N == 0:  # the tile lies inside of a page: one look-up
        return tl.load(table_ptr + at // F.PAGE).to(tl.int64), (at % F.PAGE).to(tl.int64), near.to(tl.int64)
    else:
        pages = tl.load(table_ptr + slots // F.PAGE, mask=in_tile, other=0)
        return pages.to(tl.int64), at.to(tl.int64) * 0, (slots % F.PAGE).to(tl.int64)


@triton.jit
def _load_rows(x_ptr, strides, place, first, further, real, D: tl.constexpr, BLOCK_D: tl.constexpr, F: tl.constexpr):
    """[BLOCK_N, BLOCK_D], 0 where a slot is not `real`."""
    far = strides[0] // F.ALIGN * F.ALIGN
    near = strides[2] // F.ALIGN * F.ALIGN
    rows = x_ptr + place * far + first * near + further * near
    cols = tl.arange(0, BLOCK_D)
    in_tile = real[:, None]
    if D < BLOCK_D:
        in_tile = in_tile & (cols < D)[None, :]
    return tl.load(rows[:, None] + cols[None, :], mask=in_tile, other=0.0)


@triton.jit
def _load_scales(scale, place, h, first, further, real):
    """[BLOCK_N] those of the slots' rows, 0 where a slot is not `real`."""
    at = scale.ptr + place * scale.strides[0] + h * scale.strides[1] + (first + further) * scale.strides[2]
    return tl.load(at, mask=real, other=0.0)


@triton.jit(do_not_specialize=["H_kv", "group", "T_q", "beams", "step", "capacity", "splits", "least", "left", "right"])
def _decode_split_kernel(
    q, k, v, slots, bias, k_scale, v_scale, out_ptr, lse_ptr, H_kv, group, T_q, beams, step, capacity, splits, least,
    left, right, scale, softcap, F: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program: one split of one key head's slots, against BLOCK_M of its rows.

    out is (R, T_q, H, DV) and lse (R, H, T_q), natural; of several splits (R, T_q, H, splits, DV) and (R, T_q, H,
    splits), base 2. k and v are strided along place (batch or page), head and slot. `step` slots are a token.
    """
    ACC: tl.constexpr = lse_ptr.dtype.element_ty
    n_rows = group * beams * T_q
    blocks = tl.cdiv(n_rows, BLOCK_M)
    pid = tl.program_id(0)
    split = pid // blocks % splits
    head = pid // (blocks * splits)
    b = (head // H_kv).to(tl.int64)
    h = head % H_kv

    # Rows of the tile: beam by beam, token by token, head by head of the group.
    rows = pid % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    in_q = rows < n_rows
    beam = rows // (group * T_q)
    token = rows // group % T_q
    q_head = h * group + rows % group
    q_row = b * beams + beam
    length = tl.minimum(tl.maximum(tl.load(slots.lengths + b), 0), capacity)
    own_end = length - (T_q - 1 - token) * step  # the slots of this token end here
    high = own_end + right * step
    low = own_end - (left + 1) * step

    first = length * 0
    if F.STARTS:
        first = tl.maximum(first, tl.load(slots.starts + b))
    if F.LOW:
        first = tl.maximum(first, length - (left + T_q) * step)
    start = first // BLOCK_N * BLOCK_N  # tiles lie inside of pages
    filled = tl.maximum(tl.minimum(splits, (length - first) // least), 1)
    share = tl.cdiv(tl.cdiv(length - start, filled), BLOCK_N) * BLOCK_N
    start += split * share
    end = tl.minimum(start + share, length)

    cols_d = tl.arange(0, F.BLOCK_D)
    # [BLOCK_M, BLOCK_D]
    q_at = q.ptr + q_row * q.strides[0] + q_head * q.strides[1] + token * q.strides[2]
    q_tile = tl.load(q_at[:, None] + cols_d[None, :], mask=in_q[:, None] & (cols_d < F.D)[None, :], other=0.0)
    far_head = h.to(tl.int64)
    k_ptr = k.ptr + far_head * (k.strides[1] // F.ALIGN * F.ALIGN)
    v_ptr = v.ptr + far_head * (v.strides[1] // F.ALIGN * F.ALIGN)
    table_ptr = slots.table.ptr + b * slots.table.strides[0]
    words_ptr = slots.descends.ptr + b * slots.descends.strides[0]
    bias_at = bias.ptr + q_row * bias.strides[0] + q_head.to(tl.int64) * bias.strides[1]
    bias_at += token.to(tl.int64) * bias.strides[2]
    any_beam = tl.where(beams == 32, -1, (1 << beams) - 1)

    BLOCK_DV: tl.constexpr = F.BLOCK_DV
    near = tl.arange(0, BLOCK_N)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], ACC)
    running_max = tl.full([BLOCK_M], float("-inf"), ACC)
    total = tl.zeros([BLOCK_M], ACC)
    for i in range(tl.cdiv(tl.maximum(end - start, 0), BLOCK_N)):
        at = start + i * BLOCK_N
        cols = at + near
        real = cols < end
        if F.STARTS or F.LOW:
            real = real & (cols >= first)
        if F.DESCENDS:
            words = tl.load(words_ptr + cols, mask=real, other=0)
            real = real & ((words & any_beam) != 0)
        place, first_slot, further = _tile_place(cols, table_ptr, b, at, near, cols < end, F, BLOCK_N)
        # [BLOCK_N, BLOCK_D]
        k_tile = _load_rows(k_ptr, k.strides, place, first_slot, further, real, F.D, F.BLOCK_D, F)
        # [BLOCK_M, BLOCK_N]
        k_tile = tl.trans(k_tile).to(q_tile.dtype)
        s = tl.dot(q_tile, k_tile, input_precision=F.PRECISION, out_dtype=ACC) * (scale * LOG2E)
        if F.INT8:
            s *= _load_scales(k_scale, place, far_head, first_slot, further, real)[None, :]
        if F.SOFTCAP:
            s, _ = soft_cap(s, softcap)
        seen = real[None, :]
        if F.HIGH:
            seen = seen & (cols[None, :] < high[:, None])
        if F.LOW:
            seen = seen & (cols[None, :] >= low[:, None])
        if F.DESCENDS:
            seen = seen & ((words[None, :] >> beam[:, None] & 1) != 0)
        if F.BIAS:
            bias_tile = bias_at[:, None] + cols.to(tl.int64)[None, :] * bias.strides[3]
            s += tl.load(bias_tile, mask=seen & in_q[:, None], other=0.0).to(ACC) * LOG2E
        s = tl.where(seen, s, float("-inf"))
        new_max = tl.maximum(running_max, tl.max(s, 1))
        base = tl.where(new_max == float("-inf"), 0.0, new_max)  # no slot yet: 2^(-inf - 0) = 0, not NaN
        p = tl.exp2(s - base[:, None])
        alpha = tl.exp2(running_max - base)
        total = total * alpha + tl.sum(p, 1)
        # [BLOCK_N, BLOCK_DV]
        v_tile = _load_rows(v_ptr, v.strides, place, first_slot, further, real, F.DV, F.BLOCK_DV, F)
        # [BLOCK_M, BLOCK_DV]
        if F.INT8:
            shares = _load_scales(v_scale, place, far_head, first_slot, further, real)
            largest = tl.max(shares, 0)
            p *= (shares / tl.where(largest > 0.0, largest, 1.0))[None, :]
            v_tile = v_tile.to(q_tile.dtype)
            part = tl.dot(p.to(q_tile.dtype), v_tile, input_precision=F.PRECISION, out_dtype=ACC)
            acc = acc * alpha[:, None] + part * largest
        else:
            acc = tl.dot(p.to(v_tile.dtype), v_tile, acc * alpha[:, None], input_precision=F.PRECISION, out_dtype=ACC)
        running_max = new_max

    some = total != 0.0  # true of NaN, so that a row with a NaN stays NaN
    total = tl.where(some, total, 1.0)
    acc = tl.where(some[:, None], acc * (1.0 / total)[:, None], 0.0)
    lse = tl.where(some, running_max + tl.log2(total), float("-inf"))
    heads = H_kv * group
    out_row = (q_row * T_q + token) * heads + q_head
    in_out = in_q
    if F.SPLIT:
        out_row = out_row * splits + split
        in_out = in_q & (start < end)
    cols_dv = tl.arange(0, F.BLOCK_DV)
    out_at = out_ptr + out_row[:, None] * F.DV + cols_dv[None, :]
    tl.store(out_at, acc.to(out_ptr.dtype.element_ty), mask=in_out[:, None] & (cols_dv < F.DV)[None, :])
    if F.SPLIT:
        tl.store(lse_ptr + out_row, lse, mask=in_q)
    else:
        tl.store(lse_ptr + (q_row * heads + q_head) * T_q + token, lse * LN2, mask=in_q)


@triton.jit(do_not_specialize=["T_q", "H"])
def _decode_merge_kernel(
    part_ptr, part_lse_ptr, out_ptr, lse_ptr, T_q, H, SPLITS: tl.constexpr, DV: tl.constexpr, BLOCK_DV: tl.constexpr
):
    """One program: one row of out (R, T_q, H, DV), its splits weighed by 2^lse. An empty split's part is not read."""
    row = tl.program_id(0).to(tl.int64)
    split = tl.arange(0, SPLITS)
    cols = tl.arange(0, BLOCK_DV)
    part_lse = tl.load(part_lse_ptr + row * SPLITS + split)
    top = tl.max(part_lse, 0)
    weight = tl.exp2(part_lse - tl.where(top == float("-inf"), 0.0, top))
    wanted = (weight != 0.0)[:, None] & (cols < DV)[None, :]  # true of NaN
    # [SPLITS, BLOCK_DV]
    part = tl.load(part_ptr + (row * SPLITS + split)[:, None] * DV + cols[None, :], mask=wanted, other=0.0)
    total = tl.sum(weight, 0)
    some = total != 0.0
    total = tl.where(some, total, 1.0)
    out = tl.sum(part * weight[:, None], 0) / total
    tl.store(out_ptr + row * DV + cols, out.to(out_ptr.dtype.element_ty), mask=cols < DV)
    token = row // H % T_q
    lse = tl.where(some, (top + tl.log2(total)) * LN2, float("-inf"))
    tl.store(lse_ptr + (row // (T_q * H) * H + row % H) * T_q + token, lse)


@triton.jit(do_not_specialize=["H", "T", "beams", "capacity"])
def _append_kv_kernel(
    k, v, k_cache, v_cache, k_scale, v_scale, lengths_ptr, table, H, T, beams, capacity, PAGE: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_H: tl.constexpr,
    INT8: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_H heads of one token of one row (R, H, T, D), stored where it belongs."""
    blocks = tl.cdiv(H, BLOCK_H)
    pid = tl.program_id(0)
    token = pid // blocks % T
    row = (pid // (blocks * T)).to(tl.int64)
    b = row // beams
    slot = tl.load(lengths_ptr + b) - (T - token) * beams + (row % beams).to(tl.int32)
    stored = (slot >= 0) & (slot < capacity)
    place = b
    if PAGE > 0:
        page = tl.load(table.ptr + b * table.strides[0] + slot // PAGE, mask=stored, other=-1)
        stored = stored & (page >= 0)
        place = page.to(tl.int64)
        slot = slot % PAGE
    heads = pid % blocks * BLOCK_H + tl.arange(0, BLOCK_H)
    in_heads = (heads < H) & stored
    _copy_row(k, k_cache, k_scale, row, token, place, slot, heads, in_heads, D, BLOCK_D, INT8)
    _copy_row(v, v_cache, v_scale, row, token, place, slot, heads, in_heads, DV, BLOCK_DV, INT8)


@triton.jit
def _copy_row(
    x, cache, scale, row, token, place, slot, heads, in_heads, D: tl.constexpr, BLOCK_D: tl.constexpr,
    INT8: tl.constexpr,
):  # fmt: skip
    """`heads` of a token, to a slot; in 8 bits as multiples of the largest of a head divided by 127."""
    cols = tl.arange(0, BLOCK_D)
    inside = in_heads[:, None] & (cols < D)[None, :]
    x_at = x.ptr + row * x.strides[0] + token.to(tl.int64) * x.strides[2]
    at = cache.ptr + place * cache.strides[0] + slot.to(tl.int64) * cache.strides[2]
    far = heads.to(tl.int64)[:, None]
    value = tl.load(x_at + far * x.strides[1] + cols[None, :], mask=inside, other=0.0)
    if INT8:
        value = value.to(tl.float32)
        finite = tl.sum(value * 0.0, 1) == 0.0
        unit = tl.where(finite, tl.math.div_rn(tl.max(tl.abs(value), 1), 127.0), float("nan"))
        scale_at = scale.ptr + place * scale.strides[0] + slot.to(tl.int64) * scale.strides[2]
        tl.store(scale_at + heads.to(tl.int64) * scale.strides[1], unit, mask=in_heads)
        multiples = tl.math.div_rn(value, tl.where(unit > 0.0, unit, 1.0)[:, None])
        multiples = (tl.minimum(tl.maximum(multiples, -127.0), 127.0) + ROUND) - ROUND
        value = tl.where((unit > 0.0)[:, None], multiples, 0.0).to(tl.int8)
    tl.store(at + far * cache.strides[1] + cols[None, :], value, mask=inside)
