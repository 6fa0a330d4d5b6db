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
        said = (str(error).strip().splitlines() or [type(error).__name__])[0]
        if WORKER_GONE.search(str(error)):
            more = "more shared memory (docker run --shm-size=2g)" if "Bus error" in str(error) else "more memory"
            raise EngineError(
                f"a dataloader worker died ({said}); provide {more}, or use fewer workers or none (--set "
                "data.workers=0)"
            ) from error
        # By name, because torch.OutOfMemoryError itself would need torch.
        gone = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
        if gone or NO_MEMORY.search(str(error)):
            raise EngineError(f"out of memory: {remedy} ({said})") from error
        raise


def check_shared_memory() -> None:
    """Raises EngineError if dataloader workers could not be started, because ``/dev/shm`` is missing or full."""
    try:
        multiprocessing.Lock()
    except OSError as error:
        raise EngineError(
            f"dataloader workers need shared memory ({error.strerror}): provide it (docker run --shm-size=2g), or use "
            "no workers (--set data.workers=0)"
        ) from error
