"""Photos and masks: the Oxford-IIIT Pet layout, or a folder of your own.

Nothing here imports torch but :func:`download`, which fetches the data set with torchvision.
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
#: Called with the bytes that a picture will take, before it is decoded; may wait.
Take: TypeAlias = Callable[[int], None]

#: In the folder layout: the names of the test photos, and of the validation photos.
TEST_LISTING: Final = "test.txt"
VAL_LISTING: Final = "val.txt"

#: Where nobody says otherwise: the share of trainval that is validation, and the seed that decides which photos.
VAL_FRACTION: Final = 0.05
SPLIT_SEED: Final = 0

#: Errors of a disk, not of a network.
LOCAL: Final = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST)

#: Characters of a photo's key: a checkpoint and the files that are exported from it keep one for each photo.
KEY_LENGTH: Final = 6
#: Bytes of a photo's file, from its middle, that its key is made of.
KEY_BYTES: Final = 4096

#: Threads that decode photos; disks and the memory gain nothing from more.
MAX_READERS = 16

#: Bytes a pixel that a mask takes while it is read: one in colour, with Pillow's copies and what is looked for in it.
MASK_DECODED: Final = 12


class Split(StrEnum):
    """Which photos: trainval is train and val together; test is for reporting only."""

    TRAIN = "train"
    VAL = "val"
    TRAINVAL = "trainval"
    TEST = "test"


class Layout(StrEnum):
    """How a data folder is arranged.

    ``OXFORD``: ``images/NAME.jpg``, ``annotations/trimaps/NAME.png`` (1 pet, 2 background, 3 border) and
    ``annotations/{trainval,test}.txt`` with the name first on each line.

    ``FOLDER``: ``images/`` and ``masks/`` with equal stems; a mask is any image in which black is background and
    white is pet (a two-valued 0/1 mask is taken as such). The stems in ``test.txt``, if it is there, one on each line,
    are the test split; the rest is trainval. Those in ``val.txt``, if it is there, are the validation part of trainval;
    without it a seed chooses that part.
    """

    OXFORD = "oxford"
    FOLDER = "folder"


@dataclass(frozen=True)
class Pair:
    """A photo and where its truth is."""

    name: str
    image: Path
    mask: Path
    layout: Layout


def locate(root: Path) -> tuple[Path, Layout]:
    """The data folder itself and its layout (torchvision downloads into a sub-folder ``oxford-iiit-pet``).

    Raises:
        DataError: Neither layout is there, or it cannot be looked for.
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
    """The pairs of a split, sorted by name. Files are not opened; see :func:`check`.

    Args:
        root: The data folder.
        split: Which part. ``TRAIN`` and ``VAL`` divide trainval.
        val_fraction: Share of trainval that is validation; without effect where ``val.txt`` lists that part.
        seed: Decides which; the same names, fraction and seed give the same parts on every machine.

    Raises:
        DataError: No data set, no photo in that split, or a listing that does not go with the photos.
    """
    folder, layout = locate(root)
    pairs = _find(folder, layout, split, val_fraction, seed)
    if not pairs:
        raise DataError(f"{root}: the {split} split has no photos{_remedy(folder, layout, split)}")
    return pairs


def _find(
    folder: Path, layout: Layout, split: Split, val_fraction: float = VAL_FRACTION, seed: int = SPLIT_SEED
) -> list[Pair]:
    """As :func:`find`, for the data folder itself; may be empty."""
    listed = Split.TEST if split is Split.TEST else Split.TRAINVAL
    pairs = _oxford(folder, listed) if layout is Layout.OXFORD else _folder(folder, listed)
    if split in (Split.TEST, Split.TRAINVAL):
        return pairs
    held = listed_validation(folder)
    if held is None:
        held = validation_names([pair.name for pair in pairs], val_fraction, seed)
    return [pair for pair in pairs if (pair.name in held) is (split is Split.VAL)]


