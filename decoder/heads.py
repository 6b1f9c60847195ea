"""Classifier and Tagger: a head on the states of a DecoderLM or CausalLM, or of a Seq2Seq's encoder."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tileformer.decoder.causal import CausalLM
from tileformer.decoder.model import DecoderLM, DecoderLMConfig, ModelConfig, Seq2Seq, Seq2SeqConfig
from tileformer.decoder.nn.modules import Dropout
from tileformer.decoder.pretrained import KINDS, Saved

POOLS = ("mean", "last", "first")


class LayerMix(nn.Module):
    """A learned softmax-weighted sum of all states of a model, times a learned factor (Peters et al. 2018, ELMo)."""

    def __init__(self, states: int) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.zeros(states))
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, states: list[Tensor]) -> Tensor:
        """(B, T, C) from ``states``, each (B, T, C). They start with equal weights."""
        wide = torch.promote_types(states[0].dtype, torch.float32)
        shares = self.weights.to(wide).softmax(0)
        mixed = sum(share * x.to(wide) for share, x in zip(shares, states, strict=True))
        return (self.scale * mixed).to(states[0].dtype)


class Head(nn.Module):
    """All that a task adds to a backbone: perhaps a ``LayerMix``, then dropout and one linear layer."""

    def __init__(self, backbone: DecoderLM | CausalLM | Seq2Seq, outputs: int, mix: bool, dropout: float) -> None:
        super().__init__()
        if outputs < 1:
            raise ValueError(f"a head needs at least 1 output, got {outputs}")
        config = backbone.config.general()
        layers = config.num_encoder_layers or config.num_layers
        self.mix = LayerMix(layers + 1) if mix else None
        self.dropout = Dropout(dropout)
        self.linear = nn.Linear(config.d_model, outputs)

    def combine(self, states: list[Tensor]) -> Tensor:
        """The one (B, T, C) that the task reads: the mix, or the last of ``states``."""
        return states[-1] if self.mix is None else self.mix(states)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (..., outputs) of ``x`` (..., C)."""
        return self.linear(self.dropout(x))


class Classifier(Saved, nn.Module):
    """Tokens in, logits of one class a row out.

    ``backbone`` is trained with it unless frozen; ``head`` is all that is new. The states of a row are pooled over its
    tokens, never over padding: their mean, the last, or the first (which sees the rest only in a Seq2Seq's encoder).
    Raises ValueError for an unknown pool or no classes.
    """

    configs = (DecoderLMConfig, Seq2SeqConfig, ModelConfig)

    def __init__(
        self,
        backbone: DecoderLM | CausalLM | Seq2Seq,
        num_classes: int,
        *,
        pool: str = "mean",
        mix: bool = False,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        if pool not in POOLS:
            raise ValueError(f"pool must be one of {', '.join(POOLS)}, got {pool!r}")
        self.backbone = backbone
        self.config = backbone.config
        self.classes: list[str] = []
        self.pool = pool
        self.head = Head(backbone, num_classes, mix, dropout)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits (B, num_classes) of ``tokens`` (B, T) int64, padded with the backbone's ``pad_id`` behind each row."""
        return self.head(self.features(tokens))

    def described(self) -> dict[str, Any]:
        head = {"num_classes": self.head.linear.out_features, "pool": self.pool, "mix": self.head.mix is not None}
        return self.backbone.described() | {"backbone": type(self.backbone).__name__} | head

    @classmethod
    def blank(cls, config: Mapping[str, Any]) -> "Classifier":
        backbone = KINDS[config["backbone"]].blank(config)
        return cls(backbone, config["num_classes"], pool=config["pool"], mix=config["mix"])

    def features(self, tokens: Tensor) -> Tensor:
        """The pooled states (B, C); 0 for a row that is all padding."""
        real = tokens != self.backbone.pad_id
        states = self.head.combine(self.backbone.states(tokens)).masked_fill(~real[..., None], 0.0)
        if self.pool == "mean":
            wide = torch.promote_types(states.dtype, torch.float32)  # a sum of long rows is beyond float16
            return (states.sum(1, dtype=wide) / real.sum(1, keepdim=True).clamp(min=1)).to(states.dtype)
        position = real.cumsum(1).argmax(1) if self.pool == "last" else real.int().argmax(1)
        return states[torch.arange(len(tokens), device=tokens.device), position]


class Tagger(nn.Module):
    """Tokens in, logits of one tag a token out. A ``DecoderLM`` judges a token by what stands before it and itself."""

    def __init__(
        self, backbone: DecoderLM | CausalLM | Seq2Seq, num_tags: int, *, mix: bool = False, dropout: float = 0.1
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = Head(backbone, num_tags, mix, dropout)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits (B, T, num_tags) of ``tokens`` (B, T) int64; those of padding mean nothing."""
        return self.head(self.head.combine(self.backbone.states(tokens)))
