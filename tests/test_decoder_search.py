"""The loops: rows that have ended leave, a step asks for little, groups of beams differ, constraints hold in beams."""

import itertools
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tileformer.decoder import generate, stream
from tileformer.decoder.generation import Options
from tileformer.decoder.generation.search import DecodeBatch, beam_search

PAD, BOS, EOS, V = 0, 1, 2, 9


class Trigrams:
    """A model of the next token behind two whose state notes what is asked of it. Log-probabilities are of float64."""

    eos_id, pad_id, max_length = EOS, PAD, 40

    def __init__(self, seed=0, end=0.0):
        table = torch.randn(V, V, V, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2
        table[..., PAD] -= 50
        table[..., EOS] += end
        self.table, self.asked = table, []

    def start(self, tokens, *, capacity, source=None, beams=1):
        lengths = (tokens != PAD).sum(1)
        last = tokens.gather(1, torch.stack([(lengths - 2).clamp(min=0), lengths - 1], 1)).repeat_interleave(beams, 0)
        state = Pairs(last, self.asked)
        return self.table[last[:, 0], last[:, 1]], state

    def step(self, tokens, state):
        self.asked.append(len(tokens))
        state.last = torch.stack([state.last[:, 1], tokens], 1)
        return self.table[state.last[:, 0], state.last[:, 1]]


class Pairs:
    def __init__(self, last, asked):
        self.last, self.asked = last, asked

    def select(self, rows):
        self.asked.append("select")
        self.last = self.last[rows]

    def reorder(self, rows):
        self.asked.append("reorder")
        self.last = self.last[rows]


class Ops(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(func.__name__)
        return func(*args, **(kwargs or {}))


class Endless(Trigrams):
    def __init__(self):
        super().__init__(end=-90.0)


PROMPTS = torch.tensor([[1, 3], [1, 4], [5, 6], [7, 8], [1, 8], [3, 3], [4, 7], [6, 5]])


def ops_a_step(**options):
    """torch operations of a step, without those of the model: two runs, one of which is eight steps longer."""
    counts = []
    for steps in (9, 17):
        with Ops() as ops:
            generate(Endless(), PROMPTS, steps, **options)
        counts.append(len(ops.seen))
    model, state, tokens = Endless(), Pairs(PROMPTS, []), PROMPTS[:, 0]
    with Ops() as ops:
        model.step(tokens, state)
    return (counts[1] - counts[0]) / 8 - len(ops.seen)


# What a step took before there were options, and the state's index that a reorder is here.
BEFORE = {"greedy": 7, "beams": 49}


def test_a_greedy_step_asks_for_one_operation():
    assert ops_a_step() == 1 < BEFORE["greedy"]
    assert ops_a_step(options=Options(forced_prefix_ids=[3])) == 1


def test_a_step_of_beams_asks_for_fewer_operations_than_it_did():
    assert ops_a_step(num_beams=3) <= 34 < BEFORE["beams"]


def without_padding(tokens):
    return [[token for token in row if token != PAD] for row in tokens.tolist()]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 1.0, "seed": list(range(8))},
        {"repetition_penalty": 1.3},
        {"num_beams": 3},
        {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.3, "no_repeat_ngram_size": 2},
    ],
    ids=str,
)
def test_rows_that_have_ended_leave_and_change_no_result(options):
    m, alone = Trigrams(3, end=1.0), []
    for row in range(8):
        own = options | ({"seed": [row]} if "seed" in options else {})
        alone += without_padding(generate(m, PROMPTS[row : row + 1], options=Options(**own)))
    assert len({len(row) for row in alone}) > 2
    m.asked.clear()
    together = generate(m, PROMPTS, options=Options(**options))
    assert without_padding(together) == alone
    sizes = [n for n in m.asked if isinstance(n, int)]
    beams = options.get("num_beams", 1)
    assert "select" in m.asked and sizes == sorted(sizes, reverse=True) and sizes[-1] <= 3 * beams


def test_a_batch_of_few_stays_whole():
    m = Trigrams(3, end=1.0)
    generate(m, PROMPTS[:3])
    assert "select" not in m.asked


def test_a_generator_draws_beside_rows_that_have_left_what_it_would_beside_them():
    m, results = Trigrams(3, end=1.0), []
    for keeps in (False, True):
        adjust = {"adjust": lambda tokens, scores: scores} if keeps else {}
        options = Options(temperature=1.0, top_k=5, generator=torch.Generator().manual_seed(0), **adjust)
        m.asked.clear()
        results.append(generate(m, PROMPTS, options=options))
        assert ("select" in m.asked) != keeps
    assert torch.equal(*results)


def test_a_stream_gives_every_row_in_its_place():
    m = Trigrams(3, end=1.0)
    expected = generate(m, PROMPTS)
    m.asked.clear()
    steps = list(stream(m, PROMPTS))
    assert torch.equal(torch.stack(steps, 1), expected) and "select" in m.asked


def test_a_state_without_a_select_is_decoded():
    m = Trigrams(3, end=1.0)
    expected = generate(m, PROMPTS)
    with pytest.MonkeyPatch.context() as patch:
        patch.delattr(Pairs, "select")
        assert torch.equal(generate(m, PROMPTS), expected)


