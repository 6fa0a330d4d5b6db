"""Run several jobs of one process in turns, and time each run while the job has the machine to itself.

A turn begins when the threads of the previous job are idle: those of ONNX Runtime spin for 50 ms after a run (measured
here; PyTorch's and OpenVINO's for 10 to 20 ms), and would take a core from the next job. Linux's /proc/stat tells how
much CPU time other processes, and the host of a virtual machine, took meanwhile: a disturbed turn is repeated, and
turns that are disturbed again are counted.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Generic, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt

U8: TypeAlias = npt.NDArray[np.uint8]
#: A function, the batch that it runs on, and the runs in a turn.
Job: TypeAlias = tuple[Callable[[U8], U8], U8, int]
Key = TypeVar("Key")

#: Seconds of computation in a turn, and the minimum and maximum number of runs. Many short turns are better than few
#: long ones: a shared machine changes its speed from one second to the next, and with it all runs of a turn.
TURN, FEWEST, MOST = 0.15, 2, 50
#: A turn is disturbed if others took more than this share of the machine. /proc/stat counts hundredths of a second.
DISTURBED: Final = 0.1
#: How often a disturbed turn is repeated.
REPEATS: Final = 1
#: How :func:`wait_until_idle` polls: interval in seconds, CPU seconds within it that still count as idle, and timeout,
#: as a process may have a thread that is never idle.
POLL, IDLE, TIMEOUT = 0.01, 0.002, 1.0


@dataclass(frozen=True)
class Turns(Generic[Key]):
    """The result of :func:`alternated`.

    Attributes:
        times: Milliseconds of each run of each job, a list for each round.
        disturbed: Turns in which others took more than :data:`DISTURBED` of the machine in every attempt.
    """

    times: dict[Key, list[list[float]]]
    disturbed: int


def timed(run: Callable[[U8], U8], batch: U8, runs: int) -> list[float]:
    """Return the milliseconds of each run; every engine returns when its output is in memory."""
    found = []
    for _ in range(runs):
        start = time.perf_counter()
        run(batch)
        found.append(1e3 * (time.perf_counter() - start))
    return found


def count(milliseconds: float) -> int:
    """Return how many runs of so many milliseconds a turn has."""
    return max(FEWEST, min(MOST, int(1e3 * TURN / milliseconds)))


def alternated(jobs: Mapping[Key, Job], rounds: int, at_end: Callable[[], None] = lambda: None) -> Turns[Key]:
    """Give every job a turn in each round, and call ``at_end`` at the end of the round."""
    times: dict[Key, list[list[float]]] = {key: [] for key in jobs}
    disturbed = 0
    for _ in range(rounds):
        for key, job in jobs.items():
            taken, share = turn(job)
            times[key].append(taken)
            disturbed += share > DISTURBED
        at_end()
    return Turns(times, disturbed)


def turn(job: Job) -> tuple[list[float], float]:
    """Return the times of the least disturbed attempt at a turn, and the share of the machine that others had in it.

    An untimed run first brings back into the caches what the previous job has evicted.
    """
    run, batch, runs = job
    tries: list[tuple[list[float], float]] = []
    while not tries or (len(tries) <= REPEATS and tries[-1][1] > DISTURBED):
        wait_until_idle()
        run(batch)
        start, busy = time.perf_counter(), others()
        taken = timed(run, batch, runs)
        share = (others() - busy) / (time.perf_counter() - start) / len(os.sched_getaffinity(0))
        tries.append((taken, share))
    return min(tries, key=lambda one: one[1])


def wait_until_idle() -> None:
    """Wait until no thread of this process is running, or the timeout is over."""
    end = time.perf_counter() + TIMEOUT
    while time.perf_counter() < end:
        before = time.process_time()
        time.sleep(POLL)
        if time.process_time() - before < IDLE:
            return


def others() -> float:
    """Return the CPU seconds that others, the host included, took of this process's cores since boot; 0: unknown."""
    path = Path("/proc/stat")
    if not path.exists():
        return 0.0
    mine = {f"cpu{number}" for number in os.sched_getaffinity(0)}
    ticks = 0
    for line in path.read_text(encoding="utf-8").splitlines():
        name, *values = line.split()
        if name in mine:
            user, nice, system, _idle, _waiting, irq, softirq, stolen = map(int, values[:8])
            ticks += user + nice + system + irq + softirq + stolen
    return ticks / os.sysconf("SC_CLK_TCK") - time.process_time()
