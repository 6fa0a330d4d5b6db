"""Where a run stands, and ``last.safetensors``, the file from which ``--resume`` goes on as if nothing had been.

Everything random is a function of (seed, epoch, photo), and the learning rate one of the step, so the state of a run is
its weights (those of the hints that a teacher gives among them), its moving average, its optimizer and one number: the
step.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from petseg import checkpoint
from petseg.config import TrainConfig, from_dict, idle_settings, to_dict
from petseg.ema import MovingAverage
from petseg.log import LOG, Row
from petseg_runtime.errors import CheckpointError, TrainingError

__all__ = [
    "BEST",
    "LAST",
    "QUICK_SAVE",
    "RunState",
    "StateFile",
    "check_folder",
    "load_tensors",
    "refuse_another_run",
    "refuse_other_settings",
    "remove_unfinished",
    "tensors_of",
]

#: The best moving average so far: the checkpoint to evaluate and export.
BEST: Final = "best.safetensors"
#: The whole training state, for ``--resume``.
LAST: Final = "last.safetensors"

#: A state that took no longer than this many seconds to write is written after every epoch.
QUICK_SAVE = 0.1

#: Photos that a message names.
MOST_NAMED: Final = 5

#: Settings that ``--resume`` takes anew: they decide where and how long a run goes, not which steps it takes.
FREE: Final = ("compile", "data.on_bad", "data.workers", "early_stop")


@dataclass
class RunState:
    """Where a run stands, beside its tensors.

    Attributes:
        step: Steps taken since the run began.
        best_iou: The IoU of the best checkpoint on the validation photos; -1 before there is one.
        loss_sum: The losses of this epoch's steps so far, added up.
        steps_summed: How many steps those are.
        seconds: Seconds that those steps took, with waiting for photos, without validation.
        waited: The part of ``seconds`` that was spent waiting for photos.
        history: The log's rows, one for each finished epoch. Of several processes only the first adds to them.
        elapsed: Seconds of the whole run, all sessions added up, with reading the photos and validation.
        peak_memory: Largest GPU memory in use so far, bytes; 0 on a CPU.
        ious: The IoU of each finished epoch on the validation photos, which all processes are told.
    """

    step: int = 0
    best_iou: float = -1.0
    loss_sum: float = 0.0
    steps_summed: int = 0
    seconds: float = 0.0
    waited: float = 0.0
    history: list[Row] = field(default_factory=list)
    elapsed: float = 0.0
    peak_memory: int = 0
    ious: list[float] = field(init=False)

    def __post_init__(self) -> None:
        self.ious = [row.val_iou for row in self.history]

    def next_epoch(self, iou: float) -> None:
        """Count the epoch that is done, with its validation IoU, and forget its sums."""
        self.ious.append(iou)
        self.loss_sum = self.seconds = self.waited = 0.0
        self.steps_summed = 0

    def stalled(self, patience: int) -> bool:
        """Whether the best epoch is ``patience`` epochs ago, or more; never if that is 0."""
        return bool(self.ious) and 0 < patience < len(self.ious) - self.ious.index(max(self.ious))

    def as_dict(self) -> dict[str, Any]:
        """What is saved of it; JSON values."""
        saved = {each.name: getattr(self, each.name) for each in fields(self) if each.init}
        return {**saved, "history": [row.as_dict() for row in self.history]}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RunState:
        """The reverse of :meth:`as_dict`, also of older versions', which kept less.

        Raises:
            KeyError: There is no history.
            TypeError: There is a value of an unknown name, or something in a row is no number.
        """
        return cls(**{**values, "history": [Row.from_dict(row) for row in values["history"]]})


class StateFile:
    """``last.safetensors`` in a run's folder.

    Attributes:
        path: Where it is, or will be.
        took: Seconds that it took to write it the last time; 0 before.
    """

    def __init__(self, folder: Path) -> None:
        """The file of the run in a folder, whether or not it is there yet."""
        self.path, self.took, self._written = folder / LAST, 0.0, 0.0

    def write(self, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
        """Replace it by a newer state.

        Raises:
            OutputError: It cannot be written; the older one is still there.
        """
        start = time.perf_counter()
        checkpoint.save_checkpoint(self.path, tensors, meta)
        self._written = time.perf_counter()
        self.took = self._written - start

    @property
    def pays(self) -> bool:
        """Whether writing it now is worth it: all writing takes a tenth of the time at most.

        The published network's is half a gigabyte, flushed to the disk, and an epoch on a fast GPU may take seconds. A
        crash then costs up to ten times what a save takes; a stop in order always saves.
        """
        return self.took <= QUICK_SAVE or time.perf_counter() - self._written >= 10 * self.took

    def look_at(self, config: TrainConfig, taught: bool) -> None:
        """Refuse a state that this run cannot go on from, as far as its settings tell, without reading its tensors.

        Args:
            config: This run's settings.
            taught: Whether this run has a teacher.

        Raises:
            TrainingError: See :func:`refuse_other_settings`.
            CheckpointError: It cannot be read, is a model, or is damaged.
        """
        with self._damage():
            meta = checkpoint.peek(self.path)
            self._refuse_model(meta)
            refuse_other_settings(meta, config, taught, self.path.parent)

    @contextlib.contextmanager
    def taking_up(self) -> Iterator[checkpoint.Checkpoint]:
        """What is in it; what the caller finds missing or damaged there is told as damage to the file.

        Raises:
            CheckpointError: It cannot be read, is a model, or is damaged.
        """
        saved = checkpoint.load(self.path)
        self._refuse_model(saved.meta)
        with self._damage():
            yield saved

    def _refuse_model(self, meta: Mapping[str, Any]) -> None:
        if meta.get("kind") != "training":
            raise CheckpointError(f"{self.path}: a model, not the state of a run; give it to --init")

    @contextlib.contextmanager
    def _damage(self) -> Iterator[None]:
        try:
            yield
        except (AttributeError, LookupError, TypeError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"{self.path}: the state in it is damaged or not complete ({error!r})") from error


def check_folder(folder: Path, resume: bool) -> None:
    """Refuse a folder that cannot hold this run.

    Raises:
        TrainingError: There is no state to resume in it, or a run that is not to be resumed.
    """
    last = folder / LAST
    there = [name for name in (BEST, LAST, LOG) if (folder / name).exists()]
    if resume and LAST not in there:
        remedy = (
            f"{there[0]} is of a run whose state is gone: start in another folder" if there else "leave out --resume"
        )
        raise TrainingError(f"{last}: nothing to resume; {remedy}")
    if not resume and there:
        more = "--resume goes on with it, or " if LAST in there else ""
        raise TrainingError(f"{folder} already holds a run ({', '.join(there)}): {more}choose another folder")


def remove_unfinished(folder: Path) -> None:
    """Remove what a killed run was writing in its folder."""
    for name in (BEST, LAST, LOG):
        for part in folder.glob(f".{Path(name).stem}.*.part*"):
            part.unlink(missing_ok=True)


def refuse_other_settings(saved: Mapping[str, Any], config: TrainConfig, taught: bool, folder: Path) -> None:
    """Refuse to go on with a run that has other settings, but for those in :data:`FREE` and those that nothing uses.

    Args:
        saved: What its state says of it.
        config: This run's settings.
        taught: Whether this run has a teacher.
        folder: Where the state is.

    Raises:
        TrainingError: It has; the message names them.
        KeyError, TypeError, UsageError: What the state says is damaged.
    """
    before = from_dict(TrainConfig, saved["config"])  # a setting that is newer than the run has its default
    unused = idle_settings(before, taught).keys() & idle_settings(config, taught).keys()
    if differs := _differences(to_dict(before), to_dict(config), {*FREE, *unused}):
        raise TrainingError(f"{folder}: the run to resume has other settings: {'; '.join(differs)}")


def refuse_another_run(saved: Mapping[str, Any], meta: Mapping[str, Any], folder: Path) -> None:
    """Refuse to go on with a run that had other photos, masks or another teacher.

    Args:
        saved: What its state says of it.
        meta: What this run's state would say.
        folder: Where the state is.

    Raises:
        TrainingError: It had.
        KeyError, TypeError, AttributeError: What the state says is damaged.
    """
    if saved["data"]["names_sha256"] != meta["data"]["names_sha256"]:
        tiny = meta["data"]["skipped_too_small"]
        if tiny and "skipped_too_small" not in saved["data"]:
            raise TrainingError(
                f"{folder}: the run to resume is of an older version, which kept {len(tiny)} photos of whose pet "
                f"nothing is left at this size ({_named(tiny)}); they are left out now, so that the photos are others: "
                f"start another run in another --output, with --init {folder / LAST}"
            )
        raise TrainingError(f"{folder}: the run to resume was trained on other photos than these")
    if changed := _changed(saved.get("masks", {}), meta["masks"]):
        raise TrainingError(
            f"{folder}: the masks of {len(changed)} photos are not what they were when the run to resume began "
            f"({_named(changed)}): put them back, or start another run in another --output, with --init {folder / LAST}"
        )
    if saved.get("teacher") != meta.get("teacher"):
        was, now = (each.get("teacher", "none") for each in (saved, meta))
        raise TrainingError(f"{folder}: the teacher of the run to resume was {was}, now {now}")


def _named(names: Sequence[str]) -> str:
    return ", ".join(names[:MOST_NAMED]) + (", ..." if len(names) > MOST_NAMED else "")


def _changed(before: Mapping[str, Mapping[str, str]], now: Mapping[str, Mapping[str, str]]) -> list[str]:
    """Names of the photos whose masks are others; a photo that was left out then or is now has none to compare."""
    return [
        name for part, was in before.items() for name, digest in was.items() if now[part].get(name, digest) != digest
    ]


def tensors_of(
    model: nn.Module, hints: nn.Module, ema: MovingAverage, optimizer: torch.optim.Optimizer
) -> dict[str, Tensor]:
    """All tensors of a run by name, where they are; the reverse of :func:`load_tensors`."""
    tensors = dict(model.state_dict())
    tensors |= {f"hints/{name}": value for name, value in hints.state_dict().items()}
    tensors |= {f"ema/{name}": value for name, value in ema.module.state_dict().items()}
    tensors["ema_updates"] = torch.tensor(ema.updates)
    for index, slots in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer/{index}/{slot}": value for slot, value in slots.items()}
    return tensors


def load_tensors(
    tensors: Mapping[str, Tensor],
    model: nn.Module,
    hints: nn.Module,
    ema: MovingAverage,
    optimizer: torch.optim.AdamW,
) -> None:
    """Put a run's tensors into its parts.

    Raises:
        KeyError, RuntimeError, ValueError: One is missing, left over, or of another shape.
    """
    model.load_state_dict({name: t for name, t in tensors.items() if "/" not in name and name != "ema_updates"})
    hints.load_state_dict(_under("hints/", tensors))
    ema.module.load_state_dict(_under("ema/", tensors))
    ema.updates = int(tensors["ema_updates"])
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    slots: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        if name.startswith("optimizer/"):
            _, number, slot = name.split("/")
            slots.setdefault(int(number), {})[slot] = _laid_out(value, weights[int(number)])
    for index in range(len(weights)):
        if missing := {"step", "exp_avg", "exp_avg_sq"} - slots.get(index, {}).keys():
            raise ValueError(f"optimizer state {index} lacks {', '.join(sorted(missing))}")
    optimizer.load_state_dict({**optimizer.state_dict(), "state": slots})


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those whose names begin so, by the rest of their names."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _laid_out(value: Tensor, weight: Tensor) -> Tensor:
    """A moment in the memory layout of its weight: the fused AdamW walks both as they lie (channels_last)."""
    if value.shape != weight.shape:
        return value  # the step count
    return torch.empty_like(weight, requires_grad=False).copy_(value)


def _differences(old: dict[str, Any], new: dict[str, Any], free: Set[str], where: str = "") -> list[str]:
    """Settings that are not the same, but for those that are free."""
    found = []
    for key in sorted({*old, *new}):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found += _differences(a, b, free, f"{where}{key}.")
        elif a != b and where + key not in free:
            found.append(f"{where}{key} was {a!r}, now {b!r}")
    return found
