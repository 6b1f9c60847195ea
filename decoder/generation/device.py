"""DeviceCache: a StaticCache whose lengths are on the device, so that a step is the same work at every position."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tileformer.decoder.generation.state import RowState
from tileformer.decoder.generation.static import SHORT, StaticCache
from tileformer.kernels import append_kv_cache, attention, decode_attention


class DeviceCache(StaticCache):
    """As `StaticCache`, read and written by `decode_attention` and `append_kv_cache` at ``row_lengths`` int32 (R,).

    No step reads a value on the host or moves what it reads: a CUDA graph of one step is every later step. Beams: a
    word ``descends`` (B, slots) of each slot says which of them descend from it, `decode_attention`'s.
    """

    row_lengths: Any
    descends: Any = None
    equal_rows = True  # as far as the host knows

    def __init__(self, shape: tuple[int, int, int], rows: int, capacity: int, like: Tensor, *source: object) -> None:
        super().__init__(shape, rows, capacity, like, *source)  # type: ignore[arg-type]
        self.row_lengths = torch.zeros(rows, dtype=torch.int32, device=like.device)

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
        """Make room for n tokens more; where they stand, int64 (R, n)."""
        self._check_room(n)
        self.n = n
        lengths = self.row_lengths
        reached = (lengths + n).clamp(max=self.capacity)
        self.reached = reached if self.live is None else reached * self.live
        self.filled = self.reached
        if self.descends is not None:
            if n > 1:
                raise ValueError(f"beams read one token a step, got {n}: select the rows that go on first")
            K = self.beams
            self.filled = self.slot_lengths + K
            new = self.slot_lengths[:, None].long() + self.beam_index
            self.descends.scatter_(1, new.clamp(max=self.descends.shape[1] - 1), self.own_bits)
        positions = lengths[:, None].long()
        if n > 1:
            positions = positions + torch.arange(n, device=lengths.device)
        return positions.clamp(max=self.capacity - 1)

    def attend(self, layer: int, qkv: Tensor) -> Tensor:
        R, n = len(self.row_lengths), self.n
        q, k, v = qkv.view(R, n, 3, self.heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        keys, values = self.kv[layer].unbind(0)
        if n > SHORT:
            if self.length:
                raise ValueError(f"{n} tokens are a prompt, and this cache has read {self.length}: start with them")
            keys[:, :, :n], values[:, :, :n] = k, v
            out = attention(q, k, v, causal=True)
        else:
            append_kv_cache(k, v, keys, values, self.filled, beams=self.beams)
            out = decode_attention(q, keys, values, self.filled, beams=self.beams, descends=self.descends)
        return out.transpose(1, 2).reshape(R * n, -1)

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
        self.row_lengths, self.equal_rows = lengths.to(torch.int32), False

    def insert(self, slots: Tensor, other: RowState) -> None:
        super().insert(slots, other)
        self.equal_rows = False

    def truncate(self, lengths: Tensor) -> None:
        self._refuse_beams("forgets no tokens")
        self.set_lengths(torch.minimum(self.row_lengths, lengths.to(torch.int32)))

    def branch(self, beams: int, steps: int) -> None:
        if beams > 31:
            raise ValueError(f"{beams} beams do not fit the bits of a word: at most 31 share a cache")
        L, two, B, H, _, D = self.kv.shape
        kv = self.kv.new_zeros(L, two, B, H, self.length + steps * beams, D)
        kv[..., : self.length, :] = self.kv[..., : self.length, :]
        self.kv, self.beams, self.slot_lengths = kv, beams, self.row_lengths
        self.row_lengths = self.row_lengths.repeat_interleave(beams)
        self.beam_index = torch.arange(beams, device=kv.device)
        self.own_bits = (1 << self.beam_index).to(torch.int32).expand(B, beams)
        self.descends = torch.zeros(B, kv.shape[4], dtype=torch.int32, device=kv.device)
        prompt = torch.arange(kv.shape[4], device=kv.device) < self.slot_lengths[:, None]
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
