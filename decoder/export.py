"""to_ctranslate2: a trained model as a folder that CTranslate2 runs, on CPUs and GPUs without torch."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from tileformer.decoder.blocks import Attention, Block, Stack
from tileformer.decoder.model import DecoderLM, Seq2Seq
from tileformer.decoder.nn.convert import TWINS
from tileformer.extras import optional_import

_MODULES = {Seq2Seq, DecoderLM, Attention, Block, Stack, nn.Linear, NonDynamicallyQuantizableLinear, nn.Embedding}
_MODULES |= {nn.ModuleList, nn.ModuleDict, *TWINS, *TWINS.values()}
_ACTIVATIONS = {F.relu: "RELU", F.gelu: "GELU"}


def to_ctranslate2(
    model: Seq2Seq | DecoderLM,
    folder: str | os.PathLike[str],
    *,
    source_tokens: Sequence[str] | None = None,
    target_tokens: Sequence[str] | None = None,
) -> None:
    """Write ``model`` as a float32 model of CTranslate2 (https://opennmt.net/CTranslate2), which may load it as int8.

    A `Seq2Seq` is run by ``ctranslate2.Translator``, a `DecoderLM` by ``ctranslate2.Generator``, with layers of our own
    or of torch.nn, norm first or last, ReLU or GELU. Up to near ties of float32 the tokens are those of `generate`:
    with ``beam_size=1``, and with ``beam_size=K, length_penalty=0`` beside ``num_beams=K, length_penalty=0.0``; both
    with ``disable_unk=True``, since padding is never chosen, and without a least length (``min_decoding_length=0`` or
    ``min_length=0``). Under another penalty beams can be others: `generate` divides by the length at each step,
    CTranslate2 once a beam has ended. So can they be where `generate` keeps the greedy row, which K beams would lose;
    and behind the shorter prompts of a batch, where a Generator's beams do not end at once: ``max_batch_size=1``.

    Args:
        folder: where to; made, and empty if it is there.
        source_tokens, target_tokens: the texts of the vocabularies by id, which CTranslate2 takes and gives instead of
            ids; default "0", "1", and so on. Those of ``pad_id``, the unknown token there, are the same text.

    Raises ValueError, before anything is written: without the package ctranslate2, for a model with a part that has no
    counterpart there (adapters, hooks, classes of a user), for vocabularies or a folder that do not fit.

    Example:
        >>> from tileformer.decoder import Seq2SeqConfig
        >>> to_ctranslate2(Seq2Seq(Seq2SeqConfig(20, 30)), "runs/ct2")  # doctest: +SKIP
        >>> options = dict(disable_unk=True, min_decoding_length=0, beam_size=1)
        >>> ctranslate2.Translator("runs/ct2").translate_batch([["7", "9"]], **options)  # doctest: +SKIP
    """
    specs = optional_import("ctranslate2.specs")
    if type(model) not in (Seq2Seq, DecoderLM):
        raise ValueError(f"a Seq2Seq or a DecoderLM is written, got a {type(model).__name__}")
    config, folder = model.config.general(), Path(folder)
    for name, module in model.named_modules():
        _check(name, module)
    vocabularies = {"target_tokens": _texts("target_tokens", target_tokens, config.vocab)}
    if isinstance(model, Seq2Seq):
        vocabularies["source_tokens"] = _texts("source_tokens", source_tokens, config.src_vocab)
        encoder, decoder = model.transformer.encoder, model.transformer.decoder
        if encoder.norm is None or decoder.norm is None:
            raise ValueError("a Seq2Seq needs a final norm in its encoder and its decoder to be written")
        sides: dict[str, Any] = {"encoder": (encoder.layers, encoder.norm, model.src_embedding, model.src_position)}
        sides["decoder"] = (decoder.layers, decoder.norm, model.tgt_embedding, model.tgt_position)
    elif source_tokens is not None:
        raise ValueError("source_tokens were given, and a DecoderLM has no source")
    else:
        sides = {"decoder": (model.parts().layers, model.norm, model.embedding, model.position)}
    unknown = {texts[config.pad_id] for texts in vocabularies.values()}
    if len(unknown) > 1:
        raise ValueError(f"source_tokens and target_tokens need one text at pad_id {config.pad_id}, got {unknown}")
    heads, activation, norm_first, eps = _form(model, [layer for layers, *_ in sides.values() for layer in layers])
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is there, and no empty folder: name another one")

    # A final norm stands behind layers of either form; CTranslate2 has room for one where the norm comes first.
    form = dict(num_heads=heads, activation=specs.Activation[activation], pre_norm=True)
    texts, counts = vocabularies["target_tokens"], tuple(len(layers) for layers, *_ in sides.values())
    if isinstance(model, Seq2Seq):
        spec = specs.TransformerSpec.from_config(counts, **form)
        spec.register_source_vocabulary(vocabularies["source_tokens"])
        spec.register_target_vocabulary(texts)
        spec.config.decoder_start_token = texts[config.bos_id]
    else:
        spec = specs.TransformerDecoderModelSpec.from_config(*counts, **form)
        spec.register_vocabulary(texts)
    for name, side in sides.items():
        _fill(getattr(spec, name), *side)
        getattr(spec, name).pre_norm = norm_first
    spec.config.bos_token, spec.config.eos_token = texts[config.bos_id], texts[config.eos_id]
    spec.config.unk_token, spec.config.layer_norm_epsilon = texts[config.pad_id], eps
    spec.validate()
    spec.optimize()
    folder.mkdir(parents=True, exist_ok=True)
    spec.save(str(folder))


def _check(name: str, module: nn.Module) -> None:
    """Raise ValueError where a module computes what CTranslate2 does not know of."""
    kind = type(module)
    if kind not in _MODULES:
        raise ValueError(f"{name} is a {kind.__module__}.{kind.__name__}, which CTranslate2 has no counterpart of")
    if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
        raise ValueError(f"{name} has a hook, or a forward of its own, which CTranslate2 would not call")


def _texts(name: str, texts: Sequence[str] | None, size: int) -> list[str]:
    """The texts of a vocabulary of `size` tokens; ValueError where they are not so many different ones."""
    found = [str(i) for i in range(size)] if texts is None else list(texts)
    if len(found) != size or len({*found}) != size:
        raise ValueError(f"{name} has {len(found)} texts, {len({*found})} different ones: the vocabulary has {size}")
    return found


def _form(model: nn.Module, layers: list[Any]) -> tuple[int, str, bool, float]:
    """Heads, activation, whether the norm comes first, and its eps, which CTranslate2 has one of for all layers."""
    forms = {(x.self_attn.num_heads, x.activation, x.norm_first) for x in layers}
    epsilons = {module.eps for module in model.modules() if isinstance(module, nn.LayerNorm)}
    if len(forms) > 1:
        raise ValueError(f"CTranslate2 has one form for all layers, these are (heads, activation, norm first) {forms}")
    if len(epsilons) > 1:
        raise ValueError(f"CTranslate2 has one eps for all norms, these have {epsilons}")
    heads, activation, norm_first = forms.pop()
    if activation not in _ACTIVATIONS:
        raise ValueError(f"activation {activation} has no counterpart: it takes relu and gelu")
    return heads, _ACTIVATIONS[activation], norm_first, epsilons.pop()


def _fill(spec: Any, layers: Sequence[Any], norm: nn.Module, words: nn.Embedding, positions: nn.Embedding) -> None:
    """Give an encoder's or a decoder's spec its weights."""
    embedding = spec.embeddings[0] if isinstance(spec.embeddings, list) else spec.embeddings
    embedding.weight, spec.scale_embeddings = _array(words.weight), True
    spec.position_encodings.encodings = _array(positions.weight * words.embedding_dim**0.5)
    if hasattr(spec, "projection"):
        spec.projection.weight = embedding.weight
    _affine(spec.layer_norm, norm)
    for to, layer in zip(spec.layer, layers, strict=True):
        _attention(to.self_attention, layer.self_attn, layer.norm1, (3,))
        last = layer.norm2
        if hasattr(to, "attention"):
            _attention(to.attention, layer.multihead_attn, layer.norm2, (1, 2))
            last = layer.norm3
        _affine(to.ffn.layer_norm, last)
        _affine(to.ffn.linear_0, layer.linear1)
        _affine(to.ffn.linear_1, layer.linear2)


def _attention(spec: Any, attention: nn.MultiheadAttention, norm: nn.Module, parts: tuple[int, ...]) -> None:
    """One projection to q, k and v, `parts` (3,), or one to q and one to k and v, (1, 2)."""
    rows = [attention.embed_dim * n for n in parts]
    bias = attention.in_proj_bias
    biases = [None] * len(parts) if bias is None else bias.split(rows)
    for linear, *part in zip(spec.linear[:-1], attention.in_proj_weight.split(rows), biases, strict=True):
        _assign(linear, *part)
    _affine(spec.linear[-1], attention.out_proj)
    _affine(spec.layer_norm, norm)


def _affine(spec: Any, module: Any) -> None:
    _assign(spec, module.weight, module.bias)


def _assign(spec: Any, weight: Tensor, bias: Tensor | None) -> None:
    """Of a linear map or a norm; a norm without a shift would be taken for an RMSNorm."""
    names = ("gamma", "beta") if hasattr(spec, "gamma") else ("weight", "bias")
    for name, x in zip(names, (weight, weight.new_zeros(len(weight)) if bias is None else bias), strict=True):
        setattr(spec, name, _array(x))


def _array(x: Tensor) -> Any:
    return x.detach().float().cpu().contiguous().numpy()
