"""Video out: MP4, WebM with transparency, numbered pictures, lines of JSON, raw frames for pipes."""

from __future__ import annotations

import contextlib
import errno
import heapq
import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Final, Protocol, Self

import av
import av.error
import numpy as np

from petseg_runtime.errors import InputError, OutputError
from petseg_runtime.files import replacing, synced, synced_folder
from petseg_runtime.result import Segmentation
from petseg_runtime.sinks import Picture
from petseg_runtime.video import Colours, Frame
from petseg_runtime.video_looks import Painter
from petseg_runtime.video_sound import Sound, Track, written_to

__all__ = [
    "MOVIES",
    "LinesSink",
    "Look",
    "MovieSink",
    "PicturesSink",
    "RawSink",
    "VideoSink",
    "frame_record",
    "next_number",
    "numbered",
    "pieces",
]


@dataclass(frozen=True, kw_only=True)
class Look:
    """How a kind of movie is encoded.

    Attributes:
        container: FFmpeg's name.
        codec: FFmpeg's name of the encoder.
        options: For the encoder.
        live: More of them, where each frame must be out at once.
    """

    container: str
    codec: str
    options: dict[str, str]
    live: dict[str, str]


#: What ``--format`` offers for movies. The presets are the slowest that 2 cores encode in real time beside the network.
MOVIES: Final = {
    "mp4": Look(
        container="mp4",
        codec="libx264",
        options={"preset": "veryfast", "crf": "21"},
        live={"tune": "zerolatency"},
    ),
    "webm": Look(
        container="webm",
        codec="libvpx-vp9",
        options={"deadline": "realtime", "cpu-used": "8", "row-mt": "1", "crf": "32", "b": "0", "auto-alt-ref": "0"},
        live={"lag-in-frames": "0"},
    ),
}

#: Seconds in a fragment of what is written without an end, and for which it waits for late sound at most: together so
#: much of it is lost when the process is killed, and a frame or two: less than two seconds.
_FRAGMENT: Final = 0.75

#: Seconds from a key frame to the next; the first is for what is written without an end.
_LIVE_KEY, _KEY = 2, 10
#: Frames a second between which that is counted.
_SLOWEST, _FASTEST = 10, 120

#: Marks a folder of one video's numbered files as petseg's own: the next run replaces them, and removes those that are
#: left of a longer run. In a folder without it, nothing that is there is touched.
OWN: Final = ".petseg-numbered"

#: Digits of a piece's and of a picture's number, if it has no more.
_OF_PIECE, _OF_PICTURE = 4, 6

#: So many files of an endless source are remembered: in a year of minutes there are half a million.
_NEWEST: Final = 1000

#: So many seconds the sound of a piece may come after its last frame.
_LATE: Final = 2.0

#: So many seconds the sound of a source without an end may be ahead of the picture. Where its clock is another, and it
#: is further ahead, it would be kept in memory for ever.
_AHEAD: Final = 5.0


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


