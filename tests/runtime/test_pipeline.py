"""The pipeline: order, failures, batches, memory bounds, and that no thread is left running."""

from __future__ import annotations

import gc
import queue
import signal
import subprocess
import sys
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from petseg_runtime.errors import EngineError, InputError, UnreadableImage
from petseg_runtime.memory_budget import MemoryBudget
from petseg_runtime.pipeline import Pipeline, Steps
from petseg_runtime.signals import terminable


@dataclass(frozen=True)
class Photo:
    image: np.ndarray


def read(source: int, reserve: Callable[[int], None]) -> Photo:
    """A photo whose one pixel is the source; odd ones that end in 7 cannot be read."""
    if source % 10 == 7:
        raise UnreadableImage(f"{source}: unreadable")
    return Photo(np.full((1, 1, 3), source % 251, np.uint8))


def infer(batch: np.ndarray) -> np.ndarray:
    return batch[..., 0]


def write(source: int, photo: Photo, answer: np.ndarray) -> tuple[int, int]:
    """The source, and the network's output for it."""
    if source % 10 == 3:
        raise InputError(f"{source}: unwritable")
    return source, int(answer[0, 0])


STEPS: Steps[int, tuple[int, int]] = Steps(read, infer, write)


def threads() -> set[str]:
    return {thread.name for thread in threading.enumerate() if thread.name.startswith("petseg")}


@given(st.integers(0, 60), st.integers(1, 3), st.integers(1, 5), st.integers(1, 3))
@settings(max_examples=25)
def test_every_source_comes_out_once_in_order_with_its_output(
    count: int, streams: int, batch: int, workers: int
) -> None:
    with Pipeline(STEPS, streams, batch, workers=workers) as pipeline:
        outcomes = list(pipeline.run(range(count)))
    assert [outcome.source for outcome in outcomes] == list(range(count))
    for outcome in outcomes:
        if outcome.source % 10 == 7:
            assert str(outcome.error) == f"{outcome.source}: unreadable"
            assert set(outcome.seconds) == {"read"}
        elif outcome.source % 10 == 3:
            assert str(outcome.error) == f"{outcome.source}: unwritable"
            assert outcome.value is None
        else:
            assert outcome.value == (outcome.source, outcome.source % 251)
            assert outcome.error is None
            assert list(outcome.seconds) == ["read", "infer", "write"]
    assert not threads()


def test_a_pipeline_can_run_twice() -> None:
    with Pipeline(STEPS, 1, workers=1) as pipeline:
        assert [outcome.source for outcome in pipeline.run([1, 2])] == [1, 2]
        assert [outcome.source for outcome in pipeline.run([4])] == [4]


def test_the_pipeline_keeps_no_reference_to_consumed_results() -> None:
    """A thread that waits for its next photo does not keep the last one: at 48 megapixels, that would be 190 MB."""

    class Picture:
        pass

    with Pipeline(Steps(read, infer, lambda *_: Picture()), 2, 2, workers=3) as pipeline:
        kept = [weakref.ref(outcome.value) for outcome in pipeline.run(range(7)) if outcome.value]
        assert len(kept) == 7
        deadline = time.monotonic() + 5
        while any(picture() for picture in kept) and time.monotonic() < deadline:
            time.sleep(0.01)  # the threads are about to wait again
        assert [picture() for picture in kept] == [None] * 7


def test_a_closed_pipeline_is_freed() -> None:
    """A service makes one for each request, and closes it."""
    with Pipeline(STEPS, 1, workers=1) as pipeline:
        assert next(pipeline.run([1])).source == 1
    closed = weakref.ref(pipeline)
    del pipeline
    gc.collect()
    assert closed() is None


def test_a_slow_photo_does_not_change_the_order() -> None:
    def slow(source: int, reserve: Callable[[int], None]) -> Photo:
        time.sleep(0.05 if source == 0 else 0)
        return read(source, reserve)

    with Pipeline(Steps(slow, infer, write), 2, workers=2) as pipeline:
        assert [outcome.source for outcome in pipeline.run(range(6))] == list(range(6))


def test_read_ahead_is_limited_by_the_window() -> None:
    taken = []

    def sources() -> Iterator[int]:
        for number in range(100):
            taken.append(number)
            yield number

    with Pipeline(STEPS, 1, 2, workers=2) as pipeline:
        results = pipeline.run(sources())
        for asked in range(1, 20):
            next(results)
            assert len(taken) <= pipeline.window + asked - 1
        assert len(taken) == pipeline.window + 18


