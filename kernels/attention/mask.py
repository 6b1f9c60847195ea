"""What all attention kernels share: which program does which tile, which keys a tile of queries sees, and what their scores are.

A query row i may see a key j of its sequence when i + low <= j <= i + high (causal and windows), j lies inside the sequence and is not padded,
and the boolean mask allows it. The base-2 score of a key is log2(e) (softcap(scale q.k) + bias - slope |i + shift - j|).

Per sequence, the bounds table holds where its queries and keys start and how many there are, so that padding, lengths and packed sequences
are one thing: loops run over the keys between the first and the last real one, and what lies outside is never loaded.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit(do_not_specialize=["T_q", "T_k"])
def _attention_bounds_kernel(key_mask_ptr, q_lens_ptr, k_lens_ptr, bounds_ptr, T_q, T_k, KEY_MASK: tl.constexpr, Q_LENS: tl.constexpr,
                             K_LENS: tl.constexpr, PACKED: tl.constexpr, ALIGN: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Per sequence eight int32: query start and count, key start, shift of the diagonal, first real key, one past the last, 1 if a padded
    key lies between, 0. Lengths are counts, or with PACKED the starts of all sequences and the end of the last, and T_q and T_k the longest that
    a sequence may be. ALIGN: to the bottom right."""
    b = tl.program_id(0).to(tl.int64)
    q_start = 0
    q_len = T_q
    k_start = 0
    k_len = T_k
    if PACKED:
        q_start = tl.load(q_lens_ptr + b).to(tl.int32)
        q_len = tl.minimum(tl.maximum(tl.load(q_lens_ptr + b + 1).to(tl.int32) - q_start, 0), T_q)
        k_start = tl.load(k_lens_ptr + b).to(tl.int32)
        k_len = tl.minimum(tl.maximum(tl.load(k_lens_ptr + b + 1).to(tl.int32) - k_start, 0), T_k)
    else:
        if Q_LENS:
            q_len = tl.minimum(tl.maximum(tl.load(q_lens_ptr + b).to(tl.int32), 0), T_q)
        if K_LENS:
            k_len = tl.minimum(tl.maximum(tl.load(k_lens_ptr + b).to(tl.int32), 0), T_k)
    first = k_len * 0
    last = k_len
    holes = k_len * 0
    if KEY_MASK:
        first = k_len
        last = k_len * 0
        for start in range(0, k_len, BLOCK):
            cols = start + tl.arange(0, BLOCK)
            # [BLOCK]
            real = tl.load(key_mask_ptr + b * T_k + cols, mask=cols < k_len, other=0) != 0
            first = tl.minimum(first, tl.min(tl.where(real, cols, k_len), 0))
            last = tl.maximum(last, tl.max(tl.where(real, cols + 1, 0), 0))
            holes += tl.sum(real.to(tl.int32), 0)
        holes = (holes < last - first).to(tl.int32)
    bounds_ptr += b * 8
    tl.store(bounds_ptr, q_start)
    tl.store(bounds_ptr + 1, q_len)
    tl.store(bounds_ptr + 2, k_start)
    tl.store(bounds_ptr + 3, k_len - q_len if ALIGN else 0)
    tl.store(bounds_ptr + 4, first)
    tl.store(bounds_ptr + 5, last)
    tl.store(bounds_ptr + 6, holes)
    tl.store(bounds_ptr + 7, 0)


@triton.jit
def sequence(bounds_ptr, b, T_q, T_k, shift, BOUNDS: tl.constexpr):
    """Row b of the bounds table: (query start, queries, key start, shift, first key, one past the last, holes)."""
    if BOUNDS:
        at = bounds_ptr + b * 8
        return (
            tl.load(at),
            tl.load(at + 1),
            tl.load(at + 2),
            tl.load(at + 3),
            tl.load(at + 4),
            tl.load(at + 5),
            tl.load(at + 6),
        )
    else:
        return 0, T_q, 0, shift, 0, T_k, 0


@triton.jit
def schedule(n_tiles, n_heads, section, LAST_FIRST: tl.constexpr):
    """(head, tile) of this program. Heads go in sections whose keys and values fit the L2 cache; inside a section the longest tiles of all
    heads start first, so that no long tile is left for the end."""
    pid = tl.program_id(0)
    begin = pid // (section * n_tiles) * section
    heads = tl.minimum(section, n_heads - begin)
    place = pid - begin * n_tiles
    tile = place // heads
    if LAST_FIRST:
        tile = n_tiles - 1 - tile
    return begin + place % heads, tile


@triton.jit
def key_tiles(q_len, first, last, holes, row_start, low, high, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, EDGE: tl.constexpr,
              LOW: tl.constexpr, HIGH: tl.constexpr, DENSE: tl.constexpr):  # fmt: skip
    """The key tiles of a query tile: unmasked, BLOCK_N wide: [clean, clean_end); masked, EDGE wide: n_left from `start`, n_right from clean_end."""
    whole = first
    whole_end = last
    if LOW:
        first = tl.maximum(first, row_start + low)
        whole = tl.maximum(first, row_start + BLOCK_M - 1 + low)
    if HIGH:
        last = tl.minimum(last, tl.maximum(row_start + BLOCK_M + high, 0))
        whole_end = tl.minimum(last, row_start + high + 1)
    start = first // EDGE * EDGE
    clean = start
    clean_end = start
    whole = tl.cdiv(whole, EDGE) * EDGE
    n_whole = tl.maximum(whole_end - whole, 0) // BLOCK_N
    if DENSE:  # a whole tile lies inside of the mask
        holes = tl.where(row_start + BLOCK_M > q_len, 1, holes)
    if (n_whole > 0) & (holes == 0):
        clean = whole
        clean_end = whole + n_whole * BLOCK_N
    n_left = (clean - start) // EDGE
    n_right = tl.cdiv(tl.maximum(last - clean_end, 0), EDGE)
    return start, clean, clean_end, n_left, n_right


