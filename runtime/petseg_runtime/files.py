"""Writing files atomically (to a temporary name, then renamed), reading small files safely, and real paths."""

from __future__ import annotations

import contextlib
import errno
import functools
import io
import os
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, Final

__all__ = [
    "STEM",
    "is_at",
    "read_text",
    "real_paths",
    "replacing",
    "staging",
    "synced",
    "synced_folder",
    "write_all",
    "write_atomic",
]

#: A temporary name contains this many characters of the file's stem: a name has at most 255 bytes, and a character up
#: to four.
STEM: Final = 35


def read_text(path: Path, most: int) -> str:
    """Read a small UTF-8 file from an untrusted path, where somebody may have put a pipe or device that never ends.

    Args:
        path: The file.
        most: The maximum size in bytes.

    Raises:
        OSError: It cannot be read, is not a regular file, or is larger.
        UnicodeDecodeError: It is not UTF-8.
    """
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC  # opening a pipe would block
    with os.fdopen(os.open(path, flags), "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        data = file.read(most + 1)
    if len(data) > most:
        raise OSError(errno.EFBIG, f"larger than {most} bytes", str(path))
    return data.decode()


def is_at(descriptor: int, path: Path) -> bool:
    """Whether an open file is the one now at ``path``: it was not replaced or removed since."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.lstat())
    except FileNotFoundError:
        return False


def real_paths() -> Callable[[str | Path], str]:
    """A function like ``os.path.realpath`` that resolves each folder once, not for each of a million files in it."""
    folder = functools.cache(os.path.realpath)  # unlike Path.resolve, does not raise on a loop of symlinks

    def real(path: str | Path) -> str:
        above, name = os.path.split(path)
        if name in ("", os.curdir, os.pardir) or os.path.islink(path):  # noqa: PTH114 (a string, one of a million)
            return os.path.realpath(path)
        return os.path.join(folder(above), name)  # noqa: PTH118

    return real


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Replace a file atomically: yields a temporary path, which is renamed to ``path`` at the end, or removed on error.

    The temporary file is in the same folder, so that the rename stays within one file system. The folder is created if
    it is missing.

    Raises:
        OSError: The folder cannot be created, or the file not be renamed.
    """
    if not path.name:  # the current folder or the root
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    _check_replaceable(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Keeps the suffix, by which writers may choose the format, unless it is too long to be one.
    suffix = path.suffix if len(path.suffix) <= 20 else ""
    temporary = path.with_name(f".{path.stem[:STEM]}.{secrets.token_hex(4)}.part{suffix}")
    try:
        yield temporary
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _check_replaceable(path: Path) -> None:
    """Make sure that no device or pipe is replaced, nor a link to one: root may rename a file over /dev/null.

    /dev/stdout is a link to whatever standard output is, which may be a regular file: so nothing in /dev is replaced.

    Raises:
        OSError: One would be.
    """
    special = path.exists() and not path.is_file() and not path.is_dir()
    if special or (path.parent.exists() and path.parent.samefile("/dev")):
        raise OSError(errno.EINVAL, "a device or pipe cannot be replaced by a file", str(path))


@contextlib.contextmanager
def staging(path: Path) -> Iterator[Path]:
    """Replace several files together: yields a temporary folder for ``path`` and its companions, under their names.

    At the end the files are moved into the folder of ``path``, ``path`` itself last. On any error, also while moving,
    the temporary folder is removed and the previous files are restored.

    Raises:
        OSError: The folder cannot be created, or the files cannot be moved.
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
            with contextlib.suppress(OSError):  # somebody else has used the folder meanwhile
                parent.rmdir()
        raise
    shutil.rmtree(folder)


def _swap(moves: list[tuple[Path, Path]], folder: Path) -> None:
    """Move each file to its place, or none; previous files are kept in ``folder`` until all are moved."""
    for _, place in moves:
        if place.is_dir():  # checked before anything is moved
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(place))
        _check_replaceable(place)
    with contextlib.ExitStack() as undo:
        for number, (file, place) in enumerate(moves):
            if number < len(moves) - 1:  # nothing can fail after the last move, so it needs no undo
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
    """Flush a file to the disk (fsync) after the body has written and closed it; nothing is done after an error.

    Raises:
        OSError: The flush fails.
    """
    yield
    with path.open("rb") as file:
        os.fsync(file.fileno())


@contextlib.contextmanager
def synced_folder(folder: Path) -> Iterator[None]:
    """Flush a folder to the disk after the body has renamed files in it, if the operating system supports that."""
    yield
    with contextlib.suppress(OSError):  # unsupported on some network file systems
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_atomic(path: Path, data: bytes) -> None:
    """Write ``data`` to ``path`` atomically: completely or not at all, flushed to the disk before the rename.

    Raises:
        OSError: It cannot be written; a previous file at ``path`` is unchanged.
    """
    with replacing(path) as temporary, temporary.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def write_all(stream: BinaryIO | io.FileIO, data: bytes | memoryview) -> None:
    """Write all bytes to a stream, buffered or not, and flush it.

    An unbuffered one (a file, or standard output under PYTHONUNBUFFERED) writes only a part if the disk becomes full or
    a signal arrives, Ctrl-Z for one; then the next write raises an error, or writes on.

    Raises:
        OSError: They cannot be written.
    """
    left = memoryview(data).cast("B")
    while left:
        left = left[stream.write(left) :]
    stream.flush()
