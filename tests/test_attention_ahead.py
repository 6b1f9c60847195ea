"""The forward loop that works one tile ahead, through tensor descriptors: its values and gradients, who gets it, and
the memory it borrows."""

import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import triton
from torch import Tensor
from triton.runtime import _allocation

from tileformer.bench.calls import describe
from tileformer.bench.check.run import examine
from tileformer.kernels import attention, launch, use_backend
from tileformer.kernels.attention.tiles import FORWARD, tiles_for

LAUNCHERS = sys.modules["tileformer.kernels.attention.launchers"]

CALLS = {  # shape (B, H, H_kv, T_q, T_k, D), options; tiles are 32 x 32, masked ones 16 wide
    "one whole tile": ((1, 1, 1, 32, 32, 16), {}),
    "two tiles and a tail": ((2, 2, 2, 20, 70, 32), {}),
    "many tiles, shared key heads": ((1, 4, 2, 40, 200, 16), {}),
    "causal": ((1, 2, 2, 130, 130, 32), dict(causal=True)),
    "causal, more keys": ((1, 2, 1, 50, 150, 16), dict(causal="bottom_right")),
    "causal, more queries": ((1, 1, 1, 150, 50, 16), dict(causal="bottom_right")),
    "a window to the right": ((1, 1, 1, 70, 140, 16), dict(window=(None, 30))),
    "another value size": ((1, 2, 2, 40, 100, 64), dict(dv=16)),
    "heads last in memory": ((2, 2, 2, 40, 100, 16), dict(heads_last=True)),
    "a negative scale": ((1, 1, 1, 40, 100, 16), dict(scale=-0.3)),
}


@pytest.fixture
def tiles(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict[str, int]]]:
    """However few the keys; yields the tiles of the launches."""
    taken: list[dict[str, int]] = []

    original = launch.Launch.__call__

    def noted(self: launch.Launch, *tensors: Tensor) -> None:
        taken.append(self.tiles[0])
        original(self, *tensors)

    monkeypatch.setattr(LAUNCHERS, "OVERLAP_LEAST_KEYS", 0)
    monkeypatch.setattr(launch.Launch, "__call__", noted)
    yield taken


@pytest.mark.interprets
@pytest.mark.compat
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("call", CALLS)
def test_values_and_gradients_are_within_budget(call: str, dtype: str, tiles: list[dict[str, int]]) -> None:
    shape, options = CALLS[call]
    described = describe("attention", call, "one tile ahead", *shape, lse=True, **options)
    found = examine(described, dtype, "interpret", torch.device("cpu"), runs=1)
    assert found.over_budget and found.passed, found.verdict
    assert sum("OVERLAP" in tile for tile in tiles) == 1  # the forward alone


@pytest.mark.interprets
def test_it_is_the_same_arithmetic(tiles: list[dict[str, int]], monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, t, 32, dtype=torch.float16) for t in (70, 128, 128))
    with use_backend("interpret"):
        ahead = attention(q, k, v)
        monkeypatch.setattr(LAUNCHERS, "OVERLAP_LEAST_KEYS", 10**9)
        plain = attention(q, k, v)
    assert ["OVERLAP" in tile for tile in tiles] == [True, False]
    assert torch.equal(ahead, plain)  # no masked tile stands between the others, so the order of the sums is one


def _moved(x: Tensor) -> Tensor:
    """The same values one element further in memory."""
    return torch.cat([x.new_zeros(1), x.flatten()])[1:].view_as(x)


VARIANTS: dict[str, tuple[bool, Callable[[Tensor, Tensor, Tensor], tuple[tuple[Tensor, ...], dict[str, Any]]]]] = {
    "as it comes": (True, lambda q, k, v: ((q, k, v), {})),
    "heads last": (True, lambda q, k, v: ((q, *(x.transpose(1, 2).contiguous().transpose(1, 2) for x in (k, v))), {})),
    "causal": (True, lambda q, k, v: ((q, k, v), dict(causal=True))),
    "keys off a 16-byte boundary": (False, lambda q, k, v: ((q, _moved(k), v), {})),
    "values off a 16-byte boundary": (False, lambda q, k, v: ((q, k, _moved(v)), {})),
    "odd rows": (False, lambda q, k, v: ((q, k.new_zeros(1, 1, 1024, 129)[..., :128], v), {})),
    "few keys": (False, lambda q, k, v: ((q, k[:, :, :1000], v[:, :, :1000]), {})),
    "float32": (False, lambda q, k, v: ((q.float(), k.float(), v.float()), {})),
    "a left window": (False, lambda q, k, v: ((q, k, v), dict(window=(100, 0)))),
    "padding": (False, lambda q, k, v: ((q, k, v), dict(key_mask=torch.ones(1, 1024, dtype=torch.bool)))),
    "dropout": (False, lambda q, k, v: ((q, k, v), dict(dropout_p=0.1))),
    "a soft cap": (False, lambda q, k, v: ((q, k, v), dict(softcap=5.0))),
    "head size 96": (False, lambda q, k, v: ((q[..., :96], k[..., :96].contiguous(), v[..., :96].contiguous()), {})),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_keys_that_a_descriptor_reaches_get_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[dict[str, int]] = []
    monkeypatch.setattr(LAUNCHERS, "arch_of", lambda x: 90)
    monkeypatch.setattr(launch.Launch, "__call__", lambda self, *tensors: chosen.append(self.tiles[0]))
    expected, change = VARIANTS[name]
    tensors, options = change(*(torch.zeros(1, 1, t, 128, dtype=torch.bfloat16) for t in (8, 1024, 1024)))
    with use_backend("interpret"):
        attention(*tensors, **options)
    assert [tile.get("OVERLAP", 0) for tile in chosen if "BLOCK_MASKED" in tile] == [int(expected)]


def test_only_a_row_of_its_own_works_ahead() -> None:
    assert [tile.get("OVERLAP", 0) for tile in tiles_for(FORWARD, 90, 128, torch.bfloat16, "overlap")] == [1, 0]
    assert tiles_for(FORWARD, 120, 128, torch.bfloat16, "overlap") == tiles_for(
        FORWARD, 120, 128, torch.bfloat16, "plain"
    )
    four_warps = tiles_for(FORWARD, 80, 128, torch.bfloat16, "overlap")[0]  # a row of its own without descriptors
    assert four_warps["num_warps"] == 4 and "OVERLAP" not in four_warps


def test_memory_is_lent_where_nobody_has_set_an_allocator() -> None:
    held = _allocation._allocator
    assert isinstance(held.get(), _allocation.NullAllocator)
    with launch.scratch_allocator():
        assert not isinstance(held.get(), _allocation.NullAllocator)
    assert isinstance(held.get(), _allocation.NullAllocator)
    before = held.get()
    try:
        triton.set_allocator(theirs := lambda size, alignment, stream: None)
        with launch.scratch_allocator():
            assert held.get() is theirs
        assert held.get() is theirs
    finally:
        triton.set_allocator(before)
