"""Full load for long: each interval has its rate, slowing down is told, and what was measured is told at any end."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
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


class Abacus(Engine):
    """Takes as long for a run as it is told, given how many it has done; two callers at a time."""

    def __init__(self, seconds: Callable[[int], float]) -> None:
        self.seconds = seconds
        self.sizes: list[int] = []
        self.callers: set[int] = set()

    @property
    def spec(self) -> ModelSpec:
        return ModelSpec(name="toy", height=16, width=32)

    def run(self, images: Any) -> Any:
        self.sizes.append(len(images))
        self.callers.add(threading.get_ident())
        time.sleep(self.seconds(len(self.sizes)))
        return np.zeros(images.shape[:3], np.uint8)

    def describe(self) -> EngineInfo:
        return INFO

    def close(self) -> None:
        """There is nothing to free."""


def interval(number: int, rate: float, **state: Any) -> Interval:
    return Interval(
        start=60.0 * number, end=60.0 * (number + 1), photos_per_second=rate, **{"celsius": {}, "mhz": (), **state}
    )


def measured(*rates: float) -> Sustained:
    intervals = [interval(number, rate) for number, rate in enumerate(rates)]
    return Sustained(info=INFO, batch=1, seconds=600, host=host.host(), gpus=(), intervals=intervals)


def test_each_interval_has_its_rate_and_follows_the_one_before() -> None:
    engine = Abacus(lambda count: 0.01)
    found = list(sustain(engine, PHOTOS, 1.0))
    assert len(found) == INTERVALS
    assert found[0].start == 0
    assert [one.end for one in found[:-1]] == [one.start for one in found[1:]]
    assert found[-1].end == pytest.approx(1.0, abs=0.5)
    # Two callers, three photos a run, a run in 10 ms or, on a busy machine, more: at most 600.
    assert all(0 < one.photos_per_second <= 601 for one in found)
    assert set(engine.sizes) == {3}
    assert len(engine.callers) == 2
    assert threading.get_ident() not in engine.callers


def test_runs_longer_than_an_interval_are_lost_in_none() -> None:
    """A caller's rate is from the end of a run to the end of a run, whatever interval that began in."""
    marks: list[list[tuple[int, float] | None]] = [
        [(0, 10.0), (0, 10.0)],
        [(0, 10.0), (2, 14.0)],
        [(1, 18.0), (4, 18.0)],
    ]
    assert sustained._rate(marks[0], marks[1]) == 0.5
    assert sustained._rate(marks[1], marks[2]) == 1 / 8 + 2 / 4


def test_a_machine_that_slows_down_is_told() -> None:
    began = time.perf_counter()
    engine = Abacus(lambda count: 0.005 if time.perf_counter() < began + 0.5 else 0.05)
    done = measured()
    done.intervals.extend(sustain(engine, PHOTOS, 1.5))
    assert done.loss is not None
    assert done.loss > 0.5
    assert "slower than the first: this machine slows down under load" in done.verdict


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
        ([50.0], None, "there are not two intervals with runs in them, so nothing can be said of slowing down"),
        ([0.0, 1.0], None, "there are not two intervals with runs in them, so nothing can be said of slowing down"),
    ],
)
def test_the_verdict_is_a_sentence(rates: list[float], loss: float | None, verdict: str) -> None:
    done = measured(*rates)
    assert done.loss == (None if loss is None else pytest.approx(loss))
    assert done.verdict == verdict
    assert done.complete is (len(rates) == INTERVALS)
    assert pytest.approx(0.05) == SLOWER


def test_the_state_of_the_machine_is_told_where_it_is_known() -> None:
    assert interval(0, 5.0).state == ""
    assert interval(0, 5.0).summary == "5.0 photos/s"
    warm = {"cpu-thermal": 61.25, "gpu-thermal": 58.0}
    assert interval(0, 5.0, celsius=warm).state == "61.2 °C"
    assert interval(0, 5.0, mhz=(1800.0, 1800.0)).state == "1800 MHz"
    assert interval(0, 5.0, celsius=warm, mhz=(1500.0, 600.0)).summary == "5.0 photos/s, 61.2 °C, 600-1500 MHz"


def test_what_the_kernel_says_at_the_end_of_an_interval_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    degrees = iter(range(50, 50 + INTERVALS))
    monkeypatch.setattr(host, "temperatures", lambda: {"cpu-thermal": float(next(degrees))})
    monkeypatch.setattr(host, "frequencies", lambda: (600.0,))
    found = list(sustain(Abacus(lambda count: 0.001), PHOTOS, 0.1))
    assert [one.celsius["cpu-thermal"] for one in found] == list(range(50, 60))
    assert {one.mhz for one in found} == {(600.0,)}


