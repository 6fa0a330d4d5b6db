"""The training set: photos decoded once, image and mask augmented together, and the order of each epoch."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler
from torchvision import tv_tensors
from torchvision.transforms import v2

from petseg.config import AugmentConfig
from petseg.data import Pair, mask_digest, resize_trimap, usable
from petseg.metrics import BACKGROUND, BORDER, PET
from petseg_runtime import images
from petseg_runtime.errors import DataError, OutputError, UsageError
from petseg_runtime.text import counted

__all__ = [
    "UNKNOWN",
    "EpochSampler",
    "TrainSet",
    "check_batch",
    "colour_jitter",
    "decoded_size",
    "geometric_transform",
    "target_of",
]

U8: TypeAlias = npt.NDArray[np.uint8]

#: Fills the trimap of two mixed photos: no class, because only a teacher can provide the target. Not in any file.
UNKNOWN: Final = 0


def geometric_transform(config: AugmentConfig) -> v2.Transform:
    """Returns the random geometric transform, the same for all inputs of a call; nearest for masks, else bilinear.

    Uncovered pixels become black in images, and background in masks.
    """
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
    return v2.Compose(steps)


def colour_jitter(config: AugmentConfig) -> v2.Transform:
    """Returns the random colour jitter."""
    if config.brightness or config.contrast or config.saturation or config.hue:
        return v2.ColorJitter(config.brightness, config.contrast, config.saturation, config.hue)
    return v2.Identity()


class TrainSet(Dataset[tuple[Tensor, Tensor, int]]):
    """Photos and trimaps, decoded once, kept as bytes in memory or in a file, and augmented whenever they are drawn.

    An item is drawn by the number ``epoch * len(self) + index``, and its augmentation depends only on that number and
    the seed: not on the order, the number of workers, or whether the run was stopped in between.

    Attributes:
        names: The names of the photos, in order.
        masks: For each photo, the :func:`petseg.data.mask_digest` of its mask at the training size.
        skipped_empty: Names of photos that were excluded because their masks show no pet.
        skipped_tiny: Names of those whose pet vanishes at the training size, so that they would teach "no pet".
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
        processes: int = 1,
        mix_epochs: float = math.inf,
    ) -> None:
        """Decode all photos.

        Args:
            pairs: Photos with their masks.
            height: Training height.
            width: Training width.
            augment: The random augmentation. Mixing needs a teacher that sees the mixed picture, not this ``teacher``.
            seed: Seed of the augmentation.
            teacher: Maps a photo, uint8 [h, w, 3], to another model's probability, uint8 [height, width]. It is called
                once for each photo; its map is transformed geometrically with the photo, like a grey image.
            failed: Called with each pair that cannot be used, which is then excluded. Without it, the first one raises.
            folder: Keep the decoded photos in a file there, which is removed with this process, instead of in memory.
            processes: Number of processes on this machine that do this at the same time, including this one.
            mix_epochs: From this epoch on nothing is mixed (the run's ``augment.mix_until``, in epochs).

        Raises:
            ValueError: ``augment.mix`` was given with ``teacher``.
            DataError: A file cannot be read or a mask and its photo differ in size, and ``failed`` was not given; or no
                photo with a pet remains.
            OutputError: ``folder`` has no room for the photos.
        """
        if teacher is not None and augment.mix:
            raise ValueError("augment.mix: a teacher that is run on each photo once has no target for two mixed photos")
        self.names: list[str] = []
        self.skipped_empty: list[str] = []
        self.skipped_tiny: list[str] = []
        self.masks: list[str] = []
        planes = (len(pairs), 2, height, width) if teacher else (len(pairs), height, width)
        self._photos = _allocate((len(pairs), height, width, 3), folder)  # an upper bound
        self._trimaps = _allocate(planes, folder)
        # This memory has not been touched yet, so the system still counts it as free.
        promised = 0 if folder else self._photos.nbytes + self._trimaps.nbytes
        for pair, photo, trimap in usable(pairs, failed, processes, promised):
            if not (trimap == PET).any():
                self.skipped_empty.append(pair.name)  # a known flaw of the data set, which would teach "no pet"
                continue
            labels = resize_trimap(trimap, height, width)
            if not (labels == PET).any():
                self.skipped_tiny.append(pair.name)
                continue
            self._photos[len(self)] = images.to_model(photo, height, width)
            self._trimaps[len(self)] = (labels, teacher(photo)) if teacher else labels
            self.names.append(pair.name)
            self.masks.append(mask_digest(labels))
        if not self.names:
            tiny = f" (at {height}x{width} the pets of {len(self.skipped_tiny)} vanish)" if self.skipped_tiny else ""
            raise DataError(f"no photo with a pet in its mask{tiny}: nothing to train on")
        self._move, self._colour = geometric_transform(augment), colour_jitter(augment)
        self._paste, self._mixed, self._mix_epochs = augment.paste, augment.mix, mix_epochs
        self._seed = seed

    def __len__(self) -> int:
        return len(self.names)

    @property
    def taught(self) -> bool:
        """Whether an item has a teacher's probability beside the trimap."""
        return self._trimaps.ndim == 4

    def __getitem__(self, draw: int) -> tuple[Tensor, Tensor, int]:
        """Returns a photo, uint8 [H, W, 3], its trimap, uint8 [H, W], and the index of its name.

        With a teacher, trimap and probability are stacked, uint8 [2, H, W], in place of the trimap. For two mixed
        photos all of it is ``UNKNOWN``.
        """
        epoch, index = divmod(draw, len(self))
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(_mix(self._seed, epoch, index))
            image, mask = self._changed(index)
            if self._paste and torch.rand(()) < self._paste:
                other, its_mask = self._changed(int(torch.randint(len(self), ())))
                # The border is pasted, too: it contains fur, and a cut along its inner edge would give the paste away.
                pet = (its_mask if its_mask.ndim == 2 else its_mask[0]) != BACKGROUND
                image, mask = torch.where(pet, other, image), torch.where(pet, its_mask, mask)
            if self._mixed and epoch < self._mix_epochs and torch.rand(()) < self._mixed:
                other, _ = self._changed(int(torch.randint(len(self), ())))
                weight = torch.rand(()) / 2
                image = image.float().lerp(other.float(), weight).round().to(torch.uint8)
                mask = torch.full_like(mask, UNKNOWN)
        return image.permute(1, 2, 0), mask, index

    def _changed(self, index: int) -> tuple[Tensor, Tensor]:
        """Returns a photo, uint8 [3, H, W], and its labels, transformed together with the next random numbers."""
        image = tv_tensors.Image(torch.from_numpy(self._photos[index]).permute(2, 0, 1))
        known = torch.from_numpy(self._trimaps[index])
        trimap, *said = known.unbind() if known.ndim == 3 else (known,)
        # A teacher's probability is interpolated, and 0 outside of the photo, like a grey image.
        image, mask, *maps = self._move(image, tv_tensors.Mask(trimap), *map(tv_tensors.Image, said))
        planes = [plane.as_subclass(Tensor) for plane in (mask, *(grey[0] for grey in maps))]
        return self._colour(image).as_subclass(Tensor), torch.stack(planes) if maps else planes[0]


