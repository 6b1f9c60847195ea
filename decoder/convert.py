"""Swap torch.nn's modules inside an existing model for ours, and back.

A module keeps its identity: only its class changes, so parameters, buffers, hooks, flags and everything that holds the module stay as they are.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from tileformer.decoder.attention import MultiheadAttention
from tileformer.decoder.layer import TransformerDecoderLayer, TransformerEncoderLayer
from tileformer.decoder.modules import CrossEntropyLoss, Dropout, LayerNorm, LogSoftmax, RMSNorm, Softmax
from tileformer.decoder.transformer import Transformer, TransformerDecoder, TransformerEncoder

TWINS: dict[type[nn.Module], type[nn.Module]] = {
    nn.MultiheadAttention: MultiheadAttention,
    nn.TransformerEncoderLayer: TransformerEncoderLayer,
    nn.TransformerDecoderLayer: TransformerDecoderLayer,
    nn.TransformerEncoder: TransformerEncoder,
    nn.TransformerDecoder: TransformerDecoder,
    nn.Transformer: Transformer,
    nn.LayerNorm: LayerNorm,
    nn.RMSNorm: RMSNorm,
    nn.Dropout: Dropout,
    nn.Softmax: Softmax,
    nn.LogSoftmax: LogSoftmax,
    nn.CrossEntropyLoss: CrossEntropyLoss,
}


@dataclasses.dataclass
class Report:
    """What `convert` or `revert` did to a model, by the modules' names in it."""

    swapped: dict[str, str] = dataclasses.field(default_factory=dict)  # name -> old class -> new class
    left: dict[str, str] = dataclasses.field(default_factory=dict)  # name -> why

    def __str__(self) -> str:
        lines = [f"{len(self.swapped)} modules swapped, {len(self.left)} left"]
        lines += [f"  {name or '(the model)'}: {text}" for name, text in self.swapped.items()]
        lines += [f"  {name or '(the model)'} left: {why}" for name, why in self.left.items()]
        return "\n".join(lines)


def convert(model: nn.Module) -> Report:
    """Swap every module of ``model`` that we have a twin of, in place: attention, encoder and decoder (layers), Transformer,
    LayerNorm, RMSNorm, Dropout, Softmax, LogSoftmax, CrossEntropyLoss.

    A subclass is swapped if it overrides nothing that its twin computes; it stays an instance of its own class too.

    Returns:
        What was swapped, and what was left and why. Converting twice changes nothing.
    """
    report = Report()
    for name, module in model.named_modules():
        old = _plain(module)
        base = next((cls for cls in old.__mro__ if cls in TWINS), None)
        if base is None or issubclass(old, TWINS[base]):
            continue
        why = _unfit(module, old, base)
        if why:
            report.left[name] = f"{old.__name__}: {why}"
            continue
        _become(module, TWINS[base] if old is base else _joined(old, TWINS[base]))
        report.swapped[name] = f"{_title(old)} -> {_title(TWINS[base])}"
    return report


def revert(model: nn.Module) -> Report:
    """Give every module of ours in ``model`` torch's class again (or its own, that `convert` found), in place."""
    report = Report()
    for name, module in model.named_modules():
        new = _plain(module)
        if getattr(vars(module).get("forward"), "tileformer_swapped", False):
            del module.forward
            report.swapped[name] = f"tileformer's forward -> {_title(new)}"
            continue
        if issubclass(new, _Joined):
            old: Any = new.__bases__[1]
        else:
            old = next((base for base, twin in TWINS.items() if new is twin), None)
            if old is None:
                continue
        _become(module, old)
        if isinstance(module, nn.TransformerEncoderLayer) and "activation_relu_or_gelu" not in vars(module):
            module.activation_relu_or_gelu = {F.relu: 1, F.gelu: 2}.get(module.activation, 0)  # as torch's constructor
        report.swapped[name] = f"{_title(new)} -> {_title(old)}"
    return report


def _plain(module: nn.Module) -> type:
    """Its class; under torch's parametrisations, which give each module a class of its own, the one beneath."""
    return type(module).__bases__[0] if parametrize.is_parametrized(module) else type(module)


def _become(module: nn.Module, cls: type) -> None:
    own = type(module)
    if parametrize.is_parametrized(module):
        told = {name: x for name, x in vars(own).items() if name not in ("__dict__", "__weakref__")}
        cls = type(own.__name__, (cls,), told)
    module.__class__ = cls


def _title(cls: type) -> str:
    return f"{cls.__module__.split('.')[0]}'s {cls.__name__}"


def _unfit(module: nn.Module, old: type, base: type[nn.Module]) -> str:
    """Why a module cannot be swapped, "" if it can."""
    if isinstance(module, nn.Dropout) and module.inplace:
        return "it works in place, ours does not"
    computed = {name for name in vars(TWINS[base]) if name == "forward" or name.endswith("_block")}
    own = [cls for cls in old.__mro__[: old.__mro__.index(base)] if computed & set(vars(cls))]
    if own:
        return f"{own[0].__name__} has its own {', '.join(sorted(computed & set(vars(own[0]))))}"
    changed = computed & set(vars(module))
    return f"its {', '.join(sorted(changed))} was replaced" if changed else ""


class _Joined:
    """Of a class that `convert` made: a user's subclass that computes like our twin."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        cls = type(self)
        return _empty, cls.__bases__[1:], self.__dict__


_made: dict[tuple[type, type], type] = {}


def _joined(old: type, twin: type) -> type:
    """A class that is `old`, and `twin` where `old` says nothing."""
    if (old, twin) not in _made:
        told = {"__module__": old.__module__, "__qualname__": old.__qualname__}
        _made[old, twin] = type(old.__name__, (_Joined, old, twin), told)
    return _made[old, twin]


def _empty(old: type, twin: type) -> Any:
    """An object of `_joined(old, twin)` without a state, for pickle."""
    return object.__new__(_joined(old, twin))
