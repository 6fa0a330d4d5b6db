"""Decoding photos of all formats, resizing them to the model's input, and resizing masks back."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import io
import os
import struct
import subprocess
import sys
import threading
import tracemalloc
import warnings
from collections.abc import Callable
from concurrent.futures import CancelledError, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image, ImageCms, ImageFile

from petseg_runtime import images
from petseg_runtime.errors import ImageTooLarge, InputError, UnreadableImage, UnsupportedImage
from petseg_runtime.extras import install
from petseg_runtime.images import Photo, from_model, open_photo, read, to_model
from petseg_runtime.result import Segmentation
from petseg_runtime.sinks import background_of, render_of
from raw_files import chunk, raw_png

U8 = npt.NDArray[np.uint8]


def noise(height: int = 12, width: int = 20, channels: int = 3, seed: int = 0) -> U8:
    shape = (height, width, channels) if channels else (height, width)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def smooth(height: int = 96, width: int = 128) -> U8:
    """A smooth image, which JPEG hardly changes."""
    y, x = np.mgrid[:height, :width]
    return np.stack([x * 255 / width, y * 255 / height, (x + y) * 255 / (height + width)], axis=2).astype(np.uint8)


def encoded(image: Image.Image | U8, kind: str = "PNG", **options) -> bytes:
    out = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(out, kind, **options)
    return out.getvalue()


def heic(image: Image.Image | U8, *more: Image.Image, **options) -> bytes:
    """A HEIC file by pillow-heif, which also stores an EXIF orientation as a rotation of the picture, as iPhones do."""
    pillow_heif = pytest.importorskip("pillow_heif", reason=f"needs pillow-heif: {install('heic')}")
    file = io.BytesIO()
    first = image if isinstance(image, Image.Image) else Image.fromarray(image)
    made = pillow_heif.from_pillow(first)
    for another in more:
        made.add_from_pillow(another)
    made.save(file, **{"quality": 100, "chroma": 444, **options})
    return file.getvalue()


def peak_of(call: Callable[[], object]) -> int:
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


# ----------------------------------------------------------------------------------------------- kinds of source


@pytest.fixture
def png(tmp_path: Path) -> Path:
    path = tmp_path / "photo.png"
    path.write_bytes(encoded(noise()))
    return path


def test_every_kind_of_source_gives_the_same_photo(png: Path) -> None:
    with png.open("rb") as file, Image.open(png) as lazy:
        sources = [png, str(png), png.read_bytes(), io.BytesIO(png.read_bytes()), file, noise(), lazy]
        for source in [*sources, Image.fromarray(noise())]:
            photo = read(source)
            assert photo.pixels.dtype == np.uint8
            assert photo.pixels.flags.c_contiguous
            np.testing.assert_array_equal(photo.pixels, noise(), err_msg=str(type(source)))
            assert photo.notes == ()


def test_the_callers_file_and_image_stay_open(png: Path) -> None:
    with png.open("rb") as file, Image.open(png) as image:
        read(file)
        read(image)
        assert not file.closed
        np.testing.assert_array_equal(np.asarray(image), noise())


def test_the_format_is_detected_from_content_not_name(tmp_path: Path) -> None:
    path = tmp_path / "photo.jpg"
    path.write_bytes(encoded(noise()))
    np.testing.assert_array_equal(read(path).pixels, noise())


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF", "BMP", "PPM", "AVIF", "JPEG", "GIF"])
def test_every_format_of_photos_is_read(kind: str) -> None:
    lossless = {"WEBP": {"lossless": True}, "JPEG": {"quality": 100, "subsampling": 0}, "AVIF": {"quality": 100}}
    pixels = read(encoded(smooth(), kind, **lossless.get(kind, {}))).pixels
    tolerance = {"JPEG": 5, "AVIF": 5, "GIF": 64}.get(kind, 0)
    assert np.abs(pixels.astype(int) - smooth()).max() <= tolerance


def test_a_single_pixel_photo_is_read() -> None:
    assert read(encoded(noise(1, 1))).pixels.shape == (1, 1, 3)
    assert read(noise(1, 1)).pixels.shape == (1, 1, 3)


def test_arrays_may_be_grey_rgb_or_rgba() -> None:
    grey = noise(channels=0)
    np.testing.assert_array_equal(read(grey).pixels, np.stack([grey] * 3, axis=2))
    opaque = np.dstack([noise(), np.full((12, 20), 255, np.uint8)])
    np.testing.assert_array_equal(read(opaque).pixels, noise())
    clear = np.dstack([noise(), np.zeros((12, 20), np.uint8)])
    assert (read(clear).pixels == 255).all()
    assert read(clear).notes == ("transparency laid over white",)


@pytest.mark.parametrize("channels", [0, 3, 4])
def test_a_photo_does_not_change_with_its_source_array(channels: int) -> None:
    array = noise(channels=channels)
    if channels == 4:
        array[..., 3] = 255
    before = array.copy()
    photo = read(array)
    expected = photo.pixels.copy()
    assert photo.pixels.flags.writeable
    array[:] = 7
    np.testing.assert_array_equal(photo.pixels, expected)
    photo.pixels[:] = 9
    assert (array == 7).all()
    frozen = before.copy()
    frozen.setflags(write=False)
    np.testing.assert_array_equal(read(frozen).pixels, expected)


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P"])
def test_a_pillow_image_is_not_modified(mode: str) -> None:
    image = Image.fromarray(noise()).convert(mode)
    image.getexif()[0x0112] = 6
    before, exif = image.copy(), dict(image.getexif())
    photo = read(image)
    photo.pixels[:] = 0
    assert (image.size, image.mode, image.tobytes()) == (before.size, mode, before.tobytes())
    assert dict(image.getexif()) == exif


def test_a_pillow_image_is_read_at_its_size_and_current_frame(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "lime", "blue")]
    (tmp_path / "film.gif").write_bytes(encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]))
    with Image.open(tmp_path / "film.gif") as film:
        assert read(film).notes == ("animated: the first frame was used",)
        film.seek(1)
        second = read(film)
        assert (second.pixels[0, 0].tolist(), second.notes) == ([0, 255, 0], ())
        assert film.tell() == 1
    (tmp_path / "photo.jpg").write_bytes(encoded(smooth(), "JPEG"))
    with Image.open(tmp_path / "photo.jpg") as lazy:
        assert read(lazy, at_least=(1, 1)).pixels.shape == (96, 128, 3)
        assert lazy.size == (128, 96)


def test_noncontiguous_arrays_are_read_correctly() -> None:
    for array in (noise()[::2, ::-1], noise().transpose(1, 0, 2), noise(channels=4)[::-1], np.asfortranarray(noise())):
        pixels = read(array).pixels
        assert pixels.flags.c_contiguous
        if array.shape[2] == 3:
            np.testing.assert_array_equal(pixels, array)
        else:
            np.testing.assert_array_equal(pixels, read(np.ascontiguousarray(array)).pixels)


@pytest.mark.parametrize(
    "array",
    [
        noise().astype(np.float32) / 255,
        noise().astype(np.int64),
        noise() > 127,
        noise(channels=0).astype(np.uint16),
        noise(channels=1),
        noise(channels=2),
        noise(channels=5),
        noise()[None],
        noise()[0, 0, :],
        np.array(3, np.uint8),
        np.zeros((0, 5, 3), np.uint8),
        np.zeros((5, 0), np.uint8),
        noise().transpose(2, 0, 1),
    ],
    ids=lambda array: f"{array.dtype}{list(array.shape)}",
)
def test_other_arrays_are_rejected_with_shape_and_dtype(array: np.ndarray) -> None:
    with pytest.raises(UnsupportedImage, match=r"the array's (?:shape|dtype) is "):
        read(array)


# -------------------------------------------------------------------------------------------------- unreadable files


def test_a_file_that_is_not_an_image_is_rejected_by_name(tmp_path: Path) -> None:
    (tmp_path / "text.jpg").write_text("not a photo at all, but long enough to have a header")
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "zeros.jpg").write_bytes(bytes(1000))
    (tmp_path / "folder.jpg").mkdir()
    for name, match in (
        ("text.jpg", "not an image"),
        ("empty.jpg", "empty"),
        ("zeros.jpg", "not an image"),
        ("folder.jpg", "a folder"),
        ("missing.jpg", "no such file"),
        ("text.jpg/below.jpg", "no such file"),
        ("\0.jpg", "no such file"),
        ("a" * 300 + ".jpg", r": cannot be read \(File name too long\)$"),
    ):
        with pytest.raises(UnreadableImage, match=match) as caught:
            read(tmp_path / name)
        assert str(tmp_path / name) in str(caught.value)
    with pytest.raises(UnreadableImage, match="no such file; URLs are not fetched, download"):
        read("https://host/cat.jpg")
    with pytest.raises(UnreadableImage, match="<0 bytes>: empty"):
        read(b"")
    with pytest.raises(UnreadableImage):
        read(io.BytesIO())


def test_a_pipe_is_rejected_without_blocking(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    with pytest.raises(UnreadableImage, match="not a regular file"):
        read(tmp_path / "pipe.jpg")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission_is_rejected(png: Path) -> None:
    png.chmod(0)
    with pytest.raises(UnreadableImage, match="no permission"):
        read(png)


def test_a_permission_error_is_reported(png: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Image, "open", denied)
    with pytest.raises(UnreadableImage, match=r"photo\.png: no permission"):
        read(png)


def test_running_out_of_memory_is_reported_as_such(png: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted(*args, **kwargs):
        raise MemoryError

    monkeypatch.setattr(ImageFile.ImageFile, "load", exhausted)
    with pytest.raises(ImageTooLarge, match="not enough memory"):
        read(png)


def test_an_interruption_is_not_taken_for_a_bad_image(png: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(ImageFile.ImageFile, "load", interrupted)
    with pytest.raises(KeyboardInterrupt):
        read(png)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "BMP"])
def test_a_truncated_photo_is_rejected_and_never_half_grey(kind: str) -> None:
    data = encoded(smooth(), kind)
    whole = read(data).pixels
    refused = 0
    for percent in range(1, 100, 3):
        try:
            pixels = read(data[: len(data) * percent // 100]).pixels
        except UnreadableImage:
            refused += 1
        else:  # the truncation lost no pixels
            np.testing.assert_array_equal(pixels, whole, err_msg=f"{percent} %")
    assert refused > 25


def test_a_jpeg_truncated_near_its_end_is_complete_or_rejected() -> None:
    data = encoded(smooth(), "JPEG")
    for lost in range(1, 40):
        with contextlib.suppress(UnreadableImage):
            np.testing.assert_array_equal(read(data[:-lost]).pixels, read(data).pixels)


@pytest.mark.parametrize("keep", [0.3, 0.7, 0.95])
def test_a_truncated_image_opened_by_pillow_is_rejected(keep: float) -> None:
    data = encoded(noise(64, 64), "JPEG")
    with Image.open(io.BytesIO(data[: int(len(data) * keep)])) as lazy, pytest.raises(UnreadableImage):
        read(lazy)


def test_a_pillow_image_without_pixels_is_rejected() -> None:
    for size in ((0, 5), (5, 0)):
        with pytest.raises(UnreadableImage, match="no pixels"):
            read(Image.new("RGB", size))


# ------------------------------------------------------------------------------------------------------------ limits


@pytest.mark.parametrize(
    "header",
    [
        raw_png(100_000, 100_000, b""),
        raw_png(13_350, 13_350, b""),
        b"BM"
        + struct.pack("<IHHIIiiHHIIiiII", 154, 0, 0, 54, 40, 100_000, 100_000, 1, 24, 0, 0, 0, 0, 0, 0)
        + bytes(100),
        b"GIF89a" + struct.pack("<HHBBB", 65535, 65535, 0, 0, 0) + b",\0\0\0\0\xff\xff\xff\xff\0\x02\x00;",
        b"P6 100000 100000 255\n" + bytes(100),
    ],
    ids=["PNG", "PNG just beyond", "BMP", "GIF", "PPM"],
)
def test_a_decompression_bomb_is_rejected_by_its_header(header: bytes) -> None:
    def refuse() -> None:
        with pytest.raises(ImageTooLarge, match=r"limit .* make it smaller first"):
            read(header)

    assert peak_of(refuse) < 2_000_000


def test_the_pixel_limit_is_exact_and_set_by_the_caller() -> None:
    for source in (encoded(noise(8, 12)), noise(8, 12), noise(8, 12, 0), Image.fromarray(noise(8, 12))):
        assert read(source, max_pixels=96).pixels.shape == (8, 12, 3)
        with pytest.raises(ImageTooLarge, match="12 x 8"):
            read(source, max_pixels=95)


def test_an_array_beyond_the_limit_is_rejected_before_conversion_to_rgb() -> None:
    grey = np.zeros((4000, 4000), np.uint8)

    def refuse() -> None:
        with pytest.raises(ImageTooLarge):
            read(grey, max_pixels=1000)

    assert peak_of(refuse) < 1_000_000


def test_a_file_beyond_the_byte_limit_is_rejected_unread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(noise())
    (tmp_path / "photo.png").write_bytes(data)
    monkeypatch.setattr(images, "MAX_BYTES", len(data) - 1)
    monkeypatch.setattr(Image, "open", None)
    for source in (data, tmp_path / "photo.png"):
        with pytest.raises(ImageTooLarge, match="the limit is"):
            read(source)


def test_an_icon_is_rejected_before_its_picture_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    inside = raw_png(6000, 6000, bytes(6000 * 18001))
    icon = struct.pack("<HHH", 0, 1, 1) + struct.pack("<BBBBHHII", 16, 16, 0, 0, 1, 32, len(inside), 22) + inside
    Image.init()  # loads the plug-in for icons
    decoded = []
    monkeypatch.setattr("PIL.IcoImagePlugin.IcoFile", lambda *args: decoded.append(args))
    with pytest.raises(UnreadableImage, match="not an image that can be read"):
        read(icon, max_pixels=1000)
    assert not decoded


def test_postscript_is_not_passed_to_ghostscript(monkeypatch: pytest.MonkeyPatch) -> None:
    Image.init()
    ran = []
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *args, **kwargs: ran.append(args))
    script = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF"
    with pytest.raises(UnreadableImage, match="not an image that can be read"):
        read(script)
    assert not ran


# ------------------------------------------------------------------------------------------------------ pixel formats


def test_cmyk_is_converted_as_pillow_does() -> None:
    image = Image.fromarray(smooth()).convert("CMYK")
    data = encoded(image, "JPEG", quality=100)
    with Image.open(io.BytesIO(data)) as again:
        assert again.mode == "CMYK"
    assert np.abs(read(data).pixels.astype(int) - smooth()).max() < 8


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bit_grey_is_scaled_not_clipped(kind: str) -> None:
    values = np.array([[0, 255, 256, 32768, 65280, 65535]], np.uint16)
    photo = read(encoded(Image.fromarray(values), kind))
    assert photo.pixels[0, :, 0].tolist() == [0, 0, 1, 128, 255, 255]
    assert (photo.pixels == photo.pixels[..., :1]).all()
    assert photo.notes == ("16-bit grey, scaled to 8 bits",)


def test_sixteen_bit_colour_is_scaled_not_clipped() -> None:
    row = struct.pack(">6H", 0, 32768, 65535, 256, 65280, 128)
    assert read(raw_png(2, 1, b"\0" + row, depth=16)).pixels.tolist() == [[[0, 128, 255], [1, 255, 0]]]


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_pixels_of_32_bits_are_rejected(dtype: type) -> None:
    data = encoded(Image.fromarray(np.ones((4, 4), dtype)), "TIFF")
    with pytest.raises(UnsupportedImage, match="32-bit"):
        read(data)


def test_one_bit_images_become_black_and_white() -> None:
    bits = noise(channels=0) > 127
    data = encoded(Image.fromarray(bits))
    np.testing.assert_array_equal(read(data).pixels, np.stack([bits * np.uint8(255)] * 3, axis=2))


def test_grey_is_expanded_to_three_channels() -> None:
    grey = noise(channels=0)
    np.testing.assert_array_equal(read(encoded(grey)).pixels, np.stack([grey] * 3, axis=2))


def test_palettes_are_resolved() -> None:
    image = Image.fromarray(noise()).quantize(16)
    np.testing.assert_array_equal(read(encoded(image)).pixels, np.asarray(image.convert("RGB")))


OVER_WHITE = ("transparency laid over white",)


def test_rgb_pixels_are_not_copied_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """At 12 megapixels that takes a quarter of the time of reading a JPEG."""
    monkeypatch.setattr(Image.Image, "copy", pytest.fail)
    assert read(encoded(smooth(), "JPEG")).pixels.shape == (96, 128, 3)


def test_alpha_is_composited_over_white() -> None:
    rgba = np.array([[[200, 100, 0, 0], [200, 100, 0, 255], [200, 100, 0, 51]]], np.uint8)
    photo = read(encoded(rgba))
    assert photo.pixels[0, :2].tolist() == [[255, 255, 255], [200, 100, 0]]
    np.testing.assert_allclose(photo.pixels[0, 2], [244, 224, 204], atol=1)
    assert photo.notes == OVER_WHITE
    photo = read(encoded(np.array([[[10, 0], [10, 255]]], np.uint8)))
    assert photo.pixels.tolist() == [[[255] * 3, [10] * 3]]
    assert photo.notes == OVER_WHITE


@pytest.mark.parametrize("mode", ["La", "RGBa"])
def test_premultiplied_alpha_is_composited_over_white(mode: str) -> None:
    image = Image.fromarray(np.array([[[10, 0], [10, 255]]], np.uint8)).convert("RGBA" if mode == "RGBa" else "LA")
    photo = read(image.convert(mode))
    assert photo.pixels.tolist() == [[[255] * 3, [10] * 3]]
    assert photo.notes == OVER_WHITE


def test_fully_opaque_alpha_gives_no_note() -> None:
    photo = read(encoded(np.dstack([noise(), np.full((12, 20), 255, np.uint8)])))
    np.testing.assert_array_equal(photo.pixels, noise())
    assert photo.notes == ()


@pytest.mark.parametrize("transparency", [1, b"\xff\x00\xff"], ids=["index", "bytes"])
def test_a_palettes_transparent_colour_is_composited_over_white(transparency: int | bytes) -> None:
    image = Image.new("P", (3, 1))
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    for index in range(3):
        image.putpixel((index, 0), index)
    photo = read(encoded(image, transparency=transparency))
    assert photo.pixels.tolist() == [[[10, 20, 30], [255, 255, 255], [70, 80, 90]]]
    assert photo.notes == OVER_WHITE


def test_semitransparent_palette_entries_are_blended() -> None:
    image = Image.new("P", (1, 1))
    image.putpalette([0, 0, 0])
    np.testing.assert_allclose(read(encoded(image, transparency=b"\x80")).pixels[0, 0], 127, atol=1)


def test_a_transparent_colour_without_palette_is_composited_over_white() -> None:
    rows = b"\0" + bytes([1, 2, 3, 4, 5, 6])
    photo = read(raw_png(2, 1, rows, chunk(b"tRNS", struct.pack(">3H", 1, 2, 3))))
    assert photo.pixels.tolist() == [[[255, 255, 255], [4, 5, 6]]]
    assert photo.notes == OVER_WHITE


def transparent_png(depth: int, colour: int, key: bytes, rows: bytes) -> bytes:
    """Two pixels, and the colour that is transparent."""
    return raw_png(2, 1, b"\0" + rows, chunk(b"tRNS", key), depth=depth, colour=colour)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (transparent_png(16, 2, b"\x80\0" * 3, b"\x80\0" * 3 + bytes(6)), [[255] * 3, [0] * 3]),
        (transparent_png(16, 2, b"\x12\x34\0\0\xff\xff", b"\x12\x34\0\0\xff\xff" + b"\7" * 6), [[255] * 3, [7] * 3]),
        (transparent_png(2, 0, b"\0\1", b"\x60"), [[255] * 3, [170] * 3]),
        (transparent_png(4, 0, b"\0\3", b"\x35"), [[255] * 3, [85] * 3]),
        (transparent_png(1, 0, b"\0\0", b"\x40"), [[255] * 3, [255] * 3]),
        (transparent_png(8, 0, b"\0\x33", b"\x33\x34"), [[255] * 3, [0x34] * 3]),
    ],
    ids=["RGB of 16 bits", "RGB of 16 bits, in colour", "grey of 2 bits", "grey of 4 bits", "of 1 bit", "of 8 bits"],
)
def test_a_transparent_colour_counts_in_the_files_own_bits(data: bytes, expected: list[list[int]]) -> None:
    assert read(data).pixels.tolist() == [expected]
    with Image.open(io.BytesIO(data)) as image:
        assert [read(image).pixels.tolist() for _ in range(2)] == 2 * [[expected]], "the second time, it is decoded"
        image.save(saved := io.BytesIO(), "PNG")
    assert read(saved.getvalue()).pixels.tolist() == [expected]


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "AVIF"])
def test_the_first_frame_of_an_animation_is_used_with_a_note(kind: str) -> None:
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "lime", "blue")]
    options = {"WEBP": {"lossless": True}}.get(kind, {})
    photo = read(encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options))
    assert np.abs(photo.pixels.astype(int) - [255, 0, 0]).max() <= (2 if kind == "AVIF" else 0)
    assert photo.notes == ("animated: the first frame was used",)


@pytest.mark.parametrize(("kind", "notes"), [("MPO", ()), ("TIFF", ("several pages: the first was used",))])
def test_several_pictures_in_a_file_are_not_an_animation(kind: str, notes: tuple[str, ...]) -> None:
    """The preview or gain map that a camera appends to its JPEG is not needed, so there is no note on it."""
    first, second = Image.new("RGB", (16, 16), "white"), Image.new("RGB", (16, 16), "black")
    photo = read(encoded(first, kind, save_all=True, append_images=[second]))
    assert (photo.pixels == 255).all()
    assert photo.notes == notes


@pytest.mark.parametrize(
    "mode", ["1", "L", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "HSV", "LA", "PA", "RGBX", "I;16"]
)
def test_every_supported_pillow_mode_is_read(mode: str) -> None:
    assert read(Image.new(mode, (5, 3))).pixels.shape == (3, 5, 3)


@pytest.mark.parametrize("mode", ["I", "F"])
def test_every_other_mode_is_rejected(mode: str) -> None:
    with pytest.raises(InputError):
        read(Image.new(mode, (5, 3)))


# -------------------------------------------------------------------------------------------------------------- EXIF

STORED_AS: dict[int, Callable[[U8], U8]] = {  # how a camera stores an upright picture with each orientation
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, 1),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a, -1),
}


@pytest.mark.parametrize("orientation", STORED_AS)
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_every_orientation_is_applied(orientation: int, kind: str) -> None:
    upright = smooth(48, 32)
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(np.ascontiguousarray(STORED_AS[orientation](upright)))
    options = {"JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}}.get(kind, {})
    data = encoded(stored, kind, exif=exif, **options)
    photo = read(data)
    pixels = photo.pixels
    assert photo.orientation == orientation
    assert pixels.flags.c_contiguous
    assert np.abs(pixels.astype(int) - upright).max() <= (5 if kind == "JPEG" else 0)
    with Image.open(io.BytesIO(data)) as image:
        np.testing.assert_array_equal(read(image).pixels, pixels)


@pytest.mark.parametrize("compression", [None, "packbits", "tiff_lzw"])
@pytest.mark.parametrize("orientation", STORED_AS)
@pytest.mark.parametrize("mode", ["L", "I;16", "P", "RGB", "RGBA", "CMYK", "1"])
def test_a_tiff_from_a_path_matches_a_png_of_the_same_picture(
    tmp_path: Path, mode: str, orientation: int, compression: str | None
) -> None:
    """Pillow maps uncompressed pixels of a file into memory, and ignores there that height and width are swapped."""
    picture = Image.fromarray(noise(9, 14))
    if mode == "I;16":
        picture = Image.fromarray(noise(9, 14, channels=0).astype(np.uint16) * 257)
    elif mode == "RGBA":
        picture.putalpha(Image.fromarray(noise(9, 14, channels=0, seed=1)))
    else:
        picture = picture.convert(mode)
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "photo.tif"
    picture.save(path, exif=exif, compression=compression)
    upright = picture.convert("RGB") if mode == "CMYK" else picture
    wanted = read(encoded(upright, exif=exif)).pixels
    np.testing.assert_array_equal(read(path).pixels, wanted)
    np.testing.assert_array_equal(read(path.read_bytes()).pixels, wanted)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "TIFF", "GIF", "BMP"])
def test_a_closed_file_is_not_reported_as_damaged(tmp_path: Path, form: str) -> None:
    path = tmp_path / "photo"
    Image.fromarray(smooth()).save(path, form)
    with path.open("rb") as file, Image.open(path) as image, Image.open(path) as loaded, Image.open(file) as of_file:
        loaded.load()
    with pytest.raises(UnreadableImage, match="photo: the file is closed; open it again, or give its path"):
        read(file)
    for lazy in (image, of_file):
        with pytest.raises(UnreadableImage, match=": its file was closed; keep it open until the photo is read"):
            read(lazy)
    if form != "GIF":  # Pillow seeks in it to tell whether it is animated
        assert read(loaded).pixels.shape == (96, 128, 3)


def test_a_file_is_closed_after_reading_or_rejection(tmp_path: Path, png: Path) -> None:
    (tmp_path / "cut.png").write_bytes(png.read_bytes()[:60])
    (tmp_path / "text.png").write_text("no picture")
    before = len(list(Path("/proc/self/fd").iterdir()))
    read(png)
    for name in ("cut.png", "text.png"):
        with pytest.raises(UnreadableImage):
            read(tmp_path / name)
    assert len(list(Path("/proc/self/fd").iterdir())) == before


@pytest.mark.parametrize("mode", ["I;16", "L", "LA", "P", "1", "CMYK"])
def test_orientation_is_applied_to_non_rgb_pixels(mode: str) -> None:
    image = Image.new(mode, (3, 2))
    image.getexif()[0x0112] = 6
    assert read(image).pixels.shape == (3, 2, 3)


@pytest.mark.parametrize("value", [0, 9, 65535])
def test_an_invalid_orientation_is_ignored(value: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = value
    np.testing.assert_array_equal(read(encoded(noise(), exif=exif)).pixels, noise())


@pytest.mark.parametrize(
    "exif",
    [
        b"Exif\0\0garbage",
        b"Exif\0\0II*\0\xff\xff\xff\xff",
        b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + b"\x01\x12" * 20,
        b"Exif\0\0",
        b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x02\0\xff\0\0\0\xff\xff\xff\xff",
    ],
)
def test_a_photo_with_a_corrupt_exif_block_is_read(exif: bytes) -> None:
    data = encoded(smooth(), "JPEG", exif=exif)
    assert exif in data
    np.testing.assert_array_equal(read(data).pixels, read(encoded(smooth(), "JPEG")).pixels)


def test_a_photo_whose_exif_makes_pillow_raise_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def choke(*args, **kwargs):
        raise struct.error("unpack requires a buffer of 8 bytes")

    monkeypatch.setattr(Image.Image, "getexif", choke)
    np.testing.assert_array_equal(read(encoded(noise())).pixels, noise())


# ------------------------------------------------------------------------------------------------ reduced decoding

MARGIN = images._MARGIN


def assert_reduced(data: bytes, part: int, at_least: tuple[int, int]) -> Photo:
    """Checks that a photo is decoded at 1/part, reports its full size, and gives the same model input."""
    whole, photo = read(data), read(data, at_least=at_least)
    height, width = whole.pixels.shape[:2]
    assert (photo.height, photo.width) == (whole.height, whole.width) == (height, width)
    assert photo.pixels.shape == (height // part, width // part, 3)
    assert photo.pixels.flags.c_contiguous
    assert photo.notes == whole.notes
    difference = to_model(photo.pixels, *at_least).astype(int) - to_model(whole.pixels, *at_least)
    assert np.abs(difference).max() <= 6
    return photo


@pytest.mark.parametrize("orientation", STORED_AS)
@pytest.mark.parametrize("part", [1, 2, 4, 8])
def test_a_jpeg_can_be_decoded_reduced_in_every_orientation(orientation: int, part: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(np.ascontiguousarray(STORED_AS[orientation](smooth(320, 192))))
    # Not square, to detect swapped height and width: at 1/part the photo is just large enough.
    at_least = int(320 / part / MARGIN), int(192 / part / MARGIN)
    photo = assert_reduced(encoded(stored, "JPEG", exif=exif, quality=95), part, at_least)
    assert (photo.height, photo.width) == (320, 192)
    assert photo.pixels.shape[0] >= MARGIN * at_least[0]
    assert photo.pixels.shape[1] >= MARGIN * at_least[1]


@pytest.mark.parametrize("side", [0, 1])
def test_one_more_required_pixel_halves_the_reduction(side: int) -> None:
    data = encoded(smooth(320, 192), "JPEG")
    at_least = [int(320 / 4 / MARGIN), int(192 / 4 / MARGIN)]
    at_least[side] += 1
    assert read(data, at_least=(at_least[0], at_least[1])).pixels.shape == (160, 96, 3)


@pytest.mark.parametrize("mode", ["L", "CMYK", "YCbCr", "RGB"])
@pytest.mark.parametrize("progressive", [False, True])
def test_every_kind_of_jpeg_is_reduced_with_its_colours(mode: str, progressive: bool) -> None:
    image = Image.fromarray(smooth(192, 256)).convert(mode)
    assert_reduced(encoded(image, "JPEG", progressive=progressive, quality=95), 4, (10, 12))


def test_the_first_picture_of_a_multi_picture_jpeg_is_reduced() -> None:
    image = Image.fromarray(smooth(192, 256))
    data = encoded(image, "MPO", save_all=True, append_images=[Image.new("RGB", (64, 48))], quality=95)
    with Image.open(io.BytesIO(data)) as opened:
        assert opened.format == "MPO"
    assert_reduced(data, 4, (10, 12))


@pytest.mark.parametrize(("height", "width", "part"), [(195, 256, 1), (196, 256, 4), (192, 258, 2), (200, 264, 8)])
def test_a_reduction_must_divide_the_sides_evenly(height: int, width: int, part: int) -> None:
    assert_reduced(encoded(smooth(height, width), "JPEG", quality=95), part, (5, 5))


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF", "BMP", "GIF"])
def test_no_other_format_is_decoded_reduced(kind: str) -> None:
    photo = read(encoded(smooth(), kind), at_least=(1, 1))
    assert photo.pixels.shape == (96, 128, 3)
    assert (photo.height, photo.width) == (96, 128)


def test_the_pixel_limit_applies_to_the_full_size() -> None:
    data = encoded(smooth(), "JPEG")
    assert read(data, at_least=(1, 1), max_pixels=96 * 128).pixels.shape == (12, 16, 3)
    with pytest.raises(ImageTooLarge, match="128 x 96"):
        read(data, at_least=(1, 1), max_pixels=96 * 128 - 1)


def test_a_truncated_jpeg_is_rejected_in_reduced_decoding() -> None:
    data = encoded(noise(256, 256), "JPEG")
    with pytest.raises(UnreadableImage):
        read(data[: len(data) // 2], at_least=(4, 4))


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P", "CMYK", "I;16"])
@pytest.mark.parametrize("size", [(32, 48), (20, 12), (12, 20)])
def test_the_models_input_is_the_same_from_image_and_from_pixels(mode: str, size: tuple[int, int]) -> None:
    image = Image.fromarray(noise(12, 20, channels=4)).convert("RGB" if mode == "I;16" else mode)
    image = Image.fromarray(noise(12, 20)[..., 0].astype(np.uint16) << 8) if mode == "I;16" else image
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(image, "TIFF" if mode in ("CMYK", "I;16") else "PNG", exif=exif)
    whole = read(data)
    assert whole.pixels.shape == (20, 12, 3)
    assert whole.model_input is None
    for mask_only in (False, True):
        with open_photo(data) as opened:
            photo = opened.decode(size, mask_only=mask_only)
        assert (photo.height, photo.width, photo.notes) == (20, 12, whole.notes)
        np.testing.assert_array_equal(to_model(photo.pixels, *size), to_model(whole.pixels, *size))
        if mode == "I;16":
            assert photo.model_input is None
        else:
            np.testing.assert_array_equal(photo.model_input, to_model(whole.pixels, *size))
        if mode == "I;16" or not mask_only:
            np.testing.assert_array_equal(photo.pixels, whole.pixels)
        else:
            assert photo.pixels is photo.model_input


def test_a_photos_size_defaults_to_that_of_its_pixels() -> None:
    photo = Photo(noise(12, 20))
    assert (photo.height, photo.width, photo.notes) == (12, 20, ())
    assert (Photo(noise(), (), 120, 200).height, Photo(noise(), (), 120, 200).width) == (120, 200)


# ---------------------------------------------------------------------------------- files that are costly to decode


def scans(count: int, progressive: bool) -> bytes:
    """A JPEG with that many empty scans after its picture."""
    scan = b"\xff\xda\0\x08\1\1\0\0" + (b"\0\0" if progressive else b"\x3f\0")
    return encoded(smooth(), "JPEG", progressive=progressive)[:-2] + scan * count + b"\xff\xd9"


def test_a_jpeg_with_many_scans_is_read() -> None:
    assert read(scans(80, True)).pixels.shape == (96, 128, 3)


@pytest.mark.parametrize("progressive", [False, True])
def test_a_jpeg_with_too_many_scans_is_rejected(progressive: bool, tmp_path: Path) -> None:
    data, path = scans(1000, progressive), tmp_path / "photo.jpg"
    path.write_bytes(data)
    for source in (data, path, io.BytesIO(data)):
        with pytest.raises(UnreadableImage, match=r"10\d\d scans"):
            read(source)


def test_a_marker_across_two_read_blocks_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    data = bytearray(encoded(smooth(), "JPEG") + bytes(2**20))
    data[2**20 - 1 : 2**20 + 1] = b"\xff\xda"
    monkeypatch.setattr(images, "_MAX_SCANS", 1 - len(data) // 2**14)
    with pytest.raises(UnreadableImage, match="2 scans"):
        read(bytes(data))


def test_a_video_appended_to_a_photo_is_not_counted_as_scans() -> None:
    photo, video = encoded(smooth(), "JPEG"), np.random.default_rng(0).bytes(20_000_000)
    assert video.count(b"\xff\xda") > 200
    np.testing.assert_array_equal(read(photo + video).pixels, read(photo).pixels)


def test_a_tiff_with_tiles_beyond_the_limit_is_rejected() -> None:
    tiles = {256: 4, 257: 4, 258: 8, 259: 5, 262: 1, 277: 1, 322: 4000, 323: 1000, 324: 8, 325: 16}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tiles.items())
    data = b"II*\0\x08\0\0\0" + struct.pack("<H", len(tiles)) + entries + bytes(64)
    with pytest.raises(ImageTooLarge, match="tiles: 4000 x 1000 is 4 megapixels"):
        read(data, max_pixels=3_999_999)


# ----------------------------------------------------------------------------------------------------------- threads

#: An orientation, and after it an entry that is not there: Pillow warns, and keeps the orientation.
WARNS = b"Exif\0\0II*\0\x08\0\0\0\x02\0" + struct.pack("<HHII", 0x0112, 3, 1, 6)


class Held(io.BytesIO):
    """A file whose ``read`` blocks."""

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self.entered, self.go_on = threading.Event(), threading.Event()

    def read(self, size: int | None = -1) -> bytes:
        self.entered.set()
        assert self.go_on.wait(60)
        return super().read(size)


def sideways() -> bytes:
    return encoded(smooth(48, 32), "JPEG", exif=WARNS)


def test_pillow_warns_about_this_exif() -> None:
    with pytest.warns(UserWarning, match="Corrupt EXIF"), Image.open(io.BytesIO(sideways())) as image:
        assert image.getexif()[0x0112] == 6


def test_a_finished_reader_keeps_warnings_muted_for_another() -> None:
    before = list(warnings.filters)
    first, second = Held(sideways()), Held(sideways())
    with ThreadPoolExecutor(2) as pool:
        results = []
        for file in (first, second):
            results.append(pool.submit(read, file))
            assert file.entered.wait(60)
        for file, result in zip((first, second), results, strict=True):
            file.go_on.set()
            assert result.result().pixels.shape == (
                32,
                48,
                3,
            )  # upright: a warning turned into an error would leave it as stored
    assert warnings.filters == before


def test_concurrent_readers_restore_the_warning_filters() -> None:
    before, data = list(warnings.filters), sideways()
    with ThreadPoolExecutor(16) as pool:
        shapes = {photo.pixels.shape for photo in pool.map(read, [data] * 400)}
    assert shapes == {(32, 48, 3)}
    assert warnings.filters == before


def test_nested_readers_and_foreign_warning_filters_are_respected() -> None:
    class Nested(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            read(sideways())
            warnings.filterwarnings("ignore", message="of someone else")
            return super().read(size)

    before = list(warnings.filters)
    assert read(Nested(sideways())).pixels.shape == (32, 48, 3)
    assert len(warnings.filters) == len(before) + 1
    assert warnings.filters[1:] == before


def test_warning_filters_reset_meanwhile_stay_reset() -> None:
    class Resetting(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            warnings.resetwarnings()
            return super().read(size)

    with warnings.catch_warnings():
        read(Resetting(encoded(smooth(), "JPEG")))
        assert warnings.filters == []


def test_other_warnings_are_not_muted(monkeypatch: pytest.MonkeyPatch) -> None:
    original = ImageFile.ImageFile.load

    def deprecated(self, *args):
        warnings.warn("of someone else", stacklevel=1)
        return original(self, *args)

    monkeypatch.setattr(ImageFile.ImageFile, "load", deprecated)
    with pytest.raises(UnreadableImage, match="of someone else"):  # warnings are errors here
        read(encoded(smooth(), "JPEG"))


def test_threads_decode_concurrently(monkeypatch: pytest.MonkeyPatch) -> None:
    original, both = ImageFile.ImageFile.load, threading.Barrier(2)

    def meet(self, *args):
        both.wait(60)
        return original(self, *args)

    monkeypatch.setattr(ImageFile.ImageFile, "load", meet)
    with ThreadPoolExecutor(2) as pool:
        assert len(list(pool.map(read, [sideways()] * 2))) == 2


# -------------------------------------------------------------------------------------------------------------- fuzz


def small_files() -> dict[str, bytes]:
    picture = Image.fromarray(noise(9, 7))
    exif = Image.Exif()
    exif[0x0112] = 6
    frames = {"save_all": True, "append_images": [Image.fromarray(noise(9, 7, seed=1))]}
    return {
        "jpeg": encoded(picture, "JPEG", exif=exif),
        "progressive": encoded(picture, "JPEG", progressive=True),
        "png": encoded(picture),
        "palette": encoded(picture.quantize(8), transparency=b"\x00\x80"),
        "apng": encoded(picture, **frames),
        "gif": encoded(picture, "GIF", **frames),
        "webp": encoded(picture, "WEBP"),
        "animated webp": encoded(picture, "WEBP", **frames),
        "tiff": encoded(picture, "TIFF"),
        "deflated tiff": encoded(picture, "TIFF", compression="tiff_adobe_deflate"),
        "bmp": encoded(picture, "BMP"),
        "ppm": encoded(picture, "PPM"),
        "avif": encoded(picture, "AVIF"),
        **({"heic": heic(picture)} if importlib.util.find_spec("pillow_heif") else {}),
    }


FILES = small_files()


def only_input_errors(data: bytes) -> None:
    # A small limit, so that a flipped bit in a header does not cost a gigabyte.
    try:
        pixels = read(data, max_pixels=1_000_000).pixels
    except InputError:
        return
    assert pixels.dtype == np.uint8
    assert pixels.ndim == 3
    assert pixels.shape[2] == 3
    assert 0 < pixels.shape[0] * pixels.shape[1] <= 1_000_000


@pytest.mark.parametrize("name", FILES)
@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_flipped_bits_raise_nothing_but_input_errors(name: str, data: st.DataObject) -> None:
    damaged = bytearray(FILES[name])
    flips = st.tuples(st.integers(0, len(damaged) - 1), st.integers(0, 7))
    for position, bit in data.draw(st.lists(flips, min_size=1, max_size=6)):
        damaged[position] ^= 1 << bit
    only_input_errors(bytes(damaged))


@pytest.mark.parametrize("name", FILES)
def test_every_damaged_byte_of_a_header_raises_nothing_but_input_errors(name: str) -> None:
    for position in range(min(64, len(FILES[name]))):
        for value in (0x00, 0x7F, 0xFF):
            damaged = bytearray(FILES[name])
            damaged[position] = value
            only_input_errors(bytes(damaged))


@pytest.mark.parametrize("name", FILES)
@settings(deadline=None, max_examples=20)
@given(tail=st.binary(max_size=200), keep=st.floats(0, 1))
def test_random_bytes_after_a_valid_start_raise_nothing_but_input_errors(name: str, tail: bytes, keep: float) -> None:
    only_input_errors(FILES[name][: int(keep * len(FILES[name]))] + tail)


@settings(deadline=None, max_examples=100)
@given(st.binary(max_size=300))
def test_random_bytes_are_rejected(data: bytes) -> None:
    with pytest.raises(InputError):
        read(data)


# ------------------------------------------------------------------------------- resizing to the model, and back

sides = st.integers(1, 40)


def reference(array: U8, height: int, width: int) -> U8:
    """Bilinear, aspect ratio not kept, antialiased when shrinking: as Pillow resizes, in training, too."""
    return np.array(Image.fromarray(np.ascontiguousarray(array)).resize((width, height), Image.Resampling.BILINEAR))


def assert_own(result: U8, source: U8) -> None:
    assert result.dtype == np.uint8
    assert result.flags.c_contiguous
    assert result.flags.writeable
    assert not np.shares_memory(result, source)


@settings(deadline=None, max_examples=150)
@given(hnp.arrays(np.uint8, st.tuples(sides, sides, st.just(3))), sides, sides)
def test_to_model_matches_pillows_bilinear_resize(pixels: U8, height: int, width: int) -> None:
    result = to_model(pixels, height, width)
    assert result.shape == (height, width, 3)
    np.testing.assert_array_equal(result, reference(pixels, height, width))
    assert_own(result, pixels)


@settings(deadline=None, max_examples=150)
@given(hnp.arrays(np.uint8, st.tuples(sides, sides)), sides, sides)
def test_from_model_matches_pillows_bilinear_resize(probability: U8, height: int, width: int) -> None:
    result = from_model(probability, height, width)
    assert result.shape == (height, width)
    np.testing.assert_array_equal(result, reference(probability, height, width))
    assert_own(result, probability)


def test_resizing_to_the_same_size_gives_an_equal_copy() -> None:
    pixels, probability = noise(), noise(channels=0)
    for result, source in ((to_model(pixels, 12, 20), pixels), (from_model(probability, 12, 20), probability)):
        np.testing.assert_array_equal(result, source)
        assert_own(result, source)


def test_a_transposed_size_is_resized() -> None:
    assert to_model(noise(12, 20), 20, 12).shape == (20, 12, 3)
    assert from_model(noise(12, 20, 0), 20, 12).shape == (20, 12)


def test_shrinking_averages_pixels() -> None:
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 255
    inner = to_model(stripes, 8, 8)[1:-1, 1:-1].astype(int)  # plain bilinear sampling would give 0 or 255
    assert np.abs(inner - 127).max() <= 2
    assert np.abs(from_model(stripes[..., 0], 8, 8)[1:-1, 1:-1].astype(int) - 127).max() <= 2


def test_enlarging_a_constant_keeps_it() -> None:
    for value in (0, 1, 127, 254, 255):
        assert (to_model(np.full((5, 7, 3), value, np.uint8), 33, 17) == value).all()
        assert (from_model(np.full((5, 7), value, np.uint8), 33, 17) == value).all()


@pytest.mark.parametrize("size", [(12, 20), (7, 9), (30, 40)])
def test_views_and_read_only_arrays_are_resized_correctly(size: tuple[int, int]) -> None:
    wide = noise(24, 40, 4)
    for view in (wide[::2, ::2, :3], wide[:12, :20, 2::-1], wide[11::-1, 19::-1, :3]):
        expected = to_model(np.ascontiguousarray(view), *size)
        result = to_model(view, *size)
        np.testing.assert_array_equal(result, expected)
        assert_own(result, wide)
        np.testing.assert_array_equal(from_model(view[..., 0], *size), expected[..., 0])
    frozen = noise()
    frozen.setflags(write=False)
    assert_own(to_model(frozen, *size), frozen)
    assert_own(from_model(frozen[..., 0], *size), frozen)


def test_a_16_bit_pgm_is_scaled_like_other_16_bit_grey(tmp_path: Path) -> None:
    path = tmp_path / "deep.pgm"
    path.write_bytes(b"P5 3 1 65535\n" + np.array([0, 32768, 65535], ">u2").tobytes())
    photo = images.read(path)
    assert photo.pixels[0, :, 0].tolist() == [0, 128, 255]
    assert any("16-bit" in note for note in photo.notes)


# -------------------------------------------------------------------------------------------------------------- HEIC

HEIC = b"\x00\x00\x00\x18ftypheic\x00\x00\x00\x00mif1heic"


@pytest.mark.parametrize("brand", [b"heic", b"heix", b"mif1", b"msf1"])
def test_heic_without_its_plug_in_has_a_remedy_whatever_the_file_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, brand: bytes
) -> None:
    monkeypatch.setitem(sys.modules, "pillow_heif", None)  # as if it were not installed
    monkeypatch.delitem(Image.OPEN, "HEIF", raising=False)
    data = HEIC.replace(b"ftypheic", b"ftyp" + brand)
    for source in (data, io.BytesIO(data), Unrewindable(data), tmp_path / "phone.heic", str(tmp_path / "renamed.jpg")):
        if isinstance(source, (str, Path)):
            Path(source).write_bytes(data)
        with pytest.raises(UnreadableImage) as caught:
            read(source)  # type: ignore[arg-type]
        assert str(caught.value).endswith(
            f": a HEIC photo needs pillow-heif; {install('heic')}, or convert the photo to JPEG"
        )


def test_a_broken_plug_in_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pillow_heif.py").write_text("raise ImportError('libheif.so.1: no such file')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "pillow_heif", raising=False)
    monkeypatch.delitem(Image.OPEN, "HEIF", raising=False)
    with pytest.raises(
        UnreadableImage, match=r"needs pillow-heif, which fails to load \(libheif.so.1: no such file\); "
    ):
        read(HEIC)


class Unrewindable(io.RawIOBase):
    """A pipe, which returns a few bytes at a time and cannot seek."""

    def __init__(self, data: bytes) -> None:
        self._data = io.BytesIO(data)

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        return self._data.read(min(size, 1000) if size >= 0 else size)


def test_heic_is_read_from_files_bytes_and_pipes(tmp_path: Path) -> None:
    pixels, data = smooth(), heic(smooth())
    (tmp_path / "IMG_0001.HEIC").write_bytes(data)
    (tmp_path / "renamed.jpg").write_bytes(data)
    paths = (tmp_path / "IMG_0001.HEIC", str(tmp_path / "renamed.jpg"))
    for source in (data, bytearray(data), io.BytesIO(data), Unrewindable(data), *paths):
        photo = read(source)  # type: ignore[arg-type]
        assert photo.pixels.shape == pixels.shape
        assert np.abs(photo.pixels.astype(int) - pixels).max() <= 8
        assert photo.notes == ()
    with images.opened(data) as image:
        assert image.size == (128, 96)


def test_a_pipe_is_read_only_up_to_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "MAX_BYTES", 5000)

    class Endless(Unrewindable):
        given = 0

        def read(self, size: int = -1) -> bytes:
            self.given += 1000
            assert self.given <= 6000
            return bytes(1000)

    with pytest.raises(ImageTooLarge, match="the limit is"):
        read(Endless(b""))  # type: ignore[arg-type]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_heic_orientation_is_applied_once(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    upright = read(encoded(Image.fromarray(smooth()), "JPEG", quality=100, subsampling=0, exif=exif)).pixels
    data = heic(smooth(), exif=exif.tobytes())
    assert (b"irot" in data or b"imir" in data) == (orientation > 1), "stored twice, as iPhones do"
    assert exif.tobytes()[6:] in data
    pixels = read(data).pixels
    assert pixels.shape == upright.shape
    assert np.abs(pixels.astype(int) - upright).max() <= 12


def test_heic_transparency_grey_and_colours_match_other_formats() -> None:
    clear = Image.fromarray(smooth()).convert("RGBA")
    clear.putalpha(0)
    photo = read(heic(clear))
    assert photo.pixels.min() >= 250
    assert "transparency laid over white" in photo.notes
    grey = read(heic(Image.fromarray(smooth()).convert("L"))).pixels
    assert np.abs(grey.astype(int) - read(Image.fromarray(smooth()).convert("L")).pixels).max() <= 8
    assert read(heic(smooth(), icc_profile=profile())).icc_profile == profile()


def test_the_primary_photo_of_a_heic_file_is_used() -> None:
    photo = read(heic(smooth(), Image.new("RGB", (20, 10), "red")))
    assert photo.pixels.shape == smooth().shape
    assert photo.notes == ("several photos in it: the main one was used",)


def test_damaged_or_oversized_heic_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    data = heic(smooth())
    for keep in (40, 200, len(data) // 2, len(data) - 20):
        with pytest.raises(UnreadableImage, match="damaged or truncated"):
            read(data[:keep])
    with pytest.raises(ImageTooLarge, match=r"128 x 96 is 0 megapixels; the limit is 0"):
        read(data, max_pixels=12_000)
    monkeypatch.setattr(images, "MAX_BYTES", len(data) - 1)
    for source in (data, Unrewindable(data)):
        with pytest.raises(ImageTooLarge, match="the limit is"):
            read(source)  # type: ignore[arg-type]


def test_heic_larger_than_declared_is_rejected() -> None:
    data = heic(smooth(640, 640))
    small = struct.pack(">II", 64, 64)
    assert data.count(b"ispe\0\0\0\0" + struct.pack(">II", 640, 640)) == 1
    lying = data.replace(b"ispe\0\0\0\0" + struct.pack(">II", 640, 640), b"ispe\0\0\0\0" + small)
    with pytest.raises(InputError):
        read(lying, max_pixels=100_000)


def test_avif_with_a_generic_brand_is_read_as_avif() -> None:
    data = encoded(smooth(), "AVIF", quality=100)
    assert data[8:12] == b"avif"
    assert read(data[:8] + b"mif1" + data[12:]).pixels.shape == smooth().shape


HEIC_IS_LAZY = """
import io, sys
from PIL import Image
from petseg_runtime import images
file = io.BytesIO()
Image.new("RGB", (20, 10)).save(file, "JPEG")
images.read(file.getvalue())
assert "pillow_heif" not in sys.modules and "HEIF" not in Image.OPEN
assert images.read(open(sys.argv[1], "rb").read()).pixels.shape == (96, 128, 3)
assert "pillow_heif" in sys.modules
"""


def test_the_heic_plug_in_is_imported_only_for_heic(tmp_path: Path) -> None:
    (tmp_path / "photo.heic").write_bytes(heic(smooth()))
    command = [sys.executable, "-W", "error", "-c", HEIC_IS_LAZY, str(tmp_path / "photo.heic")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr


# ------------------------------------------------------------------------------------------------------------ colours


def profile(colours: bytes = b"RGB ", size: int = 400) -> bytes:
    """The part of an ICC profile that the reader checks."""
    return (bytes(16) + colours + bytes(16) + b"acsp").ljust(size, b"\x01")


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_a_photos_icc_profile_is_kept(form: str, mode: str) -> None:
    if (form, mode) == ("JPEG", "RGBA"):
        mode = "RGB"
    exif = Image.Exif()
    exif[0x0112] = 6
    encoded = io.BytesIO()
    Image.new(mode, (20, 10), "red").save(encoded, form, icc_profile=profile(), exif=exif)
    assert images.read(encoded.getvalue()).icc_profile == profile()
    assert images.read(encoded.getvalue(), at_least=(1, 1)).icc_profile == profile()
    assert images.read(Image.open(encoded)).icc_profile == profile()


@pytest.mark.parametrize(
    ("mode", "icc"),
    [
        pytest.param("CMYK", profile(b"CMYK"), id="CMYK"),
        pytest.param("CMYK", profile(), id="CMYK that says RGB"),
        pytest.param("L", profile(b"GRAY"), id="grey"),
        pytest.param("RGB", profile(b"GRAY"), id="a profile for grey"),
        pytest.param("RGB", b"nonsense" * 100, id="no profile"),
        pytest.param("RGB", b"x", id="too short"),
        pytest.param("RGB", profile(size=1_000_001), id="absurdly large"),
    ],
)
def test_an_icc_profile_not_valid_for_rgb_pixels_is_dropped(mode: str, icc: bytes) -> None:
    encoded = io.BytesIO()
    Image.new(mode, (20, 10)).save(encoded, "JPEG", icc_profile=icc)
    with Image.open(encoded) as image:
        assert image.info["icc_profile"] == icc
    assert images.read(encoded.getvalue()).icc_profile is None


def test_a_photos_memory_is_known_before_decoding(tmp_path: Path) -> None:
    path = tmp_path / "photo.jpg"
    Image.new("RGB", (640, 320)).save(path)
    path.write_bytes(path.read_bytes()[:-50])  # whose decoding would fail
    pixels = np.zeros((320, 640, 3), np.uint8)
    for source in (path, path.read_bytes(), pixels, pixels[..., 0], Image.fromarray(pixels)):
        with images.open_photo(source) as photo:
            assert (photo.pixels, photo.memory) == (640 * 320, 16 * 640 * 320)
    with images.open_photo(path, at_least=(10, 10)) as photo:
        assert photo.pixels == 640 * 320
        assert photo.memory == 12 * 80 * 40 + 4 * 640 * 320, "decoded at 1/8; its result has the full size"


def test_errors_between_opening_and_decoding_propagate_unchanged(tmp_path: Path) -> None:
    Image.new("RGB", (6, 4)).save(tmp_path / "photo.png")
    with pytest.raises(CancelledError), images.open_photo(tmp_path / "photo.png"):
        raise CancelledError


def rotated() -> bytes:
    """The profile of a screen whose red, green and blue are sRGB's blue, red and green: sRGB's, with tags renamed."""
    icc = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    tags = {icc[at : at + 4]: at for at in range(132, 132 + 12 * int.from_bytes(icc[128:132]), 12)}
    renamed = bytearray(icc)
    for was, new in ((b"bXYZ", b"rXYZ"), (b"rXYZ", b"gXYZ"), (b"gXYZ", b"bXYZ")):
        renamed[tags[was] : tags[was] + 4] = new
    return bytes(renamed)


def test_colours_are_converted_to_another_profile() -> None:
    red, there, back = Image.new("RGB", (3, 2), "red"), (rotated(), None), (None, rotated())
    for profiles, expected in ((there, (0, 0, 255)), (back, (0, 255, 0))):
        picture = images.with_profile(red.copy(), profiles[0])
        converted = images.in_profile(picture, profiles[1])
        assert np.abs(np.array(converted, int) - expected).max() <= 1
        assert converted.info.get("icc_profile") == profiles[1]
    for profiles in ((None, None), (rotated(), rotated()), (profile(), None), (None, b"nonsense")):
        picture = images.with_profile(red.copy(), profiles[0])
        assert images.in_profile(picture, profiles[1]) is picture


def test_without_littlecms_colours_are_left_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow may be built without it, and says so at the first use."""

    class Missing:
        def __getattr__(self, name: str) -> None:
            raise ImportError("LittleCMS is not installed")

    picture = images.with_profile(Image.new("RGB", (3, 2), "red"), rotated())
    monkeypatch.setattr(ImageCms, "core", Missing())
    assert images.in_profile(picture, None) is picture


