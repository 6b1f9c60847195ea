"""Bottleneck adapters (Houlsby et al. 2019, arXiv:1902.00751): small modules that learn while a model holds still."""

from typing import Any

from torch import Tensor, nn

SIZE = 32


class Bottleneck(nn.Module):
    """x + up(gelu(down(x))), of width `size` between; it starts as the identity."""

    def __init__(self, width: int, size: int = SIZE) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(width, size), nn.Linear(size, width)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.up(nn.functional.gelu(self.down(x)))


def add_bottlenecks(model: Any, size: int = SIZE) -> None:
    """Put a bottleneck behind the attention and behind the feed-forward of every layer of a model, in place.

    A module of our own: peft has no bottleneck adapters, and its (IA)3 cannot reach packed q, k and v.
    Raises TypeError for a model without such layers.
    """
    layers = [module for module in model.modules() if hasattr(module, "self_attn") and hasattr(module, "linear2")]
    if not layers:
        raise TypeError(f"a {type(model).__name__} has no layers to put adapters behind")
    for layer in layers:
        width = layer.linear2.out_features
        layer.self_attn.out_proj = nn.Sequential(layer.self_attn.out_proj, Bottleneck(width, size))
        layer.linear2 = nn.Sequential(layer.linear2, Bottleneck(width, size))
    model.adapters = size
