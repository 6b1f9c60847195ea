"""Launch a kernel for the tensors at hand, with the first tile of a table that fits; register launchers as torch ops."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.errors import OutOfResources

from tileformer.kernels import interpreter

Tile = dict[str, int]

INTERPRETED = 0  # the "architecture" of CPU tensors, so that a tile table can have a row for the interpreter
selftest_due = os.environ.get("TILEFORMER_SELFTEST", "1") != "0"  # until this GPU has passed it
_recorded_arch: int | None = None
_too_big: set[tuple[Any, ...]] = set()


def recording() -> bool:
    """True while a driver is active that compiles and records launches on CPU tensors instead of running them."""
    return _recorded_arch is not None


def record_for(arch: int | None) -> None:
    """Treat CPU tensors as if they lay on a GPU of this architecture (90 for sm_90); None ends it.

    Only a driver that compiles without executing may set this (tileformer.bench.recording).
    """
    global _recorded_arch
    _recorded_arch = arch


def arch_of(x: Tensor) -> int:
    """Compute capability of the tensor's device as an integer (90 for sm_90), or INTERPRETED for CPU tensors."""
    if _recorded_arch is not None:
        return _recorded_arch
    return _capability(x.device.index or 0) if x.is_cuda else INTERPRETED


def _capability(index: int) -> int:
    if not torch.cuda.is_available():  # a fake CUDA tensor on a machine without a GPU: shapes only, any answer serves
        return 90
    device = torch.cuda.get_device_properties(
        index
    )  # torch.compile folds it; get_device_capability would break the graph
    return 10 * device.major + device.minor


def launch(
    kernel: Any,
    grid: Callable[[Tile], tuple[int, ...]],
    like: Tensor,
    args: Sequence[Any],
    flags: dict[str, Any],
    tiles: Sequence[Tile],
) -> None:
    """Run `kernel` under the device and current stream of `like`, with the first of `tiles` that the device can hold.

    Args:
        grid: number of programs for a tile; nothing is launched when it is 0.
        args: the kernel's runtime arguments, in order.
        flags: its feature constexprs.
        tiles: constexprs and launch options (BLOCK_*, num_warps, num_stages), best first, smallest last.
    """
    for tile in tiles:
        programs = grid(tile)
        if 0 in programs:
            return
        key = (kernel.fn.__name__, like.device, *flags.items(), *tile.items())
        if key in _too_big and tile is not tiles[-1]:
            continue
        try:
            return _run(kernel, programs, like, args, {**flags, **tile})
        except OutOfResources as error:
            if tile is tiles[-1]:
                raise
            _too_big.add(key)
            warnings.warn(
                f"{kernel.fn.__name__}: tile {tile} does not fit this device ({error}); using the next one",
                stacklevel=3,
            )


def _run(kernel: Any, programs: tuple[int, ...], like: Tensor, args: Sequence[Any], constexprs: dict[str, Any]) -> None:
    if like.is_cuda:
        if selftest_due and not recording():
            from tileformer.kernels import selftest  # which imports the ops, which import this module

            selftest.run_once(like.device)
        with torch.cuda.device(like.device):
            kernel[programs](*args, **constexprs)
    elif recording():
        kernel[programs](*args, **constexprs)
    else:
        interpreter.run(kernel, programs, args, constexprs)


_library = torch.library.Library("tileformer", "FRAGMENT")


def register(launcher: Callable[..., Any], fake: Callable[..., Any]) -> Callable[..., Any]:
    """Make `tileformer::<launcher's name>` from a typed function that returns new tensors; `fake` gives their shapes.

    One implementation serves all devices: compiled on CUDA tensors, interpreted on CPU tensors. `Library.define` costs
    a fraction of `torch.library.custom_op` per call.
    """
    name = launcher.__name__
    _library.define(name + torch.library.infer_schema(launcher, mutates_args=()))
    _library.impl(name, launcher, "CompositeExplicitAutograd")
    torch.library.register_fake(f"tileformer::{name}", fake, lib=_library)
    return getattr(torch.ops.tileformer, name).default


def cdiv(a: int, b: int) -> int:
    """Smallest integer >= a / b."""
    return -(-a // b)


def pow2(n: int, least: int = 1) -> int:
    """Smallest power of two >= n and >= least."""
    return max(least, triton.next_power_of_2(n))


def dot_flags(x: Tensor) -> dict[str, Any]:
    """Accumulator type (the wider of float32 and x's) and the precision of float32 dots (IEEE unless torch allows TF32)."""
    tf32 = x.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return dict(ACC=tl.float64 if x.dtype == torch.float64 else tl.float32, PRECISION="tf32" if tf32 else "ieee")
