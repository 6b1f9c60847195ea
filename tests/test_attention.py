"""What `attention` promises beyond values in budget: empty rows, padding, layouts, gradients on demand, dropout,
determinism."""

import math
import sys
import warnings

import pytest
import torch
from torch import Tensor

from tileformer.bench.calls import describe
from tileformer.bench.calls.ops import attention_sizes
from tileformer.bench.check.budget import assert_within_budget, rms_ratio
from tileformer.bench.check.run import examine
from tileformer.bench.recording import record
from tileformer.kernels import attention, reference, scaled_dot_product_attention, use_backend

EVERY_BACKEND = pytest.mark.parametrize("name", ["interpret", "torch", "reference"])


def _qkv(
    b: int = 1, h: int = 2, t_q: int = 40, t_k: int = 50, d: int = 64, dtype: torch.dtype = torch.float32, device="cpu"
):
    torch.manual_seed(0)
    draw = lambda t: torch.randn(b, h, t, d).to(device, dtype).requires_grad_()  # noqa: E731
    return draw(t_q), draw(t_k), draw(t_k)


@EVERY_BACKEND
def test_a_row_without_a_key_is_zero_with_zero_gradients(name: str) -> None:
    q, k, v = _qkv(b=2, t_q=6, t_k=5)
    key_mask = torch.tensor([[True] * 5, [False] * 5])
    mask = torch.ones(6, 5, dtype=torch.bool)
    mask[3] = False
    with use_backend(name):
        out, lse = attention(q, k, v, key_mask=key_mask, mask=mask, return_lse=True)
    out.sum().backward()
    assert torch.equal(out[1], torch.zeros_like(out[1])) and torch.equal(out[0, :, 3], torch.zeros_like(out[0, :, 3]))
    assert (lse[1] == -math.inf).all() and (lse[0, :, 3] == -math.inf).all() and lse[0, :, :3].isfinite().all()
    for x in (q, k, v):
        assert x.grad.isfinite().all() and not x.grad[1].any()
    assert not q.grad[0, :, 3].any()


@EVERY_BACKEND
@pytest.mark.parametrize("padding", ["tail", "hole"])
def test_nan_in_padded_keys_and_values_reaches_nothing(name: str, padding: str) -> None:
    q, k, v = _qkv(t_k=70)
    key_mask = torch.ones(1, 70, dtype=torch.bool)
    key_mask[:, 60:] = False
    if padding == "hole":
        key_mask[:, 7] = False
    spoiled = [torch.where(key_mask[:, None, :, None], x.detach(), torch.nan).requires_grad_() for x in (k, v)]
    with use_backend(name):
        good = attention(q, k, v, key_mask=key_mask)
        expected = torch.autograd.grad(good.square().sum(), (q, k, v))
        out = attention(q, *spoiled, key_mask=key_mask)
        gradients = torch.autograd.grad(out.square().sum(), (q, *spoiled))
    torch.testing.assert_close(out, good, rtol=0, atol=0)
    for got, want in zip(gradients, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0)


def _strided(x: Tensor, how: str) -> Tensor:
    x = x.detach()
    if how == "heads last":
        x = x.transpose(1, 2).contiguous().transpose(1, 2)
    elif how == "packed":  # one of three views of a (B, T, 3, H, D) projection
        x = torch.stack([x.transpose(1, 2)] * 3, 2)[:, :, 1].transpose(1, 2)
    elif how == "last axis strided":
        x = x.transpose(-1, -2).contiguous().transpose(-1, -2)
    elif how == "misaligned":
        x = torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)
    elif how == "expanded":
        x = x[:, :1].expand(x.shape)
    return x.requires_grad_()


@pytest.mark.parametrize("how", ["heads last", "packed", "last axis strided", "misaligned", "expanded"])
def test_any_layout_gives_the_values_of_a_contiguous_one(how: str, backend: str, device: torch.device) -> None:
    views = [_strided(x, how) for x in _qkv(device=device)]
    plain = [x.detach().contiguous().requires_grad_() for x in views]
    out, expected = attention(*views), attention(*plain)
    weight = torch.linspace(-1, 1, out.numel(), device=device).view(out.shape)
    assert torch.equal(out, expected)
    for x, y in zip(
        torch.autograd.grad((out * weight).sum(), views),
        torch.autograd.grad((expected * weight).sum(), plain),
        strict=True,
    ):
        assert torch.equal(x, y)


