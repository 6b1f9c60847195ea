"""Attention in plain torch operators: what the CPU uses by default.

A decoder's CPU batches are short sequences, where the cost is passes over small rows and autograd's bookkeeping, not
matmuls: forward and backward are written out, in place where a tensor is ours. Longer ones go to torch's own fused
attention, which never stores the T_q x T_k weights. Half precision is computed in float32 and rounded once, at the end.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tileformer.kernels import random
from tileformer.kernels.attention.params import NO_LIMIT, AttentionMasks, AttentionParams
from tileformer.kernels.autograd import Function, in_forward_mode
from tileformer.kernels.double_backward import backward_function

LOWEST = -2.3e38  # what is added below it excludes: the kernels' scores, times log2(e), are beyond float32
FUSED_FROM = 32  # keys from which torch's fused attention beats three plain operators on a CPU
FUSED_GRADIENTS_FROM = 192  # the same, where there is a backward to come
SHORT_ROW = 16  # of fewer elements torch's softmax is not vectorised: 20 ns an element instead of 1
# As operators: F.scaled_dot_product_attention has no second derivatives, and copies more.
_fused = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)
_fused_backward = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu_backward", None)


def torch_attention(
    q: Tensor, k: Tensor, v: Tensor, masks: AttentionMasks, params: AttentionParams, return_lse: bool,
    return_weights: bool | str,
) -> Any:  # fmt: skip
    """Two matmuls around a float32 softmax, or torch's fused attention, with the arguments of params.py."""
    if q.device.type != "meta" and torch.is_autocast_enabled(q.device.type):  # it would round each product
        with torch.autocast(q.device.type, enabled=False):
            return torch_attention(q, k, v, masks, params, return_lse, return_weights)
    mask, bias, key_mask, q_lens, k_lens, slopes, seed = masks
    left, right, align, packed, longest_q, longest_k, *_, scale, softcap, p = params
    (b, h, t_q, _), t_k = q.shape, k.shape[2]
    group = h // k.shape[1]
    if group > 1:
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    causal = left == NO_LIMIT and right == 0
    unmasked = left == NO_LIMIT and right == NO_LIMIT
    dense = any(x is not None for x in (mask, bias, key_mask, q_lens, k_lens, slopes)) or softcap > 0.0
    square = unmasked or (causal and t_q == t_k)
    # Derivatives of any kind follow from plain operators. An exported program is to serve every length, and other
    # runtimes: no choice by length, no operator but the usual ones.
    composed = torch.compiler.is_exporting() or return_lse or return_weights or softcap > 0.0 or _transformed()
    composed = composed or (bias is not None and bias.requires_grad)
    if q.is_cuda and not (dense or p or composed) and square and t_k >= 512:
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale)
    graph = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    fused = not composed and p == 0.0 and _fused is not None and q.device.type == "cpu" and 0 not in q.shape
    fused = fused and q.shape[3] == v.shape[3] and t_k >= (FUSED_GRADIENTS_FROM if graph else FUSED_FROM)

    if packed and q_lens is not None and q_lens is k_lens and p == 0.0 and not return_weights:
        alone = all(x is None for x in (mask, bias, key_mask, slopes))
        longest = max(longest_q, longest_k)
        if alone and (len(q_lens) - 1) * longest**2 < t_q * t_k:
            return _each_alone(q, k, v, q_lens, longest, params, return_lse)
    positions = _Positions(q, k, q_lens, k_lens, bool(align), (longest_q, longest_k) if packed else None)
    seen = [] if mask is None else [mask]
    if positions.valid_q is not None:  # NaN in a padded query must not reach a gradient
        q = q.masked_fill(~positions.valid_q, 0.0)
        seen.append(positions.valid_q)
    if positions.valid_k is not None:
        key_mask = positions.valid_k if key_mask is None else key_mask & positions.valid_k
    if positions.same is not None:
        seen.append(positions.same)
    # The fused operator has a causal mask of its own, and 0 for a row that sees nothing.
    triangle = fused and causal and not packed and (not align or (t_q == t_k and q_lens is None and k_lens is None))
    if right != NO_LIMIT and not triangle:
        seen.append(positions.cols <= positions.diagonal + right)
    if left != NO_LIMIT:
        seen.append(positions.cols >= positions.diagonal - left)
    additive = bias
    if slopes is not None:
        linear = -positions.per_query(slopes.to(_wide(q))) * (positions.diagonal - positions.cols).abs()
        additive = linear if bias is None else bias.to(_wide(q)) + linear
    # Causal rows see their first key, unless the diagonal starts before it.
    always = seen == [] or (causal and not dense and (t_q <= t_k or not align) and t_k > 0)
    always = fused or (always and key_mask is None and additive is None)
    exact = q.dtype if fused and additive is None else _wide(q)  # 0 and -inf alone are the same in any type
    bias_, empty = _bias(seen, key_mask, additive, not always, exact)
    keep = None
    if seed is not None and p > 0.0:
        keep = random.fast_keep(seed, [b, h, t_q, t_k], p, random.keep_scale(p), _wide(q))
    if fused:
        padded_q = None if positions.valid_q is None else ~positions.valid_q
        return (_Fused.apply if graph else _Fused.forward)(q, k, v, key_mask, bias_, padded_q, triangle, scale)[0]
    if composed:
        out, lse, weights = _definition(q, k, v, key_mask, bias_, empty, keep, scale, softcap)
        results = [out, lse] if return_lse else [out]
        if return_weights:
            results.append((weights.mean(1) if return_weights == "average" else weights).to(q.dtype))
        return tuple(results) if len(results) > 1 else out
    return (_Plain.apply if graph else _Plain.forward)(q, k, v, key_mask, bias_, empty, keep, scale)[0]


