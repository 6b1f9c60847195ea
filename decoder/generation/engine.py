"""Engine: sequences that enter and leave a running batch between its steps; over any `Decodable`."""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from tileformer.decoder.generation.options import Options
from tileformer.decoder.generation.paged import PagedCache, PagePool
from tileformer.decoder.generation.sampling import Sampler
from tileformer.decoder.generation.search import DecodeBatch, checked
from tileformer.decoder.generation.state import Decodable
from tileformer.decoder.generation.step import Decoding

PREFILL = 4096  # tokens that are read together, padding among them


class Event(NamedTuple):
    """What happened to a sequence: a new token, its end, or both.

    ``reason`` of an end: "eos"; "length", no more tokens may come; "stop", a stop string was completed, or the options
    leave no token; "cancelled"; "error", and ``error`` says which.
    """

    id: int
    token: int | None = None
    reason: str | None = None
    error: Exception | None = None


class _Sequence:
    """A prompt and what followed it: ``tokens``, of which all but the last were read, or all in a step's end."""

    def __init__(self, id: int, batch: DecodeBatch, limit: int) -> None:
        self.id, self.batch, self.limit = id, batch, limit
        self.tokens: list[int] = batch.tokens[0].tolist()
        self.prompt = len(self.tokens)  # with what its options force it to begin with
        self.untold: list[int] = batch.prefix.tolist()
        self.slot: int | None = None
        self.restart()

    def restart(self) -> None:
        """Choose as if nothing had been chosen: what was begun may have been interrupted."""
        self.adjuster: Any = None
        self.slot, options = None, self.batch.options
        self.sampler = Sampler(options, 1, self.batch.tokens.device) if options.samples else None
        self.is_plain = not (options.samples or options.constrains)

    def choose(self, logits: Tensor) -> tuple[int | None, str | None]:
        """The next token by ``logits`` (1, V), and the reason if it is the last."""
        step = len(self.tokens) - self.prompt
        if self.adjuster is None and self.batch.options.constrains:
            self.adjuster = self.batch.adjuster(logits)
            for chosen in self.tokens[self.prompt :]:
                self.adjuster.append(self.batch.tokens.new_tensor([chosen]))
        scores = logits if self.adjuster is None else self.adjuster(logits, step)
        best, token = scores.max(-1)
        if best.isnan() or best == float("inf"):
            raise FloatingPointError("the options leave scores that are not finite")
        if self.sampler is not None:
            _, token = self.sampler(scores, step + len(self.batch.prefix))
        if token == self.batch.pad_id:  # the options leave no other
            return None, "stop"
        if self.adjuster is not None:
            self.adjuster.append(token)
            if self.batch.options.stop_strings and self.adjuster.stopped()[0]:
                return int(token), "stop"
        return int(token), None


