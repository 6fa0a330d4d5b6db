"""A probability map and what is made of it: mask, coverage, cutout, overlay."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image

from petseg_runtime.result import Segmentation

SHAPES = [(1, 1), (1, 2), (1, 40), (40, 1), (2, 2), (3, 5), (37, 61)]
GREEN = (0, 200, 83)

open_unit = st.floats(0, 1, exclude_min=True, exclude_max=True)
maps = arrays.arrays(np.uint8, arrays.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=6))


def made(probability: np.ndarray, threshold: float = 0.5, cutout_threshold: float = 0.5) -> Segmentation:
    pixels = np.random.default_rng(0).integers(0, 256, (*probability.shape, 3), dtype=np.uint8)
    return Segmentation(pixels, probability, threshold, cutout_threshold)


def ellipse(shape: tuple[int, int]) -> np.ndarray:
    """A pet that touches no edge, if there is room for one."""
    y, x = (np.linspace(-1.5, 1.5, n) for n in shape)
    return np.where(y[:, None] ** 2 + x**2 < 1, 255, 0).astype(np.uint8)


def every_probability(threshold: float = 0.5) -> Segmentation:
    return made(np.arange(256, dtype=np.uint8).reshape(16, 16), cutout_threshold=threshold)


@given(maps, open_unit)
def test_the_mask_is_where_probability_reaches_the_threshold(probability: np.ndarray, threshold: float) -> None:
    mask = made(probability, threshold).mask
    assert mask.dtype == np.bool_
    assert mask.tolist() == [[int(p) >= 255 * threshold for p in row] for row in probability]


@pytest.mark.parametrize(("value", "pet"), [(50, False), (51, True), (52, True)])
def test_the_threshold_itself_is_pet(value: int, pet: bool) -> None:
    assert made(np.full((1, 1), value, np.uint8), threshold=0.2).mask.item() is pet


def test_the_mask_goes_by_the_threshold_and_not_by_that_of_cutouts() -> None:
    probability = np.full((4, 4), 128, np.uint8)
    assert not made(probability, 0.9, 0.1).mask.any()
    assert made(probability, 0.1, 0.9).mask.all()


@given(maps, open_unit)
def test_coverage_is_the_share_of_pet(probability: np.ndarray, threshold: float) -> None:
    result = made(probability, threshold)
    coverage = result.coverage
    assert isinstance(coverage, float)
    assert coverage == pytest.approx(np.count_nonzero(result.mask) / probability.size)


def test_the_mask_as_a_picture_is_black_and_white() -> None:
    result = made(ellipse((37, 61)))
    picture = result.mask_image()
    assert (picture.mode, picture.size) == ("L", (61, 37))
    np.testing.assert_array_equal(np.array(picture), np.where(result.mask, 255, 0))


def test_the_probability_as_a_picture_is_the_map_itself() -> None:
    result = every_probability()
    assert result.probability_image().mode == "L"
    np.testing.assert_array_equal(np.array(result.probability_image()), result.probability)


@given(open_unit)
def test_cutout_is_opaque_where_certain_and_never_less_opaque_for_more_probability(threshold: float) -> None:
    alpha = np.array(every_probability(threshold).cutout())[..., 3].ravel().astype(int)
    assert alpha[0] == 0
    assert alpha[255] == 255
    assert (np.diff(alpha) >= 0).all()


@pytest.mark.parametrize("threshold", [0.2, 0.5, 0.8])
def test_cutout_is_half_transparent_at_its_threshold_with_soft_edges_around(threshold: float) -> None:
    alpha = np.array(every_probability(threshold).cutout())[..., 3].ravel().astype(int)
    assert abs(alpha[round(255 * threshold)] - 127.5) < 4
    assert np.count_nonzero((alpha > 0) & (alpha < 255)) > 40


def test_cutout_keeps_the_photos_colours() -> None:
    result = made(ellipse((37, 61)))
    cutout = result.cutout()
    assert (cutout.mode, cutout.size) == ("RGBA", (61, 37))
    np.testing.assert_array_equal(np.array(cutout)[..., :3], result.pixels)


@given(maps, open_unit)
def test_overlay_leaves_all_outside_the_mask_untouched(probability: np.ndarray, threshold: float) -> None:
    result = made(probability, threshold)
    overlay = np.array(result.overlay())
    np.testing.assert_array_equal(overlay[~result.mask], result.pixels[~result.mask])


def test_overlay_draws_an_outline_in_full_colour_and_tints_the_inside_by_half() -> None:
    result = made(ellipse((37, 61)))
    overlay, mask = np.array(result.overlay()).astype(int), result.mask
    inside = mask.copy()
    inside[1:] &= mask[:-1]
    inside[:-1] &= mask[1:]
    inside[:, 1:] &= mask[:, :-1]
    inside[:, :-1] &= mask[:, 1:]
    outline = mask & ~inside
    assert outline.any()
    assert (overlay[outline] == GREEN).all()
    tinted = (result.pixels[inside].astype(int) + GREEN) / 2
    assert np.abs(overlay[inside] - tinted).max() <= 1


def test_overlay_takes_another_colour_and_strength() -> None:
    result = made(np.full((10, 10), 255, np.uint8))
    np.testing.assert_array_equal(np.array(result.overlay((1, 2, 3), 1.0)), np.full((10, 10, 3), (1, 2, 3)))
    np.testing.assert_array_equal(np.array(result.overlay((1, 2, 3), 0.0)), result.pixels)


def test_the_outline_grows_with_the_photo() -> None:
    result = made(ellipse((1000, 1000)))
    row = (np.array(result.overlay())[500] == GREEN).all(axis=-1)
    assert np.count_nonzero(row[:500]) == 4


def test_a_pet_that_fills_the_photo_has_no_outline() -> None:
    result = made(np.full((20, 30), 255, np.uint8))
    assert result.coverage == 1
    expected = (result.pixels.astype(int) + GREEN) / 2
    assert np.abs(np.array(result.overlay()) - expected).max() <= 1
    assert (np.array(result.cutout())[..., 3] == 255).all()


def test_a_photo_without_a_pet_stays_as_it_is() -> None:
    result = made(np.zeros((20, 30), np.uint8))
    assert result.coverage == 0
    np.testing.assert_array_equal(np.array(result.overlay()), result.pixels)
    assert (np.array(result.cutout())[..., 3] == 0).all()
    assert result.mask_image().getextrema() == (0, 0)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("fill", [0, 128, 255, None])
def test_every_picture_has_the_photos_size(shape: tuple[int, int], fill: int | None) -> None:
    result = made(ellipse(shape) if fill is None else np.full(shape, fill, np.uint8))
    for picture in (result.mask_image(), result.probability_image(), result.cutout(), result.overlay()):
        assert isinstance(picture, Image.Image)
        assert picture.size == shape[::-1]


def test_nothing_made_of_a_result_changes_it() -> None:
    result = made(ellipse((37, 61)))
    pixels, probability = result.pixels.copy(), result.probability.copy()
    for picture in (result.overlay(), result.cutout(), result.mask_image(), result.probability_image()):
        picture.paste(7, (0, 0, *picture.size))
    result.mask[:] = False
    np.testing.assert_array_equal(result.pixels, pixels)
    np.testing.assert_array_equal(result.probability, probability)


def test_read_only_arrays_will_do() -> None:
    result = made(ellipse((37, 61)))
    result.pixels.flags.writeable = result.probability.flags.writeable = False
    assert result.overlay().size == result.cutout().size == (61, 37)
