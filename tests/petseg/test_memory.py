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


def from_a_worker(name: str, said: str) -> str:
    """The message of PyTorch for a worker's error."""
    return (
        f"Caught {name} in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n"
        f'  File "worker.py", line 375, in _worker_loop\n    data = fetcher.fetch(index)\n{said}\nmore lines\n'
    )


@pytest.mark.parametrize(
    "said",
    [
        "unable to allocate shared memory(shm) for file </torch_7_1_0>: No space left on device (28)",
        "unable to allocate shared memory(shm) for file </torch_7_1_0>: Success (0)",
        "unable to write to file </torch_7_1_0>: No space left on device (28)",
        "unable to resize file </torch_7_1_0> to the right size: No space left on device (28)",
        "unable to open shared memory object </torch_7_1_0> in read-write mode: No space left on device (28)",
    ],
)
def test_a_worker_without_room_for_its_batch_is_about_shared_memory(said: str) -> None:
    with pytest.raises(EngineError) as caught, enough_memory("less"):
        raise RuntimeError(from_a_worker("RuntimeError", f"RuntimeError: {said}"))
    assert str(caught.value) == (
        f"dataloader workers ran out of shared memory (RuntimeError: {said}); provide more (docker run --shm-size=2g), "
        "or use fewer workers or none (--set data.workers=0)"
    )


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (MemoryError(from_a_worker("MemoryError", "MemoryError")), "MemoryError"),
        # NumPy's error has the name of Python's, but PyTorch cannot make another one.
        (RuntimeError(from_a_worker("MemoryError", "numpy.E: Unable to allocate")), "numpy.E: Unable to allocate"),
        (RuntimeError(from_a_worker("RuntimeError", "E: can't allocate memory: 9")), "E: can't allocate memory: 9"),
    ],
)
def test_a_worker_without_memory_is_not_about_the_device(error: Exception, said: str) -> None:
    with pytest.raises(EngineError) as caught, enough_memory("use a smaller --batch than 8"):
        raise error
    assert str(caught.value) == (
        f"a dataloader worker ran out of memory ({said}); provide more memory, or use fewer workers or none (--set "
        "data.workers=0)"
    )


def test_the_line_below_the_traceback_of_another_thread_is_shown() -> None:
    said = from_a_worker("AcceleratorError", "CUDA error: out of memory").replace("DataLoader worker process 0", "pin")
    with (
        pytest.raises(EngineError, match=r"^out of memory: less \(CUDA error: out of memory\)$"),
        enough_memory("less"),
    ):
        raise RuntimeError(said)


def test_a_worker_that_can_open_no_more_files_has_memory() -> None:
    said = "unable to open shared memory object </torch_7_1_0> in read-write mode: Too many open files (24)"
    with pytest.raises(RuntimeError, match="Too many open files"), enough_memory("less"):
        raise RuntimeError(from_a_worker("RuntimeError", f"RuntimeError: {said}"))


@pytest.mark.parametrize("error", [RuntimeError("mat1 and mat2 shapes cannot be multiplied"), ValueError("no")])
def test_another_error_stays_what_it_is(error: Exception) -> None:
    with pytest.raises(type(error)) as caught, enough_memory("less"):
        raise error
    assert caught.value is error
