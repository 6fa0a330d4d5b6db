"""The training loop: mixed precision, schedule, moving average, exact resume.

Everything random is a function of (seed, epoch, photo), and the learning rate one of the step, so the state of a run
is its weights, its moving average, its optimizer and one number: the step. A run that was killed and resumed takes
the same steps as one that was not.
"""

from __future__ import annotations

import contextlib
import csv
import io
import math
import multiprocessing
import shutil
import signal
import threading
import time
import weakref
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Final, Literal, NoReturn, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from petseg import checkpoint
from petseg.config import DataConfig, ScheduleConfig, TrainConfig, from_dict, to_dict
from petseg.data import VAL_LISTING, Pair, Split, find, listed_validation, names_sha256, usable
from petseg.device import pick_precision
from petseg.distributed import Ranks, synchronized
from petseg.ema import MovingAverage
from petseg.evaluate import Evaluation, Run, evaluate, open_model, split_of, trained_on
from petseg.lock import keep_others_out
from petseg.losses import bce_dice
from petseg.memory import enough_memory
from petseg.metrics import PET, Border, best_threshold
from petseg.model import AttentionUNet, normalize
from petseg.reference import torch_run
from petseg.train_set import EpochSampler, TrainSet, decoded_size, target_of
from petseg_runtime import __version__, images
from petseg_runtime.errors import CheckpointError, DataError, NonFiniteLoss, OutputError, TrainingError
from petseg_runtime.files import write_atomic
from petseg_runtime.host import available_memory, usable_cpus

__all__ = ["BEST", "LAST", "LOG", "Observer", "Observers", "RunState", "Trainer", "learning_rate", "workers_of"]

T = TypeVar("T")
U8: TypeAlias = npt.NDArray[np.uint8]

#: The best moving average so far: the checkpoint to evaluate and export.
BEST = "best.safetensors"
#: The whole training state, for ``--resume``.
LAST = "last.safetensors"
#: One line per epoch.
LOG = "log.csv"

#: Below this scale, fp16's smallest gradients are long lost; a scaler that gets here will not recover.
LEAST_SCALE = 1e-4

#: A ``last.safetensors`` that took no longer than this many seconds is written after every epoch.
QUICK_SAVE = 0.1

#: Settings that ``--resume`` takes anew: they decide where and how long a run goes, not which steps it takes.
FREE: Final = ("compile", "data.on_bad", "data.workers", "early_stop")

#: Columns of the log by their names in older versions.
RENAMED: Final = {"val_mean_iou_border_ignored": "val_mean_iou_border_ignored_at_0.5"}

#: Fewer validation photos than these are warned of. With the embedded model and 242 photos, a few of them drawn 400
#: times, the threshold that is best on the few cost 0.8 points of IoU on the others, in the mean, for 5 photos, 0.2 for
#: 20, and 0.1 for 50. The IoU of the few, by which an epoch is chosen, had a standard deviation of 7, 3.5 and 2 points.
FEW: Final = 20

#: Where forked workers put their batches; containers give it 64 MB unless told otherwise.
SHARED: Final = Path("/dev/shm")  # noqa: S108
#: Batches that a worker has there: two made ahead, one being made, one being read.
SHARED_BATCHES: Final = 4

#: Most processes that ``data.workers = "auto"`` starts.
MAX_WORKERS: Final = 16


class Observer:
    """Told what happens during a run; the command line prints it, the default does nothing."""

    def begin(self, per_epoch: int, batch: int) -> None:
        """Told once, before the first step: steps in an epoch, and photos per step, those of all processes."""

    def started(self, message: str) -> None:
        """Something worth knowing, in words: most of it before the first step."""

    def left_out(self, message: str) -> None:
        """A photo cannot be used, and the run goes on without it. Unless overridden, :meth:`started` is told."""
        self.started(message)

    def step(self, state: RunState, loss: float, lr: float) -> None:
        """A step is done."""

    def epoch(self, row: dict[str, float]) -> None:
        """An epoch is done and validated; the row is the log's."""

    def validated(self, run: Run, pairs: Sequence[Pair], row: dict[str, float]) -> None:
        """Told just before :meth:`epoch`: the moving average as a model, and the photos that it was measured on."""


class Observers(Observer):
    """Several observers in place of one; each is told everything, in this order."""

    def __init__(self, *each: Observer) -> None:
        self.each = each

    def begin(self, per_epoch: int, batch: int) -> None:
        """Tell each."""
        for one in self.each:
            one.begin(per_epoch, batch)

    def started(self, message: str) -> None:
        """Tell each."""
        for one in self.each:
            one.started(message)

    def left_out(self, message: str) -> None:
        """Tell each."""
        for one in self.each:
            one.left_out(message)

    def step(self, state: RunState, loss: float, lr: float) -> None:
        """Tell each."""
        for one in self.each:
            one.step(state, loss, lr)

    def epoch(self, row: dict[str, float]) -> None:
        """Tell each."""
        for one in self.each:
            one.epoch(row)

    def validated(self, run: Run, pairs: Sequence[Pair], row: dict[str, float]) -> None:
        """Tell each."""
        for one in self.each:
            one.validated(run, pairs, row)


