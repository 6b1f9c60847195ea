"""Search tiles on a GPU, each candidate checked before it is timed, and try switches that only a GPU can decide.

`search` prints rows of kernels/attention/tiles.py to paste. `EXPERIMENTS` is the list of the first day on a GPU.
"""

import contextlib
import dataclasses
import functools
import importlib
import itertools
import statistics
import time
import unittest.mock
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from tileformer.bench import ahead
from tileformer.bench.calls import Call
from tileformer.bench.calls.providers import OURS, providers
from tileformer.bench.calls.workloads import WORKLOADS
from tileformer.bench.speed.measure import DRY, Bench, Truth, ours, passes
from tileformer.bench.static.tiles import TABLES
from tileformer.kernels import device
from tileformer.kernels.attention.tiles import FORWARD, Row, family, tiles_for
from tileformer.kernels.launch import Launch

Keep = Callable[[dict[str, Any]], None]
Context = Callable[[Bench], contextlib.AbstractContextManager[Any]]
_QUERY_ROWS: list[Row] = list(itertools.product((64, 128), (32, 64, 128), (4, 8), (2, 3)))
CANDIDATES: dict[str, list[Row]] = {
    "FORWARD": [*_QUERY_ROWS, (128, 32, 4, 2, 168), (128, 32, 4, 3, 168)],
    "BACKWARD_DQ": _QUERY_ROWS,
    "BACKWARD_DKDV": list(itertools.product((32, 64), (64, 128), (4, 8), (2, 3, 4))),
}
FEATURES = {
    "plain": "D {} causal T 4096",
    "overlap": "D {} causal T 4096",
    "mask": "D {} boolean mask",
    "dropout": "D {} dropout",
}


def named(op: str, name: str) -> Call:
    """The workload of that name."""
    return next(call for call in WORKLOADS if (call.op, call.name) == (op, name))


class Trial:
    """One workload and mode of ours, to be checked and timed under several tiles."""

    def __init__(self, bench: Bench, call: Call, mode: str) -> None:
        self.bench, self.call, self.mode = bench, bench.sized(call), mode
        self.inputs = self.call.inputs(bench.device, bench.dtype)
        self.truth = Truth(self.call, *self.inputs)

    def __call__(self) -> tuple[float, str]:
        """Median ms of the kernels as they are now, and what is wrong with them ("" if nothing)."""
        function, dry = providers(self.call.op)[OURS](self.call), self.bench.clock.dry
        try:
            with ours(dry):
                worst = max(self.truth.errors(function, *self.inputs)[0].values())
                if worst > 1.0 and not dry:  # a dry run executes nothing that could be right
                    return float("inf"), f"error is {worst:.3g} times its budget"
                seconds = self.bench.clock.rounds(*passes(self.call, function, *self.inputs, self.mode))
                return statistics.median(seconds) * 1e3, ""
        except Exception as error:
            if dry:
                raise
            return float("inf"), " ".join(f"{type(error).__name__}: {error}".split())[:160]


def attempt(trial: Trial, changes: contextlib.AbstractContextManager[Any]) -> tuple[float, str]:
    """The trial under `changes`. A kernel that broke before the changed one hides nothing, and ends no search."""
    ms, problem = float("inf"), ""
    try:
        with changes:
            ms, problem = trial()
    except RuntimeError as error:
        if not problem:
            raise
        problem = f"{problem}; {error}"
    return ms, problem


def search(
    bench: Bench, tried: list[dict[str, Any]], keep: Keep, only: str = "", sizes: tuple[int, ...] = (64, 128)
) -> None:
    """Print the fastest right tile of each attention kernel, feature and head size, as rows to paste.

    Trials of `tried` are not repeated; `keep` is given each new row, and adds it there. `only` is a part of the names
    to search, such as "BACKWARD_DQ plain 64".
    """
    with ours(bench.clock.dry):
        arch = family(device.arch_of(bench.clock.flush))
    done = {(r["table"], r["arch"], r["feature"], r["size"], tuple(r["row"])) for r in tried}
    wanted: dict[tuple[str, int], list[Iterator[tuple[str, Row]]]] = {}
    for feature, size, name in itertools.product(FEATURES, sizes, TABLES):
        if (arch, feature) not in TABLES[name][0] or only not in f"{name} {feature} {size}":
            continue
        shipped = TABLES[name][0][arch, feature].get(size, CANDIDATES[name][0])
        rows = list(dict.fromkeys([shipped, *CANDIDATES[name]]))[: 2 if bench.clock.dry else None]
        left = [(name, row) for row in rows if (name, arch, feature, size, row) not in done]
        wanted.setdefault((feature, size), []).append(iter(left))
    if not wanted:
        raise ValueError(f"no table, feature and head size has {only!r} in its name, like 'BACKWARD_DQ plain 64'")
    for (feature, size), lists in wanted.items():
        # A row of each kernel in turn: where time is short, forward and backward have had the same share of it.
        turns = [trial for turn in itertools.zip_longest(*lists) for trial in turn if trial]
        if turns and time.monotonic() < bench.deadline:
            call = named("attention", FEATURES[feature].format(size))
            compile_ahead(bench, [(call, tile(bench, name, feature, size, row)) for name, row in turns])
            trials = {mode: Trial(bench, call, mode) for mode in dict.fromkeys(TABLES[n][2] for n, _ in turns)}
        for name, row in turns:
            if time.monotonic() > bench.deadline:
                print(f"time is up: {feature} {size} is not finished")
                break
            ms, problem = attempt(trials[TABLES[name][2]], tile(bench, name, feature, size, row))
            trial = dict(table=name, arch=arch, feature=feature, size=size, row=row)
            keep(trial | dict(ms=None if problem else ms, problem=problem))
            figure = DRY if bench.clock.dry else f"{ms:.4f} ms"
            print(f"{name} {feature} {size} {row}: {problem or figure}", flush=True)
    here = [row for row in tried if row["arch"] == arch]
    for name, feature in dict.fromkeys((row["table"], row["feature"]) for row in here):
        best = dict(TABLES[name][0][arch, feature])
        right = [row for row in here if (row["table"], row["feature"]) == (name, feature) and not row["problem"]]
        for size in {row["size"] for row in right}:
            fastest = min((row for row in right if row["size"] == size), key=lambda row: row["ms"])
            best[size] = tuple(fastest["row"])
        print(f'paste into {name}:\n    ({arch}, "{feature}"): {best},', flush=True)


