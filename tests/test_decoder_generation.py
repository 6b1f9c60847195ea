"""generate and stream: beams against every sequence there is, samples against their probabilities, prompts of any
length."""

import itertools
import math

import pytest
import torch

from tileformer.decoder import DecoderLM, DecoderLMConfig, Seq2Seq, Seq2SeqConfig, generate, revert, stream

PAD, BOS, EOS = 0, 1, 2
V = 5
LM = DecoderLMConfig(V, d_model=16, nhead=2, num_layers=2, dim_feedforward=32, max_length=12)
PAIR = Seq2SeqConfig(
    9, V, d_model=16, nhead=2, num_encoder_layers=1, num_decoder_layers=2, dim_feedforward=32, max_length=12
)
PROMPTS = torch.tensor([[1, 3, 2, 3], [1, 4, 0, 0], [1, 0, 0, 0]])
SOURCES = torch.tensor([[3, 4, 5, 8], [6, 7, 0, 0], [3, 0, 0, 0]])


def model(kind, seed=0, sharp=1.0):
    """`sharp` scales the logits, so that tokens differ clearly in probability."""
    torch.manual_seed(seed)
    m = (DecoderLM(LM) if kind == "lm" else Seq2Seq(PAIR)).eval()
    with torch.no_grad():
        (m.norm if kind == "lm" else m.transformer.decoder.norm).weight.mul_(sharp)
    return m


def inputs(kind):
    return PROMPTS if kind == "lm" else SOURCES


def log_probability(m, kind, row, tokens):
    """Sum of log-probabilities of `tokens` (a list) behind row `row` of the inputs, padding excluded from the
    choice."""
    own = [int(x) for x in PROMPTS[row] if x] if kind == "lm" else [BOS]
    whole = torch.tensor([own + tokens])
    with torch.no_grad():
        logits = m(whole) if kind == "lm" else m(SOURCES[row : row + 1], whole)
    logits[..., PAD] = float("-inf")
    logp = logits[0].log_softmax(-1)
    return sum(float(logp[len(own) - 1 + i, token]) for i, token in enumerate(tokens))


def every_sequence(length):
    """All that can be generated in at most `length` tokens: closed by eos, or `length` tokens without one."""
    others = [token for token in range(1, V) if token != EOS]
    for n in range(length):
        yield from ([*body, EOS] for body in itertools.product(others, repeat=n))
    yield from (list(body) for body in itertools.product(others, repeat=length))


def without_padding(row):
    return [int(x) for x in row if x != PAD]


kinds = pytest.mark.parametrize("kind", ["lm", "pair"])


@kinds
@pytest.mark.parametrize("penalty", [0.0, 1.0])
def test_wide_beams_find_what_an_exhaustive_search_finds(kind, penalty):
    m = model(kind, sharp=2.0)
    found, scores = generate(m, inputs(kind), 3, num_beams=50, n_best=5, length_penalty=penalty)
    for row in range(3):
        rated = [(log_probability(m, kind, row, s) / len(s) ** penalty, s) for s in every_sequence(3)]
        best = sorted(rated, reverse=True)[:5]
        assert [without_padding(x) for x in found[row]] == [tokens for _, tokens in best]
        assert torch.allclose(scores[row], torch.tensor([score for score, _ in best]), atol=1e-4)


@kinds
@pytest.mark.parametrize("seed", range(6))
def test_one_beam_is_greedy_and_more_never_score_less(seed, kind):
    m, src = model(kind, seed, sharp=2.0), inputs(kind)
    greedy, scores = generate(m, src, 8, num_beams=1, n_best=1)
    assert torch.equal(greedy[:, 0], generate(m, src, 8))
    for row in range(3):
        tokens = without_padding(greedy[row, 0])
        assert float(scores[row, 0]) == pytest.approx(log_probability(m, kind, row, tokens) / len(tokens), abs=1e-4)
    last = scores[:, 0]
    for beams in (2, 3, 7):
        found, rated = generate(m, src, 8, num_beams=beams, n_best=beams)
        assert (rated[:, 0] >= last - 1e-5).all() and (rated.diff(dim=1) <= 0).all()
        assert torch.equal(found[:, 0], generate(m, src, 8, num_beams=beams)[:, : found.shape[2]])
        assert torch.equal(found, generate(m, src, 8, use_cache=False, num_beams=beams, n_best=beams)[0])


