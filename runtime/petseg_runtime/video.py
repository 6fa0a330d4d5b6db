"""Video in: frames upright, in the right colours and with their exact times, from files, pipes and streams (PyAV)."""

from __future__ import annotations

import contextlib
import math
import os
import re
import stat
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Final, Self, TypeAlias

import av
import av.error
import numpy as np
import numpy.typing as npt
from av.bitstream import BitStreamFilterContext
from av.video.reformatter import ColorRange, Colorspace, Interpolation, VideoReformatter

from petseg_runtime.errors import InputError, SilentVideo, UnreadableVideo, UnsupportedVideo, UsageError
from petseg_runtime.video_sound import Sound, Track, track_of

__all__ = ["MAX_FRAME_PIXELS", "Colours", "Converter", "Frame", "VideoInfo", "VideoReader"]

U8: TypeAlias = npt.NDArray[np.uint8]

#: A video whose frames have more pixels than this (8K has 33 million) is refused before one is decoded.
MAX_FRAME_PIXELS: Final = 8192 * 4352

# What names other files or addresses, to be opened in its place. A photo album's video must not be able to do that.
_LISTS: Final = frozenset(
    {
        *("applehttp", "avisynth", "concat", "dash", "hls", "image2", "imf", "lavfi", "rtp", "rtsp", "sap", "sdp"),
        *("vapoursynth", "webm_dash_manifest"),
    }
)
_LOCAL: Final = {
    "protocol_whitelist": "file,pipe",
    "format_whitelist": ",".join(sorted(av.formats_available - _LISTS)),
}

#: Where a seek ends behind the start that was asked for, it is tried so many seconds before; then all is decoded.
_BACK: Final = 10.0

#: A transport stream's time that goes back by more than this many seconds, or on by more than that, counts anew: parts
#: were joined, or a packet was damaged. (FFmpeg's own thresholds.)
_ANEW, _LEAP = Fraction(1, 10), Fraction(10)

#: What recorders and receivers may begin and end anywhere, FFmpeg's names: the first pictures may need some that came
#: before, and the last one may be half.
_ANYWHERE: Final = frozenset({"h264", "hevc", "m4v", "mpeg", "mpegts", "mpegvideo"})

#: Packets of so many bytes and more are taken to hold a picture.
_SMALL: Final = 4096

#: What keeps of a packet of H.264 only the units that are (parts of) pictures (its table 7-1).
_PICTURES: Final = "filter_units=pass_types=1-5"

#: A file that lacks more than this share of what it says it lasts, and more than a second, was cut.
_SHORTER: Final = Fraction(1, 20)

# As exact as swscale can: its fast roads take a tenth of the time, but are up to 4 levels off, and darker by 1 or 2.
_EXACT: Final = Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INP | Interpolation.FULL_CHR_H_INT
_SAME_SIZE: Final = Interpolation.BILINEAR | _EXACT
# The only step from the decoder's YUV to the model's RGB. "Bilinear" widens its filter where it shrinks, as Pillow's
# does: benchmarks/results/video-road.json.
_SHRINKING: Final = Interpolation.BILINEAR | _EXACT
# Where less than so many times the model's size is left per side, one step would blur the colours of 4:2:0 visibly to
# the model: they are brought to the size of the brightness first.
_MARGIN: Final = 3
_WHOLE_CHROMA: Final = {"yuv420p": "yuv444p", "yuvj420p": "yuvj444p"}

#: ``AVColorSpace``: what says nothing about how YUV was made (RGB, unspecified, reserved).
_NO_MATRIX: Final = frozenset({0, 2, 3})
_UNSPECIFIED: Final = 2
_BT709: Final = 1
_BT601: Final = 6  # SMPTE 170M, whose matrix is that of BT.601

#: ``AVColorTransferCharacteristic`` of HDR. That of BT.2020 itself is BT.709's, which is SDR.
_HDR: Final = {16: "PQ", 18: "HLG"}
_TO_SDR: Final = (
    "ffmpeg -i IN.mp4 -vf zscale=t=linear:npl=100,format=gbrpf32le,zscale=p=bt709,tonemap=tonemap=hable:desat=0,"
    "zscale=t=bt709:m=bt709:r=tv,format=yuv420p -c:a copy OUT.mp4"
)

