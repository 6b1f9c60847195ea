"""generate and stream: greedy, sampled and beam decoding of a batch, for Seq2Seq and DecoderLM, with or without a cache.

Both models continue rows of tokens. A Seq2Seq's rows are its `bos_id`, and its source is what they are conditioned on;
a DecoderLM's rows are the prompts themselves.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tileformer.decoder.cache import KVCache
from tileformer.decoder.lm import DecoderLM, DecoderLMConfig
from tileformer.decoder.seq2seq import Seq2Seq
from tileformer.kernels import log_softmax, softmax

# On an accelerator, asking whether all rows have ended waits for it; a few steps too many cost less.
_STEPS_BETWEEN_CHECKS = 8
Model = Seq2Seq | DecoderLM


@torch.no_grad()
def generate(
    model: Model,
    src: Tensor,
    max_length: int | None = None,
    use_cache: bool = True,
    *,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
    num_beams: int = 1,
    length_penalty: float = 1.0,
    n_best: int | None = None,
) -> Any:  # Tensor, or a tuple with the scores
    """The next tokens of each row, step by step: the most probable one, unless sampling or beams are asked for.

    Args:
        src: int64 (B, T_s), padded with ``pad_id`` behind each row. A Seq2Seq's source; a DecoderLM's prompts, with
            ``bos_id`` where it was trained with one, each at least one token long and of any lengths together.
        max_length: new tokens of a row at most; default: what the model has room for behind each.
        use_cache: False computes everything again at each step: the same tokens, for comparison.
        temperature: sample from the softmax of logits / temperature; None takes the most probable token.
        top_k, top_p: sample only among the k most probable tokens; and only among the fewest of these whose
            probabilities together reach p.
        generator: where the random numbers come from; a seeded one on the tokens' device makes a run repeatable.
        num_beams: beam search keeps that many rows for each of ``src``, best sum of log-probabilities / length **
            ``length_penalty`` first. Rows that ended stay and compete; the greedy row is never dropped, so that the
            best one scores no lower than it.
        n_best: return the best n of the beams, with their scores.

    Returns int64 (B, T): the tokens after the row's own, each row up to and with its ``eos_id`` if
    it came to one, then ``pad_id``, which is never chosen as a token. With ``n_best``: (B, n, T) and the scores (B, n)
    float32, -inf where a row has no further continuation.

    Raises ValueError when the model is in training mode (dropout would be sampled), or for an option or length that
    makes no sense.
    """
    picker = _Picker(temperature, top_k, top_p, generator)
    rows = _Rows(model, src, max_length, use_cache, num_beams)
    beams = num_beams > 1 or n_best is not None
    if beams and picker.samples:
        raise ValueError(f"beams are searched, not sampled: pass temperature={temperature} or num_beams, not both")
    if n_best is not None and not 1 <= n_best <= num_beams:
        raise ValueError(f"n_best must be between 1 and num_beams {num_beams}, got {n_best}")
    if length_penalty < 0:
        raise ValueError(f"length_penalty must be at least 0, got {length_penalty}")
    if beams:
        found, scores = _search(rows, length_penalty)
        tokens = rows.new(found[:, : n_best or 1])
        return (tokens, scores[:, :n_best]) if n_best else tokens[:, 0]
    for _ in _walk(rows, picker, _STEPS_BETWEEN_CHECKS):
        pass
    return rows.new(rows.tokens[:, None])[:, 0]


def stream(
    model: Model,
    src: Tensor,
    max_length: int | None = None,
    use_cache: bool = True,
    *,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Iterator[Tensor]:
    """The tokens of `generate`, one step (B,) at a time as they are chosen; ``pad_id`` for a row that has ended.

    Raises ValueError as `generate`, here and not at the first step, and for prompts of several lengths.
    """
    with torch.no_grad():
        rows = _Rows(model, src, max_length, use_cache, 1)
    if rows.first != rows.longest:
        raise ValueError(f"stream takes prompts of one length, got {rows.first} to {rows.longest} tokens: use generate")
    return _walk(rows, _Picker(temperature, top_k, top_p, generator), 1)


@dataclass(frozen=True)
class _Picker:
    """One token a row from its logits. Raises ValueError for settings that make no sense."""

    temperature: float | None
    top_k: int | None
    top_p: float | None
    generator: torch.Generator | None

    def __post_init__(self) -> None:
        if not self.samples and (self.top_k, self.top_p, self.generator) != (None, None, None):
            raise ValueError("top_k, top_p and generator are for sampling: pass a temperature too, such as 1.0")
        if self.temperature is not None and not 1e-6 <= self.temperature < math.inf:
            raise ValueError(
                f"temperature must be finite and at least 1e-6, got {self.temperature}; None takes the most probable token"
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
        # What torch.multinomial draws, without its look at the shares, for which a GPU would be waited for at each token.
        races = shares / torch.empty_like(shares).exponential_(generator=self.generator)
        return tokens.gather(1, races.argmax(-1, keepdim=True))[:, 0]


class _Rows:
    """What is continued: ``tokens`` (R, width), R = B * beams, which hold each row's own tokens and room for new ones."""

    def __init__(self, model: Model, src: Tensor, max_length: int | None, use_cache: bool, beams: int) -> None:
        config: Any = model.config
        self.config = config
        if model.training:
            raise ValueError("the model is in training mode, where dropout is random: call model.eval() first")
        if beams < 1:
            raise ValueError(f"num_beams must be at least 1, got {beams}")
        if src.dim() != 2:
            raise ValueError(f"src must be (B, T) token ids, got shape {tuple(src.shape)}: one row a sequence")
        self.model, self.beams, self.conditioned = model, beams, not isinstance(config, DecoderLMConfig)
        own = src.new_full((len(src), 1), config.bos_id) if self.conditioned else src
        own = own.repeat_interleave(beams, 0)
        real = own != config.pad_id
        if (real[:, 1:] & ~real[:, :-1]).any():
            raise ValueError(f"a prompt has padding (id {config.pad_id}) before a token: pad prompts behind their end")
        self.lengths = real.sum(1)
        self.first, self.longest = (int(x) for x in self.lengths.aminmax()) if len(own) else (1, 1)
        if not self.conditioned and self.first < 1:
            raise ValueError("a prompt is all padding: begin each with a token, such as bos_id")
        room = config.max_length - self.longest + 1  # the last token is never read
        if room < 1:
            raise ValueError(f"a prompt of {self.longest} tokens leaves no room: the model reads {config.max_length}")
        steps = room if max_length is None else max_length
        if not 1 <= steps <= room:
            raise ValueError(
                f"max_length must be between 1 and the model's {room}"
                f"{'' if self.conditioned else f' after {self.longest} tokens of prompt'}, got {steps}"
            )
        width = self.longest + steps
        self.limits = torch.full_like(self.lengths, width) if max_length is None else self.lengths + steps
        self.tokens = own.new_full((len(own), width), config.pad_id)
        self.tokens[:, : self.longest] = own[:, : self.longest]
        layers = config.num_decoder_layers if self.conditioned else config.num_layers
        self.cache = KVCache(layers, self.tokens.shape[1] - 1) if use_cache else None
        self.memory: list[Tensor] = []
        if self.conditioned:
            encode: Any = model.encode
            self.memory = [x.repeat_interleave(beams, 0) for x in encode(src)]

    def logits(self, at: int) -> Tensor:
        """Logits (R, V) of the token that stands at ``at``; padding is never one."""
        seen = self.tokens[:, 0 if self.cache is None else self.cache.length : at]
        call: Any = self.model.decode if self.conditioned else self.model
        logits = call(seen, *self.memory, cache=self.cache)[:, -1]
        logits[:, self.config.pad_id] = float("-inf")
        return logits

    def all_ended(self, ended: Tensor, at: int, every: int) -> bool:
        """Whether nothing is left to do; on an accelerator it is asked only every few steps."""
        step = at - self.first
        return (ended.device.type == "cpu" or step % every == every - 1) and bool(ended.all())

    def new(self, tokens: Tensor) -> Tensor:
        """What ``tokens`` (B, n, width) hold behind each row's own, (B, n, T), T the longest."""
        B, n, width = tokens.shape
        lengths, limits = (x[:: self.beams, None, None] for x in (self.lengths, self.limits))
        places = lengths + torch.arange(width - self.first, device=tokens.device)
        new = tokens.gather(2, places.clamp(max=width - 1).expand(B, n, -1))
        new = new.masked_fill(places >= limits, self.config.pad_id)
        # One last look: the steps that ran after the last row had ended left only padding.
        return new[..., : int((new != self.config.pad_id).sum(-1).max()) if new.numel() else 0]


