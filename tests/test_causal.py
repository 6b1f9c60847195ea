"""Pretrained forms: cached as recomputed, packed as alone, kernels as operators; configurations that make no sense."""

import dataclasses

import pytest
import torch

from tileformer.decoder import (
    CausalConfig,
    CausalLM,
    Classifier,
    Engine,
    Tagger,
    causal,
    generate,
    generate_speculatively,
    load,
    save_pretrained,
    stream,
    sublayers,
)
from tileformer.decoder.generation.cache import KVCache
from tileformer.decoder.generation.paged import PagedCache, PagePool
from tileformer.kernels import use_backend
from tileformer.training.data.batches import Frame, PackedBatches
from tileformer.training.losses import language_loss

BASE = dict(vocab=40, d_model=16, nhead=4, num_layers=3, dim_feedforward=24, max_length=64)
GPT2 = dict(norm="layer", rope_theta=None, bias=True, qkv_bias=True, out_bias=True, gated=False, activation="gelu_tanh")
GEMMA2 = dict(
    sandwich=True, attention_softcap=5.0, logit_softcap=3.0, window=4, alternating=True, activation="gelu_tanh",
    embed_scale=4.0, attention_scale=0.2, nhead_kv=2, head_dim=8,
)  # fmt: skip
LLAMA3 = dict(
    rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16
)
FORMS = {
    "llama": dict(nhead_kv=2), "llama3": dict(nhead_kv=2, rope_scaling=LLAMA3, bias=True, pad_id=0), "gpt2": GPT2,
    "linear": dict(rope_scaling=dict(rope_type="linear", factor=4.0)), "mistral": dict(nhead_kv=1, window=5),
    "qwen2": dict(qkv_bias=True, tied=False), "qwen3": dict(qk_norm=True, head_dim=6, nhead_kv=2), "gemma2": GEMMA2,
}  # fmt: skip


def made(form, dtype=torch.float64):
    torch.manual_seed(1)
    model = CausalLM(CausalConfig(**BASE, **FORMS[form])).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(8)
            else:
                parameter.add_(torch.randn_like(parameter) / 4)
    return model


def rows(pad, *lengths):
    tokens = torch.randint(3, 40, (len(lengths), max(lengths)), generator=torch.Generator().manual_seed(3))
    return tokens.masked_fill(torch.arange(max(lengths)) >= torch.tensor(lengths)[:, None], pad)


@pytest.mark.parametrize("form", FORMS)
def test_a_cache_gives_what_no_cache_gives(form):
    model = made(form)
    prompts = rows(model.pad_id, 7, 4, 2)
    with torch.no_grad():
        assert model.explain().startswith("a packed step")
    packed = generate(model, prompts, 12)
    assert packed.equal(generate(model, prompts, 12, use_cache=False))
    handle = model.layers[0].register_forward_hook(lambda *_: None)
    assert generate(model, prompts, 12).equal(packed) and "hook" in model.explain()  # by its modules
    handle.remove()
    for row, found in zip(prompts, packed.tolist(), strict=True):
        alone = generate(model, row[row != model.pad_id][None], 12)[0].tolist()
        assert alone == [token for token in found if token != model.pad_id]
    long = rows(model.pad_id, 30, 25)
    assert generate(model, long, 6).equal(generate(model, long, 6, use_cache=False))
    assert torch.stack([*stream(model, prompts, 12)], 1)[:, : packed.shape[1]].equal(packed)


@pytest.mark.parametrize("form", FORMS)
def test_logits_of_steps_are_those_of_the_whole_row(form):
    model, row = made(form), rows(0, 12)
    with torch.no_grad():
        whole = model(row)[0]
        logits, state = model.start(row[:, :3], capacity=12)
        steps = [
            logits,
            *(model.step(row[:, t], state) for t in range(3, 9)),
            *model.step(row[:, 9:], state)[0][:, None],
        ]
        assert torch.cat(steps)[:, :40].allclose(whole[2:], atol=1e-11)
        cache = KVCache(3, 12)
        states = model.states(row)
        hooked = [layer.register_forward_hook(lambda *_: None) for layer in model.layers]
        assert len(states) == 4 and all(
            x.allclose(y, atol=1e-11) for x, y in zip(states, model.states(row), strict=True)
        )
        assert model._logits(states[-1], model.head)[0].equal(whole)
        for handle in hooked:
            handle.remove()
        parts = [model(part, cache=cache) for part in row.split([5, 1, 6], 1)]
        assert torch.cat(parts, 1)[0].allclose(whole, atol=1e-11)


@pytest.mark.interprets
@pytest.mark.parametrize("form", ["gpt2", "qwen3", "gemma2"])
def test_the_kernels_decode_it_too(form):
    """The cache with lengths on the device, and every op that a GPU would run, interpreted."""
    model = made(form, torch.float32)
    prompts = rows(model.pad_id, 5, 3)
    with use_backend("interpret"):
        found = generate(model, prompts, 3)
    assert found.equal(generate(model, prompts, 3))


