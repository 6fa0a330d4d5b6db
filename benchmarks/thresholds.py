"""Choice of thresholds: on the validation photos, one for each reading of the border."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.photos import training_set
from petseg.data import Split, find
from petseg.evaluate import Evaluation, evaluate, open_model
from petseg.metrics import Border, best_threshold
from petseg_runtime.artifact import default_model, open_artifact


def best_of_each(result: Evaluation) -> dict[Border, float]:
    """Return, for each reading of the border, the threshold that is best on these very photos."""
    return {border: best_threshold(result.total, border) for border in Border}


def at_each(result: Evaluation, thresholds: Mapping[Border, float]) -> dict[Border, Any]:
    """Return the metrics of each reading of the border at its threshold."""
    return {border: result.summary(threshold)["readings"][border] for border, threshold in thresholds.items()}


def threshold_ignoring_border(data: Path) -> float:
    """Return the threshold, in steps of 0.05, with the best mean IoU per validation photo, the border ignored."""
    pairs = find(training_set(data), Split.VAL)
    with open_model(default_model()) as model:
        result = evaluate(model.run, pairs, model.height, model.width)
    return max((k / 20 for k in range(1, 20)), key=lambda t: float(result.image_ious(t, Border.IGNORED).mean()))


def thresholds_of(data: Path) -> dict[str, float]:
    """Return the thresholds of the built-in model."""
    spec = open_artifact(default_model()).spec
    ignored = threshold_ignoring_border(data)
    return {"own": spec.threshold, "cutout": spec.cutout_threshold, "ignored_border": ignored}
