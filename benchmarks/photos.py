"""The photos that benchmarks run on, in a folder DATA.

`petseg data download DATA` brings the official data set, DATA/oxford-iiit-pet, and most benchmarks run on that;
`embedded` and `found` need the folders that our records are from. These are what could be had where they were made, and
go first if they are there: copies of 128 x 128 pixels of most photos (-128), the original files of three breeds
(-native), more photos at their own size (-extra-images), and what benchmarks/embedded/merge.py makes of them to train
on (-best).
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Final, NoReturn

import numpy as np

OFFICIAL: Final = "oxford-iiit-pet"
COPIES, NATIVE, EXTRA, BEST = (f"{OFFICIAL}-{part}" for part in ("128", "native", "extra-images", "best"))
#: What is told of the test photos of each folder.
TEST_SETS: Final = {
    COPIES: "3000 of 3669 test images, 128×128 copies",
    NATIVE: "242 test images at their original size (three breeds)",
    OFFICIAL: "3669 test images at their original size",
}


def test_sets(data: Path) -> dict[str, Path]:
    """Folders with test photos, by what is told of them."""
    found = {what: data / name for name, what in TEST_SETS.items() if (data / name).is_dir()}
    return found or missing(data)


def training_set(data: Path) -> Path:
    """Photos to train on, to validate on, and to calibrate int8 with."""
    return first(data, BEST, OFFICIAL)


def original_size(data: Path) -> Path:
    """Photos and masks at their original size."""
    return first(data, NATIVE, OFFICIAL)


def chosen(data: Path, count: int) -> list[Path]:
    """So many of the photos at their original size, from all over the set."""
    found = sorted((original_size(data) / "images").glob("*.jpg"))
    return [found[index] for index in np.linspace(0, len(found) - 1, count).astype(int)]


def of_any_use(data: Path) -> list[Path]:
    """Folders with photos at their own size, masks or not."""
    folders = [data / name / "images" for name in (NATIVE, EXTRA)]
    return [folder for folder in folders if folder.is_dir()] or [first(data, OFFICIAL) / "images"]


def first(data: Path, *names: str) -> Path:
    """The first of the folders that is there."""
    there = [data / name for name in names if (data / name).is_dir()]
    return there[0] if there else missing(data)


def missing(data: Path) -> NoReturn:
    """There are no photos."""
    sys.exit(f"{data} holds no {OFFICIAL}: run `petseg data download {data}`, or name another folder with --data")
