"""The process that trains: alone, with its run folder to itself, and saved when it is stopped."""

import argparse
import contextlib
import errno
import os
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tileformer import arguments
from tileformer.files import PathLike, shorten

LOCK = ".lock"
_held: dict[Path, int] = {}  # the locks of this process, and the thread that took each


def require_single() -> None:
    """ValueError under a launcher of several processes: each would train the whole run, and all into one folder."""
    size = os.environ.get("WORLD_SIZE", "1")
    if size.strip() not in ("", "0", "1"):
        advice = "this command trains in one process; start it without torchrun, or unset it"
        raise ValueError(f"WORLD_SIZE is {shorten(size, 20)}: {advice}")


@contextlib.contextmanager
def lock(folder: PathLike) -> Iterator[None]:
    """Hold `folder`, which is made if need be, for this thread; taken again inside, it is held already. A folder that
    was made for nothing, because what went on inside refused to begin, is taken away again.

    The kernel releases it with the process, however that ends. ValueError when another one has it. A file system that
    knows no locks is used without.
    """
    import fcntl

    folder = Path(folder)
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    key = folder.resolve()
    if _held.get(key) == threading.get_ident():
        yield
        return
    with open(folder / LOCK, "a+b", buffering=0) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.pread(file.fileno(), 20, 0).decode("ascii", "replace").strip() or "unknown"
            advice = "wait until it has ended, or choose another folder"
            raise ValueError(f"{folder}: process {owner} is at work in it; {advice}") from None
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                raise
        file.truncate(0)
        file.write(f"{os.getpid()}\n".encode())
        _held[key] = threading.get_ident()
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                if made and os.listdir(folder) == [LOCK]:
                    (folder / LOCK).unlink()
                    for path in made:
                        path.rmdir()
            del _held[key]
            fcntl.flock(file, fcntl.LOCK_UN)  # closing alone leaves it to a child that was forked meanwhile


class Stop:
    """Whether this process was asked to stop: `signum` is the signal's number, 0 without one."""

    signum = 0

    def error(self, advice: str) -> BaseException:
        """What ends the run: KeyboardInterrupt, or for SIGTERM the SystemExit of a process that it ended, 143."""
        if self.signum == signal.SIGTERM:
            return SystemExit(128 + signal.SIGTERM)
        return KeyboardInterrupt(advice)


@contextlib.contextmanager
def stop_at_next_step() -> Iterator[Stop]:
    """Ctrl-C and SIGTERM only set `signum`, so that a step can be finished and saved; a second Ctrl-C stops at once.

    In the main thread, and of handlers that nobody has changed; they are put back at the end.
    """
    stop = Stop()

    def ask(signum: int, frame: Any) -> None:
        if stop.signum and signum == signal.SIGINT:
            raise KeyboardInterrupt
        stop.signum = stop.signum or signum
        if sys.stderr is not None:  # else 2 is the number of another file
            with contextlib.suppress(OSError):  # not print: this may be inside of another print
                os.write(2, b"\nstopping: this step is finished and saved first; Ctrl-C again stops at once\n")

    usual = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    before = {}
    if threading.current_thread() is threading.main_thread():
        before = {number: was for number, was in usual.items() if signal.getsignal(number) == was}
    try:
        for number in before:
            signal.signal(number, ask)
        yield stop
    finally:
        for number, was in before.items():
            signal.signal(number, was)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of every command that trains."""
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), help="default: cuda where there is one, else cpu")
    add("--threads", type=arguments.THREADS, default=1, metavar="N", help="CPU threads of a process (default 1)")
    add("--precision", choices=("auto", "fp32", "bf16"), default="auto", help="default: the faster one")
    about = "all that is drawn: weights, order, dropout, which labels (default 0)"
    add("--seed", type=arguments.SEED, default=0, metavar="N", help=about)


def command(verb: str, add_arguments: Callable[[argparse.ArgumentParser], None], args: argparse.Namespace) -> str:
    """The command line of `args` that goes on with a run that was stopped."""
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    words = ["tileformer", verb, args.recipe]
    for name, usual in vars(parser.parse_args([args.recipe])).items():
        value = getattr(args, name)
        if value != usual and name not in ("recipe", "resume", "overwrite"):
            flag = f"--{name.replace('_', '-')}"
            for one in value if isinstance(value, list) else [value]:
                words += [flag, *([] if one is True else [str(one)])]
    return shlex.join([*words, "--resume"])


@contextlib.contextmanager
def interruptible(again: str, saved: Callable[[], bool]) -> Iterator[None]:
    """Say how to go on when what runs inside is stopped, and let the exception through."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        left = f"go on with: {again}" if saved() else "no checkpoint was written yet"
        print(f"interrupted; {left}", file=sys.stderr)
        raise
