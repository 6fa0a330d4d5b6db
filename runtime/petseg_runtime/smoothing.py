"""Masks that do not flicker: the past is kept where the picture stands still, and only there."""

from __future__ import annotations

from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt

__all__ = ["Smoother"]

U8: TypeAlias = npt.NDArray[np.uint8]

#: How many levels of 255 a place may change by, from one frame to the next, before its past counts for nothing:
#: above a camera's noise and an encoder's, below what moves.
_STILL: Final = 8.0

#: A pause in the frames after which the past is forgotten, in seconds.
_PAUSE: Final = 1.0


class Smoother:
    """An exponential moving average of the probability, weighted by how still each place is. For one stream.

    With strength s a place that stands still keeps ``s`` of its past in each frame, one that moves keeps nothing, so
    that masks do not trail behind what moves.
    """

    def __init__(self, strength: float) -> None:
        """Begin without a past.

        Args:
            strength: In [0, 1).

        Raises:
            ValueError: It is out of range.
        """
        if not 0 <= strength < 1:
            raise ValueError(f"smoothing {strength} must be from 0 to below 1")
        self._strength = strength
        self._image: npt.NDArray[np.int16] | None = None
        self._past: npt.NDArray[np.float32] | None = None
        self._time = 0.0

    def __call__(self, image: U8, probability: U8, time: float) -> U8:
        """Smooth the next frame's answer.

        Args:
            image: uint8 [H, W, 3], what the model saw.
            probability: uint8 [H, W], what it answered.
            time: Seconds, growing.

        Returns:
            uint8 [H, W], the caller's own.
        """
        now = image.astype(np.int16)
        if self._image is None or self._past is None or self._image.shape != now.shape or time - self._time > _PAUSE:
            past = probability.astype(np.float32)
        else:
            change = np.abs(now - self._image).mean(axis=2, dtype=np.float32)
            keep = self._strength * np.exp(-((_spread(change) / _STILL) ** 2))
            past = probability + keep * (self._past - probability)
        self._image, self._past, self._time = now, past, time
        smoothed: U8 = np.rint(past).astype(np.uint8)
        return smoothed


def _spread(change: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """The mean over 3x3 pixels: noise is evened out, and what moves carries its surroundings along."""
    padded = np.pad(change, 1, mode="edge")
    rows = padded[:-2] + padded[1:-1] + padded[2:]
    spread: npt.NDArray[np.float32] = (rows[:, :-2] + rows[:, 1:-1] + rows[:, 2:]) / 9
    return spread
