"""Sanitize: run suite.py under ttsem, and prove that the run would have named a fault; then check the compiler's passes on a few launches.

    python tests/sanitizer [-k TEXT] [--passes TEXT]

1. Every launch of suite.py is compiled to Triton's IR for sm_90 and executed by ttsem (https://github.com/alepot55/ttsem), which reports an access
   outside a tensor and two programs that touch one element, at the kernel's line.
2. A missing mask and a race are planted in a copy of the tree: the same suite must fail and name file and line of each.
3. ttsem's validator compares what the IR computes before every pass of the compiler with what Triton's interpreter computes, on the programs in
   PASSES; a pass that changes a result is an error. What the tool cannot execute is printed as unsupported.

Needs an environment of its own (`make sanitize` makes it): the tool patches torch and Triton for the whole process, and wants Triton 3.8.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
SUITE = pathlib.Path(__file__).resolve().parent.relative_to(ROOT) / "suite.py"


@dataclasses.dataclass(frozen=True)
class Fault:
    """A fault to plant: in `path`, `old` becomes `new`; the suite's tests of `only` must then name `line` of that file, and say `words`."""

    name: str
    path: str
    old: str
    new: str
    line: str
    only: str
    words: str


FAULTS = [
    Fault(
        "a missing mask",
        "kernels/softmax.py",
        "tl.store(dx_ptrs + cols, dx.to(dx_ptr.dtype.element_ty), mask=in_rows & (cols < N))",
        "tl.store(dx_ptrs + cols, dx.to(dx_ptr.dtype.element_ty), mask=(rows > -1)[:, None] & (cols < N))",
        "tl.store(dx_ptrs + cols, dx.to(dx_ptr.dtype.element_ty), mask=(rows > -1)[:, None] & (cols < N))",
        "test_rows and softmax",
        "past the end",
    ),
    Fault(
        "a race",
        "kernels/layer_norm.py",
        "partial_ptr += pid.to(tl.int64) * (SUMS % 2 + SUMS // 2 % 2 + SUMS // 4) * N",
        "partial_ptr += pid.to(tl.int64) * 0 * N",
        "tl.store(partial_ptr + cols, tl.sum(dweight, 0), mask=cols < N)",
        "test_rows and layer_norm",
        "program",
    ),
]


