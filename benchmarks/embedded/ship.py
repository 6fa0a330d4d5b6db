"""Make a checkpoint the embedded model: export it, prove it, measure it, record it.

    python -m benchmarks.embedded.ship runs/stage2/best.safetensors --data data

The file is exported once, measured, and exported again with the measured figures in its provenance; its identity (the
digest without metadata) must not have changed.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import tempfile
from pathlib import Path

import click

from benchmarks import records
from benchmarks.embedded.measure import SETS, embedded
from petseg_export import OnnxConfig, export
from petseg_runtime.artifact import default_model, open_artifact

NAME = "petseg edge: attention U-Net, width 16"
PHOTOS = 200  # of the parity test
WEIGHTS = records.ROOT / "petseg" / "weights" / "edge.safetensors"


@click.command()
@click.argument("checkpoint", type=click.Path(path_type=Path, exists=True))
@click.option("--data", type=click.Path(path_type=Path), required=True, help="Folder of the data sets.")
@click.pass_context
def ship(context: click.Context, checkpoint: Path, data: Path) -> None:
    WEIGHTS.parent.mkdir(exist_ok=True)
    if checkpoint.resolve() != WEIGHTS:
        shutil.copy(checkpoint, WEIGHTS)
    with tempfile.TemporaryDirectory() as folder:
        first = Path(folder) / "edge.onnx"
        config = OnnxConfig(output=first, name=NAME, data=data / "oxford-iiit-pet-native", split="test", photos=PHOTOS)
        export(WEIGHTS, config)
        shutil.copy(first, default_model())
        context.invoke(embedded, data=data)
        measured = {}
        for name, (_, what) in SETS.items():
            record = records.load(name)
            ratios = ("iou", "dice", "accuracy", "precision", "recall", "mean_image_iou")
            measured[what] = {
                f"border {border}, threshold {metrics['threshold']:.2f}": {
                    ratio: round(metrics["readings"][border][ratio], 4) for ratio in ratios
                }
                for key in ("metrics", "metrics_at_threshold_for_ignored_border")
                for metrics in [record[key]]
                for border in metrics["readings"]
            }
        noted = dataclasses.replace(config, output=default_model(), notes={"measured": measured})
        receipt = export(WEIGHTS, noted).receipt
        if open_artifact(default_model()).identity != open_artifact(first).identity:
            raise SystemExit("the two exports differ: the measured file is not the shipped one")
    print(json.dumps(receipt.as_dict(), indent=2))


if __name__ == "__main__":
    ship()
