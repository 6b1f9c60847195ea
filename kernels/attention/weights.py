"""The two attention kernels that own a tile of the scores: the weights, and the gradient of a bias (see backward.py).

Both recompute the weights from the base-2 log-sum-exp of the forward, and sum over what their output has one of.
"""

import triton
import triton.language as tl

from tileformer.kernels.attention.mask import SIZES, aligned, block_scores, load_rows, query_block, sequence, valid_keys
from tileformer.kernels.tile_ops import dropout_keep


@triton.jit
def _weights_tile(q, k, masks, lse_ptr, head, row_start, col_start, H, group, T_q, T_k, shift, low, high, threshold,
                  scaling, F: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    """(weights before dropout [BLOCK_M, BLOCK_N], which of them dropout keeps, the queries, which keys are valid)."""
    bounds = sequence(masks.bounds, (head // H).to(tl.int64), T_q, T_k, shift, F.BOUNDS)
    block = query_block(q, k, k, masks, bounds, head, row_start, H, group, T_k,
                        low, high, threshold, scaling, F, BLOCK_M)  # fmt: skip
    cols = col_start + tl.arange(0, BLOCK_N)
    in_q = block.rows < bounds.q_len
    valid = valid_keys(cols, block.first, block.last, block.key_mask, F)
    # [BLOCK_N, BLOCK_D]
    k_tile = load_rows(k, block.batch, block.h // group, col_start.to(tl.int64), valid, F.D, F.BLOCK_D)
    lse = tl.load(lse_ptr + (block.batch * H + block.h) * T_q + block.rows, mask=in_q, other=float("-inf"))
    lse = tl.where(lse == float("-inf"), float("inf"), lse)
    # [BLOCK_M, BLOCK_N]
    s = tl.dot(block.q, tl.trans(k_tile), input_precision=F.PRECISION, out_dtype=lse.dtype) * block.scale_log2
    s, _ = block_scores(s, block, cols, col_start, valid, True, F)
    keep = s == s
    if F.DROPOUT:
        keep = dropout_keep(block.seed, head.to(tl.int32), block.rows, col_start, threshold, BLOCK_N, False)
    return tl.exp2(s - lse[:, None]), keep, block, valid


@triton.jit(do_not_specialize=SIZES)
def _attention_weights_kernel(
    q, k, masks, lse_ptr, weights_ptr, H, group, T_q, T_k, shift, low, high, threshold, scaling,
    F: tl.constexpr, AVERAGE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program: a tile of the weights of one head, (B, H, T_q, T_k), or of their average, (B, 1, T_q, T_k)."""
    q, k = aligned(q, F.ALIGN), aligned(k, F.ALIGN)
    n_n = tl.cdiv(T_k, BLOCK_N)
    heads = 1 if AVERAGE else H
    lead = tl.program_id(0) // n_n // tl.cdiv(T_q, BLOCK_M)
    row_start = tl.program_id(0) // n_n % tl.cdiv(T_q, BLOCK_M) * BLOCK_M
    col_start = tl.program_id(0) % n_n * BLOCK_N
    ACC: tl.constexpr = lse_ptr.dtype.element_ty
    total = tl.zeros([BLOCK_M, BLOCK_N], ACC)
    for i in range(H // heads):
        head = lead // heads * H + lead % heads + i
        p, keep, _, _ = _weights_tile(q, k, masks, lse_ptr, head, row_start, col_start, H, group, T_q, T_k,
                                      shift, low, high, threshold, scaling, F, BLOCK_M, BLOCK_N)  # fmt: skip
        if F.DROPOUT:
            p = tl.where(keep, p * scaling.keep_scale, 0.0)
        total += p
    near_m = tl.arange(0, BLOCK_M)
    near_n = tl.arange(0, BLOCK_N)
    weights_ptr += (lead.to(tl.int64) * T_q + row_start) * T_k + col_start
    inside = (row_start + near_m < T_q)[:, None] & (col_start + near_n < T_k)[None, :]
    offsets = near_m[:, None].to(tl.int64) * T_k + near_n[None, :]
    tl.store(weights_ptr + offsets, (total / (H // heads)).to(weights_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["B", *SIZES])
def _attention_bwd_bias_kernel(
    q, k, v, do, masks, safe_lse_ptr, delta_ptr, dbias_ptr,
    B, H, group, T_q, T_k, shift, low, high, threshold, scaling, F: tl.constexpr, B_ONE: tl.constexpr,
    H_ONE: tl.constexpr, Q_ONE: tl.constexpr, K_ONE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program: a tile of dbias, contiguous (B or 1, H or 1, T_q or 1, T_k or 1): dS summed over axes of 1."""
    q, k, v = aligned(q, F.ALIGN), aligned(k, F.ALIGN), aligned(v, F.ALIGN)
    do = aligned(do, F.ALIGN)
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
    loops_k = tiles_k if K_ONE else 1
    loops_q = tiles_q if Q_ONE else 1
    loops_h = H if H_ONE else 1
    loops_b = B if B_ONE else 1
    ACC: tl.constexpr = safe_lse_ptr.dtype.element_ty
    total = tl.zeros([BLOCK_M, BLOCK_N], ACC)
    for i in range(loops_b * loops_h * loops_q * loops_k):
        col_start = (own_tile_k + i % loops_k) * BLOCK_N
        row_start = (own_tile_q + i // loops_k % loops_q) * BLOCK_M
        h = (own_head + i // loops_k // loops_q % loops_h).to(tl.int64)
        b = (own_batch + i // loops_k // loops_q // loops_h).to(tl.int64)
        p, keep, block, valid = _weights_tile(q, k, masks, safe_lse_ptr, b * H + h, row_start, col_start, H, group,
                                              T_q, T_k, shift, low, high, threshold, scaling,
                                              F, BLOCK_M, BLOCK_N)  # fmt: skip
        in_q = block.rows < block.q_len
        # [BLOCK_M, BLOCK_DV], [BLOCK_N, BLOCK_DV]
        do_tile = load_rows(do, block.batch, block.h, block.q_row, in_q, F.DV, F.BLOCK_DV)
        v_tile = load_rows(v, block.batch, block.h // group, col_start.to(tl.int64), valid, F.DV, F.BLOCK_DV)
        delta = tl.load(delta_ptr + (block.batch * H + block.h) * T_q + block.rows, mask=in_q, other=0.0)
        # [BLOCK_M, BLOCK_N]
        dp = tl.dot(do_tile, tl.trans(v_tile), input_precision=F.PRECISION, out_dtype=ACC)
        if F.DROPOUT:
            dp = tl.where(keep, dp * scaling.keep_scale, 0.0)
        total += p * (dp - delta[:, None])
    size_q = 1 if Q_ONE else T_q
    size_k = 1 if K_ONE else T_k
    dbias_ptr += (own_batch * own_h + own_head).to(tl.int64) * size_q * size_k
    rows = own_tile_q * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = own_tile_k * BLOCK_N + tl.arange(0, BLOCK_N)
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
