"""Static figures of every kernel beside other libraries': machine code, traffic, model, goals. No GPU is needed.

A is exact for this compiler, B counts cycles at documented rates, C is a model (its error: bench/static/model.py).
Peers are scored over their whole configuration lists. Results are cached by kernel source, versions and tools.
"""

import argparse
import fnmatch
import hashlib
import importlib.metadata
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import triton

from tileformer import arguments
from tileformer.bench.calls.ops import OPS
from tileformer.bench.recording import ARCH
from tileformer.bench.static import capture, evidence, goals, layer, tiles
from tileformer.bench.static.capture import OURS, PEERS
from tileformer.bench.static.rates import RATES
from tileformer.bench.static.sections import Row, sections
from tileformer.bench.tables import Growing, text

SCORED = tuple(op for op in OPS if op != "linear_cross_entropy")  # a sum of others
BENCH = Path(__file__).resolve().parents[1]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `tileformer bench static`."""
    add = parser.add_argument
    add("--arch", nargs="+", default=[80, 90, 100], help="default: 80 90 100", **ARCH)
    add("--op", action="append", choices=SCORED, help="only this op (repeatable)")
    about = "only calls whose name fits, such as 'D 64 * T 4096'; the rest's goals are not run"
    add("--call", type=arguments.name, metavar="PATTERN", help=about)
    add("--against", type=arguments.name, metavar="NAMES", help=f"other libraries, with commas: {','.join(PEERS)}")
    add("--json", type=arguments.output_file, metavar="FILE", help="also write every figure to FILE")
    add("--goals", action="store_true", help="check bench/goals.toml; exit status 1 if an A or B goal is missed")
    about = (
        "choose attention's tiles instead: tables, features, head sizes with TEXT in them, as 'BACKWARD_DQ plain 64'"
    )
    add("--tiles", type=arguments.name, metavar="TEXT", help=about)
    about = "write the goals of docs/evidence.md into FILE, behind its words, and the tables into the folder beside it"
    add("--evidence", type=arguments.output_file, metavar="FILE", help=about)
    about = "default: tileformer/static in XDG_CACHE_HOME or ~/.cache"
    add("--cache", type=arguments.output_folder, metavar="DIR", help=about)


def _hash_of(files: Iterable[Path]) -> str:
    return hashlib.sha256(b"".join(path.name.encode() + path.read_bytes() for path in sorted(files))).hexdigest()


def _key(job: dict[str, Any]) -> str:
    """What a job's rows depend on: kernels (or a peer's version), compiler, and the tools that read them."""
    lists = ("matrix",) if job["kind"] == "tables" else ("workloads", "providers")
    readers = ("capture", "compiled", "figures", "model", "rates", "sass", "traffic")
    tools = [BENCH / "recording.py", *(BENCH / "static" / f"{name}.py" for name in readers)]
    tools += [BENCH / "calls" / f"{name}.py" for name in ("__init__", "ops", *lists)]
    if job["provider"] == OURS:
        source = _hash_of((BENCH.parent / "kernels").rglob("*.py"))
    else:
        source = importlib.metadata.version(PEERS[job["provider"]])
    key = [job, source, triton.__version__, torch.__version__, _hash_of(tools)]
    return hashlib.sha256(json.dumps(key).encode()).hexdigest()


def _do(job: dict[str, Any], cache: Path) -> list[dict[str, Any]]:
    """A job's rows, from the cache or from a process of its own: its driver must not meet a real GPU's."""
    file = cache / f"{_key(job)}.json"
    if file.exists():
        return json.loads(file.read_text())
    # The source of a checkout that is not installed.
    paths = [str(BENCH.parent / "src"), *filter(None, [os.environ.get("PYTHONPATH")])]
    own = dict(TRITON_CACHE_DIR=str(cache / "triton"), PYTHONPATH=os.pathsep.join(paths), OMP_NUM_THREADS="1")
    command = [sys.executable, "-W", "ignore", "-m", "tileformer.bench.static.capture"]
    streams: dict[str, Any] = dict(input=json.dumps(job), capture_output=True, text=True)
    done = subprocess.run(command, env=os.environ | own, check=False, **streams)
    if done.returncode:
        why = done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"exit status {done.returncode}"
        if done.returncode < 0:  # a peer wrote out of bounds; the C library's words on it differ from run to run
            why = "a signal ended it"
        if job["provider"] == OURS:
            raise RuntimeError(f"{job}: {why}")
        head = {name: job[name] for name in ("provider", "arch", "op")}
        missing = "uncounted" if job["kind"] == "traffic" else "skipped"
        rows = [dict(head, workload=name) | {missing: f"its process died: {why}"} for name in job["workloads"]]
    else:
        rows = json.loads(done.stdout.splitlines()[-1])
    unfinished = file.with_suffix(f".{os.getpid()}")
    unfinished.write_text(json.dumps(rows))
    unfinished.replace(file)
    return rows


def _jobs(archs: list[int], ops: list[str], providers: list[str], pattern: str) -> list[dict[str, Any]]:
    """The longest first; one workload of attention a job, and the whole of any other op."""
    jobs: list[dict[str, Any]] = []
    for provider in sorted(providers, key=["flag_gems", OURS, "fla", "liger"].index):
        for arch in archs:
            for op in ops:
                names = [w.name for w in capture.workloads([op], provider) if fnmatch.fnmatchcase(w.name, pattern)]
                parts = [[name] for name in names] if op == "attention" and provider != OURS else [names]
                job = dict(kind="launches", provider=provider, arch=arch, op=op)
                jobs += [dict(job, workloads=part) for part in parts if part]
                if provider == OURS and pattern == "*":
                    jobs.append(dict(job, kind="tables", workloads=[]))
    return jobs


def _with_traffic(job: dict[str, Any], cache: Path) -> list[dict[str, Any]]:
    """A job's rows; for a peer also its traffic, in the configurations that were best."""
    rows = _do(job, cache)
    if job["provider"] == OURS or job["arch"] not in RATES:
        return rows
    choices = [{name: row[name] for name in ("kernel", "tile", "warps")} for row in rows if "tile" in row]
    return rows + _do(dict(job, kind="traffic", choices=choices), cache)


