"""Which device computes, and in which precision."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import Final

import torch

from petseg_runtime.errors import EngineError, UsageError
from petseg_runtime.host import features

__all__ = ["enough_memory", "pick_device", "pick_precision"]

#: What PyTorch, cuDNN, cuBLAS and CUDA say where there is no memory and the error has no class of its own; and of a
#: worker that is gone.
NO_MEMORY: Final = re.compile(r"can't allocate memory|CU(DNN|BLAS)_STATUS_ALLOC_FAILED|CUDA error: out of memory")
WORKER_GONE: Final = re.compile(r"DataLoader worker \(pid")


def pick_device(name: str) -> torch.device:
    """``auto`` is the first GPU if there is one, else the CPU; anything else is taken at its word.

    Raises:
        EngineError: The device that was asked for is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise EngineError(f"--device {name!r} is not a device; auto, cpu, cuda or cuda:N is expected") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise EngineError(
            f"--device {name}: PyTorch sees {torch.cuda.device_count()} CUDA GPUs here; check the driver with "
            "nvidia-smi, or train on the CPU with --device cpu"
        )
    if device.type not in ("cuda", "cpu"):
        raise EngineError(f"--device {name}: petseg trains on cuda or cpu")
    return device


def pick_precision(amp: str, device: torch.device) -> torch.dtype:
    """What to compute in: bf16 where the hardware has it, fp16 on other GPUs, fp32 on other CPUs.

    Raises:
        UsageError: fp16 was asked for on a CPU, whose gradients would underflow unscaled.
    """
    if amp == "auto":
        if device.type == "cuda":
            return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
        return torch.bfloat16 if _cpu_has_bf16() else torch.float32
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[amp]
    if dtype is torch.float16 and device.type == "cpu":
        raise UsageError("amp is fp16 on a CPU: gradients would underflow; use bf16 or fp32")
    return dtype


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
        if isinstance(error, MemoryError | torch.OutOfMemoryError) or NO_MEMORY.search(str(error)):
            raise EngineError(f"too little memory: {remedy} ({said})") from error
        raise


def _cpu_has_bf16() -> bool:
    """Whether the CPU multiplies bf16 natively; emulated bf16 is slower than fp32."""
    return not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(features())
