"""Attention backward in two deterministic launches, without atomics (FlashAttention-2, arXiv:2307.08691, appendix B).

With P = 2^(s c - lse), dP = dO V^T (times the kept dropout bits / (1 - p)) and delta = rowsum(dO * O) - dlse:
dS = P * (dP - delta), dQ = scale dS K, dK = scale dS^T Q, dV = (dropped P)^T dO.

The first kernel owns a tile of queries, computes delta and dQ; the second owns a tile of keys, works on transposed scores (so that P^T and
dS^T are dot operands straight from registers) and sums over the query heads that share its key head. A row without a key has lse = -inf, read
as +inf: every P of it is 0. Padded keys need no mask in the second kernel: a key's gradient depends on no other key, so theirs are set to 0.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tileformer.kernels.attention.forward import hide, key_range, key_tiles, real_keys
from tileformer.kernels.steps import dropout_keep, load_tile, store_tile


@triton.jit
def _dq_tile(dq, q, do, lse, delta, rows, row_start, start, head, first, last,
             k_ptr, v_ptr, k_stride, v_stride, mask_ptr, mask_strides, key_mask_ptr, seed,
             T_q, causal_shift, scale_log2, threshold, keep_scale, MASKED: tl.constexpr, CAUSAL: tl.constexpr, MASK: tl.constexpr,
             KEY_MASK: tl.constexpr, DROPOUT: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
             ACC: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Add one tile of keys to dq (without the scale)."""
    near = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    cols = start + near
    real = cols < last
    if MASKED:
        real = real_keys(cols, first, last, key_mask_ptr, KEY_MASK)
    # [BLOCK_N, BLOCK_D]
    k = load_tile(k_ptr + start.to(tl.int64) * k_stride, near, k_stride, offs_d, real, D, BLOCK_D, MASKED)
    # [BLOCK_M, BLOCK_N]
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION, out_dtype=ACC) * scale_log2
    if MASKED:
        seen = real[None, :] & (rows < T_q)[:, None]
        s = hide(
            s, rows[:, None], cols[None, :], seen, mask_ptr, mask_strides, row_start, start, causal_shift, CAUSAL, MASK
        )
    p = tl.exp2(s - lse[:, None])
    # [BLOCK_N, BLOCK_D]
    v = load_tile(v_ptr + start.to(tl.int64) * v_stride, near, v_stride, offs_d, real, D, BLOCK_D, MASKED)
    # [BLOCK_M, BLOCK_N]
    dp = tl.dot(do, tl.trans(v), input_precision=PRECISION, out_dtype=ACC)
    if DROPOUT:
        dp = tl.where(dropout_keep(seed, head, rows, start, threshold, BLOCK_N, False), dp * keep_scale, 0.0)
    ds = p * (dp - delta[:, None])
    # [BLOCK_M, BLOCK_D]
    return tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION, out_dtype=ACC)


