"""KVCache: what a decoder has already projected, so that one more token costs one more token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tileformer.decoder.generation.state import RowState
from tileformer.kernels.backend import choose


class AttentionCache:
    """Keys and values (B, H, T, D) of one attention module.

    With ``max_length`` they grow token by token in a buffer allocated once (self-attention); without, they are
    written once and read ever after (cross-attention: the source does not change).

    ``length`` counts the tokens stored, of the longest row where ``row_lengths`` int32 (B,) tell them apart.
    """

    def __init__(self, max_length: int | None = None) -> None:
        self.max_length = max_length
        self.length = 0
        self.row_lengths: Tensor | None = None
        self.k: Tensor | None = None
        self.v: Tensor | None = None

    @property
    def grows(self) -> bool:
        return self.max_length is not None

    @property
    def written(self) -> bool:
        """Whether ``read`` gives the final keys and values, so that nothing is left to project."""
        return not self.grows and self.k is not None

    def keys_after(self, B: int, T: int) -> int:
        """Number of keys once T more have arrived. Raises ValueError where they do not fit what is stored."""
        if self.k is not None and (self.k.shape[0] != B or self.written and self.k.shape[2] != T):
            raise ValueError(f"the cache was filled with keys {tuple(self.k.shape)}, not for batch {B} and {T} keys")
        if self.max_length is None:
            return T
        end = self.length + T
        if self.row_lengths is not None:  # on the device; the longest row may have ended
            return min(end, self.max_length)
        if end > self.max_length:
            raise ValueError(f"{end} tokens do not fit a KVCache of max_length {self.max_length}: make it larger")
        return end

    def store(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add ``k`` and ``v`` (B, H, T, D) behind what is stored and return all of it, as views.

        Raises RuntimeError when gradients are being recorded, ValueError for what does not fit.
        """
        if k.requires_grad:
            raise RuntimeError("a KVCache holds no gradients: decode under torch.no_grad()")
        B, H, T, D = k.shape
        end = self.keys_after(B, T)
        if self.max_length is None:
            self.k, self.v = k, v
            return k, v
        if self.k is None or self.v is None:
            # One allocation for the whole run; its length is never seen by a kernel as a constant. Finite from the
            # start: behind a mask, what a shorter row has not written yet is read.
            self.k, self.v = k.new_zeros(B, H, self.max_length, D), v.new_zeros(B, H, self.max_length, D)
        if self.row_lengths is None:
            self.k[:, :, self.length : end] = k
            self.v[:, :, self.length : end] = v
        else:
            rows = torch.arange(B, device=k.device)[:, None]
            positions = self.row_lengths[:, None] + torch.arange(T, device=k.device)
            positions = positions.clamp(max=self.max_length - 1).long()
            self.k[rows, :, positions] = k.transpose(1, 2)
            self.v[rows, :, positions] = v.transpose(1, 2)
        self.length = end
        return self.k[:, :, :end], self.v[:, :, :end]

    def reach(self, T: int, mask: Tensor | None = None, aligned: bool = False) -> dict[str, Any]:
        """Which keys the T newest queries see beside ``mask``, as options of the attention, once their own were
        stored. ``aligned``: the newest stands at each row's last key, also alone, for a window."""
        # The newest query sees every key: one alone needs no causal mask, which costs the kernels less than a binary.
        causal = T > 1 or aligned or (self.k is not None and choose("attention", self.k) in ("triton", "interpret"))
        options: dict[str, Any] = {"causal": "bottom_right" if causal else False, "mask": mask}
        if self.row_lengths is not None:
            lengths = (self.row_lengths + T).clamp(max=self.length)
            # There lengths cost copies of the keys.
            if T == 1 and mask is None and not aligned and lengths.device.type == "cpu":
                keys = torch.arange(self.length, device=lengths.device)
                options["mask"] = (keys < lengths[:, None])[:, None, None]
            else:
                options["key_lengths"] = lengths
        return options

    def read(self) -> tuple[Tensor, Tensor]:
        """Keys and values (B, H, T, D) stored so far."""
        assert self.k is not None and self.v is not None, "nothing was stored yet"
        return self.k, self.v


@dataclass
class LayerCache:
    """The two caches of one decoder layer."""

    self_attn: AttentionCache
    cross_attn: AttentionCache


class KVCache(RowState):
    """Caches of all decoder layers for one batch of rows; the `DecodeState` of `DecoderLM` and `Seq2Seq`.

    Args: ``num_layers`` of the decoder; ``max_length`` tokens of target, allocated at the first step in the dtype and
    on the device of the first keys; ``inputs``, tensors with a row each that a decoder reads at every step. Pass it as
    ``cache=`` to ``TransformerDecoder`` or ``Seq2Seq.decode`` with only the new tokens of the target each time:
    self-attention is then causal, aligned to the newest token.
    """

    def __init__(self, num_layers: int, max_length: int, *inputs: Tensor) -> None:
        if num_layers < 1 or max_length < 1:
            raise ValueError(f"num_layers and max_length must be at least 1, got {num_layers} and {max_length}")
        self.layers = [LayerCache(AttentionCache(max_length), AttentionCache()) for _ in range(num_layers)]
        self.capacity = max_length
        self.inputs = inputs

    @property
    def length(self) -> int:
        """Target tokens stored so far, of the longest row."""
        return self.layers[0].self_attn.length

    @length.setter
    def length(self, length: int) -> None:
        for layer in self.layers:
            layer.self_attn.length = length

    @property
    def row_lengths(self) -> Tensor | None:
        return self.layers[0].self_attn.row_lengths

    @row_lengths.setter
    def row_lengths(self, row_lengths: Tensor | None) -> None:
        for layer in self.layers:
            layer.self_attn.row_lengths = row_lengths

    def growing(self) -> list[Tensor]:
        return [x for layer in self.layers for x in layer.self_attn.read()]

    def fixed(self) -> list[Tensor]:
        return [x for cache in self._written() for x in cache.read()] + list(self.inputs)

    def assign(self, growing: list[Tensor], fixed: list[Tensor]) -> None:
        pairs = iter(growing + fixed)
        for cache in [layer.self_attn for layer in self.layers] + self._written():
            cache.k, cache.v = next(pairs), next(pairs)
        self.inputs = tuple(pairs)

    def _written(self) -> list[AttentionCache]:
        return [layer.cross_attn for layer in self.layers if layer.cross_attn.written]


class TokenState(RowState):
    """The tokens themselves, (R, capacity): for a model that reads all of them again at each step."""

    def __init__(self, tokens: Tensor, capacity: int, *inputs: Tensor) -> None:
        self.tokens = F.pad(tokens, (0, capacity - tokens.shape[1]))
        self.capacity, self.length, self.inputs = capacity, tokens.shape[1], inputs

    def append(self, tokens: Tensor) -> None:
        """One more token a row, or n: ``tokens`` (R, n)."""
        self.tokens.scatter_(1, self.positions(tokens.shape[1]), tokens)
        self.length = min(self.length + tokens.shape[1], self.capacity)
        self.advance(tokens.shape[1])

    def growing(self) -> list[Tensor]:
        return [self.tokens]

    def fixed(self) -> list[Tensor]:
        return list(self.inputs)

    def assign(self, growing: list[Tensor], fixed: list[Tensor]) -> None:
        (self.tokens,), self.inputs = growing, tuple(fixed)
