"""GGUF files, as llama.cpp writes them: a Llama or a Qwen 2 or 3 in one file, with its tokenizer and chat template.

    folder = convert_gguf("SmolLM2-135M-Instruct.Q4_1.gguf", "runs/smollm2")        # then load(folder)

Read by the package `gguf`; weights in 4 or 8 bits become float32, and a Llama's queries and keys get back the order of
Hugging Face's files: llama.cpp's has the two halves of each head interleaved.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tileformer.decoder import name_maps
from tileformer.decoder.causal import CausalLM
from tileformer.decoder.pretrained import Writing, assign, save_pretrained
from tileformer.decoder.tokenizer import Tokenizer
from tileformer.extras import optional_import
from tileformer.files import PathLike, quote, shorten
from tileformer.kernels import rotary_tables

KINDS = ("F32", "F16", "BF16", "Q8_0", "Q4_1")
ARCHITECTURES = ("llama", "qwen2", "qwen3")
LAYER = {
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
    "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm",
}  # fmt: skip
WHOLE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
FREQS = "rope_freqs.weight"  # what divides the frequencies of a Llama 3.1 and later, in the place of its numbers
# How a text is cut before byte pairs are joined, by the names that llama.cpp has for it; "": by GPT-2's rules.
CUT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
CUT += r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
DIGITS = ("smollm", "smollm2")  # of which each is a piece before GPT-2's rules
PRE = {"gpt-2": "", "gpt2": "", **dict.fromkeys(DIGITS, ""), "llama-bpe": CUT, "qwen2": CUT.replace("{1,3}", "")}


class GGUF(NamedTuple):
    """What a file holds, in the words of Hugging Face's folders: a config.json, and tensors by their names, read one
    by one."""

    config: dict[str, Any]
    names: tuple[str, ...]
    get: Callable[[str], Tensor]
    tokenizer: Tokenizer


def read_gguf(path: PathLike) -> GGUF:
    """A GGUF file. ValueError, in one line, for one that is damaged, of another architecture or tokenizer, or with a
    tensor that is unknown or of a kind that we do not read."""
    path, gguf = Path(path), optional_import("gguf")
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        reader = gguf.GGUFReader(str(path))
        fields = {name: field.contents() for name, field in reader.fields.items()}
    except Exception as error:  # the package raises what numpy and struct do
        raise ValueError(f"{path}: damaged, or no GGUF file ({shorten(error)})") from None
    config = _config(path, fields)
    tensors = {}
    for tensor in reader.tensors:
        name, kind = _name(path, tensor.name, config["model_type"]), tensor.tensor_type.name
        if kind not in KINDS:
            raise ValueError(f"{path}: {tensor.name} is {kind}, we read {', '.join(KINDS)}: convert the file to one")
        tensors[name] = tensor
    if "lm_head.weight" not in tensors:
        config["tie_word_embeddings"] = True
    heads = {"self_attn.q_proj": config["num_attention_heads"], "self_attn.k_proj": config["num_key_value_heads"]}
    heads = heads if config["model_type"] == "llama" else {}

    def get(name: str) -> Tensor:
        tensor = tensors[name]
        try:
            if tensor.tensor_type.name == "BF16":
                x = torch.from_numpy(tensor.data.copy()).view(torch.bfloat16).float()
            else:
                x = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).astype("float32"))
        except Exception as error:
            raise ValueError(f"{path}: {tensor.name} is damaged ({shorten(error)})") from None
        x = x.reshape([int(n) for n in reversed(tensor.shape)])
        n = next((n for part, n in heads.items() if part in name), 0)
        if n and len(x) % (2 * n) == 0:
            x = x.view(n, -1, 2, *x.shape[1:]).transpose(1, 2).reshape(x.shape)
        return x

    if FREQS in tensors:
        config["rope_parameters"] |= _llama3(path, get(FREQS), config)
        del tensors[FREQS]
    return GGUF(config, tuple(tensors), get, _tokenizer(path, fields))


def load_gguf(path: PathLike, *, dtype: torch.dtype = torch.float32) -> tuple[CausalLM, Tokenizer]:
    """The model of a GGUF file, in eval mode, and its tokenizer. ValueError as `read_gguf`.

    Example:
        >>> model, tokenizer = load_gguf("SmolLM2-135M-Instruct.Q4_1.gguf")  # doctest: +SKIP
    """
    read = read_gguf(path)
    try:
        config = name_maps.config_from(read.config)
        with torch.device("meta"):
            model = CausalLM(config)
        assign(Path(path), model, name_maps.weights_from(config, read.get, read.names), dtype, torch.device("cpu"))
    except ValueError as error:
        text = str(error)
        raise ValueError(text if text.startswith(str(path)) else f"{path}: {text}") from None
    return model.eval(), read.tokenizer


def convert_gguf(path: PathLike, folder: PathLike, *, dtype: torch.dtype = torch.float32) -> Path:
    """Write the model of a GGUF file as a folder that `load`, transformers and others read; gives the folder."""
    model, tokenizer = load_gguf(path, dtype=dtype)
    writing = Writing(add_bos=tokenizer.add_bos, line="{prompt}{text}")
    card = f"# {Path(path).name}\n\nFrom a quantised file: fine to fine-tune, not for claims on the original."
    return save_pretrained(model, folder, tokenizer=tokenizer, writing=writing, card=card)


def _config(path: Path, fields: dict[str, Any]) -> dict[str, Any]:
    family = fields.get("general.architecture")
    if family not in ARCHITECTURES:
        raise ValueError(f"{path}: architecture {quote(family)}, we read {', '.join(ARCHITECTURES)}")

    def need(key: str, kind: Any = int) -> Any:
        value = fields.get(f"{family}.{key}")
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise ValueError(f"{path}: expected {family}.{key} as a number, found {quote(value)}")
        return kind(value)

    for key in ("expert_count", "rope.scaling.type", "attention.sliding_window"):
        if fields.get(f"{family}.{key}") not in (None, 0, "none"):
            raise ValueError(f"{path}: {family}.{key} {quote(fields[f'{family}.{key}'])} is not read")
    heads, width = need("attention.head_count"), need("embedding_length")
    size = fields.get(f"{family}.attention.key_length") or width // max(heads, 1)
    for key in ("rope.dimension_count", "attention.value_length"):
        if fields.get(f"{family}.{key}") not in (None, size):
            raise ValueError(f"{path}: {family}.{key} {quote(fields[f'{family}.{key}'])} is not a head's size, {size}")
    theta = need("rope.freq_base", float) if f"{family}.rope.freq_base" in fields else 10000.0
    ids = {name: fields.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos", "eot")}
    return {
        "model_type": family, "vocab_size": len(fields.get("tokenizer.ggml.tokens") or ()), "hidden_size": width,
        "intermediate_size": need("feed_forward_length"), "num_hidden_layers": need("block_count"), "head_dim": size,
        "num_attention_heads": heads, "num_key_value_heads": fields.get(f"{family}.attention.head_count_kv") or heads,
        "rms_norm_eps": float(f"{need('attention.layer_norm_rms_epsilon', float):.7g}"), "hidden_act": "silu",
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
        "max_position_embeddings": need("context_length"), "tie_word_embeddings": False, "bos_token_id": ids["bos"],
        "eos_token_id": ids["eos"] if ids["eot"] is None else ids["eot"],  # a turn's end
        "pad_token_id": fields.get("tokenizer.ggml.padding_token_id"),
    }  # fmt: skip


def _llama3(path: Path, divisors: Tensor, config: dict[str, Any]) -> dict[str, Any]:
    """The numbers of Llama 3.1's scaling that make these divisors of the frequencies; ValueError where none does."""
    theta, size = config["rope_parameters"]["rope_theta"], config["head_dim"]
    known = dict(low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192)
    said: dict[str, Any] = dict(rope_type="llama3", **known)
    if divisors.shape == (size // 2,) and divisors.isfinite().all():
        said["factor"] = round(float(divisors.max()), 3)
        cos, sin = (x[0].double() for x in rotary_tables(size, torch.ones(1), theta, said))
        frequency = theta ** -(torch.arange(0, size, 2, dtype=torch.float64) / size)
        if torch.allclose(torch.atan2(sin, cos) * divisors, frequency, rtol=1e-4):
            return said
    raise ValueError(f"{path}: {FREQS} {tuple(divisors.shape)} is not the scaling of Llama 3.1, {said}")


def _name(path: Path, name: str, family: str) -> str:
    """The name that Hugging Face's files have for a tensor."""
    first, *rest = name.split(".")
    if first == "blk" and len(rest) == 3 and rest[0].isdecimal() and rest[1] in LAYER:
        return f"model.layers.{rest[0]}.{LAYER[rest[1]]}.{rest[2]}"
    if first in WHOLE and rest == ["weight"]:
        return f"{WHOLE[first]}.weight"
    if name == FREQS:
        return name
    raise ValueError(f"{path}: unknown tensor {quote(name)} in a file of architecture {family}")


def _tokenizer(path: Path, fields: dict[str, Any]) -> Tokenizer:
    """Byte-level BPE (Radford et al. 2019) of the file's tokens and merges."""
    kind, pre = fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.pre", "gpt-2")
    if kind != "gpt2" or pre not in PRE:
        raise ValueError(f"{path}: tokenizer {quote(kind)} with {quote(pre)}, we read gpt2 with {', '.join(PRE)}")
    tokens, merges = fields.get("tokenizer.ggml.tokens"), fields.get("tokenizer.ggml.merges")
    types = fields.get("tokenizer.ggml.token_type") or [1] * len(tokens or ())
    if not tokens or not merges or len(types) != len(tokens) or len({*tokens}) != len(tokens):
        raise ValueError(f"{path}: damaged; expected distinct tokens, each with a type, and merges")
    tokenizers = optional_import("tokenizers")
    try:
        pairs = [tuple(merge.split(" ", 1)) for merge in merges]
        options = dict(ignore_merges=True) if pre == "llama-bpe" else {}  # a piece that is a token is that token
        made = tokenizers.Tokenizer(tokenizers.models.BPE({text: i for i, text in enumerate(tokens)}, pairs, **options))
    except Exception as error:
        raise ValueError(f"{path}: damaged; the tokenizers library says: {shorten(error)}") from None
    cut, rules = PRE[pre], [tokenizers.pre_tokenizers.Digits(individual_digits=True)] if pre in DIGITS else []
    if cut:
        rules.append(tokenizers.pre_tokenizers.Split(tokenizers.Regex(cut), "isolated"))
    rules.append(tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not cut))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(rules)
    made.decoder = tokenizers.decoders.ByteLevel()
    if pre == "qwen2":
        made.normalizer = tokenizers.normalizers.NFC()
    for number, add in ((3, made.add_special_tokens), (4, made.add_tokens)):  # control, and the maker's own
        texts = [text for text, kind in zip(tokens, types, strict=True) if kind == number]
        add([tokenizers.AddedToken(text, special=number == 3, normalized=False) for text in texts])
    keys = {"bos_id": "bos", "eos_id": "eos", "pad_id": "padding", "unk_id": "unknown"}
    ids = {name: fields.get(f"tokenizer.ggml.{key}_token_id") for name, key in keys.items()}
    ids["eos_id"] = ids["eos_id"] if (eot := fields.get("tokenizer.ggml.eot_token_id")) is None else eot
    tokenizer = Tokenizer("other", tokenizers.Tokenizer.from_str(json.dumps(json.loads(made.to_str()))), **ids)
    template = fields.get("tokenizer.chat_template")
    tokenizer.chat_template = template if isinstance(template, str) else None
    tokenizer.add_bos = bool(fields.get("tokenizer.ggml.add_bos_token", False))
    return tokenizer
