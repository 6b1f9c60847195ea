"""Compile the library's calls for GPUs that need not be there, and judge what the compiler made of them.

The calls of bench/calls/matrix.py go through the public ops, so tiles are those of a real launch. A kernel passes when
no register spills (its stack is empty), its shared memory fits, its 16-bit dots became tensor-core instructions, and
attention's main loops load no rows element by element.
"""

import re
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import triton

from tileformer import kernels
from tileformer.bench.calls import DTYPES, Call, differentiate, function_of, leaves_of
from tileformer.bench.recording import ARCHITECTURES, SHARED, record
from tileformer.bench.static.figures import exact, per_tensor
from tileformer.bench.tables import Column, Growing, as_json, head, line, printer

TABLE = [
    Column("sm", "arch", "<4"),
    Column("kernel", "kernel", "<28"),
    Column("call", "workload", "<20"),
    Column("dtype", "dtype", "<5"),
    Column("regs", "registers", ">4"),
    Column("stack", "stack", ">5"),
    Column("shared", "shared", ">6"),
    Column("problem", "problem"),
]

# Accepted stack bytes a thread, by (dtype, kernel, head size from). float32 dots beyond 128 columns hold three operands
# of 16 x 256 and an accumulator or two, and no smaller tile exists (Triton's dots start at 16 x 16). The others are a
# few registers at head sizes where the next smaller tile would double the traffic.
ALLOWED_STACK = {
    ("fp32", "_attention_fwd_kernel", 0): 16,
    ("fp32", "_attention_fwd_kernel", 160): 32,
    ("fp32", "_attention_bwd_dq_kernel", 0): 24,  # 16 but for head sizes 80 and 96 on sm_120
    ("fp32", "_attention_bwd_dq_kernel", 160): 320,
    ("fp32", "_attention_bwd_dkdv_kernel", 160): 248,
    ("bf16", "_attention_bwd_dq_kernel", 0): 24,
    ("bf16", "_attention_bwd_dq_kernel", 256): 32,
    ("bf16", "_attention_bwd_dkdv_kernel", 0): 32,
    ("bf16", "_attention_bwd_dkdv_kernel", 160): 40,  # a bias on sm_86, 89 and 120 alone
    ("fp32", "_attention_bwd_dkdv_kernel", 0): 16,
    ("bf16", "_attention_fwd_kernel", 0): 32,  # 24 but for head size 32 on sm_86 and sm_89
    ("bf16", "_attention_weights_kernel", 256): 8,
    ("bf16", "_attention_bwd_bias_kernel", 256): 16,  # on sm_120 alone
    ("bf16", "_attention_fwd_kernel", 256): 32,
    ("fp32", "_decode_split_kernel", 0): 8,  # head size 16 on sm_80 alone
    ("bf16", "_decode_split_kernel", 128): 8,  # all features at once, on sm_86 and sm_89 alone
}
if triton.__version__.startswith("3.8."):
    ALLOWED_STACK["bf16", "_cross_entropy_fwd_kernel", 0] = 8  # two registers, on sm_90 alone
# 16-bit kernels of these (architecture, head size) must not spill: some versions of Triton keep ten registers there.
SPILLS_ANYWAY = 40 if triton.__version__.startswith(("3.6.", "3.9.")) else 0
MUST_NOT_SPILL = {(arch, size): SPILLS_ANYWAY for arch in (80, 90, 100) for size in (64, 128)}


def _allowed_stack(call: Call, dtype: str, arch: int, kernel: str) -> int:
    size = call.sizes.get("D", 0)
    if (arch, size) in MUST_NOT_SPILL and dtype != "fp32":
        return MUST_NOT_SPILL[arch, size]
    fits = lambda of, name, least: (of, name) == (dtype, kernel) and size >= least  # noqa: E731
    return max((stack for key, stack in ALLOWED_STACK.items() if fits(*key)), default=0)


def rows_of(call: Call, dtype: str, arch: int, seen: set[bytes]) -> Iterator[dict[str, Any]]:
    """A row for each kernel of a call that is not in `seen` yet: what it uses, and what is wrong ("" if nothing).

    Forward and backward are compiled for sm_`arch`; nothing runs.
    """
    tensors, options = call.inputs(dtype=DTYPES[dtype])
    leaves = leaves_of(call, tensors)
    of_a_sum = lambda _, x: x.new_ones(()).expand(x.shape)  # noqa: E731
    with record(arch) as launches, kernels.use_backend("triton"), warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*does not fit this device")  # a table's first tile has to fit
        differentiate(function_of(kernels, call.op), leaves, options, of_a_sum)
    for launch in launches:
        binary = launch.binary
        if binary.cubin in seen:
            continue
        seen.add(binary.cubin)
        figures = exact(launch)
        allowed = _allowed_stack(call, dtype, arch, binary.name)
        wants_dots = "attention" in call.op and dtype != "fp32" and not re.search("bounds|merge", binary.name)
        problem = ""
        if figures["stack"] > allowed:
            problem = f"spills: {figures['stack']} bytes of stack, {allowed} allowed"
        elif binary.shared > SHARED[arch]:
            problem = f"shared memory {binary.shared} > {SHARED[arch]}"
        elif wants_dots and not figures["tensor"]:
            problem = "no tensor-core instruction"
        elif re.search("attention_(fwd|bwd_dq|bwd_dkdv)", binary.name) and figures["short_loads"] > 1:
            problem = f"{figures['short_loads']} loads below 32 bits in the main loop"  # one: a small tile of a mask
        yield dict(
            figures,
            **per_tensor(launch),
            op=call.op,
            workload=call.name,
            dtype=dtype,
            allowed_stack=allowed,
            problem=problem,
        )


def main(calls: Iterable[tuple[Call, str]], archs: list[int] | None, output: str | None) -> int:
    """Compile, print a table (or JSON to `output`, "-" for standard output), and return 1 if a kernel has a problem."""
    rows: list[dict[str, Any]] = []
    say = printer(output)
    say(head(TABLE))
    with Growing(output, lambda: as_json(rows)) as file:
        for arch in archs or ARCHITECTURES:
            seen: set[bytes] = set()
            for row in (row for call, dtype in calls for row in rows_of(call, dtype, arch, seen)):
                rows.append(row)
                file.write()
                say(line(TABLE, row))
    problems = sum(bool(row["problem"]) for row in rows)
    say(f"{len(rows)} kernels compiled, {problems} with a problem")
    return int(problems > 0)
