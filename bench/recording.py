"""A Triton driver that compiles every launch for a chosen GPU and runs none: what a kernel needs, without the GPU.

    with record(90) as launches, use_backend("triton"):
        attention(q, k, v, causal=True)            # CPU tensors; their values are not touched
    launches[0].binary.usage, launches[0].binary.shared, launches[0].binary.sass

The called library's launch code runs, so grids, tiles, divisibility and steps to a smaller tile are those of a real
launch. Other libraries ask for a device first: under `pretend` CPU tensors say that they lie on one. Under
`every_configuration` an autotuned kernel records its whole list.
"""

import contextlib
import dataclasses
import functools
import itertools
import os
import re
import subprocess
import tempfile
import types
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
import triton
from torch.overrides import TorchFunctionMode
from triton.backends.compiler import GPUTarget
from triton.compiler.errors import CompilationError
from triton.runtime import driver
from triton.runtime.autotuner import Autotuner
from triton.runtime.errors import OutOfResources, PTXASError

from tileformer import arguments
from tileformer.kernels import device

ARCHITECTURES = (80, 86, 89, 90, 100, 120)
# What every --arch of a command takes.
ARCH: dict[str, Any] = dict(type=arguments.architecture, choices=ARCHITECTURES, metavar="CC")
# Largest dynamic shared memory of one block, bytes, and number of multiprocessors of the architecture's usual part:
# CUDA C++ Programming Guide, "Compute Capabilities"; A100, RTX 3090, RTX 4090, H100 SXM, B200, RTX 5090.
SHARED = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376}
NAMES = {80: "NVIDIA A100-SXM4-80GB", 86: "NVIDIA GeForce RTX 3090", 89: "NVIDIA GeForce RTX 4090",
         90: "NVIDIA H100 80GB HBM3", 100: "NVIDIA B200", 120: "NVIDIA GeForce RTX 5090"}  # fmt: skip
MULTIPROCESSORS = {80: 108, 86: 82, 89: 128, 90: 132, 100: 148, 120: 170}


@dataclasses.dataclass(frozen=True)
class Binary:
    """One compiled kernel."""

    name: str
    arch: int
    shared: int
    cubin: bytes

    def _tool(self, *command: str) -> str:
        folder = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin")
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(self.cubin)
            file.flush()
            tool = os.path.join(folder, command[0])
            done = subprocess.run([tool, *command[1:], file.name], capture_output=True, text=True, check=True)
        return done.stdout + done.stderr

    @functools.cached_property
    def usage(self) -> dict[str, int]:
        """Registers and stack bytes a thread, from the machine code's own table. The stack holds spilled registers."""
        match = re.search(r"REG:(\d+) STACK:(\d+)", self._tool("cuobjdump", "-res-usage"))
        if match is None:
            raise RuntimeError(f"cuobjdump reports no resources for {self.name}")
        return dict(registers=int(match[1]), stack=int(match[2]))

    @functools.cached_property
    def sass(self) -> str:
        """Disassembled machine code, with each instruction's bits in comments."""
        return self._tool("nvdisasm", "-hex", "-c")


@dataclasses.dataclass(frozen=True)
class Launch:
    """One launch: the binary, the programs in x, y, z, warps a program, and what the interpreter needs to run it."""

    binary: Binary
    grid: tuple[int, int, int]
    warps: int
    stages: int
    kernel: Any
    arguments: tuple[Any, ...]  # in the order of the kernel's signature, constexprs among them
    candidate: int | None = None  # launches with the same number are an autotuner's choices for one launch

    @property
    def constants(self) -> dict[str, Any]:
        """The kernel's constexprs by name."""
        named = zip(self.kernel.params, self.arguments, strict=True)
        return {param.name: value for param, value in named if param.is_constexpr}


# Of the innermost `record`: Triton keeps a launcher with its kernel, longer than a driver lives.
_launches: list[Launch] = []
_then: Callable[[Launch], None] | None = None
_candidate: int | None = None


class _Launcher:
    def __init__(self, source: Any, metadata: Any) -> None:
        self.kernel, self.metadata = source.fn, metadata

    def __call__(self, x: int, y: int, z: int, stream: int, function: Binary, *rest: Any) -> None:
        arguments = rest[4:]  # after metadata, launch data and two hooks
        assert x < 2**31 and y < 65536 and z < 65536, f"grid {(x, y, z)} is larger than a GPU takes"
        options = (self.metadata.num_warps, self.metadata.num_stages)
        _launches.append(Launch(function, (x, y, z), *options, self.kernel, arguments, _candidate))
        if _then:
            _then(_launches[-1])


class _RecordingDriver:
    launcher_cls = _Launcher

    def __init__(self, arch: int) -> None:
        self.arch, self.utils = arch, self

    def get_device_properties(self, device: int) -> dict[str, int]:
        count, shared = MULTIPROCESSORS[self.arch], SHARED[self.arch]
        return dict(max_shared_mem=shared, multiprocessor_count=count, warpSize=32, max_num_regs=65536)

    def load_binary(self, name: str, cubin: bytes, shared: int, device: int) -> tuple[object, Binary, int, int, int]:
        binary = Binary(name, self.arch, shared, cubin)
        return object(), binary, 0, 0, 1024  # module, function, registers, spills, most threads

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch  # Triton keeps compiled kernels per device: one cache per architecture

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_benchmarker(self) -> Any:
        raise RuntimeError("nothing can be timed on a driver that runs nothing: record under every_configuration()")


