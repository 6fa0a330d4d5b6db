"""Where a video's results go: the contract, what all files have in common, pictures, lines of JSON, raw frames."""

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
from petseg_runtime.files import replacing, synced, synced_folder
from petseg_runtime.result import Segmentation
from petseg_runtime.sinks import Picture
from petseg_runtime.video.errors import errors_at, refused
from petseg_runtime.video.frame import Frame
from petseg_runtime.video.numbered import OF_PICTURE, OF_PIECE, claim, claimed, digits, drop_later
from petseg_runtime.video.sound import Sound

__all__ = ["FileSink", "LinesSink", "PicturesSink", "RawSink", "VideoSink", "frame_record"]

#: So many files of an endless source are remembered: in a year of minutes there are half a million.
_NEWEST: Final = 1000


class VideoSink(Protocol):
    """Takes one source's frames, in order, from one thread. A context manager: leaving it completes the files."""

    @property
    def notes(self) -> list[str]:
        """What had to be left out, and why."""

    @property
    def paths(self) -> list[Path]:
        """The files that were begun; of an endless source the newest ones."""

    @property
    def files(self) -> int:
        """How many were begun."""

    def write(self, frame: Frame, result: Segmentation) -> None:
        """Write a frame.

        Raises:
            InputError: The result of this source cannot be written; those of others can.
            OutputError: Nothing more can be written.
        """

    def end(self, sound: Sequence[Sound], *, whole: bool) -> None:
        """Write the sound behind the last frame; as ``write``.

        Args:
            sound: What came after it.
            whole: The source is at its end; else the sound ends with the picture.
        """

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class FileSink:
    """A sink's files. Leaving it completes those that are open; an error removes them, if the source has an end."""

    def __init__(self, *, endless: bool = False) -> None:
        self.notes: list[str] = []
        self.paths: list[Path] = []
        self.files = 0
        self._endless = endless
        self._open: list[tuple[Path, contextlib.ExitStack]] = []  # where each file is written, and what closes it
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
            with contextlib.suppress(Exception):  # the first error is the one to tell
                # Before it is closed: putting the index of a long movie in front takes long.
                path.unlink(missing_ok=True)
                file.__exit__(kind, error, trace)

    def end(self, sound: Sequence[Sound], *, whole: bool) -> None:
        """Nothing: these files have no sound."""

    def close(self) -> None:
        """Complete the files, also those behind one that cannot be completed: its error is the one to tell."""
        try:
            self._close_open()
        finally:
            if self._disk:
                self._disk.shutdown()

    def _close_open(self) -> None:
        try:
            while self._open:
                self._open.pop(0)[1].close()
            self._check_disk(wait=True)
        except BaseException:
            if self._open:
                with contextlib.suppress(Exception):  # the first error is the one to tell
                    self._close_open()
            raise

    def _to_disk(self, path: Path) -> None:
        """Bring a complete file to the disk, in another thread: slow disks take longer than a frame."""
        self._disk = self._disk or ThreadPoolExecutor(1, "petseg-disk")
        self._syncing.append((path, self._disk.submit(_synced_where_it_is, path)))
        self._check_disk(wait=False)

    def _check_disk(self, *, wait: bool) -> None:
        while self._syncing and (wait or self._syncing[0][1].done()):
            path, done = self._syncing.pop(0)
            with errors_at(path):
                done.result()

    @contextlib.contextmanager
    def _begun(self, path: Path) -> Iterator[tuple[contextlib.ExitStack, Path]]:
        """Begin a file; yields what closes it, and where to write: beside its place, or in it if it is endless."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(errors_at(path))
            path.parent.mkdir(parents=True, exist_ok=True)
            if self._endless:
                stack.callback(self._to_disk, path)
                stack.push(lambda kind, error, trace: _drop_empty(path) if kind else None)
                beside = path
            else:
                stack.push(lambda kind, error, trace: self._forget(path) if kind else None)
                stack.enter_context(synced_folder(path.parent))
                beside = stack.enter_context(replacing(path))
                stack.enter_context(synced(beside))
            yield stack, beside
            self._open.append((beside, stack.pop_all()))
            self._remember(path)

    def _next_of(self, paths: Iterator[Path]) -> Path:
        """Where the next file goes; of an endless source, a place that nobody has."""
        return next(filter(claimed, paths)) if self._endless else next(paths)

    def _drop_rest(self, segment: float | None) -> None:
        """Remove the pieces that a longer run has left behind those of this one."""
        if segment and self.paths and not self._endless:
            drop_later(self.paths[-1], OF_PIECE)

    def _remember(self, path: Path) -> None:
        self.files += 1
        self.paths.append(path)
        if self._endless:
            del self.paths[:-_NEWEST]

    def _forget(self, path: Path) -> None:
        """Of a file that could not be completed, nothing is left."""
        if path in self.paths:
            self.paths.remove(path)
            self.files -= 1


def _synced_where_it_is(path: Path) -> None:
    # That it is not there: somebody has moved it on, or taken it away.
    with contextlib.suppress(FileNotFoundError), synced_folder(path.parent), synced(path):
        pass


def _drop_empty(path: Path) -> None:
    """Remove a file to which nothing was written: its encoder could not begin."""
    with contextlib.suppress(OSError):
        if not path.stat().st_size:
            path.unlink()


class PicturesSink(FileSink):
    """A numbered picture for each frame, in a folder; each is whole or not there."""

    def __init__(self, folder: Path, picture: Picture) -> None:
        """Remember what to write.

        Args:
            folder: Where; it is made.
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
        path = self._folder / f"{digits(frame.number, OF_PICTURE)}.{self._picture.format}"
        with errors_at(path), replacing(path) as beside:
            picture = self._picture.render(result)
            try:
                self._picture.encode(picture, beside)
            except ValueError as error:  # Pillow's, of a size that WebP does not have
                raise refused(path, str(error)) from error
        self._last = path

    def close(self) -> None:
        """Nothing is open, but there may be pictures of an earlier, longer run."""
        if self._last:
            drop_later(self._last, OF_PICTURE)


