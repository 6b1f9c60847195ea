"""The tables of docs/evidence.md; its words, before them, are written by hand and stay."""

from __future__ import annotations

from typing import Any

from tileformer.bench.check.cases import CASES
from tileformer.bench.speed.workloads import WORKLOADS
from tileformer.bench.static import table
from tileformer.bench.static.compiled import MATRIX


def _ops() -> str:
    lines = [
        "| op | calls of `tileformer check` | with dtypes | default configurations compiled | benchmark calls | tests |",
        "| --- " * 6 + "|",
    ]
    for op in dict.fromkeys(case.op for case in MATRIX):
        calls, configurations = ([case for case in cases if case.op == op] for cases in (CASES, MATRIX))
        with_dtypes, compiled = (sum(len(case.dtypes) for case in cases) for cases in (calls, configurations))
        timed = sum(workload.op == op for workload in WORKLOADS)
        tests = f"`tests/test_{op.removeprefix('log_')}.py`"
        lines.append(f"| {op} | {len(calls)} | {with_dtypes} | {compiled} | {timed} | {tests} |")
    return "### What each op is held to\n\n" + "\n".join(lines) + "\n"


def page(rows: list[dict[str, Any]], goals: list[dict[str, Any]], versions: dict[str, str], words: str) -> str:
    """`words`, the page as it was up to its tables, and the tables of this run."""
    archs = ", ".join(f"sm_{arch}" for arch in sorted({row["arch"] for row in rows}))
    parts = [
        words.partition("## Tables")[0]
        + f"## Tables\n\nThis run: {archs}; {', '.join(f'{name} {version}' for name, version in versions.items())}.\n",
        _ops(),
    ]
    for title, columns, of in reversed(table.sections(rows, goals)):
        parts.append(f"### {title}\n\n{table.markdown(columns, of)}\n")
    return "\n".join(parts)
