"""Black-and-white masks, as `read_trimap` reads them from a folder: what is pet in them, and which are not masks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter

from petseg.data import Layout, Pair, read_trimap
from petseg.metrics import BACKGROUND, PET
from petseg_runtime.errors import DataError


def pair_of(mask: Path) -> Pair:
    return Pair("mask", mask, mask, Layout.FOLDER)


def saved(folder: Path, mask: np.ndarray) -> Pair:
    Image.fromarray(mask).save(folder / "mask.png")
    return pair_of(folder / "mask.png")


@pytest.mark.parametrize(
    ("values", "pet"),
    [
        ([0, 255], [False, True]),
        ([0, 1], [False, True]),
        ([100, 128], [False, True]),
        ([0, 0], [False, False]),
        ([255, 255], [True, True]),
    ],
)
def test_a_black_and_white_mask_is_pet_and_background(tmp_path: Path, values: list[int], pet: list[bool]) -> None:
    read = read_trimap(saved(tmp_path, np.array([values], np.uint8)))
    assert np.array_equal(read, np.where([pet], PET, BACKGROUND))


@pytest.mark.parametrize("values", [[0, 2], [0, 127], [38, 75]])
def test_a_mask_of_numbered_classes_is_rejected(tmp_path: Path, values: list[int]) -> None:
    pair = saved(tmp_path, np.array([values], np.uint8))
    with pytest.raises(DataError, match=rf"mask\.png: nothing in this mask is white.* {max(values)}; black for"):
        read_trimap(pair)


def filled(*areas: tuple[int, int, int]) -> np.ndarray:
    """A mask of 96 x 96, black except for squares around one column, each with a half side and a value."""
    mask = np.zeros((96, 96), np.uint8)
    for column, half, value in areas:
        mask[48 - half : 48 + half, max(column - half, 0) : column + half] = value
    return mask


@pytest.mark.parametrize(
    ("mask", "named"),
    [
        (filled((48, 21, 255), (48, 20, 1)), "1"),  # within an outline
        (filled((48, 17, 255), (48, 12, 8)), "8"),  # an index mask with a void
        (filled((24, 16, 85), (72, 16, 170)), "85, 170"),
        (filled((48, 30, 128), (48, 20, 255)), "128"),  # a trimap for matting
        (filled((48, 48, 170), (48, 30, 85), (48, 20, 255)), "85, 170"),
        (filled(*((column, 48, 100 + column) for column in range(92, 0, -8)), (40, 8, 30)), "30, 104, .*, ..."),
    ],
)
def test_a_mask_whose_areas_are_of_classes_is_rejected(tmp_path: Path, mask: np.ndarray, named: str) -> None:
    pair = saved(tmp_path, mask)
    with pytest.raises(
        DataError, match=rf"mask\.png: much of this mask .* values {named}, like numbered.*make the pet"
    ):
        read_trimap(pair)


def test_classes_in_a_jpeg_are_rejected(tmp_path: Path) -> None:
    pair = pair_of(tmp_path / "mask.jpg")
    Image.fromarray(filled((24, 16, 100), (72, 16, 200))).save(pair.mask, quality=75)
    with pytest.raises(DataError, match="values 100, 200, like numbered classes"):
        read_trimap(pair)


@pytest.mark.parametrize("radius", [3, 9, 30])
@pytest.mark.parametrize(
    "file", ["4x4.png", "2x2.png", "bilinear.png", "soft.png", "10.jpg", "50.jpg", "10.webp", "75.webp"]
)
def test_soft_edges_and_compression_artefacts_are_no_classes(tmp_path: Path, radius: int, file: str) -> None:
    y, x = np.mgrid[:384, :384] / 4
    fine = Image.fromarray(((np.hypot(y - 48, x - 48) < radius) * 255).astype(np.uint8))
    hard = fine.resize((96, 96), Image.Resampling.NEAREST)
    name, _, suffix = file.partition(".")
    made = {
        "4x4": fine.resize((96, 96), Image.Resampling.BOX),
        "2x2": fine.resize((192, 192), Image.Resampling.NEAREST).resize((96, 96), Image.Resampling.BOX),
        "bilinear": hard.resize((48, 48), Image.Resampling.NEAREST).resize((96, 96), Image.Resampling.BILINEAR),
        "soft": hard.filter(ImageFilter.GaussianBlur(radius / 3)),
    }
    path = tmp_path / f"mask.{suffix}"
    made.get(name, hard).save(path, **({"quality": int(name)} if name.isdigit() else {}))
    read = read_trimap(pair_of(path)) == PET
    assert read.sum() == pytest.approx(np.pi * radius**2, rel=0.35)


SOFT = np.linspace(0, 1, 64)[None].repeat(48, axis=0)
HARD = (SOFT > 0.5).astype(np.float64)


@pytest.mark.parametrize(
    ("form", "white"),
    [(form, white) for form in ("u2.png", "u2.tif", "i4.tif") for white in (65535, 255, 1)]
    + [("f4.tif", white) for white in (1, 255)],
)
@pytest.mark.parametrize("soft", [True, False])
def test_a_mask_of_16_bits_or_of_fractions_is_scaled(tmp_path: Path, form: str, white: int, soft: bool) -> None:
    dtype, _, suffix = form.partition(".")
    path = tmp_path / f"mask.{suffix}"
    values = (white * (SOFT if soft else HARD)).round(3 if dtype == "f4" else 0)
    Image.fromarray(values.astype(dtype)).save(path)
    pet = read_trimap(pair_of(path)) == PET
    assert np.array_equal(pet, HARD > 0)
    Image.fromarray((0 * HARD).astype(dtype)).save(path)
    assert (read_trimap(pair_of(path)) == BACKGROUND).all()


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (np.array([[0, 9, 4095]], np.uint16), "larger integers from 0 to 4095, where 0 to 65535 or"),
        (np.array([[0, 9, 70000]], np.int32), "larger integers from 0 to 70000"),
        (np.array([[-1, 255]], np.int32), "larger integers from -1 to 255"),
        (np.array([[-0.5, 1]], np.float32), "fractions from -0.5 to 1, where 0 to 1 or 0 to 255"),
        (np.array([[0, 65535]], np.float32), "fractions from 0 to 65535"),
        (np.array([[0, np.nan]], np.float32), "fractions from nan to nan"),
    ],
)
def test_a_mask_of_another_range_is_rejected(tmp_path: Path, values: np.ndarray, said: str) -> None:
    path = tmp_path / "mask.tif"
    Image.fromarray(values).save(path)
    with pytest.raises(DataError, match=rf"mask\.tif: a mask of {said}.*; save it with 8 bits"):
        read_trimap(pair_of(path))


@pytest.mark.parametrize("white", [256, 1000, 4095, 32767])
def test_two_larger_integers_are_black_and_white(tmp_path: Path, white: int) -> None:
    path = tmp_path / "mask.png"
    Image.fromarray((white * HARD).astype(np.uint16)).save(path)
    assert np.array_equal(read_trimap(pair_of(path)) == PET, HARD > 0)


def blob(size: int, share: float, shift: int = 0) -> Image.Image:
    """A black-and-white mask around the middle, with an outline that is neither straight nor round."""
    y, x = np.mgrid[:size, :size] - size / 2
    angle = np.arctan2(y, x - shift)
    radius = share * size * (1 + 0.15 * np.sin(3 * angle) + 0.08 * np.sin(7 * angle + share))
    return Image.fromarray(((np.hypot(y, x - shift) < radius) * 255).astype(np.uint8))


def posterised(levels: int) -> np.ndarray:
    soft = np.asarray(blob(384, 0.3).filter(ImageFilter.GaussianBlur(12)), float)
    return np.rint(np.rint(soft / 255 * (levels - 1)) * 255 / (levels - 1)).astype(np.uint8)


def enlarged(factor: int, size: int) -> np.ndarray:
    small = blob(384, 0.3).resize((384 // factor,) * 2, Image.Resampling.BOX)
    return np.asarray(small.resize((size,) * 2, Image.Resampling.NEAREST))


def between(black: int, white: int) -> np.ndarray:
    edges = np.asarray(blob(384, 0.3).resize((96, 96), Image.Resampling.BOX), float)
    return np.rint(black + edges * (white - black) / 255).astype(np.uint8)


@pytest.mark.parametrize(
    "mask",
    [enlarged(4, 384), enlarged(8, 384), enlarged(8, 333), enlarged(16, 640)]
    + [posterised(levels) for levels in (4, 8, 16)]
    + [between(*ends) for ends in ((9, 255), (10, 255), (16, 235))],
    ids=["4x", "8x", "7x", "27x", "4 levels", "8 levels", "16 levels", "from 9", "from 10", "of video"],
)
def test_soft_masks_of_few_levels_and_blacks_that_are_not_0_are_no_classes(tmp_path: Path, mask: np.ndarray) -> None:
    got = read_trimap(saved(tmp_path, mask)) == PET
    want = np.asarray(blob(384, 0.3).resize(mask.shape[::-1], Image.Resampling.NEAREST)) > 0
    assert (got != want).mean() < 0.05


@pytest.mark.parametrize("factor", [8, 16])
def test_a_small_pet_of_few_levels_that_was_enlarged_is_no_class(tmp_path: Path, factor: int) -> None:
    small = blob(128, 0.06).resize((64, 64), Image.Resampling.BOX)
    mask = small.resize((64 * factor,) * 2, Image.Resampling.NEAREST)
    got = read_trimap(saved(tmp_path, np.asarray(mask))) == PET
    assert np.array_equal(got, np.asarray(mask) > 127)


@pytest.mark.parametrize("quality", [50, 75, 90])
def test_one_light_grey_after_lossy_compression_is_the_pet(tmp_path: Path, quality: int) -> None:
    path = tmp_path / "mask.webp"
    blob(96, 0.3).point(lambda value: 200 if value else 0).save(path, quality=quality)
    got = read_trimap(pair_of(path)) == PET
    assert (got != (np.asarray(blob(96, 0.3)) > 0)).mean() < 0.05


@pytest.mark.parametrize("enlarge", [1, 3])
@pytest.mark.parametrize(
    "areas",
    [
        [(0.12, 85, -30), (0.12, 170, 30)],
        [(0.3, 128, 0), (0.2, 255, 0)],
        [(0.12, 85, -30), (0.12, 170, 0), (0.12, 255, 30)],
        [(0.42, 170, 0), (0.3, 85, 0), (0.2, 255, 0)],
        [(0.2, 255, -26), (0.16, 12, -26), (0.2, 255, 26), (0.16, 8, 26)],  # with a void around each
        [(0.9, 96, 0), (0.3, 157, -30), (0.25, 18, 30), (0.1, 255, 5)],  # with stuff and things
    ],
)
def test_classes_with_outlines_of_their_own_are_rejected(
    tmp_path: Path, areas: list[tuple[float, int, int]], enlarge: int
) -> None:
    mask = np.zeros((96, 96), np.uint8)
    for share, value, shift in areas:
        mask[np.asarray(blob(96, share, shift)) > 0] = value
    mask = mask.repeat(enlarge, axis=0).repeat(enlarge, axis=1)
    with pytest.raises(DataError, match=r"like numbered classes.*a soft mask that was enlarged without smoothing"):
        read_trimap(saved(tmp_path, mask))


def test_one_light_colour_on_black_is_the_pet(tmp_path: Path) -> None:
    mask = np.zeros((48, 48, 3), np.uint8)
    mask[10:30, 10:30] = (0, 255, 0)
    assert (read_trimap(saved(tmp_path, mask)) == PET).sum() == 400


def test_a_mask_in_the_alpha_channel_is_rejected_and_an_opaque_one_is_accepted(tmp_path: Path) -> None:
    mask = np.zeros((2, 2, 4), np.uint8)
    mask[0] = 255
    pair = saved(tmp_path, mask)
    with pytest.raises(DataError, match=r"mask\.png: this mask is partly transparent; black for"):
        read_trimap(pair)
    Image.fromarray(mask).quantize(4).save(pair.mask)  # in a palette, as in small PNGs
    with pytest.raises(DataError, match=r"mask\.png: this mask is partly transparent"):
        read_trimap(pair)
    mask[..., 3] = 255
    assert np.array_equal(read_trimap(saved(tmp_path, mask)), [[1, 1], [2, 2]])


def test_a_two_valued_or_coloured_mask_is_accepted(tmp_path: Path) -> None:
    mask = np.array([[0, 255], [255, 0]], np.uint8)
    pair = saved(tmp_path, np.repeat(mask[..., None], 3, axis=2))
    assert np.array_equal(read_trimap(pair), [[2, 1], [1, 2]])
    Image.fromarray(mask).convert("1").save(pair.mask)
    assert np.array_equal(read_trimap(pair), [[2, 1], [1, 2]])
