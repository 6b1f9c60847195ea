"""softmax: values and gradients against the reference by error budget, masks, and the rules of its interface.

What every op owes PyTorch (opcheck, transforms, second derivatives, compile, export) is in test_autograd.py.
"""

import importlib

import pytest
import torch
from torch.autograd import gradcheck

from tileformer import kernels
from tileformer.bench.check.budget import assert_within_budget, rms_ratio
from tileformer.kernels import log_softmax, reference, softmax, use_backend

MODULE = importlib.import_module("tileformer.kernels.softmax")  # the package's attribute of that name is the op
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
CPU = torch.device("cpu")


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def some(*shape, empty_row=True):
    """A boolean mask, with one row that sees nothing."""
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.6
    if empty_row and shape[-2] > 1:
        mask[..., 1, :] = False
    return mask


def additive(*shape):
    return draw(*shape, seed=2).masked_fill(~some(*shape), -torch.inf)


CALLS = {
    "one element a row": ((6, 1), {}),
    "one axis": ((37,), {"scale": 0.5}),
    "no mask, several tiles of rows": (
        (70, 64),
        {"scale": -1.3},
    ),  # a negative scale turns the maximum into the minimum
    "aligned to 8 only": ((2, 3, 5, 24), {"scale": 0.3, "causal": True}),
    "causal, fewer rows than columns": ((2, 9, 21), {"causal": "top_left"}),
    "causal, shifted": ((2, 9, 21), {"causal": "bottom_right"}),
    "causal, rows that see nothing": ((2, 21, 9), {"causal": "bottom_right"}),
    "boolean mask": ((2, 3, 7, 13), {"mask": some(2, 3, 7, 13)}),
    "boolean mask over all heads": ((2, 3, 7, 13), {"mask": some(7, 13), "causal": True}),
    "key padding": ((2, 3, 7, 13), {"mask": some(2, 1, 1, 13)}),
    "one query masked throughout": ((2, 3, 7, 13), {"mask": some(3, 7, 1)}),
    "additive mask": ((2, 3, 7, 13), {"mask": additive(2, 1, 7, 13), "scale": 0.4}),
    "additive mask, causal": ((2, 3, 7, 13), {"mask": additive(7, 13), "causal": True}),
    "additive mask of whole rows": ((2, 3, 7, 13), {"mask": additive(3, 7, 1)}),
    "five axes": ((2, 2, 3, 4, 13), {"mask": some(2, 1, 1, 4, 13)}),  # the mask is copied, once
}


def results(op, x, dy, dtype, device, options):
    """y and the gradient of x."""
    x = x.to(device, dtype, copy=True).requires_grad_()
    moved = {n: o.to(device) if isinstance(o, torch.Tensor) else o for n, o in options.items()}
    y = op(x, **moved)
    return y.detach(), torch.autograd.grad(y, x, dy.to(y))[0]


def assert_matches_reference(shape, options, dtype, device, name="softmax"):
    x, dy = (t.to(dtype).double() for t in (3 * draw(*shape), draw(*shape, seed=3)))
    mask = options.get("mask")
    if mask is not None and mask.is_floating_point():
        options = options | {"mask": mask.to(dtype)}
    op, definition = getattr(kernels, name), getattr(reference, name)
    truth = results(definition, x, dy, torch.float64, device, options)
    if name == "log_softmax":
        dy = dy.masked_fill(truth[0].cpu() == -torch.inf, 0.0)
    eager = results(definition, x, dy, dtype, device, options)
    got = results(op, x, dy, dtype, device, options)
    scale = abs(options.get("scale", 1.0))
    sizes = 1.0, 2 * scale * float(dy.abs().max())
    if name == "log_softmax":  # the difference of a score and a sum that is about as large; a gradient that sums a row
        sizes = 2 * scale * float(x.abs().max()) + 3.0, scale * float(dy.abs().sum(-1).max())
    for name, g, e, t, size in zip(("y", "dx"), got, eager, truth, sizes, strict=True):
        assert g.dtype == dtype
        assert_within_budget(name, g, e, t, size)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape, options", CALLS.values(), ids=CALLS)
