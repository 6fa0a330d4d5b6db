"""The charts of a report, as SVG that takes its colours from the page."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any, Final, Literal

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from petseg_runtime.text import counted

__all__ = ["bars", "photo_histogram", "reliability", "sweep", "training"]

#: Placeholder colours for matplotlib and the page's CSS variable for each, so that charts suit light and dark mode.
COLOURS: Final = {
    "#010101": "ink",
    "#020202": "muted",
    "#030303": "line",
    "#040404": "blue",
    "#050505": "orange",
    "#060606": "green",
    "#070707": "purple",
}
INK, MUTED, LINE, BLUE, ORANGE, GREEN, PURPLE = COLOURS

#: The four ratios of the sweep, each with a colour and, for readers who cannot distinguish them, a line style.
CURVES: Final = (("iou", BLUE, "-"), ("dice", PURPLE, "--"), ("precision", ORANGE, "-."), ("recall", GREEN, ":"))


def bars(rows: Sequence[tuple[str, float, int, str]], label: str) -> str:
    """Draw a horizontal bar for each (name, IoU, number of photos, colour), labelled with IoU and number."""
    figure = _figure(0.55 + 0.24 * len(rows))
    axes = _axes(figure.subplots(), "IoU", "")
    places = np.arange(len(rows))
    drawn = axes.barh(places, [row[1] for row in rows], height=0.72, color=[row[3] for row in rows])
    axes.bar_label(
        drawn, [f"{iou:.3f} · {counted(count, 'photo')}" for _, iou, count, _ in rows], padding=4, color=MUTED, size=9
    )
    axes.set_yticks(places, [row[0] for row in rows], color=INK, parse_math=False)
    axes.set_xlim(0, 1.2)  # room for the label of a bar of 1
    axes.set_xticks(np.arange(0, 1.01, 0.2))
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.grid(visible=False, axis="y")
    return _svg(figure, label)


def photo_histogram(photo_iou: Mapping[str, Any], label: str) -> str:
    """Draw a histogram of the photos' IoU, with mean and median."""
    figure = _figure(2.7)
    axes = _axes(figure.subplots(), "IoU of a photo", "photos")
    edges = photo_iou["edges"]
    axes.bar(edges[:-1], photo_iou["photos"], width=np.diff(edges) * 0.92, align="edge", color=BLUE)
    for name, colour, dashes in (("median", INK, "-"), ("mean", ORANGE, "--")):
        value = photo_iou[name]
        axes.axvline(value, color=colour, linestyle=dashes, linewidth=1.5, label=f"{name} {value:.3f}")
    axes.set_xlim(0, 1)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    _legend(axes, "upper left")
    return _svg(figure, label)


def reliability(bins: Sequence[Mapping[str, Any]], label: str) -> str:
    """Draw the share of pet pixels against the predicted probability, above a strip with the pixels of each bin."""
    figure = _figure(4.4, width=5.6)
    above, below = figure.subplots(2, 1, height_ratios=(4, 1), sharex=True)
    _axes(above, "", "share that is pet")
    _axes(below, "predicted probability of pet", "pixels")
    above.plot([0, 1], [0, 1], color=MUTED, linestyle="--", linewidth=1, label="perfectly calibrated")
    held = [row for row in bins if row["pixels"]]
    above.plot(
        [row["predicted"] for row in held],
        [row["observed"] for row in held],
        color=BLUE,
        marker="o",
        markersize=4,
        label="this model",
    )
    total = max(sum(row["pixels"] for row in bins), 1)
    widths = [row["to"] - row["from"] for row in bins]
    shares = [row["pixels"] / total for row in bins]
    below.bar([row["from"] for row in bins], shares, width=np.array(widths) * 0.92, align="edge", color=BLUE)
    below.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    above.set_ylim(-0.02, 1.02)
    below.set_xlim(0, 1)
    _legend(above, "upper left")
    return _svg(figure, label)


