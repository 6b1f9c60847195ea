"""Batches of id sequences: deterministic by (seed, epoch), resumable at the exact batch.

Batches           pairs, for an encoder-decoder       similar lengths together, padded
LabelledBatches   rows with one label each            similar lengths together, padded
PackedBatches     documents, for a language model     end to end, without padding
"""

import random
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

PAD, BOS, EOS = 0, 1, 2  # what the losses leave out, and what frames a sequence


class Frame(NamedTuple):
    """Ids of a vocabulary: what fills a row up, begins it (None: nothing does) and ends it; and the label that the
    losses leave out, -100 where padding is also a token."""

    pad: int = PAD
    bos: int | None = BOS
    eos: int = EOS
    ignored: int = PAD


OURS = Frame()
Pair = tuple[Sequence[int], Sequence[int]]
Augment = Callable[[list[int], random.Random], list[int]]
B = TypeVar("B")
M = TypeVar("M", bound="Movable")


@dataclass(frozen=True)
class Movable:
    """What every kind of batch can do: go to a device."""

    source: Tensor

    def to(self: M, device: torch.device) -> M:
        """The same batch on `device`; itself when it is there already."""
        if self.source.device == device:
            return self
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **{name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()})


@dataclass(frozen=True)
class Batch(Movable):
    """One step's input.

    source (B, T_s), target (B, T_t) and labels (B, T_t) are int64, padded on the right. `target` starts with bos and is
    what the decoder reads; `labels` is the same sequence one position later, closed by eos. The two counts leave
    padding out, and stand on the host so that counting never waits for a device.
    """

    target: Tensor
    labels: Tensor
    source_tokens: int
    label_tokens: int
    ignored: int = PAD

    @property
    def tokens(self) -> int:
        """Source symbols plus predicted symbols (eos too), without padding: the unit of every budget and speed here."""
        return self.source_tokens + self.label_tokens


@dataclass(frozen=True)
class LabelledBatch(Movable):
    """Rows with one label each: source (B, T) int64, padded on the right; labels (B,) int64.

    weights: (B,) float32, what each row counts in the loss; None: all the same. rows: the rows' numbers in the data, on
    the host, so that a prediction finds its text again.
    """

    labels: Tensor
    weights: Tensor | None
    rows: tuple[int, ...]
    source_tokens: int

    @property
    def label_tokens(self) -> int:
        """B: the predictions that the loss is a mean of."""
        return len(self.rows)

    @property
    def tokens(self) -> int:
        """Source symbols without padding. A label costs no position of its own, so it does not count."""
        return self.source_tokens


@dataclass(frozen=True)
class PackedBatch(Movable):
    """Documents end to end: source and labels (1, total) int64, cu_seqlens (N + 1,) int32, the `longest` one's length.

    Document i is `source[0, cu_seqlens[i] : cu_seqlens[i + 1]]`: bos and its ids, its positions counted from 0; its
    labels are its ids and eos. So the last position of a document predicts eos, and never the next one's first id.
    """

    labels: Tensor
    cu_seqlens: Tensor
    longest: int
    ignored: int = PAD
    prompt_tokens: int = 0

    @property
    def tokens(self) -> int:
        """Positions in the batch, bos too. Each is read and predicts in one step of one decoder, so it counts once."""
        return self.source.shape[1]

    source_tokens = tokens

    @property
    def label_tokens(self) -> int:
        """Positions whose next id counts in the loss: not those in a prompt."""
        return self.tokens - self.prompt_tokens


