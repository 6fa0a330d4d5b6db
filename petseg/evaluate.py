"""Measure a model (checkpoint or exported file) on a labelled split.

An exported file needs no PyTorch, so that it can be measured on the device; a checkpoint does: see petseg.reference.
"""

from __future__ import annotations

import contextlib
import csv
import io
import itertools
import json
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from petseg.data import (
    KEY_LENGTH,
    VAL_LISTING,
    Pair,
    Split,
    Take,
    each_read,
    encoded,
    find,
    listed_validation,
    names_sha256,
    photo_key,
    read_pair,
    validation_names,
)
from petseg.metrics import Border, Histogram, PixelCounts, counts, histogram, json_ratio
from petseg_runtime import images
from petseg_runtime.artifact import open_artifact
from petseg_runtime.engines.registry import load_engine
from petseg_runtime.errors import DataError, OutputError, UsageError
from petseg_runtime.files import write_atomic
from petseg_runtime.regions import without_doubtful

__all__ = [
    "Evaluation",
    "OpenedModel",
    "Run",
    "as_shown",
    "evaluate",
    "is_split_of",
    "listed_by",
    "listed_split",
    "open_model",
    "split_of",
    "split_warning",
    "train_keys",
    "trained_on",
    "without_keys",
    "write_evaluation",
]

U8: TypeAlias = npt.NDArray[np.uint8]
#: Every model, for this module: uint8 [N, H, W, 3] RGB in, uint8 [N, H, W] probability out.
Run: TypeAlias = Callable[[U8], U8]


@dataclass(frozen=True)
class Evaluation:
    """One histogram per photo, from which the metrics follow for any threshold and any way to count the border.

    Attributes:
        names: The photos, in order.
        histograms: int64 [photos, 3, 256]; see :func:`petseg.metrics.histogram`.
    """

    names: tuple[str, ...]
    histograms: Histogram

    @property
    def total(self) -> Histogram:
        """Counts summed over the split, int64 [3, 256]."""
        return self.histograms.sum(axis=0)  # type: ignore[no-any-return]

    def counts(self, threshold: float, border: Border = Border.BACKGROUND) -> PixelCounts:
        """Pixel counts summed over the split."""
        return counts(self.total, threshold, border)

    def image_ious(self, threshold: float, border: Border = Border.BACKGROUND) -> npt.NDArray[np.float64]:
        """IoU of each photo, float64 [photos]; 1 for a photo without a pet in which none was found."""
        return np.array([counts(hist, threshold, border).iou for hist in self.histograms])

    def at_threshold(self, threshold: float) -> dict[str, Any]:
        """The threshold and the headline ratios (border as background) only; JSON values."""
        names = ("threshold", "iou", "dice", "accuracy", "precision", "recall", "mean_image_iou")
        found = self.summary(threshold)
        return {name: found[name] for name in names}

    def summary(self, threshold: float) -> dict[str, Any]:
        """The headline figures (border as background) at the top level, all three under ``readings``; JSON values."""
        readings = {
            str(border): {
                **{name: json_ratio(value) for name, value in self.counts(threshold, border).ratios().items()},
                "mean_image_iou": json_ratio(float(self.image_ious(threshold, border).mean())),
                "pixels": self.counts(threshold, border).as_dict(),
            }
            for border in Border
        }
        headline = readings[Border.BACKGROUND]
        ratios = {name: headline[name] for name in ("iou", "dice", "accuracy", "precision", "recall")}
        without_pet = [n for n, hist in zip(self.names, self.histograms, strict=True) if not hist[0].any()]
        return {
            "schema_version": 1,
            **ratios,
            "mean_image_iou": headline["mean_image_iou"],
            "threshold": threshold,
            "border": str(Border.BACKGROUND),
            "photos": len(self.names),
            "photos_without_pet": without_pet,
            "readings": readings,
        }


