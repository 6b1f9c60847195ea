"""Attention: softmax(scale * q k^T + bias) v, forward and backward, without the T_q x T_k scores in memory.

`mask.py`, `forward.py`, `backward.py` and `weights.py` hold the kernels and their maths, `tiles.py` the tile tables,
`launchers.py` the registered ops, `torch_backend.py` the plain-torch backend, `params.py` what travels between them;
here are the autograd Functions and the public op.
"""

import typing
from typing import Any, Literal, NoReturn, TypedDict, overload

import torch
from torch import Tensor

from tileformer.kernels import checks, random, reference
from tileformer.kernels.attention.launchers import attention_bwd, attention_fwd, attention_weights, bwd, fwd, weights_of
from tileformer.kernels.attention.params import (
    NO_LIMIT,
    AttentionMasks,
    AttentionParams,
    check_attention,
    limits,
    parts_of_rows,
)  # fmt: skip
from tileformer.kernels.attention.torch_backend import fused_attention, fused_serves, torch_attention
from tileformer.kernels.autograd import Function, KernelFunction
from tileformer.kernels.backend import choose, current_backend
from tileformer.kernels.double_backward import backward_function, differentiated
from tileformer.kernels.subclasses import attention_on_shards, is_special
from tileformer.kernels.tile_ops import LN2

_NO_GRADIENTS = (None,) * 7  # of key_mask, q_lens, k_lens, slopes, seed and the two lists of numbers


class _Attention(Function):
    """(out, lse2, bounds); differentiable in q, k, v and the bias through out and lse2."""

    forward = fwd

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ints, floats = inputs
        ctx.params = AttentionParams(*ints, *floats)
        ctx.save_for_backward(*tensors, *output)
        ctx.mark_non_differentiable(output[2])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, dout, dlse, _):
        *tensors, out, lse, bounds = ctx.saved_tensors
        if dout is None and dlse is None:
            return (None,) * 5 + _NO_GRADIENTS
        dout = torch.zeros_like(out) if dout is None else dout
        *grads, dbias = _attention_backward(dout, dlse, out, lse, bounds, *tensors, *ctx.params.flat())
        return *grads, None, dbias if ctx.params.bias_grad else None, *_NO_GRADIENTS


def _definition(out, lse, bounds, q, k, v, *rest):
    options = _reference_options(AttentionMasks(*rest[:7]), AttentionParams(*rest[7], *rest[8]))
    out, lse = reference.attention(q, k, v, **options, return_lse=True)
    return out, lse / LN2


def _weights_definition(lse, bounds, average, q, k, v, *rest):
    options = _reference_options(AttentionMasks(*rest[:7]), AttentionParams(*rest[7], *rest[8]))
    _, weights = reference.attention(q, k, v.to(q.dtype), **options, return_weights=True)
    return (weights.mean(1, keepdim=True) if average else weights,)


_attention_forward = KernelFunction(attention_fwd, _Attention)
_backward = backward_function(bwd, _definition, primals=(5, 6, 7, 9), outputs=2)
_attention_backward = KernelFunction(attention_bwd, _backward)
_weights = differentiated(weights_of, _weights_definition, primals=(3, 4, 7))
_attention_weights = KernelFunction(attention_weights, _weights)


class _Options(TypedDict, total=False):
    """The other options of `attention`, for type checkers, which alone read `Unpack`: Python 3.11 brought it."""

    mask: Tensor | None
    bias: Tensor | None
    key_mask: Tensor | None
    query_lengths: Tensor | None
    key_lengths: Tensor | None
    cu_seqlens_q: Tensor | None
    cu_seqlens_k: Tensor | None
    max_seqlen_q: int | None
    max_seqlen_k: int | None
    causal: checks.Causal
    window: int | tuple[int | None, int | None] | None
    align: checks.Align | None
    alibi_slopes: Tensor | None
    softcap: float
    scale: float | None
    dropout_p: float
    seed: Tensor | int | None