@dataclass
class RunState:
    """Where a run stands; saved in ``last.safetensors`` beside the tensors.

    Attributes:
        step: Steps taken since the run began.
        best_iou: The IoU of the best checkpoint on the validation photos; -1 before there is one.
        loss_sum: The losses of this epoch's steps so far, added up.
        steps_summed: How many steps those are.
        seconds: Seconds that those steps took, with waiting for photos, without validation.
        waited: The part of ``seconds`` that was spent waiting for photos.
        history: The log's rows, one for each finished epoch.
        elapsed: Seconds of the whole run, all sessions added up, with reading the photos and validation.
        peak_memory: Largest GPU memory in use so far, bytes; 0 on a CPU.
    """

    step: int = 0
    best_iou: float = -1.0
    loss_sum: float = 0.0
    steps_summed: int = 0
    seconds: float = 0.0
    waited: float = 0.0
    history: list[dict[str, float]] = field(default_factory=list)
    elapsed: float = 0.0
    peak_memory: int = 0

    def next_epoch(self) -> None:
        """Forget the sums of the epoch that is done."""
        self.loss_sum = self.seconds = self.waited = 0.0
        self.steps_summed = 0


@dataclass(frozen=True)
class Step:
    """A step that the device has been told to take, perhaps before it has.

    Attributes:
        numbers: float32 [4] on the CPU, once ``arrived``: loss, norm of the gradient, whether a process wishes to stop,
            all three summed over the processes, and the scaler's scale after the step.
        arrived: On a GPU, when the numbers are there.
        lr: Its learning rate.
    """

    numbers: Tensor
    arrived: torch.cuda.Event | None
    lr: float

    def read(self) -> tuple[float, float, float, float]:
        """The numbers; waits for them."""
        if self.arrived is not None:
            self.arrived.synchronize()
        loss, norm, stops, scale = self.numbers.tolist()
        return loss, norm, stops, scale


