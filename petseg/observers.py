"""Observers of a training run: callbacks with which the command line prints events and TensorBoard logs them."""

from __future__ import annotations

from collections.abc import Sequence

from petseg.data import Pair
from petseg.evaluate import Run
from petseg.log import Row
from petseg.run_state import RunState

__all__ = ["Observer", "Observers"]


class Observer:
    """Callbacks of a training run; by default they do nothing."""

    def begin(self, per_epoch: int, batch: int) -> None:
        """Called once, before the first step: steps per epoch, and photos per step in all ranks together."""

    def started(self, message: str) -> None:
        """Called with a message about the run, in most cases before the first step."""

    def excluded(self, message: str) -> None:
        """Called when a photo cannot be used and the run continues without it. By default calls :meth:`started`."""
        self.started(message)

    def step(self, state: RunState, loss: float, lr: float) -> None:
        """Called after each step."""

    def epoch(self, row: Row) -> None:
        """Called after each epoch and its validation, with the log's row."""

    def validated(self, run: Run, pairs: Sequence[Pair], row: Row) -> None:
        """Called just before :meth:`epoch`, with the EMA model and the photos that it was measured on."""


class Observers(Observer):
    """Forwards each call to several observers, in order."""

    def __init__(self, *each: Observer) -> None:
        self.each = each

    def begin(self, per_epoch: int, batch: int) -> None:
        """As :class:`Observer`."""
        for one in self.each:
            one.begin(per_epoch, batch)

    def started(self, message: str) -> None:
        """As :class:`Observer`."""
        for one in self.each:
            one.started(message)

    def excluded(self, message: str) -> None:
        """As :class:`Observer`."""
        for one in self.each:
            one.excluded(message)

    def step(self, state: RunState, loss: float, lr: float) -> None:
        """As :class:`Observer`."""
        for one in self.each:
            one.step(state, loss, lr)

    def epoch(self, row: Row) -> None:
        """As :class:`Observer`."""
        for one in self.each:
            one.epoch(row)

    def validated(self, run: Run, pairs: Sequence[Pair], row: Row) -> None:
        """As :class:`Observer`."""
        for one in self.each:
            one.validated(run, pairs, row)
