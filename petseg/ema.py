"""The exponential moving average (EMA) of a network's weights, which is evaluated and saved."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator

import torch
from torch import Tensor, nn

__all__ = ["MovingAverage"]


class MovingAverage:
    """An EMA whose decay grows up to its final value, so that the random initial weights are soon forgotten.

    torch's AveragedModel counts its updates in a tensor and reads it back from the GPU at every step; this class counts
    in Python, so that an update never waits for the GPU.

    Attributes:
        module: The averaged network; BatchNorm statistics are averaged, too, and its counters copied.
        updates: Number of updates so far.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        """Start as a copy of ``model``; with ``decay`` 0 it stays one."""
        self.module = copy.deepcopy(model)
        self.decay = decay
        self.updates = 0

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Update the average with the current weights of ``model``."""
        n = self.updates
        weight = 1 - min(self.decay, (1 + n) / (10 + n))
        averages: list[Tensor] = []
        currents: list[Tensor] = []
        for average, current in zip(_tensors(self.module), _tensors(model), strict=True):
            if n and average.is_floating_point():
                averages.append(average)
                currents.append(current)
            else:
                average.copy_(current)
        if averages:
            torch._foreach_lerp_(averages, currents, weight)  # on a GPU, a few kernels instead of one per tensor
        self.updates += 1


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    return itertools.chain(model.parameters(), model.buffers())
