"""Photos and masks: the Oxford-IIIT Pet layout, or a folder of your own; image and mask augmented as one."""

from __future__ import annotations

import http.client
import math
import os
import random
import tempfile
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, Sampler
from torchvision import tv_tensors
from torchvision.datasets import OxfordIIITPet
from torchvision.transforms import v2

from petseg.config import AugmentConfig
from petseg.metrics import BACKGROUND, BORDER, PET
from petseg_runtime import images
from petseg_runtime.engines.base import usable_cpus
from petseg_runtime.errors import DataError, InputError, OutputError, TrainingError
from petseg_runtime.host import cgroup_limits

__all__ = [
    "CheckReport",
    "EpochSampler",
    "Layout",
    "Pair",
    "Split",
    "TrainSet",
    "augmentation",
    "check",
    "decoded_size",
    "download",
    "find",
    "find_listed",
    "memory",
    "read_pair",
    "read_trimap",
    "resize_trimap",
    "target_of",
    "usable",
]

U8: TypeAlias = npt.NDArray[np.uint8]

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")

#: Threads that decode photos; disks and the memory gain nothing from more.
MAX_READERS = 16


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
    white is pet (a two-valued 0/1 mask is taken as such). The stems in ``test.txt``, if it is there, are the test
    split; the rest is trainval.
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
        DataError: Neither layout is there.
    """
    for folder in (root, root / "oxford-iiit-pet"):
        if (folder / "annotations" / "trimaps").is_dir() and (folder / "images").is_dir():
            return folder, Layout.OXFORD
        if (folder / "masks").is_dir() and (folder / "images").is_dir():
            return folder, Layout.FOLDER
    raise DataError(
        f"{root}: no data set here. Expected images/ with annotations/trimaps/ (Oxford-IIIT Pet; "
        "`petseg data download` fetches it) or images/ with masks/ (your own)"
    )


def find(root: Path, split: Split, *, val_fraction: float = 0.05, seed: int = 0) -> list[Pair]:
    """The pairs of a split, sorted by name. Files are not opened; see :func:`check`.

    Args:
        root: The data folder.
        split: Which part. ``TRAIN`` and ``VAL`` divide trainval.
        val_fraction: Share of trainval that is validation.
        seed: Decides which; the same names, fraction and seed give the same parts on every machine.

    Raises:
        DataError: No data set, or no photo in that split.
    """
    folder, layout = locate(root)
    listed = Split.TEST if split is Split.TEST else Split.TRAINVAL
    pairs = _oxford(folder, listed) if layout is Layout.OXFORD else _folder(folder, listed)
    if split in (Split.TRAIN, Split.VAL):
        held = validation_names([pair.name for pair in pairs], val_fraction, seed)
        pairs = [pair for pair in pairs if (pair.name in held) is (split is Split.VAL)]
    if not pairs:
        raise DataError(f"{root}: the {split} split has no photos")
    return pairs


def find_listed(root: Path, splits: Sequence[Split]) -> list[Pair]:
    """The pairs of several of the data set's own splits; one that it does not have is passed over.

    Raises:
        DataError: No data set, or none of the splits.
    """
    pairs: list[Pair] = []
    problems: list[DataError] = []
    for split in splits:
        try:
            pairs += find(root, split)
        except DataError as error:
            problems.append(error)
    if not pairs:
        raise problems[0]
    return pairs


def download(folder: Path) -> None:
    """Fetch the Oxford-IIIT Pet data set through torchvision, which verifies the archives' checksums.

    Raises:
        DataError: The server cannot be reached, or what it sent is not the data set.
    """
    try:
        OxfordIIITPet(folder, download=True)
    except (OSError, RuntimeError, http.client.HTTPException) as error:
        raise DataError(f"{folder}: the data set could not be downloaded ({error}); try again later") from error


def validation_names(names: Sequence[str], fraction: float, seed: int) -> set[str]:
    """Which names are validation: at least one, chosen by seed from the sorted names."""
    ordered = sorted(names)
    return set(random.Random(seed).sample(ordered, min(len(ordered), max(1, round(fraction * len(ordered))))))


def _oxford(folder: Path, split: Split) -> list[Pair]:
    listing = folder / "annotations" / f"{split}.txt"
    try:
        lines = listing.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{listing}: cannot be read ({error})") from error
    names = sorted({line.split()[0] for line in lines if line.strip() and not line.startswith("#")})
    trimaps = folder / "annotations" / "trimaps"
    return [Pair(n, folder / "images" / f"{n}.jpg", trimaps / f"{n}.png", Layout.OXFORD) for n in names]


def _folder(folder: Path, split: Split) -> list[Pair]:
    photos = _by_stem(folder / "images")
    masks = _by_stem(folder / "masks")
    listing = folder / "test.txt"
    try:
        test = set(listing.read_text(encoding="utf-8").split()) if listing.exists() else set()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{listing}: cannot be read ({error})") from error
    names = [n for n in sorted(photos) if (n in test) is (split is Split.TEST)]
    # A photo without a mask stays in the list, with the path where its mask should be: `check` will name it.
    return [Pair(n, photos[n], masks.get(n, folder / "masks" / f"{n}.png"), Layout.FOLDER) for n in names]


def _by_stem(folder: Path) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith("."):
            if path.stem in found:
                raise DataError(f"{path} and {found[path.stem]} have the same stem; names must be unique")
            found[path.stem] = path
    return found


def read_trimap(pair: Pair) -> U8:
    """The truth of a pair as a trimap.

    Returns:
        uint8 [H, W] of 1 (pet), 2 (background), 3 (border; only in the Oxford layout).

    Raises:
        DataError: Missing, unreadable, or with values that are not a mask's.
    """
    try:
        with Image.open(pair.mask) as image:
            mask = np.array(image if pair.layout is Layout.OXFORD else image.convert("L"))
    except (OSError, SyntaxError, ValueError) as error:
        raise DataError(f"{pair.mask}: cannot be read as a mask ({error})") from error
    if pair.layout is Layout.FOLDER:
        pet = mask > (0 if mask.max() <= 1 else 127)
        return np.where(pet, PET, BACKGROUND).astype(np.uint8)
    if mask.ndim != 2 or mask.size == 0 or mask.min() < PET or mask.max() > BORDER:
        raise DataError(f"{pair.mask}: not a trimap (expected one channel of 1, 2 and 3)")
    return mask.astype(np.uint8)


def read_pair(pair: Pair) -> tuple[U8, U8]:
    """Photo (uint8 [H, W, 3]) and trimap (uint8 [h, w]) at their own sizes.

    Raises:
        DataError: Either cannot be read.
    """
    try:
        photo = images.read(pair.image).pixels
    except InputError as error:
        raise DataError(f"{error} (`petseg data check` lists every such file)") from error
    return photo, read_trimap(pair)


def usable(
    pairs: Sequence[Pair], failed: Callable[[Pair, DataError], None] | None = None
) -> Iterator[tuple[Pair, U8, U8]]:
    """Each pair with its photo and trimap (uint8 [H, W, 3] and [H, W]), if they can be read and are of one size.

    They come in the order of ``pairs``; those next in line are decoded in threads meanwhile.

    Args:
        pairs: What to read.
        failed: Called with each pair that cannot be used, which is then left out.

    Raises:
        DataError: A pair cannot be used, and ``failed`` was not given.
    """
    for pair, reading in _being_read(pairs):
        try:
            photo, trimap = reading.result()
        except DataError as error:
            if failed is None:
                raise
            failed(pair, error)
        else:
            yield pair, photo, trimap


def _being_read(pairs: Sequence[Pair]) -> Iterator[tuple[Pair, Future[tuple[U8, U8]]]]:
    """Each pair with its reading, in order. So few are ahead that photos at their full size do not fill the memory."""
    readers = min(usable_cpus(), MAX_READERS)
    ahead: deque[tuple[Pair, Future[tuple[U8, U8]]]] = deque()
    with ThreadPoolExecutor(readers) as pool:
        for pair in pairs:
            ahead.append((pair, pool.submit(_read_equal, pair)))
            if len(ahead) > 2 * readers:
                yield ahead.popleft()
        yield from ahead


def _read_equal(pair: Pair) -> tuple[U8, U8]:
    """As :func:`read_pair`; a mask of another size than its photo is a DataError, too."""
    photo, trimap = read_pair(pair)
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

    @property
    def usable(self) -> bool:
        """Whether training would start: nothing missing, unreadable or of the wrong size. Empty masks are left out
        of training by name, and counted in an evaluation.
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
        photo, trimap = read_pair(pair)
    except DataError as error:
        report.unreadable.append(str(error))
        return
    if photo.shape[:2] != trimap.shape:
        report.wrong_size.append(f"{pair.name}: {_sizes(photo, trimap)}")
    if not (trimap == PET).any():
        report.empty.append(pair.name)


