"""Sentences and small tables match their records."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import prose

pytestmark = pytest.mark.usefixtures("results")


def write(folder: Path, name: str, record: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(record))


def errors(photos: int, wrong: int) -> dict[str, Any]:
    return {"photos": photos, "wrong": wrong, "rate": wrong / photos, "interval_95": [0.024, 0.61]}


def test_missed_pets_and_false_positives_match_the_record(tmp_path: Path) -> None:
    pets = {"test, 128×128 copies": errors(1000, 36), "test, original size": errors(242, 16)}
    report = {
        "pets": pets,
        "crops": {"test, 128×128 copies": errors(200, 13), "test, original size": errors(100, 99)},
        "photos": {"one": errors(10, 9), "all": errors(138, 17)},
        "animals": {"one": errors(10, 9), "all": errors(51, 21)},
    }
    write(tmp_path, "found", {"report": report})
    assert prose.no_pet().splitlines()[2:] == [
        "| pets, 1000 test photos, 128×128 copies | 3.6 % missed (2.4 to 61) |",
        "| pets, 242 test photos at their original size | 6.6 % missed (2.4 to 61) |",
        "| 200 strips of test photos beside the pet | 6.5 % reported as a pet (2.4 to 61) |",
        "| 138 photos of places, things, people | 12 % reported as a pet (2.4 to 61) |",
        "| 51 photos of other animals | 41 % reported as a pet (2.4 to 61) |",
    ]
    assert "in [12 % of 138 photos without any animal and in 41 % of 51 photos of other animals]" in prose.cannot()


def test_the_card_gives_each_reading_at_its_own_threshold(tmp_path: Path) -> None:
    values = {"own": 0.86, "cutout": 0.87, "ignored_border": 0.94}
    kinds = {
        kind: {"readings": {how: {"iou": iou, "dice": iou + 0.06} for how in ("background", "pet", "ignored")}}
        for kind, iou in values.items()
    }
    write(tmp_path, "accuracy", {"rows": [{"sets": {"small": kinds}}]})
    write(tmp_path, "found", {"report": {"photos": {"all": errors(138, 17)}, "animals": {"all": errors(51, 21)}}})
    text = prose.card()
    assert (
        "on small, IoU 0.860 and Dice 0.920 with the border as background, IoU 0.870 as pet, and 0.940 ignored" in text
    )
    assert "in 12 % of photos without any animal, and in 41 % of photos of other animals." in text


def clip(less: float, gained: float = 0.0, residue: float = 0.0) -> dict[str, float]:
    return {"times_less_flicker": less, "iou_points_gained": gained, "residue": residue}


@pytest.mark.parametrize(
    ("residue", "after_a_cut"),
    [
        (0.0, "equal the unsmoothed ones"),
        (0.4, "differ from the unsmoothed ones by at most 0.4 of 255, averaged over the clips"),
    ],
)
def test_gain_and_cost_of_smoothing_match_the_record(tmp_path: Path, residue: float, after_a_cut: str) -> None:
    kinds = {
        "noise 3": clip(7.0),
        "noise 8": clip(5.0),
        "noise 16": clip(2.66, -0.1),
        "exposure +-4 %": clip(7.9),
        "noise 8, H.264 crf 28": clip(2.0),
        "noise 8, H.264 crf 38": clip(1.04),
        "pan": clip(1.5, -0.31),
        "cut": clip(4, 0.2, residue),
        "all still": clip(3.4, 0.05),
    }
    report = {"0.7": kinds, "0.85": {}, "10/s, 0.7": {"all still": clip(1.9)}}
    about = {"recommended": 0.7, "scenes_of_each_half": 14, "frames_per_second": 30}
    write(tmp_path, "flicker", {**about, "report": report})
    text = prose.smooth()
    assert text.startswith(
        "On clips of a second, made from 14 test photos, `--smooth 0.7` reduces flicker in still scenes 3.4 times at "
        "30 frames/s and 1.9 times at 10. At 30, that is 2.7 to 7.9 times with sensor noise"
    )
    assert "with H.264 2.0 times at CRF 28 and 1.0 times at CRF 38. The IoU of still scenes changes by +0.05" in text
    assert f"loses more than 0.31. In the first frame after a scene cut, probabilities {after_a_cut} (" in text


def test_training_times_per_machine_match_the_records(tmp_path: Path) -> None:
    for folder, cpu, rate in (
        (tmp_path, "Fast", 3490 * 30 / 3600),
        (tmp_path / "machines" / "b", "Slow", 3490 * 30 / 9000),
    ):
        rows = [
            {"name": "width 16, strided stem", "images_per_second": 1.0},
            {"name": "width 16", "images_per_second": rate},
        ]
        write(folder, "training", {"machine": {"cpu": cpu, "cores": 2}, "rows": rows})
    (tmp_path / "machines" / "c").mkdir()
    of_a_gpu = {"machine": {"cpu": "Big", "cores": 16}, "rows": [{"name": "width 64", "images_per_second": 900}]}
    write(tmp_path / "machines" / "d", "training", of_a_gpu)
    assert prose.training_time().splitlines()[2:] == [
        "- 60 minutes on 2 cores of Fast (29.1 photos/s)",
        "- 2.5 hours on 2 cores of Slow (11.6 photos/s)",
    ]


def test_gain_and_cost_of_reduced_decoding_match_the_record(tmp_path: Path) -> None:
    rows = [
        {"size": "1 MP", "margin": 3.0, "reduced": 0},
        {"size": "12 MP", "margin": 1.5, "reduced": 9, "mean_iou": 0.9, "min_iou": 0.1},
        {"size": "12 MP", "margin": 3.0, "reduced": 8, "mean_iou": 0.9984, "min_iou": 0.976},
    ]
    took = [{"size": row["size"], "wall": {"ratio": 4.87}} for row in rows[:2]]
    write(
        tmp_path,
        "reduced-decoding",
        {"photos": 9, "margin_in_use": 3.0, "agreement": rows, "milliseconds": took},
    )
    assert prose.fast_decode().splitlines()[4:] == ["| 12 MP | 8 | 4.9 | 0.998 | 0.98 |"]
