"""Every call of bench/calls/cases.py, forward and every gradient, within its error budget against float64 and within
its memory; every dropout."""

import pytest
import torch

from tileformer.bench.calls import Call
from tileformer.bench.calls.cases import CASES, DRAWS
from tileformer.bench.check.run import examine, examine_draws


def _dtypes(item: Call) -> tuple[str, ...]:
    """Few enough to compile in minutes beside a GPU, and to interpret in a minute elsewhere; `tileformer check` takes
    all of them."""
    if not torch.cuda.is_available():
        return () if not item.interpret else item.dtypes if item.suite else item.dtypes[:1]
    if not item.suite:
        return ()
    return tuple(d for d in item.dtypes if d != "fp16") if item.quick else item.dtypes[:1]


def _calls(items):
    return pytest.mark.parametrize(
        ("item", "dtype"),
        [
            pytest.param(item, dtype, id=f"{item.op}-{item.name.replace(' ', '_')}-{dtype}")
            for item in items
            for dtype in _dtypes(item)
        ],
    )


@pytest.mark.compat
@_calls(CASES)
def test_call_passes(item: Call, dtype: str, backend: str, device: torch.device) -> None:
    found = examine(item, dtype, backend, device, runs=2 if item.quick else 1)
    assert found.passed, found.verdict


@_calls([draw for draw in DRAWS if draw.dropout == 0.1])
def test_dropout_is_what_it_should_be(item: Call, dtype: str, backend: str, device: torch.device) -> None:
    found = examine_draws(item, dtype, backend, device)
    assert found.passed, found.verdict


@pytest.mark.parametrize(
    "item", [pytest.param(c, id=f"{c.op}-{c.name.replace(' ', '_')}") for c in CASES if c.interpret]
)
def test_torch_backend_passes(item: Call) -> None:
    if reason := item.unfit("torch"):
        pytest.skip(reason)
    found = examine(item, "fp32", "torch", torch.device("cpu"), runs=1)
    assert found.passed, found.verdict
