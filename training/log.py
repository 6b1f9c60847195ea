"""What a run says while it trains: JSON lines in its folder; a progress bar, or plain lines without a terminal."""

import json
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from tileformer.files import PathLike, to_json, write

Record = dict[str, Any]
RECORDED = ("step", "tokens", "loss", "lr")  # what every line says


@contextmanager
def open_log(folder: PathLike | None, step: int, total: int) -> Iterator[Callable[[Record], None]]:
    """A function that writes one record to `folder/log.jsonl` (None: to no file) and shows it.

    step: where the run continues; later lines, left by a run that was killed after its last checkpoint, are dropped.
    total: the token budget, the right end of the bar.
    """
    with _progress(total) as show:
        if folder is None:
            yield show
            return
        path = Path(folder) / "log.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            result = records(path)
            if lost := path.read_bytes().count(b"\n") - len(result):
                warnings.warn(f"{path}: damaged; {lost} lines that are no records of a run are left out", stacklevel=3)
            write(path, "".join(line for line, record in result if record["step"] <= step))
        with path.open("a", encoding="utf-8", buffering=1) as file:

            def record(entry: Record) -> None:
                file.write(to_json(entry) + "\n")
                show(entry)

            yield record


def records(path: PathLike) -> list[tuple[str, Record]]:
    """Every line of a log that is a record, with what it says."""
    result = []
    for line in Path(path).read_text("utf-8", errors="replace").split("\n"):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):  # such as the half line of a killed run
            continue
        if isinstance(record, dict) and all(isinstance(record.get(name), int | float) for name in RECORDED):
            result.append((line + "\n", record))
    return result


@contextmanager
def _progress(total: int) -> Iterator[Callable[[Record], None]]:
    if sys.stderr is None:  # closed
        yield lambda record: None
        return
    if not sys.stderr.isatty():
        say = partial(print, file=sys.stderr, flush=True)
        yield lambda record: say(f"{min(1, record['tokens'] / total):4.0%}  {_line(record)}")
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = TaskProgressColumn(), BarColumn(), TimeRemainingColumn(), TextColumn("{task.description}")
    # One refresh a second: rich draws in a thread of this process, and its time counts as training time.
    with Progress(*columns, console=Console(stderr=True), refresh_per_second=1) as bar:
        task = bar.add_task("step 0", total=total)
        yield lambda record: bar.update(task, completed=record["tokens"], description=_line(record))


def _line(record: Record) -> str:
    speed = f"{record['tokens_per_core_second']:,} tokens/core-s"
    text = f"step {record['step']}  loss {record['loss']:.3f}  lr {record['lr']:.1e}  {speed}"
    return text + (f"  valid {record['valid_loss']:.3f}" if "valid_loss" in record else "")
