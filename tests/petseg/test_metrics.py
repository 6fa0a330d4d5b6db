from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from petseg.metrics import (
    BACKGROUND,
    BORDER,
    PET,
    Border,
    PixelCounts,
    best_threshold,
    counts,
    histogram,
)
from petseg_runtime.spec import lowest_pet

SHAPES = hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=9)
BYTES = st.one_of(st.integers(0, 255), st.sampled_from([0, 1, 127, 128, 254, 255]))
PHOTOS = SHAPES.flatmap(
    lambda shape: st.tuples(
        hnp.arrays(np.uint8, shape, elements=BYTES),
        hnp.arrays(np.uint8, shape, elements=st.integers(1, 3)),
    )
)
HISTOGRAMS = hnp.arrays(np.int64, (3, 256), elements=st.integers(0, 1000))


def brute_force(probability: np.ndarray, trimap: np.ndarray, cut: int, border: Border) -> PixelCounts:
    tp = fp = fn = tn = 0
    for p, t in zip(probability.ravel().tolist(), trimap.ravel().tolist(), strict=True):
        if t == 3 and border == "ignored":
            continue
        pet = t == 1 or (t == 3 and border == "pet")
        tp += pet and p >= cut
        fn += pet and p < cut
        fp += not pet and p >= cut
        tn += not pet and p < cut
    return PixelCounts(tp, fp, fn, tn)


@given(PHOTOS, st.integers(0, 255))
def test_counts_equal_counting_pixel_by_pixel(photo: tuple[np.ndarray, np.ndarray], cut: int) -> None:
    probability, trimap = photo
    hist = histogram(probability, trimap)
    for border in Border:
        assert counts(hist, cut / 255, border) == brute_force(probability, trimap, cut, border)


@pytest.mark.parametrize("border", list(Border))
def test_counts_are_exact_at_every_threshold(border: Border) -> None:
    rng = np.random.default_rng(0)
    probability = np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 48)
    trimap = rng.integers(1, 4, probability.shape).astype(np.uint8)
    hist = histogram(probability, trimap)
    for cut in range(256):
        assert counts(hist, cut / 255, border) == brute_force(probability, trimap, cut, border)


@given(PHOTOS, PHOTOS, st.floats(0, 1))
def test_two_photos_add_up(a: tuple[np.ndarray, np.ndarray], b: tuple[np.ndarray, np.ndarray], cut: float) -> None:
    one, two = histogram(*a), histogram(*b)
    both = histogram(*(np.concatenate((x.ravel(), y.ravel())) for x, y in zip(a, b, strict=True)))
    assert np.array_equal(one + two, both)
    for border in Border:
        assert counts(one, cut, border) + counts(two, cut, border) == counts(both, cut, border)


def test_a_histogram_has_a_row_for_each_class() -> None:
    hist = histogram(np.array([[7, 7], [200, 0]], np.uint8), np.array([[PET, PET], [BACKGROUND, BORDER]], np.uint8))
    assert hist.shape == (3, 256)
    assert hist.dtype == np.int64
    assert hist.sum() == 4
    assert (hist[0, 7], hist[1, 200], hist[2, 0]) == (2, 1, 1)


def test_no_pixels_is_an_empty_histogram() -> None:
    assert not histogram(np.empty((0, 4), np.uint8), np.empty((0, 4), np.uint8)).any()


def test_the_border_reading_is_background_by_default() -> None:
    hist = histogram(np.array([[255, 255]], np.uint8), np.array([[BORDER, PET]], np.uint8))
    assert counts(hist, 0.5) == PixelCounts(tp=1, fp=1)
    assert counts(hist, 0.5, Border.PET) == PixelCounts(tp=2)
    assert counts(hist, 0.5, Border.IGNORED) == PixelCounts(tp=1)


@pytest.mark.parametrize("shape", [(2, 3), (3, 2, 1), (6,)])
def test_unequal_shapes_are_rejected(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"\(3, 2\)"):
        histogram(np.zeros((3, 2), np.uint8), np.ones(shape, np.uint8))


@pytest.mark.parametrize("value", [0, 4, 255])
def test_a_trimap_with_another_value_is_rejected(value: int) -> None:
    with pytest.raises(ValueError, match=f"{value}"):
        histogram(np.zeros((1, 2), np.uint8), np.array([[2, value]], np.uint8))


def test_the_lowest_pet_at_every_byte_is_that_byte() -> None:
    assert [lowest_pet(k / 255) for k in range(256)] == list(range(256))
    assert [lowest_pet(1 - k / 255) for k in range(256)] == list(range(255, -1, -1))
    assert any(255 * (1 - k / 255) > 255 - k for k in range(256)), "the rounding is there for a reason"


