"""Options: how tokens are chosen, by the names of transformers' GenerationConfig where the meaning is the same."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a token is drawn; without a temperature the most probable one is taken.

    temperature: divides the logits, at least 1e-6. top_k, top_p: only the k most probable tokens, and only the fewest
    of these whose probabilities together reach p. min_p: only tokens at least p times as probable as the best one.
    typical_p: only the tokens nearest to the expected surprise that together reach p (arXiv:2202.00666). They are
    applied in this order, each to what the one before has left.

    seed: whole numbers, one for each row of the source, or one for all: row i then has seed + i. What a row draws is a
    function of its seed, the index of its new token and the id of each token alone: it draws the same in any batch.
    generator: instead, torch's random numbers, in the order of the batch; a seeded one makes a run repeatable."""

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    typical_p: float | None = None
    seed: int | Sequence[int] | None = None
    generator: torch.Generator | None = None

    @property
    def samples(self) -> bool:
        return self.temperature is not None

    def __post_init__(self) -> None:
        names = ("top_k", "top_p", "min_p", "typical_p", "seed", "generator")
        if not self.samples and (given := [name for name in names if getattr(self, name) is not None]):
            which = f"{', '.join(given)} {'is' if len(given) == 1 else 'are'} for sampling"
            raise ValueError(f"{which}: pass a temperature too, such as 1.0")
        if self.temperature is not None and not 1e-6 <= self.temperature < math.inf:
            raise ValueError(
                f"temperature must be finite and at least 1e-6, got {self.temperature}; "
                "None takes the most probable token"
            )
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {self.top_k}")
        for name in ("top_p", "min_p", "typical_p"):
            if (p := getattr(self, name)) is not None and not 0 < p <= 1:
                raise ValueError(f"{name} must be in (0, 1], got {p}")
        if self.seed is not None and self.generator is not None:
            raise ValueError("seed and generator both say where random numbers come from: pass one of them")
        if self.seed is not None and not isinstance(self.seed, int):
            object.__setattr__(self, "seed", tuple(map(int, self.seed)))


