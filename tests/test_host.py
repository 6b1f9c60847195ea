"""The short ways to a launch: the same launches as Triton's own, for tensors at any place; nothing that torch wants to
see is hidden from it.

Triton is patched here, so each check runs this file in a process of its own.
"""

import itertools
import os
import subprocess
import sys
import types
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import triton.compiler
from torch.autograd import forward_ad
from torch.overrides import BaseTorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from triton.compiler import CompiledKernel

from tileformer.bench.recording import record
from tileformer.bench.speed.host import compilations
from tileformer.kernels import (
    attention,
    autograd,
    bias_activation_dropout,
    cross_entropy,
    dropout,
    launch,
    layer_norm,
    softmax,
    use_backend,
)

LAUNCHES: list[tuple[Any, ...]] = []


def _described(x: Any) -> Any:
    """An argument, or a tuple of them, with what a tensor is in its place."""
    if isinstance(x, tuple):
        return [_described(y) for y in x]
    return (x.dtype, x.shape, x.stride()) if isinstance(x, torch.Tensor) else x


class _Compiled(CompiledKernel):
    """Stands for one compilation, and records its launches."""

    def __init__(self, source: Any, **_: Any) -> None:
        self.src, self.function, self.packed_metadata, self._run = source, object(), None, self._record
        self.metadata = None  # a kernel that wants no memory of its own

    def _record(
        self, x: int, y: int, z: int, stream: int, function: Any, packed: Any, metadata: Any, *rest: Any
    ) -> None:
        LAUNCHES.append((id(self), (x, y, z), _described(rest[2:])))

    def launch_metadata(self, *_: Any) -> None:
        return None

    __del__ = lambda self: None  # noqa: E731  # Triton 3.9 unloads


