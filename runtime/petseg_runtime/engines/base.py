"""What an engine is, whoever's library does the work."""

from __future__ import annotations

from dataclasses import dataclass
from types import TracebackType
from typing import Protocol, Self, TypeAlias

import numpy as np
import numpy.typing as npt

from petseg_runtime.errors import ModelError
from petseg_runtime.spec import ModelSpec

__all__ = ["Engine", "EngineInfo", "check_batch"]

U8: TypeAlias = npt.NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True)
class EngineInfo:
    """What is really running.

    Attributes:
        name: The engine, as ``--backend`` calls it.
        version: Of its library.
        device: What it computes on ("cpu").
        provider: What the library calls the part of it that does the work.
        precision: What it computes in ("f32", ...), which can differ from what the file is stored in.
        threads: CPU threads it may use; 0 if it decides by itself.
    """

    name: str
    version: str
    device: str
    provider: str
    precision: str
    threads: int


class Engine(Protocol):
    """A loaded model. Use it as a context manager, or call ``close``."""

    @property
    def spec(self) -> ModelSpec:
        """What the model expects and returns."""

    def run(self, images: U8) -> U8:
        """Segment a batch; safe to call from several threads.

        Args:
            images: uint8 [N, H, W, 3] RGB, of the spec's size, N at least 1.

        Returns:
            uint8 [N, H, W], ``round(255 * p(pet))``; the caller's own array, which no later call changes.

        Raises:
            ModelError: The batch does not fit the spec.
            EngineError: The engine failed.
        """

    def describe(self) -> EngineInfo:
        """What is really running."""

    def close(self) -> None:
        """Free the model; calling it again does nothing."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def check_batch(images: U8, spec: ModelSpec) -> None:
    """Raise the ``ModelError`` that names both shapes if a batch does not fit a spec."""
    fits = images.ndim == 4 and images.shape[0] >= 1 and images.shape[1:] == (spec.height, spec.width, 3)
    if not fits or images.dtype != np.uint8:
        raise ModelError(
            f"batch is {images.dtype} {list(images.shape)}; uint8 [N, {spec.height}, {spec.width}, 3] is expected"
        )
