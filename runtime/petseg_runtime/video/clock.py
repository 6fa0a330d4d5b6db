"""Strictly increasing frame times, from sources whose timestamps go back, stand still, or restart."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import av

__all__ = ["Clock", "Joined"]

#: Seconds: if a transport stream's time goes back by more than the first, or forward by more than the second, it has
#: restarted: parts were joined, or a packet was damaged. (FFmpeg's own thresholds.)
_JUMP_BACK, _JUMP_AHEAD = Fraction(1, 10), Fraction(10)


class Joined:
    """Makes the timestamps of concatenated transport streams, each of which restarts them, continuous."""

    def __init__(self, container: str) -> None:
        self._may_be = container in ("mpegts", "mpeg")
        self._offset = Fraction(0)
        self._last: dict[int, Fraction] = {}  # the end of each stream's last packet, in seconds

    def move(self, packet: av.Packet[Any]) -> None:
        """Shift a packet's timestamps to its place on the common time line."""
        if not self._may_be or packet.dts is None or packet.time_base is None:
            return
        index, base = packet.stream.index, packet.time_base
        begins, last = packet.dts * base + self._offset, self._last.get(index)
        if last is not None and not last - _JUMP_BACK <= begins <= last + _JUMP_AHEAD:
            self._offset += last - begins
            begins = last
        if self._offset:
            shift = round(self._offset / base)
            packet.dts += shift
            packet.pts = None if packet.pts is None else packet.pts + shift
        self._last[index] = begins + (packet.duration or 0) * base


class Clock:
    """Frame times: the source's timestamps, relative to its first frame, made strictly increasing."""

    def __init__(self, stream: Any, start: float, *, decoding_order: bool = False) -> None:
        # AVI has decoding timestamps only; in output order, these equal presentation timestamps but for a constant.
        self._time = "dts" if decoding_order else "pts"
        self.time_base: Fraction = stream.time_base or Fraction(1, 90000)
        rate = stream.average_rate or stream.guessed_rate or Fraction(25)
        self._step = max(1, round(1 / rate / self.time_base))  # for frames without a timestamp
        # A start that was computed as n / rate, and rounded, means frame n.
        self._start = math.ceil(Fraction(start) / self.time_base - Fraction(1, 1000)) if start > 0 else 0
        self._first: int | None = None  # the source's first frame, in the source's time
        self._last = -1  # the last frame, relative to the first
        self._delivered = 0  # the first frame from the start on, likewise
        self._end = 0  # of the last frame, in the source's time
        self.count = 0

    @property
    def origin(self) -> Fraction:
        """The time of the first delivered frame, in seconds of the source's time."""
        return ((self._first or 0) + self._delivered) * self.time_base

    @property
    def end(self) -> Fraction:
        """The end of the last frame, in seconds of the source's time or from the first frame, whichever is more."""
        return (self._end - min(self._first or 0, 0)) * self.time_base

    def begin(self, picture: av.VideoFrame) -> None:
        """Set the source's first frame."""
        self._first = self._timestamp(picture) or 0

    def is_early(self, picture: av.VideoFrame) -> bool:
        """Whether a frame is known to be shown at or before the start."""
        timestamp = self._timestamp(picture)
        return timestamp is not None and timestamp - (self._first or 0) <= self._start

    def at(self, picture: av.VideoFrame) -> tuple[int | None, int]:
        """When a frame is shown and for how long, in ``time_base``; None if that is before the requested start."""
        timestamp = self._timestamp(picture)
        if self._first is None:
            self._first = timestamp or 0
        expected = self._last + self._step if self._last >= 0 else 0
        # An earlier frame was far too late.
        if timestamp is not None and timestamp - self._first < self._last - _JUMP_AHEAD / self.time_base:
            self._first = timestamp - expected
        self._last = max(expected if timestamp is None else timestamp - self._first, self._last + 1)
        self._end = max(self._end, self._first + self._last + (picture.duration or self._step))
        if self._last < self._start:
            return None, 0
        if not self.count:
            self._delivered = self._last
        self.count += 1
        return self._last - self._delivered, picture.duration or 0

    def _timestamp(self, picture: av.VideoFrame) -> int | None:
        pts: int | None = getattr(picture, self._time)
        if pts is not None and picture.time_base and picture.time_base != self.time_base:
            return round(pts * picture.time_base / self.time_base)
        return pts
