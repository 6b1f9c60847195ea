"""cross_entropy: losses and gradients against the reference by error budget, odd targets, its interface.

What every op owes PyTorch (opcheck, transforms, second derivatives, compile, export) is in test_autograd.py.
"""

import importlib

import pytest
import torch
from torch.autograd import gradcheck

from tileformer.bench.check.budget import assert_within_budget, rms_ratio
from tileformer.kernels import cross_entropy, reference, use_backend

MODULE = importlib.import_module("tileformer.kernels.cross_entropy")  # the package's attribute of that name is the op
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
CPU = torch.device("cpu")


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def targets(rows, classes, ignored=(0, 2)):
    target = torch.randint(classes, (rows,), generator=torch.Generator().manual_seed(1))
    target[[i for i in ignored if i < rows]] = -100
    return target


def weights(classes):
    return torch.rand(classes, generator=torch.Generator().manual_seed(2)) + 0.1


CALLS = {
    "plain": (33, 41, {}),
    "several tiles of rows": (70, 64, {"reduction": "sum"}),
    "aligned to 8 only": (5, 24, {"reduction": "none"}),
    "smoothing": (33, 41, {"label_smoothing": 0.1}),
    "weights": (33, 41, {"weight": weights(41)}),
    "weights and smoothing": (33, 41, {"weight": weights(41), "label_smoothing": 0.3, "reduction": "none"}),
    "smoothing alone": (5, 9, {"label_smoothing": 1.0}),
    "one class": (5, 1, {"label_smoothing": 0.1}),
    "one row": (1, 12, {"weight": weights(12), "label_smoothing": 0.2}),
}


def results(op, logits, target, dtype, device, options):
    """The loss and the gradient of the logits, with a different gradient for each element of the loss."""
    logits = logits.to(device, dtype, copy=True).requires_grad_()
    moved = {n: o.to(device) if isinstance(o, torch.Tensor) else o for n, o in options.items()}
    loss = op(logits, target.to(device), **moved)
    dloss = torch.linspace(-1, 2, loss.numel(), dtype=torch.float64).view(loss.shape).to(loss)
    return loss.detach(), torch.autograd.grad(loss, logits, dloss)[0]


def assert_matches_reference(rows, classes, options, dtype, device):
    logits, target = (3 * draw(rows, classes)).to(dtype).double(), targets(rows, classes, (0, 2) if rows > 2 else ())
    truth = results(reference.cross_entropy, logits, target, torch.float64, device, options)
    eager = results(reference.cross_entropy, logits, target, dtype, device, options)
    got = results(cross_entropy, logits, target, dtype, device, options)
    assert got[0].dtype == got[1].dtype == dtype
    added = float(logits.abs().max()) * (rows if options.get("reduction") == "sum" else 1)
    assert_within_budget("loss", got[0], eager[0], truth[0], added)
    # A gradient is a difference of p and 1, times its row's share: of the mean, 1 / (sum of weights).
    share = (
        1.0
        if options.get("reduction")
        else float(1 / options.get("weight", torch.ones(classes))[target[target >= 0]].sum())
    )
    assert_within_budget("dlogits", got[1], eager[1], truth[1], 4 * share)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows, classes, options", CALLS.values(), ids=CALLS)
