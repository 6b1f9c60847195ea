"""Engine: what a Ctrl-C leaves half done in a sequence's own functions is done once, not twice."""

import signal

import torch

from tileformer.decoder import DecoderLM, DecoderLMConfig, generate
from tileformer.decoder.generation.engine import Engine
from tileformer.decoder.generation.options import Options


def test_a_token_whose_text_was_interrupted_is_told_once() -> None:
    """`decode` is called with a token that is chosen and not yet the sequence's: it is chosen, and told, anew."""
    torch.manual_seed(2)
    model = DecoderLM(DecoderLMConfig(19, 16, 2, 2, 32, max_length=96)).double().eval()
    texts: list[list[int]] = []

    def decode(ids: list[int]) -> str:
        texts.append(ids)
        if len(texts) == 5:
            signal.raise_signal(signal.SIGINT)
        return ""

    said = {"temperature": 2.0, "top_k": 8, "seed": 1, "bad_words_ids": [[2]]}
    told: dict[int, list[int | None]] = {1: [], 2: []}
    engine = Engine(model, slots=2)
    engine.add([6, 7], max_length=9)  # it has chosen already when the other one is interrupted
    engine.add([3, 4, 5], Options(**said, stop_strings="never", decode=decode), max_length=9)
    stopped = 0
    while engine.sequences:
        try:
            for event in engine.step():
                told[event.id].append(event.token)
        except KeyboardInterrupt:
            stopped += 1
    assert stopped == 1
    assert told[1] == generate(model, torch.tensor([[6, 7]]), 9)[0].tolist()
    assert told[2] == generate(model, torch.tensor([[3, 4, 5]]), 9, options=Options(**said))[0].tolist()
    assert [len(ids) for ids in texts] == [1, 2, 3, 4, 5, 5, 6, 7, 8, 9] and texts[-1] == told[2]
