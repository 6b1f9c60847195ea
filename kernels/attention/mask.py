"""What all attention kernels share: which program does which tile, which keys a tile sees, and what their scores are.

A query row i may see a key j of its sequence when i + low <= j <= i + high (causal and windows), j lies inside the
sequence and is not padded, and the boolean mask allows it. The base-2 score of a key is
log2(e) (softcap(scale q.k) + bias - slope |i + shift - j|).

Per sequence, the bounds table holds where its queries and keys start and how many there are, so that padding, lengths
and packed sequences are one thing: what lies before the first valid key or past the last is never loaded.

Sizes that change from call to call stay plain scalars: `do_not_specialize` does not reach into a tuple. Strides in a
tuple may be constants, which cannot change in a loop: pointers advance outside of their Matrix.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from tileformer.kernels.tile_ops import LOG2E, load_tile, tanh

SIZES = ["H", "group", "T_q", "T_k", "shift", "low", "high", "threshold"]  # which Triton is not to specialize on


class Features(NamedTuple):
    """What a kind of call asks of the kernels: one constexpr."""

    LOW: bool  # a row sees no key before row + low
    HIGH: bool  # nor one after row + high
    MASK: bool
    BIAS: bool
    KEY_MASK: bool
    BOUNDS: bool
    PACKED: bool
    ALIBI: bool
    SOFTCAP: bool
    DROPOUT: bool
    D: int
    DV: int
    BLOCK_D: int
    BLOCK_DV: int
    PRECISION: str
    ALIGN: int  # 2^ALIGN divides the strides of q, k, v and dO: `aligned`
    MASK_ALIGN: int  # of the mask and the bias
    DLSE: bool = False  # of dq: the log-sum-exp has a gradient too


class Matrix(NamedTuple):
    """A (B, H, T, D) tensor whose last axis is contiguous, or a mask, (B, H, T_q, T_k) by strides of 0."""

    ptr: Any
    strides: Any


class Masks(NamedTuple):
    """What restricts or changes the scores. Where a feature is off, another tensor stands in and is never read."""

    mask: Matrix
    bias: Matrix
    key_mask: Any
    bounds: Any
    slopes: Any
    seed: Any


class Scaling(NamedTuple):
    """The floating-point options."""

    scale: Any
    softcap: Any
    keep_scale: Any  # 1 / (1 - dropout_p)


class Bounds(NamedTuple):
    """A row of the bounds table."""

    q_start: Any
    q_len: Any
    k_start: Any
    shift: Any  # of the diagonal
    first: Any  # valid key
    last: Any  # one past the last valid key
    padding_inside: Any  # 1 if a padded key lies between


class Block(NamedTuple):
    """A tile of queries of one head, the keys and values of that head, and what restricts the keys that they see."""

    q: Any  # [BLOCK_M, BLOCK_D]
    k: Matrix  # from the first row of the sequence
    v: Matrix
    rows: Any
    row_start: Any
    batch: Any  # in the tensors; packed sequences share one
    h: Any
    head: Any
    q_row: Any  # of the tensors' rows, the block's first
    q_len: Any
    first: Any
    last: Any
    padding_inside: Any
    shift: Any
    low: Any
    high: Any
    slope: Any
    seed: Any
    threshold: Any
    scale_log2: Any
    softcap: Any
    mask: Matrix
    bias: Matrix
    key_mask: Any


@triton.jit(do_not_specialize=["T_q", "T_k"])
def _attention_bounds_kernel(
    key_mask_ptr, q_lens_ptr, k_lens_ptr, bounds_ptr, T_q, T_k, KEY_MASK: tl.constexpr, Q_LENS: tl.constexpr,
    K_LENS: tl.constexpr, PACKED: tl.constexpr, ALIGN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Per sequence eight int32: query start and count, key start, shift of the diagonal, first valid key, one past the
    last, 1 if a padded key lies between, 0. Lengths are counts; with PACKED the starts of all sequences and the end of
    the last, and T_q and T_k the longest that a sequence may be. ALIGN: to the bottom right."""
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
    padding_inside = k_len * 0
    if KEY_MASK:
        first = k_len
        last = k_len * 0
        n_valid = k_len * 0
        for start in range(0, k_len, BLOCK):
            cols = start + tl.arange(0, BLOCK)
            # [BLOCK]
            valid = tl.load(key_mask_ptr + b * T_k + cols, mask=cols < k_len, other=0) != 0
            first = tl.minimum(first, tl.min(tl.where(valid, cols, k_len), 0))
            last = tl.maximum(last, tl.max(tl.where(valid, cols + 1, 0), 0))
            n_valid += tl.sum(valid.to(tl.int32), 0)
        padding_inside = (n_valid < last - first).to(tl.int32)
    bounds_ptr += b * 8
    tl.store(bounds_ptr, q_start)
    tl.store(bounds_ptr + 1, q_len)
    tl.store(bounds_ptr + 2, k_start)
    tl.store(bounds_ptr + 3, k_len - q_len if ALIGN else 0)
    tl.store(bounds_ptr + 4, first)
    tl.store(bounds_ptr + 5, last)
    tl.store(bounds_ptr + 6, padding_inside)
    tl.store(bounds_ptr + 7, 0)


