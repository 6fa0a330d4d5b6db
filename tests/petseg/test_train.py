"""The training loop: what a run does, and that a stopped, killed or starved run is the same once resumed."""

from __future__ import annotations

import csv
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
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from petseg import checkpoint
from petseg.checkpoint import load, load_model, save_checkpoint
from petseg.config import to_dict
from petseg.data import Split, find
from petseg.distributed import Ranks
from petseg.evaluate import Evaluation, evaluate
from petseg.log import LOG, Row
from petseg.metrics import Border, best_threshold
from petseg.model import normalize
from petseg.reference import torch_run
from petseg.run_photos import _leave_signals_to_the_parent
from petseg.run_state import BEST, LAST
from petseg.schedule import learning_rate
from petseg.train import Trainer
from petseg.train_set import EpochSampler
from petseg_runtime.errors import (
    CheckpointError,
    DataError,
    EngineError,
    ModelError,
    NonFiniteLoss,
    OutputError,
    TrainingError,
    UsageError,
)
from petseg_runtime.signals import EXITS
from petseg_runtime.spec import lowest_pet
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
    spoil_photo,
    tiny,
    without_times,
)

pytestmark = pytest.mark.usefixtures("quick_disk")


# an uninterrupted run


def test_the_network_learns(whole: Run) -> None:
    rows = whole.observer.rows
    assert [row.epoch for row in rows] == [1, 2, 3]
    assert [row.step for row in rows] == [5, 10, 15]
    assert rows[-1].loss < 0.95 * rows[0].loss
    assert rows[0].loss == pytest.approx(sum(whole.observer.losses[:5]) / 5)
    assert rows[2].loss == pytest.approx(sum(whole.observer.losses[10:]) / 5)
    assert max(row.val_iou for row in rows) > 0.3
    assert all(0 <= row.val_iou <= row.val_dice <= 1 for row in rows)
    assert whole.observer.rates == [
        learning_rate(whole.trainer.config.schedule, 1e-2, step, PER_EPOCH, EPOCHS) for step in range(15)
    ]
    assert {group["lr"] for group in whole.trainer.optimizer.param_groups} == {whole.observer.rates[-1]}
    assert whole.observer.begun == [(PER_EPOCH, 4)]


def test_the_best_checkpoint_is_the_model_of_the_best_epoch(whole: Run, oxford_root: Path) -> None:
    model, best = load_model(whole.folder / BEST)
    ious = [row.val_iou for row in whole.observer.rows]
    assert best.meta["kind"] == "model"
    assert best.meta["epoch"] == 1 + ious.index(max(ious))
    row = whole.observer.rows[best.meta["epoch"] - 1]
    assert best.meta["validation"] == row.as_dict()
    result = evaluate(torch_run(model), whole.trainer.photos.val, 32, 32)
    assert result.counts(row.val_threshold).iou == row.val_iou
    assert best.meta["spec"]["threshold"] == row.val_threshold == best_threshold(result.total)
    assert best.meta["spec"]["cutout_threshold"] == best_threshold(result.total, Border.PET)
    assert (best.meta["spec"]["height"], best.meta["spec"]["width"]) == (32, 32)
    assert best.meta["spec"]["certain_share"] is None, "the built-in model's rule of pets is not this one's"
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
    trainer = Trainer(tiny("epochs=1", "model.width=2"), oxford_root, tmp_path, device=CPU)
    trainer.fit()
    spec = load(tmp_path / BEST).meta["spec"]
    assert lowest_pet(spec["threshold"]) == lowest_pet(spec["cutout_threshold"]) == byte
    result = evaluate(torch_run(load_model(tmp_path / BEST)[0]), trainer.photos.val, 32, 32)
    at_a_half = result.image_ious(0.5, Border.IGNORED).mean()
    assert trainer.best.val_mean_iou_border_ignored == at_a_half, "comparable between epochs, whatever the threshold"


