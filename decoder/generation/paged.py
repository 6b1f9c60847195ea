"""PagePool and PagedCache: keys and values in pages that rows share, so that room is taken only as tokens come."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from tileformer.decoder.generation.cache import AttentionCache, KVCache, LayerCache
from tileformer.decoder.generation.state import _time, _widened
from tileformer.kernels import attention


class OutOfPages(RuntimeError):
    """More pages are wanted than are free; nothing was changed."""


class PagePool:
    """``pages`` pages of ``page_size`` tokens, and how many rows read each.

    A page without readers is free, and is found again by its tokens until it is taken for others; the one that was
    free for the longest goes first. What is found are whole pages from the start of a sequence: a page is known by its
    own tokens and by the page before it, so that no two beginnings can be mistaken for each other.

    Raises ValueError for sizes that make no sense.

    Example:
        >>> pool = PagePool(4, page_size=16)
        >>> pages = pool.allocate(2)
        >>> pool.remember(range(32), pages)
        >>> pool.release(pages)
        >>> pool.find([*range(16), 7]) == pages[:1], pool.available
        (True, 4)
    """

    def __init__(self, pages: int, page_size: int = 16) -> None:
        if pages < 1 or page_size < 16 or page_size & (page_size - 1):
            raise ValueError(
                f"a pool has at least 1 page of 16, 32, 64, ... tokens, got {pages} pages of {page_size} tokens"
            )
        self.pages, self.page_size = pages, page_size
        self.keys: list[Tensor] = []  # of each layer, (pages + 1, page_size, H_kv, D)
        self.values: list[Tensor] = []
        self.reset()

    def reset(self) -> None:
        """All pages are free, and hold nothing that could be found."""
        self.readers = [0] * self.pages
        self.free = dict.fromkeys(range(self.pages))  # in the order in which they will be taken
        self._known: dict[tuple[int, tuple[int, ...]], int] = {}  # (name of the page before, tokens) -> page
        self._names: dict[int, tuple[int, tuple[int, tuple[int, ...]]]] = {}  # page -> its name, its key in _known
        self._last_name = 0

    @property
    def available(self) -> int:
        return len(self.free)

    def pages_for(self, tokens: int) -> int:
        """How many pages so many tokens take."""
        return -(-tokens // self.page_size)

    def allocate(self, n: int) -> list[int]:
        """``n`` free pages, with one reader each. Raises OutOfPages, and takes none, where there are fewer."""
        if n > len(self.free):
            raise OutOfPages(
                f"{n} pages are wanted, {len(self.free)} of the pool's {self.pages} are free: release rows, or make it "
                "larger"
            )
        pages = [page for page, _ in zip(self.free, range(n), strict=False)]
        for page in pages:
            self.forget(page)
        self.share(pages)
        return pages

    def share(self, pages: Iterable[int]) -> None:
        """One more row reads each of ``pages``."""
        for page in pages:
            self.readers[page] += 1
            self.free.pop(page, None)

    def release(self, pages: Sequence[int]) -> None:
        """One row less reads each of ``pages``; a sequence's last page is the first to be taken for another."""
        for page in reversed(pages):
            self.readers[page] -= 1
            if not self.readers[page]:
                self.free[page] = None

    def remember(self, tokens: Sequence[int], pages: Sequence[int]) -> None:
        """``pages`` hold the keys and values of ``tokens``, from the start of a sequence; whole pages can be found."""
        before = 0
        for i, page in zip(range(len(tokens) // self.page_size), pages, strict=False):
            key = (before, tuple(tokens[i * self.page_size : (i + 1) * self.page_size]))
            if key not in self._known:
                self.forget(page)
                self._last_name += 1
                self._known[key], self._names[page] = page, (self._last_name, key)
            before = self._names[self._known[key]][0]

    def find(self, tokens: Sequence[int]) -> list[int]:
        """The pages of the longest known beginning of ``tokens``. They are the caller's only once it `share`s them."""
        pages: list[int] = []
        before = 0
        for i in range(len(tokens) // self.page_size):
            page = self._known.get((before, tuple(tokens[i * self.page_size : (i + 1) * self.page_size])))
            if page is None:
                break
            pages.append(page)
            before = self._names[page][0]
        return pages

    def forget(self, page: int) -> None:
        """What ``page`` holds is about to change: it is found no more."""
        if page in self._names:
            del self._known[self._names.pop(page)[1]]

    def copy(self, pages: list[int], to: list[int]) -> None:
        for x in (*self.keys, *self.values):
            x[to] = x[pages]

    def storage(self, layer: int, num_layers: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of one layer, made at the first call for keys such as ``like`` (R, H_kv, n, D).

        The page behind the last is where rows without a sequence write.
        """
        if not self.keys:
            shape = (self.pages + 1, self.page_size, like.shape[1], like.shape[3])
            self.keys = [like.new_zeros(shape) for _ in range(num_layers)]
            self.values = [like.new_zeros(shape) for _ in range(num_layers)]
        return self.keys[layer], self.values[layer]


class PagedCache:
    """A `DecodeState` of ``rows`` rows whose keys and values stand in the pages of a pool.

    Rows start empty and wait for an ``insert`` of a `KVCache`'s rows, or of another PagedCache's over the same pool,
    whose pages are then read by both. A page with several readers is copied before one of them writes to it.

    The page table int32 (rows, pages of ``capacity`` tokens) and the lengths int32 (rows,) are on the device; the host
    keeps its own. ``inputs``: see `KVCache`. Every verb leaves all as it was where it raises: OutOfPages, or ValueError
    for what does not fit.
    """

    def __init__(self, pool: PagePool, num_layers: int, rows: int, capacity: int, device: Any = "cpu") -> None:
        if rows < 1 or capacity < 1:
            raise ValueError(f"rows and capacity must be at least 1, got {rows} and {capacity}")
        self.pool, self.capacity = pool, capacity
        self.inputs: tuple[Tensor, ...] = ()
        self.layers: list[Any] = [LayerCache(_LayerPages(self, i), AttentionCache()) for i in range(num_layers)]
        self.pages: list[list[int]] = [[] for _ in range(rows)]
        self.counts = [0] * rows  # tokens read, as the host knows them
        self.is_live = [False] * rows
        self.row_lengths = torch.zeros(rows, dtype=torch.int32, device=device)
        self.live = torch.zeros_like(self.row_lengths)
        self.table = self.row_lengths.new_full((rows, pool.pages_for(capacity)), pool.pages)

    @property
    def lengths(self) -> Tensor:
        return self.row_lengths

    @property
    def length(self) -> int:
        return max(self.counts)

    # ---- what a step asks of it

    def lacking(self, n: int) -> int:
        """How many pages have to be free for n tokens more of each row."""
        return len(self._unwritable(n))

    def reserve(self, n: int) -> None:
        """Have room for n tokens more of each row, in pages that no other row reads."""
        if (end := self.length + n) > self.capacity:
            raise ValueError(f"{end} tokens do not fit a PagedCache of capacity {self.capacity}: make it larger")
        wanted = self._unwritable(n)
        fresh = self.pool.allocate(len(wanted))
        copied: list[tuple[int, int]] = []
        for (row, i), page in zip(wanted, fresh, strict=True):
            if i == len(self.pages[row]):
                self.pages[row].append(page)
            else:
                copied.append((self.pages[row][i], page))
                self.pages[row][i] = page
        if copied:
            old, new = (list(pages) for pages in zip(*copied, strict=True))
            self.pool.copy(old, to=new)
            self.pool.release(old)
        for row, count in enumerate(self.counts):
            if count % self.pool.page_size and self.is_live[row]:
                self.pool.forget(self.pages[row][count // self.pool.page_size])
        self._write_table({row for row, _ in wanted})

    def positions(self, n: int) -> Tensor:
        """Where the next n tokens of each row stand, int64 (R, n); room for them is reserved."""
        self.reserve(n)
        at = self.row_lengths.long()[:, None] + torch.arange(n, device=self.table.device)
        self.write_to = (self.table.gather(1, at // self.pool.page_size).long(), at % self.pool.page_size)
        self.seen = self.row_lengths + n * self.live
        return at

    def store(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write ``k`` and ``v`` (R, H_kv, n, D) to the positions that were told last; the layer's pages."""
        keys, values = self.pool.storage(layer, len(self.layers), k)
        keys[self.write_to], values[self.write_to] = k.transpose(1, 2), v.transpose(1, 2)
        return keys, values

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Store the new keys and values (R, H_kv, n, D) and attend from ``q`` (R, H, n, D) to what each row sees."""
        k, v = self.store(layer, k, v)
        k, v = self.gathered(k, v)
        return attention(q, k, v, causal="bottom_right", key_lengths=self.seen)

    def gathered(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """A layer's pages as (R, H_kv, T, D), T the keys of the longest row."""
        pages = self.table[:, : self.pool.pages_for(self.length + self.write_to[0].shape[1])]
        k, v = (x[pages].flatten(1, 2).transpose(1, 2) for x in (keys, values))
        return k, v

    def attend_source(self, layer: int, q: Tensor) -> Tensor:
        """Attend from ``q`` (R, H, n, D) to the source's keys."""
        padding = next((x for x in self.inputs if x.dtype == torch.bool), None)
        return attention(q, *self.layers[layer].cross_attn.read(), key_mask=None if padding is None else ~padding)

    def advance(self, n: int) -> None:
        self.row_lengths += n * self.live
        self.counts = [count + n * live for count, live in zip(self.counts, self.is_live, strict=True)]

    # ---- rows that move

    def select(self, rows: Tensor) -> None:
        self.reorder(rows)
        self._assign([x.index_select(0, rows) for x in self.fixed()], len(self.inputs))

    def reorder(self, rows: Tensor) -> None:
        """As `select`, but what a row has from its start stays: rows go on with one of their own source's."""
        old, chosen = self.pages, rows.tolist()
        self.pages = [list(old[row]) for row in chosen]
        for pages in self.pages:
            self.pool.share(pages)
        for pages in old:
            self.pool.release(pages)
        self.counts = [self.counts[row] for row in chosen]
        self.is_live = [self.is_live[row] for row in chosen]
        self.row_lengths, self.live, self.table = (x[rows] for x in (self.row_lengths, self.live, self.table))

    def adopt(self, row: int, pages: list[int]) -> None:
        """Let an empty row begin with whole ``pages`` that are known, and read by others too."""
        self.pool.share(pages)
        self._place([row], [pages], [len(pages) * self.pool.page_size])

    def insert(self, slots: Tensor, other: KVCache | PagedCache) -> None:
        rows, counts = slots.tolist(), other.lengths.tolist()
        if max(counts) > self.capacity:
            raise ValueError(f"rows of {max(counts)} tokens do not fit a state of capacity {self.capacity}")
        if isinstance(other, PagedCache):
            if other.pool is not self.pool:
                raise ValueError("pages of another pool are not read: insert rows of a KVCache, or of the same pool's")
            theirs = [list(pages) for pages in other.pages]
            for pages in theirs:
                self.pool.share(pages)
        else:
            sizes = [self.pool.pages_for(count) for count in counts]
            fresh = iter(self.pool.allocate(sum(sizes)))
            theirs = [[next(fresh) for _ in range(size)] for size in sizes]
            self._copy_in(theirs, counts, other)
        self.release(slots)
        self._place(rows, theirs, counts)
        fixed = self.fixed() or [
            x.new_full((len(self.counts), *x.shape[1:]), x.dtype == torch.bool) for x in other.fixed()
        ]
        for i, (mine, x) in enumerate(zip(fixed, other.fixed(), strict=True)):
            width = max(mine.shape[_time(mine)], x.shape[_time(x)])
            fixed[i] = _widened(mine, width)
            fixed[i][slots] = _widened(x, width)
        self._assign(fixed, len(other.inputs))

    def truncate(self, lengths: Tensor) -> None:
        self.row_lengths.copy_(torch.minimum(self.row_lengths, lengths))
        self.counts = [min(pair) for pair in zip(self.counts, lengths.tolist(), strict=True)]
        for row, count in enumerate(self.counts):
            kept = self.pool.pages_for(count)
            self.pool.release(self.pages[row][kept:])
            del self.pages[row][kept:]
        self._write_table(range(len(self.counts)))

    def release(self, rows: Tensor) -> None:
        for row in rows.tolist():
            self.pool.release(self.pages[row])
            self.pages[row], self.counts[row], self.is_live[row] = [], 0, False
        self.row_lengths[rows], self.live[rows], self.table[rows] = 0, 0, self.pool.pages

    # ---- inside

    def _unwritable(self, n: int) -> list[tuple[int, int]]:
        """Which pages, (row, index), n tokens more of each row would be written to and cannot: not there, or shared."""
        size, wanted = self.pool.page_size, []
        readers: dict[int, int] = {}
        for row, count in enumerate(self.counts):
            for i in range(count // size, self.pool.pages_for(count + n) if self.is_live[row] else 0):
                if i >= len(self.pages[row]):
                    wanted.append((row, i))
                elif readers.setdefault(page := self.pages[row][i], self.pool.readers[page]) > 1:
                    readers[page] -= 1  # the last of its readers keeps it
                    wanted.append((row, i))
        return wanted

    def _place(self, rows: list[int], pages: list[list[int]], counts: list[int]) -> None:
        for row, mine, count in zip(rows, pages, counts, strict=True):
            self.pages[row], self.counts[row], self.is_live[row] = mine, count, True
        self.row_lengths[rows] = self.row_lengths.new_tensor(counts)
        self.live[rows] = 1
        self._write_table(rows)

    def _write_table(self, rows: Iterable[int]) -> None:
        rows = list(rows)
        if rows:
            width = self.table.shape[1]
            lines = [self.pages[row] + [self.pool.pages] * (width - len(self.pages[row])) for row in rows]
            self.table[rows] = self.table.new_tensor(lines)

    def _copy_in(self, pages: list[list[int]], counts: list[int], other: KVCache) -> None:
        size = self.pool.page_size
        row = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
        t = torch.cat([torch.arange(count) for count in counts])
        page = torch.cat([torch.tensor(mine).repeat_interleave(size)[:count] for mine, count in zip(pages, counts, strict=True)])
        row, t, page = (x.to(self.table.device) for x in (row, t, page))
        for i, layer in enumerate(other.layers):
            k, v = layer.self_attn.read()
            keys, values = self.pool.storage(i, len(self.layers), k)
            keys[page, t % size], values[page, t % size] = k[row, :, t], v[row, :, t]

    def fixed(self) -> list[Tensor]:
        """Tensors that each row has from its start, such as its source's keys, in the order of `KVCache.fixed`."""
        written = [layer.cross_attn for layer in self.layers if layer.cross_attn.written]
        return [x for cache in written for x in cache.read()] + list(self.inputs)

    def _assign(self, fixed: list[Tensor], inputs: int) -> None:
        rest = iter(fixed)
        if len(fixed) > inputs:
            for layer in self.layers:
                layer.cross_attn.k, layer.cross_attn.v = next(rest), next(rest)
        self.inputs = tuple(rest)


class _LayerPages:
    """The pages of one layer, as the modules know a growing `AttentionCache`."""

    grows, written = True, False

    def __init__(self, cache: PagedCache, layer: int) -> None:
        self.cache, self.layer = cache, layer

    def keys_after(self, B: int, T: int) -> int:
        if B != len(self.cache.counts):
            raise ValueError(f"the cache has {len(self.cache.counts)} rows, not {B}")
        return self.cache.length + T

    def store(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return self.cache.gathered(*self.cache.store(self.layer, k, v))

    def reach(self, T: int, mask: Tensor | None = None) -> dict[str, Any]:
        return {"causal": "bottom_right" if T > 1 else False, "mask": mask, "key_lengths": self.cache.seen}
