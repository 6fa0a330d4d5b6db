"""Regions without a near-certain pixel are removed with their soft edges; maps without such a pixel stay unchanged."""

from __future__ import annotations

from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from petseg_runtime import Segmenter, regions
from petseg_runtime.regions import CERTAIN, DOUBTFUL, without_doubtful


def reference(probability: np.ndarray, reach: int | None = None) -> np.ndarray:
    """A slow reference implementation, pixel by pixel; ``reach`` in cells, None: 1/32 of the shorter side."""
    height, width = probability.shape
    certain = [tuple(place) for place in np.argwhere(probability >= CERTAIN)]
    if not certain:
        return probability
    stays, left = np.zeros(probability.shape, bool), deque(certain)
    while left:
        row, column = left.popleft()
        inside = 0 <= row < height and 0 <= column < width
        if inside and not stays[row, column] and probability[row, column] >= DOUBTFUL:
            stays[row, column] = True
            left.extend([(row + 1, column), (row - 1, column), (row, column + 1), (row, column - 1)])
    kept = np.zeros_like(probability)
    # In cells of 2 x 2 pixels: Chebyshev distance within reach, and city-block distance from there on.
    reach, cells = reach or max(1, round(min(height, width) / 64)), np.argwhere(stays) // 2
    for place in np.ndindex(height, width):
        far = np.maximum(np.abs(cells - np.array(place) // 2) - reach, 0).sum(axis=1).min()
        missing = sum(far > round(quarter * reach / 4) for quarter in range(4))
        if stays[place] or probability[place] < DOUBTFUL:
            kept[place] = probability[place] - (int(probability[place]) * missing + 2) // 4
    return kept


SHAPES = st.tuples(st.integers(1, 12), st.integers(1, 90)) | st.tuples(st.integers(1, 90), st.integers(1, 12))
LEVELS = st.sampled_from([0, 1, DOUBTFUL - 1, DOUBTFUL, 128, CERTAIN - 1, CERTAIN, 255])


@settings(deadline=None)
@given(SHAPES.flatmap(lambda shape: arrays(np.uint8, shape, elements=LEVELS)))
def test_small_maps_match_the_reference(probability: np.ndarray) -> None:
    before = probability.copy()
    np.testing.assert_array_equal(without_doubtful(probability), reference(probability))
    np.testing.assert_array_equal(probability, before)


@pytest.mark.parametrize("reach", [3, 6])
def test_a_reach_of_several_cells_matches_the_reference(reach: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also at all four sides, one of which cuts cells in two: no dilation gets from the end of a row into the next.

    The quarters of a reach of 6 are 2, 1 and 1 cells wide; of a reach of 3, they are 1, 1 and 0.
    """
    haze = np.random.default_rng(0).integers(0, DOUBTFUL, (101, 116)).astype(np.uint8)
    for row, column in ((0, 0), (45, 115), (100, 50), (30, 0), (60, 60)):
        haze[row, column] = CERTAIN
    monkeypatch.setattr(regions, "EDGE", 2 * reach / 101)
    np.testing.assert_array_equal(without_doubtful(haze), reference(haze, reach))


def test_a_large_map_matches_the_reference() -> None:
    """A reach of several pixels; a cat, a cushion apart from it, and the soft edges of both, which end within reach."""
    answer = np.zeros((256, 256), np.uint8)
    answer[95:165, 95:165] = 30
    answer[100:160, 100:160] = 240
    answer[130, 130] = CERTAIN
    cat = answer.copy()
    answer[15:65, 15:65] = 30
    answer[20:60, 20:60] = CERTAIN - 1
    np.testing.assert_array_equal(without_doubtful(answer), cat)


def test_results_exclude_low_confidence_regions_unless_requested(toy: Any, tmp_path: Path) -> None:
    free = toy(tmp_path / "free.onnx", dynamic_size=True).path
    photo = np.zeros((64, 64, 3), np.uint8)  # the toy's answer is the red channel
    photo[4:20, 4:20, 0] = 255
    photo[40:60, 40:60, 0] = 200
    with (
        Segmenter(free, threads=1, size=(64, 64)) as shown,
        Segmenter(free, threads=1, size=(64, 64), keep_doubtful=True) as all_of_it,
    ):
        assert shown(photo).box == (4, 4, 16, 16)
        assert all_of_it(photo).box == (4, 4, 56, 56)
        np.testing.assert_array_equal(all_of_it(photo).probability[40:60, 40:60], 200)