def test_the_log_has_a_line_for_each_epoch(whole: Run) -> None:
    with (whole.folder / LOG).open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [{k: float(v) for k, v in line.items()} for line in lines] == [row.as_dict() for row in whole.observer.rows]
    assert {p.name for p in whole.folder.iterdir()} == {BEST, LAST, LOG}


def test_the_beginning_is_announced(whole: Run) -> None:
    said = "\n".join(whole.observer.messages)
    parameters = sum(p.numel() for p in whole.trainer.model.parameters())
    assert f"width 4, {parameters:,} parameters, float32 on cpu\n" in said
    assert "22 photos to train on, 2 for validation" in said


def test_the_same_seed_is_the_same_run_and_another_is_not(oxford_root: Path, tmp_path: Path, whole: Run) -> None:
    torch.manual_seed(987)  # the global generator must not matter
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


def test_workers_without_shared_memory_are_an_error(
    oxford_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where /dev/shm is full: in a container, it has 64 MB."""

    def lock() -> None:
        raise FileNotFoundError(2, "No such file or directory")

    trainer = Trainer(tiny("data.workers=1"), oxford_root, tmp_path, device=CPU)
    monkeypatch.setattr(multiprocessing, "Lock", lock)
    with pytest.raises(EngineError, match=r"need shared memory \(No such file.*--set data.workers=0\)"):
        trainer.fit()


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_workers_whose_shared_memory_is_full_are_an_error_and_end(
    oxford_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A limit for the size of files, in the worker only, does what a full /dev/shm does: PyTorch raises its error."""

    def limit(worker: int) -> None:
        _leave_signals_to_the_parent(worker)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))

    before = multiprocessing.active_children()
    monkeypatch.setattr("petseg.run_photos._leave_signals_to_the_parent", limit)
    trainer = Trainer(tiny("data.workers=1"), oxford_root, tmp_path, device=CPU)
    with pytest.raises(EngineError, match=r"^dataloader workers ran out of shared memory \(.*File too large") as told:
        trainer.fit()
    assert "\n" not in str(told.value)
    assert multiprocessing.active_children() == before, "Python would wait for them at exit, while the error is kept"


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
    assert "2 dataloader workers augment them" in observer.messages
    with pytest.raises(Crash):
        trainer.fit()
    assert {len(pids) for pids in seen} == {2}
    assert len(set.union(*seen)) == 2, "others in another epoch"
    assert {child.pid for child in multiprocessing.active_children()} == before, "they are deaf to SIGTERM"


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_stopped_run_with_workers_continues(oxford_root: Path, tmp_path: Path, whole: Run) -> None:
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
        (9, signal.SIGHUP),
        (PER_EPOCH, signal.SIGINT),  # an epoch's last step, before its validation
        (EPOCHS * PER_EPOCH, signal.SIGINT),
    ],
)
def test_a_run_that_was_stopped_and_resumed_is_the_same_run(
    oxford_root: Path, tmp_path: Path, whole: Run, step: int, number: int
) -> None:
    before = [signal.getsignal(n) for n in EXITS]
    stop = Recorder(at_step=at(step, lambda: signal.raise_signal(number)))
    trainer = Trainer(tiny(), oxford_root, tmp_path, device=CPU, observer=stop)
    with pytest.raises(KeyboardInterrupt):
        trainer.fit()
    assert [signal.getsignal(n) for n in EXITS] == before
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
def test_a_run_that_is_stopped_in_a_validation_resumes_there(
    oxford_root: Path, tmp_path: Path, whole: Run, monkeypatch: pytest.MonkeyPatch, epoch: int
) -> None:
    """A validation may take longer than a scheduler waits before it kills the process."""
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


