"""Photos of a camera's size: the results of a run, and their table in the pages."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from benchmarks import large, records, summary, tables


def test_only_result_files_are_counted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    kind = next(kind for kind in large.KINDS if kind.name == "cutout")

    def seconds_of(words: list[str | Path]) -> float:
        assert words[2:6] == ["infer", tmp_path, "--as", "cutout"]
        output = Path(words[-1])
        output.mkdir()
        for number in range(3):
            path = output / f"{number}.png"
            path.write_bytes(bytes(2_000_000))
            os.utime(path, ns=(0, 500_000_000 * number))
        (output / "journal.jsonl").write_bytes(b"{}")
        return 9.0

    monkeypatch.setattr(large, "seconds_of", seconds_of)
    found = large.one(tmp_path, tmp_path / "out", kind)
    assert found == {"first_to_last": 1.0, "photos_per_second": 2.0, "megabytes": 2.0}
    assert not (tmp_path / "out").exists()
    runs = [found, {**found, "first_to_last": 2.0, "photos_per_second": 1.0}, found]
    assert large.row(runs) == {"first_to_last": [1.0, 2.0, 1.0], "photos_per_second": 2.0, "megabytes": 2.0}


def test_the_pages_show_each_kind_of_output(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rows = [{"name": "mask", "photos_per_second": 6.04, "megabytes": 0.012}]
    record = {"photos": 12, "megapixels": 12.0, "machine": {"cores": 2, "cpu": "CPU"}, "rows": rows}
    (tmp_path / "large.json").write_text(json.dumps(record))
    monkeypatch.setattr(records, "RESULTS", tmp_path)
    assert tables.large().splitlines()[-1] == "| mask | 6.0 | 0.01 |"
    text = summary.large_photos()
    assert "photos enlarged to 12 megapixels" in text
    assert text.endswith("on 2 cores of CPU: mask: 6.0 photos/s (0.012 MB each).")
