"""The README states leads and shortfalls as the records have them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import summary
from benchmarks.photos import NATIVE, TEST_SETS

pytestmark = pytest.mark.usefixtures("results")


def readings(iou: float) -> dict[str, Any]:
    values = {"iou": iou, "dice": iou + 0.05, "iou_interval_95": [iou - 0.1, iou + 0.05]}
    return {"readings": dict.fromkeys(("background", "pet", "ignored"), values)}


def peer(name: str, *, faster: float, start: float, installed: float) -> dict[str, Any]:
    return {
        "name": name,
        "photos_per_second_once_running": {"median": 10.0, "min": 9.0, "max": 11.0},
        "engine": "onnxruntime 1" if faster < 1 else "ONNX Runtime",
        "petseg_times_as_fast": {
            "once_running": {"median": faster},
            "startup": {"median": start / 0.4},
            "loop_once_running": {"median": 1.04 if faster < 1 else 15.0},
        },
        "startup": {"seconds": [start, start, start]},
        "startup_seconds": {"median": start},
        "memory_mb": {"median": 100.0},
        "installed": {"megabytes": installed + 50, "of_these_cuda": 50},
    }


def shown(alone: float, seen: float, **sets: dict[str, Any]) -> dict[str, Any]:
    """A record of the original-size photos' mean IoU with the border ignored, and of other sets."""
    means = {"alone": alone, "shown": seen}
    native = {k: {"ignored_border": {"readings": {"ignored": {"mean_image_iou": v}}}} for k, v in means.items()}
    return {"sets": {TEST_SETS[NATIVE]: native, **{what: {"shown": kinds} for what, kinds in sets.items()}}}


def write(folder: Path, **values: dict[str, Any]) -> None:
    (folder / "training").mkdir(exist_ok=True)
    for name, record in values.items():
        (folder / f"{name}.json").write_text(json.dumps(record))


@pytest.fixture
def figures(tmp_path: Path) -> None:
    kinds = {"own": readings(0.85), "cutout": readings(0.86), "ignored_border": readings(0.92)}
    times = [{"engine": "onnxruntime 1", "precision": "f32", "petseg_times_as_fast": 0.96}]
    thresholds = {"own": 0.61, "cutout": 12 / 255, "ignored_border": 0.3}
    accuracy = {"rows": [{"sets": {"small": kinds}}], "isnet": None, "rival_times": times, "thresholds": thresholds}
    write(
        tmp_path,
        shown=shown(0.9039, 0.9139, small=kinds),
        accuracy=accuracy,
        rival={"epochs": 8, "sets": {"small": readings(0.86)}},
        **{"training/width64": {"tests": {"small": {"at_thresholds_of_validation": readings(0.84)["readings"]}}}},
        peers={
            "rows": [
                peer("petseg, auto", faster=1, start=0.4, installed=400),
                peer("quick", faster=0.9, start=0.3, installed=200),
                peer("slow", faster=30, start=3, installed=900),
            ]
        },
    )


@pytest.mark.usefixtures("figures")
def test_leads_and_shortfalls_have_the_right_sign() -> None:
    published, rival, pretrained, aim, folders, alone, start, size = summary.ahead().splitlines()
    assert ": +1.2 points of IoU on small (0.8500, 95 % interval 0.750 to 0.900). " in published
    assert published.endswith("the same network reaches 0.8400 at 128×128.")
    assert "-1.0 points" in rival
    assert "0.8600 with the border as pet, where its example shows 0.9125 to 0.9156" in pretrained
    assert aim.startswith("- **Short of our aim of 0.92** (")
    assert aim.endswith(": `petseg infer` shows 0.9139, the network alone reaches 0.9039.")
    assert "0.90 times as fast as the nearest of 2 plain loops over other networks (quick), and 30 times" in folders
    assert folders.endswith("relative to the fastest peer in the same engine is 1.04 in onnxruntime.")
    assert alone.endswith("0.96 in onnxruntime f32.")
    assert "takes 0.40 s; 1 of the peers' plain loops take less, the quickest 0.30 s" in start
    assert "400 MB installed" in size
    assert "need 200 MB" in size


@pytest.mark.usefixtures("figures")
def test_without_shortfalls_none_are_mentioned(tmp_path: Path) -> None:
    own = peer("petseg, auto", faster=1, start=0.4, installed=400)
    write(tmp_path, peers={"rows": [own, peer("slow", faster=30, start=3, installed=900)]})
    assert "Behind in" not in summary.ahead()
    write(tmp_path, shown=shown(0.91, 0.93))
    assert "it reaches 0.9100, `petseg infer` shows 0.9300" in summary.ahead()
    write(tmp_path, shown=shown(0.92, 0.93))
    assert "our aim" not in summary.ahead()


@pytest.mark.usefixtures("figures")
def test_each_metric_is_reported_at_its_threshold() -> None:
    head, *_, ours, seen, wide, theirs = summary.quality().splitlines()
    assert "IoU, border as background (at 0.61) | Dice, border as background | IoU, border as pet (at 0.047)" in head
    assert head.endswith("| IoU, border ignored (at 0.3) |")
    assert ours.endswith("| small | 0.8500 | 0.9000 | 0.8600 | 0.9200 |")
    assert seen == "| **the same, as shown by `petseg infer`** | small | 0.8500 | 0.9000 | 0.8600 | 0.9200 |"
    assert wide.endswith("29.3 M, trained by us, at 128×128 | small | 0.8400 | 0.8900 | 0.8400 | 0.8400 |")
    assert theirs.endswith("| small | 0.8600 | 0.9100 | 0.8600 | 0.8600 |")
