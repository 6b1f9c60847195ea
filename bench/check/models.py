"""Whole models of torch.nn, transformers and DeepTab on our kernels, beside their eager selves (`check --models`).

Small ones with random weights: logits and the gradient of every parameter, padding on either side. The truth is the
model in float64 with torch's attention. (transformers' eager one computes softmax in float32, and gives NaN for a
padded row in float64: it is taken only where torch's does not serve the model.) Ours may err at most twice as much as
the eager model does in float32, plus a few roundings (bench/check/budget.py). Generated tokens are the same.
"""

import collections
import copy
import importlib
import importlib.util
import sys
import types
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from tileformer.bench.check.budget import over_budget
from tileformer.bench.tables import Column, Growing, head, line, markdown_cells
from tileformer.decoder import convert, huggingface
from tileformer.kernels import use_backend
from tileformer.kernels.backend import Backend

Inputs = tuple[dict[str, Any], Tensor | None]  # a forward's arguments; which logits count, None: all
_SIZE = dict(vocab_size=61, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
_GROUPED = dict(_SIZE, num_key_value_heads=2)
_GEMMA: dict[str, Any] = dict(_GROUPED, head_dim=8, sliding_window=4, attn_logit_softcapping=5.0)
_PAIR = dict(
    vocab_size=61, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
    encoder_ffn_dim=48, decoder_ffn_dim=48, pad_token_id=1, bos_token_id=0, eos_token_id=2, decoder_start_token_id=2,
    forced_eos_token_id=2,
)  # fmt: skip
_T5 = dict(
    vocab_size=61, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, pad_token_id=1, eos_token_id=2,
    decoder_start_token_id=1,
)  # fmt: skip
_OPT = {name: size for name, size in _SIZE.items() if name != "intermediate_size"}
_OPT |= dict(ffn_dim=48, word_embed_proj_dim=32)
# name -> transformers' class of the model, of its configuration, options
TRANSFORMERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "GPT-2": ("GPT2LMHeadModel", "GPT2Config", dict(vocab_size=61, n_embd=32, n_layer=2, n_head=4, n_positions=64)),
    "Llama, grouped heads": ("LlamaForCausalLM", "LlamaConfig", _GROUPED),
    "Mistral, a window of 4": ("MistralForCausalLM", "MistralConfig", dict(_GROUPED, sliding_window=4)),
    "Gemma 2, soft cap": ("Gemma2ForCausalLM", "Gemma2Config", _GEMMA),
    "Qwen 2": ("Qwen2ForCausalLM", "Qwen2Config", _GROUPED),
    "OPT": ("OPTForCausalLM", "OPTConfig", _OPT),
    "GPT-NeoX": ("GPTNeoXForCausalLM", "GPTNeoXConfig", _SIZE),
    "BERT": ("BertForMaskedLM", "BertConfig", _SIZE),
    "RoBERTa": ("RobertaForMaskedLM", "RobertaConfig", _SIZE),
    "ViT": ("ViTForImageClassification", "ViTConfig", dict(_SIZE, image_size=16, patch_size=4, num_labels=9)),
    "DETR": ("DetrForObjectDetection", "DetrConfig", dict(_PAIR, num_queries=7)),
    "BART": ("BartForConditionalGeneration", "BartConfig", _PAIR),
    "Marian": ("MarianMTModel", "MarianConfig", _PAIR),
    "T5": ("T5ForConditionalGeneration", "T5Config", _T5),
    "mT5": ("MT5ForConditionalGeneration", "MT5Config", _T5),
}  # fmt: skip
TORCH: dict[str, Any] = {"nn.Transformer": {}, "nn.Transformer, pre-norm": dict(norm_first=True, activation="gelu")}
# Subclasses of torch's encoder layer: one overrides `forward` around torch's own, one the attention block.
DEEPTAB = {f"DeepTab's {n}layer": f"{x}TransformerEncoderLayer" for n, x in (("", "Custom"), ("rotary ", "Rotary"))}
EAGER = ("DETR", "Gemma 2, soft cap")  # torch's attention does not serve these
SIDES = dict.fromkeys([*TORCH, *DEEPTAB, *TRANSFORMERS], ("left", "right")) | {"Gemma 2, soft cap": ("right",)}
TITLES = ("model", "swapped", "left", "logits", "gradients", "worst gradient", "greedy", "beams")
SHOWN = [Column(TITLES[n], lambda row, n=n: row[n], f"<{26 if n == 0 else 10}") for n in (0, 1, 2, 3, 4, 6, 7, 5)]  # type: ignore[misc]
_GENERATES = ("Causal", "LMHead", "Conditional", "MTModel")
GENERATE = [name for name, (cls, *_) in TRANSFORMERS.items() if any(word in cls for word in _GENERATES)]


