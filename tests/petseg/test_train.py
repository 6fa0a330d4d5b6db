from __future__ import annotations

import csv
import dataclasses
import functools
import math
import multiprocessing
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from petseg.checkpoint import Checkpoint, load, load_model, save_checkpoint
from petseg.config import ScheduleConfig, TrainConfig, from_dict, override, to_dict
from petseg.data import Pair, Split, find
from petseg.device import pick_device, pick_precision
from petseg.evaluate import Evaluation, evaluate
from petseg.model import AttentionUNet, AttentionUNetConfig, normalize
from petseg.reference import torch_run
from petseg.train import (
    BEST,
    FEW,
    LAST,
    LOG,
    QUICK_SAVE,
    Observer,
    Observers,
    RunState,
    Step,
    Trainer,
    learning_rate,
    workers_of,
)
from petseg.train_set import EpochSampler
from petseg_export import OnnxConfig, export
from petseg_runtime.errors import (
    CheckpointError,
    DataError,
    EngineError,
    NonFiniteLoss,
    OutputError,
    TrainingError,
    UsageError,
)
from petseg_runtime.spec import lowest_pet

CPU = torch.device("cpu")
EPOCHS, PER_EPOCH = 3, 5  # 24 photos, of which 2 validate; batches of 4


def tiny(*settings: str) -> TrainConfig:
    raw: dict[str, Any] = {
        "epochs": EPOCHS,
        "batch": 4,
        "amp": "fp32",
        "model": {"width": 4, "levels": [1, 2, 4]},  # five levels take half as long again
        "data": {"height": 32, "width": 32, "val_fraction": 0.1},
        "optimizer": {"lr": 1e-2},
        "schedule": {"restart_epochs": 2},
    }
    for setting in settings:
        override(raw, setting)
    return from_dict(TrainConfig, raw)


class Recorder(Observer):
    """Keeps what it is told, and calls `at_step` and `at_epoch`, if given, in the middle of the run."""

    def __init__(self, at_step: Callable[[int], None] | None = None, at_epoch: Callable[[int], None] | None = None):
        self.begun: list[tuple[int, int]] = []
        self.messages: list[str] = []
        self.losses: list[float] = []
        self.rates: list[float] = []
        self.rows: list[dict[str, float]] = []
        self.at_step, self.at_epoch = at_step, at_epoch

    def begin(self, per_epoch: int, batch: int) -> None:
        assert not self.losses
        self.begun.append((per_epoch, batch))

    def started(self, message: str) -> None:
        self.messages.append(message)

    def step(self, state: RunState, loss: float, lr: float) -> None:
        self.losses.append(loss)
        self.rates.append(lr)
        if self.at_step:
            self.at_step(state.step)

    def epoch(self, row: dict[str, float]) -> None:
        self.rows.append(row)
        if self.at_epoch:
            self.at_epoch(int(row["epoch"]))


def at(step: int, act: Callable[[], None]) -> Callable[[int], None]:
    return lambda now: act() if now == step else None


@dataclass
class Run:
    folder: Path
    observer: Recorder
    trainer: Trainer

    @property
    def best(self) -> Checkpoint:
        return load(self.folder / BEST)

    @property
    def last(self) -> Checkpoint:
        return load(self.folder / LAST)


@pytest.fixture(autouse=True)
def quick_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """A state is saved after every epoch, however busy the disk of this machine is."""
    monkeypatch.setattr("petseg.train.QUICK_SAVE", math.inf)


@pytest.fixture
def usual_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("petseg.train.QUICK_SAVE", QUICK_SAVE)


@pytest.fixture(scope="module")
def whole(oxford_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run that nothing disturbed."""
    folder, observer = tmp_path_factory.mktemp("whole"), Recorder()
    trainer = Trainer(tiny(), oxford_root, folder, device=CPU, observer=observer, provenance={"command": "tests"})
    assert trainer.fit() == folder / BEST
    return Run(folder, observer, trainer)


def same_tensors(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def without_times(history: list[dict[str, float]]) -> list[dict[str, float]]:
    times = ("seconds", "images_per_s", "data_wait", "elapsed")
    return [{k: v for k, v in row.items() if k not in times} for row in history]


def assert_same_run(folder: Path, whole: Run) -> None:
    """Bit for bit: weights, moving average, optimizer, history."""
    best, last = load(folder / BEST), load(folder / LAST)
    assert same_tensors(best.tensors, whole.best.tensors)
    assert same_tensors(last.tensors, whole.last.tensors)
    assert best.meta["epoch"] == whole.best.meta["epoch"]
    assert best.meta["spec"] == whole.best.meta["spec"]
    state, expected = last.meta["state"], whole.last.meta["state"]
    assert without_times(state["history"]) == without_times(expected["history"])
    assert (state["step"], state["best_iou"]) == (expected["step"], expected["best_iou"])


# an undisturbed run


def test_the_network_learns(whole: Run) -> None:
    rows = whole.observer.rows
    assert [row["epoch"] for row in rows] == [1, 2, 3]
    assert [row["step"] for row in rows] == [5, 10, 15]
    assert rows[-1]["loss"] < 0.95 * rows[0]["loss"]
    assert rows[0]["loss"] == pytest.approx(sum(whole.observer.losses[:5]) / 5)
    assert rows[2]["loss"] == pytest.approx(sum(whole.observer.losses[10:]) / 5)
    assert max(row["val_iou"] for row in rows) > 0.3
    assert all(0 <= row["val_iou"] <= row["val_dice"] <= 1 for row in rows)
    assert whole.observer.rates == [
        learning_rate(whole.trainer.config.schedule, 1e-2, step, PER_EPOCH, EPOCHS) for step in range(15)
    ]
    assert whole.observer.begun == [(PER_EPOCH, 4)]


def test_the_best_checkpoint_is_the_model_of_the_best_epoch(whole: Run, oxford_root: Path) -> None:
    model, best = load_model(whole.folder / BEST)
    ious = [row["val_iou"] for row in whole.observer.rows]
    assert best.meta["kind"] == "model"
    assert best.meta["epoch"] == 1 + ious.index(max(ious))
    row = whole.observer.rows[best.meta["epoch"] - 1]
    assert best.meta["validation"] == row
    result = evaluate(torch_run(model), whole.trainer.val_pairs, 32, 32)
    assert result.counts(row["val_threshold"]).iou == row["val_iou"]
    assert (best.meta["spec"]["height"], best.meta["spec"]["width"]) == (32, 32)
    assert best.meta["spec"]["certain_share"] is None, "the embedded model's rule of pets is not this one's"
    assert best.meta["config"] == to_dict(whole.trainer.config)
    assert best.meta["provenance"] == {"command": "tests"}
    assert best.meta["data"]["train_photos"] == 22
    assert best.meta["data"]["val_photos"] == 2
    assert (best.meta["data"]["val_fraction"], best.meta["data"]["split_seed"]) == (0.1, 0)
    assert best.meta["precision"] == "float32"


@pytest.mark.parametrize("byte", [3, 100, 128, 129])
def test_the_threshold_of_the_checkpoint_is_the_one_that_was_measured(
    oxford_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, byte: int
) -> None:
    monkeypatch.setattr("petseg.train.best_threshold", lambda *a: byte / 255)
    Trainer(tiny("epochs=1", "model.width=2"), oxford_root, tmp_path, device=CPU).fit()
    spec = load(tmp_path / BEST).meta["spec"]
    assert lowest_pet(spec["threshold"]) == lowest_pet(spec["cutout_threshold"]) == byte


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


def test_the_log_has_a_line_for_each_epoch(whole: Run) -> None:
    with (whole.folder / LOG).open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [{k: float(v) for k, v in line.items()} for line in lines] == whole.observer.rows
    assert {p.name for p in whole.folder.iterdir()} == {BEST, LAST, LOG}


def test_the_beginning_is_announced(whole: Run) -> None:
    said = "\n".join(whole.observer.messages)
    parameters = sum(p.numel() for p in whole.trainer.model.parameters())
    assert f"width 4, {parameters:,} parameters, float32" in said
    assert "22 photos to train on, 2 for validation" in said


def test_photos_without_pet_are_announced_and_recorded(oxford_copy: Path, tmp_path: Path) -> None:
    mask = oxford_copy / "annotations" / "trimaps" / "pet_05.png"
    Image.new("L", (64, 64), 2).save(mask)
    observer = Recorder()
    trainer = Trainer(tiny(), oxford_copy, tmp_path / "out", device=CPU, observer=observer)
    assert trainer.meta["data"]["skipped_without_pet"] == ["pet_05"]
    assert any("pet_05" in message for message in observer.messages)


def test_the_same_seed_is_the_same_run_and_another_is_not(oxford_root: Path, tmp_path: Path, whole: Run) -> None:
    torch.manual_seed(987)  # what came before must not matter
    Trainer(tiny(), oxford_root, tmp_path / "same", device=CPU).fit()
    assert_same_run(tmp_path / "same", whole)
    other = Trainer(tiny("seed=1"), oxford_root, tmp_path / "other", device=CPU)
    first = Trainer(tiny(), oxford_root, tmp_path / "first", device=CPU)
    assert not torch.equal(other.model.head.weight, first.model.head.weight)
    assert list(other.sampler) != list(first.sampler)


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_workers_change_nothing(oxford_root: Path, tmp_path: Path, whole: Run) -> None:
    Trainer(tiny("data.workers=2"), oxford_root, tmp_path, device=CPU).fit()
    assert_same_run(tmp_path, whole)


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_workers_are_forked_once_and_end_with_the_run(oxford_root: Path, tmp_path: Path) -> None:
    seen: list[set[int | None]] = []

    def look(step: int) -> None:
        seen.append({child.pid for child in multiprocessing.active_children()} - before)
        if step == 2 * PER_EPOCH + 1:
            raise Crash

    before = {child.pid for child in multiprocessing.active_children()}
    observer = Recorder(at_step=look)
    trainer = Trainer(tiny("data.workers=2", "model.width=2"), oxford_root, tmp_path, device=CPU, observer=observer)
    assert trainer.loader.multiprocessing_context is not None
    assert trainer.loader.multiprocessing_context.get_start_method() == "fork"
    assert "2 processes augment them" in observer.messages
    with pytest.raises(Crash):
        trainer.fit()
    assert {len(pids) for pids in seen} == {2}
    assert len(set.union(*seen)) == 2, "others in another epoch"
    assert {child.pid for child in multiprocessing.active_children()} == before, "they are deaf to SIGTERM"


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
    monkeypatch.setattr("petseg.train.usable_cpus", lambda: cores)
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=2**40))
    assert workers_of(setting, torch.device(device), 2**20, processes) == workers


@pytest.mark.parametrize(("free", "workers"), [(64, 16), (63, 15), (4, 1), (3, 0)])
def test_workers_have_room_for_their_batches(monkeypatch: pytest.MonkeyPatch, free: int, workers: int) -> None:
    """A container's /dev/shm has 64 MB: a worker that finds no room there dies of a bus error."""
    monkeypatch.setattr("petseg.train.usable_cpus", lambda: 64)
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=free * 2**20))
    assert workers_of("auto", torch.device("cuda"), 2**20) == workers
    assert workers_of("auto", torch.device("cuda"), 2**20, 2) == workers // 2
    assert workers_of(5, torch.device("cuda"), 2**20) == 5


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_stopped_run_with_workers_goes_on(oxford_root: Path, tmp_path: Path, whole: Run) -> None:
    config = tiny("data.workers=1")
    stop = Recorder(at_step=at(8, lambda: signal.raise_signal(signal.SIGINT)))
    with pytest.raises(KeyboardInterrupt):
        Trainer(config, oxford_root, tmp_path, device=CPU, observer=stop).fit()
    Trainer(config, oxford_root, tmp_path, device=CPU, resume=True).fit()
    assert_same_run(tmp_path, whole)


