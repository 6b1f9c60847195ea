"""Layer normalisation over the trailing axes (arXiv:1607.06450), and RMS normalisation (arXiv:1910.07467).

For a row x of N elements, with means over the row:

    mean = mean(x)    rstd = (mean((x - mean)^2) + eps)^(-1/2)    xhat = (x - mean) rstd    y = weight xhat + bias

and in the backward, with g = weight dy:

    dx = rstd (g - mean(g) - xhat mean(g xhat))    dweight = sum over rows of dy xhat    dbias = sum over rows of dy

RMS normalisation is the same without CENTRE: mean and mean(g) are 0, and there is no bias.

A row of up to MAX_FWD (MAX_BWD) elements stays in registers and is read once. A longer one is read twice: the forward
merges the statistics of its tiles (Chan et al., 1979); the backward takes mean(g) and mean(g xhat) from a kernel of
their own. The sums over rows are kept in registers by a fixed number of programs and added up in a fixed order: same
input, same bits.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from tileformer.kernels import checks, device, random, reference
from tileformer.kernels.autograd import Function, KernelFunction, registered_forward
from tileformer.kernels.backend import choose
from tileformer.kernels.column_sums import add_parts, programs_for
from tileformer.kernels.double_backward import backward_function
from tileformer.kernels.launch import Launch, cdiv, pow2
from tileformer.kernels.rows import contiguous_like, row_flags, row_tile, rows_of
from tileformer.kernels.subclasses import by_parts, by_rows
from tileformer.kernels.tile_ops import dropout_keep

MAX_FWD = 16384
MAX_BWD = 8192


@triton.jit(do_not_specialize=["R", "threshold"])
def _layer_norm_fwd_kernel(
    x_ptr, weight_ptr, bias_ptr, residual_ptr, x_bias_ptr, seed_ptr, y_ptr, stats_ptr, total_ptr, x_stride,
    residual_stride, R, N, eps, threshold, keep_scale,
    CENTRE: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr, ADD: tl.constexpr, X_BIAS: tl.constexpr,
    WHOLE: tl.constexpr, FULL: tl.constexpr, ACC: tl.constexpr, ALIGN: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_R rows; mean and rstd to stats (2, R). WHOLE: a tile spans the row; FULL: and no more.

    ADD (of whole rows): what is normalised is total = residual + drop(x + x_bias). It drops if the threshold is above
    0: training and evaluation share a binary.
    """
    N = BLOCK_N if FULL else N // ALIGN * ALIGN
    x_stride = x_stride // ALIGN * ALIGN
    residual_stride = residual_stride // ALIGN * ALIGN
    rows = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    in_rows = rows < R
    cols = tl.arange(0, BLOCK_N)
    x_ptrs = x_ptr + rows[:, None] * x_stride
    y_ptrs = y_ptr + rows[:, None] * N
    if WHOLE:
        # [BLOCK_R, BLOCK_N]
        x = tl.load(x_ptrs + cols, mask=in_rows[:, None] & (cols < N), other=0.0).to(ACC)
        if X_BIAS:
            # [BLOCK_N]
            x += tl.load(x_bias_ptr + cols, mask=cols < N, other=0.0).to(ACC)
        if ADD:
            if threshold > 0:
                keep = dropout_keep(tl.load(seed_ptr), 0, rows.to(tl.int32), 0, threshold, BLOCK_N, False)
                x *= tl.where(keep, keep_scale, 0.0)
            residual_ptrs = residual_ptr + rows[:, None] * residual_stride
            # [BLOCK_R, BLOCK_N]
            x += tl.load(residual_ptrs + cols, mask=in_rows[:, None] & (cols < N), other=0.0).to(ACC)
            total_ptrs = total_ptr + rows[:, None] * N
            tl.store(total_ptrs + cols, x.to(total_ptr.dtype.element_ty), mask=in_rows[:, None] & (cols < N))
        mean = tl.sum(x, 1) / N if CENTRE else tl.zeros([BLOCK_R], ACC)
        centred = tl.where(cols < N, x - mean[:, None], 0.0)
        rstd = tl.rsqrt(tl.sum(centred * centred, 1) / N + eps)
        y = _scaled_and_shifted(centred * rstd[:, None], weight_ptr, bias_ptr, cols, N, WEIGHT, BIAS)
        tl.store(y_ptrs + cols, y.to(y_ptr.dtype.element_ty), mask=in_rows[:, None] & (cols < N))
    else:
        mean = tl.zeros([BLOCK_R], ACC)
        m2 = tl.zeros([BLOCK_R], ACC)
        for start in range(0, N, BLOCK_N):
            near = start + cols
            # [BLOCK_R, BLOCK_N]
            x = tl.load(x_ptrs + near, mask=in_rows[:, None] & (near < N), other=0.0).to(ACC)
            count = tl.minimum(N - start, BLOCK_N)
            tile_mean = tl.sum(x, 1) / count if CENTRE else tl.zeros([BLOCK_R], ACC)
            centred = tl.where(near < N, x - tile_mean[:, None], 0.0)
            delta = tile_mean - mean
            step = delta * (count / (start + count))  # delta * n_b / n
            mean += step
            m2 += tl.sum(centred * centred, 1) + delta * step * start
        rstd = tl.rsqrt(m2 / N + eps)
        last = (N - 1) // BLOCK_N * BLOCK_N
        for back in range(0, N, BLOCK_N):  # backwards: the last tiles are still in the cache
            near = last - back + cols
            # [BLOCK_R, BLOCK_N]
            x = tl.load(x_ptrs + near, mask=in_rows[:, None] & (near < N), other=0.0).to(ACC)
            xhat = (x - mean[:, None]) * rstd[:, None]
            y = _scaled_and_shifted(xhat, weight_ptr, bias_ptr, near, N, WEIGHT, BIAS)
            tl.store(y_ptrs + near, y.to(y_ptr.dtype.element_ty), mask=in_rows[:, None] & (near < N))
    tl.store(stats_ptr + rows, mean, mask=in_rows)
    tl.store(stats_ptr + R + rows, rstd, mask=in_rows)


