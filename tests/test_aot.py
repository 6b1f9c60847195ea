"""The tile tables, compiled ahead of time for every architecture: no spills, shared memory fits, dots on tensor cores.

Each architecture compiles in a process of its own: the driver that records launches must not meet a real GPU's.
"""

import collections
import json
import os
import pathlib
import re
import subprocess
import sys

import pytest

from tileformer.bench.recording import ARCHITECTURES

KERNELS = pathlib.Path(__file__).parents[1] / "kernels"
PARTS = 8  # of the table, each in a process of its own
COMPILED: dict[int, list[set[str]]] = collections.defaultdict(list)  # the names in each part


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
@pytest.mark.parametrize("part", [f"{k}/{PARTS}" for k in range(1, PARTS + 1)])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_kernel_compiles_well(arch: int, part: str) -> None:
    rows = _compile(arch, "--part", part)
    assert _without_problems(rows)
    COMPILED[arch].append({row["kernel"] for row in rows})


@pytest.mark.aot_full
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_parts_have_every_kernel(arch: int) -> None:
    if len(COMPILED[arch]) < PARTS:
        pytest.skip("not all parts were compiled")
    written = {
        name for path in KERNELS.rglob("*.py") for name in re.findall(r"^def (_\w+_kernel)\(", path.read_text(), re.M)
    }
    assert written == set().union(*COMPILED[arch]) | {"_attention_fwd_hopper_kernel"}  # test_attention_hopper.py
