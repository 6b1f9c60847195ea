"""Who is timed: for each op the callables of tileformer, of PyTorch and of other libraries where they are installed.

    function = providers("attention")["sdpa flash"](call)
    out = function(*call.inputs("cuda", torch.bfloat16))

What a provider cannot do raises `Unavailable`, whose text is printed. A peer is called through its public functions on
the inputs of every other provider. Masks in another form are made at the first call and kept, outside every timing.
"""

import collections
import functools
import importlib
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from tileformer import kernels
from tileformer.bench.calls import Call, Function, function_of
from tileformer.bench.calls.op import Options, Tensors
from tileformer.decoder import TransformerDecoderLayer
from tileformer.kernels import device
from tileformer.kernels.attention import launchers

Provider = Callable[[Call], Function]
OURS = "tileformer"
# A shape costs these many seconds before its first result: a compilation, or the timing of dozens of configurations.
SLOW_START: dict[str, list[str]] = collections.defaultdict(lambda: ["torch.compile"])
SLOW_START["attention"] += ["flex", "flag_gems", "fla"]
GRADIENT_IN_FORWARD = {("cross_entropy", "liger")}  # a backward alone would be credited with work done before
GRADIENT_IN_FORWARD |= {("linear_cross_entropy", name) for name in (OURS, "torch chunked", "liger")}
_made: dict[str, tuple[Tensor, Tensor]] = {}  # of each kind, the mask it was made of last, and what was made of it
compile_backend = "inductor"  # a dry run traces and differentiates with "aot_eager", and generates no code


class Unavailable(Exception):
    """A provider that cannot serve a workload here; the text says why."""


def providers(op: str) -> dict[str, Provider]:
    """The providers of an op, ours first. Building or calling one may raise `Unavailable`."""
    return _PROVIDERS[op]


def reference(call: Call) -> Function:
    """The definition, to run in float64: kernels.reference, or torch.nn's layer."""
    if call.op == "decoder_layer":
        return _layer(nn.TransformerDecoderLayer, False, call)
    return function_of(kernels.reference, call.op)


def _refuse(reasons: dict[str, Any]) -> None:
    """Raise with the first reason that holds."""
    for reason, holds in reasons.items():
        if holds:
            raise Unavailable(reason)


@functools.cache
def _package(name: str) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = error.name or name
        why = "is not installed" if name.startswith(missing) else f"cannot be imported: {error}"
        raise Unavailable(f"{name.split('.')[0]} {why}") from None
    except Exception as error:  # a package may look for a GPU, or for another torch, while it is imported
        raise Unavailable(f"{name} cannot be imported: {' '.join(str(error).split())}") from None


def _peer(module: str, compute: Any, *limits: str, half: bool = False, heads_last: bool = False) -> Provider:
    """A provider from another package: compute(module, tensors, options). `limits` names what it has not.

    half: 16-bit CUDA tensors only; heads_last: it would copy tensors that are not stored (B, T, H, D), so its own are.
    """

    def provider(call: Call) -> Function:
        sizes, options = call.sizes, call.options
        reasons = {
            "takes no mask": "mask" in options,
            "takes padding only as packed sequences": "padding" in options,
            "has no dropout": call.dropout,
            "takes no scale and no mask": options,
            "is causal only": not options.get("causal") or sizes["T_q"] != sizes["T_k"],
        }
        _refuse({reason: holds for reason, holds in reasons.items() if reason in limits})

        def run(t: Tensors, o: Options) -> Tensor:
            x = next(iter(t.values()))
            _refuse({"runs on CUDA tensors only": not (x.is_cuda or (device.recording() and not half))})
            _refuse({"takes float16 and bfloat16": half and x.dtype == torch.float32})
            return compute(_package(module), t, o)

        if heads_last:
            stored = lambda x: x.transpose(1, 2).clone(memory_format=torch.contiguous_format).transpose(1, 2)  # noqa: E731
            run.stored = stored  # type: ignore[attr-defined]
        return run

    return provider


