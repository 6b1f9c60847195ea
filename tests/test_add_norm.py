"""add_layer_norm and add_rms_norm: shapes, single gradients, the rules of the interface; and the layers that use them.

Dtypes and features are calls of bench/calls/cases.py; what every op owes PyTorch is in test_autograd.py.
"""

import importlib
from unittest import mock

import pytest
import torch
from torch import nn

from tileformer import decoder, kernels
from tileformer.bench.calls import describe
from tileformer.bench.check.run import examine
from tileformer.kernels import add_layer_norm, add_rms_norm, launch, reference, use_backend

MODULE = importlib.import_module("tileformer.kernels.add_norm")
PARAMS = ("residual", "weight", "bias", "x_bias")


@pytest.mark.interprets
@pytest.mark.parametrize("rows, n", [(7, 1), (1, 3), (70, 63), (7, 64), (1, 65), (33, 1000), (7, 1024), (2, 4097)])
def test_every_width_is_within_the_budget(rows, n):
    for first in (True, False):
        call = describe("add_layer_norm", f"{rows} {n} {first}", "", rows, n, params=PARAMS, p=0.2, norm_first=first)
        finding = examine(call, "fp32", "interpret", torch.device("cpu"))
        assert not finding.problems and max(finding.over_budget.values()) <= 1.0, finding


@pytest.mark.interprets
@pytest.mark.parametrize("name", ["torch", "interpret", "reference"])
def test_y_has_the_dtype_of_the_branch_and_the_rest_that_of_the_stream(name):
    x, residual = torch.ones(2, 8, dtype=torch.bfloat16), torch.ones(2, 8)
    with use_backend(name):
        before, after = (add_layer_norm(x, residual, norm_first=first) for first in (True, False))
    assert [y.dtype for y in (*before, *after)] == [torch.bfloat16, *[torch.float32] * 3]


@pytest.mark.interprets
def test_parameters_may_be_strided_and_a_small_row_meets_the_eps_of_float32():
    x, residual, params = 1e-4 * torch.randn(2, 3, 8), torch.zeros(3, 8), torch.randn(3, 16)[:, ::2].unbind()
    with use_backend("interpret"):
        strided, whole = (
            add_layer_norm(x[0], residual, w, b, x_bias=c) for w, b, c in (params, [p.contiguous() for p in params])
        )
        y, _ = add_rms_norm(x[0], x[1])
    assert all(map(torch.equal, strided, whole))
    torch.testing.assert_close(y, nn.functional.rms_norm(x.sum(0), (8,)))


def _call(x, residual, weight, bias, x_bias, **options):
    return add_layer_norm(x, residual, weight, bias, x_bias=x_bias, p=0.2, seed=3, **options)


@pytest.mark.interprets
@pytest.mark.parametrize("first", [True, False])
def test_each_gradient_alone_is_the_one_beside_all_others(first):
    draw = torch.Generator().manual_seed(0)
    values = [torch.randn(s, generator=draw) for s in ((5, 40), (5, 40), (40,), (40,), (40,))]
    with use_backend("interpret"):
        leaves = [v.clone().requires_grad_() for v in values]
        y, second = _call(*leaves, norm_first=first)
        together = torch.autograd.grad((y.square() + second.sin()).sum(), leaves)
        for i, wanted in enumerate(together):
            alone = [v.clone().requires_grad_(j == i) for j, v in enumerate(values)]
            y, second = _call(*alone, norm_first=first)
            (got,) = torch.autograd.grad((y.square() + second.sin()).sum(), alone[i])
            assert torch.equal(got, wanted)
            y, second = _call(*alone, norm_first=first)  # one result alone
            torch.autograd.grad(second.sum(), alone[i], allow_unused=first)


