"""Sustained load: each interval has its rate, throttling is reported, and results are reported however it ends."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from petseg.cli import run
from petseg_runtime import host, sustained
from petseg_runtime.artifact import Artifact
from petseg_runtime.engines import onnxruntime
from petseg_runtime.engines.base import Engine, EngineInfo
from petseg_runtime.errors import EngineError
from petseg_runtime.spec import ModelSpec
from petseg_runtime.sustained import INTERVALS, SLOWER, Interval, Sustained, sustain

PHOTOS = np.zeros((3, 16, 32, 3), np.uint8)
INFO = EngineInfo(name="abacus", version="1", device="cpu", provider="beads", precision="f32", threads=2, streams=2)
IN_ONNXRUNTIME = ["--backend", "onnxruntime", "--device", "cpu", "--threads", "2"]


class Clock:
    """A fake clock: it advances only while all callers are in a run and the main thread waits, and it ends the runs."""

    def __init__(self, callers: int) -> None:
        self.now = 0.0
        self.callers = callers
        self.until: dict[int, float] = {}
        self.changed = threading.Condition()
        self.stopped = False

    def perf_counter(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        """A run of a caller."""
        me = threading.get_ident()
        with self.changed:
            self.until[me] = self.now + seconds
            self.changed.notify_all()
            self.changed.wait_for(lambda: self.stopped or me not in self.until)
            self.until.pop(me, None)

    def wait(self, working: Any, seconds: float, when: str) -> tuple[set[Any], set[Any]]:
        """The main thread waits: all events due before the end of the wait happen first, in order."""
        end = self.now + seconds
        with self.changed:
            while True:
                self.changed.wait_for(lambda: len(self.until) == self.callers)
                caller, due = min(self.until.items(), key=lambda item: item[1])
                self.now = min(due, end)
                if due > end:
                    return set(), set(working)
                del self.until[caller]
                self.changed.notify_all()

    def stop(self) -> None:
        with self.changed:
            self.stopped = True
            self.changed.notify_all()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The fake clock of two callers."""
    clock = Clock(2)

    class Stop(threading.Event):
        def set(self) -> None:
            super().set()
            clock.stop()

    monkeypatch.setattr(sustained, "time", clock)
    monkeypatch.setattr(sustained, "wait", clock.wait)
    monkeypatch.setattr(sustained, "threading", types.SimpleNamespace(Event=Stop))
    return clock


class Abacus(Engine):
    """An engine for two callers; a function of the number of finished runs decides what a run does."""

    spec = ModelSpec(name="toy", height=16, width=32)

    def __init__(self, work: Callable[[int], object] = lambda count: None) -> None:
        self.work = work
        self.sizes: list[int] = []
        self.callers: set[threading.Thread] = set()

    def run(self, images: Any) -> Any:
        self.sizes.append(len(images))
        self.callers.add(threading.current_thread())
        self.work(len(self.sizes))
        return np.zeros(images.shape[:3], np.uint8)

    def describe(self) -> EngineInfo:
        return INFO

    def close(self) -> None:
        """Nothing needs to be freed."""


def interval(number: int, rate: float, **state: Any) -> Interval:
    return Interval(
        start=60.0 * number, end=60.0 * (number + 1), photos_per_second=rate, **{"celsius": {}, "mhz": (), **state}
    )


def measured(*rates: float, batch: int = 1) -> Sustained:
    intervals = [interval(number, rate) for number, rate in enumerate(rates)]
    return Sustained(info=INFO, batch=batch, seconds=600, host=host.host(), gpus=(), intervals=intervals)


def test_intervals_are_consecutive_and_each_caller_has_a_thread() -> None:
    engine = Abacus(lambda count: time.sleep(0.001))
    found = list(sustain(engine, PHOTOS, 0.2))
    assert [one.start for one in found] == [pytest.approx(0.02 * number) for number in range(INTERVALS)]
    assert [one.end for one in found[:-1]] == [one.start for one in found[1:]]
    assert found[-1].end == pytest.approx(0.2)
    assert set(engine.sizes) == {3}
    assert len(engine.callers) == 2
    assert threading.current_thread() not in engine.callers
    assert not any(caller.is_alive() for caller in engine.callers)


