"""The gated feed-forward block of transformers' models (swiglu, geglu), for `huggingface.use`."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import torch
from torch import Tensor, nn

from tileformer.decoder.nn.convert import Report, swap
from tileformer.kernels import bias_activation_dropout
from tileformer.kernels.backend import choose

_PARTS = {"gate_proj", "up_proj", "down_proj", "act_fn"}
_ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu")


class GatedMLP:
    """What `use` puts before the class of such a block (LlamaMLP, Qwen2MLP, GemmaMLP), which it stays:
    activation and product are one kernel. Where plain torch operators serve the call (a CPU), the block computes them.
    """

    leads = True  # over the class that it is joined with, see `convert`
    notes = ("_tileformer_activation",)
    _tileformer_activation: str

    def forward(self: Any, x: Tensor) -> Tensor:
        """down_proj(act_fn(gate_proj(x)) * up_proj(x))."""
        if choose("bias_activation_dropout", x) in ("torch", "reference"):
            return super().forward(x)  # type: ignore[misc]
        gate, up = self.gate_proj(x), self.up_proj(x)
        return self.down_proj(bias_activation_dropout(gate, self._tileformer_activation, up=up))


def swap_gated_mlps(model: nn.Module, report: Report) -> None:
    """Let transformers' own blocks of a gate, an activation and two more maps multiply in one kernel, if they compute
    just that."""
    for name, module in model.named_modules():
        kind = type(module)
        theirs = kind.__module__.startswith("transformers") and vars(module)["_modules"].keys() == _PARTS
        if not theirs or name in report.left or isinstance(module, GatedMLP):
            continue
        activation = "" if "forward" in vars(module) else _activation_of(module)
        if not activation:
            report.left[name] = f"{kind.__name__}: it computes something else than down(act(gate(x)) * up(x))"
            continue
        swap(module, GatedMLP)
        module._tileformer_activation = activation
        report.swapped[name] = f"transformers' {kind.__name__} -> tileformer's bias_activation_dropout"


def _activation_of(module: Any) -> str:
    """Our name of the activation of a block that computes what ours does, "" for another: tried on the CPU with maps
    that multiply by a number."""
    if len(inspect.signature(type(module).forward).parameters) != 2:
        return ""
    trial, x = copy.copy(module), torch.linspace(-4, 4, 81, device="cpu").view(1, 81)
    maps = dict(gate_proj=lambda x: 1.5 * x, up_proj=lambda x: x - 0.5, down_proj=lambda x: 3 * x)
    vars(trial)["_modules"] = maps | dict(act_fn=module.act_fn)
    try:
        with torch.no_grad():
            expected = type(module).forward(trial, x)
    except Exception:  # it asks its maps for more than a map has
        return ""
    for activation in _ACTIVATIONS:
        ours = 3 * bias_activation_dropout(1.5 * x, activation, up=x - 0.5)
        if ours.shape == expected.shape and torch.allclose(ours, expected, 1e-5, 1e-5):
            return activation
    return ""
