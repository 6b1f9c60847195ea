"""Which implementation serves a call: a context manager, an environment variable, a function the public ops call."""

import contextlib
import contextvars
import functools
import os
import threading
import warnings
from collections.abc import Iterator
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.compiler import is_compiling

from tileformer.kernels import checks, device

Backend = Literal["auto", "fastest", "triton", "interpret", "torch", "reference"]
BACKENDS = get_args(Backend)
TRITON_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
OLDEST_ARCH = 80
FASTEST = "plain and causal attention in 16 bits by torch's fused kernels, all else by tileformer's"


def _known(name: str, source: str = "") -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source}unknown backend {name!r}: choose one of {', '.join(BACKENDS)}")
    return name


_from_environment = _known(os.environ.get("TILEFORMER_BACKEND") or "auto", "TILEFORMER_BACKEND: ")  # empty as unset


class _OfThread(threading.local):
    """The thread's copy of the choice, which torch.compile can read and guard: it does not trace a ContextVar."""

    def __init__(self) -> None:
        self.name = _from_environment


_choice = contextvars.ContextVar("tileformer_backend", default=_from_environment)
_of_thread = _OfThread()


def current_backend() -> str:
    """The backend asked for here: "auto" unless `use_backend` or TILEFORMER_BACKEND said otherwise."""
    return _of_thread.name if is_compiling() else _choice.get()


def _set(name: str) -> None:
    _of_thread.name = name
    if not is_compiling():
        _choice.set(name)


@contextlib.contextmanager
def use_backend(name: Backend) -> Iterator[None]:
    """Serve the public ops called inside with one backend: in this thread, and of asyncio's tasks in this one alone.

    A backward runs what its forward chose. But torch runs the backward of CUDA tensors in a thread of its own, where
    `torch.utils.checkpoint` calls a forward again: set TILEFORMER_BACKEND, which all threads follow, to use both.
    A generator shares its caller's context: one that is suspended inside has chosen for its caller too. What
    torch.compile made follows the thread's latest choice: let no task `await` between this and a call of it.

    Args:
        name: "auto", "fastest" (as "auto", but attention goes to torch's fused kernels where they keep our rules),
            "triton" (CUDA tensors), "interpret" (the Triton kernels on CPU tensors), "torch" or "reference".

    Raises:
        ValueError: for an unknown name. A backend that cannot serve a call raises at that call.
    """
    before = current_backend()
    _set(_known(name))
    try:
        yield
    finally:
        _set(before)


def choose(op: str, x: Tensor) -> str:
    """The backend that serves this call of `op` on tensors like `x`; never "auto" or "fastest".

    Raises:
        ValueError: if the backend asked for cannot take the tensor's device or dtype.
    """
    name = _of_thread.name if is_compiling() else _choice.get()
    if name in ("auto", "fastest"):
        if not x.is_cuda or x.dtype not in TRITON_DTYPES:
            return "torch"
        arch = device.arch_of(x)
        if arch < OLDEST_ARCH:
            _warn_old_arch(arch)
            return "torch"
        return "triton"
    if name == "triton":
        if not (x.is_cuda or device.recording()):
            raise ValueError(f"{op}: backend 'triton' needs CUDA tensors, got {x.device.type}: move, or 'interpret'")
        if x.dtype not in TRITON_DTYPES:
            raise ValueError(f"{op}: backend 'triton' takes no {checks.name_of(x.dtype)}: cast it, or use 'torch'")
    if name == "interpret" and x.device.type != "cpu":
        raise ValueError(f"{op}: backend 'interpret' needs CPU tensors, got {x.device.type}: move, or use 'triton'")
    return name


@functools.cache
def _warn_old_arch(arch: int) -> None:
    warnings.warn(f"sm_{arch} is older than sm_{OLDEST_ARCH}: tileformer uses the torch backend there", stacklevel=4)
