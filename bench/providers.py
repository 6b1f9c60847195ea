"""Who is timed: for each op the callables of tileformer, of PyTorch and of other libraries where they are installed.

    call = providers("attention")["sdpa flash"](workload)
    out = call(*workload.inputs("cuda", torch.bfloat16))

What a provider cannot do raises `Unavailable`, whose text is printed. A peer's own extension of the call is never emulated: it does what its public
function does. Masks in another form, and block masks, are made at the first call and kept, so they are outside every timing.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from tileformer import kernels
from tileformer.bench.workloads import Workload
from tileformer.decoder import TransformerDecoderLayer
from tileformer.kernels import launch

Call = Callable[[dict[str, Tensor], dict[str, Any]], Tensor]
Build = Callable[[Workload], Call]
OURS = "tileformer"
COMPILED = ("torch.compile", "flex")  # a compilation of seconds for every shape
compile_backend = "inductor"  # a dry run traces and differentiates with "aot_eager", and generates no code


class Unavailable(Exception):
    """A provider that cannot serve a workload here; the text says why."""


def providers(op: str) -> dict[str, Build]:
    """The providers of an op, ours first. Building or calling one may raise `Unavailable`."""
    return _PROVIDERS[op]


def reference(workload: Workload) -> Call:
    """The definition: what a provider's result is compared with, in float64. With dropout only where the bits are given by a seed."""
    if workload.op == "decoder_layer":
        return _layer(nn.TransformerDecoderLayer)(workload)
    return lambda tensors, options: getattr(kernels.reference, workload.op)(**tensors, **options)


