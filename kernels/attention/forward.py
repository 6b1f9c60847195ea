"""Attention forward: one pass over the keys with a running maximum and sum (FlashAttention-2, arXiv:2307.08691).

With c = scale * log2(e), for a tile of queries and every tile of keys the kernel keeps, per row, m = max(s c), l = sum 2^(s c - m) and
acc = sum 2^(s c - m) v. At the end out = acc / l and the base-2 log-sum-exp is m + log2(l).

Keys that no row of the tile may see are never loaded: padding and `causal` bound the range, and masks are applied only in tiles that
cross a bound (or in all of them when there is a 2-D mask or a hole in the padding). Masked tiles are at most EDGE wide: what masking holds in
registers then fits beside an accumulator of 128 x 128, and less is computed that no row may see.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tileformer.kernels.steps import dropout_keep, load_tile, store_tile


@triton.jit(do_not_specialize=["T_k"])
def _key_range_kernel(key_mask_ptr, range_ptr, T_k, BLOCK: tl.constexpr):
    """Per batch: first real key, one past the last, and whether a padded key lies between (int32)."""
    b = tl.program_id(0).to(tl.int64)
    first = T_k
    last = 0
    count = 0
    for start in range(0, T_k, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        # [BLOCK]
        real = tl.load(key_mask_ptr + b * T_k + cols, mask=cols < T_k, other=0) != 0
        first = tl.minimum(first, tl.min(tl.where(real, cols, T_k), 0))
        last = tl.maximum(last, tl.max(tl.where(real, cols + 1, 0), 0))
        count += tl.sum(real.to(tl.int32), 0)
    tl.store(range_ptr + b * 3, first)
    tl.store(range_ptr + b * 3 + 1, last)
    tl.store(range_ptr + b * 3 + 2, (count < last - first).to(tl.int32))


@triton.jit
def key_range(range_ptr, b, T_k, KEY_MASK: tl.constexpr):
    """(first real key, one past the last, 1 if keys between are padded too) of batch b."""
    if KEY_MASK:
        return tl.load(range_ptr + b * 3), tl.load(range_ptr + b * 3 + 1), tl.load(range_ptr + b * 3 + 2)
    else:
        return 0, T_k, 0


@triton.jit
def key_tiles(first, last, holes, row_start, causal_shift, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, EDGE: tl.constexpr,
              CAUSAL: tl.constexpr, ALL_MASKED: tl.constexpr):  # fmt: skip
    """The key tiles of a query tile: unmasked, BLOCK_N wide: [clean, clean_end); masked, EDGE wide: n_left from `start`, n_right from clean_end."""
    if CAUSAL:
        last = tl.minimum(last, tl.maximum(row_start + BLOCK_M + causal_shift, 0))
    start = first // EDGE * EDGE
    clean = start
    clean_end = start
    if not ALL_MASKED:
        full_end = last
        if CAUSAL:
            full_end = tl.minimum(last, row_start + causal_shift + 1)
        whole = tl.cdiv(first, EDGE) * EDGE
        whole_end = whole + tl.maximum(full_end - whole, 0) // BLOCK_N * BLOCK_N
        if (whole < whole_end) & (holes == 0):
            clean = whole
            clean_end = whole_end
    n_left = (clean - start) // EDGE
    n_right = tl.cdiv(tl.maximum(last - clean_end, 0), EDGE)
    return start, clean, clean_end, n_left, n_right


@triton.jit
def real_keys(cols, first, last, key_mask_ptr, KEY_MASK: tl.constexpr):
    """[BLOCK_N]: keys inside the range and not padded."""
    real = (cols >= first) & (cols < last)
    if KEY_MASK:
        real = real & (tl.load(key_mask_ptr + cols, mask=real, other=0) != 0)
    return real


@triton.jit
def hide(
    s,
    rows,
    cols,
    seen,
    mask_ptr,
    mask_strides,
    row_start,
    col_start,
    causal_shift,
    CAUSAL: tl.constexpr,
    MASK: tl.constexpr,
):
    """Base-2 scores with the additive mask applied and -inf where a key is hidden; `rows` and `cols` broadcast to s.

    `seen` holds the bounds and the padding. MASK: 0 none, 1 boolean (uint8), 2 additive.
    """
    if CAUSAL:
        seen = seen & (cols <= rows + causal_shift)
    if MASK > 0:
        at = mask_ptr + row_start.to(tl.int64) * mask_strides[2] + col_start.to(tl.int64) * mask_strides[3]
        offsets = (rows - row_start) * mask_strides[2] + (cols - col_start) * mask_strides[3]
        if MASK == 1:
            seen = seen & (tl.load(at + offsets, mask=seen, other=0) != 0)
        else:
            s += tl.load(at + offsets, mask=seen, other=0.0).to(s.dtype) * 1.4426950408889634
    return tl.where(seen, s, float("-inf"))


@triton.jit
def _fwd_tile(acc, m, l, q, rows, row_start, start, head, first, last,
              k_ptr, v_ptr, k_stride, v_stride, mask_ptr, mask_strides, key_mask_ptr, seed,
              T_q, causal_shift, scale_log2, threshold, MASKED: tl.constexpr, CAUSAL: tl.constexpr, MASK: tl.constexpr,
              KEY_MASK: tl.constexpr, DROPOUT: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
              ACC: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Fold one tile of keys into (acc, m, l)."""
    near = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    cols = start + near
    real = cols < last
    if MASKED:
        real = real_keys(cols, first, last, key_mask_ptr, KEY_MASK)
    # [BLOCK_N, BLOCK_D]
    k = load_tile(k_ptr + start.to(tl.int64) * k_stride, near, k_stride, offs_d, real, D, BLOCK_D, MASKED)
    # [BLOCK_M, BLOCK_N]
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION, out_dtype=ACC)
    if MASKED:
        seen = real[None, :] & (rows < T_q)[:, None]
        s = hide(
            s * scale_log2,
            rows[:, None],
            cols[None, :],
            seen,
            mask_ptr,
            mask_strides,
            row_start,
            start,
            causal_shift,
            CAUSAL,
            MASK,
        )
        m_new = tl.maximum(m, tl.max(s, 1))
        base = tl.where(m_new == float("-inf"), 0.0, m_new)  # a row that has seen no key yet: 2^(-inf - 0) = 0, not NaN
        p = tl.exp2(s - base[:, None])
        alpha = tl.exp2(m - base)
    else:
        m_new = tl.maximum(m, tl.max(s, 1) * scale_log2)
        p = tl.exp2(s * scale_log2 - m_new[:, None])
        alpha = tl.exp2(m - m_new)
    l = l * alpha + tl.sum(p, 1)
    if DROPOUT:
        p = tl.where(dropout_keep(seed, head, rows, start, threshold, BLOCK_N, False), p, 0.0)
    # [BLOCK_N, BLOCK_D]
    v = load_tile(v_ptr + start.to(tl.int64) * v_stride, near, v_stride, offs_d, real, D, BLOCK_D, MASKED)
    # [BLOCK_M, BLOCK_D]
    acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision=PRECISION, out_dtype=ACC)
    return acc, m_new, l


