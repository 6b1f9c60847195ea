"""TransformerEncoderLayer and TransformerDecoderLayer: torch.nn's layers on our kernels.

One sublayer is ``x + dropout(block(norm(x)))`` (pre-norm) or ``norm(x + dropout(block(x)))`` (post-norm).
Source: Vaswani et al. 2017, "Attention Is All You Need"; torch/nn/modules/transformer.py for names and order.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tileformer.decoder.cache import AttentionCache, LayerCache
from tileformer.decoder.nn.attention import MultiheadAttention, check_heads
from tileformer.decoder.nn.modules import Dropout, LayerNorm

_OURS: dict[type[nn.Module], type[nn.Module]] = {
    nn.MultiheadAttention: MultiheadAttention,
    nn.LayerNorm: LayerNorm,
    nn.Dropout: Dropout,
}


def _adopt_children(layer: nn.Module) -> None:
    """Turn torch's children into ours. The objects stay, so the same seed gives the same weights as torch."""
    for child in layer.children():
        if type(child) in _OURS:
            child.__class__ = _OURS[type(child)]


def _drop_and_add(dropout: nn.Module, branch: Tensor, residual: Tensor | None) -> Tensor:
    """``residual + dropout(branch)``: in one pass where the dropout is ours and nobody has replaced or hooked what it does."""
    ours = type(dropout).forward is Dropout.forward and "forward" not in dropout.__dict__
    if ours and not any(getattr(dropout, hooks) for hooks in _HOOKS):
        return dropout(branch, residual)
    return dropout(branch) if residual is None else residual + dropout(branch)


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def _adds_residual(block: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Mark a block that takes ``residual`` and adds it itself, in one pass with its dropout."""
    # Itself, not True: functools.wraps copies the mark onto what a user puts around the block.
    block.adds_residual = block  # type: ignore[attr-defined]
    return block


def _add_block(block: Callable[..., Tensor], residual: Tensor, *args, **kwargs) -> Tensor:
    """``residual + block(*args)``. A block that a subclass or a user has put there is not marked: it returns only its
    branch, after its dropout, as torch's blocks do."""
    function = getattr(block, "__func__", block)
    if getattr(function, "adds_residual", None) is function:
        return block(*args, residual=residual, **kwargs)
    return residual + block(*args, **kwargs)


def _given(**options) -> dict:
    """The options that are not None: what is not asked for is not named, so that a user's module needs not know it."""
    return {name: value for name, value in options.items() if value is not None}


def _added_masks(x: Tensor, mask: Tensor | None, padding: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Masks as torch's encoder layer hands them to a user's own attention: floating, -inf where hidden."""

    def added(m: Tensor | None) -> Tensor | None:
        if m is None or m.is_floating_point():
            return m
        return torch.zeros_like(m, dtype=x.dtype).masked_fill(m, -torch.inf)

    return added(mask), added(padding)


def _attend(attn: nn.Module, x: Tensor, memory: Tensor, attn_mask, key_padding_mask, is_causal, **options) -> Tensor:
    """Output of ``attn``; ``options`` as cache, named only where there is one."""
    masks = {"attn_mask": attn_mask, "key_padding_mask": key_padding_mask, "is_causal": is_causal}
    return attn(x, memory, memory, need_weights=False, **masks, **options)[0]


class TransformerEncoderLayer(nn.TransformerEncoderLayer):
    """``torch.nn.TransformerEncoderLayer``: same constructor, forward signature, parameters and state_dict keys.

    There is one path: no inference fast path and no nested tensors, so training and evaluation agree.
    """

    # torch.nn.TransformerEncoder asks this before it hands its layers a nested tensor; 0 means "no fast path". A
    # property, so that it also holds for an object whose class was changed after torch had set the attribute.
    activation_relu_or_gelu = property(lambda self: 0, lambda self, value: None)

    def __init__(
        self,
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
        super().__init__(*shape, device=device, dtype=dtype)
        _adopt_children(self)

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
        x = src
        masks = (src_mask, src_key_padding_mask)
        if not isinstance(self.self_attn, MultiheadAttention):
            masks = _added_masks(src, *masks)
        options = _given(cache=cache, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen)
        if self.norm_first:
            x = _add_block(self._sa_block, x, self.norm1(x), *masks, is_causal=is_causal, **options)
            return _add_block(self._ff_block, x, self.norm2(x))
        x = self.norm1(_add_block(self._sa_block, x, x, *masks, is_causal=is_causal, **options))
        return self.norm2(_add_block(self._ff_block, x, x))

    @_adds_residual
    def _sa_block(self, x, attn_mask, key_padding_mask, is_causal=False, *, residual=None, **options) -> Tensor:
        branch = _attend(self.self_attn, x, x, attn_mask, key_padding_mask, is_causal, **options)
        return _drop_and_add(self.dropout1, branch, residual)

    @_adds_residual
    def _ff_block(self, x, *, residual=None) -> Tensor:
        branch = self.linear2(self.dropout(self.activation(self.linear1(x))))
        return _drop_and_add(self.dropout2, branch, residual)


class TransformerDecoderLayer(nn.TransformerDecoderLayer):
    """``torch.nn.TransformerDecoderLayer``: same constructor, forward signature, parameters and state_dict keys."""

    def __init__(
        self,
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
        super().__init__(*shape, device=device, dtype=dtype)
        _adopt_children(self)

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
        x = tgt
        sa = (tgt_mask, tgt_key_padding_mask, tgt_is_causal)
        mha = (memory, memory_mask, memory_key_padding_mask, memory_is_causal)
        sa_cache = _given(cache=None if cache is None else cache.self_attn)
        mha_cache = _given(cache=None if cache is None else cache.cross_attn)
        if self.norm_first:
            x = _add_block(self._sa_block, x, self.norm1(x), *sa, **sa_cache)
            x = _add_block(self._mha_block, x, self.norm2(x), *mha, **mha_cache)
            return _add_block(self._ff_block, x, self.norm3(x))
        x = self.norm1(_add_block(self._sa_block, x, x, *sa, **sa_cache))
        x = self.norm2(_add_block(self._mha_block, x, x, *mha, **mha_cache))
        return self.norm3(_add_block(self._ff_block, x, x))

    @_adds_residual
    def _sa_block(self, x, attn_mask, key_padding_mask, is_causal=False, *, residual=None, **options) -> Tensor:
        branch = _attend(self.self_attn, x, x, attn_mask, key_padding_mask, is_causal, **options)
        return _drop_and_add(self.dropout1, branch, residual)

    @_adds_residual
    def _mha_block(self, x, mem, attn_mask, key_padding_mask, is_causal=False, *, residual=None, **options) -> Tensor:
        branch = _attend(self.multihead_attn, x, mem, attn_mask, key_padding_mask, is_causal, **options)
        return _drop_and_add(self.dropout2, branch, residual)

    @_adds_residual
    def _ff_block(self, x, *, residual=None) -> Tensor:
        branch = self.linear2(self.dropout(self.activation(self.linear1(x))))
        return _drop_and_add(self.dropout3, branch, residual)
