"""The edge network and LR-ASPP, trained alike from random weights: what is the network's, and not its training's.

    python -m benchmarks budget --data data --output runs/budget --epochs 36

The same photos in the same order, augmentation, schedule, seed and number of epochs (recipe ``edge``), no teacher. Each
one's thresholds are chosen on the same validation photos. ``--resume`` goes on with what is in ``--output``.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any, Final

import click
import torch

from benchmarks import photos, records
from benchmarks.rival import NAME, LrAspp, RivalTrainer, Said, measured
from petseg import log, recipes
from petseg.config import TrainConfig, from_dict
from petseg.model import AttentionUNet
from petseg.run_state import LAST
from petseg.train import Trainer

#: Folder of each run: what the network is called, its class, what trains it.
NETWORKS: Final[dict[str, tuple[str, type[AttentionUNet], type[Trainer]]]] = {
    "edge": ("petseg's edge network", AttentionUNet, Trainer),
    "lraspp": (NAME, LrAspp, RivalTrainer),
}


@click.command()
@click.option("--data", type=click.Path(path_type=Path), default=Path("data"), show_default=True)
@click.option("--output", type=click.Path(path_type=Path), required=True, help="Where the checkpoints go.")
@click.option("--epochs", type=click.IntRange(1), default=36, show_default=True)
@click.option("--size", type=click.IntRange(32), default=256, show_default=True, help="Height and width of the photos.")
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
    """One network's time in training, and what came of it."""
    run = trainer(
        config,
        photos.training_set(data),
        output,
        device=torch.device("cpu"),
        resume=resume and (output / LAST).exists(),
        observer=Said(),
    )
    found = measured(run.fit(), kind, data)
    return {**found, "precision": run.meta["precision"], "epoch_took_seconds": round(typical_epoch(output), 1)}


def typical_epoch(run: Path) -> float:
    """What the steps of an epoch took, the median: a machine that is shared is slow at times."""
    return median(row.seconds for row in log.read(run / log.LOG))
