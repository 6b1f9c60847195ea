"""Attention forward: one pass over the keys with a running maximum and sum (FlashAttention-2, arXiv:2307.08691).

With s the base-2 scores of mask.py, the kernel keeps, per row, running_max = max s, sum = sum 2^(s - running_max) and
acc, the same sum of 2^(s - running_max) v. At the end out = acc / sum, and lse = running_max + log2(sum) in base 2.

Keys that no row of the block may see are never loaded: padding, lengths, `causal` and windows bound the range, and only
tiles that cross a bound are masked (all of them where padding lies inside). Masked tiles are at most BLOCK_MASKED wide:
what masking holds in registers then fits beside an accumulator of 128 x 128, and less is computed that no row may see.
A 2-D mask and a bias count in every tile, but only masked ones read them guarded.

OVERLAP, for Hopper: the weights of a tile are computed while the matrix units multiply those of the tile before with
its values (FlashAttention-3's intra-warpgroup overlap, arXiv:2407.08608), and tiles come through tensor descriptors
(TMA), which need next to no instructions and registers.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from tileformer.kernels.attention import mask
from tileformer.kernels.attention.mask import SIZES
from tileformer.kernels.tile_ops import dropout_keep, load_tile, store_tile


class Softmax(NamedTuple):
    """What is known of each row's softmax so far."""

    acc: Any  # [BLOCK_M, BLOCK_DV]: sum of 2^(s - running_max) v
    running_max: Any
    sum: Any


@triton.jit
def _unmasked_weights(s, running_max, scale_log2):
    """(weights, factor of the sums so far, new maximum) of a tile of q k^T that every row sees whole."""
    new_max = tl.maximum(running_max, tl.max(s, 1) * scale_log2)
    return tl.exp2(s * scale_log2 - new_max[:, None]), tl.exp2(running_max - new_max), new_max


@triton.jit
def _fwd_tile(state, block, k_ptr, v_ptr, start, MASKED: tl.constexpr, BLOCK_N: tl.constexpr, F: tl.constexpr,
              THREADS: tl.constexpr):  # fmt: skip
    """Fold one tile of keys and values, those from `start`, where k_ptr and v_ptr are, into the state."""
    ACC: tl.constexpr = state.acc.dtype
    near = tl.arange(0, BLOCK_N)
    cols = start + near
    valid = cols < block.last
    if MASKED:
        valid = mask.valid_keys(cols, block.first, block.last, block.key_mask, F)
    # [BLOCK_N, BLOCK_D]
    k_tile = load_tile(k_ptr, near, block.k.strides[2], tl.arange(0, F.BLOCK_D), valid, F.D, F.BLOCK_D, MASKED, THREADS)
    # [BLOCK_M, BLOCK_N]
    s = tl.dot(block.q, tl.trans(k_tile), input_precision=F.PRECISION, out_dtype=ACC)
    if MASKED or F.MASK or F.BIAS or F.ALIBI or F.SOFTCAP:
        s, _ = mask.block_scores(s * block.scale_log2, block, cols, start, valid, MASKED, F)
        new_max = tl.maximum(state.running_max, tl.max(s, 1))
        # A row that has seen no key yet: 2^(-inf - 0) = 0, not NaN.
        base = tl.where(new_max == float("-inf"), 0.0, new_max)
        p = tl.exp2(s - base[:, None])
        alpha = tl.exp2(state.running_max - base)
    else:
        p, alpha, new_max = _unmasked_weights(s, state.running_max, block.scale_log2)
    new_sum = state.sum * alpha + tl.sum(p, 1)
    if F.DROPOUT:
        p = tl.where(dropout_keep(block.seed, block.head, block.rows, start, block.threshold, BLOCK_N, False), p, 0.0)
    # [BLOCK_N, BLOCK_DV]
    v_tile = load_tile(
        v_ptr, near, block.v.strides[2], tl.arange(0, F.BLOCK_DV), valid, F.DV, F.BLOCK_DV, MASKED, THREADS
    )
    # [BLOCK_M, BLOCK_DV]
    acc = tl.dot(p.to(v_tile.dtype), v_tile, state.acc * alpha[:, None], input_precision=F.PRECISION, out_dtype=ACC)
    return Softmax(acc, new_max, new_sum)


