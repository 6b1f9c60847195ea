"""Who is let into an engine together: prompts that are read at once, and what keeps them apart."""

from typing import Any

import pytest
import torch

from tileformer.decoder import DecoderLM, DecoderLMConfig, Engine, Seq2Seq, Seq2SeqConfig, generate
from tileformer.decoder.generation import engine as room

PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13], [4, 3]]


def model_of(kind: str) -> Any:
    torch.manual_seed(3)
    if kind == "lm":
        return DecoderLM(DecoderLMConfig(vocab=30, d_model=32, nhead=2, max_length=80)).eval()
    return Seq2Seq(Seq2SeqConfig(src_vocab=30, tgt_vocab=30, d_model=32, nhead=2, max_length=80)).eval()


def counted(model: Any, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows each call of ``start`` reads, from here on."""
    rows: list[int] = []
    start = model.start

    def note(tokens: torch.Tensor, **options: Any) -> Any:
        rows.append(len(tokens))
        return start(tokens, **options)

    monkeypatch.setattr(model, "start", note)
    return rows


def said(engine: Engine) -> dict[int, list[Any]]:
    lines: dict[int, list[Any]] = {}
    for event in engine.run():
        line = lines.setdefault(event.id, [])
        line += [x for x in (event.token, event.reason) if x is not None]
    return lines


@pytest.mark.parametrize("pages", [None, 40])
@pytest.mark.parametrize("kind", ["lm", "pair"])
def test_prompts_are_read_at_once(kind: str, pages: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(kind)
    alone = [generate(model, torch.tensor([prompt]), 6)[0].tolist() for prompt in PROMPTS]
    rows = counted(model, monkeypatch)
    engine = Engine(model, slots=4, pages=pages)
    for prompt in PROMPTS:
        engine.add(prompt, max_length=6)
    assert [line[:-1] for line in said(engine).values()] == alone
    assert rows == [4]
    monkeypatch.setattr(room, "PREFILL", 9)
    engine = Engine(model, slots=3, pages=pages)
    for prompt in PROMPTS:
        engine.add(prompt, max_length=6)
    assert [line[:-1] for line in said(engine).values()] == alone
    assert rows == [4, 2, 1, 1]  # 2 of 3 are 6 tokens, 3 of 5 would be 15; then a slot at a time


def test_one_that_fails_ends_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("lm")
    start = model.start

    def fails(tokens: torch.Tensor, **options: Any) -> Any:
        if (tokens == 8).any():
            raise RuntimeError("8 is not for me")
        return start(tokens, **options)

    alone = [generate(model, torch.tensor([prompt]), 6)[0].tolist() for prompt in PROMPTS]
    monkeypatch.setattr(model, "start", fails)
    engine = Engine(model, slots=4)
    for prompt in PROMPTS:
        engine.add(prompt, max_length=6)
    lines = said(engine)
    assert lines.pop(2) == ["error"]
    assert [line[:-1] for line in lines.values()] == [alone[i] for i in (0, 2, 3)]


def test_prompts_that_begin_alike_share_pages_though_they_come_together(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("lm")
    rows = counted(model, monkeypatch)
    engine = Engine(model, slots=3, pages=6)
    begin = list(range(3, 19))
    for tail in ([20], [21], [22, 23]):
        engine.add(begin + tail, max_length=3)
    engine.step()
    assert engine.pool is not None and rows == [1]
    assert len({pages[0] for pages in engine.state.pages}) == 1 and engine.pool.available == 2
    assert engine.preemptions == 0


def test_no_more_are_let_in_than_have_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("lm")
    rows = counted(model, monkeypatch)
    engine = Engine(model, slots=4, pages=3)
    for first in (3, 4, 5, 6):
        engine.add([first] * 15, max_length=2)  # a page each
    engine.step()
    assert rows == [3] and engine.preemptions == 0
    assert sorted(said(engine)) == [1, 2, 3, 4]
