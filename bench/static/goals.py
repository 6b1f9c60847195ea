"""Goals as data (bench/goals.toml) and their verdicts. A and B are asserted; C, a model's figure, is only printed."""

import fnmatch
import os
from typing import Any

FILE = os.path.join(os.path.dirname(os.path.dirname(__file__)), "goals.toml")


def load() -> list[dict[str, Any]]:
    """The goals of the file: name, class, `where` (patterns for a row's fields), figure, and at_most or at_least."""
    try:
        import tomllib
    except ImportError:  # Python 3.10
        import tomli as tomllib  # type: ignore[import-not-found, no-redef]
    with open(FILE, "rb") as opened:
        return tomllib.load(opened)["goal"]


def _fits(row: dict[str, Any], where: dict[str, Any]) -> bool:
    """Whether each field fits its pattern, or one of them."""
    patterns = {field: wanted if isinstance(wanted, list) else [wanted] for field, wanted in where.items()}
    fits = lambda field, pattern: fnmatch.fnmatchcase(str(row.get(field, "")), str(pattern))  # noqa: E731
    return all(any(fits(field, one) for one in several) for field, several in patterns.items())


def verdicts_of(goals: list[dict[str, Any]], rows: list[dict[str, Any]], part: bool = False) -> list[dict[str, Any]]:
    """One for each goal: its worst figure and where, the number of rows, and "pass", "miss", "lead" or "not run".

    A goal is not run where the run has no architecture or op for it, or took a `part` of the calls; one that finds no
    figure in rows that should have it is missed.
    """
    verdicts = []
    seen = {(row["op"], row["arch"]) for row in rows if row["provider"] == "tileformer"}
    for goal in goals:
        where = {"provider": "tileformer"} | goal["where"]
        rows_of = [row for row in rows if _fits(row, where) and goal["figure"] in row]
        wanted = {field: x for field, x in where.items() if field in ("op", "arch")}
        kernels = {at for at in seen if at[0] != "decoder_layer" or "op" in where}  # a layer has counts, and no code
        expected = any(_fits(dict(op=op, arch=arch), wanted) for op, arch in kernels)
        sign, limit = (1, goal["at_most"]) if "at_most" in goal else (-1, goal["at_least"])
        worst = max(rows_of, key=lambda row: sign * row[goal["figure"]], default=None)
        verdict = dict(goal, rows=len(rows_of), limit=("<= " if sign > 0 else ">= ") + str(limit))
        if worst is None:
            verdict["verdict"] = "miss" if expected and not part and not goal.get("needs_peers") else "not run"
        else:
            figure, fields = worst[goal["figure"]], ("op", "workload", "pass", "kernel", "dtype", "arch")
            reached = "pass" if sign * figure <= sign * limit else "miss"
            verdict |= dict(worst=figure, at=" ".join(str(worst[field]) for field in fields if field in worst))
            verdict["verdict"] = "lead" if goal["class"] == "C" else reached
            if "share_band" in worst:
                verdict["band"] = worst["share_band"]
        verdicts.append(verdict)
    return verdicts
