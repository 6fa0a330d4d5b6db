"""The table has a column for each machine, with empty cells for missing records."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import machines, records, summary

pytestmark = pytest.mark.usefixtures("results")


def write_records(
    folder: Path, cpu: str, ms: dict[tuple[str, str], float], rate: float, shipped: str | None = None
) -> None:
    """Write the records of a machine: the network's times by engine and precision, and the rate on a folder."""

    def row(name: str, faster: float, seconds: float) -> dict[str, Any]:
        return {
            "name": name,
            "photos_of_petseg": {"photos": 10, "times": 1},
            "engine": "openvino 1, f32",
            "photos_per_second_once_running": {"median": rate / faster},
            "petseg_times_as_fast": {"once_running": {"median": faster}},
            "startup_seconds": {"median": seconds},
            "startup": {"seconds": [seconds]},
            "folder": {"photos": 10, "seconds": [faster + seconds]},
        }

    made: dict[str, dict[str, Any]] = {
        "latency": {
            "machine": {"cpu": cpu, "calibration": {"gflops": 123.4}},
            "date": "2026-01-02",
            "rows": [
                {"engine": f"{engine} 1", "stored": "fp32", "precision": precision, "median": median}
                for (engine, precision), median in ms.items()
            ],
        },
        "peers": {
            "machine": {"cpu": cpu},
            "date": "2026-01-02",
            "rows": [row("petseg, auto", 1, 0.4), row("quick", 1.9, 0.2), row("slow", 30, 3)],
        },
        "video": {
            "clip": "720p, 3 s",
            "rows": [{"kind": "mask", "times_real_time": 9}, {"kind": "overlay", "times_real_time": 1.5}],
        },
        "accuracy": {"rival_times": [{"engine": "openvino 1", "precision": "f32", "petseg_times_as_fast": 1.12}]},
    }
    folder.mkdir(parents=True, exist_ok=True)
    shipped = shipped or records.shipped_model()
    for name, record in made.items():
        (folder / f"{name}.json").write_text(json.dumps({"shipped_model": shipped, **record}))


def cells(text: str, what: str) -> list[str]:
    """The cells of the row that begins with this text."""
    return next(line for line in text.splitlines() if line.startswith(f"| {what}")).removesuffix(" |").split(" | ")[1:]


def test_the_table_has_a_column_for_each_machine(tmp_path: Path) -> None:
    write_records(tmp_path, "Fast", {("openvino", "f32"): 6.0, ("openvino", "bf16"): 2.5}, 174)
    write_records(tmp_path / "machines" / "old", "Old", {("openvino", "f32"): 12.0}, 55)
    text = machines.machines()
    assert text.splitlines()[2] == "| | Fast, 2026-01-02 | Old, 2026-01-02 |"
    assert cells(text, "the network alone, ms: openvino, f32") == ["6.0", "12.0"]
    assert "| the network alone, ms: openvino, bf16 | 2.5 |  |" in text.splitlines()
    assert cells(text, "`petseg infer` on a folder")[1] == "55 (openvino 1, f32)"
    assert cells(text, "once running, times as fast as the peers")[0] == "1.90 (quick) to 30"
    assert cells(text, "start included, times as fast as the fastest")[0] == "1.50 (quick)"
    assert cells(text, "one photo, start included")[0] == "0.40 (0.20)"
    assert cells(text, "times as fast as LR-ASPP's, alone: openvino, f32") == ["1.12", "1.12"]


def test_different_workloads_are_reported(tmp_path: Path) -> None:
    for folder, frames in ((tmp_path, 240), (tmp_path / "machines" / "old", 180)):
        write_records(folder, "CPU", {("openvino", "f32"): 6.0}, 174)
        record = json.loads((folder / "video.json").read_text())
        (folder / "video.json").write_text(json.dumps({**record, "frames": frames}))
    assert cells(machines.machines(), "a video to an overlay") == ["1.50 (240 frames)", "1.50 (180 frames)"]
    assert cells(machines.machines(), "`petseg infer` on a folder")[0] == "174 (openvino 1, f32)", (
        "the record does not tell"
    )
    record["frames"] = 240
    (folder / "video.json").write_text(json.dumps(record))
    assert cells(machines.machines(), "a video to an overlay") == ["1.50", "1.50"]


def test_the_readme_has_a_column_for_each_machine(tmp_path: Path) -> None:
    write_records(tmp_path, "Fast", {("openvino", "f32"): 6.0, ("openvino", "bf16"): 2.5}, 174)
    write_records(tmp_path / "machines" / "old", "Old", {("openvino", "f32"): 12.0}, 55)
    head, _, *lines = summary.by_machine()
    assert head == "| | Fast, 2026-01-02 | Old, 2026-01-02 |"
    running = "once running, times as fast as the nearest and the farthest peer"
    assert lines == [
        "| photos to masks in a folder, photos/s | 174 (openvino 1, f32) | 55 (openvino 1, f32) |",
        f"| {running} | 1.90 (quick) to 30 | 1.90 (quick) to 30 |",
        "| start included, times as fast as the fastest peer | 1.50 (quick) | 1.50 (quick) |",
        "| the network alone, ms: openvino, f32 | 6.0 | 12.0 |",
        "| the network alone, ms: openvino, bf16 | 2.5 |  |",
        "| a video (720p, 3 s) to an overlay, start included, times real time | 1.50 | 1.50 |",
    ]


def test_machines_that_ran_an_earlier_model_are_named(tmp_path: Path) -> None:
    for name, shipped in (("Old", "petseg edge, 0123"), ("New", None)):
        write_records(tmp_path / "machines" / name, name, {("openvino", "f32"): 12.0}, 55, shipped)
    write_records(
        tmp_path, "First", {("openvino", "f32"): 6.0}, 174, "petseg edge, 0123"
    )  # shown in a separate section
    said = "With an earlier built-in model (speeds hold, masks differ): Old, 2026-01-02."
    assert machines.machines().splitlines()[-2:] == ["", said]
    assert summary.by_machine()[-2:] == ["", said]


def test_unmeasured_cells_are_empty(tmp_path: Path) -> None:
    write_records(tmp_path, "Fast", {("openvino", "f32"): 6.0}, 174)
    write_records(tmp_path / "machines" / "old", "Old", {("openvino", "f32"): 12.0}, 55)
    for name in ("peers", "accuracy"):
        (tmp_path / "machines" / "old" / f"{name}.json").unlink()
    lines = machines.machines().splitlines()
    assert "| one photo, start included, s (the quickest peer) | 0.40 (0.20) |  |" in lines
    assert "| times as fast as LR-ASPP's, alone: openvino, f32 | 1.12 |  |" in lines
    assert "Old" not in summary.by_machine()[0]