def fused_serves(q: Tensor, k: Tensor, v: Tensor, masks: AttentionMasks, params: AttentionParams) -> bool:
    """Whether torch's fused attention computes this by our rules, so that the backend "fastest" may hand it over.

    It does where every row sees a key and nothing but causality hides one: FlashAttention and cuDNN take such calls in
    16 bits, of a head size that is a multiple of 8. A causal one must be square, or torch leaves them for a slower
    kernel. Their backward adds in any order, so that a gradient is ours where bits have to repeat.
    """
    (b, h, t_q, d), t_k = q.shape, k.shape[2]
    plain = all(x is None for x in masks[:6]) and params.softcap == params.dropout_p == 0.0 and not params.packed
    causal = params.right == 0
    seen = params.left == NO_LIMIT and (t_q == t_k if causal else params.right == NO_LIMIT)
    shaped = d == v.shape[3] <= 128 and d % 8 == 0 and min(b, t_q, t_k) > 0 and max(b, h) < 2**16  # a grid's y and z
    stored = q.dtype in (torch.float16, torch.bfloat16) and q.stride(3) == k.stride(3) == v.stride(3) == 1
    graph = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    repeats = not (graph and torch.are_deterministic_algorithms_enabled())
    return plain and seen and shaped and stored and params.scale > 0.0 and repeats


def fused_attention(q: Tensor, k: Tensor, v: Tensor, params: AttentionParams) -> Tensor:
    """torch's own choice of kernel for a call that `fused_serves`."""
    gqa = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, is_causal=params.right == 0, scale=params.scale, enable_gqa=gqa)


def _each_alone(
    q: Tensor, k: Tensor, v: Tensor, starts: Tensor, longest: int, params: AttentionParams, return_lse: bool
) -> Any:
    """Packed sequences as rows of a padded batch: N longest^2 scores instead of total^2, nearly all of them hidden."""
    total, n = q.shape[2], len(starts) - 1
    lengths = [starts.diff().clamp(0, most) for most in (params.max_q, params.max_k)]
    at = torch.arange(total, device=q.device)
    row = (torch.searchsorted(starts, at, right=True) - 1).clamp(max=n - 1)
    position = at - starts[row]
    inside = (position < lengths[0][row]).view(1, 1, total, 1)
    source = (starts[:-1, None] + torch.arange(longest, device=q.device)).clamp(max=total - 1).flatten()
    q, k, v = (x[0].index_select(1, source).unflatten(1, (n, longest)).transpose(0, 1) for x in (q, k, v))
    masks = AttentionMasks(None, None, None, lengths[0], lengths[1], None, None)
    params = params._replace(packed=0, max_q=longest, max_k=longest)
    result = torch_attention(q, k, v, masks, params, return_lse, False)
    back = (row * longest + position).clamp(max=n * longest - 1)
    pack = lambda x, fill: x.transpose(0, 1).flatten(1, 2).index_select(1, back)[None].where(inside, fill)  # noqa: E731
    if not return_lse:
        return pack(result, 0.0)
    return pack(result[0], 0.0), pack(result[1][..., None], -math.inf)[..., 0]


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


