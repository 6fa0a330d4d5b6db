"""Run petseg's trainer from Python, as the benchmarks that train other networks, or in other ways, do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import torch

from petseg import log
from petseg.config import TrainConfig
from petseg.observers import Observer
from petseg.record import commit
from petseg.train import Trainer


class EpochLines(Observer):
    """Prints a line for each epoch."""

    def started(self, message: str) -> None:
        click.echo(message, err=True)

    def epoch(self, row: log.Row) -> None:
        click.echo(f"epoch {row.epoch}  loss {row.loss:.4f}  val IoU {row.val_iou:.4f}", err=True)


def fitted(kind: type[Trainer], config: TrainConfig, command: str, root: Path, output: Path, **options: Any) -> Path:
    """Run a kind of trainer on the CPU to its end; returns its best checkpoint, which names the command."""
    origin = {"command": command, "commit": commit()}
    device, lines = torch.device("cpu"), EpochLines()
    return kind(config, root, output, device=device, observer=lines, provenance=origin, **options).fit()
