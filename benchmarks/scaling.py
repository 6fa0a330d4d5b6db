"""How cost scales with image size, batch size and threads, and memory with the length of a video.

The network is the built-in model's at every size; a file is exported for each. Memory is the peak of the whole process
of `petseg infer CLIP`: it must not depend on the length of the clip.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from statistics import median
from typing import Any, Final, NamedTuple

import av
import click
import numpy as np
from PIL import Image

from benchmarks import records
from benchmarks.latency import CHECKPOINT, WEIGHTS, scratch, write_onnx
from benchmarks.peers.pipeline import WATCH
from benchmarks.turns import alternated, count, timed
from petseg_runtime.artifact import default_model, open_artifact, sample_photos
from petseg_runtime.engines.base import Engine
from petseg_runtime.engines.registry import load_engine
from petseg_runtime.host import usable_cpus

ENGINES: Final = ("openvino", "onnxruntime")
SIZES: Final = (96, 160, 256, 384)
BATCHES: Final = (1, 2, 4, 8)
CLIP_SECONDS: Final = (5, 30)
CLIP_RATE: Final = 30
#: Relative change of cost or memory that counts.
TOLERANCE: Final = 0.05
#: Runs of each clip that are needed to report a slope of its memory.
RUNS_FOR_SLOPE: Final = 3


class Point(NamedTuple):
    """A point to measure: the side of a square photo in pixels, the photos per run, and the threads."""

    size: int
    batch: int
    threads: int


@click.command()
@click.option(
    "--rounds",
    type=click.IntRange(1),
    default=11,
    show_default=True,
    help="Turns of each size, batch and thread count.",
)
@click.option("--clip-rounds", type=click.IntRange(1), default=2, show_default=True, help="Runs of each clip.")
def scaling(rounds: int, clip_rounds: int) -> None:
    """Measure cost by image size, batch size and threads, and memory by video length; find where the curves bend."""
    spec = open_artifact(default_model()).spec
    threads = sorted({1, usable_cpus()})
    with scratch() as folder:
        for size in {*SIZES, spec.height}:
            (folder / str(size)).mkdir()
            (folder / str(size) / WEIGHTS).symlink_to(CHECKPOINT)
            write_onnx(folder / str(size), dataclasses.replace(spec, height=size, width=size), ("fp32",))
        by_size = [Point(size, 1, number) for number in threads for size in SIZES]
        by_batch = [Point(spec.height, batch, number) for number in threads for batch in BATCHES]
        curves = [curve for engine in ENGINES for curve in measured(engine, folder, by_size, by_batch, rounds)]
        values = {"model": spec.name, "batch_at_size": spec.height, "curves": curves, "threads": gains(curves)}
        memory = clip_memory(folder, clip_rounds)
    for name, statement in (*((c["name"], c["bend"]["statement"]) for c in curves), ("memory", memory["statement"])):
        click.echo(f"{name}: {statement}", err=True)
    command = f"python -m benchmarks scaling --rounds {rounds} --clip-rounds {clip_rounds}"
    click.echo(records.write("scaling", command, {**values, "memory": memory}))


def measured(
    name: str, folder: Path, by_size: Sequence[Point], by_batch: Sequence[Point], rounds: int
) -> list[dict[str, Any]]:
    """Measure an engine's curves: cost per pixel by size and cost per photo by batch, for each number of threads."""
    with contextlib.ExitStack() as stack:
        engines: dict[tuple[int, int], Engine] = {}
        for size, _, threads in (*by_size, *by_batch):
            if (size, threads) not in engines:
                artifact = open_artifact(folder / str(size) / "fp32.onnx")
                engines[size, threads] = stack.enter_context(load_engine(artifact, name, threads))
        # One thread and all threads in the same turns, because they are compared with each other.
        times = in_turns(engines, sorted({*by_size, *by_batch}), rounds)
        computed = next(iter(engines.values())).describe().precision
    found = []
    for axis, points in (("size", by_size), ("batch", by_batch)):
        for threads in dict.fromkeys(point.threads for point in points):
            chosen = [point for point in points if point.threads == threads]
            title = f"{name} {computed}, {axis}, {threads} thread{'s' * (threads > 1)}"
            found.append({"name": title, "threads": threads, **curve(axis, {p: times[p] for p in chosen})})
    return found


