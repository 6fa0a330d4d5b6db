"""TensorBoard events, read back with its own reader."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from petseg.cli import run

OPTIONS = ["--width", "2", "--size", "32x48", "--batch", "4", "--device", "cpu", "--set", "amp=fp32", "--epochs", "2"]


def events(folder: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0})
    found.Reload()
    return found


def test_curves_and_pictures(oxford_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    args = ["train", "--data", str(oxford_root), "--output", str(folder), *OPTIONS, "--tensorboard", "-q"]
    assert run(args) == 0, capsys.readouterr().err
    found = events(folder / "tensorboard")
    assert [event.step for event in found.Scalars("train/loss")] == list(range(1, 11))
    assert found.Scalars("train/lr")[0].value == pytest.approx(1e-3)
    assert [event.step for event in found.Scalars("epoch/val_iou")] == [5, 10]
    assert set(found.Tags()["scalars"]) >= {
        "epoch/val_dice",
        "epoch/images_per_s",
        "epoch/val_mean_iou_border_ignored_at_0.5",
    }
    pictures = found.Images("validation")
    assert [event.step for event in pictures] == [5, 10]
    with Image.open(io.BytesIO(pictures[-1].encoded_image_string)) as image:
        assert image.size == (4 * 48, 32)  # one validation photo: photo, truth, probability, mask
        pixels = np.array(image)
    assert set(np.unique(pixels[:, 144:])) <= {0, 255}
    assert {0, 255} <= set(np.unique(pixels[:, 48:96]))

    # a finished run resumed adds nothing, and is reported as without TensorBoard
    assert run([*args[:-1], "--resume"]) == 0
    assert "attention U-Net, width" in capsys.readouterr().err
    assert len(list((folder / "tensorboard").iterdir())) == 1


def test_a_folder_that_cannot_be_written_is_an_output_error(
    oxford_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "tensorboard").write_text("in the way")
    args = ["train", "--data", str(oxford_root), "--output", str(tmp_path / "run"), *OPTIONS, "--tensorboard", "-q"]
    assert run(args) == 6
    assert "tensorboard: cannot be written to" in capsys.readouterr().err


def test_it_is_imported_only_where_it_is_asked_for() -> None:
    code = "import sys, petseg.commands.train, petseg.train, petseg.record; sys.exit('tensorboard' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
