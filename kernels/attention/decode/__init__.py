"""Attention of the newest tokens over caches of keys and values: one step of decoding.

`split.py` holds the kernels, `launchers.py` the registered ops, `torch_backend.py` the plain-torch backend, `params.py`
what travels between them; here are the public ops. A step is short, and it is taken for every token and layer: what
shapes, dtypes and options decide is checked once for each kind of call.
"""

from __future__ import annotations

from typing import Any, Literal, NoReturn, overload

import torch
from torch import Tensor
from torch.compiler import is_compiling

from tileformer.kernels import checks, reference
from tileformer.kernels.attention.decode.launchers import decode, store
from tileformer.kernels.attention.decode.params import Cache, check_append, check_decode
from tileformer.kernels.attention.decode.torch_backend import torch_append, torch_decode
from tileformer.kernels.autograd import in_forward_mode
from tileformer.kernels.backend import choose
from tileformer.kernels.launch import MAX_CACHED

_known: dict[tuple[Any, ...], Any] = {}  # kinds of calls that have passed the checks


def _kind(x: Tensor | None) -> Any:
    """What the checks look at; equal to nothing for what they refuse."""
    if x is None or not isinstance(x, Tensor) or x.is_nested:
        return x if x is None else object()
    return type(x), x.shape, x.dtype, x.device


def _remember(kind: tuple[Any, ...], value: Any) -> None:
    if is_compiling():
        return
    if len(_known) >= MAX_CACHED:  # a process may meet new kinds for ever
        _known.clear()
    _known[kind] = value


@overload
def decode_attention(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, *, page_table: Tensor | None = ..., beams: int = ...,
    descends: Tensor | None = ..., starts: Tensor | None = ..., causal: bool = ...,
    window: int | tuple[int | None, int | None] | None = ..., softcap: float | None = ..., bias: Tensor | None = ...,
    scale: float | None = ..., k_scale: Tensor | None = ..., v_scale: Tensor | None = ...,
    return_lse: Literal[False] = ...,
) -> Tensor: ...  # fmt: skip
@overload
def decode_attention(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, *, page_table: Tensor | None = ..., beams: int = ...,
    descends: Tensor | None = ..., starts: Tensor | None = ..., causal: bool = ...,
    window: int | tuple[int | None, int | None] | None = ..., softcap: float | None = ..., bias: Tensor | None = ...,
    scale: float | None = ..., k_scale: Tensor | None = ..., v_scale: Tensor | None = ..., return_lse: bool,
) -> Any: ...  # fmt: skip
def decode_attention(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, *, page_table: Tensor | None = None, beams: int = 1,
    descends: Tensor | None = None, starts: Tensor | None = None, causal: bool = True,
    window: int | tuple[int | None, int | None] | None = None, softcap: float | None = None,
    bias: Tensor | None = None, scale: float | None = None, k_scale: Tensor | None = None,
    v_scale: Tensor | None = None, return_lse: bool = False, **wrong: NoReturn,
) -> Any:  # fmt: skip
    """softmax(scale * q k^T + bias) v of each row's newest T_q tokens over its cache, without a gradient.

    Nothing is read on the host and no grid depends on a length: a CUDA graph of it serves every later step.

    Args:
        q: (B * beams, H, T_q, D), the beams of a row one after another, T_q from 1 to 16, D from 1 to 256; float16,
            bfloat16 or float32 (float64 on the CPU's backends). Any strides, no copy if the last is 1.
        k: (B, H_kv, slots, D), H a multiple of H_kv, in q's dtype or int8; any strides, the last 1. With a page table
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
        k_scale, v_scale: float32 (B, H_kv, slots), or (pages, page_size, H_kv) with a page table, where k and v are
            int8: what their rows are multiples of, as `append_kv_cache` stores them.
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
    cache = Cache(k, v, lengths, page_table, descends, starts, k_scale, v_scale)
    kind = (*map(_kind, (q, *cache, bias)), beams, causal, window, softcap, scale)
    params = None if is_compiling() else _known.get(kind)
    if params is None:
        params = check_decode(q, cache, bias, beams, causal, window, softcap, scale)
        _remember(kind, params)
    _no_gradient("decode_attention", q, k, v, bias)
    if backend == "reference":
        return reference.decode_attention(
            q, k, v, lengths, page_table=page_table, beams=beams, descends=descends, starts=starts, causal=causal,
            window=window, softcap=softcap, bias=bias, scale=scale, k_scale=k_scale, v_scale=v_scale,
            return_lse=return_lse,
        )  # fmt: skip
    checks.not_traced("decode_attention")
    if backend == "torch":
        return torch_decode(q, cache, bias, params, return_lse)
    out, lse = decode(q, *cache, bias, *params.flat())
    return (out, lse) if return_lse else out


def append_kv_cache(
    k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, *, page_table: Tensor | None = None,
    beams: int = 1, k_scale: Tensor | None = None, v_scale: Tensor | None = None,
) -> None:  # fmt: skip
    """Store each row's newest T keys and values at the end of its cache, in place.

    Token t of T goes to slot `lengths[b] - T + t`: `lengths` are those of the `decode_attention` that follows, the new
    tokens counted. With beams, that of beam r goes to slot `lengths[b] - (T - t) * beams + r`. A slot before the first
    or past the last, or whose page is negative, is not stored: a length of 0 leaves a row as it is.

    Args:
        k, v: (B * beams, H_kv, T, D) and (B * beams, H_kv, T, D_v), a prompt's T too; any strides.
        k_cache, v_cache: what `decode_attention` reads as k and v, (B, H_kv, slots, D) or pages, in k's dtype or int8.
        lengths: int32 (B,).
        page_table: int32 (B, max_pages). Rows that store into one page must not store into one slot.
        beams: beams of a row whose keys differ; their words, `1 << r` for beam r, are the caller's.
        k_scale, v_scale: float32, as `decode_attention`'s, for int8 caches: the largest |x| of a token's head / 127,
            is stored there, and in the cache the nearest multiples of it. What is read differs from x by half of it at
            the most, |x|'s largest / 254; where a value is not finite, all of that head's are NaN.

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
    kind = (*map(_kind, (k, v, k_cache, v_cache, lengths, page_table, k_scale, v_scale)), beams)
    if is_compiling() or kind not in _known:
        check_append(k, v, k_cache, v_cache, lengths, page_table, k_scale, v_scale, beams)
        _remember(kind, True)
    _no_gradient("append_kv_cache", k, v, k_cache, v_cache)
    if backend == "reference":
        reference.append_kv_cache(
            k, v, k_cache, v_cache, lengths, page_table=page_table, beams=beams, k_scale=k_scale, v_scale=v_scale
        )
        return
    checks.not_traced("append_kv_cache")
    if backend == "torch":
        torch_append(k, v, k_cache, v_cache, lengths, page_table, k_scale, v_scale, beams)
    else:
        store(k, v, k_cache, v_cache, lengths, page_table, k_scale, v_scale, beams)


def _no_gradient(op: str, *tensors: Tensor | None) -> None:
    """Raise NotImplementedError where a derivative is asked for, backward or forward."""
    if not torch.is_grad_enabled() and (is_compiling() or not in_forward_mode()):
        return
    if any(x is not None and checks.differentiated(x) for x in tensors):
        raise NotImplementedError(
            f"{op}: an input requires a gradient, and decoding has none: call it under torch.no_grad(), or use "
            "attention(q, k, v, causal='bottom_right', key_lengths=lengths)"
        )
