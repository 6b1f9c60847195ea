"""Launch a kernel for the tensors at hand, with the first tile of a table that fits; register and differentiate launchers."""

from __future__ import annotations

import contextlib
import functools
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch._C import DispatchKey, DispatchKeySet, _dispatch_keys, _dispatch_tls_local_include_set, _has_torch_function
from torch._C._autograd import _profiler_enabled
from torch.autograd import forward_ad
from torch.compiler import is_compiling
from triton import knobs
from triton.backends.compiler import BaseBackend
from triton.compiler import CompiledKernel
from triton.runtime import _allocation, driver, jit
from triton.runtime.errors import OutOfResources

from tileformer.kernels import interpreter

Tile = dict[str, int]

OPTIONS = {"enable_fp_fusion": True}  # Triton 3.9 warns of a default that will change
INTERPRETED = 0  # the "architecture" of CPU tensors, so that a tile table can have a row for the interpreter
selftest_due = os.environ.get("TILEFORMER_SELFTEST", "1") != "0"  # until this GPU has passed it
_recorded_arch: int | None = None
_capabilities: dict[int, int] = {}  # of each GPU
_too_big: set[tuple[Any, ...]] = set()
MOST_KINDS = 4096  # of launches that are remembered: a process may meet new ones for ever

# Triton's way to a launch (bind the arguments, print the options, look the kernel up) takes 13 to 20 microseconds. It is taken once for
# each kind of arguments; later launches of that kind call the compiled kernel itself, as Triton 3.6 to 3.9 do. Another Triton, and AMD's,
# which looks at more than `launch` does, is asked each time.
_specialise = getattr(jit, "native_specialize_impl", None)
if not (3, 6) <= tuple(map(int, triton.__version__.split(".")[:2])) < (3, 10) or torch.version.hip:
    _specialise = None
_compiled: dict[tuple[Any, ...], _Compiled] = {}


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
    if is_compiling():
        return _read_capability(index)
    if index not in _capabilities:
        _capabilities[index] = _read_capability(index)
    return _capabilities[index]


def _read_capability(index: int) -> int:
    if not torch.cuda.is_available():  # a fake CUDA tensor on a machine without a GPU: shapes only, any answer serves
        return 90
    # torch.compile folds this; get_device_capability would break the graph
    device = torch.cuda.get_device_properties(index)
    return 10 * device.major + device.minor


class Launch:
    """A kernel, for tensors of given shapes: what the shapes decide is worked out once, by the launchers' caches.

    Args:
        grid: number of programs for a tile; nothing is launched when it is 0.
        scalars: the kernel's runtime arguments after the tensors.
        flags: its feature constexprs.
        tiles: constexprs and launch options (BLOCK_*, num_warps, num_stages), best first, smallest last.
    """

    def __init__(
        self,
        kernel: Any,
        grid: Callable[[Tile], tuple[int, ...]],
        scalars: tuple[Any, ...],
        flags: dict[str, Any],
        tiles: Sequence[Tile],
    ) -> None:
        self.kernel, self.grid, self.scalars, self.flags, self.tiles = kernel, grid, scalars, flags, tiles
        self.known: dict[tuple[Any, ...], tuple[_Compiled, tuple[int, ...], tuple[Any, ...]]] = {}

    def __call__(self, *tensors: Tensor) -> None:
        """Run it under the device and current stream of the first tensor."""
        like, address = tensors[0], 0
        for x in tensors:
            address |= x.data_ptr()
        # Triton compiles for the alignment of each tensor. One key is for all of them aligned, the usual case; `launch` knows the others.
        key = None if address % 16 else (_recorded_arch, like.get_device(), *[x.dtype for x in tensors])
        known = self.known.get(key) if key else None
        if known and (_recorded_arch or not selftest_due) and not _observed(self.kernel):
            compiled, programs, rest = known
            return compiled.run(like, programs, tensors + rest)
        first = launch(self.kernel, self.grid, like, tensors + self.scalars, self.flags, self.tiles)
        if first and key:
            self.known[key] = first, _three(self.grid(first.tile)), self.scalars + first.constexprs


