"""Where results go: one picture per photo in folders like the photos' own, one COCO file for all, standard output."""

from __future__ import annotations

import errno
import functools
import io
import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final, Protocol, TypeAlias

from PIL import Image, ImageColor

from petseg_runtime import images
from petseg_runtime.errors import InputError, OutputError, UsageError
from petseg_runtime.files import real_paths, replacing
from petseg_runtime.result import Segmentation, fitted
from petseg_runtime.sources import Item

__all__ = [
    "KINDS",
    "VIDEO_FORMATS",
    "Background",
    "CocoSink",
    "ImageSink",
    "Kind",
    "OnlyFound",
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

#: What is put behind the pet: a colour, or a picture with its profile.
Background: TypeAlias = tuple[int, int, int] | Image.Image


@dataclass(frozen=True, kw_only=True)
class Kind:
    """One form of result.

    Attributes:
        formats: What it can be written as, the usual one first; none: not a picture.
        needs_photo: Whether the photo itself is in it; where not, photos may be decoded at a reduced size.
        spare: Bytes for each pixel of the photo that making it takes, beside the mask and the picture; as measured.
    """

    formats: tuple[str, ...] = ()
    needs_photo: bool = False
    spare: int = 0


#: What ``--as`` offers.
KINDS: Final = {
    "mask": Kind(formats=("png", "webp")),
    "probability": Kind(formats=("png", "webp")),
    "cutout": Kind(formats=("png", "webp"), needs_photo=True),
    "overlay": Kind(formats=("jpg", "png", "webp"), needs_photo=True),
    "background": Kind(formats=("jpg", "png", "webp"), needs_photo=True, spare=4),  # what is kept to stand behind it
    "coco-polygons": Kind(spare=30),  # 28 bytes a pixel of the pet's box, at 12 megapixels
    "coco-rle": Kind(),
}

#: What each kind of result of a video can be written as, the usual one first. (Here: its sinks load FFmpeg.)
VIDEO_FORMATS: Final = {
    "mask": ("mp4", "png", "raw"),
    "probability": ("mp4", "png", "raw"),
    "overlay": ("mp4", "png", "jpg", "raw"),
    "background": ("mp4", "png", "jpg", "raw"),
    "cutout": ("webm", "png", "webp", "raw"),
    "lines": ("ndjson",),
}

#: How each format is written. PNG at level 1 takes a third of the time of level 6, for files a few per cent larger.
_OPTIONS: Final[dict[str, dict[str, Any]]] = {
    "png": {"format": "PNG", "compress_level": 1, "compress_type": zlib.Z_RLE},
    "jpg": {"format": "JPEG", "quality": 92},
    "webp": {"format": "WEBP", "quality": 90, "method": 2},
}

#: No later photo could be written either: the run stops instead of failing a thousand times.
_HOPELESS: Final = {errno.ENOSPC, errno.EDQUOT, errno.EROFS}


@dataclass(frozen=True)
class Written:
    """What a sink made of a result: a file of its own, or a value that goes into a file for all (JSON values).

    ``left_out``: neither, because there is no pet; see :class:`OnlyFound`.
    """

    path: Path | None = None
    value: dict[str, Any] | None = None
    left_out: bool = False


class Sink(Protocol):
    """Takes results, from several threads."""

    def path_of(self, item: Item) -> Path | None:
        """Where an item's result goes; None if it is part of a file for all."""

    def write(self, item: Item, result: Segmentation) -> Written:
        """Write an item's result.

        Raises:
            InputError: This one cannot be written.
            OutputError: Nothing more can be written.
        """

    def leave_out(self, result: Segmentation) -> dict[str, Any] | None:
        """What the file for all results says of a photo without a pet; None: there is no such file."""

    def finish(self, values: Iterable[tuple[Item, Mapping[str, Any]]]) -> Path | None:
        """Write the one file for all results, if there is one, from all values in order; returns its path.

        They may be gone through more than once, and are not kept: of a hundred thousand photos they take gigabytes.
        """


@dataclass(frozen=True)
class OnlyFound:
    """A sink that writes nothing of photos in which no pet is found; the others go to the sink behind it.

    What an earlier run wrote of such a photo stays: it is not this run's to remove.

    Attributes:
        sink: Where results with a pet go.
    """

    sink: Sink

    def path_of(self, item: Item) -> Path | None:
        """Where an item's result goes, if it has a pet."""
        return self.sink.path_of(item)

    def write(self, item: Item, result: Segmentation) -> Written:
        """Write an item's result, if it has a pet; see :class:`Sink`."""
        if result.found:
            return self.sink.write(item, result)
        return Written(value=self.leave_out(result), left_out=True)

    def leave_out(self, result: Segmentation) -> dict[str, Any] | None:
        """See :class:`Sink`."""
        return self.sink.leave_out(result)

    def finish(self, values: Iterable[tuple[Item, Mapping[str, Any]]]) -> Path | None:
        """See :class:`Sink`."""
        return self.sink.finish(values)


@dataclass(frozen=True)
class Picture:
    """How results become pictures.

    Attributes:
        kind: A name in :data:`KINDS`.
        format: One of its formats.
        render: Makes the picture.
    """

    kind: str
    format: str
    render: Callable[[Segmentation], Image.Image]

    def save(self, result: Segmentation, file: BinaryIO | Path) -> None:
        """Write one result, to a file or a path."""
        self.encode(self.render(result), file)

    def encode(self, picture: Image.Image, file: BinaryIO | Path) -> None:
        """Write what :attr:`render` has made, to a file or a path.

        Raises:
            OSError: It cannot be written, or the format does not take a picture of that size.
            ValueError: As the latter; which of both it is differs between formats.
        """
        # Masks and probabilities are data: WebP must not smooth them.
        options = dict(_OPTIONS[self.format])
        if self.format == "webp" and not KINDS[self.kind].needs_photo:
            options["lossless"] = True
        picture.save(file, icc_profile=picture.info.get("icc_profile"), **options)  # only PNG takes it from the picture


def picture(kind: str, format: str | None = None, background: Background | None = None) -> Picture:  # noqa: A002
    """What ``--as``, ``--format`` and ``--background`` ask for.

    Args:
        kind: A name in :data:`KINDS` that is a picture.
        format: One of its formats; None: the usual one.
        background: For the kind ``background``; see :func:`background_of`.

    Raises:
        UsageError: They do not fit together.
    """
    check_looks(kind, format, background)
    return Picture(kind, format or KINDS[kind].formats[0], render_of(kind, background))


def render_of(kind: str, background: Background | None = None) -> Callable[[Segmentation], Image.Image]:
    """What makes a kind's pictures; see :func:`picture`."""
    renders: dict[str, Callable[[Segmentation], Image.Image]] = {
        "mask": Segmentation.mask_image,
        "probability": Segmentation.probability_image,
        "cutout": Segmentation.cutout,
        "overlay": Segmentation.overlay,
    }
    if background is not None:
        renders["background"] = _before(background)
    return renders[kind]


#: Pixels of a photo up to which a background that was made to fit it is kept for the next: four of them are 48 MB.
_KEPT: Final = 4_000_000


def _before(background: Background) -> Callable[[Segmentation], Image.Image]:
    if isinstance(background, tuple):
        return lambda result: result.on_background(background)
    # To fit a picture of 12 megapixels takes longer than all else that is done to a small photo. The photos of most
    # folders are of few sizes: two cameras' or phones', each upright and on its side. Of large ones it is a small part.
    once = functools.lru_cache(4)(functools.partial(fitted, background))

    def render(result: Segmentation) -> Image.Image:
        height, width = result.probability.shape
        fit = once if height * width <= _KEPT else functools.partial(fitted, background)
        return result.before(fit((width, height), result.icc_profile))

    return render


def check_looks(kind: str, format: str | None = None, background: object = None) -> None:  # noqa: A002
    """Refuse what does not fit together, of any kind; see :func:`picture`.

    Raises:
        UsageError: It does not; says what would.
    """
    formats = KINDS[kind].formats
    if format is not None and format not in formats:
        raise UsageError(f"a {kind} is not written as {format}; it can be: {', '.join(formats) or 'JSON only'}")
    if (kind == "background") != (background is not None):
        raise UsageError("--background COLOUR or FILE and --as background belong together")


def background_of(text: str) -> Background:
    """What ``--background`` names: a colour (``white``, ``#00ff00``), or a picture's file.

    Raises:
        InputError: Neither.
    """
    try:
        red, green, blue, *alpha = ImageColor.getrgb(text)
        bytes((red, green, blue))  # Pillow takes rgb(300, 0, 0), too
    except ValueError:
        pass
    else:
        if alpha and alpha != [255]:
            raise InputError(f"background {text!r}: a colour without transparency is expected; `--as cutout` has none")
        return red, green, blue
    if not os.path.exists(text):  # noqa: PTH110 - of a text too long for a name, Path.exists raises
        raise InputError(f"background {text!r}: neither a colour (white, #00ff00) nor a file")
    photo = images.read(text)
    return images.with_profile(Image.fromarray(photo.pixels), photo.icc_profile)


class ImageSink:
    """Writes one picture per photo below a folder; each is whole or not there."""

    def __init__(
        self,
        output: Path,
        picture: Picture,
        items: Sequence[Item],
        *,
        beside: Sequence[Item] = (),
        resume: bool = False,
    ) -> None:
        """Make the folder, and make sure that it can be written to and that no photo would be overwritten.

        An earlier run's results are replaced, except beside the photos: there a file of that name may be somebody's.

        Args:
            output: The folder.
            picture: What to write.
            items: What will be written.
            beside: The run's other sources, as safe as the photos.
            resume: What lies there is this run's own.

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
        if not resume:
            _refuse_beside(photos, results)
        probe(output)

    def path_of(self, item: Item) -> Path:
        """Where an item's result goes."""
        name = self._output / item.name
        return name.with_name(f"{name.name}.{self._picture.format}")

    def write(self, item: Item, result: Segmentation) -> Written:
        """Write an item's result; see :class:`Sink`."""
        path = self.path_of(item)
        try:
            with replacing(path) as beside:
                self._picture.save(result, beside)
        except (OSError, ValueError) as error:  # ValueError: Pillow, of a picture that is too large for its format
            reason = getattr(error, "strerror", None) or str(error)
            if getattr(error, "errno", None) in _HOPELESS:
                raise OutputError(f"{path}: cannot be written ({reason})") from error
            raise InputError(f"{item.source}: its result {path} cannot be written ({reason})") from error
        return Written(path)

    def leave_out(self, result: Segmentation) -> None:
        """There is no file for all results."""

    def finish(self, values: Iterable[tuple[Item, Mapping[str, Any]]]) -> None:
        """Nothing is left to write."""


class CocoSink:
    """Writes ``annotations.json`` in COCO's format: one category, and one annotation for each photo with a pet."""

    def __init__(self, output: Path, kind: str, items: Sequence[Item], *, resume: bool = False) -> None:
        """Make the folder. A file of an earlier run is replaced, except beside the photos: see :class:`ImageSink`.

        Args:
            output: The folder.
            kind: ``coco-polygons`` (pets with holes, which polygons cannot have, in RLE), or ``coco-rle``, exact.
            items: What will be written, and the run's other sources.
            resume: What lies there is this run's own.

        Raises:
            OutputError: The folder cannot be written to, or a file beside the photos would be replaced.
        """
        self._path, self._rle = output / "annotations.json", kind == "coco-rle"
        if not resume:
            _refuse_beside(set(map(real_paths(), (item.source for item in items))), [self._path])
        probe(output)

    def path_of(self, item: Item) -> None:
        """No item has a file of its own."""

    def write(self, item: Item, result: Segmentation) -> Written:
        """Measure an item's result; see :class:`Sink`."""
        annotation = None if result.box is None else result.coco(exact=self._rle)
        return Written(value=self.leave_out(result) | {"annotation": annotation})

    def leave_out(self, result: Segmentation) -> dict[str, Any]:
        """A photo that was looked at, and has no annotation."""
        height, width = result.probability.shape
        return {"height": height, "width": width, "annotation": None}

    def finish(self, values: Iterable[tuple[Item, Mapping[str, Any]]]) -> Path:
        """Write the file.

        Raises:
            OutputError: It cannot be written.
        """
        path = self._path
        try:
            with replacing(path) as beside, beside.open("x", encoding="ascii") as file:
                file.writelines(_coco(values))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise OutputError(f"{path}: cannot be written ({error.strerror or error})") from error
        return path


def _coco(values: Iterable[tuple[Item, Mapping[str, Any]]]) -> Iterator[str]:
    """COCO's file, piece by piece; the values are gone through twice."""
    yield '{"images": ['
    for number, (item, value) in enumerate(values, start=1):
        size = {"height": value["height"], "width": value["width"]}
        yield ", " * (number > 1) + json.dumps({"id": number, "file_name": str(item.source), **size})
    yield '], "annotations": ['
    annotated = ((number, value["annotation"]) for number, (_, value) in enumerate(values, start=1))
    with_a_pet = ((number, annotation) for number, annotation in annotated if annotation)
    for own, (number, annotation) in enumerate(with_a_pet, start=1):
        yield ", " * (own > 1) + json.dumps({"id": own, "image_id": number, "category_id": 1, **annotation})
    category = {"id": 1, "name": "pet", "supercategory": "animal"}
    yield f'], "categories": {json.dumps([category])}}}\n'


class StreamSink:
    """Writes one picture to a stream, for pipes."""

    def __init__(self, stream: BinaryIO, picture: Picture) -> None:
        """Take the stream.

        Args:
            stream: Open for writing bytes.
            picture: What to write.
        """
        self._stream, self._picture = stream, picture

    def path_of(self, item: Item) -> None:
        """No item has a file of its own."""

    def write(self, item: Item, result: Segmentation) -> Written:
        """Write the result, in one piece; see :class:`Sink`."""
        encoded = io.BytesIO()
        try:
            self._picture.save(result, encoded)
        except (OSError, ValueError) as error:
            raise InputError(f"{item.source}: its result cannot be written ({error})") from error
        try:
            self._stream.write(encoded.getvalue())
            self._stream.flush()
        except BrokenPipeError:
            raise  # the reader has gone away, which is no error
        except OSError as error:
            raise OutputError(f"standard output cannot be written to ({error.strerror or error})") from error
        return Written()

    def leave_out(self, result: Segmentation) -> None:
        """There is no file for all results."""

    def finish(self, values: Iterable[tuple[Item, Mapping[str, Any]]]) -> None:
        """Nothing is left to write."""


def _refuse_beside(photos: Set[str], results: Iterable[Path]) -> None:
    """Refuse results that would replace what lies beside the photos, which may be somebody's.

    Raises:
        OutputError: One would.
    """
    folders = {os.path.dirname(photo) for photo in photos}  # noqa: PTH120 (a text, one of a million)
    real = functools.cache(os.path.realpath)
    for path in results:
        if real(os.path.dirname(path)) in folders and os.path.lexists(path):  # noqa: PTH120
            raise OutputError(f"{path}: there already, beside the photos; move it, or choose another --output")


def probe(output: Path) -> None:
    """Make a folder, and see that it can be written to.

    Raises:
        OutputError: It cannot.
    """
    try:
        with replacing(output / ".petseg-probe") as beside:
            beside.touch()
        (output / ".petseg-probe").unlink(missing_ok=True)  # another run may just do the same
    except OSError as error:
        raise OutputError(f"{output}: cannot be written to ({error.strerror}); choose another --output") from error
