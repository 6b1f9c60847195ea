"""Decodable: objects of a user's own decode as our models do, and rows that move between states go on as they were."""

import itertools
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tileformer.decoder import (
    DecoderLM,
    DecoderLMConfig,
    Engine,
    Options,
    Seq2Seq,
    Seq2SeqConfig,
    convert,
    generate,
    revert,
    stream,
)
from tileformer.decoder.generation import Decodable, DecodeState, JoinedState
from tileformer.decoder.generation.cache import KVCache
from tileformer.decoder.model import ModelConfig

PAD, BOS, EOS, V = 0, 1, 2, 6
PROMPTS = torch.tensor([[1, 3, 4, 5], [0, 0, 1, 4], [1, 5, 0, 0]])  # padded before, behind and not at all


class Rows:
    """The state of an n-gram model: the last token of each row. It has no `reorder`."""

    def __init__(self, last, lengths):
        self.last, self.lengths = last, lengths

    def select(self, rows):
        self.last, self.lengths = self.last[rows], self.lengths[rows]

    def insert(self, slots, other):
        self.last[slots], self.lengths[slots] = other.last, other.lengths

    def truncate(self, lengths):
        raise NotImplementedError("a bigram knows one token")

    def release(self, rows):
        self.lengths[rows] = 0


class Bigrams:
    """A table of log-probabilities (V, V); padding would always win."""

    eos_id, pad_id = EOS, PAD

    def __init__(self, seed=0):
        table = torch.randn(V, V, generator=torch.Generator().manual_seed(seed)) * 2
        table[:, PAD] = 9.0
        self.table = table

    def start(self, tokens, *, capacity, source=None, beams=1):
        lengths = (tokens != PAD).sum(1)
        last = tokens.gather(1, lengths[:, None] - 1)[:, 0].repeat_interleave(beams)
        return self.table[last], Rows(last, lengths.int().repeat_interleave(beams))

    def step(self, tokens, state):
        state.last, state.lengths = tokens, state.lengths + 1
        return self.table[tokens]


class Recurrent(nn.Module):
    """A GRU that reads tokens and a source, which is its first state."""

    eos_id, pad_id, bos_id, max_length, conditioned = EOS, PAD, BOS, 9, True

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.cell, self.out = nn.Embedding(V, 8), nn.GRUCell(8, 8), nn.Linear(8, V)

    def start(self, tokens, *, capacity, source=None, beams=1):
        state = Hidden(self.embedding(source).sum(1).repeat_interleave(beams, 0))
        for column in tokens.repeat_interleave(beams, 0).unbind(1):
            logits = self.step(column, state)
        return logits, state

    def step(self, tokens, state):
        state.hidden, state.lengths = self.cell(self.embedding(tokens), state.hidden), state.lengths + 1
        return 3 * self.out(state.hidden)


class Hidden(Rows):
    def __init__(self, hidden):
        self.hidden, self.lengths = hidden, torch.zeros(len(hidden), dtype=torch.int32)

    def select(self, rows):
        self.hidden, self.lengths = self.hidden[rows], self.lengths[rows]


def allowed(logits):
    return logits.masked_fill(torch.arange(V) == PAD, -math.inf)


def by_hand(table, last, steps):
    tokens = []
    while len(tokens) < steps and EOS not in tokens:
        tokens.append(int(allowed(table[last]).argmax()))
        last = tokens[-1]
    return tokens


def without_padding(row):
    return [int(x) for x in row if x != PAD]


@pytest.mark.parametrize("seed", range(4))
def test_a_table_of_ones_own_is_decoded(seed):
    m = Bigrams(seed)
    assert isinstance(m, Decodable) and isinstance(m.start(PROMPTS[:1], capacity=9)[1], DecodeState)
    before = m.table.clone()
    greedy = generate(m, PROMPTS, 6)
    assert [without_padding(row) for row in greedy] == [by_hand(m.table, last, 6) for last in (5, 4, 5)]
    assert torch.equal(torch.stack(list(stream(m, PROMPTS, 6)), 1), greedy)
    logp = allowed(m.table).log_softmax(-1)
    found, scores = generate(m, PROMPTS, 3, num_beams=40, n_best=3)
    for row, last in enumerate((5, 4, 5)):
        rated = []
        for tokens in itertools.chain.from_iterable(itertools.product(range(1, V), repeat=n) for n in (1, 2, 3)):
            if EOS in tokens[:-1] or (tokens[-1] != EOS and len(tokens) < 3):
                continue
            pairs = zip((last, *tokens), tokens, strict=False)
            rated.append((sum(float(logp[a, b]) for a, b in pairs) / len(tokens), list(tokens)))
        best = sorted(rated, reverse=True)[:3]
        assert [without_padding(x) for x in found[row]] == [tokens for _, tokens in best]
        assert torch.allclose(scores[row], torch.tensor([score for score, _ in best]), atol=1e-4)
    assert torch.equal(m.table, before)  # what a model gives is not written to