@triton.jit
def _scaled_and_shifted(xhat, weight_ptr, bias_ptr, cols, N, WEIGHT: tl.constexpr, BIAS: tl.constexpr):
    y = xhat
    if WEIGHT:
        # [BLOCK_N]
        y = y * tl.load(weight_ptr + cols, mask=cols < N, other=0.0).to(y.dtype)
    if BIAS:
        # [BLOCK_N]
        y = y + tl.load(bias_ptr + cols, mask=cols < N, other=0.0).to(y.dtype)
    return y


@triton.jit
def _load_backward(dy_ptr, x_ptr, weight_ptr, stats_ptr, dy_stride, x_stride, rows, cols, R, N,
                   WEIGHT: tl.constexpr, ACC: tl.constexpr, more_ptr=None, more_stride=0):  # fmt: skip
    """dy, xhat, g = weight dy [rows, cols] (dy and g are 0 outside) and rstd [rows]. dy is the sum of two, if asked."""
    in_rows = rows < R
    inside = in_rows[:, None] & (cols < N)
    # [BLOCK_R, BLOCK_N]
    dy = tl.load(dy_ptr + rows[:, None] * dy_stride + cols, mask=inside, other=0.0).to(ACC)
    if more_ptr is not None:
        # [BLOCK_R, BLOCK_N]
        dy += tl.load(more_ptr + rows[:, None] * more_stride + cols, mask=inside, other=0.0).to(ACC)
    # [BLOCK_R, BLOCK_N]
    x = tl.load(x_ptr + rows[:, None] * x_stride + cols, mask=inside, other=0.0).to(ACC)
    # [BLOCK_R]
    mean = tl.load(stats_ptr + rows, mask=in_rows, other=0.0)
    rstd = tl.load(stats_ptr + R + rows, mask=in_rows, other=0.0)
    xhat = (x - mean[:, None]) * rstd[:, None]
    g = dy
    if WEIGHT:
        # [BLOCK_N]
        g = dy * tl.load(weight_ptr + cols, mask=cols < N, other=0.0).to(ACC)
    return dy, xhat, g, rstd


