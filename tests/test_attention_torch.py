"""The torch backend's attention: torch's fused operator where that is faster, by the same rules, with every derivative,
in no more memory."""

import itertools
import sys

import pytest
import torch
import torch.nn.functional as F

from tileformer.decoder.model import DecoderLM, DecoderLMConfig
from tileformer.kernels import attention, info, reference, use_backend
from tileformer.kernels.attention.torch_backend import FUSED_FROM


def _qkv(
    b: int = 1, h: int = 2, t_q: int = 40, t_k: int = 50, d: int = 64, dtype: torch.dtype = torch.float32, device="cpu"
):
    torch.manual_seed(0)
    draw = lambda t: torch.randn(b, h, t, d).to(device, dtype).requires_grad_()  # noqa: E731
    return draw(t_q), draw(t_k), draw(t_k)


@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(causal=True),
        dict(causal="bottom_right"),
        dict(window=(9, 0), causal=True),
        dict(window=(None, 7)),
        dict(mask=torch.arange(FUSED_FROM) % 3 > 0),
        dict(bias=torch.arange(FUSED_FROM) % 3 / 2),
        dict(key_mask=(torch.arange(FUSED_FROM) < 400)[None]),
        dict(key_lengths=torch.tensor([400])),
        dict(query_lengths=torch.tensor([3])),
        dict(alibi_slopes=torch.tensor([0.1, 0.2])),
        dict(softcap=1.0),
        dict(scale=0.5),
        dict(return_lse=True),
        dict(return_weights=True),
    ],
    ids=lambda options: "-".join(options) or "plain",
)
@pytest.mark.parametrize("t_q", [5, FUSED_FROM])
def test_the_torch_backend_means_the_same_where_torchs_fused_attention_is_faster(t_q, options):
    q, k, v = _qkv(t_q=t_q, t_k=FUSED_FROM, d=8, dtype=torch.float64)
    with use_backend("reference"):
        expected = attention(q, k, v, **options)
    with use_backend("torch"):
        torch.testing.assert_close(attention(q, k, v, **options), expected)


@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(
            causal=True, key_mask=torch.arange(7) >= torch.tensor([[2], [7]])
        ),  # rows that see nothing, a batch that sees nothing
        dict(mask=torch.arange(35).view(5, 7) % 3 > 0, query_lengths=torch.tensor([4, 1])),
        dict(bias=torch.arange(5.0)[:, None], causal="bottom_right"),
    ],
    ids=["plain", "causal and padded", "mask", "rows of a bias"],
)
def test_derivatives_of_torchs_fused_attention(options, monkeypatch):
    """First ones, second ones, and many at once, as the loop gives them one by one."""
    plain = sys.modules["tileformer.kernels.attention.torch_backend"]
    monkeypatch.setattr(plain, "FUSED_GRADIENTS_FROM", 1)
    inputs = [x.detach() for x in _qkv(b=2, t_q=5, t_k=7, d=4, dtype=torch.float32)]

    def derivatives(dtype):
        leaves = [x.to(dtype).requires_grad_() for x in inputs]
        out = attention(*leaves, **options)
        first = torch.autograd.grad(out.square().sum(), leaves, create_graph=True)
        return out, *first, *torch.autograd.grad(sum(x.square().sum() for x in first), leaves)

    with use_backend("reference"):
        expected = derivatives(torch.float64)
    with use_backend("torch"):
        for got, want in zip(derivatives(torch.float32), expected, strict=True):
            torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-4)
        op = lambda *x: attention(*x, **options)  # noqa: E731
        for fused in (1, 10**9):
            monkeypatch.setattr(plain, "FUSED_GRADIENTS_FROM", fused)
            looped = torch.autograd.functional.jacobian(op, tuple(inputs))
            torch.testing.assert_close(torch.autograd.functional.jacobian(op, tuple(inputs), vectorize=True), looped)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch.func.jvp's own