def test_samples_of_a_table_follow_it():
    m, dice = Bigrams(), torch.Generator().manual_seed(0)
    tokens = generate(m, torch.tensor([[1, 4]]).expand(4000, -1), 1, temperature=2.0, generator=dice)
    p = (allowed(m.table[4]) / 2).softmax(-1)
    assert (
        (torch.bincount(tokens[:, 0], minlength=V) / 4000 - p).abs() <= 4 * (p * (1 - p) / 4000).sqrt() + 1e-9
    ).all()


def test_a_recurrent_model_of_ones_own_is_decoded():
    m, sources = Recurrent(), torch.tensor([[3, 4], [5, 5], [1, 4]])
    with pytest.raises(ValueError, match="model.eval"):
        generate(m, sources)
    m.eval()
    greedy = generate(m, sources)
    assert 1 < greedy.shape[1] <= 9 and torch.equal(torch.stack(list(stream(m, sources)), 1), greedy)
    best, scores = generate(m, sources, num_beams=4, n_best=4)
    one, least = generate(m, sources, num_beams=1, n_best=1)
    assert torch.equal(one[:, 0], greedy) and (scores[:, :1] >= least - 1e-6).all()
    for row in range(3):  # a beam's score is that of its tokens, read from the start
        tokens = without_padding(best[row, 0])
        with torch.no_grad():
            logits, state = m.start(torch.tensor([[BOS]]), capacity=9, source=sources[row : row + 1])
            total = 0.0
            for token in tokens:
                total += float(allowed(logits).log_softmax(-1)[0, token])
                logits = m.step(torch.tensor([token]), state)
        assert float(scores[row, 0]) == pytest.approx(total / len(tokens), abs=1e-4)
    seeded = [generate(m, sources, temperature=1.0, generator=torch.Generator().manual_seed(7)) for _ in range(2)]
    assert torch.equal(*seeded)


def test_what_cannot_be_decoded_is_told():
    with pytest.raises(TypeError, match="Linear cannot be decoded, it has no start, step, eos_id, pad_id"):
        generate(nn.Linear(2, 2), PROMPTS)
    with pytest.raises(ValueError, match="Bigrams names no max_length.*pass max_length"):
        generate(Bigrams(), PROMPTS)
    with pytest.raises(ValueError, match="max_length must be at least 1, got 0"):
        generate(Bigrams(), PROMPTS, 0)


# ---- our own models: rows that move between states


CONFIGS = {
    "lm": ModelConfig(V, 16, 2, 2, 32, max_length=12),
    "pair": ModelConfig(V, 16, 2, 2, 32, max_length=12, src_vocab=9, num_encoder_layers=1),
}
SOURCES = torch.tensor([[3, 4, 5, 8], [6, 7, 0, 0], [3, 0, 0, 0]])
NEXT = torch.tensor([[3, 4], [5, 3], [4, 4]])


def model(kind):
    torch.manual_seed(0)
    return (DecoderLM if kind == "lm" else Seq2Seq)(CONFIGS[kind]).eval()


def start(m, kind, rows, use_cache=True, width=None, **options):
    """The state of some of the prompts, its unused room full of what must change nothing."""
    source = SOURCES[rows, :width] if kind == "pair" else None
    options = {"capacity": 11, "source": source, "use_cache": use_cache} | options
    logits, state = m.start(PROMPTS[rows], **options)
    for x in state.growing() if isinstance(state, KVCache) else ():
        x[:, :, state.length :] = 1e4
    return logits, state


def alone(m, kind, row, tokens):
    """Logits (V,) of the token behind one prompt and `tokens`, all read at once."""
    tgt = torch.cat([PROMPTS[row][PROMPTS[row] != PAD], torch.tensor(tokens, dtype=torch.int64)])[None]
    return m(tgt)[0, -1] if kind == "lm" else m(SOURCES[row : row + 1], tgt)[0, -1]


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


states = pytest.mark.parametrize("kind, use_cache", list(itertools.product(["lm", "pair"], [True, False])))


def check(logits, m, kind, *rows):
    """Each row: a prompt's number, and the tokens that it has read since."""
    torch.testing.assert_close(logits, torch.stack([alone(m, kind, *row) for row in rows]), atol=1e-5, rtol=1e-4)


