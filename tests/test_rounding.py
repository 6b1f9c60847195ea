"""Everything between the inputs and a result is float32: a result in half precision is float64's, rounded once.

The error budget (bench/check/budget.py) forgives what eager PyTorch loses, and eager rounds sums, statistics and wide
side tensors in the same places as a careless kernel would. Here float64 alone is the measure: sums of one sign, large
means, gradients that follow what they meet.
"""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tileformer.kernels import (
    attention,
    cross_entropy,
    dropout,
    dropout_keep,
    layer_norm,
    log_softmax,
    softmax,
    use_backend,
)

torch_backend = importlib.import_module("tileformer.kernels.attention.torch_backend")
B, H = torch.bfloat16, torch.float16
Convert = Callable[[Tensor], Tensor]  # an input as the kernels get it, or as float64
pytestmark = pytest.mark.interprets


def _randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(B)


def _xhat(*shape: int) -> Tensor:
    return torch.nn.functional.layer_norm(_randn(*shape).double(), shape[-1:])


def _gradient(op: Callable[..., Tensor], of: str, dout: Tensor | None = None, **leaves: Tensor) -> Tensor:
    """What `op(**leaves)` hands back for the leaf `of`; dout is 1 where not given."""
    leaves[of] = leaves[of].clone().requires_grad_()
    out = op(**leaves)
    return torch.autograd.grad(out, leaves[of], torch.ones_like(out) if dout is None else dout.to(out.dtype))[0]


def _norm(n: int) -> Callable[..., Tensor]:
    return lambda x, weight=None, bias=None: layer_norm(x, (n,), weight, bias)


def _tall(c: Convert) -> Tensor:
    """Logarithms of a long row: all but one are -30, and each tile but the first brings a small gradient."""
    n = 41 * 8192
    x, dy = torch.full((1, n), -30.0, dtype=B), torch.zeros(1, n, dtype=B)
    x[0, 0], dy[0, 1], dy[0, 8193::8192] = 0.0, 256.0, 0.875
    return _gradient(log_softmax, "x", c(dy), x=c(x))


def _weights(c: Convert, q: Tensor, k: Tensor, kind: bool | str) -> Tensor:
    return attention(c(q), c(k), c(k), scale=1.0 if kind is True else None, return_weights=kind)[1]


def _bias(c: Convert) -> Tensor:
    """256 heads add a third each to the gradient of one bias; their outputs, which a backward reads, are exactly 0."""
    zeros, v = torch.zeros(16, 16, 1, 4, dtype=B), torch.zeros(16, 16, 2, 4, dtype=B)
    v[..., 0, 0], v[..., 1, 0] = 0.66796875, -0.66796875
    op = lambda bias: attention(c(zeros), c(zeros.expand(16, 16, 2, 4)), c(v), bias=bias)  # noqa: E731
    return _gradient(op, "bias", bias=c(torch.zeros(1, 2, dtype=B)))


# What is computed, and the sum of the absolute values of what its largest element adds up.
CASES: dict[str, tuple[Callable[[Convert], Tensor], float]] = {
    "dropout: a wide residual": (
        lambda c: dropout(c(torch.full((1, 64), 1e-3, dtype=B)), 0.5, seed=torch.tensor([7]), residual=c(torch.full((1, 64), 1.001))), 1.0),
    "softmax: a wide mask": (lambda c: softmax(c(torch.zeros(1, 2, dtype=B)), mask=c(torch.tensor([[100.4, 100.0]]))), 100.0),
    "log_softmax: the logarithm of the sum": (lambda c: log_softmax(c(torch.tensor([[40.0, 40.25, 40.0]], dtype=B))), 40.0),
    "log_softmax: the sum of a long row's gradient": (_tall, 600.0),
    "layer_norm: dbias over many rows": (
        lambda c: _gradient(_norm(2049), "bias", x=c(_randn(1200, 2049)), bias=c(torch.zeros(2049, dtype=B))), 1200.0),
    "layer_norm: dx where dy follows x": (lambda c: _gradient(_norm(64), "x", c((30 * _xhat(1, 64)).to(B)), x=c(_randn(1, 64))), 120.0),
    "layer_norm: dx of a long row": (lambda c: _gradient(_norm(20000), "x", c(_xhat(1, 20000).to(B)), x=c(_randn(1, 20000))), 8.0),
    "layer_norm: dx by a wide weight": (lambda c: _gradient(_norm(8), "x", x=c(_randn(1, 8)), weight=c(1 + torch.arange(8) * 0.0004)), 2.0),
    "cross_entropy: smoothing of many classes": (
        lambda c: cross_entropy(c((_randn(1, 10000) * 0.1 + 8).to(H)), torch.tensor([3]), label_smoothing=0.1), 20.0),
    "cross_entropy: dlogits by wide class weights": (
        lambda c: _gradient(
            lambda x: cross_entropy(x, torch.tensor([0]), weight=c(torch.tensor([1.0, 1.0035])), label_smoothing=1.0, reduction="sum"),
            "x", x=c(torch.zeros(1, 2, dtype=B))), 2.0),
    "attention: weights of large scores": (
        lambda c: _weights(c, torch.full((1, 1, 1, 2), 16.0, dtype=B), torch.tensor([[[[16, 0.046875], [16, 0]]]], dtype=B), True), 256.0),
    "attention: the average of many heads' weights": (lambda c: _weights(c, _randn(1, 32, 4, 8), _randn(1, 32, 5, 8, seed=1), "average"), 5.0),
    "attention: dq where values have a large mean": (
        lambda c: _gradient(lambda q: attention(q, c(_randn(1, 1, 8, 64, seed=1)), c(torch.full((1, 1, 8, 64), 1.2578125, dtype=B))),
                            "q", c(torch.full((1, 1, 8, 64), 1.1015625, dtype=B)), q=c(_randn(1, 1, 8, 64))), 50.0),
    "attention: dbias over many heads": (_bias, 256 / 3),
}  # fmt: skip