def _sizes(photo: U8, trimap: U8) -> str:
    return f"photo {photo.shape[1]} x {photo.shape[0]}, mask {trimap.shape[1]} x {trimap.shape[0]}"


def augmentation(config: AugmentConfig) -> v2.Transform:
    """The random changes as one torchvision v2 transform over (Image, Mask); a mask is never interpolated."""
    fill = {tv_tensors.Image: 0, tv_tensors.Mask: BACKGROUND}
    steps: list[v2.Transform] = [v2.RandomHorizontalFlip(config.flip)]
    if config.rotate or config.translate or (config.scale_min, config.scale_max) != (1.0, 1.0):
        steps.append(
            v2.RandomAffine(
                degrees=config.rotate,
                translate=(config.translate, config.translate) if config.translate else None,
                scale=(config.scale_min, config.scale_max),
                interpolation=v2.InterpolationMode.BILINEAR,
                fill=fill,
            )
        )
    if config.brightness or config.contrast or config.saturation or config.hue:
        steps.append(v2.ColorJitter(config.brightness, config.contrast, config.saturation, config.hue))
    return v2.Compose(steps)


class TrainSet(Dataset[tuple[Tensor, Tensor, int]]):
    """Photos and trimaps decoded once, kept as bytes in memory or in a file, augmented anew each time they are drawn.

    An item is drawn by ``epoch * len(self) + index``, and its random changes depend on that number and the seed
    alone: not on the order, nor on the number of workers, nor on whether the run was stopped in between.
    """

    def __init__(
        self,
        pairs: Sequence[Pair],
        height: int,
        width: int,
        augment: AugmentConfig,
        seed: int,
        teacher: Callable[[U8], U8] | None = None,
        failed: Callable[[Pair, DataError], None] | None = None,
        folder: Path | None = None,
    ) -> None:
        """Decode everything.

        Args:
            pairs: Photos with their truth.
            height: Training height.
            width: Training width.
            augment: The random changes.
            seed: Theirs.
            teacher: What another model says of a photo, uint8 [h, w, 3] to a probability uint8 [height, width]. It is
                asked once for each photo; what it says is turned and moved with the photo.
            failed: Called with each pair that cannot be used, which is then left out. Without it the first one raises.
            folder: Where to keep what is decoded, in a file that goes with this process, in place of the memory.

        Raises:
            DataError: A file cannot be read or a mask is not of its photo's size, and ``failed`` was not given; or no
                photo with a pet is left.
            OutputError: ``folder`` has no room for them.
        """
        self.names: list[str] = []
        self.skipped_empty: list[str] = []
        planes = (len(pairs), 2, height, width) if teacher else (len(pairs), height, width)
        self._photos = _room((len(pairs), height, width, 3), folder)  # as many as there are at most
        self._trimaps = _room(planes, folder)
        for pair, photo, trimap in usable(pairs, failed):
            if not (trimap == PET).any():
                self.skipped_empty.append(pair.name)  # a known flaw of the data set; it would teach "no pet"
                continue
            self._photos[len(self)] = images.to_model(photo, height, width)
            labels = resize_trimap(trimap, height, width)
            self._trimaps[len(self)] = (labels, teacher(photo)) if teacher else labels
            self.names.append(pair.name)
        if not self.names:
            raise DataError("no photo with a pet in its mask: nothing to train on")
        self._augment = augmentation(augment)
        self._paste = augment.paste
        self._seed = seed

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, draw: int) -> tuple[Tensor, Tensor, int]:
        """Photo uint8 [H, W, 3], trimap uint8 [H, W], and the index of its name.

        With a teacher, trimap and probability as one uint8 [2, H, W] in place of the trimap.
        """
        epoch, index = divmod(draw, len(self))
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(_mix(self._seed, epoch, index))
            image, mask = self._changed(index)
            if self._paste and torch.rand(()) < self._paste:
                other, its_mask = self._changed(int(torch.randint(len(self), ())))
                # The border goes with the pet: its fur is there, and a cut along its inside would show where.
                pet = (its_mask if its_mask.ndim == 2 else its_mask[0]) != BACKGROUND
                image, mask = torch.where(pet, other, image), torch.where(pet, its_mask, mask)
        return image.permute(1, 2, 0), mask, index

    def _changed(self, index: int) -> tuple[Tensor, Tensor]:
        """A photo, uint8 [3, H, W], and what is known of it, changed alike by the next random numbers."""
        image = tv_tensors.Image(torch.from_numpy(self._photos[index]).permute(2, 0, 1))
        mask = tv_tensors.Mask(torch.from_numpy(self._trimaps[index]))
        image, mask = self._augment(image, mask)
        return image.as_subclass(Tensor), mask.as_subclass(Tensor)