def collect(
    archs: list[int], ops: list[str], providers: list[str], cache: Path, pattern: str, grown: Callable[[Any], None]
) -> list[Row]:
    """Every row, in an order that depends on nothing but the arguments; `grown` is told of those that are there."""
    counted = [row for row in layer.rows(archs[0]) if fnmatch.fnmatchcase(row["workload"], pattern)]
    counted = counted if "decoder_layer" in ops else []
    jobs = _jobs(archs, [op for op in ops if op != "decoder_layer"], providers, pattern)
    if not (counted or any(job["kind"] == "launches" for job in jobs)):
        raise ValueError(f"--call {pattern!r}: no call of {', '.join(ops)} has a name that fits")
    cache.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = counted
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for n, of_job in enumerate(pool.map(lambda job: _with_traffic(job, cache), jobs), 1):
            rows += of_job
            grown(rows)
            if sys.stderr.isatty():
                print(f"\r{n}/{len(jobs)} jobs", end="\r", file=sys.stderr)
    fields = ("arch", "op", "workload", "dtype", "pass", "provider")
    rows.sort(key=lambda row: tuple(str(row.get(field, "")) for field in fields))
    _beside_peers(rows)
    return rows


def _beside_peers(rows: list[Row]) -> None:
    """Add to ours the ratio of the modelled share (of the tensor peak, of DRAM's rate) to the best peer's."""
    for figure in ("share", "roof"):
        theirs: dict[tuple[Any, ...], float] = {}
        at = lambda row: (row["op"], row["workload"], row["arch"], row.get("pass"))  # noqa: E731
        for row in rows:
            if row["provider"] in PEERS and figure in row:
                theirs[at(row)] = max(row[figure], theirs.get(at(row), 0.0))
        for row in rows:
            if row["provider"] == OURS and figure in row and theirs.get(at(row)):
                row[f"{figure}_over_best_peer"] = round(row[figure] / theirs[at(row)], 3)


def main(args: argparse.Namespace) -> int:
    """Print the table; 1 if a goal of class A or B is missed. With --tiles search, and return 0."""
    if args.tiles:
        tried: list[dict[str, Any]] = []
        with Growing(args.json, lambda: json.dumps(tried, indent=1) + "\n") as file:

            def keep(trial: dict[str, Any]) -> None:
                tried.append(trial)
                file.write()

            tiles.search(args.arch, args.tiles, keep)
        return 0
    peers = args.against.split(",") if args.against else []
    if set(peers) - set(PEERS):
        raise ValueError(f"--against takes {','.join(PEERS)}; got {args.against!r}")
    providers = [OURS]
    for name in peers:
        try:
            importlib.metadata.version(PEERS[name])
            providers.append(name)
        except importlib.metadata.PackageNotFoundError:
            print(f"{name} skipped: not installed (pip install {PEERS[name]})")
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    cache = args.cache or arguments.output_folder(os.path.join(home, "tileformer", "static"))
    versions = dict(triton=triton.__version__, torch=torch.__version__)
    versions |= {name: importlib.metadata.version(PEERS[name]) for name in providers[1:]}
    figures: dict[str, Any] = dict(versions=versions, rows=[], goals=[])
    with Growing(args.json, lambda: json.dumps(figures, indent=1, sort_keys=True) + "\n") as file:

        def grown(rows: list[Row]) -> None:
            figures["rows"] = rows
            file.write()

        asked = goals.load() if args.goals or args.evidence else []
        rows = collect(args.arch, args.op or list(SCORED), providers, cache, args.call or "*", grown)
        figures["goals"] = verdicts = goals.verdicts_of(asked, rows, part=bool(args.call))
    print(f"Triton {triton.__version__}. Nothing here was measured on a GPU; shares and times are modelled.")
    for _, title, columns, of in sections(rows, verdicts if args.goals else []):
        print(f"\n{title}\n{text(columns, of)}")
    if args.evidence:
        for path, page in evidence.pages(Path(args.evidence), rows, verdicts, versions).items():
            path.parent.mkdir(exist_ok=True)
            path.write_text(page)
    return int(args.goals and any(v["verdict"] == "miss" for v in verdicts))