class _Pair(torch.autograd.Function):
    """An op that a package offers as two functions: forward(*tensors) returns (y, what backward(dy, ...) needs)."""

    @staticmethod
    def forward(ctx: Any, forward: Any, backward: Any, *tensors: Any) -> Any:
        y, saved = forward(*tensors)
        ctx.backward_of, ctx.saved = backward, saved
        return y

    @staticmethod
    def backward(ctx: Any, dy: Any) -> Any:
        grads = ctx.backward_of(dy, *ctx.saved)
        return None, None, *(grads if isinstance(grads, tuple) else (grads,))


def _compile(function: Any) -> Any:
    """What torch.compile makes of a function of tensors, or of a dict of them first."""
    torch.compiler.reset()  # the limit on recompilations counts all shapes of a function
    compiled = torch.compile(function, fullgraph=True, dynamic=False, backend=compile_backend)

    def run(first: Any, *rest: Any, **options: Any) -> Any:
        x = first if isinstance(first, Tensor) else next(iter(first.values()))
        slow = compile_backend == "inductor" and not x.is_cuda
        _refuse({"a compilation takes minutes on a CPU: timed on CUDA only": slow})
        return compiled(first, *rest, **options)

    return run


def _eager(function: Function, compiled: bool, call: Call) -> Function:
    """An eager function, or what torch.compile makes of it. A causal one finds its mask as the option "future"."""
    compute = _compile(function) if compiled else function

    def run(t: Tensors, o: Options) -> Tensor:
        if o.get("causal"):
            x = next(iter(t.values()))
            o = o | dict(future=_future(call.sizes["T_q"], call.sizes["T_k"], x.device))
        return compute(t, o)

    return run


def _mask_of(o: Options) -> Tensor | None:
    """`mask`, or `key_mask` as one: broadcastable to (B, H, T_q, T_k). No workload has both."""
    return o.get("mask") if o.get("key_mask") is None else o["key_mask"][:, None, None, :]


def _once(kind: str, o: Options, make: Callable[[], Tensor]) -> Tensor:
    """What `make` makes of the mask among the options, once."""
    source = o["mask"] if o.get("key_mask") is None else o["key_mask"]
    if kind not in _made or _made[kind][0] is not source:
        _made[kind] = (source, make())
    return _made[kind][1]


@functools.lru_cache(maxsize=4)
def _future(t_q: int, t_k: int, device: torch.device) -> Tensor:
    return torch.ones(t_q, t_k, dtype=torch.bool, device=device).triu(1)


def _heads_last(t: Tensors) -> list[Tensor]:
    return [x.transpose(1, 2) for x in t.values()]


def _eager_attention(t: Tensors, o: Options) -> Tensor:
    q, k, v = t["q"], t["k"], t["v"]
    group = q.shape[1] // k.shape[1]
    if group > 1:
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    mask = _mask_of(o)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    if o.get("causal"):
        scores = scores.masked_fill(o["future"], -torch.inf)
    return F.dropout(scores.softmax(-1), o.get("dropout_p", 0.0)) @ v


def _sdpa_attention(t: Tensors, o: Options) -> Tensor:
    q, k, mask, causal = t["q"], t["k"], _mask_of(o), bool(o.get("causal"))
    if mask is not None and causal:  # torch takes one of them
        kept = mask
        mask, causal = _once("both", o, lambda: kept & ~_future(q.shape[2], k.shape[2], q.device)), False
    return F.scaled_dot_product_attention(
        q, k, t["v"], mask, o.get("dropout_p", 0.0), causal, enable_gqa=q.shape[1] != k.shape[1]
    )


def _hopper(call: Call) -> Function:
    """Ours with the forward of kernels/attention/hopper.py, which TILEFORMER_HOPPER=1 opts into."""
    sizes, alone = call.sizes, call.options.keys() <= {"causal"} and not call.dropout
    _refuse({"serves plain and causal calls": not alone, "has no such head size": sizes["D"] not in (64, 128)})
    ours = function_of(kernels, call.op)

    def run(t: Tensors, o: Options) -> Tensor:
        dry = compile_backend != "inductor"  # which compiles it, and then runs what the CPU has
        _refuse({"runs on sm_90 only": not dry and device.arch_of(t["q"]) != 90})
        with mock.patch.object(launchers, "HOPPER", True):
            return ours(t, o)

    return run


