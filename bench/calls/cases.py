"""What is checked: one list of calls, each with the reason why it is there.

A new op joins everything (`tileformer check`, the tests, the ahead-of-time compiler, the GPU tests) by one entry in ops.py and its calls.
"""

import math
from collections.abc import Callable
from typing import Any

import torch

from tileformer.bench.calls import Call, describe
from tileformer.bench.calls.op import AFFINE, SCALES, Options, Tensors
from tileformer.bench.calls.ops import OPS

NAN, INF = math.nan, math.inf
BF, HALF, TWO, FP32 = ("bf16",), ("bf16", "fp16"), ("bf16", "fp32"), ("fp32", "bf16")


def _poison_padding(tensors: Tensors, options: Options) -> None:
    padded = ~options["key_mask"][:, None, :, None]
    tensors["k"].masked_fill_(padded, NAN)
    tensors["v"].masked_fill_(padded, INF)


def _poison_past_lengths(tensors: Tensors, options: Options) -> None:
    for name, lengths, number in (("q", "query_lengths", INF), ("k", "key_lengths", NAN), ("v", "key_lengths", NAN)):
        x = tensors[name]
        x.masked_fill_(torch.arange(x.shape[2])[:, None] >= options[lengths][:, None, None, None], number)


def _poison_before_window(tensors: Tensors, options: Options) -> None:
    """Of a page table's rows, the pages that no query can see: their slots, and what the table says."""
    first = options["lengths"] - tensors["q"].shape[2] - options["window"][0]
    gone = torch.arange(options["page_table"].shape[1]) * 16 + 15 < first[:, None]
    for name in "kv":
        tensors[name][options["page_table"][gone].long()] = NAN
    options["page_table"].masked_fill_(gone, -1)


def _calls(op: str, *usual: int, **options: Any) -> Callable[..., Call]:
    """`describe` for an op; a call that names no sizes has the usual ones."""
    return lambda name, reason, *shape, **more: describe(op, name, reason, *(shape or usual), **options | more)


def _qkv(layout: str, *more: str) -> dict[str, str]:
    return dict.fromkeys([*"qkv", *more], layout)


