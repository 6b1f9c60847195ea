"""linear_cross_entropy: losses and each gradient against the reference by error budget, in chunks; its memory, its
interface.

What every op owes PyTorch (opcheck, transforms, second derivatives, compile, export) is in test_autograd.py; more calls
are in bench/calls/cases.py.
"""

import importlib
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradgradcheck
from torch.profiler import ProfilerActivity, profile

from tileformer.bench.calls import describe
from tileformer.bench.check.budget import rms_ratio
from tileformer.bench.check.run import examine
from tileformer.kernels import cross_entropy, linear_cross_entropy, reference, use_backend

MODULE = importlib.import_module("tileformer.kernels.linear_cross_entropy")  # the package's attribute is the op
CPU = torch.device("cpu")
EVERYTHING = dict(bias=True, weighted=True, label_smoothing=0.1, z_loss=0.01, softcap=6.0)


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(MODULE, "CHUNK", dict.fromkeys(MODULE.CHUNK, 16))
    monkeypatch.setattr(MODULE, "BLOCK", 300)


def draw(rows, width, classes, dtype=torch.float32, device=CPU):
    """input, weight, bias and target; the second row is ignored."""
    generator = torch.Generator().manual_seed(0)
    shapes = (rows, width), (classes, width), (classes,)
    tensors = [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]
    target = torch.randint(classes, (rows,), generator=generator)
    target[1:2] = -100
    return *tensors, target.to(device)


def gradients(x, weight, bias, target, wanted=(0, 1, 2), op=linear_cross_entropy, **options):
    leaves = [t.detach().clone().requires_grad_(n in wanted) for n, t in enumerate((x, weight, bias))]
    loss = op(leaves[0], leaves[1], target, linear_bias=leaves[2], **options)
    given = torch.linspace(1, 2, loss.numel()).view(loss.shape).to(loss)
    return loss.detach(), *torch.autograd.grad(loss, [leaves[n] for n in wanted], given)


SHAPES = [(45, 63, 64), (0, 3, 5), (1, 1, 65), (7, 3, 1), (70, 65, 63), (19, 64, 1000)]
OPTIONS = {
    "plain": {},
    "everything": EVERYTHING,
    "none": dict(bias=True, reduction="none", softcap=6.0),
    "sum": dict(reduction="sum", z_loss=0.01),
}
every_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
DTYPES = {"fp32": SHAPES, "fp16": SHAPES[:1], "bf16": SHAPES[:1]}


