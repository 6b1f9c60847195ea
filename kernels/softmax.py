"""Softmax and its logarithm over the last axis, with a scale and masks, s = scale x + mask:

    y = softmax(s)                        dx = scale y (dy - sum(y dy))
    y = s - log(sum(exp(s)))              dx = scale (dy - exp(y) sum(dy))

A row of up to MAX_FWD (MAX_BWD) elements stays in registers and is read once. A longer one is read twice: a running
maximum and sum first (Milakov and Gimelshein, arXiv:1805.02867), then, from the end that is still in the cache, the
result. The backward needs y alone, and so does a second derivative: neither x nor the mask is kept.
"""

import functools
import math
from typing import NoReturn

import torch
import triton
import triton.language as tl
from torch import Tensor

from tileformer.kernels import checks, reference
from tileformer.kernels.autograd import Function, KernelFunction, registered_forward
from tileformer.kernels.backend import choose
from tileformer.kernels.launch import Launch, cdiv
from tileformer.kernels.rows import contiguous_like, row_flags, row_tile, rows_of
from tileformer.kernels.subclasses import by_parts, by_rows

MAX_FWD = 32768
MAX_BWD = 16384


@triton.jit
def _scores(x_ptrs, mask_ptrs, mask_stride, last_seen, in_rows, cols, scale, T_k,
            CAUSAL: tl.constexpr, MASK: tl.constexpr, ACC: tl.constexpr):  # fmt: skip
    """scale x + mask [rows, cols], -inf where hidden or outside. MASK: 0 none, 1 boolean (uint8), 2 additive."""
    seen = in_rows[:, None] & (cols < T_k)
    if CAUSAL:
        seen = seen & (cols // 8 * 8 <= last_seen[:, None])  # in eights, so that loads stay vectors
    # [BLOCK_R, BLOCK_N]
    s = tl.load(x_ptrs + cols, mask=seen, other=0.0).to(ACC) * scale
    if MASK == 1:
        seen = seen & (tl.load(mask_ptrs + cols * mask_stride, mask=seen, other=0) != 0)
    elif MASK == 2:
        s += tl.load(mask_ptrs + cols * mask_stride, mask=seen, other=0.0).to(ACC)
    if CAUSAL:
        seen = seen & (cols <= last_seen[:, None])
    return tl.where(seen, s, float("-inf"))


@triton.jit
def _finite_max(m):
    """What to subtract from a row: its maximum, or 0 where nothing is seen, so that 2^(-inf - 0) is 0 and not NaN."""
    return tl.where(m == float("-inf"), 0.0, m)


@triton.jit(do_not_specialize=["R", "H", "T_q", "causal_shift"])
def _softmax_fwd_kernel(
    x_ptr, mask_ptr, y_ptr, x_stride, mask_strides, R, H, T_q, T_k, causal_shift, scale,
    LOG: tl.constexpr, CAUSAL: tl.constexpr, MASK: tl.constexpr, WHOLE: tl.constexpr, ACC: tl.constexpr,
    ALIGN: tl.constexpr, MASK_ALIGN: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_R of the R = B H T_q rows. WHOLE: a tile spans the row. LOG: the logarithm of the softmax."""
    T_k = T_k // ALIGN * ALIGN
    x_stride = x_stride // ALIGN * ALIGN
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    in_rows = rows < R
    rows_q = rows % T_q
    last_seen = rows_q + causal_shift
    b = (rows // T_q // H).to(tl.int64)
    h = (rows // T_q % H).to(tl.int64)
    cols = tl.arange(0, BLOCK_N)
    x_ptrs = x_ptr + rows.to(tl.int64)[:, None] * x_stride
    y_ptrs = y_ptr + rows.to(tl.int64)[:, None] * T_k
    mask_rows = b * mask_strides[0] + h * mask_strides[1] + rows_q.to(tl.int64) * mask_strides[2]
    mask_ptrs = mask_ptr + (mask_rows // MASK_ALIGN * MASK_ALIGN)[:, None]
    if WHOLE:
        # [BLOCK_R, BLOCK_N]
        s = _scores(x_ptrs, mask_ptrs, mask_strides[3], last_seen, in_rows, cols, scale, T_k, CAUSAL, MASK, ACC)
        row_max = _finite_max(tl.max(s, 1))
        p = tl.exp(s - row_max[:, None])
        total = tl.sum(p, 1)
        total = tl.where(total == 0.0, 1.0, total)  # nothing is seen
        if LOG:
            y = s - (row_max + tl.log(total))[:, None]
        else:
            y = p * (1.0 / total)[:, None]
        tl.store(y_ptrs + cols, y.to(y_ptr.dtype.element_ty), mask=in_rows[:, None] & (cols < T_k))
    else:
        m = tl.full([BLOCK_R], float("-inf"), ACC)
        total = tl.zeros([BLOCK_R], ACC)
        for start in range(0, T_k, BLOCK_N):
            near = start + cols
            # [BLOCK_R, BLOCK_N]
            s = _scores(x_ptrs, mask_ptrs, mask_strides[3], last_seen, in_rows, near, scale, T_k, CAUSAL, MASK, ACC)
            m_new = tl.maximum(m, tl.max(s, 1))
            row_max = _finite_max(m_new)
            total = total * tl.exp(m - row_max) + tl.sum(tl.exp(s - row_max[:, None]), 1)
            m = m_new
        row_max = _finite_max(m)
        total = tl.where(total == 0.0, 1.0, total)
        inverse = 1.0 / total
        log_sum = row_max + tl.log(total)
        last = (T_k - 1) // BLOCK_N * BLOCK_N
        for back in range(0, T_k, BLOCK_N):  # backwards: the last tiles are still in the cache
            near = last - back + cols
            # [BLOCK_R, BLOCK_N]
            s = _scores(x_ptrs, mask_ptrs, mask_strides[3], last_seen, in_rows, near, scale, T_k, CAUSAL, MASK, ACC)
            if LOG:
                y = s - log_sum[:, None]
            else:
                y = tl.exp(s - row_max[:, None]) * inverse[:, None]
            tl.store(y_ptrs + near, y.to(y_ptr.dtype.element_ty), mask=in_rows[:, None] & (near < T_k))


@triton.jit(do_not_specialize=["R"])
def _softmax_bwd_kernel(
    dy_ptr, y_ptr, dx_ptr, dy_stride, y_stride, R, N, scale,
    LOG: tl.constexpr, WHOLE: tl.constexpr, ACC: tl.constexpr, ALIGN: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_R rows. LOG: y is a logarithm, and what is -inf neither gives nor takes a gradient."""
    N = N // ALIGN * ALIGN
    dy_stride = dy_stride // ALIGN * ALIGN
    y_stride = y_stride // ALIGN * ALIGN
    rows = (tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)
    in_rows = (rows < R)[:, None]
    cols = tl.arange(0, BLOCK_N)
    dy_ptrs = dy_ptr + rows[:, None] * dy_stride
    y_ptrs = y_ptr + rows[:, None] * y_stride
    dx_ptrs = dx_ptr + rows[:, None] * N
    if WHOLE:
        # [BLOCK_R, BLOCK_N]
        dy = tl.load(dy_ptrs + cols, mask=in_rows & (cols < N), other=0.0).to(ACC)
        y = tl.load(y_ptrs + cols, mask=in_rows & (cols < N), other=0.0).to(ACC)
        if LOG:
            dy = tl.where(y == float("-inf"), 0.0, dy)
            dx = (dy - tl.exp(y) * tl.sum(dy, 1)[:, None]) * scale
        else:
            dx = y * (dy - tl.sum(y * dy, 1)[:, None]) * scale
        tl.store(dx_ptrs + cols, dx.to(dx_ptr.dtype.element_ty), mask=in_rows & (cols < N))
    else:
        total = tl.zeros([BLOCK_R], ACC)
        for start in range(0, N, BLOCK_N):
            near = start + cols
            # [BLOCK_R, BLOCK_N]
            dy = tl.load(dy_ptrs + near, mask=in_rows & (near < N), other=0.0).to(ACC)
            y = tl.load(y_ptrs + near, mask=in_rows & (near < N), other=0.0).to(ACC)
            if LOG:
                total += tl.sum(tl.where(y == float("-inf"), 0.0, dy), 1)
            else:
                total += tl.sum(y * dy, 1)
        last = (N - 1) // BLOCK_N * BLOCK_N
        for back in range(0, N, BLOCK_N):
            near = last - back + cols
            # [BLOCK_R, BLOCK_N]
            dy = tl.load(dy_ptrs + near, mask=in_rows & (near < N), other=0.0).to(ACC)
            y = tl.load(y_ptrs + near, mask=in_rows & (near < N), other=0.0).to(ACC)
            if LOG:
                dx = (tl.where(y == float("-inf"), 0.0, dy) - tl.exp(y) * total[:, None]) * scale
            else:
                dx = y * (dy - total[:, None]) * scale
            tl.store(dx_ptrs + near, dx.to(dx_ptr.dtype.element_ty), mask=in_rows & (near < N))


@functools.lru_cache(maxsize=1024)
def _fwd_launch(
    shape: tuple[int, ...], stride: int, mask_strides: tuple[int, ...], mask_kind: int, causal_shift: int | None,
    scale: float, log: bool, dtype: torch.dtype,
) -> Launch:  # fmt: skip
    h, t_q, t_k = (1, 1, 1, *shape)[-3:]
    r, causal = math.prod(shape[:-1]) if t_k else 0, causal_shift is not None
    grid = lambda tile: (cdiv(r, tile["BLOCK_R"]),)  # noqa: E731
    flags = dict(LOG=log, CAUSAL=causal, MASK=mask_kind, WHOLE=t_k <= MAX_FWD, **row_flags(dtype, t_k, stride))
    flags["MASK_ALIGN"] = 8 if math.gcd(16, *mask_strides[:3]) == 8 else 1  # 16 divides: Triton sees it
    scalars = (stride, mask_strides, r, h, t_q, t_k, causal_shift or 0, scale)
    return Launch(_softmax_fwd_kernel, grid, flags, [row_tile(t_k, MAX_FWD, 2048, 16)], scalars)


@functools.lru_cache(maxsize=1024)
def _bwd_launch(
    shape: tuple[int, ...], dy_stride: int, y_stride: int, scale: float, log: bool, dtype: torch.dtype
) -> Launch:
    n = shape[-1]
    r = math.prod(shape[:-1]) if n else 0
    grid = lambda tile: (cdiv(r, tile["BLOCK_R"]),)  # noqa: E731
    flags = dict(LOG=log, WHOLE=n <= MAX_BWD, **row_flags(dtype, n, dy_stride, y_stride))
    scalars = (dy_stride, y_stride, r, n, scale)
    return Launch(_softmax_bwd_kernel, grid, flags, [row_tile(n, MAX_BWD, 2048, 16)], scalars)


def softmax_fwd(x: Tensor, mask: Tensor | None, causal_shift: int | None, scale: float, log: bool) -> Tensor:
    """softmax(scale x + mask), or its logarithm, of x (..., T_q, T_k) or (T_k,); mask (B, H, T_q, T_k)."""
    y = contiguous_like(x)
    rows, stride = rows_of(x, x.shape[-1])
    if mask is None:
        _fwd_launch(x.shape, stride, (0, 0, 0, 0), 0, causal_shift, scale, log, x.dtype)(rows, rows, y)
    else:
        if mask.stride(-1) * mask.shape[-1] >= 2**31:  # the kernel counts columns in 32 bits
            mask = mask.contiguous()
        boolean = mask.dtype == torch.bool
        run = _fwd_launch(x.shape, stride, mask.stride(), 1 if boolean else 2, causal_shift, scale, log, x.dtype)
        run(rows, mask.view(torch.uint8) if boolean else mask, y)
    return y


def softmax_bwd(dy: Tensor, y: Tensor, scale: float, log: bool) -> Tensor:
    """scale y (dy - sum(y dy)) over the last axis; of the logarithm, scale (dy - exp(y) sum(dy))."""
    dx = contiguous_like(y)
    n = y.shape[-1]
    (dy_rows, dy_stride), (y_rows, y_stride) = rows_of(dy, n), rows_of(y, n)
    _bwd_launch(y.shape, dy_stride, y_stride, scale, log, y.dtype)(dy_rows, y_rows, dx)
    return dx


class _Softmax(Function):
    """y; differentiable in x."""

    forward = registered_forward(softmax_fwd, contiguous_like)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.scale, ctx.log = inputs[3:]
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx, dy):
        (y,) = ctx.saved_tensors
        return _softmax_backward(dy, y, ctx.scale, ctx.log), None, None, None, None


class _SoftmaxBackward(Function):
    """dx as a function of dy and y; its own derivative is written out, and leads back to x through y."""

    forward = registered_forward(softmax_bwd, lambda dy, y, *_: contiguous_like(y))

    @staticmethod
    def setup_context(ctx, inputs, output):
        dy, y, ctx.scale, ctx.log = inputs
        ctx.save_for_backward(dy, y)

    @staticmethod
    def backward(ctx, ddx):
        dy, y = ctx.saved_tensors
        wide = torch.promote_types(y.dtype, torch.float32)
        u, g, p = ddx.to(wide), dy.to(wide), y.to(wide)
        along = lambda a, b: (a * b).sum(-1, keepdim=True)  # noqa: E731
        if ctx.log:
            hidden = y == -torch.inf
            g, p = g.masked_fill(hidden, 0.0), p.exp()
            grad_dy = ctx.scale * (u - along(p, u)).masked_fill(hidden, 0.0)
            grad_y = -ctx.scale * p * u * g.sum(-1, keepdim=True)
            return grad_dy.to(dy.dtype), grad_y.to(y.dtype), None, None
        grad_y = ctx.scale * (u * (g - along(p, g)) - g * along(p, u))
        return _softmax_backward(ddx, y, ctx.scale, False), grad_y.to(y.dtype), None, None


_softmax_forward = KernelFunction(softmax_fwd, _Softmax)
_softmax_backward = KernelFunction(softmax_bwd, _SoftmaxBackward)


def softmax(
    x: Tensor, *, scale: float = 1.0, mask: Tensor | None = None, causal: checks.Causal = False, **wrong: NoReturn
) -> Tensor:
    """softmax(scale * x + mask) over the last axis.

    Args:
        x: (..., T_q, T_k) or (T_k,) in float16, bfloat16 or float32 (float64 on the CPU's backends). A view is read
            in place if its rows are contiguous and evenly spaced; otherwise it is copied once.
        mask: broadcastable to x; boolean (True = kept) or floating (added). Read through its strides; for an x of
            more than four axes, copied if it is broadcast among the leading ones.
        causal: False, True or "top_left" (row i keeps columns j <= i), or "bottom_right" (j <= i + T_k - T_q).
        scale: a number; for a learned one, multiply x by it.

    Returns:
        A tensor like x, in x's dtype (also under autocast). A row that mask and causal hide entirely is 0, without
        gradient.

    Raises:
        ValueError, TypeError: for shapes, dtypes or devices that do not fit.
        NotImplementedError: for a floating mask that requires a gradient on the triton and interpret backends.

    Source: `tileformer.kernels.reference.softmax` is the definition. A row of x that is itself -inf throughout is 0
    too, except on the torch backend, where it is NaN as in torch: looking for it would cost a pass.

    Example:
        >>> softmax(torch.zeros(2, 2), causal=True)
        tensor([[1.0000, 0.0000],
                [0.5000, 0.5000]])
    """
    if wrong:
        checks.misnamed("softmax", wrong)
    return _softmax("softmax", x, scale, mask, causal)


def log_softmax(
    x: Tensor, *, scale: float = 1.0, mask: Tensor | None = None, causal: checks.Causal = False, **wrong: NoReturn
) -> Tensor:
    """The logarithm of `softmax`, with its arguments and errors: exact where the softmax itself would round to 0.

    Returns:
        A tensor like x, in x's dtype (also under autocast). What mask and causal hide is -inf, and neither gives nor
        takes a gradient; so is a row that they hide entirely.

    Source: `tileformer.kernels.reference.log_softmax` is the definition. An element of x that is itself -inf is as
    hidden, except on the torch backend, which hands its gradient on as torch does.
    """
    if wrong:
        checks.misnamed("log_softmax", wrong)
    return _softmax("log_softmax", x, scale, mask, causal)


def _softmax(name: str, x: Tensor, scale: float, mask: Tensor | None, causal: checks.Causal) -> Tensor:
    if (type(x) is not Tensor or x.is_nested) and by_parts(name, x, 1 + bool(causal)):
        return by_rows(name, lambda x, m: _softmax(name, x, scale, m, causal), x, 1 + bool(causal), beside=(mask,))
    if type(x) is not Tensor or x.dtype not in checks.FLOATING:
        checks.floating(name, x=x)
    if type(scale) is not float:
        scale = checks.number(name, "scale", scale, "multiply x by it, and pass scale=1.0")
    if mask is not None:
        if variant := checks.causal_variant(name, mask, x.shape):
            causal, mask = (causal, checks.triangle(variant, x.shape, x.device)) if causal else (variant, None)
        checks.mask(name, x.shape, x, mask)
    checks.causal(name, causal)
    if x.dim() < (2 if causal else 1):
        raise ValueError(f"{name}: x has shape {tuple(x.shape)}: it needs a last axis, and two axes for causal")
    backend = choose(name, x)
    log = name == "log_softmax"
    if backend == "reference":
        return (reference.log_softmax if log else reference.softmax)(x, scale=scale, mask=mask, causal=causal)
    if backend == "torch":
        return _torch_softmax(x, scale, mask, causal, log)
    if mask is not None:
        if checks.differentiated(mask):
            raise NotImplementedError(f"{name}: backend {backend!r} has no gradient for a floating mask: detach it")
        four = (1,) * (4 - x.dim()) + tuple(x.shape) if x.dim() < 4 else (math.prod(x.shape[:-3]), *x.shape[-3:])
        mask = mask.expand(x.shape).reshape(four)
    shift = (x.shape[-1] - x.shape[-2] if causal == "bottom_right" else 0) if causal else None
    return _softmax_forward(x, mask, shift, scale, log)


def _torch_softmax(x: Tensor, scale: float, mask: Tensor | None, causal: checks.Causal, log: bool) -> Tensor:
    # What is still to be added must not be rounded before.
    scores = x if scale == 1.0 else x.to(torch.promote_types(x.dtype, torch.float32)) * scale
    hidden = []
    if causal:
        hidden.append(~checks.triangle(causal, x.shape, x.device))
    if mask is not None and mask.dtype == torch.bool:
        hidden.append(~mask)
    elif mask is not None:
        hidden.append(mask == -torch.inf)
        scores = scores.to(torch.promote_types(x.dtype, torch.float32)) + mask.masked_fill(hidden[-1], 0.0)
    if not hidden:
        return (scores.log_softmax(-1) if log else scores.softmax(-1)).to(x.dtype)  # autocast may have made it float32
    hide = functools.reduce(torch.bitwise_or, hidden)
    empty = hide.all(-1, keepdim=True)  # 0 for now: a softmax of -inf alone is NaN, and so is its gradient
    scores = scores.masked_fill(hide, -torch.inf).masked_fill(empty, 0.0)
    if log:
        return scores.log_softmax(-1).to(x.dtype).masked_fill(hide, -torch.inf)
    return scores.softmax(-1).to(x.dtype).masked_fill(empty, 0.0)
