"""The state of a training run, and ``last.safetensors``, from which ``--resume`` continues as if uninterrupted.

All randomness is a function of (seed, epoch, photo), and the learning rate is one of the step. So the state of a run is
its weights (including those of the hints for a teacher's features), its EMA, its optimizer and one number: the step.
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
from petseg.config import TrainConfig, from_dict, to_dict, unused_settings
from petseg.ema import MovingAverage
from petseg.log import LOG, Row
from petseg_runtime.errors import CheckpointError, TrainingError
from petseg_runtime.text import counted

__all__ = [
    "BEST",
    "CURVES",
    "LAST",
    "PREDICTIONS",
    "QUICK_SAVE",
    "RUN",
    "RunState",
    "StateFile",
    "check_folder",
    "check_same_run",
    "check_same_settings",
    "load_tensors",
    "remove_unfinished",
    "tensors_of",
]

#: The best EMA weights so far: the checkpoint to evaluate and export.
BEST: Final = "best.safetensors"
#: The complete training state, for ``--resume``.
LAST: Final = "last.safetensors"

#: The record of the run, see :mod:`petseg.record`, and its plots, see :mod:`petseg.plots`.
RUN: Final = "run.json"
CURVES: Final = "curves.png"
PREDICTIONS: Final = "predictions.png"

#: A state that took at most this many seconds to write is written after every epoch.
QUICK_SAVE = 0.1

#: Photos that an error message names at most.
MOST_NAMED: Final = 5

#: Settings that may differ on ``--resume``: they decide where and how long a run goes, not which steps it takes.
FREE: Final = ("compile", "data.on_bad", "data.workers", "early_stop")


@dataclass
class RunState:
    """The progress of a run: its state apart from the tensors.

    Attributes:
        step: Steps taken since the run began.
        best_iou: Validation IoU of the best checkpoint; -1 before there is one.
        loss_sum: Sum of the losses of this epoch's steps so far.
        steps_summed: Number of those steps.
        seconds: Duration of those steps, including waiting for photos, without validation.
        waited: The part of ``seconds`` spent waiting for photos.
        history: The log's rows, one for each finished epoch. With several ranks, only rank 0 appends to them.
        elapsed: Seconds of the whole run, over all sessions, including reading the photos and validation.
        peak_memory: Peak GPU memory so far, bytes; 0 on a CPU.
        ious: Validation IoU of each finished epoch, on all ranks.
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
        """Count a finished epoch with its validation IoU, and reset the sums of the epoch."""
        self.ious.append(iou)
        self.loss_sum = self.seconds = self.waited = 0.0
        self.steps_summed = 0

    def stalled(self, patience: int) -> bool:
        """Whether the best epoch is ``patience`` or more epochs ago; never if ``patience`` is 0."""
        return bool(self.ious) and 0 < patience < len(self.ious) - self.ious.index(max(self.ious))

    def as_dict(self) -> dict[str, Any]:
        """The fields that are saved; JSON values."""
        saved = {each.name: getattr(self, each.name) for each in fields(self) if each.init}
        return {**saved, "history": [row.as_dict() for row in self.history]}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RunState:
        """The reverse of :meth:`as_dict`.

        Raises:
            KeyError: There is no history, or a row lacks a column.
            TypeError: A field is unknown, or a value in a row is not a number.
        """
        return cls(**{**values, "history": [Row.from_dict(row) for row in values["history"]]})


