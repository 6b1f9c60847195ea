"""Judge and time one call: correctness first, then rounds with a cold cache, memory, and shares of what this device was measured to reach.

A round prepares (for a backward: runs the forward), overwrites a buffer larger than the L2 cache, and times the call alone: with CUDA events on a
GPU, whose clock starts when the kernels before it have ended, with the process's clock on a CPU. A provider whose result is over its error
budget gets no time.
"""

from __future__ import annotations

import contextlib
import dataclasses
import statistics
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy
import torch
from torch import Tensor

from tileformer import kernels
from tileformer.bench.recording import record
from tileformer.bench.speed.providers import (
    GRADIENT_IN_FORWARD,
    OURS,
    SLOW_START,
    Call,
    Unavailable,
    providers,
    reference,
)
from tileformer.bench.speed.workloads import Workload

LARGEST_TRUTH = 2**27  # scores that the float64 reference may hold at once; beyond, one group of heads is judged
DRY, DRY_ARCH = "dry run: not measured", 90
_measured = 0.0


def elapsed() -> float:
    """Seconds of all rounds of this process: the timer that pytest-benchmark reads."""
    return _measured


@dataclasses.dataclass
class Result:
    """A provider's figures for one workload and mode; `reason` says why there are none."""

    op: str
    workload: str
    provider: str
    mode: str
    dtype: str
    sizes: dict[str, int]
    median_ms: float | None = None
    p20_ms: float | None = None
    p80_ms: float | None = None
    rounds: int = 0
    tflops: float | None = None
    gbs: float | None = None
    share: float | None = None  # of the time that the measured ceilings allow; None where they are none
    peak_mb: float | None = None  # beyond what the inputs hold
    over_budget: float | None = None  # worst error over its budget, of output and gradients: at most 1 passes
    error: float | None = None  # largest absolute error of the output
    speedup: float | None = None  # this provider's time over ours
    reason: str = ""
    failed: bool = False  # a wrong result or an exception, not a missing feature


CYCLES = 2e9  # a second of torch.cuda._sleep, or more: no GPU's clock is faster


class DryCuda:
    """Stands in for torch.cuda in a dry run: the same calls in the same order, on a CPU."""

    class Event:
        """Keeps the time of its record."""

        def __init__(self, enable_timing: bool = False) -> None:
            self.at = 0.0

        def record(self) -> None:
            """As torch.cuda.Event.record."""
            self.at = time.perf_counter()

        def elapsed_time(self, end: DryCuda.Event) -> float:
            """Milliseconds, as torch.cuda.Event.elapsed_time."""
            return (end.at - self.at) * 1e3

    def get_device_properties(self, device: Any) -> Any:
        """Small enough for a CPU to overwrite."""
        return SimpleNamespace(name=DRY, L2_cache_size=2**16, total_memory=2**30, multi_processor_count=132)

    def max_memory_allocated(self, device: Any) -> int:
        """Nothing is measured."""
        return 0

    memory_allocated = max_memory_allocated

    def synchronize(self, device: Any = None) -> None:
        """Nothing runs beside the CPU."""

    reset_peak_memory_stats = synchronize

    def _sleep(self, cycles: int) -> None:
        """Nothing has to wait for the host."""