@contextlib.contextmanager
def record(arch: int, then: Callable[[Launch], None] | None = None) -> Iterator[list[Launch]]:
    """Inside, `use_backend("triton")` compiles each launch for sm_`arch`, on CPU tensors, into the list yielded.

    `then` is called with each launch, in place of running it.
    """
    global _launches, _then
    before, outer = driver._active, (_launches, _then)
    launches: list[Launch] = []
    _launches, _then = launches, then
    driver.set_active(_RecordingDriver(arch))
    device.record_for(arch)
    try:
        yield launches
    finally:
        device.record_for(None)
        driver._active, (_launches, _then) = before, outer


class _OnGpu(TorchFunctionMode):
    """CPU tensors say that they lie on cuda:0, and what is asked for there is made on the CPU."""

    _GPU = torch.device("cuda", 0)

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        owner = getattr(function, "__self__", None)
        if owner is torch.Tensor.device:
            return self._GPU
        if owner is torch.Tensor.is_cuda:
            return True
        name, kwargs = getattr(function, "__name__", ""), dict(kwargs or {})
        if name in ("get_device", "cuda"):
            return 0 if name == "get_device" else args[0]
        here = lambda x: "cpu" if isinstance(x, (str, torch.device)) and str(x).startswith("cuda") else x  # noqa: E731
        if "device" in kwargs:
            kwargs["device"] = here(kwargs["device"])
        return function(*(here(x) if name == "to" else x for x in args), **kwargs)


@contextlib.contextmanager
def pretend(arch: int) -> Iterator[None]:
    """Inside, torch.cuda and CPU tensors answer as on a GPU of sm_`arch`. Import the library that asks inside."""
    properties = types.SimpleNamespace(
        name=NAMES[arch], major=arch // 10, minor=arch % 10, multi_processor_count=MULTIPROCESSORS[arch], warp_size=32,
        shared_memory_per_block_optin=SHARED[arch], shared_memory_per_block=49152, total_memory=80 << 30,
        L2_cache_size=50 << 20, max_threads_per_multi_processor=2048, regs_per_multiprocessor=65536, gcnArchName="",
    )  # fmt: skip
    stream = types.SimpleNamespace(cuda_stream=0, synchronize=lambda: None, wait_stream=lambda other: None)
    answers: dict[str, Any] = dict(
        is_available=lambda: True, device_count=lambda: 1, current_device=lambda: 0, set_device=lambda device: None,
        get_device_capability=lambda device=None: (arch // 10, arch % 10), current_stream=lambda device=None: stream,
        get_device_properties=lambda device=None: properties, get_device_name=lambda device=None: properties.name,
        device=lambda device=None: contextlib.nullcontext(), device_of=lambda x: contextlib.nullcontext(),
        synchronize=lambda device=None: None,
    )  # fmt: skip
    with (
        mock.patch.multiple(torch.cuda, **answers),
        # Or the mode would end where the backward begins.
        mock.patch.object(torch.autograd, "has_torch_function", lambda tensors: False),
        mock.patch.dict(os.environ, GEMS_VENDOR="nvidia"),
        _OnGpu(),
    ):
        yield


@contextlib.contextmanager
def every_configuration(chosen: Callable[[str, Any], bool] | None = None) -> Iterator[None]:
    """Inside, an autotuned kernel launches its whole list (after its own pruning), the list that a peer is scored over.

    With `chosen(kernel's name, configuration)` only the first that it accepts is launched.
    """
    count = itertools.count()

    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        global _candidate
        self.nargs = dict(zip(self.arg_names, args, strict=False))
        configurations = self.prune_configs(kwargs) if len(self.configs) > 1 else self.configs
        if chosen:
            configurations = [next((c for c in configurations if chosen(self.base_fn.__name__, c)), configurations[0])]
        result, why = None, None
        _candidate = next(count)
        for configuration in configurations:
            options = configuration.all_kwargs()
            try:
                if configuration.pre_hook:
                    configuration.pre_hook({**self.nargs, **kwargs, **options})
                result = self.fn.run(*args, **kwargs, **options)
                self.best_config = configuration
            except (OutOfResources, CompilationError, PTXASError, RuntimeError) as error:  # as the tuner; MLIR's own
                why = error
        _candidate = None
        if result is None:
            of = f"{len(configurations)} configurations of {self.base_fn.__name__}"
            raise RuntimeError(f"none of {of} compiles") from why
        return result

    with contextlib.ExitStack() as stack:
        for tuner in [Autotuner, *Autotuner.__subclasses__()]:
            stack.enter_context(mock.patch.object(tuner, "run", run))
        yield
