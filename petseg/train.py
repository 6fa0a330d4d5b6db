"""The training loop: mixed precision, an EMA of the weights, validation, checkpoints, and an orderly stop.

It builds on these modules: the photos (:mod:`petseg.run_photos`), the saved state of a run (:mod:`petseg.run_state`),
the initial weights (:mod:`petseg.warm_start`), the loss of a step (:mod:`petseg.objective`), the learning rate
(:mod:`petseg.schedule`), the log (:mod:`petseg.log`), and the observers of a run (:mod:`petseg.observers`). A run that
was killed and resumed takes the same steps as an uninterrupted one, bit for bit on a CPU.
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
from petseg.lock import lock_folder
from petseg.log import LOG, Row
from petseg.memory import check_shared_memory, enough_memory
from petseg.metrics import Border, best_threshold
from petseg.model import AttentionUNet, normalize
from petseg.objective import Distillation, Objective
from petseg.observers import Observer
from petseg.reference import torch_run
from petseg.run_photos import RunPhotos, loader, no_room_for_workers
from petseg.run_state import (
    BEST,
    RunState,
    StateFile,
    check_folder,
    check_same_run,
    load_tensors,
    remove_unfinished,
    tensors_of,
)
from petseg.schedule import final_rate, learning_rate
from petseg.train_set import EpochSampler
from petseg.warm_start import first_weights
from petseg_runtime import __version__
from petseg_runtime.artifact import open_artifact
from petseg_runtime.errors import CheckpointError, NonFiniteLoss, UsageError
from petseg_runtime.signals import EXITS, handled, held
from petseg_runtime.text import counted

__all__ = ["Step", "Trainer"]

T = TypeVar("T")

#: Below this scale, fp16's smallest gradients have long underflowed; a GradScaler that gets here will not recover.
MIN_SCALE = 1e-4
#: Above this share of its peak, the learning rate at the end of the run is warned about.
HIGH_FINAL_RATE = 0.05


@dataclass(frozen=True)
class Step:
    """An optimizer step that was issued to the device, which may not have executed it yet.

    Attributes:
        numbers: float32 [4] on the CPU, valid once ``arrived``: loss, gradient norm and stop request, all three summed
            over the ranks, and the GradScaler's scale after the step.
        arrived: On a GPU, the event that is recorded when the numbers have been copied.
        lr: The learning rate of the step.
    """

    numbers: Tensor
    arrived: torch.cuda.Event | None
    lr: float

    def read(self) -> tuple[float, float, float, float]:
        """Returns the numbers, after waiting for them."""
        if self.arrived is not None:
            self.arrived.synchronize()
        loss, norm, stops, scale = self.numbers.tolist()
        return loss, norm, stops, scale


class Trainer:
    """One training run: construct it, then call :meth:`fit`.

    Attributes:
        late: Whether a step's loss is read only after the next step was issued, so that a GPU always has work (with one
            GPU; with several, nn.SyncBatchNorm waits in every layer). A CPU executes a step as it is issued. All losses
            are read before anything is saved or validated, and at the end.
        stopped_by: The signal that stopped the run, if one did.
        photos: The photos of the run, and which were excluded.
        state: The progress of the run.
        last: The file that the run is resumed from if it is stopped.
        meta: The description of the run in every checkpoint; JSON values.
        warnings: Why the figures of the run may be worse than they look; each was also reported to the observer.
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
        """Read the data and build the network; with ``resume``, load the state of a stopped run.

        Args:
            config: The settings of the run.
            root: The data folder.
            output: The folder for checkpoints and log.
            device: CUDA or CPU.
            init: A checkpoint to start from, instead of random weights. From a checkpoint of another architecture, the
                tensors whose names and shapes match are used; they must be at least half of the network's.
            teacher: A checkpoint or exported file whose probabilities are part of the target. With ``loss.features`` it
                must be a checkpoint, whose features are learned, too. See :class:`petseg.config.LossConfig`.
            resume: Resume from ``output/last.safetensors``.
            observer: Receives the events of the run.
            provenance: Stored in the checkpoints unchanged (the command line, for example).
            ranks: Rank and world size, see :mod:`petseg.distributed`. The default is a single process.

        Raises:
            DataError: The data cannot be used.
            UsageError: The device does not support the precision, or the batch cannot be split evenly over the ranks.
            TrainingError: The folder already holds a run, has no run to resume, or has one with other settings; another
                process is training there; ``init`` was trained on photos that this run validates on; or another rank
                has different photos.
            OutputError: The photos do not fit into memory, and ``output`` has no room for them.
            CheckpointError: ``init`` or the state to resume is damaged or belongs to another network; or the teacher is
                not a checkpoint although its features are to be learned.
            ModelError: The teacher cannot be read.
        """
        self.config, self.output, self.device = config, output, device
        self.observer = observer or Observer()
        self.ranks = ranks or Ranks()
        self.late, self.stopped_by = device.type == "cuda", signal.SIGINT
        self._clock = self._mark = time.perf_counter()
        self._stop = self._agreed = False  # not an Event, on whose lock a handler could block if it interrupts another
        check_folder(output, resume)
        # Locked until `unlock`, or until a trainer that never gets there is garbage-collected.
        with held():  # a signal in between would leave the lock file
            self._release = weakref.finalize(self, lock_folder(output) if self.ranks.first else lambda: None)
        if self.ranks.first:
            remove_unfinished(output)
        self.last = StateFile(output)
        inside = self._check_models(None if resume else init, teacher)
        if resume:
            self.last.check_settings(config, taught=teacher is not None)
        self.dtype = self._precision(resume)
        self.photos = RunPhotos(
            config,
            root,
            output,
            device=device,
            teacher=teacher,
            observer=self.observer,
            ranks=self.ranks,
            without=self.last.excluded() if resume else (),
        )
        train = self.photos.train
        self.sampler = EpochSampler(len(train), config.batch, config.seed, self.ranks.rank, self.ranks.size)
        self.loader = loader(train, self.sampler, config, device, self.ranks)
        self.observer.begin(len(self.sampler), config.batch)
        torch.manual_seed(config.seed)
        if init and resume:
            self.observer.started(f"{init} is not read, because the resumed run has its own weights")
        room = "free some memory on the device, or use a network of a smaller --width"
        with enough_memory(room):
            network = self.first_network(None if resume else init)
            self.model = network.to(device).to(memory_format=torch.channels_last)
            self.ema = MovingAverage(self.model, config.ema)
            synchronized(self.model, self.ranks, device)
        with enough_memory("train without --teacher, or with a smaller one"):
            self.objective = self._objective(inside)
        with enough_memory(room):
            modules = (self.model, self.objective.hints)
            self._weights = [weight for each in modules for weight in each.parameters() if weight.requires_grad]
            self.optimizer = _optimizer(self._weights, config)
        self.scaler = self._scaler()
        self.state = RunState()
        self.meta = self._about(provenance or {})
        doubts = list(self._setting_warnings())
        self.warnings = [*self.photos.warnings, *doubts]  # RunPhotos has already reported its own
        self._announce(doubts)
        if resume:
            self._resume()
        self.forward = self._callable()

    def _precision(self, resume: bool) -> torch.dtype:
        """Returns the precision of the run.

        Raises:
            UsageError: The device does not support it.
        """
        try:
            return pick_precision(self.config.amp, self.device)
        except UsageError as error:
            if not resume:
                raise
            reason, last = str(error).partition(";")[0], self.last.path
            raise UsageError(
                f"{reason}; a resumed run keeps its amp: resume on a device that supports it, or start a new run in "
                f"another --output, with another amp and --init {last}"
            ) from error

    def _check_models(self, init: Path | None, teacher: Path | None) -> AttentionUNet | None:
        """Check the given models before minutes of reading photos; returns the teacher of features, or None.

        Raises:
            ModelError: A file is missing or is not the kind of model that is needed.
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
            raise _not_a_model(teacher)
        return None

    def first_network(self, init: Path | None) -> AttentionUNet:
        """Returns the network that the run starts with; subclasses that train another network override this."""
        return first_weights(self.config.model, init, self.photos, self.observer.started)

    def teacher_network(self, path: Path) -> AttentionUNet:
        """Load the network whose features are learned; subclasses with another kind of teacher override this.

        Raises:
            CheckpointError: The file is not a checkpoint, is damaged, or is the state of a run.
        """
        if path.suffix in checkpoint.EXPORTED:
            raise CheckpointError(
                f"{path}: an exported file, whose features cannot be accessed; give the checkpoint that it was made "
                "from, or --set loss.features=0 to learn from its probabilities only"
            )
        network, loaded = checkpoint.load_model(path)
        if loaded.spec() is None:
            raise _not_a_model(path)
        return network

    def _objective(self, teacher: AttentionUNet | None) -> Objective:
        """Returns the loss that the steps minimise."""
        if teacher is None:
            return Objective(self.config, self.ranks)
        return Distillation(self.config, self.ranks, self.model, teacher, self.device)

    def fit(self) -> Path:
        """Train to the last epoch, as :meth:`train` does, and let other runs use the folder."""
        best = self.train()
        self.unlock()
        return best

    def train(self) -> Path:
        """Train to the last epoch. The folder stays locked, for a caller that writes more files to it.

        After an error it is unlocked.

        Returns:
            The path of the best checkpoint.

        Raises:
            NonFiniteLoss: The loss or the gradient became NaN or infinite; ``last.safetensors`` is untouched.
            EngineError: The device, or a dataloader worker, ran out of memory.
            KeyboardInterrupt: SIGINT, SIGTERM or SIGHUP arrived; the state was saved first.
        """
        remedy = f"use a smaller --batch than {self.config.batch}, or a smaller --size"
        with contextlib.ExitStack() as after_an_error:
            after_an_error.callback(self.unlock)
            try:
                with handled(self._request_stop, *EXITS), enough_memory(remedy):
                    # The log has one row per finished epoch, so a run that was stopped between an epoch's last step and
                    # its validation resumes with the validation.
                    while not self.finished:
                        self._epoch(len(self.state.ious))
                        self._validate()
                        if self.stopped_early:
                            patience = self.config.early_stop
                            self.observer.started(f"stopped: no better validation IoU for {patience} epochs")
            finally:
                self._end_workers()
            after_an_error.pop_all()
        return self.output / BEST

    def _end_workers(self) -> None:
        """End the dataloader workers, which ignore SIGTERM: Python would wait for them at exit.

        They end with their iterator, but an error that came from a worker refers to it until it is garbage-collected.
        """
        if self.loader._iterator is not None:
            self.loader._iterator._shutdown_workers()  # type: ignore[attr-defined]
        self.loader = loader(self.photos.train, self.sampler, self.config, self.device, self.ranks)

    def unlock(self) -> None:
        """Let other runs use the folder."""
        self._release()

    @property
    def finished(self) -> bool:
        """Whether the last epoch is done; depends on the log only."""
        return len(self.state.ious) >= self.config.epochs or self.stopped_early

    @property
    def stopped_early(self) -> bool:
        """Whether epochs remain, but the best one is ``early_stop`` or more epochs ago.

        This depends on the log only, so that a resumed run makes the same decision.
        """
        return len(self.state.ious) < self.config.epochs and self.state.stalled(self.config.early_stop)

    @property
    def best(self) -> Row:
        """The validation row stored in ``best.safetensors``; a crash may have removed its epoch from the log.

        Raises:
            CheckpointError: The file is missing or damaged.
        """
        path = self.output / BEST
        meta = checkpoint.peek(path)
        try:
            return Row.from_dict(meta["validation"])
        except (LookupError, TypeError, ValueError) as error:
            raise CheckpointError(f"{path}: its validation row is damaged or incomplete ({error!r})") from error

    def _about(self, provenance: dict[str, Any]) -> dict[str, Any]:
        """Returns what every checkpoint says of its run, as JSON. Exported files keep ``data`` but not ``config``."""
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
        """Returns the network as the steps call it: wrapped in DDP if there are several ranks, and compiled if set."""
        forward = self.ranks.wrap(self.objective.student(self.model), self.device)
        if self.device.type == "cuda":
            torch.backends.cudnn.benchmark = True  # all batches have one shape: benchmark the algorithms once
            if self.dtype is torch.float32:
                # Otherwise convolutions would compute in TF32 under the name of float32.
                torch.backends.cudnn.allow_tf32 = False
        return torch.compile(forward) if self.config.compile else forward

    def _request_stop(self, number: int, frame: object) -> None:
        """Signal handler: request a stop after the current step."""
        self.stopped_by = signal.Signals(number)
        self._stop = True

    @property
    def _stopping(self) -> bool:
        """Whether to stop. Several ranks must stop after the same step, so each follows the all-reduced request."""
        return self._agreed if self.ranks.size > 1 else self._stop

    def _epoch(self, epoch: int) -> None:
        """Run the remaining steps of an epoch.

        Raises:
            NonFiniteLoss: See :meth:`train`.
            KeyboardInterrupt: See :meth:`train`.
        """
        self.sampler.epoch, self.sampler.start = epoch, self.state.step - epoch * len(self.sampler)
        self.model.train()
        self._mark = time.perf_counter()
        with contextlib.closing(self._steps()) as steps:
            for step in _delayed(steps) if self.late else steps:
                self._settle(step)
        if self._stopping:
            self.ranks.on_first(self._write_last, self.device)
            raise KeyboardInterrupt

    def _steps(self) -> Generator[Step, None, None]:
        """Issue the remaining steps of an epoch until a stop is requested; the caller settles them in this order."""
        schedule, peak, epochs = self.config.schedule, self.config.optimizer.lr, self.config.epochs
        if self.loader.num_workers:
            check_shared_memory()
        asked = time.perf_counter()
        for number, (photo, trimap, _) in enumerate(self.loader, self.state.step):
            self.state.waited += time.perf_counter() - asked
            yield self._step(photo, trimap, learning_rate(schedule, peak, number, len(self.sampler), epochs))
            if self._stopping:
                return
            asked = time.perf_counter()

    def _step(self, photo: Tensor, trimap: Tensor, lr: float) -> Step:
        """Issue one step to the device, without waiting for it to execute (with several GPUs, see ``late``)."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        image = normalize(photo.to(self.device, non_blocking=True))
        labels = trimap.to(self.device, non_blocking=True)
        mixed = torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not torch.float32)
        with self.ranks.communicating(), mixed:
            loss = self.objective(self.forward, image, labels)
        self.optimizer.zero_grad(set_to_none=True)
        with self.ranks.communicating():
            self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self._weights, self.config.optimizer.clip)
        stop = torch.full_like(norm, float(self._stop))
        numbers = self.ranks.sum(torch.stack((loss.detach(), norm, stop)))
        if not self.scaler.is_enabled():
            # Where this is 1, the fused AdamW leaves the weights unchanged; the run ends once the loss has been read.
            # (An enabled GradScaler sets it itself.)
            self.optimizer.found_inf = 1 - numbers[:2].isfinite().all().float()  # type: ignore[attr-defined]
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.ema.update(self.model)
        scale = self.scaler.scale(torch.ones_like(norm))
        return self._start_copy(torch.cat((numbers, scale[None])), lr)

    def _start_copy(self, numbers: Tensor, lr: float) -> Step:
        """Returns a step whose numbers are being copied to the CPU."""
        if self.device.type == "cpu":
            return Step(numbers, None, lr)
        # Reading a GPU tensor waits for all work issued so far, including the next step; the event fires as soon as
        # this copy is done. A blocking event leaves the core to the dataloader workers meanwhile.
        numbers, arrived = numbers.to("cpu", non_blocking=True), torch.cuda.Event(blocking=True)
        arrived.record(torch.cuda.current_stream(self.device))
        return Step(numbers, arrived, lr)

    def _settle(self, step: Step) -> None:
        """Read a step's numbers, add them to the state, and call the observer, whose time is not counted.

        Raises:
            NonFiniteLoss: The loss or the gradient norm is NaN or infinite.
        """
        loss, norm, stops, scale = step.read()
        loss, norm = loss / self.ranks.size, norm / self.ranks.size
        self._agreed = stops > 0
        # Under fp16 an infinite gradient is left to the GradScaler, which skips the step and lowers its scale.
        overflow = self.scaler.is_enabled() and not math.isfinite(norm)
        if not math.isfinite(loss) or not (math.isfinite(norm) or overflow):
            self._give_up(f"loss {loss}, gradient norm {norm}")
        if overflow and scale < MIN_SCALE:
            self._give_up(f"gradients overflow in fp16 even at a scale of {scale:.1e}")
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
            f"the last good checkpoint is {last}. --resume would repeat the same steps, so start from that checkpoint "
            f"(--init {last}) in another --output, with {change}"
            if last.exists()
            else f"no checkpoint had been written yet. Start again with {change}"
        )
        raise NonFiniteLoss(f"{what} in epoch {epoch + 1}, batch {step + 1} ({names}); {remedy}, or check those photos")

    def _validate(self) -> None:
        """Rank 0 validates, writes the files and calls the observer; the other ranks wait for its result."""
        iou = self.ranks.on_first(self._measure_and_keep, self.device)
        if not self.ranks.first:
            self.state.next_epoch(iou)

    def _measure_and_keep(self) -> float:
        """Validate the EMA weights, save the checkpoints that are due, write the log; returns the validation IoU.

        Raises:
            KeyboardInterrupt: See :meth:`train`.
        """
        state = self.state
        if not self.last.path.exists():
            self._write_last()  # so that a run that is killed while writing the first best checkpoint can be resumed
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
        """Returns the log's row for the epoch that is done."""
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
        """Returns the seconds of the whole run so far."""
        now = time.perf_counter()
        self.state.elapsed += now - self._clock
        self._clock = now
        return self.state.elapsed

    def _ema_run(self) -> Run:
        assert isinstance(self.ema.module, AttentionUNet)
        return torch_run(self.ema.module, self.device)

    def _evaluate_ema(self) -> Evaluation:
        d, pairs, failed = self.config.data, self.photos.good_val, self.photos.failed
        run, watch = self._ema_run(), lambda done: self._stop_in_validation()
        # Only rank 0 validates, and its device may not have room for more than its part of a batch.
        own = self.config.batch // self.ranks.size
        return evaluate(run, pairs, d.height, d.width, batch=own, watch=watch, failed=failed)

    def _stop_in_validation(self) -> None:
        """Stop during a validation, which may take longer than a scheduler waits; the run resumes with that validation.

        With several ranks the others wait for this one's result, so all of them stop after the next step instead.
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
            "certain_share": None,  # choosing it needs photos without a pet, too
        }
        meta = {**self.meta, "kind": "model", "spec": spec, "epoch": row.epoch, "validation": row.as_dict()}
        checkpoint.save_checkpoint(self.output / BEST, self.ema.module.state_dict(), meta)

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

    def _resume(self) -> None:
        """Load the state of the run in the folder.

        Raises:
            TrainingError: It is a different run.
            CheckpointError: Its state is damaged.
        """
        room = "free some memory on the device (another program is using it), then --resume again"
        with self.last.opened() as saved, enough_memory(room):
            check_same_run(saved.meta, {**self.meta, "masks": self.photos.masks()}, self.output)
            load_tensors(saved.tensors, self.model, self.objective.hints, self.ema, self.optimizer)
            self._keep_precision(saved.meta["precision"])
            if saved.meta["scaler"]:  # empty if the precision needs no GradScaler
                self.scaler.load_state_dict(saved.meta["scaler"])
            self.state = RunState.from_dict(saved.meta["state"])
            self.meta["provenance"] = saved.meta["provenance"]
            self.meta |= {"init": saved.meta["init"]} if "init" in saved.meta else {}
            self.meta["data"]["train_keys"] = saved.meta["data"]["train_keys"]  # also those of the --init checkpoint
            # Warnings about the --init checkpoint are not raised again on resuming.
            before = [warning for warning in saved.meta["warnings"] if warning not in self.warnings]
            self.warnings += before
        for warning in before:
            self.observer.started(f"warning: {warning}")
        self.observer.started(f"resumed at step {self.state.step}" + (", the last one" if self.finished else ""))
        if self.ranks.first:
            self._repair_after_crash()

    def _repair_after_crash(self) -> None:
        """Rewrite the log from the state, and keep a best checkpoint of an epoch that the state does not have.

        The state is not saved after every epoch, and on a GPU a repeated epoch does not give exactly the same weights.
        """
        if self.state.history:
            log.write(self.output / LOG, self.state.history)
        else:
            (self.output / LOG).unlink(missing_ok=True)
        try:
            row = self.best
        except CheckpointError:
            self.state.best_iou = -1.0  # otherwise an epoch would have to beat a checkpoint that is gone
            if self.state.history:
                self.observer.started(f"{BEST} is missing or damaged; the best of the epochs from here on is kept")
            return
        self.state.best_iou = row.val_iou
        if row.val_iou > max(self.state.ious, default=-1.0):
            self.observer.started(
                f"{BEST} is from epoch {row.epoch}, which the saved state does not have; kept until a better one"
            )

    def _scaler(self) -> torch.amp.GradScaler:
        return torch.amp.GradScaler(self.device.type, enabled=self.dtype is torch.float16)

    def _keep_precision(self, before: str) -> None:
        """Keep the precision of the run so far if this device supports it; ``amp=auto`` may choose another one here."""
        chosen = self.meta["precision"]
        if before == chosen:
            return
        if before == "float32" or (before == "float16" and self.device.type == "cuda"):
            self.dtype, self.meta["precision"] = getattr(torch, before), before
            self.scaler = self._scaler()
            self.observer.started(f"computing in {before}, as so far; this device would choose {chosen}")
        else:
            why = f"this device does not support {before}, used so far"
            self.observer.started(
                f"computing in {chosen} from here on ({why}): the weights will differ slightly from an unbroken run's"
            )

    def _setting_warnings(self) -> Iterator[str]:
        """Yields a warning for each questionable setting."""
        last = self.config.epochs
        if (left := final_rate(self.config.schedule, last)) > HIGH_FINAL_RATE:
            yield (
                f"the learning rate ends at {100 * left:.0f} % of its peak, because no schedule period ends with "
                f"epoch {last}; in a new run, --set schedule.restart_epochs={last} makes one end there"
            )

    def _announce(self, doubts: Sequence[str]) -> None:
        parameters = sum(p.numel() for p in self.model.parameters())
        say, shape = self.observer.started, self.config.model
        name = "attention U-Net" if shape.stem == "full" else "attention U-Net with a strided stem"
        where = f"{self.meta['precision']} on {self.meta['device']}"
        say(f"{name}, width {shape.width}, {parameters:,} parameters, {where}")
        if self.ranks.size > 1:
            say(f"{self.ranks.size} processes, {self.config.batch // self.ranks.size} photos of each batch per process")
        listed = f", listed in {VAL_LISTING}; data.val_fraction is ignored" if "val_names" in self.meta["data"] else ""
        say(f"{counted(len(self.photos.train), 'photo')} to train on, {len(self.photos.val)} for validation{listed}")
        if workers := self.loader.num_workers:
            say(f"{workers} dataloader workers augment them")
        if lack := no_room_for_workers(self.photos.train, self.config, self.device, self.ranks):
            say(f"warning: {lack}")
        if skipped := self.photos.train.skipped_empty:
            say(f"excluded, because their masks show no pet: {', '.join(skipped)}")
        if tiny := self.photos.train.skipped_tiny:
            size = f"{self.config.data.height}x{self.config.data.width}"
            say(f"excluded, because at {size} nothing is left of their pet: {', '.join(tiny)}")
        for warning in doubts:
            say(f"warning: {warning}")


def _not_a_model(path: Path) -> CheckpointError:
    return CheckpointError(f"{path}: the state of a run, not a model; give the best.safetensors beside it")


def _optimizer(parameters: Sequence[nn.Parameter], config: TrainConfig) -> torch.optim.AdamW:
    """AdamW with weight decay on convolution kernels only (BatchNorm parameters and biases have one dimension)."""
    kernels = [p for p in parameters if p.ndim > 1]
    others = [p for p in parameters if p.ndim <= 1]
    groups = [
        {"params": kernels, "weight_decay": config.optimizer.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.optimizer.lr, fused=True)


def _delayed(items: Iterable[T]) -> Iterator[T]:
    """Yields each item once the next one is there, and the last one at the end."""
    waiting: list[T] = []
    for item in items:
        yield from waiting
        waiting = [item]
    yield from waiting
