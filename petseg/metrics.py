"""Pixel counts, which add up over a data set, and the metrics computed from them.

Probabilities are bytes (``round(255 p)``), so one histogram of them per trimap class holds the exact counts at *every*
threshold and for every way to count the border: nothing is computed twice, nothing approximated.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt

from petseg_runtime.spec import lowest_pet

__all__ = [
    "BACKGROUND",
    "BORDER",
    "PET",
    "PUBLISHED",
    "Border",
    "PixelCounts",
    "best_threshold",
    "counts",
    "histogram",
    "json_ratio",
]

#: The values of an Oxford-IIIT Pet trimap.
PET, BACKGROUND, BORDER = 1, 2, 3

#: The published attention U-Net on the test split of Oxford-IIIT Pet; its border counts as background.
PUBLISHED: Final = {"iou": 0.8375, "dice": 0.9116, "accuracy": 0.9460, "precision": 0.8961, "recall": 0.9276}

Histogram: TypeAlias = npt.NDArray[np.int64]
U8: TypeAlias = npt.NDArray[np.uint8]


class Border(StrEnum):
    """What the trimap's border (class 3: fur, outline, uncertain) counts as; ``BACKGROUND`` in headline figures."""

    BACKGROUND = "background"
    PET = "pet"
    IGNORED = "ignored"


@dataclass(frozen=True)
class PixelCounts:
    """True and false positives and negatives, in pixels; counts of two data sets add up with ``+``.

    Undefined ratios (division by zero) are ``nan``, except for a photo without a pet in which none was found: there
    every ratio is 1.
    """

    tp: int = 0
    fp: int = 0
    fn: int = 0
    tn: int = 0

    def __add__(self, other: PixelCounts) -> PixelCounts:
        return PixelCounts(self.tp + other.tp, self.fp + other.fp, self.fn + other.fn, self.tn + other.tn)

    @property
    def iou(self) -> float:
        """Intersection over union, TP / (TP + FP + FN)."""
        return self._ratio(self.tp, self.tp + self.fp + self.fn)

    @property
    def dice(self) -> float:
        """Dice coefficient (F1), 2 TP / (2 TP + FP + FN)."""
        return self._ratio(2 * self.tp, 2 * self.tp + self.fp + self.fn)

    @property
    def accuracy(self) -> float:
        """Pixel accuracy, (TP + TN) / all."""
        return self._ratio(self.tp + self.tn, self.tp + self.fp + self.fn + self.tn)

    @property
    def precision(self) -> float:
        """TP / (TP + FP)."""
        return self._ratio(self.tp, self.tp + self.fp)

    @property
    def recall(self) -> float:
        """TP / (TP + FN)."""
        return self._ratio(self.tp, self.tp + self.fn)

    def _ratio(self, part: int, whole: int) -> float:
        if whole:
            return part / whole
        return 1.0 if self.tp + self.fp + self.fn == 0 else math.nan

    def ratios(self) -> dict[str, float]:
        """All five ratios by name."""
        return {name: getattr(self, name) for name in ("iou", "dice", "accuracy", "precision", "recall")}

    def as_dict(self) -> dict[str, int]:
        """The four counts by name."""
        return asdict(self)


def histogram(probability: U8, trimap: U8) -> Histogram:
    """Count how often each probability occurs in each class.

    Args:
        probability: uint8 [H, W], ``round(255 * p(pet))``.
        trimap: uint8 [H, W] of 1 (pet), 2 (background), 3 (border).

    Returns:
        int64 [3, 256]: rows pet, background, border. Histograms can be summed.

    Raises:
        ValueError: The shapes differ, or the trimap has another value.
    """
    if probability.shape != trimap.shape:
        raise ValueError(f"probability is {probability.shape}, trimap is {trimap.shape}: they must be equal")
    if trimap.size and not (trimap.min() >= PET and trimap.max() <= BORDER):
        raise ValueError(f"trimap has values from {trimap.min()} to {trimap.max()}; only 1, 2 and 3 are allowed")
    bins = (trimap.ravel().astype(np.uint16) - 1) * 256 + probability.ravel()  # 767 at most
    return np.bincount(bins, minlength=3 * 256).reshape(3, 256).astype(np.int64)


def json_ratio(ratio: float) -> float | None:
    """Convert an undefined ratio (NaN) to None, because JSON has no NaN."""
    return None if math.isnan(ratio) else ratio


def counts(hist: Histogram, threshold: float, border: Border = Border.BACKGROUND) -> PixelCounts:
    """Returns the pixel counts at a threshold, for one way to count the border.

    Args:
        hist: int64 [3, 256] from :func:`histogram`, or a sum of them.
        threshold: In [0, 1]; see :func:`petseg_runtime.spec.lowest_pet`.
        border: What class 3 counts as.

    Raises:
        UsageError: The threshold is out of range.
    """
    positive, negative = _readings(hist, border)
    cut = lowest_pet(threshold)
    tp, fp = int(positive[cut:].sum()), int(negative[cut:].sum())
    return PixelCounts(tp=tp, fp=fp, fn=int(positive.sum()) - tp, tn=int(negative.sum()) - fp)


def best_threshold(hist: Histogram, border: Border = Border.BACKGROUND) -> float:
    """Returns the threshold with the highest IoU, in steps of 1/255 (of ties, the middle one). For validation only."""
    positive, negative = _readings(hist, border)
    tp = positive[::-1].cumsum()[::-1][1:255]  # at cuts 1..254: thresholds 0 and 1 are not useful
    fp = negative[::-1].cumsum()[::-1][1:255]
    iou = tp / np.maximum(positive.sum() + fp, 1)
    ties = np.flatnonzero(iou == iou.max())
    return (int(ties[len(ties) // 2]) + 1) / 255


def _readings(hist: Histogram, border: Border) -> tuple[Histogram, Histogram]:
    """Returns the histograms of the positive and of the negative pixels."""
    pet, background, edge = hist
    if border is Border.PET:
        return pet + edge, background
    if border is Border.BACKGROUND:
        return pet, background + edge
    return pet, background
