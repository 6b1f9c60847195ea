"""DecoderLM: the function of a plain torch.nn model, the same for a document padded, packed or read from a cache."""

import dataclasses
from unittest import mock

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tileformer.decoder import DecoderLM, DecoderLMConfig, KVCache, revert, sublayers
from tileformer.kernels import use_backend

CONFIG = DecoderLMConfig(13, d_model=16, nhead=2, num_layers=2, dim_feedforward=32, max_length=12)
LENGTHS = (9, 12, 1, 5)  # the longest the model takes, and a single token


def model(seed=0, **changes):
    torch.manual_seed(seed)
    return DecoderLM(dataclasses.replace(CONFIG, **changes)).eval()


def documents():
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(1, CONFIG.vocab, (length,), generator=generator) for length in LENGTHS]


def padded():
    return nn.utils.rnn.pad_sequence(documents(), batch_first=True)


def packed(dtype=torch.int32):
    """All documents behind each other, and where each begins and the last one ends."""
    ends = torch.tensor([0, *LENGTHS]).cumsum(0)
    return torch.cat(documents())[None], ends.to(dtype)


class Plain(nn.Module):
    """The same model as its formula, in torch.nn's own words."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        C = config.d_model
        self.embedding, self.position = nn.Embedding(config.vocab, C), nn.Embedding(config.max_length, C)
        shape = (C, config.nhead, config.dim_feedforward, 0.0, config.activation)
        count = 1 if config.share_layers else config.num_layers
        options = {"batch_first": True, "norm_first": config.norm_first}
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(*shape, **options) for _ in range(count))
        self.norm = nn.LayerNorm(C)

    def forward(self, tokens):
        T = tokens.shape[1]
        x = (self.embedding(tokens) + self.position(torch.arange(T))) * self.config.d_model**0.5
        causal = nn.Transformer.generate_square_subsequent_mask(T, dtype=x.dtype)
        for i in range(self.config.num_layers):
            x = self.layers[i % len(self.layers)](x, src_mask=causal)
        return self.norm(x) @ self.embedding.weight.T


def loss_and_gradients(m, logits, tokens):
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), ignore_index=0)
    return [loss, *torch.autograd.grad(loss, list(m.parameters()))]


@pytest.mark.parametrize("changes", [{}, {"norm_first": False, "activation": "relu"}, {"share_layers": True}], ids=str)
def test_equals_a_plain_torch_model(changes):
    ours = model(**changes).double()
    theirs = Plain(ours.config).double()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    tokens = padded()
    got, wanted = ours(tokens), theirs(tokens)
    real = tokens != 0
    assert torch.allclose(got[real], wanted[real], rtol=0, atol=1e-7)
    pairs = zip(loss_and_gradients(ours, got, tokens), loss_and_gradients(theirs, wanted, tokens), strict=True)
    assert all(torch.allclose(a, b, rtol=0, atol=1e-7) for a, b in pairs)
    assert revert(ours).swapped  # torch's own layers serve the model too
    assert torch.allclose(ours(tokens)[real], wanted[real], rtol=0, atol=1e-7)


@pytest.mark.parametrize("served", ["torch", pytest.param("interpret", marks=pytest.mark.interprets)])
def test_packed_documents_are_those_of_a_padded_batch(served):
    """Logits and every gradient, of a loss that never asks for the first token of the next document."""
    m, tokens, (flat, ends) = model().double(), padded(), packed()
    real, bounds = tokens != 0, []
    m.layers[0].register_forward_pre_hook(lambda m, args, kw: bounds.append(kw.get("max_seqlen")), with_kwargs=True)
    with use_backend(served):
        wanted, got = m(tokens), m(flat, cu_seqlens=ends)
        assert torch.allclose(got[0], wanted[real], rtol=0, atol=1e-9)
        wanted_gradients = loss_and_gradients(m, wanted, tokens)
        labels = torch.cat([F.pad(document[1:], (0, 1)) for document in documents()])
        loss = F.cross_entropy(got[0], labels, ignore_index=0)
        gradients = [loss, *torch.autograd.grad(loss, list(m.parameters()))]
    assert bounds == [None, max(LENGTHS)]
    for mine, theirs in zip(gradients, wanted_gradients, strict=True):
        assert torch.allclose(mine, theirs, rtol=0, atol=1e-9)


def test_packed_tokens_behind_the_last_document_belong_to_none():
    m, (flat, ends) = model(), packed(torch.int64)
    for more in (3, 2 * CONFIG.max_length):
        wider = F.pad(flat, (0, more), value=5)
        assert torch.allclose(m(wider, cu_seqlens=ends)[:, :-more], m(flat, cu_seqlens=ends), atol=1e-6)


def test_cached_steps_give_the_logits_of_full_recomputation():
    for changes in ({}, {"norm_first": False}, {"share_layers": True, "num_layers": 3}):
        m, tokens = model(**changes), torch.stack([d for d in documents() if len(d) > 8][:1] * 3)
        with torch.no_grad():
            full = m(tokens)
            for piece in (1, 2, 9):
                cache = KVCache(m.config.num_layers, CONFIG.max_length)
                parts = [m(tokens[:, i : i + piece], cache=cache) for i in range(0, 9, piece)]
                assert cache.length == 9
                assert torch.allclose(torch.cat(parts, 1), full, atol=1e-5)


@pytest.mark.parametrize("at", range(1, 9))
def test_a_later_token_changes_no_earlier_logit(at):
    m, tokens = model(), documents()[0][None]
    changed = tokens.clone()
    changed[0, at] = tokens[0, at] % (CONFIG.vocab - 1) + 1
    before, after = m(tokens)[0], m(changed)[0]
    assert torch.equal(before[:at], after[:at])
    assert not torch.allclose(before[at:], after[at:])


def test_padding_changes_no_logit_of_a_token():
    m, tokens = model(), padded()
    logits = m(tokens)
    for row, document in enumerate(documents()):
        assert torch.allclose(m(document[None])[0], logits[row, : len(document)], atol=1e-5)


def test_shared_layers_have_one_layers_parameters():
    shared, own = model(share_layers=True, num_layers=5), model(num_layers=5)
    layer = sum(p.numel() for p in own.layers[0].parameters())
    sizes = [sum(p.numel() for p in m.parameters()) for m in (shared, own)]
    assert sizes[1] - sizes[0] == 4 * layer
    assert len(shared.states(padded())) == 6
    assert not torch.allclose(shared(padded()), model(share_layers=True, num_layers=4)(padded()), atol=1e-2)


def test_states_are_embedding_and_layers_the_last_one_normed():
    m, tokens = model(), padded()
    states = m.states(tokens)
    assert len(states) == CONFIG.num_layers + 1 and all(x.shape == (4, 12, 16) for x in states)
    assert torch.equal(F.linear(states[-1], m.embedding.weight), m(tokens))
    assert torch.allclose(states[0], (m.embedding(tokens) + m.position.weight) * 4.0, atol=1e-6)
    assert torch.allclose(states[-1].mean(-1), torch.zeros(4, 12), atol=1e-5)


def test_what_enters_the_layers_is_dropped_in_training():
    m = model(dropout=0.5).train()
    share = (m.states(padded())[0] == 0).float().mean()
    assert 0.4 < share < 0.6 and m.eval().states(padded())[0].all()


def test_logits_start_near_unit_size_and_gradients_reach_every_parameter():
    m = model(d_model=64, nhead=4, dropout=0.0).train()
    logits = m(padded())
    assert 0.5 < logits.std() < 2
    assert 0.9 < m.layers[0].linear1.weight.abs().max() / (6 / (64 + 32)) ** 0.5 <= 1  # Glorot's, as nn.Transformer
    assert all(g.isfinite().all() and g.any() for g in loss_and_gradients(m, logits, padded()))


ONE = torch.ones(1, 4, dtype=torch.int64)
BAD_CALLS = {
    "float tokens": (TypeError, "token ids", lambda m: m(ONE.float())),
    "rank": (ValueError, r"\(B, T\), got \(4,\)", lambda m: m(ONE[0])),
    "long": (ValueError, "13 in one document.*max_length 12", lambda m: m(ONE[:, :1].expand(2, 13))),
    "long document": (ValueError, "13 in one", lambda m: m(ONE[:, :1].expand(1, 20), cu_seqlens=torch.tensor([0, 7, 20]))),
    "packed batch": (ValueError, r"\(1, total\).*got \(2, 4\)", lambda m: m(ONE.expand(2, 4), cu_seqlens=torch.tensor([0, 4]))),
    "packed and cached": (ValueError, "no cache", lambda m: m(ONE, cu_seqlens=torch.tensor([0, 4]), cache=KVCache(2, 9))),
    "depth of the cache": (ValueError, "the cache has 3 layers, this model 2", lambda m: m(ONE, cache=KVCache(3, 9))),
    "cached past the end": (
        ValueError,
        "reach 13 in one document.*max_length 12",
        lambda m: [m(torch.ones(1, n, dtype=torch.int64), cache=cache) for cache in [KVCache(2, 20)] for n in (9, 4)],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_call_is_refused_in_one_line(case):
    error, message, call = BAD_CALLS[case]
    with torch.no_grad(), pytest.raises(error, match=message) as caught:
        call(model())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"nhead": 3}, "16.*3 heads"),
        ({"num_layers": 0}, "num_layers must be at least 1, got 0"),
        ({"activation": "tanh"}, "'relu' or 'gelu', got 'tanh'"),
        ({"dropout": 1.0}, r"\[0, 1\), got 1.0"),
        ({"eos_id": 13}, "vocab 13"),
        ({"bos_id": 2}, r"three ids inside the vocabulary, got \(0, 2, 2\)"),
    ],
)
def test_bad_config_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **changes)


class _InFloat64(nn.Module):
    def forward(self, x):
        return x.double()


@pytest.mark.interprets
def test_blocks_on_the_kernels_are_those_of_torchs_operators_and_hooked_parts_see_what_modules_see():
    lm, tokens, branches = model(), documents()[0][None], []
    expected = lm.states(tokens)
    with use_backend("interpret"):
        for got, wanted in zip(lm.states(tokens), expected, strict=True):
            torch.testing.assert_close(got, wanted)
        lm.norm.register_forward_hook(lambda module, args, output: output.double())
        lm.layers[0].dropout1.register_forward_pre_hook(lambda module, args: branches.append(len(args)))
        last = lm.states(tokens)[-1]
    torch.testing.assert_close(last, expected[-1].double(), atol=1e-5, rtol=1e-5)  # what a hook gives is not converted
    assert branches == [1], "the branch alone, without its residual"


@pytest.mark.interprets
def test_the_norm_of_the_next_block_is_one_pass_with_the_residual_unless_a_block_is_hooked():
    lm, tokens, outputs = model(), documents()[0][None], []
    run = mock.Mock(wraps=sublayers.add_norm)
    with mock.patch.object(sublayers, "add_norm", run), use_backend("interpret"):
        states = lm.states(tokens)
        assert run.call_count == 2 * CONFIG.num_layers
        with torch.autocast("cpu", torch.bfloat16):
            assert {x.dtype for x in lm.states(tokens)} == {torch.float32}
        run.reset_mock()
        lm.layers[0].register_forward_hook(lambda module, args, output: outputs.append(output))
        for got, expected in zip(lm.states(tokens), states, strict=True):
            torch.testing.assert_close(got, expected)
        assert run.call_count == CONFIG.num_layers and len(outputs) == 1
    lm.layers[0]._forward_hooks.clear()
    lm.layers[1]._compiled_call_impl = mock.Mock(side_effect=lm.layers[1].forward)  # as block.compile() sets it
    lm.states(tokens)
    assert lm.layers[1]._compiled_call_impl.called, "a block that is compiled alone is called"
    lm.norm = _InFloat64()
    assert lm.hidden(tokens).dtype == torch.float64, "what another module gives is not converted"
