"""An x-ray of this machine: what it can run."""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass

__all__ = ["Gpu", "gpus", "nvidia_gpus"]


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """An NVIDIA GPU, as its driver describes it.

    Attributes:
        index: As CUDA counts.
        name: Of the product.
        compute_capability: "8.9".
        memory: Bytes.
        driver: The newest CUDA that the driver can run ("CUDA 13.0").
    """

    index: int
    name: str
    compute_capability: str
    memory: int
    driver: str


def nvidia_gpus() -> int:
    """How many NVIDIA GPUs the driver shows to this process; 0 without a driver. Needs no CUDA toolkit."""
    return len(gpus())


@functools.cache
def gpus() -> tuple[Gpu, ...]:
    """The NVIDIA GPUs that the driver shows to this process; none without a driver. Needs no CUDA toolkit."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return ()
    count = ctypes.c_int(0)
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return ()
    return tuple(_gpu(driver, index) for index in range(count.value))


def _gpu(driver: ctypes.CDLL, index: int) -> Gpu:
    """What the driver says of one GPU; what it does not say is "unknown", or 0."""
    device, major, minor, version = (ctypes.c_int(0) for _ in range(4))
    memory, name = ctypes.c_size_t(0), ctypes.create_string_buffer(256)
    driver.cuDeviceGet(ctypes.byref(device), index)
    driver.cuDeviceGetName(name, len(name), device)
    driver.cuDeviceTotalMem_v2(ctypes.byref(memory), device)
    driver.cuDeviceGetAttribute(ctypes.byref(major), 75, device)  # COMPUTE_CAPABILITY_MAJOR
    driver.cuDeviceGetAttribute(ctypes.byref(minor), 76, device)  # COMPUTE_CAPABILITY_MINOR
    driver.cuDriverGetVersion(ctypes.byref(version))
    return Gpu(
        index=index,
        name=name.value.decode(errors="replace") or "unknown",
        compute_capability=f"{major.value}.{minor.value}",
        memory=memory.value,
        driver=f"CUDA {version.value // 1000}.{version.value % 1000 // 10}",
    )