def evaluate(
    run: Run,
    pairs: Sequence[Pair],
    height: int,
    width: int,
    *,
    batch: int = 8,
    watch: Callable[[int], None] | None = None,
    failed: Callable[[Pair, DataError], None] | None = None,
) -> Evaluation:
    """Segment every photo, and count its pixels at its trimap's resolution.

    Threads read the photos ahead of the model, in order; see :func:`petseg.data.each_read`.

    Args:
        run: The model.
        pairs: Photos with their masks.
        height: The model's input height.
        width: The model's input width.
        batch: Photos per call of ``run``.
        watch: Called with the number of photos done so far, including excluded ones.
        failed: Called with each pair that cannot be read, which is then excluded. Without it, the first one ends the
            measurement: a figure over fewer photos than were asked for is only for callers that asked for that, too.

    Raises:
        DataError: A photo or mask cannot be read, and ``failed`` was not given; or none can be read.
    """
    names: list[str] = []
    found: list[Histogram] = []
    with contextlib.closing(_inputs(pairs, height, width, failed)) as each:
        for start in range(0, len(pairs), batch):
            chunk = [one for one in itertools.islice(each, batch) if one]
            answers = run(np.stack([photo for _, photo, _ in chunk])) if chunk else ()
            for probability, (name, _, trimap) in zip(answers, chunk, strict=True):
                names.append(name)
                found.append(histogram(images.from_model(probability, *trimap.shape), trimap))
            if watch:
                watch(min(start + batch, len(pairs)))
    if not found:
        raise DataError(f"none of the {len(pairs)} photos can be read with its mask; `petseg data check` says why")
    return Evaluation(tuple(names), np.stack(found))


def as_shown(run: Run) -> Run:
    """Wrap a model so that it returns what ``petseg infer`` shows: probabilities without low-confidence regions.

    See :func:`petseg_runtime.regions.without_doubtful`.
    """
    return lambda batch: np.stack([without_doubtful(answer) for answer in run(batch)])


@dataclass(frozen=True)
class OpenedModel:
    """A checkpoint or exported file, ready to be measured.

    Attributes:
        run: The model itself.
        height: Its input height, pixels.
        width: Its input width, pixels.
        threshold: Its threshold, chosen with the border as background.
        file: The file's name.
        identity: SHA-256, in hex: of a checkpoint's file; for an exported file,
            :attr:`petseg_runtime.artifact.Artifact.identity`.
        engine: The engine, its device and its precision.
        cutout_threshold: The lower threshold, for which the border counts as pet.
        provenance: All that the file says about its origin.
    """

    run: Run
    height: int
    width: int
    threshold: float
    file: str
    identity: str
    engine: str
    cutout_threshold: float
    provenance: dict[str, Any] = field(default_factory=dict)

    def describe(self) -> dict[str, str]:
        """The file, its identity and its engine; JSON values."""
        return {"file": self.file, "identity": self.identity, "engine": self.engine}


@contextlib.contextmanager
def open_model(path: Path, device: str = "auto", backend: str = "auto") -> Iterator[OpenedModel]:
    """Open a checkpoint (``.safetensors``) in PyTorch, or an exported file in one of the runtime's engines.

    Args:
        path: The file.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``; for an exported file also ``intel-gpu``.
        backend: The engine of an exported file, or ``auto``.

    Raises:
        UsageError: An engine was given for a checkpoint.
        ModelError: The file cannot be read; CheckpointError if it is a checkpoint.
        EngineError: The device or the engine is not available.
        ModuleNotFoundError: It is a checkpoint, and PyTorch is not installed.
    """
    if path.suffix == ".safetensors":
        if backend != "auto":
            raise UsageError(
                f"{path}: a checkpoint is measured in PyTorch, not in {backend}; export it, or leave out the engine"
            )
        from petseg.reference import open_checkpoint  # needs PyTorch, which takes seconds to import

        yield open_checkpoint(path, device)
        return
    artifact = open_artifact(path)
    with load_engine(artifact, backend, device=device) as engine:
        info, known = engine.describe(), artifact.spec
        yield OpenedModel(
            run=engine.run,
            height=known.height,
            width=known.width,
            threshold=known.threshold,
            file=path.name,
            identity=artifact.identity,
            engine=f"{info.name} {info.version} on {info.device}, {info.precision}",
            cutout_threshold=known.cutout_threshold,
            provenance={"precision": known.precision, "border_target": known.border_target, **artifact.provenance},
        )


