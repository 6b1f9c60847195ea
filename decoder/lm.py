"""DecoderLM: a language model of one stack of layers (embedding, learned positions, tied output), padded or packed."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tileformer.decoder.cache import KVCache
from tileformer.decoder.nn.attention import check_config
from tileformer.decoder.nn.layer import TransformerEncoderLayer
from tileformer.decoder.nn.modules import Dropout, LayerNorm


@dataclass(frozen=True)
class DecoderLMConfig:
    """What decides the shape of a ``DecoderLM``; ``share_layers`` uses one layer's weights ``num_layers`` times (ALBERT,
    arXiv:1909.11942). Raises ValueError."""

    vocab: int
    d_model: int = 128
    nhead: int = 4
    num_layers: int = 3
    dim_feedforward: int = 512
    dropout: float = 0.1
    activation: str = "gelu"
    norm_first: bool = True
    max_length: int = 128
    share_layers: bool = False
    pad_id: int = 0
    bos_id: int = 1
    eos_id: int = 2

    def __post_init__(self) -> None:
        check_config(self, ("vocab", "num_layers", "dim_feedforward", "max_length"))
        ids = (self.pad_id, self.bos_id, self.eos_id)
        if len(set(ids)) < 3 or not all(0 <= i < self.vocab for i in ids):
            raise ValueError(
                f"pad_id, bos_id and eos_id must be three ids inside the vocabulary, got {ids} for vocab {self.vocab}"
            )


class DecoderLM(nn.Module):
    """Tokens in, logits of the next token out; no token sees a later one.

    Tokens come padded, (B, T) with ``pad_id`` behind each row: no mask is needed, because a causal row never sees what
    stands behind it. Or packed, (1, total) with ``cu_seqlens``: documents behind each other, without padding, each with
    its own positions and its own attention. Both give a document the same logits.

    Embeddings start as those of ``Seq2Seq``; a layer is ``TransformerEncoderLayer`` under a causal mask.
    """

    def __init__(self, config: DecoderLMConfig) -> None:
        super().__init__()
        self.config = config
        C = config.d_model
        self.embedding = nn.Embedding(config.vocab, C)
        self.position = nn.Embedding(config.max_length, C)
        self.dropout = Dropout(config.dropout)
        shape = (C, config.nhead, config.dim_feedforward, config.dropout, config.activation)
        self.layers = nn.ModuleList(
            TransformerEncoderLayer(*shape, batch_first=True, norm_first=config.norm_first)
            for _ in range(1 if config.share_layers else config.num_layers)
        )
        self.norm = LayerNorm(C)
        for embedding in (self.embedding, self.position):
            nn.init.normal_(embedding.weight, std=C**-0.5)
        for parameter in self.layers.parameters():
            if parameter.dim() > 1:  # as nn.Transformer starts its layers
                nn.init.xavier_uniform_(parameter)

    def forward(self, tokens: Tensor, *, cu_seqlens: Tensor | None = None, cache: KVCache | None = None) -> Tensor:
        """Logits (B, T, V) for the token after each of ``tokens`` (B, T) int64.

        cu_seqlens: int32 or int64 (N + 1,), ascending from 0: document n is ``tokens[0, cu_seqlens[n]:cu_seqlens[n +
        1]]``. cache: tokens are only those it has not seen, equally many in each row.
        Raises TypeError or ValueError on a dtype, rank or length that does not fit.
        """
        return F.linear(self.states(tokens, cu_seqlens=cu_seqlens, cache=cache)[-1], self.embedding.weight)

    def states(self, tokens: Tensor, *, cu_seqlens: Tensor | None = None, cache: KVCache | None = None) -> list[Tensor]:
        """What the embedding and then each layer give, the last one after the final norm: num_layers + 1 of (B, T, C)."""
        longest = self._check(tokens, cu_seqlens, cache)
        T, options = tokens.shape[1], {}
        if cu_seqlens is not None:
            places = self.position(self._places(T, cu_seqlens))
            options = {"is_causal": True, "cu_seqlens": cu_seqlens, "max_seqlen": longest}
        else:
            start = 0 if cache is None else cache.length
            places = self.position.weight[start : start + T]
        if cu_seqlens is None and cache is None:
            # torch's contract wants the mask beside the promise; the kernel only reads the promise.
            causal = torch.ones(T, T, dtype=torch.bool, device=tokens.device).triu(1)
            options = {"is_causal": True, "src_mask": causal}
        scale = self.config.d_model**0.5
        words = self.embedding(tokens)
        wide = torch.promote_types(words.dtype, torch.float32)  # a sum of two halves is rounded once
        states = [self.dropout(torch.add(places.to(wide) * scale, words, alpha=scale).to(words.dtype))]
        for i in range(self.config.num_layers):
            layer = self.layers[0 if self.config.share_layers else i]
            if cache is not None:
                options = {"cache": cache.layers[i].self_attn}
            states.append(layer(states[-1], **options))
        return [*states[:-1], self.norm(states[-1])]

    @staticmethod
    def _places(T: int, cu_seqlens: Tensor) -> Tensor:
        """Position (T,) of each packed token in its document; 0 for tokens past the last one, however many."""
        at = torch.arange(T, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
        places = at - cu_seqlens[torch.searchsorted(cu_seqlens, at, right=True) - 1]
        return places.masked_fill(at >= cu_seqlens[-1], 0)

    def _check(self, tokens: Tensor, cu_seqlens: Tensor | None, cache: KVCache | None) -> int:
        """A bound of the documents' lengths."""
        if tokens.dtype != torch.int64:
            raise TypeError(f"tokens must be token ids (int64), got {tokens.dtype}")
        if tokens.dim() != 2:
            raise ValueError(f"tokens must be (B, T), got {tuple(tokens.shape)}")
        if cache is not None and len(cache.layers) != self.config.num_layers:
            raise ValueError(f"the cache has {len(cache.layers)} layers, this model {self.config.num_layers}")
        if cache is not None and not all(isinstance(layer, TransformerEncoderLayer) for layer in self.layers):
            raise TypeError("a layer that is not tileformer's takes no cache: use_cache=False, or `convert` the model")
        if cu_seqlens is None:
            longest = tokens.shape[1] + (0 if cache is None else cache.length)
        elif cache is not None or tokens.shape[0] != 1 or cu_seqlens.dim() != 1 or len(cu_seqlens) < 2:
            raise ValueError(
                "packed tokens are (1, total) with cu_seqlens (N + 1,) and no cache, "
                f"got {tuple(tokens.shape)} and {tuple(cu_seqlens.shape)}"
            )
        elif cu_seqlens.device.type == "cpu":
            longest = int(cu_seqlens.diff().max())
        else:  # a GPU is not waited for: there an index outside the positions stops the program
            longest = min(tokens.shape[1], self.config.max_length)
        if longest > self.config.max_length:
            raise ValueError(
                f"tokens reach {longest} in one document, this model was built for max_length "
                f"{self.config.max_length}: shorten it or build a longer model"
            )
        return longest
