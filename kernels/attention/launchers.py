"""From tensors to launches: allocate, plan, launch. Each launcher is a registered torch op.

Every op takes, after its own tensors, the fields of `AttentionMasks` and the two lists of `AttentionParams.flat`.
What follows from shapes, strides, dtypes and options alone is worked out once for each kind of call.
"""

import functools
import itertools
import math
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tileformer.kernels import random
from tileformer.kernels.attention import tiles
from tileformer.kernels.attention.backward import _attention_bwd_dkdv_kernel, _attention_bwd_dq_kernel
from tileformer.kernels.attention.forward import _attention_fwd_kernel
from tileformer.kernels.attention.mask import Features, Masks, Matrix, Scaling, _attention_bounds_kernel
from tileformer.kernels.attention.params import NO_LIMIT, AttentionMasks, AttentionParams
from tileformer.kernels.attention.tiles import Table, tiles_for
from tileformer.kernels.attention.weights import _attention_bwd_bias_kernel, _attention_weights_kernel
from tileformer.kernels.autograd import registered_forward
from tileformer.kernels.device import arch_of, dot_precision, wider
from tileformer.kernels.launch import Launch, Tile, cdiv, pow2

OVERLAP_LEAST_KEYS = 1024  # that make up for what a tensor descriptor costs each program
# Between neighbours of a tile, in elements: its offsets have 32 bits, and a tile has at most 128 rows.
MAX_ROW_STRIDE = 2**23
# Keys and values of the heads that run side by side: half of an A100's L2 cache, a third of an H100's.
SECTION_BYTES = 16 << 20
# Opts into hopper.py, which no GPU has run yet: read by the self-test too.
HOPPER = os.environ.get("TILEFORMER_HOPPER", "0") not in ("", "0")


def _empty_bthd(shape: Sequence[int], like: Tensor, zero: bool = False) -> Tensor:
    """A fresh (B, H, T, D) tensor stored as (B, T, H, D), so that joining the heads afterwards copies nothing."""
    fresh = torch.empty_permuted(shape, (0, 2, 1, 3), dtype=like.dtype, device=like.device)
    return fresh.zero_() if zero else fresh


def _bytes(mask: Tensor) -> Tensor:
    """A boolean mask as uint8, which is what a kernel can load."""
    return mask.view(torch.uint8) if mask.dtype == torch.bool else mask


def _rows_contiguous(x: Tensor) -> Tensor:
    near = x.stride(-2) < MAX_ROW_STRIDE
    return x if near and (x.stride(-1) == 1 or x.shape[-1] == 1) else x.contiguous()


def _near_columns(x: Tensor | None) -> Tensor | None:
    return x if x is None or max(x.stride()[-2:], default=0) < MAX_ROW_STRIDE else x.contiguous()


def _tma_compatible(x: Tensor) -> bool:
    """Whether a tensor descriptor can reach each head's rows (CUDA Driver API, cuTensorMapEncodeTiled)."""
    d = x.shape[-1]
    steps = x.element_size() == 2 and all(step % 8 == 0 for step in x.stride()[:-1]) and x.data_ptr() % 16 == 0
    return steps and d >= 16 and d & (d - 1) == 0 and x.stride(-1) == 1


def _reached_by_copies(*tensors: Tensor) -> bool:
    """Whether hopper.py's descriptors, one for all heads, can reach the tensors: none expanded, none empty."""
    return all(_tma_compatible(x) and 0 not in x.stride() and x.numel() > 0 for x in tensors)


def _layout(x: Tensor) -> tuple[torch.Size, tuple[int, ...], torch.dtype]:
    return x.shape, x.stride(), x.dtype


def _broadcast_strides(layout: Any) -> tuple[int, ...]:
    """Of a mask as (B, H, T_q, T_k)."""
    own = tuple(step if n > 1 else 0 for n, step in zip(*layout[:2], strict=True)) if layout else ()
    return (0,) * (4 - len(own)) + own


def _zero_bits(*strides: tuple[int, ...]) -> int:
    """n, 4 at most, for 2^n that divides all strides but those of the last axes."""
    return math.gcd(16, *itertools.chain(*(own[:3] for own in strides))).bit_length() - 1


