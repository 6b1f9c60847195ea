"""Options of decoding: each against transformers' own processor, or what it promises written out."""

import math

import pytest
import torch

from tileformer.decoder import DecoderLM, DecoderLMConfig, Seq2Seq, Seq2SeqConfig, generate, stream
from tileformer.decoder.generation import Options
from tileformer.decoder.generation.constraints import Adjuster
from tileformer.decoder.generation.sampling import SeededClocks, candidates

PAD, BOS, EOS, V = 0, 1, 2, 11
PROMPTS = torch.tensor([[1, 3, 4, 5, 3], [1, 4, 0, 0, 0], [0, 1, 5, 3, 4]])
SOURCES = torch.tensor([[3, 4, 5, 8], [6, 7, 0, 0], [3, 0, 0, 0]])


def model(kind="lm", seed=0, sharp=3.0):
    torch.manual_seed(seed)
    shape = dict(d_model=16, nhead=2, dim_feedforward=32, max_length=24)
    if kind == "lm":
        m = DecoderLM(DecoderLMConfig(V, num_layers=1, **shape)).eval()
    else:
        m = Seq2Seq(Seq2SeqConfig(9, V, num_encoder_layers=1, num_decoder_layers=1, **shape)).eval()
    with torch.no_grad():
        (m.norm if kind == "lm" else m.transformer.decoder.norm).weight.mul_(sharp)
    return m


def rows(tokens):
    return [[token for token in row if token != PAD] for row in tokens.tolist()]


def adjusted(scores, tokens, steps=4, step=0, new=0, **options):
    """What the options make of scores (R, V) behind `tokens` (R, n), the last `new` of which were chosen."""
    scores = scores.index_fill(1, torch.tensor([PAD]), -math.inf)
    adjuster = Adjuster(Options(**options), tokens, steps, None, new, eos_id=EOS, pad_id=PAD, vocab=V)
    return adjuster(scores, step)


@pytest.fixture
def processors():
    return pytest.importorskip("transformers", reason="the hf extra is not installed")


CASES = {
    "repetition": ({"repetition_penalty": 1.7}, lambda t: t.RepetitionPenaltyLogitsProcessor(1.7)),
    "encouraged repetition": ({"repetition_penalty": 0.5}, lambda t: t.RepetitionPenaltyLogitsProcessor(0.5)),
    "unigrams": ({"no_repeat_ngram_size": 1}, lambda t: t.NoRepeatNGramLogitsProcessor(1)),
    "bigrams": ({"no_repeat_ngram_size": 2}, lambda t: t.NoRepeatNGramLogitsProcessor(2)),
    "trigrams": ({"no_repeat_ngram_size": 3}, lambda t: t.NoRepeatNGramLogitsProcessor(3)),
    "long ngrams": ({"no_repeat_ngram_size": 40}, lambda t: t.NoRepeatNGramLogitsProcessor(40)),
    "bad words": (
        {"bad_words_ids": [[3], [4, 5], [5, 5], [3, 4, 6], [EOS], [7] * 40]},
        lambda t: t.NoBadWordsLogitsProcessor([[3], [4, 5], [5, 5], [3, 4, 6], [EOS], [7] * 40], EOS),
    ),
    "minimum": ({"min_new_tokens": 2}, lambda t: t.MinNewTokensLengthLogitsProcessor(11, 2, EOS)),
    "minimum reached": ({"min_new_tokens": 1}, lambda t: t.MinNewTokensLengthLogitsProcessor(11, 1, EOS)),
    "forced end": ({"forced_eos_token_id": EOS}, lambda t: t.ForcedEOSTokenLogitsProcessor(13, EOS)),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("seed", range(3))
def test_a_constraint_is_that_of_transformers(case, seed, processors):
    """Twelve tokens, one of them new, of few kinds so that they repeat."""
    options, theirs = CASES[case]
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, 7, (40, 12), generator=generator)
    scores = torch.randn(40, V, generator=generator)
    expected = theirs(processors)(tokens, scores.index_fill(1, torch.tensor([PAD]), -math.inf))
    assert torch.equal(adjusted(scores, tokens, steps=1, new=1, **options), expected)
    assert case in ("minimum reached", "long ngrams") or not torch.equal(expected[:, 1:], scores[:, 1:])


