"""decode_loop and beam_search: greedy, sampled, streamed and beam decoding of a batch, once for every `Decodable`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from tileformer.decoder.generation.sampling import Sampler
from tileformer.decoder.generation.state import Decodable, align_prompts
from tileformer.kernels import log_softmax

# On an accelerator, asking whether all rows have ended waits for it; a few steps too many cost less.
STEPS_BETWEEN_CHECKS = 8


class DecodeBatch:
    """The rows to be decoded, and how far: each of its B rows goes on for at most ``limits`` (B,) tokens, or ``steps``.

    Raises ValueError for rows or a length that make no sense.
    """

    def __init__(self, model: Decodable, src: Tensor, max_length: int | None, use_cache: bool = True) -> None:
        if missing := [name for name in ("start", "step", "eos_id", "pad_id") if not hasattr(model, name)]:
            raise TypeError(f"{type(model).__name__} cannot be decoded, it has no {', '.join(missing)}: see Decodable")
        if getattr(model, "training", False):
            raise ValueError("the model is in training mode, where dropout is random: call model.eval() first")
        if src.dim() != 2:
            raise ValueError(f"src must be (B, T) token ids, got shape {tuple(src.shape)}: one row a sequence")
        self.model, self.eos_id, self.pad_id = model, model.eos_id, model.pad_id
        self.options: dict[str, Any] = {} if use_cache else {"use_cache": False}
        tokens = src
        if getattr(model, "conditioned", False):
            tokens = src.new_full((len(src), 1), model.bos_id)  # type: ignore[attr-defined]
            self.options["source"] = src
        self.tokens, lengths, shortest, longest = align_prompts(tokens, self.pad_id)
        limit: Any = getattr(model, "max_length", None)
        if max_length is not None and max_length < 1:
            raise ValueError(f"max_length must be at least 1, got {max_length}")
        if limit is None and max_length is None:
            raise ValueError(f"{type(model).__name__} names no max_length, the tokens that it reads: pass max_length")
        room: Any = max_length if limit is None else limit - longest + 1  # the last token is never read
        if room < 1:
            raise ValueError(f"a prompt of {longest} tokens leaves no room: the model reads {limit}")
        self.steps: int = room if max_length is None else max_length
        if self.steps > room:
            raise ValueError(
                f"max_length must be between 1 and the model's {room}"
                f"{'' if 'source' in self.options else f' after {longest} tokens of prompt'}, got {self.steps}"
            )
        self.capacity = longest + self.steps - 1
        self.limits: Tensor | None = None
        if max_length is None and shortest < longest:  # a short prompt has more room behind it
            self.limits = limit - lengths + 1
            self.steps = limit - shortest + 1

    def start(self, beams: int = 1) -> tuple[Tensor, Any]:
        """Logits (B * beams, V) of the first new token, and the state."""
        logits, state = self.model.start(self.tokens, capacity=self.capacity, beams=beams, **self.options)
        self.is_padding = torch.arange(logits.shape[-1], device=logits.device) == self.pad_id
        return self.without_padding(logits), state

    def step(self, tokens: Tensor, state: Any) -> Tensor:
        return self.without_padding(self.model.step(tokens, state))

    def without_padding(self, logits: Tensor) -> Tensor:
        """Padding is never chosen as a token."""
        return logits.masked_fill(self.is_padding, float("-inf"))

    def ended_by(self, tokens: Tensor, step: int) -> Tensor:
        """Which of ``tokens`` (B, ...), chosen in ``step``, are their row's last."""
        ended = tokens == self.eos_id
        if self.limits is None:
            return ended
        return ended | (step + 1 >= self.limits).view(-1, *[1] * (tokens.dim() - 1))

    def is_over(self, ended: Tensor, step: int, every: int = STEPS_BETWEEN_CHECKS) -> bool:
        """Whether nothing is left to do; on an accelerator the rows are asked only every few steps."""
        if step + 1 == self.steps:
            return True
        return (ended.device.type == "cpu" or step % every == every - 1) and bool(ended.all())

    def trimmed(self, tokens: Tensor) -> Tensor:
        """``tokens`` (..., steps) up to the end of the longest row: steps after the last row had ended left padding."""
        return tokens[..., : int((tokens != self.pad_id).sum(-1).max()) if tokens.numel() else 0]


@torch.no_grad()
def decode_loop(batch: DecodeBatch, sampler: Sampler, every: int = STEPS_BETWEEN_CHECKS) -> Iterator[Tensor]:
    """The next token (B,) of each row, step by step; ``pad_id`` for a row that has ended."""
    logits, state = batch.start()
    ended = torch.zeros(len(batch.tokens), dtype=torch.bool, device=batch.tokens.device)
    for step in range(batch.steps):
        tokens = sampler(logits).masked_fill(ended, batch.pad_id)
        yield tokens
        ended = ended | batch.ended_by(tokens, step)
        if batch.is_over(ended, step, every):
            return
        logits = batch.step(tokens, state)


@torch.no_grad()
def beam_search(batch: DecodeBatch, K: int, length_penalty: float) -> tuple[Tensor, Tensor]:
    """Tokens (B, K, steps) and scores (B, K) of the K best rows that were kept, best first."""
    B, device, pad = len(batch.tokens), batch.tokens.device, batch.pad_id
    first = torch.arange(0, B * K, K, device=device)[:, None]  # each source's first row, [B, 1]
    total = torch.full((B, K), float("-inf"), device=device)  # sums of log-probabilities
    total[:, 0] = 0.0  # the others are copies of it, to be filled by its continuations
    length = torch.zeros_like(total, dtype=torch.int64)  # tokens that total is the sum of
    ended = torch.zeros_like(total, dtype=torch.bool)
    greedy = torch.zeros_like(first)  # which of a source's rows is the greedy one
    tokens = torch.full((B * K, batch.steps), pad, device=device)
    logits, state = batch.start(K)
    reorder = getattr(state, "reorder", state.select)  # beams go on within their own source
    padding = torch.where(
        batch.is_padding, 0.0, float("-inf")
    )  # the one continuation of a row that has ended, at no cost
    for step in range(batch.steps):
        logp = log_softmax(logits.float())
        V = logp.shape[1]
        logp = torch.where(ended.view(-1, 1), padding, logp).view(B, K, V)
        new_length = length + ~ended
        score = (total[..., None] + logp) / new_length.clamp(min=1)[..., None] ** length_penalty
        chosen = score.flatten(1).topk(K).indices
        following = greedy * V + logp.argmax(-1).gather(1, greedy)
        # The greedy row takes the last position if it has lost its own.
        lost = (chosen != following).all(1, keepdim=True)
        chosen[:, -1:] = torch.where(lost, following, chosen[:, -1:])
        greedy = (chosen == following).int().argmax(1, keepdim=True)
        parent, token = chosen // V, chosen % V
        total = (total[..., None] + logp).flatten(1).gather(1, chosen)
        length = new_length.gather(1, parent)
        rows = (first + parent).flatten()
        tokens = tokens[rows]
        tokens[:, step] = token.flatten()
        ended = ended.gather(1, parent) | batch.ended_by(token, step)
        if batch.is_over(ended, step):
            break
        reorder(rows)
        logits = batch.step(token.flatten(), state)
    scores, order = (total / length.clamp(min=1) ** length_penalty).sort(dim=1, descending=True, stable=True)
    tokens = tokens[(first + order).flatten()].view(B, K, batch.steps)
    return tokens.masked_fill((scores == float("-inf"))[..., None], pad), scores
