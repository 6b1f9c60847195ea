"""Train a recipe from scratch, with checkpoints and an exact resume.

Examples:
    tileformer train --list
    tileformer train g2p                        quick start on one core
    tileformer train g2p --full --device cuda
    tileformer train g2p --resume               continue the run in runs/g2p after a stop
    tileformer train g2p --help                 options of every recipe, and those of g2p
"""

import argparse
from typing import Any

from tileformer.training import checkpoint, process
from tileformer.training.recipes import RECIPES, recipe, run


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `tileformer train`: a parser for each recipe, since each has some of its own."""
    parser.add_argument("--list", action="store_true", help="list the recipes and stop")
    recipes = parser.add_subparsers(dest="recipe", metavar="RECIPE", help="what to train; its options: RECIPE --help")
    for value in RECIPES.values():
        texts: Any = {"help": value.about.splitlines()[0].partition(": ")[2], "description": value.about}
        one = recipes.add_parser(value.name, formatter_class=argparse.RawDescriptionHelpFormatter, **texts)
        recipe.add_arguments(one, value)


def main(args: argparse.Namespace) -> int:
    """Run `args.recipe`: 0 finished, 130 interrupted (by SIGTERM: SystemExit of 143).

    ValueError: wrong arguments or input; FloatingPointError: diverged.
    """
    if args.list:
        for value in RECIPES.values():
            print(value.about.splitlines()[0])
        return 0
    if args.recipe is None:
        raise ValueError(f"no recipe given; there is: {', '.join(RECIPES)}")
    again = process.command("train", add_arguments, args)
    try:
        with process.interruptible(again, lambda: bool(checkpoint.steps_in(args.output))):
            run(RECIPES[args.recipe], args)
    except KeyboardInterrupt:
        return 130
    return 0
