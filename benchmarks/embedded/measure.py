"""Measure the accuracy of the built-in model file on both test sets.

    python -m benchmarks embedded --data data

where ``data`` holds ``oxford-iiit-pet-128``, ``oxford-iiit-pet-native``, and ``oxford-iiit-pet-best``, which merge.py
makes. The model's threshold is the one for the headline metric, with the border as background. Where the border is
ignored, a lower threshold is better; it is chosen here on the validation photos, and both results are reported.
"""

from __future__ import annotations

from pathlib import Path

import click

from benchmarks import records
from benchmarks.photos import COPIES, NATIVE, TEST_SETS
from benchmarks.thresholds import threshold_ignoring_border
from petseg.data import Split, find
from petseg.evaluate import evaluate, open_model
from petseg_runtime.artifact import default_model

#: The photos of each record.
RECORDS = {"embedded-test-128": COPIES, "embedded-test-native": NATIVE}


@click.command()
@click.option("--data", type=click.Path(path_type=Path), required=True, help="Folder of the two data sets.")
def embedded(data: Path) -> None:
    """Measure the accuracy of the built-in model."""
    command = "python -m benchmarks embedded --data DATA"
    lower = threshold_ignoring_border(data)
    for name, folder in RECORDS.items():
        pairs = find(data / folder, Split.TEST)
        with open_model(default_model()) as model:
            result = evaluate(model.run, pairs, model.height, model.width)
            values = {
                "data": TEST_SETS[folder],
                "model": model.describe(),
                "metrics": result.summary(model.threshold),
                "metrics_at_threshold_for_ignored_border": result.summary(lower),
            }
        print(records.write(name, command, values))
