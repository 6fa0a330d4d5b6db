"""Runs a video through the network: decoder, engine and consumer each in a thread, every frame accounted for."""

from __future__ import annotations

import atexit
import contextlib
import math
import numbers
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Final, Self, TypeAlias

import numpy as np
import numpy.typing as npt

from petseg_runtime.errors import InputError, UsageError
from petseg_runtime.host import LOOK_UP
from petseg_runtime.pipeline import Timings
from petseg_runtime.result import Segmentation
from petseg_runtime.segmenter import Prepared, Segmenter
from petseg_runtime.video.frame import Converter, Frame
from petseg_runtime.video.smoothing import Smoother, check_strength
from petseg_runtime.video.sound import Sound

__all__ = ["POLICIES", "Counts", "Reading", "Segmented", "Stream"]

U8: TypeAlias = npt.NDArray[np.uint8]

#: A frame, the model's input uint8 [H, W, 3] that was made from it, and its output uint8 [H, W].
_Inferred: TypeAlias = tuple[Frame, U8, U8]

#: What happens to a new frame while the queue before the engine is full: it waits; it replaces the oldest waiting one;
#: or at most one frame, the newest, ever waits.
POLICIES: Final = ("block", "drop-oldest", "latest")

#: In a file, audio may be stored up to this many seconds after the picture that it belongs to.
_LATE_AUDIO: Final = 2.0

#: Frames that may wait for the engine in addition to a batch.
_ROOM: Final = 4

#: Audio packets that frames without a result may pass on to the next one: a minute in most codecs. A consumer that
#: stalls for longer gets the newest ones; unbounded, the audio of an endless source would fill the memory.
_MAX_AUDIO_PACKETS: Final = 3000

#: The longest start, in seconds, and the widest stride, in frames: FFmpeg and movies count time in 64 and 32 bits.
_LONGEST: Final = 1_000_000_000
_WIDEST: Final = 1_000_000


@dataclass(frozen=True, kw_only=True)
class Reading:
    """Which frames of a source are read, and what happens to those for which there is no time.

    Attributes:
        start: Seconds to skip, in a source that has an end.
        stride: Read every ``stride``-th frame.
        max_frames: End after this many frames; None: at the source's end.
        policy: One of :data:`POLICIES`; None: ``block`` for a source that has an end, else ``drop-oldest``.
        stall: Seconds without a frame after which a live source reconnects.
        patience: Seconds without a frame after which a live source is given up; None: half a minute until the first
            frame, and never after it.
        smooth: See :class:`~petseg_runtime.video.smoothing.Smoother`.
    """

    start: float = 0.0
    stride: int = 1
    max_frames: int | None = None
    policy: str | None = None
    stall: float = 10.0
    patience: float | None = None
    smooth: float = 0.0

    def __post_init__(self) -> None:
        """Check every value, before a source is opened.

        Raises:
            UsageError: An unknown policy, or a value out of range.
        """
        for name, value, fits, wanted in (
            ("start", self.start, 0 <= self.start <= _LONGEST, f"0 to {_LONGEST}"),
            ("stall", self.stall, self.stall > 0, "above 0"),
            ("patience", self.patience, self.patience is None or self.patience >= 0, "0 or more"),
        ):
            if not fits:  # NaN does not
                raise UsageError(f"{name} is {value}; it must be a number of seconds, {wanted}")
        if self.policy is not None and self.policy not in POLICIES:
            raise UsageError(f"there is no policy {self.policy!r}; there are: {', '.join(POLICIES)}")
        for name, value, most, wanted in (
            ("stride", self.stride, _WIDEST, f"1 to {_WIDEST}"),
            ("max_frames", 1 if self.max_frames is None else self.max_frames, math.inf, "1 or more"),
        ):
            if not (isinstance(value, numbers.Integral) and 1 <= value <= most):  # also accepts NumPy's integers
                raise UsageError(f"{name} is {value!r}; it must be a whole number, {wanted}")
        check_strength(self.smooth)

    def of(self, *, endless: bool) -> Reading:
        """Fill in the default policy: a file loses no frame, and a live source does not fall behind."""
        return self if self.policy else replace(self, policy="drop-oldest" if endless else "block")


@dataclass(frozen=True, eq=False)
class Segmented:
    """A frame with its result.

    Attributes:
        frame: The frame, with its timestamp.
        result: Its segmentation, at the frame's size.
    """

    frame: Frame
    result: Segmentation


