"""What `tileformer check` found, as lines, as data, and as Markdown that can be attached to a bug."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Callable
from typing import Any

import torch

from tileformer.bench.check.pairs import features
from tileformer.kernels import info


class Growing:
    """A file that is written again as what it tells grows: a run that is stopped leaves what it had, whole.

    Args:
        path: None writes nothing. A device or a pipe is written once, at the last.
        text: what to write now.
    """

    def __init__(self, path: str | None, text: Callable[[], str]) -> None:
        self.path, self.text, self.due = path, text, 0.0

    def write(self, last: bool = False) -> None:
        """Write it, unless that would take more than a twentieth of the time."""
        began = time.monotonic()
        if self.path is None or (not last and began < self.due):
            return
        if os.path.exists(self.path) and not os.path.isfile(self.path):
            if last:
                with open(self.path, "w", encoding="utf-8") as device:
                    device.write(self.text())
            return
        target = os.path.realpath(self.path)  # of a link, which stays one
        with open(f"{target}.part", "w", encoding="utf-8", newline="") as file:
            file.write(self.text())
        os.replace(f"{target}.part", target)
        self.due = time.monotonic() + 20 * (time.monotonic() - began)


def as_json(data: Any) -> str:
    """Data as a file of ours holds them."""
    return json.dumps(data, indent=1) + "\n"


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
        over = [
            f"{name} is {figure:.3g} times its budget" for name, figure in self.over_budget.items() if not figure <= 1.0
        ]
        if self.skipped:
            return f"skipped: {self.skipped}"
        if not self.passed:
            return f"FAILED: {'; '.join([*over, *self.problems])}"
        return max(self.over_budget, key=self.over_budget.__getitem__, default="")


HEADER = f"{'op':<14} {'call':<22} {'dtype':<5} {'forward':>8} {'backward':>8}  worst"


def line(found: Finding) -> str:
    """One line of the table."""

    def most(backward: bool) -> float:
        return max((r for name, r in found.over_budget.items() if name.startswith("d") == backward), default=0.0)

    return f"{found.op:<14} {found.case:<22} {found.dtype:<5} {most(False):>8.3f} {most(True):>8.3f}  {found.verdict}"


def surroundings(backend: str, device: torch.device) -> dict[str, str]:
    """Versions, backend and device."""
    here = info.collect(str(device))
    facts = next((x for x in here["devices"] if x["device"] == str(device)), here["devices"][0])
    environment = {name: version for name, version in here["versions"].items() if version}
    return environment | dict(backend=backend, device=", ".join(map(str, facts.values())))


def collect(
    findings: list[Finding], environment: dict[str, str], tiles: dict[str, Any], seconds: float, planned: int
) -> dict[str, Any]:
    """Everything as plain data, failures first; `planned` calls were to be checked."""
    calls = [
        dict(dataclasses.asdict(x), passed=x.passed, verdict=x.verdict)
        for x in sorted(findings, key=lambda x: x.passed)
    ]
    return dict(
        environment=environment,
        tiles=tiles,
        seconds=round(seconds, 1),
        passed=sum(x.passed and not x.skipped for x in findings),
        failed=sum(not x.passed for x in findings),
        skipped=sum(bool(x.skipped) for x in findings),
        not_reached=planned - len(findings),
        calls=calls,
        features=features(calls),
    )


def summary(report: dict[str, Any]) -> str:
    """The last line."""
    skipped = f", {report['skipped']} skipped" if report["skipped"] else ""
    stopped = f", {report['not_reached']} not reached" if report["not_reached"] else ""
    return f"{report['passed']} passed, {report['failed']} failed{skipped}{stopped} in {report['seconds']:.0f} s"


def markdown(report: dict[str, Any]) -> str:
    """The report for people: the machine, what failed with its command, then every figure."""
    lines = [f"# tileformer check: {summary(report)}", "", "| | |", "|---|---|"]
    lines += [f"| {name} | {value} |" for name, value in report["environment"].items()]
    failed = [call for call in report["calls"] if not call["passed"]]
    for call in failed:
        lines += ["", f"## {call['op']}, {call['case']}, {call['dtype']}", "", call["verdict"], ""]
        lines += [f"Why this call: {call['reason']}. Repeat it:", "", f"    {call['command']}", ""]
    if report["features"]:
        head, *rows = report["features"]
        lines += [
            "",
            "## Attention, feature by feature",
            "",
            "The worst over calls in which every two features meet.",
            "",
        ]
        lines += ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)]
    lines += ["", "## Every call", "", "Error over budget of each output and gradient: at most 1 passes.", ""]
    lines += ["| | op | call | dtype | figures |", "|---|---|---|---|---|"]
    for call in report["calls"]:
        figures = ", ".join(f"{name} {figure:.3f}" for name, figure in call["over_budget"].items())
        mark = "FAILED" if not call["passed"] else "skipped" if call["skipped"] else "ok"
        lines.append(f"| {mark} | {call['op']} | {call['case']} | {call['dtype']} | {figures} |")
    if report["tiles"]:
        lines += ["", "## Tiles", "", "| kernel | tiles |", "|---|---|"]
        lines += [f"| {kernel} | {'; '.join(used)} |" for kernel, used in report["tiles"].items()]
    return "\n".join(lines) + "\n"
