"""The interface that all engines share: the protocol, its options, and the description of a running engine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Final, Protocol, Self, TypeAlias

import numpy as np
import numpy.typing as npt

from petseg_runtime.errors import EngineError, ModelError, UsageError
from petseg_runtime.spec import ModelSpec

__all__ = [
    "DEVICES",
    "Device",
    "Engine",
    "EngineInfo",
    "EngineOptions",
    "check_batch",
    "in_batches",
    "rounded_batch",
]

U8: TypeAlias = npt.NDArray[np.uint8]

#: The kinds of device.
DEVICES: Final = ("cpu", "cuda", "intel-gpu")


@dataclass(frozen=True)
class Device:
    """A device to compute on.

    Attributes:
        kind: ``cpu``, ``cuda`` (an NVIDIA GPU) or ``intel-gpu``.
        index: Number of the device among those of its kind, as the driver counts them.
    """

    kind: str = "cpu"
    index: int = 0

    def __str__(self) -> str:
        return self.kind if self.kind == "cpu" else f"{self.kind}:{self.index}"

    @classmethod
    def parse(cls, text: str) -> Device:
        """Parse the name of a device: ``cpu``, ``cuda``, ``cuda:1``, ``intel-gpu``.

        Raises:
            EngineError: The text names no device.
        """
        kind, colon, index = text.partition(":")
        numbered = index.isascii() and index.isdecimal() and len(index) < 10  # `int` refuses thousands of digits
        if kind not in DEVICES or (colon and (kind == "cpu" or not numbered)):
            raise EngineError(
                f"unknown device {text!r}; choose one of: auto, cpu, cuda, cuda:N, intel-gpu, intel-gpu:N"
            )
        return cls(kind, int(index or 0))


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """Options for loading an engine.

    Attributes:
        threads: Total number of CPU threads; None: as many as this process may use.
        streams: Concurrent runs, which share the threads: 1 for the lowest latency, the number of threads for the
            highest throughput.
        exact: Compute in float32 where the graph says so, even if the engine has a faster precision (bf16, TF32).
        device: The device to compute on.
        cuda_graph: Launch the network as one CUDA graph if the engine can (TensorRT); turned off only to measure it.
        size: Height and width that a model with a dynamic size will be run at; None: the specification's.
        tell: Called with a short message before a slow step (a compilation, or the wait for another process's).
        notes: Decisions that led to this engine, for :attr:`EngineInfo.notes`.
    """

    threads: int | None = None
    streams: int = 1
    exact: bool = False
    device: Device = Device()
    cuda_graph: bool = True
    size: tuple[int, int] | None = None
    tell: Callable[[str], None] | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class EngineInfo:
    """Description of a running engine.

    Attributes:
        name: The engine's name, as in ``--backend``.
        version: Version of its library.
        device: The device that it computes on ("cpu", "cuda:0").
        provider: The library's name for the component that runs the network (execution provider, plugin).
        precision: The precision that it computes in (f32, tf32, bf16, fp16, int8), which can differ from the precision
            that the file is stored in. int8: the operands of the quantized convolutions are on the int8 grid, whatever
            arithmetic multiplies them.
        threads: CPU threads that it may use; 0 if the engine decides.
        streams: Number of concurrent ``run`` calls up to which throughput increases.
        batch: Number of photos per ``run`` up to which throughput increases.
        notes: Remarks for people on how this engine was chosen: engines that were skipped and why, a compilation.
        float32: The precision of computations that :attr:`EngineOptions.exact` asks to do in float32: f32 with that
            option, and f32, tf32, bf16 or fp16 without it.
    """

    name: str
    version: str
    device: str
    provider: str
    precision: str
    threads: int
    streams: int = 1
    batch: int = 1
    notes: tuple[str, ...] = field(default=(), compare=False)
    float32: str = "f32"

    @property
    def narrowed(self) -> bool:
        """Whether :attr:`EngineOptions.exact` would change the results; otherwise a second load would be pointless."""
        return self.float32 != "f32"


class Engine(Protocol):
    """A loaded model. Use it as a context manager, or call ``close``. All engines derive from it.

    Attributes:
        spec: The specification of the model.
    """

    spec: ModelSpec

    def run(self, images: U8) -> U8:
        """Segment a batch. Thread-safe.

        Args:
            images: uint8 [N, H, W, 3] RGB, of the specification's size (or any multiple of 16 if its size is dynamic),
                N at least 1.

        Returns:
            uint8 [N, H, W], ``round(255 * p(pet))``: a new array, which belongs to the caller.

        Raises:
            UsageError: The batch does not fit the specification, or its size is one the engine was not built for.
            EngineError: The engine failed.
        """

    def describe(self) -> EngineInfo:
        """Describe what is actually running."""

    def close(self) -> None:
        """Free the model. Closing it again does nothing."""

    def warm_up(self, count: int = 1, size: tuple[int, int] | None = None) -> None:
        """Run a blank batch of ``count`` photos twice, so that one-time work is done before the first real run.

        Args:
            count: Number of photos.
            size: Their height and width; None: the specification's.

        Raises:
            EngineError: The engine failed.
        """
        height, width = size or (self.spec.height, self.spec.width)
        for _ in range(2):
            self.run(np.zeros((count, height, width, 3), np.uint8))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def check_batch(images: U8, spec: ModelSpec) -> None:
    """Raise a ``UsageError`` that names both shapes if a batch does not fit a specification."""
    fits = images.ndim == 4 and images.shape[0] >= 1 and images.shape[3] == 3 and images.dtype == np.uint8
    if not fits:
        raise UsageError(
            f"the batch is {images.dtype} {list(images.shape)}; uint8 [N, {spec.height}, {spec.width}, 3] is expected"
        )
    try:
        spec.sized(images.shape[1], images.shape[2])
    except ModelError as error:  # the size is wrong, not the model
        raise UsageError(str(error)) from error


def rounded_batch(count: int, most: int) -> int:
    """The batch size to run ``count`` photos with on a GPU: the next power of two, but at most ``most``.

    In a folder of photos, a batch is as many photos as are ready. At each new size, GPU engines choose or compile
    kernels, and capture their CUDA graph again, so there should be few sizes.
    """
    return min(1 << (count - 1).bit_length(), most)


def in_batches(run: Callable[[U8], U8], images: U8, size: int) -> U8:
    """Run a graph with a fixed batch size on any number of photos (``size`` 0: the batch size is dynamic).

    The last batch is padded with copies of its last photo, whose results are dropped.
    """
    if size in (0, len(images)):
        return run(images)
    results = []
    for start in range(0, len(images), size):
        part = images[start : start + size]
        missing = size - len(part)
        results.append(run(np.concatenate([part, *[part[-1:]] * missing]))[: len(part)])
    return np.concatenate(results)