class Trap(DecoderLM):
    """Two beams lose the greedy row in the second step; in the third it would have been the best."""

    def forward(self, tokens, *, cu_seqlens=None, cache=None):
        even = [0, 0.25, 0.25, 0.25, 0.25]
        table = {(): [0, 0, 0, 0.51, 0.49], (3,): even, (4,): [0, 0, 0, 0.5, 0.5], (3, 1): [0, 0, 0, 1, 0]}
        p = [table.get(tuple(row[1:]), even) for row in tokens.tolist()]
        return torch.tensor(p).log()[:, None]


def test_the_greedy_row_is_never_dropped():
    m, prompt = Trap(LM).eval(), torch.tensor([[BOS]])
    for beams in (1, 2, 3):
        found, scores = generate(m, prompt, 3, False, num_beams=beams, n_best=1, length_penalty=0.0)
        assert found.tolist() == [[[3, 1, 3]]] and float(scores) == pytest.approx(math.log(0.51 * 0.25), abs=1e-5)


class Detour(DecoderLM):
    """Behind 3: the sure sequence 3 4 3, to be found only where an end right away, -1, is worse than -0.95 a token."""

    def forward(self, tokens, *, cu_seqlens=None, cache=None):
        a, b = math.exp(-0.9), math.exp(-1.0)
        even = [0, 0.25, 0.25, 0.25, 0.25]
        table = {(): [0, 0, b, a, 1 - a - b], (3,): [0, 1 - a - b, 0, a, b], (3, 4): [0, 0, 0, 1, 0]}
        return torch.tensor([table.get(tuple(row[1:]), even) for row in tokens.tolist()]).log()[:, None]


@pytest.mark.parametrize(
    "penalty, tokens, score", [(0.0, [EOS, 0, 0], -1.0), (1.0, [3, 4, 3], -1.9 / 3), (2.0, [3, 4, 3], -1.9 / 9)]
)
def test_the_length_penalty_decides_which_beams_stay(penalty, tokens, score):
    options = {"num_beams": 2, "n_best": 2, "length_penalty": penalty}
    found, scores = generate(Detour(LM).eval(), torch.tensor([[BOS]]), 3, False, **options)
    assert found[0, 0].tolist() == tokens and float(scores[0, 0]) == pytest.approx(score, abs=1e-5)


def test_fewer_continuations_than_beams_are_told_by_their_score():
    found, scores = generate(model("lm"), PROMPTS, 1, num_beams=9, n_best=9)
    assert (scores.isfinite() == (found[:, :, 0] != PAD)).all() and scores.isfinite().sum(1).tolist() == [4, 4, 4]


@kinds
@pytest.mark.parametrize("options", [{}, {"temperature": 1.0}, {"num_beams": 3}], ids=str)
def test_cached_decoding_gives_the_same_tokens(kind, options):
    m, results = model(kind, sharp=2.0), []
    for use_cache in (True, False):
        seeded = {"generator": torch.Generator().manual_seed(0)} if "temperature" in options else {}
        results.append(generate(m, inputs(kind), use_cache=use_cache, **options, **seeded))
    assert torch.equal(*results) and results[0].shape[1] > 1


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=str)
@pytest.mark.parametrize("seed, length", [(1, 6), (0, None), (3, 2)])
def test_prompts_of_several_lengths_are_continued_as_each_alone(options, seed, length):
    """A row has its own room, too: what is left of the model behind it, or as many tokens as were asked for."""
    m = model("lm", seed, sharp=2.0)
    together = generate(m, PROMPTS, length, **options)
    for row, prompt in enumerate(PROMPTS):
        alone = generate(m, prompt[None, prompt != PAD], length, **options)
        assert without_padding(together[row]) == without_padding(alone[0])