def compile_ahead(bench: Bench, trials: Iterable[tuple[Call, contextlib.AbstractContextManager[Any]]]) -> None:
    """Compile what our kernels will launch in the trials, calls under changes, on all cores."""

    def launches(call: Call, changes: contextlib.AbstractContextManager[Any]) -> None:
        with changes:
            ahead.launches_of(providers(call.op)[OURS](call), call, bench.dtype)

    of_trials = [functools.partial(launches, *trial) for trial in trials]
    if bench.device.type == "cuda" and (said := ahead.compile_here(of_trials)):
        print(said, flush=True)


@contextlib.contextmanager
def changed(kernel: str, **change: int) -> Iterator[None]:
    """Inside, launches of `kernel` take the first tile of their table with `change`, and no other.

    RuntimeError at the end if it was not launched: the experiment would have compared the same with the same.
    """
    original, count = Launch.__call__, 0

    def instead(launch: Launch, *tensors: Any) -> None:
        nonlocal count
        if launch.kernel.fn.__name__ == kernel:
            count += 1
            tiles = [{**launch.tiles[0], **change}]
            launch = Launch(launch.kernel, launch.grid, launch.flags, tiles, launch.scalars, launch.arrange)
        original(launch, *tensors)

    with unittest.mock.patch.object(Launch, "__call__", instead):
        yield
    if not count:
        raise RuntimeError(f"{kernel} was not launched: the op has another kernel now")


def tile(bench: Bench, name: str, feature: str, size: int, row: Row) -> contextlib.AbstractContextManager[None]:
    """Inside, an attention kernel uses this row of its table."""
    table, kernel, _ = TABLES[name]
    with ours(bench.clock.dry):
        arch = device.arch_of(bench.clock.flush)
    with unittest.mock.patch.dict(table[family(arch), feature], {size: row}):
        usual = {"maxnreg": 255, "OVERLAP": 0} if table is FORWARD else {"maxnreg": 255}
        return changed(kernel, **usual | tiles_for(table, arch, size, bench.dtype, feature)[0])


