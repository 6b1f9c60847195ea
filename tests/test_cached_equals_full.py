"""Cached decoding is full decoding: in each step the logits of the whole sequence read at once, in the end its tokens.

For every cache, alone and in ragged batches, greedy and by beams. A cache is a function that makes of a model what
`generate` decodes; the model's own forward is what it is held to. `make cached` takes 1,000 sequences of each kind.
"""

import copy
import dataclasses
import itertools

import pytest
import torch

from tileformer.bench.check.budget import over_budget
from tileformer.decoder import CausalConfig, CausalLM, DecoderLM, DecoderLMConfig, Seq2Seq, Seq2SeqConfig, generate
from tileformer.decoder.generation.state import align_prompts
from tileformer.kernels import use_backend


class Under:
    """A model that decodes under a backend."""

    conditioned = property(lambda self: self.model.conditioned)

    def __init__(self, model, backend):
        self.model, self.backend = model, backend

    def start(self, *args, **options):
        with use_backend(self.backend):
            return self.model.start(*args, **options)

    def step(self, tokens, state):
        with use_backend(self.backend):
            return self.model.step(tokens, state)


def by_modules(model):
    """A hook is what a packed step leaves to the modules."""
    (model.tgt_embedding if isinstance(model, Seq2Seq) else model.norm).register_forward_hook(lambda *_: None)
    return model


CACHES = {"StaticCache": lambda m: m, "DeviceCache": lambda m: Under(m, "reference"), "KVCache": by_modules}
V, STEPS, ROWS, FEW = 11, 12, 16, 16  # FEW sequences of each kind in a plain run
LM = DecoderLMConfig(V, d_model=16, nhead=2, num_layers=2, dim_feedforward=32, max_length=24)
PAIR = Seq2SeqConfig(
    9, V, d_model=16, nhead=2, num_encoder_layers=1, num_decoder_layers=2, dim_feedforward=32, max_length=24
)
GROUPED = CausalConfig(  # all that the pretrained forms add to a decoder
    V, d_model=16, nhead=4, num_layers=2, dim_feedforward=24, nhead_kv=2, head_dim=8, qk_norm=True, qkv_bias=True,
    window=5, alternating=True, attention_softcap=4.0, logit_softcap=6.0, attention_scale=0.5, sandwich=True, tied=False,
    max_length=24, pad_id=0,
)  # fmt: skip
RAGGED = {"lm": ("none", "behind", "before"), "pair": ("none", "source", "source and prompts")}
RAGGED["grouped"] = RAGGED["lm"]


@dataclasses.dataclass
class Seen:
    """What a run of many sequences came to."""

    sequences: int = 0
    ended: int = 0  # before the last step
    steps: int = 0
    near_ties: int = 0  # sequences with a step whose best logits the budget cannot tell apart
    others: int = 0  # sequences that came to other tokens
    over_budget: float = 0.0


class Watched:
    """A `Decodable` whose every step is compared with the model's forward of all tokens that its rows have read."""

    def __init__(self, decodable, model, truth, prompts, seen=None, **options):
        self.decodable, self.model, self.truth, self.seen, self.options = decodable, model, truth, seen, options
        self.prompts = prompts if model.conditioned else None  # `generate` would begin each row with bos_id alone
        self.eos_id, self.pad_id, self.bos_id = model.eos_id, model.pad_id, model.bos_id
        self.conditioned, self.max_length = model.conditioned, model.max_length

    def start(self, tokens, *, capacity, source=None, beams=1):
        if self.prompts is not None:
            tokens, capacity = self.prompts, capacity + self.prompts.shape[1] - 1
        logits, state = self.decodable.start(tokens, capacity=capacity, source=source, beams=beams, **self.options)
        aligned, lengths, *_ = align_prompts(tokens, self.pad_id)
        aligned = torch.nn.functional.pad(aligned, (0, capacity + 1 - aligned.shape[1]))
        self.rows, self.lengths = aligned.repeat_interleave(beams, 0), lengths.repeat_interleave(beams, 0)
        self.of, self.best = torch.arange(len(tokens)).repeat_interleave(beams), beams + 1  # each row's sequence
        self.tied = torch.zeros(len(tokens), dtype=torch.bool)
        self.source = () if source is None else (source.repeat_interleave(beams, 0),)
        self.compare(logits)
        self.state = state
        return logits, Followed(state, self)

    def step(self, tokens, state):
        logits = self.decodable.step(tokens, state.state)
        self.rows.scatter_(1, self.lengths[:, None], tokens[:, None])
        self.lengths = self.lengths + 1
        self.compare(logits)
        return logits

    def compare(self, logits):
        if self.seen is None:
            return
        rows, last = self.rows[:, : int(self.lengths.max())], self.lengths - 1
        full, truth = (m(*self.source, rows)[torch.arange(len(rows)), last] for m in (self.model, self.truth))
        size = float(truth.abs().max())
        if isinstance(self.model, CausalLM) and full.dtype == torch.float64:
            size *= 4  # norms of heads make a rounding larger, and there is no yardstick beyond float64
        self.seen.over_budget = max(self.seen.over_budget, over_budget(logits, full, truth, size))
        self.seen.steps += len(logits)
        budget = 2 * (full - truth).abs().max() + 8 * torch.finfo(full.dtype).eps * size
        gaps = -full.index_fill(1, torch.tensor(self.pad_id), float("-inf")).topk(self.best).values.diff()
        self.tied[self.of[(gaps <= 2 * budget).any(1)]] = True


