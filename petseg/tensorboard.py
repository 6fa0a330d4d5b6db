"""TensorBoard logging: scalars of every step and epoch, and predictions for some validation photos."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt
from torch.utils.tensorboard import SummaryWriter

from petseg.data import Pair, read_pair
from petseg.evaluate import Run
from petseg.log import Row
from petseg.metrics import BORDER, PET
from petseg.observers import Observer
from petseg.run_state import RunState
from petseg_runtime import images
from petseg_runtime.errors import OutputError
from petseg_runtime.spec import lowest_pet

__all__ = ["TensorBoard"]

U8: TypeAlias = npt.NDArray[np.uint8]

#: Columns of the log that are logged as scalars.
CURVES: Final = (
    "val_iou",
    "val_dice",
    "val_threshold",
    "val_mean_iou_border_ignored_at_0.5",
    "images_per_s",
    "data_wait",
    "gpu_memory",
)
#: Photos shown after each epoch.
SHOWN: Final = 6


class TensorBoard(Observer):
    """Writes events to a folder, for ``tensorboard --logdir FOLDER``."""

    def __init__(self, folder: Path, height: int, width: int) -> None:
        """Nothing is opened yet, because the step at which a resumed run continues is known only at its first step.

        Args:
            folder: The folder for the events, created if needed.
            height: The network's input height.
            width: The network's input width.
        """
        self._folder, self._size = folder, (height, width)
        self._writer: SummaryWriter | None = None

    def step(self, state: RunState, loss: float, lr: float) -> None:
        """Log loss and learning rate."""
        with self._writing(state.step) as board:
            board.add_scalar("train/loss", loss, state.step)
            board.add_scalar("train/lr", lr, state.step)

    def epoch(self, row: Row) -> None:
        """Log metrics and speed, and flush them to disk."""
        columns = row.as_dict()
        with self._writing(row.step) as board:
            for name in CURVES:
                board.add_scalar(f"epoch/{name}", columns[name], row.step)
            board.flush()

    def validated(self, run: Run, pairs: Sequence[Pair], row: Row) -> None:
        """Log photo, ground truth, probability and mask side by side, one row for each of the first photos."""
        rows = [self._row(run, pair, row.val_threshold) for pair in pairs[:SHOWN]]
        with self._writing(row.step) as board:
            board.add_image("validation", np.concatenate(rows), row.step, dataformats="HWC")

    def close(self) -> None:
        """Close the file.

        Raises:
            OutputError: It cannot be written.
        """
        if self._writer is not None:
            with self._writing(0) as board:
                board.close()

    def _row(self, run: Run, pair: Pair, threshold: float) -> U8:
        pixels, trimap = read_pair(pair)
        truth = np.select([trimap == PET, trimap == BORDER], [255, 128], 0).astype(np.uint8)  # pet white, border grey
        photo, truth = (images.to_model(picture, *self._size) for picture in (pixels, _grey(truth)))
        probability = run(photo[None])[0]
        mask = np.where(probability >= lowest_pet(threshold), 255, 0).astype(np.uint8)
        return np.concatenate((photo, truth, _grey(probability), _grey(mask)), axis=1)

    @contextmanager
    def _writing(self, step: int) -> Iterator[SummaryWriter]:
        try:
            if self._writer is None:
                # Hides the events that a killed run wrote after its last checkpoint.
                self._writer = SummaryWriter(str(self._folder), purge_step=step)
            yield self._writer
        except OSError as error:
            raise OutputError(f"{self._folder}: cannot be written to ({error.strerror or error})") from error


def _grey(plane: U8) -> U8:
    """Convert a plane, uint8 [H, W], to RGB."""
    return np.repeat(plane[..., None], 3, axis=2)
