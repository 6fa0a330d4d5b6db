"""The complete workflow through the real command line: train, export, infer, evaluate, info."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pytest
from PIL import Image

#: A function from the words of a command line to its standard output.
Petseg: TypeAlias = Callable[..., str]


@pytest.fixture(scope="session")
def petseg(forks: Any) -> Petseg:
    """Run the command line in a separate process, which must succeed."""

    def run(*args: object) -> str:
        done = forks(*args)
        assert done.returncode == 0, f"{args} gave {done.returncode}\n{done.stdout}\n{done.stderr}"
        assert "Traceback" not in done.stderr
        return str(done.stdout)

    return run


@pytest.fixture(scope="module")
def run(petseg: Petseg, oxford_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a tiny network that learns the synthetic pets well enough to pass the parity test."""
    output = tmp_path_factory.mktemp("run")
    settings = ["optimizer.lr=0.01", "schedule.name=one-cycle", "data.val_fraction=0.2", "augment.rotate=0"]
    petseg(
        *("train", "--data", oxford_root, "--output", output, "--device", "cpu"),
        *("--width", 4, "--size", "64x64", "--batch", 4, "--epochs", 12),
        *(word for setting in settings for word in ("--set", setting)),
    )
    return output


@pytest.fixture(scope="module")
def exported(petseg: Petseg, run: Path, oxford_root: Path) -> Path:
    file = run / "model.onnx"
    photos = oxford_root / "images"  # all 30: the validation split alone would be a smoke test
    receipt = json.loads(petseg("export", run / "best.safetensors", "-o", file, "--data", photos, "--json"))
    assert receipt["passed"]
    assert receipt["rows"][0]["max_difference"] <= 1
    assert receipt["kind"] == "full"
    return file


def test_training_writes_checkpoints_log_and_pictures(run: Path) -> None:
    assert {path.name for path in run.iterdir()} >= {
        "best.safetensors",
        "last.safetensors",
        "log.csv",
        "curves.png",
        "predictions.png",
    }


def test_the_trained_model_finds_the_pets(petseg: Petseg, exported: Path, oxford_root: Path) -> None:
    metrics = json.loads(petseg("evaluate", exported, "--backend", "ort", "--data", oxford_root, "--json"))
    assert metrics["schema_version"] == 1
    assert metrics["photos"] == 6
    # On the synthetic ellipses, an empty or a full mask has an IoU of less than half of this.
    assert metrics["iou"] > 0.6


def test_checkpoint_and_exported_file_have_the_same_iou(
    petseg: Petseg, run: Path, exported: Path, oxford_root: Path
) -> None:
    of_file = json.loads(petseg("evaluate", exported, "--backend", "ort", "--data", oxford_root, "--json"))
    of_checkpoint = json.loads(petseg("evaluate", run / "best.safetensors", "--data", oxford_root, "--json"))
    assert of_file["threshold"] == of_checkpoint["threshold"]
    for name in ("iou", "dice", "accuracy", "precision", "recall"):
        assert of_file[name] == pytest.approx(of_checkpoint[name], abs=2e-3)


def test_the_exported_file_segments_a_folder(petseg: Petseg, exported: Path, oxford_root: Path, tmp_path: Path) -> None:
    out = petseg("infer", oxford_root / "images", "--model", exported, "--as", "mask", "--output", tmp_path, "--json")
    *results, summary = map(json.loads, out.splitlines())
    assert summary["failed"] == 0
    assert summary["done"] == len(results) == len(list((oxford_root / "images").iterdir()))
    for result in results:
        with Image.open(result["output"]) as mask:
            assert mask.size == (result["width"], result["height"])
            assert set(np.unique(np.array(mask))) <= {0, 255}


def test_the_file_states_its_provenance(petseg: Petseg, exported: Path) -> None:
    info = json.loads(petseg("info", exported, "--json"))
    assert info["spec"]["height"] == info["spec"]["width"] == 64
    assert info["receipt"]["passed"]
    assert "train" in info["provenance"]["training"]["command"]
    assert "parity" in petseg("info", exported)
