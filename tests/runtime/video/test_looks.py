"""Frames painted in YUV look like the pictures of a Segmentation, and are unchanged where nothing is painted."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import av
import numpy as np
import pytest
from av.video.reformatter import ColorRange, Colorspace, VideoReformatter
from PIL import Image

from petseg_runtime.result import Segmentation
from petseg_runtime.sinks import render_of
from petseg_runtime.video.frame import Converter, Frame
from petseg_runtime.video.looks import AV_MATRIX, Painter, matrix_of

BT601, BT709, BT2020 = Colorspace.ITU601, Colorspace.ITU709, Colorspace.BT2020


def photo(height: int, width: int) -> np.ndarray:
    """A smooth picture, because sharp colours do not survive 4:2:0, however they are painted."""
    y, x = np.mgrid[:height, :width] / max(height, width)
    return np.stack([80 + 100 * x, 200 - 120 * y, 60 + 90 * np.sin(3 * x) * y], axis=2).astype(np.uint8)


def yuv(rgb: np.ndarray, matrix: Colorspace, full: bool = False, pixels: str = "yuv420p") -> av.VideoFrame:
    picture = VideoReformatter().reformat(
        av.VideoFrame.from_ndarray(np.ascontiguousarray(rgb)),
        format=pixels,
        dst_colorspace=matrix,
        src_color_range=ColorRange.JPEG,
        dst_color_range=ColorRange.JPEG if full else ColorRange.MPEG,
    )
    picture.colorspace, picture.color_range = AV_MATRIX[matrix], ColorRange.JPEG if full else ColorRange.MPEG
    return picture


def frame_of(picture: av.VideoFrame, quarters: int = 0) -> Frame:
    return Frame(0, 0, Fraction(1, 25), picture, quarters)


def result_of(frame: Frame) -> Segmentation:
    height, width = frame.size
    y, x = np.mgrid[:height, :width]
    probability = 255 * np.clip(1.6 - np.hypot(y - height / 2, x - width / 3) / (0.25 * height), 0, 1)
    return Segmentation(frame.pixels(Converter()), probability.astype(np.uint8), 0.5, 0.3)


def planes(picture: av.VideoFrame) -> list[np.ndarray]:
    rows = [np.frombuffer(plane, np.uint8).reshape(plane.height, plane.line_size) for plane in picture.planes]
    return [row[:, : plane.width] for row, plane in zip(rows, picture.planes, strict=True)]


@pytest.mark.parametrize("kind", ["overlay", "cutout", "background", "mask", "probability"])
@pytest.mark.parametrize("matrix", [BT601, BT709, BT2020])
def test_it_looks_like_the_picture_of_the_same_kind(kind: str, matrix: Colorspace) -> None:
    frame = frame_of(yuv(photo(96, 128), matrix))
    result = result_of(frame)
    behind = (255, 200, 10) if kind == "background" else None
    painted = Painter(kind, behind)(frame, result)
    wanted = np.asarray(render_of(kind, behind)(result).convert("RGBA"))
    shown = Converter()(painted, 96, 128).astype(int)
    # The same picture in 4:2:0, as any encoder would convert it.
    through = Converter()(yuv(wanted[..., :3], matrix), 96, 128).astype(int)
    difference = np.abs(shown - through)
    assert difference.mean() < 1
    assert np.percentile(difference, 95) <= 5
    assert painted.colorspace == AV_MATRIX[matrix]
    if kind == "cutout":
        np.testing.assert_array_equal(planes(painted)[3], wanted[..., 3])


def test_unpainted_pixels_are_the_sources_bit_for_bit() -> None:
    picture = yuv(photo(96, 128), BT709)
    frame = frame_of(picture)
    result = result_of(frame)
    before = [plane.copy() for plane in planes(picture)]
    painted = planes(Painter("overlay")(frame, result))
    far = ~result.mask
    np.testing.assert_array_equal(painted[0][far], before[0][far])
    assert (painted[0] != before[0])[result.mask].mean() > 0.9
    free = far[::2, ::2] & far[1::2, ::2] & far[::2, 1::2] & far[1::2, 1::2]
    for number in (1, 2):
        np.testing.assert_array_equal(painted[number][free], before[number][free])
    for plane, same in zip(planes(picture), before, strict=True):
        np.testing.assert_array_equal(plane, same)  # the frame itself


def test_a_mask_is_black_and_white_exactly() -> None:
    frame = frame_of(yuv(photo(64, 64), BT601))
    result = result_of(frame)
    luma, u, v = planes(Painter("mask")(frame, result))
    np.testing.assert_array_equal(luma, np.where(result.mask, 235, 16))
    assert set(np.unique(u)) | set(np.unique(v)) == {128}


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("quarters", range(4))
@pytest.mark.parametrize("kind", ["overlay", "cutout"])
def test_a_rotated_frame_is_painted_upright(kind: str, quarters: int, mirrored: bool) -> None:
    lying = np.rot90(photo(64, 96), -quarters)
    frame = frame_of(yuv(np.ascontiguousarray(np.fliplr(lying) if mirrored else lying), BT709), quarters)
    frame.mirrored = mirrored
    painted = Painter(kind)(frame, result_of(frame))
    assert (painted.height, painted.width) == frame.size == (64, 96)
    result = result_of(frame)
    wanted = np.asarray(render_of(kind)(result).convert("RGB")).astype(int)
    assert np.abs(Converter()(painted, 64, 96) - wanted).mean() < 3


@pytest.mark.parametrize(("height", "width"), [(33, 48), (32, 49), (33, 49), (1, 1), (2, 3)])
@pytest.mark.parametrize("kind", ["overlay", "cutout", "background", "mask"])
def test_odd_sides_are_made_even_by_repeating_the_last_row_and_column(kind: str, height: int, width: int) -> None:
    frame = frame_of(yuv(photo(height, width), BT601))
    painted = Painter(kind, (9, 9, 9) if kind == "background" else None)(frame, result_of(frame))
    assert (painted.height, painted.width) == (height + height % 2, width + width % 2)
    luma = planes(painted)[0]
    if height % 2:
        np.testing.assert_array_equal(luma[-1], luma[-2])
    if width % 2:
        np.testing.assert_array_equal(luma[:, -1], luma[:, -2])


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("quarters", range(4))
@pytest.mark.parametrize(("height", "width"), [(64, 97), (65, 96), (65, 97), (64, 96)])
def test_the_chroma_of_odd_sides_stays_in_place_when_a_frame_is_rotated(
    height: int, width: int, quarters: int, mirrored: bool
) -> None:
    """In a wave that changes by 4 per pixel, chroma that is one pixel off is 4 levels off."""

    def halved(plane: np.ndarray) -> np.ndarray:
        even = np.pad(plane, [(0, side % 2) for side in plane.shape], mode="edge").astype(float)
        return even.reshape(even.shape[0] // 2, 2, even.shape[1] // 2, 2).mean((1, 3))

    y, x = np.mgrid[:height, :width]
    wave = (60 + 4 * np.abs((x + y) % 64 - 32)).astype(np.uint8)
    picture = av.VideoFrame(width, height, "yuv420p")
    for plane, values in zip(planes(picture), (wave, halved(wave), halved(wave)), strict=True):
        plane[:] = np.rint(values)
    frame = frame_of(picture, quarters)
    frame.mirrored = mirrored
    nothing = Segmentation(None, np.zeros(frame.size, np.uint8), 0.5, 0.3)
    luma, u, v = planes(Painter("overlay")(frame, nothing))
    upright = frame.upright(wave)
    np.testing.assert_array_equal(luma[: frame.size[0], : frame.size[1]], upright)
    for plane in (u, v):
        assert np.abs(plane - halved(upright)).mean() < 0.5


@pytest.mark.parametrize("pixels", ["yuv444p", "yuv422p", "yuv420p10le", "nv12", "rgb24", "gray"])
@pytest.mark.parametrize("full", [False, True])
def test_any_format_and_range_becomes_limited_range_420(pixels: str, full: bool) -> None:
    rgb = photo(64, 96) if pixels != "gray" else np.repeat(photo(64, 96)[..., :1], 3, axis=2)
    picture = yuv(rgb, BT709, full, pixels) if pixels != "rgb24" else av.VideoFrame.from_ndarray(rgb)
    frame = frame_of(picture)
    nothing = Segmentation(None, np.zeros((64, 96), np.uint8), 0.5, 0.3)
    painted = Painter("overlay")(frame, nothing)
    assert painted.format.name == "yuv420p"
    assert np.abs(Converter()(painted, 64, 96).astype(int) - rgb).mean() < 2


def test_a_background_picture_is_fitted_and_kept_for_the_next_frame(monkeypatch: pytest.MonkeyPatch) -> None:
    behind = Image.fromarray(photo(50, 200)[:, ::-1].copy())
    painter = Painter("background", behind)
    frame = frame_of(yuv(photo(64, 96), BT709))
    nothing = Segmentation(None, np.zeros((64, 96), np.uint8), 0.5, 0.3)
    first = Converter()(painter(frame, nothing), 64, 96).astype(int)
    everything: Any = Segmentation(frame.pixels(Converter()), np.zeros((64, 96), np.uint8), 0.5, 0.3)
    assert np.abs(first - np.asarray(everything.on_background(behind))).mean() < 2
    monkeypatch.setattr("petseg_runtime.video.looks.ImageOps", None)  # it is not fitted again
    np.testing.assert_array_equal(Converter()(painter(frame, nothing), 64, 96), first)


@pytest.mark.parametrize("kind", ["overlay", "background"])
def test_frames_of_one_size_are_painted_in_one_matrix(kind: str) -> None:
    """After a reconnect, a camera may have another matrix; the movie goes on, and has a single one."""
    behind = (255, 200, 10) if kind == "background" else None
    painter = Painter(kind, behind)
    for matrix in (BT709, BT601, BT2020):
        frame = frame_of(yuv(photo(64, 96), matrix))
        result = result_of(frame)
        painted = painter(frame, result)
        assert painted.colorspace == AV_MATRIX[BT709]
        wanted = np.asarray(render_of(kind, behind)(result)).astype(int)
        assert np.abs(Converter()(painted, 64, 96) - wanted).mean() < 3
    small = frame_of(yuv(photo(32, 48), BT601))  # another size starts another movie
    assert painter(small, result_of(small)).colorspace == AV_MATRIX[BT601]


def test_an_unspecified_matrix_depends_on_the_size() -> None:
    assert matrix_of(av.VideoFrame(640, 480, "yuv420p")) == BT601
    assert matrix_of(av.VideoFrame(1280, 720, "yuv420p")) == BT709
