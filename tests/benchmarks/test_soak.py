"""What the soak records of its sources."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import records, soak

URL = "rtsp://127.0.0.1:1/live"


def test_a_source_that_never_reconnects_is_null_in_the_record() -> None:
    states = [(1.0, "live"), (10.0, "waiting"), (14.5, "live"), (20.0, "waiting")]
    run: Any = SimpleNamespace(
        times=[100 + at for at, _ in states],
        events=[{"event": "state", "input": URL, "state": state} for _, state in states],
        counts={},
        last={},
    )
    script = [soak.Event(at, "rtsp", what) for at, what in ((9.0, "kill"), (12.0, "start"), (19.0, "kill"))]
    script.append(soak.Event(22.0, "rtsp", "start"))
    source = soak._source("rtsp", URL, run, script, begun=100)
    assert json.loads(json.dumps(source, allow_nan=False))["seconds_until_live_again"] == [2.5, None]


def test_the_summary_is_printed_with_and_without_reports(capsys: pytest.CaptureFixture[str]) -> None:
    soak._print_summary(records.load("soak"), Path("soak.json"))
    out = capsys.readouterr().out
    assert out.count("decoded") == out.count("all accounted for") == 3
    silent = {"source": "rtsp", "states": {}, "frame_events": 0, "report": None, "accounted": False}
    values = {"memory": soak.memory([]), "exit_code": 3, "seconds_to_end": 1, "sources": [silent]}
    soak._print_summary(values, Path("soak.json"))
    assert "rtsp: frames: 0 written, no report, NOT ALL ACCOUNTED FOR; states: none\n" in capsys.readouterr().out
