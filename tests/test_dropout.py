"""dropout: which elements are kept on each backend, values and gradients by error budget, seeds, its interface.

What every op owes PyTorch (opcheck, transforms, second derivatives, compile, export) is in test_autograd.py.
"""

import importlib
import math

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from tileformer.bench.check.budget import assert_within_budget, rms_ratio
from tileformer.kernels import dropout, random, reference, use_backend

MODULE = importlib.import_module("tileformer.kernels.dropout")  # the package's attribute of that name is the op
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SEED = 0x1234_5678_9ABC_DEF
SHAPES = {
    "one element a row": (6, 1),
    "one axis": (5,),
    "ragged, three axes": (3, 7, 99),
    "aligned to 8 only": (5, 24),
    "several tiles of rows": (70, 64),
    "several tiles of columns": (3, 4100),
}


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def seed_on(device, value=SEED):
    return torch.tensor([value], device=device)


def results(op, x, residual, dy, dtypes, device, p):
    """y and the gradients of x and, if there is one, the residual."""
    given = [(x, dtypes[0])] + ([] if residual is None else [(residual, dtypes[1])])
    leaves = [t.to(device, dtype, copy=True).requires_grad_() for t, dtype in given]
    y = op(leaves[0], p, seed=seed_on(device), residual=leaves[1] if residual is not None else None)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy.to(y))]


