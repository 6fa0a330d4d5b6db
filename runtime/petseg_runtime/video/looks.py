"""Paints results on a frame's YUV planes, without a conversion to RGB: pixels that are not painted stay unchanged.

YUV 4:2:0 has half the bytes of RGB: painting takes a quarter of the time that the pictures of
:class:`~petseg_runtime.result.Segmentation` take, which painted frames look like.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import av
import numpy as np
import numpy.typing as npt
from av.video.reformatter import ColorRange, Colorspace, VideoReformatter
from PIL import Image, ImageOps

from petseg_runtime.images import in_profile
from petseg_runtime.result import OVERLAY_COLOR, OVERLAY_STRENGTH, Segmentation
from petseg_runtime.video.frame import Colours, Frame

__all__ = ["AV_MATRIX", "Painter", "matrix_of"]

U8: TypeAlias = npt.NDArray[np.uint8]
#: The weight of the painted colour per pixel, 0 to 128: its product with a difference of 8-bit values fits in 16 bits.
Weight: TypeAlias = npt.NDArray[np.int16]
#: Y, U and V, the last two at half the height and width.
Planes: TypeAlias = "list[U8]"
#: What is behind a pet: nothing (black), an RGB colour, or a picture.
Background: TypeAlias = "tuple[int, int, int] | Image.Image | None"

_FULL_WEIGHT: Final = 128

#: The weights of red and blue in luma, by swscale's number of the matrix.
_WEIGHTS: Final = {
    int(Colorspace.ITU601): (0.299, 0.114),
    int(Colorspace.ITU709): (0.2126, 0.0722),
    int(Colorspace.BT2020): (0.2627, 0.0593),
}

#: The ``AVColorSpace`` of each matrix.
AV_MATRIX: Final = {Colorspace.ITU601: 6, Colorspace.ITU709: 1, Colorspace.BT2020: 9}


def matrix_of(picture: av.VideoFrame) -> Colorspace:
    """The matrix that a frame is written with: its own if it is one of the three usual ones, else BT.601."""
    matrix = Colours.of(picture).matrix
    return {1: Colorspace.ITU709, 9: Colorspace.BT2020, 10: Colorspace.BT2020}.get(matrix, Colorspace.ITU601)


class Painter:
    """Makes the frames of one kind of movie. For one thread, and one movie at a time."""

    def __init__(self, kind: str, background: Background = None, threads: int | None = None) -> None:
        """Choose what to paint.

        Args:
            kind: ``mask``, ``probability``, ``overlay``, ``background`` or ``cutout``.
            background: For the kind ``background``; a picture with an ICC profile is converted to sRGB.
            threads: CPU threads; None: all.
        """
        self._paint: Callable[[_Canvas, Segmentation], None] = {
            "mask": _paint_mask,
            "probability": _paint_probability,
            "overlay": _paint_overlay,
            "cutout": _paint_cutout,
            "background": self._paint_background,
        }[kind]
        self._transparent = kind == "cutout"
        self._blank = kind in ("mask", "probability")
        self._background = in_profile(background, None) if isinstance(background, Image.Image) else background
        self._size = (0, 0)  # of the last frame; what follows belongs to that size
        self._matrix = Colorspace.ITU601
        self._background_planes: Planes | None = None
        self._frame_scaler, self._background_scaler, self._threads = VideoReformatter(), VideoReformatter(), threads

    def __call__(self, frame: Frame, result: Segmentation) -> av.VideoFrame:
        """Paint one frame.

        Args:
            frame: In any format; its pixels are not changed.
            result: At the frame's size; its ``pixels`` are not used.

        Returns:
            ``yuv420p``, or ``yuva420p`` for cutouts, in limited range, upright. Sides are even: the last row or column
            of odd ones is repeated. A movie has only one matrix, so as long as the size does not change, it is that of
            :func:`matrix_of` for the first frame. Primaries and transfer characteristics are the frame's, but
            unspecified for masks and probabilities, which show none of its colours: as PQ, their white would dazzle.
        """
        rows, columns = frame.size
        height, width = size = rows + rows % 2, columns + columns % 2
        if size != self._size:
            self._size, self._matrix, self._background_planes = size, matrix_of(frame.picture), None
        painted = av.VideoFrame(width, height, "yuva420p" if self._transparent else "yuv420p")
        matrix = self._matrix
        painted.colorspace, painted.color_range = AV_MATRIX[matrix], ColorRange.MPEG
        canvas = _Canvas([_view(plane) for plane in painted.planes], int(matrix))
        if not self._blank:
            colours = Colours.of(frame.picture)
            painted.color_primaries, painted.color_trc = colours.primaries, colours.transfer
            for plane, source in zip(canvas.planes, self._planes_of(frame, matrix), strict=False):
                _fill(plane, source)
        self._paint(canvas, result)
        return painted

    def _planes_of(self, frame: Frame, matrix: Colorspace) -> Planes:
        """The frame's planes, upright."""
        colours, picture = Colours.of(frame.picture), frame.picture
        converted = self._frame_scaler.reformat(
            picture,
            format="yuv420p",
            src_colorspace=None if picture.colorspace == colours.matrix else matrix_of(picture),
            dst_colorspace=matrix,
            src_color_range=ColorRange.JPEG if colours.full_range else ColorRange.MPEG,
            dst_color_range=ColorRange.MPEG,
            threads=self._threads,
        )
        luma, *chroma = (frame.upright(_view(plane)) for plane in converted.planes)
        for axis in (0, 1):
            if luma.strides[axis] < 0 and luma.shape[axis] % 2:  # an odd side, flipped
                chroma = [_shift_half_sample(plane, axis) for plane in chroma]
        return [luma, *chroma]

    def _paint_background(self, canvas: _Canvas, result: Segmentation) -> None:
        if self._background_planes is None:
            self._background_planes = self._make_background(canvas.planes[0].shape, canvas.matrix)
        canvas.blend(self._background_planes, (255 - result.opacity.astype(np.int16)) * _FULL_WEIGHT // 255)

    def _make_background(self, shape: tuple[int, ...], matrix: int) -> Planes:
        """The background as planes, cropped to a size as :meth:`Segmentation.on_background` does."""
        height, width = shape
        if isinstance(self._background, Image.Image):
            picture = ImageOps.fit(self._background, (width, height))
        else:
            picture = Image.new("RGB", (width, height), self._background or (0, 0, 0))
        converted = self._background_scaler.reformat(
            av.VideoFrame.from_ndarray(np.array(picture)),
            format="yuv420p",
            dst_colorspace=matrix,
            src_color_range=ColorRange.JPEG,
            dst_color_range=ColorRange.MPEG,
            threads=self._threads,
        )
        return [_view(plane).copy() for plane in converted.planes]


@dataclass
class _Canvas:
    """A frame that is being painted.

    Attributes:
        planes: Views of its planes; the fourth is its opacity, in full range.
        matrix: swscale's number of the matrix.
    """

    planes: Planes
    matrix: int

    def blend(self, over: Planes | tuple[int, int, int], weight: Weight) -> None:
        """Blend a picture or a colour onto the canvas: ``plane + (over - plane) * weight / 128``.

        Args:
            over: Planes of the same size; or Y, U and V.
            weight: int16 [H, W], 0 to 128, at the frame's size, which may be a row or column less than the canvas's.
        """
        weight = _pad_to(weight, *self.planes[0].shape)
        for number, (plane, colour) in enumerate(zip(self.planes, over, strict=False)):
            part = weight if number == 0 else _mean_2x2(weight)
            rows, columns = _nonzero_box(part)
            if rows.stop:
                inside = plane[rows, columns]
                wanted: Any = colour[rows, columns] if isinstance(colour, np.ndarray) else colour
                difference: Weight = wanted - inside.astype(np.int16)
                difference *= part[rows, columns]
                difference += _FULL_WEIGHT // 2
                difference >>= 7
                inside += difference.astype(np.uint8)  # modulo 256, which is also right for negative differences


def _paint_mask(canvas: _Canvas, result: Segmentation) -> None:
    _paint_grey(canvas, result.mask.view(np.uint8) * np.uint8(255))


def _paint_probability(canvas: _Canvas, result: Segmentation) -> None:
    _paint_grey(canvas, result.probability)


def _paint_grey(canvas: _Canvas, grey: U8) -> None:
    luma, *chroma = canvas.planes
    _fill(luma, _LIMITED[grey])
    for plane in chroma:
        plane[:] = 128


def _paint_overlay(canvas: _Canvas, result: Segmentation) -> None:
    weight = result.mask.astype(np.int16)
    weight *= round(OVERLAY_STRENGTH * _FULL_WEIGHT)
    weight[result.outline] = _FULL_WEIGHT
    canvas.blend(_yuv(OVERLAY_COLOR, canvas.matrix), weight)


def _paint_cutout(canvas: _Canvas, result: Segmentation) -> None:
    opacity = result.opacity
    # Pixels that are cut away are also black, not only transparent; see Segmentation.cutout.
    canvas.blend((16, 128, 128), np.where(opacity, np.int16(0), np.int16(_FULL_WEIGHT)))
    _fill(canvas.planes[3], opacity)


#: uint8 [256]: from full range to limited range.
_LIMITED: Final[U8] = np.rint(16 + np.arange(256) * 219 / 255).astype(np.uint8)


def _yuv(color: tuple[int, int, int], matrix: int) -> tuple[int, int, int]:
    """Convert RGB to Y, U, V in limited range (ITU-R BT.601-7, BT.709-6 and BT.2020-2)."""
    red, green, blue = (value / 255 for value in color)
    of_red, of_blue = _WEIGHTS[matrix]
    luma = of_red * red + (1 - of_red - of_blue) * green + of_blue * blue
    u, v = (blue - luma) / (2 - 2 * of_blue), (red - luma) / (2 - 2 * of_red)
    return round(16 + 219 * luma), round(128 + 224 * u), round(128 + 224 * v)


def _view(plane: Any) -> U8:
    """A view of a plane's pixels, without row padding."""
    rows: U8 = np.frombuffer(plane, np.uint8).reshape(plane.height, plane.line_size)
    return rows[:, : plane.width]


def _fill(plane: U8, source: U8) -> None:
    """Copy ``source``; where it is a row or column short, repeat its last one."""
    height, width = source.shape
    plane[:height, :width] = source
    plane[:height, width:] = plane[:height, width - 1 : width]
    plane[height:] = plane[height - 1 : height]


def _shift_half_sample(plane: U8, axis: int) -> U8:
    """Resample chroma half a sample further along an axis.

    When an odd side is flipped, the chroma sample that covered a single pixel comes first, so that each other sample
    covers the second pixel of one pair and the first of the next. (Sited between its pixels, as in swscale.)
    """
    last = plane.shape[axis] - 1
    following = plane.take(np.minimum(np.arange(last + 1) + 1, last), axis).astype(np.uint16)
    shifted: U8 = ((plane + following + 1) >> 1).astype(np.uint8)
    return shifted


def _pad_to(weight: Weight, height: int, width: int) -> Weight:
    more = ((0, height - weight.shape[0]), (0, width - weight.shape[1]))
    return np.pad(weight, more, mode="edge") if any(after for _, after in more) else weight


def _mean_2x2(weight: Weight) -> Weight:
    """The mean of each block of 2x2 pixels."""
    rows = weight[::2] + weight[1::2]
    return (rows[:, ::2] + rows[:, 1::2] + 2) >> 2


def _nonzero_box(weight: Weight) -> tuple[slice, slice]:
    """The rows and columns of the bounding box of all values other than 0; empty slices if there are none."""
    rows, columns = np.flatnonzero(weight.any(axis=1)), np.flatnonzero(weight.any(axis=0))
    if not len(rows):
        return slice(0), slice(0)
    return slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