@triton.jit
def query_tiles(q_len, first, last, col_start, low, high, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, EDGE: tl.constexpr,
                LOW: tl.constexpr, HIGH: tl.constexpr, BOUNDS: tl.constexpr, DENSE: tl.constexpr):  # fmt: skip
    """The query tiles of a key tile: unmasked, BLOCK_M high: [clean, clean_end), n_clean; masked, EDGE high: n_left from `start`, n_masked in all."""
    start = 0
    clean = 0
    end = q_len
    whole_end = q_len
    if HIGH:
        start = tl.maximum(col_start - high, 0) // EDGE * EDGE
        clean = tl.cdiv(tl.maximum(col_start + BLOCK_N - 1 - high, 0), EDGE) * EDGE
    if LOW:
        end = tl.minimum(end, tl.maximum(col_start + BLOCK_N - low, 0))
        whole_end = tl.minimum(end, tl.maximum(col_start - low + 1, 0))
    if BOUNDS:
        hit = (col_start < last) & (col_start + BLOCK_N > first)
        end = tl.where(hit, end, 0)
        whole_end = tl.where(hit, whole_end, 0)
    n_clean = tl.maximum(whole_end - clean, 0) // BLOCK_M
    if DENSE:  # a whole tile lies inside of the mask
        n_clean = tl.where(col_start + BLOCK_N > last, 0, n_clean)
    clean = tl.where(n_clean > 0, clean, start)
    clean_end = clean + n_clean * BLOCK_M
    n_left = (clean - start) // EDGE
    n_masked = n_left + tl.cdiv(tl.maximum(end - clean_end, 0), EDGE)
    return start, clean, clean_end, n_clean, n_left, n_masked


@triton.jit
def real_keys(cols, first, last, key_mask_ptr, KEY_MASK: tl.constexpr):
    """[BLOCK_N]: keys inside the range and not padded."""
    real = cols < last
    if KEY_MASK:  # without one the first key is real
        real = real & (cols >= first)
        real = real & (tl.load(key_mask_ptr + cols, mask=real, other=0) != 0)
    return real


@triton.jit
def bend(s, rows, cols, shift, slope, softcap, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr):
    """Scaled base-2 scores after the soft cap (t = tanh, for its derivative) and the linear bias; rows and cols broadcast to s."""
    t = s
    if SOFTCAP:
        x = s / (softcap * LOG2E)
        y = x * x
        near = x * (1 + y * (-1 / 3 + y * (2 / 15 + y * (-17 / 315 + y * (62 / 2835)))))  # where the quotient cancels
        t = tl.where(y < 0.0625, near, 2 / (1 + tl.exp2(x * (-2 * LOG2E))) - 1)
        s = t * (softcap * LOG2E)
    if ALIBI:
        s -= slope * tl.abs((rows + shift - cols).to(s.dtype))
    return s, t


@triton.jit
def in_sight(rows, cols, real, end, low, high, LOW: tl.constexpr, HIGH: tl.constexpr, REAL: tl.constexpr):
    """The keys before `end` that causal, a window and, with REAL, the keys themselves let a row see. All broadcast: what can be said of a row
    (its `end` may be 0) costs nothing, each comparison with a column an instruction an element."""
    if HIGH:
        seen = cols <= tl.minimum(rows + high, end - 1)
    else:
        seen = cols < end
    if LOW:
        seen = seen & (cols >= rows + low)
    if REAL:
        seen = seen & real
    return seen


@triton.jit
def hide(s, rows, cols, seen, mask_ptr, mask_strides, bias_ptr, bias_strides, row_start, col_start,
         MASK: tl.constexpr, BIAS: tl.constexpr, GUARDED: tl.constexpr):  # fmt: skip
    """Base-2 scores with the bias added and -inf where a key is hidden; `rows` and `cols` broadcast to s. With GUARDED a key must be `seen`, and
    mask and bias are read only there; without, the whole tile lies inside of both, and they come in wide copies ahead of time."""
    if MASK:
        at = mask_ptr + row_start.to(tl.int64) * mask_strides[2] + col_start.to(tl.int64) * mask_strides[3]
        at += (rows - row_start) * mask_strides[2] + (cols - col_start) * mask_strides[3]
        if GUARDED:
            seen = seen & (tl.load(at, mask=seen, other=0) != 0)
        else:
            seen = tl.load(at) != 0
    if BIAS:
        at = bias_ptr + row_start.to(tl.int64) * bias_strides[2] + col_start.to(tl.int64) * bias_strides[3]
        at += (rows - row_start) * bias_strides[2] + (cols - col_start) * bias_strides[3]
        if GUARDED:
            bias = tl.load(at, mask=seen, other=0.0)
        else:
            bias = tl.load(at)
        s += bias.to(s.dtype) * LOG2E
    if MASK or GUARDED:
        s = tl.where(seen, s, float("-inf"))
    return s
