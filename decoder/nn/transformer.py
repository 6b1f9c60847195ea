"""TransformerEncoder, TransformerDecoder and Transformer: torch.nn's stacks over our layers.

No mask is read on the host: where torch compares a mask with the causal one (`is_causal=None`), the mask is simply
used. Pass `is_causal=True` with the causal mask to get the kernel's causal path.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from tileformer.decoder.blocks import check_heads
from tileformer.decoder.generation.cache import KVCache
from tileformer.decoder.nn.layer import TransformerDecoderLayer, TransformerEncoderLayer
from tileformer.decoder.nn.modules import LayerNorm


class TransformerEncoder(nn.TransformerEncoder):
    """``torch.nn.TransformerEncoder`` that never makes a nested tensor (``enable_nested_tensor`` is kept, not used)."""

    # A property, so that it also holds for an object whose class was changed after torch had set the attribute.
    use_nested_tensor = property(lambda self: False, lambda self, value: None)

    def __init__(
        self,
        encoder_layer: nn.TransformerEncoderLayer,
        num_layers: int,
        norm: nn.Module | None = None,
        enable_nested_tensor: bool = True,
        mask_check: bool = True,
    ) -> None:
        # torch warns when it cannot use nested tensors; here nobody asked for them.
        super().__init__(encoder_layer, num_layers, norm, enable_nested_tensor=False, mask_check=mask_check)
        self.enable_nested_tensor = enable_nested_tensor

    def forward(
        self,
        src: Tensor,
        mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool | None = None,
    ) -> Tensor:
        """Pass ``src`` through the layers and the final norm; see ``TransformerEncoderLayer.forward``."""
        if not all(isinstance(layer, TransformerEncoderLayer) for layer in self.layers):
            # A user's own layer is handed what torch hands it: floating masks, and whether the mask is the causal one.
            return super().forward(src, mask, src_key_padding_mask, is_causal)
        output = src
        for layer in self.layers:
            output = layer(
                output, src_mask=mask, is_causal=is_causal is True, src_key_padding_mask=src_key_padding_mask
            )
        return output if self.norm is None else self.norm(output)


class TransformerDecoder(nn.TransformerDecoder):
    """``torch.nn.TransformerDecoder``, with an optional cache for decoding token by token."""

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool | None = None,
        memory_is_causal: bool = False,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Pass ``tgt`` through the layers and the final norm; see ``TransformerDecoderLayer.forward``.

        Raises ValueError when ``cache`` was made for another number of layers.
        """
        if cache is not None and len(cache.layers) != len(self.layers):
            raise ValueError(f"the cache has {len(cache.layers)} layers, this decoder {len(self.layers)}")
        masks = {"tgt_mask": tgt_mask, "tgt_key_padding_mask": tgt_key_padding_mask}
        masks |= {"memory_mask": memory_mask, "memory_key_padding_mask": memory_key_padding_mask}
        if cache is None and not all(isinstance(layer, TransformerDecoderLayer) for layer in self.layers):
            return super().forward(tgt, memory, **masks, tgt_is_causal=tgt_is_causal, memory_is_causal=memory_is_causal)
        hints = {"tgt_is_causal": tgt_is_causal is True, "memory_is_causal": memory_is_causal}
        output = tgt
        for i, layer in enumerate(self.layers):
            options = {} if cache is None else {"cache": cache.layers[i]}
            output = layer(output, memory, **masks, **hints, **options)
        return output if self.norm is None else self.norm(output)


class Transformer(nn.Transformer):
    """``torch.nn.Transformer`` built from our stacks: same constructor, forward, parameters and state_dict keys."""

    def __init__(
        self,
        d_model: int = 512,
        nhead: int = 8,
        num_encoder_layers: int = 6,
        num_decoder_layers: int = 6,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: str | Callable[[Tensor], Tensor] = F.relu,
        custom_encoder: Any | None = None,
        custom_decoder: Any | None = None,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        device=None,
        dtype=None,
    ) -> None:
        if custom_encoder is None or custom_decoder is None:
            check_heads(d_model, nhead)
        shape = (d_model, nhead, dim_feedforward, dropout, activation, layer_norm_eps, batch_first, norm_first, bias)
        factory = {"device": device, "dtype": dtype}
        # Built in torch's order, so that the generator gives the same weights.
        if custom_encoder is None:
            norm = LayerNorm(d_model, eps=layer_norm_eps, bias=bias, **factory)
            custom_encoder = TransformerEncoder(TransformerEncoderLayer(*shape, **factory), num_encoder_layers, norm)
        if custom_decoder is None:
            norm = LayerNorm(d_model, eps=layer_norm_eps, bias=bias, **factory)
            custom_decoder = TransformerDecoder(TransformerDecoderLayer(*shape, **factory), num_decoder_layers, norm)
        super().__init__(
            d_model, nhead, custom_encoder=custom_encoder, custom_decoder=custom_decoder, batch_first=batch_first
        )
