"""What is checked and compiled: what each op needs for it, and one list of calls, each with the reason why it is there.

A new op joins everything (`tileformer check`, the tests, the ahead-of-time compiler, the GPU tests) by one entry in OPS and its cases.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Generator, Tensor

from tileformer.bench.calls import DTYPES as DTYPES
from tileformer.bench.calls import LAYOUTS, Build, Case, Draw, Op, Options, Tensors
from tileformer.bench.check.budget import attention_sizes


def _normal(generator: Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator)


def _top(x: Tensor) -> float:
    """Largest finite absolute value."""
    return float(torch.where(x.isfinite(), x, 0.0).abs().max()) if x.numel() else 0.0


# attention


def _padding(kind: str, b: int, t_k: int) -> Tensor:
    """Boolean (B, T_k): "right", "left", "holes", "none" (the last batch has no real key), "nowhere" (has any), "all" (are real)."""
    at = torch.arange(t_k).expand(b, t_k)
    length = torch.linspace(t_k, max(1, t_k // 3), b).long()[:, None]
    return {
        "right": at < length,
        "left": at >= t_k - length,
        "holes": at % 3 != 1,
        "none": (at < length) & (torch.arange(b)[:, None] < b - 1),
        "nowhere": at < 0,
        "all": at >= 0,
    }[kind]


def attention_call(
    shape: tuple[int, int, int, int, int, int], *, mask: str | float = "", padding: str = "", bias: tuple[int, ...] = (), lengths: bool = False,
    packed: tuple[tuple[int, ...], tuple[int, ...]] | None = None, alibi: bool = False, dv: int = 0, heads_last: bool = False, lse: bool = True,
    **options: Any,
) -> Build:  # fmt: skip
    """An attention call: shape is (B, H, H_kv, T_q, T_k, D); `mask` and `padding` name a kind, other options are passed on.

    A number as `mask` is a causal mask as Hugging Face's models add it: that number where a key is hidden, here also all along two rows.
    `bias` is the shape of a differentiable one, `packed` holds the starts of sequences, dv is D_v if it is not D.
    """

    def build(generator: Generator) -> tuple[Tensors, Options]:
        b, h, h_kv, t_q, t_k, d = shape
        shapes = dict(q=(b, h, t_q, d), k=(b, h_kv, t_k, d), v=(b, h_kv, t_k, dv or d))
        tensors = {name: _normal(generator, *size) for name, size in shapes.items()}
        if heads_last:
            tensors = {name: LAYOUTS["heads last"](x) for name, x in tensors.items()}
        more: Options = dict(options)
        if lse:
            more["return_lse"] = True
        if mask == "boolean":
            more["mask"] = torch.rand(t_q, t_k, generator=generator) > 0.3
            more["mask"][t_q // 2] = False  # a row that may attend to nothing
        if mask == "additive":
            more["mask"] = _normal(generator, b, 1, t_q, t_k)
        if mask == "columns":
            more["mask"] = _normal(generator, h, 1, t_k).masked_fill(
                torch.rand(h, 1, t_k, generator=generator) < 0.2, -torch.inf
            )
        if isinstance(mask, float):
            hidden = torch.ones(t_q, t_k).triu(1) > 0
            hidden[:2] = True
            more["mask"] = torch.zeros(b, 1, t_q, t_k).masked_fill(hidden, mask)
        if bias:
            tensors["bias"] = _normal(generator, *bias)
        if padding:
            more["key_mask"] = _padding(padding, b, t_k)
        if lengths:  # all, some, none of the queries; one more key each
            more["query_lengths"] = torch.linspace(t_q, 0, b).int()
            more["key_lengths"] = torch.linspace(t_k, 1, b).int()
        if packed:
            more["cu_seqlens_q"], more["cu_seqlens_k"] = (torch.tensor(starts, dtype=torch.int32) for starts in packed)
        if alibi:
            more["alibi_slopes"] = 2.0 ** -torch.arange(1.0, h + 1)
        if "dropout_p" in options:
            more["seed"] = torch.tensor([0x1234_5678_9ABC])
        return tensors, more

    return build


def _attention_draw(
    op: Any, p: float, seed: Tensor | None, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Equal scores over n keys and v = n I make the output the dropped weights; their transpose is the gradient of v for dO = I."""
    b, h, n = 2, 2, 64
    identity = torch.eye(n, dtype=dtype, device=device).expand(b, h, n, n).contiguous()
    zeros = torch.zeros_like(identity)
    v = (n * identity).requires_grad_()
    out = op(zeros, zeros, v, dropout_p=p, seed=seed)
    (dv,) = torch.autograd.grad(out, v, identity)
    return out.detach(), n * dv.transpose(-1, -2)


