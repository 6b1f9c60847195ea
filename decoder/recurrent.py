"""Recurrent decoders: GRU, LSTM and SSRU, with and without attention over an encoder, decoded as every other model.

A source is read in both directions, layer by layer (Bahdanau et al. 2015); a decoder's output attends to it through our
kernel, and both make the vector that the logits are of: tanh(W [context; output]) (Luong et al. 2015,
arXiv:1508.04025, "global attention", without input feeding, so that training runs a whole target in one call).
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from tileformer.decoder.generation.hidden_state import (
    RecurrentDecoding,
    RecurrentState,
    attend,
    lengths_of,
    padding_last,
)
from tileformer.decoder.nn.modules import Dropout
from tileformer.decoder.pretrained import Saved

CELLS = ("lstm", "gru", "ssru")


@dataclass(frozen=True)
class RecurrentConfig:
    """What decides the shape of a recurrent model: of a `RecurrentLM`, and with a source's two fields of a
    `RecurrentSeq2Seq`. ``max_length`` bounds what is read, by a user's wish alone. Raises ValueError."""

    vocab: int
    src_vocab: int = 0
    num_encoder_layers: int = 0
    cell: str = "lstm"
    attention: bool = False
    d_model: int = 128
    nhead: int = 1
    num_layers: int = 2
    dropout: float = 0.1
    max_length: int = 256
    pad_id: int = 0
    bos_id: int = 1
    eos_id: int = 2

    def __post_init__(self) -> None:
        for name in ("vocab", "num_layers", "d_model", "nhead", "max_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.src_vocab < 0 or self.num_encoder_layers < 0:
            got = f"{self.src_vocab} and {self.num_encoder_layers}"
            raise ValueError(f"src_vocab and num_encoder_layers must be at least 0, got {got}")
        if self.cell not in CELLS:
            raise ValueError(f"cell must be one of {', '.join(CELLS)}, got {self.cell!r}")
        if self.src_vocab and self.d_model % (2 * self.nhead):
            raise ValueError(
                f"d_model {self.d_model} is divided into two directions and {self.nhead} heads: take a multiple of "
                f"{2 * self.nhead}"
            )
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")
        if self.attention and not self.src_vocab:
            raise ValueError("attention is over a source: give src_vocab and num_encoder_layers, or attention=False")
        ids, sizes = (self.pad_id, self.bos_id, self.eos_id), [self.vocab, *[self.src_vocab] * bool(self.src_vocab)]
        if len(set(ids)) < 3 or not all(0 <= i < self.vocab for i in ids) or any(self.pad_id >= size for size in sizes):
            raise ValueError(
                f"pad_id, bos_id and eos_id must be three ids inside the vocabulary, got {ids} for {sizes}"
            )

    def general(self) -> "RecurrentConfig":
        return self


class SSRU(nn.Module):
    """The simpler simple recurrent unit (Kim et al. 2019, "From Research to Production and Back", section 3.1):

        f = sigmoid(W_f x + b_f)    c = f c + (1 - f) W x    y = relu(c)

    No product reads the state, so that all of them are made for a whole sequence at once.
    """

    def __init__(self, size_in: int, size: int) -> None:
        super().__init__()
        self.forget, self.write = nn.Linear(size_in, size), nn.Linear(size_in, size, bias=False)

    def forward(self, x: Tensor, c: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """y (B, T, C) and the last c (B, C) of ``x`` (B, T, C_in) and ``c``; behind ``lengths`` (B,) c stays."""
        f = torch.sigmoid(self.forget(x))
        new = (1 - f) * self.write(x)
        if lengths is not None:
            behind = (torch.arange(x.shape[1], device=x.device) >= lengths[:, None])[..., None]
            f, new = f.masked_fill(behind, 1.0), new.masked_fill(behind, 0.0)
        states = []
        for t in range(x.shape[1]):
            c = torch.addcmul(new[:, t], f[:, t], c)
            states.append(c)
        return torch.relu(torch.stack(states, 1)) if states else new, c


class Recurrence(nn.Module):
    """``layers`` cells above each other, with dropout between. A state is one tensor (B, n, C): h of each layer, and
    behind them an LSTM's c."""

    def __init__(self, cell: str, size_in: int, size: int, layers: int, dropout: float) -> None:
        super().__init__()
        sizes = [size_in, *[size] * (layers - 1)]
        self.dropout, self.size = Dropout(dropout), size
        if cell == "ssru":
            self.layers = nn.ModuleList(SSRU(n, size) for n in sizes)
        else:
            kind: Any = nn.LSTM if cell == "lstm" else nn.GRU
            self.layers = nn.ModuleList(kind(n, size, batch_first=True) for n in sizes)
        self.parts = 2 if cell == "lstm" else 1

    def begin(self, like: Tensor) -> Tensor:
        """The state of nothing read, for the rows of ``like``."""
        return like.new_zeros(len(like), self.parts * len(self.layers), self.size)

    def forward(self, x: Tensor, state: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Outputs (B, T, C) of ``x`` (B, T, C_in) and the state behind them, or behind the first ``lengths`` (B,)."""
        if not x.shape[1]:  # torch's kernels read a token at least
            return x.new_zeros(len(x), 0, self.size), state
        states, n = state.unbind(1), len(self.layers)
        h, c = [*states[:n]], [*states[n:]]
        for i, layer in enumerate(self.layers):
            x = x if i == 0 else self.dropout(x)
            if isinstance(layer, SSRU):
                x, h[i] = layer(x, h[i], lengths)
                continue
            if x.shape[1] == 1:  # the cell alone: a call for a sequence orders its weights anew, which costs most
                if self.parts == 2:
                    h[i], c[i] = torch.lstm_cell(x[:, 0], [h[i], c[i]], *_weights(layer))
                else:
                    h[i] = torch.gru_cell(x[:, 0], h[i], *_weights(layer))
                x = h[i][:, None]
                continue
            before: Any = h[i][None].contiguous()
            if self.parts == 2:
                before = before, c[i][None].contiguous()
            if lengths is None:
                x, behind = layer(x, before)
            else:
                packed = pack_padded_sequence(x, lengths.clamp(min=1).cpu(), batch_first=True, enforce_sorted=False)
                y, behind = layer(packed, before)
                x = pad_packed_sequence(y, batch_first=True, total_length=x.shape[1])[0]
            if self.parts == 2:
                h[i], c[i] = behind[0][0], behind[1][0]
            else:
                h[i] = behind[0]
        return x, torch.stack([*h, *c], 1)


def _weights(layer: Any) -> tuple[Tensor, ...]:
    return layer.weight_ih_l0, layer.weight_hh_l0, layer.bias_ih_l0, layer.bias_hh_l0


class BothWays(nn.Module):
    """An encoder: each layer reads its input forwards and, inside of each row's tokens, backwards."""

    def __init__(self, cell: str, size: int, layers: int, dropout: float) -> None:
        super().__init__()
        half = size // 2
        self.forwards = nn.ModuleList(Recurrence(cell, size, half, 1, 0.0) for _ in range(layers))
        self.backwards = nn.ModuleList(Recurrence(cell, size, half, 1, 0.0) for _ in range(layers))
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
        """Memory (B, T, C) of ``x`` (B, T, C), and what it ends in, (B, C): zeros for a row without a token.

        real: (B, T), True = a token; padding stands behind."""
        lengths = real.sum(1, keepdim=True)
        places = torch.arange(x.shape[1], device=x.device)
        reverse = torch.where(real, lengths - 1 - places, places)[..., None]  # its own inverse
        pairs: Any = zip(self.forwards, self.backwards, strict=True)
        for i, (there, back) in enumerate(pairs):
            x = x if i == 0 else self.dropout(x)
            ahead = there(x, there.begin(x))[0]
            turned = back(x.gather(1, reverse.expand_as(x)), back.begin(x))[0]
            x = torch.cat([ahead, turned.gather(1, reverse.expand_as(turned))], -1)
        half = x.shape[2] // 2
        last = (lengths - 1).clamp(min=0)[..., None].expand(-1, 1, half)
        ends = torch.cat([x[..., :half].gather(1, last)[:, 0], x[:, 0, half:]], -1)
        return x, ends.masked_fill(lengths == 0, 0.0)


class Recurrent(RecurrentDecoding, Saved, nn.Module):
    """What both models share: an embedding, which is the output projection too, a recurrence, and decoding."""

    hidden: Any
    encoder: Any

    def __init__(self, config: RecurrentConfig) -> None:
        super().__init__()
        if bool(config.src_vocab and config.num_encoder_layers) != self.conditioned:
            raise ValueError(
                f"a {type(self).__name__} is built {'with' if self.conditioned else 'without'} a source, got src_vocab "
                f"{config.src_vocab} and num_encoder_layers {config.num_encoder_layers}"
            )
        C = config.d_model
        self.config, self.max_length, self.num_layers = config, config.max_length, config.num_layers
        self.pad_id, self.bos_id, self.eos_id = config.pad_id, config.bos_id, config.eos_id
        self.embedding = nn.Embedding(config.vocab, C)
        self.decoder = Recurrence(config.cell, C, C, config.num_layers, config.dropout)
        self.dropout, self.out = Dropout(config.dropout), nn.Linear(C, C)
        self._draw(self.embedding)

    @property
    def head(self) -> Tensor:
        return self.embedding.weight

    def _draw(self, *embeddings: nn.Embedding) -> None:
        for embedding in embeddings:
            nn.init.normal_(embedding.weight, std=self.config.d_model**-0.5)

    def _check(self, tokens: Tensor, name: str) -> None:
        if tokens.dtype != torch.int64 or tokens.dim() != 2:
            raise TypeError(f"{name} must be token ids (B, T) int64, got {tokens.dtype} {tuple(tokens.shape)}")
        if tokens.shape[1] > self.max_length:
            raise ValueError(f"{name} reaches {tokens.shape[1]} tokens, this model was built for {self.max_length}")

    def _embed(self, embedding: nn.Embedding, tokens: Tensor) -> Tensor:
        """(B, T, C) of unit size, dropped."""
        return self.dropout(embedding(tokens) * self.config.d_model**0.5)

    def _said(self, tokens: Tensor, state: RecurrentState, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """What logits are of, (B, T, C), and the hidden tensor behind, or behind the first ``lengths`` (B,)."""
        self._check(tokens, "tokens")
        y, hidden = self.decoder(self._embed(self.embedding, tokens), state.hidden, lengths)
        return self.dropout(torch.tanh(self.out(self._attended(y, state.source)))), hidden

    def _logits(self, x: Tensor) -> Tensor:
        return F.linear(x, self.head)

    def _attended(self, y: Tensor, source: tuple[Tensor, ...]) -> Tensor:
        return y

    def _begin(self, source: Tensor | None, rows: int) -> RecurrentState:
        if source is not None:
            raise ValueError(f"a {type(self).__name__} has no source: its rows begin with their prompts")
        return RecurrentState(self.decoder.begin(self.head.new_zeros(rows, 1)))


class RecurrentLM(Recurrent):
    """Tokens in, logits of the next token out, as a `DecoderLM`, by a recurrence.

    Example:
        >>> model = RecurrentLM(RecurrentConfig(vocab=20, cell="gru", d_model=32))
        >>> model(torch.tensor([[1, 3, 4]])).shape
        torch.Size([1, 3, 20])
    """

    configs = (RecurrentConfig,)

    def forward(self, tokens: Tensor, *, cu_seqlens: Tensor | None = None) -> Tensor:
        """Logits (B, T, V) for the token after each of ``tokens`` (B, T); packed, (1, total), with ``cu_seqlens``
        (N + 1,): each document begins anew."""
        return self._logits(self.hidden(tokens, cu_seqlens=cu_seqlens))

    def hidden(self, tokens: Tensor, *, cu_seqlens: Tensor | None = None) -> Tensor:
        if cu_seqlens is None:
            return self._said(tokens, self._begin(None, len(tokens)))[0]
        if tokens.dim() != 2 or len(tokens) != 1 or cu_seqlens.dim() != 1 or len(cu_seqlens) < 2:
            got = f"{tuple(tokens.shape)} and {tuple(cu_seqlens.shape)}"
            raise ValueError(f"packed tokens are (1, total) with cu_seqlens (N + 1,), got {got}")
        sizes = cu_seqlens.diff().long()
        places = torch.arange(int(sizes.max()), device=tokens.device)
        real = places < sizes[:, None]
        index = (cu_seqlens[:-1, None].long() + places).where(real, 0)
        x = self._said(tokens[0][index], self._begin(None, len(sizes)))[0]
        packed = x.new_zeros(1, tokens.shape[1], x.shape[2])
        packed[0, index[real]] = x[real]
        return packed


class RecurrentSeq2Seq(Recurrent):
    """Source tokens and target tokens in, logits of the next target token out, as a `Seq2Seq`, by recurrences.

    Example:
        >>> config = RecurrentConfig(vocab=30, src_vocab=20, num_encoder_layers=1, attention=True, d_model=32)
        >>> RecurrentSeq2Seq(config)(torch.tensor([[3, 4, 5]]), torch.tensor([[1, 6]])).shape
        torch.Size([1, 2, 30])
    """

    configs = (RecurrentConfig,)
    conditioned = True

    def __init__(self, config: RecurrentConfig) -> None:
        super().__init__(config)
        C = config.d_model
        self.src_embedding = nn.Embedding(config.src_vocab, C)
        self.encoder = BothWays(config.cell, C, config.num_encoder_layers, config.dropout)
        self.bridge = nn.Linear(C, C * self.decoder.parts * config.num_layers)
        if config.attention:
            self.query, self.key_value = nn.Linear(C, C), nn.Linear(C, 2 * C)
            self.out = nn.Linear(2 * C, C)
        self._draw(self.src_embedding)

    def forward(self, src: Tensor, tgt: Tensor) -> Tensor:
        """Logits (B, T_t, V) for the token after each of ``tgt`` (B, T_t), padded behind its tokens, given ``src`` (B,
        T_s), whose padding is left out wherever it stands."""
        return self._logits(self.hidden(src, tgt))

    def hidden(self, src: Tensor, tgt: Tensor) -> Tensor:
        if len(src) != len(tgt):
            raise ValueError(f"tgt has {len(tgt)} rows, its source {len(src)}")
        return self._said(tgt, self._begin(src, len(src)))[0]

    def encode(self, src: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Memory (B, T_s, C) of ``src``, all padding behind its tokens, the padding's mask (B, T_s), True = padding,
        and what the memory ends in (B, C)."""
        self._check(src, "src")
        src, padding = padding_last(src, self.pad_id)
        memory, end = self.encoder(self._embed(self.src_embedding, src), ~padding)
        return memory, padding, end

    def _begin(self, source: Tensor | None, rows: int) -> RecurrentState:
        if source is None:
            raise ValueError("a RecurrentSeq2Seq is conditioned on a source: start(tokens, source=...)")
        memory, padding, end = self.encode(source)
        hidden = torch.tanh(self.bridge(end)).unflatten(1, (-1, self.config.d_model))
        if not self.config.attention:
            return RecurrentState(hidden)
        k, v = self._heads(self.key_value(memory), 2).permute(2, 0, 3, 1, 4)
        return RecurrentState(hidden, (k, v, lengths_of(padding)))

    def _heads(self, x: Tensor, parts: int) -> Tensor:
        """(B, T, parts * C) -> (B, T, parts, H, D)."""
        return x.unflatten(-1, (parts, self.config.nhead, self.config.d_model // self.config.nhead))

    def _attended(self, y: Tensor, source: tuple[Tensor, ...]) -> Tensor:
        if not source:
            return y
        return torch.cat([attend(self._heads(self.query(y), 1)[:, :, 0].transpose(1, 2), *source), y], -1)
