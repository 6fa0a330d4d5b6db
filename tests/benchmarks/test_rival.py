"""The rival is trained by petseg's trainer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from benchmarks import photos, records, rival, turns
from benchmarks.budget import budget
from benchmarks.rival import ENGINES, LrAspp, RivalTrainer, measured, timed_beside
from petseg import checkpoint, recipes
from petseg.config import DataConfig, TrainConfig
from petseg_runtime.artifact import default_model, open_artifact


@pytest.fixture(scope="module")
def best(tmp_path_factory: pytest.TempPathFactory, oxford_root: Path) -> Path:
    """The checkpoint after one epoch."""
    config = TrainConfig(epochs=1, batch=2, data=DataConfig(height=64, width=64))
    return RivalTrainer(config, oxford_root, tmp_path_factory.mktemp("rival"), device=torch.device("cpu")).fit()


def test_the_rival_learns_and_reloads_from_its_checkpoint(best: Path) -> None:
    network = LrAspp()
    network.load_state_dict(checkpoint.load(best).tensors)
    with torch.inference_mode():
        logits = network.eval()(torch.zeros(1, 3, 64, 64))
    assert logits.shape == (1, 1, 64, 64)


def test_the_rival_is_measured_on_every_available_test_set(best: Path, tmp_path: Path, oxford_root: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    for name in (photos.NATIVE, photos.OFFICIAL):
        (data / name).symlink_to(oxford_root)
    found = json.loads(json.dumps(measured(best, LrAspp, data)))
    assert list(found["sets"]) == [photos.TEST_SETS[photos.NATIVE], photos.TEST_SETS[photos.OFFICIAL]]
    assert all(0 <= values["readings"]["pet"]["iou"] <= 1 for values in found["sets"].values())
    assert found["parameters"] == 3_218_138


def test_the_rival_is_timed_alongside_the_bundled_model(monkeypatch: pytest.MonkeyPatch) -> None:
    height = open_artifact(default_model()).spec.height

    def by_size(run: Any, batch: np.ndarray, runs: int) -> list[float]:
        assert run(batch).shape == batch.shape[:3]
        return [float(batch.shape[1])] * runs

    for module in (rival, turns):
        monkeypatch.setattr(module, "timed", by_size)
    rows = timed_beside(32, rounds=2)
    computed = [(row["engine"].split()[0], row["precision"]) for row in rows]
    assert {engine for engine, _ in computed} == {engine for engine, _ in ENGINES}
    assert len(computed) == len(set(computed)) >= 2, "a CPU without bf16 computes in float32 either way"
    for row in rows:
        assert (row["milliseconds"], row["petseg_milliseconds"]) == ([32.0] * 2, [height] * 2)
        assert (row["median"], row["petseg_times_as_fast"]) == (32.0, 32 / height)


def test_both_networks_train_with_the_same_recipe_and_resume(
    tmp_path: Path, oxford_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tmp_path / "data"
    data.mkdir()
    (data / photos.OFFICIAL).symlink_to(oxford_root)
    monkeypatch.setattr(records, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(recipes, "load", lambda name: {"batch": 2, "model": {"width": 2}})
    options = ["--data", str(data), "--output", str(tmp_path / "runs"), "--size", "32", "--epochs"]
    for last in (["1"], ["1", "--resume"]):
        done = CliRunner().invoke(budget, [*options, *last])
        assert done.exit_code == 0, done.output
    record = records.load("budget")
    assert [network["parameters"] for network in record["networks"]] == [29_168, 3_218_138]
    for network in record["networks"]:
        assert network["epoch_took_seconds"] > 0
        assert list(network["sets"]) == [photos.TEST_SETS[photos.OFFICIAL]]
