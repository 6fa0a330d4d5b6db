"""Writes results as movies: MP4, and WebM with transparency, with each frame's timestamp and the source's audio."""

from __future__ import annotations

import contextlib
import heapq
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any, Final

import av
import av.error

from petseg_runtime.result import Segmentation
from petseg_runtime.video.errors import writing_errors
from petseg_runtime.video.frame import Frame
from petseg_runtime.video.looks import Painter
from petseg_runtime.video.sinks import FileSink
from petseg_runtime.video.sound import Sound, Track, audio_writer

__all__ = ["MOVIES", "Encoding", "MovieSink"]


@dataclass(frozen=True, kw_only=True)
class Encoding:
    """How a format of movies is encoded.

    Attributes:
        container: FFmpeg's name.
        codec: FFmpeg's name of the encoder.
        options: For the encoder.
        live: Additional ones for live sources, where each frame must be output at once.
    """

    container: str
    codec: str
    options: dict[str, str]
    live: dict[str, str]


#: The movie formats of ``--format``. The presets are the slowest that 2 cores encode in real time beside the network.
MOVIES: Final = {
    "mp4": Encoding(
        container="mp4",
        codec="libx264",
        options={"preset": "veryfast", "crf": "21"},
        live={"tune": "zerolatency"},
    ),
    "webm": Encoding(
        container="webm",
        codec="libvpx-vp9",
        options={"deadline": "realtime", "cpu-used": "8", "row-mt": "1", "crf": "32", "b": "0", "auto-alt-ref": "0"},
        live={"lag-in-frames": "0"},
    ),
}

#: Seconds in a fragment of an endless source's movie, and the longest wait of its muxer for late audio: both together
#: and a frame or two, less than two seconds, are lost when the process is killed.
_FRAGMENT: Final = 0.75

#: Seconds between keyframes; the first is for endless sources.
_LIVE_KEYFRAMES, _KEYFRAMES = 2, 10

#: Frame rates between which these are converted to frames.
_SLOWEST, _FASTEST = 10, 120

#: In units this small (nanoseconds), MP4's 32 bits for a frame's duration hold two seconds: microseconds replace them.
_TOO_FINE, _MICROSECOND = Fraction(1, 10**8), Fraction(1, 10**6)

#: Seconds by which the audio of a segment may come after its last frame.
_LATE_AUDIO: Final = 2.0

#: Seconds by which the audio of an endless source may be ahead of the picture. If its clock is a different one, audio
#: that is further ahead would stay in memory forever.
_AUDIO_AHEAD: Final = 5.0


