"""Everything that a new GPU should answer, in one command and one folder, within 25 minutes.

Each part is a process of its own with a limit of its own, the most valuable first: a part that fails, hangs or breaks the GPU's context stops no
other. `--dry` executes the same parts without a GPU, at small sizes and with stand-in clocks; nothing in its report is measured.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tileformer.arguments import output_folder
from tileformer.bench.measure import DRY
from tileformer.bench.plot import plot
from tileformer.bench.providers import OURS
from tileformer.bench.workloads import MODES, OPS
from tileformer.kernels.info import require_device

ROOT = Path(__file__).resolve().parents[1]
GPU_TESTS = ("tests/test_gpu.py", "tests/test_values.py", "tests/test_attention.py")  # those that compile for a GPU


@dataclasses.dataclass(frozen=True)
class Part:
    """A command of at most `seconds`, and what a dry run executes instead, in three times as many; {folder} in them is the report's."""

    name: str
    seconds: int
    command: tuple[str, ...]
    dry: tuple[str, ...] = ()


def _bench(op: str, seconds: int) -> Part:
    files = ("--json", "{folder}/" + op + ".json", *(("--csv", "{folder}/" + op + ".csv") if op in OPS else ()))
    command = ("tileformer", "bench", op, *files)
    return Part(op, seconds, (*command, "--seconds", str(seconds - 15)), (*command, "--dry", "--every", "1"))


