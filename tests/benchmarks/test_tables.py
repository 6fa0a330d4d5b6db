"""The tables of RESULTS.md match the records."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import tables
from benchmarks.photos import NATIVE, TEST_SETS

pytestmark = pytest.mark.usefixtures("results")


def group(**values: Any) -> dict[str, Any]:
    row = {"engine": "openvino 1", "device": "cpu", "stored": "fp32", "precision": "bf16", "median": 7.04}
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


def test_the_other_columns_of_an_engine() -> None:
    (row,) = group()["rows"]
    assert tables.engine_alone(row) == " 8.00, 9.00 (140) | 35 % | 101 | 51 |"
    assert tables.engine_alone({**row, "share_of_matmul_peak": None}) == " 8.00, 9.00 (140) |  | 101 | 51 |"
    assert tables.engine_alone({**row, "p99": None, "runs": 99}) == " 8.00 (99) | 35 % | 101 | 51 |"
    assert tables.engine_alone({**row, "p95": None, "p99": None, "runs": 15}) == "  | 35 % | 101 | 51 |"


def test_other_networks_are_columns() -> None:
    other = group(model="attention U-Net, width 64", size=[128, 128], operations=24.6e9)
    other["rows"] = [{**other["rows"][0], "precision": "f32", "median": 130.0, "share_of_matmul_peak": None}]
    lines = tables.relatives({**group(), "networks": [other]})
    assert "petseg edge, 160 × 160, batch 1 (2.4 GFLOP) | width 64, 128 × 128, batch 1 (24.6 GFLOP)" in lines[2]
    assert lines[4:] == ["| openvino 1 | fp32 | bf16 | 7.0 (35 %) |  |", "| openvino 1 | fp32 | f32 |  | 130.0 |"]


def test_another_model_may_lack_an_iou_or_a_range() -> None:
    assert tables.other("FPN", "test split", [None, [0.9125, 0.9156], 0.5]) == (
        "| FPN | test split |  | 0.9125 to 0.9156 | 0.5000 |"
    )


def readings(iou: float) -> dict[str, Any]:
    values = {"iou": iou, "points_lost": 0.04, "iou_interval_95": [iou - 0.1, iou + 0.05]}
    return {"readings": dict.fromkeys(("background", "pet", "ignored"), values)}


def test_each_metric_is_reported_at_its_threshold(tmp_path: Path) -> None:
    kinds = {"own": readings(0.8), "cutout": readings(0.85), "ignored_border": readings(0.9)}
    compared = {"photos": {"small": 3}, "rows": [{"name": "openvino", "sets": {"small": kinds}}]}
    record = {"photos": {"small": 3}, "thresholds": dict.fromkeys(kinds, 0.5), "compared": compared}
    (tmp_path / "accuracy.json").write_text(json.dumps(record))
    assert tables.engines().splitlines()[-1] == "| openvino | 0.8000 (-0.04) | 0.8500 (-0.04) | 0.9000 (-0.04) |"


def test_the_published_network_is_reported_at_the_thresholds_of_validation(tmp_path: Path) -> None:
    values = dict.fromkeys(tables.METRICS, 0.84)
    first = {"epochs": 10, "seconds": 1000, "images_per_s": 30.0, "data_wait": 0.06}
    second = {"epochs": 20, "seconds": 5000, "images_per_s": 18.0, "data_wait": 0.03}
    record = {
        "machine": {"cores": 2, "cpu": "AMD EPYC"},
        "runs": [first, second],
        "validation": {"iou": 0.83},
        "thresholds": {"background": 0.6, "pet": 0.05, "ignored": 0.3},
        "tests": {"small": {"at_thresholds_of_validation": dict.fromkeys(("background", "pet", "ignored"), values)}},
    }
    (tmp_path / "some.json").write_text(json.dumps(record))
    about, _, _, _, row, *rest = tables.published_by_us("some").splitlines()
    assert about.startswith("30 epochs in 100 minutes of steps on 2 cores of AMD EPYC, 20.0 photos/s, 4 % of the time")
    assert about.endswith(
        "photos: 0.8300. At the thresholds that are best on them (as background 0.6, as pet 0.05, ignored 0.3):"
    )
    assert row == "| small | as background | 0.8400 | 0.8400 | 0.8400 | 0.8400 | 0.8400 | 0.8400 |"
    assert len(rest) == 2


def test_engines_measured_on_a_subset_of_photos_say_so(tmp_path: Path) -> None:
    kinds = {"own": readings(0.8), "cutout": readings(0.85), "ignored_border": readings(0.9)}
    record = {
        "photos": {"small": 3000, "large": 242},
        "thresholds": dict.fromkeys(kinds, 0.5),
        "rows": [{"name": "PyTorch", "sets": {"small": {}, "large": {}}}],
        "compared": {
            "photos": {"small": 600, "large": 242},
            "rows": [{"name": "openvino", "sets": {"small": kinds, "large": kinds}}],
        },
    }
    (tmp_path / "accuracy.json").write_text(json.dumps(record))
    text = tables.engines()
    assert "Set 1: 600 of the small. Set 2: large." in text
    assert text.splitlines()[-1].startswith("| openvino | 0.8000 (-0.04) |")


def test_a_background_remover_is_reported_on_the_same_photos() -> None:
    ours = {"engine": "openvino 1", "precision": "bf16", "median": 0.0071}
    ours |= {"own": readings(0.8), "cutout": readings(0.85), "ignored_border": readings(0.9)}
    isnet = {"median": 1.8, "at_0.5": readings(0.7)}
    isnet |= {f"at_best_for_{border}": readings(0.75) for border in tables.CHOSEN}
    beside = {"photos": ["a", "b"], "petseg": ours, "isnet": isnet}
    beside["difference"] = {"background": [-0.01, 0.11], "pet": [0.1, 0.2], "ignored": [-0.2, -0.1]}
    own, worse, best, difference = tables.isnet({"small": beside}).splitlines()[-4:]
    assert own == (
        "| petseg, openvino 1 bf16 | 2 of the small | 7.1 | 0.8000 (0.700 to 0.850) | 0.8500 (0.750 to 0.900) "
        "| 0.9000 (0.800 to 0.950) |"
    )
    assert worse.startswith("| ISNet, ONNX Runtime f32, threshold 0.5 | 2 of the small | 1800 | 0.7000 (0.600 to")
    assert best.startswith("| ISNet, ONNX Runtime f32, best threshold | 2 of the small | 1800 | 0.7500 (0.650 to")
    assert "| -1.0 to +11.0 points | +10.0 to +20.0 points | -20.0 to -10.0 points |" in difference


def test_the_rival_is_reported_on_all_photos_and_in_every_engine() -> None:
    times = [
        {
            "engine": "onnxruntime 1",
            "precision": "f32",
            "petseg_milliseconds": [9.0, 10.0, 11.0],
            "median": 9.6,
            "petseg_times_as_fast": 0.95,
            "petseg_times_as_fast_each": [0.7, 0.8, 0.9, 0.95, 1.0, 1.1, 1.2],
        },
    ]
    kinds = {"own": readings(0.8), "cutout": readings(0.85), "ignored_border": readings(0.9)}
    record = {"photos": {"small": 3}, "rows": [{"sets": {"small": kinds}}], "rival_times": times}
    about = {"name": "LR-ASPP", "parameters": 3.2e6, "epochs": 8, "hours": 1.5, "teacher": None}
    text = tables.rival(record, {**about, "sets": {"small": readings(0.7)}})
    assert "LR-ASPP, 3.2 M parameters, trained from scratch by petseg's trainer, 8 epochs (1.5 h of steps)" in text
    assert "teacher: none" in text
    assert "| petseg's built-in model | small | 0.8000 (0.700 to 0.850) | 0.8500 (0.750" in text
    assert "| LR-ASPP | small | 0.7000 | 0.7000 | 0.7000 |" in text
    assert f"onnxruntime f32: 10.00 against 9.60 ms, 0.95 times as fast (0.70 to 1.20). {tables.RATIOS}" in text


def test_the_interval_of_a_median_has_the_ranks_of_the_binomial_distribution() -> None:
    """For 15 values, textbooks give the 4th and the 12th (96.5 %); for 6 the first and the last (96.9 %)."""
    assert tables.of_median(range(15, 0, -1)) == "4.00 to 12.00"
    assert tables.of_median(range(1, 7)) == "1.00 to 6.00"


@pytest.mark.parametrize(
    ("alone", "seen", "said"),
    [
        (0.91, 0.915, "alone has 0.9100, which is short of it; `petseg infer` shows 0.9150, which is short of it."),
        (0.91, 0.93, "alone has 0.9100, which is short of it; `petseg infer` shows 0.9300, which reaches it."),
        (0.92, 0.93, "alone has 0.9200, which reaches it; `petseg infer` shows 0.9300, which reaches it."),
    ],
)
def test_the_aim_is_compared_with_the_network_and_with_what_is_shown(alone: float, seen: float, said: str) -> None:
    each = {
        kind: {"ignored_border": {"readings": {"ignored": {"mean_image_iou": value}}}}
        for kind, value in (("alone", alone), ("shown", seen))
    }
    assert tables.beside_the_aim({"sets": {TEST_SETS[NATIVE]: each}}).endswith(said)


def test_networks_trained_alike_are_shown_side_by_side() -> None:
    rows = [
        {
            "name": name,
            "parameters": millions * 1e6,
            "epoch_took_seconds": seconds,
            "validation": {"val_iou": iou - 0.1},
            "sets": {"small": readings(iou)},
        }
        for name, millions, seconds, iou in (("edge", 1.8, 30, 0.8), ("LR-ASPP", 3.2, 45, 0.79))
    ]
    text = tables.alike({"epochs": 16, "size": [160, 160], "networks": rows})
    assert "16 epochs at 160 × 160, no teacher, one seed" in text
    assert text.splitlines()[-2:] == [
        "| edge | 1.80 | 30 | 0.7000 | 0.8000 |",
        "| LR-ASPP | 3.20 | 45 | 0.6900 | 0.7900 |",
    ]


def test_folder_rates_are_shown_with_and_without_startup(tmp_path: Path) -> None:
    row = {
        "kind": "mask",
        "backend": "openvino",
        "photos_per_second": {"command": 150.4, "loop": 100.4},
        "photos_per_second_with_start": 120.4,
        "share_of_allowed": 0.876,
        "ratio_to_loop": 1.498,
    }
    (tmp_path / "throughput.json").write_text(json.dumps({"photos": 240, "rows": [row]}))
    assert tables.folders().splitlines()[-1] == "| openvino | mask | 150 | 88 % | 100 | 1.50 | 120 |"


def test_an_engine_is_named_only_once() -> None:
    assert tables.title({"name": "lraspp, PyTorch", "engine": "PyTorch"}) == "lraspp, PyTorch"
    assert tables.title({"name": "petseg, auto", "engine": "openvino 1, bf16"}) == "petseg, auto (openvino 1)"