@triton.jit
def sequence(bounds_ptr, b, T_q, T_k, shift, BOUNDS: tl.constexpr):
    """`Bounds` of sequence b."""
    if BOUNDS:
        at = bounds_ptr + b * 8
        return Bounds(tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3), tl.load(at + 4),
                      tl.load(at + 5), tl.load(at + 6))  # fmt: skip
    else:
        return Bounds(0, T_q, 0, shift, 0, T_k, 0)


@triton.jit
def schedule(n_tiles, n_heads, section, LAST_FIRST: tl.constexpr):
    """(head, tile) of this program. Heads go in sections whose keys and values fit the L2 cache; inside a section the
    longest tiles of all heads start first, so that no long tile is left for the end."""
    pid = tl.program_id(0)
    begin = pid // (section * n_tiles) * section
    heads = tl.minimum(section, n_heads - begin)
    position = pid - begin * n_tiles
    tile = position // heads
    if LAST_FIRST:
        tile = n_tiles - 1 - tile
    return begin + position % heads, tile


@triton.jit
def aligned(x, ALIGN: tl.constexpr):
    """The Matrix x so that the compiler sees 2^ALIGN divide its strides, or rows of 72 come in loads of one element.

    Triton sees divisibility by 16 by itself, and `tl.multiple_of` does not reach an argument of a kernel.
    """
    if ALIGN == 0 or ALIGN == 4:
        return x
    else:
        s = x.strides
        return Matrix(x.ptr, (s[0] >> ALIGN << ALIGN, s[1] >> ALIGN << ALIGN, s[2] >> ALIGN << ALIGN, s[3]))


@triton.jit
def of_head(x, batch, h, start, F: tl.constexpr):
    """The Matrix of one head, from row `start` on where sequences are packed."""
    ptr = x.ptr + (batch * x.strides[0] + h * x.strides[1])
    if F.PACKED:
        ptr += start.to(tl.int64) * x.strides[2]
    return Matrix(ptr, x.strides)


@triton.jit
def mask_of_head(x, batch, h, bounds, F: tl.constexpr):
    """The mask of one head, from the first query and the first key of its sequence."""
    x = aligned(x, F.MASK_ALIGN)
    ptr = of_head(x, batch, h, bounds.q_start, F).ptr
    if F.PACKED:
        ptr += bounds.k_start.to(tl.int64) * x.strides[3]
    return Matrix(ptr, x.strides)