@triton.jit
def _fwd_overlapped(state, block, n, BLOCK_N: tl.constexpr, F: tl.constexpr):
    """Fold the first n > 0 tiles of keys, unmasked, into the state, each tile's values one step behind its scores.

    The order of the statements lets Triton leave the second product in flight while the weights are computed: its
    result is read after the next first product, which is waited for. Its left operand is rounded from float32 in the
    same step, so that its registers are not written while they are read; and nothing follows the loop that could write
    to acc on another way (`ptxas` would wait for each instruction).
    """
    BLOCK_D: tl.constexpr = F.BLOCK_D
    BLOCK_DV: tl.constexpr = F.BLOCK_DV
    k = block.k
    v = block.v
    k_tiles = tl.make_tensor_descriptor(k.ptr, [block.last, BLOCK_D], [k.strides[2], 1], [BLOCK_N, BLOCK_D])
    v_tiles = tl.make_tensor_descriptor(v.ptr, [block.last, BLOCK_DV], [v.strides[2], 1], [BLOCK_N, BLOCK_DV])
    acc = state.acc
    m = state.running_max
    l = state.sum
    p = tl.zeros([block.q.shape[0], BLOCK_N], tl.float32)
    alpha = l
    # Once: outside of a loop, this tile of keys would keep its shared memory.
    for i in tl.range(0, tl.minimum(n, 1), num_stages=1):
        s = tl.dot(block.q, tl.trans(k_tiles.load([i * BLOCK_N, 0])))
        p, alpha, m = _unmasked_weights(s, m, block.scale_log2)
        l = l * alpha + tl.sum(p, 1)
    for i in range(n - 1):
        at = i * BLOCK_N
        # [BLOCK_M, BLOCK_N]
        s = tl.dot(block.q, tl.trans(k_tiles.load([at + BLOCK_N, 0])))
        # [BLOCK_M, BLOCK_DV]
        acc = tl.dot(p.to(block.q.dtype), v_tiles.load([at, 0]), acc * alpha[:, None])
        p, alpha, m = _unmasked_weights(s, m, block.scale_log2)
        l = l * alpha + tl.sum(p, 1)
    acc = tl.dot(p.to(block.q.dtype), v_tiles.load([(n - 1) * BLOCK_N, 0]), acc * alpha[:, None])
    return Softmax(acc, m, l)


@triton.jit(do_not_specialize=[*SIZES, "max_q", "section", "n_heads"])
def _attention_fwd_kernel(
    q, k, v, masks, out_ptr, lse_ptr, H, group, T_q, T_k, max_q, shift, low, high, section, n_heads, threshold, scaling,
    F: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_MASKED: tl.constexpr, OVERLAP: tl.constexpr,
    THREADS: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M queries of one head. out is (B, T_q, H, DV), lse (B, H, T_q) base 2."""
    q, k, v = mask.aligned(q, F.ALIGN), mask.aligned(k, F.ALIGN), mask.aligned(v, F.ALIGN)
    head, pid_m = mask.schedule(tl.cdiv(max_q, BLOCK_M), n_heads, section, F.HIGH)
    bounds = mask.sequence(masks.bounds, (head // H).to(tl.int64), T_q, T_k, shift, F.BOUNDS)
    row_start = pid_m * BLOCK_M
    if F.PACKED:  # noqa: SIM102
        if row_start >= bounds.q_len:
            return
    block = mask.query_block(q, k, v, masks, bounds, head, row_start, H, group, T_k,
                        low, high, threshold, scaling, F, BLOCK_M)  # fmt: skip
    start, unmasked_start, unmasked_end, n_masked_left, n_masked_right = mask.key_tiles(
        block, BLOCK_M, BLOCK_N, BLOCK_MASKED, F
    )

    ACC: tl.constexpr = lse_ptr.dtype.element_ty
    BLOCK_DV: tl.constexpr = F.BLOCK_DV
    state = Softmax(tl.zeros([BLOCK_M, BLOCK_DV], ACC), tl.full([BLOCK_M], float("-inf"), ACC),
                    tl.zeros([BLOCK_M], ACC))  # fmt: skip
    n = (unmasked_end - unmasked_start) // BLOCK_N
    # Unmasked tiles first: the fewest registers. Last with OVERLAP (see there) and with four warps, whose main loop has
    # none left for what the masked tiles want; those wait for fewer copies then.
    LAST: tl.constexpr = OVERLAP or THREADS == 128
    for part in tl.static_range(2):
        if part != LAST:
            for i in tl.range(0, n_masked_left + n_masked_right, num_stages=2 if F.HIGH and THREADS == 128 else None):
                at = mask.masked_tile(i, start, unmasked_end, n_masked_left, BLOCK_MASKED)
                k_at = block.k.ptr + at.to(tl.int64) * k.strides[2]
                v_at = block.v.ptr + at.to(tl.int64) * v.strides[2]
                state = _fwd_tile(state, block, k_at, v_at, at, True, BLOCK_MASKED, F, THREADS)
        elif OVERLAP:  # only where the first key is the first of all
            if n > 0:
                state = _fwd_overlapped(state, block, n, BLOCK_N, F)
        else:
            k_ptr = block.k.ptr + unmasked_start.to(tl.int64) * k.strides[2]
            v_ptr = block.v.ptr + unmasked_start.to(tl.int64) * v.strides[2]
            for i in range(n):
                state = _fwd_tile(state, block, k_ptr, v_ptr, unmasked_start + i * BLOCK_N, False, BLOCK_N, F, THREADS)
                k_ptr += BLOCK_N * k.strides[2]
                v_ptr += BLOCK_N * v.strides[2]

    in_q = block.rows < bounds.q_len
    some = (state.sum != 0.0) & in_q  # true of NaN, so that a row with a NaN stays NaN
    total = tl.where(some, state.sum, 1.0)
    acc = tl.where(in_q[:, None], state.acc * (scaling.keep_scale / total)[:, None], 0.0)
    lse = tl.where(some, state.running_max + tl.log2(total), float("-inf"))
    in_out = in_q if F.PACKED else block.rows < T_q
    near_m = tl.arange(0, BLOCK_M)
    out_at = out_ptr + (block.batch * T_q + block.q_row) * (H * F.DV) + block.h * F.DV
    store_tile(out_at, acc, near_m, H * F.DV, tl.arange(0, F.BLOCK_DV), in_out, F.DV)
    tl.store(lse_ptr + (block.batch * H + block.h) * T_q + block.q_row + near_m, lse, mask=in_out)
