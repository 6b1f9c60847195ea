"""Show versions, devices, the backend this machine gets and why.

Also what Triton needs before it can compile: a C compiler, Python's headers, ptxas, a cache folder that can be written.
Exit status 1 if the machine has a GPU that torch cannot use (unless --device cpu is asked), or if a GPU is usable but
something that Triton needs to compile for it is missing.
"""

import argparse
import contextlib
import json
import os
import platform
import shutil
import subprocess
import sysconfig
import warnings
from pathlib import Path
from typing import Any

import numpy
import torch
import triton

import tileformer
from tileformer import arguments
from tileformer.kernels import backend

_DEVICE_FILES = "/dev", "nvidia[0-9]*"
_DRIVER_FILE = "/proc/driver/nvidia/version"


class DeviceError(ValueError):
    """The device asked for cannot be used here; the message is one line and says what to do."""


def require_device(device: str | torch.device | None = None) -> torch.device:
    """The device to work on: the one asked for, else CUDA where torch can use it, else the CPU.

    Raises:
        DeviceError: if the device asked for does not exist, or if none was asked for and the machine has a GPU that
            torch cannot use: a run that was meant for the GPU should not crawl on the CPU unnoticed.
    """
    try:
        asked = torch.device("cuda" if device is None else device)
    except RuntimeError:
        raise DeviceError(f"unknown device {str(device)!r}: ask for cpu, cuda or cuda:0") from None
    if asked.type == "cpu":
        return asked
    if asked.type != "cuda":
        raise DeviceError(f"device {asked} is not supported: ask for cpu or cuda")
    usable, why = _cuda_usable()
    if not usable:
        if driver := system_driver():
            built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
            raise DeviceError(
                f"this machine has a GPU (NVIDIA driver {driver}) that torch {torch.__version__} ({built}) cannot use: "
                f"{why}; install a torch that fits the driver, or go on without the GPU with --device cpu"
            )
        if device is None:
            return torch.device("cpu")
        raise DeviceError(f"device {asked} was asked for, but torch cannot use CUDA: {why}")
    if asked.index is not None and asked.index >= torch.cuda.device_count():
        raise DeviceError(f"device {asked} does not exist: torch sees {torch.cuda.device_count()} CUDA device(s)")
    return torch.device("cuda", torch.cuda.current_device()) if asked.index is None else asked


def system_driver() -> str | None:
    """The NVIDIA driver's version if the system shows a GPU ("of unknown version" where it does not say), else None.

    Asks the system, not torch, so it also sees a GPU that torch cannot use. A driver without a device file does not
    count: a container sees the driver of its host also where it was given no GPU.
    """
    if smi := shutil.which("nvidia-smi"):
        query = [smi, "--query-gpu=driver_version", "--format=csv,noheader"]
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            return subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout.split()[0]
    folder, pattern = _DEVICE_FILES
    if not any(Path(folder).glob(pattern)):
        return None
    with contextlib.suppress(OSError):
        for word in Path(_DRIVER_FILE).read_text().split():
            if word.replace(".", "").isdigit() and "." in word:
                return word
    return "of unknown version"


def _cuda_usable() -> tuple[bool, str]:
    """Whether torch can use CUDA, and if not, why (in torch's words where it has some)."""
    if torch.version.cuda is None:
        return False, "it is built without CUDA"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if torch.cuda.is_available() and torch.cuda.device_count() > 0:
            return True, ""
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return False, f"it sees no CUDA device (CUDA_VISIBLE_DEVICES is {visible!r})"
    said = str(caught[0].message).split(" (Triggered")[0].split(". ")[0] if caught else ""
    return False, f"it sees no CUDA device ({said})" if said else "it sees no CUDA device"


def collect(device: str | None = None) -> dict[str, Any]:
    """Everything `tileformer info` shows, as plain data; "problems" is empty if work can start on the device."""
    problems: list[str] = []
    tools, missing = _tools()
    try:
        chosen = require_device(device)
    except DeviceError as error:
        problems.append(str(error))
        chosen = torch.device("cpu")
    name, why = _backend_on(chosen)
    if name in ("triton", "fastest"):
        problems += missing
    return {
        "problems": problems,
        "versions": {
            "tileformer": tileformer.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "cuda of torch": torch.version.cuda,
            "triton": triton.__version__,
            "numpy": numpy.__version__,
            "driver": system_driver(),
        },
        "devices": _devices(),
        "backend": {"device": str(chosen), "name": name, "why": why},
        "tools": tools,
    }