@states
def test_rows_of_any_length_are_read_as_each_alone(kind, use_cache):
    m = model(kind)
    assert isinstance(m, Decodable)
    logits, state = start(m, kind, [0, 1, 2], use_cache)
    assert isinstance(state, DecodeState) and state.lengths.dtype == torch.int32 and state.lengths.tolist() == [4, 2, 2]
    check(logits, m, kind, (0, []), (1, []), (2, []))
    for i in range(2):
        logits = m.step(NEXT[:, i], state)
    check(logits, m, kind, (0, [3, 4]), (1, [5, 3]), (2, [4, 4]))
    assert state.lengths.tolist() == [6, 4, 4]
    both = m.step(NEXT, start(m, kind, [0, 1, 2], use_cache)[1])  # several tokens at once
    check(both[:, 1], m, kind, (0, [3, 4]), (1, [5, 3]), (2, [4, 4]))
    check(both[:, 0], m, kind, (0, [3]), (1, [5]), (2, [4]))


@states
def test_selected_rows_go_on_in_their_new_places(kind, use_cache):
    m = model(kind)
    _, state = start(m, kind, [0, 1, 2], use_cache)
    m.step(NEXT[:, 0], state)
    state.select(torch.tensor([2, 0, 0, 1]))
    assert state.lengths.tolist() == [3, 5, 5, 3]
    logits = m.step(torch.tensor([3, 4, 5, 5]), state)
    check(logits, m, kind, (2, [4, 3]), (0, [3, 4]), (0, [3, 5]), (1, [5, 5]))
    logits, state = start(m, kind, [0, 1], use_cache, beams=2)
    check(logits, m, kind, (0, []), (0, []), (1, []), (1, []))
    state.reorder(torch.tensor([1, 1, 3, 2]))
    check(m.step(torch.tensor([3, 4, 5, 3]), state), m, kind, (0, [3]), (0, [4]), (1, [5]), (1, [3]))


@states
@pytest.mark.parametrize("width", [4, 1])
def test_inserted_rows_go_on_beside_others(kind, use_cache, width):
    """Also where their source is wider than that of the rows that are there, or less wide, and their room is
    another."""
    m = model(kind)
    _, state = start(m, kind, [2, 1, 2], use_cache, 2, capacity=8)
    m.step(NEXT[:, 0], state)
    row = [0] if width == 4 else [2]
    _, other = start(m, kind, row, use_cache, width)
    m.step(torch.tensor([5]), other)
    state.insert(torch.tensor([1]), other)
    after = 5 if width == 4 else 3
    assert state.lengths.tolist() == [3, after, 3] and other.lengths.tolist() == [after]
    logits = m.step(torch.tensor([3, 4, 5]), state)
    check(logits, m, kind, (2, [3, 3]), (row[0], [5, 4]), (2, [4, 5]))
    check(m.step(torch.tensor([3]), other), m, kind, (row[0], [5, 3]))  # it was copied
    _, long = start(m, kind, [0], use_cache)
    for token in (3, 4, 5, 3, 4):
        m.step(torch.tensor([token]), long)
    with pytest.raises(ValueError, match="rows of 9 tokens do not fit a state of capacity 8"):
        state.insert(torch.tensor([0]), long)


@states
def test_truncated_rows_forget(kind, use_cache):
    m = model(kind)
    _, state = start(m, kind, [0, 0, 1], use_cache)
    for token in (3, 4, 5):
        m.step(torch.tensor([token] * 3), state)
    state.truncate(torch.tensor([5, 4, 9]))
    assert state.lengths.tolist() == [5, 4, 5]
    logits = m.step(torch.tensor([5, 3, 4]), state)
    check(logits, m, kind, (0, [3, 5]), (0, [3]), (1, [3, 4, 5, 4]))


@states
def test_released_rows_wait_and_are_used_again(kind, use_cache):
    m = model(kind)
    _, state = start(m, kind, [0, 1, 2], use_cache)
    state.release(torch.tensor([0, 2]))
    assert state.lengths.tolist() == [0, 2, 0]
    for token in (3, 4, 5):
        logits = m.step(torch.tensor([3, token, 3]), state)
    assert state.lengths.tolist() == [0, 5, 0] and logits.isfinite().all()
    check(logits[1:2], m, kind, (1, [3, 4, 5]))
    state.insert(torch.tensor([2]), start(m, kind, [0], use_cache)[1])
    logits = m.step(torch.tensor([3, 3, 4]), state)
    assert state.lengths.tolist() == [0, 6, 5]
    check(logits[1:], m, kind, (1, [3, 4, 5, 3]), (0, [4]))
    state.select(torch.tensor([1, 0, 2]))
    m.step(torch.tensor([3, 3, 3]), state)
    assert state.lengths.tolist() == [7, 0, 6]


