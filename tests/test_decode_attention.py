"""One step of decoding: its values beside the definition, what it reads and launches, what it refuses, and the store."""

import math
import re
import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from tileformer.bench.calls.cases import CASES
from tileformer.bench.check.run import examine
from tileformer.bench.recording import MULTIPROCESSORS
from tileformer.bench.static.traffic import Counter
from tileformer.kernels import append_kv_cache, attention, decode_attention, launch, reference, use_backend

DECODE = sys.modules["tileformer.kernels.attention.decode"]
LAUNCHERS = sys.modules["tileformer.kernels.attention.decode.launchers"]
CPU = torch.device("cpu")
CALLS = [call for call in CASES if call.op == "decode_attention"]
INTERPRETED = (
    "one token", "empty", "several tokens", "large pages", "odd pages", "beams of a source", "32 beams", "window",
    "window of beams", "all of these", "bias of heads", "head size 40", "no slot", "no row", "far rows", "misaligned",
    "8 bits", "8 bits, all of these",
)  # fmt: skip


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


@pytest.fixture
def short_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Splits of 32 slots, so that a few dozens make several."""
    monkeypatch.setattr(LAUNCHERS, "LEAST_KEYS", 32)


@pytest.mark.compat
@pytest.mark.parametrize("name", INTERPRETED)
def test_values_are_within_budget(name: str, backend: str, device: torch.device) -> None:
    call = next(call for call in CALLS if call.name == name)
    dtype = call.dtypes[len(name) % len(call.dtypes)]
    over = examine(call, dtype, backend, device, runs=1).over_budget
    assert over and all(x <= 1 for x in over.values()), over


@pytest.mark.interprets
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "name", ["pages", "beams, several tokens", "bias of rows", "soft cap", "padded left", "many rows"]
)
def test_values_of_several_splits_are_within_budget(name: str, dtype: str, short_splits: None) -> None:
    over = examine(next(call for call in CALLS if call.name == name), dtype, "interpret", CPU, runs=1).over_budget
    assert over and all(x <= 1 for x in over.values()), over


@pytest.mark.parametrize("call", [call for call in CALLS if "far" not in call.name], ids=lambda call: call.name)
def test_the_torch_backend_is_within_budget(call) -> None:
    over = examine(call, call.dtypes[0], "torch", CPU, runs=1).over_budget
    assert over and all(x <= 1 for x in over.values()), over


BACKENDS = pytest.mark.parametrize("named", ["torch", pytest.param("interpret", marks=pytest.mark.interprets)])


@BACKENDS
def test_decoding_token_by_token_is_causal_attention(named: str, short_splits: None) -> None:
    b, h, h_kv, t, d = 2, 4, 2, 70, 16
    q, k, v = torch.randn(b, h, t, d), torch.randn(b, h_kv, t, d), torch.randn(b, h_kv, t, d)
    with use_backend("reference"):
        full, full_lse = attention(q, k, v, causal=True, window=(40, 0), return_lse=True)
    caches = torch.full((2, b, h_kv, t + 9, d), math.nan)
    end = 0
    with use_backend(named):
        for tokens in (16, 16, 1, 1, 9, 16, 11):
            new, end = slice(end, end + tokens), end + tokens
            append_kv_cache(k[:, :, new], v[:, :, new], caches[0], caches[1], ints(end, end))
            out, lse = decode_attention(q[:, :, new], caches[0], caches[1], ints(end, end), window=40, return_lse=True)
            assert (out - full[:, :, new]).abs().max() < 1e-5 and (lse - full_lse[:, :, new]).abs().max() < 1e-5
    assert end == t and caches[:, :, :, t:].isnan().all()


@BACKENDS
def test_beams_that_share_slots_are_beams_with_caches_of_their_own(named: str, short_splits: None) -> None:
    """Three beams over 12 steps, after each of which beams continue others: nothing moves but words."""
    b, beams, h, d, prompt = 2, 3, 2, 16, 20
    capacity = prompt + 12 * beams
    cache = torch.full((2, b, h, capacity, d), math.nan)
    cache[:, :, :, :prompt] = torch.randn(2, b, h, prompt, d)
    own = cache[:, :, :, :prompt].repeat_interleave(beams, 1)
    words = torch.full((b, capacity), (1 << beams) - 1, dtype=torch.int32)
    length = torch.full((b,), prompt, dtype=torch.int32)
    bit = 1 << torch.arange(beams, dtype=torch.int32)
    for _ in range(12):
        new, q = torch.randn(2, b * beams, h, 1, d), torch.randn(b * beams, h, 1, d)
        length = length + beams
        end = int(length[0])
        words[:, end - beams : end] = bit
        own = torch.cat([own, new], 3)
        with use_backend(named):
            append_kv_cache(new[0], new[1], cache[0], cache[1], length, beams=beams)
            out = decode_attention(q, cache[0], cache[1], length, beams=beams, descends=words)
        every = torch.full((b * beams,), own.shape[3], dtype=torch.int32)
        lone = reference.decode_attention(q, own[0], own[1], every)
        assert (out - lone).abs().max() < 1e-5
        parents = torch.randint(beams, (b, beams))
        own = own.unflatten(1, (b, beams)).take_along_dim(parents[None, :, :, None, None, None], 2).flatten(1, 2)
        words = (((words[:, None] >> parents[:, :, None].int()) & 1) << torch.arange(beams)[:, None]).sum(1).int()


@BACKENDS
def test_a_row_without_a_key_is_zero(named: str, short_splits: None) -> None:
    q, cache = torch.randn(3, 2, 2, 16), torch.randn(3, 1, 100, 16)
    cache[0] = math.nan
    with use_backend(named):
        out, lse = decode_attention(q, cache, cache, ints(0, 1, 100), starts=ints(0, 0, 100), return_lse=True)
    assert not out[0].any() and not out[1, :, 0].any() and not out[2].any()
    assert (lse == -math.inf).sum() == 10 and out[1, :, 1].equal(cache[1, :, 0].expand(2, 16))


@BACKENDS
@pytest.mark.parametrize("pages", [False, True])
@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("int8", [False, True])
def test_the_store_puts_tokens_where_the_definition_does(named: str, pages: bool, beams: int, int8: bool) -> None:
    for lengths in (ints(0, 5), ints(40, 40), ints(48, 48), ints(50, 2), ints(17, 33), ints(3, 90)):
        k, v = torch.randn(2 * beams, 2, 3, 20), torch.randn(3, 2 * beams, 2, 8).permute(1, 2, 0, 3)
        k[0, 0], k[0, 1], k[1, 0, :, 3], v[0, 0, :, 1], v[1, 1] = 0.0, 1e-40, math.nan, -math.inf, v[1, 1] * 1e30
        k[1, 1] = torch.arange(-20.0, 40.0).view(3, 20) * 0.5  # ties
        k[1, 1, :, 0] = 63.5
        shape, order = ((7, 16, 2), (0, 1, 2, 3)) if pages else ((2, 48, 2), (0, 2, 1, 3))
        dtype = torch.int8 if int8 else torch.float32
        caches = [torch.zeros(*shape, d, dtype=dtype).permute(order) for d in (20, 8)]
        caches += [torch.zeros(shape).permute(order[:3]) for _ in range(2 * int8)]
        wanted = [x.clone() for x in caches]
        named_scales = [dict(zip(("k_scale", "v_scale"), x[2:], strict=False)) for x in (wanted, caches)]
        options: dict[str, Any] = dict(beams=beams) | (
            dict(page_table=ints(3, 1, 5, 0, -1, 6).view(2, 3)) if pages else {}
        )
        reference.append_kv_cache(k, v, wanted[0], wanted[1], lengths, **options, **named_scales[0])
        with use_backend(named):
            append_kv_cache(k, v, caches[0], caches[1], lengths, **options, **named_scales[1])
        for ours, theirs in zip(caches, wanted, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


class _Noted(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.ops: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.ops.append(func.name())
        return func(*args, **(kwargs or {}))


def test_two_steps_launch_the_same_and_read_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a CUDA graph needs: neither a grid nor an operator depends on a value."""
    launched: list[tuple] = []

    def note(self: launch.Launch, *tensors: Tensor) -> None:
        arguments = self.arrange(*tensors) if self.arrange else tensors
        numbers = [x for x in arguments if not isinstance(x, (Tensor, tuple))]
        launched.append((self.kernel.fn.__name__, self.grid(self.tiles[0]), self.scalars, numbers))

    monkeypatch.setattr(launch.Launch, "__call__", note)
    monkeypatch.setattr(LAUNCHERS, "arch_of", lambda x: 90)
    monkeypatch.setattr(DECODE, "decode", LAUNCHERS.decode_attention_fwd)  # the mode does not see into an op
    monkeypatch.setattr(DECODE, "store", LAUNCHERS.append_kv)
    steps = []
    pages, table = torch.zeros(2, 32, 128, 8, 64, dtype=torch.bfloat16).unbind(), torch.zeros(1, 32, dtype=torch.int32)
    for length in (1, 3000):
        launched.clear()
        with use_backend("interpret"), _Noted() as mode:
            new = torch.zeros(1, 8, 1, 64, dtype=torch.bfloat16)
            append_kv_cache(new, new, pages[0], pages[1], ints(length), page_table=table)
            decode_attention(new, pages[0], pages[1], ints(length), page_table=table)
        of_the_test = re.compile("zeros|unbind|lift_fresh|promote_types")
        steps.append(([*launched], [op.partition(".")[0] for op in mode.ops if not of_the_test.search(op)]))
    assert steps[0] == steps[1]
    names = [name for name, *_ in steps[0][0]]
    assert names == ["_append_kv_kernel", "_decode_split_kernel", "_decode_merge_kernel"]
    assert steps[0][1] == [
        "aten::empty_permuted", "aten::empty", "aten::empty", "aten::empty",
    ]  # fmt: skip  # the output, the log-sum-exp, and the same of the splits


