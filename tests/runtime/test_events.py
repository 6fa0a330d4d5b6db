"""The output of `--json` matches the page: every event, every field, and which fields are always present."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from benchmarks.servers import free_port
from petseg.cli import run
from petseg_runtime.cli import infer_video
from petseg_runtime.video import run as run_module

PAGE = (Path(__file__).resolve().parents[2] / "runtime" / "README.md").read_text(encoding="utf-8")


def documented(section: str) -> tuple[dict[str, set[str]], dict[str, set[str]]]:
    """The fields of each event in the table of a section, and those that are always present."""
    table = PAGE.partition(f"### {section}\n")[2].partition("\n#")[0]
    fields: dict[str, set[str]] = defaultdict(set)
    always: dict[str, set[str]] = defaultdict(set)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if line.startswith("|")]
    for events, names, _, when in rows[2:]:
        for event in re.findall(r"`(\w+)`", events):
            fields[event] |= set(re.findall(r"`(\w+)`", names))
            always[event] |= set(re.findall(r"`(\w+)`", names)) if when == "always" else set()
    return fields, always


def printed_events(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def check(events: list[dict[str, Any]], section: str, but: set[str] = frozenset()) -> None:  # type: ignore[assignment]
    fields, always = documented(section)
    seen: dict[str, set[str]] = defaultdict(set)
    for event in events:
        kind = event["event"]
        assert always[kind] <= event.keys(), kind
        seen[kind] |= event.keys()
    assert {kind: names for kind, names in seen.items() if kind not in but} == fields


@pytest.fixture
def photos(toy: Callable[..., Any], tmp_path: Path) -> list[str]:
    """A command for a photo with a pet, a photo without one, and a file that is not a photo."""
    folder = tmp_path / "photos"
    folder.mkdir()
    pixels = np.zeros((20, 30, 3), np.uint8)
    pixels[4:14, 5:20, 0] = 255
    Image.fromarray(pixels).save(folder / "red.png")
    Image.new("RGB", (30, 20), "blue").save(folder / "blue.png")
    (folder / "bad.png").write_bytes(b"no photo")
    return ["infer", str(folder), "--model", str(toy(tmp_path / "toy.onnx").path), "--json", "--output"]


def test_photo_events_match_the_documentation(
    photos: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([*photos, str(tmp_path / "masks"), "--as", "mask", "--only-found"]) == 3
    assert run([*photos, str(tmp_path / "coco"), "--as", "coco-rle"]) == 3
    live = ["infer", "lavfi:testsrc=size=64x48:rate=25", *photos[2:], str(tmp_path / "live"), "--max-frames", "2"]
    events = printed_events(capsys)
    assert run(live) == 0
    events.append(printed_events(capsys)[-1])
    check(events, "Events of photos")
    steps = next(event["steps"] for event in events if event["event"] == "summary")
    assert list(steps) == ["read", "infer", "write"]
    assert set(events[-1]["videos"]) == {"count", "done", "failed", "stopped", "skipped"}


def test_video_events_match_the_documentation(
    photos: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(infer_video, "_STATISTICS", 0.0)
    monkeypatch.setattr(run_module, "_SUMMING_UP", 0.0)
    options = [*photos[2:], str(tmp_path / "live"), "--as", "mask"]
    assert run(["infer", "lavfi:testsrc=size=64x48:rate=25", *options, "--max-frames", "3"]) == 0
    dead = f"http://127.0.0.1:{free_port()}/live.ts"
    assert run(["infer", dead, *options, "--give-up", "0.5"]) == 1
    events = printed_events(capsys)
    check(events, "Events of videos and streams", but={"summary"})
    steps = next(event["steps"] for event in events if event["event"] == "video")
    assert set(steps) == {"decode", "convert", "infer", "finish", "write", "latency"}
    frames = next(event["frames"] for event in events if event["event"] == "video")
    assert set(frames) == {"decoded", "delivered", "dropped", "failed", "failure"}