class RawSink(FileSink):
    """The frames' bytes one after the other, for a pipe: ``gray``, ``rgb24`` or ``rgba`` (FFmpeg's names)."""

    def __init__(self, stream: BinaryIO, picture: Picture) -> None:
        """Take the stream.

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
                f"frames change from {self._shape} to {pixels.shape}, which a pipe of raw frames cannot tell its "
                "reader: give a folder with --output"
            )
        self._shape = pixels.shape
        try:
            self._stream.write(pixels.data)
            self._stream.flush()
        except BrokenPipeError:
            raise  # the reader has gone away, which is no error
        except OSError as error:
            raise OutputError(f"standard output cannot be written to ({error.strerror or error})") from error


class LinesSink(FileSink):
    """A line of JSON for each frame, see :func:`frame_record`; a new file after each ``segment`` seconds."""

    def __init__(self, paths: Iterable[Path], *, endless: bool, segment: float | None = None) -> None:
        """Remember what to write; the first file is made with the first frame.

        Args:
            paths: The files, one after the other.
            endless: The source has no end: a file is in its place from the start.
            segment: Seconds.
        """
        super().__init__(endless=endless)
        self._paths, self._segment = iter(paths), segment
        self._file: Any = None
        self._since = 0.0

    def write(self, frame: Frame, result: Segmentation) -> None:
        """Write a frame; see :class:`VideoSink`."""
        if self._file is None or (self._segment and frame.time - self._since >= self._segment):
            self._begin(frame)
        with errors_at(self.paths[-1]):
            self._file.write(json.dumps(frame_record(frame, result)) + "\n")
            self._file.flush()

    def _begin(self, frame: Frame) -> None:
        if self._open:
            self._open.pop()[1].close()
        with self._begun(self._next_of(self._paths)) as (stack, beside):
            # At its end wherever that is: what rotates logs may cut off what has been written.
            self._file, self._since = stack.enter_context(beside.open("a", encoding="utf-8")), frame.time

    def close(self) -> None:
        """Complete the files."""
        super().close()
        self._drop_rest(self._segment)


def frame_record(frame: Frame, result: Segmentation) -> dict[str, Any]:
    """What is said of a frame in JSON: its number, seconds from the first, size, and what was found in it."""
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
