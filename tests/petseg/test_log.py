"""The log: what is written can be read back."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest

from petseg.log import LOG, Row, read, write
from petseg_runtime.errors import OutputError, TrainingError
from tiny_runs import a_row


def test_a_row_has_the_columns_of_the_file_in_their_order() -> None:
    assert list(a_row().as_dict()) == [
        "epoch",
        "step",
        "loss",
        "val_iou",
        "val_dice",
        "val_threshold",
        "val_mean_iou_border_ignored_at_0.5",
        "seconds",
        "images_per_s",
        "data_wait",
        "elapsed",
        "skipped",
        "gpu_memory",
    ]


def test_a_log_is_read_as_it_was_written(tmp_path: Path) -> None:
    rows = [a_row(epoch=n, step=5 * n, loss=1 / (3 * n), seconds=float(n), gpu_memory=7 * 2**30) for n in (1, 2, 3)]
    write(tmp_path / LOG, rows)
    found = read(tmp_path / LOG)
    assert found == rows
    for row, expected in zip(found, rows, strict=True):
        kinds = [[type(value) for value in dataclasses.astuple(each)] for each in (row, expected)]
        assert kinds[0] == kinds[1], "epochs are whole numbers, seconds are not, whatever they are"


def test_a_row_is_the_same_after_json() -> None:
    row = a_row(val_dice=1 / 3)
    assert Row.from_dict(json.loads(json.dumps(row.as_dict()))) == row


def test_columns_of_others_are_ignored() -> None:
    assert Row.from_dict({**a_row().as_dict(), "notes": "a good one"}) == a_row()


def test_a_value_that_is_not_defined_is_kept(tmp_path: Path) -> None:
    write(tmp_path / LOG, [a_row(val_dice=math.nan)])
    (row,) = read(tmp_path / LOG)
    assert math.isnan(row.val_dice)


@pytest.mark.parametrize("column", a_row().as_dict())
@pytest.mark.parametrize("value", [None, "", "much", [1], True])
def test_a_row_that_lacks_a_number_is_rejected(column: str, value: object) -> None:
    with pytest.raises((TypeError, ValueError)):
        Row.from_dict({**a_row().as_dict(), column: value})


@pytest.mark.parametrize("data", [b"a,b\n1,2\n", b"epoch\n1\n", b"\xff\xfe", b"epoch,loss\n1,x\n"])
def test_a_file_that_is_no_log_is_rejected_by_name(tmp_path: Path, data: bytes) -> None:
    (tmp_path / LOG).write_bytes(data)
    with pytest.raises(TrainingError, match=r"log\.csv: not a log of petseg train, or not readable"):
        read(tmp_path / LOG)


def test_a_log_that_is_not_there_is_an_error_of_its_own(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"none\.csv: not a log .*No such file"):
        read(tmp_path / "none.csv")


def test_a_log_that_cannot_be_written_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    write(tmp_path / LOG, [a_row()])
    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OutputError, match=r"log\.csv: cannot be written \(No space left"):
        write(tmp_path / LOG, [a_row(), a_row(epoch=2)])
    assert read(tmp_path / LOG) == [a_row()]
    assert [path.name for path in tmp_path.iterdir()] == [LOG]