@pytest.mark.parametrize("seconds", [0.01, 0.3, 1.0, 1.4, 5.0])
def test_a_steady_machine_has_the_same_rate_in_each_interval(clock: Clock, seconds: float) -> None:
    """However long its runs are compared with an interval, which is a second here."""
    done = measured()
    done.intervals.extend(sustain(Abacus(lambda count: clock.sleep(seconds)), PHOTOS, 10.0))
    assert [one.photos_per_second for one in done.intervals] == [pytest.approx(2 * 3 / seconds)] * INTERVALS
    assert done.loss == pytest.approx(0)


def test_callers_that_start_at_different_times_are_counted_equally(clock: Clock) -> None:
    found = list(sustain(Abacus(lambda count: clock.sleep(0.35 if count == 1 else 0.7)), PHOTOS, 10.0))
    assert [one.photos_per_second for one in found] == [pytest.approx(2 * 3 / 0.7)] * INTERVALS


def test_a_run_across_intervals_is_split_proportionally() -> None:
    marks = [0.0, 1.5, 3.5, 4.0]
    assert [sustained._runs(marks, begun, begun + 1) for begun in (0, 1, 2, 3)] == [
        pytest.approx(runs) for runs in (1 / 1.5, 0.5 / 1.5 + 0.5 / 2, 1 / 2, 0.5 / 2 + 1)
    ]


def test_counted_runs_are_discarded() -> None:
    marks = [float(number) for number in range(100)]
    assert sustained._runs(marks, 0.5, 90.5) == pytest.approx(90)
    assert marks == [float(number) for number in range(90, 100)]
    assert sustained._runs(marks, 90.5, 99) == pytest.approx(8.5)
    assert marks == [99.0]


def test_throttling_is_reported(clock: Clock) -> None:
    done = measured()
    done.intervals.extend(sustain(Abacus(lambda count: clock.sleep(0.1 if clock.now < 5 else 0.4)), PHOTOS, 10.0))
    assert done.intervals[0].photos_per_second == pytest.approx(60)
    assert done.loss == pytest.approx(0.75)
    assert done.verdict == "the last interval is 75 % slower than the first: this machine slows down under load"


@pytest.mark.parametrize(("seconds", "short"), [(1.4, True), (1.1, True), (0.9, False)])
def test_intervals_shorter_than_a_run_are_reported(clock: Clock, seconds: float, short: bool) -> None:
    done = measured(batch=3)
    done.intervals.extend(sustain(Abacus(lambda count: clock.sleep(seconds)), PHOTOS, 10.0))
    assert done.short is short
    said = "; but a run takes longer than an interval, so that single rates mean little: measure for more minutes"
    assert done.verdict.endswith(": this machine keeps its pace" + said * short)


@pytest.mark.parametrize(
    ("rates", "loss", "verdict"),
    [
        (
            [50.0] * 9 + [38.5],
            0.23,
            "the last interval is 23 % slower than the first: this machine slows down under load",
        ),
        (
            [50.0] * 9 + [47.5],
            0.05,
            "the last interval is 5 % slower than the first: this machine slows down under load",
        ),
        ([50.0] * 9 + [48.0], 0.04, "the last interval is 4 % slower than the first: this machine keeps its pace"),
        ([50.0] * 9 + [55.0], -0.1, "the last interval is 10 % faster than the first: this machine keeps its pace"),
        (
            [50.0, 49.0, 40.0],
            0.2,
            "interval 3, the last one measured, is 20 % slower than the first: this machine slows down under load",
        ),
        (
            [50.0],
            None,
            "there are no two intervals with runs to compare, so it is unknown whether this machine slows down",
        ),
        (
            [5.0] * 9 + [0.0],
            None,
            "there are no two intervals with runs to compare, so it is unknown whether this machine slows down",
        ),
        (
            [0.0, 1.0],
            None,
            "there are no two intervals with runs to compare, so it is unknown whether this machine slows down",
        ),
    ],
)
def test_the_verdict_is_a_sentence(rates: list[float], loss: float | None, verdict: str) -> None:
    done = measured(*rates)
    assert done.loss == (None if loss is None else pytest.approx(loss))
    assert done.verdict == verdict
    assert done.complete is (len(rates) == INTERVALS)
    assert pytest.approx(0.05) == SLOWER


