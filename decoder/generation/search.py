"""decode_loop and beam_search: greedy, sampled, streamed and beam decoding of a batch, once for every `Decodable`."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tileformer.decoder.generation.constraints import Adjuster
from tileformer.decoder.generation.options import Options
from tileformer.decoder.generation.sampling import Sampler
from tileformer.decoder.generation.state import Decodable, align_prompts
from tileformer.kernels import log_softmax

# On an accelerator, asking whether all rows have ended waits for it; a few steps too many cost less.
STEPS_BETWEEN_CHECKS = 8
# On the CPU rows that have ended leave the batch once they are a quarter of it, and some: to move the caches of the
# others costs one to three steps' time, and a step of two rows costs hardly more than that of one.
FEWEST_THAT_LEAVE = 3
NAN_ADVICE = "are its weights finite, and does its dtype hold what it computes?"


def checked(options: Options | None) -> Options:
    """The options, or those that say nothing. TypeError for anything else."""
    if not isinstance(options, Options | None):
        raise TypeError(f"options must be Options(...), got {type(options).__name__}: Options(temperature=0.8)")
    return options or Options()


class DecodeBatch:
    """The rows to be decoded, and how far: each of its B rows goes on for at most ``limits`` (B,) tokens, or ``steps``.

    Raises ValueError for rows or a length that make no sense.
    """

    def __init__(
        self,
        model: Decodable,
        src: Tensor,
        max_length: int | None,
        use_cache: bool = True,
        options: Options = Options(),  # noqa: B008 (it is frozen)
    ) -> None:
        if missing := [name for name in ("start", "step", "eos_id", "pad_id") if not hasattr(model, name)]:
            raise TypeError(f"{type(model).__name__} cannot be decoded, it has no {', '.join(missing)}: see Decodable")
        if getattr(model, "training", False):
            raise ValueError("the model is in training mode, where dropout is random: call model.eval() first")
        if not isinstance(src, Tensor):
            raise TypeError(f"src must be a tensor (B, T) of token ids, got {type(src).__name__}: torch.tensor(rows)")
        if max_length is not None and not isinstance(max_length, int):
            raise TypeError(f"max_length must be a whole number, got {type(max_length).__name__}: pass options by name")
        if src.dim() != 2:
            raise ValueError(f"src must be (B, T) token ids, got shape {tuple(src.shape)}: one row a sequence")
        self.model, self.eos_id, self.pad_id, self.options = model, model.eos_id, model.pad_id, options
        self.inputs: dict[str, Any] = {} if use_cache else {"use_cache": False}
        tokens = src
        if getattr(model, "conditioned", False):
            tokens = src.new_full((len(src), 1), model.bos_id)  # type: ignore[attr-defined]
            self.inputs["source"] = src
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
                f"{'' if 'source' in self.inputs else f' after {longest} tokens of prompt'}, got {self.steps}"
            )
        self.capacity = longest + self.steps - 1
        self.limits: Tensor | None = None
        if max_length is None and shortest < longest:  # a short prompt has more room behind it
            self.limits = limit - lengths + 1
            self.steps = limit - shortest + 1
        self.prefix = src.new_tensor(options.forced_prefix_ids, dtype=torch.int64)
        if len(self.prefix):
            self._begin_with_prefix(lengths, room if self.limits is not None else self.steps)

    def _begin_with_prefix(self, lengths: Tensor, least: int) -> None:
        n, ids = len(self.prefix), self.options.forced_prefix_ids
        if self.eos_id in ids or self.pad_id in ids:
            raise ValueError(f"forced_prefix_ids {ids} hold eos_id {self.eos_id} or pad_id {self.pad_id}")
        if n >= least:
            raise ValueError(f"forced_prefix_ids are {n} tokens, which leaves no room: max_length is {least}")
        places = lengths[:, None] + torch.arange(n, device=lengths.device)
        longer = F.pad(self.tokens, (0, n), value=self.pad_id)
        self.tokens = longer.scatter_(1, places, self.prefix.expand(len(longer), n))
        self.steps -= n
        self.limits = None if self.limits is None else self.limits - n

    def start(self, beams: int = 1) -> tuple[Tensor, Any]:
        """Logits (B * beams, V) of the first new token, and the state."""
        logits, state = self.model.start(self.tokens, capacity=self.capacity, beams=beams, **self.inputs)
        self.padding = torch.tensor([self.pad_id], device=logits.device)
        return logits, state

    def without_padding(self, logits: Tensor) -> Tensor:
        """Padding is never chosen as a token."""
        return logits.index_fill(1, self.padding, float("-inf"))

    def adjuster(self, logits: Tensor) -> Adjuster | None:
        """What constrains the rows of the first ``logits``; None where nothing does."""
        if not self.options.constrains:
            return None
        copies, width = len(logits) // max(len(self.tokens), 1), self.tokens.shape[1]
        lengths = (self.tokens != self.pad_id).sum(1, keepdim=True)
        places = lengths + torch.arange(width, device=lengths.device)
        before = F.pad(self.tokens, (width, 0), value=self.pad_id).gather(1, places)
        ids = {"eos_id": self.eos_id, "pad_id": self.pad_id, "vocab": logits.shape[1]}
        before = before.repeat_interleave(copies, 0)
        return Adjuster(self.options, before, self.steps, self.limits_of(len(logits)), len(self.prefix), **ids)

    def limits_of(self, rows: int) -> Tensor | None:
        """``limits`` of that many rows, copies of the batch's beside each other."""
        return None if self.limits is None else self.limits.repeat_interleave(rows // max(len(self.tokens), 1))

    def keeps_rows(self, state: Any) -> bool:
        """Whether rows stay in the batch when they have ended."""
        told = self.options.bitmask or self.options.adjust
        return self.tokens.device.type != "cpu" or told is not None or not hasattr(state, "select")

    def complete(self, tokens: Tensor) -> Tensor:
        """``tokens`` (..., steps) behind the prefix, up to the end of the longest row: steps after the last row had
        ended left padding."""
        if not tokens.numel():
            return tokens[..., :0]
        tokens = tokens[..., : int((tokens != self.pad_id).sum(-1).max())]
        prefix = self.prefix.expand(*tokens.shape[:-1], len(self.prefix))
        return torch.cat([prefix, tokens], -1) if len(self.prefix) else tokens


class Ends:
    """Which of R rows have ended, ``ended`` (R,) or None while none has, and which rows of the batch they are.

    On the CPU the host looks at each token; on an accelerator, where that waits, nothing is asked but every few steps.
    """

    def __init__(self, batch: DecodeBatch, rows: int, every: int) -> None:
        self.batch, self.rows, self.every = batch, rows, every
        self.index: Tensor | None = None  # of the rows that are left, None: all
        self.on_host = batch.tokens.device.type == "cpu"
        self.ended: Tensor | None = None
        if not self.on_host:
            self.ended = torch.zeros(rows, dtype=torch.bool, device=batch.tokens.device)
        self.limits = batch.limits_of(rows)
        self.last_steps = set(self.limits.tolist()) if self.on_host and self.limits is not None else set()
        self.over, self.news = rows == 0, False
        self.seen: list[Tensor] = []  # how good the tokens since the last check were

    def spread(self, tokens: Tensor, fill: float) -> Tensor:
        """``tokens`` of the rows that are left, among those of all rows."""
        if self.index is None:
            return tokens
        return tokens.new_full((self.rows,), fill).index_copy_(0, self.index, tokens)

    def note(self, tokens: Tensor, ids: list[int], step: int, also: Tensor | None) -> None:
        """``tokens``, on the host ``ids``, were chosen in ``step``; the rows of ``also`` end in any case."""
        self.news = not self.on_host or also is not None or self.batch.eos_id in ids or step + 1 in self.last_steps
        if not self.news:
            return
        ended = tokens == self.batch.eos_id
        if self.limits is not None:
            ended = ended | (step + 1 >= self.limits)
        for more in (self.ended, also):
            ended = ended if more is None else ended | more
        self.ended = ended
        if self.on_host:
            self.over = bool(ended.all())

    def is_over(self, best: Tensor, step: int) -> bool:
        """Whether nothing is left to do. FloatingPointError where ``best``, how good each token was, is NaN."""
        last = step + 1 == self.batch.steps
        if self.on_host:
            if math.isnan(sum(best.tolist())):  # or two infinities
                self._complain(best.isnan(), step)
            return last or self.over
        self.seen.append(best)
        if not last and step % self.every < self.every - 1:
            return False
        assert self.ended is not None
        nan, self.seen = torch.stack(self.seen).isnan().any(0), []
        wrong, over = torch.stack([nan.any(), self.ended.all()]).tolist()  # one look at the device
        if wrong:
            self._complain(nan, step)
        return last or over

    def _complain(self, nan: Tensor, step: int) -> None:
        rows = (nan if self.ended is None else nan & ~self.ended).nonzero()[:, 0]
        if len(rows):
            row = int(rows[0] if self.index is None else self.index[rows[0]])
            raise FloatingPointError(f"row {row}: the model's logits are NaN at new token {step + 1}; {NAN_ADVICE}")

    def leaving(self) -> Tensor | None:
        """Which of the rows go on, int64, once so many have ended that these should leave."""
        if not self.news or self.ended is None:
            return None
        rows = (~self.ended).nonzero()[:, 0]
        if not _leave(len(self.ended) - len(rows), len(self.ended)):
            return None
        self.index = rows if self.index is None else self.index[rows]
        self.limits = None if self.limits is None else self.limits[rows]
        self.ended = None
        return rows


def _leave(ended: int, rows: int) -> bool:
    return ended >= max(rows / 4, FEWEST_THAT_LEAVE)


@torch.no_grad()
def decode_loop(
    batch: DecodeBatch, copies: int = 1, every: int = STEPS_BETWEEN_CHECKS, scored: bool = False
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """The next token (B * copies,) of each row, step by step, ``pad_id`` for a row that has ended; and, where they are
    asked for, the log-probabilities of these, 0 for a row that has ended."""
    logits, state = batch.start(copies)
    options, pad, offset = batch.options, batch.pad_id, len(batch.prefix)
    sampler, adjuster = Sampler(options, len(logits), logits.device, copies), batch.adjuster(logits)
    ends, stays = Ends(batch, len(logits), every), batch.keeps_rows(state)
    masks = not ends.on_host or options.samples or scored or adjuster is not None
    for step in range(batch.steps):
        logits = batch.without_padding(logits) if masks else logits
        scores = logits if adjuster is None else adjuster(logits, step)
        best, tokens = sampler(scores, step + offset)
        ids = tokens.tolist() if ends.on_host else []
        if not masks and pad in ids:  # a trained model hardly ever wants it: not worth a copy of all logits before
            masks = True
            best, tokens = sampler(batch.without_padding(logits), step + offset)
            ids = tokens.tolist()
        if ends.ended is not None:
            tokens = tokens.masked_fill(ends.ended, pad)
        also = None
        if adjuster is not None:
            adjuster.append(tokens)
            also = tokens == pad  # no token is left to them
            if options.stop_strings:
                also = also | adjuster.stopped()
        logp = None
        if scored:
            logp = log_softmax(logits.float()).gather(1, tokens[:, None])[:, 0]
            logp = ends.spread(logp.masked_fill(tokens == pad, 0.0), 0.0)
        yield ends.spread(tokens, pad), logp
        ends.note(tokens, ids, step, also)
        if ends.is_over(best, step):
            return
        if not stays and (rows := ends.leaving()) is not None:
            state.select(rows)
            tokens = tokens[rows]
            sampler.select(rows)
            if adjuster is not None:
                adjuster.select(rows)
        logits = batch.model.step(tokens, state)


@torch.no_grad()
def beam_search(batch: DecodeBatch) -> tuple[Tensor, Tensor]:
    """Tokens (B, K, steps) and scores (B, K) of the K best rows that were kept, best first."""
    options, pad, device = batch.options, batch.pad_id, batch.tokens.device
    B, K = len(batch.tokens), options.num_beams
    logits, state = batch.start(K)
    reorder = getattr(state, "reorder", state.select)  # beams go on within their own source
    adjuster, stays, on_host = batch.adjuster(logits), batch.keeps_rows(state), device.type == "cpu"
    tokens = torch.full((B * K, batch.steps), pad, device=device)
    total = torch.full((B, K), float("-inf"), device=device)  # sums of log-probabilities
    total[:, :: K // options.num_beam_groups] = 0.0  # a group's others are copies, to be filled by its continuations
    divisors = (torch.arange(1.0, batch.steps + 1) ** options.length_penalty).tolist()  # by length
    # The host sees when the first row ends; before that, nothing is computed of ends. What total is divided by: (B, K).
    ended = None if on_host and adjuster is None else torch.zeros_like(total, dtype=torch.bool)
    divisor = torch.ones_like(total)
    first = torch.arange(0, B * K, K, device=device)[:, None]  # each source's first row
    index = torch.arange(B, device=device)  # of the sources that are left
    found, scores = tokens.view(B, K, batch.steps).clone(), total.clone()
    for step in range(batch.steps if B else 0):
        logp = log_softmax(batch.without_padding(logits).float())
        if adjuster is not None:
            logp = adjuster(logp, step)
        logp = logp.view(len(index), K, logits.shape[1])
        if ended is not None:
            if adjuster is not None:
                ended = ended | (logp[..., pad] == 0.0)  # no token is left to them
            divisor = torch.where(ended, divisor, divisors[step])
        total, parent, token = _continuations(logp, total, ended, divisors[step] if ended is None else divisor, batch)
        rows = (first + parent).flatten()
        if ended is not None:
            ended, divisor = ended.gather(1, parent), divisor.gather(1, parent)
        tokens = tokens[rows]
        tokens[:, step] = token.flatten()
        last = token == batch.eos_id
        if batch.limits is not None:
            last = last | (step + 1 >= batch.limits[index])[:, None]
        if adjuster is not None:
            adjuster.select(rows)
            adjuster.append(token.flatten())
            if options.stop_strings:
                last = last | adjuster.stopped().view_as(last)
        if ended is not None:
            ended = ended | last
        elif last.any():
            ended, divisor = last, torch.full_like(total, divisors[step])
        goes_on = [True]  # which sources, where that was asked
        if ended is not None and (on_host or step % STEPS_BETWEEN_CHECKS == STEPS_BETWEEN_CHECKS - 1):
            goes_on = (~ended & (total > float("-inf"))).any(1).tolist()
        if step + 1 == batch.steps or not any(goes_on):
            if ended is None:
                divisor = torch.full_like(total, divisors[step])
            break
        reorder(rows)
        token = token.flatten()
        if not stays and _leave(goes_on.count(False) * K, len(token)):
            found[index], scores[index] = tokens.view_as(found[index]), total / divisor
            assert ended is not None
            left = torch.tensor(goes_on).nonzero()[:, 0]
            rows = (left[:, None] * K + torch.arange(K)).flatten()
            state.select(rows)
            tokens, token = tokens[rows], token[rows]
            total, divisor, ended = total[left], divisor[left], ended[left]
            index, first = index[left], first[: len(left)]
            if adjuster is not None:
                adjuster.select(rows)
        logits = batch.model.step(token, state)
    found[index], scores[index] = tokens.view_as(found[index]), total / divisor
    if scores.isnan().any():
        row = int(scores.isnan().any(1).nonzero()[0, 0])
        raise FloatingPointError(f"row {row}: the model's logits are NaN; {NAN_ADVICE}")
    scores, order = scores.sort(dim=1, descending=True, stable=True)
    found = found.gather(1, order[..., None].expand_as(found))
    return found.masked_fill((scores == float("-inf"))[..., None], pad), scores


def _continuations(
    logp: Tensor, total: Tensor, ended: Tensor | None, divisor: Any, batch: DecodeBatch
) -> tuple[Tensor, Tensor, Tensor]:
    """Sum, parent and token, (b, K) each, of the K best continuations of the K rows of each source, by groups.

    logp: (b, K, V). The first one continues the first row, by the token that greedy decoding takes."""
    options = batch.options
    if options.num_beam_groups == 1:
        return _best(logp, total, ended, divisor, batch.pad_id, leads=True)
    size, chosen = options.num_beams // options.num_beam_groups, []
    counts = torch.zeros_like(logp[:, 0])  # how often each token was chosen in this step
    for begin in range(0, options.num_beams, size):
        group = slice(begin, begin + size)
        own, by = (x[:, group] if isinstance(x, Tensor) else x for x in (ended, divisor))
        penalised = logp[:, group] - options.diversity_penalty * counts[:, None]
        sums, parent, token = _best(penalised, total[:, group], own, by, batch.pad_id, leads=not begin)
        counts.scatter_add_(1, token, torch.ones_like(sums))
        chosen.append((sums, parent + begin, token))
    sums, parents, tokens = (torch.cat(parts, 1) for parts in zip(*chosen, strict=True))
    return sums, parents, tokens


def _best(
    logp: Tensor, total: Tensor, ended: Tensor | None, divisor: Any, pad_id: int, leads: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """As `_continuations`, of one group of k rows; leads: whether its first row is the greedy one."""
    k, n = logp.shape[1], min(logp.shape[1:])
    best, ids = logp.topk(n)
    if leads:
        greedy = logp[:, 0].max(-1).indices
        if logp.device.type != "cpu" or not torch.equal(ids[:, 0, 0], greedy):  # another one of equals
            ids[:, 0] = torch.where(ids[:, 0] == greedy[:, None], ids[:, 0, :1], ids[:, 0])
            ids[:, 0, 0] = greedy
    if ended is not None:  # the one continuation of a row that has ended is padding, at no cost
        ids = ids.masked_fill(ended[..., None], pad_id)
        best = best.masked_fill(ended[..., None], float("-inf"))
        best[..., 0].masked_fill_(ended, 0.0)
        divisor = divisor[..., None]
    sums = total[..., None] + best
    scores = (sums / divisor).flatten(1)
    if leads:
        scores[:, 0] = float("inf")  # it is never dropped
    chosen = scores.topk(k).indices
    return sums.flatten(1).gather(1, chosen), chosen // n, ids.flatten(1).gather(1, chosen)
