"""Attention backward in two deterministic launches, without atomics (FlashAttention-2, arXiv:2307.08691, appendix B).

With P = 2^(s - lse), dP = dO V^T (times the kept dropout bits / (1 - p)) and delta = rowsum(dO * O) - dlse:
dS = P * (dP - delta) is the gradient of the scores before the softmax, which is the bias's; a soft cap multiplies it with 1 - tanh^2; then
dQ = scale dS K, dK = scale dS^T Q, dV = (dropped P)^T dO.

The first kernel owns a tile of queries, computes delta and dQ; the second owns a tile of keys, works on transposed scores (so that P^T and
dS^T are dot operands straight from registers) and sums over the query heads that share its key head. A row without a key has lse = -inf, read
as +inf: every P of it is 0. Padded keys need no mask in the second kernel: a key's gradient depends on no other key, so theirs are set to 0.
A third kernel, only where the bias wants a gradient, owns a tile of it and sums over what the bias broadcasts over.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tileformer.kernels.attention.mask import (
    LOG2E,
    bend,
    hide,
    in_sight,
    key_tiles,
    query_tiles,
    real_keys,
    schedule,
    sequence,
)  # fmt: skip
from tileformer.kernels.tile_ops import dropout_keep, load_tile, store_tile


@triton.jit
def _dq_tile(dq, q, do, lse, delta, rows, row_start, start, head, q_len, first, last,
             k_at, v_at, k_stride, v_stride, mask_ptr, mask_strides, bias_ptr, bias_strides, key_mask_ptr, slope, seed,
             shift, low, high, scale_log2, softcap, threshold, keep_scale, MASKED: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr,
             MASK: tl.constexpr, BIAS: tl.constexpr, KEY_MASK: tl.constexpr, ALIBI: tl.constexpr, SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr,
             D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_N: tl.constexpr,
             ACC: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Add one tile of keys to dq (without the scale)."""
    near = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV)
    cols = start + near
    real = cols < last
    if MASKED:
        real = real_keys(cols, first, last, key_mask_ptr, KEY_MASK)
    # [BLOCK_N, BLOCK_D]
    k = load_tile(k_at, near, k_stride, offs_d, real, D, BLOCK_D, MASKED)
    # [BLOCK_M, BLOCK_N]
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION, out_dtype=ACC) * scale_log2
    s, t = bend(s, rows[:, None], cols[None, :], shift, slope, softcap, SOFTCAP, ALIBI)
    seen = real[None, :]
    if MASKED:
        end = tl.where(rows < q_len, last, 0)
        seen = in_sight(rows[:, None], cols[None, :], seen, end[:, None], low, high, LOW, HIGH, KEY_MASK)
    s = hide(s, rows[:, None], cols[None, :], seen, mask_ptr, mask_strides, bias_ptr, bias_strides, row_start, start,
             MASK, BIAS, MASKED)  # fmt: skip
    p = tl.exp2(s - lse[:, None])
    # [BLOCK_N, BLOCK_DV]
    v = load_tile(v_at, near, v_stride, offs_dv, real, DV, BLOCK_DV, MASKED)
    # [BLOCK_M, BLOCK_N]
    dp = tl.dot(do, tl.trans(v), input_precision=PRECISION, out_dtype=ACC)
    if DROPOUT:
        dp = tl.where(dropout_keep(seed, head, rows, start, threshold, BLOCK_N, False), dp * keep_scale, 0.0)
    ds = p * (dp - delta[:, None])
    if SOFTCAP:
        ds *= 1 - t * t
    # [BLOCK_M, BLOCK_D]
    return tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION, out_dtype=ACC)


