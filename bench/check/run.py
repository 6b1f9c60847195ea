"""Check each op on this machine: every output and gradient against float64, its bits, its memory, its dropout.

Every call of bench/calls/cases.py runs on a backend and is held to

  the error budget of bench/check/budget.py, forward and every gradient, in each dtype;
  the same bits in two runs;
  its own memory: fresh memory is NaN between guard bands, inputs lie between NaN (bench/check/memory.py);
  for dropout: rate, mean and independence of calls, batches, heads, rows and columns within 5 standard deviations of
  the binomial distribution; the same bits for the same seed, forward and backward, and those of the definition.

Where there is a GPU the compiled kernels run on it; elsewhere the same kernels are interpreted. Plain `tileformer
check` runs everything: minutes, interpreted; on a GPU mostly compilation, of some 360 kernels, the first time. --quick
compiles 26. A --report can be attached to a bug.
"""

import argparse
import contextlib
import functools
import math
import re
import sys
import time
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from tileformer import arguments, kernels
from tileformer.bench import ahead
from tileformer.bench.calls import DTYPES, FAR_AXIS, LAYOUTS, Call, differentiate, function_of, is_floating, leaves_of
from tileformer.bench.calls.cases import CASES, DRAWS
from tileformer.bench.calls.matrix import MATRIX
from tileformer.bench.calls.op import Tensors, largest
from tileformer.bench.calls.ops import OPS
from tileformer.bench.calls.pairs import PAIRS
from tileformer.bench.check import models
from tileformer.bench.check.budget import over_budget
from tileformer.bench.check.memory import FRESH, RED, Memory
from tileformer.bench.check.report import TABLE, Finding, collect, page, summary, surroundings
from tileformer.bench.recording import ARCH
from tileformer.bench.static import compiled
from tileformer.bench.tables import Growing, as_json, head, line, printer
from tileformer.kernels import info, interpreter, launch
from tileformer.kernels.backend import Backend

SIGMAS = 5.0  # a check of dropout's statistics is wrong about a right kernel once in 2 million seeds; ours are fixed


