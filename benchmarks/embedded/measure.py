"""Measure the model that ships, the very file: accuracy on both test sets, and the cold start of one photo.

    python -m benchmarks embedded --data data

where ``data`` holds ``oxford-iiit-pet-128`` and ``oxford-iiit-pet-native``.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click

from benchmarks import records
from petseg.data import Split, find
from petseg.evaluate import evaluate, open_model
from petseg_runtime.artifact import default_model, sample_photos

SETS = {
    "embedded-test-128": ("oxford-iiit-pet-128", "3000 of 3669 test images, 128×128 copies"),
    "embedded-test-native": ("oxford-iiit-pet-native", "242 test images at their original size (three breeds)"),
}
STARTS = 11


@click.command()
@click.option("--data", type=click.Path(path_type=Path), required=True, help="Folder of the two data sets.")
def embedded(data: Path) -> None:
    """Accuracy and start-up of the embedded model."""
    command = "python -m benchmarks embedded --data DATA"
    for name, (folder, what) in SETS.items():
        pairs = find(data / folder, Split.TEST)
        with open_model(default_model()) as model:
            result = evaluate(model.run, pairs, model.height, model.width)
            values = {"data": what, "model": model.describe(), "metrics": result.summary(model.threshold)}
        print(records.write(name, command, values))
    print(records.write("embedded-startup", command, startup()))


def startup() -> dict[str, object]:
    """Wall time of whole processes that segment one photo, the first of them not counted."""
    photo = next(path for path in sample_photos() if path.stem == "chelsea")
    with tempfile.TemporaryDirectory() as folder:
        arguments = [sys.executable, "-m", "petseg.cli", "infer", str(photo), "--output", folder, "--quiet"]
        seconds = []
        for _ in range(STARTS + 1):
            start = time.perf_counter()
            subprocess.run(arguments, check=True)
            seconds.append(round(time.perf_counter() - start, 4))
    return {
        "what": "petseg infer chelsea.jpg, whole process",
        "seconds": seconds[1:],
        "median": statistics.median(seconds[1:]),
    }
