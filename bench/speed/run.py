"""Time the ops, a decoder layer, training steps and the host, beside PyTorch and other libraries; compile without a GPU; tune tiles.

`tileformer bench attention` times one op: every workload of bench/speed/workloads.py that has its name, by every provider of
bench/speed/providers.py. A result is judged against float64 before it is timed. `gpu-day` runs all that a new GPU should answer, in one folder.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import functools
import io
import json
import os
import time
from typing import Any

import torch
import triton

from tileformer import arguments
from tileformer.bench import ahead
from tileformer.bench.check.cases import DTYPES
from tileformer.bench.report import Growing, as_json
from tileformer.bench.speed import gpu_day, host, providers, step, tune
from tileformer.bench.speed.measure import DRY, Bench, Result, wanted
from tileformer.bench.speed.workloads import MODES, OPS, WORKLOADS, Workload
from tileformer.bench.static import report as static_report
from tileformer.kernels.info import require_device

ELSEWHERE = {"static": static_report, "host": host, "gpu-day": gpu_day}
ABOUT = {
    "all": "time every op",
    **{op: f"time {op}" for op in OPS},
    "step": "whole training steps beside torch.nn's",
    "experiments": "the questions that only a GPU answers, as variants of one call each",
    "static": "registers, instructions, traffic of compiled kernels; needs no GPU",
    "host": "microseconds from Python to the launch; needs no GPU",
    "gpu-day": "everything for a first day on a GPU, into one folder",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `tileformer bench`."""
    commands = parser.add_subparsers(dest="what", metavar="WHAT", title="what to measure (default: all)")
    for name, about in ABOUT.items():
        command = commands.add_parser(name, help=about, description=about)
        if name in ELSEWHERE:
            ELSEWHERE[name].add_arguments(command)
            continue
        command.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where torch sees a GPU")
        about = "also write every figure to FILE"
        command.add_argument("--json", type=arguments.output_file, metavar="FILE", help=about)
        if name == "step":
            about = "on a CPU (default: 1 and 2)"
            command.add_argument("--threads", type=arguments.THREADS, nargs="+", metavar="N", help=about)
            about = "rounds whose median is printed (default: 12)"
            command.add_argument("--rounds", type=arguments.COUNT, default=12, metavar="N", help=about)
            continue
        command.add_argument("--dtype", choices=list(DTYPES), help="default: bf16 on a GPU, fp32 on a CPU")
        about = "start nothing new after S seconds"
        command.add_argument("--seconds", type=arguments.seconds, metavar="S", help=about)
        command.add_argument(
            "--dry", action="store_true", help="execute all of it without a GPU, at small size; measures nothing"
        )
        about = "only every Nth workload"
        command.add_argument("--every", type=arguments.COUNT, default=1, metavar="N", help=about)
        command.add_argument("--resume", action="store_true", help="go on after what the file of --json has")
        if name == "experiments":
            continue
        command.add_argument("--mode", action="append", choices=MODES, help="only this pass (repeatable)")
        command.add_argument(
            "--provider", type=arguments.name, action="append", metavar="NAME", help="only this provider (repeatable)"
        )
        about = "only workloads with TEXT in their name"
        command.add_argument("--only", type=arguments.name, metavar="TEXT", help=about)
        about = "also write a row for every figure to FILE"
        command.add_argument("--csv", type=arguments.output_file, metavar="FILE", help=about)
        about = "also draw PNGs into DIR (needs matplotlib)"
        command.add_argument("--plot", type=arguments.output_folder, metavar="DIR", help=about)
        if name == "attention":
            command.add_argument(
                "--tune",
                action="store_true",
                help="search tiles (--only TEXT: those of tables, features and head sizes like 'BACKWARD_DQ plain 64'), and print rows for "
                "kernels/attention/tiles.py; goes on from --json (default: runs/tune.json)",
            )


