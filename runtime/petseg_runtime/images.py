"""Photo in, model input out, mask back.

Training, evaluation, parity and the runtime bring photos to the model's size with ``to_model``, and all masks back to
a photo's or frame's size with ``from_model``. Two roads to the model's size are other than that of a whole photo, and
how much their masks differ is measured:

- frames of videos are converted and resized by FFmpeg's swscale (:class:`petseg_runtime.video.frame.Converter`):
  ``benchmarks/results/video-road.json``;
- a large JPEG is decoded at a reduced size before ``to_model``, where that is asked for (``at_least``; ``petseg infer
  --fast-decode``): ``benchmarks/results/reduced-decoding.json``.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, ImageFile, UnidentifiedImageError

from petseg_runtime.errors import ImageTooLarge, PetsegError, UnreadableImage, UnsupportedImage, one_line
from petseg_runtime.extras import install

__all__ = [
    "HEIF_BRANDS",
    "MAX_BYTES",
    "MAX_PIXELS",
    "ImageSource",
    "OpenPhoto",
    "Photo",
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

#: A photo with more pixels than this is refused before it is decoded (a decompression bomb, or a satellite image).
#: It is about where Pillow itself refuses, too (twice ``Image.MAX_IMAGE_PIXELS``, which is left as it is).
MAX_PIXELS: Final = 178_000_000
#: An encoded image with more bytes than this is refused before it is read.
MAX_BYTES: Final = 500_000_000

# What photos come in. Pillow would open forty more formats, among them EPS, which it hands to Ghostscript, and icons,
# which it decodes while opening, before anyone can ask how large the picture inside is.
_FORMATS: Final = ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "PPM", "AVIF")

#: What HEIC, as iPhones take photos, and its kin call themselves in bytes 8 to 12 (ISO/IEC 23008-12). Pillow reads them
#: with a plug-in, pillow-heif.
HEIF_BRANDS: Final = frozenset(
    {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1"}
)
# AVIF may call itself mif1 and msf1, too; then one of these is among the brands that it is compatible with.
_AVIF_BRANDS: Final = frozenset({b"avif", b"avis"})
# So much of a file's beginning holds its brands.
_HEAD: Final = 64

# A JPEG with more scans than this is refused (see ``_check_cost``); progressive ones have about ten.
_MAX_SCANS: Final = 100

# An ICC profile with more bytes is left out: those of cameras and screens have 0.5 to 4 kB, and each result has it.
_MAX_PROFILE: Final = 1_000_000

# How many times the model's input, per side, a JPEG that is decoded at a reduced size must still have. With it the
# masks of 200 photos of 5 and of 12 megapixels agree with those of the whole photos in the mean (IoU 0.995 or more),
# which single masks may not: benchmarks/results/reduced-decoding.json.
_MARGIN: Final = 3.0

# Bytes a pixel that photos on their way to cutouts or masks take, as measured at 12 megapixels: decoded, with Pillow's
# copies; and their results, of the photo's own size.
_DECODED: Final = 12
_RESULT: Final = 4

# What is said of a file with more than one picture, by its format. Behind a phone's or a camera's JPEG (MPO) lie a
# preview, a gain map or the other eye's view, and nothing is lost without them.
_OF_SEVERAL: Final = {
    "HEIF": "several photos in it: the main one was used",
    "MPO": "",
    "TIFF": "several pages: the first was used",
}
_ANIMATED: Final = "animated: the first frame was used"

# What undoes each EXIF orientation (TIFF 6.0, tag 274; 1 is upright), and which of these swap height and width.
_TURNS: Final = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SIDEWAYS: Final = tuple(_TURNS[orientation] for orientation in (5, 6, 7, 8))


@dataclass(frozen=True)
class Photo:
    """An image ready for segmentation.

    Attributes:
        pixels: uint8 [h, w, 3], RGB, upright; h x w is the photo's own size, or less if ``read`` was allowed to.
        notes: What had to be decided on the way, each in a few words ("transparency laid over white").
        height: Of the whole photo, upright; 0 stands for that of ``pixels``.
        width: Of the whole photo, upright; 0 stands for that of ``pixels``.
        icc_profile: What its RGB values mean as colours, if it says so; None: sRGB, as nearly all.
        orientation: That of its EXIF, 1 to 8, by which the pixels were turned; 1: not at all.
    """

    pixels: U8
    notes: tuple[str, ...] = ()
    height: int = 0
    width: int = 0
    icc_profile: bytes | None = None
    orientation: int = 1

    def __post_init__(self) -> None:
        """Without a size of its own the photo is as large as its pixels."""
        object.__setattr__(self, "height", self.height or self.pixels.shape[0])
        object.__setattr__(self, "width", self.width or self.pixels.shape[1])


@dataclass(frozen=True, eq=False)
class OpenPhoto:
    """A photo that is open and measured, but not decoded; see :func:`open_photo`.

    Attributes:
        pixels: How many the whole photo has.
        memory: About how many bytes decoding it takes, and a result of the whole photo's size.
        decode: Decodes it; returns and raises what :func:`read` does.
    """

    pixels: int
    memory: int
    decode: Callable[[], Photo]


def read(source: ImageSource, *, max_pixels: int = MAX_PIXELS, at_least: tuple[int, int] | None = None) -> Photo:
    """Decode an image to upright RGB. Safe to call from many threads; they decode at the same time.

    EXIF orientation is applied; transparency is laid over white; 16-bit grey is scaled to 8 bits; CMYK is
    converted; of an animation the first frame is taken. HEIC needs the package pillow-heif.

    Args:
        source: A path, the bytes of an encoded image, an open binary file, an array, or a PIL image. An array is
            uint8: [H, W] grey, [H, W, 3] RGB or [H, W, 4] RGBA. Neither an array nor a PIL image is changed, and
            the photo shares no memory with it.
        max_pixels: Refuse anything larger, before decoding; counted at the photo's own size.
        at_least: The height and width that ``to_model`` will bring the pixels to, where nothing else is wanted of
            them: an encoded JPEG may then be decoded at 1/2, 1/4 or 1/8 of its size, which gives nearly the
            same mask (see ``_MARGIN``). None: the pixels at the photo's own size.

    Returns:
        The photo: uint8 [H, W, 3] RGB, its own size, and notes on what was decided.

    Raises:
        UnreadableImage: Missing, truncated, not an image, or HEIC without pillow-heif; the message names the remedy.
        UnsupportedImage: Pixel values without an agreed meaning as RGB, or not of a type that is taken.
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
    model_size: tuple[int, int] | None = None,
    name: str | None = None,
) -> Iterator[OpenPhoto]:
    """The first half of :func:`read`, for callers that make sure of the memory before a photo is decoded.

    Args:
        source: As for :func:`read`.
        max_pixels: Likewise.
        at_least: Likewise.
        model_size: The same height and width, where nothing else is wanted of the pixels: an image may then be brought
            to them before it becomes an array, which spares two copies of the whole photo. None: its own size.
        name: What errors call it; None: by its path, or what it is.

    Yields:
        The photo, to be decoded before this is left.

    Raises:
        InputError: As of :func:`read`.
    """
    if isinstance(source, np.ndarray):
        yield _of_array(source, max_pixels)
        return
    given = _taken(source)
    name = name or _name_of(given)
    with contextlib.ExitStack() as file:
        with _reading(name):
            image = given
            if not isinstance(given, Image.Image):
                image = _encoded(given, name, file)
                _check_cost(image, name, max_pixels)
            photo = _of_image(image, name, max_pixels, at_least if image is not given else None, model_size)
        yield photo


