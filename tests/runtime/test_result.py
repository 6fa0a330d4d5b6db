"""Segmentation results: mask, pictures, polygons, run lengths, and whether there is a pet."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image

from petseg_runtime.errors import UnreadableImage, UsageError
from petseg_runtime.result import Polygon, Segmentation

SHAPES = [(1, 1), (1, 2), (1, 40), (40, 1), (2, 2), (3, 5), (37, 61)]
GREEN = (0, 200, 83)

open_unit = st.floats(0, 1, exclude_min=True, exclude_max=True)
maps = arrays.arrays(np.uint8, arrays.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=6))
# Maps with few values have regions; those of `maps` rarely do.
coarse = arrays.arrays(
    np.uint8,
    arrays.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=9),
    elements=st.sampled_from([0, 90, 140, 255]),
)


def made(probability: np.ndarray, threshold: float = 0.5, cutout_threshold: float = 0.5) -> Segmentation:
    pixels = np.random.default_rng(0).integers(0, 256, (*probability.shape, 3), dtype=np.uint8)
    return Segmentation(pixels, probability, threshold, cutout_threshold)


def ellipse(shape: tuple[int, int]) -> np.ndarray:
    """A pet that touches no edge, if the map is large enough."""
    y, x = (np.linspace(-1.5, 1.5, n) for n in shape)
    return np.where(y[:, None] ** 2 + x**2 < 1, 255, 0).astype(np.uint8)


def blob(seed: int, shape: tuple[int, int] = (60, 80)) -> np.ndarray:
    """Smooth shapes, some with holes, some cut by the edge, like an enlarged model output."""
    small = np.random.default_rng(seed).integers(0, 256, (5, 6), dtype=np.uint8)
    return np.array(Image.fromarray(small).resize(shape[::-1], Image.Resampling.BICUBIC))


def every_probability(threshold: float = 0.5) -> Segmentation:
    return made(np.arange(256, dtype=np.uint8).reshape(16, 16), cutout_threshold=threshold)


@given(maps, open_unit)
def test_the_mask_is_where_probability_reaches_the_threshold(probability: np.ndarray, threshold: float) -> None:
    mask = made(probability, threshold).mask
    assert mask.dtype == np.bool_
    assert mask.tolist() == [[p > 0 and int(p) >= 255 * threshold - 1e-9 for p in row] for row in probability]


@pytest.mark.parametrize(("value", "pet"), [(50, False), (51, True), (52, True)])
def test_the_threshold_itself_is_pet(value: int, pet: bool) -> None:
    assert made(np.full((1, 1), value, np.uint8), threshold=0.2).mask.item() is pet


def test_the_mask_uses_the_mask_threshold_not_the_cutout_threshold() -> None:
    probability = np.full((4, 4), 128, np.uint8)
    assert not made(probability, 0.9, 0.1).mask.any()
    assert made(probability, 0.1, 0.9).mask.all()


@given(maps, open_unit)
def test_coverage_is_the_share_of_pet_pixels(probability: np.ndarray, threshold: float) -> None:
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
def test_cutout_alpha_is_monotonic_in_probability_and_opaque_when_certain(threshold: float) -> None:
    alpha = np.array(every_probability(threshold).cutout())[..., 3].ravel().astype(int)
    assert alpha[0] == 0
    assert alpha[255] == 255
    assert (np.diff(alpha) >= 0).all()


@pytest.mark.parametrize("threshold", [0.2, 0.5, 0.8])
def test_cutout_is_half_transparent_at_its_threshold_with_soft_edges_around(threshold: float) -> None:
    alpha = np.array(every_probability(threshold).cutout())[..., 3].ravel().astype(int)
    assert abs(alpha[round(255 * threshold)] - 127.5) < 4
    assert np.count_nonzero((alpha > 0) & (alpha < 255)) > 40


def test_cutout_keeps_visible_colours_and_erases_hidden_ones() -> None:
    result = made(ellipse((37, 61)))
    cutout = result.cutout()
    assert (cutout.mode, cutout.size) == ("RGBA", (61, 37))
    shown = np.array(cutout)[..., 3] > 0
    assert shown.any()
    assert not shown.all()
    np.testing.assert_array_equal(np.array(cutout)[..., :3], np.where(shown[..., None], result.pixels, 0))


@given(maps, open_unit)
def test_overlay_leaves_pixels_outside_the_mask_unchanged(probability: np.ndarray, threshold: float) -> None:
    result = made(probability, threshold)
    overlay = np.array(result.overlay())
    np.testing.assert_array_equal(overlay[~result.mask], result.pixels[~result.mask])


def test_overlay_has_an_opaque_outline_and_a_half_tinted_inside() -> None:
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


def test_overlay_accepts_colour_and_strength() -> None:
    result = made(np.full((10, 10), 255, np.uint8))
    np.testing.assert_array_equal(np.array(result.overlay((1, 2, 3), 1.0)), np.full((10, 10, 3), (1, 2, 3)))
    np.testing.assert_array_equal(np.array(result.overlay((1, 2, 3), 0.0)), result.pixels)


@pytest.mark.parametrize("shape", [(1000, 1500), (1500, 1000)])
def test_the_outline_width_scales_with_the_photos_shorter_side(shape: tuple[int, int]) -> None:
    result = made(ellipse(shape))
    row = (np.array(result.overlay())[shape[0] // 2] == GREEN).all(axis=-1)
    assert np.count_nonzero(row[: shape[1] // 2]) == 4


def test_a_pet_that_fills_the_photo_has_no_outline() -> None:
    result = made(np.full((20, 30), 255, np.uint8))
    assert result.coverage == 1
    expected = (result.pixels.astype(int) + GREEN) / 2
    assert np.abs(np.array(result.overlay()) - expected).max() <= 1
    assert (np.array(result.cutout())[..., 3] == 255).all()


def test_a_photo_without_a_pet_is_unchanged() -> None:
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


def test_derived_pictures_do_not_modify_the_result() -> None:
    result = made(ellipse((37, 61)))
    pixels, probability = result.pixels.copy(), result.probability.copy()
    for picture in (result.overlay(), result.cutout(), result.mask_image(), result.probability_image()):
        picture.paste(7, (0, 0, *picture.size))
    with pytest.raises(ValueError, match="read-only"):
        result.mask[:] = False
    np.testing.assert_array_equal(result.pixels, pixels)
    np.testing.assert_array_equal(result.probability, probability)


def test_read_only_arrays_are_accepted() -> None:
    result = made(ellipse((37, 61)))
    result.pixels.flags.writeable = result.probability.flags.writeable = False
    assert result.overlay().size == result.cutout().size == (61, 37)


def test_the_mask_is_computed_only_once() -> None:
    result = made(ellipse((37, 61)))
    assert result.mask is result.mask


@given(coarse)
def test_the_box_is_the_bounding_box_of_the_mask(probability: np.ndarray) -> None:
    result = made(probability)
    rows, columns = np.nonzero(result.mask)
    if len(rows):
        x, y = columns.min(), rows.min()
        assert result.box == (x, y, columns.max() - x + 1, rows.max() - y + 1)
        assert all(type(value) is int for value in result.box)
    else:
        assert result.box is None


class TestWithoutThePhoto:
    result = Segmentation(None, ellipse((37, 61)), 0.5, 0.5)

    @pytest.mark.parametrize("picture", ["cutout", "overlay", "on_background"])
    def test_pictures_without_the_photo_raise_with_the_reason(self, picture: str) -> None:
        arguments = [(0, 0, 0)] if picture == "on_background" else []
        with pytest.raises(UsageError, match="decoded for its mask only"):
            getattr(self.result, picture)(*arguments)

    def test_everything_but_pictures_is_available(self) -> None:
        other = made(ellipse((37, 61)))
        np.testing.assert_array_equal(self.result.mask, other.mask)
        assert (self.result.box, self.result.coverage, self.result.found) == (other.box, other.coverage, True)
        assert (self.result.rle(), self.result.coco()) == (other.rle(), other.coco())


class TestOnBackground:
    def test_a_colour_is_blended_by_the_cutouts_alpha(self) -> None:
        result = every_probability()
        red, green, blue, alpha = np.moveaxis(np.array(result.cutout()).astype(float), -1, 0)
        expected = [c * alpha / 255 + b * (1 - alpha / 255) for c, b in zip((red, green, blue), GREEN, strict=True)]
        picture = result.on_background(GREEN)
        assert (picture.mode, picture.size) == ("RGB", (16, 16))
        assert np.abs(np.array(picture) - np.dstack(expected)).max() <= 1

    def test_a_picture_is_scaled_to_cover_the_photo_and_cropped_centrally(self) -> None:
        wide = np.zeros((10, 60, 3), np.uint8)
        wide[:, 20:40] = 200  # the middle third; on a photo twice as high, the background shows only this
        result = made(np.zeros((20, 40), np.uint8))
        seen = np.array(result.on_background(Image.fromarray(wide)))
        assert seen.shape == (20, 40, 3)
        assert (seen[:, 4:-4] == 200).all()
        np.testing.assert_array_equal(seen, seen[:, ::-1])

    def test_a_picture_is_turned_upright_and_composited_over_white(self) -> None:
        exif = Image.Exif()
        exif[0x0112] = 3  # upside down
        stored = Image.new("RGBA", (8, 8), (10, 20, 30, 255))
        stored.paste((0, 0, 0, 0), (0, 0, 8, 4))
        stored.info["exif"] = exif.tobytes()
        seen = np.array(made(np.zeros((8, 8), np.uint8)).on_background(stored))
        assert (seen[:4] == (10, 20, 30)).all()
        assert (seen[4:] == 255).all()

    def test_a_pet_that_fills_the_photo_hides_the_background(self) -> None:
        result = made(np.full((5, 7), 255, np.uint8))
        np.testing.assert_array_equal(np.array(result.on_background(result.pixels[::-1])), result.pixels)

    def test_an_unusable_picture_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(UnreadableImage, match=re.escape("beach.jpg")):
            made(ellipse((5, 7))).on_background(tmp_path / "beach.jpg")


def rasterised(polygons: list[Polygon], shape: tuple[int, int]) -> np.ndarray:
    """The pixels whose centres lie in a polygon: a ray to the right crosses an odd number of edges."""
    y, x = np.mgrid[: shape[0], : shape[1]] + 0.5
    inside = np.zeros(shape, np.bool_)
    for ring in (ring for polygon in polygons for ring in (polygon.exterior, *polygon.holes)):
        for (x0, y0), (x1, y1) in zip(ring, np.roll(ring, -1, axis=0), strict=True):
            if y0 != y1:
                inside ^= ((y0 > y) != (y1 > y)) & (x < x0 + (y - y0) * (x1 - x0) / (y1 - y0))
    return inside


def distances(points: np.ndarray, polygons: list[Polygon]) -> np.ndarray:
    """The distance of each point, [n, 2], from the nearest outline."""
    nearest = np.full(len(points), np.inf)
    for ring in (ring for polygon in polygons for ring in (polygon.exterior, *polygon.holes)):
        for start, end in zip(ring, np.roll(ring, -1, axis=0), strict=True):
            along = end - start
            share = ((points - start) @ along / (along @ along or 1)).clip(0, 1)
            nearest = np.minimum(nearest, np.linalg.norm(points - start - share[:, None] * along, axis=1))
    return nearest


def area(ring: np.ndarray) -> float:
    x, y = ring.T
    return float(np.sum(x * np.roll(y, -1) - y * np.roll(x, -1)) / 2)


class TestPolygons:
    @given(maps | coarse, open_unit)
    def test_rasterised_polygons_equal_the_mask(self, probability: np.ndarray, threshold: float) -> None:
        result = made(probability, threshold)
        np.testing.assert_array_equal(rasterised(result.polygons(tolerance=0), probability.shape), result.mask)

    @given(coarse)
    def test_rings_stay_within_the_photo_with_distinct_points(self, probability: np.ndarray) -> None:
        for polygon in made(probability).polygons(0):
            for ring in (polygon.exterior, *polygon.holes):
                assert ring.dtype == np.float64
                assert ring.shape[1:] == (2,)
                assert (ring >= 0).all()
                assert (ring <= probability.shape[::-1]).all()
                assert (ring != np.roll(ring, 1, axis=0)).any(axis=1).all()

    @settings(max_examples=25)
    @given(st.integers(0, 10**6), st.floats(0.1, 3))
    def test_simplification_moves_nothing_by_more_than_the_tolerance(self, seed: int, tolerance: float) -> None:
        result = made(blob(seed))
        exact, thinned = result.polygons(0), result.polygons(tolerance)
        assert len(exact) == len(thinned)
        points = np.concatenate([ring for p in exact for ring in (p.exterior, *p.holes)] or [np.zeros((0, 2))])
        assert (distances(points, thinned) <= tolerance + 1e-9).all()
        # A point between an outline and its chord is nearer to the chord than the outline is.
        rows, columns = np.nonzero(rasterised(thinned, result.mask.shape) != result.mask)
        assert (distances(np.stack((columns, rows), 1) + 0.5, thinned) <= tolerance + 1e-9).all()

    def test_simplification_keeps_few_points_of_curves_and_the_corners_of_lines(self) -> None:
        result = made(ellipse((200, 300)))
        (exact,), (thinned,) = result.polygons(0), result.polygons()
        assert len(thinned.exterior) < len(exact.exterior) / 5
        assert len(made(np.full((200, 300), 255, np.uint8)).polygons()[0].exterior) <= 5

    @pytest.mark.parametrize("step", [1, -1])
    def test_simplification_keeps_a_thin_part_in_line_with_a_chord(self, step: int) -> None:
        """The chord from the foot's corner to the bump, where the outline starts; the tail lies beyond the bump."""
        probability = np.zeros((20, 70), np.uint8)
        probability[3, 2:63] = 255
        probability[2, 20] = 255
        probability[3:9, 62] = 255
        (polygon,) = made(probability[:, ::step]).polygons(tolerance=2.5)
        assert np.ptp(polygon.exterior[:, 0]) >= 61 - 2.5

    def test_a_pixel_spans_from_its_index_to_the_next(self) -> None:
        probability = np.zeros((4, 6), np.uint8)
        probability[1:3, 2:5] = 255
        (polygon,) = made(probability, 0.5).polygons(0)
        assert np.allclose(polygon.exterior.min(axis=0), (2, 1), atol=0.01)
        assert np.allclose(polygon.exterior.max(axis=0), (5, 3), atol=0.01)

    def test_outlines_are_interpolated_to_the_threshold_between_pixels(self) -> None:
        ramp = np.tile(np.array([0, 100, 200], np.uint8), (3, 1))
        (polygon,) = made(ramp, 0.5).polygons(0)  # at 127.5 of 255
        assert polygon.exterior[:, 0].min() == pytest.approx(1.5 + 0.275, abs=0.01)

    @pytest.mark.parametrize("faint", [128, 255])
    def test_a_pet_cut_by_the_photos_edge_is_closed_along_it(self, faint: int) -> None:
        (polygon,) = made(np.full((4, 6), faint, np.uint8)).polygons(0)
        assert not polygon.holes
        assert abs(area(polygon.exterior)) == pytest.approx(24, abs=1)  # the corners are cut
        for edge in ((0, 0), (0, 6), (1, 0), (1, 4)):
            assert np.count_nonzero(polygon.exterior[:, edge[0]] == edge[1]) >= 2

    def test_holes_belong_to_their_enclosing_polygon_in_reverse_orientation(self) -> None:
        probability = np.zeros((30, 60), np.uint8)
        probability[2:28, 2:28] = 255
        probability[8:22, 8:22] = 0
        probability[12:18, 12:18] = 255  # an island in the hole
        probability[2:28, 40:50] = 255
        polygons = made(probability).polygons(0)
        assert sorted(len(polygon.holes) for polygon in polygons) == [0, 0, 1]
        (ring,) = [polygon for polygon in polygons if polygon.holes]
        assert area(ring.exterior) * area(ring.holes[0]) < 0
        assert abs(area(ring.holes[0])) == pytest.approx(14 * 14, abs=2)

    @pytest.mark.parametrize("length", [1, 20])
    def test_an_outline_that_would_collapse_keeps_its_points(self, length: int) -> None:
        """To one point, or to the two ends of a line."""
        probability = np.zeros((5, 30), np.uint8)
        probability[2, 3 : 3 + length] = 255
        polygons = made(probability).polygons(tolerance=9)
        np.testing.assert_array_equal(rasterised(polygons, probability.shape), probability > 0)

    def test_an_empty_mask_has_no_polygons(self) -> None:
        assert made(np.zeros((5, 5), np.uint8)).polygons() == []


