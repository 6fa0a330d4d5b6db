"""The pipeline by itself: order, failures, batches, bounds, and that nothing of it is left running."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from petseg_runtime.errors import EngineError, InputError, UnreadableImage
from petseg_runtime.pipeline import Pipeline, Steps


@dataclass(frozen=True)
class Photo:
    image: np.ndarray


def read(source: int) -> Photo:
    """A photo whose one pixel is the source; odd ones that end in 7 cannot be read."""
    if source % 10 == 7:
        raise UnreadableImage(f"{source}: unreadable")
    return Photo(np.full((1, 1, 3), source % 251, np.uint8))


def infer(batch: np.ndarray) -> np.ndarray:
    return batch[..., 0]


def write(source: int, photo: Photo, answer: np.ndarray) -> tuple[int, int]:
    """The source, and the answer it got."""
    if source % 10 == 3:
        raise InputError(f"{source}: unwritable")
    return source, int(answer[0, 0])


STEPS: Steps[int, tuple[int, int]] = Steps(read, infer, write)


def threads() -> set[str]:
    return {thread.name for thread in threading.enumerate() if thread.name.startswith("petseg")}


@given(st.integers(0, 60), st.integers(1, 3), st.integers(1, 5), st.integers(1, 3))
@settings(max_examples=25)
def test_every_source_comes_out_once_in_order_with_its_own_answer(
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


def test_it_can_run_twice() -> None:
    with Pipeline(STEPS, 1, workers=1) as pipeline:
        assert [outcome.source for outcome in pipeline.run([1, 2])] == [1, 2]
        assert [outcome.source for outcome in pipeline.run([4])] == [4]


def test_a_slow_photo_does_not_change_the_order() -> None:
    def slow(source: int) -> Photo:
        time.sleep(0.05 if source == 0 else 0)
        return read(source)

    with Pipeline(Steps(slow, infer, write), 2, workers=2) as pipeline:
        assert [outcome.source for outcome in pipeline.run(range(6))] == list(range(6))


def test_no_more_than_the_window_is_taken_ahead_of_what_was_asked_for() -> None:
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


def test_batches_are_what_waits_and_no_more_than_allowed() -> None:
    sizes: list[int] = []
    began = threading.Event()

    def blocked(batch: np.ndarray) -> np.ndarray:
        began.wait(10)  # until everything has been read
        sizes.append(len(batch))
        return infer(batch)

    def counted(source: int) -> Photo:
        if source == 9:  # the last that fits in the window
            began.set()
        return read(source)

    with Pipeline(Steps(counted, blocked, write), 1, 4, workers=1) as pipeline:
        outcomes = list(pipeline.run(range(14)))
    assert [outcome.source for outcome in outcomes] == list(range(14))
    assert sum(sizes) == 13  # 7 cannot be read
    assert max(sizes) == 4


@pytest.mark.parametrize("step", ["read", "infer", "write"])
def test_any_other_error_ends_the_run_and_all_threads(step: str) -> None:
    def broken(*_: Any) -> Any:
        raise EngineError("the engine broke")

    steps = {"read": read, "infer": infer, "write": write, step: broken}
    with pytest.raises(EngineError, match="broke"), Pipeline(Steps(**steps), 2, workers=2) as pipeline:
        list(pipeline.run(range(1000)))
    assert not threads()


def test_an_error_of_the_sources_ends_the_run() -> None:
    def sources() -> Iterator[int]:
        yield 1
        raise LookupError("no more")

    with pytest.raises(LookupError), Pipeline(STEPS, 1, workers=1) as pipeline:
        list(pipeline.run(sources()))
    assert not threads()


def test_leaving_early_drops_what_has_not_begun() -> None:
    written = []

    def slow(source: int, photo: Photo, answer: np.ndarray) -> int:
        time.sleep(0.01)
        written.append(source)
        return source

    with Pipeline(Steps(read, infer, slow), 1, 8, workers=1) as pipeline:
        next(pipeline.run(range(100)))
    assert len(written) < pipeline.window
    assert not threads()


UNFINISHED = """
import sys, time
import numpy as np
from types import SimpleNamespace
from petseg_runtime.pipeline import Pipeline, Steps

def infer(batch):
    time.sleep(0.05)
    return batch[..., 0]

def results():
    read = lambda source: SimpleNamespace(image=np.zeros((1, 1, 3), np.uint8))
    with Pipeline(Steps(read, infer, lambda *all: 1), 2, workers=2) as pipeline:
        yield from pipeline.run(range(int(sys.argv[1])))

left = results()
next(left)
time.sleep(float(sys.argv[2]))
sys.exit(7)
"""


@pytest.mark.parametrize("args", [("100", "0"), ("100", "1"), ("2", "0.2")], ids=" ".join)
def test_a_script_may_end_while_results_are_left(args: tuple[str, str]) -> None:
    """The threads are busy then, or wait for what nobody will ask for."""
    done = subprocess.run([sys.executable, "-c", UNFINISHED, *args], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (7, "", "")
