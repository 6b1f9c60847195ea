"""Models of Hugging Face transformers with our attention, norms and loss: what their eager selves compute, padding on either side."""

import copy

import pytest
import torch

transformers = pytest.importorskip("transformers")

from tileformer.decoder import huggingface  # noqa: E402
from tileformer.kernels import use_backend  # noqa: E402

SIZE = dict(vocab_size=61, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
SEQ2SEQ = dict(vocab_size=61, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
               encoder_ffn_dim=48, decoder_ffn_dim=48, pad_token_id=1, bos_token_id=0, eos_token_id=2, decoder_start_token_id=2,
               forced_eos_token_id=2)  # fmt: skip
T5 = dict(
    vocab_size=61,
    d_model=32,
    d_kv=8,
    d_ff=48,
    num_layers=2,
    num_heads=4,
    pad_token_id=1,
    eos_token_id=2,
    decoder_start_token_id=1,
)
# name -> class of the model, class of its configuration, its options
MODELS = {
    "GPT-2": ("GPT2LMHeadModel", "GPT2Config", dict(vocab_size=61, n_embd=32, n_layer=2, n_head=4, n_positions=64)),
    "Llama, grouped heads": ("LlamaForCausalLM", "LlamaConfig", SIZE | dict(num_key_value_heads=2)),
    "Mistral, a window of 4": ("MistralForCausalLM", "MistralConfig", SIZE | dict(num_key_value_heads=2, sliding_window=4)),
    "Gemma 2, soft cap": ("Gemma2ForCausalLM", "Gemma2Config",
                          SIZE | dict(num_key_value_heads=2, head_dim=8, sliding_window=4, attn_logit_softcapping=5.0)),
    "Qwen 2": ("Qwen2ForCausalLM", "Qwen2Config", SIZE | dict(num_key_value_heads=2)),
    "OPT": ("OPTForCausalLM", "OPTConfig",
            dict(vocab_size=61, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, ffn_dim=48, word_embed_proj_dim=32)),
    "GPT-NeoX": ("GPTNeoXForCausalLM", "GPTNeoXConfig", SIZE),
    "BERT": ("BertForMaskedLM", "BertConfig", SIZE),
    "RoBERTa": ("RobertaForMaskedLM", "RobertaConfig", SIZE),
    "ViT": ("ViTForImageClassification", "ViTConfig",
            {**SIZE, "image_size": 16, "patch_size": 4, "num_labels": 61}),
    "BART": ("BartForConditionalGeneration", "BartConfig", SEQ2SEQ),
    "Marian": ("MarianMTModel", "MarianConfig", SEQ2SEQ),
    "T5": ("T5ForConditionalGeneration", "T5Config", T5),
    "mT5": ("MT5ForConditionalGeneration", "MT5Config", T5),
}  # fmt: skip
GENERATES = [
    name
    for name, (cls, *_) in MODELS.items()
    if "CausalLM" in cls or "Conditional" in cls or "LMHead" in cls or "MT" in cls
]


def build(name: str):
    """A small model with random weights, eager, and itself with our attention, in evaluation mode (no dropout)."""
    model, config, options = MODELS[name]
    options = {key: x for key, x in options.items() if key != "vocab_size" or name != "ViT"}
    torch.manual_seed(0)
    config = getattr(transformers, config)(**options, attn_implementation="eager")
    eager = getattr(transformers, model)(config).eval()
    ours = copy.deepcopy(eager)
    report = huggingface.use(ours)
    return eager, ours, report


def inputs(model, side: str):
    """Two rows of 9 and 6 tokens, padded on one side; for encoder-decoders also targets."""
    generator = torch.Generator().manual_seed(1)
    if "ViT" in type(model).__name__:
        return dict(pixel_values=torch.randn(2, 3, 16, 16, generator=generator)), None
    ids = torch.randint(3, 61, (2, 9), generator=generator)
    kept = torch.ones_like(ids)
    kept[1, slice(0, 3) if side == "left" else slice(6, 9)] = 0
    given = dict(input_ids=ids, attention_mask=kept)
    if model.config.is_encoder_decoder:
        given["decoder_input_ids"] = torch.randint(3, 61, (2, 7), generator=generator)
        kept = None
    return given, kept


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", MODELS)
def test_logits_and_gradients(name: str, side: str) -> None:
    eager, ours, report = build(name)
    assert report.swapped and ours.config._attn_implementation == huggingface.NAME
    given, kept = inputs(eager, side)
    found = []
    for model in (eager, ours):
        logits = model(**given).logits
        if kept is not None:
            logits = logits[kept.bool()]
        weight = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2))
        (logits * weight).sum().backward()
        found.append((logits.detach(), {n: x.grad for n, x in model.named_parameters() if x.grad is not None}))
    (logits, grads), (our_logits, our_grads) = found
    torch.testing.assert_close(our_logits, logits, rtol=2e-5, atol=2e-5)
    assert grads.keys() == our_grads.keys()
    for n, grad in grads.items():
        torch.testing.assert_close(
            our_grads[n],
            grad,
            rtol=1e-4,
            atol=2e-5 * max(1.0, grad.abs().max().item()),
            msg=lambda text, n=n: f"{n}: {text}",
        )


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("name", GENERATES)
def test_generated_tokens(name: str, beams: int) -> None:
    eager, ours, _ = build(name)
    given, _ = inputs(eager, "left")
    given.pop("decoder_input_ids", None)
    options = dict(max_new_tokens=8, num_beams=beams, do_sample=False, pad_token_id=1, eos_token_id=2)
    assert torch.equal(ours.generate(**given, **options), eager.generate(**given, **options))


