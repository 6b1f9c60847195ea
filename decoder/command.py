"""Use a trained model: print what it makes of each input.

Examples:
    tileformer generate --checkpoint runs/g2p hello tileformer
    tileformer generate --checkpoint runs/g2p --beams 5 --n-best 3 < words.txt
    tileformer generate --checkpoint smollm2 --chat "Name three colours."
    tileformer generate --checkpoint runs/poems --temperature 0.8 --min-p 0.05 --seed 7 --stream 4x7
    tileformer generate --checkpoint runs/g2p --input words.txt --json > spoken.jsonl

Of a file or standard input each line is an input; blank ones are skipped. One that cannot be read is named on standard
error and leaves an empty line in the output; the others are served, and the exit status is 1. It is 2 when none can be
read. With --json each line is an object: input, tokens, text, score (the sum of the tokens' log-probabilities over
their number), rank, and seconds, what the batch of it took; or input and error.
"""

import argparse
import contextlib
import functools
import itertools
import json
import math
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch

from tileformer import arguments
from tileformer.decoder import chat
from tileformer.decoder.generation import Options, generate, stream
from tileformer.decoder.heads import Classifier
from tileformer.decoder.pretrained import Writing, load, load_writing
from tileformer.decoder.tokenizer import Tokenizer
from tileformer.extras import optional_import
from tileformer.files import lines_of, quote
from tileformer.kernels.info import require_device

