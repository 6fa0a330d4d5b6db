"""Train LR-ASPP MobileNetV3 (torchvision; Howard et al. 2019) from scratch by petseg's trainer: the edge model's rival.

    python -m benchmarks rival --data data --output runs/rival --teacher petseg/weights/edge.safetensors --epochs 42

It sees the same photos, targets, augmentation, schedule and teacher as the edge network (recipe ``edge``), for
``--epochs`` epochs. Its thresholds are chosen like the built-in model's: one for each reading of the border, on the
same validation photos. The test photos are used for the figures only.

``python -m benchmarks accuracy`` measures its time, interleaved with the built-in model's and exported to the same
engines, so that both are from the same machine and day. It uses random weights, which are as fast as trained ones.
"""

from __future__ import annotations

import contextlib
import tempfile
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any, Final

import click
import numpy as np
from torch import Tensor, nn
from torchvision.models.segmentation import lraspp_mobilenet_v3_large

from benchmarks import photos, records
from benchmarks.latency import described
from benchmarks.thresholds import at_each, best_of_each
from benchmarks.trainers import fitted
from benchmarks.turns import alternated, count, timed
from petseg import checkpoint, log, recipes
from petseg.config import TrainConfig, from_dict
from petseg.data import Split, find
from petseg.evaluate import evaluate
from petseg.model import AttentionUNet, AttentionUNetConfig
from petseg.reference import torch_run
from petseg.train import Trainer
from petseg_export.deploy import DeployedUNet
from petseg_export.onnx import graph_bytes
from petseg_runtime.artifact import PROVENANCE_KEY, default_model, open_artifact
from petseg_runtime.engines.base import Engine
from petseg_runtime.engines.registry import load_engine
from petseg_runtime.onnx_metadata import with_metadata
from petseg_runtime.spec import SPEC_KEY, ModelSpec

NAME: Final = "LR-ASPP MobileNetV3-Large, torchvision"
#: Engine, and whether it must compute in float32, the precision in which the file is stored.
ENGINES: Final = (("onnxruntime", True), ("openvino", True), ("openvino", False))
#: Input height and width, the same as the recipe's.
SIZE: Final = 256
ROUNDS: Final = 15


class LrAspp(AttentionUNet):
    """LR-ASPP with the interface that the trainer expects: normalised images in, logits [N, 1, H, W] out."""

    def __init__(self, config: AttentionUNetConfig | None = None) -> None:
        nn.Module.__init__(self)
        self.config = config or AttentionUNetConfig()
        self.network = lraspp_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=1)

    def forward(self, image: Tensor) -> Tensor:
        """Logits at the image's size."""
        logits: Tensor = self.network(image)["out"]
        return logits


class RivalTrainer(Trainer):
    """The same trainer with another network."""

    def first_network(self, init: Path | None) -> AttentionUNet:
        return LrAspp(self.config.model)


@click.command()
@click.option("--data", type=click.Path(path_type=Path), default=Path("data"), show_default=True)
@click.option("--output", type=click.Path(path_type=Path), required=True, help="Folder for its checkpoints.")
@click.option("--teacher", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option("--epochs", type=click.IntRange(1), default=42, show_default=True)
@click.option("--resume", is_flag=True)
def rival(data: Path, output: Path, teacher: Path | None, epochs: int, resume: bool) -> None:
    """Train LR-ASPP as the edge network was, and measure it on the same test photos."""
    recipe = from_dict(TrainConfig, recipes.load("edge"))
    # Its blocks do not match the teacher's, so there is no feature distillation; it learns from probabilities alone.
    config = replace(recipe, epochs=epochs, loss=replace(recipe.loss, features=0.0))
    command = f"python -m benchmarks rival --data DATA --output OUTPUT --epochs {epochs}"
    command += f" --teacher {teacher.name}" if teacher else ""
    root = photos.training_set(data)
    best = fitted(RivalTrainer, config, command, root, output, teacher=teacher, resume=resume)
    values = measured(best, LrAspp, data)
    about = {"name": NAME, "epochs": epochs, "teacher": teacher.name if teacher else None, "size": [SIZE, SIZE]}
    click.echo(records.write("rival", command, {**about, "hours": round(seconds_of(output) / 3600, 3), **values}))


def seconds_of(run: Path) -> float:
    """Total seconds of its training steps."""
    return sum(row.seconds for row in log.read(run / log.LOG))


def measured(path: Path, kind: type[AttentionUNet], data: Path) -> dict[str, Any]:
    """A checkpoint's number of parameters, its validation metrics, and its metrics on both test sets."""
    loaded = checkpoint.load(path)
    network = kind(loaded.model_config)
    network.load_state_dict(loaded.tensors)
    spec = loaded.meta["spec"]
    run, height, width = torch_run(network), spec["height"], spec["width"]
    validated = evaluate(run, find(photos.training_set(data), Split.VAL), height, width)
    thresholds = best_of_each(validated)
    sets = {
        what: {"readings": at_each(evaluate(run, find(root, Split.TEST), height, width), thresholds)}
        for what, root in photos.test_sets(data).items()
    }
    parameters = sum(p.numel() for p in network.parameters())
    about = {"parameters": parameters, "validation": loaded.meta["validation"], "thresholds": thresholds}
    return {**about, "sets": sets}


def timed_beside(size: int = SIZE, rounds: int = ROUNDS) -> list[dict[str, Any]]:
    """Measure milliseconds per photo in each engine, with petseg's export, interleaved with the built-in model."""
    spec = ModelSpec(name=NAME, height=size, width=size)
    graph = graph_bytes(DeployedUNet(LrAspp().eval()), spec)
    with contextlib.ExitStack() as stack:
        file = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "rival.onnx"
        file.write_bytes(with_metadata(graph, {SPEC_KEY: spec.to_json(), PROVENANCE_KEY: "{}"}))
        opened: list[Engine] = []
        for engine, exact in ENGINES:
            pair = [
                stack.enter_context(load_engine(open_artifact(path), engine, device="cpu", exact=exact))
                for path in (file, default_model())
            ]
            # Skip a repetition: a CPU without bf16 computes in float32 either way.
            if described(pair[0]) not in map(described, opened[::2]):
                opened += pair
        random = np.random.default_rng(0)
        shapes = [(1, engine.spec.height, engine.spec.width, 3) for engine in opened]
        inputs = [random.integers(0, 256, shape, dtype=np.uint8) for shape in shapes]
        jobs = {
            number: (engine.run, photo, count(min(timed(engine.run, photo, 3))))
            for number, (engine, photo) in enumerate(zip(opened, inputs, strict=True))
        }
        times = [[median(values) for values in found] for found in alternated(jobs, rounds).times.values()]
        ratios = [
            [a / b for a, b in zip(theirs, ours, strict=True)]
            for theirs, ours in zip(times[::2], times[1::2], strict=True)
        ]
        return [
            {
                **described(engine),
                "milliseconds": theirs,
                "petseg_milliseconds": ours,
                "median": median(theirs),
                "petseg_times_as_fast": median(each),
                "petseg_times_as_fast_each": each,
            }
            for engine, theirs, ours, each in zip(opened[::2], times[::2], times[1::2], ratios, strict=True)
        ]
