"""What a launch has to know of its device (also one that is only pretended) and of its dtype."""

import functools

import torch
from torch import Tensor
from torch.compiler import is_compiling

INTERPRETED = 0  # the "architecture" of CPU tensors, so that a tile table can have a row for the interpreter
recorded_arch: int | None = None  # see record_for


def recording() -> bool:
    """True while a driver is active that compiles and records launches on CPU tensors instead of running them."""
    return recorded_arch is not None


def record_for(arch: int | None) -> None:
    """Treat CPU tensors as if they lay on a GPU of this architecture (90 for sm_90); None ends it.

    Only a driver that compiles without executing may set this (tileformer.bench.recording).
    """
    global recorded_arch
    recorded_arch = arch


def arch_of(x: Tensor) -> int:
    """Compute capability of the tensor's device as an integer (90 for sm_90), or INTERPRETED for CPU tensors."""
    if recorded_arch is not None:
        return recorded_arch
    if not x.is_cuda:
        return INTERPRETED
    # Without a cache, torch.compile folds this; get_device_capability would break the graph.
    return (_capability if is_compiling() else _cached_capability)(x.device.index or 0)


def _capability(index: int) -> int:
    if not torch.cuda.is_available():  # a fake CUDA tensor on a machine without a GPU: shapes only, any answer serves
        return 90
    device = torch.cuda.get_device_properties(index)
    return 10 * device.major + device.minor


_cached_capability = functools.cache(_capability)


@functools.lru_cache
def multiprocessors(device: torch.device) -> int:
    """How many programs a GPU runs side by side, at least; any number without a GPU (a fake CUDA tensor)."""
    gpu = device.type == "cuda" and torch.cuda.is_available()
    return torch.cuda.get_device_properties(device).multi_processor_count if gpu else 132


@functools.cache
def wider(dtype: torch.dtype) -> torch.dtype:
    """The dtype of statistics: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def dot_precision(x: Tensor) -> str:
    """Of float32 dots: IEEE unless torch allows TF32."""
    tf32 = x.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if tf32 else "ieee"