SAMPLING = ("temperature", "top_k", "top_p", "min_p", "seed")
WRITING = (*SAMPLING, "beams", "n_best", "max_length", "stream", "batch_size")  # of a model that is decoded
BATCH = 128
BATCHES_AT_ONCE = 16  # so many batches are sorted by length, decoded and then printed in order


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `tileformer generate`."""
    add = parser.add_argument
    add("words", nargs="*", help="inputs; read from standard input, one a line, when there are none and no --input")
    about = "the folder of a model, a run folder, or one step-* in it"
    add("--checkpoint", type=arguments.input_path, required=True, metavar="PATH", help=about)
    add("--device", choices=("cpu", "cuda"), default="cpu", help="default cpu: a word takes milliseconds there")
    add("--input", type=arguments.input_file, action="append", default=[], metavar="FILE", help="inputs, one a line")
    about = "of standard input and files (default utf-8, or what its byte-order mark says)"
    add("--encoding", type=arguments.encoding, default="utf-8", metavar="E", help=about)
    add("--beams", type=arguments.COUNT, metavar="K", help="search with K beams; 1 takes the most probable token")
    add("--temperature", type=arguments.number(1000), metavar="X", help="sample; above 1 more evenly")
    add("--top-k", type=arguments.COUNT, metavar="K", help="sample among the K most probable tokens")
    add("--top-p", type=arguments.number(1), metavar="P", help="sample among the fewest that together have P")
    add("--min-p", type=arguments.number(1), metavar="P", help="sample among those P times as probable as the best")
    add("--seed", type=arguments.SEED, metavar="N", help="of sampling: input i has seed N + i (default 0)")
    add("--max-length", type=arguments.COUNT, metavar="N", help="new tokens at most")
    add("--n-best", type=arguments.COUNT, metavar="N", help="the best N of the beams, or N samples, a line each")
    add("--batch-size", type=arguments.COUNT, metavar="N", help="inputs decoded together (default 128)")
    add("--stream", action="store_true", help="print each as it is written, one after the other")
    add("--chat", action="store_true", help="each input is what a user says: frame it by the model's template")
    add("--json", action="store_true", help="an object a line: tokens, text, score and timing")
    add("--timing", action="store_true", help="tokens per second on standard error, where it is no terminal too")


@dataclass(frozen=True)
class Decoding:
    """How a model that is decoded is let write.

    prompt(vocabulary, input): the ids that `decoder.generate` reads. text(vocabulary, input, ids): what the new ones
    say. line(input, text): what is printed. options, max_length (of new tokens): unless the user asks for others.
    """

    prompt: Callable[[Any, Any], list[int]]
    text: Callable[[Any, Any, list[int]], str]
    line: Callable[[Any, str], str]
    options: Options = field(default_factory=Options)
    max_length: int | None = None


class Opened(NamedTuple):
    """A model that can be used. parse(vocabulary, text) is an input or a ValueError; decoding says how its answer is
    written, or show(model, vocabulary, inputs) gives a line for each."""

    model: Any
    vocabulary: Any
    parse: Callable[[Any, str], Any]
    decoding: Decoding | None = None
    show: Callable[[Any, Any, Sequence[Any]], Iterable[str]] = lambda model, vocabulary, inputs: inputs


Opener = Callable[[argparse.Namespace, torch.device], Opened]


def open_folder(args: argparse.Namespace, device: torch.device) -> Opened:
    """The folder ``args.checkpoint`` of a model, as it is to be used. ValueError: damaged, or without a tokenizer."""
    model, tokenizer = load(args.checkpoint, device=device)
    if tokenizer is None:
        raise ValueError(f"{args.checkpoint}: a model without tokenizer.json reads no text")
    if isinstance(model, Classifier):
        if args.chat:
            raise ValueError("--chat: a classifier does not talk")
        return Opened(model, tokenizer, _row, None, _classes)
    return from_text(model, tokenizer, load_writing(args.checkpoint), args.chat)


def from_text(model: Any, tokenizer: Tokenizer, writing: Writing, talks: bool = False) -> Opened:
    """A model that reads and writes by its tokenizer; ``talks``: an input is framed by its chat template."""
    pattern = re.compile(writing.pattern) if writing.pattern else None
    frame = chat.framed(tokenizer) if talks else None

    def parse(_: Any, word: str) -> tuple[str, list[int]]:
        if pattern and not pattern.fullmatch(word):
            raise ValueError(f"{quote(word, 40)}: expected {writing.expected}")
        text = word if frame is None else frame([{"role": "user", "content": word}])
        ids = tokenizer.encode_all([text], special=frame is not None)[0]
        begin = [model.bos_id] * (writing.add_bos and not model.conditioned and frame is None)
        if not (ids or begin):
            raise ValueError(f"{quote(word, 40)}: nothing of it is a token")
        if len(begin + ids) > model.max_length:
            raise ValueError(f"{quote(word, 40)}: {len(ids):,} tokens; the model reads at most {model.max_length:,}")
        return word, begin + ids

    def line(one: tuple[str, list[int]], said: str) -> str:
        shown = writing.line if frame is None else "{text}"
        prompt = tokenizer.decode(one[1]) if "{prompt}" in shown else ""
        return shown.replace("{input}", one[0]).replace("{prompt}", prompt).replace("{text}", said)

    def text(_: Any, one: tuple[str, list[int]], ids: list[int]) -> str:
        return tokenizer.target.decode([number for number in ids if number != model.eos_id])

    decoding = Decoding(lambda _, one: one[1], text, line, writing.options, writing.max_new_tokens)
    return Opened(model, tokenizer, parse, decoding)


def _row(tokenizer: Any, word: str) -> tuple[str, list[int]]:
    return word, [tokenizer.bos_id, *tokenizer.encode(word)]


@torch.no_grad()
def _classes(model: Classifier, tokenizer: Tokenizer, inputs: Sequence[tuple[str, list[int]]]) -> Iterator[str]:
    """`class share  text` for each text."""
    names = model.classes or [str(i) for i in range(model.head.linear.out_features)]
    for word, row in inputs:
        tokens = torch.tensor([row[: model.backbone.config.max_length]], device=model.head.linear.weight.device)
        share, number = model(tokens).float().softmax(1)[0].max(0)
        yield f"{names[int(number)]} {float(share):.1%}  {word}"


@dataclass(frozen=True)
class Written:
    """One answer: new ids up to their end, what they say, and the line that shows it."""

    ids: list[int]
    text: str
    line: str
    score: float | None = None
    seconds: float = 0.0


def main(args: argparse.Namespace, opener: Opener = open_folder) -> int:
    """Print one line for each input; 1 if there are some that cannot be read. ValueError: the checkpoint, or all."""
    device = require_device(args.device)
    _check(args)
    model, vocabulary, parse, decoding, show = opener(args, device)
    options = _options(args, decoding)
    inputs = [*_from_arguments(args.words)]
    for file in args.input:
        inputs += _from_lines(file.read_bytes(), str(file), args.encoding)
    if not args.words and not args.input:
        inputs += _from_lines(sys.stdin.buffer.read(), "standard input", args.encoding)
    if not inputs:
        raise ValueError("nothing to read: give inputs, or lines on standard input")
    parsed: list[Any] = []  # what is made of each input, or the ValueError that says why it cannot be read
    for where, word in inputs:
        try:
            if isinstance(word, ValueError):
                raise word
            parsed.append(parse(vocabulary, word))
        except ValueError as error:
            parsed.append(ValueError(f"{where}{error}"))
    faults = [one for one in parsed if isinstance(one, ValueError)]
    if len(faults) == len(parsed):
        raise ValueError(f"{faults[0]}" + (f"; and {len(faults) - 1:,} more like it" if len(faults) > 1 else ""))
    good, tokens, start = [one for one in parsed if not isinstance(one, ValueError)], 0, time.perf_counter()
    answers: Iterator[list[Written]]
    if decoding is None:
        answers = ([Written([], line, line)] for line in show(model, vocabulary, good))
    else:
        answers = (_streamed if args.stream else _answers)(model, vocabulary, good, decoding, options, args)
    with _progress(len(good)) as advance:
        for (_, word), one in zip(inputs, parsed, strict=True):
            if isinstance(one, ValueError):
                said = {} if isinstance(word, ValueError) else {"input": word}
                print(_json(**said, error=str(one)) if args.json else "")
                continue
            for rank, written in enumerate(next(answers), 1):
                tokens += len(written.ids)
                if args.json:
                    print(_json(input=word, rank=rank, tokens=written.ids, text=written.text, **_measured(written)))
                elif not args.stream:
                    print(written.line)
            advance()
    for fault in faults:
        print(f"tileformer: error: {fault}", file=sys.stderr)
    if tokens and (args.timing or sys.stderr.isatty()):
        spent = time.perf_counter() - start
        speed = f"{tokens:,} tokens in {spent:.2f} s: {tokens / spent:,.0f} tokens per second"
        print(f"{len(good):,} inputs, {speed}", file=sys.stderr)
    return int(bool(faults))


def _check(args: argparse.Namespace) -> None:
    if args.stream and (args.json or args.n_best or args.batch_size or (args.beams or 1) > 1):
        raise ValueError("--stream prints one text as it comes: without --beams, --n-best, --batch-size and --json")


def _options(args: argparse.Namespace, decoding: Decoding | None) -> Options:
    """What the user asks for, and beside it the recipe's own. Raises ValueError for what makes no sense together."""
    if decoding is None:
        if asked := [f"--{name.replace('_', '-')}" for name in WRITING if getattr(args, name)]:
            raise ValueError(f"this model writes nothing token by token: it takes no {', '.join(asked)}")
        return Options()
    given = {name: getattr(args, name) for name in SAMPLING if getattr(args, name) is not None}
    options = replace(Options() if args.beams and not given else decoding.options, **given)
    if options.samples and options.seed is None:
        options = replace(options, seed=0)
    n = args.n_best or (1 if args.json else None)
    return replace(options, num_beams=args.beams or 1, num_return_sequences=n)


