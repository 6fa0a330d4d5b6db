"""Measure sustained throughput: all callers of an engine run without pause, and the rate is taken per interval.

Devices without a fan throttle as they get warm, which a benchmark of seconds does not show. Each rate comes with the
machine's temperature and the clock rates of its cores, if the kernel reports them.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Generator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, field
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt

from petseg_runtime import host
from petseg_runtime.engines.base import Engine, EngineInfo
from petseg_runtime.host import Gpu, Host
from petseg_runtime.signals import let_through

__all__ = ["INTERVALS", "SLOWER", "Interval", "Sustained", "sustain"]

U8: TypeAlias = npt.NDArray[np.uint8]

INTERVALS: Final = 10
#: The loss of the last interval against the first from which the machine counts as slowing down. This is our choice:
#: other load makes intervals differ by a few per cent.
SLOWER: Final = 0.05


@dataclass(frozen=True, kw_only=True)
class Interval:
    """The measurements of one interval.

    Attributes:
        start: Start of the interval, in seconds since all callers were running.
        end: End of the interval, likewise.
        photos_per_second: Total rate of all callers; a run that spans several intervals counts proportionally in each.
        celsius: Temperature of each thermal zone of the kernel, by its type, read at the end of the interval (or of a
            run that outlasts it); empty if there are none.
        mhz: Clock rate of each core at the end of the interval; empty if the kernel does not report it.
    """

    start: float
    end: float
    photos_per_second: float
    celsius: dict[str, float]
    mhz: tuple[float, ...]

    @property
    def state(self) -> str:
        """The temperature of the warmest zone, and the clock rates of the slowest and fastest core; "" if unknown."""
        warmth = [f"{max(self.celsius.values()):.1f} °C"] if self.celsius else []
        pace = dict.fromkeys(f"{extreme(self.mhz):.0f}" for extreme in (min, max)) if self.mhz else {}
        return ", ".join(warmth + ["-".join(pace) + " MHz"] * bool(pace))

    @property
    def summary(self) -> str:
        """The measurements in one line."""
        return f"{self.photos_per_second:.1f} photos/s" + (f", {self.state}" if self.state else "")


@dataclass(frozen=True, kw_only=True)
class Sustained:
    """The results so far.

    Attributes:
        info: The description of the engine; each of its streams had a caller.
        batch: Photos per run.
        seconds: The requested duration of all intervals together.
        host: The machine.
        gpus: Its NVIDIA GPUs.
        intervals: The completed intervals, in order.
    """

    info: EngineInfo
    batch: int
    seconds: float
    host: Host
    gpus: tuple[Gpu, ...]
    intervals: list[Interval] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        """Whether all intervals were measured."""
        return len(self.intervals) == INTERVALS

    @property
    def loss(self) -> float | None:
        """The share by which the last interval is slower than the first (negative: faster); None: unknown."""
        if len(self.intervals) < 2:
            return None
        first, last = (self.intervals[place].photos_per_second for place in (0, -1))
        return 1 - last / first if first and last else None

    @property
    def short(self) -> bool:
        """Whether an interval is shorter than a run, so that its rate depends on the neighbouring intervals."""
        at_a_time = self.batch * self.info.streams
        return any(one.photos_per_second * (one.end - one.start) < at_a_time for one in self.intervals)

    @property
    def verdict(self) -> str:
        """A sentence that says whether the machine slows down."""
        if self.loss is None:
            return "there are no two intervals with runs to compare, so it is unknown whether this machine slows down"
        last = "the last interval" if self.complete else f"interval {len(self.intervals)}, the last one measured,"
        change = f"{100 * abs(self.loss):.0f} % {'slower' if self.loss > 0 else 'faster'}"
        pace = "slows down under load" if self.loss >= SLOWER else "keeps its pace"
        short = "; but a run takes longer than an interval, so that single rates mean little: measure for more minutes"
        return f"{last} is {change} than the first: this machine {pace}{short if self.short else ''}"

    def as_dict(self) -> dict[str, Any]:
        """Return the results as JSON values."""
        return {
            "engine": asdict(self.info),
            "batch": self.batch,
            "seconds": self.seconds,
            "host": asdict(self.host),
            "gpus": [asdict(gpu) for gpu in self.gpus],
            "complete": self.complete,
            "intervals": [asdict(interval) for interval in self.intervals],
            "loss": self.loss,
            "verdict": self.verdict,
        }


def sustain(engine: Engine, photos: U8, seconds: float) -> Generator[Interval]:
    """Keep an engine's callers running and yield each interval; if closed early, they stop after their current run.

    An interval is yielded when the runs in progress at its end have finished, because only then is it known what share
    of them lies in it.

    Args:
        engine: The engine; it gets as many callers as it has streams, each in its own thread.
        photos: The batch of each run, uint8 [N, H, W, 3].
        seconds: Duration of all :data:`INTERVALS` together, without the callers' first run.

    Raises:
        EngineError: A run failed.
    """
    callers = engine.describe().streams
    marks: list[list[float]] = [[] for _ in range(callers)]  # for each caller, the end of each run
    stop = threading.Event()

    def call(caller: int) -> None:
        while not stop.is_set():  # the first run is not counted: in it, a thread's own resources are created
            engine.run(photos)
            marks[caller].append(time.perf_counter())

    def reach(when: float) -> None:
        while not all(of_caller and of_caller[-1] >= when for of_caller in marks):
            _wait_until(working, time.perf_counter() + 0.01)

    with ThreadPoolExecutor(callers) as pool:
        try:
            working = [pool.submit(call, caller) for caller in range(callers)]
            reach(-math.inf)
            start, length = time.perf_counter(), seconds / INTERVALS
            for number in range(INTERVALS):
                begun, ended = number * length, (number + 1) * length
                _wait_until(working, start + ended)
                celsius, mhz = host.temperatures(), host.frequencies()
                reach(start + ended)
                runs = sum(_runs(of_caller, start + begun, start + ended) for of_caller in marks)
                rate = len(photos) * runs / length
                yield Interval(start=begun, end=ended, photos_per_second=rate, celsius=celsius, mhz=mhz)
        finally:
            stop.set()  # after Ctrl-C or a failure, the other callers stop after their current run


def _wait_until(working: Sequence[Future[None]], when: float) -> None:
    """Wait until a time of the performance counter while the callers run.

    Raises:
        EngineError: A caller's run failed.
    """
    while (left := when - time.perf_counter()) > 0:
        ended, _ = wait(working, min(left, host.LOOK_UP), FIRST_EXCEPTION)
        for future in ended:
            future.result()
        if left > host.LOOK_UP:
            let_through()


def _runs(marks: list[float], begun: float, ended: float) -> float:
    """The number of runs of a caller between two times, including fractions of runs.

    Args:
        marks: The end of each run; times that are no longer needed are removed.
        begun: A time no earlier than the first of these.
        ended: A time no later than the last.
    """
    known = tuple(marks)  # a snapshot: the caller keeps appending
    first, last = np.interp([begun, ended], known, np.arange(len(known)))
    del marks[: int(last)]  # in hours of short runs, there would be millions
    return float(last - first)
