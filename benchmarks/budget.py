"""Train the edge network and LR-ASPP alike from random weights, to separate the network's merit from its training's.

    python -m benchmarks budget --data data --output runs/budget --epochs 36

Both see the same photos in the same order, with the same augmentation, schedule, seed and number of epochs (recipe
``edge``), without a teacher. The thresholds of each are chosen on the same validation photos. ``--resume`` resumes the
runs in ``--output``.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any, Final

import click
import torch

from benchmarks import photos, records
from benchmarks.rival import NAME, LrAspp, RivalTrainer, measured
from benchmarks.trainers import EpochLines
from petseg import log, recipes
from petseg.config import TrainConfig, from_dict
from petseg.model import AttentionUNet
from petseg.run_state import LAST
from petseg.train import Trainer

#: For each run's folder: the network's name, its class, and its trainer.
NETWORKS: Final[dict[str, tuple[str, type[AttentionUNet], type[Trainer]]]] = {
    "edge": ("petseg's edge network", AttentionUNet, Trainer),
    "lraspp": (NAME, LrAspp, RivalTrainer),
}


@click.command()
@click.option("--data", type=click.Path(path_type=Path), default=Path("data"), show_default=True)
@click.option("--output", type=click.Path(path_type=Path), required=True, help="Folder for the checkpoints.")
@click.option("--epochs", type=click.IntRange(1), default=36, show_default=True)
@click.option("--size", type=click.IntRange(32), default=256, show_default=True, help="Input height and width.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--resume", is_flag=True)
def budget(data: Path, output: Path, epochs: int, size: int, seed: int, resume: bool) -> None:
    """Train both networks alike, and measure them on the same test photos."""
    recipe = from_dict(TrainConfig, recipes.load("edge"))
    config = replace(recipe, epochs=epochs, seed=seed, data=replace(recipe.data, height=size, width=size))
    rows = []
    for folder, (name, kind, trainer) in NETWORKS.items():
        click.echo(f"{name}:", err=True)
        rows.append({"name": name, **reached(kind, trainer, config, data, output / folder, resume)})
    about = {"epochs": epochs, "size": [size, size], "batch": config.batch, "seed": seed, "teacher": None}
    command = f"python -m benchmarks budget --data DATA --output OUTPUT --epochs {epochs} --size {size} --seed {seed}"
    click.echo(records.write("budget", command, {**about, "networks": rows}))


def reached(
    kind: type[AttentionUNet], trainer: type[Trainer], config: TrainConfig, data: Path, output: Path, resume: bool
) -> dict[str, Any]:
    """Train one network, and return its metrics and training time."""
    run = trainer(
        config,
        photos.training_set(data),
        output,
        device=torch.device("cpu"),
        resume=resume and (output / LAST).exists(),
        observer=EpochLines(),
    )
    found = measured(run.fit(), kind, data)
    return {**found, "precision": run.meta["precision"], "epoch_took_seconds": round(typical_epoch(output), 1)}


def typical_epoch(run: Path) -> float:
    """Median seconds of the training steps of an epoch; the median, because a shared machine is slow at times."""
    return median(row.seconds for row in log.read(run / log.LOG))
