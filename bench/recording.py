"""A Triton driver that compiles every launch for a chosen GPU and runs none: what a kernel needs is known without owning the GPU.

    with record(90) as launches, use_backend("triton"):
        attention(q, k, v, causal=True)            # CPU tensors; their values are not touched
    launches[0].registers, launches[0].stack, launches[0].shared, launches[0].sass

The library's own launch code runs, so grids, tiles, divisibility and the step to a smaller tile are those of a real launch.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from tileformer.kernels import launch

ARCHITECTURES = (80, 86, 89, 90, 100, 120)
# Largest dynamic shared memory of one block, bytes, and number of multiprocessors of the architecture's usual part:
# CUDA C++ Programming Guide, "Compute Capabilities"; A100, RTX 3090, RTX 4090, H100 SXM, B200, RTX 5090.
SHARED = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376}
MULTIPROCESSORS = {80: 108, 86: 82, 89: 128, 90: 132, 100: 148, 120: 170}
# sm_90 and sm_100 have asynchronous matrix instructions for tiles of 64 rows and more; smaller dots use the older HMMA.
TENSOR_CORE = re.compile(r"\b(HMMA|HGMMA|UTCHMMA)\b")


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
        """Registers and stack bytes a thread (a stack that is not 0 holds spilled registers), from the machine code's own table."""
        found = re.search(r"REG:(\d+) STACK:(\d+)", self._tool("cuobjdump", "-res-usage"))
        if found is None:
            raise RuntimeError(f"cuobjdump reports no resources for {self.name}")
        return dict(registers=int(found[1]), stack=int(found[2]))

    @functools.cached_property
    def sass(self) -> str:
        """Disassembled machine code."""
        return self._tool("nvdisasm", "-c")

    @property
    def uses_tensor_cores(self) -> bool:
        """Whether any dot became a matrix instruction."""
        return bool(TENSOR_CORE.search(self.sass))


@dataclasses.dataclass(frozen=True)
class Launch:
    """One launch: the binary, the number of programs in x, y, z, and warps a program."""

    binary: Binary
    grid: tuple[int, int, int]
    warps: int


class _Utils:
    """What Triton asks of a driver's `utils` to load a kernel."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_device_properties(self, device: int) -> dict[str, int]:
        return dict(
            max_shared_mem=SHARED[self.arch],
            multiprocessor_count=MULTIPROCESSORS[self.arch],
            warpSize=32,
            max_num_regs=65536,
        )

    def load_binary(self, name: str, cubin: bytes, shared: int, device: int) -> tuple[object, Binary, int, int, int]:
        binary = Binary(name, self.arch, shared, cubin)
        return object(), binary, 0, 0, 1024  # module, function, registers, spills, most threads


_launches: list[
    Launch
] = []  # of the innermost `record`: Triton keeps a launcher with its kernel, longer than a driver lives


class _Launcher:
    def __init__(self, source: Any, metadata: Any) -> None:
        self.warps = metadata.num_warps

    def __call__(self, x: int, y: int, z: int, stream: int, function: Binary, *rest: Any) -> None:
        assert x < 2**31 and y < 65536 and z < 65536, f"grid {(x, y, z)} is larger than a GPU takes"
        _launches.append(Launch(function, (x, y, z), self.warps))


class _RecordingDriver:
    launcher_cls = _Launcher

    def __init__(self, arch: int) -> None:
        self.arch, self.utils = arch, _Utils(arch)

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


@contextlib.contextmanager
def record(arch: int) -> Iterator[list[Launch]]:
    """Inside, `use_backend("triton")` takes CPU tensors: each launch is compiled for sm_`arch` and appended to the list yielded."""
    global _launches
    before, outer = driver._active, _launches
    launches: list[Launch] = []
    _launches = launches
    driver.set_active(_RecordingDriver(arch))
    launch.record_for(arch)
    try:
        yield launches
    finally:
        launch.record_for(None)
        driver._active, _launches = before, outer
