"""Train the published network, 29.3 M parameters, on two CPU cores in two hours, with and without a teacher.

Taught by the built-in model:

    python -m benchmarks.width64 train --data data --output runs/width64 --teacher petseg/weights/edge.safetensors
    python -m benchmarks.width64 record runs/width64 --data data

At 128 x 128, two cores with bf16 compute an epoch in six minutes (AMD EPYC of family 26), so an ordinary run of the
recipe ``published`` takes three hours. Here the network sees its photos at growing sizes (progressive resizing: Tan &
Le 2021, "EfficientNetV2", arXiv:2104.00298, section 4): an epoch at 64 x 64 costs a quarter. Photos are augmented, and
the loss is computed, at the training size in any case; only the network's input is smaller.

The teacher (``loss.teacher`` and ``loss.features``, see :class:`petseg.objective.Distillation`) sees the same photos
enlarged to the size it was trained at. Everything else is `petseg train`: the settings are in ``width64.toml``.

The second command rounds the best checkpoint's kernels to float16, as a GPU's weights are (:mod:`benchmarks.lease`),
keeps that file as ``petseg/weights/width64.safetensors``, and measures it.

By the recipe ``published`` itself, without a teacher. Its schedule restarts after epoch 10, where it can be divided
into two runs; with the first at 64 x 64, both took 160 minutes of steps, beside other programs:

    petseg train --recipe published --data data/oxford-iiit-pet-128 --output runs/first --size 64 --epochs 10 \\
        --set schedule.restart_epochs=10
    petseg train --recipe published --data data/oxford-iiit-pet-best --output runs/second --size 128 --epochs 20 \\
        --set schedule.restart_epochs=20 --init runs/first/best.safetensors --seed 1
    python -m benchmarks.width64 recipe runs/first runs/second --data data

The last command measures the last run's best checkpoint, which is not kept.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import click
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import lease, photos, records
from benchmarks.embedded.ship import trained
from benchmarks.trainers import fitted
from petseg import checkpoint
from petseg.config import TrainConfig, from_dict, load_toml
from petseg.data import Pair
from petseg.model import AttentionUNet
from petseg.objective import Distillation, Objective
from petseg.run_state import BEST
from petseg.train import Trainer

WEIGHTS: Final = records.ROOT / "petseg" / "weights" / "width64.safetensors"
CONFIG: Final = Path(__file__).with_suffix(".toml")
#: Input sizes of the network, each with the share of the run that ends with it.
SIDES: Final = ((64, 0.3), (96, 0.7), (128, 1.0))
#: The built-in model's input size.
TEACHER_SIDE: Final = 256
FILE: Final = click.Path(path_type=Path, exists=True, dir_okay=False)


class Enlarging(nn.Module):
    """A teacher that sees the photos of a smaller run at its own size; logits are returned at the photos' size."""

    def __init__(self, network: AttentionUNet) -> None:
        super().__init__()
        self.network, self.config = network, network.config

    def with_features(self, image: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """As :meth:`AttentionUNet.with_features`; the features are those at the teacher's size."""
        logits, blocks = self.network.with_features(_resized(image, TEACHER_SIDE))
        return _resized(logits.float(), image.shape[-1]), blocks


class Growing(nn.Module):
    """A student, as a training step calls it, that sees smaller photos than the step has; logits are enlarged."""

    def __init__(self, student: nn.Module, side: Callable[[], int]) -> None:
        super().__init__()
        self.student, self.side = student, side

    def forward(self, image: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Returns logits at the photos' size, and the hinted features."""
        logits, hinted = self.student(_resized(image, self.side()))
        return _resized(logits.float(), image.shape[-1]), hinted


def _resized(image: Tensor, side: int) -> Tensor:
    if image.shape[-1] == side:
        return image
    shrinks = side < image.shape[-1]
    resized = F.interpolate(image, size=(side, side), mode="bilinear", align_corners=False, antialias=shrinks)
    return resized.contiguous(memory_format=torch.channels_last)


class GrowingDistillation(Distillation):
    """Distillation in which the student's input grows."""

    def __init__(self, side: Callable[[], int], *args: Any) -> None:
        super().__init__(*args)
        self.side = side

    def student(self, network: AttentionUNet) -> nn.Module:
        """See :class:`Growing`."""
        return Growing(super().student(network), self.side)


class GrowingTrainer(Trainer):
    """The same trainer with growing input sizes."""

    def teacher_network(self, path: Path) -> AttentionUNet:
        return Enlarging(super().teacher_network(path))  # type: ignore[return-value]

    def _objective(self, teacher: AttentionUNet | None) -> Objective:
        if teacher is None:
            raise SystemExit("this run needs a --teacher")
        return GrowingDistillation(self._side, self.config, self.ranks, self.model, teacher, self.device)

    def _side(self) -> int:
        """The input size of the current epoch."""
        done = self.sampler.epoch / self.config.epochs
        return next(side for side, end in SIDES if done < end)


@click.group()
def main() -> None:
    """Train the published network on a CPU."""


@main.command()
@click.option("--data", type=click.Path(path_type=Path), required=True)
@click.option("--output", type=click.Path(path_type=Path), required=True)
@click.option("--teacher", type=FILE, required=True)
@click.option("--resume", is_flag=True)
def train(data: Path, output: Path, teacher: Path, resume: bool) -> None:
    """Train with the settings of width64.toml."""
    command = f"python -m benchmarks.width64 train --data {data} --output {output} --teacher {teacher}"
    config, root = from_dict(TrainConfig, load_toml(CONFIG)), photos.training_set(data)
    fitted(GrowingTrainer, config, command, root, output, teacher=teacher, resume=resume)


@main.command()
@click.argument("run", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--data", type=click.Path(path_type=Path), required=True)
def record(run: Path, data: Path) -> None:
    """Keep the best checkpoint of RUN, rounded, and write results/training/width64.json."""
    tests = lease.tests_in(data)  # before anything is replaced
    runs = trained([run])
    lease.rounded(run / BEST, WEIGHTS)
    kept = {"bytes": WEIGHTS.stat().st_size, "sha256": checkpoint.load(WEIGHTS).sha256}
    found = measured(WEIGHTS, runs[-1], data, tests)
    command = "python -m benchmarks.width64 record RUN --data DATA"
    records.write("training/width64", command, {"runs": runs, "weights": kept, **found})


@main.command()
@click.argument("runs", type=click.Path(path_type=Path, exists=True, file_okay=False), nargs=-1, required=True)
@click.option("--data", type=click.Path(path_type=Path), required=True)
def recipe(runs: tuple[Path, ...], data: Path) -> None:
    """Measure the last of RUNS, each begun from the one before, and write results/training/published-cpu.json."""
    taken = trained(runs)
    found = measured(runs[-1] / BEST, taken[-1], data, lease.tests_in(data))
    records.write(
        "training/published-cpu", "python -m benchmarks.width64 recipe RUN... --data DATA", {"runs": taken, **found}
    )


def measured(weights: Path, run: Mapping[str, Any], data: Path, tests: Mapping[str, Sequence[Pair]]) -> dict[str, Any]:
    """Choose thresholds on the validation photos of the run that made the weights, and measure on the test photos."""
    split = from_dict(TrainConfig, run["config"]).data
    found = lease.validated(weights, photos.training_set(data), split, "cpu")
    found |= lease.measured(weights, "cpu", found["thresholds"], tests)
    lease.say(found["tests"])
    return found


if __name__ == "__main__":
    main()
