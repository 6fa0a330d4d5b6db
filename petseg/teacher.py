"""A teacher: another model whose probabilities are learned (Hinton et al. 2015, arXiv:1503.02531, temperature 1)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from petseg.checkpoint import EXPORTED
from petseg.evaluate import OpenedModel, open_model
from petseg_runtime import images
from petseg_runtime.errors import EngineError

__all__ = ["Teacher", "open_teacher"]

U8: TypeAlias = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Teacher:
    """Averages a model's outputs for a photo and its mirror image: a better teacher for twice the time, once.

    Attributes:
        model: The model, with its own input size.
        height: Height of the output.
        width: Width of the output.
    """

    model: OpenedModel
    height: int
    width: int

    def __call__(self, photo: U8) -> U8:
        """Returns the probability, uint8 [height, width], for a photo, uint8 [h, w, 3] RGB."""
        inputs = images.to_model(photo, self.model.height, self.model.width)
        straight, mirrored = self.model.run(np.stack((inputs, inputs[:, ::-1]))).astype(np.uint16)
        mean = (straight + mirrored[:, ::-1] + 1) // 2
        return images.from_model(mean.astype(np.uint8), self.height, self.width)

    @property
    def about(self) -> dict[str, str]:
        """The name of the model's file, and its identity."""
        return {"file": self.model.file, "identity": self.model.identity}


@contextlib.contextmanager
def open_teacher(path: Path | None, height: int, width: int, device: torch.device) -> Iterator[Teacher | None]:
    """Open the teacher in a checkpoint or exported file, with outputs of the training size; None without a path.

    It runs on the device of the training run. An exported file without an engine for that device runs on the best
    available one, which is enough because it is run only once for each photo.

    Raises:
        ModelError: The file cannot be read.
    """
    if path is None:
        yield None
        return
    with contextlib.ExitStack() as stack:
        try:
            model = stack.enter_context(open_model(path, str(device)))
        except EngineError:
            if path.suffix not in EXPORTED:
                raise
            model = stack.enter_context(open_model(path))
        yield Teacher(model, height, width)