def main(args: argparse.Namespace) -> int:
    """Print the tables; 1 if a result of ours is wrong or raised (in a dry run, anyone's)."""
    if args.what is None:
        parser = argparse.ArgumentParser()
        add_arguments(parser)
        args = parser.parse_args(["all"])
    if args.what in ELSEWHERE:
        return ELSEWHERE[args.what].main(args)
    device = torch.device("cpu") if getattr(args, "dry", False) else require_device(args.device)
    if args.what == "step":
        threads = args.threads or ([1, 2] if device.type == "cpu" else [torch.get_num_threads()])
        rows: list[dict[str, Any]] = []
        file = Growing(args.json, lambda: as_json(rows))
        for row in step.report(device, threads, args.rounds):
            rows.append(row)
            file.write()
        file.write(last=True)
        return 0
    searched = getattr(args, "tune", False)
    if args.resume and not (args.json or searched):
        raise ValueError("--resume goes on after a file of results: name it with --json FILE")
    if searched:
        args.resume = True
        if not args.json:
            os.makedirs("runs", exist_ok=True)
            args.json = arguments.output_file("runs/tune.json")
    workloads = [] if args.what == "experiments" or searched else _asked(args, device)
    if args.dry:
        providers.compile_backend = "aot_eager"
        torch.set_num_threads(1)
    deadline = time.monotonic() + args.seconds if args.seconds else float("inf")
    fast = "bf16" if args.dry or (device.type == "cuda" and torch.cuda.is_bf16_supported()) else "fp32"
    bench = Bench(device, DTYPES[args.dtype or fast], dry=args.dry, deadline=deadline)
    report: dict[str, Any] = dict(
        device=bench.clock.name, dry=args.dry, torch=torch.__version__, triton=triton.__version__,
        dtype=str(bench.dtype).removeprefix("torch."), ceilings=bench.ceilings, results=[],
    )  # fmt: skip
    if args.resume:
        report["results"] = _kept(args.json, report)
    if args.dry:
        print(DRY.upper())
    if args.what == "experiments" or searched:
        file = Growing(args.json, lambda: as_json(report))

        def keep(row: dict[str, Any]) -> None:
            report["results"].append(row)
            file.write()

        try:
            if searched:
                tune.search(bench, report["results"], keep, args.only or "", (64,) if args.dry else (64, 128))
            else:
                tune.experiments(bench, report["results"], keep, args.every)
        finally:
            file.write(last=True)
        return 0
    return _ops(args, bench, report, workloads)


def _asked(args: argparse.Namespace, device: torch.device) -> list[Workload]:
    """The workloads; ValueError for names that are none, and for plots that could not be drawn."""
    known = {name for op in OPS for name in providers.providers(op)}
    if unknown := set(args.provider or []) - known:
        raise ValueError(
            f"unknown provider {', '.join(map(repr, sorted(unknown)))}: there are {', '.join(sorted(known))}"
        )
    if args.plot:
        from tileformer.training.extras import library  # whose room needs more packages than timing does

        library("matplotlib")
    # Those with a slow starter last: where time is short, all the others have their figures.
    workloads = chosen(args.what, device, args.dry, args.only, args.every)
    return sorted(workloads, key=lambda w: _starts_slowly(w, args.provider))


def _kept(path: str, report: dict[str, Any]) -> list[dict[str, Any]]:
    """The results of an earlier call of the same kind, to go on after.

    Raises:
        ValueError: if it holds something else.
    """
    if not os.path.exists(path):
        return []
    try:
        with open(path, encoding="utf-8") as file:
            earlier = json.load(file)
    except ValueError as error:
        raise ValueError(f"{path} holds no results ({error}): choose another --json") from None
    for name in ("device", "dry", "torch", "triton", "dtype"):
        if not isinstance(earlier, dict) or earlier.get(name) != report[name]:
            found = earlier.get(name) if isinstance(earlier, dict) else "no report"
            raise ValueError(f"{path} has results of {name} {found}, this is {report[name]}: choose another --json")
    return earlier["results"]


def chosen(what: str, device: torch.device, dry: bool, only: str | None, every: int = 1) -> list[Workload]:
    """The workloads to time; on a CPU, where all points of a sweep are one size, the first of each.

    Raises:
        ValueError: if there are none.
    """
    found, seen = [], set()
    for workload in WORKLOADS:
        if what not in ("all", workload.op) or (only or "") not in workload.name:
            continue
        if device.type == "cpu" and not dry and workload.axis and (workload.op, workload.curve) in seen:
            continue
        seen.add((workload.op, workload.curve))
        found.append(workload)
    if not found:
        names = ", ".join(w.name for w in WORKLOADS if what in ("all", w.op))
        raise ValueError(f"no workload of {what} has {only!r} in its name: there are {names}")
    return found[::every]


