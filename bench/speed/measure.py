"""Check and time one call: correctness first, then rounds with a cold cache, memory, and shares of measured ceilings.

A round prepares (for a backward: runs the forward), overwrites a buffer larger than the L2 cache, and times the call
alone: with CUDA events on a GPU, with the process's clock on a CPU. A result over its error budget gets no time.
"""

import contextlib
import dataclasses
import math
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
from tileformer.bench.calls import Call, Function, differentiate, is_floating, without_dropout
from tileformer.bench.calls.op import Options, Tensors
from tileformer.bench.calls.providers import GRADIENT_IN_FORWARD, OURS, SLOW_START, Unavailable, providers, reference
from tileformer.bench.check.budget import PEERS_C, over_budget
from tileformer.bench.recording import record

LARGEST_TRUTH = 2**27  # scores that the float64 reference may hold at once; beyond, one group of heads is compared
DRY, DRY_ARCH = "dry run: not measured", 90
CYCLES = 2e9  # a second of torch.cuda._sleep, or more: no GPU's clock is faster
Figures = dict[str, Any]
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


class _DryEvent:
    """As torch.cuda.Event, on the CPU's clock."""

    def __init__(self, enable_timing: bool = False) -> None:
        self.record = lambda: setattr(self, "at", time.perf_counter())
        self.elapsed_time = lambda end: (end.at - self.at) * 1e3  # type: ignore[attr-defined]


# Stands in for torch.cuda in a dry run: the same calls in the same order, on a CPU.
_DRY_GPU = SimpleNamespace(name=DRY, L2_cache_size=2**16, total_memory=2**30, multi_processor_count=132)
_DRY_CUDA = SimpleNamespace(
    Event=_DryEvent,
    get_device_properties=lambda device: _DRY_GPU,
    **dict.fromkeys(("max_memory_allocated", "memory_allocated"), lambda device: 0),
    **dict.fromkeys(("synchronize", "reset_peak_memory_stats", "_sleep"), lambda *_: None),
)


class Clock:
    """Times rounds on the device of the tensors; `dry`: the GPU's code with a stand-in for torch.cuda."""

    def __init__(self, device: torch.device, dry: bool = False) -> None:
        self.device, self.dry = device, dry
        self.cuda: Any = _DRY_CUDA if dry else torch.cuda if device.type == "cuda" else None
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
        prepared = prepare()
        if body is not self._body:
            self._body, self._host = body, 0.0
        if self.cuda:
            start, end = (self.cuda.Event(enable_timing=True) for _ in range(2))
            if cold:
                self.flush.zero_()
            self.cuda._sleep(int(min(2 * self._host, 0.02) * CYCLES))
            start.record()
        begin = time.perf_counter()
        kept = body(prepared)  # freed after the clock has stopped
        seconds = self._host = time.perf_counter() - begin
        if self.cuda:
            end.record()
            self.cuda.synchronize(self.device)
            seconds = start.elapsed_time(end) / 1e3
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
        prepared = prepare()
        self.cuda.synchronize(self.device)
        before = self.cuda.memory_allocated(self.device)
        self.cuda.reset_peak_memory_stats(self.device)
        body(prepared)
        self.cuda.synchronize(self.device)
        return (self.cuda.max_memory_allocated(self.device) - before) / 1e6

    def ceilings(self, dtype: torch.dtype) -> dict[str, float]:
        """What this device reaches now: GB/s of a large copy (read + write), TFLOP/s of a large square matmul."""
        if not self.cuda:
            return {}  # no size is large for every CPU's caches, and small enough to wait for
        numel, n = (2**22, 256) if self.dry else (2**28, 4096 if dtype == torch.float32 else 8192)  # a copy of 1 GiB

        def reach(body: Callable[[Any], Any], operands: Tensor) -> float:
            return statistics.median(self.rounds(lambda: operands, body, cold=False))

        copy = reach(lambda x: x[0].copy_(x[1]), torch.randn(2, numel, device=self.device))
        product = reach(lambda x: x[0] @ x[1], torch.randn(2, n, n, device=self.device).to(dtype))
        name = str(dtype).removeprefix("torch.")
        return {"copy GB/s": 8 * numel / copy / 1e9, f"matmul {name} TFLOP/s": 2 * n**3 / product / 1e12}


def results_of(function: Function, tensors: Tensors, options: Options, grad_output: Tensor | None) -> Tensors:
    """Output, and with `grad_output` the gradients, of copies of the tensors."""
    leaves = {name: x.detach().clone().requires_grad_(grad_output is not None) for name, x in tensors.items()}
    return differentiate(function, leaves, options, lambda _, out: grad_output.to(out.dtype))[0]  # type: ignore[union-attr]


