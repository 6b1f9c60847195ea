"""Search tiles on a GPU, each candidate checked before it is timed, and try the switches that no one could decide without one.

`search` prints rows of kernels/attention/tiles.py to paste. `EXPERIMENTS` is the list of the first day on a GPU.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import itertools
import statistics
import time
import unittest.mock
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from tileformer import kernels
from tileformer.bench.measure import Bench, Truth, passes
from tileformer.bench.providers import OURS, providers
from tileformer.bench.recording import record
from tileformer.bench.workloads import WORKLOADS, Workload
from tileformer.kernels.attention.tiles import BACKWARD_DKDV, BACKWARD_DQ, FORWARD, family
from tileformer.kernels.launch import arch_of

DRY_ARCH = 90
TABLES = {"FORWARD": (FORWARD, "forward"), "BACKWARD_DQ": (BACKWARD_DQ, "backward"), "BACKWARD_DKDV": (BACKWARD_DKDV, "backward")}
CANDIDATES = {
    "FORWARD": list(itertools.product((64, 128), (32, 64, 128), (4, 8), (2, 3))),
    "BACKWARD_DQ": list(itertools.product((64, 128), (32, 64, 128), (4, 8), (2, 3))),
    "BACKWARD_DKDV": list(itertools.product((32, 64), (64, 128), (4, 8), (1, 2, 3))),
}
FEATURES = {"plain": "D {} causal T 4096", "mask": "D {} boolean mask", "dropout": "D {} dropout"}


def named(op: str, name: str) -> Workload:
    """The workload of that name."""
    return next(w for w in WORKLOADS if (w.op, w.name) == (op, name))


@contextlib.contextmanager
def ours(bench: Bench) -> Iterator[None]:
    """Our kernels; in a dry run compiled for DRY_ARCH and not executed. A step to a smaller tile is an error."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("error", UserWarning)
        if bench.clock.dry:
            stack.enter_context(record(DRY_ARCH))
            stack.enter_context(kernels.use_backend("triton"))
        yield


def trial(bench: Bench, workload: Workload, mode: str) -> tuple[float, str]:
    """Median ms of ours now, and what is wrong with it ("" if nothing; then, and only then, the time counts)."""
    workload = bench.sized(workload)
    tensors, options = workload.inputs(bench.device, bench.dtype)
    truth = Truth(workload, tensors, options)
    call = providers(workload.op)[OURS](workload)
    try:
        with ours(bench):
            ratios, _ = truth.ratios(call, tensors, options)
            if max(ratios.values()) > 1.0 and not bench.clock.dry:
                return float("inf"), f"error is {max(ratios.values()):.3g} times its budget"
            return statistics.median(bench.clock.rounds(*passes(workload, call, tensors, options, mode))) * 1e3, ""
    except Exception as error:
        if bench.clock.dry:
            raise
        return float("inf"), " ".join(f"{type(error).__name__}: {error}".split())[:160]


def search(bench: Bench, sizes: tuple[int, ...] = (64, 128)) -> list[dict[str, Any]]:
    """Print and return the fastest right tile of each attention kernel, head size and feature, as rows to paste."""
    with ours(bench):
        arch = family(arch_of(bench.clock.flush))
    found = []
    for table_name, (table, mode) in TABLES.items():
        rows = table[arch]
        for feature, workload_name in FEATURES.items():
            best = dict(rows[feature])
            for size in sizes:
                candidates = list(dict.fromkeys([rows[feature][size], *CANDIDATES[table_name]]))
                for row in candidates[:2] if bench.clock.dry else candidates:
                    if time.monotonic() > bench.deadline:
                        print(f"time is up: {table_name} {feature} {size} not finished")
                        break
                    with unittest.mock.patch.dict(rows[feature], {size: row}):
                        ms, problem = trial(bench, named("attention", workload_name.format(size)), mode)
                    found.append(dict(table=table_name, arch=arch, feature=feature, size=size, row=row, ms=ms, problem=problem))
                    print(f"{table_name} {feature} {size} {row}: {problem or f'{ms:.4f} ms'}", flush=True)
                right = [f for f in found if (f["table"], f["feature"], f["size"], f["problem"]) == (table_name, feature, size, "")]
                if right:
                    best[size] = min(right, key=lambda f: f["ms"])["row"]
            print(f'paste into {table_name}[{arch}]:\n        "{feature}": {best},', flush=True)
    return found


@contextlib.contextmanager
def changed(op: str, kernel: str, **change: int) -> Iterator[None]:
    """Inside, launches of `kernel` take the first tile of their table with `change`, and no other.

    Raises:
        RuntimeError: at the end, if the kernel was not launched: the experiment would have compared the same with the same.
    """
    module = importlib.import_module(f"tileformer.kernels.{op}")
    original, count = module.launch, 0

    def launch(function: Any, grid: Any, like: Any, args: Any, flags: Any, tiles: Any) -> Any:
        nonlocal count
        if function.fn.__name__ == kernel:
            count, tiles = count + 1, [{**tiles[0], **change}]
        return original(function, grid, like, args, flags, tiles)

    with unittest.mock.patch.object(module, "launch", launch):
        yield
    if not count:
        raise RuntimeError(f"{kernel} was not launched: {op} has another kernel now")


