"""Decodable: what decoding needs of a model; DecodeState: what is remembered of the rows that are being decoded."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.nn import functional as F


@runtime_checkable
class DecodeState(Protocol):
    """What a `Decodable` remembers of R rows.

    ``lengths`` int32 (R,), on the rows' device: the tokens of each row that it has read. The verbs that move rows
    change the state in place. A state may also have ``reorder(rows)``: as ``select``, where each row goes on with one
    of its own source's, as beams do."""

    @property
    def lengths(self) -> Tensor: ...

    def select(self, rows: Tensor) -> None:
        """Let row i go on with what row ``rows[i]`` held; ``rows`` int64 of any length, repeated or left out."""

    def insert(self, slots: Tensor, other: Any) -> None:
        """Put the rows of another state of the same model into the rows ``slots`` int64 (rows of other,)."""

    def truncate(self, lengths: Tensor) -> None:
        """Forget what each row read past ``lengths`` (R,)."""

    def release(self, rows: Tensor) -> None:
        """Forget the rows ``rows`` int64: they stay, read nothing, and wait for an ``insert``."""


@runtime_checkable
class Decodable(Protocol):
    """A model that `generate` and `stream` can decode: `Seq2Seq`, `DecoderLM`, an ensemble, or an object of yours.

        class Bigrams:                                     # logits (V, V) of the token after each token
            eos_id, pad_id = 2, 0
            def start(self, tokens, *, capacity, source=None, beams=1): ...   # -> logits (B * beams, V), state
            def step(self, tokens, state): ...                                # -> logits (R, V)

    It may also say: ``max_length``, how many tokens it can read (else `generate` has to be told where to end);
    ``conditioned = True`` and ``bos_id``, where what `generate` is handed is the source and each row begins with
    bos_id; ``training``, true while it is not to be decoded."""

    @property
    def eos_id(self) -> int: ...

    @property
    def pad_id(self) -> int: ...

    def start(
        self, tokens: Tensor, *, capacity: int, source: Tensor | None = None, beams: int = 1
    ) -> tuple[Tensor, Any]:
        """Read the rows' first tokens: logits (B * beams, V) of each row's next token, and the state of these rows.

        tokens: int64 (B, T), each row padded with ``pad_id`` on one side, of any lengths. capacity: how many tokens a
            row will have read at the most. source: what the rows are conditioned on. beams: so many copies of each row,
            beside each other."""

    def step(self, tokens: Tensor, state: Any) -> Tensor:
        """Logits (R, V) of the next token behind ``tokens`` int64 (R,), one more of each row; a model may also take
        (R, n) and give (R, n, V)."""


def _check_ids(lowest: int, highest: int, vocab: int | None) -> None:
    if vocab is not None and not 0 <= lowest <= highest < vocab:
        wrong = lowest if lowest < 0 else highest
        raise ValueError(f"token id {wrong} is outside the model's vocabulary of {vocab}: ids are 0 to {vocab - 1}")


def align_source(source: Tensor, pad_id: int, vocab: int | None) -> Tensor:
    """``source`` (B, T) with the padding before each row's first token moved behind its last. ValueError for an id
    that the model does not know."""
    if source.dim() != 2 or not source.numel():
        return source
    begins = (source != pad_id).int().argmax(1)
    first, lowest, highest = torch.stack([begins.max(), *source.aminmax()]).tolist()  # one look at the device
    _check_ids(lowest, highest, vocab)
    if not first:
        return source
    index = begins[:, None] + torch.arange(source.shape[1], device=source.device)
    return F.pad(source, (0, source.shape[1]), value=pad_id).gather(1, index)


def align_prompts(tokens: Tensor, pad_id: int, vocab: int | None = None) -> tuple[Tensor, Tensor, int, int]:
    """``tokens`` (B, T) with each row's padding behind its end, its length (B,), the least and the greatest length.

    Raises ValueError where a row has padding between tokens, or nothing else, or an id that the model does not know.
    """
    if tokens.dim() != 2 or tokens.is_floating_point():
        got = f"{str(tokens.dtype).removeprefix('torch.')} of shape {tuple(tokens.shape)}"
        raise ValueError(f"tokens must be (B, T) token ids, int64, got {got}: one row a sequence")
    real = tokens != pad_id
    lengths = real.sum(1)
    if not len(tokens):
        return tokens, lengths, 1, 1
    begins = real.int().argmax(1) if tokens.shape[1] else lengths
    ends = tokens.aminmax() if tokens.shape[1] else (begins.min(), begins.min())
    looked = torch.stack([*lengths.aminmax(), begins.max(), *ends])  # one look at the device
    shortest, longest, first, lowest, highest = looked.tolist()
    _check_ids(lowest, highest, vocab)
    if shortest < 1:
        raise ValueError("a prompt is all padding: begin each with a token, such as bos_id")
    width = tokens.shape[1]
    index = torch.arange(width, device=tokens.device)
    if first:
        tokens = F.pad(tokens, (0, width), value=pad_id).gather(1, begins[:, None] + index)
    if shortest < width and ((tokens != pad_id) != (index < lengths[:, None])).any():
        raise ValueError(f"a prompt has padding (id {pad_id}) between its tokens: pad it on one side only")
    return tokens[:, :longest], lengths, shortest, longest