def _remedy(folder: Path, layout: Layout, split: Split) -> str:
    """What gives photos to a split that has none."""
    if split is Split.TEST:
        listing = _listing(folder, split) if layout is Layout.OXFORD else folder / TEST_LISTING
        return f": name some in {listing}, one on each line, without suffix; or take another split (val, trainval)"
    if split in (Split.TRAIN, Split.VAL) and listed_validation(folder) is not None:
        return f": {folder / VAL_LISTING} names the validation photos, and the rest of trainval is for training"
    if split in (Split.TRAIN, Split.VAL):
        return ": trainval needs at least one photo for training and one for validation, which are a share of it"
    return ""


def listed_validation(root: Path) -> set[str] | None:
    """Names in ``val.txt`` of a data set in the folder layout; None where there is no such listing.

    Raises:
        DataError: No data set, or a listing that cannot be read.
    """
    folder, layout = locate(root)
    listing = folder / VAL_LISTING
    return set(_lines(listing)) if layout is Layout.FOLDER and listing.exists() else None


def find_listed(root: Path, splits: Sequence[Split]) -> dict[Split, list[Pair]]:
    """The pairs of several of the data set's own splits (trainval, test; train and val where ``val.txt`` divides them).

    One that it does not have is passed over.

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
    """Files of a data set in the folder layout that nothing is made of: masks without a photo, and what is no picture.

    Raises:
        DataError: No data set.
    """
    folder, layout = locate(root)
    if layout is Layout.OXFORD:  # its listings say which photos are meant, and others lie beside them
        return []
    photos, masks = _by_stem(folder / "images"), _by_stem(folder / "masks")
    used = {*photos.values(), *(path for stem, path in masks.items() if stem in photos)}
    files = (path for part in ("images", "masks") for path in sorted((folder / part).iterdir()))
    return [path for path in files if path not in used and not path.name.startswith(".")]


def download(folder: Path) -> None:
    """Fetch the Oxford-IIIT Pet data set through torchvision, which verifies the archives' checksums.

    It is unpacked beside its place, so that what is at ``folder/oxford-iiit-pet`` is whole. Archives that have come in
    an earlier try are kept, and not fetched again.

    Raises:
        DataError: The server cannot be reached, what it sent is not the data set, or what is there is not whole.
        OutputError: The folder cannot be written to.
    """
    from torchvision.datasets import OxfordIIITPet  # seconds to import, and nothing else here needs it

    place, beside = folder / "oxford-iiit-pet", folder / ".oxford-iiit-pet.part"
    if place.exists():
        _check_whole(place)
        return
    unpacked = beside / place.name
    try:
        for part in ("images", "annotations"):  # torchvision takes a folder that is there for a whole one
            if (unpacked / part).exists():
                shutil.rmtree(unpacked / part)
        OxfordIIITPet(beside, download=True)
        _check_whole(unpacked)
        unpacked.replace(place)
        beside.rmdir()
    except (RuntimeError, http.client.HTTPException, URLError) as error:
        raise DataError(f"{folder}: the data set could not be downloaded ({error}); try again later") from error
    except OSError as error:
        if error.errno in LOCAL:
            raise OutputError(f"{folder}: the data set cannot be written there ({error.strerror})") from error
        raise DataError(f"{folder}: the data set could not be downloaded ({error}); try again later") from error


def _check_whole(folder: Path) -> None:
    """Raises DataError if a photo or a mask that a listing of the data set names is not there."""
    try:
        pairs = [pair for split in (Split.TRAINVAL, Split.TEST) for pair in find(folder, split)]
    except DataError as error:
        raise DataError(
            f"{folder}: not a whole data set: move the folder away, and download again ({error})"
        ) from error
    gone = [path for pair in pairs for path in (pair.image, pair.mask) if not path.exists()]
    if gone:
        raise DataError(
            f"{folder}: {len(gone)} of the data set's files are missing, {gone[0].name} among them: move the folder "
            "away, and download again"
        )


def validation_names(names: Sequence[str], fraction: float, seed: int) -> set[str]:
    """Which names are validation: at least one, chosen by seed from the sorted names."""
    ordered = sorted(names)
    return set(random.Random(seed).sample(ordered, min(len(ordered), max(1, round(fraction * len(ordered))))))


def encoded(names: str) -> bytes:
    """Names of files as UTF-8; bytes of a name that are none, which Python keeps as half a surrogate, are escaped."""
    return names.encode(errors="backslashreplace")


def names_sha256(train: Iterable[str], val: Iterable[Pair]) -> str:
    """What tells whether two runs have the same photos."""
    return hashlib.sha256(encoded("\n".join([*train, "--", *(pair.name for pair in val)]))).hexdigest()


def mask_digest(trimap: U8) -> str:
    """Eight hex digits that tell whether a mask is what it was; of its pixels, so that its file may be another."""
    return hashlib.sha256(f"{trimap.shape}".encode() + trimap.tobytes()).hexdigest()[:8]


def photo_key(pair: Pair) -> str | None:
    """What tells a photo among others wherever its folder lies: a digest of its name, its file's size and its middle.

    ``KEY_LENGTH`` characters of 6 bits, so that of 4000 photos and 4000 others one pair in four thousand runs is taken
    for the same. (A name alone, like ``001``, is that of many photos; and files that are not compressed have one size
    for all photos of a camera.) None: there is no such file, or none that can be read.
    """
    try:
        size = pair.image.stat().st_size
        if not pair.image.is_file():  # reading a pipe would wait
            return None
        with pair.image.open("rb") as file:
            file.seek(max(0, (size - KEY_BYTES) // 2))
            middle = file.read(KEY_BYTES)
    except OSError:
        return None
    digest = hashlib.sha256(encoded(f"{pair.name}/{size}/") + middle).digest()
    return base64.urlsafe_b64encode(digest)[:KEY_LENGTH].decode()


def _listing(folder: Path, split: Split) -> Path:
    return folder / "annotations" / f"{split}.txt"


def _lines(listing: Path) -> list[str]:
    """A listing's lines, without blank ones.

    Raises:
        DataError: It cannot be read.
    """
    try:
        lines = listing.read_text(encoding="utf-8-sig").splitlines()  # some editors begin with a byte order mark
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{listing}: cannot be read ({error})") from error
    return [line.strip() for line in lines if line.strip()]


def _oxford(folder: Path, split: Split) -> list[Pair]:
    lines = [line for line in _lines(_listing(folder, split)) if not line.startswith("#")]  # as list.txt begins
    names = sorted({line.split()[0] for line in lines})
    trimaps = folder / "annotations" / "trimaps"
    return [Pair(n, folder / "images" / f"{n}.jpg", trimaps / f"{n}.png", Layout.OXFORD) for n in names]


def _folder(folder: Path, split: Split) -> list[Pair]:
    photos = _by_stem(folder / "images")
    masks = _by_stem(folder / "masks")
    test, val = (_stems(folder / listing, photos) for listing in (TEST_LISTING, VAL_LISTING))
    if both := sorted(test & val):
        raise DataError(
            f"{folder / VAL_LISTING}: {len(both)} of its names are in {TEST_LISTING}, too, the first is {both[0]!r}: "
            "take each out of one of the two, for test photos are for the final figure alone"
        )
    names = [n for n in sorted(photos) if (n in test) is (split is Split.TEST)]
    # A photo without a mask stays in the list, with the path where its mask should be: `check` will name it.
    return [Pair(n, photos[n], masks.get(n, folder / "masks" / f"{n}.png"), Layout.FOLDER) for n in names]


def _stems(listing: Path, photos: Mapping[str, Path]) -> set[str]:
    """The names in a listing of the folder layout; none where there is no such file.

    A photo may be called ``#1``, so there are no comments: one taken for a comment would be trained on.

    Raises:
        DataError: It cannot be read, or a name is of no photo.
    """
    names = set(_lines(listing)) if listing.exists() else set()
    if strange := sorted(names - photos.keys()):  # as a photo of the rest it would be trained on
        raise DataError(
            f"{listing}: {len(strange)} lines name no photo in images/, the first is {strange[0]!r}: one name on each "
            "line is expected, without its suffix, and no comments"
        )
    return names


def _by_stem(folder: Path) -> dict[str, Path]:
    """The pictures in a folder.

    Raises:
        DataError: Two have one stem, or the folder cannot be read.
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


