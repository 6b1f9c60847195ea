"""The tables of the static figures, as text for a terminal and as Markdown."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Row = dict[str, Any]
Column = tuple[str, Callable[[Row], Any]]


def _share(row: Row) -> str:
    low, high = row["share_band"]
    return f"{row['share']:.2f} [{low:.2f}, {high:.2f}]"


def _tile(row: Row) -> str:
    return " x ".join(str(size) for size in row["tile"].values())


def _loop(row: Row) -> str:
    loop = (row.get("loops") or [{}])[0]
    return " / ".join(f"{loop[pipe]:.0f}" for pipe in ("tensor", "xu", "fma", "alu", "mio", "issue")) if loop else ""


WHO: list[Column] = [
    ("sm", lambda r: r["arch"]),
    ("provider", lambda r: r["provider"]),
    ("call", lambda r: f"{r['op']} {r['workload']}"),
]
CODE: list[Column] = [
    *WHO,
    ("kernel", lambda r: r["kernel"][:30]),
    ("tile", _tile),
    ("warps", lambda r: r["warps"]),
    ("regs", lambda r: r["registers"]),
    ("spilled B", lambda r: r["spill_bytes"]),
    ("shared B", lambda r: r["shared"]),
    ("blocks", lambda r: r.get("blocks", "")),
    ("128 / all", lambda r: f"{r['accesses'].get('128', 0)} / {sum(r['accesses'].values())}"),
    ("configs", lambda r: r["configurations"]),
]
ATTENTION: list[Column] = [
    *CODE,
    ("tensor / xu / fma / alu / mio / issue", _loop),
    ("issue / tensor", lambda r: r.get("issue_per_tensor", "")),
    ("bound", lambda r: r.get("bound", "")),
    ("modelled share [band]", lambda r: _share(r) if "share" in r else ""),
]
ROWS: list[Column] = [
    *CODE,
    ("KB in flight", lambda r: f"{r['bytes_in_flight'] / 1e3:.1f}" if "bytes_in_flight" in r else ""),
    ("modelled us busy / DRAM", lambda r: f"{r['us_busy']:.0f} / {r['us_dram']:.0f}" if "roof" in r else ""),
    ("modelled share", lambda r: r.get("roof", "")),
]
TRAFFIC: list[Column] = [
    *WHO,
    ("pass", lambda r: r["pass"]),
    ("MB counted", lambda r: f"{r['bytes_total'] / 1e6:.1f}"),
    ("moved / least", lambda r: f"{r['moved_over_minimal']:.3f}"),
    ("distinct / least", lambda r: f"{r['distinct_over_minimal']:.3f}"),
    ("FLOPs / useful", lambda r: f"{r['flops_over_useful']:.3f}" if "flops_over_useful" in r else ""),
]
MISSING: list[Column] = [*WHO, ("why", lambda r: r.get("skipped") or f"traffic not counted: {r['uncounted']}")]
GOALS: list[Column] = [
    ("goal", lambda v: v["name"]),
    ("class", lambda v: v["class"]),
    ("worst", lambda v: v.get("worst", "")),
    ("wanted", lambda v: v["limit"]),
    ("rows", lambda v: v["rows"]),
    ("verdict", lambda v: v["verdict"]),
    ("where", lambda v: v.get("at", "") + (f", share {v['band']}" if "band" in v else "")),
]


def sections(rows: list[Row], goals: list[Row]) -> list[tuple[str, str, list[Column], list[Row]]]:
    """(name, title, columns, rows) of each table that has rows."""
    launched = [row for row in rows if "configurations" in row]
    found = [
        ("attention", "Attention: machine code, main loop, model", ATTENTION, [row for row in launched if row["op"] == "attention"]),
        ("rows", "Row kernels: machine code, model", ROWS, [row for row in launched if row["op"] != "attention"]),
        ("traffic", "Traffic and FLOPs", TRAFFIC, [row for row in rows if "bytes_total" in row]),
        ("skipped", "Skipped", MISSING, [row for row in rows if "skipped" in row or "uncounted" in row]),
        ("goals", "Goals", GOALS, goals),
    ]
    return [section for section in found if section[3]]


def text(columns: list[Column], rows: list[Row]) -> str:
    """Aligned columns."""
    cells = [[title for title, _ in columns], *([str(value(row)) for _, value in columns] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(x.ljust(w) for x, w in zip(line, widths, strict=True)).rstrip() for line in cells)


def markdown(columns: list[Column], rows: list[Row]) -> str:
    """A Markdown table."""
    lines = [[title for title, _ in columns], ["---"] * len(columns)]
    lines += [[str(value(row)).replace("|", "\\|") for _, value in columns] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
