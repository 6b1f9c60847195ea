"""PagePool and PagedCache: no page is lost, shared by mistake or read past a row's end; attention is the dense one's."""

import itertools
import random
from typing import Any

import pytest
import torch
from torch import Tensor

from tileformer.decoder import DecoderLM, DecoderLMConfig, Seq2Seq, Seq2SeqConfig
from tileformer.decoder.generation import DecodeState
from tileformer.decoder.generation.cache import KVCache
from tileformer.decoder.generation.paged import OutOfPages, PagedCache, PagePool
from tileformer.decoder.generation.static import StaticCache
from tileformer.kernels import reference

V = 12


@pytest.fixture(autouse=True)
def _no_grad() -> Any:
    with torch.no_grad():
        yield


# ---- the pool


def tokens(*pages: int) -> list[int]:
    return [page for page in pages for _ in range(16)]


def test_pages_are_taken_and_given_back() -> None:
    pool = PagePool(4)
    first = pool.allocate(3)
    assert len(set(first)) == 3 and pool.available == 1
    with pytest.raises(OutOfPages, match="2 pages are wanted, 1 of the pool's 4 are free"):
        pool.allocate(2)
    assert pool.available == 1
    pool.share(first[:1])
    pool.release(first)
    assert pool.available == 3
    pool.release(first[:1])
    assert pool.available == 4 and pool.readers == [0] * 4


def test_pages_are_found_by_their_tokens_and_those_before() -> None:
    pool = PagePool(8)
    a, b = pool.allocate(3), pool.allocate(2)
    pool.remember(tokens(1, 2, 3)[:47], a)  # the third is not whole
    pool.remember(tokens(4, 2), b)
    assert pool.find(tokens(1, 2, 3)) == a[:2] and pool.find(tokens(4, 2, 7)) == b
    assert pool.find(tokens(2)) == [] and pool.find(tokens(1)[:15]) == [] and pool.find(tokens(4, 5)) == b[:1]
    pool.remember(tokens(1, 2, 3), c := pool.allocate(3))  # the same again: the first ones stay known
    assert pool.find(tokens(1, 2, 3)) == [*a[:2], c[2]]
    pool.forget(a[1])
    assert pool.find(tokens(1, 2, 3)) == a[:1]
    pool.remember(tokens(1, 2), c)
    assert pool.find(tokens(1, 2, 3)) == [a[0], c[1]]  # the third belongs to another second


def test_free_pages_stay_known_until_they_are_taken_the_last_ones_first() -> None:
    pool = PagePool(4)
    a = pool.allocate(2)
    pool.remember(tokens(1, 2), a)
    pool.release(a)
    pool.release(pool.allocate(2))  # pages that hold nothing are taken before
    assert pool.find(tokens(1, 2)) == a
    pool.allocate(1)
    assert pool.find(tokens(1, 2)) == a[:1]
    pool.share(a[:1])
    pool.allocate(2)
    assert pool.available == 0 and pool.find(tokens(1, 2)) == a[:1]
    pool.release(a[:1])
    pool.allocate(1)
    assert pool.find(tokens(1, 2)) == []


# ---- attention


def random_rows(lengths: list[int], heads: int, seed: int) -> tuple[StaticCache, Tensor]:
    """A StaticCache of two layers with rows of these lengths, and NaN behind them."""
    torch.manual_seed(seed)
    kv = torch.randn(2, 2, len(lengths), heads, 70, 8, dtype=torch.float64)
    other = StaticCache((2, heads, 8), len(lengths), 70, kv)
    other.kv = kv
    other.row_lengths = torch.tensor(lengths, dtype=torch.int32)
    other.length = max(lengths)
    return other, kv


@pytest.mark.parametrize("n", [1, 3, 16, 20])
def test_attention_over_pages_is_dense_attention(n: int) -> None:
    """Over rows of lengths about a page's, one of them empty; what a page held before is never read."""
    lengths = [1, 16, 17, 40]
    other, kv = random_rows(lengths, 2, n)
    pool = PagePool(16)
    cache = PagedCache(pool, 5, 70)
    pool.store_like(2, kv[0, 0])
    pool.kv.fill_(torch.nan)
    cache.insert(torch.tensor([3, 0, 4, 1]), other)
    assert isinstance(cache, DecodeState) and cache.lengths.tolist() == [16, 40, 0, 1, 17]
    at = cache.begin(n)
    assert at.tolist() == [list(range(start, start + n)) for start in (16, 40, 0, 1, 17)]
    qkv = torch.randn(2, 5, n, 3, 2, 8, dtype=torch.float64)
    out = [cache.attend(layer, qkv[layer].view(5 * n, -1)).view(5, n, 2, 8) for layer in range(2)]
    for layer, (slot, row) in itertools.product(range(2), zip((3, 0, 4, 1), range(4), strict=True)):
        q, k, v = qkv[layer, slot].permute(1, 2, 0, 3)
        k = torch.cat([kv[layer, 0, row, :, : lengths[row]], k], 1)
        v = torch.cat([kv[layer, 1, row, :, : lengths[row]], v], 1)
        expected = reference.attention(q[None], k[None], v[None], causal="bottom_right")[0].transpose(0, 1)
        torch.testing.assert_close(out[layer][slot], expected, atol=1e-12, rtol=1e-12)
    cache.advance(n)
    assert cache.lengths.tolist() == [16 + n, 40 + n, 0, 1 + n, 17 + n]


