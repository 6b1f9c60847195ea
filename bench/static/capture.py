"""Run a provider's own launch code on a recording driver: the rows of the static table.

`python -m tileformer.bench.static.capture` reads a job (one provider and architecture) as JSON and writes rows as JSON.
"""

import contextlib
import dataclasses
import importlib
import json
import sys
import warnings
from typing import Any

import torch
from torch import Tensor

from tileformer import kernels
from tileformer.bench.calls import Call, Tensors, leaves_of
from tileformer.bench.calls.matrix import MATRIX
from tileformer.bench.calls.providers import OURS, providers
from tileformer.bench.calls.workloads import WORKLOADS
from tileformer.bench.recording import Launch, every_configuration, pretend, record
from tileformer.bench.static import compiled, figures, traffic
from tileformer.bench.static.rates import RATES

Row = dict[str, Any]
PEERS = {"liger": "liger-kernel", "flag_gems": "flag-gems", "fla": "fla-core"}  # distributions
_PACKAGES = {"liger": "liger_kernel", "flag_gems": "flag_gems", "fla": "fla"}
# Of a sweep, what enters the table: one length of attention, and row lengths on both sides of what one block holds.
POINTS = {"T_k": (4096,), "T_q": (4096,), "N": (1024, 4096, 8192, 32768), "V": (32000, 131072)}
DTYPE = torch.bfloat16


def workloads(ops: list[str], provider: str) -> list[Call]:
    """The sweeps' points for everybody; calls with a mask, dropout or other features for ours."""
    return [
        call for call in WORKLOADS
        if call.op in ops and call.op != "decoder_layer"
        and (call.sizes.get(call.axis) in POINTS[call.axis] if call.axis else provider == OURS)
    ]  # fmt: skip


@dataclasses.dataclass
class Run:
    """A provider's launches of one workload by pass, and the tensors that its caller sees."""

    passes: dict[str, list[Launch]]
    inputs: Tensors
    outputs: list[Tensor]


def run(provider: str, call: Call, arch: int, count: traffic.Counter | None = None, choose: Any = None) -> Run:
    """Forward and backward of a workload. With `count`, each launch is also interpreted under it, on real numbers."""
    tensors, options = call.inputs("cpu", DTYPE) if count else call.untouched_inputs(DTYPE)
    leaves = leaves_of(call, tensors)
    with contextlib.ExitStack() as stack:
        enter = stack.enter_context
        enter(warnings.catch_warnings())
        warnings.filterwarnings("error", message=".*does not fit this device")  # a table's first tile has to
        enter(kernels.use_backend("triton") if provider == OURS else pretend(arch))
        launches = enter(record(arch, count.launch if count else None))
        if provider != OURS:
            importlib.import_module(_PACKAGES[provider])  # before its tuners are asked for
        function = providers(call.op)[provider](call)
        enter(every_configuration(choose))
        out = function(leaves, options)
        forward = len(launches)
        outs = list(out) if isinstance(out, tuple) else [out]
        grad_outputs = [(torch.randn if count else torch.empty)(x.shape, dtype=x.dtype) for x in outs]
        if count:
            count.phase = "backward"
        gradients = torch.autograd.grad(outs, list(leaves.values()), grad_outputs) if "backward" in call.modes else ()
    return Run(
        dict(forward=launches[:forward], backward=launches[forward:]), tensors, [*outs, *grad_outputs, *gradients]
    )


def _attempt(provider: str, call: Call, arch: int, missing: str, *counted: Any) -> tuple[Run | None, Row]:
    """A run and the head of its rows, where `missing` says why a peer failed: it was not written for this driver."""
    head: Row = dict(provider=provider, op=call.op, workload=call.name, arch=arch)
    try:
        return run(provider, call, arch, *counted), head
    except Exception as error:
        if provider == OURS:
            raise
        return None, head | {missing: " ".join(f"{type(error).__name__}: {error}".split())[:200]}


def _asked(provider: str, op: str, names: list[str]) -> list[Call]:
    return [call for call in workloads([op], provider) if call.name in names and provider in providers(op)]


