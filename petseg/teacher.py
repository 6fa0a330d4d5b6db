"""Another model, of whose probabilities a network learns (Hinton et al. 2015, arXiv:1503.02531, at temperature 1)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

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
    """A model that is asked about a photo and its mirror image, of which the mean is taken.

    That is a better teacher for twice the time, once.

    Attributes:
        model: What is asked, at its own input size.
        height: Height of its answers.
        width: Width of its answers.
    """

    model: OpenedModel
    height: int
    width: int

    def __call__(self, photo: U8) -> U8:
        """Its probability, uint8 [height, width], of a photo, uint8 [h, w, 3] RGB."""
        inputs = images.to_model(photo, self.model.height, self.model.width)
        straight, mirrored = self.model.run(np.stack((inputs, inputs[:, ::-1]))).astype(np.uint16)
        mean = (straight + mirrored[:, ::-1] + 1) // 2
        return images.from_model(mean.astype(np.uint8), self.height, self.width)

    @property
    def about(self) -> dict[str, str]:
        """Which model it is: the name of its file, and its identity."""
        return {"file": self.model.file, "identity": self.model.identity}

    @property
    def provenance(self) -> dict[str, Any]:
        """What it says of its own training."""
        return self.model.provenance


@contextlib.contextmanager
def open_teacher(path: Path | None, height: int, width: int, device: torch.device) -> Iterator[Teacher | None]:
    """The teacher in a checkpoint or exported file, whose answers are of the training size; None without a path.

    It computes on the run's device; an exported file for which there is no engine there, on the best that there is: it
    is asked but once for each photo.

    Raises:
        ModelError: It cannot be read.
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
