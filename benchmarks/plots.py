"""The README's plots, made from the records: IoU against milliseconds, and the time of each step of a photo or frame.

The plots are SVG files beside the records. With the same matplotlib, the same records give the same bytes. Each plot
holds the digest of its records, by which ``report --check`` detects a plot that is out of date.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Final, TypeAlias

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks import records
from benchmarks.published import PUBLISHED as NETWORK
from petseg_runtime.files import replacing

ACCURACY: Final = "accuracy-against-time.svg"
STAGES: Final = "time-per-stage.svg"
#: The records that each plot is made from.
RECORDS: Final = {
    ACCURACY: ("accuracy", "latency", "peers", "rival", "training/width64"),
    STAGES: ("throughput", "video"),
}
#: The published network in the latency record.
WIDE: Final = "attention U-Net, width 64, 128x128, batch 1"
#: Colours of petseg, of others that we measured, and of published figures. Markers differ as well, for colour-blind
#: readers.
OURS, THEIRS, GREY = "#1565c0", "#d84315", "#616161"
#: Colours of the steps of a photo or frame, by the names that the records use.
STEPS: Final = {
    "read": "#90a4ae",
    "decode": "#90a4ae",
    "convert": "#ffb300",
    "infer": "#1565c0",
    "finish": "#43a047",
    "write": "#d84315",
}


@dataclass(frozen=True)
class Dot:
    """The time and the IoU of a model in one engine.

    Attributes:
        name: Text of the legend.
        ms: Milliseconds of the network alone, one photo at a time.
        iou: IoU with the border as background.
        ours: Whether it is petseg.
    """

    name: str
    ms: float
    iou: float
    ours: bool


def write() -> list[Path]:
    """Writes every plot, and returns their paths."""
    throughput, video = map(records.load, RECORDS[STAGES])
    bars = {
        "a photo of a folder: median CPU ms of each step": photo_bars(throughput),
        "a frame of a video: median ms of each step (the steps run in parallel)": frame_bars(video),
    }
    accuracy = accuracy_figure(*map(records.load, RECORDS[ACCURACY]))
    return [save(accuracy, ACCURACY), save(stage_figure(bars), STAGES)]


def stale() -> list[str]:
    """Returns the plots that are missing or do not match the current records."""
    paths = {name: records.RESULTS / name for name in RECORDS}
    return [name for name, path in paths.items() if not path.exists() or digest(name) not in path.read_text("utf-8")]


def digest(plot: str) -> str:
    """Returns the SHA-256 of the records that a plot is made from."""
    found = [records.load(name) for name in RECORDS[plot]]
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()


# IoU against milliseconds


def dots(
    accuracy: Mapping[str, Any],
    latency: Mapping[str, Any],
    rival: Mapping[str, Any],
    wide: Mapping[str, Any],
    photos: str,
) -> Iterator[Dot]:
    """Yields every row of the accuracy record whose time is known, on one set of photos.

    The checkpoint's IoU is that of all photos. Engines that were measured on some of them are placed below it by what
    they lose on those. petseg's times are from the latency record, those of ISNet and LR-ASPP from the accuracy record.
    ISNet was measured on a few of the photos only, so petseg's dot on the same few is added. Machines change their
    speed between records: LR-ASPP's time is petseg's time in the latency record, multiplied by their ratio when both
    ran in alternation. The IoU of the published network (``wide``) is PyTorch's, which other engines reproduce in f32.
    """
    own: dict[tuple[str, str], float] = {}
    compared = accuracy["compared"]
    for row in compared["rows"]:
        ms = time_of(row, latency["rows"])
        if ms:
            own[row["engine"], row["precision"]] = ms
            name = f"petseg in {row['engine'].partition(' ')[0]} {row['precision']}"
            first, this = (iou_of(one["rows"][0]["sets"][photos]["own"]) for one in (accuracy, compared))
            yield Dot(name, ms, first - this + iou_of(row["sets"][photos]["own"]), ours=True)
    if accuracy["isnet"]:
        remover = accuracy["isnet"][photos]
        theirs, same = remover["isnet"], remover["petseg"]
        some = f"{len(remover['photos'])} of these photos"
        yield Dot(
            f"ISNet, 1024 × 1024, best threshold, {some}",
            1e3 * theirs["median"],
            iou_of(theirs["at_best_for_background"]),
            ours=False,
        )
        name = f"petseg in {same['engine'].partition(' ')[0]} {same['precision']}, the same {some}"
        yield Dot(name, 1e3 * same["median"], iou_of(same["own"]), ours=True)
    for time in accuracy["rival_times"]:
        name = f"{rival['name']}, {time['engine'].partition(' ')[0]} {time['precision']}"
        beside = own.get((time["engine"], time["precision"]))
        ms = beside * time["petseg_times_as_fast"] if beside else time["median"]
        yield Dot(name, ms, iou_of(rival["sets"][photos]), ours=False)
    reached = wide["tests"][photos]["at_thresholds_of_validation"]["background"]["iou"]
    for row in next(network["rows"] for network in latency["networks"] if network["name"] == WIDE):
        if (row["stored"], row["precision"]) == ("fp32", "f32"):
            name = f"the published network, 128 × 128, trained by us, {row['engine'].partition(' ')[0]} f32"
            yield Dot(name, row["median"], reached, ours=False)


def time_of(row: Mapping[str, Any], times: Sequence[Mapping[str, Any]]) -> float | None:
    """Returns the median of the same engine, precision, device and kind of file, or None if it was not measured."""
    for other in times:
        same = all(other[key] == row[key] for key in ("engine", "precision"))
        same = same and other.get("device", "cpu") == row.get("device", "cpu")
        if same and (other["stored"] == row["stored"] or "eager" in row["engine"]):
            return float(other["median"])
    return None


def iou_of(found: Mapping[str, Any]) -> float:
    return float(found["readings"]["background"]["iou"])


def accuracy_figure(
    accuracy: Mapping[str, Any],
    latency: Mapping[str, Any],
    peers: Mapping[str, Any],
    rival: Mapping[str, Any],
    wide: Mapping[str, Any],
) -> Figure:
    """Draws a panel for each set of photos, and one with the times of the peers, whose weights are random."""
    sets, others = list(accuracy["photos"]), peers["rows"]
    heights = [3.2] * len(sets) + [0.8 + 0.2 * len(others)]
    figure = Figure(figsize=(14, sum(heights)), layout="constrained")
    panels = figure.subplots(len(heights), 1, sharex=True, height_ratios=heights)
    for axes, photos in zip(panels[:-1], sets, strict=True):
        numbered(axes, sorted(dots(accuracy, latency, rival, wide, photos), key=lambda dot: dot.ms))
        if photos == sets[0]:  # the published figure is of the whole test split; the first set is most of it
            published = NETWORK["readings"]["background"]["iou"]
            label = f"{NETWORK['name']}, input size not given: {published:.4f}"
            axes.axhline(published, color=GREY, linestyle="--", linewidth=0.8, label=label)
        some = accuracy["compared"]["photos"][photos]
        less = (
            f"; other engines: PyTorch's IoU minus their loss on {some} of these photos"
            if some < accuracy["photos"][photos]
            else ""
        )
        axes.set_title(f"{photos}\nthe network alone, one photo at a time{less}", fontsize=10, loc="left")
        axes.set_ylabel("IoU, border as background")
        axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5), handlelength=1)
        axes.margins(y=0.15)
    whole_processes(panels[-1], others)
    for axes in panels:
        axes.set_xscale("log")
        axes.grid(alpha=0.25)
    panels[-1].set_xlabel("ms per photo (logarithmic scale)")
    return figure


def numbered(axes: Axes, found: Sequence[Dot]) -> None:
    """Draws numbered dots and a legend: engines differ so little in IoU that names beside the dots would collide."""
    for number, dot in enumerate(found, start=1):
        colour, marker = (OURS, "o") if dot.ours else (THEIRS, "D")
        label = f"{number}  {dot.name}: {dot.ms:.{1 if dot.ms < 100 else 0}f} ms, {dot.iou:.4f}"
        axes.plot([dot.ms], [dot.iou], marker, color=colour, label=label)
        above = 7 if number % 2 else -14  # so that the numbers of neighbours do not collide
        axes.annotate(
            str(number),
            (dot.ms, dot.iou),
            (0, above),
            textcoords="offset points",
            fontsize=8,
            ha="center",
            color=colour,
        )


def whole_processes(axes: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    """Draws ms per photo from the file to the mask, once the process is running; the fastest first."""
    times = sorted((1e3 / row["photos_per_second_once_running"]["median"], row["name"]) for row in rows)
    for place, (ms, name) in enumerate(times):
        colour, marker = (OURS, "o") if name.startswith("petseg") else (THEIRS, "D")
        axes.plot([ms], [place], marker, color=colour)
    axes.set_yticks(range(len(times)), [name for _, name in times], fontsize=7)
    axes.invert_yaxis()
    but_one = ", except ISNet's" if any("isnet" in name for _, name in times) else ""
    axes.set_title(
        f"from the file to the mask, in a folder; peers' weights are random{but_one}", fontsize=10, loc="left"
    )


# Stages


#: For each bar, the milliseconds of each step, in order.
Bars: TypeAlias = dict[str, dict[str, float]]


def photo_bars(throughput: Mapping[str, Any]) -> Bars:
    """Returns the CPU milliseconds per photo of each step run alone; the median of the rounds."""
    return {
        f"{row['backend']}, {row['kind']}": {
            name: 1e3 * median(step[name]["cpu_seconds"] for step in row["steps"]) for name in row["steps"][0]
        }
        for row in throughput["rows"]
    }


def frame_bars(video: Mapping[str, Any]) -> Bars:
    """Returns the wall milliseconds of each step of a frame, median over frames; the steps run in parallel."""
    return {
        f"{row['backend']}, {row['kind']}": {
            name: 1e3 * found["p50"] for name, found in row["steps"].items() if name in STEPS
        }
        for row in video["rows"]
    }


def stage_figure(parts: Mapping[str, Bars]) -> Figure:
    """Draws a panel for each part, with a stacked bar of steps for each engine and kind of output."""
    figure = Figure(figsize=(9, sum(1.1 + 0.34 * len(bars) for bars in parts.values())), layout="constrained")
    heights = [1 + len(bars) for bars in parts.values()]
    panels = figure.subplots(len(parts), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axes, (title, bars) in zip(panels, parts.items(), strict=True):
        for place, steps in enumerate(bars.values()):
            left = 0.0
            for name, ms in steps.items():
                axes.barh(place, ms, left=left, color=STEPS.get(name, GREY), label="_" if place else name)
                left += ms
            axes.annotate(f" {left:.1f}", (left, place), va="center", fontsize=8)
        axes.set_yticks(range(len(bars)), list(bars))
        axes.invert_yaxis()
        axes.margins(x=0.08)
        axes.set_title(title, fontsize=10)
        axes.grid(alpha=0.25, axis="x")
        axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def save(figure: Figure, name: str) -> Path:
    """Writes an SVG beside the records, without a date or random ids: the same records give the same bytes."""
    path = records.RESULTS / name
    with replacing(path) as beside, matplotlib.rc_context({"svg.hashsalt": "petseg"}):
        about = {"Date": None, "Description": f"records sha256 {digest(name)}"}
        figure.savefig(beside, format="svg", metadata=about)
    return path