def test_greedy_continuation_is_the_argmax_of_each_step():
    m = model("lm", 2)
    tokens = generate(m, PROMPTS[:1], 5)
    row = PROMPTS[:1]
    for token in without_padding(tokens[0]):
        logits = m(row)[0, -1]
        logits[PAD] = float("-inf")
        assert token == int(logits.argmax())
        row = torch.cat([row, torch.tensor([[token]])], 1)


def frequencies(m, draws=4000, **options):
    generator = torch.Generator().manual_seed(0)
    tokens = generate(m, PROMPTS[:1].expand(draws, -1), 1, generator=generator, **options)
    return torch.bincount(tokens[:, 0], minlength=V) / draws


def probabilities(m, temperature=1.0):
    with torch.no_grad():
        logits = m(PROMPTS[:1])[0, -1]
    logits[PAD] = float("-inf")
    return (logits / temperature).softmax(0)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_samples_follow_the_probabilities(temperature):
    m = model("lm")
    p = probabilities(m, temperature)
    sigma = (p * (1 - p) / 4000).sqrt()
    assert ((frequencies(m, temperature=temperature) - p).abs() <= 4 * sigma + 1e-9).all()


@pytest.mark.parametrize(
    "options", [{"top_k": 2}, {"top_p": 0.6}, {"top_k": 3, "top_p": 0.9}, {"top_p": 1e-9}], ids=str
)
def test_samples_stay_inside_the_most_probable(options):
    m = model("lm")
    p = probabilities(m)
    order = p.argsort(descending=True)[: options.get("top_k", V)]
    shares = p[order] / p[order].sum()
    before = shares.cumsum(0) - shares
    kept = order[before < options.get("top_p", 1.0)]
    wanted = torch.zeros(V).index_copy(0, kept, p[kept] / p[kept].sum())
    got = frequencies(m, temperature=1.0, **options)
    assert ((got > 0) <= (wanted > 0)).all()
    assert (got - wanted).abs().max() < 0.04


class Coin(DecoderLM):
    def forward(self, tokens, *, cu_seqlens=None, cache=None):
        return torch.tensor([-math.inf, -math.inf, -math.inf, 0.0, 0.0]).expand(len(tokens), 1, V).clone()


@pytest.mark.parametrize("top_p, sides", [(0.5, {3}), (0.51, {3, 4})])
def test_the_fewest_tokens_that_reach_p(top_p, sides):
    options = {"temperature": 1.0, "top_p": top_p, "generator": torch.Generator().manual_seed(0)}
    assert set(generate(Coin(LM).eval(), PROMPTS[:1], 8, False, **options)[0].tolist()) == sides


def test_a_seed_repeats_a_run_and_a_low_temperature_is_greedy():
    m = model("lm")
    one, two, other = (
        generate(m, PROMPTS, temperature=1.0, generator=torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)
    )
    assert torch.equal(one, two) and not (one.shape == other.shape and torch.equal(one, other))
    assert torch.equal(generate(m, PROMPTS, temperature=1e-4), generate(m, PROMPTS))
    assert torch.equal(generate(m, PROMPTS, temperature=9.0, top_k=1), generate(m, PROMPTS))


@kinds
@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "top_p": 0.9}], ids=str)
def test_a_stream_gives_the_same_tokens(kind, options):
    m, src = model(kind, 1), inputs(kind)
    src = src[:1].repeat(4, 1)
    runs = []
    for call in (generate, stream):
        seeded = {"generator": torch.Generator().manual_seed(3)} if options else {}
        runs.append(call(m, src, 7, **options, **seeded))
    tokens, steps = runs[0], list(runs[1])
    assert all(step.shape == (4,) and not step.requires_grad for step in steps)
    assert torch.equal(torch.stack(steps, 1), tokens)