def test_batches_contain_waiting_photos_up_to_the_maximum() -> None:
    sizes: list[int] = []
    spent: list[float] = []
    began = threading.Event()

    def blocked(batch: np.ndarray) -> np.ndarray:
        start = time.perf_counter()
        began.wait(10)  # until everything has been read
        sizes.append(len(batch))
        time.sleep(0.05)
        spent.append(time.perf_counter() - start)
        return infer(batch)

    def counted(source: int, reserve: Callable[[int], None]) -> Photo:
        if source == 9:  # the last that fits in the window
            began.set()
        return read(source, reserve)

    with Pipeline(Steps(counted, blocked, write), 1, 4, workers=1) as pipeline:
        outcomes = list(pipeline.run(range(14)))
    assert [outcome.source for outcome in outcomes] == list(range(14))
    assert sum(sizes) == 13  # source 7 cannot be read
    assert max(sizes) == 4
    assert sum(outcome.seconds.get("infer", 0) for outcome in outcomes) == pytest.approx(sum(spent), rel=0.5)


def test_an_engine_that_returns_too_few_results_ends_the_run() -> None:
    with (
        pytest.raises(EngineError, match=r"the engine returned 0 results for 1 photo$"),
        Pipeline(Steps(read, lambda batch: infer(batch)[1:], write), 1, workers=1) as pipeline,
    ):
        list(pipeline.run([0, 1]))


@pytest.mark.parametrize("step", ["read", "infer", "write"])
def test_any_other_error_ends_the_run_and_all_threads(step: str) -> None:
    def broken(*_: Any) -> Any:
        raise EngineError("the engine broke")

    steps = {"read": read, "infer": infer, "write": write, step: broken}
    with pytest.raises(EngineError, match="broke"), Pipeline(Steps(**steps), 2, workers=2) as pipeline:
        list(pipeline.run(range(1000)))
    assert not threads()


def test_an_error_in_the_source_iterator_ends_the_run() -> None:
    def sources() -> Iterator[int]:
        yield 1
        raise LookupError("no more")

    with pytest.raises(LookupError), Pipeline(STEPS, 1, workers=1) as pipeline:
        list(pipeline.run(sources()))
    assert not threads()


