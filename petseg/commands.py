"""What people type to train and evaluate: options in, calls to the modules beside, tables and files out."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

if TYPE_CHECKING:
    from petseg.train import Observer, RunState

__all__ = ["data", "evaluate", "train"]

PATH = click.Path(path_type=Path)


def _progress(quiet: bool) -> Progress:
    """A progress line on stderr; silent where stderr is not a terminal."""
    console = Console(stderr=True)
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[detail]}"),
        console=console,
        disable=quiet or not console.is_terminal,
    )


@click.command()
@click.option("--data", "root", type=PATH, required=True, help="Data folder (see `petseg data check`).")
@click.option("--output", type=PATH, required=True, help="Where checkpoints, log and pictures go.")
@click.option("--config", "config_file", type=PATH, help="Settings as TOML; options override it.")
@click.option("--set", "settings", multiple=True, metavar="NAME=VALUE", help="One setting, e.g. optimizer.lr=0.002.")
@click.option("--epochs", type=int, help="Passes over the data.")
@click.option("--batch", type=int, help="Photos per step.")
@click.option("--size", metavar="HxW", help="Training size, multiples of 16 (192 means 192x192).")
@click.option("--width", type=int, help="Channels of the first level: 64 published, 16 edge.")
@click.option("--seed", type=int, help="Of weights, order and augmentation.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@click.option("--init", type=PATH, help="Start from this checkpoint's weights.")
@click.option("--resume", is_flag=True, help="Go on with the run in --output.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on stdout.")
@click.option("-q", "--quiet", is_flag=True, help="Only errors.")
def train(
    root: Path,
    output: Path,
    config_file: Path | None,
    settings: tuple[str, ...],
    epochs: int | None,
    batch: int | None,
    size: str | None,
    width: int | None,
    seed: int | None,
    device: str,
    init: Path | None,
    resume: bool,
    as_json: bool,
    quiet: bool,
) -> int:
    """Train the attention U-Net; the defaults are the published recipe.

    Keeps best.safetensors (to evaluate and export), last.safetensors (to --resume), log.csv, curves.png and
    predictions.png in --output.
    """
    from petseg import plots
    from petseg.config import TrainConfig, from_dict, load_toml, override
    from petseg.train import LOG, Trainer, pick_device

    raw = load_toml(config_file) if config_file else {}
    for key, value in (("epochs", epochs), ("batch", batch), ("seed", seed), ("model.width", width)):
        if value is not None:
            override(raw, f"{key}={value}")
    if size is not None:
        height, wide = parse_size(size)
        override(raw, f"data.height={height}")
        override(raw, f"data.width={wide}")
    for assignment in settings:
        override(raw, assignment)
    config = from_dict(TrainConfig, raw)
    with _progress(quiet) as progress:
        trainer = Trainer(
            config,
            root,
            output,
            device=pick_device(device),
            init=init,
            resume=resume,
            observer=_observer(config.epochs, progress, quiet),
            provenance={"command": shlex.join(["petseg", *sys.argv[1:]])},
        )
        best = trainer.fit()
    plots.curves(trainer.state.history, output / "curves.png")
    plots.predictions(best, trainer.val_pairs[:6], output / "predictions.png")
    row = max(trainer.state.history, key=lambda r: r["val_iou"])
    if as_json:
        click.echo(json.dumps({"schema_version": 1, "checkpoint": str(best), "best": row}))
    elif not quiet:
        click.echo(f"{best}: validation IoU {row['val_iou']:.4f} at threshold {row['val_threshold']:.2f}")
        click.echo(f"{output / LOG}, curves.png and predictions.png beside it")
    return 0


def parse_size(text: str) -> tuple[int, int]:
    """``192`` or ``192x256`` to (height, width).

    Raises:
        click.BadParameter: Neither form.
    """
    parts = text.lower().split("x")
    if len(parts) not in (1, 2) or not all(part.isdigit() for part in parts):
        raise click.BadParameter(f"{text!r}: HEIGHTxWIDTH is expected, for example 192x256", param_hint="--size")
    return int(parts[0]), int(parts[-1])


def _observer(epochs: int, progress: Progress, quiet: bool) -> Observer:
    from petseg.train import Observer

    class Printer(Observer):
        task: Any = None

        def started(self, message: str) -> None:
            if not quiet:
                progress.console.print(message, highlight=False)

        def step(self, state: RunState, loss: float, lr: float) -> None:
            if self.task is None:
                self.task = progress.add_task("training", total=epochs * self.per_epoch, detail="")
            rate = state.steps_summed * self.batch / max(state.seconds, 1e-9)
            progress.update(self.task, completed=state.step, detail=f"loss {loss:.3f}  {rate:.0f} images/s")

        def epoch(self, row: dict[str, float]) -> None:
            if not quiet:
                progress.console.print(
                    f"epoch {row['epoch']:.0f}/{epochs}  loss {row['loss']:.4f}  val IoU {row['val_iou']:.4f}  "
                    f"Dice {row['val_dice']:.4f}  {row['images_per_s']:.0f} images/s",
                    highlight=False,
                )

    return Printer()
