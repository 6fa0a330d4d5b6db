"""Writes results: one picture per photo in folders like the photos', one COCO file for all, or standard output."""

from __future__ import annotations

import errno
import functools
import io
import json
import os
import zlib
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final, Protocol, TypeAlias

from PIL import Image, ImageColor

from petseg_runtime import images
from petseg_runtime.errors import InputError, OutputError, UsageError
from petseg_runtime.files import real_paths, replacing, write_all
from petseg_runtime.result import Segmentation, fitted
from petseg_runtime.signals import held
from petseg_runtime.sources import Item

__all__ = [
    "KINDS",
    "VIDEO_FORMATS",
    "Background",
    "CocoSink",
    "ImageSink",
    "Kind",
    "Picture",
    "Sink",
    "StreamSink",
    "Written",
    "background_of",
    "check_looks",
    "picture",
    "probe",
    "render_of",
]

#: A new background: an RGB colour, or a picture with its ICC profile.
Background: TypeAlias = tuple[int, int, int] | Image.Image


@dataclass(frozen=True, kw_only=True)
class Kind:
    """One kind of result.

    Attributes:
        formats: The file formats that it can be written in, the default first; empty: it is not a picture.
        needs_photo: Whether it shows the photo's pixels; if not, photos may be decoded at a reduced size.
        spare: Bytes per pixel of the photo that rendering it takes beside the mask and the picture, as measured.
    """

    formats: tuple[str, ...] = ()
    needs_photo: bool = False
    spare: int = 0


#: The choices of ``--as``.
KINDS: Final = {
    "mask": Kind(formats=("png", "webp")),
    "probability": Kind(formats=("png", "webp")),
    "cutout": Kind(formats=("png", "webp"), needs_photo=True),
    "overlay": Kind(formats=("jpg", "png", "webp"), needs_photo=True),
    "background": Kind(formats=("jpg", "png", "webp"), needs_photo=True, spare=4),  # the fitted background
    "coco-polygons": Kind(spare=30),  # 28 bytes per pixel of the pet's box, at 12 megapixels
    "coco-rle": Kind(),
}

#: The formats of each kind of result of a video, the default first. (Not in the video sinks, since these load FFmpeg.)
VIDEO_FORMATS: Final = {
    "mask": ("mp4", "png", "raw"),
    "probability": ("mp4", "png", "raw"),
    "overlay": ("mp4", "png", "jpg", "raw"),
    "background": ("mp4", "png", "jpg", "raw"),
    "cutout": ("webm", "png", "webp", "raw"),
    "lines": ("ndjson",),
}

#: Pillow's options for each format. PNG at level 1 takes a third of the time of level 6, and files are a few per cent
#: larger.
_OPTIONS: Final[dict[str, dict[str, Any]]] = {
    "png": {"format": "PNG", "compress_level": 1, "compress_type": zlib.Z_RLE},
    "jpg": {"format": "JPEG", "quality": 92},
    "webp": {"format": "WEBP", "quality": 90, "method": 2},
}

#: Errors after which no other result could be written either: the run stops instead of failing a thousand times.
_FATAL: Final = {errno.ENOSPC, errno.EDQUOT, errno.EROFS}


@dataclass(frozen=True)
class Written:
    """What a sink has written of a result.

    Attributes:
        path: The file with this result alone, if there is one.
        value: Its entry for the file with all results, if there is one; JSON values.
    """

    path: Path | None = None
    value: dict[str, Any] | None = None


class Sink(Protocol):
    """Writes results; called from several threads. Unless it says otherwise, results have no file, and share none."""

    def path_of(self, item: Item) -> Path | None:
        """The file that an item's result is written to; None if it has none of its own."""
        return None

    def beside_sources(self, item: Item | None) -> Path | None:
        """The file of an item's result, or of all results for None, if it lies beside the run's sources; else None.

        There, only the journal tells it from a file of the user, so it must be noted before it is written.
        """
        return None

    def write(self, item: Item, result: Segmentation) -> Written:
        """Write an item's result.

        Raises:
            InputError: This result cannot be written.
            OutputError: No further result can be written.
        """

    def leave_out(self, result: Segmentation) -> dict[str, Any] | None:
        """The entry of a photo without a pet in the file with all results; None if there is no such file."""
        return None

    def finish(self, values: Iterable[tuple[Item, Mapping[str, Any]]]) -> Path | None:
        """Write the file with all results, if there is one, from all values in order; returns its path.

        Implementations may iterate over the values several times, but must not keep them: those of a hundred thousand
        photos take gigabytes.
        """
        return None


