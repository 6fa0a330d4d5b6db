"""Connected components of a probability map, and a hysteresis threshold that removes low-confidence ones."""

from __future__ import annotations

from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt

__all__ = ["CERTAIN", "DOUBTFUL", "EDGE", "connected_components", "runs", "without_doubtful", "without_runs"]

U8: TypeAlias = npt.NDArray[np.uint8]
Bool: TypeAlias = npt.NDArray[np.bool_]
Indices: TypeAlias = npt.NDArray[np.int64]

#: The high and the low threshold of the hysteresis, of 255: from the first on, a pixel is near-certain; from the second
#: on, it belongs to a region, which is kept only if it has a near-certain pixel.
CERTAIN: Final = 250
DOUBTFUL: Final = 64

#: Fainter pixels within this share of a map's shorter side of a kept region are its soft edge; beyond that they fade.
EDGE: Final = 1 / 32


def without_doubtful(probability: U8) -> U8:
    """Remove low-confidence regions from a map: their probability is set to 0.

    A region is a 4-connected component of pixels with p >= 0.25. It is kept if at least one of them is near-certain
    (p >= 0.98): a hysteresis threshold (Canny 1986, doi:10.1109/TPAMI.1986.4767851). Its soft edge is kept with it:
    fainter pixels at most 1/32 of the map's shorter side away; from there to 1/16 they fade to 0. Removed are, for
    example, a cushion beside the cat, or the pattern of a carpet. A map without a near-certain pixel stays unchanged.

    Args:
        probability: uint8 [H, W], ``round(255 * p(pet))``.

    Returns:
        uint8 [H, W]: a copy, or the same array if no pixel is near-certain.
    """
    certain, _ = runs(probability >= CERTAIN)
    if not len(certain):
        return probability
    starts, ends = runs(probability >= DOUBTFUL)
    label = connected_components(starts, ends, probability.shape[1] + 1)
    keep = np.zeros(len(starts), np.bool_)  # indexed by label
    keep[label[np.searchsorted(starts, certain, side="right") - 1]] = True
    doubtful = ~keep[label]
    kept = without_runs(probability, starts[doubtful], ends[doubtful])
    return _fade(kept, max(1, round(EDGE * min(probability.shape) / 2)))


def without_runs(probability: U8, starts: Indices, ends: Indices) -> U8:
    """A copy of a map, uint8 [H, W], in which these runs are set to 0; see :func:`runs`."""
    kept = probability.copy()
    row = starts // (kept.shape[1] + 1)
    kept.reshape(-1)[_ranges(starts - row, ends - starts)] = 0
    return kept


def runs(mask: Bool) -> tuple[Indices, Indices]:
    """Find the runs of True in a mask's rows.

    Args:
        mask: bool [H, W].

    Returns:
        Start and end (exclusive) of each run, int64 [runs], in row order: indices into the flattened mask after a
        column of background is appended, so that no run continues in the next row.
    """
    height, width = mask.shape
    line = np.zeros(1 + height * (width + 1), np.bool_)
    line[1:].reshape(height, width + 1)[:, :-1] = mask
    changes = np.flatnonzero(line[1:] != line[:-1])
    return changes[::2], changes[1::2]


def connected_components(starts: Indices, ends: Indices, stride: int) -> Indices:
    """Label the 4-connected components of a mask, by union of its runs.

    Each round unites the components of every pair of touching runs (hooking to the lower label, then pointer jumping).
    Within two rounds every incomplete component joins another, so the number of rounds is at most logarithmic in the
    number of runs, whatever the mask.

    Args:
        starts: From :func:`runs`.
        ends: From :func:`runs`.
        stride: From one row to the next: the mask's width + 1.

    Returns:
        int64 [runs]: each run's component, labelled by the index of its first run.
    """
    low = np.searchsorted(ends, starts + stride, side="right")  # the first run that it touches in the next row
    touching = np.searchsorted(starts, ends + stride, side="left") - low  # how many it touches there
    above = np.repeat(np.arange(len(starts)), touching)
    below = _ranges(low, touching)
    label = np.arange(len(starts))
    while len(above):
        a, b = label[above], label[below]
        np.minimum.at(label, np.maximum(a, b), np.minimum(a, b))
        while not np.array_equal(label, parents := label[label]):
            label = parents
        apart = label[above] != label[below]
        above, below = above[apart], below[apart]
    return label


def _ranges(starts: Indices, lengths: Indices) -> Indices:
    """The ranges ``starts[i], starts[i] + 1, ...``, ``lengths[i]`` numbers each, concatenated."""
    return np.repeat(starts - np.cumsum(lengths) + lengths, lengths) + np.arange(lengths.sum())


def _fade(probability: U8, reach: int) -> U8:
    """Fade a map with the distance from its regions: unchanged within ``reach`` cells, 0 from ``2 * reach`` on.

    A cell is 2 x 2 pixels: a quarter of the work, and fine enough, since the pixels that fade are faint and blurred.
    """
    height, width = probability.shape
    steps = _distance_steps(_any_in_cells(probability >= DOUBTFUL), reach)
    doubled = (steps * np.uint16(0x0101)).view(np.uint8)  # each column twice
    quarters = doubled.repeat(2, axis=0)[:height, :width]
    # probability - probability * quarters / 4, rounded, in bytes: a wider type would cost more than all of the above.
    return probability - ((probability >> 2) * quarters + (((probability & 3) * quarters + 2) >> 2))


def _any_in_cells(mask: Bool) -> Bool:
    """Max-pool a mask over cells of 2 x 2 pixels; cells at the right and bottom edge may be incomplete."""
    height, width = mask.shape
    if height % 2 or width % 2:
        mask = np.pad(mask, ((0, height % 2), (0, width % 2)))
    pairs = mask.view(np.uint16)
    found: Bool = (pairs[::2] | pairs[1::2]) != 0
    return found


def _distance_steps(mask: Bool, reach: int) -> U8:
    """Quantized distance from a mask: 0 within ``reach``, 1, 2 and 3 within the next three quarters of it, 4 beyond.

    Computed by dilation: with a square of that reach, then with crosses.
    """
    rows, columns = mask.shape
    # All rows flattened into one line, so that one shift moves them all. The background between two rows is too wide
    # for a dilation to get from one into the next.
    stride = columns + 2 * reach + 1
    line = np.zeros((rows, stride), np.bool_)
    line[:, :columns] = mask
    near = line.reshape(-1)
    for step in (1, stride):
        for shift in _shifts(reach):
            near = _dilate(near, shift * step)
    distance = 4 - near.astype(np.uint8)
    for quarter in (1, 2, 3):
        for _ in range(round(quarter * reach / 4) - round((quarter - 1) * reach / 4)):
            near = _dilate(near, 1) | _dilate(near, stride)
        distance -= near
    return distance.reshape(rows, stride)[:, :columns]


def _shifts(reach: int) -> list[int]:
    """Shifts whose dilations combine to one by ``reach``: each at most 1 + the sum of those before it, without gaps."""
    shifts: list[int] = []
    while (left := reach - sum(shifts)) > 0:
        shifts.append(min(sum(shifts) + 1, left))
    return shifts


def _dilate(line: Bool, shift: int) -> Bool:
    """The union of a line of pixels and its copies shifted by ``shift`` in both directions."""
    dilated = line.copy()
    dilated[shift:] |= line[:-shift]
    dilated[:-shift] |= line[shift:]
    return dilated