class Clock:
    """Times rounds on a device.

    Args:
        device: of the tensors.
        dry: run the GPU's code with a stand-in for torch.cuda.
    """

    def __init__(self, device: torch.device, dry: bool = False) -> None:
        self.device, self.dry = device, dry
        self.cuda: Any = DryCuda() if dry else torch.cuda if device.type == "cuda" else None
        self.name = "cpu"
        if self.cuda:
            properties = self.cuda.get_device_properties(device)
            self.name = properties.name
            self.flush = torch.empty(4 * properties.L2_cache_size, dtype=torch.int8, device=device)
        self._body: Any = None  # what was timed last
        self._host = 0.0  # seconds that the host took to launch it

    def round(self, prepare: Callable[[], Any], body: Callable[[Any], Any], cold: bool = True) -> float:
        """Seconds of body(prepare()).

        On a GPU those of the GPU alone: it sleeps until the host, by its last time twice over, has launched everything.
        The first round of a body knows no such time; it warms up.
        """
        global _measured
        given = prepare()
        if body is not self._body:
            self._body, self._host = body, 0.0
        if self.cuda:
            start, end = (self.cuda.Event(enable_timing=True) for _ in range(2))
            if cold:
                self.flush.zero_()
            self.cuda._sleep(int(min(2 * self._host, 0.02) * CYCLES))
            start.record()
            begin = time.perf_counter()
            kept = body(given)  # freed after the clock has stopped
            self._host = time.perf_counter() - begin
            end.record()
            self.cuda.synchronize(self.device)
            seconds = start.elapsed_time(end) / 1e3
        else:
            begin = time.perf_counter()
            kept = body(given)
            seconds = time.perf_counter() - begin
        del kept
        _measured += seconds
        return seconds

    def rounds(self, prepare: Callable[[], Any], body: Callable[[Any], Any], cold: bool = True) -> list[float]:
        """Seconds of each of 5 to 30 rounds, a tenth of a second of them, after two that warm up."""
        if self.dry:
            return [self.round(prepare, body, cold) for _ in range(2)]
        first = min(self.round(prepare, body, cold) for _ in range(2))
        return [self.round(prepare, body, cold) for _ in range(min(30, max(5, int(0.1 / max(first, 1e-6)))))]

    def peak(self, prepare: Callable[[], Any], body: Callable[[Any], Any]) -> float | None:
        """MB that one call allocates at most, beyond what was there before it; None where nobody counts."""
        if not self.cuda:
            return None
        given = prepare()
        self.cuda.synchronize(self.device)
        before = self.cuda.memory_allocated(self.device)
        self.cuda.reset_peak_memory_stats(self.device)
        body(given)
        self.cuda.synchronize(self.device)
        return (self.cuda.max_memory_allocated(self.device) - before) / 1e6

    def ceilings(self, dtype: torch.dtype) -> dict[str, float]:
        """What this device reaches now: GB/s of a large copy (read + write), TFLOP/s of a large square matmul in `dtype`, cache warm."""
        if not self.cuda:
            return {}  # no size is large for every CPU's caches, and small enough to wait for
        numel, n = (2**22, 256) if self.dry else (2**28, 4096 if dtype == torch.float32 else 8192)  # a copy of 1 GiB

        def reach(make: Callable[[], Any], body: Callable[[Any], Any]) -> float:
            given = make()
            return statistics.median(self.rounds(lambda: given, body, cold=False))

        copy = reach(lambda: torch.randn(2, numel, device=self.device), lambda x: x[0].copy_(x[1]))
        product = reach(lambda: torch.randn(2, n, n, device=self.device).to(dtype), lambda x: x[0] @ x[1])
        return {
            "copy GB/s": 8 * numel / copy / 1e9,
            f"matmul {str(dtype).removeprefix('torch.')} TFLOP/s": 2 * n**3 / product / 1e12,
        }


def results(call: Call, tensors: dict[str, Tensor], options: dict[str, Any], given: Tensor | None) -> dict[str, Tensor]:
    """Output, and with `given` (the output's gradient) the gradients, of copies of the tensors."""
    leaves = {name: x.detach().clone().requires_grad_(given is not None) for name, x in tensors.items()}
    out = call(leaves, options)
    named = {"out": out.detach()}
    if given is not None and out.requires_grad:
        gradients = torch.autograd.grad(out, list(leaves.values()), given.to(out.dtype))
        named |= {f"d{name}": x for name, x in zip(leaves, gradients, strict=True)}
    return named


def _gradient(shape: Iterable[int], device: torch.device, dtype: torch.dtype) -> Tensor:
    """The gradient that a backward starts from: 1 for a loss, else the same normal numbers for every provider."""
    if not tuple(shape):
        return torch.ones((), device=device, dtype=dtype)
    return torch.randn(tuple(shape), generator=torch.Generator(device).manual_seed(1), device=device).to(dtype)


def over_budget(got: Tensor, eager: Tensor, truth: Tensor) -> float:
    """Largest error over its budget, 2 max|eager - truth| + c eps max|truth| (bench/check/budget.py), without leaving the device.

    c is 5 for 16-bit types and 256 for float32, not the 1 and the 8 that `tileformer check` holds our kernels to: other libraries, PyTorch among
    them, round scores and weights on their way, and add up thousands of numbers one by one. Products in TF32 are still far beyond it.
    """
    error = float((got.double() - truth).abs().max())
    if error == 0.0:
        return 0.0
    factor = 5 if eager.dtype in (torch.float16, torch.bfloat16) else 256
    scale = factor * torch.finfo(eager.dtype).eps * float(truth.abs().max())
    ratio = error / max(2 * float((eager.double() - truth).abs().max()) + scale, 1e-300)
    return ratio if ratio == ratio else float("inf")


