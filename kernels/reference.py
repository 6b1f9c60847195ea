"""The specification: every op in plain eager PyTorch. What a kernel must compute is decided here, before it exists.

Each function computes in float32, or float64 for float64 (the truth), and rounds its result once to the dtype it was
given: in that dtype it is the yardstick of an error budget. It is differentiable any number of times, runs on any
device, and calls no fused PyTorch operator. This file imports torch alone, and a rule that the kernels need too is
written a second time where they are: a shared mistake would be no mistake.

Decided corner cases:
- A row that may attend to nothing has output 0, weights 0, log-sum-exp -inf and no gradient.
- A key that `key_mask` excludes is read as 0, so NaN or inf in it never reaches a result. A key that only `mask` or
  `causal` hides keeps IEEE rules: its score is discarded, but 0 * NaN in its value is NaN.
- A float mask is added to the scaled scores; -inf in it excludes, a large finite negative does not (a row full of it
  is a uniform average). In attention, whose scores are kept in base 2, finfo.min of float32 and bfloat16 excludes too.
- causal: query row i may see key j when j <= i + shift; shift is 0 ("top_left") or T_k - T_q ("bottom_right"; with
  lengths, those of the sequence). A window (left, right) adds i + shift - left <= j <= i + shift + right; None is no
  limit; causal makes right 0 at most.
- The order of scores: scale, soft cap (cap * tanh(x / cap)), bias and linear bias (-slope * |i + shift - j|), masks.
- Queries and keys past a sequence's length, and what belongs to no packed sequence, are padding: such a row's output
  is 0 and its log-sum-exp -inf, such a key is read as 0.
- Decoding: a slot that no query of a row's beams can see, by length, start, window or word, is read as 0, whatever it
  holds; a slot that one of them sees keeps IEEE rules for the others. A length past the capacity is the capacity.
- p = 1 drops everything (the result is 0, not NaN); p = 0 draws nothing.
- An ignored target contributes neither loss nor gradient, whatever its logits hold; "mean" over no target is NaN.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

LOWEST = -2.3e38  # log2(e) times anything below is beyond float32


def _wide(x: Tensor) -> Tensor:
    """x in float32, or float64 for float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _causal_shift(causal: bool | str, t_q: int, t_k: int) -> int | None:
    """How far row i sees past key i; None without a causal mask."""
    return {False: None, True: 0, "top_left": 0, "bottom_right": t_k - t_q}[causal]


def _limits(causal: bool | str, window: Any, align: str | None) -> tuple[int | None, int | None, bool]:
    """(left, right, whether the diagonal ends at the bottom right): how far a row sees around it; None is no limit."""
    left, right = (window, window) if window is None or isinstance(window, int) else window
    if causal:
        right = 0 if right is None else min(right, 0)
    return left, right, (causal if isinstance(causal, str) else align) == "bottom_right"


def _excluded(causal: bool | str, mask: Tensor | None, t_q: int, t_k: int, device: torch.device) -> Tensor | None:
    """Boolean, True where a key is hidden by `causal` or a boolean mask; broadcastable to (..., T_q, T_k)."""
    hidden = None
    shift = _causal_shift(causal, t_q, t_k)
    if shift is not None:
        rows, cols = torch.arange(t_q, device=device)[:, None], torch.arange(t_k, device=device)
        hidden = cols > rows + shift
    if mask is not None and mask.dtype == torch.bool:
        hidden = ~mask if hidden is None else hidden | ~mask
    return hidden


