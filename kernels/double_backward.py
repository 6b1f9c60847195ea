"""Second derivatives of the fused ops, by differentiating the reference twice."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tileformer.kernels.autograd import Function


def backward_function(
    fused: Any, definition: Callable[..., tuple[Tensor, ...]], primals: tuple[int, ...], n_cotangents: int = 1
) -> type[Function]:
    """The Function of `fused(*cotangents, *inputs)`, which is a vector-Jacobian product of the definition.

    Its own derivative is that of the product by `torch.func.vjp`, and can be differentiated again. 16-bit inputs are
    computed in float32.

    Args:
        fused: a static method; returns a gradient for each primal.
        definition: of the inputs; returns the tuple of outputs whose gradients the cotangents are.
        primals: positions of the differentiable inputs among all arguments; these and cotangents may be None.
    """

    class Backward(Function):
        forward = fused

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.constants = [None if isinstance(x, Tensor) else x for x in inputs]
            ctx.save_for_backward(*(x if isinstance(x, Tensor) else None for x in inputs))
            ctx.set_materialize_grads(False)

        @staticmethod
        def backward(ctx, *tangents):
            inputs = [x if t is None else t for t, x in zip(ctx.saved_tensors, ctx.constants, strict=True)]
            given = {i: t for i, t in zip(primals, tangents, strict=True) if inputs[i] is not None}
            dys = [i for i in range(n_cotangents) if inputs[i] is not None]

            def gradients(values, cotangents):
                def outputs(*values):
                    args = dict(enumerate(inputs)) | dict(zip(given, values, strict=True))
                    results = definition(*list(args.values())[n_cotangents:])
                    return tuple(results[i] for i in dys)

                _, pull = torch.func.vjp(outputs, *values)
                return pull(tuple(cotangents))

            wide = torch.promote_types(inputs[primals[0]].dtype, torch.float32)
            out, pull = torch.func.vjp(gradients, *([inputs[i].to(wide) for i in at] for at in (given, dys)))
            # The gradient of a primal that needs none is empty, and so is its tangent.
            used = {i: t for i, t in given.items() if t is not None and t.shape == inputs[i].shape}
            pulled = pull(
                tuple(used[i].to(wide) if i in used else torch.zeros_like(o) for i, o in zip(given, out, strict=True))
            )
            grads = dict(zip((*given, *dys), pulled[0] + pulled[1], strict=True))
            return tuple(grads[i].to(x.dtype) if i in grads else None for i, x in enumerate(inputs))

    Backward.__name__ = fused.__name__
    return Backward
