"""An NVIDIA GPU through the CUDA runtime API: a stream and buffers, with every error code checked and all memory freed.

Written from CUDA's documentation and tested against a stand-in for cuda-bindings;
:data:`petseg_runtime.engines.registry.ENGINES` lists what we have run.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from petseg_runtime import host
from petseg_runtime.errors import EngineError, EngineForeign

__all__ = ["Buffers", "CudaGpu"]

U8: TypeAlias = npt.NDArray[np.uint8]


class CudaGpu:
    """One GPU through the CUDA runtime API. Checks every error code and keeps a list of all allocated resources."""

    def __init__(self, cudart: Any, device: int, cuda12: str) -> None:
        """Find the GPU and read its properties; nothing is allocated yet.

        Args:
            cudart: The module ``cuda.bindings.runtime``.
            device: Number of the GPU, as CUDA counts them.
            cuda12: The pip packages to install if the driver supports CUDA 12 only.

        Raises:
            EngineForeign: No GPU can be used; the message says why, and what to do about the driver.
            EngineError: There is no such GPU.
        """
        self.cudart, self.device, self._cuda12 = cudart, device, cuda12
        self.stream: Any = None
        self._allocated: list[tuple[str, Callable[..., Any], Any]] = []
        self._check_device()
        properties = self.call("report its properties", cudart.cudaGetDeviceProperties, device)
        self.name: str = properties.name.decode(errors="replace").rstrip("\0")
        self.capability = f"{properties.major}.{properties.minor}"

    def _check_device(self) -> None:
        status, count = self.cudart.cudaGetDeviceCount()
        if status != self.cudart.cudaError_t.cudaSuccess:
            if trouble := host.driver_trouble():
                raise EngineForeign(f"no NVIDIA GPU can be used: {trouble}")
            _, number = self.cudart.cudaDriverGetVersion()
            driver = f"CUDA {number // 1000}.{number % 1000 // 10}"
            hint = f"the driver is for {driver}" if number else "there is no driver: install it"
            if status == self.cudart.cudaError_t.cudaErrorInsufficientDriver:
                hint = host.old_driver(driver, self._cuda12) or hint
            raise EngineForeign(f"no NVIDIA GPU can be used: {_error_string(self.cudart, status)} ({hint})")
        if not 0 <= self.device < count:
            raise EngineError(f"there is no GPU cuda:{self.device}; CUDA finds {count}, counted from 0")

    def driver(self) -> str:
        """The newest CUDA version that the driver supports, as in :class:`petseg_runtime.host.Gpu`."""
        version = self.call("report the version of its driver", self.cudart.cudaDriverGetVersion)
        return f"CUDA {version // 1000}.{version % 1000 // 10}"

    def call(self, what: str, function: Callable[..., Any], *args: Any) -> Any:
        """Call a CUDA function; returns its value, or raises an ``EngineError`` with CUDA's message on an error code.

        Args:
            what: What the GPU cannot do if the call fails, for the message.
            function: Returns an error code and at most one value.
            args: Its arguments.
        """
        status, *values = function(*args)
        if status != self.cudart.cudaError_t.cudaSuccess:
            raise EngineError(f"cuda:{self.device} cannot {what} ({_error_string(self.cudart, status)})")
        return values[0] if values else None

    def activate(self) -> None:
        """Make it the calling thread's current device."""
        self.call("be used", self.cudart.cudaSetDevice, self.device)

    def allocate(self, what: str, free: Callable[..., Any], function: Callable[..., Any], *args: Any) -> Any:
        """Allocate a resource that :meth:`free_all` will free with ``free``."""
        handle = self.call(f"allocate {what}", function, *args)
        self._allocated.append((what, free, handle))
        return handle

    def open_stream(self) -> None:
        """Create a stream that does not synchronize with the default stream."""
        cudart = self.cudart
        self.stream = self.allocate(
            "a stream", cudart.cudaStreamDestroy, cudart.cudaStreamCreateWithFlags, cudart.cudaStreamNonBlocking
        )

    def synchronize(self) -> None:
        """Wait for all work on the stream, which may still use memory that is about to be freed."""
        if self.stream is not None:
            self.call("finish", self.cudart.cudaStreamSynchronize, self.stream)

    def failures(self, *steps: Callable[[], None]) -> list[str]:
        """Run every step even if others fail; returns the error messages of those that failed."""
        messages = []
        for step in steps:
            try:
                step()
            except EngineError as error:
                messages.append(str(error))
        return messages

    def free_all(self) -> list[str]:
        """Free all resources, the latest first; returns the error messages of those that could not be freed."""
        allocated, self._allocated, self.stream = self._allocated[::-1], [], None
        return self.failures(*(functools.partial(self.call, f"free {what}", free, it) for what, free, it in allocated))


class Buffers:
    """A buffer in device memory, and a page-locked one of the same size on the host.

    Attributes:
        device: Address in device memory.
        address: Address on the host.
        host: uint8 [size] at that address; valid until :meth:`CudaGpu.free_all`.
    """

    def __init__(self, gpu: CudaGpu, size: int) -> None:
        cudart = gpu.cudart
        self.device: int = gpu.allocate(f"{size} bytes of its memory", cudart.cudaFree, cudart.cudaMalloc, size)
        self.address: int = gpu.allocate(
            f"{size} bytes of page-locked memory",
            cudart.cudaFreeHost,
            cudart.cudaHostAlloc,
            size,
            cudart.cudaHostAllocDefault,
        )
        self.host: U8 = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(self.address))


def _error_string(cudart: Any, status: Any) -> str:
    """CUDA's description of an error code."""
    _, text = cudart.cudaGetErrorString(status)
    return str(text.decode(errors="replace"))
