"""GGUF files, small ones written here: values of each kind, tokenizer, template; damage and unknown parts are one line."""

import importlib
import inspect

import pytest
import torch

pytest.importorskip("gguf", reason="the pretrained extra is not installed")
pytest.importorskip("safetensors", reason="the train extra is not installed")
pytest.importorskip("tokenizers", reason="the train extra is not installed")

import gguf
import tokenizers

from tileformer.decoder import CausalConfig, CausalLM, load
from tileformer.decoder.chat import framed
from tileformer.decoder.gguf import convert_gguf, load_gguf, read_gguf
from tileformer.decoder.name_maps import weights_to
from tileformer.decoder.pretrained import load_writing

transformers = pytest.importorskip("transformers", reason="the hf extra is not installed")
BYTES = [*range(33, 127), *range(161, 173), *range(174, 256)]  # those that GPT-2's table shows as they are
LETTERS = [chr(b) for b in BYTES] + [chr(256 + i) for i in range(256 - len(BYTES))]
TOKENS = [*LETTERS, "ab", "Ġab", "<s>", "</s>"]
NAMES = {
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
}  # fmt: skip
KINDS = gguf.GGMLQuantizationType


FORMS = {"llama": {}, "qwen2": dict(qkv_bias=True), "qwen3": dict(qk_norm=True, head_dim=24)}


def model(architecture="llama"):
    torch.manual_seed(0)
    shape = dict(nhead_kv=2, head_dim=16, max_length=32, bos_id=258, eos_id=259, norm_eps=1e-5, rope_theta=500.0)
    config = CausalConfig(len(TOKENS), 64, 4, 2, 96, **shape | FORMS[architecture], family=architecture)
    made = CausalLM(config).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter) / 50 if parameter.dim() == 1 else 0.0)
    return made


def written(path, kind=KINDS.F32, change=lambda writer, tensors: None, **changes):
    """A file of `model` whose matrices are of a kind."""
    architecture = changes.get("architecture", "llama")
    writer, own = gguf.GGUFWriter(str(path), architecture), model(architecture if architecture in FORMS else "llama")
    config = own.config
    writer.add_embedding_length(config.d_model)
    writer.add_feed_forward_length(config.dim_feedforward)
    writer.add_block_count(config.num_layers)
    writer.add_head_count(config.nhead)
    writer.add_head_count_kv(config.nhead_kv)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_freq_base(changes.get("theta", config.rope_theta))
    writer.add_context_length(config.max_length)
    if architecture == "qwen3":
        writer.add_key_length(config.size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(changes.get("pre", "smollm"))
    writer.add_token_list(TOKENS)
    writer.add_token_types([1] * 258 + [3, changes.get("last", 3)])
    writer.add_token_merges(["a b", "Ġ ab"])
    writer.add_bos_token_id(258)
    writer.add_eos_token_id(259)
    writer.add_add_bos_token(True)
    writer.add_chat_template("{% for m in messages %}<s>{{ m.content }}</s>{% endfor %}")
    tensors = {}
    for name, x in weights_to(config, own.state_dict()):
        stem, _, part = name.rpartition(".")
        for kind_of, heads in (("q_proj", config.nhead), ("k_proj", config.nhead_kv)):
            if kind_of in name and architecture == "llama":  # llama.cpp's order: the halves of a head interleaved
                x = x.view(heads, 2, -1, x.shape[1]).transpose(1, 2).reshape(x.shape)
        if stem.startswith("model.layers."):
            layer, _, rest = stem.removeprefix("model.layers.").partition(".")
            name = f"blk.{layer}.{NAMES[rest]}.{part}"
        else:
            name = {"model.embed_tokens": "token_embd", "model.norm": "output_norm"}[stem] + ".weight"
        tensors[name] = x.numpy()
    change(writer, tensors)
    for name, x in tensors.items():
        if x.ndim > 1 and kind != KINDS.F32:
            writer.add_tensor(name, gguf.quantize(x, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, x)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(("kind", "error"), [("F32", 0), ("F16", 1e-3), ("BF16", 8e-3), ("Q8_0", 8e-3), ("Q4_1", 0.1)])
def test_values_of_each_kind(kind, error, tmp_path):
    found, tokenizer = load_gguf(written(tmp_path / "a.gguf", getattr(KINDS, kind)))
    own = model()
    assert found.config == own.config and tokenizer.add_bos
    for name, x in own.state_dict().items():
        assert (found.state_dict()[name] - x).abs().max() <= error * x.abs().max(), name


@pytest.mark.parametrize("architecture", ["qwen2", "qwen3"])
def test_qwens_heads_have_the_order_of_their_folders(architecture, tmp_path):
    found, _ = load_gguf(written(tmp_path / "a.gguf", architecture=architecture, pre="qwen2"))
    own = model(architecture)
    assert found.config == own.config
    assert all(found.state_dict()[name].equal(x) for name, x in own.state_dict().items())


def test_the_scaling_of_llama_3_1_is_read_from_its_divisors(tmp_path):
    said = dict(rope_type="llama3", factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0)
    said["original_max_position_embeddings"] = 8192
    config = transformers.LlamaConfig(
        hidden_size=64,
        num_attention_heads=4,
        max_position_embeddings=131072,
        rope_parameters=said | dict(rope_theta=5e5),
    )
    scaled = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")[0]
    divisors = 5e5 ** -(torch.arange(0, 16, 2) / 16) / scaled
    change = lambda writer, tensors, x=divisors: tensors.update({"rope_freqs.weight": x.numpy()})  # noqa: E731
    found, _ = load_gguf(written(tmp_path / "a.gguf", theta=5e5, change=change))
    assert found.config.rope_scaling == said
    for wrong in (divisors * 2, divisors[:-1]):
        with pytest.raises(ValueError, match=r"rope_freqs.weight .* is not the scaling of Llama 3.1"):
            load_gguf(written(tmp_path / "b.gguf", theta=5e5, change=lambda w, x: change(w, x, wrong)))  # noqa: B023


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "llama-bpe", "qwen2"])
def test_texts_are_cut_as_each_ones_own_tokenizer_cuts_them(pre, tmp_path):
    text = "I'LL don't  say\n\n  12345 naïve caf\u0065\u0301 <b>x_y</b>\t\t!!?\r\n 中文、\u00a0end  "
    made = tokenizers.Tokenizer.from_str(load_gguf(written(tmp_path / "a.gguf", pre=pre))[1]._made.to_str())
    cut, slow, qwen2 = (
        tokenizers.pre_tokenizers,
        importlib.import_module("transformers.convert_slow_tokenizer"),
        importlib.import_module("transformers.models.qwen2.tokenization_qwen2"),
    )
    theirs = {
        "gpt-2": [cut.ByteLevel(add_prefix_space=False)],
        "smollm": [cut.Digits(individual_digits=True), cut.ByteLevel(add_prefix_space=False)],
        "llama-bpe": [cut.Split(tokenizers.Regex(inspect.signature(slow.TikTokenConverter).parameters["pattern"].default), "isolated")],
        "qwen2": [cut.Split(tokenizers.Regex(qwen2.PRETOKENIZE_REGEX), "isolated")],
    }  # fmt: skip
    rules = theirs[pre] + [cut.ByteLevel(add_prefix_space=False, use_regex=False)] * (pre in ("llama-bpe", "qwen2"))
    assert made.pre_tokenizer.pre_tokenize_str(text) == cut.Sequence(rules).pre_tokenize_str(text)
    composed = made.normalizer.normalize_str(text) if made.normalizer else text
    assert ("\u00e9" in composed) == (pre == "qwen2")
    assert made.model.ignore_merges == (pre == "llama-bpe")