def _reference_options(masks: AttentionMasks, params: AttentionParams) -> dict[str, Any]:
    """The options of `reference.attention`."""
    names = ("cu_seqlens_q", "cu_seqlens_k") if params.packed else ("query_lengths", "key_lengths")
    return dict(
        mask=masks.mask, bias=masks.bias, key_mask=masks.key_mask, alibi_slopes=masks.slopes, seed=masks.seed,
        **dict(zip(names, (masks.q_lens, masks.k_lens), strict=True)), align="bottom_right" if params.align else None,
        window=tuple(None if side == NO_LIMIT else side for side in (params.left, params.right)), scale=params.scale,
        softcap=params.softcap, dropout_p=params.dropout_p, max_seqlen_q=params.max_q, max_seqlen_k=params.max_k,
    )  # fmt: skip


@overload
def attention(
    q: Tensor, k: Tensor, v: Tensor, *, return_lse: Literal[False] = ..., return_weights: Literal[False] = ...,
    **options: "typing.Unpack[_Options]",
) -> Tensor: ...  # fmt: skip
@overload
def attention(
    q: Tensor, k: Tensor, v: Tensor, *, return_lse: bool = ..., return_weights: bool | Literal["average"] = ...,
    **options: "typing.Unpack[_Options]",
) -> Any: ...  # fmt: skip  # a tuple of the output and what else was asked for
def attention(
    q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None, bias: Tensor | None = None,
    key_mask: Tensor | None = None, query_lengths: Tensor | None = None, key_lengths: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None, cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None, max_seqlen_k: int | None = None, causal: checks.Causal = False,
    window: int | tuple[int | None, int | None] | None = None, align: checks.Align | None = None,
    alibi_slopes: Tensor | None = None, softcap: float = 0.0, scale: float | None = None,
    dropout_p: float = 0.0, seed: Tensor | int | None = None,
    return_lse: bool = False, return_weights: bool | Literal["average"] = False, **wrong: NoReturn,
) -> Any:  # fmt: skip
    """softmax(scale * q k^T + mask) v. All restrictions combine: a query sees a key that each of them allows.

    Args:
        q: (B, H, T_q, D), D from 1 to 256; float16, bfloat16 or float32 (float64 on the CPU's backends). Any strides,
            no copy if the last is 1.
        k: (B, H_kv, T_k, D), H a multiple of H_kv: query head h reads head h // (H / H_kv).
        v: (B, H_kv, T_k, D_v), D_v from 1 to 256.
        mask: broadcastable to (B, H, T_q, T_k); boolean (True = may attend) or floating (the same as `bias`), read
            through its strides. A `torch.nn.attention.bias.CausalBias` is read as the `causal` that it names.
        bias: floating, broadcastable to (B, H, T_q, T_k), added to the scaled scores; it gets a gradient.
        key_mask: boolean (B, T_k), True = a real key; padded keys are not even loaded.
        query_lengths, key_lengths: integers (B,): what lies past them is padding; such a query's row is 0.
        cu_seqlens_q, cu_seqlens_k: int32 or int64 (sequences + 1,), ascending from 0, for packed sequences: B is 1, and
            sequence n has queries cu_seqlens_q[n] to cu_seqlens_q[n + 1], and so its keys. Rows past the last are 0.
        max_seqlen_q, max_seqlen_k: upper bounds of the packed lengths (T_q and T_k when None, which costs idle
            programs). A sequence that is longer ends there: what lies past it belongs to none.
        causal: False, True or "top_left" (row i sees keys j <= i), or "bottom_right" (j <= i + T_k - T_q, of each
            sequence where it has lengths).
        window: (left, right), how many keys row i sees before and after its diagonal; None is no limit, one number
            means both.
        align: where the diagonal of `window` and `alibi_slopes` lies, "top_left" or "bottom_right"; a named `causal`
            says it too.
        alibi_slopes: (H,) or (B, H): -slope * |distance to the diagonal| is added to the scores (ALiBi,
            arXiv:2108.12409). No gradient.
        softcap: if positive, scaled scores become softcap * tanh(scores / softcap), before bias and masks
            (arXiv:2408.00118).
        scale: 1 / sqrt(D) when None. Numbers (softcap, scale, dropout_p) may be tensors of one element on the CPU,
            which get no gradient: for a learned scale multiply q by it and pass scale=1.0.
        dropout_p: probability of dropping an attention weight, applied as given (a module passes 0 in evaluation).
        seed: an integer, or an int64 tensor with one element on q's device, for reproducible dropout; drawn from
            torch's generator when None.
        return_lse: also return the natural log-sum-exp of the scores (B, H, T_q), in float32 (float64 for float64),
            differentiable.
        return_weights: also return the weights after dropout, (B, H, T_q, T_k) for True, (B, T_q, T_k) for "average"
            (over the heads), in q's dtype; a second kernel recomputes them. Differentiable.

    Returns:
        (B, H, T_q, D_v) in q's dtype (autocast's under autocast), or a tuple of that and what else was asked for.
        A row that may attend to nothing is 0, its weights too, and its log-sum-exp -inf.

    Raises:
        ValueError, TypeError: for shapes, dtypes or devices that do not fit, before anything runs.
        NotImplementedError: for weights or a gradient of the bias with packed sequences, for alibi_slopes or a number
            that require a gradient, and for modes of autograd that the backend does not serve (docs/drop-in.md).

    Source: FlashAttention-2, arXiv:2307.08691; `tileformer.kernels.reference.attention` is the definition.

    Example:
        >>> q = k = v = torch.randn(2, 4, 10, 16)
        >>> attention(q, k, v, causal=True, window=(3, 0)).shape
        torch.Size([2, 4, 10, 16])
    """
    if wrong:
        checks.misnamed("attention", wrong)
    lengths = dict(query_lengths=query_lengths, key_lengths=key_lengths)
    starts = dict(cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)
    longest = dict(max_seqlen_q=max_seqlen_q, max_seqlen_k=max_seqlen_k)
    if (type(q) is not Tensor or q.is_nested) and is_special(q):
        shared = dict(key_mask=key_mask, **lengths, alibi_slopes=alibi_slopes, mask=mask, bias=bias)
        everywhere: dict[str, Any] = dict(
            **starts, **longest, causal=causal, window=window, align=align, softcap=softcap, scale=scale,
            return_lse=return_lse, return_weights=return_weights,
        )  # fmt: skip
        return attention_on_shards(attention, q, k, v, shared, dropout_p, seed, everywhere)
    if not type(q) is type(k) is type(v) is Tensor:
        checks.tensors("attention", q=q, k=k, v=v)
    if q.device.type != "meta" and torch.is_autocast_enabled(q.device.type):
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v = (x.to(dtype) if x.dtype in checks.FLOATING[:3] else x for x in (q, k, v))
    backend = choose("attention", q)
    packed = cu_seqlens_q is not None
    lens = (cu_seqlens_q, cu_seqlens_k) if packed else (query_lengths, key_lengths)
    if scale is not None:
        scale = checks.number("attention", "scale", scale, "multiply q by it, and pass scale=1.0")
    softcap = checks.number("attention", "softcap", softcap)
    dropout_p = checks.number("attention", "dropout_p", dropout_p)
    if seed is not None:
        seed = checks.seeded("attention", seed, q.device)
    scores = (*q.shape[:-1], k.shape[-2]) if mask is not None and q.dim() == k.dim() == 4 else ()
    if scores and (variant := checks.causal_variant("attention", mask, scores)):
        others = (window, align, alibi_slopes, *lens)  # which have a diagonal of their own
        alone = not causal and all(x is None for x in others)
        causal, mask = (variant, None) if alone else (causal, checks.triangle(variant, scores, q.device))
    check_attention(
        q, k, v, mask, bias, key_mask, lengths, starts, longest,
        causal, window, align, alibi_slopes, softcap, dropout_p, seed, return_weights,
    )  # fmt: skip
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if mask is not None and mask.dtype != torch.bool:
        mask, bias = None, mask
    if dropout_p > 0.0 and seed is None:
        seed = random.new_seed(q.device)
    left, right, bottom_right = limits(causal, window, align)
    left, right = NO_LIMIT if left is None else left, NO_LIMIT if right is None else right
    max_q = q.shape[2] if max_seqlen_q is None else int(max_seqlen_q)
    max_k = k.shape[2] if max_seqlen_k is None else int(max_seqlen_k)
    bias_grad = bias is not None and bias.requires_grad and torch.is_grad_enabled()
    flags, parts = (int(bottom_right), int(packed)), 1 if torch.compiler.is_compiling() else parts_of_rows(q, k, v)
    params = AttentionParams(left, right, *flags, max_q, max_k, int(bias_grad), parts, scale, softcap, dropout_p)
    masks = AttentionMasks(mask, bias, key_mask, *lens, alibi_slopes, seed)
    if backend == "reference":
        options = _reference_options(masks, params)
        return reference.attention(q, k, v, **options, return_lse=return_lse, return_weights=return_weights)
    if backend != "torch" or dropout_p > 0.0:
        checks.not_traced("attention")
    if backend == "torch":
        return torch_attention(q, k, v, masks, params, return_lse, return_weights)
    fastest = backend == "triton" and current_backend() == "fastest" and not (return_lse or return_weights)
    if fastest and fused_serves(q, k, v, masks, params):
        return fused_attention(q, k, v, params)
    if bias_grad and packed:
        raise NotImplementedError("attention: a bias has no gradient with packed sequences: pad them, or detach it")
    if scale < 0:  # the kernels take the maximum before they scale
        q, params = -q, params._replace(scale=-scale)
    arguments = (q, k, v, *masks, *params.flat())
    out, lse, bounds = _attention_forward(*arguments)
    results = [out, lse * LN2] if return_lse else [out]
    if return_weights:
        weights = _attention_weights(lse.detach(), bounds, return_weights == "average", *arguments)
        results.append(weights.squeeze(1) if return_weights == "average" else weights)
    return tuple(results) if len(results) > 1 else out


