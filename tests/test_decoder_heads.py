"""Classifier and Tagger: padding never counts, every pool is its formula, both backbones serve."""

import dataclasses

import pytest
import torch
from torch.nn import functional as F

from tileformer.decoder import Classifier, DecoderLM, DecoderLMConfig, Seq2Seq, Seq2SeqConfig, Tagger

LM = DecoderLMConfig(13, d_model=16, nhead=2, num_layers=2, dim_feedforward=32, max_length=12)
PAIR = Seq2SeqConfig(
    13, 7, d_model=16, nhead=2, num_encoder_layers=2, num_decoder_layers=1, dim_feedforward=32, max_length=12
)
TOKENS = torch.tensor([[1, 4, 5, 6, 2], [1, 7, 2, 0, 0], [9, 0, 0, 0, 0], [0, 0, 0, 0, 0]])
LENGTHS = (5, 3, 1)


def backbone(kind):
    torch.manual_seed(0)
    return DecoderLM(LM) if kind == "lm" else Seq2Seq(PAIR)


kinds = pytest.mark.parametrize("kind", ["lm", "encoder"])


@kinds
@pytest.mark.parametrize("mix", [False, True])
@pytest.mark.parametrize("pool", ["mean", "last", "first"])
def test_features_are_the_pool_of_real_tokens(kind, mix, pool):
    m = Classifier(backbone(kind), 3, pool=pool, mix=mix).eval()
    features = m.features(TOKENS)
    states = m.head.combine(m.backbone.states(TOKENS))
    if not mix:
        assert torch.equal(states, m.backbone.states(TOKENS)[-1])
    for row, length in enumerate(LENGTHS):
        real = states[row, :length]
        wanted = {"mean": real.mean(0), "last": real[-1], "first": real[0]}[pool]
        assert torch.allclose(features[row], wanted, atol=1e-6)
    assert not features[3].any()  # a row of padding alone
    assert torch.allclose(m.features(F.pad(TOKENS, (0, 4))), features, atol=1e-5)
    assert m(TOKENS).shape == (4, 3)


@kinds
def test_padding_is_what_the_backbone_says(kind):
    torch.manual_seed(0)
    config = dataclasses.replace(LM if kind == "lm" else PAIR, pad_id=6)
    m = Classifier(DecoderLM(config) if kind == "lm" else Seq2Seq(config), 3).eval()
    tokens = torch.tensor([[1, 4, 0, 5], [0, 7, 6, 6]])
    states = m.backbone.states(tokens)[-1]
    assert torch.allclose(m.features(tokens), torch.stack([states[0].mean(0), states[1, :2].mean(0)]), atol=1e-6)


def test_a_head_drops_features_at_its_rate():
    m = Classifier(backbone("lm"), 16, dropout=0.7)
    torch.nn.init.eye_(m.head.linear.weight), torch.nn.init.zeros_(m.head.linear.bias)
    ones = torch.ones(500, 16)
    assert abs((m.head(ones) == 0).float().mean() - 0.7) < 0.03
    assert torch.equal(m.eval().head(ones), ones)


def test_the_encoders_states_end_with_its_memory():
    m = backbone("encoder").eval()
    states = m.states(TOKENS)
    assert len(states) == 3 and torch.equal(states[-1], m.encode(TOKENS)[0])


def test_a_mix_weighs_the_states_by_softmax():
    m = Classifier(backbone("lm"), 2, mix=True).eval()
    states = m.backbone.states(TOKENS)
    assert torch.allclose(m.head.combine(states), torch.stack(states).mean(0), atol=1e-6)
    with torch.no_grad():
        m.head.mix.weights.copy_(torch.tensor([0.0, 50.0, 0.0]))
        m.head.mix.scale.fill_(3.0)
    assert torch.allclose(m.head.combine(states), 3 * states[1], atol=1e-5)


@kinds
def test_a_frozen_backbone_leaves_the_head_to_learn(kind):
    m = Classifier(backbone(kind), 2, mix=True, dropout=0.0)
    m.backbone.requires_grad_(False)
    m(TOKENS).square().sum().backward()
    learning = {name for name, p in m.named_parameters() if p.grad is not None and p.grad.any()}
    assert learning == {f"head.{name}" for name in ("mix.weights", "mix.scale", "linear.weight", "linear.bias")}


@pytest.mark.parametrize("pool", ["mean", "last", "first"])
def test_no_gradient_reaches_an_embedding_through_padding(pool):
    m = Classifier(backbone("lm"), 2, pool=pool, dropout=0.0)
    m(TOKENS).square().sum().backward()
    assert not m.backbone.embedding.weight.grad[0].any()
    assert m.backbone.embedding.weight.grad[9].any()


@kinds
def test_a_tagger_judges_each_token(kind):
    m = Tagger(backbone(kind), 5, mix=True).eval()
    with torch.no_grad():
        m.head.mix.weights.copy_(torch.tensor([1.0, 0.0, -1.0]))
    logits = m(TOKENS)
    assert logits.shape == (4, 5, 5)
    alone = m(TOKENS[1:2, :3])
    assert torch.allclose(logits[1:2, :3], alone, atol=1e-5)
    assert torch.equal(logits, m.head(m.head.mix(m.backbone.states(TOKENS))))


def test_a_tiny_classifier_learns_which_token_is_there():
    torch.manual_seed(0)
    m = Classifier(backbone("lm"), 2)
    optimizer = torch.optim.AdamW(m.parameters(), lr=3e-3)
    tokens = torch.randint(3, 13, (64, 8))
    labels = (tokens == 5).any(1).long()
    for _ in range(100):
        loss = F.cross_entropy(m(tokens), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert (m.eval()(tokens).argmax(1) == labels).float().mean() > 0.95


def test_wrong_heads_are_refused():
    with pytest.raises(ValueError, match="one of mean, last, first, got 'max'"):
        Classifier(backbone("lm"), 2, pool="max")
    with pytest.raises(ValueError, match="at least 1 output, got 0"):
        Tagger(backbone("lm"), 0)