def suite(tree: pathlib.Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """suite.py of a tree under the sanitizer. Compiled anew: an IR from a cache names the lines of another file."""
    command = [
        sys.executable,
        "-m",
        "ttsem.sanitize",
        "pytest",
        str(SUITE),
        "-q",
        "--noconftest",
        "-p",
        "no:cacheprovider",
        *arguments,
    ]
    with tempfile.TemporaryDirectory() as cache:
        env = {
            **os.environ,
            "TILEFORMER_SELFTEST": "0",  # there is no GPU to test, only a tool that looks like one
            "PYTHONPATH": _paths(tree),
            "TRITON_CACHE_DIR": cache,
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
        }
        return subprocess.run(command, cwd=tree, env=env, capture_output=True, text=True, check=False)


def _paths(tree: pathlib.Path) -> str:
    others = [
        place for place in os.environ.get("PYTHONPATH", "").split(os.pathsep) if place and place != str(ROOT / "src")
    ]
    return os.pathsep.join([str(tree / "src"), *(str(pathlib.Path(place).absolute()) for place in others)])


def named(fault: Fault) -> str:
    """Plant a fault in a copy, and return what the sanitizer says of it; AssertionError where it does not name the line."""
    with tempfile.TemporaryDirectory() as folder:
        tree = pathlib.Path(folder)
        for name in ("kernels", "decoder", "training", "bench", "src", "tests", "pyproject.toml"):
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, tree / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy2(ROOT / name, tree / name)
        file = tree / fault.path
        text = file.read_text()
        assert text.count(fault.old) == 1, (
            f"{fault.name}: the old text occurs {text.count(fault.old)} times in {fault.path}"
        )
        file.write_text(text.replace(fault.old, fault.new))
        lines = [number for number, line in enumerate(file.read_text().splitlines(), 1) if fault.line in line]
        done = suite(tree, "-x", "-k", fault.only)
        wanted = [f"{file.name}:{number}" for number in lines]
        told = [
            line
            for line in done.stdout.splitlines()
            if "KernelFault" in line and any(place in line for place in wanted)
        ]
        assert done.returncode == 1 and told and fault.words in told[0], (
            f"{fault.name}: the sanitizer did not name {wanted} ({fault.words!r}):\n{done.stdout[-3000:]}{done.stderr[-2000:]}"
        )
        return told[0].removeprefix("E").strip()


# Programs for the validator: one launch of each kernel that it supports, with the tiles of sm_90.
PASSES = {
    "layer_norm forward": "kernels.layer_norm(draw(9, 50), (50,), draw(50), draw(50))",
    "softmax forward": "kernels.softmax(draw(2, 2, 9, 50), causal=True)",
    "cross_entropy forward": "kernels.cross_entropy(draw(9, 50), torch.arange(9), reduction='none')",
    "dropout": "kernels.dropout(draw(9, 50), 0.3, seed=torch.tensor([5]))",
    "attention forward": "kernels.attention(draw(1, 1, 130, 64).half(), draw(1, 1, 90, 64).half(), draw(1, 1, 90, 64).half(), causal=True)",
}
PROGRAM = """
import torch
from tileformer import kernels
from tileformer.kernels import device
draw = lambda *shape: torch.randn(shape, generator=torch.Generator().manual_seed(0))
def main():
    device.record_for(90)  # launches on CPU tensors with the tiles of sm_90: the tool decides what a launch does
    with torch.no_grad(), kernels.use_backend("triton"):
        {call}
"""


def passes(name: str) -> tuple[str, str]:
    """("match", "mismatch" or "unsupported", a line to print) for one program."""
    with tempfile.TemporaryDirectory() as folder:
        program, report = pathlib.Path(folder, "program.py"), pathlib.Path(folder, "report.json")
        program.write_text(PROGRAM.format(call=PASSES[name]))
        command = [sys.executable, "-m", "ttsem.validate", str(program), "--cc", "90", "--json", str(report)]
        done = subprocess.run(
            command, env={**os.environ, "PYTHONPATH": _paths(ROOT), "TILEFORMER_SELFTEST": "0"}, capture_output=True, text=True, check=False
        )  # fmt: skip
        if not report.exists():
            return "unsupported", (done.stderr.strip() or done.stdout.strip() or "no report").splitlines()[-1]
        launches = json.loads(report.read_text())["launches"]
    verdicts = collections.Counter(stage["verdict"] for launch in launches for stage in launch["passes"])
    culprits = [launch["first_bad_pass"] for launch in launches if launch.get("first_bad_pass")]
    shown = ", ".join(f"{count} {verdict}" for verdict, count in verdicts.most_common()) or "no stage"
    if culprits:
        return "mismatch", f"{shown}; first pass that changes a result: {culprits[0]}"
    same = verdicts["match"] + verdicts["approx"]  # bit by bit, or within the tool's rule for rounding
    return ("match" if same else "unsupported"), shown


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-k", metavar="TEXT", default="", help="only the tests of suite.py that match, as pytest's -k")
    parser.add_argument(
        "--passes", metavar="TEXT", default="", help="only the programs of PASSES whose name holds TEXT; 'none': none"
    )
    args = parser.parse_args()
    began = time.monotonic()
    done = suite(ROOT, "-k", args.k)
    print(done.stdout.strip().splitlines()[-1] if done.returncode == 0 else done.stdout + done.stderr, flush=True)
    failed = done.returncode != 0
    for fault in FAULTS:
        try:
            print(f"planted {fault.name}: {named(fault)}", flush=True)
        except AssertionError as error:
            failed = True
            print(error, flush=True)
    for name in (name for name in PASSES if args.passes in name):
        verdict, shown = passes(name)
        failed |= verdict == "mismatch"
        print(f"passes of {name}: {verdict} ({shown})", flush=True)
    print(f"sanitize: {'FAILED' if failed else 'passed'} in {time.monotonic() - began:.0f} s")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
