"""Losses by kind of batch: sequence to sequence, classification, language modelling. All maths is the kernels'.

On a GPU the losses of our own models are computed without their logits, by `linear_cross_entropy`; on a CPU, where the
same bits are promised from version to version, from them.
"""

from typing import Any

from torch import Tensor, nn

from tileformer.decoder.model import Model
from tileformer.decoder.recurrent import Recurrent
from tileformer.kernels import cross_entropy, linear_cross_entropy

FUSED_ON = ("cuda",)  # devices


def _next_token_loss(model: nn.Module, batch: Any, label_smoothing: float, *inputs: Any, **named: Any) -> Tensor:
    """Mean over the labels that are not ignored. A model that is wrapped is called as it is, for its logits."""
    labels = batch.labels
    options: Any = dict(ignore_index=getattr(batch, "ignored", 0), label_smoothing=label_smoothing)
    if isinstance(model, Model | Recurrent) and labels.device.type in FUSED_ON:
        return linear_cross_entropy(
            model.hidden(*inputs, **named).flatten(0, 1), model.head, labels.flatten(), **options
        )
    return cross_entropy(model(*inputs, **named).flatten(0, 1), labels.flatten(), **options)


def sequence_loss(model: nn.Module, batch: Any, label_smoothing: float = 0.0) -> Tensor:
    """Mean cross-entropy of the next symbol in nats, over labels that are not `batch.ignored`. Shape ().

    batch: a `Batch`; model(source, target) gives logits (B, T_t, V).
    """
    return _next_token_loss(model, batch, label_smoothing, batch.source, batch.target)


def classification_loss(
    model: nn.Module, batch: Any, label_smoothing: float = 0.0, class_weights: Tensor | None = None
) -> Tensor:
    """Mean cross-entropy of the class in nats. Shape (). Every id from 0 is a class.

    batch: a `LabelledBatch`; model(source) gives logits (B, classes). class_weights (classes,): a mean weighted by
    class. Where the batch has `weights` (B,), a row's loss counts so many times in the mean over rows, so that a batch
    of doubtful rows moves the model less than one of sure ones.
    """
    logits = model(batch.source)
    weight = None if class_weights is None else class_weights.to(logits.device)
    if batch.weights is None:
        return cross_entropy(logits, batch.labels, weight=weight, label_smoothing=label_smoothing)
    losses = cross_entropy(logits, batch.labels, weight=weight, label_smoothing=label_smoothing, reduction="none")
    return (losses * batch.weights).mean()


def language_loss(model: nn.Module, batch: Any, label_smoothing: float = 0.0) -> Tensor:
    """Mean cross-entropy of the next token in nats, over positions that have one. Shape ().

    batch: a `PackedBatch`; model(source (1, total), cu_seqlens=...) gives logits (1, total, V).
    """
    return _next_token_loss(model, batch, label_smoothing, batch.source, cu_seqlens=batch.cu_seqlens)
