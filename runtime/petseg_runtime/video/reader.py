"""Reads video from files, pipes and streams (PyAV): upright frames in the right colours, with exact timestamps."""

from __future__ import annotations

import contextlib
import math
import os
import re
import stat
import time
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Final, Self

import av
import av.error
from av.bitstream import BitStreamFilterContext
from av.stream import Discard, Disposition

from petseg_runtime.errors import SilentVideo, UnreadableVideo, UnsupportedVideo, UsageError
from petseg_runtime.video.clock import Clock, Joined
from petseg_runtime.video.errors import reading_errors, reason_of
from petseg_runtime.video.frame import Frame, orientation
from petseg_runtime.video.sound import Sound, track_of

__all__ = ["MAX_FRAME_PIXELS", "VideoInfo", "VideoReader"]

#: Videos whose frames have more pixels than this (8K has 33 million) are rejected before a frame is decoded.
MAX_FRAME_PIXELS: Final = 8192 * 4352

# Formats that name other files or addresses to open instead. A video in a photo album must not be able to do that.
_REFERENCE_FORMATS: Final = frozenset(
    {
        *("applehttp", "avisynth", "concat", "dash", "hls", "image2", "imf", "lavfi", "rtp", "rtsp", "sap", "sdp"),
        *("vapoursynth", "webm_dash_manifest"),
    }
)
_LOCAL_OPTIONS: Final = {
    "protocol_whitelist": "file,pipe",
    "format_whitelist": ",".join(sorted(av.formats_available - _REFERENCE_FORMATS)),
}

#: What FFmpeg's "invalid argument" may mean; for a file, that it is in one of these formats.
_INVALID_FILE: Final = "not a video, or a playlist of other files, which are not opened"
_INVALID_OPTIONS: Final = "not a video, or one that does not accept these options"

#: Titles in old files have arbitrary encodings. PyAV 19, which needs Python 3.12, replaces what is not UTF-8 by itself,
#: and has no such argument.
_ANY_ENCODING: Final[dict[str, Any]] = {"metadata_errors": "replace"} if int(av.__version__.split(".")[0]) < 19 else {}

#: If a seek lands after the requested start, the reader seeks this many seconds earlier; then it decodes everything.
_SEEK_MARGIN: Final = 10.0

#: Formats (FFmpeg's names) that recorders and receivers may start and end anywhere: the first pictures may reference
#: earlier ones that are missing, and the last one may be incomplete.
_CUT_ANYWHERE: Final = frozenset({"h264", "hevc", "m4v", "mpeg", "mpegts", "mpegvideo"})

#: A damaged frame with fewer frames after it may be the incomplete end of such a file. (The last two frames are; they
#: may be output in another order.)
_INCOMPLETE_END: Final = 16

#: Packets of at least this many bytes are assumed to hold a picture.
_PICTURE_BYTES: Final = 4096

#: A bitstream filter that keeps only the NAL units of an H.264 packet that are (parts of) pictures (its table 7-1).
_PICTURE_UNITS: Final = "filter_units=pass_types=1-5"

#: A file that is shorter than it declares by more than this share, and by more than a second, was truncated.
_MISSING_SHARE: Final = Fraction(1, 20)

#: Formats (FFmpeg's names) that offer the same video in several sizes: FFmpeg downloads all of them to the end, unless
#: those that nobody needs are discarded.
_MULTI_VARIANT: Final = frozenset({"dash", "hls"})

#: Decoders that delay frames unless the low-delay flag is set. Others delay frames for frame threading, which a live
#: source does not use, and for reordering: with the flag, the decoders of MPEG-1, MPEG-2, MPEG-4 part 2 and VC-1 skip
#: the reordering, and output B-frames in decoding order.
_DELAYING_DECODERS: Final = frozenset({"libdav1d"})


@dataclass(frozen=True)
class VideoInfo:
    """What a source declares before anything is decoded.

    Attributes:
        width: As stored (phones store portrait video in landscape).
        height: As stored.
        rate: Average frames per second; None: unknown.
        duration: Seconds; None: endless or unknown.
        codec: FFmpeg's name.
        audio: FFmpeg's name of the audio codec; None: no audio.
    """

    width: int
    height: int
    rate: Fraction | None
    duration: float | None
    codec: str
    audio: str | None


