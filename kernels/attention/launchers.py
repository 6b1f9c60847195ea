"""From tensors to launches: allocate, pick the tile, pack the arguments. Each launcher is a registered torch op.

Every op takes, after its own tensors, the `sides` (mask, bias, key_mask, q_lens, k_lens, slopes, seed; each may be None), then `whole` numbers
(left, right, align, packed, max_q, max_k, whether the bias wants a gradient) and `real` numbers (scale, softcap, dropout rate). With `packed`,
lengths are starts of sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tileformer.kernels import random
from tileformer.kernels.attention.backward import (
    _attention_bwd_bias_kernel,
    _attention_bwd_dkdv_kernel,
    _attention_bwd_dq_kernel,
)
from tileformer.kernels.attention.forward import _attention_fwd_kernel, _attention_weights_kernel
from tileformer.kernels.attention.mask import _attention_bounds_kernel
from tileformer.kernels.attention.tiles import BACKWARD_BIAS, BACKWARD_DKDV, BACKWARD_DQ, FORWARD, WEIGHTS, tiles_for
from tileformer.kernels.autograd import register
from tileformer.kernels.device import arch_of, dot_flags
from tileformer.kernels.launch import Launch, cdiv, pow2

AHEAD_LEAST = 1024  # keys that make up for what a tensor descriptor costs each program
FARTHEST = 2**23  # elements between neighbours of a tile: its offsets have 32 bits, and a tile has at most 128 rows
NO_LIMIT = 2**30  # of a window: a row sees that far
# Keys and values of the heads that run side by side: half of an A100's L2 cache, a third of an H100's.
SECTION_BYTES = 16 << 20


def _heads_last(b: int, h: int, t: int, d: int, like: Tensor, zero: bool = False) -> Tensor:
    """A fresh (B, H, T, D) tensor stored as (B, T, H, D), so that joining the heads afterwards copies nothing."""
    fresh = torch.empty_permuted((b, h, t, d), (0, 2, 1, 3), dtype=like.dtype, device=like.device)
    return fresh.zero_() if zero else fresh


def _bytes(mask: Tensor) -> Tensor:
    """A boolean mask as uint8, which is what a kernel can load."""
    return mask.view(torch.uint8) if mask.dtype == torch.bool else mask


def _rows_contiguous(x: Tensor) -> Tensor:
    near = x.stride(-2) < FARTHEST
    return x if near and (x.stride(-1) == 1 or x.shape[-1] == 1) else x.contiguous()


def _describable(x: Tensor) -> bool:
    """Whether a tensor descriptor can reach each head's rows (CUDA Driver API, cuTensorMapEncodeTiled): 16-byte steps, whole tiles of columns."""
    d = x.shape[-1]
    steps = x.element_size() == 2 and all(step % 8 == 0 for step in x.stride()[:-1]) and x.data_ptr() % 16 == 0
    return steps and d >= 16 and d & (d - 1) == 0 and x.stride(-1) == 1


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