def test_matches_the_reference(shape, options, dtype, device):
    assert_matches_reference(shape, options, dtype, device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape, options", CALLS.values(), ids=CALLS)
def test_rows_longer_than_a_tile(shape, options, dtype, device, monkeypatch):
    monkeypatch.setattr(MODULE, "MAX_FWD", 8)
    monkeypatch.setattr(MODULE, "MAX_BWD", 8)
    assert_matches_reference(shape, options, dtype, device)


@pytest.mark.parametrize("shape, options", CALLS.values(), ids=CALLS)
def test_torch_backend(shape, options):
    with use_backend("torch"):
        assert_matches_reference(shape, options, torch.float32, CPU)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("longest", [None, 8], ids=["whole rows", "tiles of rows"])
@pytest.mark.parametrize("shape, options", CALLS.values(), ids=CALLS)
def test_log_softmax_matches_the_reference(shape, options, longest, dtype, device, backend, monkeypatch):
    if longest:
        monkeypatch.setattr(MODULE, "MAX_FWD", longest)
        monkeypatch.setattr(MODULE, "MAX_BWD", longest)
    assert_matches_reference(shape, options, dtype, device, "log_softmax")


@pytest.mark.parametrize("shape, options", CALLS.values(), ids=CALLS)
def test_log_softmax_on_the_torch_backend(shape, options):
    with use_backend("torch"):
        assert_matches_reference(shape, options, torch.float32, CPU, "log_softmax")


@pytest.mark.parametrize("name", ["interpret", "torch", "reference"])
def test_log_softmax_holds_what_a_softmax_rounds_to_zero(name):
    x = torch.tensor([[0.0, -200.0, -1e4], [3.0, 3.0, -torch.inf]], requires_grad=True)
    with use_backend(name):
        y = log_softmax(x, mask=x.detach() > -torch.inf)
        (y[:, :2] * torch.tensor([1.0, 2.0])).sum().backward()
    expected = torch.tensor([[0.0, -200.0, -1e4], [-0.6931472, -0.6931472, -torch.inf]])
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(x.grad, torch.tensor([[-2.0, 2.0, 0.0], [-0.5, 0.5, 0.0]]))


@pytest.mark.parametrize("longest", [None, 2], ids=["whole rows", "tiles of rows"])
@pytest.mark.parametrize("name", ["interpret", "reference"])
def test_what_log_softmax_hides_gives_and_takes_no_gradient(name, longest, monkeypatch):
    if longest:
        monkeypatch.setattr(MODULE, "MAX_FWD", longest)
        monkeypatch.setattr(MODULE, "MAX_BWD", longest)
    x, kept = torch.randn(3, 4, requires_grad=True), torch.tensor([True, False, True, True])
    with use_backend(name):
        y = log_softmax(x, mask=kept.expand(3, 4) & torch.tensor([[True], [True], [False]]))
        (dx,) = torch.autograd.grad(y, x, torch.full((3, 4), 5.0))
    visible = torch.log_softmax(x[:2][:, kept], -1)
    torch.testing.assert_close(y[:2][:, kept], visible)
    (expected,) = torch.autograd.grad(visible, x, torch.full((2, 3), 5.0))
    torch.testing.assert_close(dx, expected)
    assert (y[:, 1] == -torch.inf).all() and (y[2] == -torch.inf).all() and not dx[2].any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("longest", [None, 64], ids=["whole rows", "tiles of rows"])
def test_sums_are_wider_than_the_input(longest, dtype, device, backend, monkeypatch):
    """A maximum would not see a sum that was rounded on its way; the mean square does."""
    if longest:
        monkeypatch.setattr(MODULE, "MAX_FWD", longest)
        monkeypatch.setattr(MODULE, "MAX_BWD", longest)
    x, dy = ((2 * draw(64, 300)).to(dtype).double(), (draw(64, 300, seed=3) + 8).to(dtype).double())
    got, eager, truth = (
        results(op, x, dy, d, device, {"scale": 0.7})
        for op, d in ((softmax, dtype), (reference.softmax, dtype), (reference.softmax, torch.float64))
    )
    limits = 1.01, 2.1  # the backward reads a result that was rounded
    for limit, g, e, t in zip(limits, got, eager, truth, strict=True):
        assert rms_ratio(g, e, t) <= limit


def test_a_wide_row(device, backend):
    assert_matches_reference((2, 5000), {}, torch.float32, device)


@pytest.mark.parametrize("name", ["interpret", "torch", "reference"])
@pytest.mark.parametrize("kind", ["boolean", "additive", "causal"])
def test_a_row_that_sees_nothing_is_zero(kind, name):
    options = {"causal": {"causal": "bottom_right"}, "boolean": {"mask": torch.ones(4, 3, dtype=torch.bool)}}.get(kind)
    options = options or {"mask": torch.zeros(4, 3)}
    if "mask" in options:
        options["mask"][0] = False if kind == "boolean" else -torch.inf
    x = torch.randn(4, 3, requires_grad=True)
    with use_backend(name):
        y = softmax(x, **options)
        y.square().sum().backward()
    assert torch.equal(y[0], torch.zeros(3)) and torch.equal(x.grad[0], torch.zeros(3))
    torch.testing.assert_close(y[1:].sum(-1), torch.ones(3))


def test_what_a_mask_hides_may_be_nan(device, backend):
    x = torch.randn(3, 40, device=device)
    mask = torch.arange(40, device=device) < 30
    x[:, 30:] = torch.nan
    y = softmax(x, mask=mask)
    torch.testing.assert_close(y[:, :30], torch.softmax(x[:, :30], -1))
    assert torch.equal(y[:, 30:], torch.zeros(3, 10, device=device))


def test_shifting_a_row_changes_nothing(device, backend):
    x = torch.randint(-8, 8, (5, 33), device=device).float()
    assert torch.equal(softmax(x), softmax(x + 4096))


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
    softmax(x, scale=2.0).sum(0).max().backward()
    softmax(y, scale=2.0).sum(0).max().backward()
    assert torch.equal(softmax(x), softmax(y))
    assert torch.equal(strided.grad, dense.grad)


def test_a_gradient_without_strides(device, backend):
    x = torch.randn(5, 12, device=device, requires_grad=True)
    softmax(x).sum().backward()
    torch.testing.assert_close(x.grad, torch.zeros_like(x), atol=1e-6, rtol=0)


def test_a_mask_is_read_through_its_strides(device, backend):
    x, mask = torch.randn(2, 3, 7, 13, device=device), some(13, 7).to(device)
    mask[0] = True
    assert torch.equal(softmax(x, mask=mask.T), softmax(x, mask=mask.T.contiguous()))
    x = torch.randn(2, 3, 7, 24, device=device)  # 8 divides the stride of a row
    mask = torch.randn(2, 3, 7, 28, device=device)
    for part in (mask[..., :24], mask.view(2, -1)[:, :504].view(2, 3, 7, 24)):  # and not that of a row, of a batch
        assert torch.equal(softmax(x, mask=part), softmax(x, mask=part.contiguous()))


def test_a_mask_whose_columns_lie_far_apart(device, backend):
    """The last element is past 2**31: an offset of 32 bits would be outside."""
    x, kept = torch.randn(2, 3000, device=device), some(1, 3000)[0].to(device)
    mask = torch.empty(3000 * 800_000, dtype=torch.bool, device=device)[
        ::800_000
    ]  # on a CPU, pages that nobody reads are not there
    mask.copy_(kept)
    assert torch.equal(softmax(x, mask=mask), softmax(x, mask=kept))


@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8), (3, 0)])
def test_nothing_to_do(shape, device, backend):
    x = torch.ones(shape, device=device, requires_grad=True)
    y = softmax(x)
    y.sum().backward()
    assert y.shape == x.grad.shape == shape