class VideoReader:
    """Decodes one video, opened once, to its end. Use it as a context manager, and iterate over it once."""

    def __init__(
        self,
        source: str | os.PathLike[str] | IO[bytes],
        *,
        name: str | None = None,
        container: str | None = None,
        options: Mapping[str, str] | None = None,
        timeout: tuple[float, float] | None = None,
        low_delay: bool = False,
        start: float = 0.0,
        threads: int | None = None,
    ) -> None:
        """Open a source.

        Args:
            source: A file, a URL, a device name, or an object with a ``read`` method.
            name: The source's name in errors; None: the source itself.
            container: FFmpeg's name of the format (``v4l2``, ``rawvideo``); None: detect it.
            options: For FFmpeg's demuxer and protocol. None: those for a local file, which may not open anything else.
            timeout: Seconds to wait for the source to open, and for each packet; None: forever.
            low_delay: The source is live: decode without frame threading, which delays frames; leave jumps in its
                timestamps to the caller; and wait no longer for a frame than for a packet.
            start: Seconds of the video to skip.
            threads: CPU threads of the decoder; None: FFmpeg's choice.

        Raises:
            UsageError: ``start`` is not a finite number of seconds, or is below 0.
            UnreadableVideo: The source does not exist, or is damaged.
            SilentVideo: It sends nothing.
            UnsupportedVideo: It has no video stream that can be decoded, or its frames are too large.
        """
        if not 0 <= start < math.inf:
            raise UsageError(f"start {start} must be a number of seconds, 0 or more")
        self.name = name or (os.fspath(source) if isinstance(source, (str, os.PathLike)) else "<stream>")
        self._start = start
        self._path: Path | None = None  # set for a local file
        self.undecodable = 0  #: packets that the decoder rejected
        self._last_rejection = ""  # why it rejected the last of them
        self._expected_losses = 0  # of these: before the first picture, and at the very end of what may be cut anywhere
        self._packets_read = 0  # of the video stream
        self._marked = _MarkedFrames(cut_begin=False, cut_end=False)
        self.rest: list[Sound] = []  #: audio after the last frame, complete once the iteration has ended
        if isinstance(source, os.PathLike):
            source = os.fspath(source)
        if options is None and isinstance(source, str):
            self._path = Path(source)
            _check_file(self._path)
            source = f"file:{source}"  # else FFmpeg would take a name such as "http:cat.mp4" for a URL
        self._source, self._low_delay, self._threads = source, low_delay, threads
        self._frame_timeout = timeout[1] if timeout and low_delay else None  # seconds without a frame
        self._open_arguments: dict[str, Any] = {"format": container, "timeout": timeout}
        self._options = dict(_LOCAL_OPTIONS if options is None else options)
        self._invalid_means = _INVALID_FILE if options is None else _INVALID_OPTIONS
        self._open()

    def _open(self) -> None:
        with reading_errors(
            self.name, "cannot be opened", self._open_arguments["timeout"], invalid=self._invalid_means
        ):
            self._container = av.open(
                self._source,
                "r",
                options=dict(self._options),
                **_ANY_ENCODING,
                **self._open_arguments,
            )
        try:
            with reading_errors(self.name, "cannot be opened"):
                self._open_streams(self._low_delay)
        except BaseException:
            self._container.close()
            raise
        #: Whether the source has timestamps; else FFmpeg guesses them.
        self.timed = not self._container.format.flags & _NO_TIMESTAMPS
        self._joined = Joined("" if self._low_delay else self._container.format.name)

    def _open_streams(self, low_delay: bool) -> None:
        pictures = [s for s in self._container.streams.video if not s.disposition & _COVER_ART]
        if not pictures:
            raise UnsupportedVideo(f"no video in it, only {_stream_types(self._container) or 'nothing'}", self.name)
        self.stream = video = pictures[0]
        if video.codec_context is None:
            raise UnsupportedVideo("this FFmpeg does not support its video codec", self.name)
        _check_size(video.codec_context.width, video.codec_context.height, self.name)
        video.codec_context.options = {"max_pixels": str(MAX_FRAME_PIXELS)}  # a later header may declare another size
        video.thread_type = "SLICE" if low_delay else "AUTO"
        video.codec_context.thread_count = self._threads or 0
        if low_delay and video.codec_context.codec.name in _DELAYING_DECODERS:
            video.codec_context.flags |= av.codec.context.Flags.low_delay
        sound = max(self._container.streams.audio, key=_audio_rank, default=None)
        self._track = track_of(sound)
        self._sound = sound if self._track else None
        if self._container.format.name in _MULTI_VARIANT:
            for stream in self._container.streams:
                if stream is not video and stream is not self._sound:
                    stream.discard = Discard.all
        duration = self._container.duration
        self.info = VideoInfo(
            video.codec_context.width,
            video.codec_context.height,
            video.average_rate or video.guessed_rate or None,
            duration / av.time_base if duration and duration > 0 else None,
            video.codec_context.name,
            self._track.codec if self._track else None,
        )

    def __iter__(self) -> Iterator[Frame]:
        """Yield all frames in order.

        Raises:
            UnreadableVideo: No frame could be decoded, the file is truncated, or reading failed midway; frames that
                were delivered stay valid. A :class:`SilentVideo` if the source sent nothing for too long.
        """
        clock = Clock(self.stream, self._start, decoding_order=self._container.format.name == "avi")
        sound: list[Sound] = []
        before = time.monotonic()
        for decoded in self._decoded_from_start(clock, sound) if self._start > 0 else self._decoded(sound):
            now = time.monotonic()
            pts, duration = clock.at(decoded)
            if pts is not None:
                shift = -clock.origin
                quarters, mirrored = orientation(decoded)
                frame = Frame(
                    number=clock.count - 1,
                    pts=pts,
                    time_base=clock.time_base,
                    picture=decoded,
                    quarters=quarters,
                    captured=now,
                    decoding=now - before,
                    duration=duration,
                    sound=[Sound(packet.packet, shift) for packet in sound],
                    track=self._track,
                    aspect=self.stream.sample_aspect_ratio,
                    mirrored=mirrored,
                )
                sound.clear()
                yield frame
            before = time.monotonic()
        self.rest = [Sound(packet.packet, -clock.origin) for packet in sound]
        if not clock.count and self._start and not self.undecodable:
            raise UnreadableVideo(f"it ends before {self._start:g} s, the requested start", self.name)
        if not clock.count:
            why = f" ({self._last_rejection})" if self._last_rejection else ""
            raise UnreadableVideo(f"no frame can be decoded: it is damaged or truncated{why}", self.name)
        if cut := self._truncation(clock.end):
            raise UnreadableVideo(f"truncated: {cut}", self.name)

    @property
    def damage(self) -> str | None:
        """How much of the video could not be decoded so far, as text; None: the decoder has found no damage."""
        lost, damaged = self.undecodable - self._expected_losses, self._marked.damaged
        packets = [f"{lost} of {self._packets_read} packets could not be decoded"] if lost else []
        frames = [f"{damaged} of {self._marked.seen} frames are damaged"] if damaged else []
        return ", ".join(packets + frames) or None

    def _truncation(self, end: Fraction) -> str | None:
        """How a file is known to end early, where FFmpeg just reports its end; None: nothing indicates that it does.

        Streams that are made to be cut anywhere (MPEG-TS, raw H.264, ...) do not show it.

        Args:
            end: The end of the last picture, in seconds.
        """
        kind, size = self._container.format.name, self._container.size
        if not size or size < 0:  # of a pipe: below 0, and from PyAV 19 on, None
            return None
        if kind.startswith("mov"):  # its index may come before the frames
            last = max(self.stream.index_entries, key=lambda entry: entry.pos, default=None)
            beyond = last is not None and last.pos + last.size > size
            return "its index lists frames beyond its end" if beyond else None
        declared = self._declared_end()
        if declared is None or declared - end <= max(Fraction(1), declared * _MISSING_SHARE):
            return None
        return f"it declares a duration of {float(declared):.1f} s, but ends after {float(end):.1f} s"

    def _declared_end(self) -> Fraction | None:
        """The end of the pictures that a file declares, in seconds; None: nothing that can be relied on."""
        kind, whole = self._container.format.name, self._container.duration
        if self._path is None or self._start > 0:
            return None
        if kind == "avi":  # an intact one may end with empty frames, which are counted, but never decoded
            return self.stream.frames * self.stream.time_base if _is_truncated_riff(self._path) else None
        if not kind.startswith("matroska") or not whole:
            return None
        # Audio may last longer than the pictures. The tag may be that of the file from which this one was cut.
        own = _seconds_of(self.stream.metadata.get("DURATION", ""))
        if own is None:
            return Fraction(whole, av.time_base) if len(self._container.streams) == 1 else None
        return min(own, Fraction(whole, av.time_base))

    def _decoded_from_start(self, clock: Clock, sound: list[Sound]) -> Iterator[av.VideoFrame]:
        """Yield frames that begin at the start or before it.

        When the first frame is shown is known only once it is decoded. In MPEG streams and others without an index, a
        seek lands anywhere, and what can be decoded begins after that.
        """
        frames = self._decoded(sound)
        first = next(frames, None)
        if first is None:
            return
        clock.begin(first)
        if isinstance(self._source, str):  # a pipe cannot seek
            # In an MPEG program stream, the first timestamps after a seek are FFmpeg's guess, half a frame off.
            for back in (_SEEK_MARGIN,) if self._container.format.name == "mpeg" else (0.0, _SEEK_MARGIN):
                found = self._seek(clock.origin + Fraction(max(0.0, self._start - back)))
                sound.clear()
                frames = self._decoded(sound)
                first = next(frames, None) if found else None
                if first is not None and clock.is_early(first):
                    break
            else:
                self.close()
                self._open()
                sound.clear()
                first = None
                frames = self._decoded(sound)
        if first is not None:
            yield first
        yield from frames

    def _seek(self, seconds: Fraction) -> bool:
        """Seek to a time; False: nothing more can be read from here."""
        try:
            self._container.seek(round(seconds * av.time_base))
        except av.error.FFmpegError:
            return False
        self._joined = Joined(self._container.format.name)
        return True

    def _decoded(self, sound: list[Sound]) -> Iterator[av.VideoFrame]:
        since = time.monotonic()
        self.undecodable = self._expected_losses = self._packets_read = 0
        anywhere = self._container.format.name in _CUT_ANYWHERE
        before_first, cut = self._start > 0 or anywhere, False
        self._marked = _MarkedFrames(cut_begin=before_first, cut_end=anywhere)
        parameter_sets = _ParameterSets(self.stream)
        for packet in self._packets():
            # A source that sends undecodable data, or everything but pictures (audio, a camera's metadata), would never
            # reach FFmpeg's timeout.
            if self._frame_timeout is not None and time.monotonic() - since > self._frame_timeout:
                why = f": {self._last_rejection}" if self._last_rejection else ""
                raise SilentVideo(f"it sent data, but no frame, for too long{why}", self.name)
            if packet.stream is self._sound and packet.dts is not None:
                sound.append(Sound(packet, Fraction(0)))
            if packet.stream is not self.stream or (packet := parameter_sets.join(packet)) is None:
                continue
            self._packets_read += packet.size > 0
            try:
                frames: Any = packet.decode()
            except av.error.FFmpegError as error:  # dozens of them mean damage; the next packet may be intact
                self.undecodable += 1
                self._expected_losses += before_first
                cut = anywhere and not before_first
                self._last_rejection = reason_of(error)
                continue
            cut = cut and not packet.size  # only the flush packet, of size 0, may follow
            for frame in frames:
                before_first = False
                _check_size(frame.width, frame.height, self.name)
                self._marked.add(frame)
                yield frame
                since = time.monotonic()
        self._expected_losses += cut

    def _needs_index_first(self) -> bool:
        return self._container.format.name.startswith("mov") and not isinstance(self._source, str)

    def _packets(self) -> Iterator[av.Packet[Any]]:
        """Yield packets of all streams. PyAV would skip others internally, but each shows that the source is alive."""
        packets = self._container.demux()
        while True:
            try:
                with reading_errors(self.name, _NO_INDEX if self._needs_index_first() else "reading failed"):
                    packet = next(packets, None)
            except IndexError:  # from PyAV, at the end, if a stream was added after the file was opened
                return
            if packet is None:
                return
            if packet.stream is self.stream or packet.stream is self._sound:
                self._joined.move(packet)
            yield packet

    def close(self) -> None:
        """Close the file."""
        self._container.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


