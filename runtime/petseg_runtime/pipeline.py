"""Read, infer and write at the same time, with every photo accounted for, in order, and in bounded memory."""

from __future__ import annotations

import atexit
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Generic, Self, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt

from petseg_runtime.errors import EngineError, InputError

__all__ = ["Outcome", "Pipeline", "Steps"]

U8: TypeAlias = npt.NDArray[np.uint8]
Source = TypeVar("Source")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Steps(Generic[Source, Result]):
    """What is done to a photo; each is called from several threads.

    Attributes:
        read: A source to a photo that has been read, whose ``image`` is uint8 [H, W, 3]. What it raises of
            :class:`InputError` is the photo's own failure.
        infer: uint8 [N, H, W, 3] to uint8 [N, H, W].
        write: The source, the photo and its answer uint8 [H, W] to what becomes of it; as ``read``.
    """

    read: Callable[[Source], Any]
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


@dataclass
class _Job(Generic[Source, Result]):
    outcome: Outcome[Source, Result]
    future: Future[None] = field(default_factory=Future)
    value: Any = None  # what the latest step returned


class Pipeline(Generic[Source, Result]):
    """Threads that read, threads that infer, threads that write, and queues between them.

    All queues together hold at most ``window`` photos: who asks for results sets the pace, and a photo that takes long
    makes the others wait once so many are ahead of it. Use it as a context manager: leaving it waits for what is being
    done, and drops what has not begun.
    """

    def __init__(self, steps: Steps[Source, Result], streams: int, batch: int = 1, *, workers: int) -> None:
        """Start the threads.

        Args:
            steps: What to do.
            streams: Threads that infer.
            batch: Photos in one run of the network, at most: as many as wait for one.
            workers: Threads that read, and as many that write.
        """
        self._steps, self._batch = steps, batch
        self._stopping = False
        self.window = 2 * (workers + streams * batch)
        self._read = ThreadPoolExecutor(workers, "petseg-read")
        self._write = ThreadPoolExecutor(workers, "petseg-write")
        self._ready: queue.SimpleQueue[_Job[Source, Result] | None] = queue.SimpleQueue()
        # A script may end while results are left, and nobody closes then. Python waits for threads that are no daemons
        # before it calls what is registered here, and these would wait for ever.
        names = [f"petseg-infer-{number}" for number in range(streams)]
        self._infer = [threading.Thread(target=self._infer_ready, name=name, daemon=True) for name in names]
        atexit.register(self.close)
        for thread in self._infer:
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
        for source in sources:
            job: _Job[Source, Result] = _Job(Outcome(source))
            jobs.append(job)
            self._read.submit(self._read_one, job)
            if len(jobs) == self.window:
                yield _finished(jobs.popleft())
        while jobs:
            yield _finished(jobs.popleft())

    def close(self) -> None:
        """Stop all threads; what has not begun is dropped."""
        self._stopping = True
        atexit.unregister(self.close)
        # In this order, because each step hands its work to the next.
        self._read.shutdown(cancel_futures=True)
        for _ in self._infer:
            self._ready.put(None)
        for thread in self._infer:
            thread.join()
        self._write.shutdown(cancel_futures=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _read_one(self, job: _Job[Source, Result]) -> None:
        if self._attempt(job, "read", lambda: self._steps.read(job.outcome.source)):
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
            job.outcome.seconds[step] = time.perf_counter() - start
        job.future.set_exception(failure) if failure else job.future.set_result(None)
        return False

    def _infer_ready(self) -> None:
        """Infer what is ready, in batches of what is waiting, until told to stop."""
        while (job := self._ready.get()) is not None:
            jobs = [job]
            while len(jobs) < self._batch and not self._ready.empty():
                another = self._ready.get()
                if another is None:
                    self._ready.put(None)
                    break
                jobs.append(another)
            if not self._stopping:
                self._infer_some(jobs)

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


def _finished(job: _Job[Source, Result]) -> Outcome[Source, Result]:
    job.future.result()
    return job.outcome
