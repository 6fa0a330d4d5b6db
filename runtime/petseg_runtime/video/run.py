"""One video or stream from its source to its sink, with a report of where its frames and its time went."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TypeAlias

from petseg_runtime.errors import InputError
from petseg_runtime.segmenter import Segmenter
from petseg_runtime.sources import Origin
from petseg_runtime.video.live import STOPPED, LiveSource, StateChange, Tell, open_frames
from petseg_runtime.video.reader import VideoReader
from petseg_runtime.video.sinks import VideoSink
from petseg_runtime.video.stream import Counts, Reading, Segmented, Stream

__all__ = ["VideoReport", "segment_video"]

#: Seconds from one computation of the steps' percentiles to the next, while a source goes on.
_SUMMING_UP: Final = 1.0


@dataclass
class VideoReport:
    """What became of one source.

    ``frames.decoded == written + frames.dropped + frames.failed``, unless its result could not be written, which is an
    ``error``.

    Attributes:
        source: Its name, without secrets.
        error: Why it ended before its end, or what of a file is lost; None if nothing is, or it was stopped.
        stopped: Whether it was told to stop.
        frames: Where its frames went.
        written: Frames in the results; 0 where the result could not be written and no file is left. Where some files
            are left, the frames of one that was removed count, too.
        found: Frames with a pet.
        undecodable: Packets that the decoder refused.
        connections: Of a live source.
        seconds: Wall time.
        steps: What each step took: ``sum``, ``p50``, ``p95``, ``p99`` in seconds; ``latency`` is from the decoder to
            the result in its place.
        paths: The results; of an endless source the newest thousand.
        files: How many there are.
        notes: What had to be left out, or decided.
    """

    source: str
    error: str | None = None
    stopped: bool = False
    frames: Counts = field(default_factory=Counts)
    written: int = 0
    found: int = 0
    undecodable: int = 0
    connections: int = 0
    seconds: float = 0.0
    steps: dict[str, dict[str, float]] = field(default_factory=dict)
    paths: list[Path] = field(default_factory=list)
    files: int = 0
    notes: list[str] = field(default_factory=list)

    @property
    def rate(self) -> float:
        """Frames a second that were written."""
        return self.written / self.seconds if self.seconds else 0.0

    def as_json(self) -> dict[str, Any]:
        """JSON values."""
        return dataclasses.asdict(self) | {"paths": [str(path) for path in self.paths], "rate": round(self.rate, 3)}

    def so_far(self) -> dict[str, Any]:
        """The report of a run that is still going on, as JSON values; of its paths only the newest."""
        values = self.as_json()
        paths = values.pop("paths")
        return values | {"newest": paths[-1] if paths else None}


#: Told of each frame when it is written, with the report so far; and of none, twice a second, while none comes.
Watch: TypeAlias = Callable[[Segmented | None, VideoReport], None]


def segment_video(
    origin: Origin,
    segmenter: Segmenter,
    sink: VideoSink,
    reading: Reading,
    *,
    watch: Watch = lambda segmented, report: None,
    tell: Tell = lambda change: None,
    begun: Callable[[Stream, VideoReport, float | None], None] = lambda stream, report, seconds: None,
    mask_only: bool = False,
) -> VideoReport:
    """Segment every frame of a source that the policy lets through.

    Args:
        origin: The source.
        segmenter: The model.
        sink: Where results go; it is completed and closed.
        reading: Which frames are taken.
        watch: Told of each frame, and while none comes.
        tell: Told of each change of a live source's state.
        begun: Given the stream, whose :meth:`~petseg_runtime.video.stream.Stream.stop` ends it in order; the report,
            which is filled in also where an error ends it; and how many seconds of the source will be read, if that is
            known.
        mask_only: The frames themselves are not part of the results.

    Returns:
        The report; a source that cannot be read, or not to its end, or whose result cannot be written, or a file of
        which something is lost, is an error in it.

    Raises:
        OutputError: Nothing more can be written.
        EngineError: The engine failed.
    """
    report = VideoReport(origin.shown)
    start = time.perf_counter()
    states = _States(tell)
    try:
        frames = open_frames(origin, reading, threads=segmenter.threads, tell=states.tell_of_source)
    except InputError as error:
        report.error = str(error)
        return report

    def bring_up_to_date() -> None:
        report.undecodable = frames.undecodable
        report.connections = frames.connections if isinstance(frames, LiveSource) else 1
        report.files = sink.files
        report.seconds = time.perf_counter() - start

    def idle() -> None:
        bring_up_to_date()
        watch(None, report)

    reading = reading.of(endless=origin.endless)
    stream = Stream(frames, segmenter, reading, mask_only=mask_only, idle=idle)
    report.frames, report.paths, report.notes = stream.counts, sink.paths, sink.notes

    try:
        with sink, stream:
            begun(stream, report, _seconds(frames, reading))
            _write(stream, sink, report, watch, bring_up_to_date)
    except InputError as error:  # of the sink
        report.error = f"{origin.shown}: {error}"
        if not sink.files:  # what was begun is removed
            report.written = report.found = 0
    except Exception as error:
        if origin.endless:
            states.end(str(error))
        raise
    finally:
        report.stopped = stream.stopped
        report.steps = stream.timings.summary()
        bring_up_to_date()
    if origin.endless:
        states.end(report.error or (STOPPED if stream.stopped else "enough frames"))
    if not report.error and not report.stopped and (why := _lost(report, stream, origin)):
        report.error = f"{origin.shown}: {why}"
    return report


def _lost(report: VideoReport, stream: Stream, origin: Origin) -> str | None:
    """What is missing in the results of a source that was read to its end; None: nothing that should be there."""
    counts = stream.counts
    if not report.written:
        return f"not one frame: {counts.failure or 'it is empty'}"
    if origin.endless:  # there is always something
        return None
    failed = f"{counts.failed} of {counts.decoded} frames could not be converted ({counts.failure})"
    lost = [what for what in (stream.damage, failed if counts.failed else None) if what]
    return f"{', '.join(lost)}; the rest was written" if lost else None


def _write(
    stream: Stream, sink: VideoSink, report: VideoReport, watch: Watch, bring_up_to_date: Callable[[], None]
) -> None:
    """Write all that a stream gives, and say so in the report."""
    summed_up = time.monotonic()
    for segmented in _readable(stream, report):
        before = time.perf_counter()
        sink.write(segmented.frame, segmented.result)
        stream.timings.add("write", time.perf_counter() - before)
        report.written += 1
        report.found += segmented.result.found
        report.notes += [note for note in segmented.result.notes if note not in report.notes]
        bring_up_to_date()
        if time.monotonic() - summed_up >= _SUMMING_UP:  # of all frames so far, which takes longer
            report.steps = stream.timings.summary()
            summed_up = time.monotonic()
        watch(segmented, report)
    sink.end(stream.rest, whole=stream.whole or report.error is not None)


def _readable(stream: Stream, report: VideoReport) -> Iterator[Segmented]:
    """All that can be read; why that ends before the source does is said in the report."""
    try:
        yield from stream
    except InputError as error:
        report.error = str(error)


class _States:
    """Passes a source's state changes on until it has ended, which both the source and the run tell: the first counts.

    The source tells from the thread that decodes, for which a stream that is left waits a second at most.
    """

    def __init__(self, tell: Tell) -> None:
        self._tell, self._ended, self._lock = tell, False, threading.Lock()
        self._attempt = 0

    def tell_of_source(self, change: StateChange) -> None:
        """Pass on what the source tells, but that it was stopped: why (an error, enough frames) it does not know."""
        if change.reason != STOPPED:
            self.tell(change)

    def end(self, reason: str) -> None:
        """Tell what the run knows: why it takes no more."""
        self.tell(StateChange("ended", reason, self._attempt))

    def tell(self, change: StateChange) -> None:
        with self._lock:
            if not self._ended:
                self._ended, self._attempt = change.state == "ended", change.attempt
                self._tell(change)


def _seconds(frames: VideoReader | LiveSource, reading: Reading) -> float | None:
    if isinstance(frames, LiveSource) or frames.info.duration is None:
        return None
    return max(0.0, frames.info.duration - reading.start)