def assert_matches_reference(shape, residual, dtypes, device, p=0.3):
    x, dy = (t.to(dtypes[0]).double() for t in (draw(*shape), draw(*shape, seed=1)))
    residual = draw(*shape, seed=2).to(dtypes[1]).double() if residual else None
    wide = (torch.float64, torch.float64)
    truth = results(reference.dropout, x, residual, dy, wide, device, p)
    eager = results(reference.dropout, x, residual, dy, dtypes, device, p)
    got = results(dropout, x, residual, dy, dtypes, device, p)
    for name, g, e, t in zip(("y", "dx", "dresidual"), got, eager, truth, strict=False):
        assert g.dtype == e.dtype
        assert_within_budget(name, g, e, t, float(dy.abs().max() + x.abs().max()) / (1 - p))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("residual", [False, True], ids=["alone", "residual"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_matches_the_reference(shape, residual, dtype, device):
    assert_matches_reference(shape, residual, (dtype, dtype), device)


def test_float32_residual_beside_a_bfloat16_input(device):
    assert_matches_reference((3, 7, 40), True, (torch.bfloat16, torch.float32), device)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_residual_is_added_before_rounding(dtype, device):
    """A maximum would not see a second rounding; the mean square does."""
    x, residual, dy = (draw(40, 99, seed=n).to(dtype).double() for n in range(3))
    got, eager, truth = (
        results(op, x, residual, dy, (d, d), device, 0.3)[0]
        for op, d in ((dropout, dtype), (reference.dropout, dtype), (reference.dropout, torch.float64))
    )
    assert rms_ratio(got, eager, truth) <= 1.01


def test_seeds_differ():
    seeds = torch.cat([random.new_seed(torch.device("cpu")) for _ in range(200)])
    assert len(seeds.unique()) == 200 and seeds.min() >= 0 and seeds.max() > 2**32, "63 bits, not a few"


@pytest.mark.parametrize("tile", [8, 64], ids=["tiles of 8 columns", "one tile"])
def test_bits_do_not_depend_on_the_tile(tile, device, backend, monkeypatch):
    monkeypatch.setattr(MODULE, "MAX_TILE", tile)
    kept = dropout(torch.ones(9, 37, device=device), 0.4, seed=seed_on(device)) != 0
    assert torch.equal(kept, reference.dropout_keep(seed_on(device), (9, 37), 0.4))


def test_rows_do_not_repeat(device, backend):
    """More of them than 16 bits count."""
    shape = (2**16 + 8, 4)
    kept = dropout(torch.ones(shape, device=device), 0.5, seed=seed_on(device)) != 0
    assert torch.equal(kept, reference.dropout_keep(seed_on(device), shape, 0.5))
    assert not torch.equal(kept[:8], kept[2**16 :])


@pytest.mark.parametrize("p", [1e-9, 1e-5, 0.1, 1 / 3, 0.999999, 1.0])
def test_a_rate_has_31_bits(p):
    assert abs(random.threshold(p) / 2**31 - p) <= 2**-31


def test_a_long_row_needs_one_axis_of_programs():
    """CUDA's others end at 65,535."""
    run = MODULE._launch(3, 2**28, 2**28, 2**28, 0.1, torch.float32)
    assert run.grid(run.tiles[0]) == (3 * 2**28 // run.tiles[0]["BLOCK_N"],)


@pytest.mark.parametrize("name", ["interpret", "torch", "reference"])
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_rate_and_scale(p, name):
    with use_backend(name):
        y = dropout(torch.ones(200, 200), p, seed=seed_on("cpu"))
    n = y.numel()
    deviation = math.sqrt(n * p * (1 - p))
    assert abs(int((y == 0).sum()) - n * p) < 5 * deviation
    torch.testing.assert_close(y.max(), torch.tensor(1 / (1 - p)))
    for half in (y[::2], y[:, ::2]):  # no stripes
        assert abs(int((half == 0).sum()) - n * p / 2) < 5 * deviation


@pytest.mark.parametrize("name", ["interpret", "torch", "reference"])
def test_no_and_full_rate(name):
    x, residual = torch.randn(4, 5, requires_grad=True), torch.randn(4, 5)
    with use_backend(name):
        assert dropout(x, 0.0) is x
        assert torch.equal(dropout(x, 0.0, residual=residual), residual + x)
        y = dropout(x, 1.0, residual=residual)
        y.sum().backward()
    assert torch.equal(y, residual) and torch.equal(x.grad, torch.zeros(4, 5))


@pytest.mark.parametrize("name", ["interpret", "torch", "reference"])
def test_the_seed_decides(name):
    x = torch.ones(20, 30)
    with use_backend(name):
        same = [dropout(x, 0.5, seed=seed_on("cpu")) for _ in range(2)]
        other = dropout(x, 0.5, seed=seed_on("cpu", SEED + 1))
        torch.manual_seed(3)
        drawn = [dropout(x, 0.5) for _ in range(2)]
        torch.manual_seed(3)
        again = [dropout(x, 0.5) for _ in range(2)]
    assert torch.equal(*same) and not torch.equal(same[0], other)
    assert not torch.equal(*drawn)
    assert all(map(torch.equal, drawn, again))


@pytest.mark.parametrize("name", ["interpret", "torch", "reference"])
def test_nothing_is_drawn_at_rate_zero(name):
    before = torch.get_rng_state()
    with use_backend(name):
        dropout(torch.ones(3, 4), 0.0)
    assert torch.equal(before, torch.get_rng_state())


VIEWS = {
    "rows apart": lambda x: x[:, :40],
    "rows that are not one axis": lambda x: x.view(3, 4, 80).transpose(0, 1),
    "columns apart": lambda x: x[:, ::2],
    "one row repeated": lambda x: x[:1].expand(5, 80),
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_views(view, device, backend):
    base = torch.randn(12, 80, device=device)
    strided, dense = base.clone().requires_grad_(), base.clone().requires_grad_()
    x, y = view(strided), view(dense).contiguous()
    outputs = [dropout(z, 0.3, seed=seed_on(device), residual=z) for z in (x, y)]
    for out in outputs:
        out.sum().backward()  # a gradient with stride 0
    assert torch.equal(*outputs) and torch.equal(strided.grad, dense.grad)


@pytest.mark.parametrize("shape", [(0, 8), (3, 0)])
def test_nothing_to_do(shape, device, backend):
    x = torch.ones(shape, device=device, requires_grad=True)
    y = dropout(x, 0.5)
    y.sum().backward()
    assert y.shape == x.grad.shape == shape


@pytest.mark.parametrize("name", ["x", "residual"])
def test_each_gradient_alone(name, device, backend):
    given = {n: torch.randn(4, 8, device=device) for n in ("x", "residual")}
    given[name].requires_grad_()
    y = dropout(given["x"], 0.4, seed=seed_on(device), residual=given["residual"])
    y.backward(torch.ones_like(y))
    keep = reference.dropout_keep(seed_on(device), (4, 8), 0.4) / 0.6
    torch.testing.assert_close(given[name].grad, keep if name == "x" else torch.ones_like(keep))


@pytest.mark.interprets
def test_every_derivative_in_float64():
    inputs = draw(3, 7).requires_grad_(), draw(3, 7, seed=1).requires_grad_()
    with use_backend("interpret"):
        op = lambda x, r: dropout(x, 0.3, seed=seed_on("cpu"), residual=r)  # noqa: E731
        assert gradcheck(op, inputs, fast_mode=True)
        assert gradgradcheck(op, inputs, fast_mode=True)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("shape", [(0,), (3,), (2, 1, 7), (64, 100)])
def test_fast_keep(shape, dtype):
    keep = random.fast_keep(seed_on("cpu"), shape, 0.25, 1 / 0.75, dtype)
    scale = torch.tensor(1 / 0.75, dtype=dtype)
    assert keep.shape == shape and keep.dtype == dtype and keep.is_contiguous()
    assert ((keep == 0) | (keep == scale)).all()
    assert torch.equal(keep, random.fast_keep(seed_on("cpu"), shape, 0.25, 1 / 0.75, dtype))
    torch.library.opcheck(
        torch.ops.tileformer.fast_keep.default,
        (seed_on("cpu"), shape, 0.25, 1 / 0.75, dtype),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_fast_keep_draws_the_same_elements_in_every_dtype():
    drawn = [random.fast_keep(seed_on("cpu"), (50, 50), 0.5, 2.0, dtype) != 0 for dtype in DTYPES]
    assert torch.equal(drawn[0], drawn[1]) and torch.equal(drawn[0], drawn[2])


def test_neighbouring_seeds_are_independent():
    """From the first element on: a seed must be mixed before it is used."""
    n = 1000
    keep = torch.stack(
        [random.fast_keep(seed_on("cpu", i), (8,), 0.5, 2.0, torch.float32) != 0 for i in range(n)]
    ).double()
    assert (keep.mean(0) - 0.5).abs().max() < 5 * 0.5 / math.sqrt(n)
    assert ((keep[1:] == keep[:-1]).double().mean(0) - 0.5).abs().max() < 5 * 0.5 / math.sqrt(n)


@pytest.mark.parametrize("name", ["torch", "interpret", "reference"])
def test_autocast_keeps_the_dtype(name):
    x = torch.randn(4, 8, dtype=torch.bfloat16)
    with use_backend(name), torch.autocast("cpu", torch.float16):
        assert dropout(x, 0.5, residual=x).dtype == torch.bfloat16


X = torch.ones(4, 8)
BAD = {
    "rate": (ValueError, "between 0 and 1, got 1.5", {"p": 1.5}),
    "residual shape": (ValueError, r"residual has shape \(8,\), expected \(4, 8\)", {"residual": torch.ones(8)}),
    "residual device": (ValueError, "residual is on meta", {"residual": X.to("meta")}),
    "seed dtype": (TypeError, "seed must be int64, got int32", {"seed": torch.ones(1, dtype=torch.int32)}),
    "two seeds": (ValueError, r"one element, got shape \(2,\)", {"seed": torch.ones(2, dtype=torch.int64)}),
    "integers": (TypeError, "x must be floating, got int64", {"x": X.long()}),
}


@pytest.mark.parametrize("error, message, change", BAD.values(), ids=BAD)
def test_refuses(error, message, change):
    options = {"x": X, "p": 0.5} | change
    with pytest.raises(error, match=message):
        dropout(options.pop("x"), options.pop("p"), **options)
