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
    wide = {"share_of_matmul_peak": 0.351, "load_ms": 90, "first_run_ms": 11, "memory_mb": 51.2, "p95": 8, "p99": 9}
    rows = [{**row, **wide, "times_faster_than_pytorch": 2.5}]
    return {"model": "petseg edge", "size": [160, 160], "batch": 1, "operations": 2.4e9, "rows": rows, **values}


def test_the_other_columns_of_an_engine(report: Any) -> None:
    (row,) = group()["rows"]
    assert report.engine_alone(row) == " 8.00, 9.00 | 35 % | 101 | 51 |"
    assert report.engine_alone({**row, "share_of_matmul_peak": None}) == " 8.00, 9.00 |  | 101 | 51 |"


def test_other_networks_are_columns(report: Any) -> None:
    other = group(model="attention U-Net, width 64", size=[128, 128], operations=24.6e9)
    other["rows"] = [{**other["rows"][0], "precision": "f32", "median": 130.0, "share_of_matmul_peak": None}]
    lines = report.relatives({**group(), "networks": [other]})
    assert "petseg edge, 160 × 160, batch 1 (2.4 GFLOP) | width 64, 128 × 128, batch 1 (24.6 GFLOP)" in lines[2]
    assert lines[4:] == ["| openvino 1 | fp32 | bf16 | 7.0 (35 %) |  |", "| openvino 1 | fp32 | f32 |  | 130.0 |"]