def _gradient(shape: Iterable[int], device: torch.device, dtype: torch.dtype) -> Tensor:
    """The gradient that a backward starts from: 1 for a loss, else the same normal numbers for every provider."""
    if not tuple(shape):
        return torch.ones((), device=device, dtype=dtype)
    return torch.randn(tuple(shape), generator=torch.Generator(device).manual_seed(1), device=device).to(dtype)


class Truth:
    """What the definition gives in float64 and, as a yardstick, in the working dtype.

    Of large attention the last batch (with padding, the shortest) and its last group of heads are compared.
    """

    def __init__(self, call: Call, tensors: Tensors, options: Options) -> None:
        s, x = call.sizes, next(iter(tensors.values()))
        self.group = s.get("H", 1) // s.get("H_kv", 1)
        attention = call.op == "attention"
        self.is_part = attention and not call.dropout and s["B"] * s["H"] * s["T_q"] * s["T_k"] > LARGEST_TRUTH
        shape = () if call.op.endswith("cross_entropy") else tuple(x.shape)
        self.grad_output = _gradient(shape, x.device, x.dtype) if "backward" in call.modes else None
        rounded = {n: self.part_of(n, x) for n, x in dict(tensors, **options, dout=self.grad_output).items()}
        exact = {name: x.double() if is_floating(x) else x for name, x in rounded.items()}
        self.truth, self.eager = (
            results_of(reference(call), {n: of[n] for n in tensors}, {n: of[n] for n in options}, rounded["dout"])
            for of in (exact, rounded)
        )

    def part_of(self, name: str, x: Any) -> Any:
        """The part of an input or a result that is compared."""
        if not self.is_part or not isinstance(x, Tensor):
            return x
        if name == "key_mask":
            return x[-1:]
        if name == "mask":
            return x if x.dim() == 2 else x[:, -self.group :]
        return x[-1:, -1:] if name in ("k", "v", "dk", "dv") else x[-1:, -self.group :]

    def errors(self, function: Function, tensors: Tensors, options: Options) -> tuple[dict[str, float], float]:
        """Error over budget of each result of a provider, and the largest absolute error of its output."""
        results = results_of(function, tensors, options, self.grad_output)
        got = {name: self.part_of(name, x) for name, x in results.items()}
        budgets = {name: (self.eager[name], x, float(x.abs().max())) for name, x in self.truth.items() if name in got}
        over = {name: over_budget(got[name], *budget, c=PEERS_C) for name, budget in budgets.items()}
        return over, float((got["out"].double() - self.truth["out"]).abs().max())


def passes(call: Call, function: Function, tensors: Tensors, options: Options, mode: str) -> tuple[Any, Any]:
    """(prepare, body) of a mode: what a round runs before its clock and under it."""
    trains = "backward" in call.modes  # a forward that will have a backward keeps what that needs
    stored = getattr(function, "stored", torch.clone)
    leaves = {name: stored(x.detach()).requires_grad_(trains) for name, x in tensors.items()}
    options = {name: x for name, x in options.items() if name != "seed"}  # everybody draws, as in training
    wanted = list(leaves.values())
    run = lambda _=None: function(leaves, options)  # noqa: E731
    several = lambda out: out if isinstance(out, tuple) else (out,)  # noqa: E731
    outs = several(run())
    if mode == "forward":
        return (lambda: None), run
    if not all(out.requires_grad for out in outs):
        raise Unavailable("has no backward on this device")
    # In the layout of the output, as autograd's own would be: no provider copies what another reads in place.
    grads = [torch.empty_like(out).copy_(_gradient(out.shape, out.device, out.dtype)) for out in outs]
    if mode == "backward":
        return run, lambda out: torch.autograd.grad(several(out), wanted, grads)
    return (lambda: None), lambda _: torch.autograd.grad(several(run()), wanted, grads)