_attention = _calls("attention", 1, 2, 2, 50, 70, 64, lse=True)
_decode = _calls("decode_attention", 2, 4, 2, 1, 96, 64, lse=True)
_layer_norm = _calls("layer_norm", 37, 128, params=AFFINE, axes=1)
_rms_norm = _calls("rms_norm", 37, 128, params=("weight",), axes=1, eps=1e-6)
_add_norm = _calls("add_layer_norm", 37, 128, params=("residual", *AFFINE, "x_bias"), p=0.1)
_add_rms = _calls("add_rms_norm", 37, 128, params=("residual", "weight"), eps=1e-6)
_softmax, _log_softmax = _calls("softmax", 30, 64), _calls("log_softmax", 30, 64)
_cross_entropy = _calls("cross_entropy", 33, 41)
_linear_cross_entropy = _calls("linear_cross_entropy", 33, 24, 41)
_dropout = _calls("dropout", 20, 128)
_rotary = _calls("rotary", 2, 3, 9, 64)
_activation = _calls("bias_activation_dropout", 20, 128, activation="gelu")
# fmt: off
CASES = [
    _attention("plain", "whole tiles, no restriction", 1, 2, 2, 64, 64, 64, lse=False),
    _attention("causal", "ragged tiles; B, T, H, D views", 1, 2, 2, 70, 70, 64, causal=True, heads_last=True, quick=True),
    _attention("cross padded", "T_q < T_k, a batch without a key", 3, 2, 2, 40, 70, 64, padding="none"),
    _attention("causal padded left", "keys start late", 2, 2, 2, 70, 70, 64, causal=True, padding="left", dtypes=BF),
    _attention("holes", "padding inside the range", 2, 1, 1, 33, 97, 64, padding="holes", dtypes=BF),
    _attention("bottom right", "cached prefix: T_q < T_k", 1, 2, 1, 33, 100, 64, causal="bottom_right", dtypes=BF),
    _attention("no keys in sight", "T_q > T_k, bottom right: rows without a key", 1, 2, 2, 90, 40, 64, causal="bottom_right", dtypes=BF),
    _attention("boolean mask", "broadcast over B and H, an empty row", 2, 2, 2, 50, 70, 64, mask="boolean", dtypes=HALF),
    _attention("additive mask", "broadcast over H", 2, 2, 2, 50, 70, 64, mask="additive", dtypes=TWO),
    _attention("column bias", "broadcast over B and T_q, with -inf", 2, 2, 2, 50, 70, 64, mask="columns", causal=True, dtypes=BF),
    _attention("dropout", "ragged tiles", dropout_p=0.3, dtypes=HALF),
    _attention("everything", "all masks, dropout, shared key heads", 2, 2, 1, 40, 75, 64, mask="additive", padding="right",
               causal="bottom_right", dropout_p=0.1, heads_last=True, quick=True),
    _attention("one query", "a decoding step, many key tiles", 2, 2, 1, 1, 200, 64, padding="right", dtypes=BF),
    _attention("one of each", "the smallest call: exact cancellation in dq", 1, 1, 1, 1, 1, 1, dtypes=FP32),
    _attention("head size 40", "not a power of two", 1, 2, 1, 40, 50, 40, causal=True, scale=0.3, dtypes=TWO),
    _attention("head size 128", "the other common size", 1, 1, 1, 40, 70, 128, causal=True, dtypes=BF),
    _attention("long", "keys enough for Hopper's forward to work one tile ahead", 1, 2, 1, 130, 1100, 128, causal="bottom_right", dtypes=BF),
    _attention("head size 256", "the largest", 1, 1, 1, 33, 40, 256, causal=True, dtypes=TWO),
    # lengths
    _attention("one key", "a softmax over one score: dq and dk are exactly 0", 2, 2, 2, 40, 1, 64, dtypes=TWO),
    _attention("one more than a tile", "129 = 128 + 1: a tail of one row and one key", 1, 1, 1, 129, 129, 64, causal=True, dtypes=TWO),
    _attention("fifteen", "shorter than the shortest tile of a dot", 1, 2, 2, 15, 17, 64, dtypes=BF),
    _attention("six heads share two", "each key head serves its own three", 2, 6, 2, 33, 40, 64, padding="right", dtypes=BF),
    _attention("no key", "T_k = 0: out is 0, lse -inf", 2, 2, 2, 5, 0, 64, dtypes=BF, suite=False),
    _attention("no query", "T_q = 0: dk and dv are 0, though no query tile runs", 2, 2, 2, 0, 5, 64, dtypes=BF, suite=False),
    _attention("no batch", "nothing to launch", 0, 2, 2, 5, 5, 64, dtypes=BF, suite=False),
    _attention("66000 heads", "more programs than a grid's second axis takes", 33000, 2, 1, 3, 3, 16, dtypes=BF, suite=False, interpret=False),
    # rows without a key, and keys that are not there
    _attention("all padding", "no batch has a key", 2, 2, 2, 20, 40, 64, padding="nowhere", dtypes=BF),
    _attention("padding of nothing", "a key mask that hides no key", 2, 2, 2, 40, 64, 64, padding="all", causal=True, dtypes=BF),
    _attention("poisoned padding", "NaN keys and infinite values where padded", 3, 2, 1, 40, 70, 64, padding="none", edit=_poison_padding),
    _attention("poisoned holes", "the same between real keys, under a causal mask", 2, 2, 2, 70, 70, 64, padding="holes", causal=True,
               edit=_poison_padding, dtypes=BF),
    _attention("rows of -inf", "an additive mask that leaves rows without a key", 2, 2, 2, 20, 70, 64, mask=-INF, dtypes=TWO),
    _attention("lowest mask", "about finfo.min where hidden: in base 2 it is -inf", 2, 2, 2, 20, 70, 64, mask=-3.38e38, dtypes=TWO),
    _attention("lowest fp16 mask", "half precision's lowest number: a row full of it is a uniform average", 1, 2, 2, 40, 40, 64, mask=-65504.0,
               dtypes=HALF, suite=False),
    _attention("NaN in a query", "its row is NaN, other heads are not", 1, 2, 2, 20, 40, 64, edit=lambda t, o: t["q"][0, 1, 7].fill_(NAN),
               dtypes=TWO),
    # where a query may look
    _attention("window", "before and after the diagonal", 1, 2, 2, 90, 90, 64, window=(20, 5), dtypes=TWO, suite=False),
    _attention("window of the past", "the first tile of a row may be empty", 1, 2, 1, 70, 100, 64, window=(8, None), causal=True,
               align="bottom_right", dtypes=BF, suite=False),
    _attention("window beyond the keys", "T_q > T_k: late rows see nothing", 1, 2, 1, 90, 30, 64, window=(8, 0), dtypes=BF, suite=False),
    _attention("poison past lengths", "NaN and inf there; a batch without a query", 3, 2, 1, 40, 70, 64, lengths=True, causal="bottom_right",
               edit=_poison_past_lengths, dtypes=TWO, suite=False),
    _attention("packed", "sequences of many, no and one query; rows of none at the end", 1, 2, 1, 60, 80, 64,
               packed=((0, 33, 33, 34, 55), (0, 40, 50, 50, 75)), causal="bottom_right", dropout_p=0.1, dtypes=TWO, suite=False),
    # what is added to a score
    _attention("bias", "its gradient is a sum over the batch", 2, 2, 2, 50, 70, 64, bias=(2, 50, 70), causal=True, suite=False),
    _attention("bias of columns", "its gradient is a sum over heads and queries", 2, 2, 1, 20, 40, 64, bias=(2, 1, 1, 40),
               mask="boolean", dropout_p=0.1, dtypes=TWO, suite=False),
    _attention("linear bias", "ALiBi, beside a window", alibi=True, causal="bottom_right", window=(30, None), dtypes=TWO, suite=False),
    _attention("soft cap", "scores far beyond it", softcap=5.0, causal=True, edit=lambda t, o: t["q"].mul_(20), dtypes=TWO, suite=False),
    _attention("narrow values", "D_v is not D", 1, 2, 1, 50, 70, 64, dv=24, causal=True, dtypes=TWO, suite=False),
    # numbers
    _attention("extreme scores", "scores of hundreds: one key takes all", edit=lambda t, o: t["q"].mul_(100), dtypes=("bf16", "fp16", "fp32")),
    _attention("large scale", "a thousand times the usual", scale=125.0, dtypes=HALF),
    _attention("negative scale", "the running maximum is of the scaled scores", scale=-0.3, causal=True, dtypes=TWO),
    _attention("zero scale", "a plain average; no gradient for q and k", scale=0.0, dtypes=BF),
    _attention("large values", "near the largest half-precision number", edit=lambda t, o: t["v"].mul_(5000), dtypes=HALF),
    _attention("p = 0", "a rate of 0 with a seed drops nothing", dropout_p=0.0, dtypes=BF, suite=False),
    _attention("p = 0.99", "nearly all dropped, the rest times 100", dropout_p=0.99, dtypes=BF),
    _attention("p = 1", "everything dropped: 0, not NaN", dropout_p=1.0, dtypes=BF),
    _attention("float32 mask", "beside 16-bit queries", 2, 2, 2, 50, 70, 64, mask="additive", fp32=("mask",), dtypes=HALF, suite=False),
    # memory
    _attention("misaligned", "no 16-byte alignment", layouts=_qkv("offset"), dtypes=BF, suite=False),
    _attention("odd strides", "rows 67 elements apart", layouts=_qkv("padded"), dtypes=TWO, suite=False),
    _attention("columns first", "the last axis is not contiguous: copied once", layouts=_qkv("transposed", "out"), dtypes=BF, suite=False),
    _attention("keys for all", "stride 0 over the batch", 3, 2, 2, 50, 70, 64, layouts=dict(k="expanded", v="expanded"), dtypes=BF),
    _attention("gradient of a sum", "stride 0 everywhere", layouts=dict(out="scalar"), lse=False, dtypes=TWO, suite=False),
    _attention("transposed mask", "its last axis is not contiguous", 2, 2, 2, 50, 70, 64, mask="boolean", layouts=dict(mask="transposed"),
               dtypes=BF, suite=False),
    _attention("one mask for all", "a mask expanded to every head and batch by the caller", 3, 2, 2, 50, 70, 64, mask="additive",
               layouts=dict(mask="expanded"), dtypes=BF),
    _attention("far batches", "offsets beyond 2^31 elements", 3, 2, 1, 20, 40, 64, layouts=_qkv("far", "out"), dtypes=BF, suite=False),
    _attention("far rows", "neighbouring rows 2^26 elements apart", 1, 1, 1, 30, 30, 64, layouts=_qkv("far rows", "out"), dtypes=BF, suite=False),
    _attention("far mask", "a mask whose batches lie beyond 2^31 elements", 3, 2, 2, 30, 40, 64, mask="additive", layouts=dict(mask="far"),
               dtypes=BF, suite=False),
    _attention("far mask rows", "a mask with neighbouring rows 2^26 elements apart", 1, 2, 2, 30, 40, 64, mask="boolean",
               layouts=dict(mask="far"), dtypes=BF, suite=False),

    _layer_norm("model width", "a power of two", quick=True),
    _layer_norm("ragged", "not a multiple of 8; weight only", 3, 5, 99, params=("weight",)),
    _layer_norm("two axes", "no weight", 6, 4, 24, params=(), axes=2, dtypes=FP32, suite=False),
    _layer_norm("wide", "many elements a thread", 5, 4096, dtypes=BF, suite=False),
    _layer_norm("very wide", "the backward takes its sums from a kernel of their own", 2, 9001, dtypes=TWO, suite=False),
    _layer_norm("widest", "the forward merges statistics of tiles", 2, 20000, dtypes=TWO, suite=False),
    _layer_norm("one column", "no variance: y is the bias", 20, 1, dtypes=TWO, suite=False),
    _layer_norm("one row", "a tile of rows that are not there", 1, 128, dtypes=BF),
    _layer_norm("no row", "dweight and dbias are 0, though nothing runs", 0, 128, dtypes=BF),
    _layer_norm("66000 rows", "more rows than 16 bits count", 66000, 8, dtypes=BF, suite=False, interpret=False),
    _layer_norm("constant rows", "no variance: eps alone", edit=lambda t, o: t["x"][::3].fill_(3.0), dtypes=TWO),
    _layer_norm("far from zero", "mean(x^2) - mean(x)^2 would cancel", edit=lambda t, o: t["x"].add_(1000), dtypes=("fp32",), suite=False),
    _layer_norm("large", "squares beyond half precision", edit=lambda t, o: t["x"].mul_(5000)),
    _layer_norm("tiny", "variance far below eps", edit=lambda t, o: t["x"].mul_(1e-4), dtypes=TWO),
    _layer_norm("a NaN and an inf", "they stay in their rows", params=(), edit=lambda t, o: (t["x"][5, 9].fill_(NAN), t["x"][20, 0].fill_(INF)),
                dtypes=TWO, suite=False),
    _layer_norm("zero weight", "no gradient for x", edit=lambda t, o: t["weight"].zero_(), dtypes=BF),
    _layer_norm("float32 weight", "beside 16-bit rows", fp32=AFFINE, dtypes=HALF, suite=False),
    _layer_norm("misaligned", "no 16-byte alignment", layouts=dict.fromkeys(["x", *AFFINE, "out"], "offset"), dtypes=TWO, suite=False),
    _layer_norm("odd strides", "a slice of wider rows", params=("weight",), layouts=dict(x="padded", out="padded", weight="strided"),
                dtypes=BF, suite=False),
    _layer_norm("columns first", "the last axis is not contiguous: copied once", params=("weight",),
                layouts=dict(x="transposed", out="transposed"), dtypes=BF, suite=False),
    _layer_norm("gradient of a sum", "stride 0, for a row that repeats", layouts=dict(x="expanded", out="scalar"), dtypes=TWO, suite=False),
    _layer_norm("far rows", "offsets beyond 2^31 elements", 20, 128, layouts=dict(x="far", out="far"), dtypes=BF, suite=False),

    _rms_norm("model width", "a power of two", dtypes=TWO),
    _rms_norm("ragged", "not a multiple of 8; no weight", 3, 5, 99, params=(), dtypes=TWO, suite=False),
    _rms_norm("very wide", "the backward takes its sum from a kernel of its own", 2, 9001, dtypes=TWO, suite=False),
    _rms_norm("widest", "the forward reads its rows twice", 2, 20000, dtypes=TWO, suite=False),
    _rms_norm("one column", "the sign alone", 20, 1, dtypes=TWO, suite=False),
    _rms_norm("no row", "dweight is 0, though nothing runs", 0, 128, dtypes=BF, suite=False),
    _rms_norm("far from zero", "the mean stays", edit=lambda t, o: t["x"].add_(1000), dtypes=TWO, suite=False),
    _rms_norm("large", "squares beyond half precision", edit=lambda t, o: t["x"].mul_(5000), suite=False),
    _rms_norm("float32 weight", "beside 16-bit rows", fp32=("weight",), dtypes=HALF, suite=False),
    _add_norm("norm first", "a bias, dropout, the total for the next residual", dtypes=BF, quick=True),
    _add_norm("norm last", "two gradients for y", norm_first=False, suite=False),
    _add_norm("ragged", "no dropout: one gradient for x and residual", 3, 5, 99, p=0.0, dtypes=TWO, suite=False),
    _add_norm("float32 residual", "the stream is wider than the branch", fp32=("residual", "lse"), dtypes=BF, suite=False),
    _add_norm("three columns", "fewer than one draw makes", 20, 3, dtypes=TWO, suite=False),
    _add_norm("wide", "as many columns as are fused", 3, 8192, dtypes=BF, suite=False),
    _add_norm("wider", "made of dropout and layer_norm", 3, 9001, dtypes=BF, suite=False),
    _add_norm("no row", "the parameters' gradients are 0", 0, 128, dtypes=BF, suite=False),
    _add_norm("odd strides", "slices of wider rows", layouts=dict.fromkeys(["x", "residual", "out", "lse"], "padded"), dtypes=BF, suite=False),
    _add_rms("model width", "a pre-norm decoder without biases", dtypes=TWO, suite=False),
    _add_rms("norm last", "two gradients for y, dropout", p=0.3, norm_first=False, dtypes=BF, suite=False),
    _rms_norm("odd strides", "a slice of wider rows", layouts=dict(x="padded", out="padded"), dtypes=BF, suite=False),
    _softmax("plain", "a power of two", quick=True),
    _softmax("causal ragged", "T_q != T_k", 2, 3, 20, 37, causal=True, scale=0.2),
    _softmax("boolean mask", "an empty row", 2, 3, 20, 37, mask="boolean", dtypes=FP32, suite=False),
    _softmax("additive mask", "broadcast over the first axes", 2, 3, 20, 37, mask="additive", dtypes=FP32, suite=False),
    _softmax("wide", "a vocabulary", 3, 5000, dtypes=FP32, suite=False),
    _softmax("very wide", "the backward reads its rows twice", 2, 17001, dtypes=TWO, suite=False),
    _softmax("widest", "the forward keeps a running maximum", 2, 33000, edit=lambda t, o: t["x"][:, -1].add_(30), dtypes=TWO, suite=False),
    _softmax("one column", "all ones, no gradient", 30, 1, dtypes=BF, suite=False),
    _softmax("one row", "a vector without a batch", 64, dtypes=BF),
    _softmax("no row", "nothing to launch", 0, 64, dtypes=BF),
    _softmax("no column", "rows of nothing", 3, 0, dtypes=BF),
    _softmax("66000 rows", "more rows than 16 bits count", 66000, 8, dtypes=BF, suite=False, interpret=False),
    _softmax("rows without a key", "T_q > T_k, bottom right", 2, 20, 9, causal="bottom_right", dtypes=BF, suite=False),
    _softmax("extreme", "differences of thousands", edit=lambda t, o: t["x"].mul_(1000)),
    _softmax("large scale", "the maximum is of the scaled scores", scale=200.0, dtypes=TWO),
    _softmax("negative scale", "the smallest element wins", scale=-2.0, dtypes=TWO),
    _softmax("lowest mask", "about finfo.min: a row full of it is uniform", 2, 20, 37, mask="additive",
             edit=lambda t, o: (o["mask"][3].fill_(-3.38e38), o["mask"][5, :30].fill_(-3.38e38)), dtypes=TWO, suite=False),
    _softmax("row of -inf", "in x itself: 0, not NaN", edit=lambda t, o: t["x"][4].fill_(-INF), not_torch="NaN there, as in torch", dtypes=TWO),
    _softmax("NaN behind a mask", "a hidden element is not read", 20, 37, mask="boolean", edit=lambda t, o: t["x"].masked_fill_(~o["mask"], NAN),
             dtypes=TWO, suite=False),
    _softmax("misaligned", "no 16-byte alignment", layouts=dict(x="offset", out="offset"), dtypes=TWO, suite=False),
    _softmax("odd strides", "a slice of wider rows", layouts=dict(x="padded", out="padded"), dtypes=BF, suite=False),
    _softmax("columns first", "the last axis is not contiguous: copied once", layouts=dict(x="transposed", out="transposed"), dtypes=BF, suite=False),
    _softmax("gradient of a sum", "no gradient at all", layouts=dict(x="expanded", out="scalar"), dtypes=BF, suite=False),
    _softmax("transposed mask", "its last axis is not contiguous", 2, 3, 20, 37, mask="additive", layouts=dict(mask="transposed"),
             dtypes=BF, suite=False),
    _softmax("far rows", "offsets beyond 2^31 elements", 20, 64, layouts=dict(x="far", out="far"), dtypes=BF, suite=False),
    _log_softmax("plain", "a power of two", dtypes=TWO),
    _log_softmax("causal ragged", "T_q != T_k", 2, 3, 20, 37, causal=True, scale=0.2, suite=False),
    _log_softmax("boolean mask", "an empty row: -inf, no gradient", 2, 3, 20, 37, mask="boolean", dtypes=TWO, suite=False),
    _log_softmax("additive mask", "broadcast over the first axes", 2, 3, 20, 37, mask="additive", dtypes=TWO, suite=False),
    _log_softmax("very wide", "the backward reads its rows twice", 2, 17001, dtypes=TWO, suite=False),
    _log_softmax("widest", "the forward keeps a running maximum", 2, 33000, edit=lambda t, o: t["x"][:, -1].add_(30), dtypes=TWO, suite=False),
    _log_softmax("one column", "all zeros, no gradient", 30, 1, dtypes=BF, suite=False),
    _log_softmax("no column", "rows of nothing", 3, 0, dtypes=BF, suite=False),
    _log_softmax("extreme", "far below what a softmax can hold", edit=lambda t, o: t["x"].mul_(1000), dtypes=TWO),
    _log_softmax("row of -inf", "in x itself: -inf, not NaN", edit=lambda t, o: t["x"][4].fill_(-INF),
                 not_torch="it hands the gradient of -inf on, as torch does", dtypes=TWO, suite=False),
    _log_softmax("odd strides", "a slice of wider rows", layouts=dict(x="padded", out="padded"), dtypes=BF, suite=False),

    _decode("one token", "ragged lengths, grouped heads", quick=True),
    _decode("full", "the capacity is full", lengths="full", lse=False, dtypes=BF, suite=False),
    _decode("empty", "a row that has ended", 3, 2, 2, 1, 70, 64, lengths="empty", dtypes=TWO, suite=False),
    _decode("several tokens", "causal among the new ones", 2, 4, 2, 5, 96, 64, suite=False),
    _decode("many splits", "one of them empty", 2, 2, 1, 1, 1600, 64, dtypes=TWO),
    _decode("many splits, full", "of two rows of a group", 1, 2, 1, 2, 1024, 32, lengths="full", dtypes=BF, suite=False),
    _decode("pages", "smaller than a tile", page=16, quick=True),
    _decode("large pages", "a tile and more", 2, 4, 2, 3, 512, 64, page=128, dtypes=TWO, suite=False),
    _decode("odd pages", "no power of two", page=24, dtypes=BF, suite=False),
    _decode("padded left", "rows that start late", starts=True, page=16, dtypes=BF, suite=False),
    _decode("beams of a source", "all read the same keys", beams=5, causal=False, dtypes=TWO, suite=False),
    _decode("beams", "words say who descends from a slot", beams=5, words=True, suite=False),
    _decode("beams, several tokens", "positions are of beams slots", 2, 2, 2, 3, 90, 64, beams=3, words=True, page=18, starts=True, dtypes=TWO, suite=False),
    _decode("32 beams", "every bit of a word", 1, 2, 1, 1, 96, 64, beams=32, words=True, dtypes=BF, suite=False),
    _decode("window", "keys before it are not read", 2, 4, 2, 3, 96, 64, window=(20, None), page=16, edit=_poison_before_window, suite=False),
    _decode("window of beams", "in tokens, of beams slots", 2, 2, 1, 2, 90, 64, window=9, beams=3, words=True, dtypes=TWO, suite=False),
    _decode("soft cap", "the bounded scores", softcap=2.0, dtypes=TWO, suite=False),
    _decode("bias", "broadcast over B, H and T_q, with -inf", bias="columns", suite=False),
    _decode("bias of heads", "broadcast over tokens and columns", 2, 4, 2, 3, 96, 64, bias="heads", dtypes=TWO, suite=False),
    _decode("bias of rows", "and a token that sees less", 2, 4, 2, 4, 96, 64, bias="full", beams=2, dtypes=TWO, suite=False),
    _decode("all of these", "", 2, 4, 2, 3, 96, 40, page=16, beams=3, words=True, starts=True, window=12, softcap=3.0, bias="full", scale=-0.3, suite=False),
    _decode("8 bits", "scales of neighbours a hundred times apart", 2, 4, 2, 3, 96, 64, int8=True, fp32=SCALES, dtypes=("fp16", "fp32", "bf16"), suite=False),
    _decode("8 bits, all of these", "", 2, 4, 2, 3, 96, 40, page=16, beams=3, words=True, starts=True, window=12, softcap=3.0, bias="full", int8=True, fp32=SCALES, suite=False),
    _decode("head size 40", "no power of two, and 8 mod 16", 2, 4, 2, 1, 96, 40, dv=24, dtypes=TWO, suite=False),
    _decode("head size 256", "the largest", 1, 2, 1, 1, 70, 256, page=0, dtypes=TWO, suite=False),
    _decode("one column", "D = 1", 2, 2, 1, 1, 50, 1, dtypes=BF, suite=False),
    _decode("many rows", "of a group, more than a tile", 1, 48, 1, 3, 96, 64, dtypes=BF, suite=False),
    _decode("no slot", "a cache of no capacity", 2, 2, 2, 1, 0, 64, dtypes=BF, suite=False),
    _decode("no row", "nothing to launch", 0, 2, 2, 1, 64, 64, dtypes=BF, suite=False),
    _decode("misaligned", "no 16-byte alignment", layouts=_qkv("offset"), dtypes=TWO, suite=False),
    _decode("odd strides", "slices of wider rows", layouts=_qkv("padded"), dtypes=BF, suite=False),
    _decode("far", "offsets beyond 2^31 elements", layouts=_qkv("far"), dtypes=BF, suite=False),
    _decode("far rows", "a tile that begins beyond 2^31 elements", 2, 2, 1, 1, 129, 64, lengths="full", layouts=dict(k="far rows", v="far rows"), dtypes=BF, suite=False),
    _decode("far pages", "offsets beyond 2^31 elements", page=16, layouts=dict(k="far", v="far"), dtypes=BF, suite=False),

    _cross_entropy("mean", "ragged, ignored rows", ignored=5, quick=True),
    _cross_entropy("all options", "smoothing, class weights", ignored=5, weighted=True, label_smoothing=0.1),
    _cross_entropy("none", "one loss a row", 20, 128, reduction="none", label_smoothing=0.2, dtypes=FP32, suite=False),
    _cross_entropy("sum, wide", "several blocks of classes", 4, 33000, reduction="sum", dtypes=FP32),
    _cross_entropy("ragged and wide", "a vocabulary that no power of two divides", 3, 8195, ignored=1, weighted=True, label_smoothing=0.1,
                   dtypes=TWO, suite=False),
    _cross_entropy("ignored NaN", "what an ignored row holds reaches nothing", ignored=5, edit=lambda t, o: t["logits"][:5].fill_(NAN)),
    _cross_entropy("ignored NaN, smoothed", "the same where all classes count", ignored=5, weighted=True, label_smoothing=0.1,
                   edit=lambda t, o: t["logits"][:5].fill_(NAN), dtypes=FP32),
    _cross_entropy("all ignored, mean", "0 / 0, as in torch", ignored=33, dtypes=TWO),
    _cross_entropy("all ignored, sum", "no loss, no gradient", ignored=33, reduction="sum", dtypes=TWO),
    _cross_entropy("no row", "nothing to launch", 0, 41, reduction="sum", dtypes=BF),
    _cross_entropy("one row", "a tile of rows that are not there", 1, 41, dtypes=BF),
    _cross_entropy("one class", "no loss, no gradient", 33, 1, dtypes=BF, suite=False),
    _cross_entropy("66000 rows", "more rows than 16 bits count", 66000, 8, reduction="none", ignored=5, dtypes=BF, suite=False, interpret=False),
    _cross_entropy("all smoothing", "the target itself does not count", label_smoothing=1.0, dtypes=TWO, suite=False),
    _cross_entropy("extreme", "the largest logit is thousands above", edit=lambda t, o: t["logits"].mul_(1000)),
    _cross_entropy("excluded classes", "-inf logits that are no target", reduction="sum",
                   edit=lambda t, o: t["logits"].scatter_(1, (o["target"] + 1)[:, None] % 41, -INF), dtypes=TWO),
    _cross_entropy("zero weights", "classes that do not count", weighted=True, edit=lambda t, o: o["weight"][::2].zero_(), dtypes=TWO, suite=False),
    _cross_entropy("float32 weight", "beside 16-bit logits", weighted=True, fp32=("weight",), dtypes=HALF, suite=False),
    _cross_entropy("a NaN and an inf", "they stay in their rows", reduction="none",
                   edit=lambda t, o: (t["logits"][7, 3].fill_(NAN), t["logits"][20, 5].fill_(INF)), dtypes=TWO, suite=False),
    _cross_entropy("misaligned", "no 16-byte alignment", reduction="none", layouts=dict(logits="offset", target="offset", out="offset"),
                   dtypes=TWO, suite=False),
    _cross_entropy("padded vocabulary", "a slice of wider rows", 33, 128, weighted=True,
                   layouts=dict(logits="padded", target="strided", weight="strided"), dtypes=BF, suite=False),
    _cross_entropy("columns first", "the last axis is not contiguous: copied once", layouts=dict(logits="transposed"), dtypes=BF, suite=False),
    _cross_entropy("gradient of a sum", "stride 0", reduction="none", layouts=dict(logits="expanded", out="scalar"), dtypes=BF, suite=False),
    _cross_entropy("far rows", "offsets beyond 2^31 elements", 20, 41, layouts=dict(logits="far"), dtypes=BF, suite=False),

    _cross_entropy("z-loss, soft cap", "all options at once", ignored=5, weighted=True, label_smoothing=0.1, z_loss=0.01, softcap=4.0, suite=False),
    _linear_cross_entropy("mean", "ragged, ignored rows", ignored=5, suite=False),
    _linear_cross_entropy("all options", "at once", ignored=5, weighted=True, bias=True, label_smoothing=0.1, z_loss=0.01, softcap=4.0, suite=False),
    _linear_cross_entropy("none", "one loss a row, computed again in backward", bias=True, reduction="none", dtypes=TWO, suite=False),
    _linear_cross_entropy("several chunks", "sums over them, the last one shorter", 4200, 3, 8, bias=True, ignored=9, dtypes=TWO, suite=False),
    _linear_cross_entropy("ignored NaN", "what an ignored row holds reaches no weight", ignored=5, reduction="sum",
                          edit=lambda t, o: t["input"][:5].fill_(NAN), dtypes=TWO, suite=False),
    _linear_cross_entropy("all ignored, mean", "0 / 0, as in torch", ignored=33, dtypes=TWO, suite=False),
    _linear_cross_entropy("no row", "nothing to launch", 0, 24, 41, reduction="sum", dtypes=BF, suite=False),
    _linear_cross_entropy("one row", "a tile of rows that are not there", 1, 1, 41, dtypes=BF, suite=False),
    _linear_cross_entropy("views", "a slice of wider rows, a transposed weight", bias=True, weighted=True, suite=False, dtypes=TWO,
                          layouts=dict(input="padded", linear_weight="transposed", linear_bias="strided", target="strided", weight="strided")),
    _linear_cross_entropy("gradient of a sum", "stride 0", reduction="none", layouts=dict(out="scalar"), dtypes=BF, suite=False),

    _dropout("residual", "ragged rows", 3, 7, 99, params=("residual",), p=0.3, quick=True),
    _dropout("alone", "a power of two", p=0.1, dtypes=BF),
    _dropout("p = 0", "nothing dropped", params=("residual",), p=0.0, dtypes=BF),
    _dropout("p = 0.99", "nearly all dropped, the rest times 100", p=0.99, dtypes=TWO),
    _dropout("p = 1", "everything dropped: the residual alone", params=("residual",), p=1.0, dtypes=BF, suite=False),
    _dropout("one column", "fewer than one draw makes", 20, 1, p=0.3, dtypes=BF, suite=False),
    _dropout("three tiles", "columns beyond one program's", 3, 5001, params=("residual",), p=0.3, dtypes=TWO, suite=False),
    _dropout("no row", "nothing to launch", 0, 128, p=0.1, dtypes=BF),
    _dropout("66000 rows", "more rows than 16 bits count", 66000, 8, p=0.1, dtypes=BF, suite=False, interpret=False),
    _dropout("a NaN and an inf", "they stay where they are", p=0.1, edit=lambda t, o: (t["x"][5, 9].fill_(NAN), t["x"][6, 0].fill_(INF)), dtypes=TWO),
    _dropout("float32 residual", "beside 16-bit rows", params=("residual",), p=0.1, fp32=("residual",), dtypes=HALF, suite=False),
    _dropout("misaligned", "no 16-byte alignment", params=("residual",), p=0.1, layouts=dict(x="offset", residual="offset", out="offset"),
             dtypes=TWO, suite=False),
    _dropout("odd strides", "a slice of wider rows", params=("residual",), p=0.1, layouts=dict(x="padded", residual="transposed", out="padded"),
             dtypes=BF, suite=False),
    _dropout("gradient of a sum", "stride 0", p=0.1, layouts=dict(x="expanded", out="scalar"), dtypes=BF, suite=False),
    _activation("feed-forward", "bias, activation and dropout", params=("bias",), p=0.1, dtypes=BF, quick=True),
    _activation("geglu", "ragged, everything at once", 3, 7, 99, params=("bias", "up"), p=0.3, suite=False),
    _activation("swiglu", "two inputs, nothing drawn", params=("up",), activation="silu", dtypes=TWO, suite=False),
    _activation("approximate gelu", "by a sigmoid", params=("bias",), activation="gelu_tanh", dtypes=TWO, suite=False),
    _activation("relu", "0 and below have no gradient", params=("bias",), activation="relu", p=0.3, edit=lambda t, o: t["x"][3].zero_().sub_(t["bias"]),
                dtypes=BF, suite=False),
    _activation("one column", "fewer than one draw makes", 20, 1, params=("bias", "up"), p=0.3, dtypes=BF, suite=False),
    _activation("three tiles", "columns beyond one program's", 3, 5001, params=("bias", "up"), activation="silu", p=0.3, dtypes=TWO, suite=False),
    _activation("many rows", "of several programs, dbias is their sum", 300, 64, params=("bias",), activation="silu", dtypes=TWO, suite=False),
    _activation("no row", "dbias is 0, though nothing runs", 0, 128, params=("bias", "up"), p=0.1, dtypes=BF, suite=False),
    _activation("p = 1", "everything dropped", params=("bias", "up"), p=1.0, dtypes=BF, suite=False),
    _activation("a NaN and an inf", "they stay in their columns", params=("up",), edit=lambda t, o: (t["x"][5, 9].fill_(NAN), t["x"][6, 0].fill_(INF)),
                activation="relu", dtypes=TWO, suite=False),
    _activation("large", "an exponential that overflows", params=("up",), activation="silu", edit=lambda t, o: t["x"].mul_(500), dtypes=TWO, suite=False),
    _activation("float32 bias", "beside 16-bit rows", params=("bias",), fp32=("bias",), dtypes=HALF, suite=False),
    _activation("misaligned", "no 16-byte alignment", params=("bias", "up"), p=0.1, layouts=dict.fromkeys(["x", "bias", "up", "out"], "offset"),
                dtypes=TWO, suite=False),
    _activation("odd strides", "slices of wider rows", params=("bias", "up"), layouts=dict(x="padded", up="transposed", bias="strided", out="padded"),
                dtypes=BF, suite=False),
    _activation("gradient of a sum", "stride 0", params=("bias",), layouts=dict(x="expanded", out="scalar"), dtypes=BF, suite=False),
    _activation("far rows", "offsets beyond 2^31 elements", params=("up",), p=0.1, layouts=dict(x="far", up="far", out="far"), dtypes=BF, suite=False),
    _rotary("llama", "halves of a head; B, T, H, D views", heads_last=True, quick=True),
    _rotary("interleaved", "neighbours", interleaved=True, dtypes=TWO),
    _rotary("partial", "the rest is copied; no power of two", 1, 2, 7, 80, rotated=24, dtypes=TWO, suite=False),
    _rotary("partial, interleaved", "positions of their own", 2, 3, 7, 20, rotated=12, interleaved=True, own_positions=True, dtypes=TWO, suite=False),
    _rotary("one pair", "the narrowest", 2, 3, 5, 2, own_positions=True, dtypes=BF, suite=False),
    _rotary("many rows", "several programs, the last is ragged", 3, 5, 70, 40, heads_last=True, own_positions=True, dtypes=TWO, suite=False),
    _rotary("float32 tables", "beside 16-bit rows", fp32=("cos", "sin"), dtypes=HALF, suite=False),
    _rotary("no token", "nothing to launch", 2, 3, 0, 8, dtypes=BF, suite=False),
    _rotary("misaligned", "no 16-byte alignment", layouts=dict.fromkeys(["x", "cos", "sin", "out"], "offset"), dtypes=TWO, suite=False),
    _rotary("odd strides", "slices of wider rows", layouts=dict(x="padded", out="transposed", cos="padded"), dtypes=BF, suite=False),
    _rotary("gradient of a sum", "stride 0", layouts=dict(x="expanded", out="scalar"), dtypes=BF, suite=False),
    _rotary("far", "offsets beyond 2^31 elements", layouts=dict(x="far", out="far rows"), dtypes=BF, suite=False),
    _dropout("far rows", "offsets beyond 2^31 elements", p=0.1, layouts=dict(x="far", out="far"), dtypes=BF, suite=False),
]
# fmt: on

DRAWS = [
    Call(op, f"draws at {p}", options=dict(p=p), reason=why, dtypes=BF, draws=True)
    for op in OPS
    if OPS[op].draw
    for p, why in ((0.1, "the usual rate"), (0.9, "few are kept"))
]