@pytest.mark.parametrize(("held", "before"), [("read", None), ("infer", "read"), ("write", "infer")])
def test_leaving_early_cancels_pending_photos(held: str, before: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second photo blocks in a step until the pipeline is closing, and the third waits for that step."""
    begun = dict.fromkeys(("read", "infer", "write"), 0)
    second, third, leaving = threading.Event(), threading.Event(), threading.Event()

    def counted(step: str, action: Callable[..., Any]) -> Callable[..., Any]:
        def act(*given: Any) -> Any:
            begun[step] += 1
            if step == held and begun[step] == 2:
                second.set()
                assert leaving.wait(10)
            done = action(*given)
            if step == before and begun[step] == 3:
                third.set()
            return done

        return act

    # The executor cancels photos that wait to be written, last; the other threads check that they should stop.
    told, name = (Future, "cancel") if held == "write" else (MemoryBudget, "close")
    tell = getattr(told, name)

    def tell_and_let_go(self: Any) -> Any:
        try:
            return tell(self)
        finally:
            leaving.set()

    monkeypatch.setattr(told, name, tell_and_let_go)
    steps = {name: counted(name, step) for name, step in {"read": read, "infer": infer, "write": write}.items()}
    with Pipeline(Steps(**steps), 1, workers=1) as pipeline:
        assert next(pipeline.run([0, 1, 2])).source == 0
        assert second.wait(10)
        assert before is None or third.wait(10)
    assert begun[held] == 2
    assert not threads()


def test_leaving_ends_a_thread_that_is_collecting_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second photo is in the engine; behind the third waits the sentinel."""
    begun, ending = [threading.Event() for _ in range(3)], threading.Event()

    class Queue(queue.SimpleQueue[Any]):
        def put(self, item: Any, *args: Any) -> None:
            super().put(item, *args)
            if item is None and self.qsize() > 1:
                ending.set()

    def paced(source: int, reserve: Callable[[int], None]) -> Photo:
        assert not source or begun[source - 1].wait(10)
        return read(source, reserve)

    def blocked(batch: np.ndarray) -> np.ndarray:
        source = int(batch[0, 0, 0, 0])
        begun[source].set()
        assert source != 1 or ending.wait(10)
        return infer(batch)

    monkeypatch.setattr(queue, "SimpleQueue", Queue)
    with Pipeline(Steps(paced, blocked, write), 1, 2, workers=1) as pipeline:
        assert next(pipeline.run([0, 1, 2])).source == 0
        while not (begun[1].is_set() and pipeline._ready.qsize()):
            time.sleep(0.001)
    assert not begun[2].is_set()
    assert not threads()


@dataclass(frozen=True)
class Heavy:
    image: np.ndarray
    size: int


def crowd(sizes: list[int], memory: int, *, streams: int = 3, slow: int = -1) -> tuple[list[int], int]:
    """Runs photos of these sizes with this much memory; returns their order, and the most memory reserved at once."""
    lock, held, most = threading.Lock(), 0, 0

    def read_sized(source: int, reserve: Callable[[int], None]) -> Heavy:
        nonlocal held, most
        reserve(sizes[source])
        with lock:
            held += sizes[source]
            most = max(most, held)
        time.sleep(0.05 if source == slow else 0.0005)
        return Heavy(np.zeros((1, 1, 3), np.uint8), sizes[source])

    def keep(source: int, photo: Heavy, answer: np.ndarray) -> Heavy:
        return photo

    out = []
    with Pipeline(Steps(read_sized, infer, keep), streams, 2, workers=4, memory=memory) as pipeline:
        for outcome in pipeline.run(range(len(sizes))):
            with lock:
                held -= outcome.value.size if outcome.value else 0
            out.append(outcome.source)
    assert not threads()
    return out, most


@given(st.lists(st.integers(0, 12), max_size=30), st.integers(1, 3))
@settings(max_examples=25, deadline=None)
def test_photos_wait_for_memory_without_deadlock(sizes: list[int], streams: int) -> None:
    order, most = crowd(sizes, memory=10, streams=streams)
    assert order == list(range(len(sizes)))
    # Beside the others, the photo that the consumer waits for and the one just consumed may have memory.
    assert most <= 10 + 2 * max(sizes, default=0)


def test_many_large_photos_wait_behind_a_slow_one() -> None:
    order, most = crowd([1, *[4] * 19], memory=10, slow=0)
    assert order == list(range(20))
    assert most <= 18, "a full window would be 20 photos that need 77"


@pytest.mark.parametrize(("memory", "short"), [(10, True), (1000, False)])
def test_freed_memory_is_returned_to_the_system_if_scarce(
    memory: int, short: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[None] = []
    monkeypatch.setattr("petseg_runtime.host.give_back_memory", lambda: calls.append(None))
    crowd([4] * 20, memory=memory, slow=0)
    assert bool(calls) is short


def test_a_photo_larger_than_the_memory_budget_is_processed() -> None:
    order, most = crowd([3, 3, 1000, 3, 3], memory=10)
    assert order == list(range(5))
    assert most <= 1000 + 10 + 3


def test_leaving_while_photos_wait_for_memory_does_not_block() -> None:
    def want(source: int, reserve: Callable[[int], None]) -> Photo:
        reserve(6)
        return read(source, reserve)

    with Pipeline(Steps(want, infer, write), 1, workers=3, memory=10) as pipeline:
        assert next(pipeline.run(range(100))).source == 0
        assert [outcome.source for outcome in pipeline.run(range(4))] == list(range(4)), (
            "abandoned photos have no memory reserved"
        )
    assert not threads()


def test_the_wait_for_memory_is_not_counted_as_reading() -> None:
    def slow_write(source: int, photo: Photo, answer: np.ndarray) -> int:
        time.sleep(0.1)
        return source

    def want(source: int, reserve: Callable[[int], None]) -> Photo:
        reserve(10)
        return read(source, reserve)

    with Pipeline(Steps(want, infer, slow_write), 1, workers=2, memory=10) as pipeline:
        outcomes = list(pipeline.run(range(4)))
    # Each but the first has waited for 0.1 s; one of them may have been delayed by something else.
    assert min(outcome.seconds["read"] for outcome in outcomes[1:]) < 0.05


UNFINISHED = """
import sys, time
import numpy as np
from types import SimpleNamespace
from petseg_runtime.pipeline import Pipeline, Steps
from petseg_runtime.memory_budget import MemoryBudget

def infer(batch):
    time.sleep(0.05)
    return batch[..., 0]

def results():
    def read(source, reserve):
        reserve(6)
        return SimpleNamespace(image=np.zeros((1, 1, 3), np.uint8))

    with Pipeline(Steps(read, infer, lambda *all: 1), 2, workers=2, memory=int(sys.argv[3])) as pipeline:
        yield from pipeline.run(range(int(sys.argv[1])))

left = results()
next(left)
time.sleep(float(sys.argv[2]))
sys.exit(7)
"""


@pytest.mark.parametrize(
    "args", [("100", "0", "1000"), ("100", "1", "1000"), ("2", "0.2", "1000"), ("100", "0.2", "10")], ids=" ".join
)
def test_a_script_can_exit_with_unconsumed_results(args: tuple[str, ...]) -> None:
    """The threads are busy then, or wait for memory, or for results that nobody will consume."""
    done = subprocess.run([sys.executable, "-c", UNFINISHED, *args], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (7, "", "")


#: Simulates a race: the queue is not empty, but another thread takes the item first.
OVERTAKEN = """
import queue
import numpy as np
from types import SimpleNamespace
from petseg_runtime import pipeline

class Overtaken(queue.SimpleQueue):
    def empty(self):
        return False

pipeline.queue.SimpleQueue = Overtaken
photo = SimpleNamespace(image=np.zeros((1, 1, 3), np.uint8))
steps = pipeline.Steps(lambda source, reserve: photo, lambda batch: batch[..., 0], lambda *all: "written")
with pipeline.Pipeline(steps, 1, 2, workers=1) as running:
    print(*(outcome.value for outcome in running.run([0])))
"""


@pytest.mark.parametrize("where", ["read", "infer", "write"])
def test_a_pipeline_can_be_closed_from_a_worker_thread(where: str) -> None:
    """The garbage collector does so in whatever thread it runs, if the iterator is in a reference cycle."""
    abandoned, raised = threading.Event(), []

    def closing(step: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            first = args[0] == 0 if step != "infer" else not args[0].any()
            if step == where and not first:
                assert abandoned.wait(10)
                try:
                    pipeline.close()
                except RuntimeError as error:  # the collector would print it and continue
                    raised.append(error)
            return function(*args)

        return run

    steps: Steps[int, Any] = Steps(closing("read", read), closing("infer", infer), closing("write", write))
    pipeline = Pipeline(steps, 2, workers=2)
    outcomes = pipeline.run([0, 1])
    assert next(outcomes).value == (0, 0)
    del outcomes
    abandoned.set()
    deadline = time.monotonic() + 10
    while threads() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert (threads(), raised) == (set(), [])


def test_a_batch_does_not_wait_for_an_item_taken_by_another_thread() -> None:
    done = subprocess.run([sys.executable, "-c", OVERTAKEN], capture_output=True, text=True, timeout=30)
    assert (done.stdout, done.stderr) == ("written\n", "")


#: A Ctrl-C comes while `close` waits for the first thread.
CUT_SHORT = """
import atexit, threading
import numpy as np
from petseg_runtime.pipeline import Pipeline, Steps
from petseg_runtime.memory_budget import MemoryBudget

def alive():
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("petseg")]

running = Pipeline(Steps(None, None, None), 1, workers=1)
reader = next(thread for thread in threading.enumerate() if thread.name == "petseg-read-0")
join = reader.join

def interrupted():
    reader.join = join
    raise KeyboardInterrupt

reader.join = interrupted
try:
    running.close()
except KeyboardInterrupt:
    print("left", *alive())
atexit._run_exitfuncs()
print("at exit", *alive())
"""


def test_an_interrupted_close_is_completed_at_exit() -> None:
    """Otherwise a thread may be in native code while Python shuts down, which aborts the process."""
    done = subprocess.run([sys.executable, "-c", CUT_SHORT], capture_output=True, text=True, timeout=30)
    left, at_exit = done.stdout.splitlines()
    assert "petseg-infer-0" in left
    assert (at_exit, done.stderr) == ("at exit", "")


def test_ctrl_c_cannot_leave_a_lock_of_the_pipeline_locked(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may come inside `Condition.__enter__`, which has locked its lock by then, and then no `__exit__` follows: the
    thread that needs the lock would wait for ever. So the consumer must not call that.
    """
    enter, entered = threading.Condition.__enter__, []

    def recorded(condition: threading.Condition) -> bool:
        if threading.get_ident() == threading.main_thread().ident:  # a thread that starts is not current yet
            entered.append("".join(traceback.format_stack()))
        return enter(condition)

    with Pipeline(STEPS, 1, workers=2) as running:
        monkeypatch.setattr(threading.Condition, "__enter__", recorded)
        assert [outcome.value for outcome in running.run(range(3))] == [(0, 0), (1, 1), (2, 2)]
    assert entered == []


def test_a_signal_after_an_error_does_not_interrupt_the_close(monkeypatch: pytest.MonkeyPatch) -> None:
    """When a terminal is closed, printing to it fails, and then SIGHUP comes. Results would be left incomplete."""
    writing, finished = threading.Event(), []

    def slow_write(source: int, photo: Photo, answer: np.ndarray) -> None:
        if source == 1:
            writing.set()
            time.sleep(0.2)
            finished.append(source)

    @terminable()
    def work() -> None:
        with Pipeline(Steps(read, infer, slow_write), 1, workers=2) as pipeline:
            shutdown = pipeline._write.shutdown

            def hung_up(**options: Any) -> None:
                signal.raise_signal(signal.SIGHUP)
                shutdown(**options)

            monkeypatch.setattr(pipeline._write, "shutdown", hung_up)
            for _ in pipeline.run(range(2)):
                assert writing.wait(10)
                raise OSError("the terminal is gone")

    with pytest.raises(SystemExit) as end:
        work()
    assert end.value.code == 129
    assert finished == [1]
