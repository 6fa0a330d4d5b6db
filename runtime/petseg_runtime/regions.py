"""Regions of a map: what hangs together by the sides of its pixels; and which of them no pixel vouches for."""

from __future__ import annotations

from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt

__all__ = ["CERTAIN", "DOUBTFUL", "EDGE", "leave_out", "regions", "runs", "without_doubtful"]

U8: TypeAlias = npt.NDArray[np.uint8]
Bool: TypeAlias = npt.NDArray[np.bool_]
Indices: TypeAlias = npt.NDArray[np.int64]

#: From these probabilities on, of 255, a pixel is all but certain, or belongs to a region that has to be vouched for.
CERTAIN: Final = 250
DOUBTFUL: Final = 64

#: What lies within this share of a map's shorter side of a region that stays is its soft edge; beyond that it fades.
EDGE: Final = 1 / 32


def without_doubtful(probability: U8) -> U8:
    """A map without what is doubtful: its probability becomes 0.

    A region hangs together of pixels of 0.25 or more. It stays if one of them is all but certain (0.98), and so does
    its soft edge: what is fainter, and at most 1/32 of the map's shorter side away; from there to 1/16 it fades. The
    rest is doubtful: a cushion beside the cat, the pattern of a carpet. That is a threshold with hysteresis (Canny
    1986, doi:10.1109/TPAMI.1986.4767851). Where nothing is all but certain, all stays.

    Args:
        probability: uint8 [H, W], ``round(255 * p(pet))``.

    Returns:
        uint8 [H, W]: a copy, or the same array where nothing is all but certain.
    """
    certain, _ = runs(probability >= CERTAIN)
    if not len(certain):
        return probability
    starts, ends = runs(probability >= DOUBTFUL)
    region = regions(starts, ends, probability.shape[1] + 1)
    stays = np.zeros(len(starts), np.bool_)
    stays[region[np.searchsorted(starts, certain, side="right") - 1]] = True  # a region is named by its first run
    doubtful = ~stays[region]
    kept = leave_out(probability, starts[doubtful], ends[doubtful])
    return _faded(kept, max(1, round(EDGE * min(probability.shape) / 2)))


def leave_out(probability: U8, starts: Indices, ends: Indices) -> U8:
    """A copy of a map, uint8 [H, W], in which these of its runs are 0; see :func:`runs`."""
    kept = probability.copy()
    row = starts // (kept.shape[1] + 1)
    kept.reshape(-1)[_ranges(starts - row, ends - starts)] = 0
    return kept


def runs(mask: Bool) -> tuple[Indices, Indices]:
    """Where the runs of a mask's rows start and end, counted along rows that are one pixel of background longer."""
    height, width = mask.shape
    line = np.zeros(1 + height * (width + 1), np.bool_)
    line[1:].reshape(height, width + 1)[:, :-1] = mask
    changes = np.flatnonzero(line[1:] != line[:-1])
    return changes[::2], changes[1::2]


def regions(starts: Indices, ends: Indices, stride: int) -> Indices:
    """int64 [runs]: the region of each run, named by its first run. Runs that touch by a side of a pixel share one.

    Each round hooks the region of every pair of touching runs to the lowest that it touches; in two rounds each region
    that is not complete becomes part of another, so the number of rounds is at most logarithmic, whatever the mask.

    Args:
        starts: As of :func:`runs`.
        ends: As of :func:`runs`.
        stride: From a row to the next.
    """
    low = np.searchsorted(ends, starts + stride, side="right")
    touching = np.searchsorted(starts, ends + stride, side="left") - low  # so many runs in the next row, from low on
    above = np.repeat(np.arange(len(starts)), touching)
    below = _ranges(low, touching)
    region = np.arange(len(starts))
    while len(above):
        a, b = region[above], region[below]
        np.minimum.at(region, np.maximum(a, b), np.minimum(a, b))
        while not np.array_equal(region, parents := region[region]):
            region = parents
        apart = region[above] != region[below]
        above, below = above[apart], below[apart]
    return region


def _ranges(starts: Indices, lengths: Indices) -> Indices:
    """``starts[0], starts[0] + 1, ...``: the ranges one after another."""
    return np.repeat(starts - np.cumsum(lengths) + lengths, lengths) + np.arange(lengths.sum())


def _faded(probability: U8, reach: int) -> U8:
    """A map that fades with the distance from its regions: whole within ``reach`` cells, 0 from twice that on.

    A cell is 2 x 2 pixels: that is a quarter of the work, and what fades is faint, and never so fine.
    """
    height, width = probability.shape
    missing = _distant(_cells(probability >= DOUBTFUL), reach)
    twice = (missing * np.uint16(0x0101)).view(np.uint8)  # each column, side by side
    quarters = twice.repeat(2, axis=0)[:height, :width]
    # A product of bytes that stays within bytes: a larger array would cost more than all of the above.
    return probability - ((probability >> 2) * quarters + (((probability & 3) * quarters + 2) >> 2))


def _cells(mask: Bool) -> Bool:
    """Which squares of 2 x 2 pixels have a pixel of a mask, also at edges that cut them in two."""
    rows, columns = -(-mask.shape[0] // 2), -(-mask.shape[1] // 2)
    if mask.shape != (2 * rows, 2 * columns):
        mask = np.pad(mask, ((0, mask.shape[0] % 2), (0, mask.shape[1] % 2)))
    pairs = mask.view(np.uint16)
    found: Bool = (pairs[::2] | pairs[1::2]) != 0
    return found


def _distant(mask: Bool, reach: int) -> U8:
    """How far from a mask its pixels are: 0 within ``reach``, 1, 2 and 3 within the next quarters of it, 4 beyond."""
    rows, columns = mask.shape
    # One line of all rows, so that a shift of it is a shift of them all, in one go. The background between two of them
    # is too wide for anything to get from one into the next.
    stride = columns + 2 * reach + 1
    line = np.zeros((rows, stride), np.bool_)
    line[:, :columns] = mask
    near = line.reshape(-1)
    for step in (1, stride):
        for by in _doublings(reach):
            near = _spread(near, by * step)
    distance = 4 - near.astype(np.uint8)
    for quarter in (1, 2, 3):
        for _ in range(round(quarter * reach / 4) - round((quarter - 1) * reach / 4)):
            near = _spread(near, 1) | _spread(near, stride)
        distance -= near
    return distance.reshape(rows, stride)[:, :columns]


def _doublings(reach: int) -> list[int]:
    """Steps, each at most one more than all before it together, that lead exactly so far: no pixel is stepped over."""
    steps: list[int] = []
    while (left := reach - sum(steps)) > 0:
        steps.append(min(sum(steps) + 1, left))
    return steps


def _spread(line: Bool, by: int) -> Bool:
    """A line of pixels with all that is exactly so far before or behind one of them."""
    wider = line.copy()
    wider[by:] |= line[:-by]
    wider[:-by] |= line[by:]
    return wider
