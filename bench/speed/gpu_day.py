"""Everything that a new GPU should answer, in one command, one folder and one archive, within given minutes.

Each part is a process with a limit, the most valuable first: one that fails, hangs or breaks the GPU's context stops no
other. Results, report and archive are written after each part; a later call goes on where this one stopped. `--dry`
executes the same parts without a GPU, at small sizes and with stand-in clocks; nothing in its report is measured.
"""

import argparse
import contextlib
import dataclasses
import itertools
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

from tileformer.arguments import ArgumentError, output_folder
from tileformer.bench.calls.op import MODES
from tileformer.bench.calls.providers import OURS
from tileformer.bench.calls.workloads import TIMED_OPS
from tileformer.bench.speed.measure import DRY
from tileformer.bench.tables import Column, Growing, as_json, earlier, markdown, markdown_cells
from tileformer.kernels.info import require_device

ROOT = Path(__file__).resolve().parents[2]
ARCHIVE = 8 * 2**20  # bytes: what a machine that is lent sends back
ENDING = 20  # seconds for plots, report and archive


@dataclasses.dataclass(frozen=True)
class Part:
    """A command of at most `seconds`, and what a dry run executes instead, in three times as many.

    {folder} is the report's. With `least` seconds it is worth starting, and is told how many there are.
    """

    name: str
    seconds: int
    command: tuple[str, ...]
    dry: tuple[str, ...] = ()
    least: int = 0


def _bench(op: str, seconds: int) -> Part:
    files = ("--json", "{folder}/" + op + ".json", *(("--csv", "{folder}/" + op + ".csv") if op in TIMED_OPS else ()))
    command = ("tileformer", "bench", op, *files, "--resume")
    return Part(op, seconds, command, (*command, "--dry", "--every", "1"), least=min(seconds, 40))


