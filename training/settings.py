"""Settings: how to learn, in one frozen dataclass that knows what makes no sense."""

import math
from dataclasses import dataclass

from tileformer.files import quote

CHOICES = {
    "optimizer": ("adamw", "sgd", "rmsprop"),
    "schedule": ("cosine", "wsd", "linear", "inverse_sqrt", "constant", "plateau"),
    "precision": ("auto", "fp32", "bf16", "fp16"),
}
POSITIVE = ("tokens", "lr", "clip", "log_every", "save_every", "keep", "accumulate", "plateau_wait")
NOT_NEGATIVE = ("momentum", "weight_decay", "l1", "patience")


@dataclass(frozen=True)
class Settings:
    """How to learn. The budget is counted in tokens (`Batch.tokens`): it means the same at every batch size and speed.

    The learning rate rises linearly over the first `warmup` of the budget, then follows `schedule`
    (`learning_rate_factor` says how; `decay` is of "wsd", `floor` the lowest share of `lr`). "plateau" multiplies the
    rate by `plateau_factor` whenever `plateau_wait` validations in a row bring no lower loss.

    `betas` belong to AdamW; their second also averages RMSprop's squares. `momentum` belongs to SGD and RMSprop.
    `weight_decay` is decoupled in AdamW and an L2 penalty in the other two. `l1` moves every decayed weight towards 0
    by lr x l1 a step and not past it: a proximal step behind the optimiser's, so the reported loss holds no penalty,
    and weights that plain SGD moves by less become exactly 0 (momentum and adaptive steps move them further).
    A step adds up `accumulate` batches, weighted by their labels; the last step of an epoch takes what is left.

    Precision "auto" is `resolve_precision`; "fp16" scales the loss and skips the steps whose gradients overflow.
    `valid_every`: "save" (with each checkpoint), "epoch", or a number of steps; the last step always validates.
    `patience`: stop after so many validations in a row without a lower loss (0: never). `keep_best`: the weights of the
    lowest validation loss are kept, on disk beside the newest `keep`, and stand in the model when `fit` returns.

    Raises ValueError for what makes no sense.
    """

    tokens: int
    lr: float = 1.5e-3
    schedule: str = "cosine"
    warmup: float = 0.1
    decay: float = 0.3
    floor: float = 0.0
    betas: tuple[float, float] = (0.9, 0.98)
    weight_decay: float = 0.01
    clip: float = 1.0
    precision: str = "auto"
    log_every: int = 100
    save_every: int = 500
    keep: int = 1
    optimizer: str = "adamw"
    momentum: float = 0.9
    l1: float = 0.0
    accumulate: int = 1
    valid_every: str | int = "save"
    patience: int = 0
    plateau_wait: int = 2
    plateau_factor: float = 0.5
    keep_best: bool = False

    def __post_init__(self) -> None:
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {quote(getattr(self, name), 200)}")
        for name, value in vars(self).items():
            if any(isinstance(x, float) and not math.isfinite(x) for x in (value if name == "betas" else (value,))):
                raise ValueError(f"{name} must be finite, got {value}; a large number has the effect of infinity")
            if name in POSITIVE and not value > 0:
                raise ValueError(f"{name} must be above 0, got {value}")
            if name in NOT_NEGATIVE and not value >= 0:
                raise ValueError(f"{name} must not be below 0, got {value}")
        if not (0 <= self.warmup < 1 and 0 < self.decay <= 1):
            raise ValueError(f"warmup must be in [0, 1) and decay in (0, 1], got {self.warmup} and {self.decay}")
        if self.schedule == "wsd" and self.warmup + self.decay > 1:
            both = f"{self.warmup} and {self.decay}"
            raise ValueError(f"warmup and decay of wsd share the run, got {both}, over 1 together")
        if self.schedule == "inverse_sqrt" and not self.warmup:
            raise ValueError("warmup must be above 0 for inverse_sqrt, which falls from its end, got 0")
        if not 0 < self.plateau_factor < 1:
            raise ValueError(f"plateau_factor must be in (0, 1), got {self.plateau_factor}")
        every = self.valid_every
        if every not in ("save", "epoch") and not (isinstance(every, int) and every > 0):
            raise ValueError(f"valid_every must be 'save', 'epoch' or a number of steps, got {quote(every, 200)}")
        if self.steered and every == "save":
            why = "how often a checkpoint is written must not decide what is learnt"
            raise ValueError(f"valid_every must be 'epoch' or a number of steps with {self.steered}: {why}")

    @property
    def steered(self) -> str:
        """The first setting that lets the validation loss decide something; empty when none does."""
        plateau, patience = self.schedule == "plateau", f"patience={self.patience}"
        asked = {"schedule='plateau'": plateau, patience: self.patience > 0, "keep_best": self.keep_best}
        return next((name for name, wanted in asked.items() if wanted), "")
