"""rms_norm: values and gradients against the reference by error budget, its interface, the module, and the norms of
transformers."""

import copy
import importlib

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tileformer.bench.check.budget import assert_within_budget, rms_ratio
from tileformer.decoder import RMSNorm, convert, revert
from tileformer.kernels import reference, rms_norm, use_backend

MODULE = importlib.import_module("tileformer.kernels.layer_norm")
SHAPES = {
    "one row": (1, 8),
    "ragged": (5, 13),
    "several tiles of rows": (70, 24),
    "three axes": (3, 4, 16),
    "one column": (6, 1),
}


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def results(op, x, w, dy, dtype, device):
    """y and the gradients of x and weight."""
    x, w = (t.to(device, dtype, copy=True).requires_grad_() for t in (x, w))
    y = op(x, w.shape, w, 1e-3)
    return y.detach(), *torch.autograd.grad(y, (x, w), dy.to(y))


def check(shape, dtype, device, shift=0.0):
    x, w, dy = ((t.to(dtype)).double() for t in (draw(*shape) + shift, draw(shape[-1], seed=1), draw(*shape, seed=2)))
    truth, eager = (results(reference.rms_norm, x, w, dy, d, device) for d in (torch.float64, dtype))
    got = results(rms_norm, x, w, dy, dtype, device)
    g, rows = float((dy * w).abs().max()), dy.numel() // shape[-1]
    rstd = float((x.square().mean(-1) + 1e-3).rsqrt().max())
    xhat = float((x / (x.square().mean(-1, keepdim=True) + 1e-3).sqrt()).abs().max())
    sizes = xhat * float(w.abs().max()), rstd * g * (1 + xhat**2), rows * xhat * float(dy.abs().max())
    for name, a, e, t, size in zip(("y", "dx", "dweight"), got, eager, truth, sizes, strict=True):
        assert a.dtype == dtype
        assert_within_budget(name, a, e, t, size)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("longest", [None, 8], ids=["whole rows", "tiles of rows"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_matches_the_reference(shape, longest, dtype, device, backend, monkeypatch):
    if longest:
        monkeypatch.setattr(MODULE, "MAX_FWD", longest)
        monkeypatch.setattr(MODULE, "MAX_BWD", longest)
    check(shape, dtype, device)


@pytest.mark.parametrize("longest", [None, 8], ids=["whole rows", "tiles of rows"])
def test_the_mean_is_kept(longest, device, backend, monkeypatch):
    if longest:
        monkeypatch.setattr(MODULE, "MAX_FWD", longest)
        monkeypatch.setattr(MODULE, "MAX_BWD", longest)
    check((7, 24), torch.float32, device, shift=5.0)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_torch_backend(shape):
    with use_backend("torch"):
        check(shape, torch.float32, torch.device("cpu"))
        check(shape, torch.bfloat16, torch.device("cpu"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("longest", [None, 64], ids=["whole rows", "tiles of rows"])
def test_sums_are_wider_than_the_input(longest, dtype, device, backend, monkeypatch):
    """A maximum would not see a sum that was rounded on its way; the mean square does."""
    if longest:
        monkeypatch.setattr(MODULE, "MAX_FWD", longest)
        monkeypatch.setattr(MODULE, "MAX_BWD", longest)
    x, w, dy = (t.to(dtype).double() for t in (draw(300, 200) + 3, draw(200, seed=1), draw(300, 200, seed=2)))
    got, eager, truth = (
        results(op, x, w, dy, d, device)
        for op, d in ((rms_norm, dtype), (reference.rms_norm, dtype), (reference.rms_norm, torch.float64))
    )
    for name, g, e, t in zip(("y", "dx", "dweight"), got, eager, truth, strict=True):
        assert rms_ratio(g, e, t) <= 1.01, name


@pytest.mark.parametrize("name", ["interpret", "torch", "reference"])
@pytest.mark.parametrize("weight", [True, False])
def test_the_module_is_torchs(name, weight):
    net = nn.Sequential(nn.RMSNorm((4, 6), elementwise_affine=weight))
    x = torch.randn(3, 4, 6)
    expected = net(x)
    report = convert(net)
    assert type(net[0]) is RMSNorm and "0" in report.swapped
    with use_backend(name):
        torch.testing.assert_close(net(x), expected)
    revert(net)
    assert type(net[0]) is nn.RMSNorm


@pytest.mark.interprets
@pytest.mark.parametrize("name", ["reference", "torch", "interpret"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_the_default_eps_is_that_of_float32(dtype, name):
    """As torch's: small rows of half precision are normalised, not swallowed."""
    x = torch.full((2, 8), 0.02, dtype=dtype)
    with use_backend(name):
        torch.testing.assert_close(rms_norm(x, (8,)), F.rms_norm(x, (8,)))
        torch.testing.assert_close(RMSNorm(8, dtype=dtype)(x), nn.RMSNorm(8, dtype=dtype)(x))


def test_refuses():
    with pytest.raises(ValueError, match=r"rms_norm: normalized_shape \(5,\).*\(2, 4\)"):
        rms_norm(torch.ones(2, 4), (5,))
    with pytest.raises(TypeError, match="rms_norm: x must be floating, got int64"):
        rms_norm(torch.ones(2, 4, dtype=torch.int64), (4,))
    with pytest.raises(ValueError, match="rms_norm.*weight"):
        rms_norm(torch.ones(2, 4), (4,), torch.ones(5))


class LlamaRMSNorm(nn.Module):
    """As transformers writes it."""

    __module__ = "transformers.models.llama"

    def __init__(self, width: int, eps: float = 1e-3, first: float = 0.0) -> None:
        super().__init__()
        self.weight, self.variance_epsilon, self.first = nn.Parameter(torch.randn(width)), eps, first

    def forward(self, hidden_states):
        x = hidden_states.float()
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return (self.first + self.weight) * x.to(hidden_states.dtype)


@pytest.mark.parametrize("first", [0.0, 1.0, 0.5])
def test_norms_of_transformers_are_swapped_if_they_compute_the_same(first):
    from tileformer.decoder.huggingface import swap_norms
    from tileformer.decoder.nn.convert import Report

    net = nn.Sequential(LlamaRMSNorm(6, first=first))
    x = torch.randn(3, 6, requires_grad=True)
    expected = net(x)
    gradients = torch.autograd.grad(expected.square().sum(), [x, net[0].weight])
    report = Report()
    swap_norms(net, report)
    if first == 0.5:
        assert "0" in report.left and "forward" not in vars(net[0])
        return
    assert "0" in report.swapped
    for model in (net, copy.deepcopy(net)):
        with use_backend("torch"):
            y = model(x)
        torch.testing.assert_close(y, expected)
        torch.testing.assert_close(torch.autograd.grad(y.square().sum(), [x, model[0].weight]), gradients)
    with torch.no_grad():
        net[0].weight.zero_()
        assert not net(x).any() if first == 0.0 else net(x).any()  # the weight of the moment, not a copy
    revert(net)
    assert "forward" not in vars(net[0])
