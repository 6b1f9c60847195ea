"""The per-call interpreter: what it repairs, and that it leaves Triton as it found it."""

import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter as stock
from triton.runtime.jit import JITFunction

from tileformer.kernels import interpreter

pytestmark = [pytest.mark.compat, pytest.mark.interprets]


@triton.jit
def _combine(x):
    return x * 2 - 1


@triton.jit
def _probe_kernel(x_ptr, y_ptr, out_ptr, cast_ptr, dot_ptr, N: tl.constexpr, PRECISION: tl.constexpr):
    rows = tl.arange(0, N)
    at = rows[:, None] * N + rows[None, :]
    # [N, N]
    x = tl.load(x_ptr + at)
    # [N, N]
    y = tl.load(y_ptr + at)
    tl.store(out_ptr + at, _combine(x + y))
    tl.store(cast_ptr + at, (x.to(tl.float32) * 1.001).to(tl.bfloat16))
    # [N, N]
    tl.store(dot_ptr + at, tl.dot(x, y, input_precision=PRECISION))


def _probe(dtype: torch.dtype, precision: str = "ieee") -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    x, y = torch.randn(16, 16).to(dtype), torch.randn(16, 16).to(dtype)
    out, cast, dot = torch.empty(16, 16, dtype=dtype), torch.empty(16, 16, dtype=torch.bfloat16), torch.empty(16, 16)
    interpreter.run(_probe_kernel, (1,), (x, y, out, cast, dot), dict(N=16, PRECISION=precision))
    return x, y, out, cast, dot


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_arithmetic_casts_and_dots_are_those_of_the_dtype(dtype: torch.dtype) -> None:
    x, y, out, cast, dot = _probe(dtype)
    expected = (x + y) * 2 - 1  # torch rounds after each operator too
    assert torch.equal(out, expected)
    assert torch.equal(cast, (x.float() * 1.001).to(torch.bfloat16)), "rounded to nearest even, not truncated"
    torch.testing.assert_close(dot, x.float() @ y.float())


def test_tf32_dots_lose_the_bits_a_tensor_core_drops() -> None:
    x, y, *_, dot = _probe(torch.float32, "tf32")
    error = (dot - x.double() @ y.double()).abs().max().item()
    assert 1e-5 < error < 1e-2


def test_rounding_to_bfloat16_is_torchs() -> None:
    special = torch.tensor(
        [float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 3.4e38, 1e-40, 1.00390625, 1.01171875]
    )
    values = torch.cat([special, torch.randn(1000) * 10.0 ** torch.randint(-30, 30, (1000,))])
    bits = interpreter._to_bf16_bits(values.numpy()).view(np.int16)
    got, expected = torch.from_numpy(bits.copy()).view(torch.bfloat16), values.to(torch.bfloat16)
    assert torch.equal(got.isnan(), expected.isnan()) and torch.equal(got[~got.isnan()], expected[~got.isnan()])


def test_everything_is_put_back() -> None:
    before = [dict(vars(owner)) for owner in interpreter._PATCHED]
    call, options, dot = JITFunction.__call__, stock.interpreter_builder.options, stock.InterpreterBuilder.create_dot
    _probe(torch.bfloat16)
    with pytest.raises(Exception, match="N"):
        interpreter.run(_probe_kernel, (1,), (), {})
    assert [dict(vars(owner)) for owner in interpreter._PATCHED] == before
    assert (JITFunction.__call__, stock.interpreter_builder.options, stock.InterpreterBuilder.create_dot) == (
        call,
        options,
        dot,
    )


def test_a_process_can_compile_after_it_interpreted() -> None:
    script = """
        import torch
        from tileformer.bench.recording import record
        from tileformer.kernels import attention, use_backend
        q = torch.randn(1, 1, 32, 16)
        with use_backend("interpret"):
            first = attention(q, q, q)
        with record(90) as launches, use_backend("triton"):
            attention(q, q, q)
        with use_backend("interpret"):
            assert torch.equal(first, attention(q, q, q))
        with record(90) as again, use_backend("triton"):  # compiled already: recorded all the same
            attention(q, q, q)
        for recorded in (launches, again):
            assert [launch.binary.name for launch in recorded] == ["_attention_fwd_kernel"]
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True, env=interpreter_environment())


def interpreter_environment() -> dict[str, str]:
    """This process's environment, with this checkout importable."""
    import os
    import pathlib

    source = str(pathlib.Path(__file__).parents[1] / "src")
    return dict(os.environ, PYTHONPATH=os.pathsep.join(filter(None, [source, os.environ.get("PYTHONPATH")])))