#: Decoders that hold frames back unless they are told that it is live. Others hold back for threads that each have a
#: frame, which a live source has none of, and for the order of the frames: those of MPEG-1, MPEG-2, MPEG-4 part 2 and
#: VC-1 give that up when they are told, and their B-frames come out in the order of decoding.
_DELAYING: Final = frozenset({"libdav1d"})


@dataclass(frozen=True)
class Colours:
    """How a frame's numbers become colours, as FFmpeg's enumerations.

    Attributes:
        matrix: ``AVColorSpace``: BT.601, BT.709, BT.2020, ...
        full_range: Whether black is 0 (and not 16).
        primaries: ``AVColorPrimaries``.
        transfer: ``AVColorTransferCharacteristic``.
    """

    matrix: int
    full_range: bool
    primaries: int = _UNSPECIFIED
    transfer: int = _UNSPECIFIED

    @classmethod
    def of(cls, picture: av.VideoFrame) -> Colours:
        """What a frame says; a matrix that it does not name is BT.709 from HD on, else BT.601, as in players."""
        matrix = picture.colorspace
        if matrix in _NO_MATRIX:
            matrix = _BT709 if picture.height > 576 or picture.width > 1024 else _BT601
        full = picture.color_range == ColorRange.JPEG or picture.format.name.startswith("yuvj")
        return cls(matrix, full, picture.color_primaries, picture.color_trc)


class Converter:
    """Turns decoded frames into RGB; transparency is left out.

    For one thread: it keeps swscale's tables from frame to frame.
    """

    def __init__(self, threads: int | None = None) -> None:
        """Begin without tables.

        Args:
            threads: CPU threads; None: as many as there are.
        """
        self._scaler, self._chroma, self._threads = VideoReformatter(), VideoReformatter(), threads

    def __call__(self, picture: av.VideoFrame, height: int, width: int) -> U8:
        """Convert and resize in one step.

        Args:
            picture: A decoded frame in any format.
            height: Wanted.
            width: Wanted.

        Returns:
            uint8 [height, width, 3] RGB, the caller's own.
        """
        colours = Colours.of(picture)
        known = picture.colorspace not in _NO_MATRIX
        same = (height, width) == (picture.height, picture.width)
        converted = self._scaler.reformat(
            picture if same else self._prepared(picture, height, width),
            width=width,
            height=height,
            format="rgb24",
            src_colorspace=None if known else (Colorspace.ITU709 if colours.matrix == _BT709 else Colorspace.ITU601),
            src_color_range=ColorRange.JPEG if colours.full_range else ColorRange.MPEG,
            dst_color_range=ColorRange.JPEG,
            interpolation=_SAME_SIZE if same else _SHRINKING,
            threads=self._threads,
        )
        return np.asarray(converted.to_ndarray(), np.uint8)

    def _prepared(self, picture: av.VideoFrame, height: int, width: int) -> av.VideoFrame:
        whole = _WHOLE_CHROMA.get(picture.format.name)
        if not whole or min(picture.height / height, picture.width / width) >= _MARGIN:
            return picture
        return self._chroma.reformat(picture, format=whole, interpolation=Interpolation.BILINEAR, threads=self._threads)


