"""The tables of the static figures."""

from typing import Any

from tileformer.bench.tables import Column

Row = dict[str, Any]


def _loop(row: Row) -> str:
    loop = (row.get("loops") or [{}])[0]
    return " / ".join(f"{loop[pipe]:.0f}" for pipe in ("tensor", "xu", "fma", "alu", "mio", "issue")) if loop else ""


_BAND = "{:.2f} [{:.2f}, {:.2f}]"
WHO: list[Column] = [
    Column("sm", "arch"),
    Column("provider", "provider"),
    Column("call", lambda r: f"{r['op']} {r['workload']}"),
]
CODE: list[Column] = [
    *WHO,
    Column("kernel", lambda r: r["kernel"][:30]),
    Column("tile", lambda r: " x ".join(map(str, r["tile"].values()))),
    Column("warps", "warps"),
    Column("regs", "registers"),
    Column("spilled B", "spill_bytes"),
    Column("shared B", "shared"),
    Column("blocks", lambda r: r.get("blocks", "")),
    Column("128 / all", lambda r: f"{r['accesses'].get('128', 0)} / {sum(r['accesses'].values())}"),
    Column("configs", "configurations"),
]
ATTENTION: list[Column] = [
    *CODE,
    Column("tensor / xu / fma / alu / mio / issue", _loop),
    Column("issue / tensor", lambda r: r.get("issue_per_tensor", "")),
    Column("bound", lambda r: r.get("bound", "")),
    Column("modelled share [band]", lambda r: _BAND.format(r["share"], *r["share_band"]) if "share" in r else ""),
]
ROWS: list[Column] = [
    *CODE,
    Column("KB in flight", lambda r: f"{r['bytes_in_flight'] / 1e3:.1f}" if "bytes_in_flight" in r else ""),
    Column("modelled us busy / DRAM", lambda r: f"{r['us_busy']:.0f} / {r['us_dram']:.0f}" if "roof" in r else ""),
    Column("modelled share", lambda r: r.get("roof", "")),
]
TRAFFIC: list[Column] = [
    *WHO,
    Column("pass", "pass"),
    Column("MB counted", lambda r: f"{r['bytes_total'] / 1e6:.1f}"),
    Column("moved / least", lambda r: f"{r['moved_over_minimal']:.3f}"),
    Column("distinct / least", lambda r: f"{r['distinct_over_minimal']:.3f}"),
    Column("FLOPs / useful", lambda r: f"{r['flops_over_useful']:.3f}" if "flops_over_useful" in r else ""),
]
LAYER: list[Column] = [
    *WHO[1:],
    Column("launches forward", "launches_forward"),
    Column("backward", "launches_backward"),
    Column("saved U", "saved"),
    Column("moved U forward", "moved_forward"),
    Column("backward", "moved_backward"),
    Column("both", "moved"),
]
MISSING: list[Column] = [*WHO, Column("why", lambda r: r.get("skipped") or f"traffic not counted: {r['uncounted']}")]
GOALS: list[Column] = [
    Column("goal", "name"),
    Column("class", "class"),
    Column("worst", lambda v: v.get("worst", "")),
    Column("wanted", "limit"),
    Column("rows", "rows"),
    Column("verdict", "verdict"),
    Column("where", lambda v: v.get("at", "") + (f", share {v['band']}" if "band" in v else "")),
]


def sections(rows: list[Row], goals: list[Row]) -> list[tuple[str, str, list[Column], list[Row]]]:
    """(name, title, columns, rows) of each table that has rows."""
    launched = [row for row in rows if "configurations" in row]
    of = lambda kind: [row for row in launched if (row["op"] == "attention") is kind]  # noqa: E731
    every = [
        ("attention", "Attention: machine code, main loop, model", ATTENTION, of(True)),
        ("rows", "Row kernels: machine code, model", ROWS, of(False)),
        ("layer", "A decoder layer's step, beside its GEMMs and attention", LAYER, [r for r in rows if "moved" in r]),
        ("traffic", "Traffic and FLOPs", TRAFFIC, [row for row in rows if "bytes_total" in row]),
        ("skipped", "Skipped", MISSING, [row for row in rows if "skipped" in row or "uncounted" in row]),
        ("goals", "Goals", GOALS, goals),
    ]
    return [section for section in every if section[3]]