def _devices() -> list[dict[str, Any]]:
    name = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    devices: list[dict[str, Any]] = [dict(device="cpu", name=name, threads=torch.get_num_threads())]
    for index in range(torch.cuda.device_count() if _cuda_usable()[0] else 0):
        gpu = torch.cuda.get_device_properties(index)
        arch, memory = f"sm_{gpu.major}{gpu.minor}", f"{gpu.total_memory / 2**30:.1f} GiB"
        devices.append(dict(device=f"cuda:{index}", name=gpu.name, arch=arch, memory=memory))
    return devices


def _backend_on(device: torch.device) -> tuple[str, str]:
    """The backend that serves float32 tensors on the device, and the reason."""
    asked = backend.current_backend()
    try:
        name = backend.choose("info", torch.empty(0, device=device))
    except ValueError as error:
        return asked, str(error)
    if asked == "fastest" and name == "triton":
        return asked, f"asked for by TILEFORMER_BACKEND: {backend.FASTEST}"
    if asked not in ("auto", "fastest"):
        return name, "asked for by TILEFORMER_BACKEND"
    if name == "triton":
        return name, "auto: compiled kernels serve float16, bfloat16 and float32 on this GPU (float64 goes to torch)"
    if device.type == "cuda":
        return name, f"{asked}: the GPU is older than sm_{backend.OLDEST_ARCH}"
    return name, f"{asked}: plain torch operators serve CPU tensors"


def _tools() -> tuple[dict[str, str | None], list[str]]:
    """What Triton needs before it can launch (the rules are those of triton.runtime.build), and a line for each gap."""
    asked = os.environ.get("CC")
    compiler = shutil.which(asked) if asked else shutil.which("gcc") or shutil.which("clang")
    scheme = sysconfig.get_default_scheme()
    include = sysconfig.get_path("include", "posix_prefix" if scheme == "posix_local" else scheme)
    header = os.path.join(include, "Python.h")
    cache = triton.knobs.cache.dir
    found = dict(compiler=compiler, headers=header if os.path.isfile(header) else None, ptxas=None, cache=None)
    with contextlib.suppress(RuntimeError):
        found["ptxas"] = triton.knobs.nvidia.ptxas.path
    with contextlib.suppress(arguments.ArgumentError):
        found["cache"] = str(arguments.output_folder(cache))
    remedies = dict(
        compiler=f"no C compiler ({asked or 'gcc or clang'}): Triton needs one; install it or set CC",
        headers=f"no {header}: Triton needs Python's headers; install python3-dev or what your system calls it",
        ptxas="no working ptxas: Triton brings its own, so reinstall triton",
        cache=f"cannot write to {cache}: set TRITON_CACHE_DIR to a folder that Triton may fill",
    )
    return found, [remedies[name] for name, path in found.items() if path is None]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `tileformer info`."""
    about = "cpu, cuda or cuda:1 (default: cuda where torch can use it, else cpu)"
    parser.add_argument("--device", type=_device, metavar="D", help=about)
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def _device(text: str) -> str:
    with contextlib.suppress(RuntimeError):
        if torch.device(text).type in ("cpu", "cuda"):
            return text
    raise arguments.ArgumentError(f"unknown device {text!r}: ask for cpu, cuda or cuda:0")


def main(args: argparse.Namespace) -> int:
    """Print the report; 1 if it holds a problem."""
    report = collect(args.device)
    if args.json:
        print(json.dumps(report, indent=2))
    else:
        print("\n".join(_lines(report)))
    return 1 if report["problems"] else 0


def _lines(report: dict[str, Any]) -> list[str]:
    rows = [("problem", line) for line in report["problems"]]
    rows += [(name, version or "none found") for name, version in report["versions"].items()]
    for device in report["devices"]:
        name, *facts = (f"{value} threads" if key == "threads" else str(value) for key, value in device.items())
        rows.append((name, ", ".join(facts)))
    rows.append(("backend", "{name} on {device} ({why})".format(**report["backend"])))
    rows += [(tool, found or "not found") for tool, found in report["tools"].items()]
    width = max(len(name) for name, _ in rows)
    return [f"{name:<{width}}  {text}" for name, text in rows]
