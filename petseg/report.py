"""Reports of an evaluation: ``report.html``, a page to read, and ``report.json``, the numbers.

Nothing is measured again: all numbers follow from the histograms of :func:`petseg.evaluate.evaluate`. Only the best and
worst photos are segmented again, to show them. All facts on the page are in the JSON, too.
"""

from __future__ import annotations

import datetime
import io
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from PIL import Image

from petseg import log, report_page
from petseg.data import SPLIT_SEED, VAL_FRACTION, VAL_LISTING, Layout, Pair, Split, read_pair
from petseg.evaluate import Evaluation, OpenedModel, without_keys
from petseg.metrics import BACKGROUND, BORDER, PET, PUBLISHED, Border, Histogram, best_threshold, counts, json_ratio
from petseg.report_page import Case
from petseg_runtime import __version__, images
from petseg_runtime.errors import OutputError, TrainingError
from petseg_runtime.files import write_atomic
from petseg_runtime.spec import lowest_pet

__all__ = ["PUBLISHED", "Source", "cases", "numbers", "write"]

SCHEMA_VERSION: Final = 1
HTML, JSON = "report.html", "report.json"

#: How many of the best and worst photos are shown; fewer of few photos, so that none is shown twice.
BEST, WORST = 6, 12
BINS: Final = 20  # of the histogram of the photos' IoU
LEVELS: Final = 16  # probability bytes per bin of the reliability curve, which has 16 bins
THUMBNAIL: Final = 260  # pixels; 54 pictures of this size take less than a megabyte

#: Breed and number, as in ``Maine_Coon_24``; cat breeds begin with a capital letter, dog breeds do not.
NAME: Final = re.compile(r"([A-Za-z]+(?:_[A-Za-z]+)*)_\d+")
SPECIES: Final = {"1": "cat", "2": "dog"}
#: The breeds of Oxford-IIIT Pet, cats and dogs.
BREEDS: Final = frozenset(
    """
    Abyssinian Bengal Birman Bombay British_Shorthair Egyptian_Mau Maine_Coon Persian Ragdoll Russian_Blue Siamese
    Sphynx american_bulldog american_pit_bull_terrier basset_hound beagle boxer chihuahua english_cocker_spaniel
    english_setter german_shorthaired great_pyrenees havanese japanese_chin keeshond leonberger miniature_pinscher
    newfoundland pomeranian pug saint_bernard samoyed scottish_terrier shiba_inu staffordshire_bull_terrier
    wheaten_terrier yorkshire_terrier
    """.split()  # noqa: SIM905 (37 lines otherwise)
)


@dataclass(frozen=True)
class Source:
    """The data that was measured on.

    Attributes:
        root: The data folder.
        split: The split.
        pairs: The photos that were measured, in the evaluation's order.
        failed: Name and reason of each photo that could not be read.
        val_fraction: Share of trainval that is validation; None if a listing says which photos are.
        split_seed: Seed of the choice of those photos; None likewise.
    """

    root: Path
    split: Split
    pairs: Sequence[Pair]
    failed: Sequence[tuple[str, str]] = ()
    val_fraction: float | None = VAL_FRACTION
    split_seed: int | None = SPLIT_SEED


def write(
    result: Evaluation, record: Mapping[str, Any], model: OpenedModel, source: Source, path: Path, to: Path
) -> None:
    """Write report.json and report.html.

    Args:
        result: The measurement.
        record: Its summary, as ``evaluate --json`` prints it.
        model: The model that was measured.
        source: The data that it was measured on.
        path: The model's file; a ``log.csv`` beside a checkpoint gives the training curves.
        to: The folder, created if needed.

    Raises:
        DataError: A photo that was measured cannot be read again.
        OutputError: The folder cannot be written to.
    """
    values = numbers(result, record, model, source, path)
    page = report_page.page(values, cases(values, model, source.pairs))
    try:
        write_atomic(to / JSON, (json.dumps(values, indent=1, allow_nan=False) + "\n").encode())
        write_atomic(to / HTML, page.encode())
    except OSError as error:
        raise OutputError(f"{to}: cannot be written to ({error.strerror or error})") from error