@dataclass(eq=False)
class Frame:
    """One frame of a video.

    Attributes:
        number: Counted from 0 over all frames that were delivered.
        pts: When it is shown, in units of ``time_base``, from the first frame on.
        time_base: Seconds.
        picture: As decoded.
        quarters: Quarter turns counter-clockwise that bring it upright, 0 to 3.
        captured: ``time.monotonic()`` when it came out of the decoder.
        decoding: Seconds that the decoder needed for it.
        duration: For how long it is shown, in units of ``time_base``; 0 if that is not known.
        sound: What came since the frame before.
        track: What its packets belong to; None: the source has no sound.
        aspect: Width of a pixel by its height, as decoded, not upright; None: the source does not say.
    """

    number: int
    pts: int
    time_base: Fraction
    picture: av.VideoFrame
    quarters: int = 0
    captured: float = 0.0
    decoding: float = 0.0
    duration: int = 0
    sound: list[Sound] = field(default_factory=list)
    track: Track | None = None
    aspect: Fraction | None = None

    @property
    def time(self) -> float:
        """Seconds since the first frame."""
        return float(self.pts * self.time_base)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width, upright."""
        height, width = self.picture.height, self.picture.width
        return (width, height) if self.quarters % 2 else (height, width)

    @property
    def notes(self) -> tuple[str, ...]:
        """What had to be decided about its colours, with the remedy."""
        kind = _HDR.get(Colours.of(self.picture).transfer)
        if kind is None:
            return ()
        return (f"it is HDR ({kind}), and is read as SDR: masks may be worse; made into SDR first: {_TO_SDR}",)

    def pixels(self, convert: Converter, height: int | None = None, width: int | None = None) -> U8:
        """The frame as uint8 [H, W, 3] RGB, upright and contiguous, at its own size or another.

        Args:
            convert: The calling thread's own.
            height: None: the frame's.
            width: None: the frame's.

        Raises:
            UnsupportedVideo: Its pixel format cannot be converted.
        """
        h, w = height or self.size[0], width or self.size[1]
        try:
            upright = convert(self.picture, *((w, h) if self.quarters % 2 else (h, w)))
        except (av.error.FFmpegError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            about = f"{self.picture.format.name} with the colour matrix {self.picture.colorspace:d}"
            raise UnsupportedVideo(f"frames in {about} cannot be converted ({reason})") from error
        return np.ascontiguousarray(np.rot90(upright, self.quarters)) if self.quarters else upright


@dataclass(frozen=True)
class VideoInfo:
    """What a source says of itself before it is decoded.

    Attributes:
        width: As stored (a phone's portrait video is stored lying on its side).
        height: As stored.
        rate: Frames a second, as far as that is constant; None: not known.
        duration: Seconds; None: endless, or not known.
        codec: FFmpeg's name.
        audio: FFmpeg's name of the sound's codec; None: there is none.
    """

    width: int
    height: int
    rate: Fraction | None
    duration: float | None
    codec: str
    audio: str | None


class VideoReader:
    """Decodes one video from one opening to its end. Use it as a context manager, and iterate over it once."""

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
            source: A file, a URL, a device's name, or what has a ``read`` method.
            name: What errors call it; None: itself.
            container: FFmpeg's name of the format (``v4l2``, ``rawvideo``); None: found out.
            options: For FFmpeg's demuxer and protocol. None: those for a local file, which may open nothing else.
            timeout: Seconds to wait for the opening, and for each packet; None: for ever.
            low_delay: It is live: decode without the threads that each hold a frame back, leave its times to itself
                where they go back, and wait no longer for a frame than for a packet.
            start: Seconds of the video to pass over.
            threads: CPU threads of the decoder; None: as many as FFmpeg thinks fit.

        Raises:
            UsageError: ``start`` is no number of seconds, or less than 0.
            UnreadableVideo: There is nothing, or it is damaged.
            SilentVideo: It sends nothing.
            UnsupportedVideo: No picture in it, or one that is too large.
        """
        if not 0 <= start < math.inf:
            raise UsageError(f"start {start} must be a number of seconds, 0 or more")
        self.name = name or (os.fspath(source) if isinstance(source, (str, os.PathLike)) else "<stream>")
        self._start = start
        self._path: Path | None = None  # of a local file
        self.undecodable = 0  #: packets that the decoder refused
        self._refused = ""  # why
        self._unmissed = 0  # of these: before the first picture and at the very end, where it may be cut anywhere
        self._packets_read = 0  # with pictures
        self.rest: list[Sound] = []  #: sound behind the last frame, once that has come
        if isinstance(source, os.PathLike):
            source = os.fspath(source)
        if options is None and isinstance(source, str):
            self._path = Path(source)
            _check_file(self._path)
            source = f"file:{source}"  # else a name such as "http:cat.mp4" would be more than a name
        self._source, self._low_delay, self._threads = source, low_delay, threads
        self._longest = timeout[1] if timeout and low_delay else None  # seconds without a frame
        self._how: dict[str, Any] = {"format": container, "timeout": timeout}
        self._options = dict(_LOCAL if options is None else options)
        self._open()

    def _open(self) -> None:
        with _errors_of(self.name, "cannot be opened", self._how["timeout"]):
            self._container = av.open(
                self._source,
                "r",
                options=dict(self._options),
                metadata_errors="replace",  # titles in old files are in any encoding
                **self._how,
            )
        try:
            with _errors_of(self.name, "cannot be opened"):
                self._open_streams(self._low_delay)
        except BaseException:
            self._container.close()
            raise
        self.timed = not self._container.format.flags & _NO_TIMES  #: whether its times are its own, not FFmpeg's guess
        self._joined = _Joined("" if self._low_delay else self._container.format.name)

    def _open_streams(self, low_delay: bool) -> None:
        pictures = [s for s in self._container.streams.video if not s.disposition & _COVER]
        if not pictures:
            raise UnsupportedVideo(f"no picture in it, only {_kinds(self._container) or 'nothing'}", self.name)
        self.stream = video = pictures[0]
        if video.codec_context is None:
            raise UnsupportedVideo("its pictures are in a codec that this FFmpeg does not know", self.name)
        _check_size(video.codec_context.width, video.codec_context.height, self.name)
        video.codec_context.options = {"max_pixels": str(MAX_FRAME_PIXELS)}  # a later header may say another size
        video.thread_type = "SLICE" if low_delay else "AUTO"
        video.codec_context.thread_count = self._threads or 0
        if low_delay and video.codec_context.codec.name in _DELAYING:
            video.codec_context.flags |= av.codec.context.Flags.low_delay
        sound = next(iter(self._container.streams.audio), None)
        self._track = track_of(sound)
        self._sound = sound if self._track else None
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
        """All frames, in order.

        Raises:
            UnreadableVideo: Not a single frame could be decoded, or reading failed on the way; frames that were
                delivered stay valid. A :class:`SilentVideo` where it has sent nothing for too long.
        """
        clock = _Clock(self.stream, self._start, decoding_order=self._container.format.name == "avi")
        sound: list[Sound] = []
        before = time.monotonic()
        for decoded in self._sought(clock, sound) if self._start > 0 else self._decoded(sound):
            now = time.monotonic()
            pts, duration = clock.at(decoded)
            if pts is not None:
                shift = -clock.origin
                frame = Frame(
                    clock.count - 1,
                    pts,
                    clock.time_base,
                    decoded,
                    round(decoded.rotation / 90) % 4,
                    now,
                    now - before,
                    duration,
                    [Sound(packet.packet, shift) for packet in sound],
                    self._track,
                    self.stream.sample_aspect_ratio,
                )
                sound.clear()
                yield frame
            before = time.monotonic()
        self.rest = [Sound(packet.packet, -clock.origin) for packet in sound]
        if not clock.count and self._start and not self.undecodable:
            raise UnreadableVideo(f"it ends before {self._start:g} s, where to start", self.name)
        if not clock.count:
            why = f" ({self._refused})" if self._refused else ""
            raise UnreadableVideo(f"not one frame in it can be decoded: it is damaged or truncated{why}", self.name)
        if cut := self._cut(clock.end):
            raise UnreadableVideo(f"truncated: {cut}", self.name)

    @property
    def damage(self) -> str | None:
        """What of its pictures could not be decoded so far, for people; None: all could, or nothing is missed."""
        lost = self.undecodable - self._unmissed
        return f"{lost} of {self._packets_read} packets could not be decoded" if lost else None

    def _cut(self, end: Fraction) -> str | None:
        """How it is known that a file ends before its end, where FFmpeg just ends; None: it is not known to.

        Of streams that were made to be cut anywhere (MPEG-TS, bare H.264, ...) nobody can tell.

        Args:
            end: Up to when there are pictures, in seconds.
        """
        kind, size = self._container.format.name, self._container.size
        if size <= 0:
            return None
        if kind.startswith("mov"):  # its index may come first
            last = max(self.stream.index_entries, key=lambda entry: entry.pos, default=None)
            beyond = last is not None and last.pos + last.size > size
            return "its index names frames that lie behind its end" if beyond else None
        said = self._said_end()
        if said is None or said - end <= max(Fraction(1), said * _SHORTER):
            return None
        return f"it says that it lasts {float(said):.1f} s, but ends after {float(end):.1f} s"

    def _said_end(self) -> Fraction | None:
        """Up to when a file says that it has pictures, in seconds; None: it says nothing that can be relied upon."""
        kind, whole = self._container.format.name, self._container.duration
        if self._path is None or self._start > 0:
            return None
        if kind == "avi":  # which may end with frames that are empty: they are counted, and never decoded
            return self.stream.frames * self.stream.time_base if _is_cut_riff(self._path) else None
        if not kind.startswith("matroska") or not whole:
            return None
        # Sound may last longer. The tag may be that of the file from which this one was cut.
        own = _seconds_of(self.stream.metadata.get("DURATION", ""))
        if own is None:
            return Fraction(whole, av.time_base) if len(self._container.streams) == 1 else None
        return min(own, Fraction(whole, av.time_base))

    def _sought(self, clock: _Clock, sound: list[Sound]) -> Iterator[av.VideoFrame]:
        """Frames from at or before the start on.

        Where the first frame lies is known when it is decoded only; and of MPEG streams and others without an index, a
        seek ends anywhere, and what can be decoded begins behind that.
        """
        frames = self._decoded(sound)
        first = next(frames, None)
        if first is None:
            return
        clock.begin(first)
        if isinstance(self._source, str):  # a pipe is read as it comes
            # The first times behind a seek in an MPEG program stream are FFmpeg's guess, half a frame off.
            for back in (_BACK,) if self._container.format.name == "mpeg" else (0.0, _BACK):
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
        """Go to a time; False: nothing more can be read from here."""
        try:
            self._container.seek(round(seconds * av.time_base))
        except av.error.FFmpegError:
            return False
        self._joined = _Joined(self._container.format.name)
        return True

    def _decoded(self, sound: list[Sound]) -> Iterator[av.VideoFrame]:
        since = time.monotonic()
        self.undecodable = self._unmissed = self._packets_read = 0
        anywhere = self._container.format.name in _ANYWHERE
        in_the_middle, cut = self._start > 0 or anywhere, False
        settings = _Settings(self.stream)
        for packet in self._packets():
            # One that sends what nobody can decode, or all but pictures (its sound, a camera's metadata), would keep
            # FFmpeg content for ever.
            if self._longest is not None and time.monotonic() - since > self._longest:
                why = f": {self._refused}" if self._refused else ""
                raise SilentVideo(f"no frame in what it sends for too long{why}", self.name)
            if packet.stream is self._sound and packet.dts is not None:
                sound.append(Sound(packet, Fraction(0)))
            if packet.stream is not self.stream or (packet := settings.join(packet)) is None:
                continue
            self._packets_read += packet.size > 0
            try:
                frames: Any = packet.decode()
            except (
                av.error.FFmpegError
            ) as error:  # decoders say dozens of things of damage; the next packet may be whole
                self.undecodable += 1
                self._unmissed += in_the_middle
                cut = anywhere and not in_the_middle
                self._refused = _reason(error)
                continue
            cut = cut and not packet.size  # the last one, of size 0, stands for the end
            for frame in frames:
                in_the_middle = False
                _check_size(frame.width, frame.height, self.name)
                yield frame
                since = time.monotonic()
        self._unmissed += cut

    def _needs_index_first(self) -> bool:
        return self._container.format.name.startswith("mov") and not isinstance(self._source, str)

    def _packets(self) -> Iterator[av.Packet[Any]]:
        """All that comes, of other streams too: PyAV would pass over that inside, where each is a sign of life."""
        packets = self._container.demux()
        while True:
            try:
                with _errors_of(self.name, _UNREAD_PIPE if self._needs_index_first() else "reading it failed"):
                    packet = next(packets, None)
            except IndexError:  # PyAV, behind the end, of a stream that was not there when the file was opened
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


class _Joined:
    """Puts the times of joined transport streams, each of which counts anew, one behind the other."""

    def __init__(self, container: str) -> None:
        self._may_be = container in ("mpegts", "mpeg")
        self._offset = Fraction(0)
        self._last: dict[int, Fraction] = {}  # the end of each stream's last packet, in seconds

    def move(self, packet: av.Packet[Any]) -> None:
        """Change a packet's times to where it belongs."""
        if not self._may_be or packet.dts is None or packet.time_base is None:
            return
        index, base = packet.stream.index, packet.time_base
        begins, last = packet.dts * base + self._offset, self._last.get(index)
        if last is not None and not last - _ANEW <= begins <= last + _LEAP:
            self._offset += last - begins
            begins = last
        if self._offset:
            shift = round(self._offset / base)
            packet.dts += shift
            packet.pts = None if packet.pts is None else packet.pts + shift
        self._last[index] = begins + (packet.duration or 0) * base


class _Clock:
    """When each frame is shown: the source's own times, counted from the first frame, and always growing."""

    def __init__(self, stream: Any, start: float, *, decoding_order: bool = False) -> None:
        # AVI says when a frame is decoded, never when it is shown; in order that is the same, but for a shift.
        self._time = "dts" if decoding_order else "pts"
        self.time_base: Fraction = stream.time_base or Fraction(1, 90000)
        rate = stream.average_rate or stream.guessed_rate or Fraction(25)
        self._step = max(1, round(1 / rate / self.time_base))  # where a frame does not say when it is shown
        # A start that was computed as n / rate, and rounded, means frame n.
        self._start = math.ceil(Fraction(start) / self.time_base - Fraction(1, 1000)) if start > 0 else 0
        self._first: int | None = None  # the source's first frame, in its own time
        self._last = -1  # the last frame, counted from the first one
        self._delivered = 0  # the first one from the start on, counted likewise
        self._end = 0  # of the last frame, in the source's own time
        self.count = 0

    @property
    def origin(self) -> Fraction:
        """When, in the source's own time, what is delivered begins; in seconds."""
        return ((self._first or 0) + self._delivered) * self.time_base

    @property
    def end(self) -> Fraction:
        """Up to when there are frames, in the source's own time or from the first one on, whichever is more."""
        return (self._end - min(self._first or 0, 0)) * self.time_base

    def begin(self, picture: av.VideoFrame) -> None:
        """Take a frame for the source's first."""
        self._first = self._own(picture) or 0

    def is_early(self, picture: av.VideoFrame) -> bool:
        """Whether a frame is known to be shown at the start or before it."""
        own = self._own(picture)
        return own is not None and own - (self._first or 0) <= self._start

    def at(self, picture: av.VideoFrame) -> tuple[int | None, int]:
        """When a frame is shown and for how long; None if that is before the start that was asked for."""
        own = self._own(picture)
        if self._first is None:
            self._first = own or 0
        guess = self._last + self._step if self._last >= 0 else 0
        if own is not None and own - self._first < self._last - _LEAP / self.time_base:  # one before was far too late
            self._first = own - guess
        self._last = max(guess if own is None else own - self._first, self._last + 1)
        self._end = max(self._end, self._first + self._last + (picture.duration or self._step))
        if self._last < self._start:
            return None, 0
        if not self.count:
            self._delivered = self._last
        self.count += 1
        return self._last - self._delivered, picture.duration or 0

    def _own(self, picture: av.VideoFrame) -> int | None:
        pts: int | None = getattr(picture, self._time)
        if pts is not None and picture.time_base and picture.time_base != self.time_base:
            return round(pts * picture.time_base / self.time_base)
        return pts


#: FFmpeg writes an MP4's index last, unless it is told otherwise; without it nothing before it can be read.
_UNREAD_PIPE: Final = (
    "reading it failed: an MP4 in a pipe needs its index first (ffmpeg -i IN.mp4 -c copy -movflags faststart OUT.mp4); "
    "or give the file itself"
)

#: ``AV_DISPOSITION_ATTACHED_PIC``: a song's cover.
_COVER: Final = 0x400

#: ``AVFMT_NOTIMESTAMPS``: bare H.264, and the MJPEG of cameras.
_NO_TIMES: Final = 0x80


class _errors_of:  # noqa: N801 (used like a function)
    """Turns FFmpeg's errors into ours, with the source's name and without its credentials."""

    def __init__(self, name: str, what: str, timeout: tuple[float, float] | None = None) -> None:
        self._name, self._what, self._longest = name, what, timeout[0] if timeout else math.inf

    def __enter__(self) -> None:
        self._begun = time.monotonic()

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, av.error.FFmpegError):
            # FFmpeg tells differently of time that is over. Not from it: it names the URL with the password, and a
            # traceback would print that.
            if isinstance(error, av.error.ExitError) or time.monotonic() - self._begun >= self._longest:
                raise SilentVideo(f"{self._what} (it sent nothing for too long)", self._name) from None
            raise UnreadableVideo(f"{self._what} ({_reason(error)})", self._name) from None
        if isinstance(error, (OSError, ValueError, MemoryError)) and not isinstance(error, InputError):
            raise UnreadableVideo(f"{self._what} ({error})", self._name) from error


