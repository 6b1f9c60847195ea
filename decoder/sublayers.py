"""What stands between the GEMMs and the attention of a sublayer, in as few passes as the kernels have.

Where kernels serve (a GPU), a linear map leaves its bias to the pass behind it: bias, activation and dropout are one;
bias, dropout, residual and norm are one. A part that somebody replaced or hooked is called as the module that it is.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tileformer.decoder.nn.modules import HOOKS, Dropout, LayerNorm, RMSNorm, fuses_residual
from tileformer.kernels import autograd, bias_activation_dropout, random
from tileformer.kernels.add_norm import add_norm
from tileformer.kernels.backend import choose

_LINEAR = (nn.Linear, nn.modules.linear.NonDynamicallyQuantizableLinear)
_ACTIVATIONS: dict[Any, str] = {F.relu: "relu", F.gelu: "gelu", F.silu: "silu"}


def kernels_serve(x: Tensor) -> bool:
    """Whether calls on such tensors run fused kernels, compiled or interpreted, rather than plain torch operators."""
    return choose("add_layer_norm", x) in ("triton", "interpret")


def is_plain(module: Any, kinds: tuple[type, ...]) -> bool:
    """Whether a module is of just these classes, and nobody has hooked or compiled it alone: what it computes may be
    done elsewhere."""
    own = type(module) in kinds and "forward" not in module.__dict__ and module._compiled_call_impl is None
    return own and not any(getattr(module, hook) for hook in HOOKS)


class Sublayers:
    """The parts of a layer's forward that its sublayers share. Made for each call, with the seeds of its dropout.

    Args:
        layer: with linear1, linear2, activation, dropout, norm_first and lean.
        x: what it is called with.
        calls: of dropout, at most, in this forward: all their seeds are one draw.
    """

    def __init__(self, layer: Any, x: Tensor, calls: int) -> None:
        self.layer, self.fused = layer, kernels_serve(x)
        self.lean = self.fused and layer.lean and not torch.compiler.is_compiling()
        self.again: Callable[[], Tensor] | None = None  # makes what the next GEMM reads, where that is not kept
        drawn = self.fused and layer.training
        self.seeds: list[Tensor | None] = [*random.new_seeds(x.device, calls)] if drawn else [None] * calls

    def begin(self, norm: Any, x: Tensor, h: Tensor | None = None) -> Tensor:
        """What the first sublayer reads: norm(x) with norm_first, unless it is given as h, or x."""
        if not self.layer.norm_first:
            return x
        h = norm(x) if h is None else h
        if self.lean:
            kept, dtype = x.detach(), h.dtype
            self.again = lambda: norm(kept).to(dtype)
        return h

    def open(self, attention: nn.MultiheadAttention) -> dict[str, Tensor | bool | None]:
        """Options with which an attention returns the heads before its last linear map, which `end` does: none where it
        cannot."""
        if not self.fused or type(attention).forward is not getattr(type(attention), "opens", None):
            return {}
        if not is_plain(attention, (type(attention),)) or not is_plain(attention.out_proj, _LINEAR):
            return {}
        return {"project": False, "seed": self.seeds.pop()}

    def feed_forward(self, x: Tensor) -> Tensor:
        """The two linear maps but for the second, which `end` does."""
        layer, dropout = self.layer, self.layer.dropout
        activation = _ACTIVATIONS.get(layer.activation)
        if not (self.fused and activation and is_plain(layer.linear1, _LINEAR) and is_plain(dropout, (Dropout,))):
            return dropout(layer.activation(layer.linear1(x)))
        with self.reading(x):
            x = F.linear(x, layer.linear1.weight)
        options = dict(bias=layer.linear1.bias, p=dropout.p if dropout.training else 0.0, seed=self.seeds.pop())
        if self.lean:
            kept = x.detach()
            self.again = lambda: bias_activation_dropout(kept, activation, **options)
        return bias_activation_dropout(x, activation, **options)

    def reading(self, x: Tensor) -> AbstractContextManager[Any]:
        """Inside, of a ``lean`` layer, who saves x saves how to make it: a GEMM whose input is a norm's or an
        activation's result computes that again in the backward."""
        again, self.again = self.again, None
        if again is None:
            return nullcontext()
        place = x.data_ptr(), x.numel()

        def keep(a: Tensor) -> Any:
            return a.shape if (a.data_ptr(), a.numel()) == place else a

        def make(kept: Any) -> Tensor:
            if isinstance(kept, Tensor):
                return kept
            if torch.is_grad_enabled():
                raise NotImplementedError("a lean layer has no second derivative: set its `lean` to False")
            return again().view(kept)

        return torch.autograd.graph.saved_tensors_hooks(keep, make)

    def end(
        self, x: Tensor, linear: nn.Linear | None, residual: Tensor, dropout: nn.Dropout, norm: nn.Module | None
    ) -> tuple[Tensor, Tensor]:
        """linear(x), dropped, added to the residual and normalised: what the next sublayer reads, and its residual.

        ``norm`` is the next sublayer's with norm_first, or None behind the last.
        """
        fused = self.fused and is_plain(norm, (LayerNorm, RMSNorm)) and fuses_residual(dropout)
        if fused and isinstance(norm, LayerNorm | RMSNorm) and len(norm.normalized_shape) == 1:
            x_bias = None
            if linear is not None and is_plain(linear, _LINEAR):
                with self.reading(x):
                    x, x_bias = F.linear(x, linear.weight), linear.bias
            elif linear is not None:
                x = linear(x)
            p = dropout.p if dropout.training else 0.0
            op, bias = ("add_rms_norm", None) if isinstance(norm, RMSNorm) else ("add_layer_norm", norm.bias)
            seed, first = self.seeds.pop(), self.layer.norm_first
            y, x, total = add_norm(op, x, residual, norm.weight, bias, norm.eps, x_bias, p, seed, first)
            if self.lean:
                kept, dtype = total.detach(), y.dtype
                self.again = lambda: norm(kept).to(dtype)
            return y, x
        if linear is not None:
            with self.reading(x):
                x = linear(x)
        x = dropout(x, residual) if fuses_residual(dropout) else residual + dropout(x)
        y = x if norm is None else norm(x)
        return y, x if self.layer.norm_first else y