def test_same_bits_every_time(device, backend):
    first, second = (results(softmax, draw(70, 33), draw(70, 33, seed=3), torch.float32, device, {}) for _ in range(2))
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])


@pytest.mark.interprets
def test_derivatives_of_long_rows_in_float64(monkeypatch):
    monkeypatch.setattr(MODULE, "MAX_FWD", 4)
    monkeypatch.setattr(MODULE, "MAX_BWD", 4)
    with use_backend("interpret"):
        assert gradcheck(lambda x: softmax(x, mask=some(4, 7), scale=0.5), draw(4, 7).requires_grad_(), fast_mode=True)


@pytest.mark.parametrize("name", ["torch", "reference"])
def test_gradient_of_an_additive_mask(name):
    x, mask = torch.randn(2, 4, 5), torch.randn(4, 5, requires_grad=True)
    with use_backend(name):
        softmax(x, mask=mask).square().sum().backward()
    assert mask.grad.abs().max() > 0


@pytest.mark.parametrize("name", ["torch", "interpret", "reference"])
def test_autocast_keeps_the_dtype(name):
    with use_backend(name), torch.autocast("cpu", torch.float16):
        assert softmax(torch.randn(4, 8, dtype=torch.bfloat16)).dtype == torch.bfloat16


X = torch.ones(2, 4, 8)
BAD = {
    "mask shape": (ValueError, r"mask of shape \(3, 8\) does not expand to \(2, 4, 8\)", {"mask": some(3, 8)}),
    "mask axes": (ValueError, "does not expand", {"mask": some(1, 2, 4, 8)}),
    "mask dtype": (TypeError, "mask must be boolean", {"mask": torch.ones(4, 8, dtype=torch.int32)}),
    "mask device": (ValueError, "mask is on meta", {"mask": torch.ones(4, 8, device="meta")}),
    "mask gradient": (
        NotImplementedError,
        "no gradient for a floating mask",
        {"mask": torch.ones(4, 8, requires_grad=True)},
    ),
    "causal": (ValueError, "causal is .* got 'left'", {"causal": "left"}),
    "causal without rows": (ValueError, r"\(8,\).*two axes", {"x": torch.ones(8), "causal": True}),
    "integers": (TypeError, "x must be floating, got int64", {"x": torch.ones(4, 8, dtype=torch.long)}),
}


@pytest.mark.interprets
@pytest.mark.parametrize("error, message, change", BAD.values(), ids=BAD)
def test_refuses(error, message, change):
    options = {"x": X} | change
    with use_backend("interpret"), pytest.raises(error, match=message):
        softmax(options.pop("x"), **options)
