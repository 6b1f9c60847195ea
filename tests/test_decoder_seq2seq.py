"""Seq2Seq, its cache and greedy decoding: the cache changes nothing but the time, padding changes nothing at all."""

import dataclasses
import pickle

import pytest
import torch

from tileformer import decoder
from tileformer.decoder import KVCache, Seq2Seq, Seq2SeqConfig, generate

PAD, BOS, EOS = 0, 1, 2
CONFIG = Seq2SeqConfig(
    11, 13, d_model=16, nhead=2, num_encoder_layers=2, num_decoder_layers=2, dim_feedforward=32, max_length=12
)


def model(seed=0, **changes):
    torch.manual_seed(seed)
    return Seq2Seq(dataclasses.replace(CONFIG, **changes)).eval()


def batch(rows=5, length=9):
    """Sources of different lengths, the last one only one token long."""
    generator = torch.Generator().manual_seed(0)
    src = torch.randint(3, CONFIG.src_vocab, (rows, length), generator=generator)
    for row in range(rows):
        src[row, max(1, length - 2 * row) :] = PAD
    tgt = torch.randint(3, CONFIG.tgt_vocab, (rows, 6), generator=generator)
    tgt[:, 0] = BOS
    return src, tgt


def test_padding_changes_nothing():
    """More padding behind source and target, and other tokens behind the target's end, leave every real logit alone."""
    m, (src, tgt) = model(), batch()
    logits = m(src, tgt)
    wider = m(torch.nn.functional.pad(src, (0, 3)), torch.nn.functional.pad(tgt, (0, 2)))
    assert torch.allclose(wider[:, :6], logits, atol=1e-5)
    changed = tgt.clone()
    changed[:, 4:] = PAD
    assert torch.allclose(m(src, changed)[:, :4], logits[:, :4], atol=1e-6)
    alone = m(src[4:5, :1], tgt[4:5])
    assert torch.allclose(alone, logits[4:5], atol=1e-5)


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
@pytest.mark.parametrize("norm_first, activation", [(True, "gelu"), (False, "relu")])
def test_torchs_transformer_fits_in(norm_first, activation):
    """The baseline of our benchmarks: the same model, weights and masks, on torch.nn's layers."""
    ours, (src, tgt) = model(norm_first=norm_first, activation=activation), batch()
    theirs, options = model(1), {"batch_first": True, "norm_first": norm_first}
    theirs.transformer = torch.nn.Transformer(16, 2, 2, 2, 32, 0.1, activation, **options).eval()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    passed = {}
    theirs.transformer.decoder.register_forward_pre_hook(lambda m, args, kw: passed.update(kw), with_kwargs=True)
    assert torch.allclose(theirs(src, tgt), ours(src, tgt), atol=1e-5)
    assert torch.equal(passed["tgt_mask"], torch.ones(6, 6).bool().triu(1)) and passed["tgt_is_causal"] is True


def test_inputs_and_logits_start_near_unit_size_and_gradients_reach_every_parameter():
    m, (src, tgt) = model(d_model=64, nhead=4, dropout=0.0).train(), batch()
    sizes = []
    m.transformer.encoder.register_forward_pre_hook(lambda m, args: sizes.append(args[0].std()))
    logits = m(src, tgt)
    assert 1.2 < sizes[0] < 1.6  # token + position, each of unit size
    assert logits.shape == (5, 6, 13) and 0.5 < logits.std() < 2
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), tgt.flatten()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in m.parameters())
    assert m.tgt_embedding.weight.grad[5:].abs().sum() > 0  # tied: rows never read as input learn as output


def test_what_enters_both_stacks_is_dropped_in_training():
    m, entered = model(dropout=0.5).train(), []
    for stack in (m.transformer.encoder, m.transformer.decoder):
        stack.register_forward_pre_hook(lambda m, args: entered.append((args[0] == 0).float().mean()))
    m(*batch())
    m.eval()(*batch())
    assert [round(float(share), 1) for share in entered] == [0.5, 0.5, 0.0, 0.0]


@pytest.mark.parametrize("norm_first", [True, False])
def test_cached_decoding_gives_the_logits_of_full_recomputation(norm_first):
    """In single steps and in pieces of two (bottom-right causal), with a source that is padded."""
    m, (src, tgt) = model(norm_first=norm_first), batch()
    with torch.no_grad():
        memory, padding = m.encode(src)
        full = m.decode(tgt, memory, padding)
        for piece in (1, 2, 6):
            cache = KVCache(CONFIG.num_decoder_layers, CONFIG.max_length)
            parts = [m.decode(tgt[:, i : i + piece], memory, padding, cache) for i in range(0, 6, piece)]
            assert cache.length == 6
            assert torch.allclose(torch.cat(parts, 1), full, atol=1e-5)


