"""Engine: a sequence decodes to the tokens that it has alone, whoever comes, goes, fails or is interrupted beside it."""

import contextlib
import random
import signal
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import torch

from tileformer.decoder import DecoderLM, DecoderLMConfig, Seq2Seq, Seq2SeqConfig, generate
from tileformer.decoder.generation.engine import Engine, Event
from tileformer.decoder.generation.options import Options
from tileformer.decoder.generation.paged import PagedCache
from tileformer.decoder.generation.static import StaticCache
from tileformer.training.average import Ensemble

V, LONGEST = 19, 96
BROKEN = 18  # a source token whose embedding is NaN
MODELS: dict[str, Any] = {}


def model(kind: str) -> Any:
    """A random model in float64, so that no two of its logits are near each other."""
    if kind not in MODELS:
        torch.manual_seed(2)
        if kind == "lm":
            made: Any = DecoderLM(DecoderLMConfig(V, 16, 2, 2, 32, max_length=LONGEST))
        else:
            made = Seq2Seq(Seq2SeqConfig(V, V, 16, 2, 1, 2, 32, max_length=LONGEST))
            made.src_embedding.weight.data[BROKEN] = torch.nan
        MODELS[kind] = made.double().eval()
    return MODELS[kind]


def drawn(seed: int, n: int) -> list[int]:
    return random.Random(seed).choices(range(3, BROKEN), k=n)


SHARED = drawn(99, 40)
PROMPTS = [drawn(i, n) for i, n in enumerate([3, 17, 40, 1, 33, 8, 16])] + [SHARED, [*SHARED[:34], 5], [*SHARED, 3, 4]]
OPTIONS = [Options() if i % 2 else Options(temperature=2.0, top_k=8, seed=i) for i in range(len(PROMPTS))]


def told(events: Iterable[Event]) -> dict[int, list[Any]]:
    """Each sequence's tokens, and behind them the reason of its end."""
    found: dict[int, list[Any]] = {}
    for event in events:
        line = found.setdefault(event.id, [])
        assert not line or not isinstance(line[-1], str), "nothing comes behind an end"
        line += [x for x in (event.token, event.reason) if x is not None]
    return found


def run(engine: Engine) -> list[Event]:
    """As `Engine.run()`, which has no end where a sequence is lost."""
    events: list[Event] = []
    for _ in range(1500):
        if not engine.sequences and not engine._events:
            return events
        events += engine.step()
    pytest.fail(f"{len(engine.sequences)} sequences have no end")


ALONE: dict[str, list[list[Any]]] = {}


def alone(kind: str) -> list[list[Any]]:
    """What `PROMPTS` give one by one in an engine of one slot."""
    if kind not in ALONE:
        ALONE[kind] = []
        for prompt, options in zip(PROMPTS, OPTIONS, strict=True):
            engine = Engine(model(kind), slots=1)
            engine.add(prompt, options, max_length=24)
            ALONE[kind].append(told(engine.run())[1])
    return ALONE[kind]


def add_all(engine: Engine) -> list[int]:
    return [engine.add(*line, max_length=24) for line in zip(PROMPTS, OPTIONS, strict=True)]


def check_empty(engine: Engine) -> None:
    """Nothing is left, and nothing is held."""
    assert not engine.sequences and engine.step() == [] and sorted(engine._free) == list(range(engine.slots))
    if engine.pool is not None:
        assert engine.pool.available == engine.pool.pages and not any(engine.pool.readers)
        assert (engine.state.table == engine.pool.pages).all() and not engine.state.live.any()


@contextlib.contextmanager
def hooked(m: Any) -> Iterator[None]:
    """A hook, which the packed step leaves to the modules."""
    hook = m.dropout.register_forward_hook(lambda *_: None)
    assert "hook" in m.explain()
    yield
    hook.remove()


kinds = pytest.mark.parametrize("kind", ["lm", "pair"])
HOW: dict[str, Any] = {"slots": dict(slots=3), "pages": dict(slots=4, pages=24), "few pages": dict(slots=5, pages=6)}
everywhere = pytest.mark.parametrize("how", list(HOW))


ways = pytest.mark.parametrize("how, by", [*((how, "step") for how in HOW), ("few pages", "modules")])


