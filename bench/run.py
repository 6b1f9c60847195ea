"""Time the ops and a decoder layer beside torch's own, or whole training steps.

Ops run under pytest-benchmark (`pytest bench --benchmark-only` is the same); `step` alternates rounds of our layers and torch.nn's.
"""

from __future__ import annotations

import argparse
import json
import os

import torch

from tileformer.bench import step
from tileformer.kernels.info import require_device

SUITES = ("attention", "layer_norm", "softmax", "decoder_layer")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `tileformer bench`."""
    parser.add_argument(
        "what", nargs="?", choices=("all", *SUITES, "step"), default="all", help="what to time (default: all ops)"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where torch sees a GPU")
    parser.add_argument(
        "--dtype", choices=("bf16", "fp16", "fp32"), default="bf16", help="dtype of the ops (default: bf16)"
    )
    parser.add_argument("--threads", type=int, nargs="+", metavar="N", help="for step on a CPU (default: 1 and 2)")
    parser.add_argument("--rounds", type=int, default=12, help="for step: rounds whose median is printed (default: 12)")
    parser.add_argument("--json", metavar="FILE", help="also write every figure to FILE")


def main(args: argparse.Namespace) -> int:
    """Print the table; the exit status of pytest for the ops, 0 for step."""
    device = require_device(args.device)
    if args.what == "step":
        rows = step.report(
            device, args.threads or ([1, 2] if device.type == "cpu" else [torch.get_num_threads()]), args.rounds
        )
        if args.json:
            with open(args.json, "w") as file:
                json.dump(rows, file, indent=1)
        return 0
    import pytest

    options = [
        os.path.join(os.path.dirname(__file__), "bench_ops.py"),
        "--benchmark-only",
        "-q",
        "-p",
        "no:cacheprovider",
    ]
    options += ["--bench-device", device.type, "--bench-dtype", args.dtype]
    options += ["--benchmark-json", args.json] if args.json else []
    options += ["-k", args.what] if args.what != "all" else []
    return int(pytest.main(options))
