"""A branch and its residual, added and normalised in one pass: total = residual + drop(x + x_bias), y = norm(total).

Between two sublayers a decoder adds the bias of a linear map, drops, adds the residual and normalises. One pass reads x
and the residual and writes y and the total, which is all that the backward needs beside the seed; that reads the total
and the gradients of both results, and writes those of x and the residual, and the sums over rows of the parameters'.
The kernels are those of `layer_norm`, which says what they compute.
"""

from typing import Any, NoReturn

import torch
from torch import Tensor

from tileformer.kernels import checks, random, reference
from tileformer.kernels.autograd import Function, KernelFunction, registered_forward
from tileformer.kernels.backend import choose
from tileformer.kernels.column_sums import add_parts, programs_for
from tileformer.kernels.device import wider
from tileformer.kernels.dropout import _drop, dropout
from tileformer.kernels.layer_norm import MAX_BWD, _layer_norm_backward, bwd_launches, fwd_launch, layer_norm, rms_norm
from tileformer.kernels.rows import contiguous_like, rows_of


def add_norm_fwd(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, x_bias: Tensor | None,
    seed: Tensor | None, p: float, eps: float, centre: bool, norm_first: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """y, total, and mean (0 without `centre`) and rstd of each row (2, R)."""
    y, total, stats = _add_norm_fwd_fake(x, residual, weight, bias, x_bias, seed, p, eps, centre, norm_first)
    n = x.shape[-1]
    (x, stride), (residual, residual_stride) = rows_of(x, n), rows_of(residual, n)
    run = fwd_launch(
        stats.shape[1], n, stride, centre, weight is not None, bias is not None, eps, x.dtype, residual_stride,
        x_bias is not None, p,
    )  # fmt: skip
    weight, bias, x_bias = (x if param is None else param.contiguous() for param in (weight, bias, x_bias))
    run(x, weight, bias, residual, x_bias, random.given(seed, x), y, stats, total)
    return y, total, stats


def _add_norm_fwd_fake(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, x_bias: Tensor | None,
    seed: Tensor | None, p: float, eps: float, centre: bool, norm_first: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    total = contiguous_like(x, dtype=torch.promote_types(x.dtype, residual.dtype))
    stats = torch.empty(2, x.numel() // max(x.shape[-1], 1), dtype=wider(x.dtype), device=x.device)
    return contiguous_like(x if norm_first else total), total, stats


def add_norm_bwd(
    dy: Tensor, more: Tensor | None, total: Tensor, weight: Tensor | None, bias: Tensor | None, x_bias: Tensor | None,
    seed: Tensor | None, stats: Tensor, p: float, centre: bool, more_is: str, x_dtype: torch.dtype,
    residual_dtype: torch.dtype, need_dx: bool, need_dweight: bool, need_dbias: bool, need_dx_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """dresidual, dx, dweight, dbias, dx_bias; empty where not needed; dx too where it is dresidual."""
    grads = _add_norm_bwd_fake(
        dy, more, total, weight, bias, x_bias, seed, stats, p, centre, more_is, x_dtype, residual_dtype, need_dx,
        need_dweight, need_dbias, need_dx_bias,
    )  # fmt: skip
    dresidual, dx, *params = grads
    n, wanted = total.shape[-1], need_dweight + 2 * need_dbias + 4 * need_dx_bias
    (dy, stride), (more, more_stride) = rows_of(dy, n), (total, None) if more is None else rows_of(more, n)
    programs, _, run = bwd_launches(
        stats.shape[1], n, stride, n, centre, weight is not None, wanted, programs_for(dy), total.dtype, more_is,
        more_stride, dx.numel() > 0, p,
    )  # fmt: skip
    parts = torch.empty((programs, wanted.bit_count(), n), dtype=stats.dtype, device=stats.device)
    weight, dbranch = dy if weight is None else weight.contiguous(), dx if dx.numel() else dresidual
    run(dy, total, weight, stats, stats, more, random.given(seed, dy), dresidual, dbranch, parts)
    if wanted:
        add_parts(parts, *[grad for grad in params if grad.numel()])
    return grads


def _add_norm_bwd_fake(
    dy: Tensor, more: Tensor | None, total: Tensor, weight: Tensor | None, bias: Tensor | None, x_bias: Tensor | None,
    seed: Tensor | None, stats: Tensor, p: float, centre: bool, more_is: str, x_dtype: torch.dtype,
    residual_dtype: torch.dtype, need_dx: bool, *needed: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    differs = p > 0.0 or x_dtype != residual_dtype
    dx = contiguous_like(total, dtype=x_dtype) if need_dx and differs else total.new_empty((0,), dtype=x_dtype)
    dweight, dbias, dx_bias = (
        contiguous_like(param) if need and param is not None else total.new_empty((0,))
        for param, need in zip((weight, bias, x_bias), needed, strict=True)
    )
    return contiguous_like(total, dtype=residual_dtype), dx, dweight, dbias, dx_bias


class _AddNormBackward(Function):
    """Only called where nobody differentiates it: `_gradients` has pieces for that."""

    forward = registered_forward(add_norm_bwd, _add_norm_bwd_fake)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass


class _AddNorm(Function):
    """(y, total, stats); differentiable in x, residual and the parameters through y and total."""

    forward = registered_forward(add_norm_fwd, _add_norm_fwd_fake)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, residual, weight, bias, x_bias, seed, ctx.p, ctx.eps, ctx.centre, _ = inputs
        ctx.save_for_backward(output[1], weight, bias, x_bias, seed, output[2])
        ctx.dtypes = x.dtype, residual.dtype
        ctx.mark_non_differentiable(output[2])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, dy, dtotal, _):
        return _gradients(ctx, dy, None, dtotal)


class _AddNormTwice(torch.autograd.Function):
    """(y, y, total): for who normalises last, and hands y on as a branch's input and as the next residual. The two
    gradients come in apart, and no pass adds them up."""

    @staticmethod
    def forward(ctx, *args):
        y, total, stats = add_norm_fwd(*args)
        _AddNorm.setup_context(ctx, args, (y, total, stats))
        return y, y.view_as(y), total, stats

    @staticmethod
    def backward(ctx, dy, again, dtotal, _):
        return _gradients(ctx, again if dy is None else dy, None if dy is None else again, dtotal)


def _gradients(ctx, dy, again, dtotal):
    total, weight, bias, x_bias, seed, stats = ctx.saved_tensors
    need_dx, need_dresidual, need_dweight, need_dbias, need_dx_bias, *_ = ctx.needs_input_grad
    x_dtype, residual_dtype = ctx.dtypes
    if dy is None and dtotal is None:
        return (None,) * 10
    if torch.is_grad_enabled() or dy is None:  # to be differentiated again: of pieces that can be
        dx, dweight, dbias = 0.0, None, None
        if dy is not None:
            dy = dy if again is None else dy + again
            grads = _layer_norm_backward(
                dy.to(total.dtype), total, 1, weight, bias, stats, need_dweight, need_dbias, ctx.eps, ctx.centre
            )
            dx, dweight, dbias = grads[0], grads[1] if need_dweight else None, grads[2] if need_dbias else None
        dresidual = dx if dtotal is None else dx + dtotal
        dx = _drop(dresidual, None, seed, ctx.p) if ctx.p else dresidual
        dx_bias = dx.flatten(0, -2).sum(0, dtype=wider(dx.dtype)).to(x_bias.dtype) if need_dx_bias else None
        return dx.to(x_dtype), dresidual.to(residual_dtype), dweight, dbias, dx_bias, *(None,) * 5
    if again is not None and dtotal is not None:
        dy, again = dy + again, None
    more, more_is = (again, "dy") if again is not None else (dtotal, "dx")
    dresidual, dx, dweight, dbias, dx_bias = _backward(
        dy, more, total, weight, bias, x_bias, seed, stats, ctx.p, ctx.centre, more_is, x_dtype, residual_dtype,
        need_dx, need_dweight, need_dbias, need_dx_bias,
    )  # fmt: skip
    dx = dx if ctx.p or x_dtype != residual_dtype else dresidual
    wanted = (need_dx, dx), (need_dresidual, dresidual), (need_dweight, dweight), (need_dbias, dbias)
    return *(grad if need else None for need, grad in (*wanted, (need_dx_bias, dx_bias))), *(None,) * 5


_backward = KernelFunction(add_norm_bwd, _AddNormBackward)
_add_norm_forward = KernelFunction(add_norm_fwd, _AddNorm)
_add_norm_forward_twice = KernelFunction(add_norm_fwd, _AddNorm, tracked=_AddNormTwice)


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5, *,
    x_bias: Tensor | None = None, p: float = 0.0, seed: Tensor | int | None = None, norm_first: bool = True,
    **wrong: NoReturn,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """total = residual + drop(x + x_bias), and y = layer_norm(total) over the last axis, in one pass.

    Args:
        x: (..., N), what a branch gives, in float16, bfloat16 or float32 (float64 on the CPU's backends).
        residual: of x's shape; in float32, beside an x of 16 bits, the residual stream stays in float32.
        weight, bias: (N,), of the norm, either or both, in any of x's dtypes.
        eps: a number, added to the variance.
        x_bias: (N,), of the linear map that x comes from, which then runs without it.
        p, seed: the rate of dropout and its seed, as of `dropout`.
        norm_first: which residual the next block gets.

    Returns:
        y and the next residual. With norm_first, y in x's dtype, and the total, in the wider dtype of x and residual;
        else y twice, in the wider dtype: pass the second on as the residual, and the backward adds the two gradients
        up without a pass of its own. All is computed in float32 or wider; y is rounded once, from the exact total.

    Raises:
        ValueError, TypeError: for shapes, dtypes, devices or a rate that do not fit.

    Source: Vaswani et al. 2017, section 3.1; `tileformer.kernels.reference.add_layer_norm` is the definition.

    Example:
        >>> y, total = add_layer_norm(torch.tensor([[1.0, 2.0]]), torch.tensor([[2.0, 3.0]]))
        >>> y, total
        (tensor([[-1.0000,  1.0000]]), tensor([[3., 5.]]))
    """
    if wrong:
        checks.misnamed("add_layer_norm", wrong)
    return add_norm("add_layer_norm", x, residual, weight, bias, eps, x_bias, p, seed, norm_first)[:2]


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None = None, eps: float | None = None, *,
    x_bias: Tensor | None = None, p: float = 0.0, seed: Tensor | int | None = None, norm_first: bool = True,
    **wrong: NoReturn,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """total = residual + drop(x + x_bias), and y = rms_norm(total) over the last axis, in one pass.

    Arguments, results and errors as of `add_layer_norm`; eps None is the machine epsilon of float32 (of float64).
    `tileformer.kernels.reference.add_rms_norm` is the definition.

    Example:
        >>> add_rms_norm(torch.tensor([[1.0, 1.0]]), torch.tensor([[2.0, 3.0]]))[0]
        tensor([[0.8485, 1.1314]])
    """
    if wrong:
        checks.misnamed("add_rms_norm", wrong)
    return add_norm("add_rms_norm", x, residual, weight, None, eps, x_bias, p, seed, norm_first)[:2]


def add_norm(
    op: str, x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float | None,
    x_bias: Tensor | None, p: float, seed: Any, norm_first: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`add_layer_norm` or `add_rms_norm`, by name, and the total, which the backward keeps."""
    checks.floating(op, x=x)
    centre, special = op == "add_layer_norm", type(x) is not Tensor or x.is_nested
    eps = torch.finfo(wider(x.dtype)).eps if eps is None and not centre else checks.number(op, "eps", eps)
    p = checks.number(op, "p", p)
    if x.dim() == 0:
        raise ValueError(f"{op}: x has no axis: give it one, for example with x[None]")
    if not special:
        checks.fits(op, "residual", residual, x, x.shape)
        for name, param in (("weight", weight), ("bias", bias), ("x_bias", x_bias)):
            checks.fits(op, name, param, x, x.shape[-1:])
        seed = checks.seeded(op, seed, x.device)
        checks.rate(op, p, seed, x)
    backend = choose(op, x)
    options: dict[str, Any] = dict(eps=eps, x_bias=x_bias, p=p, norm_first=norm_first)
    if backend == "torch" or special or not 0 < x.shape[-1] <= MAX_BWD:
        wide = torch.promote_types(torch.promote_types(x.dtype, residual.dtype), torch.float32)
        branch = x.to(wide) if x_bias is None else x.to(wide) + x_bias.to(wide)
        total = dropout(branch, p, seed=seed, residual=residual.to(wide))
        y = layer_norm(total, x.shape[-1:], weight, bias, eps) if centre else rms_norm(total, x.shape[-1:], weight, eps)
        stream = torch.promote_types(x.dtype, residual.dtype)
        y, total = y.to(x.dtype if norm_first else stream), total.to(stream)
        return y, total if norm_first else y, total
    if p > 0.0:
        checks.not_traced(op)
        seed = random.new_seed(x.device) if seed is None else seed
    if backend == "reference":
        define = reference.add_layer_norm if centre else reference.add_rms_norm
        y, second = define(x, residual, weight, *((bias,) if centre else ()), seed=seed, **options)
        return y, second, second
    forward: Any = _add_norm_forward if norm_first else _add_norm_forward_twice
    y, *again, total, _ = forward(x, residual, weight, bias, x_bias, seed, p, eps, centre, norm_first)
    return y, total if norm_first else again[0] if again else y, total
