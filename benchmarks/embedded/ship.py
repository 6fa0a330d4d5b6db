"""Make a checkpoint the built-in model: export it with its parity test, measure it, and record it.

    python -m benchmarks.embedded.ship runs/edge3/best.safetensors --data data --run runs/edge2 --run runs/edge3

The file is exported once, measured, and exported again with the measured figures in its provenance; its identity (the
digest without metadata) must not change. The threshold of whether a photo shows a pet (``certain_share``) stays that
of the present built-in model; ``python -m benchmarks found`` measures it. The training runs, first to last, are
recorded with their times and results (``results/training/edge.json``); with ``--on-from-shipped`` after those of the
present model.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from benchmarks import records
from benchmarks.embedded.measure import RECORDS, embedded
from benchmarks.photos import TEST_SETS, original_size
from petseg import checkpoint as checkpoints
from petseg import log
from petseg.evaluate import without_keys
from petseg.record import RUN, reached
from petseg_export import OnnxConfig, export
from petseg_runtime.artifact import default_model, open_artifact

NAME = "petseg edge: attention U-Net, width 16, strided stem"
PHOTOS = 200  # of the parity test
WEIGHTS = records.ROOT / "petseg" / "weights" / "edge.safetensors"


@click.command()
@click.argument("checkpoint", type=click.Path(path_type=Path, exists=True))
@click.option("--data", type=click.Path(path_type=Path), required=True, help="Folder of the data sets.")
@click.option(
    "--run",
    "runs",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    multiple=True,
    help="Folder of a training run that led to CHECKPOINT; repeatable, in order.",
)
@click.option("--on-from-shipped", is_flag=True, help="The first of these runs began with the present built-in model.")
@click.pass_context
def ship(context: click.Context, checkpoint: Path, data: Path, runs: tuple[Path, ...], on_from_shipped: bool) -> None:
    """Make CHECKPOINT the built-in model."""
    taken = trained(runs)  # before anything is replaced: this exits if a folder holds no run
    WEIGHTS.parent.mkdir(exist_ok=True)
    if checkpoint.resolve() != WEIGHTS:
        shutil.copy(checkpoint, WEIGHTS)
    with tempfile.TemporaryDirectory() as folder:
        first = Path(folder) / "edge.onnx"
        config = OnnxConfig(
            output=first,
            name=NAME,
            data=original_size(data),
            split="test",
            photos=PHOTOS,
            certain_share=open_artifact(default_model()).spec.certain_share,
        )
        export(WEIGHTS, config)
        shutil.copy(first, default_model())
        context.invoke(embedded, data=data)
        measured = {}
        for name, what in ((name, TEST_SETS[folder]) for name, folder in RECORDS.items()):
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
            raise SystemExit("the two exports differ: the measured file is not the built-in one")
    if taken:  # at the end, because a record names the built-in model
        before = records.load("training/edge")["runs"] if on_from_shipped else []
        options = "".join(f" --run {run.name}" for run in runs) + (" --on-from-shipped" if on_from_shipped else "")
        command = f"python -m benchmarks.embedded.ship CHECKPOINT --data DATA{options}"
        records.write("training/edge", command, {"runs": [*({"commit": None, **run} for run in before), *taken]})
    print(json.dumps(receipt.as_dict(), indent=2))


def trained(runs: Sequence[Path]) -> list[dict[str, Any]]:
    """Describe each run from its log, its best checkpoint's metadata and, if it finished, its run.json."""
    found = []
    for run in runs:
        meta = checkpoints.peek(run / "best.safetensors")
        rows = log.read(run / log.LOG)
        ended = json.loads((run / RUN).read_text(encoding="utf-8")) if (run / RUN).exists() else {}
        copied = ("config", "teacher", "device", "precision", "versions")
        found.append(
            {
                "name": run.name,
                **{key: meta["provenance"].get(key) for key in ("command", "commit")},
                **{key: meta.get(key) for key in copied},
                "data": without_keys(meta["data"]),
                **reached(rows, meta["config"]["batch"]),
                "best": meta["validation"],  # possibly of an epoch that the log lost in a crash
                **{key: ended.get(key) for key in ("peak_gpu_memory_bytes", "processes", "threads")},
                "log": [row.as_dict() for row in rows],
            }
        )
    return found


if __name__ == "__main__":
    ship()