def test_a_short_history_repeats_nothing_of_its_padding():
    tokens = torch.tensor([[0, 0, 0, 0, 3], [0, 0, 0, 3, 3]])
    result = adjusted(torch.zeros(2, V), tokens, no_repeat_ngram_size=2)
    assert result[0].tolist() == [-math.inf] + [0.0] * 10
    assert result[1, 3] == -math.inf and result[1, 4:].eq(0).all() and result[1, 1:3].eq(0).all()


def test_penalties_of_presence_and_frequency_are_of_new_tokens_alone():
    tokens = torch.tensor([[1, 7, 3, 3, 4]])
    result = adjusted(torch.zeros(1, V), tokens, new=3, presence_penalty=0.5, frequency_penalty=0.25)
    expected = torch.zeros(V).index_fill(0, torch.tensor([0]), -math.inf)
    expected[3], expected[4] = -0.5 - 2 * 0.25, -0.5 - 0.25
    assert torch.equal(result[0], expected)


WARPERS = [
    {"temperature": 0.7},
    {"temperature": 1.5, "top_k": 3},
    {"top_p": 0.6},
    {"min_p": 0.2},
    {"typical_p": 0.3},
    {"typical_p": 0.9},
    {"temperature": 0.8, "top_k": 6, "top_p": 0.7},
    {"top_p": 0.8, "min_p": 0.3},
    {"temperature": 1.3, "top_k": 7, "top_p": 0.9, "min_p": 0.1, "typical_p": 0.6},
    {"top_k": 99, "top_p": 1.0},
]


@pytest.mark.parametrize("options", WARPERS, ids=str)
def test_the_tokens_that_may_be_drawn_are_those_of_transformers(options, processors):
    t, scores = processors, torch.randn(60, V, generator=torch.Generator().manual_seed(1)) * 2
    makes = {"temperature": t.TemperatureLogitsWarper, "top_k": t.TopKLogitsWarper, "top_p": t.TopPLogitsWarper}
    makes |= {"min_p": t.MinPLogitsWarper, "typical_p": t.TypicalLogitsWarper}
    expected = scores
    for name, make in makes.items():
        if name in options:
            expected = make(options[name])(None, expected)
    expected = expected.softmax(-1)
    shares, ids = candidates(scores, Options(**{"temperature": 1.0, **options}))
    if ids is not None:
        shares = torch.zeros(60, V).scatter(1, ids, shares)
    torch.testing.assert_close(shares / shares.sum(1, keepdim=True), expected, atol=1e-6, rtol=1e-5)


# Seeds


def test_a_row_draws_alone_what_it_draws_in_any_batch():
    m, seeds = model(), [5, -7, 2**40]
    options = [dict(), dict(top_k=4), dict(top_p=0.9), dict(min_p=0.05, repetition_penalty=1.3)]
    for case in options:
        together = generate(m, PROMPTS, 9, options=Options(temperature=1.0, seed=seeds, **case))
        assert len(set(map(tuple, rows(together)))) == 3
        for order in ([2], [1, 0], [0, 0, 2, 1, 1, 2, 0]):
            again = generate(
                m, PROMPTS[order], 9, options=Options(temperature=1.0, seed=[seeds[i] for i in order], **case)
            )
            assert rows(again) == [rows(together)[i] for i in order]


def test_one_seed_counts_the_rows_and_each_sample_is_another():
    m, prompts = model(), PROMPTS[:1].repeat(3, 1)
    one = generate(m, prompts, 8, options=Options(temperature=1.0, seed=4))
    assert torch.equal(one, generate(m, prompts, 8, options=Options(temperature=1.0, seed=[4, 5, 6])))
    several, scores = generate(m, prompts, 8, options=Options(temperature=1.0, seed=4, num_return_sequences=5))
    assert several.shape[:2] == (3, 5) and scores.shape == (3, 5)
    assert rows(several[:, 0]) == rows(one) and len(set(map(tuple, rows(several.flatten(0, 1))))) >= 8
    alone = generate(m, prompts[:1], 8, options=Options(temperature=1.0, seed=6, num_return_sequences=5))[0]
    assert rows(alone[0]) == rows(several[2])


