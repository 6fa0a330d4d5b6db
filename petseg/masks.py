"""Black-and-white masks: which pixels are pet, and which images are not such masks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image

from petseg.metrics import BACKGROUND, PET
from petseg_runtime.errors import DataError

__all__ = ["LOSSY", "black_and_white"]

U8: TypeAlias = npt.NDArray[np.uint8]

#: White in a 16-bit mask.
FULL_16: Final = 65535

#: Pixels up to ``BLACK`` above a mask's black count as black, those from ``WHITE`` on as white: JPEG changes 0 and 255.
#: In a mask of a lossless format with at most ``FEW_GREYS`` greys, black is a single value.
BLACK: Final = 8
WHITE: Final = 247
LOSSY: Final = ("JPEG", "MPO", "WEBP", "AVIF", "HEIF")
FEW_GREYS: Final = 24
#: The darkest value that fills an area is black if it is at most ``DARKEST``, the brightest is white if it is at least
#: ``LIGHTEST`` (video has 16 and 235).
DARKEST: Final = 24
LIGHTEST: Final = 235
#: A grey, with those within ``NEAR`` of it, is a level if it makes up this share of the non-black area. In a mask of
#: numbered classes, levels make up more than ``MOST_GREY`` of that area.
NEAR: Final = 3
LEVEL: Final = 0.02
MOST_GREY: Final = 0.2
#: A mask is analysed without its repeated rows and columns if at least this many remain: in hand-drawn outlines hardly
#: any repeat.
FEWEST_ROWS: Final = 8
#: Levels, if at least ``FEWEST_STEPS``, are steps of a ramp from black to white if no gap exceeds ``UNEVEN`` times the
#: mean gap, at least ``MOST_STEPS`` of all boundaries are between adjacent levels, and at least ``LEAST_SIDE`` of each
#: level's boundary is with darker levels, and as much with lighter ones.
FEWEST_STEPS: Final = 2
UNEVEN: Final = 2
MOST_STEPS: Final = 0.8
LEAST_SIDE: Final = 0.2
#: Levels that an error message names at most.
MOST_NAMED: Final = 8


def black_and_white(image: Image.Image, path: Path, lossy: bool) -> U8:
    """Convert a black-and-white mask to a trimap: 0 and 255, 0 and 1, fractions or 16 bits; hard or soft edges.

    Args:
        image: The mask, upright.
        path: Its file, for error messages.
        lossy: Whether its format (one of :data:`LOSSY`) changes values.

    Returns:
        uint8 [H, W]: ``PET`` where the mask is nearer to white than to black, ``BACKGROUND`` elsewhere.

    Raises:
        DataError: The mask has numbered classes, is too dark, has a range that no mask has, or is partly transparent.
    """
    expected = "black for background and white for the pet are expected, or 0 and 1"
    if image.has_transparency_data and image.convert("RGBA").getchannel("A").getextrema()[0] != 255:
        raise DataError(f"{path}: this mask is partly transparent; {expected}, without transparency")
    mask = (
        _eight_bits(image, path) if image.mode in ("I", "F") or image.mode[:2] == "I;" else np.array(image.convert("L"))
    )
    if 1 < (most := int(mask.max(initial=0))) <= 127:
        raise DataError(f"{path}: nothing in this mask is white, and its brightest value is {most}; {expected}")
    if most > 1 and (levels := _class_levels(mask, lossy)):
        named = ", ".join(map(str, levels[:MOST_NAMED])) + (", ..." if len(levels) > MOST_NAMED else "")
        raise DataError(
            f"{path}: much of this mask is neither black nor white, but has the values {named}, like numbered classes; "
            f"{expected}: make the pet's class white and all others black; or, if it is a soft mask that was enlarged "
            "without smoothing, save it as black and white, or smooth it"
        )
    return np.where(mask > (0 if most <= 1 else 127), np.uint8(PET), np.uint8(BACKGROUND))


def _eight_bits(image: Image.Image, path: Path) -> U8:
    """Scale a mask of integers above 255 or of fractions to 0..255; Pillow's conversion would clip them.

    Raises:
        DataError: It has a range that no mask has.
    """
    values = np.asarray(image)
    least, most = (values.min().item(), values.max().item()) if values.size else (0, 0)
    if image.mode == "F" and 0 <= least <= most <= 1:
        return np.asarray(np.rint(255 * values), np.uint8)
    if 0 <= least <= most <= 255:
        return np.asarray(np.rint(values), np.uint8)
    kind, full = ("fractions", 1) if image.mode == "F" else ("larger integers", FULL_16)
    if full == FULL_16 and least >= 0 and full // 2 < most <= full:
        return np.asarray(values >> 8, np.uint8)
    if full == FULL_16 and least == 0 and ((values == 0) | (values == most)).all():  # for example, white is 4095
        return np.where(values > 0, np.uint8(255), np.uint8(0))
    found = f"a mask of {kind} from {least:g} to {most:g}"
    raise DataError(
        f"{path}: {found}, where 0 to {full} or 0 to 255 are expected; save it with 8 bits, white where the pet is"
    )


def _class_levels(mask: U8, lossy: bool) -> list[int]:
    """Returns the greys that fill much of a mask's area, as numbered classes do; none for a black-and-white mask.

    Soft edges and JPEG artefacts are grey, too, but have many values and fill no area. A mask in which they seem to do
    so was enlarged without smoothing, or is soft with few levels.
    """
    levels = _filled_levels(mask, lossy)
    if levels and min((small := _without_repeats(mask)).shape) >= FEWEST_ROWS:
        mask, levels = small, _filled_levels(small, lossy)
    return [] if _is_ramp(mask, levels) else levels


def _without_repeats(mask: U8) -> U8:
    """Drop rows and columns that repeat the one before; this undoes enlarging by nearest neighbour."""
    rows = mask[np.r_[True, (mask[1:] != mask[:-1]).any(axis=1)]]
    return rows[:, np.r_[True, (rows[:, 1:] != rows[:, :-1]).any(axis=0)]]


def _is_ramp(mask: U8, levels: Sequence[int]) -> bool:
    """Whether levels are steps of a ramp: each lies between its neighbours, which the areas of classes do not."""
    if len(levels) < FEWEST_STEPS:
        return False
    counts = np.array(Image.fromarray(mask).histogram())
    counts[: levels[0]] = counts[levels[-1] + 1 :] = 0
    steps = np.flatnonzero(counts >= LEVEL * counts.sum())  # includes steps too thin to fill an area
    edges = np.array([0, *steps, 255])
    if np.diff(edges).max() > UNEVEN * 255 / (len(steps) + 1):
        return False
    step = np.digitize(np.arange(256), (edges[1:] + edges[:-1]) / 2).astype(np.int16)[mask]
    one = np.r_[step[1:].ravel(), step[:, 1:].ravel()]
    other = np.r_[step[:-1].ravel(), step[:, :-1].ravel()]
    one, other = one[one != other], other[one != other]
    below, above = (np.bincount(side(one, other), minlength=len(edges))[1:-1] for side in (np.maximum, np.minimum))
    between = np.minimum(below, above) >= LEAST_SIDE * (below + above)
    return bool(between.all() and (np.abs(one - other) == 1).mean() >= MOST_STEPS)


def _filled_levels(mask: U8, lossy: bool) -> list[int]:
    """As :func:`_class_levels`, without regard to enlarging and ramps.

    A single light grey on black, without white, is a pet painted in another colour.
    """
    everywhere = np.array(Image.fromarray(mask).histogram())
    noisy = lossy or np.count_nonzero(everywhere[1:WHITE]) > FEW_GREYS
    spread = BLACK if noisy else 0
    if everywhere[spread + 1 : WHITE].sum() <= LEVEL * everywhere[spread + 1 :].sum():  # true for nearly all masks
        return []
    # Pixels that equal their four neighbours; edges of any kind are too thin to have such pixels.
    across, down = mask[:, 1:] == mask[:, :-1], mask[1:] == mask[:-1]
    inside = across[1:-1, 1:] & across[1:-1, :-1] & down[1:, 1:-1] & down[:-1, 1:-1]
    if not inside.any():
        return []
    filled = np.array(Image.fromarray(mask[1:-1, 1:-1]).histogram(Image.fromarray(inside)))
    least, most = map(int, np.flatnonzero(filled)[[0, -1]])
    dark = (least if least <= DARKEST else 0) + spread + 1  # the darkest value that is not black
    white = min(WHITE, most - BLACK) if most >= LIGHTEST else WHITE
    own = _peaks(filled[:white], everywhere[:white], dark, max(1, LEVEL * filled[dark:].sum()))
    much = sum(area for area, _ in own.values()) > MOST_GREY * filled[dark:].sum()
    few = 2 * sum(pixels for _, pixels in own.values()) > everywhere[dark:white].sum()
    coloured = len(own) == 1 and min(own) > 127 and most < white
    return sorted(own) if much and few and not coloured else []


def _peaks(
    filled: npt.NDArray[Any], everywhere: npt.NDArray[Any], dark: int, least: float
) -> dict[int, tuple[int, int]]:
    """Returns the greys from ``dark`` on that fill ``least`` pixels or more, nearby ones merged; with both counts."""
    rest, found = filled.copy(), {}
    rest[:dark] = 0
    while rest.any():
        level = int(rest.argmax())
        near = slice(max(dark, level - NEAR), level + NEAR + 1)
        if (area := int(rest[near].sum())) >= least:
            found[level] = area, int(everywhere[near].sum())
        rest[near] = 0
    return found
