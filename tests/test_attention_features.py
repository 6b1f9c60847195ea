"""What attention promises beyond single calls: features in pairs, memory saved, work done, compilations, exported
dropout bits, refusals."""

import itertools
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tileformer.bench.calls import Call, pairs
from tileformer.bench.check.run import examine
from tileformer.bench.static.traffic import Counter
from tileformer.kernels import attention, dropout_keep, reference, use_backend
from tileformer.kernels.attention import launchers
from tileformer.kernels.attention.tiles import FORWARD, tiles_for

pytestmark = pytest.mark.interprets


def _qkv(b: int, h: int, h_kv: int, t_q: int, t_k: int, d: int, dv: int | None = None) -> list[Tensor]:
    torch.manual_seed(0)
    sizes = ((h, t_q, d), (h_kv, t_k, d), (h_kv, t_k, dv or d))
    return [torch.randn(b, n, t, size, requires_grad=True) for n, t, size in sizes]


@pytest.fixture
def gpu_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter takes the tiles of an H100."""
    monkeypatch.setattr(launchers, "arch_of", lambda x: 90)


@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(causal=True, key_mask=torch.arange(96) < torch.tensor([[96], [50]])),
        dict(mask=torch.rand(96, 96) > 0.2, dropout_p=0.1),
        dict(bias=torch.randn(2, 1, 96, 96), window=9, softcap=3.0),
        dict(query_lengths=torch.tensor([96, 7]), key_lengths=torch.tensor([96, 50]), alibi_slopes=torch.ones(2)),
    ],
    ids=["plain", "causal padded", "mask and dropout", "bias", "lengths"],
)
def test_backward_keeps_nothing_of_the_size_of_the_scores(options: dict) -> None:
    q, k, v = _qkv(2, 2, 1, 96, 96, 16)
    given = {id(x) for x in options.values() if isinstance(x, Tensor)}
    kept: dict[int, Tensor] = {}

    def keep(x: Tensor) -> Tensor:
        if id(x) not in given:
            kept[x.untyped_storage().data_ptr()] = x
        return x

    with use_backend("interpret"), torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        out, lse = attention(q, k, v, return_lse=True, **options)
    allowed = sum(x.untyped_storage().nbytes() for x in (q, k, v, out, lse))
    small = 2 * 8 * 4 + 8 + sum(x.untyped_storage().nbytes() for x in options.values() if isinstance(x, Tensor))
    assert sum(x.untyped_storage().nbytes() for x in kept.values()) <= allowed + small


def _dots(call: Callable[[], object]) -> int:
    counter = Counter()
    with use_backend("interpret"), counter.counting(), torch.no_grad():
        call()
    return counter.dots["forward"]


def test_causal_work_is_little_more_than_the_triangle(gpu_tiles: None) -> None:
    T, D = 4096, 128
    q, k, v = _qkv(1, 1, 1, T, T, D)
    useful = 4 * D * T * (T + 1) // 2
    assert 1.0 <= _dots(lambda: attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), causal=True)) / useful <= 1.04


def test_a_padded_batch_costs_little_more_than_a_packed_one(gpu_tiles: None) -> None:
    lengths, D = torch.tensor([300, 2500, 900, 396]), 64
    total, longest = int(lengths.sum()), 4096
    packed = [x.bfloat16() for x in _qkv(1, 1, 1, total, total, D)]
    padded = [x.bfloat16() for x in _qkv(4, 1, 1, longest, longest, D)]
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    one = _dots(lambda: attention(*packed, cu_seqlens_q=starts, cu_seqlens_k=starts, max_seqlen_q=2500, causal=True))
    other = _dots(lambda: attention(*padded, query_lengths=lengths, key_lengths=lengths, causal=True))
    assert one > 0 and other <= 1.1 * one


@pytest.mark.parametrize("window", [64, (None, 0)])
def test_key_tiles_outside_every_window_and_length_are_never_loaded(window: object, gpu_tiles: None) -> None:
    T, D = 1024, 64
    q, k, v = (x.bfloat16().detach() for x in _qkv(1, 1, 1, T, T, D))
    full = _dots(lambda: attention(q, k, v))
    assert _dots(lambda: attention(q, k, v, window=window)) < 0.6 * full
    assert _dots(lambda: attention(q, k, v, key_lengths=torch.tensor([128]))) * 8 == full


def test_a_row_of_the_table_exists_for_every_head_size() -> None:
    for size in range(1, 257):
        for feature in ("plain", "mask", "dropout", "both"):
            tile = tiles_for(FORWARD, 90, size, torch.bfloat16, feature)[0]
            assert tile["BLOCK_MASKED"] <= tile["BLOCK_N"] and tile["BLOCK_N"] % tile["BLOCK_MASKED"] == 0


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_exported_bits_are_those_of_the_call(packed: bool) -> None:
    p, seed = 0.4, torch.tensor([31415926])
    q, k, v = (x.detach() for x in _qkv(1, 2, 1, 30, 30, 16))
    v = torch.eye(30)[None, None]  # the output is the weights
    starts = torch.tensor([0, 11, 30])
    options = dict(cu_seqlens_q=starts, cu_seqlens_k=starts) if packed else {}
    shape = (2, 2, 19, 19) if packed else (1, 2, 30, 30)
    for backend in ("interpret", "torch", "reference"):
        if packed and backend == "torch":
            continue  # its bits are drawn for the whole batch
        with use_backend(backend):
            keep = dropout_keep(seed, shape, p)
            out = attention(q, k, v, dropout_p=p, seed=seed, **options)
        if packed:
            whole = torch.zeros(1, 2, 30, 30, dtype=torch.bool)
            whole[0, :, :11, :11], whole[0, :, 11:, 11:] = keep[0, :, :11, :11], keep[1, :, :19, :19]
            keep = whole
        assert torch.equal(out != 0, keep), backend
        assert abs(keep.float().mean() - (1 - p if not packed else (1 - p) * (121 + 361) / 900)) < 0.05


def test_the_reference_with_exported_bits_equals_the_kernel() -> None:
    p, seed = 0.3, torch.tensor([7])
    q, k, v = (x.detach() for x in _qkv(2, 2, 2, 33, 40, 16))
    with use_backend("interpret"):
        out, keep = attention(q, k, v, dropout_p=p, seed=seed), dropout_keep(seed, (2, 2, 33, 40), p)
    weights = torch.softmax((q @ k.mT).double() / 4, -1) * keep / (1 - p)
    torch.testing.assert_close(out, (weights @ v.double()).float(), rtol=1e-5, atol=1e-5)


def test_checkpointing_replays_the_same_dropout() -> None:
    q, k, v = _qkv(1, 2, 2, 20, 20, 16)
    gradients = []
    for wrap in (lambda f, *x: f(*x), lambda f, *x: torch.utils.checkpoint.checkpoint(f, *x, use_reentrant=False)):
        torch.manual_seed(5)
        with use_backend("interpret"):
            out = wrap(lambda q, k, v: attention(q, k, v, dropout_p=0.5), q, k, v)
            gradients.append(torch.autograd.grad(out.square().sum(), (q, k, v)))
    assert all(map(torch.equal, *gradients))


@pytest.mark.parametrize("name", ["interpret", "torch"])
@pytest.mark.parametrize("average", [True, "average"])
def test_weights_have_gradients_and_are_those_of_the_output(name: str, average: object) -> None:
    q, k, v = _qkv(2, 4, 2, 20, 30, 16, dv=8)
    options = dict(causal="bottom_right", key_lengths=torch.tensor([30, 0]), return_weights=average)
    with use_backend(name):
        out, weights = attention(q, k, v, **options)
    expected_out, expected = reference.attention(*(x.double() for x in (q, k, v)), **options)
    torch.testing.assert_close(weights.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(out.double(), expected_out, rtol=1e-5, atol=1e-6)
    assert weights.shape == ((2, 20, 30) if average == "average" else (2, 4, 20, 30))
    assert not weights[1].any()
    got = torch.autograd.grad((weights * torch.arange(30)).sum(), (q, k))
    truth = torch.autograd.grad((expected * torch.arange(30)).sum(), (q, k))
    for x, y in zip(got, truth, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("wanted", ["q", "k", "v", "bias"])
def test_second_derivatives_of_everything_at_once(wanted: str) -> None:
    torch.manual_seed(0)
    tensors = dict(
        q=torch.randn(1, 2, 5, 4), k=torch.randn(1, 1, 7, 4), v=torch.randn(1, 1, 7, 3), bias=torch.randn(2, 5, 1)
    )
    leaves = {name: x.double().requires_grad_() for name, x in tensors.items()}
    options = dict(window=(3, 2), softcap=2.0, alibi_slopes=torch.tensor([0.3, 0.1]), query_lengths=torch.tensor([4]))
    with use_backend("interpret"):
        assert torch.autograd.gradgradcheck(
            lambda x: attention(**(leaves | {wanted: x}), **options), leaves[wanted], atol=1e-4, fast_mode=True
        )


_COUNT = """
import torch
from tileformer.bench.recording import record
from tileformer.kernels import attention, use_backend
seen = {}
with record(90) as launches, use_backend("triton"):
    for n in range(20):
        q, k, v = (torch.empty(2, 4, 100 + 17 * n, 64, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
        attention(q, k, v, causal=True, key_mask=torch.ones(2, 100 + 17 * n, dtype=torch.bool)).sum().backward()
for launch in launches:
    seen.setdefault(launch.binary.name, set()).add(launch.binary.cubin)
print(max(map(len, seen.values())), len(launches))
"""


@pytest.mark.aot
def test_twenty_lengths_compile_each_kernel_at_most_three_times() -> None:
    done = subprocess.run(
        [sys.executable, "-c", _COUNT], capture_output=True, text=True, check=False, env=subprocess_env()
    )
    assert done.returncode == 0, done.stderr
    most, launches = map(int, done.stdout.split())
    assert most <= 3 and launches == 80


def subprocess_env() -> dict[str, str]:
    import os

    import tileformer

    return dict(os.environ, PYTHONPATH=os.pathsep.join([os.path.dirname(path) for path in tileformer.__path__][:1]))


_Q, _K = torch.zeros(2, 4, 5, 8), torch.zeros(2, 2, 6, 8)
_PACKED_Q, _PACKED_K = torch.zeros(1, 4, 5, 8), torch.zeros(1, 2, 6, 8)
_STARTS = torch.tensor([0, 2, 5])


@pytest.mark.parametrize(
    ("error", "message", "q", "k", "options"),
    [
        (ValueError, r"window is -1", _Q, _K, dict(window=-1)),
        (TypeError, r"window is 'left'", _Q, _K, dict(window="left")),
        (ValueError, r"align is 'left'", _Q, _K, dict(align="left")),
        (ValueError, r"causal='top_left' and align='bottom_right' differ", _Q, _K, dict(causal="top_left", align="bottom_right")),
        (ValueError, r"softcap is -2.0", _Q, _K, dict(softcap=-2.0)),
        (ValueError, r"return_weights is 'mean'", _Q, _K, dict(return_weights="mean")),
        (TypeError, r"key_lengths is float32", _Q, _K, dict(key_lengths=torch.ones(2))),
        (ValueError, r"query_lengths has shape \(3,\), the batch is 2", _Q, _K, dict(query_lengths=torch.ones(3, dtype=torch.int32))),
        (ValueError, r"alibi_slopes must be floating \(4,\) or \(2, 4\)", _Q, _K, dict(alibi_slopes=torch.ones(2))),
        (NotImplementedError, r"alibi_slopes get no gradient", _Q, _K, dict(alibi_slopes=torch.ones(4, requires_grad=True))),
        (TypeError, r"bias is bool", _Q, _K, dict(bias=torch.ones(5, 6, dtype=torch.bool))),
        (ValueError, r"mask and bias are both floating", _Q, _K, dict(bias=torch.ones(5, 6), mask=torch.ones(5, 6))),
        (ValueError, r"bias of shape \(5, 7\) does not expand", _Q, _K, dict(bias=torch.ones(5, 7))),
        (ValueError, r"go together", _PACKED_Q, _PACKED_K, dict(cu_seqlens_q=_STARTS)),
        (ValueError, r"q has a batch of 2", _Q, _K, dict(cu_seqlens_q=_STARTS, cu_seqlens_k=_STARTS)),
        (ValueError, r"must both be \(sequences \+ 1,\)", _PACKED_Q, _PACKED_K, dict(cu_seqlens_q=_STARTS, cu_seqlens_k=_STARTS[:2])),
        (ValueError, r"max_seqlen_k belong to", _Q, _K, dict(max_seqlen_q=3)),
        (ValueError, r"key_mask and cu_seqlens do not go together", _PACKED_Q, _PACKED_K,
         dict(cu_seqlens_q=_STARTS, cu_seqlens_k=_STARTS, key_mask=torch.ones(1, 6, dtype=torch.bool))),
        (NotImplementedError, r"weights of packed sequences", _PACKED_Q, _PACKED_K,
         dict(cu_seqlens_q=_STARTS, cu_seqlens_k=_STARTS, return_weights=True)),
        (NotImplementedError, r"bias has no gradient with packed sequences", _PACKED_Q, _PACKED_K,
         dict(cu_seqlens_q=_STARTS, cu_seqlens_k=_STARTS, bias=torch.ones(5, 6, requires_grad=True))),
    ],
)  # fmt: skip
def test_refusals_name_the_argument_both_values_and_the_fix(
    error: type, message: str, q: Tensor, k: Tensor, options: dict
) -> None:
    with use_backend("interpret"), pytest.raises(error, match=message):
        attention(q, k, k, **options)


def test_the_pairs_are_all_pairs() -> None:
    rows, names = pairs._rows(), list(pairs.FACTORS)
    for a, b in itertools.combinations(names, 2):
        met = {(row[a], row[b]) for row in rows}
        assert met == set(itertools.product(pairs.FACTORS[a], pairs.FACTORS[b]))
    assert len(rows) <= 40


@pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in pairs.PAIRS])
def test_features_meet_in_pairs(case: Call) -> None:
    found = examine(case, case.dtypes[0], "interpret", torch.device("cpu"), runs=1)
    assert found.passed, f"{case.reason}: {found.verdict}"
