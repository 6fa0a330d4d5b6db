"""Photo in, model input out, mask back: the only such code in the project.

Training, parity and runtime all go through ``to_model`` and ``from_model``, so that there is one resize and
nothing to get wrong between the machine that trained a model and the device that runs it.
"""

from __future__ import annotations

import io
import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from petseg_runtime.errors import ImageTooLarge, InputError, UnreadableImage, UnsupportedImage

__all__ = ["MAX_BYTES", "MAX_PIXELS", "ImageSource", "Photo", "from_model", "read", "to_model"]

U8: TypeAlias = npt.NDArray[np.uint8]
ImageSource: TypeAlias = "str | os.PathLike[str] | bytes | BinaryIO | U8 | Image.Image"

#: A photo with more pixels than this is refused before it is decoded (a decompression bomb, or a satellite image).
#: It is about where Pillow itself refuses, too (twice ``Image.MAX_IMAGE_PIXELS``, which is left as it is).
MAX_PIXELS: Final = 178_000_000
#: An encoded image with more bytes than this is refused before it is read.
MAX_BYTES: Final = 500_000_000

# What photos come in. Pillow would open forty more formats, among them EPS, which it hands to Ghostscript, and icons,
# which it decodes while opening, before anyone can ask how large the picture inside is.
_FORMATS: Final = ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "PPM", "AVIF")


@dataclass(frozen=True)
class Photo:
    """An image ready for segmentation.

    Attributes:
        pixels: uint8 [height, width, 3], RGB, upright.
        notes: What had to be decided on the way, each in a few words ("first of 12 frames").
    """

    pixels: U8
    notes: tuple[str, ...] = ()


def read(source: ImageSource, *, max_pixels: int = MAX_PIXELS) -> Photo:
    """Decode an image to upright RGB.

    EXIF orientation is applied; transparency is laid over white; 16-bit grey is scaled to 8 bits; CMYK is
    converted; of an animation the first frame is taken.

    Args:
        source: A path, the bytes of an encoded image, an open binary file, an array, or a PIL image. An array is
            uint8: [H, W] grey, [H, W, 3] RGB or [H, W, 4] RGBA.
        max_pixels: Refuse anything larger, before decoding.

    Returns:
        The photo: uint8 [H, W, 3] RGB, and notes on what was decided.

    Raises:
        UnreadableImage: Missing, truncated, or not an image.
        UnsupportedImage: Pixel values without an agreed meaning as RGB.
        ImageTooLarge: More than ``max_pixels`` or ``MAX_BYTES``.
    """
    if isinstance(source, np.ndarray):
        return _from_array(source, max_pixels)
    name = _name_of(source)
    try:
        with warnings.catch_warnings():
            # Pillow warns of odd metadata (corrupt EXIF, truncated ICC) that does not touch the pixels.
            warnings.simplefilter("ignore")
            if isinstance(source, Image.Image):
                return _convert(source, name, max_pixels)
            with Image.open(_opened(source, name), formats=_formats()) as image:
                return _convert(image, name, max_pixels)
    except PermissionError as error:
        raise UnreadableImage(f"{name}: no permission to read it") from error
    except Image.DecompressionBombError as error:
        raise ImageTooLarge(f"{name}: {error} (limit of Pillow): make it smaller first") from error
    except UnidentifiedImageError as error:
        raise UnreadableImage(
            f"{name}: not an image that can be read (its contents fit none of {', '.join(_formats())})"
        ) from error
    except InputError:
        raise
    except MemoryError as error:
        raise ImageTooLarge(f"{name}: not enough memory to decode it") from error
    except Exception as error:
        # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error, zlib.error, IndexError... on damage;
        # whatever it is, this one image is unreadable and its reason is kept.
        raise UnreadableImage(f"{name}: damaged or truncated ({_one_line(error)})") from error


def to_model(pixels: U8, height: int, width: int) -> U8:
    """Resize a photo to a model's input: stretched, bilinear, antialiased when shrinking.

    Args:
        pixels: uint8 [h, w, 3] RGB.
        height: The model's input height.
        width: The model's input width.

    Returns:
        uint8 [height, width, 3], contiguous and the caller's own.
    """
    if pixels.shape[:2] == (height, width):
        return np.ascontiguousarray(pixels).copy()
    resized = Image.fromarray(pixels).resize((width, height), Image.Resampling.BILINEAR)
    return np.array(resized)


