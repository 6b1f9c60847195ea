"""Options of the benchmark suite."""

import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    """--bench-device and --bench-dtype."""
    group = parser.getgroup("tileformer benchmarks")
    group.addoption("--bench-device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    group.addoption("--bench-dtype", default="bf16", choices=("bf16", "fp16", "fp32"))