def rows(provider: str, arch: int, op: str, names: list[str]) -> list[Row]:
    """One row for each kernel of each pass of each workload; a row with `skipped` where the provider cannot."""
    result: list[Row] = []
    for call in _asked(provider, op, names):
        launched, head = _attempt(provider, call, arch, "skipped")
        if launched is None:
            result.append(head)
            continue
        for mode, launches in launched.passes.items():
            for group, tried in (groups := figures.grouped(launches)):
                choices = [figures.figures(launch, call, mode, len(groups) == 1) for launch in group]
                result.append(head | {"pass": mode} | figures.best(choices, tried))
    return result


def tables(arch: int, op: str) -> list[Row]:
    """One row for each kernel of each default configuration of ours (bench/calls/matrix.py)."""
    seen: set[bytes] = set()
    calls = [(call, dtype, arch, seen) for call in MATRIX if call.op == op for dtype in call.dtypes]
    judged = (row for call in calls for row in compiled.rows_of(*call))
    return [dict(row, provider=OURS, excess_stack=max(0, row["stack"] - row["allowed_stack"])) for row in judged]


def _countable(call: Call) -> Call:
    """The same call at a size that the interpreter takes in seconds: one key head, or at most 2^20 elements of rows."""
    s = call.sizes
    if "H" in s:
        heads = dict(H=s["H"] // s["H_kv"], H_kv=1) if "H_kv" in s else dict(H=2)
        return dataclasses.replace(call, sizes={**s, "B": 1, **heads})
    return dataclasses.replace(call, sizes={**s, "R": min(s["R"], 2**20 // s.get("N", s.get("V", 1)))})


def counted(provider: str, arch: int, op: str, names: list[str], choices: list[Row]) -> list[Row]:
    """One row for each pass: bytes moved and FLOPs done, beside the least; autotuned kernels as in `choices`."""

    def choose(kernel: str, configuration: Any) -> bool:
        return any(
            row["kernel"] == kernel and row["warps"] == configuration.num_warps
            and all(configuration.kwargs.get(name, size) == size for name, size in row["tile"].items())
            for row in choices
        )  # fmt: skip

    result: list[dict[str, Any]] = []
    for call in (call for call in _asked(provider, op, names) if call.axis):
        small, counter = _countable(call), traffic.Counter()
        done, head = _attempt(provider, small, arch, "uncounted", counter, choose)
        if done is None:
            result.append(head)
            continue
        # A gradient may lie in an input's memory (a residual's): one memory counts once.
        public = {x.untyped_storage().data_ptr(): x for x in [*done.inputs.values(), *done.outputs]}.values()
        for mode in done.passes:
            moved = [(x, *counter.bytes(mode, x)) for x in public]
            # A vector of one row (weights) stays in the caches: each of its bytes counts once, of rows each time.
            total = sum(every if x.dim() > 1 else once for x, every, once in moved)
            distinct, least = sum(once for _, _, once in moved), small.bytes(DTYPE, mode)
            row = head | {
                "pass": mode, "bytes_total": total, "bytes_distinct": distinct, "bytes_minimal": least,
                "moved_over_minimal": round(total / least, 4), "distinct_over_minimal": round(distinct / least, 4),
            }  # fmt: skip
            if useful := small.flops(mode):
                row |= dict(flops=counter.dots[mode], flops_over_useful=round(counter.dots[mode] / useful, 4))
            result.append(row)
    return result


def main() -> int:
    """Do one job: {"kind": "launches", "tables" or "traffic", "provider", "arch", "op", "workloads", "choices"}."""
    job = json.load(sys.stdin)
    # A peer's host code may read what a kernel was to write and nothing ran: NaN each time, not what was there before.
    torch.use_deterministic_algorithms(True, warn_only=True)
    arguments = (job["provider"], job["arch"], job["op"], job["workloads"])
    with contextlib.redirect_stdout(sys.stderr):  # peers print
        if job["kind"] == "tables":
            result = tables(job["arch"], job["op"])
        elif job["kind"] == "traffic":
            result = counted(*arguments, job["choices"])
        else:
            result = rows(*arguments)
            if job["provider"] == OURS and job["arch"] in RATES:  # no autotuner, so nothing to wait for
                result += counted(*arguments, [])
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
