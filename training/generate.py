"""Use a trained model: print what it makes of each input.

Examples:
    tileformer generate --checkpoint runs/g2p hello tileformer
    tileformer generate --checkpoint runs/g2p --beams 5 --n-best 3 < words.txt
    tileformer generate --checkpoint runs/poems --temperature 0.8 --min-p 0.05 --seed 7 --stream 4x7
    tileformer generate --checkpoint runs/g2p --input words.txt --json > spoken.jsonl
    tileformer generate --checkpoint smollm2 --chat "Name three colours."

Of a file or standard input each line is an input; blank ones are skipped. One that cannot be read is named on standard
error and leaves an empty line in the output; the others are served, and the exit status is 1. It is 2 when none can be
read. With --json each line is an object: input, tokens, text, score (the sum of the tokens' log-probabilities over
their number), rank, and seconds, what the batch of it took; or input and error.
"""

import argparse
from typing import Any

import torch

from tileformer.decoder import command
from tileformer.decoder.command import add_arguments
from tileformer.decoder.pretrained import is_folder
from tileformer.training import checkpoint
from tileformer.training.finetune import texts
from tileformer.training.recipes import RECIPES
from tileformer.training.recipes.recipe import load

__all__ = ["add_arguments", "main"]


def main(args: argparse.Namespace) -> int:
    """Print one line for each input; 1 if there are some that cannot be read. ValueError: the checkpoint, or all."""
    path = args.checkpoint
    ready = is_folder(path) and not (checkpoint.steps_in(path) or (path / checkpoint.STATE).exists())
    return command.main(args, command.open_folder if ready else open_run)


def open_run(args: argparse.Namespace, device: torch.device) -> command.Opened:
    """A run, by its recipe: it knows more of a text than its tokenizer does."""
    path = checkpoint.latest(args.checkpoint)
    meta = checkpoint.read_state(path).get("meta", {})
    name = meta.get("recipe")
    if not isinstance(name, str) or name not in RECIPES:
        raise checkpoint.CheckpointError(f"{path}: expected a model of a recipe ({', '.join(RECIPES)}), found {name!r}")
    recipe: Any = RECIPES[name]
    if args.chat:
        raise ValueError(f"--chat: a model of {name} has no chat template")
    if "method" in meta:
        return command.Opened(*texts.load_classifier(path, device), texts.parse, None, texts.show)
    model, vocabulary = load(recipe, path, device)
    if recipe.writing is not None:
        return command.from_text(model, vocabulary, recipe.writing)
    return command.Opened(model, vocabulary, recipe.parse, recipe.decoding, recipe.show)
