"""The photos of a run: which are read, where they are kept, by whom they are augmented, and what is recorded."""

from __future__ import annotations

import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import numpy as np
import pytest
import torch
from PIL import Image

from petseg.checkpoint import load
from petseg.data import Split, find
from petseg.distributed import Ranks
from petseg.evaluate import is_split_of
from petseg.log import LOG
from petseg.metrics import BACKGROUND, PET
from petseg.run_photos import FEW, no_room_for_workers, workers_of
from petseg.run_state import BEST, LAST
from petseg.train import Trainer
from petseg_runtime.errors import DataError, EngineError, TrainingError
from tiny_runs import CPU, Recorder, Run, assert_same_run, at, same_tensors, spoil_photo, tiny


def test_photos_without_pet_are_announced_and_recorded(oxford_copy: Path, tmp_path: Path) -> None:
    mask = oxford_copy / "annotations" / "trimaps" / "pet_05.png"
    Image.new("L", (64, 64), 2).save(mask)
    observer = Recorder()
    trainer = Trainer(tiny(), oxford_copy, tmp_path / "out", device=CPU, observer=observer)
    assert trainer.meta["data"]["skipped_without_pet"] == ["pet_05"]
    assert any("pet_05" in message for message in observer.messages)


def test_the_current_folder_has_a_name_too(oxford_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(oxford_root)
    assert Trainer(tiny(), Path(), tmp_path / "out", device=CPU).meta["data"]["folder"] == oxford_root.name


def test_photos_whose_pet_is_lost_at_the_training_size_are_excluded_and_named(
    oxford_copy: Path, tmp_path: Path
) -> None:
    trimap = np.full((64, 64), BACKGROUND, np.uint8)
    trimap[20, 20] = PET
    Image.fromarray(trimap).save(oxford_copy / "annotations" / "trimaps" / "pet_05.png")
    observer = Recorder()
    trainer = Trainer(tiny("data.height=16", "data.width=32"), oxford_copy, tmp_path, device=CPU, observer=observer)
    assert "excluded, because at 16x32 nothing is left of their pet: pet_05" in observer.messages
    assert "pet_05" not in trainer.photos.train.names
    about = trainer.meta["data"]
    assert (about["skipped_without_pet"], about["skipped_too_small"]) == ([], ["pet_05"])
    parts = (find(oxford_copy, split, val_fraction=0.1) for split in (Split.TRAIN, Split.VAL))
    assert is_split_of(trainer.meta, *parts)


@pytest.mark.parametrize(
    ("setting", "device", "processes", "cores", "workers"),
    [
        ("auto", "cuda", 1, 8, 6),
        ("auto", "cuda", 1, 2, 0),
        ("auto", "cuda", 1, 1, 0),
        ("auto", "cuda", 1, 64, 16),
        ("auto", "cuda", 4, 32, 6),
        ("auto", "cpu", 1, 64, 0),
        (3, "cpu", 1, 2, 3),
        (0, "cuda", 1, 64, 0),
    ],
)
def test_how_many_workers_there_are(
    monkeypatch: pytest.MonkeyPatch, setting: Any, device: str, processes: int, cores: int, workers: int
) -> None:
    monkeypatch.setattr("petseg.run_photos.usable_cpus", lambda: cores)
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=2**40))
    assert workers_of(setting, torch.device(device), 2**20, processes) == workers


@pytest.mark.parametrize(("free", "workers"), [(48, 16), (47, 15), (3, 1), (2, 0)])
def test_workers_have_room_for_their_batches(monkeypatch: pytest.MonkeyPatch, free: int, workers: int) -> None:
    """A container's /dev/shm has 64 MB: a worker that finds no room there fails."""
    monkeypatch.setattr("petseg.run_photos.usable_cpus", lambda: 64)
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=free * 2**20))
    assert workers_of("auto", torch.device("cuda"), 2**20) == workers
    assert workers_of("auto", torch.device("cuda"), 2**20, 2) == workers // 2
    assert workers_of(5, torch.device("cuda"), 2**20) == 5


@pytest.mark.parametrize(
    ("taught", "workers", "device", "said"),
    [
        # A batch of 4 photos at 1024x1024, times 3: 48 MiB, and 60 MiB with a teacher's probabilities.
        (False, "auto", "cuda", "room for 2 dataloader workers in /dev/shm (105 MB); docker run --shm-size=2g makes"),
        (True, "auto", "cuda", "room for 1 dataloader worker in /dev/shm (105 MB); docker run --shm-size=2g makes"),
        (False, "1", "cuda", None),
        (False, "auto", "cpu", None),
    ],
)
def test_workers_without_room_are_missed_only_where_they_would_be_started(
    monkeypatch: pytest.MonkeyPatch, taught: bool, workers: str, device: str, said: str | None
) -> None:
    monkeypatch.setattr("petseg.run_photos.usable_cpus", lambda: 8)
    photos: Any = SimpleNamespace(taught=taught)
    config = tiny("data.height=1024", "data.width=1024", f"data.workers={workers}")
    for free, missed in ((100, said), (1000, None)):
        monkeypatch.setattr("shutil.disk_usage", lambda folder, free=free: SimpleNamespace(free=free * 2**20))
        found = no_room_for_workers(photos, config, torch.device(device), Ranks())
        assert found == (f"{missed} room for 6" if missed else None)