@contextlib.contextmanager
def ours(dry: bool) -> Iterator[None]:
    """Our kernels as on a GPU; in a dry run compiled for DRY_ARCH alone. A step to a smaller tile is an error."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("error", UserWarning)
        if dry:
            stack.enter_context(record(DRY_ARCH))
            stack.enter_context(kernels.use_backend("triton"))
        yield


class Bench:
    """Measures workloads on one device in one dtype.

    `dry` executes everything at small size with stand-in clocks, `scale` is the size of `Call.small` on a CPU; after
    `deadline`, of time.monotonic(), nothing new is started.
    """

    def __init__(
        self, device: torch.device, dtype: torch.dtype, dry: bool = False, scale: int = 4, deadline: float = math.inf
    ) -> None:
        self.device, self.dtype, self.deadline = device, dtype, deadline
        self.clock, self.scale = Clock(device, dry), 1 if dry else scale
        self.ceilings = self.clock.ceilings(dtype)

    def sized(self, call: Call) -> Call:
        """The call as it is on a GPU, smaller on a CPU."""
        return call.small(self.scale) if self.device.type == "cpu" else call

    def measure(self, call: Call, names: list[str], modes: Iterable[str]) -> Iterator[Result]:
        """Results of each provider and mode of one workload, ours first; times only of right results."""
        call = self.sized(call)
        inputs = call.inputs(self.device, self.dtype)
        truths: dict[bool, Truth] = {}
        ours: dict[str, float] = {}
        for name in names:
            for result in self._provider(call, name, [m for m in modes if m in call.modes], *inputs, truths):
                if result.median_ms is not None:
                    if name == OURS:
                        ours[result.mode] = result.median_ms
                    if result.mode in ours:
                        result.speedup = result.median_ms / ours[result.mode]
                yield result
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def _provider(
        self, call: Call, name: str, modes: list[str], tensors: Tensors, options: Options, truths: dict[bool, Truth]
    ) -> Iterator[Result]:
        dtype = str(self.dtype).removeprefix("torch.")

        def result(mode: str, figures: Figures) -> Result:
            return Result(call.op, call.name, name, mode, dtype, dict(call.sizes), **figures)

        try:
            figures = self._checked(call, name, tensors, options, truths)
            function = providers(call.op)[name](call)
        except Exception as error:
            figures = _excuse(error)
        if figures.get("reason"):
            yield from (result(mode, figures) for mode in modes)
            return
        for mode in modes:
            try:
                if mode == "backward" and (call.op, name) in GRADIENT_IN_FORWARD:
                    raise Unavailable("computes its gradient in forward: see both")
                yield result(mode, figures | self._time(call, function, tensors, options, mode))
            except Exception as error:
                yield result(mode, figures | _excuse(error))

    def _checked(self, call: Call, name: str, tensors: Tensors, options: Options, truths: dict[bool, Truth]) -> Figures:
        """The errors of a provider; with a `reason` if they are over the budget."""
        build = providers(call.op)[name]
        same_bits = name == OURS and self.device.type == "cuda" and call.op in ("attention", "dropout")
        compared = call if same_bits else call.without_dropout()
        compared_options = options if same_bits else without_dropout(options)
        if same_bits not in truths:
            truths[same_bits] = Truth(compared, tensors, compared_options)
        if self.clock.dry and name in (OURS, "hopper"):
            with ours(dry=True):  # what follows runs on the CPU's backend
                results_of(build(call), tensors, options, truths[same_bits].grad_output)
        over, error = truths[same_bits].errors(build(compared), tensors, compared_options)
        worst = max(over, key=over.__getitem__)
        figures = dict(error=error, over_budget=over[worst])
        if over[worst] <= 1.0:
            return figures
        return figures | dict(reason=f"error of {worst} is {over[worst]:.3g} times its budget", failed=True)

    def _time(self, call: Call, function: Function, tensors: Tensors, options: Options, mode: str) -> Figures:
        prepare, body = passes(call, function, tensors, options, mode)
        peak = self.clock.peak(prepare, body)
        seconds = self.clock.rounds(prepare, body)
        median = statistics.median(seconds)
        flops, moved = call.flops(mode), call.bytes(self.dtype, mode)
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


def _excuse(error: Exception) -> Figures:
    """What a result says about an exception. A missing feature, and too little memory, are no failures."""
    if isinstance(error, Unavailable):
        return dict(reason=str(error))
    if isinstance(error, torch.OutOfMemoryError):
        return dict(reason="out of memory")
    return dict(reason=f"{type(error).__name__}: {' '.join(str(error).split())[:300]}", failed=True)


def wanted(call: Call, name: str, asked: list[str] | None) -> bool:
    """Whether a provider is timed: those asked for, else all, but slow starters at one point of a sweep and one D."""
    if asked or name not in SLOW_START[call.op]:
        return not asked or name in asked
    return call.sizes[call.axis] in (4096, 32000) if call.axis else call.sizes.get("D") != 128