def _placed(*shape: int, dtype: torch.dtype, skip: int = 0, gap: int = 0) -> torch.Tensor:
    """Ones whose data start `skip` elements past an aligned address, with `gap` elements between rows."""
    row = shape[-1] + gap
    flat = torch.ones(skip + row * (torch.Size(shape).numel() // max(shape[-1], 1)) + 16, dtype=dtype)
    return flat[skip : skip + flat.numel() - skip - 16].view(*shape[:-1], row)[..., : shape[-1]]


def _calls() -> list[Any]:
    """Calls that differ in what Triton specialises on: dtypes, alignment, strides and sizes of 1, 16 and others,
    features, widths."""
    calls: list[Any] = []
    dtypes = (torch.bfloat16, torch.float32)
    for n, r, dtype, (skip, gap) in itertools.product((1, 16, 65, 20000), (1, 3), dtypes, ((0, 0), (1, 0), (0, 8))):
        x = _placed(r, n, dtype=dtype, skip=skip, gap=gap).requires_grad_()
        weight = _placed(n, dtype=torch.float32, skip=1 - skip).requires_grad_()
        calls.append(lambda x=x, w=weight, n=n: layer_norm(x, (n,), w, None))
        calls.append(lambda x=x, n=n: softmax(x, scale=0.5, causal=n > 1))
        mask = _placed(1, n, dtype=torch.float32, skip=skip)
        calls.append(lambda x=x, mask=mask: softmax(x, mask=mask))
        target = torch.zeros(r, dtype=torch.int64)
        calls.append(lambda x=x, t=target, n=n: cross_entropy(x, t, label_smoothing=0.1 * (n == 16), reduction="sum"))
        calls.append(lambda x=x, w=weight, t=target: cross_entropy(x, t, weight=w.detach()))
        calls.append(lambda x=x, w=weight: bias_activation_dropout(x, "gelu", bias=w, up=x, p=0.5))
        calls.append(lambda x=x, dtype=dtype: dropout(x, 0.5, residual=x.detach().to(torch.float32)))
    x = torch.ones(4, 16, dtype=torch.bfloat16)
    for dtype in dtypes:  # one shape, all aligned: only the weight's dtype tells two calls apart
        weight = torch.ones(16, dtype=dtype, requires_grad=True)
        calls.append(lambda w=weight: layer_norm(x, (16,), w))
    for t_q, t_k, skip in itertools.product((1, 5), (1, 16, 33), (0, 1)):
        q, k = (_placed(2, 2, t, 16, dtype=torch.bfloat16, skip=skip).requires_grad_() for t in (t_q, t_k))
        calls.append(lambda q=q, k=k: attention(q, k, k, causal="bottom_right"))
    return calls


def _same_launches(calls: list[Any]) -> list[str]:
    """Where the launches of a second round, forward and backward, differ from Triton's own."""
    found = []

    def launches_of(call: Any) -> list[tuple[Any, ...]]:
        LAUNCHES.clear()
        out = call()
        out.backward(torch.ones_like(out))
        return list(LAUNCHES)

    with mock.patch.object(triton.compiler, "compile", _Compiled), record(90), use_backend("triton"):
        for call in calls:
            launches_of(call)
        for place, call in enumerate(calls):
            short = launches_of(call)
            with mock.patch.object(launch, "has_launch_hooks", lambda kernel: True):
                long = launches_of(call)
            if short != long or not long:
                found.append(f"call {place}: {short} instead of {long}")
    return found


def check_launches() -> None:
    calls = _calls()
    assert _same_launches(calls) == []
    assert launch.cached_kernels, "the short way was never taken"
    asked = mock.Mock(side_effect=AssertionError("Triton was asked"))
    with record(90), use_backend("triton"), mock.patch.object(launch, "_run", asked):
        for call in calls:  # none of them is a first of its kind
            call()


def check_that_nothing_is_launched_for_nothing_and_that_old_kinds_make_room() -> None:
    with mock.patch.object(triton.compiler, "compile", _Compiled), record(90), use_backend("triton"):
        softmax(torch.ones(16, 16))  # of a kind with the next: to Triton 16 and 0 rows are alike
        LAUNCHES.clear()
        for _ in range(3):
            softmax(torch.ones(0, 16)), softmax(torch.ones(2, 0, 16))
        assert LAUNCHES == []
        with mock.patch.object(launch, "MAX_CACHED", 3):
            for n in 2 ** torch.arange(1, 9):
                softmax(torch.ones(2, n))
                assert LAUNCHES and 1 <= len(launch.cached_kernels) <= 3
                LAUNCHES.clear()


def check_that_the_comparison_sees_a_key_that_is_too_coarse() -> None:
    with mock.patch.object(launch, "_specialize", lambda *_: ()):
        assert _same_launches(_calls()[:60])


def checkhas_launch_hooks() -> None:
    """A setting that asks for another binary, and a listener, get what they ask for: a launch by Triton itself."""
    from triton import knobs

    x = torch.ones(4, 16)
    with mock.patch.object(triton.compiler, "compile", _Compiled), record(90), use_backend("triton"):
        run = mock.Mock(wraps=launch._run)
        with mock.patch.object(launch, "_run", run):
            softmax(x), softmax(x)
            assert run.call_count == 1
            heard = mock.Mock()
            knobs.runtime.launch_enter_hook.add(heard)
            softmax(x)
            knobs.runtime.launch_enter_hook.remove(heard)
            assert run.call_count == 2
            for where, name, value in (
                (knobs.runtime, "debug", True),
                (knobs.compilation, "instrumentation_mode", "x"),
            ):
                calls = run.call_count
                with mock.patch.object(where, name, value):
                    softmax(x)
                assert run.call_count == calls + 1, name
            softmax(x)
            assert run.call_count == 4


def check_compilations() -> None:
    counted = compilations(90, 5)
    assert counted["_attention_fwd_kernel"] and counted["_layer_norm_bwd_kernel"] and counted["_dropout_fwd_kernel"]
    assert sum(counted.values()) <= 19, counted


@pytest.mark.compat
@pytest.mark.parametrize("check", [name for name in list(globals()) if name.startswith("check_")])
def test_in_its_own_process(check: str) -> None:
    paths = os.pathsep.join(
        [os.path.join(os.path.dirname(__file__), "..", "src"), *filter(None, [os.environ.get("PYTHONPATH")])]
    )
    command = [sys.executable, __file__, check]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        env=dict(os.environ, PYTHONPATH=paths, OMP_NUM_THREADS="1"),
        check=False,
    )
    if "ModuleNotFoundError" in done.stderr:
        pytest.skip(done.stderr.splitlines()[-1])
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.interprets
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # torch's own forward mode
def test_lazy_and_wrapped_tensors_are_not_taken_for_plain_ones() -> None:
    x = torch.randn(3, 4)
    negated = torch.complex(torch.zeros(3, 4), x).conj().imag
    assert negated.is_neg()
    leaked = []

    def leak(x: torch.Tensor) -> torch.Tensor:
        leaked.append(x)
        return x.sum()

    torch.func.grad(leak)(x)
    with use_backend("interpret"):
        torch.testing.assert_close(softmax(negated), torch.softmax(-x, -1))
        torch.testing.assert_close(softmax(leaked[0]), torch.softmax(x, -1))
        torch.testing.assert_close(softmax(torch._efficientzerotensor(3, 4)), torch.full((3, 4), 0.25))
        with pytest.raises(NotImplementedError, match="jvp|forward"), forward_ad.dual_level():
            softmax(forward_ad.make_dual(x, x))  # and not a tensor without its tangent


@pytest.mark.interprets
def test_a_profiler_and_modes_see_the_ops() -> None:
    x = torch.randn(3, 4, requires_grad=True)
    with use_backend("interpret"), torch.profiler.profile(acc_events=True) as profile:
        softmax(x).sum().backward()
    names = {event.key for event in profile.key_averages()}
    assert {"tileformer::softmax_fwd", "tileformer::softmax_bwd"} <= names


def _way(module: types.ModuleType, x: torch.Tensor) -> str:
    """Which way a call of a KernelFunction goes."""
    long = types.SimpleNamespace(__name__="softmax", apply=lambda *_: "long")
    with mock.patch.object(module.registered["softmax_fwd"], "launcher", lambda *_: "short"):
        return module.KernelFunction(types.SimpleNamespace(__name__="softmax_fwd"), long)(x)


QUESTIONS: dict[str, tuple[Any, Any]] = {
    "in_forward_mode": (forward_ad.dual_level, autograd.in_forward_mode),
    "listens_to_functions": (BaseTorchFunctionMode, lambda: autograd.listens_to_functions((torch.ones(1),))),
    "listens_to_ops": (TorchDispatchMode, autograd.listens_to_ops),
    "profiles": (lambda: torch.profiler.profile(acc_events=True), autograd.profiles),
}


@pytest.mark.parametrize("name", QUESTIONS)
def test_a_question_is_answered_where_it_holds_and_only_there(name: str) -> None:
    listening, question = QUESTIONS[name]
    x = torch.ones(3)
    assert not question() and _way(autograd, x) == "short"
    with listening():
        assert question()
        if name != "in_forward_mode":
            assert _way(autograd, x) == "long"
    assert not question() and _way(autograd, x) == "short"


def test_this_torch_answers_every_question() -> None:
    assert autograd.missing == [], "the short way is off: this torch has other names"


@pytest.mark.parametrize(
    "path",
    ["_C._has_torch_function", "_C._dispatch_keys", "_C._dispatch_tls_local_include_set", "_C.DispatchKeySet"]
    + ["_C._autograd._profiler_enabled", "autograd.forward_ad._current_level"],
)
def test_a_torch_that_lacks_a_name_gets_the_long_way(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(f"torch.{path}")
    module: Any = types.ModuleType("autograd_without")
    module.registered = autograd.registered
    exec(compile(Path(str(autograd.__file__)).read_text(), str(autograd.__file__), "exec"), vars(module))
    assert module.missing == [path] and _way(module, torch.ones(3)) == "long"


class _Named(torch.Tensor):
    pass


@pytest.mark.interprets
def test_a_subclass_stays_one() -> None:
    x = torch.randn(3, 4)
    with use_backend("interpret"):
        assert type(softmax(x.as_subclass(_Named))) is _Named
        assert type(softmax(torch.nn.Parameter(x))) is torch.Tensor


@pytest.mark.interprets
def test_batched_gradients() -> None:
    x = torch.randn(3, 4, requires_grad=True)
    directions = torch.randn(2, 3, 4)
    with use_backend("interpret"):
        (batched,) = torch.autograd.grad(softmax(x), x, directions, is_grads_batched=True)
    (expected,) = torch.autograd.grad(torch.softmax(x, -1), x, directions, is_grads_batched=True)
    torch.testing.assert_close(batched, expected)


if __name__ == "__main__":
    globals()[sys.argv[1]]()