def _attention_sizes(tensors: Tensors, options: Options, truth: Tensors) -> dict[str, Tensor | float]:
    return attention_sizes(**tensors, out=truth["out"], dout=truth["given out"], dlse=truth.get("given lse"), **options)


# ops on rows


def row_call(*shape: int, params: tuple[str, ...] = (), mask: str = "", name: str = "x", **options: Any) -> Build:
    """A call on rows of `shape`; `params` are further differentiable tensors of one row ("residual": of `shape`)."""

    def build(generator: Generator) -> tuple[Tensors, Options]:
        tensors = {name: 2 * _normal(generator, *shape)}
        for param in params:
            tensors[param] = _normal(generator, *((shape[-1],) if param != "residual" else shape))
        more: Options = dict(options)
        if mask == "boolean":
            more["mask"] = torch.rand(shape[-2:], generator=generator) > 0.3
            more["mask"][0] = False
        if mask == "additive":
            more["mask"] = _normal(generator, *shape[-2:])
        if "p" in options:
            more["seed"] = torch.tensor([77])
        return tensors, more

    return build


def _norm_sizes(tensors: Tensors, options: Options, truth: Tensors, centre: bool) -> Tensors:
    axes = tuple(range(-len(options["normalized_shape"]), 0))
    x, given = tensors["x"], truth["given out"].abs()
    mean = x.mean(axes, keepdim=True) if centre else x.new_zeros(())
    rstd = ((x - mean).square().mean(axes, keepdim=True) + options.get("eps", 1e-5)).rsqrt()
    xhat = (x.abs() + mean.abs()) * rstd
    weight, rows = tensors.get("weight", x.new_ones(())).abs(), tuple(range(x.dim() + axes[0]))
    g = given * weight
    return dict(
        out=xhat * weight + tensors.get("bias", x.new_zeros(())).abs(),
        dx=rstd * (g + centre * g.mean(axes, keepdim=True) + xhat * (g * xhat).mean(axes, keepdim=True)),
        dweight=(given * xhat).sum(rows),
        dbias=given.sum(rows),
    )


def _softmax_sizes(tensors: Tensors, options: Options, truth: Tensors) -> Tensors:
    y, given = truth["out"], truth["given out"].abs()
    return dict(dx=abs(options.get("scale", 1.0)) * y * (given + (y * given).sum(-1, keepdim=True)))


def _log_softmax_sizes(tensors: Tensors, options: Options, truth: Tensors) -> Tensors:
    y, given = truth["out"], truth["given out"].abs()
    scale = abs(options.get("scale", 1.0))
    top = _top((scale * tensors["x"]).nan_to_num(0.0, 0.0, 0.0))
    # The output is a score minus a sum of about its size; the gradient reads the output, as rounded.
    spread = given + y.exp() * given.sum(-1, keepdim=True) * (1 + top)
    return dict(out=2 * top + y.abs().nan_to_num(0.0, 0.0, 0.0), dx=scale * spread)


def class_call(rows: int, classes: int, *, weighted: bool = False, ignored: int = 0, **options: Any) -> Build:
    """A cross-entropy call; the first `ignored` rows are."""

    def build(generator: Generator) -> tuple[Tensors, Options]:
        target = torch.randint(classes, (rows,), generator=generator)
        target[:ignored] = -100
        more: Options = dict(options, target=target)
        if weighted:
            more["weight"] = torch.rand(classes, generator=generator) + 0.1
        return dict(logits=3 * _normal(generator, rows, classes)), more

    return build


