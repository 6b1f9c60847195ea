"""What is kept from call to call has a bound, whatever shapes come; and tests/soak.py tells a process that grows from
one that does not."""

import importlib
import importlib.util
import json
import pathlib
import pkgutil
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
from torch.nn import functional as F

from tileformer import decoder, kernels, training
from tileformer.kernels import attention, cross_entropy, dropout, layer_norm, softmax, use_backend

# Kept for ever, but by dtypes, functions of ours, devices and architectures: there are few.
FEW = {"wider", "_interpreted", "_cached_capability", "_warn_old_arch"}
MOST = 1024  # entries of any other cache


def _modules() -> Iterator[ModuleType]:
    for room in (kernels, decoder, training):
        for found in pkgutil.walk_packages(room.__path__, room.__name__ + "."):
            yield importlib.import_module(found.name)


def test_every_cache_has_a_bound() -> None:
    bounds = {
        f"{module.__name__}.{name}": value.cache_parameters()["maxsize"]
        for module in _modules()
        for name, value in vars(module).items()
        if hasattr(value, "cache_parameters") and value.__module__ == module.__name__
    }
    assert {name.rpartition(".")[2] for name, most in bounds.items() if most is None} == FEW
    bounded = [most for most in bounds.values() if most is not None]
    assert len(bounded) >= 9 and max(bounded) <= MOST


def _sizes() -> dict[str, int]:
    """Length of each dictionary, set and list that a module keeps."""
    return {
        f"{module.__name__}.{name}": len(value)
        for module in _modules()
        for name, value in vars(module).items()
        if isinstance(value, dict | set | list) and not name.startswith("__")
    }


def _train_on(size: int) -> None:
    x = torch.randn(2, size, requires_grad=True)
    loss = cross_entropy(layer_norm(dropout(softmax(x), 0.5), (size,), torch.ones(size)), torch.tensor([0, size - 1]))
    q = F.pad(x, (0, 16 - size)).view(1, 1, 2, 16)
    (loss + attention(q, q, q, causal=True).sum()).backward()


@pytest.mark.interprets
@pytest.mark.parametrize("served", ["torch", "interpret"])
def test_new_shapes_leave_nothing_in_a_module(served: str) -> None:
    with use_backend(served):
        _train_on(2)
        before = _sizes()
        for size in range(3, 7):
            _train_on(size)
    assert _sizes() == before


def _program(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, pathlib.Path(__file__).with_name(f"{name}.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def soak() -> ModuleType:
    return _program("soak")


@pytest.mark.parametrize("side", ["tileformer", "torch"])
def test_both_sides_train_and_say_what_they_hold(soak: ModuleType, side: str, capsys: pytest.CaptureFixture) -> None:
    soak.run_side(side, 3, "auto")
    points = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [point["step"] for point in points] == [0, 1, 2, 3]
    assert all(point["resident"] > point["malloc"] > 0 and point["blocks"] > 0 for point in points)


@pytest.mark.parametrize(
    "ours, theirs, status", [(0.9, 0.8, 0), (1.3, 0.8, 1), (0.1, None, 0), (0.5, None, 1)], ids=str
)
def test_growth_beyond_torchs_is_told(soak: ModuleType, ours: float, theirs: float, status: int) -> None:
    def points(growth: float) -> list[dict[str, float]]:  # all of it before the end of the first third is warm-up
        return [{"step": step, "resident": 100 + 40 * min(step, 9) + growth * step / 100} for step in range(0, 3000, 9)]

    assert soak.slope(points(ours), "resident") == pytest.approx(ours, rel=1e-3)
    assert soak.verdict(ours, theirs)[1] == status


def test_an_engine_loses_nothing_of_a_hundred_sequences() -> None:
    """What `make soak` does with 10,000, and what it would say of one that is lost or of a page that is held."""
    program = _program("soak_engine")
    traffic = program.Traffic(100)
    traffic.interrupt_in = 20
    while traffic.run():
        pass
    assert traffic.verdict() == [] and sum(traffic.ends.values()) == 100
    assert traffic.engine.preemptions and traffic.interrupted and traffic.compared
    assert min(traffic.ends[kind] for kind in ("eos", "length", "cancelled", "error")) > 0
    traffic.note(program.Event(7, 3))
    traffic.engine.pool.allocate(1)
    traffic.open[5] = ([], None, 0, [])
    assert [line.split()[0] for line in traffic.verdict()] == ["Event(id=7,", "1", "1"]