def test_a_state_that_only_selects_is_searched():
    m, expected = Endless(), generate(Endless(), PROMPTS, 6, num_beams=3)
    with pytest.MonkeyPatch.context() as patch:
        patch.delattr(Pairs, "reorder")
        assert torch.equal(generate(m, PROMPTS, 6, num_beams=3), expected)
    assert m.asked == ["select", 24] * 5


def test_a_step_of_beams_moves_its_state_once_and_one_row_never():
    m = Endless()
    generate(m, PROMPTS, 6, num_beams=3)
    assert m.asked == ["reorder", 24] * 5
    m.asked.clear()
    tokens, _ = generate(m, PROMPTS, 6, n_best=1)
    assert m.asked == [8] * 5 and torch.equal(tokens[:, 0], generate(m, PROMPTS, 6))


class Equals(Trigrams):
    """All tokens are as probable: greedy decoding takes the first, and so does the row that beams never drop."""

    def __init__(self):
        super().__init__()
        self.table = torch.zeros(V, V, V)


def test_among_equals_the_greedy_row_has_the_first():
    for beams in (2, 5, 8):
        found, _ = generate(Equals(), PROMPTS[:2], 4, num_beams=beams, n_best=beams)
        assert len(set(map(tuple, found[0].tolist()))) == beams  # no row twice
        assert [1, 1, 1, 1] in found[0].tolist()


def log_probability(m, prompt, tokens):
    row, total = prompt.tolist(), 0.0
    for token in tokens:
        logits = m.table[row[-2], row[-1]].clone()
        logits[PAD] = -math.inf
        total += float(logits.log_softmax(0)[token])
        row.append(token)
    return total


def test_constrained_beams_find_the_best_of_what_is_allowed():
    """Scores are the model's own: what is banned takes its probability with it."""
    m = Trigrams(5)
    options = Options(num_beams=60, num_return_sequences=4, bad_words_ids=[[3], [4, 5], [1]], length_penalty=0.5)
    found, scores = generate(m, PROMPTS[:3], 3, options=options)
    body = [token for token in range(1, V) if token not in (1, EOS, 3)]
    for row in range(3):
        last = int(PROMPTS[row, -1])
        sequences = [[*x, EOS] for n in range(3) for x in itertools.product(body, repeat=n)]
        sequences += [list(x) for x in itertools.product(body, repeat=3)]
        allowed = [s for s in sequences if (4, 5) not in itertools.pairwise([last, *s])]
        rated = [(log_probability(m, PROMPTS[row], s) / len(s) ** 0.5, s) for s in allowed]
        best = sorted(rated, reverse=True)[:4]
        assert without_padding(found[row]) == [s for _, s in best]
        assert scores[row].tolist() == pytest.approx([score for score, _ in best], abs=1e-4)


def diverse(m, prompt, beams, groups, penalty, steps):
    """Vijayakumar et al., arXiv:1610.02424, in its own words: lists, one source, no ends."""
    size = beams // groups
    rows = [[(0.0, [])] for _ in range(groups)]
    for _ in range(steps):
        chosen = []
        for group in range(groups):
            options = []
            for total, tokens in rows[group]:
                before = prompt.tolist() + tokens
                logits = m.table[before[-2], before[-1]].clone()
                logits[PAD] = -math.inf
                logp = logits.log_softmax(0)
                options += [(total + float(logp[t]) - penalty * chosen.count(t), [*tokens, t]) for t in range(1, V)]
            rows[group] = sorted(options, reverse=True)[:size]
            chosen += [tokens[-1] for _, tokens in rows[group]]
    return sorted((row for group in rows for row in group), reverse=True)


@pytest.mark.parametrize("beams, groups, penalty", [(4, 2, 0.8), (6, 3, 1.5), (3, 3, 0.4)])
def test_groups_of_beams_are_those_of_the_paper(beams, groups, penalty):
    m = Endless()
    options = Options(
        num_beams=beams,
        num_beam_groups=groups,
        diversity_penalty=penalty,
        num_return_sequences=beams,
        length_penalty=0.0,
    )
    found, scores = generate(m, PROMPTS[:4], 5, options=options)
    firsts = 0
    for row in range(4):
        expected = diverse(m, PROMPTS[row], beams, groups, penalty, 5)
        # The greedy row is never dropped: it may have taken the last place of the first group.
        same = without_padding(found[row]) == [tokens for _, tokens in expected]
        assert same or without_padding(generate(m, PROMPTS[row : row + 1], 5))[0] in without_padding(found[row])
        firsts += same
        if same:
            assert scores[row].tolist() == pytest.approx([score for score, _ in expected], abs=1e-4)
    assert firsts >= 3


def test_groups_say_different_things():
    m = Trigrams(5)
    plain = generate(m, PROMPTS, 4, num_beams=4, n_best=4)[0]
    options = Options(num_beams=4, num_beam_groups=4, diversity_penalty=5.0, num_return_sequences=4)
    apart = generate(m, PROMPTS, 4, options=options)[0]
    assert all(len(set(row[:, 0].tolist())) == 4 for row in apart)
    assert not all(len(set(row[:, 0].tolist())) == 4 for row in plain)


def test_beams_without_a_source_to_search():
    tokens, scores = beam_search(DecodeBatch(Trigrams(), PROMPTS[:0], 5, options=Options(num_beams=3)))
    assert tokens.shape == (0, 3, 5) and scores.shape == (0, 3)
