"""The mean of two checkpoints' weights, and its metrics."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.embedded import mean as averaging
from petseg.checkpoint import Checkpoint, load, save_checkpoint
from petseg.config import TrainConfig, from_dict
from petseg.data import Split, find
from petseg.evaluate import evaluate, open_model
from petseg.metrics import Border
from petseg.train import Trainer


@pytest.fixture(scope="module")
def two_checkpoints(oxford_root: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The best checkpoints of two runs on the same photos."""
    folder = tmp_path_factory.mktemp("mean")
    for seed in (0, 1):
        small = {"epochs": 2, "batch": 4, "amp": "fp32", "seed": seed, "schedule": {"restart_epochs": 2}}
        config = {**small, "model": {"width": 2}, "data": {"height": 32, "width": 32, "val_fraction": 0.25}}
        Trainer(from_dict(TrainConfig, config), oxford_root, folder / str(seed), device=torch.device("cpu")).fit()
    return [folder / str(seed) / "best.safetensors" for seed in (0, 1)]


def test_the_mean_has_new_thresholds_and_metrics(
    two_checkpoints: list[Path], oxford_root: Path, tmp_path: Path
) -> None:
    out = tmp_path / "mean.safetensors"
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "oxford-iiit-pet").symlink_to(oxford_root)
    words = [str(out), *map(str, two_checkpoints), "--data", str(tmp_path / "data")]
    averaging.mean(words, standalone_mode=False)
    first, second, made = (load(path) for path in (*two_checkpoints, out))
    for name, value in made.tensors.items():
        a, b = first.tensors[name], second.tensors[name]
        assert torch.equal(value, (a + b) / 2 if a.is_floating_point() else a), name
    assert made.meta["mean_of"] == [first.sha256, second.sha256]
    with open_model(out, "cpu") as model:
        pairs = find(oxford_root, Split.VAL, val_fraction=0.25)
        result = evaluate(model.run, pairs, 32, 32)
        told = made.meta["validation"]
        assert told["val_iou"] == max(result.counts(k / 255).iou for k in range(1, 255))
        assert told["val_threshold"] == model.threshold
        assert told["val_mean_iou_border_ignored_at_0.5"] == result.image_ious(0.5, Border.IGNORED).mean()


@pytest.mark.parametrize(("key", "values"), [("model", {"width": 4}), ("data", {"names_sha256": "another"})])
def test_checkpoints_of_different_networks_are_rejected(
    two_checkpoints: list[Path], tmp_path: Path, key: str, values: dict[str, Any]
) -> None:
    loaded: list[Checkpoint] = [load(path) for path in two_checkpoints]
    other = {**loaded[1].meta, key: {**loaded[1].meta[key], **values}}
    save_checkpoint(tmp_path / "other.safetensors", loaded[1].tensors, other)
    with pytest.raises(SystemExit, match=f"cannot be averaged: {key} differs"):
        averaging.mean_of([loaded[0], load(tmp_path / "other.safetensors")])
