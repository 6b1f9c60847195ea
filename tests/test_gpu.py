"""What only a GPU can show: other devices, streams, threads and CUDA graphs. Skipped, with the reason, where there is
none."""

import importlib.util
import os
import pathlib
import subprocess
import sys
import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tileformer import kernels
from tileformer.bench.calls import Call, leaves_of
from tileformer.bench.calls.cases import CASES
from tileformer.kernels import attention, reference, use_backend
from tileformer.kernels.attention import launchers
from tileformer.kernels.backend import choose


def _usual(op: str) -> Call:
    return max((case for case in CASES if case.op == op), key=lambda case: case.quick)  # else its first


def _step(op: str, device: str) -> tuple[Callable[[], list[Tensor]], list[Tensor]]:
    """A forward and backward of an op on leaves that live on `device`, and the leaves; tests/test_values.py has
    compiled them in bfloat16."""
    tensors, options = _usual(op).inputs()
    place = lambda x: x.to(device, torch.bfloat16 if x.is_floating_point() else x.dtype) if isinstance(x, Tensor) else x  # noqa: E731
    leaves = leaves_of(_usual(op), {name: place(x) for name, x in tensors.items()})
    options = {name: place(x) for name, x in options.items()}

    def run() -> list[Tensor]:
        out = getattr(kernels, op)(**leaves, **options)
        out = out[0] if isinstance(out, tuple) else out
        grads = torch.autograd.grad(out.sum(), list(leaves.values())) if out.requires_grad else ()
        return [out.detach(), *grads]  # a graph that lives on would bring its own stream into the next run's backward

    return run, list(leaves.values())


every_op = pytest.mark.parametrize("op", sorted({case.op for case in CASES}))


@pytest.mark.interprets
@every_op
def test_the_steps_of_this_file_run(op: str) -> None:
    """Here too: the other tests are skipped without a GPU, and would hide that one has no call to make."""
    run, leaves = _step(op, "cpu")
    with use_backend("interpret"):
        first, second = run(), run()
        with torch.no_grad():
            leaves[0].add_(1.0)
        moved = run()
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True)) or op == "dropout"
    assert any(not torch.equal(a, b) for a, b in zip(moved, first, strict=True)) or op == "dropout"


@pytest.mark.gpu(devices=2)
@every_op
def test_runs_on_a_device_that_is_not_the_current_one(op: str) -> None:
    expected, got = _step(op, "cuda:0")[0](), _step(op, "cuda:1")[0]()
    assert torch.cuda.current_device() == 0
    for a, b in zip(got, expected, strict=True):
        assert a.device.index == 1
        torch.testing.assert_close(a.cpu(), b.cpu(), rtol=0, atol=0)


@pytest.mark.gpu
@every_op
def test_launches_on_the_current_stream(op: str) -> None:
    run, leaves = _step(op, "cuda")
    expected = run()
    stream = torch.cuda.Stream()
    kept = [x.detach().clone() for x in leaves]
    with torch.no_grad():
        for x in leaves:
            x.zero_()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # a launch on another stream would read the zeros
        with torch.no_grad():
            for x, value in zip(leaves, kept, strict=True):
                x.copy_(value)
        got = run()
    torch.cuda.current_stream().wait_stream(stream)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.gpu
@every_op
def test_runs_from_another_thread(op: str) -> None:
    run, _ = _step(op, "cuda")
    expected, got = run(), []
    thread = threading.Thread(target=lambda: got.extend(run()))
    thread.start()
    thread.join()
    assert len(got) == len(expected) and all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.gpu
@every_op
def test_is_captured_in_a_cuda_graph(op: str) -> None:
    run, leaves = _step(op, "cuda")
    expected = run()
    warm = torch.cuda.Stream()
    warm.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(warm):
        run()
    torch.cuda.current_stream().wait_stream(warm)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    with torch.no_grad():
        leaves[0].add_(1.0)
    graph.replay()
    moved = run()
    assert all(torch.equal(a, b) for a, b in zip(captured, moved, strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(moved, expected, strict=True)) or op == "dropout"


@pytest.mark.gpu
def test_offsets_beyond_two_to_the_31() -> None:
    """Element offsets of the last head pass 2**31: an int32 offset would read another head."""
    b, h, t, d = 1, 270, 65536, 128
    if torch.cuda.mem_get_info()[0] < 4 * b * h * t * d * 2:
        pytest.skip("needs 18 GB of free GPU memory")
    q = torch.zeros(b, h, 64, d, device="cuda", dtype=torch.bfloat16)
    k = torch.zeros(b, h, t, d, device="cuda", dtype=torch.bfloat16)
    k[:, -1] = 1.0
    out = attention(q, k, k)
    assert torch.equal(out[:, -1], torch.ones_like(out[:, -1])) and not out[:, :-1].any()


@pytest.mark.gpu
def test_triton_serves_cuda_tensors_by_default() -> None:
    with use_backend("auto"):
        assert choose("attention", torch.empty(1, device="cuda", dtype=torch.bfloat16)) == "triton"
        assert choose("attention", torch.empty(1, device="cuda", dtype=torch.float64)) == "torch"


@pytest.mark.gpu
@pytest.mark.parametrize("d", [64, 128])
@pytest.mark.parametrize(("t_q", "t_k"), [(1, 1), (128, 128), (200, 1000), (1000, 200), (193, 129), (4096, 4096)])
@pytest.mark.parametrize("causal", [False, True, "bottom_right"])
def test_the_hopper_forward_computes_the_definition(
    monkeypatch, d: int, t_q: int, t_k: int, causal: bool | str
) -> None:
    """What no machine could show so far. A wrong barrier hangs: run it under a limit, `timeout 600 make test-gpu`."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs sm_90, an H100 or H200")
    draw = lambda h, t: torch.randn(2, t, h, d, device="cuda", dtype=torch.bfloat16).transpose(1, 2)  # noqa: E731
    q, k, v = draw(4, t_q), draw(2, t_k), draw(2, t_k)
    expected = reference.attention(q.double(), k.double(), v.double(), causal=causal, return_lse=True)
    portable = attention(q, k, v, causal=causal, return_lse=True)
    monkeypatch.setattr(launchers, "HOPPER", True)
    for _ in range(3):  # another order of the warps each time
        got = attention(q, k, v, causal=causal, return_lse=True)
        for x, y, truth in zip(got, portable, expected, strict=True):
            seen = truth.isfinite()
            assert torch.equal(x[~seen].double(), truth[~seen])
            worst = (x.double() - truth)[seen].abs().max() if seen.any() else 0.0
            assert worst <= 2 * (y.double() - truth)[seen].abs().max() + 1e-6 if seen.any() else True


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: this process interprets")
def test_interpreted_tests_pass_in_processes_without_the_gpu() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-m", "interprets and not slow", "-p", "no:cacheprovider"]
    if importlib.util.find_spec("xdist"):
        command += ["-n", str(min(len(os.sched_getaffinity(0)), 32)), "--dist", "worksteal"]
    root = pathlib.Path(__file__).parents[1]
    subprocess.run(command, check=True, cwd=root, env=dict(os.environ, CUDA_VISIBLE_DEVICES=""))


@pytest.mark.gpu
def test_specialisations_stay_few(gpu_specialisations: Callable[[], list[str]]) -> None:
    """A cold run of this suite compiles in some ten minutes: at most 120 kernels."""
    compiled = gpu_specialisations()
    assert len(compiled) <= 120, f"{len(compiled)} compiled: {compiled}"
