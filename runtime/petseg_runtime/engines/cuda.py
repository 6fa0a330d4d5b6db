"""One NVIDIA GPU through the CUDA runtime: its stream and buffers, with every status checked and everything given back.

Built from CUDA's documentation, and tested against a stand-in for cuda-bindings; what of it we have run is in
:data:`petseg_runtime.engines.registry.ENGINES`.
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
    """One GPU through the CUDA runtime: every status is checked, and what was taken from it is on a list."""

    def __init__(self, cudart: Any, device: int, cuda12: str) -> None:
        """Find it; nothing is taken from it yet.

        Args:
            cudart: The module ``cuda.bindings.runtime``.
            device: Which GPU, as CUDA counts them.
            cuda12: What to install, with pip, where the driver is for CUDA 12.

        Raises:
            EngineForeign: No GPU can be used; says why, and what to do about the driver.
            EngineError: There is no such GPU.
        """
        self.cudart, self.device, self._cuda12 = cudart, device, cuda12
        self.stream: Any = None
        self._taken: list[tuple[str, Callable[..., Any], Any]] = []
        self._check_there()
        properties = self.call("be asked what it is", cudart.cudaGetDeviceProperties, device)
        self.name: str = properties.name.decode(errors="replace").rstrip("\0")
        self.capability = f"{properties.major}.{properties.minor}"

    def _check_there(self) -> None:
        status, count = self.cudart.cudaGetDeviceCount()
        if status != self.cudart.cudaError_t.cudaSuccess:
            _, number = self.cudart.cudaDriverGetVersion()
            driver = f"CUDA {number // 1000}.{number % 1000 // 10}"
            has = f"the driver is for {driver}" if number else "there is no driver: install it"
            if status == self.cudart.cudaError_t.cudaErrorInsufficientDriver:
                has = host.old_driver(driver, self._cuda12) or has
            raise EngineForeign(f"no NVIDIA GPU can be used: {_words(self.cudart, status)} ({has})")
        if not 0 <= self.device < count:
            raise EngineError(f"there is no GPU cuda:{self.device}; CUDA finds {count}, counted from 0")

    def driver(self) -> str:
        """The newest CUDA that its driver can run, as in :class:`petseg_runtime.host.Gpu`."""
        version = self.call("say the version of its driver", self.cudart.cudaDriverGetVersion)
        return f"CUDA {version // 1000}.{version % 1000 // 10}"

    def call(self, what: str, function: Callable[..., Any], *args: Any) -> Any:
        """What a CUDA function returns beside its status, or the ``EngineError`` with CUDA's own words."""
        status, *values = function(*args)
        _check(self.cudart, status, f"cuda:{self.device} cannot {what}")
        return values[0] if values else None

    def activate(self) -> None:
        """Make it the calling thread's current device."""
        self.call("be used", self.cudart.cudaSetDevice, self.device)

    def take(self, what: str, give_back: Callable[..., Any], function: Callable[..., Any], *args: Any) -> Any:
        """Take something that :meth:`give_back` will free."""
        handle = self.call(f"give {what}", function, *args)
        self._taken.append((what, give_back, handle))
        return handle

    def open_stream(self) -> None:
        """Take a stream that does not wait for what others do on the default one."""
        cudart = self.cudart
        self.stream = self.take(
            "a stream", cudart.cudaStreamDestroy, cudart.cudaStreamCreateWithFlags, cudart.cudaStreamNonBlocking
        )

    def wait(self) -> None:
        """Wait for all work, which may still use what is about to be freed."""
        if self.stream is not None:
            self.call("finish", self.cudart.cudaStreamSynchronize, self.stream)

    def failures(self, *steps: Callable[[], None]) -> list[str]:
        """Take every step, whatever the others do; returns the messages of those that failed."""
        messages = []
        for step in steps:
            try:
                step()
            except EngineError as error:
                messages.append(str(error))
        return messages

    def give_back(self) -> list[str]:
        """Free all that was taken, the latest first; returns what could not be freed, and why."""
        taken, self._taken, self.stream = self._taken[::-1], [], None
        return self.failures(*(functools.partial(self.call, f"free {what}", free, it) for what, free, it in taken))


class Buffers:
    """A buffer on the GPU, and a page-locked one of the same size on the host.

    Attributes:
        device: Address on the GPU.
        address: Address on the host.
        host: uint8 [size] at that address; valid until the GPU's things are given back.
    """

    def __init__(self, gpu: CudaGpu, size: int) -> None:
        cudart = gpu.cudart
        self.device: int = gpu.take(f"{size} bytes of its memory", cudart.cudaFree, cudart.cudaMalloc, size)
        self.address: int = gpu.take(
            f"{size} bytes of page-locked memory",
            cudart.cudaFreeHost,
            cudart.cudaHostAlloc,
            size,
            cudart.cudaHostAllocDefault,
        )
        self.host: U8 = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(self.address))


def _check(cudart: Any, status: Any, what: str) -> None:
    """Raise the ``EngineError`` of a CUDA status that is not success."""
    if status != cudart.cudaError_t.cudaSuccess:
        raise EngineError(f"{what} ({_words(cudart, status)})")


def _words(cudart: Any, status: Any) -> str:
    """What CUDA says about a status."""
    _, text = cudart.cudaGetErrorString(status)
    return str(text.decode(errors="replace"))
