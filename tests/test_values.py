"""Every call of bench/cases.py, forward and every gradient, within its error budget against float64 and within its memory; every dropout."""

import pytest
import torch

from tileformer.bench.calls import Case, Draw
from tileformer.bench.cases import CASES, DRAWS
from tileformer.bench.check import examine, examine_draw


def _dtypes(item: Case | Draw) -> tuple[str, ...]:
    """All of them where the kernels are interpreted; beside a GPU few enough to compile in minutes."""
    if not torch.cuda.is_available():
        return item.dtypes
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
            if torch.cuda.is_available() or isinstance(item, Draw) or item.interpret
        ],
    )


@pytest.mark.compat
@_calls(CASES)
def test_call_passes(item: Case, dtype: str, backend: str, device: torch.device) -> None:
    found = examine(item, dtype, backend, device, runs=2 if item.quick else 1)
    assert found.passed, found.verdict


@_calls(DRAWS)
def test_dropout_is_what_it_should_be(item: Draw, dtype: str, backend: str, device: torch.device) -> None:
    found = examine_draw(item, dtype, backend, device)
    assert found.passed, found.verdict


@pytest.mark.parametrize("item", [pytest.param(c, id=f"{c.op}-{c.name.replace(' ', '_')}") for c in CASES])
def test_torch_backend_passes(item: Case) -> None:
    if reason := item.unfit("torch"):
        pytest.skip(reason)
    found = examine(item, "fp32", "torch", torch.device("cpu"), runs=1)
    assert found.passed, found.verdict
