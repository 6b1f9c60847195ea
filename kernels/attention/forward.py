"""Attention forward: one pass over the keys with a running maximum and sum (FlashAttention-2, arXiv:2307.08691).

With s the base-2 scores of scores.py, the kernel keeps, per row, m = max s, l = sum 2^(s - m) and acc = sum 2^(s - m) v.
At the end out = acc / l and the base-2 log-sum-exp is m + log2(l). A second kernel recomputes the weights 2^(s - lse) for those who ask.

Keys that no row of the tile may see are never loaded: padding, lengths, `causal` and windows bound the range, and only tiles that cross a bound are
masked (all of them where the padding has a hole). Masked tiles are at most EDGE wide: what masking holds in registers then fits beside an accumulator
of 128 x 128, and less is computed that no row may see. A 2-D mask and a bias count in every tile, but only masked ones need a guard to read them.

AHEAD, for Hopper: the weights of a tile are computed while the matrix units multiply those of the tile before with its values (FlashAttention-3's
intra-warpgroup overlap, arXiv:2407.08608), and tiles come through tensor descriptors (TMA), which need next to no instructions and registers.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tileformer.kernels.attention.mask import LOG2E, bend, hide, in_sight, key_tiles, real_keys, schedule, sequence
from tileformer.kernels.tile_ops import dropout_keep, load_tile, store_tile


@triton.jit
def _unmasked_weights(s, m, scale_log2):
    """(weights against the new maximum, what the sums so far are multiplied by, new maximum) of a tile of q k^T that every row sees whole."""
    m_new = tl.maximum(m, tl.max(s, 1) * scale_log2)
    return tl.exp2(s * scale_log2 - m_new[:, None]), tl.exp2(m - m_new), m_new


@triton.jit
def _fwd_tile(acc, m, l, q, rows, row_start, start, head, q_len, first, last,
              k_at, v_at, k_stride, v_stride, mask_ptr, mask_strides, bias_ptr, bias_strides, key_mask_ptr, slope, seed,
              shift, low, high, scale_log2, softcap, threshold, MASKED: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr,
              MASK: tl.constexpr, BIAS: tl.constexpr, KEY_MASK: tl.constexpr, ALIBI: tl.constexpr, SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr,
              D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_N: tl.constexpr,
              ACC: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Fold one tile of keys, those from `start` at k_at, and values at v_at, into (acc, m, l)."""
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
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION, out_dtype=ACC)
    if MASKED or MASK or BIAS or ALIBI or SOFTCAP:
        s, _ = bend(s * scale_log2, rows[:, None], cols[None, :], shift, slope, softcap, SOFTCAP, ALIBI)
        seen = real[None, :]
        if MASKED:
            end = tl.where(rows < q_len, last, 0)
            seen = in_sight(rows[:, None], cols[None, :], seen, end[:, None], low, high, LOW, HIGH, KEY_MASK)
        s = hide(s, rows[:, None], cols[None, :], seen, mask_ptr, mask_strides, bias_ptr, bias_strides, row_start, start,
                 MASK, BIAS, MASKED)  # fmt: skip
        m_new = tl.maximum(m, tl.max(s, 1))
        base = tl.where(m_new == float("-inf"), 0.0, m_new)  # a row that has seen no key yet: 2^(-inf - 0) = 0, not NaN
        p = tl.exp2(s - base[:, None])
        alpha = tl.exp2(m - base)
    else:
        p, alpha, m_new = _unmasked_weights(s, m, scale_log2)
    l = l * alpha + tl.sum(p, 1)
    if DROPOUT:
        p = tl.where(dropout_keep(seed, head, rows, start, threshold, BLOCK_N, False), p, 0.0)
    # [BLOCK_N, BLOCK_DV]
    v = load_tile(v_at, near, v_stride, offs_dv, real, DV, BLOCK_DV, MASKED)
    # [BLOCK_M, BLOCK_DV]
    acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision=PRECISION, out_dtype=ACC)
    return acc, m_new, l


