"""PNGs of measured results: throughput along each sweep, one line a provider, and attention on the measured roofline. Needs matplotlib."""

from __future__ import annotations

import itertools
import os
from typing import Any

import numpy

from tileformer.bench.calls.ops import MODES
from tileformer.bench.calls.providers import OURS
from tileformer.bench.calls.workloads import WORKLOADS
from tileformer.training.finetune.plots import new_figure, save

_COLOURS = [
    "#d62728",
    "#1f77b4",
    "#2ca02c",
    "#9467bd",
    "#8c564b",
    "#e377c2",
    "#17becf",
    "#bcbd22",
    "#7f7f7f",
    "#ff7f0e",
]
_MARKERS = "osD^vP*XhH<>p"


def plot(measured: dict[str, Any], folder: str) -> list[str]:
    """Write the PNGs that the results allow into `folder`; their paths.

    Args:
        measured: what `tileformer bench --json` writes: "device", "dry", "ceilings", "results".

    Raises:
        ValueError: without matplotlib.
    """
    known = {(w.op, w.name): w for w in WORKLOADS}
    rows = [row for row in measured["results"] if row["median_ms"] is not None]
    if measured["dry"]:  # all points of a sweep ran at one size
        rows = [row | dict(sizes=known[row["op"], row["workload"]].sizes) for row in rows]
    points = [(known[row["op"], row["workload"]], row) for row in rows]
    names = list(dict.fromkeys(row["provider"] for _, row in points))
    looks = zip(names, itertools.cycle(_COLOURS), itertools.cycle(_MARKERS))
    style = {
        name: dict(color=colour, marker=marker, linewidth=2.4 if name == OURS else 1.3)
        for name, colour, marker in looks
    }
    note = measured["device"]  # "dry run: not measured" in a dry run
    files = []
    for op, curve in dict.fromkeys((w.op, w.curve) for w, _ in points if w.axis):
        chosen = [(w, row) for w, row in points if (w.op, w.curve) == (op, curve) and w.axis]
        files.append(_curves(chosen, f"{op}, {curve}", style, note, folder))
    products = [(w, row) for w, row in points if row["tflops"]]
    if products and measured["ceilings"]:
        files.append(_roofline(products, measured["ceilings"], style, note, folder))
    return files


def _curves(chosen: list[Any], title: str, style: dict[str, Any], note: str, folder: str) -> str:
    modes = [mode for mode in MODES if any(row["mode"] == mode for _, row in chosen)]
    figure, panels = new_figure(1, len(modes), (4.6 * len(modes) + 2.4, 4.2), squeeze=False)
    unit = "tflops" if any(row["tflops"] for _, row in chosen) else "gbs"
    ticks = sorted({row["sizes"][w.axis] for w, row in chosen})
    for panel, mode in zip(panels[0], modes, strict=True):
        for name, look in style.items():
            rows = [(w, row) for w, row in chosen if (row["provider"], row["mode"]) == (name, mode)]
            if line := sorted((row["sizes"][w.axis], row[unit]) for w, row in rows):
                panel.plot(*zip(*line, strict=True), label=name, zorder=3 if name == OURS else 2, **look)
        panel.set_title(mode)
        panel.set_xscale("log", base=2)
        panel.set_xticks(ticks, [str(x) for x in ticks], rotation=45)
        panel.minorticks_off()
        panel.set_ylim(bottom=0)
        panel.grid(alpha=0.3)
        panel.set_xlabel(chosen[0][0].axis)
    panels[0][0].set_ylabel("TFLOP/s" if unit == "tflops" else "GB/s")
    return _save(figure, _handles(panels), f"{title} ({chosen[0][1]['dtype']})", note, folder)


def _roofline(chosen: list[Any], ceilings: dict[str, float], style: dict[str, Any], note: str, folder: str) -> str:
    bandwidth, compute = ceilings.values()
    intensity = lambda row: row["tflops"] / row["gbs"] * 1e3  # noqa: E731
    reach = [*(intensity(row) for _, row in chosen), compute / bandwidth * 1e3]
    x = numpy.geomspace(min(reach) / 2, max(reach) * 2, 100)
    modes = [mode for mode in MODES if any(row["mode"] == mode for _, row in chosen)]
    figure, panels = new_figure(1, len(modes), (5 * len(modes) + 2.4, 4.6), squeeze=False, sharey=True)
    for panel, mode in zip(panels[0], modes, strict=True):
        panel.plot(x, numpy.minimum(compute, x * bandwidth / 1e3), color="black", label="copy and matmul")
        for name, look in style.items():
            mine = [(intensity(r), r["tflops"]) for _, r in chosen if (r["provider"], r["mode"]) == (name, mode)]
            if mine:
                dot = dict(look, linestyle="none", markersize=6 if name == OURS else 4, alpha=0.8)
                panel.plot(*zip(*mine, strict=True), label=name, zorder=3 if name == OURS else 2, **dot)
        panel.set_title(mode)
        panel.set_xscale("log")
        panel.set_yscale("log")
        panel.grid(alpha=0.3)
        panel.set_xlabel("useful FLOPs per byte that must move")
    panels[0][0].set_ylabel("TFLOP/s")
    return _save(figure, _handles(panels), f"roofline ({chosen[0][1]['dtype']})", note, folder)


def _handles(panels: Any) -> dict[str, Any]:
    return {text: line for panel in panels[0] for line, text in zip(*panel.get_legend_handles_labels(), strict=True)}


def _save(figure: Any, handles: dict[str, Any], title: str, note: str, folder: str) -> str:
    figure.suptitle(f"{title}\n{note}", fontsize=11)
    figure.legend(handles.values(), handles.keys(), loc="outside right center", frameon=False)
    name = "".join(c if c.isalnum() else "_" for c in title.rpartition(" (")[0])
    return str(save(figure, os.path.join(folder, f"{name}.png")))
