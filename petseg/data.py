"""Photos and masks: the Oxford-IIIT Pet layout, or your own folder.

Only :func:`download` imports torch: it fetches the data set with torchvision.
"""

from __future__ import annotations

import base64
import contextlib
import errno
import functools
import hashlib
import http.client
import random
import shutil
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Final, TypeAlias, TypeVar
from urllib.error import URLError

import numpy as np
import numpy.typing as npt
from PIL import Image

from petseg.masks import LOSSY, black_and_white
from petseg.metrics import BORDER, PET
from petseg_runtime import images
from petseg_runtime.errors import DataError, InputError, OutputError
from petseg_runtime.host import available_memory, usable_cpus
from petseg_runtime.memory_budget import MemoryBudget, Reservation
from petseg_runtime.sources import IMAGE_SUFFIXES

__all__ = [
    "KEY_LENGTH",
    "SPLIT_SEED",
    "TEST_LISTING",
    "VAL_FRACTION",
    "VAL_LISTING",
    "CheckReport",
    "Layout",
    "Pair",
    "Split",
    "check",
    "download",
    "each_read",
    "encoded",
    "find",
    "find_listed",
    "find_unused",
    "listed_validation",
    "mask_digest",
    "names_sha256",
    "photo_key",
    "read_pair",
    "read_trimap",
    "resize_trimap",
    "usable",
    "validation_names",
]

T = TypeVar("T")
U8: TypeAlias = npt.NDArray[np.uint8]
#: Called before an image is decoded, with the bytes that decoding will take; may block.
Take: TypeAlias = Callable[[int], None]

#: In the folder layout: the listings of the test photos and of the validation photos.
TEST_LISTING: Final = "test.txt"
VAL_LISTING: Final = "val.txt"

#: Defaults for the share of trainval that is validation, and for the seed that decides which photos.
VAL_FRACTION: Final = 0.05
SPLIT_SEED: Final = 0

#: Errors of the disk, not of the network.
LOCAL: Final = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST)

#: Characters of a photo's key; a checkpoint and the files exported from it keep one key for each training photo.
KEY_LENGTH: Final = 6
#: Bytes from the middle of a photo's file that enter its key.
KEY_BYTES: Final = 4096

#: Most threads that decode photos; disk and memory are no faster with more.
MAX_READERS = 16

#: Bytes per pixel that reading a mask takes: a mask in colour, with Pillow's copies and the analysis of its values.
MASK_DECODED: Final = 12


class Split(StrEnum):
    """The splits: trainval is train and val together; test is for reporting only."""

    TRAIN = "train"
    VAL = "val"
    TRAINVAL = "trainval"
    TEST = "test"


class Layout(StrEnum):
    """How a data folder is arranged.

    ``OXFORD``: ``images/NAME.jpg``, ``annotations/trimaps/NAME.png`` (1 pet, 2 background, 3 border) and
    ``annotations/{trainval,test}.txt`` with the name first on each line.

    ``FOLDER``: ``images/`` and ``masks/`` with matching stems; a mask is any image in which black is background and
    white is pet (two-valued 0/1 masks are accepted, too). If there is a ``test.txt``, the stems in it, one per line,
    are the test split; the rest is trainval. If there is a ``val.txt``, the stems in it are the validation part of
    trainval; otherwise a seed chooses that part.
    """

    OXFORD = "oxford"
    FOLDER = "folder"


@dataclass(frozen=True)
class Pair:
    """A photo and its mask."""

    name: str
    image: Path
    mask: Path
    layout: Layout


def locate(root: Path) -> tuple[Path, Layout]:
    """Find the data folder itself and its layout (torchvision downloads into a subfolder ``oxford-iiit-pet``).

    Raises:
        DataError: Neither layout is there, or the folder cannot be read.
    """
    try:
        for folder in (root, root / "oxford-iiit-pet"):
            if (folder / "annotations" / "trimaps").is_dir() and (folder / "images").is_dir():
                return folder, Layout.OXFORD
            if (folder / "masks").is_dir() and (folder / "images").is_dir():
                return folder, Layout.FOLDER
    except OSError as error:
        raise DataError(f"{root}: cannot be looked into ({error.strerror or error})") from error
    raise DataError(
        f"{root}: no data set here. Expected images/ with annotations/trimaps/ (Oxford-IIIT Pet; "
        "`petseg data download` fetches it) or images/ with masks/ (your own)"
    )


