"""Folders of numbered files: which number is free, whose the files are, and which of them a shorter run removes."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from petseg_runtime.errors import OutputError
from petseg_runtime.video.errors import errors_at

__all__ = [
    "OF_PICTURE",
    "OF_PIECE",
    "OWN",
    "claim",
    "claimable",
    "claimed",
    "digits",
    "drop_later",
    "next_number",
    "numbered",
    "pieces",
]

#: Marks a folder of one video's numbered files as petseg's own: the next run replaces them, and removes those that are
#: left of a longer run. In a folder without it, nothing that is there is touched.
OWN: Final = ".petseg-numbered"

#: Digits of a piece's and of a picture's number, if it has no more.
OF_PIECE, OF_PICTURE = 4, 6


def next_number(folder: Path) -> int:
    """The lowest number above all that files and folders in a folder begin with: what a run adds replaces nothing.

    Raises:
        OutputError: It is no folder, or cannot be listed.
    """
    names = []
    with errors_at(folder), contextlib.suppress(FileNotFoundError):
        names = [entry.stem for entry in folder.iterdir()]
    return 1 + max((int(name) for name in names if name.isdecimal()), default=0)


def numbered(folder: Path, suffix: str) -> Iterator[Path]:
    """``0001.mp4``, ``0002.mp4``, ... after those that are there.

    Raises:
        OutputError: See :func:`next_number`.
    """
    for number in itertools.count(next_number(folder)):
        yield folder / f"{digits(number, OF_PIECE)}.{suffix}"


def pieces(folder: Path, suffix: str) -> Iterator[Path]:
    """``0001.mp4``, ``0002.mp4``, ..., in place of those of an earlier run.

    Raises:
        OutputError: See :func:`claim`.
    """
    claim(folder)
    for number in itertools.count(1):
        yield folder / f"{digits(number, OF_PIECE)}.{suffix}"


def claim(folder: Path) -> None:
    """Make a folder for numbered files that may be replaced and removed, and say in it that they are petseg's.

    Raises:
        OutputError: It holds files that are not, or it cannot be made.
    """
    claimable(folder)
    with errors_at(folder):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / OWN).touch()


def claimable(folder: Path) -> None:
    """Refuse a folder with files that petseg did not write; see :func:`claim`."""
    with errors_at(folder):
        foreign = folder.is_dir() and not (folder / OWN).exists() and any(folder.iterdir())
    if foreign:
        raise OutputError(
            f"{folder}: holds files that petseg did not write, and numbered ones could be replaced; "
            "choose another --output, or move them"
        )


def claimed(path: Path) -> bool:
    """Whether a name was nobody's and now is ours: another process may be recording into the same folder.

    Raises:
        OutputError: The file cannot be made.
    """
    with errors_at(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            path.touch(exist_ok=False)
            return True
    return False


def drop_later(last: Path, least: int) -> None:
    """Remove what a longer run has left behind the last picture or piece of this one: together they are one result."""
    with errors_at(last.parent):
        alike = {path.stem for path in last.parent.iterdir() if path.suffix == last.suffix and path.stem.isdecimal()}
        # Numbers with more digits, such as dates, are somebody's, unless those with fewer were used up.
        most = len(last.stem)
        while "9" * most in alike:
            most += 1
        for stem in alike:
            if len(stem) <= most and int(stem) > int(last.stem) and stem == digits(int(stem), least):
                last.with_stem(stem).unlink()


def digits(number: int, least: int) -> str:
    """A number in a file's name, so that names sort as numbers do, up to so many digits."""
    return f"{number:0{least}d}"