# stopping and resuming


@pytest.mark.parametrize(
    ("step", "number"),
    [
        (1, signal.SIGINT),
        (7, signal.SIGTERM),
        (9, signal.SIGINT),
        (PER_EPOCH, signal.SIGINT),  # an epoch's last step: its validation is still to come
        (EPOCHS * PER_EPOCH, signal.SIGINT),
    ],
)
def test_a_run_that_was_stopped_and_resumed_is_the_same_run(
    oxford_root: Path, tmp_path: Path, whole: Run, step: int, number: int
) -> None:
    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    stop = Recorder(at_step=at(step, lambda: signal.raise_signal(number)))
    trainer = Trainer(tiny(), oxford_root, tmp_path, device=CPU, observer=stop)
    with pytest.raises(KeyboardInterrupt):
        trainer.fit()
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before
    assert len(stop.losses) == step
    assert load(tmp_path / LAST).meta["state"]["step"] == step

    torch.manual_seed(step)
    go_on = Recorder()
    resumed = Trainer(tiny(), oxford_root, tmp_path, device=CPU, resume=True, observer=go_on)
    assert f"resumed at step {step}" in go_on.messages
    resumed.fit()
    assert stop.losses + go_on.losses == whole.observer.losses
    assert stop.rates + go_on.rates == whole.observer.rates
    assert_same_run(tmp_path, whole)


@pytest.mark.parametrize("epoch", [0, 1, EPOCHS - 1])
def test_a_run_that_is_stopped_in_a_validation_takes_up_there(
    oxford_root: Path, tmp_path: Path, whole: Run, monkeypatch: pytest.MonkeyPatch, epoch: int
) -> None:
    """It may take longer than a scheduler waits before it kills."""
    begun: list[None] = []

    def stopped(*args: Any, **options: Any) -> Evaluation:
        begun.append(None)
        if len(begun) == epoch + 1:
            signal.raise_signal(signal.SIGTERM)
        return evaluate(*args, **options)

    monkeypatch.setattr("petseg.train.evaluate", stopped)
    observer = Recorder()
    trainer = Trainer(tiny(), oxford_root, tmp_path, device=CPU, observer=observer)
    with pytest.raises(KeyboardInterrupt):
        trainer.fit()
    assert (len(observer.losses), len(observer.rows)) == ((epoch + 1) * PER_EPOCH, epoch)
    state = load(tmp_path / LAST).meta["state"]
    assert (state["step"], len(state["history"])) == ((epoch + 1) * PER_EPOCH, epoch)
    resumed = Recorder()
    Trainer(tiny(), oxford_root, tmp_path, device=CPU, resume=True, observer=resumed).fit()
    assert observer.losses + resumed.losses == whole.observer.losses
    assert_same_run(tmp_path, whole)


#: A second signal comes while the first one's handler is about to wake whoever waits.
NESTED = """
import signal, threading, torch
from pathlib import Path
from petseg.config import TrainConfig, from_dict
from petseg.train import Observer, Trainer
torch.set_num_threads({threads})
notify_all, signals = threading.Condition.notify_all, []

def interrupted(self):
    if signals:
        signal.raise_signal(signals.pop())
    notify_all(self)

threading.Condition.notify_all = interrupted

class Stops(Observer):
    def step(self, state, loss, lr):
        signals.append(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
        signals.clear()

config = from_dict(TrainConfig, {config!r})
try:
    Trainer(config, Path({root!r}), Path({out!r}), device=torch.device("cpu"), observer=Stops()).fit()
except KeyboardInterrupt:
    print("stopped")
"""


def test_a_signal_that_interrupts_the_handler_of_another_stops_the_run(oxford_root: Path, tmp_path: Path) -> None:
    about = {"threads": torch.get_num_threads(), "config": to_dict(tiny()), "root": str(oxford_root)}
    code = NESTED.format(**about, out=str(tmp_path))
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (ended.stdout, ended.stderr) == ("stopped\n", "")
    assert load(tmp_path / LAST).meta["state"]["step"] == 1


@pytest.mark.parametrize(
    ("amp", "other", "said"),
    [
        ("fp32", torch.bfloat16, "in float32 as so far, where this device would choose bfloat16"),
        ("bf16", torch.float32, "in float32 from here on (this device does not compute in bfloat16, as so far)"),
    ],
)
def test_a_run_goes_on_in_the_precision_it_began_in_where_the_device_has_it(
    oxford_root: Path,
    tmp_path: Path,
    whole: Run,
    monkeypatch: pytest.MonkeyPatch,
    amp: str,
    other: torch.dtype,
    said: str,
) -> None:
    """On another machine, with ``amp=auto``."""
    first = {"fp32": torch.float32, "bf16": torch.bfloat16}[amp]
    monkeypatch.setattr("petseg.train.pick_precision", lambda amp, device: first)
    stop = Recorder(at_step=at(7, lambda: signal.raise_signal(signal.SIGINT)))
    with pytest.raises(KeyboardInterrupt):
        Trainer(tiny("amp=auto"), oxford_root, tmp_path, device=CPU, observer=stop).fit()
    monkeypatch.setattr("petseg.train.pick_precision", lambda amp, device: other)
    go_on = Recorder()
    resumed = Trainer(tiny("amp=auto"), oxford_root, tmp_path, device=CPU, resume=True, observer=go_on)
    assert any(message.startswith(said) for message in go_on.messages)
    resumed.fit()
    assert load(tmp_path / LAST).meta["precision"] == "float32"
    if amp == "fp32":
        assert_same_run(tmp_path, whole)


def test_a_run_stopped_at_every_other_step_is_still_the_same_run(oxford_root: Path, tmp_path: Path, whole: Run) -> None:
    for resume in (False, True, True):
        stop = Recorder()
        stop.at_step = lambda now, stop=stop: signal.raise_signal(signal.SIGINT) if len(stop.losses) == 3 else None
        with pytest.raises(KeyboardInterrupt):
            Trainer(tiny(), oxford_root, tmp_path, device=CPU, resume=resume, observer=stop).fit()
    Trainer(tiny(), oxford_root, tmp_path, device=CPU, resume=True).fit()
    assert_same_run(tmp_path, whole)


class Crash(BaseException):
    pass


def crash() -> None:
    raise Crash


@pytest.mark.parametrize("step", [6, 10])
def test_a_run_that_crashed_goes_on_from_the_last_epoch(
    oxford_root: Path, tmp_path: Path, whole: Run, step: int
) -> None:
    with pytest.raises(Crash):
        Trainer(tiny(), oxford_root, tmp_path, device=CPU, observer=Recorder(at_step=at(step, crash))).fit()
    assert load(tmp_path / LAST).meta["state"]["step"] == PER_EPOCH
    Trainer(tiny(), oxford_root, tmp_path, device=CPU, resume=True).fit()
    assert_same_run(tmp_path, whole)