def find(root: Path, split: Split, *, val_fraction: float = VAL_FRACTION, seed: int = SPLIT_SEED) -> list[Pair]:
    """Returns the pairs of a split, sorted by name. Files are not opened; see :func:`check`.

    Args:
        root: The data folder.
        split: The split. ``TRAIN`` and ``VAL`` divide trainval.
        val_fraction: Share of trainval that is validation; has no effect if ``val.txt`` lists that part.
        seed: Decides which photos; the same names, fraction and seed give the same parts on every machine.

    Raises:
        DataError: No data set, no photo in that split, or a listing that does not match the photos.
    """
    folder, layout = locate(root)
    pairs = _find(folder, layout, split, val_fraction, seed)
    if not pairs:
        raise DataError(f"{root}: the {split} split has no photos{_remedy(folder, layout, split)}")
    return pairs


def _find(
    folder: Path, layout: Layout, split: Split, val_fraction: float = VAL_FRACTION, seed: int = SPLIT_SEED
) -> list[Pair]:
    """As :func:`find`, for the data folder itself; the result may be empty."""
    listed = Split.TEST if split is Split.TEST else Split.TRAINVAL
    pairs = _oxford(folder, listed) if layout is Layout.OXFORD else _folder(folder, listed)
    if split in (Split.TEST, Split.TRAINVAL):
        return pairs
    held = listed_validation(folder)
    if held is None:
        held = validation_names([pair.name for pair in pairs], val_fraction, seed)
    return [pair for pair in pairs if (pair.name in held) is (split is Split.VAL)]


def _remedy(folder: Path, layout: Layout, split: Split) -> str:
    """Says how to give photos to a split that has none."""
    if split is Split.TEST:
        listing = _listing(folder, split) if layout is Layout.OXFORD else folder / TEST_LISTING
        return f": name some in {listing}, one on each line, without suffix; or use another split (val, trainval)"
    if split in (Split.TRAIN, Split.VAL) and listed_validation(folder) is not None:
        return f": {folder / VAL_LISTING} lists the validation photos, and the rest of trainval is for training"
    if split in (Split.TRAIN, Split.VAL):
        return ": trainval needs at least one photo for training and one for validation"
    return ""


def listed_validation(root: Path) -> set[str] | None:
    """Returns the names in ``val.txt`` of a data set in the folder layout; None if there is no such listing.

    Raises:
        DataError: No data set, or a listing that cannot be read.
    """
    folder, layout = locate(root)
    listing = folder / VAL_LISTING
    return set(_lines(listing)) if layout is Layout.FOLDER and listing.exists() else None


def find_listed(root: Path, splits: Sequence[Split]) -> dict[Split, list[Pair]]:
    """Returns the pairs of several splits that the data set itself defines; splits that it does not have are skipped.

    These are trainval and test, and train and val if ``val.txt`` divides trainval.

    Raises:
        DataError: No data set, none of the splits, or a listing that is there and cannot be read.
    """
    folder, layout = locate(root)
    found: dict[Split, list[Pair]] = {}
    for split in splits:
        if layout is Layout.FOLDER or _listing(folder, split).exists():
            found[split] = _find(folder, layout, split)
    found = {split: pairs for split, pairs in found.items() if pairs}
    if not found:
        raise DataError(f"{root}: no photos are listed for {' or '.join(splits)}")
    return found


def find_unused(root: Path) -> list[Path]:
    """Returns the unused files of a data set in the folder layout: masks without a photo, and files that are no image.

    Raises:
        DataError: No data set.
    """
    folder, layout = locate(root)
    if layout is Layout.OXFORD:  # its listings say which photos belong to it; other files lie beside them
        return []
    photos, masks = _by_stem(folder / "images"), _by_stem(folder / "masks")
    used = {*photos.values(), *(path for stem, path in masks.items() if stem in photos)}
    files = (path for part in ("images", "masks") for path in sorted((folder / part).iterdir()))
    return [path for path in files if path not in used and not path.name.startswith(".")]


