"""docs/evidence.md: what is proven how for every op, the static tables, and what no one has measured."""

from __future__ import annotations

from typing import Any

from tileformer.bench.cases import CASES
from tileformer.bench.compiled import MATRIX
from tileformer.bench.static import table
from tileformer.bench.workloads import WORKLOADS

COMMAND = "tileformer bench static --against liger,flag_gems,fla --goals --evidence docs/evidence.md"

_HEAD = f"""# Evidence

Written by `{COMMAND}` (add `--json FILE` for every figure); no GPU is used. The words down to the tables are held by `tests/test_static.py`; the
tables are those of the run that wrote this file, and say with which versions.

## What is proven, and how

| op | calls of `tileformer check` | default configurations compiled | benchmark calls | further proof |
| --- | --- | --- | --- | --- |
"""
_WHAT = """
- **Values.** Every call runs in float64 by the definition (`kernels/reference.py`), and the kernel may err at most twice as much as eager PyTorch in the
  working dtype plus a few roundings (`bench/budget.py`). On a machine without a GPU the same kernels are interpreted.
- **Memory.** Fresh memory is NaN and outputs lie between canaries; a sanitizer reads the compiled IR for accesses out of bounds and races (`make sanitize`).
- **Tests that bite.** Planted faults in the shipped kernels have to be found by `make test` (`make mutation`); random calls are drawn by `make fuzz`.
- **Compilation.** Every default configuration compiles for sm_80, 86, 89, 90, 100 and 120 within shared memory and the spill allow-list (`make aot`), with
  each supported Triton (`make compat`).
- **Machine code, traffic.** The tables below, checked against `bench/goals.toml`.

| class | figures | trust |
| --- | --- | --- |
| A | registers, spills, access widths, matrix instructions, blocks on a multiprocessor; bytes and FLOPs counted in the interpreter | exact for the compiler named below |
| B | cycles of a loop on each pipe, issue / tensor, `bound`, bytes in flight | counted; rates are documented ones (`bench/static/rates.py`), no bank conflicts, no clock |
| C | modelled shares and microseconds | a lead: against published times 1.0 to 1.6 times too fast for attention, up to 2 times off for short rows |

Peers are other libraries' own launch code on the same driver, scored over their whole configuration lists; each row is the configuration that the model
likes best. A row of traffic counts what Triton kernels move; what a library computes with plain torch operators comes on top and is not counted.

## What no one has measured

- **No kernel of this library has run on a GPU yet.** There is no measured time, bandwidth, FLOP/s or memory figure; every time and share below is modelled.
- Results on a GPU: compiled kernels have been compared with the definition only through the interpreter and by reading what the compiler made.
- Which of two tiles is faster where the model's bands overlap; anything within 20 %; sm_100, whose tensor-core waits the model does not know (no share there).
- Bank conflicts, clocks and power, TLB and DRAM pages, launch cost on a GPU, tail waves, several GPUs.
- The peers' times on the same device. `make gpu-day` measures all of it in one run and writes one folder.
"""


def words() -> str:
    """What does not depend on a compiler: the text before the tables."""
    lines = []
    for op in dict.fromkeys(case.op for case in MATRIX):
        calls, configurations = ([case for case in cases if case.op == op] for cases in (CASES, MATRIX))
        timed = [w for w in WORKLOADS if w.op == op]
        dtypes = sum(len(case.dtypes) for case in calls)
        lines.append(
            f"| {op} | {len(calls)} ({dtypes} with dtypes) | {sum(len(case.dtypes) for case in configurations)} | {len(timed)} | "
            f"`tests/test_{op}.py`: gradients one by one, `opcheck`, `torch.compile`, second derivatives, corner cases |"
        )
    return _HEAD + "\n".join(lines) + "\n" + _WHAT


def page(rows: list[dict[str, Any]], goals: list[dict[str, Any]], versions: dict[str, str]) -> str:
    """The whole page."""
    parts = [
        words(),
        "## Static tables\n\n" + ", ".join(f"{name} {version}" for name, version in versions.items()) + ".\n",
    ]
    for title, columns, of in reversed(table.sections(rows, goals)):
        parts.append(f"### {title}\n\n{table.markdown(columns, of)}\n")
    return "\n".join(parts)