def test_matches_the_reference(rows, classes, options, dtype, device):
    assert_matches_reference(rows, classes, options, dtype, device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows, classes, options", CALLS.values(), ids=CALLS)
def test_more_classes_than_a_tile(rows, classes, options, dtype, device, monkeypatch):
    monkeypatch.setattr(MODULE, "MAX_TILE", 8)
    assert_matches_reference(rows, classes, options, dtype, device)


@pytest.mark.parametrize("rows, classes, options", CALLS.values(), ids=CALLS)
def test_torch_backend(rows, classes, options):
    with use_backend("torch"):
        assert_matches_reference(rows, classes, options, torch.float32, CPU)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("longest", [None, 64], ids=["whole rows", "tiles of rows"])
def test_sums_are_wider_than_the_input(longest, dtype, device, backend, monkeypatch):
    """A maximum would not see a sum that was rounded on its way; the mean square does."""
    if longest:
        monkeypatch.setattr(MODULE, "MAX_TILE", longest)
    logits, target = (2 * draw(64, 300)).to(dtype).double(), targets(64, 300)
    options = {"reduction": "none", "label_smoothing": 0.2, "weight": weights(300)}
    got, eager, truth = (
        results(op, logits, target, d, device, options)
        for op, d in (
            (cross_entropy, dtype),
            (reference.cross_entropy, dtype),
            (reference.cross_entropy, torch.float64),
        )
    )
    for g, e, t in zip(got, eager, truth, strict=True):
        assert rms_ratio(g, e, t) <= 1.01


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("name", ["interpret", "torch", "reference"])
def test_agrees_with_torch(name, smoothing, reduction):
    logits, target = draw(9, 12).float(), targets(9, 12)
    options = {"weight": weights(12), "reduction": reduction, "label_smoothing": smoothing}
    with use_backend(name):
        got = cross_entropy(logits, target, **options)
    torch.testing.assert_close(got, torch.nn.functional.cross_entropy(logits, target, **options))


@pytest.mark.parametrize("name", ["interpret", "torch", "reference"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_an_ignored_row_leaks_nothing(name, reduction):
    logits, target = draw(4, 7).float(), torch.tensor([3, 5, 1, 6])
    clean = logits.clone().requires_grad_()
    logits[1, 2], logits[3] = torch.nan, torch.inf
    logits.requires_grad_()
    target[[1, 3]] = 6
    with use_backend(name):
        loss = cross_entropy(logits, target, ignore_index=6, label_smoothing=0.1, reduction=reduction)
        loss.sum().backward()
        expected = cross_entropy(clean, target, ignore_index=6, label_smoothing=0.1, reduction=reduction)
        expected.sum().backward()
    assert torch.equal(loss, expected) and torch.equal(logits.grad, clean.grad)
    assert torch.equal(logits.grad[[1, 3]], torch.zeros(2, 7))


@pytest.mark.parametrize("name", ["interpret", "torch", "reference"])
def test_nothing_but_ignored_rows(name):
    logits, target = torch.randn(3, 5, requires_grad=True), torch.full((3,), -100)
    with use_backend(name):
        assert cross_entropy(logits, target).isnan()
        loss = cross_entropy(logits, target, reduction="sum")
        loss.backward()
    assert loss == 0 and torch.equal(logits.grad, torch.zeros(3, 5))


@pytest.mark.parametrize("unknown", [7, -1, 2**40, 2**32 - 100])  # the last: -100 to 32 bits
def test_an_unknown_target_is_nan_and_nothing_else_is(unknown, device, backend):
    logits = torch.randn(4, 7, device=device, requires_grad=True)
    target = torch.tensor([0, unknown, -100, 6], device=device)
    loss = cross_entropy(logits, target, weight=torch.ones(7, device=device), reduction="none")
    loss.sum().backward()
    nan = torch.tensor([False, True, False, False], device=device)
    assert torch.equal(loss.isnan(), nan)
    assert torch.equal(logits.grad.isnan(), nan[:, None].expand(4, 7))


def test_an_ignored_target_has_64_bits(device, backend):
    logits, target = torch.randn(2, 7, device=device), torch.tensor([2**40, 0], device=device)
    loss = cross_entropy(logits, target, ignore_index=2**40, reduction="none")
    torch.testing.assert_close(loss, reference.cross_entropy(logits, target, ignore_index=2**40, reduction="none"))
    assert loss[0] == 0 and loss[1] > 0


def test_one_row_without_an_axis(device, backend):
    logits, target = torch.randn(9, device=device, requires_grad=True), torch.tensor(4, device=device)
    for reduction in ("mean", "sum", "none"):
        loss = cross_entropy(logits, target, reduction=reduction)
        assert loss.shape == ()
        torch.testing.assert_close(loss, reference.cross_entropy(logits, target))
    loss.backward()
    assert logits.grad.shape == (9,)


VIEWS = {
    "rows apart": lambda x: x[:, :40],
    "columns apart": lambda x: x[:, ::2],
    "transposed": lambda x: x.T,
    "one row repeated": lambda x: x[:1].expand(12, 80),
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_views(view, device, backend):
    base = torch.randn(12, 80, device=device)
    strided, dense = base.clone().requires_grad_(), base.clone().requires_grad_()
    x, y = view(strided), view(dense).contiguous()
    target = torch.arange(2 * len(x), device=device)[::2] % x.shape[1]
    losses = [cross_entropy(z, target, reduction="none") for z in (x, y)]
    for loss in losses:
        loss.sum().backward()  # a gradient with stride 0
    assert torch.equal(*losses) and torch.equal(strided.grad, dense.grad)


def test_strided_class_weights(device, backend):
    logits, target = torch.randn(5, 7, device=device, requires_grad=True), torch.arange(5, device=device)
    weight = torch.rand(7, 2, generator=torch.Generator().manual_seed(0)).to(device)[:, 0]
    losses = [cross_entropy(logits, target, weight=w, label_smoothing=0.1) for w in (weight, weight.contiguous())]
    assert torch.equal(*losses)
    assert torch.equal(*(torch.autograd.grad(loss, logits)[0] for loss in losses))


def test_logits_stay_as_they_are(device, backend):
    logits = torch.randn(5, 7, device=device, requires_grad=True)
    before = logits.detach().clone()
    cross_entropy(logits, torch.arange(5, device=device)).backward()
    assert torch.equal(logits.detach(), before)


def test_shifting_a_row_changes_nothing(device, backend):
    logits = torch.randint(-8, 8, (5, 33), device=device).float()
    target = torch.arange(5, device=device)
    rounding = 1024 * torch.finfo(torch.float32).eps  # of the log-sum-exp
    torch.testing.assert_close(
        cross_entropy(logits, target), cross_entropy(logits + 1024, target), rtol=0, atol=rounding
    )


def test_no_rows(device, backend):
    logits = torch.randn(0, 7, device=device, requires_grad=True)
    target = torch.zeros(0, dtype=torch.long, device=device)
    assert cross_entropy(logits, target).isnan()
    loss = cross_entropy(logits, target, reduction="none")
    loss.sum().backward()
    assert loss.shape == (0,) and logits.grad.shape == (0, 7)


def test_same_bits_every_time(device, backend):
    options = {"label_smoothing": 0.1}
    first, second = (
        results(cross_entropy, draw(70, 33), targets(70, 33), torch.float32, device, options) for _ in range(2)
    )
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])


@pytest.mark.interprets
def test_derivatives_over_several_tiles_in_float64(monkeypatch):
    monkeypatch.setattr(MODULE, "MAX_TILE", 4)
    target, weight = targets(4, 7), weights(7).double()
    with use_backend("interpret"):
        assert gradcheck(
            lambda x: cross_entropy(x, target, weight=weight, label_smoothing=0.3),
            draw(4, 7).requires_grad_(),
            fast_mode=True,
        )


@pytest.mark.parametrize("name", ["interpret", "torch", "reference"])
def test_class_weights_of_another_dtype(name):
    logits, target = draw(5, 7).bfloat16(), targets(5, 7)
    with use_backend(name):
        got = cross_entropy(logits, target, weight=weights(7))
    eager, truth = (reference.cross_entropy(x, target, weight=weights(7)) for x in (logits, logits.double()))
    assert got.dtype == torch.bfloat16
    assert_within_budget("loss", got, eager, truth, float(logits.abs().max()))


@pytest.mark.parametrize("name", ["torch", "interpret"])
def test_autocast_returns_float32(name):
    logits = torch.randn(4, 8, dtype=torch.bfloat16, requires_grad=True)
    with use_backend(name), torch.autocast("cpu", torch.bfloat16):
        loss = cross_entropy(logits, torch.arange(4))
    loss.backward()
    assert loss.dtype == torch.float32 and logits.grad.dtype == torch.bfloat16


LOGITS, TARGET = torch.ones(4, 8), torch.zeros(4, dtype=torch.long)
BAD = {
    "probabilities": (NotImplementedError, "class probabilities", {"target": torch.ones(4, 8)}),
    "short targets": (ValueError, r"target has shape \(3,\), expected \(4,\)", {"target": TARGET[:3]}),
    "int32 targets": (TypeError, "target must be int64, got int32", {"target": TARGET.int()}),
    "three axes": (ValueError, r"\(2, 2, 8\).*flatten", {"logits": LOGITS.view(2, 2, 8), "target": TARGET.view(2, 2)}),
    "no class": (ValueError, r"\(4, 0\)", {"logits": torch.ones(4, 0)}),
    "weight": (ValueError, r"weight has shape \(7,\), expected \(8,\)", {"weight": torch.ones(7)}),
    "weight gradient": (
        NotImplementedError,
        "weight requires a gradient",
        {"weight": torch.ones(8, requires_grad=True)},
    ),
    "device": (ValueError, "target is on meta", {"target": TARGET.to("meta")}),
    "reduction": (ValueError, "reduction must be .* got 'max'", {"reduction": "max"}),
    "smoothing": (ValueError, "between 0 and 1, got 2", {"label_smoothing": 2.0}),
    "integers": (TypeError, "logits must be floating", {"logits": LOGITS.long()}),
}


@pytest.mark.parametrize("error, message, change", BAD.values(), ids=BAD)
def test_refuses(error, message, change):
    options = {"logits": LOGITS, "target": TARGET} | change
    with pytest.raises(error, match=message):
        cross_entropy(options.pop("logits"), options.pop("target"), **options)
