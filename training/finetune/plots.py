"""PNGs of a run: learning curves, a confusion matrix, attention maps. Needs matplotlib, draws without a display.

Where no installed font has a character (Chinese on a bare server), its code point stands instead, U+597D, and a line
on standard error says which font to install.
"""

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy

from tileformer.extras import optional_import
from tileformer.files import PathLike
from tileformer.training.log import records

CJK = ("Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans SC", "WenQuanYi Zen Hei", "WenQuanYi Micro Hei", "SimHei")
LONGEST = 40  # characters of a label
_told: set[str] = set()  # characters without a glyph that a line was printed about
FONTS = ("DejaVu Sans", *CJK, "Microsoft YaHei", "PingFang SC", "Droid Sans Fallback", "AR PL UMing CN")


def learning_curves(log: PathLike, png: PathLike) -> Path:
    """Loss of training and validation, and the learning rate, over the tokens of a run's `log.jsonl`.

    Raises ValueError when the log holds no whole record.
    """
    lines = [record for _, record in records(log)]
    if not lines:
        raise ValueError(f"{log}: no record of a run in it")
    figure, (losses, rates) = new_figure(2, 1, (7, 6), sharex=True, height_ratios=(3, 1))
    for key, name in (("loss", "training"), ("valid_loss", "validation")):
        points = [(record["tokens"], record[key]) for record in lines if record.get(key) is not None]
        if points:
            losses.plot(*zip(*points, strict=True), label=name, marker=None if key == "loss" else "o", markersize=3)
    losses.set_ylabel("loss, nats a label")
    losses.legend(frameon=False)
    rates.plot([record["tokens"] for record in lines], [record["lr"] for record in lines], color="grey")
    rates.set(ylabel="learning rate", xlabel="tokens")
    for panel in (losses, rates):
        panel.grid(alpha=0.3)
    return save(figure, png)


def confusion(counts: numpy.ndarray, names: Sequence[str], png: PathLike) -> Path:
    """Counts (K, K), row = true class; a cell is coloured by its share of its row, up to 20 classes with numbers."""
    if counts.shape != (len(names), len(names)):
        raise ValueError(f"counts {counts.shape} must be ({len(names)}, {len(names)}), one row and column a class")
    labels = _drawable(names)
    size = 2.5 + min(0.7 * len(names), 20.0) + _room(labels)
    figure, panel = new_figure(1, 1, (size, size))
    shares = counts / numpy.maximum(counts.sum(1, keepdims=True), 1)
    panel.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for (row, column), share in numpy.ndenumerate(shares) if len(names) <= 20 else ():
        shown = f"{counts[row, column]}\n{share:.1%}"
        panel.text(column, row, shown, ha="center", va="center", color="white" if share > 0.5 else "black")
    panel.set_xticks(range(len(names)), labels, rotation=45, ha="right")
    panel.set_yticks(range(len(names)), labels)
    panel.set(xlabel="predicted", ylabel="true")
    return save(figure, png)


def attention(weights: Any, tokens: Sequence[str], png: PathLike, keys: Sequence[str] | None = None) -> Path:
    """Maps of attention weights (H, T_q, T_k), one panel a head; or (T_q, T_k). Tensor or array.

    tokens: what stands at each query; keys: at each key (default: the same).
    """
    maps = numpy.asarray(weights.detach().float().cpu() if hasattr(weights, "detach") else weights, dtype=float)
    maps = maps[None] if maps.ndim == 2 else maps
    keys = tokens if keys is None else keys
    if maps.ndim != 3 or maps.shape[1:] != (len(tokens), len(keys)):
        raise ValueError(f"weights {maps.shape} must be (H, {len(tokens)}, {len(keys)}): queries by keys")
    columns = min(4, len(maps))
    across, down = _drawable(keys), _drawable(tokens)
    size = 1.0 + 0.22 * max(len(tokens), len(keys)) + _room([*across, *down])
    rows = -(-len(maps) // columns)
    figure, panels = new_figure(rows, columns, (columns * size, rows * size), squeeze=False)
    for head, panel in enumerate(panels.flat):
        if head >= len(maps):
            panel.set_axis_off()
            continue
        panel.imshow(maps[head], cmap="viridis", vmin=0)
        panel.set_title(f"head {head}", fontsize=9)
        panel.set_xticks(range(len(keys)), across, rotation=90, fontsize=7)
        panel.set_yticks(range(len(tokens)), down, fontsize=7)
    return save(figure, png)


def new_figure(rows: int, columns: int, size: tuple[float, float], **options: Any) -> tuple[Any, Any]:
    """A figure that no window system and no global state of pyplot knows about."""
    figure = optional_import("matplotlib.figure").Figure(figsize=size, layout="constrained")
    optional_import("matplotlib.backends.backend_agg").FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, **options)


def _drawable(texts: Iterable[str]) -> list[str]:
    """The texts, cut where they are long, with characters that no installed font of `FONTS` has as code points."""
    texts = [text if len(text) <= LONGEST else text[: LONGEST - 1] + "…" for text in texts]
    known = set().union(*_fonts().values())
    if missing := sorted({c for text in texts for c in text if ord(c) not in known} - _told):
        _told.update(missing)
        named = ", ".join(f"{c} (U+{ord(c):04X})" for c in missing[:3])
        more = f" and {len(missing) - 3:,} more" if len(missing) > 3 else ""
        advice = f"install one of {', '.join(CJK[:4])} (Debian: fonts-noto-cjk)"
        print(f"no font that is installed here has {named}{more}; {advice}", file=sys.stderr)
    return ["".join(c if ord(c) in known else f"U+{ord(c):04X}" for c in text) for text in texts]


def _room(labels: Iterable[str]) -> float:
    """Inches that the longest label needs beyond those of a short word."""
    return 0.07 * max(0, max(map(len, labels), default=0) - 8)


def _fonts() -> dict[str, set[int]]:
    """The installed ones of `FONTS`, and the code points of each."""
    manager = optional_import("matplotlib.font_manager")
    installed = {font.name for font in manager.fontManager.ttflist}
    return {name: {*manager.get_font(manager.findfont(name)).get_charmap()} for name in FONTS if name in installed}


def save(figure: Any, png: PathLike) -> Path:
    """Write a figure, its texts in the fonts that are here; the path."""
    path = Path(png)
    path.parent.mkdir(parents=True, exist_ok=True)
    fonts = [*_fonts()]
    for text in figure.findobj(optional_import("matplotlib.text").Text):
        text.set_fontfamily(fonts)
        text.set_parse_math(False)  # a token `$` is a dollar
    figure.savefig(path, format="png", dpi=110, bbox_inches="tight")  # titles and labels beyond the canvas are not cut
    return path
