"""Attention: softmax(scale * q k^T + mask) v, forward and backward, without the T_q x T_k scores in memory.

`forward.py` and `backward.py` hold the kernels and their maths, `tiles.py` the tile tables; here are the launchers, the autograd Functions, the
plain-torch backend and the public op.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tileformer.kernels import bits, reference
from tileformer.kernels.attention.arguments import check_attention
from tileformer.kernels.attention.backward import _attention_bwd_dkdv_kernel, _attention_bwd_dq_kernel
from tileformer.kernels.attention.forward import _attention_fwd_kernel, _key_range_kernel
from tileformer.kernels.attention.plain import torch_attention
from tileformer.kernels.attention.tiles import BACKWARD_DKDV, BACKWARD_DQ, FORWARD, tiles_for
from tileformer.kernels.backend import choose
from tileformer.kernels.launch import arch_of, cdiv, dot_flags, launch, pow2, register
from tileformer.kernels.second import second_derivative
from tileformer.kernels.steps import LN2

FARTHEST = 2**23  # elements between neighbours of a tile: its offsets have 32 bits, and a tile has at most 128 rows
NO_SHIFT = 2**30  # a causal shift that hides nothing; also what says "not causal" to the launchers


def _heads_last(b: int, h: int, t: int, d: int, like: Tensor) -> Tensor:
    """An empty (B, H, T, D) tensor stored as (B, T, H, D), so that joining the heads afterwards copies nothing."""
    return torch.empty((b, t, h, d), dtype=like.dtype, device=like.device).transpose(1, 2)


def _bytes(mask: Tensor) -> Tensor:
    """A boolean mask as uint8, which is what a kernel can load; a floating one as it is."""
    return mask.view(torch.uint8) if mask.dtype == torch.bool else mask


def _rows_contiguous(x: Tensor) -> Tensor:
    near = x.stride(-2) < FARTHEST
    return x if near and (x.stride(-1) == 1 or x.shape[-1] == 1) else x.contiguous()


def _problem(
    q: Tensor,
    k: Tensor,
    mask: Tensor | None,
    key_mask: Tensor | None,
    seed: Tensor | None,
    causal_shift: int,
    scale: float,
    p: float,
) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[int, ...], tuple[Any, ...], dict[str, Any], str]:
    """What all three kernels share: side tensors, mask strides, scalars, feature flags and the tile table's feature."""
    (b, h, t_q, d), h_kv, t_k = q.shape, k.shape[1], k.shape[2]
    if mask is not None and max(mask.stride()[-2:], default=0) >= FARTHEST:
        mask = mask.contiguous()
    # Where there is none, q stands in: its pointer is never read.
    sides = (
        q if mask is None else _bytes(mask),
        q if key_mask is None else _bytes(key_mask.contiguous()),
        q if seed is None else seed,
    )
    mask_strides = mask.expand(b, h, t_q, t_k).stride() if mask is not None else (0, 0, 0, 0)
    scalars = (h, h // h_kv, t_q, t_k, causal_shift, scale, bits.threshold(p), bits.keep_scale(p))
    flags = dict(
        CAUSAL=causal_shift != NO_SHIFT,
        MASK=0 if mask is None else 1 if mask.dtype == torch.bool else 2,
        KEY_MASK=key_mask is not None,
        DROPOUT=p > 0.0,
        D=d,
        **dot_flags(q),
        BLOCK_D=pow2(d, 16),
    )
    feature = ("both" if mask is not None else "dropout") if p > 0.0 else "mask" if mask is not None else "plain"
    return sides, mask_strides, scalars, flags, feature


def attention_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    key_mask: Tensor | None,
    seed: Tensor | None,
    causal_shift: int,
    scale: float,
    p: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output (B, H, T_q, D), base-2 log-sum-exp (B, H, T_q) and, with a key mask, the key range of each batch (B, 3)."""
    q, k, v = map(_rows_contiguous, (q, k, v))
    (b, h, t_q, d), t_k = q.shape, k.shape[2]
    out, lse, ranges = _attention_fwd_fake(q, k, v, mask, key_mask, seed, causal_shift, scale, p)
    (mask_, key_mask_, seed_), mask_strides, scalars, flags, feature = _problem(
        q, k, mask, key_mask, seed, causal_shift, scale, p
    )
    if key_mask is not None:
        launch(_key_range_kernel, lambda _: (b,), q, (key_mask_, ranges, t_k), {}, [dict(BLOCK=1024, num_warps=4)])
    launch(
        _attention_fwd_kernel,
        lambda tile: (b * h * cdiv(t_q, tile["BLOCK_M"]),),
        q,
        (
            q,
            k,
            v,
            mask_,
            key_mask_,
            ranges,
            seed_,
            out,
            lse,
            q.stride(),
            k.stride(),
            v.stride(),
            mask_strides,
            *scalars,
        ),
        flags,
        tiles_for(FORWARD, arch_of(q), d, q.dtype, feature),
    )
    return out, lse, ranges


def _attention_fwd_fake(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, key_mask: Tensor | None, seed: Tensor | None,
    causal_shift: int, scale: float, p: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    (b, h, t_q, d) = q.shape
    lse = torch.empty((b, h, t_q), dtype=torch.promote_types(q.dtype, torch.float32), device=q.device)
    ranges = torch.empty((b if key_mask is not None else 0, 3), dtype=torch.int32, device=q.device)
    return _heads_last(b, h, t_q, d, q), lse, ranges


def attention_bwd(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    ranges: Tensor,
    mask: Tensor | None,
    key_mask: Tensor | None,
    seed: Tensor | None,
    causal_shift: int,
    scale: float,
    p: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k, v. dlse is the gradient of the base-2 log-sum-exp."""
    dout, q, k, v = map(_rows_contiguous, (dout, q, k, v))
    (b, h, t_q, d), h_kv, t_k = q.shape, k.shape[1], k.shape[2]
    dq, dk, dv = _heads_last(b, h, t_q, d, q), _heads_last(b, h_kv, t_k, d, k), _heads_last(b, h_kv, t_k, d, v)
    safe_lse, delta = (torch.empty(lse.shape, dtype=lse.dtype, device=lse.device) for _ in range(2))
    lse, out = lse.contiguous(), out.transpose(1, 2).contiguous()
    sides, mask_strides, scalars, flags, feature = _problem(q, k, mask, key_mask, seed, causal_shift, scale, p)
    mask_, key_mask_, seed_ = sides
    dlse_ = lse if dlse is None else dlse.contiguous()
    strides = (q.stride(), k.stride(), v.stride(), dout.stride(), mask_strides)
    launch(
        _attention_bwd_dq_kernel,
        lambda tile: (b * h * cdiv(t_q, tile["BLOCK_M"]),),
        q,
        (q, k, v, mask_, key_mask_, ranges, seed_, out, dout, lse, dlse_, dq, safe_lse, delta, *strides, *scalars),
        dict(flags, DLSE=dlse is not None),
        tiles_for(BACKWARD_DQ, arch_of(q), d, q.dtype, feature),
    )
    launch(
        _attention_bwd_dkdv_kernel,
        lambda tile: (b * h_kv * cdiv(t_k, tile["BLOCK_N"]),),
        q,
        (q, k, v, mask_, key_mask_, ranges, seed_, dout, safe_lse, delta, dk, dv, *strides, *scalars),
        flags,
        tiles_for(BACKWARD_DKDV, arch_of(q), d, q.dtype, feature),
    )
    return dq, dk, dv


def _attention_bwd_fake(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    return tuple(_heads_last(x.shape[0], x.shape[1], x.shape[2], x.shape[3], x) for x in (q, k, v))


_fwd = register(attention_fwd, _attention_fwd_fake)
_bwd = register(attention_bwd, _attention_bwd_fake)


class _Attention(torch.autograd.Function):
    """(out, lse2, key ranges); differentiable in q, k, v through out and lse2."""

    generate_vmap_rule = True

    @staticmethod
    def forward(q, k, v, mask, key_mask, seed, causal_shift, scale, p):
        return _fwd(q, k, v, mask, key_mask, seed, causal_shift, scale, p)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.causal_shift, ctx.scale, ctx.p = inputs
        ctx.save_for_backward(*tensors, *output)
        ctx.mark_non_differentiable(output[2])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, dout, dlse, _):
        q, k, v, mask, key_mask, seed, out, lse, ranges = ctx.saved_tensors
        if dout is None:
            dout = torch.zeros_like(out) if dlse is not None else None
        if dout is None:
            return (None,) * 9
        grads = _AttentionBackward.apply(
            dout, dlse, q, k, v, out, lse, ranges, mask, key_mask, seed, ctx.causal_shift, ctx.scale, ctx.p
        )
        return *grads, None, None, None, None, None, None


class _AttentionBackward(torch.autograd.Function):
    """The fused backward; its own derivative differentiates the reference twice, so it is right, and needs T_q x T_k memory."""

    generate_vmap_rule = True

    @staticmethod
    def forward(dout, dlse, q, k, v, out, lse, ranges, mask, key_mask, seed, causal_shift, scale, p):
        return _bwd(dout, dlse, q, k, v, out, lse, ranges, mask, key_mask, seed, causal_shift, scale, p)

    @staticmethod
    def setup_context(ctx, inputs, output):
        dout, dlse, q, k, v, _, _, _, mask, key_mask, seed, ctx.causal_shift, ctx.scale, ctx.p = inputs
        ctx.save_for_backward(dout, dlse, q, k, v, mask, key_mask, seed)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, *tangents):
        dout, dlse, q, k, v, mask, key_mask, seed = ctx.saved_tensors

        def outputs(q, k, v):
            out, lse = reference.attention(
                q, k, v, mask=mask, key_mask=key_mask, causal=_alignment(ctx.causal_shift, q, k), scale=ctx.scale,
                dropout_p=ctx.p, seed=seed, return_lse=True,
            )  # fmt: skip
            return (out,) if dlse is None else (out, lse / LN2)

        cotangents = (dout,) if dlse is None else (dout, dlse)
        first, second = second_derivative(outputs, (q, k, v), cotangents, tangents)
        ddlse = None if dlse is None else second[1]
        return second[0], ddlse, *first, None, None, None, None, None, None, None, None, None


