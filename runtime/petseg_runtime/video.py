"""Video in: frames upright, in the right colours and with their exact times, from files, pipes and streams (PyAV)."""

from __future__ import annotations

import os
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
from av.video.reformatter import ColorRange, Colorspace, Interpolation, VideoReformatter

from petseg_runtime.errors import InputError, UnreadableVideo, UnsupportedVideo
from petseg_runtime.video_sound import Sound, Track, track_of

__all__ = ["MAX_FRAME_PIXELS", "Colours", "Converter", "Frame", "VideoInfo", "VideoReader"]

U8: TypeAlias = npt.NDArray[np.uint8]

#: A video whose frames have more pixels than this (8K has 33 million) is refused before one is decoded.
MAX_FRAME_PIXELS: Final = 8192 * 4352

# A local file must not make FFmpeg open others on the network: playlists and concatenations can name any.
_LOCAL: Final = {"protocol_whitelist": "file,pipe"}

# As the first and the only step from the decoder's YUV to the model's RGB, and as exact as swscale can: its fast roads
# differ by several levels. "Bilinear" widens its filter where it shrinks, as Pillow's does.
_EXACT: Final = (
    Interpolation.BILINEAR | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INP | Interpolation.FULL_CHR_H_INT
)

#: ``AVColorSpace``: what says nothing about how YUV was made (RGB, unspecified, reserved).
_NO_MATRIX: Final = frozenset({0, 2, 3})
_UNSPECIFIED: Final = 2
_BT709: Final = 1
_BT601: Final = 6  # SMPTE 170M, whose matrix is that of BT.601


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
    """Turns decoded frames into RGB. For one thread: it keeps swscale's tables from frame to frame."""

    def __init__(self) -> None:
        self._scaler = VideoReformatter()

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
        converted = self._scaler.reformat(
            picture,
            width=width,
            height=height,
            format="rgb24",
            src_colorspace=None if known else (Colorspace.ITU709 if colours.matrix == _BT709 else Colorspace.ITU601),
            src_color_range=ColorRange.JPEG if colours.full_range else ColorRange.MPEG,
            dst_color_range=ColorRange.JPEG,
            interpolation=_EXACT,
        )
        return np.asarray(converted.to_ndarray(), np.uint8)


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

    @property
    def time(self) -> float:
        """Seconds since the first frame."""
        return float(self.pts * self.time_base)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width, upright."""
        height, width = self.picture.height, self.picture.width
        return (width, height) if self.quarters % 2 else (height, width)

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
            raise UnsupportedVideo(f"frames in {self.picture.format.name} cannot be converted ({reason})") from error
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
    ) -> None:
        """Open a source.

        Args:
            source: A file, a URL, a device's name, or what has a ``read`` method.
            name: What errors call it; None: itself.
            container: FFmpeg's name of the format (``v4l2``, ``rawvideo``); None: found out.
            options: For FFmpeg's demuxer and protocol. None: those for a local file, which may open nothing else.
            timeout: Seconds to wait for the opening, and for each packet; None: for ever.
            low_delay: Decode without the threads that each hold a frame back.
            start: Seconds of the video to pass over.

        Raises:
            UnreadableVideo: There is nothing, it is damaged, or it sends nothing.
            UnsupportedVideo: No picture in it, or one that is too large.
        """
        self.name = name or (os.fspath(source) if isinstance(source, (str, os.PathLike)) else "<stream>")
        self._start = start
        self.undecodable = 0  #: packets that the decoder refused
        self._refused = ""  # why
        self.rest: list[Sound] = []  #: sound behind the last frame, once that has come
        if isinstance(source, os.PathLike):
            source = os.fspath(source)
        if options is None and isinstance(source, str):
            _check_file(Path(source))
        with _errors_of(self.name, "cannot be opened"):
            self._container = av.open(
                source,
                "r",
                format=container,
                options=dict(_LOCAL if options is None else options),
                timeout=timeout,
                metadata_errors="replace",  # titles in old files are in any encoding
            )
        try:
            with _errors_of(self.name, "cannot be opened"):
                self._open_streams(low_delay)
        except BaseException:
            self._container.close()
            raise

    def _open_streams(self, low_delay: bool) -> None:
        pictures = [s for s in self._container.streams.video if not s.disposition & _COVER]
        if not pictures:
            raise UnsupportedVideo(f"{self.name}: no picture in it, only {_kinds(self._container) or 'nothing'}")
        self.stream = video = pictures[0]
        if video.codec_context is None:
            raise UnsupportedVideo(f"{self.name}: its pictures are in a codec that this FFmpeg does not know")
        _check_size(video.codec_context.width, video.codec_context.height, self.name)
        video.codec_context.options = {"max_pixels": str(MAX_FRAME_PIXELS)}  # a later header may say another size
        video.thread_type = "SLICE" if low_delay else "AUTO"
        if low_delay:
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
        if self._start > 0:
            origin = self._container.start_time or 0
            self._container.seek(origin + round(self._start * av.time_base))

    def __iter__(self) -> Iterator[Frame]:
        """All frames, in order.

        Raises:
            UnreadableVideo: Not a single frame could be decoded, or reading failed on the way; frames that were
                delivered stay valid.
        """
        clock = _Clock(self.stream, self._start, decoding_order=self._container.format.name == "avi")
        sound: list[Sound] = []
        before = time.monotonic()
        for decoded in self._decoded(sound):
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
                )
                sound.clear()
                yield frame
            before = time.monotonic()
        self.rest = [Sound(packet.packet, -clock.origin) for packet in sound]
        if not clock.count:
            why = f" ({self._refused})" if self._refused else ""
            raise UnreadableVideo(f"{self.name}: not one frame in it can be decoded: it is damaged or truncated{why}")

    def _decoded(self, sound: list[Sound]) -> Iterator[av.VideoFrame]:
        for packet in self._packets():
            if packet.stream.type == "audio":
                if packet.dts is not None:
                    sound.append(Sound(packet, Fraction(0)))
                continue
            try:
                frames: Any = packet.decode()
            except (
                av.error.FFmpegError
            ) as error:  # decoders say dozens of things of damage; the next packet may be whole
                self.undecodable += 1
                self._refused = _reason(error)
                continue
            for frame in frames:
                _check_size(frame.width, frame.height, self.name)
                yield frame

    def _packets(self) -> Iterator[av.Packet[Any]]:
        streams = [self.stream, *([self._sound] if self._sound else [])]
        packets = self._container.demux(*streams)
        while True:
            try:
                with _errors_of(self.name, "reading it failed"):
                    packet = next(packets, None)
            except IndexError:  # PyAV, of a stream that was not there when the file was opened; the packet is lost
                packets = self._container.demux(*streams)
                continue
            if packet is None:
                return
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


class _Clock:
    """When each frame is shown: the source's own times, counted from the first frame, and always growing."""

    def __init__(self, stream: Any, start: float, *, decoding_order: bool = False) -> None:
        # AVI says when a frame is decoded, never when it is shown; in order that is the same, but for a shift.
        self._time = "dts" if decoding_order else "pts"
        self.time_base: Fraction = stream.time_base or Fraction(1, 90000)
        rate = stream.average_rate or stream.guessed_rate or Fraction(25)
        self._step = max(1, round(1 / rate / self.time_base))  # where a frame does not say when it is shown
        first = stream.start_time
        self._from = None if not start or first is None else first + start / self.time_base
        self._first: int | None = None
        self._last = -1
        self.count = 0

    @property
    def origin(self) -> Fraction:
        """The first frame's time in the source, in seconds."""
        return (self._first or 0) * self.time_base

    def at(self, picture: av.VideoFrame) -> tuple[int | None, int]:
        """When a frame is shown and for how long; None if that is before the start that was asked for."""
        pts = getattr(picture, self._time)
        if pts is not None and picture.time_base and picture.time_base != self.time_base:
            pts = round(pts * picture.time_base / self.time_base)
        if pts is not None and self._from is not None and pts < self._from:
            return None, 0
        if self._first is None:
            self._first = pts or 0
        shown = self._last + self._step if pts is None and self.count else (pts or 0) - self._first
        self._last = max(shown, self._last + 1)
        self.count += 1
        return self._last, picture.duration or 0


