"""What an engine keeps up: all its callers at work without pause, and the rate of one interval after the other.

Devices without a fan slow down as they get warm, and a benchmark of seconds is over before that. Beside each rate
stands how warm the machine was and how fast its cores ran, where the kernel says so.
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

__all__ = ["INTERVALS", "SLOWER", "Interval", "Sustained", "sustain"]

U8: TypeAlias = npt.NDArray[np.uint8]

INTERVALS: Final = 10
#: What the last interval must lose against the first before that is called slowing down: our choice; whatever else a
#: machine does makes intervals differ by some per cent.
SLOWER: Final = 0.05


@dataclass(frozen=True, kw_only=True)
class Interval:
    """What was measured in one interval.

    Attributes:
        start: Seconds since all callers were at work.
        end: Likewise.
        photos_per_second: Of all callers together; of a run that lies in several intervals, each has its share.
        celsius: At its end (or, where a run outlasts it, that of the run), of each of the kernel's thermal zones by its
            type; empty where there are none.
        mhz: At its end, of each core; empty where the kernel does not say.
    """

    start: float
    end: float
    photos_per_second: float
    celsius: dict[str, float]
    mhz: tuple[float, ...]

    @property
    def state(self) -> str:
        """The warmest zone, and the slowest and the fastest core, for people; "" where neither is known."""
        warmth = [f"{max(self.celsius.values()):.1f} °C"] if self.celsius else []
        pace = dict.fromkeys(f"{extreme(self.mhz):.0f}" for extreme in (min, max)) if self.mhz else {}
        return ", ".join(warmth + ["-".join(pace) + " MHz"] * bool(pace))

    @property
    def summary(self) -> str:
        """One line for people."""
        return f"{self.photos_per_second:.1f} photos/s" + (f", {self.state}" if self.state else "")


@dataclass(frozen=True, kw_only=True)
class Sustained:
    """What was measured so far, and of what.

    Attributes:
        info: What ran; each of its streams had a caller.
        batch: Photos a run.
        seconds: As asked for, of all intervals together.
        host: The machine.
        gpus: NVIDIA's.
        intervals: Those that are complete, in their order.
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
        """By which share the last interval is slower than the first (negative: faster); None: it cannot be said."""
        if len(self.intervals) < 2:
            return None
        first, last = (self.intervals[place].photos_per_second for place in (0, -1))
        return 1 - last / first if first and last else None

    @property
    def short(self) -> bool:
        """Whether an interval is shorter than a run, so that its rate is in part that of its neighbours."""
        at_a_time = self.batch * self.info.streams
        return any(one.photos_per_second * (one.end - one.start) < at_a_time for one in self.intervals)

    @property
    def verdict(self) -> str:
        """Whether the machine slows down, in a sentence."""
        if self.loss is None:
            return "there are not two intervals with runs in them, so nothing can be said of slowing down"
        last = "the last interval" if self.complete else f"interval {len(self.intervals)}, the last one measured,"
        change = f"{100 * abs(self.loss):.0f} % {'slower' if self.loss > 0 else 'faster'}"
        pace = "slows down under load" if self.loss >= SLOWER else "keeps its pace"
        short = "; but a run takes longer than an interval, whose rate says little by itself: give it more minutes"
        return f"{last} is {change} than the first: this machine {pace}{short if self.short else ''}"

    def as_dict(self) -> dict[str, Any]:
        """JSON values."""
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
    """Keep an engine's callers at work, and tell each interval; closed early, they end with their run.

    An interval is told when the runs that were under way at its end are done, for only then is it known how much of
    them lies in it.

    Args:
        engine: Gets as many callers as it has streams, each in a thread of its own.
        photos: uint8 [N, H, W, 3], what each run is given.
        seconds: Of all :data:`INTERVALS` together; what the callers need for their first run comes on top.

    Raises:
        EngineError: A run failed.
    """
    callers = engine.describe().streams
    marks: list[list[float]] = [[] for _ in range(callers)]  # when each caller began, and was done with each run
    stop = threading.Event()

    def call(caller: int) -> None:
        engine.run(photos)  # a thread's first run makes what is the thread's own
        marks[caller].append(time.perf_counter())
        while not stop.is_set():
            engine.run(photos)
            marks[caller].append(time.perf_counter())

    def reach(when: float) -> None:
        while not all(of_caller and of_caller[-1] >= when for of_caller in marks):
            _let_work(working, time.perf_counter() + 0.01)

    with ThreadPoolExecutor(callers) as pool:
        try:
            working = [pool.submit(call, caller) for caller in range(callers)]
            reach(-math.inf)
            start, length = time.perf_counter(), seconds / INTERVALS
            for number in range(INTERVALS):
                begun, ended = number * length, (number + 1) * length
                _let_work(working, start + ended)
                celsius, mhz = host.temperatures(), host.frequencies()
                reach(start + ended)
                runs = sum(_runs(of_caller, start + begun, start + ended) for of_caller in marks)
                rate = len(photos) * runs / length
                yield Interval(start=begun, end=ended, photos_per_second=rate, celsius=celsius, mhz=mhz)
        finally:
            stop.set()  # after Ctrl-C, or the failure of one, the others end with their run


def _let_work(working: Sequence[Future[None]], until: float) -> None:
    """Wait until then, by the performance counter.

    Raises:
        EngineError: A caller's run failed.
    """
    while (left := until - time.perf_counter()) > 0:
        ended, _ = wait(working, min(left, host.LOOK_UP), FIRST_EXCEPTION)
        for future in ended:
            future.result()


def _runs(marks: list[float], begun: float, ended: float) -> float:
    """How many runs a caller has done between two times, parts of runs counted as such.

    Args:
        marks: When it began its first run, and was done with each; what is no longer needed is dropped.
        begun: No earlier than the first of them.
        ended: No later than the last.
    """
    known = tuple(marks)  # the caller goes on
    first, last = np.interp([begun, ended], known, np.arange(len(known)))
    del marks[: int(last)]  # hours of short runs would be millions
    return float(last - first)
