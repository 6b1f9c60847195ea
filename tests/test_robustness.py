"""Calls at the edges: what torch computes, or the better-defined value that docs/drop-in.md names, or an error at least
as clear.

A case is one function, called with torch's names and with ours, on the torch backend and through the interpreter.
"""

import functools
import itertools
import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from tileformer import decoder, kernels
from tileformer.kernels import scaled_dot_product_attention, use_backend

INF, NAN = float("inf"), float("nan")
TORCH = SimpleNamespace(**{name: getattr(nn, name) for name in decoder.__all__ if hasattr(nn, name)})


def _sdpa(*arguments: Any, **options: Any) -> Tensor:
    """torch's, by its plain path: its fused ones differ from it and from each other at these edges."""
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(*arguments, **options)


TORCH.sdpa = _sdpa
OURS = SimpleNamespace(**{name: getattr(decoder, name) for name in vars(TORCH) if hasattr(decoder, name)})
OURS.sdpa = scaled_dot_product_attention


class Case(NamedTuple):
    """expected: None: torch's value; a value: ours, where torch has NaN, another number or an error; str: both refuse,
    ours with these words.

    alone: ours refuses what torch takes, for this reason.
    """

    call: Callable[[Any], Any]
    expected: Any = None
    alone: str = ""


def rand(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32, grad: bool = False) -> Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype)
    return x.requires_grad_(grad)


def qkv(
    B: int = 2,
    H: int = 2,
    T_q: int = 4,
    T_k: int = 5,
    D: int = 8,
    dtype: torch.dtype = torch.float32,
    grads: str = "qkv",
) -> tuple[Tensor, Tensor, Tensor]:
    sizes = {"q": T_q, "k": T_k, "v": T_k}
    q, k, v = (rand(B, H, T, D, seed=ord(n), dtype=dtype, grad=n in grads) for n, T in sizes.items())
    return q, k, v


def with_grads(out: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    """The output, and the gradients of those inputs that ask for one."""
    asked = [x for x in inputs if x.requires_grad]
    weight = rand(*out.shape, seed=9, dtype=out.dtype)
    return (out.detach(), *torch.autograd.grad(out, asked, weight)) if asked else (out.detach(),)


def attend(**options: Any) -> Callable[[Any], Any]:
    """A call of scaled_dot_product_attention on `qkv(**options)`; `mask`, `causal` ... are its own arguments."""
    own = {
        name: options.pop(name)
        for name in ("attn_mask", "is_causal", "scale", "dropout_p", "enable_gqa")
        if name in options
    }

    def call(lib: Any) -> Any:
        q, k, v = qkv(**options)
        return with_grads(lib.sdpa(q, k, v, **own), q, k, v)

    return call


def changed(
    change: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]], **own: Any
) -> Callable[[Any], Any]:
    """The same on inputs that `change` made of q, k, v; the gradients are those of the leaves."""

    def call(lib: Any) -> Any:
        leaves = qkv()
        return with_grads(lib.sdpa(*change(*leaves), **own), *leaves)

    return call


def bools(*shape: int) -> Tensor:
    """A mask that hides about a third, but never the first key."""
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(sum(shape))) > 0.35
    if shape:
        mask[..., 0] = True
    return mask


def floats(*shape: int) -> Tensor:
    return rand(*shape, seed=3).masked_fill(~bools(*shape), -INF)


def module(name: str, *arguments: Any, dtype: torch.dtype = torch.float32, **options: Any) -> Callable[[Any], Any]:
    """A module of `lib` with the same weights each time, ready to be called."""

    def make(lib: Any) -> Any:
        torch.manual_seed(0)
        return getattr(lib, name)(*arguments, **options).to(dtype)

    return make


def apply(make: Callable[[Any], Any], *inputs: Tensor, grads: bool = True, **options: Any) -> Callable[[Any], Any]:
    """A module called on `inputs`: its output, and the gradients of its parameters and of the first input."""

    def call(lib: Any) -> Any:
        net = make(lib)
        first = inputs[0].detach().clone().requires_grad_(grads and inputs[0].is_floating_point())
        out = net(first, *inputs[1:], **options)
        out = out[0] if isinstance(out, tuple) else out
        return with_grads(out, first, *(net.parameters() if grads else ()))

    return call


def layer(dtype: torch.dtype = torch.float32) -> Callable[[Any], Any]:
    return module("TransformerEncoderLayer", 8, 2, 16, dropout=0.0, batch_first=True, dtype=dtype)


