"""What ships is put in its place first, and then recorded with the runs that led to it."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import pytest
import torch

from benchmarks import records
from benchmarks.embedded import ship
from petseg.config import TrainConfig, from_dict
from petseg.record import write_record
from petseg.train import Trainer
from petseg_runtime.errors import CheckpointError


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


def test_a_run_is_told_with_its_commit_and_its_times(run: Path) -> None:
    (told,) = ship.trained([run])
    ended = json.loads((run / "run.json").read_text())
    assert (told["name"], told["commit"], told["command"]) == ("edge9", "abc", "petseg train")
    for key in ("epochs", "best", "seconds", "images_per_s", "data_wait", "validation_reached_published"):
        assert told[key] == ended[key]
    for key in ("config", "data", "device", "processes", "threads", "peak_gpu_memory_bytes"):
        assert told[key] == ended[key]
    assert told["elapsed"] == told["log"][-1]["elapsed"]
    assert [row["epoch"] for row in told["log"]] == [1, 2]


def test_a_run_that_was_stopped_or_is_of_an_older_version_is_told_as_far_as_it_goes(run: Path, tmp_path: Path) -> None:
    (tmp_path / "best.safetensors").write_bytes((run / "best.safetensors").read_bytes())
    with (run / "log.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    rows[0]["elapsed"] = ""
    with (tmp_path / "log.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    (told,) = ship.trained([tmp_path])
    assert (told["processes"], told["peak_gpu_memory_bytes"]) == (None, None)
    assert "elapsed" not in told["log"][0]
    assert told["elapsed"] == float(rows[1]["elapsed"])


@pytest.mark.parametrize("on", [True, False])
def test_the_record_is_of_the_model_that_ships_now(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, on: bool
) -> None:
    shipped = tmp_path / "shipped.onnx"
    shipped.write_text("the old one")

    def export(checkpoint: Path, config: Any) -> Any:
        config.output.write_text("the new one")
        return SimpleNamespace(receipt=SimpleNamespace(as_dict=dict))

    @click.command()
    @click.option("--data")
    def embedded(data: str) -> None:
        assert shipped.read_text() == "the new one"

    monkeypatch.setattr(records, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(records, "shipped_model", shipped.read_text)
    monkeypatch.setattr(ship, "RECORDS", {})
    monkeypatch.setattr(ship, "WEIGHTS", tmp_path / "weights" / "edge.safetensors")
    monkeypatch.setattr(ship, "embedded", embedded)
    monkeypatch.setattr(ship, "export", export)
    monkeypatch.setattr(ship, "default_model", lambda: shipped)
    monkeypatch.setattr(ship, "original_size", lambda data: data)
    monkeypatch.setattr(ship, "open_artifact", lambda path: SimpleNamespace(identity=path.read_text()))
    (tmp_path / "results" / "training").mkdir(parents=True)
    before = {"runs": [{"name": "old"}, {"name": "newer", "commit": "123"}]}
    (tmp_path / "results" / "training" / "edge.json").write_text(json.dumps(before))

    words = [str(run / "best.safetensors"), "--data", str(tmp_path), "--run", str(run)]
    ship.ship([*words, "--on-from-shipped"] if on else words, standalone_mode=False)
    found = records.load("training/edge")
    assert found["shipped_model"] == "the new one"
    assert [(r["name"], r["commit"]) for r in found["runs"]] == [("old", None), ("newer", "123")] * on + [
        ("edge9", "abc")
    ]
    assert (tmp_path / "weights" / "edge.safetensors").read_bytes() == (run / "best.safetensors").read_bytes()


def test_a_folder_that_holds_no_run_replaces_nothing(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ship, "WEIGHTS", tmp_path / "weights" / "edge.safetensors")
    words = [str(run / "best.safetensors"), "--data", str(tmp_path), "--run", str(tmp_path)]
    with pytest.raises(CheckpointError, match="no such file"):
        ship.ship(words, standalone_mode=False)
    assert not (tmp_path / "weights").exists()
