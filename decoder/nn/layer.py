"""TransformerEncoderLayer and TransformerDecoderLayer: torch.nn's layers on our kernels.

One sublayer is ``x + dropout(block(norm(x)))`` (pre-norm) or ``norm(x + dropout(block(x)))`` (post-norm).
Source: Vaswani et al. 2017, "Attention Is All You Need"; torch/nn/modules/transformer.py for names and order.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from tileformer.decoder.blocks import check_heads
from tileformer.decoder.generation.cache import AttentionCache, LayerCache
from tileformer.decoder.nn.attention import MultiheadAttention
from tileformer.decoder.nn.modules import Dropout, LayerNorm, fuses_residual
from tileformer.decoder.sublayers import Sublayers

_OURS: dict[type[nn.Module], type[nn.Module]] = {
    nn.MultiheadAttention: MultiheadAttention,
    nn.LayerNorm: LayerNorm,
    nn.Dropout: Dropout,
}


def _masks(attn_mask: Tensor | None, key_padding_mask: Tensor | None, is_causal: bool) -> dict[str, Any]:
    return {"attn_mask": attn_mask, "key_padding_mask": key_padding_mask, "is_causal": is_causal}


class _Layer:
    """What both layers share: torch's constructor with children of ours, and torch's names for the parts, for who
    overrides or calls them: each returns its branch, after its dropout."""

    lean = False  # whether a training step computes norms and activations again, instead of keeping them (on a GPU)

    def __init__(
        self: Any,
        d_model: int,
        nhead: int,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: str | Callable[[Tensor], Tensor] = F.relu,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        device=None,
        dtype=None,
    ) -> None:
        check_heads(d_model, nhead)
        shape = (d_model, nhead, dim_feedforward, dropout, activation, layer_norm_eps, batch_first, norm_first, bias)
        super().__init__(*shape, device=device, dtype=dtype)  # type: ignore[call-arg]
        for child in self.children():  # the objects stay, so the same seed gives the same weights as torch
            child.__class__ = _OURS.get(type(child), type(child))

    def _sa_block(self: Any, x, attn_mask, key_padding_mask, is_causal=False, **options) -> Tensor:
        options |= _masks(attn_mask, key_padding_mask, is_causal)
        return self.dropout1(self.self_attn(x, x, x, need_weights=False, **options)[0])

    def _feed_forward(self: Any, x: Tensor) -> Tensor:
        return self.linear2(self.dropout(self.activation(self.linear1(x))))

    def _is_fused(self: Any, twin: type) -> bool:
        """Whether nobody has overridden, replaced or hooked a block of a layer that is a ``twin``."""
        cls, own, children = type(self), self.__dict__, self._modules
        blocks = ("_sa_block", "_mha_block", "_ff_block")
        if any(name in own or getattr(cls, name, None) is not getattr(twin, name, None) for name in blocks):
            return False
        return all(fuses_residual(children[name]) for name in ("dropout1", "dropout2", "dropout3") if name in children)

    def _add_blocks(self: Any, x: Tensor, *blocks: tuple[nn.Module, Callable[[Tensor], Tensor]]) -> Tensor:
        """torch's order of these blocks, for options that torch's own forward does not know."""
        for norm, block in blocks:
            x = x + block(norm(x)) if self.norm_first else norm(x + block(x))
        return x


class TransformerEncoderLayer(_Layer, nn.TransformerEncoderLayer):
    """``torch.nn.TransformerEncoderLayer``: same constructor, forward signature, parameters and state_dict keys.

    There is one path: no inference fast path and no nested tensors, so training and evaluation agree.
    """

    # torch.nn.TransformerEncoder asks this before it hands its layers a nested tensor; 0 means "no fast path". A
    # property, so that it also holds for an object whose class was changed after torch had set the attribute.
    activation_relu_or_gelu = property(lambda self: 0, lambda self, value: None)

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
        cache: AttentionCache | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
    ) -> Tensor:
        """Encode ``src`` (B, T, C) or (T, B, C), or (T, C); masks as in ``MultiheadAttention.forward``.

        For a decoder without memory: with ``cache``, src holds only tokens that the cache has not seen, and attention
        is causal. ``cu_seqlens`` and ``max_seqlen`` say that src is packed.
        """
        asked = {"cache": cache, "cu_seqlens": cu_seqlens, "max_seqlen": max_seqlen}
        # What is not asked for is not named, so that a user's module needs not know it.
        asked = {name: value for name, value in asked.items() if value is not None}
        options = _masks(src_mask, src_key_padding_mask, is_causal) | asked
        if not (isinstance(self.self_attn, MultiheadAttention) and self._is_fused(TransformerEncoderLayer)):
            if not asked:  # torch hands a user's attention floating masks
                return super().forward(src, src_mask, src_key_padding_mask, is_causal)
            attend = partial(self._sa_block, **options)
            return self._add_blocks(src, (self.norm1, attend), (self.norm2, self._ff_block))
        parts, first = Sublayers(self, src, 4), self.norm_first
        opened = parts.open(self.self_attn)
        h = parts.begin(self.norm1, src)
        with parts.reading(h):
            out = self.self_attn(h, h, h, need_weights=False, **options, **opened)[0]
        linear = self.self_attn.out_proj if opened else None
        h, x = parts.end(out, linear, src, self.dropout1, self.norm2 if first else self.norm1)
        return parts.end(parts.feed_forward(h), self.linear2, x, self.dropout2, None if first else self.norm2)[0]

    def _ff_block(self, x) -> Tensor:
        return self.dropout2(self._feed_forward(x))


class TransformerDecoderLayer(_Layer, nn.TransformerDecoderLayer):
    """``torch.nn.TransformerDecoderLayer``: same constructor, forward signature, parameters and state_dict keys."""

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool = False,
        memory_is_causal: bool = False,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """Decode ``tgt`` (B, T_q, C) with ``memory`` (B, T_k, C), or (T, B, C), or both without a batch.

        Masks as in ``MultiheadAttention.forward``. With ``cache``, tgt holds only tokens that the cache has not seen.
        """
        own = _masks(tgt_mask, tgt_key_padding_mask, tgt_is_causal)
        cross = _masks(memory_mask, memory_key_padding_mask, memory_is_causal)
        if cache is not None:
            own["cache"], cross["cache"] = cache.self_attn, cache.cross_attn
        if not self._is_fused(TransformerDecoderLayer):
            if cache is None:
                masks = (tgt_mask, memory_mask, tgt_key_padding_mask, memory_key_padding_mask)
                return super().forward(tgt, memory, *masks, tgt_is_causal, memory_is_causal)
            attend, attend_memory = partial(self._sa_block, **own), partial(self._mha_block, mem=memory, **cross)
            return self._add_blocks(
                tgt, (self.norm1, attend), (self.norm2, attend_memory), (self.norm3, self._ff_block)
            )
        parts, first = Sublayers(self, tgt, 6), self.norm_first
        opened, open_too = parts.open(self.self_attn), parts.open(self.multihead_attn)
        h = parts.begin(self.norm1, tgt)
        with parts.reading(h):
            out = self.self_attn(h, h, h, need_weights=False, **own, **opened)[0]
        linear = self.self_attn.out_proj if opened else None
        h, x = parts.end(out, linear, tgt, self.dropout1, self.norm2 if first else self.norm1)
        with parts.reading(h):
            out = self.multihead_attn(h, memory, memory, need_weights=False, **cross, **open_too)[0]
        linear = self.multihead_attn.out_proj if open_too else None
        h, x = parts.end(out, linear, x, self.dropout2, self.norm3 if first else self.norm2)
        return parts.end(parts.feed_forward(h), self.linear2, x, self.dropout3, None if first else self.norm3)[0]

    def _mha_block(self, x, mem, attn_mask, key_padding_mask, is_causal=False, **options) -> Tensor:
        options |= _masks(attn_mask, key_padding_mask, is_causal)
        return self.dropout2(self.multihead_attn(x, mem, mem, need_weights=False, **options)[0])

    def _ff_block(self, x) -> Tensor:
        return self.dropout3(self._feed_forward(x))