def launch(
    kernel: Any,
    grid: Callable[[Tile], tuple[int, ...]],
    like: Tensor,
    args: tuple[Any, ...],
    flags: dict[str, Any],
    tiles: Sequence[Tile],
) -> _Compiled | None:
    """Run `kernel` under the device and current stream of `like`, with the first of `tiles` that the device can hold.

    Args:
        args: the kernel's runtime arguments, in order. For the others see `Launch`.

    Returns:
        How to do it again for arguments of the same kind, if there is a way that is cheaper than Triton's.
    """
    kind = None
    if _specialise and (recording() or like.is_cuda and not selftest_due) and not _observed(kernel):
        # What JITFunction.run looks at. Its own function gives the dtype and alignment of tensors, the width and divisibility of integers;
        # here also of those that the kernel declares do_not_specialize: a key that is too fine is still right.
        kinds = _specialise(BaseBackend, args, False, True, True)
        kind = kernel.fn, _recorded_arch, like.get_device(), *flags.values(), *tiles[0].values(), kinds
        known = _compiled.get(kind)
        if known:
            programs = grid(known.tile)
            if 0 in programs:
                return None
            known.run(like, _three(programs), args + known.constexprs)
            return known
    for tile in tiles:
        programs = grid(tile)
        if 0 in programs:
            return None
        key = (kernel.fn.__name__, like.device, *flags.items(), *tile.items())
        if key in _too_big and tile is not tiles[-1]:
            continue
        constexprs = {**flags, **tile}
        try:
            binary = _run(kernel, programs, like, args, constexprs)
        except OutOfResources as error:
            if tile is tiles[-1]:
                raise
            _make_room(_too_big)
            _too_big.add(key)
            warnings.warn(
                f"{kernel.fn.__name__}: tile {tile} does not fit this device ({error}); using the next one",
                stacklevel=3,
            )
            continue
        if kind and isinstance(binary, CompiledKernel):  # not None or a promise, where a hook of Triton's took over
            _make_room(_compiled)
            again = _Compiled(binary, tile, tuple(constexprs[name] for name in kernel.arg_names[len(args) :]))
            _compiled[kind] = again
            return again
        break
    return None


def _make_room(kept: dict[tuple[Any, ...], _Compiled] | set[tuple[Any, ...]]) -> None:
    """Forget all when there are too many: each comes back by one more launch through Triton, and a look-up pays nothing."""
    if len(kept) >= MOST_KINDS:
        kept.clear()


def _run(kernel: Any, programs: tuple[int, ...], like: Tensor, args: Sequence[Any], constexprs: dict[str, Any]) -> Any:
    """Launch as Triton documents it, and return the compiled kernel; or interpret."""
    if like.is_cuda:
        if selftest_due and not recording():
            from tileformer.kernels import selftest  # which imports the ops, which import this module

            selftest.run_once(like.device)
        with torch.cuda.device(like.device), _lent_memory():
            return kernel[programs](*args, **constexprs, **OPTIONS)
    if recording():
        return kernel[programs](*args, **constexprs, **OPTIONS)
    return interpreter.run(kernel, programs, args, constexprs)


@contextlib.contextmanager
def _lent_memory() -> Iterator[None]:
    """Inside, kernels that want memory of their own for each program (tensor descriptors) get it, also where nobody called
    triton.set_allocator. What a user has set stays, and nothing is left set."""
    held = _allocation._allocator  # of each thread's context
    if not isinstance(held.get(), _allocation.NullAllocator):
        yield
        return
    before = held.set(lambda size, alignment, stream: torch.empty(size, dtype=torch.int8, device="cuda"))
    try:
        yield
    finally:
        held.reset(before)


class _Compiled:
    """A kernel that Triton has compiled and loaded, to be launched on other arguments of the same kind."""

    def __init__(self, binary: CompiledKernel, tile: Tile, constexprs: tuple[Any, ...]) -> None:
        self.binary, self.tile, self.constexprs = binary, tile, constexprs
        self.wants_memory = getattr(binary.metadata, "global_scratch_size", 0) > 0

    def run(self, like: Tensor, programs: tuple[int, ...], args: tuple[Any, ...]) -> None:
        """What `binary[programs](*args)` does where nobody listens to launches; programs along three axes, and constexprs too."""
        device = like.get_device()
        if like.is_cuda and torch._C._cuda_getDevice() != device:
            with torch.cuda.device(device):
                return self.run(like, programs, args)
        binary, stream = self.binary, driver.active.get_current_stream(device)
        call = (*programs, stream, binary.function, binary.packed_metadata, None, None, None, *args)
        if self.wants_memory:
            with _lent_memory():
                binary.run(*call)
        else:
            binary.run(*call)


def _three(programs: tuple[int, ...]) -> tuple[int, ...]:
    """A grid along all three axes."""
    return (*programs, 1, 1)[:3]


def _observed(kernel: Any) -> bool:
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


# By name: the schema, what computes now, and the library that holds the op. Reloading this module, or a kernel's, leaves the ops registered.
_registered: dict[str, tuple[str, Callable[..., Any], Callable[..., Any], torch.library.Library]]
_registered = globals().get("_registered", {})


def register(launcher: Callable[..., Any], fake: Callable[..., Any]) -> Callable[..., Any]:
    """Make `tileformer::<launcher's name>` from a typed function that returns new tensors; `fake` gives their shapes.

    One implementation serves all devices: compiled on CUDA tensors, interpreted on CPU tensors. `Library.define` costs
    a fraction of `torch.library.custom_op` per call. Called again, as where a notebook reloads a kernel's file, the new one serves.
    """
    name = launcher.__name__
    schema = torch.library.infer_schema(launcher, mutates_args=())
    known = _registered.pop(name, None)
    if known and known[0] == schema:
        _registered[name] = schema, launcher, fake, known[3]
    else:
        if known:
            known[3]._destroy()  # and with it the op, which has another schema
        library = torch.library.Library("tileformer", "FRAGMENT")
        library.define(name + schema)
        library.impl(name, registered(name), "CompositeExplicitAutograd")
        torch.library.register_fake(f"tileformer::{name}", lambda *args: _registered[name][2](*args), lib=library)
        _registered[name] = schema, launcher, fake, library
    return getattr(torch.ops.tileformer, name).default


