"""Compile before anything is launched, on every core: a launch compiles what it needs alone, and the GPU waits.

    ahead.compile_for(90, [lambda: attention(q, k, v, causal=True)])      # CPU tensors of the sizes to come

The calls go through the recording driver (bench/recording.py), where Triton says what it would compile. Processes then
compile it into Triton's cache under the keys of a real launch, and with Triton 3.6 the C launchers of each signature.
"""

import concurrent.futures
import contextlib
import importlib
import itertools
import multiprocessing
import os
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from triton import knobs
from triton.runtime import driver

from tileformer.bench import recording
from tileformer.bench.calls import Call, Function, differentiate, leaves_of
from tileformer.kernels import device, use_backend

MAX_PROCESSES = 32  # each holds some 400 MB
# Module and name of a kernel, and what it is compiled for: as JITFunction.preload takes it, and the signature and
# constants, of which JSON keeps no NamedTuple.
Job = tuple[str, str, str, Any, Any]


@contextlib.contextmanager
def announced(arch: int) -> Iterator[dict[tuple[str, str], Job]]:
    """As `record`, but nothing is compiled either: what would be, by kernel and Triton's key."""
    jobs: dict[tuple[str, str], Job] = {}

    def note(*, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        how = compile["specialization_data"], compile["signature"], compile["constants"]
        jobs[fn.name, compile["key"]] = fn.module, fn.name.rpartition(".")[2], *how
        return True  # Triton takes it for compiled elsewhere

    before, knobs.runtime.jit_cache_hook = knobs.runtime.jit_cache_hook, note
    try:
        with recording.record(arch), use_backend("triton"):
            yield jobs
    finally:
        knobs.runtime.jit_cache_hook = before


def compile_for(arch: int, calls: Iterable[Callable[[], Any]], launchers: bool = False) -> str:
    """Compile what the calls would launch on sm_`arch`. A line that says what was done.

    Args:
        calls: may fail, since nothing is computed; what they launched before is compiled.
        launchers: also build Triton 3.6's launchers, which needs the driver's library.
    """
    start = time.monotonic()
    if arch not in recording.ARCHITECTURES:
        return f"sm_{arch}: nothing is compiled ahead, each launch compiles its own"
    with announced(arch) as jobs:
        for call in calls:
            with contextlib.suppress(Exception):
                call()
    if not jobs:
        return "nothing to compile"
    cores, spawn = min(len(os.sched_getaffinity(0)), MAX_PROCESSES, len(jobs)), multiprocessing.get_context("spawn")
    pool = concurrent.futures.ProcessPoolExecutor(cores, spawn, initializer=_start, initargs=(arch,))
    try:
        problems = [problem for problem in pool.map(_compile, jobs.values(), itertools.repeat(launchers)) if problem]
    except concurrent.futures.BrokenExecutor as error:  # each launch compiles what is left
        problems = [str(error)]
    finally:
        pool.shutdown(cancel_futures=True)
    said = f"{len(jobs)} kernels compiled ahead on {cores} cores in {time.monotonic() - start:.0f} s"
    return "\n".join([said, *(f"not compiled: {problem}" for problem in problems)])


def compile_here(calls: Iterable[Callable[[], Any]]) -> str:
    """`compile_for` the GPU of this machine; "" where there is none."""
    if not torch.cuda.is_available() or torch.version.hip:
        return ""
    gpu = torch.cuda.get_device_properties(0)
    with mock.patch.object(device, "multiprocessors", lambda _: gpu.multi_processor_count):  # kernels depend on it
        return compile_for(10 * gpu.major + gpu.minor, calls, launchers=True)


def _start(arch: int) -> None:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # a process that compiles takes none of the GPU's memory
    torch.set_num_threads(1)
    driver.set_active(recording._RecordingDriver(arch))


def _compile(job: Job, launchers: bool) -> str:
    """What went wrong, or ""."""
    module, name, specialisation, signature, constants = job
    try:
        function = getattr(importlib.import_module(module), name)

        def compiled(key: str, _: Any, device: Any, __: Any, *rest: Any, **more: Any) -> Any:
            return type(function)._do_compile(function, key, signature, device, constants, *rest, **more)

        with mock.patch.object(function, "_do_compile", compiled):
            kernel = function.preload(specialisation)
        if launchers:
            from triton.backends.nvidia import driver as nvidia

            if hasattr(nvidia, "make_launcher"):
                nvidia.CudaLauncher(kernel.src, kernel.metadata)
    except Exception as error:
        return f"{name}: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return ""


class _Linear(torch.autograd.Function):
    """The shapes of F.linear, uncomputed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        ctx.save_for_backward(*(t for t in (x, weight, bias) if t is not None))
        return x.new_empty(*x.shape[:-1], len(weight))

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        return (*map(torch.empty_like, ctx.saved_tensors), None)[:3]


def launches_of(function: Function, call: Call, dtype: torch.dtype) -> None:
    """Forward and backward of a call at its full size, on memory that nothing touches: with its seed, and without."""
    tensors, options = call.untouched_inputs(dtype)
    leaves = leaves_of(call, tensors)
    with mock.patch.object(F, "linear", _Linear.apply):
        for more in (options, {name: x for name, x in options.items() if name != "seed"}):
            if "backward" in call.modes:
                differentiate(function, leaves, more, lambda _, x: torch.empty_like(x))
            else:
                function(leaves, more)
