"""The Python API: ``Segmenter()("cat.jpg").mask``."""

from __future__ import annotations

import os
from pathlib import Path
from types import TracebackType
from typing import Self

from petseg_runtime import images
from petseg_runtime.artifact import default_model, open_artifact
from petseg_runtime.engines.base import EngineInfo
from petseg_runtime.engines.registry import load_engine
from petseg_runtime.errors import ModelError
from petseg_runtime.result import Segmentation

__all__ = ["Segmenter"]


class Segmenter:
    """A loaded model that segments photos. Safe to share between threads.

    >>> Segmenter()("cat.jpg").cutout().save("cutout.png")  # doctest: +SKIP
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | None = None,
        *,
        backend: str = "auto",
        threads: int | None = None,
        size: tuple[int, int] | None = None,
        threshold: float | None = None,
        cutout_threshold: float | None = None,
    ) -> None:
        """Load a model.

        Args:
            model: A file that ``petseg export`` made; None: the one that ships with petseg.
            backend: The engine, or ``auto``.
            threads: CPU threads; None: as many as this process may use.
            size: Height and width that photos are brought to, for a model that takes any; None: the model's own.
            threshold: In (0, 1); None: the model's own, chosen on validation photos.
            cutout_threshold: In (0, 1); None: the model's own.

        Raises:
            ModelError: The file is missing, damaged or not petseg's, a threshold is out of range, or it does not
                take that size.
            EngineError: The engine cannot be had or cannot load the model.
        """
        for name, value in (("threshold", threshold), ("cutout_threshold", cutout_threshold)):
            if value is not None and not 0 < value < 1:
                raise ModelError(f"{name} is {value}; it must lie between 0 and 1, both excluded")
        self.artifact = open_artifact(Path(model) if model is not None else default_model())
        spec = self.artifact.spec
        self._height, self._width = size or (spec.height, spec.width)
        spec.sized(self._height, self._width)
        self.threshold = threshold if threshold is not None else self.artifact.spec.threshold
        self.cutout_threshold = (
            cutout_threshold if cutout_threshold is not None else self.artifact.spec.cutout_threshold
        )
        self._engine = load_engine(self.artifact, backend, threads)

    def __call__(self, source: images.ImageSource) -> Segmentation:
        """Segment one photo.

        Args:
            source: A path, encoded bytes, an open binary file, a uint8 array [H, W, 3] RGB, or a PIL image.

        Raises:
            InputError: The photo cannot be used.
            EngineError: The engine failed.
        """
        photo = images.read(source)
        probability = self._engine.run(images.to_model(photo.pixels, self._height, self._width)[None])[0]
        height, width = photo.pixels.shape[:2]
        return Segmentation(
            photo.pixels,
            images.from_model(probability, height, width),
            self.threshold,
            self.cutout_threshold,
            photo.notes,
        )

    def describe(self) -> EngineInfo:
        """What is really running."""
        return self._engine.describe()

    def close(self) -> None:
        """Free the model."""
        self._engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