def test_padding_beside_a_cache_is_of_all_keys():
    torch.manual_seed(0)
    attn, x = decoder.MultiheadAttention(16, 2, batch_first=True).eval(), torch.randn(2, 5, 16)
    padding, causal = torch.tensor([[False] * 5, [False, True, False, False, False]]), torch.ones(5, 5).triu(1).bool()
    cache = KVCache(1, 5).layers[0].self_attn
    with torch.no_grad():
        full = attn(x, x, x, padding, attn_mask=causal, need_weights=False)[0]
        for at in range(5):
            new = x[:, at : at + 1]
            step = attn(new, new, new, padding[:, : at + 1], need_weights=False, cache=cache)[0]
            assert torch.allclose(step, full[:, at : at + 1], atol=1e-5)


def test_cross_attention_keys_are_projected_once(monkeypatch):
    m, (src, tgt) = model(), batch()
    with torch.no_grad():
        memory, padding = m.encode(src)
        cache = KVCache(CONFIG.num_decoder_layers, CONFIG.max_length)
        m.decode(tgt[:, :1], memory, padding, cache)
        before = [layer.cross_attn.k.data_ptr() for layer in cache.layers]
        expected = m.decode(tgt[:, :2], memory, padding)[:, 1:]
        got = m.decode(tgt[:, 1:2], torch.full_like(memory, torch.nan), padding, cache)  # the memory is not read again
    assert [layer.cross_attn.k.data_ptr() for layer in cache.layers] == before
    assert torch.allclose(got, expected, atol=1e-5)


def test_reordered_cache_continues_the_chosen_rows():
    m, (src, tgt) = model(), batch()
    rows = torch.tensor([1, 1, 0])
    src = src[:1].expand(3, -1)  # three beams of one source
    with torch.no_grad():
        memory, padding = m.encode(src)
        cache = KVCache(CONFIG.num_decoder_layers, CONFIG.max_length)
        m.decode(tgt[:3, :3], memory, padding, cache)
        cache.reorder(rows)
        got = m.decode(tgt[:3, 3:4], memory, padding, cache)
        expected = m.decode(torch.cat([tgt[rows, :3], tgt[:3, 3:4]], 1), memory, padding)[:, 3:]
    assert torch.allclose(got, expected, atol=1e-5)


@pytest.mark.parametrize("seed", range(4))
def test_cached_generation_gives_the_same_tokens(seed):
    m, (src, _) = model(seed), batch(16)
    tokens = generate(m, src)
    assert torch.equal(tokens, generate(m, src, use_cache=False))
    assert tokens.dtype == torch.int64 and tokens.shape[1] <= CONFIG.max_length


class Scripted(Seq2Seq):
    """Says the next token of `script` whatever it has read: one row ends at once, one later, one never."""

    script = torch.tensor([[EOS, 5, 5, 5, 5, 5], [4, 5, EOS, 7, 7, 7], [3, 3, 3, 3, 3, 3]])

    def decode(self, tgt, memory, src_padding, cache=None):
        step = tgt.shape[1] - 1
        logits = torch.nn.functional.one_hot(self.script[: tgt.shape[0], step], CONFIG.tgt_vocab).float()
        logits[:, PAD] = 2  # padding would always win, and must never be chosen
        return logits[:, None].expand(-1, tgt.shape[1], -1).clone()


def test_generation_stops_rows_at_eos_and_pads_behind_it():
    m, (src, _) = Scripted(CONFIG).eval(), batch(3)
    expected = [[EOS, PAD, PAD, PAD], [4, 5, EOS, PAD], [3, 3, 3, 3]]
    assert generate(m, src, max_length=4, use_cache=False).tolist() == expected
    assert generate(m, src[:2], max_length=6, use_cache=False).tolist() == [[EOS, PAD, PAD], [4, 5, EOS]]
    assert generate(m, src[:0]).shape == (0, 0)


