"""Every photo is accounted for: done or failed, told once, in order."""

from __future__ import annotations

import errno
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from petseg_runtime.errors import EngineError, OutputError, UnreadableImage
from petseg_runtime.pipeline import Outcome, Report, segment_photos
from petseg_runtime.result import Segmentation
from petseg_runtime.sinks import ImageSink
from petseg_runtime.sources import Item


class Segmenter:
    """Reads no file: a photo named bad fails, one named broken breaks the engine."""

    def __init__(self) -> None:
        self.seen: list[Path] = []

    def __call__(self, source: Path) -> Segmentation:
        self.seen.append(source)
        if source.name.startswith("bad"):
            raise UnreadableImage(f"{source}: damaged")
        if source.name.startswith("broken"):
            raise EngineError("out of memory")
        return Segmentation(np.zeros((4, 6, 3), np.uint8), np.full((4, 6), 255, np.uint8), 0.5, 0.5)


def items_of(*names: str) -> list[Item]:
    return [Item(Path(name), PurePath(name)) for name in names]


def run(items: list[Item], output: Path) -> tuple[Report, list[Outcome], Segmenter]:
    segmenter: Any = Segmenter()
    told: list[Outcome] = []
    report = segment_photos(items, segmenter, ImageSink(output, "mask", items), told.append)
    return report, told, segmenter


@given(st.lists(st.booleans(), max_size=8))
@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_done_and_failed_add_up_whatever_fails(tmp_path: Path, good: list[bool]) -> None:
    items = items_of(*(f"{'good' if ok else 'bad'}{i}" for i, ok in enumerate(good)))
    report, told, _ = run(items, tmp_path)
    assert report.done == sum(good)
    assert report.done + len(report.failed) == len(items)
    assert [outcome.item for outcome in told] == items
    assert [outcome.failure is None for outcome in told] == good


def test_an_outcome_has_its_result_and_file_or_its_failure(tmp_path: Path) -> None:
    _, (good, bad), _ = run(items_of("good", "bad"), tmp_path)
    assert good.path == tmp_path / "good.png"
    assert good.path.is_file()
    assert good.result is not None
    assert good.result.coverage == 1
    assert (bad.path, bad.result, bad.failure) == (None, None, "bad: damaged")


def test_failures_are_reported_in_their_own_words_and_leave_no_file(tmp_path: Path) -> None:
    report, _, _ = run(items_of("bad1", "good", "bad2"), tmp_path)
    assert report.failed == ["bad1: damaged", "bad2: damaged"]
    assert [path.name for path in tmp_path.iterdir()] == ["good.png"]


def test_a_problem_known_before_is_counted_without_trying(tmp_path: Path) -> None:
    items = [Item(Path("secret"), PurePath("secret"), "secret: the folder cannot be listed"), *items_of("good")]
    report, told, segmenter = run(items, tmp_path)
    assert report.failed == ["secret: the folder cannot be listed"]
    assert report.done == 1
    assert len(told) == 2
    assert segmenter.seen == [Path("good")]


def test_a_name_too_long_is_a_counted_failure(tmp_path: Path) -> None:
    report, told, _ = run(items_of("n" * 253, "good"), tmp_path)
    assert report.done == 1
    assert len(report.failed) == 1
    assert "too long" in report.failed[0]
    assert len(told) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["good.png"]


def test_a_full_disk_stops_the_run_and_leaves_no_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save, saved = Image.Image.save, 0

    def until_full(self: Image.Image, path: Path, **options: Any) -> None:
        nonlocal saved
        saved += 1
        save(self, path, **options)
        if saved > 2:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", until_full)
    told: list[Outcome] = []
    items = items_of("a", "b", "c", "d", "e")
    segmenter: Any = Segmenter()
    with pytest.raises(OutputError, match="No space left"):
        segment_photos(items, segmenter, ImageSink(tmp_path, "mask", items), told.append)
    assert [outcome.item.source.name for outcome in told] == ["a", "b"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "b.png"]


def test_a_failing_engine_stops_the_run(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="out of memory"):
        run(items_of("good", "broken", "never"), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["good.png"]


def test_only_errors_about_a_photo_are_counted_and_never_a_mistake_of_ours(tmp_path: Path) -> None:
    items = items_of("good")

    def mistaken(source: Path) -> Segmentation:
        raise ZeroDivisionError

    segmenter: Any = mistaken
    with pytest.raises(ZeroDivisionError):
        segment_photos(items, segmenter, ImageSink(tmp_path, "mask", items), lambda outcome: None)


def test_no_photos_is_an_empty_report(tmp_path: Path) -> None:
    report, told, _ = run([], tmp_path)
    assert (report.done, report.failed, told) == (0, [], [])


def test_the_time_is_measured(tmp_path: Path) -> None:
    report, _, _ = run(items_of("good"), tmp_path)
    assert report.seconds > 0
