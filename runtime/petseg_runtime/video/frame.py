"""Decoded frames, and the only conversion from their YUV to the RGB that the model and the painters get."""

from __future__ import annotations

from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, Final, TypeAlias, cast

import av
import av.error
import numpy as np
import numpy.typing as npt
from av.sidedata.sidedata import SideDataContainer
from av.sidedata.sidedata import Type as SideDataType
from av.video.reformatter import ColorRange, Colorspace, Interpolation, VideoReformatter

from petseg_runtime.errors import UnsupportedVideo
from petseg_runtime.video.sound import Sound, Track

__all__ = ["Colours", "Converter", "Frame", "orientation"]

U8: TypeAlias = npt.NDArray[np.uint8]

# As exact as swscale can: its fast paths take a tenth of the time, but are off by up to 4 levels, and 1 or 2 darker.
_EXACT: Final = Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INP | Interpolation.FULL_CHR_H_INT
_SAME_SIZE: Final = Interpolation.BILINEAR | _EXACT

# The only step from the decoder's YUV to the model's RGB. When it shrinks, "bilinear" widens its filter, as Pillow's
# does: benchmarks/results/video-road.json.
_SHRINKING: Final = Interpolation.BILINEAR | _EXACT

# For frames less than this many times the model's size per side, a single step would blur the chroma of 4:2:0
# noticeably for the model: it is upsampled to the size of the luma first.
_MARGIN: Final = 3
_FULL_CHROMA: Final = {"yuv420p": "yuv444p", "yuvj420p": "yuvj444p"}

#: Values of ``AVColorSpace`` that do not name a YUV matrix (RGB, unspecified, reserved).
_NO_MATRIX: Final = frozenset({0, 2, 3})
_UNSPECIFIED: Final = 2
_BT709: Final = 1
_BT601: Final = 6  # SMPTE 170M, which has the matrix of BT.601

#: Values of ``AVColorTransferCharacteristic`` for HDR. BT.2020's own is that of BT.709, which is SDR.
_HDR: Final = {16: "PQ", 18: "HLG"}
_TO_SDR: Final = (
    "ffmpeg -i IN.mp4 -vf zscale=t=linear:npl=100,format=gbrpf32le,zscale=p=bt709,tonemap=tonemap=hable:desat=0,"
    "zscale=t=bt709:m=bt709:r=tv,format=yuv420p -c:a copy OUT.mp4"
)


@dataclass(frozen=True)
class Colours:
    """How a frame's values map to colours, in FFmpeg's enumerations.

    Attributes:
        matrix: ``AVColorSpace``: BT.601, BT.709, BT.2020, ...
        full_range: Whether black is 0 (not 16).
        primaries: ``AVColorPrimaries``.
        transfer: ``AVColorTransferCharacteristic``.
    """

    matrix: int
    full_range: bool
    primaries: int = _UNSPECIFIED
    transfer: int = _UNSPECIFIED

    @classmethod
    def of(cls, picture: av.VideoFrame) -> Colours:
        """Read a frame's tags; an unspecified matrix is taken for BT.709 from HD on, else for BT.601, as in players."""
        matrix = picture.colorspace
        if matrix in _NO_MATRIX:
            matrix = _BT709 if picture.height > 576 or picture.width > 1024 else _BT601
        full = picture.color_range == ColorRange.JPEG or picture.format.name.startswith("yuvj")
        return cls(matrix, full, picture.color_primaries, picture.color_trc)


