"""Tile code shared by two kernels or more."""

import triton
import triton.language as tl

LN2 = 0.6931471805599453
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def tanh(x):
    y = x * x
    near = x * (1 + y * (-1 / 3 + y * (2 / 15 + y * (-17 / 315 + y * (62 / 2835)))))  # where the quotient cancels
    return tl.where(y < 0.0625, near, 2 / (1 + tl.exp2(x * (-2 * LOG2E))) - 1)


@triton.jit
def dropout_keep(seed, head, rows, col_start, threshold, BLOCK_COLS: tl.constexpr, TRANSPOSED: tl.constexpr):
    """Which elements of a [rows, BLOCK_COLS] tile (or its transpose) survive, as in `reference.dropout_keep`.

    One Philox-4x32-7 call makes four neighbouring columns; the first round runs on a row and a column, not on the tile.
    `col_start` and BLOCK_COLS are multiples of 4.
    """
    words = col_start // 4 + tl.arange(0, BLOCK_COLS // 4)
    if TRANSPOSED:
        r0, r1, r2, r3 = tl.philox(seed, words[:, None], head, rows[None, :], 0, 7)
        # [BLOCK_COLS / 4, rows, 2, 2]
        r = tl.permute(tl.join(tl.join(r0, r2), tl.join(r1, r3)), (0, 2, 3, 1))
        word = tl.reshape(r, (BLOCK_COLS, rows.shape[0]))
    else:
        r0, r1, r2, r3 = tl.philox(seed, words[None, :], head, rows[:, None], 0, 7)
        # [rows, BLOCK_COLS / 4, 2, 2]
        word = tl.reshape(tl.join(tl.join(r0, r2), tl.join(r1, r3)), (rows.shape[0], BLOCK_COLS))
    return (word >> 1).to(tl.int32) >= threshold


@triton.jit
def load_tile(
    ptr, rows, stride, cols, in_rows, D: tl.constexpr, BLOCK_D: tl.constexpr, BOUNDED: tl.constexpr,
    THREADS: tl.constexpr = 0,
):  # fmt: skip
    """Rows of a matrix with `D` contiguous columns, 0 outside. `BOUNDED` says that some rows may lie outside.

    In a loop, THREADS of the program, with rows from 0: a thread then keeps one offset instead of two registers for
    each of its 16-byte loads, which lie as many rows apart as all threads load at once.
    """
    if THREADS and not BOUNDED:
        APART: tl.constexpr = max(1, THREADS * 8 // BLOCK_D)
        ptr = ptr + (rows // APART * APART).to(tl.int64)[:, None] * stride
        offsets = (rows % APART)[:, None] * stride + cols[None, :]
    else:
        offsets = rows[:, None] * stride + cols[None, :]
    if BOUNDED and D < BLOCK_D:
        return tl.load(ptr + offsets, mask=in_rows[:, None] & (cols < D)[None, :], other=0.0)
    elif BOUNDED:
        return tl.load(ptr + offsets, mask=in_rows[:, None], other=0.0)
    elif D < BLOCK_D:
        return tl.load(ptr + offsets, mask=(cols < D)[None, :], other=0.0)
    else:
        return tl.load(ptr + offsets)


@triton.jit
def store_tile(ptr, value, rows, stride, cols, in_rows, D: tl.constexpr):
    """Store the rows that lie inside, `D` columns of each."""
    offsets = rows[:, None] * stride + cols[None, :]
    tl.store(ptr + offsets, value.to(ptr.dtype.element_ty), mask=in_rows[:, None] & (cols < D)[None, :])
