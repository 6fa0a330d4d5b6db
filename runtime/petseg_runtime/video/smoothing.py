"""Reduces the flicker of masks: averages over time where the picture stands still, and only there."""

from __future__ import annotations

from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt

from petseg_runtime.errors import UsageError

__all__ = ["Smoother", "check_strength"]

U8: TypeAlias = npt.NDArray[np.uint8]
F32: TypeAlias = npt.NDArray[np.float32]

# The constants were chosen on clips made from training photos: ``python -m benchmarks flicker``.

#: The change of a place, in grey levels of 255, at which its past has 1/e of its weight at rest: above what camera
#: noise leaves in a mean of nine pixels, below what motion causes.
_STILL: Final = 3.0

#: If more than this share of the picture moves, it is a cut, or the camera pans so fast that nothing can be kept.
_CUT: Final = 0.5

#: The largest factor by which brightness may change between frames of one scene (lamps, exposure control).
_LIGHT: Final = 1.1

#: The frame rate at which a strength is the share that remains from frame to frame, in frames per second.
_RATE: Final = 30.0

#: The least time assumed between frames, in seconds: sources with broken timestamps send them all at once.
_SHORTEST: Final = 1 / 120

#: After a longer gap between frames the past is forgotten, in seconds.
_PAUSE: Final = 1.0

#: Luma weights of red, green and blue (ITU-R BT.601).
_GREY: Final = np.array((0.299, 0.587, 0.114), np.float32)


class Smoother:
    """An exponential moving average of the probability, weighted by how still each place is. For one stream.

    Places that move keep nothing of their past, so that masks do not trail behind; nor does the picture after a cut.
    The picture is averaged along with the probability, and frames are compared with that average: it also shows motion
    that is too slow to show between two frames.

    At a still place, the weight of the past decays with time, not with the number of frames: to ``strength`` after
    1/30 s, at any frame rate. 0.7, 0.85 and 0.95 have time constants of 0.09, 0.2 and 0.65 s.
    """

    def __init__(self, strength: float) -> None:
        """Start without a past.

        Args:
            strength: In [0, 1); 0 has no effect, 0.85 is recommended.

        Raises:
            UsageError: It is out of range.
        """
        check_strength(strength)
        self._strength = strength
        self._image: F32 | None = None
        self._past: F32 | None = None
        self._time = 0.0

    def __call__(self, image: U8, probability: U8, time: float) -> U8:
        """Smooth the model's output for the next frame.

        Args:
            image: uint8 [H, W, 3], the model's input.
            probability: uint8 [H, W], its output.
            time: Seconds, increasing.

        Returns:
            uint8 [H, W], which the caller owns.
        """
        now, fresh, passed = _mean(image @ _GREY), probability.astype(np.float32), time - self._time
        if self._image is not None and self._past is not None and self._image.shape == now.shape and passed <= _PAUSE:
            before = self._image * _brightness_factor(self._image[::4, ::4], now[::4, ::4])
            keep = _stillness(now - before) * np.float32(self._strength ** (_RATE * max(passed, _SHORTEST)))
            now += keep * (before - now)
            fresh += keep * (self._past - fresh)  # in float32: rounded values would never reach a new output
        self._image, self._past, self._time = now, fresh, time
        smoothed: U8 = np.rint(fresh).astype(np.uint8)
        return smoothed


def check_strength(strength: float) -> None:
    """Raise a ``UsageError`` for a strength outside [0, 1)."""
    if not 0 <= strength < 1:
        raise UsageError(f"smoothing {strength} must be from 0 to below 1")


def _brightness_factor(before: F32, now: F32) -> np.float32:
    """The factor by which a scene has become brighter: the median, which what moves does not affect."""
    return np.float32(min(max(float(np.median(now / np.maximum(before, 1))), 1 / _LIGHT), _LIGHT))


def _stillness(change: F32) -> F32:
    """float32 [H, W], in [0, 1], from changes in grey levels; what moves also lowers the stillness around it."""
    still: F32 = np.exp(-((_mean(_mean(np.abs(change))) / np.float32(_STILL)) ** 2))
    if np.count_nonzero(still < 0.5) > _CUT * still.size:
        still.fill(0)  # two different pictures are alike in places by chance
    return still


def _mean(plane: F32) -> F32:
    """float32 [H, W]: the mean of 3x3 pixels; edge pixels are repeated beyond the edge."""
    rows = plane.copy()
    rows[1:] += plane[:-1]
    rows[:-1] += plane[1:]
    rows[[0, -1]] += plane[[0, -1]]
    mean = rows.copy()
    mean[:, 1:] += rows[:, :-1]
    mean[:, :-1] += rows[:, 1:]
    mean[:, [0, -1]] += rows[:, [0, -1]]
    mean /= np.float32(9)
    return mean