@triton.jit(do_not_specialize=["H", "group", "T_q", "T_k", "causal_shift", "threshold"])
def _attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, mask_ptr, key_mask_ptr, range_ptr, seed_ptr, out_ptr, lse_ptr,
    q_strides, k_strides, v_strides, mask_strides, H, group, T_q, T_k, causal_shift, scale, threshold, keep_scale,
    CAUSAL: tl.constexpr, MASK: tl.constexpr, KEY_MASK: tl.constexpr, DROPOUT: tl.constexpr, D: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    EDGE: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M queries of one head. out is (B, T_q, H, D), lse (B, H, T_q) base 2; mask strides are 0 where it broadcasts."""
    scale_log2 = scale * 1.4426950408889634
    n_m = tl.cdiv(T_q, BLOCK_M)
    head = tl.program_id(0) // n_m
    pid_m = tl.program_id(0) % n_m
    if CAUSAL:
        pid_m = n_m - 1 - pid_m  # the longest tiles first
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
    # [BLOCK_M, BLOCK_D]
    q_ptr += b * q_strides[0] + h * q_strides[1] + row_start.to(tl.int64) * q_strides[2]
    q = load_tile(q_ptr, near_m, q_strides[2], offs_d, in_q, D, BLOCK_D, True)

    first, last, holes = key_range(range_ptr, b, T_k, KEY_MASK)
    start, clean, clean_end, n_left, n_right = key_tiles(
        first, last, holes, row_start, causal_shift, BLOCK_M, BLOCK_N, EDGE, CAUSAL, MASK > 0
    )
    acc = tl.zeros([BLOCK_M, BLOCK_D], ACC)
    m = tl.full([BLOCK_M], float("-inf"), ACC)
    l = tl.zeros([BLOCK_M], ACC)
    if MASK == 0:
        for i in range((clean_end - clean) // BLOCK_N):
            at = clean + i * BLOCK_N
            acc, m, l = _fwd_tile(
                acc, m, l, q, rows, row_start, at, head, first, last,
                k_ptr, v_ptr, k_strides[2], v_strides[2], mask_ptr, mask_strides, key_mask_ptr, seed,
                T_q, causal_shift, scale_log2, threshold, False, CAUSAL, MASK, KEY_MASK, DROPOUT, D, BLOCK_D, BLOCK_N, ACC, PRECISION,
            )  # fmt: skip
    for i in range(n_left + n_right):
        at = tl.where(i < n_left, start + i * EDGE, clean_end + (i - n_left) * EDGE)
        acc, m, l = _fwd_tile(
            acc, m, l, q, rows, row_start, at, head, first, last,
            k_ptr, v_ptr, k_strides[2], v_strides[2], mask_ptr, mask_strides, key_mask_ptr, seed,
            T_q, causal_shift, scale_log2, threshold, True, CAUSAL, MASK, KEY_MASK, DROPOUT, D, BLOCK_D, EDGE, ACC, PRECISION,
        )  # fmt: skip

    some = l != 0.0  # true of NaN: what is wrong with a row must not look like a row without a key
    l = tl.where(some, l, 1.0)
    acc = acc * (keep_scale / l)[:, None]
    out_ptr += (b * T_q + row_start) * (H * D) + h * D
    store_tile(out_ptr, acc, near_m, H * D, offs_d, in_q, D)
    lse = tl.where(some, m + tl.log2(l), float("-inf"))
    tl.store(lse_ptr + head.to(tl.int64) * T_q + rows, lse, mask=in_q)
