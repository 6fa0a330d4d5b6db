"""A lock file for one run at a time in a folder: two runs would delete and overwrite each other's files."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Callable
from pathlib import Path
from typing import Final

from petseg_runtime.errors import TrainingError
from petseg_runtime.files import is_at

__all__ = ["LOCK", "lock_folder"]

#: The lock file of an active run; a stale one, left by a killed run, does not lock the folder.
LOCK: Final = ".petseg-train.lock"


def lock_folder(folder: Path) -> Callable[[], None]:
    """Lock a folder for training, creating it if needed.

    On a file system without locks, the folder is not locked.

    Returns:
        A function that releases the lock; the end of the process releases it, too.

    Raises:
        TrainingError: Another process has locked it.
    """
    made = [parent for parent in (folder, *folder.absolute().parents) if not parent.exists()]
    try:
        descriptor = _locked(folder)
    except (BlockingIOError, PermissionError) as error:
        raise TrainingError(
            f"{folder}: another process is training there; wait for its end, or choose another --output"
        ) from error
    owner = os.getpid()

    def unlock() -> None:
        if descriptor is None or os.getpid() != owner:  # in a forked worker
            return
        with contextlib.suppress(OSError):
            if is_at(descriptor, folder / LOCK):
                (folder / LOCK).unlink()  # while locked: a process that has just opened it will see that it is gone
        os.close(descriptor)
        with contextlib.suppress(OSError):  # they are not empty, as is normal after a run
            for parent in made:
                parent.rmdir()

    return unlock


def _locked(folder: Path) -> int | None:
    """Lock the folder; returns the descriptor of the lock file, or None if it cannot be written.

    Raises:
        BlockingIOError: Another process holds the lock; some systems raise PermissionError instead.
    """
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        except OSError:  # writing the first checkpoint there will fail with the reason
            return None
        try:
            # Not flock, which forked workers inherit: one that outlives this process would keep the folder locked.
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            os.close(descriptor)
            raise
        except OSError:  # a file system without locks
            return descriptor
        if is_at(descriptor, folder / LOCK):
            return descriptor
        os.close(descriptor)  # the lock file of a run that has just ended and removed it
