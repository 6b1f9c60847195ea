"""attention with windows, lengths, packed sequences, biases, ALiBi, soft cap, other value sizes and weights, against
the reference.

Tiles are small and neither square nor equal, so that every bound of a loop falls inside one, between two and at an edge
of one.
"""

import importlib
import itertools
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from tileformer.bench.check.budget import assert_within_budget
from tileformer.kernels import attention, reference, use_backend

pytestmark = pytest.mark.interprets
LAUNCHERS = importlib.import_module("tileformer.kernels.attention.launchers")
TILES = [(16, 32, 16), (32, 16, 16)]  # queries, keys, and the extent of a tile that is masked


@pytest.fixture(params=TILES, ids=str)
def tile(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every kernel of attention on each of these tiles."""
    m, n, edge = request.param
    yield from on_tile(m, n, edge, monkeypatch)


@pytest.fixture
def one_tile(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """On the first of them, where bounds are not in question."""
    m, n, edge = TILES[0]
    yield from on_tile(m, n, edge, monkeypatch)


def on_tile(m: int, n: int, edge: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def tiles_for(table, *_):
        found = dict(BLOCK_M=m, BLOCK_N=n, num_warps=4, num_stages=1)
        if table is not LAUNCHERS.tiles.BACKWARD_BIAS and table is not LAUNCHERS.tiles.WEIGHTS:
            found["BLOCK_MASKED"] = edge
        return [found]

    monkeypatch.setattr(LAUNCHERS, "tiles_for", tiles_for)
    with use_backend("interpret"):
        yield


def drawn(
    b: int, h: int, h_kv: int, t_q: int, t_k: int, d: int = 4, dv: int = 4, **more: tuple[int, ...]
) -> dict[str, Tensor]:
    """Differentiable tensors: q, k, v and what `more` names the shape of."""
    generator = torch.Generator().manual_seed(0)
    shapes = dict(q=(b, h, t_q, d), k=(b, h_kv, t_k, d), v=(b, h_kv, t_k, dv), **more)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def results(op: Callable, leaves: dict[str, Tensor], options: dict, dtype: torch.dtype) -> list[Tensor]:
    """Everything returned, and every gradient."""
    given = {name: x.to(dtype, copy=True).requires_grad_() for name, x in leaves.items()}
    returned = op(**given, **options)
    returned = returned if isinstance(returned, tuple) else (returned,)
    total = torch.zeros((), dtype=dtype)
    for x in returned:
        weight = torch.sin(torch.arange(x.numel(), dtype=torch.float64)).view(x.shape).to(x.dtype)
        total = total + (torch.where(x == -torch.inf, 0.0, x) * weight).sum().to(dtype)
    return [*(x.detach() for x in returned), *torch.autograd.grad(total, list(given.values()))]


def check(leaves: dict[str, Tensor], op: Callable = attention, **options) -> None:
    """Interpreted kernels in float32 against the reference in float64."""
    truth, eager = (results(reference.attention, leaves, options, dtype) for dtype in (torch.float64, torch.float32))
    for n, (got, e, t) in enumerate(zip(results(op, leaves, options, torch.float32), eager, truth, strict=True)):
        finite = t[t.isfinite()]
        size = 4.0 + 4 * float(finite.abs().max()) if finite.numel() else 0.0
        assert_within_budget(f"result {n}", got, e, t, size)


EDGES = [0, 1, 15, 16, 17, 31, 32]


@pytest.mark.parametrize("left", EDGES)
def test_a_window_may_begin_anywhere(left: int, tile: None) -> None:
    for right, t_k in ((0, 48), (2, 41), (None, 48)):
        check(drawn(1, 1, 1, 48, t_k), window=(left, right))


@pytest.mark.parametrize("right", EDGES)
def test_a_window_may_end_anywhere(right: int, tile: None) -> None:
    for left, t_k in ((None, 48), (5, 41)):
        check(drawn(1, 1, 1, 48, t_k), window=(left, right))


@pytest.mark.parametrize("t_k", [30, 47, 48, 49, 64, 80, 81])
def test_a_window_follows_its_alignment(t_k: int, tile: None) -> None:
    check(drawn(1, 1, 1, 48, t_k), window=(20, 3), align="bottom_right")
    check(drawn(1, 1, 1, 48, t_k), window=(20, None), causal="bottom_right")


LENGTHS = {
    "queries": dict(query_lengths=[40, 17, 0]),
    "keys": dict(key_lengths=[50, 16, 1]),
    "both": dict(query_lengths=[40, 33, 5], key_lengths=[50, 20, 33]),
    "beyond the tensors": dict(query_lengths=[99, -1, 40], key_lengths=[-3, 99, 50]),
}


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize(
    "options", [{}, dict(causal="bottom_right"), dict(window=(7, 9), align="bottom_right")], ids=str
)
def test_lengths(lengths: str, options: dict, tile: None) -> None:
    given = {name: torch.tensor(x) for name, x in LENGTHS[lengths].items()}
    check(drawn(3, 2, 1, 40, 50), **given, **options, return_lse=True)


def test_lengths_meet_padding_and_strides(one_tile: None) -> None:
    key_mask = torch.rand(3, 50, generator=torch.Generator().manual_seed(1)) > 0.3
    strided = torch.tensor([[50, 0], [20, 0], [33, 0]])[:, 0]
    check(drawn(3, 2, 1, 40, 50), key_mask=key_mask, key_lengths=strided, query_lengths=strided.int())


@pytest.mark.parametrize("name", ["interpret", "torch", "reference"])
def test_what_lies_past_a_length_reaches_nothing(name: str) -> None:
    """NaN there, in queries too: their rows are 0, and no gradient sees them."""
    leaves, lengths = (
        drawn(2, 2, 2, 20, 30),
        dict(query_lengths=torch.tensor([20, 7]), key_lengths=torch.tensor([9, 30])),
    )
    with use_backend(name):
        good = results(attention, leaves, lengths, torch.float32)
        leaves["q"][1, :, 7:] = torch.nan
        leaves["k"][0, :, 9:], leaves["v"][0, :, 9:] = torch.nan, torch.inf
        got = results(attention, leaves, lengths, torch.float32)
    assert not got[0][1, :, 7:].any() and not got[1][1, :, 7:].any()
    assert all(torch.equal(a, b) for a, b in zip(got, good, strict=True))


PACKED = {
    "two": ([0, 20, 40], [0, 30, 50]),
    "ragged, one empty, a rest": ([0, 17, 17, 35], [0, 5, 20, 48]),
    "no keys for one": ([0, 20, 40], [0, 0, 33]),
}
OPTIONS = [
    dict(causal="bottom_right"),
    dict(window=(9, 5)),
    dict(causal=True, dropout_p=0.3, seed=torch.tensor([3])),
    dict(mask=torch.rand(4, 40, 50, generator=torch.Generator().manual_seed(1)) > 0.3),
    dict(bias=torch.randn(4, 40, 50, generator=torch.Generator().manual_seed(1)), softcap=3.0),
]


@pytest.mark.parametrize("starts", PACKED)
@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: " ".join(options))
def test_packed_sequences(starts: str, options: dict, tile: None) -> None:
    starts_q, starts_k = PACKED[starts]
    options = options | dict(
        cu_seqlens_q=torch.tensor(starts_q, dtype=torch.int32), cu_seqlens_k=torch.tensor(starts_k)
    )
    check(drawn(1, 4, 2, 40, 50, 4, 6), **options, return_lse=True)
    longest = {
        f"max_seqlen_{n}": max(b - a for a, b in itertools.pairwise(x)) for n, x in (("q", starts_q), ("k", starts_k))
    }
    check(drawn(1, 4, 2, 40, 50, 4, 6), **options, **longest)
    too_short = {name: most - 7 for name, most in longest.items()}
    check(drawn(1, 4, 2, 40, 50, 4, 6), **options, **too_short, return_lse=True)


@pytest.mark.parametrize("kind", ["heads", "sequences", "packed"])
def test_linear_biases(kind: str, one_tile: None) -> None:
    generator = torch.Generator().manual_seed(1)
    options: dict = dict(causal="bottom_right", alibi_slopes=torch.rand(4, generator=generator))
    if kind != "heads":
        options["alibi_slopes"] = torch.rand(3, 4, generator=generator, dtype=torch.float64)
    if kind == "packed":
        options |= dict(cu_seqlens_q=torch.tensor([0, 9, 20, 40]), cu_seqlens_k=torch.tensor([0, 20, 33, 50]))
    check(drawn(1 if kind == "packed" else 3, 4, 2, 40, 50), **options)
    check(
        drawn(1 if kind == "packed" else 3, 4, 2, 40, 50),
        **(options | dict(causal=False, window=(12, 12), align="bottom_right")),
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_slopes_of_any_dtype(dtype: torch.dtype, one_tile: None) -> None:
    check(drawn(1, 2, 2, 20, 30), causal=True, alibi_slopes=torch.tensor([0.3, 0.7]).to(dtype))


@pytest.mark.parametrize("sections", [1, 2, 3])  # key heads whose keys and values fit the cache together: of five
def test_sections_of_heads(sections: int, one_tile: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LAUNCHERS, "SECTION_BYTES", sections * 40 * (4 + 4) * 4)
    check(drawn(1, 10, 5, 40, 40), causal=True)


# What differs between batches and heads, and a diagonal that is not at the top left.
OF_EACH_BATCH = dict(
    mask=torch.rand(2, 4, 40, 50, generator=torch.Generator().manual_seed(1)) > 0.4,
    alibi_slopes=torch.rand(2, 4, generator=torch.Generator().manual_seed(1)),
    causal="bottom_right",
)


@pytest.mark.parametrize(
    "softcap", [0.3, 2.0, 50.0]
)  # most scores far past the cap; about it; where tanh is nearly linear
def test_soft_caps(softcap: float, one_tile: None) -> None:
    check(drawn(2, 2, 1, 40, 50), softcap=softcap, return_lse=True)
    check(drawn(2, 2, 1, 40, 50), softcap=softcap, causal=True, dropout_p=0.2, seed=torch.tensor([3]))


def test_a_soft_cap_between_its_series_and_its_formula(one_tile: None) -> None:
    """Scores of 0.04 to 0.9 of the cap: tanh is a series below 1 / 16."""
    q, k = torch.linspace(4, 90, 87).view(1, 1, 87, 1), torch.tensor([1.0, 0.0]).view(1, 1, 2, 1)
    _, lse = attention(q, k, k, scale=1.0, softcap=100.0, return_lse=True)
    exact = torch.logaddexp(100 * torch.tanh(q.double() / 100), torch.zeros(1, dtype=torch.float64))[..., 0]
    assert ((lse - exact).abs() <= 8 * torch.finfo(torch.float32).eps * exact).all()


def test_a_row_that_sees_nothing_gives_no_gradient_to_keys_after_it(one_tile: None) -> None:
    """Its log-sum-exp is -inf, and rows of a tile past the end are none of its neighbours."""
    leaves = dict(q=torch.full((1, 1, 1, 1), -100.0), k=torch.ones(1, 1, 2, 1), v=torch.ones(1, 1, 2, 1))
    k = leaves["k"].requires_grad_()
    out = attention(**leaves, scale=1.0, causal="bottom_right")
    assert torch.equal(torch.autograd.grad(out.sum(), k)[0], torch.zeros_like(k))


SHAPES = [
    tuple(n if bit else 1 for n, bit in zip((2, 4, 40, 50), bits, strict=True))
    for bits in itertools.product((0, 1), repeat=4)
]


@pytest.mark.parametrize("shape", [*SHAPES, (40, 50), (4, 1, 50)], ids=str)
def test_a_bias_and_its_gradient(shape: tuple[int, ...], one_tile: None) -> None:
    check(drawn(2, 4, 2, 40, 50, bias=shape))


@pytest.mark.parametrize(
    "options",
    [
        dict(causal="bottom_right", return_lse=True),
        dict(dropout_p=0.3, seed=torch.tensor([3])),
        dict(
            mask=torch.rand(4, 40, 50, generator=torch.Generator().manual_seed(1)) > 0.4,
            key_lengths=torch.tensor([50, 20]),
        ),
        dict(key_mask=torch.rand(2, 50, generator=torch.Generator().manual_seed(1)) > 0.4, window=(20, 5)),
        dict(softcap=2.0, alibi_slopes=torch.tensor([0.1, 0.2, 0.3, 0.4]), query_lengths=torch.tensor([33, 40])),
        OF_EACH_BATCH,
    ],
    ids=lambda options: " ".join(options),
)
def test_a_bias_beside_everything(options: dict, one_tile: None) -> None:
    check(drawn(2, 4, 2, 40, 50, 4, 6, bias=(4, 1, 50)), **options)


def _far_apart(x: Tensor) -> Tensor:
    """x, and so its gradient, with 4 elements between neighbours along the first axis."""
    return torch.cat([x.flatten(1), x.new_zeros(len(x), 4)], 1)[:, :-4].view(x.shape)


@pytest.mark.parametrize("odd", ["nothing", "q", "k", "v", "out", "mask", "bias"])
def test_a_stride_is_read_whole_beside_those_that_8_divides(odd: str, one_tile: None) -> None:
    def op(**given: Tensor) -> Tensor:
        lay = lambda name, x: _far_apart(x) if name == odd else x  # noqa: E731
        given = {name: lay(name, x) for name, x in given.items()}
        assert {name for name, x in given.items() if any(n % 8 for n in x.stride()[:-1])} == {odd} & given.keys()
        return lay("out", attention(**given))

    leaves = drawn(2, 2, 1, 17, 24, 8, 24, bias=(17, 24))
    check(leaves, op, mask=torch.rand(17, 24, generator=torch.Generator().manual_seed(1)) > 0.4)


def test_a_bias_in_another_dtype_and_layout(one_tile: None) -> None:
    leaves = drawn(1, 2, 2, 40, 50)
    wide = torch.randn(50, 40, generator=torch.Generator().manual_seed(1)).T
    half = {name: x.bfloat16() for name, x in leaves.items()}
    bias = wide.clone(memory_format=torch.preserve_format).requires_grad_()
    out = attention(**half, bias=bias)
    (dbias,) = torch.autograd.grad(out.float().square().sum(), bias)
    assert dbias.dtype == torch.float32 and dbias.shape == bias.shape
    assert torch.equal(out, attention(**half, bias=wide.contiguous()))


@pytest.mark.parametrize(("d", "dv"), [(4, 20), (20, 4), (16, 1), (33, 16)])
def test_other_head_sizes_of_v(d: int, dv: int, one_tile: None) -> None:
    check(drawn(2, 4, 2, 40, 50, d, dv), causal=True, return_lse=True)


@pytest.mark.parametrize("kind", [True, "average"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        dict(causal="bottom_right", return_lse=True),
        dict(window=(9, 3), align="bottom_right", dropout_p=0.3, seed=torch.tensor([3])),
        dict(key_mask=torch.rand(2, 50, generator=torch.Generator().manual_seed(1)) > 0.4),
        dict(
            mask=torch.rand(2, 4, 40, 50, generator=torch.Generator().manual_seed(1)) > 0.9,
            query_lengths=torch.tensor([20, 11]),
        ),
        dict(softcap=2.0, alibi_slopes=torch.tensor([0.1, 0.2, 0.3, 0.4]), key_lengths=torch.tensor([50, 20])),
        dict(bias=torch.randn(2, 4, 40, 50, generator=torch.Generator().manual_seed(1))),
        OF_EACH_BATCH,
    ],
    ids=lambda options: " ".join(options) or "plain",
)
def test_weights(options: dict, kind: bool | str, one_tile: None) -> None:
    check(
        drawn(2, 4, 2, 20, 50),
        **{n: o[..., :20, :] if n in ("mask", "bias") else o for n, o in options.items()},
        return_weights=kind,
    )


def test_weights_in_the_dtype_of_q(one_tile: None) -> None:
    out, weights = attention(
        **{name: x.bfloat16() for name, x in drawn(1, 2, 2, 5, 6).items()}, return_weights="average"
    )
    assert out.dtype == weights.dtype == torch.bfloat16 and weights.shape == (1, 5, 6)


CASES: dict[str, dict] = {
    "window": dict(window=(9, 3)),
    "window, bottom right": dict(window=(9, None), causal="bottom_right"),
    "lengths": dict(query_lengths=torch.tensor([40, 7]), key_lengths=torch.tensor([20, 50]), causal="bottom_right"),
    "alibi": dict(alibi_slopes=torch.tensor([0.1, 0.2, 0.3, 0.4]), causal=True),
    "alibi and bias": dict(
        alibi_slopes=torch.rand(2, 4, generator=torch.Generator().manual_seed(1)), bias=torch.ones(50).cumsum(0)
    ),
    "soft cap": dict(softcap=2.0),
    "weights": dict(return_weights=True, mask=torch.rand(40, 50, generator=torch.Generator().manual_seed(1)) > 0.9),
    "average": dict(return_weights="average", return_lse=True),
}


@pytest.mark.parametrize("name", CASES)
def test_torch_backend(name: str) -> None:
    with use_backend("torch"):
        check(drawn(2, 4, 2, 40, 50), **CASES[name])
        if "softcap" not in CASES[name]:
            check(drawn(2, 4, 2, 40, 50, bias=(4, 1, 50)), **{n: o for n, o in CASES[name].items() if n != "bias"})


ALONE = {
    "whole": [0, 13, 27, 40],
    "one empty, a rest": [0, 9, 9, 20, 33],
    "shorter than the bound": [0, 5, 12, 30, 40],
}


@pytest.mark.parametrize("starts", ALONE)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_torch_backend_takes_packed_sequences_apart(starts: str, dtype: torch.dtype, monkeypatch) -> None:
    """What bounds the lengths saves the scores between sequences; NaN past the last one reaches nothing."""
    plain = importlib.import_module("tileformer.kernels.attention.torch_backend")
    apart, taken = plain._each_alone, []

    def counted(*given):
        taken.append(1)
        return apart(*given)

    monkeypatch.setattr(plain, "_each_alone", counted)
    at = torch.tensor(ALONE[starts], dtype=dtype)
    longest = int(at.diff().max())
    leaves = drawn(1, 4, 2, 40, 40, 4, 6)
    for options in (dict(causal=True), dict(window=(4, 2)), dict(softcap=2.0), dict(causal=True, return_lse=True)):
        with use_backend("torch"):
            check(leaves, **options, cu_seqlens_q=at, cu_seqlens_k=at, max_seqlen_q=longest, max_seqlen_k=longest)
            check(
                leaves, **options, cu_seqlens_q=at, cu_seqlens_k=at, max_seqlen_q=longest - 5, max_seqlen_k=longest - 2
            )
    assert len(taken) == 8
    bounded = dict(causal=True, cu_seqlens_q=at, cu_seqlens_k=at, max_seqlen_q=longest, max_seqlen_k=longest)
    end = ALONE[starts][-1]
    with use_backend("torch"):
        good = results(attention, leaves, bounded, torch.float32)
        for x in leaves.values():
            x[:, :, end:] = torch.nan
        assert all(
            torch.equal(a, b) for a, b in zip(results(attention, leaves, bounded, torch.float32), good, strict=True)
        )
    assert not good[0][:, :, end:].any()


@pytest.mark.parametrize("starts", PACKED)
def test_torch_backend_packed(starts: str) -> None:
    given = {f"cu_seqlens_{n}": torch.tensor(x) for n, x in zip("qk", PACKED[starts], strict=True)}
    with use_backend("torch"):
        for options in (
            dict(causal="bottom_right"),
            dict(window=(9, 5)),
            dict(alibi_slopes=torch.rand(len(PACKED[starts][0]) - 1, 4)),
            dict(causal="bottom_right", max_seqlen_q=11, max_seqlen_k=16),
        ):
            check(drawn(1, 4, 2, 40, 50), **given, **options)


def test_second_derivatives(one_tile: None) -> None:
    """Through the fused backward: windows, lengths, a bias, slopes and a soft cap reach the reference that it
    differentiates."""
    options = dict(
        window=(3, 2),
        align="bottom_right",
        key_lengths=torch.tensor([6, 4]),
        alibi_slopes=torch.tensor([0.2, 0.4]),
        softcap=2.0,
    )
    leaves = {name: x.double() for name, x in drawn(2, 2, 1, 5, 6, bias=(2, 5, 6)).items()}

    def second(op: Callable) -> tuple[Tensor, ...]:
        given = [x.clone().requires_grad_() for x in leaves.values()]
        first = torch.autograd.grad(
            op(**dict(zip(leaves, given, strict=True)), **options).square().sum(), given, create_graph=True
        )
        return torch.autograd.grad(sum(x.square().sum() for x in first), given)

    for got, expected in zip(second(attention), second(reference.attention), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


Q, K = torch.zeros(1, 4, 5, 8), torch.zeros(1, 2, 6, 8)
STARTS = dict(cu_seqlens_q=torch.tensor([0, 5]), cu_seqlens_k=torch.tensor([0, 6]))
BAD: dict[str, tuple[type[Exception], str, dict]] = {
    "window of one side": (TypeError, r"window is \(1,\)", dict(window=(1,))),
    "negative window": (ValueError, "each side must be an integer >= 0", dict(window=(-1, 0))),
    "window of halves": (ValueError, "each side must be an integer >= 0", dict(window=(0.5, 0))),
    "align": (ValueError, "align is 'centre'", dict(align="centre")),
    "two alignments": (ValueError, "differ", dict(causal="top_left", align="bottom_right")),
    "soft cap": (ValueError, "softcap is -1.0", dict(softcap=-1.0)),
    "weights": (ValueError, "return_weights is 'sum'", dict(return_weights="sum")),
    "slopes": (ValueError, r"alibi_slopes must be floating \(4,\) or \(1, 4\)", dict(alibi_slopes=torch.ones(2))),
    "slopes' gradient": (NotImplementedError, "get no gradient", dict(alibi_slopes=torch.ones(4, requires_grad=True))),
    "boolean bias": (TypeError, "bias is bool", dict(bias=torch.ones(5, 6, dtype=torch.bool))),
    "two floating masks": (ValueError, "both floating", dict(bias=torch.ones(5, 6), mask=torch.ones(5, 6))),
    "bias shape": (ValueError, "does not expand", dict(bias=torch.ones(5, 7))),
    "v's length": (ValueError, "all but the last axis must be equal", dict(v=K[:, :, :5])),
    "v's head size": (ValueError, "head size of v 300", dict(v=torch.zeros(1, 2, 6, 300))),
    "lengths' dtype": (TypeError, "key_lengths is float32", dict(key_lengths=torch.ones(1))),
    "lengths' shape": (ValueError, r"query_lengths has shape \(2,\)", dict(query_lengths=torch.ones(2).long())),
    "longest alone": (ValueError, "belong to cu_seqlens_q", dict(max_seqlen_q=5)),
    "starts of one": (ValueError, "go together", dict(cu_seqlens_q=torch.tensor([0, 5]))),
    "starts of another number": (ValueError, "must both be", STARTS | dict(cu_seqlens_k=torch.tensor([0, 3, 6]))),
    "packed batch": (
        ValueError,
        "batch of 2",
        STARTS | dict(q=Q.expand(2, 4, 5, 8), k=K.expand(2, 2, 6, 8), v=K.expand(2, 2, 6, 8)),
    ),
    "packed padding": (ValueError, "do not go together", STARTS | dict(key_mask=torch.ones(1, 6, dtype=torch.bool))),
    "packed weights": (NotImplementedError, "no common shape", STARTS | dict(return_weights=True)),
    "packed bias": (
        NotImplementedError,
        "no gradient with packed",
        STARTS | dict(bias=torch.ones(5, 6, requires_grad=True)),
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input_raises(what: str) -> None:
    error, message, changed = BAD[what]
    with use_backend("interpret"), pytest.raises(error, match=message):
        attention(**(dict(q=Q, k=K, v=K) | changed))
