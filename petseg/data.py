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
from typing import Any, Final, TypeAlias, TypeVar
from urllib.error import URLError

import numpy as np
import numpy.typing as npt
from PIL import Image

from petseg.metrics import BACKGROUND, BORDER, PET
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

#: White in a mask of 16 bits.
FULL_16: Final = 65535

#: Up to so much above a mask's black a pixel is as good as black, and from the other value on white: what JPEG makes of
#: 0 and 255. In a mask that is none of these, and has no more than so many greys, black is one value.
BLACK: Final = 8
WHITE: Final = 247
LOSSY: Final = ("JPEG", "MPO", "WEBP", "AVIF", "HEIF")
FEW_GREYS: Final = 24
#: The least value that fills an area is black up to here, and the largest white from there on (video has 16 and 235).
DARKEST: Final = 24
LIGHTEST: Final = 235
#: A grey is a level of its own, with those so near to it, from this share on of what is one colour in a mask; one of
#: numbered classes has levels for more than ``MOST_GREY`` of it.
NEAR: Final = 3
LEVEL: Final = 0.02
MOST_GREY: Final = 0.2
#: A mask that is larger without the rows and columns that repeat others is looked at without them: drawn by hand, areas
#: have outlines in which hardly any repeat.
FEWEST_ROWS: Final = 8
#: So many levels are steps from black to white, if no gap is larger than so many times the mean, so much of all
#: outlines is between one and the next, and of each one's own so much is on its darker side, and on its lighter side.
FEWEST_STEPS: Final = 2
UNEVEN: Final = 2
MOST_STEPS: Final = 0.8
LEAST_SIDE: Final = 0.2
#: So many of them are named.
MOST_NAMED: Final = 8

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
                return _black_and_white(images.upright(image), pair.mask, image.format in LOSSY)
            mask = np.array(images.upright(image))
    except InputError as error:
        raise DataError(f"{error} (a mask; `petseg data check` lists every such file)") from error
    if mask.ndim != 2 or mask.size == 0 or mask.min() < PET or mask.max() > BORDER:
        raise DataError(f"{pair.mask}: not a trimap (expected one channel of 1, 2 and 3)")
    return mask.astype(np.uint8)


def _black_and_white(image: Image.Image, path: Path, lossy: bool) -> U8:
    """A mask of the folder layout as a trimap; one of numbered classes, or one in the alpha channel, is refused."""
    expected = "black for background and white for the pet are expected, or 0 and 1"
    if image.has_transparency_data and image.convert("RGBA").getchannel("A").getextrema()[0] != 255:
        raise DataError(f"{path}: a mask that is partly transparent; {expected}, without transparency")
    mask = (
        _eight_bits(image, path) if image.mode in ("I", "F") or image.mode[:2] == "I;" else np.array(image.convert("L"))
    )
    if 1 < (most := int(mask.max(initial=0))) <= 127:
        raise DataError(f"{path}: nothing in this mask is white, and its brightest value is {most}; {expected}")
    if most > 1 and (levels := _class_levels(mask, lossy)):
        named = ", ".join(map(str, levels[:MOST_NAMED])) + (", ..." if len(levels) > MOST_NAMED else "")
        raise DataError(
            f"{path}: much of this mask is neither black nor white, but of the values {named}, as of numbered classes; "
            f"{expected}: make the pet's class white and all others black; or, if it is a soft mask that was enlarged "
            "without smoothing, save it as black and white, or smooth it"
        )
    return np.where(mask > (0 if most <= 1 else 127), np.uint8(PET), np.uint8(BACKGROUND))


def _eight_bits(image: Image.Image, path: Path) -> U8:
    """A mask of larger numbers or of fractions, scaled to 0..255: Pillow would cut off what is above.

    Raises:
        DataError: Its range is none that masks have.
    """
    values = np.asarray(image)
    least, most = (values.min().item(), values.max().item()) if values.size else (0, 0)
    if image.mode == "F" and 0 <= least <= most <= 1:
        return np.asarray(np.rint(255 * values), np.uint8)
    if 0 <= least <= most <= 255:
        return np.asarray(np.rint(values), np.uint8)
    kind, full = ("fractions", 1) if image.mode == "F" else ("larger integers", FULL_16)
    if full == FULL_16 and least >= 0 and full // 2 < most <= full:
        return np.asarray(values >> 8, np.uint8)
    if full == FULL_16 and least == 0 and ((values == 0) | (values == most)).all():  # as where white is 4095
        return np.where(values > 0, np.uint8(255), np.uint8(0))
    found = f"a mask of {kind} from {least:g} to {most:g}"
    raise DataError(
        f"{path}: {found}, where 0 to {full} or 0 to 255 are expected: save it with 8 bits, white where the pet is"
    )


def _class_levels(mask: U8, lossy: bool) -> list[int]:
    """The greys that areas of a mask are filled with, if they are much of it; none in one of black and white.

    Soft edges and what JPEG leaves are grey, too, but of many values, and fill no area. Where they seem to, the mask
    was enlarged without smoothing, or is a soft one of few levels.
    """
    levels = _filled_levels(mask, lossy)
    if levels and min((small := _once(mask)).shape) >= FEWEST_ROWS:
        mask, levels = small, _filled_levels(small, lossy)
    return [] if _is_ramp(mask, levels) else levels


