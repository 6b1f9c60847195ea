"""What `tileformer check` found, as lines, as data, and as Markdown that can be attached to a bug."""

import dataclasses
from typing import Any

import torch

from tileformer.bench.calls.pairs import FACTORS, PAIR_DTYPES, PAIRS, ROWS
from tileformer.bench.tables import Column, markdown, markdown_cells
from tileformer.kernels import info

PAIR_RESULTS = ("out", "lse", "dq", "dk", "dv", "dbias")


@dataclasses.dataclass
class Finding:
    """What a check of one call found: a figure of at most 1 passes, a problem never does."""

    op: str
    case: str
    dtype: str
    reason: str
    over_budget: dict[str, float] = dataclasses.field(default_factory=dict)
    problems: list[str] = dataclasses.field(default_factory=list)
    skipped: str = ""
    command: str = ""

    @property
    def passed(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems and all(figure <= 1.0 for figure in self.over_budget.values())

    @property
    def verdict(self) -> str:
        """What is wrong, or the name of the largest figure."""
        if self.skipped:
            return f"skipped: {self.skipped}"
        if not self.passed:
            over = {name: figure for name, figure in self.over_budget.items() if not figure <= 1.0}
            wrong = [f"{name} is {figure:.3g} times its budget" for name, figure in over.items()]
            return f"FAILED: {'; '.join([*wrong, *self.problems])}"
        return max(self.over_budget, key=self.over_budget.__getitem__, default="")

    def worst(self, backward: bool) -> float:
        """The largest figure of the gradients, or of the outputs."""
        return max((x for name, x in self.over_budget.items() if name.startswith("d") == backward), default=0.0)


TABLE = [
    Column("op", "op", "<14"),
    Column("call", "case", "<22"),
    Column("dtype", "dtype", "<5"),
    Column("forward", lambda finding: finding.worst(backward=False), ">8.3f"),
    Column("backward", lambda finding: finding.worst(backward=True), ">8.3f"),
    Column("worst", "verdict"),
]
EVERY_CALL = [
    Column("", lambda call: "FAILED" if not call["passed"] else "skipped" if call["skipped"] else "ok"),
    Column("op", "op"),
    Column("call", "case"),
    Column("dtype", "dtype"),
    Column("figures", lambda call: ", ".join(f"{name} {figure:.3f}" for name, figure in call["over_budget"].items())),
]


def surroundings(backend: str, device: torch.device) -> dict[str, str]:
    """Versions, backend and device."""
    here = info.collect(str(device))
    facts = next((x for x in here["devices"] if x["device"] == str(device)), here["devices"][0])
    environment = {name: version for name, version in here["versions"].items() if version}
    return environment | dict(backend=backend, device=", ".join(map(str, facts.values())))


def features(calls: list[dict[str, Any]]) -> list[list[str]]:
    """A table, its head first: of the pairs among `calls`, for each feature the worst error over budget by result."""
    rows = {pair.name: row for pair, row in zip(PAIRS, ROWS, strict=True)}
    of_pairs = [(rows[call["case"]], call) for call in calls if call["case"] in rows]

    def worst(factor: str, level: str, result: str, dtype: str) -> str:
        met = [call["over_budget"] for row, call in of_pairs if row[factor] == level and call["dtype"] == dtype]
        figures = [over[result] for over in met if result in over]
        return f"{max(figures):.2f}" if figures else "-"

    table = [["error / budget in " + " ".join(PAIR_DTYPES), *PAIR_RESULTS]]
    for factor, level in ((factor, level) for factor, levels in FACTORS.items() for level in levels if level):
        cells = (" ".join(worst(factor, level, result, dtype) for dtype in PAIR_DTYPES) for result in PAIR_RESULTS)
        table.append([level, *cells])
    return table if of_pairs else []


def collect(findings: list[Finding], planned: int, **more: Any) -> dict[str, Any]:
    """Everything as plain data, failures first; `planned` calls were to be checked. `more` is handed on."""
    worst_first = sorted(findings, key=lambda x: x.passed)
    calls = [dict(dataclasses.asdict(x), passed=x.passed, verdict=x.verdict) for x in worst_first]
    return dict(
        **more,
        passed=sum(x.passed and not x.skipped for x in findings),
        failed=sum(not x.passed for x in findings),
        skipped=sum(bool(x.skipped) for x in findings),
        not_reached=planned - len(findings),
        calls=calls,
        features=features(calls),
    )


def summary(data: dict[str, Any]) -> str:
    """The last line."""
    skipped = f", {data['skipped']} skipped" if data["skipped"] else ""
    stopped = f", {data['not_reached']} not reached" if data["not_reached"] else ""
    return f"{data['passed']} passed, {data['failed']} failed{skipped}{stopped} in {data['seconds']:.0f} s"


def page(data: dict[str, Any]) -> str:
    """What was collected, for people, in Markdown: the machine, what failed with its command, then every figure."""
    parts = [f"# tileformer check: {summary(data)}", markdown_cells(("", ""), data["environment"].items())]
    for call in (call for call in data["calls"] if not call["passed"]):
        parts += [f"## {call['op']}, {call['case']}, {call['dtype']}", call["verdict"]]
        parts += [f"Why this call: {call['reason']}. Repeat it:", f"    {call['command']}"]
    if data["features"]:
        parts += ["## Attention, feature by feature", "The worst over calls in which every two features meet."]
        parts += [markdown_cells(data["features"][0], data["features"][1:])]
    parts += ["## Every call", "Error over budget of each output and gradient: at most 1 passes."]
    parts += [markdown(EVERY_CALL, data["calls"])]
    if data["tiles"]:
        tiles = ((kernel, "; ".join(used)) for kernel, used in data["tiles"].items())
        parts += ["## Tiles", markdown_cells(("kernel", "tiles"), tiles)]
    return "\n\n".join(parts) + "\n"
