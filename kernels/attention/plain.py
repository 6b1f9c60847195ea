"""Attention in plain torch operators: what the CPU uses by default, with the reference's rules for padding and empty rows."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from tileformer.kernels import bits

FUSED_FROM = 512  # keys from which torch's fused attention beats three plain operators on a CPU


def torch_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    key_mask: Tensor | None,
    causal: bool | str,
    scale: float,
    p: float,
    seed: Tensor | None,
    return_lse: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    """Two matmuls around a float32 softmax. torch's fused attention is used only where it has nothing to mask but a square triangle."""
    t_q, t_k = q.shape[2], k.shape[2]
    group = q.shape[1] // k.shape[1]
    if group > 1:
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    square = not causal or t_q == t_k
    if mask is None and key_mask is None and p == 0.0 and not return_lse and square and t_k >= FUSED_FROM:
        return F.scaled_dot_product_attention(q, k, v, is_causal=bool(causal), scale=scale)
    dtype, wide = q.dtype, torch.promote_types(q.dtype, torch.float32)
    if return_lse:  # a log-sum-exp of rounded scores would not be a float32 result
        q, k = q.to(wide), k.to(wide)
    if key_mask is not None:
        padded = ~key_mask[:, None, :, None]
        k, v = k.masked_fill(padded, 0.0), v.masked_fill(padded, 0.0)
    bias, empty = _bias(mask, key_mask, causal, t_q, t_k, wide, q.device)
    scores = (q * scale) @ k.transpose(-1, -2)
    if bias is not None:
        scores = scores + bias
    weights = torch.softmax(scores, -1, dtype=wide).to(dtype)
    if p > 0.0:
        weights = weights * bits.fast_keep(seed, weights.shape, p, weights.dtype)
    out = weights @ v
    if empty is not None:
        out = out.masked_fill(empty, 0.0)
    if not return_lse:
        return out
    lse = torch.logsumexp(scores, -1)
    return out, lse if empty is None else lse.masked_fill(empty[..., 0], -math.inf)


def _bias(
    mask: Tensor | None, key_mask: Tensor | None, causal: bool | str, t_q: int, t_k: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor | None, Tensor | None]:
    """What to add to the scores, and which rows see nothing; both broadcastable to (B, H, T_q, T_k), or None.

    A row that sees nothing gets a bias of 0, so that its softmax is finite: its output is set to 0 afterwards.
    """
    seen = []
    if causal:
        shift = t_k - t_q if causal == "bottom_right" else 0
        seen.append(torch.ones(t_q, t_k, dtype=torch.bool, device=device).tril(shift))
    if key_mask is not None:
        seen.append(key_mask[:, None, None, :])
    additive = mask is not None and mask.dtype != torch.bool
    if mask is not None:
        seen.append(mask != -math.inf if additive else mask)
    if not seen:
        return None, None
    allowed = seen[0]
    for more in seen[1:]:
        allowed = allowed & more
    if mask is None and key_mask is None and (t_q <= t_k or causal != "bottom_right"):
        empty = None  # every row sees at least its first key
    else:
        empty = ~allowed.any(-1, keepdim=True)
        allowed = allowed | empty
    bias = torch.zeros((), dtype=dtype, device=device).where(allowed, -math.inf)
    if additive:
        bias = bias + mask.to(dtype).masked_fill(mask == -math.inf, 0.0)
    return bias, empty