def test_the_state_of_the_machine_is_reported_if_known() -> None:
    assert interval(0, 5.0).state == ""
    assert interval(0, 5.0).summary == "5.0 photos/s"
    warm = {"cpu-thermal": 61.25, "gpu-thermal": 58.0}
    assert interval(0, 5.0, celsius=warm).state == "61.2 °C"
    assert interval(0, 5.0, mhz=(1800.0, 1800.0)).state == "1800 MHz"
    assert interval(0, 5.0, celsius=warm, mhz=(1500.0, 600.0)).summary == "5.0 photos/s, 61.2 °C, 600-1500 MHz"


def test_the_kernels_readings_at_the_end_of_an_interval_are_kept(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "temperatures", lambda: {"cpu-thermal": clock.now})
    monkeypatch.setattr(host, "frequencies", lambda: (600.0,))
    found = list(sustain(Abacus(lambda count: clock.sleep(0.3)), PHOTOS, 10.0))
    begun = found[0].celsius["cpu-thermal"] - 1
    assert [one.celsius["cpu-thermal"] - begun for one in found] == [pytest.approx(one.end) for one in found]
    assert {one.mhz for one in found} == {(600.0,)}


def test_a_failing_run_ends_the_measurement_immediately_with_its_reason() -> None:
    def fail(count: int) -> None:
        if count > 20:
            raise EngineError("a bead fell off")

    engine = Abacus(fail)
    with pytest.raises(EngineError, match="a bead fell off"):  # and it does not wait for the remaining hours
        list(sustain(engine, PHOTOS, 10_000))
    assert not any(caller.is_alive() for caller in engine.callers), "the other caller has ended, too"


def test_closing_early_stops_all_callers() -> None:
    engine = Abacus(lambda count: time.sleep(0.001))
    with contextlib.closing(sustain(engine, PHOTOS, 1.0)) as found:
        next(found)
    assert not any(caller.is_alive() for caller in engine.callers)


# --------------------------------------------------------------------------------------------------------- the command