def numbers(
    result: Evaluation, record: Mapping[str, Any], model: OpenedModel, source: Source, path: Path
) -> dict[str, Any]:
    """Returns all facts of the page, as JSON values. See :func:`write`.

    ``evaluation`` is the record unchanged; ``published`` is None if those figures are for other photos.
    """
    threshold = record["threshold"]
    ious = {str(border): result.image_ious(threshold, border) for border in Border}
    headline = ious[str(Border.BACKGROUND)]
    with_pet = np.asarray(result.histograms[:, 0].any(axis=1))
    best, worst = ends(headline, with_pet)
    breeds, left_out = _breeds(result, source.pairs)
    return {
        "schema_version": SCHEMA_VERSION,
        "petseg": __version__,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "evaluation": dict(record),
        "published": PUBLISHED if _comparable(source) else None,
        "model": {
            **model.describe(),
            "height": model.height,
            "width": model.width,
            "thresholds": {"used": threshold, "own": model.threshold, "cutout": model.cutout_threshold},
            "provenance": _finite(_without_keys(model.provenance)),
        },
        "data": _data(result, source),
        "species": _groups(result, threshold, [row["species"] for row in breeds]),
        "breeds": _groups(result, threshold, [row["breed"] for row in breeds], [row["species"] for row in breeds]),
        "breeds_left_out": left_out,
        "photo_iou": photo_iou(headline),
        "best": [result.names[i] for i in best],
        "worst": [result.names[i] for i in worst],
        "reliability": reliability(result.total),
        "sweep": sweep(result.total),
        "training": _training(path, model.provenance),
        "without_pet": record["photos_without_pet"],
        "missed": [name for name, iou, pet in zip(result.names, headline, with_pet, strict=True) if pet and iou == 0],
        "failed": [{"name": name, "reason": reason} for name, reason in source.failed],
        "photos": [
            {"name": name, "iou": dict(zip(ious, map(float, row), strict=True))}
            for name, *row in zip(result.names, *ious.values(), strict=True)
        ],
    }