def test_a_background_keeps_its_colours_behind_a_photo_with_a_profile(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8), "red").save(tmp_path / "beach.png", icc_profile=rotated())
    nothing = Segmentation(np.zeros((4, 6, 3), np.uint8), np.zeros((4, 6), np.uint8), 0.5, 0.3)
    for photo, expected in ((None, (0, 0, 255)), (rotated(), (255, 0, 0))):
        result = dataclasses.replace(nothing, icc_profile=photo)
        for behind in (tmp_path / "beach.png", background_of(str(tmp_path / "beach.png"))):
            assert np.abs(np.array(result.on_background(behind), int) - expected).max() <= 1
        np.testing.assert_array_equal(np.array(result.on_background((9, 8, 7))), np.full((4, 6, 3), (9, 8, 7)))


def test_a_background_is_converted_once_per_profile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    converted = []
    real = ImageCms.profileToProfile
    monkeypatch.setattr(ImageCms, "profileToProfile", lambda *args: converted.append(args) or real(*args))
    Image.new("RGB", (8, 8), "red").save(tmp_path / "beach.png", icc_profile=rotated())
    render = render_of("background", background_of(str(tmp_path / "beach.png")))
    nothing = Segmentation(np.zeros((4, 6, 3), np.uint8), np.zeros((4, 6), np.uint8), 0.5, 0.3)
    for _ in range(3):
        assert np.abs(np.array(render(nothing), int) - (0, 0, 255)).max() <= 1
    assert len(converted) == 1