#: A second signal arrives while the handler of the first is about to wake a waiter.
NESTED = """
import signal, threading, torch
from pathlib import Path
from petseg.config import TrainConfig, from_dict
from petseg.observers import Observer
from petseg.train import Trainer
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
        ("fp32", torch.bfloat16, "computing in float32, as so far; this device would choose bfloat16"),
        ("bf16", torch.float32, "computing in float32 from here on (this device does not support bfloat16, used so"),
    ],
)
def test_a_run_continues_in_its_first_precision_if_the_device_supports_it(
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


@pytest.mark.parametrize("step", [6, 10])
def test_a_run_that_crashed_continues_from_the_last_epoch(
    oxford_root: Path, tmp_path: Path, whole: Run, step: int
) -> None:
    with pytest.raises(Crash):
        Trainer(tiny(), oxford_root, tmp_path, device=CPU, observer=Recorder(at_step=at(step, crash))).fit()
    assert load(tmp_path / LAST).meta["state"]["step"] == PER_EPOCH
    Trainer(tiny(), oxford_root, tmp_path, device=CPU, resume=True).fit()
    assert_same_run(tmp_path, whole)


@pytest.mark.parametrize("failing", [BEST, LAST, LOG])
def test_a_run_that_crashed_while_writing_continues(
    oxford_root: Path, tmp_path: Path, whole: Run, failing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed while writing after the second epoch: whatever is on disk by then must lead to the same result."""
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
        # width 4 improves in every epoch here, so all three files are written each time
        try:
            Trainer(tiny(), oxford_root, folder, device=CPU, observer=observer).fit()
            assert failing == BEST, "the run should have died"
        except Crash:
            pass
    Trainer(tiny(), oxford_root, folder, device=CPU, resume=True).fit()
    assert_same_run(folder, whole)
    assert {p.name for p in folder.iterdir()} == {BEST, LAST, LOG}


def test_a_run_that_crashed_while_writing_its_first_best_checkpoint_continues(
    oxford_root: Path, tmp_path: Path, whole: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = checkpoint.save_checkpoint

    def dies(path: Path, *what: Any) -> str:
        if path.name == BEST:
            path.write_bytes(b"of this run, which is not to be taken for another's")
            raise Crash
        return write(path, *what)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_checkpoint", dies)
        with pytest.raises(Crash):
            Trainer(tiny(), oxford_root, tmp_path, device=CPU).fit()
    Trainer(tiny(), oxford_root, tmp_path, device=CPU, resume=True).fit()
    assert_same_run(tmp_path, whole)


# losses that are read after the next step was issued, as on a GPU


def late(trainer: Trainer) -> Trainer:
    trainer.late = True
    return trainer


def test_only_on_a_gpu_the_next_step_is_issued_before_the_last_one_is_read(oxford_root: Path, tmp_path: Path) -> None:
    def order(folder: str, behind: bool) -> list[str]:
        said: list[str] = []
        observer = Recorder(lambda step: said.append("read"), lambda epoch: said.append("validated"))
        trainer = Trainer(tiny("epochs=2"), oxford_root, tmp_path / folder, device=CPU, observer=observer)
        trainer.late |= behind
        forward = trainer.forward

        def told(image: Tensor) -> Tensor:
            said.append("told")
            return forward(image)

        trainer.forward = told
        trainer.fit()
        return said

    assert order("cpu", behind=False) == ([*["told", "read"] * 5, "validated"]) * 2
    assert order("gpu", behind=True) == (["told", *["told", "read"] * 4, "read", "validated"]) * 2


def test_a_late_run_is_the_same_run(oxford_root: Path, tmp_path: Path, whole: Run) -> None:
    observer = Recorder()
    late(Trainer(tiny(), oxford_root, tmp_path, device=CPU, observer=observer)).fit()
    assert observer.losses == whole.observer.losses
    assert observer.rates == whole.observer.rates
    assert without_times([row.as_dict() for row in observer.rows]) == without_times(
        [row.as_dict() for row in whole.observer.rows]
    )
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
    oxford_root: Path, tmp_path: Path, batch: int
) -> None:
    trainer = late(Trainer(tiny(), oxford_root, tmp_path, device=CPU))
    forward, told = trainer.forward, []

    def spoil(image: Tensor) -> Tensor:
        told.append(len(told) + 1)
        return forward(image * math.nan if told[-1] == PER_EPOCH + batch else image)

    trainer.forward = spoil
    with pytest.raises(NonFiniteLoss, match=f"loss nan.*epoch 2, batch {batch} ") as caught:
        trainer.fit()
    assert f"({', '.join(names_of_batch(trainer, 1, batch - 1))})" in str(caught.value)
    assert len(told) == min(PER_EPOCH + batch + 1, 2 * PER_EPOCH)
    last = load(tmp_path / LAST)
    assert last.meta["state"]["step"] == PER_EPOCH
    assert load(tmp_path / BEST).meta["epoch"] == 1
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters()), "the weights had moved"