@triton.jit
def load_rows(x, batch, h, row, in_rows, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """The rows of a head that begin at `row`, as many as in_rows has elements: 0 where that is false."""
    ptr = x.ptr + batch * x.strides[0] + h * x.strides[1] + row * x.strides[2]
    return load_tile(
        ptr, tl.arange(0, in_rows.shape[0]), x.strides[2], tl.arange(0, BLOCK_D), in_rows, D, BLOCK_D, True
    )


@triton.jit
def query_block(q, k, v, masks, bounds, head, row_start, H, group, T_k, low, high, threshold, scaling,
                F: tl.constexpr, BLOCK_M: tl.constexpr):  # fmt: skip
    """The `Block` of rows row_start to row_start + BLOCK_M of a sequence. `head` counts the heads of all sequences."""
    b = (head // H).to(tl.int64)
    h = (head % H).to(tl.int64)
    batch = b * 0 if F.PACKED else b
    rows = row_start + tl.arange(0, BLOCK_M)
    q_row = (bounds.q_start + row_start).to(tl.int64)
    last = bounds.last
    if F.BOUNDS:
        last = tl.where(row_start < bounds.q_len, last, bounds.first)
    keys = of_head(k, batch, h // group, bounds.k_start, F)
    values = of_head(v, batch, h // group, bounds.k_start, F)
    mask = mask_of_head(masks.mask, batch, h, bounds, F)
    bias = mask_of_head(masks.bias, batch, h, bounds, F)
    # [BLOCK_M, BLOCK_D]
    q_tile = load_rows(q, batch, h, q_row, rows < bounds.q_len, F.D, F.BLOCK_D)
    return Block(
        q_tile, keys, values, rows, row_start, batch, h, head, q_row,
        bounds.q_len, bounds.first, last, bounds.padding_inside, bounds.shift, low + bounds.shift, high + bounds.shift,
        tl.load(masks.slopes + head) * LOG2E if F.ALIBI else 0.0, tl.load(masks.seed) if F.DROPOUT else 0, threshold,
        scaling.scale * LOG2E, scaling.softcap, mask, bias, masks.key_mask + b * T_k,
    )  # fmt: skip


@triton.jit
def key_tiles(block, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_MASKED: tl.constexpr, F: tl.constexpr):
    """The key tiles of a block: unmasked, BLOCK_N wide: [unmasked_start, unmasked_end); masked, BLOCK_MASKED wide:
    n_masked_left from `start`, n_masked_right from unmasked_end."""
    first = block.first
    last = block.last
    full_start = first
    full_end = last
    if F.LOW:
        first = tl.maximum(first, block.row_start + block.low)
        full_start = tl.maximum(first, block.row_start + BLOCK_M - 1 + block.low)
    if F.HIGH:
        last = tl.minimum(last, tl.maximum(block.row_start + BLOCK_M + block.high, 0))
        full_end = tl.minimum(last, block.row_start + block.high + 1)
    start = first // BLOCK_MASKED * BLOCK_MASKED
    unmasked_start = start
    unmasked_end = start
    full_start = tl.cdiv(full_start, BLOCK_MASKED) * BLOCK_MASKED
    n_full = tl.maximum(full_end - full_start, 0) // BLOCK_N
    padding_inside = block.padding_inside
    if F.MASK or F.BIAS:  # a tile without guards lies inside of the mask
        padding_inside = tl.where(block.row_start + BLOCK_M > block.q_len, 1, padding_inside)
    if (n_full > 0) & (padding_inside == 0):
        unmasked_start = full_start
        unmasked_end = full_start + n_full * BLOCK_N
    n_masked_left = (unmasked_start - start) // BLOCK_MASKED
    n_masked_right = tl.cdiv(tl.maximum(last - unmasked_end, 0), BLOCK_MASKED)
    return start, unmasked_start, unmasked_end, n_masked_left, n_masked_right


@triton.jit
def masked_tile(i, start, unmasked_end, n_masked_left, BLOCK_MASKED: tl.constexpr):
    """Where masked tile i starts: the first n_masked_left lie before the unmasked tiles, the others after."""
    return tl.where(i < n_masked_left, start + i * BLOCK_MASKED, unmasked_end + (i - n_masked_left) * BLOCK_MASKED)


@triton.jit
def query_tiles(bounds, col_start, low, high, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                BLOCK_MASKED: tl.constexpr, F: tl.constexpr):  # fmt: skip
    """The query tiles of a key tile: unmasked, BLOCK_M high: [unmasked_start, unmasked_end), n_unmasked; masked,
    BLOCK_MASKED high: n_masked_left from `start`, n_masked in all."""
    start = 0
    full_start = 0
    end = bounds.q_len
    full_end = bounds.q_len
    if F.HIGH:
        start = tl.maximum(col_start - high, 0) // BLOCK_MASKED * BLOCK_MASKED
        full_start = tl.cdiv(tl.maximum(col_start + BLOCK_N - 1 - high, 0), BLOCK_MASKED) * BLOCK_MASKED
    if F.LOW:
        end = tl.minimum(end, tl.maximum(col_start + BLOCK_N - low, 0))
        full_end = tl.minimum(end, tl.maximum(col_start - low + 1, 0))
    if F.BOUNDS:
        hit = (col_start < bounds.last) & (col_start + BLOCK_N > bounds.first)
        end = tl.where(hit, end, 0)
        full_end = tl.where(hit, full_end, 0)
    n_unmasked = tl.maximum(full_end - full_start, 0) // BLOCK_M
    if F.MASK or F.BIAS:  # a tile without guards lies inside of the mask
        n_unmasked = tl.where(col_start + BLOCK_N > bounds.last, 0, n_unmasked)
    unmasked_start = tl.where(n_unmasked > 0, full_start, start)
    unmasked_end = unmasked_start + n_unmasked * BLOCK_M
    n_masked_left = (unmasked_start - start) // BLOCK_MASKED
    n_masked = n_masked_left + tl.cdiv(tl.maximum(end - unmasked_end, 0), BLOCK_MASKED)
    return start, unmasked_start, unmasked_end, n_unmasked, n_masked_left, n_masked


@triton.jit
def valid_keys(cols, first, last, key_mask_ptr, F: tl.constexpr):
    """[BLOCK_N]: keys inside the range and not padded."""
    valid = cols < last
    if F.KEY_MASK:  # without one the first key is valid
        valid = valid & (cols >= first)
        valid = valid & (tl.load(key_mask_ptr + cols, mask=valid, other=0) != 0)
    return valid


@triton.jit
def soft_cap(s, softcap):
    """Capped base-2 scores, and the tanh."""
    t = tanh(s / (softcap * LOG2E))
    return t * (softcap * LOG2E), t


@triton.jit
def softcap_and_alibi(s, rows, cols, shift, slope, softcap, F: tl.constexpr):
    """Scaled base-2 scores after the soft cap (t = tanh, for its derivative) and the linear bias."""
    t = s
    if F.SOFTCAP:
        s, t = soft_cap(s, softcap)
    if F.ALIBI:
        s -= slope * tl.abs((rows + shift - cols).to(s.dtype))
    return s, t


@triton.jit
def causal_window_mask(rows, cols, valid, end, low, high, F: tl.constexpr):
    """The keys before `end` that causal, a window and the key mask let a row see. All broadcast: what depends on the
    row alone (its `end` may be 0) costs nothing, each comparison with a column costs an instruction an element."""
    if F.HIGH:
        seen = cols <= tl.minimum(rows + high, end - 1)
    else:
        seen = cols < end
    if F.LOW:
        seen = seen & (cols >= rows + low)
    if F.KEY_MASK:
        seen = seen & valid
    return seen


@triton.jit
def apply_mask_and_bias(s, rows, cols, seen, mask, bias, row_start, col_start, GUARDED: tl.constexpr, F: tl.constexpr):
    """Base-2 scores with the bias added and -inf where a key is hidden. With GUARDED a key must be `seen`, and mask and
    bias are read only there; without, the tile lies inside of both, and they come in wide copies ahead of time."""
    if F.MASK:
        at = mask.ptr + row_start.to(tl.int64) * mask.strides[2] + col_start.to(tl.int64) * mask.strides[3]
        at += (rows - row_start) * mask.strides[2] + (cols - col_start) * mask.strides[3]
        if GUARDED:
            seen = seen & (tl.load(at, mask=seen, other=0) != 0)
        else:
            seen = tl.load(at) != 0
    if F.BIAS:
        at = bias.ptr + row_start.to(tl.int64) * bias.strides[2] + col_start.to(tl.int64) * bias.strides[3]
        at += (rows - row_start) * bias.strides[2] + (cols - col_start) * bias.strides[3]
        if GUARDED:
            added = tl.load(at, mask=seen, other=0.0)
        else:
            added = tl.load(at)
        s += added.to(s.dtype) * LOG2E
    if F.MASK or GUARDED:
        s = tl.where(seen, s, float("-inf"))
    return s


@triton.jit
def block_scores(s, block, cols, col_start, valid, MASKED: tl.constexpr, F: tl.constexpr):
    """What becomes of a block's scaled base-2 scores against the keys `cols`, and the soft cap's tanh."""
    s, t = softcap_and_alibi(s, block.rows[:, None], cols[None, :], block.shift, block.slope, block.softcap, F)
    seen = valid[None, :]
    if MASKED:
        end = tl.where(block.rows < block.q_len, block.last, 0)
        seen = causal_window_mask(block.rows[:, None], cols[None, :], seen, end[:, None], block.low, block.high, F)
    s = apply_mask_and_bias(s, block.rows[:, None], cols[None, :], seen, block.mask, block.bias,
                            block.row_start, col_start, MASKED, F)  # fmt: skip
    return s, t
