"""generate_speculatively: several tokens a step, proposed by a cheaper draft and kept where the model agrees."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tileformer.decoder.generation import sampling
from tileformer.decoder.generation.options import Options
from tileformer.decoder.generation.search import DecodeBatch
from tileformer.decoder.generation.state import Decodable


class NGramDraft:
    """Proposes what followed the latest earlier occurrence of a row's last tokens, in its source, prompt or what it has
    said: ``size`` tokens, or fewer where so many never occurred. It costs nothing and needs no second model.

    ``proposed`` and ``accepted`` count the tokens, of all calls. Source: prompt look-up decoding (Saxena 2023)."""

    def __init__(self, size: int = 3) -> None:
        if size < 1:
            raise ValueError(f"size must be at least 1, got {size}")
        self.size = size
        self.proposed = self.accepted = 0

    def start(self, batch: DecodeBatch, capacity: int, vocab: int, choice: _Choice) -> None:
        self.pad_id, self.vocab = batch.pad_id, vocab
        source = batch.inputs.get("source", batch.tokens[:, :0])
        self.before = [[x for x in row if x != self.pad_id] for row in torch.cat([source, batch.tokens], 1).tolist()]

    def propose(self, rows: list[list[int]], live: list[int], n: int) -> tuple[Tensor, None]:
        """int64 (rows, up to n), `pad_id` where nothing is known: what the model never chooses."""
        found = [self._continued(self.before[row] + rows[row], n) if row in live else [] for row in range(len(rows))]
        width = max(map(len, found))
        return torch.tensor([line + [self.pad_id] * (width - len(line)) for line in found], dtype=torch.int64), None

    def _continued(self, tokens: list[int], n: int) -> list[int]:
        for size in range(min(self.size, len(tokens) - 1), 0, -1):
            for end in range(len(tokens) - 1, size - 1, -1):
                if tokens[end - size : end] == tokens[-size:]:
                    following = tokens[end : end + n]
                    return following if max(following) < self.vocab else []
        return []

    def keep(self, lengths: Tensor) -> None:
        pass


class ModelDraft:
    """Proposes what a smaller `Decodable` of the same vocabulary says. Counts as `NGramDraft`."""

    def __init__(self, model: Decodable) -> None:
        self.model = model
        self.proposed = self.accepted = 0

    def start(self, batch: DecodeBatch, capacity: int, vocab: int, choice: _Choice) -> None:
        logits, self.state = self.model.start(batch.tokens, capacity=capacity, **batch.inputs)
        if logits.shape[1] != vocab:
            raise ValueError(
                f"the draft chooses among {logits.shape[1]} tokens, the model among {vocab}: train it alike"
            )
        self.choice = choice

    def propose(self, rows: list[list[int]], live: list[int], n: int) -> tuple[Tensor, Tensor | None]:
        """int64 (rows, n) and, where tokens are drawn, the distributions (rows, n, V) that they were drawn from."""
        token = torch.tensor([row[-1] for row in rows], device=self.state.lengths.device)
        position = torch.tensor([len(row) for row in rows], device=token.device)
        tokens, shares = [], []
        for i in range(n):
            share = self.choice.distribution(self.model.step(token, self.state))
            token = self.choice.draw(share, position + i, purpose=1)
            tokens.append(token)
            shares.append(share)
        self.model.step(token, self.state)  # what is kept must have been read
        return torch.stack(tokens, 1), torch.stack(shares, 1)

    def keep(self, lengths: Tensor) -> None:
        self.state.truncate(lengths)


class _Choice:
    """How tokens are chosen: distributions over the vocabulary, and what is drawn from them by seed and position."""

    def __init__(self, options: Options, seeds: Tensor, pad_id: int) -> None:
        self.options, self.seeds, self.pad = options, seeds, torch.tensor([pad_id], device=seeds.device)

    def distribution(self, logits: Tensor) -> Tensor:
        """Probabilities (..., V) of the tokens that may be chosen, all of it one token's where none is drawn."""
        scores = logits.flatten(0, -2).index_fill(1, self.pad, float("-inf"))
        if not self.options.samples:
            return torch.zeros_like(scores).scatter_(1, scores.argmax(-1, keepdim=True), 1.0).view(logits.shape)
        shares, ids = sampling.candidates(scores, self.options)
        shares = shares / shares.sum(-1, keepdim=True)
        if ids is not None:
            shares = torch.zeros_like(scores, dtype=shares.dtype).scatter_(1, ids, shares)
        return shares.view(logits.shape)

    def draw(self, shares: Tensor, positions: Tensor, purpose: int) -> Tensor:
        """A token (R,) of each row of ``shares`` (R, V)."""
        clocks = sampling.exponential(self.words(positions, shares.shape[-1], purpose))
        return sampling.exponential_race(shares, clocks)[1]

    def words(self, positions: Tensor, n: int, purpose: int) -> Tensor:
        """(R, n) random words, a function of a row's seed, its position (R,) and the purpose alone."""
        words = torch.arange(-(-n // 4), device=positions.device)
        drawn = sampling.random_words(self.seeds[:, None], positions[:, None], purpose, words)
        return drawn.flatten(1)[:, :n]


@torch.no_grad()
def generate_speculatively(
    model: Decodable,
    src: Tensor,
    max_length: int | None = None,
    *,
    draft: str | NGramDraft | ModelDraft | Decodable = "ngram",
    num_draft_tokens: int = 4,
    options: Options | None = None,
) -> Tensor:
    """`generate`, in fewer steps: ``draft`` proposes ``num_draft_tokens`` tokens, which the model reads in one step.

    Greedy tokens are those of `generate`. Drawn ones have exactly the model's distribution, whatever the draft
    proposes: a token x is kept with probability min(1, p(x) / q(x)), p the model's distribution and q the draft's, and
    the first that is not is drawn anew in proportion to max(p - q, 0).

    Args:
        model, src, max_length: as `generate`'s. The model's step takes several tokens a row, and its state can forget:
            all of our own do.
        draft: "ngram", which looks in the row's own tokens; a `Decodable` of the same vocabulary; or an `NGramDraft` or
            `ModelDraft`, which count what was accepted.
        options: as `generate`'s; what a row draws depends on its seed alone.

    Returns int64 (B, T), as `generate`. Raises as `generate`, and ValueError for a draft that does not fit.

    Source: Leviathan et al. 2023 (arXiv:2211.17192).

    Example:
        >>> from tileformer.decoder import DecoderLM, DecoderLMConfig, generate
        >>> model = DecoderLM(DecoderLMConfig(vocab=20, d_model=32, nhead=4)).eval()
        >>> prompts = torch.tensor([[1, 3, 4], [1, 5, 0]])
        >>> torch.equal(generate_speculatively(model, prompts, 9), generate(model, prompts, 9))
        True
    """
    if num_draft_tokens < 1:
        raise ValueError(f"num_draft_tokens must be at least 1, got {num_draft_tokens}")
    options, drafter = options or Options(), _drafter(draft)
    if options.searches or options.num_return_sequences or options.constrains or options.forced_prefix_ids:
        raise ValueError("tokens that are drafted are greedy or drawn: pass no beams and no constraints")
    batch = DecodeBatch(model, src, max_length, options=options)
    B, pad = len(batch.tokens), batch.pad_id
    seed = options.seed
    if seed is None:
        seed = int(torch.randint(2**31, (), generator=options.generator))
    choice = _Choice(options, sampling.seeds_of(seed, B).to(src.device), pad)
    capacity = min(batch.capacity + num_draft_tokens, getattr(model, "max_length", None) or 2**30)
    capacity = max(capacity, batch.tokens.shape[1])
    logits, state = model.start(batch.tokens, capacity=capacity, **batch.inputs)
    state.truncate(state.lengths)  # a state that cannot forget says so here
    drafter.start(batch, capacity, logits.shape[1], choice)
    limits = [batch.steps] * B if batch.limits is None else batch.limits.tolist()
    first = choice.draw(choice.distribution(logits), torch.zeros(B, dtype=torch.int64, device=logits.device), purpose=0)
    rows: list[list[int]] = [[token] for token in first.tolist()]
    read = (batch.tokens != pad).sum(1).tolist()
    while live := [row for row in range(B) if len(rows[row]) < limits[row] and rows[row][-1] != batch.eos_id]:
        n = min(num_draft_tokens, capacity - 1 - max(read[row] for row in live))
        pending = torch.tensor([row[-1:] for row in rows], device=src.device)
        drafted, shares = drafter.propose(rows, live, n) if n else (pending[:, :0], None)
        drafted = drafted.to(src.device)
        logits = model.step(torch.cat([pending, drafted], 1), state)
        said = torch.tensor([len(row) for row in rows], device=src.device)
        counts, last = _verified(choice, logits, drafted, shares, said)
        for row, (count, proposed, token) in enumerate(zip(counts, drafted.tolist(), last, strict=True)):
            if row in live:
                read[row] += 1 + count
                drafter.proposed += len(proposed) - proposed.count(pad)
                drafter.accepted += count
                new = [*proposed[:count], token][: limits[row] - len(rows[row])]
                rows[row] += new[: new.index(batch.eos_id) + 1] if batch.eos_id in new else new
            else:
                read[row] = 0
        lengths = torch.tensor(read, device=src.device)
        state.truncate(lengths)
        drafter.keep(lengths)
    width = max(map(len, rows), default=0)
    return torch.tensor([row + [pad] * (width - len(row)) for row in rows], device=src.device).view(B, width)


def _drafter(draft: Any) -> NGramDraft | ModelDraft:
    if draft == "ngram":
        return NGramDraft()
    if isinstance(draft, str):
        raise ValueError(f"draft must be 'ngram', a model or a draft, got {draft!r}")
    return draft if isinstance(draft, NGramDraft | ModelDraft) else ModelDraft(draft)


def _verified(
    choice: _Choice, logits: Tensor, drafted: Tensor, q: Tensor | None, positions: Tensor
) -> tuple[list[int], list[int]]:
    """How many of ``drafted`` (R, n), which were drawn from ``q`` (R, n, V) or were certain, each row keeps by the
    ``logits`` (R, n + 1, V) behind them, and the token that follows those. ``positions`` (R,): new tokens before."""
    p, (rows, n) = choice.distribution(logits), drafted.shape
    if q is None:
        q = torch.zeros_like(p[:, :n]).scatter_(-1, drafted[..., None], 1.0)
    words = [choice.words(positions + i, 1, purpose=2) for i in range(n)]
    u = torch.cat([q.new_empty(rows, 0), *map(sampling.uniform, words)], 1)
    agrees = u * q.gather(-1, drafted[..., None])[..., 0] < p[:, :n].gather(-1, drafted[..., None])[..., 0]
    kept = agrees.int().cumprod(1).sum(1)
    row = torch.arange(rows, device=kept.device)
    own = p[row, kept]
    rest = (own - F.pad(q, (0, 0, 0, 1))[row, kept]).clamp(min=0.0)  # where all were kept there is no q
    rest = torch.where(rest.sum(-1, keepdim=True) > 0, rest, own)  # rounding can leave nothing of equal distributions
    return kept.tolist(), choice.draw(rest, positions + kept, purpose=0).tolist()