def test_output_joins_heads_without_a_copy(backend: str, device: torch.device) -> None:
    out = attention(*_qkv(device=device))
    assert out.transpose(1, 2).reshape(1, 40, 128).data_ptr() == out.data_ptr()


def test_an_expanded_gradient_is_read_through_its_strides(backend: str, device: torch.device) -> None:
    q, k, v = _qkv(device=device)
    expanded = torch.autograd.grad(attention(q, k, v).sum(), (q, k, v))  # sum() sends a stride-0 gradient
    dense = torch.autograd.grad(attention(q, k, v), (q, k, v), torch.ones(1, 2, 40, 64, device=device))
    assert all(torch.equal(a, b) for a, b in zip(expanded, dense, strict=True))


@pytest.mark.parametrize("wanted", [(True, False, False), (False, True, False), (False, False, True)])
def test_each_gradient_alone_equals_its_part_of_all(
    wanted: tuple[bool, ...], backend: str, device: torch.device
) -> None:
    q, k, v = _qkv(device=device)
    everything = torch.autograd.grad(attention(q, k, v).sum(), (q, k, v))
    alone = [x.detach().requires_grad_(want) for x, want in zip((q, k, v), wanted, strict=True)]
    attention(*alone).sum().backward()
    for x, want, part in zip(alone, wanted, everything, strict=True):
        assert torch.equal(x.grad, part) if want else x.grad is None


def test_gradient_through_the_log_sum_exp_alone(backend: str, device: torch.device) -> None:
    q, k, v = _qkv(device=device)
    got = torch.autograd.grad(attention(q, k, v, return_lse=True)[1].sum(), (q, k))
    wide = [x.detach().double().requires_grad_() for x in (q, k)]
    truth = torch.autograd.grad(reference.attention(wide[0], wide[1], v.double(), return_lse=True)[1].sum(), wide)
    for a, b in zip(got, truth, strict=True):
        assert_within_budget("lse", a, b.float(), b)


def test_same_input_same_bits(backend: str, device: torch.device) -> None:
    q, k, v = _qkv(b=2, device=device, dtype=torch.bfloat16)
    seed = torch.tensor([3], device=device)

    def run() -> list[Tensor]:
        out = attention(q, k, v, causal=True, dropout_p=0.2, seed=seed)
        return [out, *torch.autograd.grad(out.sum(), (q, k, v))]

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


