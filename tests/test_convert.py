"""convert swaps classes and nothing else; revert gives them back."""

import copy
import functools
import pickle
from typing import Any

import pytest
import torch
from torch import nn

from tileformer import decoder, kernels
from tileformer.decoder import convert, revert
from tileformer.decoder.nn import modules
from tileformer.decoder.nn.modules import Dropout
from tileformer.kernels import use_backend


def model(**options) -> nn.Transformer:
    torch.manual_seed(0)
    return nn.Transformer(16, 2, 2, 2, 32, batch_first=True, **options).eval()


def run(net: nn.Module) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    source, target = torch.randn(2, 7, 16, generator=generator), torch.randn(2, 5, 16, generator=generator)
    causal = nn.Transformer.generate_square_subsequent_mask(5)
    return net(source, target, tgt_mask=causal, src_key_padding_mask=torch.arange(7).expand(2, 7) > 4)


def test_a_whole_model_and_back() -> None:
    net = model()
    expected = run(net)
    before = {name: (id(x), x.requires_grad) for name, x in net.named_parameters()}
    classes = {name: type(x) for name, x in net.named_modules()}
    net.decoder.layers[0].linear1.weight.requires_grad_(False)
    before["decoder.layers.0.linear1.weight"] = (id(net.decoder.layers[0].linear1.weight), False)
    seen = []
    net.encoder.layers[1].norm1.register_forward_hook(lambda *_: seen.append(1))
    report = convert(net)
    assert len(report.swapped) == 39 and not report.left, str(report)
    assert type(net) is decoder.Transformer and type(net.encoder.layers[0].self_attn) is decoder.MultiheadAttention
    assert {name: (id(x), x.requires_grad) for name, x in net.named_parameters()} == before
    torch.testing.assert_close(run(net), expected)
    assert seen == [1] and not net.training and not convert(net).swapped
    assert len(revert(net).swapped) == 39
    assert {name: type(x) for name, x in net.named_modules()} == classes
    torch.testing.assert_close(run(net), expected)


def test_what_we_built_becomes_torchs() -> None:
    torch.manual_seed(0)
    net = decoder.Transformer(16, 2, 2, 2, 32, activation="gelu", batch_first=True).eval()
    expected = run(net)
    revert(net)
    assert type(net.encoder.layers[0]) is nn.TransformerEncoderLayer
    assert net.encoder.layers[0].activation_relu_or_gelu == 2
    torch.testing.assert_close(run(net), expected)
    with torch.no_grad():
        torch.testing.assert_close(run(net), expected)


class _Own(nn.MultiheadAttention):
    """Computes something else."""

    def forward(self, query, *args, **kwargs):
        return query, None