def ends(iou: npt.NDArray[np.float64], with_pet: npt.NDArray[np.bool_]) -> tuple[list[int], list[int]]:
    """Returns the indices of the best photos, best first, and of the worst, worst first.

    A photo without a pet is never among the best, because a correct empty mask shows nothing.
    """
    order = np.argsort(iou, kind="stable")
    best = [int(i) for i in order[::-1] if with_pet[i]][: min(BEST, len(iou) // 3)]
    return best, [int(i) for i in order if i not in best][:WORST]


def photo_iou(iou: npt.NDArray[np.float64]) -> dict[str, Any]:
    """Returns the distribution of the photos' IoU: a histogram over [0, 1], mean, and percentiles."""
    found, edges = np.histogram(iou, bins=BINS, range=(0, 1))
    p5, p25, p50, p75, p95 = np.percentile(iou, (5, 25, 50, 75, 95)).tolist()
    spread = {"p5": p5, "p25": p25, "median": p50, "p75": p75, "p95": p95}
    return {"edges": edges.tolist(), "photos": found.tolist(), "mean": float(iou.mean()), **spread}


def reliability(total: Histogram) -> dict[str, Any]:
    """Compares predicted probabilities with the share of pixels that are pet, with the border ignored.

    Args:
        total: int64 [3, 256], see :func:`petseg.metrics.histogram`.

    Returns:
        ``bins``, each with its limits, pixels, mean ``predicted`` and ``observed`` share (None if empty); and
        ``expected_calibration_error``, their mean distance weighted by pixels (Guo et al. 2017, arXiv:1706.04599).
    """
    pet, background, _ = total
    bins: list[dict[str, Any]] = []
    for low in range(0, 256, LEVELS):
        part = slice(low, low + LEVELS)
        pixels = pet[part] + background[part]
        n = int(pixels.sum())
        bins.append(
            {
                "from": low / 256,
                "to": (low + LEVELS) / 256,
                "pixels": n,
                "predicted": float(pixels @ np.arange(256)[part] / 255 / n) if n else None,
                "observed": float(pet[part].sum() / n) if n else None,
            }
        )
    n = sum(row["pixels"] for row in bins)
    apart = sum(row["pixels"] * abs(row["predicted"] - row["observed"]) for row in bins if row["pixels"])
    return {"bins": bins, "pixels": n, "expected_calibration_error": apart / n if n else None}


def sweep(total: Histogram) -> dict[str, Any]:
    """Returns the ratios at all thresholds, 1/255 to 254/255, for each way to count the border; and the best one."""
    thresholds = [cut / 255 for cut in range(1, 255)]
    readings: dict[str, Any] = {}
    for border in Border:
        rows = [counts(total, threshold, border).ratios() for threshold in thresholds]
        best = best_threshold(total, border)
        readings[str(border)] = {
            **{name: [json_ratio(row[name]) for row in rows] for name in PUBLISHED},
            "best": {"threshold": best, "iou": json_ratio(counts(total, best, border).iou)},
        }
    return {"thresholds": thresholds, "readings": readings}


def cases(values: Mapping[str, Any], model: OpenedModel, pairs: Sequence[Pair]) -> dict[str, list[Case]]:
    """Segment and paint the best and worst photos.

    Raises:
        DataError: A photo cannot be read.
    """
    named = {pair.name: pair for pair in pairs}
    ious = {row["name"]: row["iou"][str(Border.BACKGROUND)] for row in values["photos"]}
    threshold = values["model"]["thresholds"]["used"]
    return {
        end: [_case(named[name], ious[name], model, threshold, name in values["without_pet"]) for name in values[end]]
        for end in ("best", "worst")
    }


def _case(pair: Pair, iou: float, model: OpenedModel, threshold: float, empty: bool) -> Case:
    photo, trimap = read_pair(pair)
    answer = model.run(images.to_model(photo, model.height, model.width)[None])[0]
    mask = images.from_model(answer, *trimap.shape) >= lowest_pet(threshold)
    small = Image.fromarray(photo)
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    pixels = np.asarray(small)
    labels, found = (
        np.asarray(Image.fromarray(plane).resize(small.size, Image.Resampling.NEAREST))
        for plane in (trimap, mask.astype(np.uint8))
    )
    pet, border = labels == PET, labels == BORDER
    truth = _paint(pixels, pet, (border, "border"))
    wrong = (found == 1) & (labels == BACKGROUND)
    seen = (pet | border) & (found == 1)
    prediction = _paint(pixels, seen, (border & seen, "border"), (wrong, "false"), (pet & ~seen, "missed"))
    return Case(pair.name, iou, empty, *(_jpeg(picture) for picture in (pixels, truth, prediction)))


def _paint(photo: npt.NDArray[np.uint8], bright: npt.NDArray[np.bool_], *tints: Any) -> npt.NDArray[np.uint8]:
    """Darken a photo except where ``bright``, and tint it by each (mask, colour name)."""
    light = photo.astype(np.float32)
    picture = np.where(bright[..., None], light, 0.28 * light)
    for mask, name in tints:
        picture[mask] = 0.4 * light[mask] + 0.6 * np.array(report_page.TINTS[name], np.float32)
    return picture.astype(np.uint8)


def _jpeg(pixels: npt.NDArray[np.uint8]) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=82)
    return file.getvalue()


def _comparable(source: Source) -> bool:
    """Whether the published figures are for these photos: the data set's test split, all or part of it.

    Other photos may have the same layout; they are recognized by their names.
    """
    names = [NAME.fullmatch(pair.name) for pair in source.pairs]
    known = all(match and match[1] in BREEDS for match in names) and len(names) <= report_page.TEST_PHOTOS
    return known and source.split is Split.TEST and all(pair.layout is Layout.OXFORD for pair in source.pairs)


def _data(result: Evaluation, source: Source) -> dict[str, Any]:
    pixels = dict(zip(("pet", "background", "border"), result.total.sum(axis=1).tolist(), strict=True))
    known: dict[str, Any] = {
        "folder": str(source.root),
        "layout": str(source.pairs[0].layout),
        "split": str(source.split),
    }
    if source.split in (Split.TRAIN, Split.VAL):
        drawn = {"val_fraction": source.val_fraction, "split_seed": source.split_seed}
        known |= {"val_listing": VAL_LISTING} if source.val_fraction is None else drawn
    return {**known, "photos": len(result.names), "failed": len(source.failed), "pixels": pixels}


def _breeds(result: Evaluation, pairs: Sequence[Pair]) -> tuple[list[dict[str, str]], str | None]:
    """Returns breed and species of each photo; or none, and the reason."""
    if any(pair.layout is not Layout.OXFORD for pair in pairs):
        return [], "This data set is a folder of photos and masks, which names no breeds."
    matches = [NAME.fullmatch(name) for name in result.names]
    if strange := [name for name, match in zip(result.names, matches, strict=True) if match is None]:
        return [], f"Not every photo is named BREED_NUMBER, as in Oxford-IIIT Pet (for example {strange[0]})."
    listed = _listed_species(pairs[0].mask.parent.parent)
    rows = []
    for name, match in zip(result.names, matches, strict=True):
        assert match is not None
        if name not in listed and match[1] not in BREEDS:
            return [], f"It is not known for every photo whether it shows a cat or a dog (for example {name})."
        species = listed.get(name) or ("cat" if name[0].isupper() else "dog")
        rows.append({"breed": match[1].replace("_", " "), "species": species})
    return rows, None


def _listed_species(annotations: Path) -> dict[str, str]:
    """Returns the species of each name in the data set's lists (``NAME CLASS SPECIES BREED``), as far as listed."""
    found: dict[str, str] = {}
    for listing in ("trainval.txt", "test.txt", "list.txt"):
        try:
            lines = (annotations / listing).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError):
            continue
        for words in map(str.split, lines):
            if len(words) >= 3 and not words[0].startswith("#") and words[2] in SPECIES:
                found[words[0]] = SPECIES[words[2]]
    return found