class Waits(TorchDispatchMode):
    """Counts what would make the CPU wait for a GPU: reading numbers back."""

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
from petseg.observers import Observer
from petseg.train import Trainer
torch.set_num_threads({threads})
class Dies(Observer):
    def step(self, state, loss, lr):
        if state.step == 8:
            os._exit(9)
config = from_dict(TrainConfig, {config!r})
Trainer(config, Path({root!r}), Path({out!r}), device=torch.device("cpu"), observer=Dies()).fit()
"""


def test_a_run_that_was_killed_in_another_process_continues(oxford_root: Path, tmp_path: Path, whole: Run) -> None:
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
from petseg.run_state import LAST
from petseg.train import Trainer
torch.set_num_threads({threads})
config, root, out, lot = from_dict(TrainConfig, {config!r}), Path({root!r}), Path({out!r}), random.Random({seed})
kills = 0
for number in range(1, 9):
    child = os.fork()
    if child == 0:
        Trainer(config, root, out, device=torch.device("cpu"), resume=(out / LAST).exists()).fit()
        os._exit(0)
    time.sleep(lot.uniform(0, 0.15 * number))  # later each time, so that fast and slow machines cover the whole run
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


#: Locks a run's folder until it is killed.
HOLDS = "import sys, time; from pathlib import Path; from petseg.lock import *; unlock = lock_folder(Path(sys.argv[1]))"


@pytest.mark.parametrize("resume", [True, False])
def test_a_folder_that_another_process_trains_into_is_rejected_and_left_alone(
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


def test_a_strided_run_that_was_interrupted_can_be_resumed(oxford_root: Path, tmp_path: Path) -> None:
    settings = tiny("model.stem=strided", "model.levels=[1,2,3,4]", "epochs=1")
    stopping = Recorder(at(2, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    with pytest.raises(KeyboardInterrupt):
        Trainer(settings, oxford_root, tmp_path, device=CPU, observer=stopping).fit()
    Trainer(settings, oxford_root, tmp_path, device=CPU, resume=True).fit()
    assert load(tmp_path / LAST).meta["state"]["step"] == PER_EPOCH


# NaN and infinity


def names_of_batch(trainer: Trainer, epoch: int, batch: int) -> list[str]:
    sampler = EpochSampler(len(trainer.photos.train), trainer.config.batch, trainer.config.seed)
    sampler.epoch = epoch
    return [trainer.photos.train.names[draw % len(trainer.photos.train)] for draw in list(sampler)[batch]]


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
    # The remedy in the message works.
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


# precision


@pytest.mark.parametrize(
    ("given", "settings", "error", "said"),
    [
        ({"init": "gone.safetensors"}, [], CheckpointError, r"gone\.safetensors: no such file"),
        ({"init": "text.safetensors"}, [], CheckpointError, r"text\.safetensors: not a readable"),
        ({"teacher": "gone.safetensors"}, [], CheckpointError, r"gone\.safetensors: no such file"),
        ({"teacher": "last.safetensors"}, [], CheckpointError, r"last\.safetensors: the state of a run, not a model"),
        ({"teacher": "gone.onnx"}, [], ModelError, r"gone\.onnx"),
        ({"teacher": "text.onnx"}, [], ModelError, r"text\.onnx"),
        ({"resume": True}, ["seed=1"], TrainingError, "other settings: seed was 0, now 1"),
        ({"ranks": Ranks(0, 2, 2)}, ["batch=5"], UsageError, "batch is 5; it must be a multiple of the 2 processes"),
        ({}, ["batch=23"], DataError, "22 photos to train on, but a batch takes 23; use a smaller"),
    ],
)
def test_a_mistake_in_the_arguments_is_reported_before_photos_are_read(
    oxford_root: Path,
    tmp_path: Path,
    whole: Run,
    monkeypatch: pytest.MonkeyPatch,
    given: dict[str, Any],
    settings: list[str],
    error: type[Exception],
    said: str,
) -> None:
    for name in ("text.safetensors", "text.onnx"):
        (tmp_path / name).write_text("no model")
    shutil.copy(whole.folder / LAST, tmp_path / LAST)
    folder = whole.folder if "resume" in given else tmp_path / "out"
    options = {name: tmp_path / value if isinstance(value, str) else value for name, value in given.items()}
    monkeypatch.setattr("petseg.data._read_photo", lambda *_: pytest.fail("a photo was read"))
    with pytest.raises(error, match=said):
        Trainer(tiny(*settings), oxford_root, folder, device=CPU, **options)


def test_fp16_on_a_cpu_is_rejected(oxford_root: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="fp16 on a CPU"):
        Trainer(tiny("amp=fp16"), oxford_root, tmp_path, device=CPU)


def test_a_resumed_run_whose_precision_is_not_supported_is_not_told_to_change_it(
    oxford_root: Path, tmp_path: Path, whole: Run
) -> None:
    """It would then be rejected for its other settings."""
    last = whole.last
    config = {**last.meta["config"], "amp": "fp16"}  # of a run on a GPU
    save_checkpoint(tmp_path / LAST, last.tensors, {**last.meta, "config": config})
    said = rf"^amp is fp16 on a CPU.*; a resumed run keeps its amp: resume on .* --init {tmp_path / LAST}$"
    with pytest.raises(UsageError, match=said) as caught:
        Trainer(tiny("amp=fp16"), oxford_root, tmp_path, device=CPU, resume=True)
    assert "use bf16" not in str(caught.value)
    with pytest.raises(TrainingError, match="other settings: amp was 'fp16', now 'fp32'"):
        Trainer(tiny(), oxford_root, tmp_path, device=CPU, resume=True)
    with pytest.raises(TrainingError, match="other settings: amp was 'fp32', now 'fp16'"):
        Trainer(tiny("amp=fp16"), oxford_root, whole.folder, device=CPU, resume=True)


def test_bf16_trains_with_weights_in_float32(oxford_root: Path, tmp_path: Path) -> None:
    observer = Recorder()
    Trainer(tiny("amp=bf16", "epochs=1"), oxford_root, tmp_path, device=CPU, observer=observer).fit()
    assert all(math.isfinite(loss) for loss in observer.losses)
    best = load(tmp_path / BEST)
    assert best.meta["precision"] == "bfloat16"
    assert {t.dtype for t in best.tensors.values()} == {torch.float32, torch.int64}


def test_a_gradient_is_measured_and_clipped_at_its_true_size(oxford_root: Path, tmp_path: Path) -> None:
    """fp16 is for GPUs, but the GradScaler also works on a CPU."""
    norms = []
    for scaled in (False, True):
        trainer = Trainer(tiny("model.width=2"), oxford_root, tmp_path, device=CPU)
        trainer.scaler = torch.amp.GradScaler("cpu", enabled=scaled)
        norms.append(trainer._step(*next(iter(trainer.loader))[:2], 1e-3).read()[1])
        trainer.unlock()
    assert norms[1] == pytest.approx(norms[0], rel=1e-3)


def test_a_run_in_fp16_continues_with_its_scale(
    oxford_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU, which is slow in fp16 but computes it."""
    monkeypatch.setattr("petseg.train.pick_precision", lambda amp, device: torch.float16)
    config = tiny("amp=fp16", "epochs=1", "model.width=2")

    def stop() -> None:
        trainer.scaler.update(512.0)
        signal.raise_signal(signal.SIGINT)

    trainer = Trainer(config, oxford_root, tmp_path, device=CPU, observer=Recorder(at_step=at(3, stop)))
    with pytest.raises(KeyboardInterrupt):
        trainer.fit()
    assert Trainer(config, oxford_root, tmp_path, device=CPU, resume=True).scaler.get_scale() == 512


