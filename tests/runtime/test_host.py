"""What the machine has is asked of its driver; a machine without one has nothing, which is no error."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest

from petseg_runtime.host import nvidia_gpus


class Driver:
    """libcuda, as far as it is asked."""

    def __init__(self, init: int, status: int, count: int) -> None:
        self.init, self.status, self.count = init, status, count

    def cuInit(self, flags: int) -> int:
        return self.init

    def cuDeviceGetCount(self, count: Any) -> int:
        count._obj.value = self.count
        return self.status


@pytest.mark.parametrize(
    ("driver", "gpus"),
    [
        (Driver(0, 0, 2), 2),
        (Driver(0, 0, 0), 0),
        (Driver(100, 0, 2), 0),  # CUDA_ERROR_NO_DEVICE
        (Driver(0, 3, 2), 0),
    ],
)
def test_the_driver_is_asked_how_many_gpus_there_are(
    driver: Driver, gpus: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: driver)
    assert nvidia_gpus() == gpus


def test_without_a_driver_there_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", missing)
    assert nvidia_gpus() == 0


def test_this_machine_answers() -> None:
    assert nvidia_gpus() >= 0