@kinds
@ways
def test_a_sequence_decodes_as_it_does_alone(kind: str, how: str, by: str) -> None:
    expected, m = alone(kind), model(kind)
    for i in (1, 3, 5):  # greedy
        tokens = [x for x in expected[i] if not isinstance(x, str)]
        assert generate(m, torch.tensor([PROMPTS[i]]), 24)[0].tolist() == tokens
    assert {line[-1] for line in expected} == {"eos", "length"}
    with hooked(m) if by == "modules" else contextlib.nullcontext():
        engine = Engine(m, **HOW[how])
        ids = add_all(engine)
        assert told(run(engine)) == dict(zip(ids, expected, strict=True))
    assert (engine.preemptions > 0) == (how == "few pages")
    assert kind == "lm" or engine.pool is None or not engine.pool._known  # they depend on the source too
    check_empty(engine)


@everywhere
def test_sequences_come_and_go_between_steps(how: str) -> None:
    expected, engine = alone("lm"), Engine(model("lm"), **HOW[how])
    events: list[Event] = []
    waiting = list(zip(PROMPTS, OPTIONS, strict=True))
    gone = {}
    for step in range(200):
        if step % 3 == 0 and waiting:
            number = engine.add(*waiting.pop(0), max_length=24)
            if number in (3, 7):
                gone[number] = step + 4
        for number, when in gone.items():
            if step == when:
                assert engine.cancel(number)
        events += engine.step()
    assert not waiting
    found = told(events)
    for number, line in enumerate(expected, 1):
        if number in gone:
            assert found[number][-1] == "cancelled"
            assert found[number][:-1] == line[: len(found[number]) - 1] and len(found[number]) < len(line)
        else:
            assert found[number] == line
    assert not engine.cancel(3) and not engine.cancel(12345)
    check_empty(engine)


def test_first_come_first_served() -> None:
    engine = Engine(model("lm"), slots=4, pages=6)
    ids = [engine.add(drawn(i, n), max_length=10) for i, n in enumerate([40, 60, 3, 3])]
    first: list[int] = []
    for event in run(engine):
        first += [event.id] * (event.id not in first)
    assert first == ids


def test_who_is_let_in_leaves_pages_for_those_that_run() -> None:
    engine = Engine(model("lm"), slots=2, pages=2)
    for n in (16, 3):  # the first takes the second page with its next token
        engine.add(drawn(n, n), Options(adjust=endless), max_length=8)
    assert [event.id for event in run(engine) if event.reason] == [1, 2] and engine.preemptions == 0