@pytest.mark.gpu
@pytest.mark.filterwarnings("default")  # about forks beside CUDA's threads and about TF32; they differ between versions
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU that PyTorch can use")
@pytest.mark.parametrize("amp", ["fp16", "auto", "fp32"])
def test_training_on_a_gpu_and_resuming(oxford_root: Path, tmp_path: Path, amp: str) -> None:
    device, config, out = torch.device("cuda"), tiny(f"amp={amp}", "epochs=6"), tmp_path / "run"
    stop = Recorder(at_step=at(8, lambda: signal.raise_signal(signal.SIGINT)))
    trainer = Trainer(config, oxford_root, out, device=device, observer=stop)
    assert trainer.scaler.is_enabled() is (trainer.dtype is torch.float16)
    with pytest.raises(KeyboardInterrupt):
        trainer.fit()
    resumed = Trainer(config, oxford_root, out, device=device, resume=True, observer=Recorder())
    assert resumed.scaler.state_dict() == trainer.scaler.state_dict()
    assert same_tensors(resumed.model.state_dict(), trainer.model.state_dict())
    resumed.fit()
    assert resumed.state.history[-1].loss < resumed.state.history[0].loss
    assert load(out / BEST).meta["device"] == torch.cuda.get_device_name(device)
    load_model(out / LAST)