class _Positions:
    """Where each query and key lies in its sequence, broadcastable to (B, H, T_q, T_k); None: nothing to say."""

    def __init__(
        self, q: Tensor, k: Tensor, q_lens: Tensor | None, k_lens: Tensor | None, align: bool,
        most: tuple[int, int] | None,
    ) -> None:  # fmt: skip
        """most: the longest that packed sequences may be; None where q_lens and k_lens are counts."""
        t_q, t_k = q.shape[2], k.shape[2]
        rows, self.cols = torch.arange(t_q, device=q.device)[:, None], torch.arange(t_k, device=q.device)[None]
        self.valid_q = self.valid_k = self.same = self.sequence = None
        shift: Tensor | int = t_k - t_q if align else 0
        if most and q_lens is not None and k_lens is not None:
            in_q = torch.searchsorted(q_lens, rows[:, 0], right=True) - 1
            in_k = torch.searchsorted(k_lens, self.cols[0], right=True) - 1
            n = len(q_lens) - 1
            self.sequence = in_q.clamp(max=n - 1)
            counts = k_lens.diff().clamp(0, most[1]) - q_lens.diff().clamp(0, most[0])
            shift = counts[self.sequence, None] if align else 0
            rows = rows - q_lens[self.sequence][:, None]
            self.cols = self.cols - k_lens[in_k.clamp(max=n - 1)]
            self.same = in_q[:, None] == in_k
            self.valid_q = ((in_q < n)[:, None] & (rows < most[0]))[None, None]
            self.valid_k = (in_k < n) & (self.cols < most[1])
        elif q_lens is not None or k_lens is not None:
            len_q = t_q if q_lens is None else q_lens.clamp(0, t_q)[:, None, None, None]
            len_k = t_k if k_lens is None else k_lens.clamp(0, t_k)[:, None, None, None]
            self.valid_q = None if q_lens is None else rows < len_q
            self.valid_k = None if k_lens is None else (self.cols < len_k)[:, 0, 0]
            shift = len_k - len_q if align else 0
        self.diagonal = rows + shift

    def per_query(self, slopes: Tensor) -> Tensor:
        """Slopes (H,) or (sequences, H), broadcastable to (B, H, T_q, 1)."""
        if self.sequence is None or slopes.dim() == 1:
            return slopes[..., None, None]
        return slopes[self.sequence].t()[None, :, :, None]


def _bias(
    seen: list[Tensor], key_mask: Tensor | None, additive: Tensor | None, some_empty: bool, dtype: torch.dtype
) -> tuple[Tensor | None, Tensor | None]:
    """What to add to the scores, and which rows see nothing; both broadcastable to (B, H, T_q, T_k), or None.

    some_empty: look for rows that see nothing. They get a bias of 0, so that their softmax is finite.
    """
    if key_mask is not None:
        seen = [*seen, key_mask[:, None, None, :]]
    if additive is not None:
        additive = additive.to(dtype)
        seen = [*seen, additive >= LOWEST]
    if not seen:
        return None, None
    allowed = seen[0]
    for more in seen[1:]:
        allowed = allowed & more
    empty = None
    if some_empty:
        empty = ~allowed.any(-1, keepdim=True)
        allowed = allowed | empty
    bias = torch.zeros((), dtype=dtype, device=allowed.device).where(allowed, -math.inf)
    if additive is not None:
        bias = bias + additive.masked_fill(additive < LOWEST, 0.0)
    return bias, empty


