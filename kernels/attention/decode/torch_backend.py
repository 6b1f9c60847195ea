"""Decoding in plain torch operators: what the CPU uses, where operators cost more than arithmetic."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.compiler import is_compiling

from tileformer.kernels.attention.decode.params import Cache, DecodeParams
from tileformer.kernels.attention.params import NO_LIMIT

LOWEST = -2.3e38  # what is added below it excludes: the kernels' scores, times log2(e), are beyond float32
FEW_HEADS = 32  # up to which one fused operator of torch's costs the CPU less than three plain ones


def torch_decode(q: Tensor, cache: Cache, bias: Tensor | None, params: DecodeParams, return_lse: bool) -> Any:
    """Two matmuls around a softmax in float32 or wider, over the slots that some row has filled."""
    if q.device.type != "meta" and torch.is_autocast_enabled(q.device.type):  # it would round each product
        with torch.autocast(q.device.type, enabled=False):
            return torch_decode(q, cache, bias, params, return_lse)
    k, v, lengths, page_table, _, starts, k_scale, v_scale = cache
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
        of_rows = lambda x: x[used].flatten(1, 2).transpose(1, 2)  # noqa: E731
        k, v = of_rows(k), of_rows(v)
        k_scale, v_scale = (x if x is None else of_rows(x) for x in (k_scale, v_scale))
    if last < k.shape[2]:
        k, v = k[:, :, :last], v[:, :, :last]
    if k_scale is not None and v_scale is not None:
        k, v = k * k_scale[:, :, :last, None], v * v_scale[:, :, :last, None]
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
    if dtype.itemsize == 2 or k_scale is not None:
        wide = torch.promote_types(dtype, torch.float32)
        q, k, v = q.to(wide), k.to(wide), v.to(wide)

    plain, out, lse = seen is None and bias is None and softcap == 0.0, None, None
    few = rows * h_kv <= FEW_HEADS * beams and last > 0 and on_host and not return_lse and softcap == 0.0
    if few and (plain or (mask := _mask_of_rows(seen, bias, last, q.dtype)) is not None):
        out = F.scaled_dot_product_attention(q, k, v, None if plain else mask, scale=scale)
        if not plain and not math.isfinite(float(out.sum())):  # as below
            out = None
    if out is None:
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


def _mask_of_rows(seen: Tensor | None, bias: Tensor | None, last: int, dtype: torch.dtype) -> Tensor | None:
    """The same thing as one mask (B, 1, 1, slots), if all heads, tokens and beams of a row see alike."""
    if bias is None:
        return seen[:, :, 0, 0] if seen is not None and seen.shape[2] * seen.shape[4] == 1 else None
    if seen is not None or bias.dim() != 4 or bias.shape[1] * bias.shape[2] != 1:
        return None
    bias = bias[..., :last].to(dtype)
    return bias.masked_fill(bias < LOWEST, -math.inf)


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
        words = cache.descends[:, None, :slots]
        if params.beams > 1:
            words = words >> torch.arange(params.beams, dtype=torch.int32, device=device)[:, None]
        seen = seen & ((words & 1) != 0)[:, None, :, None, None]
    return seen


def torch_append(
    k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, page_table: Tensor | None,
    k_scale: Tensor | None, v_scale: Tensor | None, beams: int,
) -> None:  # fmt: skip
    """Store what lies inside of the caches: whole slices where all rows are as long, which the host can see."""
    pairs = [(k, k_cache), (v, v_cache)]
    if k_scale is not None and v_scale is not None:
        (k8, k_unit), (v8, v_unit) = _in_eight_bits(k), _in_eight_bits(v)
        pairs = [(k8, k_cache), (v8, v_cache), (k_unit, k_scale[..., None]), (v_unit, v_scale[..., None])]
    tokens, (page_size, slots) = k.shape[2], k_cache.shape[1:3]
    inside: Any = None
    if page_table is None and lengths.device.type == "cpu" and not is_compiling():
        counts = lengths.tolist()
        first, last = min(counts, default=0) - tokens * beams, max(counts, default=0)
        if first >= 0 and last <= slots:
            if beams == 1 and first + tokens == last:  # all rows are as long
                for new, cache in pairs:
                    cache[:, :, first:last] = new
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
    for new, cache in pairs:
        by_slot = cache.transpose(1, 2) if page_table is None else cache
        by_slot[where[inside], rows[inside]] = new.unflatten(0, (batch, beams)).permute(0, 3, 1, 2, 4)[inside]


def _in_eight_bits(x: Tensor) -> tuple[Tensor, Tensor]:
    """int8 (..., D), and what they are multiples of, (..., 1); NaN where a value of the row is not finite."""
    x = x.float()
    unit = x.abs().amax(-1, keepdim=True) / 127.0
    unit = torch.where(unit < math.inf, unit, math.nan)
    multiples = torch.where(unit > 0.0, x / unit, 0.0)
    return multiples.clamp_(-127.0, 127.0).round_().to(torch.int8), unit
