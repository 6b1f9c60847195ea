"""Run a provider's own launch code on a recording driver: the rows of the static table. One process for each provider and architecture.

`python -m tileformer.bench.static.capture` reads a job as JSON from its standard input and writes rows as JSON.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
import sys
import warnings
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from tileformer import kernels
from tileformer.bench.recording import Launch, every_configuration, pretend, record
from tileformer.bench.speed import providers as available
from tileformer.bench.speed.workloads import WORKLOADS, Workload
from tileformer.bench.static import compiled, figures, traffic
from tileformer.bench.static.rates import RATES

OURS = available.OURS
PEERS = {"liger": "liger-kernel", "flag_gems": "flag-gems", "fla": "fla-core"}  # distributions
_PACKAGES = {"liger": "liger_kernel", "flag_gems": "flag_gems", "fla": "fla"}
# Of a sweep, what enters the table: one length of attention, and row lengths on both sides of what one block holds.
POINTS = {"T_k": (4096,), "N": (1024, 4096, 8192, 32768), "V": (32000, 131072)}
DTYPE = torch.bfloat16


def workloads(ops: list[str], provider: str) -> list[Workload]:
    """The sweeps' points for everybody; calls with a mask, dropout or other features for ours."""
    return [
        w for w in WORKLOADS
        if w.op in ops and w.op != "decoder_layer" and (w.sizes.get(w.axis) in POINTS[w.axis] if w.axis else provider == OURS)
    ]  # fmt: skip


def _empty(x: Any) -> Any:
    """Memory that nobody touches, so that a large call costs nothing here; what is not floating is 0."""
    if not isinstance(x, Tensor):
        return x
    return torch.empty(x.shape, dtype=x.dtype) if x.is_floating_point() else torch.zeros(x.shape, dtype=x.dtype)


@dataclasses.dataclass
class Run:
    """A provider's launches of one workload, and the tensors that its caller sees."""

    forward: list[Launch]
    backward: list[Launch]
    inputs: dict[str, Tensor]
    outputs: list[Tensor]


def run(provider: str, workload: Workload, arch: int, count: traffic.Counter | None = None, choose: Any = None) -> Run:
    """Forward and backward of a workload. With `count`, each launch is also interpreted under it, on real numbers."""
    if count:
        tensors, options = workload.inputs("cpu", DTYPE)
    else:
        with FakeTensorMode():
            drawn = workload.inputs("cpu", DTYPE)
        tensors, options = ({name: _empty(x) for name, x in kind.items()} for kind in drawn)
    leaves = {name: x.requires_grad_() for name, x in tensors.items()}
    with contextlib.ExitStack() as stack:
        enter = stack.enter_context
        enter(warnings.catch_warnings())
        warnings.filterwarnings("error", message=".*does not fit this device")  # a table's first tile has to
        enter(kernels.use_backend("triton") if provider == OURS else pretend(arch))
        launches = enter(record(arch, count.launch if count else None))
        if provider != OURS:
            importlib.import_module(_PACKAGES[provider])  # before its tuners are asked for
        call = available.providers(workload.op)[provider](workload)
        enter(every_configuration(choose))
        out = call(leaves, options)
        forward = len(launches)
        given = (torch.randn if count else torch.empty)(out.shape, dtype=out.dtype)
        if count:
            count.phase = "backward"
        gradients = torch.autograd.grad(out, list(leaves.values()), given) if "backward" in workload.modes else ()
    return Run(launches[:forward], launches[forward:], tensors, [out, given, *gradients])


def rows(provider: str, arch: int, op: str, names: list[str]) -> list[dict[str, Any]]:
    """One row for each kernel of each pass of each workload; a row with `skipped` where the provider cannot."""
    found: list[dict[str, Any]] = []
    for workload in workloads([op], provider):
        if workload.name not in names or provider not in available.providers(op):
            continue
        head = dict(provider=provider, op=op, workload=workload.name)
        try:
            launched = run(provider, workload, arch)
        except (
            Exception
        ) as error:  # of a peer: its launch code meets a driver, sizes or versions that it was not written for
            if provider == OURS:
                raise
            found.append(head | dict(arch=arch, skipped=" ".join(f"{type(error).__name__}: {error}".split())[:200]))
            continue
        for mode, launches in (("forward", launched.forward), ("backward", launched.backward)):
            groups = figures.grouped(launches)
            for group, tried in groups:
                choices = [figures.figures(launch, workload, mode, len(groups) == 1) for launch in group]
                found.append(head | {"pass": mode} | figures.best(choices, tried))
    return found


