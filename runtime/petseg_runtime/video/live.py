"""Live sources: cameras and network streams that stall, break and reconnect, with all frames on one time line."""

from __future__ import annotations

import atexit
import contextlib
import math
import random
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Final, TypeAlias

from av.container import core

from petseg_runtime import cameras
from petseg_runtime.errors import SilentVideo, UnreadableVideo, VideoError
from petseg_runtime.sources import Origin
from petseg_runtime.video.frame import Frame
from petseg_runtime.video.reader import VideoReader
from petseg_runtime.video.sound import Sound
from petseg_runtime.video.stream import Reading

__all__ = ["STOPPED", "LiveSource", "StateChange", "Tell", "open_frames"]

#: The time base of MPEG transport streams, fine enough for any frame rate.
_TIME_BASE: Final = Fraction(1, 90000)

#: The first and the longest pause before a reconnect, in seconds.
_FIRST_PAUSE: Final = 0.5
_LONGEST_PAUSE: Final = 30.0
#: A connection that lasted this long was stable: the backoff starts again from the first pause; in seconds.
_STABLE: Final = 10.0
#: How long a source that has never sent a frame is tried, in seconds.
FIRST_PATIENCE: Final = 30.0
#: What rounding may leave of patience after a wait for all of it, and which is not waited for again; in seconds.
_ROUNDING: Final = 1e-3
#: A source's clock that jumps back by more than this, or gets ahead of ours by more than that, was reset; in seconds.
_RESET_BACK: Final = 1.0
_RESET_AHEAD: Final = 5.0
#: How long after its timeout FFmpeg has reported it, if it can; in seconds.
_GRACE: Final = 0.5
#: FFmpeg opens a source, probes what it sends, and reads: before the first frame, each of these may take as long as a
#: later frame.
_OPENING_STEPS: Final = 3
#: The reason when a connection sent nothing; if patience ends in the middle of it, the connection before it has a more
#: telling one.
_SILENT: Final = "no frame came for too long"
#: The reason when a source ended because of :meth:`LiveSource.stop`.
STOPPED: Final = "stopped"
_HANGS: Final = "a read has not returned; if this persists, reconnect the device, or restart its driver or server"