def programs(count: int) -> Context:
    """So many programs a multiprocessor share the rows of layer norm's backward."""
    module = importlib.import_module("tileformer.kernels.layer_norm")
    shipped = module.programs_for  # two a multiprocessor
    return lambda bench: unittest.mock.patch.object(module, "programs_for", lambda x: shipped(x) * count // 2)


def sections(size: int) -> Context:
    """Heads whose keys and values have so many bytes together go through the grid side by side."""
    module = importlib.import_module("tileformer.kernels.attention.launchers")
    return lambda bench: unittest.mock.patch.object(module, "SECTION_BYTES", size)


@dataclasses.dataclass(frozen=True)
class Experiment:
    """One question for a GPU: variants of a call, the default first; without variants the `reason` why not."""

    question: str
    workload: tuple[str, str] = ("", "")
    mode: str = "forward"
    variants: dict[str, Context] = dataclasses.field(default_factory=dict)
    reason: str = ""


def _options(kernel: str, name: str, *values: int) -> dict[str, Context]:
    return {f"{name} {x}": lambda bench, x=x: changed(kernel, **{name: x}) for x in values}  # type: ignore[misc]


def _tiles(name: str, size: int, *rows: Row) -> dict[str, Context]:
    return {str(row): lambda bench, row=row: tile(bench, name, "plain", size, row) for row in rows}  # type: ignore[misc]


_FWD, _LN_FWD, _LN_BWD = "_attention_fwd_kernel", "_layer_norm_fwd_kernel", "_layer_norm_bwd_kernel"
_D64, _D128, _CAUSAL = (("attention", f"D {name} T 4096") for name in ("64 full", "128 full", "128 causal"))
_NORM, _WIDE_NORM = (("layer_norm", f"rows N {n}") for n in (1024, 4096))
_LOSS = "cross_entropy", "classes V 32000"
EXPERIMENTS = [
    Experiment("1 every kernel against float64", reason="the parts self-test and check of gpu-day"),
    Experiment("2 D 128 forward: ahead and through descriptors (TMA), or not", _D128, "forward",
               _options(_FWD, "OVERLAP", 0, 1)),
    Experiment("3 D 64 forward: 128x64, 4 warps (two programs a multiprocessor) or 128x128, 8 warps", _D64, "forward",
               _tiles("FORWARD", 64, (128, 64, 4, 3), (128, 128, 8, 3), (128, 128, 8, 2))),
    Experiment("4 D 128 dk, dv: 64x128 or 64x64, 2 or 3 stages", _CAUSAL, "backward",
               _tiles("BACKWARD_DKDV", 128, (64, 128, 8, 2), (64, 64, 8, 2), (64, 64, 8, 3), (32, 64, 8, 2))),
    Experiment("5 sections of heads that share the L2 cache: bytes of keys and values", _CAUSAL, "forward",
               {f"{n >> 20} MiB": sections(n) for n in (1 << 20, 1 << 24, 1 << 40)}),
    Experiment("6a layer norm forward: rows a program", _NORM, "forward", _options(_LN_FWD, "BLOCK_R", 1, 2, 4, 8)),
    Experiment("6b layer norm backward: programs a multiprocessor", _NORM, "backward",
               {str(k): programs(k) for k in (1, 2, 4)}),
    Experiment("6c layer norm backward: stages", _WIDE_NORM, "backward", _options(_LN_BWD, "num_stages", 1, 2, 3)),
    Experiment("7 cross-entropy forward: warps", _LOSS, "forward",
               _options("_cross_entropy_fwd_kernel", "num_warps", 4, 8, 16, 32)),
    Experiment("8 decoding: parts of the keys", reason="no kernel splits the keys: see the workloads named decode"),
    Experiment("9 D 64 backward with atomics", reason="the backward is two launches without atomics"),
    Experiment("10 lazy rescaling on sm_100", reason="the forward always rescales"),
    Experiment("11 warp specialisation on sm_100", reason="the kernels' loops do not ask for it"),
    Experiment("12a D 64 forward: at most so many registers", _D64, "forward",
               _options(_FWD, "maxnreg", 255, 168, 128)),
    Experiment("12b D 128 forward: at most so many registers", _D128, "forward",
               _options(_FWD, "maxnreg", 255, 168, 128)),
]  # fmt: skip


def experiments(bench: Bench, tried: list[dict[str, Any]], keep: Keep, every: int = 1) -> None:
    """Run every so manieth experiment: a row a variant with its ms, and its time over the shipped kernel's.

    A question that has all of its variants in `tried` is not asked again; `keep` adds each new row there.
    """
    chosen: list[tuple[Experiment, list[str]]] = []
    for experiment in [e for e in EXPERIMENTS if not e.variants] + [e for e in EXPERIMENTS if e.variants][::every]:
        labels = ["as shipped", *experiment.variants] if experiment.variants else [""]
        labels = labels[:: max(1, len(labels) - 1) if bench.clock.dry else 1]  # dry: the first and the last
        if not {(experiment.question, label) for label in labels} <= {(r["question"], r["variant"]) for r in tried}:
            chosen.append((experiment, labels))
    asked = {experiment.question for experiment, _ in chosen}
    tried[:] = [row for row in tried if row["question"] not in asked]  # what was stopped in the middle is asked again
    calls = [(named(*e.workload), _variant(e, label, bench)) for e, labels in chosen for label in labels if label]
    compile_ahead(bench, calls)
    for experiment, labels in chosen:
        row = dict(question=experiment.question, variant="", ms=None, ratio=None, problem=experiment.reason)
        print(f"{experiment.question}{': ' + experiment.reason if experiment.reason else ''}", flush=True)
        if not experiment.variants:
            keep(row)
            continue
        if time.monotonic() > bench.deadline:
            print("time is up")
            return
        trial, shipped = Trial(bench, named(*experiment.workload), experiment.mode), 0.0
        for label in labels:
            ms, problem = attempt(trial, _variant(experiment, label, bench))
            shipped = shipped or ms
            times = dict(ms=None, ratio=None) if problem else dict(ms=ms, ratio=ms / shipped)
            keep(row | dict(variant=label, problem=problem) | times)
            figures = DRY if bench.clock.dry else f"{ms:.4f} ms, {ms / shipped:.3f} of the time as shipped"
            print(f"    {label}: {problem or figures}", flush=True)


def _variant(experiment: Experiment, label: str, bench: Bench) -> contextlib.AbstractContextManager[Any]:
    return experiment.variants[label](bench) if label in experiment.variants else contextlib.nullcontext()