def tables(arch: int, op: str) -> list[dict[str, Any]]:
    """One row for each kernel of each default configuration of ours (bench/static/compiled.py)."""
    seen: set[bytes] = set()
    return [
        dict(row, provider=OURS, excess_stack=max(0, row["stack"] - row["allowed_stack"]))
        for case in compiled.MATRIX if case.op == op for dtype in case.dtypes for row in compiled.judged(case, dtype, arch, seen)
    ]  # fmt: skip


def _countable(workload: Workload) -> Workload:
    """The same call at a size that the interpreter takes in seconds: one key head, or at most 2^20 elements of rows."""
    s = workload.sizes
    if "H" in s:
        return dataclasses.replace(workload, sizes=s | dict(B=1, H=s["H"] // s["H_kv"], H_kv=1))
    return dataclasses.replace(workload, sizes=s | dict(R=min(s["R"], 2**20 // s.get("N", s.get("V", 1)))))


def counted(provider: str, arch: int, op: str, names: list[str], choices: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for each pass: bytes moved and FLOPs done, beside the least; autotuned kernels in the configuration of `choices`."""

    def choose(kernel: str, configuration: Any) -> bool:
        return any(
            row["kernel"] == kernel and row["warps"] == configuration.num_warps
            and all(configuration.kwargs.get(name, size) == size for name, size in row["tile"].items())
            for row in choices
        )  # fmt: skip

    found: list[dict[str, Any]] = []
    for workload in workloads([op], provider):
        if workload.name not in names or not workload.axis or provider not in available.providers(op):
            continue
        small, counter = _countable(workload), traffic.Counter()
        head: dict[str, Any] = dict(provider=provider, op=op, workload=workload.name, arch=arch)
        try:
            done = run(provider, small, arch, counter, choose)
        except Exception as error:
            if provider == OURS:
                raise
            found.append(head | dict(uncounted=" ".join(f"{type(error).__name__}: {error}".split())[:200]))
            continue
        # A gradient may be the tensor that was given (a residual's), or lie in an input's memory: one memory counts once.
        public = {x.untyped_storage().data_ptr(): x for x in [*done.inputs.values(), *done.outputs]}.values()
        for mode in ("forward", "backward"):
            moved = [(x, *counter.bytes(mode, x)) for x in public]
            # A vector of one row (weights) stays in the caches: each of its bytes counts once, of rows each time.
            total = sum(every if x.dim() > 1 else once for x, every, once in moved)
            distinct, least = sum(once for _, _, once in moved), small.bytes(DTYPE, mode)
            row = head | {
                "pass": mode, "bytes_total": total, "bytes_distinct": distinct, "bytes_minimal": least,
                "moved_over_minimal": round(total / least, 4), "distinct_over_minimal": round(distinct / least, 4),
            }  # fmt: skip
            if small.flops(mode):
                row |= dict(
                    flops=counter.dots[mode], flops_over_useful=round(counter.dots[mode] / small.flops(mode), 4)
                )
            found.append(row)
    return found


def main() -> int:
    """Do one job: {"kind": "launches", "tables" or "traffic", "provider", "arch", "op", "workloads", "choices"}."""
    job = json.load(sys.stdin)
    # A peer's host code may read what a kernel was to write and nothing ran: NaN each time, not what the memory held before.
    torch.use_deterministic_algorithms(True, warn_only=True)
    arguments = (job["provider"], job["arch"], job["op"], job["workloads"])
    with contextlib.redirect_stdout(sys.stderr):  # peers print
        if job["kind"] == "tables":
            found = tables(job["arch"], job["op"])
        elif job["kind"] == "traffic":
            found = counted(*arguments, job["choices"])
        else:
            found = rows(*arguments)
            if job["provider"] == OURS and job["arch"] in RATES:  # no autotuner, so nothing to wait for
                found += counted(*arguments, [])
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