class _Named(nn.LayerNorm):
    """Computes nothing of its own."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.note = "kept"

    def doubled(self, x):
        return 2 * self(x)


class _Layer(nn.TransformerEncoderLayer):
    def _ff_block(self, x):
        return x


def test_subclasses_keep_what_they_override() -> None:
    net = nn.ModuleDict(
        dict(own=_Own(8, 2), named=_Named(8), layer=_Layer(8, 2, 16), drop=nn.Dropout(0.1, inplace=True))
    )
    net["patched"] = nn.LayerNorm(8)
    net["patched"].forward = lambda x: x
    report = convert(net)
    assert set(report.left) == {"own", "layer", "drop", "patched"}
    assert "_Own has its own forward" in report.left["own"] and "_ff_block" in report.left["layer"]
    assert "in place" in report.left["drop"] and "replaced" in report.left["patched"]
    assert type(net["layer"].self_attn) is decoder.MultiheadAttention  # its children are not its own
    named = net["named"]
    assert isinstance(named, _Named) and isinstance(named, decoder.LayerNorm) and type(named).__name__ == "_Named"
    x = torch.randn(3, 8)
    torch.testing.assert_close(named.doubled(x), 2 * nn.functional.layer_norm(x, (8,)))
    for again in (copy.deepcopy(named), pickle.loads(pickle.dumps(named))):
        assert type(again) is type(named) and again.note == "kept" and torch.equal(again(x), named(x))
    revert(net)
    assert type(named) is _Named and type(net["own"]) is _Own


def test_parametrised_and_shared_modules() -> None:
    norm = nn.LayerNorm(8)
    net = nn.Sequential(norm, nn.Sequential(norm), nn.MultiheadAttention(8, 2, batch_first=True))
    nn.utils.parametrizations.weight_norm(net[2], "in_proj_weight")
    x = torch.randn(2, 3, 8)
    expected = net[2](x, x, x)[0]
    report = convert(net)
    assert set(report.swapped) == {"0", "2"} and net[1][0] is norm
    assert isinstance(net[2], decoder.MultiheadAttention)
    torch.testing.assert_close(net[2](x, x, x)[0], expected)
    revert(net)
    assert type(net[2]).__mro__[1] is nn.MultiheadAttention
    convert(net)
    nn.utils.parametrize.remove_parametrizations(net[2], "in_proj_weight")
    assert type(net[2]) is decoder.MultiheadAttention
    torch.testing.assert_close(net[2](x, x, x)[0], expected)


def test_compiled_models() -> None:
    net = torch.compile(nn.Sequential(nn.LayerNorm(8), nn.Softmax(-1)), backend="eager", fullgraph=True)
    x = torch.randn(3, 8)
    expected = net(x)
    assert len(convert(net).swapped) == 2
    torch.testing.assert_close(net(x), expected)


@pytest.mark.filterwarnings("ignore:Implicit dimension")
@pytest.mark.parametrize("dim", [None, 0, 1, -1])
def test_softmax(dim) -> None:
    x = torch.randn(3, 4, 5, requires_grad=True)
    for y in (x, x[0], x[0, 0]):
        if dim is None or dim < y.dim():
            torch.testing.assert_close(decoder.Softmax(dim)(y), nn.Softmax(dim)(y))
            torch.testing.assert_close(decoder.LogSoftmax(dim)(y), nn.LogSoftmax(dim)(y))
    assert decoder.Softmax(-1)(torch.tensor(3.0)) == 1


@pytest.mark.parametrize("name", ["LayerNorm", "RMSNorm", "Dropout", "Softmax", "LogSoftmax", "CrossEntropyLoss"])
def test_each_small_module_becomes_its_namesake_and_back(name) -> None:
    net = nn.Sequential(getattr(nn, name)(*[4] * name.endswith("Norm")))
    report = convert(net)
    assert type(net[0]) is getattr(modules, name) and report.swapped == {"0": f"torch's {name} -> tileformer's {name}"}
    assert revert(net).swapped == {"0": f"tileformer's {name} -> torch's {name}"} and type(net[0]) is getattr(nn, name)


@pytest.mark.parametrize("eps", [None, 0.5])
def test_rms_norm(eps) -> None:
    x, ours, theirs = torch.randn(3, 4, 5), decoder.RMSNorm((4, 5), eps=eps), nn.RMSNorm((4, 5), eps=eps)
    torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("shape", [(5,), (3, 5), (3, 5, 2), (3, 5, 2, 4), (0, 5)])
def test_cross_entropy(shape, reduction) -> None:
    weight = torch.rand(5)
    logits = torch.randn(shape, requires_grad=True)
    classes = () if len(shape) == 1 else (shape[0], *shape[2:])
    target = torch.randint(0, 5, classes)
    for options in ({}, dict(weight=weight, label_smoothing=0.1, ignore_index=2)):
        ours, theirs = (
            cls(reduction=reduction, **options)(logits, target)
            for cls in (decoder.CrossEntropyLoss, nn.CrossEntropyLoss)
        )
        torch.testing.assert_close(ours, theirs, equal_nan=True)
    if len(shape) > 1:
        with pytest.raises(ValueError, match="asks for targets"):
            decoder.CrossEntropyLoss()(logits, torch.zeros(7, dtype=torch.long))
    shares = torch.randn(shape).softmax(0)
    torch.testing.assert_close(
        decoder.CrossEntropyLoss()(logits, shares), nn.CrossEntropyLoss()(logits, shares), equal_nan=True
    )


class _Sees(nn.Module):
    """A user's layer, which believes what it is told and adds its masks."""

    def __init__(self) -> None:
        super().__init__()
        self.self_attn = nn.MultiheadAttention(16, 2, batch_first=True)
        self.told: list = []

    def forward(self, x, memory=None, **given):
        self.told.append({name: value for name, value in given.items() if value is not None})
        return x


