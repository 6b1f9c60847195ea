"""tileformer as an attention implementation of Hugging Face transformers (5.0 and newer).

    from tileformer.decoder import huggingface
    model = AutoModelForCausalLM.from_pretrained(name)
    huggingface.use(model)                       # attention, norms, dropout and the loss of this model
or
    huggingface.register()
    model = AutoModel.from_pretrained(name, attn_implementation="tileformer")   # attention alone
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tileformer.decoder.convert import Report, convert
from tileformer.kernels import attention, cross_entropy, rms_norm

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


def use(model: Any) -> Report:
    """Let ``model`` (a ``PreTrainedModel``) attend by our kernels, swap its modules (see ``convert``), and its loss if it is the usual one of a
    causal language model.

    `revert` gives the modules back; the attention goes back by ``model.set_attn_implementation``, the loss by ``model.loss_function``.

    Returns:
        What was swapped and what was left.
    """
    usual = _transformers("loss.loss_utils").ForCausalLMLoss
    register()
    before = ", ".join(sorted(set(_attention_of(model).values())))
    model.set_attn_implementation(NAME)
    report = convert(model)
    found = {part: x for part, x in _attention_of(model).items() if x != NAME}
    if found:
        said = ", ".join(f"{part or 'the model'} keeps {x!r}" for part, x in found.items())
        report.left["attention"] = f"{type(model).__name__} computes attention in its own code: {said}"
    else:
        report.swapped["attention"] = f"transformers' {before} -> tileformer's"
    swap_norms(model, report)
    if getattr(model, "loss_function", None) is usual:
        model.loss_function = causal_lm_loss
        report.swapped["loss_function"] = "transformers' ForCausalLMLoss -> tileformer's causal_lm_loss"
    return report


def swap_norms(model: nn.Module, report: Report) -> None:
    """Let the norms of transformers' own classes (LlamaRMSNorm, T5LayerNorm, Gemma's) compute by `rms_norm`, if they say the same of random rows."""
    for name, module in model.named_modules():
        kind = type(module).__name__
        if "Norm" not in kind or not type(module).__module__.startswith("transformers.") or "forward" in vars(module):
            continue
        forward = _rms_norm_of(module)
        if forward is None:
            report.left[name] = f"{kind}: it computes something else than layer_norm and rms_norm"
            continue
        module.forward = functools.partial(forward, module)  # not a bound method: pickle would look for it in the class
        report.swapped[name] = f"transformers' {kind} -> tileformer's rms_norm"


def _rms_norm_of(module: Any) -> Any:
    """The one of our two forwards that computes what a norm computes, None if neither does."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 1 or weight.is_meta or _eps(module) is None:
        return None
    x = torch.randn(4, len(weight), generator=torch.Generator().manual_seed(0)).to(weight)
    rtol, atol = (1e-4, 1e-5) if weight.dtype.itemsize > 2 else (0.05, 0.02)
    with torch.no_grad():
        try:
            expected = type(module).forward(module, x)
        except Exception:  # it wants other arguments: another kind of norm
            return None
        return next(
            (f for f in (_rms_norm, _rms_norm_plus_one) if torch.allclose(f(module, x), expected, rtol, atol)), None
        )


def _eps(module: Any) -> float | None:
    return getattr(module, "variance_epsilon", getattr(module, "eps", None))


def _rms_norm(self: Any, hidden_states: Tensor) -> Tensor:
    return rms_norm(hidden_states, self.weight.shape, self.weight, _eps(self))


def _rms_norm_plus_one(self: Any, hidden_states: Tensor) -> Tensor:  # as Gemma keeps its weight
    return rms_norm(hidden_states, self.weight.shape, 1 + self.weight, _eps(self))


_rms_norm.tileformer_swapped = _rms_norm_plus_one.tileformer_swapped = True  # type: ignore[attr-defined]  # `revert` knows them by this


def _attention_of(model: Any) -> dict[str, str]:
    """The attention implementation of a model, and of the parts that have a configuration of their own."""
    config = model.config
    parts = {"": config} | {
        key: getattr(config, key)
        for key in getattr(config, "sub_configs", {})
        if getattr(config, key, None) is not None
    }
    return {part: str(x._attn_implementation) for part, x in parts.items()}


