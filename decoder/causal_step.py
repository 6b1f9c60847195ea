"""CausalStep: the packed step of pretrained decoders: grouped heads, rotation, RMS norms, gates, windows, caps."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from tileformer.decoder.generation.static import Form
from tileformer.decoder.generation.step import Linear, PackedStep, Parts, norm_of, versions
from tileformer.decoder.sublayers import kernels_serve
from tileformer.kernels import add_rms_norm, bias_activation_dropout, rms_norm, rotary


class RMS(NamedTuple):
    """RMS normalisation of rows (R, C)."""

    shape: tuple[int]
    weight: Tensor
    eps: float
    small: Tensor  # (1,), eps again: a number would be made a tensor at each call

    def __call__(self, x: Tensor) -> Tensor:
        if x.is_cuda or x.dtype not in (torch.float32, torch.float64):
            return rms_norm(x, self.shape, self.weight, self.eps)
        # Torch's own is seven operators on a CPU, and a twentieth of a step.
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        return x.mul(torch.addcmul(self.small, length, length, value=1 / self.shape[0]).rsqrt_()).mul_(self.weight)


class CausalLayer(NamedTuple):
    norms: tuple[Any, ...]  # before attention, before feed-forward; and behind each, or None
    head_norms: tuple[Any, Any]  # of queries and keys
    activation: str
    gated: bool
    qkv: Linear
    out: Linear
    up: Linear
    down: Linear


ACTIVATIONS: dict[str, Any] = {
    "relu": F.relu, "gelu": F.gelu, "silu": F.silu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}  # fmt: skip


class CausalStep(PackedStep):
    """See `PackedStep`. turn: cos and sin (positions, size / 2), or None; head: (V, C), the last map."""

    def __init__(
        self, parts: Parts, memory: int, form: Form, turn: tuple[Tensor, Tensor] | None, head: Tensor,
        logit_softcap: float | None,
    ) -> None:  # fmt: skip
        self.form, self.copies, self.memory = form, [], memory
        self.layers: Any = self._gather_layers(parts.layers)
        self.norm: Any = _norm(parts.norm)
        self.words, self.scale = parts.embedding.weight.detach(), parts.scale
        self.positions: Any = None if parts.position is None else parts.position.weight.detach()
        self.logits_of, self.logit_softcap = self._linear(head, None), logit_softcap
        self.like = self.words
        own = parts.layers[0].self_attn
        self.size, self.rotated = own.size, own.heads + own.heads_kv
        self.shape = (len(self.layers), own.heads_kv, own.size)
        if turn is not None:  # each for both halves of a head; the sine with the sign that a rolled half wants
            cos, sin = (x.to(torch.promote_types(self.words.dtype, torch.float32)) for x in turn)
            self.cos, self.sin = torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)
        self.versions = versions(parts)

    def is_current(self, parts: Parts) -> bool:
        return self.versions == versions(parts) and all(torch.equal(y[:, 0], w[0]) for w, y in self.copies)

    def _gather_layers(self, layers: list[Any]) -> list[CausalLayer]:
        maps = [{"down": self._linear(x.linear2.weight, x.linear2.bias)} for x in layers]
        for x, linears in zip(layers, maps, strict=True):
            own = x.self_attn
            linears["up"] = self._linear(x.linear1.weight, x.linear1.bias)
            linears["qkv"] = self._linear(own.qkv.weight, own.qkv.bias)
            linears["out"] = self._linear(own.out_proj.weight, own.out_proj.bias)
        return [
            CausalLayer(
                tuple(map(_norm, (x.norm1, x.norm2, x.norm3, x.norm4))),
                (_norm(x.self_attn.q_norm), _norm(x.self_attn.k_norm)),
                x.activation,
                x.gated,
                **linears,
            )
            for x, linears in zip(layers, maps, strict=True)
        ]

    def _logits(self, tokens: Tensor, state: Any, last: Tensor | None = None) -> Tensor:
        R, n = tokens.shape
        at = state.begin(n)
        with torch.inference_mode():
            x = F.embedding(tokens.flatten(), self.words)
            x = x if self.scale == 1.0 else x * self.scale
            turn = None
            if self.positions is not None:
                equal = isinstance(at, int)
                x = x + (self.positions[at : at + n].repeat(R, 1) if equal else self._at(self.positions, at))
            elif isinstance(at, int):  # (n, 1, size), for the heads of each row
                turn = self.cos[at : at + n, None].repeat(R, 1, 1), self.sin[at : at + n, None].repeat(R, 1, 1)
            else:
                at = at.expand(R, n)
                turn = self._at(self.cos, at)[:, None], self._at(self.sin, at)[:, None]
            x = self._through(x, state, turn)
            state.advance(n)
            if last is not None:
                x = x.view(R, n, x.shape[1])[torch.arange(R, device=x.device), last]
            x = self.norm(x)
        logits = self._project(x)
        return logits if last is not None else logits.view(R, n, logits.shape[1])

    def _project(self, x: Tensor) -> Tensor:
        """Logits (rows, V) of rows (rows, C)."""
        logits, cap = self.logits_of(x), self.logit_softcap
        return logits if cap is None else logits.div_(cap).tanh_().mul_(cap)

    def _at(self, table: Tensor, at: Tensor) -> Tensor:
        return F.embedding(at.flatten(), table)

    def _through(self, x: Tensor, state: Any, turn: tuple[Tensor, Tensor] | None) -> Tensor:
        fused, half = kernels_serve(x), self.size // 2
        if fused and turn is not None:
            turn = turn[0][..., :half], turn[1][..., half:]
        h = self.layers[0].norms[0](x)
        for i, layer in enumerate(self.layers):
            _, second, *behind = layer.norms
            y = layer.out(state.attend(i, self._turned(layer, layer.qkv(h), turn, fused)))
            h, x = self._add(y if behind[0] is None else behind[0](y), x, second, fused)
            h = layer.up(h)
            gate, up = h.chunk(2, -1) if layer.gated else (h, None)
            if fused:
                h = bias_activation_dropout(gate, layer.activation, up=up)
            else:
                h = ACTIVATIONS[layer.activation](gate)
                h = h if up is None else h.mul_(up)
            y = layer.down(h)
            y = y if behind[1] is None else behind[1](y)
            if i + 1 == len(self.layers):
                return y.add_(x)
            h, x = self._add(y, x, self.layers[i + 1].norms[0], fused)
        return x

    def _add(self, y: Tensor, x: Tensor, norm: Any, fused: bool) -> tuple[Tensor, Tensor]:
        """norm(x + y), and x + y."""
        if fused and isinstance(norm, RMS):
            return add_rms_norm(y, x, norm.weight, norm.eps)
        x = y.add_(x)
        return norm(x), x

    def _turned(self, layer: CausalLayer, qkv: Tensor, turn: tuple[Tensor, Tensor] | None, fused: bool) -> Tensor:
        """Queries and keys of ``qkv`` (rows, heads * size) normalised and rotated, in place."""
        rows = qkv.view(len(qkv), -1, self.size)
        if layer.head_norms[0] is not None:
            heads = self.rotated - self.shape[1]
            for part, norm in zip((rows[:, :heads], rows[:, heads : self.rotated]), layer.head_norms, strict=True):
                part.copy_(norm(part))
        if turn is not None:
            x = rows[:, : self.rotated]
            if fused:  # each row is a batch of one token
                x.copy_(rotary(x[:, :, None], *turn)[:, :, 0])
                return qkv
            x.copy_(torch.addcmul(x * turn[0], torch.roll(x, self.size // 2, -1), turn[1]))
        return qkv


def _norm(norm: Any) -> Any:
    if norm is None or hasattr(norm, "bias"):
        return None if norm is None else norm_of(norm)
    eps = norm.eps if norm.eps is not None else torch.finfo(norm.weight.dtype).eps
    return RMS(tuple(norm.normalized_shape), norm.weight.detach(), eps, norm.weight.detach().new_tensor([eps]))