@dataclass(frozen=True, kw_only=True)
class Constraints:
    """What the scores of the next tokens become by what a row has said so far. They are applied in this order.

    repetition_penalty: divides the positive scores of tokens that the row holds, its prompt included, and multiplies
    the others (arXiv:1909.05858). presence_penalty and frequency_penalty: taken from the score of a token that the row
    has chosen, once and for each time. no_repeat_ngram_size: no n tokens in a row twice. bad_words_ids: sequences that
    never appear (one of eos_id alone is left out, as transformers does). min_new_tokens: no eos_id before so many.
    forced_tokens: (index of a new token, its id) pairs. forced_eos_token_id: a row that was not ended by then ends with
    it. bitmask: called as bitmask(new tokens (R, n) int64) before each choice, gives int32 (R, ceil(V / 32)), bit
    i % 32 of word i // 32 set where token i is allowed: what xgrammar, llguidance and outlines-core write.
    adjust: called as adjust(tokens, scores) with the R rows so far, int64 (R, n), prompts and what was chosen, pad_id
    before short prompts and behind a row's end; gives other scores (R, V), -inf for what may not be. A LogitsProcessor
    of transformers will do. Scores are logits; with beams, log-probabilities, as in transformers.

    A row that has no token left ends there, without one. With bitmask or adjust each row keeps its place in the batch
    to the end, B * num_beams of them with beams, those of a source beside each other and each anywhere among them.

    forced_prefix_ids: what every row begins with, read together with its prompt; it counts as new tokens.
    stop_strings: a row ends with the token that completes one; decode(ids) is the text of a row's new tokens. Looked
    at on the host after each step."""

    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    no_repeat_ngram_size: int = 0
    bad_words_ids: Sequence[Sequence[int]] = ()
    min_new_tokens: int = 0
    forced_tokens: Sequence[tuple[int, int]] = ()
    forced_eos_token_id: int | None = None
    bitmask: Callable[[Tensor], Tensor] | None = None
    adjust: Callable[[Tensor, Tensor], Tensor] | None = None
    forced_prefix_ids: Sequence[int] = ()
    stop_strings: str | Sequence[str] = ()
    decode: Callable[[list[int]], str] | None = None

    @property
    def constrains(self) -> bool:
        """Whether scores or ends depend on more than the model."""
        apart = ("forced_prefix_ids", "decode")
        fields = Constraints.__dataclass_fields__
        return any(getattr(self, name) != fields[name].default for name in fields if name not in apart)

    def __post_init__(self) -> None:
        strings = (self.stop_strings,) if isinstance(self.stop_strings, str) else tuple(self.stop_strings)
        plain = {"stop_strings": strings, "bad_words_ids": tuple(map(tuple, self.bad_words_ids))}
        plain |= {"forced_tokens": tuple(map(tuple, self.forced_tokens))}
        for name, value in (plain | {"forced_prefix_ids": tuple(self.forced_prefix_ids)}).items():
            object.__setattr__(self, name, value)
        if not 0 < self.repetition_penalty < math.inf:
            raise ValueError(f"repetition_penalty must be above 0 and finite, got {self.repetition_penalty}")
        for name in ("presence_penalty", "frequency_penalty"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"{name} must be finite, got {getattr(self, name)}")
        for name in ("no_repeat_ngram_size", "min_new_tokens"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        if not all(plain["bad_words_ids"]) or not all(strings):
            raise ValueError("bad_words_ids and stop_strings must not hold an empty one, which is everywhere")
        if bool(strings) != (self.decode is not None):
            raise ValueError(
                "stop_strings and decode belong together: decode(ids) gives the text they are looked for in"
            )


@dataclass(frozen=True, kw_only=True)
class Beams:
    """How rows are searched. num_beams, length_penalty: best sum of log-probabilities / length ** length_penalty first.

    num_beam_groups, diversity_penalty: groups of beams are searched one after the other; in each step, what an earlier
    group of the source has just chosen costs the penalty for each time it did (arXiv:1610.02424). Scores hold it.
    num_return_sequences: so many rows for each of the source, with their scores: the best beams; or samples, in the
    order in which they were drawn, which like one greedy row are scored by the model's own log-probabilities.

    There is no coverage penalty: the fused attention never holds the weights that it is made of."""

    num_beams: int = 1
    length_penalty: float = 1.0
    num_beam_groups: int = 1
    diversity_penalty: float = 0.0
    num_return_sequences: int | None = None

    def __post_init__(self) -> None:
        if self.num_beams < 1:
            raise ValueError(f"num_beams must be at least 1, got {self.num_beams}")
        if self.length_penalty < 0:
            raise ValueError(f"length_penalty must be at least 0, got {self.length_penalty}")
        if self.num_beam_groups < 1 or self.num_beams % self.num_beam_groups:
            raise ValueError(
                f"num_beam_groups must divide num_beams {self.num_beams} into equal groups, got {self.num_beam_groups}"
            )
        if (self.num_beam_groups > 1) != (self.diversity_penalty > 0) or self.diversity_penalty < 0:
            raise ValueError(
                "several num_beam_groups and a diversity_penalty above 0 belong together, "
                f"got {self.num_beam_groups} and {self.diversity_penalty}"
            )


@dataclass(frozen=True, kw_only=True)
class Options(Sampling, Constraints, Beams):
    """How `generate` chooses tokens: all of `Sampling`, `Constraints` and `Beams`. ValueError for what makes no sense.

    generate(model, src, options=Options(temperature=0.8, min_p=0.05, repetition_penalty=1.2, seed=1))
    """

    @property
    def searches(self) -> bool:
        return self.num_beams > 1

    def __post_init__(self) -> None:
        for part in (Sampling, Constraints, Beams):
            part.__post_init__(self)
        if self.samples and self.num_beams > 1:
            raise ValueError(
                f"beams are searched, not sampled: pass temperature={self.temperature} or num_beams, not both"
            )
        n = self.num_return_sequences
        if n is not None and not 1 <= n <= (n if self.samples else self.num_beams):
            most = "at least 1" if self.samples else f"between 1 and num_beams {self.num_beams}"
            raise ValueError(f"num_return_sequences (n_best) must be {most}, got {n}")
