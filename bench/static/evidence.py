"""docs/evidence.md: its words are written by hand and stay; each long table is a file of docs/evidence/."""

from pathlib import Path

from tileformer.bench.calls.cases import CASES
from tileformer.bench.calls.matrix import MATRIX
from tileformer.bench.calls.workloads import WORKLOADS
from tileformer.bench.static.sections import Row, sections
from tileformer.bench.tables import Column, markdown

OPS_HELD = [
    Column("op", "op"),
    Column("calls of `tileformer check`", lambda row: len(row["checked"])),
    Column("with dtypes", lambda row: sum(len(call.dtypes) for call in row["checked"])),
    Column("default configurations compiled", lambda row: sum(len(call.dtypes) for call in row["compiled"])),
    Column("benchmark calls", lambda row: len(row["timed"])),
    Column("tests", lambda row: f"`tests/test_{row['op'].removeprefix('log_')}.py`"),
]


def pages(page: Path, rows: list[Row], goals: list[Row], versions: dict[str, str]) -> dict[Path, str]:
    """Text by path: `page` with its words up to "## Tables" and this run's goals; the tables that have rows."""
    words = page.read_text().partition("## Tables")[0] if page.exists() else ""
    archs = ", ".join(f"sm_{arch}" for arch in sorted({row["arch"] for row in rows}))
    run = f"This run: {archs}; {', '.join(f'{name} {version}' for name, version in versions.items())}.\n"
    lists = dict(checked=CASES, compiled=MATRIX, timed=WORKLOADS)
    ops = dict.fromkeys(call.op for call in MATRIX)
    held = [{name: [c for c in calls if c.op == op] for name, calls in lists.items()} | dict(op=op) for op in ops]
    parts = [f"{words}## Tables\n\n{run}", f"### What each op is held to\n\n{markdown(OPS_HELD, held)}\n"]
    tables, links = {}, []
    for name, title, columns, of in reversed(sections(rows, goals)):
        text = markdown(columns, of) + "\n"
        if name == "goals":
            parts.append(f"### {title}\n\n{text}")
            continue
        tables[page.with_suffix("") / f"{name}.md"] = (
            f"# {title}\n\nWritten by `make evidence` with [the evidence](../{page.name}). {run}\n{text}"
        )
        links.append(f"- [{title}]({page.stem}/{name}.md): {len(of)} rows")
    if links:
        parts.append("### Every figure\n\n" + "\n".join(reversed(links)) + "\n")
    return {page: "\n".join(parts)} | tables
