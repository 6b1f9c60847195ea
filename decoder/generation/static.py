"""StaticCache: the keys and values of all layers in one buffer, for a step that reads and writes it in place."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from tileformer.decoder.generation.state import RowState
from tileformer.kernels import attention

SHORT = 16  # new tokens from which scores are worth a kernel that never stores them
STEPS_BETWEEN_COMPACTIONS = 16


class Form(NamedTuple):
    """How the heads of a decoder attend, in every cache: ``groups`` query heads share a head of keys and values; scale
    None is head_dim ** -0.5; ``windows``: how many keys a query sees in each layer, itself among them. () has none."""

    groups: int = 1
    scale: float | None = None
    softcap: float = 0.0
    windows: tuple[int | None, ...] = ()

    def window(self, layer: int) -> int | None:
        return self.windows[layer] if self.windows else None

    def options(self, layer: int) -> dict[str, Any]:
        """Of `attention` and `decode_attention`."""
        window = self.window(layer)
        return dict(scale=self.scale, softcap=self.softcap, window=None if window is None else (window - 1, 0))

    def split(self, qkv: Tensor, rows: int, n: int, heads: int, head_dim: int) -> tuple[Tensor, Tensor]:
        """``qkv`` (rows * n, (groups + 2) * heads * head_dim): q (rows, groups * heads, n, head_dim), and keys and
        values (2, rows, heads, n, head_dim)."""
        H = self.groups * heads
        qkv = qkv.view(rows, n, (self.groups + 2) * heads, head_dim).transpose(1, 2)
        return qkv[:, :H], qkv[:, H:].unflatten(1, (2, heads)).transpose(0, 1)


PLAIN = Form()


def eight_bit_width(head_dim: int) -> int:
    """Bytes of a row in 8 bits with its scale behind it: whole vectors of 16, so that rows lie as kernels load them."""
    return -(-head_dim // 16) * 16 + 16


def parts_of(kv: Tensor, head_dim: int) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Keys, values and their scales, if they have any, of rows (2, ..., head_dim or `eight_bit_width`)."""
    if kv.dtype != torch.int8:
        return kv[0], kv[1], {}
    scales = kv[..., -16:-12].view(torch.float32)[..., 0]
    return kv[0, ..., :head_dim], kv[1, ..., :head_dim], dict(k_scale=scales[0], v_scale=scales[1])


class SourceRows:
    """What an encoder's layers attend to: all tokens of a row's own source but its ``padding`` (B, T)."""

    def __init__(self, shape: tuple[int, int, int], padding: Tensor) -> None:
        self.heads, self.head_dim, self.padding = *shape[1:], padding
        self.real = ~padding if bool(padding.any()) else None

    def begin(self, n: int) -> int:
        return 0

    def attend(self, layer: int, qkv: Tensor) -> Tensor:
        """``qkv`` (B * T, 3 * H * D) to (B * T, H * D)."""
        qkv = qkv.view(*self.padding.shape, 3, self.heads, self.head_dim).permute(2, 0, 3, 1, 4)
        return attention(*qkv.unbind(0), key_mask=self.real).transpose(1, 2).reshape(-1, self.heads * self.head_dim)

    def advance(self, n: int) -> None:
        pass


