"""The learning rate of every step, checked against the formulas and PyTorch's schedulers."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from petseg.config import ScheduleConfig
from petseg.schedule import final_rate, learning_rate


@pytest.mark.parametrize(("restart", "factor"), [(1, 1), (2, 1), (1, 2), (3, 2), (2, 3), (10, 2)])
@pytest.mark.parametrize("per_epoch", [1, 7, 230])
def test_cosine_restarts_is_that_of_torch(restart: int, factor: int, per_epoch: int) -> None:
    config = ScheduleConfig(restart_epochs=restart, restart_factor=factor)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, restart * per_epoch, factor)
    for step in range(12 * per_epoch):
        expected = optimizer.param_groups[0]["lr"]
        assert learning_rate(config, 0.3, step, per_epoch, 12) == pytest.approx(expected, abs=1e-9), f"step {step}"
        optimizer.step()
        scheduler.step()


def rates(name: str, per_epoch: int = 10, epochs: int = 10, **more: Any) -> list[float]:
    config = dataclasses.replace(ScheduleConfig(), name=name, **more)
    return [learning_rate(config, 0.5, step, per_epoch, epochs) for step in range(per_epoch * epochs)]


@pytest.mark.parametrize("warmup", [0.1, 0.3, 0.9])
def test_one_cycle_rises_to_the_peak_and_falls_to_nothing(warmup: float) -> None:
    found = rates("one-cycle", warmup=warmup)
    top = found.index(max(found))
    assert top == round(100 * warmup)
    assert found[top] == pytest.approx(0.5)
    assert found[0] == pytest.approx(0.5 * 0.04)
    assert found[: top + 1] == sorted(found[: top + 1])
    assert found[top:] == sorted(found[top:], reverse=True)
    assert 0 < found[-1] < 0.5 * 0.03


def test_cosine_falls_from_the_peak_to_nothing() -> None:
    found = rates("cosine")
    assert found[0] == 0.5
    assert found[50] == pytest.approx(0.25)
    assert found == sorted(found, reverse=True)
    assert 0 < found[-1] < 0.001


def test_constant_is_constant() -> None:
    assert set(rates("constant")) == {0.5}


@pytest.mark.parametrize(
    ("epochs", "restart", "factor", "left"),
    [
        (30, 10, 2, 0),
        (10, 10, 2, 0),
        (20, 10, 2, 0.5),
        (5, 10, 2, 0.5),
        (11, 10, 1, 0.976),
        (20, 10, 1, 0),
        (70, 10, 2, 0),
    ],
)
def test_the_final_rate_of_warm_restarts(epochs: int, restart: int, factor: int, left: float) -> None:
    config = ScheduleConfig(restart_epochs=restart, restart_factor=factor)
    assert final_rate(config, epochs) == pytest.approx(left, abs=1e-3)
    last = learning_rate(config, 1.0, 1000 * epochs - 1, 1000, epochs)
    assert last == pytest.approx(left, abs=1e-3)


@pytest.mark.parametrize("name", ["one-cycle", "cosine", "constant"])
def test_other_schedules_end_as_they_are_meant_to(name: str) -> None:
    assert final_rate(dataclasses.replace(ScheduleConfig(), name=name), 7) == 0