def registered(name: str) -> Callable[..., Any]:
    """The launcher that is registered under this name when it is called: a reload of its file reaches who holds this."""
    return lambda *args: _registered[name][1](*args)


def _bits(*keys: str) -> int:
    """The dispatch keys as the number that a set of them prints as."""
    return functools.reduce(lambda bits, key: bits | DispatchKeySet(getattr(DispatchKey, key)).raw_repr(), keys, 0)


# What torch's dispatcher does not see of a plain tensor, nor of a thread in which nothing listens to ops.
_SPECIAL = ~(
    _bits("CPU", "CUDA", "AutogradCPU", "AutogradCUDA", "AutocastCPU", "AutocastCUDA")
    | _bits("ADInplaceOrView", "BackendSelect")
)


def apply(function: Any, *args: Any) -> Any:
    """`function.apply(*args)`, without what torch does for compilers, modes and transforms where there are none.

    Args:
        function: a torch.autograd.Function with setup_context, and with `launcher`: what its forward does, without the dispatcher.

    Function.apply inspects forward's signature at every call for default arguments, which ours do not have, and the dispatcher is asked
    again for each registered op: 30 microseconds. Tensors that are not plain (subclasses, wrappers, lazy negations), and threads in
    which a mode, a transform, a tracer or a profiler is active, get the function itself.
    """
    if is_compiling():
        return function.apply(*args)
    if getattr(forward_ad, "_current_level", 0) >= 0:
        return _without_tangents(function).apply(*args)
    if (
        _has_torch_function(args)  # a mode, or a subclass that listens
        or _dispatch_tls_local_include_set().raw_repr() & _SPECIAL
        or _profiler_enabled()
    ):
        return function.apply(*args)
    tracked = False
    for x in args:
        if isinstance(x, Tensor):
            if _dispatch_keys(x).raw_repr() & _SPECIAL:
                from tileformer.kernels import subclasses  # which imports this module

                subclasses.refuse(function.__name__.strip("_"), x)
                return function.apply(*args)
            if x.requires_grad:
                tracked = True
    if tracked and torch.is_grad_enabled():
        return _in_one(function)(*args)
    return function.launcher(*args)


@functools.cache
def _in_one(function: Any) -> Callable[..., Any]:
    """`apply` of the same function with launcher and setup_context in one, as torch's C code has it."""

    def forward(ctx: Any, *args: Any) -> Any:
        output = function.launcher(*args)
        function.setup_context(ctx, args, output)
        return output

    methods = dict(forward=staticmethod(forward), backward=staticmethod(function.backward))
    made = type(function.__name__, (torch.autograd.Function,), methods)
    return super(torch.autograd.Function, made).apply  # type: ignore[misc]


@functools.cache
def _without_tangents(function: Any) -> Any:
    """The same function, refusing forward mode in words of its own. A class of its own: torch.compile does not trace one with a jvp."""

    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise NotImplementedError(
            f"{function.__name__.strip('_')}: the fused kernels have no forward-mode derivative: use reverse mode "
            "(torch.func.jacrev; a Hessian is jacrev(jacrev(f))), or use_backend('reference')"
        )

    return type(function.__name__, (function,), {"jvp": staticmethod(jvp)})


def not_traced(op: str) -> None:
    """Raise NotImplementedError inside torch.jit.trace, which would write this call's sizes and random bits down for all others."""
    if not is_compiling() and torch._C._is_tracing():
        raise NotImplementedError(
            f"{op}: torch.jit.trace records neither dropout nor the fused attention kernels: use torch.export, or trace "
            "in evaluation under use_backend('torch')"
        )


def cdiv(a: int, b: int) -> int:
    """Smallest integer >= a / b."""
    return -(-a // b)


@functools.lru_cache(maxsize=1024)
def pow2(n: int, least: int = 1) -> int:
    """Smallest power of two >= n and >= least."""
    return max(least, triton.next_power_of_2(n))


@functools.cache
def wider(dtype: torch.dtype) -> torch.dtype:
    """The dtype of statistics: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def dot_flags(x: Tensor) -> dict[str, Any]:
    """Accumulator type (the wider of float32 and x's) and the precision of float32 dots (IEEE unless torch allows TF32)."""
    tf32 = x.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return dict(ACC=tl.float64 if x.dtype == torch.float64 else tl.float32, PRECISION="tf32" if tf32 else "ieee")