@pytest.mark.parametrize("failing", [BEST, LAST, LOG])
def test_a_run_that_crashed_while_writing_goes_on(
    oxford_root: Path, tmp_path: Path, whole: Run, failing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in the second epoch's writing: whatever is on the disk by then must lead to the same end."""
    folder = tmp_path / "run"
    armed: list[bool] = []
    replace = Path.replace

    def dies(self: Path, target: Path) -> Path:
        if armed and Path(target).name == failing:
            raise Crash
        return replace(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", dies)
        observer = Recorder(at_step=at(PER_EPOCH + 1, lambda: armed.append(True)))
        # width 4 improves at every epoch here, so that all three files are written each time
        try:
            Trainer(tiny(), oxford_root, folder, device=CPU, observer=observer).fit()
            assert failing == BEST, "the run should have died"
        except Crash:
            pass
    Trainer(tiny(), oxford_root, folder, device=CPU, resume=True).fit()
    assert_same_run(folder, whole)
    assert {p.name for p in folder.iterdir()} == {BEST, LAST, LOG}


def test_a_run_that_crashed_while_writing_its_first_best_checkpoint_goes_on(
    oxford_root: Path, tmp_path: Path, whole: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dies(trainer: Trainer, *words: Any) -> None:
        (trainer.output / BEST).write_bytes(b"of this run, which is not to be taken for another's")
        raise Crash

    trainer = Trainer(tiny(), oxford_root, tmp_path, device=CPU)
    monkeypatch.setattr(trainer, "_save_best", functools.partial(dies, trainer))
    with pytest.raises(Crash):
        trainer.fit()
    Trainer(tiny(), oxford_root, tmp_path, device=CPU, resume=True).fit()
    assert_same_run(tmp_path, whole)


# saving that takes long


@pytest.mark.usefixtures("usual_disk")
@pytest.mark.parametrize(
    ("took", "since", "pays"), [(0.05, 0.0, True), (1.0, 9.0, False), (1.0, 11.0, True), (0.2, 1.5, False)]
)
def test_saving_takes_a_tenth_of_the_time_at_most(
    whole: Run, monkeypatch: pytest.MonkeyPatch, took: float, since: float, pays: bool
) -> None:
    monkeypatch.setattr(whole.trainer, "save_took", took)
    monkeypatch.setattr(whole.trainer, "_saved", time.perf_counter() - since)
    assert whole.trainer._save_pays is pays


def with_slow_saving(trainer: Trainer) -> tuple[Trainer, list[int]]:
    """One whose every save took an hour; and the steps at which it saved."""
    write, saved = trainer._write_last, []

    def slow() -> float:
        saved.append(trainer.state.step)
        write()
        assert 0 < trainer.save_took < 60
        assert 0 <= time.perf_counter() - trainer._saved < 60
        trainer.save_took = 3600.0
        return 0.0

    trainer._write_last = slow  # type: ignore[method-assign]
    return trainer, saved


@pytest.mark.usefixtures("usual_disk")
def test_a_state_whose_saving_takes_long_is_saved_at_the_end(oxford_root: Path, tmp_path: Path, whole: Run) -> None:
    trainer, saved = with_slow_saving(Trainer(tiny(), oxford_root, tmp_path, device=CPU))
    trainer.fit()
    assert saved == [PER_EPOCH, EPOCHS * PER_EPOCH]
    assert_same_run(tmp_path, whole)


@pytest.mark.usefixtures("usual_disk")
@pytest.mark.parametrize("orderly", [False, True])
def test_a_run_whose_state_is_not_saved_after_each_epoch_goes_on(
    oxford_root: Path, tmp_path: Path, whole: Run, orderly: bool
) -> None:
    act = functools.partial(signal.raise_signal, signal.SIGTERM) if orderly else crash
    observer, end = Recorder(at_step=at(2 * PER_EPOCH + 2, act)), 2 * PER_EPOCH + 2
    trainer, saved = with_slow_saving(Trainer(tiny(), oxford_root, tmp_path, device=CPU, observer=observer))
    with pytest.raises(KeyboardInterrupt if orderly else Crash):
        trainer.fit()
    assert saved == ([PER_EPOCH, end] if orderly else [PER_EPOCH])
    go_on = Recorder()
    Trainer(tiny(), oxford_root, tmp_path, device=CPU, resume=True, observer=go_on).fit()
    assert go_on.losses == whole.observer.losses[end if orderly else PER_EPOCH :]
    assert_same_run(tmp_path, whole)


# losses that are read when the next step is under way, as on a GPU


def late(trainer: Trainer) -> Trainer:
    trainer.late = True
    return trainer


def test_only_a_gpu_is_told_the_next_step_before_the_last_one_is_read(
    oxford_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def order(folder: str, behind: bool) -> list[str]:
        trainer, said = Trainer(tiny("epochs=2"), oxford_root, tmp_path / folder, device=CPU), []
        trainer.late |= behind
        step, settle, validate = trainer._step, trainer._settle, trainer._validate
        monkeypatch.setattr(trainer, "_step", lambda *words: said.append("told") or step(*words))
        monkeypatch.setattr(trainer, "_settle", lambda one: said.append("read") or settle(one))
        monkeypatch.setattr(trainer, "_validate", lambda: said.append("validated") or validate())
        trainer.fit()
        return said

    assert order("cpu", behind=False) == ([*["told", "read"] * 5, "validated"]) * 2
    assert order("gpu", behind=True) == (["told", *["told", "read"] * 4, "read", "validated"]) * 2


def test_a_late_run_is_the_same_run(oxford_root: Path, tmp_path: Path, whole: Run) -> None:
    observer = Recorder()
    late(Trainer(tiny(), oxford_root, tmp_path, device=CPU, observer=observer)).fit()
    assert observer.losses == whole.observer.losses
    assert observer.rates == whole.observer.rates
    assert without_times(observer.rows) == without_times(whole.observer.rows)
    assert_same_run(tmp_path, whole)


@pytest.mark.parametrize(
    ("step", "number", "end"),
    [(1, signal.SIGINT, 2), (7, signal.SIGTERM, 8), (PER_EPOCH, signal.SIGINT, 5), (PER_EPOCH - 1, signal.SIGINT, 5)],
)
def test_a_late_run_is_stopped_with_all_its_steps_read(
    oxford_root: Path, tmp_path: Path, whole: Run, step: int, number: int, end: int
) -> None:
    stop = Recorder(at_step=at(step, lambda: signal.raise_signal(number)))
    trainer = late(Trainer(tiny(), oxford_root, tmp_path, device=CPU, observer=stop))
    with pytest.raises(KeyboardInterrupt):
        trainer.fit()
    assert (len(stop.losses), trainer.stopped_by) == (end, number)
    assert load(tmp_path / LAST).meta["state"]["step"] == end
    late(Trainer(tiny(), oxford_root, tmp_path, device=CPU, resume=True)).fit()
    assert_same_run(tmp_path, whole)


@pytest.mark.parametrize("batch", [2, PER_EPOCH])
def test_a_late_loss_that_is_no_number_names_its_own_batch_and_saves_nothing(
    oxford_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch: int
) -> None:
    trainer = late(Trainer(tiny(), oxford_root, tmp_path, device=CPU))
    step, told = trainer._step, []

    def spoil(photo: Tensor, trimap: Tensor, lr: float) -> Step:
        told.append(lr)
        spoilt = len(told) == PER_EPOCH + batch
        with monkeypatch.context() as patch:
            if spoilt:
                patch.setattr("petseg.train.normalize", lambda image: normalize(image) * math.nan)
            return step(photo, trimap, lr)

    monkeypatch.setattr(trainer, "_step", spoil)
    with pytest.raises(NonFiniteLoss, match=f"loss nan.*epoch 2, batch {batch} ") as caught:
        trainer.fit()
    assert f"({', '.join(names_of_batch(trainer, 1, batch - 1))})" in str(caught.value)
    assert len(told) == min(PER_EPOCH + batch + 1, 2 * PER_EPOCH)
    last = load(tmp_path / LAST)
    assert last.meta["state"]["step"] == PER_EPOCH
    assert load(tmp_path / BEST).meta["epoch"] == 1
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters()), "the weights had moved"


class Waits(TorchDispatchMode):
    """Counts what would make the CPU wait for a GPU: numbers that are read back."""

    found = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("scaled", [False, True])
def test_a_step_reads_nothing_back(oxford_root: Path, tmp_path: Path, scaled: bool) -> None:
    trainer = Trainer(tiny("model.width=2"), oxford_root, tmp_path, device=CPU)
    trainer.scaler = torch.amp.GradScaler("cpu", enabled=scaled)
    batches = list(trainer.loader)
    trainer._step(*batches[0][:2], 1e-3).read()
    with Waits() as waits:
        step = trainer._step(*batches[1][:2], 1e-3)
    assert waits.found == 0
    with waits:
        step.numbers.sum().item()
    assert waits.found == 1, "the count works"


KILLED = """
import os, sys, torch
from pathlib import Path
from petseg.config import TrainConfig, from_dict
from petseg.train import Observer, Trainer
torch.set_num_threads({threads})
class Dies(Observer):
    def step(self, state, loss, lr):
        if state.step == 8:
            os._exit(9)
config = from_dict(TrainConfig, {config!r})
Trainer(config, Path({root!r}), Path({out!r}), device=torch.device("cpu"), observer=Dies()).fit()
"""


def test_a_run_that_was_killed_in_another_process_goes_on(oxford_root: Path, tmp_path: Path, whole: Run) -> None:
    out = tmp_path / "run"
    code = KILLED.format(threads=torch.get_num_threads(), config=to_dict(tiny()), root=str(oxford_root), out=str(out))
    ended = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True, cwd=tmp_path)
    assert ended.returncode == 9, ended.stderr
    assert load(out / LAST).meta["state"]["step"] == PER_EPOCH
    Trainer(tiny(), oxford_root, out, device=CPU, resume=True).fit()
    assert_same_run(out, whole)


SHOT = """
import os, random, signal, sys, time, torch
from pathlib import Path
from petseg.config import TrainConfig, from_dict
from petseg.train import LAST, Trainer
torch.set_num_threads({threads})
config, root, out, lot = from_dict(TrainConfig, {config!r}), Path({root!r}), Path({out!r}), random.Random({seed})
kills = 0
for number in range(1, 9):
    child = os.fork()
    if child == 0:
        Trainer(config, root, out, device=torch.device("cpu"), resume=(out / LAST).exists()).fit()
        os._exit(0)
    time.sleep(lot.uniform(0, 0.15 * number))  # ever later, so that fast machines and slow ones see both ends
    os.kill(child, signal.SIGKILL)
    kills += os.waitpid(child, 0)[1] == signal.SIGKILL
print(kills)
"""


def test_a_run_that_is_killed_again_and_again_at_any_moment_ends_the_same(
    oxford_root: Path, tmp_path: Path, whole: Run
) -> None:
    out, code = tmp_path / "run", {"threads": torch.get_num_threads(), "config": to_dict(tiny()), "seed": 6}
    text = SHOT.format(**code, root=str(oxford_root), out=str(out))
    ended = subprocess.run([sys.executable, "-c", text], check=True, capture_output=True, text=True, cwd=tmp_path)
    assert int(ended.stdout) >= 2, ended.stderr
    Trainer(tiny(), oxford_root, out, device=CPU, resume=(out / LAST).exists()).fit()
    assert_same_run(out, whole)


#: Has a run's folder until it is killed.
HOLDS = (
    "import sys, time; from pathlib import Path; from petseg.lock import *; let_in = keep_others_out(Path(sys.argv[1]))"
)


@pytest.mark.parametrize("resume", [True, False])
def test_a_folder_that_another_process_trains_into_is_refused_and_left_alone(
    oxford_root: Path, tmp_path: Path, whole: Run, resume: bool
) -> None:
    folder = tmp_path / "run"
    if resume:
        shutil.copytree(whole.folder, folder)
    command = [sys.executable, "-c", f"{HOLDS}; print(flush=True); time.sleep(600)", str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as other:
        try:
            assert other.stdout
            other.stdout.readline()
            part = folder / ".last.0123abcd.part.safetensors"
            part.write_bytes(b"what it is just writing")
            with pytest.raises(TrainingError, match=r"run: another process is training there"):
                Trainer(tiny(), oxford_root, folder, device=CPU, resume=resume)
            assert part.exists()
        finally:
            other.kill()


def test_what_a_killed_run_was_writing_is_removed(oxford_root: Path, tmp_path: Path, whole: Run) -> None:
    folder = Path(shutil.copytree(whole.folder, tmp_path / "run"))
    for name in (".last.0123abcd.part.safetensors", ".log.0123abcd.part.csv"):
        (folder / name).write_bytes(b"half")
    Trainer(tiny(), oxford_root, folder, device=CPU, resume=True)
    assert {p.name for p in folder.iterdir()} == {BEST, LAST, LOG}


def test_a_finished_run_resumed_stays_as_it_is(oxford_root: Path, tmp_path: Path, whole: Run) -> None:
    folder = Path(shutil.copytree(whole.folder, tmp_path / "run"))
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    assert Trainer(tiny(), oxford_root, folder, device=CPU, resume=True).fit() == folder / BEST
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


def test_a_run_outside_the_main_thread_works_without_signals(oxford_root: Path, tmp_path: Path) -> None:
    trainer = Trainer(tiny("epochs=1", "model.width=2"), oxford_root, tmp_path, device=CPU)
    thread = threading.Thread(target=trainer.fit)
    thread.start()
    thread.join()
    assert (tmp_path / BEST).exists()


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
def test_other_settings_are_refused_on_resume(oxford_root: Path, whole: Run, setting: str, said: str) -> None:
    before = (whole.folder / LAST).read_bytes()
    with pytest.raises(TrainingError, match=said):
        Trainer(tiny(setting), oxford_root, whole.folder, device=CPU, resume=True)
    assert (whole.folder / LAST).read_bytes() == before


@pytest.mark.parametrize("setting", ["data.workers=0", "data.on_bad=skip", "early_stop=7", "compile=true"])
def test_settings_that_say_where_and_how_long_are_taken_anew(
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


def test_every_other_setting_is_named(oxford_root: Path, whole: Run) -> None:
    with pytest.raises(TrainingError, match=r"batch was 4, now 5; .*seed was 0, now 1"):
        Trainer(tiny("seed=1", "batch=5"), oxford_root, whole.folder, device=CPU, resume=True)


def test_other_photos_are_refused_on_resume(oxford_copy: Path, whole: Run) -> None:
    listing = oxford_copy / "annotations" / "trainval.txt"
    listing.write_text("".join(line for line in listing.read_text().splitlines(True) if "pet_07" not in line))
    with pytest.raises(TrainingError, match="other photos"):
        Trainer(tiny(), oxford_copy, whole.folder, device=CPU, resume=True)


def test_a_folder_that_holds_a_run_is_refused(oxford_root: Path, whole: Run) -> None:
    before = {p.name: p.read_bytes() for p in whole.folder.iterdir()}
    with pytest.raises(TrainingError, match=r"already holds a run.*--resume"):
        Trainer(tiny(), oxford_root, whole.folder, device=CPU)
    assert {p.name: p.read_bytes() for p in whole.folder.iterdir()} == before


@pytest.mark.parametrize("name", [BEST, LAST, LOG])
def test_a_folder_that_holds_a_part_of_a_run_is_refused(
    oxford_root: Path, tmp_path: Path, whole: Run, name: str
) -> None:
    shutil.copy(whole.folder / name, tmp_path)
    with pytest.raises(TrainingError, match=r"already holds a run.*--resume"):
        Trainer(tiny(), oxford_root, tmp_path, device=CPU)
    assert (tmp_path / name).read_bytes() == (whole.folder / name).read_bytes()


def test_nothing_to_resume_is_refused(oxford_root: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"last\.safetensors: nothing to resume"):
        Trainer(tiny(), oxford_root, tmp_path / "none", device=CPU, resume=True)
    assert not (tmp_path / "none").exists()


def test_a_model_is_no_state_to_resume(oxford_root: Path, tmp_path: Path, whole: Run) -> None:
    shutil.copy(whole.folder / BEST, tmp_path / LAST)
    with pytest.raises(CheckpointError, match=r"last\.safetensors: a model.*--init"):
        Trainer(tiny(), oxford_root, tmp_path, device=CPU, resume=True)


def test_a_truncated_state_is_refused(oxford_root: Path, tmp_path: Path, whole: Run) -> None:
    data = (whole.folder / LAST).read_bytes()
    (tmp_path / LAST).write_bytes(data[: len(data) // 2])
    with pytest.raises(CheckpointError, match=r"last\.safetensors"):
        Trainer(tiny(), oxford_root, tmp_path, device=CPU, resume=True)


@pytest.mark.parametrize(
    "damage", ["head.bias", "ema/head.bias", "ema_updates", "optimizer/0/exp_avg", "state", "config"]
)
def test_a_state_that_lacks_a_part_is_refused_by_name(
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


# where a run starts


def test_init_starts_from_the_weights_of_a_checkpoint(oxford_root: Path, tmp_path: Path, whole: Run) -> None:
    trainer = Trainer(tiny(), oxford_root, tmp_path, device=CPU, init=whole.folder / BEST)
    assert same_tensors(trainer.model.state_dict(), whole.best.tensors)
    assert trainer.state.step == 0
    trained = Recorder()
    trainer.observer = trained
    trainer.fit()
    assert trained.losses[0] < whole.observer.losses[0]


def test_init_of_another_width_or_damaged_is_refused(oxford_root: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.safetensors"
    state = AttentionUNet(AttentionUNetConfig(width=2)).state_dict()
    save_checkpoint(other, state, {"kind": "model", "model": {"width": 2}})
    with pytest.raises(CheckpointError, match=r"other\.safetensors: a network of .*width=2.*width=4.*only \d+ of"):
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
    assert [m for m in observer.messages if f"{len(fits)} tensors; random: head.bias, head.weight" in m]
    trainer.fit()
    best = load(tmp_path / BEST)
    assert best.model_config == config.model
    assert best.meta["model"]["stem"] == "strided"


def test_a_run_from_before_a_setting_was_there_goes_on_with_its_default(
    oxford_root: Path, tmp_path: Path, whole: Run
) -> None:
    last = whole.last
    config = {**last.meta["config"], "model": {"width": 4, "levels": [1, 2, 4]}}
    save_checkpoint(tmp_path / LAST, last.tensors, {**last.meta, "config": config})
    trainer = Trainer(tiny(), oxford_root, tmp_path, device=CPU, resume=True)
    assert trainer.state.step == EPOCHS * PER_EPOCH


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


def test_the_target_is_the_mean_of_what_the_teacher_says_of_a_photo_and_its_mirror_image(
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
        photo, labels, _ = trainer.train_set[draw]
        straight = run(photo.numpy()[None])[0].astype(float)
        mirrored = run(photo.numpy()[None, :, ::-1].copy())[0, :, ::-1]
        assert abs(labels[1].numpy() - (straight + mirrored) / 2).max() <= 0.5
        assert straight.std() > 10


def test_another_teacher_is_refused_on_resume(oxford_root: Path, tmp_path: Path, whole: Run) -> None:
    with pytest.raises(TrainingError, match=r"the teacher of the run to resume was none, now .*best\.safetensors"):
        Trainer(tiny(), oxford_root, whole.folder, device=CPU, teacher=whole.folder / BEST, resume=True)


def test_a_teacher_that_is_no_model_is_refused(oxford_root: Path, tmp_path: Path, whole: Run) -> None:
    with pytest.raises(CheckpointError, match=r"last\.safetensors: the state of a run"):
        Trainer(tiny(), oxford_root, tmp_path, device=CPU, teacher=whole.folder / LAST)


def test_a_strided_run_that_was_interrupted_goes_on(oxford_root: Path, tmp_path: Path) -> None:
    settings = tiny("model.stem=strided", "model.levels=[1,2,3,4]", "epochs=1")
    stopping = Recorder(at(2, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    with pytest.raises(KeyboardInterrupt):
        Trainer(settings, oxford_root, tmp_path, device=CPU, observer=stopping).fit()
    Trainer(settings, oxford_root, tmp_path, device=CPU, resume=True).fit()
    assert load(tmp_path / LAST).meta["state"]["step"] == PER_EPOCH


def test_data_that_cannot_be_used_is_refused(oxford_root: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no data set"):
        Trainer(tiny(), tmp_path, tmp_path / "out", device=CPU)
    with pytest.raises(DataError, match="batch takes 23"):
        Trainer(tiny("batch=23"), oxford_root, tmp_path / "out", device=CPU)


# numbers that are none


def names_of_batch(trainer: Trainer, epoch: int, batch: int) -> list[str]:
    sampler = EpochSampler(len(trainer.train_set), trainer.config.batch, trainer.config.seed)
    sampler.epoch = epoch
    return [trainer.train_set.names[draw % len(trainer.train_set)] for draw in list(sampler)[batch]]


def test_a_loss_that_is_no_number_stops_the_run_and_names_the_photos(oxford_root: Path, tmp_path: Path) -> None:
    kept: list[bytes] = []

    def spoil(step: int) -> None:
        if step == PER_EPOCH + 2:
            kept.append((tmp_path / LAST).read_bytes())
            trainer.model.head.bias.data.fill_(math.nan)

    trainer = Trainer(tiny(), oxford_root, tmp_path, device=CPU, observer=Recorder(at_step=spoil))
    with pytest.raises(NonFiniteLoss, match=r"loss nan.*epoch 2, batch 3") as caught:
        trainer.fit()
    assert f"({', '.join(names_of_batch(trainer, 1, 2))})" in str(caught.value)
    assert str(tmp_path / LAST) in str(caught.value)
    assert (tmp_path / LAST).read_bytes() == kept[0]
    assert load(tmp_path / LAST).meta["state"]["step"] == PER_EPOCH
    Trainer(tiny(), oxford_root, tmp_path, device=CPU, resume=True)
    # What it says to do can be done.
    assert f"--init {tmp_path / LAST}" in str(caught.value)
    assert re.search(r"another --output.*lower optimizer\.lr or another amp", str(caught.value))
    again = Trainer(tiny("optimizer.lr=0.001"), oxford_root, tmp_path / "new", device=CPU, init=tmp_path / LAST)
    average = {n: t for n, t in load(tmp_path / LAST).tensors.items() if n.startswith("ema/")}
    assert same_tensors({f"ema/{n}": t for n, t in again.model.state_dict().items()}, average)


def test_a_first_loss_that_is_no_number_says_that_nothing_is_kept(oxford_root: Path, tmp_path: Path) -> None:
    trainer = Trainer(tiny(), oxford_root, tmp_path / "out", device=CPU)
    trainer.model.head.bias.data.fill_(math.inf)
    with pytest.raises(NonFiniteLoss, match=r"no checkpoint had been written yet\. Start again with a lower") as caught:
        trainer.fit()
    assert "--init" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_a_gradient_that_is_no_number_stops_the_run_before_the_weights_move(
    oxford_root: Path, tmp_path: Path, value: float
) -> None:
    trainer = Trainer(tiny(), oxford_root, tmp_path, device=CPU)
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    trainer.model.head.weight.register_hook(lambda grad: grad * value)
    with pytest.raises(NonFiniteLoss, match=r"gradient norm (nan|inf) in epoch 1, batch 1 \(pet_"):
        trainer.fit()
    assert same_tensors(before, dict(trainer.model.named_parameters()))


# precision and device


def test_fp16_on_a_cpu_is_refused(oxford_root: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="fp16 on a CPU"):
        pick_precision("fp16", CPU)
    with pytest.raises(UsageError, match="fp16 on a CPU"):
        Trainer(tiny("amp=fp16"), oxford_root, tmp_path, device=CPU)


def test_precisions_of_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    assert pick_precision("fp32", CPU) is torch.float32
    assert pick_precision("bf16", CPU) is torch.bfloat16
    for native, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr("petseg.device._cpu_has_bf16", lambda native=native: native)
        assert pick_precision("auto", CPU) is dtype


@pytest.mark.parametrize(("capability", "dtype"), [((7, 5), torch.float16), ((8, 0), torch.bfloat16)])
def test_auto_precision_of_a_gpu(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], dtype: torch.dtype
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert pick_precision("auto", torch.device("cuda")) is dtype
    assert pick_precision("fp16", torch.device("cuda")) is torch.float16


@pytest.mark.parametrize("name", ["cuda", "cuda:0"])
def test_a_gpu_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(EngineError, match=f"--device {name}: PyTorch sees 0 CUDA GPUs.*--device cpu"):
        pick_device(name)


def test_a_second_gpu_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert pick_device("cuda:0") == torch.device("cuda:0")
    with pytest.raises(EngineError, match="cuda:1: PyTorch sees 1"):
        pick_device("cuda:1")


@pytest.mark.parametrize("name", ["gpu", "", "mps", "cuda:x", "meta"])
def test_another_device_is_refused(name: str) -> None:
    with pytest.raises(EngineError, match="--device"):
        pick_device(name)


def test_auto_is_the_gpu_if_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for there, device in ((False, "cpu"), (True, "cuda")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        assert pick_device("auto") == torch.device(device)
    assert pick_device("cpu") == CPU


def test_bf16_trains_with_weights_in_float32(oxford_root: Path, tmp_path: Path) -> None:
    observer = Recorder()
    Trainer(tiny("amp=bf16", "epochs=1"), oxford_root, tmp_path, device=CPU, observer=observer).fit()
    assert all(math.isfinite(loss) for loss in observer.losses)
    best = load(tmp_path / BEST)
    assert best.meta["precision"] == "bfloat16"
    assert {t.dtype for t in best.tensors.values()} == {torch.float32, torch.int64}


@pytest.mark.gpu
@pytest.mark.filterwarnings("default")  # of forks beside CUDA's threads, of TF32: they differ between versions
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU that PyTorch can use")
@pytest.mark.parametrize("amp", ["fp16", "bf16", "fp32"])
def test_training_on_a_gpu_and_going_on(oxford_root: Path, tmp_path: Path, amp: str) -> None:
    device, config, out = torch.device("cuda"), tiny(f"amp={amp}", "epochs=6"), tmp_path / "run"
    stop = Recorder(at_step=at(8, lambda: signal.raise_signal(signal.SIGINT)))
    trainer = Trainer(config, oxford_root, out, device=device, observer=stop)
    assert trainer.scaler.is_enabled() is (amp == "fp16")
    with pytest.raises(KeyboardInterrupt):
        trainer.fit()
    resumed = Trainer(config, oxford_root, out, device=device, resume=True, observer=Recorder())
    assert resumed.scaler.state_dict() == trainer.scaler.state_dict()
    assert same_tensors(resumed.model.state_dict(), trainer.model.state_dict())
    resumed.fit()
    assert resumed.state.history[-1]["loss"] < resumed.state.history[0]["loss"]
    assert load(out / BEST).meta["device"] == torch.cuda.get_device_name(device)
    load_model(out / LAST)


@pytest.mark.gpu
@pytest.mark.filterwarnings("default")  # of forks beside CUDA's threads, of TF32: they differ between versions
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU that PyTorch can use")
def test_an_overflow_in_fp16_skips_the_step_and_scales_less(oxford_root: Path, tmp_path: Path) -> None:
    trainer = Trainer(tiny("amp=fp16", "epochs=1"), oxford_root, tmp_path, device=torch.device("cuda"))
    before = trainer.model.head.weight.detach().clone()
    scale = trainer.scaler.get_scale()
    hook = trainer.model.head.weight.register_hook(lambda grad: grad * math.inf)
    photo, trimap, _ = next(iter(trainer.loader))
    trainer._step(photo, trimap, 1e-2)
    assert torch.equal(trainer.model.head.weight, before)
    assert trainer.scaler.get_scale() == scale / 2
    hook.remove()
    trainer._step(photo, trimap, 1e-2)
    assert not torch.equal(trainer.model.head.weight, before)


# the learning rate


@pytest.mark.parametrize(("restart", "factor"), [(1, 1), (2, 1), (1, 2), (3, 2), (2, 3), (10, 2)])
@pytest.mark.parametrize("per_epoch", [1, 7, 230])
def test_cosine_restarts_is_that_of_torch(restart: int, factor: int, per_epoch: int) -> None:
    config = ScheduleConfig(restart_epochs=restart, restart_factor=factor)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, restart * per_epoch, factor)
    for step in range(12 * per_epoch):
        expected = optimizer.param_groups[0]["lr"]
        assert learning_rate(config, 0.3, step, per_epoch, 12) == pytest.approx(expected, abs=1e-9), f"step {step}"
        optimizer.step()
        scheduler.step()


def rates(name: str, per_epoch: int = 10, epochs: int = 10, **more: Any) -> list[float]:
    config = dataclasses.replace(ScheduleConfig(), name=name, **more)
    return [learning_rate(config, 0.5, step, per_epoch, epochs) for step in range(per_epoch * epochs)]


@pytest.mark.parametrize("warmup", [0.1, 0.3, 0.9])
def test_one_cycle_rises_to_the_peak_and_falls_to_nothing(warmup: float) -> None:
    found = rates("one-cycle", warmup=warmup)
    top = found.index(max(found))
    assert top == round(100 * warmup)
    assert found[top] == pytest.approx(0.5)
    assert found[0] == pytest.approx(0.5 * 0.04)
    assert found[: top + 1] == sorted(found[: top + 1])
    assert found[top:] == sorted(found[top:], reverse=True)
    assert 0 < found[-1] < 0.5 * 0.03


def test_cosine_falls_from_the_peak_to_nothing() -> None:
    found = rates("cosine")
    assert found[0] == 0.5
    assert found[50] == pytest.approx(0.25)
    assert found == sorted(found, reverse=True)
    assert 0 < found[-1] < 0.001


def test_constant_is_constant() -> None:
    assert set(rates("constant")) == {0.5}


# the optimizer and the moving average


def test_only_kernels_decay_and_every_parameter_is_in_one_group(oxford_root: Path, tmp_path: Path) -> None:
    trainer = Trainer(tiny("optimizer.weight_decay=0.25"), oxford_root, tmp_path, device=CPU)
    groups = trainer.optimizer.param_groups
    assert {g["weight_decay"] for g in groups} == {0.25, 0.0}
    placed = {id(p): g["weight_decay"] for g in groups for p in g["params"]}
    assert sum(len(g["params"]) for g in groups) == len(placed)
    for module in trainer.model.modules():
        for name, p in module.named_parameters(recurse=False):
            kernel = isinstance(module, torch.nn.Conv2d) and name == "weight"
            assert placed.pop(id(p)) == (0.25 if kernel else 0.0)
    assert not placed


def test_long_gradients_are_cut_and_short_ones_are_not(oxford_root: Path, tmp_path: Path) -> None:
    def norm(clip: float, folder: str) -> float:
        config = tiny(f"optimizer.clip={clip}", "model.width=2")
        trainer = Trainer(config, oxford_root, tmp_path / folder, device=CPU)
        trainer._step(*next(iter(trainer.loader))[:2], 1e-3)
        return math.sqrt(sum(p.grad.square().sum().item() for p in trainer.model.parameters()))

    free = norm(1e9, "free")
    assert free > 0.01
    assert norm(free / 10, "cut") == pytest.approx(free / 10, rel=1e-3)
    assert norm(free * 10, "short") == pytest.approx(free, rel=1e-6)


def test_the_moving_average_follows_its_rule(oxford_root: Path, tmp_path: Path) -> None:
    """The first update copies, the n-th moves by 1 - min(decay, (1 + n) / (10 + n)); counters are copied."""
    decay, expected, seen = 0.25, {}, []

    def follow(step: int) -> None:
        current = trainer.model.state_dict()
        n = step - 1  # updates before this one
        weight = 1.0 if n == 0 else 1 - min(decay, (1 + n) / (10 + n))
        for name, value in current.items():
            if value.is_floating_point():
                old = expected.get(name, torch.zeros_like(value, dtype=torch.float64))
                expected[name] = old + weight * (value.double() - old)
            else:
                expected[name] = value.clone()
        average = trainer.ema.module.state_dict()
        for name, value in expected.items():
            torch.testing.assert_close(average[name].double(), value.double(), rtol=1e-5, atol=1e-6)
        seen.append(step)

    config = tiny(f"ema={decay}", "model.width=2", "epochs=2")
    trainer = Trainer(config, oxford_root, tmp_path, device=CPU, observer=Recorder(at_step=follow))
    trainer.fit()
    assert seen == list(range(1, 11))
    assert not same_tensors(trainer.model.state_dict(), trainer.ema.module.state_dict())


def test_without_moving_average_the_weights_themselves_are_kept(oxford_root: Path, tmp_path: Path) -> None:
    trainer = Trainer(tiny("ema=0.0", "epochs=1", "model.width=2"), oxford_root, tmp_path, device=CPU)
    trainer.fit()
    assert same_tensors(load(tmp_path / BEST).tensors, trainer.model.state_dict())


def test_the_loss_settings_reach_the_loss(oxford_root: Path, tmp_path: Path) -> None:
    def first_loss(folder: str, *settings: str) -> float:
        config = tiny("model.width=2", *settings)
        trainer = Trainer(config, oxford_root, tmp_path / folder, device=CPU)
        return trainer._step(*next(iter(trainer.loader))[:2], 1e-3).read()[0]

    bce, dice = first_loss("bce", "loss.bce=1", "loss.dice=0"), first_loss("dice", "loss.bce=0", "loss.dice=1")
    assert first_loss("both", "loss.bce=0.25", "loss.dice=2") == pytest.approx(0.25 * bce + 2 * dice, rel=1e-5)
    assert first_loss("border", "loss.bce=1", "loss.dice=0", "data.border_target=1") != pytest.approx(bce, rel=1e-4)


def test_a_full_disk_keeps_the_state_of_the_last_epoch(
    oxford_root: Path, tmp_path: Path, whole: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        observer = Recorder(at_step=at(PER_EPOCH + 1, lambda: patch.setattr(os, "fsync", full)))
        with pytest.raises(OutputError, match="No space left"):
            Trainer(tiny(), oxford_root, tmp_path, device=CPU, observer=observer).fit()
    assert load(tmp_path / LAST).meta["state"]["step"] == PER_EPOCH
    Trainer(tiny(), oxford_root, tmp_path, device=CPU, resume=True).fit()
    assert_same_run(tmp_path, whole)


def test_a_file_system_that_takes_no_more_keeps_the_state_of_the_last_epoch(
    oxford_root: Path, tmp_path: Path, whole: Run
) -> None:
    """The kernel itself refuses, in the middle of a file."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))

    trainer = Trainer(tiny(), oxford_root, tmp_path, device=CPU, observer=Recorder(at_step=at(PER_EPOCH + 1, fill)))
    try:
        with pytest.raises(OutputError, match="cannot be written"):
            trainer.fit()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert {p.name for p in tmp_path.iterdir()} == {BEST, LAST, LOG}
    assert load(tmp_path / LAST).meta["state"]["step"] == PER_EPOCH
    Trainer(tiny(), oxford_root, tmp_path, device=CPU, resume=True).fit()
    assert_same_run(tmp_path, whole)


# photos that are bad


def spoil_photo(root: Path, split: Split, number: int) -> Pair:
    pair = find(root, split, val_fraction=0.1)[number]
    pair.image.write_bytes(pair.image.read_bytes()[:300])
    return pair


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
    assert {m.partition(": ")[0] for m in observer.messages if "pet_" in m} == {"left out"}
    assert all(any(name in m for m in observer.messages) for name in names)
    assert (len(trainer.train_set), len(trainer.good_val_pairs)) == (20, 1)
    assert trainer.state.history[-1]["skipped"] == 3
    for file in (BEST, LAST):
        assert set(load(tmp_path / "out" / file).meta["data"]["skipped_bad"]) == names
    Trainer(config, oxford_copy, tmp_path / "out", device=CPU, resume=True).fit()


def test_a_photo_that_goes_bad_in_the_middle_of_a_run(oxford_copy: Path, tmp_path: Path) -> None:
    """Training photos are in memory; validation reads its files each time."""

    def run(folder: str, *settings: str) -> Trainer:
        good = {pair.image: pair.image.read_bytes() for pair in find(oxford_copy, Split.VAL, val_fraction=0.1)}
        observer = Recorder(at_step=at(PER_EPOCH + 2, lambda: spoil_photo(oxford_copy, Split.VAL, 0)))
        trainer = Trainer(tiny("epochs=2", *settings), oxford_copy, tmp_path / folder, device=CPU, observer=observer)
        try:
            trainer.fit()
        finally:
            for path, data in good.items():
                path.write_bytes(data)
        return trainer

    assert [row["skipped"] for row in run("skip", "data.on_bad=skip").state.history] == [0, 1]
    with pytest.raises(DataError, match="pet_"):
        run("stop")
    assert load(tmp_path / "stop" / LAST).meta["state"]["step"] == PER_EPOCH


def test_a_run_that_a_bad_validation_photo_ended_goes_on_without_it(oxford_copy: Path, tmp_path: Path) -> None:
    out, bad = tmp_path / "out", find(oxford_copy, Split.VAL, val_fraction=0.1)[0]
    spoil = Recorder(at_step=at(PER_EPOCH + 2, lambda: spoil_photo(oxford_copy, Split.VAL, 0)))
    with pytest.raises(DataError, match=bad.name):
        Trainer(tiny(), oxford_copy, out, device=CPU, observer=spoil).fit()
    observer = Recorder()
    Trainer(tiny("data.on_bad=skip"), oxford_copy, out, device=CPU, observer=observer, resume=True).fit()
    assert [row["skipped"] for row in observer.rows] == [1, 1]
    spoil_photo(oxford_copy, Split.TRAIN, 0)  # the order of the photos would be another
    with pytest.raises(TrainingError, match="other photos"):
        Trainer(tiny("data.on_bad=skip"), oxford_copy, out, device=CPU, resume=True)


def test_each_observer_is_told_what_is_left_out_and_once_how_long_an_epoch_is() -> None:
    one, two = Recorder(), Recorder()
    both = Observers(one, two)
    both.begin(7, 4)
    both.left_out("left out: pet")
    both.step(RunState(), 0.5, 0.1)
    assert one.messages == two.messages == ["left out: pet"]
    assert one.begun == two.begun == [(7, 4)]


def test_photos_too_many_for_the_memory_are_kept_in_a_file(
    oxford_root: Path, tmp_path: Path, whole: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = 22 * 32 * 32 * 4
    for room, place in ((2 * size - 1, f"a file in {tmp_path / 'file'}: decoded, they are"), (2 * size, "memory")):
        monkeypatch.setattr("petseg.train.available_memory", lambda room=room: room)
        observer, folder = Recorder(), tmp_path / place.split()[-1 if place == "memory" else 1]
        trainer = Trainer(tiny(), oxford_root, folder, device=CPU, observer=observer)
        trainer.fit()
        assert observer.messages[0].startswith(f"reading 22 photos into {place}")
        assert isinstance(trainer.train_set._photos.base, np.memmap) is (place != "memory")
        assert_same_run(folder, whole)
        assert {path.name for path in folder.iterdir()} == {BEST, LAST, LOG}


def test_no_validation_photo_that_can_be_used_is_refused(oxford_copy: Path, tmp_path: Path) -> None:
    for number in range(2):
        spoil_photo(oxford_copy, Split.VAL, number)
    with pytest.raises(DataError, match="of the 2 validation photos 0 can be used"):
        Trainer(tiny("data.on_bad=skip"), oxford_copy, tmp_path / "out", device=CPU)


def test_validation_photos_without_a_pet_are_refused(oxford_copy: Path, tmp_path: Path) -> None:
    for pair in find(oxford_copy, Split.VAL, val_fraction=0.1):
        Image.fromarray(np.full((64, 64), 2, np.uint8)).save(pair.mask)
    with pytest.raises(DataError, match="of the 2 validation photos 2 can be used, and none of those shows a pet"):
        Trainer(tiny(), oxford_copy, tmp_path / "out", device=CPU)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore"), "smaller --batch than 4"),
        (MemoryError(), "too little memory: use a smaller --batch"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), "or a smaller --size"),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), "smaller --batch than 4"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), "smaller --batch"),
        (RuntimeError("CUDA error: out of memory\nCUDA kernel errors"), "smaller --batch than 4"),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error."), "--set data.workers=0"),
    ],
)
def test_too_little_memory_is_told_with_what_takes_less(
    oxford_root: Path, tmp_path: Path, error: Exception, said: str
) -> None:
    def fails(image: Tensor) -> Tensor:
        raise error

    trainer = Trainer(tiny(), oxford_root, tmp_path / "out", device=CPU)
    trainer.forward = fails
    with pytest.raises(EngineError, match=said) as told:
        trainer.fit()
    assert "\n" not in str(told.value)


def test_another_error_of_the_device_is_left_as_it_is(oxford_root: Path, tmp_path: Path) -> None:
    def fails(image: Tensor) -> Tensor:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    trainer = Trainer(tiny(), oxford_root, tmp_path / "out", device=CPU)
    trainer.forward = fails
    with pytest.raises(RuntimeError, match="illegal memory access"):
        trainer.fit()


def test_weights_that_have_seen_the_validation_photos_are_refused_with_their_own_split(
    oxford_root: Path, folder_root: Path, tmp_path: Path, whole: Run
) -> None:
    best = whole.folder / BEST
    other = tiny("data.split_seed=1")
    with pytest.raises(TrainingError, match=r"trained on 2 of the 2 photos.*data\.val_fraction=0\.1 .*split_seed=0"):
        Trainer(other, oxford_root, tmp_path / "out", device=CPU, init=best)
    Trainer(other, folder_root, tmp_path / "out", device=CPU, init=best)  # photos of which it knows nothing


def test_a_teacher_that_has_seen_the_validation_photos_is_told_of_checkpoint_or_exported(
    oxford_root: Path, tmp_path: Path, whole: Run
) -> None:
    best, exported = whole.folder / BEST, tmp_path / "teacher.onnx"
    export(best, OnnxConfig(output=exported, data=oxford_root, split="test", photos=4))
    for teacher in (best, exported):
        for seed, said in ((1, True), (0, False)):
            observer, config = Recorder(), tiny(f"data.split_seed={seed}")
            Trainer(config, oxford_root, tmp_path / "out", device=CPU, teacher=teacher, observer=observer)
            warned = [m for m in observer.messages if "teacher was trained on 2 of the 2 validation photos" in m]
            assert len(warned) == said, (teacher, seed)


def test_listed_validation_photos_are_on_record_and_stay_known(folder_copy: Path, tmp_path: Path) -> None:
    (folder_copy / "val.txt").write_text("own_01\nown_07\n")
    observer = Recorder()
    trainer = Trainer(tiny("epochs=1"), folder_copy, tmp_path / "run", device=CPU, observer=observer)
    said = "7 photos to train on, 2 for validation, as val.txt lists them, without data.val_fraction"
    assert said in observer.messages
    best = trainer.fit()
    about = load(best).meta["data"]
    assert about["val_names"] == ["own_01", "own_07"]
    assert {"val_fraction", "split_seed"} & about.keys() == set()
    again = Trainer(tiny("epochs=1"), folder_copy, tmp_path / "again", device=CPU, init=best)  # the same are left out
    assert again.meta["data"]["names_sha256"] == about["names_sha256"]
    (folder_copy / "val.txt").write_text("own_07\nown_08\n")
    with pytest.raises(TrainingError, match=r"trained on 1 of the 2 photos.* list in val\.txt the photos that it was"):
        Trainer(tiny("epochs=1"), folder_copy, tmp_path / "other", device=CPU, init=best)
    with pytest.raises(TrainingError, match="trained on other photos than these"):
        Trainer(tiny("epochs=1"), folder_copy, tmp_path / "run", device=CPU, resume=True)
    (folder_copy / "val.txt").unlink()
    with pytest.raises(TrainingError, match=r"list in val\.txt"):
        Trainer(tiny("data.val_fraction=0.5"), folder_copy, tmp_path / "other", device=CPU, init=best)


def test_weights_of_a_share_are_refused_where_a_listing_divides(folder_copy: Path, tmp_path: Path) -> None:
    """Another share, the usual remedy, would have no effect."""
    best = Trainer(tiny("epochs=1"), folder_copy, tmp_path / "run", device=CPU).fit()
    names = {pair.name for pair in find(folder_copy, Split.TRAIN, val_fraction=0.1)}
    (folder_copy / "val.txt").write_text(min(names))
    with pytest.raises(TrainingError, match=r"trained on 1 of the 1 photos.* list in val\.txt") as told:
        Trainer(tiny("epochs=1"), folder_copy, tmp_path / "other", device=CPU, init=best)
    assert "--set" not in str(told.value)


@pytest.mark.parametrize(("empty", "warned"), [(0, False), (1, True)])
def test_too_few_validation_photos_are_warned_of(oxford_copy: Path, tmp_path: Path, empty: int, warned: bool) -> None:
    config = tiny(f"data.val_fraction={FEW / 24}", "batch=2")
    for pair in find(oxford_copy, Split.VAL, val_fraction=FEW / 24)[:empty]:
        Image.fromarray(np.full((64, 64), 2, np.uint8)).save(pair.mask)
    observer = Recorder()
    trainer = Trainer(config, oxford_copy, tmp_path / "out", device=CPU, observer=observer)
    said = [f"{FEW - 1} validation photos with a pet are few"] if warned else []
    assert [message.partition(" to ")[0] for message in trainer.warnings] == said
    assert [m for m in observer.messages if m.startswith("warning: ")] == [f"warning: {w}" for w in trainer.warnings]


def test_a_resumed_run_does_not_read_the_weights_that_it_began_with(
    oxford_root: Path, tmp_path: Path, whole: Run
) -> None:
    folder = shutil.copytree(whole.folder, tmp_path / "out")
    observer, gone = Recorder(), tmp_path / "gone.safetensors"
    Trainer(tiny(), oxford_root, folder, device=CPU, init=gone, resume=True, observer=observer)
    assert any(f"{gone} is not read" in message for message in observer.messages)


def test_a_batch_with_a_nan_stops_the_run_and_names_its_photos(
    oxford_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoilt(image: Tensor) -> Tensor:
        return normalize(image).index_fill(0, torch.tensor([2]), math.nan)

    spoil = at(PER_EPOCH + 1, lambda: monkeypatch.setattr("petseg.train.normalize", spoilt))
    trainer = Trainer(tiny(), oxford_root, tmp_path, device=CPU, observer=Recorder(at_step=spoil))
    with pytest.raises(NonFiniteLoss, match="epoch 2, batch 2") as caught:
        trainer.fit()
    assert f"({', '.join(names_of_batch(trainer, 1, 1))})" in str(caught.value)
    assert load(tmp_path / LAST).meta["state"]["step"] == PER_EPOCH


def test_a_scaler_that_shrinks_for_ever_stops_the_run(oxford_root: Path, tmp_path: Path) -> None:
    """fp16 is for GPUs, but the scaler works on a CPU: what it does about gradients that always overflow."""
    trainer = Trainer(tiny("epochs=20"), oxford_root, tmp_path, device=CPU)
    trainer.scaler = torch.amp.GradScaler("cpu", enabled=True)
    trainer.model.head.weight.register_hook(lambda grad: grad * math.inf)
    before = trainer.model.head.weight.detach().clone()
    with pytest.raises(
        NonFiniteLoss, match=r"overflow in fp16 however small the scale \(now 6.1e-05\) .*pet_.*amp=bf16"
    ):
        trainer.fit()
    assert trainer.state.step == 29  # 2 ** 16 halved thirty times
    assert torch.equal(trainer.model.head.weight, before)


# stopping early


def test_a_run_without_progress_stops_early_and_resumed_stays_stopped(oxford_root: Path, tmp_path: Path) -> None:
    config, observer = tiny("epochs=9", "early_stop=2", "optimizer.lr=1e-9", "ema=0", "model.width=2"), Recorder()
    trainer = Trainer(config, oxford_root, tmp_path, device=CPU, observer=observer)
    trainer.fit()
    ious = [row["val_iou"] for row in trainer.state.history]
    assert trainer.stopped_early
    assert len(ious) < 9
    assert max(ious[:-2]) >= max(ious[-2:])
    assert "stopped: no better validation IoU for 2 epochs" in observer.messages
    resumed = Trainer(config, oxford_root, tmp_path, device=CPU, resume=True)
    resumed.fit()
    assert resumed.state.history == trainer.state.history


@pytest.mark.parametrize(
    ("patience", "ious", "stops"),
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
def test_when_a_run_stops_early(
    oxford_root: Path, whole: Run, monkeypatch: pytest.MonkeyPatch, patience: int, ious: list[float], stops: bool
) -> None:
    monkeypatch.setattr(whole.trainer, "config", tiny(f"early_stop={patience}"))
    monkeypatch.setattr(whole.trainer, "state", RunState(history=[{"val_iou": iou} for iou in ious]))
    assert whole.trainer.stopped_early is stops


# speed


def test_a_compiled_network_takes_the_same_steps(
    oxford_root: Path, tmp_path: Path, whole: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the code generator, which takes minutes: that the compiled network is the one that learns."""
    made = []

    def eager(model: torch.nn.Module) -> Any:
        made.append(model)
        return lambda image: model(image)

    monkeypatch.setattr(torch, "compile", eager)
    trainer = Trainer(tiny("compile=true"), oxford_root, tmp_path, device=CPU)
    trainer.fit()
    assert made == [trainer.model]
    assert_same_run(tmp_path, whole)


def test_a_network_that_is_really_compiled_goes_on_and_ends_near_the_other(
    oxford_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of torch.compile but its code generator, which takes minutes."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    settings, compiled = ("amp=bf16", "model.width=2", "epochs=2"), tmp_path / "compiled"
    plain = Trainer(tiny(*settings), oxford_root, tmp_path / "plain", device=CPU)
    plain.fit()
    stop = Recorder(at_step=at(7, lambda: signal.raise_signal(signal.SIGINT)))
    before = dict(torch._dynamo.utils.counters["stats"])
    with pytest.raises(KeyboardInterrupt):
        Trainer(tiny("compile=true", *settings), oxford_root, compiled, device=CPU, observer=stop).fit()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > before.get("unique_graphs", 0)
    Trainer(tiny("compile=true", *settings), oxford_root, compiled, device=CPU, resume=True).fit()
    for name in (BEST, LAST):
        found, expected = load(compiled / name).tensors, load(tmp_path / "plain" / name).tensors
        assert found.keys() == expected.keys()
        for key, tensor in expected.items():
            if not key.startswith("optimizer"):
                torch.testing.assert_close(found[key], tensor, rtol=0.05, atol=0.02, msg=key)
    assert [row["loss"] for row in load(compiled / LAST).meta["state"]["history"]] == pytest.approx(
        [row["loss"] for row in plain.state.history], abs=5e-3
    )


@pytest.mark.gpu
@pytest.mark.filterwarnings("default")  # of forks beside CUDA's threads, of TF32: they differ between versions
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU that PyTorch can use")
def test_a_network_compiled_for_a_gpu_learns(oxford_root: Path, tmp_path: Path) -> None:
    trainer = Trainer(tiny("compile=true"), oxford_root, tmp_path, device=torch.device("cuda"))
    trainer.fit()
    assert trainer.state.history[-1]["loss"] < trainer.state.history[0]["loss"]
    assert trainer.state.peak_memory > 0


def test_what_the_observer_takes_is_no_time_of_the_steps(oxford_root: Path, tmp_path: Path) -> None:
    observer = Recorder(at_step=lambda step: time.sleep(0.4))
    trainer = Trainer(tiny("epochs=1", "model.width=2"), oxford_root, tmp_path, device=CPU, observer=observer)
    trainer.fit()
    (row,) = trainer.state.history
    assert row["elapsed"] > 2
    assert 0 < row["data_wait"] * row["seconds"] < row["seconds"] < 1.6


def test_the_log_has_the_memory_of_the_gpu(
    whole: Run, oxford_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert [row["gpu_memory"] for row in whole.observer.rows] == [0, 0, 0]
    trainer = Trainer(tiny("epochs=1", "model.width=2"), oxford_root, tmp_path, device=CPU)
    validate = trainer._measure_and_keep

    def on_a_gpu() -> float:
        trainer.device = torch.device("cuda")
        return validate()

    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 12345)
    monkeypatch.setattr(trainer, "_measure_and_keep", on_a_gpu)
    monkeypatch.setattr(trainer, "_ema_run", lambda: torch_run(trainer.ema.module, CPU))
    trainer.fit()
    with (tmp_path / LOG).open(newline="") as file:
        assert [row["gpu_memory"] for row in csv.DictReader(file)] == ["12345"]
    assert load(tmp_path / LAST).meta["state"]["peak_memory"] == 12345


def test_the_time_of_a_run_goes_on_where_it_was_left(oxford_root: Path, tmp_path: Path) -> None:
    config = tiny("model.width=2")
    stop = Recorder(at_step=at(7, lambda: signal.raise_signal(signal.SIGINT)))
    with pytest.raises(KeyboardInterrupt):
        Trainer(config, oxford_root, tmp_path, device=CPU, observer=stop).fit()
    before = load(tmp_path / LAST).meta["state"]["elapsed"]
    start = time.perf_counter()
    resumed = Trainer(config, oxford_root, tmp_path, device=CPU, resume=True)
    resumed.fit()
    times = [row["elapsed"] for row in resumed.state.history]
    assert 0 < times[0] < before < times[1] < times[2] <= before + time.perf_counter() - start


def test_a_log_of_an_older_version_goes_on_with_more_columns(oxford_root: Path, tmp_path: Path, whole: Run) -> None:
    with pytest.raises(Crash):
        Trainer(tiny(), oxford_root, tmp_path, device=CPU, observer=Recorder(at_step=at(PER_EPOCH + 1, crash))).fit()
    last = load(tmp_path / LAST)
    del last.meta["state"]["history"][0]["skipped"], last.meta["state"]["elapsed"], last.meta["state"]["peak_memory"]
    row = last.meta["state"]["history"][0]
    mean = row["val_mean_iou_border_ignored"] = row.pop("val_mean_iou_border_ignored_at_0.5")
    save_checkpoint(tmp_path / LAST, last.tensors, last.meta)
    Trainer(tiny(), oxford_root, tmp_path, device=CPU, resume=True).fit()
    with (tmp_path / LOG).open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["skipped"] for row in rows] == ["", "0", "0"]
    assert "val_mean_iou_border_ignored" not in rows[0]
    assert float(rows[0]["val_mean_iou_border_ignored_at_0.5"]) == mean
    assert same_tensors(load(tmp_path / LAST).tensors, whole.last.tensors)
