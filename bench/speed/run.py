"""Time ops, a decoder layer, training steps and the host, beside other libraries; compile without a GPU; tune tiles.

`tileformer bench attention` times one op: its calls of bench/calls/workloads.py, by every provider of
bench/calls/providers.py. A result is checked against float64 before it is timed. `gpu-day` runs all that a new GPU
should answer, in one folder.
"""

import argparse
import contextlib
import csv
import dataclasses
import io
import os
import time
from pathlib import Path
from typing import Any

import torch
import triton

from tileformer import arguments
from tileformer.bench.calls import DTYPES, Call
from tileformer.bench.calls import providers as callees
from tileformer.bench.calls.op import MODES
from tileformer.bench.calls.providers import OURS, providers
from tileformer.bench.calls.workloads import TIMED_OPS, WORKLOADS
from tileformer.bench.speed import generate, gpu_day, host, step, tune
from tileformer.bench.speed.measure import DRY, Bench, Result, wanted
from tileformer.bench.static import run as static
from tileformer.bench.tables import Column, Growing, as_json, earlier, head, line
from tileformer.kernels.info import require_device

ELSEWHERE = {"step": step, "generate": generate, "static": static, "host": host, "gpu-day": gpu_day}
ABOUT = {
    "all": "time every op",
    **{op: f"time {op}" for op in TIMED_OPS},
    "step": "whole training steps beside torch.nn's",
    "generate": "new tokens beside transformers, torch.nn without a cache and CTranslate2; needs no GPU",
    "experiments": "the questions that only a GPU answers, as variants of one call each",
    "static": "registers, instructions, traffic of compiled kernels; needs no GPU",
    "host": "microseconds from Python to the launch; needs no GPU",
    "gpu-day": "everything for a first day on a GPU, into one folder",
}
TABLE = [
    Column("mode", "mode", "<8"),
    Column("provider", "provider", "<15"),
    Column("median ms", "median_ms", ">10.4f"),
    Column("20 %", "p20_ms", ">9.4f"),
    Column("80 %", "p80_ms", ">9.4f"),
    Column("TFLOP/s", "tflops", ">8.1f"),
    Column("GB/s", "gbs", ">8.1f"),
    Column("share", "share", ">6.1%"),
    Column("peak MB", "peak_mb", ">9.1f"),
    Column("error", "error", ">8.1e"),
    Column("/budget", "over_budget", ">7.3f"),
    Column("/ours", "speedup", ">7.2f"),
]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `tileformer bench`."""
    commands = parser.add_subparsers(dest="what", metavar="WHAT", title="what to measure (default: all)")
    for name, about in ABOUT.items():
        command = commands.add_parser(name, help=about, description=about)
        if name in ELSEWHERE:
            ELSEWHERE[name].add_arguments(command)
            continue
        add = command.add_argument
        add("--device", choices=("cpu", "cuda"), help="default: cuda where torch sees a GPU")
        add("--json", type=arguments.output_file, metavar="FILE", help="also write every figure to FILE")
        add("--dtype", choices=list(DTYPES), help="default: bf16 on a GPU, fp32 on a CPU")
        add("--seconds", type=arguments.seconds, metavar="S", help="start nothing new after S seconds")
        add("--dry", action="store_true", help="execute all of it without a GPU, at small size; measures nothing")
        add("--every", type=arguments.COUNT, default=1, metavar="N", help="only every Nth workload")
        add("--resume", action="store_true", help="go on after what the file of --json has")
        if name == "experiments":
            continue
        add("--mode", action="append", choices=MODES, help="only this pass (repeatable)")
        add("--provider", type=arguments.name, action="append", metavar="NAME", help="only this provider (repeatable)")
        add("--only", type=arguments.name, metavar="TEXT", help="only workloads with TEXT in their name")
        add("--csv", type=arguments.output_file, metavar="FILE", help="also write a row for every figure to FILE")
        add("--plot", type=arguments.output_folder, metavar="DIR", help="also draw PNGs into DIR (needs matplotlib)")
        if name == "attention":
            about = "search tiles (--only TEXT: those of tables, features and head sizes like 'BACKWARD_DQ plain 64'), "
            rest = "and print rows for kernels/attention/tiles.py; goes on from --json (default: runs/tune.json)"
            add("--tune", action="store_true", help=about + rest)


def main(args: argparse.Namespace) -> int:
    """Print the tables; 1 if a result of ours is wrong or raised (in a dry run, anyone's)."""
    if args.what is None:
        parser = argparse.ArgumentParser()
        add_arguments(parser)
        args = parser.parse_args(["all"])
    if args.what in ELSEWHERE:
        return ELSEWHERE[args.what].main(args)
    device = torch.device("cpu") if args.dry else require_device(args.device)
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
        callees.compile_backend = "aot_eager"
        torch.set_num_threads(1)
    deadline = time.monotonic() + args.seconds if args.seconds else float("inf")
    fast = "bf16" if args.dry or (device.type == "cuda" and torch.cuda.is_bf16_supported()) else "fp32"
    bench = Bench(device, DTYPES[args.dtype or fast], dry=args.dry, deadline=deadline)
    measured: dict[str, Any] = dict(
        device=bench.clock.name, dry=args.dry, torch=torch.__version__, triton=triton.__version__,
        dtype=str(bench.dtype).removeprefix("torch."), ceilings=bench.ceilings, results=[],
    )  # fmt: skip
    if args.resume:
        same = {name: measured[name] for name in ("device", "dry", "torch", "triton", "dtype")}
        measured["results"] = earlier(Path(args.json), "--json", lambda kept: kept["results"], **same) or []
    if args.dry:
        print(DRY.upper())
    if workloads:
        return _time(args, bench, measured, workloads)
    with Growing(args.json, lambda: as_json(measured)) as file:

        def keep(row: dict[str, Any]) -> None:
            measured["results"].append(row)
            file.write()

        if searched:
            tune.search(bench, measured["results"], keep, args.only or "", (64,) if args.dry else (64, 128))
        else:
            tune.experiments(bench, measured["results"], keep, args.every)
    return 0


def _asked(args: argparse.Namespace, device: torch.device) -> list[Call]:
    """The workloads; ValueError for names that are none, and for plots that could not be drawn."""
    if unknown := set(args.provider or []) - (known := {name for op in TIMED_OPS for name in providers(op)}):
        names = ", ".join(map(repr, sorted(unknown)))
        raise ValueError(f"unknown provider {names}: there are {', '.join(sorted(known))}")
    if args.plot:
        from tileformer.extras import optional_import  # whose room needs more packages than timing does

        optional_import("matplotlib")
    # Those with a slow starter last: where time is short, all the others have their figures.
    slow = lambda call: any(wanted(call, name, args.provider) for name in callees.SLOW_START[call.op])  # noqa: E731
    return sorted(chosen(args.what, device, args.dry, args.only, args.every), key=slow)


def chosen(what: str, device: torch.device, dry: bool, only: str | None, every: int = 1) -> list[Call]:
    """The workloads to time; on a CPU, where all points of a sweep are one size, the first; ValueError if none."""
    workloads, curves = [], set()
    for call in WORKLOADS:
        if what not in ("all", call.op) or (only or "") not in call.name:
            continue
        if device.type == "cpu" and not dry and call.axis and (call.op, call.curve) in curves:
            continue
        curves.add((call.op, call.curve))
        workloads.append(call)
    if not workloads:
        names = ", ".join(call.name for call in WORKLOADS if what in ("all", call.op))
        raise ValueError(f"no workload of {what} has {only!r} in its name: there are {names}")
    return workloads[::every]


def _time(args: argparse.Namespace, bench: Bench, measured: dict[str, Any], workloads: list[Call]) -> int:
    ceilings = (f"{name} {x:,.1f}" for name, x in bench.ceilings.items())
    print("; ".join([f"{measured['device']}, torch {measured['torch']}", *ceilings]))
    absent: dict[str, None] = {}
    done = {(row["op"], row["workload"]) for row in measured["results"]}
    workloads = [call for call in workloads if (call.op, call.name) not in done]
    ours = [(call, contextlib.nullcontext()) for call in workloads if wanted(call, OURS, args.provider)]
    tune.compile_ahead(bench, ours)
    file = Growing(args.json, lambda: as_json(measured))
    with file, Growing(args.csv, lambda: _csv(measured["results"])) as csv_file:
        for call in workloads:
            if time.monotonic() > bench.deadline:
                print(f"time is up: nothing from {call.op}, {call.name} on was measured")
                break
            names = [name for name in providers(call.op) if wanted(call, name, args.provider)]
            results = list(bench.measure(call, names, args.mode or MODES))
            measured["results"] += [dataclasses.asdict(r) for r in results]
            absent |= dict.fromkeys(r.reason for r in results if r.reason.endswith("is not installed"))
            print("\n".join(table(results, bench.sized(call), args.dry)), flush=True)
            file.write()
            csv_file.write()
    if absent:
        print("; ".join(absent))
    if args.plot:
        from tileformer.bench.speed.plot import plot

        print("\n".join(plot(measured, args.plot)))
    return int(any(r["failed"] and (args.dry or r["provider"] == OURS) for r in measured["results"]))


def table(results: list[Result], call: Call, dry: bool) -> list[str]:
    """Lines for one workload: a row for each mode and provider with a time, and why the others have none."""
    sizes = ", ".join(f"{name} {size}" for name, size in call.sizes.items())
    lines = [f"\n{call.op}: {call.name} ({sizes})" + (f" [{DRY}]" if dry else ""), head(TABLE)]
    lines += [line(TABLE, result) for result in results if result.median_ms is not None]
    reasons: dict[str, list[Result]] = {}
    for result in results:
        if result.median_ms is None and not result.reason.endswith("is not installed"):
            reasons.setdefault("FAILED: " * result.failed + result.reason, []).append(result)
    modes = {result.mode for result in results}
    for reason, untimed in reasons.items():
        names = dict.fromkeys(result.provider for result in untimed)
        if len(untimed) < len(names) * len(modes):
            names = dict.fromkeys(f"{result.provider} {result.mode}" for result in untimed)
        lines.append(f"no time: {', '.join(names)}: {reason}")
    return lines


def _csv(rows: list[dict[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, [field.name for field in dataclasses.fields(Result)])
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