def _most(model: Any, row: list[int], decoding: Decoding, args: argparse.Namespace) -> int | None:
    """New tokens of a row; None: what the model has room for."""
    most, limit = args.max_length or decoding.max_length, model.max_length
    if args.max_length and args.max_length > limit:
        raise ValueError(f"--max-length {args.max_length}: the model reads and writes at most {limit} tokens")
    return None if most is None else min(most, limit if model.conditioned else limit - len(row) + 1)


def _of(options: Options, positions: Sequence[int]) -> Options:
    """The options of these inputs: each has a seed of its own, so that it is written alike in any batch."""
    seed: Any = options.seed
    return replace(options, seed=[seed + position for position in positions]) if options.samples else options


def _answers(
    model: Any, vocabulary: Any, inputs: list[Any], decoding: Decoding, options: Options, args: argparse.Namespace
) -> Iterator[list[Written]]:
    """What is written for each input, in order; similar lengths are decoded together."""
    size, device = args.batch_size or BATCH, next(model.parameters()).device
    for begin in range(0, len(inputs), size * BATCHES_AT_ONCE):
        rows = [decoding.prompt(vocabulary, one) for one in inputs[begin : begin + size * BATCHES_AT_ONCE]]
        most = [_most(model, row, decoding, args) for row in rows]
        written: dict[int, list[Written]] = {}
        by_length = sorted(range(len(rows)), key=lambda i: (most[i] or 0, len(rows[i])))
        for new, same in itertools.groupby(by_length, most.__getitem__):
            chosen = [*same]
            for first in range(0, len(chosen), size):
                batch = chosen[first : first + size]
                start, src = time.perf_counter(), _pad([rows[i] for i in batch], model.pad_id).to(device)
                found = generate(model, src, new, options=_of(options, [begin + i for i in batch]))
                found, scores = found if isinstance(found, tuple) else (found[:, None], None)
                spent = time.perf_counter() - start
                kept: Any = [[None] * found.shape[1]] * len(batch) if scores is None else scores.tolist()
                for i, several, rated in zip(batch, found.tolist(), kept, strict=True):
                    say = functools.partial(_written, vocabulary, inputs[begin + i], decoding, pad_id=model.pad_id)
                    written[i] = [say(ids, score=s, seconds=spent) for ids, s in zip(several, rated, strict=True)]
        yield from (written[i] for i in range(len(rows)))


