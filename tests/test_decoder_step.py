"""The packed step: what the modules compute, of weights as they are now, and only where it knows all of them."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from tileformer.decoder import DecoderLM, DecoderLMConfig, Seq2Seq, Seq2SeqConfig, Transformer, generate
from tileformer.decoder.generation import device as device_cache
from tileformer.decoder.generation.cache import KVCache
from tileformer.decoder.generation.device import DeviceCache
from tileformer.decoder.generation.static import STEPS_BETWEEN_COMPACTIONS, StaticCache
from tileformer.decoder.generation.step import packed_step
from tileformer.kernels import use_backend

SOURCES = torch.tensor([[3, 4, 5, 6, 7], [5, 3, 0, 0, 0], [0, 0, 4, 8, 3], [0, 0, 0, 0, 0], [3, 0, 5, 0, 4]])
PROMPTS = torch.tensor([[3, 4, 5, 6], [7, 0, 0, 0], [4, 9, 8, 0]])


def model(kind="pair", **options):
    torch.manual_seed(0)
    shape = dict(d_model=16, nhead=2, dim_feedforward=32, max_length=48) | options
    if kind == "pair":
        made = Seq2Seq(Seq2SeqConfig(12, 13, num_encoder_layers=1, num_decoder_layers=2, **shape))
    else:
        made = DecoderLM(DecoderLMConfig(13, num_layers=2, **shape))
    return made.double().eval()


def by_modules(m):
    other = copy.deepcopy(m)
    embedding = other.tgt_embedding if isinstance(other, Seq2Seq) else other.embedding
    embedding.register_forward_hook(lambda *_: None)
    assert "hook" in other.explain()
    return other


def start(m, rows=PROMPTS, **options):
    if isinstance(m, Seq2Seq):
        return m.start(torch.full((len(SOURCES), 1), 1), source=SOURCES, **options)
    return m.start(rows, **options)


@pytest.mark.parametrize("served", ["auto", "reference"])
@pytest.mark.parametrize("kind", ["pair", "lm"])
@pytest.mark.parametrize(
    "options", [{}, {"norm_first": False, "activation": "relu"}, {"share_layers": True}], ids=lambda x: " ".join(x)
)
@torch.no_grad()
def test_a_step_is_what_the_modules_compute(kind, options, served):
    if kind == "pair":
        options = {k: v for k, v in options.items() if k != "share_layers"}
    m = model(kind, **options)
    other = by_modules(m)
    with use_backend(served):
        (logits, state), (expected, others) = start(m, capacity=20), start(other, capacity=20)
        assert type(state) is (StaticCache if served == "auto" else DeviceCache) and type(others) is KVCache
        torch.testing.assert_close(logits, expected)
        for n in (1, 3, 1):  # several tokens at once are those of a speculation
            new = torch.randint(3, 13, (len(logits), n))
            torch.testing.assert_close(m.step(new, state), other.step(new, others))
        assert state.lengths.tolist() == others.lengths.tolist()


def test_a_converted_transformer_and_one_without_a_final_norm():
    m = model()
    m.transformer = Transformer(16, 2, 1, 2, 32, activation=F.silu, bias=False, batch_first=True).double().eval()
    m.transformer.decoder.norm = None
    with torch.no_grad():
        assert m.explain().startswith("a packed step")
    assert torch.equal(generate(m, SOURCES, 10), generate(by_modules(m), SOURCES, 10))


def optimise(m):
    before = generate(m, SOURCES, 12)
    optimizer = torch.optim.SGD(m.parameters(), lr=3.0)
    m.train()(SOURCES, before[:, :5].clamp(min=1)).square().mean().backward()
    optimizer.step()
    m.eval()


CHANGES = {
    "an optimiser's step": optimise,
    "other weights": lambda m: m.load_state_dict({k: v.flip(0) for k, v in m.state_dict().items()}),
    "what .data hides": lambda m: [p.data.mul_(-1.7) for p in m.parameters() if p.dim() > 1],
    "one copied matrix by .data": lambda m: m.transformer.decoder.layers[1].linear2.weight.data.mul_(-30.0),
    "positions by .data": lambda m: m.tgt_position.weight.data.mul_(-3.0),
    "another dtype": lambda m: m.float(),
    "another parameter": lambda m: setattr(m.transformer.decoder.layers[0].linear1, "bias", nn.Parameter(torch.ones(32).double() * 9)),
    "the encoder": lambda m: m.transformer.encoder.layers[0].linear1.weight.data.mul_(-9.0),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_weights_that_change_between_two_runs_are_seen(change):
    m = model()
    m.step_memory = 1.0
    before = generate(m, SOURCES, 12)
    CHANGES[change](m)
    after = generate(m, SOURCES, 12)
    assert torch.equal(after, generate(by_modules(m), SOURCES, 12))
    assert change == "another dtype" or before.shape != after.shape or not torch.equal(before, after)


def test_a_model_made_in_inference_mode():
    with torch.inference_mode():
        m = model()
        tokens = generate(m, SOURCES, 9)
    assert torch.equal(tokens, generate(by_modules(model()), SOURCES, 9))


class Marked(torch.Tensor):
    """A tensor of somebody else's: sharded, quantized."""


