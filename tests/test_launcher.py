"""Triton's real C launcher on a libcuda that launches nothing: what a GPU's driver would be handed, by Triton's own way
and by the short one.

Kernels are compiled ahead first (bench/ahead.py), so this also shows that a real launch finds them in Triton's cache.
"""

import ctypes
import os
import re
import shutil
import struct
import subprocess
import sys
import sysconfig
import types
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import triton
from triton.backends.nvidia import driver as nvidia
from triton.runtime import driver

from tileformer.bench import ahead
from tileformer.bench.recording import record
from tileformer.kernels import attention, device, dropout, launch, softmax, use_backend

STUB = r"""
#include <cuda.h>
#include <string.h>
unsigned launched[8]; unsigned long long given[64]; int count, calls;
CUresult cuLaunchKernelEx(const CUlaunchConfig *c, CUfunction f, void **p, void **e) {
  unsigned now[] = {c->gridDimX, c->gridDimY, c->gridDimZ, c->blockDimX, c->blockDimY, c->blockDimZ, c->sharedMemBytes, c->numAttrs};
  memcpy(launched, now, sizeof now);
  for (int i = 0; i < count; i++) memcpy(given + i, p[i], 8);
  calls++;
  return CUDA_SUCCESS;
}
CUresult cuPointerGetAttribute(void *d, CUpointer_attribute a, CUdeviceptr p) { *(CUdeviceptr *)d = p; return CUDA_SUCCESS; }
CUresult cuGetErrorString(CUresult e, const char **s) { *s = "stub"; return CUDA_SUCCESS; }
CUresult cuCtxGetCurrent(CUcontext *c) { *c = (CUcontext)1; return CUDA_SUCCESS; }
CUresult cuCtxGetDevice(CUdevice *d) { *d = 0; return CUDA_SUCCESS; }
"""
BYTES = {"i1": 1, "i8": 1, "u8": 1, "i16": 2, "u16": 2, "i32": 4, "u32": 4, "i64": 8, "u64": 8, "fp32": 4, "fp64": 8}


def _value(x: Any, kind: str) -> int:
    """The bits of an argument as the launcher should pass them."""
    if kind.startswith("*"):
        return 0 if x is None else x.data_ptr()
    raw = (
        struct.pack({"fp32": "f", "fp64": "d"}[kind], x)
        if kind.startswith("fp")
        else int(x).to_bytes(16, "little", signed=True)
    )
    return int.from_bytes(raw[: BYTES[kind]], "little")


def _flat(x: Any) -> list[Any]:
    return [z for y in x for z in _flat(y)] if isinstance(x, (tuple, list)) else [x]


def _pairs(x: Any, kind: Any) -> list[tuple[Any, str]]:
    """Arguments and their kinds; a constexpr may be a tuple of its own."""
    if isinstance(kind, str):
        return [(x, kind)]
    return [pair for y, inner in zip(x, kind, strict=True) for pair in _pairs(y, inner)]


def main() -> None:
    library = ctypes.CDLL(os.path.join(os.environ["TRITON_LIBCUDA_PATH"], "libcuda.so.1"))
    launched, given = (
        (ctypes.c_uint * 8).in_dll(library, "launched"),
        (ctypes.c_ulonglong * 64).in_dll(library, "given"),
    )
    count, calls = (ctypes.c_int.in_dll(library, name) for name in ("count", "calls"))
    seen: list[tuple[Any, ...]] = []

    class Launcher(nvidia.CudaLauncher):
        def __init__(self, source: Any, metadata: Any) -> None:
            super().__init__(source, metadata)
            self.kinds, self.name = [*source.signature.values()], source.fn.__name__

        def __call__(self, *call: Any) -> None:
            passed = [pair for pair in _pairs(call[9:], self.kinds) if pair[1] != "constexpr"]
            before, count.value = calls.value, len(passed)
            super().__call__(*call)
            assert calls.value == before + 1
            got = [n % 256 ** BYTES.get(kind, 8) for n, (_, kind) in zip(given, passed, strict=False)]
            assert got == [_value(*pair) for pair in passed], self.name
            plain = [(x.shape, x.stride(), x.dtype) if isinstance(x, torch.Tensor) else x for x in _flat(call[9:])]
            assert launched[:3] == list(call[:3])
            seen.append((self.name, launched[:], plain))

    x = torch.ones(4, 256, dtype=torch.bfloat16)
    q = torch.ones(1, 2, 1024, 128, dtype=torch.bfloat16)
    tried = [
        lambda: softmax(x, scale=0.5, causal=True),
        lambda: dropout(x, 0.1, residual=x),
        lambda: attention(q, q, q, causal=True),  # through descriptors, which want memory of their own
    ]
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    said = ahead.compile_for(90, tried, launchers=True)
    assert "compiled ahead on 1 cores" in said and "not compiled" not in said, said
    utils = nvidia.CudaUtils()  # compiles the driver's own C file
    kept = set(Path(os.environ["TRITON_CACHE_DIR"]).rglob("*"))
    triton.set_allocator(lambda size, alignment, stream: torch.empty(size, dtype=torch.int8))
    with record(90), use_backend("triton"):
        driver.active.launcher_cls = Launcher
        utils.get_device_properties = driver.active.utils.get_device_properties
        utils.load_binary = lambda *_: (1, 0x1234, 0, 0, 1024)
        driver.active.utils = utils
        for call in tried:
            with mock.patch.object(
                launch._CachedKernel, "run", autospec=True, side_effect=launch._CachedKernel.run
            ) as short:
                rounds = []
                for own in (True, False, False, True):
                    with mock.patch.object(launch, "has_launch_hooks", lambda kernel, own=own: own):
                        seen.clear()
                        call()
                        rounds.append(list(seen))
                assert short.call_count == len(rounds[2]) > 0
            assert rounds[0] == rounds[1] == rounds[2] == rounds[3], rounds
            print(*(name for name, *_ in rounds[0]))
    made = set(Path(os.environ["TRITON_CACHE_DIR"]).rglob("*")) - kept
    assert not made, f"a real launch compiled again: {made}"


