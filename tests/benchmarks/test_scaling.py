"""Where curves bend, and what counts as flat."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import av
import pytest

from benchmarks import scaling


@pytest.mark.parametrize(
    ("costs", "until", "rises"),
    [
        ([10.0, 8.0, 6.0, 5.9, 6.0], 4, None),
        ([10.0, 8.0, 6.0, 7.0, 9.0], 4, 8),
        ([10.0, 9.8, 9.7, 9.6, 9.6], 1, None),
        ([10.0, 10.2, 11.0, 10.2, 12.0], 1, 16),  # a bump that goes down again is not a rise
        ([10.0, 9.0, 8.0, 7.0, 6.0], 16, None),
    ],
)
def test_the_bend_is_where_a_curve_stops_falling(costs: list[float], until: int, rises: int | None) -> None:
    found = scaling.bend(list(zip((1, 2, 4, 8, 16), costs, strict=True)), "batch", "ms a photo")
    assert (found["falls_until"], found["rises_from"]) == (until, rises)
    assert f"batch {until}" in found["statement"]
    assert ("rises" in found["statement"]) == (rises is not None)


def test_a_fluctuating_curve_has_no_bend() -> None:
    measured = [140.0, 144.0, 185.0, 242.0, 164.0, 126.0, 121.0]
    found = scaling.bend(list(zip((96, 128, 160, 192, 256, 320, 384), measured, strict=True)), "size", "ns a pixel")
    assert (found["falls_until"], found["rises_from"]) == (None, None)
    assert "between 121 and 242 ns a pixel: no clear bend" in found["statement"]


def test_cost_is_per_pixel_or_per_photo() -> None:
    sizes = scaling.curve("size", {scaling.Point(100, 1, 2): [1.0, 3.0, 2.0], scaling.Point(200, 1, 2): [8.0] * 3})
    assert [point["cost"] for point in sizes["points"]] == pytest.approx([200, 200])
    batches = scaling.curve("batch", {scaling.Point(160, 1, 2): [4.0], scaling.Point(160, 4, 2): [8.0]})
    assert [point["cost"] for point in batches["points"]] == [4.0, 2.0]
    assert batches["bend"]["falls_until"] == 4


def test_threads_are_compared_round_by_round() -> None:
    def curve(threads: int, axis: str, *ms: float) -> dict[str, Any]:
        return {
            "name": f"{axis} {threads}",
            "threads": threads,
            "axis": axis,
            "points": [{"at": 96, "milliseconds": ms}],
        }

    curves = [curve(1, "size", 4, 40), curve(2, "size", 2, 10), curve(1, "batch", 3, 3), curve(2, "batch", 3, 3)]
    found = scaling.gains(curves)
    assert [row["curve"] for row in found] == ["size 2", "batch 2"]
    assert [row["times_as_fast_as_one_thread"] for row in found] == [[3.0], [1.0]]


@pytest.mark.parametrize(("peaks", "flat", "rate"), [((200, 204, 203), True, -1.5), ((200, 220, 300), False, 120.0)])
def test_flat_and_growing_memory_are_distinguished(peaks: tuple[float, ...], flat: bool, rate: float) -> None:
    rows = [{"peak_mb": [peak] * 3, "seconds_of_video": s} for peak, s in zip(peaks, (5, 20, 60), strict=True)]
    found = scaling.flatness(rows)
    assert (found["flat"], found["mb_per_minute"]) == (flat, pytest.approx(rate))
    assert found["statement"].startswith("flat" if flat else "NOT flat")
    assert f"{rate:+.1f} MB a minute from 20 s on" in found["statement"]


@pytest.mark.parametrize(("runs", "told"), [(1, "one run of each"), (2, "medians of 2 runs of each")])
def test_a_few_runs_report_the_difference_but_no_slope(runs: int, told: str) -> None:
    rows = [{"peak_mb": [195.0] * 3, "seconds_of_video": 5}, {"peak_mb": [201.0] * runs, "seconds_of_video": 60}]
    found = scaling.flatness(rows)
    assert (found["flat"], found["mb_per_minute"], found["runs_of_each"]) == (True, None, runs)
    assert found["statement"] == f"flat: 201 MB at 60 s, 195 MB at 5 s, a difference of +6 MB (+3.1 %; {told})"


def test_generated_clips_have_the_requested_length(tmp_path: Path) -> None:
    scaling.make_clip(tmp_path / "clip.mp4", 7)
    with av.open(str(tmp_path / "clip.mp4")) as clip:
        frames = list(clip.decode(video=0))
    assert [(len(frames), frames[0].width, frames[0].height)] == [(7, 640, 360)]