def _softmax(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Weights and log-sum-exp over the last axis; a row of -inf gives weights 0 and log-sum-exp -inf."""
    row_max = scores.amax(-1, keepdim=True) if scores.shape[-1] else scores.new_full((*scores.shape[:-1], 1), -math.inf)
    row_max = torch.where(row_max == -math.inf, 0.0, row_max).detach()
    weights = torch.exp(scores - row_max)
    total = weights.sum(-1, keepdim=True)
    some = total != 0
    safe = torch.where(some, total, 1.0)
    return weights / safe, torch.where(some, row_max + safe.log(), -math.inf).squeeze(-1)


def softmax(x: Tensor, *, scale: float = 1.0, mask: Tensor | None = None, causal: bool | str = False) -> Tensor:
    """softmax(scale * x + mask) over the last axis of x (..., T_q, T_k)."""
    return _softmax(_scores(x, scale, mask, causal))[0].to(x.dtype)


def log_softmax(x: Tensor, *, scale: float = 1.0, mask: Tensor | None = None, causal: bool | str = False) -> Tensor:
    """log(softmax(scale * x + mask)) over the last axis of x (..., T_q, T_k).

    An element that is -inf, by the masks or by itself, stays -inf and neither gives nor takes a gradient.
    """
    scores = _scores(x, scale, mask, causal)
    hidden = scores == -math.inf
    total = _softmax(scores)[1].unsqueeze(-1).masked_fill(hidden.all(-1, keepdim=True), 0.0)
    return (scores.masked_fill(hidden, 0.0) - total).masked_fill(hidden, -math.inf).to(x.dtype)


def _scores(x: Tensor, scale: float, mask: Tensor | None, causal: bool | str) -> Tensor:
    """scale * x + mask, -inf where hidden."""
    scores = _wide(x) * scale
    hidden = _excluded(causal, mask, x.shape[-2] if x.dim() > 1 else 1, x.shape[-1], x.device)
    if mask is not None and mask.dtype != torch.bool:
        scores = scores + mask.to(scores.dtype)
    return scores if hidden is None else scores.masked_fill(hidden, -math.inf)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    key_mask: Tensor | None = None,
    query_lengths: Tensor | None = None,
    key_lengths: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    causal: bool | str = False,
    window: Any = None,
    align: str | None = None,
    alibi_slopes: Tensor | None = None,
    softcap: float = 0.0,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    return_lse: bool = False,
    return_weights: bool | str = False,
) -> Any:
    """softmax(scale * q k^T + mask) v, with the arguments of `tileformer.kernels.attention`."""
    (batch, heads, t_q, size), t_k, dtype = q.shape, k.shape[2], q.dtype
    scale = size**-0.5 if scale is None else scale
    if cu_seqlens_q is not None and cu_seqlens_k is not None:
        return _packed(
            q, k, v, cu_seqlens_q, cu_seqlens_k, mask=mask, bias=bias, causal=causal, window=window, align=align,
            alibi_slopes=alibi_slopes, softcap=softcap, scale=scale, dropout_p=dropout_p, seed=seed,
            return_lse=return_lse, most=(max_seqlen_q, max_seqlen_k),
        )  # fmt: skip
    if mask is not None and mask.dtype != torch.bool:
        mask, bias = None, mask
    rows, cols = torch.arange(t_q, device=q.device)[:, None], torch.arange(t_k, device=q.device)[None]
    q_len, k_len = (
        torch.tensor(t, device=q.device) if lengths is None else lengths.long().clamp(0, t)[:, None, None, None]
        for lengths, t in ((query_lengths, t_q), (key_lengths, t_k))
    )
    real_q, real_k = (rows < q_len), (cols < k_len)
    if key_mask is not None:
        real_k = real_k & key_mask[:, None, None, :]
    left, right, bottom_right = _limits(causal, window, align)
    diagonal = rows + (k_len - q_len if bottom_right else 0)
    seen = real_q & real_k
    if right is not None:
        seen = seen & (cols <= diagonal + right)
    if left is not None:
        seen = seen & (cols >= diagonal - left)
    if mask is not None:
        seen = seen & mask

    q, k, v = _wide(q), _wide(k), _wide(v)
    q = torch.where(real_q, q, 0.0)
    k, v = (torch.where(real_k.transpose(-1, -2), x, 0.0) for x in (k, v))
    group = heads // k.shape[1] if k.shape[1] else 1
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = q @ k.transpose(-1, -2) * scale
    if softcap > 0.0:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias.masked_fill(bias < LOWEST, -math.inf).to(scores.dtype)
    if alibi_slopes is not None:
        scores = scores - alibi_slopes[..., None, None].to(scores.dtype) * (diagonal - cols).abs()
    weights, lse = _softmax(scores.masked_fill(~seen, -math.inf))
    if dropout_p > 0.0:
        drawn = seed is not None and seed.dtype == torch.bool  # the bits of one packed sequence, cut from those of all
        keep = seed if seed is not None and drawn else dropout_keep(seed, (batch, heads, t_q, t_k), dropout_p)
        weights = weights * keep.to(weights.dtype) * _keep_scale(dropout_p)
    results = [torch.where(real_q, weights @ v, 0.0).to(dtype)]
    if return_lse:
        results.append(lse)
    if return_weights:
        results.append((weights.mean(1) if return_weights == "average" else weights).to(dtype))
    return tuple(results) if len(results) > 1 else results[0]


def _packed(q: Tensor, k: Tensor, v: Tensor, starts_q: Tensor, starts_k: Tensor, **options: Any) -> Any:
    """Each sequence of a packed batch by itself. Rows past the last, or past the longest allowed, belong to none."""
    (_, heads, t_q, _), p = q.shape, options["dropout_p"]
    most_q, most_k = (x.shape[2] if most is None else most for x, most in zip((q, k), options.pop("most"), strict=True))
    ends_q, ends_k = starts_q.tolist(), starts_k.tolist()
    longest_q, longest_k = (max((b - a for a, b in pairwise(x)), default=0) for x in (ends_q, ends_k))
    drawn = (len(ends_q) - 1, heads, longest_q, longest_k)
    keep = dropout_keep(options["seed"], drawn, p) if p > 0.0 and all(drawn) else None
    bits_of = lambda n, rows, cols: {} if keep is None else dict(seed=keep[n : n + 1, :, :rows, :cols])  # noqa: E731
    slopes, out, lse = options.pop("alibi_slopes"), [], []
    for n, ((a, end), (c, d)) in enumerate(zip(pairwise(ends_q), pairwise(ends_k), strict=True)):
        b, d = min(end, a + most_q), min(d, c + most_k)
        part = lambda x, cut, at: x if x is None or x.shape[at] == 1 else x.narrow(at, *cut)  # noqa: E731
        masks = {name: part(part(_four(options[name]), (a, b - a), 2), (c, d - c), 3) for name in ("mask", "bias")}
        one = attention(
            q[:, :, a:b], k[:, :, c:d], v[:, :, c:d], **(options | masks | bits_of(n, b - a, d - c)
            | dict(return_lse=True)), alibi_slopes=slopes if slopes is None or slopes.dim() == 1 else slopes[n],
        )  # fmt: skip
        rest = (t_q if n == len(ends_q) - 2 else end) - b  # rows that belong to no sequence
        out.append(F.pad(one[0], (0, 0, 0, rest)))
        lse.append(F.pad(one[1], (0, rest), value=-math.inf))
    return (torch.cat(out, 2), torch.cat(lse, 2)) if options["return_lse"] else torch.cat(out, 2)


def _four(x: Tensor | None) -> Tensor | None:
    return x if x is None else x[(None,) * (4 - x.dim())]


def decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor,
    *,
    page_table: Tensor | None = None,
    beams: int = 1,
    descends: Tensor | None = None,
    starts: Tensor | None = None,
    causal: bool = True,
    window: Any = None,
    softcap: float | None = None,
    bias: Tensor | None = None,
    scale: float | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    return_lse: bool = False,
) -> Any:
    """Attention of the newest T_q tokens over a cache, with the arguments of `tileformer.kernels.decode_attention`.

    A slot holds one key. Without `descends` slots are positions; with it, `beams` neighbouring slots, counted from the
    row's end, are a position: the distance of slot s from the newest token is (length - 1 - s) // beams.
    """
    (rows, heads, t_q, size), dtype, device = q.shape, q.dtype, q.device
    scale = size**-0.5 if scale is None else scale
    if k_scale is not None and v_scale is not None:
        k, v = k * k_scale[..., None], v * v_scale[..., None]
    if page_table is not None:
        pages = page_table.long().clamp(0, len(k) - 1)  # what lies past a row's length may name any page
        k, v = (x[pages].flatten(1, 2).transpose(1, 2) for x in (k, v))
    batch, (heads_kv, capacity) = len(lengths), k.shape[1:3]
    slot, length = torch.arange(capacity, device=device), lengths.long().clamp(0, capacity).view(-1, 1, 1, 1)
    # seen: (B, beams, T_q, slots)
    stored = slot < length
    if starts is not None:
        stored = stored & (slot >= starts.view(-1, 1, 1, 1))
    distance = torch.div(length - 1 - slot, beams if descends is not None else 1, rounding_mode="floor")
    later = torch.arange(t_q - 1, -1, -1, device=device)[:, None]  # tokens after this query
    left, right, _ = _limits(causal, window, None)
    seen = stored.expand(batch, beams, t_q, capacity)
    if right is not None:
        seen = seen & (distance >= later - right)
    if left is not None:
        seen = seen & (distance <= later + left)
    if descends is not None:
        beam = torch.arange(beams, device=device).view(-1, 1, 1)
        seen = seen & ((descends.long()[:, None, None] >> beam) & 1 == 1)

    read = seen.any(2).any(1)[:, None, :, None]
    group = heads // heads_kv
    q, k, v = _wide(q), *(torch.where(read, _wide(x), 0.0) for x in (k, v))
    k, v = (x.repeat_interleave(group, 1).repeat_interleave(beams, 0) for x in (k, v))
    scores = q @ k.transpose(-1, -2) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias.masked_fill(bias < LOWEST, -math.inf).to(scores.dtype)
    weights, lse = _softmax(scores.masked_fill(~seen.reshape(rows, 1, t_q, capacity), -math.inf))
    out = torch.where((lse == -math.inf)[..., None], 0.0, weights @ v).to(dtype)
    return (out, lse) if return_lse else out


def append_kv_cache(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    *,
    page_table: Tensor | None = None,
    beams: int = 1,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> None:
    """Store the newest T tokens of every row, one after another, as `tileformer.kernels.append_kv_cache` does.

    In 8 bits x is n * s: s = max |x| / 127 of a token's head in float32, n the integer nearest to x / s, ties to even.
    A head that is all 0 has n = s = 0, one with a value that is not finite n = 0 and s = NaN.
    """
    page_size = k_cache.shape[1]
    capacity = k_cache.shape[2] if page_table is None else page_table.shape[1] * page_size
    tokens = k.shape[2]
    for row, length in enumerate(lengths.tolist()):
        for token in range(tokens):
            for beam in range(beams):
                slot = length - (tokens - token) * beams + beam
                if not 0 <= slot < capacity:
                    continue
                if page_table is None:
                    at: Any = (row, slice(None), slot)
                else:
                    at = (int(page_table[row, slot // page_size]), slot % page_size)
                    if at[0] < 0:
                        continue
                for new, cache, scales in ((k, k_cache, k_scale), (v, v_cache, v_scale)):
                    x = new[row * beams + beam, :, token]
                    if scales is None:
                        cache[at] = x
                        continue
                    x = x.float()
                    s = torch.where(x.isfinite().all(-1), x.abs().amax(-1) / 127, math.nan)
                    n = torch.where(s[:, None] > 0, torch.round(x / s[:, None]), 0.0)
                    cache[at], scales[at] = n.clamp(-127, 127).to(torch.int8), s


def layer_norm(
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """(x - mean) / sqrt(variance + eps) * weight + bias over the last len(normalized_shape) axes (arXiv:1607.06450)."""
    axes, wide = tuple(range(-len(normalized_shape), 0)), _wide(x)
    centred = wide - wide.mean(axes, keepdim=True)
    y = centred * torch.rsqrt((centred * centred).mean(axes, keepdim=True) + eps)
    if weight is not None:
        y = y * weight.to(y.dtype)
    return (y if bias is None else y + bias.to(y.dtype)).to(x.dtype)


def rms_norm(x: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last len(normalized_shape) axes (arXiv:1910.07467)."""
    axes, wide = tuple(range(-len(normalized_shape), 0)), _wide(x)
    y = wide * torch.rsqrt((wide * wide).mean(axes, keepdim=True) + eps)
    return (y if weight is None else y * weight.to(y.dtype)).to(x.dtype)


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5, *,
    x_bias: Tensor | None = None, p: float = 0.0, seed: Tensor | None = None, norm_first: bool = True,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """total = residual + drop(x + x_bias), and its norm y, of the exact total: (y, total), or (y, y) that normalises
    last. y is in x's dtype beside a total, which carries the wider of the dtypes of x and residual."""
    return _add_norm(layer_norm, x, residual, (weight, bias, eps), x_bias, p, seed, norm_first)


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None = None, eps: float = 1e-5, **options: Any
) -> tuple[Tensor, Tensor]:
    """`add_layer_norm` with the RMS norm."""
    keys = ("x_bias", "p", "seed", "norm_first")
    defaults = dict(x_bias=None, p=0.0, seed=None, norm_first=True) | options
    return _add_norm(rms_norm, x, residual, (weight, eps), *(defaults[key] for key in keys))


