"""layer_norm: values and every gradient against the reference by error budget, and the rules of its interface.

What every op owes PyTorch (opcheck, transforms, second derivatives, compile, export) is in test_autograd.py.
"""

import importlib

import pytest
import torch
from torch.autograd import gradcheck

from tileformer.bench.check.budget import assert_within_budget, rms_ratio
from tileformer.kernels import layer_norm, reference, use_backend

MODULE = importlib.import_module("tileformer.kernels.layer_norm")  # the package's attribute of that name is the op
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = {
    "one element a row": ((4, 1), 1),
    "ragged": ((3, 5, 99), 1),
    "aligned to 8 only": ((5, 24), 1),
    "several tiles of rows": ((70, 128), 1),
    "two axes": ((6, 4, 10), 2),
    "more columns than a warp": ((2, 1500), 1),
}


def tensors(shape, axes=1, parameters=("weight", "bias"), seed=0):
    """x, the parameters asked for and a gradient for y, in float64."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *size: torch.randn(size, generator=generator, dtype=torch.float64)  # noqa: E731
    leaves = {"x": 2 * draw(*shape) + 1} | {name: draw(*shape[-axes:]) for name in parameters}
    return leaves, draw(*shape)


def results(op, leaves, dy, dtypes, device):
    """y and the gradient of every leaf. `dtypes`: of x, of the parameters."""
    cast = {n: t.to(device, dtypes[n != "x"], copy=True).requires_grad_() for n, t in leaves.items()}
    shape = next((t.shape for n, t in leaves.items() if n != "x"), leaves["x"].shape[-1:])
    y = op(cast["x"], shape, cast.get("weight"), cast.get("bias"))
    grads = torch.autograd.grad(y, list(cast.values()), dy.to(y))
    return {"y": y.detach()} | {f"d{n}": g for n, g in zip(cast, grads, strict=True)}


def assert_matches_reference(leaves, dy, dtype, parameter_dtype, device, op=layer_norm):
    rounded = {n: t.to(dtype if n == "x" else parameter_dtype).double() for n, t in leaves.items()}
    dy = dy.to(dtype).double()
    truth = results(reference.layer_norm, rounded, dy, (torch.float64, torch.float64), device)
    eager = results(reference.layer_norm, rounded, dy, (dtype, dtype), device)
    got = results(op, rounded, dy, (dtype, parameter_dtype), device)
    x, weight = rounded["x"], rounded.get("weight", torch.ones(1))
    axes = tuple(range(-max(weight.dim(), 1), 0))
    rstd = float((x.var(axes, unbiased=False) + 1e-5).rsqrt().max())
    lead = tuple(range(x.dim() - len(axes)))
    size = {
        "y": float(truth["y"].abs().max()),
        "dx": 4 * rstd * float(dy.abs().max() * weight.abs().max()),
        "dweight": 4 * float(dy.abs().sum(lead).max()),
        "dbias": float(dy.abs().sum(lead).max()),
    }
    for name, value in got.items():
        assert value.dtype == (parameter_dtype if name in ("dweight", "dbias") else dtype)
        assert_within_budget(name, value, eager[name], truth[name], size[name])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape, axes", SHAPES.values(), ids=SHAPES)
def test_matches_the_reference(shape, axes, dtype, device):
    assert_matches_reference(*tensors(shape, axes), dtype, dtype, device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n", [99, 128])  # ragged, and whole tiles
def test_rows_longer_than_a_tile(n, dtype, device, monkeypatch):
    monkeypatch.setattr(MODULE, "MAX_FWD", 32)
    monkeypatch.setattr(MODULE, "MAX_BWD", 32)
    assert_matches_reference(*tensors((5, n)), dtype, dtype, device)


@pytest.mark.parametrize("programs", [1, 150])  # one that visits every row; more than are added up at a time
def test_any_number_of_programs_shares_the_rows(programs, device, monkeypatch):
    monkeypatch.setattr(MODULE, "programs_for", lambda x: programs)
    assert_matches_reference(*tensors((300, 2000)), torch.float32, torch.float32, device)


def test_strided_parameters(device, backend):
    leaves, dy = tensors((9, 40))
    dense = results(layer_norm, leaves, dy, (torch.float32, torch.float32), device)
    x, weight, bias = (t.to(device, torch.float32) for t in leaves.values())
    apart = lambda t: torch.stack([t, t + 1], -1)[..., 0].requires_grad_()  # noqa: E731
    given = [x.requires_grad_(), apart(weight), apart(bias)]
    y = layer_norm(given[0], (40,), *given[1:])
    assert torch.equal(y, dense["y"])
    for grad, name in zip(torch.autograd.grad(y, given, dy.to(y)), ("dx", "dweight", "dbias"), strict=True):
        assert torch.equal(grad, dense[name])


@pytest.mark.parametrize("eps", [1e-12, 1e-3, 1.0])
def test_any_eps(eps, device, backend):
    x = 0.1 * torch.randn(5, 40, device=device)
    torch.testing.assert_close(layer_norm(x, (40,), eps=eps), reference.layer_norm(x, (40,), eps=eps))


@pytest.mark.parametrize("parameters", [("weight",), ("bias",), ()], ids=["weight", "bias", "neither"])
def test_missing_parameters(parameters, device):
    assert_matches_reference(*tensors((9, 40), parameters=parameters), torch.float32, torch.float32, device)


def test_float32_parameters_beside_a_bfloat16_input(device):
    assert_matches_reference(*tensors((9, 40)), torch.bfloat16, torch.float32, device)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("longest", [None, 32], ids=["whole rows", "tiles of rows"])
def test_statistics_and_sums_are_wider_than_the_input(longest, dtype, device, backend, monkeypatch):
    """A maximum would not see a mean or a sum that was rounded on its way; the mean square does."""
    if longest:
        monkeypatch.setattr(MODULE, "MAX_FWD", longest)
        monkeypatch.setattr(MODULE, "MAX_BWD", longest)
    leaves, dy = tensors((300, 200))
    leaves["x"] += 3
    leaves, dy = {n: t.to(dtype).double() for n, t in leaves.items()}, dy.to(dtype).double()
    got, eager, truth = (
        results(op, leaves, dy, (d, d), device)
        for op, d in ((layer_norm, dtype), (reference.layer_norm, dtype), (reference.layer_norm, torch.float64))
    )
    for name in ("y", "dx", "dweight"):
        assert rms_ratio(got[name], eager[name], truth[name]) <= 1.01, name


def test_a_large_mean_costs_no_digits(device):
    leaves, dy = tensors((8, 256))
    leaves["x"] += 3000
    assert_matches_reference(leaves, dy, torch.float32, torch.float32, device)


def test_a_constant_row_is_the_bias(device, backend):
    x, bias = torch.full((3, 17), 5.0, device=device), torch.randn(17, device=device)
    assert torch.equal(layer_norm(x, (17,), None, bias), bias.expand(3, 17))


@pytest.mark.parametrize("name", ["x", "weight", "bias"])
def test_each_gradient_alone(name, device):
    leaves, dy = tensors((9, 40))
    leaves = {n: t.to(device, torch.float32) for n, t in leaves.items()}
    every = results(layer_norm, leaves, dy, (torch.float32, torch.float32), device)
    leaves[name].requires_grad_()
    y = layer_norm(leaves["x"], (40,), leaves["weight"], leaves["bias"])
    (grad,) = torch.autograd.grad(y, [leaves[name]], dy.to(y))
    assert torch.equal(grad, every[f"d{name}"])


VIEWS = {
    "rows apart": lambda x: x[:, :40],  # (R, 40) with stride 80: read in place
    "time first": lambda x: x.view(3, 4, 80).transpose(0, 1),  # rows that are not one axis: copied
    "columns apart": lambda x: x[:, ::2],
    "one row repeated": lambda x: x[:1].expand(5, 80),
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_views(view, device, backend):
    base = torch.randn(12, 80, device=device)
    strided, dense = base.clone().requires_grad_(), base.clone().requires_grad_()
    x, y = view(strided), view(dense).contiguous()
    n = x.shape[-1]
    layer_norm(x, (n,)).sum().backward()  # a gradient with stride 0
    layer_norm(y, (n,)).backward(torch.ones_like(y))
    assert torch.equal(layer_norm(x, (n,)), layer_norm(y, (n,)))
    assert torch.equal(strided.grad, dense.grad)


@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8)])
def test_no_rows(shape, device, backend):
    x, w, b = (torch.ones(s, device=device, requires_grad=True) for s in (shape, (8,), (8,)))
    y = layer_norm(x, (8,), w, b)
    y.sum().backward()
    assert y.shape == x.grad.shape == shape
    assert torch.equal(w.grad, torch.zeros_like(w)) and torch.equal(b.grad, torch.zeros_like(b))


def test_same_bits_every_time(device, backend):
    leaves, dy = tensors((70, 33))
    runs = [results(layer_norm, leaves, dy, (torch.float32, torch.float32), device) for _ in range(2)]
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])


@pytest.mark.interprets
def test_derivatives_of_long_rows_in_float64(monkeypatch):
    monkeypatch.setattr(MODULE, "MAX_FWD", 4)
    monkeypatch.setattr(MODULE, "MAX_BWD", 4)
    leaves, _ = tensors((4, 7))
    with use_backend("interpret"):
        assert gradcheck(
            lambda x, w, b: layer_norm(x, (7,), w, b),
            tuple(t.requires_grad_() for t in leaves.values()),
            fast_mode=True,
        )


@pytest.mark.interprets
def test_second_derivative_of_some_gradients():
    """A gradient penalty that sees x alone, with frozen parameters: the missing gradients count as zero."""
    leaves, dy = tensors((4, 7))

    def penalty(op):
        x = leaves["x"].clone().requires_grad_()
        y = op(x, (7,), leaves["weight"], None)
        (dx,) = torch.autograd.grad(y, x, dy, create_graph=True)
        return torch.autograd.grad(dx.square().sum(), x)[0]

    with use_backend("interpret"):
        torch.testing.assert_close(penalty(layer_norm), penalty(reference.layer_norm))


def test_registered_ops_with_two_dtypes(device, backend):
    x, dy = (torch.randn(5, 12, device=device, dtype=torch.bfloat16) for _ in range(2))
    w, b, stats = torch.randn(12, device=device), torch.randn(12, device=device), torch.randn(2, 5, device=device)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.tileformer.layer_norm_fwd.default, (x, 1, w, None, 1e-5, True), test_utils=checks)
    backward = (dy, x, 1, w, b, stats, False, True, 1e-5, True)
    _, _, dbias = torch.ops.tileformer.layer_norm_bwd.default(*backward)
    assert dbias.dtype == torch.float32, "autograd would widen it again, without the digits"
    torch.library.opcheck(torch.ops.tileformer.layer_norm_bwd.default, backward, test_utils=checks)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("parameter_dtype", [torch.float32, torch.bfloat16])
def test_torch_backend(dtype, parameter_dtype):
    with use_backend("torch"):
        leaves, dy = tensors((3, 5, 40))
        assert_matches_reference(leaves, dy, dtype, parameter_dtype, torch.device("cpu"))


@pytest.mark.parametrize("name", ["torch", "interpret", "reference"])
def test_autocast_keeps_the_dtype(name):
    x = torch.randn(4, 8, dtype=torch.bfloat16)
    with use_backend(name), torch.autocast("cpu", torch.float16):
        assert layer_norm(x, (8,), torch.ones(8)).dtype == torch.bfloat16


BAD = {
    "another length": (ValueError, r"\(9,\).*\(4, 8\)", {"normalized_shape": (9,)}),
    "no axis": (ValueError, "normalized_shape", {"normalized_shape": ()}),
    "weight": (ValueError, r"weight has shape \(7,\), expected \(8,\)", {"weight": torch.ones(7)}),
    "integers": (TypeError, "x must be floating, got int64", {"x": torch.ones(4, 8, dtype=torch.long)}),
    "two devices": (ValueError, "bias is on meta, the first argument on cpu", {"bias": torch.ones(8, device="meta")}),
}


@pytest.mark.parametrize("error, message, change", BAD.values(), ids=BAD)
def test_refuses(error, message, change):
    with pytest.raises(error, match=message):
        layer_norm(**({"x": torch.ones(4, 8), "normalized_shape": (8,)} | change))
