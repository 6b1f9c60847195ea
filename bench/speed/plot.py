"""PNGs of measured results: throughput along each sweep, and attention on the measured roofline. Needs matplotlib."""

import itertools
import os
from typing import Any

import numpy

from tileformer.bench.calls.op import MODES
from tileformer.bench.calls.providers import OURS
from tileformer.bench.calls.workloads import WORKLOADS
from tileformer.training.finetune.plots import new_figure, save

_COLOURS = [f"C{n}" for n in (3, 0, 2, 4, 5, 6, 9, 8, 7, 1)]  # of matplotlib's own cycle, ours red
_MARKERS = "osD^vP*XhH<>p"


def plot(measured: dict[str, Any], folder: str) -> list[str]:
    """Write the PNGs that `measured`, as of `tileformer bench --json`, allows into `folder`; their paths.

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
    style = {name: dict(color=c, marker=m, linewidth=2.4 if name == OURS else 1.3) for name, c, m in looks}
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
    unit = "tflops" if any(row["tflops"] for _, row in chosen) else "gbs"
    ticks = sorted({row["sizes"][call.axis] for call, row in chosen})

    def finish(panel: Any) -> None:
        panel.set_xscale("log", base=2)
        panel.set_xticks(ticks, [str(x) for x in ticks], rotation=45)
        panel.minorticks_off()
        panel.set_ylim(bottom=0)

    labels = chosen[0][0].axis, "TFLOP/s" if unit == "tflops" else "GB/s"
    point = lambda call, row: (row["sizes"][call.axis], row[unit])  # noqa: E731
    return _panels(chosen, point, finish, title, labels, style, (4.6, 4.2), note, folder)


def _roofline(chosen: list[Any], ceilings: dict[str, float], style: dict[str, Any], note: str, folder: str) -> str:
    bandwidth, compute = ceilings.values()
    intensity = lambda row: row["tflops"] / row["gbs"] * 1e3  # noqa: E731
    reach = [*(intensity(row) for _, row in chosen), compute / bandwidth * 1e3]
    x = numpy.geomspace(min(reach) / 2, max(reach) * 2, 100)

    def finish(panel: Any) -> None:
        panel.plot(x, numpy.minimum(compute, x * bandwidth / 1e3), color="black", label="copy and matmul")
        panel.set_xscale("log")
        panel.set_yscale("log")

    dots = {n: dict(of, linestyle="none", markersize=6 if n == OURS else 4, alpha=0.8) for n, of in style.items()}
    labels, point = ("useful FLOPs per byte that must move", "TFLOP/s"), lambda _, row: (intensity(row), row["tflops"])
    return _panels(chosen, point, finish, "roofline", labels, dots, (5, 4.6), note, folder, sharey=True)


def _panels(
    chosen: list[Any], point: Any, finish: Any, title: str, labels: tuple[str, str], style: Any, size: Any, note: str,
    folder: str, **options: Any,
) -> str:  # fmt: skip
    """A PNG with a panel for each mode: each provider's point(call, row), then what finish(panel) adds; its path."""
    modes = [mode for mode in MODES if any(row["mode"] == mode for _, row in chosen)]
    figure, panels = new_figure(1, len(modes), (size[0] * len(modes) + 2.4, size[1]), squeeze=False, **options)
    for panel, mode in zip(panels[0], modes, strict=True):
        points: dict[str, list[Any]] = {}
        for call, row in chosen:
            if row["mode"] == mode:
                points.setdefault(row["provider"], []).append(point(call, row))
        for name, of in points.items():
            panel.plot(*zip(*sorted(of), strict=True), label=name, zorder=3 if name == OURS else 2, **style[name])
        finish(panel)
        panel.set_title(mode)
        panel.grid(alpha=0.3)
        panel.set_xlabel(labels[0])
    panels[0][0].set_ylabel(labels[1])
    handles = {text: line for panel in panels[0] for line, text in zip(*panel.get_legend_handles_labels(), strict=True)}
    figure.suptitle(f"{title} ({chosen[0][1]['dtype']})\n{note}", fontsize=11)
    figure.legend(handles.values(), handles.keys(), loc="outside right center", frameon=False)
    name = "".join(c if c.isalnum() else "_" for c in title)
    return str(save(figure, os.path.join(folder, f"{name}.png")))
