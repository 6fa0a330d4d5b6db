"""``python -m benchmarks shown``: how dropping low-confidence regions, as ``petseg infer`` does, changes the metrics.

Regions without a near-certain pixel are dropped (:func:`petseg_runtime.regions.without_doubtful`). The gain and the
cost are measured on the test photos, with the same outputs of the checkpoint in PyTorch. The three constants of the
rule were chosen on the validation photos, for which the record has the alternatives, one constant changed at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final
from unittest import mock

import click
import numpy as np

from benchmarks import photos, records
from benchmarks.accuracy import all_thresholds
from benchmarks.latency import CHECKPOINT
from benchmarks.thresholds import thresholds_of
from petseg.data import Pair, Split, find
from petseg.evaluate import U8, Evaluation, OpenedModel, Run, as_shown, evaluate, open_model
from petseg.metrics import Border
from petseg_runtime import regions

#: Alternative values of each constant of the rule.
ALTERNATIVES: Final[Mapping[str, Sequence[float]]] = {
    "CERTAIN": (205, 230, 242, 253),
    "DOUBTFUL": (13, 38, 102, 153),
    "EDGE": (1 / 128, 1 / 64, 1 / 16, 1 / 8),
}
#: A photo counts as better or worse if its IoU changes by more than this.
MUCH: Final = 0.01


@click.command()
@photos.data_option
def shown(data: Path) -> None:
    """Measure what dropping low-confidence regions gains and costs."""
    thresholds = thresholds_of(data)
    with open_model(CHECKPOINT, "cpu") as model:
        validation = find(photos.training_set(data), Split.VAL)
        evaluated = evaluator(model, validation)
        chosen = {"alone": evaluated(lambda run: run), "shown": evaluated(as_shown), **variants(evaluated)}
        sets = {}
        for what, root in photos.test_sets(data).items():
            evaluated = evaluator(model, find(root, Split.TEST))
            alone, seen = evaluated(lambda run: run), evaluated(as_shown)
            both = all_thresholds({"alone": alone, "shown": seen}, thresholds)
            sets[what] = {"photos": len(alone.names), **both, **changes(alone, seen, thresholds["ignored_border"])}
        values = {
            "model": model.describe(),
            "rule": {name: getattr(regions, name) for name in ALTERNATIVES},
            "thresholds": thresholds,
            "sets": sets,
            "validation": {"photos": len(validation), **all_thresholds(chosen, thresholds)},
        }
    click.echo(records.write("shown", "python -m benchmarks shown --data DATA", values))


def evaluator(model: OpenedModel, pairs: Sequence[Pair]) -> Callable[[Callable[[Run], Run]], Evaluation]:
    """Run a model on photos once; return a function that evaluates its outputs after a given change."""
    outputs: list[U8] = []

    def kept(batch: U8) -> U8:
        found = model.run(batch)
        outputs.extend(found)
        return found

    evaluate(kept, pairs, model.height, model.width)

    def measured(change: Callable[[Run], Run]) -> Evaluation:
        replayed = iter(outputs)
        run = change(lambda batch: np.stack([next(replayed) for _ in batch]))
        return evaluate(run, pairs, model.height, model.width)

    return measured


def variants(measured: Callable[[Callable[[Run], Run]], Evaluation]) -> dict[str, Evaluation]:
    """Evaluate each alternative of each constant, with the other constants unchanged."""
    found = {}
    for name, values in ALTERNATIVES.items():
        for value in values:
            with mock.patch.object(regions, name, value):
                found[f"{name} {value:g}"] = measured(as_shown)
    return found


def changes(alone: Evaluation, seen: Evaluation, threshold: float) -> dict[str, int]:
    """Count the photos whose IoU, with the border ignored, rose or fell by more than a point."""
    change = seen.image_ious(threshold, Border.IGNORED) - alone.image_ious(threshold, Border.IGNORED)
    return {"better": int((change > MUCH).sum()), "worse": int((change < -MUCH).sum())}