def test_dropout_bits_are_those_of_the_reference_for_any_tile(
    backend: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    t_q, t_k, seed = 70, 90, torch.tensor([987654321987654321], device=device)
    q = torch.zeros(
        2, 2, t_q, 128, device=device
    )  # every weight is 1 / T_k, and v is the identity: the output shows the bits
    v = torch.eye(t_k, 128, device=device).expand(2, 2, t_k, 128)
    keep = reference.dropout_keep(seed, (2, 2, t_q, t_k), 0.4)
    room = sys.modules["tileformer.kernels.attention.launchers"]
    for tile in ((32, 32), (64, 16)):
        rows = [dict(BLOCK_M=tile[0], BLOCK_N=tile[1], BLOCK_MASKED=16, num_warps=4, num_stages=1)]
        monkeypatch.setattr(room, "tiles_for", lambda *_, rows=rows: rows)
        out = attention(q, v, v, scale=0.0, dropout_p=0.4, seed=seed)
        assert torch.equal(out[..., :t_k] > 0, keep)
    assert abs(keep.float().mean().item() - 0.6) < 4 * math.sqrt(0.24 / keep.numel())


def test_seedless_dropout_follows_torchs_generator(backend: str, device: torch.device) -> None:
    q, k, v = _qkv(device=device)
    first, second = attention(q, k, v, dropout_p=0.5), attention(q, k, v, dropout_p=0.5)
    torch.manual_seed(0)
    one = attention(q, k, v, dropout_p=0.5)
    torch.manual_seed(0)
    assert torch.equal(one, attention(q, k, v, dropout_p=0.5)) and not torch.equal(first, second)


@EVERY_BACKEND
def test_dropping_everything_gives_zero(name: str) -> None:
    q, k, v = _qkv(t_q=8, t_k=8)
    with use_backend(name):
        out = attention(q, k, v, dropout_p=1.0)
    gradients = torch.autograd.grad(out.sum(), (q, k, v))
    assert not out.any() and not any(g.any() for g in gradients)


@EVERY_BACKEND
@pytest.mark.parametrize("sizes", [(0, 2, 4, 5), (2, 2, 0, 5), (2, 2, 4, 0)], ids=str)
def test_empty_sizes(name: str, sizes: tuple[int, int, int, int]) -> None:
    b, h, t_q, t_k = sizes
    q, k, v = _qkv(b, h, t_q, t_k, d=16)
    with use_backend(name):
        out, lse = attention(q, k, v, return_lse=True)
    gradients = torch.autograd.grad(out.sum(), (q, k, v))
    assert out.shape == q.shape and lse.shape == q.shape[:3] and not out.any()
    assert all(not g.any() for g in gradients)


@pytest.mark.parametrize("scale", [0.0, -0.7])
def test_any_scale(scale: float, backend: str, device: torch.device) -> None:
    q, k, v = (x.detach() for x in _qkv(device=device))
    truth = reference.attention(q.double(), k.double(), v.double(), scale=scale)
    assert_within_budget("out", attention(q, k, v, scale=scale), reference.attention(q, k, v, scale=scale), truth)


@pytest.mark.interprets
@pytest.mark.parametrize(
    "d", [1, 8, 17, 96, 200]
)  # one column; below a tensor core's 16; odd; padded to 128; padded to 256
def test_any_head_size(d: int) -> None:
    q, k, v = _qkv(h=1, t_q=20, t_k=40, d=d)
    with use_backend("interpret"):
        out = attention(q, k, v, causal=True)
        got = torch.autograd.grad(out.sum(), (q, k, v))
    qw, kw, vw = (x.detach().double().requires_grad_() for x in (q, k, v))
    expected = reference.attention(qw, kw, vw, causal=True)
    truth = torch.autograd.grad(expected.sum(), (qw, kw, vw))
    with torch.no_grad():
        size = attention_sizes(qw, kw, vw, expected, torch.ones_like(expected), causal=True)
    for name, a, b in zip(("out", "dq", "dk", "dv"), (out, *got), (expected, *truth), strict=True):
        assert_within_budget(name, a, b.float(), b, size[name])


def test_accumulators_are_wider_than_the_input(backend: str, device: torch.device) -> None:
    """A maximum would not see an accumulator kept in bfloat16; the mean square over 16 key tiles does."""
    q, k, v = (x.detach() for x in _qkv(h=1, t_q=32, t_k=1024, d=64, dtype=torch.bfloat16, device=device))
    truth = reference.attention(q.double(), k.double(), v.double())
    assert (
        rms_ratio(attention(q, k, v), reference.attention(q, k, v), truth) <= 1.5
    )  # weights are rounded for their product


def test_accumulators_of_the_gradients_are_wider_than_the_input(backend: str, device: torch.device) -> None:
    def draw(t: int, seed: int) -> Tensor:
        return torch.randn(1, 1, t, 64, generator=torch.Generator().manual_seed(seed)).to(device, torch.bfloat16)

    def gradients(op, t_q: int, t_k: int, dtype: torch.dtype) -> dict[str, Tensor]:
        leaves = [draw(t, seed).to(dtype).requires_grad_() for t, seed in ((t_q, 0), (t_k, 1), (t_k, 2))]
        return dict(
            zip(("dq", "dk", "dv"), torch.autograd.grad(op(*leaves), leaves, draw(t_q, 3).to(dtype)), strict=True)
        )

    for t_q, t_k, names in ((32, 1024, ("dq",)), (1024, 32, ("dk", "dv"))):  # what is added up over many tiles
        got, eager, truth = (
            gradients(op, t_q, t_k, dtype)
            for op, dtype in (
                (attention, torch.bfloat16),
                (reference.attention, torch.bfloat16),
                (reference.attention, torch.float64),
            )
        )
        for name in names:
            assert rms_ratio(got[name], eager[name], truth[name]) <= 1.6, name


@pytest.mark.interprets
def test_float32_dots_follow_torchs_switch() -> None:
    """IEEE by default; TF32, which drops 13 bits, where torch's own matmuls use it."""
    q, k, v = (x.detach() for x in _qkv(h=1))
    truth = reference.attention(q.double(), k.double(), v.double())
    switch, before = torch.backends.cuda.matmul, torch.backends.cuda.matmul.fp32_precision
    with use_backend("interpret"):
        exact = (attention(q, k, v) - truth).abs().max()
        switch.fp32_precision = "tf32"
        try:
            rounded = (attention(q, k, v) - truth).abs().max()
        finally:
            switch.fp32_precision = before
    assert exact < 1e-5 < rounded < 1e-2


TILES = [(16, 32), (32, 16)]  # neither the height nor the width alone explains a bound


def _assert_within_budget_for_tiles(
    tile, shape, monkeypatch: pytest.MonkeyPatch, dtype: str = "fp32", **options
) -> None:
    rows = [dict(BLOCK_M=tile[0], BLOCK_N=tile[1], BLOCK_MASKED=16, num_warps=4, num_stages=1)]
    monkeypatch.setattr(sys.modules["tileformer.kernels.attention.launchers"], "tiles_for", lambda *_, **__: rows)
    call = describe("attention", "tiles", "", *shape, lse=True, **options)
    found = examine(call, dtype, "interpret", torch.device("cpu"), runs=1)
    assert found.passed, f"tile {tile}, {shape}, {options}: {found.verdict}"


@pytest.mark.interprets
@pytest.mark.parametrize("shift", [-33, -32, -31, -17, -16, -15, -2, -1, 0, 1, 2, 14, 15, 16, 17, 30, 31, 32, 33])
def test_the_diagonal_may_cross_a_tile_anywhere(shift: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for tile in TILES:
        _assert_within_budget_for_tiles(tile, (1, 1, 1, 64, 64 + shift, 4), monkeypatch, causal="bottom_right")


@pytest.mark.interprets
@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize("options", [dict(padding="left", causal=True), dict(padding="right", mask="boolean"), dict(padding="holes"),
                                     dict(mask="additive", dropout_p=0.3), dict(causal=True, dropout_p=0.3)], ids=str)  # fmt: skip
def test_shared_key_heads_for_any_tile(tile: tuple[int, int], options: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two batches and three key heads of two query heads each: no two of these numbers are equal, or one."""
    _assert_within_budget_for_tiles(tile, (2, 6, 3, 20, 35, 4), monkeypatch, **options)


LONG = 1100  # keys: more than the block in which their padding is read
PADDINGS = {
    "starts late": lambda at: at >= 1050,
    "ends early": lambda at: at < 1000,
    "ends in the second block": lambda at: at < 1030,
    "one hole in the second block": lambda at: at != 1060,
    "one hole in the first block": lambda at: at != 3,
    "one key": lambda at: at == 1025,
    "none": lambda at: at < 0,
}


@pytest.mark.interprets
@pytest.mark.parametrize("padding", PADDINGS)
def test_padding_of_many_keys(padding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [dict(BLOCK_M=32, BLOCK_N=256, BLOCK_MASKED=256, num_warps=4, num_stages=1)]
    monkeypatch.setattr(sys.modules["tileformer.kernels.attention.launchers"], "tiles_for", lambda *_, **__: rows)
    q, k, v = (x.detach() for x in _qkv(b=2, h=1, t_q=3, t_k=LONG, d=4))
    key_mask = torch.stack([torch.arange(LONG) < 5, PADDINGS[padding](torch.arange(LONG))])
    with use_backend("interpret"):
        out, lse = attention(q, k, v, key_mask=key_mask, return_lse=True)
    expected, expected_lse = reference.attention(q.double(), k.double(), v.double(), key_mask=key_mask, return_lse=True)
    assert_within_budget("out", out, expected.float(), expected)
    assert_within_budget("lse", lse, expected_lse.float(), expected_lse)


def test_a_strided_key_mask(backend: str, device: torch.device) -> None:
    q, k, v = _qkv(b=3, device=device)
    key_mask = (torch.rand(50, 3, generator=torch.Generator().manual_seed(0)) > 0.4).to(device).T
    assert torch.equal(attention(q, k, v, key_mask=key_mask), attention(q, k, v, key_mask=key_mask.contiguous()))


def test_a_tile_that_does_not_fit_gives_way_to_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime.errors import OutOfResources

    from tileformer.kernels import launch

    q, k, v = _qkv()
    room = sys.modules["tileformer.kernels.attention.launchers"]
    rows = [dict(BLOCK_M=m, BLOCK_N=32, BLOCK_MASKED=16, num_warps=4, num_stages=1) for m in (64, 32)]
    monkeypatch.setattr(room, "tiles_for", lambda *_: rows)
    tried, run = [], launch._run

    def small_device(kernel, programs, like, args, constexprs):
        tried.append(constexprs["BLOCK_M"])
        if constexprs["BLOCK_M"] == 64:
            raise OutOfResources(200_000, 101_376, "shared memory")
        return run(kernel, programs, like, args, constexprs)

    monkeypatch.setattr(launch, "_run", small_device)
    monkeypatch.setattr(launch, "out_of_resources", set())
    with record(86) as launches, use_backend("triton"):
        with pytest.warns(UserWarning, match="does not fit this device"):
            attention(q, k, v)
        monkeypatch.setattr(launch, "cached_kernels", {})
        room._plan.cache_clear()
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # remembered: no second warning
            attention(q, k, v)
    assert tried == [64, 32, 32] and [x.constants["BLOCK_M"] for x in launches] == [32, 32]


@pytest.mark.interprets
@pytest.mark.parametrize("shape", [(2, 3, 10, 16), (3, 10, 16), (10, 16), (2, 2, 3, 10, 16)], ids=str)
@pytest.mark.parametrize("masked", ["", "causal", "mask"])
def test_torchs_signature(shape: tuple[int, ...], masked: str) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(shape) for _ in range(3))
    options = dict(is_causal=masked == "causal", attn_mask=torch.rand(10, 10) > 0.2 if masked == "mask" else None)
    expected = torch.nn.functional.scaled_dot_product_attention(q.double(), k.double(), v.double(), **options)
    with use_backend("interpret"):
        out = scaled_dot_product_attention(q, k, v, **options)
    assert_within_budget("out", out, expected.float(), expected)


@pytest.mark.interprets
def test_torchs_signature_with_shared_key_heads() -> None:
    q, k = torch.randn(1, 4, 10, 16), torch.randn(1, 2, 10, 16)
    expected = torch.nn.functional.scaled_dot_product_attention(q.double(), k.double(), k.double(), enable_gqa=True)
    with use_backend("interpret"):
        assert_within_budget("out", scaled_dot_product_attention(q, k, k, enable_gqa=True), expected.float(), expected)
        with pytest.raises(ValueError, match="enable_gqa=True"):
            scaled_dot_product_attention(q, k, k)


@pytest.mark.interprets
@pytest.mark.parametrize(
    "shape", [(3, 4, 5, 6), (3, 1, 5, 6), (2, 3, 4, 5, 6), (2, 1, 1, 1, 6), (4, 1, 6), (6,)], ids=str
)
def test_torchs_signature_broadcasts_a_mask_among_the_leading_axes(shape: tuple[int, ...]) -> None:
    q, k, mask = torch.randn(2, 3, 4, 5, 8), torch.randn(2, 3, 4, 6, 8), torch.rand(shape) > 0.3
    mask[..., 0] = True
    expected = torch.nn.functional.scaled_dot_product_attention(q.double(), k.double(), k.double(), mask)
    with use_backend("interpret"):
        assert_within_budget("out", scaled_dot_product_attention(q, k, k, mask), expected.float(), expected)


_Q, _K = torch.zeros(1, 4, 5, 8), torch.zeros(1, 2, 6, 8)
BAD = {
    "three axes": (dict(q=_Q[0]), ValueError, r"q must be \(B, H, T, D\), got shape \(4, 5, 8\)"),
    "dtypes": (dict(k=_K.half()), TypeError, "k is float16, q is float32"),
    "integers": (dict(q=_Q.long(), k=_K.long(), v=_K.long()), TypeError, "q must be floating, got int64"),
    "batches": (dict(k=_K.expand(2, 2, 6, 8), v=_K.expand(2, 2, 6, 8)), ValueError, "batch and head size must be equal"),
    "v shape": (dict(v=_K[:, :, :5]), ValueError, r"v is \(1, 2, 5, 8\), k \(1, 2, 6, 8\)"),
    "heads": (dict(q=_Q[:, :3]), ValueError, "3 query heads and 2 key heads"),
    "no heads": (dict(k=_K[:, :0], v=_K[:, :0]), ValueError, "4 query heads and 0 key heads"),
    "head size": (dict(q=torch.zeros(1, 2, 5, 300), k=torch.zeros(1, 2, 6, 300), v=torch.zeros(1, 2, 6, 300)), ValueError, "head size 300"),
    "device": (dict(k=_K.to("meta")), ValueError, "k is on meta, the first argument on cpu"),
    "causal": (dict(causal="lower"), ValueError, "got 'lower'"),
    "dropout": (dict(dropout_p=1.5), ValueError, "between 0 and 1, got 1.5"),
    "seed": (dict(dropout_p=0.5, seed=torch.zeros(2).long()), ValueError, "seed must hold one element"),
    "mask shape": (dict(mask=torch.zeros(3, 6)), ValueError, r"\(3, 6\) does not expand to \(1, 4, 5, 6\)"),
    "mask dtype": (dict(mask=torch.zeros(5, 6, dtype=torch.int32)), TypeError, "mask must be boolean .* got int32"),
    "key mask shape": (dict(key_mask=torch.ones(1, 5, dtype=torch.bool)), ValueError, r"key_mask must be boolean \(1, 6\)"),
    "key mask dtype": (dict(key_mask=torch.ones(1, 6)), ValueError, "True = a real key, got float32"),
}  # fmt: skip


@pytest.mark.parametrize("what", list(BAD))
@EVERY_BACKEND
def test_bad_input_raises_before_anything_runs(name: str, what: str) -> None:
    changed, error, message = BAD[what]
    with use_backend(name), pytest.raises(error, match=message):
        attention(**(dict(q=_Q, k=_K, v=_K) | changed))


@pytest.mark.interprets
def test_a_floating_mask_that_wants_a_gradient() -> None:
    mask = torch.zeros(5, 6, requires_grad=True)
    for backend in ("torch", "interpret"):
        mask.grad = None
        with use_backend(backend):
            attention(_Q + 1, _K + 1, torch.randn(_K.shape), mask=mask).sum().backward()
        assert mask.grad is not None and mask.grad.any()


def test_a_backend_that_cannot_serve_raises() -> None:
    with use_backend("triton"), pytest.raises(ValueError, match="needs CUDA tensors, got cpu"):
        attention(_Q, _K, _K)
    with pytest.raises(ValueError, match="unknown backend 'cuda'"), use_backend("cuda"):
        pass


@pytest.mark.parametrize("heads", [(4, 1, 1), (4, 4, 1), (4, 1, 4), (1, 4, 1), (1, 1, 1)])
@pytest.mark.parametrize("lead", [((2,), (2,), (2,)), ((1,), (2,), (2,)), ((3, 1), (1, 2), (2,)), ((2,), (), (1,))])
def test_leading_axes_and_single_heads_broadcast(lead, heads):
    shapes = [(*b, h, t, 8) for b, h, t in zip(lead, heads, (5, 6, 6), strict=True)]
    given = [
        torch.randn(s, generator=torch.Generator().manual_seed(n), dtype=torch.float64) for n, s in enumerate(shapes)
    ]
    expected = torch.nn.functional.scaled_dot_product_attention(*given)
    for backend in ("torch", "reference"):
        with use_backend(backend):
            torch.testing.assert_close(scaled_dot_product_attention(*given), expected)


def test_leading_axes_that_do_not_broadcast_are_named():
    q, k = torch.randn(5, 1, 5, 8), torch.randn(2, 1, 6, 8)
    with pytest.raises(ValueError, match=r"\(5, 1, 5, 8\), \(2, 1, 6, 8\), \(2, 1, 6, 8\) do not broadcast"):
        scaled_dot_product_attention(q, k, k)
