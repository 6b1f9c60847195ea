"""Launch a kernel for the tensors at hand, with the first tile of a table that the device can hold.

Triton's way to a launch (bind the arguments, print the options, look the kernel up) takes 13 to 20 microseconds. It is
taken once for each kind of arguments; later launches of that kind call the compiled kernel, as Triton 3.6 to 3.9 do.
"""

import contextlib
import functools
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.backends.compiler import BaseBackend
from triton.compiler import CompiledKernel
from triton.runtime import _allocation, driver, jit
from triton.runtime.errors import OutOfResources

from tileformer.kernels import device, interpreter

Tile = dict[str, int]

OPTIONS = {"enable_fp_fusion": True}  # Triton 3.9 warns of a default that will change
MAX_CACHED = 4096  # kinds of launches that are remembered: a process may meet new ones for ever
# Until this process has passed the self-test, or needs none. The package sets `selftest`, which imports the ops.
selftest_due = os.environ.get("TILEFORMER_SELFTEST", "1") != "0"
selftest: Callable[[torch.device], None] = globals().get("selftest", lambda device: None)

# The type and alignment of an argument as Triton sees them, or None where Triton has to be asked at each launch: a
# version whose launches nobody here has read, and AMD's, which look at more.
_specialize = getattr(jit, "native_specialize_impl", None)
if not (3, 6) <= tuple(map(int, triton.__version__.split(".")[:2])) < (3, 10) or torch.version.hip:
    _specialize = None


class _CachedKernel:
    """A kernel that Triton has compiled and loaded, to be launched on other arguments of the same kind."""

    def __init__(self, binary: CompiledKernel, tile: Tile, constexprs: tuple[Any, ...]) -> None:
        self.binary, self.tile, self.constexprs = binary, tile, constexprs
        self.wants_scratch = getattr(binary.metadata, "global_scratch_size", 0) > 0

    def run(self, like: Tensor, programs: tuple[int, ...], args: tuple[Any, ...]) -> None:
        """`binary[programs](*args)` where nobody listens; programs along three axes, args with constexprs."""
        index = like.get_device()
        if like.is_cuda and torch._C._cuda_getDevice() != index:
            with torch.cuda.device(index):
                return self.run(like, programs, args)
        binary, stream = self.binary, driver.active.get_current_stream(index)
        call = (*programs, stream, binary.function, binary.packed_metadata, None, None, None, *args)
        if self.wants_scratch:
            with scratch_allocator():
                binary.run(*call)
        else:
            binary.run(*call)


cached_kernels: dict[tuple[Any, ...], _CachedKernel] = {}
out_of_resources: set[tuple[Any, ...]] = set()  # tiles that a device could not hold


