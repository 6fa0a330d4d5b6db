"""An x-ray of this machine: what it can run."""

from __future__ import annotations

import ctypes

__all__ = ["nvidia_gpus"]


def nvidia_gpus() -> int:
    """How many NVIDIA GPUs the driver shows to this process; 0 without a driver. Needs no CUDA toolkit."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int(0)
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return 0
    return count.value
