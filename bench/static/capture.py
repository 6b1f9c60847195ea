"""Run a provider's own launch code on a recording driver: the rows of the static table. One process for each provider and architecture.

`python -m tileformer.bench.static.capture` reads a job as JSON from its standard input and writes rows as JSON.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
import warnings
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from tileformer import kernels
from tileformer.bench import compiled
from tileformer.bench import providers as available
from tileformer.bench.recording import Launch, every_configuration, pretend, record
from tileformer.bench.static import figures, traffic
from tileformer.bench.workloads import WORKLOADS, Workload

OURS = available.OURS
PEERS = {"liger": "liger-kernel", "flag_gems": "flag-gems", "fla": "fla-core"}  # distributions
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
        warnings.simplefilter("error" if provider == OURS else "ignore")  # ours: a table's first tile has to fit
        enter(kernels.use_backend("triton") if provider == OURS else pretend(arch))
        launches = enter(record(arch, count.launch if count else None))
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
        except Exception as error:  # of a peer: its launch code meets a driver, sizes or versions that it was not written for
            if provider == OURS:
                raise
            found.append(head | dict(arch=arch, skipped=" ".join(f"{type(error).__name__}: {error}".split())[:200]))
            continue
        for mode, launches in (("forward", launched.forward), ("backward", launched.backward)):
            groups = figures.grouped(launches)
            for group in groups:
                choices = [figures.figures(launch, workload, mode, len(groups) == 1) for launch in group]
                found.append(head | {"pass": mode} | figures.best(choices))
    return found


def tables(arch: int, op: str) -> list[dict[str, Any]]:
    """One row for each kernel of each default configuration of ours (bench/compiled.py)."""
    seen: set[bytes] = set()
    return [
        dict(row, provider=OURS, excess_stack=max(0, row["stack"] - row["allowed_stack"]))
        for case in compiled.MATRIX if case.op == op for dtype in case.dtypes for row in compiled.judged(case, dtype, arch, seen)
    ]  # fmt: skip


def main() -> int:
    """Do one job: {"provider" (or "tables"), "arch", "op", "workloads"}."""
    job = json.load(sys.stdin)
    with contextlib.redirect_stdout(sys.stderr):  # peers print
        if job["provider"] == "tables":
            found = tables(job["arch"], job["op"])
        else:
            found = rows(job["provider"], job["arch"], job["op"], job["workloads"])
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
