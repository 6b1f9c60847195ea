"""docs/semantics.md, row by row: what each mask means, on every backend, and what torch makes of it where the page says
so."""

import contextlib
import importlib
import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tileformer.decoder import MultiheadAttention
from tileformer.kernels import attention, scaled_dot_product_attention, softmax, use_backend

pytestmark = pytest.mark.interprets

PAGE = Path(__file__).parent.parent / "docs" / "semantics.md"
NAN, INF = math.nan, math.inf


def _qkv(t_q: int = 5, t_k: int = 7, h_kv: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 2, t_q, 8), torch.randn(2, h_kv, t_k, 8), torch.randn(2, h_kv, t_k, 8)
    return q, k, v


@pytest.fixture(params=["interpret", "torch", "torch, fused", "reference"], autouse=True)
def _each_backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch):
    backend, _, fused = request.param.partition(", ")
    if fused:  # torch's fused attention, at any length
        plain = importlib.import_module("tileformer.kernels.attention.torch_backend")
        monkeypatch.setattr(plain, "FUSED_FROM", 1)
        monkeypatch.setattr(plain, "FUSED_GRADIENTS_FROM", 1)
    with use_backend(backend):
        yield


def _close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def _dense(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, bias: Tensor | float = 0.0) -> Tensor:
    scores = (q @ k.mT / q.shape[-1] ** 0.5 + bias).masked_fill(~seen, -INF)
    return torch.softmax(scores, -1).nan_to_num(0.0) @ v


ROWS, COLS = torch.arange(5)[:, None], torch.arange(7)


def sign() -> None:
    q, k, v = _qkv()
    mask = (COLS < 4).expand(5, 7)
    _close(attention(q, k, v, mask=mask), F.scaled_dot_product_attention(q, k, v, attn_mask=mask))
    _close(attention(q, k, v, mask=mask), attention(q, k[:, :, :4], v[:, :, :4]))
    layer = MultiheadAttention(8, 1, batch_first=True).eval()
    _close(layer(q[0], k[0], v[0], key_padding_mask=~mask[:2])[0], layer(q[0], k[0, :, :4], v[0, :, :4])[0])


def additive() -> None:
    q, k, v = _qkv()
    mask = torch.randn(2, 1, 5, 7)
    _close(attention(q, k, v, mask=mask), F.scaled_dot_product_attention(q, k, v, attn_mask=mask))
    bias = mask.clone().requires_grad_()
    (got,) = torch.autograd.grad(attention(q, k, v, bias=bias).square().sum(), bias)
    (expected,) = torch.autograd.grad(_dense(q, k, v, torch.tensor(True), bias).square().sum(), bias)
    _close(got, expected)


def mixed() -> None:
    q, k, v = _qkv()
    bias, mask = torch.randn(5, 7), COLS != 3
    _close(attention(q, k, v, mask=mask, bias=bias), _dense(q, k, v, mask, bias))


def causal_top_left() -> None:
    for t_k in (3, 7):
        q, k, v = _qkv(5, t_k)
        expected = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        _close(attention(q, k, v, causal=True), expected)
        _close(scaled_dot_product_attention(q, k, v, is_causal=True), expected)


def causal_bottom_right() -> None:
    q, k, v = _qkv()
    _close(attention(q, k, v, causal="bottom_right"), _dense(q, k, v, COLS <= ROWS + 2))
    lengths = dict(query_lengths=torch.tensor([5, 3]), key_lengths=torch.tensor([7, 6]))
    out = attention(q, k, v, causal="bottom_right", **lengths)
    _close(out[1, :, :3], _dense(q[1, :, :3], k[1, :, :6], v[1, :, :6], torch.ones(3, 6, dtype=torch.bool).tril(3)))


def causal_and_mask() -> None:
    q, k, v = _qkv()
    mask = COLS != 1
    _close(attention(q, k, v, causal=True, mask=mask), _dense(q, k, v, mask & (COLS <= ROWS)))
    with contextlib.suppress(RuntimeError):  # torch 2.14 refuses what was documented as an error
        theirs = F.scaled_dot_product_attention(q, k, v, attn_mask=mask.expand(5, 7), is_causal=True)
        _close(theirs, attention(q, k, v, causal=True, mask=mask))