@pytest.mark.parametrize("kind", [nn.TransformerEncoder, nn.TransformerDecoder])
def test_a_users_layer_in_a_swapped_stack_is_told_what_torch_tells_it(kind) -> None:
    options = dict(enable_nested_tensor=False) if kind is nn.TransformerEncoder else {}
    stack = kind(_Sees(), 1, **options)
    x, padding = torch.randn(2, 5, 16), torch.arange(5).expand(2, 5) > 3
    memory = () if kind is nn.TransformerEncoder else (x,)
    if kind is nn.TransformerEncoder:
        side, masks = "src", dict(mask=torch.ones(5, 5).triu(1).bool())
    else:
        side, masks = "tgt", dict(tgt_mask=nn.Transformer.generate_square_subsequent_mask(5))
    expected: list = []
    got: list = []
    for told in (expected, got):
        stack.layers[0].told = told
        stack(x, *memory, **masks)
        stack(x, *memory, **masks, **{f"{side}_key_padding_mask": padding})
        convert(stack)
    assert isinstance(stack, (decoder.TransformerEncoder, decoder.TransformerDecoder))
    assert [call.keys() for call in got] == [call.keys() for call in expected]
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs)  # dtypes too: a mask that is added must not be boolean
    assert got[0]["is_causal" if memory == () else "tgt_is_causal"] is True


class _Adds(nn.Module):
    """A user's attention, which adds what it is given."""

    batch_first = True

    def forward(self, query, key, value, attn_mask=None, key_padding_mask=None, **_):
        scores = query @ key.transpose(-1, -2)
        scores = scores if attn_mask is None else scores + attn_mask
        scores = scores if key_padding_mask is None else scores + key_padding_mask[:, None]
        return scores.softmax(-1) @ value, None


def test_a_users_attention_in_a_swapped_layer_gets_masks_to_add() -> None:
    layer: Any = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    layer.self_attn = _Adds()
    x, hidden = torch.randn(2, 5, 16), torch.ones(5, 5).triu(1).bool()
    padding = torch.arange(5).expand(2, 5) > 3
    expected = layer(x, hidden, padding)
    convert(layer)
    torch.testing.assert_close(layer(x, hidden, padding), expected)


class _Locked(nn.LayerNorm):
    """Its state is less than its attributes."""

    def __getstate__(self):
        return {name: value for name, value in super().__getstate__().items() if name != "secret"}


def test_copies_of_a_users_subclass_hold_what_it_says() -> None:
    norm = _Locked(8)
    convert(norm)
    vars(norm)["secret"] = iter(())  # cannot be copied
    norm.compile(backend="eager")
    for again in (copy.deepcopy(norm), pickle.loads(pickle.dumps(norm))):
        assert type(again) is type(norm) and not hasattr(again, "secret")
        nn.init.constant_(again.weight, 5.0)
        x = torch.randn(3, 8)
        torch.testing.assert_close(again(x), 5 * norm(x))  # its own weights, not those of a compiled call


class _Registered(nn.LayerNorm):
    known: list = []

    def __init_subclass__(cls, *, title: str) -> None:
        _Registered.known.append(title)


class _Helped(nn.MultiheadAttention):
    """Has a method of its own that happens to be called as one of ours."""

    def _split_heads(self, x):
        return x


class _Stack(nn.TransformerEncoder):
    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)


def test_what_convert_would_break_is_left() -> None:
    net = nn.ModuleDict(dict(helped=_Helped(8, 2), wide=nn.MultiheadAttention(512, 1), registered=_Registered(8)))
    report = convert(net)
    assert set(report.left) == {"helped", "wide"} and "_split_heads" in report.left["helped"]
    assert "512 are wider than 256" in report.left["wide"]
    assert isinstance(net["registered"], decoder.LayerNorm) and _Registered.known == []  # nobody is told of our class


@pytest.mark.filterwarnings("ignore:.*nested tensors")  # once in a process
def test_an_encoder_that_is_left_hands_its_layers_no_nested_tensors() -> None:
    stack = _Stack(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2).eval()
    x, padding = torch.randn(2, 5, 16), torch.arange(5).expand(2, 5) > 3
    with torch.no_grad():
        expected = stack(x, src_key_padding_mask=padding)
    report = convert(stack)
    assert list(report.left) == [""] and isinstance(stack, _Stack) and not convert(stack).swapped
    with torch.no_grad():
        torch.testing.assert_close(stack(x, src_key_padding_mask=padding)[~padding], expected[~padding])
    revert(stack)
    assert type(stack) is _Stack and stack.use_nested_tensor is True
    plain = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2).eval()
    vars(plain)["forward"] = functools.partial(nn.TransformerEncoder.forward, plain)
    convert(plain)
    with torch.no_grad():
        assert plain(x, src_key_padding_mask=padding).shape == x.shape


