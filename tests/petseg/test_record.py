"""run.json: the settings and results of a run."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

import petseg_runtime
from petseg import record as records
from petseg.checkpoint import load
from petseg.config import TrainConfig, from_dict, to_dict
from petseg.record import PUBLISHED_IOU, commit, reached, record, write_record
from petseg.run_state import BEST
from petseg.train import Trainer
from petseg_runtime import __version__
from petseg_runtime.errors import OutputError
from tiny_runs import a_row

SETTINGS: dict[str, Any] = {
    "epochs": 2,
    "batch": 4,
    "amp": "fp32",
    "model": {"width": 2},
    "data": {"height": 32, "width": 32, "val_fraction": 0.1},
    "schedule": {"restart_epochs": 2},
}


@pytest.fixture(scope="module")
def finished(oxford_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    trainer = Trainer(
        from_dict(TrainConfig, SETTINGS),
        oxford_root,
        tmp_path_factory.mktemp("record") / "run",
        device=torch.device("cpu"),
        provenance={"command": "petseg train", "recipe": "edge", "commit": "abc+"},
    )
    trainer.fit()
    return trainer


def test_a_record_says_what_was_run_and_what_it_reached(finished: Trainer) -> None:
    write_record(finished)
    found = json.loads((finished.output / records.RUN).read_text())
    assert found == record(finished)
    rows = finished.state.history
    assert (found["schema_version"], found["recipe"], found["command"]) == (2, "edge", "petseg train")
    assert found["commit"] == "abc+", "that of the start, which the checkpoints keep"
    assert load(finished.output / BEST).meta["provenance"]["commit"] == "abc+"
    assert found["config"] == to_dict(finished.config)
    assert found["data"]["train_photos"] == 22
    assert found["data"]["names_sha256"] == finished.meta["data"]["names_sha256"]
    assert finished.meta["data"].keys() - found["data"].keys() == {"train_keys"}
    assert found["best"] == max(rows, key=lambda row: row.val_iou).as_dict()
    assert found["warnings"] == finished.warnings == finished.photos.warnings
    assert len(found["warnings"]) == 1, "two photos to validate on are few"
    assert (found["epochs"], found["stopped_early"], found["processes"]) == (2, False, 1)
    assert found["elapsed"] >= rows[-1].elapsed > rows[0].elapsed > rows[0].seconds > 0
    assert found["seconds"] == rows[0].seconds + rows[1].seconds < rows[-1].elapsed
    assert found["images_per_s"] == pytest.approx(40 / sum(row.seconds for row in rows))
    assert 0 < found["data_wait"] < 1
    assert (found["device"], found["precision"]) == ("cpu", "float32")
    assert (found["teacher"], found["peak_gpu_memory_bytes"], found["versions"]["cuda"]) == (None, None, None)
    assert (found["versions"]["petseg"], found["versions"]["torch"]) == (__version__, torch.__version__)


@pytest.mark.parametrize(("ious", "epoch"), [([0.5, 0.6], None), ([0.84, 0.9], 0), ([0.2, PUBLISHED_IOU], 1)])
def test_the_time_to_the_published_figure(
    finished: Trainer, monkeypatch: pytest.MonkeyPatch, ious: list[float], epoch: int | None
) -> None:
    rows = [dataclasses.replace(row, val_iou=iou) for row, iou in zip(finished.state.history, ious, strict=True)]
    monkeypatch.setattr(finished.state, "history", rows)
    want = (
        {"val_iou_at_least": 0.8375, "epoch": float(epoch + 1), "elapsed": rows[epoch].elapsed}
        if epoch is not None
        else None
    )
    assert record(finished)["validation_reached_published"] == want


def test_the_best_epoch_is_the_one_of_the_highest_iou() -> None:
    rows = [a_row(epoch=number, val_iou=iou) for number, iou in ((1, 0.5), (2, 0.7), (3, 0.6))]
    assert reached(rows, 4)["best"] == rows[1].as_dict()


def test_the_share_of_waiting_is_over_the_whole_run(finished: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        dataclasses.replace(row, seconds=s, data_wait=w)
        for row, s, w in zip(finished.state.history, (3, 1), (0, 1), strict=True)
    ]
    monkeypatch.setattr(finished.state, "history", rows)
    assert math.isclose(record(finished)["data_wait"], 0.25)


def test_a_record_that_cannot_be_written_is_an_output_error(
    finished: Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(finished, "output", Path(shutil.copytree(finished.output, tmp_path / "run")))
    (tmp_path / "run" / "run.json").unlink(missing_ok=True)  # another test may have written one
    (tmp_path / "run" / "run.json").mkdir()
    with pytest.raises(OutputError, match=r"run\.json"):
        write_record(finished)


def test_the_commit_is_that_of_a_checkout_of_petseg_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*words: str) -> str:
        who = ["-c", "user.name=t", "-c", "user.email=t@t"]
        done = subprocess.run(["git", "-C", str(tmp_path), *who, *words], check=True, capture_output=True, text=True)
        return done.stdout.strip()

    copy = tmp_path / "petseg" / "record.py"
    copy.parent.mkdir()
    shutil.copy(records.__file__, copy)
    monkeypatch.setattr(records, "__file__", str(copy))
    assert commit() is None, "no checkout"
    git("init", "-q")
    assert commit() is None, "a checkout of something else"
    git("add", ".")
    git("commit", "-q", "-m", "one")
    assert commit() == git("rev-parse", "HEAD")
    runtime = tmp_path / "runtime" / "petseg_runtime" / "images.py"
    for changed in (runtime, copy):
        before = changed.read_bytes() if changed.exists() else b""
        changed.parent.mkdir(parents=True, exist_ok=True)
        changed.write_bytes(before)
        git("add", ".")
        git("commit", "-q", "--allow-empty", "-m", "two")
        monkeypatch.setattr(petseg_runtime, "__file__", str(runtime.with_name("__init__.py")))
        assert commit() == git("rev-parse", "HEAD")
        changed.write_bytes(b"changed")
        assert commit() == git("rev-parse", "HEAD") + "+", changed
        changed.write_bytes(before)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert commit() is None, "no git"
