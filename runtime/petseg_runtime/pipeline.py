"""Reads, infers and writes photos concurrently, in order, in bounded memory, with every photo accounted for."""

from __future__ import annotations

import atexit
import functools
import math
import queue
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Final, Generic, Self, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt

from petseg_runtime import host
from petseg_runtime.errors import EngineError, InputError
from petseg_runtime.memory_budget import MemoryBudget, Reservation
from petseg_runtime.signals import held
from petseg_runtime.text import counted

__all__ = ["Outcome", "Pipeline", "Steps", "Timings"]

U8: TypeAlias = npt.NDArray[np.uint8]
Source = TypeVar("Source")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Steps(Generic[Source, Result]):
    """The steps of a pipeline; each is called from several threads.

    Attributes:
        read: Takes a source, and a function that reserves memory; returns the decoded photo, whose ``image`` is uint8
            [H, W, 3]. It must call that function with the number of bytes that the photo and its result will take
            before allocating them; the call blocks until the memory budget has them. An :class:`InputError` fails this
            photo alone.
        infer: uint8 [N, H, W, 3] to uint8 [N, H, W].
        write: Takes the source, the photo and the network's output uint8 [H, W]; returns the photo's result. An
            :class:`InputError` fails this photo alone.
    """

    read: Callable[[Source, Callable[[int], None]], Any]
    infer: Callable[[U8], U8]
    write: Callable[[Source, Any, U8], Result]


@dataclass
class Outcome(Generic[Source, Result]):
    """The outcome of one photo.

    Attributes:
        source: The photo.
        value: What the last step returned; None if the photo failed.
        error: Why the photo failed; None if it did not.
        seconds: The duration of each step that ran. The time of a batch is divided equally among its photos.
    """

    source: Source
    value: Result | None = None
    error: InputError | None = None
    seconds: dict[str, float] = field(default_factory=dict)


class Timings:
    """Durations of steps as histograms with bins 2 % wide, so that hours of them take bounded memory."""

    _WIDTH: Final = math.log(1.02)

    def __init__(self) -> None:
        self._bins: dict[str, Counter[int]] = {}
        self._sums: dict[str, float] = {}
        self._lock = threading.Lock()

    def add(self, step: str, seconds: float) -> None:
        """Add one duration."""
        with self._lock:
            self._bins.setdefault(step, Counter())[math.floor(math.log(max(seconds, 1e-7)) / self._WIDTH)] += 1
            self._sums[step] = self._sums.get(step, 0.0) + seconds

    def summary(self) -> dict[str, dict[str, float]]:
        """Returns ``sum``, ``p50``, ``p95`` and ``p99`` of each step in seconds; the percentiles are exact to 1 %."""
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
    # Gets one item, at the end: the error to raise, or None. Not a future, because Ctrl-C in one of a future's methods
    # may leave its lock locked; see `MemoryBudget`.
    end: queue.SimpleQueue[BaseException | None] = field(default_factory=queue.SimpleQueue)
    value: Any = None  # what the latest step returned
    reservation: Reservation = field(default_factory=Reservation)