@pytest.mark.parametrize("fused", [1, 10**9], ids=["fused", "plain"])
def test_what_torchs_fused_attention_does_not_serve_is_computed_without_it(fused, monkeypatch):
    plain = sys.modules["tileformer.kernels.attention.torch_backend"]
    for name in ("FUSED_FROM", "FUSED_GRADIENTS_FROM"):
        monkeypatch.setattr(plain, name, fused)
    q, k, v = _qkv(b=2, t_q=7, t_k=7, d=4, dtype=torch.float64)
    lengths = dict(causal="bottom_right", query_lengths=torch.tensor([7, 3]), key_lengths=torch.tensor([4, 7]))
    tangents = tuple(torch.ones_like(x) for x in (q, k, v))
    forward_mode = lambda: torch.func.jvp(lambda *x: attention(*x, causal=True), (q, k, v), tangents)[1]  # noqa: E731
    calls = {
        "lengths": lambda: attention(q, k, v, **lengths),
        "narrow values": lambda: attention(q, k, v[..., :3]),
        "gradients in float64": lambda: torch.autograd.grad(attention(q, k, v).square().sum(), (q, k, v)),
        "forward mode": forward_mode,
        "vmap": lambda: torch.func.vmap(lambda x: attention(x, k, v))(torch.stack([q, 2 * q])),
        "autocast": lambda: autocast(torch.bfloat16),
    }
    exact = dict(rtol=1e-12, atol=1e-12)

    def autocast(dtype):
        q16, k16, v16 = (x.detach().to(torch.bfloat16).to(dtype) for x in (q, k, v))
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            return attention(q16.to(dtype), k16, v16, return_weights=True, softcap=30.0)

    for name, call in calls.items():
        with use_backend("torch"):
            got = call()
        with use_backend("reference"):
            want = call() if name != "autocast" else [x.to(torch.bfloat16) for x in autocast(torch.float32)]
        if isinstance(got, tuple):
            want = tuple(want)
        torch.testing.assert_close(got, want, msg=lambda m: f"{name}: {m}", **exact)  # noqa: B023


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("causal", [False, True])
def test_padding_costs_no_more_memory_than_torchs(dtype, causal):
    """Peaks counted by torch's profiler; a square of the keys would be 16 times the most that is allowed."""
    draw = lambda: torch.randn(1, 2, 2048, 16, dtype=dtype).requires_grad_()  # noqa: E731
    q, k, v, real = draw(), draw(), draw(), torch.arange(2048)[None] < 2041

    def peak(call) -> int:
        cpu = torch.profiler.ProfilerActivity.CPU
        with torch.profiler.profile(activities=[cpu], profile_memory=True, acc_events=True) as profiler:
            call().sum().backward()
        events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
        sizes = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]
        return max(itertools.accumulate(sizes))

    theirs = peak(lambda: F.scaled_dot_product_attention(q, k, v, attn_mask=real[:, None, None]))
    assert 0 < peak(lambda: attention(q, k, v, key_mask=real, causal=causal)) <= 1.5 * theirs


NO = torch.ones(1, 1, dtype=torch.bool)
OURS = {  # why a call is ours under "fastest": sizes of the tensors, options
    "32 bits": (dict(dtype=torch.float32), {}),
    "head size not of 8": (dict(d=12), {}),
    "head size beyond what all kernels take": (dict(d=136), {}),
    "causal, not square": (dict(t_q=9), dict(causal=True)),
    "window": ({}, dict(window=(3, 0), causal=True)),
    "window to the right": ({}, dict(window=(None, 3))),
    "mask": ({}, dict(mask=NO.expand(8, 8))),
    "bias": ({}, dict(bias=NO.bfloat16())),
    "key mask": ({}, dict(key_mask=NO.expand(1, 8))),
    "lengths": ({}, dict(key_lengths=torch.tensor([8]))),
    "packed": ({}, dict(cu_seqlens_q=torch.tensor([0, 8]), cu_seqlens_k=torch.tensor([0, 8]))),
    "ALiBi": ({}, dict(alibi_slopes=torch.ones(2))),
    "soft cap": ({}, dict(softcap=1.0)),
    "dropout": ({}, dict(dropout_p=0.5, seed=1)),
    "log-sum-exp": ({}, dict(return_lse=True)),
    "weights": ({}, dict(return_weights=True)),
    "negative scale": ({}, dict(scale=-1.0)),
    "no key": (dict(t_k=0), {}),
    "no batch": (dict(b=0), {}),
    "more heads than a grid has rows": (dict(h=2**16, t_q=1, t_k=1, d=8), {}),
}


