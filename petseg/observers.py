"""Who is told what happens during a run: the command line prints it, TensorBoard draws it."""

from __future__ import annotations

from collections.abc import Sequence

from petseg.data import Pair
from petseg.evaluate import Run
from petseg.log import Row
from petseg.run_state import RunState

__all__ = ["Observer", "Observers"]


class Observer:
    """Told what happens during a run; by default it does nothing about it."""

    def begin(self, per_epoch: int, batch: int) -> None:
        """Told once, before the first step: steps in an epoch, and photos per step, those of all processes."""

    def started(self, message: str) -> None:
        """Something worth knowing, in words: most of it before the first step."""

    def left_out(self, message: str) -> None:
        """A photo cannot be used, and the run goes on without it. Unless overridden, :meth:`started` is told."""
        self.started(message)

    def step(self, state: RunState, loss: float, lr: float) -> None:
        """A step is done."""

    def epoch(self, row: Row) -> None:
        """An epoch is done and validated; the row is the log's."""

    def validated(self, run: Run, pairs: Sequence[Pair], row: Row) -> None:
        """Told just before :meth:`epoch`: the moving average as a model, and the photos that it was measured on."""


class Observers(Observer):
    """Several observers in place of one; each is told everything, in this order."""

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

    def left_out(self, message: str) -> None:
        """As :class:`Observer`."""
        for one in self.each:
            one.left_out(message)

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
