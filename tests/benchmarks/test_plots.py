"""Each dot and bar of the plots is from its records; the same records give the same bytes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import plots

pytestmark = pytest.mark.usefixtures("results")


def reached(iou: float) -> dict[str, Any]:
    return {"readings": {"background": {"iou": iou}}}


def engine(name: str, precision: str, **values: Any) -> dict[str, Any]:
    return {"engine": name, "stored": "fp32", "precision": precision, **values}


LATENCY = {
    "rows": [
        engine("PyTorch 2, eager", "f32", median=18.0) | {"stored": "as trained"},
        engine("openvino 1", "f32", median=12.0),
        engine("openvino 1", "bf16", median=7.0),
    ],
    "networks": [
        {"name": "petseg edge, batch 8", "rows": [engine("openvino 1", "f32", median=90.0)]},
        {
            "name": plots.WIDE,
            "rows": [
                engine("PyTorch 2, eager", "f32", median=150.0) | {"stored": "as trained"},
                engine("openvino 1", "f32", median=100.0),
                engine("openvino 1", "bf16", median=50.0),
            ],
        },
    ],
}
PHOTOS = {"small": 3, "large": 2}
ROWS = [
    engine("PyTorch 2, eager", "f32", sets={name: {"own": reached(0.83)} for name in PHOTOS}),
    engine("openvino 1", "bf16", sets={name: {"own": reached(0.82)} for name in PHOTOS}),
    engine("onnxruntime 1", "f32", sets={name: {"own": reached(0.83)} for name in PHOTOS}),  # whose time is not known
]
REMOVER = {
    "photos": ["a", "b"],
    "isnet": {"median": 2.0, "at_0.5": reached(0.6), "at_best_for_background": reached(0.7)},
    "petseg": engine("openvino 1", "bf16", median=0.008, own=reached(0.75)),
}
ACCURACY = {
    "photos": PHOTOS,
    "rows": ROWS,
    "compared": {"photos": PHOTOS, "rows": ROWS},
    "isnet": dict.fromkeys(PHOTOS, REMOVER),
    "rival_times": [
        {"engine": "openvino 1", "precision": "bf16", "median": 16.0, "petseg_times_as_fast": 1.5},
        {
            "engine": "openvino 1",
            "precision": "f32",
            "median": 20.0,
            "petseg_times_as_fast": 1.1,
        },  # petseg: not measured
    ],
}
#: CPU seconds of each step in three rounds: the median is neither the first nor the mean, and wall time is another.
ROUNDS = [
    {name: {"cpu_seconds": cpu, "seconds": 1.0} for name, cpu in zip(("read", "infer", "write"), row, strict=True)}
    for row in ((0.01, 0.09, 0.03), (0.02, 0.04, 0.01), (0.09, 0.05, 0.02))
]
RIVAL = {
    "name": "LR-ASPP",
    "sets": {"small": reached(0.8), "large": reached(0.7)},
}
WIDE = {"tests": {name: {"at_thresholds_of_validation": reached(0.84)["readings"], **reached(0.83)} for name in PHOTOS}}
RECORDS = {
    "training/width64": WIDE,
    "latency": LATENCY,
    "accuracy": ACCURACY,
    "peers": {"rows": [{"name": "petseg", "photos_per_second_once_running": {"median": 90}}]},
    "rival": RIVAL,
    "throughput": {"rows": [{"backend": "openvino", "kind": "mask", "steps": ROUNDS}]},
    "video": {
        "rows": [{"backend": "openvino", "kind": "mask", "steps": {"decode": {"p50": 0.002}, "total": {"p50": 1}}}]
    },
}


def write_records(folder: Path) -> None:
    (folder / "training").mkdir()
    for name, record in RECORDS.items():
        (folder / f"{name}.json").write_text(json.dumps(record))


def test_each_dot_has_the_time_of_its_engine_and_precision() -> None:
    found = list(plots.dots(ACCURACY, LATENCY, RIVAL, WIDE, "small"))
    assert [(dot.name.partition(",")[0], dot.ms, dot.iou, dot.ours) for dot in found] == [
        ("petseg in PyTorch f32", 18.0, 0.83, True),
        ("petseg in openvino bf16", 7.0, 0.82, True),
        ("ISNet", 2000.0, 0.7, False),
        ("petseg in openvino bf16", 8.0, 0.75, True),  # on the two photos that ISNet saw
        ("LR-ASPP", 10.5, 0.8, False),  # 1.5 times petseg's 7 ms, whatever the machine did on the day of the 16 ms
        ("LR-ASPP", 20.0, 0.8, False),
        ("the published network", 100.0, 0.84, False),
    ]
    assert len(list(plots.dots({**ACCURACY, "isnet": None}, LATENCY, RIVAL, WIDE, "small"))) == 5


def test_the_published_figure_is_a_line_across_the_test_split_alone() -> None:
    figure = plots.accuracy_figure(ACCURACY, LATENCY, RECORDS["peers"], RIVAL, WIDE)
    small, large = (
        [text.get_text() for text in axes.get_legend().get_texts()] for axes in figure.axes if axes.get_legend()
    )
    assert [label for label in small if label.endswith("0.8375")]
    assert not [label for label in large if label.endswith("0.8375")]


def test_bars_are_milliseconds_of_each_step() -> None:
    assert plots.photo_bars(RECORDS["throughput"]) == {
        "openvino, mask": pytest.approx({"read": 20, "infer": 50, "write": 20})
    }
    assert plots.frame_bars(RECORDS["video"]) == {"openvino, mask": {"decode": 2.0}}


def test_the_same_records_give_the_same_bytes(tmp_path: Path) -> None:
    write_records(tmp_path)
    first, second = ([path.read_bytes() for path in plots.write()] for _ in range(2))
    assert len(first) == 2
    assert first == second
    assert all(text.startswith(b"<?xml") for text in first)


def test_an_outdated_plot_is_reported(tmp_path: Path) -> None:
    write_records(tmp_path)
    assert plots.stale() == [plots.ACCURACY, plots.STAGES], "missing plots are stale"
    plots.write()
    assert plots.stale() == []
    (tmp_path / "peers.json").write_text(json.dumps({"rows": []}))
    assert plots.stale() == [plots.ACCURACY]