class Engine:
    """A running batch of ``slots`` rows, which sequences of any lengths enter and leave between two steps.

    Sequences are taken in the order in which they came, as soon as there is a slot (and pages) for the first of them.
    Each decodes to the tokens that it has alone: nothing that happens to another one reaches it.

    Args:
        model: a `Decodable`.
        slots: how many sequences are decoded at once.
        capacity: how many tokens a sequence may have read, its prompt's among them; default: the model's max_length.
        pages: keep keys and values in so many pages of ``page_size`` tokens that all sequences share, instead of
            ``capacity`` tokens a slot. Prompts that begin alike share whole pages. When pages run out, the youngest
            sequence waits again, and later reads its tokens anew. For our own models.
        device: where tokens live; default: the model's first parameter's device.

    Whatever is raised out of `step`, a Ctrl-C too, leaves the engine whole: the sequences stand as after the step
    before, and the next step reads their tokens anew. What belongs to one sequence alone is not raised but ends it with
    an "error" event: prompts that the model refuses, logits that are not finite, exceptions of its options' functions.
    The model's weights must stay as they are: what was read of a prompt is kept for the next one that begins like it.

    Example:
        >>> from tileformer.decoder import DecoderLM, DecoderLMConfig
        >>> engine = Engine(DecoderLM(DecoderLMConfig(vocab=20, d_model=32, nhead=4)).eval(), slots=2, pages=8)
        >>> ids = [engine.add(prompt, max_length=4) for prompt in ([1, 3], [1, 4, 5], [1, 6])]
        >>> sorted({event.id for event in engine.run()}) == ids
        True
    """

    def __init__(
        self,
        model: Decodable,
        *,
        slots: int,
        capacity: int | None = None,
        pages: int | None = None,
        page_size: int = 16,
        device: torch.device | str | None = None,
    ) -> None:
        if slots < 1:
            raise ValueError(f"slots must be at least 1, got {slots}")
        limit: int | None = getattr(model, "max_length", None)
        if capacity is None and limit is None:
            raise ValueError(f"{type(model).__name__} names no max_length, the tokens that it reads: pass capacity")
        if capacity is not None and not 1 <= capacity <= (capacity if limit is None else limit):
            raise ValueError(f"capacity must be between 1 and the {limit} tokens that the model reads, got {capacity}")
        if pages is not None and not isinstance(model, Decoding):
            raise TypeError(f"{type(model).__name__} keeps its own state of each row, not in pages: leave pages out")
        if isinstance(model, Decoding):
            with torch.no_grad():
                model.check_cache(model.why_modules())
        self.model, self.slots, self.capacity = model, slots, capacity or limit or 0
        self.conditioned = getattr(model, "conditioned", False)
        self.pool = None if pages is None else PagePool(pages, page_size)
        if self.pool is not None:
            self.capacity = min(self.capacity, self.pool.pages * page_size)
        weight = next(iter(getattr(model, "parameters", tuple)()), None)
        self.device = torch.device(device or ("cpu" if weight is None else weight.device))
        self.sequences: dict[int, _Sequence] = {}  # all that have not ended
        self.preemptions = 0
        self._last_id = 0
        self._cancelled: list[int] = []
        self._events: list[Event] = []
        self._start_over()

    def add(
        self, prompt: Sequence[int] | Tensor, options: Options | None = None, *, max_length: int | None = None
    ) -> int:
        """Queue a sequence and return its id. ``prompt``: its first tokens, or its source, as `generate`'s ``src``.

        Raises as `generate` for a prompt, an option or a length that makes no sense, and ValueError for more tokens
        than the engine has room for.
        """
        options = checked(options)
        if options.searches or options.num_return_sequences or options.generator is not None:
            raise ValueError("a sequence is greedy or drawn by its seed: pass no beams, n_best or generator")
        if options.samples and options.seed is None:
            options = replace(options, seed=int(torch.randint(2**31, ())))
        row = torch.as_tensor(prompt, dtype=torch.int64, device=self.device)
        bound = max_length
        if bound is None and getattr(self.model, "max_length", None) is None:
            bound = max(1, self.capacity + 1 - len(row))
        batch = DecodeBatch(self.model, row[None], bound, options=options)
        length = batch.tokens.shape[1]
        limit = length + batch.steps
        if max_length is None:
            limit = min(limit, self.capacity + 1)
        if length > self.capacity or limit > self.capacity + 1:
            raise ValueError(
                f"{length} tokens and up to {batch.steps} new ones do not fit the engine's capacity of "
                f"{self.capacity}: shorten them, or give it more{'' if self.pool is None else ' pages'}"
            )
        batch.steps = limit - length
        self._last_id += 1
        self.sequences[self._last_id] = _Sequence(self._last_id, batch, limit)
        heapq.heappush(self._waiting, self._last_id)
        return self._last_id

    def cancel(self, id: int) -> bool:
        """End a sequence at the next step; False where it has ended already. May be called from any function of it."""
        known = id in self.sequences
        if known:
            self._cancelled.append(id)
        return known

    @torch.no_grad()
    def step(self) -> list[Event]:
        """One more token of each sequence that has a slot; what happened to which."""
        try:
            while self._cancelled:
                if (sequence := self.sequences.get(self._cancelled.pop())) is not None:
                    self._end(sequence, "cancelled")
            rows, logits = self._read()
            for sequence, first in self._admit():
                rows.append(sequence)
                logits.append(first)
            if rows:
                self._choose(rows, torch.cat(logits))
        except BaseException:
            self._start_over()
            raise
        events, self._events = self._events, []
        return events

    def run(self) -> Iterator[Event]:
        """The events of all steps until no sequence is left."""
        while self.sequences or self._events:
            yield from self.step()

    # Where sequences stand

    def _start_over(self) -> None:
        """Every sequence waits, and no slot or page holds anything."""
        for sequence in self.sequences.values():
            sequence.restart()
        self._waiting = sorted(self.sequences)  # a heap of ids, the oldest first
        self._free = list(range(self.slots))
        self.state: Any = None
        if self.pool is not None:
            self.pool.reset()
            self.state = PagedCache(self.pool, self.slots, self.capacity, self.device)

    def _running(self) -> list[_Sequence]:
        """The sequences that have a slot, the oldest first."""
        return [sequence for sequence in self.sequences.values() if sequence.slot is not None]

    def _leave(self, sequence: _Sequence, whole: bool = True) -> None:
        """Give the slot back; pages can be found again unless their keys are not ``whole``."""
        if (slot := sequence.slot) is None:
            return
        if whole:
            self._remember(sequence)
        elif self.pool is not None:
            for page in self.state.pages[slot]:
                self.pool.forget(page)
        self.state.release(torch.tensor([slot], device=self.device))
        sequence.slot = None
        self._free.append(slot)

    def _end(self, sequence: _Sequence, reason: str, token: int | None = None, error: Exception | None = None) -> None:
        self._leave(sequence, whole=reason != "error")
        self._events.append(Event(sequence.id, token, reason, error))
        del self.sequences[sequence.id]

    def _remember(self, sequence: _Sequence) -> None:
        if self.pool is not None and not self.conditioned:
            self.pool.remember(sequence.tokens[: self.state.counts[sequence.slot]], self.state.pages[sequence.slot])

    # A step

    def _read(self) -> tuple[list[_Sequence], list[Tensor]]:
        """The running sequences, and the logits behind the last token of each."""
        running = self._running()
        while self.pool is not None and self.state.lacking(1) > self.pool.available:
            youngest = running.pop()  # the oldest alone always has pages: a sequence is no longer than the pool
            self._leave(youngest)
            heapq.heappush(self._waiting, youngest.id)
            self.preemptions += 1
        if not running:
            return [], []
        tokens = [self.model.pad_id] * self.slots
        for sequence in running:
            tokens[sequence.slot] = sequence.tokens[-1]  # type: ignore[index]
        logits = self.model.step(torch.tensor(tokens, device=self.device), self.state)
        return running, [logits[[sequence.slot for sequence in running]]]

    def _admit(self) -> Iterator[tuple[_Sequence, Tensor]]:
        """Let in who waits, as long as there is room: each with the logits (1, V) behind its tokens."""
        while (group := self._next())[0]:
            yield from self._let_in(*group)

    def _next(self) -> tuple[list[_Sequence], list[int]]:
        """Who is let in now, together: one whose beginning is known, with its pages, or all that begin anew."""
        group: list[_Sequence] = []
        longest = pages = 0
        while self._waiting and len(group) < len(self._free):
            sequence = self.sequences.get(self._waiting[0])
            if sequence is None:  # it was cancelled
                heapq.heappop(self._waiting)
                continue
            known = self.pool.find(sequence.tokens[:-1]) if self.pool is not None else []
            pages += self._lacking(sequence, known)
            longest = max(
                longest, len(sequence.tokens), sequence.batch.inputs.get("source", sequence.batch.tokens).shape[1]
            )
            if self.pool is not None and pages + self.state.lacking(1) > self.pool.available:
                break  # its pages and one token more of everybody have to be free
            if group and (known or longest * (len(group) + 1) > PREFILL or self._begins_like(sequence, group)):
                break
            heapq.heappop(self._waiting)
            group.append(sequence)
            if known:
                return group, known
        return group, []

    def _lacking(self, sequence: _Sequence, known: list[int]) -> int:
        """The free pages that it takes."""
        if self.pool is None:
            return 0
        read = min(len(sequence.tokens) + 1, sequence.limit - 1)
        return self.pool.pages_for(read) - sum(self.pool.readers[page] > 0 for page in known)

    def _begins_like(self, sequence: _Sequence, group: list[_Sequence]) -> bool:
        """Whether it can read the first page of one of them, once that one has been read."""
        if self.pool is None or self.conditioned or len(sequence.tokens) <= (size := self.pool.page_size):
            return False
        return any(other.tokens[:size] == sequence.tokens[:size] for other in group)

    def _let_in(self, group: list[_Sequence], known: list[int]) -> Iterator[tuple[_Sequence, Tensor]]:
        try:
            logits, rows = self._prefill(group, known)
        except Exception as error:
            if len(group) == 1:
                self._end(group[0], "error", error=error)
            for sequence in group if len(group) > 1 else ():  # one of them fails
                yield from self._let_in([sequence], [])
            return
        self._insert(group, rows)
        yield from zip(group, logits.split(1), strict=True)

    def _prefill(self, group: list[_Sequence], known: list[int]) -> tuple[Tensor, Any]:
        tokens = self._padded([torch.tensor(sequence.tokens) for sequence in group], "left")  # the newest stand last
        if not known:
            inputs: dict[str, Any] = {}
            if self.conditioned:
                inputs["source"] = self._padded([sequence.batch.inputs["source"][0] for sequence in group], "right")
            capacity = self.capacity if self.state is None else tokens.shape[1]
            return self.model.start(tokens, capacity=capacity, **inputs)
        row = PagedCache(self.state.pool, 1, self.capacity, self.device)
        row.adopt(self.state, known)
        try:
            return self.model.step(tokens[:, len(known) * row.pool.page_size :], row)[:, -1], row
        except Exception:
            row.release(torch.tensor([0]))
            raise

    def _padded(self, rows: list[Tensor], side: str) -> Tensor:
        if len(rows) == 1:  # as it came: a source may be anything that the model reads
            return rows[0][None].to(self.device)
        return pad_sequence(rows, True, self.model.pad_id, side).to(self.device)

    def _insert(self, group: list[_Sequence], rows: Any) -> None:
        for sequence in group:
            sequence.slot = self._free.pop()
        slots = torch.tensor([sequence.slot for sequence in group], device=self.device)
        if self.state is None:  # a state of all slots is the first rows', over and over
            self.state, index = rows, torch.zeros(self.slots, dtype=torch.int64, device=self.device)
            rows.select(index.index_copy(0, slots, torch.arange(len(group), device=self.device)))
            rows.release((index + 1).index_fill(0, slots, 0).nonzero().flatten())
        else:
            self.state.insert(slots, rows)
        if isinstance(rows, PagedCache):
            rows.release(torch.tensor([0]))
        for sequence in group:
            self._remember(sequence)

    def _choose(self, rows: list[_Sequence], logits: Tensor) -> None:
        """The next token of each of ``rows`` from its ``logits``, and who ends with it."""
        logits = logits.index_fill(1, torch.tensor([self.model.pad_id], device=logits.device), float("-inf"))
        best, greedy = logits.max(-1)
        finite = best.isfinite().tolist()
        for i, (sequence, token) in enumerate(zip(rows, greedy.tolist(), strict=True)):
            chosen: tuple[int | None, str | None] = (token, None)
            try:
                if not finite[i]:
                    raise FloatingPointError(f"the logits behind token {len(sequence.tokens)} are not finite")
                if not sequence.is_plain:
                    chosen = sequence.choose(logits[i : i + 1])
            except Exception as error:
                self._end(sequence, "error", error=error)
                continue
            token, reason = chosen
            if token is not None:
                sequence.tokens.append(token)
            if token == self.model.eos_id:
                reason = "eos"
            elif len(sequence.tokens) == sequence.limit:
                reason = reason or "length"
            while sequence.untold:
                self._events.append(Event(sequence.id, sequence.untold.pop(0)))
            if reason is None:
                self._events.append(Event(sequence.id, token))
            else:
                self._end(sequence, reason, token)