def causal_bias() -> None:
    from torch.nn.attention.bias import causal_lower_right, causal_upper_left

    q, k, v = _qkv()
    layer = MultiheadAttention(8, 1, batch_first=True).eval()
    for make, diagonal in ((causal_upper_left, 0), (causal_lower_right, 2)):
        mask, seen = make(5, 7), torch.ones(5, 7, dtype=torch.bool).tril(diagonal)
        expected = F.scaled_dot_product_attention(q, k, v, mask)
        _close(expected, _dense(q, k, v, seen))
        _close(scaled_dot_product_attention(q, k, v, mask), expected)
        for options in ({}, {"window": (None, 9)}, {"key_lengths": torch.tensor([7, 7])}, {"align": "top_left"}):
            _close(attention(q, k, v, mask=mask, **options), expected)
        lengths = torch.tensor([7, 4])  # lower right of all the keys, not of those that are real
        _close(attention(q, k, v, mask=mask, key_lengths=lengths)[1], _dense(q, k, v, seen & (COLS < 4))[1])
        _close(softmax(q @ k.mT, mask=mask), softmax(q @ k.mT, mask=seen))
        _close(softmax(q @ k.mT, mask=mask, causal=True), softmax(q @ k.mT, mask=seen, causal=True))
        for is_causal in (False, True):
            got = layer(q[0], k[0], v[0], attn_mask=mask, is_causal=is_causal)[0]
            _close(got, layer(q[0], k[0], v[0], attn_mask=~seen)[0])
    for wrong in (causal_upper_left(5, 6), causal_upper_left(5, 7)[0]):
        with pytest.raises(ValueError, match=r"CausalBias.*\(5, 7\)"):
            attention(q, k, v, mask=wrong)
        with pytest.raises(ValueError, match="CausalBias"):
            layer(q[0], k[0], v[0], attn_mask=wrong)
    with pytest.raises(TypeError, match="pass it as mask="):
        attention(q, k, v, bias=causal_upper_left(5, 7))


def window() -> None:
    q, k, v = _qkv()
    _close(attention(q, k, v, window=(1, 2)), _dense(q, k, v, (COLS >= ROWS - 1) & (COLS <= ROWS + 2)))
    _close(attention(q, k, v, window=(1, None)), _dense(q, k, v, COLS >= ROWS - 1))
    _close(attention(q, k, v, window=(0, 0), align="bottom_right"), v[:, :, 2:])


def empty_row() -> None:
    q, k, v = (x.requires_grad_() for x in _qkv())
    mask = (ROWS != 2).expand(5, 7)
    out, lse, weights = attention(q, k, v, mask=mask, return_lse=True, return_weights=True)
    assert not out[:, :, 2].any() and not weights[:, :, 2].any() and (lse[:, :, 2] == -INF).all()
    grads = torch.autograd.grad(out.square().sum(), (q, k, v))
    assert not grads[0][:, :, 2].any() and all(g.isfinite().all() for g in grads)


def empty_row_module() -> None:
    torch.manual_seed(0)
    layer, x = MultiheadAttention(8, 2, batch_first=True), torch.randn(2, 5, 8)
    nn.init.normal_(layer.out_proj.bias)
    padding = torch.tensor([[False] * 5, [True] * 5])
    for training in (True, False):
        out, weights = layer.train(training)(x, x, x, key_padding_mask=padding)
        _close(out[1], layer.out_proj.bias.expand(5, 8))
        assert not weights[1].any()
    theirs = nn.MultiheadAttention(8, 2, batch_first=True)
    out, _ = theirs(x, x, x, key_padding_mask=padding)
    out.sum().backward()
    assert out[1].isnan().all() and theirs.in_proj_weight.grad is not None and theirs.in_proj_weight.grad.isnan().any()


def finfo_min() -> None:
    q, k, v = _qkv()
    for dtype in (torch.float32, torch.bfloat16):
        mask = torch.zeros(5, 7, dtype=dtype)
        mask[2], mask[3, 4:] = torch.finfo(dtype).min, torch.finfo(dtype).min
        _close(attention(q, k, v, bias=mask), _dense(q, k, v, mask == 0))
    uniform = F.scaled_dot_product_attention(q, k, v, attn_mask=mask.float())[:, :, 2]
    _close(uniform, v.mean(2))


def large_negative() -> None:
    q, k, v = _qkv()
    _close(attention(q * 0, k, v, bias=torch.full((5, 7), -1e4)), v.mean(2, keepdim=True).expand(2, 2, 5, 8))


def _poisoned(x: Tensor, where: Tensor, value: float = NAN) -> Tensor:
    return torch.where(where, value, x)


def padded_nan() -> None:
    q, k, v = _qkv()
    real = torch.tensor([[True] * 7, [True, False, True, True, False, False, False]])
    expected = attention(q, k, v, key_mask=real)
    for value in (NAN, INF):
        k2, v2 = (_poisoned(x, ~real[:, None, :, None], value).requires_grad_() for x in (k, v))
        out = attention(q, k2, v2, key_mask=real)
        assert torch.equal(out, expected)
        assert all(g.isfinite().all() for g in torch.autograd.grad(out.sum(), (k2, v2)))
        beyond = (torch.tensor([7, 3])[:, None] <= COLS)[:, None, :, None]
        out = attention(q, _poisoned(k, beyond, value), _poisoned(v, beyond, value), key_lengths=torch.tensor([7, 3]))
        _close(out[1], attention(q[1:], k[1:, :, :3], v[1:, :, :3])[0])
    assert (
        F.scaled_dot_product_attention(q, k, _poisoned(v, ~real[:, None, :, None]), attn_mask=real[:, None, None])
        .isnan()
        .any()
    )


