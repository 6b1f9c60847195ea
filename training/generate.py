"""Use a trained checkpoint: print what its model makes of each word.

Examples:
    tileformer generate --checkpoint runs/g2p hello tileformer
    tileformer generate --checkpoint runs/g2p < words.txt

Of standard input each line is an input; blank ones are skipped. One that cannot be read is named on standard error and
leaves an empty line in the output; the others are served, and the exit status is 1. It is 2 when none can be read.
"""

import argparse
import sys
from collections.abc import Iterator
from typing import Any

from tileformer import arguments
from tileformer.kernels.info import require_device
from tileformer.training import checkpoint
from tileformer.training.data import text
from tileformer.training.finetune import texts
from tileformer.training.recipes import RECIPES
from tileformer.training.recipes.recipe import load


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
    """Print one line for each word; 1 if there are some that cannot be read. ValueError: the checkpoint, or all."""
    device = require_device(args.device)
    path = checkpoint.latest(args.checkpoint)
    meta = checkpoint.read_state(path).get("meta", {})
    name = meta.get("recipe")
    if not isinstance(name, str) or name not in RECIPES:
        raise checkpoint.CheckpointError(f"{path}: expected a model of a recipe ({', '.join(RECIPES)}), found {name!r}")
    inputs = [*_from_arguments(args.words)] if args.words else [*_from_standard_input(args.encoding)]
    if not inputs:
        raise ValueError("nothing to read: give inputs, or lines on standard input")
    recipe: Any = RECIPES[name]
    if "method" in meta:
        (model, vocabulary), recipe = texts.load_classifier(path, device), texts
    else:
        model, vocabulary = load(recipe, path, device)
    readable: list[Any] = []
    faults: list[str] = []
    for where, word in inputs:
        try:
            if isinstance(word, ValueError):
                raise word
            readable.append(recipe.parse(vocabulary, word))
            faults.append("")
        except ValueError as error:
            faults.append(f"{where}{error}")
    bad = [*filter(None, faults)]
    if not readable:
        raise ValueError(bad[0] + (f"; and {len(bad) - 1:,} more like it" if len(bad) > 1 else ""))
    answers = iter(recipe.show(model, vocabulary, readable))
    for fault in faults:
        print("" if fault else next(answers))
    for fault in bad:
        print(f"tileformer: error: {fault}", file=sys.stderr)
    return int(bool(bad))


def _from_arguments(words: list[str]) -> Iterator[tuple[str, str | ValueError]]:
    for word in words:
        bad = any("\ud800" <= c <= "\udfff" for c in word)  # how Python keeps the bytes of an argument that are no text
        yield "", ValueError(f"{ascii(word)}: no text") if bad else word.replace("\ufeff", "").strip()


def _from_standard_input(encoding: str) -> Iterator[tuple[str, str | ValueError]]:
    """(where it stands, the line or why it is none) for each line of standard input that is not blank."""
    name = "standard input"
    for number, line in enumerate(text.lines_of(sys.stdin.buffer.read(), name, encoding, skip_bad_lines=True), 1):
        if isinstance(line, ValueError):
            yield "", line
        elif word := line.replace("\ufeff", "").strip():
            yield f"{name}:{number}: ", word