def _starts_slowly(workload: Workload, asked: list[str] | None) -> bool:
    slow = providers.SLOW_START.get(workload.op, providers.SLOW_START["*"])
    return any(name in slow and wanted(workload, name, asked) for name in providers.providers(workload.op))


def _ops(args: argparse.Namespace, bench: Bench, report: dict[str, Any], workloads: list[Workload]) -> int:
    print(
        "; ".join(
            [f"{report['device']}, torch {report['torch']}", *(f"{n} {x:,.1f}" for n, x in bench.ceilings.items())]
        )
    )
    absent: dict[str, None] = {}
    done = {(row["op"], row["workload"]) for row in report["results"]}
    workloads = [workload for workload in workloads if (workload.op, workload.name) not in done]
    calls = [
        functools.partial(ahead.workload_call, providers.providers(w.op)[providers.OURS](w), w, bench.dtype)
        for w in workloads
        if wanted(w, providers.OURS, args.provider)
    ]
    if bench.device.type == "cuda" and (said := ahead.compile_here(calls)):
        print(said, flush=True)
    files = [Growing(args.json, lambda: as_json(report)), Growing(args.csv, lambda: _csv(report["results"]))]
    for workload in workloads:
        if time.monotonic() > bench.deadline:
            print(f"time is up: nothing from {workload.op}, {workload.name} on was measured")
            break
        names = [n for n in providers.providers(workload.op) if wanted(workload, n, args.provider)]
        results = list(bench.measure(workload, names, args.mode or MODES))
        report["results"] += [dataclasses.asdict(r) for r in results]
        absent |= dict.fromkeys(r.reason for r in results if r.reason.endswith("is not installed"))
        print("\n".join(table(results, bench.sized(workload), args.dry)), flush=True)
        for file in files:
            file.write()
    for file in files:
        file.write(last=True)
    if absent:
        print("; ".join(absent))
    if args.plot:
        from tileformer.bench.speed.plot import plot

        print("\n".join(plot(report, args.plot)))
    return int(any(r["failed"] and (args.dry or r["provider"] == providers.OURS) for r in report["results"]))


def table(results: list[Result], workload: Workload, dry: bool) -> list[str]:
    """Lines for one workload: a row for each mode and provider with a time, and why the others have none."""
    sizes = ", ".join(f"{name} {size}" for name, size in workload.sizes.items())
    lines = [f"\n{workload.op}: {workload.name} ({sizes})" + (f" [{DRY}]" if dry else "")]
    lines.append(
        f"{'mode':<8} {'provider':<15} {'median ms':>10} {'20 %':>9} {'80 %':>9} {'TFLOP/s':>8} {'GB/s':>8} {'share':>6} "
        f"{'peak MB':>9} {'error':>8} {'/budget':>7} {'/ours':>7}"
    )
    cell = lambda x, width, form: f"{'-' if x is None else format(x, form):>{width}}"  # noqa: E731
    reasons: dict[str, list[str]] = {}
    for r in results:
        if r.median_ms is None:
            if not r.reason.endswith("is not installed"):
                reasons.setdefault(("FAILED: " if r.failed else "") + r.reason, []).append(f"{r.provider} {r.mode}")
            continue
        lines.append(
            f"{r.mode:<8} {r.provider:<15} {r.median_ms:>10.4f} {r.p20_ms:>9.4f} {r.p80_ms:>9.4f} {cell(r.tflops, 8, '.1f')} "
            f"{cell(r.gbs, 8, '.1f')} {cell(r.share, 6, '.1%')} {cell(r.peak_mb, 9, '.1f')} {cell(r.error, 8, '.1e')} "
            f"{cell(r.over_budget, 7, '.3f')} {cell(r.speedup, 7, '.2f')}"
        )
    for reason, who in reasons.items():
        names = dict.fromkeys(name.rpartition(" ")[0] for name in who)
        all_modes = len(who) == len(names) * len({r.mode for r in results})
        lines.append(f"no time: {', '.join(names if all_modes else who)}: {reason}")
    return lines


def _csv(rows: list[dict[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, [field.name for field in dataclasses.fields(Result)])
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