@states
def test_a_row_that_is_full_disturbs_no_other(kind, use_cache):
    m = model(kind)
    _, state = start(m, kind, [0, 1], use_cache, capacity=5)
    for token in (3, 4, 5):
        logits = m.step(torch.tensor([3, token]), state)
    assert state.lengths.tolist() == [5, 5]
    check(logits[1:], m, kind, (1, [3, 4, 5]))


def test_states_of_several_models_move_together():
    models = [model("lm"), model("lm").double()]
    joined = JoinedState(*(start(m, "lm", [0, 1])[1] for m in models))
    assert isinstance(joined, DecodeState)
    joined.select(torch.tensor([1, 0, 1]))
    joined.reorder(torch.tensor([0, 1, 1]))
    joined.truncate(torch.tensor([2, 3, 4]))
    joined.insert(torch.tensor([0]), JoinedState(*(start(m, "lm", [2])[1] for m in models)))
    joined.release(torch.tensor([2]))
    for m, state in zip(models, joined.states, strict=True):
        assert state.lengths.tolist() == [2, 3, 0]
        torch.testing.assert_close(
            m.step(torch.tensor([4, 5, 3]), state)[0], alone(m, "lm", 2, [4]), atol=1e-5, rtol=1e-4
        )
    assert joined.lengths.tolist() == [3, 4, 0]


@pytest.mark.parametrize("use_cache", [True, False])
def test_prompts_padded_before_them_are_those_padded_behind(use_cache):
    m = model("lm")
    behind = torch.tensor([[1, 3, 4, 5], [1, 4, 0, 0], [1, 5, 0, 0]])
    for options in ({}, {"num_beams": 3}, {"max_length": 3}):
        together = generate(m, PROMPTS, use_cache=use_cache, **options)
        assert torch.equal(together, generate(m, behind, **options))
        for row in range(3):
            assert without_padding(together[row]) == without_padding(generate(m, behind[row : row + 1], **options)[0])
    assert torch.equal(torch.stack(list(stream(m, PROMPTS)), 1), generate(m, behind))


def test_start_refuses_what_it_cannot_mean():
    lm, pair = model("lm"), model("pair")
    for capacity in (3, 13):
        with pytest.raises(ValueError, match=f"from the 4 tokens.*model's 12, got {capacity}"):
            lm.start(PROMPTS, capacity=capacity)
    with pytest.raises(ValueError, match="no source"):
        lm.start(PROMPTS, capacity=9, source=SOURCES)
    with pytest.raises(ValueError, match="conditioned on a source"):
        pair.start(PROMPTS, capacity=9)
    with pytest.raises(ValueError, match="built without a source, got src_vocab 9"):
        DecoderLM(CONFIGS["pair"])
    with pytest.raises(ValueError, match="built with a source, got src_vocab 0"):
        Seq2Seq(CONFIGS["lm"])


def test_one_configuration_gives_the_model_of_the_older_two():
    pairs = (
        (DecoderLM, CONFIGS["lm"], DecoderLMConfig(V, 16, 2, 2, 32, max_length=12)),
        (Seq2Seq, CONFIGS["pair"], Seq2SeqConfig(9, V, 16, 2, 1, 2, 32, max_length=12)),
    )
    for kind, general, older in pairs:
        assert older.general() == general
        one, two = (torch.manual_seed(0) and kind(config).state_dict() for config in (general, older))
        assert list(one) == list(two) and all(torch.equal(one[name], two[name]) for name in one)