def _alignment(causal_shift: int, q: Tensor, k: Tensor) -> bool | str:
    if causal_shift == NO_SHIFT:
        return False
    return "top_left" if causal_shift == 0 else "bottom_right"


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    key_mask: Tensor | None = None,
    causal: bool | str = False,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    return_lse: bool = False,
) -> Any:  # Tensor, or (Tensor, Tensor) with return_lse
    """softmax(scale * q k^T + mask) v. All restrictions combine: a query sees a key that each of them allows.

    Args:
        q: (B, H, T_q, D), D from 1 to 256; float16, bfloat16 or float32 (float64 on the CPU's backends). Any strides; no copy if the last is 1.
        k, v: (B, H_kv, T_k, D), H a multiple of H_kv: query head h reads head h // (H / H_kv).
        mask: broadcastable to (B, H, T_q, T_k); boolean (True = may attend) or floating (added to the scaled scores). Read through its strides.
        key_mask: boolean (B, T_k), True = a real key; padded keys are not even loaded.
        causal: False, True or "top_left" (row i sees keys j <= i), or "bottom_right" (j <= i + T_k - T_q).
        scale: 1 / sqrt(D) when None.
        dropout_p: probability of dropping an attention weight, applied as given (a module passes 0 in evaluation).
        seed: int64 tensor with one element on q's device, for reproducible dropout; drawn from torch's generator when None.
        return_lse: also return the natural log-sum-exp of the scores (B, H, T_q), in float32 (float64 for float64), differentiable.

    Returns:
        (B, H, T_q, D) in q's dtype (autocast's dtype under autocast). A row that may attend to nothing is 0 and its log-sum-exp -inf.

    Raises:
        ValueError, TypeError: for shapes, dtypes or devices that do not fit, before anything runs.
        NotImplementedError: for a floating mask that requires a gradient on the triton and interpret backends.

    Source: FlashAttention-2, arXiv:2307.08691; `tileformer.kernels.reference.attention` is the definition.
    """
    if torch.is_autocast_enabled(q.device.type):
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v = (x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x for x in (q, k, v))
    backend = choose("attention", q)
    check_attention(q, k, v, mask, key_mask, causal, dropout_p, seed, backend)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    if dropout_p > 0.0 and seed is None:
        seed = bits.new_seed(q.device)
    if backend == "reference":
        return reference.attention(
            q,
            k,
            v,
            mask=mask,
            key_mask=key_mask,
            causal=causal,
            scale=scale,
            dropout_p=dropout_p,
            seed=seed,
            return_lse=return_lse,
        )
    if backend == "torch":
        return torch_attention(q, k, v, mask, key_mask, causal, scale, dropout_p, seed, return_lse)
    shift = reference.causal_shift(causal, q.shape[2], k.shape[2])
    if scale < 0:  # the kernels take the maximum before they scale
        q, scale = -q, -scale
    out, lse, _ = _Attention.apply(
        q, k, v, mask, key_mask, seed, NO_SHIFT if shift is None else shift, scale, dropout_p
    )
    return (out, lse * LN2) if return_lse else out


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`attention` with the signature of `torch.nn.functional.scaled_dot_product_attention`.

    Args:
        query, key, value: (..., H, T, D); leading axes are folded into the batch. (T, D) and (H, T, D) are taken as one batch.
        attn_mask: broadcastable to (..., H, T_q, T_k), True = may attend, or added.
        is_causal: top-left aligned, as in torch; combines with attn_mask.
        enable_gqa: allow fewer key heads than query heads.

    Raises:
        ValueError: as `attention`, and for unequal head counts without enable_gqa.
    """
    if query.dim() >= 3 and not enable_gqa and query.shape[-3] != key.shape[-3]:
        raise ValueError(
            f"scaled_dot_product_attention: {query.shape[-3]} query heads and {key.shape[-3]} key heads: pass enable_gqa=True"
        )
    lead = query.shape[:-3]

    def fold(x: Tensor) -> Tensor:
        return x[(None,) * (4 - x.dim())] if x.dim() < 4 else x.flatten(0, -4)

    if attn_mask is not None and attn_mask.dim() > 4:
        attn_mask = attn_mask.expand(*lead, *attn_mask.shape[-3:]).flatten(0, -4)
    out = attention(
        fold(query), fold(key), fold(value), mask=attn_mask, causal=is_causal, scale=scale, dropout_p=dropout_p
    )
    return out.reshape(*query.shape[:-1], value.shape[-1])