def split_of(provenance: Mapping[str, Any]) -> tuple[float, int] | None:
    """Returns the share of trainval that a model's run held out for validation, and the seed of that choice.

    None if the file does not say, or if a listing chose: see :func:`listed_by`.
    """
    try:
        data = provenance["data"]
        fraction, seed = float(data["val_fraction"]), int(data["split_seed"])
    except (KeyError, TypeError, ValueError, OverflowError):  # missing, or edited by hand
        return None
    return (fraction, seed) if 0 < fraction < 1 else None


def listed_by(provenance: Mapping[str, Any]) -> frozenset[str] | None:
    """Returns the names of a run's validation photos if ``val.txt`` listed them, else None."""
    try:
        names = provenance["data"]["val_names"]
        return frozenset(names) if isinstance(names, list) else None
    except (KeyError, TypeError):  # missing, or edited by hand
        return None


def is_split_of(provenance: Mapping[str, Any], train: Sequence[Pair], val: Sequence[Pair]) -> bool | None:
    """Whether a model (or its exported file) was trained and validated on these photos; None if it does not say.

    The run excluded from ``train``, and recorded, photos that could not be read or show no pet (at its size or at all).
    """
    try:
        data = provenance["data"]
        digest, left_out = data["names_sha256"], {*data["skipped_without_pet"]}
        left_out |= {*data.get("skipped_too_small", ()), *data.get("skipped_bad", ())}
    except (AttributeError, KeyError, TypeError):
        return None
    return bool(names_sha256((pair.name for pair in train if pair.name not in left_out), val) == digest)


def split_warning(
    provenance: Mapping[str, Any],
    root: Path,
    parts: Mapping[Split, Sequence[Pair]],
    split: Split,
    fraction: float | None,
    seed: int | None,
) -> str | None:
    """Says why a figure on a split may flatter a model; None if nothing says that it does.

    Args:
        provenance: The provenance in the model's file.
        root: The data folder.
        parts: The photos of the split; for train or val those of both, as the folder is divided.
        split: The split that is measured.
        fraction: The share of trainval that is val; None if ``val.txt`` lists it.
        seed: The seed of that choice; None likewise.
    """
    found: list[str] = []
    # Keys tell for each photo whether it was trained on; without them only the division of the folder is known.
    if split is Split.TRAIN or (split is Split.VAL and not train_keys(provenance)):
        found += _other_split(provenance, parts[Split.TRAIN], parts[Split.VAL], fraction, seed)
    if split in (Split.VAL, Split.TEST) and (seen := trained_on(provenance, root, parts[split])):
        found.append(f"the model was trained on {len(seen)} of the {len(parts[split])} photos of {split}")
    return "; ".join(found) or None


def _other_split(
    provenance: Mapping[str, Any], train: Sequence[Pair], val: Sequence[Pair], fraction: float | None, seed: int | None
) -> Iterator[str]:
    """Yields how train and val differ from those of the model's own run; nothing if they do not."""
    own, risk = split_of(provenance), "photos that it was trained on may be among val"
    if fraction is not None and own and own != (fraction, seed):
        asked = f"{fraction:g} by {seed}"
        yield f"the model was trained with {own[0]:g} of trainval as val by seed {own[1]}, not {asked}: {risk}"
    elif is_split_of(provenance, train, val) is False:
        which = f"as {VAL_LISTING} lists it" if fraction is None else f"{fraction:g} of trainval by seed {seed}"
        yield f"val, {which}, is not what the model was validated on: {risk}"


