"""The training loop: mixed precision, a moving average, validation, and an orderly end.

The rooms around it: the photos (:mod:`petseg.run_photos`), where a run stands and goes on from
(:mod:`petseg.run_state`), the first weights (:mod:`petseg.warm_start`), what a step minimises
(:mod:`petseg.objective`), the learning rate (:mod:`petseg.schedule`), the log (:mod:`petseg.log`), and who is told
(:mod:`petseg.observers`). A run that was killed and resumed takes the same steps as one that was not, on a CPU bit for
bit.
"""

from __future__ import annotations

import contextlib
import math
import signal
import time
import weakref
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor, nn

from petseg import checkpoint, log
from petseg.config import TrainConfig, to_dict
from petseg.data import VAL_LISTING
from petseg.device import pick_precision
from petseg.distributed import Ranks, synchronized
from petseg.ema import MovingAverage
from petseg.evaluate import Evaluation, Run, evaluate
from petseg.lock import keep_others_out
from petseg.log import LOG, Row
from petseg.memory import enough_memory
from petseg.metrics import Border, best_threshold
from petseg.model import AttentionUNet, normalize
from petseg.objective import Distillation, Objective
from petseg.observers import Observer
from petseg.reference import torch_run
from petseg.run_photos import RunPhotos, loader
from petseg.run_state import (
    BEST,
    RunState,
    StateFile,
    check_folder,
    load_tensors,
    refuse_another_run,
    remove_unfinished,
    tensors_of,
)
from petseg.schedule import learning_rate, left_at_the_end
from petseg.train_set import EpochSampler
from petseg.warm_start import first_weights
from petseg_runtime import __version__
from petseg_runtime.artifact import open_artifact
from petseg_runtime.errors import CheckpointError, NonFiniteLoss
from petseg_runtime.signals import EXITS, handled

__all__ = ["Step", "Trainer"]

T = TypeVar("T")

#: Below this scale, fp16's smallest gradients are long lost; a scaler that gets here will not recover.
LEAST_SCALE = 1e-4
#: A share of the peak rate at which a run had better not end.
MUCH_LEFT = 0.05


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