def decoded_size(photos: int, height: int, width: int, taught: bool) -> int:
    """Bytes that a :class:`TrainSet` takes, with a teacher's probabilities or without."""
    return photos * height * width * (5 if taught else 4)


def memory() -> int:
    """Bytes of memory that this machine has, or that the control group of this process allows of it."""
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    membership = Path("/proc/self/cgroup")
    _, limit = cgroup_limits(Path("/sys/fs/cgroup"), membership.read_text() if membership.exists() else "")
    return min(machine, limit or machine)


def _room(shape: tuple[int, ...], folder: Path | None) -> U8:
    """Bytes to be filled, in memory or in a file in ``folder``. The file has no name, so it goes with its process.

    Raises:
        OutputError: The folder cannot be written to, or its disk has too little room.
    """
    if folder is None:
        return np.empty(shape, np.uint8)
    size = math.prod(shape)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:  # the mapping keeps it
            if hasattr(os, "posix_fallocate"):  # not on macOS
                os.posix_fallocate(file.fileno(), 0, size)  # else a disk that fills up would kill the process
            return np.asarray(np.memmap(file, np.uint8, "r+", shape=shape))
    except OSError as error:
        raise OutputError(
            f"{folder}: no place for {size / 1e9:.1f} GB of decoded photos, which are too many for the memory "
            f"({error.strerror or error}): use a smaller --size, or an --output with more room"
        ) from error


