"""Decodes photos, resizes them to a model's input, and resizes masks back to the photo's size.

Training, evaluation, the parity test and the runtime resize photos to the model's size with ``to_model``, and all masks
to the size of the photo or frame with ``from_model``. Two paths to the model's size differ from that; how much their
masks differ has been measured:

- FFmpeg's swscale converts and resizes the frames of videos (:class:`petseg_runtime.video.frame.Converter`):
  ``benchmarks/results/video-road.json``;
- on request, a large JPEG is decoded at a reduced size before ``to_model`` (``at_least``; ``petseg infer
  --fast-decode``): ``benchmarks/results/reduced-decoding.json``.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import threading
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, ImageFile, UnidentifiedImageError

from petseg_runtime.errors import ImageTooLarge, PetsegError, UnreadableImage, UnsupportedImage, one_line
from petseg_runtime.extras import install

__all__ = [
    "HEIF_BRANDS",
    "MAX_BYTES",
    "MAX_PIXELS",
    "Decode",
    "ImageSource",
    "OpenPhoto",
    "Photo",
    "contents",
    "drained",
    "from_model",
    "in_profile",
    "is_photo",
    "may_change",
    "open_photo",
    "opened",
    "orientation",
    "read",
    "to_model",
    "upright",
    "with_profile",
]

U8: TypeAlias = npt.NDArray[np.uint8]
ImageSource: TypeAlias = "str | os.PathLike[str] | bytes | bytearray | memoryview | BinaryIO | U8 | Image.Image"

#: A photo with more pixels than this is rejected before it is decoded (a decompression bomb, or a satellite image).
#: About Pillow's own limit (twice ``Image.MAX_IMAGE_PIXELS``, which stays unchanged).
MAX_PIXELS: Final = 178_000_000
#: An encoded image with more bytes than this is rejected before it is read.
MAX_BYTES: Final = 500_000_000

# The accepted formats. Pillow opens forty more, among them EPS, which it passes to Ghostscript, and icons, which it
# decodes while opening, before the size of the picture inside can be checked.
_FORMATS: Final = ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "PPM", "AVIF")

#: The brands of HEIC, the format of iPhones, and its relatives, in bytes 8 to 12 of a file (ISO/IEC 23008-12). Pillow
#: reads them with a plug-in, pillow-heif.
HEIF_BRANDS: Final = frozenset(
    {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1"}
)
# AVIF may have the brands mif1 and msf1, too; then one of these is among its compatible brands.
_AVIF_BRANDS: Final = frozenset({b"avif", b"avis"})
# The brands lie in this many bytes at the beginning of a file.
_HEAD: Final = 64

# A JPEG with more scans than this is rejected (see ``_check_cost``); progressive ones have about ten.
_MAX_SCANS: Final = 100

# A larger ICC profile, in bytes, is dropped: those of cameras and screens have 0.5 to 4 kB, and each result keeps one.
_MAX_PROFILE: Final = 1_000_000

# A JPEG decoded at a reduced size must still have this many times the model's height and width. Then the masks of 200
# photos of 5 and of 12 megapixels agree on average with those of the full-size photos (mean IoU 0.995 or more); single
# masks may differ more: benchmarks/results/reduced-decoding.json.
_MARGIN: Final = 3.0

# Bytes per pixel, as measured at 12 megapixels for cutouts and masks: of a decoded photo with Pillow's copies, and of a
# result at the photo's size.
_DECODED: Final = 12
_RESULT: Final = 4

# The note on a file with more than one picture, by format. The further pictures in a phone's or a camera's JPEG (MPO)
# are a preview, a gain map or the other view of a stereo pair, and need no note.
_NOTES_ON_SEVERAL: Final = {
    "HEIF": "several photos in it: the main one was used",
    "MPO": "",
    "TIFF": "several pages: the first was used",
}
_ANIMATED: Final = "animated: the first frame was used"

# What undoes each EXIF orientation (TIFF 6.0, tag 274; 1 is upright), and which of these swap height and width.
_TRANSPOSITIONS: Final = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SIDEWAYS: Final = tuple(_TRANSPOSITIONS[orientation] for orientation in (5, 6, 7, 8))

# By how much Pillow multiplies the grey values of a PNG with 2 or 4 bits.
_GREY_STEPS: Final = {"L;2": 85, "L;4": 17}


@dataclass(frozen=True)
class Photo:
    """A decoded photo.

    Attributes:
        pixels: uint8 [h, w, 3], RGB, upright; h x w is the photo's size, or a reduced size if that was requested.
        notes: Decisions made while decoding it, each in a few words ("transparency laid over white").
        height: Height of the full-size photo, upright; 0 stands for that of ``pixels``.
        width: Width of the full-size photo, upright; 0 stands for that of ``pixels``.
        icc_profile: The ICC profile of its RGB values; None: none applies to them, which means sRGB.
        orientation: Its EXIF orientation, 1 to 8, already applied to ``pixels``; 1: none was needed.
        model_input: uint8 [H, W, 3], the photo at a model's size, if decoding made it (see :class:`Decode`); else None.
    """

    pixels: U8
    notes: tuple[str, ...] = ()
    height: int = 0
    width: int = 0
    icc_profile: bytes | None = None
    orientation: int = 1
    model_input: U8 | None = None

    def __post_init__(self) -> None:
        """Replaces a height and width of 0 with those of the pixels."""
        object.__setattr__(self, "height", self.height or self.pixels.shape[0])
        object.__setattr__(self, "width", self.width or self.pixels.shape[1])


class Decode(Protocol):
    """Decodes an open photo."""

    def __call__(self, model_size: tuple[int, int] | None = None, *, mask_only: bool = False) -> Photo:
        """Returns and raises what :func:`read` does.

        Args:
            model_size: The height and width that the photo is resized to, as by ``to_model``; an image of Pillow, other
                than 16-bit grey, is resized before it becomes an array (:attr:`Photo.model_input`), which saves a copy.
            mask_only: The pixels serve no other purpose: :attr:`Photo.pixels` may be the model's input, too, which
                saves another copy. Requires ``model_size``.
        """


@dataclass(frozen=True, eq=False)
class OpenPhoto:
    """A photo that is open and whose size is known, but that is not decoded yet; see :func:`open_photo`.

    Attributes:
        pixels: The number of pixels of the full-size photo.
        memory: About how many bytes decoding takes, plus a result of the full size.
        decode: Decodes it; see :class:`Decode`.
    """

    pixels: int
    memory: int
    decode: Decode


def read(source: ImageSource, *, max_pixels: int = MAX_PIXELS, at_least: tuple[int, int] | None = None) -> Photo:
    """Decode an image to upright RGB. Several threads may decode different sources in parallel.

    Applies the EXIF orientation; composites transparency over white; scales 16-bit grey to 8 bits; converts CMYK;
    takes the first frame of an animation. HEIC needs the package pillow-heif.

    Args:
        source: A path, the bytes of an encoded image, an open binary file, an array, or a PIL image. An array is
            uint8: [H, W] grey, [H, W, 3] RGB or [H, W, 4] RGBA. Arrays and PIL images are not modified, and the photo
            shares no memory with them.
        max_pixels: Reject a photo with more pixels before decoding it; counted at its full size.
        at_least: The height and width that ``to_model`` will resize the pixels to, if they serve no other purpose. A
            JPEG may then be decoded at 1/2, 1/4 or 1/8 of its size (still three times that height and width), which
            gives nearly the same mask. None: decode at full size.

    Returns:
        The photo, with uint8 [H, W, 3] RGB pixels.

    Raises:
        UnreadableImage: Missing, truncated, not an image, or HEIC without pillow-heif; the message names the remedy.
        UnsupportedImage: The pixel values have no agreed meaning as RGB, or ``source`` is of an unsupported type.
        ImageTooLarge: More than ``max_pixels`` or ``MAX_BYTES``.
    """
    with open_photo(source, max_pixels=max_pixels, at_least=at_least) as photo:
        return photo.decode()


@contextlib.contextmanager
def open_photo(
    source: ImageSource,
    *,
    max_pixels: int = MAX_PIXELS,
    at_least: tuple[int, int] | None = None,
    name: str | None = None,
) -> Iterator[OpenPhoto]:
    """Open a photo without decoding it, for callers that reserve memory first; :func:`read` in two steps.

    Args:
        source: As for :func:`read`.
        max_pixels: As for :func:`read`.
        at_least: As for :func:`read`.
        name: The photo's name in error messages; None: its path, or a description.

    Yields:
        The photo, which must be decoded within the context.

    Raises:
        InputError: As :func:`read`.
    """
    if isinstance(source, np.ndarray):
        yield _open_array(source, max_pixels)
        return
    given = _checked(source)
    name = name or _name_of(given)
    with contextlib.ExitStack() as file:
        with _reading(name):
            image = given
            if not isinstance(given, Image.Image):
                image = _open_encoded(given, name, file)
                _check_cost(image, name, max_pixels)
            photo = _open_image(image, name, max_pixels, at_least if image is not given else None)
        yield photo


@contextlib.contextmanager
def opened(source: str | os.PathLike[str] | bytes | BinaryIO, *, max_pixels: int = MAX_PIXELS) -> Iterator[Image.Image]:
    """Open an encoded image whose stored values are needed unconverted (a mask), with the checks of :func:`read`.

    Args:
        source: A path, bytes, or an open binary file.
        max_pixels: Reject an image with more pixels.

    Yields:
        The image as Pillow opens it, not decoded yet. Errors that Pillow raises within the context become ours.

    Raises:
        UnreadableImage: Missing, not a regular file, not in an accepted format, or truncated.
        ImageTooLarge: More than ``max_pixels`` or ``MAX_BYTES``.
    """
    name = _name_of(source)
    with _reading(name), contextlib.ExitStack() as file:
        image = _open_encoded(source, name, file)
        _check_cost(image, name, max_pixels)
        _check_pixels(image.width, image.height, name, max_pixels)
        yield image


@contextlib.contextmanager
def _reading(name: str, image: Image.Image | None = None) -> Iterator[None]:
    """Mutes Pillow's warnings, and converts its errors to ours; ``image`` is the one that is read, if it is open."""
    closed = False
    if isinstance(image, ImageFile.ImageFile) and image.format != "HEIF":  # whose plug-in reads all when it opens it
        closed = getattr(image.fp, "closed", image.fp is None)
    try:
        with _PILLOW_MUTED:
            yield
    except PermissionError as error:
        raise UnreadableImage(f"{name}: no permission to read it") from error
    except Image.DecompressionBombError as error:
        raise ImageTooLarge(f"{name}: {error} (Pillow's limit); make it smaller first") from error
    except UnidentifiedImageError as error:
        formats = ", ".join((*_FORMATS, "HEIC"))
        raise UnreadableImage(
            f"{name}: not an image that can be read (its contents match none of {formats})"
        ) from error
    except PetsegError:
        raise
    except MemoryError as error:
        raise ImageTooLarge(f"{name}: not enough memory to decode it; make it smaller first") from error
    except Exception as error:
        # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error, zlib.error, IndexError... on damage.
        # Whatever it is, this one image is unreadable, and the message keeps the reason.
        if closed:
            raise UnreadableImage(f"{name}: its file was closed; keep it open until the photo is read") from error
        if isinstance(error, OSError) and error.errno is not None:  # from the operating system
            raise UnreadableImage(f"{name}: cannot be read ({error.strerror})") from error
        raise UnreadableImage(f"{name}: damaged or truncated ({one_line(error)})") from error


