"""CausalStep: the packed step of pretrained decoders: grouped heads, rotation, RMS norms, gates, windows, caps."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from tileformer.decoder.generation.device import DeviceCache
from tileformer.decoder.generation.static import SHORT, StaticCache, parts_of
from tileformer.decoder.generation.step import Linear, PackedStep, Parts, norm_of, versions
from tileformer.decoder.sublayers import kernels_serve
from tileformer.kernels import add_rms_norm, append_kv_cache, attention, decode_attention, rms_norm


class Form(NamedTuple):
    """What a step has to know beside a model's modules. turn: cos and sin (positions, size / 2); head: (V, C)."""

    groups: int  # query heads that share one head of keys and values
    scale: float
    softcap: float | None
    windows: tuple[int | None, ...]
    turn: tuple[Tensor, Tensor] | None
    head: Tensor
    logit_softcap: float | None


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
    activation: Any
    gated: bool
    qkv: Linear
    out: Linear
    up: Linear
    down: Linear


ACTIVATIONS: dict[str, Any] = {
    "relu": F.relu, "gelu": F.gelu, "silu": F.silu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}  # fmt: skip


class CausalStep(PackedStep):
    """See `PackedStep`."""

    def __init__(self, parts: Parts, memory: int, form: Form) -> None:
        self.form, self.copies, self.memory = form, [], memory
        self.layers: Any = self._gather_layers(parts.layers)
        self.norm: Any = _norm(parts.norm)
        self.words, self.scale = parts.embedding.weight.detach(), parts.scale
        self.positions: Any = None if parts.position is None else parts.position.weight.detach()
        head = self._linear(form.head, None)
        cap = form.logit_softcap
        self.project: Any = head if cap is None else lambda x: torch.tanh(head(x) / cap) * cap
        self.like = self.words
        own = parts.layers[0].self_attn
        self.size, self.rotated = own.size, own.heads + own.heads_kv
        self.shape = (len(self.layers), own.heads_kv, own.size)
        if form.turn is not None:  # each for both halves of a head; the sine with the sign that a rolled half wants
            cos, sin = (x.to(torch.promote_types(self.words.dtype, torch.float32)) for x in form.turn)
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
                ACTIVATIONS[x.activation],
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
        logits = self.project(x)
        return logits if last is not None else logits.view(R, n, logits.shape[1])

    def _at(self, table: Tensor, at: Tensor) -> Tensor:
        return F.embedding(at.flatten(), table)

    def _through(self, x: Tensor, state: Any, turn: tuple[Tensor, Tensor] | None) -> Tensor:
        fused = kernels_serve(x)
        h = self.layers[0].norms[0](x)
        for i, layer in enumerate(self.layers):
            _, second, *behind = layer.norms
            y = layer.out(state.attend(i, self._turned(layer, layer.qkv(h), turn)))
            h, x = self._add(y if behind[0] is None else behind[0](y), x, second, fused)
            h = layer.up(h)
            gate, up = h.chunk(2, -1) if layer.gated else (h, None)
            h = layer.activation(gate)
            y = layer.down(h if up is None else h.mul_(up))
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

    def _turned(self, layer: CausalLayer, qkv: Tensor, turn: tuple[Tensor, Tensor] | None) -> Tensor:
        """Queries and keys of ``qkv`` (rows, heads * size) normalised and rotated, in place."""
        rows = qkv.view(len(qkv), -1, self.size)
        if layer.head_norms[0] is not None:
            heads = self.rotated - self.shape[1]
            for part, norm in zip((rows[:, :heads], rows[:, heads : self.rotated]), layer.head_norms, strict=True):
                part.copy_(norm(part))
        if turn is not None:
            x = rows[:, : self.rotated]
            x.copy_(torch.addcmul(x * turn[0], torch.roll(x, self.size // 2, -1), turn[1]))
        return qkv

    def cache(self, rows: int, capacity: int, host: bool, *source: Any) -> Any:
        """An empty cache of our form."""
        kind: Any = GroupedCache if host and self.cache_dtype is None else GroupedDeviceCache
        state = kind(self.shape, rows, capacity, self.like, None, None, self.cache_dtype)
        state.form, state.scale = self.form, self.form.scale
        return state


def _norm(norm: Any) -> Any:
    if norm is None or hasattr(norm, "bias"):
        return None if norm is None else norm_of(norm)
    eps = norm.eps if norm.eps is not None else torch.finfo(norm.weight.dtype).eps
    return RMS(tuple(norm.normalized_shape), norm.weight.detach(), eps, norm.weight.detach().new_tensor([eps]))


def _split(qkv: Tensor, rows: int, heads_kv: int, groups: int, size: int) -> tuple[Tensor, Tensor]:
    """q (R, H, n, D), and keys and values (2, R, H_kv, n, D)."""
    x = qkv.view(rows, -1, (groups + 2) * heads_kv, size).transpose(1, 2)
    return x[:, : groups * heads_kv], x[:, groups * heads_kv :].unflatten(1, (2, heads_kv)).transpose(0, 1)


class Grouped(StaticCache):
    """What both caches of grouped heads share."""

    form: Form

    def branch(self, beams: int, steps: int) -> None:
        """See `StaticCache.branch`. ValueError where a window is shorter than what beams come to: the slots that they
        share are not in the order of their tokens."""
        windows = [window for window in self.form.windows if window is not None]
        if windows and self.length + steps > min(windows):
            reached = f"a window of {min(windows)} tokens, got up to {self.length + steps}"
            raise ValueError(f"beams stay inside of {reached}: use_cache=False, or no beams")
        super().branch(beams, steps)


class GroupedCache(Grouped):
    """A `StaticCache` whose heads of keys and values have groups of queries, with windows and a soft cap."""

    def attend(self, layer: int, qkv: Tensor) -> Tensor:
        B, n, form = self.kv.shape[2], self.n, self.form
        q, kv = _split(qkv, B, self.heads, form.groups, self.head_dim)
        if self.at is None:
            self.new[layer].copy_(kv)
        else:
            rows, positions = self.at
            self.kv[layer].transpose(2, 3)[:, rows, positions] = kv.transpose(2, 3)
        window = form.windows[layer]
        if n > SHORT and self.at is None and n == self.slots:
            options: dict[str, Any] = {"scale": form.scale, "softcap": form.softcap or 0.0, "causal": True}
            if window is not None:
                options["window"] = (window - 1, 0)
            return attention(q, *kv.unbind(0), **options).transpose(1, 2).reshape(B * n, -1)
        sees = self.sees_now
        if window is not None and self.length + n > window:
            sees = self._within(window, sees)
        return self._grouped(q, self.keys[layer], self.values[layer], sees)

    def _within(self, window: int, sees: Tensor | None) -> Tensor:
        """``sees`` without the keys before the window of each query."""
        end = self.keys[0].shape[2]
        last = self.at[1] if self.at is not None else torch.arange(end - self.n, end, device=self.kv.device)[None]
        far = torch.arange(end, device=self.kv.device) <= last[:, None, :, None] - window
        hidden = self.kv.new_zeros(far.shape).masked_fill_(far, float("-inf"))
        return hidden if sees is None else hidden + sees

    def _grouped(self, q: Tensor, keys: Tensor, values: Tensor, sees: Tensor | None) -> Tensor:
        """The heads of a group are as many more queries of one head of keys."""
        (B, _, n, D), H, G, cap = q.shape, self.heads, self.form.groups, self.form.softcap
        q = q.reshape(B * H, G * n, D)
        scores = torch.baddbmm(self.ignored, q, keys, beta=0, alpha=self.scale)
        if cap is not None:
            scores = torch.tanh(scores / cap) * cap
        if sees is not None:
            scores.view(B, H, G, n, scores.shape[2]).add_(sees[:, :, None])
        out = torch.bmm(torch.softmax(scores, -1), values).view(B, H * G, n, D)
        return out.view(B, H * G * D) if n == 1 else out.transpose(1, 2).reshape(B * n, H * G * D)


class GroupedDeviceCache(Grouped, DeviceCache):
    """A `DeviceCache` whose heads of keys and values have groups of queries, with windows and a soft cap."""

    def attend(self, layer: int, qkv: Tensor) -> Tensor:
        R, n, form = len(self.row_lengths), self.n, self.form
        q, kv = _split(qkv, R, self.heads, form.groups, self.head_dim)
        keys, values, scales = parts_of(self.kv[layer], self.head_dim)
        if n > SHORT and self.length:
            raise ValueError(f"{n} tokens are a prompt, and this cache has read {self.length}: start with them")
        append_kv_cache(kv[0], kv[1], keys, values, self.filled, beams=self.beams, **scales)
        window = form.windows[layer]
        options: dict[str, Any] = {"scale": form.scale, "softcap": form.softcap or 0.0}
        if window is not None and self.beams == 1:  # beams stay inside of it
            options["window"] = (window - 1, 0)
        if n > SHORT:
            out = attention(q, *kv.unbind(0), causal=True, **options)
        else:
            more = dict(beams=self.beams, descends=self.descends)
            out = decode_attention(q, keys, values, self.filled, **more, **options, **scales)
        return out.transpose(1, 2).reshape(R * n, -1)