def masked_row(value: float) -> Tensor:
    mask = torch.zeros(4, 5)
    mask[1] = value
    return mask


def hidden_row(value: float) -> Callable[[Any], Any]:
    """Only the row whose mask says `value` everywhere."""
    return lambda lib: lib.sdpa(*qkv(grads=""), attn_mask=masked_row(value))[:, :, 1]


def second(lib: Any, name: str) -> Any:
    x = rand(2, 1, 3, 4, grad=True)
    out = lib.sdpa(x, x, x) if name == "sdpa" else module(name, 4)(lib)(x)
    (first,) = torch.autograd.grad((out * rand(*out.shape, seed=5)).sum(), x, create_graph=True)
    return torch.autograd.grad(first.square().sum(), x)


def under(context: Callable[[], Any], call: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def inside(lib: Any) -> Any:
        with context():
            return call(lib)

    return inside


def loss(*, logits: Tensor, target: Tensor, **options: Any) -> Callable[[Any], Any]:
    def call(lib: Any) -> Any:
        x = logits.detach().clone().requires_grad_(logits.is_floating_point())
        out = lib.CrossEntropyLoss(**options)(x, target)
        return with_grads(out, x)

    return call


def rows(*values: list[float]) -> Tensor:
    return torch.tensor(values)


def forward_only(call: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda lib: call(lib)[0]


def frozen(lib: Any) -> Any:
    net = module("MultiheadAttention", 8, 2, batch_first=True)(lib)
    net.in_proj_weight.requires_grad_(False)
    x = rand(2, 3, 8)
    net(x, x, x)[0].sum().backward()
    return [p.grad for p in net.parameters() if p.grad is not None]


def misaligned(x: Tensor) -> Tensor:
    """The same values, one element behind the start of their memory."""
    return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)


def heads_last(x: Tensor) -> Tensor:
    """The same values, B, T, H, D in memory."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def spread(x: Tensor) -> Tensor:
    """The same values, every second element of their memory."""
    return torch.stack([x, x], -1).flatten(-2)[..., ::2]


MHA = module("MultiheadAttention", 8, 2, batch_first=True)
X = rand(2, 5, 8)
PADDED = torch.tensor([[False] * 5, [True] * 5])  # the second item is padding alone
MASKS = [(1, 5), (4, 5), (2, 1, 1, 5), (1, 2, 4, 5), (2, 1, 4, 5), (2, 2, 4, 5)]
LABELS = torch.tensor([1, 0, 2])

CASES: dict[str, Case] = {
    # sizes
    "no batch": Case(attend(B=0)),
    "no heads": Case(attend(H=0), "0 query heads", alone="a call without heads is a mistake"),
    "no queries": Case(attend(T_q=0)),
    "no keys": Case(forward_only(attend(T_k=0)), torch.zeros(2, 2, 4, 8)),
    "one query": Case(attend(T_q=1)),
    "one key": Case(attend(T_k=1)),
    "head size 1": Case(attend(D=1)),
    "head size 7": Case(attend(D=7)),
    "head size 40": Case(attend(D=40)),
    "without a batch": Case(lambda lib: lib.sdpa(*(x[0] for x in qkv(grads="")))),
    "without heads": Case(lambda lib: lib.sdpa(*(x[0, 0] for x in qkv(grads="")))),
    "two batch axes": Case(lambda lib: lib.sdpa(*(x[None] for x in qkv(grads="")))),
    "grouped heads": Case(lambda lib: lib.sdpa(rand(2, 4, 3, 8), rand(2, 2, 5, 8), rand(2, 2, 5, 8, seed=1), enable_gqa=True)),
    "batches that do not fit": Case(lambda lib: lib.sdpa(rand(2, 2, 3, 8), rand(3, 2, 5, 8), rand(3, 2, 5, 8)), "2.*3"),
    "widths that do not fit": Case(lambda lib: lib.sdpa(rand(2, 2, 3, 8), rand(2, 2, 5, 4), rand(2, 2, 5, 4)), "8.*4"),
    "lengths that do not fit": Case(lambda lib: lib.sdpa(rand(2, 2, 3, 8), rand(2, 2, 5, 8), rand(2, 2, 6, 8)), r"6, 8\).*5, 8\)"),
    # memory
    "expanded keys": Case(changed(lambda q, k, v: (q, k[:1].expand_as(k), v))),
    "an expanded batch of queries": Case(changed(lambda q, k, v: (q[:, :1].expand_as(q), k, v))),
    "a (B, T, H, D) layout": Case(changed(lambda q, k, v: (heads_last(q), heads_last(k), heads_last(v)))),
    "flipped keys": Case(changed(lambda q, k, v: (q, k.flip(2), v.flip(2)))),
    "memory that is not aligned": Case(changed(lambda q, k, v: (misaligned(q), misaligned(k), misaligned(v)))),
    "every second element": Case(changed(lambda q, k, v: (spread(q), spread(k), spread(v)))),
    "slices of one projection": Case(lambda lib: lib.sdpa(*rand(2, 5, 3, 2, 8).permute(2, 0, 3, 1, 4))),
    # types
    "float64": Case(attend(dtype=torch.float64)),
    "mixed dtypes": Case(lambda lib: lib.sdpa(rand(1, 1, 3, 8), rand(1, 1, 3, 8, dtype=torch.float16), rand(1, 1, 3, 8)), "float16.*float32"),
    "integers": Case(lambda lib: lib.sdpa(*(torch.ones(1, 1, 3, 8, dtype=torch.int64),) * 3), "int64"),
    "two devices": Case(lambda lib: lib.sdpa(rand(1, 1, 3, 8), rand(1, 1, 3, 8).to("meta"), rand(1, 1, 3, 8)), "meta"),
    # masks
    **{f"a boolean mask {shape}": Case(attend(attn_mask=bools(*shape))) for shape in MASKS},
    **{f"a floating mask {shape}": Case(attend(attn_mask=floats(*shape))) for shape in MASKS},
    "a mask for each query": Case(attend(attn_mask=torch.ones(4, 1, dtype=torch.bool))),
    "a mask of one axis": Case(lambda lib: lib.sdpa(*qkv(grads=""), attn_mask=bools(5))),
    "an expanded mask": Case(attend(attn_mask=bools(1, 5).expand(4, 5))),
    "a transposed mask": Case(attend(attn_mask=bools(5, 4).t() | (torch.arange(5) == 0))),
    "a row of -inf": Case(hidden_row(-INF), torch.zeros(2, 2, 8)),
    "a row of the least number": Case(hidden_row(torch.finfo(torch.float32).min), torch.zeros(2, 2, 8)),
    "a mask that hides all": Case(forward_only(attend(attn_mask=torch.zeros(4, 5, dtype=torch.bool))), torch.zeros(2, 2, 4, 8)),
    "a mask of integers": Case(attend(attn_mask=torch.ones(4, 5, dtype=torch.int64)), "int64"),
    "a mask of another length": Case(attend(attn_mask=bools(4, 6)), r"\(4, 6\)"),
    "a mask and is_causal": Case(forward_only(attend(attn_mask=bools(4, 5), is_causal=True)), _sdpa(*qkv(grads=""), attn_mask=bools(4, 5).tril())),
    "causal, more keys": Case(attend(is_causal=True)),
    "causal, more queries": Case(attend(is_causal=True, T_q=6, T_k=3)),
    "the gradient of a mask": Case(lambda lib: (lambda m: with_grads(lib.sdpa(*qkv(grads=""), attn_mask=m), m))(rand(4, 5, grad=True))),
    # numbers
    "a query of inf": Case(changed(lambda q, k, v: (q.masked_fill(torch.arange(4)[:, None] == 1, INF), k, v))),
    "a value of NaN": Case(changed(lambda q, k, v: (q, k, v.masked_fill(torch.arange(5)[:, None] == 2, NAN)))),
    "large scores": Case(changed(lambda q, k, v: (5 * q, 5 * k, v))),
    "scale 0": Case(attend(scale=0.0)),
    "scale -2": Case(attend(scale=-2.0)),
    "dropout 0": Case(attend(dropout_p=0.0)),
    "dropout 1": Case(attend(dropout_p=1.0)),
    "dropout 1.5": Case(attend(dropout_p=1.5), "1.5"),
    # gradients
    "no gradients": Case(under(torch.no_grad, lambda lib: lib.sdpa(*qkv()).requires_grad)),
    "inference mode": Case(under(torch.inference_mode, lambda lib: lib.sdpa(*qkv(grads="")).clone())),
    **{f"only the gradient of {name}": Case(attend(grads=name)) for name in "qkv"},
    "a second derivative": Case(lambda lib: second(lib, "sdpa")),
    "a second derivative of the norm": Case(lambda lib: second(lib, "LayerNorm")),
    # layer norm
    "no rows": Case(apply(module("LayerNorm", 8), rand(0, 8))),
    "one feature": Case(apply(module("LayerNorm", 1), rand(3, 1))),
    "a row of one number": Case(apply(module("LayerNorm", 8), torch.full((2, 8), 3.0))),
    "two normalised axes": Case(apply(module("LayerNorm", (3, 4)), rand(2, 3, 4))),
    "inf in a row": Case(forward_only(apply(module("LayerNorm", 4), rows([1, INF, 2, 3], [1, 2, 3, 4.5])))),
    "a wrong width": Case(apply(module("LayerNorm", 8), rand(2, 6)), "8.*6|6.*8"),
    "a norm in half precision": Case(apply(module("LayerNorm", 8, dtype=torch.bfloat16), rand(3, 8, dtype=torch.bfloat16))),
    # softmax
    "softmax of nothing": Case(apply(module("Softmax", -1), rand(0, 4))),
    "softmax with -inf": Case(apply(module("Softmax", -1), rows([-INF, 1], [0, 1]))),
    "softmax with +inf": Case(forward_only(apply(module("Softmax", -1), rows([INF, 1], [0, 1])))),
    "softmax over an axis that is not there": Case(apply(module("Softmax", 3), rand(2, 4)), "3"),
    # cross-entropy
    "no examples": Case(loss(logits=rand(0, 4), target=torch.zeros(0, dtype=torch.int64), reduction="sum")),
    "all ignored": Case(forward_only(loss(logits=rand(3, 4), target=torch.full((3,), -100)))),
    "weights and smoothing": Case(loss(logits=rand(3, 4), target=LABELS, weight=torch.rand(4), label_smoothing=0.1)),
    "NaN in an ignored row": Case(
        lambda lib: loss(logits=rows([NAN, 1], [0, 1]), target=torch.tensor([-100, 1]))(lib)[1][0], torch.zeros(2)
    ),
    "labels of another length": Case(loss(logits=rand(3, 4), target=LABELS[:2]), "3.*2|2.*3"),
    "labels that are no classes": Case(loss(logits=rand(3, 4), target=rand(3)), "Long"),
    # modules
    "attention of an empty batch": Case(apply(MHA, X[:0], X[:0], X[:0])),
    "attention of one item": Case(apply(MHA, X[0], X[0], X[0])),
    "attention to padding alone": Case(
        lambda lib: MHA(lib)(X, X, X, key_padding_mask=PADDED)[0][1].detach() - MHA(lib).out_proj.bias.detach(), torch.zeros(5, 8)
    ),
    "attention of a wrong width": Case(apply(MHA, rand(2, 5, 6), X, X), "6.*8|8.*6"),
    "attention of integers": Case(apply(MHA, torch.ones(2, 5, 8, dtype=torch.int64), X, X, grads=False), "int|Long|dtype"),
    "frozen projections": Case(frozen),
    "a layer in float64": Case(apply(layer(torch.float64), X.double())),
    "a layer in bfloat16": Case(forward_only(apply(layer(torch.bfloat16), X.bfloat16()))),
    "a layer without items": Case(apply(layer(), X[:0])),
    "a layer without positions": Case(apply(layer(), X[:, :0])),
    "a layer on memory of another batch": Case(apply(module("TransformerDecoderLayer", 8, 2, batch_first=True), X, rand(3, 5, 8)), "2.*3|batch"),
    "heads that do not divide": Case(module("MultiheadAttention", 8, 3), "8.*3"),
}  # fmt: skip


FLOAT8 = torch.float8_e4m3fn
Q, K = rand(2, 4, 10, 8), rand(2, 4, 7, 8)
HEADS_LAST = [x.transpose(1, 2) for x in (Q, K, K)]
ROWS8 = rand(3, 8)
LABELS8 = torch.tensor([1, 2, 3])


def made(kind: str, x: Tensor) -> Any:
    """x as something that is no tensor which the ops compute with."""
    return {
        "numpy": x.numpy(),
        "list": x.tolist(),
        "nested": torch.nested.nested_tensor([torch.ones(2, 8), torch.ones(3, 8)]),
        "float8": x.to(FLOAT8),
        "complex": x.to(torch.complex64),
    }[kind]


OPS: dict[str, Callable[[Any], Any]] = {
    "attention": lambda x: kernels.attention(x, K, K),
    "attention's values": lambda x: kernels.attention(Q, K, x),
    "attention's bias": lambda x: kernels.attention(Q, K, K, bias=x),
    "sdpa": lambda x: scaled_dot_product_attention(x, K, K),
    "softmax": lambda x: kernels.softmax(x),
    "softmax's mask": lambda x: kernels.softmax(ROWS8, mask=x),
    "log_softmax": lambda x: kernels.log_softmax(x),
    "layer_norm": lambda x: kernels.layer_norm(x, 8),
    "layer_norm's weight": lambda x: kernels.layer_norm(ROWS8, 8, x),
    "rms_norm": lambda x: kernels.rms_norm(x, 8),
    "cross_entropy": lambda x: kernels.cross_entropy(x, LABELS8),
    "cross_entropy's weight": lambda x: kernels.cross_entropy(ROWS8, LABELS8, weight=x),
    "dropout": lambda x: kernels.dropout(x, 0.5),
    "dropout's residual": lambda x: kernels.dropout(ROWS8, 0.5, residual=x),
}
SAID = {"numpy": "must be a torch.Tensor, got ndarray", "list": "must be a torch.Tensor, got list", "nested": "nested tensor.*: pad",
        "float8": "got float8_e4m3fn, which has no arithmetic", "complex": "complex64"}  # fmt: skip


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("kind", SAID)
def test_what_is_no_tensor_to_compute_with_is_named(kind: str) -> None:
    for backend in ("torch", "interpret", "reference"):
        with use_backend(backend):
            for name, call in OPS.items():
                with pytest.raises(TypeError, match=SAID[kind]) as caught:
                    call(made(kind, Q if name in ("attention", "sdpa") else ROWS8))
                assert "\n" not in str(caught.value), name
    for call in (
        lambda x: kernels.cross_entropy(ROWS8, x),
        lambda x: kernels.attention(Q, K, K, key_mask=x),
        lambda x: kernels.attention(Q, K, K, mask=x),
    ):
        with pytest.raises(
            (TypeError, ValueError, NotImplementedError) if kind in ("float8", "complex", "nested") else TypeError
        ):
            call(made(kind, ROWS8))


WRONG: dict[str, tuple[Callable[[], Any], str]] = {
    "torch's causal": (lambda: kernels.attention(Q, K, K, is_causal=True), "is_causal.*here it is causal="),
    "torch's mask": (lambda: kernels.attention(Q, K, K, attn_mask=None), "attn_mask.*here it is mask="),
    "flash-attn's scale": (lambda: kernels.attention(Q, K, K, softmax_scale=1.0), "softmax_scale.*here it is scale="),
    "a slip": (lambda: kernels.attention(Q, K, K, maks=None), "unexpected keyword argument 'maks'$"),
    "softmax's dim": (lambda: kernels.softmax(ROWS8, dim=-1), "dim.*last axis"),
    "log_softmax's dim": (lambda: kernels.log_softmax(ROWS8, dim=-1), "dim.*last axis"),
    "dropout's training": (lambda: kernels.dropout(ROWS8, 0.5, training=False), "training.*p=0.0"),
    "an old reduction": (lambda: kernels.cross_entropy(ROWS8, LABELS8, size_average=True), "size_average.*reduction="),
    "time before heads": (lambda: kernels.attention(*HEADS_LAST), r"10 query heads and 7 key heads.*\(B, T, H, D\).*transpose\(1, 2\)"),
    "time before heads, padded": (
        lambda: kernels.attention(HEADS_LAST[1], *HEADS_LAST[1:], key_mask=bools(2, 7)), r"\(2, 7\); if q, k and v are \(B, T, H, D\)"),
    "time before heads, masked": (
        lambda: kernels.attention(HEADS_LAST[1], *HEADS_LAST[1:], mask=bools(7, 7)), r"\(7, 7\) beside.*\(B, T, H, D\)"),
    "time before heads, a bias": (
        lambda: kernels.attention(HEADS_LAST[1], *HEADS_LAST[1:], bias=rand(2, 4, 7, 7)), r"beside.*\(B, T, H, D\)"),
    "no batch": (lambda: kernels.attention(Q[0], K, K), r"\(4, 10, 8\).*x\[None\]"),
    "no heads and no batch": (lambda: scaled_dot_product_attention(ROWS8[0], K, K), "query has 1 axes"),
    "a mask of one value": (lambda: scaled_dot_product_attention(Q, K, K, torch.tensor(True)), "attn_mask has 0 axes"),
    "a scale in words": (lambda: kernels.attention(Q, K, K, scale="0.3"), "scale must be a number, got '0.3'"),
    "no scale": (lambda: kernels.softmax(ROWS8, scale=None), "scale must be a number, got None"),
    **{f"the seed {seed!r}": (functools.partial(kernels.dropout, ROWS8, 0.5, seed=seed), said) for seed, said in (
        (True, "must be an integer"), (np.True_, "must be an integer"), (1.5, "must be an integer"), ("a", "must be an integer"),
        (np.ones(1, np.int64), "must be an integer|must be a torch.Tensor"),
        (-1, r"between 0 and 2\*\*63 - 1, got -1"), (10**30, "got 1000"), (2**63, "got 9223372036854775808"))},
    "no seed to look up": (lambda: kernels.dropout_keep(None, (3, 8), 0.5), "seed is None"),
    "a rate to look up": (lambda: kernels.dropout_keep(3, (3, 8), 1.5), "between 0 and 1"),
}  # fmt: skip


@pytest.mark.parametrize("call, said", WRONG.values(), ids=WRONG)
def test_a_mistake_is_answered_with_its_likely_cause(call: Callable[[], Any], said: str) -> None:
    with pytest.raises((TypeError, ValueError), match=said):
        call()


@pytest.mark.parametrize("where", ["torch", "interpret", "reference"])
def test_an_integer_is_a_seed(where: str) -> None:
    with use_backend(where):
        for seed in (0, 42, np.int32(7), 2**63 - 1):
            tensor = torch.tensor([int(seed)])
            keep = kernels.dropout_keep(seed, (3, 8), 0.5)
            assert torch.equal(keep, kernels.dropout_keep(tensor, (3, 8), 0.5)) and keep.any() and not keep.all()
            assert torch.equal(kernels.dropout(ROWS8, 0.5, seed=seed), ROWS8 * keep * 2)
            got, expected = (kernels.attention(*[K[:1]] * 3, dropout_p=0.5, seed=s) for s in (seed, tensor))
            assert torch.equal(got, expected)


@pytest.mark.parametrize("where", ["torch", "interpret", "reference"])
@pytest.mark.parametrize("norm", ["layer_norm", "rms_norm"])
def test_a_norms_weight_has_a_dtype_of_its_own(norm: str, where: str) -> None:
    dtypes = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    for of_x, of_weight in itertools.product(dtypes, dtypes):
        x, weight = ROWS8.to(of_x).requires_grad_(), (1 + ROWS8[0]).to(of_weight).requires_grad_()
        with use_backend(where):
            out = getattr(kernels, norm)(x, 8, weight)
        with use_backend("reference"):
            wide = getattr(kernels, norm)(x.detach().double(), 8, weight.detach().double())
        assert out.dtype == of_x
        torch.testing.assert_close(out, wide.to(of_x), rtol=2e-2 if of_x.itemsize == 2 else 1e-5, atol=1e-5)
        assert [g.dtype for g in torch.autograd.grad(out.sum(), (x, weight))] == [of_x, of_weight]


def outcome(call: Callable[[Any], Any], lib: Any) -> Any:
    """What a call gives: its value, or the error."""
    try:
        return call(lib)
    except Exception as error:
        return error


def test_there_are_sixty_cases() -> None:
    assert len(CASES) >= 60


@pytest.mark.parametrize("where", ["torch", pytest.param("interpret", marks=pytest.mark.interprets)])
@pytest.mark.parametrize("name", CASES)
def test_the_edges(name: str, where: str) -> None:
    call, expected, alone = CASES[name]
    theirs = outcome(call, TORCH)
    with use_backend(where):
        ours = outcome(call, OURS)
    if isinstance(expected, str):
        assert alone or isinstance(theirs, Exception), f"torch gives {theirs}"
        assert isinstance(ours, (ValueError, TypeError, RuntimeError, NotImplementedError, IndexError)), ours
        assert re.search(expected, str(ours), re.S), ours
        return
    if isinstance(ours, Exception):
        raise ours
    if expected is None:
        assert not isinstance(theirs, Exception), f"torch refuses: {theirs}"
        expected = theirs
    tolerance = dict(rtol=2e-2, atol=2e-2) if "bfloat16" in name or "half" in name else dict(rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(ours, expected, equal_nan=True, **tolerance)