@pytest.mark.parametrize("arch", [80, 90])
def test_splits_fill_the_multiprocessors(arch: int) -> None:
    count = MULTIPROCESSORS[arch]
    assert min(count, 8 * LAUNCHERS.splits_of(8, 4096, count)) / count >= 0.9
    for programs in (0, 1, 5, 8, 64, 1000):
        for slots in (0, 1, 255, 511, 512, 4096, 131072):
            n = LAUNCHERS.splits_of(programs, slots, count)
            assert n & (n - 1) == 0 and 1 <= n <= 64 and n * 256 <= max(slots, 256)
    assert LAUNCHERS.splits_of(2 * count, 10**6, count) == 1


@pytest.mark.interprets
@pytest.mark.parametrize("page", [0, 16])
def test_keys_and_values_are_read_once_and_partial_results_are_few(page: int, monkeypatch: pytest.MonkeyPatch) -> None:
    b, h_kv, group, d, slots = 2, 1, 4, 32, 1024
    lengths = ints(1000, 300)
    shape = (b * slots // page, page, h_kv, d) if page else (b, h_kv, slots, d)
    k, v = torch.randn(*shape, dtype=torch.float16), torch.randn(*shape, dtype=torch.float16)
    table = torch.randperm(b * slots // 16).view(b, -1).int() if page else None
    parts: list[Tensor] = []
    original = torch.empty

    def empty(*args, **more) -> Tensor:
        parts.append(original(*args, **more))
        return parts[-1]

    monkeypatch.setattr(torch, "empty", empty)
    counter = Counter()
    with use_backend("interpret"), counter.counting():
        q = torch.randn(b, h_kv * group, 1, d, dtype=torch.float16)
        decode_attention(q, k, v, lengths, page_table=table)
    read = 2 * int(lengths.sum()) * h_kv * d
    assert counter.bytes("forward", k) == counter.bytes("forward", v) == (read, read)
    moved = sum(counter.bytes("forward", x)[0] for x in parts if x.dim() == 5)
    assert parts[-2].shape == (b, 4, 1, 4, d) and 0 < moved <= 2 * read * group / 128


@pytest.mark.parametrize("pages", [False, True])
def test_tiles_wait_for_a_look_up(pages: bool) -> None:
    first, last = LAUNCHERS.tiles_of(90, 128, torch.bfloat16, 1, pages, False)
    assert first["num_stages"] == (5 if pages else 3) and last["BLOCK_N"] == 16
    assert LAUNCHERS.tiles_of(90, 128, torch.bfloat16, 1000, pages, False)[0]["BLOCK_M"] == 64


def test_what_does_not_fit_is_refused() -> None:
    q, cache, lengths = torch.zeros(2, 4, 1, 16), torch.zeros(2, 2, 64, 16), ints(3, 4)
    pages, table = torch.zeros(8, 16, 2, 16), ints(*range(8)).view(2, 4)
    wide = torch.zeros(2, 2, 64, 257)
    words = torch.zeros(2, 64, dtype=torch.int32)
    assert not decode_attention(q, cache, cache, lengths).any()  # the same shapes are known now
    for text, q_, k_, v_, n, options in (
        ("q must be", q[0], cache, cache, lengths, {}),
        ("k must be \\(pages", q, cache[0], cache[0], lengths, dict(page_table=table)),
        ("k is float64, q float32", q, cache.double(), cache, lengths, {}),
        ("lengths is int64", q, cache, cache, lengths.long(), {}),
        ("lengths has shape", q, cache, cache, ints(1), {}),
        ("beams is 3", q, cache, cache, lengths, dict(beams=3)),
        ("beams is 0", q, cache, cache, lengths, dict(beams=0)),
        ("17 new tokens", torch.zeros(2, 4, 17, 16), cache, cache, lengths, {}),
        ("all but the last axis", q, cache, cache[:, :1], lengths, {}),
        ("head size must be equal", q[..., :8], cache, cache, lengths, {}),
        ("outside 1 to 256", q, cache, wide, lengths, {}),
        ("3 query heads", q[:, :3], cache, cache, lengths, {}),
        ("a batch of 2, not 1", q[:1], cache, cache, lengths, {}),
        ("pages of 8 slots", q, pages[:, :8], pages[:, :8], lengths, dict(page_table=table)),
        ("page_table has shape", q, pages, pages, lengths, dict(page_table=table[0])),
        ("descends has shape", q, cache, cache, lengths, dict(descends=words[:, :9])),
        ("starts is int64", q, cache, cache, lengths, dict(starts=lengths.long())),
        ("window is", q, cache, cache, lengths, dict(window=(1, 2, 3))),
        ("each side", q, cache, cache, lengths, dict(window=-1)),
        ("causal is 'top_left'", q, cache, cache, lengths, dict(causal="top_left")),
        ("softcap is -1", q, cache, cache, lengths, dict(softcap=-1.0)),
        ("bias", q, cache, cache, lengths, dict(bias=torch.zeros(3))),
        ("bias must be floating", q, cache, cache, lengths, dict(bias=words)),
        ("k is int8, v is int8, k_scale None", q, cache.to(torch.int8), cache.to(torch.int8), lengths, {}),
        ("k is float32.*k_scale given", q, cache, cache, lengths, dict(k_scale=cache[..., 0], v_scale=cache[..., 0])),
        ("v_scale None", q, cache.to(torch.int8), cache.to(torch.int8), lengths, dict(k_scale=cache[..., 0])),
        (
            "v_scale is float32 \\(2, 2, 9\\)",
            q,
            cache.to(torch.int8),
            cache.to(torch.int8),
            lengths,
            dict(k_scale=cache[..., 0], v_scale=cache[..., :9, 0]),
        ),
        ("lengths must be a torch.Tensor", q, cache, cache, [1, 2], {}),
        ("scale=", q, cache, cache, lengths, dict(softmax_scale=1.0)),
    ):
        with pytest.raises((ValueError, TypeError), match=text):
            decode_attention(q_, k_, v_, n, **options)
    with pytest.raises(ValueError, match="k has shape .* takes"):
        append_kv_cache(q[:, :1], q[:, :1], cache, cache, lengths)
    with use_backend("interpret"), pytest.raises(ValueError, match="last axis must be contiguous"):
        decode_attention(q, cache.transpose(2, 3).contiguous().transpose(2, 3), cache, lengths)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated:DeprecationWarning")  # torch's forward mode
def test_a_derivative_is_refused() -> None:
    q, cache = torch.zeros(1, 1, 1, 8, requires_grad=True), torch.zeros(1, 1, 4, 8)
    with pytest.raises(NotImplementedError, match="under torch.no_grad"):
        decode_attention(q, cache, cache, ints(1))
    with pytest.raises(NotImplementedError, match="append_kv_cache"):
        append_kv_cache(q, q, cache, cache, ints(1))
    with torch.autograd.forward_ad.dual_level(), pytest.raises(NotImplementedError):
        dual = torch.autograd.forward_ad.make_dual(q.detach(), torch.ones_like(q))
        decode_attention(dual, cache, cache, ints(1))
    with torch.no_grad():
        assert decode_attention(q, cache, cache, ints(1)).shape == q.shape


def test_shapes_are_known_without_values() -> None:
    with FakeTensorMode(), use_backend("interpret"):
        q, cache = torch.empty(6, 4, 2, 16, dtype=torch.float16), torch.empty(2, 2, 64, 16, dtype=torch.float16)
        lengths = torch.zeros(2, dtype=torch.int32)
        append_kv_cache(torch.empty(2, 2, 1, 16, dtype=torch.float16), cache[:, :, :1], cache, cache, lengths)
        out, lse = decode_attention(q, cache, cache[..., :8], lengths, beams=3, return_lse=True)
    assert out.shape == (6, 4, 2, 8) and out.dtype == torch.float16 and out.transpose(1, 2).is_contiguous()
    assert lse.shape == (6, 4, 2) and lse.dtype == torch.float32


def test_one_long_row_is_read_no_further_than_it_reaches_on_the_cpu() -> None:
    """What lies past the longest row's end costs the torch backend nothing: it is not even touched."""
    cache = torch.empty(1, 1, 1, 8).expand(1, 1, 2**40, 8)
    assert decode_attention(torch.zeros(1, 1, 1, 8), cache, cache, ints(3)).shape == (1, 1, 1, 8)
