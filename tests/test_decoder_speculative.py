"""generate_speculatively: the tokens of generate, or draws of exactly the model's distribution, whatever is proposed."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from tileformer.decoder import DecoderLM, DecoderLMConfig, Seq2Seq, Seq2SeqConfig, generate
from tileformer.decoder.generation.options import Options
from tileformer.decoder.generation.speculative import ModelDraft, NGramDraft, generate_speculatively

V, LONGEST = 16, 40
MODELS: dict[Any, Any] = {}


def model(kind: str, width: int = 16) -> Any:
    if (kind, width) not in MODELS:
        torch.manual_seed(width)
        if kind == "lm":
            made: Any = DecoderLM(DecoderLMConfig(V, width, 2, 2, 32, max_length=LONGEST))
        else:
            made = Seq2Seq(Seq2SeqConfig(V, V, width, 2, 1, 2, 32, max_length=LONGEST))
        MODELS[kind, width] = made.double().eval()
    return MODELS[kind, width]


def prompts() -> Tensor:
    """Of several lengths, padded behind and before; the first repeats itself."""
    src = torch.randint(3, V, (5, 12), generator=torch.Generator().manual_seed(1))
    src[0] = torch.tensor([3, 4, 5] * 4)
    for row in range(1, 5):
        src[row, 12 - 2 * row :] = 0
    src[4] = src[4].flip(0)
    return src


def drafts(kind: str) -> dict[str, Any]:
    return {
        "ngram": NGramDraft(),
        "small": ModelDraft(model(kind, 8)),
        "itself": ModelDraft(model(kind)),
    }


@pytest.mark.parametrize("kind", ["lm", "pair"])
@pytest.mark.parametrize("max_length", [1, 20, None])
@pytest.mark.parametrize("name", ["ngram", "small", "itself"])
def test_greedy_tokens_are_those_of_generate(kind: str, max_length: int | None, name: str) -> None:
    m, src, draft = model(kind), prompts(), drafts(kind)[name]
    expected = generate(m, src, max_length)
    n = {"ngram": 4, "small": 3, "itself": 9}[name]
    assert torch.equal(generate_speculatively(m, src, max_length, draft=draft, num_draft_tokens=n), expected)
    assert (draft.accepted > 0) == (max_length != 1)
    if max_length == 20:
        assert draft.accepted == draft.proposed if name == "itself" else draft.accepted < draft.proposed


class Steps:
    """Counts the steps of a model."""

    def __init__(self, m: Any) -> None:
        self.m, self.steps = m, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.m, name)

    def step(self, tokens: Tensor, state: Any) -> Tensor:
        self.steps += 1
        return self.m.step(tokens, state)


def test_what_is_accepted_saves_steps() -> None:
    m, src = Steps(model("lm")), prompts()[:1]
    n = generate(m, src, 25).shape[1]
    assert m.steps == n - 1 > 9
    m.steps = 0
    generate_speculatively(m, src, 25, draft=model("lm"), num_draft_tokens=4)
    assert m.steps == -(-(n - 1) // 5)
    m.steps = 0
    draft = NGramDraft()
    generate_speculatively(m, src, 25, draft=draft)
    assert n - 1 - draft.accepted <= m.steps < n - 1 and draft.accepted <= draft.proposed


def test_an_ngram_draft_proposes_what_followed() -> None:
    draft = NGramDraft(2)
    draft.vocab, draft.pad_id = V, 0
    draft.before = [[3, 4, 5, 9, 4, 6], [3, 4], [5, 9, 9], [3, V]]
    found, shares = draft.propose([[3, 4], [5], [8, 9], [3]], [0, 1, 2, 3], 3)
    # the latest occurrence of the longest end; nothing for what never occurred or what the model cannot say
    assert shares is None and found.tolist() == [[5, 9, 4], [0, 0, 0], [8, 9, 0], [0, 0, 0]]
    assert draft.propose([[3, 4], [5], [8, 9], [3]], [1, 3], 3)[0].shape == (4, 0)


@pytest.mark.parametrize("kind", ["lm", "pair"])
def test_an_ngram_draft_looks_into_source_and_prompt(kind: str) -> None:
    m, draft = Steps(model(kind)), NGramDraft()
    src = torch.tensor([[3, 4, 5, 6]])
    said = generate(m, src, 12)[:, :6]
    copied = torch.cat([said, src], 1) if kind == "pair" else torch.cat([src, said, src], 1)
    expected = generate(m, copied, 12)
    assert torch.equal(generate_speculatively(m, copied, 12, draft=draft), expected)
    seen = {tuple(x) for x in copied.unfold(1, 2, 1)[0].tolist()}
    again = [pair for pair in itertools.pairwise(expected[0].tolist()) if pair in seen]
    assert not again or draft.proposed


# ---- drawn tokens


class Table:
    """Log-probabilities (V, V) of each token after each; its state forgets, and takes several tokens a step."""

    eos_id, pad_id = 2, 5

    def __init__(self, seed: int, size: int = 6) -> None:
        self.table = torch.randn(size, size, generator=torch.Generator().manual_seed(seed)) * 1.5

    def start(self, tokens: Tensor, *, capacity: int, source: Any = None, beams: int = 1) -> Any:
        self.lengths = torch.full((len(tokens),), tokens.shape[1], dtype=torch.int32)
        return self.table[tokens[:, -1]], self

    def step(self, tokens: Tensor, state: Any) -> Tensor:
        return self.table[tokens]

    def truncate(self, lengths: Tensor) -> None:
        pass


def expected_shares(m: Table, options: Options, last: int, steps: int) -> dict[tuple[int, ...], float]:
    """The probability of each continuation of ``steps`` tokens, by hand."""
    logits = m.table.double().clone()
    logits[:, m.pad_id] = -torch.inf
    logits /= options.temperature
    if options.top_k is not None:
        logits = logits.masked_fill(logits < logits.topk(options.top_k).values[:, -1:], -torch.inf)
    p = logits.softmax(-1)
    found: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(steps):
        longer: dict[tuple[int, ...], float] = {}
        for line, share in found.items():
            if line and line[-1] == m.eos_id:
                longer[line] = share
                continue
            for token, q in enumerate(p[line[-1] if line else last].tolist()):
                if q > 0:
                    longer[(*line, token)] = share * q
        found = longer
    return found


@pytest.mark.parametrize("top_k", [None, 3])
@pytest.mark.parametrize("name", ["ngram", "another", "itself", "certain"])
def test_drawn_tokens_follow_the_model(name: str, top_k: int | None) -> None:
    """Pearson's chi-square of all continuations of three tokens; what is proposed is far from it, or it."""
    m, rows, steps = Table(0), 6000, 3
    options = Options(temperature=1.2, top_k=top_k, seed=5)
    draft: Any = {"ngram": NGramDraft(1), "another": Table(1), "itself": Table(0), "certain": Table(2)}[name]
    if name == "certain":
        draft.table *= 20
    src = torch.tensor([[4, 3, 0, 4, 1, 4]]).expand(rows, -1)
    tokens = generate_speculatively(m, src, steps, draft=draft, num_draft_tokens=2, options=options)
    shares = expected_shares(m, options, 4, steps)
    counts: dict[tuple[int, ...], int] = {}
    for line in tokens.tolist():
        key = tuple(x for x in line if x != m.pad_id)
        counts[key] = counts.get(key, 0) + 1
    assert set(counts) <= set(shares) and abs(sum(shares.values()) - 1) < 1e-9
    rare = [key for key in shares if shares[key] * rows < 5]
    cells = [(counts.get(key, 0), share * rows) for key, share in shares.items() if key not in rare]
    if rare:
        cells.append((sum(counts.get(key, 0) for key in rare), sum(shares[key] for key in rare) * rows))
    chi2 = sum((seen - wanted) ** 2 / max(wanted, 1e-9) for seen, wanted in cells)
    freedom = len(cells) - 1
    assert chi2 < freedom + 3.1 * (2 * freedom) ** 0.5 + 4  # beyond the 99.9th percentile


