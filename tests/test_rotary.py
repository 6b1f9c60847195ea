"""rotary: both layouts, partial and strided, by error budget; its tables against transformers'; its interface.

What every op owes PyTorch (opcheck, transforms, second derivatives, compile, export) is in test_autograd.py.
"""

import math

import pytest
import torch

from tileformer.bench.check.budget import assert_within_budget, rms_ratio
from tileformer.kernels import reference, rotary, rotary_tables, use_backend

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = {  # of x, and how many elements are rotated
    "one pair": ((2, 3, 5, 2), 2),
    "part of an odd head": ((2, 3, 7, 65), 24),
    "the usual head": ((1, 2, 70, 64), 64),
    "half of a head of 80": ((3, 1, 5, 80), 40),
    "a wide head": ((1, 2, 3, 1000), 1000),
    "one token": ((1, 3, 1, 16), 16),
    "no token": ((2, 3, 0, 16), 16),
}
LAYOUTS = {
    "B, H, T, D": lambda x: x,
    "B, T, H, D": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "a slice of q, k and v": lambda x: (
        torch.cat([x, x + 1, x - 1], 1).transpose(1, 2).contiguous().transpose(1, 2)[:, : x.shape[1]]
    ),
    "D is not contiguous": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
}


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def tables(shape, rotated, own=False, dtype=torch.float64):
    angle = 3 * draw(*([shape[0]] if own else []), shape[2], rotated // 2, seed=7)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def results(op, x, dy, cos, sin, interleaved):
    x = x.detach().requires_grad_()
    y = op(x, cos, sin, interleaved=interleaved)
    return y.detach(), torch.autograd.grad(y, x, dy.to(y))[0]


def assert_matches_reference(shape, rotated, dtype, device, interleaved, own=False, layout=LAYOUTS["B, H, T, D"]):
    x, dy = (layout(draw(*shape, seed=n)).to(dtype) for n in (0, 1))
    cos, sin = tables(shape, rotated, own, torch.float32)
    truth = results(reference.rotary, x.double(), dy.double(), cos.double(), sin.double(), interleaved)
    eager = results(reference.rotary, x, dy, cos, sin, interleaved)
    got = results(rotary, x.to(device), dy.to(device), cos.to(device), sin.to(device), interleaved)
    for name, g, e, t, of in zip(("y", "dx"), got, eager, truth, (x, dy), strict=True):
        assert g.dtype == dtype
        assert_within_budget(name, g, e, t, 1.5 * float(of.abs().max()) if of.numel() else 0.0)


@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape, rotated", SHAPES.values(), ids=SHAPES)
def test_matches_the_reference(shape, rotated, dtype, interleaved, device):
    assert_matches_reference(shape, rotated, dtype, device, interleaved, own=shape[0] > 1)


@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_layouts(layout, interleaved, device):
    assert_matches_reference((2, 3, 5, 24), 16, torch.float32, device, interleaved, True, layout)


def test_the_order_of_axes_in_memory_stays(device, backend):
    for layout, strides in zip(
        LAYOUTS.values(), ((120, 40, 8, 1), (120, 8, 24, 1), (120, 8, 24, 1), (120, 40, 8, 1)), strict=True
    ):
        x = layout(draw(2, 3, 5, 8).float()).to(device)
        assert rotary(x, *(t.to(device) for t in tables(x.shape, 8))).stride() == strides


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["interpret", "torch"])
def test_the_sum_of_two_products_is_rounded_once(dtype, name):
    x, dy = draw(2, 3, 70, 64).to(dtype), draw(2, 3, 70, 64, seed=1).to(dtype)
    cos, sin = tables(x.shape, 64, dtype=torch.float32)
    with use_backend(name):
        got = results(rotary, x, dy, cos, sin, False)
    eager = results(reference.rotary, x, dy, cos, sin, False)
    truth = results(reference.rotary, x.double(), dy.double(), cos.double(), sin.double(), False)
    assert all(rms_ratio(*each) <= 1.01 for each in zip(got, eager, truth, strict=True))


@pytest.mark.parametrize("interleaved", [False, True])
def test_the_torch_backend(interleaved):
    with use_backend("torch"):
        assert_matches_reference((2, 3, 7, 20), 12, torch.float32, "cpu", interleaved, own=True)


@pytest.mark.parametrize("name", ["interpret", "torch", "reference"])
def test_scores_depend_on_the_distance_alone(name):
    q, k = draw(1, 1, 1, 16).expand(1, 1, 9, 16), draw(1, 1, 1, 16, seed=1).expand(1, 1, 9, 16)
    for interleaved in (False, True):
        with use_backend(name):
            q_, k_ = (rotary(x, *rotary_tables(16, torch.arange(9)), interleaved=interleaved) for x in (q, k))
        scores = (q_ @ k_.transpose(-1, -2))[0, 0]
        for distance in range(-8, 9):
            line = scores.diagonal(distance)
            torch.testing.assert_close(line, line[:1].expand_as(line), rtol=1e-5, atol=1e-5)
        assert (scores[0, 1:] - scores[1:, 0]).abs().max() > 1e-3, "and on its sign"


