"""Adjuster: what `Constraints` do to the scores of the next tokens, by the tokens of each row so far."""

from __future__ import annotations

import torch
from torch import Tensor

from tileformer.decoder.generation.options import Constraints


class Adjuster:
    """The tokens of R rows, and what the next ones may be.

    prompts: (R, W), each row's own tokens with ``pad_id`` before them; the last ``prefix`` of these are new ones, and
    at most ``steps`` follow, or where a row ends before ``limits`` (R,). Raises ValueError for an id that is none.
    """

    def __init__(
        self,
        options: Constraints,
        prompts: Tensor,
        steps: int,
        limits: Tensor | None = None,
        prefix: int = 0,
        *,
        eos_id: int,
        pad_id: int,
        vocab: int,
    ) -> None:
        self.options, self.steps, self.limits = options, steps, limits
        self.eos_id, self.pad_id, self.vocab = eos_id, pad_id, vocab
        self.first = prompts.shape[1] - prefix  # where the new tokens begin
        self.end = prompts.shape[1]
        self.tokens = torch.cat([prompts, prompts.new_full((len(prompts), steps), pad_id)], 1)
        self.forced = dict(options.forced_tokens)
        words = [tuple(word) for word in options.bad_words_ids if tuple(word) != (eos_id,)]
        last = () if options.forced_eos_token_id is None else (options.forced_eos_token_id,)
        for token in (*(i for word in words for i in word), *self.forced.values(), *last):
            if not 0 <= token < vocab or token == pad_id:
                raise ValueError(
                    f"token {token} cannot be banned or forced: the model chooses among 0 to {vocab - 1}, "
                    f"and never pad_id {pad_id}"
                )
        if options.min_new_tokens > steps + prefix:
            raise ValueError(
                f"min_new_tokens {options.min_new_tokens} is more than the room of {steps + prefix} tokens"
            )
        by_length: dict[int, list[tuple[int, ...]]] = {}
        for word in words:
            by_length.setdefault(len(word) - 1, []).append(word)
        self.bad_words = [prompts.new_tensor(group) for group in by_length.values()]

    def append(self, tokens: Tensor) -> None:
        """``tokens`` (R,) were chosen."""
        self.tokens[:, self.end] = tokens
        self.end += 1

    def select(self, rows: Tensor) -> None:
        self.tokens = self.tokens[rows]
        self.limits = None if self.limits is None else self.limits[rows]

    def stopped(self) -> Tensor:
        """Which rows hold a stop string, (R,) bool."""
        decode = self.options.decode
        assert decode is not None
        rows = self.tokens[:, self.first : self.end].tolist()
        texts = [decode([token for token in row if token != self.pad_id]) for row in rows]
        held = [any(stop in text for stop in self.options.stop_strings) for text in texts]
        return torch.tensor(held, device=self.tokens.device)

    def __call__(self, scores: Tensor, step: int) -> Tensor:
        """Scores (R, V) after every constraint; ``pad_id`` has -inf, and 0 where no other token is left."""
        options, index = self.options, self.end - self.first
        if options.repetition_penalty != 1.0:
            held = self.tokens[:, : self.end]
            own = scores.gather(1, held)
            own = torch.where(own < 0, own * options.repetition_penalty, own / options.repetition_penalty)
            scores = scores.scatter(1, held, own)
        if options.presence_penalty or options.frequency_penalty:
            chosen = self.tokens[:, self.first : self.end]
            counts = torch.zeros_like(scores).scatter_add_(1, chosen, torch.ones_like(chosen, dtype=scores.dtype))
            scores = scores - options.frequency_penalty * counts - options.presence_penalty * (counts > 0)
        if options.no_repeat_ngram_size:
            scores = self._without_repeated(scores, options.no_repeat_ngram_size)
        for words in self.bad_words:
            before = words.shape[1] - 1
            if before <= self.end:
                about = (self.tokens[:, None, self.end - before : self.end] == words[:, :-1]).all(-1)
                cost = torch.zeros_like(about, dtype=scores.dtype).masked_fill(about, float("-inf"))
                scores = scores.index_add(1, words[:, -1], cost)
        if index < options.min_new_tokens:
            scores = self._with(scores, self.eos_id, float("-inf"))
        if index in self.forced:
            scores = self._only(scores, self.forced[index])
        if options.forced_eos_token_id is not None:
            if step + 1 == self.steps:
                scores = self._only(scores, options.forced_eos_token_id)
            elif self.limits is not None:
                ends = (step + 1 >= self.limits)[:, None]
                scores = torch.where(ends, self._only(scores, options.forced_eos_token_id), scores)
        if options.bitmask is not None:
            scores = self._allowed(scores, options.bitmask(self.tokens[:, self.first : self.end]))
        if options.adjust is not None:
            wanted, scores = scores.shape, options.adjust(self.tokens[:, : self.end], scores)
            if scores.shape != wanted:
                raise ValueError(f"adjust must give scores {tuple(wanted)}, got {tuple(scores.shape)}")
        scores = self._with(scores, self.pad_id, float("-inf"))
        scores[:, self.pad_id].masked_fill_(scores.amax(-1) == float("-inf"), 0.0)
        return scores

    def _without_repeated(self, scores: Tensor, n: int) -> Tensor:
        if self.end < n:
            return scores
        held = self.tokens[:, : self.end]
        newest, windows = held[:, self.end + 1 - n :], held.unfold(1, n, 1)
        again = (windows[..., :-1] == newest[:, None]).all(-1)
        banned = torch.where(again, windows[..., -1], self.pad_id)  # which is banned already
        return scores.scatter(1, banned, float("-inf"))

    def _allowed(self, scores: Tensor, mask: Tensor) -> Tensor:
        wanted = (len(scores), -(-self.vocab // 32))
        if mask.dtype != torch.int32 or mask.shape != wanted:
            raise ValueError(f"bitmask must give int32 {wanted}, got {mask.dtype} {tuple(mask.shape)}")
        bits = mask.to(scores.device)[:, :, None] >> torch.arange(32, dtype=torch.int32, device=scores.device) & 1
        return scores.masked_fill(bits.flatten(1)[:, : self.vocab] == 0, float("-inf"))

    def _only(self, scores: Tensor, token: int) -> Tensor:
        return self._with(torch.full_like(scores, float("-inf")), token, 0.0)

    def _with(self, scores: Tensor, token: int, value: float) -> Tensor:
        scores = scores.clone()
        scores[:, token] = value
        return scores