class Truth:
    """What the definition gives in float64 and, as a yardstick, in the working dtype.

    Large attention is judged on the last batch (with padding, the shortest) and its last group of heads: heads are independent.
    """

    def __init__(self, workload: Workload, tensors: dict[str, Tensor], options: dict[str, Any]) -> None:
        s, x = workload.sizes, next(iter(tensors.values()))
        self.workload, self.group = workload, s.get("H", 1) // s.get("H_kv", 1)
        attention = workload.op == "attention"
        self.part = attention and not workload.dropout and s["B"] * s["H"] * s["T_q"] * s["T_k"] > LARGEST_TRUTH
        cut = {name: self.cut(name, x) for name, x in (tensors | options).items()}
        shape = () if workload.op == "cross_entropy" else tuple(x.shape)
        given = _gradient(shape, x.device, x.dtype) if "backward" in workload.modes else None
        self.given, given = given, None if given is None else self.cut("dout", given)
        wide = {n: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for n, x in cut.items()}
        call = reference(workload)
        self.truth, self.eager = (
            results(call, {n: c[n] for n in tensors}, {n: c[n] for n in options}, given) for c in (wide, cut)
        )

    def cut(self, name: str, x: Any) -> Any:
        """The part of an input or a result that is judged."""
        if not self.part or not isinstance(x, Tensor):
            return x
        if name == "key_mask":
            return x[-1:]
        if name == "mask":
            return x if x.dim() == 2 else x[:, -self.group :]
        return x[-1:, -1:] if name in ("k", "v", "dk", "dv") else x[-1:, -self.group :]

    def ratios(self, call: Call, tensors: dict[str, Tensor], options: dict[str, Any]) -> tuple[dict[str, float], float]:
        """Error over budget of each result of a provider, and the largest absolute error of its output."""
        got = {name: self.cut(name, x) for name, x in results(call, tensors, options, self.given).items()}
        ratios = {name: over_budget(x, self.eager[name], self.truth[name]) for name, x in got.items()}
        return ratios, float((got["out"].double() - self.truth["out"]).abs().max())


def passes(
    workload: Workload, call: Call, tensors: dict[str, Tensor], options: dict[str, Any], mode: str
) -> tuple[Any, Any]:
    """(prepare, body) of a mode: what a round runs before its clock and under it."""
    trains = "backward" in workload.modes  # a forward that will have a backward keeps what that needs
    stored = getattr(call, "stored", torch.clone)
    leaves = {name: stored(x.detach()).requires_grad_(trains) for name, x in tensors.items()}
    options = {name: x for name, x in options.items() if name != "seed"}  # everybody draws, as in training
    wanted = list(leaves.values())
    run = lambda _=None: call(leaves, options)  # noqa: E731
    out = run()
    if mode == "forward":
        return (lambda: None), run
    if not out.requires_grad:
        raise Unavailable("has no backward on this device")
    # In the layout of the output, as autograd's own would be: no provider copies what another reads in place.
    given = torch.empty_like(out).copy_(_gradient(out.shape, out.device, out.dtype))
    if mode == "backward":
        return run, lambda out: torch.autograd.grad(out, wanted, given)
    return (lambda: None), lambda _: torch.autograd.grad(run(), wanted, given)