@pytest.mark.interprets
def test_the_kernels_serve_a_model() -> None:
    eager, ours, _ = build("GPT-2")
    given, kept = inputs(eager, "right")
    with use_backend("interpret"), torch.no_grad():
        torch.testing.assert_close(
            ours(**given).logits[kept.bool()], eager(**given).logits[kept.bool()], rtol=1e-4, atol=1e-4
        )


def test_the_loss_of_a_language_model() -> None:
    eager, ours, report = build("GPT-2")
    given, kept = inputs(eager, "right")
    labels = given["input_ids"].masked_fill(kept == 0, -100)
    for options in ({}, dict(num_items_in_batch=torch.tensor(11))):
        torch.testing.assert_close(
            ours(**given, labels=labels, **options).loss, eager(**given, labels=labels, **options).loss
        )
    assert "loss_function" in report.swapped


def test_what_is_not_supported_is_refused() -> None:
    q = torch.randn(1, 2, 3, 8)
    with pytest.raises(NotImplementedError, match="s_aux"):
        huggingface.attend(torch.nn.Module(), q, q, q, None, s_aux=torch.ones(2))


def test_weights_on_demand() -> None:
    q = torch.randn(1, 2, 3, 8)
    out, weights = huggingface.attend(torch.nn.Module(), q, q, q, None, output_attentions=True)
    torch.testing.assert_close(out, (weights @ q).transpose(1, 2))


def test_a_mask_that_says_that_it_is_causal_is_dense_as_well() -> None:
    padding = torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 0]]).bool()
    mask = huggingface.make_mask(2, 3, 5, q_offset=2, attention_mask=padding)
    q, k = torch.randn(2, 2, 3, 8), torch.randn(2, 2, 5, 8)
    kept = huggingface._masks(mask, 5, q.dtype)
    assert set(kept) == {"causal", "key_mask"}
    dense = huggingface._masks(mask.clone(), 5, q.dtype)
    assert set(dense) == {"mask"}
    changed = huggingface.make_mask(2, 3, 5, q_offset=2, attention_mask=padding)
    changed &= False
    assert "mask" in huggingface._masks(changed, 5, q.dtype)
    a, b = (huggingface.attention(q, k, k, **options) for options in (kept, dense))
    torch.testing.assert_close(a, b)


def test_lora_on_our_layers() -> None:
    peft = pytest.importorskip("peft")
    targets = ["self_attn", "multihead_attn", "linear1", "linear2"]
    found = []
    for convert in (False, True):
        torch.manual_seed(0)
        net = torch.nn.Transformer(16, 2, 1, 1, 32, dropout=0.0, batch_first=True, dtype=torch.float64)
        if convert:
            huggingface.convert(net)
        net = peft.get_peft_model(net, peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False)).double()
        torch.manual_seed(1)
        for name, x in net.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(x, std=0.3)
        source, target = torch.randn(2, 5, 16).double(), torch.randn(2, 4, 16).double()
        out = net(source, target)
        (out * torch.randn(out.shape)).sum().backward()
        found.append((out.detach(), {name: x.grad for name, x in net.named_parameters() if x.requires_grad}))
    (out, grads), (our_out, our_grads) = found
    torch.testing.assert_close(our_out, out)
    assert len(grads) == 20 and all(x is not None and x.any() for x in our_grads.values())
    torch.testing.assert_close(our_grads, grads)
