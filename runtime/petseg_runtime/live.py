"""Sources without an end: cameras and network streams, which fall silent, break and come back."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Final, TypeAlias

from petseg_runtime import cameras
from petseg_runtime.errors import SilentVideo, UnreadableVideo, VideoError
from petseg_runtime.sources import Origin
from petseg_runtime.stream import Reading
from petseg_runtime.video import Frame, VideoReader
from petseg_runtime.video_sound import Sound

__all__ = ["LiveSource", "StateChange", "Tell", "open_frames"]

#: The clock of MPEG transport streams, fine enough for any rate.
_TIME_BASE: Final = Fraction(1, 90000)

#: The first pause before trying again, and the longest, in seconds.
_FIRST_PAUSE: Final = 0.5
_LONGEST_PAUSE: Final = 30.0
#: A connection that has lasted this long was a good one: the next pause is the first again.
_GOOD: Final = 10.0
#: So long a source that never sent anything is tried, in seconds.
FIRST_PATIENCE: Final = 30.0
#: A source's own clock that goes back by more than this, or ahead of ours by more than that, was set anew; in seconds.
_BACK: Final = 1.0
_AHEAD: Final = 5.0


@dataclass(frozen=True)
class StateChange:
    """A change of a live source's state.

    Attributes:
        state: ``connecting``; ``live``, with the first frame; ``stalled``, no frame for too long; ``lost``, with the
            connection; ``ended``, for good.
        reason: In a few words.
        attempt: Connections that were tried, this one included.
        retry_in: Seconds until the next.
        width: Of its frames.
        height: Of its frames.
    """

    state: str
    reason: str | None = None
    attempt: int = 0
    retry_in: float | None = None
    width: int | None = None
    height: int | None = None


Tell: TypeAlias = Callable[[StateChange], None]


class LiveSource:
    """Frames of a live source across all its connections, on one time line.

    A connection that breaks or falls silent is made anew, after pauses that double up to half a minute, with jitter, so
    that many clients do not come back at once. Times go on with the wall clock: what was missed is a gap, not a jump.
    So they do where the source's own clock is set anew, as when a sender behind the same address is restarted.
    Iterate over it once; :meth:`stop` may be called from any thread or a signal handler.
    """

    def __init__(
        self,
        origin: Origin,
        *,
        stall: float = 10.0,
        patience: float | None = None,
        tell: Tell = lambda change: None,
    ) -> None:
        """Remember what to connect to.

        Args:
            origin: The source.
            stall: Seconds without a frame after which the connection is given up and made anew.
            patience: Seconds without a frame after which the source is given up for good; None: half a minute until
                it has sent one (a camera that is not there: at once), and never after that.
            tell: Told of each change of state, from the thread that iterates.
        """
        self.origin = origin
        self._stall, self._patience, self._tell = stall, patience, tell
        # No Event: a second signal may come while the first one's handler is in `stop`, and would wait for its lock. A
        # condition's can be taken again by the thread that has it.
        self._stopped, self._changed = False, threading.Condition()
        self._random = random.Random()
        self._line = _Line()
        self._last_seen = time.monotonic()
        self._attempt = 0
        self.connections = 0  #: that have sent frames
        self.undecodable = 0  #: packets that the decoder refused, of all connections that are over

    def stop(self) -> None:
        """End soon; a wait between connections ends at once."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    def _wait(self, seconds: float) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._stopped, seconds)

    def __iter__(self) -> Iterator[Frame]:
        """Frames, until the source is given up, stopped, or (a recording on a server) at its end.

        Raises:
            UnreadableVideo: It was given up; or it is a camera that is not there, or may not be used.
        """
        self._check_camera()
        pause = _FIRST_PAUSE
        self._last_seen = time.monotonic()
        while not self._stopped:
            self._attempt += 1
            self._tell(StateChange("connecting", attempt=self._attempt))
            connected, state, reason = time.monotonic(), "lost", "the connection was closed"
            seen = False
            try:
                with self._open() as reader:
                    for frame in self._connection(reader):
                        seen = True
                        yield frame
                    if seen and reader.info.duration is not None:
                        self._tell(StateChange("ended", "its end", attempt=self._attempt))
                        return
            except VideoError as error:
                reason = error.reason
                state = "stalled" if isinstance(error, SilentVideo) else "lost"
            if self._stopped:
                break
            if seen and self._last_seen - connected > _GOOD:
                pause = _FIRST_PAUSE
            wait = min(pause * self._random.uniform(0.5, 1.0), self._patience_left(reason))
            self._tell(StateChange(state, reason, self._attempt, round(wait, 3)))
            self._wait(wait)
            pause = min(2 * pause, _LONGEST_PAUSE)
        self._tell(StateChange("ended", "stopped", attempt=self._attempt))

    def _check_camera(self) -> None:
        """Give up at once where nobody asked to wait: a camera that was not there at first will hardly come.

        One that has worked and is gone was unplugged, or has a loose contact: that is waited for.

        Raises:
            UnreadableVideo: It is a camera that is not there, or may not be used.
        """
        target = self.origin.target
        if self._patience is not None or self.origin.container != "v4l2" or not isinstance(target, str):
            return
        if why := cameras.why_not(target):
            self._tell(StateChange("ended", "the camera cannot be used"))  # why is in the error
            raise UnreadableVideo(why, self.origin.shown)

    def _open(self) -> VideoReader:
        first = self._stall if self._patience is None else min(self._stall, self._patience)
        return VideoReader(
            self.origin.target,
            name=self.origin.shown,
            container=self.origin.container,
            options=self.origin.options,
            timeout=(first, self._stall),
            low_delay=True,
        )

    def _connection(self, reader: VideoReader) -> Iterator[Frame]:
        """One connection's frames, on the time line of all."""
        first = True
        try:
            for frame in reader:
                self._last_seen = time.monotonic()
                if first:
                    self.connections += 1
                    self._line.begin_again(timed=reader.timed)
                    height, width = frame.size
                    self._tell(StateChange("live", None, self._attempt, None, width, height))
                    first = False
                self._line.place(frame, self._last_seen)
                yield frame
                self._last_seen = time.monotonic()  # a consumer that let us wait is no silence of the source
                if self._stopped:
                    return
        finally:
            self.undecodable += reader.undecodable

    def _patience_left(self, reason: str) -> float:
        """Seconds until the source is given up.

        Raises:
            UnreadableVideo: It is now.
        """
        patience = self._patience
        if patience is None:
            patience = float("inf") if self.connections else FIRST_PATIENCE
        silent = time.monotonic() - self._last_seen
        if silent >= patience:
            self._tell(StateChange("ended", reason, attempt=self._attempt))
            raise UnreadableVideo(
                f"no frame for {silent:.0f} s in {self._attempt} attempts; the last: {reason}", self.origin.shown
            )
        return patience - silent