def in_turns(
    engines: Mapping[tuple[int, int], Engine], points: Iterable[Point], rounds: int
) -> dict[Point, list[float]]:
    """Return the median milliseconds of each round at each point, all points in turns."""
    random = np.random.default_rng(0)
    photos = {p: random.integers(0, 256, (p.batch, p.size, p.size, 3), dtype=np.uint8) for p in points}
    # The first call with a shape does its one-time work; the second is timed to choose the runs in a turn.
    for p, batch in photos.items():
        engines[p.size, p.threads].run(batch)
    counts = {p: count(timed(engines[p.size, p.threads].run, batch, 1)[0]) for p, batch in photos.items()}
    jobs = {p: (engines[p.size, p.threads].run, batch, counts[p]) for p, batch in photos.items()}
    return {p: [median(values) for values in found] for p, found in alternated(jobs, rounds).times.items()}


def curve(axis: str, times: Mapping[Point, Sequence[float]]) -> dict[str, Any]:
    """Return the points of a curve, and where it bends; the cost is per pixel (ns) or per photo (ms)."""
    rows: list[dict[str, Any]] = []
    costs: list[tuple[int, float]] = []
    for point, values in times.items():
        parts = point.size**2 / 1e6 if axis == "size" else point.batch
        at = point.size if axis == "size" else point.batch
        rows.append({"name": f"{axis} {at}", "at": at, "milliseconds": list(values), "cost": median(values) / parts})
        costs.append((at, median(values) / parts))
    unit = "ns a pixel" if axis == "size" else "ms a photo"
    return {"axis": axis, "unit": unit, "points": rows, "bend": bend(costs, axis, unit)}


def bend(points: Sequence[tuple[int, float]], axis: str, unit: str) -> dict[str, Any]:
    """Find where the cost stops falling, and where it begins to rise again.

    Args:
        points: (size or batch, cost of one pixel or photo), ascending.
        axis: ``size`` or ``batch``.
        unit: Unit of the cost.

    Returns:
        ``falls_until``: the first point within ``TOLERANCE`` of the cheapest; None: the cost rises on the way there, so
        there is no clear bend. ``rises_from``: the first point after the cheapest from which on every cost exceeds the
        lowest by more than ``TOLERANCE``; None: there is none. ``statement``: both, as a sentence.
    """
    costs = [cost for _, cost in points]
    enough = min(costs) * (1 + TOLERANCE)
    until = next(i for i, cost in enumerate(costs) if cost <= enough)
    if any(later > earlier * (1 + TOLERANCE) for earlier, later in itertools.pairwise(costs[: until + 1])):
        text = f"the cost goes up and down, between {short(min(costs))} and {short(max(costs))} {unit}: no clear bend"
        return {"falls_until": None, "rises_from": None, "statement": text}
    cheapest = costs.index(min(costs))
    rising = next((i for i in range(cheapest + 1, len(costs)) if min(costs[i:]) > enough), None)
    text = f"the cost falls until {axis} {points[until][0]} ({short(costs[0])} to {short(costs[until])} {unit})"
    if until == 0:
        text = f"the cost is already lowest, or nearly so, at {axis} {points[0][0]} ({short(costs[0])} {unit})"
    if rising is not None:
        text += f", and rises from {axis} {points[rising][0]} on ({short(costs[-1])} at {points[-1][0]})"
    rises_from = None if rising is None else points[rising][0]
    return {"falls_until": points[until][0], "rises_from": rises_from, "statement": text}


def short(cost: float) -> str:
    """Format a cost with three digits and no exponent."""
    return f"{cost:.3g}" if cost < 100 else f"{cost:.0f}"