def download(folder: Path) -> None:
    """Download the Oxford-IIIT Pet data set with torchvision, which verifies the archives' checksums.

    The data set is unpacked in a temporary folder and moved, so that ``folder/oxford-iiit-pet`` is always complete.
    Archives of an earlier attempt are kept and not downloaded again.

    Raises:
        DataError: The server cannot be reached, its data is not the data set, or an existing data set is incomplete.
        OutputError: The folder cannot be written to.
    """
    from torchvision.datasets import OxfordIIITPet  # takes seconds to import, and nothing else here needs it

    place, beside = folder / "oxford-iiit-pet", folder / ".oxford-iiit-pet.part"
    if place.exists():
        _check_complete(place)
        return
    unpacked = beside / place.name
    try:
        for part in ("images", "annotations"):  # torchvision assumes that an existing folder is complete
            if (unpacked / part).exists():
                shutil.rmtree(unpacked / part)
        OxfordIIITPet(beside, download=True)
        _check_complete(unpacked)
        unpacked.replace(place)
        beside.rmdir()
    except (RuntimeError, http.client.HTTPException, URLError) as error:
        raise DataError(f"{folder}: the data set could not be downloaded ({error}); try again later") from error
    except OSError as error:
        if error.errno in LOCAL:
            raise OutputError(f"{folder}: the data set cannot be written there ({error.strerror})") from error
        raise DataError(f"{folder}: the data set could not be downloaded ({error}); try again later") from error


def _check_complete(folder: Path) -> None:
    """Raises DataError if a photo or mask that is named in the data set's listings is missing."""
    try:
        pairs = [pair for split in (Split.TRAINVAL, Split.TEST) for pair in find(folder, split)]
    except DataError as error:
        raise DataError(
            f"{folder}: not a complete data set; move the folder away, and download again ({error})"
        ) from error
    gone = [path for pair in pairs for path in (pair.image, pair.mask) if not path.exists()]
    if gone:
        raise DataError(
            f"{folder}: {len(gone)} of the data set's files are missing, among them {gone[0].name}; move the folder "
            "away, and download again"
        )


def validation_names(names: Sequence[str], fraction: float, seed: int) -> set[str]:
    """Returns the names of the validation photos: at least one, drawn by seed from the sorted names."""
    ordered = sorted(names)
    return set(random.Random(seed).sample(ordered, min(len(ordered), max(1, round(fraction * len(ordered))))))


def encoded(names: str) -> bytes:
    """Encode file names as UTF-8; bytes that are not valid UTF-8 (surrogate escapes in Python) are escaped."""
    return names.encode(errors="backslashreplace")


def names_sha256(train: Iterable[str], val: Iterable[Pair]) -> str:
    """Returns a digest that is equal if two runs have the same photos."""
    return hashlib.sha256(encoded("\n".join([*train, "--", *(pair.name for pair in val)]))).hexdigest()


def mask_digest(trimap: U8) -> str:
    """Returns eight hex digits that identify a mask by its pixels, whatever its file format."""
    return hashlib.sha256(f"{trimap.shape}".encode() + trimap.tobytes()).hexdigest()[:8]


