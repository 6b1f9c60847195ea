"""ModelConfig and the models that follow from it: DecoderLM (one causal stack), Seq2Seq (encoder and decoder)."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tileformer.decoder.blocks import Attention, Block, Stack, check_heads, through
from tileformer.decoder.generation.cache import KVCache
from tileformer.decoder.generation.step import Decoding, Parts
from tileformer.decoder.nn.attention import MultiheadAttention
from tileformer.decoder.nn.layer import TransformerDecoderLayer, TransformerEncoderLayer
from tileformer.decoder.nn.modules import Dropout, LayerNorm
from tileformer.decoder.nn.transformer import TransformerDecoder, TransformerEncoder
from tileformer.decoder.pretrained import Saved


@dataclass(frozen=True)
class DecoderLMConfig:
    """What decides the shape of a ``DecoderLM``; ``share_layers`` uses one layer's weights ``num_layers`` times
    (ALBERT, arXiv:1909.11942). Raises ValueError."""

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
        _check_config(self, ("vocab", "num_layers"), vocab=self.vocab)

    def general(self) -> "ModelConfig":
        return ModelConfig(**vars(self))


@dataclass(frozen=True)
class ModelConfig(DecoderLMConfig):
    """What decides the shape of a model: of a ``DecoderLM``, and with a source's two fields of a ``Seq2Seq``, whose
    source and target ``max_length`` bounds. Raises ValueError."""

    src_vocab: int = 0
    num_encoder_layers: int = 0

    def general(self) -> "ModelConfig":
        return self


@dataclass(frozen=True)
class Seq2SeqConfig:
    """The `ModelConfig` of a ``Seq2Seq`` by other names. Raises ValueError."""

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
        sizes = ("src_vocab", "tgt_vocab", "num_encoder_layers", "num_decoder_layers")
        _check_config(self, sizes, src_vocab=self.src_vocab, tgt_vocab=self.tgt_vocab)

    def general(self) -> ModelConfig:
        fields = dict(vars(self))
        return ModelConfig(fields.pop("tgt_vocab"), num_layers=fields.pop("num_decoder_layers"), **fields)


def _check_config(config: Any, counts: tuple[str, ...], **vocabularies: int) -> None:
    for name in (*counts, "dim_feedforward", "max_length"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(config, name)}")
    check_heads(config.d_model, config.nhead)
    if not 0.0 <= config.dropout < 1.0:
        raise ValueError(f"dropout must be in [0, 1), got {config.dropout}")
    if config.activation not in ("relu", "gelu"):
        raise ValueError(f"activation must be 'relu' or 'gelu', got {config.activation!r}")
    ids, (*source, target) = (config.pad_id, config.bos_id, config.eos_id), vocabularies.values()
    if len(set(ids)) < 3 or not all(0 <= i < target for i in ids) or any(config.pad_id >= size for size in source):
        sizes = " and ".join(f"{name} {size}" for name, size in vocabularies.items())
        raise ValueError(
            f"pad_id, bos_id and eos_id must be three ids inside the {'vocabularies' if source else 'vocabulary'}, "
            f"got {ids} for {sizes}"
        )


_OUT_PROJECTION = nn.modules.linear.NonDynamicallyQuantizableLinear
KNOWN = frozenset(
    (Attention, Block, MultiheadAttention, TransformerDecoderLayer, TransformerEncoderLayer, LayerNorm, Dropout)
    + (Stack, TransformerDecoder, TransformerEncoder, nn.ModuleList)
    + (nn.LayerNorm, nn.Dropout, nn.Linear, nn.Embedding, _OUT_PROJECTION)
)


class Model(Decoding, Saved, nn.Module):
    """What both models share: their ids and sizes, and how tokens enter.

    Tokens and positions start at a standard deviation of d_model**-0.5 and enter the model scaled by sqrt(d_model)
    (Vaswani et al. 2017, section 3.4), so inputs and logits both start near unit size although the target embedding is
    also the output projection.
    """

    dropout: Dropout
    conditioned = False  # whether `generate` is handed a source
    head: Any  # (V, C), the target embedding
    hidden: Any  # of forward's arguments: (B, T, C), of which forward's logits are F.linear(hidden, head)
    known_modules = KNOWN

    def __init__(self, config: DecoderLMConfig | Seq2SeqConfig) -> None:
        super().__init__()
        self.config: Any = config
        general = config.general()
        if bool(general.src_vocab and general.num_encoder_layers) != self.conditioned:
            raise ValueError(
                f"a {type(self).__name__} is built {'with' if self.conditioned else 'without'} a source, got src_vocab "
                f"{general.src_vocab} and num_encoder_layers {general.num_encoder_layers}"
            )
        self.pad_id, self.bos_id, self.eos_id = general.pad_id, general.bos_id, general.eos_id
        self.max_length, self.num_layers = general.max_length, general.num_layers

    def _block(self, config: ModelConfig, cross: bool = False) -> Block:
        shape = (config.d_model, config.nhead, config.dim_feedforward, config.dropout, config.activation)
        return Block(*shape, norm_first=config.norm_first, cross=cross)

    def _start(self, *parts: nn.Module) -> None:
        """Draw the first weights of each part, in this order: of embeddings and, as nn.Transformer does, of layers."""
        for part in parts:
            for parameter in part.parameters():
                if isinstance(part, nn.Embedding):
                    nn.init.normal_(parameter, std=self.config.d_model**-0.5)
                elif parameter.dim() > 1:
                    nn.init.xavier_uniform_(parameter)

    def _embed(self, words: Tensor, positions: Tensor) -> Tensor:
        """sqrt(C) * (word + position), (B, T, C), then dropout."""
        scale = self.config.d_model**0.5
        wide = torch.promote_types(words.dtype, torch.float32)  # a sum of two halves is rounded once
        return self.dropout(torch.add(positions.to(wide) * scale, words, alpha=scale).to(words.dtype))


def check_tokens(tokens: Tensor, name: str) -> None:
    """TypeError or ValueError for what is no (B, T) int64."""
    if tokens.dtype != torch.int64:
        raise TypeError(f"{name} must hold token ids (int64), got {tokens.dtype}")
    if tokens.dim() != 2:
        raise ValueError(f"{name} must be (B, T), got {tuple(tokens.shape)}")


def longest_document(tokens: Tensor, cu_seqlens: Tensor | None, cache: KVCache | None, max_length: int) -> int:
    """A bound of the lengths of what ``tokens`` (B, T) are, with what a cache has read. ValueError beyond max_length,
    or for packed tokens of another form."""
    if cu_seqlens is None:
        longest = _end(tokens, cache)
    elif cache is not None or tokens.shape[0] != 1 or cu_seqlens.dim() != 1 or len(cu_seqlens) < 2:
        raise ValueError(
            "packed tokens are (1, total) with cu_seqlens (N + 1,) and no cache, "
            f"got {tuple(tokens.shape)} and {tuple(cu_seqlens.shape)}"
        )
    elif cu_seqlens.device.type == "cpu":
        longest = int(cu_seqlens.diff().max())
    else:  # a GPU is not waited for: there an index outside the positions stops the program
        longest = min(tokens.shape[1], max_length)
    if longest > max_length:
        raise ValueError(
            f"tokens reach {longest} in one document, this model was built for max_length "
            f"{max_length}: shorten it or build a longer model"
        )
    return longest


def packed_positions(T: int, cu_seqlens: Tensor) -> Tensor:
    """Position (T,) of each packed token in its document; 0 for tokens past the last one, however many."""
    index = torch.arange(T, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    positions = index - cu_seqlens[torch.searchsorted(cu_seqlens, index, right=True) - 1]
    return positions.masked_fill(index >= cu_seqlens[-1], 0)


def _end(tokens: Tensor, cache: KVCache | None) -> int:
    """How many tokens a row has at the most, with those that the cache has read."""
    return tokens.shape[1] if cache is None else cache.layers[0].self_attn.keys_after(*tokens.shape)


def _positions(embedding: nn.Embedding, T: int, cache: KVCache | None) -> Tensor:
    """The embedding of the next T positions, (T, C), or (B, T, C) where the rows are not equally long."""
    if cache is not None and cache.row_lengths is not None:
        return embedding(cache.positions(T))
    start = 0 if cache is None else cache.length
    return embedding.weight[start : start + T]


class DecoderLM(Model):
    """Tokens in, logits of the next token out; no token sees a later one.

    Tokens come padded, (B, T) with ``pad_id`` behind each row: no mask is needed, because a causal row never sees what
    stands behind it. Or packed, (1, total) with ``cu_seqlens``: documents behind each other, without padding, each with
    its own positions and its own attention. Both give a document the same logits.

        model = DecoderLM(DecoderLMConfig(vocab=100))
        logits = model(torch.tensor([[1, 7, 9]]))           # (1, 3, 100)

    Example:
        >>> model = DecoderLM(DecoderLMConfig(vocab=20, d_model=32, nhead=4))
        >>> model(torch.tensor([[1, 3, 4]])).shape
        torch.Size([1, 3, 20])
    """

    configs = (DecoderLMConfig, ModelConfig)

    def __init__(self, config: DecoderLMConfig) -> None:
        super().__init__(config)
        self.embedding = nn.Embedding(config.vocab, config.d_model)
        self.position = nn.Embedding(config.max_length, config.d_model)
        self.dropout = Dropout(config.dropout)
        count = 1 if config.share_layers else config.num_layers
        self.layers = nn.ModuleList(self._block(config.general()) for _ in range(count))
        self.norm = LayerNorm(config.d_model)
        self._start(self.embedding, self.position, self.layers)

    def forward(self, tokens: Tensor, *, cu_seqlens: Tensor | None = None, cache: KVCache | None = None) -> Tensor:
        """Logits (B, T, V) for the token after each of ``tokens`` (B, T) int64.

        cu_seqlens: int32 or int64 (N + 1,), ascending from 0: document n is ``tokens[0, cu_seqlens[n]:cu_seqlens[n +
        1]]``. cache: tokens are only those it has not seen, equally many in each row.
        Raises TypeError or ValueError on a dtype, rank or length that does not fit.
        """
        return F.linear(self.hidden(tokens, cu_seqlens=cu_seqlens, cache=cache), self.head)

    @property
    def head(self) -> Tensor:
        return self.embedding.weight

    def hidden(self, tokens: Tensor, *, cu_seqlens: Tensor | None = None, cache: KVCache | None = None) -> Tensor:
        return self.states(tokens, cu_seqlens=cu_seqlens, cache=cache)[-1]

    def states(self, tokens: Tensor, *, cu_seqlens: Tensor | None = None, cache: KVCache | None = None) -> list[Tensor]:
        """What the embedding and then each layer give, the last one after the final norm: num_layers + 1 of
        (B, T, C)."""
        longest, T = self._check(tokens, cu_seqlens, cache), tokens.shape[1]
        options: dict[str, Any] = {"causal": True}
        if cu_seqlens is None:
            positions = _positions(self.position, T, cache)
        else:
            positions = self.position(packed_positions(T, cu_seqlens))
            options |= {"cu_seqlens": cu_seqlens, "max_seqlen": longest}
        if not isinstance(self.layers[0], Block):
            options = self._torchs_options(T, options, cache, tokens.device)
        layers, caches = [self.layers[i if len(self.layers) > 1 else 0] for i in range(self.num_layers)], None
        if cache is not None:
            caches = cache.layers if isinstance(layers[0], Block) else [own.self_attn for own in cache.layers]
        states = through(layers, self.norm, self._embed(self.embedding(tokens), positions), None, caches, **options)
        if cache is not None:
            cache.advance(T)
        return states

    def read(self, tokens: Tensor, cache: KVCache | None = None) -> Tensor:
        return self(tokens, cache=cache)

    def parts(self) -> Parts:
        layers = [self.layers[i if len(self.layers) > 1 else 0] for i in range(self.num_layers)]
        modules = (self.layers, self.norm, self.embedding, self.position, self.dropout)
        return Parts(layers, self.norm, modules, self.embedding, self.position, self.config.d_model**0.5)

    def inputs_of(self, source: Tensor | None) -> tuple[Tensor, ...]:
        if source is not None:
            raise ValueError("a DecoderLM has no source: its rows begin with their prompts")
        return ()

    def _torchs_options(
        self, T: int, options: dict[str, Any], cache: KVCache | None, device: torch.device
    ) -> dict[str, Any]:
        """Options of layers that are torch.nn's (after `revert`) or their twins."""
        if cache is not None:
            return {}
        if options.pop("causal") and "cu_seqlens" not in options:  # torch wants the mask beside the promise
            options["src_mask"] = torch.ones(T, T, dtype=torch.bool, device=device).triu(1)
        return options | {"is_causal": True}

    def _check(self, tokens: Tensor, cu_seqlens: Tensor | None, cache: KVCache | None) -> int:
        """A bound of the documents' lengths."""
        check_tokens(tokens, "tokens")
        if cache is not None and len(cache.layers) != self.num_layers:
            raise ValueError(f"the cache has {len(cache.layers)} layers, this model {self.num_layers}")
        if cache is not None and not all(isinstance(layer, Block | TransformerEncoderLayer) for layer in self.layers):
            raise TypeError("a layer that is not tileformer's takes no cache: use_cache=False, or `convert` the model")
        return longest_document(tokens, cu_seqlens, cache, self.max_length)


