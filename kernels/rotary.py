"""Rotary position embedding (Su et al., arXiv:2104.09864), of all or the first elements of a head.

With pairs (a, b) of elements and an angle for each position and pair:

    a' = a cos - b sin    b' = b cos + a sin

A rotation's gradient is the rotation by the opposite angle, so the backward is the same kernel with -sin.
"""

import functools
import math
from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tileformer.kernels import checks, reference
from tileformer.kernels.autograd import Function, KernelFunction, registered_forward
from tileformer.kernels.backend import choose
from tileformer.kernels.launch import Launch, cdiv, pow2

ELEMENTS = 2048  # of a tile
_SCALED = {  # the numbers that each kind of scaling takes, None: has to be given
    "llama3": dict.fromkeys(("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")),
    "yarn": dict(
        factor=None, original_max_position_embeddings=None, attention_factor=0.0, beta_fast=32.0, beta_slow=1.0,
        truncate=True,
    ),
}  # fmt: skip


@triton.jit(do_not_specialize=["R", "n_outer", "n_inner"])
def _rotary_fwd_kernel(
    x_ptr, cos_ptr, sin_ptr, y_ptr, x_strides, y_strides, table_strides, R, n_outer, n_inner, direction,
    PAIRS: tl.constexpr, REST: tl.constexpr, INTERLEAVED: tl.constexpr, ACC: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    """A program: BLOCK_R rows, each a head of a token. Strides are of the batch, the outer and the inner axis.

    2 PAIRS elements of a row are rotated, REST more are copied.
    """
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    batch, outer, inner = rows // n_inner // n_outer, rows // n_inner % n_outer, rows % n_inner
    x_ptrs = x_ptr + _offsets(batch, outer, inner, x_strides, ALIGN)
    y_ptrs = y_ptr + _offsets(batch, outer, inner, y_strides, ALIGN)
    table = _offsets(batch, outer, inner, table_strides, ALIGN)
    in_rows = (rows < R)[:, None]
    cols = tl.arange(0, BLOCK_P)
    inside = in_rows & (cols < PAIRS)
    # [BLOCK_R, BLOCK_P]
    cos = tl.load(cos_ptr + table + cols, mask=inside, other=0.0).to(ACC)
    sin = tl.load(sin_ptr + table + cols, mask=inside, other=0.0).to(ACC) * direction
    if INTERLEAVED:
        both = tl.arange(0, 2 * BLOCK_P)
        # [BLOCK_R, 2 BLOCK_P]
        x = tl.load(x_ptrs + both, mask=in_rows & (both < 2 * PAIRS), other=0.0).to(ACC)
        a, b = tl.split(tl.reshape(x, (BLOCK_R, BLOCK_P, 2)))
        y = tl.reshape(tl.join(a * cos - b * sin, b * cos + a * sin), (BLOCK_R, 2 * BLOCK_P))
        tl.store(y_ptrs + both, y.to(y_ptr.dtype.element_ty), mask=in_rows & (both < 2 * PAIRS))
    else:
        # [BLOCK_R, BLOCK_P]
        a = tl.load(x_ptrs + cols, mask=inside, other=0.0).to(ACC)
        b = tl.load(x_ptrs + PAIRS + cols, mask=inside, other=0.0).to(ACC)
        tl.store(y_ptrs + cols, (a * cos - b * sin).to(y_ptr.dtype.element_ty), mask=inside)
        tl.store(y_ptrs + PAIRS + cols, (b * cos + a * sin).to(y_ptr.dtype.element_ty), mask=inside)
    if REST > 0:
        rest = tl.arange(0, BLOCK_REST)
        behind = in_rows & (rest < REST)
        # [BLOCK_R, BLOCK_REST]
        tl.store(y_ptrs + 2 * PAIRS + rest, tl.load(x_ptrs + 2 * PAIRS + rest, mask=behind), mask=behind)


@triton.jit
def _offsets(batch, outer, inner, strides, ALIGN: tl.constexpr):
    b, o, i = strides[0] // ALIGN * ALIGN, strides[1] // ALIGN * ALIGN, strides[2] // ALIGN * ALIGN
    return (batch.to(tl.int64) * b + outer.to(tl.int64) * o + inner.to(tl.int64) * i)[:, None]


@functools.lru_cache(maxsize=1024)
def _launch(
    shape: tuple[int, ...], x_strides: tuple[int, ...], y_strides: tuple[int, ...], table_strides: tuple[int, int],
    pairs: int, interleaved: bool, inverse: bool, dtype: torch.dtype,
) -> Launch:  # fmt: skip
    batch, heads, tokens, size = shape
    tables = (table_strides[0], 0, table_strides[1])
    # The axis that is closer in memory is the inner one.
    order = (0, 1, 2) if x_strides[2] <= x_strides[1] else (0, 2, 1)
    strides = [tuple(of[axis] for axis in order) for of in (x_strides, y_strides, tables)]
    rows, rest = batch * heads * tokens, size - 2 * pairs
    flags: dict[str, Any] = dict(
        PAIRS=pairs, REST=rest, INTERLEAVED=interleaved, ACC=tl.float64 if dtype == torch.float64 else tl.float32,
        ALIGN=math.gcd(8, *(x for of in strides for x in of)),
    )  # fmt: skip
    tile = dict(BLOCK_P=pow2(pairs), BLOCK_REST=pow2(max(rest, 1)), num_warps=4)
    tile["BLOCK_R"] = max(1, ELEMENTS // max(2 * tile["BLOCK_P"], tile["BLOCK_REST"] // 2))
    scalars = (*strides, rows, shape[order[1]], shape[order[2]], -1.0 if inverse else 1.0)
    return Launch(_rotary_fwd_kernel, lambda tile: (cdiv(rows, tile["BLOCK_R"]),), flags, [tile], scalars)


def rotary_fwd(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, inverse: bool) -> Tensor:
    """x (B, H, T, D), rotated by the angles of cos and sin (T or B, T, R / 2), or back."""
    y = _rotary_fwd_fake(x)
    x = x if x.stride(3) == 1 else x.contiguous()
    if cos.stride() != sin.stride() or cos.stride(-1) != 1:
        cos, sin = cos.contiguous(), sin.contiguous()
    tables = (cos.stride(0) if cos.dim() == 3 and len(cos) > 1 else 0, cos.stride(-2))
    how = cos.shape[-1], interleaved, inverse, x.dtype
    _launch(tuple(x.shape), x.stride()[:3], y.stride()[:3], tables, *how)(x, cos, sin, y)
    return y


def _rotary_fwd_fake(x: Tensor, *_: Any) -> Tensor:
    y = torch.empty_like(x)  # as x lies in memory, without gaps
    return y if y.stride(3) == 1 else torch.empty_like(x, memory_format=torch.contiguous_format)


class _Rotary(Function):
    """y; its gradient is itself on dy, backwards, so every derivative is fused."""

    forward = registered_forward(rotary_fwd, _rotary_fwd_fake)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, cos, sin, ctx.interleaved, ctx.inverse = inputs
        ctx.save_for_backward(cos, sin)

    @staticmethod
    def backward(ctx, dy):
        return _rotate(dy, *ctx.saved_tensors, ctx.interleaved, not ctx.inverse), None, None, None, None


_rotate = KernelFunction(rotary_fwd, _Rotary)


def rotary(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> Tensor:
    """Rotate the first R elements of each head by its token's angles; the others stay.

    Args:
        x: queries or keys (B, H, T, D) in float16, bfloat16 or float32 (float64 on the CPU's backends), with any
            strides; a last axis that is not contiguous is copied once.
        cos, sin: (T, R / 2), or (B, T, R / 2) with a row's own positions (B may be 1), R <= D, in any of x's dtypes:
            see `rotary_tables`. They get no gradient.
        interleaved: whether the pairs are neighbours, 2 i and 2 i + 1 (GPT-J), or i and i + R / 2 (Llama, GPT-NeoX).

    Returns:
        A tensor of x's shape, dtype and order of axes in memory; computed in float32 and rounded once.

    Raises:
        ValueError, TypeError: for shapes, dtypes or devices that do not fit.
        NotImplementedError: for tables that require a gradient.

    Source: Su et al., arXiv:2104.09864; `tileformer.kernels.reference.rotary` is the definition.

    Example:
        >>> cos, sin = rotary_tables(4, torch.arange(2))
        >>> rotary(torch.ones(1, 1, 2, 4), cos, sin)[0, 0, 1]
        tensor([-0.3012,  0.9900,  1.3818,  1.0099])
    """
    if type(x) is not Tensor or x.dtype not in checks.FLOATING:
        checks.floating("rotary", x=x)
    checks.floating("rotary", cos=cos, sin=sin)
    batch, tokens, size = x.shape[0] if x.dim() == 4 else -1, x.shape[-2:-1], x.shape[-1:]
    fits = cos.dim() in (2, 3) and cos.shape[-2:-1] == tokens and (cos.dim() == 2 or cos.shape[0] in (1, batch))
    if batch < 0 or not fits or not 0 < 2 * cos.shape[-1] <= size[0]:
        raise ValueError(
            f"rotary: cos has shape {tuple(cos.shape)}, expected (T, R / 2) or (B, T, R / 2), R <= D, "
            f"for x (B, H, T, D) of {tuple(x.shape)}: transpose or slice one of them"
        )
    checks.fits("rotary", "sin", sin, x, cos.shape)
    checks.same_device("rotary", x, cos=cos)
    for name, table in (("cos", cos), ("sin", sin)):
        if checks.differentiated(table):
            raise NotImplementedError(f"rotary: {name} requires a gradient, and gets none: pass {name}.detach()")
    backend = choose("rotary", x)
    if backend == "reference":
        return reference.rotary(x, cos, sin, interleaved=interleaved)
    if backend == "torch":
        return _torch_rotary(x, cos, sin, interleaved)
    return _rotate(x, cos, sin, interleaved, False)


def _torch_rotary(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    size, wide = 2 * cos.shape[-1], torch.promote_types(x.dtype, torch.float32)
    cos, sin = (t.to(wide).unsqueeze(-3) for t in (cos, sin))
    rotated = x[..., :size].to(wide)
    a, b = rotated.unflatten(-1, (-1, 2)).unbind(-1) if interleaved else rotated.chunk(2, -1)
    pair = torch.addcmul(a * cos, b, sin, value=-1), torch.addcmul(b * cos, a, sin)
    y = torch.stack(pair, -1).flatten(-2) if interleaved else torch.cat(pair, -1)
    return y.to(x.dtype) if size == x.shape[-1] else torch.cat([y.to(x.dtype), x[..., size:]], -1)


def rotary_tables(
    dim: int, positions: Tensor, base: float = 10000.0, scaling: Mapping[str, Any] | None = None
) -> tuple[Tensor, Tensor]:
    """cos and sin of the angle of each position and pair, for `rotary`: position / base^(2 i / dim), i < dim / 2.

    Args:
        dim: R, how many elements of a head are rotated.
        positions: of the tokens, (T,) or (B, T), integers or not.
        base: the `rope_theta` of a configuration.
        scaling: for positions beyond those of training, in the words of Hugging Face's configurations. `rope_type`
            "llama3" takes factor, low_freq_factor, high_freq_factor and original_max_position_embeddings; "yarn" takes
            factor and original_max_position_embeddings, and may take attention_factor, beta_fast, beta_slow, truncate.

    Returns:
        Two tensors (..., dim / 2) in float32 on the device of the positions; angles are computed in float64.

    Raises:
        ValueError: for an odd dim, and for a kind or a number of scaling that is missing or unknown.

    Source: Su et al., arXiv:2104.09864; Llama 3.1's model code; YaRN: Peng et al., arXiv:2309.00071.

    Example:
        >>> rotary_tables(2, torch.arange(3))[0][:, 0]
        tensor([ 1.0000,  0.5403, -0.4161])
    """
    if dim <= 0 or dim % 2:
        raise ValueError(f"rotary_tables: dim must be even and positive, got {dim}: it counts the elements rotated")
    exponent = torch.arange(0, dim, 2, dtype=torch.float64, device=positions.device) / dim
    frequency, scale = base**-exponent, 1.0
    if scaling is not None:
        kept, factor, scale = _kept(dim, base, frequency, scaling)
        frequency = frequency * (kept + (1 - kept) / factor)
    angle = positions[..., None].double() * frequency
    return (angle.cos() * scale).float(), (angle.sin() * scale).float()


def _kept(dim: int, base: float, frequency: Tensor, scaling: Mapping[str, Any]) -> tuple[Tensor, float, float]:
    """Which share of each frequency is kept, by what the rest is divided, and a factor for cos and sin."""
    kind = scaling.get("rope_type")
    if kind not in _SCALED:
        raise ValueError(f"rotary_tables: rope_type must be one of {', '.join(_SCALED)}, got {kind!r}")
    numbers = {k: x for k, x in scaling.items() if x is not None and k not in ("rope_type", "rope_theta")}
    o = {**_SCALED[kind], **numbers}
    if o.keys() != _SCALED[kind].keys() or None in o.values():
        raise ValueError(f"rotary_tables: {kind} takes {', '.join(_SCALED[kind])}, got {', '.join(numbers) or 'none'}")
    trained, factor = o["original_max_position_embeddings"], o["factor"]
    if kind == "llama3":
        turns = trained * frequency / (2 * math.pi)  # in the window of training
        kept = (turns - o["low_freq_factor"]) / (o["high_freq_factor"] - o["low_freq_factor"])
        return kept.clamp(0, 1), factor, 1.0
    pair = lambda turns: dim * math.log(trained / (turns * 2 * math.pi)) / (2 * math.log(base))  # noqa: E731
    first, last = pair(o["beta_fast"]), pair(o["beta_slow"])
    if o["truncate"]:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, dim - 1)
    last = last + 0.001 if first == last else last
    kept = 1 - ((torch.arange(dim // 2, dtype=frequency.dtype, device=frequency.device) - first) / (last - first))
    return kept.clamp(0, 1), factor, o["attention_factor"] or (0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0)