def eager(name: str) -> Any:
    """The model as its library makes it, in evaluation mode, so without dropout."""
    torch.manual_seed(0)
    if name in TORCH:
        return nn.Transformer(32, 4, 2, 2, 48, batch_first=True, **TORCH[name]).eval()
    if name in DEEPTAB:
        cls = getattr(_deeptab(), DEEPTAB[name])
        shape = types.SimpleNamespace(d_model=32, n_heads=4, transformer_dim_feedforward=48)
        layer = cls(shape) if "Custom" in cls.__name__ else cls(32, 4, 48, batch_first=True)
        return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    transformers: Any = importlib.import_module("transformers")
    model, config, options = TRANSFORMERS[name]
    options = dict(options, attn_implementation="eager")
    if name in ("ViT", "DETR"):
        del options["vocab_size"]
    if name == "DETR":
        layers = dict(hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1], layer_type="basic", out_features=["stage4"])
        backbone = transformers.ResNetConfig(embedding_size=8, **layers)
        options |= dict(use_timm_backbone=False, use_pretrained_backbone=False, backbone=None, backbone_config=backbone)
    return getattr(transformers, model)(getattr(transformers, config)(**options)).eval()


def _deeptab() -> Any:
    """DeepTab's layers, without its own __init__ files: these load a training framework that the layers do not need."""
    file = "deeptab.nn.blocks.transformer"
    if file in sys.modules:
        return sys.modules[file]
    spec = importlib.util.find_spec("deeptab")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError("deeptab is not installed: pip install --no-deps deeptab einops rotary-embedding-torch")
    folders = "deeptab", "deeptab.nn", "deeptab.nn.blocks"
    for name in folders:
        folder = sys.modules[name] = types.ModuleType(name)
        folder.__path__ = ["/".join([spec.submodule_search_locations[0], *name.split(".")[1:]])]
    try:
        return importlib.import_module(file)
    finally:
        for name in folders:
            del sys.modules[name]


def ours(model: nn.Module) -> tuple[Any, Any]:
    """A copy of the model that computes with our kernels, and the report of what was swapped."""
    model = copy.deepcopy(model)
    torchs = type(model).__module__.startswith(("torch.", "tileformer."))
    return model, convert(model) if torchs else huggingface.use(model)


def inputs_of(model: Any, side: str) -> Inputs:
    """Two rows, of 9 and 6 positions, padded on the `side` "left" or "right"."""
    draw, kind = torch.Generator().manual_seed(1), type(model).__name__
    kept = torch.ones(2, 9, dtype=torch.long)
    kept[1, slice(0, 3) if side == "left" else slice(6, 9)] = 0
    if kind == "Transformer":
        source, target = torch.randn(2, 9, 32, generator=draw), torch.randn(2, 7, 32, generator=draw)
        masks = dict(src_key_padding_mask=kept == 0, memory_key_padding_mask=kept == 0)
        return dict(src=source, tgt=target, tgt_mask=nn.Transformer.generate_square_subsequent_mask(7), **masks), None
    if kind == "TransformerEncoder":
        return dict(src=torch.randn(2, 9, 32, generator=draw), src_key_padding_mask=kept == 0), kept.bool()
    if kind.startswith("Detr"):
        seen = torch.ones(2, 64, 64, dtype=torch.long)
        seen[1, :, slice(0, 24) if side == "left" else slice(40, 64)] = 0
        return dict(pixel_values=torch.randn(2, 3, 64, 64, generator=draw), pixel_mask=seen), None
    if kind.startswith("ViT"):
        return dict(pixel_values=torch.randn(2, 3, 16, 16, generator=draw)), None
    tokens: dict[str, Any] = dict(input_ids=torch.randint(3, 61, (2, 9), generator=draw), attention_mask=kept)
    if model.config.is_encoder_decoder:
        return tokens | dict(decoder_input_ids=torch.randint(3, 61, (2, 7), generator=draw)), None
    return tokens, kept.bool()