def test_a_stream_is_lazy():
    m, calls = model("lm"), []
    m.register_forward_hook(lambda *_: calls.append(1))
    steps = stream(m, PROMPTS[:1], 5)
    assert not calls
    next(steps)
    assert len(calls) == 1


def test_nothing_to_continue():
    assert generate(model("lm"), PROMPTS[:0]).shape == (0, 0)
    assert generate(model("pair"), SOURCES[:0], num_beams=3).shape == (0, 0)


BAD = {
    "sampling without temperature": ("pass a temperature", {"top_k": 3}),
    "temperature": ("at least 1e-6, got 0", {"temperature": 0}),
    "endless temperature": ("finite.*got inf", {"temperature": math.inf}),
    "top_k": ("top_k must be at least 1, got 0", {"temperature": 1.0, "top_k": 0}),
    "top_p": (r"\(0, 1\], got 1.5", {"temperature": 1.0, "top_p": 1.5}),
    "top_p of nothing": (r"\(0, 1\], got 0", {"temperature": 1.0, "top_p": 0}),
    "beams": ("at least 1, got 0", {"num_beams": 0}),
    "sampled beams": ("searched, not sampled", {"num_beams": 2, "temperature": 1.0}),
    "n_best": ("between 1 and num_beams 2, got 3", {"num_beams": 2, "n_best": 3}),
    "length_penalty": ("at least 0, got -1", {"num_beams": 2, "length_penalty": -1}),
    "room": ("the model's 9 after 4 tokens of prompt, got 10", {"max_length": 10}),
}


@pytest.mark.parametrize("case", BAD)
def test_options_that_make_no_sense_are_refused(case):
    message, options = BAD[case]
    with pytest.raises(ValueError, match=message) as caught:
        generate(model("lm"), PROMPTS, **options)
    assert "\n" not in str(caught.value)


def test_prompts_that_cannot_be_meant_are_refused():
    m = model("lm")
    with pytest.raises(ValueError, match="all padding"):
        generate(m, torch.zeros(1, 3, dtype=torch.int64))
    for row in ([[1, 0, 3, 0]], [[1, 0, 3], [1, 3, 4]]):
        with pytest.raises(ValueError, match="between its tokens"):
            generate(m, torch.tensor(row))
    with pytest.raises(ValueError, match=r"\(B, T\).*got shape \(3,\)"):
        generate(m, torch.tensor([1, 3, 4]))
    with pytest.raises(ValueError, match="20 tokens leaves no room: the model reads 12"):
        generate(m, torch.full((1, 20), 3))
    with pytest.raises(ValueError, match="model.eval"):
        stream(m.train(), PROMPTS)


@pytest.mark.filterwarnings("ignore:.*autograd.function.Function.* should not be instantiated:DeprecationWarning")
def test_a_compiled_model_and_one_that_only_has_its_config():
    for kind in ("lm", "pair"):
        m = model(kind)
        compiled = torch.compile(m, backend="eager")
        assert torch.equal(generate(compiled, inputs(kind)), generate(m, inputs(kind)))


def test_torchs_layers_take_no_cache():
    for kind in ("lm", "pair"):
        m = model(kind)
        expected = generate(m, inputs(kind))
        revert(m)
        with pytest.raises(TypeError, match="takes no cache: use_cache=False"):
            generate(m, inputs(kind))
        assert torch.equal(generate(m, inputs(kind), use_cache=False), expected)


def test_a_stream_keeps_no_graph(monkeypatch):
    m, recorded = model("pair"), []
    encode = m.encode
    monkeypatch.setattr(m, "encode", lambda src: recorded.append(torch.is_grad_enabled()) or encode(src))
    next(stream(m, SOURCES))
    assert recorded == [False]