@pytest.mark.parametrize("form", FORMS)
def test_beams_and_drafts(form):
    model = made(form)
    prompts = rows(model.pad_id, 6, 3)
    beams = generate(model, prompts, 20, num_beams=3)  # long enough to give up slots
    assert beams.equal(generate(model, prompts, 20, num_beams=3, use_cache=False))
    with use_backend("reference"):  # as on a GPU, where slots are kept
        assert generate(model, prompts, 20, num_beams=3).equal(beams)
    assert generate_speculatively(model, prompts, 9).tolist() == generate(model, prompts, 9).tolist()


@pytest.mark.parametrize(
    ("form", "by"), [("llama", "a step"), ("gpt2", "a step"), ("gemma2", "a step"), ("gemma2", "its modules")]
)
def test_an_engine_with_slots_and_with_pages(form, by):
    """Two prompts begin alike, and share pages; each slot is used again."""
    model = made(form)
    if by == "its modules":
        model.layers[0].register_forward_hook(lambda *_: None)
    shared = rows(model.pad_id, 20)[0].tolist()
    prompts = [shared[:6], [*shared, 5], [*shared, 7, 9], shared[5:8]]
    expected = [generate(model, torch.tensor([row]), 9)[0].tolist() for row in prompts]
    for options in (dict(slots=2), dict(slots=2, pages=8), dict(slots=1, pages=6)):
        engine = Engine(model, **options)
        said = {engine.add(torch.tensor(row), max_length=9): [] for row in prompts}
        for event in engine.run():
            said[event.id] += [event.token] * (event.token is not None)
        assert [*said.values()] == expected, options


@pytest.mark.parametrize("form", ["gpt2", "gemma2"])
@torch.no_grad()
def test_keys_in_8_bits_in_slots_and_in_pages(form):
    model, prompts = made(form), rows(0, 18, 18)
    exact, exact_state = model.start(prompts, capacity=50)
    model.cache_dtype = torch.int8
    logits, state = model.start(prompts, capacity=50)
    paged = PagedCache(PagePool(8), 2, 50)
    paged.insert(torch.tensor([0, 1]), model.start(prompts, capacity=50)[1])
    assert logits.allclose(exact)  # a prompt attends to its own keys as they are
    for n in (1, 3, 1, 20):  # the last is a prompt's size, which slots take only at their start
        new = torch.randint(3, 40, (2, n))
        other = model.step(new, paged)
        if n < 20:
            assert other.allclose(model.step(new, state), atol=1e-9)
        expected = model.step(new, exact_state)
        assert 0 < (other - expected).abs().max() < 0.05 * expected.abs().max()


@pytest.mark.parametrize("form", FORMS)
def test_documents_see_nothing_of_each_other_and_every_weight_learns(form):
    model = made(form).train()
    rows = [[5, 6, 7, 8, 9, 10, 11], [12, 13]]
    (batch,) = PackedBatches(rows, 16, frame=Frame(model.pad_id, 1, 2, -100))
    alone = model(torch.tensor([[1, 12, 13]]))
    assert model(batch.source, cu_seqlens=batch.cu_seqlens)[0, 8:].allclose(alone[0], atol=1e-11)
    loss = language_loss(model, batch)
    loss.backward()
    learned = {name: p.grad for name, p in model.named_parameters()}
    assert all(g is not None and g.isfinite().all() and g.any() for g in learned.values())
    truth = torch.nn.functional.cross_entropy(model(batch.source, cu_seqlens=batch.cu_seqlens)[0], batch.labels[0])
    assert loss.item() == pytest.approx(truth.item())
    tokens = torch.full((1, 90), 5)  # what stands behind the last document has a position, too
    assert model(tokens, cu_seqlens=torch.tensor([0, 3]))[:, :3].allclose(model(tokens[:, :3]), atol=1e-11)
    if model.config.pad_id is None:
        assert not learned["embedding.weight"][-1].any() and model(batch.source).shape[-1] == 40


