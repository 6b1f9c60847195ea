"""Compile the library's calls for GPUs that need not be there, and judge what the compiler made of them.

The calls of MATRIX go through the public ops, so tiles and specialisations are those of a real launch. A kernel passes when no register spills (its
stack is empty), its shared memory fits the architecture, and its 16-bit dots became tensor-core instructions.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import triton
from torch import Tensor

from tileformer import kernels
from tileformer.bench.check.cases import DTYPES, Case, attention_call, class_call, row_call
from tileformer.bench.recording import ARCHITECTURES, SHARED, Launch, record
from tileformer.bench.report import Growing, as_json
from tileformer.bench.static.figures import exact

FEATURES: dict[str, dict[str, Any]] = {
    "causal padded": dict(causal=True, padding="right"),
    "plain": dict(lse=False),
    "boolean mask": dict(mask="boolean"),
    "additive mask": dict(mask="additive"),
    "dropout": dict(causal=True, padding="right", dropout_p=0.1),
    "padded": dict(padding="right"),  # as cross-attention: each query head has a key head of its own
    "everything": dict(causal="bottom_right", padding="right", mask="additive", dropout_p=0.1),
    "dropout, no causal": dict(dropout_p=0.1),
    "window, lengths": dict(window=(100, 30), lengths=True),
    "packed": dict(causal=True, packed=((0, 100, 256), (0, 120, 256)), lse=False),
    "ALiBi, soft cap": dict(causal=True, alibi=True, softcap=30.0),
    "bias": dict(causal=True, bias=(1, 1, 256, 256)),
    "all of these": dict(
        window=(100, 30), lengths=True, alibi=True, softcap=30.0, bias=(1, 1, 256, 256), dropout_p=0.1
    ),
    "weights": dict(causal=True, padding="right", bias=(1, 1, 256, 256), return_weights=True),
}
LONG: dict[str, dict[str, Any]] = {  # keys enough for the forward that works ahead
    "long": dict(lse=False),
    "long, causal": dict(causal=True),
}
HEAD_SIZES = (16, 32, 40, 64, 80, 96, 128, 160, 192, 256)
SAMPLED = {
    (64, "bf16", "causal padded"),
    (64, "bf16", "weights"),
    (128, "bf16", "long, causal"),
}


def _attention_matrix() -> Iterator[Case]:
    for size in HEAD_SIZES:
        for feature, options in (FEATURES | LONG).items():
            if feature != "causal padded" and size not in (64, 128, 256):
                continue
            if feature in LONG and size != 128:
                continue
            length = 1024 if feature in LONG else 256
            build = attention_call((1, 2, 2 if feature == "padded" else 1, length, length, size), **options)
            for dtype in ("bf16", "fp32", "fp16"):
                if dtype == "fp16" and (size, feature) != (64, "causal padded"):
                    continue
                if dtype == "fp32" and feature != "causal padded":
                    continue
                sampled = (size, dtype, feature) in SAMPLED
                yield Case("attention", f"D {size} {feature}", "tile table", build, quick=sampled, dtypes=(dtype,))


def _row_matrix() -> Iterator[Case]:
    for width in (128, 1024, 3072, 4096, 8192, 16384):
        both = ("bf16", "fp32")
        affine = row_call(64, width, params=("weight", "bias"), normalized_shape=(width,))
        yield Case(
            "layer_norm",
            f"N {width}",
            "warps and rows table",
            affine,
            quick=width == 1024,
            dtypes=both[: 1 if width == 1024 else 2],
        )
        affine = row_call(64, width, params=("weight",), normalized_shape=(width,), eps=1e-6)
        yield Case("rms_norm", f"N {width}", "warps and rows table", affine, dtypes=("bf16",))
        for op in ("softmax", "log_softmax"):
            quick = op == "softmax" and width == 1024
            yield Case(op, f"N {width}", "warps table", row_call(64, width), quick=quick, dtypes=("bf16",))
        yield Case(
            "dropout", f"N {width}", "warps table", row_call(64, width, params=("residual",), p=0.1), dtypes=("bf16",)
        )
    for classes in (4096, 32000, 131072):
        build = class_call(8, classes, weighted=True, label_smoothing=0.1)
        yield Case(
            "cross_entropy", f"V {classes}", "blocks of classes", build, quick=classes == 32000, dtypes=("bf16",)
        )


MATRIX = [*_attention_matrix(), *_row_matrix()]

# Stack bytes a thread that are accepted, by (dtype, kernel, head size from). float32 dots beyond 128 columns hold three operands of 16 x 256 and an
# accumulator or two in registers, and no smaller tile exists (Triton's dots start at 16 x 16). The others are a few registers at head sizes where
# the next smaller tile would double the traffic. Head sizes 64 and 128 in 16 bits spill nothing on sm_80, 90 and 100; Triton 3.6 and 3.9 keep up to
# ten of the 255 registers of some such kernels on the stack.
ALLOWED_STACK = {
    ("fp32", "_attention_fwd_kernel", 0): 16,
    ("fp32", "_attention_fwd_kernel", 160): 32,
    ("fp32", "_attention_bwd_dq_kernel", 0): 16,
    ("fp32", "_attention_bwd_dq_kernel", 160): 320,
    ("fp32", "_attention_bwd_dkdv_kernel", 160): 336,
    ("bf16", "_attention_bwd_dq_kernel", 0): 24,
    ("bf16", "_attention_bwd_dq_kernel", 256): 32,
    ("bf16", "_attention_bwd_dkdv_kernel", 0): 32,
    ("fp32", "_attention_bwd_dkdv_kernel", 0): 16,
    ("bf16", "_attention_fwd_kernel", 0): 24,
    ("bf16", "_attention_weights_kernel", 256): 8,
    ("bf16", "_attention_fwd_kernel", 256): 32,
}
if triton.__version__.startswith("3.8."):
    ALLOWED_STACK["bf16", "_cross_entropy_fwd_kernel", 0] = 8  # two registers, on sm_90 alone
NOTHING_SPILLS = {(arch, size) for arch in (80, 90, 100) for size in (64, 128)}
OF_THOSE = 40 if triton.__version__.startswith(("3.6.", "3.9.")) else 0


def compiled(case: Case, dtype: str, arch: int) -> list[Launch]:
    """The launches of a case, forward and backward, compiled for sm_`arch`; nothing runs."""
    tensors, options = case.inputs()
    cast = lambda x: x.to(DTYPES[dtype]) if isinstance(x, Tensor) and x.is_floating_point() else x  # noqa: E731
    leaves = {name: cast(x).requires_grad_() for name, x in tensors.items()}
    with record(arch) as launches, kernels.use_backend("triton"), warnings.catch_warnings():
        warnings.filterwarnings(
            "error", message=".*does not fit this device"
        )  # a table's first tile has to: no step to the next one
        outputs = getattr(kernels, case.op)(**leaves, **{name: cast(x) for name, x in options.items()})
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        torch.autograd.grad(sum(x.sum() for x in outputs), list(leaves.values()))
    return launches


def _allowed_stack(case: Case, dtype: str, arch: int, kernel: str) -> int:
    size = int(case.name.split()[1]) if case.op == "attention" else 0
    if (arch, size) in NOTHING_SPILLS and dtype != "fp32":
        return OF_THOSE
    return max(
        (stack for (d, name, least), stack in ALLOWED_STACK.items() if (d, name) == (dtype, kernel) and size >= least),
        default=0,
    )


def judged(case: Case, dtype: str, arch: int, seen: set[bytes]) -> Iterator[dict[str, Any]]:
    """A row for each kernel of a case that is not in `seen` yet: what it uses, and what is wrong with it ("" if nothing)."""
    for launch in compiled(case, dtype, arch):
        binary = launch.binary
        if binary.cubin in seen:
            continue
        seen.add(binary.cubin)
        figures = exact(launch)
        allowed = _allowed_stack(case, dtype, arch, binary.name)
        wants_dots = case.op == "attention" and dtype != "fp32" and "bounds" not in binary.name
        problem = ""
        if figures["stack"] > allowed:
            problem = f"spills: {figures['stack']} bytes of stack, {allowed} allowed"
        elif binary.shared > SHARED[arch]:
            problem = f"shared memory {binary.shared} > {SHARED[arch]}"
        elif wants_dots and not figures["tensor"]:
            problem = "no tensor-core instruction"
        yield dict(figures, op=case.op, workload=case.name, dtype=dtype, allowed_stack=allowed, problem=problem)


def report(calls: Iterable[tuple[Case, str]], archs: list[int] | None, output: str | None) -> int:
    """Compile, print a table (or JSON to `output`, "-" for standard output), and return 1 if a kernel has a problem."""
    unknown = set(archs or ()) - set(ARCHITECTURES)
    if unknown:
        raise ValueError(f"--arch {min(unknown)}: choose from {', '.join(map(str, ARCHITECTURES))}")
    rows: list[dict[str, Any]] = []
    file = Growing(None if output == "-" else output, lambda: as_json(rows))
    if output != "-":
        print(f"{'sm':<4} {'kernel':<28} {'call':<20} {'dtype':<5} {'regs':>4} {'stack':>5} {'shared':>6}  problem")
    for arch in archs or ARCHITECTURES:
        seen: set[bytes] = set()
        for case, dtype in calls:
            for row in judged(case, dtype, arch, seen):
                rows.append(row)
                file.write()
                if output != "-":
                    print(
                        f"{arch:<4} {row['kernel']:<28} {row['workload']:<20} {dtype:<5} {row['registers']:>4} {row['stack']:>5} "
                        f"{row['shared']:>6}  {row['problem']}",
                        flush=True,
                    )
    problems = sum(bool(row["problem"]) for row in rows)
    file.write(last=True)
    if output == "-":
        print(as_json(rows), end="")
    else:
        print(f"{len(rows)} kernels compiled, {problems} with a problem")
    return 1 if problems else 0