def sweep(thresholds: Sequence[float], values: Mapping[str, Any], marks: Mapping[str, float], label: str) -> str:
    """Draw IoU, Dice, precision and recall against the threshold.

    Args:
        thresholds: The thresholds of the ratios.
        values: Each ratio by name, at every threshold; None if undefined.
        marks: Thresholds to mark, by name.
        label: Description of the chart for screen readers.
    """
    figure = _figure(3.6, width=5.6)
    axes = _axes(figure.subplots(), "threshold", "")
    for name, colour, dashes in CURVES:
        curve = np.array(values[name], np.float64)  # None becomes NaN, which leaves a gap
        title = {"iou": "IoU", "dice": "Dice"}.get(name, name)
        axes.plot(thresholds, curve, color=colour, linestyle=dashes, linewidth=1.8, label=title)
    for number, (name, value) in enumerate(marks.items()):
        axes.axvline(value, color=INK, linewidth=1, linestyle=(0, (2, 2)))
        gap = min((other - value for other in marks.values() if other > value), default=1 - value)
        right = gap < 0.25 and value > 0.3  # room for the text on the left only
        axes.text(
            value + (-0.012 if right else 0.012),
            0.03 + 0.08 * number,
            f"{name} {value:.2f}",
            color=INK,
            size=9,
            ha="right" if right else "left",
        )
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1.02)
    figure.legend(loc="outside upper center", ncols=4, frameon=False, labelcolor=INK, fontsize=9)
    return _svg(figure, label)


def training(log: Mapping[str, Sequence[float | None]], kept: float | None, label: str) -> str:
    """Draw training loss, and validation IoU and Dice, over epochs; ``kept`` is the epoch of the checkpoint."""
    figure = _figure(2.9)
    left, right = figure.subplots(1, 2)
    _axes(left, "epoch", "training loss")
    _axes(right, "epoch", "validation")
    epochs = np.array(log["epoch"], np.float64)
    lines = ((left, "loss", ORANGE, "-"), (right, "val_iou", BLUE, "-"), (right, "val_dice", PURPLE, "--"))
    marker = "o" if len(epochs) < 20 else None  # a line through one point would not be seen
    titles = {"loss": "loss", "val_iou": "IoU", "val_dice": "Dice"}
    for axes, name, colour, dashes in lines:
        values = np.array(log[name], np.float64)
        axes.plot(epochs, values, color=colour, linestyle=dashes, marker=marker, markersize=3.5, label=titles[name])
    for axes in (left, right):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
        if kept is not None:
            axes.axvline(kept, color=INK, linewidth=1, linestyle=(0, (2, 2)))
        _legend(axes, "upper right" if axes is left else "lower right")
    return _svg(figure, label)


def _figure(height: float, width: float = 9.0) -> Figure:
    return Figure(figsize=(width, height), layout="constrained", facecolor="none")


def _axes(axes: Axes, x: str, y: str) -> Axes:
    axes.set_facecolor("none")
    axes.set_xlabel(x, color=MUTED)
    axes.set_ylabel(y, color=MUTED)
    axes.tick_params(colors=MUTED, length=0, pad=6)
    axes.set_axisbelow(True)
    axes.grid(color=LINE, linewidth=0.8)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(LINE)
    return axes


def _legend(axes: Axes, where: Literal["upper left", "upper right", "lower right"]) -> None:
    axes.legend(loc=where, frameon=False, labelcolor=INK, fontsize=9)


def _svg(figure: Figure, label: str) -> str:
    """Convert a figure to an ``<svg>`` element: no prologue, no namespaces, unique ids, the page's colours.

    ``label`` must be trusted plain text, because it is not escaped.
    """
    text = io.StringIO()
    # Text stays text, so that it can be searched and read aloud; the fixed salt makes ids reproducible.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "petseg"}):
        # Without metadata there is no RDF block with its URLs.
        figure.savefig(text, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    svg = text.getvalue()
    view = re.search(r'viewBox="([^"]+)"', svg)
    assert view is not None, "matplotlib writes one"
    body = svg[svg.index(">", svg.index("<svg")) + 1 :]
    prefix = re.sub(r"\W+", "-", label.lower())[:40]
    body = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{prefix}-", body)
    for stand_in, name in COLOURS.items():
        body = body.replace(stand_in, f"var(--{name})")
    return f'<svg role="img" aria-label="{label}" viewBox="{view[1]}">{body.strip()}'