def from_model(probability: U8, height: int, width: int) -> U8:
    """Bring a model's output back to the photo's size: bilinear, antialiased when shrinking.

    Args:
        probability: uint8 [H, W], ``round(255 * p(pet))``.
        height: The photo's height.
        width: The photo's width.

    Returns:
        uint8 [height, width], the caller's own.
    """
    if probability.shape == (height, width):
        return np.ascontiguousarray(probability).copy()
    resized = Image.fromarray(probability).resize((width, height), Image.Resampling.BILINEAR)
    return np.array(resized)


def _name_of(source: Any) -> str:
    if isinstance(source, (str, os.PathLike)):
        return os.fspath(source)
    if isinstance(source, bytes):
        return f"<{len(source)} bytes>"
    return str(getattr(source, "filename", "") or getattr(source, "name", "") or "<image>")


def _opened(source: Any, name: str) -> Any:
    """What ``Image.open`` takes, with the size in bytes checked first."""
    if isinstance(source, bytes):
        size, opened = len(source), io.BytesIO(source)
    elif isinstance(source, (str, os.PathLike)):
        path = Path(source)
        if not path.is_file():  # a pipe or device would block for ever; a folder is not an image
            kind = "a folder, not an image" if path.is_dir() else "not a regular file"
            raise UnreadableImage(f"{name}: {kind if path.exists() else 'no such file'}")
        size, opened = path.stat().st_size, path  # type: ignore[assignment]
    else:
        return source
    if size == 0:
        raise UnreadableImage(f"{name}: empty (0 bytes)")
    if size > MAX_BYTES:
        raise ImageTooLarge(f"{name}: {size / 1e6:.0f} MB; the limit is {MAX_BYTES / 1e6:.0f} MB")
    return opened


def _formats() -> tuple[str, ...]:
    """``_FORMATS``, and what phones take photos in, where a plug-in for it has been registered with Pillow."""
    return (*_FORMATS, "HEIF") if "HEIF" in Image.OPEN else _FORMATS


def _check_pixels(width: int, height: int, name: str, max_pixels: int) -> None:
    if width == 0 or height == 0:
        raise UnreadableImage(f"{name}: {width} x {height} has no pixels")
    if width * height > max_pixels:
        raise ImageTooLarge(
            f"{name}: {width} x {height} is {width * height / 1e6:.0f} megapixels; "
            f"the limit is {max_pixels / 1e6:.0f}: make it smaller first"
        )


def _convert(image: Image.Image, name: str, max_pixels: int) -> Photo:
    _check_pixels(image.width, image.height, name, max_pixels)
    notes: list[str] = []
    frames = getattr(image, "n_frames", 1)
    if frames > 1 and getattr(image, "is_animated", False):
        notes.append(f"animated: the first of {frames} frames was used")
    # Pillow decodes a 16-bit PGM to 32-bit integers, scaled to 0..65535 (and forgets the format when it is turned).
    sixteen = image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM")
    image.load()
    image = _upright(image)
    if sixteen:
        notes.append("16-bit grey, scaled to 8 bits")
        grey = (np.asarray(image, dtype=np.uint32) >> 8).astype(np.uint8)
        return Photo(np.repeat(grey[..., None], 3, axis=2), tuple(notes))
    if image.mode in ("I", "F"):
        raise UnsupportedImage(
            f"{name}: 32-bit pixels (mode {image.mode}) have no agreed range; save it as 8- or 16-bit first"
        )
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        if rgba.getchannel("A").getextrema() != (255, 255):
            notes.append("transparency laid over white")
            image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return Photo(np.array(image.convert("RGB")), tuple(notes))


def _upright(image: Image.Image) -> Image.Image:
    """Apply the EXIF orientation; an EXIF block that cannot be parsed means: as stored."""
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # noqa: BLE001 (Pillow raises a dozen kinds on damage)
        # The pixels are fine, only the metadata is not; viewers show such a photo as it is stored.
        return image


def _from_array(array: npt.NDArray[Any], max_pixels: int) -> Photo:
    if array.dtype != np.uint8:
        raise UnsupportedImage(f"array of {array.dtype}; uint8 with values 0 to 255 is expected")
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (3, 4)) or 0 in array.shape:
        raise UnsupportedImage(f"array of shape {array.shape}; [H, W], [H, W, 3] or [H, W, 4] is expected")
    _check_pixels(array.shape[1], array.shape[0], "array", max_pixels)
    if array.ndim == 2:
        return Photo(np.repeat(array[..., None], 3, axis=2))
    if array.shape[2] == 4:
        return _convert(Image.fromarray(np.ascontiguousarray(array)), "array", max_pixels)
    return Photo(np.ascontiguousarray(array))


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
