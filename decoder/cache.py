"""KVCache: what a decoder has already projected, so that one more token costs one more token."""

from dataclasses import dataclass

from torch import Tensor


class AttentionCache:
    """Keys and values (B, H, T, D) of one attention module.

    With ``max_length`` they grow token by token in a buffer allocated once (self-attention); without, they are
    written once and read ever after (cross-attention: the source does not change).
    """

    def __init__(self, max_length: int | None = None) -> None:
        self.max_length = max_length
        self.length = 0
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
        end = self.length + T
        if self.max_length is not None and end > self.max_length:
            raise ValueError(f"{end} tokens do not fit a KVCache of max_length {self.max_length}: make it larger")
        return end if self.grows else T

    def store(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add ``k`` and ``v`` (B, H, T, D) behind what is stored and return all of it, as views.

        Raises RuntimeError when gradients are being recorded.
        """
        if k.requires_grad:
            raise RuntimeError("a KVCache holds no gradients: decode under torch.no_grad()")
        if self.max_length is None:
            self.k, self.v = k, v
            return k, v
        end = self.length + k.shape[2]
        if self.k is None or self.v is None:
            B, H, _, D = k.shape
            # One allocation for the whole run; its length is never seen by a kernel as a constant.
            self.k, self.v = k.new_empty(B, H, self.max_length, D), v.new_empty(B, H, self.max_length, D)
        self.k[:, :, self.length : end] = k
        self.v[:, :, self.length : end] = v
        self.length = end
        return self.k[:, :, :end], self.v[:, :, :end]

    def read(self) -> tuple[Tensor, Tensor]:
        """Keys and values (B, H, T, D) stored so far."""
        assert self.k is not None and self.v is not None, "nothing was stored yet"
        return self.k, self.v

    def select(self, rows: Tensor) -> None:
        """Keep batch ``rows`` (B',) int64, in that order."""
        if self.k is not None and self.v is not None:
            self.k, self.v = self.k.index_select(0, rows), self.v.index_select(0, rows)


@dataclass
class LayerCache:
    """The two caches of one decoder layer."""

    self_attn: AttentionCache
    cross_attn: AttentionCache


class KVCache:
    """Caches of all decoder layers for one batch of sources.

    Args: ``num_layers`` of the decoder; ``max_length`` tokens of target, allocated at the first step in the dtype and
    on the device of the first keys. Pass it as ``cache=`` to ``TransformerDecoder`` or ``Seq2Seq.decode`` with only the
    new tokens of the target each time: self-attention is then causal, aligned to the newest token.
    """

    def __init__(self, num_layers: int, max_length: int) -> None:
        if num_layers < 1 or max_length < 1:
            raise ValueError(f"num_layers and max_length must be at least 1, got {num_layers} and {max_length}")
        self.layers = [LayerCache(AttentionCache(max_length), AttentionCache()) for _ in range(num_layers)]

    @property
    def length(self) -> int:
        """Target tokens stored so far."""
        return self.layers[0].self_attn.length

    def reorder(self, rows: Tensor) -> None:
        """Let row i continue what row ``rows[i]`` held (beam search). Cross-attention stays: beams swap only among
        rows of the same source."""
        for layer in self.layers:
            layer.self_attn.select(rows)