def decoded_size(photos: int, height: int, width: int, taught: bool) -> int:
    """Returns the bytes that a :class:`TrainSet` takes, with or without a teacher's probabilities."""
    return photos * height * width * (5 if taught else 4)


def _allocate(shape: tuple[int, ...], folder: Path | None) -> U8:
    """Allocate bytes in memory, or in a file in ``folder`` that has no name, so that it vanishes with its process.

    Raises:
        OutputError: The folder cannot be written to, or its disk is too full.
    """
    if folder is None:
        return np.empty(shape, np.uint8)
    size = math.prod(shape)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:  # the mapping keeps the file alive
            if hasattr(os, "posix_fallocate"):  # not on macOS
                os.posix_fallocate(file.fileno(), 0, size)  # without it, a full disk would kill the process later
            return np.asarray(np.memmap(file, np.uint8, "r+", shape=shape))
    except OSError as error:
        raise OutputError(
            f"{folder}: no room for {size / 1e9:.1f} GB of decoded photos, which do not fit into memory "
            f"({error.strerror or error}); use a smaller --size, or an --output with more room"
        ) from error


def check_batch(photos: int, batch: int, ranks: int = 1) -> None:
    """Reject a batch size that does not fit the photos or the number of ranks.

    Raises:
        UsageError: A batch cannot be split evenly over the ranks.
        DataError: There are fewer photos than one batch takes.
    """
    if batch % ranks:
        raise UsageError(f"batch is {batch}; it must be a multiple of the {ranks} processes that share it")
    if photos < batch:
        remedy = "use a smaller --batch" if photos >= max(2, ranks) else f"{max(2, ranks)} or more are needed"
        raise DataError(f"{counted(photos, 'photo')} to train on, but a batch takes {batch}; {remedy}")