def test_classes_that_another_library_makes_of_ours() -> None:
    """As FSDP2 does: they can be copied, and `revert` says that it leaves them."""
    net = nn.Sequential(nn.LayerNorm(8), _Named(8))
    convert(net)
    x = torch.randn(3, 8)
    expected = net(x)
    for module in net:
        module.__class__ = type("Sharded", (type("Mixin", (), {}), type(module)), {})
    torch.testing.assert_close(copy.deepcopy(net)(x), expected)
    report = revert(net)
    assert not report.swapped and set(report.left) == {"0", "1"} and "Sharded" in report.left["1"]
    torch.testing.assert_close(net(x), expected)


class _Equal:
    """Cannot be hashed."""

    def __eq__(self, other):
        return isinstance(other, _Equal)

    def __call__(self, x):
        return x


@pytest.mark.parametrize("activation", [_Equal(), nn.ReLU(), nn.GELU(), torch.tanh])
def test_what_torch_notes_of_an_activation(activation) -> None:
    theirs = nn.TransformerEncoderLayer(16, 2, 32, activation=activation)
    ours = decoder.TransformerEncoderLayer(16, 2, 32, activation=activation)
    revert(ours)
    assert ours.activation_relu_or_gelu == theirs.activation_relu_or_gelu


@pytest.mark.interprets
@pytest.mark.parametrize("name", ["torch", "interpret"])
def test_jagged_tensors_are_served_or_refused(name) -> None:
    rows = [torch.randn(3, 8), torch.randn(5, 8)]
    jagged = torch.nested.nested_tensor(rows, layout=torch.jagged, requires_grad=True)
    served = [nn.LayerNorm(8), nn.RMSNorm(8), nn.Softmax(-1), nn.LogSoftmax(-1)]
    with use_backend(name):
        for theirs in served:
            expected = theirs(jagged.values())
            ours = nn.Sequential(theirs)
            convert(ours)
            got = ours(jagged)
            torch.testing.assert_close((got + jagged).values(), expected + jagged.values())  # its offsets are the same
            (grad,) = torch.autograd.grad(got.values().square().sum(), jagged)
            torch.testing.assert_close(grad.values(), torch.autograd.grad(expected.square().sum(), jagged)[0].values())
        drop = Dropout(0.5)
        got = drop(jagged, jagged)
        assert set(((got - jagged) / jagged).values().detach().round().unique().tolist()) == {0.0, 2.0}
        assert torch.equal(decoder.Softmax(1)(jagged).values(), nn.Softmax(1)(jagged).values())  # torch's: not a row
        gaps = torch.nested.narrow(
            torch.randn(2, 9, 8), 1, torch.tensor([0, 2]), torch.tensor([3, 4]), layout=torch.jagged
        )
        heads = jagged.unflatten(-1, (2, 4)).transpose(1, 2)
        refused = [
            (lambda: decoder.LayerNorm(8)(gaps), "without gaps"),
            (lambda: drop(torch.nested.nested_tensor(rows)), "must be jagged"),
            (lambda: drop(jagged, torch.randn(2, 5, 8)), "jagged tensors of the same offsets"),
            (lambda: decoder.CrossEntropyLoss()(jagged, torch.zeros(2).long()), "pass their values"),
            (lambda: kernels.cross_entropy(jagged, torch.zeros(2).long()), r"pass x.values\(\)"),
            (lambda: kernels.attention(heads, heads, heads), "attention: nested.*values"),
            (lambda: kernels.scaled_dot_product_attention(heads, heads, heads), "attention: nested.*values"),
            (
                lambda: decoder.TransformerEncoderLayer(8, 2, 16, batch_first=True)(jagged),
                "nested tensors are not supported",
            ),
        ]
        for call, message in refused:
            with pytest.raises(TypeError, match=message):
                call()