def endless(tokens: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    return scores.index_fill(1, torch.tensor([2]), -torch.inf)


def test_the_youngest_waits_again_when_pages_run_out() -> None:
    def options(i: int) -> Options:
        return Options(temperature=2.0, seed=i, adjust=endless)

    engine = Engine(model("lm"), slots=3, pages=6)
    ids = [engine.add(drawn(i, 10), options(i), max_length=70) for i in range(3)]
    events = [event for _ in range(24) for event in engine.step()]
    assert engine.preemptions == 1
    assert [engine.sequences[number].slot is not None for number in ids] == [True, True, False]
    events += run(engine)
    assert [event.id for event in events if event.reason] == ids
    for i, number in enumerate(ids):
        other = Engine(model("lm"), slots=1)
        other.add(drawn(i, 10), options(i), max_length=70)
        assert told(events)[number] == told(run(other))[1]
    check_empty(engine)


class Counting(DecoderLM):
    """Counts the tokens that it is asked to read in prompts."""

    read_tokens = 0

    def start(self, tokens: torch.Tensor, **options: Any) -> Any:
        self.read_tokens += tokens.numel()
        return super().start(tokens, **options)

    def step(self, tokens: torch.Tensor, state: Any) -> torch.Tensor:
        if tokens.dim() == 2:
            self.read_tokens += tokens.numel()
        return super().step(tokens, state)


def test_prompts_that_begin_alike_share_pages() -> None:
    torch.manual_seed(2)
    m = Counting(DecoderLMConfig(V, 16, 2, 2, 32, max_length=LONGEST)).double().eval()
    engine = Engine(m, slots=3, pages=12)
    ids = [engine.add(prompt, max_length=9) for prompt in (SHARED, [*SHARED[:34], 5], [*SHARED, 3, 4])]
    events = engine.step()
    assert m.read_tokens == 40 + 3 + 10  # two pages of the first are the others' too
    assert engine.pool is not None and engine.pool.available == 12 - 5
    assert [len(set(rows)) for rows in zip(*engine.state.pages, strict=False)] == [1, 1, 3]
    events += run(engine)
    for number, prompt in zip(ids, (SHARED, [*SHARED[:34], 5], [*SHARED, 3, 4]), strict=True):
        other = Engine(model("lm"), slots=1)
        other.add(prompt, max_length=9)
        assert told(events)[number] == told(run(other))[1]
    check_empty(engine)
    assert len(engine.pool.find([*SHARED, *told(events)[1][:-1]])) == 3  # 48 tokens were read
    engine.add(SHARED[:32], max_length=3)  # a whole number of pages, all of them known
    assert not [event for event in run(engine) if event.error]
    m.read_tokens = 0
    engine.add([*SHARED, 3, 4, 7])  # whoever read it has gone
    engine.step()
    assert m.read_tokens == 43 - 32
    engine = Engine(m, slots=1, pages=12)
    engine.add(SHARED, Options(adjust=late))
    run(engine)
    assert engine.pool is not None and engine.pool.find(SHARED) == []  # what one that failed has read is not trusted


VARIOUS: list[dict[str, Any]] = [
    dict(temperature=1.5, top_p=0.9, seed=3),
    dict(repetition_penalty=1.3, no_repeat_ngram_size=2),
    dict(forced_prefix_ids=[7, 8], temperature=2.0, seed=4),
    dict(stop_strings="1", decode=lambda ids: " ".join(map(str, ids)), temperature=2.0, seed=5),
    dict(forced_eos_token_id=2, bad_words_ids=[[2]], presence_penalty=0.5),
    dict(min_new_tokens=6, temperature=2.0, seed=1),
    dict(adjust=lambda tokens, scores: scores.masked_fill(torch.arange(V) % 2 == tokens[:, -1:] % 2, -torch.inf)),
    dict(forced_tokens=[(0, 5), (2, 9)], temperature=1.0, min_p=0.1, seed=6),
    dict(bad_words_ids=[[i] for i in range(V) if i != 0 and i > 4], min_new_tokens=24, bitmask=lambda new: mask(new)),
]


def mask(new: torch.Tensor) -> torch.Tensor:
    return torch.full((len(new), 1), 0b11000 if new.shape[1] < 2 else 0, dtype=torch.int32)


@pytest.mark.parametrize("kind, how", [("lm", "slots"), ("lm", "few pages"), ("pair", "pages")])
def test_options_are_those_of_generate(kind: str, how: str) -> None:
    m, engine = model(kind), Engine(model(kind), **HOW[how])
    ids = [engine.add(prompt, Options(**o), max_length=24) for prompt, o in zip(PROMPTS, VARIOUS, strict=False)]
    events: list[Event] = []
    for _ in range(300):
        events += engine.step()
        if len(events) % 7 == 0:
            engine._start_over()
    found = told(events)
    for number, prompt, o in zip(ids, PROMPTS, VARIOUS, strict=False):
        expected = generate(m, torch.tensor([prompt]), 24, options=Options(**o))[0].tolist()
        assert found[number][:-1] == [x for x in expected if x], o
        if "stop_strings" in o or "bitmask" in o:
            assert found[number][-1] == "stop"
    engine = Engine(m, slots=1, capacity=20)  # the last token is known to be the last
    engine.add([3, 4, 5], Options(forced_eos_token_id=2, bad_words_ids=[[2]]))
    assert [(event.token, event.reason) for event in run(engine)][-1] == (2, "eos")
    with pytest.raises(ValueError, match="pass no beams, n_best or generator"):
        engine.add([3], Options(num_beams=2))
    torch.manual_seed(0)
    for _ in range(2):
        engine.add([3, 4], Options(temperature=2.0), max_length=9)
    first, second = told(run(engine)).values()
    assert first != second


class Bigrams:
    """A model of a user's own; it needs no state, and is its own."""

    eos_id, pad_id = 2, 0

    def __init__(self) -> None:
        self.table = torch.randn(V, V, generator=torch.Generator().manual_seed(0))
        self.select = self.insert = self.release = lambda *_: None

    def start(self, tokens: torch.Tensor, *, capacity: int, source: Any = None, beams: int = 1) -> Any:
        return self.table[tokens[:, -1]], self

    def step(self, tokens: torch.Tensor, state: Any) -> torch.Tensor:
        return self.table[tokens]


def test_a_model_of_ones_own_is_served() -> None:
    m = Bigrams()
    with pytest.raises(ValueError, match="Bigrams names no max_length.*pass capacity"):
        Engine(m, slots=2)
    with pytest.raises(TypeError, match="Bigrams keeps its own state.*leave pages out"):
        Engine(m, slots=2, capacity=50, pages=4)
    engine = Engine(m, slots=2, capacity=50)
    ids = [engine.add(prompt, max_length=7) for prompt in ([5], [7, 4], [9])]
    found = told(run(engine))
    for number, last in zip(ids, (5, 4, 9), strict=True):
        tokens = generate(m, torch.tensor([[last]]), 7)[0].tolist()
        assert [x for x in found[number] if not isinstance(x, str)] == tokens
    engine.add([5])  # as long as there is room
    assert len(told(run(engine))[4]) - 1 <= 50


# ---- faults


def test_what_cannot_be_served_is_refused_at_once() -> None:
    m = model("lm")
    for wrong, match in (
        (dict(slots=0), "slots must be at least 1, got 0"),
        (dict(slots=1, capacity=97), "capacity must be between 1 and the 96 tokens that the model reads, got 97"),
        (dict(slots=1, pages=0), "at least 1 page"),
        (dict(slots=1, pages=4, page_size=24), "16, 32, 64, .*got 4 pages of 24 tokens"),
    ):
        with pytest.raises(ValueError, match=match):
            Engine(m, **wrong)
    engine = Engine(m, slots=2, pages=3)
    with pytest.raises(ValueError, match="a prompt of 97 tokens leaves no room: the model reads 96"):
        engine.add([3] * 97)
    with pytest.raises(
        ValueError, match="40 tokens and up to 10 new ones do not fit the engine's capacity of 48.*pages"
    ):
        engine.add([3] * 40, max_length=10)
    with pytest.raises(ValueError, match="49 tokens and .*capacity of 48"):
        engine.add([3] * 49)
    with pytest.raises(ValueError, match="max_length must be at least 1, got 0"):
        engine.add([3], max_length=0)
    with pytest.raises(ValueError, match="all padding"):
        engine.add([])
    assert not engine.sequences
    engine.add([3] * 40, Options(adjust=endless), max_length=9)
    engine.add([3] * 48, Options(adjust=endless))
    assert [event.reason for event in run(engine) if event.reason] == ["length"] * 2
    check_empty(engine)
    m.train()
    with pytest.raises(ValueError, match=r"model.eval\(\)"):
        engine.add([3])
    m.eval()


@ways
def test_a_row_whose_logits_are_not_finite_ends_alone(how: str, by: str) -> None:
    """Neither those beside it nor those who follow into its slot and its pages meet its NaN."""
    expected, m = alone("pair"), model("pair")
    engine = Engine(m, **HOW[how])
    bad = []
    ids = []
    for i, line in enumerate(zip(PROMPTS, OPTIONS, strict=True)):
        if i % 2:
            bad.append(engine.add([4, BROKEN, 3], max_length=24))
        ids.append(engine.add(*line, max_length=24))
    with hooked(m) if by == "modules" else contextlib.nullcontext():
        events = list(run(engine))
    found = told(events)
    assert {number: found.pop(number) for number in bad} == {number: ["error"] for number in bad}
    assert found == dict(zip(ids, expected, strict=True))
    errors = [event.error for event in events if event.id in bad]
    assert all(isinstance(error, FloatingPointError) and "not finite" in str(error) for error in errors)
    check_empty(engine)


def late(tokens: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """A function of a user's that fails at its third token."""
    if tokens.shape[1] > 5:
        raise KeyError("nothing of the kind")
    return scores


def empty(tokens: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    return scores * torch.nan if tokens.shape[1] > 5 else scores


@everywhere
def test_what_fails_for_one_sequence_ends_that_one(how: str) -> None:
    expected, engine = alone("lm"), Engine(model("lm"), **HOW[how])
    ids = add_all(engine)
    refused = engine.add([3, V + 5])
    failing = engine.add([3, 4, 5], Options(adjust=late))
    undecided = engine.add([3, 4, 5], Options(adjust=empty))
    events = list(run(engine))
    found, errors = told(events), {event.id: event.error for event in events if event.error is not None}
    assert found.pop(refused) == ["error"] and "outside" in str(errors.pop(refused))
    assert len(found.pop(failing)) == 4 and isinstance(errors.pop(failing), KeyError)
    assert len(found.pop(undecided)) == 4 and isinstance(errors.pop(undecided), FloatingPointError)
    assert found == dict(zip(ids, expected, strict=True)) and not errors
    check_empty(engine)


def test_scores_are_adjusted_by_the_tokens_so_far() -> None:
    engine = Engine(model("lm"), slots=2)
    seen: list[list[int]] = []

    def count_up(tokens: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        seen.append(tokens[0].tolist())
        return torch.full_like(scores, -torch.inf).index_fill(1, tokens[0, -1:] + 1, 0.0)

    engine.add([4, 7], Options(adjust=count_up), max_length=3)
    engine.add(PROMPTS[1], OPTIONS[1], max_length=24)
    found = told(run(engine))
    assert found == {1: [8, 9, 10, "length"], 2: alone("lm")[1]}
    assert seen == [[4, 7], [4, 7, 8], [4, 7, 8, 9]]


def test_a_function_may_cancel() -> None:
    engine = Engine(model("lm"), slots=2, pages=12)

    def stop(tokens: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if tokens.shape[1] == 5:
            assert engine.cancel(mine) and engine.cancel(other)
        return scores.index_fill(1, torch.tensor([2]), -torch.inf)

    mine, other = engine.add([4, 7, 5], Options(adjust=stop)), engine.add([3, 4, 5], Options(adjust=stop))
    found = told(run(engine))
    assert [len(found[mine]), found[mine][-1], len(found[other]), found[other][-1]] == [4, "cancelled"] * 2
    check_empty(engine)


def raise_once(after: int, what: str) -> Callable[[], None]:
    calls = iter(range(10**6))

    def tick() -> None:
        if next(calls) == after:
            if what == "Ctrl-C":
                signal.raise_signal(signal.SIGINT)
            raise RuntimeError("out of memory")

    return tick


@pytest.mark.parametrize(
    "kind, after, what, how",
    [
        ("lm", 8, "Ctrl-C", "pages"),
        ("pair", 17, "error", "slots"),
        ("lm", 33, "error", "few pages"),
        ("pair", 50, "Ctrl-C", "few pages"),
        ("lm", 61, "Ctrl-C", "slots"),
    ],
)
def test_what_stops_a_step_loses_nothing(kind: str, after: int, what: str, how: str, monkeypatch: Any) -> None:
    """Ctrl-C, or an error, in the middle of the model's layers: the next step goes on with the same tokens."""
    expected, m = alone(kind), model(kind)
    engine = Engine(m, **HOW[how])
    ids = add_all(engine)
    tick = raise_once(after, what)
    for cache in (StaticCache, PagedCache):

        def attend(self: Any, *args: Any, real: Any = cache.attend) -> torch.Tensor:
            if engine._running():  # what fails while a prompt is read is the prompt's
                tick()
            return real(self, *args)

        monkeypatch.setattr(cache, "attend", attend)
    events, raised = [], 0
    for _ in range(400):
        try:
            events += engine.step()
        except (KeyboardInterrupt, RuntimeError):
            raised += 1
            assert all(sequence.slot is None for sequence in engine.sequences.values())
    found = told(events)
    errors = [event for event in events if event.error is not None]
    assert raised + len(errors) == 1
    for number, line in zip(ids, expected, strict=True):
        assert found[number] == line or [event.id for event in errors] == [number]
    check_empty(engine)


def test_ctrl_c_in_a_users_function_loses_nothing() -> None:
    expected, engine = alone("lm"), Engine(model("lm"), slots=4, pages=24)
    tick = raise_once(3, "Ctrl-C")

    def adjust(tokens: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        tick()
        return scores

    ids = [
        engine.add(prompt, Options(**(vars(options) | {"adjust": adjust})), max_length=24)
        for prompt, options in zip(PROMPTS, OPTIONS, strict=True)
    ]
    events: list[Event] = []
    with pytest.raises(KeyboardInterrupt):
        events += run(engine)
    events += run(engine)
    assert told(events) == dict(zip(ids, expected, strict=True))
    check_empty(engine)


def test_an_ensemble_is_served() -> None:
    m = Ensemble([model("lm"), model("lm")])
    engine = Engine(m, slots=3)
    ids = [engine.add(prompt, options, max_length=24) for prompt, options in zip(PROMPTS[:5], OPTIONS, strict=False)]
    assert told(run(engine)) == dict(zip(ids, alone("lm")[:5], strict=True))