class Resumable(Generic[B]):
    """A sequence without end that knows its position: what every kind of batches here shares.

    Iterating yields what is left of the present epoch and then moves to the next, so a `for` loop is one epoch and
    `state_dict()` between two items is the exact position. A kind says what one epoch is made of (`_plan`: any
    sequence, made from the seed and the epoch alone), what an entry of it becomes (`_collate`), and what must be the
    same for a position to mean the same data (`_identity`).
    """

    _plan: Callable[[int], Sequence[Any]]
    _collate: Callable[[Any], B]
    _identity: Callable[[], dict[str, Any]]
    position: tuple[str, ...] = ("epoch", "index")  # the attributes that say where it is
    epoch = 0
    index = 0

    def __len__(self) -> int:
        """Items in the present epoch."""
        return len(self._plan(self.epoch))

    def __iter__(self) -> Iterator[B]:
        plan = self._plan(self.epoch)
        if self.index > len(plan):
            raise ValueError(f"the position in the data is damaged: {self.index:,} of the epoch's {len(plan):,} items")
        while self.index < len(plan):
            entry = plan[self.index]
            self.index += 1
            yield self._collate(entry)
        self.epoch, self.index = self.epoch + 1, 0

    def state_dict(self) -> dict[str, Any]:
        """The position after the last item handed out, and what must be the same for it to mean the same data."""
        return {**{name: getattr(self, name) for name in self.position}, **self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken. Raises ValueError when the data or the order are not the same."""
        for name, value in self._identity().items():
            if state.get(name) != value:
                raise ValueError(f"the data differ from the checkpoint's: {name} was {state.get(name)}, is {value}")
        for name in self.position:
            value = state.get(name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise ValueError(f"the position in the data is damaged: expected {name} from 0 on, found {value!r}")
        for name in self.position:
            setattr(self, name, state[name])


class Bucketed(Resumable[B]):
    """Batches of `batch_size` examples of similar lengths.

    With a `seed`, an epoch is shuffled, cut into pools of `pool` batches, sorted by length inside a pool, and the
    batches shuffled again: padding stays small and no batch repeats over epochs. `seed=None` keeps one order, sorted by
    length (evaluation). Raises ValueError for no examples, an empty source, or a batch size below 1.
    """

    def __init__(self, lengths: Sequence[tuple[int, ...]], batch_size: int, seed: int | None, pool: int) -> None:
        if not lengths:
            raise ValueError("no examples to batch")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if empty := sum(not source for source, *_ in lengths):
            raise ValueError(f"{empty} of {len(lengths)} examples have an empty source")
        self.lengths, self.batch_size, self.seed, self.pool = lengths, batch_size, seed, pool

    def _identity(self) -> dict[str, Any]:
        return {"examples": len(self.lengths), "batch_size": self.batch_size, "seed": self.seed, "pool": self.pool}

    def _plan(self, epoch: int) -> list[list[int]]:
        rows = list(range(len(self.lengths)))
        shuffler = random.Random(f"{self.seed}/{epoch}")
        span = len(rows)
        if self.seed is not None:
            shuffler.shuffle(rows)
            span = self.batch_size * self.pool
        pools = [sorted(rows[at : at + span], key=self.lengths.__getitem__) for at in range(0, len(rows), span)]
        plan = [pool[at : at + self.batch_size] for pool in pools for at in range(0, len(pool), self.batch_size)]
        if self.seed is not None:
            shuffler.shuffle(plan)
        return plan


class Batches(Bucketed[Batch]):
    """Batches of (source, target) id sequences, similar lengths together; `seed`, `pool`, errors: see `Bucketed`."""

    def __init__(
        self, pairs: Sequence[Pair], batch_size: int, *, seed: int | None = None, pool: int = 50, frame: Frame = OURS
    ) -> None:
        super().__init__([(len(source), len(target)) for source, target in pairs], batch_size, seed, pool)
        self.pairs, self.frame = pairs, frame

    def _collate(self, entry: list[int]) -> Batch:
        pairs, frame = [self.pairs[row] for row in entry], self.frame
        begin = [] if frame.bos is None else [frame.bos]
        return Batch(
            pad([list(source) for source, _ in pairs], frame.pad),
            pad([[*begin, *target] for _, target in pairs], frame.pad),
            pad([[*target, frame.eos] for _, target in pairs], frame.ignored),
            sum(len(source) for source, _ in pairs),
            sum(len(target) + 1 for _, target in pairs),
            frame.ignored,
        )


class LabelledBatches(Bucketed[LabelledBatch]):
    """Batches of rows with one label each, similar lengths together; `seed`, `pool` and errors as of `Bucketed`.

    rows: id sequences; labels: one int from 0 each; weights: what each row counts in the loss (None: all the same).
    augment: makes another row of a row each time it is handed out, from a generator that follows from the seed, the
    epoch and the row's number, so a resumed run sees the same; needs a seed. Its rows are never empty (`augment.py`).

    Raises ValueError also for another number of labels or weights than of rows, a label below 0, a weight below 0.
    """

    def __init__(
        self,
        rows: Sequence[Sequence[int]],
        labels: Sequence[int],
        batch_size: int,
        *,
        seed: int | None = None,
        pool: int = 50,
        weights: Sequence[float] | None = None,
        augment: Augment | None = None,
    ) -> None:
        super().__init__([(len(row),) for row in rows], batch_size, seed, pool)
        for name, values in (("labels", labels), ("weights", weights)):
            if values is not None and len(values) != len(rows):
                raise ValueError(f"{len(rows):,} rows need as many {name}, got {len(values):,}")
            if values is not None and min(values) < 0:
                raise ValueError(f"{name} must be 0 or more, got {min(values)}")
        if augment is not None and seed is None:
            raise ValueError("augment needs a seed: batches without one are for evaluation, of the rows as they are")
        self.rows, self.labels, self.weights, self.augment = rows, labels, weights, augment

    def _collate(self, entry: list[int]) -> LabelledBatch:
        rows = [list(self.rows[number]) for number in entry]
        if self.augment is not None:
            draws = (random.Random(f"{self.seed}/{self.epoch}/row {number}") for number in entry)
            rows = [self.augment(row, draw) for row, draw in zip(rows, draws, strict=True)]
        weights = None if self.weights is None else torch.tensor([float(self.weights[number]) for number in entry])
        labels = torch.tensor([self.labels[number] for number in entry])
        return LabelledBatch(pad(rows), labels, weights, tuple(entry), sum(map(len, rows)))


class PackedBatches(Resumable[PackedBatch]):
    """Batches of whole documents end to end, at most `batch_tokens` positions each (bos counts): no padding at all.

    With a `seed` the documents are shuffled in each epoch, without they keep their order; each batch takes as many of
    the next ones as fit. longest: a document of more ids is cut into pieces of at most so many, which become documents
    of their own (a model's max_length - 1, for bos); None: never. The ids are kept in 4 bytes each, so `rows` may be a
    generator. prompts: how many ids at the beginning of each row are given, and are not learned.

    Raises ValueError for no documents, an empty one, one that fits no batch, and one that is nothing but its prompt.
    """

    def __init__(
        self,
        rows: Iterable[Sequence[int]],
        batch_tokens: int,
        *,
        seed: int | None = None,
        longest: int | None = None,
        frame: Frame = OURS,
        prompts: Sequence[int] | None = None,
    ) -> None:
        if longest is not None and prompts is not None:
            raise ValueError("a row with a prompt is not cut: leave out longest=, and rows that are too long")
        self.batch_tokens, self.seed, self.frame, self.prompts = batch_tokens, seed, frame, prompts
        self.ids, self.starts = array("i"), array("q", [0])
        for number, row in enumerate(rows):
            if not len(row):
                raise ValueError(f"document {number} is empty")
            for piece in pieces(row, longest):
                check_fits(piece, batch_tokens, f"document {number}")
                self.ids.extend(piece)
                self.starts.append(len(self.ids))
        if not self.ids:
            raise ValueError("no documents to pack")

    def _identity(self) -> dict[str, Any]:
        sizes = {"documents": len(self.starts) - 1, "ids": len(self.ids)}
        return {**sizes, "batch_tokens": self.batch_tokens, "seed": self.seed}

    def _plan(self, epoch: int) -> list[list[int]]:
        documents = list(range(len(self.starts) - 1))
        if self.seed is not None:
            random.Random(f"{self.seed}/{epoch}").shuffle(documents)
        plan: list[list[int]] = []
        free = 0
        for number in documents:
            size = self.starts[number + 1] - self.starts[number] + 1
            if size > free:
                plan.append([])
                free = self.batch_tokens
            plan[-1].append(number)
            free -= size
        return plan

    def _collate(self, entry: list[int]) -> PackedBatch:
        rows = (self.ids[self.starts[number] : self.starts[number + 1]] for number in entry)
        return pack(rows, self.frame, self.prompts and [self.prompts[number] for number in entry])


def pad(rows: Sequence[list[int]], filler: int = PAD) -> Tensor:
    """Rows as one tensor (B, T) int64, filled up on the right."""
    width = max(map(len, rows))
    return torch.tensor([row + [filler] * (width - len(row)) for row in rows])


def pack(rows: Iterable[Sequence[int]], frame: Frame = OURS, prompts: Sequence[int] | None = None) -> PackedBatch:
    """One batch of these documents, in this order, each framed; the labels inside of a prompt are left out."""
    source: list[int] = []
    labels: list[int] = []
    ends, longest, given = [0], 0, 0
    begin = () if frame.bos is None else (frame.bos,)
    for number, row in enumerate(rows):
        source += (*begin, *row)
        behind = [*row, frame.eos][1 - len(begin) :]
        if prompts is not None:
            prompt = prompts[number] + len(begin) - 1
            if prompts[number] > len(row) or prompt < 0:
                raise ValueError(f"a prompt of {prompts[number]} ids in a row of {len(row)}")
            behind[:prompt], given = [frame.ignored] * prompt, given + prompt
        labels += behind
        longest = max(longest, len(source) - ends[-1])
        ends.append(len(source))
    starts = torch.tensor(ends, dtype=torch.int32)
    return PackedBatch(torch.tensor([source]), torch.tensor([labels]), starts, longest, frame.ignored, given)


def pieces(row: Sequence[int], longest: int | None) -> list[Sequence[int]]:
    """`row` cut into runs of at most `longest` ids; None: itself alone. An empty row has none."""
    if longest is not None and longest < 1:
        raise ValueError(f"longest must be at least 1, got {longest}")
    size = longest or max(1, len(row))
    return [row[at : at + size] for at in range(0, len(row), size)]


def check_fits(row: Sequence[int], batch_tokens: int, name: str) -> None:
    """Raise ValueError when a document fits no batch."""
    if len(row) + 1 > batch_tokens:
        raise ValueError(f"{name}: {len(row):,} ids and bos exceed batch_tokens {batch_tokens:,}; give `longest`")