_TESTS = ("pytest", "-q", "-p", "no:cacheprovider")
_CHECK = ("tileformer", "check", "--json", "{folder}/check.json", "--report", "{folder}/check.md")
_STEP = ("tileformer", "bench", "step", "--json", "{folder}/step.json")
_HOST = ("tileformer", "bench", "host", "--json", "{folder}/host.json")
PARTS = (
    Part("environment", 30, ("tileformer", "info", "--json"), ("tileformer", "info", "--json", "--device", "cpu")),
    Part("gpu", 15, ("nvidia-smi", "-q"), ("platform",)),
    Part("self-test", 90, ("tileformer", "check", "--quick"), ("tileformer", "check", "--quick", "--device", "cpu")),
    _bench("attention", 375),
    _bench("decoder_layer", 60),
    _bench("layer_norm", 50),
    _bench("cross_entropy", 50),
    _bench("softmax", 45),
    _bench("rms_norm", 30),
    _bench("log_softmax", 30),
    _bench("dropout", 30),
    Part("step", 100, _STEP, (*_STEP, "--device", "cpu", "--threads", "1", "--rounds", "1")),
    Part("host", 60, (*_HOST, "--rounds", "10", "--g2p", "20"), (*_HOST, "--rounds", "1", "--g2p", "1")),
    _bench("experiments", 120),
    Part("check", 190, (*_CHECK, "--dtype", "bf16"), (*_CHECK, "--device", "cpu", "--op", "dropout")),
    Part("tests", 225, (*_TESTS, *GPU_TESTS, "-k", "not interpreted_tests"), (*_TESTS, GPU_TESTS[0])),
)  # fmt: skip
LIMIT = 25 * 60


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `tileformer bench gpu-day`."""
    about = "the report's folder (default: runs/gpu-day)"
    parser.add_argument("--output", type=output_folder, metavar="DIR", default="runs/gpu-day", help=about)
    parser.add_argument("--dry", action="store_true", help="execute every part without a GPU; nothing is measured")


def main(args: argparse.Namespace) -> int:
    """Run the parts and write report.md; 1 if a part failed."""
    if not args.dry and (device := require_device()).type != "cuda":
        raise ValueError(f"gpu-day found {device} and no GPU: add --dry to try every part of it here")
    folder = Path(args.output).resolve()
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    for old in (*folder.glob("*.json"), *folder.glob("*.csv")):
        old.unlink()  # figures of an earlier run would be taken for those of a part that failed
    done = []
    for part in PARTS:
        command = (part.dry or part.command) if args.dry else part.command
        words = [word.replace("{folder}", str(folder)) for word in command]
        done.append(_run(part.name, 3 * part.seconds if args.dry else part.seconds, words, folder))
        print("{part:<14} {status:<22} {seconds:>6.0f} s of {limit}".format(**done[-1]), flush=True)
    start = time.monotonic()
    reports = {
        p: json.loads((folder / f"{p}.json").read_text())
        for p in (*OPS, "experiments")
        if (folder / f"{p}.json").exists()
    }
    done.append(dict(part="plots", status="done", seconds=0.0, limit=60, last=""))
    try:
        pictures = _plots(reports, folder)
    except ValueError as error:
        pictures, done[-1]["status"], done[-1]["last"] = [], "none drawn", str(error)
    done[-1]["seconds"] = time.monotonic() - start
    (folder / "report.md").write_text("\n".join(_report(args.dry, done, reports, pictures)) + "\n")
    failed = [d["part"] for d in done if d["status"] not in ("done", "none drawn")]
    print(
        f"{folder}/report.md: {len(done) - len(failed)} parts done"
        + (f", FAILED: {', '.join(failed)}" if failed else "")
    )
    return int(bool(failed))


def _run(name: str, limit: int, command: list[str], folder: Path) -> dict[str, Any]:
    """Run one part in a process group of its own, which ends at the limit."""
    log = folder / "logs" / f"{name}.log"
    path = os.pathsep.join([str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])])
    if command[0] != "nvidia-smi":
        command = [sys.executable, "-m", *command]
    start, done = time.monotonic(), dict(part=name, limit=limit, last="")
    with open(log, "w") as file:
        try:
            process = subprocess.Popen(
                command,
                stdout=file,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
                start_new_session=True,
                env=dict(os.environ, PYTHONPATH=path),
            )
        except OSError as error:
            return done | dict(status="FAILED", seconds=0.0, last=str(error))
        try:
            code = process.wait(limit)
            status = f"FAILED ({code})" if code else "done"
        except subprocess.TimeoutExpired:
            status = "STOPPED at its limit"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # with what it started
            process.wait()
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return done | dict(status=status, seconds=time.monotonic() - start, last=lines[-1] if lines else "")


def _plots(reports: dict[str, Any], folder: Path) -> list[str]:
    ops = [report for name, report in reports.items() if name in OPS]
    if not ops:
        raise ValueError("no part left results to draw")
    everything = dict(ops[0], results=[row for report in ops for row in report["results"]])
    return [os.path.relpath(path, folder) for path in plot(everything, str(folder / "plots"))]


def _report(dry: bool, done: list[dict[str, Any]], reports: dict[str, Any], pictures: list[str]) -> list[str]:
    lines = ["# GPU day", ""]
    if dry:
        lines += [f"**{DRY.upper()}. No time, rate or share on this page is a measurement.**", ""]
    any_report = next(iter(reports.values()), None)
    if any_report:
        lines += [f"{any_report['device']}, torch {any_report['torch']}", "", "Ceilings, measured by each part:", ""]
        lines += [
            f"- {name}: " + ", ".join(f"{n} {x:,.1f}" for n, x in r["ceilings"].items()) for name, r in reports.items()
        ]
    lines += ["", "| part | status | seconds | limit | last line |", "|---|---|---|---|---|"]
    lines += [
        f"| [{d['part']}](logs/{d['part']}.log) | {d['status']} | {d['seconds']:.0f} | {d['limit']} | {_cell(d['last'])} |"
        for d in done
    ]
    for op in (op for op in OPS if op in reports):
        lines += [
            "",
            f"## {op}",
            "",
            "Milliseconds (ours in bold where it is the fastest); a dash has its reason in the part's log.",
            "",
        ]
        lines += _op_table(reports[op]["results"], dry)
    if "experiments" in reports:
        lines += [
            "",
            "## Experiments",
            "",
            "| question | variant | ms | of the time as shipped | remark |",
            "|---|---|---|---|---|",
        ]
        for row in reports["experiments"]["results"]:
            figures = " | ".join("" if x is None else "dry" if dry else f"{x:.4f}" for x in (row["ms"], row["ratio"]))
            lines.append(f"| {row['question']} | {row['variant']} | {figures} | {_cell(row['problem'])} |")
    return [*lines, *(["", "## Plots", ""] if pictures else []), *(f"![]({path})" for path in pictures)]


def _cell(text: str) -> str:
    return text.replace("|", "/")[:160]


def _op_table(rows: list[dict[str, Any]], dry: bool) -> list[str]:
    who = list(dict.fromkeys(row["provider"] for row in rows if row["median_ms"] is not None))
    lines = ["| workload | mode | " + " | ".join(who) + " | share of ceilings |", "|---" * (len(who) + 3) + "|"]
    times = {(r["workload"], r["mode"], r["provider"]): r for r in rows}
    for workload in dict.fromkeys(row["workload"] for row in rows):
        for mode in MODES:
            found = {name: times.get((workload, mode, name)) for name in who}
            ms = {name: r["median_ms"] for name, r in found.items() if r and r["median_ms"] is not None}
            if not ms:
                continue
            cells = ["-" if name not in ms else "dry" if dry else f"{ms[name]:.4f}" for name in who]
            if OURS in ms and ms[OURS] <= min(ms.values()) and not dry:
                cells[who.index(OURS)] = f"**{cells[who.index(OURS)]}**"
            figure = (found.get(OURS) or {}).get("share")
            share = "dry" if dry else "-" if figure is None else f"{figure:.1%}"
            lines.append(f"| {workload} | {mode} | " + " | ".join(cells) + f" | {share} |")
    return lines