def test_missing_room_for_workers_is_announced(
    oxford_root: Path, tmp_path: Path, whole: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    observer, asked = Recorder(), []
    monkeypatch.setattr("petseg.train.no_room_for_workers", lambda photos, *_: asked.append(photos.taught) or "no room")
    for teacher in (None, whole.folder / BEST):
        folder = tmp_path / ("taught" if teacher else "alone")
        trainer = Trainer(tiny(), oxford_root, folder, device=CPU, observer=observer, teacher=teacher)
        assert "no room" not in trainer.warnings, "it says nothing about the figures of the run"
    assert observer.messages.count("warning: no room") == 2
    assert asked == [False, True]


def test_data_that_cannot_be_used_is_rejected(oxford_root: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no data set"):
        Trainer(tiny(), tmp_path, tmp_path / "out", device=CPU)
    with pytest.raises(DataError, match="batch takes 23"):
        Trainer(tiny("batch=23"), oxford_root, tmp_path / "out", device=CPU)


@pytest.mark.parametrize("split", [Split.TRAIN, Split.VAL])
def test_a_bad_photo_stops_the_run_before_it_starts(oxford_copy: Path, tmp_path: Path, split: Split) -> None:
    bad = spoil_photo(oxford_copy, split, 1)
    with pytest.raises(DataError, match=str(bad.image)):
        Trainer(tiny(), oxford_copy, tmp_path / "out", device=CPU)


def test_a_bad_photo_can_be_skipped_and_is_named_and_counted(oxford_copy: Path, tmp_path: Path) -> None:
    bad = spoil_photo(oxford_copy, Split.TRAIN, 3), spoil_photo(oxford_copy, Split.VAL, 0)
    Image.new("L", (20, 10), 1).save((other := find(oxford_copy, Split.TRAIN, val_fraction=0.1)[5]).mask)
    names, observer = {pair.name for pair in (*bad, other)}, Recorder()
    config = tiny("data.on_bad=skip", "epochs=1", "model.width=2")
    trainer = Trainer(config, oxford_copy, tmp_path / "out", device=CPU, observer=observer)
    trainer.fit()
    assert {m.partition(": ")[0] for m in observer.messages if "pet_" in m} == {"excluded"}
    assert all(any(name in m for m in observer.messages) for name in names)
    assert (len(trainer.photos.train), len(trainer.photos.good_val)) == (20, 1)
    assert trainer.state.history[-1].skipped == 3
    for file in (BEST, LAST):
        assert set(load(tmp_path / "out" / file).meta["data"]["skipped_bad"]) == names
    Trainer(config, oxford_copy, tmp_path / "out", device=CPU, resume=True).fit()


@pytest.mark.parametrize("on_bad", ["stop", "skip"])
def test_a_photo_that_was_excluded_stays_so_on_resume_even_if_it_can_be_read_again(
    oxford_copy: Path, tmp_path: Path, on_bad: str
) -> None:
    pairs = [find(oxford_copy, split, val_fraction=0.1)[0] for split in (Split.TRAIN, Split.VAL)]
    good, out, whole = [pair.image.read_bytes() for pair in pairs], tmp_path / "out", tmp_path / "whole"
    for split in (Split.TRAIN, Split.VAL):
        spoil_photo(oxford_copy, split, 0)
    config = tiny("data.on_bad=skip", "model.width=2")
    Trainer(config, oxford_copy, whole, device=CPU).fit()
    observer = Recorder(at_step=at(7, lambda: signal.raise_signal(signal.SIGINT)))
    with pytest.raises(KeyboardInterrupt):
        Trainer(config, oxford_copy, out, device=CPU, observer=observer).fit()
    for pair, content in zip(pairs, good, strict=True):
        pair.image.write_bytes(content)
    observer = Recorder()
    config = tiny(f"data.on_bad={on_bad}", "model.width=2")
    trainer = Trainer(config, oxford_copy, out, device=CPU, observer=observer, resume=True)
    names = {pair.name for pair in pairs}
    assert {f"excluded, as before the run was resumed: {name}" for name in names} <= {*observer.messages}
    trainer.fit()
    assert same_tensors(load(out / LAST).tensors, load(whole / LAST).tensors)
    for file in (BEST, LAST):
        assert sorted(load(out / file).meta["data"]["skipped_bad"]) == sorted(names)


def test_a_photo_that_was_excluded_may_be_gone_on_resume(folder_copy: Path, tmp_path: Path) -> None:
    (folder_copy / "val.txt").write_text("own_01\nown_07\n")
    bad = find(folder_copy, Split.TRAIN)[0]
    bad.image.write_bytes(b"no photo")
    config = tiny("data.on_bad=skip", "epochs=1", "model.width=2")
    Trainer(config, folder_copy, tmp_path / "out", device=CPU).fit()
    bad.image.unlink()
    bad.mask.unlink()
    assert Trainer(config, folder_copy, tmp_path / "out", device=CPU, resume=True).photos.bad == []


def test_photos_too_many_for_the_memory_are_kept_in_a_file(
    oxford_root: Path, tmp_path: Path, whole: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = 22 * 32 * 32 * 4
    for room, place in ((2 * size - 1, f"a file in {tmp_path / 'file'}: decoded, they take"), (2 * size, "memory")):
        monkeypatch.setattr("petseg.run_photos.available_memory", lambda room=room: room)
        observer, folder = Recorder(), tmp_path / place.split()[-1 if place == "memory" else 1]
        trainer = Trainer(tiny(), oxford_root, folder, device=CPU, observer=observer)
        trainer.fit()
        assert observer.messages[0].startswith(f"reading 22 photos into {place}")
        assert isinstance(trainer.photos.train._photos.base, np.memmap) is (place != "memory")
        assert_same_run(folder, whole)
        assert {path.name for path in folder.iterdir()} == {BEST, LAST, LOG}


def test_only_a_run_with_a_teacher_is_told_to_do_without_it(
    oxford_root: Path, tmp_path: Path, whole: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> NoReturn:
        raise MemoryError

    monkeypatch.setattr("petseg.run_photos.TrainSet", full)
    for teacher, remedy in (
        (None, "use a smaller --size, or a machine with more memory"),
        (whole.folder / BEST, "train without --teacher, or with a smaller one"),
    ):
        with pytest.raises(EngineError, match=rf"^out of memory: {remedy} \(MemoryError\)$"):
            Trainer(tiny(), oxford_root, tmp_path, device=CPU, teacher=teacher)


def test_no_validation_photo_that_can_be_used_is_rejected(oxford_copy: Path, tmp_path: Path) -> None:
    for number in range(2):
        spoil_photo(oxford_copy, Split.VAL, number)
    with pytest.raises(DataError, match="of the 2 validation photos 0 can be used"):
        Trainer(tiny("data.on_bad=skip"), oxford_copy, tmp_path / "out", device=CPU)


def test_validation_photos_without_a_pet_are_rejected(oxford_copy: Path, tmp_path: Path) -> None:
    for pair in find(oxford_copy, Split.VAL, val_fraction=0.1):
        Image.fromarray(np.full((64, 64), 2, np.uint8)).save(pair.mask)
    with pytest.raises(DataError, match="of the 2 validation photos 2 can be used, and none of those shows a pet"):
        Trainer(tiny(), oxford_copy, tmp_path / "out", device=CPU)


def test_listed_validation_photos_are_on_record_and_stay_known(folder_copy: Path, tmp_path: Path) -> None:
    (folder_copy / "val.txt").write_text("own_01\nown_07\n")
    observer = Recorder()
    trainer = Trainer(tiny("epochs=1"), folder_copy, tmp_path / "run", device=CPU, observer=observer)
    said = "7 photos to train on, 2 for validation, listed in val.txt; data.val_fraction is ignored"
    assert said in observer.messages
    best = trainer.fit()
    about = load(best).meta["data"]
    assert about["val_names"] == ["own_01", "own_07"]
    assert {"val_fraction", "split_seed"} & about.keys() == set()
    again = Trainer(
        tiny("epochs=1"), folder_copy, tmp_path / "again", device=CPU, init=best
    )  # the same ones are excluded
    assert again.meta["data"]["names_sha256"] == about["names_sha256"]
    (folder_copy / "val.txt").write_text("own_07\nown_08\n")
    with pytest.raises(TrainingError, match=r"trained on 1 of the 2 photos.* list in val\.txt the photos that it was"):
        Trainer(tiny("epochs=1"), folder_copy, tmp_path / "other", device=CPU, init=best)
    moved = r"trained on other photos than these \(moved between training and validation: own_01, own_08\)$"
    with pytest.raises(TrainingError, match=moved):
        Trainer(tiny("epochs=1"), folder_copy, tmp_path / "run", device=CPU, resume=True)
    (folder_copy / "val.txt").unlink()
    with pytest.raises(TrainingError, match=r"list in val\.txt"):
        Trainer(tiny("data.val_fraction=0.5"), folder_copy, tmp_path / "other", device=CPU, init=best)


@pytest.mark.parametrize(("empty", "warned"), [(0, False), (1, True)])
def test_too_few_validation_photos_are_warned_about(
    oxford_copy: Path, tmp_path: Path, empty: int, warned: bool
) -> None:
    config = tiny(f"data.val_fraction={FEW / 24}", "batch=2")
    for pair in find(oxford_copy, Split.VAL, val_fraction=FEW / 24)[:empty]:
        Image.fromarray(np.full((64, 64), 2, np.uint8)).save(pair.mask)
    observer = Recorder()
    trainer = Trainer(config, oxford_copy, tmp_path / "out", device=CPU, observer=observer)
    said = [f"only {FEW - 1} validation photos with a pet to choose the epoch and the threshold on"] if warned else []
    assert [message.partition("; use ")[0] for message in trainer.photos.warnings] == said
    assert [m for m in observer.messages if m.startswith("warning: ")] == [f"warning: {w}" for w in trainer.warnings]
