"""``make bench`` runs every step, whatever becomes of the others; the README's table takes old records and new ones."""

from __future__ import annotations

import importlib
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
STEPS = ["latency", "throughput", "video", "scaling", "training", "accuracy", "peers", "report"]


def made(tmp_path: Path, fails: str) -> subprocess.CompletedProcess[str]:
    """``make bench`` with a Python and a petseg that only write down what they are called with."""
    binaries = tmp_path / "venv" / "bin"
    binaries.mkdir(parents=True)
    (binaries / "python").write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\ncase "$3" in {fails}) exit 3;; esac\n')
    (binaries / "petseg").write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\ntouch "$4"\n')
    for program in binaries.iterdir():
        program.chmod(0o755)
    (tmp_path / "venv" / ".installed").touch()  # newer than pyproject.toml: nothing is installed
    command = ["make", "-C", str(ROOT), "bench", f"DEV={tmp_path / 'venv'}", "DATA=photos"]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.parametrize(("fails", "code"), [("nothing", 0), ("throughput|report", 2)])
def test_every_step_runs_and_the_failed_ones_are_named(tmp_path: Path, fails: str, code: int) -> None:
    done = made(tmp_path, fails)
    calls = (tmp_path / "calls").read_text().splitlines()
    assert [call.split()[2] for call in calls[1:]] == STEPS
    assert "--int8" in calls[1]
    assert done.returncode == code, done.stderr
    assert ("FAILED: throughput report" in done.stderr) == bool(code)


@pytest.fixture
def report(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module, which is not installed."""
    monkeypatch.syspath_prepend(ROOT)
    return importlib.import_module("benchmarks.report")


def group(**values: Any) -> dict[str, Any]:
    row = {"engine": "openvino 1", "stored": "fp32", "precision": "bf16", "median": 7.04}
    wide = {
        "share_of_matmul_peak": 0.351,
        "load_ms": 90,
        "first_run_ms": 11,
        "memory_mb": 51.2,
        "p95": 8,
        "p99": 9,
        "runs": 140,
    }
    rows = [{**row, **wide, "times_faster_than_pytorch": 2.5}]
    return {"model": "petseg edge", "size": [160, 160], "batch": 1, "operations": 2.4e9, "rows": rows, **values}


def test_the_other_columns_of_an_engine(report: Any) -> None:
    (row,) = group()["rows"]
    assert report.engine_alone(row) == " 8.00, 9.00 (140) | 35 % | 101 | 51 |"
    assert report.engine_alone({**row, "share_of_matmul_peak": None}) == " 8.00, 9.00 (140) |  | 101 | 51 |"


def test_other_networks_are_columns(report: Any) -> None:
    other = group(model="attention U-Net, width 64", size=[128, 128], operations=24.6e9)
    other["rows"] = [{**other["rows"][0], "precision": "f32", "median": 130.0, "share_of_matmul_peak": None}]
    lines = report.relatives({**group(), "networks": [other]})
    assert "petseg edge, 160 × 160, batch 1 (2.4 GFLOP) | width 64, 128 × 128, batch 1 (24.6 GFLOP)" in lines[2]
    assert lines[4:] == ["| openvino 1 | fp32 | bf16 | 7.0 (35 %) |  |", "| openvino 1 | fp32 | f32 |  | 130.0 |"]


def test_another_model_may_have_no_iou_in_a_reading_or_a_range(report: Any) -> None:
    assert report.other("FPN", "test split", "", [None, [0.9125, 0.9156], 0.5]) == (
        "| FPN | test split |  |  | 0.9125 to 0.9156 | 0.5000 |"
    )


def readings(iou: float) -> dict[str, Any]:
    values = {"iou": iou, "points_lost": 0.04, "iou_interval_95": [iou - 0.1, iou + 0.05]}
    return {"readings": dict.fromkeys(("background", "pet", "ignored"), values)}


def test_each_reading_is_told_at_its_own_threshold(report: Any) -> None:
    kinds = {"own": readings(0.8), "cutout": readings(0.85), "ignored_border": readings(0.9)}
    record = {
        "photos": {"small": 3},
        "thresholds": dict.fromkeys(kinds, 0.5),
        "rows": [{"name": "openvino", "sets": {"small": kinds}}],
    }
    assert report.engines(record)[-1] == "| openvino | 0.8000 (-0.04) | 0.8500 (-0.04) | 0.9000 (-0.04) |"


def test_beside_others_everyone_is_told_on_the_same_photos(
    report: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(report.records, "RESULTS", tmp_path)  # where no rival is
    ours = {"engine": "openvino 1", "precision": "bf16", "median": 0.0071}
    ours |= {"own": readings(0.8), "cutout": readings(0.85), "ignored_border": readings(0.9)}
    isnet = {"median": 1.8, "at_0.5": readings(0.7)}
    isnet |= {f"at_best_for_{border}": readings(0.75) for border in report.CHOSEN}
    beside = {"photos": ["a", "b"], "petseg": ours, "isnet": isnet}
    beside["difference"] = {"background": [-0.01, 0.11], "pet": [0.1, 0.2], "ignored": [-0.2, -0.1]}
    own, worse, best, difference = report.others({"isnet": {"small": beside}, "elsewhere": []})[-4:]
    assert own == (
        "| petseg, openvino 1 bf16 | 2 of: small | 7.1 | 0.8000 (0.700 to 0.850) | 0.8500 (0.750 to 0.900) "
        "| 0.9000 (0.800 to 0.950) |"
    )
    assert worse.startswith("| ISNet, ONNX Runtime f32, threshold 0.5 | 2 of: small | 1800 | 0.7000 (0.600 to 0.750) |")
    assert best.startswith("| ISNet, ONNX Runtime f32, best threshold | 2 of: small | 1800 | 0.7500 (0.650 to 0.800) |")
    assert "| -1.0 to +11.0 points | +10.0 to +20.0 points | -20.0 to -10.0 points |" in difference


def test_the_rival_is_told_with_its_quickest_engine(report: Any) -> None:
    times = [
        {"engine": "onnxruntime 1", "precision": "f32", "median": 9.6, "petseg_times_as_fast": 0.95},
        {"engine": "openvino 1", "precision": "bf16", "median": 7.2, "petseg_times_as_fast": 1.25},
    ]
    record = {"name": "LR-ASPP", "parameters": 3.2e6, "epochs": 8, "hours": 1.5, "teacher": None}
    (row,) = report.rival({**record, "sets": {"small": readings(0.7)}}, times)
    assert row == (
        "| LR-ASPP, 3.2 M, from scratch by petseg's trainer, 8 epochs (1.5 h), teacher: none, openvino 1 bf16 | small "
        "| 7.2 | 0.7000 | 0.7000 | 0.7000 |"
    )
    said = report.in_turns("LR-ASPP", times)
    assert said.endswith("in turns: 0.95 times as fast in onnxruntime f32, 1.25 times as fast in openvino bf16.")
