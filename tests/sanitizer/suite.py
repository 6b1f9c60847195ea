"""Our ops as a GPU would run them: each launch is compiled to Triton's IR for sm_90 and executed by ttsem, which checks
every address.

Run by `make sanitize`. Sizes are ragged, so that a missing mask shows; two or more programs share each output, so that
a race shows.
"""

import pytest
import torch

from tileformer import kernels
from tileformer.bench.check.budget import assert_within_budget
from tileformer.kernels import reference

torch.use_deterministic_algorithms(True, warn_only=True)
torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]


def check(op: str, tensors: dict, options: dict, dtype: torch.dtype = torch.float32) -> None:
    """Forward and every gradient on "cuda", against the reference in float64."""

    def results(namespace, dtype: torch.dtype, device: str) -> list[torch.Tensor]:
        def place(x):
            if not isinstance(x, torch.Tensor):
                return x
            return x.to(dtype if x.is_floating_point() else x.dtype).to(device)

        leaves = [place(x.to(rounded)).requires_grad_() for x in tensors.values()]
        out = getattr(namespace, op)(
            **dict(zip(tensors, leaves, strict=True)), **{n: place(x) for n, x in options.items()}
        )
        torch.manual_seed(1)
        given = torch.randn(out.shape).to(rounded)
        return [out.detach().cpu(), *(g.cpu() for g in torch.autograd.grad(out, leaves, place(given)))]

    rounded = dtype
    truth, eager = results(reference, torch.float64, "cpu"), results(reference, dtype, "cpu")
    for name, got, e, t in zip(("out", *tensors), results(kernels, dtype, "cuda"), eager, truth, strict=True):
        assert_within_budget(name, got, e, t, 4 * float(t.abs().max()) + 1.0)


def qkv(b: int, h: int, h_kv: int, t_q: int, t_k: int, d: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {"q": torch.randn(b, h, t_q, d), "k": torch.randn(b, h_kv, t_k, d), "v": torch.randn(b, h_kv, t_k, d)}


PADDING = torch.arange(90) < torch.tensor([[90], [51]])
ATTENTION = {
    "plain": ((1, 2, 2, 130, 90, 20), {}),
    "causal, shared key heads": ((2, 2, 1, 90, 90, 16), dict(causal=True)),
    "padding": ((2, 1, 1, 40, 90, 16), dict(key_mask=PADDING)),
    "boolean mask, bottom right": ((1, 2, 2, 40, 90, 16), dict(mask=torch.rand(40, 90) > 0.3, causal="bottom_right")),
    "additive mask": ((1, 2, 2, 40, 90, 16), dict(mask=torch.randn(2, 1, 90))),
    "dropout": ((1, 2, 2, 40, 90, 16), dict(dropout_p=0.3, seed=torch.tensor([5]))),
}


@pytest.mark.parametrize("name", ATTENTION)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_attention(name: str, dtype: torch.dtype) -> None:
    shape, options = ATTENTION[name]
    check("attention", qkv(*shape), options, dtype)


ROWS = {
    "layer_norm": (
        dict(x=torch.randn(37, 50), weight=torch.randn(50), bias=torch.randn(50)),
        dict(normalized_shape=(50,)),
    ),
    "softmax": (dict(x=torch.randn(2, 3, 37, 50)), dict(mask=torch.rand(37, 50) > 0.3, causal=True)),
    "cross_entropy": (
        dict(logits=torch.randn(37, 50)),
        dict(target=torch.arange(37), weight=torch.rand(50), label_smoothing=0.1),
    ),
    "dropout": (dict(x=torch.randn(37, 50), residual=torch.randn(37, 50)), dict(p=0.3, seed=torch.tensor([5]))),
}
LONG = {
    "layer_norm": (dict(x=torch.randn(3, 17000), weight=torch.randn(17000)), dict(normalized_shape=(17000,))),
    "softmax": (dict(x=torch.randn(3, 33000)), {}),
    "cross_entropy": (dict(logits=torch.randn(3, 9000)), dict(target=torch.arange(3))),
    "dropout": (dict(x=torch.randn(3, 2100)), dict(p=0.3, seed=torch.tensor([5]))),
}


@pytest.mark.parametrize("op", ROWS)
def test_rows(op: str) -> None:
    check(op, *ROWS[op])


@pytest.mark.parametrize("op", LONG)
def test_rows_longer_than_a_tile(op: str) -> None:
    check(op, *LONG[op])