class _Call:
    """What the kernels of one call share, ready to be handed over."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sides: Sequence[Tensor | None],
        bounds: Tensor,
        whole: Sequence[int],
        real: Sequence[float],
    ) -> None:
        mask, bias, key_mask, q_lens, _, slopes, seed = sides
        (b, h, t_q, d), (h_kv, t_k, dv) = q.shape, v.shape[1:]
        left, right, align, packed, self.max_q, self.max_k, self.bias_grad = whole
        scale, softcap, p = real
        mask, bias = (
            x if x is None or max(x.stride()[-2:], default=0) < FARTHEST else x.contiguous() for x in (mask, bias)
        )
        has_bounds = bounds.shape[0] > 0
        self.sequences = bounds.shape[0] if has_bounds else b
        self.q = q
        # Where there is none, q stands in: its pointer is never read.
        self.pointers = (
            q if mask is None else _bytes(mask),
            q if bias is None else bias,
            q if key_mask is None else _bytes(key_mask.contiguous()),
            bounds if has_bounds else q,
            q if slopes is None else slopes.to(torch.float32).expand(self.sequences, h).contiguous(),
            q if seed is None else seed,
        )
        none = (0, 0, 0, 0)
        full = (b, h, t_q, t_k)
        self.side_strides = tuple(none if x is None else x.expand(full).stride() for x in (mask, bias))
        shift = t_k - t_q if align and not has_bounds else 0
        self.heads, self.group = (h, h_kv), h // h_kv
        self.sizes = (h, self.group, t_q, t_k)
        self.limits = (shift, -left, right)
        self.reals = (scale, softcap, random.threshold(p), random.keep_scale(p))
        self.flags: dict[str, Any] = dict(
            LOW=left != NO_LIMIT,
            HIGH=right != NO_LIMIT,
            MASK=mask is not None,
            BIAS=bias is not None,
            KEY_MASK=key_mask is not None,
            BOUNDS=has_bounds,
            PACKED=bool(packed),
            ALIBI=slopes is not None,
            SOFTCAP=softcap > 0.0,
            DROPOUT=p > 0.0,
            D=d,
            DV=dv,
            **dot_flags(q),
            BLOCK_D=pow2(d, 16),
            BLOCK_DV=pow2(dv, 16),
        )
        dense = mask is not None or bias is not None
        bent = slopes is not None or softcap > 0.0
        if p > 0.0:
            self.feature = "all" if dense and bent else "both" if dense or bent else "dropout"
        else:
            self.feature = "mask" if dense or bent else "packed" if packed else "plain"
        long = t_k >= AHEAD_LEAST and left == NO_LIMIT and not has_bounds
        if self.feature == "plain" and long and _describable(k) and _describable(v):
            self.feature = "ahead"
        size = t_k * (d + dv) * q.element_size()
        fit = max(1, SECTION_BYTES // size) if size and (right != NO_LIMIT or left != NO_LIMIT) else 1
        self.section_kv = min(fit, self.sequences * h_kv)

    def tiles(self, table: Any) -> list[dict[str, int]]:
        wider = max(self.flags["D"], self.flags["DV"])
        return tiles_for(table, arch_of(self.q), wider, self.q.dtype, self.feature)

    def run(
        self, kernel: Any, table: Any, grid: Any, args: tuple[Any, ...], without: Sequence[str] = (), **more: Any
    ) -> None:
        flags = {name: value for name, value in self.flags.items() if name not in without} | more
        n = next(n for n, x in enumerate(args) if not isinstance(x, Tensor))
        Launch(kernel, grid, flags, self.tiles(table), args[n:])(*args[:n])


def _bounds(sides: Sequence[Tensor | None], whole: Sequence[int], q: Tensor, t_k: int) -> Tensor:
    """The bounds table of scores.py, (sequences, 8) int32; empty where every sequence is whole."""
    _, _, key_mask, q_lens, k_lens, _, _ = sides
    _, _, align, packed, *_ = whole
    table = _empty_bounds(sides, whole, q)
    if table.shape[0]:
        lens = [table if x is None else x.contiguous() for x in (q_lens, k_lens)]
        key_mask_ = table if key_mask is None else _bytes(key_mask.contiguous())
        flags = dict(
            KEY_MASK=key_mask is not None,
            Q_LENS=q_lens is not None,
            K_LENS=k_lens is not None,
            PACKED=bool(packed),
            ALIGN=bool(align),
        )
        most = whole[4:6] if packed else (q.shape[2], t_k)
        tiles = [dict(BLOCK=1024, num_warps=4)]
        run = Launch(_attention_bounds_kernel, lambda _: (table.shape[0],), flags, tiles, tuple(most))
        run(key_mask_, *lens, table)
    return table


def _empty_bounds(sides: Sequence[Tensor | None], whole: Sequence[int], q: Tensor) -> Tensor:
    _, _, key_mask, q_lens, k_lens, _, _ = sides
    any_of = key_mask is not None or q_lens is not None or k_lens is not None
    n = (q_lens.shape[0] - 1 if whole[3] and q_lens is not None else q.shape[0]) if any_of else 0
    return torch.empty((n, 8), dtype=torch.int32, device=q.device)


def attention_fwd(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, bias: Tensor | None, key_mask: Tensor | None, q_lens: Tensor | None,
    k_lens: Tensor | None, slopes: Tensor | None, seed: Tensor | None, whole: Sequence[int], real: Sequence[float],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Output (B, H, T_q, DV), base-2 log-sum-exp (B, H, T_q) and the bounds table (scores.py)."""
    q, k, v = map(_rows_contiguous, (q, k, v))
    sides = (mask, bias, key_mask, q_lens, k_lens, slopes, seed)
    out, lse = _fwd_outputs(q, v, whole)
    bounds = _bounds(sides, whole, q, k.shape[2])
    call = _Call(q, k, v, sides, bounds, whole, real)
    heads = call.sequences * q.shape[1]
    call.run(
        _attention_fwd_kernel,
        FORWARD,
        lambda tile: (heads * cdiv(call.max_q, tile["BLOCK_M"]),),
        (
            q, k, v, *call.pointers, out, lse, q.stride(), k.stride(), v.stride(), *call.side_strides, *call.sizes, call.max_q, *call.limits,
            call.section_kv * call.group, heads, *call.reals,
        ),
        AHEAD=0,  # unless the tile says 1
    )  # fmt: skip
    return out, lse, bounds


