"""The self-test on a GPU's first use: it sees a wrong kernel, runs once, and never where it would do harm. No GPU is
needed to show it."""

import os
import pathlib
import subprocess
import sys
import types

import pytest
import torch
import triton

from tileformer import kernels
from tileformer.kernels import launch, selftest

CPU = torch.device("cpu")
GPU = types.SimpleNamespace(name="NVIDIA Test/1 80GB", major=9, minor=0)


@pytest.fixture
def runs(monkeypatch, tmp_path):
    """The self-tests that ran, on a machine that pretends to have a GPU; each finds `runs.wrong`."""

    class Runs(list):
        wrong: list[str] = []

    found = Runs()

    def failures(backend, device):
        found.append((backend, device, launch.selftest_due, torch.is_inference_mode_enabled(), torch.is_grad_enabled()))
        return found.wrong

    monkeypatch.setattr(selftest, "failures", failures)
    monkeypatch.setattr(launch, "selftest_due", True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: GPU)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path / "cache"))
    return found


@pytest.mark.interprets
def test_right_kernels_pass():
    state = torch.get_rng_state()
    assert selftest.failures("interpret", CPU) == []
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.interprets
@pytest.mark.parametrize("wrong", [lambda x: x * 1.2, lambda x: x * torch.nan], ids=["off", "NaN"])
def test_wrong_kernels_are_named(monkeypatch, wrong):
    right = kernels.softmax
    monkeypatch.setitem(selftest.OPS, "softmax", lambda x, **options: wrong(right(x, **options)))
    assert selftest.failures("interpret", CPU) == ["softmax: out", "softmax: dx"]


def test_it_runs_once_for_a_kind_of_gpu(runs, monkeypatch, tmp_path):
    with torch.inference_mode(), kernels.use_backend("torch"):
        selftest.run_once(CPU)
    assert runs == [
        ("triton", CPU, False, False, True)
    ]  # not asked for by its own launches; nothing of the caller's is in force
    assert not launch.selftest_due
    assert [file.name for file in (tmp_path / "cache").iterdir()] == [
        selftest.re.sub(r"\W+", "-", f"tileformer {selftest.tileformer.__version__}, triton {triton.__version__}, sm_90, {GPU.name}") + ".passed"
    ]  # fmt: skip
    launch.selftest_due = True  # as in the next process
    selftest.run_once(CPU)
    assert len(runs) == 1 and not launch.selftest_due
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: types.SimpleNamespace(name="another", major=8, minor=0)
    )
    launch.selftest_due = True
    selftest.run_once(CPU)
    assert len(runs) == 2


def test_wrong_kernels_raise_at_every_launch(runs):
    runs.wrong = ["attention: dk"]
    for _ in range(2):
        with pytest.raises(
            RuntimeError, match="attention: dk: wrong on tileformer .* sm_90, .*TILEFORMER_SELFTEST=0"
        ) as caught:
            selftest.run_once(CPU)
        assert "\n" not in str(caught.value) and launch.selftest_due
    assert len(runs) == 2


def test_a_cache_that_cannot_be_written_is_no_error(runs, monkeypatch):
    monkeypatch.setattr(triton.knobs.cache, "dir", "/proc/no/such/folder")
    selftest.run_once(CPU)
    assert len(runs) == 1 and not launch.selftest_due


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (torch.cuda, "is_current_stream_capturing"),
        (torch.cuda, "_is_in_bad_fork"),
        (torch.compiler, "is_compiling"),
    ],
)
def test_it_is_put_off_where_it_would_do_harm(runs, monkeypatch, owner, name):
    monkeypatch.setattr(owner, name, lambda: True)
    selftest.run_once(CPU)
    assert runs == [] and launch.selftest_due


def test_it_is_put_off_inside_a_backward(runs):
    x = torch.ones(1, requires_grad=True)
    x.register_hook(lambda gradient: selftest.run_once(CPU))
    (2 * x).backward()
    assert runs == [] and launch.selftest_due


def test_a_launch_on_a_gpu_asks_for_it_unless_it_is_turned_off(runs, monkeypatch):
    asked = []
    monkeypatch.setattr(launch, "selftest", asked.append)
    monkeypatch.setattr(torch.cuda, "device", lambda device: pytest.MonkeyPatch.context())
    gpu = types.SimpleNamespace(is_cuda=True, device="cuda:0")
    kernel = {(1,): lambda *arguments, **constexprs: None}
    for due in (True, False):
        monkeypatch.setattr(launch, "selftest_due", due)
        launch._run(kernel, (1,), gpu, (), {})
    assert asked == ["cuda:0"]
    code = "from tileformer.kernels import launch; print(launch.selftest_due)"
    env = {**os.environ, "TILEFORMER_SELFTEST": "0", "PYTHONPATH": str(pathlib.Path(__file__).parents[1] / "src")}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False"]


def test_the_first_use_may_be_in_inference_mode():
    code = """if True:
        import torch
        from concurrent.futures import ThreadPoolExecutor
        with torch.inference_mode():
            from tileformer.kernels import selftest
        op = "dropout"
        selftest.CALLS = {op: selftest.CALLS[op]}
        with ThreadPoolExecutor(1) as pool:
            print(pool.submit(selftest.failures, "interpret", torch.device("cpu")).result())
    """
    env = {**os.environ, "PYTHONPATH": str(pathlib.Path(__file__).parents[1] / "src")}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.gpu
def test_this_gpu_passes():
    assert selftest.failures("triton", torch.device("cuda")) == []
