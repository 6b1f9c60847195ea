"""Models of Hugging Face transformers with our attention, norms and loss: what their eager selves compute, padding on either side."""

import importlib.util

import pytest
import torch

transformers = pytest.importorskip("transformers")

from tileformer.bench import models  # noqa: E402
from tileformer.decoder import huggingface  # noqa: E402
from tileformer.kernels import use_backend  # noqa: E402

CPU = torch.device("cpu")


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
@pytest.mark.parametrize("name, side", [(name, side) for name, sides in models.SIDES.items() for side in sides])
def test_logits_and_gradients(name: str, side: str) -> None:
    if name in models.DEEPTAB:
        pytest.importorskip("einops")
        pytest.importorskip("rotary_embedding_torch")
        if importlib.util.find_spec("deeptab") is None:
            pytest.skip("deeptab is not installed")
    ratios = models.judge(name, side, "torch", CPU)
    assert max(ratios.values()) <= 1.0, {key: x for key, x in ratios.items() if x > 1.0}


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("name", models.GENERATE)
def test_generated_tokens(name: str, beams: int) -> None:
    assert models.same_tokens(name, beams, "torch", CPU)


def build(name: str):
    eager = models.eager(name)
    return eager, *models.ours(eager)


@pytest.mark.interprets
def test_the_kernels_serve_a_model() -> None:
    eager, ours, _ = build("GPT-2")
    given, kept = models.given(eager, "right")
    with use_backend("interpret"), torch.no_grad():
        torch.testing.assert_close(
            ours(**given).logits[kept.bool()], eager(**given).logits[kept.bool()], rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_loss_of_logits_in_half_precision(dtype) -> None:
    """Summed in float32: 20,000 losses do not fit float16, and would lose their last digits in bfloat16."""
    logits = torch.randn(1, 20_000, 50, dtype=dtype, generator=torch.Generator().manual_seed(0))
    labels = torch.randint(0, 50, (1, 20_000), generator=torch.Generator().manual_seed(1))
    expected = transformers.loss.loss_utils.ForCausalLMLoss
    for items in (None, 19_999, torch.tensor(19_999)):
        options = dict(labels=labels, vocab_size=50, num_items_in_batch=items)
        got = huggingface.causal_lm_loss(logits, **options)
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, expected(logits, **options), rtol=1e-4, atol=0)


def test_a_whole_model_can_be_saved(tmp_path) -> None:
    eager = models.eager("Llama, grouped heads")
    ours, *_ = models.ours(eager)
    torch.save(ours, tmp_path / "model.pt")
    again = torch.load(tmp_path / "model.pt", weights_only=False)
    with torch.no_grad():
        given, _ = models.given(eager, "right")
        expected = ours(**given).logits
        torch.testing.assert_close(again(**given).logits, expected)
        for x in ours.parameters():
            x.zero_()
        torch.testing.assert_close(again(**given).logits, expected)  # its norms read its own weights


def test_the_loss_of_a_language_model() -> None:
    eager, ours, report = build("GPT-2")
    given, kept = models.given(eager, "right")
    labels = given["input_ids"].masked_fill(kept == 0, -100)
    for options in ({}, dict(num_items_in_batch=torch.tensor(11))):
        torch.testing.assert_close(
            ours(**given, labels=labels, **options).loss, eager(**given, labels=labels, **options).loss
        )
    assert "loss_function" in report.swapped


def test_weights_on_demand() -> None:
    q = torch.randn(1, 2, 3, 8)
    out, weights = huggingface.attend(torch.nn.Module(), q, q, q, None, output_attentions=True)
    torch.testing.assert_close(out, (weights @ q).transpose(1, 2))


def test_one_row_of_padding_serves_the_whole_batch() -> None:
    q, k = torch.randn(2, 2, 3, 8), torch.randn(2, 2, 5, 8)
    kept = torch.tensor([True, True, False, True, True])[None, None, None]
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, k, kept).transpose(1, 2)
    for mask in (kept, kept.expand(2, 1, 3, 5)):
        torch.testing.assert_close(huggingface.attend(torch.nn.Module(), q, k, k, mask)[0], expected)


def test_a_mask_that_says_that_it_is_causal_is_dense_as_well() -> None:
    padding = torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 0]]).bool()
    mask = huggingface.make_mask(2, 3, 5, q_offset=2, attention_mask=padding)
    q, k = torch.randn(2, 2, 3, 8), torch.randn(2, 2, 5, 8)
    kept = huggingface._masks(mask, k, q.dtype)
    assert set(kept) == {"causal", "key_mask"}
    dense = huggingface._masks(mask.clone(), k, q.dtype)
    assert set(dense) == {"mask"}
    changed = huggingface.make_mask(2, 3, 5, q_offset=2, attention_mask=padding)
    changed &= False
    assert "mask" in huggingface._masks(changed, k, q.dtype)
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


