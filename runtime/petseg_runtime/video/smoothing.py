"""Masks that do not flicker: the past is kept where the picture stands still, and only there."""

from __future__ import annotations

from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt

from petseg_runtime.errors import UsageError

__all__ = ["Smoother", "check_strength"]

U8: TypeAlias = npt.NDArray[np.uint8]
F32: TypeAlias = npt.NDArray[np.float32]

# The constants were chosen on clips made from training photos: ``python -m benchmarks flicker``.

#: How many grey levels of 255 a place changes by when its past counts for 1/e of what it would: above what a camera's
#: noise leaves of itself in a mean of nine pixels, below what moves.
_STILL: Final = 3.0

#: The share of the picture that moves at a cut, or with a camera that pans so fast that nothing can be kept.
_CUT: Final = 0.5

#: How far the light may change from one frame to the next and still be the same scene: as lamps and cameras do it.
_LIGHT: Final = 1.1

#: The rate at which a strength is the share that stays from frame to frame, in frames a second.
_RATE: Final = 30.0

#: Frames count as at least so far apart, in seconds: sources whose times are broken send all at once.
_SHORTEST: Final = 1 / 120

#: A pause in the frames after which the past is forgotten, in seconds.
_PAUSE: Final = 1.0

#: Brightness of red, green and blue (ITU-R BT.601).
_GREY: Final = np.array((0.299, 0.587, 0.114), np.float32)


class Smoother:
    """An exponential moving average of the probability, weighted by how still each place is. For one stream.

    What moves keeps nothing of its past, so that masks do not trail behind it; neither does a picture after a cut.
    The picture is averaged along with the probability, and it is this past that a frame is compared with: what moves
    too slowly to show between two frames shows there.

    What stays of the past at a still place falls with time, not with the count of frames: to ``strength`` after 1/30 s,
    at any frame rate. 0.7, 0.85 and 0.95 forget with time constants of 0.09, 0.2 and 0.65 s.
    """

    def __init__(self, strength: float) -> None:
        """Begin without a past.

        Args:
            strength: In [0, 1); 0 changes nothing, 0.85 is recommended.

        Raises:
            UsageError: It is out of range.
        """
        check_strength(strength)
        self._strength = strength
        self._image: F32 | None = None
        self._past: F32 | None = None
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
        now, fresh, passed = _mean(image @ _GREY), probability.astype(np.float32), time - self._time
        if self._image is not None and self._past is not None and self._image.shape == now.shape and passed <= _PAUSE:
            before = self._image * _light(self._image[::4, ::4], now[::4, ::4])
            keep = _stillness(now - before) * np.float32(self._strength ** (_RATE * max(passed, _SHORTEST)))
            now += keep * (before - now)
            fresh += keep * (self._past - fresh)  # kept in floats: rounded, it would never arrive at a new answer
        self._image, self._past, self._time = now, fresh, time
        smoothed: U8 = np.rint(fresh).astype(np.uint8)
        return smoothed


def check_strength(strength: float) -> None:
    """Raise the ``UsageError`` of a strength that is not in [0, 1)."""
    if not 0 <= strength < 1:
        raise UsageError(f"smoothing {strength} must be from 0 to below 1")


def _light(before: F32, now: F32) -> np.float32:
    """How many times as bright a scene has become: the median, on which what moves has no say."""
    return np.float32(min(max(float(np.median(now / np.maximum(before, 1))), 1 / _LIGHT), _LIGHT))


def _stillness(change: F32) -> F32:
    """float32 [H, W], in [0, 1], from a change in grey levels; what moves carries its surroundings along."""
    still: F32 = np.exp(-((_mean(_mean(np.abs(change))) / np.float32(_STILL)) ** 2))
    if np.count_nonzero(still < 0.5) > _CUT * still.size:
        still.fill(0)  # two pictures look alike in places, by chance
    return still


def _mean(plane: F32) -> F32:
    """float32 [H, W]: of 3x3 pixels; the outermost ones are repeated beyond the edge."""
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
