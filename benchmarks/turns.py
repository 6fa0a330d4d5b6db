"""Jobs of one process in turns, round after round: how long each run of each takes when it has the machine alone.

A turn begins when the threads of the job before it have come to rest: those of ONNX Runtime spin for 50 ms after an
answer (measured here; PyTorch's and OpenVINO's for 10 to 20), and would take a core from whoever is next. What other
processes take meanwhile, and what the host of a virtual machine takes, is in Linux's /proc/stat: a turn that was
disturbed is taken again, and what is disturbed all the same is counted.
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
#: What runs, on what, and how often in a turn.
Job: TypeAlias = tuple[Callable[[U8], U8], U8, int]
Key = TypeVar("Key")

#: Seconds that a job computes in a turn, and the runs that this may be. Many short turns tell more than few long ones:
#: a shared machine changes its speed from one second to the next, and with it all runs of a turn.
TURN, FEWEST, MOST = 0.15, 2, 50
#: Of the machine's time: what others may take of a turn. /proc/stat counts in hundredths of a second.
DISTURBED: Final = 0.1
#: How often a disturbed turn is taken again.
AGAIN: Final = 1
#: Seconds between two looks at whether threads still run, CPU seconds between them that count as rest, and the longest
#: wait: a process may have a thread that never rests.
LOOK, REST, PATIENCE = 0.01, 0.002, 1.0


@dataclass(frozen=True)
class Turns(Generic[Key]):
    """What came of it.

    Attributes:
        times: Milliseconds of each run of each job, a list for each round.
        disturbed: Turns in which others took more than :data:`DISTURBED` of the machine, each time they were tried.
    """

    times: dict[Key, list[list[float]]]
    disturbed: int


def timed(run: Callable[[U8], U8], batch: U8, runs: int) -> list[float]:
    """Milliseconds of each run; every engine has its answer in memory when it returns."""
    found = []
    for _ in range(runs):
        start = time.perf_counter()
        run(batch)
        found.append(1e3 * (time.perf_counter() - start))
    return found


def count(milliseconds: float) -> int:
    """Runs in a turn of something that takes so long."""
    return max(FEWEST, min(MOST, int(1e3 * TURN / milliseconds)))


def alternated(jobs: Mapping[Key, Job], rounds: int, at_end: Callable[[], None] = lambda: None) -> Turns[Key]:
    """Every job has its turn in each round; ``at_end`` has the last."""
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
    """A turn, and the share of the machine that others had in it: of several tries the least disturbed.

    Before it is one run that does not count: it brings back what the job before has pushed out of the caches.
    """
    run, batch, runs = job
    tries: list[tuple[list[float], float]] = []
    while not tries or (len(tries) <= AGAIN and tries[-1][1] > DISTURBED):
        rest()
        run(batch)
        start, busy = time.perf_counter(), others()
        taken = timed(run, batch, runs)
        share = (others() - busy) / (time.perf_counter() - start) / len(os.sched_getaffinity(0))
        tries.append((taken, share))
    return min(tries, key=lambda one: one[1])


def rest() -> None:
    """Wait until no thread of this process runs."""
    end = time.perf_counter() + PATIENCE
    while time.perf_counter() < end:
        before = time.process_time()
        time.sleep(LOOK)
        if time.process_time() - before < REST:
            return


def others() -> float:
    """CPU seconds, since some moment, that all but this process took of its cores, the host included; 0: unknown."""
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
