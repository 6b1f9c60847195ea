"""Use a trained checkpoint: print what its model makes of each word.

Examples:
    tileformer generate --checkpoint runs/g2p hello tileformer
    tileformer generate --checkpoint runs/g2p < words.txt

Of standard input each line is an input; blank ones are skipped. One that cannot be read is named on standard error and
leaves an empty line in the output; the others are served, and the exit status is 1. It is 2 when none can be read.
"""

import argparse
import importlib
import sys
from collections.abc import Iterator

from tileformer import arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `tileformer generate`."""
    add = parser.add_argument
    add("words", nargs="*", help="inputs; read from standard input, one a line, when there are none")
    about = "a run folder, or one step-* in it"
    add("--checkpoint", type=arguments.input_path, required=True, metavar="PATH", help=about)
    add("--device", choices=("cpu", "cuda"), default="cpu", help="default cpu: a word takes milliseconds there")
    about = "of standard input (default utf-8, or what its byte-order mark says)"
    add("--encoding", type=arguments.encoding, default="utf-8", metavar="E", help=about)


def main(args: argparse.Namespace) -> int:
    """Print one line for each word; 1 if there are some that cannot be read. ValueError: the checkpoint, or all of them."""
    from tileformer.kernels.info import require_device
    from tileformer.training import checkpoint
    from tileformer.training.recipes import RECIPES

    device = require_device(args.device)
    path = checkpoint.latest(args.checkpoint)
    name = checkpoint.read_state(path).get("meta", {}).get("recipe")
    if name not in RECIPES:
        raise checkpoint.CheckpointError(f"{path}: expected a model of a recipe ({', '.join(RECIPES)}), found {name!r}")
    recipe = importlib.import_module(f"tileformer.training.recipes.{name}")
    inputs = [*_given(args.words)] if args.words else [*_typed(args.encoding)]
    if not inputs:
        raise ValueError("nothing to read: give inputs, or lines on standard input")
    answers = iter(recipe.lines(path, [word for _, word in inputs if isinstance(word, str)], device))
    told = [(where, next(answers) if isinstance(word, str) else word) for where, word in inputs]
    bad = [f"{where}{answer}" for where, answer in told if isinstance(answer, ValueError)]
    if len(bad) == len(told):
        raise ValueError(bad[0] + (f"; and {len(bad) - 1:,} more like it" if len(bad) > 1 else ""))
    for _, answer in told:
        print("" if isinstance(answer, ValueError) else answer)
    for line in bad:
        print(f"tileformer: error: {line}", file=sys.stderr)
    return int(bool(bad))


def _given(words: list[str]) -> Iterator[tuple[str, str | ValueError]]:
    for word in words:
        bad = any("\ud800" <= c <= "\udfff" for c in word)  # how Python keeps the bytes of an argument that are no text
        yield "", ValueError(f"{ascii(word)}: no text") if bad else word.replace("\ufeff", "").strip()


def _typed(encoding: str) -> Iterator[tuple[str, str | ValueError]]:
    """(where it stands, the line or why it is none) for each line of standard input that is not blank."""
    from tileformer.training.data import text

    name = "standard input"
    for number, line in enumerate(text.lines_of(sys.stdin.buffer.read(), name, encoding, skip_bad_lines=True), 1):
        if isinstance(line, ValueError):
            yield "", line
        elif word := line.replace("\ufeff", "").strip():
            yield f"{name}:{number}: ", word
