"""The error budget: how far a kernel may be from float64, measured by what plain eager PyTorch reaches in the same dtype.

    |got - truth| <= 2 max|eager - truth| + c eps(dtype) S + 8 eps(float32) R

truth is the reference in float64 on the same (rounded) inputs, eager the reference in the kernel's dtype (for half precision: in float32, rounded
once). The second term is for results that cancel to nearly nothing, where eager may be exact by luck, and for the weights that kernels round before
a product: S, element by element, is the sum of the absolute values of what is added up; c is 1 for 16-bit types, whose kernels accumulate in
float32, and 8 for float32, whose error grows with the order of summation. R is for what a backward computes again, in another order than the
forward did: a score that is off by e makes its weight wrong by the factor e, so R is S with each weight times the sum of the absolute values that
its score adds up. Eager keeps its weights, and does not have that error.

A maximum misses an accumulator that loses a little everywhere; `rms_ratio` sees it on long sums.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tileformer.kernels import reference


def over_budget(got: Tensor, eager: Tensor, truth: Tensor, size: Tensor | float, again: Tensor | float = 0.0) -> float:
    """Largest error over its budget, S = `size`, R = `again`: at most 1 passes. Infinite for a NaN or infinity that the truth has not."""
    if got.shape != truth.shape:
        raise ValueError(f"shape {tuple(got.shape)} instead of {tuple(truth.shape)}")
    dtype = got.dtype
    got, eager, truth = (x.detach().double().cpu() for x in (got, eager, truth))
    finite = truth.isfinite()
    if not (
        torch.equal(got[~finite].nan_to_num(nan=0.5), truth[~finite].nan_to_num(nan=0.5))
        and got[finite].isfinite().all()
    ):
        return float("inf")
    error = (got - truth)[finite].abs()
    if error.numel() == 0 or error.max() == 0.0:
        return 0.0
    yardstick = (torch.where(eager.isfinite(), eager, truth) - truth)[finite].abs().max()
    factor = 1 if dtype in (torch.float16, torch.bfloat16) else 8
    size, again = (torch.as_tensor(x, dtype=torch.float64).cpu().expand(truth.shape)[finite] for x in (size, again))
    single = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    budget = 2 * yardstick + factor * torch.finfo(dtype).eps * size + 8 * single * again
    return float((error / budget.clamp_min(torch.finfo(torch.float64).tiny)).max())


def assert_within_budget(
    name: str, got: Tensor, eager: Tensor, truth: Tensor, size: Tensor | float | None = None
) -> None:
    """AssertionError if an error is larger than its budget. `size` is max|truth| when not given."""
    if size is None:
        size = float(truth[truth.isfinite()].abs().max()) if truth.isfinite().any() else 0.0
    ratio = over_budget(got, eager, truth, size)
    assert ratio <= 1.0, f"{name}: error is {ratio:.3g} times its budget"


def attention_sizes(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, dout: Tensor, dlse: Tensor | None = None, **options: Any
) -> dict[str, Tensor | float]:
    """S of out, lse, dq, dk, dv and dbias: the sums of `reference.attention` and of its backward with every term replaced by its absolute value;
    and R of the gradients, as "dq again" and so on.

    With P the weights and M their dropout (0 or 1 / (1 - p)): dS is at most P (M |dO| |V|^T + rowsum|dO O| + |dlse|).
    """
    (b, h, _, d), h_kv, t_k = q.shape, k.shape[1], k.shape[2]
    for name in ("return_lse", "return_weights"):
        options.pop(name, None)
    q, k, v = (torch.where(x.isfinite(), x, 0.0) for x in (q, k, v))  # padding may hold anything
    identity = torch.eye(t_k, dtype=q.dtype, device=q.device).expand(b, h_kv, t_k, t_k)
    dropped = reference.attention(q, k, identity, **options)
    weights = reference.attention(q, k, identity, **(options | dict(dropout_p=0.0)))
    scale = d**-0.5 if options.get("scale") is None else abs(options["scale"])
    key, value = (x.abs().repeat_interleave(h // h_kv, 1) for x in (k, v))
    delta = (out * dout).abs().sum(-1, keepdim=True) + (0 if dlse is None else dlse.abs()[..., None])
    ds = dropped * (dout.abs() @ value.transpose(-1, -2)) + weights * delta
    scores = scale * (q.abs() @ key.transpose(-1, -2))
    mask, bias = options.get("mask"), options.get("bias")
    for added in (mask, bias):
        if added is not None and added.dtype != torch.bool:
            scores = scores + torch.where(added.isfinite(), added.abs(), 0.0)
    shared = lambda x: x.unflatten(1, (h_kv, h // h_kv)).sum(2)  # noqa: E731

    def gradients(ds: Tensor, dropped: Tensor) -> dict[str, Tensor | float]:
        return dict(
            dq=scale * ds @ key,
            dk=scale * shared(ds.transpose(-1, -2) @ q.abs()),
            dv=shared(dropped.transpose(-1, -2) @ dout.abs()),
            dbias=0.0 if bias is None else ds.sum_to_size(bias.shape),
        )

    again = {f"{name} again": x for name, x in gradients(ds * scores, dropped * scores).items()}
    return dict(out=dropped @ value, lse=scores.amax(-1) if t_k else 0.0, **gradients(ds, dropped), **again)


def rms_ratio(got: Tensor, eager: Tensor, truth: Tensor) -> float:
    """Root-mean-square error of `got` over that of eager in the same dtype."""
    error, yardstick = ((x.detach().double() - truth.double()).square().mean().sqrt() for x in (got, eager))
    return float(error / yardstick)
