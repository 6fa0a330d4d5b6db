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
        "folder": {"photos": 100, "seconds": [faster + start]},
        "memory_mb": {"median": 100.0},
        "installed": {"megabytes": installed + 50, "of_these_cuda": 50},
    }


def shown(alone: float, seen: float, **sets: dict[str, Any]) -> dict[str, Any]:
    """A record of the original-size photos' mean IoU with the border ignored, and of other sets."""
    means = {"alone": alone, "shown": seen}
    native = {k: {"ignored_border": {"readings": {"ignored": {"mean_image_iou": v}}}} for k, v in means.items()}
    return {"sets": {TEST_SETS[NATIVE]: native, **{what: {"shown": kinds} for what, kinds in sets.items()}}}


def chosen(threshold: float) -> dict[str, float]:
    return {"background": threshold, "pet": 0.05, "ignored": 0.3}


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
        rival={"epochs": 8, "sets": {"small": readings(0.86)}, "thresholds": chosen(0.63)},
        **{
            f"training/{name}": {
                "tests": {"small": {"at_thresholds_of_validation": readings(iou)["readings"]}},
                "thresholds": chosen(threshold),
            }
            for name, iou, threshold in (("width64", 0.84, 0.67), ("published-cpu", 0.82, 0.5))
        },
        peers={
            "photos": 100,
            "rows": [
                peer("petseg, auto", faster=1, start=0.4, installed=400),
                peer("quick", faster=0.9, start=0.3, installed=200),
                peer("slow", faster=30, start=3, installed=900),
            ],
        },
    )


@pytest.mark.usefixtures("figures")
def test_leads_and_shortfalls_have_the_right_sign() -> None:
    published, rival, pretrained, folders, alone, start, size = summary.ahead().splitlines()
    assert ": level on small (0.8500, 95 % interval 0.750 to 0.900). " in published
    assert published.endswith(
        "the same network reaches 0.8200 by its recipe, and 0.8400 with the built-in model as its teacher."
    )
    assert "-1.0 points" in rival
    assert "0.8600 with the border as pet, where its example shows 0.9125 to 0.9156" in pretrained
    assert "0.90 times as fast as the nearest of 2 plain loops over other networks (quick), and 30 times" in folders
    assert "Start included, it is 0.86 times as fast on 100 photos as the fastest loop (quick). It reads" in folders
    assert folders.endswith("relative to the fastest peer in the same engine is 1.04 in onnxruntime.")
    assert alone.endswith("on 1 machines: 0.96 to 0.96 in onnxruntime f32.")
    assert "takes 0.40 s, start included; 1 of the peers' plain loops take less, the quickest 0.30 s" in start
    assert "400 MB installed" in size
    assert "need 200 MB" in size


@pytest.mark.usefixtures("figures")
def test_without_shortfalls_none_are_mentioned(tmp_path: Path) -> None:
    own = peer("petseg, auto", faster=1, start=0.4, installed=400)
    write(tmp_path, peers={"photos": 100, "rows": [own, peer("slow", faster=30, start=3, installed=900)]})
    assert "Behind in" not in summary.ahead()


@pytest.mark.usefixtures("figures")
def test_other_machines_have_their_say_on_speed(tmp_path: Path) -> None:
    times = [
        {"engine": f"{engine} 1", "precision": "f32", "petseg_times_as_fast": ratio}
        for engine, ratio in (("onnxruntime", 1.2), ("openvino", 1.3))
    ]
    own = peer("petseg, auto", faster=1, start=0.5, installed=400)
    for name, quick in (("a", 2.5), ("b", 1.7)):
        rows = [own, peer("quick", faster=quick, start=0.5, installed=200)]
        (tmp_path / "machines" / name).mkdir(parents=True)
        write(tmp_path / "machines" / name, peers={"photos": 100, "rows": rows}, accuracy={"rival_times": times})
    *_, folders, alone, _, _ = summary.ahead().splitlines()
    assert "the fastest loop (quick), and 2.00, 1.47 times on the other machines below." in folders
    assert alone.endswith(
        "on 3 machines: 0.96 to 1.20 in onnxruntime f32, 1.30 to 1.30 in openvino f32 (on 2 of them)."
    )


def test_a_lead_is_claimed_outside_the_interval_only() -> None:
    found = {"iou": 0.86, "iou_interval_95": [0.85, 0.87]}
    assert [summary.lead_over(published, found) for published in (0.84, 0.855, 0.88)] == [
        "+2.0 points of IoU",
        "level",
        "-2.0 points of IoU",
    ]


@pytest.mark.usefixtures("figures")
def test_each_metric_is_reported_at_its_threshold() -> None:
    *_, ours, seen, taught, by_recipe, theirs, _, thresholds = summary.quality().splitlines()
    assert thresholds.endswith(
        "the built-in model 0.61, 0.047, 0.3; the published network with a teacher 0.67, 0.05, 0.3; by its recipe 0.5, "
        "0.05, 0.3; LR-ASPP 0.63, 0.05, 0.3."
    )
    assert ours.endswith("| small | 0.8500 | 0.9000 | 0.8600 | 0.9200 |")
    assert seen == "| **the same, as shown by `petseg infer`** | small | 0.8500 | 0.9000 | 0.8600 | 0.9200 |"
    assert taught.endswith("trained by us with a teacher, at 128×128 | small | 0.8400 | 0.8900 | 0.8400 | 0.8400 |")
    assert by_recipe.endswith("trained by us by its recipe, at 128×128 | small | 0.8200 | 0.8700 | 0.8200 | 0.8200 |")
    assert theirs.endswith("| small | 0.8600 | 0.9100 | 0.8600 | 0.8600 |")
