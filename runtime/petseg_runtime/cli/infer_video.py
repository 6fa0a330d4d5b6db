"""The part of ``petseg infer`` that processes videos, cameras and network streams."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from petseg_runtime.cli.text import SCHEMA_VERSION, bar, watched
from petseg_runtime.errors import EXIT_INTERRUPTED, EXIT_PARTIAL, EXIT_TERMINATED, InputError, OutputError, PetsegError
from petseg_runtime.host import LOOK_UP
from petseg_runtime.signals import ECHO, EXITS, HANG_UP, handled
from petseg_runtime.text import shown

if TYPE_CHECKING:
    from petseg_runtime.journal import Journal
    from petseg_runtime.segmenter import Segmenter
    from petseg_runtime.sinks import Background
    from petseg_runtime.sources import Item, Origin
    from petseg_runtime.video.live import StateChange
    from petseg_runtime.video.run import VideoReport
    from petseg_runtime.video.sinks import VideoSink
    from petseg_runtime.video.stream import Reading, Segmented, Stream

__all__ = ["Output", "Videos", "check_places"]

#: Seconds between two statistics events of a live source.
_STATISTICS: Final = 10.0


@dataclass(frozen=True, kw_only=True)
class Output:
    """Which result each video gets, and where.

    Attributes:
        folder: The output folder; None: raw frames go to standard output.
        kind: The value of ``--as``.
        format: The value of ``--format``, or the default of the kind.
        background: The value of ``--background``.
        segment: Seconds in one file.
        audio: Copy the sound into the results.
        reserved: Real paths that further movies of a source must not use.
        beside: Real paths of the folders with sources, where an existing file may be the user's.
    """

    folder: Path | None
    kind: str
    format: str
    background: Background | None = None
    segment: float | None = None
    audio: bool = True
    reserved: frozenset[str] = frozenset()
    beside: frozenset[str] = frozenset()

    def of(self, origin: Origin, threads: int | None = None) -> VideoSink:
        """Returns the sink for one source.

        Args:
            origin: The source.
            threads: CPU threads for painting and encoding; None: all.
        """
        from petseg_runtime import sinks
        from petseg_runtime.video.looks import Painter
        from petseg_runtime.video.movie import MOVIES, MovieSink
        from petseg_runtime.video.numbered import next_number
        from petseg_runtime.video.sinks import LinesSink, PicturesSink, RawSink

        place = self.place(origin) if self.folder else Path("-")
        if self.format == "ndjson":
            return LinesSink(self._files(origin, place), endless=origin.endless, segment=self.segment)
        if self.format in MOVIES:
            return MovieSink(
                self._files(origin, place),
                Painter(self.kind, self.background, threads),
                endless=origin.endless,
                segment=self.segment,
                audio=self.audio,
                threads=threads,
            )
        picture = sinks.Picture(self.kind, self.format, sinks.render_of(self.kind, self.background))
        if self.folder is None:
            return RawSink(sys.stdout.buffer, picture)
        folder = place / f"{next_number(place):04d}" if origin.endless else place
        return PicturesSink(folder, picture)

    @property
    def mask_only(self) -> bool:
        """Whether frames are not needed in RGB; movies are painted in YUV."""
        from petseg_runtime.sinks import KINDS
        from petseg_runtime.video.movie import MOVIES

        return self.format in (*MOVIES, "ndjson") or not KINDS[self.kind].needs_photo

    def place(self, origin: Origin) -> Path:
        """The path of one source's result: a file, or a folder if there are or may be several files."""
        assert self.folder is not None
        name = self.folder / origin.name
        return name.with_name(f"{name.name}.{self.format}") if self.is_one_file(origin) else name

    def is_one_file(self, origin: Origin) -> bool:
        """Whether the result of a source is one file, not a folder of files."""
        from petseg_runtime.video.movie import MOVIES

        return not origin.endless and self.segment is None and self.format in (*MOVIES, "ndjson")

    def is_beside(self, path: Path) -> bool:
        """Whether a path is in one of the folders with sources."""
        return os.path.realpath(path.parent) in self.beside

    def _files(self, origin: Origin, place: Path) -> Iterator[Path]:
        """Yields the paths of a source's movies, or files of lines, in order."""
        from petseg_runtime.video.numbered import numbered, pieces

        if origin.endless:
            return numbered(place, self.format)
        if self.segment is not None:
            return pieces(place, self.format)
        # Frames may change their size within a file, too.
        more = (place.with_name(f"{place.stem}-{number}{place.suffix}") for number in itertools.count(2))
        return itertools.chain([place], filter(self._is_free, more))

    def _is_free(self, path: Path) -> bool:
        """Whether a further movie may have this path: it replaces nothing of this run, and no file beside a source."""
        taken = self.is_beside(path) and os.path.lexists(path)
        return not taken and os.path.realpath(path) not in self.reserved