def _package(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and name.startswith(error.name):
            raise Unavailable(f"{error.name} is not installed") from None
        raise Unavailable(f"{name} cannot be imported: {error}") from None
    except Exception as error:  # a package may look for a GPU, or for another torch, while it is imported
        raise Unavailable(f"{name} cannot be imported: {type(error).__name__}: {error}") from None


def _refuse(reasons: dict[str, Any]) -> None:
    """Raise with the first reason that holds."""
    for reason, holds in reasons.items():
        if holds:
            raise Unavailable(reason)


def _needs_gpu(x: Tensor) -> None:
    _refuse({"runs on CUDA tensors only": not (x.is_cuda or launch.recording())})


def _ours(workload: Workload) -> Call:
    op = getattr(kernels, workload.op)
    return lambda tensors, options: op(**tensors, **options)


def _compiled(build: Build) -> Build:
    """What `torch.compile` makes of a provider."""

    def compiled(workload: Workload) -> Call:
        call = _compile(build(workload))

        def run(tensors: dict[str, Tensor], options: dict[str, Any]) -> Tensor:
            _refuse_slow_compilation(next(iter(tensors.values())))
            return call(tensors, options)

        return run

    return compiled


def _compile(function: Any) -> Any:
    torch.compiler.reset()  # the limit on recompilations counts all shapes of a function, and beyond it runs it uncompiled
    return torch.compile(function, fullgraph=True, dynamic=False, backend=compile_backend)


def _refuse_slow_compilation(x: Tensor) -> None:
    _refuse(
        {"a compilation takes minutes on a CPU: timed on CUDA only": compile_backend == "inductor" and not x.is_cuda}
    )


class _Pair(torch.autograd.Function):
    """A forward and a backward that a package offers as two functions: forward() returns (y, what backward(dy, ...) needs)."""

    @staticmethod
    def forward(ctx, forward, backward, *tensors):
        y, saved = forward(*tensors)
        ctx.backward_of, ctx.saved = backward, saved
        return y

    @staticmethod
    def backward(ctx, dy):
        return None, None, *ctx.backward_of(dy, *ctx.saved)


# ---- attention. Tensors q, k, v; options mask, key_mask, causal, dropout_p, seed.


def _dense_mask(tensors: dict[str, Tensor], options: dict[str, Any]) -> Tensor | None:
    """`mask`, or `key_mask` as one: broadcastable to (B, H, T_q, T_k). No workload has both."""
    padding = options.get("key_mask")
    return options.get("mask") if padding is None else padding[:, None, None, :]


@functools.lru_cache(maxsize=4)
def _future(t_q: int, t_k: int, device: torch.device) -> Tensor:
    return torch.ones(t_q, t_k, dtype=torch.bool, device=device).triu(1)


def _eager_attention(workload: Workload) -> Call:
    def attend(tensors: dict[str, Tensor], options: dict[str, Any]) -> Tensor:
        q, k, v = tensors["q"], tensors["k"], tensors["v"]
        group = q.shape[1] // k.shape[1]
        if group > 1:
            k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
        mask = _dense_mask(tensors, options)
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
        if options.get("causal"):
            scores = scores.masked_fill(_future(q.shape[2], k.shape[2], q.device), -torch.inf)
        return F.dropout(scores.softmax(-1), options.get("dropout_p", 0.0)) @ v

    return attend


def _sdpa(backend: SDPBackend | None) -> Build:
    def build(workload: Workload) -> Call:
        s, known = workload.sizes, []
        options_of = {"is_causal": bool(workload.options.get("causal")), "enable_gqa": s["H"] != s["H_kv"]}
        options_of["dropout_p"] = workload.options.get("dropout_p", 0.0)

        def attend(tensors: dict[str, Tensor], options: dict[str, Any]) -> Tensor:
            mask, more = _dense_mask(tensors, options), dict(options_of)
            if mask is not None and more["is_causal"]:  # torch takes one of them
                mask, more["is_causal"] = mask & ~_future(s["T_q"], s["T_k"], mask.device), False
            if backend is None:
                return F.scaled_dot_product_attention(*tensors.values(), attn_mask=mask, **more)
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(*tensors.values(), attn_mask=mask, **more)

        def first(tensors: dict[str, Tensor], options: dict[str, Any]) -> Tensor:
            if known:
                return attend(tensors, options)
            with warnings.catch_warnings(record=True) as caught:  # torch says why in warnings
                warnings.simplefilter("always")
                try:
                    out = attend(tensors, options)
                except torch.OutOfMemoryError:
                    raise
                except RuntimeError as error:
                    said = [str(w.message).split(" (Triggered")[0] for w in caught]
                    because = [
                        line for line in said if "kernel not used because" not in line and "disabled" not in line
                    ]
                    raise Unavailable("; ".join(because) or str(error).splitlines()[0]) from None
            known.append(True)
            return out

        return first

    return build


def _flex(workload: Workload) -> Call:
    _refuse({"has no dropout": workload.dropout})
    attend = _compile(flex_attention)
    s, blocks = workload.sizes, {}
    causal, gqa = bool(workload.options.get("causal")), s["H"] != s["H_kv"]

    def run(tensors: dict[str, Tensor], options: dict[str, Any]) -> Tensor:
        q, k = tensors["q"], tensors["k"]
        _refuse_slow_compilation(q)
        mask, padding = options.get("mask"), options.get("key_mask")
        score_mod = None
        if mask is not None and mask.dtype != torch.bool:
            score_mod = lambda score, b, h, i, j: score + mask[0, h, i, j]  # noqa: E731
        key = (q.shape, k.shape)
        if key not in blocks:
            blocks.clear()

            def seen(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
                keep = i >= j if causal else j >= 0
                if padding is not None:
                    keep = keep & padding[b, j]
                return keep & mask[i, j] if mask is not None and score_mod is None else keep

            masked = causal or padding is not None or (mask is not None and score_mod is None)
            batches = q.shape[0] if padding is not None else None
            blocks[key] = (
                create_block_mask(seen, batches, None, q.shape[2], k.shape[2], device=q.device) if masked else None
            )
        with contextlib.nullcontext() if q.is_cuda else torch.no_grad():  # on a CPU it has no backward
            return attend(q, k, tensors["v"], score_mod=score_mod, block_mask=blocks[key], enable_gqa=gqa)

    return run


def _no_masks(workload: Workload) -> dict[str, Any]:
    return {
        "takes no mask": "mask" in workload.masks,
        "takes padding only as packed sequences": "key_mask" in workload.masks,
    }


def _flash_attn(module: str) -> Build:
    def build(workload: Workload) -> Call:
        causal, p = bool(workload.options.get("causal")), workload.dropout
        _refuse(_no_masks(workload))
        _refuse({"has no dropout": p and module == "flash_attn_interface"})
        attend = _package(module).flash_attn_func
        more = dict(causal=causal) if module == "flash_attn_interface" else dict(causal=causal, dropout_p=p)

        def run(tensors: dict[str, Tensor], options: dict[str, Any]) -> Tensor:
            q, k, v = (x.transpose(1, 2) for x in tensors.values())
            _refuse(
                {"runs on CUDA tensors only": not q.is_cuda, "takes float16 and bfloat16": q.dtype == torch.float32}
            )
            out = attend(q, k, v, **more)
            return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)

        return run

    return build


def _xformers(workload: Workload) -> Call:
    ops = _package("xformers.ops")
    s, causal, biases = workload.sizes, bool(workload.options.get("causal")), {}

    def bias(q: Tensor, tensors: dict[str, Tensor], options: dict[str, Any]) -> Any:
        mask = _dense_mask(tensors, options)
        if mask is None:
            return ops.LowerTriangularMask() if causal else None
        if q.shape not in biases:
            biases.clear()
            keep = mask & ~_future(s["T_q"], s["T_k"], mask.device) if causal else mask
            added = (
                torch.zeros(keep.shape, dtype=q.dtype, device=q.device).masked_fill(~keep, -torch.inf)
                if mask.dtype == torch.bool
                else mask
            )
            biases[q.shape] = added.expand(q.shape[0], s["H"], q.shape[2], tensors["k"].shape[2]).contiguous()
        return biases[q.shape]

    def run(tensors: dict[str, Tensor], options: dict[str, Any]) -> Tensor:
        _refuse({"runs on CUDA tensors only": not tensors["q"].is_cuda})
        q, k, v = (x.transpose(1, 2) for x in tensors.values())  # (B, T, H, D)
        group = s["H"] // s["H_kv"]
        if group > 1:  # (B, T, H_kv, group, D), keys expanded
            q, k, v = (
                q.unflatten(2, (s["H_kv"], group)),
                *(x[:, :, :, None].expand(-1, -1, -1, group, -1) for x in (k, v)),
            )
        try:
            out = ops.memory_efficient_attention(
                q, k, v, attn_bias=bias(tensors["q"], tensors, options), p=workload.dropout
            )
        except (NotImplementedError, ValueError) as error:
            raise Unavailable(" ".join(str(error).split())[:200]) from None
        return (out.flatten(2, 3) if group > 1 else out).transpose(1, 2)

    return run


def _flag_gems_attention(workload: Workload) -> Call:
    _refuse({"has no dropout": workload.dropout})
    gems, s = _package("flag_gems"), workload.sizes

    def run(tensors: dict[str, Tensor], options: dict[str, Any]) -> Tensor:
        q, k, v = tensors.values()
        _needs_gpu(q)
        mask = _dense_mask(tensors, options)
        if mask is not None:
            mask = mask.expand(q.shape[0], q.shape[1], q.shape[2], k.shape[2])
        causal = bool(workload.options.get("causal"))
        return gems.scaled_dot_product_attention(q, k, v, mask, 0.0, causal, None, s["H"] != s["H_kv"])

    return run


def _fla_attention(workload: Workload) -> Call:
    s = workload.sizes
    _refuse(
        {"has no dropout": workload.dropout, "is causal only": not workload.options.get("causal")} | _no_masks(workload)
    )
    _refuse({"needs as many queries as keys": s["T_q"] != s["T_k"]})
    attend = _package("fla.ops.attn").parallel_attn

    def run(tensors: dict[str, Tensor], options: dict[str, Any]) -> Tensor:
        _needs_gpu(tensors["q"])
        return attend(*(x.transpose(1, 2) for x in tensors.values())).transpose(1, 2)

    return run


# ---- layer norm. Tensors x, weight, bias; options normalized_shape, eps.


def _eager_layer_norm(workload: Workload) -> Call:
    return lambda tensors, options: F.layer_norm(
        tensors["x"], options["normalized_shape"], tensors["weight"], tensors["bias"], options["eps"]
    )


def _liger_layer_norm(workload: Workload) -> Call:
    function = _package("liger_kernel.ops.layer_norm").LigerLayerNormFunction

    def run(tensors: dict[str, Tensor], options: dict[str, Any]) -> Tensor:
        _needs_gpu(tensors["x"])
        return function.apply(tensors["x"], tensors["weight"], tensors["bias"], options["eps"])

    return run


def _flag_gems_layer_norm(workload: Workload) -> Call:
    gems = _package("flag_gems")

    def run(tensors: dict[str, Tensor], options: dict[str, Any]) -> Tensor:
        shape, eps = options["normalized_shape"], options["eps"]
        _needs_gpu(tensors["x"])

        def forward(x: Tensor, weight: Tensor, bias: Tensor) -> Any:
            y, mean, rstd = gems.layer_norm(x, shape, weight, bias, eps)
            return y, (x, mean, rstd, weight, bias)

        def backward(dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor) -> Any:
            return gems.layer_norm_backward(dy, x, shape, mean, rstd, weight, bias, [True, True, True])

        return _Pair.apply(forward, backward, tensors["x"], tensors["weight"], tensors["bias"])

    return run


def _fla_layer_norm(workload: Workload) -> Call:
    function = _package("fla.modules.norm.layernorm").layer_norm

    def run(tensors: dict[str, Tensor], options: dict[str, Any]) -> Tensor:
        _needs_gpu(tensors["x"])
        return function(tensors["x"], tensors["weight"], tensors["bias"], eps=options["eps"])

    return run


# ---- softmax. Tensor x; options scale, causal.


def _eager_softmax(workload: Workload) -> Call:
    def run(tensors: dict[str, Tensor], options: dict[str, Any]) -> Tensor:
        x = tensors["x"]
        x = x * options["scale"] if "scale" in options else x
        if options.get("causal"):
            x = x.masked_fill(_future(x.shape[-2], x.shape[-1], x.device), -torch.inf)
        return x.softmax(-1)

    return run


def _liger_softmax(workload: Workload) -> Call:
    _refuse({"takes no scale and no mask": workload.options})
    function = _package("liger_kernel.ops.softmax").LigerSoftmaxFunction

    def run(tensors: dict[str, Tensor], options: dict[str, Any]) -> Tensor:
        _needs_gpu(tensors["x"])
        return function.apply(tensors["x"])

    return run


def _softmax_pair(module: str, forward: str, backward: str) -> Build:
    def build(workload: Workload) -> Call:
        _refuse({"takes no scale and no mask": workload.options})
        package = _package(module)

        def run(tensors: dict[str, Tensor], options: dict[str, Any]) -> Tensor:
            x = tensors["x"]
            _needs_gpu(x)
            gems = module == "flag_gems"

            def forth(x: Tensor) -> Any:
                y = getattr(package, forward)(x, -1) if gems else getattr(package, forward)(x, x.dtype)
                return y, (y,)

            def back(dy: Tensor, y: Tensor) -> Any:
                arguments = (dy, y, -1, x.dtype) if gems else (y, dy, x.dtype)
                return (getattr(package, backward)(*arguments),)

            return _Pair.apply(forth, back, x)

        return run

    return build


# ---- cross-entropy. Tensor logits; options target, label_smoothing.


def _eager_cross_entropy(workload: Workload) -> Call:
    return lambda tensors, options: F.cross_entropy(tensors["logits"], **options)


def _liger_cross_entropy(workload: Workload) -> Call:
    function, smoothing = (
        _package("liger_kernel.ops.cross_entropy").LigerCrossEntropyFunction,
        workload.options.get("label_smoothing", 0.0),
    )

    def run(tensors: dict[str, Tensor], options: dict[str, Any]) -> Tensor:
        _needs_gpu(tensors["logits"])  # its forward overwrites the logits with their gradient
        return function.apply(tensors["logits"], options["target"], None, -100, 0.0, smoothing, "mean")[0]

    return run


def _flag_gems_cross_entropy(workload: Workload) -> Call:
    function = _package("flag_gems.fused.cross_entropy_loss").cross_entropy_loss

    def run(tensors: dict[str, Tensor], options: dict[str, Any]) -> Tensor:
        _needs_gpu(tensors["logits"])
        return function(tensors["logits"], **options)

    return run


def _fla_cross_entropy(workload: Workload) -> Call:
    function = _package("fla.modules.fused_cross_entropy").cross_entropy_loss

    def run(tensors: dict[str, Tensor], options: dict[str, Any]) -> Tensor:
        _needs_gpu(tensors["logits"])
        return function(tensors["logits"], **options)[0].mean()

    return run


# ---- dropout with a residual. Tensors x, residual; options p, seed.


def _eager_dropout(workload: Workload) -> Call:
    return lambda tensors, options: tensors["residual"] + F.dropout(tensors["x"], options["p"])


def _flag_gems_dropout(workload: Workload) -> Call:
    gems = _package("flag_gems")

    def run(tensors: dict[str, Tensor], options: dict[str, Any]) -> Tensor:
        _needs_gpu(tensors["x"])
        p = options["p"]

        def forward(x: Tensor) -> Any:
            y, mask = gems.dropout(x, p, True)
            return y, (mask,)

        def backward(dy: Tensor, mask: Tensor) -> Any:
            return (gems.dropout_backward(dy, mask, 1 / (1 - p)),)

        return tensors["residual"] + _Pair.apply(forward, backward, tensors["x"])

    return run


# ---- decoder layer. Tensors x, memory and the parameters by their names in the state_dict; options causal, dropout, norm_first, key_mask.


def _layer(kind: type[nn.Module], compiled: bool = False) -> Build:
    def build(workload: Workload) -> Call:
        s, options_of = workload.sizes, workload.options
        layers: list[nn.Module] = []
        attached: list[Tensor] = []

        def attach(tensors: dict[str, Tensor]) -> nn.Module:
            """The layer with these very tensors as its parameters, so that gradients are theirs."""
            x = tensors["x"]
            if not layers:
                width, heads = x.shape[-1], x.shape[-1] * s["H"] // s["C"]
                layers.append(
                    kind(width, heads, tensors["linear1.bias"].shape[0], options_of["dropout"], batch_first=True,
                         norm_first=options_of["norm_first"], device="meta", dtype=x.dtype)
                )  # fmt: skip
                if compiled:
                    _refuse_slow_compilation(x)
                    layers.append(_compile(layers[0]))
            if attached != [id(x)]:
                for name, parameter in tensors.items():
                    module, _, leaf = name.rpartition(".")
                    if module:
                        owner = layers[0].get_submodule(module)
                        owner._parameters.pop(leaf, None)
                        setattr(owner, leaf, parameter)
                attached[:] = [id(x)]
            return layers[-1]

        def run(tensors: dict[str, Tensor], options: dict[str, Any]) -> Tensor:
            layer, t = attach(tensors), tensors["x"].shape[1]
            padding = options.get("key_mask")
            return layer(
                tensors["x"], tensors["memory"], tgt_mask=_future(t, t, tensors["x"].device), tgt_is_causal=True,
                memory_key_padding_mask=None if padding is None else ~padding,
            )  # fmt: skip

        return run

    return build


_SDPA = {"flash": SDPBackend.FLASH_ATTENTION, "efficient": SDPBackend.EFFICIENT_ATTENTION,
         "cudnn": SDPBackend.CUDNN_ATTENTION, "math": SDPBackend.MATH}  # fmt: skip
_PROVIDERS: dict[str, dict[str, Build]] = {
    "attention": {
        OURS: _ours, "eager": _eager_attention, "torch.compile": _compiled(_eager_attention), "sdpa": _sdpa(None),
        **{f"sdpa {name}": _sdpa(backend) for name, backend in _SDPA.items()}, "flex": _flex,
        "flash_attn": _flash_attn("flash_attn"), "flash_attn 3": _flash_attn("flash_attn_interface"), "xformers": _xformers,
        "flag_gems": _flag_gems_attention, "fla": _fla_attention,
    },
    "layer_norm": {
        OURS: _ours, "eager": _eager_layer_norm, "torch.compile": _compiled(_eager_layer_norm), "liger": _liger_layer_norm,
        "flag_gems": _flag_gems_layer_norm, "fla": _fla_layer_norm,
    },
    "softmax": {
        OURS: _ours, "eager": _eager_softmax, "torch.compile": _compiled(_eager_softmax), "liger": _liger_softmax,
        "flag_gems": _softmax_pair("flag_gems", "softmax", "softmax_backward"),
        "fla": _softmax_pair("fla.ops.utils.softmax", "softmax_fwd", "softmax_bwd"),
    },
    "cross_entropy": {
        OURS: _ours, "eager": _eager_cross_entropy, "torch.compile": _compiled(_eager_cross_entropy),
        "liger": _liger_cross_entropy, "flag_gems": _flag_gems_cross_entropy, "fla": _fla_cross_entropy,
    },
    "dropout": {
        OURS: _ours, "eager": _eager_dropout, "torch.compile": _compiled(_eager_dropout), "flag_gems": _flag_gems_dropout,
    },
    "decoder_layer": {
        OURS: _layer(TransformerDecoderLayer), "eager": _layer(nn.TransformerDecoderLayer),
        "torch.compile": _layer(nn.TransformerDecoderLayer, compiled=True),
    },
}  # fmt: skip
