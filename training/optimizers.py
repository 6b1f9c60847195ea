"""Parameter groups, optimisers, schedules and initialisations, each chosen by name."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tileformer.training.settings import Settings

Groups = Sequence[dict[str, Any]]
NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase)

# 0.02 for the normal ones: GPT-2 (Radford et al. 2019) and BERT (Devlin et al. 2018, cut at two deviations).
INITIALISATIONS: dict[str, Callable[[Tensor], Any]] = {
    "xavier_uniform": nn.init.xavier_uniform_,
    "xavier_normal": nn.init.xavier_normal_,
    "kaiming_uniform": partial(nn.init.kaiming_uniform_, nonlinearity="relu"),
    "kaiming_normal": partial(nn.init.kaiming_normal_, nonlinearity="relu"),
    "normal": partial(nn.init.normal_, std=0.02),
    "trunc_normal": partial(nn.init.trunc_normal_, std=0.02, a=-0.04, b=0.04),
    "orthogonal": nn.init.orthogonal_,
}


def learning_rate_factor(progress: float, settings: Settings) -> float:
    """The learning rate as a share of `settings.lr`, at `progress` (0 to 1) of the budget.

    After the warm-up, with 1 at its end: "cosine" and "linear" fall to `floor` at the end of the budget; "wsd"
    (warm-up, stable, decay) stays and falls linearly over the last `decay` of it; "inverse_sqrt" falls as sqrt(warmup /
    progress) (Vaswani et al. 2017); "constant" stays; "plateau" stays here: it is the validation loss that lowers it.
    """
    if progress < settings.warmup:
        return progress / settings.warmup
    share = (min(1.0, progress) - settings.warmup) / (1 - settings.warmup)
    match settings.schedule:
        case "wsd":
            fall = 1 - min(1.0, max(0.0, progress - (1 - settings.decay)) / settings.decay)
        case "cosine":
            fall = 0.5 * (1 + math.cos(math.pi * share))
        case "linear":
            fall = 1 - share
        case "inverse_sqrt":
            fall = math.sqrt(settings.warmup / progress)
        case _:
            return 1.0
    return settings.floor + (1 - settings.floor) * fall


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Trainable parameters in two groups: decayed, and not: norms, biases, anything with fewer than two axes.

    Embeddings are decayed: an embedding tied to the output layer is a projection like any other, and decay pulls back
    the rows of symbols that are rarely seen.
    """
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    seen: set[nn.Parameter] = set()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad and parameter not in seen:
                seen.add(parameter)
                exempt = parameter.ndim < 2 or name.endswith("bias") or isinstance(module, NORMS)
                (plain if exempt else decayed).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]


def make_optimizer(model: nn.Module, settings: Settings, groups: Groups | None = None) -> torch.optim.Optimizer:
    """`settings.optimizer` over the trainable parameters of `model`, in decayed and plain groups.

    groups: {"params": parameters, "lr_scale": share of the learning rate} each, for rates that differ by layer; what no
    group names learns at the full rate, and frozen parameters are left out. Each group of the optimiser holds its
    `lr_scale`, and whether weights in it `shrink` under L1. AdamW updates fused where torch can (CPU and CUDA).

    Raises ValueError: nothing to train, a parameter in two groups or of another model, an unknown key in a group.
    """
    scales = _scales(model, groups or ())
    split = []
    for group, shrink in zip(parameter_groups(model, settings.weight_decay), (True, False), strict=True):
        for scale in dict.fromkeys(scales.get(parameter, 1.0) for parameter in group["params"]):
            chosen = [parameter for parameter in group["params"] if scales.get(parameter, 1.0) == scale]
            split.append({**group, "params": chosen, "lr_scale": scale, "shrink": shrink})
    if not split:
        raise ValueError(f"{type(model).__name__} has no trainable parameter: every one is frozen")
    match settings.optimizer:
        case "adamw":
            devices = {parameter.device.type for group in split for parameter in group["params"]}
            return torch.optim.AdamW(split, lr=settings.lr, betas=settings.betas, fused=devices <= {"cpu", "cuda"})
        case "sgd":
            # Not fused: torch's fused SGD leaves its momentum unwritten when the loss scale skips the first step.
            return torch.optim.SGD(split, lr=settings.lr, momentum=settings.momentum)
        case _:
            return torch.optim.RMSprop(split, lr=settings.lr, alpha=settings.betas[1], momentum=settings.momentum)


@torch.no_grad()
def shrink(optimizer: torch.optim.Optimizer, l1: float) -> None:
    """One proximal step of an L1 penalty: decayed weights move towards 0 by learning rate x `l1`, and stop there."""
    for group in optimizer.param_groups:
        if group["shrink"]:
            for parameter in group["params"]:
                parameter.copy_(nn.functional.softshrink(parameter, group["lr"] * l1))


@torch.no_grad()
def initialise(model: nn.Module, name: str) -> None:
    """Start `model`'s weights anew by one of `INITIALISATIONS`, and its biases at 0.

    Weights are trainable parameters with two axes or more. Norms and embeddings stay as their model made them: a norm
    starts at the identity, and the rows of a lookup have no fan-in to scale by.
    """
    if name not in INITIALISATIONS:
        raise ValueError(f"initialisation must be one of {', '.join(INITIALISATIONS)}, got {name!r}")
    kept = {p for module in model.modules() if isinstance(module, (*NORMS, nn.Embedding)) for p in module.parameters()}
    for full_name, parameter in model.named_parameters():
        if not parameter.requires_grad or parameter in kept:
            continue
        if full_name.endswith("bias"):
            parameter.zero_()
        elif parameter.ndim >= 2:
            INITIALISATIONS[name](parameter)


def _scales(model: nn.Module, groups: Groups) -> dict[nn.Parameter, float]:
    """The learning rate's share of every parameter that a group names."""
    own = set(model.parameters())
    scales: dict[nn.Parameter, float] = {}
    for group in groups:
        if unknown := group.keys() - {"params", "lr_scale"}:
            raise ValueError(f"a group holds params and lr_scale, got {min(unknown)!r}")
        for parameter in group["params"]:
            if parameter in scales or parameter not in own:
                found = "two groups" if parameter in scales else "a group, but not in the model"
                raise ValueError(f"a parameter of shape {tuple(parameter.shape)} is in {found}")
            scales[parameter] = float(group.get("lr_scale", 1.0))
    return scales