class _Line:
    """One time line for the frames of all connections, in step with the wall clock, on which times always grow."""

    def __init__(self) -> None:
        self._begun: float | None = None  # when the very first frame came
        self._last_pts = -1
        self.begin_again()

    def begin_again(self, *, timed: bool = True) -> None:
        """The next frame is the first of a connection.

        Args:
            timed: The source says when its frames are shown; else that is when they come.
        """
        self._timed = timed
        self._origin: Fraction | None = None  # that frame's own time
        self._before: tuple[Fraction, float] | None = None  # the last frame's own time, and when it came
        self._offset = Fraction(0)  # from a connection's own time to the line's
        self._shift: Fraction | None = None  # of the last frame's sound

    def place(self, frame: Frame, now: float) -> None:
        """Change a frame's times, and those of its sound.

        Args:
            frame: The frame.
            now: When it came, in seconds.
        """
        self._begun = now if self._begun is None else self._begun
        own = self._own(frame, now)
        if self._before is None or self._is_set_anew(own, now, *self._before):
            here = max(round((now - self._begun) / _TIME_BASE), self._last_pts + 1)
            self._offset = here * _TIME_BASE - own
        self._before = own, now
        self._last_pts = max(round((own + self._offset) / _TIME_BASE), self._last_pts + 1)
        frame.duration = round(frame.duration * frame.time_base / _TIME_BASE) if self._timed else 0
        frame.pts, frame.time_base = self._last_pts, _TIME_BASE
        self._place_sound(frame)

    def _place_sound(self, frame: Frame) -> None:
        """Where the clock was set anew, what is nearer to the frame when it is counted as before came before that."""
        shift = self._offset - (self._origin or 0)
        shifts = (shift, shift if self._shift is None else self._shift)
        placed = ([Sound(sound.packet, shift) for shift in shifts] for sound in frame.sound)
        frame.sound = [min(both, key=lambda sound: abs(sound.time - frame.time)) for both in placed]
        self._shift = shift

    def _own(self, frame: Frame, now: float) -> Fraction:
        """Seconds from the connection's first frame on, as the source says: the reader's never go back."""
        picture = frame.picture
        if not self._timed:
            return Fraction(now)
        if picture.pts is None or not picture.time_base:  # as long after the frame before as it came
            own, before = self._before or (Fraction(0), now)
            return own + Fraction(now - before)
        if self._origin is None:
            self._origin = picture.pts * picture.time_base - (self._before or (0,))[0]
        return picture.pts * picture.time_base - self._origin

    @staticmethod
    def _is_set_anew(own: Fraction, now: float, own_before: Fraction, before: float) -> bool:
        step = float(own - own_before)
        return step < -_BACK or step - (now - before) > _AHEAD


def open_frames(origin: Origin, reading: Reading, *, tell: Tell = lambda change: None) -> VideoReader | LiveSource:
    """The frames of any source, for a :class:`~petseg_runtime.stream.Stream`.

    Args:
        origin: The source.
        reading: Its ``start``, of one that has an end; ``stall`` and ``patience`` of a live one. Of a video on a
            server, ``stall`` is for how long it may send nothing.
        tell: As for :class:`LiveSource`.

    Raises:
        InputError: One that has an end cannot be opened.
    """
    if origin.endless:
        return LiveSource(origin, stall=reading.stall, patience=reading.patience, tell=tell)
    remote = origin.options is not None and isinstance(origin.target, str)
    return VideoReader(
        origin.target,
        name=origin.shown,
        container=origin.container,
        options=origin.options,
        timeout=(reading.stall, reading.stall) if remote else None,
        start=reading.start,
    )
