"""The `tileformer` command: find the verb, import its room, hand over the arguments."""

import argparse
import ast
import contextlib
import importlib
import os
import sys
from typing import NoReturn

import tileformer
from tileformer.extras import advice

VERBS = {
    "info": "tileformer.kernels.info",
    "check": "tileformer.bench.check.run",
    "bench": "tileformer.bench.speed.run",
    "train": "tileformer.training.train",
    "search": "tileformer.training.search",
    "finetune": "tileformer.training.finetune.run",
    "evaluate": "tileformer.training.measure",
    "generate": "tileformer.training.generate",
}
ABOUT = """Fused Triton kernels for Transformers: look at this machine, check the kernels on it, train and use a model.

  tileformer check --quick                           compare the kernels with their definitions, on this machine
  tileformer train g2p                               learn English pronunciation, a few minutes on a CPU
  tileformer generate --checkpoint PATH hello world  pronounce two words with what was learned
  tileformer finetune --list                         ways to make a classifier of a pretrained model

Exit status: 0 done, 1 a check failed, a training diverged or some inputs could not be read, 2 wrong usage or input,
130 interrupted."""
LONGEST = 100  # characters that an error message shows of a word that the user typed


def _docstring(name: str) -> str:  # read, not imported: `tileformer --help` must not wait for torch
    files = (os.path.join(folder, *name.split(".")[1:]) + ".py" for folder in tileformer.__path__)
    with open(next(filter(os.path.isfile, files)), encoding="utf-8") as source:
        return (ast.get_docstring(ast.parse(source.read())) or name).replace("%", "%%")


def _complain(message: str, typed: list[str]) -> None:
    """One line on standard error. Words that were typed, and long, are cut, as they are or as `repr` shows them."""
    words = [part for word in typed for part in (word, word.partition("=")[2]) if len(part) > LONGEST]
    for word in words:
        for shown in (word, repr(word)[1:-1]):
            message = message.replace(shown, shown[:LONGEST] + "...")
    with contextlib.suppress(OSError):  # nowhere to say it: the exit status says the rest
        print("tileformer: error:", " ".join(message.split()), file=sys.stderr, flush=True)


def _parser(typed: list[str]) -> argparse.ArgumentParser:
    class Parser(argparse.ArgumentParser):
        def error(self, message: str) -> NoReturn:  # argparse would print the usage before it
            _complain(f"{message}; see {self.prog} --help", typed)
            raise SystemExit(2)

    return Parser("tileformer", description=ABOUT, formatter_class=argparse.RawDescriptionHelpFormatter)


def _text_of(error: Exception) -> str:
    if not isinstance(error, OSError) or not error.strerror:
        return str(error)
    named = "" if error.filename is None else f"{os.fsdecode(error.filename)}: "
    return named + error.strerror.lower()


def _open_closed_streams() -> None:
    """A stream that the caller closed is None: the next file opened would get its number, and what is printed there."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.open(os.devnull, os.O_RDWR), mode, closefd=False))  # noqa: SIM115


def main(argv: list[str] | None = None) -> int:
    """Run one verb and return the exit status. Errors a user can expect are one line (`python -X dev`: all of it)."""
    argv = sys.argv[1:] if argv is None else argv
    nobody_reads = sys.stdout is None
    _open_closed_streams()
    if nobody_reads:
        _complain("standard output is closed: send it to a file, or to /dev/null", argv)
        return 2
    parser = _parser(argv)
    parser.add_argument("--version", action="version", version=f"tileformer {tileformer.__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    try:
        for verb, name in VERBS.items():
            text = _docstring(name)
            verb_parser = verbs.add_parser(
                verb, help=text.splitlines()[0], description=text, formatter_class=parser.formatter_class
            )
            if argv[:1] == [verb]:
                importlib.import_module(name).add_arguments(verb_parser)
        args = parser.parse_args(argv)
        status = importlib.import_module(VERBS[args.verb]).main(args)
        sys.stdout.flush()  # what a full disk does not take is an error here, not behind the last line
        return status
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader left early, as `| head` does: nobody is there for what is left to flush
        os._exit(141)
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        if sys.flags.dev_mode:
            raise
        hint = ""
        if isinstance(error, ModuleNotFoundError) and (way := advice(error.name)):
            hint = f": {way}"
        _complain(_text_of(error) + hint, argv)
        try:
            sys.stdout.flush()
        except OSError:  # the interpreter would try once more
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1 if isinstance(error, FloatingPointError) else 2


if __name__ == "__main__":
    sys.exit(main())
