"""The training log: a row per epoch, in ``log.csv`` for people and in the state of a run for ``--resume``."""

from __future__ import annotations

import csv
import dataclasses
import io
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from petseg_runtime.errors import OutputError, TrainingError
from petseg_runtime.files import write_atomic

__all__ = ["LOG", "Row", "read", "write"]

#: The log's file name, beside the checkpoints.
LOG: Final = "log.csv"
#: Columns whose names differ from their attributes'.
COLUMNS: Final = {"val_mean_iou_border_ignored": "val_mean_iou_border_ignored_at_0.5"}


@dataclass(frozen=True, kw_only=True)
class Row:
    """A finished and validated epoch. Validation figures are those of the EMA weights.

    In the file and in JSON, each attribute is the column of the same name, or the one in :data:`COLUMNS`.

    Attributes:
        epoch: Number of the epoch, from 1.
        step: Steps of the run up to the end of the epoch.
        loss: Mean training loss of the epoch's steps, 0 or more.
        val_iou: IoU over all validation pixels, 0 to 1, with the trimap's border as background, at ``val_threshold``.
        val_dice: Dice coefficient of the same pixels, 0 to 1.
        val_threshold: The threshold, 0 to 1, with the highest ``val_iou``.
        val_mean_iou_border_ignored: Mean IoU per validation photo, 0 to 1, at threshold 0.5, with the border ignored.
        seconds: Duration of the epoch's steps, including waiting for photos, without validation.
        images_per_s: Training throughput in photos per second, of all ranks together.
        data_wait: Share of ``seconds`` spent waiting for photos, 0 to 1.
        elapsed: Seconds of the run up to the end of the validation, over all sessions, including reading the photos and
            validation.
        skipped: Photos excluded so far because they could not be used.
        gpu_memory: Peak GPU memory so far, bytes; 0 on a CPU.
    """

    epoch: int
    step: int
    loss: float
    val_iou: float
    val_dice: float
    val_threshold: float
    val_mean_iou_border_ignored: float
    seconds: float
    images_per_s: float
    data_wait: float
    elapsed: float
    skipped: int
    gpu_memory: int

    def as_dict(self) -> dict[str, float]:
        """Returns the values by column, in the log's order."""
        return {column: getattr(self, name) for name, column in _columns().items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Row:
        """Build a row from its columns: from :meth:`as_dict`, or from a line of the file.

        Args:
            values: Numbers, or numbers as text, by column. Unknown columns are ignored.

        Raises:
            KeyError: A column is missing.
            TypeError: Its value is not a number.
            ValueError: Its text is not a number.
        """
        hints = typing.get_type_hints(cls)
        return cls(**{name: _number(values[column], hints[name]) for name, column in _columns().items()})


def read(path: Path) -> list[Row]:
    """Read the rows of a log, one per epoch.

    Raises:
        TrainingError: The file cannot be read, or is not a log of ``petseg train``.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            return [Row.from_dict(line) for line in csv.DictReader(file)]
    except (OSError, LookupError, TypeError, ValueError, csv.Error) as error:
        raise TrainingError(f"{path}: not a log of petseg train, or not readable ({error})") from error


def write(path: Path, rows: Sequence[Row]) -> None:
    """Write a log atomically.

    Raises:
        OutputError: It cannot be written.
    """
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(_columns().values()))
    writer.writeheader()
    writer.writerows(row.as_dict() for row in rows)
    try:
        write_atomic(path, text.getvalue().encode())
    except OSError as error:
        raise OutputError(f"{path}: cannot be written ({error.strerror or error})") from error


def _columns() -> dict[str, str]:
    """Returns the column of each attribute, in order."""
    return {field.name: COLUMNS.get(field.name, field.name) for field in dataclasses.fields(Row)}


def _number(value: Any, hint: type) -> Any:
    """Returns a number, or parses one from text; an integer for an integer attribute."""
    if isinstance(value, str):
        number = float(value)
        return int(number) if hint is int and number.is_integer() else number
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{value!r} is not a number")
    return value
