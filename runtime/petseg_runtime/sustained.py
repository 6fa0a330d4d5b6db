"""What an engine keeps up: all its callers at work without pause, and the rate of one interval after the other.

Devices without a fan slow down as they get warm, and a benchmark of seconds is over before that. Beside each rate
stands how warm the machine was and how fast its cores ran, where the kernel says so.
"""

from __future__ import annotations

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
#: How many runs a caller has done, and when it was done with the last one.
_Mark: TypeAlias = tuple[int, float]

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
        photos_per_second: Of all callers together.
        celsius: At its end, of each of the kernel's thermal zones by its type; empty where there are none.
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
        if len(self.intervals) < 2 or not self.intervals[0].photos_per_second:
            return None
        return 1 - self.intervals[-1].photos_per_second / self.intervals[0].photos_per_second

    @property
    def verdict(self) -> str:
        """Whether the machine slows down, in a sentence."""
        if self.loss is None:
            return "there are not two intervals with runs in them, so nothing can be said of slowing down"
        last = "the last interval" if self.complete else f"interval {len(self.intervals)}, the last one measured,"
        change = f"{100 * abs(self.loss):.0f} % {'slower' if self.loss > 0 else 'faster'}"
        pace = "slows down under load" if self.loss >= SLOWER else "keeps its pace"
        return f"{last} is {change} than the first: this machine {pace}"

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
    """Keep an engine's callers at work, and tell each interval as it ends; closed early, they end with their run.

    Args:
        engine: Gets as many callers as it has streams, each in a thread of its own.
        photos: uint8 [N, H, W, 3], what each run is given.
        seconds: Of all :data:`INTERVALS` together; what the callers need for their first run comes on top.

    Raises:
        EngineError: A run failed.
    """
    callers = engine.describe().streams
    marks: list[_Mark | None] = [None] * callers
    stop = threading.Event()

    def call(caller: int) -> None:
        engine.run(photos)  # a thread's first run makes what is the thread's own
        count = 0
        while not stop.is_set():
            marks[caller] = (count, time.perf_counter())
            engine.run(photos)
            count += 1

    with ThreadPoolExecutor(callers) as pool:
        try:
            working = [pool.submit(call, caller) for caller in range(callers)]
            while not all(marks):
                _let_work(working, time.perf_counter() + 0.01)
            start, before, begun = time.perf_counter(), list(marks), 0.0
            for number in range(1, INTERVALS + 1):
                _let_work(working, start + seconds * number / INTERVALS)
                ended, after = time.perf_counter() - start, list(marks)
                yield Interval(
                    start=begun,
                    end=ended,
                    photos_per_second=len(photos) * _rate(before, after),
                    celsius=host.temperatures(),
                    mhz=host.frequencies(),
                )
                before, begun = after, ended
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


def _rate(before: Sequence[_Mark | None], after: Sequence[_Mark | None]) -> float:
    """Runs a second of all callers together; each from the end of a run to the end of a run: no part of one is lost."""
    rate = 0.0
    for first, last in zip(before, after, strict=True):
        if first and last and last[0] > first[0]:
            rate += (last[0] - first[0]) / (last[1] - first[1])
    return rate