@dataclass(frozen=True)
class Picture:
    """Renders results as pictures, and encodes them.

    Attributes:
        kind: A key of :data:`KINDS`.
        format: One of its formats.
        render: Makes the picture.
    """

    kind: str
    format: str
    render: Callable[[Segmentation], Image.Image]

    def save(self, result: Segmentation, file: BinaryIO | Path) -> None:
        """Render a result and write it to a file or path; raises what :meth:`encode` does."""
        self.encode(self.render(result), file)

    def encode(self, picture: Image.Image, file: BinaryIO | Path) -> None:
        """Write a rendered picture to a file or path.

        Raises:
            OSError: It cannot be written, or is too large for the format.
            ValueError: It is too large for the format; which of the two is raised depends on the format.
        """
        # Masks and probabilities are data: WebP must not smooth them.
        options = dict(_OPTIONS[self.format])
        if self.format == "webp" and not KINDS[self.kind].needs_photo:
            options["lossless"] = True
        picture.save(file, icc_profile=picture.info.get("icc_profile"), **options)  # only PNG takes it from the picture


def picture(kind: str, format: str | None = None, background: Background | None = None) -> Picture:  # noqa: A002
    """The :class:`Picture` for ``--as``, ``--format`` and ``--background``.

    Args:
        kind: A key of :data:`KINDS` that is a picture.
        format: One of its formats; None: the default.
        background: For the kind ``background``; see :func:`background_of`.

    Raises:
        UsageError: They do not fit together.
    """
    check_looks(kind, format, background)
    return Picture(kind, format or KINDS[kind].formats[0], render_of(kind, background))


def render_of(kind: str, background: Background | None = None) -> Callable[[Segmentation], Image.Image]:
    """The function that renders a kind of result as a picture; see :func:`picture`."""
    renders: dict[str, Callable[[Segmentation], Image.Image]] = {
        "mask": Segmentation.mask_image,
        "probability": Segmentation.probability_image,
        "cutout": Segmentation.cutout,
        "overlay": Segmentation.overlay,
    }
    if background is not None:
        renders["background"] = _renderer_on(background)
    return renders[kind]


#: A fitted background is cached for photos up to this many pixels: four of them take 48 MB.
_CACHED_PIXELS: Final = 4_000_000


def _renderer_on(background: Background) -> Callable[[Segmentation], Image.Image]:
    if isinstance(background, tuple):
        return lambda result: result.on_background(background)
    # Fitting a picture of 12 megapixels takes longer than all other work on a small photo. Photos in one folder mostly
    # have few sizes: those of two cameras or phones, each in portrait and landscape. For large ones it matters little.
    cached = functools.lru_cache(4)(functools.partial(fitted, background))

    def render(result: Segmentation) -> Image.Image:
        height, width = result.probability.shape
        fit = cached if height * width <= _CACHED_PIXELS else functools.partial(fitted, background)
        return result.before(fit((width, height), result.icc_profile))

    return render


def check_looks(kind: str, format: str | None = None, background: object = None) -> None:  # noqa: A002
    """Check that a kind of result, its format and its background fit together; see :func:`picture`.

    Raises:
        UsageError: They do not; the message says what would.
    """
    formats = KINDS[kind].formats
    if format is not None and format not in formats:
        raise UsageError(f"a {kind} cannot be written as {format}; available: {', '.join(formats) or 'JSON only'}")
    if (kind == "background") != (background is not None):
        raise UsageError("--background COLOUR or FILE and --as background belong together")


