"""RecurrentState, hidden tensors that a step rewrites; RecurrentDecoding, ``start`` and ``step`` of models with one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tileformer.decoder.generation.device import CapturedStep
from tileformer.decoder.generation.state import align_prompts, align_source, insert_fixed
from tileformer.kernels import attention, decode_attention


class RecurrentState:
    """What a recurrent model remembers of R rows: a `DecodeState` that cannot forget a single token.

    hidden (R, n, C); lengths int32 (R,), 0 for a released row; source: tensors with a row each that are read at every
    step. A step and beams write in place, because a CUDA graph knows tensors by their addresses.
    """

    def __init__(self, hidden: Tensor, source: tuple[Tensor, ...] = ()) -> None:
        self.hidden, self.source = hidden, source
        self.lengths = hidden.new_zeros(len(hidden), dtype=torch.int32)
        self.live = torch.ones_like(self.lengths)  # 0 for a released row
        self.captures = False  # whether steps become a CUDA graph
        self.captured: CapturedStep | None = None
        self.last_places: tuple[int, ...] = ()

    def advance(self, hidden: Tensor, read: int | Tensor) -> None:
        """Each row has read so many tokens more, and is at ``hidden``."""
        self.hidden = _into(self.hidden, hidden)
        self.lengths.add_(read * self.live)

    def replayed(self, tokens: Tensor, run: Any) -> Tensor:
        """``run(tokens, self)``: the first time as it is, which compiles kernels, then as a graph."""
        tensors = (self.hidden, self.lengths, self.live, *self.source)
        places = (len(tokens), *(x.data_ptr() for x in tensors))
        if self.captured is None or self.captured.places != places:
            if self.last_places != places:
                self.last_places = places
                return run(tokens, self)
            self.captured = CapturedStep(run, tokens, self, places)  # type: ignore[arg-type]
        return self.captured(tokens)

    def select(self, rows: Tensor) -> None:
        self.reorder(rows)
        self.source = tuple(x.index_select(0, rows) for x in self.source)

    def reorder(self, rows: Tensor) -> None:
        own = (self.hidden, self.lengths, self.live)
        self.hidden, self.lengths, self.live = (_into(x, x.index_select(0, rows)) for x in own)

    def insert(self, slots: Tensor, other: Any) -> None:
        self.hidden.index_copy_(0, slots, other.hidden)
        self.lengths.index_copy_(0, slots, other.lengths)
        self.live.index_fill_(0, slots, 1)
        self.source = tuple(insert_fixed([*self.source], slots, [*other.source]))

    def release(self, rows: Tensor) -> None:
        self.hidden.index_fill_(0, rows, 0.0)
        self.live.index_fill_(0, rows, 0)
        self.lengths.mul_(self.live)

    def truncate(self, lengths: Tensor) -> None:
        """Raise ValueError: what was read is in the state for good."""
        raise ValueError("a recurrent state cannot forget tokens: decode without a draft, or by a Transformer")


def _into(x: Tensor, y: Tensor) -> Tensor:
    """y, in x's place where it fits and no gradient asks for what x was."""
    return y if y.requires_grad or x.shape != y.shape else x.copy_(y)


class RecurrentDecoding:
    """``start`` and ``step`` of models whose state is a `RecurrentState`. A model says what rows begin with
    (``_begin``), what it makes of tokens, from which ``_logits`` are, and the hidden tensor behind them (``_said``)."""

    conditioned = False
    step_captures = True  # on a GPU: as a CUDA graph, from a state's second step on

    pad_id: int
    max_length: int
    training: bool
    embedding: Any
    src_embedding: Any
    modules: Any
    _begin: Any
    _said: Any
    _logits: Any

    def start(
        self, tokens: Tensor, *, capacity: int, source: Tensor | None = None, beams: int = 1
    ) -> tuple[Tensor, RecurrentState]:
        """See `Decodable.start`."""
        tokens, lengths, shortest, longest = align_prompts(tokens, self.pad_id, self.embedding.num_embeddings)
        if not longest <= capacity <= self.max_length:
            limit = f"from the {longest} tokens of a prompt to the model's {self.max_length}"
            raise ValueError(f"capacity must be {limit}, got {capacity}")
        if source is not None and self.conditioned:
            source = align_source(source, self.pad_id, self.src_embedding.num_embeddings)
        state: RecurrentState = self._begin(source, len(tokens))
        x, hidden = self._said(tokens, state, lengths if shortest < longest else None)
        state.advance(hidden, lengths)
        logits = self._logits(x[torch.arange(len(tokens), device=tokens.device), lengths - 1])
        if beams > 1:
            rows = torch.arange(len(tokens), device=tokens.device).repeat_interleave(beams)
            state.select(rows)
            logits = logits[rows]
        state.captures = tokens.is_cuda and self.step_captures and self._is_plain()
        return logits, state

    def step(self, tokens: Tensor, state: RecurrentState) -> Tensor:
        """See `Decodable.step`."""
        new = tokens if tokens.dim() == 2 else tokens[:, None]
        captures = state.captures and new.shape[1] == 1
        logits = state.replayed(new, self._step) if captures else self._step(new, state)
        return logits if tokens.dim() == 2 else logits[:, 0]

    def _step(self, tokens: Tensor, state: RecurrentState) -> Tensor:
        x, hidden = self._said(tokens, state)
        state.advance(hidden, tokens.shape[1])
        return self._logits(x)

    def _is_plain(self) -> bool:
        """Whether a step is the same work each time: nothing records, draws, casts or watches it."""
        hooked = any(module._forward_hooks or module._forward_pre_hooks for module in self.modules())
        return not (hooked or self.training or torch.is_grad_enabled() or torch.is_autocast_enabled("cuda"))


def padding_last(src: Tensor, pad_id: int) -> tuple[Tensor, Tensor]:
    """``src`` (B, T) with all padding behind each row's tokens, one column wide at least, and where it is padding."""
    if not src.shape[1]:
        src = F.pad(src, (0, 1), value=pad_id)
    padding, order = (src == pad_id).int().sort(dim=1, stable=True)
    return src.gather(1, order), padding == 1


def lengths_of(padding: Tensor) -> Tensor:
    """How many tokens stand before the ``padding`` (B, T): int32 (B, 1), a tensor with a row each as others."""
    return (~padding).sum(1, keepdim=True, dtype=torch.int32)


def attend(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
    """(B, T, H * D): queries (B, H, T, D) to the first ``lengths`` (B, 1) of the keys and values (B, H, T_k, D)."""
    if q.shape[2] == 1 and not (q.requires_grad or k.requires_grad):  # a step
        out = decode_attention(q, k, v, lengths[:, 0], causal=False)
    else:
        out = attention(q, k, v, key_mask=torch.arange(k.shape[2], device=k.device) < lengths)
    return out.transpose(1, 2).flatten(2)
