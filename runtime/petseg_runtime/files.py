"""Files that are either whole or not there: written beside their place, then renamed."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

__all__ = ["replacing", "staging", "write_atomic"]


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A free path in the destination's folder to write to; renamed to ``path`` at the end, removed on any error.

    The rename is atomic because both lie on one file system. The folder is made if need be.

    Raises:
        OSError: The folder cannot be made or written to.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # A name has at most 255 bytes, and a letter up to four. Writers may go by the suffix, so it stays if it is one.
    suffix = path.suffix if len(path.suffix) <= 20 else ""
    beside = path.with_name(f".{path.stem[:35]}.{secrets.token_hex(4)}.part{suffix}")
    try:
        yield beside
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def staging(path: Path) -> Iterator[Path]:
    """A free folder beside ``path`` for all files that belong to it, under the names they will have.

    At the end they are moved to where ``path`` lies, ``path`` itself last; on any error the folder is removed and
    nothing has changed.

    Raises:
        OSError: The folder cannot be made, or the files cannot be moved.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = path.with_name(f".{path.stem[:35]}.{secrets.token_hex(4)}.part")
    folder.mkdir()
    try:
        yield folder
        if path.is_dir():  # found out before anything is moved
            raise IsADirectoryError(21, os.strerror(21), str(path))
        for file in sorted(folder.iterdir(), key=lambda file: file.name == path.name):
            file.replace(path.with_name(file.name))
    finally:
        shutil.rmtree(folder)


def write_atomic(path: Path, data: bytes) -> None:
    """Write ``data`` to ``path``, whole or not at all, flushed to the disk before the rename.

    Raises:
        OSError: It cannot be written; whatever was at ``path`` before still is.
    """
    with replacing(path) as beside, beside.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
