"""Dropout with an optional residual: y = residual + keep x / (1 - p).

Nothing is stored for the backward but the seed: keep is a function of (seed, row, column), with x seen as rows of its
last axis, so dx is the same kernel on dy. On the torch backend, where drawing costs more than storing, keep / (1 - p)
is stored.
"""

import functools
from typing import NoReturn

import torch
import triton
import triton.language as tl
from torch import Tensor

from tileformer.kernels import checks, random, reference
from tileformer.kernels.autograd import Function, KernelFunction, registered_forward
from tileformer.kernels.backend import choose
from tileformer.kernels.launch import Launch, cdiv
from tileformer.kernels.rows import row_flags, row_tile, rows_of
from tileformer.kernels.subclasses import by_rows, is_special, shard_seed
from tileformer.kernels.tile_ops import dropout_keep

MAX_TILE = 2048


@triton.jit(do_not_specialize=["R", "threshold"])
def _dropout_fwd_kernel(
    x_ptr, residual_ptr, seed_ptr, y_ptr, x_stride, residual_stride, R, N, threshold, keep_scale,
    RESIDUAL: tl.constexpr, ACC: tl.constexpr, ALIGN: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A program: BLOCK_R rows and BLOCK_N columns. One axis of programs: the others end at 65,535."""
    N = N // ALIGN * ALIGN
    x_stride = x_stride // ALIGN * ALIGN
    residual_stride = residual_stride // ALIGN * ALIGN
    n_cols = tl.cdiv(N, BLOCK_N)
    rows = tl.program_id(0) // n_cols * BLOCK_R + tl.arange(0, BLOCK_R)
    col_start = tl.program_id(0) % n_cols * BLOCK_N
    cols = col_start + tl.arange(0, BLOCK_N)
    inside = (rows < R)[:, None] & (cols < N)
    wide = rows.to(tl.int64)[:, None]
    keep = dropout_keep(tl.load(seed_ptr), 0, rows, col_start, threshold, BLOCK_N, False)
    # [BLOCK_R, BLOCK_N]
    x = tl.load(x_ptr + wide * x_stride + cols, mask=inside, other=0.0).to(ACC)
    y = x * tl.where(keep, keep_scale, 0.0)
    if RESIDUAL:
        # [BLOCK_R, BLOCK_N]
        y += tl.load(residual_ptr + wide * residual_stride + cols, mask=inside, other=0.0).to(ACC)
    tl.store(y_ptr + wide * N + cols, y.to(y_ptr.dtype.element_ty), mask=inside)


@functools.lru_cache(maxsize=1024)
def _launch(r: int, n: int, stride: int, residual_stride: int, residual: bool, p: float, dtype: torch.dtype) -> Launch:
    tile = row_tile(n, MAX_TILE, 2048, 16)
    tile["BLOCK_N"] = max(4, tile["BLOCK_N"])  # a Philox call makes four columns
    grid = lambda tile: (cdiv(r, tile["BLOCK_R"]) * cdiv(n, tile["BLOCK_N"]),)  # noqa: E731
    flags = dict(RESIDUAL=residual, **row_flags(dtype, n, stride, residual_stride))
    scalars = (stride, residual_stride, r, n, random.threshold(p), random.keep_scale(p))
    return Launch(_dropout_fwd_kernel, grid, flags, [tile], scalars)


def dropout_fwd(x: Tensor, residual: Tensor | None, seed: Tensor, p: float) -> Tensor:
    """residual + keep x / (1 - p), in the wider of their dtypes."""
    y = _dropout_fwd_fake(x, residual, seed, p)
    n = x.shape[-1]
    rows, stride = rows_of(x, n)
    other, other_stride = (rows, stride) if residual is None else rows_of(residual, n)
    _launch(x.numel() // max(n, 1), n, stride, other_stride, residual is not None, p, x.dtype)(rows, other, seed, y)
    return y


def _dropout_fwd_fake(x: Tensor, residual: Tensor | None, seed: Tensor, p: float) -> Tensor:
    dtype = None if residual is None else torch.promote_types(x.dtype, residual.dtype)
    return torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)


class _Dropout(Function):
    """y; its gradient for x is itself on dy, so every derivative is fused."""

    forward = registered_forward(dropout_fwd, _dropout_fwd_fake)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, residual, seed, ctx.p = inputs
        ctx.dtypes = x.dtype, None if residual is None else residual.dtype
        ctx.save_for_backward(seed)

    @staticmethod
    def backward(ctx, dy):
        (seed,) = ctx.saved_tensors
        x_dtype, residual_dtype = ctx.dtypes
        dx = _drop(dy.to(x_dtype), None, seed, ctx.p) if ctx.needs_input_grad[0] else None
        dresidual = dy.to(residual_dtype) if ctx.needs_input_grad[1] else None
        return dx, dresidual, None, None


_drop = KernelFunction(dropout_fwd, _Dropout)


def dropout(
    x: Tensor, p: float, *, seed: Tensor | int | None = None, residual: Tensor | None = None, **wrong: NoReturn
) -> Tensor:
    """residual + drop(x): each element of x is 0 with probability p and else divided by 1 - p.

    Args:
        x: (..., N) in float16, bfloat16 or float32 (float64 on the CPU's backends). A view is read in place if its
            rows are contiguous and evenly spaced; otherwise it is copied once.
        p: from 0 (nothing is drawn, and without a residual x itself is returned) to 1 (everything is dropped).
            Applied as given: a module passes 0 in evaluation.
        seed: an integer, or an int64 tensor with one element on x's device, for reproducible bits; drawn from torch's
            generator when None.
        residual: of x's shape, added after dropping.

    Returns:
        A tensor of x's shape, in x's dtype, or the wider one if the residual has another. The same seed drops the
        same elements on the triton, interpret and reference backends; the torch backend has its own generator
        (`random.fast_keep`).

    Raises:
        ValueError, TypeError: for shapes, dtypes, devices or a rate that do not fit.

    Source: Philox-4x32-7 (Salmon et al., SC 2011); `tileformer.kernels.reference.dropout` is the definition.

    Example:
        >>> x = torch.ones(4, 8)
        >>> torch.equal(dropout(x, 0.5, seed=1), dropout(x, 0.5, seed=1))
        True
    """
    if wrong:
        checks.misnamed("dropout", wrong)
    if (type(x) is not Tensor or x.is_nested) and is_special(x):
        own = shard_seed(x, seed)
        return by_rows("dropout", lambda x, r: dropout(x, p, seed=own, residual=r), x, 0, beside=(residual,))
    if type(x) is not Tensor or x.dtype not in checks.FLOATING:
        checks.floating("dropout", x=x)
    checks.fits("dropout", "residual", residual, x, x.shape)
    p = checks.number("dropout", "p", p)
    seed = checks.seeded("dropout", seed, x.device)
    checks.rate("dropout", p, seed, x)
    if x.dim() == 0:
        raise ValueError("dropout: x has no axis: give it one, for example with x[None]")
    backend = choose("dropout", x)
    if p == 0.0:
        return x if residual is None else residual + x
    checks.not_traced("dropout")
    if seed is None:
        seed = random.new_seed(x.device)
    if backend == "reference":
        return reference.dropout(x, p, seed=seed, residual=residual)
    if backend == "torch":
        # A scale of float32 would be rounded in half precision: there it waits for the product.
        scale, late = random.keep_scale(p), x.dtype.itemsize == 2
        keep = random.fast_keep(seed, x.shape, p, 1.0 if late else scale, x.dtype)
        if residual is not None:
            return torch.addcmul(residual, x, keep, value=scale if late else 1)
        return x * keep * scale if late else x * keep
    return _drop(x, residual, seed, p)
