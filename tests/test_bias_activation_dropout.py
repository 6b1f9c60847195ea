"""bias_activation_dropout: values and every gradient against the reference by error budget, and its interface.

What every op owes PyTorch (opcheck, transforms, second derivatives, compile, export) is in test_autograd.py.
"""

import importlib

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck, gradgradcheck
from torch.utils._python_dispatch import TorchDispatchMode

from tileformer.bench.check.budget import assert_within_budget, rms_ratio
from tileformer.kernels import bias_activation_dropout, column_sums, dropout, reference, use_backend

MODULE = importlib.import_module("tileformer.kernels.dropout")  # the package's attribute of that name is the op
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SEED = torch.tensor([0x1234_5678_9ABC_DEF])
TORCH = {
    "relu": F.relu, "gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"), "silu": F.silu,
}  # fmt: skip
CALLS = {  # shape, activation, what is given beside x, rate
    "one element a row": ((7, 1), "gelu", ("bias", "up"), 0.3),
    "one axis": ((3,), "silu", ("bias", "up"), 0.3),
    "no row": ((0, 8), "gelu", ("bias", "up"), 0.3),
    "ragged, three axes": ((2, 3, 63), "gelu_tanh", ("bias", "up"), 0.3),
    "several tiles of rows": ((300, 64), "relu", ("bias",), 0.0),
    "one more than a tile": ((7, 65), "relu", ("up",), 0.5),
    "aligned to 8 only": ((7, 1000), "silu", ("up",), 0.0),
    "a tile": ((7, 1024), "gelu_tanh", ("bias",), 0.0),
    "several tiles of columns": ((7, 4097), "gelu", ("bias",), 0.1),
    "the activation alone": ((7, 40), "gelu", (), 0.0),
}


