"""The training loop: mixed precision, schedule, moving average, exact resume.

Everything random is a function of (seed, epoch, photo), and the learning rate one of the step, so the state of a run
is its weights, its moving average, its optimizer and one number: the step. A run that was killed and resumed takes
the same steps as one that was not.
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import io
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader

from petseg import checkpoint
from petseg.config import DataConfig, ScheduleConfig, TrainConfig, from_dict, to_dict
from petseg.data import EpochSampler, Pair, Split, TrainSet, find, target_of
from petseg.device import pick_precision
from petseg.evaluate import Evaluation, evaluate, open_model, torch_run
from petseg.losses import bce_dice
from petseg.metrics import Border, best_threshold
from petseg.model import AttentionUNet, normalize
from petseg_runtime import __version__, images
from petseg_runtime.errors import CheckpointError, NonFiniteLoss, OutputError, TrainingError
from petseg_runtime.files import write_atomic

__all__ = ["BEST", "LAST", "LOG", "Observer", "RunState", "Trainer", "learning_rate"]

U8: TypeAlias = npt.NDArray[np.uint8]

#: The best moving average so far: the checkpoint to evaluate and export.
BEST = "best.safetensors"
#: The whole training state, for ``--resume``.
LAST = "last.safetensors"
#: One line per epoch.
LOG = "log.csv"


class Observer:
    """Told what happens during a run; the command line prints it, the default does nothing.

    Attributes:
        per_epoch: Steps in an epoch; set before the first step.
        batch: Photos per step; likewise.
    """

    per_epoch: int = 0
    batch: int = 0

    def started(self, message: str) -> None:
        """Something worth knowing before the first step."""

    def step(self, state: RunState, loss: float, lr: float) -> None:
        """A step is done."""

    def epoch(self, row: dict[str, float]) -> None:
        """An epoch is done and validated; the row is the log's."""


