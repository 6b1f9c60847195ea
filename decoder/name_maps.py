"""What other libraries call it: configurations and weights of GPT-2, Llama, Mistral, Qwen 2 and 3, and Gemma 2 in the
form of Hugging Face's folders, both ways. `load` and `save_pretrained` use it; nothing of transformers is imported."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tileformer.decoder.causal import CausalConfig, CausalLM
from tileformer.decoder.pretrained import FORMS, Form
from tileformer.files import quote

ARCHITECTURES = {
    "gpt2": "GPT2LMHeadModel", "llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM", "gemma2": "Gemma2ForCausalLM",
}  # fmt: skip
ACTIVATIONS = {"silu": "silu", "gelu": "gelu", "relu": "relu", "gelu_new": "gelu_tanh"}
ACTIVATIONS["gelu_pytorch_tanh"] = "gelu_tanh"  # the same formula
SCALED = ("default", "linear", "llama3", "yarn")
# What has one value in the models that we compute; another one is refused.
FIXED = {
    "quantization_config": None, "partial_rotary_factor": 1.0, "add_cross_attention": False, "num_local_experts": None,
    "num_experts": None, "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False,
    "use_sliding_window": False, "use_bidirectional_attention": False,
}  # fmt: skip


class Map(NamedTuple):
    """A tensor of ours and the others' that are joined to it: "" as they are, "t" transposed, "1" less one, "v" the
    rows of a vocabulary, behind which padding may have one."""

    ours: str
    theirs: tuple[str, ...]
    how: str = ""


def config_from(hf: Mapping[str, Any]) -> CausalConfig:
    """Our configuration of a config.json. ValueError, one line that names key and value, for what we do not compute."""
    family = hf.get("model_type")
    if family not in ARCHITECTURES:
        raise ValueError(f"model_type {quote(family)} is none that we have: {', '.join(ARCHITECTURES)}")
    for name, value in FIXED.items():
        if hf.get(name) not in (None, value):
            raise ValueError(f"{name} {quote(hf[name])} is not computed, only {value}")
    shared: dict[str, Any] = dict(_ids(hf), family=family)
    act = hf.get("hidden_activation") or hf.get("hidden_act") or hf.get("activation_function")
    if not isinstance(act, str) or act not in ACTIVATIONS:
        raise ValueError(f"activation {quote(act)} is not computed: {', '.join(ACTIVATIONS)}")
    shared["activation"] = ACTIVATIONS[act]
    if family == "gpt2":
        C = _whole(hf, "n_embd")
        return CausalConfig(
            **shared, d_model=C, nhead=_whole(hf, "n_head"), num_layers=_whole(hf, "n_layer"),
            dim_feedforward=_whole(hf, "n_inner", 4 * C), gated=False, norm="layer", rope_theta=None, qkv_bias=True,
            norm_eps=_real(hf, "layer_norm_epsilon", 1e-5), out_bias=True, bias=True,
            max_length=_whole(hf, "n_positions"), tied=_flag(hf, "tie_word_embeddings", True),
        )  # fmt: skip
    biased, gemma, heads = _flag(hf, "attention_bias"), family == "gemma2", _whole(hf, "num_attention_heads")
    C, longest = _whole(hf, "hidden_size"), _whole(hf, "max_position_embeddings")
    theta, scaling = _rope(hf, longest)
    return CausalConfig(
        **shared, d_model=C, nhead=heads, num_layers=_whole(hf, "num_hidden_layers"),
        dim_feedforward=_whole(hf, "intermediate_size"), nhead_kv=_whole(hf, "num_key_value_heads", heads),
        head_dim=_whole(hf, "head_dim", C // heads), norm_eps=_real(hf, "rms_norm_eps", 1e-6), rope_theta=theta,
        rope_scaling=scaling, qkv_bias=biased or family == "qwen2", out_bias=biased and family != "qwen2",
        bias=_flag(hf, "mlp_bias"), qk_norm=family == "qwen3", window=_window(hf, family), alternating=gemma,
        attention_softcap=_real(hf, "attn_logit_softcapping"), logit_softcap=_real(hf, "final_logit_softcapping"),
        attention_scale=_whole(hf, "query_pre_attn_scalar") ** -0.5 if gemma else None,
        embed_scale=C**0.5 if gemma else 1.0, sandwich=gemma, tied=_flag(hf, "tie_word_embeddings", gemma),
        max_length=longest,
    )  # fmt: skip


def config_to(config: CausalConfig) -> dict[str, Any]:
    """The config.json of a configuration of ours: what `config_from` reads as the same. ValueError where none is."""
    family, acts = config.family, {ours: theirs for theirs, ours in ACTIVATIONS.items()}
    if family not in ARCHITECTURES:
        raise ValueError(f"family {quote(family)} is none of {', '.join(ARCHITECTURES)}")
    hf: dict[str, Any] = {"architectures": [ARCHITECTURES[family]], "model_type": family, "vocab_size": config.vocab}
    hf |= {"bos_token_id": config.bos_id, "eos_token_id": config.eos_id, "pad_token_id": config.pad_id}
    hf |= {"tie_word_embeddings": config.tied}
    if family == "gpt2":
        hf |= {"n_embd": config.d_model, "n_head": config.nhead, "n_layer": config.num_layers}
        hf |= {"n_inner": config.dim_feedforward, "layer_norm_epsilon": config.norm_eps}
        hf |= {"n_positions": config.max_length, "activation_function": acts[config.activation]}
        if config.activation == "gelu_tanh":
            hf["activation_function"] = "gelu_new"
    else:
        rope = {"rope_theta": config.rope_theta, **(config.rope_scaling or {"rope_type": "default"})}
        hf |= {"hidden_size": config.d_model, "num_attention_heads": config.nhead, "head_dim": config.size}
        hf |= {"num_hidden_layers": config.num_layers, "intermediate_size": config.dim_feedforward}
        hf |= {"num_key_value_heads": config.nhead_kv or config.nhead, "rms_norm_eps": config.norm_eps}
        hf |= {"rope_parameters": rope, "max_position_embeddings": config.max_length}
        hf |= {"attention_bias": config.out_bias} if family != "qwen2" else {"use_sliding_window": False}
        if family == "gemma2":
            hf |= {"hidden_activation": acts[config.activation], "query_pre_attn_scalar": round(config.scale**-2)}
            hf |= {"attn_logit_softcapping": config.attention_softcap, "sliding_window": config.window}
            hf |= {"final_logit_softcapping": config.logit_softcap}
        else:
            hf |= {"hidden_act": acts[config.activation], "mlp_bias": config.bias}
        if family == "mistral":
            hf["sliding_window"] = config.window
    again = config_from(hf)
    for name in vars(config):
        name = {"head_dim": "size", "nhead_kv": "", "attention_scale": "scale"}.get(name, name)
        if name in ("", "dropout"):
            continue
        value, back = getattr(config, name), getattr(again, name)
        if value != back and not (isinstance(value, float) and isinstance(back, float) and math.isclose(value, back)):
            raise ValueError(f"a {family} has no {name} {value}: it would be {back}")
    return hf


def maps(config: CausalConfig, names: Collection[str] | None = None) -> Iterator[Map]:
    """Every tensor of ours, and where it comes from."""
    if config.family == "gpt2":
        root = "transformer." if names is None or any(name.startswith("transformer.") for name in names) else ""
        yield Map("embedding.weight", (f"{root}wte.weight",), "v")
        yield Map("position.weight", (f"{root}wpe.weight",))
        for i in range(config.num_layers):
            for ours, theirs, how in (
                ("norm1", "ln_1", ""), ("self_attn.qkv", "attn.c_attn", "t"),
                ("self_attn.out_proj", "attn.c_proj", "t"), ("norm2", "ln_2", ""),
                ("linear1", "mlp.c_fc", "t"), ("linear2", "mlp.c_proj", "t"),
            ):  # fmt: skip
                yield Map(f"layers.{i}.{ours}.weight", (f"{root}h.{i}.{theirs}.weight",), how)
                yield Map(f"layers.{i}.{ours}.bias", (f"{root}h.{i}.{theirs}.bias",))
        yield from (Map(f"norm.{x}", (f"{root}ln_f.{x}",)) for x in ("weight", "bias"))
    else:
        one = "1" if config.family == "gemma2" else ""
        yield Map("embedding.weight", ("model.embed_tokens.weight",), "v")
        second = "pre_feedforward_layernorm" if config.sandwich else "post_attention_layernorm"
        norms = [("norm1", "input_layernorm"), ("norm2", second)]
        if config.sandwich:
            norms += [("norm3", "post_attention_layernorm"), ("norm4", "post_feedforward_layernorm")]
        if config.qk_norm:
            norms += [("self_attn.q_norm", "self_attn.q_norm"), ("self_attn.k_norm", "self_attn.k_norm")]
        gates = ("mlp.gate_proj", "mlp.up_proj") if config.gated else ("mlp.up_proj",)
        linears = [
            ("self_attn.qkv", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), config.qkv_bias),
            ("self_attn.out_proj", ("self_attn.o_proj",), config.out_bias),
            ("linear1", gates, config.bias),
            ("linear2", ("mlp.down_proj",), config.bias),
        ]
        for i in range(config.num_layers):
            for ours, name in norms:
                yield Map(f"layers.{i}.{ours}.weight", (f"model.layers.{i}.{name}.weight",), one)
            for ours, parts, biased in linears:
                for kind in ("weight", "bias")[: 1 + biased]:
                    yield Map(f"layers.{i}.{ours}.{kind}", tuple(f"model.layers.{i}.{part}.{kind}" for part in parts))
        yield Map("norm.weight", ("model.norm.weight",), one)
    if not config.tied:
        yield Map("output.weight", ("lm_head.weight",), "v")


def weights_from(
    config: CausalConfig, get: Callable[[str], Tensor], names: Collection[str]
) -> Iterator[tuple[str, Tensor]]:
    """Our tensors by name, made one by one of those that ``get`` reads. ValueError for a name that is missing, or that
    no part of the model is."""
    left = set(names)
    for ours, theirs, how in maps(config, names):
        if lost := [name for name in theirs if name not in names]:
            raise ValueError(f"the weights lack {lost[0]}")
        left -= {*theirs}
        parts = [get(name) for name in theirs]
        if len({part.shape[1:] for part in parts}) > 1:
            shapes = ", ".join(str(tuple(part.shape)) for part in parts)
            raise ValueError(f"{theirs[0]} and those that belong to it do not fit: {shapes}")
        tensor = parts[0] if len(parts) == 1 else torch.cat(parts)
        if how == "t":
            tensor = tensor.t().contiguous()
        elif how == "1":
            tensor = (tensor.float() + 1).to(tensor.dtype)
        elif how == "v" and config.pad_id is None:
            tensor = torch.cat([tensor, tensor.new_zeros(1, tensor.shape[1])])
        yield ours, tensor
    known = ("rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias", *("lm_head.weight",) * config.tied)
    if odd := [name for name in sorted(left) if not name.endswith(known)]:
        raise ValueError(f"the weights hold {quote(odd[0], 100)}, which a {config.family} has not")


def weights_to(config: CausalConfig, state: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The others' tensors by name, of our state_dict."""
    size, kv = config.size, config.nhead_kv or config.nhead
    for ours, theirs, how in maps(config):
        tensor = state[ours].detach()
        if how == "t":
            tensor = tensor.t().contiguous()
        elif how == "1":
            tensor = (tensor.float() - 1).to(tensor.dtype)
        elif how == "v":
            tensor = tensor[: config.vocab]
        sizes = [len(tensor) // len(theirs)] * len(theirs)
        if len(theirs) == 3:
            sizes = [config.nhead * size, kv * size, kv * size]
        yield from zip(theirs, tensor.split(sizes), strict=True)


def _ids(hf: Mapping[str, Any]) -> dict[str, Any]:
    """The size of the vocabulary, and its special ids; those that a file leaves out are the end's."""
    vocab, (bos, eos, pad) = _whole(hf, "vocab_size"), (hf.get(f"{name}_token_id") for name in ("bos", "eos", "pad"))
    if isinstance(eos, list):
        eos = eos[-1] if eos else None  # of a model that talks the last is the end of what it says
    for name, number in (("bos", bos), ("eos", eos), ("pad", pad)):
        if number is not None and (not isinstance(number, int) or isinstance(number, bool)):
            raise ValueError(f"expected {name}_token_id as a whole number, found {quote(number)}")
    eos = (bos if bos is not None else vocab - 1) if eos is None else eos
    bos = eos if bos is None else bos
    own = pad is None or pad in (bos, eos) or not 0 <= pad < vocab
    return dict(vocab=vocab, bos_id=bos, eos_id=eos, pad_id=None if own else pad)


def _rope(hf: Mapping[str, Any], longest: int) -> tuple[float, dict[str, Any] | None]:
    """The base of the rotary positions, and how they are scaled; `CausalConfig` checks the numbers of that."""
    rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    if not isinstance(rope, Mapping):
        raise ValueError(f"expected rope_parameters as an object, found {quote(rope)}")
    rope = {name: value for name, value in rope.items() if value is not None}
    if (share := rope.pop("partial_rotary_factor", 1.0)) != 1.0:
        raise ValueError(f"partial_rotary_factor {quote(share)} is not computed, only 1.0")
    theta: float = _real({"rope_theta": rope.pop("rope_theta", hf.get("rope_theta"))}, "rope_theta", 10000.0)
    kind = rope.setdefault("rope_type", rope.pop("type", "default"))
    if not isinstance(kind, str) or kind not in SCALED:
        raise ValueError(f"rope_type {quote(kind)} is not computed: {', '.join(SCALED)}")
    if kind in ("llama3", "yarn"):
        rope.setdefault("original_max_position_embeddings", longest)
    return theta, None if kind == "default" else rope


def _window(hf: Mapping[str, Any], family: str) -> int | None:
    """The window of a config.json, whose list of layers has to be that of its family."""
    n, window = _whole(hf, "num_hidden_layers"), None
    if family in ("mistral", "gemma2") and hf.get("sliding_window", 4096) is not None:  # theirs, where it is left out
        window = _whole(hf, "sliding_window", 4096)
    kinds, full, sliding = hf.get("layer_types"), "full_attention", "sliding_attention"
    usual = [sliding if window and (family == "mistral" or i % 2 == 0) else full for i in range(n)]
    if kinds is not None and kinds != usual:
        raise ValueError(f"layer_types {quote(kinds)} are not computed for a {family}, only {quote(usual)}")
    return window


def _whole(hf: Mapping[str, Any], name: str, default: int | None = None) -> int:
    value = default if hf.get(name) is None else hf[name]
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"expected {name} as a whole number from 1 on, found {quote(value)}")
    return value


def _real(hf: Mapping[str, Any], name: str, default: float | None = None) -> Any:
    value = default if hf.get(name) is None else hf[name]
    if value is None:
        return None
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
        raise ValueError(f"expected {name} as a number above 0, found {quote(value)}")
    return float(value)


def _flag(hf: Mapping[str, Any], name: str, default: bool = False) -> bool:
    value = default if hf.get(name) is None else hf[name]
    if not isinstance(value, bool):
        raise ValueError(f"expected {name} as true or false, found {quote(value)}")
    return value


FORMS |= dict.fromkeys(ARCHITECTURES, Form(CausalLM, config_from, config_to, weights_from, weights_to))