@pytest.mark.interprets
@pytest.mark.parametrize("wide", [0, 1], ids=["gradient of y", "gradient of the total"])
def test_each_gradient_that_arrives_has_rows_as_far_apart_as_its_own_are(wide):
    torch.manual_seed(0)
    given = [torch.randn(7, 80 if i == wide else 64)[:, :64] for i in range(2)]
    x, residual = torch.randn(7, 64, requires_grad=True), torch.randn(7, 64)
    expected, got = (_gradient_of_x(name, x, residual, given) for name in ("reference", "interpret"))
    torch.testing.assert_close(got, expected)


def _gradient_of_x(name, x, residual, given):
    with use_backend(name):
        return torch.autograd.grad(add_layer_norm(x, residual), x, given)[0]


@pytest.mark.interprets
def test_two_handles_of_y_are_one_memory_and_their_gradients_are_added_by_the_kernel():
    x, residual = torch.randn(4, 16, requires_grad=True), torch.randn(4, 16)
    launched = []
    run = lambda self, *tensors: launched.append(self.kernel.fn.__name__) or original(self, *tensors)  # noqa: E731
    original = launch.Launch.__call__
    with use_backend("interpret"):
        y, again = add_layer_norm(x, residual, norm_first=False)
        assert y.data_ptr() == again.data_ptr() and y is not again
        with mock.patch.object(launch.Launch, "__call__", run):
            (got,) = torch.autograd.grad([y, again], x, [torch.ones_like(y), y.detach()])
    assert launched == ["_layer_norm_bwd_kernel"]
    both = reference.add_layer_norm(x.double(), residual.double(), norm_first=False)[0]
    (wanted,) = torch.autograd.grad(both, x, 1 + both.detach())
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.interprets
def test_rows_that_are_too_long_to_fuse_are_computed_all_the_same(monkeypatch):
    x, residual = torch.randn(3, 40), torch.randn(3, 40)
    with use_backend("interpret"):
        whole = add_layer_norm(x, residual, p=0.5, seed=9)
        monkeypatch.setattr(MODULE, "MAX_BWD", 8)
        for a, b in zip(add_layer_norm(x, residual, p=0.5, seed=9), whole, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", ["torch", "interpret"])
def test_bad_input_is_named(name):
    x = torch.randn(3, 8)
    with use_backend(name):
        for given, error, words in (
            (dict(residual=torch.randn(3, 7)), ValueError, r"residual.*\(3, 7\).*\(3, 8\)"),
            (dict(residual=x, weight=torch.ones(7)), ValueError, r"weight.*\(7,\).*\(8,\)"),
            (dict(residual=x, x_bias=torch.ones(3)), ValueError, r"x_bias.*\(3,\).*\(8,\)"),
            (dict(residual=x, p=1.5), ValueError, "1.5"),
            (dict(residual=x, dropout_p=0.1), TypeError, "dropout_p"),
        ):
            with pytest.raises(error, match=words):
                add_layer_norm(x, **given)
        with pytest.raises(ValueError, match="no axis"):
            add_layer_norm(torch.tensor(1.0), torch.tensor(1.0))


def _results(layer, backend, x, memory, **options):
    x, memory = x.clone().requires_grad_(), memory.clone().requires_grad_()
    with use_backend(backend):
        y = layer(x, memory, tgt_mask=torch.ones(9, 9).triu(1) > 0, tgt_is_causal=True, **options)
        ramp = torch.linspace(-1, 1, y.numel()).view_as(y)
        return [y.detach(), *torch.autograd.grad(y, [x, memory, *layer.parameters()], ramp)]


def _layer(first, activation="gelu", dropout=0.0, batch_first=True):
    torch.manual_seed(0)
    options = dict(activation=activation, batch_first=batch_first, norm_first=first)
    return decoder.TransformerDecoderLayer(32, 2, 64, dropout=dropout, **options)


@pytest.mark.interprets
@pytest.mark.parametrize("first", [True, False], ids=["norm first", "norm last"])
@pytest.mark.parametrize("change", ["", "time first", "hooks", "other norm", "other linear", "frozen", "evaluation"])
def test_a_layer_ends_its_sublayers_in_one_pass_with_the_gradients_of_its_parts(first, change):
    layer = _layer(first, "relu" if change else "gelu", 0.5 * (change == "evaluation"), change != "time first")
    layer.train(change != "evaluation")
    seen = []
    if change == "hooks":
        for part in (layer.norm2, layer.linear1, layer.linear2, layer.self_attn, layer.multihead_attn.out_proj):
            part.register_forward_hook(lambda part, given, out: seen.append(type(part).__name__))
    if change == "other norm":
        layer.norm2 = decoder.RMSNorm(32)
    if change == "other linear":
        layer.linear2 = nn.Sequential(layer.linear2)
    if change == "frozen":
        layer.multihead_attn.in_proj_weight.requires_grad_(False)
        layer.norm3.requires_grad_(False)
    x, memory = torch.randn(2, 9, 32), torch.randn(2, 7, 32)
    if change == "time first":
        x, memory = x.transpose(0, 1), memory.transpose(0, 1)
    if change == "frozen":
        layer.parameters = lambda: [p for p in nn.Module.parameters(layer) if p.requires_grad]
    for got, wanted in zip(*(_results(layer, name, x, memory) for name in ("interpret", "torch")), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    assert len(seen) == (10 if change == "hooks" else 0)


@pytest.mark.interprets
@pytest.mark.parametrize("first", [True, False], ids=["norm first", "norm last"])
def test_a_layer_that_drops_has_the_launches_of_its_passes(first):
    """And one draw of seeds: replayed by torch's generator, other in each call."""
    layer, names = _layer(first, dropout=0.5), []
    run = lambda self, *tensors: names.append(self.kernel.fn.__name__) or original(self, *tensors)  # noqa: E731
    original = launch.Launch.__call__
    x, memory = torch.randn(2, 9, 32), torch.randn(2, 7, 32)
    with mock.patch.object(torch, "randint", mock.Mock(side_effect=torch.randint)) as draw:
        with mock.patch.object(launch.Launch, "__call__", run):
            torch.manual_seed(5)
            once = _results(layer, "interpret", x, memory)
        assert draw.call_count == (2 if first else 1)  # the last residual of a pre-norm layer is dropout's
    forward = [name for name in names if "fwd" in name][: 7 if first else 6]
    assert forward.count("_layer_norm_fwd_kernel") == 3 and forward.count("_attention_fwd_kernel") == 2
    torch.manual_seed(5)
    for a, b in zip(once, _results(layer, "interpret", x, memory), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(once[0], _results(layer, "interpret", x, memory)[0])


@pytest.mark.interprets
@pytest.mark.parametrize("first", [True, False], ids=["norm first", "norm last"])
def test_a_lean_layer_has_the_same_gradients(first):
    layer, x, memory = _layer(first, dropout=0.3), torch.randn(2, 9, 32), torch.randn(2, 7, 32)
    found = []
    for layer.lean in (False, True):
        torch.manual_seed(1)
        found.append(_results(layer, "interpret", x, memory))
    for got, wanted in zip(*found, strict=True):
        assert torch.equal(got, wanted)
    with use_backend("interpret"):
        y = layer(x.requires_grad_(), memory)
        with pytest.raises(NotImplementedError, match="lean"):
            torch.autograd.grad(y.sum(), x, create_graph=True)


@pytest.mark.interprets
def test_models_train_through_the_fused_sublayers_as_through_torchs_operators():
    config = decoder.Seq2SeqConfig(11, 13, 32, 2, 1, 2, 64, dropout=0.0, max_length=16)
    torch.manual_seed(0)
    model = decoder.Seq2Seq(config)
    source, target = torch.randint(3, 11, (3, 6)), torch.randint(3, 13, (3, 5))
    found = []
    for name in ("interpret", "torch"):
        with use_backend(name):
            model.zero_grad()
            kernels.cross_entropy(model(source, target).flatten(0, 1), target.flatten()).backward()
            found.append([p.grad.clone() for p in model.parameters()])
    for got, wanted in zip(*found, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