def _once(mask: U8) -> U8:
    """A mask without the rows and columns that repeat the one before: as it was before it was enlarged by NEAREST."""
    rows = mask[np.r_[True, (mask[1:] != mask[:-1]).any(axis=1)]]
    return rows[:, np.r_[True, (rows[:, 1:] != rows[:, :-1]).any(axis=0)]]


def _is_ramp(mask: U8, levels: Sequence[int]) -> bool:
    """Whether levels are steps from black to white: each lies between its neighbours, as areas of classes do not."""
    if len(levels) < FEWEST_STEPS:
        return False
    counts = np.array(Image.fromarray(mask).histogram())
    counts[: levels[0]] = counts[levels[-1] + 1 :] = 0
    steps = np.flatnonzero(counts >= LEVEL * counts.sum())  # some may be too thin to fill an area
    edges = np.array([0, *steps, 255])
    if np.diff(edges).max() > UNEVEN * 255 / (len(steps) + 1):
        return False
    step = np.digitize(np.arange(256), (edges[1:] + edges[:-1]) / 2).astype(np.int16)[mask]
    one = np.r_[step[1:].ravel(), step[:, 1:].ravel()]
    other = np.r_[step[:-1].ravel(), step[:, :-1].ravel()]
    one, other = one[one != other], other[one != other]
    below, above = (np.bincount(side(one, other), minlength=len(edges))[1:-1] for side in (np.maximum, np.minimum))
    between = np.minimum(below, above) >= LEAST_SIDE * (below + above)
    return bool(between.all() and (np.abs(one - other) == 1).mean() >= MOST_STEPS)


def _filled_levels(mask: U8, lossy: bool) -> list[int]:
    """As :func:`_class_levels`, whatever the areas lie beside.

    One light grey on black, with no white beside it, is a pet of another colour.
    """
    everywhere = np.array(Image.fromarray(mask).histogram())
    noisy = lossy or np.count_nonzero(everywhere[1:WHITE]) > FEW_GREYS
    spread = BLACK if noisy else 0
    if everywhere[spread + 1 : WHITE].sum() <= LEVEL * everywhere[spread + 1 :].sum():  # nearly all masks
        return []
    # Pixels that are like their four neighbours: an edge, however drawn, is too thin to have any.
    across, down = mask[:, 1:] == mask[:, :-1], mask[1:] == mask[:-1]
    inside = across[1:-1, 1:] & across[1:-1, :-1] & down[1:, 1:-1] & down[:-1, 1:-1]
    if not inside.any():
        return []
    filled = np.array(Image.fromarray(mask[1:-1, 1:-1]).histogram(Image.fromarray(inside)))
    least, most = map(int, np.flatnonzero(filled)[[0, -1]])
    dark = (least if least <= DARKEST else 0) + spread + 1  # the first that is not black
    white = min(WHITE, most - BLACK) if most >= LIGHTEST else WHITE
    own = _peaks(filled[:white], everywhere[:white], dark, max(1, LEVEL * filled[dark:].sum()))
    much = sum(area for area, _ in own.values()) > MOST_GREY * filled[dark:].sum()
    few = 2 * sum(pixels for _, pixels in own.values()) > everywhere[dark:white].sum()
    coloured = len(own) == 1 and min(own) > 127 and most < white
    return sorted(own) if much and few and not coloured else []


def _peaks(
    filled: npt.NDArray[Any], everywhere: npt.NDArray[Any], dark: int, least: float
) -> dict[int, tuple[int, int]]:
    """The greys from ``dark`` on that fill so many pixels at least, those nearby taken together; with both counts."""
    rest, found = filled.copy(), {}
    rest[:dark] = 0
    while rest.any():
        level = int(rest.argmax())
        near = slice(max(dark, level - NEAR), level + NEAR + 1)
        if (area := int(rest[near].sum())) >= least:
            found[level] = area, int(everywhere[near].sum())
        rest[near] = 0
    return found


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


def _read_photo(pair: Pair, take: Take = _at_once) -> U8:
    return _decoded(pair, take).pixels


def _decoded(pair: Pair, take: Take = _at_once) -> images.Photo:
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


def check(pairs: Sequence[Pair], watch: Callable[[int], None] | None = None) -> CheckReport:
    """Open every photo and mask; say which are missing, unreadable, of unequal sizes, or without any pet.

    Args:
        pairs: What to look at.
        watch: Called with the number of pairs looked at so far.
    """
    report = CheckReport(pairs=len(pairs))
    for number, pair in enumerate(pairs, start=1):
        gone = [path for path in (pair.image, pair.mask) if not path.exists()]
        if gone:
            report.missing += [str(path) for path in gone]
        else:
            _check_pair(pair, report)
        if watch:
            watch(number)
    return report


def _check_pair(pair: Pair, report: CheckReport) -> None:
    try:
        photo, trimap = _decoded(pair), read_trimap(pair)
        turned = _unsure_turn(pair, photo)
    except (DataError, InputError) as error:
        report.unreadable.append(str(error))
        return
    if photo.pixels.shape[:2] != trimap.shape:
        report.wrong_size.append(f"{pair.name}: {_sizes(photo.pixels, trimap)}")
    if not (trimap == PET).any():
        report.empty.append(pair.name)
    if turned:
        report.orientation_unsure.append(
            f"{pair.name}: the photo's EXIF orientation is {turned}, {pair.mask.name} has none, and their shapes "
            "cannot tell whether it lies as the photo is seen: look at both"
        )


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
