"""The initial weights of a run: random ones, or those of a checkpoint, as far as they fit."""

from __future__ import annotations

import re
import shutil
import signal
from pathlib import Path

import pytest
import torch

from petseg.checkpoint import load, save_checkpoint
from petseg.data import Split, find, photo_key
from petseg.evaluate import train_keys
from petseg.model import AttentionUNet, AttentionUNetConfig
from petseg.record import record
from petseg.run_state import BEST, LAST
from petseg.train import Trainer
from petseg_runtime.errors import CheckpointError, TrainingError
from tiny_runs import CPU, EPOCHS, PER_EPOCH, Recorder, Run, at, same_tensors, tiny


def test_init_starts_from_the_weights_of_a_checkpoint(oxford_root: Path, tmp_path: Path, whole: Run) -> None:
    trained = Recorder()
    trainer = Trainer(tiny(), oxford_root, tmp_path, device=CPU, init=whole.folder / BEST, observer=trained)
    assert same_tensors(trainer.model.state_dict(), whole.best.tensors)
    assert trainer.state.step == 0
    trainer.fit()
    assert trained.losses[0] < whole.observer.losses[0]
    for name, count in trainer.model.state_dict().items():
        if name.endswith("num_batches_tracked"):  # a checkpoint is loaded in evaluation mode
            assert count == whole.best.tensors[name] + EPOCHS * PER_EPOCH


def test_the_weights_that_a_run_began_with_are_on_record_also_once_it_is_resumed(
    oxford_root: Path, tmp_path: Path, whole: Run
) -> None:
    assert "init" not in whole.best.meta
    assert record(whole.trainer)["init"] is None
    begun = {"file": BEST, "identity": whole.best.sha256}
    stop = Recorder(at_step=at(7, lambda: signal.raise_signal(signal.SIGINT)))
    with pytest.raises(KeyboardInterrupt):
        Trainer(tiny(), oxford_root, tmp_path, device=CPU, init=whole.folder / BEST, observer=stop).fit()
    assert load(tmp_path / BEST).meta["init"] == begun
    resumed = Trainer(tiny(), oxford_root, tmp_path, device=CPU, resume=True)
    resumed.fit()
    assert [load(tmp_path / name).meta["init"] for name in (BEST, LAST)] == [begun, begun]
    assert record(resumed)["init"] == begun


def test_init_of_another_width_or_damaged_is_rejected(oxford_root: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.safetensors"
    state = AttentionUNet(AttentionUNetConfig(width=2)).state_dict()
    save_checkpoint(other, state, {"kind": "model", "model": {"width": 2}})
    with pytest.raises(CheckpointError, match=r"other\.safetensors: its network is .*width=2.*width=4.*only \d+ of"):
        Trainer(tiny(), oxford_root, tmp_path / "out", device=CPU, init=other)
    other.write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"other\.safetensors"):
        Trainer(tiny(), oxford_root, tmp_path / "out", device=CPU, init=other)


def test_init_of_another_shape_gives_the_tensors_that_fit_and_says_which_do_not(
    oxford_root: Path, tmp_path: Path, whole: Run
) -> None:
    observer = Recorder()
    config = tiny("model.stem=strided")
    trainer = Trainer(config, oxford_root, tmp_path, device=CPU, init=whole.folder / BEST, observer=observer)
    state, given = trainer.model.state_dict(), whole.best.tensors
    fits = {name for name in given if torch.equal(state[name], given[name])}
    assert given.keys() - fits == {"head.weight", "head.bias"}
    assert [m for m in observer.messages if "; random: head.bias, head.weight" in m]
    trainer.fit()
    best = load(tmp_path / BEST)
    assert best.model_config == config.model
    assert best.meta["model"]["stem"] == "strided"


def test_weights_that_have_seen_the_validation_photos_are_rejected_with_their_own_split(
    oxford_root: Path, folder_root: Path, tmp_path: Path, whole: Run
) -> None:
    best = whole.folder / BEST
    other = tiny("data.split_seed=1")
    with pytest.raises(TrainingError, match=r"trained on 2 of the 2 photos.*data\.val_fraction=0\.1 .*split_seed=0"):
        Trainer(other, oxford_root, tmp_path / "out", device=CPU, init=best)
    Trainer(other, folder_root, tmp_path / "out", device=CPU, init=best)  # photos that it does not know