def decoded(rle: dict[str, object]) -> np.ndarray:
    """A decoder of COCO's run-length encoding, written from its definition (``rleFrString`` and ``rleDecode``)."""
    height, width = rle["size"]
    counts: list[int] = []
    characters = iter(rle["counts"])
    for character in characters:
        value, shift, bits = 0, 0, ord(character) - 48
        while True:
            value |= (bits & 31) << shift
            shift += 5
            if not bits & 32:
                break
            bits = ord(next(characters)) - 48
        if bits & 16:
            value -= 1 << shift
        counts.append(value + (counts[-2] if len(counts) > 2 else 0))
    pixels = [value for run, count in enumerate(counts) for value in [run % 2 == 1] * count]
    return np.array(pixels, np.bool_).reshape(width, height).T


class TestRunLengths:
    @given(coarse, open_unit)
    def test_decoded_run_lengths_equal_the_mask(self, probability: np.ndarray, threshold: float) -> None:
        result = made(probability, threshold)
        rle = json.loads(json.dumps(result.rle()))
        np.testing.assert_array_equal(decoded(rle), result.mask)

    def test_a_mask_encoded_by_hand(self) -> None:
        probability = np.array([[0, 255], [255, 255], [0, 0]], np.uint8)
        # Down the columns 0 1 0 1 1 0: runs of 1, 1, 1, 2, 1. The fourth less the second is 1, the fifth less the
        # third 0.
        assert made(probability).rle() == {"size": [3, 2], "counts": "11110"}

    @settings(max_examples=50)
    @given(st.integers(0, 10**6), open_unit)
    def test_run_lengths_match_pycocotools(self, seed: int, threshold: float) -> None:
        coco = pytest.importorskip("pycocotools.mask")
        result = made(blob(seed, (300, 200)), threshold)
        theirs = coco.encode(np.asfortranarray(result.mask.astype(np.uint8)))
        assert result.rle() == {"size": theirs["size"], "counts": theirs["counts"].decode()}

    @pytest.mark.parametrize("fill", [0, 255])
    def test_long_runs_take_several_characters(self, fill: int) -> None:
        result = made(np.full((1000, 1100), fill, np.uint8))
        np.testing.assert_array_equal(decoded(result.rle()), result.mask)