def photo_key(pair: Pair) -> str | None:
    """Identify a photo, wherever its folder is, by a digest of its name, its file's size and the middle of the file.

    ``KEY_LENGTH`` characters of 6 bits each: between 4000 photos and 4000 others, two have the same key in about one
    run in four thousand. (Many photos share a name like ``001``, and uncompressed files of one camera have one size.)
    None: the file does not exist or cannot be read.
    """
    try:
        size = pair.image.stat().st_size
        if not pair.image.is_file():  # reading a pipe would block
            return None
        with pair.image.open("rb") as file:
            file.seek(max(0, (size - KEY_BYTES) // 2))
            middle = file.read(KEY_BYTES)
    except (OSError, ValueError):  # the latter: a listing of another encoding gave a name with a zero byte
        return None
    digest = hashlib.sha256(encoded(f"{pair.name}/{size}/") + middle).digest()
    return base64.urlsafe_b64encode(digest)[:KEY_LENGTH].decode()


def _listing(folder: Path, split: Split) -> Path:
    return folder / "annotations" / f"{split}.txt"


def _lines(listing: Path) -> list[str]:
    """Returns a listing's lines without blank ones.

    Raises:
        DataError: The listing cannot be read.
    """
    try:
        lines = listing.read_text(encoding="utf-8-sig").splitlines()  # some editors write a byte order mark
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{listing}: cannot be read ({error})") from error
    return [line.strip() for line in lines if line.strip()]


def _oxford(folder: Path, split: Split) -> list[Pair]:
    lines = [line for line in _lines(_listing(folder, split)) if not line.startswith("#")]  # list.txt has comments
    names = sorted({line.split()[0] for line in lines})
    trimaps = folder / "annotations" / "trimaps"
    return [Pair(n, folder / "images" / f"{n}.jpg", trimaps / f"{n}.png", Layout.OXFORD) for n in names]


def _folder(folder: Path, split: Split) -> list[Pair]:
    photos = _by_stem(folder / "images")
    masks = _by_stem(folder / "masks")
    test, val = (_stems(folder / listing, photos) for listing in (TEST_LISTING, VAL_LISTING))
    if both := sorted(test & val):
        raise DataError(
            f"{folder / VAL_LISTING}: {len(both)} of its names are also in {TEST_LISTING}, the first is {both[0]!r}; "
            "remove each from one of the two, because test photos are only for the final figure"
        )
    names = [n for n in sorted(photos) if (n in test) is (split is Split.TEST)]
    # A photo without a mask stays in the list, with the path where its mask should be: `check` reports it.
    return [Pair(n, photos[n], masks.get(n, folder / "masks" / f"{n}.png"), Layout.FOLDER) for n in names]


def _stems(listing: Path, photos: Mapping[str, Path]) -> set[str]:
    """Returns the names in a listing of the folder layout; none if there is no such file.

    Comments are not supported, because a photo may be called ``#1`` and would then be trained on.

    Raises:
        DataError: The listing cannot be read, or has a name without a photo.
    """
    names = set(_lines(listing)) if listing.exists() else set()
    if strange := sorted(names - photos.keys()):  # the photo that a misspelt name means would be trained on
        raise DataError(
            f"{listing}: {len(strange)} lines name no photo in images/, the first is {strange[0]!r}; one name per line "
            "is expected, without suffix, and no comments"
        )
    return names


def _by_stem(folder: Path) -> dict[str, Path]:
    """Returns the images in a folder by stem.

    Raises:
        DataError: Two have the same stem, or the folder cannot be read.
    """
    found: dict[str, Path] = {}
    try:
        paths = sorted(folder.iterdir())
    except OSError as error:
        raise DataError(f"{folder}: cannot be read ({error.strerror or error})") from error
    for path in paths:
        if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith("."):
            if path.stem in found:
                raise DataError(f"{path} and {found[path.stem]} have the same stem; names must be unique")
            found[path.stem] = path
    return found


def _no_wait(size: int) -> None:
    """The default ``take``: never blocks."""


def read_trimap(pair: Pair, take: Take = _no_wait) -> U8:
    """Read a mask as a trimap.

    Args:
        pair: The photo and its mask.
        take: Called before decoding with about the bytes that decoding takes; may block.

    Returns:
        uint8 [H, W] of 1 (pet), 2 (background), 3 (border; only in the Oxford layout); upright, like the photo.

    Raises:
        DataError: The mask is missing, unreadable, too large, or has values that no mask has.
    """
    try:
        with images.opened(pair.mask) as image:
            take(MASK_DECODED * image.width * image.height)
            if pair.layout is Layout.FOLDER:
                return black_and_white(images.upright(image), pair.mask, image.format in LOSSY)
            mask = np.array(images.upright(image))
    except InputError as error:
        raise DataError(f"{error} (a mask; `petseg data check` lists every such file)") from error
    if mask.ndim != 2 or mask.size == 0 or mask.min() < PET or mask.max() > BORDER:
        raise DataError(f"{pair.mask}: not a trimap; one channel with values 1, 2 and 3 is expected")
    return mask.astype(np.uint8)


def read_pair(pair: Pair, take: Take = _no_wait) -> tuple[U8, U8]:
    """Read photo (uint8 [H, W, 3]) and trimap (uint8 [h, w]), each at its original size; their aspect ratios match.

    Args:
        pair: The photo and its mask.
        take: As of :func:`read_trimap`.

    Raises:
        DataError: Either cannot be read, or the mask's aspect ratio differs, so that it is not the photo's mask.
    """
    photo, trimap = _read_photo(pair, take), read_trimap(pair, take)
    (high, wide), (rows, columns) = photo.shape[:2], trimap.shape
    # A mask of a resized copy differs by at most a pixel.
    if abs(high * columns - wide * rows) > max(high, wide, rows, columns):
        raise DataError(f"{pair.mask}: {_sizes(photo, trimap)}: the aspect ratios differ")
    return photo, trimap


def _read_photo(pair: Pair, take: Take) -> U8:
    return _decoded(pair, take).pixels


def _decoded(pair: Pair, take: Take) -> images.Photo:
    try:
        with images.open_photo(pair.image) as photo:
            take(photo.memory)
            return photo.decode()
    except InputError as error:
        raise DataError(f"{error} (`petseg data check` lists every such file)") from error


def usable(
    pairs: Sequence[Pair],
    failed: Callable[[Pair, DataError], None] | None = None,
    processes: int = 1,
    promised: int = 0,
) -> Iterator[tuple[Pair, U8, U8]]:
    """Yields each pair with its photo and trimap (uint8 [H, W, 3] and [H, W]) that can be read and are of equal size.

    They come in the order of ``pairs``, while threads decode the next ones.

    Args:
        pairs: The pairs to read.
        failed: Called with each pair that cannot be used, which is then excluded.
        processes: As of :func:`each_read`.
        promised: Likewise.

    Raises:
        DataError: A pair cannot be used, and ``failed`` was not given.
    """
    for pair, found in each_read(pairs, _read_equal, failed, processes, promised):
        if found:
            yield pair, *found


def each_read(
    pairs: Sequence[Pair],
    read: Callable[[Pair, Take], T],
    failed: Callable[[Pair, DataError], None] | None = None,
    processes: int = 1,
    promised: int = 0,
) -> Generator[tuple[Pair, T | None], None, None]:
    """Yields each pair, in order, with what ``read`` returned for it in a thread; None after ``failed`` was called.

    Args:
        pairs: The pairs to read.
        read: Reads one pair, after reserving the memory for it.
        failed: Called with each pair that cannot be used.
        processes: Number of processes on this machine that read at the same time, including this one.
        promised: Bytes that each of them has allocated but not touched, so that the system still counts them as free.

    Raises:
        DataError: A pair cannot be used, and ``failed`` was not given.
    """
    with contextlib.closing(_read_ahead(pairs, read, processes, promised)) as readings:
        for pair, reading in readings:
            try:
                found = reading.result()
            except DataError as error:
                if failed is None:
                    raise
                failed(pair, error)
                yield pair, None
            else:
                yield pair, found


def _read_ahead(
    pairs: Sequence[Pair], read: Callable[[Pair, Take], T], processes: int, promised: int
) -> Generator[tuple[Pair, Future[T]], None, None]:
    """Yields each pair, in order, with the future of its reading; threads read the next ones.

    The caller has to await a future before asking for the next one. At most two readings per reader run ahead, and
    fewer if they would take more than half of the available memory: a reading that finds too little left waits, unless
    it is the one that the caller is waiting for. The arguments are those of :func:`each_read`.
    """
    readers = min(usable_cpus(), MAX_READERS)
    budget = MemoryBudget(max(0, available_memory() - processes * promised) // (2 * processes))
    ahead: deque[tuple[Pair, Reservation, Future[T]]] = deque()

    def first() -> Iterator[tuple[Pair, Future[T]]]:
        pair, reservation, reading = ahead.popleft()
        budget.expedite(reservation)
        yield pair, reading
        budget.release(reservation)

    with ThreadPoolExecutor(readers) as pool, contextlib.closing(budget):  # closes the budget first: readers may wait
        for pair in pairs:
            reservation = Reservation()
            reading = pool.submit(read, pair, functools.partial(budget.reserve, reservation))
            ahead.append((pair, reservation, reading))
            if len(ahead) > 2 * readers:
                yield from first()
        while ahead:
            yield from first()


def _read_equal(pair: Pair, take: Take) -> tuple[U8, U8]:
    """As :func:`read_pair`, but any difference in size between photo and mask is a DataError."""
    photo, trimap = _read_photo(pair, take), read_trimap(pair, take)
    if photo.shape[:2] != trimap.shape:
        raise DataError(f"{pair.name}: {_sizes(photo, trimap)} (`petseg data check` lists every such pair)")
    return photo, trimap


@dataclass
class CheckReport:
    """The findings of :func:`check`, by kind; each list holds names (or ``name: reason``)."""

    pairs: int = 0
    missing: list[str] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)
    wrong_size: list[str] = field(default_factory=list)
    empty: list[str] = field(default_factory=list)
    orientation_unsure: list[str] = field(default_factory=list)

    @property
    def usable(self) -> bool:
        """Whether all pairs can be used: nothing missing, unreadable or of the wrong size.

        Photos with empty masks are excluded from training and counted in an evaluation; photos whose masks may be
        oriented differently are used.
        """
        return self.pairs > 0 and not (self.missing or self.unreadable or self.wrong_size)

    def add(self, other: CheckReport) -> None:
        """Add the findings about other pairs."""
        self.pairs += other.pairs
        self.missing += other.missing
        self.unreadable += other.unreadable
        self.wrong_size += other.wrong_size
        self.empty += other.empty
        self.orientation_unsure += other.orientation_unsure


def check(pairs: Sequence[Pair], watch: Callable[[int], None] | None = None) -> CheckReport:
    """Open every photo and mask; report which are missing, unreadable, of unequal sizes, or without any pet.

    They are opened in threads; the findings are in the order of ``pairs``.

    Args:
        pairs: The pairs to check.
        watch: Called with the number of pairs checked so far.
    """
    report = CheckReport()
    for _, found in each_read(pairs, _checked):
        assert found is not None, "a pair that cannot be read is in its report"
        report.add(found)
        if watch:
            watch(report.pairs)
    return report


def _checked(pair: Pair, take: Take) -> CheckReport:
    """Check one pair."""
    report = CheckReport(pairs=1)
    try:
        if gone := [path for path in (pair.image, pair.mask) if not path.exists()]:
            report.missing += map(str, gone)
            return report
        photo, trimap = _decoded(pair, take), read_trimap(pair, take)
        turned = _ambiguous_orientation(pair, photo)
    except (DataError, InputError, OSError) as error:  # the last from `exists`: no permission, or too long a name
        report.unreadable.append(str(error))
        return report
    if photo.pixels.shape[:2] != trimap.shape:
        report.wrong_size.append(f"{pair.name}: {_sizes(photo.pixels, trimap)}")
    if not (trimap == PET).any():
        report.empty.append(pair.name)
    if turned:
        report.orientation_unsure.append(
            f"{pair.name}: the photo's EXIF orientation is {turned}, {pair.mask.name} has none, and their shapes "
            "cannot tell whether the mask is oriented like the displayed photo; compare the two"
        )
    return report


def _ambiguous_orientation(pair: Pair, photo: images.Photo) -> int | None:
    """Returns a photo's EXIF orientation if its mask has none and fits the photo's shape whether rotated or not.

    Raises:
        InputError: The mask is missing.
    """
    turned, square = photo.orientation, photo.pixels.shape[0] == photo.pixels.shape[1]
    if pair.layout is not Layout.FOLDER or turned == 1 or not (square or turned in (2, 3, 4)):
        return None
    with images.opened(pair.mask) as mask:  # opened again: a PNG's orientation is known only after decoding
        return turned if images.orientation(mask) == 1 else None


def _sizes(photo: U8, trimap: U8) -> str:
    return f"photo {photo.shape[1]} x {photo.shape[0]}, mask {trimap.shape[1]} x {trimap.shape[0]}"


def resize_trimap(trimap: U8, height: int, width: int) -> U8:
    """Resize a trimap, uint8 [h, w], to [height, width] by nearest neighbour, because classes cannot be averaged."""
    return np.array(Image.fromarray(trimap).resize((width, height), Image.Resampling.NEAREST))
