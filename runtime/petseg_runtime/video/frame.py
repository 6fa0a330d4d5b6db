"""A decoded frame, and the only road from its YUV to the RGB that the model and the painters are given."""

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
        mirrored: Its left and right are to be swapped, before it is turned.
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
            pixels = convert(self.picture, *((w, h) if self.quarters % 2 else (h, w)))
        except (av.error.FFmpegError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            about = f"{self.picture.format.name} with the colour matrix {self.picture.colorspace:d}"
            raise UnsupportedVideo(f"frames in {about} cannot be converted ({reason})") from error
        return np.ascontiguousarray(self.upright(pixels))

    def upright(self, stored: U8) -> U8:
        """A view of the frame's pixels, or of one of its planes, as they are to be seen.

        Args:
            stored: uint8 [H, W] or [H, W, 3], as decoded.
        """
        return np.rot90(np.fliplr(stored) if self.mirrored else stored, self.quarters)


def orientation(picture: av.VideoFrame) -> tuple[int, bool]:
    """A decoded frame's ``quarters``, and whether it is ``mirrored``, as selfies may be."""
    # Not picture.side_data, which the picture keeps: the two would hold each other until Python looks for such rings.
    beside = cast(Any, SideDataContainer)(picture)  # its annotations are wrong
    quarters, matrix = round(picture.rotation / 90), beside.get(SideDataType.DISPLAYMATRIX)
    if matrix is None:
        return quarters % 4, False
    a, b, _, c, d, *_ = np.frombuffer(matrix, np.int32).tolist()
    mirrored = a * d < b * c
    # The angle is that of the matrix, which swaps left and right itself: without that, it is half a turn off.
    return (quarters + 2 * mirrored) % 4, mirrored
