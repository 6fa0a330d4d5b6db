"""The published network's run on a CPU: what the student and its teacher see, and the record."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor

from benchmarks import photos, records, width64
from benchmarks.width64 import GrowingDistillation, GrowingTrainer, main
from petseg import checkpoint
from petseg.config import TrainConfig, from_dict, load_toml
from petseg.distributed import Ranks
from petseg.evaluate import open_model
from petseg.model import AttentionUNet, AttentionUNetConfig
from petseg.run_state import BEST
from petseg.train import Trainer

#: width 2, as fast as possible
SMALL = """
epochs = 3
batch = 4
amp = "fp32"
model = {width = 2}
data = {height = 64, width = 64, workers = 0}
loss = {teacher = 0.5, features = 0.25}
"""


@pytest.fixture
def data(oxford_root: Path, tmp_path: Path) -> Path:
    """The same data set under two names."""
    folder = tmp_path / "data"
    folder.mkdir()
    for name in (photos.BEST, photos.COPIES):
        (folder / name).symlink_to(oxford_root)
    return folder


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    network = AttentionUNet(AttentionUNetConfig(width=2, stem="strided"))
    path = tmp_path / "teacher.safetensors"
    spec = {"height": 96, "width": 96, "threshold": 0.5, "cutout_threshold": 0.5}
    meta = {"model": {"width": 2, "stem": "strided"}, "spec": spec}
    checkpoint.save_checkpoint(path, network.state_dict(), meta)
    return path


def test_the_settings_are_of_the_published_network() -> None:
    config = from_dict(TrainConfig, load_toml(width64.CONFIG))
    assert config.model == AttentionUNetConfig(width=64)
    assert width64.SIDES[-1] == (config.data.height, 1.0) == (config.data.width, 1.0)
    ends = [end * config.epochs for _, end in width64.SIDES]
    assert ends == sorted(round(end) for end in ends)


def test_the_input_grows_over_the_run_and_the_weights_are_kept_and_measured(
    data: Path, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "small.toml").write_text(SMALL)
    for name, value in {
        "CONFIG": tmp_path / "small.toml",
        "WEIGHTS": tmp_path / "kept.safetensors",
        "SIDES": ((16, 0.3), (32, 0.6), (64, 1.0)),
        "TEACHER_SIDE": 96,
    }.items():
        monkeypatch.setattr(width64, name, value)
    monkeypatch.setattr(records, "RESULTS", tmp_path / "results")
    seen: dict[bool, list[int]] = {True: [], False: []}
    forward = AttentionUNet.with_features

    def watched(self: AttentionUNet, image: Tensor) -> Any:
        if self.training or self.config.stem == "strided":
            seen[self.training].append(image.shape[-1])
        return forward(self, image)

    monkeypatch.setattr(AttentionUNet, "with_features", watched)
    run = tmp_path / "runs" / "width64"
    words = ["train", "--data", str(data), "--output", str(run), "--teacher", str(teacher)]
    done = CliRunner().invoke(main, words, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    steps = len(seen[True]) // 3
    assert seen[True] == [16] * steps + [32] * steps + [64] * steps
    assert set(seen[False][1:]) == {96}, "but for the first call, which counts the channels of its features"

    done = CliRunner().invoke(main, ["record", str(run), "--data", str(data)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    record = json.loads((tmp_path / "results" / "training" / "width64.json").read_text())
    kept = checkpoint.load(tmp_path / "kept.safetensors")
    assert record["weights"]["sha256"] == kept.sha256
    assert {tensor.dtype for tensor in kept.tensors.values() if tensor.ndim == 4} == {torch.float16}
    assert [row["epochs"] for row in record["runs"]] == [3]
    assert record["runs"][0]["command"].startswith("python -m benchmarks.width64 train --data ")
    (found,) = record["tests"].values()
    assert f"IoU {found['iou']:.4f}" in done.output
    with open_model(tmp_path / "kept.safetensors", "cpu") as model:
        assert found["threshold"] == model.threshold


def test_the_last_of_several_runs_is_measured_and_not_kept(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(width64, "WEIGHTS", tmp_path / "kept.safetensors")
    monkeypatch.setattr(records, "RESULTS", tmp_path / "results")
    config = from_dict(
        TrainConfig,
        {"epochs": 1, "batch": 4, "model": {"width": 2}, "data": {"height": 32, "width": 32, "workers": 0}},
    )
    runs, cpu = [tmp_path / "first", tmp_path / "second"], torch.device("cpu")
    Trainer(config, data / photos.BEST, runs[0], device=cpu).fit()
    best = Trainer(config, data / photos.BEST, runs[1], device=cpu, init=runs[0] / BEST).fit()
    done = CliRunner().invoke(main, ["recipe", *map(str, runs), "--data", str(data)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    record = json.loads((tmp_path / "results" / "training" / "published-cpu.json").read_text())
    assert record["model"]["identity"] == checkpoint.load(best).sha256
    assert [row["name"] for row in record["runs"]] == ["first", "second"]
    assert record["tests"]
    assert not width64.WEIGHTS.exists()


def test_logits_have_the_size_of_the_photos_whatever_the_input() -> None:
    config = from_dict(TrainConfig, {"model": {"width": 2}, "data": {"height": 64, "width": 64}})
    network, teacher = AttentionUNet(config.model), AttentionUNet(config.model)
    distillation = GrowingDistillation(lambda: 32, config, Ranks(), network, teacher, torch.device("cpu"))
    logits, hinted = distillation.student(network)(torch.zeros(2, 3, 64, 64))
    assert logits.shape == (2, 1, 64, 64)
    assert [feature.shape[-1] for feature in hinted] == [4, 2, 4]


def test_a_run_without_a_teacher_is_refused(data: Path, tmp_path: Path) -> None:
    config = from_dict(TrainConfig, {"model": {"width": 2}, "data": {"height": 32, "width": 32}})
    with pytest.raises(SystemExit, match="needs a --teacher"):
        GrowingTrainer(config, data / photos.BEST, tmp_path / "run", device=torch.device("cpu"))
