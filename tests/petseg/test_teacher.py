"""A network that learns from another model's probabilities."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from petseg.checkpoint import load, load_model, save_checkpoint
from petseg.reference import torch_run
from petseg.run_state import BEST, LAST
from petseg.teacher import open_teacher
from petseg.train import Trainer
from petseg_export import OnnxConfig, export
from petseg_runtime.errors import CheckpointError, EngineError
from tiny_runs import CPU, PER_EPOCH, Recorder, Run, tiny


def test_a_run_with_a_teacher_learns_from_it_and_names_it(oxford_root: Path, tmp_path: Path, whole: Run) -> None:
    teacher = whole.folder / BEST
    losses = []
    for share in (0.0, 1.0):
        folder, observer = tmp_path / str(share), Recorder()
        config = tiny("epochs=1", f"loss.teacher={share}")
        Trainer(config, oxford_root, folder, device=CPU, teacher=teacher, observer=observer).fit()
        losses.append(observer.losses)
        assert load(folder / BEST).meta["teacher"] == {"file": BEST, "identity": whole.best.sha256}
    assert losses[0] == pytest.approx(whole.observer.losses[:PER_EPOCH], abs=1e-6), "no share, no difference"
    assert losses[1] != pytest.approx(losses[0], abs=1e-2)
    assert "teacher" not in whole.best.meta


def test_the_target_is_the_mean_of_the_teachers_output_for_a_photo_and_its_mirror_image(
    oxford_root: Path, tmp_path: Path, whole: Run
) -> None:
    still = ("augment.flip=0", "augment.rotate=0", "augment.brightness=0", "augment.contrast=0", "augment.saturation=0")
    # Three epochs leave it unsure of everything.
    surer = {name: 10 * tensor if name.startswith("head.") else tensor for name, tensor in whole.best.tensors.items()}
    teacher = tmp_path / "teacher.safetensors"
    save_checkpoint(teacher, surer, whole.best.meta)
    trainer = Trainer(tiny(*still), oxford_root, tmp_path / "run", device=CPU, teacher=teacher)
    run = torch_run(load_model(teacher)[0])
    for draw in range(3):
        photo, labels, _ = trainer.photos.train[draw]
        straight = run(photo.numpy()[None])[0].astype(float)
        mirrored = run(photo.numpy()[None, :, ::-1].copy())[0, :, ::-1]
        assert abs(labels[1].numpy() - (straight + mirrored) / 2).max() <= 0.5
        assert straight.std() > 10


def test_a_teacher_that_is_no_model_is_rejected(oxford_root: Path, tmp_path: Path, whole: Run) -> None:
    with pytest.raises(CheckpointError, match=r"last\.safetensors: the state of a run"):
        Trainer(tiny(), oxford_root, tmp_path, device=CPU, teacher=whole.folder / LAST)


def test_a_teacher_that_has_seen_the_validation_photos_is_reported_for_checkpoints_and_exported_files(
    oxford_root: Path, tmp_path: Path, whole: Run, known_graph: None
) -> None:
    best, exported = whole.folder / BEST, tmp_path / "teacher.onnx"
    export(best, OnnxConfig(output=exported, data=oxford_root, split="test", photos=4))
    for teacher in (best, exported):
        for seed, said in ((1, True), (0, False)):
            observer, config = Recorder(), tiny(f"data.split_seed={seed}")
            Trainer(config, oxford_root, tmp_path / "out", device=CPU, teacher=teacher, observer=observer)
            warned = [m for m in observer.messages if "teacher was trained on 2 of the 2 validation photos" in m]
            assert len(warned) == said, (teacher, seed)


def test_an_exported_teacher_needs_no_engine_for_the_device_of_the_run(
    oxford_root: Path, tmp_path: Path, whole: Run, known_graph: None
) -> None:
    exported = tmp_path / "teacher.onnx"
    export(whole.folder / BEST, OnnxConfig(output=exported, data=oxford_root, split="test", photos=4))
    photo = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    said = []
    for device in ("cuda:7", "cpu"):
        with open_teacher(exported, 32, 32, torch.device(device)) as teacher:
            assert teacher is not None
            said.append(teacher(photo))
    assert np.array_equal(*said)


def test_a_checkpoint_as_teacher_runs_on_the_device_of_the_run_only(whole: Run) -> None:
    """Minutes on a GPU would be hours on a CPU."""
    with pytest.raises(EngineError, match="cuda:7"), open_teacher(whole.folder / BEST, 32, 32, torch.device("cuda:7")):
        pass