@pytest.fixture
def handed_over(monkeypatch):
    """Whether a call goes to torch's fused attention where the kernels serve it, and what torch made of it."""
    chosen = sys.modules["tileformer.kernels.attention"]
    monkeypatch.setattr(chosen, "choose", lambda op, x: "triton")
    monkeypatch.setattr(chosen, "_attention_forward", lambda *_: 3 * [torch.empty(())])
    monkeypatch.setattr(chosen, "_attention_weights", lambda *_: torch.empty(()))
    made = []
    fused = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *q, **kw: made.append(fused(*q, **kw)) or made[-1])

    def call(q, k, v, backend="fastest", **options):
        made.clear()
        with use_backend(backend):
            out = attention(q, k, v, **options)
        assert not made or out is made[0]
        return made[0] if made else None

    return call


@pytest.mark.parametrize("reason", OURS)
def test_fastest_leaves_what_torch_computes_otherwise_to_the_kernels(handed_over, reason):
    sizes, options = OURS[reason]
    q, k, v = (x.detach() for x in _qkv(**dict(dict(t_q=8, t_k=8, dtype=torch.bfloat16), **sizes)))
    assert handed_over(q, k, v, **options) is None


@pytest.mark.parametrize(
    ("t_q", "options"),
    [
        (8, {}),
        (5, {}),
        (8, dict(causal=True)),
        (8, dict(causal="bottom_right")),
        (5, dict(scale=0.5)),
        (8, dict(seed=1)),
    ],
)
def test_fastest_hands_plain_and_square_causal_calls_to_torch(handed_over, t_q, options):
    q, k, v = (x.detach() for x in _qkv(h=4, t_q=t_q, t_k=8, dtype=torch.bfloat16))
    k, v = k[:, :2], v[:, :2]  # two query heads share a key head
    rounding = dict(rtol=0, atol=2**-7)  # of weights in 16 bits
    torch.testing.assert_close(handed_over(q, k, v, **options), reference.attention(q, k, v, **options), **rounding)
    for backend in ("auto", "triton"):
        assert handed_over(q, k, v, backend, **options) is None
    assert handed_over(q, k, v.mT.contiguous().mT) is None, "rows that are no rows"


def test_fastest_repeats_its_bits_where_they_have_to(handed_over):
    q, k, v = _qkv(t_q=8, t_k=8, dtype=torch.bfloat16)
    before = torch.are_deterministic_algorithms_enabled()
    try:
        for repeats in (False, True):
            torch.use_deterministic_algorithms(repeats)
            assert (handed_over(q, k, v) is None) == repeats
            with torch.no_grad():
                assert handed_over(q, k, v) is not None, "torch's forward repeats"
    finally:
        torch.use_deterministic_algorithms(before)


def test_fastest_is_auto_on_a_cpu_and_named_on_a_gpu(monkeypatch):
    q, k, v = _qkv(t_q=8, t_k=8)
    model = DecoderLM(DecoderLMConfig(9, d_model=8, nhead=1, num_layers=1, dim_feedforward=8, max_length=8)).eval()
    with use_backend("fastest"):
        assert info._backend_on(torch.device("cpu")) == ("torch", "fastest: plain torch operators serve CPU tensors")
        assert "fused" not in model.explain()
        out = attention(q, k, v, dropout_p=0.5, seed=1)
        for room in ("backend", "decoder.generation.step"):
            name = f"tileformer.{room}" if "." in room else f"tileformer.kernels.{room}"
            monkeypatch.setattr(sys.modules[name], "choose", lambda op, x: "triton")
        told = info._backend_on(torch.device("cpu"))
        assert (
            told[0] == "fastest" and "torch's fused kernels" in told[1] and "torch's fused kernels" in model.explain()
        )
    assert torch.equal(out, attention(q, k, v, dropout_p=0.5, seed=1)), "as auto, dropout's bits among it"
