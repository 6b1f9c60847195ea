"""tileformer as an attention implementation of Hugging Face transformers (5.0 and newer).

    from tileformer.decoder import huggingface
    model = AutoModelForCausalLM.from_pretrained(name)
    huggingface.use(model)                       # attention, norms, dropout and the loss of this model
    huggingface.revert(model)                    # and back
or
    huggingface.register()
    model = AutoModel.from_pretrained(name, attn_implementation="tileformer")   # attention alone
"""

from __future__ import annotations

import copy
import dis
import functools
import importlib
import inspect
import itertools
import math
import sys
import types
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from tileformer.decoder.gated_mlp import swap_gated_mlps
from tileformer.decoder.huggingface_loss import causal_lm_loss, fuse, unfuse
from tileformer.decoder.nn.convert import TWINS, Report, convert, swap
from tileformer.decoder.nn.convert import revert as revert_modules
from tileformer.kernels import attention, decode_attention, rms_norm
from tileformer.kernels.attention.decode.params import MAX_TOKENS

NAME = "tileformer"
_UNSUPPORTED = (
    "s_aux",
    "sinks",
    "head_mask",
    "cache",
    "block_mask",
    "score_mod",
)  # keywords that change what attention means


def register(name: str = NAME) -> None:
    """Make ``name`` known to ``from_pretrained(attn_implementation=...)`` and ``set_attn_implementation``.

    Both halves are registered: without a mask function, models would hand the attention no mask at all.
    """
    _transformers().AttentionInterface.register(name, attend)
    _transformers("masking_utils").AttentionMaskInterface.register(name, make_mask)


def _transformers(module: str = "") -> Any:
    try:
        return importlib.import_module(f"transformers.{module}".rstrip("."))
    except ImportError as error:
        raise ImportError("this needs transformers 5.0 or newer: pip install 'tileformer[hf]'") from error


def use(model: Any, *, fused_loss: bool = False) -> Report:
    """Let ``model`` (a ``PreTrainedModel``, alone or inside a wrapper: peft's, DataParallel, DDP, a compiled one)
    attend by our kernels, swap its modules (see ``convert``), norms and gated MLPs, and its loss if it is the usual one
    of a causal language model. `revert` undoes all of it.

    fused_loss: that loss is computed without the logits, by `linear_cross_entropy`, where the model trains on a keyword
    ``labels``; its output then has no logits. It raises NotImplementedError at a model that changes its logits.

    Returns:
        What was swapped and what was left and why. A second call changes nothing, and says so.

    Raises:
        TypeError: if there is no model of transformers in ``model``.

    Example:
        >>> from transformers import LlamaConfig, LlamaModel
        >>> model = LlamaModel(LlamaConfig(vocab_size=9, hidden_size=16, intermediate_size=8, num_hidden_layers=1,
        ...                                num_attention_heads=2))
        >>> use(model).swapped["attention"]
        "transformers' sdpa -> tileformer's"
    """
    parts = _models(model)
    usual = _transformers("loss.loss_utils").ForCausalLMLoss
    register()
    report = convert(model)
    swap_norms(model, report)
    swap_gated_mlps(model, report)
    for where, part in parts.items():
        record = vars(part).setdefault(_RECORD, {"attention": {}, "loss": None})
        _use_attention(part, f"{where}attention", record["attention"], report)
        loss = getattr(part, "loss_function", None)
        if loss is causal_lm_loss:
            report.left[f"{where}loss_function"] = "it is tileformer's already"
        elif loss is usual:
            record["loss"] = "own" if "_loss_function" in vars(part) else "by type"
            part.loss_function = causal_lm_loss
            report.swapped[f"{where}loss_function"] = "transformers' ForCausalLMLoss -> tileformer's causal_lm_loss"
        if fused_loss:
            fuse(model, part, where, report)
    return report


def revert(model: Any) -> Report:
    """Undo `use`: attention, loss, norms and every module become what they were, in place; wrappers as in `use`.

    What was changed after `use` (another attention, another loss) stays as it is.
    """
    parts = _models(model)
    report = revert_modules(model)
    for where, part in parts.items():
        record = vars(part).pop(_RECORD, {"attention": {}, "loss": None})
        unfuse(part)
        configs = _configs(part)
        now = {key: config._attn_implementation for key, config in configs.items()}
        ours = [key for key, x in now.items() if x == NAME]
        now |= {key: record["attention"][key] for key in ours if key in record["attention"]}
        for key, config in configs.items():  # outer ones first: setting one sets those inside of it
            config._attn_implementation = now[key]
        if NAME in now.values():
            report.left[f"{where}attention"] = "it was asked for by name, not by `use`: model.set_attn_implementation"
        elif ours:
            report.swapped[f"{where}attention"] = f"tileformer's -> transformers' {_join(now[key] for key in ours)}"
        if record["loss"] and getattr(part, "_loss_function", None) is causal_lm_loss:
            del part._loss_function
            if record["loss"] == "own":
                part.loss_function = _transformers("loss.loss_utils").ForCausalLMLoss
            report.swapped[f"{where}loss_function"] = "tileformer's causal_lm_loss -> transformers' ForCausalLMLoss"
    return report