def test_a_samples_score_is_its_log_probability():
    for kind, src in (("lm", PROMPTS[:1, :3]), ("pair", SOURCES[:1])):
        m = model(kind)
        options = Options(temperature=0.7, top_k=5, seed=1, num_return_sequences=4, length_penalty=0.5)
        found, scores = generate(m, src, 6, options=options)
        for row, score in zip(rows(found[0]), scores[0], strict=True):
            own = src[0].tolist() if kind == "lm" else [BOS]
            whole = torch.tensor([own + row])
            with torch.no_grad():
                logits = m(whole) if kind == "lm" else m(src, whole)
            logits[..., PAD] = -math.inf
            logp = logits[0].log_softmax(-1)
            total = sum(float(logp[len(own) - 1 + i, token]) for i, token in enumerate(row))
            assert float(score) == pytest.approx(total / len(row) ** 0.5, abs=1e-4)


def test_clocks_are_exponential_and_the_same_however_they_are_asked_for():
    seeds, copies = torch.arange(3) - 1, torch.tensor([0, 0, 7])
    whole = SeededClocks(seeds, copies)
    table = torch.stack([whole(position, 9001) for position in range(40)])
    assert torch.equal(table[17], SeededClocks(seeds, copies)(17, 9001)) and len(table.unique()) > 0.97 * table.numel()
    assert table.isfinite().all() and (table > 0).all()
    assert table.mean().item() == pytest.approx(1, abs=0.01) and table.var().item() == pytest.approx(1, abs=0.02)
    assert (table < 1e-4).float().mean().item() == pytest.approx(1e-4, rel=0.2)
    apart = [SeededClocks(torch.tensor([seed]), torch.tensor([0]))(3, 9) for seed in (7, 7 + 2**32, 7 - 2**63)]
    assert len(set(torch.cat(apart).flatten().tolist())) == 27  # all 64 bits count
    ids = torch.tensor([[0, 1, 5, 9000], [7, 8, 3, 2], [4, 4, 4, 6]])
    assert torch.equal(SeededClocks(seeds, copies)(17, 9001, ids), table[17].gather(1, ids))  # a few of many
    small = SeededClocks(seeds, copies)
    few = torch.stack([small(position, 9) for position in range(40)])
    assert torch.equal(few, table[..., :9])
    assert torch.equal(small(39, 9, ids[:, 1:2]), few[39].gather(1, ids[:, 1:2]))
    small.select(torch.tensor([2, 0]))
    assert torch.equal(small(39, 9), few[39][[2, 0]]) and torch.equal(small(2, 9), few[2][[2, 0]])


def test_seeded_samples_follow_the_probabilities():
    m = model(sharp=1.0)
    with torch.no_grad():
        logits = m(PROMPTS[:1])[0, -1]
    logits[PAD] = -math.inf
    p = logits.softmax(0)
    tokens = generate(m, PROMPTS[:1].expand(4000, -1), 1, options=Options(temperature=1.0, seed=0))
    got = torch.bincount(tokens[:, 0], minlength=V) / 4000
    assert ((got - p).abs() <= 4 * (p * (1 - p) / 4000).sqrt() + 1e-9).all()


# What a row may say


@pytest.mark.parametrize("beams", [1, 3])
def test_an_adjust_is_a_processor_of_transformers(beams, processors):
    """It sees whole rows, prompts too; the tokens are those of the option of that name."""
    m = model(seed=1)
    options = {"num_beams": beams}
    theirs = processors.LogitsProcessorList(
        [processors.RepetitionPenaltyLogitsProcessor(1.6), processors.NoRepeatNGramLogitsProcessor(2)]
    )
    for row in PROMPTS:
        prompt = row[None, row != PAD]
        ours = generate(m, prompt, 9, options=Options(repetition_penalty=1.6, no_repeat_ngram_size=2, **options))
        assert torch.equal(ours, generate(m, prompt, 9, options=Options(adjust=theirs, **options)))
        assert not torch.equal(ours, generate(m, prompt, 9, num_beams=beams))


