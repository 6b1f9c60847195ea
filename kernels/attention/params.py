"""The arguments of `attention`: how they travel, and what it refuses, with the values and the likely fix."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tileformer.kernels import checks
from tileformer.kernels.checks import name_of

MAX_HEAD_DIM = 256
NO_LIMIT = 2**30  # of a window: a query sees that far
_TIME_FIRST = "; if q, k and v are (B, T, H, D), pass q.transpose(1, 2), and so k and v"


class AttentionMasks(NamedTuple):
    """What restricts or changes the scores of a call."""

    mask: Tensor | None  # boolean
    bias: Tensor | None
    key_mask: Tensor | None
    q_lens: Tensor | None  # one length each, or the starts of packed sequences and the end of the last
    k_lens: Tensor | None
    slopes: Tensor | None
    seed: Tensor | None


class AttentionParams(NamedTuple):
    """The numbers of a call. A registered op takes them as two lists, `flat`: integers, and floating-point numbers."""

    left: int  # keys that a query sees before its diagonal, or NO_LIMIT
    right: int
    align: int  # 1: the diagonal ends at the bottom right
    packed: int
    max_q: int  # an upper bound of the packed lengths
    max_k: int
    bias_grad: int  # 1: the bias wants a gradient
    parts: int  # 3: gradients of q, k and v share rows, 2: those of k and v do, 1: none
    scale: float
    softcap: float
    dropout_p: float

    def flat(self) -> tuple[Sequence[int], Sequence[float]]:
        return self[:8], self[8:]


def parts_of_rows(q: Tensor, k: Tensor, v: Tensor) -> int:
    """3 where q, k, v lie beside each other in rows (B, T, 3 H D), 2 where k and v do, else 1: so will gradients."""
    (_, h, t, d), row = k.shape, k.stride(2)
    if v.shape != k.shape or v.stride() != k.stride() or k.stride()[1::2] != (d, 1) or k.stride(0) != t * row:
        return 1
    if row == 3 * h * d and q.shape == k.shape and q.stride() == k.stride():
        return 3
    return 2 if row == 2 * h * d else 1


def _check_tensors(q: Tensor, k: Tensor, v: Tensor) -> None:
    checks.floating("attention", q=q, k=k, v=v)
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 4:
            no_batch = "a batch of one is x[None]; packed (T, H, D) is x.transpose(0, 1)[None]"
            hint = no_batch if x.dim() == 3 else "reshape it"
            raise ValueError(f"attention: {name} must be (B, H, T, D), got shape {tuple(x.shape)}: {hint}")
        if x.dtype != q.dtype:
            raise TypeError(f"attention: {name} is {name_of(x.dtype)}, q is {name_of(q.dtype)}: cast them to one dtype")


def check_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, bias: Tensor | None, key_mask: Tensor | None,
    lengths: dict[str, Tensor | None], packed: dict[str, Tensor | None], longest: dict[str, int | None],
    causal: bool | str, window: Any, align: str | None, alibi_slopes: Tensor | None,
    softcap: float, dropout_p: float, seed: Tensor | None, return_weights: bool | str,
) -> None:  # fmt: skip
    """Raise ValueError, TypeError or NotImplementedError for arguments of `attention` that do not fit together."""
    usual = q.dtype == k.dtype == v.dtype and q.dtype in checks.FLOATING and q.dim() == k.dim() == v.dim() == 4
    if not usual or k.is_nested or v.is_nested:
        _check_tensors(q, k, v)
    others = dict(key_mask=key_mask, bias=bias, alibi_slopes=alibi_slopes, **lengths, **packed)
    others = {name: x for name, x in others.items() if x is not None}
    if others:  # each check that has nothing to look at costs the host a microsecond
        checks.tensors("attention", **others)
    checks.same_device("attention", q, k=k, v=v, **others)
    (b, h, t_q, d), (h_kv, t_k) = q.shape, k.shape[1:3]
    if v.shape[:3] != k.shape[:3]:
        raise ValueError(f"attention: v is {tuple(v.shape)}, k {tuple(k.shape)}: all but the last axis must be equal")
    if k.shape[0] != b or k.shape[3] != d:
        raise ValueError(f"attention: q is {tuple(q.shape)}, k is {tuple(k.shape)}: batch and head size must be equal")
    if h_kv == 0 or h % h_kv:
        hint = _TIME_FIRST if t_q == t_k else ""
        raise ValueError(f"attention: {h} query heads and {h_kv} key heads: the second must divide the first{hint}")
    for name, size in (("head size", d), ("head size of v", v.shape[3])):
        if not 1 <= size <= MAX_HEAD_DIM:
            raise ValueError(f"attention: {name} {size} is outside 1 to {MAX_HEAD_DIM}")
    checks.causal("attention", causal)
    if window is not None or align is not None:
        check_window("attention", causal, window, align)
    checks.rate("attention", dropout_p, seed, q)
    if not (softcap >= 0.0 and softcap < float("inf")):
        raise ValueError(f"attention: softcap is {softcap}: it must be positive, or 0 for none")
    if return_weights not in (False, True, "average"):
        raise ValueError(f"attention: return_weights is {return_weights!r}: pass False, True (per head) or 'average'")
    if key_mask is not None and (key_mask.dtype != torch.bool or key_mask.shape != (b, t_k)):
        raise ValueError(
            f"attention: key_mask must be boolean {(b, t_k)}, True = a real key, "
            f"got {name_of(key_mask.dtype)} {tuple(key_mask.shape)}{_TIME_FIRST if key_mask.shape == (b, h_kv) else ''}"
        )
    n = b
    if others or longest["max_seqlen_q"] is not None or longest["max_seqlen_k"] is not None:
        n = _check_sequences(b, lengths, packed, longest, key_mask, return_weights)
    if alibi_slopes is not None and (not alibi_slopes.is_floating_point() or alibi_slopes.shape not in ((h,), (n, h))):
        got = f"{name_of(alibi_slopes.dtype)} {tuple(alibi_slopes.shape)}"
        raise ValueError(f"attention: alibi_slopes must be floating {(h,)} or {(n, h)}, got {got}")
    if alibi_slopes is not None and checks.differentiated(alibi_slopes):
        raise NotImplementedError("attention: alibi_slopes get no gradient: detach, or pass bias= for a learned one")
    if mask is bias is None:
        return
    checks.tensors("attention", mask=mask)
    for added in (mask, bias):
        # As many columns as k has heads: `broadcastable` would find the fault in the mask.
        fits = isinstance(added, Tensor) and added.shape[-2:] in ((h, h_kv), (1, h_kv), (h_kv,))
        if added is not None and fits and h_kv not in (1, t_k):
            raise ValueError(f"attention: a mask {tuple(added.shape)} beside {(t_q, t_k)} scores a head{_TIME_FIRST}")
    checks.mask("attention", (b, h, t_q, t_k), q, mask)
    if bias is not None:
        if checks.causal_variant("attention", bias, (t_q, t_k)):
            raise TypeError("attention: bias is a CausalBias, which holds no values: pass it as mask=")
        if not bias.is_floating_point():
            raise TypeError(f"attention: bias is {name_of(bias.dtype)}: it is added; pass mask= for a boolean one")
        if mask is not None and mask.dtype != torch.bool:
            raise ValueError("attention: mask and bias are both floating: add them and pass one, bias=bias + mask")
        checks.floating("attention", bias=bias)
        checks.broadcastable("attention", (b, h, t_q, t_k), bias=bias)


def limits(causal: bool | str, window: Any, align: str | None) -> tuple[int | None, int | None, bool]:
    """How many keys a row sees before and past its diagonal (None: all), and whether that ends at the bottom right."""
    left, right = window if isinstance(window, (tuple, list)) else (window, window)
    named = causal if isinstance(causal, str) else align
    return left, 0 if causal else right, named == "bottom_right"


def check_window(op: str, causal: bool | str, window: Any, align: str | None) -> None:
    """Raise ValueError or TypeError for a window, or an alignment, that is none."""
    pair = (window, window) if window is None or isinstance(window, int) else window
    if not (isinstance(pair, (tuple, list)) and len(pair) == 2):
        raise TypeError(f"{op}: window is {window!r}: pass how many keys a query sees, (left, right)")
    for side in pair:
        if side is not None and (isinstance(side, bool) or not isinstance(side, int) or not 0 <= side < 2**30):
            raise ValueError(f"{op}: window is {window!r}: each side must be an integer >= 0 or None for no limit")
    if align not in (None, "top_left", "bottom_right"):
        raise ValueError(f"{op}: align is {align!r}: pass 'top_left' or 'bottom_right'")
    if isinstance(causal, str) and align not in (None, causal):
        raise ValueError(f"{op}: causal={causal!r} and align={align!r} differ: pass one, or causal=True and align")


def _check_sequences(
    b: int, lengths: dict[str, Tensor | None], packed: dict[str, Tensor | None], longest: dict[str, int | None],
    key_mask: Tensor | None, return_weights: bool | str,
) -> int:  # fmt: skip
    """The number of sequences."""
    for name, x in (*lengths.items(), *packed.items()):
        if x is not None and x.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"attention: {name} is {name_of(x.dtype)}: pass int32 or int64")
    for name, x in lengths.items():
        if x is not None and x.shape != (b,):
            raise ValueError(f"attention: {name} has shape {tuple(x.shape)}, the batch is {b}: pass one each, {(b,)}")
    starts_q, starts_k = packed.values()
    if starts_q is None and starts_k is None:
        if any(n is not None for n in longest.values()):
            raise ValueError("attention: max_seqlen_q and max_seqlen_k belong to cu_seqlens_q and _k: pass those too")
        return b
    if starts_q is None or starts_k is None:
        raise ValueError("attention: one of cu_seqlens_q and cu_seqlens_k is None: they go together, or are the same")
    if starts_q.dim() != 1 or starts_q.shape != starts_k.shape or len(starts_q) < 2:
        both = f"cu_seqlens_q {tuple(starts_q.shape)} and cu_seqlens_k {tuple(starts_k.shape)}"
        raise ValueError(f"attention: {both} must both be (sequences + 1,)")
    if b != 1:
        raise ValueError(f"attention: packed sequences lie one after another in a batch of 1, q has a batch of {b}")
    for name, x in (("key_mask", key_mask), *lengths.items()):
        if x is not None:
            raise ValueError(f"attention: {name} and cu_seqlens do not go together: packed sequences hold no padding")
    if return_weights:
        raise NotImplementedError("attention: weights of packed sequences have no common shape: pad them for weights")
    return len(starts_q) - 1
