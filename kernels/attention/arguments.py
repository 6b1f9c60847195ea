"""What `attention` refuses, before anything runs: each message shows both values and the likely fix."""

from __future__ import annotations

from torch import Tensor
import torch

MAX_HEAD_DIM = 256


def check_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, key_mask: Tensor | None, causal: bool | str,
    dropout_p: float, seed: Tensor | None, backend: str,
) -> None:  # fmt: skip
    """Raise ValueError, TypeError or NotImplementedError for arguments of `attention` that do not fit together."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 4:
            raise ValueError(f"attention: {name} must be (B, H, T, D), got shape {tuple(x.shape)}")
        if x.dtype != q.dtype or not x.is_floating_point():
            raise TypeError(f"attention: {name} is {x.dtype}, q is {q.dtype}: cast both to one floating dtype")
    for name, x in (("k", k), ("v", v), ("mask", mask), ("key_mask", key_mask), ("seed", seed)):
        if x is not None and x.device != q.device:
            raise ValueError(f"attention: {name} is on {x.device}, q on {q.device}: move it with .to(q.device)")
    (b, h, t_q, d), (h_kv, t_k) = q.shape, k.shape[1:3]
    if v.shape != k.shape:
        raise ValueError(f"attention: v has shape {tuple(v.shape)}, k has {tuple(k.shape)}: they must be equal")
    if k.shape[0] != b or k.shape[3] != d:
        raise ValueError(f"attention: q is {tuple(q.shape)}, k is {tuple(k.shape)}: batch and head size must be equal")
    if h_kv == 0 or h % h_kv:
        raise ValueError(f"attention: {h} query heads and {h_kv} key heads: the first must be a multiple of the second")
    if not 1 <= d <= MAX_HEAD_DIM:
        raise ValueError(f"attention: head size {d} is outside 1 to {MAX_HEAD_DIM}")
    if causal not in (False, True, "top_left", "bottom_right"):
        raise ValueError(f"attention: causal={causal!r}: use False, True, 'top_left' or 'bottom_right'")
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"attention: dropout_p={dropout_p} is outside 0 to 1")
    if seed is not None and (seed.dtype != torch.int64 or seed.numel() != 1):
        raise ValueError(f"attention: seed must be an int64 tensor with one element, got {seed.dtype} {tuple(seed.shape)}")
    if key_mask is not None and (key_mask.dtype != torch.bool or key_mask.shape != (b, t_k)):
        raise ValueError(
            f"attention: key_mask must be boolean {(b, t_k)}, True = a real key, got {key_mask.dtype} {tuple(key_mask.shape)}"
        )
    if mask is None:
        return
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise TypeError(f"attention: mask is {mask.dtype}: use a boolean mask (True = may attend) or a floating one (added to scores)")
    padded = (1,) * (4 - mask.dim()) + tuple(mask.shape)
    if len(padded) > 4 or any(m not in (1, n) for m, n in zip(padded, (b, h, t_q, t_k), strict=True)):
        raise ValueError(f"attention: mask {tuple(mask.shape)} does not broadcast to (B, H, T_q, T_k) = {(b, h, t_q, t_k)}")
    if mask.requires_grad and backend in ("triton", "interpret"):
        raise NotImplementedError(
            f"attention: backend '{backend}' has no gradient for a floating mask: detach it, or use_backend('torch')"
        )
