"""One-line errors for a device or a dataloader worker that ran out of memory."""

from __future__ import annotations

import contextlib
import multiprocessing
import re
from collections.abc import Iterator
from typing import Final

from petseg_runtime.errors import EngineError

__all__ = ["check_shared_memory", "enough_memory"]

#: Out-of-memory errors of PyTorch, cuDNN, cuBLAS, NCCL and CUDA that have no exception class, and the error about a
#: dead dataloader worker. cuDNN 9 has two new names for its error. If memory for a convolution's workspace is missing,
#: PyTorch tries all algorithms, drops their out-of-memory errors, and says only that it found no engine.
NO_MEMORY: Final = re.compile(
    r"can't allocate memory|CUDNN_STATUS_\w*ALLOC\w*_FAILED|CUBLAS_STATUS_ALLOC_FAILED|CUDA error: out of memory"
    r"|CUDA ran out of memory|Cuda failure( \d+)? 'out of memory'|unable to find an engine to execute this computation"
)
WORKER_GONE: Final = re.compile(r"DataLoader worker \(pid")
#: The error of a dataloader worker that finds no room for a batch. (One that cannot open more files says so.)
SHARED_FULL: Final = re.compile(
    r"unable to (allocate shared memory|(write to|resize) file </torch_"
    r"|open shared memory object(?!.*Too many open files))"
)
#: How PyTorch raises a worker's error again: with its traceback, and as a RuntimeError if it cannot make another one.
CAUGHT: Final = re.compile(r"Caught (?P<name>\w+) in DataLoader worker")
FEWER_WORKERS: Final = "or use fewer workers or none (--set data.workers=0)"


@contextlib.contextmanager
def enough_memory(remedy: str) -> Iterator[None]:
    """Turn the out-of-memory errors of a device or a dataloader worker into one line.

    Args:
        remedy: How to use less of the device's memory.

    Raises:
        EngineError: Memory ran out.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if why := _shortage(error, remedy):
            raise EngineError(why) from error
        raise


def _shortage(error: MemoryError | RuntimeError, remedy: str) -> str | None:
    """Says in one line which memory ran out, and the remedy; None if the error has another cause."""
    text, said, caught = str(error), _said(error), CAUGHT.match(str(error))
    if WORKER_GONE.search(text):
        more = "more shared memory (docker run --shm-size=2g)" if "Bus error" in text else "more memory"
        return f"a dataloader worker died ({said}); provide {more}, {FEWER_WORKERS}"
    if SHARED_FULL.search(text):
        return (
            f"dataloader workers ran out of shared memory ({said}); provide more (docker run --shm-size=2g), "
            f"{FEWER_WORKERS}"
        )
    # By name, because torch.OutOfMemoryError itself would need torch.
    names = {type(error).__name__, caught["name"] if caught else ""}
    if not (isinstance(error, MemoryError) or names & {"MemoryError", "OutOfMemoryError"} or NO_MEMORY.search(text)):
        return None
    if caught:
        return f"a dataloader worker ran out of memory ({said}); provide more memory, {FEWER_WORKERS}"
    return f"out of memory: {remedy} ({said})"


def _said(error: Exception) -> str:
    """Returns the line of an error's message that says what happened: the first one, or that below a traceback."""
    first, *lines = str(error).strip().splitlines() or [type(error).__name__]
    if not first.startswith("Caught "):
        return first
    return next((line for line in lines[1:] if line and not line.startswith(" ")), first)


def check_shared_memory() -> None:
    """Raises EngineError if dataloader workers could not be started, because ``/dev/shm`` is missing or full."""
    try:
        multiprocessing.Lock()
    except OSError as error:
        raise EngineError(
            f"dataloader workers need shared memory ({error.strerror}): provide it (docker run --shm-size=2g), or use "
            "no workers (--set data.workers=0)"
        ) from error
