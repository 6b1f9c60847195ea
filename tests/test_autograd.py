"""How the ops meet PyTorch's machinery: opcheck, gradcheck, func transforms, second derivatives, compile, export, fake
CUDA tensors."""

import dataclasses
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad

from tileformer import decoder, kernels
from tileformer.decoder.nn import modules
from tileformer.kernels import reference, use_backend
from tileformer.kernels.launch import Launch

pytestmark = [
    pytest.mark.filterwarnings(
        "ignore:.*autograd.function.Function.* should not be instantiated:DeprecationWarning"
    ),  # dynamo
    pytest.mark.filterwarnings(
        "ignore:There is a performance drop because we have not yet implemented the batching rule"
    ),  # vmap
    pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated:DeprecationWarning"),  # torch's forward mode
]


@dataclasses.dataclass
class Op:
    """An op on small float64 inputs: differentiable tensors, other arguments, and the registered ops behind it."""

    name: str
    tensors: dict[str, Tensor]
    options: dict[str, Any]

    def call(self, namespace: Any = kernels, **more: Any) -> Callable[..., Any]:
        return lambda *tensors: getattr(namespace, self.name)(
            **dict(zip(self.tensors, tensors, strict=True)), **self.options, **more
        )

    def inputs(self, dtype: torch.dtype = torch.float64) -> list[Tensor]:
        return [x.detach().to(dtype).requires_grad_() for x in self.tensors.values()]


def _ops() -> dict[str, Op]:
    g = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(shape, generator=g, dtype=torch.float64)  # noqa: E731
    seed = torch.tensor([5])
    qkv = dict(q=draw(2, 2, 5, 4), k=draw(2, 1, 7, 4), v=draw(2, 1, 7, 4))
    key_mask = torch.tensor([[True] * 7, [False] + [True] * 4 + [False] * 2])
    masked = dict(
        key_mask=key_mask, mask=torch.rand(5, 7, generator=g) > 0.2, causal="bottom_right", dropout_p=0.25, seed=seed
    )
    return {
        "attention": Op("attention", qkv, {}),
        "attention masked": Op("attention", qkv, masked),
        "attention with lse": Op("attention", qkv, dict(causal=True, return_lse=True)),
        "layer_norm": Op(
            "layer_norm", dict(x=draw(3, 5, 6), weight=draw(6), bias=draw(6)), dict(normalized_shape=(6,))
        ),
        "rms_norm": Op("rms_norm", dict(x=draw(3, 5, 6), weight=draw(6)), dict(normalized_shape=(6,), eps=1e-6)),
        "softmax": Op(
            "softmax",
            dict(x=draw(2, 3, 4, 6)),
            dict(scale=0.7, causal="bottom_right", mask=torch.rand(4, 6, generator=g) > 0.2),
        ),
        "log_softmax": Op("log_softmax", dict(x=draw(2, 3, 4, 6)), dict(scale=0.7, mask=draw(4, 6))),
        "cross_entropy": Op(
            "cross_entropy", dict(logits=draw(4, 6)), dict(target=torch.tensor([0, 5, -100, 2]), label_smoothing=0.1)
        ),
        "add_layer_norm": Op(
            "add_layer_norm",
            dict(x=draw(3, 6), residual=draw(3, 6), weight=draw(6), bias=draw(6), x_bias=draw(6)),
            dict(p=0.3, seed=seed),
        ),
        "add_rms_norm last": Op(
            "add_rms_norm", dict(x=draw(3, 6), residual=draw(3, 6), weight=draw(6)), dict(eps=1e-6, norm_first=False)
        ),
        "linear_cross_entropy": Op(
            "linear_cross_entropy",
            dict(input=draw(4, 5), linear_weight=draw(6, 5), linear_bias=draw(6)),
            dict(target=torch.tensor([0, 5, -100, 2]), label_smoothing=0.1, z_loss=0.01, softcap=4.0),
        ),
        "bias_activation_dropout": Op(
            "bias_activation_dropout",
            dict(x=draw(3, 6), bias=draw(6), up=draw(3, 6)),
            dict(activation="gelu", p=0.3, seed=seed),
        ),
        "swiglu": Op("bias_activation_dropout", dict(x=draw(3, 6), up=draw(3, 6)), dict(activation="silu")),
        "rotary": Op("rotary", dict(x=draw(2, 3, 5, 8)), dict(cos=draw(5, 3), sin=draw(5, 3), interleaved=True)),
        "dropout": Op("dropout", dict(x=draw(3, 6), residual=draw(3, 6)), dict(p=0.3, seed=seed)),
    }


