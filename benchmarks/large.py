"""Throughput of `petseg infer` on photos of the size that cameras and phones take, and the size of the results.

    python -m benchmarks large --data data

The data set's photos are small. Here some are enlarged to twelve megapixels and saved as JPEG, as in reduced.py: a
camera's size and encoding, but no finer detail than the photo had. `petseg infer` turns a folder of them into each kind
of result, the kinds in turns; rates are measured from the first result on disk to the last.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Final

import click

from benchmarks import records
from benchmarks.photos import chosen, data_option
from benchmarks.processes import first_to_last, seconds_of
from benchmarks.reduced import enlarged

MEGAPIXELS: Final = 12.0


@dataclass(frozen=True)
class Kind:
    """A kind of result.

    Attributes:
        name: The name of its row, also for display.
        options: Options of `petseg infer`.
        suffix: Suffix of the result files.
    """

    name: str
    options: tuple[str, ...]
    suffix: str


KINDS: Final = (
    Kind("mask", ("--as", "mask"), ".png"),
    Kind("mask, --fast-decode", ("--as", "mask", "--fast-decode"), ".png"),
    Kind("overlay", ("--as", "overlay"), ".jpg"),
    Kind("cutout", ("--as", "cutout"), ".png"),
    Kind("cutout, --format webp", ("--as", "cutout", "--format", "webp"), ".webp"),
)


@click.command()
@data_option
@click.option("--photos", type=click.IntRange(2), default=12, show_default=True, help="Photos in the folder.")
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True, help="Runs of each kind of result.")
def large(data: Path, photos: int, rounds: int) -> None:
    """Measure the photos per second of `petseg infer FOLDER` on photos of twelve megapixels."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "photos"
        folder.mkdir()
        for number, photo in enumerate(chosen(data, photos)):
            (folder / f"{number:04d}.jpg").write_bytes(enlarged(photo, MEGAPIXELS))
        taken: dict[Kind, list[dict[str, float]]] = {kind: [] for kind in KINDS}
        for kind in KINDS:
            one(folder, Path(scratch) / "out", kind)  # warm-up: compiles bytecode and kernels, fills the disk cache
        for _ in range(rounds):
            for kind in KINDS:
                taken[kind].append(one(folder, Path(scratch) / "out", kind))
                rate, size = taken[kind][-1]["photos_per_second"], taken[kind][-1]["megabytes"]
                click.echo(f"{kind.name}: {rate:.2f} photos/s, {size:.2f} MB a result", err=True)
    rows = [{"name": kind.name, **row(runs)} for kind, runs in taken.items()]
    command = f"python -m benchmarks large --data DATA --photos {photos} --rounds {rounds}"
    click.echo(records.write("large", command, {"photos": photos, "megapixels": MEGAPIXELS, "rows": rows}))


def one(folder: Path, output: Path, kind: Kind) -> dict[str, float]:
    """Run once; return the seconds from the first result to the last, photos per second, and megabytes per result."""
    words: list[str | Path] = ["-m", "petseg.cli", "infer", folder, *kind.options, "--quiet", "--output", output]
    seconds_of(words)
    written, span = first_to_last(output, kind.suffix)
    size = sum(path.stat().st_size for path in output.rglob(f"*{kind.suffix}")) / written / 1e6
    shutil.rmtree(output)
    return {"first_to_last": span, "photos_per_second": (written - 1) / span, "megabytes": size}


def row(runs: Sequence[dict[str, float]]) -> dict[str, Any]:
    """Return the medians, and the raw times."""
    return {
        "first_to_last": [run["first_to_last"] for run in runs],
        "photos_per_second": median(run["photos_per_second"] for run in runs),
        "megabytes": median(run["megabytes"] for run in runs),
    }