def _add_norm(
    norm: Callable[..., Tensor], x: Tensor, residual: Tensor, params: Sequence[Tensor | float | None],
    x_bias: Tensor | None, p: float, seed: Tensor | None, norm_first: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    stream, branch = torch.promote_types(x.dtype, residual.dtype), _wide(x)
    total = dropout(branch if x_bias is None else branch + x_bias, p, seed=seed, residual=_wide(residual))
    y = norm(total, total.shape[-1:], *params)
    return (y.to(x.dtype), total.to(stream)) if norm_first else (y.to(stream),) * 2


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
) -> Tensor:
    """Cross-entropy of class indices, as torch.nn.functional.cross_entropy defines it, with a z-loss and a soft cap.

    With w the class weights (1 without), e the smoothing, z the z-loss and V classes, a row with target y has the loss
    (1 - e) w_y (lse - x_y) + (e / V) sum_j w_j (lse - x_j) + z lse^2, where x is softcap * tanh(logits / softcap) if
    there is one; "mean" divides by the sum of w_y over rows that count.
    """
    if logits.dim() == 1:
        return cross_entropy(
            logits[None], target[None], weight=weight, ignore_index=ignore_index, z_loss=z_loss, softcap=softcap,
            reduction="sum" if reduction == "none" else reduction, label_smoothing=label_smoothing,
        )  # fmt: skip
    counted, dtype = target != ignore_index, logits.dtype
    safe = torch.where(counted, target, 0)
    logits = torch.where(counted[:, None], _wide(logits), 0.0)
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    weights = logits.new_ones(logits.shape[1]) if weight is None else weight.to(logits.dtype)
    log_p = logits - _softmax(logits)[1][:, None]
    target_loss = -weights[safe] * log_p.gather(1, safe[:, None])[:, 0]
    loss = (1 - label_smoothing) * target_loss
    if label_smoothing > 0.0:  # without it, a logit of -inf that is no target costs nothing; 0 * inf would
        loss = loss - label_smoothing * (log_p * weights).sum(1) / logits.shape[1]
    if z_loss:
        loss = loss + z_loss * _softmax(logits)[1] ** 2
    loss = torch.where(counted, loss, 0.0)
    if reduction != "none":
        loss = loss.sum() / torch.where(counted, weights[safe], 0.0).sum() if reduction == "mean" else loss.sum()
    return loss.to(dtype)