class StaticCache(RowState):
    """Keys and values of R rows, or of R / ``beams`` sources whose beams share them; `PackedStep`'s state.

    Beams move nothing. What they read of a source stands in slots: the prompt's, then ``beams`` a step. ``sees`` (R,
    slots) is 0 where a beam descends from what stands in a slot, else -inf; choosing other beams chooses other rows of
    it. Slots from which no beam descends are given up every few steps.

    Args: ``shape`` (layers, heads of keys, head size); ``rows``; ``capacity`` in tokens; ``like``, a tensor of the
    dtype and on the device of the model; ``source``, keys and values (B, T, 2, H, D) of each layer, with ``padding``
    (B, T), True where there is no key; ``form``, of the attention among the rows' own tokens.
    """

    slot_positions: Tensor | None = None  # (B, slots), where beams share slots and a layer has a window

    def __init__(
        self,
        shape: tuple[int, int, int],
        rows: int,
        capacity: int,
        like: Tensor,
        source: list[Tensor] | None = None,
        padding: Tensor | None = None,
        dtype: torch.dtype | None = None,
        form: Form = PLAIN,
    ) -> None:
        self.step: Any = None  # the weights that it was begun with
        self.form = form
        layers, self.heads, self.head_dim = shape
        self.capacity, self.length, self.slots, self.beams = capacity, 0, 0, 1
        # Finite from the start: what a shorter row has not written yet is read, and multiplied by zero.
        width, dtype = (self.head_dim, like.dtype) if dtype is None else (eight_bit_width(self.head_dim), dtype)
        self.kv = like.new_zeros(layers, 2, rows, self.heads, capacity, width, dtype=dtype)
        self.of: Any = None  # the buffer that `all_keys` and `all_values` are views of
        self.ignored = like.new_zeros(1)
        self.source: Any = None  # (L, 2, B, H, T, D)
        self.padding: Any = None
        if source and padding is not None:
            self._attend_to(torch.stack(source).permute(0, 3, 1, 4, 2, 5).contiguous(), padding)

    def _attend_to(self, source: Tensor, padding: Tensor) -> None:
        """Take keys and values (L, 2, B, H, T, D) of a source, whose padding (B, T) says what is no key."""
        self.source, self.padding, self.source_sees = source, padding, None
        if bool(padding.any()):
            # NaN in padding must not reach a row; a row without any key reads zeros instead, and is zero.
            source.masked_fill_(padding[:, None, :, None], 0.0)
            hidden = padding & ~padding.all(1, keepdim=True)
            self.source_sees = source.new_zeros(hidden.shape).masked_fill_(hidden, float("-inf"))[:, None, None]
        flat = source.flatten(2, 3)
        self.source_keys, self.source_values = flat[:, 0].transpose(2, 3).unbind(0), flat[:, 1].unbind(0)

    @property
    def lengths(self) -> Tensor:
        if self.row_lengths is not None:
            return self.row_lengths
        rows = self.kv.shape[2] * self.beams
        return torch.full((rows,), self.length, dtype=torch.int32, device=self.kv.device)

    def growing(self) -> list[Tensor]:
        return [self.kv.movedim(2, 0)]

    def fixed(self) -> list[Tensor]:
        return [] if self.source is None else [self.source.movedim(2, 0), self.padding]

    def assign(self, growing: list[Tensor], fixed: list[Tensor]) -> None:
        self.kv = growing[0].movedim(0, 2).contiguous()
        if fixed:
            self._attend_to(fixed[0].movedim(0, 2).contiguous(), fixed[1])

    # What the step asks

    def begin(self, n: int) -> int | Tensor:
        """Make room for n tokens more; where they stand: the first one's position, or all (R, n) where rows differ."""
        R, end = self.kv.shape[2], self.slots + n * self.beams
        self._check_room(n)
        self.n = n
        self.at: tuple[Tensor, Tensor] | None = None
        self.sees_now: Tensor | None = None
        self.windowed: dict[int, Tensor] = {}
        where: int | Tensor = self.length
        if self.beams > 1:
            if n > 1:
                raise ValueError(f"beams read one token a step, got {n}: select the rows that go on first")
            self.sees_now = self._own_slots(end)
            if self.row_lengths is not None:
                where = self.positions(1)
            if self.slot_positions is not None:
                new = where if isinstance(where, int) else where.view(R, self.beams)
                self.slot_positions[:, self.slots : end] = new
        elif self.row_lengths is not None:
            where = self.positions(n)
            end = min(end, self.capacity)
            self.at = (torch.arange(R, device=where.device)[:, None], where)
            self.sees_now = self._up_to(where, end)
        elif n > 1:
            self.sees_now = self._up_to(torch.arange(self.length, end, device=self.kv.device)[None], end)
        if self.of is not self.kv:
            self.of, flat = self.kv, self.kv.flatten(2, 3)
            self.all_keys, self.all_values = flat[:, 0].transpose(2, 3), flat[:, 1]
        self.keys, self.values = self.all_keys[..., :end].unbind(0), self.all_values[:, :, :end].unbind(0)
        self.new = self.kv.narrow(4, self.slots, end - self.slots).unbind(0)
        self.slots = end
        return where

    @property
    def equal_rows(self) -> bool:
        return self.row_lengths is None

    def set_lengths(self, lengths: Tensor) -> None:
        super().set_lengths(lengths)
        if lengths.device.type == "cpu" and self.live is None and torch.all(lengths == self.length):
            self.row_lengths = None  # equal rows need no mask
        self.slots = self.length

    def _check_room(self, n: int) -> None:
        # Of unequal rows the longest may have ended: one that is full stays so.
        if self.equal_rows and self.length + n > self.capacity:
            reached = f"{self.length + n} tokens a row"
            raise ValueError(f"{reached} do not fit this cache of capacity {self.capacity}: make it larger")

    def _up_to(self, positions: Tensor, end: int) -> Tensor:
        """0 for the keys up to each query's position (R or 1, n), else -inf: (R or 1, 1, n, end)."""
        hidden = torch.arange(end, device=positions.device) > positions[:, None, :, None]
        return self.kv.new_zeros(hidden.shape).masked_fill_(hidden, float("-inf"))

    def attend(self, layer: int, qkv: Tensor) -> Tensor:
        """``qkv`` (R * n, (H + 2 H_kv) * D), projected of the new tokens: store the keys, attend what each row sees,
        (R * n, H * D)."""
        B, n = self.kv.shape[2], self.n
        # Beams of a source stand where its tokens do: as many queries of one row.
        q, kv = self.form.split(qkv, B, n * self.beams, self.heads, self.head_dim)
        if self.at is None:
            self.new[layer].copy_(kv)
        else:
            rows, positions = self.at
            self.kv[layer].transpose(2, 3)[:, rows, positions] = kv.transpose(2, 3)
        if n > SHORT and self.at is None and n == self.slots:
            out = attention(q, *kv.unbind(0), causal=True, **self.form.options(layer))
            return out.transpose(1, 2).reshape(B * n, -1)
        keys, values, sees, window = self.keys[layer], self.values[layer], self.sees_now, self.form.window(layer)
        if window is not None and self.length + n > window:
            if sees is None:  # one token of equal rows
                keys, values = keys[..., -window:], values[:, -window:]
            else:
                sees = self._within(window, sees)
        return self._attend(q, keys, values, sees, self.form)

    def _within(self, window: int, sees: Tensor) -> Tensor:
        """What each new token ``sees``, (B or 1, 1, queries, end), without the keys before its window."""
        if window not in self.windowed:
            end = sees.shape[3]
            if self.slot_positions is None:
                new, slots = self._new_positions(), torch.arange(end, device=sees.device)
            else:
                new, slots = self.slot_positions[:, end - self.beams : end], self.slot_positions[:, None, None, :end]
            self.windowed[window] = sees.masked_fill(slots <= new[:, None, :, None] - window, float("-inf"))
        return self.windowed[window]

    def _new_positions(self) -> Tensor:
        """Of the tokens that are being read, (R or 1, n)."""
        if self.at is not None:
            return self.at[1]
        return torch.arange(self.slots - self.n, self.slots, device=self.kv.device)[None]

    def attend_source(self, layer: int, q: Tensor) -> Tensor:
        """``q`` (R * n, H * D) against the keys of each row's source, (R * n, H * D)."""
        q = q.view(self.kv.shape[2], self.n * self.beams, self.heads, self.head_dim).transpose(1, 2)
        return self._attend(q, self.source_keys[layer], self.source_values[layer], self.source_sees)

    def _attend(self, q: Tensor, keys: Tensor, values: Tensor, sees: Tensor | None, form: Form = PLAIN) -> Tensor:
        """The heads of a group are as many more queries of one head of keys."""
        (B, H, n, D), G, scale = q.shape, form.groups, form.scale
        scale = self.head_dim**-0.5 if scale is None else scale
        scores = torch.baddbmm(self.ignored, q.reshape(B * H // G, G * n, D), keys, beta=0, alpha=scale)
        if form.softcap > 0.0:
            scores.div_(form.softcap).tanh_().mul_(form.softcap)
        if sees is not None:
            scores.view(B, H, n, scores.shape[2]).add_(sees)
        out = torch.bmm(torch.softmax(scores, -1), values)
        return out.view(B * n, H * D) if n == 1 else out.view(B, H, n, D).transpose(1, 2).reshape(B * n, H * D)

    def advance(self, n: int) -> None:
        self.length = min(self.length + n, self.capacity)
        super().advance(n)

    # Beams

    def branch(self, beams: int, steps: int) -> None:
        """From here each row goes on as ``beams`` rows, for ``steps`` tokens at the most."""
        L, two, B, H, _, D = self.kv.shape
        kv = self.kv.new_zeros(L, two, B, H, self.length + steps * beams, D)
        kv[..., : self.length, :] = self.kv[..., : self.length, :]
        self.kv, self.beams, self.sees = kv, beams, kv.new_zeros(B, beams, kv.shape[4])
        if self.row_lengths is not None:
            hidden = torch.arange(self.length, device=kv.device) >= self.row_lengths[:, None]
            self.sees[:, :, : self.length].masked_fill_(hidden[:, None], float("-inf"))
            self.row_lengths = self.row_lengths.repeat_interleave(beams)
        if any(self.form.windows):
            self.slot_positions = torch.arange(kv.shape[4], device=kv.device).repeat(B, 1)
        alone = torch.eye(beams, dtype=torch.bool, device=kv.device)
        self.own = kv.new_zeros(beams, beams).masked_fill_(~alone, float("-inf"))
        self.steps_to_compaction = STEPS_BETWEEN_COMPACTIONS

    def reorder(self, rows: Tensor) -> None:
        if self.beams == 1:
            return super().reorder(rows)
        sees = self.sees.flatten(0, 1)[:, : self.slots]
        sees.copy_(sees.index_select(0, rows))
        self.steps_to_compaction -= 1
        if self.steps_to_compaction == 0:
            self._compact()

    def select(self, rows: Tensor) -> None:
        K = self.beams
        if K > 1:
            groups = rows.view(-1, K) // K if len(rows) % K == 0 else rows[:0]
            whole = groups[:, :1] * K + torch.arange(K, device=rows.device) if len(groups) else groups
            if not len(groups) or not torch.equal(whole, rows.view(-1, K)):
                self._separate()
            else:
                return self._select_sources(groups[:, 0], rows)
        super().select(rows)

    def _select_sources(self, sources: Tensor, rows: Tensor) -> None:
        self.sees = self.sees.index_select(0, sources)
        if self.slot_positions is not None:
            self.slot_positions = self.slot_positions.index_select(0, sources)
        self.select_lengths(rows)
        self.assign(*([x.index_select(0, sources) for x in xs] for xs in (self.growing(), self.fixed())))

    def _compact(self) -> None:
        """Give up slots from which no beam descends."""
        self.steps_to_compaction = STEPS_BETWEEN_COMPACTIONS
        live = self._seen_by_beams().any(1)
        kept = int(live.sum(1).max())
        order = (~live).int().argsort(stable=True)[:, :kept]  # (B, kept)
        for kv in self.kv:  # layer by layer: the copy stays small
            index = order[None, :, None, :, None].expand(*kv.shape[:3], -1, kv.shape[4])
            kv[..., :kept, :] = kv.gather(3, index)
        self.sees[:, :, :kept] = self.sees.gather(2, order[:, None].expand(-1, self.beams, -1))
        if self.slot_positions is not None:
            self.slot_positions[:, :kept] = self.slot_positions.gather(1, order)
        self.slots = kept

    def _separate(self) -> None:
        """Give each beam keys and values of its own."""
        K, length = self.beams, self.length
        order = (~self._seen_by_beams()).flatten(0, 1).int().argsort(stable=True)[:, :length]
        rows = torch.arange(len(order), device=order.device)
        kv = self.kv.new_zeros(*self.kv.shape[:2], len(rows), self.heads, self.capacity, self.kv.shape[5])
        kv[..., :length, :] = self.kv[:, :, rows[:, None] // K, :, order].permute(2, 3, 0, 4, 1, 5)
        self.beams, self.slots, self.slot_positions = 1, length, None
        self.assign([kv.movedim(2, 0)], [x.repeat_interleave(K, 0) for x in self.fixed()])

    def _seen_by_beams(self) -> Tensor:
        """Whether each beam descends from each slot, (B, K, slots)."""
        return self.sees[:, :, : self.slots] == 0

    def check_own_rows(self) -> None:
        if self.beams > 1:
            raise ValueError(f"{self.beams} beams share this cache, none has an end: select the rows that go on first")

    def _own_slots(self, end: int) -> Tensor:
        """What each beam sees with its own new slot, (B, 1, K, end)."""
        self.sees[:, :, self.slots : end] = self.own
        return self.sees[:, None, :, :end]