def assert_matches_reference(options, dtype, backend, device):
    for shape in DTYPES[dtype]:
        call = describe("linear_cross_entropy", "one of many", "", *shape, ignored=shape[0] // 3, **options)
        found = examine(call, dtype, backend, device, runs=1)
        assert found.passed, (shape, found.verdict)


@every_option
@pytest.mark.parametrize("dtype", DTYPES)
def test_matches_the_reference(dtype, options, backend, device, small_chunks):
    assert_matches_reference(options, dtype, backend, device)


@every_option
@pytest.mark.parametrize("dtype", DTYPES)
def test_torch_backend(dtype, options, small_chunks):
    assert_matches_reference(options, dtype, "torch", CPU)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_each_gradient_alone_is_what_it_is_among_others(reduction, device, backend, small_chunks):
    tensors = draw(40, 5, 9, device=device)
    loss, *together = gradients(*tensors, reduction=reduction)
    for wanted in (x for n in (1, 2) for x in itertools.combinations(range(3), n)):
        alone, *got = gradients(*tensors, wanted, reduction=reduction)
        assert torch.equal(alone, loss)
        assert all(torch.equal(g, together[n]) for n, g in zip(wanted, got, strict=True))
    x, weight, bias, target = tensors
    nobody = linear_cross_entropy(x, weight, target, linear_bias=bias, reduction=reduction)
    assert torch.equal(nobody, loss) and not nobody.requires_grad


def test_what_forward_keeps_serves_any_gradient_of_the_loss(device, backend, small_chunks):
    x, weight, bias, target = draw(40, 5, 9, device=device)
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    loss = linear_cross_entropy(x, weight, target, linear_bias=bias)
    first, twice, again = (
        torch.autograd.grad(loss, leaves, torch.full_like(loss, s), retain_graph=True) for s in (1.0, 2.0, 1.0)
    )
    for a, b, c in zip(first, twice, again, strict=True):
        assert torch.equal(2 * a, b) and torch.equal(a, c)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_weights_gradient_is_summed_in_float32(dtype, device, backend, small_chunks):
    """A maximum would not see a sum over 25 chunks that was rounded on its way; the mean square does."""
    tensors = [t.double() if t.is_floating_point() else t for t in draw(400, 3, 4, dtype, device)]
    rounded = [t.to(dtype) if t.is_floating_point() else t for t in tensors]
    truth = gradients(*tensors, op=reference.linear_cross_entropy, reduction="sum")
    eager = gradients(*rounded, op=reference.linear_cross_entropy, reduction="sum")
    got = gradients(*rounded, reduction="sum")
    for n in (2, 3):
        assert rms_ratio(got[n], eager[n], truth[n]) < 2.0


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_an_ignored_row_leaks_nothing(reduction, device, backend):
    x, weight, bias, target = draw(5, 3, 4, device=device)
    clean = gradients(x, weight, bias, target, reduction=reduction)
    x[1] = torch.nan
    got = gradients(x, weight, bias, target, reduction=reduction)
    assert all(torch.equal(a, b) for a, b in zip(got, clean, strict=True)) and not got[1][1].any()


def test_same_bits_every_time(device, backend, small_chunks):
    first, second = (gradients(*draw(70, 9, 33, device=device), label_smoothing=0.1) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_tied_weights(device, backend, small_chunks):
    words = torch.arange(40, device=device) % 9
    grads = []
    for op in (linear_cross_entropy, lambda x, w, t: cross_entropy(F.linear(x, w), t)):
        weight = draw(1, 5, 9, device=device)[1].requires_grad_()
        op(F.embedding(words, weight), weight, words.roll(1)).backward()
        grads.append(weight.grad)
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("name", ["torch", "interpret"])
def test_autocast_is_that_of_the_linear_map_and_of_the_loss(name):
    tensors = draw(12, 8, 10)
    plain = lambda x, w, t, linear_bias: cross_entropy(F.linear(x, w, linear_bias), t)  # noqa: E731
    with use_backend(name), torch.autocast("cpu", torch.bfloat16):
        got, expected = gradients(*tensors), gradients(*tensors, op=plain)
    assert [x.dtype for x in got] == 4 * [torch.float32]
    torch.testing.assert_close(got, expected, rtol=0.02, atol=1e-3)
    assert all(torch.equal(x, x.bfloat16().float()) for x in got[1:])  # as they left the product


@pytest.mark.parametrize("name", ["torch", "interpret"])
@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_second_derivatives(reduction, name, small_chunks):
    x, weight, bias, target = draw(20, 2, 3, torch.float64)
    options = dict(reduction=reduction, z_loss=0.1, softcap=3.0, label_smoothing=0.2)
    call = lambda x, w, b: linear_cross_entropy(x, w, target, linear_bias=b, **options)  # noqa: E731
    with use_backend(name):
        leaves = [t.requires_grad_() for t in (x, weight, bias)]
        assert gradgradcheck(call, leaves, eps=1e-4, atol=1e-4, rtol=1e-3, fast_mode=True)


@pytest.mark.parametrize("name", ["torch", "interpret"])
def test_a_mean_over_nothing_has_no_gradient(name):
    x, weight, bias, _ = draw(5, 3, 4)
    with use_backend(name):
        loss, *grads = gradients(x, weight, bias, torch.full((5,), -100))
    assert loss.isnan() and not any(g.any() for g in grads)


def test_one_row_without_an_axis(device, backend):
    x, weight, bias, target = draw(1, 5, 9, device=device)
    for reduction in ("mean", "sum", "none"):
        one = linear_cross_entropy(x[0], weight, target[0], linear_bias=bias, reduction=reduction)
        torch.testing.assert_close(one, cross_entropy(F.linear(x, weight, bias), target))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["torch", "interpret", "reference"])
def test_z_loss_and_soft_cap_of_cross_entropy(name, dtype):
    """By their formulas; in bfloat16 under autocast, which returns float32."""
    logits, target = 4 * draw(9, 12, 12)[0].to(dtype), torch.arange(9)
    capped = 5 * torch.tanh(logits.float() / 5)
    expected = F.cross_entropy(capped, target) + 0.1 * capped.logsumexp(-1).square().mean()
    with use_backend(name), torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        got = cross_entropy(logits, target, z_loss=0.1, softcap=5.0)
    if name != "reference":
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, expected)


def test_torchs_own_is_equal():
    if not hasattr(F, "linear_cross_entropy"):
        pytest.skip("this torch has none")
    x, weight, bias, target = draw(9, 4, 6)
    options = dict(linear_bias=bias, weight=torch.rand(6) + 0.1, label_smoothing=0.1)
    for reduction in ("mean", "sum", "none"):
        got, expected = (
            op(x, weight, target, reduction=reduction, **options)
            for op in (linear_cross_entropy, F.linear_cross_entropy)
        )
        torch.testing.assert_close(got, expected)