def background_of(text: str) -> Background:
    """The background that ``--background`` names: a colour (``white``, ``#00ff00``), or the file of a picture.

    Raises:
        InputError: It is neither, or the picture cannot be read.
    """
    try:
        red, green, blue, *alpha = ImageColor.getrgb(text)
        bytes((red, green, blue))  # raises ValueError for rgb(300, 0, 0), which Pillow accepts
    except ValueError:
        pass
    else:
        if alpha and alpha != [255]:
            raise InputError(f"background {text!r}: a colour must be opaque; for no background use `--as cutout`")
        return red, green, blue
    if not os.path.exists(text):  # noqa: PTH110 - Path.exists raises if the text is too long for a name
        raise InputError(f"background {text!r}: neither a colour (white, #00ff00) nor a file")
    photo = images.read(text)
    return images.with_profile(Image.fromarray(photo.pixels), photo.icc_profile)


class ImageSink(Sink):
    """Writes one picture per photo below a folder, each atomically."""

    def __init__(
        self,
        output: Path,
        picture: Picture,
        items: Sequence[Item],
        *,
        beside: Sequence[Item] = (),
        own: Container[Path] = (),
    ) -> None:
        """Create the folder, and check that it can be written to and that no photo would be overwritten.

        Results of an earlier run are replaced, except beside the photos, where a file of that name may be the user's.

        Args:
            output: The folder.
            picture: Renders and encodes the results.
            items: The photos whose results will be written.
            beside: The run's other sources (videos), which must not be overwritten either.
            own: Existing files that petseg has written, which a resumed run may replace.

        Raises:
            OutputError: The folder cannot be written to, or a result would replace a photo or a file beside one.
        """
        self._output, self._picture = output, picture
        real = real_paths()
        photos = {real(item.source) for item in (*items, *beside)}
        results = [self.path_of(item) for item in items]
        for item, path in zip(items, results, strict=True):
            if real(path) in photos:
                raise OutputError(f"{path}: the result of {item.source} would replace a photo; choose another --output")
        self._beside = _Beside(photos)
        self._beside.check(results, own)
        probe(output)

    def path_of(self, item: Item) -> Path:
        """The file that an item's result is written to."""
        name = self._output / item.name
        return name.with_name(f"{name.name}.{self._picture.format}")

    def beside_sources(self, item: Item | None) -> Path | None:
        """The file of an item's result if it lies beside the run's sources; see :class:`Sink`."""
        path = self.path_of(item) if item else None
        return path if path and self._beside.has(path) else None

    def write(self, item: Item, result: Segmentation) -> Written:
        """Write an item's result; see :class:`Sink`."""
        path = self.path_of(item)
        try:
            with replacing(path) as temporary:
                self._picture.save(result, temporary)
        except (OSError, ValueError) as error:  # ValueError: too large for the format
            reason = getattr(error, "strerror", None) or str(error)
            if getattr(error, "errno", None) in _FATAL:
                raise OutputError(f"{path}: cannot be written ({reason})") from error
            raise InputError(f"{item.source}: its result {path} cannot be written ({reason})") from error
        return Written(path)


class CocoSink(Sink):
    """Writes ``annotations.json`` in COCO's format: one category, and one annotation for each photo with a pet."""

    def __init__(self, output: Path, kind: str, items: Sequence[Item], *, own: Container[Path] = ()) -> None:
        """Create the folder. A file of an earlier run is replaced, except beside the photos: see :class:`ImageSink`.

        Args:
            output: The folder.
            kind: ``coco-polygons`` (RLE for pets with holes, which polygons cannot express), or ``coco-rle``, exact.
            items: The photos whose results will be written, and the run's other sources.
            own: Existing files that petseg has written, which a resumed run may replace.

        Raises:
            OutputError: The folder cannot be written to, or a file beside the photos would be replaced.
        """
        self._path, self._rle = output / "annotations.json", kind == "coco-rle"
        self._beside = _Beside(map(real_paths(), (item.source for item in items)))
        self._beside.check([self._path], own)
        probe(output)

    def beside_sources(self, item: Item | None) -> Path | None:
        """The file of all results if it lies beside the run's sources; see :class:`Sink`."""
        return self._path if item is None and self._beside.has(self._path) else None

    def write(self, item: Item, result: Segmentation) -> Written:
        """Compute the entry of an item in the file with all results; see :class:`Sink`."""
        annotation = None if result.box is None else result.coco(exact=self._rle)
        return Written(value=self.leave_out(result) | {"annotation": annotation})

    def leave_out(self, result: Segmentation) -> dict[str, Any]:
        """The entry of a photo without an annotation."""
        height, width = result.probability.shape
        return {"height": height, "width": width, "annotation": None}

    def finish(self, values: Iterable[tuple[Item, Mapping[str, Any]]]) -> Path:
        """Write the file.

        Raises:
            OutputError: It cannot be written.
        """
        path = self._path
        try:
            with replacing(path) as temporary, temporary.open("x", encoding="ascii") as file:
                file.writelines(_coco(values))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise OutputError(f"{path}: cannot be written ({error.strerror or error})") from error
        return path


