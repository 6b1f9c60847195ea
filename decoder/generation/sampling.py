"""Sampler: one token a row from its scores, the most probable one or a drawn one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tileformer.decoder.generation.options import Sampling
from tileformer.kernels import softmax
from tileformer.kernels.random import philox

POSITIONS_AHEAD = 16  # seeded clocks of so many steps are made at once: the cost of a few words is that of the calls
CLOCKS_AT_ONCE = 2**18
FEW_CLOCKS = 2**14  # below, those of all tokens are made even where some alone are asked for


class Sampler:
    """How the tokens of ``rows`` rows are chosen, ``copies`` of each sequence beside each other.

    Raises ValueError where there are seeds for another number of sequences.
    """

    def __init__(self, options: Sampling, rows: int, device: torch.device, copies: int = 1) -> None:
        self.options, self.rows = options, rows
        self.index: Tensor | None = None
        self.clocks: SeededClocks | None = None
        if options.seed is not None:
            seeds = seeds_of(options.seed, rows // copies)
            copy = torch.arange(copies).repeat(len(seeds))
            self.clocks = SeededClocks(seeds.repeat_interleave(copies).to(device), copy.to(device))

    def select(self, rows: Tensor) -> None:
        """Go on with these of the rows."""
        self.index = rows if self.index is None else self.index[rows]
        if self.clocks is not None:
            self.clocks.select(rows)

    def __call__(self, scores: Tensor, position: int) -> tuple[Tensor, Tensor]:
        """How good each token is, NaN where its row's scores are, and the tokens: (R,) each from ``scores`` (R, V).

        position: how many new tokens stand before."""
        if not self.options.samples:
            best, tokens = scores.max(dim=-1)
            return best, tokens
        shares, ids = candidates(scores, self.options)
        if self.clocks is not None:
            clocks = self.clocks(position, scores.shape[1], ids)
        else:  # those of rows that have left are drawn too, so that the others draw what they would have beside them
            clocks = shares.new_empty(self.rows, shares.shape[1]).exponential_(generator=self.options.generator)
            clocks = clocks if self.index is None else clocks[self.index]
        best, place = exponential_race(shares, clocks)
        return best, place if ids is None else ids.gather(1, place[:, None])[:, 0]


def seeds_of(seed: int | Sequence[int], rows: int) -> Tensor:
    """`Sampling.seed` of each row, int64 (rows,)."""
    seeds = seed + torch.arange(rows) if isinstance(seed, int) else torch.tensor(seed, dtype=torch.int64)
    if len(seeds) != rows:
        raise ValueError(f"{len(seeds)} seeds for {rows} rows: pass one each, or a single one")
    return seeds


def candidates(scores: Tensor, options: Sampling) -> tuple[Tensor, Tensor | None]:
    """Probabilities (R, n) of the tokens that may be drawn, up to a factor a row, and which these are: int64 (R, n),
    or None for all V in their order."""
    ids: Tensor | None = None
    scores = scores.float() / (options.temperature or 1.0)
    top_p = options.top_p if options.top_p != 1 else None
    if options.top_k is not None and options.top_k < scores.shape[1]:
        scores, ids = scores.topk(options.top_k)
    elif top_p is not None:
        scores, ids = scores.sort(dim=-1, descending=True, stable=True)
    shares = softmax(scores)
    if top_p is not None:
        shares = shares.masked_fill(shares.cumsum(-1) - shares >= top_p, 0.0)  # the first one always stays
    if options.min_p is not None:
        shares = shares.masked_fill(shares < options.min_p * shares.amax(-1, keepdim=True), 0.0)
    if options.typical_p is not None:
        shares = typical(shares / shares.sum(-1, keepdim=True).clamp(min=1e-30), options.typical_p)
    return shares, ids


def typical(shares: Tensor, mass: float) -> Tensor:
    """``shares`` without those that are not among the nearest to the expected surprise that together reach ``mass``."""
    surprise = -shares.log()
    distance = (surprise - torch.special.entr(shares).sum(-1, keepdim=True)).abs()
    nearest, order = distance.sort(dim=-1, stable=True)
    before = (shares.gather(1, order).cumsum(-1) < mass).sum(-1, keepdim=True).clamp(max=shares.shape[1] - 1)
    return shares.masked_fill(distance > nearest.gather(1, before), 0.0)


def exponential_race(shares: Tensor, clocks: Tensor) -> tuple[Tensor, Tensor]:
    """An index (R,) of each row of ``shares`` (R, n), drawn in proportion to them, behind its share / clock: the first
    of n exponential ``clocks`` to ring.

    It is what torch.multinomial draws, without its look at the shares, for which a GPU would be waited for at each
    token."""
    best, index = (shares / clocks).max(-1)
    return best, index


class SeededClocks:
    """Exponential clocks that are a function of (a row's seed, its copy, the position, the token) alone."""

    def __init__(self, seeds: Tensor, copies: Tensor) -> None:
        self.seeds, self.copies = seeds, copies  # int64 (R,)
        self.ahead, self.begin = seeds.new_empty(len(seeds), 0, 0), 0

    def select(self, rows: Tensor) -> None:
        self.seeds, self.copies, self.ahead = self.seeds[rows], self.copies[rows], self.ahead[rows]

    def __call__(self, position: int, vocab: int, ids: Tensor | None = None) -> Tensor:
        """(R, V) float32, or (R, n) those of the tokens ``ids``."""
        work = len(self.seeds) * vocab
        if ids is not None and work > FEW_CLOCKS:
            words = random_words(self.seeds[:, None], position, self.copies[:, None], ids // 4)
            return exponential(words.gather(-1, (ids % 4)[..., None])[..., 0])
        if not self.begin <= position < self.begin + self.ahead.shape[1]:
            steps = max(1, min(POSITIONS_AHEAD, CLOCKS_AT_ONCE // max(work, 1)))
            positions = torch.arange(position, position + steps, device=self.seeds.device)[:, None]
            words = torch.arange(-(-vocab // 4), device=self.seeds.device)
            drawn = random_words(self.seeds[:, None, None], positions, self.copies[:, None, None], words)
            self.ahead, self.begin = exponential(drawn.flatten(-2)[..., :vocab]), position
        clocks = self.ahead[:, position - self.begin]
        return clocks if ids is None else clocks.gather(1, ids)


def random_words(seeds: Tensor, positions: Tensor | int, copies: Tensor | int, words: Tensor) -> Tensor:
    """(..., 4) random 32-bit words of int64 tensors that broadcast: token i has lane i % 4 of ``words`` i // 4."""
    low, zero = 2**32 - 1, torch.zeros_like(seeds)
    drawn = philox([words, zero + positions, zero + copies, zero], [seeds & low, seeds >> 32 & low])
    return torch.stack(drawn, -1)


def uniform(words: Tensor) -> Tensor:
    """Numbers between 0 and 1 of 32 random bits, without either."""
    return ((words.float() + 0.5) * 2.0**-32).clamp_(max=1 - 2.0**-24)


def exponential(words: Tensor) -> Tensor:
    """Exponential numbers of 32 random bits, as exact near 0 as float32 is: a small share wins by a small number."""
    return -torch.log1p(-uniform(words))
