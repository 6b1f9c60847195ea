"""PagePool and PagedCache: keys and values in pages that rows share, so that room is taken only as tokens come."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from tileformer.decoder.generation.cache import AttentionCache, LayerCache
from tileformer.decoder.generation.state import RowState, insert_fixed
from tileformer.decoder.generation.static import PLAIN, parts_of
from tileformer.kernels import append_kv_cache, attention, decode_attention
from tileformer.kernels.attention.decode.params import MAX_TOKENS


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
        self.kv: Any = None  # (layers, 2, pages + 1, page_size, H_kv, D)
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

    def store_like(self, layers: int, keys: Tensor) -> None:
        """Make room for keys and values of so many layers, such as ``keys`` (R, H_kv, T, D), where there is none yet.

        The page behind the last is where rows without a sequence write. Pages are not wiped: whoever reads must not let
        what stands behind a row's length reach it.
        """
        if self.kv is None:
            self.kv = keys.new_zeros(layers, 2, self.pages + 1, self.page_size, keys.shape[1], keys.shape[3])


class PagedCache:
    """A `DecodeState` of ``rows`` rows whose keys and values stand in the pages of a pool.

    Rows start empty and wait for an ``insert`` of rows that a model has started, or of another PagedCache's over the
    same pool, whose pages are then read by both. A page with several readers is copied before one of them writes to it.

    The page table int32 (rows, pages of ``capacity`` tokens) and the lengths int32 (rows,) are on the device; the host
    keeps its own. Where a verb raises OutOfPages, or ValueError for what does not fit, all is as it was.
    """

    def __init__(self, pool: PagePool, rows: int, capacity: int, device: Any = "cpu") -> None:
        if rows < 1 or capacity < 1:
            raise ValueError(f"rows and capacity must be at least 1, got {rows} and {capacity}")
        self.pool, self.capacity = pool, capacity
        self.step: Any = None  # the weights that rows came with
        self.layers: list[LayerCache] = []  # as the modules know them
        self.starts: list[Tensor] = []  # what each row has from its start, such as its source's keys
        self.inputs: tuple[Tensor, ...] = ()
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
        """Tokens of the longest row."""
        return max(self.counts)

    # What a step asks

    def lacking(self, n: int) -> int:
        """How many pages have to be free for n tokens more of each row."""
        return len(self._unwritable(n))

    def reserve(self, n: int) -> None:
        """Have room for n tokens more of each row, in pages that no other row reads."""
        if (end := self.length + n) > self.capacity:
            raise ValueError(f"{end} tokens do not fit a PagedCache of capacity {self.capacity}: make it larger")
        wanted = self._unwritable(n)
        for (row, i), page in zip(wanted, self.pool.allocate(len(wanted)), strict=True):
            if i == len(self.pages[row]):
                self.pages[row].append(page)
            else:
                shared, self.pages[row][i] = self.pages[row][i], page
                self.pool.kv[:, :, page] = self.pool.kv[:, :, shared]
                self.pool.release([shared])
        for row, count in enumerate(self.counts):
            if count % self.pool.page_size:
                self.pool.forget(self.pages[row][count // self.pool.page_size])  # it is written to
        self._write_table({row for row, _ in wanted})

    def positions(self, n: int) -> Tensor:
        """Where the next n tokens of each row stand, int64 (R, n); room for them is reserved."""
        self.reserve(n)
        at, size = self.row_lengths.long()[:, None] + torch.arange(n, device=self.table.device), self.pool.page_size
        self.write_to = (self.table.gather(1, at // size).long(), at % size)
        self.seen = self.row_lengths + n * self.live
        return at

    begin = positions

    def attend(self, layer: int, qkv: Tensor) -> Tensor:
        """``qkv`` (R * n, (H + 2 H_kv) * D), projected of the new tokens: store the keys, attend what each row sees,
        (R * n, H * D)."""
        R, n = self.write_to[0].shape
        form, heads = PLAIN if self.step is None else self.step.form, self.pool.kv.shape[4]
        options, head_dim = form.options(layer), qkv.shape[1] // ((form.groups + 2) * heads)
        q, (k, v) = form.split(qkv, R, n, heads, head_dim)
        keys, values, scales = parts_of(self.pool.kv[layer], head_dim)
        append_kv_cache(k, v, keys, values, self.seen, page_table=self.table, **scales)
        if n <= MAX_TOKENS:
            out = decode_attention(q, keys, values, self.seen, page_table=self.table, **scales, **options)
        else:
            k, v = self.gather(keys, n), self.gather(values, n)
            if scales:
                k, v = ((x * self.gather(y, n)[..., None]).to(q) for x, y in zip((k, v), scales.values(), strict=True))
            out = attention(q, k, v, causal="bottom_right", key_lengths=self.seen, **options)
        return out.transpose(1, 2).reshape(R * n, -1)

    def store(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write ``k`` and ``v`` (R, n, H_kv, D); all that the rows read, gathered: (R, H_kv, T, D)."""
        kv = self.pool.kv[layer]
        kv[0][self.write_to], kv[1][self.write_to] = k, v
        return self.gather(kv[0], k.shape[1]), self.gather(kv[1], k.shape[1])

    def gather(self, x: Tensor, n: int) -> Tensor:
        """All that the rows and their n new tokens read, (R, H_kv, T, ...), of pages ``x``."""
        pages = self.table[:, : self.pool.pages_for(self.length + n)]
        return x[pages].flatten(1, 2).transpose(1, 2)

    def attend_source(self, layer: int, q: Tensor) -> Tensor:
        """``q`` (R * n, H * D) against the keys of each row's source, (R * n, H * D)."""
        source, padding = self.starts
        k, v = source[:, layer].unbind(1)
        q = q.view(len(k), -1, k.shape[1], k.shape[3]).transpose(1, 2)
        return attention(q, k, v, key_mask=~padding).transpose(1, 2).reshape(-1, k.shape[1] * k.shape[3])

    def advance(self, n: int) -> None:
        self.row_lengths += n * self.live
        self.counts = [count + n * live for count, live in zip(self.counts, self.is_live, strict=True)]

    # Rows that move

    def select(self, rows: Tensor) -> None:
        self.reorder(rows)
        self._begin_with([x.index_select(0, rows) for x in self.starts])

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

    def insert(self, slots: Tensor, other: RowState | PagedCache) -> None:
        counts = other.lengths.tolist()
        if max(counts, default=0) > self.capacity:
            raise ValueError(f"rows of {max(counts)} tokens do not fit a state of capacity {self.capacity}")
        if isinstance(other, PagedCache):
            if other.pool is not self.pool:
                raise ValueError("pages of another pool cannot be read here: insert rows that a model has started")
            pages, starts, inputs = [list(own) for own in other.pages], other.starts, other.inputs
            for own in pages:
                self.pool.share(own)
        else:
            fresh = iter(self.pool.allocate(sum(map(self.pool.pages_for, counts))))
            pages = [list(itertools.islice(fresh, self.pool.pages_for(count))) for count in counts]
            starts, inputs = other.fixed(), getattr(other, "inputs", ())
            self._copy_in(pages, counts, other)
        self.release(slots)
        self.step = getattr(other, "step", None)
        self._place(slots.tolist(), pages, counts)
        mine = self.starts or [x.new_full((len(self.counts), *x.shape[1:]), x.dtype == torch.bool) for x in starts]
        self.inputs = inputs
        self._begin_with(insert_fixed(mine, slots, starts))

    def adopt(self, like: PagedCache, pages: list[int]) -> None:
        """Let the first row, which is empty, begin with whole pages that are known; weights are those of ``like``."""
        self.pool.share(pages)
        self.step = like.step
        self._place([0], [list(pages)], [len(pages) * self.pool.page_size])
        self._begin_with([])

    def truncate(self, lengths: Tensor) -> None:
        self.row_lengths = torch.minimum(self.row_lengths, lengths.to(torch.int32))
        self.counts = [min(pair) for pair in zip(self.counts, lengths.tolist(), strict=True)]
        for pages, count in zip(self.pages, self.counts, strict=True):
            kept = self.pool.pages_for(count)
            self.pool.release(pages[kept:])
            del pages[kept:]
        self._write_table(range(len(self.counts)))

    def release(self, rows: Tensor) -> None:
        for row in rows.tolist():
            self.pool.release(self.pages[row])
            self.pages[row], self.counts[row], self.is_live[row] = [], 0, False
        self.row_lengths[rows], self.live[rows], self.table[rows] = 0, 0, self.pool.pages

    # Inside

    def _unwritable(self, n: int) -> list[tuple[int, int]]:
        """Which pages, (row, index), n tokens more of each row are written to and cannot be: not there, or shared."""
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
        for row, own, count in zip(rows, pages, counts, strict=True):
            self.pages[row], self.counts[row], self.is_live[row] = own, count, True
        self.row_lengths[rows] = self.row_lengths.new_tensor(counts)
        self.live[rows] = 1
        self._write_table(rows)

    def _write_table(self, rows: Iterable[int]) -> None:
        if rows := list(rows):
            lines = [self.pages[row] + [self.pool.pages] * (self.table.shape[1] - len(self.pages[row])) for row in rows]
            self.table[rows] = self.table.new_tensor(lines)

    def _copy_in(self, pages: list[list[int]], counts: list[int], other: RowState) -> None:
        growing = other.growing()  # keys and values by turns, (R, H, T, D); or all of them, (R, layers, 2, H, T, D)
        parts = [x for y in growing for x in (y.flatten(1, 2).unbind(1) if y.dim() == 6 else [y])]
        self.pool.store_like(len(parts) // 2, parts[0])
        row = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
        at = torch.cat([torch.arange(count) for count in counts])
        size = self.pool.page_size
        page = torch.tensor([own[t // size] for own, n in zip(pages, counts, strict=True) for t in range(n)])
        row, at, page = (x.to(self.table.device) for x in (row, at, page))
        for mine, theirs in zip(self.pool.kv.flatten(0, 1), parts, strict=True):
            mine[page, at % size] = theirs[row, :, at]

    def _begin_with(self, starts: list[Tensor]) -> None:
        """Take what rows have from their start: a `StaticCache`'s source and padding, or a `KVCache`'s `fixed`."""
        self.starts, rest = starts, iter(starts)
        if self.step is not None:
            return
        if not self.layers:
            pages: Any = (_LayerPages(self, i) for i in range(len(self.pool.kv)))
            self.layers = [LayerCache(own, AttentionCache()) for own in pages]
        if len(starts) > len(self.inputs):
            for layer in self.layers:
                layer.cross_attn.k, layer.cross_attn.v = next(rest), next(rest)
        self.inputs = tuple(rest)


class _LayerPages:
    """The pages of one layer, as the modules know a growing `AttentionCache`."""

    grows, written = True, False

    def __init__(self, cache: PagedCache, layer: int) -> None:
        self.cache, self.layer = cache, layer

    def keys_after(self, B: int, T: int) -> int:
        if len(self.cache.counts) != B:
            raise ValueError(f"the cache has {len(self.cache.counts)} rows, not {B}")
        return self.cache.length + T

    def store(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return self.cache.store(self.layer, k.transpose(1, 2), v.transpose(1, 2))

    def reach(self, T: int, mask: Tensor | None = None, aligned: bool = False) -> dict[str, Any]:
        causal = "bottom_right" if T > 1 or aligned else False
        return {"causal": causal, "mask": mask, "key_lengths": self.cache.seen}