def test_the_end_of_a_turn_and_a_makers_own_tokens(tmp_path):
    path = written(tmp_path / "a.gguf", last=4, change=lambda w, x: w.add_eot_token_id(257))
    found, tokenizer = load_gguf(path)
    assert (found.eos_id, tokenizer.eos_id) == (257, 257)
    assert tokenizer.encode("a</s>") == [TOKENS.index("a"), 259]  # not one of those that a text may not say


def test_a_file_becomes_a_folder(tmp_path):
    convert_gguf(written(tmp_path / "a.gguf"), tmp_path / "folder")
    found, tokenizer = load(tmp_path / "folder")
    tokens = torch.tensor([[5, 6, 7]])
    assert found(tokens).equal(model()(tokens)) and load_writing(tmp_path / "folder").add_bos
    assert tokenizer.encode("ab ab12") == [256, 257, *(TOKENS.index(x) for x in "12")]
    assert tokenizer.decode([258, 256, 257, 259]) == "ab ab" and tokenizer.encode("<s>") != [258]
    assert framed(tokenizer)([{"content": "ab"}]) == "<s>ab</s>"
    assert tokenizer.encode_all(["<s>ab</s>"], special=True) == [[258, 256, 259]]
    assert (tokenizer.bos_id, tokenizer.eos_id) == (258, 259)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(architecture="falcon"), "architecture 'falcon', we read llama, qwen2, qwen3"),
        (dict(pre="tekken"), "tokenizer 'gpt2' with 'tekken', we read gpt2 with gpt-2"),
        (dict(kind=KINDS.Q5_0), "token_embd.weight is Q5_0, we read F32, F16, BF16, Q8_0, Q4_1"),
        (dict(change=lambda w, x: x.update({"blk.0.ssm_a": x["output_norm.weight"]})), "unknown tensor 'blk.0.ssm_a'"),
        (dict(change=lambda w, x: x.pop("blk.1.ffn_up.weight")), "the weights lack model.layers.1.mlp.up_proj.weight"),
        (dict(change=lambda w, x: w.add_expert_count(4)), "llama.expert_count 4 is not read"),
        (dict(change=lambda w, x: w.add_rope_dimension_count(8)), "dimension_count 8 is not a head's size, 16"),
        (dict(change=lambda w, x: w.add_sliding_window(8)), "llama.attention.sliding_window 8 is not read"),
        (
            dict(change=lambda w, x: x.update({"output_norm.weight": x["output_norm.weight"][:9]})),
            r"norm.weight is \(9,\)",
        ),
    ],
)
def test_what_we_do_not_read_is_one_line(options, message, tmp_path):
    with pytest.raises(ValueError, match=message) as caught:
        load_gguf(written(tmp_path / "a.gguf", **options))
    assert "\n" not in str(caught.value) and str(caught.value).startswith(str(tmp_path))


def test_damage_is_one_line(tmp_path):
    whole = written(tmp_path / "a.gguf").read_bytes()
    for content in (b"", b"GGUF", b"x" * 100, whole[:1000], whole[: len(whole) // 2], whole[:-100]):
        (file := tmp_path / "b.gguf").write_bytes(content)
        with pytest.raises(ValueError, match="b.gguf: ") as caught:
            load_gguf(file)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 400 + len(str(file))
    with pytest.raises(ValueError, match="no such file"):
        read_gguf(tmp_path / "none.gguf")
