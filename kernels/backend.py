"""Which implementation serves a call: one context manager, one environment variable, one function the public ops call."""

from __future__ import annotations

import contextlib
import os
import threading
import warnings
from collections.abc import Iterator

import torch
from torch import Tensor

from tileformer.kernels import launch

BACKENDS = ("auto", "triton", "interpret", "torch", "reference")
TRITON_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
OLDEST_ARCH = 80


def _known(name: str, source: str = "") -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source}unknown backend {name!r}: choose one of {', '.join(BACKENDS)}")
    return name


_from_environment = _known(os.environ.get("TILEFORMER_BACKEND") or "auto", "TILEFORMER_BACKEND: ")  # empty as unset


class _Choice(threading.local):  # not a ContextVar: reading one breaks torch.compile(fullgraph=True)
    name = _from_environment


_choice = _Choice()


def current_backend() -> str:
    """The backend asked for in this thread: "auto" unless `use_backend` or TILEFORMER_BACKEND said otherwise."""
    return _choice.name


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Serve the public ops called inside (in this thread) with one backend.

    A backward runs what its forward chose. But torch runs the backward of CUDA tensors in a thread of its own, and there
    `torch.utils.checkpoint` calls a forward again: set TILEFORMER_BACKEND, which all threads follow, to use both.

    Args:
        name: "auto", "triton" (CUDA tensors), "interpret" (the Triton kernels, interpreted, CPU tensors), "torch" or "reference".

    Raises:
        ValueError: for an unknown name. A backend that cannot serve a call raises at that call.
    """
    before, _choice.name = _choice.name, _known(name)
    try:
        yield
    finally:
        _choice.name = before


def choose(op: str, x: Tensor) -> str:
    """The backend that serves this call of `op` on tensors like `x`; never "auto".

    Raises:
        ValueError: if the backend asked for cannot take the tensor's device or dtype.
    """
    name = _choice.name
    if name == "auto":
        if not x.is_cuda or x.dtype not in TRITON_DTYPES:
            return "torch"
        arch = launch.arch_of(x)
        if arch < OLDEST_ARCH:
            _warn_old_arch(arch)
            return "torch"
        return "triton"
    if name == "triton":
        if not (x.is_cuda or launch.recording()):
            raise ValueError(
                f"{op}: backend 'triton' needs CUDA tensors, got {x.device.type}: move them, or use_backend('interpret')"
            )
        if x.dtype not in TRITON_DTYPES:
            raise ValueError(
                f"{op}: backend 'triton' takes float16, bfloat16 or float32, got {_short(x.dtype)}: use_backend('torch')"
            )
    if name == "interpret" and x.device.type != "cpu":
        raise ValueError(
            f"{op}: backend 'interpret' needs CPU tensors, got {x.device.type}: move them, or use 'triton'"
        )
    return name


_warned: set[int] = set()


def _warn_old_arch(arch: int) -> None:
    if arch not in _warned:
        _warned.add(arch)
        warnings.warn(
            f"sm_{arch} is older than sm_{OLDEST_ARCH}: tileformer uses the torch backend there", stacklevel=4
        )


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