#: ``AV_DISPOSITION_ATTACHED_PIC``: a song's cover.
_COVER: Final = 0x400


class _errors_of:  # noqa: N801 (used like a function)
    """Turns FFmpeg's errors into ours, with the source's name and without its credentials."""

    def __init__(self, name: str, what: str) -> None:
        self._name, self._what = name, what

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, av.error.FFmpegError):
            raise UnreadableVideo(f"{self._name}: {self._what} ({_reason(error)})") from error
        if isinstance(error, (OSError, ValueError, MemoryError)) and not isinstance(error, InputError):
            raise UnreadableVideo(f"{self._name}: {self._what} ({error})") from error


def _reason(error: av.error.FFmpegError) -> str:
    """FFmpeg's words, without the name, which may hold a password."""
    if isinstance(error, av.error.ExitError):
        return "it sent nothing for too long"
    if isinstance(error, av.error.InvalidDataError):
        return "not a video, damaged or truncated"
    return error.strerror or type(error).__name__


def _check_file(path: Path) -> None:
    if path.is_dir():
        raise UnreadableVideo(f"{path}: a folder, not a video")
    if not path.exists():
        raise UnreadableVideo(f"{path}: no such file")
    if path.is_file() and path.stat().st_size == 0:
        raise UnreadableVideo(f"{path}: empty (0 bytes)")


def _check_size(width: int, height: int, name: str) -> None:
    if width * height > MAX_FRAME_PIXELS:
        raise UnsupportedVideo(
            f"{name}: frames of {width} x {height} are {width * height / 1e6:.0f} megapixels; the limit is "
            f"{MAX_FRAME_PIXELS / 1e6:.0f}: make it smaller first"
        )


def _kinds(container: Any) -> str:
    return ", ".join(sorted({stream.type for stream in container.streams}))