_RECORD = "_tileformer_before"  # of a model that `use` has changed: what `revert` gives back


def _models(model: Any) -> dict[str, Any]:
    """The models of transformers in ``model``, but for those inside another, and what to call each in a report: "" if
    there is one."""
    kind = _transformers("modeling_utils").PreTrainedModel
    models: dict[str, Any] = {}
    for name, module in model.named_modules() if isinstance(model, nn.Module) else ():
        if isinstance(module, kind) and not any(not x or name.startswith(f"{x}.") for x in models):
            models[name] = module
    if not models:
        raise TypeError(
            f"this takes a model of transformers, alone or in a wrapper, got {type(model).__name__}: "
            "for modules of torch.nn, tileformer.decoder.nn.convert"
        )
    return {f"{name}." if len(models) > 1 else "": part for name, part in models.items()}


def _configs(model: Any) -> dict[str, Any]:
    """Each configuration of a model once: its own and those inside of it, by their dotted names, then those of other
    models in it, by module."""
    configs: dict[str, Any] = {}

    def add(key: str, config: Any) -> None:
        if hasattr(config, "_attn_implementation") and all(config is not x for x in configs.values()):
            configs[key] = config
            for name in getattr(config, "sub_configs", None) or {}:
                add(f"{key}.{name}".lstrip("."), getattr(config, name, None))

    for name, module in model.named_modules():
        if isinstance(module, _transformers("modeling_utils").PreTrainedModel):
            add(f"module {name}" if name else "", module.config)
    return configs


def _join(names: Iterable[Any]) -> str:
    return ", ".join(sorted({str(x) for x in names}))


def _use_attention(model: Any, name: str, record: dict[str, Any], report: Report) -> None:
    """Switch the attention of a model, its configurations noted in ``record``, and say which of its modules it
    serves."""
    kinds: dict[str, set[str]] = {"asks": set(), "sinks": set(), "own": set()}
    for cls in map(type, model.modules()):
        if _computes(cls):
            kinds[_computes(cls)].add(cls.__name__)
    configs = _configs(model)
    before = {key: config._attn_implementation for key, config in configs.items()}
    if kinds["asks"] and not kinds["sinks"]:
        model.set_attn_implementation(NAME)
    changed = {key: x for key, x in before.items() if x != configs[key]._attn_implementation}
    record.update(changed)
    if changed:
        report.swapped[name] = f"transformers' {_join(changed.values())} -> tileformer's"
    why = []
    if kinds["own"]:
        why.append(f"{type(model).__name__} computes attention in its own code ({_join(kinds['own'])})")
    if kinds["sinks"]:
        why.append(f"{_join(kinds['sinks'])} has attention sinks, which tileformer's attention does not compute")
    elif not kinds["asks"]:
        why = why or [f"no module of {type(model).__name__} asks transformers for an attention function"]
    elif NAME in before.values():
        why.append("it is tileformer's already")
    elif not changed:
        why.append(f"{type(model).__name__} keeps {_join(before.values())}: transformers switches it to no other")
    if why:
        report.left[name] = "; ".join(why)


@functools.lru_cache(maxsize=1024)
def _computes(kind: Any) -> str:
    """How a module's class computes attention: it "asks" transformers for the function, perhaps with "sinks", has its
    "own" code, or "" (none).

    Read from the code that runs: own attention makes a softmax of a product, and never looks the function up.
    """
    transformers, names = _transformers("modeling_utils"), set[str]()
    bases = nn.Module, transformers.PreTrainedModel
    asks = False
    for cls in itertools.takewhile(lambda cls: cls not in bases, kind.__mro__):
        for x in filter(callable, vars(cls).values()):
            used = _names(getattr(inspect.unwrap(x), "__code__", None))
            there = getattr(inspect.unwrap(x), "__globals__", {})
            asks |= any(isinstance(there.get(name), transformers.AttentionInterface) for name in used)
            names |= used
    if asks or "ALL_ATTENTION_FUNCTIONS" in names:
        return "sinks" if names & {"s_aux", "sinks"} else "asks"
    product = names & {"matmul", "bmm", "baddbmm", "einsum", "@"}
    return "own" if product and names & {"softmax", "Softmax"} else ""


