"""Cross-entropy of input W^T + b without its logits: rows go in chunks through torch's matrix product.

The logits of one chunk exist at a time. Where a gradient is wanted, the chunk's own takes their place and goes at once
into dinput = dlogits W and into dW, which is added up in float32; backward has only to scale them by the gradient of
the loss (as Liger does, arXiv:2410.10989). Losses without a reduction, whose gradients are not known in forward, are
computed again there. The rows are cross_entropy's kernels, or on the torch backend plain operators.
"""

import functools
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.compiler import is_compiling

from tileformer.kernels import checks, reference
from tileformer.kernels.autograd import Function, KernelFunction, in_forward_mode, registered_forward
from tileformer.kernels.backend import choose
from tileformer.kernels.cross_entropy import OPTIONS, Reduction, check, rows_bwd, rows_fwd
from tileformer.kernels.device import wider
from tileformer.kernels.double_backward import backward_function
from tileformer.kernels.launch import cdiv

CHUNK = {"cuda": 2048, "cpu": 512}  # rows at the least, where there are as many: a matrix product at full speed
CLASSES = 4096  # of them a CPU holds products in 16 bits at a time
BLOCK = 2**18  # logits that the torch backend works on at a time: they stay in a core's cache


def chunk_rows(rows: int, device: str) -> int:
    """Rows of a chunk: as even as multiples of 8 are, so that each chunk's begin at aligned addresses."""
    return 8 * cdiv(rows, 8 * max(rows // CHUNK.get(device, CHUNK["cuda"]), 1))


def _plain_rows(
    logits: Tensor, target: Tensor, weight: Tensor | None, loss: Tensor, target_weight: Tensor, dloss: Tensor | None,
    ignore_index: int, label_smoothing: float, z_loss: float, softcap: float,
) -> None:  # fmt: skip
    """Write loss and w_y of each row and, with dloss, the gradient over the logits, a few rows at a time."""
    (rows, classes), counted = logits.shape, target != ignore_index
    y = torch.where(counted, target, 0)[:, None]
    w = None if weight is None else weight.to(loss.dtype)
    total = classes if w is None else w.sum()
    target_weight.copy_(counted if w is None else torch.where(counted, w[y[:, 0]], 0.0))
    step, share = max(1, BLOCK // classes), label_smoothing / classes
    for start in range(0, rows, step):
        at = slice(start, start + step)
        own, x = (1.0 - label_smoothing) * target_weight[at], logits[at].to(loss.dtype)
        if softcap:
            t = torch.tanh(x / softcap)
            x = softcap * t
        row_max = x.amax(1, keepdim=True)
        p = (x - row_max).exp_()
        sums = p.sum(1)
        lse = row_max[:, 0] + sums.log()
        row = own * (lse - x.gather(1, y[at])[:, 0])
        if share:
            row += share * (total * lse - (x.sum(1) if w is None else x @ w))
        if z_loss:
            row += z_loss * lse * lse
        loss[at] = torch.where(counted[at], row, 0.0)
        if dloss is None:
            continue
        scale = torch.where(counted[at], dloss[at], 0.0)
        d = p.mul_((scale * (own + share * total + 2.0 * z_loss * lse) / sums)[:, None])
        if share:
            d -= (share * scale)[:, None] * (1.0 if w is None else w)
        d.scatter_(1, y[at], d.gather(1, y[at]) - (scale * own)[:, None])
        logits[at] = d.mul_(1.0 - t * t) if softcap else d


def _shapes(input: Tensor, linear_weight: Tensor, wants: list[bool]) -> list[torch.Size]:
    """Of the gradients; what nobody wants has no rows."""
    shapes = input.shape, linear_weight.shape, linear_weight.shape[:1]
    return [n if want else torch.Size((0, *n[1:])) for n, want in zip(shapes, wants, strict=True)]


def _in_chunks(
    input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, target: Tensor, weight: Tensor | None,
    dloss: Tensor | None, fused: bool, wants: list[bool], *options: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Loss and w_y of each row and, with dloss, the gradients wanted of input, linear_weight and linear_bias; those of
    the parameters are not rounded."""
    rows, classes, wide = len(input), len(linear_weight), wider(input.dtype)
    loss, target_weight = (torch.empty(rows, dtype=wide, device=input.device) for _ in range(2))
    of_input, *of_parameters = _shapes(input, linear_weight, wants)
    dinput = torch.empty(of_input, dtype=input.dtype, device=input.device)
    dweight, dbias = (torch.zeros(shape, dtype=wide, device=input.device) for shape in of_parameters)
    size = max(chunk_rows(rows, input.device.type), 1)
    buffer = torch.empty(min(size, rows), classes, dtype=input.dtype, device=input.device)
    for start in range(0, rows, size):
        part = functools.partial(torch.narrow, dim=0, start=start, length=min(size, rows - start))
        y, logits = part(target), buffer.narrow(0, 0, min(size, rows - start))
        # A NaN in an ignored row would reach dweight, times 0.
        x = part(input).masked_fill((y == options[0]).unsqueeze(1), 0.0)
        F.linear(x, linear_weight, linear_bias, out=logits)  # type: ignore[call-arg]
        given = None if dloss is None else part(dloss)
        if fused:
            lse = torch.empty_like(part(loss))
            rows_fwd(logits, y, weight, part(loss), lse, part(target_weight), *options)
            if given is not None:
                rows_bwd(given, logits, y, weight, lse, logits, *options)
        else:
            _plain_rows(logits, y, weight, part(loss), part(target_weight), given, *options)
        if wants[0]:
            torch.mm(logits, linear_weight, out=part(dinput))
        if wants[1]:
            _add_product(dweight, logits.t(), x)
        if wants[2]:
            dbias += logits.sum(0, dtype=wide)
    return loss, target_weight, dinput, dweight, dbias


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a b; total is float32 where a and b have 16 bits."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    elif total.is_cuda:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:  # a CPU has no such product: each chunk's is rounded before it is added, some classes at a time
        for part, some in zip(total.split(CLASSES), a.split(CLASSES), strict=True):
            part += torch.mm(some, b)


def linear_cross_entropy_fwd(
    input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, target: Tensor, weight: Tensor | None,
    ignore_index: int, label_smoothing: float, z_loss: float, softcap: float, fused: bool, reduction: str,
    dtype: torch.dtype, wants: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The reduced loss in `dtype`, the sum of the targets' weights, and for a loss of 1 the gradients wanted."""
    options = ignore_index, label_smoothing, z_loss, softcap
    one = torch.ones((), dtype=wider(input.dtype), device=input.device).expand(len(input)) if any(wants) else None
    loss, target_weight, *grads = _in_chunks(
        input, linear_weight, linear_bias, target, weight, one, fused, wants, *options
    )
    total = target_weight.sum()
    if reduction != "none":
        loss = loss.sum() / total if reduction == "mean" else loss.sum()
    return loss.to(dtype), total, *grads  # type: ignore[return-value]


def _fwd_fake(
    input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, target: Tensor, weight: Tensor | None,
    ignore_index: int, label_smoothing: float, z_loss: float, softcap: float, fused: bool, reduction: str,
    dtype: torch.dtype, wants: list[bool],
) -> tuple[Tensor, ...]:  # fmt: skip
    of_input, *of_parameters = _shapes(input, linear_weight, wants)
    loss = input.new_empty(input.shape[:1] if reduction == "none" else (), dtype=dtype)
    wide = [input.new_empty(shape, dtype=wider(input.dtype)) for shape in ((), *of_parameters)]
    return loss, wide[0], input.new_empty(of_input), *wide[1:]


def linear_cross_entropy_bwd(
    dloss: Tensor, input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, target: Tensor,
    weight: Tensor | None, dinput: Tensor, dweight: Tensor, dbias: Tensor, ignore_index: int, label_smoothing: float,
    z_loss: float, softcap: float, fused: bool, kept: bool, wants: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients wanted. If they are `kept`, those for a loss of 1 are given, and all rows have the same dloss."""
    if kept and len(input):  # `out`: on a GPU there is no float32 copy of a product in 16 bits
        empty = [torch.empty(n, dtype=input.dtype, device=input.device) for n in _shapes(input, linear_weight, wants)]
        given, scale = zip((dinput, dweight, dbias), empty, strict=True), dloss.narrow(0, 0, 1)
        return tuple(torch.mul(x.narrow(0, 0, len(y)), scale, out=y) for x, y in given)  # type: ignore[return-value]
    options = ignore_index, label_smoothing, z_loss, softcap
    _, _, *grads = _in_chunks(input, linear_weight, linear_bias, target, weight, dloss, fused, wants, *options)
    return tuple(x.to(input.dtype) for x in grads)  # type: ignore[return-value]


def _bwd_fake(
    dloss: Tensor, input: Tensor, linear_weight: Tensor, *rest: Tensor | float | bool | list[bool] | None
) -> tuple[Tensor, ...]:
    wants: Any = rest[-1]
    return tuple(input.new_empty(shape) for shape in _shapes(input, linear_weight, wants))


def _definition(input, linear_weight, linear_bias, target, weight, dinput, dweight, dbias, *rest):
    options = dict(zip(OPTIONS, rest, strict=False))
    given = dict(linear_bias=linear_bias, weight=weight, reduction="none")
    return (reference.linear_cross_entropy(input, linear_weight, target, **given, **options),)


class _LinearCrossEntropy(Function):
    """(loss, sum of weights, gradients for a loss of 1); differentiable in input and parameters through the loss."""

    forward = registered_forward(linear_cross_entropy_fwd, _fwd_fake)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *ctx.options, ctx.fused, ctx.reduction, _, ctx.wants = inputs[5:]
        ctx.save_for_backward(*inputs[:5], *output[1:])
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, dloss, *_):
        if dloss is None:
            return (None,) * 13
        *inputs, total, dinput, dweight, dbias = ctx.saved_tensors
        wants = list(ctx.needs_input_grad[:3])
        kept = all(x or not y for x, y in zip(ctx.wants, wants, strict=True))  # nothing without a reduction
        if ctx.reduction == "mean":  # where no row counts, the loss is NaN and no row has a gradient
            dloss = torch.where(total == 0.0, 0.0, dloss / total)
        if ctx.reduction != "none":
            dloss = dloss.expand(inputs[3].shape)
        how = *ctx.options, ctx.fused, kept, wants
        grads = _linear_cross_entropy_backward(dloss.to(total.dtype), *inputs, dinput, dweight, dbias, *how)
        return *(x if want else None for x, want in zip(grads, wants, strict=True)), *(None,) * 10


_linear_cross_entropy_forward = KernelFunction(linear_cross_entropy_fwd, _LinearCrossEntropy)
_backward = registered_forward(linear_cross_entropy_bwd, _bwd_fake)
_linear_cross_entropy_backward = KernelFunction(
    linear_cross_entropy_bwd, backward_function(_backward, _definition, primals=(1, 2, 3))
)


def linear_cross_entropy(
    input: Tensor, linear_weight: Tensor, target: Tensor, *, linear_bias: Tensor | None = None,
    weight: Tensor | None = None, ignore_index: int = -100, reduction: Reduction = "mean",
    label_smoothing: float = 0.0, z_loss: float = 0.0, softcap: float | None = None, **wrong: NoReturn,
) -> Tensor:  # fmt: skip
    """`cross_entropy` of F.linear(input, linear_weight, linear_bias), without more logits in memory than a chunk's.

    With b bytes an element, R rows go in chunks of S = R / max(R // 2048, 1) (of 512 on a CPU), up to a multiple of 8.
    Beside its arguments a forward holds at most b S (V + C) bytes and, where gradients are wanted, the gradients: b R C
    of the input and 4 V C of the weight (on a CPU in 16 bits up to 6 C min(V, 4096) more, and what torch's product
    takes). Backward holds these and what it returns, in 16 bits on a CPU also the weight's in float32.

    Args:
        input: (R, C) or (C,) in float16, bfloat16 or float32 (float64 on the CPU's backends).
        linear_weight: (V, C) in the input's dtype; it may be an embedding's too. Its gradient is summed in float32.
        target: int64 (R,) or (): a class, or ignore_index. Any other value is as `cross_entropy` says.
        linear_bias: (V,) in the input's dtype.
        weight, reduction, label_smoothing, z_loss, softcap: as in `cross_entropy`. Without a reduction, backward
            computes the logits again.
        ignore_index: rows with this target contribute neither loss nor gradient, whatever the input holds there.

    Returns:
        () or, for "none", like target; in the input's dtype. Under autocast the product runs in its dtype and the
        result is float32.

    Raises:
        ValueError, TypeError: for shapes, dtypes, devices or options that do not fit.
        NotImplementedError: for class probabilities as target, and for a weight that requires a gradient.

    Source: `tileformer.kernels.reference.linear_cross_entropy` is the definition; the arguments are those of torch's
    torch.nn.functional.linear_cross_entropy.

    Example:
        >>> linear_cross_entropy(torch.zeros(2, 8), torch.ones(4, 8), torch.tensor([0, -100]))
        tensor(1.3863)
    """
    op = "linear_cross_entropy"
    if wrong:
        checks.misnamed(op, wrong)
    checks.plain(op, input, linear_weight, linear_bias)
    checks.floating(op, input=input, linear_weight=linear_weight, linear_bias=linear_bias)
    if input.dim() not in (1, 2) or linear_weight.dim() != 2 or linear_weight.shape[1] != input.shape[-1]:
        shapes = f"{tuple(input.shape)} and {tuple(linear_weight.shape)}"
        raise ValueError(f"{op}: input is (R, C) or (C,), linear_weight (V, C), got {shapes}: try .flatten(0, -2)")
    classes = len(linear_weight)
    if classes == 0:
        raise ValueError(f"{op}: linear_weight has no class, got {tuple(linear_weight.shape)}")
    checks.fits(op, "linear_bias", linear_bias, input, (classes,))
    checks.same_device(op, input, linear_weight=linear_weight)
    numbers = check(op, input, classes, target, weight, reduction, label_smoothing, z_loss, softcap)
    device, dtype = input.device.type, input.dtype
    if device != "meta" and torch.is_autocast_enabled(device) and dtype != torch.float64:
        dtype, low = torch.float32, torch.get_autocast_dtype(device)
        input, linear_weight = input.to(low), linear_weight.to(low)
        linear_bias = None if linear_bias is None else linear_bias.to(low)
    if any(x is not None and x.dtype != input.dtype for x in (linear_weight, linear_bias)):
        names = [checks.name_of(x.dtype) for x in (input, linear_weight, linear_bias) if x is not None]
        raise TypeError(f"{op}: input, linear_weight and linear_bias are {', '.join(names)}: cast them to one dtype")
    backend = choose(op, input)
    if backend == "torch" and not is_compiling() and in_forward_mode():  # the Function has no tangents
        backend = "reference"
    if backend == "reference":
        given: Any = dict(zip(OPTIONS, (ignore_index, *numbers), strict=True), weight=weight, reduction=reduction)
        out = reference.linear_cross_entropy(input, linear_weight, target, linear_bias=linear_bias, **given)
        return out.to(dtype)
    leaves = (input, linear_weight, linear_bias)
    asked = torch.is_grad_enabled() and reduction != "none"
    wants = [asked and x is not None and x.requires_grad for x in leaves]
    how: Any = weight, int(ignore_index), *numbers, backend != "torch", reduction, dtype, wants
    x, y = (input, target) if input.dim() == 2 else (input[None], target[None])
    loss = _linear_cross_entropy_forward(x, linear_weight, linear_bias, y, *how)[0]
    return loss.view(target.shape) if reduction == "none" else loss