@torch.no_grad()
def _walk(rows: _Rows, pick: _Picker, every: int) -> Iterator[Tensor]:
    """Write the chosen tokens into ``rows.tokens``, one column a step; yields the column."""
    ended = torch.zeros_like(rows.lengths, dtype=torch.bool)
    for at in range(rows.first, rows.tokens.shape[1]):
        chosen = pick(rows.logits(at)).masked_fill(ended, rows.config.pad_id)
        inside = at < rows.lengths  # of a row's own tokens, which are longer than others'
        chosen = torch.where(inside, rows.tokens[:, at], chosen)
        rows.tokens[:, at] = chosen
        yield chosen
        ended = ended | ~inside & (chosen == rows.config.eos_id)
        if rows.all_ended(ended, at, every):
            return


def _search(rows: _Rows, length_penalty: float) -> tuple[Tensor, Tensor]:
    """Beam search with K beams: tokens (B, K, width) and scores (B, K), best first."""
    K, R, pad = rows.beams, len(rows.tokens), rows.config.pad_id
    start = torch.arange(0, R, K, device=rows.tokens.device)[:, None]  # each source's first row, [B, 1]
    total = torch.full((R // K, K), float("-inf"), device=start.device)  # sums of log-probabilities
    total[:, 0] = 0.0  # the others are copies of it, to be filled by its continuations
    new = torch.zeros_like(total, dtype=torch.int64)  # tokens that total is the sum of
    ended = torch.zeros_like(total, dtype=torch.bool)
    greedy = torch.zeros_like(start)  # which of a source's rows is the greedy one
    for at in range(rows.first, rows.tokens.shape[1]):
        logp = log_softmax(rows.logits(at).float())
        V = logp.shape[1]
        inside = (at < rows.lengths).view(-1, K)
        # A row that ended, or whose own tokens are not over, has one continuation, at no cost.
        only = torch.where(inside, rows.tokens[:, at].view(-1, K), pad)
        fixed = (inside | ended).view(-1, 1)
        free = torch.full_like(logp, float("-inf")).scatter_(1, only.view(-1, 1), 0.0)
        logp = torch.where(fixed, free, logp).view(-1, K, V)
        length = new + ~(inside | ended)
        score = (total[..., None] + logp) / length.clamp(min=1)[..., None] ** length_penalty
        chosen = score.flatten(1).topk(K).indices
        following = greedy * V + logp.argmax(-1).gather(1, greedy)
        # The greedy row takes the last place if it has lost its own.
        lost = (chosen != following).all(1, keepdim=True)
        chosen[:, -1:] = torch.where(lost, following, chosen[:, -1:])
        greedy = (chosen == following).int().argmax(1, keepdim=True)
        parent, token = chosen // V, chosen % V
        total = (total[..., None] + logp).flatten(1).gather(1, chosen)
        new = length.gather(1, parent)
        flat = (start + parent).flatten()
        rows.tokens = rows.tokens[flat]
        rows.tokens[:, at] = token.flatten()
        if rows.cache is not None:
            rows.cache.reorder(flat)
        ended, inside = ended.gather(1, parent), inside.gather(1, parent)
        ended = ended | ~inside & ((token == rows.config.eos_id) | (at + 1 >= rows.limits.view(-1, K)))
        if rows.all_ended(ended, at, _STEPS_BETWEEN_CHECKS):
            break
    scores, order = (total / new.clamp(min=1) ** length_penalty).sort(dim=1, descending=True, stable=True)
    tokens = rows.tokens[(start + order).flatten()].view(*order.shape, rows.tokens.shape[1])
    return tokens.masked_fill((scores == float("-inf"))[..., None], pad), scores