class _Base:
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
            with _errors_at(path):
                done.result()

    @contextlib.contextmanager
    def _begun(self, path: Path) -> Iterator[tuple[contextlib.ExitStack, Path]]:
        """Begin a file; yields what closes it, and where to write: beside its place, or in it if it is endless."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(_errors_at(path))
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
        return next(filter(_claimed, paths)) if self._endless else next(paths)

    def _drop_rest(self, segment: float | None) -> None:
        """Remove the pieces that a longer run has left behind those of this one."""
        if segment and self.paths and not self._endless:
            _drop_later(self.paths[-1], _OF_PIECE)

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


class MovieSink(_Base):
    """One movie after the other: a new one when the size of the frames changes, and after each ``segment`` seconds.

    A movie is written beside its place and renamed when it is complete, if the source has an end. Of an endless one it
    is in its place from the start, and playable up to the last two seconds if the process is killed (fragmented MP4).
    When a movie is complete, the disk itself holds it.
    """

    def __init__(
        self,
        paths: Iterable[Path],
        painter: Painter,
        *,
        endless: bool,
        segment: float | None = None,
        audio: bool = True,
        threads: int | None = None,
    ) -> None:
        """Remember what to write; the first file is made with the first frame.

        Args:
            paths: The movies' names, one after the other; the suffix decides the format.
            painter: Makes the frames.
            endless: The source has no end.
            segment: Seconds.
            audio: Pass the sound through.
            threads: CPU threads of the encoder; None: as many as it thinks fit.
        """
        super().__init__(endless=endless)
        self._paths, self._painter, self._audio, self._segment = iter(paths), painter, audio, segment
        self._threads = threads
        self._movies: list[_Movie] = []  # the last one is being written; those before it wait for late sound
        self._waiting: list[tuple[float, int, Sound]] = []  # a heap by time: sound that the picture has not reached
        self._heard = itertools.count()  # for sound of the same time: as it came

    def write(self, frame: Frame, result: Segmentation) -> None:
        """Write a frame; see :class:`VideoSink`."""
        painted = self._painter(frame, result)
        track = frame.track if self._audio else None
        if not self._movies or self._turns(self._movies[-1], frame, painted, track):
            if self._movies:
                self._movies[-1].end = frame.time
            self._begin(frame, painted, track)
        with _errors_at(self.paths[-1]):
            self._movies[-1].write(frame, painted)
            self._hear(frame.sound, float((frame.pts + frame.duration) * frame.time_base))
        while len(self._movies) > 1 and frame.time - self._movies[0].end > (_LATE if track else 0):
            self._finish_first()

    def _turns(self, movie: _Movie, frame: Frame, painted: av.VideoFrame, track: Track | None) -> bool:
        """Whether a frame begins another movie."""
        return (
            movie.size != (painted.height, painted.width)
            or bool(self._segment and frame.time - movie.since >= self._segment)
            or bool(track and not track.fits(movie.track))
        )

    def _begin(self, frame: Frame, painted: av.VideoFrame, track: Track | None) -> None:
        path = self._next_of(self._paths)
        look = MOVIES[path.suffix[1:]]
        if self._threads:
            look = replace(look, options=look.options | {"threads": str(self._threads)})
        with self._begun(path) as (stack, beside):
            movie = _Movie(beside, look, frame, painted, track, self._endless, self._note)
            stack.enter_context(contextlib.closing(movie))
        self._movies.append(movie)

    def _note(self, note: str) -> None:
        """Say something once."""
        if note not in self.notes:
            self.notes.append(note)

    def _hear(self, sound: Sequence[Sound], until: float) -> None:
        """Give each movie its sound up to a time in seconds; the rest waits, for the picture may end before it."""
        latest = self._movies[-1].shown_until + _AHEAD if self._endless else float("inf")
        for one in sound:
            if (time := one.time) <= latest:
                heapq.heappush(self._waiting, (time, next(self._heard), one))
            else:
                self._note(f"sound that is more than {_AHEAD:.0f} s ahead of the picture is left out")
        while self._waiting and self._waiting[0][0] < until:
            time, _, one = heapq.heappop(self._waiting)
            movie = next(movie for movie in self._movies if time < movie.end)
            movie.write_sound(one)
            while movie is not self._movies[0]:
                self._finish_first()

    def _finish_first(self) -> None:
        self._movies.pop(0)
        self._open.pop(0)[1].close()

    def end(self, sound: Sequence[Sound], *, whole: bool) -> None:
        """Write the sound behind the last frame; see :class:`VideoSink`."""
        if self._movies:
            with _errors_at(self.paths[-1]):
                self._hear(sound, float("inf") if whole else self._movies[-1].shown_until)

    def close(self) -> None:
        """Complete the movies."""
        self._movies.clear()
        super().close()
        self._drop_rest(self._segment)


class _Movie:
    """One file that is being encoded."""

    def __init__(
        self,
        path: Path,
        look: Look,
        frame: Frame,
        painted: av.VideoFrame,
        track: Track | None,
        endless: bool,
        note: Callable[[str], None],
    ) -> None:
        self.size, self.track, self._note = (painted.height, painted.width), track, note
        self.since, self.shown_until, self.end = frame.time, frame.time, float("inf")
        self._first, self._start = frame.pts, frame.pts * frame.time_base
        self._file = av.open(str(path), "w", format=look.container, options=_muxing(look.container, endless))
        try:
            self._picture = self._picture_stream(look, frame, painted, endless)
            self._sound = written_to(self._file, track, note, endless=endless) if track else None
        except BaseException:
            self._file.close()
            raise

    def _picture_stream(self, look: Look, frame: Frame, painted: av.VideoFrame, endless: bool) -> Any:
        rate = _rate_of(frame)
        options = look.options | (look.live if endless else {})
        stream: Any = self._file.add_stream(look.codec, rate=rate, options=options)
        context = stream.codec_context
        context.width, context.height, context.pix_fmt = painted.width, painted.height, painted.format.name
        context.time_base = frame.time_base
        # One frame may be shown for seconds, or for a tick: the distance of key frames stays one that can be sought in.
        context.gop_size = round(min(max(float(rate), _SLOWEST), _FASTEST) * (_LIVE_KEY if endless else _KEY))
        if frame.aspect:
            context.sample_aspect_ratio = 1 / frame.aspect if frame.quarters % 2 else frame.aspect
        colours = Colours.of(frame.picture)
        context.colorspace, context.color_range = painted.colorspace, painted.color_range
        context.color_primaries, context.color_trc = colours.primaries, colours.transfer
        if painted.format.name == "yuva420p":
            stream.metadata["alpha_mode"] = "1"
        return stream

    def write(self, frame: Frame, painted: av.VideoFrame) -> None:
        self.shown_until = float((frame.pts + frame.duration) * frame.time_base)
        painted.pts, painted.time_base, painted.duration = frame.pts - self._first, frame.time_base, frame.duration
        self._mux(self._picture.encode(painted))

    def write_sound(self, sound: Sound) -> None:
        if self._sound:
            with self._damage_left_out():
                self._sound.write(sound, self._start)

    def _mux(self, packets: Iterable[Any]) -> None:
        for packet in packets:
            with self._damage_left_out():
                self._file.mux(packet)

    @contextlib.contextmanager
    def _damage_left_out(self) -> Iterator[None]:
        """Go on where a packet is refused for what is in it: damaged sound that is passed on as it is.

        Packets wait in the file until those of other streams have come: the refused one need not be the one just given.
        """
        try:
            yield
        except (av.error.InvalidDataError, av.error.PatchWelcomeError):
            self._file.start_encoding()  # does nothing, or raises again what was wrong with the whole file
            self._note("a part of the sound is damaged and is left out")

    def close(self) -> None:
        try:
            self._mux(self._picture.encode(None))
            if self._sound:
                self._sound.close()
        finally:
            with self._damage_left_out():
                self._file.close()


class PicturesSink(_Base):
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
        path = self._folder / f"{_digits(frame.number, _OF_PICTURE)}.{self._picture.format}"
        with _errors_at(path), replacing(path) as beside:
            picture = self._picture.render(result)
            try:
                self._picture.encode(picture, beside)
            except ValueError as error:  # Pillow's, of a size that WebP does not have
                raise _refused(path, str(error)) from error
        self._last = path

    def close(self) -> None:
        """Nothing is open, but there may be pictures of an earlier, longer run."""
        if self._last:
            _drop_later(self._last, _OF_PICTURE)


class RawSink(_Base):
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
                f"frames change from {self._shape} to {pixels.shape}, which a pipe of raw frames cannot tell its reader"
            )
        self._shape = pixels.shape
        try:
            self._stream.write(pixels.data)
            self._stream.flush()
        except BrokenPipeError:
            raise  # the reader has gone away, which is no error
        except OSError as error:
            raise OutputError(f"standard output cannot be written to ({error.strerror or error})") from error


class LinesSink(_Base):
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
        with _errors_at(self.paths[-1]):
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


def next_number(folder: Path) -> int:
    """The lowest number above all that files and folders in a folder begin with: what a run adds replaces nothing.

    Raises:
        OutputError: It is no folder, or cannot be listed.
    """
    names = []
    with _errors_at(folder), contextlib.suppress(FileNotFoundError):
        names = [entry.stem for entry in folder.iterdir()]
    return 1 + max((int(name) for name in names if name.isdecimal()), default=0)


def numbered(folder: Path, suffix: str) -> Iterator[Path]:
    """``0001.mp4``, ``0002.mp4``, ... after those that are there.

    Raises:
        OutputError: See :func:`next_number`.
    """
    for number in itertools.count(next_number(folder)):
        yield folder / f"{_digits(number, _OF_PIECE)}.{suffix}"


def pieces(folder: Path, suffix: str) -> Iterator[Path]:
    """``0001.mp4``, ``0002.mp4``, ..., in place of those of an earlier run.

    Raises:
        OutputError: See :func:`claim`.
    """
    claim(folder)
    for number in itertools.count(1):
        yield folder / f"{_digits(number, _OF_PIECE)}.{suffix}"


def claim(folder: Path) -> None:
    """Make a folder for numbered files that may be replaced and removed, and say in it that they are petseg's.

    Raises:
        OutputError: It holds files that are not, or it cannot be made.
    """
    claimable(folder)
    with _errors_at(folder):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / OWN).touch()


def claimable(folder: Path) -> None:
    """Refuse a folder with files that petseg did not write; see :func:`claim`."""
    with _errors_at(folder):
        foreign = folder.is_dir() and not (folder / OWN).exists() and any(folder.iterdir())
    if foreign:
        raise OutputError(
            f"{folder}: holds files that petseg did not write, and numbered ones could be replaced; "
            "choose another --output, or move them"
        )


def _drop_later(last: Path, least: int) -> None:
    """Remove what a longer run has left behind the last picture or piece of this one: together they are one result."""
    with _errors_at(last.parent):
        alike = {path.stem for path in last.parent.iterdir() if path.suffix == last.suffix and path.stem.isdecimal()}
        # Numbers with more digits, such as dates, are somebody's, unless those with fewer were used up.
        most = len(last.stem)
        while "9" * most in alike:
            most += 1
        for stem in alike:
            if len(stem) <= most and int(stem) > int(last.stem) and stem == _digits(int(stem), least):
                last.with_stem(stem).unlink()


def _digits(number: int, least: int) -> str:
    """A number in a file's name, so that names sort as numbers do, up to so many digits."""
    return f"{number:0{least}d}"