@dataclass(frozen=True)
class StateChange:
    """A change of a live source's state.

    Attributes:
        state: ``connecting``; ``live``, with the first frame; ``stalled``, no frame for too long; ``lost``, the
            connection broke; ``ended``, for good.
        reason: In a few words.
        attempt: Number of connections tried, including this one.
        retry_in: Seconds until the next attempt; None if a read hangs: the attempt follows when that read has returned.
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

    If a connection breaks or stalls, the source reconnects with exponential backoff up to half a minute, and jitter, so
    that many clients do not reconnect at once. Timestamps follow the wall clock: what was missed is a gap, not a jump.
    This also holds when the source's clock is reset, as when a sender behind the same address restarts.
    Iterate over it once; :meth:`stop` may be called from any thread or a signal handler.

    Each connection has a thread, which may hang in a read. It is then left behind, and the source does not reconnect
    before that read returns: two connections would disturb each other, and hanging threads would pile up.
    """

    def __init__(
        self,
        origin: Origin,
        *,
        stall: float = 10.0,
        patience: float | None = None,
        threads: int | None = None,
        tell: Tell = lambda change: None,
    ) -> None:
        """Prepare a source; nothing is connected yet.

        Args:
            origin: The source.
            stall: Seconds without a frame after which the connection is dropped and made again.
            patience: Seconds without a frame after which the source is given up for good; None: half a minute until the
                first frame (a camera that does not exist: at once), and never after it.
            threads: CPU threads of the decoder; None: FFmpeg's choice.
            tell: Called with each change of state, by the iterating thread.
        """
        self.origin = origin
        self._patience, self._threads, self._tell = patience, threads, tell
        self._silence = stall if patience is None else min(stall, patience)  # after which a connection is dropped
        # Not an Event: a second signal may interrupt the first one's handler inside `stop`, and would deadlock on the
        # event's lock. A condition's lock is reentrant.
        self._stopped, self._changed = False, threading.Condition()
        self._random = random.Random()
        self._line = _TimeLine()
        self._last_seen = time.monotonic()
        self._attempt = 0
        self._why = ""  # why no frame has come since the last one
        self._connection: _Connection | None = None  # the last one
        self.connections = 0  #: that have sent frames
        self.undecodable = 0  #: packets that the decoder rejected, on all connections that are closed

    def stop(self) -> None:
        """End the source soon; a wait between connections ends at once."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    def _wait(self, seconds: float) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._stopped, seconds)

    def _wait_for_return(self) -> None:
        """Wait until the hanging read has returned.

        Raises:
            UnreadableVideo: The source is given up meanwhile.
        """
        while self._hangs and not self._stopped:
            longest = min(self._patience_left(), threading.TIMEOUT_MAX)
            with self._changed:
                self._changed.wait_for(lambda: self._stopped or not self._hangs, longest)

    def __iter__(self) -> Iterator[Frame]:
        """Yield frames until the source is given up or stopped, or (a recording on a server) ends.

        Raises:
            UnreadableVideo: The source was given up; or it is a camera that does not exist, or may not be used.
        """
        self._check_camera()
        pause = _FIRST_PAUSE
        self._last_seen = time.monotonic()
        while not self._stopped:
            self._attempt += 1
            self._tell(StateChange("connecting", attempt=self._attempt))
            connected, state, reason = time.monotonic(), "lost", "the connection was closed"
            hangs = False
            try:
                with self._connected() as connection:
                    yield from self._frames(connection)
                    if connection.has_end and not self._stopped:
                        self._tell(StateChange("ended", "end of the source", attempt=self._attempt))
                        return
            except VideoError as error:
                hangs = self._hangs
                reason = f"{error.reason}; {_HANGS}" if hangs else error.reason
                state = "stalled" if isinstance(error, SilentVideo) else "lost"
            if self._stopped:
                break
            self._why = reason if reason != _SILENT else self._why or reason
            left = self._patience_left()
            if hangs or self._last_seen - connected > _STABLE:
                pause = _FIRST_PAUSE
            if hangs:
                self._tell(StateChange(state, reason, self._attempt))
                self._wait_for_return()
                continue
            wait = min(pause * self._random.uniform(0.5, 1.0), left)
            self._tell(StateChange(state, reason, self._attempt, round(wait, 3)))
            self._wait(wait)
            pause = min(2 * pause, _LONGEST_PAUSE)
        self._tell(StateChange("ended", STOPPED, attempt=self._attempt))

    def _check_camera(self) -> None:
        """Fail at once, unless the caller set a patience: a camera that is missing at first will hardly appear.

        One that has worked and is gone was unplugged, or has a loose contact; the source waits for it.

        Raises:
            UnreadableVideo: It is a camera that does not exist, or may not be used.
        """
        target = self.origin.target
        if self._patience is not None or self.origin.container != "v4l2" or not isinstance(target, str):
            return
        if why := cameras.why_not(target):
            self._tell(StateChange("ended", "the camera cannot be used"))  # the error says why
            raise UnreadableVideo(why, self.origin.shown)

    @contextlib.contextmanager
    def _connected(self) -> Iterator[_Connection]:
        """Connect, and leave the connection at the end."""
        connection = self._connection = _Connection(self._open, self._changed)
        try:
            yield connection
        finally:
            connection.leave()
            self.undecodable += connection.undecodable

    @property
    def _hangs(self) -> bool:
        return self._connection is not None and self._connection.hangs

    def _open(self) -> VideoReader:
        return VideoReader(
            self.origin.target,
            name=self.origin.shown,
            container=self.origin.container,
            options=self.origin.options,
            # Not longer than patience lasts: else a read that FFmpeg would have ended is taken for one that hangs.
            timeout=(max(min(self._silence, self._left), _GRACE / 2), self._silence),
            low_delay=True,
            threads=self._threads,
        )

    def _frames(self, connection: _Connection) -> Iterator[Frame]:
        """Yield the frames of one connection, placed on the common time line."""
        first, wait = True, min(_OPENING_STEPS * self._silence, self._left) + _GRACE
        while frame := connection.take(wait, lambda: self._stopped):
            self._last_seen = time.monotonic()
            if first:
                self.connections, self._why = self.connections + 1, ""
                self._line.start_connection(timed=connection.timed)
                height, width = frame.size
                self._tell(StateChange("live", None, self._attempt, None, width, height))
                first, wait = False, self._silence + _GRACE
            self._line.place(frame, self._last_seen)
            yield frame
            self._last_seen = time.monotonic()  # the time that the consumer took is not silence of the source

    @property
    def _patience_now(self) -> float:
        """Seconds without a frame after which the source is given up, in its present state."""
        if self._patience is not None:
            return self._patience
        return float("inf") if self.connections else FIRST_PATIENCE

    @property
    def _left(self) -> float:
        """Seconds until the source is given up; 0 or less: now."""
        return self._patience_now - (time.monotonic() - self._last_seen)

    def _patience_left(self) -> float:
        """Seconds until the source is given up.

        Raises:
            UnreadableVideo: That is now.
        """
        if (left := self._left) <= _ROUNDING:
            self._tell(StateChange("ended", self._why, attempt=self._attempt))
            silent = self._patience_now - left
            raise UnreadableVideo(
                f"no frame for {silent:.0f} s in {self._attempt} attempts; the last: {self._why}", self.origin.shown
            )
        return left


class _NoTimeLeft:
    """A clock on which every wait has taken too long."""

    @staticmethod
    def monotonic() -> float:
        return math.inf


#: All connections whose thread may still run.
_connections: Final[weakref.WeakSet[_Connection]] = weakref.WeakSet()


@atexit.register
def _leave_all() -> None:
    """End what FFmpeg still waits for when Python exits.

    It asks PyAV's clock again and again whether to wait on. In the middle of Python's shutdown that crashes the process
    (one in 20 with Python 3.13).
    """
    if running := [connection for connection in _connections if connection.runs]:
        vars(core)["time"] = _NoTimeLeft
        for connection in running:
            connection.leave()


class _Connection:
    """One connection: a thread opens it, reads one frame ahead of the consumer, and closes it.

    FFmpeg checks its timeout while it waits for a socket, but not while it waits for a device (V4L2's ioctl) or a named
    pipe (open, read). Such a read may hang forever, and nothing can end it from outside: closing what another thread is
    reading would crash the process. If it does return, the thread closes what it has opened, and ends.
    """

    def __init__(self, open_reader: Callable[[], VideoReader], changed: threading.Condition) -> None:
        """Start to connect.

        Args:
            open_reader: Connects; called by the thread.
            changed: Notified of each frame and of the end; notify it to end a wait for a frame.
        """
        self.timed = True  #: whether the source has timestamps; known with the first frame
        self.has_end = False  #: whether it is a recording; likewise
        self._open_reader, self._changed = open_reader, changed
        self._reader: VideoReader | None = None
        self._frame: Frame | None = None  # waits to be taken
        self._over = self._left = False
        self._error: BaseException | None = None
        # A daemon thread, because a process must be able to exit while a read hangs.
        self._thread = threading.Thread(target=self._read, name="petseg-read", daemon=True)
        self._thread.start()
        _connections.add(self)

    def take(self, seconds: float, stopped: Callable[[], bool]) -> Frame | None:
        """Wait for the next frame; None: the connection has ended, or the consumer has stopped.

        Args:
            seconds: The longest wait.
            stopped: Whether the consumer has stopped.

        Raises:
            SilentVideo: No frame came in time.
            VideoError: The connection cannot be opened, or broke.
        """
        with self._changed:
            longest = min(seconds, threading.TIMEOUT_MAX)
            if not self._changed.wait_for(lambda: stopped() or self._frame or self._over, longest):
                raise SilentVideo(_SILENT)
            frame, self._frame = self._frame, None
            self._changed.notify_all()
        if stopped():
            return None
        if frame is None and self._error:
            raise self._error
        return frame

    def leave(self) -> None:
        """Take no more frames. The thread ends, unless it hangs."""
        with self._changed:
            self._left = True
            self._changed.notify_all()
        self._thread.join(_GRACE)

    @property
    def runs(self) -> bool:
        """Whether the thread still runs."""
        return not self._over

    @property
    def hangs(self) -> bool:
        """Whether the thread still runs though the connection was left."""
        return self._left and self.runs

    @property
    def undecodable(self) -> int:
        """Packets that the decoder rejected."""
        return self._reader.undecodable if self._reader else 0

    def _read(self) -> None:
        try:
            with self._open_reader() as reader:
                self._reader, self.timed, self.has_end = reader, reader.timed, reader.info.duration is not None
                for frame in reader:
                    if not self._hand_over(frame):
                        return
        except BaseException as error:  # noqa: BLE001 (raised again by take)
            self._error = error
        finally:
            with self._changed:
                self._over = True
                self._changed.notify_all()

    def _hand_over(self, frame: Frame) -> bool:
        """Hand over a frame once the one before it was taken; False: the connection was left."""
        with self._changed:
            self._changed.wait_for(lambda: self._left or self._frame is None)
            self._frame = frame
            self._changed.notify_all()
            return not self._left


class _TimeLine:
    """A time line for the frames of all connections: it follows the wall clock, and timestamps always increase."""

    def __init__(self) -> None:
        self._begun: float | None = None  # when the very first frame came
        self._last_pts = -1
        self.start_connection()

    def start_connection(self, *, timed: bool = True) -> None:
        """Expect the first frame of a new connection.

        Args:
            timed: The source has timestamps; else frames are stamped when they arrive.
        """
        self._timed = timed
        self._origin: Fraction | None = None  # that frame's timestamp at the source
        self._previous: tuple[Fraction, float] | None = None  # the last frame's time at the source, and when it came
        self._offset = Fraction(0)  # from the connection's time to the time line
        self._shift: Fraction | None = None  # of the last frame's audio

    def place(self, frame: Frame, now: float) -> None:
        """Put a frame and its audio on the time line.

        Args:
            frame: The frame; its timestamps are changed.
            now: When it came, in seconds.
        """
        self._begun = now if self._begun is None else self._begun
        own = self._source_time(frame, now)
        if self._previous is None or self._was_reset(own, now, *self._previous):
            here = max(round((now - self._begun) / _TIME_BASE), self._last_pts + 1)
            self._offset = here * _TIME_BASE - own
        self._previous = own, now
        self._last_pts = max(round((own + self._offset) / _TIME_BASE), self._last_pts + 1)
        frame.duration = round(frame.duration * frame.time_base / _TIME_BASE) if self._timed else 0
        frame.pts, frame.time_base = self._last_pts, _TIME_BASE
        self._place_sound(frame)

    def _place_sound(self, frame: Frame) -> None:
        """Shift the audio. After a reset of the clock, packets that fit better before it keep the shift from before."""
        shift = self._offset - (self._origin or 0)
        shifts = (shift, shift if self._shift is None else self._shift)
        placed = ([Sound(sound.packet, shift) for shift in shifts] for sound in frame.sound)
        frame.sound = [min(both, key=lambda sound: abs(sound.time - frame.time)) for both in placed]
        self._shift = shift

    def _source_time(self, frame: Frame, now: float) -> Fraction:
        """Seconds since the connection's first frame by its own clock; the reader's timestamps would hide a reset."""
        picture = frame.picture
        if not self._timed:
            return Fraction(now)
        if picture.pts is None or not picture.time_base:  # assume that it follows the last frame as it arrived
            own, before = self._previous or (Fraction(0), now)
            return own + Fraction(now - before)
        if self._origin is None:
            self._origin = picture.pts * picture.time_base - (self._previous or (0,))[0]
        return picture.pts * picture.time_base - self._origin

    @staticmethod
    def _was_reset(own: Fraction, now: float, own_before: Fraction, before: float) -> bool:
        step = float(own - own_before)
        return step < -_RESET_BACK or step - (now - before) > _RESET_AHEAD


def open_frames(
    origin: Origin, reading: Reading, *, threads: int | None = None, tell: Tell = lambda change: None
) -> VideoReader | LiveSource:
    """Open a source of any kind for a :class:`~petseg_runtime.video.stream.Stream`.

    Args:
        origin: The source.
        reading: Supplies ``start`` for a source that has an end, ``stall`` and ``patience`` for a live one. For a video
            on a server, ``stall`` is how long it may send nothing.
        threads: CPU threads of the decoder; None: FFmpeg's choice.
        tell: As for :class:`LiveSource`.

    Raises:
        InputError: A source that has an end cannot be opened.
    """
    if origin.endless:
        return LiveSource(origin, stall=reading.stall, patience=reading.patience, threads=threads, tell=tell)
    remote = origin.options is not None and isinstance(origin.target, str)
    return VideoReader(
        origin.target,
        name=origin.shown,
        container=origin.container,
        options=origin.options,
        timeout=(reading.stall, reading.stall) if remote else None,
        start=reading.start,
        threads=threads,
    )
