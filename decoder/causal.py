"""CausalLM: the decoders that people have pretrained, of Llama's and GPT-2's forms, in blocks of our kernels.

A block is x + f(norm(x)) for attention and feed-forward. What differs between the families is in `CausalConfig`: layer
or RMS norm, learned or rotary positions, grouped heads, gates, windows, soft caps, norms of queries and keys.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tileformer.decoder.blocks import check_heads, through
from tileformer.decoder.causal_step import CausalStep
from tileformer.decoder.generation.cache import AttentionCache, KVCache
from tileformer.decoder.generation.static import Form
from tileformer.decoder.generation.step import Decoding, Parts
from tileformer.decoder.model import check_tokens, longest_document, packed_positions
from tileformer.decoder.nn.modules import Dropout, LayerNorm, RMSNorm
from tileformer.decoder.pretrained import Saved
from tileformer.decoder.sublayers import Sublayers
from tileformer.kernels import attention, bias_activation_dropout, rotary, rotary_tables

Turn = tuple[Tensor, Tensor] | None  # cos and sin of the positions; None: they are learned
ACTIVATIONS = ("relu", "gelu", "gelu_tanh", "silu")


@dataclass(frozen=True)
class CausalConfig:
    """What decides the shape of a `CausalLM`. The defaults are a Llama's. Raises ValueError.

    nhead_kv: heads of keys and values, which query heads share in groups; head_dim None: d_model / nhead. gated: the
    feed-forward is act(gate(x)) * up(x). rope_theta None: positions are learned, at most ``max_length``; rope_scaling:
    see `rotary_tables`, or {"rope_type": "linear", "factor": f}. qkv_bias, out_bias, bias: of the attention's two maps,
    and of the feed-forward's and a layer norm's. window: a query sees so many keys, itself among them, in each layer
    or in every other one (``alternating``, from the first). attention_scale None: head_dim ** -0.5. sandwich: a norm
    behind each sublayer, too. tied: the embedding is the output projection. pad_id None: padding is an id of its own
    behind the vocabulary, that no text has.
    """

    vocab: int
    d_model: int = 256
    nhead: int = 4
    num_layers: int = 4
    dim_feedforward: int = 704
    nhead_kv: int | None = None
    head_dim: int | None = None
    activation: str = "silu"
    gated: bool = True
    norm: str = "rms"
    norm_eps: float = 1e-6
    rope_theta: float | None = 10000.0
    rope_scaling: dict[str, Any] | None = None
    qkv_bias: bool = False
    out_bias: bool = False
    bias: bool = False
    qk_norm: bool = False
    window: int | None = None
    alternating: bool = False
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    attention_scale: float | None = None
    sandwich: bool = False
    embed_scale: float = 1.0
    tied: bool = True
    dropout: float = 0.0
    max_length: int = 1024
    pad_id: int | None = None
    bos_id: int = 1
    eos_id: int = 2
    family: str = "llama"

    def __post_init__(self) -> None:
        for name in ("vocab", "d_model", "num_layers", "dim_feedforward", "max_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.head_dim is None:
            check_heads(self.d_model, self.nhead)
        groups = self.nhead_kv or self.nhead
        if self.nhead < 1 or groups < 1 or self.nhead % groups:
            raise ValueError(f"nhead {self.nhead} must be a multiple of nhead_kv {groups}")
        if self.rope_theta is not None and self.size % 2:
            raise ValueError(f"a head of {self.size} cannot be rotated: its size must be even")
        for name, known in (("activation", ACTIVATIONS), ("norm", ("rms", "layer"))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")
        if self.rope_scaling is not None:
            _check_scaling(self)
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")
        if self.window is not None and self.window < 1:
            raise ValueError(f"window must be at least 1, got {self.window}")
        ids = {"bos_id": self.bos_id, "eos_id": self.eos_id, "pad_id": self.padding}
        for name, number in ids.items():
            if not 0 <= number < self.vocab + (name == "pad_id" and self.pad_id is None):
                raise ValueError(f"{name} {number} is outside the vocabulary of {self.vocab}")
        if self.padding in (self.bos_id, self.eos_id):
            raise ValueError(f"pad_id {self.padding} is also bos_id or eos_id: None gives padding an id of its own")

    @property
    def size(self) -> int:
        return self.head_dim or self.d_model // self.nhead

    @property
    def padding(self) -> int:
        return self.vocab if self.pad_id is None else self.pad_id

    @property
    def scale(self) -> float:
        return self.size**-0.5 if self.attention_scale is None else self.attention_scale

    def windows(self) -> list[int | None]:
        """The window of each layer."""
        return [self.window if not self.alternating or i % 2 == 0 else None for i in range(self.num_layers)]

    def general(self) -> CausalConfig:
        return self

    src_vocab = num_encoder_layers = 0  # no fields: it has no source


def _check_scaling(config: CausalConfig) -> None:
    """ValueError for a scaling without its numbers, before any position is asked for."""
    said = config.rope_scaling
    if config.rope_theta is None:
        raise ValueError(f"rope_scaling {said} needs rope_theta: learned positions are not scaled")
    try:
        tables(config, torch.zeros(1, device="cpu"))
    except (AttributeError, KeyError, TypeError, ZeroDivisionError):
        raise ValueError(f"rope_scaling {said}: expected a rope_type and its numbers, such as factor") from None


def tables(config: CausalConfig, positions: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin (..., size / 2) of positions."""
    scaling, theta = config.rope_scaling, config.rope_theta or 0.0
    if scaling and scaling.get("rope_type") == "linear":
        return rotary_tables(config.size, positions / scaling["factor"], theta)
    plain = not scaling or scaling.get("rope_type") == "default"
    return rotary_tables(config.size, positions, theta, None if plain else scaling)


