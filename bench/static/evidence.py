"""docs/evidence.md: what is proven how for every op, the static tables, and what no one has measured."""

from __future__ import annotations

from typing import Any

from tileformer.bench.cases import CASES
from tileformer.bench.compiled import MATRIX
from tileformer.bench.static import table
from tileformer.bench.workloads import WORKLOADS

COMMAND = "tileformer bench static --against liger,flag_gems,fla --goals --evidence docs/evidence.md"

_HEAD = f"""# Evidence

Written by `{COMMAND}` (`--json FILE` for every figure, `--arch` for some architectures).
No GPU is used. The words before the tables are held by `tests/test_static.py`; the tables are those of the run that wrote this file.

## What is proven, and how

- **Values.** Every call of `tileformer check` is held to float64 by the definition (`kernels/reference.py`): the kernel may err at most twice as
  much as eager PyTorch in the working dtype, plus a few roundings (`bench/budget.py`). Without a GPU the same kernels are interpreted.
  [checks.md](checks.md) is the report of `tileformer check --all`: every figure, and attention feature by feature.
- **Memory.** Fresh memory is NaN and outputs lie between canaries; a sanitizer reads compiled IR for accesses out of bounds and for races.
- **Tests that bite.** Faults planted in the shipped kernels have to be found by `make test` (`tests/mutation`); `tests/test_fuzz.py` draws calls.
- **Compilation.** Every default configuration compiles for sm_80, 86, 89, 90, 100 and 120 within shared memory and the allow-list of spills
  (`make aot`), with every supported Triton (`make compat`).
- **Machine code and traffic.** The tables below, held to `bench/goals.toml` by `tileformer bench static --goals`.

| class | figures | trust |
| --- | --- | --- |
| A | registers, spills, access widths, matrix instructions, resident blocks; bytes and FLOPs counted in the interpreter | exact for this compiler |
| B | cycles of a loop on each pipe, issue / tensor, `bound`, bytes in flight | counted at documented rates; no bank conflicts, no clock |
| C | modelled shares and microseconds | a lead: 1.0 to 1.6 times too fast for attention, up to 2 times off for short rows |

Peers are other libraries' own launch code on the same driver, scored over their whole configuration lists; each row is the configuration that
the model likes best. Traffic is what Triton kernels move: what a library computes with torch's operators comes on top and is not counted.

## What no one has measured

- **No kernel of this library has run on a GPU yet.** No time, bandwidth, FLOP/s or memory figure is measured; every time and share below is modelled.
- What compiled kernels compute: they have been run by the interpreter only, and read as machine code.
- Which of two tiles is faster where bands overlap or figures differ by less than 20 %. sm_100: the model does not know its tensor cores' waits.
- Bank conflicts, clocks and power, TLB and DRAM pages, the cost of a launch on a GPU, tail waves, several GPUs.
- The peers' times on the same device. `make gpu-day` measures all of this in one run and writes one folder.
"""


def words() -> str:
    """The text before the tables."""
    return _HEAD


def _ops() -> str:
    lines = [
        "| op | calls of `tileformer check` | with dtypes | default configurations compiled | benchmark calls | tests |",
        "| --- " * 6 + "|",
    ]
    for op in dict.fromkeys(case.op for case in MATRIX):
        calls, configurations = ([case for case in cases if case.op == op] for cases in (CASES, MATRIX))
        with_dtypes, compiled = (sum(len(case.dtypes) for case in cases) for cases in (calls, configurations))
        timed = sum(workload.op == op for workload in WORKLOADS)
        lines.append(f"| {op} | {len(calls)} | {with_dtypes} | {compiled} | {timed} | `tests/test_{op}.py` |")
    return "### What each op is held to\n\n" + "\n".join(lines) + "\n"


def page(rows: list[dict[str, Any]], goals: list[dict[str, Any]], versions: dict[str, str]) -> str:
    """The whole page."""
    archs = ", ".join(f"sm_{arch}" for arch in sorted({row["arch"] for row in rows}))
    parts = [
        words(),
        f"## Tables\n\nThis run: {archs}; {', '.join(f'{name} {version}' for name, version in versions.items())}.\n",
        _ops(),
    ]
    for title, columns, of in reversed(table.sections(rows, goals)):
        parts.append(f"### {title}\n\n{table.markdown(columns, of)}\n")
    return "\n".join(parts)