# ------------------------------------------------------------------------------------------------- 16-bit grey


@pytest.mark.parametrize(("bits", "white", "white_is_zero"), [(12, 4095, False), (16, 65535, False), (16, 65535, True)])
def test_a_tiffs_declared_bit_depth_and_polarity_are_applied(
    tmp_path: Path, bits: int, white: int, white_is_zero: bool
) -> None:
    values = np.array([[0, white // 2, white]] * 2, np.uint16)
    stored = white - values if white_is_zero else values
    if bits == 12:  # two values in three bytes; a row of three takes five, padded
        rows = b"".join(
            bytes((r[0] >> 4, (r[0] & 15) << 4 | r[1] >> 8, r[1] & 255, r[2] >> 4, (r[2] & 15) << 4))
            for r in stored.tolist()
        )
    else:
        rows = stored.astype("<u2").tobytes()
    (tmp_path / "grey.tif").write_bytes(tiff(rows, width=3, height=2, bits=bits, photometric=int(not white_is_zero)))
    photo = read(tmp_path / "grey.tif")
    assert [abs(int(a) - b) <= 1 for a, b in zip(photo.pixels[0, :, 0], (0, 127, 255), strict=True)] == [True] * 3
    assert photo.notes == (f"{bits}-bit grey, scaled to 8 bits",)


def tiff(rows: bytes, width: int, height: int, bits: int, photometric: int) -> bytes:
    """A grey TIFF of one strip, without compression, little-endian (TIFF 6.0)."""
    entries = [(256, width), (257, height), (258, bits), (259, 1), (262, photometric), (273, 8 + 2 + 9 * 12 + 4)]
    entries += [(277, 1), (278, height), (279, len(rows))]
    directory = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in entries)
    return b"II*\0" + struct.pack("<IH", 8, len(entries)) + directory + bytes(4) + rows


def test_a_16_bit_pngs_transparent_grey_is_composited_over_white(tmp_path: Path) -> None:
    values = np.array([[0, 40000, 65535]], np.uint16)
    Image.fromarray(values).save(tmp_path / "grey.png", transparency=40000)
    photo = read(tmp_path / "grey.png")
    assert photo.pixels[0, :, 0].tolist() == [0, 255, 255]
    assert photo.notes == ("16-bit grey, scaled to 8 bits", "transparency laid over white")
    Image.fromarray(values).save(tmp_path / "opaque.png", transparency=40001)
    photo = read(tmp_path / "opaque.png")
    assert photo.pixels[0, :, 0].tolist() == [0, 156, 255]
    assert photo.notes == ("16-bit grey, scaled to 8 bits",)


def test_an_rgba_palette_is_composited_over_white() -> None:
    rgba = Image.new("RGBA", (4, 4), (9, 0, 0, 0))
    rgba.putpixel((0, 0), (200, 10, 20, 255))
    photo = read(rgba.quantize(4))
    assert (photo.pixels[1, 1] == 255).all()
    assert photo.notes == ("transparency laid over white",)


def test_a_palette_images_profile_is_kept(tmp_path: Path) -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    Image.new("RGB", (8, 8), "red").quantize(4).save(tmp_path / "p.png", icc_profile=profile)
    assert read(tmp_path / "p.png").icc_profile == profile


def test_an_oversized_open_file_is_rejected_unread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("RGB", (64, 64), "red").save(tmp_path / "p.png")
    monkeypatch.setattr(images, "MAX_BYTES", 50)
    with (tmp_path / "p.png").open("rb") as file, pytest.raises(ImageTooLarge, match="the limit is"):
        read(file)
    monkeypatch.undo()
    with (tmp_path / "p.png").open("rb") as file:
        for place in (0, 5, file.seek(0, os.SEEK_END)):  # the last: as after writing it
            file.seek(place)
            assert read(file).pixels.shape == (64, 64, 3)