def test_a_run_that_fails_ends_it_at_once_with_its_reason() -> None:
    def seconds(count: int) -> float:
        if count > 20:
            raise EngineError("a bead fell off")
        return 0.001

    engine = Abacus(seconds)
    with pytest.raises(EngineError, match="a bead fell off"):  # and the hours to come are not waited for
        list(sustain(engine, PHOTOS, 10_000))
    done = len(engine.sizes)
    time.sleep(0.05)
    assert len(engine.sizes) == done, "the other caller has ended, too"


def test_closed_early_it_leaves_no_caller_at_work() -> None:
    engine = Abacus(lambda count: 0.001)
    with contextlib.closing(sustain(engine, PHOTOS, 1.0)) as found:
        next(found)
    done = len(engine.sizes)
    time.sleep(0.05)
    assert len(engine.sizes) == done


# --------------------------------------------------------------------------------------------------------- the command


def test_people_get_a_table_and_a_sentence(
    proven: Artifact, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(host, "temperatures", lambda: {"cpu-thermal": 70.0})
    assert run(["benchmark", str(proven.path), "--sustained", "0.01", *IN_ONNXRUNTIME]) == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert lines[0].startswith("toy.onnx: toy, 16 x 32, fp32")
    assert lines[2].endswith(" on cpu, f32, 2 callers at work without pause")
    head, *rows = lines[4 : 5 + INTERVALS]
    assert head.split() == ["seconds", "photos/s", "of", "the", "first"]
    assert rows[0].startswith("0 to ")
    assert " 100 % " in rows[0]
    assert all("70.0 °C" in row for row in rows)
    assert lines[-1].startswith("the last interval is ")
    assert [line.split(":")[1].strip() for line in err.splitlines()] == [
        f"interval {number} of {INTERVALS}" for number in range(1, INTERVALS + 1)
    ]


def test_programs_get_every_interval(proven: Artifact, capsys: pytest.CaptureFixture[str]) -> None:
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
        (["--sustained", "1", "--seconds", "5"], "give one --backend, no --seconds"),
        (["--sustained", "1", "--backend", "onnxruntime", "--backend", "openvino"], "give one --backend"),
        (["--sustained", "0"], "--sustained"),
        (["--sustained", "nan"], "--sustained"),
        (["--sustained", "inf"], "--sustained"),
    ],
)
def test_what_does_not_go_together_is_wrong_usage(
    options: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["benchmark", *options]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert said in err


def test_an_engine_that_cannot_be_had_is_5(proven: Artifact, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["benchmark", str(proven.path), "--sustained", "1", "--backend", "abacus"]) == 5
    out, err = capsys.readouterr()
    assert out == ""
    assert "there is no engine 'abacus'" in err


def test_an_engine_that_fails_on_the_way_is_5_and_what_was_measured_is_told(
    proven: Artifact, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = onnxruntime.load

    def load(artifact: Artifact, options: Any) -> Any:
        loaded, began = engine(artifact, options), time.perf_counter()
        whole = loaded.run

        def run(images: Any) -> Any:
            if time.perf_counter() > began + 1:
                raise EngineError("a bead fell off")
            return whole(images)

        monkeypatch.setattr(loaded, "run", run)
        return loaded

    monkeypatch.setattr(onnxruntime, "load", load)
    assert run(["benchmark", str(proven.path), "--sustained", "0.03", *IN_ONNXRUNTIME]) == 5
    out, err = capsys.readouterr()
    assert "the last one measured, is " in out or "there are not two intervals" in out
    assert err.splitlines()[-1] == "petseg: a bead fell off"


@pytest.mark.parametrize(("number", "code", "said"), [("SIGINT", 130, "interrupted"), ("SIGTERM", 143, "terminated")])
def test_a_signal_ends_it_in_order_and_what_was_measured_is_told(
    proven: Artifact, number: str, code: int, said: str
) -> None:
    command = [sys.executable, "-m", "petseg.cli", "benchmark", str(proven.path), "--sustained", "0.5", "--json"]
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


def test_stopped_before_the_first_interval_there_is_nothing_to_tell(
    proven: Artifact, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*args: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(sustained, "wait", interrupted)
    assert run(["benchmark", str(proven.path), "--sustained", "1", *IN_ONNXRUNTIME]) == 130
    out, err = capsys.readouterr()
    assert (out, err.strip()) == ("", "petseg: interrupted")
