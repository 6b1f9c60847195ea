"""Attention backward in two deterministic launches, without atomics (FlashAttention-2, arXiv:2307.08691, appendix B).

With P = 2^(s - lse), dP = dO V^T (times the kept dropout bits / (1 - p)) and delta = rowsum(dO * O) - dlse:
dS = P * (dP - delta) is the gradient of the scores before the softmax, which is the bias's; a soft cap multiplies it
with 1 - tanh^2; then dQ = scale dS K, dK = scale dS^T Q, dV = (dropped P)^T dO.

The first kernel owns a tile of queries, computes delta and dQ; the second owns a tile of keys, works on transposed
scores (so that P^T and dS^T are dot operands straight from registers) and sums over the query heads that share its key
head. A row without a key has lse = -inf, read as +inf: every P of it is 0. Padded keys need no mask in the second
kernel: a key's gradient depends on no other key, so theirs are set to 0. A third kernel (weights.py) makes the bias's.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from tileformer.kernels.attention import mask
from tileformer.kernels.attention.mask import LOG2E, SIZES, Matrix
from tileformer.kernels.tile_ops import dropout_keep, load_tile, store_tile


@triton.jit
def _dq_tile(dq, block, do, lse, delta, k_ptr, v_ptr, start, keep_scale,
             MASKED: tl.constexpr, BLOCK_N: tl.constexpr, F: tl.constexpr,
             THREADS: tl.constexpr):  # fmt: skip
    """Add one tile of keys to dq (without the scale)."""
    ACC: tl.constexpr = dq.dtype
    near = tl.arange(0, BLOCK_N)
    cols = start + near
    valid = cols < block.last
    if MASKED:
        valid = mask.valid_keys(cols, block.first, block.last, block.key_mask, F)
    # [BLOCK_N, BLOCK_D]
    k_tile = load_tile(k_ptr, near, block.k.strides[2], tl.arange(0, F.BLOCK_D), valid, F.D, F.BLOCK_D, MASKED, THREADS)
    # [BLOCK_M, BLOCK_N]
    s = tl.dot(block.q, tl.trans(k_tile), input_precision=F.PRECISION, out_dtype=ACC) * block.scale_log2
    s, t = mask.block_scores(s, block, cols, start, valid, MASKED, F)
    p = tl.exp2(s - lse[:, None])
    # [BLOCK_N, BLOCK_DV]
    v_tile = load_tile(
        v_ptr, near, block.v.strides[2], tl.arange(0, F.BLOCK_DV), valid, F.DV, F.BLOCK_DV, MASKED, THREADS
    )
    # [BLOCK_M, BLOCK_N]
    dp = tl.dot(do, tl.trans(v_tile), input_precision=F.PRECISION, out_dtype=ACC)
    if F.DROPOUT:
        keep = dropout_keep(block.seed, block.head, block.rows, start, block.threshold, BLOCK_N, False)
        dp = tl.where(keep, dp * keep_scale, 0.0)
    ds = p * (dp - delta[:, None])
    if F.SOFTCAP:
        ds *= 1 - t * t
    # [BLOCK_M, BLOCK_D]
    return tl.dot(ds.to(k_tile.dtype), k_tile, dq, input_precision=F.PRECISION, out_dtype=ACC)


@triton.jit(do_not_specialize=[*SIZES, "max_q", "section", "parts"])
def _attention_bwd_dq_kernel(
    q, k, v, do, masks, out_ptr, lse_ptr, dlse_ptr, dq_ptr, safe_lse_ptr, delta_ptr,
    H, group, T_q, T_k, max_q, shift, low, high, section, parts, threshold, scaling,
    F: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_MASKED: tl.constexpr, THREADS: tl.constexpr,
):  # fmt: skip
    """One program: dQ and delta of BLOCK_M queries of one head. out is (B, T_q, H, DV), dq (B, T_q, parts H, D)."""
    q, k, v = mask.aligned(q, F.ALIGN), mask.aligned(k, F.ALIGN), mask.aligned(v, F.ALIGN)
    do = mask.aligned(do, F.ALIGN)
    n_tiles = tl.cdiv(max_q, BLOCK_M)
    head, pid_m = mask.schedule(n_tiles, tl.num_programs(0) // n_tiles, section, F.HIGH)
    bounds = mask.sequence(masks.bounds, (head // H).to(tl.int64), T_q, T_k, shift, F.BOUNDS)
    row_start = pid_m * BLOCK_M
    if F.PACKED:  # noqa: SIM102
        if row_start >= bounds.q_len:
            return
    block = mask.query_block(q, k, v, masks, bounds, head, row_start, H, group, T_k,
                        low, high, threshold, scaling, F, BLOCK_M)  # fmt: skip
    near_m = tl.arange(0, BLOCK_M)
    offs_dv = tl.arange(0, F.BLOCK_DV)
    in_q = block.rows < bounds.q_len
    in_out = in_q if F.PACKED else block.rows < T_q

    ACC: tl.constexpr = lse_ptr.dtype.element_ty
    # [BLOCK_M, BLOCK_DV]
    do_tile = mask.load_rows(do, block.batch, block.h, block.q_row, in_q, F.DV, F.BLOCK_DV)
    out_row = block.batch * T_q + block.q_row
    out_at = out_ptr + out_row * (H * F.DV) + block.h * F.DV
    out = load_tile(out_at, near_m, H * F.DV, offs_dv, in_q, F.DV, F.BLOCK_DV, True)
    # [BLOCK_M]
    at_row = (block.batch * H + block.h) * T_q + block.q_row + near_m
    lse = tl.load(lse_ptr + at_row, mask=in_q, other=float("inf"))
    lse = tl.where(lse == float("-inf"), float("inf"), lse)
    delta = tl.sum(out.to(ACC) * do_tile.to(ACC), 1)
    if F.DLSE:
        delta -= tl.load(dlse_ptr + at_row, mask=in_q, other=0.0) * LOG2E  # the gradient of a base-2 lse
    tl.store(safe_lse_ptr + at_row, lse, mask=in_out)
    tl.store(delta_ptr + at_row, delta, mask=in_out)

    start, unmasked_start, unmasked_end, n_masked_left, n_masked_right = mask.key_tiles(
        block, BLOCK_M, BLOCK_N, BLOCK_MASKED, F
    )
    BLOCK_D: tl.constexpr = F.BLOCK_D
    dq = tl.zeros([BLOCK_M, BLOCK_D], ACC)
    DENSE: tl.constexpr = F.MASK or F.BIAS
    for part in tl.static_range(2):  # first the tiles that hold fewer registers: the masked ones of a dense mask
        if (part == 0) == DENSE:
            for i in range(n_masked_left + n_masked_right):
                at = mask.masked_tile(i, start, unmasked_end, n_masked_left, BLOCK_MASKED)
                k_at = block.k.ptr + at.to(tl.int64) * k.strides[2]
                v_at = block.v.ptr + at.to(tl.int64) * v.strides[2]
                dq = _dq_tile(dq, block, do_tile, lse, delta, k_at, v_at, at, scaling.keep_scale, True, BLOCK_MASKED, F,
                              THREADS)  # fmt: skip
        else:
            k_ptr = block.k.ptr + unmasked_start.to(tl.int64) * k.strides[2]
            v_ptr = block.v.ptr + unmasked_start.to(tl.int64) * v.strides[2]
            for i in range((unmasked_end - unmasked_start) // BLOCK_N):
                at = unmasked_start + i * BLOCK_N
                dq = _dq_tile(dq, block, do_tile, lse, delta, k_ptr, v_ptr, at, scaling.keep_scale, False, BLOCK_N, F,
                              THREADS)  # fmt: skip
                k_ptr += BLOCK_N * k.strides[2]
                v_ptr += BLOCK_N * v.strides[2]
    dq_row = H * F.D * parts
    dq_at = dq_ptr + out_row * dq_row + block.h * F.D
    store_tile(dq_at, dq * scaling.scale, near_m, dq_row, tl.arange(0, F.BLOCK_D), in_out, F.D)


class Keys(NamedTuple):
    """A tile of keys and values, and what restricts the queries that see them."""

    k: Any  # [BLOCK_N, BLOCK_D]
    v: Any  # [BLOCK_N, BLOCK_DV]
    cols: Any
    col_start: Any
    valid: Any
    q_len: Any
    shift: Any
    low: Any
    high: Any
    seed: Any
    threshold: Any
    scaling: Any


class Queries(NamedTuple):
    """The queries of one head, as the second kernel reads them."""

    q: Matrix
    do: Matrix
    safe_lse_ptr: Any
    delta_ptr: Any
    mask: Matrix
    bias: Matrix
    slope: Any
    head: Any


@triton.jit
def _dkdv_tile(dk, dv, keys, queries, start, MASKED: tl.constexpr, BLOCK_M: tl.constexpr,
               BLOCK_N: tl.constexpr, F: tl.constexpr, THREADS: tl.constexpr, ONLY: tl.constexpr):  # fmt: skip
    """Add one tile of queries, those from `start`, to dk (without the scale) and dv (without 1 / (1 - p))."""
    ACC: tl.constexpr = queries.safe_lse_ptr.dtype.element_ty
    near = tl.arange(0, BLOCK_M)
    cols = keys.cols[:, None]
    rows = start + near
    in_q = rows < keys.q_len
    q_stride = queries.q.strides[2]
    do_stride = queries.do.strides[2]
    # [BLOCK_M, BLOCK_D]
    q_at = queries.q.ptr + start.to(tl.int64) * q_stride
    q = load_tile(q_at, near, q_stride, tl.arange(0, F.BLOCK_D), in_q, F.D, F.BLOCK_D, MASKED, THREADS)
    # [BLOCK_M]
    # The scores hide rows outside; a mask here costs 50 registers.
    near_row = tl.minimum(rows, keys.q_len - 1) if MASKED else rows
    lse = tl.load(queries.safe_lse_ptr + near_row)
    delta = tl.load(queries.delta_ptr + near_row)
    # [BLOCK_N, BLOCK_M]
    s = tl.dot(keys.k, tl.trans(q), input_precision=F.PRECISION, out_dtype=ACC) * (keys.scaling.scale * LOG2E)
    s, t = mask.softcap_and_alibi(s, rows[None, :], cols, keys.shift, queries.slope, keys.scaling.softcap, F)
    seen = in_q[None, :]  # padded keys need no mask: their dK and dV rows are zeroed at the store
    if MASKED:
        if F.HIGH:
            seen = cols <= tl.where(in_q, rows + keys.high, -1)[None, :]
        if F.LOW:
            seen = seen & (cols >= (rows + keys.low)[None, :])
        if F.MASK or F.BIAS:  # which hold nothing for them
            seen = seen & keys.valid[:, None]
    s = mask.apply_mask_and_bias(s, rows[None, :], cols, seen, queries.mask, queries.bias,
                                 start, keys.col_start, MASKED, F)  # fmt: skip
    p = tl.exp2(s - lse[None, :])
    # [BLOCK_M, BLOCK_DV]
    do_at = queries.do.ptr + start.to(tl.int64) * do_stride
    do = load_tile(do_at, near, do_stride, tl.arange(0, F.BLOCK_DV), in_q, F.DV, F.BLOCK_DV, MASKED, THREADS)
    if ONLY != "dv":
        # [BLOCK_N, BLOCK_M]
        dp = tl.dot(keys.v, tl.trans(do), input_precision=F.PRECISION, out_dtype=ACC)
    kept = p
    if F.DROPOUT:
        keep = dropout_keep(keys.seed, queries.head, rows, keys.col_start, keys.threshold, BLOCK_N, True)
        kept = tl.where(keep, p, 0.0)
        if ONLY != "dv":
            dp = tl.where(keep, dp * keys.scaling.keep_scale, 0.0)
    if ONLY != "dk":
        # [BLOCK_N, BLOCK_DV]
        dv = tl.dot(kept.to(do.dtype), do, dv, input_precision=F.PRECISION, out_dtype=ACC)
    if ONLY != "dv":
        ds = p * (dp - delta[None, :])
        if F.SOFTCAP:
            ds *= 1 - t * t
        # [BLOCK_N, BLOCK_D]
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=F.PRECISION, out_dtype=ACC)
    return dk, dv


@triton.jit(do_not_specialize=[*SIZES, "max_k", "section", "n_heads", "parts"])
def _attention_bwd_dkdv_kernel(
    q, k, v, do, masks, safe_lse_ptr, delta_ptr, dk_ptr, dv_ptr,
    H, group, T_q, T_k, max_k, shift, low, high, section, n_heads, parts, threshold, scaling,
    F: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_MASKED: tl.constexpr,
    THREADS: tl.constexpr, ONLY: tl.constexpr,
):  # fmt: skip
    """One program: dK and dV of BLOCK_N keys of one key head, or ONLY "dk" or "dv". dk: (B, T_k, parts H_kv, D)."""
    q, k, v = mask.aligned(q, F.ALIGN), mask.aligned(k, F.ALIGN), mask.aligned(v, F.ALIGN)
    do = mask.aligned(do, F.ALIGN)
    H_kv = H // group
    kv_head, pid_n = mask.schedule(tl.cdiv(max_k, BLOCK_N), n_heads, section, False)
    col_start = pid_n * BLOCK_N
    b = (kv_head // H_kv).to(tl.int64)
    h_kv = (kv_head % H_kv).to(tl.int64)
    bounds = mask.sequence(masks.bounds, b, T_q, T_k, shift, F.BOUNDS)
    if F.PACKED:  # noqa: SIM102
        if col_start >= bounds.last:
            return
    batch = b * 0 if F.PACKED else b
    near_n = tl.arange(0, BLOCK_N)
    cols = col_start + near_n
    in_k = cols < (bounds.last if F.PACKED else T_k)
    valid = mask.valid_keys(cols, bounds.first, bounds.last, masks.key_mask + b * T_k, F)
    k_row = (bounds.k_start + col_start).to(tl.int64)
    low += bounds.shift
    high += bounds.shift
    keys = Keys(
        mask.load_rows(k, batch, h_kv, k_row, valid, F.D, F.BLOCK_D),
        mask.load_rows(v, batch, h_kv, k_row, valid, F.DV, F.BLOCK_DV), cols, col_start, valid, bounds.q_len,
        bounds.shift, low, high, tl.load(masks.seed) if F.DROPOUT else 0, threshold, scaling,
    )  # fmt: skip

    start, unmasked_start, unmasked_end, n_unmasked, n_masked_left, n_masked = mask.query_tiles(
        bounds, col_start, low, high, BLOCK_M, BLOCK_N, BLOCK_MASKED, F
    )
    ACC: tl.constexpr = safe_lse_ptr.dtype.element_ty
    BLOCK_D: tl.constexpr = F.BLOCK_D
    BLOCK_DV: tl.constexpr = F.BLOCK_DV
    dk = 0.0 if ONLY == "dv" else tl.zeros([BLOCK_N, BLOCK_D], ACC)
    dv = 0.0 if ONLY == "dk" else tl.zeros([BLOCK_N, BLOCK_DV], ACC)
    q_batch = mask.of_head(q, batch, 0, bounds.q_start, F)
    do_batch = mask.of_head(do, batch, 0, bounds.q_start, F)
    mask_batch = mask.mask_of_head(masks.mask, batch, 0, bounds, F)
    bias_batch = mask.mask_of_head(masks.bias, batch, 0, bounds, F)
    first_row = batch * H * T_q
    if F.PACKED:
        first_row += bounds.q_start
    # One flat loop over (head of the group, tile of queries): a nested loop would hold more registers.
    for unmasked in tl.static_range(2):  # tiles that cross a bound first: the fewest registers
        n = n_unmasked if unmasked else n_masked
        for i in range(group * n):
            h = h_kv * group + i // n
            step = i % n
            if unmasked:
                at = unmasked_start + step * BLOCK_M
            else:
                at = mask.masked_tile(step, start, unmasked_end, n_masked_left, BLOCK_MASKED)
            queries = Queries(
                Matrix(q_batch.ptr + h * q.strides[1], q.strides), Matrix(do_batch.ptr + h * do.strides[1], do.strides),
                safe_lse_ptr + first_row + h * T_q, delta_ptr + first_row + h * T_q,
                Matrix(mask_batch.ptr + h * mask_batch.strides[1], mask_batch.strides),
                Matrix(bias_batch.ptr + h * bias_batch.strides[1], bias_batch.strides),
                tl.load(masks.slopes + b * H + h) * LOG2E if F.ALIBI else 0.0, (b * H + h).to(tl.int32),
            )  # fmt: skip
            dk, dv = _dkdv_tile(dk, dv, keys, queries, at, unmasked == 0,
                                BLOCK_M if unmasked else BLOCK_MASKED, BLOCK_N, F, THREADS, ONLY)  # fmt: skip
    out_row = (batch * T_k + k_row) * (H_kv * parts) + h_kv
    if ONLY != "dv":
        dk = tl.where(valid[:, None], dk * scaling.scale, 0.0)
        store_tile(dk_ptr + out_row * F.D, dk, near_n, H_kv * F.D * parts, tl.arange(0, F.BLOCK_D), in_k, F.D)
    if ONLY != "dk":
        dv = tl.where(valid[:, None], dv * scaling.keep_scale, 0.0)
        store_tile(dv_ptr + out_row * F.DV, dv, near_n, H_kv * F.DV * parts, tl.arange(0, F.BLOCK_DV), in_k, F.DV)
