"""Read, infer and write at the same time, with every photo accounted for, in order, and in bounded memory."""

from __future__ import annotations

import atexit
import functools
import math
import queue
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Final, Generic, Self, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt

from petseg_runtime import host
from petseg_runtime.errors import EngineError, InputError
from petseg_runtime.memory_budget import MemoryBudget, Reservation

__all__ = ["Outcome", "Pipeline", "Steps", "Timings"]

U8: TypeAlias = npt.NDArray[np.uint8]
Source = TypeVar("Source")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Steps(Generic[Source, Result]):
    """What is done to a photo; each is called from several threads.

    Attributes:
        read: A source to a photo that has been read, whose ``image`` is uint8 [H, W, 3]. What it raises of
            :class:`InputError` is the photo's own failure. Its second argument is a function to be called with the
            number of bytes that the photo and its result will take, before they are allocated; it waits until the
            memory budget has them.
        infer: uint8 [N, H, W, 3] to uint8 [N, H, W].
        write: The source, the photo and its answer uint8 [H, W] to what becomes of it; as ``read``.
    """

    read: Callable[[Source, Callable[[int], None]], Any]
    infer: Callable[[U8], U8]
    write: Callable[[Source, Any, U8], Result]


@dataclass
class Outcome(Generic[Source, Result]):
    """What became of one photo.

    Attributes:
        source: The photo.
        value: What the last step returned; None if it failed.
        error: Why it failed; None if it did not.
        seconds: What each step took, those it came to. Of a batch, each photo has its share.
    """

    source: Source
    value: Result | None = None
    error: InputError | None = None
    seconds: dict[str, float] = field(default_factory=dict)


class Timings:
    """How long steps take, over hours in bounded memory: a histogram whose bins are 2 % wide."""

    _WIDTH: Final = math.log(1.02)

    def __init__(self) -> None:
        self._bins: dict[str, Counter[int]] = {}
        self._sums: dict[str, float] = {}
        self._lock = threading.Lock()

    def add(self, step: str, seconds: float) -> None:
        """Count one duration."""
        with self._lock:
            self._bins.setdefault(step, Counter())[math.floor(math.log(max(seconds, 1e-7)) / self._WIDTH)] += 1
            self._sums[step] = self._sums.get(step, 0.0) + seconds

    def summary(self) -> dict[str, dict[str, float]]:
        """Of each step: the sum, and ``p50``, ``p95``, ``p99`` to 1 %; in seconds."""
        with self._lock:
            return {
                step: {"sum": self._sums[step]} | {f"p{p}": self._percentile(bins, p) for p in (50, 95, 99)}
                for step, bins in self._bins.items()
            }

    def _percentile(self, bins: Counter[int], percent: int) -> float:
        wanted, seen = math.ceil(bins.total() * percent / 100), 0
        for index in sorted(bins):
            seen += bins[index]
            if seen >= wanted:
                return math.exp((index + 0.5) * self._WIDTH)
        return 0.0


@dataclass
class _Job(Generic[Source, Result]):
    outcome: Outcome[Source, Result]
    future: Future[None] = field(default_factory=Future)
    value: Any = None  # what the latest step returned
    reservation: Reservation = field(default_factory=Reservation)  # of memory


