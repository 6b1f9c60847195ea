"""The tile tables, compiled ahead of time for every architecture: no spills, shared memory fits, dots on tensor cores.

Each architecture compiles in a process of its own: the driver that records launches must not meet a real GPU's.
"""

import json
import os
import pathlib
import re
import subprocess
import sys

import pytest

from tileformer.bench.recording import ARCHITECTURES

KERNELS = pathlib.Path(__file__).parents[1] / "kernels"


def _compile(arch: int, *options: str) -> list[dict]:
    command = [
        sys.executable,
        "-W",
        "error::UserWarning",
        "-m",
        "tileformer",
        "check",
        "--compile-only",
        "--arch",
        str(arch),
        "--json",
        "-",
        *options,
    ]
    paths = os.pathsep.join(
        [os.path.join(os.path.dirname(__file__), "..", "src"), *filter(None, [os.environ.get("PYTHONPATH")])]
    )
    done = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ, PYTHONPATH=paths), check=False)
    assert done.stdout, done.stderr
    return json.loads(done.stdout)


def _without_problems(rows: list[dict]) -> bool:
    problems = [
        f"sm_{r['arch']} {r['kernel']} ({r['workload']}, {r['dtype']}): {r['problem']}" for r in rows if r["problem"]
    ]
    assert not problems, "\n".join(problems)
    return True


@pytest.mark.aot
@pytest.mark.compat
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_sampled_kernels_compile_well(arch: int) -> None:
    rows = _compile(arch, "--quick")
    assert _without_problems(rows)
    assert len(rows) <= 126 // len(ARCHITECTURES), "the default run compiles at most 126 kernels"


@pytest.mark.aot_full
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_kernel_compiles_well(arch: int) -> None:
    rows = _compile(arch)
    assert _without_problems(rows)
    written = {
        name for path in KERNELS.rglob("*.py") for name in re.findall(r"^def (_\w+_kernel)\(", path.read_text(), re.M)
    }
    assert written == {row["kernel"] for row in rows} | {"_attention_fwd_hopper_kernel"}  # test_attention_hopper.py
