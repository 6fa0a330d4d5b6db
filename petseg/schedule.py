"""The learning rate schedule: a pure function of the step, so that a resumed run follows it exactly."""

from __future__ import annotations

import math
from typing import Final

from petseg.config import ScheduleConfig

__all__ = ["final_rate", "learning_rate"]

#: Initial learning rate of a one-cycle run, as a share of the peak: 1 / 25, as in PyTorch's OneCycleLR.
FIRST: Final = 0.04


def learning_rate(config: ScheduleConfig, peak: float, step: int, steps_per_epoch: int, epochs: int) -> float:
    """Returns the learning rate of a step.

    ``cosine-restarts`` is ``CosineAnnealingWarmRestarts`` with eta_min 0, advanced every step (T_cur in fractions of
    an epoch): ``peak / 2 * (1 + cos(pi * T_cur / T_i))`` (Loshchilov & Hutter 2017, "SGDR", arXiv:1608.03983).
    ``one-cycle`` (Smith & Topin 2018, "Super-Convergence", arXiv:1708.07120) uses half cosines instead of straight
    lines, like PyTorch: warm-up from ``peak / 25``, then annealing to 0. ``cosine`` is one annealing over the run.

    Args:
        config: The schedule and its settings.
        peak: The peak learning rate.
        step: The step, counted from 0.
        steps_per_epoch: Steps in an epoch.
        epochs: Epochs of the whole run.

    Returns:
        The rate, above 0 and at most ``peak``.
    """
    total = steps_per_epoch * epochs
    if config.name == "constant":
        return peak
    if config.name == "cosine":
        return peak / 2 * (1 + math.cos(math.pi * step / total))
    if config.name == "one-cycle":
        rising = config.warmup * total
        if step < rising:
            return peak * (FIRST + (1 - FIRST) * (1 - math.cos(math.pi * step / rising)) / 2)
        return peak / 2 * (1 + math.cos(math.pi * (step - rising) / (total - rising)))
    now, period = step / steps_per_epoch, float(config.restart_epochs)
    while now >= period:
        now -= period
        period *= config.restart_factor
    return peak / 2 * (1 + math.cos(math.pi * now / period))


def final_rate(config: ScheduleConfig, epochs: int) -> float:
    """Returns the final learning rate of a run with warm restarts, as a share of the peak; 0 at the end of a period.

    Returns 0 for the other schedules: ``constant`` is meant to stay at its peak, and the rest end at 0.
    """
    if config.name != "cosine-restarts":
        return 0.0
    now, period = epochs, config.restart_epochs
    while now > period:
        now -= period
        period *= config.restart_factor
    return (1 + math.cos(math.pi * now / period)) / 2