def _sdpa(backend: SDPBackend, call: Call) -> Function:
    """One backend of torch's attention. Where it refuses, the reason is what torch says in warnings."""
    tried: list[bool] = []
    attend = sdpa_kernel(backend)(_sdpa_attention)

    def run(t: Tensors, o: Options) -> Tensor:
        if tried:
            return attend(t, o)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                out = attend(t, o)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                said = [str(w.message).split(" (Triggered")[0] for w in caught]
                said = [line for line in said if not line.endswith("because:") and "disabled" not in line]
                raise Unavailable("; ".join(said) or str(error).splitlines()[0]) from None
        tried.append(True)
        return out

    return run


def _flex(call: Call) -> Function:
    _refuse({"has no dropout": call.dropout})
    attend = _compile(flex_attention)
    made: dict[Any, tuple[Any, Any]] = {}

    def restrictions(q: Tensor, k: Tensor, o: Options) -> tuple[Any, Any]:
        """score_mod and block_mask."""
        mask, padding, causal = o.get("mask"), o.get("key_mask"), bool(o.get("causal"))
        if mask is not None and mask.dtype != torch.bool:
            return (lambda score, b, h, i, j: score + mask[0, h, i, j]), None
        if mask is None and padding is None and not causal:
            return None, None

        def seen(b: Any, h: Any, i: Any, j: Any) -> Any:
            keep = i >= j if causal else j >= 0
            if padding is not None:
                keep = keep & padding[b, j]
            return keep & mask[i, j] if mask is not None else keep

        batches = None if padding is None else q.shape[0]
        return None, create_block_mask(seen, batches, None, q.shape[2], k.shape[2], q.device)

    def run(t: Tensors, o: Options) -> Tensor:
        q, k, v = (x if x.is_cuda else x.detach() for x in t.values())  # on a CPU it has no backward
        if q.shape not in made:
            made[q.shape] = restrictions(q, k, o)
        return attend(q, k, v, *made[q.shape], enable_gqa=q.shape[1] != k.shape[1])

    return run


def _flash_attn(package: Any, t: Tensors, o: Options) -> Tensor:
    more = {"dropout_p": o["dropout_p"]} if "dropout_p" in o else {}
    out = package.flash_attn_func(*_heads_last(t), causal=bool(o.get("causal")), **more)
    return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)


def _xformers(package: Any, t: Tensors, o: Options) -> Tensor:
    q, k, mask, causal = t["q"], t["k"], _mask_of(o), bool(o.get("causal"))
    group = q.shape[1] // k.shape[1]
    bias = package.LowerTriangularMask() if causal else None
    if mask is not None:

        def dense() -> Tensor:
            added = mask
            if mask.dtype == torch.bool:
                keep = mask & ~_future(q.shape[2], k.shape[2], q.device) if causal else mask
                added = torch.zeros(keep.shape, dtype=q.dtype, device=q.device).masked_fill(~keep, -torch.inf)
            return added.expand(q.shape[0], q.shape[1], q.shape[2], k.shape[2]).contiguous()

        bias = _once("dense", o, dense)
    q, k, v = _heads_last(t)
    if group > 1:  # (B, T, H_kv, group, D), keys expanded
        q, k, v = q.unflatten(2, (-1, group)), *(x[:, :, :, None].expand(-1, -1, -1, group, -1) for x in (k, v))
    try:
        out = package.memory_efficient_attention(q, k, v, attn_bias=bias, p=o.get("dropout_p", 0.0))
    except (NotImplementedError, ValueError) as error:
        raise Unavailable(" ".join(str(error).split())[:200]) from None
    return (out.flatten(2, 3) if group > 1 else out).transpose(1, 2)