@contextlib.contextmanager
def opened(source: str | os.PathLike[str] | bytes | BinaryIO, *, max_pixels: int = MAX_PIXELS) -> Iterator[Image.Image]:
    """An encoded image that is known to be worth decoding, for those who want its values as they are stored (masks).

    Args:
        source: A path, bytes, or an open binary file.
        max_pixels: Refuse anything larger.

    Yields:
        The image as Pillow opens it: not decoded yet. What Pillow raises while it is used is turned into ours.

    Raises:
        UnreadableImage: Missing, no regular file, of no format that photos come in, truncated.
        ImageTooLarge: More than ``max_pixels`` or ``MAX_BYTES``.
    """
    name = _name_of(source)
    with _reading(name), contextlib.ExitStack() as file:
        image = _encoded(source, name, file)
        _check_cost(image, name, max_pixels)
        _check_pixels(image.width, image.height, name, max_pixels)
        yield image


@contextlib.contextmanager
def _reading(name: str) -> Iterator[None]:
    """Mutes Pillow's warnings, and turns its errors into ours."""
    try:
        with _PILLOW_MUTED:
            yield
    except PermissionError as error:
        raise UnreadableImage(f"{name}: no permission to read it") from error
    except Image.DecompressionBombError as error:
        raise ImageTooLarge(f"{name}: {error} (limit of Pillow): make it smaller first") from error
    except UnidentifiedImageError as error:
        formats = ", ".join((*_FORMATS, "HEIC"))
        raise UnreadableImage(f"{name}: not an image that can be read (its contents fit none of {formats})") from error
    except PetsegError:
        raise
    except MemoryError as error:
        raise ImageTooLarge(f"{name}: not enough memory to decode it") from error
    except Exception as error:
        # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error, zlib.error, IndexError... on damage;
        # whatever it is, this one image is unreadable and its reason is kept.
        if isinstance(error, OSError) and error.errno is not None:  # the system's
            raise UnreadableImage(f"{name}: cannot be read ({error.strerror})") from error
        raise UnreadableImage(f"{name}: damaged or truncated ({one_line(error)})") from error