def make_mask(
    batch_size: int, q_length: int, kv_length: int, q_offset: int = 0, kv_offset: int = 0, mask_function: Any = None,
    attention_mask: Tensor | None = None, **options: Any,
) -> Tensor | None:  # fmt: skip
    """What ``attend`` gets: None, or a boolean mask (B, 1, T_q, T_k), True = may attend; see transformers' ``sdpa_mask``.

    Where the mask is the causal one with padding, it also says so (as an attribute, which no copy has): the kernel then skips what is hidden.
    """
    masking_utils = _transformers("masking_utils")
    mask_function = mask_function or masking_utils.causal_mask_function
    given = dict(q_offset=q_offset, kv_offset=kv_offset, mask_function=mask_function, attention_mask=attention_mask)
    mask = masking_utils.sdpa_mask(batch_size, q_length, kv_length, **given, **options)
    aligned = isinstance(q_offset, int) and kv_offset == 0 and q_offset + q_length == kv_length
    if (
        mask is not None
        and mask_function is masking_utils.causal_mask_function
        and aligned
        and not torch.compiler.is_compiling()
    ):
        padding = masking_utils.prepare_padding_mask(attention_mask, kv_length, kv_offset)
        padding = None if padding is None else padding[:, :kv_length]
        mask.tileformer_causal = (padding, mask._version)
    return mask


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float | None = None,
    dropout: float = 0.0, is_causal: bool | None = None, position_bias: Tensor | None = None, softcap: float | None = None,
    output_attentions: bool | None = None, **options: Any,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """The attention of a transformers module: query (B, H, T_q, D), key and value (B, H_kv, T_k, D) -> ((B, T_q, H, D), weights or None).

    A boolean mask says who may attend, a floating one is added, as is ``position_bias``, which gets a gradient. Without a mask, ``is_causal`` (of
    the module, if it is not given) makes a call of several queries causal from the first key on, as with transformers' sdpa.

    Raises NotImplementedError for what our kernels do not compute (attention sinks, head masks, paged caches).
    """
    for name in _UNSUPPORTED:
        if options.get(name) is not None:
            raise NotImplementedError(
                f'attn_implementation="{NAME}" does not support {name}=: use "eager" for this model'
            )
    kept: dict[str, Any] = dict(scale=scaling, dropout_p=dropout, softcap=softcap or 0.0)
    if attention_mask is None:
        causal = getattr(module, "is_causal", False) if is_causal is None else is_causal
        kept["causal"] = bool(causal) and query.shape[2] > 1
    else:
        kept |= _masks(attention_mask, key, query.dtype)
    if position_bias is not None:
        position_bias = position_bias[..., : key.shape[2]].to(query.dtype)
        if "mask" in kept and kept["mask"].is_floating_point():
            position_bias = position_bias + kept.pop("mask")
        kept["bias"] = position_bias
    if not output_attentions:
        return attention(query, key, value, **kept).transpose(1, 2), None
    out, weights = attention(query, key, value, return_weights=True, **kept)
    return out.transpose(1, 2), weights


def _masks(given: Tensor, key: Tensor, dtype: torch.dtype) -> dict[str, Any]:
    """A mask of transformers, (B, 1 or H, T_q, T_k or more), as arguments of our attention: ranges of keys where it says or shows that it is one."""
    batch, keys = key.shape[0], key.shape[2]
    padding, version = getattr(given, "tileformer_causal", (None, -1))
    if version == given._version and given.shape[-1] == keys:
        return dict(causal="bottom_right", key_mask=padding)
    mask = given[..., :keys]
    if mask.is_floating_point():
        return dict(mask=mask.to(dtype))
    if mask.dim() == 4 and all(
        size == 1 or step == 0 for size, step in zip(mask.shape[1:3], mask.stride()[1:3], strict=True)
    ):
        return dict(key_mask=mask[:, 0, 0].expand(batch, keys))
    return dict(mask=mask)


def causal_lm_loss(
    logits: Tensor, labels: Tensor, vocab_size: int, num_items_in_batch: Tensor | int | None = None, ignore_index: int = -100,
    shift_labels: Tensor | None = None, **_: Any,
) -> Tensor:  # fmt: skip
    """Cross-entropy of the next token, as transformers' ``ForCausalLMLoss``, without its float32 copy of the logits."""
    if shift_labels is None:
        shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    target = shift_labels.reshape(-1).to(logits.device)
    loss = cross_entropy(logits.reshape(-1, vocab_size), target, ignore_index=ignore_index, reduction="none")
    items = (target != ignore_index).sum() if num_items_in_batch is None else num_items_in_batch
    return loss.sum(dtype=torch.float32) / torch.as_tensor(items, device=loss.device)  # a sum in float16 would overflow
