"""The `tileformer` command: find the verb, import its room, hand over the arguments."""

import argparse
import ast
import importlib
import os
import sys

import tileformer

VERBS = {
    "info": "tileformer.kernels.info",
    "check": "tileformer.bench.check",
    "bench": "tileformer.bench.run",
    "train": "tileformer.training.train",
    "finetune": "tileformer.training.finetune",
    "generate": "tileformer.training.generate",
}
ABOUT = """Fused Triton kernels for Transformers: look at this machine, check the kernels on it, train and use a model.

  tileformer check --quick                           compare the kernels with their definitions, on this machine
  tileformer train g2p                               learn English pronunciation, a few minutes on a CPU
  tileformer generate --checkpoint PATH hello world  pronounce two words with what was learned
  tileformer finetune --list                         ways to make a classifier of a pretrained model

Exit status: 0 done, 1 a check failed or a training diverged, 2 wrong usage or input, 130 interrupted."""


def _docstring(name: str) -> str:  # read, not imported: `tileformer --help` must not wait for torch
    files = (os.path.join(folder, *name.split(".")[1:]) + ".py" for folder in tileformer.__path__)
    with open(next(filter(os.path.isfile, files)), encoding="utf-8") as source:
        return (ast.get_docstring(ast.parse(source.read())) or name).replace("%", "%%")


def main(argv: list[str] | None = None) -> int:
    """Run one verb and return the exit status. Errors a user can expect are one line (`python -X dev`: all of it)."""
    argv = sys.argv[1:] if argv is None else argv
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("tileformer", description=ABOUT, formatter_class=style)
    parser.add_argument("--version", action="version", version=f"tileformer {tileformer.__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    try:
        for verb, name in VERBS.items():
            text = _docstring(name)
            verb_parser = verbs.add_parser(verb, help=text.splitlines()[0], description=text, formatter_class=style)
            if argv[:1] == [verb]:
                importlib.import_module(name).add_arguments(verb_parser)
        args = parser.parse_args(argv)
        return importlib.import_module(VERBS[args.verb]).main(args)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader left early, as `| head` does: nobody is there for what is left to flush
        os._exit(141)
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        if sys.flags.dev_mode:
            raise
        hint = ""
        if isinstance(error, ModuleNotFoundError) and VERBS.get(argv[0], "").startswith("tileformer.training"):
            hint = ': pip install "tileformer[train,finetune]"'
        print("tileformer: error:", " ".join(str(error).split()) + hint, file=sys.stderr)
        return 1 if isinstance(error, FloatingPointError) else 2


if __name__ == "__main__":
    sys.exit(main())