def test_weights_that_change_are_gathered_again():
    model = made("qwen3")
    prompts = rows(model.pad_id, 4)
    before = generate(model, prompts, 8)
    with torch.no_grad():
        model.layers[1].linear2.weight.mul_(-1)
    assert generate(model, prompts, 8).equal(generate(model, prompts, 8, use_cache=False))
    with torch.no_grad():
        model.layers[1].linear2.weight.data.mul_(-1)
        model.norm.weight.mul_(1.0)
    assert generate(model, prompts, 8).equal(before)
    model.layers[0].norm1.weight.data = -model.layers[0].norm1.weight.data  # another memory
    assert generate(model, prompts, 8).equal(generate(model, prompts, 8, use_cache=False))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(nhead_kv=3), "nhead 4 must be a multiple of nhead_kv 3"),
        (dict(d_model=18), "a width of 18 cannot be split into 4 heads"),
        (dict(head_dim=5), "a head of 5 cannot be rotated"),
        (dict(activation="tanh"), "activation must be one of relu, gelu, gelu_tanh, silu, got 'tanh'"),
        (dict(norm="batch"), "norm must be one of rms, layer, got 'batch'"),
        (dict(window=0), "window must be at least 1"),
        (dict(eos_id=40), "eos_id 40 is outside the vocabulary of 40"),
        (dict(pad_id=2), "pad_id 2 is also bos_id or eos_id"),
        (dict(dropout=1), r"dropout must be in \[0, 1\)"),
        (dict(num_layers=0), "num_layers must be at least 1"),
        (dict(rope_scaling=dict(rope_type="yarn")), "yarn takes factor, .* got none"),
        (dict(rope_scaling=dict(rope_type="su", factor=2.0)), "rope_type must be one of llama3, yarn, got 'su'"),
        (dict(rope_scaling=dict(rope_type="linear")), "expected a rope_type and its numbers, such as factor"),
        (dict(rope_scaling=[2.0]), "expected a rope_type and its numbers, such as factor"),
        (dict(rope_scaling=LLAMA3, rope_theta=None), "needs rope_theta: learned positions are not scaled"),
    ],
)
def test_what_makes_no_model(options, message):
    with pytest.raises(ValueError, match=message):
        CausalConfig(**BASE | options)


def test_tokens_that_do_not_fit():
    model = made("llama")
    with pytest.raises(ValueError, match="tokens reach 65 in one document, this model was built for max_length 64"):
        model(torch.ones(1, 65, dtype=torch.int64))
    with pytest.raises(TypeError, match=r"tokens must hold token ids \(int64\), got torch.float32"):
        model(torch.ones(1, 2))
    with pytest.raises(ValueError, match=r"tokens must be \(B, T\), got \(2,\)"):
        model(torch.ones(2, dtype=torch.int64))
    with pytest.raises(ValueError, match="the cache has 2 layers, this model 3"):
        model(torch.ones(1, 2, dtype=torch.int64), cache=KVCache(2, 8))
    with pytest.raises(ValueError, match="packed tokens are"):
        model(torch.ones(2, 2, dtype=torch.int64), cu_seqlens=torch.tensor([0, 2]))
    with pytest.raises(ValueError, match="a CausalLM has no source"):
        model.start(torch.ones(1, 1, dtype=torch.int64), capacity=3, source=torch.ones(1, 1), use_cache=False)
    assert dataclasses.replace(model.config, pad_id=0).padding == 0


@pytest.mark.interprets
@pytest.mark.parametrize("form", ["gemma2", "gpt2"])
def test_a_layers_end_and_the_next_ones_norm_are_one_pass(form, monkeypatch):
    """Where kernels serve; gradients and all but the last bits are those of plain operators."""
    model = made(form, torch.float32)
    tokens, passes = rows(0, 5), []
    for op in ("add_norm", "bias_activation_dropout"):
        home = sublayers if op == "add_norm" else causal
        plain = getattr(home, op)
        monkeypatch.setattr(home, op, lambda *a, plain=plain, **k: passes.append(1) or plain(*a, **k))
    expected = torch.autograd.grad(model(tokens).square().mean(), model.parameters())
    assert len(passes) == 3  # activations alone
    with use_backend("reference"):
        reference = torch.autograd.grad(model(tokens).square().mean(), model.parameters())
    assert len(passes) == 6
    with use_backend("interpret"):
        found = torch.autograd.grad(model(tokens).square().mean(), model.parameters())
    assert len(passes) == 6 + 3 + 6  # two norms a layer
    for x, y, z in zip(found, expected, reference, strict=True):
        assert x.allclose(y, rtol=1e-3, atol=1e-5 * float(y.abs().max())) and z.allclose(y, rtol=1e-3, atol=1e-4)


def test_heads_on_its_states(tmp_path):
    """A classifier of it is a folder of ours, whatever family the decoder is of."""
    pytest.importorskip("safetensors", reason="the train extra is not installed")
    model = made("qwen3")
    for pool in ("mean", "last"):
        judge = Classifier(model, 3, pool=pool, mix=True).double().eval()
        batch = rows(model.pad_id, 5, 3)
        assert judge(batch)[1].allclose(judge(batch[1:, :3])[0], atol=1e-11)
    save_pretrained(judge, tmp_path, classes=("a", "b", "c"))
    again, _ = load(tmp_path)
    assert again(batch).equal(judge(batch)) and again.classes == ["a", "b", "c"]
    assert Tagger(model, 4).double()(batch).shape == (2, 5, 4)