def _dropout_draw(
    op: Any, p: float, seed: Tensor | None, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """A tensor of ones shows its own factors; so does its gradient."""
    x = torch.ones(256, 128, dtype=dtype, device=device).requires_grad_()
    out = op(x, p, seed=seed)
    (dx,) = torch.autograd.grad(out, x, torch.ones_like(out))
    return out.detach(), dx


OPS = {
    "attention": Op(_attention_sizes, _attention_draw),
    "layer_norm": Op(functools.partial(_norm_sizes, centre=True)),
    "rms_norm": Op(functools.partial(_norm_sizes, centre=False)),
    "softmax": Op(_softmax_sizes),
    "log_softmax": Op(_log_softmax_sizes),
    "cross_entropy": Op(lambda tensors, options, truth: dict(out=_top(truth["out"]) + _top(tensors["logits"]))),
    "dropout": Op(draw=_dropout_draw),
}

NAN, INF = math.nan, math.inf
BF, HALF, TWO = ("bf16",), ("bf16", "fp16"), ("bf16", "fp32")


def _table(op: str, call: Callable[..., Build]) -> Callable[..., Case]:
    """Case's own fields, and beside them what `call` takes."""
    fields = {field.name for field in dataclasses.fields(Case)}

    def case(name: str, reason: str, *shape: Any, **more: Any) -> Case:
        own = {key: more.pop(key) for key in fields & more.keys()}
        return Case(op, name, reason, call(*shape, **more), **own)

    return case


def _poison_padding(tensors: Tensors, options: Options) -> None:
    padded = ~options["key_mask"][:, None, :, None]
    tensors["k"].masked_fill_(padded, NAN)
    tensors["v"].masked_fill_(padded, INF)


def _poison_past_lengths(tensors: Tensors, options: Options) -> None:
    for name, lengths, number in (("q", "query_lengths", INF), ("k", "key_lengths", NAN), ("v", "key_lengths", NAN)):
        x = tensors[name]
        x.masked_fill_(torch.arange(x.shape[2])[:, None] >= options[lengths][:, None, None, None], number)


_attention = _table("attention", attention_call)
_layer_norm = _table(
    "layer_norm", lambda *shape, axes=1, **more: row_call(*shape, normalized_shape=shape[-axes:], **more)
)
_rms_norm = _table("rms_norm", lambda *shape, **more: row_call(*shape, normalized_shape=shape[-1:], eps=1e-6, **more))
_softmax = _table("softmax", row_call)
_log_softmax = _table("log_softmax", row_call)
_cross_entropy = _table("cross_entropy", class_call)
_dropout = _table("dropout", row_call)
AFFINE = ("weight", "bias")
# fmt: off
CASES = [
    _attention("plain", "whole tiles, no restriction", (1, 2, 2, 64, 64, 64), lse=False),
    _attention("causal", "ragged tiles; B, T, H, D views", (1, 2, 2, 70, 70, 64), causal=True, heads_last=True, quick=True),
    _attention("cross padded", "T_q < T_k, a batch without a key", (3, 2, 2, 40, 70, 64), padding="none"),
    _attention("causal padded left", "keys start late", (2, 2, 2, 70, 70, 64), causal=True, padding="left", dtypes=BF),
    _attention("holes", "padding inside the range", (2, 1, 1, 33, 97, 64), padding="holes", dtypes=BF),
    _attention("bottom right", "cached prefix: T_q < T_k", (1, 2, 1, 33, 100, 64), causal="bottom_right", dtypes=BF),
    _attention("no keys in sight", "T_q > T_k, bottom right: rows without a key", (1, 2, 2, 90, 40, 64), causal="bottom_right", dtypes=BF),
    _attention("boolean mask", "broadcast over B and H, an empty row", (2, 2, 2, 50, 70, 64), mask="boolean", dtypes=HALF),
    _attention("additive mask", "broadcast over H", (2, 2, 2, 50, 70, 64), mask="additive", dtypes=TWO),
    _attention("column bias", "broadcast over B and T_q, with -inf", (2, 2, 2, 50, 70, 64), mask="columns", causal=True, dtypes=BF),
    _attention("dropout", "ragged tiles", (1, 2, 2, 50, 70, 64), dropout_p=0.3, dtypes=HALF),
    _attention("everything", "all masks, dropout, shared key heads", (2, 2, 1, 40, 75, 64), mask="additive", padding="right",
               causal="bottom_right", dropout_p=0.1, heads_last=True, quick=True),
    _attention("one query", "a decoding step, many key tiles", (2, 2, 1, 1, 200, 64), padding="right", dtypes=BF),
    _attention("one of each", "the smallest call: exact cancellation in dq", (1, 1, 1, 1, 1, 1), dtypes=("fp32", "bf16")),
    _attention("head size 40", "not a power of two", (1, 2, 1, 40, 50, 40), causal=True, scale=0.3, dtypes=TWO),
    _attention("head size 128", "the other common size", (1, 1, 1, 40, 70, 128), causal=True, dtypes=BF),
    _attention("long", "keys enough for Hopper's forward to work one tile ahead", (1, 2, 1, 130, 1100, 128), causal="bottom_right", dtypes=BF),
    _attention("head size 256", "the largest", (1, 1, 1, 33, 40, 256), causal=True, dtypes=TWO),
    # lengths
    _attention("one key", "a softmax over one score: dq and dk are exactly 0", (2, 2, 2, 40, 1, 64), dtypes=TWO),
    _attention("one more than a tile", "129 = 128 + 1: a tail of one row and one key", (1, 1, 1, 129, 129, 64), causal=True, dtypes=TWO),
    _attention("fifteen", "shorter than the shortest tile of a dot", (1, 2, 2, 15, 17, 64), dtypes=BF),
    _attention("six heads share two", "each key head serves its own three", (2, 6, 2, 33, 40, 64), padding="right", dtypes=BF),
    _attention("no key", "T_k = 0: out is 0, lse -inf", (2, 2, 2, 5, 0, 64), dtypes=BF, suite=False),
    _attention("no query", "T_q = 0: dk and dv are 0, though no query tile runs", (2, 2, 2, 0, 5, 64), dtypes=BF, suite=False),
    _attention("no batch", "nothing to launch", (0, 2, 2, 5, 5, 64), dtypes=BF, suite=False),
    _attention("66000 heads", "more programs than a grid's second axis takes", (33000, 2, 1, 3, 3, 16), dtypes=BF, suite=False, interpret=False),
    # rows without a key, and keys that are not there
    _attention("all padding", "no batch has a key", (2, 2, 2, 20, 40, 64), padding="nowhere", dtypes=BF),
    _attention("padding of nothing", "a key mask that hides no key", (2, 2, 2, 40, 64, 64), padding="all", causal=True, dtypes=BF),
    _attention("poisoned padding", "NaN keys and infinite values where padded", (3, 2, 1, 40, 70, 64), padding="none", edit=_poison_padding),
    _attention("poisoned holes", "the same between real keys, under a causal mask", (2, 2, 2, 70, 70, 64), padding="holes", causal=True,
               edit=_poison_padding, dtypes=BF),
    _attention("rows of -inf", "an additive mask that leaves rows without a key", (2, 2, 2, 20, 70, 64), mask=-INF, dtypes=TWO),
    _attention("lowest mask", "about finfo.min where hidden: in base 2 it is -inf", (2, 2, 2, 20, 70, 64), mask=-3.38e38, dtypes=TWO),
    _attention("lowest fp16 mask", "half precision's lowest number: a row full of it is a uniform average", (1, 2, 2, 40, 40, 64), mask=-65504.0,
        dtypes=HALF, suite=False),
    _attention("NaN in a query", "its row is NaN, other heads are not", (1, 2, 2, 20, 40, 64), edit=lambda t, o: t["q"][0, 1, 7].fill_(NAN),
        dtypes=TWO),
    # where a query may look
    _attention("window", "before and after the diagonal", (1, 2, 2, 90, 90, 64), window=(20, 5), dtypes=TWO, suite=False),
    _attention("window of the past", "the first tile of a row may be empty", (1, 2, 1, 70, 100, 64), window=(8, None), causal=True,
        align="bottom_right", dtypes=BF, suite=False),
    _attention("window beyond the keys", "T_q > T_k: late rows see nothing", (1, 2, 1, 90, 30, 64), window=(8, 0), dtypes=BF, suite=False),
    _attention("poison past lengths", "NaN and inf there; a batch without a query", (3, 2, 1, 40, 70, 64), lengths=True, causal="bottom_right",
               edit=_poison_past_lengths, dtypes=TWO, suite=False),
    _attention("packed", "sequences of many, no and one query; rows of none at the end", (1, 2, 1, 60, 80, 64), dtypes=TWO, suite=False,
               packed=((0, 33, 33, 34, 55), (0, 40, 50, 50, 75)), causal="bottom_right", dropout_p=0.1),
    # what is added to a score
    _attention("bias", "its gradient is a sum over the batch", (2, 2, 2, 50, 70, 64), bias=(2, 50, 70), causal=True, suite=False),
    _attention("bias of columns", "its gradient is a sum over heads and queries", (2, 2, 1, 20, 40, 64), bias=(2, 1, 1, 40), mask="boolean",
        dropout_p=0.1,
               dtypes=TWO, suite=False),
    _attention("linear bias", "ALiBi, beside a window", (1, 2, 2, 50, 70, 64), alibi=True, causal="bottom_right", window=(30, None), dtypes=TWO,
        suite=False),
    _attention("soft cap", "scores far beyond it", (1, 2, 2, 50, 70, 64), softcap=5.0, causal=True, edit=lambda t, o: t["q"].mul_(20), dtypes=TWO,
        suite=False),
    _attention("narrow values", "D_v is not D", (1, 2, 1, 50, 70, 64), dv=24, causal=True, dtypes=TWO, suite=False),
    # numbers
    _attention("extreme scores", "scores of hundreds: one key takes all", (1, 2, 2, 50, 70, 64), edit=lambda t, o: t["q"].mul_(100),
        dtypes=("bf16", "fp16", "fp32")),
    _attention("large scale", "a thousand times the usual", (1, 2, 2, 50, 70, 64), scale=125.0, dtypes=HALF),
    _attention("negative scale", "the running maximum is of the scaled scores", (1, 2, 2, 50, 70, 64), scale=-0.3, causal=True, dtypes=TWO),
    _attention("zero scale", "a plain average; no gradient for q and k", (1, 2, 2, 50, 70, 64), scale=0.0, dtypes=BF),
    _attention("large values", "near the largest half-precision number", (1, 2, 2, 50, 70, 64), edit=lambda t, o: t["v"].mul_(5000), dtypes=HALF),
    _attention("p = 0", "a rate of 0 with a seed drops nothing", (1, 2, 2, 50, 70, 64), dropout_p=0.0, dtypes=BF, suite=False),
    _attention("p = 0.99", "nearly all dropped, the rest times 100", (1, 2, 2, 50, 70, 64), dropout_p=0.99, dtypes=BF),
    _attention("p = 1", "everything dropped: 0, not NaN", (1, 2, 2, 50, 70, 64), dropout_p=1.0, dtypes=BF),
    _attention("float32 mask", "beside 16-bit queries", (2, 2, 2, 50, 70, 64), mask="additive", fp32=("mask",), dtypes=HALF, suite=False),
    # memory
    _attention("misaligned", "no 16-byte alignment", (1, 2, 2, 50, 70, 64), layouts=dict.fromkeys("qkv", "offset"), dtypes=BF, suite=False),
    _attention("odd strides", "rows 67 elements apart", (1, 2, 2, 50, 70, 64), layouts=dict.fromkeys("qkv", "padded"), dtypes=TWO, suite=False),
    _attention("columns first", "the last axis is not contiguous: copied once", (1, 2, 2, 50, 70, 64),
        layouts=dict.fromkeys([*"qkv", "out"], "transposed"),
               dtypes=BF, suite=False),
    _attention("keys for all", "stride 0 over the batch", (3, 2, 2, 50, 70, 64), layouts=dict(k="expanded", v="expanded"), dtypes=BF),
    _attention("gradient of a sum", "stride 0 everywhere", (1, 2, 2, 50, 70, 64), layouts=dict(out="scalar"), lse=False, dtypes=TWO, suite=False),
    _attention("transposed mask", "its last axis is not contiguous", (2, 2, 2, 50, 70, 64), mask="boolean", layouts=dict(mask="transposed"),
               dtypes=BF, suite=False),
    _attention("one mask for all", "a mask expanded to every head and batch by the caller", (3, 2, 2, 50, 70, 64), mask="additive",
               layouts=dict(mask="expanded"), dtypes=BF),
    _attention("far batches", "offsets beyond 2^31 elements", (3, 2, 1, 20, 40, 64), layouts=dict.fromkeys([*"qkv", "out"], "far"),
               dtypes=BF, suite=False),
    _attention("far rows", "neighbouring rows 2^26 elements apart", (1, 1, 1, 30, 30, 64), layouts=dict.fromkeys([*"qkv", "out"], "far rows"),
               dtypes=BF, suite=False),
    _attention("far mask", "a mask whose batches lie beyond 2^31 elements", (3, 2, 2, 30, 40, 64), mask="additive", layouts=dict(mask="far"),
               dtypes=BF, suite=False),
    _attention("far mask rows", "a mask with neighbouring rows 2^26 elements apart", (1, 2, 2, 30, 40, 64), mask="boolean",
        layouts=dict(mask="far"),
               dtypes=BF, suite=False),

    _layer_norm("model width", "a power of two", 37, 128, params=AFFINE, quick=True),
    _layer_norm("ragged", "not a multiple of 8; weight only", 3, 5, 99, params=("weight",)),
    _layer_norm("two axes", "no weight", 6, 4, 24, axes=2, dtypes=("fp32", "bf16")),
    _layer_norm("wide", "many elements a thread", 5, 4096, params=AFFINE, dtypes=BF),
    _layer_norm("very wide", "the backward takes its sums from a kernel of their own", 2, 9001, params=AFFINE, dtypes=TWO, suite=False),
    _layer_norm("widest", "the forward merges statistics of tiles", 2, 20000, params=AFFINE, dtypes=TWO, suite=False),
    _layer_norm("one column", "no variance: y is the bias", 20, 1, params=AFFINE, dtypes=TWO, suite=False),
    _layer_norm("one row", "a tile of rows that are not there", 1, 128, params=AFFINE, dtypes=BF),
    _layer_norm("no row", "dweight and dbias are 0, though nothing runs", 0, 128, params=AFFINE, dtypes=BF),
    _layer_norm("66000 rows", "more rows than 16 bits count", 66000, 8, params=AFFINE, dtypes=BF, suite=False, interpret=False),
    _layer_norm("constant rows", "no variance: eps alone", 37, 128, params=AFFINE, edit=lambda t, o: t["x"][::3].fill_(3.0), dtypes=TWO),
    _layer_norm("far from zero", "mean(x^2) - mean(x)^2 would cancel", 37, 128, params=AFFINE, edit=lambda t, o: t["x"].add_(1000),
                dtypes=("fp32",), suite=False),
    _layer_norm("large", "squares beyond half precision", 37, 128, params=AFFINE, edit=lambda t, o: t["x"].mul_(5000)),
    _layer_norm("tiny", "variance far below eps", 37, 128, params=AFFINE, edit=lambda t, o: t["x"].mul_(1e-4), dtypes=TWO),
    _layer_norm("a NaN and an inf", "they stay in their rows", 37, 128,
                edit=lambda t, o: (t["x"][5, 9].fill_(NAN), t["x"][20, 0].fill_(INF)), dtypes=TWO, suite=False),
    _layer_norm("zero weight", "no gradient for x", 37, 128, params=AFFINE, edit=lambda t, o: t["weight"].zero_(), dtypes=BF),
    _layer_norm("float32 weight", "beside 16-bit rows", 37, 128, params=AFFINE, fp32=AFFINE, dtypes=HALF, suite=False),
    _layer_norm("misaligned", "no 16-byte alignment", 37, 128, params=AFFINE, dtypes=TWO, suite=False,
                layouts=dict.fromkeys(["x", *AFFINE, "out"], "offset")),
    _layer_norm("odd strides", "a slice of wider rows", 37, 128, params=("weight",), dtypes=BF, suite=False,
                layouts=dict(x="padded", out="padded", weight="strided")),
    _layer_norm("columns first", "the last axis is not contiguous: copied once", 37, 128, params=("weight",), dtypes=BF,
                layouts=dict(x="transposed", out="transposed"), suite=False),
    _layer_norm("gradient of a sum", "stride 0, for a row that repeats", 37, 128, params=AFFINE, dtypes=TWO, suite=False,
                layouts=dict(x="expanded", out="scalar")),
    _layer_norm("far rows", "offsets beyond 2^31 elements", 20, 128, params=AFFINE, dtypes=BF, suite=False,
                layouts=dict(x="far", out="far")),

    _rms_norm("model width", "a power of two", 37, 128, params=("weight",), dtypes=TWO),
    _rms_norm("ragged", "not a multiple of 8; no weight", 3, 5, 99, dtypes=TWO, suite=False),
    _rms_norm("very wide", "the backward takes its sum from a kernel of its own", 2, 9001, params=("weight",), dtypes=TWO, suite=False),
    _rms_norm("widest", "the forward reads its rows twice", 2, 20000, params=("weight",), dtypes=TWO, suite=False),
    _rms_norm("one column", "the sign alone", 20, 1, params=("weight",), dtypes=TWO, suite=False),
    _rms_norm("no row", "dweight is 0, though nothing runs", 0, 128, params=("weight",), dtypes=BF, suite=False),
    _rms_norm("far from zero", "the mean stays", 37, 128, params=("weight",), edit=lambda t, o: t["x"].add_(1000), dtypes=TWO, suite=False),
    _rms_norm("large", "squares beyond half precision", 37, 128, params=("weight",), edit=lambda t, o: t["x"].mul_(5000), suite=False),
    _rms_norm("float32 weight", "beside 16-bit rows", 37, 128, params=("weight",), fp32=("weight",), dtypes=HALF, suite=False),
    _rms_norm("odd strides", "a slice of wider rows", 37, 128, params=("weight",), dtypes=BF, suite=False,
        layouts=dict(x="padded", out="padded")),
    _softmax("plain", "a power of two", 30, 64, quick=True),
    _softmax("causal ragged", "T_q != T_k", 2, 3, 20, 37, causal=True, scale=0.2),
    _softmax("boolean mask", "an empty row", 2, 3, 20, 37, mask="boolean", dtypes=("fp32", "bf16")),
    _softmax("additive mask", "broadcast over the first axes", 2, 3, 20, 37, mask="additive", dtypes=("fp32", "bf16")),
    _softmax("wide", "a vocabulary", 3, 5000, dtypes=("fp32", "bf16"), suite=False),
    _softmax("very wide", "the backward reads its rows twice", 2, 17001, dtypes=TWO, suite=False),
    _softmax("widest", "the forward keeps a running maximum", 2, 33000, edit=lambda t, o: t["x"][:, -1].add_(30), dtypes=TWO, suite=False),
    _softmax("one column", "all ones, no gradient", 30, 1, dtypes=BF, suite=False),
    _softmax("one row", "a vector without a batch", 64, dtypes=BF),
    _softmax("no row", "nothing to launch", 0, 64, dtypes=BF),
    _softmax("no column", "rows of nothing", 3, 0, dtypes=BF),
    _softmax("66000 rows", "more rows than 16 bits count", 66000, 8, dtypes=BF, suite=False, interpret=False),
    _softmax("rows without a key", "T_q > T_k, bottom right", 2, 20, 9, causal="bottom_right", dtypes=BF, suite=False),
    _softmax("extreme", "differences of thousands", 30, 64, edit=lambda t, o: t["x"].mul_(1000)),
    _softmax("large scale", "the maximum is of the scaled scores", 30, 64, scale=200.0, dtypes=TWO),
    _softmax("negative scale", "the smallest element wins", 30, 64, scale=-2.0, dtypes=TWO),
    _softmax("lowest mask", "about finfo.min: a row full of it is uniform", 2, 20, 37, mask="additive",
             edit=lambda t, o: (o["mask"][3].fill_(-3.38e38), o["mask"][5, :30].fill_(-3.38e38)), dtypes=TWO, suite=False),
    _softmax("row of -inf", "in x itself: 0, not NaN", 30, 64, edit=lambda t, o: t["x"][4].fill_(-INF), dtypes=TWO,
        not_torch="NaN there, as in torch"),
    _softmax("NaN behind a mask", "a hidden element is not read", 20, 37, mask="boolean", edit=lambda t, o: t["x"].masked_fill_(~o["mask"], NAN),
        dtypes=TWO,
             suite=False),
    _softmax("misaligned", "no 16-byte alignment", 30, 64, layouts=dict(x="offset", out="offset"), dtypes=TWO, suite=False),
    _softmax("odd strides", "a slice of wider rows", 30, 64, layouts=dict(x="padded", out="padded"), dtypes=BF, suite=False),
    _softmax("columns first", "the last axis is not contiguous: copied once", 30, 64, layouts=dict(x="transposed", out="transposed"), dtypes=BF,
        suite=False),
    _softmax("gradient of a sum", "no gradient at all", 30, 64, layouts=dict(x="expanded", out="scalar"), dtypes=BF, suite=False),
    _softmax("transposed mask", "its last axis is not contiguous", 2, 3, 20, 37, mask="additive", layouts=dict(mask="transposed"), dtypes=BF,
        suite=False),
    _softmax("far rows", "offsets beyond 2^31 elements", 20, 64, layouts=dict(x="far", out="far"), dtypes=BF, suite=False),
    _log_softmax("plain", "a power of two", 30, 64, dtypes=TWO),
    _log_softmax("causal ragged", "T_q != T_k", 2, 3, 20, 37, causal=True, scale=0.2, suite=False),
    _log_softmax("boolean mask", "an empty row: -inf, no gradient", 2, 3, 20, 37, mask="boolean", dtypes=TWO, suite=False),
    _log_softmax("additive mask", "broadcast over the first axes", 2, 3, 20, 37, mask="additive", dtypes=TWO, suite=False),
    _log_softmax("very wide", "the backward reads its rows twice", 2, 17001, dtypes=TWO, suite=False),
    _log_softmax("widest", "the forward keeps a running maximum", 2, 33000, edit=lambda t, o: t["x"][:, -1].add_(30), dtypes=TWO, suite=False),
    _log_softmax("one column", "all zeros, no gradient", 30, 1, dtypes=BF, suite=False),
    _log_softmax("no column", "rows of nothing", 3, 0, dtypes=BF, suite=False),
    _log_softmax("extreme", "far below what a softmax can hold", 30, 64, dtypes=TWO, edit=lambda t, o: t["x"].mul_(1000)),
    _log_softmax("row of -inf", "in x itself: -inf, not NaN", 30, 64, edit=lambda t, o: t["x"][4].fill_(-INF), dtypes=TWO,
        suite=False, not_torch="it hands the gradient of -inf on, as torch does"),
    _log_softmax("odd strides", "a slice of wider rows", 30, 64, layouts=dict(x="padded", out="padded"), dtypes=BF, suite=False),

    _cross_entropy("mean", "ragged, ignored rows", 33, 41, ignored=5, quick=True),
    _cross_entropy("all options", "smoothing, class weights", 33, 41, ignored=5, weighted=True, label_smoothing=0.1),
    _cross_entropy("none", "one loss a row", 20, 128, reduction="none", label_smoothing=0.2, dtypes=("fp32", "bf16")),
    _cross_entropy("sum, wide", "several blocks of classes", 4, 33000, reduction="sum", dtypes=("fp32", "bf16")),
    _cross_entropy("ragged and wide", "a vocabulary that no power of two divides", 3, 8195, ignored=1, weighted=True, label_smoothing=0.1,
        dtypes=TWO, suite=False),
    _cross_entropy("ignored NaN", "what an ignored row holds reaches nothing", 33, 41, ignored=5, edit=lambda t, o: t["logits"][:5].fill_(NAN)),
    _cross_entropy("ignored NaN, smoothed", "the same where all classes count", 33, 41, ignored=5, weighted=True, label_smoothing=0.1,
                   edit=lambda t, o: t["logits"][:5].fill_(NAN), dtypes=("fp32", "bf16")),
    _cross_entropy("all ignored, mean", "0 / 0, as in torch", 33, 41, ignored=33, dtypes=TWO),
    _cross_entropy("all ignored, sum", "no loss, no gradient", 33, 41, ignored=33, reduction="sum", dtypes=TWO),
    _cross_entropy("no row", "nothing to launch", 0, 41, reduction="sum", dtypes=BF),
    _cross_entropy("one row", "a tile of rows that are not there", 1, 41, dtypes=BF),
    _cross_entropy("one class", "no loss, no gradient", 33, 1, dtypes=BF, suite=False),
    _cross_entropy("66000 rows", "more rows than 16 bits count", 66000, 8, reduction="none", ignored=5, dtypes=BF, suite=False,
        interpret=False),
    _cross_entropy("all smoothing", "the target itself does not count", 33, 41, label_smoothing=1.0, dtypes=TWO, suite=False),
    _cross_entropy("extreme", "the largest logit is thousands above", 33, 41, edit=lambda t, o: t["logits"].mul_(1000)),
    _cross_entropy("excluded classes", "-inf logits that are no target", 33, 41, reduction="sum", dtypes=TWO,
                   edit=lambda t, o: t["logits"].scatter_(1, (o["target"] + 1)[:, None] % 41, -INF)),
    _cross_entropy("zero weights", "classes that do not count", 33, 41, weighted=True, edit=lambda t, o: o["weight"][::2].zero_(), dtypes=TWO,
        suite=False),
    _cross_entropy("float32 weight", "beside 16-bit logits", 33, 41, weighted=True, fp32=("weight",), dtypes=HALF, suite=False),
    _cross_entropy("a NaN and an inf", "they stay in their rows", 33, 41, reduction="none",
                   edit=lambda t, o: (t["logits"][7, 3].fill_(NAN), t["logits"][20, 5].fill_(INF)), dtypes=TWO, suite=False),
    _cross_entropy("misaligned", "no 16-byte alignment", 33, 41, reduction="none", layouts=dict(logits="offset", target="offset", out="offset"),
        dtypes=TWO, suite=False),
    _cross_entropy("padded vocabulary", "a slice of wider rows", 33, 128, weighted=True,
        layouts=dict(logits="padded", target="strided", weight="strided"),
                   dtypes=BF, suite=False),
    _cross_entropy("columns first", "the last axis is not contiguous: copied once", 33, 41, layouts=dict(logits="transposed"), dtypes=BF,
        suite=False),
    _cross_entropy("gradient of a sum", "stride 0", 33, 41, reduction="none", layouts=dict(logits="expanded", out="scalar"), dtypes=BF,
        suite=False),
    _cross_entropy("far rows", "offsets beyond 2^31 elements", 20, 41, layouts=dict(logits="far"), dtypes=BF, suite=False),

    _dropout("residual", "ragged rows", 3, 7, 99, params=("residual",), p=0.3, quick=True),
    _dropout("alone", "a power of two", 20, 128, p=0.1, dtypes=BF),
    _dropout("p = 0", "nothing dropped", 20, 128, params=("residual",), p=0.0, dtypes=BF),
    _dropout("p = 0.99", "nearly all dropped, the rest times 100", 20, 128, p=0.99, dtypes=TWO),
    _dropout("p = 1", "everything dropped: the residual alone", 20, 128, params=("residual",), p=1.0, dtypes=BF, suite=False),
    _dropout("one column", "fewer than one draw makes", 20, 1, p=0.3, dtypes=BF, suite=False),
    _dropout("three tiles", "columns beyond one program's", 3, 5001, params=("residual",), p=0.3, dtypes=TWO, suite=False),
    _dropout("no row", "nothing to launch", 0, 128, p=0.1, dtypes=BF),
    _dropout("66000 rows", "more rows than 16 bits count", 66000, 8, p=0.1, dtypes=BF, suite=False, interpret=False),
    _dropout("a NaN and an inf", "they stay where they are", 20, 128, p=0.1, edit=lambda t, o: (t["x"][5, 9].fill_(NAN), t["x"][6, 0].fill_(INF)),
        dtypes=TWO),
    _dropout("float32 residual", "beside 16-bit rows", 20, 128, params=("residual",), p=0.1, fp32=("residual",), dtypes=HALF, suite=False),
    _dropout("misaligned", "no 16-byte alignment", 20, 128, params=("residual",), p=0.1, layouts=dict(x="offset", residual="offset", out="offset"),
             dtypes=TWO, suite=False),
    _dropout("odd strides", "a slice of wider rows", 20, 128, params=("residual",), p=0.1,
        layouts=dict(x="padded", residual="transposed", out="padded"),
             dtypes=BF, suite=False),
    _dropout("gradient of a sum", "stride 0", 20, 128, p=0.1, layouts=dict(x="expanded", out="scalar"), dtypes=BF, suite=False),
    _dropout("far rows", "offsets beyond 2^31 elements", 20, 128, p=0.1, layouts=dict(x="far", out="far"), dtypes=BF, suite=False),
]
# fmt: on

DRAWS = [
    Draw(op, f"draws at {p}", why, p)
    for op in OPS
    if OPS[op].draw
    for p, why in ((0.1, "the usual rate"), (0.9, "few are kept"))
]
