"""Errors of a device that had too little memory, in one line."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import Final

from petseg_runtime.errors import EngineError

__all__ = ["enough_memory"]

#: What PyTorch, cuDNN, cuBLAS and CUDA say where there is no memory and the error has no class of its own; and of a
#: worker that is gone.
NO_MEMORY: Final = re.compile(r"can't allocate memory|CU(DNN|BLAS)_STATUS_ALLOC_FAILED|CUDA error: out of memory")
WORKER_GONE: Final = re.compile(r"DataLoader worker \(pid")


@contextlib.contextmanager
def enough_memory(remedy: str) -> Iterator[None]:
    """Turns the errors of a device, or of a worker of the data loader, that had too little memory into one line.

    Args:
        remedy: What takes less of the device's memory.

    Raises:
        EngineError: There was too little.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        said = (str(error).strip().splitlines() or [type(error).__name__])[0]
        if WORKER_GONE.search(str(error)):
            more = "more shared memory (docker run --shm-size=2g)" if "Bus error" in str(error) else "more memory"
            raise EngineError(
                f"a process that prepares photos is gone ({said}): give it {more}, or do with fewer such processes or "
                "none (--set data.workers=0)"
            ) from error
        # By its name: torch.OutOfMemoryError, without torch.
        gone = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
        if gone or NO_MEMORY.search(str(error)):
            raise EngineError(f"too little memory: {remedy} ({said})") from error
        raise