@pytest.mark.parametrize("kind", ["lm", "pair"])
def test_what_a_row_draws_depends_on_its_seed_alone(kind: str) -> None:
    m, src = model(kind), prompts()[:4]
    together = generate_speculatively(m, src, 15, draft=model(kind, 8), options=Options(temperature=1.5, seed=3))
    for row in range(4):
        options = Options(temperature=1.5, seed=[3 + row])
        alone = generate_speculatively(m, src[row : row + 1], 15, draft=model(kind, 8), options=options)[0]
        assert together[row, : len(alone)].tolist() == alone.tolist() and not together[row, len(alone) :].any()
    other = generate_speculatively(m, src, 15, draft=model(kind, 8), options=Options(temperature=1.5, seed=4))
    assert together.shape != other.shape or not torch.equal(together, other)
    torch.manual_seed(0)
    free = [generate_speculatively(m, src, 15, options=Options(temperature=1.5)) for _ in range(2)]
    assert free[0].shape != free[1].shape or not torch.equal(*free)


def test_a_draft_that_agrees_draws_what_generate_draws_at_first() -> None:
    m, src = model("lm"), prompts()
    options = Options(temperature=1.5, seed=3)
    assert torch.equal(generate_speculatively(m, src, 1, options=options), generate(m, src, 1, options=options))


# ---- what cannot be


class Forgetful(Table):
    def step(self, tokens: Tensor, state: Any) -> Tensor:
        pytest.fail("a step was taken in vain")

    def truncate(self, lengths: Tensor) -> None:
        raise NotImplementedError("this state cannot forget")


def test_what_cannot_be_drafted_is_refused() -> None:
    m, src = model("lm"), prompts()
    with pytest.raises(ValueError, match="num_draft_tokens must be at least 1, got 0"):
        generate_speculatively(m, src, num_draft_tokens=0)
    with pytest.raises(ValueError, match="draft must be 'ngram', a model or a draft, got 'bigram'"):
        generate_speculatively(m, src, draft="bigram")
    with pytest.raises(ValueError, match="size must be at least 1, got 0"):
        NGramDraft(0)
    with pytest.raises(ValueError, match="the draft chooses among 6 tokens, the model among 16"):
        generate_speculatively(m, src[:, :1] * 0 + 3, draft=Table(0))
    for wrong in (Options(num_beams=2), Options(repetition_penalty=1.1), Options(forced_prefix_ids=[3])):
        with pytest.raises(ValueError, match="no beams and no constraints"):
            generate_speculatively(m, src, options=wrong)
    with pytest.raises(ValueError, match="2 seeds for 5 rows"):
        generate_speculatively(m, src, options=Options(temperature=1.0, seed=[1, 2]))
    with pytest.raises(NotImplementedError, match="cannot forget"):
        generate_speculatively(Forgetful(0), torch.tensor([[3]]), 5)
    with pytest.raises(ValueError, match="max_length must be between 1 and the model's 29 after 12 tokens"):
        generate_speculatively(m, src, 60)
    assert generate_speculatively(m, src[:0], 5).shape == (0, 0)