def _fwd_outputs(q: Tensor, v: Tensor, whole: Sequence[int]) -> tuple[Tensor, Tensor]:
    (b, h, t_q, _), packed = q.shape, bool(whole[3])
    out = _heads_last(b, h, t_q, v.shape[3], q, packed)  # rows that belong to no packed sequence stay 0
    if packed:
        return out, torch.full((b, h, t_q), -torch.inf, dtype=_wide(q), device=q.device)
    return out, torch.empty((b, h, t_q), dtype=_wide(q), device=q.device)


def _attention_fwd_fake(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, bias: Tensor | None, key_mask: Tensor | None, q_lens: Tensor | None,
    k_lens: Tensor | None, slopes: Tensor | None, seed: Tensor | None, whole: Sequence[int], real: Sequence[float],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    sides = (mask, bias, key_mask, q_lens, k_lens, slopes, seed)
    return *_fwd_outputs(q, v, whole), _empty_bounds(sides, whole, q)


def attention_bwd(
    dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, bounds: Tensor,
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, bias: Tensor | None, key_mask: Tensor | None, q_lens: Tensor | None,
    k_lens: Tensor | None, slopes: Tensor | None, seed: Tensor | None, whole: Sequence[int], real: Sequence[float],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k, v and the bias (empty where it wants none). dlse is the gradient of the base-2 log-sum-exp."""
    dout, q, k, v = map(_rows_contiguous, (dout, q, k, v))
    b, h, h_kv = *q.shape[:2], k.shape[1]
    dq, dk, dv, dbias = _bwd_outputs(q, k, v, bias, whole)
    safe_lse, delta = (torch.empty(lse.shape, dtype=lse.dtype, device=lse.device) for _ in range(2))
    lse, out = lse.contiguous(), out.transpose(1, 2).contiguous()
    call = _Call(q, k, v, (mask, bias, key_mask, q_lens, k_lens, slopes, seed), bounds, whole, real)
    strides = (q.stride(), k.stride(), v.stride(), dout.stride(), *call.side_strides)
    heads, heads_kv = call.sequences * h, call.sequences * h_kv
    call.run(
        _attention_bwd_dq_kernel,
        BACKWARD_DQ,
        lambda tile: (heads * cdiv(call.max_q, tile["BLOCK_M"]),),
        (
            q, k, v, *call.pointers, out, dout, lse, lse if dlse is None else dlse.contiguous(), dq, safe_lse, delta, *strides, *call.sizes,
            call.max_q, *call.limits, call.section_kv * call.group, heads, *call.reals,
        ),
        DLSE=dlse is not None,
    )  # fmt: skip
    call.run(
        _attention_bwd_dkdv_kernel,
        BACKWARD_DKDV,
        lambda tile: (heads_kv * cdiv(call.max_k, tile["BLOCK_N"]),),
        (
            q, k, v, *call.pointers, dout, safe_lse, delta, dk, dv, *strides, *call.sizes, call.max_k, *call.limits, call.section_kv, heads_kv,
            *call.reals,
        ),
    )  # fmt: skip
    if call.bias_grad:
        n_b, n_h, n_q, n_k = dbias.shape
        one = dict(B_ONE=n_b == 1, H_ONE=n_h == 1, Q_ONE=n_q == 1, K_ONE=n_k == 1)
        call.run(
            _attention_bwd_bias_kernel,
            BACKWARD_BIAS,
            lambda tile: (n_b * n_h * cdiv(n_q, tile["BLOCK_M"]) * cdiv(n_k, tile["BLOCK_N"]),),
            (
                q,
                k,
                v,
                *call.pointers,
                dout,
                safe_lse,
                delta,
                dbias,
                *strides,
                b,
                *call.sizes,
                *call.limits,
                *call.reals,
            ),
            ("BIAS", "PACKED"),
            **one,
        )
    return dq, dk, dv, dbias


def _bwd_outputs(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, whole: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dq, dk, dv = (_heads_last(x.shape[0], x.shape[1], x.shape[2], x.shape[3], x, bool(whole[3])) for x in (q, k, v))
    if bias is None or not whole[6]:
        return dq, dk, dv, torch.empty((0,), dtype=q.dtype, device=q.device)
    shape = (1,) * (4 - bias.dim()) + tuple(bias.shape)
    # Nothing launches where a dimension of the scores is 0; what is summed over it is 0.
    make = torch.empty if q.shape[2] and k.shape[2] and q.shape[0] else torch.zeros
    return dq, dk, dv, make(shape, dtype=bias.dtype, device=q.device)


def _attention_bwd_fake(
    dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, bounds: Tensor,
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, bias: Tensor | None, key_mask: Tensor | None, q_lens: Tensor | None,
    k_lens: Tensor | None, slopes: Tensor | None, seed: Tensor | None, whole: Sequence[int], real: Sequence[float],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return _bwd_outputs(q, k, v, bias, whole)


def attention_weights(
    lse: Tensor, bounds: Tensor, average: bool, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, bias: Tensor | None,
    key_mask: Tensor | None, q_lens: Tensor | None, k_lens: Tensor | None, slopes: Tensor | None, seed: Tensor | None,
    whole: Sequence[int], real: Sequence[float],
) -> Tensor:  # fmt: skip
    """Weights after dropout, (B, H or 1, T_q, T_k) in q's dtype, recomputed from the base-2 log-sum-exp."""
    q, k = map(_rows_contiguous, (q, k))
    (b, h, t_q, _), t_k = q.shape, k.shape[2]
    weights = torch.empty((b, 1 if average else h, t_q, t_k), dtype=q.dtype, device=q.device)
    call = _Call(q, k, v, (mask, bias, key_mask, q_lens, k_lens, slopes, seed), bounds, whole, real)
    call.run(
        _attention_weights_kernel,
        WEIGHTS,
        lambda tile: (weights.shape[0] * weights.shape[1] * cdiv(t_q, tile["BLOCK_M"]) * cdiv(t_k, tile["BLOCK_N"]),),
        (
            q,
            k,
            *call.pointers,
            lse.contiguous(),
            weights,
            q.stride(),
            k.stride(),
            *call.side_strides,
            *call.sizes,
            *call.limits,
            *call.reals,
        ),
        ("PACKED", "DV", "BLOCK_DV"),
        AVERAGE=average,
    )
    return weights


def _attention_weights_fake(
    lse: Tensor, bounds: Tensor, average: bool, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, bias: Tensor | None,
    key_mask: Tensor | None, q_lens: Tensor | None, k_lens: Tensor | None, slopes: Tensor | None, seed: Tensor | None,
    whole: Sequence[int], real: Sequence[float],
) -> Tensor:  # fmt: skip
    b, h, t_q, _ = q.shape
    return torch.empty((b, 1 if average else h, t_q, k.shape[2]), dtype=q.dtype, device=q.device)


fwd = register(attention_fwd, _attention_fwd_fake)
bwd = register(attention_bwd, _attention_bwd_fake)
weights_of = register(attention_weights, _attention_weights_fake)