class Converter:
    """Converts decoded frames to RGB; transparency is ignored.

    For one thread: it reuses swscale's tables from frame to frame.
    """

    def __init__(self, threads: int | None = None) -> None:
        """Prepare a converter; tables are made with the first frame.

        Args:
            threads: CPU threads; None: all.
        """
        self._scaler, self._chroma, self._threads = VideoReformatter(), VideoReformatter(), threads

    def __call__(self, picture: av.VideoFrame, height: int, width: int) -> U8:
        """Convert and resize in one step.

        Args:
            picture: A decoded frame in any format.
            height: Of the result.
            width: Of the result.

        Returns:
            uint8 [height, width, 3] RGB, which the caller owns.
        """
        colours = Colours.of(picture)
        known = picture.colorspace not in _NO_MATRIX
        same = (height, width) == (picture.height, picture.width)
        converted = self._scaler.reformat(
            picture if same else self._with_full_chroma(picture, height, width),
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

    def _with_full_chroma(self, picture: av.VideoFrame, height: int, width: int) -> av.VideoFrame:
        whole = _FULL_CHROMA.get(picture.format.name)
        if not whole or min(picture.height / height, picture.width / width) >= _MARGIN:
            return picture
        return self._chroma.reformat(picture, format=whole, interpolation=Interpolation.BILINEAR, threads=self._threads)


@dataclass(eq=False)
class Frame:
    """One frame of a video.

    Attributes:
        number: Counts delivered frames, from 0.
        pts: Presentation timestamp, in units of ``time_base``, relative to the first frame.
        time_base: Seconds.
        picture: The decoded frame.
        quarters: Quarter turns counter-clockwise that make it upright, 0 to 3.
        captured: ``time.monotonic()`` when it came out of the decoder.
        decoding: Seconds that reading and decoding it took.
        duration: How long it is shown, in units of ``time_base``; 0 if unknown.
        sound: Audio packets since the previous frame.
        track: The track that these belong to; None: the source has no audio.
        aspect: Width of a pixel divided by its height, as decoded, not upright; None: unspecified.
        mirrored: Whether to swap left and right, before it is rotated.
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
    mirrored: bool = False

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
        """Assumptions made about its colours, with the remedy."""
        kind = _HDR.get(Colours.of(self.picture).transfer)
        if kind is None:
            return ()
        return (f"it is HDR ({kind}), and is read as SDR: masks may be worse; convert it to SDR first: {_TO_SDR}",)

    def pixels(self, convert: Converter, height: int | None = None, width: int | None = None) -> U8:
        """Convert the frame to uint8 [H, W, 3] RGB, upright and contiguous, at its own size or another.

        Args:
            convert: The calling thread's converter.
            height: None: the frame's.
            width: None: the frame's.

        Raises:
            UnsupportedVideo: Its pixel format or colour matrix cannot be converted.
        """
        h, w = height or self.size[0], width or self.size[1]
        try:
            pixels = convert(self.picture, *((w, h) if self.quarters % 2 else (h, w)))
        except (av.error.FFmpegError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            about = f"{self.picture.format.name} with the colour matrix {self.picture.colorspace:d}"
            raise UnsupportedVideo(f"frames in {about} cannot be converted ({reason})") from error
        return np.ascontiguousarray(self.upright(pixels))

    def upright(self, stored: U8) -> U8:
        """Return an upright view of the frame's pixels, or of one of its planes.

        Args:
            stored: uint8 [H, W] or [H, W, 3], as decoded.
        """
        return np.rot90(np.fliplr(stored) if self.mirrored else stored, self.quarters)


def orientation(picture: av.VideoFrame) -> tuple[int, bool]:
    """A decoded frame's ``quarters`` and whether it is ``mirrored``, as selfies may be, from its display matrix."""
    # Not picture.side_data, which the picture caches: this reference cycle would keep both until a garbage collection.
    side_data = cast(Any, SideDataContainer)(picture)  # its annotations are wrong
    quarters, matrix = round(picture.rotation / 90), side_data.get(SideDataType.DISPLAYMATRIX)
    if matrix is None:
        return quarters % 4, False
    a, b, _, c, d, *_ = np.frombuffer(matrix, np.int32).tolist()
    mirrored = a * d < b * c
    # The angle includes the matrix's own swap of left and right: without the swap, it is off by half a turn.
    return (quarters + 2 * mirrored) % 4, mirrored
