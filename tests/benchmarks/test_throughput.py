"""The bound set by the steps, and rates from the first file to the last."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from PIL import Image

from benchmarks import processes, records, throughput, video


def test_the_bound_is_set_by_the_slowest_step_or_the_cores() -> None:
    allowed = throughput.allowed
    steps = {"read": {"seconds": 0.002, "cpu_seconds": 0.004}, "infer": {"seconds": 0.01, "cpu_seconds": 0.006}}
    assert allowed(steps, 2) == pytest.approx(100)  # infer's 10 ms
    assert allowed(steps, 1) == pytest.approx(100)
    steps["read"]["cpu_seconds"] = 0.034
    assert allowed(steps, 2) == pytest.approx(50)  # 40 ms of CPU on two cores
    assert allowed(steps, 1) == pytest.approx(25)


def test_a_rate_is_measured_from_the_first_file(tmp_path: Path) -> None:
    (tmp_path / "below").mkdir()
    times = {".petseg-run.ndjson": 103.0, "a.png": 100.0, "below/b.png": 100.5, "c.png": 102.0}
    for name, when in times.items():
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (when, when))
    assert processes.first_to_last(tmp_path, ".png") == (3, 2.0)


def test_a_loop_is_compared_round_by_round() -> None:
    row = video.loop_row("peer", "openvino", 60, [3.0, 8.0, 4.0], [2.0, 4.0, 1.0])
    assert row["name"] == "peer, openvino"
    assert row["frames_per_second"] == 15.0
    assert row["petseg_times_as_fast"] == 2.0  # of 1.5, 2 and 4


def test_the_record_counts_the_existing_photos(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    images = tmp_path / "data" / "oxford-iiit-pet" / "images"
    images.mkdir(parents=True)
    for name in ("a.jpg", "b.jpg", "c.png"):
        Image.new("RGB", (4, 4)).save(images / name)
    copied: list[list[str]] = []
    written: list[dict[str, Any]] = []

    def one(folder: Path, *_: object) -> dict[str, Any]:
        copied.append(sorted(path.name for path in folder.iterdir()))
        return {}

    monkeypatch.setattr(throughput, "one", one)
    monkeypatch.setattr(records, "write", lambda name, command, values: written.append(values))
    for photos in ("2", "100"):
        done = CliRunner().invoke(throughput.throughput, ["--data", str(tmp_path / "data"), "--photos", photos])
        assert done.exit_code == 0, done.output
    assert [values["photos"] for values in written] == [2, 3]
    assert copied[-1] == ["0000.jpg", "0001.jpg", "0002.png"]
