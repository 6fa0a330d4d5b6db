"""Where photos come from: files, folders, patterns, standard input; each with the name its result will bear."""

from __future__ import annotations

import glob
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Final

from petseg_runtime.errors import InputError
from petseg_runtime.images import MAX_BYTES

__all__ = ["IMAGE_SUFFIXES", "STDIN", "Item", "find_photos"]

#: Standard input, on the command line.
STDIN: Final = Path("-")

#: What is taken from a folder; a file that is named outright is tried whatever its suffix.
IMAGE_SUFFIXES: Final = frozenset(
    {".avif", ".bmp", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".mpo", ".png", ".ppm", ".tif", ".tiff", ".webp"}
)


@dataclass(frozen=True)
class Item:
    """One photo to segment.

    Attributes:
        source: Where it is; :data:`STDIN` for standard input.
        name: Its result's path relative to the output folder, without suffix; no two items share one.
        problem: Why it cannot be read, where that is known before trying (a folder that may not be listed).
        data: The encoded image, where it does not lie at ``source``.
    """

    source: Path
    name: PurePath
    problem: str | None = None
    data: bytes | None = None


def find_photos(paths: Sequence[Path], output: Path | None = None) -> list[Item]:
    """What to segment, in a stable order, with names that keep the folders' structure and never collide.

    A result is named after its photo's stem. Photos whose stems collide (``cat.jpg`` and ``cat.png``) keep their
    suffix as part of the name (``cat.jpg.png`` and ``cat.png.png``), and what still collides is numbered. The names
    follow from the arguments and the folders' contents alone, so a second run gives the same ones.

    Args:
        paths: Files, folders to be searched with all their sub-folders, patterns such as ``photos/**/*.jpg`` (for
            shells that do not expand them), and ``-`` for an image on standard input. With several folders, each
            one's own name is the first part of its results' names; below a pattern, the part without wildcards is
            left out of them.
        output: Where results will be written; a search passes over it.

    Returns:
        One item per photo. What does not exist is an item too: it will fail and be counted.

    Raises:
        InputError: Standard input is asked for twice.
    """
    if sum(path == STDIN for path in paths) > 1:
        raise InputError("standard input (-) can be read once only")
    several = sum(_is_folder(path) for path in paths) > 1
    skipped = Path(os.path.realpath(output)) if output else None  # Path.resolve raises on a loop of links
    found: list[tuple[Path, PurePath, str | None]] = []
    for path in paths:
        if _is_folder(path):
            own_name = PurePath(path.resolve().name or "root")
            prefix = own_name if several else PurePath()
            for file, problem in _walk(path, skipped):
                relative = prefix / file.relative_to(path)
                found.append((file, relative if relative.name else own_name, problem))
        elif path == STDIN:
            found.append((path, PurePath("stdin"), None))
        elif glob.has_magic(str(path)) and not os.path.lexists(path):
            found += _matching(path, skipped)
        else:
            found.append((path, PurePath(path.name), None))
    names = _unique([relative for _, relative, _ in found])
    return [
        Item(file, name, problem, _standard_input() if file == STDIN else None)
        for (file, _, problem), name in zip(found, names, strict=True)
    ]


def _standard_input() -> bytes:
    """What comes on standard input; a byte more than the limit is enough to see that it is too much."""
    return sys.stdin.buffer.read(MAX_BYTES + 1)


def _matching(pattern: Path, skipped: Path | None) -> list[tuple[Path, PurePath, str | None]]:
    """Photos that fit a pattern, sorted, and those in folders that fit it; none is a problem, not a silence."""
    fixed = pattern
    while glob.has_magic(str(fixed)):
        fixed = fixed.parent
    if skipped and Path(os.path.realpath(fixed)).is_relative_to(skipped):  # it is asked for by name
        skipped = None
    found: list[tuple[Path, PurePath, str | None]] = []
    for match in sorted(glob.glob(str(pattern), recursive=True)):  # noqa: PTH207 (Path.glob takes relative ones only)
        path = Path(match)
        if skipped and Path(os.path.realpath(path)).is_relative_to(skipped):
            continue
        files = _walk(path, skipped) if _is_folder(path) else [(path, None)]
        # With `**` a folder and the files in it both fit: each photo is taken once.
        found += [(file, file.relative_to(fixed), problem) for file, problem in files]
    once = list({file: (file, relative, problem) for file, relative, problem in found}.values())
    return once or [(pattern, PurePath("pattern"), f"{pattern}: no file fits this pattern")]


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:  # a name that is too long, or a folder on the way that may not be entered: reading it will say so
        return False


def _walk(folder: Path, skipped: Path | None) -> Iterator[tuple[Path, str | None]]:
    """Photos below a folder, sorted; a folder that cannot be listed is a problem, not a silence."""
    problems: list[OSError] = []
    for where, folders, files in os.walk(folder, onerror=problems.append):
        here = Path(where)
        folders[:] = sorted(f for f in folders if not f.startswith(".") and (here / f).resolve() != skipped)
        for name in sorted(files):
            if not name.startswith(".") and Path(name).suffix.lower() in IMAGE_SUFFIXES:
                yield here / name, None
    for error in problems:
        yield Path(str(error.filename)), f"{error.filename}: the folder cannot be listed ({error.strerror})"


def _unique(relatives: Sequence[PurePath]) -> list[PurePath]:
    """Names without collisions, also where upper and lower case are one (macOS, Windows, exFAT cards)."""
    by_stem = Counter(_key(relative.with_suffix("")) for relative in relatives)
    wanted = [r.with_suffix("") if by_stem[_key(r.with_suffix(""))] == 1 else r for r in relatives]
    return list(_numbered(wanted))


def _numbered(wanted: Iterable[PurePath]) -> Iterator[PurePath]:
    wanted = list(wanted)
    taken: set[str] = set()
    reserved = Counter(_key(name) for name in wanted)
    for name in wanted:
        candidate, number = name, 1
        # A number must not run into a name that another photo has by right.
        while _key(candidate) in taken or (number > 1 and _key(candidate) in reserved):
            number += 1
            candidate = name.with_name(f"{name.name}-{number}")
        taken.add(_key(candidate))
        yield candidate


def _key(name: PurePath) -> str:
    return str(name).casefold()