def _names(code: Any) -> set[str]:
    """The names that a function uses or passes by, its inner functions' too, and "@" for the operator."""
    names: set[str] = set()
    for step in dis.get_instructions(code) if isinstance(code, types.CodeType) else ():
        if isinstance(step.argval, types.CodeType):
            names |= _names(step.argval)
        elif step.argrepr == "@" or step.opname == "BINARY_MATRIX_MULTIPLY":
            names.add("@")
        elif isinstance(step.argval, tuple):
            names |= {x for x in step.argval if isinstance(x, str)}
        elif isinstance(step.argval, str) and step.opname != "LOAD_CONST":
            names.add(step.argval)
    return names


class RMSNorm:
    """What `use` puts before the class of a norm of transformers (LlamaRMSNorm, T5LayerNorm, Gemma's), which it stays:
    `rms_norm` computes it."""

    leads = True  # over the class that it is joined with, see `convert`
    notes = ("_tileformer_norm",)
    _tileformer_norm: tuple[bool, dict[tuple[torch.dtype, torch.dtype], torch.dtype]]

    def forward(self: Any, *inputs: Tensor, **named: Tensor) -> Tensor:
        """Normalise the last axis of the one tensor given, (..., C); the answer's dtype is the one that theirs has for
        these dtypes."""
        (x,) = (*inputs, *named.values())
        plus_one, answers = self._tileformer_norm
        return _rms_norm(x, self.weight, _eps(self), plus_one, answers.get((x.dtype, self.weight.dtype), x.dtype))


def _rms_norm(x: Tensor, weight: Tensor, eps: Any, plus_one: bool, answer: torch.dtype) -> Tensor:
    if plus_one:  # as Gemma keeps its weight
        weight = 1 + weight.to(torch.promote_types(weight.dtype, torch.float32))
    return rms_norm(x.to(torch.promote_types(x.dtype, answer)), weight.shape, weight, eps).to(answer)


def swap_norms(model: nn.Module, report: Report) -> None:
    """Let the norms of transformers' own classes compute by `rms_norm`, if they take, give and compute the same."""
    for name, module in model.named_modules():
        kind = type(module)
        theirs = "Norm" in kind.__name__ and kind.__module__.startswith("transformers") and not any(module.children())
        if not theirs or name in report.left or isinstance(module, (RMSNorm, *TWINS)):
            continue
        why = "its forward was replaced" if "forward" in vars(module) else _norm_of(module)
        if isinstance(why, str):
            report.left[name] = f"{kind.__name__}: {why}"
            continue
        swap(module, RMSNorm)
        module._tileformer_norm = why
        report.swapped[name] = f"transformers' {kind.__name__} -> tileformer's rms_norm"


_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def _norm_of(module: Any) -> str | tuple[bool, dict[tuple[torch.dtype, torch.dtype], torch.dtype]]:
    """Whether 1 is added to a norm's weight, and the dtype that it answers in for each pair of (rows', weight's); or
    why it is not `rms_norm`.

    Tried with weights of our own on the CPU, so that neither what the weights hold now nor where they lie decides, for
    each pair of dtypes."""
    takes = list(inspect.signature(type(module).forward).parameters)[1:]
    if len(takes) != 1:
        return f"its forward takes {', '.join(takes)}, rms_norm the rows alone"
    holds = [name for name, _ in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))]
    weight = getattr(module, "weight", None)
    if holds != ["weight"] or not isinstance(weight, Tensor) or weight.dim() != 1:
        return f"it holds {', '.join(holds) or 'no weight'}, rms_norm a weight of one axis"
    if not isinstance(_eps(module), float):
        return "it has no number named eps or variance_epsilon"
    cpu: dict[str, Any] = dict(device="cpu", generator=torch.Generator().manual_seed(0))
    small = torch.tensor([[[1.0], [1e-3]], [[30.0], [0.0]]], device="cpu")  # small rows show where eps is added
    rows, slope = torch.randn(2, 2, len(weight), **cpu) * small, torch.randn(len(weight), **cpu)
    trial, fits, answers = copy.copy(module), [False, True], {}
    for pair in itertools.product(_DTYPES, _DTYPES):
        x, w = (t.to(dtype) for t, dtype in zip((rows, slope), pair, strict=True))
        vars(trial)["_parameters"] = {"weight": nn.Parameter(w, requires_grad=False)}
        try:
            with torch.no_grad():
                expected = type(module).forward(trial, x)
            answers[pair] = expected.dtype
        except Exception as error:
            return f"it takes no {pair[0]} rows beside a {pair[1]} weight: {type(error).__name__}: {error}"
        tolerance = (0.05, 0.02) if min(d.itemsize for d in (*pair, expected.dtype)) < 4 else (1e-4, 1e-5)
        ours = {plus_one: _rms_norm(x, w, _eps(module), plus_one, expected.dtype) for plus_one in fits}
        fits = [plus_one for plus_one in fits if torch.allclose(ours[plus_one], expected, *tolerance)]
    return (fits[0], answers) if fits else "it computes something else than rms_norm"


