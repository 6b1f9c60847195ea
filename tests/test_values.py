"""Every call of bench/cases.py, forward and every gradient, within its error budget against float64."""

import pytest
import torch

from tileformer.bench.cases import CASES, Case
from tileformer.bench.check import judge


def _dtypes(case: Case) -> tuple[str, ...]:
    """All of them where the kernels are interpreted; beside a GPU few enough to compile in minutes."""
    if not torch.cuda.is_available():
        return case.dtypes
    return tuple(d for d in case.dtypes if d != "fp16") if case.quick else case.dtypes[:1]


CALLS = [
    pytest.param(case, dtype, id=f"{case.op}-{case.name.replace(' ', '_')}-{dtype}")
    for case in CASES
    for dtype in _dtypes(case)
]


@pytest.mark.compat
@pytest.mark.parametrize(("case", "dtype"), CALLS)
def test_kernel_is_within_the_error_budget(case: Case, dtype: str, backend: str, device: torch.device) -> None:
    ratios = judge(case, dtype, backend, device)
    assert max(ratios.values()) <= 1.0, f"error over budget: {ratios}"


DRAWS_ITS_OWN = {"dropout_p", "p"}  # the torch backend draws other dropout bits than the reference


@pytest.mark.parametrize(
    "case", [pytest.param(c, id=f"{c.op}-{c.name}") for c in CASES if not DRAWS_ITS_OWN & set(c.inputs()[1])]
)
def test_torch_backend_is_within_the_error_budget(case: Case) -> None:
    ratios = judge(case, "fp32", "torch", torch.device("cpu"))
    assert max(ratios.values()) <= 1.0, f"error over budget: {ratios}"