class Trainer:
    """One run: built once, then :meth:`fit`.

    Attributes:
        late: Whether a step's loss is read when the next step is under way, so that a GPU always has work; a CPU has
            done a step when it has been told to. Before anything is saved, validated or ended, all have been read.
        stopped_by: The signal that ended the run, if one did.
        photos: The run's photos; which were left out.
        state: Where the run stands.
        last: The file that it goes on from, if it is stopped.
        meta: What every checkpoint says of the run; JSON values.
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
            teacher: A checkpoint or exported file whose probabilities are part of the target; with ``loss.features`` a
                checkpoint, whose features are taught, too. See :class:`petseg.config.LossConfig`.
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
            CheckpointError: ``init`` or the state to resume is damaged, or of another network; or the teacher is no
                checkpoint where its features are taught.
            ModelError: The teacher cannot be read.
        """
        self.config, self.output, self.device = config, output, device
        self.observer = observer or Observer()
        self.ranks = ranks or Ranks()
        self.late, self.stopped_by = device.type == "cuda", signal.SIGINT
        self._clock = self._mark = time.perf_counter()
        self._stop = self._agreed = False  # no Event: its lock would hold up a signal that interrupts another's handler
        check_folder(output, resume)
        # Until the end of `fit`, or of a trainer that does not come to it.
        self._let_others_in = weakref.finalize(self, keep_others_out(output) if self.ranks.first else lambda: None)
        self.dtype = pick_precision(config.amp, device)
        self.last = StateFile(output)
        inside = self._before_photos(None if resume else init, teacher)
        if resume:
            self.last.look_at(config, taught=teacher is not None)
        self.photos = RunPhotos(
            config, root, output, device=device, teacher=teacher, observer=self.observer, ranks=self.ranks
        )
        train = self.photos.train
        self.sampler = EpochSampler(len(train), config.batch, config.seed, self.ranks.rank, self.ranks.size)
        self.loader = loader(train, self.sampler, config, device, self.ranks)
        self.observer.begin(len(self.sampler), config.batch)
        torch.manual_seed(config.seed)
        if init and resume:
            self.observer.started(f"resumed, so that {init} is not read: the run has weights of its own")
        network = self.first_network(None if resume else init)
        with enough_memory("use a network of a smaller --width"):
            self.model = network.to(device).to(memory_format=torch.channels_last)
            self.ema = MovingAverage(self.model, config.ema)
            synchronized(self.model, self.ranks, device)
        with enough_memory("train without --teacher, or with a smaller one"):
            self.objective = self._objective(inside)
        with enough_memory("use a network of a smaller --width"):
            modules = (self.model, self.objective.hints)
            self._weights = [weight for each in modules for weight in each.parameters() if weight.requires_grad]
            self.optimizer = _optimizer(self._weights, config)
        self.scaler = self._scaler()
        self.state = RunState()
        self.meta = self._about(provenance or {})
        doubts = list(self._doubts())
        self.warnings = [*self.photos.warnings, *doubts]  # the photos' own were told as they came
        self._announce(doubts)
        if resume:
            self._take_up()
        self.forward = self._callable()

    def _before_photos(self, init: Path | None, teacher: Path | None) -> AttentionUNet | None:
        """Look at the models that were given, before minutes of reading photos; the network whose features are taught.

        Raises:
            ModelError: One is not there, or is not what it should be.
        """
        if init:
            checkpoint.peek(init)
        if teacher is None:
            return None
        if self.config.loss.features:
            return self.teacher_network(teacher)
        if teacher.suffix in checkpoint.EXPORTED:
            open_artifact(teacher)
        elif checkpoint.peek(teacher).get("kind") == "training":
            raise _no_model(teacher)
        return None

    def first_network(self, init: Path | None) -> AttentionUNet:
        """The network that the run starts with; what trains another network overrides this."""
        return first_weights(self.config.model, init, self.photos, self.observer.started)

    def teacher_network(self, path: Path) -> AttentionUNet:
        """The network whose features are taught; what has a teacher of another kind overrides this.

        Raises:
            CheckpointError: It is no checkpoint, damaged, or the state of a run.
        """
        if path.suffix in checkpoint.EXPORTED:
            raise CheckpointError(
                f"{path}: an exported file, whose features cannot be seen: give the checkpoint that it was made "
                "from, or --set loss.features=0 to learn from its probabilities alone"
            )
        network, loaded = checkpoint.load_model(path)
        if loaded.spec() is None:
            raise _no_model(path)
        return network

    def _objective(self, teacher: AttentionUNet | None) -> Objective:
        """What the steps minimise."""
        if teacher is None:
            return Objective(self.config, self.ranks)
        return Distillation(self.config, self.ranks, self.model, teacher, self.device)

    def fit(self) -> Path:
        """Train to the last epoch.

        Returns:
            The path of the best checkpoint.

        Raises:
            NonFiniteLoss: The loss or the gradient became NaN or infinite; ``last.safetensors`` is untouched.
            EngineError: The device, or a process that prepares photos, had too little memory.
            KeyboardInterrupt: SIGINT, SIGTERM or SIGHUP came; the state was saved first.
        """
        try:
            remedy = f"use a smaller --batch than {self.config.batch}, or a smaller --size"
            with handled(self._stop_for, *EXITS), enough_memory(remedy):
                # The log has one row per finished epoch: a run that was stopped after an epoch's last step, before its
                # validation, takes up at the validation.
                while not self.finished:
                    self._epoch(len(self.state.ious))
                    self._validate()
                    if self.stopped_early:
                        self.observer.started(f"stopped: no better validation IoU for {self.config.early_stop} epochs")
        finally:
            # Workers end with their loader. They heed no SIGTERM, so Python would wait for them at its own end.
            self.loader = loader(self.photos.train, self.sampler, self.config, self.device, self.ranks)
            self._let_others_in()
        return self.output / BEST

    @property
    def finished(self) -> bool:
        """Whether the last epoch is done; a function of the log."""
        return len(self.state.ious) >= self.config.epochs or self.stopped_early

    @property
    def stopped_early(self) -> bool:
        """Whether epochs are left, and the best is ``early_stop`` epochs ago.

        That is a function of the log, so that a resumed run agrees.
        """
        return len(self.state.ious) < self.config.epochs and self.state.stalled(self.config.early_stop)

    @property
    def best(self) -> Row:
        """What ``best.safetensors`` says that it reached: a row of the log, or one that a crash took from it.

        Raises:
            CheckpointError: It is gone, or damaged.
        """
        return Row.from_dict(checkpoint.peek(self.output / BEST)["validation"])

    def _about(self, provenance: dict[str, Any]) -> dict[str, Any]:
        """What every checkpoint says of its run; JSON values. Exported files keep ``data``, but not ``config``."""
        config, teacher, init = to_dict(self.config), self.photos.teacher, self.photos.init
        return {
            "model": config["model"],
            "config": config,
            "data": self.photos.about(),
            "versions": {"petseg": __version__, "torch": torch.__version__},
            "precision": str(self.dtype).removeprefix("torch."),
            "device": torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu",
            "provenance": provenance,
            **({"teacher": teacher} if teacher else {}),
            **({"init": init} if init else {}),
        }

    def _callable(self) -> Callable[[Tensor], Any]:
        """The network as the steps call it: gradients averaged over processes, compiled, or as it is."""
        forward = self.ranks.wrap(self.objective.student(self.model), self.device)
        if self.device.type == "cuda":
            torch.backends.cudnn.benchmark = True  # all batches are of one shape: try the algorithms once
            if self.dtype is torch.float32:
                # Else convolutions would compute in TF32, and it would be called float32.
                torch.backends.cudnn.allow_tf32 = False
        return torch.compile(forward) if self.config.compile else forward

    def _stop_for(self, number: int, frame: object) -> None:
        """In place of ending the process."""
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
        labels = trimap.to(self.device, non_blocking=True)
        mixed = torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not torch.float32)
        with self.ranks.exchanging(), mixed:
            loss = self.objective(self.forward, image, labels)
        self.optimizer.zero_grad(set_to_none=True)
        with self.ranks.exchanging():
            self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self._weights, self.config.optimizer.clip)
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
        names = ", ".join(self.photos.train.names[i] for i in self.sampler.photos(step))
        last, change = self.last.path, "a lower optimizer.lr or another amp (amp=bf16 or fp32)"
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
            self.state.next_epoch(iou)

    def _measure_and_keep(self) -> float:
        """The moving average's IoU on the validation photos, once it is in the log and what is best is saved.

        Raises:
            KeyboardInterrupt: See :meth:`fit`.
        """
        state = self.state
        if not self.last.path.exists():
            self._write_last()  # what is killed while it writes the first best checkpoint can be resumed, too
        result = self._evaluate_ema()
        row = self._row(result)
        state.history.append(row)
        state.next_epoch(row.val_iou)
        if row.val_iou > state.best_iou:
            state.best_iou = row.val_iou
            self._save_best(result, row)
        if self.finished or self.last.pays:
            self._write_last()
        log.write(self.output / LOG, state.history)
        self.observer.validated(self._ema_run(), self.photos.good_val, row)
        self.observer.epoch(row)
        return row.val_iou

    def _row(self, result: Evaluation) -> Row:
        """What the log says of the epoch that is done."""
        state, threshold = self.state, best_threshold(result.total)
        headline = result.counts(threshold)
        if self.device.type == "cuda":
            state.peak_memory = max(state.peak_memory, torch.cuda.max_memory_allocated(self.device))
        return Row(
            epoch=state.step // len(self.sampler),
            step=state.step,
            loss=state.loss_sum / max(state.steps_summed, 1),
            val_iou=headline.iou,
            val_dice=headline.dice,
            val_threshold=threshold,
            val_mean_iou_border_ignored=float(result.image_ious(0.5, Border.IGNORED).mean()),
            seconds=state.seconds,
            images_per_s=state.steps_summed * self.config.batch / max(state.seconds, 1e-9),
            data_wait=state.waited / max(state.seconds, 1e-9),
            elapsed=self._elapsed(),
            skipped=len(self.photos.bad),
            gpu_memory=state.peak_memory,
        )

    def _elapsed(self) -> float:
        """Seconds of the whole run up to now."""
        now = time.perf_counter()
        self.state.elapsed += now - self._clock
        self._clock = now
        return self.state.elapsed

    def _ema_run(self) -> Run:
        assert isinstance(self.ema.module, AttentionUNet)
        return torch_run(self.ema.module, self.device)

    def _evaluate_ema(self) -> Evaluation:
        d, pairs, failed = self.config.data, self.photos.good_val, self.photos.failed
        run, watch = self._ema_run(), lambda done: self._heed_in_validation()
        # One process validates, and its device may have no room for more than its part of a batch.
        own = self.config.batch // self.ranks.size
        return evaluate(run, pairs, d.height, d.width, batch=own, watch=watch, failed=failed)

    def _heed_in_validation(self) -> None:
        """End a run that is to stop: it takes up at its validation, which may take longer than a scheduler waits.

        Of several processes, the others wait for this one's figure, and all heed the signal with the next step.
        """
        if self._stop and self.ranks.size == 1:
            self._write_last()
            raise KeyboardInterrupt

    def _save_best(self, result: Evaluation, row: Row) -> None:
        d = self.config.data
        spec = {
            "height": d.height,
            "width": d.width,
            "threshold": row.val_threshold,
            "cutout_threshold": best_threshold(result.total, Border.PET),
            "border_target": d.border_target,
            "certain_share": None,  # a choice that needs photos without a pet, too
        }
        meta = {**self.meta, "kind": "model", "spec": spec, "epoch": row.epoch, "validation": row.as_dict()}
        checkpoint.save_checkpoint(self.output / BEST, self.ema.module.state_dict(), meta)

    def _save_last(self) -> None:
        self.ranks.on_first(self._write_last, self.device)

    def _write_last(self) -> float:
        self._elapsed()
        meta = {
            **self.meta,
            "kind": "training",
            "masks": self.photos.masks(),
            "warnings": self.warnings,
            "state": self.state.as_dict(),
            "scaler": self.scaler.state_dict(),
        }
        self.last.write(tensors_of(self.model, self.objective.hints, self.ema, self.optimizer), meta)
        return 0.0

    def _take_up(self) -> None:
        """Go on where the run in the folder was stopped.

        Raises:
            TrainingError: It is another run.
            CheckpointError: Its state is damaged.
        """
        if self.ranks.first:
            remove_unfinished(self.output)
        room = "make room on the device (another program has some of its memory), and --resume once more"
        with self.last.taking_up() as saved, enough_memory(room):
            refuse_another_run(saved.meta, {**self.meta, "masks": self.photos.masks()}, self.output)
            load_tensors(saved.tensors, self.model, self.objective.hints, self.ema, self.optimizer)
            self._go_on_in(saved.meta["precision"])
            if saved.meta["scaler"]:  # empty: what it was computed in needs none
                self.scaler.load_state_dict(saved.meta["scaler"])
            self.state = RunState.from_dict(saved.meta["state"])
            self.meta["provenance"] = saved.meta["provenance"]
            self.meta |= {"init": saved.meta["init"]} if "init" in saved.meta else {}
            if "train_keys" in saved.meta["data"]:  # those of the weights that the run began with among them
                self.meta["data"]["train_keys"] = saved.meta["data"]["train_keys"]
            # What was said of those weights is not found out anew. (A state of an older version keeps none.)
            before = [warning for warning in saved.meta.get("warnings", ()) if warning not in self.warnings]
            self.warnings += before
        for warning in before:
            self.observer.started(f"warning: {warning}")
        self.observer.started(f"resumed at step {self.state.step}")
        if self.ranks.first:
            self._mend_after_a_crash()

    def _mend_after_a_crash(self) -> None:
        """Make the log that of the state, and keep a best checkpoint of an epoch that is not in it.

        The state is not saved after every epoch, and on a GPU an epoch, taken again, is not quite what it was.
        """
        if self.state.history:
            log.write(self.output / LOG, self.state.history)
        else:
            (self.output / LOG).unlink(missing_ok=True)
        try:
            row = self.best
        except (CheckpointError, LookupError, TypeError, ValueError, AttributeError):
            self.state.best_iou = -1.0  # else an epoch would have to be better than what is gone
            if self.state.history:
                self.observer.started(f"{BEST} is gone or damaged: what is kept is the best of the epochs from here on")
            return
        self.state.best_iou = row.val_iou
        if row.val_iou > max(self.state.ious, default=-1.0):
            kept = "not in the state: kept until there is a better one"
            self.observer.started(f"{BEST} is of epoch {row.epoch}, which is {kept}")

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

    def _doubts(self) -> Iterator[str]:
        """What is to be warned of in the settings."""
        last = self.config.epochs
        if (left := left_at_the_end(self.config.schedule, last)) > MUCH_LEFT:
            yield (
                f"the learning rate ends at {100 * left:.0f} % of its peak, because none of its periods ends with "
                f"epoch {last}: in a new run, --set schedule.restart_epochs={last} ends one there"
            )

    def _announce(self, doubts: Sequence[str]) -> None:
        parameters = sum(p.numel() for p in self.model.parameters())
        say, shape = self.observer.started, self.config.model
        name = "attention U-Net" if shape.stem == "full" else "attention U-Net with a strided stem"
        say(f"{name}, width {shape.width}, {parameters:,} parameters, {self.meta['precision']}")
        if self.ranks.size > 1:
            say(f"{self.ranks.size} processes, {self.config.batch // self.ranks.size} photos of a batch each")
        listed = f", as {VAL_LISTING} lists them, without data.val_fraction" if "val_names" in self.meta["data"] else ""
        say(f"{len(self.photos.train)} photos to train on, {len(self.photos.val)} for validation{listed}")
        if workers := self.loader.num_workers:
            say(f"{workers} processes augment them")
        if skipped := self.photos.train.skipped_empty:
            say(f"left out, because their masks show no pet: {', '.join(skipped)}")
        if tiny := self.photos.train.skipped_tiny:
            size = f"{self.config.data.height}x{self.config.data.width}"
            say(f"left out, because at {size} nothing is left of their pet: {', '.join(tiny)}")
        for warning in doubts:
            say(f"warning: {warning}")


def _no_model(path: Path) -> CheckpointError:
    return CheckpointError(f"{path}: the state of a run, not a model; give best.safetensors beside it")


def _optimizer(parameters: Sequence[nn.Parameter], config: TrainConfig) -> torch.optim.AdamW:
    """AdamW; weight decay on convolution kernels alone (BatchNorm and biases have one dimension)."""
    kernels = [p for p in parameters if p.ndim > 1]
    others = [p for p in parameters if p.ndim <= 1]
    groups = [
        {"params": kernels, "weight_decay": config.optimizer.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.optimizer.lr, fused=True)


def _one_behind(items: Iterable[T]) -> Iterator[T]:
    """Each item when the next one is there, and the last one at the end."""
    waiting: list[T] = []
    for item in items:
        yield from waiting
        waiting = [item]
    yield from waiting