def _definition(
    q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, bias: Tensor | None, empty: Tensor | None,
    keep: Tensor | None, scale: float, softcap: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Output in q's dtype, log-sum-exp and weights in float32 or wider, by differentiable operators."""
    dtype = q.dtype
    if key_mask is not None:
        padded = ~key_mask[:, None, :, None]
        k, v = k.masked_fill(padded, 0.0), v.masked_fill(padded, 0.0)
    q, k, v = (x.to(_wide(x)) for x in (q, k, v))
    scores = (q * scale) @ k.transpose(-1, -2)
    if softcap > 0.0:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores if bias is None else scores + bias
    weights = torch.softmax(scores, -1)
    weights = weights if keep is None else weights * keep
    lse = torch.logsumexp(scores, -1)
    if empty is not None:
        weights, lse = weights.masked_fill(empty, 0.0), lse.masked_fill(empty[..., 0], -math.inf)
    out = (weights @ v).to(dtype)
    return (out if empty is None else out.masked_fill(empty, 0.0)), lse, weights


def _zero_padding(x: Tensor, key_mask: Tensor) -> Tensor:
    """x with 0 in padded rows, NaN or not: an integer AND, a quarter of the cost of masked_fill."""
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[x.dtype.itemsize]
    ones_or_zeros = -key_mask[:, None, :, None].to(integer)
    return (x.view(integer) & ones_or_zeros).view(x.dtype)


def _wide_operands(key_mask: Tensor | None, k: Tensor, v: Tensor, *others: Tensor) -> list[Tensor]:
    """k and v with 0 in padded rows, and the others, all in float32 or wider."""
    if key_mask is not None:
        k, v = _zero_padding(k, key_mask), _zero_padding(v, key_mask)
    return [x.to(_wide(x)) for x in (k, v, *others)]


def _softmax_(scores: Tensor) -> Tensor:
    """Softmax over the last axis, which may overwrite its argument."""
    if not 0 < scores.shape[-1] < SHORT_ROW:
        return torch.softmax(scores, -1)
    weights = scores.sub_(scores.amax(-1, keepdim=True)).exp_()
    return weights.div_(_row_sum(weights))


def _row_sum(x: Tensor) -> Tensor:
    """Sum over a short last axis, kept: a matmul with ones, which needs no reduction loop for each row."""
    return x @ x.new_ones(x.shape[-1], 1)


class _Plain(Function):
    """(out, softmax weights before dropout); differentiable in q, k, v through out."""

    @staticmethod
    def forward(q, k, v, key_mask, bias, empty, keep, scale):
        dtype = q.dtype
        k, v, q = _wide_operands(key_mask, k, v, q)
        scores = (q @ k.transpose(-1, -2)).mul_(scale)
        weights = _softmax_(scores if bias is None else scores.add_(bias))
        out = ((weights if keep is None else weights * keep) @ v).to(dtype)
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
        return *_PlainBackward.apply(dout, *ctx.saved_tensors, ctx.scale), *(None,) * 5


def _plain_bwd(dout, weights, q, k, v, key_mask, bias, empty, keep, scale):
    dtype = q.dtype
    k, v, q, dout = _wide_operands(key_mask, k, v, q, dout)
    if empty is not None:
        dout = dout.masked_fill(empty, 0.0)
    dv = (weights if keep is None else weights * keep).transpose(-1, -2) @ dout
    dp = dout @ v.transpose(-1, -2)
    dp = dp if keep is None else dp.mul_(keep)
    ds = dp.sub_(_row_sum(dp * weights)).mul_(weights).mul_(scale)
    return tuple(x.to(dtype) for x in (ds @ k, ds.transpose(-1, -2) @ q, dv))


_PlainBackward = backward_function(
    staticmethod(_plain_bwd), lambda weights, *inputs: _definition(*inputs)[:1], primals=(2, 3, 4)
)


def _transformed() -> bool:
    """Whether torch.func, forward mode or torch.jit.trace is at work: the autograd Functions have no rules for them."""
    tracing = not torch.compiler.is_compiling() and torch._C._is_tracing()
    return tracing or torch._C._are_functorch_transforms_active() or in_forward_mode()


class _Fused(Function):
    """(out, log-sum-exp of what torch scaled) of torch's fused attention; differentiable in q, k, v through out."""

    @staticmethod
    def forward(q, k, v, key_mask, bias, padded_q, causal, scale):
        q, k, v, bias = _fused_operands(q, k, v, key_mask, bias)
        return _fused(q, k, v, 0.0, causal, attn_mask=bias, scale=scale)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.causal, ctx.scale = inputs
        ctx.save_for_backward(*output, *tensors)
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, dout, _):
        if dout is None:
            return (None,) * 8
        return *_FusedBackward.apply(dout, *ctx.saved_tensors, ctx.causal, ctx.scale), *(None,) * 5


def _fused_bwd(dout, out, lse, q, k, v, key_mask, bias, padded_q, causal, scale):
    if padded_q is not None:
        dout = dout.masked_fill(padded_q, 0.0)
    q, k, v, bias = _fused_operands(q, k, v, key_mask, bias)
    return _fused_backward(dout, q, k, v, out, lse, 0.0, causal, attn_mask=bias, scale=scale)


def _fused_definition(out, lse, q, k, v, key_mask, bias, padded_q, causal, scale):
    seen = [torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()] if causal else []
    bias, empty = _bias(seen, None, bias, True, _wide(q))
    return _definition(q, k, v, key_mask, bias, empty, None, scale)[:1]


_FusedBackward = backward_function(staticmethod(_fused_bwd), _fused_definition, primals=(3, 4, 5))


def _fused_operands(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, bias: Tensor | None) -> tuple[Any, ...]:
    """What the fused operator reads: 0 in padded rows, rows of adjacent elements, and a bias of four axes."""
    if key_mask is not None:
        k, v = _zero_padding(k, key_mask), _zero_padding(v, key_mask)
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    return q, k, v, None if bias is None else bias[(None,) * (4 - bias.dim())]
