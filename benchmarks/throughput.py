"""A folder of photos: how near the whole command comes to what its steps alone allow, and to a plain loop.

What the steps alone allow is the smaller of two: the photos a second of the slowest step by itself, and the number of
cores over the CPU seconds that all steps need for a photo.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

import click

from benchmarks import records
from benchmarks.photos import of_any_use
from petseg_runtime import Segmenter
from petseg_runtime.engines.base import usable_cpus
from petseg_runtime.sinks import KINDS, ImageSink, picture
from petseg_runtime.sources import Item, find_photos

#: What people write without a pipeline: one photo after the other, in the same engine, with all its threads.
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
@click.option("--data", type=click.Path(path_type=Path), default=Path("data"), show_default=True)
@click.option("--photos", type=int, default=1000, show_default=True)
@click.option("--rounds", type=int, default=3, show_default=True)
def throughput(data: Path, photos: int, rounds: int) -> None:
    """Photos a second of `petseg infer FOLDER`, against its own steps and against a plain loop."""
    folders = of_any_use(data)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "photos"
        folder.mkdir()
        for item in find_photos(folders)[:photos]:
            shutil.copyfile(item.source, folder / f"{len(list(folder.iterdir())):04d}{item.source.suffix}")
        rows = [
            one(folder, Path(scratch), kind, backend, rounds)
            for backend in ("openvino", "onnxruntime")
            for kind in ("mask", "cutout")
        ]
    command = f"python -m benchmarks throughput --data DATA --photos {photos} --rounds {rounds}"
    records.write("throughput", command, {"photos": photos, "rows": rows})


def one(folder: Path, scratch: Path, kind: str, backend: str, rounds: int) -> dict[str, Any]:
    """A row: the command and the loop in alternation, and between them each step alone."""
    photos = sorted(folder.iterdir())
    command = ["infer", str(folder), "--as", kind, "--backend", backend, "--quiet"]
    loop = ["-c", LOOP, kind, backend]
    taken: dict[str, list[float]] = {"command": [], "loop": []}
    steps: list[dict[str, dict[str, float]]] = []
    for number in range(rounds):
        output = scratch / f"{kind}-{backend}-{number}"
        (output / "loop").mkdir(parents=True)
        taken["command"].append(timed(["-m", "petseg.cli", *command, "--output", str(output / "command")]))
        taken["loop"].append(timed([*loop, str(output / "loop"), *map(str, photos)]))
        steps.append(alone(folder, output / "alone", kind, backend))
        shutil.rmtree(output)
    slowest = [min(1 / step["seconds"] for step in each.values()) for each in steps]
    cores = [usable_cpus() / sum(step["cpu_seconds"] for step in each.values()) for each in steps]
    bounds = [min(pair) for pair in zip(slowest, cores, strict=True)]
    rate = {name: [len(photos) / seconds for seconds in values] for name, values in taken.items()}
    row = {
        "kind": kind,
        "backend": backend,
        "seconds": taken,
        "steps": steps,
        "photos_per_second": {name: median(values) for name, values in rate.items()},
        "allowed_by_steps": median(bounds),
        "share_of_allowed": median(got / bound for got, bound in zip(rate["command"], bounds, strict=True)),
        "ratio_to_loop": median(a / b for a, b in zip(rate["command"], rate["loop"], strict=True)),
    }
    told = {name: row[name] for name in ("photos_per_second", "allowed_by_steps", "share_of_allowed", "ratio_to_loop")}
    click.echo(f"{kind} {backend}: {told}", err=True)
    return row


def timed(arguments: list[str]) -> float:
    """Wall seconds of a whole Python process."""
    start = time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True)
    return time.perf_counter() - start


def alone(folder: Path, output: Path, kind: str, backend: str) -> dict[str, dict[str, float]]:
    """Each step by itself over all photos, with the threads it has in the pipeline: seconds a photo."""
    items = find_photos([folder])
    with Segmenter(backend=backend, streams=usable_cpus()) as segmenter:
        segmenter.infer(segmenter.prepare(items[0].source).image[None])
        workers = segmenter.describe().streams
        sink = ImageSink(output, picture(kind), items)

        def read(item: Item) -> Any:
            return segmenter.prepare(item.source, mask_only=not KINDS[kind].needs_photo)

        def write(job: tuple[Item, Any, Any]) -> None:
            sink.write(job[0], segmenter.finish(*job[1:]))

        found: dict[str, dict[str, float]] = {}
        totals: dict[str, list[float]] = {"read": [0, 0], "infer": [0, 0], "write": [0, 0]}
        for start in range(0, len(items), 100):  # the photos of a hundred fit into memory
            part = items[start : start + 100]
            prepared = spent(read, part, workers, totals["read"])
            answers = spent(lambda p: segmenter.infer(p.image[None])[0], prepared, workers, totals["infer"])
            spent(write, list(zip(part, prepared, answers, strict=True)), workers, totals["write"])
        for name, (wall, cpu) in totals.items():
            found[name] = {"seconds": wall / len(items), "cpu_seconds": cpu / len(items)}
    return found


def spent(function: Callable[[Any], Any], values: Iterable[Any], workers: int, total: list[float]) -> list[Any]:
    """The results of a function; its wall and CPU seconds are added to ``total``."""
    wall, cpu = time.perf_counter(), time.process_time()
    with ThreadPoolExecutor(workers) as pool:
        results = list(pool.map(function, values))
    total[0] += time.perf_counter() - wall
    total[1] += time.process_time() - cpu
    return results