def _at_once(size: int) -> None:
    """Takes memory without waiting for it."""


def read_trimap(pair: Pair, take: Take = _at_once) -> U8:
    """The truth of a pair as a trimap.

    Args:
        pair: The photo and its mask.
        take: Called with about how many bytes decoding it takes, before it is decoded; may wait.

    Returns:
        uint8 [H, W] of 1 (pet), 2 (background), 3 (border; only in the Oxford layout); upright, as the photo is.

    Raises:
        DataError: Missing, unreadable, too large, or with values that are not a mask's.
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
        raise DataError(f"{pair.mask}: not a trimap (expected one channel of 1, 2 and 3)")
    return mask.astype(np.uint8)


def read_pair(pair: Pair, take: Take = _at_once) -> tuple[U8, U8]:
    """Photo (uint8 [H, W, 3]) and trimap (uint8 [h, w]) at their own sizes, which have one shape.

    Args:
        pair: The photo and its mask.
        take: As of :func:`petseg_runtime.images.read`.

    Raises:
        DataError: Either cannot be read, or the mask is of another shape than the photo, so that it is not of it.
    """
    photo, trimap = _read_photo(pair, take), read_trimap(pair, take)
    (high, wide), (rows, columns) = photo.shape[:2], trimap.shape
    # A copy at another size is off by a pixel at most.
    if abs(high * columns - wide * rows) > max(high, wide, rows, columns):
        raise DataError(f"{pair.mask}: {_sizes(photo, trimap)}, which is of another shape")
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
    """Each pair with its photo and trimap (uint8 [H, W, 3] and [H, W]), if they can be read and are of one size.

    They come in the order of ``pairs``; those next in line are decoded in threads meanwhile.

    Args:
        pairs: What to read.
        failed: Called with each pair that cannot be used, which is then left out.
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
    """Each pair with what ``read`` makes of it in a thread, in order; None once ``failed`` was called with it.

    Args:
        pairs: What to read.
        read: Reads one, and takes the memory for it first.
        failed: Called with each pair that cannot be used.
        processes: How many of this machine read at the same time, this one among them.
        promised: Bytes that each of them has allocated but not used so far, so that the system still calls them free.

    Raises:
        DataError: A pair cannot be used, and ``failed`` was not given.
    """
    with contextlib.closing(_being_read(pairs, read, processes, promised)) as readings:
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


