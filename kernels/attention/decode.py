"""Attention of the newest tokens over caches of keys and values: one step of decoding.

Here are the public ops, their checks and the plain-torch backend. A step is short, and it is taken for every token and
layer: what shapes, dtypes and options decide is checked once for each kind of call.
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple, NoReturn, overload

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.compiler import is_compiling

from tileformer.kernels import checks, reference
from tileformer.kernels.attention.params import MAX_HEAD_DIM, NO_LIMIT, check_window, limits
from tileformer.kernels.backend import choose
from tileformer.kernels.checks import name_of
from tileformer.kernels.launch import MAX_CACHED

MAX_TOKENS = 16  # new ones a row; more are a prompt
MAX_BEAMS = 32  # bits of a word
LEAST_PAGE = 16
LOWEST = -2.3e38  # a bias below it excludes: the kernels' scores, times log2(e), are beyond float32
FEW_HEADS = 32  # up to which one fused operator of torch's costs the CPU less than three plain ones


class Cache(NamedTuple):
    """Keys and values, as (B, H_kv, slots, D) or as pages, and which of their slots a row reads."""

    k: Tensor
    v: Tensor
    lengths: Tensor
    page_table: Tensor | None
    descends: Tensor | None
    starts: Tensor | None


class DecodeParams(NamedTuple):
    """The numbers of a call."""

    beams: int
    per_position: int  # slots of a position: beams where `descends` tells them apart, else 1
    left: int  # keys that a query sees before its diagonal, or NO_LIMIT
    right: int
    scale: float
    softcap: float


_known: dict[tuple[Any, ...], Any] = {}  # kinds of calls that have passed the checks


def _kind(x: Tensor | None) -> Any:
    """What the checks look at; equal to nothing for what they refuse."""
    if x is None or not isinstance(x, Tensor) or x.is_nested:
        return x if x is None else object()
    return type(x), x.shape, x.dtype, x.device


def _remember(kind: tuple[Any, ...], value: Any) -> None:
    if len(_known) >= MAX_CACHED:  # a process may meet new kinds for ever
        _known.clear()
    _known[kind] = value


def _check_cache(
    op: str, beams: int, new: dict[str, Tensor], k: Tensor, v: Tensor, lengths: Tensor, page_table: Tensor | None,
    others: dict[str, Tensor | None], cache_names: tuple[str, str] = ("k", "v"),
) -> tuple[int, int]:  # fmt: skip
    """(batch, slots of a row); ValueError or TypeError where new tokens, caches and integers do not fit together."""
    floating = new | dict(zip(cache_names, (k, v), strict=True))
    integers: dict[str, Tensor | None] = dict(lengths=lengths, page_table=page_table, **others)
    checks.tensors(op, **floating, **integers)
    checks.plain(op, *floating.values(), *integers.values())
    checks.floating(op, **floating)
    (like, q), *_ = new.items()
    for name, x in floating.items():
        cached = "(B, H_kv, slots, D)" if page_table is None else "(pages, page_size, H_kv, D)"
        if x.dim() != 4:
            wanted = "(B * beams, H, T, D)" if name in new else cached
            raise ValueError(f"{op}: {name} must be {wanted}, got shape {tuple(x.shape)}: reshape it")
        if x.dtype != q.dtype:
            raise TypeError(f"{op}: {name} is {name_of(x.dtype)}, {like} {name_of(q.dtype)}: cast them to one dtype")
    checks.same_device(op, q, **floating, **integers)
    (rows, _, tokens, d), (k_name, v_name) = q.shape, cache_names
    if isinstance(beams, bool) or not isinstance(beams, int) or not 1 <= beams <= MAX_BEAMS or rows % beams:
        raise ValueError(f"{op}: beams is {beams!r}, {like} has {rows} rows: pass 1 to {MAX_BEAMS}, a divisor of them")
    if not 1 <= tokens <= MAX_TOKENS:
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
                f"{op}: {like} has {rows} rows of {beams} beams, {k_name} a batch of {len(k)}: {batch} fit"
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


def _check_decode(
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
    k, v, lengths, page_table, descends, starts = cache
    others = dict(descends=descends, starts=starts)
    _, slots = _check_cache(op, beams, dict(q=q), k, v, lengths, page_table, others)
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


@overload
def decode_attention(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, *, page_table: Tensor | None = ..., beams: int = ...,
    descends: Tensor | None = ..., starts: Tensor | None = ..., causal: bool = ...,
    window: int | tuple[int | None, int | None] | None = ..., softcap: float | None = ..., bias: Tensor | None = ...,
    scale: float | None = ..., return_lse: Literal[False] = ...,
) -> Tensor: ...  # fmt: skip
@overload
def decode_attention(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, *, page_table: Tensor | None = ..., beams: int = ...,
    descends: Tensor | None = ..., starts: Tensor | None = ..., causal: bool = ...,
    window: int | tuple[int | None, int | None] | None = ..., softcap: float | None = ..., bias: Tensor | None = ...,
    scale: float | None = ..., return_lse: bool,
) -> Any: ...  # fmt: skip
def decode_attention(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, *, page_table: Tensor | None = None, beams: int = 1,
    descends: Tensor | None = None, starts: Tensor | None = None, causal: bool = True,
    window: int | tuple[int | None, int | None] | None = None, softcap: float | None = None,
    bias: Tensor | None = None, scale: float | None = None, return_lse: bool = False, **wrong: NoReturn,
) -> Any:  # fmt: skip
    """softmax(scale * q k^T + bias) v of each row's newest T_q tokens over its cache, without a gradient.

    Nothing is read on the host and no grid depends on a length: a CUDA graph of it serves every later step.

    Args:
        q: (B * beams, H, T_q, D), the beams of a row one after another, T_q from 1 to 16, D from 1 to 256; float16,
            bfloat16 or float32 (float64 on the CPU's backends). Any strides, no copy if the last is 1.
        k: (B, H_kv, slots, D), H a multiple of H_kv, in q's dtype; any strides, the last 1. With a page table
            (pages, page_size, H_kv, D), page_size 16 or more; pages stored head by head are given transposed.
        v: as k, with D_v from 1 to 256.
        lengths: int32 (B,), how many slots of each row are filled, those of the T_q new tokens among them (see
            `append_kv_cache`, which takes the same lengths). 0 for a row that has ended. No more than all are read.
        page_table: int32 (B, max_pages): slot s of row b lies in page `page_table[b, s // page_size]`. Entries past a
            row's length may be anything.
        beams: hypotheses of a row, 1 to 32. Without `descends` all of them read the same keys (a source's).
        descends: int32 (B, slots): bit r of a slot's word says that beam r descends from it. Each new token takes
            `beams` slots, one a beam, and `lengths` counts slots; what lies before may be a prompt with a slot a
            token, whose words have all bits. A slot that no beam descends from is not read.
        starts: int32 (B,), the first slot of each row: what lies before is padding.
        causal: whether a query sees no key after its own, the last query's being the last; False for a source.
        window: how many keys a query sees before and after its own, as `attention`'s, aligned to the bottom right;
            counted in tokens (`beams` slots each with `descends`).
        softcap: if positive, scaled scores become softcap * tanh(scores / softcap), before the bias.
        bias: floating, broadcastable to (B * beams, H, T_q, slots), added to the scaled scores.
        scale: 1 / sqrt(D) when None.
        return_lse: also return the natural log-sum-exp of the scores (B * beams, H, T_q), in float32 (float64 for
            float64), with which results over parts of the keys can be merged.

    Returns:
        (B * beams, H, T_q, D_v) in q's dtype, any strides, or a tuple of that and the log-sum-exp. A query that sees no
        key is 0, its log-sum-exp -inf. A slot that no query of its row sees may hold anything, NaN too.

    Raises:
        ValueError, TypeError: for shapes, dtypes, devices or strides that do not fit, before anything runs.
        NotImplementedError: where a gradient is asked for: use `attention`.

    Source: split keys are Flash-Decoding's (pytorch.org/blog/flash-decoding), pages PagedAttention's
    (arXiv:2309.06180); `tileformer.kernels.reference.decode_attention` is the definition.

    Example:
        >>> q, cache = torch.randn(2, 4, 1, 16), torch.randn(2, 4, 100, 16)
        >>> decode_attention(q, cache, cache, torch.tensor([7, 30], dtype=torch.int32)).shape
        torch.Size([2, 4, 1, 16])
    """
    if wrong:
        checks.misnamed("decode_attention", wrong)
    backend = choose("decode_attention", q) if isinstance(q, Tensor) else ""  # which the checks refuse
    if scale is not None:
        scale = checks.number("decode_attention", "scale", scale, "multiply q by it, and pass scale=1.0")
    softcap = 0.0 if softcap is None else checks.number("decode_attention", "softcap", softcap)
    window = tuple(window) if isinstance(window, list) else window
    cache = Cache(k, v, lengths, page_table, descends, starts)
    kind = (*map(_kind, (q, *cache, bias)), beams, causal, window, softcap, scale)
    params = None if is_compiling() else _known.get(kind)
    if params is None:
        params = _check_decode(q, cache, bias, beams, causal, window, softcap, scale)
        _remember(kind, params)
    _no_gradient("decode_attention", q, k, v, bias)
    if backend == "reference":
        return reference.decode_attention(
            q, k, v, lengths, page_table=page_table, beams=beams, descends=descends, starts=starts, causal=causal,
            window=window, softcap=softcap, bias=bias, scale=scale, return_lse=return_lse,
        )  # fmt: skip
    if backend == "torch":
        return _torch_decode(q, cache, bias, params, return_lse)
    raise NotImplementedError(f"decode: backend {backend!r} has no kernel here")


def append_kv_cache(
    k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, *, page_table: Tensor | None = None,
    beams: int = 1,
) -> None:  # fmt: skip
    """Store each row's newest T keys and values at the end of its cache, in place.

    Token t of T goes to slot `lengths[b] - T + t`: `lengths` are those of the `decode_attention` that follows, the new
    tokens counted. With beams, that of beam r goes to slot `lengths[b] - (T - t) * beams + r`. A slot before the first
    or past the last, or whose page is negative, is not stored: a length of 0 leaves a row as it is.

    Args:
        k, v: (B * beams, H_kv, T, D) and (B * beams, H_kv, T, D_v), T from 1 to 16; any strides.
        k_cache, v_cache: what `decode_attention` reads as k and v, (B, H_kv, slots, D) or pages, in k's dtype.
        lengths: int32 (B,).
        page_table: int32 (B, max_pages). Rows that store into one page must not store into one slot.
        beams: beams of a row whose keys differ; their words, `1 << r` for beam r, are the caller's.

    Raises:
        ValueError, TypeError: for shapes, dtypes or devices that do not fit, before anything runs.
        NotImplementedError: where a gradient is asked for.

    Source: `tileformer.kernels.reference.append_kv_cache` is the definition.

    Example:
        >>> cache, new = torch.zeros(2, 4, 100, 16), torch.randn(2, 4, 1, 16)
        >>> append_kv_cache(new, new, cache, cache.clone(), torch.tensor([7, 30], dtype=torch.int32))
        >>> bool((cache[1, :, 29] == new[1, :, 0]).all())
        True
    """
    backend = choose("append_kv_cache", k) if isinstance(k, Tensor) else ""
    kind = (*map(_kind, (k, v, k_cache, v_cache, lengths, page_table)), beams)
    if is_compiling() or kind not in _known:
        _check_append(k, v, k_cache, v_cache, lengths, page_table, beams)
        _remember(kind, True)
    _no_gradient("append_kv_cache", k, v, k_cache, v_cache)
    if backend == "reference":
        reference.append_kv_cache(k, v, k_cache, v_cache, lengths, page_table=page_table, beams=beams)
        return
    if backend == "torch":
        _torch_append(k, v, k_cache, v_cache, lengths, page_table, beams)
        return
    raise NotImplementedError(f"decode: backend {backend!r} has no kernel here")


def _check_append(
    k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, page_table: Tensor | None, beams: int
) -> None:
    op, names = "append_kv_cache", ("k_cache", "v_cache")
    _check_cache(op, beams, dict(k=k, v=v), k_cache, v_cache, lengths, page_table, {}, names)
    heads = 1 if page_table is None else 2
    for name, x, cache in (("k", k, k_cache), ("v", v, v_cache)):
        wanted = (k.shape[0], cache.shape[heads], k.shape[2], cache.shape[3])
        if x.shape != wanted:
            raise ValueError(f"{op}: {name} has shape {tuple(x.shape)}, {name}_cache takes {wanted}")


def _no_gradient(op: str, *tensors: Tensor | None) -> None:
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors):
        raise NotImplementedError(
            f"{op}: an input requires a gradient, and decoding has none: call it under torch.no_grad(), or use "
            "attention(q, k, v, causal='bottom_right', key_lengths=lengths)"
        )


# The torch backend: what the CPU decodes with, where operators cost more than arithmetic.


def _torch_decode(q: Tensor, cache: Cache, bias: Tensor | None, params: DecodeParams, return_lse: bool) -> Any:
    """Two matmuls around a softmax in float32 or wider, over the slots that some row has filled."""
    if q.device.type != "meta" and torch.is_autocast_enabled(q.device.type):  # it would round each product
        with torch.autocast(q.device.type, enabled=False):
            return _torch_decode(q, cache, bias, params, return_lse)
    k, v, lengths, page_table, _, starts = cache
    (rows, h, t_q, d), (beams, _, left, right, scale, softcap), dtype = q.shape, params, q.dtype
    last = k.shape[2] if page_table is None else page_table.shape[1] * k.shape[1]
    # Lengths that lie in the host's memory say how far to read, and whether all rows are as long.
    on_host, ragged = not is_compiling() and type(lengths) is Tensor and lengths.device.type == "cpu", True
    if on_host:
        counts = lengths.tolist()
        last = max(0, min(max(counts, default=0), last))
        ragged = min(counts, default=0) < last
    if page_table is not None:
        used = page_table[:, : -(-last // k.shape[1])].clamp(0, len(k) - 1)
        k, v = (x[used].flatten(1, 2).transpose(1, 2) for x in (k, v))
    k, v = k[:, :, :last], v[:, :, :last]
    b, h_kv = k.shape[:2]
    group = h // h_kv
    if beams > 1:
        q = q.unflatten(0, (b, beams)).unflatten(2, (h_kv, group)).transpose(1, 2).reshape(b, h_kv, -1, d)
    elif group > 1:
        q = q.reshape(b, h_kv, group * t_q, d)
    seen = None
    if (
        ragged
        or starts is not None
        or cache.descends is not None
        or left != NO_LIMIT
        or (t_q > 1 and right != NO_LIMIT)
    ):
        seen = _seen(cache, params, t_q, last)
    if dtype.itemsize == 2:
        q, k, v = q.float(), k.float(), v.float()

    plain = seen is None and bias is None and softcap == 0.0
    if plain and not return_lse and rows * h_kv <= FEW_HEADS * beams and last > 0 and on_host:
        out, lse = F.scaled_dot_product_attention(q, k, v, scale=scale), None
    else:
        scores = (q if scale == 1.0 else q * scale) @ k.transpose(-1, -2)
        if softcap > 0.0:
            scores = softcap * torch.tanh(scores / softcap)
        each = scores.view(b, h_kv, beams, group, t_q, last)
        if bias is not None:
            bias = bias.to(scores.dtype).masked_fill(bias < LOWEST, -math.inf)
            bias = bias.expand(rows, h, t_q, bias.shape[-1] if bias.dim() else 1)
            bias = bias[..., :last].unflatten(0, (b, beams)).unflatten(2, (h_kv, group)).transpose(1, 2)
            each.add_(bias)
        if seen is not None:
            each.masked_fill_(~seen, -math.inf)
        lse = torch.logsumexp(scores, -1) if return_lse else None
        weights = torch.softmax(scores, -1)
        out = weights @ v
        # 0 * NaN in a slot that is not read, and an empty row, show in the output: on the host, a glance at it saves
        # a copy of the values.
        if not (plain or (on_host and math.isfinite(float(out.sum())))):
            if seen is not None:
                read = seen.any(4).any(2).view(b, 1, -1, 1)
                v = v.masked_fill(~read, 0.0)
            empty = (scores == -math.inf).all(-1, keepdim=True)
            out = (weights.masked_fill(empty, 0.0) @ v).masked_fill(empty, 0.0)
    if beams > 1:
        out = out.view(b, h_kv, beams, -1).transpose(1, 2)
        lse = lse if lse is None else lse.view(b, h_kv, beams, -1).transpose(1, 2)
    out = out.reshape(rows, h, t_q, v.shape[3]).to(dtype)
    return out if lse is None else (out, lse.reshape(rows, h, t_q))


def _seen(cache: Cache, params: DecodeParams, t_q: int, slots: int) -> Tensor:
    """Which slots a query sees, boolean (B, 1, beams or 1, 1, T_q or 1, slots)."""
    device = cache.k.device
    slot, length = torch.arange(slots, device=device), cache.lengths.clamp(max=slots)[:, None]
    seen = slot < length
    if cache.starts is not None:
        seen = seen & (slot >= cache.starts[:, None])
    seen = seen[:, None, None, None, None]
    if params.left != NO_LIMIT or (t_q > 1 and params.right != NO_LIMIT):
        # A query's own slots, and with them its window, end this many before the row's end.
        step = params.per_position
        behind = (t_q - 1 - torch.arange(t_q, device=device)) * step
        before = (length - 1 - slot)[:, None]  # slots between this one and the row's end
        near = before >= behind[:, None] - params.right * step
        if params.left != NO_LIMIT:
            near = near & (before < behind[:, None] + (params.left + 1) * step)
        seen = seen & near[:, None, None, None]
    if cache.descends is not None:
        beam = torch.arange(params.beams, dtype=torch.int32, device=device)[:, None]
        words = cache.descends[:, None, :slots] >> beam
        seen = seen & ((words & 1) != 0)[:, None, :, None, None]
    return seen


def _torch_append(
    k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, page_table: Tensor | None, beams: int
) -> None:
    tokens, (page_size, slots) = k.shape[2], k_cache.shape[1:3]
    inside: Any = None
    if page_table is None and lengths.device.type == "cpu" and not is_compiling():
        counts = lengths.tolist()
        first, last = min(counts, default=0) - tokens * beams, max(counts, default=0)
        if first >= 0 and last <= slots:
            if beams == 1 and first + tokens == last:  # all rows are as long
                k_cache[:, :, first:last] = k
                v_cache[:, :, first:last] = v
                return
            inside = ...  # all of them
    batch = len(lengths)
    # (B, T, beams)
    token = torch.arange(-tokens * beams, 0, device=k.device).view(tokens, beams)
    at = lengths.long()[:, None, None] + token
    where, rows = torch.arange(batch, device=k.device)[:, None, None].expand_as(at), at
    if page_table is not None:
        slots = page_table.shape[1] * page_size
        pages = F.pad(page_table, (0, 1), value=-1).long()
        where = pages.gather(1, torch.div(at, page_size, rounding_mode="floor").clamp(0, len(pages[0]) - 1).flatten(1))
        where, rows = where.view_as(at), at % page_size
    if inside is None:
        inside = ((at >= 0) & (at < slots) & (where >= 0)).nonzero(as_tuple=True)
    for new, cache in ((k, k_cache), (v, v_cache)):
        by_slot = cache.transpose(1, 2) if page_table is None else cache
        by_slot[where[inside], rows[inside]] = new.unflatten(0, (batch, beams)).permute(0, 3, 1, 2, 4)[inside]