@dataclass
class Counts:
    """Where frames went: ``decoded == delivered + dropped + failed`` once the stream has ended.

    Attributes:
        decoded: Frames from the decoder, without those that a stride or a start skips.
        delivered: Frames with a result.
        dropped: Frames of a live source that were dropped in favour of newer ones.
        failed: Frames that could not be converted.
        failure: Why the last of these failed.
    """

    decoded: int = 0
    delivered: int = 0
    dropped: int = 0
    failed: int = 0
    failure: str | None = None


class _InputQueue:
    """A bounded queue of frames with a policy for what does not fit; see :data:`POLICIES`."""

    def __init__(self, policy: str, room: int, counts: Counts) -> None:
        self._policy, self._room, self._counts = policy, 1 if policy == "latest" else room, counts
        self._frames: deque[Frame] = deque()
        self._lock = threading.RLock()  # `with` it, not with the condition; see `MemoryBudget`
        self._changed = threading.Condition(self._lock)
        self._closed = False

    def put(self, frame: Frame) -> bool:
        """Add a frame, as the policy says; False: the queue is closed."""
        with self._lock:
            if self._policy == "block":
                self._changed.wait_for(lambda: self._closed or len(self._frames) < self._room)
            if self._closed:
                return False
            self._counts.decoded += 1
            if len(self._frames) >= self._room:
                dropped = self._frames.popleft()
                self._counts.dropped += 1
                # Its audio is passed on with the next frame.
                _prepend(dropped.sound, self._frames[0] if self._frames else frame)
            self._frames.append(frame)
            self._changed.notify_all()
            return True

    def take(self, most: int) -> list[Frame]:
        """Wait for a frame, then return up to ``most`` of those that wait; empty: the end."""
        with self._lock:
            self._changed.wait_for(lambda: self._closed or self._frames)
            taken = [self._frames.popleft() for _ in range(min(most, len(self._frames)))]
            self._changed.notify_all()
            return taken

    def fail(self, error: InputError) -> None:
        """Count a frame that was taken and could not be converted. May be called from any thread."""
        with self._lock:
            self._counts.failed += 1
            self._counts.failure = str(error)

    def close(self) -> None:
        with self._lock:
            self._closed = True
            self._changed.notify_all()


def _prepend(sound: list[Sound], frame: Frame) -> None:
    """Pass the audio of frames without a result on to the next frame; of too many packets, keep the newest."""
    if sound:
        frame.sound[:0] = sound
        del frame.sound[:-_MAX_AUDIO_PACKETS]


class _OutputQueue:
    """A bounded queue of frames with the model's input and output, for the consumer; None marks the end."""

    def __init__(self, room: int) -> None:
        self._room = room
        self._items: deque[_Inferred | None] = deque()
        self._lock = threading.RLock()  # `with` it, not with the condition; see `MemoryBudget`
        self._changed = threading.Condition(self._lock)
        self._closed = False

    def put(self, item: _Inferred | None) -> bool:
        with self._lock:
            self._changed.wait_for(lambda: self._closed or item is None or len(self._items) < self._room)
            if self._closed:
                return False
            self._items.append(item)
            self._changed.notify_all()
            return True

    def is_ready(self, seconds: float) -> bool:
        """Wait up to so many seconds for an item or the end; False: neither came."""
        with self._lock:
            return self._changed.wait_for(lambda: self._closed or bool(self._items), seconds)

    def take(self) -> _Inferred | None:
        """The next item; call :meth:`is_ready` first."""
        with self._lock:
            if self._closed:  # no item will come, not even the one that marks the end
                return None
            item = self._items.popleft()
            self._changed.notify_all()
            return item

    def close(self) -> None:
        with self._lock:
            self._closed = True
            self._changed.notify_all()