def _computed(model: Any, inputs: Inputs, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """Logits and the gradient of each parameter."""
    arguments = {name: x.to(device, dtype if x.is_floating_point() else x.dtype) for name, x in inputs[0].items()}
    model = model.to(device, dtype)
    out = model(**arguments)
    logits = out if isinstance(out, Tensor) else out.logits
    if inputs[1] is not None:
        logits = logits[inputs[1].to(device)]
    weight = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2)).to(device, dtype)
    model.zero_grad()
    (logits * weight).sum().backward()
    return {"logits": logits.detach()} | {n: x.grad for n, x in model.named_parameters() if x.grad is not None}


def errors_of(name: str, side: str, backend: Backend | None, device: torch.device) -> dict[str, float]:
    """Error over budget of the logits and of each parameter's gradient: at most 1 passes."""
    model = eager(name)
    inputs = inputs_of(model, side)
    with use_backend(backend or "auto"):
        got = _computed(ours(model)[0], inputs, torch.float32, device)
    plain = _computed(copy.deepcopy(model), inputs, torch.float32, device)
    if name in TRANSFORMERS and name not in EAGER:
        model.set_attn_implementation("sdpa")
    truth = _computed(model, inputs, torch.float64, device)
    if got.keys() != truth.keys():
        raise AssertionError(f"{name}: gradients of {sorted(got.keys() ^ truth.keys())} on one side only")
    size: dict[str, float] = collections.defaultdict(float)  # of a module's: a key's bias has 0 but for rounding
    for key, x in truth.items():
        module = key.rpartition(".")[0]
        size[module] = max(size[module], float(x.abs().max()))
    return {key: over_budget(got[key], plain[key], x, size[key.rpartition(".")[0]]) for key, x in truth.items()}


def same_tokens(name: str, beams: int, backend: Backend | None, device: torch.device) -> bool:
    """Whether a model and its eager self generate the same tokens from prompts that are padded on the left."""
    model = eager(name).to(device)
    arguments = {key: x.to(device) for key, x in inputs_of(model, "left")[0].items() if key != "decoder_input_ids"}
    options = dict(max_new_tokens=8, num_beams=beams, do_sample=False, pad_token_id=1, eos_token_id=2)
    with use_backend(backend or "auto"):
        got = ours(model)[0].generate(**arguments, **options)
    return torch.equal(got, model.generate(**arguments, **options))


def rows(backend: Backend | None, device: torch.device) -> Iterator[list[str]]:
    """The cells of TITLES, model by model."""
    absent = importlib.util.find_spec("deeptab") is None
    for name in [*TORCH, *([] if absent else DEEPTAB), *TRANSFORMERS]:
        report = ours(eager(name))[1]
        errors = [errors_of(name, side, backend, device) for side in SIDES[name]]
        logits = max(x.pop("logits") for x in errors)
        worst, key = max((ratio, key) for x in errors for key, ratio in x.items())
        tokens = [str(same_tokens(name, n, backend, device)) if name in GENERATE else "" for n in (1, 3)]
        tokens = [{"True": "the same", "False": "OTHERS"}.get(x, "-") for x in tokens]
        yield [name, str(len(report.swapped)), str(len(report.left)), f"{logits:.2f}", f"{worst:.2f}", key, *tokens]


def main(backend: Backend | None, device: torch.device, file: str | None) -> int:
    """Print the table, also to a Markdown `file`; 1 if something is over its budget or generates other tokens."""
    table: list[list[str]] = []
    on = f"({backend or 'auto'} on {device.type}, torch {torch.__version__.split('+')[0]})"
    about = f"Written by `tileformer check --models --report docs/models.md` {on}. {' '.join(__doc__.split())}"
    print(head(SHOWN))
    with Growing(file, lambda: f"# Whole models\n\n{about}\n\n{markdown_cells(TITLES, table)}\n") as growing:
        for row in rows(backend, device):
            table.append(row)
            growing.write()
            print(line(SHOWN, row), flush=True)
    return int(any(float(row[3]) > 1 or float(row[4]) > 1 or "OTHERS" in row for row in table))
