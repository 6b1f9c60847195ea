"""Two ways to use several checkpoints: one model with their mean weights, or the mean opinion of all (bagging)."""

import math
import os
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tileformer.decoder.generation import JoinedState
from tileformer.kernels import log_softmax
from tileformer.training import checkpoint


def average_checkpoints(paths: Iterable[str | os.PathLike[str]]) -> dict[str, Tensor]:
    """The mean of the weights of several checkpoints (or run folders: their newest), for `model.load_state_dict`.

    The mean is taken in float32, or wider where the weights are, and given back in their own dtype; tensors that are
    not floating are the last one's. Tied weights are one tensor under all their names.

    Raises ValueError for no paths; CheckpointError for a damaged checkpoint or one of another model than the first.
    """
    mean: dict[str, Tensor] = {}
    dtypes: dict[str, torch.dtype] = {}
    count = 0
    for path in map(checkpoint.latest, paths):
        file, count = path / checkpoint.WEIGHTS, count + 1
        found, ties = checkpoint.read_tensors(file, "weights")
        shapes = {name: tensor.shape for name, tensor in found.items()}
        if mean and shapes != (wanted := {name: tensor.shape for name, tensor in mean.items()}):
            name = min(name for name in shapes | wanted if shapes.get(name) != wanted.get(name))
            difference = f"{name} of shape {shapes.get(name)}, the first one's has {wanted.get(name)}"
            raise checkpoint.CheckpointError(f"{file}: cannot be averaged with another model's: {difference}")
        for name, tensor in found.items():
            dtypes[name] = tensor.dtype
            wide = tensor.to(torch.promote_types(tensor.dtype, torch.float32)) if tensor.is_floating_point() else tensor
            # A running mean: a sum of many could leave the range that the mean keeps.
            mean[name] = torch.lerp(mean[name], wide, 1 / count) if name in mean and wide.is_floating_point() else wide
    if not mean:
        raise ValueError("no checkpoints to average")
    result = {name: tensor.to(dtypes[name]) for name, tensor in mean.items()}
    return result | {name: result[kept] for name, kept in ties.items() if kept in result}


class Ensemble(nn.Module):
    """Several models of one task as one, whose output is the log of their mean probability (Breiman 1996, bagging).

    models: each gives logits of one shape for the same input. A classifier is called, and so is a language model; an
    ensemble of models that `generate` decodes is decoded too, each step by the mean over the models. Raises ValueError
    for no models, or such whose vocabularies or special ids differ.
    """

    def __init__(self, models: Sequence[nn.Module]) -> None:
        super().__init__()
        if not models:
            raise ValueError("an ensemble needs at least one model")
        self.models = nn.ModuleList(models)
        self.eval()  # opinions, not training: dropout would be sampled
        configs: list[Any] = [model.config for model in models if hasattr(model, "config")]
        for name in ("src_vocab", "tgt_vocab", "vocab"):
            _common(name, configs)
        for name in ("pad_id", "bos_id", "eos_id", "conditioned"):
            if (value := _common(name, list(models))) is not None:
                setattr(self, name, value)
        lengths: list[Any] = [model.max_length for model in models if hasattr(model, "max_length")]
        if lengths:
            self.max_length = min(lengths)

    def forward(self, *inputs: Any, **options: Any) -> Tensor:
        """Log-probabilities (..., V) in float32 or wider: log of the mean over the models of softmax(logits)."""
        return _log_mean([model(*inputs, **options) for model in self.models])

    def start(self, tokens: Tensor, **options: Any) -> tuple[Tensor, JoinedState]:
        """As `Decodable.start`: log-probabilities in place of logits."""
        members: list[Any] = list(self.models)
        logits, states = zip(*(model.start(tokens, **options) for model in members), strict=True)
        return _log_mean(list(logits)), JoinedState(*states)

    def step(self, tokens: Tensor, state: JoinedState) -> Tensor:
        """As `Decodable.step`."""
        members: list[Any] = list(self.models)
        return _log_mean([model.step(tokens, own) for model, own in zip(members, state.states, strict=True)])


def _common(name: str, holders: Sequence[Any]) -> Any:
    """What all that have ``name`` say it is, None where nobody has. ValueError where they differ."""
    values = {getattr(holder, name) for holder in holders if hasattr(holder, name)}
    if len(values) > 1:
        raise ValueError(f"an ensemble needs one {name}, the models have {sorted(values)}")
    return next(iter(values), None)


def _log_mean(logits: list[Tensor]) -> Tensor:
    """Log of the mean of softmax over the last axis."""
    wide = [log_softmax(x.to(torch.promote_types(x.dtype, torch.float32))) for x in logits]
    return torch.stack(wide).logsumexp(dim=0) - math.log(len(wide))
