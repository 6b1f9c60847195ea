"""Second derivatives of the fused ops, by differentiating the reference twice."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def second_derivative(
    reference: Callable[..., tuple[Tensor, ...]],
    primals: Sequence[Tensor],
    cotangents: Sequence[Tensor],
    tangents: Sequence[Tensor | None],
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Pull `tangents`, which belong to the gradients of `reference` at `primals`, back to primals and cotangents.

    A fused backward computes g(primals, cotangents) = the vector-Jacobian product of `reference`; this is the vector-Jacobian product
    of g. It is built from `torch.func.vjp` alone, so it can be differentiated again. 16-bit inputs are computed in float32.

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
