"""A new built-in model is put in place first, and then recorded with its training runs."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch

from benchmarks import records
from benchmarks.embedded import measure, ship
from benchmarks.photos import BEST, COPIES, NATIVE, TEST_SETS
from petseg.config import TrainConfig, from_dict
from petseg.record import write_record
from petseg.train import Trainer
from petseg_runtime.artifact import default_model, open_artifact
from petseg_runtime.errors import CheckpointError
from petseg_runtime.verify import proof_for


@pytest.fixture(scope="module")
def run(oxford_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two epochs."""
    small = {"epochs": 2, "batch": 4, "amp": "fp32", "model": {"width": 2}, "data": {"height": 32, "width": 32}}
    trainer = Trainer(
        from_dict(TrainConfig, small),
        oxford_root,
        tmp_path_factory.mktemp("ship") / "edge9",
        device=torch.device("cpu"),
        provenance={"command": "petseg train", "commit": "abc"},
    )
    trainer.fit()
    write_record(trainer)
    return trainer.output


def test_a_run_is_recorded_with_its_commit_and_times(run: Path) -> None:
    (told,) = ship.trained([run])
    ended = json.loads((run / "run.json").read_text())
    assert (told["name"], told["commit"], told["command"]) == ("edge9", "abc", "petseg train")
    for key in ("epochs", "best", "seconds", "images_per_s", "data_wait", "validation_reached_published"):
        assert told[key] == ended[key]
    for key in ("config", "data", "device", "processes", "threads", "peak_gpu_memory_bytes"):
        assert told[key] == ended[key]
    assert told["elapsed"] == told["log"][-1]["elapsed"]
    assert [row["epoch"] for row in told["log"]] == [1, 2]


def test_a_stopped_run_is_recorded_as_far_as_known(run: Path, tmp_path: Path) -> None:
    for name in ("best.safetensors", "log.csv"):
        (tmp_path / name).write_bytes((run / name).read_bytes())
    (told,) = ship.trained([tmp_path])
    assert (told["processes"], told["peak_gpu_memory_bytes"]) == (None, None)
    assert [row["epoch"] for row in told["log"]] == [1, 2]


@pytest.fixture
def place(oxford_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Temporary paths for all that is replaced: models/edge.onnx, weights/, results/; and data/ to measure on."""
    shipped = tmp_path / "models" / "edge.onnx"
    shipped.parent.mkdir()
    shutil.copy(default_model(), shipped)
    for module in (ship, measure, records):
        monkeypatch.setattr(module, "default_model", lambda: shipped)
    monkeypatch.setattr(ship, "WEIGHTS", tmp_path / "weights" / "edge.safetensors")
    monkeypatch.setattr(records, "RESULTS", tmp_path / "results")
    (tmp_path / "data").mkdir()
    for name in (COPIES, NATIVE, BEST):
        (tmp_path / "data" / name).symlink_to(oxford_root)
    return tmp_path


@pytest.mark.slow
@pytest.mark.usefixtures("known_graph")  # four exports of the same network
def test_a_shipped_model_is_measured_verified_and_recorded(run: Path, place: Path) -> None:
    words = [str(run / "best.safetensors"), "--data", str(place / "data"), "--run", str(run)]
    before = open_artifact(place / "models" / "edge.onnx")
    ship.ship(words, standalone_mode=False)
    assert (place / "weights" / "edge.safetensors").read_bytes() == (run / "best.safetensors").read_bytes()
    shipped = open_artifact(before.path)
    assert shipped.identity != before.identity
    assert (
        shipped.provenance["checkpoint_sha256"] == hashlib.sha256((run / "best.safetensors").read_bytes()).hexdigest()
    )
    assert proof_for(shipped).names, "its parity record lies beside it"
    assert shipped.spec.certain_share == before.spec.certain_share == 0.25, "a checkpoint has no certain_share"
    for name, folder in measure.RECORDS.items():
        record = records.load(name)
        assert record["model"]["identity"] == shipped.identity, "the measured file is the built-in one"
        for reading in shipped.provenance["measured"][TEST_SETS[folder]].values():
            assert 0 <= reading["iou"] <= 1
    assert records.load("training/edge")["shipped_model"] == f"{ship.NAME}, {shipped.identity[:12]}"
    assert [told["name"] for told in records.load("training/edge")["runs"]] == ["edge9"]

    ship.ship([*words, "--on-from-shipped"], standalone_mode=False)
    assert [(told["name"], told["commit"]) for told in records.load("training/edge")["runs"]] == [("edge9", "abc")] * 2


def test_a_folder_without_a_run_replaces_nothing(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ship, "WEIGHTS", tmp_path / "weights" / "edge.safetensors")
    words = [str(run / "best.safetensors"), "--data", str(tmp_path), "--run", str(tmp_path)]
    with pytest.raises(CheckpointError, match="no such file"):
        ship.ship(words, standalone_mode=False)
    assert not (tmp_path / "weights").exists()
