"""Seq2Seq: a whole encoder-decoder (embeddings, learned positions, Transformer, tied output) over our layers."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tileformer.decoder.cache import KVCache
from tileformer.decoder.nn.attention import check_config
from tileformer.decoder.nn.modules import Dropout
from tileformer.decoder.nn.transformer import Transformer, TransformerDecoder


@dataclass(frozen=True)
class Seq2SeqConfig:
    """What decides the shape of a ``Seq2Seq``; ``max_length`` bounds source and target. Raises ValueError."""

    src_vocab: int
    tgt_vocab: int
    d_model: int = 128
    nhead: int = 4
    num_encoder_layers: int = 3
    num_decoder_layers: int = 3
    dim_feedforward: int = 512
    dropout: float = 0.1
    activation: str = "gelu"
    norm_first: bool = True
    max_length: int = 64
    pad_id: int = 0
    bos_id: int = 1
    eos_id: int = 2

    def __post_init__(self) -> None:
        sizes = ("src_vocab", "tgt_vocab", "num_encoder_layers", "num_decoder_layers", "dim_feedforward", "max_length")
        check_config(self, sizes)
        ids = (self.pad_id, self.bos_id, self.eos_id)
        if len(set(ids)) < 3 or not all(0 <= i < self.tgt_vocab for i in ids) or self.pad_id >= self.src_vocab:
            raise ValueError(
                f"pad_id, bos_id and eos_id must be three ids inside the vocabularies, got {ids} "
                f"for src_vocab {self.src_vocab} and tgt_vocab {self.tgt_vocab}"
            )


class Seq2Seq(nn.Module):
    """Source tokens and target tokens in, logits of the next target token out.

    Tokens and positions start at a standard deviation of d_model**-0.5 and enter the model scaled by sqrt(d_model)
    (Vaswani et al. 2017, section 3.4), so inputs and logits both start near unit size although the target embedding is
    also the output projection. ``transformer`` may be exchanged for any module with ``nn.Transformer``'s children.
    """

    def __init__(self, config: Seq2SeqConfig) -> None:
        super().__init__()
        self.config = config
        C = config.d_model
        self.src_embedding = nn.Embedding(config.src_vocab, C)
        self.tgt_embedding = nn.Embedding(config.tgt_vocab, C)
        self.src_position = nn.Embedding(config.max_length, C)
        self.tgt_position = nn.Embedding(config.max_length, C)
        self.dropout = Dropout(config.dropout)
        self.transformer = Transformer(
            C,
            config.nhead,
            config.num_encoder_layers,
            config.num_decoder_layers,
            config.dim_feedforward,
            config.dropout,
            config.activation,
            batch_first=True,
            norm_first=config.norm_first,
        )
        for embedding in (self.src_embedding, self.tgt_embedding, self.src_position, self.tgt_position):
            nn.init.normal_(embedding.weight, std=C**-0.5)

    def forward(self, src: Tensor, tgt: Tensor) -> Tensor:
        """Logits (B, T_t, V) for the token after each of ``tgt`` (B, T_t), given ``src`` (B, T_s), both int64.

        Both are padded with ``pad_id`` behind their tokens. Padded source positions are masked wherever they would be
        keys; the target needs no such mask, because a causal row never sees what stands behind it.
        Raises TypeError or ValueError on a dtype, rank, length or batch that does not fit.
        """
        self._check(tgt, "tgt", 0)
        memory, src_padding = self.encode(src)
        return self.decode(tgt, memory, src_padding)

    def encode(self, src: Tensor) -> tuple[Tensor, Tensor]:
        """Memory (B, T_s, C) of ``src`` (B, T_s) and its padding mask (B, T_s), True = padding."""
        self._check(src, "src", 0)
        src_padding = src == self.config.pad_id
        x = self._embed(src, self.src_embedding, self.src_position, 0)
        return self.transformer.encoder(x, src_key_padding_mask=src_padding), src_padding

    def states(self, src: Tensor) -> list[Tensor]:
        """What the source's embedding and then each encoder layer give, the last one after the final norm.

        num_encoder_layers + 1 of (B, T_s, C); the last is the memory of ``encode``.
        """
        self._check(src, "src", 0)
        states = [self._embed(src, self.src_embedding, self.src_position, 0)]
        encoder = self.transformer.encoder
        for layer in encoder.layers:
            states.append(layer(states[-1], src_key_padding_mask=src == self.config.pad_id))
        return states if encoder.norm is None else [*states[:-1], encoder.norm(states[-1])]

    def decode(self, tgt: Tensor, memory: Tensor, src_padding: Tensor, cache: KVCache | None = None) -> Tensor:
        """Logits (B, T_t, V) for the token after each of ``tgt`` (B, T_t); with ``cache``, tgt is only its new part."""
        start = 0 if cache is None else cache.length
        self._check(tgt, "tgt", start)
        if tgt.shape[0] != memory.shape[0]:
            raise ValueError(f"tgt has {tgt.shape[0]} rows, its source {memory.shape[0]}")
        x = self._embed(tgt, self.tgt_embedding, self.tgt_position, start)
        if cache is None:
            T = tgt.shape[1]
            # torch's contract wants the mask beside the promise; the kernel only reads the promise.
            causal = torch.ones(T, T, dtype=torch.bool, device=tgt.device).triu(1)
            x = self.transformer.decoder(
                x, memory, tgt_mask=causal, memory_key_padding_mask=src_padding, tgt_is_causal=True
            )
        elif not isinstance(self.transformer.decoder, TransformerDecoder):
            kind = type(self.transformer.decoder)
            raise TypeError(
                f"{kind.__module__}.{kind.__name__} takes no cache: use_cache=False, or `convert` the model"
            )
        else:
            x = self.transformer.decoder(x, memory, memory_key_padding_mask=src_padding, cache=cache)
        return F.linear(x, self.tgt_embedding.weight)

    def _embed(self, tokens: Tensor, embedding: nn.Embedding, position: nn.Embedding, start: int) -> Tensor:
        """sqrt(C) * (token + position), (B, T, C), then dropout."""
        scale = self.config.d_model**0.5
        places, words = position.weight[start : start + tokens.shape[1]], embedding(tokens)
        wide = torch.promote_types(words.dtype, torch.float32)  # a sum of two halves is rounded once
        return self.dropout(torch.add(places.to(wide) * scale, words, alpha=scale).to(words.dtype))

    def _check(self, tokens: Tensor, name: str, start: int) -> None:
        if tokens.dtype != torch.int64:
            raise TypeError(f"{name} must hold token ids (int64), got {tokens.dtype}")
        if tokens.dim() != 2:
            raise ValueError(f"{name} must be (B, T), got {tuple(tokens.shape)}")
        if start + tokens.shape[1] > self.config.max_length:
            raise ValueError(
                f"{name} reaches {start + tokens.shape[1]} tokens, this model was built for max_length "
                f"{self.config.max_length}: shorten it or build a longer model"
            )