#: By default FFmpeg writes the index of an MP4 last, and nothing before it can be read without the index.
_NO_INDEX: Final = (
    "reading failed: an MP4 in a pipe needs its index first (ffmpeg -i IN.mp4 -c copy -movflags faststart OUT.mp4); "
    "or give the file itself"
)

#: The cover of a song.
_COVER_ART: Final = Disposition.attached_pic

#: ``AVFMT_NOTIMESTAMPS``: raw H.264, and the MJPEG of cameras.
_NO_TIMESTAMPS: Final = 0x80


class _MarkedFrames:
    """Counts the frames that the decoder has marked as damaged.

    The decoders of MPEG-2 and MPEG-4 part 2 fill damaged parts of a picture from others, and report no error.
    """

    def __init__(self, *, cut_begin: bool, cut_end: bool) -> None:
        """Start to count.

        Args:
            cut_begin: The first pictures may reference earlier ones that are missing; if so, they are not damaged.
            cut_end: The last pictures may be incomplete; if so, they are not damaged.
        """
        self.seen = 0  #: all frames
        self._marked, self._begun = 0, not cut_begin
        self._latest: deque[bool] = deque(maxlen=_INCOMPLETE_END if cut_end else 0)

    def add(self, frame: av.VideoFrame) -> None:
        """Count a frame."""
        self.seen += 1
        self._begun = self._begun or not frame.is_corrupt
        is_damaged = self._begun and frame.is_corrupt
        self._marked += is_damaged
        self._latest.append(is_damaged)

    @property
    def damaged(self) -> int:
        """How many are damaged."""
        return self._marked - sum(self._latest)


