"""Check each op on this machine: every output and gradient against float64, its bits, its memory, its dropout.

Every call of bench/check/cases.py runs on a backend and is held to

  the error budget of bench/check/budget.py, forward and every gradient, in each dtype;
  the same bits in two runs;
  its own memory: fresh memory is NaN between guard bands, inputs lie between NaN (bench/check/memory.py);
  for dropout: a rate, a mean and an independence of calls, batches, heads, rows and columns within 5 standard deviations of the binomial
  distribution, the same bits for the same seed, forward and backward, and those of the definition.

Where there is a GPU the compiled kernels run on it; elsewhere the same kernels are interpreted. Plain `tileformer check` runs everything: minutes,
interpreted; on a GPU mostly compilation, of some 360 kernels, the first time. --quick compiles 16. A --report can be attached to a bug.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import math
import sys
import time
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from tileformer import arguments, kernels
from tileformer.bench import ahead
from tileformer.bench.calls import DTYPES, FAR_AXIS, LAYOUTS, Case, Draw
from tileformer.bench.check import models
from tileformer.bench.check.budget import over_budget
from tileformer.bench.check.cases import CASES, DRAWS, OPS
from tileformer.bench.check.memory import FRESH, RED, Memory
from tileformer.bench.check.pairs import PAIRS
from tileformer.bench.report import HEADER, Finding, Growing, as_json, collect, line, markdown, summary, surroundings
from tileformer.bench.static import compiled
from tileformer.kernels import info, interpreter, launch

SIGMAS = 5.0  # a check of dropout's statistics is wrong about a right kernel once in 2 million seeds; ours are fixed


def results(
    namespace: Any,
    case: Case,
    dtype: torch.dtype,
    device: torch.device,
    rounded: torch.dtype,
    memory: Memory | None = None,
) -> dict[str, Tensor]:
    """Outputs and gradients of a case, its inputs rounded to `rounded` and computed in `dtype` by `kernels` or `kernels.reference`.

    With `memory`, inputs lie there, strided as the case says.
    """
    tensors, options = case.inputs()

    def put(name: str, x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        value = x
        if x.is_floating_point():
            wide = name in case.fp32
            value = x.to(torch.float32 if wide else rounded).to(
                torch.promote_types(dtype, torch.float32) if wide else dtype
            )
        if memory is None:
            return value.to(device)
        return memory.place(value.to(device), x, FAR_AXIS.get(case.layouts.get(name, "")))

    leaves = {name: put(name, x).requires_grad_() for name, x in tensors.items()}
    options = {name: put(name, x) for name, x in options.items()}
    generator = torch.Generator().manual_seed(1)
    given: dict[str, Tensor] = {}
    with memory or torch.enable_grad():
        outputs = getattr(namespace, case.op)(**leaves, **options)
        named = dict(zip(("out", "lse"), outputs if isinstance(outputs, tuple) else (outputs,), strict=False))
        for name, x in named.items():
            drawn = LAYOUTS[case.layouts.get(name, "far")](torch.randn(x.shape, generator=generator))
            given[name] = put(name, drawn).to(x.dtype)
            if (x == -torch.inf).any():  # the log-sum-exp of a row without a key has no gradient
                given[name] = given[name].masked_fill(x == -torch.inf, 0.0)
        gradients = torch.autograd.grad(list(named.values()), list(leaves.values()), list(given.values()))
    return (
        {name: x.detach() for name, x in named.items()}
        | {f"d{name}": g for name, g in zip(leaves, gradients, strict=True)}
        | {f"given {name}": g for name, g in given.items()}
    )


def _wanted(found: dict[str, Tensor]) -> list[str]:
    return [name for name in found if not name.startswith("given")]


def _sizes(case: Case, truth: dict[str, Tensor], rounded: torch.dtype) -> dict[str, Tensor]:
    """For each result, the sum of the absolute values of what is added up (bench/check/budget.py)."""

    def wide(name: str, x: Any) -> Any:
        if not isinstance(x, Tensor) or not x.is_floating_point():
            return x
        return x.to(torch.float32 if name in case.fp32 else rounded).double()

    given = [{name: wide(name, x) for name, x in named.items()} for named in case.inputs()]
    size: dict[str, Any] = {
        name: torch.where(x.isfinite(), x, 0.0).abs().amax() if x.numel() else 0.0 for name, x in truth.items()
    }
    size.update(OPS[case.op].sizes(given[0], given[1], truth))
    return {name: torch.as_tensor(x, dtype=torch.float64).nan_to_num(0.0, 0.0, 0.0) for name, x in size.items()}


def judge(case: Case, dtype_name: str, backend: str, device: torch.device) -> dict[str, float]:
    """Error over budget of each output and gradient of a case: at most 1 passes.

    Raises:
        AssertionError: for something wrong that is not an error of a value; the message says what.
    """
    found = examine(case, dtype_name, backend, device, runs=1)
    assert not found.problems, f"{case.op}, {case.name}, {dtype_name}: {'; '.join(found.problems)}"
    return found.over_budget


def examine(case: Case, dtype_name: str, backend: str, device: torch.device, runs: int = 2) -> Finding:
    """Everything that is checked about a call; `runs` times, for the same bits."""
    finding = Finding(case.op, case.name, dtype_name, case.reason)
    dtype = DTYPES[dtype_name]

    def run(red: int = RED, fresh: int = FRESH) -> tuple[dict[str, Tensor], Memory]:
        memory = Memory(device, red, fresh)
        with kernels.use_backend(backend):
            return results(kernels, case, dtype, device, dtype, memory), memory

    truth = results(kernels.reference, case, torch.float64, device, dtype)
    eager = results(kernels.reference, case, dtype, device, dtype)
    got, memory = run()
    size = _sizes(case, {name: x.detach().cpu() for name, x in truth.items()}, dtype)
    finding.over_budget = {
        name: over_budget(got[name], eager[name], truth[name], size[name], size.get(f"{name} again", 0.0))
        for name in _wanted(truth)
    }
    finding.problems += memory.problems()
    for name in [name for name, ratio in finding.over_budget.items() if ratio == math.inf]:
        if not _same_bits(run(fresh=0)[0][name], got[name]):
            finding.problems.append(f"{name}: some element was never written, or comes from one that was not")
        elif not _same_bits(run(red=0)[0][name], got[name]):
            finding.problems.append(f"{name}: what lies outside an input reaches it")
    for _ in range(runs - 1):
        again = run()[0]
        differ = [name for name in _wanted(got) if not _same_bits(again[name], got[name])]
        finding.problems += [f"{name}: another run gave other bits" for name in differ]
    return finding


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(*(x.contiguous().reshape(-1).view(torch.uint8) for x in (a, b)))


def examine_draw(draw: Draw, dtype_name: str, backend: str, device: torch.device) -> Finding:
    """Deviation over its bound of each statistic of an op's dropout, and whether seeds replay."""
    finding = Finding(draw.op, draw.name, dtype_name, draw.reason)
    see, dtype, p = OPS[draw.op].draw, DTYPES[dtype_name], draw.p
    assert see is not None

    def pull(seed: Tensor | None) -> tuple[Tensor, Tensor]:
        with kernels.use_backend(backend):
            return see(getattr(kernels, draw.op), p, seed, device, dtype)

    def within(name: str, hits: Tensor, rate: float) -> None:
        bound = SIGMAS * math.sqrt(hits.numel() * rate * (1 - rate)) + 0.5
        finding.over_budget[name] = abs(int(hits.sum()) - hits.numel() * rate) / bound

    seed = torch.tensor([0x5EED_0123_4567], device=device)
    first, backward = pull(seed)
    keep, scale = first != 0, 1 / (1 - p)
    with kernels.use_backend(backend):
        looked_up = kernels.dropout_keep(seed, keep.shape, p)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(1)
        own, following = pull(None)[0], pull(None)[0]
        torch.manual_seed(1)
        replayed = pull(None)[0]
    within("rate", keep, 1 - p)
    finding.over_budget["mean"] = abs(float(first.double().mean()) - 1) / (
        SIGMAS * math.sqrt(p / (1 - p) / first.numel()) + 2 * torch.finfo(dtype).eps
    )
    finding.over_budget["scale"] = float((first[keep].double() / scale - 1).abs().max()) / (2 * torch.finfo(dtype).eps)
    agree = p * p + (1 - p) * (1 - p)
    within("calls", (own != 0) == (following != 0), agree)
    for axis, name in zip(range(-keep.dim(), 0), ("batches", "heads", "rows", "columns")[-keep.dim() :], strict=True):
        even, odd = (keep.movedim(axis, 0)[start::2][: keep.shape[axis] // 2] for start in (0, 1))
        within(name, even == odd, agree)
    for wrong, text in (
        (not _same_bits(first, pull(seed)[0]), "the same seed gave other bits"),
        (not _same_bits(own, replayed), "the same state of torch's generator gave other bits"),
        (not torch.equal(keep, backward != 0), "the backward drops other elements than the forward"),
        (
            backend != "torch" and not torch.equal(keep, kernels.reference.dropout_keep(seed, keep.shape, p)),
            "other elements are kept than reference.dropout_keep keeps",
        ),
        (not torch.equal(keep, looked_up), "kernels.dropout_keep names other elements than are kept"),
    ):
        finding.problems += [text] * wrong
    return finding


def _far(item: Any) -> bool:
    return any(kind in FAR_AXIS for kind in getattr(item, "layouts", {}).values())


def _find(item: Case | Draw, dtype: str, backend: str, device: torch.device) -> Finding:
    """`examine` or `examine_draw`; an error becomes a problem, so that the other calls are still checked."""
    if isinstance(item, Case) and (why := item.unfit(backend)):
        return Finding(item.op, item.name, dtype, item.reason, skipped=why)
    try:
        return (
            examine(item, dtype, backend, device)
            if isinstance(item, Case)
            else examine_draw(item, dtype, backend, device)
        )
    except Exception as error:
        finding = Finding(item.op, item.name, dtype, item.reason)
        text = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        if _far(item) and isinstance(error, (OSError, torch.OutOfMemoryError)):
            finding.skipped = f"too little memory ({text})"
        else:
            finding.problems.append(text)
        return finding


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `tileformer check`."""
    choices = dict(op=sorted(OPS), dtype=list(DTYPES))
    parser.add_argument(
        "--quick", action="store_true", help="a few calls of each op (at most 16 kernel specialisations)"
    )
    parser.add_argument(
        "--all",
        action="store_true",
        help="also attention calls in which every two features meet, and a table of the features",
    )
    parser.add_argument(
        "--models",
        action="store_true",
        help="instead whole models of torch.nn and transformers on our kernels, beside their eager selves",
    )
    parser.add_argument("--op", action="append", choices=choices["op"], help="only this op (repeatable)")
    parser.add_argument(
        "--case", type=arguments.name, action="append", metavar="NAME", help="only this call (repeatable)"
    )
    parser.add_argument("--dtype", action="append", choices=choices["dtype"], help="only this dtype (repeatable)")
    parser.add_argument(
        "--backend", choices=("triton", "interpret", "torch"), help="default: triton on a GPU, interpret elsewhere"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where torch sees a GPU")
    parser.add_argument(
        "--report",
        type=arguments.output_file,
        metavar="FILE",
        help="also write a Markdown report to FILE, call by call",
    )
    parser.add_argument(
        "--json", type=lambda text: text if text == "-" else arguments.output_file(text), metavar="FILE",
        help="also write every figure to FILE, call by call ('-': to standard output instead of the table)",
    )  # fmt: skip
    parser.add_argument(
        "--compile-only", action="store_true",
        help="compile the tile tables for the architectures of --arch and run nothing; needs no GPU, and fills Triton's cache for one",
    )  # fmt: skip
    parser.add_argument(
        "--arch", type=arguments.architecture, nargs="+", metavar="CC",
        help="with --compile-only: 80 86 89 90 100 120, or sm_90 (default: all)",
    )  # fmt: skip


def main(args: argparse.Namespace) -> int:
    """Print the table; 1 if a call failed."""
    if args.models:
        return models.main(args.backend, info.require_device(args.device), args.report)
    everything: list[Any] = [*compiled.MATRIX] if args.compile_only else [*CASES, *DRAWS, *(PAIRS if args.all else ())]
    calls = list(_chosen(everything, args))
    if not calls:
        names = ", ".join(repr(x.name) for x in everything if not args.op or x.op in args.op)
        raise ValueError(
            f"nothing is called that: op {args.op}, case {args.case}, dtype {args.dtype}: choose from {names}"
        )
    if args.compile_only:
        return compiled.report(calls, args.arch, args.json)
    launch.selftest_due = False  # this is more than that
    device = info.require_device(args.device)
    backend = args.backend or ("triton" if device.type == "cuda" else "interpret")
    if backend in ("triton", "interpret") and (backend == "triton") != (device.type == "cuda"):
        raise ValueError(f"--backend {backend} does not serve {device.type}: triton is for cuda, interpret for cpu")
    calls.sort(key=lambda call: _far(call[0]))  # last: a wrong offset there would take the process or the GPU down
    table = args.json != "-"
    if backend == "triton":
        said = ahead.compile_here([functools.partial(_uncomputed, item, dtype) for item, dtype in calls])
        if table and said:
            print(said, flush=True)
    if table:
        print(f"{backend} on {device}, torch {torch.__version__}: error / budget (at most 1 passes)\n{HEADER}")
    start, environment = time.perf_counter(), surroundings(backend, device)
    findings: list[Finding] = []

    def report() -> dict[str, Any]:
        return collect(findings, environment, tiles, time.perf_counter() - start, len(calls))

    files = [Growing(args.report, lambda: markdown(report()))]
    files += [Growing(args.json, lambda: as_json(report()))] if table else []
    with _tiles() as tiles:
        try:
            for n, (item, dtype) in enumerate(calls, 1):
                if sys.stderr.isatty():
                    print(
                        f"\r{'compiling and ' if backend == 'triton' else ''}running {n}/{len(calls)}",
                        end="\r",
                        file=sys.stderr,
                    )
                finding = _find(item, dtype, backend, device)
                finding.command = f'tileformer check --op {item.op} --case "{item.name}" --dtype {dtype}' + "".join(
                    f" --{name} {value}"
                    for name, value in (("backend", args.backend), ("device", args.device))
                    if value
                )
                findings.append(finding)
                if table:
                    print(line(finding), flush=True)
                for file in files:
                    file.write()
        finally:
            for file in files:
                file.write(last=True)
    found = report()
    if not table:
        print(as_json(found), end="")
        return 1 if found["failed"] else 0
    for row in found["features"]:
        print(f"{row[0]:<34}", *(f"{cell:<14}" for cell in row[1:]))
    print(summary(found))
    return 1 if found["failed"] else 0


def _uncomputed(item: Case | Draw, dtype: str) -> None:
    """The launches of a call, to be compiled ahead."""
    cpu = torch.device("cpu")
    if isinstance(item, Case):
        results(kernels, item, DTYPES[dtype], cpu, DTYPES[dtype], Memory(cpu))
    else:
        examine_draw(item, dtype, "triton", cpu)


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

    with (
        mock.patch.object(launch, "_run", noting(launch._run)),
        mock.patch.object(interpreter, "run", noting(interpreter.run)),
    ):
        yield seen


def _chosen(everything: list[Any], args: argparse.Namespace) -> Iterator[tuple[Any, str]]:
    for item in everything:
        if (
            (args.quick and not item.quick)
            or (args.op and item.op not in args.op)
            or (args.case and item.name not in args.case)
        ):
            continue
        dtypes = [d for d in item.dtypes if not args.dtype or d in args.dtype]
        if args.quick and not args.dtype and not args.compile_only:
            dtypes = ([d for d in dtypes if d == "bf16"] or dtypes)[:1]
        yield from ((item, dtype) for dtype in dtypes)