# Memory


def peak_of(run) -> int:
    """The most bytes that CPU tensors made by a function held at once."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        run()
    changes = [event.nbytes() for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(itertools.accumulate(changes))


def formula(rows, width, classes, item, frozen=False) -> int:
    """What the docstring says of a forward on a CPU that keeps gradients: it holds more than backward."""
    size = 8 * math.ceil(rows / max(rows // 512, 1) / 8)
    of_weight = 0 if frozen else 4 * width * classes + (item == 2) * 6 * width * MODULE.CLASSES
    return item * size * (classes + width) + item * rows * width + of_weight


def held(rows, width, classes, dtype, frozen=False) -> float:
    """The peak over the formula."""
    x, weight, _, target = draw(rows, width, classes, dtype)
    x.requires_grad_(), weight.requires_grad_(not frozen)
    peak = peak_of(lambda: linear_cross_entropy(x, weight, target).backward())
    return peak / formula(rows, width, classes, dtype.itemsize, frozen)


@pytest.mark.parametrize("frozen", [False, True], ids=["", "frozen weight"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_is_a_chunks_and_the_gradients(dtype, frozen, monkeypatch):
    monkeypatch.setattr(MODULE, "BLOCK", 2**14)  # of which a few copies are small change beside real vocabularies
    assert 0.95 <= held(1100, 64, 8000, dtype, frozen) <= 1.05


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["torch", "interpret"])
def test_a_vocabulary_of_128256(name, dtype, monkeypatch):
    monkeypatch.setattr(MODULE, "CHUNK", dict.fromkeys(MODULE.CHUNK, 32))
    call = describe("linear_cross_entropy", "of Llama 3", "", 64, 32, 128256, ignored=5, z_loss=1e-4)
    found = examine(call, dtype, name, CPU, runs=1)
    assert found.passed, found.verdict


@pytest.mark.slow
def test_memory_with_a_vocabulary_of_128256():
    assert 0.95 <= held(4096, 32, 128256, torch.float32) <= 1.05


# Refusals

X, WEIGHT, TARGET = torch.ones(4, 3), torch.ones(5, 3), torch.zeros(4, dtype=torch.long)
BAD = {
    "widths": (ValueError, r"\(4, 3\) and \(5, 2\)", {"linear_weight": WEIGHT[:, :2]}),
    "three axes": (ValueError, r"\(2, 2, 3\) and .*flatten", {"input": X.view(2, 2, 3), "target": TARGET.view(2, 2)}),
    "no class": (ValueError, r"no class, got \(0, 3\)", {"linear_weight": WEIGHT[:0]}),
    "bias": (ValueError, r"linear_bias has shape \(4,\), expected \(5,\)", {"linear_bias": torch.ones(4)}),
    "dtypes": (TypeError, "are float32, float16: cast them", {"linear_weight": WEIGHT.half()}),
    "integers": (TypeError, "input must be floating", {"input": X.long()}),
    "no tensor": (TypeError, "linear_weight must be a torch.Tensor, got list", {"linear_weight": [1.0]}),
    "target": (ValueError, r"target has shape \(3,\), expected \(4,\)", {"target": TARGET[:3]}),
    "probabilities": (NotImplementedError, "class probabilities", {"target": torch.ones(4, 5)}),
    "weight": (ValueError, r"weight has shape \(3,\), expected \(5,\)", {"weight": torch.ones(3)}),
    "device": (ValueError, "linear_weight is on meta", {"linear_weight": WEIGHT.to("meta")}),
    "reduction": (ValueError, "reduction must be .* got 'max'", {"reduction": "max"}),
    "smoothing": (ValueError, "between 0 and 1, got 2", {"label_smoothing": 2}),
    "z-loss": (ValueError, "0 or positive, got -1.0 and 0.0", {"z_loss": -1.0}),
    "soft cap": (ValueError, "0 or positive, got 0.0 and -3.0", {"softcap": -3.0}),
    "a slip": (TypeError, "unexpected keyword argument 'bias'", {"bias": torch.ones(5)}),
}


@pytest.mark.parametrize("error, message, change", BAD.values(), ids=BAD)
def test_refuses(error, message, change):
    options = dict(input=X, linear_weight=WEIGHT, target=TARGET) | change
    with pytest.raises(error, match=message) as caught:
        linear_cross_entropy(**options)
    assert "\n" not in str(caught.value)
