"""The figures are those in the command's records, without the first epoch."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import training
from petseg import log, recipes
from petseg.config import TrainConfig, from_dict, override
from petseg.data import Split, find
from tiny_runs import a_row


def test_the_command_selects_the_named_network() -> None:
    for run in training.RUNS:
        words = training.words(run, 4, "cpu", workers=0)
        raw = recipes.load(run.recipe)
        for name, value in itertools.pairwise(words):
            if name == "--set":
                override(raw, value)
        config = from_dict(TrainConfig, raw)
        assert config.model.stem == run.stem
        assert words[words.index("--width") + 1] == str(run.width)


@pytest.mark.parametrize("gpu", [True, False])
def test_a_gpu_trains_the_recipes_networks_at_256_with_the_recipes_workers(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, gpu: bool
) -> None:
    ran: list[list[str]] = []

    def run(words: list[str], **options: Any) -> None:
        ran.append(words)
        output = Path(words[words.index("--output") + 1])
        output.mkdir()
        (output / "run.json").write_text("{}")
        log.write(output / log.LOG, [])

    few: list[int] = []
    monkeypatch.setattr(training, "pick_device", lambda name: torch.device("cuda" if gpu else "cpu"))
    monkeypatch.setattr(training, "training_set", lambda data: data)
    monkeypatch.setattr(training, "make_subset", lambda data, folder, photos: few.append(photos))
    monkeypatch.setattr(training.subprocess, "run", run)
    monkeypatch.setattr(training, "row", lambda *args: {"images_per_second": 1.0, "share_waiting_for_data": 0.0})
    monkeypatch.setattr(training.records, "write", lambda *args: None)
    training.training(["--data", str(tmp_path)], standalone_mode=False)
    told = [(w[w.index("--recipe") + 1], w[w.index("--width") + 1], w[w.index("--size") + 1]) for w in ran]
    steps = [photos / recipes.load(recipe)["batch"] for photos, (recipe, _, _) in zip(few, told, strict=True)]
    assert [any("data.workers" in word for word in words) for words in ran] == [not gpu] * len(ran)
    if gpu:
        assert told == [("edge", "16", "256"), ("published", "64", "256")]
        assert min(steps) > 40
        assert recipes.load("published")["batch"] == 16
    else:
        assert told == [("edge", "16", "192"), ("edge", "16", "256")]
        assert max(steps) < 10


def test_a_few_photos_make_a_data_folder(tmp_path: Path) -> None:
    data = tmp_path / "data"
    for name in ("images", "annotations/trimaps"):
        (data / name).mkdir(parents=True)
    (data / "annotations" / "trainval.txt").write_text("# names\n" + "".join(f"cat_{i} 1 1 1\n" for i in range(40)))
    training.make_subset(data, tmp_path / "few", 20)
    parts = [find(tmp_path / "few", split, val_fraction=training.VALIDATION) for split in (Split.TRAIN, Split.VAL)]
    assert [len(part) for part in parts] == [19, 1]
    names = {int(pair.name.removeprefix("cat_")) for part in parts for pair in part}
    assert names == set(range(0, 40, 2)), "of all breeds"
    with pytest.raises(SystemExit, match="has 40 photos for training, 41 are needed"):
        training.make_subset(data, tmp_path / "more", 41)


def test_the_first_epoch_is_not_counted() -> None:
    rows = [
        a_row(epoch=i + 1, step=8 * (i + 1), seconds=s, images_per_s=256 / s, data_wait=w)
        for i, (s, w) in enumerate(((40, 0.5), (8, 0.1), (16, 0.2), (8, 0.1)))
    ]
    record = {
        "config": {"batch": 32, "data": {"workers": 0}},
        "device": "cpu",
        "precision": "bfloat16",
        "threads": 2,
        "images_per_s": 14.2,
        "data_wait": 0.3,
        "elapsed": 120.0,
        "seconds": 90.0,
        "peak_gpu_memory_bytes": None,
    }
    row = training.row(training.RUNS[0], record, rows)
    assert row["steps"] == 24
    assert row["seconds"] == [1.0, 2.0, 1.0]
    assert (row["images_per_second"], row["lowest_and_highest"]) == (32.0, [16.0, 32.0])
    assert row["share_waiting_for_data"] == 0.1
    assert row["whole_run"] == {"images_per_s": 14.2, "data_wait": 0.3, "elapsed": 120.0}