@pytest.mark.gpu
@pytest.mark.filterwarnings("default")  # about forks beside CUDA's threads and about TF32; they differ between versions
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


# the optimizer and the EMA


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


def test_long_gradients_are_clipped_and_short_ones_are_not(oxford_root: Path, tmp_path: Path) -> None:
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
    only = ("loss.bce=0", "loss.dice=1", "loss.dice_form=semimetric")
    assert first_loss("semimetric", *only) == pytest.approx(dice, rel=1e-5), "the targets are hard"
    soft = first_loss("soft", "loss.bce=0", "loss.dice=1", "data.border_target=0.5")
    assert first_loss("semimetric soft", *only, "data.border_target=0.5") != pytest.approx(soft, rel=1e-3)


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
    """The kernel rejects a write in the middle of a file."""
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


# bad photos


def test_a_photo_that_goes_bad_in_the_middle_of_a_run(oxford_copy: Path, tmp_path: Path) -> None:
    """Training photos are in memory; every validation reads its files."""

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

    assert [row.skipped for row in run("skip", "data.on_bad=skip").state.history] == [0, 1]
    with pytest.raises(DataError, match="pet_"):
        run("stop")
    assert load(tmp_path / "stop" / LAST).meta["state"]["step"] == PER_EPOCH


def test_one_of_several_processes_validates_no_more_at_a_time_than_it_trains_on(
    oxford_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = Trainer(tiny(), oxford_root, tmp_path, device=CPU)
    monkeypatch.setattr("petseg.train.evaluate", lambda *_, **options: options["batch"])
    assert trainer._evaluate_ema() == 4
    trainer.ranks = Ranks(rank=0, size=2)
    assert trainer._evaluate_ema() == 2


def test_a_high_final_rate_is_warned_about(oxford_root: Path, tmp_path: Path) -> None:
    said = "the learning rate ends at 85 % of its peak, because no schedule period ends with epoch 3"
    for settings, warned in (((), True), (("schedule.restart_epochs=3",), False)):
        observer = Recorder()
        trainer = Trainer(tiny(*settings), oxford_root, tmp_path, device=CPU, observer=observer)
        assert any(warning.startswith(said) for warning in trainer.warnings) == warned
        assert any(message.startswith(f"warning: {said}") for message in observer.messages) == warned


def test_a_run_ended_by_a_bad_validation_photo_can_be_resumed_without_it(oxford_copy: Path, tmp_path: Path) -> None:
    out, bad = tmp_path / "out", find(oxford_copy, Split.VAL, val_fraction=0.1)[0]
    spoil = Recorder(at_step=at(PER_EPOCH + 2, lambda: spoil_photo(oxford_copy, Split.VAL, 0)))
    with pytest.raises(DataError, match=bad.name):
        Trainer(tiny(), oxford_copy, out, device=CPU, observer=spoil).fit()
    observer = Recorder()
    Trainer(tiny("data.on_bad=skip"), oxford_copy, out, device=CPU, observer=observer, resume=True).fit()
    assert [row.skipped for row in observer.rows] == [1, 1]
    spoil_photo(oxford_copy, Split.TRAIN, 0)  # the order of the photos would change
    with pytest.raises(TrainingError, match="other photos"):
        Trainer(tiny("data.on_bad=skip"), oxford_copy, out, device=CPU, resume=True)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore"), "smaller --batch than 4"),
        (MemoryError(), "out of memory: use a smaller --batch"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), "or a smaller --size"),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), "smaller --batch than 4"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), "smaller --batch"),
        (RuntimeError("CUDA error: out of memory\nCUDA kernel errors"), "smaller --batch than 4"),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error."), "--set data.workers=0"),
    ],
)
def test_out_of_memory_is_reported_with_a_remedy(
    oxford_root: Path, tmp_path: Path, error: Exception, said: str
) -> None:
    def fails(image: Tensor) -> Tensor:
        raise error

    trainer = Trainer(tiny(), oxford_root, tmp_path / "out", device=CPU)
    trainer.forward = fails
    with pytest.raises(EngineError, match=said) as told:
        trainer.fit()
    assert "\n" not in str(told.value)


