"""Attention in plain torch operators: what the CPU uses by default, with the reference's rules for padding and empty rows.

A decoder's CPU batches are short sequences, where the cost is passes over small rows and autograd's bookkeeping, not matmuls: forward and backward
are written out, in place where a tensor is ours.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from tileformer.kernels import bits
from tileformer.kernels.reference import LOWEST
from tileformer.kernels.second import second_derivative

FUSED_FROM = 512  # keys from which torch's fused attention beats three plain operators on a CPU
SHORT_ROW = (
    16  # torch's softmax leaves its vectorised path for rows shorter than a vector: 20 ns an element instead of 1
)


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
    (b, h, t_q, _), t_k = q.shape, k.shape[2]
    group = h // k.shape[1]
    if group > 1:
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    square = not causal or t_q == t_k
    if mask is None and key_mask is None and p == 0.0 and not return_lse and square and t_k >= FUSED_FROM:
        return F.scaled_dot_product_attention(q, k, v, is_causal=bool(causal), scale=scale)
    bias, empty = _bias(mask, key_mask, causal, t_q, t_k, _wide(q), q.device)
    keep = None if seed is None or p == 0.0 else bits.fast_keep(seed, [b, h, t_q, t_k], p, _wide(q))
    if return_lse or (mask is not None and mask.requires_grad):
        out, lse = _definition(q, k, v, key_mask, bias, empty, keep, scale)
        return (out, lse) if return_lse else out
    return _Plain.apply(q, k, v, key_mask, bias, empty, keep, scale)[0]


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _bias(
    mask: Tensor | None,
    key_mask: Tensor | None,
    causal: bool | str,
    t_q: int,
    t_k: int,
    dtype: torch.dtype,
    device: torch.device,
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
        mask = mask.to(dtype) if additive else mask
        seen.append(mask >= LOWEST if additive else mask)
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
    if mask is not None and additive:
        bias = bias + mask.masked_fill(mask < LOWEST, 0.0)
    return bias, empty


def _definition(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    bias: Tensor | None,
    empty: Tensor | None,
    keep: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp by differentiable operators, scores in float32 or wider."""
    dtype, wide = q.dtype, _wide(q)
    if key_mask is not None:
        padded = ~key_mask[:, None, :, None]
        k, v = k.masked_fill(padded, 0.0), v.masked_fill(padded, 0.0)
    scores = (q.to(wide) * scale) @ k.to(wide).transpose(-1, -2)
    scores = scores if bias is None else scores + bias
    weights = torch.softmax(scores, -1)
    weights = weights if keep is None else weights * keep
    out, lse = weights.to(dtype) @ v, torch.logsumexp(scores, -1)
    return (out, lse) if empty is None else (out.masked_fill(empty, 0.0), lse.masked_fill(empty[..., 0], -math.inf))


def _zero_padding(x: Tensor, key_mask: Tensor) -> Tensor:
    """x with 0 in padded rows, NaN or not: an integer AND, a quarter of the cost of masked_fill."""
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[x.dtype.itemsize]
    ones_or_zeros = -key_mask[:, None, :, None].to(integer)
    return (x.view(integer) & ones_or_zeros).view(x.dtype)


def _softmax_(scores: Tensor) -> Tensor:
    """Softmax over the last axis, which may overwrite its argument."""
    if not 0 < scores.shape[-1] < SHORT_ROW:
        return torch.softmax(scores, -1)
    weights = scores.sub_(scores.amax(-1, keepdim=True)).exp_()
    return weights.div_(_row_sum(weights))


def _row_sum(x: Tensor) -> Tensor:
    """Sum over a short last axis, kept: a matmul with ones, which needs no reduction loop for each row."""
    return (x.flatten(0, -2) @ x.new_ones(x.shape[-1], 1)).view(*x.shape[:-1], 1)


class _Plain(torch.autograd.Function):
    """(out, softmax weights before dropout); differentiable in q, k, v through out."""

    generate_vmap_rule = True

    @staticmethod
    def forward(q, k, v, key_mask, bias, empty, keep, scale):
        if key_mask is not None:
            k, v = _zero_padding(k, key_mask), _zero_padding(v, key_mask)
        scores = (q @ k.transpose(-1, -2)).to(_wide(q)).mul_(scale)
        weights = _softmax_(scores if bias is None else scores.add_(bias))
        out = (weights if keep is None else weights * keep).to(q.dtype) @ v
        return out if empty is None else out.masked_fill_(empty, 0.0), weights

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.scale = inputs
        ctx.save_for_backward(output[1], *tensors)
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, dout, _):
        if dout is None:
            return (None,) * 8
        return *_PlainBackward.apply(dout, *ctx.saved_tensors, ctx.scale), None, None, None, None, None


class _PlainBackward(torch.autograd.Function):
    """Gradients of q, k, v; their own derivative differentiates `_definition` twice."""

    generate_vmap_rule = True

    @staticmethod
    def forward(dout, weights, q, k, v, key_mask, bias, empty, keep, scale):
        if key_mask is not None:
            k, v = _zero_padding(k, key_mask), _zero_padding(v, key_mask)
        if empty is not None:
            dout = dout.masked_fill(empty, 0.0)
        dropped = (weights if keep is None else weights * keep).to(q.dtype)
        dv = dropped.transpose(-1, -2) @ dout
        dp = (dout @ v.transpose(-1, -2)).to(weights.dtype)
        dp = dp if keep is None else dp.mul_(keep)
        ds = dp.sub_(_row_sum(dp * weights)).mul_(weights).mul_(scale).to(q.dtype)
        return ds @ k, ds.transpose(-1, -2) @ q, dv

    @staticmethod
    def setup_context(ctx, inputs, output):
        dout, _, *tensors, ctx.scale = inputs
        ctx.save_for_backward(dout, *tensors)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, *tangents):
        dout, q, k, v, *fixed = ctx.saved_tensors
        first, (ddout,) = second_derivative(
            lambda q, k, v: _definition(q, k, v, *fixed, ctx.scale)[:1], (q, k, v), (dout,), tangents
        )
        return ddout, None, *first, None, None, None, None, None
