"""What state.json says of a run in training: every field is checked against its type before anything uses it."""

import math
import types
import typing
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, TypeVar

from tileformer.files import quote, shorten
from tileformer.training.settings import Settings

T = TypeVar("T")
OLD_NAMES = {"stale": "validations_since_best", "cut": "plateau_factor"}  # of fields, in state.json of older runs


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged, or not what was asked for. The message is one line and names the path."""


def parse(kind: type[T], values: Any, where: str) -> T:
    """The dataclass `kind` from what JSON says of it. CheckpointError that begins with `where`: a key that is missing
    or unknown, a value of another type, a number that is not finite, or what `kind` itself refuses."""
    if not isinstance(values, dict):
        raise CheckpointError(f"{where}: expected an object, found {quote(values)}")
    known = {part.name: part for part in fields(kind)}  # type: ignore[arg-type]
    if unknown := [name for name in values if name not in known]:
        raise CheckpointError(f"{where}: no field {quote(unknown[0])} is known; damaged, or of a newer version")
    result = {}
    for name, part in known.items():
        if name not in values:
            if part.default is MISSING and part.default_factory is MISSING:
                raise CheckpointError(f"{where}: {name} is missing")
            continue
        value = values[name]
        if part.type is int and isinstance(value, float) and value.is_integer():
            value = int(value)  # a budget given as 1e6
        if not _is(value, part.type):
            wanted = part.type.__name__ if isinstance(part.type, type) else str(part.type)
            raise CheckpointError(f"{where}: expected {name} as {wanted}, found {quote(value)}")
        result[name] = tuple(value) if isinstance(value, list) else value
    try:
        return kind(**result)
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{where}: {shorten(error)}") from None


def _is(value: Any, kind: Any) -> bool:
    """Whether a value of JSON is one of this type. A number is finite, and true is no number."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return True
    if origin in (types.UnionType, typing.Union):
        return any(_is(value, each) for each in inner)
    if origin is tuple:
        return isinstance(value, list) and len(value) == len(inner) and all(map(_is, value, inner))
    if origin is not None:
        return isinstance(value, origin)
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, kind)


@dataclass
class TrainState:
    """Where a run stands: what its checkpoint holds beside weights, optimiser, random states and position in the data.

    validations_since_best: since the lowest loss, `best`, was measured at `best_step`; plateau_factor: what the plateau
    rule has left of the learning rate; last: the last line of the log. pending_*: steps behind that line, and their
    sums. between: saved between two of the periodic checkpoints, because the run was stopped or time had passed.

    Raises ValueError for numbers that no run can have.
    """

    step: int = 0
    tokens: int = 0
    core_seconds: float = 0.0
    wall_seconds: float = 0.0
    last: dict[str, Any] = field(default_factory=dict)
    skipped: int = 0
    best: float | None = None
    best_step: int | None = None
    validations_since_best: int = 0
    plateau_factor: float = 1.0
    pending_steps: int = 0
    pending_tokens: int = 0
    pending_loss: float = 0.0
    pending_skipped: int = 0
    pending_core_seconds: float = 0.0
    between: bool = False

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            signed = name in ("best", "pending_loss")
            if isinstance(value, int | float) and not signed and value < 0:
                raise ValueError(f"{name} must not be below 0, got {value}")
        if not 0 < self.plateau_factor <= 1:
            raise ValueError(f"plateau_factor must be in (0, 1], got {self.plateau_factor}")
        if max(self.best_step or 0, self.pending_steps) > self.step or self.pending_tokens > self.tokens:
            raise ValueError(f"a part of the run is longer than its {self.step:,} steps and {self.tokens:,} tokens")

    def record_validation(self, valid_loss: float, settings: Settings) -> bool:
        """Take in one validation. Whether it was the lowest so far."""
        if valid_loss < (math.inf if self.best is None else self.best):
            self.best, self.best_step, self.validations_since_best = valid_loss, self.step, 0
            return True
        self.validations_since_best += 1
        if settings.schedule == "plateau" and self.validations_since_best % settings.plateau_wait == 0:
            self.plateau_factor = max(self.plateau_factor * settings.plateau_factor, settings.floor)
        return False

    def ended(self, settings: Settings) -> bool:
        return self.tokens >= settings.tokens or 0 < settings.patience <= self.validations_since_best


@dataclass
class Saved(TrainState):
    """All of state.json of a run in training: where it stands, and what it was made by."""

    format: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    meta: dict[str, Any] = field(default_factory=dict)
    scaler: dict[str, Any] = field(default_factory=dict)
    threads: int = 1
    torch: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        loss = self.last.get("loss")
        if self.last and not _is(loss, float):
            raise ValueError(f"expected the loss of the last line as a number, found {quote(loss)}")
        parse(Settings, self.settings, "settings")
