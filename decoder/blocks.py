"""Attention, Block and Stack: what our own models are made of; torch.nn's contracts are met in `decoder.nn`.

Names and order of the parameters are those of torch.nn's layers, so that weights fit both and `revert` gives torch's.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from tileformer.decoder.generation.cache import AttentionCache, KVCache, LayerCache
from tileformer.decoder.nn.modules import Dropout, LayerNorm, RMSNorm
from tileformer.decoder.sublayers import Sublayers, is_plain, split_heads, two_linears
from tileformer.kernels import attention


def check_heads(embed_dim: int, num_heads: int) -> None:
    """Raise ValueError where a model of this width cannot be split into this many heads."""
    if embed_dim <= 0 or num_heads <= 0 or embed_dim % num_heads:
        raise ValueError(
            f"a width of {embed_dim} cannot be split into {num_heads} heads: the number of heads must divide it"
        )


class Attention(nn.MultiheadAttention):
    """Attention of several heads: project, call the kernel, join. The parameters are torch.nn.MultiheadAttention's."""

    def forward(  # type: ignore[override]
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        need_weights: bool = False,
        *,
        causal: bool = False,
        key_mask: Tensor | None = None,
        cache: AttentionCache | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        project: bool = True,
        seed: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend from ``query`` (B, T_q, C) to ``key`` and ``value`` (B, T_k, C); ``key_mask`` (B, T_k), True = a key.

        With a ``cache`` that grows, key and value hold what it has not seen, and attention is causal. ``cu_seqlens``
        (N + 1,): the one row of a batch of 1 is N sequences behind each other. ``seed``: of its dropout. Returns the
        output (B, T_q, C), not ``project``: before the last linear map, and the weights (B, H, T_q, T_k), or None.
        """
        if cache is not None and cache.written:
            cache.keys_after(len(query), key.shape[1])
        q, k, v = self._project(query, key, value, cache)
        options: dict[str, Any] = {"causal": causal, "key_mask": key_mask, "return_weights": need_weights}
        if cache is not None and cache.grows:
            options |= cache.reach(q.shape[2])
        if cu_seqlens is not None:
            options |= {"cu_seqlens_q": cu_seqlens, "cu_seqlens_k": cu_seqlens}
            options |= {"max_seqlen_q": max_seqlen, "max_seqlen_k": max_seqlen}
        out = attention(q, k, v, dropout_p=self.dropout if self.training else 0.0, seed=seed, **options)
        out, weights = out if need_weights else (out, None)
        out = self._join_heads(out, 3)
        return self.out_proj(out) if project else out, weights

    opens: Any = forward  # an overridden forward is another one, and knows no `project`

    def _project(
        self, query: Tensor, key: Tensor, value: Tensor, cache: AttentionCache | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v (B, H, T, D): one GEMM for self-attention, one for queries and one for keys and values otherwise."""
        C, weight, bias = self.embed_dim, self.in_proj_weight, self.in_proj_bias
        if weight is not None and query is key and key is value:
            q, k, v = self._split_heads(F.linear(query, weight, bias), 3)
        else:
            # split, not slices: its gradient is one concatenation
            if not (cache is not None and cache.written) and weight is not None and key is value:
                both = two_linears(query, key, weight, bias)
                if both is not None:
                    (q,), (k, v) = self._split_heads(both[0], 1), self._split_heads(both[1], 2)
                    return q, *((k, v) if cache is None else cache.store(k, v))
            if weight is not None:
                w_q, *w_kv = weight.split((C, 2 * C) if key is value else (C, C, C))
            else:
                w_q, *w_kv = self.q_proj_weight, self.k_proj_weight, self.v_proj_weight
            sizes = (C, 2 * C) if len(w_kv) == 1 else (C, C, C)
            b_q, *b_kv = (None,) * len(sizes) if bias is None else bias.split(sizes)
            (q,) = self._split_heads(F.linear(query, w_q, b_q), 1)
            if cache is not None and cache.written:
                return q, *cache.read()
            if len(w_kv) == 1:
                k, v = self._split_heads(F.linear(key, w_kv[0], b_kv[0]), 2)
            else:
                (k,) = self._split_heads(F.linear(key, w_kv[0], b_kv[0]), 1)
                (v,) = self._split_heads(F.linear(value, w_kv[1], b_kv[1]), 1)
        if cache is not None:
            k, v = cache.store(k, v)
        return q, k, v

    def _split_heads(self, x: Tensor, parts: int) -> tuple[Tensor, ...]:
        """(..., parts * C) -> ``parts`` views (B, H, T, D), whatever the layout of x."""
        if self.batch_first and parts > 1 and (views := split_heads(x, parts, self.num_heads)) is not None:
            return views
        if parts > 1:
            each = x.view(*x.shape[:-1], parts, self.num_heads, self.head_dim).unbind(-3)
        else:  # the gradient of an unbind is a copy
            each = (x.view(*x.shape[:-1], self.num_heads, self.head_dim),)
        if x.dim() == 2:
            return tuple(part.transpose(0, 1).unsqueeze(0) for part in each)
        return tuple(part.transpose(1, 2) if self.batch_first else part.permute(1, 2, 0, 3) for part in each)

    def _join_heads(self, x: Tensor, dim: int) -> Tensor:
        """(B, H, T, D) -> the layout of the query, (..., C)."""
        if dim == 2:
            return x.squeeze(0).transpose(0, 1).flatten(-2)
        return (x.transpose(1, 2) if self.batch_first else x.permute(2, 0, 1, 3)).flatten(-2)


class Block(nn.Module):
    """``x + dropout(f(norm(x)))``, or ``norm(x + dropout(f(x)))`` without ``norm_first``, for each f of a layer:
    self-attention, attention to a memory (``cross``), feed-forward. Source: Vaswani et al. 2017."""

    lean = False  # as of the layers of `decoder.nn`

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int,
        dropout: float,
        activation: str,
        norm_first: bool,
        cross: bool = False,
    ) -> None:
        super().__init__()
        self.self_attn = Attention(d_model, nhead, dropout, batch_first=True)
        self.multihead_attn = Attention(d_model, nhead, dropout, batch_first=True) if cross else None
        self.linear1 = nn.Linear(d_model, dim_feedforward)
        self.dropout = Dropout(dropout)
        self.linear2 = nn.Linear(dim_feedforward, d_model)
        self.norm_first = norm_first
        self.norm1, self.norm2 = LayerNorm(d_model), LayerNorm(d_model)
        self.norm3 = LayerNorm(d_model) if cross else None
        self.dropout1, self.dropout2 = Dropout(dropout), Dropout(dropout)
        self.dropout3: Any = Dropout(dropout) if cross else None
        self.activation: Any = {"relu": F.relu, "gelu": F.gelu}[activation]

    def forward(
        self,
        x: Tensor,
        memory: Tensor | None = None,
        *,
        memory_mask: Tensor | None = None,
        cache: LayerCache | None = None,
        **options: Any,
    ) -> Tensor:
        """(B, T, C) of ``x`` (B, T, C); ``memory`` (B, T_m, C) with ``memory_mask`` (B, T_m), True = a key.

        ``options`` are those of the self-attention: causal, key_mask, cu_seqlens, max_seqlen.
        """
        return self.between(x, None, None, memory, memory_mask=memory_mask, cache=cache, **options)[0]

    def between(
        self,
        x: Tensor,
        h: Tensor | None,
        following: LayerNorm | None,
        memory: Tensor | None = None,
        *,
        memory_mask: Tensor | None = None,
        cache: LayerCache | None = None,
        **options: Any,
    ) -> tuple[Tensor, Tensor]:
        """``forward`` of a block with ``norm_first`` whose norm1(x) is ``h``: following(y), and y, what it returns."""
        own, cross = (None, None) if cache is None else (cache.self_attn, cache.cross_attn)
        parts, first, norms = Sublayers(self, x, 6), self.norm_first, [self.norm1, self.norm2, self.norm3]
        norms = [*norms[1 : 2 + (self.norm3 is not None)], following] if first else norms
        opened = parts.open(self.self_attn)
        h = parts.begin(self.norm1, x, h)
        with parts.reading(h):
            out = self.self_attn(h, h, h, cache=own, **opened, **options)[0]
        h, x = parts.end(out, self.self_attn.out_proj if opened else None, x, self.dropout1, norms[0])
        if self.multihead_attn is None:
            return parts.end(parts.feed_forward(h), self.linear2, x, self.dropout2, norms[1])
        opened = parts.open(self.multihead_attn)
        with parts.reading(h):
            out = self.multihead_attn(h, memory, memory, key_mask=memory_mask, cache=cross, **opened)[0]
        h, x = parts.end(out, self.multihead_attn.out_proj if opened else None, x, self.dropout2, norms[1])
        return parts.end(parts.feed_forward(h), self.linear2, x, self.dropout3, norms[2])