@pytest.mark.parametrize("served_by", ["interpret", "torch", "reference"])
@pytest.mark.parametrize("name", CASES)
def test_a_result_is_rounded_once(name: str, served_by: str) -> None:
    if served_by == "torch" and name.startswith("dropout"):
        pytest.skip("it draws other bits; test_dropout_of_the_torch_backend_is_rounded_once")
    call, size = CASES[name]
    with use_backend(served_by):
        got = call(lambda x: x)
    with use_backend("reference"):
        truth = call(lambda x: x.double())
    budget = torch.finfo(got.dtype).eps * truth.abs() + 16 * torch.finfo(torch.float32).eps * size
    worst = ((got.double() - truth).abs() / budget).max()
    assert worst <= 1.0, f"{worst:.3g} times what one rounding explains"


@pytest.mark.parametrize("dtype", [H, B])
@pytest.mark.parametrize("added", [False, True])
def test_dropout_of_the_torch_backend_is_rounded_once(dtype: torch.dtype, added: bool) -> None:
    x, residual, seed = _randn(32, 33).to(dtype), _randn(32, 33, seed=1).to(dtype), torch.tensor([7])
    with use_backend("torch"):
        got = dropout(x, 0.1, seed=seed, residual=residual if added else None)
        truth = dropout_keep(seed, x.shape, 0.1).float() * (1 / 0.9) * x.float() + (residual.float() if added else 0.0)
    assert torch.equal(got, truth.to(dtype))


def _rms(got: Tensor, truth: Tensor) -> float:
    return (got.double() - truth).square().mean().sqrt().item()


MASKED = {
    "plain": {},
    "causal": {"causal": True},
    "padded": {"key_mask": torch.arange(40) < torch.tensor([[33], [40]])},
    "bias": {"bias": ((torch.arange(1600) % 9) / 4 - 1).view(40, 40)},
    "lse": {"return_lse": True},
}


@pytest.mark.parametrize("dtype", [H, B])
@pytest.mark.parametrize("fused", [False, True])
def test_the_torch_backend_errs_no_more_than_torch(dtype, fused, monkeypatch):
    """Root-mean-square errors against float64, of scores that spread as 1, 2 and 4 times the usual; forward and every
    gradient."""
    for name in ("FUSED_FROM", "FUSED_GRADIENTS_FROM"):
        monkeypatch.setattr(torch_backend, name, 1 if fused else 10**9)
    for std, (name, options) in itertools.product((1, 2, 4), MASKED.items()):
        draw = torch.Generator().manual_seed(std)
        given = [(std * torch.randn(2, 3, 40, 32, generator=draw)).to(dtype) for _ in range(3)]
        dout = torch.randn(2, 3, 40, 32, generator=draw).to(dtype)

        def gradients(call, wide=lambda x: x):
            leaves = [wide(x).clone().requires_grad_() for x in given]  # noqa: B023
            out = call(*leaves)
            return out, *torch.autograd.grad(out, leaves, wide(dout))  # noqa: B023

        def ours(q, k, v):
            out = attention(q, k, v, **options)  # noqa: B023
            return out[0] if isinstance(out, tuple) else out

        def theirs(q, k, v):
            mask = options.get("bias", options.get("key_mask"))  # noqa: B023
            mask = mask[:, None, None] if mask is not None and mask.dtype == torch.bool else mask
            mask = mask.to(dtype) if mask is not None and mask.is_floating_point() else mask
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal="causal" in options)  # noqa: B023

        with use_backend("reference"):
            truth = gradients(ours, Tensor.double)
        with use_backend("torch"):
            got = gradients(ours)
        ratios = [_rms(a, c) / _rms(b, c) for a, b, c in zip(got, gradients(theirs), truth, strict=True)]
        print(f"{dtype} std {std} {name:<7} out, dq, dk, dv over torch's:", *(f"{r:.3f}" for r in ratios))
        assert max(ratios) <= 1.1