@triton.jit(do_not_specialize=["H", "group", "T_q", "T_k", "causal_shift", "threshold"])
def _attention_bwd_dq_kernel(
    q_ptr, k_ptr, v_ptr, mask_ptr, key_mask_ptr, range_ptr, seed_ptr, out_ptr, do_ptr, lse_ptr, dlse_ptr, dq_ptr, safe_lse_ptr, delta_ptr,
    q_strides, k_strides, v_strides, do_strides, mask_strides, H, group, T_q, T_k, causal_shift, scale, threshold, keep_scale,
    CAUSAL: tl.constexpr, MASK: tl.constexpr, KEY_MASK: tl.constexpr, DROPOUT: tl.constexpr, DLSE: tl.constexpr, D: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    EDGE: tl.constexpr,
):  # fmt: skip
    """One program: dQ and delta of BLOCK_M queries of one head. out and dq are (B, T_q, H, D); lse is base 2, dlse its gradient."""
    scale_log2 = scale * 1.4426950408889634
    n_m = tl.cdiv(T_q, BLOCK_M)
    head = tl.program_id(0) // n_m
    pid_m = tl.program_id(0) % n_m
    if CAUSAL:
        pid_m = n_m - 1 - pid_m
    b = (head // H).to(tl.int64)
    h = (head % H).to(tl.int64)
    row_start = pid_m * BLOCK_M
    near_m = tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    rows = row_start + near_m
    in_q = rows < T_q

    k_ptr += b * k_strides[0] + h // group * k_strides[1]
    v_ptr += b * v_strides[0] + h // group * v_strides[1]
    mask_ptr += b * mask_strides[0] + h * mask_strides[1]
    key_mask_ptr += b * T_k
    seed = tl.load(seed_ptr) if DROPOUT else 0
    row_start64 = row_start.to(tl.int64)
    # [BLOCK_M, BLOCK_D]
    q_ptr += b * q_strides[0] + h * q_strides[1] + row_start64 * q_strides[2]
    q = load_tile(q_ptr, near_m, q_strides[2], offs_d, in_q, D, BLOCK_D, True)
    # [BLOCK_M, BLOCK_D]
    do_ptr += b * do_strides[0] + h * do_strides[1] + row_start64 * do_strides[2]
    do = load_tile(do_ptr, near_m, do_strides[2], offs_d, in_q, D, BLOCK_D, True)
    # [BLOCK_M, BLOCK_D]
    at_out = (b * T_q + row_start) * (H * D) + h * D
    out = load_tile(out_ptr + at_out, near_m, H * D, offs_d, in_q, D, BLOCK_D, True)
    # [BLOCK_M]
    at_row = head.to(tl.int64) * T_q + rows
    lse = tl.load(lse_ptr + at_row, mask=in_q, other=float("inf"))
    lse = tl.where(lse == float("-inf"), float("inf"), lse)
    delta = tl.sum(out.to(ACC) * do.to(ACC), 1)
    if DLSE:
        delta -= tl.load(dlse_ptr + at_row, mask=in_q, other=0.0) * 1.4426950408889634  # the gradient of a base-2 lse
    tl.store(safe_lse_ptr + at_row, lse, mask=in_q)
    tl.store(delta_ptr + at_row, delta, mask=in_q)

    first, last, holes = key_range(range_ptr, b, T_k, KEY_MASK)
    start, clean, clean_end, n_left, n_right = key_tiles(
        first, last, holes, row_start, causal_shift, BLOCK_M, BLOCK_N, EDGE, CAUSAL, MASK > 0
    )
    dq = tl.zeros([BLOCK_M, BLOCK_D], ACC)
    if MASK == 0:
        for i in range((clean_end - clean) // BLOCK_N):
            at = clean + i * BLOCK_N
            dq = _dq_tile(
                dq, q, do, lse, delta, rows, row_start, at, head, first, last,
                k_ptr, v_ptr, k_strides[2], v_strides[2], mask_ptr, mask_strides, key_mask_ptr, seed,
                T_q, causal_shift, scale_log2, threshold, keep_scale, False,
                CAUSAL, MASK, KEY_MASK, DROPOUT, D, BLOCK_D, BLOCK_N, ACC, PRECISION,
            )  # fmt: skip
    for i in range(n_left + n_right):
        at = tl.where(i < n_left, start + i * EDGE, clean_end + (i - n_left) * EDGE)
        dq = _dq_tile(
            dq, q, do, lse, delta, rows, row_start, at, head, first, last,
            k_ptr, v_ptr, k_strides[2], v_strides[2], mask_ptr, mask_strides, key_mask_ptr, seed,
            T_q, causal_shift, scale_log2, threshold, keep_scale, True,
            CAUSAL, MASK, KEY_MASK, DROPOUT, D, BLOCK_D, EDGE, ACC, PRECISION,
        )  # fmt: skip
    store_tile(dq_ptr + at_out, dq * scale, near_m, H * D, offs_d, in_q, D)


@triton.jit
def _dkdv_tile(dk, dv, k, v, cols, col_start, real, start, head,
               q_ptr, do_ptr, q_stride, do_stride, safe_lse_ptr, delta_ptr, mask_ptr, mask_strides, seed,
               T_q, causal_shift, scale_log2, threshold, keep_scale, MASKED: tl.constexpr, CAUSAL: tl.constexpr, MASK: tl.constexpr,
               DROPOUT: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
               PRECISION: tl.constexpr, ACC: tl.constexpr):  # fmt: skip
    """Add one tile of queries to dk (without the scale) and dv (without 1 / (1 - p))."""
    near = tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    rows = start + near
    in_q = rows < T_q
    # [BLOCK_M, BLOCK_D]
    q = load_tile(q_ptr + start.to(tl.int64) * q_stride, near, q_stride, offs_d, in_q, D, BLOCK_D, MASKED)
    # [BLOCK_M]
    near_row = (
        tl.minimum(rows, T_q - 1) if MASKED else rows
    )  # `hide` sees to rows outside; a mask here costs 50 registers
    lse = tl.load(safe_lse_ptr + near_row)
    delta = tl.load(delta_ptr + near_row)
    # [BLOCK_N, BLOCK_M]
    s = tl.dot(k, tl.trans(q), input_precision=PRECISION, out_dtype=ACC) * scale_log2
    if MASKED:
        seen = real[:, None] & in_q[None, :]
        s = hide(
            s, rows[None, :], cols[:, None], seen, mask_ptr, mask_strides, start, col_start, causal_shift, CAUSAL, MASK
        )
    p = tl.exp2(s - lse[None, :])
    # [BLOCK_M, BLOCK_D]
    do = load_tile(do_ptr + start.to(tl.int64) * do_stride, near, do_stride, offs_d, in_q, D, BLOCK_D, MASKED)
    # [BLOCK_N, BLOCK_M]
    dp = tl.dot(v, tl.trans(do), input_precision=PRECISION, out_dtype=ACC)
    kept = p
    if DROPOUT:
        keep = dropout_keep(seed, head, rows, col_start, threshold, BLOCK_N, True)
        kept = tl.where(keep, p, 0.0)
        dp = tl.where(keep, dp * keep_scale, 0.0)
    # [BLOCK_N, BLOCK_D]
    dv = tl.dot(kept.to(do.dtype), do, dv, input_precision=PRECISION, out_dtype=ACC)
    ds = p * (dp - delta[None, :])
    # [BLOCK_N, BLOCK_D]
    dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION, out_dtype=ACC)
    return dk, dv


@triton.jit(do_not_specialize=["H", "group", "T_q", "T_k", "causal_shift", "threshold"])
def _attention_bwd_dkdv_kernel(
    q_ptr, k_ptr, v_ptr, mask_ptr, key_mask_ptr, range_ptr, seed_ptr, do_ptr, safe_lse_ptr, delta_ptr, dk_ptr, dv_ptr,
    q_strides, k_strides, v_strides, do_strides, mask_strides, H, group, T_q, T_k, causal_shift, scale, threshold, keep_scale,
    CAUSAL: tl.constexpr, MASK: tl.constexpr, KEY_MASK: tl.constexpr, DROPOUT: tl.constexpr, D: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    EDGE: tl.constexpr,
):  # fmt: skip
    """One program: dK and dV of BLOCK_N keys of one key head, over the query heads that share it. dk, dv: (B, T_k, H_kv, D)."""
    scale_log2 = scale * 1.4426950408889634
    H_kv = H // group
    n_n = tl.cdiv(T_k, BLOCK_N)
    kv_head = tl.program_id(0) // n_n
    col_start = tl.program_id(0) % n_n * BLOCK_N
    b = (kv_head // H_kv).to(tl.int64)
    h_kv = (kv_head % H_kv).to(tl.int64)
    near_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    cols = col_start + near_n
    in_k = cols < T_k
    first, last, _ = key_range(range_ptr, b, T_k, KEY_MASK)
    real = real_keys(cols, first, last, key_mask_ptr + b * T_k, KEY_MASK)
    seed = tl.load(seed_ptr) if DROPOUT else 0
    col_start64 = col_start.to(tl.int64)
    # [BLOCK_N, BLOCK_D]
    k_ptr += b * k_strides[0] + h_kv * k_strides[1] + col_start64 * k_strides[2]
    k = load_tile(k_ptr, near_n, k_strides[2], offs_d, real, D, BLOCK_D, True)
    # [BLOCK_N, BLOCK_D]
    v_ptr += b * v_strides[0] + h_kv * v_strides[1] + col_start64 * v_strides[2]
    v = load_tile(v_ptr, near_n, v_strides[2], offs_d, real, D, BLOCK_D, True)

    # Query tiles: masked ones, EDGE high, are n_left from `start` (the diagonal) and the rest from clean_end (the tail).
    start = 0
    clean = 0
    if CAUSAL:
        start = tl.maximum(col_start - causal_shift, 0) // EDGE * EDGE
        clean = tl.cdiv(tl.maximum(col_start + BLOCK_N - 1 - causal_shift, 0), EDGE) * EDGE
    end = T_q
    if KEY_MASK:
        end = tl.where((col_start < last) & (col_start + BLOCK_N > first), T_q, 0)
    clean_end = clean + tl.maximum(end - clean, 0) // BLOCK_M * BLOCK_M
    if (MASK > 0) | (clean >= clean_end):
        clean = start
        clean_end = start
    n_clean = (clean_end - clean) // BLOCK_M
    n_left = (clean - start) // EDGE
    n_masked = n_left + tl.cdiv(tl.maximum(end - clean_end, 0), EDGE)

    dk = tl.zeros([BLOCK_N, BLOCK_D], ACC)
    dv = tl.zeros([BLOCK_N, BLOCK_D], ACC)
    q_ptr += b * q_strides[0]
    do_ptr += b * do_strides[0]
    mask_ptr += b * mask_strides[0]
    safe_lse_ptr += b * H * T_q
    delta_ptr += b * H * T_q
    # One flat loop over (head of the group, tile of queries): a nested loop would hold more registers.
    if MASK == 0:
        for i in range(group * n_clean):
            h = h_kv * group + i // n_clean
            step = i % n_clean
            at = clean + step * BLOCK_M
            dk, dv = _dkdv_tile(
                dk, dv, k, v, cols, col_start, real, at, (b * H + h).to(tl.int32),
                q_ptr + h * q_strides[1], do_ptr + h * do_strides[1], q_strides[2], do_strides[2],
                safe_lse_ptr + h * T_q, delta_ptr + h * T_q, mask_ptr + h * mask_strides[1], mask_strides, seed,
                T_q, causal_shift, scale_log2, threshold, keep_scale, False, CAUSAL, MASK, DROPOUT, D, BLOCK_D, BLOCK_M, BLOCK_N, PRECISION, ACC,
            )  # fmt: skip
    for i in range(group * n_masked):
        h = h_kv * group + i // n_masked
        step = i % n_masked
        at = tl.where(step < n_left, start + step * EDGE, clean_end + (step - n_left) * EDGE)
        dk, dv = _dkdv_tile(
            dk, dv, k, v, cols, col_start, real, at, (b * H + h).to(tl.int32),
            q_ptr + h * q_strides[1], do_ptr + h * do_strides[1], q_strides[2], do_strides[2],
            safe_lse_ptr + h * T_q, delta_ptr + h * T_q, mask_ptr + h * mask_strides[1], mask_strides, seed,
            T_q, causal_shift, scale_log2, threshold, keep_scale, True, CAUSAL, MASK, DROPOUT, D, BLOCK_D, EDGE, BLOCK_N, PRECISION, ACC,
        )  # fmt: skip
    at_out = (b * T_k + col_start) * (H_kv * D) + h_kv * D
    store_tile(dk_ptr + at_out, tl.where(real[:, None], dk * scale, 0.0), near_n, H_kv * D, offs_d, in_k, D)
    store_tile(dv_ptr + at_out, tl.where(real[:, None], dv * keep_scale, 0.0), near_n, H_kv * D, offs_d, in_k, D)