def _being_read(
    pairs: Sequence[Pair], read: Callable[[Pair, Take], T], processes: int, promised: int
) -> Generator[tuple[Pair, Future[T]], None, None]:
    """Each pair with its reading, in order; those next in line are read in threads.

    A reading has to be awaited before the next one is asked for. Those ahead are two for each reader at most, and fewer
    where they would take more than half of the memory that is there: a pair that finds too little left waits, unless it
    is the one that is asked for. The arguments are those of :func:`each_read`.
    """
    readers = min(usable_cpus(), MAX_READERS)
    budget = MemoryBudget(max(0, available_memory() - processes * promised) // (2 * processes))
    ahead: deque[tuple[Pair, Reservation, Future[T]]] = deque()

    def first() -> Iterator[tuple[Pair, Future[T]]]:
        pair, reservation, reading = ahead.popleft()
        budget.expedite(reservation)
        yield pair, reading
        budget.release(reservation)

    with ThreadPoolExecutor(readers) as pool, contextlib.closing(budget):  # first the budget, on which readers may wait
        for pair in pairs:
            reservation = Reservation()
            reading = pool.submit(read, pair, functools.partial(budget.reserve, reservation))
            ahead.append((pair, reservation, reading))
            if len(ahead) > 2 * readers:
                yield from first()
        while ahead:
            yield from first()


def _read_equal(pair: Pair, take: Take) -> tuple[U8, U8]:
    """As :func:`read_pair`; a mask of another size than its photo is a DataError, too."""
    photo, trimap = _read_photo(pair, take), read_trimap(pair, take)
    if photo.shape[:2] != trimap.shape:
        raise DataError(f"{pair.name}: {_sizes(photo, trimap)} (`petseg data check` lists every such pair)")
    return photo, trimap


@dataclass
class CheckReport:
    """What :func:`check` found, by kind; every list holds names (or ``name: reason``)."""

    pairs: int = 0
    missing: list[str] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)
    wrong_size: list[str] = field(default_factory=list)
    empty: list[str] = field(default_factory=list)
    orientation_unsure: list[str] = field(default_factory=list)

    @property
    def usable(self) -> bool:
        """Whether all of it can be used: nothing missing, unreadable or of the wrong size. Empty masks are left out
        of training by name, and counted in an evaluation; those that may lie another way than their photos are used.
        """
        return self.pairs > 0 and not (self.missing or self.unreadable or self.wrong_size)

    def add(self, other: CheckReport) -> None:
        """Take in what was found in other pairs."""
        self.pairs += other.pairs
        self.missing += other.missing
        self.unreadable += other.unreadable
        self.wrong_size += other.wrong_size
        self.empty += other.empty
        self.orientation_unsure += other.orientation_unsure


