"""incremental: a decoder that never knew a cache decodes by one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tileformer.decoder.generation.step import Decoding, PackedStep, Parts, why_not_packed
from tileformer.decoder.model import KNOWN

_TORCHS = (nn.TransformerDecoder, nn.TransformerDecoderLayer, nn.TransformerEncoder, nn.TransformerEncoderLayer)


class Incremental(Decoding):
    """What `incremental` returns: a `Decodable`."""

    known_modules = KNOWN | {*_TORCHS, nn.MultiheadAttention}

    def __init__(
        self, decoder: nn.Module, parts: Parts, encode: Any, eos_id: int, pad_id: int, bos_id: int, max_length: int
    ) -> None:
        self.decoder, self.encode = decoder, encode
        self.eos_id, self.pad_id, self.bos_id, self.max_length = eos_id, pad_id, bos_id, max_length
        self.conditioned = encode is not None
        self.parameters, self.parts = decoder.parameters, lambda: parts

    def why_modules(self) -> str | None:
        return why_not_packed(self.parts(), self.known_modules)

    def inputs_of(self, source: Tensor | None) -> Any:
        """What modules would read, which are never called: TypeError for a decoder that the step does not know, or
        knows no more."""
        raise TypeError(f"incremental: this decoder takes no cache: {self.why_modules() or 'use_cache=False'}")

    def source_keys(self, step: PackedStep, source: Tensor | None, rows: int) -> tuple[Any, Any]:
        if not self.conditioned:
            return None, None
        if source is None:
            raise ValueError("this decoder attends to a memory: start(tokens, source=...)")
        memory, padding = self.encode(source)
        C = step.layers[0].qkv.weight.shape[0]
        if memory.dim() != 3 or memory.shape[::2] != (rows, C):
            raise ValueError(f"encode must give a memory ({rows}, T, {C}), the batch first, got {tuple(memory.shape)}")
        if padding is None:
            padding = torch.zeros(memory.shape[:2], dtype=torch.bool, device=memory.device)
        return step.source(memory.flatten(0, 1), padding), padding


def incremental(
    decoder: nn.Module,
    embed: Callable[[Tensor, Tensor], Tensor],
    project: Callable[[Tensor], Tensor],
    *,
    eos_id: int,
    pad_id: int,
    bos_id: int = 1,
    max_length: int,
    encode: Callable[[Tensor], tuple[Tensor, Tensor | None]] | None = None,
) -> Incremental:
    """A `Decodable` of a stack of torch.nn's layers, or of ours, and of what surrounds them: with a cache, and beams.

    Args:
        decoder: an nn.TransformerDecoder, or an nn.TransformerEncoder that is used causally, torch's or ours, in
            evaluation mode. Its weights are gathered anew where they have changed; layers are never called.
        embed: of tokens and their positions, int64 (R, n) each: what enters the first layer, (R, n, C).
        project: of rows (R, C) behind the decoder's final norm: logits (R, V).
        eos_id, pad_id, bos_id: as a `Decodable`'s; bos_id begins each row where there is a source.
        max_length: how many tokens a row can have.
        encode: of a source (B, T_s) as `generate` is handed it: the memory (B, T, C), the batch first whatever the
            decoder's layout, and its padding (B, T), True where there is no key, or None.

    Raises TypeError or ValueError for a decoder that it cannot serve, which names the part.

    Example:
        >>> layer = nn.TransformerEncoderLayer(32, 4, batch_first=True)
        >>> stack, words, places = nn.TransformerEncoder(layer, 2).eval(), nn.Embedding(20, 32), nn.Embedding(50, 32)
        >>> embed = lambda tokens, positions: words(tokens) + places(positions)
        >>> model = incremental(stack, embed, nn.Linear(32, 20), eos_id=2, pad_id=0, max_length=50)
        >>> from tileformer.decoder import generate
        >>> generate(model, torch.tensor([[1, 3, 4]]), max_length=5).shape[0]
        1
    """
    layers: Any = list(getattr(decoder, "layers", ()))
    if not layers or not isinstance(decoder, nn.TransformerDecoder | nn.TransformerEncoder):
        kind = f"{type(decoder).__module__}.{type(decoder).__qualname__}"
        raise TypeError(f"incremental takes an nn.TransformerDecoder or nn.TransformerEncoder with layers, got {kind}")
    attends = isinstance(decoder, nn.TransformerDecoder)
    if attends != (encode is not None):
        raise ValueError(
            f"{type(decoder).__name__} {'attends to a memory: pass' if attends else 'has no memory: omit'} encode"
        )
    at = lambda tokens, where: embed(tokens, _positions(tokens, where))  # noqa: E731
    parts = Parts(layers, decoder.norm, (decoder,), embed=at, project=project)
    return Incremental(decoder, parts, encode, eos_id, pad_id, bos_id, max_length)


def _positions(tokens: Tensor, where: int | Tensor) -> Tensor:
    if isinstance(where, int):
        where = torch.arange(where, where + tokens.shape[1], device=tokens.device)
    return where.long().expand(tokens.shape)