@dataclass(eq=False)
class Launch:
    """A kernel with all that is known before the tensors are: keep one for each kind of call.

    Args:
        grid: number of programs for a tile; nothing is launched when it is 0.
        flags: the kernel's feature constexprs.
        tiles: constexprs and launch options (BLOCK_*, num_warps, num_stages), best first, smallest last.
        scalars: the kernel's last runtime arguments.
        arrange: makes its first arguments of the tensors, for example with their strides; None: the tensors.
    """

    kernel: Any
    grid: Callable[[Tile], tuple[int, ...]]
    flags: dict[str, Any]
    tiles: Sequence[Tile]
    scalars: tuple[Any, ...] = ()
    arrange: Callable[..., tuple[Any, ...]] | None = None
    _ready: dict[Any, tuple[_CachedKernel, tuple[int, ...], tuple[Any, ...]]] = field(default_factory=dict, init=False)

    def __call__(self, *tensors: Tensor) -> None:
        """Run it under the device and current stream of the first tensor."""
        like, arch, address = tensors[0], device.recorded_arch, 0
        for x in tensors:
            address |= x.data_ptr()
        # Triton compiles for the alignment of each tensor. The key is for all aligned, the usual case.
        key = None if address % 16 else (arch, like.get_device(), *[x.dtype for x in tensors])
        args = self.arrange(*tensors) if self.arrange else tensors
        ready = self._ready.get(key) if key else None
        if ready and (arch or not selftest_due) and not has_launch_hooks(self.kernel):
            cached, programs, rest = ready
            cached.run(like, programs, args + rest)
        elif arch or like.is_cuda:
            self._slowly(like, args + self.scalars, key)
        elif 0 not in (programs := self.grid(self.tiles[0])):
            interpreter.run(self.kernel, programs, args + self.scalars, {**self.flags, **self.tiles[0]})

    def _slowly(self, like: Tensor, args: tuple[Any, ...], key: tuple[Any, ...] | None) -> None:
        """Run what Triton has compiled for such arguments, or let it compile; under `key` it is ready next time."""
        kind = None
        if _specialize and (device.recorded_arch or not selftest_due) and not has_launch_hooks(self.kernel):
            # What JITFunction.run looks at: dtype and alignment of tensors, width and divisibility of integers; also of
            # those that the kernel declares do_not_specialize: a key that is too fine is still right.
            types = _specialize(BaseBackend, args, False, True, True)
            place = device.recorded_arch, like.get_device()
            kind = self.kernel.fn, *place, *self.flags.values(), *self.tiles[0].values(), types
        cached = cached_kernels.get(kind) if kind else None
        if cached:
            programs = grid_3d(self.grid(cached.tile))
            if 0 in programs:
                return
            cached.run(like, programs, args + cached.constexprs)
        elif not (cached := self._by_triton(like, args)) or not kind:
            return
        else:
            if len(cached_kernels) >= MAX_CACHED:
                cached_kernels.clear()  # each comes back by one more launch through Triton
            cached_kernels[kind] = cached
        if key:
            self._ready[key] = cached, grid_3d(self.grid(cached.tile)), self.scalars + cached.constexprs

    def _by_triton(self, like: Tensor, args: tuple[Any, ...]) -> _CachedKernel | None:
        """Launch as Triton documents it, with the first tile that fits; None where nothing was compiled."""
        name = self.kernel.fn.__name__
        for tile in self.tiles:
            programs = self.grid(tile)
            if 0 in programs:
                return None
            too_big = (name, like.device, *self.flags.items(), *tile.items())
            if too_big in out_of_resources and tile is not self.tiles[-1]:
                continue
            constexprs = {**self.flags, **tile}
            try:
                binary = _run(self.kernel, programs, like, args, constexprs)
            except OutOfResources as error:
                if tile is self.tiles[-1]:
                    raise
                if len(out_of_resources) >= MAX_CACHED:
                    out_of_resources.clear()
                out_of_resources.add(too_big)
                why = f"{name}: tile {tile} does not fit this device ({error}); using the next one"
                warnings.warn(why, stacklevel=4)
                continue
            if not isinstance(binary, CompiledKernel):  # None or a promise, where a hook of Triton's took over
                return None
            return _CachedKernel(binary, tile, tuple(constexprs[x] for x in self.kernel.arg_names[len(args) :]))
        return None


def _run(kernel: Any, programs: tuple[int, ...], like: Tensor, args: Sequence[Any], constexprs: dict[str, Any]) -> Any:
    """Triton's documented launch on the tensor's device, or on the driver that records."""
    if device.recording() and not like.is_cuda:
        return kernel[programs](*args, **constexprs, **OPTIONS)
    if selftest_due and not device.recording():
        selftest(like.device)
    with torch.cuda.device(like.device), scratch_allocator():
        return kernel[programs](*args, **constexprs, **OPTIONS)


@contextlib.contextmanager
def scratch_allocator() -> Iterator[None]:
    """Inside, kernels that want memory for each program (tensor descriptors) get it without triton.set_allocator."""
    allocator = _allocation._allocator  # of each thread's context
    if not isinstance(allocator.get(), _allocation.NullAllocator):
        yield
        return
    before = allocator.set(lambda size, alignment, stream: torch.empty(size, dtype=torch.int8, device="cuda"))
    try:
        yield
    finally:
        allocator.reset(before)


def grid_3d(programs: tuple[int, ...]) -> tuple[int, ...]:
    """A grid along all three axes."""
    return (*programs, 1, 1)[:3]


def has_launch_hooks(kernel: Any) -> bool:
    """True if a launch has to go through Triton: a setting asks for another binary, or somebody listens to launches."""
    runtime = knobs.runtime
    return bool(
        runtime.debug
        or knobs.compilation.instrumentation_mode
        or runtime.add_stages_inspection_hook
        or getattr(runtime.launch_enter_hook, "calls", True)  # a chain, empty unless somebody listens
        or getattr(runtime.launch_exit_hook, "calls", True)
        or kernel.pre_run_hooks
    )


def cdiv(a: int, b: int) -> int:
    """Smallest integer >= a / b."""
    return -(-a // b)


@functools.lru_cache(maxsize=1024)
def pow2(n: int, least: int = 1) -> int:
    """Smallest power of two >= n and >= least."""
    return max(least, triton.next_power_of_2(n))