def test_weights_of_a_share_are_rejected_where_a_listing_divides(folder_copy: Path, tmp_path: Path) -> None:
    """The usual remedy, another share, would have no effect."""
    best = Trainer(tiny("epochs=1"), folder_copy, tmp_path / "run", device=CPU).fit()
    names = {pair.name for pair in find(folder_copy, Split.TRAIN, val_fraction=0.1)}
    (folder_copy / "val.txt").write_text(min(names))
    with pytest.raises(TrainingError, match=r"trained on 1 of the 1 photos.* list in val\.txt") as told:
        Trainer(tiny("epochs=1"), folder_copy, tmp_path / "other", device=CPU, init=best)
    assert "--set" not in str(told.value)


def test_weights_that_have_seen_the_validation_photos_are_rejected_though_the_folder_has_changed(
    folder_copy: Path, tmp_path: Path
) -> None:
    config = tiny("epochs=1", "data.val_fraction=0.4")
    best = Trainer(config, folder_copy, tmp_path / "run", device=CPU).fit()
    for part in ("images", "masks"):
        shutil.copy(folder_copy / part / "own_00.png", folder_copy / part / "added.png")
    said = r"trained on \d of the 4 photos.* list in val\.txt .* or others that it has not seen"
    with pytest.raises(TrainingError, match=said):  # the same share and seed now choose others
        Trainer(config, folder_copy, tmp_path / "other", device=CPU, init=best)
    (folder_copy / "val.txt").write_text("added\n")
    Trainer(tiny("epochs=1"), folder_copy, tmp_path / "other", device=CPU, init=best)


def test_weights_that_have_seen_test_photos_are_warned_about_and_recorded_for_later_runs(
    folder_copy: Path, tmp_path: Path
) -> None:
    listing = folder_copy / "test.txt"
    was = listing.read_text()
    listing.write_text("own_00\n")
    first = load(Trainer(tiny("epochs=1"), folder_copy, tmp_path / "first", device=CPU).fit())
    assert len(train_keys(first.meta)) == 10
    listing.write_text(was)
    (folder_copy / "val.txt").write_text("own_00\n")
    stop = Recorder(at_step=at(1, lambda: signal.raise_signal(signal.SIGINT)))
    begun = Trainer(
        tiny("epochs=1"), folder_copy, tmp_path / "run", device=CPU, init=tmp_path / "first" / BEST, observer=stop
    )
    assert [w for w in begun.warnings if re.search(r"it was trained on [23] of the 3 test photos", w)]
    with pytest.raises(KeyboardInterrupt):
        begun.fit()
    again = Recorder()
    resumed = Trainer(tiny("epochs=1"), folder_copy, tmp_path / "run", device=CPU, resume=True, observer=again)
    assert sorted(resumed.warnings) == sorted(begun.warnings), "it would be lost from run.json"
    assert sorted(m for m in again.messages if m.startswith("warning: ")) == sorted(
        f"warning: {w}" for w in begun.warnings
    )
    last = load(resumed.fit())
    own = {photo_key(pair) for pair in find(folder_copy, Split.TRAIN)}
    assert train_keys(last.meta) == train_keys(begun.meta) == train_keys(first.meta) | own
    assert train_keys(first.meta) - own, "a resumed run alone would know its own only"


def test_a_resumed_run_does_not_read_the_weights_that_it_began_with(
    oxford_root: Path, tmp_path: Path, whole: Run
) -> None:
    folder = shutil.copytree(whole.folder, tmp_path / "out")
    observer, gone = Recorder(), tmp_path / "gone.safetensors"
    Trainer(tiny(), oxford_root, folder, device=CPU, init=gone, resume=True, observer=observer)
    assert any(f"{gone} is not read" in message for message in observer.messages)
