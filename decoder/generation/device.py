"""DeviceCache: a StaticCache whose lengths are on the device, so that a step is the same work at every position."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tileformer.decoder.generation.static import SHORT, StaticCache, parts_of
from tileformer.kernels import append_kv_cache, attention, decode_attention


class CapturedStep:
    """One step of a cache as a CUDA graph: captured once, replayed while what it reads stays where it is."""

    def __init__(self, run: Callable[..., Tensor], tokens: Tensor, state: DeviceCache, places: tuple[int, ...]) -> None:
        self.tokens, self.places, self.graph = tokens.clone(), places, torch.cuda.CUDAGraph()
        current, stream = torch.cuda.current_stream(tokens.device), torch.cuda.Stream(tokens.device)
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            self.graph.capture_begin(capture_error_mode="thread_local")  # another thread may use the GPU meanwhile
            try:
                self.logits = run(self.tokens, state)
            finally:
                self.graph.capture_end()
        current.wait_stream(stream)

    def __call__(self, tokens: Tensor) -> Tensor:
        self.tokens.copy_(tokens)
        self.graph.replay()
        return self.logits.clone()  # the next replay writes there again


class DeviceCache(StaticCache):
    """As `StaticCache`, read and written by `decode_attention` and `append_kv_cache` at ``row_lengths`` int32 (R,).

    No step reads a value on the host or moves what it reads: a CUDA graph of one step is every later step. Beams: a
    word ``descends`` (B, slots) of each slot says which of them descend from it, `decode_attention`'s.

    With ``dtype`` int8 keys and values are kept in 8 bits, see `append_kv_cache`; a prompt attends to its own as they
    are.
    """

    row_lengths: Any
    live: Any
    descends: Any = None
    equal_rows = True  # as far as the host knows

    def __init__(self, shape: tuple[int, int, int], rows: int, capacity: int, like: Tensor, *options: object) -> None:
        super().__init__(shape, rows, capacity, like, *options)  # type: ignore[arg-type]
        self.row_lengths = torch.zeros(rows, dtype=torch.int32, device=like.device)
        self.live = torch.ones_like(self.row_lengths)
        self.captured: CapturedStep | None = None
        self.last_places: tuple[int, ...] = ()

    def places(self) -> tuple[int, ...]:
        """Addresses of what a step reads and writes."""
        tensors = [self.kv, self.row_lengths, self.live]
        tensors += [] if self.source is None else [self.source, self.source_lengths, self.source_starts]
        tensors += [] if self.descends is None else [self.descends, self.slot_lengths]
        tensors += [] if self.slot_positions is None else [self.slot_positions]
        return tuple(x.data_ptr() for x in tensors)

    def replayed(self, tokens: Tensor, run: Callable[..., Tensor]) -> Tensor:
        """``run(tokens, self)``: the first time as it is, which compiles kernels, then as a graph."""
        n, places = tokens.shape[1], (*tokens.shape, self.equal_rows, *self.places())
        if self.captured is None or self.captured.places != places:
            if self.last_places != places:
                self.last_places = places
                return run(tokens, self)
            self.captured = CapturedStep(run, tokens, self, places)  # which counts this step, and does not take it
        else:
            self._check_room(n)
            self.count(n)
        return self.captured(tokens)

    def _attend_to(self, source: Tensor, padding: Tensor) -> None:
        self.source, self.padding = source, padding
        real = ~padding
        first, last = real.int().argmax(1), padding.shape[1] - real.flip(1).int().argmax(1)
        self.source_lengths = torch.where(real.any(1), last, 0).to(torch.int32)
        self.source_starts = first.to(torch.int32)
        index = torch.arange(padding.shape[1], device=padding.device)
        between = padding & (index >= first[:, None]) & (index < last[:, None])
        # Padding between a source's tokens is for a bias to hide; there is none in what `generate` is handed.
        self.source_sees = None
        if bool(between.any()):
            self.source_sees = source.new_zeros(padding.shape).masked_fill_(between, float("-inf"))[:, None, None]

    def begin(self, n: int) -> Tensor:
        """Make room for n tokens more; where they stand, integers (R, n)."""
        self._check_room(n)
        self.n = n
        lengths = self.row_lengths
        self.windowed = {}
        # Of unequal rows some may be full, or released. Equal ones have room: three launches less.
        self.reached = lengths + n
        if not self.equal_rows:
            self.reached = self.reached.clamp(max=self.capacity) * self.live
        self.filled = self.reached
        if self.descends is not None:
            if n > 1:
                raise ValueError(f"beams read one token a step, got {n}: select the rows that go on first")
            K = self.beams
            self.filled = self.slot_lengths + K
            new = self.slot_lengths[:, None].long() + self.beam_index
            self.descends.scatter_(1, new.clamp(max=self.descends.shape[1] - 1), self.own_bits)
        positions = lengths[:, None]
        if n > 1:
            positions = positions + torch.arange(n, device=lengths.device)
        return positions if self.equal_rows else positions.clamp(max=self.capacity - 1)

    def attend(self, layer: int, qkv: Tensor) -> Tensor:
        R, n, options = len(self.row_lengths), self.n, self.form.options(layer)
        q, (k, v) = self.form.split(qkv, R, n, self.heads, self.head_dim)
        keys, values, scales = parts_of(self.kv[layer], self.head_dim)
        if n > SHORT and self.length:
            raise ValueError(f"{n} tokens are a prompt, and this cache has read {self.length}: start with them")
        append_kv_cache(k, v, keys, values, self.filled, beams=self.beams, **scales)
        if n > SHORT:
            out = attention(q, k, v, causal=True, **options)
        else:
            if self.slot_positions is not None and (window := self.form.window(layer)):
                options |= dict(window=None, bias=self._within_beams(window))
            options |= dict(beams=self.beams, descends=self.descends, **scales)
            out = decode_attention(q, keys, values, self.filled, **options)
        return out.transpose(1, 2).reshape(R * n, -1)

    def _within_beams(self, window: int) -> Tensor:
        """-inf for the slots before the window of each beam, else 0, (R, 1, 1, slots): slots are not in the order of
        their tokens."""
        if window not in self.windowed and self.slot_positions is not None:
            far = self.slot_positions.repeat_interleave(self.beams, 0) <= self.row_lengths[:, None] - window
            self.windowed[window] = torch.zeros(far.shape, device=far.device).masked_fill_(far, float("-inf"))
        return self.windowed[window][:, None, None]

    def attend_source(self, layer: int, q: Tensor) -> Tensor:
        R, n, sees = len(self.row_lengths), self.n, self.source_sees
        q = q.view(R, n, self.heads, self.head_dim).transpose(1, 2)
        keys, values = self.source[layer].unbind(0)
        if n > SHORT:  # a long prefix of the target: no beams yet
            out = attention(q, keys, values, key_mask=~self.padding)
        else:
            if sees is not None and self.beams > 1:
                sees = sees.repeat_interleave(self.beams, 0)
            options: dict[str, Any] = dict(beams=self.beams, starts=self.source_starts, causal=False, bias=sees)
            out = decode_attention(q, keys, values, self.source_lengths, **options)
        return out.transpose(1, 2).reshape(R * n, -1)

    def advance(self, n: int) -> None:
        self.row_lengths.copy_(self.reached)
        if self.descends is not None:
            self.slot_lengths.copy_(self.filled)
        self.count(n)

    def count(self, n: int) -> None:
        """What the host counts of a step, also of one that a graph has replayed."""
        self.length = min(self.length + n, self.capacity)
        self.slots = self.length

    def set_lengths(self, lengths: Tensor) -> None:
        self.row_lengths.copy_(lengths)  # in place: a graph knows tensors by their addresses
        self.equal_rows = False

    def branch(self, beams: int, steps: int) -> None:
        if beams > 31:
            raise ValueError(f"{beams} beams do not fit the bits of a word: at most 31 share a cache")
        L, two, B, H, _, D = self.kv.shape
        kv = self.kv.new_zeros(L, two, B, H, self.length + steps * beams, D)
        kv[..., : self.length, :] = self.kv[..., : self.length, :]
        self.kv, self.beams, self.slot_lengths = kv, beams, self.row_lengths
        self.row_lengths, self.live = (x.repeat_interleave(beams) for x in (self.row_lengths, self.live))
        self.beam_index = torch.arange(beams, device=kv.device)
        self.own_bits = (1 << self.beam_index).to(torch.int32).expand(B, beams)
        self.descends = torch.zeros(B, kv.shape[4], dtype=torch.int32, device=kv.device)
        slots, before = torch.arange(kv.shape[4], device=kv.device), self.slot_lengths[:, None]
        prompt = slots < before
        if any(self.form.windows):
            self.slot_positions = torch.where(prompt, slots, before + (slots - before) // beams)
        self.descends.masked_fill_(prompt, (1 << beams) - 1)

    def reorder(self, rows: Tensor) -> None:
        if self.descends is None:
            return super().reorder(rows)
        parents = rows.view(-1, self.beams) % self.beams  # (B, K): which beam each goes on from
        bits = (self.descends[:, None] >> parents[:, :, None].to(torch.int32)) & 1  # (B, K, slots)
        self.descends.copy_((bits << self.beam_index[:, None].to(torch.int32)).sum(1))

    def _select_sources(self, sources: Tensor, rows: Tensor) -> None:
        self.slot_lengths = self.slot_lengths.index_select(0, sources)
        self.sees = self.descends  # selected in its place
        super()._select_sources(sources, rows)
        self.descends, self.own_bits = self.sees, self.own_bits[: len(sources)]

    def _separate(self) -> None:
        super()._separate()
        self.descends = None

    def _seen_by_beams(self) -> Tensor:
        return (self.descends[:, None] >> self.beam_index[:, None].to(torch.int32)) & 1 != 0