def test_an_adjust_sees_each_row_at_its_place_to_the_end():
    m, seen = model(), []

    def adjust(tokens, scores):
        seen.append(tokens.clone())
        scores = scores.clone()
        scores[0, :EOS] = scores[0, EOS + 1 :] = -math.inf  # the first row ends at once
        scores[1:, EOS] = -math.inf
        scores[:, PAD] = 99.0  # which is never chosen
        return scores

    result = generate(m, PROMPTS.repeat(2, 1)[:5], 4, options=Options(adjust=adjust))
    assert [x.shape for x in seen] == [(5, 5 + n) for n in range(4)]
    assert seen[0][1].tolist() == [0, 0, 0, 1, 4] and result[0].tolist() == [EOS, 0, 0, 0]
    assert torch.equal(seen[-1][:, 5:], result[:, :3])
    with pytest.raises(ValueError, match=r"adjust must give scores \(3, 11\), got \(3, 5\)"):
        generate(m, PROMPTS, 4, options=Options(adjust=lambda tokens, scores: scores[:, :5]))


def words(allowed):
    """Rows of ids as int32 words, bit i % 32 of word i // 32."""
    bits = torch.zeros(len(allowed), -(-V // 32) * 32, dtype=torch.int64)
    for row, ids in enumerate(allowed):
        bits[row, ids] = 1
    packed = (bits.view(len(allowed), -1, 32) << torch.arange(32)).sum(-1)
    return (packed - (packed >> 31 << 32)).to(torch.int32)


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "seed": 0}, {"num_beams": 2}], ids=str)
def test_a_bitmask_says_what_may_be_chosen(options):
    """Row by row other tokens, each step; then the end alone."""
    beams = options.get("num_beams", 1)

    def bitmask(new):
        sizes.append(new.shape[1])
        steps = [[3 + (row // beams + new.shape[1]) % 3] for row in range(len(new))]
        return words(steps if new.shape[1] < 3 else [[EOS]] * len(new))

    sizes = []
    result = generate(model(), PROMPTS, 6, options=Options(bitmask=bitmask, **options))
    assert result.tolist() == [[3, 4, 5, EOS], [4, 5, 3, EOS], [5, 3, 4, EOS]] and sizes == [0, 1, 2, 3]


def test_every_bit_of_a_mask_is_read():
    scores = torch.zeros(3, 70)
    mask = torch.tensor([[-1, 0, 0], [-(2**31), 1, 0], [0, 0, 2**5]], dtype=torch.int32)
    adjuster = Adjuster(Options(bitmask=lambda new: mask), PROMPTS, 1, eos_id=EOS, pad_id=PAD, vocab=70)
    allowed = [row.nonzero()[:, 0].tolist() for row in adjuster(scores, 0) == 0]
    assert allowed == [[*range(1, 32)], [31, 32], [69]]
    for wrong in (mask[:, :2], mask.long(), mask[:2]):
        with pytest.raises(ValueError, match=r"bitmask must give int32 \(3, 3\), got torch"):
            adjuster = Adjuster(Options(bitmask=lambda new, w=wrong: w), PROMPTS, 1, eos_id=EOS, pad_id=PAD, vocab=70)
            adjuster(scores, 0)


def test_masks_of_outlines_core():
    core = pytest.importorskip("outlines_core", reason="outlines-core is not installed")
    kernels = pytest.importorskip("outlines_core.kernels.torch")
    letters = {chr(97 + i): [i] for i in range(3, V)}
    index = core.Index("(d|e)f{2,3}k?", core.Vocabulary(EOS, letters))
    guides, mask = [core.Guide(index) for _ in PROMPTS], kernels.allocate_token_bitmask(V).repeat(3, 1)

    def bitmask(new):
        for row, guide in enumerate(guides):
            if new.shape[1] and int(new[row, -1]) not in (EOS, PAD):
                guide.advance(int(new[row, -1]))
            kernels.fill_next_token_bitmask(guide, mask[row : row + 1])
        return mask

    for options in ({}, {"temperature": 2.0, "seed": 1}):
        guides = [core.Guide(index) for _ in PROMPTS]
        result = generate(model(), PROMPTS, 8, options=Options(bitmask=bitmask, **options))
        for row in rows(result):
            text = "".join(chr(97 + i) for i in row[:-1])
            assert row[-1] == EOS and text in ("dff", "dfff", "dffk", "dfffk", "eff", "efff", "effk", "efffk")


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "seed": 2}, {"num_beams": 2}], ids=str)
def test_a_row_without_a_token_left_ends_there(options):
    def adjust(tokens, scores):
        """7 or 8, and behind a new 7 nothing."""
        result = torch.full_like(scores, -math.inf)
        result[:, 7:9] = 0.0
        result[(tokens[:, 3:] == 7).any(1)] = -math.inf
        return result

    prompts = torch.tensor([[1, 7, 3], [1, 9, 3], [5, 6, 7]])
    result = rows(generate(model(), prompts, 11, options=Options(adjust=adjust, **options)))
    assert all(set(row[:-1]) <= {8} and row[-1] == 7 for row in result)
    assert "seed" in options or result == [[7]] * 3


