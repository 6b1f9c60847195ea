"""Cross-entropy of class indices, with class weights w, label smoothing e, z-loss z, soft cap and ignored targets.

For a row x of V logits with target y, lse = log sum exp(x) and W = sum(w):

    loss = (1 - e) w_y (lse - x_y) + (e / V) (W lse - sum(w x)) + z lse^2
    dloss/dx_j = softmax(x)_j ((1 - e) w_y + e W / V + 2 z lse) - e w_j / V - (1 - e) w_y [j = y]

The z-loss is PaLM's (Chowdhery et al., arXiv:2204.02311), the soft cap x = cap tanh(logits / cap) Gemma 2's
(arXiv:2408.00118).

The forward reads the logits once, with a running maximum and sum (Milakov and Gimelshein, arXiv:1805.02867); the
backward reads them once more and keeps nothing but lse. Reductions over rows are left to torch, on the device.

An ignored row is not read at all. A target outside [0, V) that is not ignored makes the weight w_y NaN, and with it
the loss and the gradient; nothing is read out of bounds.
"""

import functools
import math
from typing import Any, Literal, NoReturn

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from tileformer.kernels import checks, reference
from tileformer.kernels.autograd import Function, KernelFunction, registered_forward
from tileformer.kernels.backend import choose
from tileformer.kernels.device import wider
from tileformer.kernels.double_backward import backward_function
from tileformer.kernels.launch import Launch, cdiv
from tileformer.kernels.rows import contiguous_like, row_flags, row_tile, rows_of
from tileformer.kernels.subclasses import by_parts, on_shards
from tileformer.kernels.tile_ops import tanh

Reduction = Literal["none", "mean", "sum"]
MAX_TILE = 8192
OPTIONS = ("ignore_index", "label_smoothing", "z_loss", "softcap")


@triton.jit
def _labels(target_ptr, weight_ptr, rows, R, V, ignore_index, WEIGHT: tl.constexpr, ACC: tl.constexpr):
    """The class y of each row and w_y: -1 and 0 if the row is ignored or lies outside, -2 and NaN if y is no class."""
    # [BLOCK_R]
    target = tl.load(target_ptr + rows, mask=rows < R, other=ignore_index)
    label = tl.where((target >= 0) & (target < V), target, -2).to(tl.int32)
    label = tl.where((rows < R) & (target != ignore_index), label, -1)
    target_weight = tl.where(label >= 0, 1.0, 0.0).to(ACC)
    if WEIGHT:
        # [BLOCK_R]
        target_weight = tl.load(weight_ptr + label, mask=label >= 0, other=0.0).to(ACC)
    return label, tl.where(label == -2, float("nan"), target_weight)


