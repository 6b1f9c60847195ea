"""Every workload under pytest-benchmark, one test a provider and mode; a wrong result has no time.

`pytest bench --benchmark-only`. Rounds are those of `tileformer bench` (cold cache, the call alone); sweeps give their first point.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from tileformer.bench.check.cases import DTYPES
from tileformer.bench.speed.measure import Clock, Truth, elapsed, passes, wanted
from tileformer.bench.speed.providers import GRADIENT_IN_FORWARD, OURS, Unavailable, providers
from tileformer.bench.speed.run import chosen
from tileformer.bench.speed.workloads import MODES, Workload

pytestmark = pytest.mark.filterwarnings("default")  # other libraries may warn
CALLS = [
    pytest.param(workload, name, id=f"{workload.op}-{workload.name}-{name}".replace(" ", "_"))
    for workload in chosen("all", torch.device("cpu"), dry=False, only=None)
    for name in providers(workload.op)
    if wanted(workload, name, None)
]


@functools.lru_cache(maxsize=1)
def _prepared(workload: Workload, device: torch.device, dtype: torch.dtype) -> tuple[Workload, Any, Any, Truth]:
    """The workload at the device's size and without dropout's bits, its inputs, and the truth: shared by its tests, which follow each other."""
    sized = workload.small() if device.type == "cpu" else workload
    tensors, options = sized.inputs(device, dtype)
    plain = sized.without_dropout()
    return sized, tensors, options, Truth(plain, tensors, options | plain.options)


@functools.lru_cache(maxsize=1)
def _clock(device: torch.device) -> Clock:
    return Clock(device)


@pytest.mark.benchmark(timer=elapsed)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("workload", "provider"), CALLS)
def test_call(benchmark: Any, request: pytest.FixtureRequest, workload: Workload, provider: str, mode: str) -> None:
    device = torch.device(request.config.getoption("--bench-device"))
    dtype = DTYPES[request.config.getoption("--bench-dtype")]
    if mode not in workload.modes:
        pytest.skip(f"timed {' and '.join(workload.modes)} only")
    if mode == "backward" and (workload.op, provider) in GRADIENT_IN_FORWARD:
        pytest.skip("computes its gradient in forward: see both")
    sized, tensors, options, truth = _prepared(workload, device, dtype)
    clock, plain = _clock(device), sized.without_dropout()
    try:
        build = providers(workload.op)[provider]
        ratios, error = truth.ratios(build(plain), tensors, options | plain.options)
        if max(ratios.values()) > 1.0:
            (pytest.fail if provider == OURS else pytest.skip)(f"error over budget: {ratios}")
        prepare, body = passes(sized, build(sized), tensors, options, mode)
        peak = clock.peak(prepare, body)
    except (Unavailable, torch.OutOfMemoryError) as reason:
        pytest.skip(f"{provider}: {reason}")
    benchmark.group = f"{workload.op} {workload.name} {mode}"
    figures = dict(flops=sized.flops(mode), bytes=sized.bytes(dtype, mode), peak_mb=peak, error=error)
    benchmark.extra_info.update(figures, over_budget=max(ratios.values()), device=clock.name)
    rounds = 20 if device.type == "cuda" else 3
    benchmark.pedantic(clock.round, (prepare, body), rounds=rounds, warmup_rounds=2 if device.type == "cuda" else 1)
