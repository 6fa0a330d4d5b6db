"""``python -m benchmarks shown``: what ``petseg infer`` shows of the network's answers, beside all that they say.

Regions in which the model is sure of no pixel are left out (:func:`petseg_runtime.regions.without_doubtful`). What that
gains and costs is told of the test photos, on the same answers of the checkpoint in PyTorch; its three numbers were
chosen on the validation photos, of which the record has the alternatives, one number changed at a time.
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

#: What else each number of the rule might be.
ALTERNATIVES: Final[Mapping[str, Sequence[float]]] = {
    "CERTAIN": (205, 230, 242, 253),
    "DOUBTFUL": (13, 38, 102, 153),
    "EDGE": (1 / 128, 1 / 64, 1 / 16, 1 / 8),
}
#: A change of a photo's IoU that counts.
MUCH: Final = 0.01


@click.command()
@click.option("--data", type=click.Path(path_type=Path), default=Path("data"), show_default=True)
def shown(data: Path) -> None:
    """What leaving doubtful regions out gains and costs."""
    thresholds = thresholds_of(data)
    with open_model(CHECKPOINT, "cpu") as model:
        validation = find(photos.training_set(data), Split.VAL)
        replayed = answered(model, validation)
        chosen = {"alone": replayed(lambda run: run), "shown": replayed(as_shown), **variants(replayed)}
        sets = {}
        for what, root in photos.test_sets(data).items():
            replayed = answered(model, find(root, Split.TEST))
            alone, seen = replayed(lambda run: run), replayed(as_shown)
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


def answered(model: OpenedModel, pairs: Sequence[Pair]) -> Callable[[Callable[[Run], Run]], Evaluation]:
    """Asks a model about photos once; gives what measures its answers, changed as asked for."""
    answers: list[U8] = []

    def kept(batch: U8) -> U8:
        found = model.run(batch)
        answers.extend(found)
        return found

    evaluate(kept, pairs, model.height, model.width)

    def measured(change: Callable[[Run], Run]) -> Evaluation:
        replayed = iter(answers)
        run = change(lambda batch: np.stack([next(replayed) for _ in batch]))
        return evaluate(run, pairs, model.height, model.width)

    return measured


def variants(measured: Callable[[Callable[[Run], Run]], Evaluation]) -> dict[str, Evaluation]:
    """Each alternative of each number, the others as they are."""
    found = {}
    for name, values in ALTERNATIVES.items():
        for value in values:
            with mock.patch.object(regions, name, value):
                found[f"{name} {value:g}"] = measured(as_shown)
    return found


def changes(alone: Evaluation, seen: Evaluation, threshold: float) -> dict[str, int]:
    """How many photos' IoU, with the border left out, got better or worse by more than a point."""
    change = seen.image_ious(threshold, Border.IGNORED) - alone.image_ious(threshold, Border.IGNORED)
    return {"better": int((change > MUCH).sum()), "worse": int((change < -MUCH).sum())}