class TestCoco:
    def test_without_holes_coco_has_polygons(self) -> None:
        result = made(ellipse((40, 60)))
        fields = json.loads(json.dumps(result.coco()))
        (polygon,) = result.polygons()
        assert fields["segmentation"] == [polygon.exterior.round(2).ravel().tolist()]
        assert fields["bbox"] == list(result.box)
        assert (fields["area"], fields["iscrowd"]) == (np.count_nonzero(result.mask), 0)

    def test_coordinates_are_rounded_to_hundredths_of_a_pixel(self) -> None:
        result = made(blob(3, (400, 500)))
        (ring,), (polygon,) = result.coco()["segmentation"], result.polygons()
        assert all(len(str(number).partition(".")[2]) <= 2 for number in ring)
        assert ring == pytest.approx(polygon.exterior.ravel().tolist(), rel=0, abs=0.00501)

    def test_with_a_hole_in_any_region_coco_has_run_lengths(self) -> None:
        probability = ellipse((40, 60))
        probability[18:22, 28:32] = 0
        for corner in (0, 255):  # without and with a region that has no hole
            probability[:3, :5] = corner
            result = made(probability)
            assert result.coco()["segmentation"] == result.rle()

    def test_without_a_pet_coco_has_empty_run_lengths(self) -> None:
        result = made(np.zeros((4, 5), np.uint8))
        assert result.coco() == {"segmentation": result.rle(), "bbox": [0, 0, 0, 0], "area": 0, "iscrowd": 0}

    def test_exact_encodes_the_mask_without_tracing_outlines(self, monkeypatch: pytest.MonkeyPatch) -> None:
        result = made(blob(0, (90, 120)))
        expected = {**result.coco(), "segmentation": result.rle()}
        monkeypatch.setattr(Segmentation, "polygons", lambda *_: pytest.fail("polygons take most of the memory"))
        assert result.coco(exact=True) == expected

    def test_pycocotools_reads_polygons_and_run_lengths(self) -> None:
        coco = pytest.importorskip("pycocotools.mask")
        for seed in range(8):
            result = made(blob(seed, (90, 120)))
            segmentation = result.coco(tolerance=0)["segmentation"]
            rles = coco.frPyObjects(segmentation, 90, 120) if isinstance(segmentation, list) else [segmentation]
            merged = coco.merge(rles)
            seen = decoded({"size": merged["size"], "counts": merged["counts"].decode()})
            # It rasterizes polygons a little differently: pixels along the outline may differ.
            assert (seen & result.mask).sum() / (seen | result.mask).sum() > 0.97