class Stream:
    """Segments frames, in order. Use it as a context manager, and iterate over it once.

    Once the iteration has ended, was left, or was closed by another thread, another iteration is empty.

    The decoder and the engine have a thread each; the consumer's is the third. :meth:`stop`, from any thread or a
    signal handler, ends the source: frames already read are still delivered, then the iteration ends.

    Attributes:
        counts: Where frames went, so far.
        damage: How much of a file, up to the last frame, could not be decoded; None: nothing is missing.
        whole: Whether the source was read to its end.
        stopped: Whether :meth:`stop` was called before the end.
        rest: Audio after the last frame.
        timings: How long each step took.
    """

    def __init__(
        self,
        frames: Iterable[Frame],
        segmenter: Segmenter,
        reading: Reading | None = None,
        *,
        mask_only: bool = False,
        idle: Callable[[], None] = lambda: None,
    ) -> None:
        """Start the threads.

        Args:
            frames: A :class:`~petseg_runtime.video.reader.VideoReader`, or a
                :class:`~petseg_runtime.video.live.LiveSource`; it is closed at the end, by the thread that reads it, or
                here if the stream cannot start.
            segmenter: The model; others may use it at the same time. Its number of threads is also used to convert
                frames.
            reading: Which frames are read; None: all. ``start``, ``stall`` and ``patience`` concern the source, not the
                stream. The default policy is ``block``: a file never loses a frame.
            mask_only: Results do not contain the frames' pixels: frames are converted at the model's size only.
            idle: Called by the iterating thread, twice a second while no result comes.
        """
        self._idle = idle
        try:
            self._set_up(frames, segmenter, reading or Reading(), mask_only)
        except BaseException:
            if close := getattr(frames, "close", None):
                close()
            raise
        # A program may exit without closing the stream: a thread that is inside an engine while Python shuts down would
        # abort the process.
        atexit.register(self.close)
        for thread in self._threads:
            thread.start()

    def _set_up(self, frames: Iterable[Frame], segmenter: Segmenter, reading: Reading, mask_only: bool) -> None:
        self.counts, self.timings = Counts(), Timings()
        self.rest: list[Sound] = []
        self.whole = self.stopped = False
        self.damage: str | None = None
        self._frames, self._segmenter, self._policy = frames, segmenter, reading.policy or "block"
        self._stride, self._max_frames, self._mask_only = int(reading.stride), reading.max_frames, mask_only
        # Frames of a live source are processed one by one: in a batch, the first would wait for the last.
        waits = self._policy == "block"
        self._batch = segmenter.describe().batch if waits else 1
        self._smoother = Smoother(reading.smooth) if reading.smooth else None
        self._inputs = _InputQueue(self._policy, self._batch + _ROOM, self.counts)
        self._outputs = _OutputQueue(self._batch + _ROOM if waits else 1)
        self._error: BaseException | None = None
        self._threads = [
            # The first may hang in a read that nothing can interrupt; the process must be able to exit all the same.
            threading.Thread(target=self._decode, name="petseg-decode", daemon=True),
            threading.Thread(target=self._infer, name="petseg-engine", daemon=True),
        ]

    def __iter__(self) -> Iterator[Segmented]:
        """Yield the frames with their results, in order.

        Raises:
            InputError: The source could not be read to its end; what was read has been delivered.
            EngineError: The engine failed.
        """
        convert = Converter(self._segmenter.threads)
        undelivered: list[Sound] = []
        try:
            while (item := self._next()) is not None:
                frame, image, probability = item
                _prepend(undelivered, frame)
                undelivered = []
                if result := self._finish(frame, image, probability, convert):
                    self.counts.delivered += 1
                    yield Segmented(frame, result)
                    self.timings.add("latency", time.monotonic() - frame.captured)
                else:
                    undelivered = frame.sound
            self.rest[:0] = undelivered
        finally:
            self.close()
        if self._error:
            raise self._error

    def _next(self) -> _Inferred | None:
        while not self._outputs.is_ready(LOOK_UP):
            self._idle()
        return self._outputs.take()

    def _finish(self, frame: Frame, image: U8, probability: U8, convert: Converter) -> Segmentation | None:
        start = time.perf_counter()
        try:
            pixels = None if self._mask_only else frame.pixels(convert)
        except InputError as error:
            self._inputs.fail(error)
            return None
        result = self._segmenter.finish(Prepared(image, pixels, *frame.size, frame.notes), probability)
        self.timings.add("finish", time.perf_counter() - start)
        return result

    def stop(self) -> None:
        """End the source; frames already read are still delivered."""
        self.stopped = self.stopped or not self.whole
        self._end_source()

    def _end_source(self) -> None:
        if stop := getattr(self._frames, "stop", None):
            stop()
        self._inputs.close()

    def close(self) -> None:
        """End everything, dropping what was not delivered. If Ctrl-C interrupts this, call it again to finish."""
        self._end_source()
        self._outputs.close()
        for thread, longest in ((self._threads[1], None), (self._threads[0], 1.0)):
            # A live source reports its state from `_decode`, which is in the first thread. None: it could not start.
            if thread is not threading.current_thread() and thread.ident is not None:
                thread.join(longest)
        atexit.unregister(self.close)  # last, because Ctrl-C may come before

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _decode(self) -> None:
        try:
            frames = iter(self._frames)
            for frame in self._every_nth(frames):
                self.timings.add("decode", frame.decoding)
                if not self._inputs.put(frame):
                    return
                if frame.number + 1 == self._max_frames:
                    self.damage = getattr(self._frames, "damage", None)
                    self._read_late_audio(frame, frames)
                    return
            self.rest += getattr(self._frames, "rest", [])
            self.damage = getattr(self._frames, "damage", None)
            self.whole = True
        except BaseException as error:  # noqa: BLE001 (raised again by __iter__)
            self._error = self._error or error
        finally:
            self._inputs.close()
            # Here, because closing what another thread is reading would crash the process.
            if close := getattr(self._frames, "close", None):
                close()

    def _every_nth(self, frames: Iterator[Frame]) -> Iterator[Frame]:
        """Yield every ``stride``-th frame; the audio of those between is in ``rest`` until the next one.

        A frame is shown for as long as those that are skipped after it, too. In a file, it is held back until these are
        known, because the file may end among them. A live source is not delayed, nor is the last of ``max_frames``,
        after which nothing is read: as many frames of the same duration are assumed.
        """
        held: Frame | None = None
        try:
            for number, frame in enumerate(frames):
                if number % self._stride:
                    self.rest += frame.sound
                    if held:
                        held.duration += frame.duration
                    continue
                if held:
                    yield held
                held = None
                frame.number = number // self._stride
                frame.sound[:0], self.rest = self.rest, []
                if self._stride > 1 and self._policy == "block" and frame.number + 1 != self._max_frames:
                    held = frame
                else:
                    frame.duration *= self._stride
                    yield frame
        except InputError:
            if held:  # what was read until then is valid
                yield held
            raise
        if held:
            yield held

    def _read_late_audio(self, last: Frame, frames: Iterator[Frame]) -> None:
        """Read on to the end of the audio that belongs to the last frame: files may store it after later frames."""
        end = (last.pts + last.duration) * last.time_base
        if last.track is None or self._policy != "block" or any(sound.time >= end for sound in last.sound):
            return
        with contextlib.suppress(InputError):  # damage behind the last frame does not matter
            for frame in frames:
                self.rest += frame.sound
                if frame.time > end + _LATE_AUDIO or any(sound.time >= end for sound in frame.sound):
                    return
            self.rest += getattr(self._frames, "rest", [])

    def _infer(self) -> None:
        convert = Converter(self._segmenter.threads)
        undelivered: list[Sound] = []
        try:
            while frames := self._inputs.take(self._batch):
                prepared = []
                for frame in frames:
                    _prepend(undelivered, frame)
                    undelivered = []
                    if ready := self._prepare(frame, convert):
                        prepared.append(ready)
                    else:
                        undelivered = frame.sound
                if prepared and not self._infer_batch(prepared):
                    return
            self.rest[:0] = undelivered
        except BaseException as error:  # noqa: BLE001 (raised again by __iter__)
            self._error = self._error or error
            self._inputs.close()
        finally:
            self._outputs.put(None)

    def _prepare(self, frame: Frame, convert: Converter) -> tuple[Frame, U8] | None:
        start = time.perf_counter()
        try:
            return frame, frame.pixels(convert, *self._segmenter.size)
        except InputError as error:
            self._inputs.fail(error)
            return None
        finally:
            self.timings.add("convert", time.perf_counter() - start)

    def _infer_batch(self, prepared: list[tuple[Frame, U8]]) -> bool:
        start = time.perf_counter()
        images = [image for _, image in prepared]
        outputs = self._segmenter.infer(images[0][None] if len(images) == 1 else np.stack(images))
        share = (time.perf_counter() - start) / len(prepared)
        for _ in prepared:
            self.timings.add("infer", share)
        for (frame, image), output in zip(prepared, outputs, strict=True):
            smoothed = self._smoother(image, output, frame.time) if self._smoother else output
            if not self._outputs.put((frame, image, smoothed)):
                return False
        return True
