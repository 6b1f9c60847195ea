"""`huggingface.attend`, `make_mask` and the loss by themselves: what they read of transformers' arguments, and what
they refuse."""

import copy

import pytest
import torch

transformers = pytest.importorskip("transformers")

from tileformer.decoder import huggingface  # noqa: E402
from tileformer.kernels import use_backend  # noqa: E402


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


def noted(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The lengths of each call of `decode_attention` from here on."""
    lengths: list[list[int]] = []
    decode = huggingface.decode_attention

    def note(*tensors, **options):
        lengths.append(options["lengths"].tolist())
        return decode(*tensors, **options)

    monkeypatch.setattr(huggingface, "decode_attention", note)
    return lengths


@pytest.mark.parametrize("named", ["torch", pytest.param("interpret", marks=pytest.mark.interprets)])
def test_a_step_is_read_to_its_length(named: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Masks of a step, in every form that transformers makes: what attention makes of them, by the decoding kernels."""
    q, k, bias = torch.randn(2, 4, 3, 8), torch.randn(2, 2, 21, 8), torch.randn(1, 4, 3, 30)
    padding = torch.ones(2, 21, dtype=torch.bool)
    padding[0, :4] = padding[1, 9] = padding[:, 19:] = False
    dense = padding[:, None, None] & torch.ones(3, 21, dtype=torch.bool).tril(16)
    says = huggingface.make_mask(2, 3, 21, q_offset=18, attention_mask=torch.ones_like(padding))
    added = torch.zeros(2, 1, 3, 21).masked_fill(~dense, -torch.inf)
    nan = k.masked_fill(~padding[:, None, :, None], torch.nan)
    lengths = noted(monkeypatch)
    for mask, keys, length in (
        (None, k, 21), (says, k, 21), (dense, nan, 19), (added, k, 19), (dense.expand(2, 4, 3, 21), nan, 19),
        (torch.nn.functional.pad(dense, (0, 9)), nan, 19), (torch.zeros_like(dense), nan, 0),
    ):  # fmt: skip
        tokens = q if mask is not None else q[:, :, :1]
        for options in ({}, dict(position_bias=bias[:, :, : tokens.shape[2]], softcap=3.0)):
            finite = keys.nan_to_num()
            expected = huggingface.attend(torch.nn.Module(), tokens, finite, finite, mask, **options)[0]
            assert not lengths  # of a prompt, or in training
            with torch.no_grad(), use_backend(named):
                for _ in range(2):  # the second layer's
                    got = huggingface.attend(torch.nn.Module(), tokens, keys, keys, mask, **options)[0]
                    assert lengths.pop() == [length] * 2
                    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    with torch.no_grad():  # several tokens without a mask: a prompt, causal from the first key on
        expected = huggingface.attend(torch.nn.Module(), q, k[:, :, :3], k[:, :, :3], None, is_causal=True)[0]
        torch.testing.assert_close(huggingface.attend(torch.nn.Module(), q, k, k, None, is_causal=True)[0], expected)
        assert not lengths
        changed = dense.clone()
        for _ in range(2):
            huggingface.attend(torch.nn.Module(), q, k, k, changed)
            changed[..., 10:] = False  # what it remembers is of another mask
        assert lengths == [[19, 19], [10, 9]]


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generate_decodes_by_the_kernels(cache: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=0, eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    eager = transformers.LlamaForCausalLM(config).eval()
    ours = copy.deepcopy(eager)
    huggingface.use(ours)
    ids, kept = torch.randint(3, 50, (2, 9)), torch.ones(2, 9, dtype=torch.int64)
    ids[0, :4] = kept[0, :4] = 0
    options = dict(attention_mask=kept, max_new_tokens=6, do_sample=False, cache_implementation=cache)
    expected = eager.generate(ids, disable_compile=True, **options)
    calls = noted(monkeypatch)
    assert torch.equal(ours.generate(ids, disable_compile=True, **options), expected)
    with torch.inference_mode():
        assert torch.equal(ours.generate(ids, disable_compile=True, **options), expected)
    calls = calls[: len(calls) // 2]
    assert len(calls) == 2 * (5 + (cache == "static"))  # with a static cache a short prompt is a step, too


def test_a_step_is_compiled_without_a_break() -> None:
    q, k = torch.randn(2, 4, 1, 8), torch.randn(2, 2, 12, 8)
    mask = (torch.arange(12) < torch.tensor([5, 9])[:, None])[:, None, None]
    attend = lambda q, k, mask: huggingface.attend(torch.nn.Module(), q, k, k, mask)[0]  # noqa: E731
    with torch.no_grad():
        expected = attend(q, k, mask)
        got = torch.compile(attend, fullgraph=True, backend="eager")(q, k, mask)
    torch.testing.assert_close(got, expected)
