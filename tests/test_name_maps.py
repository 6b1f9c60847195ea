"""Folders of transformers both ways, small models with random weights; what we do not compute is refused by name; GGUF."""

import json

import pytest
import torch

pytest.importorskip("safetensors", reason="the train extra is not installed")

from tileformer.decoder import CausalConfig, CausalLM, generate, load, save_pretrained
from tileformer.decoder.name_maps import config_from, config_to

transformers = pytest.importorskip("transformers", reason="the hf extra is not installed")
transformers.utils.logging.disable_progress_bar()

SIZES = dict(
    vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, bos_token_id=1,
    num_key_value_heads=2, max_position_embeddings=64, eos_token_id=2, pad_token_id=None,
)  # fmt: skip
LLAMA3 = dict(rope_type="llama3", rope_theta=5e5, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
GEMMA2 = dict(head_dim=16, query_pre_attn_scalar=20, sliding_window=4, attn_logit_softcapping=5.0)
FORMS = {
    "gpt2": ("GPT2", dict(vocab_size=50, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2)),
    "llama": ("Llama", SIZES | dict(tie_word_embeddings=False)),
    "llama 3": ("Llama", SIZES | dict(
        tie_word_embeddings=True, attention_bias=True, mlp_bias=True,
        rope_parameters=LLAMA3 | dict(original_max_position_embeddings=16),
    )),
    "yarn": ("Llama", SIZES | dict(
        rope_parameters=dict(rope_type="yarn", rope_theta=1e4, factor=4.0, original_max_position_embeddings=16)
    )),
    "linear": ("Llama", SIZES | dict(rope_parameters=dict(rope_type="linear", rope_theta=1e4, factor=4.0))),
    "mistral": ("Mistral", SIZES | dict(sliding_window=5, head_dim=8)),
    "qwen2": ("Qwen2", SIZES),
    "qwen3": ("Qwen3", SIZES | dict(head_dim=12)),
    "gemma2": ("Gemma2", SIZES | GEMMA2 | dict(pad_token_id=0, final_logit_softcapping=3.0)),
}  # fmt: skip


def theirs(form):
    torch.manual_seed(0)
    name, sizes = FORMS[form]
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, f"{name}Config")(**sizes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) / 5)
    return model.double()


@pytest.mark.parametrize("form", FORMS)
def test_a_folder_of_transformers_is_ours_and_ours_is_theirs(form, tmp_path):
    model, tokens = theirs(form), torch.randint(3, 50, (2, 20), generator=torch.Generator().manual_seed(0))
    model.save_pretrained(tmp_path / "theirs", max_shard_size="20kB")
    ours, tokenizer = load(tmp_path / "theirs")
    assert tokenizer is None and ours.embedding.weight.dtype == torch.float64
    with torch.no_grad():
        expected = model(tokens).logits
        assert (ours(tokens) - expected).abs().max() < 2e-5 * expected.abs().max()  # their norms compute in float32
    greedy = model.generate(tokens, max_new_tokens=8, do_sample=False, pad_token_id=0)[:, 20:]
    found = generate(ours, tokens, 8)
    real = found != ours.pad_id
    assert found[real].equal(greedy[:, : found.shape[1]][real])
    save_pretrained(ours, tmp_path / "ours", shard=20_000)
    config = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert config["architectures"] == type(model).__name__.split() and "tileformer" not in config["model_type"]
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float64).eval()
    for name, parameter in again.state_dict().items():
        assert torch.allclose(parameter, model.state_dict()[name], atol=1e-6), name
    with torch.no_grad():
        assert torch.allclose(again(tokens).logits, expected, atol=1e-5)
    assert load(tmp_path / "ours")[0].config == ours.config


def hf(form="llama", **changes):
    return getattr(transformers, f"{FORMS[form][0]}Config")(**FORMS[form][1]).to_dict() | changes


