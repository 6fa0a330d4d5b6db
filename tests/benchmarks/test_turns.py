"""Turns: counted runs, an idle process before each, and a repeat after a disturbance."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import turns

BATCH = np.zeros((1, 1, 1, 3), np.uint8)


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Imitate a machine without other load."""
    monkeypatch.setattr(turns, "others", lambda: 0.0)


@pytest.mark.parametrize(("ms", "runs"), [(0.1, 50), (10.0, 15), (500.0, 2)])
def test_slow_jobs_run_less_often(ms: float, runs: int) -> None:
    assert turns.count(ms) == runs


@pytest.mark.usefixtures("alone")
def test_jobs_take_turns_after_a_warm_up_run() -> None:
    calls: list[str] = []

    def job(name: str, runs: int) -> Any:
        return (lambda batch: calls.append(name) or batch), BATCH, runs

    found = turns.alternated({"a": job("a", 2), "b": job("b", 1)}, 2, lambda: calls.append("end"))
    assert calls == [*"aaabb", "end", *"aaabb", "end"]
    assert {name: [len(one) for one in times] for name, times in found.times.items()} == {"a": [2, 2], "b": [1, 1]}
    assert found.disturbed == 0


def test_a_disturbed_turn_is_repeated_and_the_quietest_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[float] = []
    shares = iter([1e6, 1e3, 1e9, 1e4])  # far more than the machine has, so that the length of a turn does not matter
    busy = iter([value for share in shares for value in (0.0, share)])
    monkeypatch.setattr(turns, "others", lambda: next(busy))
    monkeypatch.setattr(turns, "timed", lambda run, batch, runs: taken.append(float(len(taken))) or taken[-1:])
    times, share = turns.turn((lambda batch: batch, BATCH, 1))
    assert len(taken) == 1 + turns.REPEATS
    assert times == [1.0]
    assert share > turns.DISTURBED


def test_cpu_time_of_other_processes_is_counted() -> None:
    if not Path("/proc/stat").exists():
        pytest.skip("needs Linux's /proc/stat")
    burn = "import time\nwhile time.process_time() < 0.3: pass"
    before = turns.others()
    subprocess.run([sys.executable, "-I", "-S", "-c", burn], check=True)
    assert turns.others() - before > 0.2


def test_waits_until_the_process_is_idle(monkeypatch: pytest.MonkeyPatch) -> None:
    looks = iter([0.0, 0.01, 0.01, 0.02, 0.02, 0.021, 0.021])  # seconds of CPU, in pairs: a thread spins during two
    monkeypatch.setattr(turns.time, "process_time", lambda: next(looks))
    turns.wait_until_idle()
    assert len([*looks]) == 1


def test_does_not_wait_forever_for_a_busy_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(10**6))
    monkeypatch.setattr(turns.time, "process_time", lambda: float(next(clock)))
    monkeypatch.setattr(turns, "TIMEOUT", 0.05)
    turns.wait_until_idle()
