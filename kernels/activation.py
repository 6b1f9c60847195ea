"""Between the two linear maps of a feed-forward block, in one pass: y = drop(activation(x + bias) up).

`up` is the other half of a gated unit (swiglu is silu with it, geglu gelu). Nothing is stored for the backward but the
operands and the seed: it computes the activation again, and adds up the bias's gradient on its way. The forward is
`dropout`'s kernel.
"""

import functools
from typing import Any, Literal, NoReturn, get_args

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from tileformer.kernels import checks, random, reference
from tileformer.kernels.autograd import Function, KernelFunction, registered_forward
from tileformer.kernels.backend import choose
from tileformer.kernels.column_sums import add_parts, programs_for
from tileformer.kernels.device import wider
from tileformer.kernels.double_backward import backward_function
from tileformer.kernels.dropout import MAX_TILE, dropout, fwd_launch
from tileformer.kernels.launch import Launch, cdiv
from tileformer.kernels.rows import contiguous_like, row_flags, row_tile, rows_of
from tileformer.kernels.subclasses import by_rows, is_special, shard_seed
from tileformer.kernels.tile_ops import activated, dropout_keep

Activation = Literal["relu", "gelu", "gelu_tanh", "silu"]


@triton.jit(do_not_specialize=["R", "threshold"])
def _activation_bwd_kernel(
    dy_ptr, x_ptr, bias_ptr, up_ptr, seed_ptr, dx_ptr, dup_ptr, partial_ptr, dy_stride, x_stride, up_stride, R, N,
    threshold, keep_scale, ACTIVATION: tl.constexpr, BIAS: tl.constexpr, UP: tl.constexpr, DROP: tl.constexpr,
    SUM: tl.constexpr, ACC: tl.constexpr, ALIGN: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Program (i, j): tile j of the columns, in every G-th block of rows from the i-th; SUM: dx's to partial (G, N)."""
    N = N // ALIGN * ALIGN
    dy_stride = dy_stride // ALIGN * ALIGN
    x_stride = x_stride // ALIGN * ALIGN
    up_stride = up_stride // ALIGN * ALIGN
    col_start = tl.program_id(1) * BLOCK_N
    cols = col_start + tl.arange(0, BLOCK_N)
    total = tl.zeros([BLOCK_R, BLOCK_N], ACC)
    for block in range(tl.program_id(0), tl.cdiv(R, BLOCK_R), tl.num_programs(0)):
        rows = block * BLOCK_R + tl.arange(0, BLOCK_R)
        wide = rows.to(tl.int64)[:, None]
        inside = (rows < R)[:, None] & (cols < N)
        # [BLOCK_R, BLOCK_N]
        dy = tl.load(dy_ptr + wide * dy_stride + cols, mask=inside, other=0.0).to(ACC)
        z = tl.load(x_ptr + wide * x_stride + cols, mask=inside, other=0.0).to(ACC)
        if BIAS:
            # [BLOCK_N]
            z += tl.load(bias_ptr + cols, mask=cols < N, other=0.0).to(ACC)
        y, slope = activated(z, ACTIVATION)
        if DROP:
            keep = dropout_keep(tl.load(seed_ptr), 0, rows, col_start, threshold, BLOCK_N, False)
            dy *= tl.where(keep, keep_scale, 0.0)
        dx = dy * slope
        if UP:
            # [BLOCK_R, BLOCK_N]
            dx *= tl.load(up_ptr + wide * up_stride + cols, mask=inside, other=0.0).to(ACC)
            tl.store(dup_ptr + wide * N + cols, (dy * y).to(dup_ptr.dtype.element_ty), mask=inside)
        tl.store(dx_ptr + wide * N + cols, dx.to(dx_ptr.dtype.element_ty), mask=inside)
        if SUM:
            total += tl.where(inside, dx, 0.0)
    if SUM:
        tl.store(partial_ptr + tl.program_id(0).to(tl.int64) * N + cols, tl.sum(total, 0), mask=cols < N)


@functools.lru_cache(maxsize=1024)
def _bwd_launch(
    r: int, n: int, strides: tuple[int, int, int], activation: str, bias: bool, up: bool, wanted: bool, p: float,
    most_programs: int, dtype: torch.dtype,
) -> tuple[int, Launch]:  # fmt: skip
    """Programs that share the rows, and the kernel: where nobody wants a sum, one for each block of rows."""
    tile = row_tile(n, MAX_TILE, 2048, 16)
    tile["BLOCK_N"] = max(4, tile["BLOCK_N"])  # a Philox call makes four columns
    columns, blocks = cdiv(n, tile["BLOCK_N"]), cdiv(r, tile["BLOCK_R"])
    programs = min(blocks, max(1, most_programs // max(columns, 1))) if wanted else blocks
    flags = dict(ACTIVATION=activation, BIAS=bias, UP=up, DROP=p > 0.0, SUM=wanted, **row_flags(dtype, n, *strides))
    scalars = (*strides, r, n, random.threshold(p), random.keep_scale(p))
    return programs, Launch(_activation_bwd_kernel, lambda _: (programs, columns), flags, [tile], scalars)


def activation_fwd(
    x: Tensor, bias: Tensor | None, up: Tensor | None, seed: Tensor | None, p: float, activation: str
) -> Tensor:
    """drop(activation(x + bias) up), like x."""
    y, n = contiguous_like(x), x.shape[-1]
    rows, stride = rows_of(x, n)
    other, up_stride = (rows, stride) if up is None else rows_of(up, n)
    shape = x.numel() // max(n, 1), n, stride, stride
    run = fwd_launch(*shape, False, p, x.dtype, activation, bias is not None, up is not None, up_stride)
    run(rows, rows if bias is None else bias.contiguous(), other, rows if seed is None else seed, y)
    return y


def activation_bwd(
    dy: Tensor, x: Tensor, bias: Tensor | None, up: Tensor | None, seed: Tensor | None, p: float, activation: str,
    need_dbias: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dx, dbias, dup; the last two are empty where there is none, or not needed."""
    dx, dbias, dup = _activation_bwd_fake(dy, x, bias, up, seed, p, activation, need_dbias)
    n = x.shape[-1]
    (dy, dy_stride), (x, x_stride) = rows_of(dy, n), rows_of(x, n)
    up, up_stride = (x, x_stride) if up is None else rows_of(up, n)
    programs, run = _bwd_launch(
        dx.numel() // max(n, 1), n, (dy_stride, x_stride, up_stride), activation, bias is not None, dup.numel() > 0,
        need_dbias, p, programs_for(dy), x.dtype,
    )  # fmt: skip
    parts = torch.empty((programs if need_dbias else 0, 1, n), dtype=wider(x.dtype), device=x.device)
    run(dy, x, x if bias is None else bias.contiguous(), up, dy if seed is None else seed, dx, dup, parts)
    if need_dbias:
        add_parts(parts, dbias)
    return dx, dbias, dup


def _activation_bwd_fake(
    dy: Tensor, x: Tensor, bias: Tensor | None, up: Tensor | None, seed: Any, p: float, activation: str, need: bool
) -> tuple[Tensor, Tensor, Tensor]:
    dbias = contiguous_like(bias) if need and bias is not None else x.new_empty((0,))
    return contiguous_like(x), dbias, x.new_empty((0,)) if up is None else contiguous_like(up)


def _definition(x, bias, up, seed, p, activation, need_dbias):
    return (reference.bias_activation_dropout(x, activation, bias=bias, up=up, p=p, seed=seed),)


class _Activation(Function):
    """y; differentiable in x, bias and up."""

    forward = registered_forward(activation_fwd, contiguous_like)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, bias, up, seed, ctx.p, ctx.activation = inputs
        ctx.save_for_backward(x, bias, up, seed)

    @staticmethod
    def backward(ctx, dy):
        x, bias, up, seed = ctx.saved_tensors
        need_dbias, need_dup = ctx.needs_input_grad[1:3]
        dx, dbias, dup = _backward(dy.to(x.dtype), x, bias, up, seed, ctx.p, ctx.activation, need_dbias)
        return dx, dbias if need_dbias else None, dup if need_dup else None, None, None, None


_forward = KernelFunction(activation_fwd, _Activation)
_backward = KernelFunction(
    activation_bwd,
    backward_function(registered_forward(activation_bwd, _activation_bwd_fake), _definition, primals=(1, 2, 3)),
)


def bias_activation_dropout(
    x: Tensor, activation: Activation, *, bias: Tensor | None = None, up: Tensor | None = None, p: float = 0.0,
    seed: Tensor | int | None = None, **wrong: NoReturn,
) -> Tensor:  # fmt: skip
    """drop(activation(x + bias) up): what stands between the linear maps of a feed-forward block, in one pass.

    Args:
        x: (..., N) in float16, bfloat16 or float32 (float64 on the CPU's backends), of a linear map without its bias.
            A view is read in place if its rows are contiguous and evenly spaced, as halves of a packed map's are.
        activation: "relu", "gelu" (exact), "gelu_tanh" (torch's approximate="tanh") or "silu".
        bias: (N,), of that linear map.
        up: like x, the factor of a gated unit: with "silu" swiglu, with a gelu geglu.
        p, seed: the rate of dropout and its seed, as of `dropout`, whose elements it drops.

    Returns:
        A tensor like x. All is computed in float32 or wider, and rounded once.

    Raises:
        ValueError, TypeError: for shapes, dtypes, devices, a rate or an activation that do not fit.

    Source: Hendrycks and Gimpel, arXiv:1606.08415 (gelu, silu); Shazeer, arXiv:2002.05202 (gated units);
    `tileformer.kernels.reference.bias_activation_dropout` is the definition.

    Example:
        >>> bias_activation_dropout(torch.tensor([[-1.0, 2.0]]), "relu", bias=torch.tensor([0.0, 1.0]))
        tensor([[0., 3.]])
    """
    op = "bias_activation_dropout"
    if wrong:
        checks.misnamed(op, wrong)
    if (type(x) is not Tensor or x.is_nested) and is_special(x):
        own = shard_seed(x, seed) if p else None
        call = lambda x, b, u: bias_activation_dropout(x, activation, bias=b, up=u, p=p, seed=own)  # noqa: E731
        return by_rows(op, call, x, 1, (bias,), (up,))
    checks.floating(op, x=x)
    if activation not in get_args(Activation):
        raise ValueError(f"{op}: activation {activation!r} is none of {', '.join(get_args(Activation))}")
    if x.dim() == 0:
        raise ValueError(f"{op}: x has no axis: give it one, for example with x[None]")
    checks.fits(op, "bias", bias, x, x.shape[-1:])
    checks.fits(op, "up", up, x, x.shape)
    p, seed = checks.number(op, "p", p), checks.seeded(op, seed, x.device)
    checks.rate(op, p, seed, x)
    backend = choose(op, x)
    if backend == "torch":
        wide = torch.promote_types(x.dtype, torch.float32)
        z = x.to(wide) if bias is None else x.to(wide) + bias.to(wide)
        if activation.startswith("gelu"):
            y = F.gelu(z, approximate="tanh" if activation == "gelu_tanh" else "none")
        else:
            y = F.relu(z) if activation == "relu" else F.silu(z)
        return dropout(y if up is None else y * up.to(wide), p, seed=seed).to(x.dtype)
    if p > 0.0:
        checks.not_traced(op)
        seed = random.new_seed(x.device) if seed is None else seed
    if backend == "reference":
        return reference.bias_activation_dropout(x, activation, bias=bias, up=up, p=p, seed=seed)
    return _forward(x, bias, up, seed, p, activation)