_TESTS = ("pytest", "-q", "-p", "no:cacheprovider")
_CHECK = ("tileformer", "check", "--json", "{folder}/check.json", "--report", "{folder}/check.md")
_STEP = ("tileformer", "bench", "step", "--json", "{folder}/step.json")
_HOST = ("tileformer", "bench", "host", "--json", "{folder}/host.json")
PARTS = (
    Part("environment", 30, ("tileformer", "info", "--json"), ("tileformer", "info", "--json", "--device", "cpu")),
    Part("gpu", 15, ("nvidia-smi", "-q"), ("platform",)),
    Part("self-test", 90, ("tileformer", "check", "--quick"), ("tileformer", "check", "--quick", "--device", "cpu")),
    _bench("attention", 265),
    _bench("decode_attention", 60),
    _bench("decoder_layer", 60),
    _bench("layer_norm", 40),
    _bench("add_layer_norm", 20),
    _bench("add_rms_norm", 10),
    _bench("bias_activation_dropout", 20),
    _bench("cross_entropy", 50),
    _bench("linear_cross_entropy", 20),
    _bench("rotary", 10),
    _bench("softmax", 40),
    _bench("rms_norm", 25),
    _bench("log_softmax", 25),
    _bench("dropout", 25),
    Part("step", 100, _STEP, (*_STEP, "--device", "cpu", "--threads", "1", "--rounds", "1")),
    Part("host", 60, (*_HOST, "--rounds", "10", "--g2p", "20"), (*_HOST, "--rounds", "1", "--g2p", "1")),
    _bench("experiments", 120),
    Part("check", 180, (*_CHECK, "--dtype", "bf16"), (*_CHECK, "--device", "cpu", "--op", "dropout")),
    Part("tests", 215, (*_TESTS, "-m", "gpu"), (*_TESTS, "tests/test_gpu.py")),
)  # fmt: skip
MINUTES = 25
DONE = [
    Column("part", lambda row: row["part"] if row["status"] == "left" else f"[{row['part']}](logs/{row['part']}.log)"),
    Column("status", "status"),
    Column("seconds", "seconds", ".0f"),
    Column("limit", "limit", ".0f"),
    Column("last line", lambda row: row["last"][:160]),
]
EXPERIMENTS = [
    Column("question", "question"),
    Column("variant", "variant"),
    Column("ms", lambda row: _figure(row["ms"], row["dry"], absent="")),
    Column("of the time as shipped", lambda row: _figure(row["ratio"], row["dry"], absent="")),
    Column("remark", lambda row: row["problem"][:160]),
]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `tileformer bench gpu-day`."""
    add, names = parser.add_argument, [part.name for part in PARTS]
    add("--output", type=output_folder, metavar="DIR", help="the report's folder (default: runs/gpu-day, or -dry)")
    add("--dry", action="store_true", help="execute every part without a GPU; nothing is measured")
    add("--minutes", type=_minutes, default=MINUTES, metavar="N", help=f"end within N minutes (default: {MINUTES})")
    add("--only", nargs="+", choices=names, metavar="PART", help=f"only these parts: {', '.join(names)}")
    add("--again", action="store_true", help="also parts that an earlier call has done")


def _minutes(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not ENDING < 60 * number <= 1e6:
        raise ArgumentError(f"a number of minutes from 1 is needed (the report takes {ENDING} seconds), got {text!r}")
    return number


def main(args: argparse.Namespace) -> int:
    """Run the parts that are not done yet; 1 if one failed, 130 if stopped."""
    folder = output_folder(str(args.output or ("runs/gpu-day-dry" if args.dry else "runs/gpu-day"))).resolve()
    if not args.dry and (device := require_device()).type != "cuda":
        raise ValueError(f"gpu-day found {device} and no GPU: add --dry to try every part of it here")
    deadline = time.monotonic() + 60 * args.minutes - ENDING
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    device_name = DRY if args.dry else _name()
    kinds = dict(part=str, status=str, seconds=float, limit=float, last=str)
    read = lambda kept: {row["part"]: {n: kind(row[n]) for n, kind in kinds.items()} for row in kept["parts"]}  # noqa: E731
    rows = earlier(folder / "parts.json", "--output", read, device=device_name) or {}
    chosen = [part for part in PARTS if not args.only or part.name in args.only]
    code, before = 0, signal.signal(signal.SIGTERM, signal.default_int_handler)  # a limit on the command is a Ctrl-C
    try:
        for part in _order(chosen, {} if args.again else rows):
            limit = min(3 * part.seconds if args.dry else part.seconds, deadline - time.monotonic())
            least = part.least or part.seconds
            if limit < least:
                said = f"left for a later call: it takes {least} s, there are {max(limit, 0):.0f}"
                print(f"{part.name:<14} {said}", flush=True)
                rows.setdefault(part.name, dict(part=part.name, status="left", seconds=0.0, limit=0, last=said))
                continue
            if args.again:
                _set_aside(part.name, folder)
            rows[part.name] = row = _run(part, limit, args.dry, folder)
            print("{part:<14} {status:<22} {seconds:>6.0f} s of {limit:.0f}".format(**row), flush=True)
            _publish(folder, device_name, rows)
            if row["status"] == "interrupted":
                raise KeyboardInterrupt
        _draw(folder, rows)
    except KeyboardInterrupt:
        code = 130
    finally:
        signal.signal(signal.SIGTERM, before)
    dropped = _publish(folder, device_name, rows)
    failed = [name for name, row in rows.items() if row["status"].startswith(("FAILED", "STOPPED"))]
    finished = sum(row["status"] == "done" for row in rows.values())
    print(f"{folder}/report.md: {finished} parts done" + (f", FAILED: {', '.join(failed)}" if failed else ""))
    print(f"{folder}.tar.gz has all of it" + (f" but, for its size: {', '.join(dropped)}" if dropped else ""))
    if code or finished < len(PARTS):
        print("the same command goes on with the parts that are not done")
    return code or int(bool(failed))


def _name() -> str:
    """The GPU's name, asked by a process that ends: this one holds no context beside its parts'."""
    code = "import torch; print(torch.cuda.get_device_name())"
    asked = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if asked.returncode:
        raise ValueError(f"the GPU does not start: {' '.join(asked.stderr.split())[-300:]}")
    return asked.stdout.strip()


def _order(parts: list[Part], rows: dict[str, dict[str, Any]]) -> list[Part]:
    """Those that are not done: first what has not been tried to its end, then what failed."""
    waiting = [part for part in parts if rows.get(part.name, {}).get("status") != "done"]
    return sorted(waiting, key=lambda part: rows.get(part.name, {}).get("status", "").startswith(("FAILED", "STOPPED")))


def _set_aside(name: str, folder: Path) -> None:
    """Keep an earlier call's results under another name."""
    for file in (folder / f"{name}{suffix}" for suffix in (".json", ".csv", ".md")):
        if file.exists():
            file.rename(file.with_name(f"{name}.{time.time_ns()}{file.suffix}"))


def _run(part: Part, limit: float, dry: bool, folder: Path) -> dict[str, Any]:
    """Run one part in a process group of its own, which ends at the limit."""
    command = [word.replace("{folder}", str(folder)) for word in ((part.dry or part.command) if dry else part.command)]
    if part.least:
        command += ["--seconds", f"{max(1, limit - 15):.0f}"]
    if command[0] != "nvidia-smi":
        command = [sys.executable, "-m", *command]
    path = os.pathsep.join([str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])])
    start, done = time.monotonic(), dict(part=part.name, limit=limit, last="")
    with open(folder / "logs" / f"{part.name}.log", "a+") as file:
        begin = file.seek(0, os.SEEK_END)
        try:
            options = dict(cwd=ROOT, start_new_session=True, env=dict(os.environ, PYTHONPATH=path))
            process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, **options)  # type: ignore[call-overload]
        except OSError as error:
            return done | dict(status="FAILED", seconds=0.0, last=str(error))
        try:
            code = process.wait(limit)
            status = f"FAILED ({code})" if code else "done"
        except subprocess.TimeoutExpired:
            status = "STOPPED at its limit"
        except KeyboardInterrupt:
            status = "interrupted"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # with what it started
            process.wait()
    with open(folder / "logs" / f"{part.name}.log", errors="replace") as file:
        file.seek(begin)
        lines = [line for line in file.read().splitlines() if line.strip()]
    if status == "done" and any(line.startswith("time is up") for line in lines):
        status = "cut short"
    return done | dict(status=status, seconds=time.monotonic() - start, last=lines[-1] if lines else "")