def scaled_dot_product_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """`attention` with the signature of `torch.nn.functional.scaled_dot_product_attention`.

    Args:
        query, key, value: (..., H, T, D); leading axes broadcast and are folded into the batch. (T, D) and (H, T, D)
            are taken as one batch.
        attn_mask: broadcastable to (..., H, T_q, T_k), True = may attend, or added; or a CausalBias.
        is_causal: top-left aligned, as in torch; combines with attn_mask.
        enable_gqa: allow fewer key heads than query heads.

    Raises:
        ValueError: as `attention`, and for unequal head counts without enable_gqa (but one head serves all).

    Example:
        >>> x = torch.randn(4, 10, 16)
        >>> scaled_dot_product_attention(x, x, x, is_causal=True).shape
        torch.Size([4, 10, 16])
    """
    if isinstance(query, Tensor) and query.is_nested:
        checks.plain("scaled_dot_product_attention", query, key, value)
    checks.tensors("scaled_dot_product_attention", query=query, key=key, value=value, attn_mask=attn_mask)
    for name, x, least in (("query", query, 2), ("key", key, 2), ("value", value, 2), ("attn_mask", attn_mask, 1)):
        if x is not None and x.dim() < least:
            have = f"{name} has {x.dim()} axes, it needs at least {least}"
            raise ValueError(f"scaled_dot_product_attention: {have}: pass {name}[None]")
    if query.shape[:-2] != key.shape[:-2] or key.shape[:-2] != value.shape[:-2]:
        query, key, value = _broadcast(query, key, value, enable_gqa)
    if attn_mask is not None and query.dim() > 4 and attn_mask.dim() > 3:
        attn_mask = attn_mask.expand(*query.shape[:-3], *attn_mask.shape[-3:]).flatten(0, -4)
    q, k, v = (x[(None,) * (4 - x.dim())] if x.dim() < 4 else x.flatten(0, -4) for x in (query, key, value))
    out = attention(q, k, v, mask=attn_mask, causal=is_causal, scale=scale, dropout_p=dropout_p)
    return out.reshape(*query.shape[:-1], value.shape[-1])


def _broadcast(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The three with the same leading axes, and as many heads: views."""
    heads = [x.shape[-3] if x.dim() > 2 else 1 for x in (query, key, value)]
    if not enable_gqa and len({*heads} - {1}) > 1:
        counts = f"{heads[0]} query heads, {heads[1]} key heads and {heads[2]} value heads"
        raise ValueError(f"scaled_dot_product_attention: {counts}: pass enable_gqa=True")
    try:
        lead = torch.broadcast_shapes(*(x.shape[:-3] for x in (query, key, value)))
    except RuntimeError:
        shapes = ", ".join(str(tuple(x.shape)) for x in (query, key, value))
        raise ValueError(f"scaled_dot_product_attention: the leading axes of {shapes} do not broadcast") from None
    if not enable_gqa:
        heads = [max(heads), max(heads[1:]), max(heads[1:])]
    query, key, value = (x.expand(*lead, h, *x.shape[-2:]) for x, h in zip((query, key, value), heads, strict=True))
    return query, key, value