@triton.jit(
    do_not_specialize=["H", "group", "T_q", "T_k", "max_q", "shift", "low", "high", "section", "n_heads", "threshold"]
)
def _attention_bwd_dq_kernel(
    q_ptr, k_ptr, v_ptr, mask_ptr, bias_ptr, key_mask_ptr, bounds_ptr, slopes_ptr, seed_ptr,
    out_ptr, do_ptr, lse_ptr, dlse_ptr, dq_ptr, safe_lse_ptr, delta_ptr,
    q_strides, k_strides, v_strides, do_strides, mask_strides, bias_strides, H, group, T_q, T_k, max_q, shift, low, high, section, n_heads,
    scale, softcap, threshold, keep_scale, LOW: tl.constexpr, HIGH: tl.constexpr, MASK: tl.constexpr, BIAS: tl.constexpr,
    KEY_MASK: tl.constexpr, BOUNDS: tl.constexpr, PACKED: tl.constexpr, ALIBI: tl.constexpr, SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr,
    DLSE: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """One program: dQ and delta of BLOCK_M queries of one head. out is (B, T_q, H, DV), dq (B, T_q, H, D); lse is base 2, dlse its gradient."""
    scale_log2 = scale * LOG2E
    head, pid_m = schedule(tl.cdiv(max_q, BLOCK_M), n_heads, section, HIGH)
    b = (head // H).to(tl.int64)
    h = (head % H).to(tl.int64)
    q_start, q_len, k_start, shift, first, last, holes = sequence(bounds_ptr, b, T_q, T_k, shift, BOUNDS)
    row_start = pid_m * BLOCK_M
    if PACKED:  # noqa: SIM102
        if row_start >= q_len:
            return
    batch = b * 0 if PACKED else b
    near_m = tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV)
    rows = row_start + near_m
    in_q = rows < q_len
    in_out = in_q if PACKED else rows < T_q

    q_row = (q_start + row_start).to(tl.int64)
    k_ptr += batch * k_strides[0] + h // group * k_strides[1]
    v_ptr += batch * v_strides[0] + h // group * v_strides[1]
    mask_ptr += batch * mask_strides[0] + h * mask_strides[1]
    bias_ptr += batch * bias_strides[0] + h * bias_strides[1]
    if PACKED:
        k_ptr += k_start.to(tl.int64) * k_strides[2]
        v_ptr += k_start.to(tl.int64) * v_strides[2]
        mask_ptr += q_start.to(tl.int64) * mask_strides[2] + k_start.to(tl.int64) * mask_strides[3]
        bias_ptr += q_start.to(tl.int64) * bias_strides[2] + k_start.to(tl.int64) * bias_strides[3]
    key_mask_ptr += b * T_k
    slope = tl.load(slopes_ptr + head) * LOG2E if ALIBI else 0.0
    seed = tl.load(seed_ptr) if DROPOUT else 0
    # [BLOCK_M, BLOCK_D]
    q = load_tile(
        q_ptr + batch * q_strides[0] + h * q_strides[1] + q_row * q_strides[2],
        near_m,
        q_strides[2],
        offs_d,
        in_q,
        D,
        BLOCK_D,
        True,
    )
    # [BLOCK_M, BLOCK_DV]
    do_ptr += batch * do_strides[0] + h * do_strides[1] + q_row * do_strides[2]
    do = load_tile(do_ptr, near_m, do_strides[2], offs_dv, in_q, DV, BLOCK_DV, True)
    # [BLOCK_M, BLOCK_DV]
    out_row = batch * T_q + q_row
    out = load_tile(out_ptr + out_row * (H * DV) + h * DV, near_m, H * DV, offs_dv, in_q, DV, BLOCK_DV, True)
    # [BLOCK_M]
    at_row = (batch * H + h) * T_q + q_row + near_m
    lse = tl.load(lse_ptr + at_row, mask=in_q, other=float("inf"))
    lse = tl.where(lse == float("-inf"), float("inf"), lse)
    delta = tl.sum(out.to(ACC) * do.to(ACC), 1)
    if DLSE:
        delta -= tl.load(dlse_ptr + at_row, mask=in_q, other=0.0) * LOG2E  # the gradient of a base-2 lse
    tl.store(safe_lse_ptr + at_row, lse, mask=in_out)
    tl.store(delta_ptr + at_row, delta, mask=in_out)

    low += shift
    high += shift
    if BOUNDS:
        last = tl.where(row_start < q_len, last, first)
    start, clean, clean_end, n_left, n_right = key_tiles(
        q_len, first, last, holes, row_start, low, high, BLOCK_M, BLOCK_N, EDGE, LOW, HIGH, MASK or BIAS
    )
    dq = tl.zeros([BLOCK_M, BLOCK_D], ACC)
    k_at = k_ptr + clean.to(tl.int64) * k_strides[2]
    v_at = v_ptr + clean.to(tl.int64) * v_strides[2]
    for i in range((clean_end - clean) // BLOCK_N):
        at = clean + i * BLOCK_N
        dq = _dq_tile(
            dq, q, do, lse, delta, rows, row_start, at, head, q_len, first, last,
            k_at, v_at, k_strides[2], v_strides[2], mask_ptr, mask_strides, bias_ptr, bias_strides, key_mask_ptr, slope, seed,
            shift, low, high, scale_log2, softcap, threshold, keep_scale, False, LOW, HIGH,
            MASK, BIAS, KEY_MASK, ALIBI, SOFTCAP, DROPOUT, D, DV, BLOCK_D, BLOCK_DV, BLOCK_N, ACC, PRECISION,
        )  # fmt: skip
        k_at += BLOCK_N * k_strides[2]
        v_at += BLOCK_N * v_strides[2]
    for i in range(n_left + n_right):
        at = tl.where(i < n_left, start + i * EDGE, clean_end + (i - n_left) * EDGE)
        dq = _dq_tile(
            dq, q, do, lse, delta, rows, row_start, at, head, q_len, first, last,
            k_ptr + at.to(tl.int64) * k_strides[2], v_ptr + at.to(tl.int64) * v_strides[2], k_strides[2], v_strides[2],
            mask_ptr, mask_strides, bias_ptr, bias_strides, key_mask_ptr, slope, seed,
            shift, low, high, scale_log2, softcap, threshold, keep_scale, True, LOW, HIGH,
            MASK, BIAS, KEY_MASK, ALIBI, SOFTCAP, DROPOUT, D, DV, BLOCK_D, BLOCK_DV, EDGE, ACC, PRECISION,
        )  # fmt: skip
    store_tile(dq_ptr + out_row * (H * D) + h * D, dq * scale, near_m, H * D, offs_d, in_out, D)


@triton.jit
def _dkdv_tile(dk, dv, k, v, cols, col_start, real, start, head, q_len,
               q_ptr, do_ptr, q_stride, do_stride, safe_lse_ptr, delta_ptr, mask_ptr, mask_strides, bias_ptr, bias_strides, slope, seed,
               shift, low, high, scale_log2, softcap, threshold, keep_scale, MASKED: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr,
               MASK: tl.constexpr, BIAS: tl.constexpr, ALIBI: tl.constexpr, SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr,
               D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
               ACC: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Add one tile of queries to dk (without the scale) and dv (without 1 / (1 - p))."""
    near = tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV)
    rows = start + near
    in_q = rows < q_len
    # [BLOCK_M, BLOCK_D]
    q = load_tile(q_ptr + start.to(tl.int64) * q_stride, near, q_stride, offs_d, in_q, D, BLOCK_D, MASKED)
    # [BLOCK_M]
    near_row = (
        tl.minimum(rows, q_len - 1) if MASKED else rows
    )  # `hide` sees to rows outside; a mask here costs 50 registers
    lse = tl.load(safe_lse_ptr + near_row)
    delta = tl.load(delta_ptr + near_row)
    # [BLOCK_N, BLOCK_M]
    s = tl.dot(k, tl.trans(q), input_precision=PRECISION, out_dtype=ACC) * scale_log2
    s, t = bend(s, rows[None, :], cols[:, None], shift, slope, softcap, SOFTCAP, ALIBI)
    seen = in_q[None, :]  # keys that are not real may see and be seen: what they get is not kept
    if MASKED:
        if HIGH:
            seen = cols[:, None] <= tl.where(in_q, rows + high, -1)[None, :]
        if LOW:
            seen = seen & (cols[:, None] >= (rows + low)[None, :])
        if MASK or BIAS:  # which have nothing for them
            seen = seen & real[:, None]
    s = hide(s, rows[None, :], cols[:, None], seen, mask_ptr, mask_strides, bias_ptr, bias_strides, start, col_start,
             MASK, BIAS, MASKED)  # fmt: skip
    p = tl.exp2(s - lse[None, :])
    # [BLOCK_M, BLOCK_DV]
    do = load_tile(do_ptr + start.to(tl.int64) * do_stride, near, do_stride, offs_dv, in_q, DV, BLOCK_DV, MASKED)
    # [BLOCK_N, BLOCK_M]
    dp = tl.dot(v, tl.trans(do), input_precision=PRECISION, out_dtype=ACC)
    kept = p
    if DROPOUT:
        keep = dropout_keep(seed, head, rows, col_start, threshold, BLOCK_N, True)
        kept = tl.where(keep, p, 0.0)
        dp = tl.where(keep, dp * keep_scale, 0.0)
    # [BLOCK_N, BLOCK_DV]
    dv = tl.dot(kept.to(do.dtype), do, dv, input_precision=PRECISION, out_dtype=ACC)
    ds = p * (dp - delta[None, :])
    if SOFTCAP:
        ds *= 1 - t * t
    # [BLOCK_N, BLOCK_D]
    dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION, out_dtype=ACC)
    return dk, dv


@triton.jit(
    do_not_specialize=["H", "group", "T_q", "T_k", "max_k", "shift", "low", "high", "section", "n_heads", "threshold"]
)
def _attention_bwd_dkdv_kernel(
    q_ptr, k_ptr, v_ptr, mask_ptr, bias_ptr, key_mask_ptr, bounds_ptr, slopes_ptr, seed_ptr,
    do_ptr, safe_lse_ptr, delta_ptr, dk_ptr, dv_ptr,
    q_strides, k_strides, v_strides, do_strides, mask_strides, bias_strides, H, group, T_q, T_k, max_k, shift, low, high, section, n_heads,
    scale, softcap, threshold, keep_scale, LOW: tl.constexpr, HIGH: tl.constexpr, MASK: tl.constexpr, BIAS: tl.constexpr,
    KEY_MASK: tl.constexpr, BOUNDS: tl.constexpr, PACKED: tl.constexpr, ALIBI: tl.constexpr, SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """One program: dK and dV of BLOCK_N keys of one key head, over the query heads that share it. dk: (B, T_k, H_kv, D), dv: DV."""
    scale_log2 = scale * LOG2E
    H_kv = H // group
    kv_head, pid_n = schedule(tl.cdiv(max_k, BLOCK_N), n_heads, section, False)
    col_start = pid_n * BLOCK_N
    b = (kv_head // H_kv).to(tl.int64)
    h_kv = (kv_head % H_kv).to(tl.int64)
    q_start, q_len, k_start, shift, first, last, _ = sequence(bounds_ptr, b, T_q, T_k, shift, BOUNDS)
    if PACKED:  # noqa: SIM102
        if col_start >= last:
            return
    batch = b * 0 if PACKED else b
    near_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV)
    cols = col_start + near_n
    in_k = cols < (last if PACKED else T_k)
    real = real_keys(cols, first, last, key_mask_ptr + b * T_k, KEY_MASK)
    seed = tl.load(seed_ptr) if DROPOUT else 0
    k_row = (k_start + col_start).to(tl.int64)
    # [BLOCK_N, BLOCK_D]
    k = load_tile(
        k_ptr + batch * k_strides[0] + h_kv * k_strides[1] + k_row * k_strides[2],
        near_n,
        k_strides[2],
        offs_d,
        real,
        D,
        BLOCK_D,
        True,
    )
    # [BLOCK_N, BLOCK_DV]
    v = load_tile(
        v_ptr + batch * v_strides[0] + h_kv * v_strides[1] + k_row * v_strides[2],
        near_n,
        v_strides[2],
        offs_dv,
        real,
        DV,
        BLOCK_DV,
        True,
    )

    low += shift
    high += shift
    start, clean, clean_end, n_clean, n_left, n_masked = query_tiles(
        q_len, first, last, col_start, low, high, BLOCK_M, BLOCK_N, EDGE, LOW, HIGH, BOUNDS, MASK or BIAS
    )
    dk = tl.zeros([BLOCK_N, BLOCK_D], ACC)
    dv = tl.zeros([BLOCK_N, BLOCK_DV], ACC)
    q_ptr += batch * q_strides[0]
    do_ptr += batch * do_strides[0]
    mask_ptr += batch * mask_strides[0]
    bias_ptr += batch * bias_strides[0]
    safe_lse_ptr += batch * H * T_q
    delta_ptr += batch * H * T_q
    if PACKED:
        q_at = q_start.to(tl.int64)
        k_at = k_start.to(tl.int64)
        q_ptr += q_at * q_strides[2]
        do_ptr += q_at * do_strides[2]
        mask_ptr += q_at * mask_strides[2] + k_at * mask_strides[3]
        bias_ptr += q_at * bias_strides[2] + k_at * bias_strides[3]
        safe_lse_ptr += q_at
        delta_ptr += q_at
    # One flat loop over (head of the group, tile of queries): a nested loop would hold more registers.
    for whole in tl.static_range(2):  # tiles that cross a bound first: the fewest registers
        n = n_clean if whole else n_masked
        for i in range(group * n):
            h = h_kv * group + i // n
            step = i % n
            if whole:
                at = clean + step * BLOCK_M
            else:
                at = tl.where(step < n_left, start + step * EDGE, clean_end + (step - n_left) * EDGE)
            slope = tl.load(slopes_ptr + b * H + h) * LOG2E if ALIBI else 0.0
            dk, dv = _dkdv_tile(
                dk, dv, k, v, cols, col_start, real, at, (b * H + h).to(tl.int32), q_len,
                q_ptr + h * q_strides[1], do_ptr + h * do_strides[1], q_strides[2], do_strides[2],
                safe_lse_ptr + h * T_q, delta_ptr + h * T_q, mask_ptr + h * mask_strides[1], mask_strides,
                bias_ptr + h * bias_strides[1], bias_strides, slope, seed, shift, low, high, scale_log2, softcap, threshold, keep_scale,
                whole == 0, LOW, HIGH, MASK, BIAS, ALIBI, SOFTCAP, DROPOUT, D, DV, BLOCK_D, BLOCK_DV, BLOCK_M if whole else EDGE,
                BLOCK_N, ACC, PRECISION,
            )  # fmt: skip
    out_row = (batch * T_k + k_row) * H_kv + h_kv
    store_tile(dk_ptr + out_row * D, tl.where(real[:, None], dk * scale, 0.0), near_n, H_kv * D, offs_d, in_k, D)
    store_tile(
        dv_ptr + out_row * DV, tl.where(real[:, None], dv * keep_scale, 0.0), near_n, H_kv * DV, offs_dv, in_k, DV
    )


@triton.jit(do_not_specialize=["B", "H", "group", "T_q", "T_k", "shift", "low", "high", "threshold"])
def _attention_bwd_bias_kernel(
    q_ptr, k_ptr, v_ptr, mask_ptr, bias_ptr, key_mask_ptr, bounds_ptr, slopes_ptr, seed_ptr, do_ptr, safe_lse_ptr, delta_ptr, dbias_ptr,
    q_strides, k_strides, v_strides, do_strides, mask_strides, bias_strides, B, H, group, T_q, T_k, shift, low, high,
    scale, softcap, threshold, keep_scale, B_ONE: tl.constexpr, H_ONE: tl.constexpr, Q_ONE: tl.constexpr, K_ONE: tl.constexpr,
    LOW: tl.constexpr, HIGH: tl.constexpr, MASK: tl.constexpr, KEY_MASK: tl.constexpr, BOUNDS: tl.constexpr, ALIBI: tl.constexpr,
    SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program: a tile of dbias, contiguous (B or 1, H or 1, T_q or 1, T_k or 1): the sum of dS over every axis that is one long."""
    tiles_q = tl.cdiv(T_q, BLOCK_M)
    tiles_k = tl.cdiv(T_k, BLOCK_N)
    own_q = 1 if Q_ONE else tiles_q
    own_k = 1 if K_ONE else tiles_k
    own_h = 1 if H_ONE else H
    pid = tl.program_id(0)
    own_tile_k = pid % own_k
    own_tile_q = pid // own_k % own_q
    own_head = pid // own_k // own_q % own_h
    own_batch = pid // own_k // own_q // own_h
    near_m = tl.arange(0, BLOCK_M)
    near_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV)
    seed = tl.load(seed_ptr) if DROPOUT else 0
    loops_k = tiles_k if K_ONE else 1
    loops_q = tiles_q if Q_ONE else 1
    loops_h = H if H_ONE else 1
    loops_b = B if B_ONE else 1
    total = tl.zeros([BLOCK_M, BLOCK_N], ACC)
    for i in range(loops_b * loops_h * loops_q * loops_k):
        col_start = (own_tile_k + i % loops_k) * BLOCK_N
        row_start = (own_tile_q + i // loops_k % loops_q) * BLOCK_M
        h = (own_head + i // loops_k // loops_q % loops_h).to(tl.int64)
        b = (own_batch + i // loops_k // loops_q // loops_h).to(tl.int64)
        head = b * H + h
        _, q_len, _, shift, first, last, _ = sequence(bounds_ptr, b, T_q, T_k, shift, BOUNDS)
        rows = row_start + near_m
        cols = col_start + near_n
        in_q = rows < q_len
        real = real_keys(cols, first, last, key_mask_ptr + b * T_k, KEY_MASK)
        row64 = row_start.to(tl.int64)
        col64 = col_start.to(tl.int64)
        slope = tl.load(slopes_ptr + head) * LOG2E if ALIBI else 0.0
        # [BLOCK_M, BLOCK_D], [BLOCK_N, BLOCK_D]
        q = load_tile(
            q_ptr + b * q_strides[0] + h * q_strides[1] + row64 * q_strides[2],
            near_m,
            q_strides[2],
            offs_d,
            in_q,
            D,
            BLOCK_D,
            True,
        )
        k_at = k_ptr + b * k_strides[0] + h // group * k_strides[1] + col64 * k_strides[2]
        k = load_tile(k_at, near_n, k_strides[2], offs_d, real, D, BLOCK_D, True)
        # [BLOCK_M, BLOCK_DV], [BLOCK_N, BLOCK_DV]
        do = load_tile(
            do_ptr + b * do_strides[0] + h * do_strides[1] + row64 * do_strides[2],
            near_m,
            do_strides[2],
            offs_dv,
            in_q,
            DV,
            BLOCK_DV,
            True,
        )
        v_at = v_ptr + b * v_strides[0] + h // group * v_strides[1] + col64 * v_strides[2]
        v = load_tile(v_at, near_n, v_strides[2], offs_dv, real, DV, BLOCK_DV, True)
        lse = tl.load(safe_lse_ptr + head * T_q + rows, mask=in_q, other=float("inf"))
        delta = tl.load(delta_ptr + head * T_q + rows, mask=in_q, other=0.0)
        # [BLOCK_M, BLOCK_N]
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION, out_dtype=ACC) * (scale * LOG2E)
        s, _ = bend(s, rows[:, None], cols[None, :], shift, slope, softcap, SOFTCAP, ALIBI)
        end = tl.where(in_q, last, 0)
        seen = in_sight(rows[:, None], cols[None, :], real[None, :], end[:, None], low + shift, high + shift,
                        LOW, HIGH, KEY_MASK)  # fmt: skip
        s = hide(s, rows[:, None], cols[None, :], seen, mask_ptr + b * mask_strides[0] + h * mask_strides[1], mask_strides,
                 bias_ptr + b * bias_strides[0] + h * bias_strides[1], bias_strides, row_start, col_start, MASK, True, True)  # fmt: skip
        p = tl.exp2(s - lse[:, None])
        dp = tl.dot(do, tl.trans(v), input_precision=PRECISION, out_dtype=ACC)
        if DROPOUT:
            dp = tl.where(
                dropout_keep(seed, head.to(tl.int32), rows, col_start, threshold, BLOCK_N, False), dp * keep_scale, 0.0
            )
        total += p * (dp - delta[:, None])
    size_q = 1 if Q_ONE else T_q
    size_k = 1 if K_ONE else T_k
    dbias_ptr += (own_batch * own_h + own_head).to(tl.int64) * size_q * size_k
    rows = own_tile_q * BLOCK_M + near_m
    cols = own_tile_k * BLOCK_N + near_n
    ty = dbias_ptr.dtype.element_ty
    if Q_ONE and K_ONE:
        tl.store(dbias_ptr, tl.sum(tl.sum(total, 1), 0).to(ty))
    elif Q_ONE:
        tl.store(dbias_ptr + cols, tl.sum(total, 0).to(ty), mask=cols < T_k)
    elif K_ONE:
        tl.store(dbias_ptr + rows, tl.sum(total, 1).to(ty), mask=rows < T_q)
    else:
        at = rows[:, None].to(tl.int64) * T_k + cols[None, :]
        tl.store(dbias_ptr + at, total.to(ty), mask=(rows < T_q)[:, None] & (cols < T_k)[None, :])