class _ParameterSets:
    """Merges packets that hold only parameter sets or metadata (SPS, PPS, SEI) into the next packet with a picture.

    Some recorders put them into packets of their own. FFmpeg's H.264 decoder applies them, but reports the packet as
    damaged; its H.265 decoder does not.
    """

    def __init__(self, stream: Any) -> None:
        self._only_pictures: BitStreamFilterContext | None = None
        self._waiting = b""
        if stream.codec_context.name == "h264":
            with contextlib.suppress(av.error.FFmpegError):  # the stream's extradata is damaged
                self._only_pictures = BitStreamFilterContext(_PICTURE_UNITS, stream)

    def join(self, packet: Any) -> Any:
        """The packet, preceded by what was held back for it; None: this one is held back for the next."""
        if self._only_pictures and 0 < packet.size < _PICTURE_BYTES and not _holds_picture(packet, self._only_pictures):
            self._waiting += bytes(packet)
            return None
        if not self._waiting or not packet.size:
            return packet
        joined = _packet(self._waiting + bytes(packet))
        self._waiting = b""
        for name in ("stream", "time_base", "pts", "dts", "duration"):
            setattr(joined, name, getattr(packet, name))
        return joined


def _holds_picture(packet: Any, only: BitStreamFilterContext) -> bool:
    try:
        return bool(only.filter(_packet(bytes(packet))))  # a copy, since the filter consumes its input
    except av.error.FFmpegError:
        return True  # the decoder will report the damage


