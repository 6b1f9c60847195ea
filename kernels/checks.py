"""Argument checks that several ops share. Each raises one line that shows the values and the likely fix."""

import operator
import sys
from collections.abc import Sequence
from typing import Any, Literal, NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.compiler import is_compiling

Align = Literal["top_left", "bottom_right"]
Causal = bool | Align  # True is top left
FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# What other libraries call it, and what it is here.
_ELSEWHERE = {
    "is_causal": "causal=",
    "attn_mask": "mask= (True = may attend)",
    "attn_bias": "bias=",
    "key_padding_mask": "key_mask= (True = a real key)",
    "need_weights": "return_weights=",
    "enable_gqa": "always on: k and v may have fewer heads",
    "dropout": "dropout_p=",
    "softmax_scale": "scale=",
    "window_size": "window= (None, not -1, is no limit)",
    "dim": "the last axis: pass x.movedim(dim, -1)",
    "training": "the caller's: pass p=0.0 in evaluation",
    "inplace": "never in place",
    "size_average": "reduction=",
    "reduce": "reduction=",
}


def name_of(dtype: torch.dtype) -> str:
    """ "float16" for torch.float16."""
    return str(dtype).removeprefix("torch.")


def misnamed(op: str, wrong: dict[str, Any]) -> NoReturn:
    """Raise Python's TypeError for an argument that `op` does not have, with our name for another library's."""
    name = next(iter(wrong))
    here = f": here it is {_ELSEWHERE[name]}" if name in _ELSEWHERE else ""
    raise TypeError(f"{op}() got an unexpected keyword argument {name!r}{here}")


def tensors(op: str, **given: Any) -> None:
    """Raise TypeError unless everything given is a tensor with one shape, or None."""
    for name, x in given.items():
        if x is not None and not isinstance(x, Tensor):
            raise TypeError(f"{op}: {name} must be a torch.Tensor, got {type(x).__name__}: torch.as_tensor makes one")
        if x is not None and x.is_nested:
            raise TypeError(f"{op}: {name} is a nested tensor: pad it, or pass {name}.values()")


def is_sharded(x: Any) -> bool:
    """Whether x is a DTensor. Its module is loaded if there is one."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(x, module.DTensor)


def plain(op: str, *tensors: Any) -> None:
    """Raise TypeError where a DTensor or a nested tensor came to code that reads plain memory."""
    for x in tensors:
        if is_sharded(x):
            has = f"a DTensor with placements {x.placements}"
            raise TypeError(f"{op}: {has} stands beside plain tensors: distribute them all, or pass x.to_local()")
        if isinstance(x, Tensor) and x.is_nested:
            raise TypeError(f"{op}: nested tensors are not supported: pad them and pass a mask, or pass x.values()")


def not_traced(op: str) -> None:
    """Raise NotImplementedError inside torch.jit.trace, which would record this call's sizes and random bits."""
    if not is_compiling() and torch._C._is_tracing():
        raise NotImplementedError(
            f"{op}: torch.jit.trace records neither dropout nor the fused attention kernels: use torch.export, or "
            "trace in evaluation under use_backend('torch')"
        )


def floating(op: str, **given: Any) -> None:
    """Raise TypeError unless everything given is None or a floating tensor whose dtype has arithmetic."""
    tensors(op, **given)
    for name, x in given.items():
        if x is not None and x.dtype not in FLOATING:
            hint = ", which has no arithmetic: scale it into .bfloat16()"
            hint = hint if x.is_floating_point() else ": convert it, for example with .float()"
            raise TypeError(f"{op}: {name} must be floating, got {name_of(x.dtype)}{hint}")


def differentiated(x: Tensor) -> bool:
    """Whether a derivative by x is asked for here, backward or forward."""
    if x.requires_grad and torch.is_grad_enabled():
        return True
    forward = not is_compiling() and getattr(forward_ad, "_current_level", -1) >= 0
    return forward and forward_ad.unpack_dual(x).tangent is not None


