"""Sinks for a video's results: the protocol, what all file sinks share, pictures, lines of JSON, and raw frames."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Final, Protocol, Self

import numpy as np

from petseg_runtime.errors import OutputError
from petseg_runtime.files import replacing, synced, synced_folder, write_all
from petseg_runtime.result import Segmentation
from petseg_runtime.sinks import Picture
from petseg_runtime.video.errors import unwritable, writing_errors
from petseg_runtime.video.frame import Frame
from petseg_runtime.video.numbered import PICTURE_DIGITS, SEGMENT_DIGITS, claim, create_new, drop_later, zero_padded
from petseg_runtime.video.sound import Sound

__all__ = ["FileSink", "LinesSink", "PicturesSink", "RawSink", "VideoSink", "frame_record"]

#: How many files of an endless source are remembered: in a year, one per minute makes half a million.
_NEWEST: Final = 1000


class VideoSink(Protocol):
    """Writes one source's frames, in order, from one thread. A context manager: leaving it completes the files."""

    @property
    def notes(self) -> list[str]:
        """What had to be left out, and why."""

    @property
    def paths(self) -> list[Path]:
        """The files that were created; of an endless source the newest ones."""

    @property
    def files(self) -> int:
        """How many files were created."""

    def write(self, frame: Frame, result: Segmentation) -> None:
        """Write a frame.

        Raises:
            InputError: The result of this source cannot be written; those of others can.
            OutputError: Nothing more can be written.
        """

    def end(self, sound: Sequence[Sound], *, whole: bool) -> None:
        """Write the audio after the last frame; raises the same errors as ``write``.

        Args:
            sound: What came after that frame.
            whole: The source has ended; else the audio is cut at the end of the last frame.
        """

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class FileSink:
    """Base of sinks that write files. Leaving it completes open files; an error removes them, unless endless."""

    def __init__(self, *, endless: bool = False) -> None:
        self.notes: list[str] = []
        self.paths: list[Path] = []
        self.files = 0
        self._endless = endless
        self._open: list[tuple[Path, contextlib.ExitStack]] = []  # where each file is written, and what completes it
        self._disk: ThreadPoolExecutor | None = None
        self._syncing: list[tuple[Path, Future[None]]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None or self._endless:
            self.close()
            return
        opened, self._open = self._open, []
        for path, file in opened:
            with contextlib.suppress(OSError):  # where open files cannot be removed, it is removed below
                # Before closing: moving the index of a long movie to its front takes long.
                path.unlink(missing_ok=True)
            with contextlib.suppress(Exception):  # the first error is the one to report
                file.__exit__(kind, error, trace)

    def end(self, sound: Sequence[Sound], *, whole: bool) -> None:
        """Do nothing: these files have no audio."""

    def close(self) -> None:
        """Complete all files. If one cannot be completed, the others still are, and then its error is raised."""
        try:
            self._close_open()
        finally:
            if self._disk:
                self._disk.shutdown()

    def _close_open(self) -> None:
        try:
            while self._open:
                self._open.pop(0)[1].close()
            self._collect_synced(wait=True)
        except BaseException:
            if self._open:
                with contextlib.suppress(Exception):  # the first error is the one to report
                    self._close_open()
            raise

    def _sync_in_background(self, path: Path) -> None:
        """Sync a complete file to disk, in another thread: on a slow disk that takes longer than a frame."""
        self._disk = self._disk or ThreadPoolExecutor(1, "petseg-disk")
        self._syncing.append((path, self._disk.submit(_sync, path)))
        self._collect_synced(wait=False)

    def _collect_synced(self, *, wait: bool) -> None:
        while self._syncing and (wait or self._syncing[0][1].done()):
            path, done = self._syncing.pop(0)
            with writing_errors(path):
                done.result()

    @contextlib.contextmanager
    def _created(self, path: Path) -> Iterator[tuple[contextlib.ExitStack, Path]]:
        """Create a file; yields what completes it, and where to write: a temporary file, or ``path`` if endless."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(writing_errors(path))
            path.parent.mkdir(parents=True, exist_ok=True)
            if self._endless:
                stack.callback(self._sync_in_background, path)
                stack.push(lambda kind, error, trace: _drop_empty(path) if kind else None)
                target = path
            else:
                stack.push(lambda kind, error, trace: self._forget(path) if kind else None)
                stack.enter_context(synced_folder(path.parent))
                target = stack.enter_context(replacing(path))
                stack.enter_context(synced(target))
            yield stack, target
            self._open.append((target, stack.pop_all()))
            self._remember(path)

    def _next_path(self, paths: Iterator[Path]) -> Path:
        """The path of the next file; for an endless source, one that did not exist."""
        return next(filter(create_new, paths)) if self._endless else next(paths)

    def _drop_later_segments(self, segment: float | None) -> None:
        """Remove segments of an earlier, longer run that are numbered above this run's."""
        if segment and self.paths and not self._endless:
            drop_later(self.paths[-1], SEGMENT_DIGITS)

    def _remember(self, path: Path) -> None:
        self.files += 1
        self.paths.append(path)
        if self._endless:
            del self.paths[:-_NEWEST]

    def _forget(self, path: Path) -> None:
        """Drop a file that could not be completed from the list; nothing of it is left."""
        if path in self.paths:
            self.paths.remove(path)
            self.files -= 1


def _sync(path: Path) -> None:
    # If it is missing, somebody has moved or deleted it.
    with contextlib.suppress(FileNotFoundError), synced_folder(path.parent), synced(path):
        pass


def _drop_empty(path: Path) -> None:
    """Remove a file that is still empty because its encoder could not start."""
    with contextlib.suppress(OSError):
        if not path.stat().st_size:
            path.unlink()


class PicturesSink(FileSink):
    """Writes a numbered picture for each frame into a folder; each is written atomically."""

    def __init__(self, folder: Path, picture: Picture) -> None:
        """Prepare the sink.

        Args:
            folder: Where to write; it is created.
            picture: What each frame shows, and in which format.
        """
        super().__init__()
        self._folder, self._picture = folder, picture
        self._last: Path | None = None

    def write(self, frame: Frame, result: Segmentation) -> None:
        """Write a frame; see :class:`VideoSink`."""
        if not self.paths:
            claim(self._folder)
            self._remember(self._folder)
        path = self._folder / f"{zero_padded(frame.number, PICTURE_DIGITS)}.{self._picture.format}"
        with writing_errors(path), replacing(path) as target:
            picture = self._picture.render(result)
            try:
                self._picture.encode(picture, target)
            except ValueError as error:  # Pillow raises it for sizes that WebP does not support
                raise unwritable(path, str(error)) from error
        self._last = path

    def close(self) -> None:
        """Remove pictures of an earlier, longer run; no file is open."""
        if self._last:
            drop_later(self._last, PICTURE_DIGITS)


class RawSink(FileSink):
    """Writes the frames' bytes one after the other to a pipe: ``gray``, ``rgb24`` or ``rgba`` (FFmpeg's names)."""

    def __init__(self, stream: BinaryIO, picture: Picture) -> None:
        """Prepare the sink.

        Args:
            stream: Open for writing bytes.
            picture: What each frame shows.
        """
        super().__init__()
        self._stream, self._picture = stream, picture
        self._shape: tuple[int, ...] | None = None

    def write(self, frame: Frame, result: Segmentation) -> None:
        """Write a frame; see :class:`VideoSink`."""
        pixels = np.ascontiguousarray(np.asarray(self._picture.render(result)))
        if self._shape not in (None, pixels.shape):
            raise OutputError(
                f"frames change from {self._shape} to {pixels.shape}, which a pipe of raw frames cannot signal; "
                "give a folder with --output"
            )
        self._shape = pixels.shape
        try:
            write_all(self._stream, pixels.data)
        except BrokenPipeError:
            raise  # the reader has closed its end, which is not an error
        except OSError as error:
            raise OutputError(f"standard output cannot be written to ({error.strerror or error})") from error


class LinesSink(FileSink):
    """Writes a line of JSON for each frame (:func:`frame_record`); a new file after each ``segment`` seconds."""

    def __init__(self, paths: Iterable[Path], *, endless: bool, segment: float | None = None) -> None:
        """Prepare the sink; the first file is created with the first frame.

        Args:
            paths: The files, one after the other.
            endless: The source has no end: files have their names from the start.
            segment: Seconds per file; None: no limit.
        """
        super().__init__(endless=endless)
        self._paths, self._segment = iter(paths), segment
        self._file: Any = None
        self._since = 0.0

    def write(self, frame: Frame, result: Segmentation) -> None:
        """Write a frame; see :class:`VideoSink`."""
        if self._file is None or (self._segment and frame.time - self._since >= self._segment):
            self._begin(frame)
        with writing_errors(self.paths[-1]):
            self._file.write(json.dumps(frame_record(frame, result)) + "\n")
            self._file.flush()

    def _begin(self, frame: Frame) -> None:
        if self._open:
            self._open.pop()[1].close()
        with self._created(self._next_path(self._paths)) as (stack, target):
            # Append, because a log rotator may truncate the file meanwhile.
            self._file, self._since = stack.enter_context(target.open("a", encoding="utf-8")), frame.time

    def close(self) -> None:
        """Complete the files."""
        super().close()
        self._drop_later_segments(self._segment)


def frame_record(frame: Frame, result: Segmentation) -> dict[str, Any]:
    """A frame's record in JSON: its number, seconds from the first frame, size, and what was found in it."""
    height, width = result.probability.shape
    return {
        "number": frame.number,
        "time": round(frame.time, 6),
        "height": height,
        "width": width,
        "coverage": round(result.coverage, 6),
        "found": result.found,
        "box": result.box,
    }