class Seq2Seq(Model):
    """Source tokens and target tokens in, logits of the next target token out.

    ``transformer`` may be exchanged for any module with ``nn.Transformer``'s children, ``encoder`` and ``decoder``.

        model = Seq2Seq(Seq2SeqConfig(src_vocab=30, tgt_vocab=40))
        logits = model(torch.tensor([[3, 4, 5]]), torch.tensor([[1, 7]]))     # (1, 2, 40)

    Example:
        >>> model = Seq2Seq(Seq2SeqConfig(src_vocab=20, tgt_vocab=30, d_model=32, nhead=4))
        >>> model(torch.tensor([[3, 4, 5]]), torch.tensor([[1, 6]])).shape
        torch.Size([1, 2, 30])
    """

    configs = (Seq2SeqConfig, ModelConfig)
    conditioned = True

    def __init__(self, config: Seq2SeqConfig | ModelConfig) -> None:
        super().__init__(config)
        general = config.general()
        C = general.d_model
        self.src_embedding = nn.Embedding(general.src_vocab, C)
        self.tgt_embedding = nn.Embedding(general.vocab, C)
        self.src_position = nn.Embedding(general.max_length, C)
        self.tgt_position = nn.Embedding(general.max_length, C)
        self.dropout = Dropout(general.dropout)
        encoder = Stack(self._block(general), general.num_encoder_layers)
        decoder = Stack(self._block(general, cross=True), general.num_layers)
        self.transformer: Any = nn.ModuleDict({"encoder": encoder, "decoder": decoder})
        embeddings = (self.src_embedding, self.tgt_embedding, self.src_position, self.tgt_position)
        self._start(self.transformer, *embeddings)

    def forward(self, src: Tensor, tgt: Tensor) -> Tensor:
        """Logits (B, T_t, V) for the token after each of ``tgt`` (B, T_t), given ``src`` (B, T_s), both int64.

        Both are padded with ``pad_id`` behind their tokens. Padded source positions are masked wherever they would be
        keys; the target needs no such mask, because a causal row never sees what stands behind it.
        Raises TypeError or ValueError on a dtype, rank, length or batch that does not fit.
        """
        return F.linear(self.hidden(src, tgt), self.head)

    @property
    def head(self) -> Tensor:
        return self.tgt_embedding.weight

    def hidden(self, src: Tensor, tgt: Tensor) -> Tensor:
        self._check(tgt, "tgt", None)
        return self._decoded(tgt, *self.encode(src))

    def encode(self, src: Tensor) -> tuple[Tensor, Tensor]:
        """Memory (B, T_s, C) of ``src`` (B, T_s) and its padding mask (B, T_s), True = padding."""
        x, src_padding, encoder = self._embed_source(src), src == self.pad_id, self.transformer.encoder
        if isinstance(encoder, Stack):
            return encoder(x, key_mask=~src_padding), src_padding
        return encoder(x, src_key_padding_mask=src_padding), src_padding

    def states(self, src: Tensor) -> list[Tensor]:
        """What the source's embedding and then each encoder layer give, the last one after the final norm.

        num_encoder_layers + 1 of (B, T_s, C); the last is the memory of ``encode``.
        """
        states, padding, encoder = [self._embed_source(src)], src == self.pad_id, self.transformer.encoder
        if isinstance(encoder, Stack):
            return encoder.states(states[0], key_mask=~padding)
        for layer in encoder.layers:
            states.append(layer(states[-1], src_key_padding_mask=padding))
        return states if encoder.norm is None else [*states[:-1], encoder.norm(states[-1])]

    def decode(self, tgt: Tensor, memory: Tensor, src_padding: Tensor, cache: KVCache | None = None) -> Tensor:
        """Logits (B, T_t, V) for the token after each of ``tgt`` (B, T_t); with ``cache``, tgt is only its new part."""
        return F.linear(self._decoded(tgt, memory, src_padding, cache), self.head)

    def _decoded(self, tgt: Tensor, memory: Tensor, src_padding: Tensor, cache: KVCache | None = None) -> Tensor:
        self._check(tgt, "tgt", cache)
        if tgt.shape[0] != memory.shape[0]:
            raise ValueError(f"tgt has {tgt.shape[0]} rows, its source {memory.shape[0]}")
        T, decoder = tgt.shape[1], self.transformer.decoder
        x = self._embed(self.tgt_embedding(tgt), _positions(self.tgt_position, T, cache))
        if isinstance(decoder, Stack):
            x = decoder(x, memory, memory_mask=~src_padding, causal=True, cache=cache)
        elif cache is None:  # torch wants the mask beside the promise
            causal = torch.ones(T, T, dtype=torch.bool, device=tgt.device).triu(1)
            x = decoder(x, memory, tgt_mask=causal, memory_key_padding_mask=src_padding, tgt_is_causal=True)
        elif isinstance(decoder, TransformerDecoder):
            x = decoder(x, memory, memory_key_padding_mask=src_padding, cache=cache)
        else:
            kind = type(decoder)
            raise TypeError(
                f"{kind.__module__}.{kind.__name__} takes no cache: use_cache=False, or `convert` the model"
            )
        if cache is not None:
            cache.advance(T)
        return x

    def read(self, tgt: Tensor, memory: Tensor, src_padding: Tensor, cache: KVCache | None = None) -> Tensor:
        return self.decode(tgt, memory, src_padding, cache)

    def parts(self) -> Parts:
        encoder = self._side(self.transformer.encoder, self.src_embedding, self.src_position)
        return self._side(self.transformer.decoder, self.tgt_embedding, self.tgt_position, encoder)

    def _side(self, stack: Any, words: nn.Embedding, positions: nn.Embedding, encoder: Parts | None = None) -> Parts:
        modules = (stack, words, positions, self.dropout)
        layers, norm = list(getattr(stack, "layers", ())), getattr(stack, "norm", None)
        return Parts(layers, norm, modules, words, positions, self.config.d_model**0.5, encoder)

    def inputs_of(self, source: Tensor | None) -> tuple[Tensor, ...]:
        if source is None:
            raise ValueError("a Seq2Seq is conditioned on a source: start(tokens, source=...)")
        return self.encode(source)

    def _check_source(self, src: Tensor) -> None:
        self._check(src, "src", None)

    def _embed_source(self, src: Tensor) -> Tensor:
        self._check_source(src)
        return self._embed(self.src_embedding(src), _positions(self.src_position, src.shape[1], None))

    def _check(self, tokens: Tensor, name: str, cache: KVCache | None) -> None:
        check_tokens(tokens, name)
        if (end := _end(tokens, cache)) > self.max_length:
            raise ValueError(
                f"{name} reaches {end} tokens, this model was built for max_length "
                f"{self.max_length}: shorten it or build a longer model"
            )
