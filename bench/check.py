"""Check each op, forward and every gradient, against float64 on this machine.

Every call of bench/cases.py runs on a backend and is held to the error budget of bench/budget.py. Where there is a GPU the compiled kernels run on
it; elsewhere the same kernels are interpreted.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

import torch
from torch import Tensor

from tileformer import kernels
from tileformer.bench import compiled
from tileformer.bench.budget import attention_sizes, over_budget
from tileformer.bench.cases import CASES, DTYPES, Case
from tileformer.kernels.backend import BACKENDS
from tileformer.kernels.info import require_device


def results(
    namespace: Any, case: Case, dtype: torch.dtype, device: torch.device, rounded: torch.dtype
) -> dict[str, Tensor]:
    """Outputs and gradients of a case, its inputs rounded to `rounded` and computed in `dtype` by `kernels` or `kernels.reference`."""
    tensors, options = case.inputs()
    cast = lambda x: x.to(rounded).to(device, dtype) if x.is_floating_point() else x.to(device)  # noqa: E731
    leaves = {name: cast(x).requires_grad_() for name, x in tensors.items()}
    options = {name: cast(x) if isinstance(x, Tensor) else x for name, x in options.items()}
    outputs = getattr(namespace, case.op)(**leaves, **options)
    named = dict(zip(("out", "lse"), outputs if isinstance(outputs, tuple) else (outputs,), strict=False))
    generator = torch.Generator().manual_seed(1)
    # A row without a key has log-sum-exp -inf; its (zero) gradient is asked for through the rows that have one.
    seen = {name: torch.where(x == -torch.inf, 0.0, x) for name, x in named.items()}
    given = {name: cast(torch.randn(x.shape, generator=generator)) for name, x in seen.items()}
    total = sum((x * given[name].to(x.dtype)).sum() for name, x in seen.items())
    gradients = torch.autograd.grad(total, list(leaves.values()))
    named = {name: x.detach() for name, x in named.items()}
    return (
        named
        | {f"d{name}": g for name, g in zip(leaves, gradients, strict=True)}
        | {f"given {n}": g for n, g in given.items()}
    )


def sizes(case: Case, truth: dict[str, Tensor], rounded: torch.dtype) -> dict[str, Any]:
    """For each result, the sum of the absolute values of what is added up (bench/budget.py)."""
    tensors, options = case.inputs()
    wide = lambda x: x.to(rounded).double() if isinstance(x, Tensor) and x.is_floating_point() else x  # noqa: E731
    tensors, options = {n: wide(x) for n, x in tensors.items()}, {n: wide(x) for n, x in options.items()}
    if case.op == "attention":
        return attention_sizes(
            **tensors, out=truth["out"], dout=truth["given out"], dlse=truth.get("given lse"), **options
        )
    top = lambda x: float(x.abs().max())  # noqa: E731
    size: dict[str, Any] = {name: top(x) for name, x in truth.items()}
    given = truth["given out"].abs()
    if case.op == "layer_norm":
        axes = tuple(range(-len(options["normalized_shape"]), 0))
        narrow = top(tensors["x"].var(axes, unbiased=False).rsqrt())
        weight = tensors.get("weight", torch.ones(1, dtype=torch.float64))
        size["out"] = top(truth["out"]) + top(tensors.get("bias", weight))
        size["dx"] = 2 * narrow * top(given * weight.abs())
        for name in ("dweight", "dbias"):
            size[name] = float(given.flatten(0, -2).sum(0).max()) * (top(truth["out"]) if name == "dweight" else 1.0)
    if case.op == "softmax":
        size["dx"] = (
            abs(options.get("scale", 1.0)) * truth["out"] * (given + (truth["out"] * given).sum(-1, keepdim=True))
        )
    if case.op == "cross_entropy":
        size["out"] = top(truth["out"]) + top(tensors["logits"])
    return size


def judge(case: Case, dtype_name: str, backend: str, device: torch.device) -> dict[str, float]:
    """Error over budget of each output and gradient of a case: at most 1 passes."""
    dtype = DTYPES[dtype_name]
    truth = results(kernels.reference, case, torch.float64, device, dtype)
    eager = results(kernels.reference, case, dtype, device, dtype)
    if "lse" in eager:  # float32 for every input dtype, so its yardstick is too
        eager["lse"] = results(kernels.reference, case, torch.float32, device, dtype)["lse"]
    with kernels.use_backend(backend):
        got = results(kernels, case, dtype, device, dtype)
    size = sizes(case, {name: x.detach().cpu() for name, x in truth.items()}, dtype)
    wanted = [name for name in truth if not name.startswith("given")]
    return {name: over_budget(got[name], eager[name], truth[name], size[name]) for name in wanted}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `tileformer check`."""
    parser.add_argument(
        "--quick", action="store_true", help="a few calls of each op (at most 16 kernel specialisations)"
    )
    parser.add_argument(
        "--op", action="append", choices=sorted({case.op for case in CASES}), help="only this op (repeatable)"
    )
    parser.add_argument("--dtype", action="append", choices=list(DTYPES), help="only this dtype (repeatable)")
    parser.add_argument(
        "--backend", choices=[b for b in BACKENDS if b != "auto"], help="default: triton on a GPU, interpret elsewhere"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where torch sees a GPU")
    parser.add_argument(
        "--json", metavar="FILE", help="also write every figure to FILE ('-': to standard output instead of the table)"
    )
    parser.add_argument(
        "--compile-only", action="store_true",
        help="compile the tile tables for the architectures of --arch and run nothing; needs no GPU, and fills Triton's cache for one",
    )  # fmt: skip
    parser.add_argument(
        "--arch", type=int, nargs="+", metavar="CC", help="with --compile-only: 80 86 89 90 100 120 (default: all)"
    )


def main(args: argparse.Namespace) -> int:
    """Print the table; 1 if an error is over its budget."""
    cases = compiled.MATRIX if args.compile_only else CASES
    chosen = [c for c in cases if (not args.quick or c.quick) and (not args.op or c.op in args.op)]
    calls = [(case, dtype) for case in chosen for dtype in _dtypes(case, args)]
    if args.compile_only:
        return compiled.report(calls, args.arch, args.json)
    device = require_device(args.device)
    backend = args.backend or ("triton" if device.type == "cuda" else "interpret")
    rows: list[dict[str, Any]] = []
    if args.json != "-":
        print(f"{backend} on {device}, torch {torch.__version__}: error / budget (at most 1 passes)\n{_HEADER}")
    for n, (case, dtype) in enumerate(calls, 1):
        if sys.stderr.isatty():
            print(
                f"\r{'compiling and ' if backend == 'triton' else ''}running {n}/{len(calls)}",
                end="\r",
                file=sys.stderr,
            )
        ratios = judge(case, dtype, backend, device)
        rows.append(
            dict(
                op=case.op,
                case=case.name,
                dtype=dtype,
                reason=case.reason,
                over_budget=ratios,
                passed=max(ratios.values()) <= 1.0,
            )
        )
        if args.json != "-":
            print(_line(rows[-1]), flush=True)
    failed = sum(not row["passed"] for row in rows)
    report = dict(
        backend=backend,
        device=str(device),
        torch=torch.__version__,
        passed=len(rows) - failed,
        failed=failed,
        calls=rows,
    )
    if args.json == "-":
        print(json.dumps(report, indent=1))
    else:
        if args.json:
            with open(args.json, "w") as file:
                json.dump(report, file, indent=1)
        print(f"{len(rows) - failed} passed, {failed} failed")
    return 1 if failed else 0


_HEADER = f"{'op':<14} {'call':<20} {'dtype':<5} {'forward':>8} {'backward':>8}  worst"


def _dtypes(case: Case, args: argparse.Namespace) -> list[str]:
    wanted = [d for d in case.dtypes if not args.dtype or d in args.dtype]
    if args.quick and not args.dtype and not args.compile_only:
        return ([d for d in wanted if d == "bf16"] or wanted)[:1]
    return wanted


def _line(row: dict[str, Any]) -> str:
    ratios = row["over_budget"]
    forward = max(r for name, r in ratios.items() if not name.startswith("d"))
    backward = max(r for name, r in ratios.items() if name.startswith("d"))
    verdict = max(ratios, key=ratios.__getitem__) if row["passed"] else f"FAILED: {max(ratios, key=ratios.__getitem__)}"
    return f"{row['op']:<14} {row['case']:<20} {row['dtype']:<5} {forward:>8.3f} {backward:>8.3f}  {verdict}"