def workers_of(setting: int | Literal["auto"], device: torch.device, batch: int, processes: int = 1) -> int:
    """How many processes augment for each process of a run on this machine; see :class:`petseg.config.DataConfig`.

    Args:
        setting: ``data.workers``.
        device: What computes.
        batch: Bytes of a batch.
        processes: Of the run, on this machine.
    """
    if isinstance(setting, int):
        return setting
    if device.type != "cuda":
        return 0
    fit = shutil.disk_usage(SHARED).free // (SHARED_BATCHES * batch) if SHARED.is_dir() else MAX_WORKERS
    return max(0, min(usable_cpus() // processes - 2, fit // processes, MAX_WORKERS))


def learning_rate(config: ScheduleConfig, peak: float, step: int, steps_per_epoch: int, epochs: int) -> float:
    """The rate at a step, counted from 0.

    ``cosine-restarts`` is ``CosineAnnealingWarmRestarts`` with eta_min 0, advanced every step (T_cur in fractions of
    an epoch): ``peak / 2 * (1 + cos(pi * T_cur / T_i))``.
    """
    total = steps_per_epoch * epochs
    if config.name == "constant":
        return peak
    if config.name == "cosine":
        return peak / 2 * (1 + math.cos(math.pi * step / total))
    if config.name == "one-cycle":
        rising = config.warmup * total
        if step < rising:
            return peak * (0.04 + 0.96 * (1 - math.cos(math.pi * step / rising)) / 2)
        return peak / 2 * (1 + math.cos(math.pi * (step - rising) / (total - rising)))
    now, period = step / steps_per_epoch, float(config.restart_epochs)
    while now >= period:
        now -= period
        period *= config.restart_factor
    return peak / 2 * (1 + math.cos(math.pi * now / period))


class Trainer:
    """One run: built once, then :meth:`fit`.

    Attributes:
        late: Whether a step's loss is read when the next step is under way, so that a GPU always has work; a CPU has
            done a step when it has been told to. Before anything is saved, validated or ended, all have been read.
        stopped_by: The signal that ended the run, if one did.
        warnings: What makes the run's figures less than they seem; the observer was told each.
    """

    def __init__(
        self,
        config: TrainConfig,
        root: Path,
        output: Path,
        *,
        device: torch.device,
        init: Path | None = None,
        teacher: Path | None = None,
        resume: bool = False,
        observer: Observer | None = None,
        provenance: dict[str, Any] | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        """Read the data, make the network, and take up a stopped run if ``resume``.

        Args:
            config: The run.
            root: The data folder.
            output: Where checkpoints and log go.
            device: CUDA or CPU.
            init: A checkpoint to start from, instead of random weights. One of another shape gives the tensors that
                fit, if those are half or more.
            teacher: A checkpoint or exported file whose probabilities are part of the target; see
                :class:`petseg.config.LossConfig`.
            resume: Go on from ``output/last.safetensors``.
            observer: Told what happens.
            provenance: Kept in the checkpoints as it is (the command, for example).
            ranks: Which of several processes this is; see :mod:`petseg.distributed`. By default the only one.

        Raises:
            DataError: The data cannot be used.
            UsageError: The precision is not for this device, or a batch cannot be split over the processes.
            TrainingError: The folder already holds a run, or holds none to resume, or one of another config, or another
                process trains there; ``init`` was trained on photos that this run validates on; or another process has
                other photos.
            OutputError: ``output`` has no room for photos that are too many for the memory.
            CheckpointError: ``init`` or the state to resume is damaged, or of another network.
        """
        self.config, self.output, self.device = config, output, device
        self.observer = observer or Observer()
        self.ranks = ranks or Ranks()
        self.late, self.stopped_by = device.type == "cuda", signal.SIGINT
        self._clock = self._mark = time.perf_counter()
        self._saved = self.save_took = 0.0  # the second: seconds that the latest state took
        self._stop = self._agreed = False  # no Event: its lock would hold up a signal that interrupts another's handler
        self._check_output(resume)
        # Until the end of `fit`, or of a trainer that does not come to it.
        self._let_others_in = weakref.finalize(self, keep_others_out(output) if self.ranks.first else lambda: None)
        self.dtype = pick_precision(config.amp, device)
        self.bad: list[str] = []
        self.warnings: list[str] = []
        self.train_set, self.val_pairs, about_teacher = self._read(root, teacher)
        self._agree_on_photos()
        self.sampler = EpochSampler(len(self.train_set), config.batch, config.seed, self.ranks.rank, self.ranks.size)
        self.loader = self._loader()
        self.observer.begin(len(self.sampler), config.batch)
        torch.manual_seed(config.seed)
        if init and resume:
            self.observer.started(f"resumed, so that {init} is not read: the run has weights of its own")
        network = self._start_weights(None if resume else init, root)
        with enough_memory("use a network of a smaller --width"):
            self.model = network.to(device).to(memory_format=torch.channels_last)
            self.ema = MovingAverage(self.model, config.ema)
            synchronized(self.model, self.ranks, device)
            self.optimizer = _optimizer(self.model, config)
        self.scaler = self._scaler()
        self.state = RunState()
        self.meta = self._about(root, provenance or {}, about_teacher)
        self._announce()
        if resume:
            self._restore()
        self.forward = self._callable()

    def fit(self) -> Path:
        """Train to the last epoch.

        Returns:
            The path of the best checkpoint.

        Raises:
            NonFiniteLoss: The loss or the gradient became NaN or infinite; ``last.safetensors`` is untouched.
            EngineError: The device, or a process that prepares photos, had too little memory.
            KeyboardInterrupt: SIGINT or SIGTERM came; the state was saved first.
        """
        try:
            remedy = f"use a smaller --batch than {self.config.batch}, or a smaller --size"
            with _signals_to(self._stop_for), enough_memory(remedy):
                # The log has one row per finished epoch: a run that was stopped after an epoch's last step, before its
                # validation, takes up at the validation.
                while not self.finished:
                    self._epoch(len(self.state.history))
                    self._validate()
                    if self.stopped_early:
                        self.observer.started(f"stopped: no better validation IoU for {self.config.early_stop} epochs")
        finally:
            # Workers end with their loader. They heed no SIGTERM, so Python would wait for them at its own end.
            self.loader = self._loader()
            self._let_others_in()
        return self.output / BEST

    @property
    def finished(self) -> bool:
        """Whether the last epoch is done; a function of the log."""
        return len(self.state.history) >= self.config.epochs or self.stopped_early

    @property
    def stopped_early(self) -> bool:
        """Whether the best epoch is ``early_stop`` epochs ago; a function of the log, so that a resumed run agrees."""
        ious = [row["val_iou"] for row in self.state.history]
        return bool(ious) and 0 < self.config.early_stop < len(ious) - ious.index(max(ious))

    def _read(self, root: Path, teacher: Path | None) -> tuple[TrainSet, list[Pair], dict[str, str]]:
        """The training photos in memory, the validation photos on the disk, and which model taught."""
        d = self.config.data
        failed = self._leave_out if d.on_bad == "skip" else None
        train, val = (
            find(root, split, val_fraction=d.val_fraction, seed=d.split_seed) for split in (Split.TRAIN, Split.VAL)
        )
        folder, here = self._place_for(len(train), teacher is not None), self.ranks.here
        self._look_at(root, val, failed)  # now, not after the first epoch
        remedy = "train without --teacher, or with a smaller one"
        with enough_memory(remedy), _teacher(teacher, d, self.device) as (taught, about, origin):
            if seen := trained_on(origin, root, val):
                self._warn(
                    f"the teacher was trained on {len(seen)} of the {len(val)} validation photos: what is measured on "
                    "them flatters this run a little"
                )
            augment, seed = self.config.augment, self.config.seed
            return TrainSet(train, d.height, d.width, augment, seed, taught, failed, folder, here), val, about

    def _look_at(self, root: Path, val: Sequence[Pair], failed: Callable[[Pair, DataError], None] | None) -> None:
        """Raises DataError if no validation photo can be used, or none shows a pet; a few are warned of."""
        with_pet = [(trimap == PET).any() for _, _, trimap in usable(val, failed, self.ranks.here)]
        if not any(with_pet):
            raise DataError(
                f"{root}: of the {len(val)} validation photos {len(with_pet)} can be used, and none of those shows a "
                "pet, so that no threshold can be chosen: set another data.val_fraction or data.split_seed, or list "
                f"others in {VAL_LISTING}, if it is there"
            )
        if (number := sum(with_pet)) < FEW:
            self._warn(
                f"{number} validation photos with a pet are few to choose the epoch and the threshold by: {FEW} or "
                f"more leave less to chance (a larger data.val_fraction; {VAL_LISTING} in a folder of your own)"
            )

    def _warn(self, message: str) -> None:
        self.warnings.append(message)
        self.observer.started(f"warning: {message}")

    def _place_for(self, photos: int, taught: bool) -> Path | None:
        """The folder for the decoded photos, if those of all processes here take more than half of the free memory."""
        size = self.ranks.here * decoded_size(photos, self.config.data.height, self.config.data.width, taught)
        if 2 * size <= available_memory():
            self.observer.started(f"reading {photos} photos into memory")
            return None
        why = f"decoded, they are {size / 1e9:.1f} GB, more than half of the memory that is free"
        self.observer.started(f"reading {photos} photos into a file in {self.output}: {why}")
        return self.output

    def _agree_on_photos(self) -> None:
        """Raises TrainingError if a process has other photos than another: their batches would not be of one order."""
        if not self.ranks.same(names_sha256(self.train_set.names, self.val_pairs), self.device):
            bad = f"left out {', '.join(self.bad)}" if self.bad else "could read all that it found"
            raise TrainingError(
                "the processes of this run have different photos, so they cannot share batches; process "
                f"{self.ranks.rank} {bad} (`petseg data check` lists what cannot be read)"
            )

    def _loader(self) -> DataLoader[tuple[Tensor, Tensor, int]]:
        """Batches of the epoch that the sampler is set to, from this process or from workers that outlive the epoch."""
        d, own = self.config.data, self.config.batch // self.ranks.size
        batch = decoded_size(own, d.height, d.width, taught=True)  # at most
        workers = workers_of(d.workers, self.device, batch, self.ranks.here)
        # A forked worker sees the photos where they are; one started anew, as from Python 3.14 on, would get a copy.
        fork = workers > 0 and "fork" in multiprocessing.get_all_start_methods()
        return DataLoader(
            self.train_set,
            batch_sampler=self.sampler,
            num_workers=workers,
            pin_memory=self.device.type == "cuda",
            worker_init_fn=_leave_signals_to_the_parent,
            multiprocessing_context="fork" if fork else None,
            persistent_workers=workers > 0,
        )

    def _about(self, root: Path, provenance: dict[str, Any], teacher: dict[str, str]) -> dict[str, Any]:
        """What every checkpoint says of its run; JSON values. Exported files keep ``data``, but not ``config``."""
        d = self.config.data
        # Photos that a listing chose can be told by their names alone, those of a share by its seed.
        listed = listed_validation(root) is not None
        names = {"val_names": [pair.name for pair in self.val_pairs]}
        return {
            "model": to_dict(self.config)["model"],
            "config": to_dict(self.config),
            "data": {
                "folder": root.name,
                **(names if listed else {"val_fraction": d.val_fraction, "split_seed": d.split_seed}),
                "train_photos": len(self.train_set),
                "val_photos": len(self.val_pairs),
                "skipped_without_pet": self.train_set.skipped_empty,
                "skipped_bad": self.bad,  # the list itself: it can grow at a validation
                "names_sha256": names_sha256(self.train_set.names, self.val_pairs),
            },
            "versions": {"petseg": __version__, "torch": torch.__version__},
            "precision": str(self.dtype).removeprefix("torch."),
            "device": torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu",
            "provenance": provenance,
            **({"teacher": teacher} if teacher else {}),
        }

    def _callable(self) -> Callable[[Tensor], Tensor]:
        """The network as the steps call it: gradients averaged over processes, compiled, or as it is."""
        forward = self.ranks.wrap(self.model, self.device)
        if self.device.type == "cuda":
            torch.backends.cudnn.benchmark = True  # all batches are of one shape: try the algorithms once
        return torch.compile(forward) if self.config.compile else forward

    def _stop_for(self, number: int) -> None:
        self.stopped_by = signal.Signals(number)
        self._stop = True

    @property
    def _stopping(self) -> bool:
        """Several processes stop after the same step, so each heeds what all have agreed on."""
        return self._agreed if self.ranks.size > 1 else self._stop

    def _epoch(self, epoch: int) -> None:
        """The rest of an epoch's steps.

        Raises:
            NonFiniteLoss: See :meth:`fit`.
            KeyboardInterrupt: See :meth:`fit`.
        """
        self.sampler.epoch, self.sampler.start = epoch, self.state.step - epoch * len(self.sampler)
        self.model.train()
        self._mark = time.perf_counter()
        with contextlib.closing(self._steps()) as steps:
            for step in _one_behind(steps) if self.late else steps:
                self._settle(step)
        if self._stopping:
            self._save_last()
            raise KeyboardInterrupt

    def _steps(self) -> Generator[Step, None, None]:
        """The rest of an epoch's steps, to be settled in this order, until the run is to stop."""
        schedule, peak, epochs = self.config.schedule, self.config.optimizer.lr, self.config.epochs
        asked = time.perf_counter()
        for number, (photo, trimap, _) in enumerate(self.loader, self.state.step):
            self.state.waited += time.perf_counter() - asked
            yield self._step(photo, trimap, learning_rate(schedule, peak, number, len(self.sampler), epochs))
            if self._stopping:
                return
            asked = time.perf_counter()

    def _step(self, photo: Tensor, trimap: Tensor, lr: float) -> Step:
        """Tell the device to take a step; nothing here waits until it has."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        image = normalize(photo.to(self.device, non_blocking=True))
        weights = self.config.loss
        labels = trimap.to(self.device, non_blocking=True)
        target = target_of(labels, self.config.data.border_target, weights.teacher)
        mixed = torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not torch.float32)
        with self.ranks.exchanging(), mixed:
            logits = self.forward(image)
        loss = bce_dice(logits, target, weights.bce, weights.dice, weights.epsilon, self.ranks.sum)
        self.optimizer.zero_grad(set_to_none=True)
        with self.ranks.exchanging():
            self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.config.optimizer.clip)
        stop = torch.full_like(norm, float(self._stop))
        numbers = self.ranks.sum(torch.stack((loss.detach(), norm, stop)))
        if not self.scaler.is_enabled():
            # Where this is 1, the fused AdamW leaves the weights alone: the run ends, once the loss has been read.
            # (A scaler, where there is one, sets it.)
            self.optimizer.found_inf = 1 - numbers[:2].isfinite().all().float()  # type: ignore[attr-defined]
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.ema.update(self.model)
        scale = self.scaler.scale(torch.ones_like(norm))
        return self._sent(torch.cat((numbers, scale[None])), lr)

    def _sent(self, numbers: Tensor, lr: float) -> Step:
        """A step whose numbers are on their way to the CPU."""
        if self.device.type == "cpu":
            return Step(numbers, None, lr)
        # Reading a tensor of the GPU waits for all that it has been told to do up to then, the next step too; an event
        # comes when this copy is done. Until then, the core is left to the workers.
        numbers, arrived = numbers.to("cpu", non_blocking=True), torch.cuda.Event(blocking=True)
        arrived.record(torch.cuda.current_stream(self.device))
        return Step(numbers, arrived, lr)

    def _settle(self, step: Step) -> None:
        """Read a step's numbers, count them, and tell the observer, whose time is not counted.

        Raises:
            NonFiniteLoss: They are none.
        """
        loss, norm, stops, scale = step.read()
        loss, norm = loss / self.ranks.size, norm / self.ranks.size
        self._agreed = stops > 0
        # An infinite gradient under fp16 is the scaler's business: it skips the step and scales less.
        overflow = self.scaler.is_enabled() and not math.isfinite(norm)
        if not math.isfinite(loss) or not (math.isfinite(norm) or overflow):
            self._give_up(f"loss {loss}, gradient norm {norm}")
        if overflow and scale < LEAST_SCALE:
            self._give_up(f"gradients overflow in fp16 however small the scale (now {scale:.1e})")
        state = self.state
        state.step += 1
        state.loss_sum += loss
        state.steps_summed += 1
        state.seconds += time.perf_counter() - self._mark
        self.observer.step(state, loss, step.lr)
        self._mark = time.perf_counter()

    def _give_up(self, what: str) -> NoReturn:
        epoch, step = divmod(self.state.step, len(self.sampler))
        names = ", ".join(self.train_set.names[i] for i in self.sampler.photos(step))
        last, change = self.output / LAST, "a lower optimizer.lr or another amp (amp=bf16 or fp32)"
        remedy = (
            f"the last good checkpoint is {last}. --resume would take the same steps: start from it (--init {last}) in "
            f"another --output, with {change}"
            if last.exists()
            else f"no checkpoint had been written yet. Start again with {change}"
        )
        raise NonFiniteLoss(
            f"{what} in epoch {epoch + 1}, batch {step + 1} ({names}); {remedy}, or look at those photos"
        )

    def _validate(self) -> None:
        """One process measures, writes and tells; the others wait for what it found."""
        iou = self.ranks.on_first(self._measure_and_keep, self.device)
        if not self.ranks.first:
            self.state.history.append({"val_iou": iou})
            self.state.next_epoch()

    def _measure_and_keep(self) -> float:
        """The moving average's IoU on the validation photos, once it is in the log and what is best is saved.

        Raises:
            KeyboardInterrupt: See :meth:`fit`.
        """
        state, per_epoch = self.state, len(self.sampler)
        if not (self.output / LAST).exists():
            self._write_last()  # what is killed while it writes the first best checkpoint can be resumed, too
        result = self._evaluate_ema()
        threshold = best_threshold(result.total)
        headline = result.counts(threshold)
        if self.device.type == "cuda":
            state.peak_memory = max(state.peak_memory, torch.cuda.max_memory_allocated(self.device))
        row = {
            "epoch": state.step // per_epoch,
            "step": state.step,
            "loss": state.loss_sum / max(state.steps_summed, 1),
            "val_iou": headline.iou,
            "val_dice": headline.dice,
            "val_threshold": threshold,
            "val_mean_iou_border_ignored_at_0.5": float(result.image_ious(0.5, Border.IGNORED).mean()),
            "seconds": state.seconds,
            "images_per_s": state.steps_summed * self.config.batch / max(state.seconds, 1e-9),
            "data_wait": state.waited / max(state.seconds, 1e-9),
            "elapsed": self._elapsed(),
            "skipped": len(self.bad),
            "gpu_memory": state.peak_memory,
        }
        state.history.append(row)
        state.next_epoch()
        if headline.iou > state.best_iou:
            state.best_iou = headline.iou
            self._save_best(result, threshold, row)
        if self.finished or self._save_pays:
            self._write_last()
        self._write_log()
        self.observer.validated(self._ema_run(), self.good_val_pairs, row)
        self.observer.epoch(row)
        return headline.iou

    @property
    def good_val_pairs(self) -> list[Pair]:
        """The validation photos, less those that ``data.on_bad`` left out."""
        return [pair for pair in self.val_pairs if pair.name not in self.bad]

    def _leave_out(self, pair: Pair, error: DataError) -> None:
        self.bad.append(pair.name)
        self.observer.left_out(f"left out: {error}")

    def _elapsed(self) -> float:
        """Seconds of the whole run up to now."""
        now = time.perf_counter()
        self.state.elapsed += now - self._clock
        self._clock = now
        return self.state.elapsed

    def _ema_run(self) -> Run:
        return torch_run(_network(self.ema), self.device)

    def _evaluate_ema(self) -> Evaluation:
        d = self.config.data
        failed = self._leave_out if d.on_bad == "skip" else None  # a file can also go bad in the middle of a run
        pairs = self.good_val_pairs
        run, watch = self._ema_run(), lambda done: self._heed_in_validation()
        return evaluate(run, pairs, d.height, d.width, batch=self.config.batch, watch=watch, failed=failed)

    def _heed_in_validation(self) -> None:
        """End a run that is to stop: it takes up at its validation, which may take longer than a scheduler waits.

        Of several processes, the others wait for this one's figure, and all heed the signal with the next step.
        """
        if self._stop and self.ranks.size == 1:
            self._write_last()
            raise KeyboardInterrupt

    def _save_best(self, result: Evaluation, threshold: float, row: dict[str, float]) -> None:
        d = self.config.data
        spec = {
            "height": d.height,
            "width": d.width,
            "threshold": threshold,
            "cutout_threshold": best_threshold(result.total, Border.PET),
            "border_target": d.border_target,
            "certain_share": None,  # a choice that needs photos without a pet, too
        }
        meta = {**self.meta, "kind": "model", "spec": spec, "epoch": row["epoch"], "validation": row}
        checkpoint.save_checkpoint(self.output / BEST, self.ema.module.state_dict(), meta)

    @property
    def _save_pays(self) -> bool:
        """Whether the state is worth its saving after an epoch: all saving takes a tenth of the time at most.

        The published network's is half a gigabyte, flushed to the disk, and an epoch on a fast GPU may take seconds. A
        crash then costs up to ten times what a save takes; a stop in order always saves.
        """
        return self.save_took <= QUICK_SAVE or time.perf_counter() - self._saved >= 10 * self.save_took

    def _save_last(self) -> None:
        self.ranks.on_first(self._write_last, self.device)

    def _write_last(self) -> float:
        start = time.perf_counter()
        self._elapsed()
        tensors = dict(self.model.state_dict())
        tensors |= {f"ema/{name}": t for name, t in self.ema.module.state_dict().items()}
        tensors["ema_updates"] = torch.tensor(self.ema.updates)
        for index, slots in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer/{index}/{slot}": value for slot, value in slots.items()}
        meta = {**self.meta, "kind": "training", "state": vars(self.state), "scaler": self.scaler.state_dict()}
        checkpoint.save_checkpoint(self.output / LAST, tensors, meta)
        self._saved = time.perf_counter()
        self.save_took = self._saved - start
        return 0.0

    def _restore(self) -> None:
        path = self.output / LAST
        if self.ranks.first:
            for name in (BEST, LAST, LOG):  # what a killed run was writing
                for part in self.output.glob(f".{Path(name).stem}.*.part*"):
                    part.unlink(missing_ok=True)
        saved = checkpoint.load(path)
        if saved.meta.get("kind") != "training":
            raise CheckpointError(f"{path}: a model, not the state of a run; give it to --init")
        try:
            self._take_up(saved)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"{path}: the state in it is damaged or not complete ({error!r})") from error

    def _take_up(self, saved: checkpoint.Checkpoint) -> None:
        before = from_dict(TrainConfig, saved.meta["config"])  # a setting that is newer than the run has its default
        if differs := _differences(to_dict(before), to_dict(self.config)):
            raise TrainingError(f"{self.output}: the run to resume has other settings: {'; '.join(differs)}")
        if saved.meta["data"]["names_sha256"] != self.meta["data"]["names_sha256"]:
            raise TrainingError(f"{self.output}: the run to resume was trained on other photos than these")
        if saved.meta.get("teacher") != self.meta.get("teacher"):
            was, now = (meta.get("teacher", "none") for meta in (saved.meta, self.meta))
            raise TrainingError(f"{self.output}: the teacher of the run to resume was {was}, now {now}")
        t = saved.tensors
        ema = {n.removeprefix("ema/"): v for n, v in t.items() if n.startswith("ema/")}
        self.model.load_state_dict({n: v for n, v in t.items() if "/" not in n and n != "ema_updates"})
        self.ema.module.load_state_dict(ema)
        self.ema.updates = int(t["ema_updates"])
        slots: dict[int, dict[str, Tensor]] = {}
        for name, value in t.items():
            if name.startswith("optimizer/"):
                _, number, slot = name.split("/")
                slots.setdefault(int(number), {})[slot] = self._laid_out(int(number), value)
        for index in range(len(list(self.model.parameters()))):
            if missing := {"step", "exp_avg", "exp_avg_sq"} - slots.get(index, {}).keys():
                raise ValueError(f"optimizer state {index} lacks {', '.join(sorted(missing))}")
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": slots})
        self._go_on_in(saved.meta["precision"])
        if saved.meta["scaler"]:  # empty: what it was computed in needs none
            self.scaler.load_state_dict(saved.meta["scaler"])
        self.state = RunState(**saved.meta["state"])
        self.state.history = [{RENAMED.get(n, n): v for n, v in row.items()} for row in self.state.history]
        self.meta["provenance"] = saved.meta["provenance"]
        self.observer.started(f"resumed at step {self.state.step}")

    def _scaler(self) -> torch.amp.GradScaler:
        return torch.amp.GradScaler(self.device.type, enabled=self.dtype is torch.float16)

    def _go_on_in(self, before: str) -> None:
        """Compute as the run did so far, where this device can: with ``amp=auto`` it would choose for itself."""
        chosen = self.meta["precision"]
        if before == chosen:
            return
        if before == "float32" or (before == "float16" and self.device.type == "cuda"):
            self.dtype, self.meta["precision"] = getattr(torch, before), before
            self.scaler = self._scaler()
            self.observer.started(f"in {before} as so far, where this device would choose {chosen}")
        else:
            why = f"this device does not compute in {before}, as so far"
            self.observer.started(f"in {chosen} from here on ({why}): not quite the weights of a run in one piece")

    def _laid_out(self, index: int, value: Tensor) -> Tensor:
        """A moment in the memory layout of its weight: the fused AdamW walks both as they lie (channels_last)."""
        weight = [p for group in self.optimizer.param_groups for p in group["params"]][index]
        if value.shape != weight.shape:
            return value  # the step count
        return torch.empty_like(weight, requires_grad=False).copy_(value)

    def _write_log(self) -> None:
        text = io.StringIO()
        # The last row has every column; rows from before a column was there, in a run of an older version, lack it.
        writer = csv.DictWriter(text, fieldnames=list(self.state.history[-1]), restval="")
        writer.writeheader()
        writer.writerows(self.state.history)
        try:
            write_atomic(self.output / LOG, text.getvalue().encode())
        except OSError as error:
            raise OutputError(f"{self.output / LOG}: cannot be written ({error.strerror or error})") from error

    def _start_weights(self, init: Path | None, root: Path) -> AttentionUNet:
        if init is None:
            return AttentionUNet(self.config.model)
        given, loaded = checkpoint.load_model(init)
        if seen := trained_on(loaded.meta, root, self.val_pairs):
            remedy = f"list in {VAL_LISTING} the photos that it was validated on"
            if (split := split_of(loaded.meta)) and listed_validation(root) is None:
                remedy = f"--set data.val_fraction={split[0]:g} --set data.split_seed={split[1]}"
            raise TrainingError(
                f"{init}: it was trained on {len(seen)} of the {len(self.val_pairs)} photos that this run would be "
                f"validated on; validate on its own: {remedy}"
            )
        if loaded.model_config == self.config.model:
            return given
        model = AttentionUNet(self.config.model)
        own = model.state_dict()
        fits = {n: t for n, t in given.state_dict().items() if n in own and t.shape == own[n].shape}
        if 2 * len(fits) < len(own):
            raise CheckpointError(
                f"{init}: a network of {loaded.model_config}, this run is of {self.config.model}: only {len(fits)} of "
                f"{len(own)} tensors fit"
            )
        model.load_state_dict(fits, strict=False)
        self.observer.started(f"of {init.name} {len(fits)} tensors; random: {', '.join(sorted(own.keys() - fits))}")
        return model

    def _check_output(self, resume: bool) -> None:
        last = self.output / LAST
        if resume and not last.exists():
            raise TrainingError(f"{last}: nothing to resume; leave out --resume to start")
        if not resume and any((self.output / name).exists() for name in (BEST, LAST, LOG)):
            raise TrainingError(
                f"{self.output} already holds a run: --resume goes on with it, or choose another folder"
            )

    def _announce(self) -> None:
        parameters = sum(p.numel() for p in self.model.parameters())
        say, shape = self.observer.started, self.config.model
        name = "attention U-Net" if shape.stem == "full" else "attention U-Net with a strided stem"
        say(f"{name}, width {shape.width}, {parameters:,} parameters, {self.meta['precision']}")
        if self.ranks.size > 1:
            say(f"{self.ranks.size} processes, {self.config.batch // self.ranks.size} photos of a batch each")
        listed = f", as {VAL_LISTING} lists them, without data.val_fraction" if "val_names" in self.meta["data"] else ""
        say(f"{len(self.train_set)} photos to train on, {len(self.val_pairs)} for validation{listed}")
        if workers := self.loader.num_workers:
            say(f"{workers} processes augment them")
        if skipped := self.train_set.skipped_empty:
            say(f"left out, because their masks show no pet: {', '.join(skipped)}")


@contextlib.contextmanager
def _teacher(
    path: Path | None, config: DataConfig, device: torch.device
) -> Iterator[tuple[Callable[[U8], U8] | None, dict[str, str], dict[str, Any]]]:
    """What another model says of a photo, at the training size, which model it is, and what it says of its origin.

    Without a path nothing. It is asked about the photo and its mirror image, and the mean is taken: a better teacher
    for twice the time, once.

    Raises:
        ModelError: It cannot be read.
    """
    if path is None:
        yield None, {}, {}
        return
    with open_model(path, str(device)) as model:

        def ask(photo: U8) -> U8:
            inputs = images.to_model(photo, model.height, model.width)
            straight, mirrored = model.run(np.stack((inputs, inputs[:, ::-1]))).astype(np.uint16)
            mean = (straight + mirrored[:, ::-1] + 1) // 2
            return images.from_model(mean.astype(np.uint8), config.height, config.width)

        yield ask, {"file": model.file, "identity": model.identity}, model.provenance


def _network(ema: MovingAverage) -> AttentionUNet:
    assert isinstance(ema.module, AttentionUNet)
    return ema.module


def _optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW; weight decay on convolution kernels alone (BatchNorm and biases have one dimension)."""
    kernels = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [
        {"params": kernels, "weight_decay": config.optimizer.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.optimizer.lr, fused=True)


def _differences(old: dict[str, Any], new: dict[str, Any], where: str = "") -> list[str]:
    """Settings that are not the same, but for those that are :data:`FREE`."""
    found = []
    for key in sorted({*old, *new}):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found += _differences(a, b, f"{where}{key}.")
        elif a != b and where + key not in FREE:
            found.append(f"{where}{key} was {a!r}, now {b!r}")
    return found


def _leave_signals_to_the_parent(worker: int) -> None:
    """Ctrl-C reaches the whole process group; a worker that died of it would take the orderly stop down with it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _one_behind(items: Iterable[T]) -> Iterator[T]:
    """Each item when the next one is there, and the last one at the end."""
    waiting: list[T] = []
    for item in items:
        yield from waiting
        waiting = [item]
    yield from waiting


@contextlib.contextmanager
def _signals_to(heed: Callable[[int], None]) -> Iterator[None]:
    """SIGINT and SIGTERM call a function with their number, in place of ending the process."""
    if threading.current_thread() is not threading.main_thread():  # signals cannot be handled elsewhere
        yield
        return

    def handler(number: int, frame: FrameType | None) -> None:
        heed(number)

    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)