def linear_cross_entropy(
    input: Tensor, linear_weight: Tensor, target: Tensor, *, linear_bias: Tensor | None = None, **options: Any
) -> Tensor:
    """`cross_entropy` of input linear_weight^T + linear_bias, rounded to the inputs' dtype as logits are; of an ignored
    row the input is not read either."""
    counted = (target != options.get("ignore_index", -100)).unsqueeze(-1)
    logits = torch.where(counted, _wide(input), 0.0) @ _wide(linear_weight).T
    logits = logits if linear_bias is None else logits + _wide(linear_bias)
    return cross_entropy(logits.to(input.dtype), target, **options)


def dropout(x: Tensor, p: float, *, seed: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
    """residual + keep * x / (1 - p), x seen as rows (R, N) of its last axis."""
    dtype, x = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype), _wide(x)
    if p > 0.0:
        keep = dropout_keep(seed, (x.numel() // max(x.shape[-1], 1), x.shape[-1]), p).view(x.shape)
        x = x * keep.to(x.dtype) * _keep_scale(p)
    return (x if residual is None else residual + x).to(dtype)


def bias_activation_dropout(
    x: Tensor, activation: str, *, bias: Tensor | None = None, up: Tensor | None = None, p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """drop(activation(x + bias) * up), rows as in `dropout`; "gelu_tanh" is that of arXiv:1606.08415."""
    z = _wide(x) if bias is None else _wide(x) + bias.to(_wide(x).dtype)
    y = z.relu() if activation == "relu" else z * torch.sigmoid(z)
    if activation == "gelu":
        y = z * (1 + torch.erf(z / math.sqrt(2))) / 2
    elif activation == "gelu_tanh":
        y = z * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3))) / 2
    return dropout(y if up is None else y * _wide(up), p, seed=seed).to(x.dtype)