@triton.jit(do_not_specialize=["R", "ignore_index"])
def _cross_entropy_fwd_kernel(
    logits_ptr, target_ptr, weight_ptr, weight_sum_ptr, loss_ptr, lse_ptr, target_weight_ptr, logits_stride, R, V,
    ignore_index, smoothing, share, z_loss, softcap, WEIGHT: tl.constexpr, SMOOTH: tl.constexpr, Z: tl.constexpr,
    CAP: tl.constexpr, ACC: tl.constexpr, ALIGN: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program: loss, log-sum-exp and w_y of BLOCK_R rows. share is smoothing / V."""
    V = V // ALIGN * ALIGN
    logits_stride = logits_stride // ALIGN * ALIGN
    rows = (tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)
    label, target_weight = _labels(target_ptr, weight_ptr, rows, R, V, ignore_index, WEIGHT, ACC)
    x_ptrs = logits_ptr + rows[:, None] * logits_stride
    # [BLOCK_R]
    x_y = tl.load(logits_ptr + rows * logits_stride + label, mask=label >= 0, other=0.0).to(ACC)
    if CAP:
        x_y = softcap * tanh(x_y / softcap)
    running_max = tl.where(label == -1, 0.0, float("-inf")).to(ACC)
    total = tl.zeros([BLOCK_R], ACC)
    smooth = tl.zeros([BLOCK_R], ACC)
    for start in range(0, V, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        inside = (label != -1)[:, None] & (cols < V)
        # [BLOCK_R, BLOCK_N]
        x = tl.load(x_ptrs + cols, mask=inside, other=float("-inf")).to(ACC)
        if CAP:
            x = tl.where(inside, softcap * tanh(x / softcap), float("-inf"))
        new_max = tl.maximum(running_max, tl.max(x, 1))
        base = tl.where(new_max == float("-inf"), 0.0, new_max)  # a row of -inf: exp(-inf - 0) = 0, not NaN
        total = total * tl.exp(running_max - base) + tl.sum(tl.exp(x - base[:, None]), 1)
        running_max = new_max
        if SMOOTH:
            x = tl.where(inside, x, 0.0)
            if WEIGHT:
                # [BLOCK_N]
                x = x * tl.load(weight_ptr + cols, mask=cols < V, other=0.0).to(ACC)
            smooth += tl.sum(x, 1)
    lse = running_max + tl.log(tl.where(total == 0.0, 1.0, total))
    loss = target_weight * (lse - x_y)
    if SMOOTH:
        weight_sum = V
        if WEIGHT:
            weight_sum = tl.load(weight_sum_ptr)
        loss = (1.0 - smoothing) * loss + share * (weight_sum * lse - smooth)
    if Z:
        loss += z_loss * lse * lse
    tl.store(loss_ptr + rows, tl.where(label == -1, 0.0, loss), mask=rows < R)
    tl.store(lse_ptr + rows, lse, mask=rows < R)
    tl.store(target_weight_ptr + rows, target_weight, mask=rows < R)


@triton.jit(do_not_specialize=["R", "ignore_index"])
def _cross_entropy_bwd_kernel(
    dloss_ptr, logits_ptr, target_ptr, weight_ptr, weight_sum_ptr, lse_ptr, dlogits_ptr, dloss_stride, logits_stride,
    R, V, ignore_index, smoothing, share, z_loss, softcap, WEIGHT: tl.constexpr, SMOOTH: tl.constexpr, Z: tl.constexpr,
    CAP: tl.constexpr, ACC: tl.constexpr, ALIGN: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Program (i, j): the gradient of BLOCK_R rows and BLOCK_N classes. It may lie where the logits do."""
    V = V // ALIGN * ALIGN
    logits_stride = logits_stride // ALIGN * ALIGN
    rows = (tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)
    cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    label, target_weight = _labels(target_ptr, weight_ptr, rows, R, V, ignore_index, WEIGHT, ACC)
    # [BLOCK_R]
    lse = tl.load(lse_ptr + rows, mask=label != -1, other=0.0)
    dloss = tl.load(dloss_ptr + rows * dloss_stride, mask=label != -1, other=0.0).to(ACC)
    # [BLOCK_R, BLOCK_N]
    x_ptrs = logits_ptr + rows[:, None] * logits_stride + cols
    inside = (label != -1)[:, None] & (cols < V)
    x = tl.load(x_ptrs, mask=inside, other=float("-inf")).to(ACC)
    if CAP:
        t = tanh(x / softcap)
        x = tl.where(inside, softcap * t, float("-inf"))
    p = tl.exp(x - lse[:, None])
    is_target = cols == label[:, None]
    if SMOOTH:
        target_weight = target_weight * (1.0 - smoothing)
        weight_sum = smoothing
        class_weight = share
        if WEIGHT:
            weight_sum = share * tl.load(weight_sum_ptr)
            # [BLOCK_N]
            class_weight = share * tl.load(weight_ptr + cols, mask=cols < V, other=0.0).to(ACC)
        of_target = tl.where(is_target, target_weight[:, None], 0.0)
        d = p * (target_weight + weight_sum)[:, None] - class_weight - of_target
    else:
        d = (p - tl.where(is_target, 1.0, 0.0)) * target_weight[:, None]
    if Z:
        d += p * (2.0 * z_loss * lse)[:, None]
    if CAP:
        d *= 1.0 - t * t
    d = d * dloss[:, None]  # 0 in an ignored row
    dlogits_ptrs = dlogits_ptr + rows[:, None] * V + cols
    tl.store(dlogits_ptrs, d.to(dlogits_ptr.dtype.element_ty), mask=(rows < R)[:, None] & (cols < V))


def _weights(weight: Tensor | None, wide: torch.dtype, absent: Tensor) -> tuple[Tensor, Tensor]:
    """The class weights and their sum, for the kernels."""
    return (absent, absent) if weight is None else (weight.contiguous(), weight.sum(dtype=wide))


@functools.lru_cache(maxsize=1024)
def _launch(
    backward: bool, shape: tuple[int, int], strides: tuple[int, ...], weight: bool, dtype: torch.dtype,
    ignore_index: int, label_smoothing: float, z_loss: float, softcap: float,
) -> Launch:  # fmt: skip
    (r, v), share = shape, label_smoothing / max(shape[1], 1)
    features = dict(WEIGHT=weight, SMOOTH=label_smoothing > 0.0, Z=z_loss != 0.0, CAP=softcap > 0.0)
    return Launch(
        _cross_entropy_bwd_kernel if backward else _cross_entropy_fwd_kernel,
        lambda tile: (cdiv(r, tile["BLOCK_R"]), cdiv(v, tile["BLOCK_N"])) if backward else (cdiv(r, tile["BLOCK_R"]),),
        dict(**features, **row_flags(dtype, v, strides[-1])),
        [row_tile(v, MAX_TILE, 1024, 16)],
        (*strides, r, v, ignore_index, label_smoothing, share, z_loss, softcap),
    )


def rows_fwd(
    logits: Tensor, target: Tensor, weight: Tensor | None, loss: Tensor, lse: Tensor, target_weight: Tensor,
    *options: Any,
) -> None:  # fmt: skip
    """Write loss, log-sum-exp and w_y of each row. options: those of OPTIONS, as numbers."""
    x, stride = rows_of(logits, logits.shape[1])
    run = _launch(False, logits.shape, (stride,), weight is not None, logits.dtype, *options)
    run(x, target.contiguous(), *_weights(weight, loss.dtype, x), loss, lse, target_weight)


def rows_bwd(
    dloss: Tensor, logits: Tensor, target: Tensor, weight: Tensor | None, lse: Tensor, dlogits: Tensor, *options: Any
) -> None:
    """Write the gradient of the logits, which may be the logits themselves where these are contiguous."""
    x, stride = rows_of(logits, logits.shape[1])
    run = _launch(True, logits.shape, (dloss.stride(0), stride), weight is not None, logits.dtype, *options)
    run(dloss, x, target.contiguous(), *_weights(weight, lse.dtype, x), lse, dlogits)


def cross_entropy_fwd(
    logits: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, label_smoothing: float, z_loss: float,
    softcap: float, reduction: str, dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The reduced loss in `dtype`; log-sum-exp (R,); the targets' weights (0 if ignored), or for a mean their sum."""
    loss = contiguous_like(target, dtype=wider(logits.dtype))
    lse, target_weight = torch.empty_like(loss), torch.empty_like(loss)
    options = ignore_index, label_smoothing, z_loss, softcap
    rows_fwd(logits, target, weight, loss, lse, target_weight, *options)
    if reduction == "mean":
        target_weight = target_weight.sum()
        return (loss.sum() / target_weight).type(dtype), lse, target_weight
    return (loss if reduction == "none" else loss.sum()).type(dtype), lse, target_weight


def _cross_entropy_fwd_fake(
    logits: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, label_smoothing: float, z_loss: float,
    softcap: float, reduction: str, dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    lse = contiguous_like(target, dtype=wider(logits.dtype))
    loss = torch.empty_like(lse, dtype=dtype) if reduction == "none" else lse.new_empty((), dtype=dtype)
    return loss, lse, lse.new_empty(()) if reduction == "mean" else torch.empty_like(lse)


def cross_entropy_bwd(
    dloss: Tensor, logits: Tensor, target: Tensor, weight: Tensor | None, lse: Tensor, ignore_index: int,
    label_smoothing: float, z_loss: float, softcap: float,
) -> Tensor:  # fmt: skip
    """The gradient of the logits."""
    dlogits = contiguous_like(logits)
    options = ignore_index, label_smoothing, z_loss, softcap
    rows_bwd(dloss, logits, target, weight, lse, dlogits, *options)
    return dlogits


def _definition(logits, target, weight, lse, *options):
    named = dict(zip(OPTIONS, options, strict=True))
    return (reference.cross_entropy(logits, target, weight=weight, reduction="none", **named),)


class _CrossEntropy(Function):
    """(loss, log-sum-exp of each row, weights); differentiable in the logits through the loss."""

    forward = registered_forward(cross_entropy_fwd, _cross_entropy_fwd_fake)

    @staticmethod
    def setup_context(ctx, inputs, output):
        logits, target, weight, *ctx.options, ctx.reduction, _ = inputs
        _, lse, target_weight = output
        ctx.save_for_backward(logits, target, weight, lse, target_weight)
        ctx.mark_non_differentiable(lse, target_weight)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, dloss, *_):
        if dloss is None:
            return (None,) * 9
        logits, target, weight, lse, target_weight = ctx.saved_tensors
        if ctx.reduction == "mean":
            dloss = dloss / target_weight
        if ctx.reduction != "none":
            dloss = dloss.expand(target.shape)
        return _cross_entropy_backward(dloss, logits, target, weight, lse, *ctx.options), *(None,) * 8


_cross_entropy_forward = KernelFunction(cross_entropy_fwd, _CrossEntropy)
_backward = registered_forward(cross_entropy_bwd, lambda dloss, logits, *_: contiguous_like(logits))
_cross_entropy_backward = KernelFunction(cross_entropy_bwd, backward_function(_backward, _definition, primals=(1,)))


def cross_entropy(
    logits: Tensor, target: Tensor, *, weight: Tensor | None = None, ignore_index: int = -100,
    reduction: Reduction = "mean", label_smoothing: float = 0.0, z_loss: float = 0.0, softcap: float | None = None,
    **wrong: NoReturn,
) -> Tensor:  # fmt: skip
    """Cross-entropy of class indices, as torch.nn.functional.cross_entropy defines it, with a z-loss and a soft cap.

    Args:
        logits: (R, V) or (V,) in float16, bfloat16 or float32 (float64 on the CPU's backends); a row must be
            contiguous, or the tensor is copied once.
        target: int64 (R,) or (): a class, or ignore_index. Any other value gives a NaN loss on the kernels (torch's
            own error on the torch and reference backends).
        weight: (V,) class weights, not differentiable.
        ignore_index: rows with this target contribute neither loss nor gradient, whatever their logits hold.
        reduction: "mean" (divided by the weight of the rows that count; NaN if there is none), "sum" or "none".
        label_smoothing: between 0 and 1.
        z_loss: a row that counts costs this many times the square of its log-sum-exp more.
        softcap: if positive, logits become softcap * tanh(logits / softcap) first; None or 0 is none.

    Returns:
        () or, for "none", like target; in the logits' dtype, under autocast in float32. Summed in float32 or wider.

    Raises:
        ValueError, TypeError: for shapes, dtypes, devices or options that do not fit.
        NotImplementedError: for class probabilities as target, and for a weight that requires a gradient.

    Source: `tileformer.kernels.reference.cross_entropy` is the definition.

    Example:
        >>> cross_entropy(torch.zeros(2, 4), torch.tensor([0, -100]))  # the second row is ignored
        tensor(1.3863)
    """
    if wrong:
        checks.misnamed("cross_entropy", wrong)
    if (type(logits) is not Tensor or logits.is_nested) and by_parts("cross_entropy", logits, 1):
        options: Any = dict(ignore_index=ignore_index, label_smoothing=label_smoothing, z_loss=z_loss, softcap=softcap)
        return _on_shards(logits, target, weight, reduction, options)
    if type(logits) is not Tensor or logits.dtype not in checks.FLOATING:
        checks.floating("cross_entropy", logits=logits)
    if logits.dim() not in (1, 2) or logits.shape[-1] == 0:
        raise ValueError(f"cross_entropy: logits are (R, V) or (V,), got {tuple(logits.shape)}: try .flatten(0, -2)")
    classes = logits.shape[-1]
    numbers = check("cross_entropy", logits, classes, target, weight, reduction, label_smoothing, z_loss, softcap)
    backend = choose("cross_entropy", logits)
    device = logits.device.type
    autocast = device != "meta" and torch.is_autocast_enabled(device)
    dtype = torch.promote_types(logits.dtype, torch.float32) if autocast else logits.dtype
    if backend == "torch" and (numbers[1] or numbers[2]):  # torch's own has neither a z-loss nor a soft cap
        backend, logits = "reference", logits.to(dtype)
    if backend == "reference":
        options = dict(zip(OPTIONS, (ignore_index, *numbers), strict=True), reduction=reduction)
        return reference.cross_entropy(logits, target, weight=weight, **options)
    if backend == "torch":
        options = dict(ignore_index=ignore_index, reduction=reduction, label_smoothing=numbers[0])
        wide = torch.promote_types(logits.dtype, torch.float32)
        ignored = (target == ignore_index).unsqueeze(-1)
        x = torch.where(ignored, 0.0, logits).to(wide)  # torch would hand a NaN in an ignored row on to its gradient
        return F.cross_entropy(x, target, None if weight is None else weight.to(wide), **options).to(dtype)
    rest = weight, int(ignore_index), *numbers, reduction, dtype
    if logits.dim() == 2:
        return _cross_entropy_forward(logits, target, *rest)[0]
    loss = _cross_entropy_forward(logits[None], target[None], *rest)[0]
    return loss.view(()) if reduction == "none" else loss


def _on_shards(logits: Any, target: Tensor, weight: Tensor | None, reduction: Any, options: dict[str, Any]) -> Tensor:
    """Of DTensors: each process computes the losses of its rows; sums are DTensors' own."""
    if logits.is_nested:
        checks.plain("cross_entropy", logits, target)
    split = any(p.is_shard() for p in logits.placements)
    if split and reduction == "mean" and weight is not None:
        raise TypeError(
            "cross_entropy: no mean with class weights over sharded rows: "
            "pass reduction='sum', and divide by the weights that count"
        )
    rows, each = ("rows",) * (logits.dim() - 1), "none" if split else reduction
    call = lambda x, y, w: cross_entropy(x, y, weight=w, reduction=each, **options)  # type: ignore  # noqa: E731
    result = (rows, target.shape) if each == "none" else ((), ())
    losses = on_shards("cross_entropy", call, [(logits, (*rows, None)), (target, rows), (weight, ())], [result])
    if reduction == each:
        return losses
    total = losses.sum(dtype=wider(losses.dtype))
    total = total if reduction == "sum" else total / (target != options["ignore_index"]).sum()
    return total.to(losses.dtype)


def check(
    op: str, rows: Tensor, classes: int, target: Tensor, weight: Tensor | None, reduction: str, label_smoothing: Any,
    z_loss: Any, softcap: Any,
) -> tuple[float, float, float]:  # fmt: skip
    """Raise unless targets and options fit these rows; label_smoothing, z_loss and softcap (0: none) as numbers."""
    numbers: Any = label_smoothing, z_loss, 0.0 if softcap is None else softcap
    if not type(label_smoothing) is type(z_loss) is type(numbers[2]) is float:
        numbers = tuple(checks.number(op, name, x) for name, x in zip(OPTIONS[1:], numbers, strict=True))
    if type(target) is not Tensor:
        checks.tensors(op, target=target)
    if target.device != rows.device:
        checks.same_device(op, rows, target=target)
    if target.is_floating_point():
        raise NotImplementedError(f"{op}: target holds class probabilities: pass indices, or use torch's own")
    if target.dtype != torch.int64:
        raise TypeError(f"{op}: target must be int64, got {checks.name_of(target.dtype)}: try target.long()")
    if target.shape != rows.shape[:-1]:
        checks.same_shape(op, rows.shape[:-1], target=target)
    checks.fits(op, "weight", weight, rows, (classes,))
    if weight is not None and checks.differentiated(weight):
        raise NotImplementedError(f"{op}: weight requires a gradient, and gets none: pass weight.detach()")
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(f"{op}: reduction must be 'none', 'mean' or 'sum', got {reduction!r}")
    if not 0.0 <= numbers[0] <= 1.0:
        raise ValueError(f"{op}: label_smoothing must lie between 0 and 1, got {numbers[0]}")
    if not (0.0 <= numbers[1] < math.inf and 0.0 <= numbers[2] < math.inf):
        raise ValueError(f"{op}: z_loss and softcap are 0 or positive, got {numbers[1]} and {numbers[2]}")
    return numbers