def is_photo(source: object) -> bool:
    """Whether :func:`read` accepts an object of this type as one photo; an array with four axes is several photos."""
    if isinstance(source, np.ndarray):
        return source.ndim < 4
    if isinstance(source, (str, os.PathLike, bytes, bytearray, memoryview, Image.Image)):
        return True
    return hasattr(source, "read") and not isinstance(source, io.TextIOBase)


def contents(file: BinaryIO) -> tuple[bytes, str]:
    """Read an open file from its beginning; returns its bytes, at most one more than ``MAX_BYTES``, and its name.

    Raises:
        UnreadableImage: It cannot be read.
    """
    name = _name_of(file)
    with _reading(name):
        return drained(_rewindable(file, name)), name


def may_change(image: Image.Image) -> bool:
    """Whether a PIL image may change before it is read, because its owner draws on it or seeks to its next frame.

    False for an image that Pillow has opened from a file with a single picture and not decoded yet: to draw on it,
    Pillow decodes it first.

    Raises:
        UnreadableImage: It is damaged.
    """
    with _reading(_name_of(image), image):
        # ``im`` would raise before the image is decoded.
        undecoded = isinstance(image, ImageFile.ImageFile) and vars(image).get("_im") is None
        return not undecoded or bool(getattr(image, "is_animated", False))