def check(pairs: Sequence[Pair], watch: Callable[[int], None] | None = None) -> CheckReport:
    """Open every photo and mask; say which are missing, unreadable, of unequal sizes, or without any pet.

    They are opened in threads, and what is found stands in the order of ``pairs``.

    Args:
        pairs: What to look at.
        watch: Called with the number of pairs looked at so far.
    """
    report = CheckReport()
    for _, found in each_read(pairs, _checked):
        assert found is not None, "a pair that cannot be read is in its report"
        report.add(found)
        if watch:
            watch(report.pairs)
    return report


def _checked(pair: Pair, take: Take) -> CheckReport:
    """What :func:`check` finds in one pair."""
    report = CheckReport(pairs=1)
    if gone := [path for path in (pair.image, pair.mask) if not path.exists()]:
        report.missing += map(str, gone)
        return report
    try:
        photo, trimap = _decoded(pair, take), read_trimap(pair, take)
        turned = _unsure_turn(pair, photo)
    except (DataError, InputError) as error:
        report.unreadable.append(str(error))
        return report
    if photo.pixels.shape[:2] != trimap.shape:
        report.wrong_size.append(f"{pair.name}: {_sizes(photo.pixels, trimap)}")
    if not (trimap == PET).any():
        report.empty.append(pair.name)
    if turned:
        report.orientation_unsure.append(
            f"{pair.name}: the photo's EXIF orientation is {turned}, {pair.mask.name} has none, and their shapes "
            "cannot tell whether it lies as the photo is seen: look at both"
        )
    return report


def _unsure_turn(pair: Pair, photo: images.Photo) -> int | None:
    """A photo's EXIF orientation if its mask has none, and would be of the photo's shape turned or not.

    Raises:
        InputError: The mask is gone.
    """
    turned, square = photo.orientation, photo.pixels.shape[0] == photo.pixels.shape[1]
    if pair.layout is not Layout.FOLDER or turned == 1 or not (square or turned in (2, 3, 4)):
        return None
    with images.opened(pair.mask) as mask:  # once more: the orientation of a PNG is known when it is decoded
        return turned if images.orientation(mask) == 1 else None


def _sizes(photo: U8, trimap: U8) -> str:
    return f"photo {photo.shape[1]} x {photo.shape[0]}, mask {trimap.shape[1]} x {trimap.shape[0]}"


def resize_trimap(trimap: U8, height: int, width: int) -> U8:
    """A trimap, uint8 [h, w], at another size, [height, width]; nearest: a class is not a quantity."""
    return np.array(Image.fromarray(trimap).resize((width, height), Image.Resampling.NEAREST))