def test_attention_in_a_model_of_its_own_code_is_reported() -> None:
    sizes = dict(vocab_size=61, n_embd=32, n_layer=1, n_head=4, rotary_dim=4, bos_token_id=0, eos_token_id=2)
    report = huggingface.use(transformers.GPTJForCausalLM(transformers.GPTJConfig(**sizes)))
    assert "GPTJForCausalLM computes attention in its own code" in report.left["attention"]
    assert report.swapped["transformer.ln_f"].endswith("LayerNorm")


def test_a_mask_adds_to_a_bias_and_the_scores_are_capped() -> None:
    q, k, bias = torch.randn(2, 2, 3, 8), torch.randn(2, 2, 5, 8), torch.randn(1, 2, 3, 5)
    kept = torch.rand(2, 1, 3, 5) > 0.3
    kept[..., 0] = True
    added = torch.zeros(2, 1, 3, 5).masked_fill(~kept, float("-inf"))
    for mask in (kept, added):
        scores = 2 * torch.tanh(q @ k.mT * 0.7 / 2) + bias + added
        options = dict(scaling=0.7, softcap=2.0, position_bias=bias, output_attentions=True)
        out, weights = huggingface.attend(torch.nn.Module(), q, k, k, mask, **options)
        torch.testing.assert_close(weights, scores.softmax(-1))
        torch.testing.assert_close(out, (scores.softmax(-1) @ k).transpose(1, 2))


def test_a_models_dropout_reaches_the_weights() -> None:
    q = torch.randn(2, 2, 30, 8)
    _, weights = huggingface.attend(torch.nn.Module(), q, q, q, None, dropout=0.5, output_attentions=True)
    assert 0.4 < (weights == 0).float().mean() < 0.6


def test_labels_that_are_shifted_already() -> None:
    logits, labels = torch.randn(2, 4, 11), torch.tensor([[3, 4, -100, 2], [1, 1, 2, -100]])
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    wrong = torch.zeros_like(labels)
    torch.testing.assert_close(huggingface.causal_lm_loss(logits, wrong, 11, shift_labels=labels), expected)


def test_masks_and_biases_of_longer_keys_are_cut() -> None:
    q, k, bias = torch.randn(2, 2, 3, 8), torch.randn(2, 2, 5, 8), torch.randn(1, 2, 3, 9)
    kept = torch.rand(2, 1, 3, 9) > 0.3
    kept[..., 0] = True
    added = torch.zeros(2, 1, 3, 9).masked_fill(~kept, float("-inf"))
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, k, (bias + added)[..., :5]).transpose(1, 2)
    for mask in (kept, added):
        found, weights = huggingface.attend(torch.nn.Module(), q, k, k, mask, position_bias=bias)
        torch.testing.assert_close(found, expected)
        assert weights is None


@pytest.mark.parametrize("own, asked", [(True, None), (True, False), (False, True), (False, None)])
def test_who_says_that_attention_is_causal(own, asked) -> None:
    module, q = torch.nn.Module(), torch.randn(1, 2, 4, 8)
    module.is_causal = own
    causal = own if asked is None else asked
    expected = torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=causal).transpose(1, 2)
    torch.testing.assert_close(huggingface.attend(module, q, q, q, None, is_causal=asked)[0], expected)
    one = huggingface.attend(module, q[:, :, -1:], q, q, None, is_causal=asked)[0]  # the newest query sees every key
    torch.testing.assert_close(one, huggingface.attention(q[:, :, -1:], q, q).transpose(1, 2))


@pytest.mark.parametrize("name", ["s_aux", "sinks", "head_mask", "cache", "block_mask", "score_mod"])
def test_every_argument_that_changes_attention_is_refused(name) -> None:
    q = torch.randn(1, 2, 3, 8)
    with pytest.raises(NotImplementedError, match=name):
        huggingface.attend(torch.nn.Module(), q, q, q, None, **{name: torch.ones(2)})


@pytest.mark.parametrize(
    "name, norm", [("Gemma 2, soft cap", "Gemma2RMSNorm"), ("Llama, grouped heads", "LlamaRMSNorm")]
)
def test_the_norms_of_a_model_are_swapped(name, norm) -> None:
    _, _, report = build(name)
    assert sum(norm in said for said in report.swapped.values()) > 2
    assert not any(norm in why for why in report.left.values())