@pytest.mark.parametrize(
    ("form", "changes", "message"),
    [
        ("llama", {"model_type": "mixtral"}, "model_type 'mixtral' is none that we have: gpt2, llama"),
        ("llama", {"quantization_config": {"bits": 4}}, "quantization_config {'bits': 4} is not computed, only None"),
        ("llama", {"hidden_act": "xielu"}, "activation 'xielu' is not computed: silu"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic"}}, "rope_type 'dynamic' is not computed: default"),
        ("llama", {"hidden_size": "32"}, "expected hidden_size as a whole number from 1 on, found '32'"),
        ("llama", {"num_hidden_layers": 0}, "expected num_hidden_layers as a whole number from 1 on, found 0"),
        ("qwen2", {"use_sliding_window": True}, "use_sliding_window True is not computed, only False"),
        ("mistral", {"layer_types": ["full_attention"] * 2}, "layer_types .* are not computed for a mistral"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx True is not computed"),
        ("llama", {"num_experts": 8}, "num_experts 8 is not computed, only None"),
        ("llama", {"rope_parameters": [1]}, r"expected rope_parameters as an object, found \[1\]"),
        ("llama", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor 0.5 is not computed"),
        ("llama", {"rope_parameters": {"rope_theta": "1e4"}}, "expected rope_theta as a number above 0, found '1e4'"),
        ("llama", {"rope_parameters": {"rope_type": "yarn"}}, "yarn takes factor, .* got original_max_position"),
        ("llama", {"rms_norm_eps": 0}, "expected rms_norm_eps as a number above 0, found 0"),
        ("llama", {"head_dim": "8"}, "expected head_dim as a whole number from 1 on, found '8'"),
        ("llama", {"hidden_act": ["silu"]}, r"activation \['silu'\] is not computed"),
        ("llama", {"eos_token_id": "</s>"}, "expected eos_token_id as a whole number, found '</s>'"),
        ("llama", {"eos_token_id": 50}, "eos_id 50 is outside the vocabulary of 50"),
        ("llama", {"layer_types": 2}, "layer_types 2 are not computed for a llama"),
        ("llama", {"tie_word_embeddings": "yes"}, "expected tie_word_embeddings as true or false, found 'yes'"),
        ("gpt2", {"n_embd": None}, "expected n_embd as a whole number from 1 on, found None"),
    ],
)
def test_what_we_do_not_compute_is_refused(form, changes, message):
    with pytest.raises(ValueError, match=message):
        config_from(hf(form, **changes))


def test_ids_of_a_configuration():
    config = config_from(hf(eos_token_id=[7, 9], bos_token_id=None, pad_token_id=9))
    assert (config.eos_id, config.bos_id, config.pad_id, config.padding) == (9, 9, None, 50)
    assert config_from(hf(pad_token_id=4)).padding == 4


def test_what_a_configuration_leaves_out_is_what_transformers_takes():
    known = hf("mistral", sliding_window=None, layer_types=None)
    assert config_from(known).window is None
    del known["sliding_window"]
    assert config_from(known).window == transformers.MistralConfig().sliding_window
    scaled = config_from(hf(rope_parameters=dict(rope_type="yarn", factor=2.0))).rope_scaling
    assert scaled["original_max_position_embeddings"] == 64
    assert config_from(hf("gemma2", use_bidirectional_attention=False)).sandwich
    assert config_from(hf("qwen2", attention_bias=True)).out_bias is False  # it has none there


def test_a_form_that_no_family_has_is_written_as_ours(tmp_path):
    pytest.importorskip("tokenizers", reason="the train extra is not installed")
    config = CausalConfig(50, 32, nhead_kv=2, qk_norm=True, window=4, num_layers=2, dim_feedforward=32)
    with pytest.raises(ValueError, match="a llama has no qk_norm True: it would be False"):
        config_to(config)
    model = CausalLM(config).eval()
    save_pretrained(model, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "tileformer"
    again = load(tmp_path)[0]
    assert again.config == config and again(torch.tensor([[3, 4]])).equal(model(torch.tensor([[3, 4]])))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x.pop("model.norm.weight"), "the weights lack model.norm.weight"),
        (lambda x: x.update({"model.extra": torch.ones(2)}), "the weights hold 'model.extra', which a llama has not"),
        (
            lambda x: x.update({"model.norm.weight": torch.ones(3)}),
            r"norm.weight is \(3,\), the configuration says \(32,",
        ),
        (
            lambda x: x.update({"model.layers.0.self_attn.q_proj.weight": torch.ones(3, 4)}),
            r"q_proj.weight and those that belong to it do not fit: \(3, 4\), \(16, 32\)",
        ),
    ],
)
def test_weights_that_do_not_fit_are_named(change, message, tmp_path):
    save_file = pytest.importorskip("safetensors.torch").save_file
    theirs("llama").save_pretrained(tmp_path)
    from safetensors.torch import load_file

    content = load_file(tmp_path / "model.safetensors")
    change(content)
    save_file(content, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=message) as caught:
        load(tmp_path)
    assert "\n" not in str(caught.value)


def test_gemmas_norms_are_one_more_in_the_dtype_that_is_asked_for(tmp_path):
    model = theirs("gemma2").bfloat16()
    model.save_pretrained(tmp_path)
    ours, _ = load(tmp_path, dtype=torch.float32)
    assert ours.norm.weight.equal(model.model.norm.weight.float() + 1) and ours.head.dtype == torch.float32
    halves, _ = load(tmp_path)  # rounded once
    assert halves.norm.weight.equal((model.model.norm.weight.float() + 1).bfloat16())