@dataclass
class Videos:
    """A run over videos, one after the other, or over live sources, all at the same time.

    Attributes:
        segmenter: The model.
        output: Which results they get, and where.
        reading: Which frames are used.
        as_json: Print every event as JSON on standard output.
        quiet: Print errors only.
        verbose: Also print the time that each step took.
        reports: One for each source that was started.
        skipped: How many videos had their result already.
    """

    segmenter: Segmenter
    output: Output
    reading: Reading
    as_json: bool
    quiet: bool
    verbose: bool
    reports: list[VideoReport] = field(default_factory=list, init=False)
    skipped: int = field(default=0, init=False)
    _streams: set[Stream] = field(default_factory=set, init=False)
    _running: dict[str, VideoReport] = field(default_factory=dict, init=False)  # by name: the report so far
    _problems: list[Exception] = field(default_factory=list, init=False)
    _states: dict[str, str] = field(default_factory=dict, init=False)  # by name: the last state of a live source
    _reported: dict[str, float] = field(default_factory=dict, init=False)  # by name: when statistics were printed last
    _endless: bool = field(default=False, init=False)
    _signal: int | None = field(default=None, init=False)
    _since: float = field(default=0.0, init=False)  # when the signal came
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False)
    # May be held for a long time if the reader of standard output is slow.
    _printing: threading.Lock = field(default_factory=threading.Lock, init=False)

    def run(self, origins: Sequence[Origin], items: dict[str, Item], journal: Journal | None) -> int | None:
        """Segment all sources.

        Args:
            origins: The sources; live ones run at the same time.
            items: The files among them, by name; used for the journal, and to report files that cannot be read.
            journal: Which of the files are done already.

        Returns:
            The exit code that a signal asks for; None: no signal came.

        Raises:
            OutputError: Results of files cannot be written. For live sources, see :meth:`problem_code`.
            EngineError: The engine failed.
        """
        with self._signals():
            self._endless = any(origin.endless for origin in origins)
            if self._endless:
                self._all_at_once(origins)
            else:
                for origin in origins:
                    if self._signal is None:
                        self._file(origin, items.get(str(origin.name)), journal)
        return None if self._signal is None else EXITS[self._signal]

    def problem_code(self) -> int | None:
        """The exit code if live sources have failed, even if a signal ended the others; None: none failed.

        It is that of the first error whose cause was not the source itself; otherwise it says whether some or all
        sources have failed.

        Raises:
            Exception: That first error, if it is no :class:`PetsegError` (the reader of standard output has gone away,
                for example).
        """
        if self._problems:
            if isinstance(self._problems[0], PetsegError):
                return self._problems[0].exit_code
            raise self._problems[0]
        if self._endless and self.failed:
            return EXIT_PARTIAL if len(self.failed) < len(self.reports) else InputError.exit_code
        return None

    @property
    def failed(self) -> list[VideoReport]:
        """The reports with an error; the frames that could be read are in the results."""
        return [report for report in self.reports if report.error]

    @property
    def done(self) -> int:
        """How many sources were processed to their end."""
        return sum(not report.error and not report.stopped for report in self.reports)

    def summary(self) -> dict[str, int]:
        """The counts of the summary event."""
        stopped = sum(report.stopped and not report.error for report in self.reports)
        counts = {"done": self.done, "failed": len(self.failed), "stopped": stopped, "skipped": self.skipped}
        return {"count": len(self.reports) + self.skipped, **counts}

    def _file(self, origin: Origin, item: Item | None, journal: Journal | None) -> None:
        if item and item.problem:
            from petseg_runtime.video.run import VideoReport

            self.reports.append(VideoReport(origin.shown, item.problem))
            self._print_end(origin, self.reports[-1])
            return
        if not journal:
            self._one(origin)
            return
        place = self.output.place(origin)
        result = place if self.output.is_one_file(origin) else None
        if item and journal.finished(item, result) and place.exists():
            self.skipped += 1
            return
        if self.output.is_beside(place):
            journal.begin(place)
        report = self._one(origin)
        if item and not report.error and not report.stopped:
            journal.add(item, result)

    def _all_at_once(self, origins: Sequence[Origin]) -> None:
        # Daemon threads, because a second signal ends the process at once.
        threads = [
            threading.Thread(target=self._live, args=(o,), name=f"petseg-{o.name}", daemon=True) for o in origins
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            while thread.is_alive():
                thread.join(LOOK_UP)

    def _live(self, origin: Origin) -> None:
        try:
            self._one(origin)
        except Exception as error:  # noqa: BLE001 (reported now, raised at the end: others may go on for months)
            self._problems.append(error)
            with contextlib.suppress(OSError):  # the reader of the report has gone away
                self._report_failure(origin, error)

    def _one(self, origin: Origin) -> VideoReport:
        from petseg_runtime.video.run import segment_video

        with self._stoppable() as begin, _Progress(origin, self.reading, self._silent) as progress:

            def begun(stream: Stream, report: VideoReport, seconds: float | None) -> None:
                self._running[str(origin.name)] = report
                progress.expect(seconds)
                begin(stream)

            def watch(segmented: Segmented | None, report: VideoReport) -> None:
                if segmented:
                    progress.advance(segmented)
                    self._print_frame(origin, segmented)
                self._print_statistics(origin, report)

            report = segment_video(
                origin,
                self.segmenter,
                self.output.of(origin, self.segmenter.threads),
                self.reading,
                watch=watch,
                tell=lambda change: self._print_state(origin, change),
                begun=begun,
                mask_only=self.output.mask_only,
            )
        self._running[str(origin.name)] = report
        self.reports.append(report)
        self._print_end(origin, report)
        return report

    @property
    def _silent(self) -> bool:
        # No progress bar among lines of JSON on the same terminal, either.
        return (
            self.quiet
            or self.output.folder is None
            or (self.as_json and sys.stdout is not None and sys.stdout.isatty())
        )

    @contextlib.contextmanager
    def _stoppable(self) -> Iterator[Callable[[Stream], None]]:
        """Yields a function that registers a stream, so that signals stop it until the block ends."""
        streams: list[Stream] = []

        def begin(stream: Stream) -> None:
            streams.append(stream)
            with self._lock:
                self._streams.add(stream)
            if self._signal is not None:
                stream.stop()

        try:
            yield begin
        finally:
            with self._lock:
                self._streams.difference_update(streams)

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """Stop all streams cleanly at the first signal of :data:`EXITS`; exit at once at a second Ctrl-C or SIGTERM."""

        def stop(number: int, frame: object) -> None:
            now = time.monotonic()
            if self._signal is not None:
                # The system, the shell and ssh may each send a SIGHUP.
                if number == HANG_UP or now - self._since < ECHO:
                    return
                raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(EXIT_TERMINATED)
            self._since, self._signal = now, number
            # In another thread, because this handler interrupts the main thread, which may hold a lock just now.
            threading.Thread(target=self._stop_all, daemon=True).start()

        with handled(stop, *EXITS):  # outside the main thread, this changes nothing
            try:
                yield
            except (KeyboardInterrupt, SystemExit) as end:  # incomplete files have been removed by now
                # Python's own exit would flush standard output: it would wait forever if nobody reads that, and abort
                # if another thread is writing to it.
                os._exit(EXIT_TERMINATED if isinstance(end, SystemExit) else EXIT_INTERRUPTED)

    def _stop_all(self) -> None:
        with self._lock:
            streams = list(self._streams)
        for stream in streams:
            stream.stop()

    def _print_event(self, origin: Origin, event: str, **about: Any) -> None:
        # With the name, because two URLs may be equal without their secrets.
        source = {"input": origin.shown, "name": str(origin.name)}
        line = json.dumps({"schema_version": SCHEMA_VERSION, **source, "event": event, **about})
        with self._printing:
            click.echo(line)

    def _print_frame(self, origin: Origin, segmented: Segmented) -> None:
        if not self.as_json:
            return
        from petseg_runtime.video.sinks import frame_record

        record = frame_record(segmented.frame, segmented.result)
        latency = {"latency": round(time.monotonic() - segmented.frame.captured, 4)} if origin.endless else {}
        self._print_event(origin, "frame", **record, **latency)

    def _print_statistics(self, origin: Origin, report: VideoReport) -> None:
        """Print the statistics of a live source every ten seconds, even while no frame arrives."""
        name = str(origin.name)
        if self.as_json and origin.endless and report.seconds - self._reported.get(name, 0.0) >= _STATISTICS:
            self._reported[name] = report.seconds
            self._print_event(origin, "statistics", state=self._states.get(name), **report.so_far())

    def _print_state(self, origin: Origin, change: StateChange) -> None:
        self._states[str(origin.name)] = change.state
        if self.as_json:
            about = {name: value for name, value in vars(change).items() if value is not None}
            self._print_event(origin, "state", **about)
        elif not self.quiet:
            size = f", {change.width} x {change.height}" if change.width else ""
            again = f"; again in {change.retry_in:.1f} s" if change.retry_in else ""
            reason = f" ({shown(change.reason)})" if change.reason else ""
            click.echo(f"petseg: {shown(origin.shown)}: {change.state}{size}{reason}{again}", err=True)

    def _report_failure(self, origin: Origin, error: Exception) -> None:
        """Count and report a live source that failed for a reason other than the source itself."""
        if isinstance(error, BrokenPipeError):
            return  # the reader has gone away: that is no failure, and nobody would read the report
        from petseg_runtime.video.run import VideoReport

        report = self._running.get(str(origin.name)) or VideoReport(origin.shown)
        what = str(error) if isinstance(error, PetsegError) else f"{type(error).__name__}: {error}"
        report.error = f"{origin.shown}: {what}"
        if not any(report is counted for counted in self.reports):  # it is counted if printing its end failed
            self.reports.append(report)
        self._print_end(origin, report)

    def _print_end(self, origin: Origin, report: VideoReport) -> None:
        if report.error:
            click.echo(f"petseg: {shown(report.error)}", err=True)
        for note in () if self.quiet else report.notes:
            click.echo(f"petseg: {shown(origin.shown)}: {note}", err=True)
        if self.as_json:
            self._print_event(origin, "video", **report.as_json())
        elif not self.quiet:
            click.echo(_line(report), err=self.output.folder is None)
        if self.verbose:
            for step, taken in report.steps.items():
                p50, p95, p99 = (1e3 * taken[p] for p in ("p50", "p95", "p99"))
                click.echo(
                    f"{step:>8}: median {p50:.1f} ms, p95 {p95:.1f} ms, p99 {p99:.1f} ms, total {taken['sum']:.2f} s",
                    err=True,
                )


def _line(report: VideoReport) -> str:
    """Describes the outcome of a video, for people."""
    frames = report.frames
    where = f" -> {shown(report.paths[0])}" if report.paths else ""
    more = f" and {report.files - 1} more" if report.files > 1 else ""
    lost = [f"{count} {word}" for count, word in ((frames.dropped, "dropped"), (frames.failed, "failed")) if count]
    pet = f", {100 * report.found / report.written:.0f} % with a pet" if report.written else ""
    ended = "stopped, " if report.stopped else ""
    counts = "".join(f", {text}" for text in lost)
    return (
        f"{shown(report.source)}{where}{more}  {ended}{report.written} frames{counts}{pet}, {report.rate:.1f} frames/s"
    )


class _Progress:
    """A progress bar on a terminal, over the frames that were asked for or the duration of the video, if it is known.

    Live sources have none: they have no end, and several bars would overwrite each other.
    """

    def __init__(self, origin: Origin, reading: Reading, quiet: bool) -> None:
        self._bar: Any = None
        self._frames = reading.max_frames
        if watched() and not quiet and not origin.endless:
            from rich.markup import escape
            from rich.progress import Progress, TextColumn

            self._bar = bar(*Progress.get_default_columns(), TextColumn("{task.fields[frames]} frames"))
            self._task = self._bar.add_task(escape(shown(origin.shown)), total=None, frames=0)

    def __enter__(self) -> _Progress:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar:
            self._bar.stop()

    def expect(self, seconds: float | None) -> None:
        """Set the duration of the video; None: unknown."""
        if self._bar:
            self._bar.update(self._task, total=self._frames or seconds)

    def advance(self, segmented: Segmented) -> None:
        """Count one more frame."""
        if self._bar:
            frame = segmented.frame
            done = frame.number + 1 if self._frames else frame.time
            self._bar.update(self._task, completed=done, frames=frame.number + 1)


def check_places(
    output: Output, origins: Sequence[Origin], photos: Mapping[str, str], own: Container[Path] = ()
) -> Output:
    """Reject results that would replace a source, each other, or files that somebody may have put beside the sources.

    Args:
        output: Which results the videos get, and where.
        origins: The videos.
        photos: The photos of the same run, and the path of each one's result.
        own: Existing files and folders that petseg has written, which a resumed run may replace.

    Returns:
        The output, with the paths and folders in which its further movies must not replace anything.

    Raises:
        OutputError: Results would replace something; nothing is written yet.
    """
    if output.folder is None:
        return output
    from petseg_runtime.files import real_paths
    from petseg_runtime.video.numbered import claimable

    real = real_paths()
    files = [o.target for o in origins if isinstance(o.target, str) and o.options is None]
    sources = {real(path): path for path in (*files, *photos)}
    places = {real(output.place(origin)): origin.shown for origin in origins}
    results = {real(result): photo for photo, result in photos.items()} | places
    with_sources, with_results = _folders(sources), _folders(results)
    beside = frozenset(os.path.dirname(source) for source in sources)  # noqa: PTH120 (strings are compared, not paths)
    output = dataclasses.replace(output, reserved=frozenset(sources.keys() | results.keys()), beside=beside)
    for origin in origins:
        place = output.place(origin)
        there = real(place)
        if there in sources:
            raise OutputError(f"{place}: the result of {origin.shown} would replace a source; choose another --output")
        if other := with_results.get(there):
            raise OutputError(f"{place}: results of {origin.shown} and {other} would mix; use one --output for each")
        if not origin.endless and output.is_beside(place) and os.path.lexists(place) and place not in own:
            raise OutputError(f"{place}: already exists beside the videos; move it, or choose another --output")
        if origin.endless or output.is_one_file(origin):
            continue
        if source := with_sources.get(there):
            raise OutputError(
                f"{place}: results of {origin.shown} would mix with sources such as {source}; choose another --output"
            )
        claimable(place)
    return output


def _folders(files: Mapping[str, str]) -> dict[str, str]:
    """Maps all folders above the files, at every level, to the value of one file in them."""
    found: dict[str, str] = {}
    for path, said in files.items():
        folder = os.path.dirname(path)  # noqa: PTH120 (there may be a million; strings are faster than paths)
        while folder not in found:  # if it is there, so are all folders above it
            found[folder] = said
            folder = os.path.dirname(folder)  # noqa: PTH120
    return found
