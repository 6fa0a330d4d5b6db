"""Segments many photos in a pipeline, skips those that the journal has as done, and notes each result in it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from petseg_runtime import images
from petseg_runtime.errors import ImageTooLarge, InputError
from petseg_runtime.journal import Journal, Values
from petseg_runtime.pipeline import Outcome, Pipeline, Steps, Timings
from petseg_runtime.segmenter import Prepared, Segmenter
from petseg_runtime.sinks import Sink, Written
from petseg_runtime.sources import Item

__all__ = ["Done", "Report", "segment_photos"]


@dataclass(frozen=True)
class Done:
    """A summary of a photo whose result is written; the result itself is too large to keep.

    Attributes:
        path: The file with its result; None if results share one file.
        height: Height of the photo.
        width: Width of the photo.
        coverage: Share of the photo that is pet.
        found: Whether there is a pet.
        box: The bounding box of the mask: x, y, width, height in pixels; None if the mask is empty.
        notes: Decisions made while decoding it; see :class:`petseg_runtime.Photo`.
        value: Its entry in a file that is written at the end, if there is one.
        left_out: Nothing was written because there is no pet.
    """

    path: Path | None
    height: int
    width: int
    coverage: float
    found: bool
    box: tuple[int, int, int, int] | None
    notes: tuple[str, ...]
    value: dict[str, Any] | None
    left_out: bool = False


#: Called with the outcome of each photo, in order.
Watch: TypeAlias = Callable[[Outcome[Item, Done]], None]


@dataclass
class Report:
    """A summary of a run: ``done``, ``skipped`` and the length of ``failed`` add up to the number of photos.

    Attributes:
        done: Number of photos that were segmented, and whose results were written, except for ``left_out``.
        left_out: How many of these have no pet, so that nothing was written of them.
        failed: The reasons why photos failed, one line each.
        skipped: Number of photos whose results existed already.
        seconds: Wall time.
        steps: The durations of each step over all photos: ``sum``, ``p50``, ``p95``, ``p99`` in seconds.
        path: The file with all results, if there is one.
    """

    done: int = 0
    left_out: int = 0
    failed: list[str] = field(default_factory=list)
    skipped: int = 0
    seconds: float = 0.0
    steps: dict[str, dict[str, float]] = field(default_factory=dict)
    path: Path | None = None


def segment_photos(
    items: Sequence[Item],
    segmenter: Segmenter,
    sink: Sink,
    watch: Watch,
    *,
    begun: Callable[[int], None] = lambda left: None,
    journal: Journal | None = None,
    mask_only: bool = False,
    fast_decode: bool = False,
    only_found: bool = False,
    spare: int = 0,
) -> Report:
    """Segment every photo and write every result; a photo that fails does not stop the rest.

    Args:
        items: The photos.
        segmenter: The model.
        sink: Writes the results.
        watch: Called with the outcome of each photo, in order.
        begun: Called once before that, with the number of photos that are left to do.
        journal: Says which photos are done already, and notes each new result. Without one, the entries of a file with
            all results are kept in memory: enough for a few photos.
        mask_only: The photos' pixels are not part of the results.
        fast_decode: Decode large JPEGs at a reduced size, which changes masks slightly; requires ``mask_only``.
        only_found: Write nothing of photos without a pet. A file that an earlier run wrote for such a photo is kept: it
            is not this run's to remove.
        spare: Bytes per pixel of a photo that rendering its result takes; see :class:`petseg_runtime.sinks.Kind`.

    Raises:
        OutputError: No further result can be written.
        EngineError: The engine failed.
    """
    report, timings = Report(), Timings()
    start = time.perf_counter()
    left = [item for item in items if not (journal and journal.finished(item, sink.path_of(item)))]
    report.skipped = len(items) - len(left)
    begun(len(left))
    info = segmenter.describe()
    steps = _steps(segmenter, sink, journal, mask_only, fast_decode, only_found, spare)
    workers = max(1, min(segmenter.workers, len(left)))
    values: list[tuple[Item, dict[str, Any]]] = []
    with Pipeline(steps, info.streams, info.batch, workers=workers) as pipeline:
        for outcome in pipeline.run(left):
            if outcome.value is None:
                report.failed.append(str(outcome.error))
            else:
                report.done += 1
                report.left_out += outcome.value.left_out
                if journal:
                    journal.add(outcome.source, outcome.value.path, outcome.value.value)
                elif outcome.value.value is not None:
                    values.append((outcome.source, outcome.value.value))
            for step, seconds in outcome.seconds.items():
                timings.add(step, seconds)
            watch(outcome)
    _begin(journal, sink.beside_sources(None))
    report.path = sink.finish(Values(journal, items) if journal else values)
    report.steps = timings.summary()
    report.seconds = time.perf_counter() - start
    return report


def _begin(journal: Journal | None, path: Path | None) -> None:
    """Note a result that is about to be put beside the run's sources, unless there is no such file or no journal."""
    if journal and path:
        journal.begin(path)


def _steps(
    segmenter: Segmenter,
    sink: Sink,
    journal: Journal | None,
    mask_only: bool,
    fast_decode: bool,
    only_found: bool,
    spare: int,
) -> Steps[Item, Done]:
    at_least = segmenter.size if fast_decode else None

    def read(item: Item, reserve: Callable[[int], None]) -> Prepared:
        if item.problem:
            raise InputError(item.problem)
        source = item.source if item.data is None else item.data
        opened = images.open_photo(source, at_least=at_least, name=_name_of(item))
        with _enough_memory(item), opened as photo:
            reserve(photo.memory + spare * photo.pixels)
            return segmenter.prepare_opened(photo, mask_only=mask_only)

    def write(item: Item, photo: Prepared, answer: Any) -> Done:
        with _enough_memory(item):
            result = segmenter.finish(photo, answer)
            left_out = only_found and not result.found
            if not left_out:
                _begin(journal, sink.beside_sources(item))
            written = Written(value=sink.leave_out(result)) if left_out else sink.write(item, result)
        height, width = result.probability.shape
        return Done(
            path=written.path,
            height=height,
            width=width,
            coverage=result.coverage,
            found=result.found,
            box=result.box,
            notes=result.notes,
            value=written.value,
            left_out=left_out,
        )

    return Steps(read, segmenter.infer, write)


def _name_of(item: Item) -> str:
    """The photo's name in error messages."""
    return str(item.source) if item.data is None else "standard input"


@contextlib.contextmanager
def _enough_memory(item: Item) -> Iterator[None]:
    """Converts a ``MemoryError`` to the failure of this photo, so that the run continues.

    Raises:
        ImageTooLarge: On a ``MemoryError``.
    """
    try:
        yield
    except MemoryError as error:
        raise ImageTooLarge(f"{_name_of(item)}: not enough memory for it; make it smaller first") from error