class _SplitHeads(torch.autograd.Function):
    """(B, T, parts H D) -> views (B, H, T, D), whose gradients, where they lie beside each other, are not copied."""

    @staticmethod
    def forward(ctx, x, parts, heads):
        ctx.shape = x.shape
        return tuple(
            part.transpose(1, 2) for part in x.view(*x.shape[:2], parts, heads, x.shape[2] // (parts * heads)).unbind(2)
        )

    @staticmethod
    def backward(ctx, *grads):
        joined = None if torch.is_grad_enabled() else _beside(grads, ctx.shape)
        if joined is None:
            joined = torch.stack([grad.transpose(1, 2) for grad in grads], 2).view(ctx.shape)
        return joined, None, None


def _beside(grads: Sequence[Tensor], shape: torch.Size) -> Tensor | None:
    """The tensor of that shape whose parts they are."""
    (_, t, row), (_, h, _, d) = shape, grads[0].shape
    first = grads[0].storage_offset()
    for i, grad in enumerate(grads):
        if grad.stride() != (t * row, d, row, 1) or grad.storage_offset() != first + i * h * d:
            return None
        if grad.untyped_storage().data_ptr() != grads[0].untyped_storage().data_ptr():
            return None
    return grads[0].as_strided(shape, (t * row, row, 1))


class _TwoLinears(torch.autograd.Function):
    """F.linear of x by the first C rows of a weight and bias, and of y by the others; each has one gradient, whole."""

    @staticmethod
    def forward(ctx, x, y, weight, bias):
        ctx.save_for_backward(x, y, weight)
        c = x.shape[-1]
        b_x, b_y = (None, None) if bias is None else (bias[:c], bias[c:])
        return F.linear(x, weight[:c], b_x), F.linear(y, weight[c:], b_y)

    @staticmethod
    def backward(ctx, du, dv):
        x, y, weight = ctx.saved_tensors
        need_dx, need_dy, need_dweight, need_dbias = ctx.needs_input_grad
        c, rows = x.shape[-1], lambda a: a.reshape(-1, a.shape[-1])
        dx = du @ weight[:c] if need_dx else None
        dy = dv @ weight[c:] if need_dy else None
        dweight = dbias = None
        if torch.is_grad_enabled():  # to be differentiated again
            dweight = torch.cat([rows(du).t() @ rows(x), rows(dv).t() @ rows(y)]) if need_dweight else None
            dbias = torch.cat([rows(du).sum(0), rows(dv).sum(0)]) if need_dbias else None
            return dx, dy, dweight, dbias
        if need_dweight:
            dweight = torch.empty_like(weight)
            torch.mm(rows(du).t(), rows(x), out=dweight[:c])
            torch.mm(rows(dv).t(), rows(y), out=dweight[c:])
        if need_dbias:
            dbias = weight.new_empty(len(weight))
            torch.sum(rows(du), 0, out=dbias[:c])
            torch.sum(rows(dv), 0, out=dbias[c:])
        return dx, dy, dweight, dbias


def _by_hand(x: Tensor) -> bool:
    """Whether the two Functions may stand for torch's own operators: kernels serve, and nothing else looks on."""
    wants = torch.is_grad_enabled() and type(x) is Tensor and kernels_serve(x)
    return wants and not torch.compiler.is_compiling() and not autograd.listens_to_ops()


def split_heads(x: Tensor, parts: int, heads: int) -> tuple[Tensor, ...] | None:
    """(B, T, parts H D) as views (B, H, T, D); None where torch's own operators are as good."""
    if x.dim() == 3 and x.requires_grad and _by_hand(x):
        return _SplitHeads.apply(x, parts, heads)
    return None


def two_linears(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor] | None:
    """x by the first C rows of a weight (3 C, C), y by the others; None where torch's own operators are as good."""
    if type(weight) is not nn.Parameter or not weight.requires_grad or not _by_hand(x) or type(y) is not Tensor:
        return None
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, y, weight, bias = (a if a is None else a.to(dtype) for a in (x, y, weight, bias))  # type: ignore[assignment]
    return _TwoLinears.apply(x, y, weight, bias)