def _packet(data: bytes) -> av.Packet[Any]:
    """A packet that owns its memory, with the zero padding that FFmpeg's parsers need; ``av.Packet(data)`` has none."""
    packet = av.Packet(len(data))
    packet.update(data)
    return packet


def _check_file(path: Path) -> None:
    try:
        about = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        raise UnreadableVideo("no such file", str(path)) from None
    except OSError as error:  # the name is too long, or a parent folder may not be entered
        raise UnreadableVideo(f"cannot be opened ({error.strerror})", str(path)) from error
    except ValueError as error:  # a name that no file can have
        raise UnreadableVideo(f"cannot be opened ({error})", str(path)) from error
    if stat.S_ISDIR(about.st_mode):
        raise UnreadableVideo("a folder, not a video", str(path))
    if stat.S_ISREG(about.st_mode) and about.st_size == 0:
        raise UnreadableVideo("empty (0 bytes)", str(path))


def _is_truncated_riff(path: Path) -> bool:
    """Whether an AVI's header declares a longer file than this one."""
    with contextlib.suppress(OSError), path.open("rb") as file:
        return int.from_bytes(file.read(8)[4:], "little") + 8 > path.stat().st_size
    return False


def _seconds_of(text: str) -> Fraction | None:
    """Parse a duration in Matroska's tags, such as 00:00:04.021000000."""
    match = re.fullmatch(r"(\d+):(\d\d):(\d\d(?:\.\d+)?)", text)
    return match and 3600 * Fraction(match[1]) + 60 * Fraction(match[2]) + Fraction(match[3])


def _check_size(width: int, height: int, name: str) -> None:
    if width * height > MAX_FRAME_PIXELS:
        raise UnsupportedVideo(
            f"frames of {width} x {height} are {width * height / 1e6:.0f} megapixels; the limit is "
            f"{MAX_FRAME_PIXELS / 1e6:.0f}: scale the video down first",
            name,
        )


def _audio_rank(sound: Any) -> tuple[bool, bool]:
    """Rank an audio track by whether it can be decoded, then by whether it is the default; the first one wins ties."""
    return sound.codec_context is not None, bool(sound.disposition & Disposition.default)


def _stream_types(container: Any) -> str:
    return ", ".join(sorted({stream.type for stream in container.streams}))