def to_model(pixels: U8 | Image.Image, height: int, width: int) -> U8:
    """Resize a photo to a model's input: aspect ratio not kept, bilinear, antialiased when shrinking.

    Args:
        pixels: uint8 [h, w, 3] RGB, or a PIL image in RGB, which saves a copy.
        height: The model's input height.
        width: The model's input width.

    Returns:
        uint8 [height, width, 3], contiguous, sharing no memory with ``pixels``.
    """
    if isinstance(pixels, Image.Image):
        return _resized(pixels, height, width)
    if pixels.shape[:2] == (height, width):
        return np.ascontiguousarray(pixels).copy()
    return _resized(Image.fromarray(pixels), height, width)


def from_model(probability: U8, height: int, width: int) -> U8:
    """Resize a model's output to the photo's size: bilinear, antialiased when shrinking.

    Args:
        probability: uint8 [H, W], ``round(255 * p(pet))``.
        height: The photo's height.
        width: The photo's width.

    Returns:
        uint8 [height, width], sharing no memory with ``probability``.
    """
    if probability.shape == (height, width):
        return np.ascontiguousarray(probability).copy()
    return _resized(Image.fromarray(probability), height, width)


def _resized(image: Image.Image, height: int, width: int) -> U8:
    return np.array(image.resize((width, height), Image.Resampling.BILINEAR))