def inputs(shape, given, seed=0):
    """x, what is beside it and a gradient for y, in float64."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *size: torch.randn(size, generator=generator, dtype=torch.float64)  # noqa: E731
    return {"x": 2 * draw(*shape)} | {n: draw(*(shape if n == "up" else shape[-1:])) for n in given}, draw(*shape)


def results(op, leaves, dy, dtypes, device, activation, p):
    """y and the gradient of every leaf. `dtypes`: of x and up, of the bias."""
    cast = {n: t.to(device, dtypes[n == "bias"], copy=True).requires_grad_() for n, t in leaves.items()}
    y = op(**cast, activation=activation, p=p, seed=SEED.to(device) if p else None)
    grads = torch.autograd.grad(y, list(cast.values()), dy.to(y))
    return {"y": y.detach()} | {f"d{n}": g for n, g in zip(cast, grads, strict=True)}


def assert_matches_reference(shape, activation, given, p, dtypes, device):
    leaves, dy = inputs(shape, given)
    leaves = {n: t.to(dtypes[n == "bias"]).double() for n, t in leaves.items()}
    dy = dy.to(dtypes[0]).double()
    wide, how = (torch.float64, torch.float64), (device, activation, p)
    truth = results(reference.bias_activation_dropout, leaves, dy, wide, *how)
    eager = results(reference.bias_activation_dropout, leaves, dy, dtypes, *how)
    got = results(bias_activation_dropout, leaves, dy, dtypes, *how)
    dx = 1.13 * dy.abs() * leaves.get("up", torch.ones(1)).abs() / (1 - p)  # the slope of an activation is below 1.13
    for name, value in got.items():
        assert value.dtype == dtypes[name == "dbias"]
        size = {"dx": dx, "dbias": dx.flatten(0, -2).sum(0) if len(shape) > 1 else dx}.get(name)
        assert_within_budget(name, value, eager[name], truth[name], size)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_matches_the_reference(call, dtype, device):
    assert_matches_reference(*call, (dtype, dtype), device)


def test_float32_bias_beside_a_bfloat16_input(device):
    assert_matches_reference((9, 40), "gelu", ("bias", "up"), 0.3, (torch.bfloat16, torch.float32), device)


@pytest.mark.parametrize("activation", TORCH)
def test_everything_is_rounded_once(activation, device, backend):
    """A maximum would not see a second rounding, or a sum in 16 bits; the mean square does."""
    leaves, dy = inputs((200, 99), ("bias", "up"))
    leaves, dy = {n: t.bfloat16().double() for n, t in leaves.items()}, dy.bfloat16().double()
    got, eager, truth = (
        results(op, leaves, dy, (dtype, dtype), device, activation, 0.3)
        for op, dtype in (
            (bias_activation_dropout, torch.bfloat16),
            (reference.bias_activation_dropout, torch.bfloat16),
            (reference.bias_activation_dropout, torch.float64),
        )
    )
    for name in got:
        assert rms_ratio(got[name], eager[name], truth[name]) <= 1.01, name


@pytest.mark.parametrize("programs", [1, 5])
def test_any_number_of_programs_shares_the_rows(programs, device, monkeypatch):
    monkeypatch.setattr(column_sums, "programs_for", lambda x: programs)
    assert_matches_reference((700, 24), "silu", ("bias",), 0.3, (torch.float32, torch.float32), device)


def test_same_bits_every_time(device, backend):
    runs = [
        results(bias_activation_dropout, *inputs((300, 33), ("bias", "up")), DTYPES[:1] * 2, device, "gelu", 0.1)
        for _ in "ab"
    ]
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])


@pytest.mark.parametrize("name", ["interpret", "torch", "reference"])
def test_it_drops_what_dropout_drops(name):
    x = torch.rand(20, 70) + 0.1
    with use_backend(name):
        assert torch.equal(bias_activation_dropout(x, "relu", p=0.4, seed=SEED), dropout(x, 0.4, seed=SEED))
        assert torch.equal(bias_activation_dropout(x, "relu", p=0.4, seed=3), dropout(x, 0.4, seed=3))
        torch.manual_seed(0)
        drawn = [bias_activation_dropout(x, "relu", p=0.4) for _ in range(2)]
        torch.manual_seed(0)
        assert torch.equal(drawn[0], dropout(x, 0.4)) and not torch.equal(*drawn)
        before = torch.get_rng_state()
        bias_activation_dropout(x, "relu")
        assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("name", ["interpret", "torch"])
@pytest.mark.parametrize("activation", TORCH)
def test_what_is_not_finite_is_torchs(activation, name):
    special = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, -200.0, 200.0, 1e9, -1e9])
    if activation == "gelu":
        special[1] = 300.0  # torch's has NaN for inf on a CPU, and inf on a GPU
    both = []
    for op in (lambda x, up: bias_activation_dropout(x, activation, up=up), lambda x, up: TORCH[activation](x) * up):
        x, up = special.clone().requires_grad_(), torch.full((8,), 2.0, requires_grad=True)
        with use_backend(name):
            y = op(x, up)
        both.append([y, *torch.autograd.grad(y.sum(), (x, up))])
    for ours, theirs in zip(*both, strict=True):
        torch.testing.assert_close(ours, theirs, equal_nan=True, rtol=1e-5, atol=1e-6)


def test_halves_of_one_tensor_are_read_in_place(device, backend, monkeypatch):
    packed = torch.randn(5, 6, 80, device=device)
    given = [packed.clone().requires_grad_(), *(half.contiguous().requires_grad_() for half in packed.chunk(2, -1))]
    apart = bias_activation_dropout(given[1], "silu", up=given[2])
    apart.backward(torch.ones_like(apart))
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "contiguous", None)
        y = bias_activation_dropout(*given[0].chunk(2, -1)[:1], "silu", up=given[0].chunk(2, -1)[1])
    y.sum().backward()  # a gradient with stride 0
    assert torch.equal(y, apart)
    assert torch.equal(given[0].grad, torch.cat([given[1].grad, given[2].grad], -1))


@pytest.mark.parametrize("name", ["x", "bias", "up"])
def test_each_gradient_alone(name, device, backend):
    leaves, dy = inputs((9, 40), ("bias", "up"))
    leaves, dy = {n: t.to(device, torch.float32) for n, t in leaves.items()}, dy.to(device, torch.float32)
    every = results(bias_activation_dropout, leaves, dy, DTYPES[:1] * 2, device, "gelu", 0.3)
    leaves[name].requires_grad_()
    y = bias_activation_dropout(**leaves, activation="gelu", p=0.3, seed=SEED.to(device))
    assert torch.equal(torch.autograd.grad(y, [leaves[name]], dy)[0], every[f"d{name}"])


@pytest.mark.interprets
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "silu"])
def test_every_derivative_in_float64(activation):
    leaves, _ = inputs((3, 5), ("bias", "up"))
    op = lambda x, b, u: bias_activation_dropout(x, activation, bias=b, up=u, p=0.3, seed=SEED)  # noqa: E731
    with use_backend("interpret"):
        for check in (gradcheck, gradgradcheck):
            assert check(op, tuple(t.requires_grad_() for t in leaves.values()), fast_mode=True, atol=1e-5)


@pytest.mark.parametrize(
    "options, most",
    [(dict(), 1), (dict(bias=torch.ones(8)), 2), (dict(up=torch.ones(4, 8)), 2), (dict(p=0.5, seed=SEED), 3)],
)
def test_the_torch_backend_adds_no_operator(options, most):
    seen = []

    class Listen(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    x = torch.ones(4, 8)
    with use_backend("torch"), Listen():
        bias_activation_dropout(x, "gelu", **options)
    assert len(seen) <= most, seen


def test_a_long_row_needs_one_axis_of_programs():
    """CUDA's others end at 65,535."""
    given = (3, 2**28, (2**28,) * 3, 0.1, torch.float32, "gelu", True, True)
    for partial, rows in ((False, 2), (True, 1)):
        programs, run = MODULE._bwd_launch(*given, partial, 8)
        assert programs == rows and run.grid(run.tiles[0]) == (rows * 2**28 // run.tiles[0]["BLOCK_N"],)


@pytest.mark.parametrize("name", ["torch", "interpret", "reference"])
def test_the_dtype_is_that_of_x(name):
    x = torch.randn(4, 8, dtype=torch.bfloat16)
    with use_backend(name), torch.autocast("cpu", torch.float16):
        assert bias_activation_dropout(x, "gelu", bias=torch.ones(8), up=x, p=0.5).dtype == torch.bfloat16


X = torch.ones(4, 8)
BAD = {
    "activation": (ValueError, "one of relu, gelu, gelu_tanh, silu, got 'swish'", {"activation": "swish"}),
    "bias": (ValueError, r"bias has shape \(7,\), expected \(8,\)", {"bias": torch.ones(7)}),
    "up": (ValueError, r"up has shape \(8,\), expected \(4, 8\)", {"up": torch.ones(8)}),
    "up's dtype": (TypeError, "got up bfloat16, x float32: convert", {"up": X.bfloat16()}),
    "device": (ValueError, "up is on meta", {"up": X.to("meta")}),
    "rate": (ValueError, "between 0 and 1, got 1.5", {"p": 1.5}),
    "seed": (TypeError, "seed must be int64, got int32", {"seed": torch.ones(1, dtype=torch.int32)}),
    "integers": (TypeError, "x must be floating, got int64", {"x": X.long()}),
    "no axis": (ValueError, "x has no axis", {"x": torch.tensor(1.0)}),
}


@pytest.mark.parametrize("error, message, change", BAD.values(), ids=BAD)
def test_refuses(error, message, change):
    with pytest.raises(error, match=message):
        bias_activation_dropout(**({"x": X, "activation": "gelu"} | change))