@contextlib.contextmanager
def ours(dry: bool) -> Iterator[None]:
    """Our kernels as they are on a GPU; in a dry run compiled for DRY_ARCH and not executed. A step to a smaller tile is an error."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("error", UserWarning)
        if dry:
            stack.enter_context(record(DRY_ARCH))
            stack.enter_context(kernels.use_backend("triton"))
        yield


class Bench:
    """Measures workloads on one device in one dtype.

    Args:
        dry: execute everything at small size with stand-in clocks.
        scale: on a CPU, the size of `Workload.small`.
        deadline: of time.monotonic(), after which nothing new is started.
    """

    def __init__(
        self,
        device: torch.device,
        dtype: torch.dtype,
        dry: bool = False,
        scale: int = 4,
        deadline: float = float("inf"),
    ) -> None:
        self.device, self.dtype, self.deadline = device, dtype, deadline
        self.clock, self.scale = Clock(device, dry), 1 if dry else scale
        self.ceilings = self.clock.ceilings(dtype)

    def sized(self, workload: Workload) -> Workload:
        """The workload as it is on a GPU, smaller on a CPU."""
        return workload.small(self.scale) if self.device.type == "cpu" else workload

    def measure(self, workload: Workload, names: list[str], modes: Iterable[str]) -> Iterator[Result]:
        """Results of each provider and mode of one workload, ours first; times only of right results."""
        workload = self.sized(workload)
        tensors, options = workload.inputs(self.device, self.dtype)
        truths: dict[bool, Truth] = {}
        ours: dict[str, float] = {}
        for name in names:
            for result in self._provider(
                workload, name, [m for m in modes if m in workload.modes], tensors, options, truths
            ):
                if result.median_ms is not None:
                    if name == OURS:
                        ours[result.mode] = result.median_ms
                    if result.mode in ours:
                        result.speedup = result.median_ms / ours[result.mode]
                yield result
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def _provider(
        self, workload: Workload, name: str, modes: list[str], tensors: dict[str, Tensor], options: dict[str, Any],
        truths: dict[bool, Truth],
    ) -> Iterator[Result]:  # fmt: skip
        dtype = str(self.dtype).removeprefix("torch.")

        def make(mode: str) -> Result:
            return Result(workload.op, workload.name, name, mode, dtype, workload.sizes)

        found: dict[str, Any] = {}
        try:
            build = providers(workload.op)[name]
            same_bits = name == OURS and self.device.type == "cuda" and workload.op in ("attention", "dropout")
            judged = workload if same_bits else workload.without_dropout()
            if same_bits not in truths:
                truths[same_bits] = Truth(judged, tensors, options | judged.options)
            if self.clock.dry and name == OURS:
                with ours(dry=True):  # what follows runs on the CPU's backend
                    results(build(workload), tensors, options, truths[same_bits].given)
            ratios, found["error"] = truths[same_bits].ratios(build(judged), tensors, options | judged.options)
            worst = max(ratios, key=ratios.__getitem__)
            found["over_budget"] = ratios[worst]
            if ratios[worst] > 1.0:
                found |= dict(reason=f"error of {worst} is {ratios[worst]:.3g} times its budget", failed=True)
                yield from (dataclasses.replace(make(mode), **found) for mode in modes)
                return
            call = build(workload)
        except Exception as error:
            yield from (dataclasses.replace(make(mode), **_excuse(error)) for mode in modes)
            return
        for mode in modes:
            try:
                if mode == "backward" and (workload.op, name) in GRADIENT_IN_FORWARD:
                    raise Unavailable("computes its gradient in forward: see both")
                yield dataclasses.replace(make(mode), **found, **self._time(workload, call, tensors, options, mode))
            except Exception as error:
                yield dataclasses.replace(make(mode), **found | _excuse(error))

    def _time(
        self, workload: Workload, call: Call, tensors: dict[str, Tensor], options: dict[str, Any], mode: str
    ) -> dict[str, Any]:
        prepare, body = passes(workload, call, tensors, options, mode)
        peak = self.clock.peak(prepare, body)
        seconds = self.clock.rounds(prepare, body)
        median = statistics.median(seconds)
        flops, moved = workload.flops(mode), workload.bytes(self.dtype, mode)
        p20, p80 = numpy.percentile(seconds, (20, 80))
        return dict(
            median_ms=median * 1e3, p20_ms=float(p20) * 1e3, p80_ms=float(p80) * 1e3, rounds=len(seconds),
            tflops=flops / median / 1e12 if flops else None, gbs=moved / median / 1e9, peak_mb=peak,
            share=None if self.clock.dry or not self.ceilings else _share(self.ceilings, moved, flops, median),
        )  # fmt: skip


def _share(ceilings: dict[str, float], moved: float, flops: float, seconds: float) -> float | None:
    """Of the time that the ceilings (GB/s, TFLOP/s) allow; None above 1: what was beaten is no ceiling."""
    bandwidth, compute = ceilings.values()
    share = max(moved / bandwidth / 1e9, flops / compute / 1e12) / seconds
    return share if share <= 1 else None


def _excuse(error: Exception) -> dict[str, Any]:
    """What a result says about an exception. A missing feature, and too little memory, are no failures."""
    if isinstance(error, Unavailable):
        return dict(reason=str(error))
    if isinstance(error, torch.OutOfMemoryError):
        return dict(reason="out of memory")
    text = " ".join(str(error).split())
    return dict(reason=f"{type(error).__name__}: {text[:300]}", failed=True)


def wanted(workload: Workload, name: str, asked: list[str] | None) -> bool:
    """Whether a provider is timed: those asked for; by default all, but slow starters only at one point of a sweep and one head size."""
    if asked or name not in SLOW_START.get(workload.op, SLOW_START["*"]):
        return not asked or name in asked
    return workload.sizes[workload.axis] in (4096, 32000) if workload.axis else workload.sizes.get("D") != 128
