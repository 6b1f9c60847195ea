"""Derivatives of the fused ops by differentiating the reference: second ones, and what has no kernel of its own."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tileformer.kernels.autograd import Function

Definition = Callable[..., tuple[Tensor, ...]]


def differentiated(fused: Any, definition: Definition, primals: Sequence[int]) -> type[Function]:
    """The Function of `fused`, whose derivative is that of its definition by `torch.func.vjp`, differentiable again.

    Args:
        fused: a static method; returns a tensor for each of the definition's, empty where nobody wants it.
        definition: of the same arguments. 16-bit primals come in float32.
        primals: positions of the differentiable arguments, of which all but the first may be None.
    """

    class Differentiated(Function):
        forward = fused

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.constants = [None if isinstance(x, Tensor) else x for x in inputs]
            ctx.save_for_backward(*(x if isinstance(x, Tensor) else None for x in inputs))
            ctx.set_materialize_grads(False)

        @staticmethod
        def backward(ctx, *grad_outputs):
            inputs = [x if t is None else t for t, x in zip(ctx.saved_tensors, ctx.constants, strict=True)]
            given = [i for i in primals if inputs[i] is not None]
            wide = torch.promote_types(inputs[primals[0]].dtype, torch.float32)
            compute = lambda *values: definition(*_replaced(inputs, given, values))  # noqa: E731
            out, pull = torch.func.vjp(compute, *(inputs[i].to(wide) for i in given))
            # A result that nobody wants is empty, and so is its gradient.
            of = lambda y, dy: torch.zeros_like(y) if dy is None or dy.shape != y.shape else dy.to(y.dtype)  # noqa: E731
            grads = dict(zip(given, pull(tuple(map(of, out, grad_outputs))), strict=True))
            return tuple(grads[i].to(x.dtype) if i in grads else None for i, x in enumerate(inputs))

    Differentiated.__name__ = fused.__name__
    return Differentiated


def backward_function(fused: Any, definition: Definition, primals: Sequence[int], outputs: int = 1) -> type[Function]:
    """The same of a `fused(*cotangents, *inputs)` that is the vector-Jacobian product of `definition(*inputs)`.

    `fused` returns a gradient for each primal, counted among all arguments. A cotangent of the `outputs` may be None.
    """

    def gradients(*args):
        given = [i for i in primals if args[i] is not None]
        dys = [i for i in range(outputs) if args[i] is not None]

        def compute(*values):
            results = definition(*_replaced(args, given, values)[outputs:])
            return tuple(results[i] for i in dys)

        _, pull = torch.func.vjp(compute, *(args[i] for i in given))
        grads = dict(zip(given, pull(tuple(args[i] for i in dys)), strict=True))
        return tuple(grads.get(i, args[primals[0]].new_empty(0)) for i in primals)

    return differentiated(fused, gradients, (*primals, *range(outputs)))


def _replaced(args: Sequence[Any], at: Sequence[int], values: Sequence[Any]) -> list[Any]:
    """The arguments with other values at these positions."""
    return list((dict(enumerate(args)) | dict(zip(at, values, strict=True))).values())