def without_small_slowly(result: Segmentation, min_area: float) -> np.ndarray:
    """Flood fill from each pixel that the cutout or the mask shows."""
    probability = result.probability.copy()
    shown = result.mask | (np.array(result.cutout())[..., 3] > 0)
    todo = shown.copy()
    for seed in np.argwhere(shown).tolist():
        region, stack = [], [tuple(seed)]
        while stack:
            i, j = stack.pop()
            if 0 <= i < todo.shape[0] and 0 <= j < todo.shape[1] and todo[i, j]:
                todo[i, j] = False
                region.append((i, j))
                stack += [(i + 1, j), (i - 1, j), (i, j + 1), (i, j - 1)]
        if sum(result.mask[pixel] for pixel in region) / probability.size < min_area:
            for pixel in region:
                probability[pixel] = 0
    return probability


class TestWithoutSmall:
    @given(coarse, st.sampled_from([0.05, 0.3, 0.5, 0.9]), st.sampled_from([0.2, 0.45, 0.8]), st.floats(0, 0.9))
    def test_small_regions_match_a_flood_fill(
        self, probability: np.ndarray, threshold: float, cutout_threshold: float, min_area: float
    ) -> None:
        result = made(probability, threshold, cutout_threshold)
        cleaned = result.without_small(min_area)
        np.testing.assert_array_equal(cleaned.probability, without_small_slowly(result, min_area))
        assert cleaned.pixels is result.pixels

    def test_a_region_is_removed_with_its_soft_edge_from_every_output(self) -> None:
        probability = np.zeros((40, 60), np.uint8)
        probability[5:30, 5:30] = 255
        probability[8:14, 45:55] = 90  # soft edge, and no mask
        probability[10:12, 48:52] = 255  # 8 pixels of mask
        result = made(probability, cutout_threshold=0.4)
        cleaned = result.without_small(0.01)  # 24 pixels
        assert (len(result.polygons()), len(cleaned.polygons())) == (2, 1)
        assert cleaned.box == (5, 5, 25, 25)
        assert np.array(cleaned.cutout())[:, 31:, 3].max() == 0
        np.testing.assert_array_equal(decoded(cleaned.rle()), cleaned.mask)
        assert cleaned.probability[:, :31].tolist() == probability[:, :31].tolist()

    def test_the_minimum_area_is_inclusive(self) -> None:
        probability = np.zeros((10, 10), np.uint8)
        probability[0, :5] = 255
        probability[5, :4] = 255
        kept = made(probability).without_small(0.05)
        np.testing.assert_array_equal(np.flatnonzero(kept.mask), np.arange(5))

    def test_regions_are_4_connected_even_over_long_paths(self) -> None:
        board = np.indices((300, 301)).sum(axis=0) % 2 == 0
        assert not made(np.where(board, 255, 0).astype(np.uint8)).without_small(1.5 / board.size).mask.any()
        comb = np.zeros((300, 301), np.uint8)
        comb[:, ::2] = 255
        comb[-1] = 255
        assert made(comb).without_small(0.5).mask.sum() == 300 * 151 + 150

    def test_nothing_to_remove_returns_the_same_result(self) -> None:
        result = made(ellipse((37, 61)))
        assert result.without_small(0.0) is result
        assert result.without_small(0.01) is result

    @pytest.mark.parametrize("min_area", [-0.1, 1.0, float("nan")])
    def test_an_area_that_is_not_a_share_is_rejected(self, min_area: float) -> None:
        with pytest.raises(UsageError, match=f"min_area is {min_area}"):
            made(ellipse((5, 5))).without_small(min_area)