class Pipeline(Generic[Source, Result]):
    """Threads that read, threads that infer, threads that write, and queues between them.

    All queues together hold at most ``window`` photos, and fewer where these would take more than half of the memory
    that is there: the consumer sets the pace, and a slow photo makes the others wait once so many are ahead of it.
    Use it as a context manager: leaving it waits for what is being done, and drops what has not begun.
    """

    def __init__(
        self, steps: Steps[Source, Result], streams: int, batch: int = 1, *, workers: int, memory: int | None = None
    ) -> None:
        """Start the threads.

        Args:
            steps: What to do.
            streams: Threads that infer.
            batch: Most photos in one run of the network; a run takes those that are ready, and waits for no more.
            workers: Threads that read, and as many that write.
            memory: Bytes that photos may take at once (one that is larger by itself is done alone); None: half of what
                is available.
        """
        self._steps, self._batch = steps, batch
        self._stopping = False
        self.window = 2 * (workers + streams * batch)
        self._memory = MemoryBudget(host.available_memory() // 2 if memory is None else memory)
        self._unread: queue.SimpleQueue[_Job[Source, Result] | None] = queue.SimpleQueue()
        self._write = ThreadPoolExecutor(workers, "petseg-write")
        self._ready: queue.SimpleQueue[_Job[Source, Result] | None] = queue.SimpleQueue()
        # A script may end while results are left, and nobody closes then. Python waits for threads that are no daemons
        # before it calls what is registered here, and these would wait for ever.
        self._read = [_daemon(self._read_next, f"petseg-read-{number}") for number in range(workers)]
        self._infer = [_daemon(self._infer_ready, f"petseg-infer-{number}") for number in range(streams)]
        atexit.register(self.close)
        for thread in (*self._read, *self._infer):
            thread.start()

    def run(self, sources: Iterable[Source]) -> Iterator[Outcome[Source, Result]]:
        """Do all steps to every source.

        Args:
            sources: Taken from as results are.

        Yields:
            What became of each, in order.

        Raises:
            Exception: Whatever a step raises that is not an :class:`InputError`.
        """
        jobs: deque[_Job[Source, Result]] = deque()
        try:
            for source in sources:
                job: _Job[Source, Result] = _Job(Outcome(source))
                jobs.append(job)
                self._unread.put(job)
                if len(jobs) == self.window:
                    yield self._finished(jobs.popleft())
            while jobs:
                yield self._finished(jobs.popleft())
        finally:
            self._memory.release(*(job.reservation for job in jobs))

    def close(self) -> None:
        """Stop all threads; what has not begun is dropped. A second time, it finishes what a Ctrl-C cut short."""
        self._stopping = True
        self._memory.close()
        # In this order, because each step hands its work to the next.
        for threads, work in ((self._read, self._unread), (self._infer, self._ready)):
            for _ in threads:
                work.put(None)
            for thread in threads:
                thread.join()
        self._write.shutdown(cancel_futures=True)
        atexit.unregister(self.close)  # last: a Ctrl-C may come before, and what is left is done when Python ends

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _finished(self, job: _Job[Source, Result]) -> Outcome[Source, Result]:
        self._memory.expedite(job.reservation)
        try:
            job.future.result()
        finally:
            self._memory.release(job.reservation)
        return job.outcome

    def _read_next(self) -> None:
        """Read what is next, until told to stop."""
        while (job := self._unread.get()) is not None:
            if not self._stopping:
                self._read_one(job)
            del job  # which a thread that waits would keep, with the result that was made of it

    def _read_one(self, job: _Job[Source, Result]) -> None:
        reserve = functools.partial(self._memory.reserve, job.reservation)
        if self._attempt(job, "read", lambda: self._steps.read(job.outcome.source, reserve)):
            self._ready.put(job)

    def _write_one(self, job: _Job[Source, Result], answer: U8) -> None:
        photo = job.value
        if self._attempt(job, "write", lambda: self._steps.write(job.outcome.source, photo, answer)):
            job.outcome.value = job.value
            job.future.set_result(None)

    def _attempt(self, job: _Job[Source, Result], step: str, action: Callable[[], Any]) -> bool:
        """Do a step; what it raises is the job's end."""
        start = time.perf_counter()
        failure = None
        try:
            job.value = action()
            return True
        except InputError as error:
            job.outcome.error = error
        except BaseException as error:  # noqa: BLE001 (raised again where results are asked for)
            failure = error
        finally:
            job.outcome.seconds[step] = time.perf_counter() - start - job.reservation.waited
            job.reservation.waited = 0.0
        if failure:
            job.future.set_exception(failure)
        else:
            job.future.set_result(None)
        return False

    def _infer_ready(self) -> None:
        """Infer what is ready, in batches of what is waiting, until told to stop."""
        while jobs := self._waiting():
            if not self._stopping:
                self._infer_some(jobs)
            del jobs  # as in `_read_next`

    def _waiting(self) -> list[_Job[Source, Result]]:
        """What has been read, up to a batch, as soon as there is one; empty: the end."""
        if (job := self._ready.get()) is None:
            return []
        jobs = [job]
        while len(jobs) < self._batch:
            try:  # not `empty` first: another thread may take what was there, and this one would wait with its job
                another = self._ready.get_nowait()
            except queue.Empty:
                break
            if another is None:
                self._ready.put(None)
                break
            jobs.append(another)
        return jobs

    def _infer_some(self, jobs: list[_Job[Source, Result]]) -> None:
        start = time.perf_counter()
        try:
            first = jobs[0].value.image
            batch = first[None] if len(jobs) == 1 else np.stack([job.value.image for job in jobs])
            answers = self._steps.infer(batch)
            if len(answers) != len(jobs):
                raise EngineError(f"the engine was given {len(jobs)} photos, and answered {len(answers)}")
        except BaseException as error:  # noqa: BLE001 (raised again where results are asked for)
            for job in jobs:
                job.future.set_exception(error)
            return
        share = (time.perf_counter() - start) / len(jobs)
        for job, answer in zip(jobs, answers, strict=True):
            job.outcome.seconds["infer"] = share
            try:
                self._write.submit(self._write_one, job, answer)
            except RuntimeError as error:  # Python is ending, and takes no more work
                job.future.set_exception(error)


def _daemon(work: Callable[[], None], name: str) -> threading.Thread:
    return threading.Thread(target=work, name=name, daemon=True)