def results_of(
    ops: Any, call: Call, dtype: torch.dtype, device: torch.device, rounded: torch.dtype, memory: Memory | None = None
) -> tuple[Tensors, Tensors]:
    """Results of a call, its inputs rounded to `rounded`, in `dtype` by `ops`, `kernels` or `kernels.reference`.

    And the outputs' gradients that it started from. With `memory`, inputs lie there, strided as the call says.
    """

    def put(name: str, x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        wide = torch.promote_types(dtype, torch.float32) if name in call.fp32 else dtype
        value = x.to(device, wide if is_floating(x) else None)
        return value if memory is None else memory.place(value, x, FAR_AXIS.get(call.layouts.get(name, "")))

    leaves, options = ({name: put(name, x) for name, x in named.items()} for named in call.inputs(dtype=rounded))
    leaves = leaves_of(call, leaves)
    generator = torch.Generator().manual_seed(1)

    def grad_output(name: str, x: Tensor) -> Tensor:
        laid_out = LAYOUTS[call.layouts.get(name, "far")]
        drawn, hidden = torch.randn(x.shape, generator=generator).to(rounded), x == -torch.inf
        grad = put(name, laid_out(drawn)).to(x.dtype)
        return grad.masked_fill(hidden, 0.0) if hidden.any() else grad  # a row without a key: no gradient for its lse

    with memory or torch.enable_grad():
        return differentiate(function_of(ops, call.op), leaves, options, grad_output)


def _error_sizes(call: Call, truth: Tensors, grads: Tensors, rounded: torch.dtype) -> Tensors:
    """For each result, the sum of the absolute values of what is added up (bench/check/budget.py)."""
    inputs, exact = call.inputs(dtype=rounded), lambda x: x.double() if is_floating(x) else x
    tensors, options = ({name: exact(x) for name, x in named.items()} for named in inputs)
    truth, grads = ({name: x.cpu() for name, x in named.items()} for named in (truth, grads))
    known = OPS[call.op].error_sizes(tensors, options, truth, grads)
    sizes = {name: largest(x) for name, x in truth.items()} | dict(known)
    return {name: torch.as_tensor(x, dtype=torch.float64).nan_to_num(0.0, 0.0, 0.0) for name, x in sizes.items()}


def examine(call: Call, dtype_name: str, backend: Backend, device: torch.device, runs: int = 2) -> Finding:
    """Everything that is checked about a call; `runs` times, for the same bits."""
    finding = Finding(call.op, call.name, dtype_name, call.reason)
    dtype = DTYPES[dtype_name]

    def run(red: int = RED, fresh: int = FRESH) -> tuple[Tensors, Memory]:
        memory = Memory(device, red, fresh)
        with kernels.use_backend(backend):
            return results_of(kernels, call, dtype, device, dtype, memory)[0], memory

    truth, grads = results_of(kernels.reference, call, torch.float64, device, dtype)
    eager, _ = results_of(kernels.reference, call, dtype, device, dtype)
    got, memory = run()
    size = _error_sizes(call, truth, grads, dtype)
    finding.over_budget = {
        name: over_budget(got[name], eager[name], x, size[name], size.get(f"{name} again", 0.0))
        for name, x in truth.items()
    }
    changed = lambda name, **patterns: not _same_bits(run(**patterns)[0][name], got[name])  # noqa: E731
    finding.problems += memory.problems()
    for name in [name for name, ratio in finding.over_budget.items() if ratio == math.inf]:
        if changed(name, fresh=0):
            finding.problems.append(f"{name}: some element was never written, or comes from one that was not")
        elif changed(name, red=0):
            finding.problems.append(f"{name}: what lies outside an input reaches it")
    for again in (run()[0] for _ in range(runs - 1)):
        differ = [name for name in got if not _same_bits(again[name], got[name])]
        finding.problems += [f"{name}: another run gave other bits" for name in differ]
    return finding


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(*(x.contiguous().reshape(-1).view(torch.uint8) for x in (a, b)))


def examine_draws(call: Call, dtype_name: str, backend: Backend, device: torch.device) -> Finding:
    """Deviation over its bound of each statistic of an op's dropout, and whether seeds replay."""
    finding = Finding(call.op, call.name, dtype_name, call.reason)
    draw, dtype, p = OPS[call.op].draw, DTYPES[dtype_name], call.dropout
    assert draw is not None
    like = torch.empty(0, dtype=dtype, device=device)

    def drawn(seed: Tensor | None) -> tuple[Tensor, Tensor]:
        with kernels.use_backend(backend):
            return draw(getattr(kernels, call.op), p, seed, like)

    def within(name: str, hits: Tensor, rate: float) -> None:
        bound = SIGMAS * math.sqrt(hits.numel() * rate * (1 - rate)) + 0.5
        finding.over_budget[name] = abs(int(hits.sum()) - hits.numel() * rate) / bound

    seed = torch.tensor([0x5EED_0123_4567], device=device)
    first, backward = drawn(seed)
    keep, scale = first != 0, 1 / (1 - p)
    with kernels.use_backend(backend):
        looked_up = kernels.dropout_keep(seed, keep.shape, p)
    defined = kernels.reference.dropout_keep(seed, keep.shape, p)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(1)
        unseeded, following = drawn(None)[0], drawn(None)[0]
        torch.manual_seed(1)
        replayed = drawn(None)[0]
    within("rate", keep, 1 - p)
    roundings = 2 * torch.finfo(dtype).eps
    spread = SIGMAS * math.sqrt(p / (1 - p) / first.numel())
    finding.over_budget["mean"] = abs(float(first.double().mean()) - 1) / (spread + roundings)
    finding.over_budget["scale"] = float((first[keep].double() / scale - 1).abs().max()) / roundings
    agree = p * p + (1 - p) * (1 - p)
    within("calls", (unseeded != 0) == (following != 0), agree)
    for axis, name in zip(range(-keep.dim(), 0), ("batches", "heads", "rows", "columns")[-keep.dim() :], strict=True):
        even, odd = (keep.movedim(axis, 0)[start::2][: keep.shape[axis] // 2] for start in (0, 1))
        within(name, even == odd, agree)
    held = {
        "the same seed gave other bits": _same_bits(first, drawn(seed)[0]),
        "the same state of torch's generator gave other bits": _same_bits(unseeded, replayed),
        "the backward drops other elements than the forward": torch.equal(keep, backward != 0),
        "other elements are kept than reference.dropout_keep keeps": backend == "torch" or torch.equal(keep, defined),
        "kernels.dropout_keep names other elements than are kept": torch.equal(keep, looked_up),
    }
    finding.problems += [problem for problem, right in held.items() if not right]
    return finding


def _is_far(call: Call) -> bool:
    return not FAR_AXIS.keys().isdisjoint(call.layouts.values())


def _finding(call: Call, dtype: str, backend: Backend, device: torch.device) -> Finding:
    """`examine` or `examine_draws`; an error becomes a problem, so that the other calls are still checked."""
    finding = Finding(call.op, call.name, dtype, call.reason, skipped=call.unfit(backend))
    if finding.skipped:
        return finding
    try:
        return (examine_draws if call.draws else examine)(call, dtype, backend, device)
    except Exception as error:
        text = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        if _is_far(call) and isinstance(error, (OSError, torch.OutOfMemoryError)):
            finding.skipped = f"too little memory ({text})"
        else:
            finding.problems.append(text)
        return finding


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `tileformer check`."""
    add, ops = parser.add_argument, sorted({call.op for call in CASES})
    add("--quick", action="store_true", help="a few calls of each op (at most 26 kernel specialisations)")
    about = "also attention calls in which every two features meet, and a table of the features"
    add("--all", action="store_true", help=about)
    about = "instead whole models of torch.nn and transformers on our kernels, beside their eager selves"
    add("--models", action="store_true", help=about)
    add("--op", action="append", choices=ops, help="only this op (repeatable)")
    add("--case", type=arguments.name, action="append", metavar="NAME", help="only this call (repeatable)")
    add("--dtype", action="append", choices=list(DTYPES), help="only this dtype (repeatable)")
    add("--backend", choices=("triton", "interpret", "torch"), help="default: triton on a GPU, interpret elsewhere")
    add("--device", choices=("cpu", "cuda"), help="default: cuda where torch sees a GPU")
    about = "also write a Markdown report to FILE, call by call"
    add("--report", type=arguments.output_file, metavar="FILE", help=about)
    path = lambda text: text if text == "-" else arguments.output_file(text)  # noqa: E731
    about = "also write every figure to FILE, call by call ('-': to standard output instead of the table)"
    add("--json", type=path, metavar="FILE", help=about)
    about = "compile the tile tables for the architectures of --arch and run nothing; needs no GPU, and fills Triton's "
    add("--compile-only", action="store_true", help=about + "cache for one")
    add("--arch", nargs="+", help="with --compile-only: 80 86 89 90 100 120, or sm_90 (default: all)", **ARCH)
    add("--part", type=_part, metavar="K/N", help="only each Nth call, from the Kth: all N parts are all calls")


def _part(text: str) -> slice:
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise argparse.ArgumentTypeError(f"{text!r}: give K/N with K from 1 to N, like 1/4")
    return slice(int(match[1]) - 1, None, int(match[2]))


def main(args: argparse.Namespace) -> int:
    """Print the table; 1 if a call failed."""
    if args.models:
        return models.main(args.backend, info.require_device(args.device), args.report)
    everything = MATRIX if args.compile_only else [*CASES, *DRAWS, *(PAIRS if args.all else ())]
    calls = list(_chosen(everything, args))[args.part or slice(None)]
    if not calls:
        names = ", ".join(repr(call.name) for call in everything if not args.op or call.op in args.op)
        wanted = f"op {args.op}, case {args.case}, dtype {args.dtype}"
        raise ValueError(f"nothing is called that: {wanted}: choose from {names}")
    if args.compile_only:
        return compiled.main(calls, args.arch, args.json)
    launch.selftest_due = False  # this is more than that
    device = info.require_device(args.device)
    backend: Backend = args.backend or ("triton" if device.type == "cuda" else "interpret")
    if backend in ("triton", "interpret") and (backend == "triton") != (device.type == "cuda"):
        raise ValueError(f"--backend {backend} does not serve {device.type}: triton is for cuda, interpret for cpu")
    calls.sort(key=lambda call: _is_far(call[0]))  # last: a wrong offset there would take the process or the GPU down
    say = printer(args.json)
    if backend == "triton" and (said := ahead.compile_here([functools.partial(_uncomputed, *call) for call in calls])):
        say(said)
    say(f"{backend} on {device}, torch {torch.__version__}: error / budget (at most 1 passes)\n{head(TABLE)}")
    start, environment = time.perf_counter(), surroundings(backend, device)
    findings: list[Finding] = []

    def collected() -> dict[str, Any]:
        seconds = round(time.perf_counter() - start, 1)
        return collect(findings, len(calls), environment=environment, tiles=tiles, seconds=seconds)

    file = Growing(args.report, lambda: page(collected()))
    data_file = Growing(args.json, lambda: as_json(collected()))
    asked = dict(backend=args.backend, device=args.device)
    repeat = "".join(f" --{name} {value}" for name, value in asked.items() if value)
    with _tiles() as tiles, file, data_file:
        for n, (call, dtype) in enumerate(calls, 1):
            if sys.stderr.isatty():
                doing = "compiling and running" if backend == "triton" else "running"
                print(f"\r{doing} {n}/{len(calls)}", end="\r", file=sys.stderr)
            findings.append(_finding(call, dtype, backend, device))
            findings[-1].command = f'tileformer check --op {call.op} --case "{call.name}" --dtype {dtype}{repeat}'
            say(line(TABLE, findings[-1]))
            file.write()
            data_file.write()
    data = collected()
    for row in data["features"]:
        say(f"{row[0]:<34}", *(f"{cell:<14}" for cell in row[1:]))
    say(summary(data))
    return int(data["failed"] > 0)


def _uncomputed(call: Call, dtype: str) -> None:
    """The launches of a call, to be compiled ahead."""
    cpu = torch.device("cpu")
    if call.draws:
        examine_draws(call, dtype, "triton", cpu)
    else:
        results_of(kernels, call, DTYPES[dtype], cpu, DTYPES[dtype], Memory(cpu))


@contextlib.contextmanager
def _tiles() -> Iterator[dict[str, list[str]]]:
    """The tiles that each kernel is launched with inside."""
    seen: dict[str, list[str]] = {}

    def noting(run: Any) -> Any:
        def noted(kernel: Any, *call: Any) -> Any:
            tile = ", ".join(f"{name} {x}" for name, x in call[-1].items() if name.startswith(("BLOCK_", "num_")))
            if tile not in seen.setdefault(kernel.fn.__name__, []):
                seen[kernel.fn.__name__].append(tile)
            return run(kernel, *call)

        return mock.Mock(side_effect=noted)

    compiled_run, interpreted_run = noting(launch._run), noting(interpreter.run)
    with mock.patch.object(launch, "_run", compiled_run), mock.patch.object(interpreter, "run", interpreted_run):
        yield seen


def _chosen(everything: list[Call], args: argparse.Namespace) -> Iterator[tuple[Call, str]]:
    for call in everything:
        asked = (not args.op or call.op in args.op) and (not args.case or call.name in args.case)
        if not asked or (args.quick and not call.quick):
            continue
        dtypes = [d for d in call.dtypes if not args.dtype or d in args.dtype]
        if args.quick and not args.dtype and not args.compile_only:
            dtypes = ([d for d in dtypes if d == "bf16"] or dtypes)[:1]
        yield from ((call, dtype) for dtype in dtypes)
