"""Every workload under pytest-benchmark, one test a provider and mode; a wrong result has no time.

`pytest bench --benchmark-only`: rounds as of `tileformer bench` (cold cache, the call alone), a sweep's first point.
"""

import functools
from typing import Any

import pytest
import torch

from tileformer.bench.calls import DTYPES, Call, without_dropout
from tileformer.bench.calls.op import MODES
from tileformer.bench.calls.providers import GRADIENT_IN_FORWARD, OURS, Unavailable, providers
from tileformer.bench.speed.measure import Clock, Truth, elapsed, passes, wanted
from tileformer.bench.speed.run import chosen

pytestmark = pytest.mark.filterwarnings("default")  # other libraries may warn
CALLS = [
    pytest.param(call, name, id=f"{call.op}-{call.name}-{name}".replace(" ", "_"))
    for call in chosen("all", torch.device("cpu"), dry=False, only=None)
    for name in providers(call.op)
    if wanted(call, name, None)
]
_clock = functools.lru_cache(maxsize=1)(Clock)


@functools.lru_cache(maxsize=1)
def _prepared(call: Call, device: torch.device, dtype: torch.dtype) -> tuple[Call, Any, Any, Truth]:
    """The call at the device's size, its inputs, its truth without dropout: shared by tests that follow each other."""
    sized = call.small() if device.type == "cpu" else call
    tensors, options = sized.inputs(device, dtype)
    return sized, tensors, options, Truth(sized.without_dropout(), tensors, without_dropout(options))


@pytest.mark.benchmark(timer=elapsed)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("call", "provider"), CALLS)
def test_call(benchmark: Any, request: pytest.FixtureRequest, call: Call, provider: str, mode: str) -> None:
    device = torch.device(request.config.getoption("--bench-device"))
    dtype = DTYPES[request.config.getoption("--bench-dtype")]
    if mode not in call.modes:
        pytest.skip(f"timed {' and '.join(call.modes)} only")
    if mode == "backward" and (call.op, provider) in GRADIENT_IN_FORWARD:
        pytest.skip("computes its gradient in forward: see both")
    sized, tensors, options, truth = _prepared(call, device, dtype)
    clock, build = _clock(device), providers(call.op)[provider]
    try:
        over, error = truth.errors(build(sized.without_dropout()), tensors, without_dropout(options))
        if max(over.values()) > 1.0:
            (pytest.fail if provider == OURS else pytest.skip)(f"error over budget: {over}")
        prepare, body = passes(sized, build(sized), tensors, options, mode)
        peak = clock.peak(prepare, body)
    except (Unavailable, torch.OutOfMemoryError) as reason:
        pytest.skip(f"{provider}: {reason}")
    benchmark.group = f"{call.op} {call.name} {mode}"
    figures = dict(flops=sized.flops(mode), bytes=sized.bytes(dtype, mode), peak_mb=peak, error=error)
    benchmark.extra_info.update(figures, over_budget=max(over.values()), device=clock.name)
    rounds = 20 if device.type == "cuda" else 3
    benchmark.pedantic(clock.round, (prepare, body), rounds=rounds, warmup_rounds=2 if device.type == "cuda" else 1)
