"""Folders of numbered files: which numbers are free, which folders are petseg's, and what a shorter run removes."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from petseg_runtime.errors import OutputError
from petseg_runtime.video.errors import writing_errors

__all__ = [
    "OWN",
    "PICTURE_DIGITS",
    "SEGMENT_DIGITS",
    "claim",
    "claimable",
    "create_new",
    "drop_later",
    "next_number",
    "numbered",
    "pieces",
    "zero_padded",
]

#: Marks a folder of one video's numbered files as petseg's own: the next run replaces them, and removes those left by a
#: longer run. In a folder without it, existing files are never touched.
OWN: Final = ".petseg-numbered"

#: The least number of digits in the file name of a segment, and of a picture.
SEGMENT_DIGITS, PICTURE_DIGITS = 4, 6


def next_number(folder: Path) -> int:
    """One more than the highest number that is the stem of a file or folder there: a run replaces nothing.

    Raises:
        OutputError: It is not a folder, or cannot be listed.
    """
    names = []
    with writing_errors(folder), contextlib.suppress(FileNotFoundError):
        names = [entry.stem for entry in folder.iterdir()]
    return 1 + max((int(name) for name in names if name.isdecimal()), default=0)


def numbered(folder: Path, suffix: str) -> Iterator[Path]:
    """Yield ``0001.mp4``, ``0002.mp4``, ..., from the first number after the existing ones.

    Raises:
        OutputError: See :func:`next_number`.
    """
    for number in itertools.count(next_number(folder)):
        yield folder / f"{zero_padded(number, SEGMENT_DIGITS)}.{suffix}"


def pieces(folder: Path, suffix: str) -> Iterator[Path]:
    """Yield ``0001.mp4``, ``0002.mp4``, ..., replacing those of an earlier run.

    Raises:
        OutputError: See :func:`claim`.
    """
    claim(folder)
    for number in itertools.count(1):
        yield folder / f"{zero_padded(number, SEGMENT_DIGITS)}.{suffix}"


def claim(folder: Path) -> None:
    """Create a folder for numbered files that may be replaced and removed, and mark it as petseg's.

    Raises:
        OutputError: It holds other files, or cannot be created.
    """
    claimable(folder)
    with writing_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / OWN).touch()


def claimable(folder: Path) -> None:
    """Raise an ``OutputError`` if a folder holds files that petseg did not write; see :func:`claim`."""
    with writing_errors(folder):
        foreign = folder.is_dir() and not (folder / OWN).exists() and any(folder.iterdir())
    if foreign:
        raise OutputError(
            f"{folder}: holds files that petseg did not write, and numbered ones could be replaced; "
            "choose another --output, or move them"
        )


def create_new(path: Path) -> bool:
    """Create a file unless it exists, and return whether it is new: others may be recording into the same folder.

    Raises:
        OutputError: The file cannot be created.
    """
    with writing_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            path.touch(exist_ok=False)
            return True
    return False


def drop_later(last: Path, least: int) -> None:
    """Remove what a longer run has left after the last picture or segment of this one: a folder is one result."""
    with writing_errors(last.parent):
        numbers = {path.stem for path in last.parent.iterdir() if path.suffix == last.suffix and path.stem.isdecimal()}
        # Numbers with more digits, such as dates, belong to somebody else, unless those with fewer were used up.
        most = len(last.stem)
        while "9" * most in numbers:
            most += 1
        for stem in numbers:
            if len(stem) <= most and int(stem) > int(last.stem) and stem == zero_padded(int(stem), least):
                last.with_stem(stem).unlink()


def zero_padded(number: int, least: int) -> str:
    """A number with leading zeros, up to ``least`` digits, so that file names sort as numbers do."""
    return f"{number:0{least}d}"
