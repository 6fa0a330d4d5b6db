"""Benchmarks measure the requested engines; those that cannot be measured are listed with the reason."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from command_line import IN_ONNXRUNTIME
from petseg.cli import run
from petseg_runtime import benchmark, doctor
from petseg_runtime.artifact import Artifact
from petseg_runtime.benchmark import ROUNDS, STAGES, Benchmark, Row, measure
from petseg_runtime.cli.benchmark import _text
from petseg_runtime.doctor import EngineCheck, RuleLine
from petseg_runtime.engines.base import Engine, EngineInfo, EngineOptions
from petseg_runtime.errors import EngineError
from petseg_runtime.host import host
from petseg_runtime.result import Segmentation
from petseg_runtime.signals import terminable
from petseg_runtime.spec import ModelSpec

SHORT = 0.01


def test_working_engines_are_measured_and_the_others_listed(proven: Artifact) -> None:
    done = measure(proven, threads=2, seconds=SHORT)
    names = [(row.info.name, row.info.device) for row in done.rows]
    assert ("onnxruntime", "cpu") in names
    if importlib.util.find_spec("openvino"):
        assert ("openvino", "cpu") in names
    rule, _ = doctor.read_rule()
    listed = {(check.engine, check.device) for check in done.failed}
    assert listed.isdisjoint(names)
    assert listed | set(names) == {(line.engine, line.device) for line in rule}
    assert all(check.why and not check.works for check in done.failed)


def test_each_round_has_separate_times_on_a_described_machine(proven: Artifact) -> None:
    done: Benchmark = measure(proven, ["onnxruntime"], "cpu", threads=2, batch=3, seconds=SHORT)
    (row,) = done.rows
    assert done.failed == ()
    assert (done.threads, done.batch, done.seconds) == (2, 3, SHORT)
    assert done.host.cpu.cores >= 1
    assert done.gpus == doctor.read_gpus()[0]
    assert (row.info.name, row.info.threads, row.exact) == ("onnxruntime", 2, False)
    assert row.callers == 2
    assert len(row.latency) == len(row.throughput) == ROUNDS
    assert min(map(len, row.latency)) >= 1
    assert min(row.throughput) > 0
    assert set(row.stages) == set(STAGES)
    lengths = {len(values) for values in row.stages.values()}
    assert len(lengths) == 1
    assert lengths.pop() % 6 == 0, "complete passes over the sample photos"
    total = np.array(row.stages["total"])
    assert np.allclose(total, sum(np.array(row.stages[stage]) for stage in STAGES[:-1]))


def test_the_last_stage_is_all_that_a_result_takes(proven: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    def slowly(probability: np.ndarray) -> np.ndarray:
        time.sleep(0.02)
        return probability

    def lowest_pet(result: Segmentation) -> int:
        masks.append(result)
        return 128

    masks: list[Segmentation] = []
    monkeypatch.setattr(benchmark, "without_doubtful", slowly)
    monkeypatch.setattr(Segmentation, "_lowest_pet", property(lowest_pet))
    (row,) = measure(proven, ["onnxruntime"], "cpu", threads=1, batch=1, seconds=SHORT).rows
    assert min(row.stages["finish"]) >= 20
    assert len(masks) == len(row.stages["finish"])


def test_engines_below_float32_are_also_measured_in_float32(blur: Any, tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    artifact = blur(tmp_path / "blur.onnx")
    done = measure(artifact, ["openvino"], "cpu", threads=1, seconds=SHORT)
    precisions = {row.exact: row.info.precision for row in done.rows}
    assert precisions.get(True, precisions[False]) == "f32"
    assert len(precisions) == len(done.rows) == (1 if precisions[False] == "f32" else 2)


INFO = EngineInfo(name="abacus", version="1", device="cpu", provider="beads", precision="bf16", threads=2, streams=3)
LINE = RuleLine(engine="abacus", device="cpu", text="", module="abacus", extra="abacus", run_by_us=False)


class Abacus(Engine):
    """A fast engine that lets other callers run first; fails at its ``fails``-th run."""

    def __init__(self, spec: ModelSpec, options: EngineOptions, fails: int = -1) -> None:
        self.spec, self.options, self.fails = spec, options, fails
        self.sizes: list[int] = []
        self.callers: set[int] = set()
        self.closed = False

    def run(self, images: Any) -> Any:
        self.sizes.append(len(images))
        self.callers.add(threading.get_ident())
        time.sleep(0.0005)
        if len(self.sizes) == self.fails:
            raise EngineError("a bead fell off")
        return np.zeros(images.shape[:3], np.uint8)

    def describe(self) -> EngineInfo:
        precision = "f32" if self.options.exact else "bf16"
        return dataclasses.replace(INFO, precision=precision, float32=precision, streams=self.options.streams)

    def close(self) -> None:
        self.closed = True
        if 0 < self.fails <= len(self.sizes):  # like a GPU that has failed: nothing can be freed
            raise EngineError("cannot take the beads off")


@pytest.fixture
def abaci(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., list[Abacus]]]:
    """Makes an abacus the only engine; returns the list of loaded engines, which must all be closed at the end."""
    made: list[Abacus] = []

    def set_up(fails: int = -1, exact_fails: bool = False) -> list[Abacus]:
        def load(
            artifact: Artifact, name: str, threads: int, *, device: str, streams: int, exact: bool, **_: Any
        ) -> Abacus:
            if exact and exact_fails:
                raise EngineError("no beads so fine")
            made.append(Abacus(artifact.spec, EngineOptions(threads=threads, streams=streams, exact=exact), fails))
            return made[-1]

        def check(line: RuleLine, gpus: Any, device: str, model: Path) -> EngineCheck:
            about = {"engine": line.engine, "device": device or line.device, "packages": (), "why": ""}
            return EngineCheck(**about, works=True, run_by_us=False)  # type: ignore[arg-type]

        monkeypatch.setattr(doctor, "read_gpus", lambda: ((), ""))
        monkeypatch.setattr(doctor, "read_rule", lambda: ((LINE,), ""))
        monkeypatch.setattr(doctor, "check_engine", check)
        monkeypatch.setattr(benchmark, "load_engine", load)
        return made

    yield set_up
    assert made
    assert all(engine.closed for engine in made)


def test_latency_uses_one_caller_and_throughput_one_per_thread(
    abaci: Callable[..., list[Abacus]], proven: Artifact
) -> None:
    made = abaci()
    done = measure(proven, threads=3, batch=8, seconds=SHORT)
    alone, shared, exact_alone, exact_shared = made
    assert [(engine.options.streams, engine.options.exact) for engine in made] == [
        (1, False),
        (3, False),
        (1, True),
        (3, True),
    ]
    assert len(alone.callers) == len(exact_alone.callers) == 1
    assert len(shared.callers) > 1
    assert threading.get_ident() not in shared.callers
    assert set(shared.sizes) == set(exact_shared.sizes) == {8}
    assert set(alone.sizes) == {8, 1}, "the stages are those of one photo"
    assert [(row.exact, row.info.precision, row.callers) for row in done.rows] == [(False, "bf16", 3), (True, "f32", 3)]


def test_an_engine_that_fails_while_timed_is_dropped_with_its_reason(
    abaci: Callable[..., list[Abacus]], proven: Artifact
) -> None:
    abaci(fails=5)
    done = measure(proven, threads=1, seconds=SHORT)
    assert done.rows == ()
    assert [check.why for check in done.failed] == ["failed while it was measured: a bead fell off"] * 2


def test_an_engine_that_fails_to_load_is_dropped_with_its_reason(
    abaci: Callable[..., list[Abacus]], proven: Artifact
) -> None:
    abaci(exact_fails=True)
    done = measure(proven, threads=1, seconds=SHORT)
    assert [row.exact for row in done.rows] == [False]
    assert [(check.works, check.why) for check in done.failed] == [(False, "no beads so fine")]


def test_ctrl_c_exits_with_130_and_empty_stdout(proven: Artifact) -> None:
    # Background jobs of a shell, and their children, ignore this signal by default.
    text = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); from petseg.cli import main; main()"
    )
    command = [sys.executable, "-c", text, "benchmark", str(proven.path), *IN_ONNXRUNTIME, "--seconds", "1000000"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            for line in process.stderr:
                if "round 1" in line:
                    process.send_signal(signal.SIGINT)
                    break
            out, err = process.communicate(timeout=60)
        finally:
            process.kill()
    assert (process.returncode, out, err.strip()) == (130, "", "petseg: interrupted")


def test_if_one_caller_fails_the_others_stop_after_their_run() -> None:
    """It does not wait for the rest of the time."""
    spec = ModelSpec(name="toy", height=16, width=32)
    engine = Abacus(spec, EngineOptions(streams=2), fails=50)
    with pytest.raises(EngineError, match="a bead fell off"):
        benchmark._runs_per_second(engine, np.zeros((1, 16, 32, 3), np.uint8), 2, seconds=10_000)


def test_a_signal_ends_the_wait_for_the_callers() -> None:
    engine = Abacus(ModelSpec(name="toy", height=16, width=32), EngineOptions(streams=2))
    threading.Timer(0.1, signal.pthread_kill, (threading.get_ident(), signal.SIGTERM)).start()
    completed: list[float] = []

    def work() -> None:
        completed.append(benchmark._runs_per_second(engine, np.zeros((1, 16, 32, 3), np.uint8), 2, seconds=5))

    with pytest.raises(SystemExit), terminable():
        work()
    assert completed == []


def test_the_summary_covers_all_runs_and_the_spread_covers_rounds() -> None:
    times = [[1.0, 2.0, 3.0], [5.0, 6.0, 7.0]]
    stages = {stage: [1.0, 3.0, 8.0] for stage in STAGES}
    row = Row(
        info=INFO, exact=False, load=9, first=8, callers=2, latency=times, throughput=[10.0, 40.0, 20.0], stages=stages
    )
    summary = row.summary()
    assert summary["latency_ms"] == {
        "p50": 4.0,
        "p95": pytest.approx(6.75),
        "p99": pytest.approx(6.95),
        "runs": 6,
        "median_of_rounds": [2.0, 6.0],
    }
    assert summary["photos_per_second"] == {"median": 20.0, "range": [10.0, 40.0], "callers": 2}
    assert summary["stages_p50_ms"] == dict.fromkeys(STAGES, 3.0)


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ([["abacus"]], "unknown engine 'abacus'"),
        ([[], "tpu"], "unknown device 'tpu'"),
        ([["onnxruntime"], "intel-gpu"], "onnxruntime: not available on intel-gpu"),
    ],
)
def test_unknown_engines_and_devices_are_rejected(proven: Artifact, args: list[Any], said: str) -> None:
    with pytest.raises(EngineError, match=said):
        measure(proven, *args, seconds=SHORT)


def test_the_text_output_has_tables_of_at_most_100_columns(capsys: pytest.CaptureFixture[str]) -> None:
    args = ["--backend", "onnxruntime", "--threads", "1", "--seconds", str(SHORT)]
    assert run(["benchmark", *args]) == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert lines[0].startswith("edge.onnx: petseg edge")
    titles = [line.partition(":")[0] for line in lines if line.startswith(("Latency", "Throughput", "Start", "Stages"))]
    assert titles == ["Latency", "Throughput", "Start", "Stages"]
    headers = [line.split() for line in lines if line.startswith("engine ")]
    assert headers[3][2:] == list(STAGES)
    rows = [line.split()[4:] for line in lines if line.startswith("onnxruntime on cpu  f32")]
    assert [len(row) for row in rows] == [7, 5, 2, len(STAGES)]
    assert all(float(word) > 0 for row in rows for word in row if word not in ("to", "-"))
    assert any(line.startswith("not measured: onnxruntime on cuda: ") for line in lines) or "cuda:0" in out
    assert f"petseg: round {ROUNDS} of {ROUNDS}: " in err


def test_the_tables_fit_100_columns_with_long_names_and_large_numbers(proven: Artifact) -> None:
    info = dataclasses.replace(INFO, name="tensorrt-rtx", device="cuda:0", precision="f32", float32="f32")
    row = Row(
        info=info,
        exact=True,
        load=123456,
        first=12345.6,
        callers=128,
        latency=[[1234.56] * 200] * ROUNDS,
        throughput=[12345.6] * ROUNDS,
        stages={stage: [1234.56] for stage in STAGES},
    )
    done = Benchmark(rows=(row,), failed=(), host=host(), gpus=(), threads=128, batch=64, seconds=15)
    lines = list(_text(proven, done))
    assert any("per batch of 64" in line for line in lines)
    assert max(map(len, lines[2:])) <= 100, "all lines after those of the model and the machine"


def test_the_json_output_has_every_time(proven: Artifact, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["--backend", "onnxruntime", "--device", "cpu", "--threads", "1", "--batch", "2", "--seconds", str(SHORT)]
    assert run(["benchmark", str(proven.path), *args, "--json", "-q"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    record = json.loads(out)
    assert record["schema_version"] == 1
    assert (record["threads"], record["batch"], record["failed"]) == (1, 2, [])
    assert record["model"]["file"] == "toy.onnx"
    assert record["model"]["identity"] == proven.identity
    assert record["host"]["packages"]["onnxruntime"]
    assert "host memory" in record["method"]
    (row,) = record["rows"]
    assert (row["name"], row["precision"], row["exact"]) == ("onnxruntime", "f32", False)
    raw = row["raw"]
    runs = [value for values in raw["latency_ms"] for value in values]
    assert row["latency_ms"]["runs"] == len(runs)
    assert min(runs) <= row["latency_ms"]["p50"] <= row["latency_ms"]["p99"] <= max(runs)
    assert len(raw["photos_per_second"]) == ROUNDS
    assert raw["stages_ms"].keys() == row["stages_p50_ms"].keys() == set(STAGES)


def test_if_nothing_can_be_measured_it_exits_with_5_and_the_reasons(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "read_gpus", lambda: ((), "its driver is gone"))
    assert run(["benchmark", "--device", "cuda", "-q"]) == 5
    out = capsys.readouterr().out.splitlines()
    listed = [line for line in out if line.startswith("not measured: ")]
    assert len(listed) == 3
    assert all("no NVIDIA GPU" in line and "(its driver is gone)" in line for line in listed)


def test_a_file_that_is_not_a_model_exits_with_4(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["benchmark", str(tmp_path / "missing.onnx"), "-q"]) == 4
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("command", ["benchmark", "doctor"])
def test_help_imports_nothing_heavy(command: str) -> None:
    text = f"import sys\nfrom petseg.cli import run\nrun([{command!r}, '--help'])\nprint('MODULES', *sys.modules)"
    done = subprocess.run([sys.executable, "-W", "error", "-c", text], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    modules = {name.partition(".")[0] for name in done.stdout.splitlines()[-1].split()}
    assert "click" in modules
    assert modules & {"numpy", "PIL", "av", "onnxruntime", "openvino", "platformdirs", "rich"} == set()