def test_a_network_too_wide_for_the_memory_is_reported_with_a_remedy(
    oxford_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> NoReturn:
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried")

    monkeypatch.setattr("petseg.train.first_weights", fails)
    with pytest.raises(EngineError, match="out of memory: free some memory on the device, or use a network of a sm"):
        Trainer(tiny(), oxford_root, tmp_path / "out", device=CPU)


def test_another_error_of_the_device_is_left_as_it_is(oxford_root: Path, tmp_path: Path) -> None:
    def fails(image: Tensor) -> Tensor:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    trainer = Trainer(tiny(), oxford_root, tmp_path / "out", device=CPU)
    trainer.forward = fails
    with pytest.raises(RuntimeError, match="illegal memory access"):
        trainer.fit()


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
    """fp16 is for GPUs, but the GradScaler also works on a CPU: here with gradients that always overflow."""
    trainer = Trainer(tiny("epochs=20"), oxford_root, tmp_path, device=CPU)
    trainer.scaler = torch.amp.GradScaler("cpu", enabled=True)
    trainer.model.head.weight.register_hook(lambda grad: grad * math.inf)
    before = trainer.model.head.weight.detach().clone()
    with pytest.raises(NonFiniteLoss, match=r"overflow in fp16 even at a scale of 6.1e-05 .*pet_.*amp=bf16"):
        trainer.fit()
    assert trainer.state.step == 29  # 2 ** 16 halved thirty times
    assert torch.equal(trainer.model.head.weight, before)


# stopping early


def test_a_run_without_progress_stops_early_and_resumed_stays_stopped(oxford_root: Path, tmp_path: Path) -> None:
    config, observer = tiny("epochs=9", "early_stop=2", "optimizer.lr=1e-9", "ema=0", "model.width=2"), Recorder()
    trainer = Trainer(config, oxford_root, tmp_path, device=CPU, observer=observer)
    trainer.fit()
    ious = [row.val_iou for row in trainer.state.history]
    assert trainer.stopped_early
    assert len(ious) < 9
    assert max(ious[:-2]) >= max(ious[-2:])
    assert "stopped: no better validation IoU for 2 epochs" in observer.messages
    resumed = Trainer(config, oxford_root, tmp_path, device=CPU, resume=True)
    resumed.fit()
    assert resumed.state.history == trainer.state.history


# speed


def test_a_compiled_network_takes_the_same_steps(
    oxford_root: Path, tmp_path: Path, whole: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The compiled network is the one that learns; without the code generator, which takes minutes."""
    made = []

    def eager(model: torch.nn.Module) -> Any:
        made.append(model)
        return lambda image: model(image)

    monkeypatch.setattr(torch, "compile", eager)
    trainer = Trainer(tiny("compile=true"), oxford_root, tmp_path, device=CPU)
    trainer.fit()
    assert made == [trainer.model]
    assert_same_run(tmp_path, whole)


def test_a_network_that_is_really_compiled_continues_and_ends_near_the_other(
    oxford_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of torch.compile except its code generator, which takes minutes."""
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
        [row.loss for row in plain.state.history], abs=5e-3
    )


@pytest.mark.gpu
@pytest.mark.filterwarnings("default")  # about forks beside CUDA's threads and about TF32; they differ between versions
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU that PyTorch can use")
def test_a_network_compiled_for_a_gpu_learns(oxford_root: Path, tmp_path: Path) -> None:
    trainer = Trainer(tiny("compile=true"), oxford_root, tmp_path, device=torch.device("cuda"))
    trainer.fit()
    assert trainer.state.history[-1].loss < trainer.state.history[0].loss
    assert trainer.state.peak_memory > 0


def test_the_time_of_the_observer_is_not_counted(oxford_root: Path, tmp_path: Path) -> None:
    steps: list[int] = []

    def take(step: int) -> None:
        steps.append(step)
        time.sleep(0.1)

    observer = Recorder(at_step=take)
    trainer = Trainer(tiny("epochs=1", "model.width=2"), oxford_root, tmp_path, device=CPU, observer=observer)
    trainer.fit()
    (row,) = trainer.state.history
    assert len(steps) > 4
    assert 0 < row.data_wait * row.seconds < row.seconds < row.elapsed - 0.1 * len(steps)


def test_the_log_has_the_memory_of_the_gpu(
    whole: Run, oxford_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert [row.gpu_memory for row in whole.observer.rows] == [0, 0, 0]
    trainer = Trainer(tiny("epochs=1", "model.width=2"), oxford_root, tmp_path, device=CPU)
    row = trainer._row

    def on_a_gpu(result: Evaluation) -> Row:
        with monkeypatch.context() as patch:
            patch.setattr(trainer, "device", torch.device("cuda"))
            return row(result)

    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 12345)
    monkeypatch.setattr(trainer, "_row", on_a_gpu)
    trainer.fit()
    with (tmp_path / LOG).open(newline="") as file:
        assert [row["gpu_memory"] for row in csv.DictReader(file)] == ["12345"]
    assert load(tmp_path / LAST).meta["state"]["peak_memory"] == 12345


def test_the_time_of_a_run_continues_where_it_was_left(oxford_root: Path, tmp_path: Path) -> None:
    config = tiny("model.width=2")
    stop = Recorder(at_step=at(7, lambda: signal.raise_signal(signal.SIGINT)))
    with pytest.raises(KeyboardInterrupt):
        Trainer(config, oxford_root, tmp_path, device=CPU, observer=stop).fit()
    before = load(tmp_path / LAST).meta["state"]["elapsed"]
    start = time.perf_counter()
    resumed = Trainer(config, oxford_root, tmp_path, device=CPU, resume=True)
    resumed.fit()
    times = [row.elapsed for row in resumed.state.history]
    assert 0 < times[0] < before < times[1] < times[2] <= before + time.perf_counter() - start
