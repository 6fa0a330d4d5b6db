"""Throughput of `petseg infer` on a folder of photos, compared with the bound set by its steps and with a plain loop.

The bound is the smaller of two rates: the photos per second of the slowest step alone, and the number of cores divided
by the CPU seconds that all steps need for a photo. Rates are measured from the first result on disk to the last, as
start-up is not a step; the rate of the whole process is recorded, too. The steps alone are measured in every second
round.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any, Final

import click

from benchmarks import records
from benchmarks.photos import data_option, original_size_folders
from benchmarks.processes import first_to_last, seconds_of
from petseg_runtime import Segmenter
from petseg_runtime.host import usable_cpus
from petseg_runtime.sinks import KINDS, ImageSink, picture
from petseg_runtime.sources import Item, find_photos

#: Backend and kind of output: both engines, and the output that costs most to write.
CASES: Final = (("openvino", "mask"), ("openvino", "cutout"), ("onnxruntime", "mask"))
#: Photos of the warm-up run, which compiles kernels and bytecode, and fills the disk cache.
WARM: Final = 8
#: The steps alone are measured every so many rounds.
BETWEEN: Final = 2

#: The plain loop that people write without a pipeline: photo by photo, in the same engine, with all its threads.
LOOP = """
import sys
from pathlib import Path
from petseg_runtime import Segmenter
from petseg_runtime.sinks import picture
kind, backend, output, *photos = sys.argv[1:]
form = picture(kind)
with Segmenter(backend=backend) as segmenter:
    for photo in photos:
        form.save(segmenter(photo), Path(output) / f"{Path(photo).stem}.{form.format}")
"""


@click.command()
@data_option
@click.option("--photos", type=click.IntRange(2), default=100, show_default=True, help="Photos in the folder.")
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True, help="Runs of each.")
def throughput(data: Path, photos: int, rounds: int) -> None:
    """Measure the photos per second of `petseg infer FOLDER`, of its steps alone, and of a plain loop."""
    folders = original_size_folders(data)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "photos"
        folder.mkdir()
        chosen = find_photos(folders)[:photos]
        for number, item in enumerate(chosen):
            shutil.copyfile(item.source, folder / f"{number:04d}{item.source.suffix}")
        rows = [one(folder, Path(scratch), kind, backend, rounds) for backend, kind in CASES]
    command = f"python -m benchmarks throughput --data DATA --photos {photos} --rounds {rounds}"
    click.echo(records.write("throughput", command, {"photos": len(chosen), "rows": rows}))


def one(folder: Path, scratch: Path, kind: str, backend: str, rounds: int) -> dict[str, Any]:
    """Measure a row: the command and the loop in alternation, and in some rounds each step alone."""
    photos = sorted(folder.iterdir())
    few = scratch / "few"
    few.mkdir(exist_ok=True)
    for photo in photos[:WARM]:
        shutil.copyfile(photo, few / photo.name)
    taken: dict[str, list[float]] = {"command": [], "loop": []}
    rate: dict[str, list[float]] = {"command": [], "loop": []}
    steps: dict[int, dict[str, dict[str, float]]] = {}
    for number in (None, *range(rounds)):
        output = scratch / f"{kind}-{backend}-{number}"
        for name in taken:
            results = output / name
            results.mkdir(parents=True)
            seconds = seconds_of(words(name, few if number is None else folder, results, kind, backend))
            written, span = first_to_last(results, f".{picture(kind).format}")
            if number is not None:
                taken[name].append(seconds)
                rate[name].append((written - 1) / span)
        if number is not None and number % BETWEEN == 0:
            steps[number] = alone(folder, output / "alone", kind, backend)
        shutil.rmtree(output)
    bounds = {number: allowed(each, usable_cpus()) for number, each in steps.items()}
    shares = [rate["command"][number] / bound for number, bound in bounds.items()]
    ratios = [a / b for a, b in zip(rate["command"], rate["loop"], strict=True)]
    row: dict[str, Any] = {
        "kind": kind,
        "backend": backend,
        "seconds": taken,
        "rates": rate,
        "steps": list(steps.values()),
        "photos_per_second": {name: median(values) for name, values in rate.items()},
        "photos_per_second_with_start": len(photos) / median(taken["command"]),
        "allowed_by_steps": median(bounds.values()),
        "share_of_allowed": median(shares),
        "share_of_allowed_each": shares,
        "ratio_to_loop": median(ratios),
        "ratio_to_loop_each": ratios,
    }
    ours, loops = row["photos_per_second"].values()
    click.echo(
        f"{kind} in {backend}: {ours:.1f} photos/s, {100 * row['share_of_allowed']:.0f} % of what its steps allow; "
        f"the loop {loops:.1f}, ratio {row['ratio_to_loop']:.2f}",
        err=True,
    )
    return row


def words(name: str, folder: Path, results: Path, kind: str, backend: str) -> list[str | Path]:
    """Return Python's arguments to run ``command`` or ``loop`` on a folder, writing to ``results``."""
    if name == "loop":
        return ["-c", LOOP, kind, backend, results, *sorted(folder.iterdir())]
    options: list[str | Path] = ["--as", kind, "--backend", backend, "--quiet", "--output", results]
    return ["-m", "petseg.cli", "infer", folder, *options]


def allowed(steps: Mapping[str, Mapping[str, float]], cores: int) -> float:
    """Return the upper bound in photos per second that the steps alone set."""
    slowest = max(step["seconds"] for step in steps.values())
    return min(1 / slowest, cores / sum(step["cpu_seconds"] for step in steps.values()))


def alone(folder: Path, output: Path, kind: str, backend: str) -> dict[str, dict[str, float]]:
    """Return the seconds per photo of each step alone over all photos, with the threads it has in the pipeline."""
    items = find_photos([folder])
    with Segmenter(backend=backend, streams=usable_cpus()) as segmenter:
        segmenter.infer(segmenter.prepare(items[0].source).image[None])
        workers = segmenter.describe().streams
        sink = ImageSink(output, picture(kind), items)

        def read(item: Item) -> Any:
            return segmenter.prepare(item.source, mask_only=not KINDS[kind].needs_photo)

        def write(job: tuple[Item, Any, Any]) -> None:
            sink.write(job[0], segmenter.finish(*job[1:]))

        totals: dict[str, list[float]] = {"read": [0, 0], "infer": [0, 0], "write": [0, 0]}
        for start in range(0, len(items), 100):  # a hundred photos fit into memory
            part = items[start : start + 100]
            prepared = timed_map(read, part, workers, totals["read"])
            answers = timed_map(lambda p: segmenter.infer(p.image[None])[0], prepared, workers, totals["infer"])
            timed_map(write, list(zip(part, prepared, answers, strict=True)), workers, totals["write"])
    photos = len(items)
    return {name: {"seconds": wall / photos, "cpu_seconds": cpu / photos} for name, (wall, cpu) in totals.items()}


def timed_map(function: Callable[[Any], Any], values: Iterable[Any], workers: int, total: list[float]) -> list[Any]:
    """Map a function over values in a thread pool, and add the wall and CPU seconds to ``total``."""
    wall, cpu = time.perf_counter(), time.process_time()
    with ThreadPoolExecutor(workers) as pool:
        results = list(pool.map(function, values))
    total[0] += time.perf_counter() - wall
    total[1] += time.process_time() - cpu
    return results