def mark(m):
    linear = m.transformer.decoder.layers[0].linear1
    linear.weight = nn.Parameter(linear.weight.detach().as_subclass(Marked), requires_grad=False)


class Adapter(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 2


class Louder(Seq2Seq):
    def decode(self, *args, **options):
        return super().decode(*args, **options) * 2


def adapt(m):
    m.transformer.decoder.layers[1].linear1.__class__ = Adapter


STRANGERS = {
    "Adapter is not a module": adapt,
    "has a decode of its own": lambda m: setattr(m, "__class__", Louder),
    "was given a read of its own": lambda m: setattr(m, "read", m.read),
    "a Linear has a hook": lambda m: m.transformer.decoder.layers[0].linear2.register_forward_hook(lambda *_: None),
    "a weight is a Marked": mark,
    "the model has a hook": lambda m: m.register_forward_hook(lambda *_: None),
    "in training mode": lambda m: m.transformer.decoder.layers[0].dropout.train(),
    "computed wider": lambda m: m.bfloat16(),
    "several dtypes": lambda m: m.transformer.decoder.layers[0].linear2.float(),
    "ParametrizedLinear is not": lambda m: nn.utils.parametrizations.weight_norm(m.transformer.decoder.layers[0].linear1),
}  # fmt: skip


@pytest.mark.parametrize("reason", STRANGERS)
@torch.no_grad()
def test_what_the_step_does_not_know_is_left_to_the_modules(reason):
    m = model()
    STRANGERS[reason](m)
    assert reason in m.explain()
    if reason != "several dtypes":  # which no module computes either
        assert type(start(m, capacity=5)[1]) is KVCache


def test_gradients_autocast_and_hooks_of_every_module():
    m = model()
    assert m.explain() == "a packed step, of weights gathered once"  # as generate decodes
    with torch.no_grad():
        assert m.explain() == "a packed step, of weights gathered once"
        with torch.autocast("cpu", torch.bfloat16):
            assert "autocast" in m.explain()
        with torch.nn.modules.module.register_module_forward_hook(lambda *_: None):
            assert "every module" in m.explain()


@torch.no_grad()
def test_weights_are_gathered_once():
    m = model()
    start(m, capacity=9)
    step = packed_step(m, m.parts())
    start(m, capacity=9)
    assert packed_step(m, m.parts()) is step


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@torch.no_grad()
def test_copies_keep_within_their_memory(share):
    m = model()
    m.step_memory = share
    step = packed_step(m, m.parts())
    size, total = (sum(x.nbytes for x in xs) for xs in ([y for _, y in step.copies], m.parameters()))
    assert size <= share * total and (share == 0.0 or size > 0.1 * total)


@pytest.mark.parametrize("served", ["auto", "reference"])
@pytest.mark.parametrize("kind", ["pair", "lm"])
@torch.no_grad()
def test_beams_that_part_meet_and_leave(kind, served):
    m, K = model(kind), 3
    draw = torch.Generator().manual_seed(1)
    with use_backend(served):
        (logits, state), (_, others) = (start(x, capacity=45, beams=K) for x in (m, by_modules(m)))
        other, B = by_modules(m), len(logits) // K
        for _ in range(2 * STEPS_BETWEEN_COMPACTIONS + 2):
            new = torch.randint(3, 13, (B * K,), generator=draw)
            torch.testing.assert_close(m.step(new, state), other.step(new, others))
            parents = torch.randint(0, K, (B, K), generator=draw) + torch.arange(B)[:, None] * K
            for s in (state, others):
                s.reorder(parents.flatten())
        if served == "auto":  # slots that nobody descends from are given up
            assert state.slots < others.length + STEPS_BETWEEN_COMPACTIONS * K
        for rows in (torch.arange(K, B * K), torch.tensor([1, 1, 4]), torch.tensor([2])):  # whole sources; any rows
            for s in (state, others):
                s.select(rows)
            new = torch.randint(3, 13, (len(rows),), generator=draw)
            torch.testing.assert_close(m.step(new, state), other.step(new, others))
            assert state.lengths.tolist() == others.lengths.tolist()


@pytest.mark.parametrize("served", ["auto", "reference"])
@torch.no_grad()
def test_nothing_of_a_row_before_reaches_the_one_that_takes_its_place(served):
    m = model("lm")
    with use_backend(served):
        _, state = m.start(PROMPTS, capacity=20)
        state.kv[:, :, 1] = torch.nan
        state.release(torch.tensor([1]))
        m.step(torch.tensor([5, 6, 7]), state)
        assert state.lengths.tolist() == [5, 0, 4]
        logits, alone = m.start(PROMPTS[:1], capacity=20)
        state.insert(torch.tensor([1]), alone)
        new = torch.tensor([5, 6, 7])
        logits = m.step(new, state)
        torch.testing.assert_close(logits[1:2], m.step(new[1:2], m.start(PROMPTS[:1], capacity=20)[1]))
        assert logits.isfinite().all()
        longer = torch.full((1, 12), 3)
        state.insert(torch.tensor([0]), m.start(longer, capacity=12)[1])
        assert state.length == 12 and state.lengths[0] == 12  # the host counts it too


@torch.no_grad()
def test_a_full_cache_says_so_and_goes_on():
    m = model("lm")
    _, state = m.start(PROMPTS[:, :1], capacity=3)
    for _ in range(2):
        m.step(torch.tensor([3, 4, 5]), state)
    kept = state.kv.clone()
    with pytest.raises(ValueError, match="4 tokens a row do not fit this cache of capacity 3"):
        m.step(torch.tensor([3, 4, 5]), state)
    assert torch.equal(state.kv, kept) and state.lengths.tolist() == [3, 3, 3]
    state.truncate(torch.tensor([1, 1, 1]))
    assert state.length == 1 and state.row_lengths is None  # equal rows need no mask
    assert torch.equal(m.step(PROMPTS[:, 1], state), m.step(PROMPTS[:, 1], m.start(PROMPTS[:, :1], capacity=3)[1]))


def test_shared_rows_refuse_what_they_cannot_do():
    m = model("lm")
    with torch.no_grad():
        _, state = m.start(PROMPTS, capacity=20, beams=2)
        for verb, argument in (("truncate", torch.ones(6)), ("release", torch.tensor([0]))):
            with pytest.raises(ValueError, match="2 beams share"):
                getattr(state, verb)(argument)
        with pytest.raises(ValueError, match="beams read one token a step, got 2"):
            m.step(torch.full((6, 2), 3), state)


class Recorder(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.interprets
@pytest.mark.parametrize("kind, beams", [("pair", 1), ("lm", 2)])
@torch.no_grad()
def test_a_graph_can_hold_a_step(kind, beams):
    """Two steps are the same operators on the same memory, and no value is read on the host."""
    m = model(kind).float()
    with use_backend("interpret"):
        logits, state = start(m, PROMPTS[1:2], capacity=20, beams=beams)
        steps = []
        for _ in range(2):
            with Recorder() as recorder:
                m.step(logits.argmax(-1), state)
            steps.append((recorder.names, state.places()))
    assert steps[0] == steps[1] and len(steps[0][0]) > 50
    reads = {"aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero", "aten::equal"}
    assert not reads & set(steps[0][0])


@torch.no_grad()
def test_a_replayed_step_counts_as_one_that_is_taken(monkeypatch):
    m, made = model("lm"), []

    class Replayed:  # what a graph does: it runs the step, and the host counts it
        def __init__(self, run, tokens, state, places):
            made.append(places)
            self.run, self.state, self.places = run, state, places
            state.count(tokens.shape[1])

        def __call__(self, tokens):
            assert self.places == (
                *tokens.shape,
                self.state.equal_rows,
                *self.state.places(),
            )  # a graph writes where it was captured
            length = self.state.length
            logits = self.run(tokens, self.state)
            self.state.length = length
            return logits

    monkeypatch.setattr(device_cache, "CapturedStep", Replayed)
    with use_backend("reference"):
        (_, state), (_, plain) = (m.start(PROMPTS[:1], capacity=12) for _ in range(2))
        step = packed_step(m, m.parts())
        for i in range(8):
            if i == 5:
                for s in (state, plain):
                    s.truncate(torch.tensor([4]))
            if i == 7:
                for s in (state, plain):
                    s.select(torch.tensor([0, 0]))
            new = torch.full((len(plain.lengths), 1), 3 + i)
            torch.testing.assert_close(state.replayed(new, step._logits), m.step(new, plain))
            assert state.length == plain.length and torch.equal(state.lengths, plain.lengths)
    assert [places[2] for places in made] == [True, False]  # rows that are cut are no longer known to be equal
