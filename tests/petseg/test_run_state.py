"""The state of a run: what is saved, when, and what is rejected on resuming."""

from __future__ import annotations

import functools
import json
import shutil
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from petseg import checkpoint
from petseg.checkpoint import load, save_checkpoint
from petseg.config import to_dict
from petseg.data import Split, find, read_trimap
from petseg.lock import LOCK
from petseg.log import LOG
from petseg.metrics import PET
from petseg.record import record
from petseg.run_state import BEST, LAST, QUICK_SAVE, RunState, StateFile
from petseg.train import Trainer
from petseg_runtime.errors import CheckpointError, EngineError, TrainingError
from tiny_runs import (
    CPU,
    EPOCHS,
    PER_EPOCH,
    Crash,
    Recorder,
    Run,
    assert_same_run,
    at,
    crash,
    same_tensors,
    tiny,
)

pytestmark = pytest.mark.usefixtures("quick_disk")


@pytest.fixture
def usual_disk(quick_disk: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("petseg.run_state.QUICK_SAVE", QUICK_SAVE)


def test_last_holds_weights_average_and_optimizer(whole: Run) -> None:
    last = whole.last
    assert last.meta["kind"] == "training"
    names = set(whole.trainer.model.state_dict())
    assert {n for n in last.tensors if "/" not in n} == names | {"ema_updates"}
    assert {n.removeprefix("ema/") for n in last.tensors if n.startswith("ema/")} == names
    assert last.tensors["ema_updates"].item() == 15
    moments = {n for n in last.tensors if n.endswith("/exp_avg_sq")}
    assert len(moments) == len(list(whole.trainer.model.parameters()))
    assert same_tensors({n: last.tensors[n] for n in names}, whole.trainer.model.state_dict())


@pytest.mark.usefixtures("usual_disk")
@pytest.mark.parametrize(
    ("took", "since", "pays"), [(0.05, 0.0, True), (1.0, 9.0, False), (1.0, 11.0, True), (0.2, 1.5, False)]
)
def test_saving_takes_a_tenth_of_the_time_at_most(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, took: float, since: float, pays: bool
) -> None:
    now = iter((100.0, 100.0 + took, 100.0 + took + since))  # before the write, after it, and at the query
    monkeypatch.setattr(time, "perf_counter", lambda: next(now))
    file = StateFile(tmp_path)
    assert file.pays, "nothing is saved yet"
    file.write({}, {})
    assert file.took == pytest.approx(took)
    assert file.pays is pays


@pytest.fixture
def slow_disk(usual_disk: None, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Make every write take an hour by the clock; returns the steps at which a state was written."""
    clock, write, saved = time.perf_counter, checkpoint.save_checkpoint, []

    def slow(path: Path, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> str:
        digest = write(path, tensors, meta)
        if path.name == LAST:
            saved.append(meta["state"]["step"])
        return digest

    monkeypatch.setattr(checkpoint, "save_checkpoint", slow)
    monkeypatch.setattr(time, "perf_counter", lambda: clock() + 3600 * len(saved))
    return saved


def test_a_state_whose_saving_takes_long_is_saved_at_the_end(
    oxford_root: Path, tmp_path: Path, whole: Run, slow_disk: list[int]
) -> None:
    Trainer(tiny(), oxford_root, tmp_path, device=CPU).fit()
    assert slow_disk == [PER_EPOCH, EPOCHS * PER_EPOCH]
    assert_same_run(tmp_path, whole)


@pytest.mark.parametrize("orderly", [False, True])
def test_a_run_whose_state_is_not_saved_after_each_epoch_continues(
    oxford_root: Path, tmp_path: Path, whole: Run, slow_disk: list[int], orderly: bool
) -> None:
    act = functools.partial(signal.raise_signal, signal.SIGTERM) if orderly else crash
    observer, end = Recorder(at_step=at(2 * PER_EPOCH + 2, act)), 2 * PER_EPOCH + 2
    trainer = Trainer(tiny(), oxford_root, tmp_path, device=CPU, observer=observer)
    with pytest.raises(KeyboardInterrupt if orderly else Crash):
        trainer.fit()
    assert slow_disk == ([PER_EPOCH, end] if orderly else [PER_EPOCH])
    go_on = Recorder()
    Trainer(tiny(), oxford_root, tmp_path, device=CPU, resume=True, observer=go_on).fit()
    assert go_on.losses == whole.observer.losses[end if orderly else PER_EPOCH :]
    assert_same_run(tmp_path, whole)


def test_a_best_checkpoint_of_an_epoch_that_a_crash_took_is_kept_and_reported(
    oxford_root: Path, tmp_path: Path, whole: Run, slow_disk: list[int]
) -> None:
    """On a GPU the state may be older than the best checkpoint, and repeated epochs differ slightly."""
    with pytest.raises(Crash):
        Trainer(tiny(), oxford_root, tmp_path, device=CPU, observer=Recorder(at_step=at(PER_EPOCH + 1, crash))).fit()
    best = load(tmp_path / BEST)
    best.meta["validation"] |= {"epoch": 2, "val_iou": 0.99, "val_threshold": 0.125}
    save_checkpoint(tmp_path / BEST, best.tensors, best.meta)
    kept = (tmp_path / BEST).read_bytes()
    assert load(tmp_path / LAST).meta["state"]["best_iou"] == -1, "the first epoch, taken again, is better than that"
    assert (tmp_path / LOG).exists()
    for done in (False, True):
        observer = Recorder()
        trainer = Trainer(tiny(), oxford_root, tmp_path, device=CPU, resume=True, observer=observer)
        assert (
            f"{BEST} is from epoch 2, which the saved state does not have; kept until a better one" in observer.messages
        )
        assert (tmp_path / LOG).exists() == done, "the log is that of the state, which has no epoch at first"
        trainer.fit()
        assert (tmp_path / BEST).read_bytes() == kept
        assert (trainer.best.epoch, trainer.best.val_threshold) == (2, 0.125)
        assert record(trainer)["best"] == best.meta["validation"]
    assert [row.val_iou for row in trainer.state.history] == [row.val_iou for row in whole.observer.rows]


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(path.read_bytes()[:-1])])
def test_a_run_whose_best_checkpoint_is_gone_keeps_another(
    oxford_root: Path, tmp_path: Path, damage: Callable[[Path], object]
) -> None:
    """Even if no later epoch is as good: otherwise the run would end without a best checkpoint, but name one."""
    with pytest.raises(Crash):
        Trainer(tiny(), oxford_root, tmp_path, device=CPU, observer=Recorder(at_step=at(PER_EPOCH + 1, crash))).fit()
    saved = load(tmp_path / LAST)
    saved.meta["state"]["history"][0]["val_iou"] = saved.meta["state"]["best_iou"] = 0.999
    save_checkpoint(tmp_path / LAST, saved.tensors, saved.meta)
    damage(tmp_path / BEST)
    observer = Recorder()
    trainer = Trainer(tiny(), oxford_root, tmp_path, device=CPU, resume=True, observer=observer)
    assert f"{BEST} is missing or damaged; the best of the epochs from here on is kept" in observer.messages
    kept = load(trainer.fit()).meta["validation"]
    assert record(trainer)["best"] == kept == max(observer.rows, key=lambda row: row.val_iou).as_dict()
    best = load(tmp_path / BEST)
    for row in (None, {}, {**kept, "epoch": "first"}):
        save_checkpoint(tmp_path / BEST, best.tensors, {**best.meta, "validation": row})
        with pytest.raises(CheckpointError, match=rf"{BEST}: its validation row is damaged or incomplete"):
            record(trainer)
    (tmp_path / BEST).unlink()
    with pytest.raises(CheckpointError, match=rf"{BEST}: no such file"):
        record(trainer)


def test_a_log_that_lacks_an_epoch_after_a_crash_is_completed(oxford_root: Path, tmp_path: Path, whole: Run) -> None:
    folder = Path(shutil.copytree(whole.folder, tmp_path / "run"))
    log = (folder / LOG).read_text()
    (folder / LOG).write_text("".join(log.splitlines(keepends=True)[:-1]))
    Trainer(tiny(), oxford_root, folder, device=CPU, resume=True).fit()
    assert (folder / LOG).read_text() == log


def test_running_out_of_memory_while_resuming_is_not_damage_to_the_state(
    oxford_root: Path, tmp_path: Path, whole: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")

    folder = Path(shutil.copytree(whole.folder, tmp_path / "run"))
    monkeypatch.setattr("petseg.train.load_tensors", full)
    with pytest.raises(EngineError, match="free some memory on the device"):
        Trainer(tiny(), oxford_root, folder, device=CPU, resume=True)


def test_a_run_that_came_to_its_last_epoch_was_not_stopped_early(oxford_root: Path, tmp_path: Path) -> None:
    trainer = Trainer(tiny("early_stop=2"), oxford_root, tmp_path, device=CPU)
    for iou, finished, early in ((0.5, False, False), (0.4, False, False), (0.3, True, False)):
        trainer.state.next_epoch(iou)
        assert (trainer.finished, trainer.stopped_early) == (finished, early)
    trainer.state.ious.pop()
    trainer.config = tiny("early_stop=1")
    assert (trainer.finished, trainer.stopped_early) == (True, True)


def test_temporary_files_of_a_killed_run_are_removed(oxford_root: Path, tmp_path: Path, whole: Run) -> None:
    folder = Path(shutil.copytree(whole.folder, tmp_path / "run"))
    for name in ("last.0123abcd.part.safetensors", "log.0123abcd.part.csv", "run.0123abcd.part.json"):
        (folder / f".{name}").write_bytes(b"half")
    for name in ("curves", "predictions"):
        (folder / f".{name}.0123abcd.part.png").write_bytes(b"half")
    Trainer(tiny(), oxford_root, folder, device=CPU, resume=True)
    assert {p.name for p in folder.iterdir()} == {BEST, LAST, LOG}


def test_a_temporary_file_of_a_first_checkpoint_is_removed(oxford_root: Path, tmp_path: Path) -> None:
    (tmp_path / ".last.0123abcd.part.safetensors").write_bytes(b"half")
    trainer = Trainer(tiny(), oxford_root, tmp_path, device=CPU)
    assert [path.name for path in tmp_path.iterdir()] == [LOCK]
    trainer.unlock()


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("optimizer.lr=0.02", "optimizer.lr was 0.01, now 0.02"),
        ("epochs=4", "epochs was 3, now 4"),
        ("model.width=2", "model.width was 4, now 2"),
        ("seed=1", "seed was 0, now 1"),
        ("schedule.name=cosine", "schedule.name was 'cosine-restarts', now 'cosine'"),
        ("augment.flip=0.25", "augment.flip was 0.5, now 0.25"),
    ],
)
def test_other_settings_are_rejected_on_resume(oxford_root: Path, whole: Run, setting: str, said: str) -> None:
    before = (whole.folder / LAST).read_bytes()
    with pytest.raises(TrainingError, match=said):
        Trainer(tiny(setting), oxford_root, whole.folder, device=CPU, resume=True)
    assert (whole.folder / LAST).read_bytes() == before


@pytest.mark.parametrize("setting", ["data.workers=0", "data.on_bad=skip", "early_stop=7", "compile=true"])
def test_settings_that_say_where_and_how_long_may_change_on_resume(
    oxford_root: Path, tmp_path: Path, whole: Run, setting: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", lambda model: model)
    stop = Recorder(at_step=at(7, lambda: signal.raise_signal(signal.SIGINT)))
    with pytest.raises(KeyboardInterrupt):
        Trainer(tiny(), oxford_root, tmp_path, device=CPU, observer=stop).fit()
    config = tiny(setting)
    assert config != tiny()
    Trainer(config, oxford_root, tmp_path, device=CPU, resume=True).fit()
    assert_same_run(tmp_path, whole)
    assert load(tmp_path / LAST).meta["config"] == to_dict(config)
    with pytest.raises(TrainingError, match=r"other settings: seed was 0, now 1$"):
        Trainer(tiny("seed=1"), oxford_root, tmp_path, device=CPU, resume=True)


@pytest.mark.parametrize(
    "setting", ["augment.mix=0.5", "augment.mix_until=0.5", "loss.features=0.25", "schedule.warmup=0.2"]
)
def test_settings_without_effect_may_differ(oxford_root: Path, tmp_path: Path, whole: Run, setting: str) -> None:
    """For example a recipe's settings of a teacher, in a run without one that began with another recipe."""
    stop = Recorder(at_step=at(7, lambda: signal.raise_signal(signal.SIGINT)))
    with pytest.raises(KeyboardInterrupt):
        Trainer(tiny(), oxford_root, tmp_path, device=CPU, observer=stop).fit()
    Trainer(tiny(setting), oxford_root, tmp_path, device=CPU, resume=True).fit()
    assert_same_run(tmp_path, whole)


def test_every_other_setting_is_named(oxford_root: Path, whole: Run) -> None:
    with pytest.raises(TrainingError, match=r"batch was 4, now 5; .*seed was 0, now 1"):
        Trainer(tiny("seed=1", "batch=5"), oxford_root, whole.folder, device=CPU, resume=True)


def test_other_photos_are_rejected_on_resume_and_named(oxford_copy: Path, tmp_path: Path, whole: Run) -> None:
    listing = oxford_copy / "annotations" / "trainval.txt"
    there = listing.read_text()
    gone = find(oxford_copy, Split.TRAIN, val_fraction=0.1)[3].name
    listing.write_text("".join(line for line in there.splitlines(True) if gone not in line))
    with pytest.raises(TrainingError, match=rf"other photos than these \(no longer there, or not usable: {gone}[;)]"):
        Trainer(tiny(), oxford_copy, whole.folder, device=CPU, resume=True)
    Trainer(tiny("epochs=1"), oxford_copy, tmp_path, device=CPU).fit()
    listing.write_text(there)
    with pytest.raises(TrainingError, match=rf"other photos than these \(new: {gone}[;)]"):
        Trainer(tiny("epochs=1"), oxford_copy, tmp_path, device=CPU, resume=True)


def test_only_a_few_of_many_other_photos_are_named(oxford_copy: Path, whole: Run) -> None:
    listing = oxford_copy / "annotations" / "trainval.txt"
    listing.write_text("".join(listing.read_text().splitlines(True)[:12]))
    with pytest.raises(TrainingError, match=r"not usable: (pet_\d+, ){5}\.\.\."):
        Trainer(tiny(), oxford_copy, whole.folder, device=CPU, resume=True)


@pytest.mark.parametrize("split", [Split.TRAIN, Split.VAL])
def test_other_masks_are_rejected_on_resume_and_named(
    oxford_copy: Path, tmp_path: Path, whole: Run, split: Split
) -> None:
    changed = find(oxford_copy, split, val_fraction=0.1)[1]
    trimap = read_trimap(changed)
    Image.fromarray(trimap).save(changed.mask, optimize=True)  # another file with the same mask
    Trainer(tiny(), oxford_copy, Path(shutil.copytree(whole.folder, tmp_path / "same")), device=CPU, resume=True)
    trimap[:2] = PET
    Image.fromarray(trimap).save(changed.mask)
    said = rf"the masks of 1 photo have changed since .*\({changed.name}\); restore them, or .* --init .*{LAST}"
    with pytest.raises(TrainingError, match=said):
        Trainer(tiny(), oxford_copy, whole.folder, device=CPU, resume=True)


def test_the_state_has_the_digest_of_each_mask_and_the_model_one_of_all(whole: Run) -> None:
    assert {part: len(names) for part, names in whole.last.meta["masks"].items()} == {"train": 22, "val": 2}
    assert "masks" not in whole.best.meta
    assert whole.best.meta["data"]["masks_sha256"] == record(whole.trainer)["data"]["masks_sha256"]


@pytest.mark.parametrize("part", ["masks", "warnings", "state"])
def test_an_incomplete_state_is_damage(oxford_root: Path, tmp_path: Path, whole: Run, part: str) -> None:
    meta = {name: value for name, value in whole.last.meta.items() if name != part}
    save_checkpoint(tmp_path / LAST, whole.last.tensors, meta)
    with pytest.raises(CheckpointError, match=rf"last\.safetensors: the state in it is .* incomplete .*{part}"):
        Trainer(tiny(), oxford_root, tmp_path, device=CPU, resume=True)


def test_a_folder_that_holds_a_run_is_rejected(oxford_root: Path, whole: Run) -> None:
    before = {p.name: p.read_bytes() for p in whole.folder.iterdir()}
    with pytest.raises(TrainingError, match=r"already holds a run.*--resume"):
        Trainer(tiny(), oxford_root, whole.folder, device=CPU)
    assert {p.name: p.read_bytes() for p in whole.folder.iterdir()} == before


@pytest.mark.parametrize("name", [BEST, LAST, LOG])
def test_a_folder_that_holds_a_part_of_a_run_is_rejected(
    oxford_root: Path, tmp_path: Path, whole: Run, name: str
) -> None:
    shutil.copy(whole.folder / name, tmp_path)
    remedy = "use --resume to continue it, or choose another" if name == LAST else "choose another"
    with pytest.raises(TrainingError, match=rf"already holds a run \({name}\); {remedy} folder"):
        Trainer(tiny(), oxford_root, tmp_path, device=CPU)
    if name != LAST:
        with pytest.raises(
            TrainingError, match=rf"{LAST}: nothing to resume; {name} is from a run whose state is gone"
        ):
            Trainer(tiny(), oxford_root, tmp_path, device=CPU, resume=True)
    assert (tmp_path / name).read_bytes() == (whole.folder / name).read_bytes()


def test_nothing_to_resume_is_rejected(oxford_root: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"last\.safetensors: nothing to resume"):
        Trainer(tiny(), oxford_root, tmp_path / "none", device=CPU, resume=True)
    assert not (tmp_path / "none").exists()


def test_a_model_is_no_state_to_resume(oxford_root: Path, tmp_path: Path, whole: Run) -> None:
    shutil.copy(whole.folder / BEST, tmp_path / LAST)
    with pytest.raises(CheckpointError, match=r"last\.safetensors: a model.*--init"):
        Trainer(tiny(), oxford_root, tmp_path, device=CPU, resume=True)


def test_a_truncated_state_is_rejected(oxford_root: Path, tmp_path: Path, whole: Run) -> None:
    data = (whole.folder / LAST).read_bytes()
    (tmp_path / LAST).write_bytes(data[: len(data) // 2])
    with pytest.raises(CheckpointError, match=r"last\.safetensors"):
        Trainer(tiny(), oxford_root, tmp_path, device=CPU, resume=True)


@pytest.mark.parametrize(
    "damage", ["head.bias", "ema/head.bias", "ema_updates", "optimizer/0/exp_avg", "state", "config"]
)
def test_a_state_that_lacks_a_part_is_rejected_by_name(
    oxford_root: Path, tmp_path: Path, whole: Run, damage: str
) -> None:
    last = whole.last
    tensors = {n: t for n, t in last.tensors.items() if n != damage}
    save_checkpoint(tmp_path / LAST, tensors, {k: v for k, v in last.meta.items() if k != damage})
    with pytest.raises(CheckpointError, match=r"last\.safetensors"):
        Trainer(tiny(), oxford_root, tmp_path, device=CPU, resume=True)


@pytest.mark.parametrize("config", [{"epochs": 0}, {"epochs": "many"}, {"no_such_setting": 1}])
def test_settings_in_a_state_that_cannot_be_are_damage_to_it(
    oxford_root: Path, tmp_path: Path, whole: Run, config: dict[str, Any]
) -> None:
    last = whole.last
    save_checkpoint(tmp_path / LAST, last.tensors, {**last.meta, "config": {**last.meta["config"], **config}})
    with pytest.raises(CheckpointError, match=rf"last\.safetensors: the state in it is damaged.*{next(iter(config))}"):
        Trainer(tiny(), oxford_root, tmp_path, device=CPU, resume=True)


def test_a_run_from_before_a_setting_was_there_continues_with_its_default(
    oxford_root: Path, tmp_path: Path, whole: Run
) -> None:
    last = whole.last
    config = {**last.meta["config"], "model": {"width": 4, "levels": [1, 2, 4]}}
    save_checkpoint(tmp_path / LAST, last.tensors, {**last.meta, "config": config})
    trainer = Trainer(tiny(), oxford_root, tmp_path, device=CPU, resume=True)
    assert trainer.state.step == EPOCHS * PER_EPOCH


def test_another_teacher_is_rejected_on_resume(oxford_root: Path, tmp_path: Path, whole: Run) -> None:
    with pytest.raises(TrainingError, match=r"the teacher of the run to resume was none, now .*best\.safetensors"):
        Trainer(tiny(), oxford_root, whole.folder, device=CPU, teacher=whole.folder / BEST, resume=True)


def test_a_teacher_that_was_renamed_is_the_same_one(oxford_root: Path, tmp_path: Path, whole: Run) -> None:
    given, renamed, out = whole.folder / BEST, tmp_path / "teacher.safetensors", tmp_path / "run"
    Trainer(tiny("epochs=1"), oxford_root, out, device=CPU, teacher=given).fit()
    shutil.copy(given, renamed)
    Trainer(tiny("epochs=1"), oxford_root, out, device=CPU, teacher=renamed, resume=True)
    best = load(given)
    save_checkpoint(renamed, best.tensors, {**best.meta, "epoch": 9})
    with pytest.raises(
        TrainingError, match=r"the teacher of the run to resume was .*best\.safetensors.*, now .*teacher"
    ):
        Trainer(tiny("epochs=1"), oxford_root, out, device=CPU, teacher=renamed, resume=True)


@pytest.mark.parametrize(
    ("patience", "ious", "stalled"),
    [
        (0, [0.5, 0.4, 0.3, 0.2], False),
        (2, [], False),
        (2, [0.5], False),
        (2, [0.5, 0.4], False),
        (2, [0.5, 0.4, 0.5], True),  # as good is not better
        (2, [0.5, 0.4, 0.6], False),
        (2, [0.5, 0.6, 0.4, 0.5], True),
        (1, [0.5, 0.4], True),
    ],
)
def test_when_a_run_has_stalled(patience: int, ious: list[float], stalled: bool) -> None:
    state = RunState()
    for iou in ious:
        state.next_epoch(iou)
    assert state.stalled(patience) is stalled


@pytest.mark.parametrize(
    "history", [[{}], [5], [{"epoch": "first"}], [{"val_iou": None}], {"epoch": 1}], ids=lambda history: str(history)
)
def test_a_history_that_is_none_is_damage_to_the_state(
    oxford_root: Path, tmp_path: Path, whole: Run, history: Any
) -> None:
    last = whole.last
    (row, *_), state = last.meta["state"]["history"], last.meta["state"]
    if isinstance(history, list) and history[0] and isinstance(history[0], dict):
        history = [{**row, **history[0]}]
    save_checkpoint(tmp_path / LAST, last.tensors, {**last.meta, "state": {**state, "history": history}})
    with pytest.raises(CheckpointError, match=r"last\.safetensors: the state in it is damaged"):
        Trainer(tiny(), oxford_root, tmp_path, device=CPU, resume=True)


def test_moments_of_a_weight_that_is_not_there_are_damage_to_the_state(
    oxford_root: Path, tmp_path: Path, whole: Run
) -> None:
    last = whole.last
    save_checkpoint(tmp_path / LAST, {**last.tensors, "optimizer/999/exp_avg": torch.zeros(1)}, last.meta)
    with pytest.raises(CheckpointError, match=r"last\.safetensors: the state in it is damaged"):
        Trainer(tiny(), oxford_root, tmp_path, device=CPU, resume=True)


def test_a_state_is_what_it_was_before_it_was_saved(whole: Run) -> None:
    state = whole.trainer.state
    kept = json.loads(json.dumps(state.as_dict()))
    assert RunState.from_dict(kept) == state
    assert kept == whole.last.meta["state"]
    assert state.ious == [row.val_iou for row in state.history]