def _streamed(
    model: Any, vocabulary: Any, inputs: list[Any], decoding: Decoding, options: Options, args: argparse.Namespace
) -> Iterator[list[Written]]:
    """As `_answers`, each input alone, printed as it is written."""
    for position, one in enumerate(inputs):
        row, shown, ids = decoding.prompt(vocabulary, one), "", []
        src = torch.tensor([row], device=next(model.parameters()).device)
        for token in stream(model, src, _most(model, row, decoding, args), options=_of(options, [position])):
            ids.append(int(token))
            written = _written(vocabulary, one, decoding, ids, model.pad_id)
            if written.line.startswith(shown):  # a letter may still lack some of its bytes
                print(written.line[len(shown) :], end="", flush=True)
                shown = written.line
        print()
        yield [written]


def _pad(rows: Sequence[list[int]], pad_id: int) -> torch.Tensor:
    width = max(map(len, rows))
    return torch.tensor([row + [pad_id] * (width - len(row)) for row in rows])


def _written(
    vocabulary: Any,
    one: Any,
    decoding: Decoding,
    ids: list[int],
    pad_id: int,
    score: float | None = None,
    seconds: float = 0.0,
) -> Written:
    ids = [index for index in ids if index != pad_id]
    said = decoding.text(vocabulary, one, ids)
    return Written(ids, said, decoding.line(one, said), score, seconds)


def _measured(written: Written) -> dict[str, Any]:
    if written.score is None:
        return {}
    return {"score": written.score if math.isfinite(written.score) else None, "seconds": round(written.seconds, 4)}


def _json(**fields: Any) -> str:
    return json.dumps(fields, ensure_ascii=False)


@contextlib.contextmanager
def _progress(total: int) -> Iterator[Callable[[], None]]:
    """A bar on standard error where that is a terminal and the answers go elsewhere, which show it else."""
    if not sys.stderr.isatty() or sys.stdout.isatty():
        yield lambda: None
        return
    progress = optional_import("rich.progress")
    console = optional_import("rich.console").Console(stderr=True)
    with progress.Progress(console=console, refresh_per_second=1) as bar:
        task = bar.add_task("generate", total=total)
        yield lambda: bar.update(task, advance=1)


def _from_arguments(words: list[str]) -> Iterator[tuple[str, str | ValueError]]:
    for word in words:
        bad = any("\ud800" <= c <= "\udfff" for c in word)  # how Python keeps the bytes of an argument that are no text
        yield "", ValueError(f"{ascii(word)}: no text") if bad else word.replace("\ufeff", "").strip()


def _from_lines(content: bytes, name: str, encoding: str) -> Iterator[tuple[str, str | ValueError]]:
    """(where it stands, the line or why it is none) for each line that is not blank."""
    for number, line in enumerate(lines_of(content, name, encoding, skip_bad_lines=True), 1):
        if isinstance(line, ValueError):
            yield "", line
        elif word := line.replace("\ufeff", "").strip():
            yield f"{name}:{number}: ", word
