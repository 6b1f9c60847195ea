"""Send thousands of sequences through an Engine: random lengths, options, cancellations, errors and interruptions.

    python tests/soak_engine.py [--sequences 10000] [--seed 0]

Prints what the process holds at every checkpoint. Exit 1: a sequence was lost or told twice, a page or a slot is still
held at the end, a sequence's tokens are not those that it has alone (one in CHECKED is compared), or resident memory
grows by more than MARGIN over the last two thirds.
"""

import argparse
import importlib.util
import pathlib
import random
import sys
import time
from collections import Counter
from typing import Any

import numpy
import torch
from torch import Tensor

from tileformer.decoder import DecoderLM, DecoderLMConfig
from tileformer.decoder.generation.engine import Engine, Event
from tileformer.decoder.generation.options import Options

VOCABULARY, LONGEST, CHECKED, POINTS = 40, 128, 50, 20
MARGIN = 4.0  # MiB
SLOTS, PAGES = 24, 40  # pages for about a third of the slots' longest sequences
KINDS = ["eos", "length", "stop", "cancelled", "error"]


def soak_module() -> Any:
    """The other soak, for what a process holds."""
    spec = importlib.util.spec_from_file_location("soak", pathlib.Path(__file__).with_name("soak.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Traffic:
    """The sequences, what was told of them, and what is wrong with that."""

    def __init__(self, sequences: int, seed: int = 0) -> None:
        torch.manual_seed(seed)
        config = DecoderLMConfig(VOCABULARY, 16, 2, 2, 32, max_length=LONGEST)
        self.model = DecoderLM(config).double().eval()
        self.engine = Engine(self.model, slots=SLOTS, pages=PAGES)
        self.left, self.dice = sequences, random.Random(seed)
        self.begins = [self.dice.choices(range(3, VOCABULARY), k=40) for _ in range(5)]
        self.open: dict[int, tuple[list[int], Options, int, list[int]]] = {}
        self.ends: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.compared = self.interrupted = 0
        self.interrupt_in = 500

    def adjust(self, tokens: Tensor, scores: Tensor) -> Tensor:
        """A user's function, which fails now and then, or is interrupted."""
        self.interrupt_in -= 1
        if self.interrupt_in == 0:
            self.interrupt_in = 500
            raise KeyboardInterrupt
        return scores

    def failing(self, tokens: Tensor, scores: Tensor) -> Tensor:
        if tokens.shape[1] % 7 == 0:
            raise LookupError("not found")
        return scores * torch.nan if tokens.shape[1] % 5 == 0 else scores

    def add(self) -> None:
        dice = self.dice
        prompt = dice.choices(range(3, VOCABULARY), k=dice.choice([1, 3, 8, 15, 16, 17, 30]))
        if dice.random() < 0.3:
            prompt = [*dice.choice(self.begins)[: dice.choice([16, 32, 40])], *prompt[:8]]
        draws: dict[str, Any] = {}
        if dice.random() < 0.3:
            draws = dict(temperature=1.5, top_k=dice.choice([None, 5]), seed=dice.randrange(1000))
        kind = dice.random()
        if kind < 0.02:
            draws["adjust"] = self.failing
        elif kind < 0.1:
            draws["adjust"] = self.adjust
        elif kind < 0.11:
            prompt[-1] = VOCABULARY + 3  # no such token
        elif kind < 0.15:
            draws |= dict(stop_strings="1", decode=lambda ids: " ".join(map(str, ids)))
        options, length = Options(**draws), dice.choice([1, 2, 5, 10, 20, 60])
        number = self.engine.add(prompt, options, max_length=length)
        self.open[number] = (prompt, options, length, [])
        self.left -= 1
        if dice.random() < 0.05:
            self.engine.cancel(dice.choice(list(self.open)))

    def note(self, event: Event) -> None:
        if event.id not in self.open:
            self.wrong.append(f"{event} of a sequence that has ended, or never was")
            return
        prompt, options, length, tokens = self.open[event.id]
        tokens += [] if event.token is None else [event.token]
        if event.reason is None:
            return
        del self.open[event.id]
        self.ends[event.reason] += 1
        if event.id % CHECKED == 0 and event.reason != "error":
            self.interrupt_in += length
            alone = Engine(self.model, slots=1)
            alone.add(prompt, options, max_length=length)
            expected = [x.token for x in alone.run() if x.token is not None]
            self.compared += 1
            if tokens != (expected[: len(tokens)] if event.reason == "cancelled" else expected):
                self.wrong.append(f"sequence {event.id} has {tokens}, alone {expected}")

    def run(self) -> bool:
        """One more round; False when all is over."""
        while self.left and len(self.open) < 3 * SLOTS and (self.dice.random() < 0.9 or not self.open):
            self.add()
        try:
            for event in self.engine.step():
                self.note(event)
        except KeyboardInterrupt:
            self.interrupted += 1
        return bool(self.open) or self.left > 0

    def verdict(self) -> list[str]:
        """What is wrong at the end."""
        pool, engine = self.engine.pool, self.engine
        assert pool is not None
        wrong = list(self.wrong)
        if self.open or engine.sequences:
            wrong.append(f"{len(self.open)} sequences were lost")
        if pool.available != PAGES or any(pool.readers):
            wrong.append(f"{PAGES - pool.available} pages are still held")
        if sorted(engine._free) != list(range(SLOTS)) or any(engine.state.is_live):
            wrong.append("a slot is still held")
        return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sequences", type=int, default=10000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    traffic, held, begun = Traffic(args.sequences, args.seed), soak_module().held, time.process_time()
    points: list[dict[str, Any]] = []
    print("    ended  resident MiB  malloc MiB  Python blocks", flush=True)
    while traffic.run():
        ended = sum(traffic.ends.values())
        if ended >= len(points) * args.sequences / POINTS:
            points.append(dict(ended=ended) | held())
            print("{ended:9}{resident:14.1f}{malloc:12.1f}{blocks:15,}".format(**points[-1]), flush=True)
    seconds, wrong = time.process_time() - begun, traffic.verdict()
    late = points[len(points) // 3 :]
    line = numpy.polyfit([p["ended"] for p in late], [p["resident"] for p in late], 1)
    growth = line[0] * (late[-1]["ended"] - late[0]["ended"])
    if growth > MARGIN:
        wrong.append(f"memory grows by {growth:.1f} MiB")
    ends = ", ".join(f"{traffic.ends[kind]} {kind}" for kind in KINDS)
    told = f"{traffic.engine.preemptions} preemptions, {traffic.interrupted} interruptions, {traffic.compared} compared"
    print(f"{sum(traffic.ends.values())} sequences in {seconds:.0f} CPU seconds: {ends}; {told}")
    print(f"resident memory {growth:+.2f} MiB over the last two thirds, {MARGIN} are let pass")
    print("\n".join(wrong[:20]) or "nothing was lost, no page is held")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