def _eps(module: Any) -> Any:
    return getattr(module, "variance_epsilon", getattr(module, "eps", None))


def make_mask(
    batch_size: int, q_length: int, kv_length: int, q_offset: int = 0, kv_offset: int = 0, mask_function: Any = None,
    attention_mask: Tensor | None = None, **options: Any,
) -> Tensor | None:  # fmt: skip
    """What ``attend`` gets: None, or a boolean mask (B, 1, T_q, T_k), True = may attend; see transformers'
    ``sdpa_mask``.

    Where the mask is the causal one with padding, it also says so (as an attribute, which no copy has): the kernel then
    skips what is hidden. A family of models that has attention in its own code gets the floating mask that such code
    adds, as from transformers' eager."""
    from transformers import masking_utils  # a statement: a call of importlib would break a compiled graph

    mask_function = mask_function or masking_utils.causal_mask_function
    shape = dict(q_offset=q_offset, kv_offset=kv_offset, mask_function=mask_function, attention_mask=attention_mask)
    if _own_code(type(options.get("config")).__module__):
        return masking_utils.eager_mask(batch_size, q_length, kv_length, **shape, **options)
    mask: Any = masking_utils.sdpa_mask(batch_size, q_length, kv_length, **shape, **options)
    aligned = isinstance(q_offset, int) and kv_offset == 0 and q_offset + q_length == kv_length
    if (
        mask is not None
        and mask_function is masking_utils.causal_mask_function
        and aligned
        and not torch.compiler.is_compiling()
        and not mask.is_inference()  # it could not tell what was written to it
    ):
        padding = masking_utils.prepare_padding_mask(attention_mask, kv_length, kv_offset)
        padding = None if padding is None else padding[:, :kv_length]
        mask.tileformer_causal = (padding, mask._version)
    return mask


@torch.compiler.assume_constant_result
def _own_code(file: str) -> bool:
    """Whether the models of a configuration, which is in the module ``file``, may add the mask to scores in code of
    their own."""
    return _own_code_of(file.replace(".configuration_", ".modeling_"))


@functools.lru_cache(maxsize=1024)
def _own_code_of(file: str) -> bool:
    there = vars(sys.modules.get(file, types)).values()
    kinds: list[Any] = [x for x in there if isinstance(x, type) and issubclass(x, nn.Module) and x.__module__ == file]
    own = [
        x.__name__
        for x in kinds
        if _computes(x) == "own" and any("mask" in name for name in inspect.signature(x.forward).parameters)
    ]
    if own and not any(_computes(x) in ("asks", "sinks") for x in kinds):
        warnings.warn(
            f'attn_implementation="{NAME}" changes nothing in {file}: {_join(own)} computes attention in its own code',
            stacklevel=3,
        )
    return bool(own)


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    scaling: float | None = None, dropout: float = 0.0, is_causal: bool | None = None,
    position_bias: Tensor | None = None, softcap: float | None = None, output_attentions: bool | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """The attention of a transformers module: query (B, H, T_q, D), key and value (B, H_kv, T_k, D) -> ((B, T_q, H, D),
    weights or None).

    A boolean mask says who may attend, a floating one is added, as is ``position_bias``, which gets a gradient. Without
    a mask, ``is_causal`` (of the module, if it is not given) makes a call of several queries causal from the first key
    on, as with transformers' sdpa.

    Raises NotImplementedError for what our kernels do not compute (attention sinks, head masks, paged caches).
    """
    for name in _UNSUPPORTED:
        if options.get(name) is not None:
            raise NotImplementedError(
                f'attn_implementation="{NAME}" does not support {name}=: use "eager" for this model'
            )
    if not dropout and not output_attentions and _is_step(query, key, attention_mask):
        seen = _seen_slots(attention_mask, key, query.dtype)
        if position_bias is not None:
            wide = position_bias[..., : key.shape[2]].float()
            seen["bias"] = wide if seen.get("bias") is None else wide + seen["bias"]
        return decode_attention(query, key, value, scale=scaling, softcap=softcap, **seen).transpose(1, 2), None
    arguments: dict[str, Any] = dict(scale=scaling, dropout_p=dropout, softcap=softcap or 0.0)
    if attention_mask is None:
        causal = getattr(module, "is_causal", False) if is_causal is None else is_causal
        arguments["causal"] = bool(causal) and query.shape[2] > 1
    else:
        arguments |= _masks(attention_mask, key, query.dtype)
    if position_bias is not None:
        position_bias = position_bias[..., : key.shape[2]]
        if "mask" in arguments and arguments["mask"].is_floating_point():  # the sum of two halves is rounded once
            position_bias = position_bias.to(torch.promote_types(query.dtype, torch.float32)) + arguments.pop("mask")
        arguments["bias"] = position_bias
    if not output_attentions:
        return attention(query, key, value, **arguments).transpose(1, 2), None
    out, weights = attention(query, key, value, return_weights=True, **arguments)
    return out.transpose(1, 2), weights


