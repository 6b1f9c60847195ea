"""Second derivatives of the fused ops, by differentiating the reference twice."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from tileformer.kernels.autograd import Function, KernelFunction, registered_forward

P = ParamSpec("P")
R = TypeVar("R")


def second_derivative(
    reference: Callable[..., tuple[Tensor, ...]],
    primals: Sequence[Tensor],
    cotangents: Sequence[Tensor],
    tangents: Sequence[Tensor | None],
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Pull `tangents`, which belong to the gradients of `reference` at `primals`, back to primals and cotangents.

    A fused backward computes g(primals, cotangents) = the vector-Jacobian product of `reference`; this is that of g.
    `torch.func.vjp` alone makes it, so it can be differentiated again. 16-bit inputs are computed in float32.

    Args:
        reference: takes the primals, returns a tuple of outputs that match `cotangents`.
        tangents: one per primal; None counts as zero.

    Returns:
        The gradients of the primals and of the cotangents, in their own dtypes.
    """
    wide = torch.promote_types(primals[0].dtype, torch.float32)
    given = [t.to(wide) for t in primals], [t.to(wide) for t in cotangents]

    def gradients(primals: list[Tensor], cotangents: list[Tensor]) -> tuple[Tensor, ...]:
        _, pull = torch.func.vjp(lambda *x: reference(*x), *primals)  # type: ignore[misc]
        return pull(tuple(cotangents))

    out, pull = torch.func.vjp(gradients, *given)  # type: ignore[misc]  # its third value comes only with has_aux
    pulled = pull(tuple(torch.zeros_like(o) if t is None else t.to(wide) for o, t in zip(out, tangents, strict=True)))
    grads_primals, grads_cotangents = pulled
    return (
        tuple(g.to(t.dtype) for g, t in zip(grads_primals, primals, strict=True)),
        tuple(g.to(t.dtype) for g, t in zip(grads_cotangents, cotangents, strict=True)),
    )


def backward_function(
    forward_: Any, definition: Callable[..., tuple[Tensor, ...]], primals: tuple[int, ...], cotangents: int = 1
) -> type[Function]:
    """The Function of a backward, `forward_(*cotangents, *inputs)`, of which the derivative is one of `definition`.

    Args:
        forward_: as a static method; returns a gradient for each primal. Cotangents and primals may be None.
        definition: of `inputs`: the tuple of outputs whose gradients the cotangents are.
        primals: positions of the differentiable inputs among all arguments.
    """

    class Backward(Function):
        forward = forward_

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.constants = [None if isinstance(x, Tensor) else x for x in inputs]
            ctx.save_for_backward(*(x if isinstance(x, Tensor) else None for x in inputs))
            ctx.set_materialize_grads(False)

        @staticmethod
        def backward(ctx, *tangents):
            inputs = [x if t is None else t for t, x in zip(ctx.saved_tensors, ctx.constants, strict=True)]
            given = {i: t for i, t in zip(primals, tangents, strict=True) if inputs[i] is not None}
            dys = {i: dy for i, dy in enumerate(inputs[:cotangents]) if dy is not None}

            def outputs(*values):
                args = dict(enumerate(inputs)) | dict(zip(given, values, strict=True))
                results = definition(*list(args.values())[cotangents:])
                return tuple(results[i] for i in dys)

            values = [inputs[i] for i in given]
            # The gradient of a primal that needs none is empty, and so is its tangent.
            used = [t if t is None or t.shape == x.shape else None for t, x in zip(given.values(), values, strict=True)]
            first, second = second_derivative(outputs, values, list(dys.values()), used)
            grads = dict(zip((*given, *dys), first + second, strict=True))
            return tuple(grads.get(i) for i in range(len(inputs)))

    return Backward


def twice_differentiable(
    launcher: Callable[P, R], fake: Callable[..., R], definition: Callable[..., tuple[Tensor, ...]],
    primals: tuple[int, ...], cotangents: int = 1,
) -> KernelFunction[P, R]:  # fmt: skip
    """A fused backward as a registered op: see `backward_function`."""
    function = backward_function(registered_forward(launcher, fake), definition, primals, cotangents)
    function.__name__ = launcher.__name__
    return KernelFunction(launcher, function)
