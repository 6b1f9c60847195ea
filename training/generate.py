"""Use a trained checkpoint: print what its model makes of each word.

Examples:
    tileformer generate --checkpoint runs/g2p hello tileformer
    tileformer generate --checkpoint runs/g2p < words.txt
"""

import argparse
import importlib
import sys
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `tileformer generate`."""
    add = parser.add_argument
    add("words", nargs="*", help="inputs; read from standard input, one a line, when there are none")
    add("--checkpoint", type=Path, required=True, metavar="PATH", help="a run folder, or one step-* in it")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="default cpu: a word takes milliseconds there")


def main(args: argparse.Namespace) -> int:
    """Print one line for each word. ValueError when the checkpoint or a word cannot be read."""
    from tileformer.kernels.info import require_device
    from tileformer.training import checkpoint
    from tileformer.training.recipes import RECIPES

    device = require_device(args.device)
    path = checkpoint.latest(args.checkpoint)
    name = checkpoint.read_state(path).get("meta", {}).get("recipe")
    if name not in RECIPES:
        raise checkpoint.CheckpointError(f"{path}: expected a model of a recipe ({', '.join(RECIPES)}), found {name!r}")
    recipe = importlib.import_module(f"tileformer.training.recipes.{name}")
    words = args.words or [line.strip() for line in sys.stdin if line.strip()]
    if not words:
        raise ValueError("nothing to read: give inputs, or lines on standard input")
    for line in recipe.lines(path, words, device):
        print(line)
    return 0
