"""PackedStep: one decoding step of a Transformer decoder, from weights that were gathered once.

A module's forward asks at every token what does not change between tokens: shapes, masks, hooks, autograd. The step
asks once, when decoding begins, and is then matmuls, norms and what a cache does with the projections. What it does not
know by name it leaves to the modules, and says why.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tileformer.decoder.generation.cache import KVCache, TokenState
from tileformer.decoder.generation.device import DeviceCache
from tileformer.decoder.generation.state import align_prompts, align_source
from tileformer.decoder.generation.static import PLAIN, SourceRows, StaticCache
from tileformer.decoder.sublayers import kernels_serve
from tileformer.kernels import add_layer_norm, layer_norm
from tileformer.kernels.backend import FASTEST, choose, current_backend


class Linear(NamedTuple):
    """``x @ weight + bias``: the weight is (inputs, outputs), a view of the module's or a copy in that layout; the bias
    (1, outputs), which one row need not expand."""

    weight: Tensor
    bias: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        return torch.mm(x, self.weight) if self.bias is None else torch.addmm(self.bias, x, self.weight)


class Norm(NamedTuple):
    """Layer normalisation of rows (R, C)."""

    shape: tuple[int]
    weight: Tensor | None
    bias: Tensor | None
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        # The operator itself: F.layer_norm is a call around it, a fifth of its cost on a row.
        return layer_norm(x, *self) if x.is_cuda else torch.native_layer_norm(x, *self)[0]


class Layer(NamedTuple):
    """What a step needs of one layer; ``source_q`` and ``source_out`` where it attends to a source."""

    norm_first: bool
    norms: tuple[Norm, ...]
    activation: Any
    qkv: Linear
    out: Linear
    up: Linear
    down: Linear
    source_q: Linear | None = None
    source_kv: Linear | None = None
    source_out: Linear | None = None


class Parts(NamedTuple):
    """The modules of a model that take part in a step. ``scale`` is that of the embeddings; or ``embed`` gives rows
    (R, n, C) of tokens and positions (R, n), and ``project`` the logits (rows, V) of rows (rows, C)."""

    layers: list[Any]  # a shared one several times
    norm: nn.Module | None
    modules: tuple[nn.Module, ...]  # all that take part, or hold what does
    embedding: Any = None
    position: Any = None
    scale: float = 1.0
    encoder: Parts | None = None
    embed: Any = None
    project: Any = None


class PackedStep:
    """Tokens (R, n) and a cache in, logits out: see `Decodable.step`.

    Of matrices that fit into ``memory`` times the model's weights it keeps copies with their inputs first, which a CPU
    multiplies 1.3 to 2 times as fast for up to 64 rows; the others are the parameters themselves.
    """

    captures = True  # whether a step on a GPU becomes a CUDA graph
    cache_dtype: torch.dtype | None = None  # of keys and values, the weights' where it is None
    form = PLAIN  # of the attention among the rows' own tokens

    def __init__(self, parts: Parts, memory: int) -> None:
        self.copies: list[tuple[Tensor, Tensor]] = []  # each with the parameter that it is a copy of
        self.memory = memory  # bytes that copies may still take
        layers = list(dict.fromkeys(parts.layers))
        packed = dict(zip(layers, self._gather(layers), strict=True))
        self.layers = [packed[layer] for layer in parts.layers]
        self.uniform = len({layer.norm_first for layer in self.layers}) == 1
        self.norm = None if parts.norm is None else norm_of(parts.norm)
        self.embed, self.project = parts.embed, parts.project
        if self.embed is None:
            self.embed = self._embed
            self.words, self.scale = parts.embedding.weight.detach(), parts.scale
            # wide, because a sum of two halves is rounded once
            self.positions = parts.position.weight.detach().to(_wide(self.words)) * self.scale
            self.project = Linear(self.words.t(), None)
        self.like = layers[0].linear1.weight.detach()  # of the step's dtype, on its device
        first = layers[0].self_attn
        self.shape = (len(self.layers), first.num_heads, first.head_dim)
        self.versions = versions(parts)

    def is_current(self, parts: Parts) -> bool:
        """Whether the model still has the weights that were gathered.

        A parameter tells by its version what was written to it, but for what was written to its ``.data``: copies are
        compared by one row as well."""
        if self.versions != versions(parts):
            return False
        if parts.embed is None:
            position = parts.position.weight.detach()[0].to(self.positions.dtype) * self.scale
            if not torch.equal(position, self.positions[0]):
                return False
        return all(torch.equal(y[:, 0], w[0]) for w, y in self.copies)

    @torch.no_grad()
    def __call__(self, tokens: Tensor, state: Any, last: Tensor | None = None) -> Tensor:
        """Logits (R, n, V) behind each of ``tokens`` (R, n); (R, V) with ``last`` (R,): behind that one of each row."""
        if tokens.is_cuda and last is None and isinstance(state, DeviceCache) and self.captures:
            return state.replayed(tokens, self._logits)
        return self._logits(tokens, state, last)

    def _logits(self, tokens: Tensor, state: Any, last: Tensor | None = None) -> Tensor:
        R, n = tokens.shape
        x = self.embed(tokens, state.begin(n)).flatten(0, -2)
        with torch.inference_mode():
            x, norm = self._rows(x, state)
            state.advance(n)
            if last is not None:
                x = x.view(R, n, x.shape[1])[torch.arange(R, device=x.device), last]
            x = x if norm is None else norm(x)
        logits = self.project(x)  # outside: who adjusts logits in place cannot do it to an inference tensor
        return logits if last is not None else logits.view(R, n, logits.shape[1])

    def _embed(self, tokens: Tensor, at: int | Tensor) -> Tensor:
        R, n = tokens.shape
        if isinstance(at, int):
            x = self.positions[at : at + n]
            x = x if n == 1 else x.repeat(R, 1)
        else:
            x = F.embedding(at.flatten(), self.positions)
        return torch.add(x, F.embedding(tokens.flatten(), self.words), alpha=self.scale).to(self.words.dtype)

    def _rows(self, x: Tensor, state: Any) -> tuple[Tensor, Norm | None]:
        """x behind all layers, and the norm that is still to come."""
        if not (self.uniform and kernels_serve(x)):
            for i, layer in enumerate(self.layers):
                x = self._layer(i, layer, x, state)
            return x, self.norm
        first = self.layers[0].norm_first
        behind = [*(layer.norms[0] for layer in self.layers[1:]), self.norm] if first else [None] * len(self.layers)
        h = self.layers[0].norms[0](x) if first else x
        for i, layer in enumerate(self.layers):
            h, x = self._fused_layer(i, layer, h, x, state, behind[i])
        return h, None if first else self.norm

    def _layer(self, i: int, layer: Layer, x: Tensor, state: Any) -> Tensor:
        first, norms = layer.norm_first, layer.norms
        x = layer.out(state.attend(i, layer.qkv(norms[0](x) if first else x))).add_(x)
        x = x if first else norms[0](x)
        if layer.source_q is not None and layer.source_out is not None:
            x = layer.source_out(state.attend_source(i, layer.source_q(norms[1](x) if first else x))).add_(x)
            x = x if first else norms[1](x)
        x = layer.down(layer.activation(layer.up(norms[-1](x) if first else x))).add_(x)
        return x if first else norms[-1](x)

    def _fused_layer(
        self, i: int, layer: Layer, h: Tensor, x: Tensor, state: Any, behind: Norm | None
    ) -> tuple[Tensor, Tensor]:
        """`_layer` in fewer launches: of h, which is normalised, and the residual x; with the norm ``behind`` it."""
        norms = [*layer.norms[1:], behind] if layer.norm_first else layer.norms
        h, x = self._end(layer, layer.out, state.attend(i, layer.qkv(h)), x, norms[0])
        if layer.source_q is not None and layer.source_out is not None:
            h, x = self._end(layer, layer.source_out, state.attend_source(i, layer.source_q(h)), x, norms[1])
        up = layer.up
        if layer.activation is F.relu and up.bias is not None and hasattr(torch, "_addmm_activation"):
            h = torch._addmm_activation(up.bias[0], h, up.weight)
        else:
            h = layer.activation(up(h))
        return self._end(layer, layer.down, h, x, norms[-1])

    def _end(self, layer: Layer, linear: Linear, h: Tensor, x: Tensor, norm: Norm | None) -> tuple[Tensor, Tensor]:
        if norm is None:
            x = linear(h).add_(x)
            return x, x
        h, bias = torch.mm(h, linear.weight), None if linear.bias is None else linear.bias[0]
        return add_layer_norm(h, x, norm.weight, norm.bias, norm.eps, x_bias=bias, norm_first=layer.norm_first)

    def start(
        self, tokens: Tensor, lengths: Tensor, shortest: int, capacity: int, keys: Any, padding: Any, beams: int
    ) -> tuple[Tensor, StaticCache]:
        """`Decodable.start` for aligned prompts of ``lengths`` (B,), and what `source` made of a source."""
        host = choose("decode_attention", self.like) == "torch" and self.like.device.type == "cpu"
        kind = StaticCache if host and self.cache_dtype is None else DeviceCache
        state = kind(self.shape, len(tokens), capacity, self.like, keys, padding, self.cache_dtype, self.form)
        state.step = self
        logits = self(tokens, state, last=lengths - 1)
        if shortest < tokens.shape[1]:
            state.set_lengths(lengths.to(torch.int32))
        if beams > 1:
            state.branch(beams, capacity - shortest)  # a short prompt has more room behind it
            logits = logits.repeat_interleave(beams, 0)
        return logits, state

    @torch.no_grad()
    def encode(self, source: Tensor, padding: Tensor) -> Tensor:
        """Memory (B * T, C) of ``source`` (B, T), whose ``padding`` (B, T) is True where there is no token."""
        x, norm = self._rows(self._embed(source, 0), SourceRows(self.shape, padding))
        return x if norm is None else norm(x)

    def source(self, memory: Tensor, padding: Tensor) -> list[Tensor]:
        """Keys and values (B, T, 2, H, D) of each layer from a source's ``memory`` (B * T, C)."""
        _, H, D = self.shape
        return [layer.source_kv(memory).view(*padding.shape, 2, H, D) for layer in self.layers if layer.source_kv]

    def _gather(self, layers: list[Any]) -> list[Layer]:
        """The matrices that gain most come first into what memory there is: those with the most inputs."""
        maps = [{"down": self._linear(*_affine(x.linear2)), "up": self._linear(*_affine(x.linear1))} for x in layers]
        for x, linears in zip(layers, maps, strict=True):
            own, cross = x.self_attn, getattr(x, "multihead_attn", None)
            linears["out"] = self._linear(*_affine(own.out_proj))
            if cross is not None:
                C = cross.embed_dim
                bias = (None, None) if cross.in_proj_bias is None else cross.in_proj_bias.split((C, 2 * C))
                weight = cross.in_proj_weight.split((C, 2 * C))
                linears["source_out"] = self._linear(*_affine(cross.out_proj))
                linears["source_q"] = self._linear(weight[0], bias[0])
                linears["source_kv"] = Linear(weight[1].detach().t(), _row(bias[1]))
            linears["qkv"] = self._linear(own.in_proj_weight, own.in_proj_bias)
        return [
            Layer(bool(x.norm_first), _norms(x), x.activation, **linears)
            for x, linears in zip(layers, maps, strict=True)
        ]

    def _linear(self, weight: Tensor, bias: Tensor | None) -> Linear:
        weight = weight.detach()
        size = weight.numel() * weight.element_size()
        if weight.device.type != "cpu" or size > self.memory:
            return Linear(weight.t(), _row(bias))
        self.memory -= size
        copy = weight.t().contiguous()
        self.copies.append((weight, copy))
        return Linear(copy, _row(bias))


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _detached(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.detach()


def _row(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.detach()[None]


def norm_of(norm: Any) -> Norm:
    return Norm(tuple(norm.normalized_shape), _detached(norm.weight), _detached(norm.bias), norm.eps)


def _norms(layer: Any) -> tuple[Norm, ...]:
    norms = (getattr(layer, name, None) for name in ("norm1", "norm2", "norm3"))
    return tuple(norm_of(norm) for norm in norms if norm is not None)


def _affine(linear: Any) -> tuple[Tensor, Tensor | None]:
    return linear.weight, linear.bias


def _modules(parts: Parts) -> Iterator[nn.Module]:
    pending: list[nn.Module | None] = [*parts.modules]
    while pending:
        if (module := pending.pop()) is not None:
            yield module
            pending += module._modules.values()


def _parameters(parts: Parts) -> Iterator[Tensor]:
    for module in _modules(parts):
        yield from (parameter for parameter in module._parameters.values() if parameter is not None)


def versions(parts: Parts) -> list[tuple[int, int, int]]:
    # What was made in inference mode counts no versions; it cannot be trained.
    return [(id(x), 0 if x.is_inference() else x._version, x.data_ptr()) for x in _parameters(parts)]


def why_not_packed(parts: Parts, known: frozenset[type]) -> str | None:
    """Why these modules cannot be gathered into a step, in words; None: they can."""
    if torch.nn.modules.module._global_forward_hooks or torch.nn.modules.module._global_forward_pre_hooks:
        return "a hook watches every module"
    for module in _modules(parts):
        kind = type(module)
        if kind not in known:
            return f"{kind.__module__}.{kind.__qualname__} is not a module that the step knows"
        if module.training:
            return "a module is in training mode"
        if module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__:
            return f"a {kind.__name__} has a hook, or a forward of its own"
        if isinstance(module, nn.MultiheadAttention) and (
            module.in_proj_weight is None or module.bias_k is not None or module.add_zero_attn
        ):
            return "an attention projects keys of another width, or adds keys of its own"
    weight = parts.layers[0].linear1.weight
    if weight.device.type == "cpu" and weight.dtype not in (torch.float32, torch.float64):
        return f"on the CPU {weight.dtype} is computed wider and rounded once, by the modules"
    recording = torch.is_grad_enabled()
    for parameter in _parameters(parts):
        if type(parameter) is not nn.Parameter:
            return f"a weight is a {type(parameter).__name__}"
        if parameter.dtype != weight.dtype or parameter.device != weight.device:
            return "the weights are of several dtypes or devices"
        if recording and parameter.requires_grad:
            return "gradients are being recorded"
    if torch.is_autocast_enabled(weight.device.type):
        return "autocast chooses the dtype of each operator"
    return None


_steps: weakref.WeakKeyDictionary[nn.Module, dict[str, PackedStep]] = weakref.WeakKeyDictionary()


def packed_step(model: Any, parts: Parts, name: str = "decoder") -> PackedStep:
    """The step over these parts of a model, gathered anew where their weights have changed."""
    steps = _steps.setdefault(model, {})
    if name not in steps or not steps[name].is_current(parts):
        steps.pop(name, None)  # two steps' copies are never held at once
        share = model.step_memory if name == "decoder" else 0.0  # an encoder runs once
        total = sum(p.numel() * p.element_size() for p in model.parameters())
        steps[name] = model.packed(parts, int(share * total))
    steps[name].captures, steps[name].cache_dtype = model.step_captures, model.cache_dtype
    return steps[name]


class Decoding:
    """``start`` and ``step`` of our own models, which are `Decodable` by it.

    A model says what it reads at every step beside its tokens (``inputs_of`` a source), gives the logits of tokens
    (``read``, as its forward), and names its ``parts`` and the modules that a `PackedStep` may stand for.
    """

    def packed(self, parts: Parts, memory: int) -> PackedStep:
        """The step over some parts, gathered."""
        return PackedStep(parts, memory)

    step_memory = 0.3  # bytes of a step's copies at the most, as a share of the weights'
    step_captures = True  # on a GPU: as a CUDA graph, from a state's second step on
    cache_dtype: torch.dtype | None = None  # torch.int8: keys and values in 8 bits, a scale for each token and head

    pad_id: int
    max_length: int
    num_layers: int
    read: Any
    inputs_of: Any
    parts: Any
    _check_source: Any
    known_modules: frozenset[type]

    def start(
        self, tokens: Tensor, *, capacity: int, source: Tensor | None = None, beams: int = 1, use_cache: bool = True
    ) -> tuple[Tensor, KVCache | TokenState | StaticCache]:
        """See `Decodable.start`; without ``use_cache`` every step reads all tokens again: the same logits, for
        comparison."""
        parts = self.parts()
        tokens, lengths, shortest, longest = align_prompts(tokens, self.pad_id, _vocabulary(parts))
        if source is not None and parts.encoder is not None:
            source = align_source(source, self.pad_id, _vocabulary(parts.encoder))
        if not longest <= capacity <= self.max_length:
            raise ValueError(
                f"capacity must be from the {longest} tokens of a prompt to the model's {self.max_length}, "
                f"got {capacity}"
            )
        reason = self.why_modules() if use_cache else None
        if use_cache:
            self.check_cache(reason)
        if use_cache and reason is None:
            step = packed_step(self, parts)
            return step.start(tokens, lengths, shortest, capacity, *self.source_keys(step, source, len(tokens)), beams)
        inputs = self.inputs_of(source)
        state: Any = KVCache(self.num_layers, capacity, *inputs) if use_cache else TokenState(tokens, capacity, *inputs)
        logits = self.read(tokens, *inputs, cache=state if use_cache else None)
        if shortest < longest:
            state.row_lengths = lengths.to(torch.int32)
            logits = logits[torch.arange(len(tokens), device=tokens.device), lengths - 1]
        else:
            logits = logits[:, -1]
        if beams > 1:
            rows = torch.arange(len(tokens), device=tokens.device).repeat_interleave(beams)
            state.select(rows)
            logits = logits[rows]
        return logits, state

    def step(self, tokens: Tensor, state: Any) -> Tensor:
        """See `Decodable.step`."""
        new = tokens if tokens.dim() == 2 else tokens[:, None]
        if (packed := getattr(state, "step", None)) is not None:
            logits = packed(new, state)
        elif not isinstance(state, TokenState):
            logits = self.read(new, *state.inputs, cache=state)
        else:
            state.append(new)
            logits = self.read(state.tokens[:, : state.length], *state.inputs, cache=None)
            if state.row_lengths is None:
                logits = logits[:, -new.shape[1] :]
            else:
                last = state.row_lengths.long()[:, None] + torch.arange(-new.shape[1], 0, device=tokens.device)
                logits = logits.gather(1, last.clamp(min=0)[..., None].expand(-1, -1, logits.shape[2]))
        return logits if tokens.dim() == 2 else logits[:, 0]

    def explain(self) -> str:
        """What decodes this model: a packed step, or its modules, and why."""
        with torch.no_grad():  # as `generate`
            reason = self.why_modules()
        what = "a packed step, of weights gathered once" if reason is None else f"its modules: {reason}"
        weight = next(self.parameters())  # type: ignore[attr-defined]
        fastest = current_backend() == "fastest" and choose("attention", weight) == "triton"
        return f"{what}; {FASTEST}" if fastest else what

    def check_cache(self, reason: str | None) -> None:
        """Raise ValueError for a ``cache_dtype`` that what decodes the model does not have, for the ``reason`` why its
        modules do."""
        if self.cache_dtype not in (None, torch.int8):
            raise ValueError(f"cache_dtype is {self.cache_dtype}: set torch.int8, or None for the weights' own dtype")
        if self.cache_dtype is not None and reason is not None:
            raise ValueError(
                f"cache_dtype is {self.cache_dtype}, which only a packed step has, and the modules decode this model: "
                f"{reason}: change that, or set cache_dtype = None"
            )

    def source_keys(self, step: PackedStep, source: Tensor | None, rows: int) -> tuple[Any, Any]:
        """Keys and values of each layer from the sources of so many rows, and their padding; None where none has
        one."""
        encoder = self.parts().encoder
        if encoder and source is not None and why_not_packed(encoder, self.known_modules) is None:
            self._check_source(source)
            padding = source == self.pad_id
            return step.source(packed_step(self, encoder, "encoder").encode(source, padding), padding), padding
        if not (inputs := self.inputs_of(source)):
            return None, None
        memory, padding = inputs
        return step.source(memory.flatten(0, 1), padding), padding

    def why_modules(self) -> str | None:
        for cls in type(self).__mro__:
            if cls.__module__.startswith("tileformer.decoder."):
                break
            if own := _READERS & vars(cls).keys():
                return f"{cls.__qualname__} has a {min(own)} of its own"
        if own := _READERS & self.__dict__.keys():
            return f"the model was given a {min(own)} of its own"
        if self._forward_hooks or self._forward_pre_hooks:  # type: ignore[attr-defined]
            return "the model has a hook"
        return why_not_packed(self.parts(), self.known_modules)


def _vocabulary(parts: Parts) -> int | None:
    return getattr(parts.embedding, "num_embeddings", None)


_READERS = {"forward", "encode", "decode", "read", "states", "step", "_embed", "_embed_source"}