def _claimed(path: Path) -> bool:
    """Whether a name was nobody's and now is ours: another process may be recording into the same folder.

    Raises:
        OutputError: The file cannot be made.
    """
    with _errors_at(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            path.touch(exist_ok=False)
            return True
    return False


def _drop_empty(path: Path) -> None:
    """Remove a file to which nothing was written: its encoder could not begin."""
    with contextlib.suppress(OSError):
        if not path.stat().st_size:
            path.unlink()


def _rate_of(frame: Frame) -> Fraction:
    """Frames a second, as far as one frame tells; for the encoder's choices only, since each frame has its time."""
    if frame.duration:
        return Fraction(1 / (frame.duration * frame.time_base)).limit_denominator(1001)
    return Fraction(30)


def _muxing(container: str, endless: bool) -> dict[str, str]:
    """Options of the file; of an endless one each fragment goes to the system when it is complete."""
    if not endless:
        return {"movflags": "faststart"} if container == "mp4" else {}
    # FFmpeg waits ten seconds for sound that stays away, and ends a fragment where a key frame comes, which takes long
    # where frames are fewer than the source promised.
    common = {"flush_packets": "1", "max_interleave_delta": str(round(1e6 * _FRAGMENT))}
    if container == "mp4":
        fragments = {
            "movflags": "frag_keyframe+empty_moov+default_base_moof",
            "frag_duration": str(round(1e6 * _FRAGMENT)),
        }
        return common | fragments
    return common | {"cluster_time_limit": str(round(1e3 * _FRAGMENT))}


#: What the system says of one name alone: the next video's may well be written.
_OF_ONE: Final = {errno.EISDIR, errno.ENAMETOOLONG}


class _errors_at:  # noqa: N801 (used like a function)
    """Turns what goes wrong while writing into one error that names the file.

    What the system says is of the output, and ends the run. What an encoder or a format says is of this source alone,
    whose frames it does not take. The rest is a defect of the program, and stays what it is.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if not isinstance(error, (av.error.FFmpegError, OSError)):
            return
        code = getattr(error, "errno", None)
        reason = os.strerror(errno.ENOSPC) if code == errno.ENOSPC else getattr(error, "strerror", None) or str(error)
        # Pillow, too, raises errors of the system's kind, but without a number.
        if isinstance(error, OSError) and code is not None and code not in _OF_ONE:
            raise OutputError(f"{self._path}: cannot be written ({reason})") from error
        raise _refused(self._path, reason) from error


def _refused(path: Path, reason: str) -> InputError:
    """The error of one source, whose result cannot be written."""
    return InputError(f"its result {path} cannot be written ({reason})")
