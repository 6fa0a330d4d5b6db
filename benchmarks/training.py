"""How fast `petseg train` trains here: photos a second, and the share of time that it waits for data.

Short runs of the recipes' networks over a few photos, by the command that people type; the figures are those that it
leaves in its own run.json and log.csv. The first epoch of each run warms up and is not counted.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Final

import click

from benchmarks import records
from benchmarks.photos import training_set
from petseg import log, recipes
from petseg.device import pick_device

#: Share of the photos that a run validates on; each epoch ends with it, and it is not timed.
VALIDATION: Final = 0.05
#: Photos more than the steps take: some show no pet, and are left out.
SPARE: Final = 8


@dataclass(frozen=True)
class Run:
    """A network to train.

    Attributes:
        name: Tells it from the others.
        recipe: Whose settings it has; on a CPU the size is another where the recipe's would take too long.
        width: Of the network.
        stem: Likewise.
        size: Height and width of a photo.
        steps: In an epoch.
    """

    name: str
    recipe: str
    width: int
    stem: str
    size: int
    steps: int

    @property
    def batch(self) -> int:
        """Photos a step: the recipe's."""
        return int(recipes.load(self.recipe)["batch"])


#: On a CPU, without the published width, whose steps take a quarter of a minute there: it wants a GPU.
RUNS: Final = (
    Run("width 16", "edge", 16, "full", 192, 3),
    Run("width 16, strided stem", "edge", 16, "strided", 256, 4),
)
#: On a GPU, which is so much faster that as few steps would be over before it is warm.
GPU_RUNS: Final = (
    Run("width 16, strided stem", "edge", 16, "strided", 256, 48),
    Run("width 64", "published", 64, "full", 256, 48),
)


@click.command()
@click.option("--data", type=click.Path(path_type=Path), default=Path("data"), show_default=True)
@click.option(
    "--epochs", type=click.IntRange(min=2), default=4, show_default=True, help="Of each run; the first warms up."
)
@click.option("--device", default="auto", show_default=True)
def training(data: Path, epochs: int, device: str) -> None:
    """Photos a second of `petseg train` for each of the recipes' networks."""
    rows = []
    for run in GPU_RUNS if on_gpu(device) else RUNS:
        rows.append(one(run, training_set(data), epochs, device))
        rate, wait = rows[-1]["images_per_second"], rows[-1]["share_waiting_for_data"]
        click.echo(
            f"{run.name} at {run.size}: {rate:.1f} photos/s, {100 * wait:.1f} % of the time waiting for data", err=True
        )
    command = f"python -m benchmarks training --data DATA --epochs {epochs}" + (
        f" --device {device}" if device != "auto" else ""
    )
    records.write("training", command, {"rows": rows})


def one(run: Run, data: Path, epochs: int, device: str) -> dict[str, Any]:
    """A row: the command over a few photos, and what it recorded."""
    with tempfile.TemporaryDirectory() as scratch:
        folder, output = Path(scratch) / data.name, Path(scratch) / "run"
        few(data, folder, round(run.steps * run.batch / (1 - VALIDATION)) + SPARE)
        command = words(run, epochs, device, workers=None if on_gpu(device) else 0)
        subprocess.run([*command, "--data", str(folder), "--output", str(output)], cwd=records.ROOT, check=True)
        record = json.loads((output / "run.json").read_text(encoding="utf-8"))
        rows = log.read(output / log.LOG)
    return row(run, record, rows)


def on_gpu(device: str) -> bool:
    """Whether `petseg train --device DEVICE` trains on a GPU here."""
    return pick_device(device).type == "cuda"


def words(run: Run, epochs: int, device: str, workers: int | None) -> list[str]:
    """`petseg train` of a run, without its folders; without a teacher, whom the recipe does without, too.

    Without ``workers`` there are as many as the recipe says.
    """
    settings: dict[str, Any] = {"model.stem": run.stem, "data.val_fraction": VALIDATION}
    settings |= {} if workers is None else {"data.workers": workers}
    command = [sys.executable, "-m", "petseg.cli", "train", "--quiet", "--recipe", run.recipe, "--device", device]
    command += ["--width", str(run.width), "--size", str(run.size), "--epochs", str(epochs)]
    for name, value in settings.items():
        command += ["--set", f"{name}={value}"]
    return command


def few(data: Path, folder: Path, photos: int) -> None:
    """A data folder with some photos of another, spread evenly over its list, which is sorted by breed."""
    (folder / "annotations").mkdir(parents=True)
    (folder / "images").symlink_to((data / "images").resolve())
    (folder / "annotations" / "trimaps").symlink_to((data / "annotations" / "trimaps").resolve())
    listing = (data / "annotations" / "trainval.txt").read_text(encoding="utf-8").splitlines()
    names = [line for line in listing if line.strip() and not line.startswith("#")]
    if len(names) < photos:
        raise SystemExit(f"{data} has {len(names)} photos for training; {photos} are needed")
    chosen = [names[i * len(names) // photos] for i in range(photos)]
    (folder / "annotations" / "trainval.txt").write_text("\n".join(chosen) + "\n", encoding="utf-8")


def row(run: Run, record: Mapping[str, Any], rows: Sequence[log.Row]) -> dict[str, Any]:
    """What run.json and log.csv say, without the first epoch."""
    counted = rows[1:]
    rates = [epoch.images_per_s for epoch in counted]
    waits = [epoch.data_wait for epoch in counted]
    steps = [epoch.step - before.step for before, epoch in zip(rows, counted, strict=False)]
    return {
        "name": run.name,
        "recipe": run.recipe,
        "size": run.size,
        "batch": record["config"]["batch"],
        "device": record["device"],
        "precision": record["precision"],
        "threads": record["threads"],
        "workers": record["config"]["data"]["workers"],
        "steps": sum(steps),
        "seconds": [epoch.seconds / count for epoch, count in zip(counted, steps, strict=True)],
        "images_per_second": median(rates),
        "lowest_and_highest": [min(rates), max(rates)],
        "share_waiting_for_data": median(waits),
        "whole_run": {key: record[key] for key in ("images_per_s", "data_wait", "elapsed")},
        "peak_gpu_memory_bytes": record["peak_gpu_memory_bytes"],
    }