class EpochSampler(Sampler[list[int]]):
    """The batches of one epoch, from a given batch on; full batches only (BatchNorm suffers from incomplete ones).

    The order does not depend on the number of ranks: each rank takes its part of every batch.
    """

    def __init__(self, size: int, batch: int, seed: int, rank: int = 0, ranks: int = 1) -> None:
        """Sample batches of ``batch`` from ``size`` photos, for rank ``rank`` of ``ranks``.

        Raises:
            DataError, UsageError: See :func:`check_batch`.
        """
        check_batch(size, batch, ranks)
        self.size, self.batch, self.seed = size, batch, seed
        self.rank, self.ranks = rank, ranks
        self.epoch, self.start = 0, 0

    def __len__(self) -> int:
        """Batches in a complete epoch."""
        return self.size // self.batch

    def __iter__(self) -> Iterator[list[int]]:
        order = self._order()
        for i in range(self.start, len(self)):
            mine = order[i * self.batch : (i + 1) * self.batch][self.rank :: self.ranks]
            yield [self.epoch * self.size + index for index in mine]

    def photos(self, number: int) -> list[int]:
        """Returns the indices of the photos in a batch of this epoch, over all ranks."""
        return self._order()[number * self.batch : (number + 1) * self.batch]

    def _order(self) -> list[int]:
        generator = torch.Generator().manual_seed(_mix(self.seed, self.epoch, -1))
        return torch.randperm(self.size, generator=generator).tolist()


def target_of(labels: Tensor, border_target: float, teacher_share: float = 0.0) -> Tensor:
    """Returns the target of the network: pet 1, background 0.

    Args:
        labels: Labels from :class:`TrainSet`: trimaps, uint8 [N, H, W]; or trimaps and the teacher's probabilities,
            uint8 [N, 2, H, W]. ``UNKNOWN`` becomes 0, which the caller has to replace.
        border_target: The target for the trimap's border.
        teacher_share: The share of the teacher's probability, if there is one, in the target.

    Returns:
        float32 [N, 1, H, W].
    """
    trimap = labels if labels.ndim == 3 else labels[:, 0]
    target = (trimap == PET).float() + border_target * (trimap == BORDER).float()
    if labels.ndim == 4:
        target = target.lerp(labels[:, 1].float() / 255, teacher_share)
    return target.unsqueeze(1)


def _mix(seed: int, epoch: int, index: int) -> int:
    """Hash three numbers to one seed for the generator (the finaliser of SplitMix64)."""
    x = (seed * 0x9E3779B97F4A7C15 + epoch * 0xBF58476D1CE4E5B9 + (index + 1) * 0x94D049BB133111EB) & (2**64 - 1)
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & (2**64 - 1)
    return (x ^ (x >> 31)) >> 1