class TestFound:
    @staticmethod
    def with_certain(certain: int, likely: int = 100, share: float | None = 0.25) -> Segmentation:
        probability = np.full(400, 127, np.uint8)  # p < 0.5
        probability[:likely] = 128
        probability[1:likely:2] = 249  # p < 0.98
        probability[:certain] = 250
        return dataclasses.replace(made(probability.reshape(20, 20)), certain_share=share)

    @pytest.mark.parametrize(("certain", "pet"), [(100, True), (25, True), (24, False), (0, False)])
    def test_a_quarter_of_the_likely_pixels_must_be_certain(self, certain: int, pet: bool) -> None:
        assert self.with_certain(certain).found is pet

    @pytest.mark.parametrize(("share", "pet"), [(0.1, True), (0.11, False), (1.0, False)])
    def test_the_required_share_comes_from_the_model(self, share: float, pet: bool) -> None:
        assert self.with_certain(10, share=share).found is pet

    @pytest.mark.parametrize("certain", [0, 1, 100])
    def test_without_a_rule_any_mask_pixel_is_a_pet(self, certain: int) -> None:
        result = self.with_certain(certain, share=None)
        assert result.found is True
        assert dataclasses.replace(result, threshold=0.995).found is False

    def test_the_pets_size_does_not_matter(self) -> None:
        assert self.with_certain(certain=1, likely=3).found

    def test_no_pet_is_found_in_an_empty_map(self) -> None:
        assert not made(np.zeros((20, 20), np.uint8)).found

    def test_with_a_rule_unlikely_pixels_alone_are_no_pet(self) -> None:
        result = dataclasses.replace(self.with_certain(0, likely=0), threshold=0.1)
        assert result.mask.all()
        assert not result.found

    def test_an_empty_mask_is_never_a_pet(self) -> None:
        result = self.with_certain(100)
        assert not dataclasses.replace(result, threshold=0.995).found

    def test_a_pet_removed_for_its_size_is_not_found(self) -> None:
        for share in (0.25, None):
            result = dataclasses.replace(made(ellipse((40, 60))), certain_share=share)
            assert result.found
            assert not result.without_small(0.9).found