@triton.jit(do_not_specialize=["R"])
def _layer_norm_sums_kernel(
    dy_ptr, x_ptr, weight_ptr, stats_ptr, sums_ptr, dy_stride, x_stride, R, N,
    CENTRE: tl.constexpr, WEIGHT: tl.constexpr, ACC: tl.constexpr, ALIGN: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program: sum(g) / N and sum(g xhat) / N of BLOCK_R rows, to sums (2, R)."""
    N = N // ALIGN * ALIGN
    dy_stride = dy_stride // ALIGN * ALIGN
    x_stride = x_stride // ALIGN * ALIGN
    rows = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    sum_g = tl.zeros([BLOCK_R], ACC)
    sum_gx = tl.zeros([BLOCK_R], ACC)
    for start in range(0, N, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        dy, xhat, g, rstd = _load_backward(
            dy_ptr, x_ptr, weight_ptr, stats_ptr, dy_stride, x_stride, rows, cols, R, N, WEIGHT, ACC
        )
        if CENTRE:
            sum_g += tl.sum(g, 1)
        sum_gx += tl.sum(g * xhat, 1)
    if CENTRE:
        tl.store(sums_ptr + rows, sum_g / N, mask=rows < R)
    tl.store(sums_ptr + R + rows, sum_gx / N, mask=rows < R)


@triton.jit(do_not_specialize=["R", "threshold"])
def _layer_norm_bwd_kernel(
    dy_ptr, x_ptr, weight_ptr, stats_ptr, sums_ptr, more_ptr, seed_ptr, dx_ptr, dbranch_ptr, partial_ptr, dy_stride,
    x_stride, more_stride, R, N, threshold, keep_scale,
    CENTRE: tl.constexpr, WEIGHT: tl.constexpr, MORE: tl.constexpr, BRANCH: tl.constexpr, DROP: tl.constexpr,
    SUMS: tl.constexpr, WHOLE: tl.constexpr, ACC: tl.constexpr, ALIGN: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Program (i, j): tile j of the columns, in every G-th block of rows from the i-th.

    MORE: what is added, "dy" to dy or "dx" to the result, unless more_stride is below 0. BRANCH: the gradient of what
    was dropped and added to a residual, too. SUMS: whose sums over rows are wanted, 1 dweight, 2 dbias, 4 that of
    dbranch; their parts go to partial (G, sums, N).
    """
    N = N // ALIGN * ALIGN
    dy_stride = dy_stride // ALIGN * ALIGN
    x_stride = x_stride // ALIGN * ALIGN
    more_stride = more_stride // ALIGN * ALIGN
    pid = tl.program_id(0)
    cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    if SUMS:
        dweight = tl.zeros([BLOCK_R, BLOCK_N], ACC)
        dbias = tl.zeros([BLOCK_R, BLOCK_N], ACC)
        dx_bias = tl.zeros([BLOCK_R, BLOCK_N], ACC)
    for block in range(pid, tl.cdiv(R, BLOCK_R), tl.num_programs(0)):
        rows = block * BLOCK_R + tl.arange(0, BLOCK_R).to(tl.int64)
        if MORE == "dy":
            dy, xhat, g, rstd = _load_backward(
                dy_ptr, x_ptr, weight_ptr, stats_ptr, dy_stride, x_stride, rows, cols, R, N, WEIGHT, ACC,
                more_ptr, more_stride,
            )  # fmt: skip
        else:
            dy, xhat, g, rstd = _load_backward(
                dy_ptr, x_ptr, weight_ptr, stats_ptr, dy_stride, x_stride, rows, cols, R, N, WEIGHT, ACC
            )
        if WHOLE:
            mean_g = tl.sum(g, 1) / N if CENTRE else tl.zeros([BLOCK_R], ACC)
            mean_gx = tl.sum(g * xhat, 1) / N
        else:
            # [BLOCK_R]
            mean_g = tl.load(sums_ptr + rows, mask=rows < R, other=0.0) if CENTRE else tl.zeros([BLOCK_R], ACC)
            mean_gx = tl.load(sums_ptr + R + rows, mask=rows < R, other=0.0)
        dx = (g - mean_g[:, None] - xhat * mean_gx[:, None]) * rstd[:, None]
        inside = (rows < R)[:, None] & (cols < N)
        if MORE == "dx":  # noqa: SIM102
            if more_stride >= 0:
                # [BLOCK_R, BLOCK_N]
                dx += tl.load(more_ptr + rows[:, None] * more_stride + cols, mask=inside, other=0.0).to(ACC)
        tl.store(dx_ptr + rows[:, None] * N + cols, dx.to(dx_ptr.dtype.element_ty), mask=inside)
        if DROP:
            keep = dropout_keep(tl.load(seed_ptr), 0, rows.to(tl.int32), 0, threshold, BLOCK_N, False)
            dx *= tl.where(keep, keep_scale, 0.0)
        if BRANCH:
            tl.store(dbranch_ptr + rows[:, None] * N + cols, dx.to(dbranch_ptr.dtype.element_ty), mask=inside)
        if SUMS:
            dweight += dy * xhat
            dbias += dy
            dx_bias += tl.where(inside, dx, 0.0)
    if SUMS:
        partial_ptr += pid.to(tl.int64) * (SUMS % 2 + SUMS // 2 % 2 + SUMS // 4) * N
        if SUMS % 2:
            tl.store(partial_ptr + cols, tl.sum(dweight, 0), mask=cols < N)
            partial_ptr += N
        if SUMS // 2 % 2:
            tl.store(partial_ptr + cols, tl.sum(dbias, 0), mask=cols < N)
            partial_ptr += N
        if SUMS // 4:
            tl.store(partial_ptr + cols, tl.sum(dx_bias, 0), mask=cols < N)


@functools.lru_cache(maxsize=1024)
def fwd_launch(
    r: int, n: int, stride: int, centre: bool, weight: bool, bias: bool, eps: float, dtype: torch.dtype,
    residual_stride: int | None = None, x_bias: bool = False, p: float = 0.0,
) -> Launch:  # fmt: skip
    """The forward of `layer_norm`, or with a residual of `add_layer_norm`, whose kernel takes four tensors more."""
    full = n == pow2(n) and n <= MAX_FWD
    # Two long rows share a conversion of weight and bias; one for each row would take longer than the memory does.
    # Beside masks, more than 4096 columns leave no registers for it.
    two = 2048 < n <= (8192 if full else 4096)
    tile = row_tile(n, MAX_FWD, 2 * pow2(n) if two else 4096, 32)
    grid = lambda tile: (cdiv(r, tile["BLOCK_R"]) if n else 0,)  # noqa: E731
    add, beside = residual_stride is not None, residual_stride or stride
    if add:
        tile["BLOCK_N"] = max(4, tile["BLOCK_N"])  # a Philox call makes four columns
    flags = dict(CENTRE=centre, WEIGHT=weight, BIAS=bias, ADD=add, X_BIAS=x_bias, WHOLE=n <= MAX_FWD)
    flags |= dict(FULL=full and tile["BLOCK_N"] == n, **row_flags(dtype, n, stride, beside))
    scalars = (stride, beside, r, n, eps, random.threshold(p), random.keep_scale(p))
    alone = lambda x, weight, bias, y, stats: (x, weight, bias, x, x, x, y, stats, x)  # noqa: E731
    return Launch(_layer_norm_fwd_kernel, grid, flags, [tile], scalars, None if add else alone)


@functools.lru_cache(maxsize=1024)
def bwd_launches(
    r: int, n: int, dy_stride: int, x_stride: int, centre: bool, weight: bool, sums: int, most_programs: int,
    dtype: torch.dtype, more: str = "", more_stride: int | None = None, branch: bool | None = None, p: float = 0.0,
) -> tuple[int, Launch | None, Launch]:  # fmt: skip
    """Programs that share the rows; kernels of a long row's sums, and of dx. `sums`, `more` as the kernel's. `branch`
    is None for `layer_norm`, which has three tensors less; more_stride where there is no more."""
    # A third sum, beside dropout, wants registers: 16 bytes would spill on sm_100.
    tiles = [row_tile(n, MAX_BWD, 4096, 8 if sums > 3 and n <= 4096 else 16)]
    columns, whole = cdiv(n, tiles[0]["BLOCK_N"]), n <= MAX_BWD
    more_stride = -n if more_stride is None else more_stride
    programs = min(cdiv(r, tiles[0]["BLOCK_R"]), max(1, most_programs // max(columns, 1)))
    if p:
        tiles[0]["BLOCK_N"] = max(4, tiles[0]["BLOCK_N"])
    flags = dict(CENTRE=centre, WEIGHT=weight, **row_flags(dtype, n, x_stride, dy_stride, more_stride))
    sum_up = Launch(
        _layer_norm_sums_kernel, lambda tile: (cdiv(r, tile["BLOCK_R"]),), flags, tiles, (dy_stride, x_stride, r, n)
    )
    flags = dict(flags, MORE=more, BRANCH=bool(branch), DROP=p > 0.0, SUMS=sums, WHOLE=whole)
    scalars = (dy_stride, x_stride, more_stride, r, n, random.threshold(p), random.keep_scale(p))
    alone = lambda dy, x, weight, stats, sums, dx, parts: (dy, x, weight, stats, sums, dy, dy, dx, dx, parts)  # noqa: E731
    grid = lambda _: (programs, columns)  # noqa: E731
    main = Launch(_layer_norm_bwd_kernel, grid, flags, tiles, scalars, alone if branch is None else None)
    return programs, None if whole else sum_up, main


def _row_length(x: Tensor, axes: int) -> int:
    return x.shape[-1] if axes == 1 else math.prod(x.shape[-axes:])


def layer_norm_fwd(
    x: Tensor, axes: int, weight: Tensor | None, bias: Tensor | None, eps: float, centre: bool
) -> tuple[Tensor, Tensor]:
    """y like x, normalised over its last `axes` axes; mean (0 without `centre`) and rstd of each row (2, R)."""
    y, stats = _layer_norm_fwd_fake(x, axes)
    r, n = stats.shape[1], _row_length(x, axes)
    rows, stride = rows_of(x, n)
    run = fwd_launch(r, n, stride, centre, weight is not None, bias is not None, eps, x.dtype)
    run(rows, rows if weight is None else weight.contiguous(), rows if bias is None else bias.contiguous(), y, stats)
    return y, stats


def _layer_norm_fwd_fake(x: Tensor, axes: int, *_: Any) -> tuple[Tensor, Tensor]:
    stats = torch.empty(2, math.prod(x.shape[:-axes]), dtype=device.wider(x.dtype), device=x.device)
    return contiguous_like(x), stats


def layer_norm_bwd(
    dy: Tensor, x: Tensor, axes: int, weight: Tensor | None, bias: Tensor | None, stats: Tensor,
    need_dweight: bool, need_dbias: bool, eps: float, centre: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dx, dweight, dbias; the last two are empty where not needed. eps is for the second derivative alone."""
    dx, dweight, dbias = _layer_norm_bwd_fake(dy, x, axes, weight, bias, stats, need_dweight, need_dbias)
    r, n = stats.shape[1], _row_length(x, axes)
    (x, x_stride), (dy, dy_stride) = rows_of(x, n), rows_of(dy, n)
    wanted = need_dweight + 2 * need_dbias
    programs, sum_up, run = bwd_launches(
        r, n, dy_stride, x_stride, centre, weight is not None, wanted, programs_for(x), x.dtype
    )
    weight = x if weight is None else weight.contiguous()
    sums = parts = stats  # stand-ins that are not read
    if sum_up:
        sums = torch.empty_like(stats)
        sum_up(dy, x, weight, stats, sums)
    if wanted:
        parts = torch.empty((programs, need_dweight + need_dbias, n), dtype=stats.dtype, device=stats.device)
    run(dy, x, weight, stats, sums, dx, parts)
    if wanted:
        add_parts(parts, *[dweight] * need_dweight, *[dbias] * need_dbias)
    return dx, dweight, dbias


def _layer_norm_bwd_fake(
    dy: Tensor, x: Tensor, axes: int, weight: Tensor | None, bias: Tensor | None, stats: Tensor,
    need_dweight: bool, need_dbias: bool, *_: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    dweight = contiguous_like(weight) if need_dweight and weight is not None else x.new_empty((0,))
    dbias = contiguous_like(bias) if need_dbias and bias is not None else x.new_empty((0,))
    return contiguous_like(x), dweight, dbias


def _definition(x, axes, weight, bias, stats, need_dweight, need_dbias, eps, centre):
    shape = x.shape[-axes:]
    y = reference.layer_norm(x, shape, weight, bias, eps) if centre else reference.rms_norm(x, shape, weight, eps)
    return (y,)


class _LayerNorm(Function):
    """(y, stats); differentiable in x, weight and bias through y."""

    forward = registered_forward(layer_norm_fwd, _layer_norm_fwd_fake)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, ctx.axes, weight, bias, ctx.eps, ctx.centre = inputs
        ctx.save_for_backward(x, weight, bias, output[1])
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, dy, _):
        if dy is None:
            return None, None, None, None, None, None
        x, weight, bias, stats = ctx.saved_tensors
        _, _, need_dweight, need_dbias, *_ = ctx.needs_input_grad
        how = need_dweight, need_dbias, ctx.eps, ctx.centre
        dx, dweight, dbias = _layer_norm_backward(dy, x, ctx.axes, weight, bias, stats, *how)
        return dx, None, dweight if need_dweight else None, dbias if need_dbias else None, None, None


_layer_norm_forward = KernelFunction(layer_norm_fwd, _LayerNorm)
_backward = registered_forward(layer_norm_bwd, _layer_norm_bwd_fake)
_layer_norm_backward = KernelFunction(layer_norm_bwd, backward_function(_backward, _definition, primals=(1, 3, 4)))


def layer_norm(
    x: Tensor, normalized_shape: int | Sequence[int], weight: Tensor | None = None, bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:  # fmt: skip
    """(x - mean) / sqrt(variance + eps) * weight + bias over the last len(normalized_shape) axes of x.

    Args:
        x: (..., *normalized_shape) in float16, bfloat16 or float32 (float64 on the CPU's backends). A view is read in
            place if its rows are contiguous and evenly spaced; otherwise it is copied once.
        normalized_shape: sizes of the trailing axes that make a row; a number is the last axis alone.
        weight, bias: of normalized_shape, either or both; each, and its gradient, in any of x's dtypes.
        eps: a number, added to the variance.

    Returns:
        A tensor like x, in x's dtype (also under autocast).

    Raises:
        ValueError, TypeError: for shapes, dtypes or devices that do not fit.

    Source: Ba et al., arXiv:1607.06450; `tileformer.kernels.reference.layer_norm` is the definition.

    Example:
        >>> layer_norm(torch.tensor([[1.0, 2.0, 3.0]]), 3)
        tensor([[-1.2247,  0.0000,  1.2247]])
    """
    shape = _sizes(normalized_shape)
    if (type(x) is not Tensor or x.is_nested) and by_parts("layer_norm", x, len(shape)):
        call = lambda x, w, b: layer_norm(x, shape, w, b, eps)  # noqa: E731
        return by_rows("layer_norm", call, x, len(shape), (weight, bias))
    eps = _check("layer_norm", x, shape, weight, bias, eps)
    backend = choose("layer_norm", x)
    if backend == "reference":
        return reference.layer_norm(x, shape, weight, bias, eps)
    if backend == "torch":
        return _torch_norm(x, shape, weight, bias, eps, True)
    return _layer_norm_forward(x, len(shape), weight, bias, eps, True)[0]


def rms_norm(
    x: Tensor, normalized_shape: int | Sequence[int], weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last len(normalized_shape) axes of x.

    Arguments, result and errors as of `layer_norm`; eps None is float32's (float64's) machine epsilon, as in torch.
    All is computed in float32 or wider and rounded once (torch rounds to x's dtype before it multiplies by the weight).

    Source: Zhang and Sennrich, arXiv:1910.07467; `tileformer.kernels.reference.rms_norm` is the definition.

    Example:
        >>> rms_norm(torch.tensor([[3.0, 4.0]]), 2)
        tensor([[0.8485, 1.1314]])
    """
    shape = _sizes(normalized_shape)
    if (type(x) is not Tensor or x.is_nested) and by_parts("rms_norm", x, len(shape)):
        return by_rows("rms_norm", lambda x, w: rms_norm(x, shape, w, eps), x, len(shape), (weight,))
    eps = _check("rms_norm", x, shape, weight, None, eps)
    backend = choose("rms_norm", x)
    if backend == "reference":
        return reference.rms_norm(x, shape, weight, eps)
    if backend == "torch":
        return _torch_norm(x, shape, weight, None, eps, False)
    return _layer_norm_forward(x, len(shape), weight, None, eps, False)[0]


def _sizes(normalized_shape: Any) -> tuple[int, ...]:
    return tuple(normalized_shape) if hasattr(normalized_shape, "__iter__") else (normalized_shape,)


def _check(
    op: str, x: Tensor, shape: tuple[int, ...], weight: Tensor | None, bias: Tensor | None, eps: float | None
) -> float:
    """eps as a number, after raising for what does not fit."""
    if type(x) is not Tensor or x.dtype not in checks.FLOATING:
        checks.floating(op, x=x)
    default = eps is None and op == "rms_norm"
    eps = torch.finfo(device.wider(x.dtype)).eps if default else checks.number(op, "eps", eps)
    if not shape or x.shape[-len(shape) :] != shape:
        raise ValueError(f"{op}: normalized_shape {shape} must be the last axes of x, which has shape {tuple(x.shape)}")
    checks.fits(op, "weight", weight, x, shape)
    checks.fits(op, "bias", bias, x, shape)
    return eps


def _torch_norm(
    x: Tensor, shape: tuple[int, ...], weight: Tensor | None, bias: Tensor | None, eps: float, centre: bool
) -> Tensor:
    # torch wants one dtype, the widest; in half precision it rounds statistics, and sums of gradients.
    wide = functools.reduce(torch.promote_types, [p.dtype for p in (x, weight, bias) if p is not None], torch.float32)
    weight, bias = (None if p is None else p.to(wide) for p in (weight, bias))
    y = F.layer_norm(x.to(wide), shape, weight, bias, eps) if centre else F.rms_norm(x.to(wide), shape, weight, eps)
    return y.to(x.dtype)