def is_photo(source: object) -> bool:
    """Whether something is of a type that :func:`read` takes as one photo; an array of four axes is several."""
    if isinstance(source, np.ndarray):
        return source.ndim < 4
    if isinstance(source, (str, os.PathLike, bytes, bytearray, memoryview, Image.Image)):
        return True
    return hasattr(source, "read") and not isinstance(source, io.TextIOBase)


def may_change(image: Image.Image) -> bool:
    """Whether a PIL image's owner may draw the next photo on it, or turn it to its next frame, before it is read; not
    one that Pillow has opened, of a file with a single picture.

    Raises:
        UnreadableImage: It is damaged.
    """
    with _reading(_name_of(image)):
        return not isinstance(image, ImageFile.ImageFile) or bool(getattr(image, "is_animated", False))


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
    return _resized(Image.fromarray(pixels), height, width)


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
    return _resized(Image.fromarray(probability), height, width)


def _resized(image: Image.Image, height: int, width: int) -> U8:
    return np.array(image.resize((width, height), Image.Resampling.BILINEAR))


class _Muted:
    """Ignores Pillow's warnings while at least one thread is inside; they are of odd metadata (corrupt EXIF, truncated
    ICC) that do not touch the pixels.

    ``warnings.catch_warnings`` swaps the filters of the whole process, so that of two threads the first to leave
    takes the other's filter away. Here the first one in adds one filter and the last one out takes it back; whatever
    others do to the list meanwhile stays. The lock is held for that only.
    """

    def __init__(self) -> None:
        # As ``warnings.filterwarnings`` would write it, but the pattern's comment makes this entry unlike any other.
        self._filter = ("ignore", None, Warning, re.compile(r"(?:PIL|pillow_heif)(?:\.|$)(?#petseg)"), 0)
        self._lock = threading.Lock()
        self._inside = 0
        self._filters: list[Any] = []

    def __enter__(self) -> None:
        with self._lock:
            self._inside += 1
            if self._inside == 1:
                # Put in by hand: ``filterwarnings`` would also make Python forget which warnings it has shown.
                self._filters = warnings.filters  # type: ignore[assignment] # typed as a Sequence; it is a list
                self._filters.insert(0, self._filter)

    def __exit__(self, *exception: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0 and self._filter in self._filters:  # not if someone has reset the list
                self._filters.remove(self._filter)


_PILLOW_MUTED: Final = _Muted()


def _taken(source: Any) -> Any:
    """A photo that is no array, as it was given; bytes of any kind as ``bytes``.

    Raises:
        UnsupportedImage: Not of a type that is taken.
    """
    if not is_photo(source):
        why = " (which is what cv2.imread returns for a file that it cannot read)" if source is None else ""
        raise UnsupportedImage(
            "a photo is a path, bytes, an open binary file, a uint8 array or a PIL image, not "
            f"{type(source).__name__}{why}"
        )
    return bytes(source) if isinstance(source, (bytearray, memoryview)) else source


def _name_of(source: Any) -> str:
    if isinstance(source, (str, os.PathLike)):
        return os.fspath(source)
    if isinstance(source, bytes):
        return f"<{len(source)} bytes>"
    return str(getattr(source, "filename", "") or getattr(source, "name", "") or "<image>")


def _encoded(source: Any, name: str, stack: contextlib.ExitStack) -> Image.Image:
    """An encoded image as Pillow opens it, with its size in bytes checked first; ``stack`` closes it.

    Raises:
        InputError: It cannot be opened; what Pillow raises beside that is for :func:`_reading`.
    """
    opened = _opened(source, name, stack)
    if not _is_heif(_head(opened)):
        return stack.enter_context(Image.open(opened, formats=_FORMATS))
    _register_heif(name)
    try:
        return stack.enter_context(Image.open(opened, formats=("HEIF",)))
    except UnidentifiedImageError as error:  # the plug-in says no more
        raise UnreadableImage(f"{name}: a HEIC photo that is damaged or truncated") from error


def _head(opened: Any) -> bytes:
    """The first bytes of what ``Image.open`` will take, and read from its beginning."""
    opened.seek(0)
    head = opened.read(_HEAD)
    return head if isinstance(head, bytes) else b""


def _is_heif(head: bytes) -> bool:
    """Whether a file that begins like this is HEIC or its kin; not AVIF, which shares the container."""
    length = min(int.from_bytes(head[:4], "big"), len(head))
    compatible = {head[at : at + 4] for at in range(16, length, 4)}
    return head[4:8] == b"ftyp" and head[8:12] in HEIF_BRANDS and not compatible & _AVIF_BRANDS


def _register_heif(name: str) -> None:
    """Have Pillow read HEIC, once a photo needs that: nobody else waits for the plug-in.

    Raises:
        UnreadableImage: It is not installed, or does not work.
    """
    if "HEIF" in Image.OPEN:
        return
    try:
        from pillow_heif import register_heif_opener

        register_heif_opener()
    except ImportError as error:
        why = "" if isinstance(error, ModuleNotFoundError) else f", and that fails ({one_line(error)})"
        raise UnreadableImage(
            f"{name}: a HEIC photo, which needs pillow-heif{why}: {install('heic')}, or convert the photo to JPEG"
        ) from error


def _opened(source: Any, name: str, stack: contextlib.ExitStack) -> Any:
    """What ``Image.open`` takes, and can be read from its beginning, with the size in bytes checked first.

    An open file, which ``stack`` closes, never a path: of a path Pillow maps uncompressed pixels into memory, and those
    of a TIFF that lies on its side with height and width exchanged.
    """
    if isinstance(source, bytes):
        size, opened = len(source), io.BytesIO(source)
    elif isinstance(source, (str, os.PathLike)):
        path = Path(source)
        if not path.is_file():  # a pipe or device would block for ever; a folder is not an image
            raise UnreadableImage(f"{name}: {_why_no_file(path, name)}")
        file = stack.enter_context(path.open("rb"))
        size, opened = os.fstat(file.fileno()).st_size, file  # type: ignore[assignment]
    else:
        opened = _rewindable(source)
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
    return "no such file" + ("; a URL is not fetched: download the photo first" if "://" in name else "")


def _rewindable(file: Any) -> Any:
    """An open file; of a pipe, which cannot go back to its beginning, what comes out of it, up to a byte too many."""
    try:
        file.seek(0)
        return file
    except (AttributeError, OSError):
        data = bytearray()
        while len(data) <= MAX_BYTES and (more := file.read(min(2**20, MAX_BYTES + 1 - len(data)))):
            data += more
        return io.BytesIO(data)


def _check_pixels(width: int, height: int, name: str, max_pixels: int) -> None:
    if width == 0 or height == 0:
        raise UnreadableImage(f"{name}: {width} x {height} has no pixels")
    if width * height > max_pixels:
        raise ImageTooLarge(
            f"{name}: {width} x {height} is {width * height / 1e6:.0f} megapixels; "
            f"the limit is {max_pixels / 1e6:.0f}: make it smaller first"
        )


def _check_cost(image: Any, name: str, max_pixels: int) -> None:
    """Refuse a file that has been opened, and would cost far more to decode than its bytes or pixels suggest.

    Raises:
        ImageTooLarge: A TIFF whose tiles have more than ``max_pixels``.
        UnreadableImage: A JPEG with too many scans.
    """
    if image.format == "TIFF":
        # However small the picture, libtiff makes room for one whole tile of it: up to 2 GB.
        _check_pixels(image.tag_v2.get(322, 1), image.tag_v2.get(323, 1), f"{name}: tiles", max_pixels)
    if image.format in ("JPEG", "MPO"):
        # Each scan is a pass over the whole picture, but may be ten bytes long: 1 MB of them would keep libjpeg, which
        # knows no limit, busy for an hour. Encoders write one, or about ten if the JPEG is progressive. A video
        # behind the photo, as phones put there, has the same two bytes by chance: once in 64 KiB.
        scans, size = _count_scans(image.fp)
        if scans > _MAX_SCANS + size // 2**14:
            raise UnreadableImage(f"{name}: a JPEG with {scans} scans, where photos have about ten: save it anew")


def _count_scans(file: Any) -> tuple[int, int]:
    """How often the marker SOS occurs in a file, and the file's size in bytes; the position in it is kept."""
    position, scans, size, last = file.tell(), 0, 0, b""
    file.seek(0)
    while block := file.read(2**20):
        codes = np.frombuffer(last + block, np.uint8)
        scans += int(np.count_nonzero((codes[:-1] == 0xFF) & (codes[1:] == 0xDA)))
        size, last = size + len(block), block[-1:]
    file.seek(position)
    return scans, size


def _of_image(
    image: Image.Image,
    name: str,
    max_pixels: int,
    at_least: tuple[int, int] | None = None,
    model_size: tuple[int, int] | None = None,
) -> OpenPhoto:
    _check_pixels(image.width, image.height, name, max_pixels)
    pixels = image.width * image.height
    height, width = _reduce(image, *at_least) if at_least else (0, 0)

    def decode() -> Photo:
        with _reading(name):
            return _decoded(image, name, height, width, model_size)

    return OpenPhoto(pixels, _DECODED * image.width * image.height + _RESULT * pixels, decode)


def _decoded(
    image: Image.Image, name: str, height: int, width: int, model_size: tuple[int, int] | None = None
) -> Photo:
    """Decode an open image; ``height`` and ``width`` are those of :class:`Photo`, the rest is as of ``open_photo``."""
    notes: list[str] = []
    # How many there are is not asked: Pillow walks through a TIFF's or a GIF's to count them, for minutes if a file of
    # a few MB is made for that.
    note = _OF_SEVERAL.get(str(image.format), _ANIMATED)
    chosen = image.tell() > 0 and image.format != "HEIF"  # by who has opened it; HEIC opens at its main photo
    if note and not chosen and getattr(image, "is_animated", False):
        notes.append(note)
    # Pillow decodes a 16-bit PGM to 32-bit integers, scaled to 0..65535 (and forgets the format when it is turned).
    sixteen = image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM")
    meant = orientation(image)  # Pillow turns a TIFF as it decodes it, and forgets that it did
    image.load()
    turned = upright(image)
    if sixteen:
        pixels = _from_sixteen(image, turned, notes)
    else:
        rgb = _to_rgb(turned, name, notes)
        pixels = _resized(rgb, *model_size) if model_size else np.array(rgb)
    return Photo(pixels, tuple(notes), height or turned.height, width or turned.width, _profile(image), meant)


def _profile(image: Image.Image) -> bytes | None:
    """The ICC profile of an image whose colours are kept as they are; of CMYK or grey it means nothing for RGB."""
    profile = image.info.get("icc_profile")
    if (
        image.mode not in ("RGB", "RGBA", "RGBX", "P", "PA")
        or not isinstance(profile, bytes)
        or len(profile) > _MAX_PROFILE
    ):
        return None
    # Of its header: the colours that it is for, and the mark of every profile.
    return profile if profile[16:20] == b"RGB " and profile[36:40] == b"acsp" else None


def with_profile(picture: Image.Image, profile: bytes | None) -> Image.Image:
    """Set a picture's ICC profile, and return the picture; None: without one, which means sRGB."""
    picture.info.pop("icc_profile", None)
    picture.info |= {"icc_profile": profile} if profile else {}
    return picture


def in_profile(picture: Image.Image, wanted: bytes | None) -> Image.Image:
    """Convert a picture to another ICC profile.

    Args:
        picture: RGB; ``info["icc_profile"]`` is its profile, without it sRGB.
        wanted: The new profile; None: sRGB.

    Returns:
        A picture with that profile. The picture itself where it has it already, or where either profile is damaged.
    """
    profile = picture.info.get("icc_profile")
    if profile == wanted:
        return picture
    from PIL import ImageCms  # for few pictures only

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

    Files of other formats cannot be decoded so, and are left as they are.

    Only a part that divides both sides is taken (cameras' sides are multiples of 16): libjpeg rounds up, and the last
    column would stand for less than the others. That stretch of half a pixel changes masks more than the reduction.

    Returns:
        Height and width of the whole photo, upright; zeros for one that is not a JPEG.
    """
    if image.format not in ("JPEG", "MPO"):
        return 0, 0
    turned = _turn(image) in _SIDEWAYS
    across, down = image.size
    wanted = (height, width) if turned else (width, height)
    most = min(across / wanted[0], down / wanted[1]) / _MARGIN
    parts = [part for part in (8, 4, 2) if part <= most and across % part == down % part == 0]
    if parts:
        # Without a mode: one would let libjpeg, not ``_to_rgb``, convert the colours.
        image.draft(None, (across // parts[0], down // parts[0]))
    return (across, down) if turned else (down, across)


def orientation(image: Image.Image) -> int:
    """An image's EXIF orientation, 1 to 8; 1, which is upright, also where it has none that can be read."""
    try:
        found: Any = image.getexif().get(ExifTags.Base.Orientation)
        return found if found in _TURNS else 1
    except Exception:  # noqa: BLE001 (Pillow raises a dozen kinds on damage)
        # The pixels are fine, only the metadata is not; viewers show such a photo as it is stored.
        return 1


def upright(image: Image.Image) -> Image.Image:
    """An image as its EXIF orientation means it to be seen; the image itself where that is how it is stored."""
    turn = _turn(image)
    return image if turn is None else image.transpose(turn)


def _turn(image: Image.Image) -> Image.Transpose | None:
    """What brings an image upright, by its EXIF orientation; None: nothing."""
    return _TURNS.get(orientation(image))


def _from_sixteen(image: Image.Image, turned: Image.Image, notes: list[str]) -> U8:
    """Grey in two bytes as uint8 [H, W, 3]; ``image`` is what was opened, and says how its values are meant."""
    tags: Any = getattr(image, "tag_v2", {})  # of a TIFF
    bits = tags.get(258, (16,))
    bits = bits[0] if isinstance(bits, tuple) else bits
    values = np.asarray(turned, dtype=np.uint32)
    transparent = image.info.get("transparency")  # of a PNG: the one value that is
    grey = (values >> max(0, bits - 8)).astype(np.uint8)
    if tags.get(262) == 0:  # white is zero; Pillow minds that in 8 bits only
        grey = 255 - grey
    notes.append(f"{bits}-bit grey, scaled to 8 bits")
    if isinstance(transparent, int) and (values == transparent).any():
        grey = np.where(values == transparent, np.uint8(255), grey)
        notes.append("transparency laid over white")
    return np.repeat(grey[..., None], 3, axis=2)


def _to_rgb(image: Image.Image, name: str, notes: list[str]) -> Image.Image:
    """A decoded image in RGB, which may be itself; what was decided is added to ``notes``."""
    if image.mode in ("I", "F"):
        raise UnsupportedImage(
            f"{name}: 32-bit pixels (mode {image.mode}) have no agreed range; save it as 8- or 16-bit first"
        )
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        if rgba.getchannel("A").getextrema() != (255, 255):
            notes.append("transparency laid over white")
            image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return image if image.mode == "RGB" else image.convert("RGB")  # which would copy it


def _of_array(array: npt.NDArray[Any], max_pixels: int) -> OpenPhoto:
    if array.dtype != np.uint8:
        raise UnsupportedImage(f"array of {array.dtype}; uint8 with values 0 to 255 is expected")
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (3, 4)) or 0 in array.shape:
        raise UnsupportedImage(f"array of shape {array.shape}; [H, W], [H, W, 3] or [H, W, 4] is expected")
    _check_pixels(array.shape[1], array.shape[0], "array", max_pixels)
    if array.ndim == 3 and array.shape[2] == 4:
        return _of_image(Image.fromarray(np.ascontiguousarray(array)), "array", max_pixels)
    pixels = array.shape[0] * array.shape[1]

    def decode() -> Photo:
        return Photo(np.repeat(array[..., None], 3, axis=2) if array.ndim == 2 else np.array(array, order="C"))

    return OpenPhoto(pixels, (_DECODED + _RESULT) * pixels, decode)
