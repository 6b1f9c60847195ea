"""Dropout with an optional residual: y = residual + keep x / (1 - p); and behind an activation: drop(act(x + bias) up).

Nothing is stored for the backward but the inputs and the seed: keep is a function of (seed, row, column), with x seen
as rows of its last axis. Dropout's dx is the same kernel on dy. On the torch backend, where drawing costs more than
storing, keep / (1 - p) is stored.

Activations but relu are z gate(z), so that act'(z) = gate(z) + z gate'(z):

    gelu: gate = Phi(z)    gelu_tanh: gate = sigmoid(2 u), which is (1 + tanh u) / 2    silu: gate = sigmoid(z)
"""

import functools
from collections.abc import Callable
from typing import NoReturn

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from tileformer.kernels import checks, column_sums, device, random, reference
from tileformer.kernels.autograd import Function, KernelFunction, registered_forward
from tileformer.kernels.backend import choose
from tileformer.kernels.double_backward import backward_function
from tileformer.kernels.launch import Launch, Tile, cdiv
from tileformer.kernels.rows import contiguous_like, row_flags, row_tile, rows_of
from tileformer.kernels.subclasses import by_rows, is_special, shard_seed
from tileformer.kernels.tile_ops import dropout_keep

MAX_TILE = 2048


@triton.jit(do_not_specialize=["R", "threshold"])
def _dropout_fwd_kernel(
    x_ptr, bias_ptr, beside_ptr, seed_ptr, y_ptr, x_stride, beside_stride, R, N, threshold, keep_scale,
    ACTIVATION: tl.constexpr, BIAS: tl.constexpr, UP: tl.constexpr, RESIDUAL: tl.constexpr, DROP: tl.constexpr,
    ACC: tl.constexpr, ALIGN: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A program: BLOCK_R rows and BLOCK_N columns. One axis of programs: the others end at 65,535.

    What is beside x, of its shape, multiplies (UP) or is added last (RESIDUAL). DROP: if the threshold is above 0.
    """
    N = N // ALIGN * ALIGN
    x_stride = x_stride // ALIGN * ALIGN
    beside_stride = beside_stride // ALIGN * ALIGN
    n_cols = tl.cdiv(N, BLOCK_N)
    rows = tl.program_id(0) // n_cols * BLOCK_R + tl.arange(0, BLOCK_R)
    col_start = tl.program_id(0) % n_cols * BLOCK_N
    cols = col_start + tl.arange(0, BLOCK_N)
    inside = (rows < R)[:, None] & (cols < N)
    wide = rows.to(tl.int64)[:, None]
    # [BLOCK_R, BLOCK_N]
    x = tl.load(x_ptr + wide * x_stride + cols, mask=inside, other=0.0).to(ACC)
    if BIAS:
        # [BLOCK_N]
        x += tl.load(bias_ptr + cols, mask=cols < N, other=0.0).to(ACC)
    if ACTIVATION != "":
        x = _activation(x, ACTIVATION)
    if UP:
        # [BLOCK_R, BLOCK_N]
        x *= tl.load(beside_ptr + wide * beside_stride + cols, mask=inside, other=0.0).to(ACC)
    if DROP:  # noqa: SIM102
        if threshold > 0:
            keep = dropout_keep(tl.load(seed_ptr), 0, rows, col_start, threshold, BLOCK_N, False)
            x *= tl.where(keep, keep_scale, 0.0)
    if RESIDUAL:
        # [BLOCK_R, BLOCK_N]
        x += tl.load(beside_ptr + wide * beside_stride + cols, mask=inside, other=0.0).to(ACC)
    tl.store(y_ptr + wide * N + cols, x.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _activation(z, ACTIVATION: tl.constexpr):
    return tl.where(z < 0.0, 0.0, z) if ACTIVATION == "relu" else z * _gate(z, ACTIVATION)[0]


@triton.jit
def _through_activation(g, z, ACTIVATION: tl.constexpr):
    """The gradient of z for one of act(z)."""
    if ACTIVATION == "relu":
        return tl.where(z <= 0.0, 0.0, g)
    else:
        gate, slope = _gate(z, ACTIVATION)
        return g * (gate + z * slope)


@triton.jit
def _gate(z, ACTIVATION: tl.constexpr):
    """gate(z) and its slope."""
    if ACTIVATION == "gelu":
        gate = 0.5 + 0.5 * tl.erf(z * 0.7071067811865476)
        slope = 0.3989422804014327 * tl.exp(-0.5 * z * z)
    elif ACTIVATION == "gelu_tanh":
        gate = tl.sigmoid(1.5957691216057308 * (z + 0.044715 * z * z * z))
        slope = gate * (1.0 - gate) * (1.5957691216057308 * (1.0 + 0.134145 * z * z))
    else:
        gate = tl.sigmoid(z)
        slope = gate * (1.0 - gate)
    return gate, slope


@triton.jit(do_not_specialize=["R", "threshold"])
def _activation_bwd_kernel(
    dy_ptr, x_ptr, bias_ptr, up_ptr, seed_ptr, dx_ptr, dup_ptr, partial_ptr, dy_stride, x_stride, up_stride, R, N,
    threshold, keep_scale, ACTIVATION: tl.constexpr, BIAS: tl.constexpr, UP: tl.constexpr, DROP: tl.constexpr,
    PARTIAL: tl.constexpr, ACC: tl.constexpr, ALIGN: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A program: BLOCK_N columns, in every G-th block of rows. Its part of dbias goes to partial (G, 1, N)."""
    N = N // ALIGN * ALIGN
    dy_stride = dy_stride // ALIGN * ALIGN
    x_stride = x_stride // ALIGN * ALIGN
    up_stride = up_stride // ALIGN * ALIGN
    n_cols = tl.cdiv(N, BLOCK_N)
    first = tl.program_id(0) // n_cols
    col_start = tl.program_id(0) % n_cols * BLOCK_N
    cols = col_start + tl.arange(0, BLOCK_N)
    if BIAS:
        # [BLOCK_N]
        bias = tl.load(bias_ptr + cols, mask=cols < N, other=0.0).to(ACC)
    if PARTIAL:
        dbias = tl.zeros([BLOCK_R, BLOCK_N], ACC)
    for block in range(first, tl.cdiv(R, BLOCK_R), tl.num_programs(0) // n_cols):
        rows = block * BLOCK_R + tl.arange(0, BLOCK_R)
        inside = (rows < R)[:, None] & (cols < N)
        wide = rows.to(tl.int64)[:, None]
        # [BLOCK_R, BLOCK_N]
        g = tl.load(dy_ptr + wide * dy_stride + cols, mask=inside, other=0.0).to(ACC)
        z = tl.load(x_ptr + wide * x_stride + cols, mask=inside, other=0.0).to(ACC)
        if BIAS:
            z += bias
        if DROP:
            keep = dropout_keep(tl.load(seed_ptr), 0, rows, col_start, threshold, BLOCK_N, False)
            g *= tl.where(keep, keep_scale, 0.0)
        if UP:
            dup = g * _activation(z, ACTIVATION)
            tl.store(dup_ptr + wide * N + cols, dup.to(dup_ptr.dtype.element_ty), mask=inside)
            # [BLOCK_R, BLOCK_N]
            g *= tl.load(up_ptr + wide * up_stride + cols, mask=inside, other=0.0).to(ACC)
        dx = _through_activation(g, z, ACTIVATION)
        tl.store(dx_ptr + wide * N + cols, dx.to(dx_ptr.dtype.element_ty), mask=inside)
        if PARTIAL:
            dbias += dx
    if PARTIAL:
        tl.store(partial_ptr + first.to(tl.int64) * N + cols, tl.sum(dbias, 0), mask=cols < N)


def _tile(n: int, elements: int) -> Tile:
    tile = row_tile(n, MAX_TILE, elements, 16)
    tile["BLOCK_N"] = max(4, tile["BLOCK_N"])  # a Philox call makes four columns
    return tile


@functools.lru_cache(maxsize=1024)
def _launch(
    r: int, n: int, stride: int, beside_stride: int, p: float, dtype: torch.dtype, residual: bool = False,
    activation: str = "", bias: bool = False, up: bool = False,
) -> Launch:  # fmt: skip
    grid = lambda tile: (cdiv(r, tile["BLOCK_R"]) * cdiv(n, tile["BLOCK_N"]),)  # noqa: E731
    # Training and evaluation share a binary, but of a gated block: most train without, and registers are dear there.
    flags = dict(ACTIVATION=activation, BIAS=bias, UP=up, RESIDUAL=residual, DROP=p > 0.0 or not up)
    flags |= row_flags(dtype, n, stride, beside_stride)
    scalars = (stride, beside_stride, r, n, random.threshold(p), random.keep_scale(p))
    return Launch(_dropout_fwd_kernel, grid, flags, [_tile(n, 2048)], scalars)


@functools.lru_cache(maxsize=1024)
def _bwd_launch(
    r: int, n: int, strides: tuple[int, int, int], p: float, dtype: torch.dtype, activation: str, bias: bool, up: bool,
    partial: bool, most_programs: int,
) -> tuple[int, Launch]:  # fmt: skip
    """Programs that share the rows, and the kernel."""
    tile = _tile(n, 4096)
    programs, columns = cdiv(r, tile["BLOCK_R"]), cdiv(n, tile["BLOCK_N"])
    if partial:
        programs = min(programs, max(1, most_programs // max(columns, 1)))
    flags = dict(ACTIVATION=activation, BIAS=bias, UP=up, DROP=p > 0.0, PARTIAL=partial)
    flags |= row_flags(dtype, n, *strides)
    scalars = (*strides, r, n, random.threshold(p), random.keep_scale(p))
    return programs, Launch(_activation_bwd_kernel, lambda _: (programs * columns,), flags, [tile], scalars)


def dropout_fwd(x: Tensor, residual: Tensor | None, seed: Tensor, p: float) -> Tensor:
    """residual + keep x / (1 - p), in the wider of their dtypes."""
    y = _dropout_fwd_fake(x, residual, seed, p)
    n = x.shape[-1]
    rows, stride = rows_of(x, n)
    other, other_stride = (rows, stride) if residual is None else rows_of(residual, n)
    run = _launch(x.numel() // max(n, 1), n, stride, other_stride, p, x.dtype, residual is not None)
    run(rows, rows, other, seed, y)
    return y


def _dropout_fwd_fake(x: Tensor, residual: Tensor | None, seed: Tensor, p: float) -> Tensor:
    dtype = None if residual is None else torch.promote_types(x.dtype, residual.dtype)
    return contiguous_like(x, dtype=dtype)


def bias_activation_dropout_fwd(
    x: Tensor, bias: Tensor | None, up: Tensor | None, seed: Tensor | None, activation: str, p: float
) -> Tensor:
    """drop(activation(x + bias) up) like x."""
    y, n = contiguous_like(x), x.shape[-1]
    rows, stride = rows_of(x, n)
    other, other_stride = (rows, stride) if up is None else rows_of(up, n)
    given = False, activation, bias is not None, up is not None
    run = _launch(x.numel() // max(n, 1), n, stride, other_stride, p, x.dtype, *given)
    run(rows, rows if bias is None else bias.contiguous(), other, random.given(seed, x), y)
    return y


def bias_activation_dropout_bwd(
    dy: Tensor, x: Tensor, bias: Tensor | None, up: Tensor | None, seed: Tensor | None, activation: str, p: float,
    need_dbias: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dx, dbias (empty where not needed) and dup (empty without up)."""
    dx, dbias, dup = _bias_activation_dropout_bwd_fake(dy, x, bias, up, seed, activation, p, need_dbias)
    n = x.shape[-1]
    (dy, dy_stride), (rows, stride) = rows_of(dy, n), rows_of(x, n)
    other, other_stride = (rows, stride) if up is None else rows_of(up, n)
    strides, given = (dy_stride, stride, other_stride), (bias is not None, up is not None, need_dbias)
    programs, run = _bwd_launch(
        x.numel() // max(n, 1), n, strides, p, x.dtype, activation, *given, column_sums.programs_for(x)
    )
    parts = dx  # a stand-in that is not written, as dup is without up
    if need_dbias:
        parts = x.new_empty((programs, 1, n), dtype=device.wider(x.dtype))
    shift = rows if bias is None else bias.contiguous()
    run(dy, rows, shift, other, random.given(seed, x), dx, dx if up is None else dup, parts)
    if need_dbias:
        column_sums.add_parts(parts, dbias)
    return dx, dbias, dup


def _bias_activation_dropout_bwd_fake(
    dy: Tensor, x: Tensor, bias: Tensor | None, up: Tensor | None, seed: Tensor | None, activation: str, p: float,
    need_dbias: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    dbias = contiguous_like(bias) if need_dbias and bias is not None else x.new_empty((0,))
    return contiguous_like(x), dbias, x.new_empty((0,)) if up is None else contiguous_like(up)


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


def _definition(x, bias, up, seed, activation, p, need_dbias):
    return (reference.bias_activation_dropout(x, activation, bias=bias, up=up, p=p, seed=seed),)


class _BiasActivationDropout(Function):
    """y; differentiable in x, bias and up."""

    forward = registered_forward(bias_activation_dropout_fwd, contiguous_like)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.activation, ctx.p = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx, dy):
        x, bias, up, seed = ctx.saved_tensors
        _, need_dbias, need_dup, *_ = ctx.needs_input_grad
        dx, dbias, dup = _activation_backward(dy, x, bias, up, seed, ctx.activation, ctx.p, need_dbias)
        return dx, dbias if need_dbias else None, dup if need_dup else None, None, None, None


_activation_forward = KernelFunction(bias_activation_dropout_fwd, _BiasActivationDropout)
_backward = registered_forward(bias_activation_dropout_bwd, _bias_activation_dropout_bwd_fake)
_activation_backward = KernelFunction(
    bias_activation_dropout_bwd, backward_function(_backward, _definition, primals=(1, 2, 3))
)


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
    p, seed = _check("dropout", x, p, seed)
    checks.fits("dropout", "residual", residual, x, x.shape)
    backend = choose("dropout", x)
    if p == 0.0:
        return x if residual is None else residual + x
    checks.not_traced("dropout")
    if seed is None:
        seed = random.new_seed(x.device)
    if backend == "reference":
        return reference.dropout(x, p, seed=seed, residual=residual)
    if backend == "torch":
        return _torch_dropout(x, residual, seed, p)
    return _drop(x, residual, seed, p)


def bias_activation_dropout(
    x: Tensor, activation: str, *, bias: Tensor | None = None, up: Tensor | None = None, p: float = 0.0,
    seed: Tensor | int | None = None,
) -> Tensor:  # fmt: skip
    """drop(activation(x + bias) * up): what stands between the two linear maps of a feed-forward block, in one pass.

    All is computed in float32 (float64 for float64) and rounded once; the backward computes it again from x, bias and
    up. swiglu is "silu" with up, geglu is "gelu" with up; gate and up may be halves of one tensor (`chunk(2, -1)`).

    Args:
        x: (..., N) in float16, bfloat16 or float32 (float64 on the CPU's backends), read in place as in `dropout`.
        activation: "relu", "gelu" (exact), "gelu_tanh" (the approximation of arXiv:1606.08415) or "silu".
        bias: (N,); it, and its gradient, in any of x's dtypes.
        up: of x's shape and dtype.
        p, seed: as of `dropout`: with this seed it keeps the same elements.

    Returns:
        A tensor of x's shape and dtype. The torch backend rounds each step in 16 bits, as torch does.

    Raises:
        ValueError, TypeError: for an activation, shapes, dtypes, devices or a rate that do not fit.

    Source: Hendrycks and Gimpel, arXiv:1606.08415; Shazeer, arXiv:2002.05202;
    `tileformer.kernels.reference.bias_activation_dropout` is the definition.

    Example:
        >>> bias_activation_dropout(torch.tensor([[-1.0, 2.0]]), "relu", bias=torch.tensor([3.0, 1.0]))
        tensor([[2., 3.]])
    """
    name = "bias_activation_dropout"
    if activation not in _TORCH:
        raise ValueError(f"{name}: activation is one of {', '.join(_TORCH)}, got {activation!r}")
    if (type(x) is not Tensor or x.is_nested) and is_special(x):
        own = shard_seed(x, seed) if p else None
        call = lambda x, b, u: bias_activation_dropout(x, activation, bias=b, up=u, p=p, seed=own)  # noqa: E731
        # A sharded bias goes with the columns of x; a jagged tensor's rows are whole.
        return by_rows(name, call, x, 0, *((bias,), (up,)) if x.is_nested else ((), (bias, up)))
    p, seed = _check(name, x, p, seed)
    checks.fits(name, "bias", bias, x, x.shape[-1:])
    checks.fits(name, "up", up, x, x.shape)
    if up is not None and up.dtype != x.dtype:
        dtypes = f"{checks.name_of(up.dtype)}, x {checks.name_of(x.dtype)}"
        raise TypeError(f"{name}: up must have the dtype of x, got up {dtypes}: convert one of them")
    backend = choose(name, x)
    if p == 0.0:
        seed = None
    else:
        checks.not_traced(name)
        seed = random.new_seed(x.device) if seed is None else seed
    if backend == "reference":
        return reference.bias_activation_dropout(x, activation, bias=bias, up=up, p=p, seed=seed)
    if backend == "torch":
        y = _TORCH[activation](x if bias is None else x + bias)
        y = y if up is None else y * up
        y = y if y.dtype == x.dtype else y.to(x.dtype)  # a wider bias makes it wide
        return y if seed is None else _torch_dropout(y, None, seed, p)
    return _activation_forward(x, bias, up, seed, activation, p)


_TORCH: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu, "gelu": F.gelu, "gelu_tanh": functools.partial(F.gelu, approximate="tanh"), "silu": F.silu,
}  # fmt: skip


def _check(op: str, x: Tensor, p: float, seed: Tensor | int | None) -> tuple[float, Tensor | None]:
    """The rate as a number and the seed as a tensor, after raising for what does not fit."""
    if type(x) is not Tensor or x.dtype not in checks.FLOATING:
        checks.floating(op, x=x)
    p = checks.number(op, "p", p)
    seed = checks.seeded(op, seed, x.device)
    checks.rate(op, p, seed, x)
    if x.dim() == 0:
        raise ValueError(f"{op}: x has no axis: give it one, for example with x[None]")
    return p, seed


def _torch_dropout(x: Tensor, residual: Tensor | None, seed: Tensor, p: float) -> Tensor:
    # A scale of float32 would be rounded in half precision: there it waits for the product.
    scale, late = random.keep_scale(p), x.dtype.itemsize == 2
    keep = random.fast_keep(seed, x.shape, p, 1.0 if late else scale, x.dtype)
    if residual is not None:
        return torch.addcmul(residual, x, keep, value=scale if late else 1)
    return x * keep * scale if late else x * keep
