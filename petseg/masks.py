"""Masks of one's own: what is pet in a picture of black, white and grey, and which pictures are no masks at all."""

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

#: White in a mask of 16 bits.
FULL_16: Final = 65535

#: Up to so much above a mask's black a pixel is as good as black, and from the other value on white: what JPEG makes of
#: 0 and 255. In a mask that is none of these, and has no more than so many greys, black is one value.
BLACK: Final = 8
WHITE: Final = 247
LOSSY: Final = ("JPEG", "MPO", "WEBP", "AVIF", "HEIF")
FEW_GREYS: Final = 24
#: The least value that fills an area is black up to here, and the largest white from there on (video has 16 and 235).
DARKEST: Final = 24
LIGHTEST: Final = 235
#: A grey is a level of its own, with those so near to it, from this share on of what is one colour in a mask; one of
#: numbered classes has levels for more than ``MOST_GREY`` of it.
NEAR: Final = 3
LEVEL: Final = 0.02
MOST_GREY: Final = 0.2
#: A mask that is larger without the rows and columns that repeat others is looked at without them: drawn by hand, areas
#: have outlines in which hardly any repeat.
FEWEST_ROWS: Final = 8
#: So many levels are steps from black to white, if no gap is larger than so many times the mean, so much of all
#: outlines is between one and the next, and of each one's own so much is on its darker side, and on its lighter side.
FEWEST_STEPS: Final = 2
UNEVEN: Final = 2
MOST_STEPS: Final = 0.8
LEAST_SIDE: Final = 0.2
#: So many of them are named.
MOST_NAMED: Final = 8


def black_and_white(image: Image.Image, path: Path, lossy: bool) -> U8:
    """A mask of one's own as a trimap: of 0 and 255, of 0 and 1, of fractions or 16 bits, with hard or soft edges.

    Args:
        image: The mask, upright.
        path: Its file, for errors.
        lossy: Its format (one of :data:`LOSSY`) changes values.

    Returns:
        uint8 [H, W]: ``PET`` where it is nearer to white than to black, ``BACKGROUND`` elsewhere.

    Raises:
        DataError: It is of numbered classes, too dark, of a range that masks do not have, or partly transparent.
    """
    expected = "black for background and white for the pet are expected, or 0 and 1"
    if image.has_transparency_data and image.convert("RGBA").getchannel("A").getextrema()[0] != 255:
        raise DataError(f"{path}: a mask that is partly transparent; {expected}, without transparency")
    mask = (
        _eight_bits(image, path) if image.mode in ("I", "F") or image.mode[:2] == "I;" else np.array(image.convert("L"))
    )
    if 1 < (most := int(mask.max(initial=0))) <= 127:
        raise DataError(f"{path}: nothing in this mask is white, and its brightest value is {most}; {expected}")
    if most > 1 and (levels := _class_levels(mask, lossy)):
        named = ", ".join(map(str, levels[:MOST_NAMED])) + (", ..." if len(levels) > MOST_NAMED else "")
        raise DataError(
            f"{path}: much of this mask is neither black nor white, but of the values {named}, as of numbered classes; "
            f"{expected}: make the pet's class white and all others black; or, if it is a soft mask that was enlarged "
            "without smoothing, save it as black and white, or smooth it"
        )
    return np.where(mask > (0 if most <= 1 else 127), np.uint8(PET), np.uint8(BACKGROUND))


def _eight_bits(image: Image.Image, path: Path) -> U8:
    """A mask of larger numbers or of fractions, scaled to 0..255: Pillow would cut off what is above.

    Raises:
        DataError: Its range is none that masks have.
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
    if full == FULL_16 and least == 0 and ((values == 0) | (values == most)).all():  # as where white is 4095
        return np.where(values > 0, np.uint8(255), np.uint8(0))
    found = f"a mask of {kind} from {least:g} to {most:g}"
    raise DataError(
        f"{path}: {found}, where 0 to {full} or 0 to 255 are expected: save it with 8 bits, white where the pet is"
    )


def _class_levels(mask: U8, lossy: bool) -> list[int]:
    """The greys that areas of a mask are filled with, if they are much of it; none in one of black and white.

    Soft edges and what JPEG leaves are grey, too, but of many values, and fill no area. Where they seem to, the mask
    was enlarged without smoothing, or is a soft one of few levels.
    """
    levels = _filled_levels(mask, lossy)
    if levels and min((small := _once(mask)).shape) >= FEWEST_ROWS:
        mask, levels = small, _filled_levels(small, lossy)
    return [] if _is_ramp(mask, levels) else levels


def _once(mask: U8) -> U8:
    """A mask without the rows and columns that repeat the one before: as it was before it was enlarged by NEAREST."""
    rows = mask[np.r_[True, (mask[1:] != mask[:-1]).any(axis=1)]]
    return rows[:, np.r_[True, (rows[:, 1:] != rows[:, :-1]).any(axis=0)]]


def _is_ramp(mask: U8, levels: Sequence[int]) -> bool:
    """Whether levels are steps from black to white: each lies between its neighbours, as areas of classes do not."""
    if len(levels) < FEWEST_STEPS:
        return False
    counts = np.array(Image.fromarray(mask).histogram())
    counts[: levels[0]] = counts[levels[-1] + 1 :] = 0
    steps = np.flatnonzero(counts >= LEVEL * counts.sum())  # some may be too thin to fill an area
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
    """As :func:`_class_levels`, whatever the areas lie beside.

    One light grey on black, with no white beside it, is a pet of another colour.
    """
    everywhere = np.array(Image.fromarray(mask).histogram())
    noisy = lossy or np.count_nonzero(everywhere[1:WHITE]) > FEW_GREYS
    spread = BLACK if noisy else 0
    if everywhere[spread + 1 : WHITE].sum() <= LEVEL * everywhere[spread + 1 :].sum():  # nearly all masks
        return []
    # Pixels that are like their four neighbours: an edge, however drawn, is too thin to have any.
    across, down = mask[:, 1:] == mask[:, :-1], mask[1:] == mask[:-1]
    inside = across[1:-1, 1:] & across[1:-1, :-1] & down[1:, 1:-1] & down[:-1, 1:-1]
    if not inside.any():
        return []
    filled = np.array(Image.fromarray(mask[1:-1, 1:-1]).histogram(Image.fromarray(inside)))
    least, most = map(int, np.flatnonzero(filled)[[0, -1]])
    dark = (least if least <= DARKEST else 0) + spread + 1  # the first that is not black
    white = min(WHITE, most - BLACK) if most >= LIGHTEST else WHITE
    own = _peaks(filled[:white], everywhere[:white], dark, max(1, LEVEL * filled[dark:].sum()))
    much = sum(area for area, _ in own.values()) > MOST_GREY * filled[dark:].sum()
    few = 2 * sum(pixels for _, pixels in own.values()) > everywhere[dark:white].sum()
    coloured = len(own) == 1 and min(own) > 127 and most < white
    return sorted(own) if much and few and not coloured else []


def _peaks(
    filled: npt.NDArray[Any], everywhere: npt.NDArray[Any], dark: int, least: float
) -> dict[int, tuple[int, int]]:
    """The greys from ``dark`` on that fill so many pixels at least, those nearby taken together; with both counts."""
    rest, found = filled.copy(), {}
    rest[:dark] = 0
    while rest.any():
        level = int(rest.argmax())
        near = slice(max(dark, level - NEAR), level + NEAR + 1)
        if (area := int(rest[near].sum())) >= least:
            found[level] = area, int(everywhere[near].sum())
        rest[near] = 0
    return found