class _Plan:
    """The launches of a kind of call: all but the tensors.

    Args:
        layouts: of q, k, v, the mask and the bias: shape, strides and dtype, or False.
        others: whether there are a key mask, a bounds table and slopes of ALiBi.
        sequences: as many as the bounds table has rows, or the batch.
        do_strides: of the output's gradient, for a backward.
        variant: of a backward, whether the log-sum-exp has a gradient too; of the weights, whether they are averaged.
        tma: whether keys and values come through tensor descriptors, where the tables have a tile for that.
        settings: the architecture, the precision of float32 dots, the function of the tile tables, SECTION_BYTES,
            whether hopper.py may serve the forward.
    """

    def __init__(
        self, layouts: Sequence[Any], others: tuple[bool, bool, bool], sequences: int, params: AttentionParams,
        do_strides: tuple[int, ...], variant: bool, tma: bool, settings: tuple[int, str, Any, int, bool],
    ) -> None:  # fmt: skip
        (q_shape, q_strides, self.dtype), (_, k_strides, _), (v_shape, v_strides, _), mask, bias = layouts
        (self.batch, h, t_q, d), (h_kv, t_k, dv) = q_shape, v_shape[1:]
        self.params, self.bias_shape, self.variant = params, bias and tuple(bias[0]), variant
        self.arch, precision, self.tiles_for, section_bytes, self.hopper = settings
        key_mask, bounds, alibi = others
        self.strides = (q_strides, k_strides, v_strides, do_strides)
        self.mask_strides = _broadcast_strides(mask), _broadcast_strides(bias)
        mask_bits = _zero_bits(*self.mask_strides)
        self.features = f = Features(
            LOW=params.left != NO_LIMIT, HIGH=params.right != NO_LIMIT, MASK=bool(mask), BIAS=bool(bias),
            KEY_MASK=key_mask, BOUNDS=bounds, PACKED=bool(params.packed), ALIBI=alibi, SOFTCAP=params.softcap > 0.0,
            DROPOUT=params.dropout_p > 0.0, D=d, DV=dv, BLOCK_D=pow2(d, 16), BLOCK_DV=pow2(dv, 16), PRECISION=precision,
            ALIGN=_zero_bits(*self.strides), MASK_ALIGN=3 if mask_bits == 3 else 0,  # no binary for each odd length
        )  # fmt: skip
        dense, bent = f.MASK or f.BIAS, f.ALIBI or f.SOFTCAP
        if f.DROPOUT:
            self.feature = "all" if dense and bent else "both" if dense or bent else "dropout"
        else:
            self.feature = "mask" if dense or bent else "packed" if f.PACKED else "overlap" if tma else "plain"
        self.heads, self.heads_kv, self.group = sequences * h, sequences * h_kv, h // h_kv
        size = t_k * (d + dv) * self.dtype.itemsize
        fit = max(1, section_bytes // size) if size and (f.LOW or f.HIGH) else 1
        self.section_kv = min(fit, self.heads_kv)
        shift = t_k - t_q if params.align and not f.BOUNDS else 0
        self.sizes, self.limits = (h, self.group, t_q, t_k), (shift, -params.left, params.right)
        self.present = (f.MASK, f.BIAS, f.KEY_MASK, f.BOUNDS, f.ALIBI, f.DROPOUT)

    def _launch(
        self, kernel: Any, matrices: int, table: Table, grid: Callable[[Tile], int], scalars: tuple[Any, ...],
        **flags: Any,
    ) -> Launch:  # fmt: skip
        """Of a kernel that takes so many Matrix, the masks, other tensors, `scalars`, threshold and scaling."""
        f, p = self.features, self.params
        positions = itertools.count(matrices)  # where there is no mask, q stands in: it is never read as one
        at = [next(positions) if there else 0 for there in self.present]
        rest, strides, (mask_strides, bias_strides) = next(positions), self.strides[:matrices], self.mask_strides

        def arrange(*tensors: Tensor) -> tuple[Any, ...]:
            mask, bias, *others = [tensors[i] for i in at]
            masks = Masks(Matrix(mask, mask_strides), Matrix(bias, bias_strides), *others)
            return (*map(Matrix, tensors, strides), masks, *tensors[rest:])

        rows = self.tiles_for(table, self.arch, max(f.D, f.DV), self.dtype, self.feature)
        scalars += random.threshold(p.dropout_p), Scaling(p.scale, p.softcap, random.keep_scale(p.dropout_p))
        return Launch(kernel, lambda tile: (grid(tile),), dict(F=f) | flags, rows, scalars, arrange)

    def _by_queries(self, kernel: Any, matrices: int, table: Table, last: int, **flags: Any) -> Launch:
        """`last`: how many heads there are, or for dq, which counts them itself, gradients that share a row."""
        grid = lambda tile: self.heads * cdiv(self.params.max_q, tile["BLOCK_M"])  # noqa: E731
        scalars = (*self.sizes, self.params.max_q, *self.limits, self.section_kv * self.group, last)
        return self._launch(kernel, matrices, table, grid, scalars, **flags)

    @functools.cached_property
    def forward(self) -> Launch:
        if self.hopper and self.arch == 90 and self.params.scale > 0.0:
            from tileformer.kernels.attention import hopper  # Gluon, whose names may change: nobody else imports it

            if hopper.serves(self.features, self.dtype):
                return self._explicit(hopper)
        # A tile may say more than these zeros.
        return self._by_queries(_attention_fwd_kernel, 3, tiles.FORWARD, self.heads, OVERLAP=0, THREADS=0)

    def _explicit(self, hopper: Any) -> Launch:
        tile, (shift, _, right) = hopper.TILES[self.features.D], self.limits
        arrange = lambda q, k, v, out, lse: (*hopper.descriptors(q, k, v, out, tile["BLOCK_N"]), lse)  # noqa: E731
        scalars = (*self.sizes, right + shift, self.section_kv * self.group, self.heads, self.params.scale)
        grid = lambda tile: (self.heads * cdiv(self.sizes[2], 64 * tile["GROUPS"]),)  # noqa: E731
        return Launch(hopper._attention_fwd_hopper_kernel, grid, {}, [tile], scalars, arrange)

    @functools.cached_property
    def dq(self) -> Launch:
        parts = 3 if self.params.parts == 3 else 1
        f = self.features._replace(DLSE=self.variant)
        return self._by_queries(_attention_bwd_dq_kernel, 4, tiles.BACKWARD_DQ, parts, F=f, THREADS=0)

    @functools.cached_property
    def dkdv(self) -> list[Launch]:
        """One, or one for dv and one for dk."""
        grid = lambda tile: self.heads_kv * cdiv(self.params.max_k, tile["BLOCK_N"])  # noqa: E731
        scalars = (*self.sizes, self.params.max_k, *self.limits, self.section_kv, self.heads_kv, self.params.parts)
        f = self.features
        apart = tiles.dkdv_apart(self.arch, max(f.D, f.DV), self.dtype)
        return [
            self._launch(_attention_bwd_dkdv_kernel, 4, tiles.BACKWARD_DKDV, grid, scalars, THREADS=0, ONLY=only)
            for only in (("dv", "dk") if apart else ("",))
        ]

    @functools.cached_property
    def bias_gradient(self) -> Launch:
        n_b, n_h, n_q, n_k = (1,) * (4 - len(self.bias_shape)) + self.bias_shape
        one = dict(B_ONE=n_b == 1, H_ONE=n_h == 1, Q_ONE=n_q == 1, K_ONE=n_k == 1)
        grid = lambda tile: n_b * n_h * cdiv(n_q, tile["BLOCK_M"]) * cdiv(n_k, tile["BLOCK_N"])  # noqa: E731
        scalars = (self.batch, *self.sizes, *self.limits)
        return self._launch(_attention_bwd_bias_kernel, 4, tiles.BACKWARD_BIAS, grid, scalars, **one)

    @functools.cached_property
    def weights(self) -> Launch:
        h, _, t_q, t_k = self.sizes
        n = self.batch * (1 if self.variant else h)
        grid = lambda tile: n * cdiv(t_q, tile["BLOCK_M"]) * cdiv(t_k, tile["BLOCK_N"])  # noqa: E731
        scalars = (*self.sizes, *self.limits)
        return self._launch(_attention_weights_kernel, 2, tiles.WEIGHTS, grid, scalars, AVERAGE=self.variant)


_plan = functools.lru_cache(maxsize=1024)(_Plan)  # a process may meet new kinds for ever


def _planned(
    q: Tensor, k: Tensor, v: Tensor, masks: AttentionMasks, bounds: Tensor, params: AttentionParams,
    dout: Tensor | None = None, variant: bool = False,
) -> tuple[_Plan, list[Tensor]]:  # fmt: skip
    """The plan of a call, and the masks that it has, as the kernels read them."""
    mask, bias, key_mask, _, _, slopes, seed = masks
    mask, bias = _near_columns(mask), _near_columns(bias)
    n = bounds.shape[0]
    sequences = n or q.shape[0]
    long = k.shape[2] >= OVERLAP_LEAST_KEYS and params.left == NO_LIMIT and not n
    plan = _plan(
        (_layout(q), _layout(k), _layout(v), mask is not None and _layout(mask), bias is not None and _layout(bias)),
        (key_mask is not None, n > 0, slopes is not None), sequences, params, () if dout is None else dout.stride(),
        variant, long and _tma_compatible(k) and _tma_compatible(v),
        (arch_of(q), dot_precision(q), tiles_for, SECTION_BYTES, HOPPER and _reached_by_copies(q, k, v)),
    )  # fmt: skip
    given = (
        None if mask is None else _bytes(mask),
        bias,
        None if key_mask is None else _bytes(key_mask.contiguous()),
        bounds if n else None,
        None if slopes is None else slopes.to(torch.float32).expand(sequences, q.shape[1]).contiguous(),
        seed if params.dropout_p > 0.0 else None,
    )
    return plan, [x for x in given if x is not None]


@functools.lru_cache(maxsize=1024)
def _bounds_launch(sequences: int, longest: tuple[int, int], **flags: bool) -> Launch:
    return Launch(_attention_bounds_kernel, lambda _: (sequences,), flags, [dict(BLOCK=1024, num_warps=4)], longest)


def _fill_bounds(table: Tensor, masks: AttentionMasks, params: AttentionParams, t_q: int, t_k: int) -> None:
    _, _, key_mask, q_lens, k_lens, _, _ = masks
    present = dict(KEY_MASK=key_mask is not None, Q_LENS=q_lens is not None, K_LENS=k_lens is not None)
    longest = (params.max_q, params.max_k) if params.packed else (t_q, t_k)
    run = _bounds_launch(table.shape[0], longest, **present, PACKED=bool(params.packed), ALIGN=bool(params.align))
    lens = [table if x is None else x.contiguous() for x in (q_lens, k_lens)]
    run(table if key_mask is None else _bytes(key_mask.contiguous()), *lens, table)


def attention_fwd(
    q: Tensor, k: Tensor, v: Tensor,
    mask: Tensor | None, bias: Tensor | None, key_mask: Tensor | None, q_lens: Tensor | None, k_lens: Tensor | None,
    slopes: Tensor | None, seed: Tensor | None, ints: Sequence[int], floats: Sequence[float],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Output (B, H, T_q, DV), base-2 log-sum-exp (B, H, T_q), and the bounds table of mask.py, (sequences, 8) int32.

    The table is empty where every sequence is whole.
    """
    masks, params = AttentionMasks(mask, bias, key_mask, q_lens, k_lens, slopes, seed), AttentionParams(*ints, *floats)
    q, k, v = map(_rows_contiguous, (q, k, v))
    out, lse, bounds = _fwd_outputs(q, v, masks, params)
    if bounds.shape[0]:
        _fill_bounds(bounds, masks, params, q.shape[2], k.shape[2])
    plan, present = _planned(q, k, v, masks, bounds, params)
    plan.forward(q, k, v, *present, out, lse)
    return out, lse, bounds


def _fwd_outputs(q: Tensor, v: Tensor, masks: AttentionMasks, params: AttentionParams) -> tuple[Tensor, Tensor, Tensor]:
    (b, h, t_q, _), packed, n = q.shape, bool(params.packed), 0
    if masks.key_mask is not None or masks.q_lens is not None or masks.k_lens is not None:
        n = masks.q_lens.shape[0] - 1 if packed and masks.q_lens is not None else b
    out = _empty_bthd((b, h, t_q, v.shape[3]), q, packed)  # rows that belong to no packed sequence stay 0
    lse = torch.empty((b, h, t_q), dtype=wider(q.dtype), device=q.device)
    bounds = torch.empty((n, 8), dtype=torch.int32, device=q.device)
    return out, lse.fill_(-torch.inf) if packed else lse, bounds


def _attention_fwd_fake(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _fwd_outputs(q, v, AttentionMasks(*rest[:7]), AttentionParams(*rest[7], *rest[8]))


def attention_bwd(
    dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, bounds: Tensor,
    q: Tensor, k: Tensor, v: Tensor,
    mask: Tensor | None, bias: Tensor | None, key_mask: Tensor | None, q_lens: Tensor | None, k_lens: Tensor | None,
    slopes: Tensor | None, seed: Tensor | None, ints: Sequence[int], floats: Sequence[float],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k, v and the bias (empty where it wants none). dlse is the gradient of the base-2 log-sum-exp."""
    masks, params = AttentionMasks(mask, bias, key_mask, q_lens, k_lens, slopes, seed), AttentionParams(*ints, *floats)
    dout, q, k, v = map(_rows_contiguous, (dout, q, k, v))
    dq, dk, dv, dbias = _bwd_outputs(q, k, v, bias, params)
    safe_lse, delta = (torch.empty(lse.shape, dtype=lse.dtype, device=lse.device) for _ in range(2))
    lse, out = lse.contiguous(), out.transpose(1, 2).contiguous()
    plan, present = _planned(q, k, v, masks, bounds, params, dout, dlse is not None)
    plan.dq(q, k, v, dout, *present, out, lse, lse if dlse is None else dlse.contiguous(), dq, safe_lse, delta)
    for run in plan.dkdv:
        run(q, k, v, dout, *present, safe_lse, delta, dk, dv)
    if params.bias_grad:
        plan.bias_gradient(q, k, v, dout, *present, safe_lse, delta, dbias)
    return dq, dk, dv, dbias


def _bwd_outputs(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, params: AttentionParams
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    packed, n = bool(params.packed), params.parts
    wide = _empty_bthd((*k.shape[:1], k.shape[1] * n, *k.shape[2:]), k, packed)  # (B, T, n H_kv D)
    shared = list(wide.chunk(n, 1)) if n > 1 else [wide, _empty_bthd(v.shape, v, packed)]
    dq, dk, dv = shared if n == 3 else [_empty_bthd(q.shape, q, packed), *shared]
    if bias is None or not params.bias_grad:
        return dq, dk, dv, torch.empty((0,), dtype=q.dtype, device=q.device)
    # Nothing launches where a dimension of the scores is 0; what is summed over it is 0.
    make = torch.empty if q.shape[2] and k.shape[2] and q.shape[0] else torch.zeros
    return dq, dk, dv, make(bias.shape, dtype=bias.dtype, device=q.device)


def _attention_bwd_fake(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _, _, _, _, _, q, k, v, _, bias, *_, ints, floats = arguments
    return _bwd_outputs(q, k, v, bias, AttentionParams(*ints, *floats))


def attention_weights(
    lse: Tensor, bounds: Tensor, average: bool, q: Tensor, k: Tensor, v: Tensor,
    mask: Tensor | None, bias: Tensor | None, key_mask: Tensor | None, q_lens: Tensor | None, k_lens: Tensor | None,
    slopes: Tensor | None, seed: Tensor | None, ints: Sequence[int], floats: Sequence[float],
) -> Tensor:  # fmt: skip
    """Weights after dropout, (B, H or 1, T_q, T_k) in q's dtype, recomputed from the base-2 log-sum-exp."""
    masks, params = AttentionMasks(mask, bias, key_mask, q_lens, k_lens, slopes, seed), AttentionParams(*ints, *floats)
    q, k = map(_rows_contiguous, (q, k))
    weights = _attention_weights_fake(lse, bounds, average, q, k)
    plan, present = _planned(q, k, v, masks, bounds, params, variant=average)
    plan.weights(q, k, *present, lse.contiguous(), weights)
    return weights


def _attention_weights_fake(lse: Tensor, bounds: Tensor, average: bool, q: Tensor, k: Tensor, *_: Any) -> Tensor:
    (b, h, t_q), t_k = q.shape[:3], k.shape[2]
    return torch.empty((b, 1 if average else h, t_q, t_k), dtype=q.dtype, device=q.device)


fwd = registered_forward(attention_fwd, _attention_fwd_fake)
bwd = registered_forward(attention_bwd, _attention_bwd_fake)
weights_of = registered_forward(attention_weights, _attention_weights_fake)
