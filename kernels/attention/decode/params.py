"""The arguments of the decoding ops: how they travel, and what is refused, with the values and the likely fix."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tileformer.kernels import checks
from tileformer.kernels.attention.params import MAX_HEAD_DIM, NO_LIMIT, check_window, limits
from tileformer.kernels.checks import name_of

MAX_TOKENS = 16  # new ones a row; more are a prompt
MAX_BEAMS = 32  # bits of a word
LEAST_PAGE = 16


class Cache(NamedTuple):
    """Keys and values, as (B, H_kv, slots, D) or as pages, and which of their slots a row reads."""

    k: Tensor
    v: Tensor
    lengths: Tensor
    page_table: Tensor | None
    descends: Tensor | None
    starts: Tensor | None
    k_scale: Tensor | None
    v_scale: Tensor | None


class DecodeParams(NamedTuple):
    """The numbers of a call. A registered op takes them as two lists, `flat`: integers, and floating-point numbers."""

    beams: int
    per_position: int  # slots of a position: beams where `descends` tells them apart, else 1
    left: int  # keys that a query sees before its diagonal, or NO_LIMIT
    right: int
    scale: float
    softcap: float

    def flat(self) -> tuple[Sequence[int], Sequence[float]]:
        return self[:4], self[4:]

    @classmethod
    def of(cls, ints: Sequence[int], floats: Sequence[float]) -> DecodeParams:
        return cls(*ints, *floats)


def _check_cache(
    op: str, beams: int, new: dict[str, Tensor], k: Tensor, v: Tensor, lengths: Tensor, page_table: Tensor | None,
    scales: dict[str, Tensor | None], others: dict[str, Tensor | None], cache_names: tuple[str, str] = ("k", "v"),
) -> tuple[int, int]:  # fmt: skip
    """(batch, slots of a row); ValueError or TypeError where new tokens, caches and integers do not fit together."""
    caches = dict(zip(cache_names, (k, v), strict=True))
    integers: dict[str, Tensor | None] = dict(lengths=lengths, page_table=page_table, **others)
    everything = new | caches | integers | scales
    checks.tensors(op, **everything)
    checks.plain(op, *everything.values())
    quantized = _check_scales(op, caches, scales)
    floating = new if quantized else new | caches
    checks.floating(op, **floating)
    (like, q), *_ = new.items()
    for name, x in (new | caches).items():
        cached = "(B, H_kv, slots, D)" if page_table is None else "(pages, page_size, H_kv, D)"
        if x.dim() != 4:
            wanted = "(B * beams, H, T, D)" if name in new else cached
            raise ValueError(f"{op}: {name} must be {wanted}, got shape {tuple(x.shape)}: reshape it")
        if name in floating and x.dtype != q.dtype:
            raise TypeError(f"{op}: {name} is {name_of(x.dtype)}, {like} {name_of(q.dtype)}: cast them to one dtype")
    checks.same_device(op, q, **everything)
    (rows, _, tokens, d), (k_name, v_name) = q.shape, cache_names
    if isinstance(beams, bool) or not isinstance(beams, int) or not 1 <= beams <= MAX_BEAMS or rows % beams:
        raise ValueError(f"{op}: beams is {beams!r}, {like} has {rows} rows: pass 1 to {MAX_BEAMS}, a divisor of them")
    if tokens < 1 or (tokens > MAX_TOKENS and "q" in new):
        raise ValueError(f"{op}: {like} has {tokens} new tokens a row: pass 1 to {MAX_TOKENS}, a prompt to `attention`")
    if v.shape[:3] != k.shape[:3]:
        both = f"{v_name} has shape {tuple(v.shape)}, {k_name} {tuple(k.shape)}"
        raise ValueError(f"{op}: {both}: all but the last axis must be equal")
    if k.shape[3] != d:
        raise ValueError(f"{op}: {like} is {tuple(q.shape)}, {k_name} {tuple(k.shape)}: head size must be equal")
    for name, size in ((like, d), (v_name, v.shape[3])):
        if not 1 <= size <= MAX_HEAD_DIM:
            raise ValueError(f"{op}: head size {size} of {name} is outside 1 to {MAX_HEAD_DIM}")
    batch = rows // beams
    if page_table is None:
        if len(k) != batch:
            raise ValueError(
                f"{op}: {like} has {rows} rows of {beams} beams, {k_name} a batch of {len(k)}, not {batch}"
            )
        slots = k.shape[2]
    else:
        if k.shape[1] < LEAST_PAGE or len(k) == 0:
            raise ValueError(f"{op}: {k_name} has {len(k)} pages of {k.shape[1]} slots: at least 1 of {LEAST_PAGE}")
        if page_table.dim() != 2 or len(page_table) != batch:
            raise ValueError(f"{op}: page_table has shape {tuple(page_table.shape)}: pass (B, max_pages), B = {batch}")
        slots = page_table.shape[1] * k.shape[1]
    for name, whole in integers.items():
        if whole is not None and whole.dtype != torch.int32:
            raise TypeError(f"{op}: {name} is {name_of(whole.dtype)}: pass int32, {name}.int()")
        shape = (batch, slots) if name == "descends" else (batch,)
        if whole is not None and name != "page_table" and whole.shape != shape:
            raise ValueError(f"{op}: {name} has shape {tuple(whole.shape)}: pass {shape}")
    return batch, slots


def _check_scales(op: str, caches: dict[str, Tensor], scales: dict[str, Tensor | None]) -> bool:
    """Whether the caches are int8 with a scale each; ValueError or TypeError for one without the other."""
    given = [x is not None for x in scales.values()]
    if any(given) != all(given) or any((x.dtype == torch.int8) != all(given) for x in caches.values()):
        dtypes = ", ".join(f"{name} is {name_of(x.dtype)}" for name, x in caches.items())
        shown = ", ".join(f"{name} {'None' if x is None else 'given'}" for name, x in scales.items())
        raise TypeError(
            f"{op}: {dtypes}, {shown}: int8 caches and both scales belong together, float32 of the cache's first three "
            "axes, as append_kv_cache stores them"
        )
    for (name, scale), cache in zip(scales.items(), caches.values(), strict=True):
        if scale is not None and (scale.dtype != torch.float32 or scale.shape != cache.shape[:3]):
            got, wanted = f"{name_of(scale.dtype)} {tuple(scale.shape)}", tuple(cache.shape[:3])
            raise TypeError(f"{op}: {name} is {got}: pass float32 {wanted}, one for each row of the cache")
    return all(given)


def check_decode(
    q: Tensor,
    cache: Cache,
    bias: Tensor | None,
    beams: int,
    causal: bool,
    window: Any,
    softcap: float,
    scale: float | None,
) -> DecodeParams:
    """The numbers of a call; raises for arguments of `decode_attention` that do not fit together."""
    op = "decode_attention"
    k, v, lengths, page_table, descends, starts, k_scale, v_scale = cache
    scales, others = dict(k_scale=k_scale, v_scale=v_scale), dict(descends=descends, starts=starts)
    _, slots = _check_cache(op, beams, dict(q=q), k, v, lengths, page_table, scales, others)
    h, h_kv = q.shape[1], k.shape[1 if page_table is None else 2]
    if h_kv == 0 or h % h_kv:
        raise ValueError(f"{op}: {h} query heads and {h_kv} key heads: the second must divide the first")
    if not isinstance(causal, bool):
        raise TypeError(f"{op}: causal is {causal!r}: pass True (the newest query is aligned to the last key) or False")
    if window is not None:
        check_window(op, causal, window, None)
    if not 0.0 <= softcap < math.inf:
        raise ValueError(f"{op}: softcap is {softcap}: it must be positive, or None for none")
    if bias is not None:
        checks.floating(op, bias=bias)
        checks.same_device(op, q, bias=bias)
        checks.broadcastable(op, (*q.shape[:3], slots), bias=bias)
    left, right, _ = limits(causal, window, None)
    return DecodeParams(
        beams, 1 if descends is None else beams, NO_LIMIT if left is None else left,
        NO_LIMIT if right is None else right, q.shape[3] ** -0.5 if scale is None else scale, softcap,
    )  # fmt: skip


def check_append(
    k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, page_table: Tensor | None,
    k_scale: Tensor | None, v_scale: Tensor | None, beams: int,
) -> None:  # fmt: skip
    """Raise ValueError or TypeError for arguments of `append_kv_cache` that do not fit together."""
    op, names = "append_kv_cache", ("k_cache", "v_cache")
    scales = dict(k_scale=k_scale, v_scale=v_scale)
    _check_cache(op, beams, dict(k=k, v=v), k_cache, v_cache, lengths, page_table, scales, {}, names)
    heads = 1 if page_table is None else 2
    for name, x, cache in (("k", k, k_cache), ("v", v, v_cache)):
        wanted = (k.shape[0], cache.shape[heads], k.shape[2], cache.shape[3])
        if x.shape != wanted:
            raise ValueError(f"{op}: {name} has shape {tuple(x.shape)}, {name}_cache takes {wanted}")