@pytest.mark.parametrize("kind", ["lm", "pair"])
@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "seed": [3, 1, 2]}, {"num_beams": 3}], ids=str)
def test_a_forced_prefix_is_read_and_given_back(kind, options):
    m, src = model(kind), PROMPTS if kind == "lm" else SOURCES
    prefix = [7, 3]
    found = generate(m, src, 8, options=Options(forced_prefix_ids=prefix, **options))
    assert (found[:, :2] == torch.tensor(prefix)).all() and found.shape[1] <= 8
    forced = generate(m, src, 8, options=Options(forced_tokens=[(0, 7), (1, 3)], **options))
    assert torch.equal(found, forced)
    if "num_beams" not in options:
        parts = list(stream(m, src, 8, options=Options(forced_prefix_ids=prefix, **options)))
        assert torch.equal(torch.stack(parts, 1)[:, : found.shape[1]], found)
    if kind == "lm" and not options:
        longer = torch.tensor([[1, 3, 4, 5, 3, 7, 3], [1, 4, 7, 3, 0, 0, 0], [1, 5, 3, 4, 7, 3, 0]])
        assert torch.equal(found[:, 2:], generate(m, longer, 6))
        assert rows(generate(m, src, options=Options(forced_prefix_ids=prefix))) == [
            prefix + row for row in rows(generate(m, longer))
        ]


@pytest.mark.parametrize("beams", [1, 3])
def test_a_row_ends_late_enough_and_in_time(beams):
    m = model(seed=2)
    with torch.no_grad():
        m.embedding.weight[EOS] *= 8  # now and then it would end at once
    shortest = generate(m, PROMPTS, 9, num_beams=beams)
    assert min(map(len, rows(shortest))) < 4
    for least in (4, 9):
        result = rows(generate(m, PROMPTS, 9, options=Options(min_new_tokens=least, num_beams=beams)))
        assert all(len(row) >= least and EOS not in row[:least] for row in result)
    ended = Options(forced_eos_token_id=EOS, bad_words_ids=[[EOS, EOS]], min_new_tokens=4, num_beams=beams)
    assert all(row[-1] == EOS and row.count(EOS) == 1 for row in rows(generate(m, PROMPTS, 5, options=ended)))
    ragged = rows(generate(m, PROMPTS, options=Options(forced_eos_token_id=EOS, adjust=never_ends, num_beams=beams)))
    assert [row[-1] for row in ragged] == [EOS] * 3 or beams > 1
    assert [len(row) for row in ragged] == [20, 23, 21]


def never_ends(tokens, scores):
    """A forced end stands, with 0 beside -inf alone."""
    alone = (scores > -math.inf).sum(1, keepdim=True) == 1
    return torch.where(alone, scores, scores.index_fill(1, torch.tensor([EOS]), -math.inf))


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "seed": 0}, {"num_beams": 3}], ids=str)
def test_a_row_ends_with_the_token_that_completes_a_stop_string(options):
    """Tokens are two letters each: the string may begin and end inside of one."""
    m = model(seed=3)
    decode = lambda ids: "".join(f"{chr(97 + i)}{chr(65 + i)}" for i in ids)  # noqa: E731
    plain = rows(generate(m, PROMPTS, 9, options=Options(**options)))
    stops = [decode(plain[0])[3:6], decode(plain[1])[2:3]]
    found = rows(generate(m, PROMPTS, 9, options=Options(stop_strings=stops, decode=decode, **options)))
    for row, whole in zip(found, plain, strict=True):
        held = [any(stop in decode(row[: n + 1]) for stop in stops) for n in range(len(row))]
        assert not any(held[:-1]) and (held[-1] or row[-1] == EOS or len(row) == 9)
        assert "num_beams" in options or row == whole[: len(row)]
    assert len(found[0]) <= 3 and len(found[1]) <= 2


