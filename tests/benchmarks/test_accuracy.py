"""Contents of the accuracy record beyond the metrics of ``petseg evaluate``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import accuracy
from petseg.data import Layout, Pair
from petseg.evaluate import Evaluation
from petseg.metrics import Border


def evaluation(photos: int, seed: int = 0) -> Evaluation:
    """An evaluation of photos in which the model finds most of the pet, to a varying degree."""
    rng = np.random.default_rng(seed)
    histograms = np.zeros((photos, 3, 256), np.int64)
    found = rng.integers(50, 100, photos)
    histograms[:, 0, 200], histograms[:, 0, 100] = found, 100 - found
    histograms[:, 1, 10], histograms[:, 2, 140] = 300, 20
    return Evaluation(tuple(f"photo {number}" for number in range(photos)), histograms)


def test_the_interval_holds_the_iou_and_narrows_with_the_photos() -> None:
    widths = []
    for photos in (20, 500):
        result = evaluation(photos)
        low, high = accuracy.interval(result, 0.6, Border.IGNORED)
        assert low < result.counts(0.6, Border.IGNORED).iou < high
        widths.append(high - low)
    assert widths[0] > 3 * widths[1]


def test_a_difference_uses_the_same_resamples_for_both() -> None:
    result, other = evaluation(20), evaluation(20, seed=1)
    at = (result, 0.6)
    assert accuracy.difference(at, at, Border.BACKGROUND) == [0.0, 0.0]
    low, high = accuracy.difference(at, (other, 0.6), Border.BACKGROUND)
    back = accuracy.difference((other, 0.6), at, Border.BACKGROUND)
    assert low < high
    assert back == pytest.approx([-high, -low], abs=2e-4)


def test_metrics_match_petseg_evaluate() -> None:
    result = evaluation(20)
    told = accuracy.metrics(result, 0.5)
    readings = result.summary(0.5)["readings"]
    assert list(told["readings"]) == ["background", "pet", "ignored"]
    for border, values in told["readings"].items():
        assert {name: values[name] for name in accuracy.METRICS} == {
            name: readings[border][name] for name in accuracy.METRICS
        }


def test_losses_are_against_the_first_row_at_the_same_threshold() -> None:
    def row(own: float, cutout: float) -> dict[str, Any]:
        found = {"own": own, "cutout": cutout}
        return {"sets": {"test": {kind: {"readings": {"pet": {"iou": iou}}} for kind, iou in found.items()}}}

    rows = accuracy.with_losses([row(0.8, 0.7), row(0.79, 0.71)])
    lost = [[kind["readings"]["pet"]["points_lost"] for kind in row["sets"]["test"].values()] for row in rows]
    assert lost == [[0.0, 0.0], [1.0, -1.0]]


def test_a_sample_is_the_same_each_time_and_in_order() -> None:
    pairs = [Pair(f"{number:03d}", Path(), Path(), Layout.OXFORD) for number in range(100)]
    chosen = accuracy.sample(pairs, 10)
    names = [pair.name for pair in chosen]
    assert chosen == accuracy.sample(pairs, 10)
    assert names == sorted(set(names))
    assert len(names) == 10
    assert accuracy.sample(pairs, None) == accuracy.sample(pairs, 100) == pairs


def test_each_call_is_timed() -> None:
    timed = accuracy.Timed(lambda batch: batch[..., 0])
    batch = np.zeros((1, 4, 4, 3), np.uint8)
    assert timed(batch).shape == (1, 4, 4)
    timed(batch)
    found = timed.as_record()
    assert len(found["seconds"]) == 2
    assert min(found["seconds"]) <= found["median"] <= max(found["seconds"])


def test_engines_and_checkpoint_are_compared_on_the_same_photos() -> None:
    whole = evaluation(20)
    pairs = [Pair(f"photo {number}", Path(), Path(), Layout.OXFORD) for number in (3, 7, 19)]
    some = accuracy.part(whole, pairs)
    assert some.names == ("photo 3", "photo 7", "photo 19")
    assert np.array_equal(some.histograms, whole.histograms[[3, 7, 19]])
    told = accuracy.all_thresholds({"test": some}, {"own": 0.5, "cutout": 0.1})
    assert told["test"]["own"] == accuracy.metrics(some, 0.5)
    assert list(told["test"]) == ["own", "cutout"]