class _Muted:
    """Ignores Pillow's warnings while at least one thread is inside; they concern metadata only (corrupt EXIF or ICC).

    ``warnings.catch_warnings`` swaps the filters of the whole process, so when two threads overlap, the first one to
    leave removes the other's filter. Here the first thread in adds one filter and the last one out removes it; changes
    that others make to the list meanwhile are kept. The lock is held for these updates only.
    """

    def __init__(self) -> None:
        # As ``warnings.filterwarnings`` builds it; the comment in the pattern makes this entry unique.
        self._filter = ("ignore", None, Warning, re.compile(r"(?:PIL|pillow_heif)(?:\.|$)(?#petseg)"), 0)
        self._lock = threading.Lock()
        self._inside = 0
        self._filters: list[Any] = []

    def __enter__(self) -> None:
        with self._lock:
            self._inside += 1
            if self._inside == 1:
                # Inserted by hand: ``filterwarnings`` would also make Python forget which warnings it has shown.
                self._filters = warnings.filters  # type: ignore[assignment] # typed as a Sequence; it is a list
                self._filters.insert(0, self._filter)

    def __exit__(self, *exception: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0 and self._filter in self._filters:  # someone may have reset the list
                self._filters.remove(self._filter)


_PILLOW_MUTED: Final = _Muted()


def _checked(source: Any) -> Any:
    """Checks the type of a photo that is not an array; converts any kind of byte buffer to ``bytes``.

    Raises:
        UnsupportedImage: The type is not supported.
    """
    if not is_photo(source):
        why = " (which cv2.imread returns for a file that it cannot read)" if source is None else ""
        raise UnsupportedImage(
            "a photo must be a path, bytes, an open binary file, a uint8 array or a PIL image, not "
            f"{type(source).__name__}{why}"
        )
    return bytes(source) if isinstance(source, (bytearray, memoryview)) else source


def _name_of(source: Any) -> str:
    if isinstance(source, (str, os.PathLike)):
        return os.fspath(source)
    if isinstance(source, bytes):
        return f"<{len(source)} bytes>"
    return str(getattr(source, "filename", "") or getattr(source, "name", "") or "<image>")


def _open_encoded(source: Any, name: str, stack: contextlib.ExitStack) -> Image.Image:
    """Opens an encoded image with Pillow after checking its size in bytes; ``stack`` closes it.

    Raises:
        InputError: It cannot be opened. Pillow's other errors are converted by :func:`_reading`.
    """
    opened = _open_file(source, name, stack)
    if not _is_heif(_head(opened)):
        return stack.enter_context(Image.open(opened, formats=_FORMATS))
    _register_heif(name)
    try:
        return stack.enter_context(Image.open(opened, formats=("HEIF",)))
    except UnidentifiedImageError as error:  # the plug-in gives no reason
        raise UnreadableImage(f"{name}: a damaged or truncated HEIC photo") from error


def _head(opened: Any) -> bytes:
    """Returns the first bytes of a file; ``Image.open`` will rewind it."""
    opened.seek(0)
    head = opened.read(_HEAD)
    return head if isinstance(head, bytes) else b""


def _is_heif(head: bytes) -> bool:
    """Whether a file that begins with these bytes is HEIC or a relative, but not AVIF, which shares the container."""
    length = min(int.from_bytes(head[:4], "big"), len(head))
    compatible = {head[at : at + 4] for at in range(16, length, 4)}
    return head[4:8] == b"ftyp" and head[8:12] in HEIF_BRANDS and not compatible & _AVIF_BRANDS


def _register_heif(name: str) -> None:
    """Registers the HEIC plug-in with Pillow; done at the first HEIC photo, since importing it takes time.

    Raises:
        UnreadableImage: The plug-in is not installed, or does not work.
    """
    if "HEIF" in Image.OPEN:
        return
    try:
        from pillow_heif import register_heif_opener

        register_heif_opener()
    except ImportError as error:
        why = "" if isinstance(error, ModuleNotFoundError) else f", which fails to load ({one_line(error)})"
        raise UnreadableImage(
            f"{name}: a HEIC photo needs pillow-heif{why}; {install('heic')}, or convert the photo to JPEG"
        ) from error


def _open_file(source: Any, name: str, stack: contextlib.ExitStack) -> Any:
    """Returns a seekable binary file for ``Image.open`` after checking its size in bytes; ``stack`` closes it.

    Always an open file, never a path: given a path, Pillow maps uncompressed pixels into memory, and those of a TIFF
    that lies on its side with height and width swapped.

    Raises:
        UnreadableImage: Missing, not a regular file, or empty.
        ImageTooLarge: More than ``MAX_BYTES``.
    """
    if isinstance(source, bytes):
        size, opened = len(source), io.BytesIO(source)
    elif isinstance(source, (str, os.PathLike)):
        path = Path(source)
        if not path.is_file():  # a pipe or device could block forever; a folder is not an image
            raise UnreadableImage(f"{name}: {_why_no_file(path, name)}")
        file = stack.enter_context(path.open("rb"))
        size, opened = os.fstat(file.fileno()).st_size, file  # type: ignore[assignment]
    else:
        opened = _rewindable(source, name)
        opened.seek(0, os.SEEK_END)
        size = opened.tell()
    if size == 0:
        raise UnreadableImage(f"{name}: empty (0 bytes)")
    if size > MAX_BYTES:
        raise ImageTooLarge(f"{name}: {size / 1e6:.0f} MB; the limit is {MAX_BYTES / 1e6:.0f} MB")
    return opened


def _why_no_file(path: Path, name: str) -> str:
    if path.exists():
        return "a folder, not an image" if path.is_dir() else "not a regular file"
    return "no such file" + ("; URLs are not fetched, download the photo first" if "://" in name else "")


def _rewindable(file: Any, name: str) -> Any:
    """Returns the file if it is seekable; else, as for a pipe, a buffer with its contents, at most a byte too many.

    Raises:
        UnreadableImage: The file is closed.
    """
    if getattr(file, "closed", False):
        raise UnreadableImage(f"{name}: the file is closed; open it again, or give its path")
    try:
        file.seek(0)
        return file
    except (AttributeError, OSError):
        return io.BytesIO(drained(file))


def drained(file: Any) -> bytes:
    """Read a file to its end, or to one byte more than ``MAX_BYTES``."""
    data = bytearray()
    while len(data) <= MAX_BYTES and (more := file.read(min(2**20, MAX_BYTES + 1 - len(data)))):
        data += more
    return bytes(data)


def _check_pixels(width: int, height: int, name: str, max_pixels: int) -> None:
    if width == 0 or height == 0:
        raise UnreadableImage(f"{name}: an image of {width} x {height} has no pixels")
    if width * height > max_pixels:
        raise ImageTooLarge(
            f"{name}: {width} x {height} is {width * height / 1e6:.0f} megapixels; "
            f"the limit is {max_pixels / 1e6:.0f}; make it smaller first"
        )


def _check_cost(image: Any, name: str, max_pixels: int) -> None:
    """Rejects an open image that would cost far more to decode than its bytes or pixels suggest.

    Raises:
        ImageTooLarge: A TIFF whose tiles have more than ``max_pixels``.
        UnreadableImage: A JPEG with too many scans.
    """
    if image.format == "TIFF":
        # However small the picture, libtiff allocates one full tile: up to 2 GB.
        _check_pixels(image.tag_v2.get(322, 1), image.tag_v2.get(323, 1), f"{name}: tiles", max_pixels)
    if image.format in ("JPEG", "MPO"):
        # Each scan is a pass over the whole picture, but may be ten bytes long: 1 MB of scans would keep libjpeg, which
        # has no limit, busy for an hour. Encoders write one scan, or about ten in a progressive JPEG. A video appended
        # to the photo, as phones do, contains the same two bytes by chance, once in 64 KiB.
        scans, size = _count_scans(image.fp)
        if scans > _MAX_SCANS + size // 2**14:
            raise UnreadableImage(f"{name}: a JPEG with {scans} scans (photos have about ten); save it again")


def _count_scans(file: Any) -> tuple[int, int]:
    """Counts the SOS markers in a file; returns their number and the file's size in bytes. Keeps the file position."""
    position, scans, size, last = file.tell(), 0, 0, b""
    file.seek(0)
    while block := file.read(2**20):
        scans += (last + block).count(b"\xff\xda")
        size, last = size + len(block), block[-1:]
    file.seek(position)
    return scans, size


def _open_image(image: Image.Image, name: str, max_pixels: int, at_least: tuple[int, int] | None = None) -> OpenPhoto:
    _check_pixels(image.width, image.height, name, max_pixels)
    pixels = image.width * image.height
    height, width = _reduce(image, *at_least) if at_least else (0, 0)

    def decode(model_size: tuple[int, int] | None = None, *, mask_only: bool = False) -> Photo:
        with _reading(name, image):
            return _decoded(image, name, height, width, model_size, mask_only=mask_only)

    return OpenPhoto(pixels, _DECODED * image.width * image.height + _RESULT * pixels, decode)


def _decoded(
    image: Image.Image, name: str, height: int, width: int, model_size: tuple[int, int] | None, *, mask_only: bool
) -> Photo:
    """Decode an open image; ``height`` and ``width`` are those of :class:`Photo`, the rest as for :class:`Decode`."""
    notes: list[str] = []
    # ``n_frames`` is not used: to count pages or frames, Pillow walks through the whole TIFF or GIF, for minutes if a
    # file of a few MB is crafted for that.
    note = _NOTES_ON_SEVERAL.get(str(image.format), _ANIMATED)
    chosen = image.tell() > 0 and image.format != "HEIF"  # by the caller's seek; HEIC opens at its main photo
    if note and not chosen and getattr(image, "is_animated", False):
        notes.append(note)
    # Pillow decodes a 16-bit PGM to 32-bit integers, scaled to 0..65535 (and drops the format when it transposes).
    sixteen = image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM")
    stored = _stored_as(image)  # asked first: for its orientation, Pillow decodes a PNG
    meant = orientation(image)  # asked first: Pillow transposes a TIFF as it decodes it, and clears the tag
    image.load()
    _scale_transparent_colour(image, stored)
    turned = upright(image)
    model_input = None
    if sixteen:
        pixels = _from_sixteen(image, turned, notes)
    else:
        rgb = _to_rgb(turned, name, notes)
        model_input = to_model(rgb, *model_size) if model_size else None
        pixels = np.array(rgb) if model_input is None or not mask_only else model_input
    return Photo(
        pixels,
        tuple(notes),
        height or turned.height,
        width or turned.width,
        _profile(image),
        meant,
        model_input,
    )


def _profile(image: Image.Image) -> bytes | None:
    """The ICC profile of an image whose RGB values are kept; that of CMYK or grey does not apply to RGB."""
    profile = image.info.get("icc_profile")
    if (
        image.mode not in ("RGB", "RGBA", "RGBX", "P", "PA")
        or not isinstance(profile, bytes)
        or len(profile) > _MAX_PROFILE
    ):
        return None
    # In its header: the colour space, and the signature of every profile.
    return profile if profile[16:20] == b"RGB " and profile[36:40] == b"acsp" else None


def with_profile(picture: Image.Image, profile: bytes | None) -> Image.Image:
    """Set a picture's ICC profile, and return the picture; None removes the profile, which means sRGB."""
    picture.info.pop("icc_profile", None)
    picture.info |= {"icc_profile": profile} if profile else {}
    return picture


def in_profile(picture: Image.Image, wanted: bytes | None) -> Image.Image:
    """Convert a picture to another ICC profile.

    Args:
        picture: RGB; ``info["icc_profile"]`` is its profile, if missing sRGB.
        wanted: The new profile; None: sRGB.

    Returns:
        A picture with that profile; the picture itself if it has it already, or if either profile is damaged.
    """
    profile = picture.info.get("icc_profile")
    if profile == wanted:
        return picture
    from PIL import ImageCms  # few pictures need it

    try:
        before, after = (
            ImageCms.ImageCmsProfile(io.BytesIO(one) if one else ImageCms.createProfile("sRGB"))
            for one in (profile, wanted)
        )
        return with_profile(ImageCms.profileToProfile(picture, before, after) or picture, wanted)
    except (ImageCms.PyCMSError, OSError, ImportError):  # the last: Pillow was built without LittleCMS
        return picture


def _reduce(image: Image.Image, height: int, width: int) -> tuple[int, int]:
    """Make Pillow decode a JPEG at 1/8, 1/4 or 1/2, if that leaves ``_MARGIN`` times ``height`` and ``width``.

    Other formats cannot be decoded at a reduced size, and are left unchanged.

    Only a denominator that divides both sides is used (cameras' sides are multiples of 16): otherwise libjpeg rounds
    up, so that the last column covers less than the others, and that stretch of half a pixel changes masks more than
    the reduction does.

    Returns:
        Height and width of the full-size photo, upright; zeros if it is not a JPEG.
    """
    if image.format not in ("JPEG", "MPO"):
        return 0, 0
    turned = _transposition(image) in _SIDEWAYS
    across, down = image.size
    wanted = (height, width) if turned else (width, height)
    most = min(across / wanted[0], down / wanted[1]) / _MARGIN
    parts = [part for part in (8, 4, 2) if part <= most and across % part == down % part == 0]
    if parts:
        # No mode: with one, libjpeg instead of ``_to_rgb`` would convert the colours.
        image.draft(None, (across // parts[0], down // parts[0]))
    return (across, down) if turned else (down, across)


def orientation(image: Image.Image) -> int:
    """An image's EXIF orientation, 1 to 8; 1 (upright) if it has none or an unreadable one."""
    try:
        found: Any = image.getexif().get(ExifTags.Base.Orientation)
        return found if found in _TRANSPOSITIONS else 1
    except Exception:  # noqa: BLE001 (Pillow raises a dozen kinds on damage)
        # Only the metadata is damaged, not the pixels; viewers show such a photo as it is stored.
        return 1


def upright(image: Image.Image) -> Image.Image:
    """Apply an image's EXIF orientation; returns the image itself if it is stored upright."""
    turn = _transposition(image)
    return image if turn is None else image.transpose(turn)


def _transposition(image: Image.Image) -> Image.Transpose | None:
    """The transposition that makes an image upright, by its EXIF orientation; None: it is upright."""
    return _TRANSPOSITIONS.get(orientation(image))


def _stored_as(image: Image.Image) -> str | None:
    """Pillow's name for the pixels of a PNG in its file, such as ``RGB;16B``; None: not a PNG, or decoded already."""
    tiles = getattr(image, "tile", None)
    return str(tiles[0][3]) if tiles and image.format == "PNG" else None


def _scale_transparent_colour(image: Image.Image, stored: str | None) -> None:
    """Scale the transparent colour of a PNG to 8 bits: Pillow scales the pixels, but not the colour.

    Of 16 bits, the lower ones are lost: colours that differ only in these become transparent, too.
    """
    colour = image.info.get("transparency")
    if stored == "RGB;16B" and isinstance(colour, tuple):
        image.info["transparency"] = tuple(value >> 8 for value in colour)
    elif stored in _GREY_STEPS and isinstance(colour, int):
        image.info["transparency"] = colour * _GREY_STEPS[stored]


def _from_sixteen(image: Image.Image, turned: Image.Image, notes: list[str]) -> U8:
    """Converts 16-bit grey to uint8 [H, W, 3]; ``image``, as it was opened, tells how to interpret the values."""
    tags: Any = getattr(image, "tag_v2", {})  # a TIFF has these
    bits = tags.get(258, (16,))
    bits = bits[0] if isinstance(bits, tuple) else bits
    values = np.asarray(turned, dtype=np.uint32)
    transparent = image.info.get("transparency")  # in a PNG, the one transparent value
    grey = (values >> max(0, bits - 8)).astype(np.uint8)
    if tags.get(262) == 0:  # WhiteIsZero, which Pillow applies to 8 bits only
        grey = 255 - grey
    notes.append(f"{bits}-bit grey, scaled to 8 bits")
    if isinstance(transparent, int) and (values == transparent).any():
        grey = np.where(values == transparent, np.uint8(255), grey)
        notes.append("transparency laid over white")
    return np.repeat(grey[..., None], 3, axis=2)


def _to_rgb(image: Image.Image, name: str, notes: list[str]) -> Image.Image:
    """Converts a decoded image to RGB, or returns it if it is; appends decisions to ``notes``."""
    if image.mode in ("I", "F"):
        raise UnsupportedImage(
            f"{name}: 32-bit pixels (mode {image.mode}) have no agreed range; save it with 8 or 16 bits first"
        )
    if image.mode == "La":  # premultiplied; Pillow converts it to LA only
        image = image.convert("LA")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        if rgba.getchannel("A").getextrema() != (255, 255):
            notes.append("transparency laid over white")
            image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return image if image.mode == "RGB" else image.convert("RGB")  # convert() would copy it


def _open_array(array: npt.NDArray[Any], max_pixels: int) -> OpenPhoto:
    if array.dtype != np.uint8:
        raise UnsupportedImage(f"the array's dtype is {array.dtype}; it must be uint8, with values 0 to 255")
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (3, 4)) or 0 in array.shape:
        raise UnsupportedImage(f"the array's shape is {array.shape}; it must be [H, W], [H, W, 3] or [H, W, 4]")
    _check_pixels(array.shape[1], array.shape[0], "array", max_pixels)
    if array.ndim == 3 and array.shape[2] == 4:
        return _open_image(Image.fromarray(np.ascontiguousarray(array)), "array", max_pixels)
    pixels = array.shape[0] * array.shape[1]

    def decode(model_size: tuple[int, int] | None = None, *, mask_only: bool = False) -> Photo:
        return Photo(np.repeat(array[..., None], 3, axis=2) if array.ndim == 2 else np.array(array, order="C"))

    return OpenPhoto(pixels, (_DECODED + _RESULT) * pixels, decode)
