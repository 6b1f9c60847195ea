"""What is checked and compiled: one list of calls, each with the reason why it is there. A new op joins by adding cases here."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Generator, Tensor

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
Build = Callable[[Generator], tuple[dict[str, Tensor], dict[str, Any]]]


@dataclasses.dataclass(frozen=True)
class Case:
    """One call of an op: `build` draws its differentiable tensors (float32, to be rounded to the dtype under test) and its other arguments."""

    op: str
    name: str
    reason: str
    build: Build
    quick: bool = False
    dtypes: tuple[str, ...] = ("fp32", "fp16", "bf16")

    def inputs(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The same numbers in every process."""
        return self.build(Generator().manual_seed(zlib.crc32(f"{self.op} {self.name}".encode())))


def _normal(generator: Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator)


def _padding(kind: str, b: int, t_k: int) -> Tensor:
    """Boolean (B, T_k): "right", "left", "holes", or "none": the last batch has no real key at all."""
    at = torch.arange(t_k).expand(b, t_k)
    length = torch.linspace(t_k, max(1, t_k // 3), b).long()[:, None]
    if kind == "right":
        return at < length
    if kind == "left":
        return at >= t_k - length
    if kind == "holes":
        return at % 3 != 1
    return (at < length) & (torch.arange(b)[:, None] < b - 1)


def attention_call(
    shape: tuple[int, int, int, int, int, int], *, mask: str = "", padding: str = "", heads_last: bool = False, lse: bool = True,
    **options: Any,
) -> Build:  # fmt: skip
    """An attention call: shape is (B, H, H_kv, T_q, T_k, D); `mask` and `padding` name a kind, other options are passed on."""

    def build(generator: Generator) -> tuple[dict[str, Tensor], dict[str, Any]]:
        b, h, h_kv, t_q, t_k, d = shape
        tensors = dict(
            q=_normal(generator, b, h, t_q, d),
            k=_normal(generator, b, h_kv, t_k, d),
            v=_normal(generator, b, h_kv, t_k, d),
        )
        if heads_last:
            tensors = {name: x.transpose(1, 2).contiguous().transpose(1, 2) for name, x in tensors.items()}
        more: dict[str, Any] = dict(options)
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
        if padding:
            more["key_mask"] = _padding(padding, b, t_k)
        if "dropout_p" in options:
            more["seed"] = torch.tensor([0x1234_5678_9ABC])
        return tensors, more

    return build


def row_call(*shape: int, params: tuple[str, ...] = (), mask: str = "", name: str = "x", **options: Any) -> Build:
    """A call on rows of `shape`; `params` are further differentiable tensors of one row ("residual": of `shape`)."""

    def build(generator: Generator) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors = {name: 2 * _normal(generator, *shape)}
        for param in params:
            tensors[param] = _normal(generator, *((shape[-1],) if param != "residual" else shape))
        more: dict[str, Any] = dict(options)
        if mask == "boolean":
            more["mask"] = torch.rand(shape[-2:], generator=generator) > 0.3
            more["mask"][0] = False
        if mask == "additive":
            more["mask"] = _normal(generator, *shape[-2:])
        if "p" in options:
            more["seed"] = torch.tensor([77])
        return tensors, more

    return build


def class_call(rows: int, classes: int, *, weighted: bool = False, ignored: int = 0, **options: Any) -> Build:
    """A cross-entropy call; the first `ignored` rows are."""

    def build(generator: Generator) -> tuple[dict[str, Tensor], dict[str, Any]]:
        target = torch.randint(classes, (rows,), generator=generator)
        target[:ignored] = -100
        more: dict[str, Any] = dict(options, target=target)
        if weighted:
            more["weight"] = torch.rand(classes, generator=generator) + 0.1
        return dict(logits=3 * _normal(generator, rows, classes)), more

    return build


HALF = ("bf16", "fp16")
CASES = [
    Case(
        "attention",
        "plain",
        "whole tiles, no restriction",
        attention_call((1, 2, 2, 64, 64, 64), lse=False),
    ),
    Case(
        "attention",
        "causal",
        "ragged tiles; B, T, H, D views",
        attention_call((1, 2, 2, 70, 70, 64), causal=True, heads_last=True),
        quick=True,
    ),
    Case(
        "attention",
        "cross padded",
        "T_q < T_k, a batch without a key",
        attention_call((3, 2, 2, 40, 70, 64), padding="none"),
    ),
    Case(
        "attention",
        "causal padded left",
        "keys start late",
        attention_call((2, 2, 2, 70, 70, 64), causal=True, padding="left"),
        dtypes=("bf16",),
    ),
    Case(
        "attention",
        "holes",
        "padding inside the range",
        attention_call((2, 1, 1, 33, 97, 64), padding="holes"),
        dtypes=("bf16",),
    ),
    Case(
        "attention",
        "bottom right",
        "cached prefix: T_q < T_k",
        attention_call((1, 2, 1, 33, 100, 64), causal="bottom_right"),
        dtypes=("bf16",),
    ),
    Case(
        "attention",
        "no keys in sight",
        "T_q > T_k, bottom right: rows without a key",
        attention_call((1, 2, 2, 90, 40, 64), causal="bottom_right"),
        dtypes=("bf16",),
    ),
    Case(
        "attention",
        "boolean mask",
        "broadcast over B and H, an empty row",
        attention_call((2, 2, 2, 50, 70, 64), mask="boolean"),
        dtypes=HALF,
    ),
    Case(
        "attention",
        "additive mask",
        "broadcast over H",
        attention_call((2, 2, 2, 50, 70, 64), mask="additive"),
        dtypes=("bf16", "fp32"),
    ),
    Case(
        "attention",
        "column bias",
        "broadcast over B and T_q, with -inf",
        attention_call((2, 2, 2, 50, 70, 64), mask="columns", causal=True),
        dtypes=("bf16",),
    ),
    Case(
        "attention",
        "dropout",
        "ragged tiles",
        attention_call((1, 2, 2, 50, 70, 64), dropout_p=0.3),
        dtypes=HALF,
    ),
    Case(
        "attention",
        "everything",
        "all masks, dropout, shared key heads",
        attention_call(
            (2, 2, 1, 40, 75, 64),
            mask="additive",
            padding="right",
            causal="bottom_right",
            dropout_p=0.1,
            heads_last=True,
        ),
        quick=True,
    ),
    Case(
        "attention",
        "one query",
        "a decoding step, many key tiles",
        attention_call((2, 2, 1, 1, 200, 64), padding="right"),
        dtypes=("bf16",),
    ),
    Case(
        "attention",
        "one of each",
        "the smallest call: exact cancellation in dq",
        attention_call((1, 1, 1, 1, 1, 1)),
        dtypes=("fp32", "bf16"),
    ),
    Case(
        "attention",
        "head size 40",
        "not a power of two",
        attention_call((1, 2, 1, 40, 50, 40), causal=True, scale=0.3),
        dtypes=("bf16", "fp32"),
    ),
    Case(
        "attention",
        "head size 128",
        "the other common size",
        attention_call((1, 1, 1, 40, 70, 128), causal=True, padding="right"),
        dtypes=("bf16",),
    ),
    Case(
        "attention",
        "head size 256",
        "the largest",
        attention_call((1, 1, 1, 33, 40, 256), causal=True),
        dtypes=("bf16", "fp32"),
    ),
    Case(
        "layer_norm",
        "model width",
        "a power of two",
        row_call(37, 128, params=("weight", "bias"), normalized_shape=(128,)),
        quick=True,
    ),
    Case(
        "layer_norm",
        "ragged",
        "not a multiple of 8; weight only",
        row_call(3, 5, 99, params=("weight",), normalized_shape=(99,)),
    ),
    Case("layer_norm", "two axes", "no weight", row_call(6, 4, 24, normalized_shape=(4, 24)), dtypes=("fp32", "bf16")),
    Case(
        "layer_norm",
        "wide",
        "many elements a thread",
        row_call(5, 4096, params=("weight", "bias"), normalized_shape=(4096,)),
        dtypes=("bf16",),
    ),
    Case("softmax", "plain", "a power of two", row_call(30, 64), quick=True),
    Case("softmax", "causal ragged", "T_q != T_k", row_call(2, 3, 20, 37, causal=True, scale=0.2)),
    Case("softmax", "boolean mask", "an empty row", row_call(2, 3, 20, 37, mask="boolean"), dtypes=("fp32", "bf16")),
    Case(
        "softmax",
        "additive mask",
        "broadcast over the first axes",
        row_call(2, 3, 20, 37, mask="additive"),
        dtypes=("fp32", "bf16"),
    ),
    Case("softmax", "wide", "a vocabulary", row_call(3, 5000), dtypes=("fp32", "bf16")),
    Case("cross_entropy", "mean", "ragged, ignored rows", class_call(33, 41, ignored=5), quick=True),
    Case(
        "cross_entropy",
        "all options",
        "smoothing, class weights",
        class_call(33, 41, ignored=5, weighted=True, label_smoothing=0.1),
    ),
    Case(
        "cross_entropy",
        "none",
        "one loss a row",
        class_call(20, 128, reduction="none", label_smoothing=0.2),
        dtypes=("fp32", "bf16"),
    ),
    Case(
        "cross_entropy",
        "sum, wide",
        "several blocks of classes",
        class_call(4, 33000, reduction="sum"),
        dtypes=("fp32", "bf16"),
    ),
    Case("dropout", "residual", "ragged rows", row_call(3, 7, 99, params=("residual",), p=0.3), quick=True),
    Case("dropout", "alone", "a power of two", row_call(20, 128, p=0.1), dtypes=("bf16",)),
]
