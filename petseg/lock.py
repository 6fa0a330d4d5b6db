"""One run at a time in a folder: two would remove what the other is writing, and replace what it has written."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Final

from petseg_runtime.errors import TrainingError
from petseg_runtime.files import is_at

__all__ = ["LOCK", "keep_others_out"]

#: Of a run that is under way; what a killed one leaves keeps nobody out.
LOCK: Final = ".petseg-train.lock"


def keep_others_out(folder: Path) -> Callable[[], None]:
    """Let no other process train into a folder, which is made if need be.

    Where there are no locks (Windows, some file systems), nobody is kept out.

    Returns:
        A function that releases the folder; the end of this process releases it, too.

    Raises:
        TrainingError: Another process has it.
    """
    made = [parent for parent in (folder, *folder.absolute().parents) if not parent.exists()]
    try:
        descriptor = _locked(folder)
    except (BlockingIOError, PermissionError) as error:
        raise TrainingError(
            f"{folder}: another process is training there: wait for its end, or choose another --output"
        ) from error
    owner = os.getpid()

    def let_in() -> None:
        if descriptor is None or os.getpid() != owner:  # a worker that was forked
            return
        with contextlib.suppress(OSError):
            if is_at(descriptor, folder / LOCK):
                (folder / LOCK).unlink()  # while it is held: who opened it meanwhile sees that it is gone
        os.close(descriptor)
        with contextlib.suppress(OSError):  # something is in them, as there should be after a run
            for parent in made:
                parent.rmdir()

    return let_in


def _locked(folder: Path) -> int | None:
    """The descriptor of the lock; None: there are no locks here.

    Raises:
        BlockingIOError: Another process has it; by some systems' word for it, PermissionError.
    """
    try:
        import fcntl  # POSIX only
    except ImportError:
        return None
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        except OSError:  # who writes the first checkpoint there says why that cannot be
            return None
        try:
            # Not flock, which the workers that are forked would share: one that outlives this process would keep it.
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            os.close(descriptor)
            raise
        except OSError:  # a file system without locks
            return descriptor
        if is_at(descriptor, folder / LOCK):
            return descriptor
        os.close(descriptor)  # that of a run which has just ended, and removed it