class EpochSampler(Sampler[list[int]]):
    """Batches of draws for one epoch, from a given batch on; full batches only (BatchNorm dislikes remainders).

    The order is that of the whole run, whatever the number of processes: each takes its part of every batch.
    """

    def __init__(self, size: int, batch: int, seed: int, rank: int = 0, ranks: int = 1) -> None:
        """Batches of ``batch`` draws of ``size`` photos, of which this is process ``rank`` of ``ranks``.

        Raises:
            DataError: There are fewer photos than one batch takes.
            TrainingError: A batch cannot be split evenly over the processes.
        """
        if size < batch:
            raise DataError(f"{size} photos to train on, but a batch takes {batch}: use a smaller --batch")
        if batch % ranks:
            raise TrainingError(f"batch is {batch}; it must be a multiple of the {ranks} processes that share it")
        self.size, self.batch, self.seed = size, batch, seed
        self.rank, self.ranks = rank, ranks
        self.epoch, self.start = 0, 0

    def __len__(self) -> int:
        """Batches in a whole epoch."""
        return self.size // self.batch

    def __iter__(self) -> Iterator[list[int]]:
        order = self._order()
        for i in range(self.start, len(self)):
            mine = order[i * self.batch : (i + 1) * self.batch][self.rank :: self.ranks]
            yield [self.epoch * self.size + index for index in mine]

    def photos(self, number: int) -> list[int]:
        """Indices of the photos in a batch of this epoch, those of all processes."""
        return self._order()[number * self.batch : (number + 1) * self.batch]

    def _order(self) -> list[int]:
        generator = torch.Generator().manual_seed(_mix(self.seed, self.epoch, -1))
        return torch.randperm(self.size, generator=generator).tolist()


def target_of(labels: Tensor, border_target: float, teacher_share: float = 0.0) -> Tensor:
    """What the network is taught; pet 1, background 0.

    Args:
        labels: What :class:`TrainSet` gives: trimaps, uint8 [N, H, W]; or trimaps and the teacher's probabilities,
            uint8 [N, 2, H, W].
        border_target: What the trimap's border is taught as.
        teacher_share: How much of the target is the teacher's probability, where there is one.

    Returns:
        float32 [N, 1, H, W].
    """
    trimap = labels if labels.ndim == 3 else labels[:, 0]
    target = (trimap == PET).float() + border_target * (trimap == BORDER).float()
    if labels.ndim == 4:
        target = target.lerp(labels[:, 1].float() / 255, teacher_share)
    return target.unsqueeze(1)


def resize_trimap(trimap: U8, height: int, width: int) -> U8:
    """A trimap, uint8 [h, w], at another size, [height, width]; nearest: a class is not a quantity."""
    return np.array(Image.fromarray(trimap).resize((width, height), Image.Resampling.NEAREST))


def _mix(seed: int, epoch: int, index: int) -> int:
    """One number for the generator from three, well spread (the finaliser of SplitMix64)."""
    x = (seed * 0x9E3779B97F4A7C15 + epoch * 0xBF58476D1CE4E5B9 + (index + 1) * 0x94D049BB133111EB) & (2**64 - 1)
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & (2**64 - 1)
    return (x ^ (x >> 31)) >> 1
