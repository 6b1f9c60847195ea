"""Sampler: one token a row from its logits, the most probable one or a drawn one."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tileformer.kernels import softmax


@dataclass(frozen=True)
class Sampler:
    """What `generate` is told of temperature, top_k, top_p and a generator. ValueError for what makes no sense."""

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    generator: torch.Generator | None = None

    def __post_init__(self) -> None:
        if not self.samples and (self.top_k, self.top_p, self.generator) != (None, None, None):
            raise ValueError("top_k, top_p and generator are for sampling: pass a temperature too, such as 1.0")
        if self.temperature is not None and not 1e-6 <= self.temperature < math.inf:
            raise ValueError(
                f"temperature must be finite and at least 1e-6, got {self.temperature}; "
                "None takes the most probable token"
            )
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}")

    @property
    def samples(self) -> bool:
        return self.temperature is not None

    def __call__(self, logits: Tensor) -> Tensor:
        """(R,) int64 from ``logits`` (R, V)."""
        if self.temperature is None:
            return logits.argmax(dim=-1)
        ordered, tokens = (logits.float() / self.temperature).sort(dim=-1, descending=True, stable=True)
        ordered, tokens = ordered[:, : self.top_k], tokens[:, : self.top_k]
        shares = softmax(ordered)
        if self.top_p is not None:
            shares = shares.masked_fill(shares.cumsum(-1) - shares >= self.top_p, 0.0)  # the first one always stays
        return tokens.gather(1, exponential_race(shares, self.generator)[:, None])[:, 0]


def exponential_race(shares: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """An index (R,) of each row of ``shares`` (R, V), drawn in proportion to them: the first of V exponential clocks to
    ring.

    It is what torch.multinomial draws, without its look at the shares, for which a GPU would be waited for at each
    token."""
    return (shares / torch.empty_like(shares).exponential_(generator=generator)).argmax(-1)
