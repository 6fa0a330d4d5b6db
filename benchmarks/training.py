"""Speed of `petseg train` here: photos per second, and the share of time that it waits for data.

Each of the recipes' networks is trained briefly on a few photos with `petseg train`; the figures are read from its
run.json and log.csv. The first epoch of each run is a warm-up and is not counted.
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
from benchmarks.photos import data_option, training_set
from petseg import log, recipes
from petseg.device import pick_device

#: Share of the photos to validate on; the validation at the end of each epoch is not timed.
VALIDATION: Final = 0.05
#: Extra photos beyond what the steps need: photos without a pet in their mask are excluded.
SPARE: Final = 8


@dataclass(frozen=True)
class Run:
    """A network to train.

    Attributes:
        name: Its unique name.
        recipe: The recipe whose settings it uses; on a CPU the size differs where the recipe's would take too long.
        width: Width of the network.
        stem: Its stem.
        size: Height and width of a photo.
        steps: Steps per epoch.
    """

    name: str
    recipe: str
    width: int
    stem: str
    size: int
    steps: int

    @property
    def batch(self) -> int:
        """Photos per step, as in the recipe."""
        return int(recipes.load(self.recipe)["batch"])


#: Runs on a CPU. The published width is missing: a step takes a quarter of a minute there.
RUNS: Final = (
    Run("width 16", "edge", 16, "full", 192, 3),
    Run("width 16, strided stem", "edge", 16, "strided", 256, 4),
)
#: Runs on a GPU, which needs more steps: it would finish the few above before it is warm.
GPU_RUNS: Final = (
    Run("width 16, strided stem", "edge", 16, "strided", 256, 48),
    Run("width 64", "published", 64, "full", 256, 48),
)


@click.command()
@data_option
@click.option(
    "--epochs",
    type=click.IntRange(min=2),
    default=4,
    show_default=True,
    help="Epochs of each run; the first is a warm-up.",
)
@click.option("--device", default="auto", show_default=True, help="Device, as for `petseg train`.")
def training(data: Path, epochs: int, device: str) -> None:
    """Measure the photos per second of `petseg train` for each of the recipes' networks."""
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
    click.echo(records.write("training", command, {"rows": rows}))


def one(run: Run, data: Path, epochs: int, device: str) -> dict[str, Any]:
    """Run `petseg train` on a few photos, and return the row of its results."""
    with tempfile.TemporaryDirectory() as scratch:
        folder, output = Path(scratch) / data.name, Path(scratch) / "run"
        make_subset(data, folder, round(run.steps * run.batch / (1 - VALIDATION)) + SPARE)
        command = words(run, epochs, device, workers=None if on_gpu(device) else 0)
        subprocess.run([*command, "--data", str(folder), "--output", str(output)], cwd=records.ROOT, check=True)
        record = json.loads((output / "run.json").read_text(encoding="utf-8"))
        rows = log.read(output / log.LOG)
    return row(run, record, rows)


def on_gpu(device: str) -> bool:
    """Return whether `petseg train --device DEVICE` trains on a GPU here."""
    return pick_device(device).type == "cuda"


def words(run: Run, epochs: int, device: str, workers: int | None) -> list[str]:
    """Return the `petseg train` command of a run, without its folders and, as the recipe allows, without a teacher.

    If ``workers`` is None, the recipe's number is used.
    """
    settings: dict[str, Any] = {"model.stem": run.stem, "data.val_fraction": VALIDATION}
    settings |= {} if workers is None else {"data.workers": workers}
    command = [sys.executable, "-m", "petseg.cli", "train", "--quiet", "--recipe", run.recipe, "--device", device]
    command += ["--width", str(run.width), "--size", str(run.size), "--epochs", str(epochs)]
    for name, value in settings.items():
        command += ["--set", f"{name}={value}"]
    return command


def make_subset(data: Path, folder: Path, photos: int) -> None:
    """Make a data folder with some photos of another, spread evenly over its list, which is sorted by breed."""
    (folder / "annotations").mkdir(parents=True)
    (folder / "images").symlink_to((data / "images").resolve())
    (folder / "annotations" / "trimaps").symlink_to((data / "annotations" / "trimaps").resolve())
    listing = (data / "annotations" / "trainval.txt").read_text(encoding="utf-8").splitlines()
    names = [line for line in listing if line.strip() and not line.startswith("#")]
    if len(names) < photos:
        raise SystemExit(f"{data}: has {len(names)} photos for training, {photos} are needed")
    chosen = [names[i * len(names) // photos] for i in range(photos)]
    (folder / "annotations" / "trainval.txt").write_text("\n".join(chosen) + "\n", encoding="utf-8")


def row(run: Run, record: Mapping[str, Any], rows: Sequence[log.Row]) -> dict[str, Any]:
    """Summarize run.json and log.csv, without the first epoch."""
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
