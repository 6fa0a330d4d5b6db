"""Runs one video or stream from its source to its sink, and reports where its frames and its time went."""

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

#: Seconds between computations of the steps' percentiles while a source is being read.
_SUMMING_UP: Final = 1.0


@dataclass
class VideoReport:
    """What happened to one source.

    ``frames.decoded == written + frames.dropped + frames.failed``, unless its result could not be written, which is an
    ``error``.

    Attributes:
        source: Its name, without secrets.
        error: Why it ended early, or what is missing from a file; None if nothing is, or it was stopped.
        stopped: Whether it was stopped on request.
        frames: Where its frames went.
        written: Frames in the results; 0 if the result could not be written and no file is left. If some files are
            left, frames of one that was removed count, too.
        found: Frames with a pet.
        undecodable: Packets that the decoder rejected.
        connections: Number of connections of a live source.
        seconds: Wall time.
        steps: What each step took: ``sum``, ``p50``, ``p95``, ``p99`` in seconds; ``latency`` is from the decoder until
            the result is written.
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
        """Frames written per second."""
        return self.written / self.seconds if self.seconds else 0.0

    def as_json(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        return dataclasses.asdict(self) | {"paths": [str(path) for path in self.paths], "rate": round(self.rate, 3)}

    def so_far(self) -> dict[str, Any]:
        """Return the report of an unfinished run as JSON values; of its paths only the newest."""
        values = self.as_json()
        paths = values.pop("paths")
        return values | {"newest": paths[-1] if paths else None}


#: Called with each frame once it is written, and the report so far; with None twice a second while no frame comes.
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
    """Segment every frame of a source that the policy does not drop.

    Args:
        origin: The source.
        segmenter: The model.
        sink: Where results go; it is completed and closed.
        reading: Which frames are read.
        watch: Called with each frame, and while none comes.
        tell: Called with each change of a live source's state.
        begun: Called with the stream, whose :meth:`~petseg_runtime.video.stream.Stream.stop` ends it in order; the
            report, which is filled in even if an error ends the run; and how many seconds of the source will be read,
            if that is known.
        mask_only: Results do not contain the frames' pixels.

    Returns:
        The report. Its ``error`` is set if the source cannot be read, or not to its end, if part of a file is missing,
        or if the result cannot be written.

    Raises:
        OutputError: Nothing more can be written.
        EngineError: The engine failed.
    """
    report = VideoReport(origin.shown)
    start = time.perf_counter()
    states = _StateRelay(tell)
    try:
        frames = open_frames(origin, reading, threads=segmenter.threads, tell=states.tell_of_source)
    except InputError as error:
        report.error = str(error)
        return report

    def update() -> None:
        report.undecodable = frames.undecodable
        report.connections = frames.connections if isinstance(frames, LiveSource) else 1
        report.files = sink.files
        report.seconds = time.perf_counter() - start

    def idle() -> None:
        update()
        watch(None, report)

    reading = reading.of(endless=origin.endless)
    stream = Stream(frames, segmenter, reading, mask_only=mask_only, idle=idle)
    report.frames, report.paths, report.notes = stream.counts, sink.paths, sink.notes

    try:
        with sink, stream:
            begun(stream, report, _seconds(frames, reading))
            _write(stream, sink, report, watch, update)
    except InputError as error:  # raised by the sink
        report.error = f"{origin.shown}: {error}"
        if not sink.files:  # incomplete files were removed
            report.written = report.found = 0
    except Exception as error:
        if origin.endless:
            states.end("the output is read no more" if isinstance(error, BrokenPipeError) else str(error))
        raise
    finally:
        report.stopped = stream.stopped
        report.steps = stream.timings.summary()
        update()
    if origin.endless:
        states.end(report.error or (STOPPED if stream.stopped else "frame limit reached"))
    if not report.error and not report.stopped and (why := _missing(report, stream, origin)):
        report.error = f"{origin.shown}: {why}"
    return report


def _missing(report: VideoReport, stream: Stream, origin: Origin) -> str | None:
    """What is missing from the results of a source that was read to its end; None: nothing that should be there."""
    counts = stream.counts
    if not report.written:  # not for lack of frames, which is an error of the source
        return f"no frame was written: {counts.failure}"
    if origin.endless:  # some packet is always lost
        return None
    failed = f"{counts.failed} of {counts.decoded} frames could not be converted ({counts.failure})"
    lost = [what for what in (stream.damage, failed if counts.failed else None) if what]
    return f"{', '.join(lost)}; the rest was written" if lost else None


def _write(stream: Stream, sink: VideoSink, report: VideoReport, watch: Watch, update: Callable[[], None]) -> None:
    """Write all results of a stream, and keep the report up to date."""
    summarized = time.monotonic()
    for segmented in _read_until_error(stream, report):
        before = time.perf_counter()
        sink.write(segmented.frame, segmented.result)
        stream.timings.add("write", time.perf_counter() - before)
        report.written += 1
        report.found += segmented.result.found
        report.notes += [note for note in segmented.result.notes if note not in report.notes]
        update()
        if time.monotonic() - summarized >= _SUMMING_UP:  # it takes all frames so far into account, which is slow
            report.steps = stream.timings.summary()
            summarized = time.monotonic()
        watch(segmented, report)
    sink.end(stream.rest, whole=stream.whole or report.error is not None)


def _read_until_error(stream: Stream, report: VideoReport) -> Iterator[Segmented]:
    """Yield all that can be read; if the source fails, put the reason into the report."""
    try:
        yield from stream
    except InputError as error:
        report.error = str(error)


class _StateRelay:
    """Passes state changes on until the source has ended. Both the source and the run report that; the first counts.

    The source reports from the thread that decodes, which a closing stream waits for a second at most.
    """

    def __init__(self, tell: Tell) -> None:
        self._tell, self._ended, self._lock = tell, False, threading.Lock()
        self._attempt = 0

    def tell_of_source(self, change: StateChange) -> None:
        """Pass on what the source reports, except that it was stopped; the run knows why (error, frame limit)."""
        if change.reason != STOPPED:
            self.tell(change)

    def end(self, reason: str) -> None:
        """Report why the run takes no more frames."""
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