@triton.jit
def _fwd_ahead(acc, m, l, q, k_ptr, v_ptr, k_stride, v_stride, n, last, scale_log2,
               BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    """Fold the first n > 0 tiles of keys, unmasked, into (acc, m, l), each tile's values one step behind its scores.

    The order of the statements is what lets Triton leave the second product in flight while the weights are computed: its result is read after
    the next first product, which is waited for. Its left operand is rounded from float32 in the same step, so that its registers are not
    written while they are read; and nothing follows the loop that could write to acc on another way (`ptxas` would wait for each instruction).
    """
    k_tiles = tl.make_tensor_descriptor(k_ptr, [last, BLOCK_D], [k_stride, 1], [BLOCK_N, BLOCK_D])
    v_tiles = tl.make_tensor_descriptor(v_ptr, [last, BLOCK_DV], [v_stride, 1], [BLOCK_N, BLOCK_DV])
    p = tl.zeros([q.shape[0], BLOCK_N], tl.float32)
    alpha = l
    # Once: outside of a loop, this tile of keys would keep its shared memory.
    for i in tl.range(0, tl.minimum(n, 1), num_stages=1):
        s = tl.dot(q, tl.trans(k_tiles.load([i * BLOCK_N, 0])))
        p, alpha, m = _unmasked_weights(s, m, scale_log2)
        l = l * alpha + tl.sum(p, 1)
    for i in range(n - 1):
        at = i * BLOCK_N
        # [BLOCK_M, BLOCK_N]
        s = tl.dot(q, tl.trans(k_tiles.load([at + BLOCK_N, 0])))
        # [BLOCK_M, BLOCK_DV]
        acc = tl.dot(p.to(q.dtype), v_tiles.load([at, 0]), acc * alpha[:, None])
        p, alpha, m = _unmasked_weights(s, m, scale_log2)
        l = l * alpha + tl.sum(p, 1)
    acc = tl.dot(p.to(q.dtype), v_tiles.load([(n - 1) * BLOCK_N, 0]), acc * alpha[:, None])
    return acc, m, l


@triton.jit(
    do_not_specialize=["H", "group", "T_q", "T_k", "max_q", "shift", "low", "high", "section", "n_heads", "threshold"]
)
def _attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, mask_ptr, bias_ptr, key_mask_ptr, bounds_ptr, slopes_ptr, seed_ptr, out_ptr, lse_ptr,
    q_strides, k_strides, v_strides, mask_strides, bias_strides, H, group, T_q, T_k, max_q, shift, low, high, section, n_heads,
    scale, softcap, threshold, keep_scale, LOW: tl.constexpr, HIGH: tl.constexpr, MASK: tl.constexpr, BIAS: tl.constexpr,
    KEY_MASK: tl.constexpr, BOUNDS: tl.constexpr, PACKED: tl.constexpr, ALIBI: tl.constexpr, SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, EDGE: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M queries of one head. out is (B, T_q, H, DV), lse (B, H, T_q) base 2; mask strides are 0 where it broadcasts."""
    scale_log2 = scale * LOG2E
    head, pid_m = schedule(tl.cdiv(max_q, BLOCK_M), n_heads, section, HIGH)
    b = (head // H).to(tl.int64)
    h = (head % H).to(tl.int64)
    q_start, q_len, k_start, shift, first, last, holes = sequence(bounds_ptr, b, T_q, T_k, shift, BOUNDS)
    row_start = pid_m * BLOCK_M
    if PACKED:  # noqa: SIM102
        if row_start >= q_len:
            return
    batch = b * 0 if PACKED else b  # in the tensors: packed sequences share one
    near_m = tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV)
    rows = row_start + near_m
    in_q = rows < q_len

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

    low += shift
    high += shift
    if BOUNDS:
        last = tl.where(row_start < q_len, last, first)
    start, clean, clean_end, n_left, n_right = key_tiles(
        q_len, first, last, holes, row_start, low, high, BLOCK_M, BLOCK_N, EDGE, LOW, HIGH, MASK or BIAS
    )
    acc = tl.zeros([BLOCK_M, BLOCK_DV], ACC)
    m = tl.full([BLOCK_M], float("-inf"), ACC)
    l = tl.zeros([BLOCK_M], ACC)
    n = (clean_end - clean) // BLOCK_N
    for part in tl.static_range(2):  # unmasked tiles first: the fewest registers; with AHEAD last, see there
        if part != AHEAD:
            for i in range(n_left + n_right):
                at = tl.where(i < n_left, start + i * EDGE, clean_end + (i - n_left) * EDGE)
                acc, m, l = _fwd_tile(
                    acc, m, l, q, rows, row_start, at, head, q_len, first, last,
                    k_ptr + at.to(tl.int64) * k_strides[2], v_ptr + at.to(tl.int64) * v_strides[2], k_strides[2], v_strides[2],
                    mask_ptr, mask_strides, bias_ptr, bias_strides, key_mask_ptr, slope, seed,
                    shift, low, high, scale_log2, softcap, threshold, True, LOW, HIGH,
                    MASK, BIAS, KEY_MASK, ALIBI, SOFTCAP, DROPOUT, D, DV, BLOCK_D, BLOCK_DV, EDGE, ACC, PRECISION,
                )  # fmt: skip
        elif AHEAD:  # only where the first key is the first of all
            if n > 0:
                acc, m, l = _fwd_ahead(
                    acc, m, l, q, k_ptr, v_ptr, k_strides[2], v_strides[2], n, last, scale_log2, BLOCK_D, BLOCK_DV, BLOCK_N
                )  # fmt: skip
        else:
            k_at = k_ptr + clean.to(tl.int64) * k_strides[2]
            v_at = v_ptr + clean.to(tl.int64) * v_strides[2]
            for i in range(n):
                at = clean + i * BLOCK_N
                acc, m, l = _fwd_tile(
                    acc, m, l, q, rows, row_start, at, head, q_len, first, last,
                    k_at, v_at, k_strides[2], v_strides[2], mask_ptr, mask_strides, bias_ptr, bias_strides, key_mask_ptr, slope, seed,
                    shift, low, high, scale_log2, softcap, threshold, False, LOW, HIGH,
                    MASK, BIAS, KEY_MASK, ALIBI, SOFTCAP, DROPOUT, D, DV, BLOCK_D, BLOCK_DV, BLOCK_N, ACC, PRECISION,
                )  # fmt: skip
                k_at += BLOCK_N * k_strides[2]
                v_at += BLOCK_N * v_strides[2]

    some = (l != 0.0) & in_q  # true of NaN: what is wrong with a row must not look like a row without a key
    l = tl.where(some, l, 1.0)
    acc = tl.where(in_q[:, None], acc * (keep_scale / l)[:, None], 0.0)
    lse = tl.where(some, m + tl.log2(l), float("-inf"))
    in_out = in_q if PACKED else rows < T_q
    store_tile(out_ptr + (batch * T_q + q_row) * (H * DV) + h * DV, acc, near_m, H * DV, offs_dv, in_out, DV)
    tl.store(lse_ptr + (batch * H + h) * T_q + q_row + near_m, lse, mask=in_out)


@triton.jit(do_not_specialize=["H", "group", "T_q", "T_k", "shift", "low", "high", "threshold"])
def _attention_weights_kernel(
    q_ptr, k_ptr, mask_ptr, bias_ptr, key_mask_ptr, bounds_ptr, slopes_ptr, seed_ptr, lse_ptr, weights_ptr,
    q_strides, k_strides, mask_strides, bias_strides, H, group, T_q, T_k, shift, low, high, scale, softcap, threshold, keep_scale,
    LOW: tl.constexpr, HIGH: tl.constexpr, MASK: tl.constexpr, BIAS: tl.constexpr, KEY_MASK: tl.constexpr, BOUNDS: tl.constexpr,
    ALIBI: tl.constexpr, SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr, D: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    AVERAGE: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program: a tile of the weights of one head, (B, H, T_q, T_k), or of their average over the heads, (B, 1, T_q, T_k)."""
    n_n = tl.cdiv(T_k, BLOCK_N)
    heads = 1 if AVERAGE else H
    lead = tl.program_id(0) // n_n // tl.cdiv(T_q, BLOCK_M)
    row_start = tl.program_id(0) // n_n % tl.cdiv(T_q, BLOCK_M) * BLOCK_M
    col_start = tl.program_id(0) % n_n * BLOCK_N
    b = (lead // heads).to(tl.int64)
    _, q_len, _, shift, first, last, _ = sequence(bounds_ptr, b, T_q, T_k, shift, BOUNDS)
    near_m = tl.arange(0, BLOCK_M)
    near_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    rows = row_start + near_m
    cols = col_start + near_n
    in_q = rows < q_len
    real = real_keys(cols, first, last, key_mask_ptr + b * T_k, KEY_MASK)
    seed = tl.load(seed_ptr) if DROPOUT else 0
    total = tl.zeros([BLOCK_M, BLOCK_N], ACC)
    for i in range(H // heads):
        h = (lead % heads + i).to(tl.int64)
        head = b * H + h
        q_at = q_ptr + b * q_strides[0] + h * q_strides[1] + row_start.to(tl.int64) * q_strides[2]
        k_at = k_ptr + b * k_strides[0] + h // group * k_strides[1] + col_start.to(tl.int64) * k_strides[2]
        slope = tl.load(slopes_ptr + head) * LOG2E if ALIBI else 0.0
        # [BLOCK_M, BLOCK_D], [BLOCK_N, BLOCK_D]
        q = load_tile(q_at, near_m, q_strides[2], offs_d, in_q, D, BLOCK_D, True)
        k = load_tile(k_at, near_n, k_strides[2], offs_d, real, D, BLOCK_D, True)
        lse = tl.load(lse_ptr + head * T_q + rows, mask=in_q, other=float("-inf"))
        lse = tl.where(lse == float("-inf"), float("inf"), lse)
        # [BLOCK_M, BLOCK_N]
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION, out_dtype=ACC) * (scale * LOG2E)
        s = bend(s, rows[:, None], cols[None, :], shift, slope, softcap, SOFTCAP, ALIBI)[0]
        end = tl.where(in_q, last, 0)
        seen = in_sight(rows[:, None], cols[None, :], real[None, :], end[:, None], low + shift, high + shift,
                        LOW, HIGH, KEY_MASK)  # fmt: skip
        s = hide(s, rows[:, None], cols[None, :], seen, mask_ptr + b * mask_strides[0] + h * mask_strides[1], mask_strides,
                 bias_ptr + b * bias_strides[0] + h * bias_strides[1], bias_strides, row_start, col_start, MASK, BIAS, True)  # fmt: skip
        p = tl.exp2(s - lse[:, None])
        if DROPOUT:
            p = tl.where(
                dropout_keep(seed, head.to(tl.int32), rows, col_start, threshold, BLOCK_N, False), p * keep_scale, 0.0
            )
        total += p
    weights_ptr += (lead.to(tl.int64) * T_q + row_start) * T_k + col_start
    inside = (rows < T_q)[:, None] & (cols < T_k)[None, :]
    offsets = near_m[:, None].to(tl.int64) * T_k + near_n[None, :]
    tl.store(weights_ptr + offsets, (total / (H // heads)).to(weights_ptr.dtype.element_ty), mask=inside)
