"""Photos -> segmenter -> sink, with every photo accounted for."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from petseg_runtime.errors import InputError
from petseg_runtime.result import Segmentation
from petseg_runtime.segmenter import Segmenter
from petseg_runtime.sinks import ImageSink
from petseg_runtime.sources import Item

__all__ = ["Outcome", "Report", "segment_photos"]


@dataclass(frozen=True)
class Outcome:
    """What became of one photo: a result and its file, or a failure in one line."""

    item: Item
    path: Path | None = None
    result: Segmentation | None = None
    failure: str | None = None


@dataclass
class Report:
    """The whole run: ``done + failed`` is the number of photos."""

    done: int = 0
    failed: list[str] = field(default_factory=list)
    seconds: float = 0.0


def segment_photos(
    items: Sequence[Item], segmenter: Segmenter, sink: ImageSink, watch: Callable[[Outcome], None]
) -> Report:
    """Segment every photo and write every result; one bad photo never stops the rest.

    Args:
        items: The photos.
        segmenter: The model.
        sink: Where results go.
        watch: Told of each photo as it is done or has failed.

    Raises:
        OutputError: Nothing more can be written.
        EngineError: The engine failed.
    """
    report = Report()
    start = time.perf_counter()
    for item in items:
        outcome = _one(item, segmenter, sink)
        if outcome.failure is None:
            report.done += 1
        else:
            report.failed.append(outcome.failure)
        watch(outcome)
    report.seconds = time.perf_counter() - start
    return report


def _one(item: Item, segmenter: Segmenter, sink: ImageSink) -> Outcome:
    try:
        if item.problem:
            raise InputError(item.problem)
        result = segmenter(item.source)
        return Outcome(item, sink.write(item, result), result)
    except InputError as error:
        return Outcome(item, failure=str(error))