OPS = _ops()
every_op = pytest.mark.parametrize("op", [pytest.param(op, id=name) for name, op in OPS.items()])
both = pytest.mark.parametrize("name", ["interpret", "torch"])


@pytest.mark.interprets
@every_op
def test_gradcheck_through_the_kernels(op: Op) -> None:
    with use_backend("interpret"):  # float scalars reach a kernel as float32: exact to 1e-7, not to float64
        assert torch.autograd.gradcheck(op.call(), op.inputs(), eps=1e-4, atol=1e-5, rtol=1e-4, fast_mode=True)


def _registered_calls(op: Op) -> list[tuple[Any, tuple[Any, ...]]]:
    """The registered ops that a forward and backward of `op` call, with their arguments."""
    from torch.utils._python_dispatch import TorchDispatchMode

    calls = []

    class Listen(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace == "tileformer":
                calls.append((func, tuple(a.detach().clone() if isinstance(a, Tensor) else a for a in args)))
            return func(*args, **(kwargs or {}))

    with use_backend("interpret"), Listen():
        outputs = op.call()(*op.inputs(torch.float32))
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        sum(x.sum() for x in outputs).backward()
    return calls


@pytest.mark.interprets
@every_op
def test_opcheck(op: Op) -> None:
    calls = _registered_calls(op)
    assert calls, "the interpret backend calls a registered op"
    for func, args in calls:
        torch.library.opcheck(func, args)


@both
@every_op
def test_func_grad_and_vmap_agree_with_autograd(op: Op, name: str) -> None:
    inputs = [x.detach() for x in op.inputs()]

    def total(*tensors: Tensor) -> Tensor:
        out = op.call()(*tensors)
        return sum(x.square().sum() for x in (out if isinstance(out, tuple) else (out,)))

    with use_backend(name):
        leaves = op.inputs()
        expected = torch.autograd.grad(total(*leaves), leaves)
        everything = tuple(range(len(inputs)))
        for a, b in zip(torch.func.grad(total, argnums=everything)(*inputs), expected, strict=True):
            torch.testing.assert_close(a, b)
        batch = [torch.stack([x, 2 * x]) for x in inputs]
        per_sample = torch.func.vmap(torch.func.grad(total, argnums=everything), randomness="same")(*batch)
        for a, b in zip(per_sample, expected, strict=True):
            torch.testing.assert_close(a[0], b)


@both
@every_op
def test_second_derivatives_equal_the_references(op: Op, name: str) -> None:
    if name == "torch" and {"dropout_p", "p"} & set(op.options):
        pytest.skip("the torch backend draws other dropout bits than the reference")

    def second(namespace: Any) -> tuple[Tensor, ...]:
        leaves = op.inputs()
        out = op.call(namespace)(*leaves)
        out = sum(x.square().sum() for x in (out if isinstance(out, tuple) else (out,)))
        first = torch.autograd.grad(out, leaves, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), leaves)

    with use_backend(name):
        got = second(kernels)
    for a, b in zip(got, second(reference), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


X = OPS["dropout"].tensors["x"]
LEARNED: dict[str, Callable[[Any], Any]] = {
    "scale": lambda s: kernels.attention(*[OPS["attention"].tensors["q"]] * 3, scale=s),
    "softcap": lambda s: kernels.attention(*[OPS["attention"].tensors["q"]] * 3, softcap=s),
    "attention's dropout_p": lambda s: kernels.attention(*[OPS["attention"].tensors["q"]] * 3, dropout_p=s, seed=3),
    "torch's scale": lambda s: kernels.scaled_dot_product_attention(X[None], X[None], X[None], scale=s),
    "softmax's scale": lambda s: kernels.softmax(X, scale=s),
    "log_softmax's scale": lambda s: kernels.log_softmax(X, scale=s),
    "dropout's p": lambda s: kernels.dropout(X, s, seed=3),
    "an activation's p": lambda s: kernels.bias_activation_dropout(X, "gelu", p=s, seed=3),
    "layer_norm's eps": lambda s: kernels.layer_norm(X, 6, eps=s),
    "rms_norm's eps": lambda s: kernels.rms_norm(X, 6, eps=s),
    "label_smoothing": lambda s: kernels.cross_entropy(X, torch.tensor([0, 1, 2]), label_smoothing=s),
    "z_loss": lambda s: kernels.linear_cross_entropy(X, X, torch.tensor([0, 1, 2]), z_loss=s),
    "a module's dropout": lambda s: decoder.MultiheadAttention(4, 2, dropout=s, dtype=X.dtype)(*[X.view(3, 1, 6)[..., :4]] * 3)[0],
    "a module's p": lambda s: modules.Dropout(s)(X),
    "a module's eps": lambda s: modules.LayerNorm(6, eps=s, dtype=X.dtype)(X),
    "a loss's smoothing": lambda s: modules.CrossEntropyLoss(label_smoothing=s)(X, torch.tensor([0, 1, 2])),
}  # fmt: skip


@pytest.mark.parametrize("name", ["interpret", "torch", "reference"])
@pytest.mark.parametrize("call", LEARNED.values(), ids=LEARNED)
def test_a_number_that_is_learned_is_refused_and_never_cut_off(call: Callable[[Any], Any], name: str) -> None:
    number = torch.tensor(0.3, dtype=torch.float64)
    with use_backend(name):
        for asked in (
            lambda: call(number.clone().requires_grad_()),
            lambda: call(torch.nn.Parameter(number)),
            lambda: torch.func.grad(lambda s: call(s).sum())(number),
            lambda: torch.func.grad(lambda s: torch.vmap(lambda a: call(s) * a, randomness="same")(X[0]).sum())(number),
            lambda: torch.func.jvp(call, (number,), (number,)),
        ):
            with pytest.raises(NotImplementedError, match=r"requires a gradient, and gets none: (pass|multiply)"):
                asked()
        torch.manual_seed(0)
        with torch.no_grad():
            got = call(torch.nn.Parameter(number))
            torch.manual_seed(0)
            torch.testing.assert_close(got, call(0.3))
        with pytest.raises((TypeError, RuntimeError), match="must be a number|more than one value"):
            call(torch.ones(2))


@pytest.mark.interprets
@every_op
def test_forward_mode_is_served_or_refused_with_the_way_out(op: Op) -> None:
    """docs/drop-in.md has the table: the kernels refuse it, the torch backend serves it."""
    first = next(iter(op.tensors))
    tangent = torch.linspace(-1, 1, op.tensors[first].numel(), dtype=torch.float64).view_as(op.tensors[first])
    of_first = lambda x: op.call()(x, *list(op.tensors.values())[1:])  # noqa: E731

    def dual() -> Any:
        with forward_ad.dual_level():
            out = of_first(forward_ad.make_dual(op.tensors[first], tangent))
            return [forward_ad.unpack_dual(x).tangent for x in (out if isinstance(out, tuple) else (out,))]

    push = lambda: torch.func.jvp(of_first, (op.tensors[first],), (tangent,))[1]  # noqa: E731
    curve = lambda: torch.func.hessian(lambda x: torch.as_tensor(of_first(x)[0]).sum())(op.tensors[first])  # noqa: E731
    with use_backend("interpret"):
        for asked in (dual, push, curve) if op.name not in ("dropout", "cross_entropy") else (dual, push):
            with pytest.raises(NotImplementedError, match=r"jacrev.*use_backend\('reference'\)"):
                asked()
    if {"dropout_p", "p"} & set(op.options):
        return  # the torch backend has bits of its own
    with use_backend("reference"):
        expected = push()
    with use_backend("torch"):
        torch.testing.assert_close(push(), expected)
        torch.testing.assert_close(dual(), list(expected) if isinstance(expected, tuple) else [expected])


def test_what_is_not_differentiable_takes_no_tangent() -> None:
    weight, logits = torch.rand(6).double(), OPS["cross_entropy"].tensors["logits"]
    slopes, qkv = torch.rand(2).double(), OPS["attention"].tensors
    for name in ("interpret", "torch"):
        with use_backend(name):
            for call, x in (
                (lambda w: kernels.cross_entropy(logits, torch.tensor([0, 5, 3, 2]), weight=w), weight),
                (lambda s: kernels.attention(**qkv, alibi_slopes=s), slopes),
            ):
                for asked in (lambda: call(x.clone().requires_grad_()), lambda: torch.func.jvp(call, (x,), (x,))):  # noqa: B023
                    with pytest.raises(NotImplementedError, match="detach"):
                        asked()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")  # the tracer's own
def test_jit_trace_is_served_or_refused_in_words() -> None:
    qkv = tuple(OPS["attention"].tensors.values())
    for name, call, inputs in (
        ("interpret", kernels.attention, qkv),
        ("torch", lambda q, k, v: kernels.attention(q, k, v, dropout_p=0.5), qkv),
        ("torch", lambda x: kernels.dropout(x, 0.5), (X,)),
    ):
        with use_backend(name), pytest.raises(NotImplementedError, match="torch.export"):
            torch.jit.trace(call, inputs)
    with use_backend("torch"):
        torch.testing.assert_close(torch.jit.trace(kernels.attention, qkv)(*qkv), kernels.attention(*qkv))


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@both
@every_op
def test_compiles_to_one_graph(op: Op, name: str, dynamic: bool) -> None:
    torch.compiler.reset()
    inputs = op.inputs(torch.float32)
    with use_backend(name):
        expected = op.call()(*inputs)
        compiled = torch.compile(op.call(), fullgraph=True, backend="aot_eager", dynamic=dynamic)(*inputs)
        pairs = zip(*(x if isinstance(x, tuple) else (x,) for x in (compiled, expected)), strict=True)
        for a, b in pairs:
            torch.testing.assert_close(a, b)
        again = torch.autograd.grad(
            sum(x.sum() for x in (compiled if isinstance(compiled, tuple) else (compiled,))), inputs
        )
        first = torch.autograd.grad(
            sum(x.sum() for x in (expected if isinstance(expected, tuple) else (expected,))), inputs
        )
    for a, b in zip(again, first, strict=True):
        torch.testing.assert_close(a, b)


@both
@every_op
def test_exports_as_one_program(op: Op, name: str) -> None:
    class Module(torch.nn.Module):
        def forward(self, *tensors: Tensor) -> Any:
            return op.call()(*tensors)

    inputs = tuple(x.detach() for x in op.inputs(torch.float32))
    with use_backend(name):
        program = torch.export.export(Module(), inputs, strict=False)
        torch.testing.assert_close(program.module()(*inputs), op.call()(*inputs))


@pytest.mark.interprets
@every_op
def test_no_device_value_is_read_on_the_host(op: Op, monkeypatch: pytest.MonkeyPatch) -> None:
    """On fake CUDA tensors `.item()` raises: the public op, the fakes and the launchers up to the launch itself must do
    without."""

    def fake(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        return torch.empty_strided(
            x.shape, x.stride(), dtype=torch.float32 if x.is_floating_point() else x.dtype, device="cuda"
        )

    calls = _registered_calls(op)
    launched = []
    with FakeTensorMode(), torch.no_grad(), use_backend("triton"):
        tensors, options = ({name: fake(x) for name, x in group.items()} for group in (op.tensors, op.options))
        outputs = getattr(kernels, op.name)(**tensors, **options)
        assert all(x.is_cuda for x in (outputs if isinstance(outputs, tuple) else (outputs,)))
        for func, args in calls:
            name = func._schema.name.removeprefix("tileformer::")
            rooms = [m for m in list(sys.modules.values()) if m.__name__.startswith("tileformer.kernels.")]
            launcher = next(getattr(room, name) for room in rooms if hasattr(room, name))
            with monkeypatch.context() as patch:
                patch.setattr(Launch, "__call__", lambda self, *_: launched.append(self.grid(self.tiles[0])))
                real = launcher(*map(fake, args))
            shapes = func(*map(fake, args))
            as_tuple = lambda x: x if isinstance(x, tuple) else (x,)  # noqa: E731
            for a, b in zip(as_tuple(real), as_tuple(shapes), strict=True):
                assert a.is_cuda and a.shape == b.shape and a.dtype == b.dtype and a.stride() == b.stride()
    assert launched