# Refusals


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 1.0}, {"temperature": 1.0, "seed": 1}, {"num_beams": 2}], ids=str
)
def test_logits_that_are_no_numbers_are_told(options):
    m = model()
    with torch.no_grad():
        m.embedding.weight[5] = math.nan
    with pytest.raises(FloatingPointError, match="row 0: the model's logits are NaN"):
        generate(m, PROMPTS[[0, 2]], 4, options=Options(**options))


BAD = {
    "sampling": ("min_p, seed are for sampling: pass a temperature", {"min_p": 0.1, "seed": 1}),
    "min_p": (r"min_p must be in \(0, 1\], got 2", {"temperature": 1.0, "min_p": 2}),
    "typical_p": (r"typical_p must be in \(0, 1\], got 0", {"temperature": 1.0, "typical_p": 0}),
    "two sources": ("pass one of them", {"temperature": 1.0, "seed": 1, "generator": torch.Generator()}),
    "seeds": ("2 seeds for 3 rows", {"temperature": 1.0, "seed": [1, 2]}),
    "repetition": ("above 0 and finite, got 0", {"repetition_penalty": 0}),
    "presence": ("presence_penalty must be finite, got inf", {"presence_penalty": math.inf}),
    "ngrams": ("no_repeat_ngram_size must be at least 0, got -1", {"no_repeat_ngram_size": -1}),
    "minimum": ("min_new_tokens 7 is more than the room of 6", {"min_new_tokens": 7}),
    "empty stop": ("empty one", {"stop_strings": [""], "decode": str}),
    "empty word": ("empty one", {"bad_words_ids": [[]]}),
    "undecoded": ("belong together", {"stop_strings": "x"}),
    "decoded in vain": ("belong together", {"decode": str}),
    "no token": ("token 11 cannot be banned or forced: .* 0 to 10", {"bad_words_ids": [[3, 11]]}),
    "padding": ("token 0 cannot be banned or forced", {"forced_tokens": [(0, PAD)]}),
    "ended prefix": ("hold eos_id 2", {"forced_prefix_ids": [3, EOS]}),
    "long prefix": ("6 tokens, which leaves no room: max_length is 6", {"forced_prefix_ids": [3] * 6}),
    "groups": ("divide num_beams 4 into equal groups, got 3", {"num_beams": 4, "num_beam_groups": 3}),
    "groups of one mind": ("belong together, got 2 and 0.0", {"num_beams": 4, "num_beam_groups": 2}),
    "diversity": ("belong together, got 1 and 0.5", {"num_beams": 4, "diversity_penalty": 0.5}),
    "returned": ("between 1 and num_beams 2, got 3", {"num_beams": 2, "num_return_sequences": 3}),
    "samples": ("must be at least 1, got 0", {"temperature": 1.0, "num_return_sequences": 0}),
}


@pytest.mark.parametrize("case", BAD)
def test_options_that_make_no_sense_are_refused(case):
    message, options = BAD[case]
    with pytest.raises(ValueError, match=message) as caught:
        generate(model(), PROMPTS, 6, options=Options(**options))
    assert "\n" not in str(caught.value)


def test_options_beside_options_are_refused():
    with pytest.raises(ValueError, match="put top_k, num_beams into them"):
        generate(model(), PROMPTS, options=Options(), top_k=3, num_beams=2)
    for options in (Options(num_beams=2), Options(num_return_sequences=1)):
        with pytest.raises(ValueError, match="a stream gives one row for each"):
            stream(model(), PROMPTS, options=options)


def test_options_are_values():
    one = Options(bad_words_ids=[[3, 4]], seed=[1, 2], temperature=1, stop_strings="x", decode=str)
    two = Options(bad_words_ids=((3, 4),), seed=(1, 2), temperature=1, stop_strings=["x"], decode=str)
    assert one == two and hash(one) == hash(two) and one.constrains and not Options(forced_prefix_ids=[3]).constrains
