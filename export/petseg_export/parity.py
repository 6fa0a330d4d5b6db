"""The reference that exports are held against: photos, what the fp32 checkpoint says of them, and their labels."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from petseg.checkpoint import Checkpoint
from petseg.data import SPLIT_SEED, VAL_FRACTION, Pair, Split, encoded, find, listed_validation, read_pair
from petseg.evaluate import doubt_about, listed_split
from petseg.metrics import counts, histogram
from petseg.model import AttentionUNet
from petseg.reference import torch_run
from petseg_runtime import images
from petseg_runtime.artifact import sample_photos
from petseg_runtime.errors import CheckpointError, DataError
from petseg_runtime.parity import Proof
from petseg_runtime.sources import find_photos
from petseg_runtime.spec import ModelSpec

__all__ = ["Labels", "Photos", "choose", "doubt", "labelled", "prove", "read", "sample"]

U8: TypeAlias = npt.NDArray[np.uint8]
T = TypeVar("T")


@dataclass(frozen=True)
class Labels:
    """Trimaps at their own resolution, and how answers are judged on them.

    Attributes:
        trimaps: uint8 [H, W] each; see :mod:`petseg.data`.
        threshold: Of the model.
    """

    trimaps: tuple[U8, ...]
    threshold: float

    def iou(self, answers: U8) -> float:
        """IoU of answers, uint8 [N, H, W], over all photos, with the border as background: the headline metric."""
        total = sum(
            histogram(images.from_model(answer, *trimap.shape), trimap)
            for answer, trimap in zip(answers, self.trimaps, strict=True)
        )
        assert not isinstance(total, int)
        return counts(total, self.threshold).iou

    def task(self, expected: U8) -> Callable[[U8], dict[str, Any]]:
        """What :func:`petseg_runtime.parity.compare` takes: the IoU of answers, beside that of the reference."""
        reference = self.iou(expected)

        def judge(answers: U8) -> dict[str, Any]:
            this = self.iou(answers)
            loss = 100 * (reference - this)
            return {"photos": len(answers), "reference": reference, "this": this, "loss": round(loss, 4)}

        return judge


@dataclass(frozen=True)
class Photos:
    """Photos as the model sees them.

    Attributes:
        names: Of the files.
        images: uint8 [N, H, W, 3] RGB.
        labels: Where the photos are labelled.
    """

    names: tuple[str, ...]
    images: U8
    labels: Labels | None

    @property
    def about(self) -> dict[str, Any]:
        """How many, and a digest over their names and pixels; JSON values."""
        digest = hashlib.sha256(encoded("\n".join(self.names)))
        digest.update(self.images.tobytes())
        return {"photos": len(self.names), "sha256": digest.hexdigest()}

    def among(self, others: Photos) -> int:
        """How many are among others, by what the model sees of them: another folder may have other photos of a name."""
        mine, theirs = ([hashlib.sha256(image.tobytes()).digest() for image in of.images] for of in (self, others))
        return sum(map({*theirs}.__contains__, mine))


def choose(data: Path | None, split: str, count: int, seed: int, loaded: Checkpoint) -> list[Pair] | list[Path]:
    """The photos of the parity test: a seeded choice of a labelled split, or of a folder, or all samples that ship.

    Raises:
        DataError: There are none.
    """
    if data is None:
        return sample_photos()[:count]
    if not data.is_dir():
        raise DataError(f"--data {data}: not a folder")
    if _is_labelled(data):
        return sample(labelled(data, split, loaded), count, seed)
    found = [item.source for item in find_photos([data])]
    if not found:
        raise DataError(f"--data {data}: no photos in it")
    return sample(found, count, seed)


def labelled(data: Path, split: str, loaded: Checkpoint) -> list[Pair]:
    """A labelled split, drawn as it was when the checkpoint was trained.

    In the folder that it was trained on, what is val here was not trained on, also where ``val.txt``, which listed
    those photos, is gone: the checkpoint names them. Another folder is split in the same way, and may have the same
    photos on the other side.

    Raises:
        CheckpointError: It does not say how; without a training config at all, the defaults are taken.
        DataError: Not a data folder.
    """
    part = Split(split)
    if (listed := listed_split(loaded.meta, data)) and part in listed:
        return listed[part]
    fraction, seed = _shares(loaded)
    return find(data, part, val_fraction=fraction, seed=seed)


def doubt(data: Path | None, split: str, loaded: Checkpoint) -> str | None:
    """Why photos that the checkpoint was trained on are among those of a labelled split, or may be, in words.

    None if they are not, if the checkpoint does not say, or if the photos have no labels.

    Raises:
        CheckpointError: As of :func:`labelled`.
        DataError: Likewise.
    """
    if data is None or not _is_labelled(data):
        return None
    halves = (Split.TRAIN, Split.VAL)
    parts: dict[Split, list[Pair]] = {}
    for part in halves if split in halves else (Split(split),):
        try:
            parts[part] = labelled(data, part, loaded)
        except DataError:
            if part == split:
                raise
            parts[part] = []  # a folder may have none: val.txt may list every photo
    shares = (None, None) if listed_validation(data) is not None else _shares(loaded)
    found = doubt_about(loaded.meta, data, parts, Split(split), *shares)
    return f"{data}: {found}" if found else None


def _is_labelled(data: Path) -> bool:
    return any((folder / "images").is_dir() for folder in (data, data / "oxford-iiit-pet"))  # see petseg.data.locate


def _shares(loaded: Checkpoint) -> tuple[float, int]:
    """Share of trainval that is validation, and the seed that chooses it: the run's own, or the usual ones.

    Raises:
        CheckpointError: What the checkpoint says of them is damaged.
    """
    try:
        of_run = loaded.meta.get("config", {}).get("data", {})
        return float(of_run.get("val_fraction", VAL_FRACTION)), int(of_run.get("split_seed", SPLIT_SEED))
    except (AttributeError, TypeError, ValueError) as error:
        raise CheckpointError(f"its training config is damaged ({error})") from error


def read(photos: Sequence[Pair] | Sequence[Path], spec: ModelSpec) -> Photos:
    """Read photos, and their labels where they have them, at the size of a model.

    Raises:
        InputError: A photo cannot be read.
        DataError: A pair cannot be read.
    """
    names, inputs, trimaps = [], [], []
    for photo in photos:
        if isinstance(photo, Pair):
            pixels, trimap = read_pair(photo)
            names.append(photo.name)
            trimaps.append(trimap)
        else:
            pixels = images.read(photo).pixels
            names.append(photo.name)
        inputs.append(images.to_model(pixels, spec.height, spec.width))
    return Photos(tuple(names), np.stack(inputs), Labels(tuple(trimaps), spec.threshold) if trimaps else None)


def prove(
    model: AttentionUNet, loaded: Checkpoint, photos: Photos, watch: Callable[[int], None] | None = None
) -> Proof:
    """What the checkpoint in PyTorch, float32, says of some photos."""
    run = torch_run(model)
    answers = np.empty(photos.images.shape[:3], np.uint8)
    for i, image in enumerate(photos.images):
        answers[i] = run(image[None])[0]
        if watch:
            watch(i + 1)
    return Proof(photos.names, photos.images, answers, loaded.sha256, f"PyTorch {torch.__version__} on cpu, f32")


def sample(found: Sequence[T], count: int, seed: int) -> list[T]:
    """A seeded choice of at most ``count``, in their order."""
    chosen = set(random.Random(seed).sample(range(len(found)), min(count, len(found))))
    return [item for i, item in enumerate(found) if i in chosen]