def rotary(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> Tensor:
    """The first R elements of each head, as R / 2 complex numbers, times exp(i angle) (arXiv:2104.09864)."""
    turned = _wide(x[..., : 2 * cos.shape[-1]])
    angle = torch.complex(cos.to(turned.dtype), sin.to(turned.dtype)).unsqueeze(-3)
    size, axis = ((-1, 2), -1) if interleaved else ((2, -1), -2)
    product = torch.complex(*turned.unflatten(-1, size).unbind(axis)) * angle
    turned = torch.stack([product.real, product.imag], axis).flatten(-2)
    return torch.cat([turned.to(x.dtype), x[..., 2 * cos.shape[-1] :]], -1)


def dropout_keep(seed: Tensor | None, shape: Sequence[int], p: float) -> Tensor:
    """The keep mask (boolean, of `shape` (..., rows, columns)) that the kernels draw for this seed and rate.

    Philox-4x32-7 (Salmon et al., SC 2011): key = seed; counter = (column // 4, leading index, row, 0); word column % 4.
    A bit depends on nothing else: not on the tile, the layout or the sequence length.
    """
    if seed is None:
        raise ValueError("the reference needs the seed of the draw it reproduces, got None")
    *lead, rows, cols = shape
    heads = math.prod(lead)
    words = -(-cols // 4)
    index = lambda n, *view: torch.arange(n, device=seed.device).view(view)  # noqa: E731
    low, high = seed & _MASK, (seed >> 32) & _MASK
    zero = torch.zeros((), dtype=torch.int64, device=seed.device)
    drawn = _philox(low, high, index(words, 1, 1, -1), index(heads, -1, 1, 1), index(rows, 1, -1, 1), zero)
    word = torch.stack(torch.broadcast_tensors(*drawn), -1).expand(heads, rows, words, 4)
    return ((word >> 1) >= _threshold(p)).reshape(heads, rows, 4 * words)[..., :cols].reshape(tuple(shape))


def _threshold(p: float) -> int:
    """Words whose upper 31 bits lie below are dropped. For p = 1 the highest stays, and `_keep_scale` makes it 0."""
    return min(math.floor(p * 2**31), 2**31 - 1)


def _keep_scale(p: float) -> float:
    return 0.0 if p == 1.0 else 1.0 / (1.0 - p)


_MASK = 0xFFFFFFFF


def _philox(
    k0: Tensor, k1: Tensor, c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor, rounds: int = 7
) -> tuple[Tensor, ...]:
    for _ in range(rounds):  # products of 32-bit words wrap in int64, which keeps both halves' bits
        a, b = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (b >> 32 & _MASK) ^ c1 ^ k0, b & _MASK, (a >> 32 & _MASK) ^ c3 ^ k1, a & _MASK
        k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    return c0, c1, c2, c3