class StateFile:
    """``last.safetensors`` in a run's folder.

    Attributes:
        path: Its path, whether or not the file exists.
        took: Seconds that the last write took; 0 before.
    """

    def __init__(self, folder: Path) -> None:
        """The file of the run in a folder, whether or not it exists yet."""
        self.path, self.took, self._written = folder / LAST, 0.0, 0.0

    def write(self, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
        """Replace the file with a newer state.

        Raises:
            OutputError: It cannot be written; the older state is still there.
        """
        start = time.perf_counter()
        checkpoint.save_checkpoint(self.path, tensors, meta)
        self._written = time.perf_counter()
        self.took = self._written - start

    @property
    def pays(self) -> bool:
        """Whether to write now: saving may take at most a tenth of the time.

        The state of the published network is half a gigabyte, flushed to disk, while an epoch on a fast GPU may take
        seconds. A crash therefore loses up to ten times the duration of a save; an orderly stop always saves.
        """
        return self.took <= QUICK_SAVE or time.perf_counter() - self._written >= 10 * self.took

    def check_settings(self, config: TrainConfig, taught: bool) -> None:
        """Check from its settings that this run can be resumed, without reading the tensors.

        Args:
            config: This run's settings.
            taught: Whether this run has a teacher.

        Raises:
            TrainingError: See :func:`check_same_settings`.
            CheckpointError: The file cannot be read, is a model, or is damaged.
        """
        with self._damage():
            meta = checkpoint.peek(self.path)
            self._check_is_state(meta)
            check_same_settings(meta, config, taught, self.path.parent)

    def excluded(self) -> list[str]:
        """Returns the names of the photos that the run had excluded because they could not be used.

        Raises:
            CheckpointError: The file cannot be read, or is damaged.
        """
        with self._damage():
            return [*checkpoint.peek(self.path)["data"]["skipped_bad"]]

    @contextlib.contextmanager
    def opened(self) -> Iterator[checkpoint.Checkpoint]:
        """Yields the saved state; errors in the caller's use of it are raised as damage to the file.

        Raises:
            CheckpointError: The file cannot be read, is a model, or is damaged.
        """
        saved = checkpoint.load(self.path)
        self._check_is_state(saved.meta)
        with self._damage():
            yield saved

    def _check_is_state(self, meta: Mapping[str, Any]) -> None:
        if meta.get("kind") != "training":
            raise CheckpointError(f"{self.path}: a model, not the state of a run; give it to --init")

    @contextlib.contextmanager
    def _damage(self) -> Iterator[None]:
        try:
            yield
        except (AttributeError, LookupError, TypeError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"{self.path}: the state in it is damaged or incomplete ({error!r})") from error


def check_folder(folder: Path, resume: bool) -> None:
    """Reject a folder that cannot hold this run.

    Raises:
        TrainingError: There is no state to resume, or there is a run that is not to be resumed.
    """
    last = folder / LAST
    there = [name for name in (BEST, LAST, LOG) if (folder / name).exists()]
    if resume and LAST not in there:
        remedy = (
            f"{there[0]} is from a run whose state is gone; start in another folder" if there else "leave out --resume"
        )
        raise TrainingError(f"{last}: nothing to resume; {remedy}")
    if not resume and there:
        more = "use --resume to continue it, or " if LAST in there else ""
        raise TrainingError(f"{folder} already holds a run ({', '.join(there)}); {more}choose another folder")


def remove_unfinished(folder: Path) -> None:
    """Remove the temporary files of a run that was killed while writing."""
    for name in (BEST, LAST, LOG, RUN, CURVES, PREDICTIONS):
        for part in folder.glob(f".{Path(name).stem}.*.part*"):
            part.unlink(missing_ok=True)


def check_same_settings(saved: Mapping[str, Any], config: TrainConfig, taught: bool, folder: Path) -> None:
    """Reject resuming with other settings, except those in :data:`FREE` and those that have no effect.

    Args:
        saved: The metadata of the saved state.
        config: This run's settings.
        taught: Whether this run has a teacher.
        folder: The folder of the saved state.

    Raises:
        TrainingError: Settings differ; the message names them.
        KeyError, TypeError, UsageError: The metadata is damaged.
    """
    before = from_dict(TrainConfig, saved["config"])
    unused = unused_settings(before, taught).keys() & unused_settings(config, taught).keys()
    if differs := _differences(to_dict(before), to_dict(config), {*FREE, *unused}):
        raise TrainingError(f"{folder}: the run to resume has other settings: {'; '.join(differs)}")


def check_same_run(saved: Mapping[str, Any], meta: Mapping[str, Any], folder: Path) -> None:
    """Reject resuming with other photos, masks or another teacher.

    Args:
        saved: The metadata of the saved state.
        meta: The metadata that this run would save.
        folder: The folder of the saved state.

    Raises:
        TrainingError: They differ.
        KeyError, TypeError, AttributeError: The metadata is damaged.
    """
    if saved["data"]["names_sha256"] != meta["data"]["names_sha256"]:
        names = _other_photos(saved["masks"], meta["masks"])
        raise TrainingError(f"{folder}: the run to resume was trained on other photos than these{names}")
    if changed := _changed(saved["masks"], meta["masks"]):
        raise TrainingError(
            f"{folder}: the masks of {counted(len(changed), 'photo')} have changed since the run to resume began "
            f"({_named(changed)}); restore them, or start a new run in another --output, with --init {folder / LAST}"
        )
    identities = [each.get("teacher", {}).get("identity") for each in (saved, meta)]  # its file may have been renamed
    if identities[0] != identities[1]:
        was, now = (each.get("teacher", "none") for each in (saved, meta))
        raise TrainingError(f"{folder}: the teacher of the run to resume was {was}, now {now}")


def _named(names: Sequence[str]) -> str:
    return ", ".join(names[:MOST_NAMED]) + (", ..." if len(names) > MOST_NAMED else "")


def _other_photos(before: Mapping[str, Mapping[str, str]], now: Mapping[str, Mapping[str, str]]) -> str:
    """Names the photos that one run used and the other does not, or only in the other part; "" if there are none."""
    was, here = ({name: part for part, names in each.items() for name in names} for each in (before, now))
    differ = {
        "no longer there, or not usable": was.keys() - here.keys(),
        "new": here.keys() - was.keys(),
        "moved between training and validation": {name for name in was.keys() & here if was[name] != here[name]},
    }
    said = "; ".join(f"{how}: {_named(sorted(names))}" for how, names in differ.items() if names)
    return f" ({said})" if said else ""


def _changed(before: Mapping[str, Mapping[str, str]], now: Mapping[str, Mapping[str, str]]) -> list[str]:
    """Returns the names of photos whose masks changed; photos excluded then or now cannot be compared."""
    return [
        name for part, was in before.items() for name, digest in was.items() if now[part].get(name, digest) != digest
    ]


def tensors_of(
    model: nn.Module, hints: nn.Module, ema: MovingAverage, optimizer: torch.optim.Optimizer
) -> dict[str, Tensor]:
    """Returns all tensors of a run by name, without copying them; the reverse of :func:`load_tensors`."""
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
    """Load a run's tensors into its modules and optimizer.

    Raises:
        KeyError, RuntimeError, ValueError: A tensor is missing, unexpected, or of another shape.
    """
    model.load_state_dict({name: t for name, t in tensors.items() if "/" not in name and name != "ema_updates"})
    hints.load_state_dict(_with_prefix("hints/", tensors))
    ema.module.load_state_dict(_with_prefix("ema/", tensors))
    ema.updates = int(tensors["ema_updates"])
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    slots: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        if name.startswith("optimizer/"):
            _, number, slot = name.split("/")
            slots.setdefault(int(number), {})[slot] = _in_layout_of(value, weights[int(number)])
    for index in range(len(weights)):
        if missing := {"step", "exp_avg", "exp_avg_sq"} - slots.get(index, {}).keys():
            raise ValueError(f"optimizer state {index} lacks {', '.join(sorted(missing))}")
    optimizer.load_state_dict({**optimizer.state_dict(), "state": slots})


def _with_prefix(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the tensors whose names begin with ``prefix``, by the rest of their names."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _in_layout_of(value: Tensor, weight: Tensor) -> Tensor:
    """Returns a moment in the memory format of its weight (channels_last): fused AdamW assumes the same layout."""
    if value.shape != weight.shape:
        return value  # the step count
    return torch.empty_like(weight, requires_grad=False).copy_(value)


def _differences(old: dict[str, Any], new: dict[str, Any], free: Set[str], where: str = "") -> list[str]:
    """Returns the settings that differ, as text, except free ones."""
    found = []
    for key in sorted({*old, *new}):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found += _differences(a, b, free, f"{where}{key}.")
        elif a != b and where + key not in free:
            found.append(f"{where}{key} was {a!r}, now {b!r}")
    return found