def number(op: str, name: str, x: Any, instead: str = "pass float(x) for a constant") -> float:
    """x as a float.

    Raises:
        NotImplementedError: for a tensor that a derivative is asked for by: numbers get none.
        TypeError: for a tensor of several elements or on a GPU (the host would wait), or for no number.
    """
    if type(x) is float:
        return x
    if isinstance(x, Tensor):
        if differentiated(x):
            raise NotImplementedError(f"{op}: {name} is a tensor that requires a gradient, and gets none: {instead}")
        if x.numel() != 1 or x.device.type != "cpu":
            raise TypeError(f"{op}: {name} is {tuple(x.shape)} on {x.device}, but must be a number: pass {name}.item()")
    elif not hasattr(x, "__float__"):
        raise TypeError(f"{op}: {name} must be a number, got {x!r:.80}")
    return float(x)


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
    """`floating`, `same_device` and `same_shape` at once; they are called only to raise."""
    if x is None:
        return
    computable = isinstance(x, Tensor) and not x.is_nested and x.dtype in FLOATING
    if not computable or x.shape != shape or x.device != like.device:
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
            raise ValueError(f"{op}: {name} of shape {tuple(x.shape)} does not expand to {tuple(shape)}: reshape it")


def causal_variant(op: str, mask: Any, shape: Sequence[int]) -> Align | None:
    """What a `torch.nn.attention.bias.CausalBias`, a tensor without values, stands for; None for any other mask.

    Raises ValueError where it was made for other sizes than `shape` ends with.
    """
    if type(mask) is Tensor or type(mask).__name__ != "CausalBias":
        return None
    size = getattr(mask, "seq_len_q", None), getattr(mask, "seq_len_kv", None)  # none after indexing
    if size != tuple(shape[-2:]):
        raise ValueError(f"{op}: a CausalBias for {size} beside scores of {tuple(shape[-2:])}: make it for their sizes")
    return "bottom_right" if mask.variant.name == "LOWER_RIGHT" else "top_left"


def triangle(variant: Causal, shape: Sequence[int], device: torch.device) -> Tensor:
    """The boolean mask (T_q, T_k) that a name or `causal_variant` stands for, True = may attend."""
    t_q, t_k = shape[-2:]
    ones = torch.ones(t_q, t_k, dtype=torch.bool, device=device)
    return ones.tril(t_k - t_q if variant == "bottom_right" else 0)


def mask(op: str, shape: Sequence[int], like: Tensor, mask: Tensor | None) -> None:
    """Raise unless the mask is boolean (True = kept) or floating (added), expands to `shape` and is where `like` is."""
    tensors(op, mask=mask)
    if mask is not None and mask.is_floating_point():
        floating(op, mask=mask)
    elif mask is not None and mask.dtype != torch.bool:
        raise TypeError(f"{op}: mask must be boolean (True = kept) or floating, got {name_of(mask.dtype)}: try .bool()")
    same_device(op, like, mask=mask)
    broadcastable(op, shape, mask=mask)


def causal(op: str, causal: bool | str) -> None:
    """Raise ValueError unless `causal` names an alignment."""
    if causal not in (False, True, "top_left", "bottom_right"):
        raise ValueError(f"{op}: causal is False, True, 'top_left' or 'bottom_right', got {causal!r}")


def rate(op: str, p: float, seed: Tensor | None, like: Tensor) -> None:
    """Raise unless p is a probability and the seed, if any, is one int64 element on the device of `like`."""
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"{op}: the dropout rate must lie between 0 and 1, got {p}")
    tensors(op, seed=seed)
    if seed is not None:
        if seed.dtype != torch.int64:
            raise TypeError(f"{op}: seed must be int64, got {name_of(seed.dtype)}: try seed.long()")
        if seed.numel() != 1:
            raise ValueError(f"{op}: seed must hold one element, got shape {tuple(seed.shape)}")
        same_device(op, like, seed=seed)


def seeded(op: str, seed: Any, device: torch.device) -> Tensor | None:
    """The seed as a tensor on this device, where it is an integer: filled there, which waits for nothing."""
    if seed is None or isinstance(seed, Tensor):
        return seed
    try:
        number = operator.index("" if isinstance(seed, bool) else seed)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"{op}: seed must be an integer, or an int64 tensor of one element, got {seed!r:.80}") from None
    if not 0 <= number < 2**63:
        raise ValueError(f"{op}: seed must lie between 0 and 2**63 - 1, got {number}: try seed % 2**63")
    return torch.full((1,), number, dtype=torch.int64, device=device)
