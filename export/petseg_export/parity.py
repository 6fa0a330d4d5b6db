"""The reference of the parity test: photos, the fp32 checkpoint's output for them, and their labels."""

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
from petseg.evaluate import listed_split, split_warning
from petseg.metrics import counts, histogram
from petseg.model import AttentionUNet
from petseg.reference import torch_run
from petseg_runtime import images
from petseg_runtime.artifact import sample_photos
from petseg_runtime.errors import CheckpointError, DataError
from petseg_runtime.parity import Proof
from petseg_runtime.sources import find_photos
from petseg_runtime.spec import ModelSpec

__all__ = ["Labels", "Photos", "choose", "labelled", "overlap_warning", "prove", "read", "sample"]

U8: TypeAlias = npt.NDArray[np.uint8]
T = TypeVar("T")


@dataclass(frozen=True)
class Labels:
    """Trimaps at their original resolution, and the IoU of a model's output on them.

    Attributes:
        trimaps: uint8 [H, W] each; see :mod:`petseg.data`.
        threshold: The model's threshold.
    """

    trimaps: tuple[U8, ...]
    threshold: float

    def iou(self, answers: U8) -> float:
        """IoU of outputs, uint8 [N, H, W], over all photos, with the border as background: the headline metric."""
        total = sum(
            histogram(images.from_model(answer, *trimap.shape), trimap)
            for answer, trimap in zip(answers, self.trimaps, strict=True)
        )
        assert not isinstance(total, int)
        return counts(total, self.threshold).iou

    def task(self, expected: U8) -> Callable[[U8], dict[str, Any]]:
        """Return the ``task`` of :class:`petseg_runtime.parity.Checks`: the IoU of outputs and of the reference."""
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
        names: File names.
        images: uint8 [N, H, W, 3] RGB.
        labels: Their labels; None for unlabelled photos.
    """

    names: tuple[str, ...]
    images: U8
    labels: Labels | None

    @property
    def about(self) -> dict[str, Any]:
        """The number of photos and a digest over their names and pixels; JSON values."""
        digest = hashlib.sha256(encoded("\n".join(self.names)))
        digest.update(self.images.tobytes())
        return {"photos": len(self.names), "sha256": digest.hexdigest()}

    def among(self, others: Photos) -> int:
        """Count the photos that are also in ``others``, by pixels: in another folder, a name may be another photo's."""
        mine, theirs = ([hashlib.sha256(image.tobytes()).digest() for image in of.images] for of in (self, others))
        return sum(map({*theirs}.__contains__, mine))


def choose(data: Path | None, split: str, count: int, seed: int, loaded: Checkpoint) -> list[Pair] | list[Path]:
    """Choose the photos of the parity test: a random sample of a labelled split or of a folder, or petseg's samples.

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
        raise DataError(f"--data {data}: the folder has no photos")
    return sample(found, count, seed)


def labelled(data: Path, split: str, loaded: Checkpoint) -> list[Pair]:
    """Return a labelled split, drawn as it was when the checkpoint was trained.

    In the folder that the checkpoint was trained on, its val photos were not trained on. This holds even if the
    ``val.txt`` that listed them is gone, because the checkpoint records their names. Another folder is split by the
    same rule, and may have the same photos on the other side of the split.

    Raises:
        CheckpointError: The checkpoint's record of its split is damaged; without a training config, defaults are used.
        DataError: Not a data folder.
    """
    part = Split(split)
    if (listed := listed_split(loaded.meta, data)) and part in listed:
        return listed[part]
    fraction, seed = _split_settings(loaded)
    return find(data, part, val_fraction=fraction, seed=seed)


def overlap_warning(data: Path | None, split: str, loaded: Checkpoint) -> str | None:
    """Explain why a labelled split contains, or may contain, photos that the checkpoint was trained on.

    Returns None if it does not, if the checkpoint does not record its photos, or if the photos have no labels.

    Raises:
        CheckpointError: As :func:`labelled`.
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
            parts[part] = []  # the other half may be empty: val.txt may list every photo
    shares = (None, None) if listed_validation(data) is not None else _split_settings(loaded)
    found = split_warning(loaded.meta, data, parts, Split(split), *shares)
    return f"{data}: {found}" if found else None


def _is_labelled(data: Path) -> bool:
    return any((folder / "images").is_dir() for folder in (data, data / "oxford-iiit-pet"))  # see petseg.data.locate


def _split_settings(loaded: Checkpoint) -> tuple[float, int]:
    """The validation share of trainval and the seed of the split, from the checkpoint or else the defaults.

    Raises:
        CheckpointError: The checkpoint's training config is damaged.
    """
    try:
        config = loaded.meta.get("config", {}).get("data", {})
        fraction, seed = float(config.get("val_fraction", VAL_FRACTION)), int(config.get("split_seed", SPLIT_SEED))
    except (AttributeError, TypeError, ValueError, OverflowError) as error:
        raise CheckpointError(f"its training config is damaged ({error})") from error
    if not 0 < fraction < 1:  # NaN is in no range
        raise CheckpointError(f"its training config is damaged (val_fraction is {fraction})")
    return fraction, seed


def read(photos: Sequence[Pair] | Sequence[Path], spec: ModelSpec) -> Photos:
    """Read photos at the model's input size, and their labels if they have any.

    Raises:
        InputError: An unlabelled photo cannot be read.
        DataError: A labelled photo or its label cannot be read.
    """
    inputs, trimaps = [], []
    for photo in photos:
        if isinstance(photo, Pair):
            pixels, trimap = read_pair(photo)
            trimaps.append(trimap)
        else:
            pixels = images.read(photo).pixels
        inputs.append(images.to_model(pixels, spec.height, spec.width))
    names = tuple(photo.name for photo in photos)
    return Photos(names, np.stack(inputs), Labels(tuple(trimaps), spec.threshold) if trimaps else None)


def prove(
    model: AttentionUNet, loaded: Checkpoint, photos: Photos, watch: Callable[[int], None] | None = None
) -> Proof:
    """Run the checkpoint in PyTorch, in float32, on photos: the reference of the parity test."""
    run = torch_run(model)
    answers = np.empty(photos.images.shape[:3], np.uint8)
    for i, image in enumerate(photos.images):
        answers[i] = run(image[None])[0]
        if watch:
            watch(i + 1)
    return Proof(photos.names, photos.images, answers, loaded.sha256, f"PyTorch {torch.__version__} on cpu, f32")


def sample(found: Sequence[T], count: int, seed: int) -> list[T]:
    """A random sample of at most ``count`` items, in their original order."""
    chosen = set(random.Random(seed).sample(range(len(found)), min(count, len(found))))
    return [item for i, item in enumerate(found) if i in chosen]
