"""The rival goes through petseg's own trainer."""

from __future__ import annotations

from pathlib import Path

import torch

from benchmarks.rival import ENGINES, LrAspp, RivalTrainer, timed_beside
from petseg import checkpoint
from petseg.config import DataConfig, TrainConfig
from petseg_runtime.spec import ModelSpec


def test_the_rival_learns_and_comes_back_from_its_file(tmp_path: Path, oxford_root: Path) -> None:
    config = TrainConfig(epochs=1, batch=2, data=DataConfig(height=64, width=64))
    best = RivalTrainer(config, oxford_root, tmp_path / "run", device=torch.device("cpu")).fit()
    network = LrAspp()
    network.load_state_dict(checkpoint.load(best).tensors)
    with torch.inference_mode():
        logits = network.eval()(torch.zeros(1, 3, 64, 64))
    assert logits.shape == (1, 1, 64, 64)


def test_its_time_is_taken_beside_the_model_that_ships() -> None:
    rows = timed_beside(LrAspp().eval(), ModelSpec(name="rival", height=32, width=32), rounds=2)
    assert [row["engine"].split()[0] for row in rows] == [engine for engine, _ in ENGINES]
    assert all(len(row["milliseconds"]) == len(row["petseg_milliseconds"]) == 2 for row in rows)
    assert all(row["median"] > 0 and row["petseg_times_as_fast"] > 0 for row in rows)