def _flag_gems_attention(package: Any, t: Tensors, o: Options) -> Tensor:
    q, k, mask = t["q"], t["k"], _mask_of(o)
    if mask is not None:
        mask = mask.expand(q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    causal, gqa = bool(o.get("causal")), q.shape[1] != k.shape[1]
    return package.scaled_dot_product_attention(q, k, t["v"], mask, 0.0, causal, None, gqa)


def _flag_gems_layer_norm(package: Any, t: Tensors, o: Options) -> Tensor:
    def forward(x: Tensor, weight: Tensor, bias: Tensor) -> Any:
        y, mean, rstd = package.layer_norm(x, o["normalized_shape"], weight, bias, o["eps"])
        return y, (x, o["normalized_shape"], mean, rstd, weight, bias)

    backward = lambda dy, *saved: package.layer_norm_backward(dy, *saved, [True, True, True])  # noqa: E731
    return _Pair.apply(forward, backward, t["x"], t["weight"], t["bias"])


def _eager_softmax(t: Tensors, o: Options) -> Tensor:
    x = t["x"] * o["scale"] if "scale" in o else t["x"]
    if o.get("causal"):
        x = x.masked_fill(o["future"], -torch.inf)
    return x.softmax(-1)


def _eager_add_norm(t: Tensors, o: Options) -> tuple[Tensor, Tensor]:
    x, rms = t["x"] + t.get("x_bias", 0.0), "bias" not in t
    total = t["residual"] + (F.dropout(x, o["p"]) if "p" in o else x)
    shape, weight = total.shape[-1:], t["weight"]
    y = F.rms_norm(total, shape, weight, o["eps"]) if rms else F.layer_norm(total, shape, weight, t["bias"], o["eps"])
    return y, total if o.get("norm_first", True) else y


def _from_output(module: str, forward: Any, backward: Any) -> Provider:
    """A softmax whose backward reads what its forward wrote: forward(module, x), backward(module, dy, y)."""

    def compute(package: Any, t: Tensors, o: Options) -> Tensor:
        keep = lambda x: (y := forward(package, x), (y,))  # noqa: E731
        return _Pair.apply(keep, lambda dy, y: backward(package, dy, y), t["x"])

    return _peer(module, compute, _PLAIN)


def _torch_linear_cross_entropy(t: Tensors, o: Options) -> Tensor:
    _refuse({"this torch has none": not hasattr(F, "linear_cross_entropy")})
    torchs: Any = F.linear_cross_entropy
    return torchs(**t, **o, options=nn.LinearCrossEntropyOptions())


def _flag_gems_dropout(package: Any, t: Tensors, o: Options) -> Tensor:
    def forward(x: Tensor) -> Any:
        y, mask = package.dropout(x, o["p"], True)
        return y, (mask, 1 / (1 - o["p"]))

    return t["residual"] + _Pair.apply(forward, lambda dy, *saved: package.dropout_backward(dy, *saved), t["x"])


def _eager_activation(t: Tensors, o: Options) -> Tensor:
    """torch's operators, with the addition of the bias that torch's linear layer would do."""
    kind = o["activation"].partition("_")
    x = t["x"] + t["bias"] if "bias" in t else t["x"]
    y = F.gelu(x, approximate=kind[2] or "none") if kind[0] == "gelu" else getattr(F, kind[0])(x)
    return F.dropout(y * t["up"] if "up" in t else y, o.get("p", 0.0))


def _liger_activation(call: Call) -> Function:
    kinds = dict(silu=("swiglu", "LigerSiLUMulFunction"), gelu_tanh=("geglu", "LigerGELUMulFunction"))
    other = call.options["activation"] not in kinds or call.options["params"] != ("up",)
    _refuse({"has swiglu and geglu (tanh) alone": other})
    module, function = kinds[call.options["activation"]]
    compute = lambda p, t, o: getattr(p, function).apply(t["x"], t["up"])  # noqa: E731
    return _peer(f"liger_kernel.ops.{module}", compute)(call)


def _eager_rotary(t: Tensors, o: Options) -> Tensor:
    """As Hugging Face's models compute it, or with complex numbers."""
    x, cos, sin = t["x"], o["cos"], o["sin"]
    if o.get("interleaved"):
        pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
        return torch.view_as_real(pairs * torch.complex(cos.float(), sin.float())).flatten(-2).to(x.dtype)
    cos, sin = (torch.cat([table, table], -1).to(x.dtype) for table in (cos, sin))
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


def _layer(kind: type[nn.Module], compiled: bool, call: Call) -> Function:
    """A layer class; its parameters become the call's very tensors (but x and memory), so that gradients are theirs."""
    sizes = (call.sizes[name] for name in ("C", "H", "F"))
    options = dict(norm_first=call.options["norm_first"], batch_first=True, device="meta")
    layer = kind(*sizes, call.options["dropout"], **options)
    forward = _compile(layer) if compiled else layer
    attached: list[Tensor] = []

    def run(t: Tensors, o: Options) -> Tensor:
        x = t["x"]
        if not (attached and attached[0] is x):
            for name in set(t) - {"x", "memory"}:
                owner, _, leaf = name.rpartition(".")
                module = layer.get_submodule(owner)
                delattr(module, leaf)
                setattr(module, leaf, t[name])
            attached[:] = [x]
        padding = None if o.get("key_mask") is None else ~o["key_mask"]
        causal = _future(x.shape[1], x.shape[1], x.device)
        return forward(x, t["memory"], tgt_mask=causal, tgt_is_causal=True, memory_key_padding_mask=padding)

    return run


def _ours_decode(call: Call) -> Function:
    return function_of(kernels, call.op)


def _sdpa_decode(call: Call) -> Function:
    """What torch offers for a step over a cache that is full: it has neither lengths nor pages."""
    limits = {
        f"has no {what}": name in call.options
        for what, name in (("pages", "page"), ("beams", "beams"), ("8 bits", "int8"))
    }
    _refuse(limits | {"has no lengths": call.options.get("lengths") != "full"})
    return lambda t, o: F.scaled_dot_product_attention(t["q"], t["k"], t["v"], enable_gqa=True)


def _torch(eager: Function) -> dict[str, Provider]:
    """The providers that every op has: ours, PyTorch's own operators, and what torch.compile makes of them."""
    ours = lambda call: function_of(kernels, call.op)  # noqa: E731
    return {OURS: ours, "eager": partial(_eager, eager, False), "torch.compile": partial(_eager, eager, True)}


_NO_MASKS = "takes no mask", "takes padding only as packed sequences"
_PLAIN = "takes no scale and no mask"
_PROVIDERS: dict[str, dict[str, Provider]] = {
    "attention": _torch(_eager_attention) | {
        "hopper": _hopper,
        "fastest": lambda call: kernels.use_backend("fastest")(function_of(kernels, call.op)),
        "sdpa": lambda _: _sdpa_attention,
        "sdpa flash": partial(_sdpa, SDPBackend.FLASH_ATTENTION),
        "sdpa efficient": partial(_sdpa, SDPBackend.EFFICIENT_ATTENTION),
        "sdpa cudnn": partial(_sdpa, SDPBackend.CUDNN_ATTENTION),
        "sdpa math": partial(_sdpa, SDPBackend.MATH),
        "flex": _flex,
        "flash_attn": _peer("flash_attn", _flash_attn, *_NO_MASKS, half=True),
        "flash_attn 3": _peer("flash_attn_interface", _flash_attn, *_NO_MASKS, "has no dropout", half=True),
        "xformers": _peer("xformers.ops", _xformers),
        "flag_gems": _peer("flag_gems", _flag_gems_attention, "has no dropout"),
        "fla": _peer("fla.ops.attn", lambda p, t, o: p.parallel_attn(*_heads_last(t)).transpose(1, 2),
                     *_NO_MASKS, "has no dropout", "is causal only", heads_last=True),
    },
    "decode_attention": {OURS: _ours_decode, "eager": reference, "sdpa": _sdpa_decode},
    "layer_norm": _torch(lambda t, o: F.layer_norm(t["x"], o["normalized_shape"], t["weight"], t["bias"], o["eps"]))
    | {
        "liger": _peer("liger_kernel.ops.layer_norm",
                       lambda p, t, o: p.LigerLayerNormFunction.apply(t["x"], t["weight"], t["bias"], o["eps"])),
        "flag_gems": _peer("flag_gems", _flag_gems_layer_norm),
        "fla": _peer("fla.modules.norm.layernorm",
                     lambda p, t, o: p.layer_norm(t["x"], t["weight"], t["bias"], eps=o["eps"])),
    },
    "rms_norm": _torch(lambda t, o: F.rms_norm(t["x"], o["normalized_shape"], t["weight"], o["eps"])) | {
        "liger": _peer("liger_kernel.ops.rms_norm", lambda p, t, o: p.LigerRMSNormFunction.apply(
            t["x"], t["weight"], o["eps"], 0.0, "llama", False
        )),
    },
    "add_layer_norm": _torch(_eager_add_norm),
    "add_rms_norm": _torch(_eager_add_norm) | {
        "liger": _peer("liger_kernel.ops.fused_add_rms_norm", lambda p, t, o: p.LigerFusedAddRMSNormFunction.apply(
            t["x"], t["residual"], t["weight"], o["eps"], 0.0, "llama", False
        )),
    },
    "softmax": _torch(_eager_softmax) | {
        "liger": _peer("liger_kernel.ops.softmax", lambda p, t, o: p.LigerSoftmaxFunction.apply(t["x"]), _PLAIN),
        "flag_gems": _from_output("flag_gems", lambda p, x: p.softmax(x, -1),
                                  lambda p, dy, y: p.softmax_backward(dy, y, -1, y.dtype)),
        "fla": _from_output("fla.ops.utils.softmax", lambda p, x: p.softmax_fwd(x, x.dtype),
                            lambda p, dy, y: p.softmax_bwd(y, dy.contiguous(), y.dtype)),
    },
    "log_softmax": _torch(lambda t, o: t["x"].log_softmax(-1)) | {
        "flag_gems": _from_output("flag_gems", lambda p, x: p.log_softmax(x, -1),
                                  lambda p, dy, y: p.log_softmax_backward(dy, y, -1, y.dtype)),
    },
    "cross_entropy": _torch(lambda t, o: F.cross_entropy(t["logits"], **o)) | {
        "liger": _peer("liger_kernel.ops.cross_entropy", lambda p, t, o: p.LigerCrossEntropyFunction.apply(
            t["logits"], o["target"], None, -100, 0.0, o.get("label_smoothing", 0.0), "mean", None, False, False, False
        )[0]),
        "flag_gems": _peer("flag_gems.fused.cross_entropy_loss",
                           lambda p, t, o: p.cross_entropy_loss(t["logits"], **o)),
        "fla": _peer("fla.modules.fused_cross_entropy",
                     lambda p, t, o: p.cross_entropy_loss(t["logits"], **o)[0].mean()),
    },
    "linear_cross_entropy": _torch(lambda t, o: F.cross_entropy(F.linear(t["input"], t["linear_weight"]), **o)) | {
        "torch chunked": lambda _: _torch_linear_cross_entropy,
        "liger": _peer("liger_kernel.ops.fused_linear_cross_entropy",
                       lambda p, t, o: p.LigerFusedLinearCrossEntropyFunction.apply(*t.values(), o["target"])[0]),
    },
    "dropout": _torch(lambda t, o: t["residual"] + F.dropout(t["x"], o["p"]))
    | {"flag_gems": _peer("flag_gems", _flag_gems_dropout)},
    "bias_activation_dropout": _torch(_eager_activation) | {"liger": _liger_activation},
    "rotary": _torch(_eager_rotary),
    "decoder_layer": {
        OURS: partial(_layer, TransformerDecoderLayer, False),
        "eager": partial(_layer, nn.TransformerDecoderLayer, False),
        "torch.compile": partial(_layer, nn.TransformerDecoderLayer, True),
    },
}  # fmt: skip
