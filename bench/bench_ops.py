"""Forward and backward of each op and of a decoder layer: ours (the backend `auto` picks) beside torch's own.

On a GPU every round is synchronised. Result columns: time, and in the JSON's extra_info the FLOPs or bytes an ideal implementation needs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tileformer import kernels
from tileformer.bench.cases import DTYPES
from tileformer.decoder import TransformerDecoderLayer

Call = Callable[..., Tensor]


@pytest.fixture
def device(request: pytest.FixtureRequest) -> torch.device:
    """Where to run."""
    return torch.device(request.config.getoption("--bench-device"))


@pytest.fixture
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    """What to run in."""
    return DTYPES[request.config.getoption("--bench-dtype")]


def _measure(benchmark: Any, mode: str, call: Call, inputs: list[Tensor], device: torch.device, **ideal: float) -> None:
    """Time `call` on leaves made of `inputs`: forward alone, or forward and backward."""
    leaves = [x.detach().requires_grad_(mode == "both" and x.is_floating_point()) for x in inputs]
    gradient = torch.randn_like(call(*leaves))
    wanted = [x for x in leaves if x.requires_grad]

    def run() -> None:
        out = call(*leaves)
        if wanted:
            torch.autograd.grad(out, wanted, gradient)
        if device.type == "cuda":
            torch.cuda.synchronize()

    benchmark.extra_info.update(ideal, device=torch.cuda.get_device_name() if device.type == "cuda" else "cpu")
    benchmark.pedantic(run, rounds=30 if device.type == "cuda" else 5, warmup_rounds=3 if device.type == "cuda" else 1)


modes = pytest.mark.parametrize("mode", ["forward", "both"])


@modes
@pytest.mark.parametrize("case", ["plain", "causal", "padded", "masked", "dropout"])
@pytest.mark.parametrize("provider", ["tileformer", "sdpa"])
@pytest.mark.benchmark(group="attention")
def test_attention(
    benchmark: Any, device: torch.device, dtype: torch.dtype, provider: str, case: str, mode: str
) -> None:
    b, h, t, d = (8, 16, 2048, 64) if device.type == "cuda" else (2, 4, 256, 64)
    q, k, v = (torch.randn(b, h, t, d, device=device, dtype=dtype) for _ in range(3))
    key_mask = torch.arange(t, device=device) < torch.linspace(t // 4, t, b, device=device)[:, None]
    mask = (torch.rand(t, t, device=device) > 0.2) if case == "masked" else None
    p = 0.1 if case == "dropout" else 0.0
    if provider == "tileformer":
        options: dict[str, Any] = dict(
            mask=mask, causal=case == "causal", key_mask=key_mask if case == "padded" else None, dropout_p=p
        )
        call: Call = functools.partial(kernels.attention, **options)
    else:
        dense = key_mask[:, None, None, :] if case == "padded" else mask
        call = functools.partial(
            F.scaled_dot_product_attention, attn_mask=dense, is_causal=case == "causal", dropout_p=p
        )
    flops = 4 * b * h * t * t * d * (3.5 if mode == "both" else 1) / (2 if case == "causal" else 1)
    _measure(benchmark, mode, call, [q, k, v], device, flops=flops)


@modes
@pytest.mark.parametrize("width", [512, 1024, 4096])
@pytest.mark.parametrize("provider", ["tileformer", "torch"])
@pytest.mark.benchmark(group="layer_norm")
def test_layer_norm(
    benchmark: Any, device: torch.device, dtype: torch.dtype, provider: str, width: int, mode: str
) -> None:
    rows = 16384 if device.type == "cuda" else 1024
    x, weight, bias = torch.randn(rows, width), torch.randn(width), torch.randn(width)
    namespace: Any = kernels if provider == "tileformer" else F
    call = lambda x, w, b: namespace.layer_norm(x, (width,), w, b)  # noqa: E731
    inputs = [t.to(device, dtype) for t in (x, weight, bias)]
    _measure(
        benchmark,
        mode,
        call,
        inputs,
        device,
        bytes=rows * width * inputs[0].element_size() * (5 if mode == "both" else 2),
    )


@modes
@pytest.mark.parametrize("width", [1024, 4096, 32768])
@pytest.mark.parametrize("provider", ["tileformer", "torch"])
@pytest.mark.benchmark(group="softmax")
def test_softmax(
    benchmark: Any, device: torch.device, dtype: torch.dtype, provider: str, width: int, mode: str
) -> None:
    rows = 8192 if device.type == "cuda" else 128
    x = torch.randn(rows, width, device=device, dtype=dtype)
    call: Call = kernels.softmax if provider == "tileformer" else lambda x: torch.softmax(x, -1)
    _measure(benchmark, mode, call, [x], device, bytes=rows * width * x.element_size() * (5 if mode == "both" else 2))


@modes
@pytest.mark.parametrize("provider", ["tileformer", "torch.nn"])
@pytest.mark.benchmark(group="decoder_layer")
def test_decoder_layer(benchmark: Any, device: torch.device, dtype: torch.dtype, provider: str, mode: str) -> None:
    b, t, t_k, width = (8, 1024, 1024, 1024) if device.type == "cuda" else (2, 64, 64, 256)
    torch.manual_seed(0)
    layer = (TransformerDecoderLayer if provider == "tileformer" else nn.TransformerDecoderLayer)(
        width, width // 64, 4 * width, batch_first=True, norm_first=True, device=device, dtype=dtype
    )
    causal = torch.ones(t, t, dtype=torch.bool, device=device).triu(1)
    padding = torch.arange(t_k, device=device) >= torch.linspace(t_k // 4, t_k, b, device=device)[:, None]
    call = lambda x, memory: layer(x, memory, tgt_mask=causal, tgt_is_causal=True, memory_key_padding_mask=padding)  # noqa: E731
    inputs = [torch.randn(b, n, width, device=device, dtype=dtype) for n in (t, t_k)]
    _measure(benchmark, mode, call, inputs, device)
