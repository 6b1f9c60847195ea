"""What `attention` refuses, before anything runs: each message shows the values and the likely fix."""

from __future__ import annotations

import torch
from torch import Tensor

from tileformer.kernels import checks

MAX_HEAD_DIM = 256


def check_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    key_mask: Tensor | None,
    causal: bool | str,
    dropout_p: float,
    seed: Tensor | None,
    backend: str,
) -> None:
    """Raise ValueError, TypeError or NotImplementedError for arguments of `attention` that do not fit together."""
    checks.floating("attention", q=q, k=k, v=v)
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 4:
            raise ValueError(f"attention: {name} must be (B, H, T, D), got shape {tuple(x.shape)}")
        if x.dtype != q.dtype:
            raise TypeError(
                f"attention: {name} is {checks.name_of(x.dtype)}, q is {checks.name_of(q.dtype)}: cast them to one dtype"
            )
    checks.same_device("attention", q, k=k, v=v, key_mask=key_mask)
    (b, h, t_q, d), (h_kv, t_k) = q.shape, k.shape[1:3]
    if v.shape != k.shape:
        raise ValueError(f"attention: v has shape {tuple(v.shape)}, k has {tuple(k.shape)}: they must be equal")
    if k.shape[0] != b or k.shape[3] != d:
        raise ValueError(f"attention: q is {tuple(q.shape)}, k is {tuple(k.shape)}: batch and head size must be equal")
    if h_kv == 0 or h % h_kv:
        raise ValueError(f"attention: {h} query heads and {h_kv} key heads: the first must be a multiple of the second")
    if not 1 <= d <= MAX_HEAD_DIM:
        raise ValueError(f"attention: head size {d} is outside 1 to {MAX_HEAD_DIM}")
    checks.causal("attention", causal)
    checks.rate("attention", dropout_p, seed, q)
    if key_mask is not None and (key_mask.dtype != torch.bool or key_mask.shape != (b, t_k)):
        raise ValueError(
            f"attention: key_mask must be boolean {(b, t_k)}, True = a real key, "
            f"got {checks.name_of(key_mask.dtype)} {tuple(key_mask.shape)}"
        )
    checks.mask("attention", (b, h, t_q, t_k), q, mask)
    if backend in ("triton", "interpret"):
        checks.no_mask_gradient("attention", mask, backend)
