"""Augmentation: another row of ids from a row, so that no epoch shows a text twice the same.

Each is a pure function `(row, random) -> row` for `LabelledBatches(..., augment=)`; give other settings by
`functools.partial`. None makes an empty row of one that is not, and the row that came in stays as it was.
"""

import random

Row = list[int]
UNKNOWN = 3  # a token nobody can read: what replaces a hidden one


def token_dropout(row: Row, random: random.Random, *, rate: float = 0.1, replace: int | None = UNKNOWN) -> Row:
    """Each id is dropped with probability `rate`: replaced by `replace`, or (None) left out."""
    _check_rate(rate)
    dropped = [random.random() < rate for _ in row]
    if replace is not None:
        return [replace if drop else number for number, drop in zip(row, dropped, strict=True)]
    kept = [number for number, drop in zip(row, dropped, strict=True) if not drop]
    return kept or [random.choice(row) for _ in row[:1]]


def span_mask(row: Row, random: random.Random, *, rate: float = 0.15, span: int = 3, mask: int = UNKNOWN) -> Row:
    """Runs of `mask`, `span` ids long on average (1 to 2 `span` - 1), until `rate` of the row is hidden (floor)."""
    _check_rate(rate)
    if span < 1:
        raise ValueError(f"span must be at least 1, got {span}")
    row, budget = list(row), int(rate * len(row))
    hidden: set[int] = set()
    while len(hidden) < budget:
        start, length = random.randrange(len(row)), random.randint(1, 2 * span - 1)
        free = [position for position in range(start, min(start + length, len(row))) if position not in hidden]
        hidden.update(free[: budget - len(hidden)])
    return [mask if position in hidden else number for position, number in enumerate(row)]


def shuffle_segments(row: Row, random: random.Random, *, segments: int = 3) -> Row:
    """Cut the row at random positions into `segments` runs (fewer in a shorter row), and put them in another order."""
    if segments < 1:
        raise ValueError(f"segments must be at least 1, got {segments}")
    cuts = sorted(random.sample(range(1, len(row)), min(segments, len(row)) - 1)) if row else []
    parts = [row[start:end] for start, end in zip([0, *cuts], [*cuts, len(row)], strict=True)]
    random.shuffle(parts)
    return [number for part in parts for number in part]


def _check_rate(rate: float) -> None:
    if not 0 <= rate < 1:
        raise ValueError(f"rate must be in [0, 1), got {rate}")