class RowState:
    """A `DecodeState` over tensors that have a row each along their first axis.

    ``length`` is what the host knows: no row has read more. While all rows are equally long it is all there is to know,
    and ``row_lengths`` is None.
    """

    capacity: int
    length: int
    row_lengths: Tensor | None = None
    live: Tensor | None = None  # int32 (R,), 0 for a released row, which stays at length 0

    def growing(self) -> list[Tensor]:
        """Tensors with room for ``capacity`` tokens along their last but one axis, or their last of two."""
        raise NotImplementedError

    def fixed(self) -> list[Tensor]:
        """Tensors that each row has from its start, such as its source's."""
        raise NotImplementedError

    def assign(self, growing: list[Tensor], fixed: list[Tensor]) -> None:
        """Take others in their place."""
        raise NotImplementedError

    @property
    def lengths(self) -> Tensor:
        if self.row_lengths is not None:
            return self.row_lengths
        rows = self.growing()[0]
        return torch.full((len(rows),), self.length, dtype=torch.int32, device=rows.device)

    def advance(self, n: int) -> None:
        """Each row has read n tokens more; one that is full stays so, and one that was released empty."""
        if self.row_lengths is not None:
            read = n if self.live is None else n * self.live
            self.row_lengths = (self.row_lengths + read).clamp(max=self.capacity)

    def positions(self, n: int) -> Tensor:
        """Where the next n tokens of each row stand, int64 (R, n); the last place again for a row that is full."""
        new = torch.arange(n, device=self.lengths.device)
        return (self.lengths.long()[:, None] + new).clamp(max=self.capacity - 1)

    def select(self, rows: Tensor) -> None:
        self.reorder(rows)
        self.assign(self.growing(), [x.index_select(0, rows) for x in self.fixed()])

    def reorder(self, rows: Tensor) -> None:
        """As `select`, but what a row has from its start stays: rows go on with one of their own source's, as beams
        do."""
        self.assign([x.index_select(0, rows) for x in self.growing()], self.fixed())
        self.select_lengths(rows)

    def select_lengths(self, rows: Tensor) -> None:
        if self.row_lengths is not None:
            self.row_lengths = self.row_lengths.index_select(0, rows)
        if self.live is not None:
            self.live = self.live.index_select(0, rows)

    def insert(self, slots: Tensor, other: RowState) -> None:
        self.check_own_rows()
        if other.length > self.capacity:
            raise ValueError(f"rows of {other.length} tokens do not fit a state of capacity {self.capacity}")
        lengths, growing = self.lengths, self.growing()
        for mine, theirs in zip(growing, other.growing(), strict=True):
            mine[slots] = 0  # behind its length a row's tokens are read, and multiplied by zero: no NaN may stay
            mine.narrow(_time(mine), 0, other.length)[slots] = theirs.narrow(_time(theirs), 0, other.length)
        self.assign(growing, insert_fixed(self.fixed(), slots, other.fixed()))
        if self.live is not None:
            self.live.index_fill_(0, slots, 1)
        self.length = max(self.length, other.length)
        self.set_lengths(lengths.index_copy(0, slots, other.lengths))

    def truncate(self, lengths: Tensor) -> None:
        self.check_own_rows()
        self.set_lengths(torch.minimum(self.lengths, lengths.to(torch.int32)))

    def release(self, rows: Tensor) -> None:
        self.check_own_rows()
        if self.live is None:
            self.live = torch.ones_like(self.lengths)
        self.live.index_fill_(0, rows, 0)
        self.set_lengths(self.lengths * self.live)

    def set_lengths(self, lengths: Tensor) -> None:
        """Rows have read no more than ``lengths`` int32 (R,): what stands behind is not a token."""
        self.row_lengths = lengths
        if lengths.device.type == "cpu" and lengths.numel():
            self.length = int(lengths.max())

    def check_own_rows(self) -> None:
        """Raise ValueError where rows share what they have read."""


class JoinedState:
    """The states of several models that read the same rows: a `DecodeState`."""

    def __init__(self, *states: Any) -> None:
        self.states = states

    @property
    def lengths(self) -> Tensor:
        return self.states[0].lengths

    def select(self, rows: Tensor) -> None:
        self._each("select", rows)

    def reorder(self, rows: Tensor) -> None:
        self._each("reorder", rows)

    def insert(self, slots: Tensor, other: JoinedState) -> None:
        for state, theirs in zip(self.states, other.states, strict=True):
            state.insert(slots, theirs)

    def truncate(self, lengths: Tensor) -> None:
        self._each("truncate", lengths)

    def release(self, rows: Tensor) -> None:
        self._each("release", rows)

    def _each(self, verb: str, x: Tensor) -> None:
        for state in self.states:
            getattr(state, verb, state.select)(x)  # a state may lack `reorder` alone


def insert_fixed(mine: list[Tensor], slots: Tensor, theirs: list[Tensor]) -> list[Tensor]:
    """``mine`` with the rows of ``theirs`` in the rows ``slots``, wide enough for both."""
    inserted = []
    for x, y in zip(mine, theirs, strict=True):
        width = max(x.shape[_time(x)], y.shape[_time(y)])
        inserted.append(_widened(x, width).index_copy(0, slots, _widened(y, width)))
    return inserted


def _time(x: Tensor) -> int:
    """The axis of the tokens: keys and values are (R, ..., H, T, D), all else is (R, T, ...)."""
    return x.dim() - 2 if x.dim() >= 4 else 1


def _widened(x: Tensor, width: int) -> Tensor:
    """``x`` with room for ``width`` tokens of a source: new ones are padding, True in a mask of what is padding."""
    behind = [0, 0] * (x.dim() - 1 - _time(x)) + [0, width - x.shape[_time(x)]]
    return F.pad(x, behind, value=x.dtype == torch.bool)
