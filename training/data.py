"""Length-bucketed batches of token pairs: deterministic by (seed, epoch), resumable at the exact batch."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Pair = tuple[Sequence[int], Sequence[int]]


@dataclass(frozen=True)
class Batch:
    """One step's input.

    source (B, T_s), target (B, T_t) and labels (B, T_t) are int64, padded on the right. `target` starts with bos and is
    what the decoder reads; `labels` is the same sequence one place later, closed by eos. The two counts leave padding
    out, and stand on the host so that counting never waits for a device.
    """

    source: Tensor
    target: Tensor
    labels: Tensor
    source_tokens: int
    label_tokens: int

    @property
    def tokens(self) -> int:
        """Source symbols plus predicted symbols (eos too), without padding: the unit of every budget and speed here."""
        return self.source_tokens + self.label_tokens

    def to(self, device: torch.device) -> "Batch":
        """The same batch on `device`; itself when it is there already."""
        if self.source.device == device:
            return self
        source, target, labels = (x.to(device, non_blocking=True) for x in (self.source, self.target, self.labels))
        return Batch(source, target, labels, self.source_tokens, self.label_tokens)


class Batches:
    """Batches of (source, target) id sequences, similar lengths together.

    Iterating yields what is left of the present epoch and then moves to the next, so a `for` loop is one epoch and
    `state_dict()` between two batches is the exact place. With a `seed`, an epoch is shuffled, cut into pools of `pool`
    batches, sorted by length inside a pool, and the batches shuffled again: padding stays small and no batch repeats
    over epochs. `seed=None` keeps one order, sorted by length (evaluation).

    Raises ValueError for no pairs, an empty source, or a batch size below 1.
    """

    def __init__(
        self,
        pairs: Sequence[Pair],
        batch_size: int,
        *,
        seed: int | None = None,
        pool: int = 50,
        pad_id: int = 0,
        bos_id: int = 1,
        eos_id: int = 2,
    ) -> None:
        if not pairs:
            raise ValueError("no examples to batch")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if empty := sum(not len(source) for source, _ in pairs):
            raise ValueError(f"{empty} of {len(pairs)} examples have an empty source")
        self.pairs, self.batch_size, self.seed, self.pool = pairs, batch_size, seed, pool
        self.pad_id, self.bos_id, self.eos_id = pad_id, bos_id, eos_id
        self.epoch = 0
        self.index = 0

    def __len__(self) -> int:
        """Batches in one epoch."""
        return len(self._plan(0))

    def __iter__(self) -> Iterator[Batch]:
        plan = self._plan(self.epoch)
        while self.index < len(plan):
            rows = plan[self.index]
            self.index += 1
            yield self._collate([self.pairs[row] for row in rows])
        self.epoch, self.index = self.epoch + 1, 0

    def state_dict(self) -> dict[str, Any]:
        """The place after the last batch handed out, and what must be the same for it to mean the same data."""
        return {"epoch": self.epoch, "index": self.index, **self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken. Raises ValueError when the data or the order are not the same."""
        for name, value in self._identity().items():
            if state[name] != value:
                raise ValueError(f"the data differ from the checkpoint's: {name} was {state[name]}, is {value}")
        self.epoch, self.index = state["epoch"], state["index"]

    def _identity(self) -> dict[str, Any]:
        return {"examples": len(self.pairs), "batch_size": self.batch_size, "seed": self.seed, "pool": self.pool}

    def _length(self, row: int) -> tuple[int, int]:
        source, target = self.pairs[row]
        return len(source), len(target)

    def _plan(self, epoch: int) -> list[list[int]]:
        """Row numbers of every batch of one epoch, in order."""
        rows = list(range(len(self.pairs)))
        shuffler = random.Random(f"{self.seed}/{epoch}")
        span = len(rows)
        if self.seed is not None:
            shuffler.shuffle(rows)
            span = self.batch_size * self.pool
        pools = [sorted(rows[start : start + span], key=self._length) for start in range(0, len(rows), span)]
        plan = [
            pool[start : start + self.batch_size] for pool in pools for start in range(0, len(pool), self.batch_size)
        ]
        if self.seed is not None:
            shuffler.shuffle(plan)
        return plan

    def _collate(self, pairs: Sequence[Pair]) -> Batch:
        return Batch(
            self._pad([list(source) for source, _ in pairs]),
            self._pad([[self.bos_id, *target] for _, target in pairs]),
            self._pad([[*target, self.eos_id] for _, target in pairs]),
            sum(len(source) for source, _ in pairs),
            sum(len(target) + 1 for _, target in pairs),
        )

    def _pad(self, rows: list[list[int]]) -> Tensor:
        width = max(map(len, rows))
        return torch.tensor([row + [self.pad_id] * (width - len(row)) for row in rows])