def _coco(values: Iterable[tuple[Item, Mapping[str, Any]]]) -> Iterator[str]:
    """The COCO file in pieces; iterates over the values twice."""
    yield '{"images": ['
    for number, (item, value) in enumerate(values, start=1):
        size = {"height": value["height"], "width": value["width"]}
        yield ", " * (number > 1) + json.dumps({"id": number, "file_name": str(item.source), **size})
    yield '], "annotations": ['
    annotated = ((number, value["annotation"]) for number, (_, value) in enumerate(values, start=1))
    with_a_pet = ((number, annotation) for number, annotation in annotated if annotation)
    for id_, (number, annotation) in enumerate(with_a_pet, start=1):
        yield ", " * (id_ > 1) + json.dumps({"id": id_, "image_id": number, "category_id": 1, **annotation})
    category = {"id": 1, "name": "pet", "supercategory": "animal"}
    yield f'], "categories": {json.dumps([category])}}}\n'


class StreamSink(Sink):
    """Writes one picture to a stream, for pipes."""

    def __init__(self, stream: BinaryIO, picture: Picture) -> None:
        """Create the sink.

        Args:
            stream: A binary stream open for writing.
            picture: Renders and encodes the results.
        """
        self._stream, self._picture = stream, picture

    def write(self, item: Item, result: Segmentation) -> Written:
        """Write the result in one piece; see :class:`Sink`."""
        encoded = io.BytesIO()
        try:
            self._picture.save(result, encoded)
        except (OSError, ValueError) as error:
            raise InputError(f"{item.source}: its result cannot be written ({error})") from error
        try:
            write_all(self._stream, encoded.getvalue())
        except BrokenPipeError:
            raise  # the reader has closed the pipe, which is not an error
        except OSError as error:
            raise OutputError(f"standard output cannot be written to ({error.strerror or error})") from error
        return Written()


class _Beside:
    """The folders with a run's sources, where existing files may be the user's."""

    def __init__(self, sources: Iterable[str]) -> None:
        """Take the folders of the sources, given by their real paths."""
        self._folders = {os.path.dirname(source) for source in sources}  # noqa: PTH120 (a string, one of a million)
        self._real = functools.cache(os.path.realpath)

    def has(self, path: Path) -> bool:
        """Whether a path is in one of them."""
        return self._real(os.path.dirname(path)) in self._folders  # noqa: PTH120

    def check(self, results: Iterable[Path], own: Container[Path]) -> None:
        """Reject results that would replace existing files there that are not petseg's own.

        Raises:
            OutputError: One would.
        """
        for path in results:
            if self.has(path) and os.path.lexists(path) and path not in own:
                raise OutputError(f"{path}: already exists, beside the photos; move it, or choose another --output")


def probe(output: Path) -> None:
    """Create a folder if it is missing, and check that it can be written to.

    Raises:
        OutputError: It cannot.
    """
    try:
        with held():  # else a signal might leave the file
            with replacing(output / ".petseg-probe") as temporary:
                temporary.touch()
            (output / ".petseg-probe").unlink(missing_ok=True)  # another run may be doing the same
    except OSError as error:
        raise OutputError(f"{output}: cannot be written to ({error.strerror}); choose another --output") from error