def row_of(table: Any, size: int, row: tuple[int, int, int, int]) -> Callable[[Bench], AbstractContextManager[Any]]:
    """A tile of the plain feature, in force inside."""

    def context(bench: Bench) -> AbstractContextManager[Any]:
        with ours(bench):
            return unittest.mock.patch.dict(table[family(arch_of(bench.clock.flush))]["plain"], {size: row})

    return context


def programs(count: int) -> Callable[[Bench], AbstractContextManager[Any]]:
    """So many programs a multiprocessor share the rows of layer norm's backward."""
    module = importlib.import_module("tileformer.kernels.layer_norm")
    default = getattr(module, "_programs")  # noqa: B009
    return lambda bench: unittest.mock.patch.object(module, "_programs", lambda x: default(x) // 2 * count)


@dataclasses.dataclass(frozen=True)
class Experiment:
    """One question for a GPU: variants of a call, the default first. Without variants `reason` says what the kernels lack."""

    question: str
    workload: tuple[str, str] = ("", "")
    mode: str = "forward"
    variants: dict[str, Callable[[Bench], AbstractContextManager[Any]]] = dataclasses.field(default_factory=dict)
    reason: str = ""


def _variants(op: str, kernel: str, name: str, values: tuple[int, ...]) -> dict[str, Any]:
    return {f"{name}={x}": lambda bench, x=x: changed(op, kernel, **{name: x}) for x in values}


_FWD, _LN_FWD, _LN_BWD = "_attention_fwd_kernel", "_layer_norm_fwd_kernel", "_layer_norm_bwd_kernel"
EXPERIMENTS = [
    Experiment("1 every kernel against float64", reason="the parts self-test and check of this report"),
    Experiment("2 D 128: descriptors (TMA) on or off", reason="the kernels load through pointers only"),
    Experiment(
        "3 D 64 full forward: 128x64 with 4 warps (two programs a multiprocessor) or 128x128 with 8", ("attention", "D 64 full T 4096"),
        "forward", {str(row): row_of(FORWARD, 64, row) for row in ((128, 64, 4, 3), (128, 128, 8, 3), (128, 128, 8, 2))},
    ),
    Experiment(
        "4 D 128 dk, dv: 64x128 or 64x64, 2 or 3 stages", ("attention", "D 128 causal T 4096"), "backward",
        {str(row): row_of(BACKWARD_DKDV, 128, row) for row in ((64, 128, 8, 2), (64, 64, 8, 2), (64, 64, 8, 3), (32, 64, 8, 2))},
    ),
    Experiment("5 sections of heads that share the L2 cache", reason="the grid has one order: heads one by one, the longest tiles first"),
    Experiment("6a layer norm forward: rows a program", ("layer_norm", "rows N 1024"), "forward", _variants("layer_norm", _LN_FWD, "BLOCK_R", (1, 2, 4, 8))),
    Experiment("6b layer norm backward: programs a multiprocessor", ("layer_norm", "rows N 1024"), "backward", {f"{k} a multiprocessor": programs(k) for k in (1, 2, 4)}),
    Experiment("6c layer norm backward: stages", ("layer_norm", "rows N 4096"), "backward", _variants("layer_norm", _LN_BWD, "num_stages", (1, 2, 3))),
    Experiment(
        "7 cross-entropy: warps", ("cross_entropy", "classes V 32000"), "forward",
        _variants("cross_entropy", "_cross_entropy_fwd_kernel", "num_warps", (4, 8, 16, 32)),
    ),
    Experiment("8 decoding: parts of the keys", ("attention", "D 128 decode"), "forward", {"one program a head": lambda bench: nullcontext()}),
    Experiment("9 backward with atomics, D 64", reason="the backward is split in two launches, without atomics"),
    Experiment("10 lazy rescaling on sm_100", reason="the forward always rescales"),
    Experiment("11 warp specialisation on sm_100", reason="not asked for in the kernels' loops"),
    Experiment("12a at most so many registers, D 64 full", ("attention", "D 64 full T 4096"), "forward", _variants("attention", _FWD, "maxnreg", (255, 168, 128))),
    Experiment("12b at most so many registers, D 128 full", ("attention", "D 128 full T 4096"), "forward", _variants("attention", _FWD, "maxnreg", (255, 168, 128))),
]  # fmt: skip


def experiments(bench: Bench, sample: int = 1) -> list[dict[str, Any]]:
    """Run every `sample`th experiment; print and return a row a variant: ms, and its time over the shipped kernel's."""
    found: list[dict[str, Any]] = []
    for experiment in EXPERIMENTS[::sample]:
        print(f"{experiment.question}{': ' + experiment.reason if experiment.reason else ''}", flush=True)
        variants = {"as shipped": lambda bench: nullcontext(), **experiment.variants} if experiment.variants else {}
        if not variants:
            found.append(dict(question=experiment.question, variant="", ms=None, ratio=None, problem=experiment.reason))
        shipped = 0.0
        for label, context in variants.items():
            if time.monotonic() > bench.deadline:
                print("time is up")
                return found
            try:
                with context(bench):
                    ms, problem = trial(bench, named(*experiment.workload), experiment.mode)
            except RuntimeError as error:
                if bench.clock.dry:
                    raise
                ms, problem = float("inf"), str(error)
            shipped = shipped or ms
            row = dict(
                question=experiment.question, variant=label, ms=None if problem else ms, ratio=None if problem else ms / shipped, problem=problem
            )
            found.append(row)
            print(f"    {label}: {problem or f'{ms:.4f} ms, {ms / shipped:.3f} of the shipped time'}", flush=True)
    return found
