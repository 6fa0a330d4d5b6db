"""The training log: a row for each epoch, in ``log.csv`` for people and in the state of a run for ``--resume``."""

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

#: The log's file, beside the checkpoints.
LOG: Final = "log.csv"
#: Columns that are not called as their attribute; in older logs they are.
COLUMNS: Final = {"val_mean_iou_border_ignored": "val_mean_iou_border_ignored_at_0.5"}


@dataclass(frozen=True, kw_only=True)
class Row:
    """An epoch that is done and validated. What is measured on validation photos is the moving average's.

    On the disk and in JSON, each attribute is the column of its name, or of the one in :data:`COLUMNS`.

    Attributes:
        epoch: Its number, from 1.
        step: Steps of the run up to its end.
        loss: Mean of the training loss over its steps, 0 or more.
        val_iou: IoU of all validation pixels together, 0 to 1, the trimap's border as background, at ``val_threshold``.
        val_dice: Their Dice coefficient, 0 to 1, read in the same way.
        val_threshold: The probability, 0 to 1, from which on a pixel is pet: the one of the highest ``val_iou``.
        val_mean_iou_border_ignored: Mean of the validation photos' own IoUs, 0 to 1, at threshold 0.5, the border
            ignored.
        seconds: What its steps took, with waiting for photos, without validation.
        images_per_s: Photos trained on, those of all processes, in each of these seconds.
        data_wait: Share of ``seconds`` that was spent waiting for photos, 0 to 1.
        elapsed: Seconds of the run up to its validation, all sessions added up, with reading the photos and validation.
            This and what follows are None where the row is of a version that did not keep it.
        skipped: Photos left out so far because they could not be used.
        gpu_memory: Largest GPU memory in use so far, bytes; 0 on a CPU.
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
    elapsed: float | None = None
    skipped: int | None = None
    gpu_memory: int | None = None

    def as_dict(self) -> dict[str, float]:
        """The values by column, in the log's order, without those that are None."""
        values = {column: getattr(self, name) for name, column in _columns().items()}
        return {column: value for column, value in values.items() if value is not None}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Row:
        """A row from its columns: of :meth:`as_dict`, of an older version, or of a line of the file, which is text.

        Args:
            values: Numbers, or their text, by column. Columns that are none of a row's are ignored.

        Raises:
            TypeError: A column is missing, or what is in it is no number.
            ValueError: A text in it is no number.
        """
        found = {name: values.get(column, values.get(name)) for name, column in _columns().items()}
        hints = typing.get_type_hints(cls)
        return cls(**{name: _number(value, hints[name]) for name, value in found.items() if value not in (None, "")})


def read(path: Path) -> list[Row]:
    """The rows of a log, one for each epoch.

    Raises:
        TrainingError: It cannot be read, or is not a log of ``petseg train``.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            return [Row.from_dict(line) for line in csv.DictReader(file)]
    except (OSError, TypeError, ValueError, csv.Error) as error:
        raise TrainingError(f"{path}: not a log of petseg train that can be read ({error})") from error


def write(path: Path, rows: Sequence[Row]) -> None:
    """Write a log, whole or not at all; what a row of an older version lacks is empty.

    Raises:
        OutputError: It cannot be written.
    """
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(_columns().values()), restval="")
    writer.writeheader()
    writer.writerows(row.as_dict() for row in rows)
    try:
        write_atomic(path, text.getvalue().encode())
    except OSError as error:
        raise OutputError(f"{path}: cannot be written ({error.strerror or error})") from error


def _columns() -> dict[str, str]:
    """The column of each attribute, in order."""
    return {field.name: COLUMNS.get(field.name, field.name) for field in dataclasses.fields(Row)}


def _number(value: Any, hint: Any) -> Any:
    """A number, or what a text says; text for whole numbers gives whole numbers."""
    if isinstance(value, str):
        number = float(value)
        whole = int in (hint, *typing.get_args(hint)) and number.is_integer()
        return int(number) if whole else number
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{value!r} is not a number")
    return value