class CausalAttention(nn.Module):
    """Grouped heads: one map to queries, keys and values, rotation, the kernel, one map back."""

    def __init__(self, config: CausalConfig, window: int | None) -> None:
        super().__init__()
        self.heads, self.heads_kv, self.size = config.nhead, config.nhead_kv or config.nhead, config.size
        self.options: dict[str, Any] = {"scale": config.scale, "softcap": config.attention_softcap or 0.0}
        self.window = window
        self.qkv = nn.Linear(config.d_model, (self.heads + 2 * self.heads_kv) * self.size, bias=config.qkv_bias)
        self.out_proj = nn.Linear(self.heads * self.size, config.d_model, bias=config.out_bias)
        self.q_norm = RMSNorm(self.size, config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(self.size, config.norm_eps) if config.qk_norm else None

    def forward(
        self, x: Tensor, turn: tuple[Tensor, Tensor] | None, cache: AttentionCache | None = None, **packed: Any
    ) -> Tensor:
        """(B, T, C) of ``x`` (B, T, C); ``turn``: cos and sin of its positions."""
        heads = self.qkv(x).unflatten(-1, (-1, self.size)).transpose(1, 2)
        q, k, v = heads.split((self.heads, self.heads_kv, self.heads_kv), 1)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if turn is not None:
            q, k = rotary(q, *turn), rotary(k, *turn)
        options: dict[str, Any] = {"causal": True, **packed, **self.options}
        if cache is not None:
            k, v = cache.store(k, v)
            options |= cache.reach(q.shape[2], aligned=self.window is not None)
        if self.window is not None:
            options["window"] = (self.window - 1, 0)
        return self.out_proj(attention(q, k, v, **options).transpose(1, 2).flatten(2))


class CausalBlock(nn.Module):
    """One layer; its names are those of our other blocks, ``linear1`` is gate and up in one map."""

    norm_first, lean = True, False

    def __init__(self, config: CausalConfig, window: int | None) -> None:
        super().__init__()
        C, width = config.d_model, config.dim_feedforward * (1 + config.gated)
        self.self_attn = CausalAttention(config, window)
        self.linear1 = nn.Linear(C, width, bias=config.bias)
        self.linear2 = nn.Linear(config.dim_feedforward, C, bias=config.bias)
        self.norm1, self.norm2 = _norm(config), _norm(config)
        self.norm3 = _norm(config) if config.sandwich else None
        self.norm4 = _norm(config) if config.sandwich else None
        self.dropout1, self.dropout2 = Dropout(config.dropout), Dropout(config.dropout)
        self.activation, self.gated = config.activation, config.gated

    def forward(self, x: Tensor, turn: Turn, cache: AttentionCache | None = None, **packed: Any) -> Tensor:
        """(B, T, C) of ``x`` (B, T, C); ``turn``, ``cache`` and ``packed`` as of `CausalAttention`."""
        return self.between(x, None, None, turn=turn, cache=cache, **packed)[0]

    def between(
        self, x: Tensor, h: Tensor | None, following: nn.Module | None, memory: None = None, *, turn: Turn,
        cache: AttentionCache | None = None, **packed: Any,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """``forward`` of a block whose norm1(x) is ``h``: following(y), and y, what it returns. See `through`."""
        parts = Sublayers(self, x, 2)
        h = self.self_attn(self.norm1(x) if h is None else h, turn, cache, **packed)
        h = h if self.norm3 is None else self.norm3(h)
        h, x = parts.end(h, None, x, self.dropout1, self.norm2)
        h = self.linear1(h)
        gate, up = h.chunk(2, -1) if self.gated else (h, None)
        h = bias_activation_dropout(gate, self.activation, up=up)
        if self.norm4 is None:
            return parts.end(h, self.linear2, x, self.dropout2, following)
        return parts.end(self.norm4(self.linear2(h)), None, x, self.dropout2, following)


def _norm(config: CausalConfig) -> nn.Module:
    if config.norm == "layer":
        return LayerNorm(config.d_model, config.norm_eps, bias=config.bias)
    return RMSNorm(config.d_model, config.norm_eps)


KNOWN = frozenset((CausalBlock, CausalAttention, RMSNorm, LayerNorm, Dropout, nn.Linear, nn.Embedding, nn.ModuleList))


class CausalLM(Decoding, Saved, nn.Module):
    """Tokens in, logits of the next token out, as a `DecoderLM`: a Llama, Mistral, Qwen, Gemma 2 or GPT-2.

    Example:
        >>> model = CausalLM(CausalConfig(vocab=50, d_model=32, nhead=4, nhead_kv=2, num_layers=2, dim_feedforward=64))
        >>> model(torch.tensor([[1, 3, 4]])).shape
        torch.Size([1, 3, 50])
    """

    configs = (CausalConfig,)
    conditioned = False
    known_modules = KNOWN

    def __init__(self, config: CausalConfig) -> None:
        super().__init__()
        self.config, self.max_length, self.num_layers = config, config.max_length, config.num_layers
        self.pad_id, self.bos_id, self.eos_id = config.padding, config.bos_id, config.eos_id
        self.embedding = nn.Embedding(config.vocab + (config.pad_id is None), config.d_model)
        self.position = None if config.rope_theta is not None else nn.Embedding(config.max_length, config.d_model)
        self.layers = nn.ModuleList(CausalBlock(config, window) for window in config.windows())
        self.norm, self.dropout = _norm(config), Dropout(config.dropout)
        self.output = None if config.tied else nn.Linear(config.d_model, len(self.embedding.weight), bias=False)
        for parameter in self.parameters():
            if parameter.dim() > 1:  # GPT-2's and Llama's
                nn.init.normal_(parameter, std=0.02)
        with torch.no_grad():
            for table in self._tables():
                table[config.vocab :].zero_()

    def _tables(self) -> list[Tensor]:
        return [self.embedding.weight] if self.output is None else [self.embedding.weight, self.output.weight]

    @property
    def head(self) -> Tensor:
        return self._tables()[-1][: self.config.vocab]

    def forward(self, tokens: Tensor, *, cu_seqlens: Tensor | None = None, cache: KVCache | None = None) -> Tensor:
        """Logits (B, T, V) for the token after each of ``tokens`` (B, T) int64; ``cu_seqlens`` and ``cache`` as of
        `DecoderLM`. Raises TypeError or ValueError on a dtype, rank or length that does not fit."""
        return self._logits(self.hidden(tokens, cu_seqlens=cu_seqlens, cache=cache), self.head)

    def _logits(self, x: Tensor, head: Tensor) -> Tensor:
        logits, cap = F.linear(x, head), self.config.logit_softcap
        return logits if cap is None else torch.tanh(logits / cap) * cap

    def hidden(self, tokens: Tensor, *, cu_seqlens: Tensor | None = None, cache: KVCache | None = None) -> Tensor:
        return self.states(tokens, cu_seqlens=cu_seqlens, cache=cache, keep=False)[-1]

    def states(
        self, tokens: Tensor, *, cu_seqlens: Tensor | None = None, cache: KVCache | None = None, keep: bool = True
    ) -> list[Tensor]:
        """What the embedding and then each layer give, the last one after the final norm: num_layers + 1 of
        (B, T, C); not ``keep``: the last alone, and the memory of the others is free as soon as they are read."""
        check_tokens(tokens, "tokens")
        T, packed = tokens.shape[1], {}
        if cache is not None and len(cache.layers) != self.num_layers:
            raise ValueError(f"the cache has {len(cache.layers)} layers, this model {self.num_layers}")
        longest = longest_document(tokens, cu_seqlens, cache, self.max_length)
        if cu_seqlens is not None:
            positions = packed_positions(T, cu_seqlens)
            packed = dict(cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens, max_seqlen_q=longest, max_seqlen_k=longest)
        elif cache is not None and cache.row_lengths is not None:
            positions = cache.positions(T)
        else:
            start = 0 if cache is None else cache.length
            positions = torch.arange(start, start + T, device=tokens.device)
        x = self.embedding(tokens) * self.config.embed_scale
        turn = None
        if self.position is not None:
            x = x + self.position(positions)
        else:
            turn = tables(self.config, positions)
        caches = None if cache is None else [own.self_attn for own in cache.layers]
        states = through(self.layers, self.norm, self.dropout(x), None, caches, keep, turn=turn, **packed)
        if cache is not None:
            cache.advance(T)
        return states

    def read(self, tokens: Tensor, cache: KVCache | None = None) -> Tensor:
        """As `forward`, with a column for padding where that has an id of its own."""
        return self._logits(self.hidden(tokens, cache=cache), self._tables()[-1])

    def parts(self) -> Parts:
        modules: tuple[Any, ...] = (self.layers, self.norm, self.embedding, self.position, self.output, self.dropout)
        return Parts([*self.layers], self.norm, modules, self.embedding, self.position, self.config.embed_scale)

    def packed(self, parts: Parts, memory: int) -> CausalStep:
        config, positions = self.config, torch.arange(self.max_length, device=self.embedding.weight.device)
        turn = None if self.position is not None else tables(config, positions)
        groups = config.nhead // (config.nhead_kv or config.nhead)
        windows = config.windows() if config.window is not None else ()
        form = Form(groups, config.scale, config.attention_softcap or 0.0, tuple(windows))
        return CausalStep(parts, memory, form, turn, self._tables()[-1], config.logit_softcap)

    def inputs_of(self, source: Tensor | None) -> tuple[Tensor, ...]:
        if source is not None:
            raise ValueError("a CausalLM has no source: its rows begin with their prompts")
        return ()