def test_the_text_output_is_a_table_and_a_sentence(
    proven: Artifact, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(host, "temperatures", lambda: {"cpu-thermal": 70.0})
    assert run(["benchmark", str(proven.path), "--sustained", "0.01", *IN_ONNXRUNTIME]) == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert lines[0].startswith("toy.onnx: toy, 16 x 32, fp32")
    assert lines[2].endswith(" on cpu, f32, 2 callers without pause")
    head, *rows = lines[4 : 5 + INTERVALS]
    assert head.split() == ["seconds", "photos/s", "relative", "to", "first"]
    assert rows[0].startswith("0 to ")
    assert " 100 % " in rows[0]
    assert all("70.0 °C" in row for row in rows)
    assert lines[-1].startswith("the last interval is ")
    assert [line.split(":")[1].strip() for line in err.splitlines()] == [
        f"interval {number} of {INTERVALS}" for number in range(1, INTERVALS + 1)
    ]


def test_the_json_output_has_every_interval(proven: Artifact, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["benchmark", str(proven.path), "--sustained", "0.01", "--batch", "2", "--json", "-q", *IN_ONNXRUNTIME]
    assert run(command) == 0
    out, err = capsys.readouterr()
    assert err == ""
    record = json.loads(out)
    assert record["schema_version"] == 1
    assert record["model"]["identity"] == proven.identity
    assert (record["batch"], record["seconds"], record["complete"]) == (2, pytest.approx(0.6), True)
    assert (record["engine"]["name"], record["engine"]["streams"]) == ("onnxruntime", 2)
    assert record["host"]["packages"]["onnxruntime"]
    assert "without pause" in record["method"]
    assert len(record["intervals"]) == INTERVALS
    assert all(set(one) == {"start", "end", "photos_per_second", "celsius", "mhz"} for one in record["intervals"])
    assert max(one["photos_per_second"] for one in record["intervals"]) > 0
    assert "verdict" in record
    assert "loss" in record


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--sustained", "1", "--seconds", "5"], "give one --backend and no --seconds"),
        (["--sustained", "1", "--backend", "onnxruntime", "--backend", "openvino"], "give one --backend"),
        (["--backend", "auto"], "--backend auto is for --sustained; leave it out to measure every engine"),
        (["--sustained", "0"], "--sustained"),
        (["--sustained", "nan"], "--sustained"),
        (["--sustained", "inf"], "--sustained"),
    ],
)
def test_conflicting_options_are_a_usage_error(
    options: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["benchmark", *options]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert said in err


def test_an_unavailable_engine_exits_with_5(proven: Artifact, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["benchmark", str(proven.path), "--sustained", "1", "--backend", "abacus"]) == 5
    out, err = capsys.readouterr()
    assert out == ""
    assert "unknown engine 'abacus'" in err


def test_an_engine_that_fails_midway_exits_with_5_and_reports_results(
    proven: Artifact, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = onnxruntime.load
    ended: list[None] = []

    def load(artifact: Artifact, options: Any) -> Any:
        loaded = engine(artifact, options)
        whole = loaded.run

        def run(images: Any) -> Any:
            if len(ended) > 2:  # two intervals had been reported by then
                raise EngineError("a bead fell off")
            return whole(images)

        monkeypatch.setattr(loaded, "run", run)
        return loaded

    monkeypatch.setattr(onnxruntime, "load", load)
    monkeypatch.setattr(host, "temperatures", lambda: ended.append(None) or {})
    assert run(["benchmark", str(proven.path), "--sustained", "0.03", *IN_ONNXRUNTIME]) == 5
    out, err = capsys.readouterr()
    assert "the last one measured, is " in out
    assert err.splitlines()[-1] == "petseg: a bead fell off"


@pytest.mark.parametrize(("number", "code", "said"), [("SIGINT", 130, "interrupted"), ("SIGTERM", 143, "terminated")])
def test_a_signal_stops_cleanly_and_reports_results(proven: Artifact, number: str, code: int, said: str) -> None:
    command = [sys.executable, "-m", "petseg.cli", "benchmark", str(proven.path), "--sustained", "0.2", "--json"]
    with subprocess.Popen(
        [*command, *IN_ONNXRUNTIME], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=dict(os.environ)
    ) as process:
        try:
            assert process.stderr is not None
            for line in process.stderr:
                if "interval 2 of" in line:
                    process.send_signal(getattr(signal, number))
                    break
            out, err = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == code
    assert err.splitlines()[-1] == f"petseg: {said}"
    record = json.loads(out)
    assert record["complete"] is False
    assert 2 <= len(record["intervals"]) < INTERVALS
    assert ", the last one measured, is " in record["verdict"]


def test_stopping_before_the_first_interval_reports_nothing(
    proven: Artifact, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*args: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(sustained, "wait", interrupted)
    assert run(["benchmark", str(proven.path), "--sustained", "1", *IN_ONNXRUNTIME]) == 130
    out, err = capsys.readouterr()
    assert (out, err.strip()) == ("", "petseg: interrupted")
