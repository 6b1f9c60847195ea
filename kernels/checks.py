"""Argument checks that several ops share. Each raises one line that shows the values and the likely fix."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def name_of(dtype: torch.dtype) -> str:
    """ "float16" for torch.float16."""
    return str(dtype).removeprefix("torch.")


def floating(op: str, **tensors: Tensor | None) -> None:
    """Raise TypeError unless every tensor given has a real floating dtype."""
    for name, x in tensors.items():
        if x is not None and not x.is_floating_point():
            raise TypeError(
                f"{op}: {name} must be floating, got {name_of(x.dtype)}: convert it, for example with .float()"
            )


def same_device(op: str, like: Tensor, **tensors: Tensor | None) -> None:
    """Raise ValueError unless every tensor given lies on the device of `like`, the op's first argument."""
    for name, x in tensors.items():
        if x is not None and x.device != like.device:
            raise ValueError(f"{op}: {name} is on {x.device}, the first argument on {like.device}: move one of them")


def same_shape(op: str, shape: tuple[int, ...], **tensors: Tensor | None) -> None:
    """Raise ValueError unless every tensor given has exactly this shape."""
    for name, x in tensors.items():
        if x is not None and x.shape != shape:
            raise ValueError(f"{op}: {name} has shape {tuple(x.shape)}, expected {tuple(shape)}: reshape or expand it")


def fits(op: str, name: str, x: Tensor | None, like: Tensor, shape: Sequence[int]) -> None:
    """`floating`, `same_device` and `same_shape` at once, which are asked only for their words."""
    if x is not None and not (x.is_floating_point() and x.shape == shape and x.device == like.device):
        floating(op, **{name: x})
        same_device(op, like, **{name: x})
        same_shape(op, tuple(shape), **{name: x})


def broadcastable(op: str, shape: Sequence[int], **tensors: Tensor | None) -> None:
    """Raise ValueError unless every tensor given expands to this shape."""
    for name, x in tensors.items():
        if x is None:
            continue
        ends = zip(reversed(x.shape), reversed(shape), strict=False)
        if x.dim() > len(shape) or any(a != 1 and a != b for a, b in ends):
            raise ValueError(
                f"{op}: {name} of shape {tuple(x.shape)} does not expand to {tuple(shape)}: add or drop axes of size 1"
            )


def mask(op: str, shape: Sequence[int], like: Tensor, mask: Tensor | None) -> None:
    """Raise unless the mask is boolean (True = kept) or floating (added), expands to `shape` and is where `like` is."""
    if mask is not None and mask.dtype != torch.bool and not mask.is_floating_point():
        raise TypeError(
            f"{op}: mask must be boolean (True = kept) or floating (added), got {name_of(mask.dtype)}: try .bool()"
        )
    same_device(op, like, mask=mask)
    broadcastable(op, shape, mask=mask)


def no_mask_gradient(op: str, mask: Tensor | None, backend: str) -> None:
    """Raise NotImplementedError for a mask that requires a gradient, which the kernels do not compute."""
    if mask is not None and mask.requires_grad:
        raise NotImplementedError(
            f"{op}: backend {backend!r} has no gradient for a floating mask: detach it, or use_backend('torch')"
        )


def causal(op: str, causal: bool | str) -> None:
    """Raise ValueError unless `causal` names an alignment."""
    if causal not in (False, True, "top_left", "bottom_right"):
        raise ValueError(f"{op}: causal is False, True, 'top_left' or 'bottom_right', got {causal!r}")


def rate(op: str, p: float, seed: Tensor | None, like: Tensor) -> None:
    """Raise unless p is a probability and the seed, if any, is one int64 element on the device of `like`."""
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"{op}: the dropout rate must lie between 0 and 1, got {p}")
    if seed is not None:
        if seed.dtype != torch.int64:
            raise TypeError(f"{op}: seed must be int64, got {name_of(seed.dtype)}: try seed.long()")
        if seed.numel() != 1:
            raise ValueError(f"{op}: seed must hold one element, got shape {tuple(seed.shape)}")
        same_device(op, like, seed=seed)