@pytest.mark.compat
@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU's own libcuda is here: the tests marked gpu launch")
def test_the_driver_is_handed_what_the_call_says(tmp_path: Path) -> None:
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("cc")
    if not compiler or not os.path.exists(os.path.join(sysconfig.get_paths()["include"], "Python.h")):
        pytest.skip("Triton's launcher needs a C compiler and Python's headers")
    folder, files = Path(nvidia.__file__).parent, [tmp_path / "stub.c", tmp_path / "rest.c"]
    files[0].write_text(STUB)
    asked = set(re.findall(r"\bcu[A-Z]\w+", (folder / "driver.c").read_text())) - set(re.findall(r"\bcu[A-Z]\w+", STUB))
    # What else Triton's files link has to be there; nothing calls it.
    files[1].write_text(
        "".join(f"int {name}{v}(void) {{ return 801; }}\n" for name in asked for v in ("", "_v2", "_v3"))
    )
    options = ["-shared", "-fPIC", "-w", f"-I{folder / 'include'}", "-Wl,-soname,libcuda.so.1"]
    subprocess.run([compiler, *options, "-o", tmp_path / "libcuda.so.1", *files], check=True)
    sources = Path(__file__).parents[1] / "src"
    environment = dict(
        os.environ,
        PYTHONPATH=os.pathsep.join([str(sources), *filter(None, [os.environ.get("PYTHONPATH")])]),
        TRITON_LIBCUDA_PATH=str(tmp_path),
        LD_LIBRARY_PATH=str(tmp_path),
        TRITON_CACHE_DIR=str(tmp_path / "cache"),
        OMP_NUM_THREADS="1",
    )
    done = subprocess.run([sys.executable, __file__], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "_attention_fwd_kernel" in done.stdout


def test_what_is_compiled_ahead_is_for_the_gpu_at_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int, bool]] = []

    def compile_for(arch: int, calls: list[Any], launchers: bool) -> str:
        asked.append((arch, device.multiprocessors(torch.device("cpu")), launchers))
        return "done"

    properties = types.SimpleNamespace(major=12, minor=0, multi_processor_count=128)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda place: properties)
    monkeypatch.setattr(ahead, "compile_for", compile_for)
    assert ahead.compile_here([]) == "done" and asked == [(120, 128, True)]
    assert device.multiprocessors(torch.device("cpu")) != 128
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert ahead.compile_here([]) == "" and len(asked) == 1


def test_calls_that_fail_or_launch_nothing_are_no_error() -> None:
    def fails() -> None:
        softmax(torch.ones(4, 256))
        raise AssertionError("values are garbage")

    with ahead.announced(90) as jobs, pytest.raises(AssertionError):
        fails()
    assert [job[1] for job in jobs.values()] == ["_softmax_fwd_kernel"]
    assert ahead.compile_for(90, [lambda: 1 / 0]) == "nothing to compile"
    assert "sm_75: nothing is compiled ahead" in ahead.compile_for(75, [fails])


if __name__ == "__main__":
    main()