class _Settings:
    """Puts packets that hold settings and no picture (SPS, PPS, SEI) into the next one.

    Some recorders keep them in packets of their own. FFmpeg's decoder of H.264 takes the settings, but calls the packet
    damaged; that of H.265 does not.
    """

    def __init__(self, stream: Any) -> None:
        self._pictures: BitStreamFilterContext | None = None
        self._waiting = b""
        if stream.codec_context.name == "h264":
            with contextlib.suppress(av.error.FFmpegError):  # what the stream says of itself is damaged
                self._pictures = BitStreamFilterContext(_PICTURES, stream)

    def join(self, packet: Any) -> Any:
        """The packet with the settings that came before it; None: it waits for the next."""
        if self._pictures and 0 < packet.size < _SMALL and not _any_left(packet, self._pictures):
            self._waiting += bytes(packet)
            return None
        if not self._waiting or not packet.size:
            return packet
        joined = _packet(self._waiting + bytes(packet))
        self._waiting = b""
        for name in ("stream", "time_base", "pts", "dts", "duration"):
            setattr(joined, name, getattr(packet, name))
        return joined


def _any_left(packet: Any, only: BitStreamFilterContext) -> bool:
    try:
        return bool(only.filter(_packet(bytes(packet))))  # a copy: the filter takes what it is given
    except av.error.FFmpegError:
        return True  # that it is damaged, the decoder says