class MovieSink(FileSink):
    """Writes movies one after the other: a new one when the frame size changes, and after each ``segment`` seconds.

    If the source has an end, a movie is written to a temporary file and renamed when it is complete. If the source is
    endless, the movie has its name from the start, and is playable up to the last two seconds if the process is killed
    (fragmented MP4). Complete movies are synced to disk.
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
        """Prepare the sink; the first file is created with the first frame.

        Args:
            paths: The movies' paths, one after the other; the suffix selects the format.
            painter: Makes the frames.
            endless: The source has no end.
            segment: Seconds per movie; None: no limit.
            audio: Write the source's audio, too.
            threads: CPU threads of the encoder; None: the encoder's choice.
        """
        super().__init__(endless=endless)
        self._paths, self._painter, self._audio, self._segment = iter(paths), painter, audio, segment
        self._threads = threads
        self._movies: list[_Movie] = []  # the last one is being written; those before it wait for late audio
        self._waiting: list[tuple[float, int, Sound]] = []  # a heap by time: audio that the picture has not reached
        self._arrivals = itertools.count()  # keeps audio of the same time in the order of arrival

    def write(self, frame: Frame, result: Segmentation) -> None:
        """Write a frame; see :class:`VideoSink`."""
        painted = self._painter(frame, result)
        track = frame.track if self._audio else None
        if not self._movies or self._starts_movie(self._movies[-1], frame, painted, track):
            if self._movies:
                self._movies[-1].end = frame.time
            self._begin(frame, painted, track)
        with writing_errors(self.paths[-1]):
            self._movies[-1].write(frame, painted)
            self._write_audio(frame.sound, float((frame.pts + frame.duration) * frame.time_base))
        while len(self._movies) > 1 and frame.time - self._movies[0].end > (_LATE_AUDIO if track else 0):
            self._finish_first()

    def _starts_movie(self, movie: _Movie, frame: Frame, painted: av.VideoFrame, track: Track | None) -> bool:
        """Whether a frame starts a new movie."""
        return (
            movie.size != (painted.height, painted.width)
            or bool(self._segment and frame.time - movie.since >= self._segment)
            or bool(track and not track.fits(movie.track))
        )

    def _begin(self, frame: Frame, painted: av.VideoFrame, track: Track | None) -> None:
        path = self._next_path(self._paths)
        encoding = MOVIES[path.suffix[1:]]
        if self._threads:
            encoding = replace(encoding, options=encoding.options | {"threads": str(self._threads)})
        with self._created(path) as (stack, beside):
            movie = _Movie(beside, encoding, frame, painted, track, self._endless, self._note)
            stack.enter_context(contextlib.closing(movie))
        self._movies.append(movie)

    def _note(self, note: str) -> None:
        """Add a note, unless it was made before."""
        if note not in self.notes:
            self.notes.append(note)

    def _write_audio(self, sound: Sequence[Sound], until: float) -> None:
        """Give each movie its audio up to a time in seconds; the rest waits, since the picture may end before it."""
        latest = self._movies[-1].shown_until + _AUDIO_AHEAD if self._endless else float("inf")
        for one in sound:
            if (time := one.time) <= latest:
                heapq.heappush(self._waiting, (time, next(self._arrivals), one))
            else:
                self._note(f"audio more than {_AUDIO_AHEAD:.0f} s ahead of the picture is left out")
        while self._waiting and self._waiting[0][0] < until:
            time, _, one = heapq.heappop(self._waiting)
            movie = next(movie for movie in self._movies if time < movie.end)
            movie.write_audio(one)
            while movie is not self._movies[0]:
                self._finish_first()

    def _finish_first(self) -> None:
        self._movies.pop(0)
        self._open.pop(0)[1].close()

    def end(self, sound: Sequence[Sound], *, whole: bool) -> None:
        """Write the audio after the last frame; see :class:`VideoSink`."""
        if self._movies:
            with writing_errors(self.paths[-1]):
                self._write_audio(sound, float("inf") if whole else self._movies[-1].shown_until)

    def close(self) -> None:
        """Complete the movies."""
        self._movies.clear()
        super().close()
        self._drop_later_segments(self._segment)


class _Movie:
    """One file that is being encoded."""

    def __init__(
        self,
        path: Path,
        encoding: Encoding,
        frame: Frame,
        painted: av.VideoFrame,
        track: Track | None,
        endless: bool,
        note: Callable[[str], None],
    ) -> None:
        self.size, self.track, self._note = (painted.height, painted.width), track, note
        self.since, self.shown_until, self.end = frame.time, frame.time, float("inf")
        self._first, self._start = frame.pts, frame.pts * frame.time_base
        self._file = av.open(str(path), "w", format=encoding.container, options=_muxing(encoding.container, endless))
        try:
            self._picture = self._add_video_stream(encoding, frame, painted, endless)
            self._sound = audio_writer(self._file, track, note, endless=endless) if track else None
            # Else PyAV does so for the first packet; if that fails, the disk being full, it would try again for the
            # next one, and FFmpeg would crash.
            self._file.start_encoding()
        except BaseException:
            self._file.close()
            raise

    def _add_video_stream(self, encoding: Encoding, frame: Frame, painted: av.VideoFrame, endless: bool) -> Any:
        rate = _rate_of(frame)
        options = encoding.options | (encoding.live if endless else {})
        stream: Any = self._file.add_stream(encoding.codec, rate=rate, options=options)
        context = stream.codec_context
        context.width, context.height, context.pix_fmt = painted.width, painted.height, painted.format.name
        context.time_base = frame.time_base if frame.time_base > _TOO_FINE else _MICROSECOND
        # One frame may be shown for seconds or for a tick; keyframes must remain close enough to seek.
        seconds = _LIVE_KEYFRAMES if endless else _KEYFRAMES
        context.gop_size = round(min(max(float(rate), _SLOWEST), _FASTEST) * seconds)
        context.flags |= av.codec.context.Flags.frame_duration  # else the last frame has the duration of the first
        if frame.aspect:
            context.sample_aspect_ratio = 1 / frame.aspect if frame.quarters % 2 else frame.aspect
        context.colorspace, context.color_range = painted.colorspace, painted.color_range
        context.color_primaries, context.color_trc = painted.color_primaries, painted.color_trc
        if painted.format.name == "yuva420p":
            stream.metadata["alpha_mode"] = "1"
        return stream

    def write(self, frame: Frame, painted: av.VideoFrame) -> None:
        self.shown_until = float((frame.pts + frame.duration) * frame.time_base)
        painted.pts, painted.time_base, painted.duration = frame.pts - self._first, frame.time_base, frame.duration
        self._mux(self._picture.encode(painted))

    def write_audio(self, sound: Sound) -> None:
        if self._sound:
            with self._skipping_damage():
                self._sound.write(sound, self._start)

    def _mux(self, packets: Iterable[Any]) -> None:
        for packet in packets:
            with self._skipping_damage():
                self._file.mux(packet)

    @contextlib.contextmanager
    def _skipping_damage(self) -> Iterator[None]:
        """Go on if the muxer rejects a packet for its contents: damaged audio that is passed through.

        The muxer buffers packets until those of other streams arrive, so this need not be the packet just written.
        """
        try:
            yield
        except (av.error.InvalidDataError, av.error.PatchWelcomeError):
            self._note("part of the audio is damaged and is left out")

    def close(self) -> None:
        try:
            self._mux(self._picture.encode(None))
            if self._sound:
                self._sound.close()
        finally:
            with self._skipping_damage():
                self._file.close()


def _rate_of(frame: Frame) -> Fraction:
    """The frame rate that one frame suggests; only for the encoder's decisions, since each frame has a timestamp."""
    if frame.duration:
        return Fraction(1 / (frame.duration * frame.time_base)).limit_denominator(1001)
    return Fraction(30)


def _muxing(container: str, endless: bool) -> dict[str, str]:
    """Options of the muxer; for an endless source, each fragment is flushed when it is complete."""
    if not endless:
        return {"movflags": "faststart"} if container == "mp4" else {}
    # By default, FFmpeg waits ten seconds for missing audio, and ends fragments at keyframes only, which takes long if
    # frames are fewer than the source promised.
    common = {"flush_packets": "1", "max_interleave_delta": str(round(1e6 * _FRAGMENT))}
    if container == "mp4":
        fragments = {
            "movflags": "frag_keyframe+empty_moov+default_base_moof",
            "frag_duration": str(round(1e6 * _FRAGMENT)),
        }
        return common | fragments
    return common | {"cluster_time_limit": str(round(1e3 * _FRAGMENT))}