def gains(curves: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return how many times as fast all threads are as one, point by point; the ratio is taken within each round."""
    found = []
    for one, many in itertools.pairwise(curves):
        if one["threads"] == 1 < many["threads"] and one["axis"] == many["axis"]:
            ratios = [
                median(a / b for a, b in zip(p["milliseconds"], q["milliseconds"], strict=True))
                for p, q in zip(one["points"], many["points"], strict=True)
            ]
            at = [point["at"] for point in one["points"]]
            found.append({"curve": many["name"], "at": at, "times_as_fast_as_one_thread": ratios})
    return found


# Memory


def clip_memory(folder: Path, rounds: int) -> dict[str, Any]:
    """Measure the peak memory of `petseg infer CLIP` for clips of several lengths, in turns."""
    for seconds in CLIP_SECONDS:
        make_clip(folder / f"{seconds}.mp4", seconds * CLIP_RATE)
    found: dict[int, list[tuple[float, float]]] = {seconds: [] for seconds in CLIP_SECONDS}
    for _ in range(rounds):
        for seconds, runs in found.items():
            clip = folder / f"{seconds}.mp4"
            command = [sys.executable, "-m", "petseg.cli", "infer", str(clip), "--as", "overlay", "--quiet", "--output"]
            with tempfile.TemporaryDirectory() as output:
                words = [sys.executable, "-I", "-S", str(WATCH), *command, output]
                done = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True)
            taken = json.loads(done.stdout)
            runs.append((taken["seconds"], taken["memory_mb"]))
    rows = [
        {
            "name": f"{seconds} s",
            "seconds_of_video": seconds,
            "seconds": [wall for wall, _ in runs],
            "peak_mb": [peak for _, peak in runs],
        }
        for seconds, runs in found.items()
    ]
    return {"clip": f"640x360, {CLIP_RATE} frames/s, overlay", "rows": rows, **flatness(rows)}


def flatness(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return whether the longest clip needs no more memory than the shortest and, with enough runs, MB per minute.

    Runs of the same clip differ by several megabytes: one run of each length does not show a slope.
    """
    peaks = [median(row["peak_mb"]) for row in rows]
    lengths = [row["seconds_of_video"] for row in rows]
    runs = min(len(row["peak_mb"]) for row in rows)
    growth = peaks[-1] / peaks[0] - 1
    flat = growth <= TOLERANCE
    rate = 60 * (peaks[-1] - peaks[-2]) / (lengths[-1] - lengths[-2]) if runs >= RUNS_FOR_SLOPE else None
    slope = "" if rate is None else f"; {rate:+.1f} MB a minute from {lengths[-2]} s on"
    of_each = f"medians of {runs} runs" if runs > 1 else "one run"
    statement = (
        f"{'flat' if flat else 'NOT flat'}: {peaks[-1]:.0f} MB at {lengths[-1]} s, {peaks[0]:.0f} MB at {lengths[0]} s,"
        f" a difference of {peaks[-1] - peaks[0]:+.0f} MB ({100 * growth:+.1f} %; {of_each} of each{slope})"
    )
    return {"growth": growth, "runs_of_each": runs, "mb_per_minute": rate, "flat": flat, "statement": statement}


def make_clip(path: Path, frames: int) -> None:
    """Write a clip of a moving sample photo, 640 x 360, H.264."""
    with Image.open(sample_photos()[0]) as photo:
        pixels = np.asarray(photo.convert("RGB").resize((640, 360)))
    with av.open(str(path), "w") as file:
        stream: Any = file.add_stream("libx264", rate=CLIP_RATE, options={"preset": "veryfast"})
        stream.width, stream.height, stream.pix_fmt = 640, 360, "yuv420p"
        for number in range(frames):
            frame = av.VideoFrame.from_ndarray(np.roll(pixels, 2 * number, axis=1), format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, CLIP_RATE)
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