def _packet(data: bytes) -> av.Packet[Any]:
    """A packet of its own memory, behind which are the zeros that FFmpeg's readers run into: one of bytes has none."""
    packet = av.Packet(len(data))
    packet.update(data)
    return packet


def _reason(error: av.error.FFmpegError) -> str:
    """FFmpeg's words, without the name, which may hold a password."""
    if isinstance(error, av.error.InvalidDataError):
        return "not a video, damaged or truncated"
    if isinstance(error, av.error.ArgumentError):
        return "not a video, or a list of other files, which are not opened"
    return error.strerror or type(error).__name__


def _check_file(path: Path) -> None:
    try:
        about = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        raise UnreadableVideo("no such file", str(path)) from None
    except OSError as error:  # a name that is too long, a folder on the way that may not be entered
        raise UnreadableVideo(f"cannot be opened ({error.strerror})", str(path)) from error
    except ValueError as error:  # a name that no file can have
        raise UnreadableVideo(f"cannot be opened ({error})", str(path)) from error
    if stat.S_ISDIR(about.st_mode):
        raise UnreadableVideo("a folder, not a video", str(path))
    if stat.S_ISREG(about.st_mode) and about.st_size == 0:
        raise UnreadableVideo("empty (0 bytes)", str(path))


def _is_cut_riff(path: Path) -> bool:
    """Whether an AVI says at its beginning that it is longer than it is."""
    with contextlib.suppress(OSError), path.open("rb") as file:
        return int.from_bytes(file.read(8)[4:], "little") + 8 > path.stat().st_size
    return False


def _seconds_of(text: str) -> Fraction | None:
    """What Matroska's tags say as 00:00:04.021000000."""
    match = re.fullmatch(r"(\d+):(\d\d):(\d\d(?:\.\d+)?)", text)
    return match and 3600 * Fraction(match[1]) + 60 * Fraction(match[2]) + Fraction(match[3])


def _check_size(width: int, height: int, name: str) -> None:
    if width * height > MAX_FRAME_PIXELS:
        raise UnsupportedVideo(
            f"frames of {width} x {height} are {width * height / 1e6:.0f} megapixels; the limit is "
            f"{MAX_FRAME_PIXELS / 1e6:.0f}: make it smaller first",
            name,
        )


def _kinds(container: Any) -> str:
    return ", ".join(sorted({stream.type for stream in container.streams}))
