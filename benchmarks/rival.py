"""LR-ASPP MobileNetV3 (torchvision; Howard et al. 2019), from scratch, by petseg's own trainer: the edge model's rival.

    python -m benchmarks rival --data data --output runs/rival --teacher petseg/weights/edge.safetensors --epochs 42

It sees the same photos, targets, augmentation, schedule and teacher as the edge network (recipe ``edge``), for as many
epochs as it is given. Its threshold is chosen on the same validation photos; the test photos are for the figure only.
"""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import click
import torch
from torch import Tensor, nn
from torchvision.models.segmentation import lraspp_mobilenet_v3_large

from benchmarks import records
from benchmarks.embedded.measure import SETS
from petseg import checkpoint, recipes
from petseg.config import TrainConfig, from_dict
from petseg.data import Split, find
from petseg.evaluate import evaluate, torch_run
from petseg.model import AttentionUNet, AttentionUNetConfig
from petseg.train import Observer, Trainer

NAME: Final = "LR-ASPP MobileNetV3-Large, torchvision"


class LrAspp(AttentionUNet):
    """The rival where the trainer expects petseg's network: normalised images in, logits [N, 1, H, W] out."""

    def __init__(self, config: AttentionUNetConfig | None = None) -> None:
        nn.Module.__init__(self)
        self.config = config or AttentionUNetConfig()
        self.network = lraspp_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=1)

    def forward(self, image: Tensor) -> Tensor:
        """Logits at the image's size."""
        logits: Tensor = self.network(image)["out"]
        return logits


class RivalTrainer(Trainer):
    """The same trainer, another network."""

    def _start_weights(self, init: Path | None) -> AttentionUNet:
        return LrAspp(self.config.model)


class _Said(Observer):
    def started(self, message: str) -> None:
        click.echo(message, err=True)

    def epoch(self, row: dict[str, float]) -> None:
        click.echo(f"epoch {row['epoch']:.0f}  loss {row['loss']:.4f}  val IoU {row['val_iou']:.4f}", err=True)


@click.command()
@click.option("--data", type=click.Path(path_type=Path), default=Path("data"), show_default=True)
@click.option("--train", "folder", default="oxford-iiit-pet-best", show_default=True, help="What it learns from.")
@click.option("--output", type=click.Path(path_type=Path), required=True, help="Where its checkpoints go.")
@click.option("--teacher", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option("--epochs", type=click.IntRange(1), default=42, show_default=True)
@click.option("--resume", is_flag=True)
def rival(data: Path, folder: str, output: Path, teacher: Path | None, epochs: int, resume: bool) -> None:
    """Train LR-ASPP as the edge network was, and measure it on the same test photos."""
    config = replace(from_dict(TrainConfig, recipes.load("edge")), epochs=epochs)
    begun = time.perf_counter()
    best = trained(config, data / folder, output, teacher, resume)
    values = measured(best, data)
    about = {"name": NAME, "epochs": epochs, "teacher": teacher.name if teacher else None, "size": [256, 256]}
    command = f"python -m benchmarks rival --data DATA --output OUTPUT --epochs {epochs}"
    command += f" --teacher {teacher.name}" if teacher else ""
    seconds = None if resume else round(time.perf_counter() - begun, 1)
    click.echo(f"{records.write('rival', command, {**about, 'seconds': seconds, **values})}")


def trained(config: TrainConfig, root: Path, output: Path, teacher: Path | None, resume: bool) -> Path:
    """Its best checkpoint."""
    trainer = RivalTrainer(
        config, root, output, device=torch.device("cpu"), teacher=teacher, resume=resume, observer=_Said()
    )
    return trainer.fit()


def measured(path: Path, data: Path) -> dict[str, Any]:
    """Its parameters, its validation, and what it reaches on both test sets."""
    loaded = checkpoint.load(path)
    network = LrAspp(loaded.model_config)
    network.load_state_dict(loaded.tensors)
    spec = loaded.meta["spec"]
    run, height, width = torch_run(network), spec["height"], spec["width"]
    sets = {
        what: evaluate(run, find(data / folder, Split.TEST), height, width).summary(spec["threshold"])
        for folder, what in SETS.items()
    }
    parameters = sum(p.numel() for p in network.parameters())
    return {"parameters": parameters, "validation": loaded.meta["validation"], "sets": sets}