def trained_on(provenance: Mapping[str, Any], root: Path, pairs: Sequence[Pair]) -> list[Pair]:
    """Returns the photos that a model, or the weights that it started from, was certainly trained on.

    Args:
        provenance: The provenance in the model's file.
        root: The data folder.
        pairs: Photos in it.

    Returns:
        Those whose keys are in the file, whatever else the folder now holds. The built-in model has no keys: for it, if
        the folder holds exactly the photos of the run, those of its training part.
    """
    names, keys = _own_train(provenance, root), train_keys(provenance)
    return [pair for pair in pairs if pair.name in names or (keys and photo_key(pair) in keys)]


def _own_train(provenance: Mapping[str, Any], root: Path) -> Set[str]:
    """Returns the names of the photos that a model's run trained on, if the folder holds exactly the run's photos."""
    try:
        trainval = find(root, Split.TRAINVAL)
    except DataError:
        return set()
    held: Set[str] | None = listed_by(provenance)
    if (split := split_of(provenance)) is not None:
        held = validation_names([pair.name for pair in trainval], *split)
    own = _divided(provenance, trainval, held)
    return {pair.name for pair in own[Split.TRAIN]} if own else set()


def train_keys(provenance: Mapping[str, Any]) -> frozenset[str]:
    """Returns the keys (:func:`petseg.data.photo_key`) of all photos that a model's file says it was trained on."""
    try:
        text = provenance["data"]["train_keys"]
        return frozenset(text[at : at + KEY_LENGTH] for at in range(0, len(text), KEY_LENGTH))
    except (KeyError, TypeError):  # missing, or edited by hand
        return frozenset()


def without_keys(data: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a file's description of its photos without their keys: thousands of characters, for programs only."""
    return {name: value for name, value in data.items() if name != "train_keys"}


def listed_split(provenance: Mapping[str, Any], root: Path) -> dict[Split, list[Pair]] | None:
    """Returns train and val of a run whose val was listed in ``val.txt``, even if that listing is gone.

    None if no listing chose, if the folder has a listing now (which takes precedence), or if the folder holds other
    photos than the run had, possibly under the same names.

    Raises:
        DataError: Not a data folder.
    """
    if (held := listed_by(provenance)) is None or listed_validation(root) is not None:
        return None
    return _divided(provenance, find(root, Split.TRAINVAL), held)


def _divided(
    provenance: Mapping[str, Any], trainval: Sequence[Pair], held: Set[str] | None
) -> dict[Split, list[Pair]] | None:
    """Split trainval by the names of the validation photos; None unless that is the split of the model's run."""
    if held is None:
        return None
    train, val = ([pair for pair in trainval if (pair.name in held) is kept] for kept in (False, True))
    return {Split.TRAIN: train, Split.VAL: val} if is_split_of(provenance, train, val) else None


def write_evaluation(result: Evaluation, record: Mapping[str, Any], folder: Path) -> None:
    """Write evaluation.json and images.csv (each photo's IoU for all three ways to count the border).

    Raises:
        OutputError: The folder cannot be written to.
    """
    ious = [result.image_ious(record["threshold"], border) for border in Border]
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["name", *(f"iou_border_{border}" for border in Border)])
    for name, *row in zip(result.names, *ious, strict=True):
        writer.writerow([name, *(f"{iou:.6f}" for iou in row)])
    try:
        write_atomic(folder / "images.csv", encoded(text.getvalue()))
        write_atomic(folder / "evaluation.json", (json.dumps(record, indent=2) + "\n").encode())
    except OSError as error:
        raise OutputError(f"{folder}: cannot be written to ({error.strerror or error})") from error


def _inputs(
    pairs: Sequence[Pair], height: int, width: int, failed: Callable[[Pair, DataError], None] | None
) -> Generator[tuple[str, U8, U8] | None, None, None]:
    """Yields each pair's name, model input (uint8 [height, width, 3]) and trimap (uint8 [h, w]).

    Yields None for one that cannot be read, after calling ``failed``.
    """

    def read(pair: Pair, take: Take) -> tuple[U8, U8]:
        photo, trimap = read_pair(pair, take)
        return images.to_model(photo, height, width), trimap

    with contextlib.closing(each_read(pairs, read, failed)) as each:
        for pair, found in each:
            yield (pair.name, *found) if found else None
