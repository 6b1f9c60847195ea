"""docs/evidence.md and its tables: the words are written by hand and stay; each long table is a file of docs/evidence/."""

from __future__ import annotations

from pathlib import Path
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


def pages(
    page: Path, rows: list[dict[str, Any]], goals: list[dict[str, Any]], versions: dict[str, str]
) -> dict[Path, str]:
    """The text of each file: `page` with its words up to "## Tables" and this run's goals; beside it a folder of tables.

    Returns:
        By path: docs/evidence.md, docs/evidence/attention.md, rows.md, traffic.md and skipped.md, as far as they have rows.
    """
    words = page.read_text().partition("## Tables")[0] if page.exists() else ""
    archs = ", ".join(f"sm_{arch}" for arch in sorted({row["arch"] for row in rows}))
    run = f"This run: {archs}; {', '.join(f'{name} {version}' for name, version in versions.items())}.\n"
    found, parts, links = {}, [words + "## Tables\n\n" + run, _ops()], []
    for name, title, columns, of in reversed(table.sections(rows, goals)):
        text = table.markdown(columns, of) + "\n"
        if name == "goals":
            parts.append(f"### {title}\n\n{text}")
            continue
        found[page.with_suffix("") / f"{name}.md"] = (
            f"# {title}\n\nWritten by `make evidence` with [the evidence](../{page.name}). {run}\n{text}"
        )
        links.append(f"- [{title}]({page.stem}/{name}.md): {len(of)} rows")
    if links:
        parts.append("### Every figure\n\n" + "\n".join(reversed(links)) + "\n")
    return {page: "\n".join(parts)} | found