def test_our_models_build_no_causal_mask(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a T x T mask was built")

    for name in ("ones", "tril", "triu"):
        monkeypatch.setattr(torch, name, refuse)
    model("lm")(PROMPTS[:, :2])
    model("pair")(SOURCES, PROMPTS[:, 2:])


@pytest.mark.parametrize("kind", ["lm", "pair"])
def test_a_model_whose_layers_are_torchs_or_their_twins(kind):
    """After `revert` it computes the same without a cache, after `convert` with one."""
    m = model(kind)
    src = PROMPTS if kind == "lm" else SOURCES
    expected = generate(m, src)
    revert(m)
    assert not any(type(x).__module__.startswith("tileformer.decoder.blocks") for x in m.modules())
    assert torch.equal(generate(m, src, use_cache=False), expected)
    assert convert(m).swapped
    assert torch.equal(generate(m, src), expected) and torch.equal(generate(m, src, use_cache=False), expected)
    if kind == "pair":
        assert torch.allclose(m.states(src)[-1], m.encode(src)[0])
        memory, padding = m.encode(src)
        tgt = PROMPTS[:, 2:]
        torch.testing.assert_close(m.decode(tgt, memory, padding, KVCache(2, 12)), m.decode(tgt, memory, padding))


@pytest.mark.parametrize("norm_first", [True, False])
def test_who_hooks_a_dropout_of_a_block_sees_the_branch_alone(norm_first):
    torch.manual_seed(0)
    m = Seq2Seq(Seq2SeqConfig(9, V, 16, 2, 1, 1, 32, norm_first=norm_first, activation="relu")).eval()
    expected, seen = m(SOURCES, PROMPTS[:, 2:]), []
    block = m.transformer.decoder.layers[0]
    for dropout in (block.dropout1, block.dropout2, block.dropout3):
        dropout.register_forward_hook(lambda module, inputs, out: seen.append(len(inputs)))
    assert torch.allclose(m(SOURCES, PROMPTS[:, 2:]), expected, atol=1e-6) and seen == [1, 1, 1]
    memory, padding = m.encode(SOURCES)
    x = memory[:, :2]
    h = block.norm1(x) if norm_first else x
    x = x + block.self_attn(h, h, h, causal=True)[0]
    x = x if norm_first else block.norm1(x)
    h = block.norm2(x) if norm_first else x
    x = x + block.multihead_attn(h, memory, memory, key_mask=~padding)[0]
    x = x if norm_first else block.norm2(x)
    h = block.norm3(x) if norm_first else x
    x = x + F.linear(
        F.linear(h, block.linear1.weight, block.linear1.bias).relu(), block.linear2.weight, block.linear2.bias
    )
    x = x if norm_first else block.norm3(x)
    assert torch.allclose(block(memory[:, :2], memory, memory_mask=~padding, causal=True), x, atol=1e-5)


@pytest.mark.parametrize("by", ["step", "modules", "all again"])
def test_a_source_is_padded_on_either_side(by: str) -> None:
    """And means the same: its first token stands first."""
    torch.manual_seed(0)
    model = Seq2Seq(Seq2SeqConfig(src_vocab=20, tgt_vocab=20, d_model=32, nhead=2, max_length=12)).eval()
    behind = torch.tensor([[5, 6, 7, 0, 0], [8, 9, 3, 4, 5], [4, 0, 3, 0, 0]])
    before = torch.tensor([[0, 0, 5, 6, 7], [8, 9, 3, 4, 5], [0, 0, 4, 0, 3]])
    if by == "modules":
        model.register_forward_hook(lambda *_: None)

    def start(source):
        begin = torch.ones(3, 1, dtype=torch.int64)
        return model.start(begin, capacity=4, source=source, use_cache=by != "all again")[0]

    with torch.no_grad():
        torch.testing.assert_close(start(before), start(behind))


def test_ids_that_a_model_does_not_know_are_named() -> None:
    model = Seq2Seq(Seq2SeqConfig(src_vocab=20, tgt_vocab=30, d_model=32, nhead=2, max_length=12)).eval()
    lm = DecoderLM(DecoderLMConfig(vocab=30, d_model=32, nhead=2, max_length=12)).eval()
    for decoded, token, vocab in ((model, 20, 20), (model, -1, 20), (lm, 30, 30), (lm, -100, 30)):
        with pytest.raises(ValueError, match=f"token id {token} is outside the model's vocabulary of {vocab}"):
            generate(decoded, torch.tensor([[5, token]]), 3)
    with pytest.raises(ValueError, match="token id 500"):
        generate(lm, torch.tensor([[5]]), 3, options=Options(forced_prefix_ids=[500]))
    for wrong, message in (
        (lambda: generate(lm, [[1, 2]], 3), "src must be a tensor .* got list"),
        (lambda: generate(lm, torch.ones(1, 2), 3), "tokens must be .* int64, got float32"),
        (lambda: generate(lm, torch.ones(1, 2).long(), Options()), "max_length .* got Options: pass options by name"),
        (lambda: generate(lm, torch.ones(1, 2).long(), 3, options={"top_k": 1}), "options must be Options.*got dict"),
        (lambda: Engine(lm, slots=1).add([1, 2], 0.8), "options must be Options.*got float"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            wrong()