def _reports(folder: Path, rows: dict[str, dict[str, Any]]) -> dict[str, Any]:
    names = [name for name in (*TIMED_OPS, "experiments") if name in rows]
    reports = {name: earlier(folder / f"{name}.json", "--output", dict) for name in names}
    return {name: report for name, report in reports.items() if report}


def _publish(folder: Path, device: str, rows: dict[str, dict[str, Any]]) -> list[str]:
    """Write what is known: parts.json, report.md and the archive. The files that the archive has no room for."""
    ordered = [rows[part.name] for part in PARTS if part.name in rows]
    pictures = sorted(str(path.relative_to(folder)) for path in (folder / "plots").glob("*.png"))
    page = _page(device == DRY, ordered, _reports(folder, rows), pictures)
    Growing(str(folder / "parts.json"), lambda: as_json(dict(device=device, parts=ordered))).write(last=True)
    Growing(str(folder / "report.md"), lambda: page).write(last=True)
    return _pack(folder, Path(f"{folder}.tar.gz"))


def _pack(folder: Path, archive: Path, most: int = ARCHIVE) -> list[str]:
    """Pack a folder into at most `most` bytes. What had no room: the largest logs first, then the largest others."""
    logs = folder / "logs"
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix != ".part")
    files.sort(key=lambda path: (path.parent == logs, path.stat().st_size))
    dropped: list[str] = []
    part = archive.with_name(f"{archive.name}.part")
    while True:
        with tarfile.open(part, "w:gz") as tar:
            for path in files:
                tar.add(path, f"{folder.name}/{path.relative_to(folder)}")
        if part.stat().st_size <= most or not files:
            os.replace(part, archive)
            return dropped
        dropped.append(str(files.pop().relative_to(folder)))


def _draw(folder: Path, rows: dict[str, dict[str, Any]]) -> None:
    """Draw what there is; a machine without matplotlib goes without."""
    try:
        from tileformer.bench.speed.plot import plot  # with training's figures: more packages than timing needs

        ops = [report for name, report in _reports(folder, rows).items() if name in TIMED_OPS]
        if not ops:
            raise ValueError("no part left results to draw")
        plot(dict(ops[0], results=[row for report in ops for row in report["results"]]), str(folder / "plots"))
    except (ValueError, ImportError) as error:
        print(f"plots: none drawn: {error}")


def _page(dry: bool, done: list[dict[str, Any]], reports: dict[str, Any], pictures: list[str]) -> str:
    parts = ["# GPU day"]
    if dry:
        parts.append(f"**{DRY.upper()}. No time, rate or share on this page is a measurement.**")
    if reports:
        first = next(iter(reports.values()))
        ceilings = {name: ", ".join(f"{n} {x:,.1f}" for n, x in r["ceilings"].items()) for name, r in reports.items()}
        parts += [f"{first['device']}, torch {first['torch']}", "Ceilings, measured by each part:"]
        parts.append("\n".join(f"- {name}: {figures}" for name, figures in ceilings.items()))
    parts.append(markdown(DONE, done))
    for op in (op for op in TIMED_OPS if op in reports):
        about = "Milliseconds (ours in bold where it is the fastest); a dash has its reason in the part's log."
        parts += [f"## {op}", about, _op_table(reports[op]["results"], dry)]
    if "experiments" in reports:
        number = lambda row: int("".join(c for c in row["question"].split()[0] if c.isdigit()))  # noqa: E731
        rows = sorted(reports["experiments"]["results"], key=number)
        parts += ["## Experiments", markdown(EXPERIMENTS, [row | dict(dry=dry) for row in rows])]
    if pictures:
        parts += ["## Plots", "\n".join(f"![]({path})" for path in pictures)]
    return "\n\n".join(parts) + "\n"


def _figure(x: float | None, dry: bool, form: str = ".4f", absent: str = "-") -> str:
    return absent if x is None else "dry" if dry else format(x, form)


def _op_table(rows: list[dict[str, Any]], dry: bool) -> str:
    who = list(dict.fromkeys(row["provider"] for row in rows if row["median_ms"] is not None))
    timed = {(row["workload"], row["mode"], row["provider"]): row for row in rows}
    lines = []
    for workload, mode in itertools.product(dict.fromkeys(row["workload"] for row in rows), MODES):
        of = {name: timed.get((workload, mode, name), dict(median_ms=None, share=None)) for name in who}
        ms = {name: row["median_ms"] for name, row in of.items() if row["median_ms"] is not None}
        if not ms:
            continue
        cells = {name: _figure(ms.get(name), dry) for name in who}
        if OURS in ms and ms[OURS] <= min(ms.values()) and not dry:
            cells[OURS] = f"**{cells[OURS]}**"
        share = "dry" if dry else _figure(of.get(OURS, {}).get("share"), dry, ".1%")
        lines.append([workload, mode, *cells.values(), share])
    return markdown_cells(["workload", "mode", *who, "share of ceilings"], lines)