# ---- rows that move


CONFIG = DecoderLMConfig(V, 16, 2, 2, 32, max_length=80)
PROMPTS = [[3, 4, 5], [3] * 16, [4, 5] * 10, [6, 7, 8, 9] * 9]


def lm(by: str) -> Any:
    torch.manual_seed(0)
    m = DecoderLM(CONFIG).double().eval()
    if by == "modules":
        m.dropout.register_forward_hook(lambda *_: None)
    return m


def paged(m: Any, pages: int = 20) -> PagedCache:
    """`PROMPTS` in rows 1 to 4 of 5."""
    cache = PagedCache(PagePool(pages), 5, 80)
    for row, prompt in enumerate(PROMPTS, 1):
        cache.insert(torch.tensor([row]), m.start(torch.tensor([prompt]), capacity=60)[1])
    return cache


def check(m: Any, logits: Tensor, cache: PagedCache, rows: dict[int, list[int]]) -> None:
    """Each row's logits are those of its tokens, read alone; the pool's books are in order."""
    for row, ids in rows.items():
        torch.testing.assert_close(logits[row], m(torch.tensor([ids]))[0, -1], atol=1e-10, rtol=1e-10)
        assert cache.counts[row] == len(ids) and cache.lengths[row] == len(ids)
    pool, held = cache.pool, [page for pages in cache.pages for page in pages]
    assert pool.readers == [held.count(page) for page in range(pool.pages)]
    assert set(pool.free) == {page for page in range(pool.pages) if page not in held}
    for pages, count, line in zip(cache.pages, cache.counts, cache.table.tolist(), strict=True):
        assert len(pages) == pool.pages_for(count)
        assert line == pages + [pool.pages] * (len(line) - len(pages))


both = pytest.mark.parametrize("by", ["step", "modules"])


@both
def test_rows_are_read_as_each_alone(by: str) -> None:
    m = lm(by)
    cache = paged(m)
    assert (cache.step is None) == (by == "modules")
    rows = {row: list(prompt) for row, prompt in enumerate(PROMPTS, 1)}
    dice = random.Random(0)
    for n in (1, 1, 3, 17, 1):
        new = [dice.choices(range(3, V), k=n) for _ in range(5)]
        logits = m.step(torch.tensor(new), cache)[:, -1]
        for row in rows:
            rows[row] += new[row]
        check(m, logits, cache, rows)


@both
def test_selected_rows_share_pages_until_they_write(by: str) -> None:
    m = lm(by)
    cache = paged(m)
    before = cache.pool.available
    cache.select(torch.tensor([4, 4, 4, 0, 2]))
    assert cache.pool.available == before + 1 + 2  # rows 1 and 3 have gone
    new = [3, 4, 5, 6, 7]
    assert cache.lacking(1) == 3  # the last reader of row 4's last page keeps it; row 2 has filled its page
    logits = m.step(torch.tensor(new), cache)
    rows = {row: [*PROMPTS[3], new[row]] for row in range(3)} | {4: [*PROMPTS[1], 7]}
    check(m, logits, cache, rows)
    logits = m.step(torch.tensor(new), cache)
    check(m, logits, cache, {row: [*ids, new[row]] for row, ids in rows.items()})
    cache.reorder(torch.tensor([1, 0, 2, 3, 4]))
    check(m, m.step(torch.tensor(new), cache), cache, {0: [*rows[1], 4, 3], 1: [*rows[0], 3, 4]})


@both
def test_rows_of_another_cache_over_the_same_pool_are_read_by_both(by: str) -> None:
    m = lm(by)
    cache = paged(m)
    other = PagedCache(cache.pool, 1, 80)
    other.adopt(cache, cache.pages[4][:2])
    rest = [5, 6, 7]
    read = [*PROMPTS[3][:32], *rest]
    logits = m.step(torch.tensor([rest]), other)[:, -1]
    torch.testing.assert_close(logits[0], m(torch.tensor([read]))[0, -1], atol=1e-10, rtol=1e-10)
    cache.insert(torch.tensor([0]), other)
    other.release(torch.tensor([0]))
    assert cache.pages[0][:2] == cache.pages[4][:2]
    logits = m.step(torch.tensor([3, 4, 5, 6, 7]), cache)
    check(m, logits, cache, {0: [*read, 3], 4: [*PROMPTS[3], 7]})
    with pytest.raises(ValueError, match="pages of another pool"):
        cache.insert(torch.tensor([0]), paged(m))


