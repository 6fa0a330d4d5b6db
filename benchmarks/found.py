"""``python -m benchmarks found``: how often ``Segmentation.found`` misses a pet, and how often it raises a false alarm.

    python -m benchmarks found --data data --pet-free FOLDER

The built-in model's rule has constants (`certain_share` in its specification, LIKELY in petseg_runtime/result.py and
CERTAIN in petseg_runtime/regions.py). They are chosen on the *choose* half: the validation photos of the merged set
(see benchmarks/embedded/merge.py), pet-free crops of them, and one half of the pet-free photos. The rates are measured
on the *report* half: test photos, their crops, and the other half. The test photos at their original size are also
among the copies, so the two are not added up.

There are two kinds of pet-free pictures. Crops are the strips above, below, left and right of everything that a trimap
marks as pet or border, if they are at least a quarter of the photo high and wide. They represent rooms and gardens
well, and are wrong where a trimap omits a second pet. Whole photos are in FOLDER/KIND/SOURCE/NAME.jpg, where KIND is

    photos      landscapes, buildings, people, things
    animals     animals other than cats and dogs: the hard case; not used to choose the constants
    pictures    drawings, paintings, textures, pictures from microscopes and telescopes; only reported

and SOURCE is the Debian or Python package they come from. None of them is in this repository; the record lists their
names, and ``python -m benchmarks pet-free`` extracts them from the packages. A hash of SOURCE/NAME splits them into
halves.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeAlias

import click
import numpy as np
import numpy.typing as npt

from benchmarks import records
from petseg.data import Pair, Split, find, read_pair
from petseg.metrics import BACKGROUND
from petseg_runtime import regions, result
from petseg_runtime.images import ImageSource
from petseg_runtime.segmenter import Segmenter

F64: TypeAlias = npt.NDArray[np.float64]
Parts: TypeAlias = dict[str, tuple[str, Split]]

#: Smallest height and width of a crop, as a share of its photo's.
CROP: Final = 0.25
KINDS: Final = ("photos", "animals", "pictures")
CHOOSE: Final[Parts] = {"validation": ("oxford-iiit-pet-best", Split.VAL)}
REPORT: Final[Parts] = {
    "test, original size": ("oxford-iiit-pet-native", Split.TEST),
    "test, 128×128 copies": ("oxford-iiit-pet-128", Split.TEST),
}

#: Statistics that a rule could use, as functions of histograms, float64 [photos, 256], each of which sums to 1.
STATISTICS: Final[dict[str, Callable[[F64], F64]]] = {
    "share of the photo of at least 0.6 (the mask)": lambda h: _share(h, 152),
    "share of the photo of at least 0.98": lambda h: _share(h, 250),
    "mean probability where it is at least 0.5": lambda h: _ratio(
        h[:, 128:] @ np.arange(128, 256) / 255, _share(h, 128)
    ),
    "largest probability but for 1 % of the photo": lambda h: (np.cumsum(h, axis=1) <= 0.99).sum(axis=1) / 255,
    "share of at least 0.90 in what is at least 0.5": lambda h: _ratio(_share(h, 230), _share(h, 128)),
    "share of at least 0.95 in what is at least 0.5": lambda h: _ratio(_share(h, 242), _share(h, 128)),
    "share of at least 0.98 in what is at least 0.5": lambda h: _ratio(_share(h, 250), _share(h, 128)),
    "share of at least 0.99 in what is at least 0.5": lambda h: _ratio(_share(h, 253), _share(h, 128)),
}


@dataclass(frozen=True, eq=False)
class Group:
    """The model's results on photos of one kind.

    Attributes:
        kind: ``pets``, ``crops`` or one of KINDS.
        source: The part of the data set, or the package.
        names: Names of the photos.
        histograms: float64 [photos, 256], of the probability; each sums to 1.
        found: bool [photos].
    """

    kind: str
    source: str
    names: list[str]
    histograms: F64
    found: npt.NDArray[np.bool_]

    @property
    def wrong(self) -> npt.NDArray[np.bool_]:
        """bool [photos]: missed pets for ``pets``, else false alarms."""
        return ~self.found if self.kind == "pets" else self.found


@click.command()
@click.option("--data", type=click.Path(path_type=Path), required=True, help="Folder of the data sets.")
@click.option("--pet-free", type=click.Path(path_type=Path), help="Photos without cats and dogs: KIND/SOURCE/NAME.jpg.")
def found(data: Path, pet_free: Path | None) -> None:
    """Measure how often `Segmentation.found` is wrong on photos with and without a pet."""
    with Segmenter(threads=1) as segmenter:
        halves = [
            [*labelled(segmenter, data, parts), *(whole_photos(segmenter, pet_free, half) if pet_free else ())]
            for half, parts in enumerate((CHOOSE, REPORT))
        ]
        share = segmenter.artifact.spec.certain_share
        model = {"file": segmenter.artifact.path.name, "engine": dataclasses.asdict(segmenter.describe())}
    choose, report = halves
    values = {
        "model": model,
        "rule": {"likely": result.LIKELY, "certain": regions.CERTAIN, "certain_share": share},
        "report": errors(report),
        "choose": errors(choose),
        "rules_considered": {name: best(statistic, choose) for name, statistic in STATISTICS.items()},
        "pet_free_photos": {
            f"{group.kind}/{group.source}/{half}": group.names
            for half, groups in (("choose", choose), ("report", report))
            for group in groups
            if group.kind in KINDS
        },
    }
    click.echo(records.write("found", "python -m benchmarks found --data DATA --pet-free FOLDER", values))


def labelled(segmenter: Segmenter, data: Path, parts: Parts) -> Iterator[Group]:
    """Run the model on these parts of the data set, and on their pet-free crops."""
    for source, (folder, split) in parts.items():
        pairs = find(data / folder, split)
        yield group_of(segmenter, "pets", source, ((pair.name, pair.image) for pair in pairs))
        yield group_of(segmenter, "crops", source, (crop for pair in pairs for crop in crops(pair)))


def whole_photos(segmenter: Segmenter, folder: Path, half: int) -> Iterator[Group]:
    """Run the model on the photos of a folder KIND/SOURCE/ that belong to one half."""
    for kind in KINDS:
        for source in sorted((folder / kind).iterdir()):
            photos = [(path.stem, path) for path in sorted(source.iterdir())]
            hashes = (hashlib.sha256(f"{source.name}/{name}".encode()).digest() for name, _ in photos)
            mine = [photo for photo, digest in zip(photos, hashes, strict=True) if digest[0] % 2 == half]
            if mine:
                yield group_of(segmenter, kind, source.name, mine)


def crops(pair: Pair) -> Iterator[tuple[str, ImageSource]]:
    """Yield the strips of a photo beside all pet and border pixels; none if the trimap is empty, a known flaw."""
    pixels, trimap = read_pair(pair)
    height, width = trimap.shape
    rows, columns = (np.flatnonzero((trimap != BACKGROUND).any(axis=axis)) for axis in (1, 0))
    if not len(rows):
        return
    strips = {
        "above": pixels[: rows[0]],
        "below": pixels[rows[-1] + 1 :],
        "left": pixels[:, : columns[0]],
        "right": pixels[:, columns[-1] + 1 :],
    }
    for side, strip in strips.items():
        if strip.shape[0] >= CROP * height and strip.shape[1] >= CROP * width:
            yield f"{pair.name}, {side}", strip


def group_of(segmenter: Segmenter, kind: str, source: str, photos: Iterable[tuple[str, ImageSource]]) -> Group:
    """Run the model on photos, given as (name, photo)."""
    names, histograms, answers = [], [], []
    for name, photo in photos:
        answer = segmenter(photo)
        names.append(name)
        histograms.append(np.bincount(answer.probability.ravel(), minlength=256) / answer.probability.size)
        answers.append(answer.found)
    return Group(kind, source, names, np.array(histograms), np.array(answers, np.bool_))


def errors(groups: list[Group]) -> dict[str, Any]:
    """Return the error rates of each kind by source; for whole photos also of all sources together."""
    rates: dict[str, Any] = {}
    for group in groups:
        rates.setdefault(group.kind, {})[group.source] = rate(group.wrong)
    for kind in set(KINDS) & set(rates):
        rates[kind]["all"] = rate(np.concatenate([group.wrong for group in groups if group.kind == kind]))
    return rates


def rate(wrong: npt.NDArray[np.bool_]) -> dict[str, Any]:
    """Return how many are wrong, the rate, and its 95 % interval (Wilson 1927)."""
    n, k, z = len(wrong), int(wrong.sum()), 1.96
    middle = (k + z * z / 2) / (n + z * z)
    half = z / (n + z * z) * math.sqrt(k * (n - k) / n + z * z / 4)
    interval = [round(max(middle - half, 0), 4), round(min(middle + half, 1), 4)]
    return {"photos": n, "wrong": k, "rate": round(k / n, 4), "interval_95": interval}


def best(statistic: Callable[[F64], F64], groups: list[Group]) -> dict[str, Any]:
    """Return the threshold of a statistic that minimizes the sum of miss rate and false alarm rate, and its rates.

    Crops and whole photos each count as half of the false alarm rate, however many there are.
    """
    kinds = dict.fromkeys(group.kind for group in groups)
    values = {k: statistic(np.concatenate([g.histograms for g in groups if g.kind == k])) for k in kinds}
    free = [kind for kind in ("crops", "photos") if kind in values]

    def total(threshold: float) -> float:
        alarms = [float((values[kind] >= threshold).mean()) for kind in free]
        return float((values["pets"] < threshold).mean()) + sum(alarms) / len(alarms)

    threshold = min((float(value) for value in np.unique(values["pets"])), key=total)
    rates = {kind: rate((v < threshold) if kind == "pets" else (v >= threshold)) for kind, v in values.items()}
    return {"threshold": round(threshold, 4), "misses_plus_false_alarms": round(total(threshold), 4), **rates}


def _share(histograms: F64, lowest: int) -> F64:
    return np.asarray(histograms[:, lowest:].sum(axis=1))


def _ratio(part: F64, whole: F64) -> F64:
    return np.asarray(part / np.where(whole > 0, whole, 1))