class Followed:
    """A state; the watcher's rows move with its own."""

    def __init__(self, state, watched):
        self.state, self.watched = state, watched

    @property
    def lengths(self):
        return self.state.lengths

    def select(self, rows):
        self.move(self.state.select, rows)

    def reorder(self, rows):
        self.move(self.state.reorder, rows)

    def move(self, verb, rows):
        verb(rows)
        w = self.watched
        w.rows, w.lengths, w.of = w.rows[rows], w.lengths[rows], w.of[rows]
        w.source = tuple(x[rows] for x in w.source)


def models(kind, seed):
    """In float32 and in float64, the same weights; logits spread so that tokens differ clearly in probability."""
    torch.manual_seed(seed)
    made = {"lm": lambda: DecoderLM(LM), "pair": lambda: Seq2Seq(PAIR), "grouped": lambda: CausalLM(GROUPED)}
    model = made[kind]().eval().requires_grad_(False)
    (model.transformer.decoder.norm if kind == "pair" else model.norm).weight.mul_(2.0)
    for parameter in model.parameters() if kind == "grouped" else ():
        parameter.mul_(8.0 if parameter.dim() > 1 else 1.0)  # which begin near zero
    return model, copy.deepcopy(model).double()


def batch(kind, ragged, seed):
    """What `generate` is handed, and the prompts of a Seq2Seq."""
    draw = torch.Generator().manual_seed(seed)

    def tokens(vocabulary, longest, uneven, before=False):
        drawn = torch.randint(3, vocabulary, (ROWS, longest), generator=draw)
        lengths = torch.randint(1, longest + 1, (ROWS, 1), generator=draw) if uneven else longest
        drawn = drawn.masked_fill(torch.arange(longest) >= lengths, 0)
        return drawn.flip(1) if before else drawn

    if kind != "pair":
        return tokens(V, 6, ragged != "none", ragged == "before"), None
    return tokens(9, 7, ragged != "none"), tokens(V, 4, ragged == "source and prompts")


def decoded(watched, source, beams):
    """Tokens (ROWS, STEPS), and what a row of them scores as a beam."""
    if beams == 1:
        tokens, scores = generate(watched, source, STEPS)[:, None], torch.full((ROWS, 1), torch.nan)
    else:
        tokens, scores = generate(watched, source, STEPS, num_beams=beams, n_best=1)
    return torch.nn.functional.pad(tokens[:, 0], (0, STEPS - tokens.shape[2])), scores[:, 0]


def run(name, kind, ragged, beams, sequences):
    seen = {torch.float32: Seen(), torch.float64: Seen()}
    for seed in range(-(-sequences // ROWS)):
        single, double = models(kind, seed)
        source, prompts = batch(kind, ragged, seed)
        for model, of in zip((single, double), seen.values(), strict=True):
            cached = Watched(CACHES[name](model), model, double, prompts, of)
            tokens, scores = decoded(cached, source, beams)
            assert type(cached.state).__name__ == name
            plain = Watched(model, model, double, prompts, use_cache=False)
            expected, expected_scores = decoded(plain, source, beams)
            others, tied = (tokens != expected).any(1), cached.tied
            of.sequences += ROWS
            of.others += int(others.sum())
            of.ended += int((tokens == model.eos_id).any(1).sum())
            of.near_ties += int(tied.sum())
            # Beams may also tie with each other: of those, neither is better.
            untied = others & ~tied & ~((scores - expected_scores).abs() <= 1e-5)
            assert not untied.any(), f"seed {seed}: other tokens, and no near tie"
    return seen


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize(
    "kind, ragged, beams", [(kind, how, k) for kind in RAGGED for how, k in itertools.product(RAGGED[kind], (1, 3))]
)
def test_every_step_and_every_token(cache, kind, ragged, beams, request, capsys):
    wanted = request.config.getoption("--cached") or FEW
    if cache == "KVCache" and (beams == 1 or ragged == "none") and not request.config.getoption("--cached"):
        pytest.skip("the older cache: a sample of it is run with --cached alone")
    seen = run(cache, kind, ragged, beams, wanted)
    if request.config.getoption("--cached"):
        with capsys.disabled():
            print(f"\n{cache}, {kind}, ragged {ragged}, {beams} beams:", *seen.values(), sep="\n  ")
    assert all(of.sequences >= wanted and of.steps >= 4 * wanted * beams for of in seen.values())
    assert all(of.over_budget <= 1.0 for of in seen.values()), seen
    assert seen[torch.float64].near_ties == seen[torch.float64].others == 0
    assert seen[torch.float32].near_ties <= 1 + wanted / 20


class Forgetful(DecoderLM):
    """Its cache loses a row's first key when rows move."""

    def step(self, tokens, state):
        state.layers[0].self_attn.k[1, :, 0] = 0.0
        return super().step(tokens, state)


def test_a_cache_that_loses_a_key_is_noticed():
    torch.manual_seed(0)
    seen = Seen()
    model = Forgetful(LM).eval().requires_grad_(False)
    generate(Watched(model, model, copy.deepcopy(model).double(), None, seen), batch("lm", "none", 0)[0], STEPS)
    assert seen.over_budget > 100
