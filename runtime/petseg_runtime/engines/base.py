"""What all engines have in common: their interface, their options, and what they say of themselves."""

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
]

U8: TypeAlias = npt.NDArray[np.uint8]

#: The kinds of device.
DEVICES: Final = ("cpu", "cuda", "intel-gpu")


@dataclass(frozen=True)
class Device:
    """Something to compute on.

    Attributes:
        kind: ``cpu``, ``cuda`` (an NVIDIA GPU) or ``intel-gpu``.
        index: Which of them, as the driver counts.
    """

    kind: str = "cpu"
    index: int = 0

    def __str__(self) -> str:
        return self.kind if self.kind == "cpu" else f"{self.kind}:{self.index}"

    @classmethod
    def parse(cls, text: str) -> Device:
        """``cpu``, ``cuda``, ``cuda:1``, ``intel-gpu``.

        Raises:
            EngineError: None of these.
        """
        kind, colon, index = text.partition(":")
        if kind not in DEVICES or (colon and (kind == "cpu" or not (index.isascii() and index.isdecimal()))):
            raise EngineError(
                f"there is no device {text!r}; there are: auto, cpu, cuda, cuda:N, intel-gpu, intel-gpu:N"
            )
        return cls(kind, int(index or 0))


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """What may be asked of an engine.

    Attributes:
        threads: CPU threads in all; None: as many as this process may use.
        streams: How many runs at a time, which share the threads: 1 for the shortest wait, as many as there are threads
            for the most photos a second.
        exact: Compute in float32 where the graph says so, even where the engine knows something faster (bf16, TF32).
        device: What to compute on.
        cuda_graph: Launch the network as one CUDA graph, where the engine can (TensorRT); off only to measure it.
        size: Height and width of the photos to come, for a model that takes any; None: the specification's.
        tell: Told, in a few words, before something that takes long (a compilation).
        notes: What was decided on the way to this engine, for :attr:`EngineInfo.notes`.
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
    """What is really running.

    Attributes:
        name: The engine, as ``--backend`` calls it.
        version: Of its library.
        device: What it computes on ("cpu", "cuda:0").
        provider: What the library calls the part of it that does the work.
        precision: What it computes in (f32, tf32, bf16, fp16, int8), which can differ from what the file is stored in.
            int8: the operands of the quantized convolutions are on the int8 grid, whatever multiplies them.
        threads: CPU threads it may use; 0 if it decides by itself.
        streams: Concurrent ``run`` calls that increase throughput.
        batch: Photos in one ``run`` beyond which throughput does not increase.
        notes: What people should know of how it came about: an engine passed over and why, a compilation.
        float32: What it computes in where :attr:`EngineOptions.exact` asks for float32: with it f32, without it f32,
            tf32, bf16 or fp16.
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
        """Whether :attr:`EngineOptions.exact` would change what it computes: only then is that worth a second load."""
        return self.float32 != "f32"


class Engine(Protocol):
    """A loaded model. Use it as a context manager, or call ``close``. Engines derive from it."""

    @property
    def spec(self) -> ModelSpec:
        """What the model expects and returns."""

    def run(self, images: U8) -> U8:
        """Segment a batch; safe to call from several threads.

        Args:
            images: uint8 [N, H, W, 3] RGB, of the spec's size (or any multiple of 16 if its size is dynamic), N at
                least 1.

        Returns:
            uint8 [N, H, W], ``round(255 * p(pet))``; the caller's own array, which no later call changes.

        Raises:
            UsageError: The batch does not fit the spec, or is of a size that the engine was not built for.
            EngineError: The engine failed.
        """

    def describe(self) -> EngineInfo:
        """What is really running."""

    def close(self) -> None:
        """Free the model; calling it again does nothing."""

    def warm_up(self, count: int = 1, size: tuple[int, int] | None = None) -> None:
        """Run a blank batch of ``count`` photos twice, so that what is done at the first run is done.

        Args:
            count: How many photos.
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
    """Raise the ``UsageError`` that names both shapes if a batch does not fit a spec."""
    fits = images.ndim == 4 and images.shape[0] >= 1 and images.shape[3] == 3 and images.dtype == np.uint8
    if not fits:
        raise UsageError(
            f"batch is {images.dtype} {list(images.shape)}; uint8 [N, {spec.height}, {spec.width}, 3] is expected"
        )
    try:
        spec.sized(images.shape[1], images.shape[2])
    except ModelError as error:  # the model is well; it is the size that is not
        raise UsageError(str(error)) from error


def in_batches(run: Callable[[U8], U8], images: U8, size: int) -> U8:
    """Run a graph that takes ``size`` photos at a time on any number of them (0: it takes any number by itself).

    The last batch is filled up with repeats of its last photo, whose results are dropped.
    """
    if size in (0, len(images)):
        return run(images)
    results = []
    for start in range(0, len(images), size):
        part = images[start : start + size]
        missing = size - len(part)
        results.append(run(np.concatenate([part, *[part[-1:]] * missing]))[: len(part)])
    return np.concatenate(results)