class Stack(nn.Module):
    """``num_layers`` copies of a block behind each other, and a final norm."""

    def __init__(self, block: Block, num_layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(copy.deepcopy(block) for _ in range(num_layers))
        self.num_layers = num_layers
        self.norm = LayerNorm(block.linear1.in_features)

    def forward(
        self, x: Tensor, memory: Tensor | None = None, *, cache: KVCache | None = None, **options: Any
    ) -> Tensor:
        """Pass ``x`` (B, T, C) through the blocks and the norm; ``options`` as `Block.forward`."""
        return self.states(x, memory, cache=cache, **options)[-1]

    def states(
        self, x: Tensor, memory: Tensor | None = None, *, cache: KVCache | None = None, **options: Any
    ) -> list[Tensor]:
        """``x`` and what each block gives, the last one after the norm: num_layers + 1 of (B, T, C)."""
        if cache is not None and len(cache.layers) != len(self.layers):
            raise ValueError(f"the cache has {len(cache.layers)} layers, this decoder {len(self.layers)}")
        return through(self.layers, self.norm, x, memory, None if cache is None else cache.layers, **options)


def through(
    layers: Iterable[nn.Module], norm: nn.Module, x: Tensor, memory: Tensor | None,
    caches: Sequence[LayerCache | AttentionCache] | None, keep: bool = True, **options: Any,
) -> list[Tensor]:  # fmt: skip
    """``x`` and what each layer gives, the last one after the norm; not ``keep``: that alone. Where nobody has hooked a
    block, the last residual of each and the norm behind it, of the next or the final one, are one pass."""
    layers, states, h = list(layers), [x], None
    # Of a class that says itself how it joins the next one: a subclass may compute something else.
    own: list[Any] = [y for y in layers if "between" in vars(type(y)) and is_plain(y, (type(y),)) and y.norm_first]
    norms: list[nn.Module] = []
    if own and len(own) == len(layers) and is_plain(norm, (LayerNorm, RMSNorm)):
        norms = [*(block.norm1 for block in own[1:]), norm]
    for i, layer in enumerate(layers):
        if caches is not None:
            options["cache"] = caches[i]
        if norms:
            h, x = own[i].between(x, h, norms[i], memory, **options)
        else:
            x = layer(x, *[memory] * (memory is not None), **options)
        states = [*states, x] if keep else [x]
    return [*states[:-1], norm(x) if h is None else h.to(x.dtype)]
