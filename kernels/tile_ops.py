"""Tile code shared by two kernels or more."""

import triton
import triton.language as tl

LN2 = 0.6931471805599453


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
def load_tile(ptr, rows, stride, cols, in_rows, D: tl.constexpr, BLOCK_D: tl.constexpr, BOUNDED: tl.constexpr):
    """Rows of a matrix with `D` contiguous columns, 0 outside. `BOUNDED` says that some rows may lie outside."""
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


@triton.jit
def activated(z, ACTIVATION: tl.constexpr):
    """The activation of z and its derivative. gelu: z Phi(z), Phi of the normal distribution, or with a tanh for Phi
    (arXiv:1606.08415); silu: z sigmoid(z)."""
    if ACTIVATION == "relu":
        return tl.where(z < 0.0, 0.0, z), tl.where(z <= 0.0, 0.0, 1.0)  # a NaN is one, as torch has it
    elif ACTIVATION == "gelu":
        phi = 0.5 * (1.0 + tl.erf(z * 0.7071067811865476))
        return z * phi, phi + z * tl.exp(-0.5 * z * z) * 0.3989422804014327
    elif ACTIVATION == "gelu_tanh":  # (1 + tanh(u)) / 2 = sigmoid(2 u)
        phi = 1.0 / (1.0 + tl.exp(-1.5957691216057308 * (z + 0.044715 * z * z * z)))
        return z * phi, phi + z * phi * (1.0 - phi) * 1.5957691216057308 * (1.0 + 0.134145 * z * z)
    else:
        tl.static_assert(ACTIVATION == "silu")
        phi = 1.0 / (1.0 + tl.exp(-z))
        return z * phi, phi + z * phi * (1.0 - phi)
