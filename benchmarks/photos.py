"""The photos that benchmarks run on, in a folder DATA.

`petseg data download DATA` downloads the official data set to DATA/oxford-iiit-pet, which most benchmarks can use.
`embedded` and `found` need the folders that our records were made with: what was available there. They take precedence
if they exist: copies of most photos at 128 x 128 pixels (-128), the original files of three breeds (-native), more
photos at their original size (-extra-images), and the training set that benchmarks/embedded/merge.py makes of them
(-best).
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Final, NoReturn

import click
import numpy as np

OFFICIAL: Final = "oxford-iiit-pet"
COPIES, NATIVE, EXTRA, BEST = (f"{OFFICIAL}-{part}" for part in ("128", "native", "extra-images", "best"))
#: The option of the commands that run on these photos.
data_option: Final = click.option(
    "--data", type=click.Path(path_type=Path), default=Path("data"), show_default=True, help="Folder of the data sets."
)
#: Description of each folder's test photos, which is its key in records.
TEST_SETS: Final = {
    COPIES: "3000 of 3669 test images, 128×128 copies",
    NATIVE: "242 test images at their original size (three breeds)",
    OFFICIAL: "3669 test images at their original size",
}


def test_sets(data: Path) -> dict[str, Path]:
    """Return the folders with test photos, by their description."""
    found = {what: data / name for name, what in TEST_SETS.items() if (data / name).is_dir()}
    return found or missing(data)


def training_set(data: Path) -> Path:
    """Return the folder of photos for training, validation and the calibration of int8."""
    return first(data, BEST, OFFICIAL)


def original_size(data: Path) -> Path:
    """Return the folder of photos and masks at their original size."""
    return first(data, NATIVE, OFFICIAL)


def chosen(data: Path, count: int) -> list[Path]:
    """Return ``count`` photos at their original size, spread evenly over the set."""
    found = sorted((original_size(data) / "images").glob("*.jpg"))
    return [found[index] for index in np.linspace(0, len(found) - 1, count).astype(int)]


def original_size_folders(data: Path) -> list[Path]:
    """Return folders with photos at their original size, with masks or without."""
    folders = [data / name / "images" for name in (NATIVE, EXTRA)]
    return [folder for folder in folders if folder.is_dir()] or [first(data, OFFICIAL) / "images"]


def first(data: Path, *names: str) -> Path:
    """Return the first of the folders that exists."""
    there = [data / name for name in names if (data / name).is_dir()]
    return there[0] if there else missing(data)


def missing(data: Path) -> NoReturn:
    """Exit, as there are no photos."""
    sys.exit(f"{data}: contains no {OFFICIAL}; run `petseg data download {data}`, or name another folder with --data")
