"""Two ways to use several checkpoints: one model with their mean weights, or the mean opinion of all (bagging)."""

import copy
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from tileformer.decoder import KVCache
from tileformer.kernels import log_softmax
from tileformer.training import checkpoint


def average_checkpoints(paths: Iterable[str | os.PathLike[str]]) -> dict[str, Tensor]:
    """The mean of the weights of several checkpoints (or run folders: their newest), for `model.load_state_dict`.

    The mean is taken in float32, or wider where the weights are, and given back in their own dtype; tensors that are not
    floating are the last one's. Tied weights are one tensor under all their names.

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
    ensemble of `Seq2Seq` also decodes with `generate`, each step by the mean over the models. Its `config` then counts
    all decoder layers. Raises ValueError for no models, or such whose vocabularies or special ids differ.
    """

    def __init__(self, models: Sequence[nn.Module]) -> None:
        super().__init__()
        if not models:
            raise ValueError("an ensemble needs at least one model")
        self.models = nn.ModuleList(models)
        self.eval()  # opinions, not training: dropout would be sampled
        configs: list[Any] = [model.config for model in models if hasattr(model, "config")]
        if configs and hasattr(configs[0], "num_decoder_layers"):
            for name in ("src_vocab", "tgt_vocab", "pad_id", "bos_id", "eos_id"):
                if len(values := {getattr(config, name) for config in configs}) > 1:
                    raise ValueError(f"an ensemble needs one {name}, the models have {sorted(values)}")
            layers = sum(config.num_decoder_layers for config in configs)
            length = min(config.max_length for config in configs)
            self.config = replace(configs[0], num_decoder_layers=layers, max_length=length)

    def forward(self, *inputs: Any, **options: Any) -> Tensor:
        """Log-probabilities (..., V) in float32 or wider: log of the mean over the models of softmax(logits)."""
        return _log_mean([model(*inputs, **options) for model in self.models])

    def encode(self, src: Tensor) -> tuple[Tensor, Tensor]:
        """The models' memories side by side, (B, T_s, sum of their widths), and the padding mask they share."""
        memories, paddings = zip(*(model.encode(src) for model in self.models), strict=True)  # type: ignore[operator]
        return torch.cat(memories, dim=-1), paddings[0]

    def decode(self, tgt: Tensor, memory: Tensor, src_padding: Tensor, cache: KVCache | None = None) -> Tensor:
        """Log-probabilities (B, T_t, V) as `Seq2Seq.decode` gives logits; `cache` holds the layers of all models."""
        outputs, layer = [], 0
        members: list[Any] = list(self.models)
        memories = memory.split([model.config.d_model for model in members], dim=-1)
        for model, own_memory in zip(members, memories, strict=True):
            own_cache, end = copy.copy(cache), layer + model.config.num_decoder_layers
            if own_cache is not None:
                own_cache.layers = own_cache.layers[layer:end]
            outputs.append(model.decode(tgt, own_memory, src_padding, own_cache))
            layer = end
        return _log_mean(outputs)


def _log_mean(logits: list[Tensor]) -> Tensor:
    """Log of the mean of softmax over the last axis."""
    wide = [log_softmax(x.to(torch.promote_types(x.dtype, torch.float32))) for x in logits]
    return torch.stack(wide).logsumexp(dim=0) - math.log(len(wide))