@both
def test_truncated_rows_forget_and_give_pages_back(by: str) -> None:
    m = lm(by)
    cache = paged(m)
    cache.pool.remember(PROMPTS[3], cache.pages[4])
    cache.truncate(torch.tensor([0, 1, 16, 17, 20]))
    assert cache.lengths.tolist() == [0, 1, 16, 17, 20]
    cut = {1: PROMPTS[0][:1], 2: PROMPTS[1][:16], 3: PROMPTS[2][:17], 4: PROMPTS[3][:20]}
    new = [3, 4, 5, 6, 7]
    logits = m.step(torch.tensor(new), cache)
    check(m, logits, cache, {row: [*ids, new[row]] for row, ids in cut.items()})
    assert cache.pool.find(PROMPTS[3]) == cache.pages[4][:1]  # its second page holds other tokens now


@both
def test_released_rows_wait_and_are_used_again(by: str) -> None:
    m = lm(by)
    cache = paged(m)
    cache.release(torch.tensor([1, 4]))
    assert cache.lengths.tolist() == [0, 0, 16, 20, 0]
    logits = m.step(torch.tensor([3, 4, 5, 6, 7]), cache)
    assert logits.isfinite().all() and cache.lengths.tolist() == [0, 0, 17, 21, 0]
    check(m, logits, cache, {2: [*PROMPTS[1], 5], 3: [*PROMPTS[2], 6]})
    cache.insert(torch.tensor([2, 1]), m.start(torch.tensor([[5, 6, 7], [0, 4, 3]]), capacity=9)[1])  # one is in use
    logits = m.step(torch.tensor([3, 4, 5, 6, 7]), cache)
    check(m, logits, cache, {2: [5, 6, 7, 5], 1: [4, 3, 4], 3: [*PROMPTS[2], 6, 6]})
    cache.release(torch.arange(5))
    assert cache.pool.available == cache.pool.pages


@both
def test_sources_follow_their_rows(by: str) -> None:
    """Also where one is wider than those that are there."""
    torch.manual_seed(0)
    m: Any = Seq2Seq(Seq2SeqConfig(V, V, 16, 2, 1, 2, 32, max_length=40)).double().eval()
    if by == "modules":
        m.dropout.register_forward_hook(lambda *_: None)
    sources = {0: [3, 4], 2: [5, 6, 7, 8, 9], 1: [4]}
    cache = PagedCache(PagePool(8), 3, 40)
    for row, source in sources.items():
        _, state = m.start(torch.tensor([[1, 5]]), capacity=2, source=torch.tensor([source]))
        assert isinstance(state, KVCache if by == "modules" else StaticCache)
        cache.insert(torch.tensor([row]), state)
    for order in ([0, 1, 2], [2, 0, 0]):
        cache.select(torch.tensor(order))
        sources = {row: sources[old] for row, old in enumerate(order)}
        logits = m.step(torch.tensor([3, 3, 3]), cache)
        tgt = torch.tensor([[1, 5, *[3] * (cache.counts[0] - 2)]])
        for row, source in sources.items():
            torch.testing.assert_close(logits[row], m(torch.tensor([source]), tgt)[0, -1], atol=1e-10, rtol=1e-10)


@both
def test_what_does_not_fit_changes_nothing(by: str) -> None:
    m = lm(by)
    cache = paged(m, pages=8)  # one is left
    rows = {row: list(prompt) for row, prompt in enumerate(PROMPTS, 1)}
    tables = cache.table.clone()
    with pytest.raises(OutOfPages, match="3 pages are wanted, 1 of the pool's 8 are free"):
        m.step(torch.full((5, 13), 3), cache)
    with pytest.raises(OutOfPages, match="2 pages are wanted, 1 of"):
        cache.insert(torch.tensor([0]), m.start(torch.tensor([[3] * 17]), capacity=17)[1])
    with pytest.raises(ValueError, match="rows of 70 tokens do not fit a state of capacity 60"):
        PagedCache(cache.pool, 1, 60).insert(torch.tensor([0]), m.start(torch.tensor([[3] * 70]), capacity=70)[1])
    with pytest.raises(ValueError, match="81 tokens do not fit a PagedCache of capacity 80"):
        cache.reserve(45)
    with pytest.raises(ValueError, match="rows and capacity must be at least 1, got 0 and 5"):
        PagedCache(cache.pool, 0, 5)
    assert torch.equal(cache.table, tables) and cache.pool.available == 1
    logits = m.step(torch.tensor([3, 4, 5, 6, 7]), cache)
    check(m, logits, cache, {row: [*ids, row + 3] for row, ids in rows.items()})
    if by == "modules":
        with pytest.raises(ValueError, match="the cache has 5 rows, not 2"):
            m.step(torch.tensor([3, 4]), cache)