def test_a_result_cannot_be_modified_through_its_arrays() -> None:
    """A mask that was computed before would not change with it."""
    own = np.full((4, 4), 200, np.uint8)
    result = made(own)
    assert result.mask.all()
    with pytest.raises(ValueError, match="read-only"):
        result.probability[0, 0] = 0
    picture = result.probability_image()
    picture.putpixel((1, 1), 7)
    assert result.probability.min() == 200
    own[2, 2] = 7  # the owner of the array may still write to it


@pytest.mark.parametrize("passed_on", [lambda result: pickle.loads(pickle.dumps(result)), copy.deepcopy])
def test_an_unpickled_result_cannot_be_modified(passed_on: Callable[[Segmentation], Segmentation]) -> None:
    result = every_probability()
    assert result.mask.any()
    passed = passed_on(result)
    assert not passed.probability.flags.writeable
    assert not passed.mask.flags.writeable
    np.testing.assert_array_equal(passed.mask, result.mask)
    assert passed.cutout().tobytes() == result.cutout().tobytes()


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda result: result.overlay(strength=1.01), "strength is 1.01"),
        (lambda result: result.overlay(strength=-0.01), "strength is -0.01"),
        (lambda result: result.overlay(strength=float("nan")), "strength is nan"),
        (lambda result: result.overlay(color=(0, 256, 0)), r"colour is \(0, 256, 0\); it must be red, green and blue"),
        *[
            (lambda result, color=color: result.overlay(color=color), "colour")
            for color in ((256, 0, 0), (0, 0, 256), (-1, 0, 0), (0, -1, 0), (0, 0, -1), (0.5, 0, 0))
        ],
        (lambda result: result.on_background((1, 2)), "colour"),
        (lambda result: result.polygons(-1), "tolerance is -1"),
        (lambda result: result.polygons(float("nan")), "tolerance is nan"),
    ],
)
def test_a_value_out_of_range_is_a_usage_error(call: Callable[[Segmentation], Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        call(every_probability())


def test_a_list_is_accepted_as_a_colour() -> None:
    result = every_probability()
    assert result.overlay(color=[1, 2, 3]).tobytes() == result.overlay(color=(1, 2, 3)).tobytes()  # type: ignore[arg-type]