def _is_step(query: Tensor, key: Tensor, mask: Tensor | None) -> bool:
    """Whether these are a row's newest tokens over its cache, which `decode_attention` reads to its length."""
    (rows, _, tokens, size), keys = query.shape, key.shape[2]
    known = (mask is not None and mask.dim() == 4) or (mask is None and tokens == 1)
    return known and not torch.is_grad_enabled() and tokens <= min(MAX_TOKENS, keys - 1) and rows > 0 and size <= 256


def _seen_slots(mask: Tensor | None, key: Tensor, dtype: torch.dtype) -> dict[str, Any]:
    """What a mask (B, 1 or H, T_q, T_k or more) lets a step see, as arguments of `decode_attention`. Layers of a model
    share a mask, which remembers it."""
    batch, keys = key.shape[0], key.shape[2]
    whole = getattr(mask, "tileformer_causal", (0, -1))
    if mask is None or (whole[0] is None and whole[1] == mask._version and mask.shape[-1] == keys):
        return dict(lengths=_full(batch, keys, key.device), causal=mask is not None)
    counted = not torch.compiler.is_compiling() and not mask.is_inference()  # what was written to it
    known = getattr(mask, "tileformer_seen", None) if counted else None
    if known is None or known[0] != (mask._version, keys, dtype):
        cut, bias = mask[..., :keys].expand(batch, -1, -1, -1), None
        real = cut != -math.inf if cut.is_floating_point() else cut
        if cut.is_floating_point():
            bias = cut
        elif cut.shape[1] * cut.shape[2] > 1:
            bias = cut.new_zeros(cut.shape, dtype=dtype).masked_fill(~cut, -math.inf)
        slot, real = torch.arange(keys, device=key.device), real.any(2).any(1)
        lengths = torch.where(real, slot + 1, 0).amax(1).int()
        starts = torch.where(real, slot, keys).amin(1).int()
        given = dict(lengths=lengths, starts=starts, descends=real.int(), causal=False, bias=bias)
        range_ = (slot >= starts[:, None]) & (slot < lengths[:, None])
        if counted and real.device.type == "cpu" and torch.equal(real, range_):  # a glance at the host's own memory
            given |= dict(descends=None, starts=starts if bool(starts.any()) else None)
        known = None, given
        if counted:
            known = mask.tileformer_seen = (mask._version, keys, dtype), given  # type: ignore[attr-defined]
    return dict(known[1])


def _full(batch: int, keys: int, device: torch.device) -> Tensor:
    if torch.compiler.is_compiling():
        return torch.full((batch,), keys, dtype=torch.int32, device=device)
    return _full_once(batch, keys, device)


@functools.lru_cache(maxsize=8)
def _full_once(batch: int, keys: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.full((batch,), keys, dtype=torch.int32, device=device)  # once for all layers


def _masks(passed: Tensor, key: Tensor, dtype: torch.dtype) -> dict[str, Any]:
    """A mask of transformers, (B, 1 or H, T_q, T_k or more), as arguments of our attention: ranges of keys where it
    says or shows that it is one."""
    batch, keys = key.shape[0], key.shape[2]
    padding, version = getattr(passed, "tileformer_causal", (None, -1))
    if version >= 0 and version == passed._version and passed.shape[-1] == keys:
        return dict(causal="bottom_right", key_mask=padding)
    mask = passed[..., :keys]
    if mask.is_floating_point():
        return dict(mask=mask.to(dtype))
    if mask.dim() == 4 and all(
        size == 1 or step == 0 for size, step in zip(mask.shape[1:3], mask.stride()[1:3], strict=True)
    ):
        return dict(key_mask=mask[:, 0, 0].expand(batch, keys))
    return dict(mask=mask)