@dataclass
class RunState:
    """Where a run stands; saved in ``last.safetensors`` beside the tensors."""

    step: int = 0
    best_iou: float = -1.0
    loss_sum: float = 0.0
    steps_summed: int = 0
    seconds: float = 0.0
    waited: float = 0.0
    history: list[dict[str, float]] = field(default_factory=list)


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
    """One run: built once, then :meth:`fit`."""

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

        Raises:
            DataError: The data cannot be used.
            TrainingError: The folder already holds a run, or holds none to resume, or one of another config.
            CheckpointError: ``init`` or the state to resume is damaged, or of another network.
        """
        self.config, self.output, self.device = config, output, device
        self.observer = observer or Observer()
        self._check_output(resume)
        self.dtype = pick_precision(config.amp, device)
        d = config.data
        train_pairs, self.val_pairs = (
            find(root, split, val_fraction=d.val_fraction, seed=d.split_seed) for split in (Split.TRAIN, Split.VAL)
        )
        self.observer.started(f"reading {len(train_pairs)} photos into memory")
        with _teacher(teacher, d, device) as (taught, about_teacher):
            self.train_set = TrainSet(train_pairs, d.height, d.width, config.augment, config.seed, taught)
        self.sampler = EpochSampler(len(self.train_set), config.batch, config.seed)
        self.loader = DataLoader(
            self.train_set,
            batch_sampler=self.sampler,
            num_workers=d.workers,
            pin_memory=device.type == "cuda",
            worker_init_fn=_leave_signals_to_the_parent,
        )
        self.observer.per_epoch, self.observer.batch = len(self.sampler), config.batch
        torch.manual_seed(config.seed)
        self.model = self._start_weights(init).to(device).to(memory_format=torch.channels_last)
        self.ema = AveragedModel(self.model, multi_avg_fn=_ema_update(config.ema), use_buffers=True)
        self.optimizer = _optimizer(self.model, config)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.dtype is torch.float16)
        self.state = RunState()
        self.meta: dict[str, Any] = {
            "model": to_dict(config)["model"],
            "config": to_dict(config),
            "data": {
                "folder": root.name,
                "train_photos": len(self.train_set),
                "val_photos": len(self.val_pairs),
                "skipped_without_pet": self.train_set.skipped_empty,
                "names_sha256": _digest(self.train_set.names, self.val_pairs),
            },
            "versions": {"petseg": __version__, "torch": torch.__version__},
            "precision": str(self.dtype).removeprefix("torch."),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
            "provenance": provenance or {},
            **({"teacher": about_teacher} if about_teacher else {}),
        }
        self._announce()
        if resume:
            self._restore()

    def fit(self) -> Path:
        """Train to the last epoch.

        Returns:
            The path of the best checkpoint.

        Raises:
            NonFiniteLoss: The loss or the gradient became NaN or infinite; ``last.safetensors`` is untouched.
            KeyboardInterrupt: SIGINT or SIGTERM came; the state was saved first.
        """
        with _stop_signals() as stop:
            # The log has one row per finished epoch: a run that was stopped after an epoch's last step, before its
            # validation, takes up at the validation.
            for epoch in range(len(self.state.history), self.config.epochs):
                self._epoch(epoch, stop)
                self._validate()
        return self.output / BEST

    def _epoch(self, epoch: int, stop: threading.Event) -> None:
        state, per_epoch = self.state, len(self.sampler)
        self.sampler.epoch, self.sampler.start = epoch, state.step - epoch * per_epoch
        self.model.train()
        mark = time.perf_counter()
        for photo, trimap, index in self.loader:
            got = time.perf_counter()
            lr = learning_rate(
                self.config.schedule, self.config.optimizer.lr, state.step, per_epoch, self.config.epochs
            )
            loss = self._step(photo, trimap, index, lr)
            state.step += 1
            state.loss_sum += loss
            state.steps_summed += 1
            now = time.perf_counter()
            state.seconds += now - mark
            state.waited += got - mark
            mark = now
            self.observer.step(state, loss, lr)
            if stop.is_set():
                self._save_last()
                raise KeyboardInterrupt

    def _step(self, photo: Tensor, trimap: Tensor, index: Tensor, lr: float) -> float:
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        image = normalize(photo.to(self.device, non_blocking=True))
        weights = self.config.loss
        labels = trimap.to(self.device, non_blocking=True)
        target = target_of(labels, self.config.data.border_target, weights.teacher)
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not torch.float32):
            logits = self.model(image)
        loss = bce_dice(logits, target, weights.bce, weights.dice, weights.epsilon)
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.config.optimizer.clip)
        loss_value, norm_value = torch.stack((loss.detach(), norm)).tolist()  # one wait for the device
        # An infinite gradient under fp16 is the scaler's business: it skips the step and scales less.
        if not math.isfinite(loss_value) or not (math.isfinite(norm_value) or self.scaler.is_enabled()):
            self._stop_non_finite(loss_value, norm_value, index)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.ema.update_parameters(self.model)
        return float(loss_value)

    def _stop_non_finite(self, loss: float, norm: float, index: Tensor) -> None:
        epoch, step = divmod(self.state.step, len(self.sampler))
        names = ", ".join(self.train_set.names[i] for i in index.tolist())
        last = self.output / LAST
        kept = f"the last good checkpoint is {last}" if last.exists() else "no checkpoint had been written yet"
        raise NonFiniteLoss(
            f"loss {loss}, gradient norm {norm} in epoch {epoch + 1}, batch {step + 1} ({names}); {kept}. "
            "Try a lower optimizer.lr, amp=fp32, or look at those photos"
        )

    def _validate(self) -> None:
        state, per_epoch = self.state, len(self.sampler)
        result = self._evaluate_ema()
        threshold = best_threshold(result.total)
        headline = result.counts(threshold)
        row = {
            "epoch": state.step // per_epoch,
            "step": state.step,
            "loss": state.loss_sum / max(state.steps_summed, 1),
            "val_iou": headline.iou,
            "val_dice": headline.dice,
            "val_threshold": threshold,
            "val_mean_iou_border_ignored": float(result.image_ious(0.5, Border.IGNORED).mean()),
            "seconds": state.seconds,
            "images_per_s": state.steps_summed * self.config.batch / max(state.seconds, 1e-9),
            "data_wait": state.waited / max(state.seconds, 1e-9),
        }
        state.history.append(row)
        state.loss_sum = state.seconds = state.waited = 0.0
        state.steps_summed = 0
        if headline.iou > state.best_iou:
            state.best_iou = headline.iou
            self._save_best(result, threshold, row)
        self._save_last()
        self._write_log()
        self.observer.epoch(row)

    def _evaluate_ema(self) -> Evaluation:
        d = self.config.data
        run = torch_run(_ema_module(self.ema), self.device)
        return evaluate(run, self.val_pairs, d.height, d.width, batch=self.config.batch)

    def _save_best(self, result: Evaluation, threshold: float, row: dict[str, float]) -> None:
        d = self.config.data
        spec = {
            "height": d.height,
            "width": d.width,
            "threshold": threshold,
            "cutout_threshold": best_threshold(result.total, Border.PET),
            "border_target": d.border_target,
        }
        meta = {**self.meta, "kind": "model", "spec": spec, "epoch": row["epoch"], "validation": row}
        checkpoint.save_checkpoint(self.output / BEST, _ema_module(self.ema).state_dict(), meta)

    def _save_last(self) -> None:
        tensors = dict(self.model.state_dict())
        tensors |= {f"ema/{name}": t for name, t in _ema_module(self.ema).state_dict().items()}
        tensors["ema_updates"] = self.ema.n_averaged
        for index, slots in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer/{index}/{slot}": value for slot, value in slots.items()}
        meta = {**self.meta, "kind": "training", "state": vars(self.state), "scaler": self.scaler.state_dict()}
        checkpoint.save_checkpoint(self.output / LAST, tensors, meta)

    def _restore(self) -> None:
        path = self.output / LAST
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
        _ema_module(self.ema).load_state_dict(ema)
        self.ema.n_averaged.copy_(t["ema_updates"])
        slots: dict[int, dict[str, Tensor]] = {}
        for name, value in t.items():
            if name.startswith("optimizer/"):
                _, number, slot = name.split("/")
                slots.setdefault(int(number), {})[slot] = self._laid_out(int(number), value)
        for index in range(len(list(self.model.parameters()))):
            if missing := {"step", "exp_avg", "exp_avg_sq"} - slots.get(index, {}).keys():
                raise ValueError(f"optimizer state {index} lacks {', '.join(sorted(missing))}")
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": slots})
        self.scaler.load_state_dict(saved.meta["scaler"])
        self.state = RunState(**saved.meta["state"])
        self.meta["provenance"] = saved.meta["provenance"]
        self.observer.started(f"resumed at step {self.state.step}")

    def _laid_out(self, index: int, value: Tensor) -> Tensor:
        """A moment in the memory layout of its weight: the fused AdamW walks both as they lie (channels_last)."""
        weight = [p for group in self.optimizer.param_groups for p in group["params"]][index]
        if value.shape != weight.shape:
            return value  # the step count
        return torch.empty_like(weight, requires_grad=False).copy_(value)

    def _write_log(self) -> None:
        text = io.StringIO()
        writer = csv.DictWriter(text, fieldnames=list(self.state.history[0]))
        writer.writeheader()
        writer.writerows(self.state.history)
        try:
            write_atomic(self.output / LOG, text.getvalue().encode())
        except OSError as error:
            raise OutputError(f"{self.output / LOG}: cannot be written ({error.strerror or error})") from error

    def _start_weights(self, init: Path | None) -> AttentionUNet:
        if init is None:
            return AttentionUNet(self.config.model)
        given, loaded = checkpoint.load_model(init)
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
        if not resume and last.exists():
            raise TrainingError(
                f"{self.output} already holds a run: --resume goes on with it, or choose another folder"
            )

    def _announce(self) -> None:
        parameters = sum(p.numel() for p in self.model.parameters())
        say, shape = self.observer.started, self.config.model
        name = "attention U-Net" if shape.stem == "full" else "attention U-Net with a strided stem"
        say(f"{name}, width {shape.width}, {parameters:,} parameters, {self.meta['precision']}")
        say(f"{len(self.train_set)} photos to train on, {len(self.val_pairs)} for validation")
        if skipped := self.train_set.skipped_empty:
            say(f"left out, because their masks show no pet: {', '.join(skipped)}")


@contextlib.contextmanager
def _teacher(
    path: Path | None, config: DataConfig, device: torch.device
) -> Iterator[tuple[Callable[[U8], U8] | None, dict[str, str]]]:
    """What another model says of a photo, at the training size, and which model it is; without a path nothing.

    It is asked about the photo and its mirror image, and the mean is taken: a better teacher for twice the time, once.

    Raises:
        ModelError: It cannot be read.
    """
    if path is None:
        yield None, {}
        return
    with open_model(path, str(device)) as model:

        def ask(photo: U8) -> U8:
            inputs = images.to_model(photo, model.height, model.width)
            straight, mirrored = model.run(np.stack((inputs, inputs[:, ::-1]))).astype(np.uint16)
            mean = (straight + mirrored[:, ::-1] + 1) // 2
            return images.from_model(mean.astype(np.uint8), config.height, config.width)

        about = model.describe()
        yield ask, {"file": path.name, "identity": about.get("sha256") or about["identity"]}


def _ema_update(decay: float) -> Any:
    """Exponential moving average whose decay grows to its value, so that random first weights are soon forgotten."""

    def update(averages: Sequence[Tensor], currents: Sequence[Tensor], updates: Tensor | int) -> None:
        n = int(updates)
        weight = 1 - min(decay, (1 + n) / (10 + n))
        for average, current in zip(averages, currents, strict=True):
            if average.is_floating_point():
                average.lerp_(current, weight)
            else:
                average.copy_(current)

    return update


def _ema_module(ema: AveragedModel) -> AttentionUNet:
    module = ema.module
    assert isinstance(module, AttentionUNet)
    return module


def _optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW; weight decay on convolution kernels alone (BatchNorm and biases have one dimension)."""
    kernels = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [
        {"params": kernels, "weight_decay": config.optimizer.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.optimizer.lr, fused=True)


def _digest(train: Sequence[str], val: Sequence[Pair]) -> str:
    names = "\n".join([*train, "--", *(pair.name for pair in val)])
    return hashlib.sha256(names.encode()).hexdigest()


def _differences(old: dict[str, Any], new: dict[str, Any], where: str = "") -> list[str]:
    found = []
    for key in sorted({*old, *new}):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found += _differences(a, b, f"{where}{key}.")
        elif a != b:
            found.append(f"{where}{key} was {a!r}, now {b!r}")
    return found


def _leave_signals_to_the_parent(worker: int) -> None:
    """Ctrl-C reaches the whole process group; a worker that died of it would take the orderly stop down with it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


@contextlib.contextmanager
def _stop_signals() -> Iterator[threading.Event]:
    """SIGINT and SIGTERM set an event, which the loop looks at between two steps."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # signals cannot be handled elsewhere
        yield stop
        return

    def handler(number: int, frame: FrameType | None) -> None:
        stop.set()

    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, old in before.items():
            signal.signal(number, old)