@pytest.mark.parametrize(
    ("threshold", "cut"), [(0, 0), (1e-6, 1), (0.1, 26), (0.2, 51), (0.5, 128), (0.6, 153), (0.999, 255), (1, 255)]
)
def test_the_lowest_pet_is_the_first_byte_that_reaches_the_threshold(threshold: float, cut: int) -> None:
    assert lowest_pet(threshold) == cut


@pytest.mark.parametrize("threshold", [-0.001, 1.001, 255, math.nan, math.inf, -math.inf])
def test_a_threshold_outside_0_and_1_is_rejected(threshold: float) -> None:
    with pytest.raises(ValueError, match="threshold"):
        lowest_pet(threshold)
    with pytest.raises(ValueError, match="threshold"):
        counts(np.zeros((3, 256), np.int64), threshold)


@given(HISTOGRAMS, st.sampled_from(Border))
def test_best_threshold_is_the_best_of_all(hist: np.ndarray, border: Border) -> None:
    hist[:, 255] = 0  # a cut at 255 itself: see below
    hist[0, 77] += 1  # without any pet no threshold can be chosen
    found = best_threshold(hist, border)
    assert 0 < found < 1
    assert (255 * found) == pytest.approx(round(255 * found))
    assert counts(hist, found, border).iou == max(counts(hist, k / 255, border).iou for k in range(1, 255))


@given(PHOTOS, st.sampled_from(Border))
def test_best_threshold_of_sparse_counts(photo: tuple[np.ndarray, np.ndarray], border: Border) -> None:
    probability, trimap = photo
    hist = histogram(np.minimum(probability, 254), trimap)
    if counts(hist, 0, border).tp:  # without pet every IoU is 0 or 1 by convention
        best = max(counts(hist, k / 255, border).iou for k in range(1, 255))
        assert counts(hist, best_threshold(hist, border), border).iou == best


def test_best_threshold_when_the_cut_255_would_win() -> None:
    """255 itself is not a threshold (a spec's are below 1), so the best of the others must be returned."""
    hist = np.zeros((3, 256), np.int64)
    hist[0, 255], hist[0, 100], hist[1, 254], hist[1, 90] = 100, 40, 60, 500
    assert counts(hist, 1.0).iou > counts(hist, 100 / 255).iou > counts(hist, 254 / 255).iou
    best = max(counts(hist, k / 255).iou for k in range(1, 255))
    assert counts(hist, best_threshold(hist)).iou == best


def test_of_equal_thresholds_the_middle_one_is_taken() -> None:
    hist = np.zeros((3, 256), np.int64)
    hist[0, 200], hist[1, 100] = 10, 10  # cuts 101..200 are all perfect
    assert 145 <= round(255 * best_threshold(hist)) <= 155
    assert counts(hist, best_threshold(hist)).iou == 1


def test_best_threshold_depends_on_the_reading_of_the_border() -> None:
    hist = np.zeros((3, 256), np.int64)
    hist[0, 200], hist[2, 120], hist[1, 20] = 10, 10, 10
    assert 120 < round(255 * best_threshold(hist)) <= 200
    assert 20 < round(255 * best_threshold(hist, Border.PET)) <= 120


def test_best_threshold_of_nothing_is_still_a_threshold() -> None:
    assert 0 < best_threshold(np.zeros((3, 256), np.int64)) < 1


@given(*[st.integers(1, 10**6)] * 4)
def test_ratios_by_hand(tp: int, fp: int, fn: int, tn: int) -> None:
    assert PixelCounts(tp, fp, fn, tn).ratios() == {
        "iou": pytest.approx(tp / (tp + fp + fn)),
        "dice": pytest.approx(2 * tp / (2 * tp + fp + fn)),
        "accuracy": pytest.approx((tp + tn) / (tp + fp + fn + tn)),
        "precision": pytest.approx(tp / (tp + fp)),
        "recall": pytest.approx(tp / (tp + fn)),
    }


def test_counts_by_name() -> None:
    assert PixelCounts(1, 2, 3, 4).as_dict() == {"tp": 1, "fp": 2, "fn": 3, "tn": 4}


@pytest.mark.parametrize("empty", [PixelCounts(), PixelCounts(tn=9)])
def test_no_pet_and_none_found_is_right_in_every_ratio(empty: PixelCounts) -> None:
    assert set(empty.ratios().values()) == {1.0}


def test_pet_found_where_there_is_none() -> None:
    wrong = PixelCounts(fp=3, tn=1)
    assert (wrong.iou, wrong.dice, wrong.precision, wrong.accuracy) == (0, 0, 0, 0.25)
    assert math.isnan(wrong.recall)


def test_no_pet_found_where_there_is_one() -> None:
    missed = PixelCounts(fn=3, tn=1)
    assert (missed.iou, missed.dice, missed.recall, missed.accuracy) == (0, 0, 0, 0.25)
    assert math.isnan(missed.precision)
