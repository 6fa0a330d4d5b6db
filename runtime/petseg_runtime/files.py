"""Files that are either whole or not there: written beside their place, then renamed; small ones that are read; and
where files really are.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

__all__ = [
    "STEM",
    "is_at",
    "read_text",
    "real_paths",
    "replacing",
    "staging",
    "synced",
    "synced_folder",
    "write_atomic",
]

#: So many letters of a file's stem are in the name that it has while it is written: a name has at most 255 bytes, and a
#: letter up to four.
STEM: Final = 35


def read_text(path: Path, most: int) -> str:
    """A file's text, where somebody else may have put there what never ends: a pipe, a device.

    Args:
        path: The file.
        most: Bytes that it may have.

    Raises:
        OSError: It cannot be read, is no regular file, or is larger.
        UnicodeDecodeError: It is not UTF-8.
    """
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0)  # a pipe would be waited for
    with os.fdopen(os.open(path, flags), "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        data = file.read(most + 1)
    if len(data) > most:
        raise OSError(errno.EFBIG, f"larger than {most} bytes", str(path))
    return data.decode()


def is_at(descriptor: int, path: Path) -> bool:
    """Whether an open file is what now lies at a path."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.lstat())
    except FileNotFoundError:
        return False


def real_paths() -> Callable[[str | Path], str]:
    """What gives files' real paths as ``os.path.realpath`` does, and looks up each folder once, not for each of a
    million files in it.
    """
    folder = functools.cache(os.path.realpath)  # Path.resolve raises on a loop of links

    def real(path: str | Path) -> str:
        above, name = os.path.split(path)
        if name in ("", os.curdir, os.pardir) or os.path.islink(path):  # noqa: PTH114 (a text, one of a million)
            return os.path.realpath(path)
        return os.path.join(folder(above), name)  # noqa: PTH118

    return real


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A free path in the destination's folder to write to; renamed to ``path`` at the end, removed on any error.

    The rename is atomic because both lie on one file system. The folder is made if need be.

    Raises:
        OSError: The folder cannot be made or written to.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # Writers may go by the suffix, so it stays if it is one.
    suffix = path.suffix if len(path.suffix) <= 20 else ""
    beside = path.with_name(f".{path.stem[:STEM]}.{secrets.token_hex(4)}.part{suffix}")
    try:
        yield beside
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def staging(path: Path) -> Iterator[Path]:
    """A free folder beside ``path`` for all files that belong to it, under the names they will have.

    At the end they are moved to where ``path`` lies, ``path`` itself last; on any error, also of a move, the folder is
    removed and what was there before is there again.

    Raises:
        OSError: The folder cannot be made, or the files cannot be moved.
    """
    missing = [parent for parent in (path.parent, *path.parent.parents) if not parent.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = path.with_name(f".{path.stem[:STEM]}.{secrets.token_hex(4)}.part")
    folder.mkdir()
    try:
        yield folder
        files = sorted(folder.iterdir(), key=lambda file: file.name == path.name)
        _swap([(file, path.with_name(file.name)) for file in files], folder)
    except BaseException:
        shutil.rmtree(folder)
        for parent in missing:
            with contextlib.suppress(OSError):  # somebody else has put something there
                parent.rmdir()
        raise
    shutil.rmtree(folder)


def _swap(moves: list[tuple[Path, Path]], folder: Path) -> None:
    """Move each file to its place, or none; what was there waits in ``folder`` until all have arrived."""
    for _, place in moves:
        if place.is_dir():  # found out before anything is moved
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(place))
    with contextlib.ExitStack() as undo:
        for number, (file, place) in enumerate(moves):
            if number < len(moves) - 1:  # the last one is there or not, and needs no way back
                before, occupied = folder / f".{number}.before", os.path.lexists(place)
                undo.callback(_restore, before, place, occupied)
                if occupied:
                    place.replace(before)
            file.replace(place)
        undo.pop_all()


def _restore(before: Path, place: Path, occupied: bool) -> None:
    if not occupied:
        place.unlink(missing_ok=True)
    elif os.path.lexists(before):
        before.replace(place)


@contextlib.contextmanager
def synced(path: Path) -> Iterator[None]:
    """Have the disk itself hold a file that is written and closed in between; after an error nothing is done.

    Raises:
        OSError: The disk does not take it.
    """
    yield
    with path.open("rb+") as file:  # Windows flushes only what is open for writing
        os.fsync(file.fileno())


@contextlib.contextmanager
def synced_folder(folder: Path) -> Iterator[None]:
    """Have the disk itself hold the names that files are given in between, as far as the system can do that."""
    yield
    with contextlib.suppress(OSError):  # neither Windows nor every network's file system can
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_atomic(path: Path, data: bytes) -> None:
    """Write ``data`` to ``path``, whole or not at all, flushed to the disk before the rename.

    Raises:
        OSError: It cannot be written; whatever was at ``path`` before still is.
    """
    with replacing(path) as beside, beside.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
