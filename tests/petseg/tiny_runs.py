"""Training runs of a second for all tests of training: few photos, a tiny network, three epochs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from petseg.checkpoint import Checkpoint, load
from petseg.config import TrainConfig, from_dict, override
from petseg.data import Pair, Split, find
from petseg.log import Row
from petseg.observers import Observer
from petseg.run_state import BEST, LAST, RunState
from petseg.train import Trainer

CPU = torch.device("cpu")
EPOCHS, PER_EPOCH = 3, 5  # 24 photos, of which 2 validate; batches of 4


def a_row(**values: Any) -> Row:
    """A row of a log; a test gives the values that it is about."""
    usual: dict[str, Any] = {
        "epoch": 1,
        "step": 5,
        "loss": 0.5,
        "val_iou": 0.6,
        "val_dice": 0.75,
        "val_threshold": 0.5,
        "val_mean_iou_border_ignored": 0.7,
        "seconds": 2.0,
        "images_per_s": 10.0,
        "data_wait": 0.25,
        "elapsed": 3.0,
        "skipped": 0,
        "gpu_memory": 0,
    }
    return Row(**{**usual, **values})


def tiny(*settings: str) -> TrainConfig:
    raw: dict[str, Any] = {
        "epochs": EPOCHS,
        "batch": 4,
        "amp": "fp32",
        "model": {"width": 4, "levels": [1, 2, 4]},  # five levels take 1.5 times as long
        "data": {"height": 32, "width": 32, "val_fraction": 0.1},
        "optimizer": {"lr": 1e-2},
        "schedule": {"restart_epochs": 2},
    }
    for setting in settings:
        override(raw, setting)
    return from_dict(TrainConfig, raw)


class Recorder(Observer):
    """Records all calls, and calls `at_step` and `at_epoch`, if given, in the middle of the run."""

    def __init__(self, at_step: Callable[[int], None] | None = None, at_epoch: Callable[[int], None] | None = None):
        self.begun: list[tuple[int, int]] = []
        self.messages: list[str] = []
        self.losses: list[float] = []
        self.rates: list[float] = []
        self.rows: list[Row] = []
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

    def epoch(self, row: Row) -> None:
        self.rows.append(row)
        if self.at_epoch:
            self.at_epoch(row.epoch)


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


def same_tensors(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def without_times(history: Sequence[Mapping[str, float]]) -> list[dict[str, float]]:
    times = ("seconds", "images_per_s", "data_wait", "elapsed")
    return [{k: v for k, v in row.items() if k not in times} for row in history]


def assert_same_run(folder: Path, whole: Run) -> None:
    """Bit for bit: weights, EMA, optimizer, history."""
    best, last = load(folder / BEST), load(folder / LAST)
    assert same_tensors(best.tensors, whole.best.tensors)
    assert same_tensors(last.tensors, whole.last.tensors)
    assert best.meta["epoch"] == whole.best.meta["epoch"]
    assert best.meta["spec"] == whole.best.meta["spec"]
    state, expected = last.meta["state"], whole.last.meta["state"]
    assert without_times(state["history"]) == without_times(expected["history"])
    assert (state["step"], state["best_iou"]) == (expected["step"], expected["best_iou"])


class Crash(BaseException):
    pass


def crash() -> None:
    raise Crash


def spoil_photo(root: Path, split: Split, number: int) -> Pair:
    pair = find(root, split, val_fraction=0.1)[number]
    pair.image.write_bytes(pair.image.read_bytes()[:300])
    return pair


def red(batch: np.ndarray) -> np.ndarray:
    """A model whose probability is the photo's red channel."""
    return np.ascontiguousarray(batch[..., 0])