class Pipeline(Generic[Source, Result]):
    """Threads that read, threads that infer and threads that write, connected by queues.

    At most ``window`` photos are in flight, fewer if they would take more than half of the available memory. This is
    the backpressure: the consumer sets the pace, and a slow photo stops the others once the window is full. Use the
    pipeline as a context manager: leaving it waits for the steps that are running, and drops all other photos.
    """

    def __init__(
        self, steps: Steps[Source, Result], streams: int, batch: int = 1, *, workers: int, memory: int | None = None
    ) -> None:
        """Start the threads.

        Args:
            steps: The steps that each photo goes through.
            streams: Number of threads that infer.
            batch: Maximum number of photos in one run of the network; a run takes those that are ready and does not
                wait for more.
            workers: Number of threads that read, and of threads that write.
            memory: Bytes that photos in flight may take together (a larger photo is processed alone); None: half of
                the available memory.
        """
        self._steps, self._batch = steps, batch
        self._stopping = False
        self.window = 2 * (workers + streams * batch)
        self._memory = MemoryBudget(host.available_memory() // 2 if memory is None else memory)
        self._unread: queue.SimpleQueue[_Job[Source, Result] | None] = queue.SimpleQueue()
        self._writers: set[threading.Thread] = set()
        self._write = ThreadPoolExecutor(
            workers, "petseg-write", initializer=lambda: self._writers.add(threading.current_thread())
        )
        self._ready: queue.SimpleQueue[_Job[Source, Result] | None] = queue.SimpleQueue()
        # A script may end before it has consumed all results, and without closing. At exit, Python joins threads that
        # are not daemons before it calls atexit handlers, and such threads would never end.
        self._read = [_daemon(self._read_loop, f"petseg-read-{number}") for number in range(workers)]
        self._infer = [_daemon(self._infer_loop, f"petseg-infer-{number}") for number in range(streams)]
        atexit.register(self.close)
        for thread in (*self._read, *self._infer):
            thread.start()

    def run(self, sources: Iterable[Source]) -> Iterator[Outcome[Source, Result]]:
        """Run all steps on every source.

        Args:
            sources: Iterated over lazily, at most ``window`` ahead of the outcomes.

        Yields:
            The outcome of each source, in order.

        Raises:
            Exception: Whatever a step raises other than an :class:`InputError`.
        """
        jobs: deque[_Job[Source, Result]] = deque()
        try:
            for source in sources:
                job: _Job[Source, Result] = _Job(Outcome(source))
                jobs.append(job)
                self._unread.put(job)
                if len(jobs) == self.window:
                    yield self._wait_for(jobs.popleft())
            while jobs:
                yield self._wait_for(jobs.popleft())
        finally:
            self._memory.release(*(job.reservation for job in jobs))

    def close(self) -> None:
        """Stop all threads, and drop the steps that have not begun. After a Ctrl-C within it, call it again."""
        if threading.current_thread() in (*self._read, *self._infer, *self._writers):
            # The garbage collector closes an abandoned pipeline in whatever thread it runs. One of the pipeline's own
            # cannot wait for itself, nor for threads that need a lock which it holds: another thread does it.
            threading.Thread(target=self.close, name="petseg-close", daemon=True).start()
            return
        self._stopping = True
        with held():  # a signal after an error would leave incomplete results
            self._memory.close()
            # In this order, because each step queues work for the next.
            for threads, work in ((self._read, self._unread), (self._infer, self._ready)):
                for _ in threads:
                    work.put(None)
                for thread in threads:
                    if thread.ident is not None:  # Ctrl-C may have interrupted the start
                        thread.join()
            self._write.shutdown(cancel_futures=True)
        atexit.unregister(self.close)  # last: if a Ctrl-C interrupts this method, the rest is done at exit

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _wait_for(self, job: _Job[Source, Result]) -> Outcome[Source, Result]:
        self._memory.expedite(job.reservation)
        try:
            error = job.end.get()
        finally:
            self._memory.release(job.reservation)
        if error:
            raise error
        return job.outcome

    def _read_loop(self) -> None:
        """The loop of a thread that reads: one photo after another, until the sentinel None."""
        while (job := self._unread.get()) is not None:
            if not self._stopping:
                self._read_one(job)
            del job  # else the waiting thread would keep it and its result alive

    def _read_one(self, job: _Job[Source, Result]) -> None:
        reserve = functools.partial(self._memory.reserve, job.reservation)
        if self._run_step(job, "read", lambda: self._steps.read(job.outcome.source, reserve)):
            self._ready.put(job)

    def _write_one(self, job: _Job[Source, Result], answer: U8) -> None:
        photo = job.value
        if self._run_step(job, "write", lambda: self._steps.write(job.outcome.source, photo, answer)):
            job.outcome.value = job.value
            job.end.put(None)

    def _run_step(self, job: _Job[Source, Result], step: str, action: Callable[[], Any]) -> bool:
        """Run a step, and return whether it succeeded; an error ends the job."""
        start = time.perf_counter()
        failure = None
        try:
            job.value = action()
            return True
        except InputError as error:
            job.outcome.error = error
        except BaseException as error:  # noqa: BLE001 (raised again to the consumer)
            failure = error
        finally:
            job.outcome.seconds[step] = time.perf_counter() - start - job.reservation.waited
            job.reservation.waited = 0.0
        job.end.put(failure)
        return False

    def _infer_loop(self) -> None:
        """The loop of a thread that infers: batches of the photos that are ready, until the sentinel None."""
        while jobs := self._next_batch():
            if not self._stopping:
                self._infer_batch(jobs)
            del jobs  # as in `_read_loop`

    def _next_batch(self) -> list[_Job[Source, Result]]:
        """Waits for a photo to be read; returns it and others that are ready, up to a batch. Empty at the sentinel."""
        if (job := self._ready.get()) is None:
            return []
        jobs = [job]
        while len(jobs) < self._batch:
            try:  # not `empty()`, then `get()`: another thread may take the job in between, and this one would block
                another = self._ready.get_nowait()
            except queue.Empty:
                break
            if another is None:
                self._ready.put(None)
                break
            jobs.append(another)
        return jobs

    def _infer_batch(self, jobs: list[_Job[Source, Result]]) -> None:
        start = time.perf_counter()
        try:
            first = jobs[0].value.image
            batch = first[None] if len(jobs) == 1 else np.stack([job.value.image for job in jobs])
            answers = self._steps.infer(batch)
            if len(answers) != len(jobs):
                results, photos = counted(len(answers), "result"), counted(len(jobs), "photo")
                raise EngineError(f"the engine returned {results} for {photos}")
        except BaseException as error:  # noqa: BLE001 (raised again to the consumer)
            for job in jobs:
                job.end.put(error)
            return
        share = (time.perf_counter() - start) / len(jobs)
        for job, answer in zip(jobs, answers, strict=True):
            job.outcome.seconds["infer"] = share
            try:
                self._write.submit(self._write_one, job, answer)
            except RuntimeError as error:  # Python is exiting, and executors accept no more work
                job.end.put(error)


def _daemon(work: Callable[[], None], name: str) -> threading.Thread:
    return threading.Thread(target=work, name=name, daemon=True)
