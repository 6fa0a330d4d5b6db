"""Average the weights of successive checkpoints of one training lineage, and measure the mean on validation photos.

    python -m benchmarks.embedded.mean OUT CHECKPOINT CHECKPOINT... --data data

Such weights lie in one valley of the loss, and their mean is often better than each of them (Wortsman et al. 2022,
"Model soups", arXiv:2203.05482). The thresholds are chosen again, on the validation photos that none was trained on.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor

from benchmarks.photos import training_set
from petseg import checkpoint
from petseg.data import Split, find
from petseg.evaluate import evaluate
from petseg.metrics import Border, best_threshold
from petseg.model import AttentionUNet
from petseg.record import commit
from petseg.reference import torch_run

FILE = click.Path(path_type=Path, exists=True, dir_okay=False)


@click.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.argument("files", type=FILE, nargs=-1, required=True)
@click.option("--data", type=click.Path(path_type=Path), required=True, help="Folder of the data sets.")
def mean(out: Path, files: tuple[Path, ...], data: Path) -> None:
    """Write the mean of FILES to OUT."""
    loaded = [checkpoint.load(file) for file in files]
    tensors, meta = mean_of(loaded), dict(loaded[0].meta)
    network = AttentionUNet(loaded[0].model_config)
    network.load_state_dict(tensors)
    known = meta["data"]
    pairs = find(training_set(data), Split.VAL, val_fraction=known["val_fraction"], seed=known["split_seed"])
    result = evaluate(torch_run(network.eval()), pairs, meta["spec"]["height"], meta["spec"]["width"])
    threshold = best_threshold(result.total)
    counts, ignored = result.counts(threshold), result.image_ious(0.5, Border.IGNORED).mean()
    meta["spec"] |= {"threshold": threshold, "cutout_threshold": best_threshold(result.total, Border.PET)}
    meta["validation"] |= {"val_iou": counts.iou, "val_dice": counts.dice, "val_threshold": threshold}
    meta["validation"] |= {"val_mean_iou_border_ignored_at_0.5": float(ignored)}
    command = f"python -m benchmarks.embedded.mean OUT {' '.join(map(str, files))} --data DATA"
    meta["provenance"] = {"command": command, "commit": commit()}
    meta["mean_of"] = [each.sha256 for each in loaded]
    checkpoint.save_checkpoint(out, tensors, meta)
    click.echo(f"{out}: validation IoU {counts.iou:.4f} at threshold {threshold:.2f}")


def mean_of(loaded: Sequence[checkpoint.Checkpoint]) -> dict[str, Tensor]:
    """The mean of each tensor; integer tensors (BatchNorm's counters) are taken from the first checkpoint.

    Raises:
        SystemExit: The networks or the validation photos of the checkpoints differ.
    """
    for key in ("model", "data"):
        values: list[Any] = [each.meta[key] if key == "model" else each.meta[key]["names_sha256"] for each in loaded]
        if any(each != values[0] for each in values):
            sys.exit(f"these checkpoints cannot be averaged: {key} differs")
    first = loaded[0].tensors
    return {
        name: torch.stack([each.tensors[name] for each in loaded]).mean(0) if value.is_floating_point() else value
        for name, value in first.items()
    }


if __name__ == "__main__":
    mean()