def _groups(
    result: Evaluation, threshold: float, labels: Sequence[str], species: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """Returns the IoU of the photos with each label, best first: over all their pixels, and their mean IoU."""
    rows = []
    each = result.image_ious(threshold)
    for label in sorted(set(labels)):
        mine = np.array([other == label for other in labels])
        total = counts(result.histograms[mine].sum(axis=0), threshold)
        kind = {"species": species[labels.index(label)]} if species else {}
        values = {
            "iou": json_ratio(total.iou),
            "dice": json_ratio(total.dice),
            "mean_image_iou": float(each[mine].mean()),
        }
        rows.append({"name": label, **kind, "photos": int(mine.sum()), **values})
    return sorted(rows, key=lambda row: (-row["iou"], row["name"]))


def _training(path: Path, provenance: Mapping[str, Any]) -> dict[str, Any] | None:
    """Returns the columns of the log beside a checkpoint, and the checkpoint's epoch; None if there is no log."""
    file = path.parent / log.LOG
    if path.suffix != ".safetensors" or not file.is_file():
        return None
    try:
        rows = log.read(file)
    except TrainingError:  # the curves are optional; a log that was edited by hand must not fail the report
        rows = []
    curves = ("epoch", "loss", "val_iou", "val_dice")
    columns = {name: [_finite(getattr(row, name)) for row in rows] for name in curves}
    if not rows or None in columns["epoch"]:
        return {"problem": f"{log.LOG} beside the checkpoint is not a log of petseg train"}
    epoch = provenance.get("epoch")
    drawn = isinstance(epoch, int | float) and 0 < epoch < 1e9  # not NaN or infinity, which JSON does not have
    return {"log": columns, "checkpoint_epoch": epoch if drawn else None}


def _without_keys(provenance: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a provenance without the keys of its photos."""
    data = provenance.get("data")
    return {**provenance, **({"data": without_keys(data)} if isinstance(data, dict) else {})}


def _finite(value: Any) -> Any:
    """Replaces NaN and infinity by None: a checkpoint's JSON may contain them, but other readers reject them."""
    if isinstance(value, dict):
        return {str(name): _finite(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
