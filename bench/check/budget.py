"""The error budget: how far a kernel may be from float64, by what plain eager PyTorch reaches in the same dtype.

    |got - truth| <= 2 max|eager - truth| + c eps(dtype) S + 8 eps(float32) R

truth is the reference in float64 on the same (rounded) inputs, eager the reference in the kernel's dtype (for half
precision: in float32, rounded once). The second term is for results that cancel to nearly nothing, where eager may be
exact by luck, and for weights that are rounded before a product: S, element by element, is the sum of the absolute
values of what is added up; c is 1 for 16-bit types, accumulated in float32, and 8 for float32, whose error grows with
the order of summation. R is for what a backward computes again, in another order: a score that is off by e makes its
weight wrong by the factor e, so R is S with each weight times the sum of absolute values that its score adds up. Eager
keeps its weights, and does not have that error.

A maximum misses an accumulator that loses a little everywhere; `rms_ratio` sees it on long sums.
"""

import torch
from torch import Tensor

from tileformer.bench.calls.op import largest

OURS_C, PEERS_C = (1, 8), (5, 256)  # of 16-bit types, of float32


Size = Tensor | float


def over_budget(
    got: Tensor, eager: Tensor, truth: Tensor, size: Size, again: Size = 0.0, c: tuple[int, int] = OURS_C
) -> float:
    """Largest error over its budget: at most 1 passes. Infinite for a NaN or infinity that the truth has not.

    Args:
        got: the result; everything is computed on its device.
        size: S.
        again: R.
        c: `PEERS_C` for other libraries, PyTorch among them: they round scores and weights on their way, and add up
            thousands of numbers one by one. Products in TF32 are still far beyond it.
    """
    if got.shape != truth.shape:
        raise ValueError(f"shape {tuple(got.shape)} instead of {tuple(truth.shape)}")
    dtype, device = got.dtype, got.device
    got, eager, truth = (x.detach().to(device).double() for x in (got, eager, truth))
    finite = truth.isfinite()
    others, wanted = (x[~finite].nan_to_num(nan=0.5) for x in (got, truth))
    if not torch.equal(others, wanted) or not got[finite].isfinite().all():
        return float("inf")
    error = (got - truth)[finite].abs()
    if error.numel() == 0 or error.max() == 0.0:
        return 0.0
    yardstick = (torch.where(eager.isfinite(), eager, truth) - truth)[finite].abs().max()
    wide = lambda x: torch.as_tensor(x, dtype=torch.float64, device=device).expand(truth.shape)[finite]  # noqa: E731
    size, again = (wide(x) if isinstance(x, Tensor) and x.dim() else float(x) for x in (size, again))
    single = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    roundings = c[dtype not in (torch.float16, torch.bfloat16)]
    budget = 2 * yardstick + roundings * torch.finfo(dtype).eps * size + 8 * single * again
    return float((error / budget.clamp_min(torch.finfo(torch.float64).tiny)).max())


def assert_within_budget(name: str, got: Tensor, eager: Tensor, truth: Tensor, size: Size | None = None) -> None:
    """AssertionError if an error is larger than its budget. `size` is max|truth| when not given."""
    ratio = over_budget(got, eager, truth, largest(truth) if size is None else size)
    assert ratio <= 1.0, f"{name}: error is {ratio:.3g} times its budget"


def rms_ratio(got: Tensor, eager: Tensor, truth: Tensor) -> float:
    """Root-mean-square error of `got` over that of eager in the same dtype."""
    error, yardstick = ((x.detach().double() - truth.double()).square().mean().sqrt() for x in (got, eager))
    return float(error / yardstick)
