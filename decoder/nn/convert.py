"""Swap torch.nn's modules inside an existing model for ours, and back.

A module keeps its identity: only its class changes, so parameters, buffers, hooks, flags and everything that holds the
module stay as they are.
"""

from __future__ import annotations

import dataclasses
import types
from typing import Any

from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from tileformer.decoder.blocks import Attention, Block, Stack
from tileformer.decoder.nn.attention import MultiheadAttention
from tileformer.decoder.nn.layer import TransformerDecoderLayer, TransformerEncoderLayer
from tileformer.decoder.nn.modules import CrossEntropyLoss, Dropout, LayerNorm, LogSoftmax, RMSNorm, Softmax
from tileformer.decoder.nn.transformer import Transformer, TransformerDecoder, TransformerEncoder

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

WIDEST_HEAD = 256  # that `attention` takes


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
    """Swap every module of ``model`` that we have a twin of, in place: attention, encoder and decoder (layers),
    Transformer, LayerNorm, RMSNorm, Dropout, Softmax, LogSoftmax, CrossEntropyLoss.

    A subclass is swapped if it overrides nothing that its twin computes; it stays an instance of its own class too.

    Returns:
        What was swapped, and what was left and why. Converting twice changes nothing.

    Example:
        >>> model = nn.TransformerEncoderLayer(32, 4, batch_first=True)
        >>> print(str(convert(model)).splitlines()[0])
        7 modules swapped, 0 left
    """
    report = Report()
    for name, module in model.named_modules():
        old = _plain(module)
        base = next((cls for cls in old.__mro__ if cls in TWINS), None)
        if base is None or old is Attention or issubclass(old, (TWINS[base], _Unnested)):
            continue
        why = _unfit(module, old, base)
        if why:
            report.left[name] = f"{old.__name__}: {why}"
            if base is nn.TransformerEncoder:  # its layers, which may be ours, take no nested tensors
                _become(module, _joined(old, _Unnested))
            continue
        swap(module, TWINS[base])
        report.swapped[name] = f"{_title(old)} -> {_title(TWINS[base])}"
    return report


def revert(model: nn.Module) -> Report:
    """Give every module of ours in ``model`` torch's class again (or its own, that `convert` found), in place."""
    report = Report()
    for name, module in model.named_modules():
        new = _plain(module)
        old: Any
        old, twin = vars(new).get("_made_of") or (_torchs_class(module, new), new)
        if old is None:
            if isinstance(module, (_Joined, *TWINS.values())):
                report.left[name] = f"{new.__name__} was made on top of our class, not by `convert`"
            continue
        _become(module, old)
        for note in getattr(twin, "notes", ()):
            vars(module).pop(note, None)
        if isinstance(module, nn.TransformerEncoderLayer) and "activation_relu_or_gelu" not in vars(module):
            module.activation_relu_or_gelu = _fast_activation(module.activation)
        if isinstance(module, nn.TransformerEncoder) and "use_nested_tensor" not in vars(module):
            module.use_nested_tensor = False
        if not issubclass(new, _Unnested):
            report.swapped[name] = f"{_title(twin)} -> {_title(old)}"
    return report


def _torchs_class(module: Any, new: type) -> type[nn.Module] | None:
    """The class of torch.nn that a twin, or a part of our own models, computes the same as."""
    if new is Attention:
        return nn.MultiheadAttention
    if new is Block:
        return nn.TransformerEncoderLayer if module.multihead_attn is None else nn.TransformerDecoderLayer
    if new is Stack:
        return nn.TransformerEncoder if module.layers[0].multihead_attn is None else nn.TransformerDecoder
    return next((x for x, twin in TWINS.items() if new is twin), None)


def _fast_activation(activation: Any) -> int:
    """What torch's constructor of an encoder layer notes: 1 for ReLU, 2 for GELU, 0 where there is no fast path."""
    if activation is F.relu or isinstance(activation, nn.ReLU):
        return 1
    return 2 if activation is F.gelu or isinstance(activation, nn.GELU) else 0


def _plain(module: nn.Module) -> type:
    """Its class; under torch's parametrisations, which give each module a class of its own, the one beneath."""
    return type(module).__bases__[0] if parametrize.is_parametrized(module) else type(module)


def _become(module: nn.Module, cls: type) -> None:
    own = type(module)
    if parametrize.is_parametrized(module):
        told = {name: x for name, x in vars(own).items() if name not in ("__dict__", "__weakref__")}
        cls = type(own.__name__, (cls,), told)
    module.__class__ = cls


def swap(module: nn.Module, twin: type) -> None:
    """Make a module one of ``twin``'s, and of its own class where that is a user's; `revert` undoes it."""
    old = _plain(module)
    _become(module, twin if TWINS.get(old) is twin else _joined(old, twin))


def _title(cls: type) -> str:
    package = cls.__module__.split(".")[0]
    return f"{package}' {cls.__name__}" if package.endswith("s") else f"{package}'s {cls.__name__}"


def _unfit(module: nn.Module, old: type, base: type[nn.Module]) -> str:
    """Why a module cannot be swapped, "" if it can."""
    if isinstance(module, nn.Dropout) and module.inplace:
        return "it works in place, ours does not"
    if isinstance(module, nn.MultiheadAttention) and module.head_dim > WIDEST_HEAD:
        return f"heads of {module.head_dim} are wider than {WIDEST_HEAD}"
    twins = TWINS[base].__mro__[: TWINS[base].__mro__.index(base)]
    functions = {name for cls in twins for name, x in vars(cls).items() if isinstance(x, types.FunctionType)}
    computed = {name for name in functions if not name.startswith("__")}
    own = [cls for cls in old.__mro__[: old.__mro__.index(base)] if computed & set(vars(cls))]
    if own:
        return f"{own[0].__name__} has its own {', '.join(sorted(computed & set(vars(own[0]))))}"
    changed = computed & set(vars(module))
    return f"its {', '.join(sorted(changed))} was replaced" if changed else ""


class _Joined:
    """Of a class that `convert` made: a user's subclass that computes like our twin."""

    def __init_subclass__(cls) -> None:
        """The user's own is not told of a class that nobody wrote."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        made_of = vars(type(self)).get("_made_of")
        if made_of is None:  # another library has made a class of it
            return super().__reduce_ex__(protocol)
        return _empty, made_of, self.__getstate__()


class _Unnested:
    """Twin of an encoder that stays as it is but for this: it hands its layers no nested tensors."""

    use_nested_tensor = property(lambda self: False, lambda self, value: None)


_made: dict[tuple[type, type], type] = {}


def _joined(old: type, twin: type) -> type:
    """A class that is `old`, and `twin` where `old` says nothing; a twin that `leads` is asked first."""
    if (old, twin) not in _made:
        told = {"__module__": old.__module__, "__qualname__": old.__qualname__, "_made_of": (old, twin)}
        pair = (twin, old) if getattr(twin, "leads", False) else (old, twin)
        _made[old, twin] = type(old.__name__, (_Joined, *pair), told)
    return _made[old, twin]


def _empty(old: type, twin: type) -> Any:
    """An object of `_joined(old, twin)` without a state, for pickle."""
    return object.__new__(_joined(old, twin))