def test_generation_follows_a_learned_mapping():
    """A minute model learns to copy, and then copies: the loop feeds back what it should."""
    torch.manual_seed(0)
    m = Seq2Seq(dataclasses.replace(CONFIG, dropout=0.0, num_encoder_layers=1, num_decoder_layers=1, d_model=32))
    optimizer = torch.optim.AdamW(m.parameters(), lr=3e-3)
    for _ in range(250):
        body = torch.randint(3, 11, (64, 4))
        tgt = torch.nn.functional.pad(torch.nn.functional.pad(body, (1, 0), value=BOS), (0, 1), value=EOS)
        loss = torch.nn.functional.cross_entropy(m(body, tgt[:, :-1]).transpose(1, 2), tgt[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    body = torch.randint(3, 11, (32, 4))
    tokens = generate(m.eval(), body)
    assert (tokens == torch.nn.functional.pad(body, (0, 1), value=EOS)).all(1).float().mean() > 0.9


def test_model_and_config_pickle():
    m, (src, tgt) = model(), batch()
    assert torch.equal(pickle.loads(pickle.dumps(m))(src, tgt), m(src, tgt))
    assert Seq2SeqConfig(**dataclasses.asdict(CONFIG)) == CONFIG


SRC, TGT = batch()
BAD_CALLS = {
    "float tokens": (TypeError, "src must hold token ids", lambda m: m(SRC.float(), TGT)),
    "rank": (ValueError, r"tgt must be \(B, T\), got \(6,\)", lambda m: m(SRC, TGT[0])),
    "long source": (ValueError, "src reaches 18 tokens.*max_length 12", lambda m: m(SRC.repeat(1, 2), TGT)),
    "long target": (ValueError, "tgt reaches 18 tokens.*max_length 12", lambda m: m(SRC, TGT.repeat(1, 3))),
    "batches": (ValueError, "tgt has 2 rows, its source 5", lambda m: m(SRC, TGT[:2])),
    "training mode": (ValueError, "call model.eval", lambda m: generate(m.train(), SRC)),
    "too many tokens": (ValueError, "between 1 and the model's 12, got 13", lambda m: generate(m, SRC, max_length=13)),
    "no tokens": (ValueError, "got 0", lambda m: generate(m, SRC, max_length=0)),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_call_is_refused_in_one_line(case):
    error, message, call = BAD_CALLS[case]
    with pytest.raises(error, match=message) as caught:
        call(model())
    assert "\n" not in str(caught.value)


BAD_CONFIGS = {
    "heads": ({"nhead": 3}, "16.*3 heads"),
    "no layers": ({"num_decoder_layers": 0}, "num_decoder_layers must be at least 1, got 0"),
    "activation": ({"activation": "tanh"}, "'relu' or 'gelu', got 'tanh'"),
    "dropout": ({"dropout": 1.5}, r"\[0, 1\), got 1.5"),
    "same ids": ({"eos_id": 1}, r"\(0, 1, 1\)"),
    "the same padding": ({"bos_id": 0}, r"three ids.*\(0, 0, 2\)"),
    "id outside": ({"eos_id": 13}, "tgt_vocab 13"),
    "padding outside the source": ({"pad_id": 11}, "inside the vocabularies.*src_vocab 11"),
}


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_bad_config_is_refused(case):
    changes, message = BAD_CONFIGS[case]
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **changes)


def step_of_cache(m, max_length=12, layers=2, rows=5, source=9, tokens=1):
    memory, padding = m.encode(SRC)
    cache = KVCache(layers, max_length)
    with torch.no_grad():
        m.decode(TGT, memory, padding, cache)
        return lambda: m.decode(
            TGT[:rows].repeat(1, 2)[:, :tokens], memory[:rows, :source], padding[:rows, :source], cache
        )


BAD_CACHES = {
    "overflow": ({"max_length": 6}, "7 tokens do not fit a KVCache of max_length 6"),
    "past the model's end": ({"max_length": 20, "tokens": 7}, "tgt reaches 13 tokens.*max_length 12"),
    "other batch": ({"rows": 3}, "not for batch 3"),
    "other source": ({"source": 8}, "not for batch 5 and 8 keys"),
    "other depth": ({"layers": 3}, "the cache has 3 layers, this decoder 2"),
}


@pytest.mark.parametrize("case", BAD_CACHES)
def test_cache_of_another_run_is_refused(case):
    options, message = BAD_CACHES[case]
    with pytest.raises(ValueError, match=message), torch.no_grad():
        step_of_cache(model(), **options)()


def test_cache_refuses_gradients_appended_keys_and_no_room():
    m = model()
    memory, padding = m.encode(SRC)
    with pytest.raises(RuntimeError, match="no_grad"):
        m.decode(TGT, memory, padding, KVCache(2, 12))
    with pytest.raises(NotImplementedError, match="add_zero_attn"):
        attn = decoder.MultiheadAttention(16, 2, add_zero_attn=True)
        attn(memory, memory, memory, cache=KVCache(1, 12).layers[0].self_attn)
    with pytest.raises(ValueError, match="at least 1, got 0 and 4"):
        KVCache(0, 4)
