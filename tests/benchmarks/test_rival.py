"""The rival goes through petseg's own trainer."""

from __future__ import annotations

from pathlib import Path

import torch

from benchmarks.rival import LrAspp, RivalTrainer
from petseg import checkpoint
from petseg.config import DataConfig, TrainConfig


def test_the_rival_learns_and_comes_back_from_its_file(tmp_path: Path, oxford_root: Path) -> None:
    config = TrainConfig(epochs=1, batch=2, data=DataConfig(height=64, width=64))
    best = RivalTrainer(config, oxford_root, tmp_path / "run", device=torch.device("cpu")).fit()
    network = LrAspp()
    network.load_state_dict(checkpoint.load(best).tensors)
    with torch.inference_mode():
        logits = network.eval()(torch.zeros(1, 3, 64, 64))
    assert logits.shape == (1, 1, 64, 64)