def masked_nan() -> None:
    q, k, v = _qkv()
    v = _poisoned(v, (COLS == 4)[:, None])
    assert attention(q, k, v, mask=COLS != 4).isnan().all()
    assert F.scaled_dot_product_attention(q, k, v, attn_mask=(COLS != 4).expand(5, 7)).isnan().all()


def padded_query_nan() -> None:
    q, k, v = _qkv()
    lengths = torch.tensor([5, 2])
    beyond = (torch.arange(5) >= lengths[:, None])[:, None, :, None]
    q2, k2, v2 = (x.requires_grad_() for x in (_poisoned(q, beyond), k, v))
    out = attention(q2, k2, v2, query_lengths=lengths)
    _close(out, attention(q, k, v).masked_fill(beyond, 0.0))
    grads = torch.autograd.grad(out, (q2, k2, v2), _poisoned(torch.ones_like(out), beyond))
    assert all(g.isfinite().all() for g in grads)


def nan_row() -> None:
    q, k, v = _qkv()
    q[0, 0, 1] = NAN
    out, lse = attention(q, k, v, return_lse=True)
    assert out[0, 0, 1].isnan().all() and lse[0, 0, 1].isnan() and out.isnan().sum() == 8


def gqa() -> None:
    q, k, v = _qkv(h_kv=1)
    _close(attention(q, k, v), attention(q, k.expand(2, 2, 7, 8), v.expand(2, 2, 7, 8)))
    _close(attention(q, k, v), F.scaled_dot_product_attention(q, k, v, enable_gqa=True))


def softcap() -> None:
    q, k, v = _qkv()
    bias = torch.randn(5, 7)
    scores = 1.5 * torch.tanh(q @ k.mT / 8**0.5 / 1.5) + bias
    _close(attention(q, k, v, softcap=1.5, bias=bias), torch.softmax(scores, -1) @ v)


def alibi() -> None:
    q, k, v = _qkv()
    slopes = torch.tensor([0.5, 0.25])
    for align, shift in (("top_left", 0), ("bottom_right", 2)):
        linear = -slopes[:, None, None] * (ROWS + shift - COLS).abs()
        _close(attention(q, k, v, alibi_slopes=slopes, align=align), _dense(q, k, v, torch.tensor(True), linear))


def dropout_one() -> None:
    q, k, v = _qkv()
    assert not attention(q, k, v, dropout_p=1.0).any()


def dropout_scale() -> None:
    q, k, _ = _qkv(40, 64)
    v = torch.ones(2, 2, 64, 8)
    out, lse = attention(q, k, v, dropout_p=0.25, return_lse=True, seed=torch.tensor([1]))
    _close(lse, attention(q, k, v, return_lse=True)[1])
    assert abs(out.mean() - 1.0) < 0.05 and out.std() > 0.02


def packed() -> None:
    q, k, v = (x[:1] for x in _qkv(9, 9))
    starts = torch.tensor([0, 4, 4, 7])
    poison = torch.arange(9)[:, None] >= 7
    out = attention(
        q, _poisoned(k, poison), _poisoned(v, poison), cu_seqlens_q=starts, cu_seqlens_k=starts, causal=True
    )
    for a, b in ((0, 4), (4, 7)):
        _close(out[:, :, a:b], attention(q[:, :, a:b], k[:, :, a:b], v[:, :, a:b], causal=True))
    assert not out[:, :, 7:].any()


def scale_negative() -> None:
    q, k, v = _qkv()
    _close(attention(q, k, v, scale=-0.7), attention(-q, k, v, scale=0.7))
    _close(attention(q, k, v, scale=0.0), v.mean(2, keepdim=True).expand(2, 2, 5, 8))


def lse() -> None:
    q, k, v = (x.requires_grad_() for x in _qkv())
    _, got = attention(q, k, v, return_lse=True)
    expected = torch.logsumexp(q @ k.mT / 8**0.5, -1)
    _close(got, expected)
    _close(*(torch.autograd.grad(x.sum(), q)[0] for x in (got, expected)))


def zero_keys() -> None:
    q, k, v = _qkv(5, 0)
    out, got = attention(q, k, v, return_lse=True)
    assert not out.any() and (got == -INF).all()


CLAIMS: dict[str, Callable[[], None]] = {
    f.__name__: f
    for f in (
        sign, additive, mixed, causal_top_left, causal_bottom_right, causal_and_mask, causal_bias, window, empty_row, empty_row_module, finfo_min,
        large_negative, padded_nan, masked_nan, padded_query_nan, nan_row, gqa, softcap, alibi, dropout_one, dropout_scale, packed,
        scale_negative, lse, zero_keys,
    )
}  # fmt: skip


@pytest.mark.parametrize("claim", CLAIMS)
def test_what_the_page_says_of(claim: str) -> None:
    CLAIMS[claim]()


def test_every_row_of_the_page_has_a_test() -> None:
    assert re.findall(r"^\| `(\w+)`", PAGE.read_text(), re.M) == list(CLAIMS)
