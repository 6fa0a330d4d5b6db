"""Running out of memory is a one-line error with a remedy, however a device reports it; other errors do not change."""

from __future__ import annotations

import pytest

from petseg.memory import enough_memory
from petseg_runtime.errors import EngineError


class OutOfMemoryError(RuntimeError):
    """Has the name of torch's class."""


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB\nmore lines"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),  # before cuDNN 9
        RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_HOST_ALLOCATION_FAILED"),
        RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
        RuntimeError("GET was unable to find an engine to execute this computation"),
        RuntimeError("FIND was unable to find an engine to execute this computation"),
        RuntimeError("CUDA ran out of memory outside PyTorch's allocator. If this workload uses many dynamic shapes"),
        RuntimeError("NCCL error in: X.cpp:9, unhandled cuda error\nLast error:\nCuda failure 2 'out of memory'"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be reported later"),
    ],
)
def test_the_error_is_one_line_with_a_remedy(error: Exception) -> None:
    said = r"^out of memory: use a smaller --batch than 8 \(.+\)$"
    with pytest.raises(EngineError, match=said) as caught, enough_memory("use a smaller --batch than 8"):
        raise error
    assert "\n" not in str(caught.value)
    assert caught.value.__cause__ is error


@pytest.mark.parametrize(
    ("said", "remedy"),
    [
        ("DataLoader worker (pid 7) is killed by signal: Bus error. It is possible ...", "docker run --shm-size"),
        ("DataLoader worker (pid(s) 7) exited unexpectedly", "provide more memory"),
    ],
)
def test_a_dead_worker_is_distinguished(said: str, remedy: str) -> None:
    with pytest.raises(EngineError, match=r"a dataloader worker died") as caught, enough_memory("less"):
        raise RuntimeError(said)
    assert remedy in str(caught.value)


@pytest.mark.parametrize("error", [RuntimeError("mat1 and mat2 shapes cannot be multiplied"), ValueError("no")])
def test_another_error_stays_what_it_is(error: Exception) -> None:
    with pytest.raises(type(error)) as caught, enough_memory("less"):
        raise error
    assert caught.value is error