def test_halves_are_what_transformers_models_compute():
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    gptj = pytest.importorskip("transformers.models.gptj.modeling_gptj")
    x, (cos, sin) = draw(2, 3, 5, 16), tables((2, 3, 5, 16), 16, own=True)
    expected, _ = llama.apply_rotary_pos_emb(x, x, torch.cat([cos, cos], -1), torch.cat([sin, sin], -1))
    torch.testing.assert_close(rotary(x, cos, sin), expected)
    expected = gptj.apply_rotary_pos_emb(x.transpose(1, 2), sin, cos).transpose(1, 2)
    torch.testing.assert_close(rotary(x, cos, sin, interleaved=True), expected)


OLD = dict(original_max_position_embeddings=256)
SCALINGS = {
    "default": None,
    "llama3": dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, **OLD),
    "yarn": dict(rope_type="yarn", factor=4.0, **OLD),
    "yarn, its own factor": dict(
        rope_type="yarn", factor=40.0, attention_factor=0.7, beta_fast=20.0, beta_slow=2.0, **OLD
    ),
    "yarn, not truncated": dict(rope_type="yarn", factor=32.0, truncate=False, **OLD),
    "yarn, never beyond": dict(rope_type="yarn", factor=1.0, **OLD),
}


@pytest.mark.parametrize("base", [1e4, 5e5])
@pytest.mark.parametrize("scaling", SCALINGS.values(), ids=SCALINGS)
def test_tables_are_those_of_transformers(scaling, base):
    transformers = pytest.importorskip("transformers", reason="the hf extra is not installed")
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    config = transformers.LlamaConfig(
        hidden_size=128, num_attention_heads=2, max_position_embeddings=1024,
        rope_parameters={"rope_theta": base, **(scaling or {"rope_type": "default"})},
    )  # fmt: skip
    positions = torch.arange(0, 1024, 31)[None]
    expected = llama.LlamaRotaryEmbedding(config)(torch.zeros(1), positions)
    for ours, theirs in zip(rotary_tables(64, positions, base, scaling), expected, strict=True):
        assert ours.dtype == torch.float32 and torch.equal(theirs[..., :32], theirs[..., 32:])
        # Their angles are rounded to float32: up to 1024 radians, and a frequency is off by two roundings.
        torch.testing.assert_close(ours, theirs[..., :32], rtol=0, atol=4 * 1024 * 2**-24)


def test_a_yarn_table_by_hand():
    cos, _ = rotary_tables(4, torch.tensor([100.0]), 10000.0, dict(rope_type="yarn", factor=4.0, **OLD))
    # The first pair turns 256 / (2 pi) = 40.7 times in 256 tokens, more than 32: kept. The second 0.4 times: divided.
    expected = torch.tensor([[math.cos(100.0), math.cos(100.0 / 100 / 4)]]) * (0.1 * math.log(4) + 1)
    torch.testing.assert_close(cos, expected)


X = torch.ones(2, 3, 5, 8)
COS = torch.ones(5, 4)
BAD = {
    "three axes": (ValueError, r"for x \(B, H, T, D\) of \(2, 3, 8\)", {"x": X[:, :, 0]}),
    "whole tables": (ValueError, r"cos has shape \(5, 8\)", {"cos": torch.ones(5, 8), "sin": torch.ones(5, 8)}),
    "no pair": (ValueError, r"cos has shape \(5, 0\)", {"cos": COS[:, :0], "sin": COS[:, :0]}),
    "tokens": (ValueError, r"cos has shape \(4, 4\)", {"cos": COS[:4], "sin": COS[:4]}),
    "batch": (ValueError, r"cos has shape \(3, 5, 4\)", {"cos": COS.expand(3, 5, 4), "sin": COS.expand(3, 5, 4)}),
    "sin": (ValueError, r"sin has shape \(5, 3\), expected \(5, 4\)", {"sin": COS[:, :3]}),
    "device": (ValueError, "cos is on meta", {"cos": COS.to("meta")}),
    "integers": (TypeError, "x must be floating, got int64", {"x": X.long()}),
    "integer tables": (TypeError, "sin must be floating, got int64", {"sin": COS.long()}),
    "a gradient": (
        NotImplementedError,
        r"sin requires a gradient, and gets none: pass sin.detach\(\)",
        {"sin": COS.clone().requires_grad_()},
    ),
}


@pytest.mark.parametrize("error, message, change", BAD.values(), ids=BAD)
def test_refuses(error, message, change):
    with pytest.raises(error, match=message):
        rotary(**({"x": X, "cos": COS, "sin": COS} | change))


@pytest.mark.parametrize(
    "message, change",
    [
        ("even and positive, got 3", dict(dim=3)),
        ("one of llama3, yarn, got 'longrope'", dict(scaling=dict(rope_type="longrope"))),
        ("llama3 takes factor, low_freq_factor", dict(scaling=dict(rope_type="llama3", factor=8.0))),
        (
            "got factor, mscale, original_max_position_embeddings",
            dict(scaling=dict(rope_type="yarn", factor=8.0, mscale=1.0, **OLD)),
        ),
    ],
)
def test_tables_refuse(message, change):
    with pytest.raises(ValueError, match=message):
        rotary_tables(**(dict(dim=4, positions=torch.arange(3)) | change))
