"""``petseg infer``: photos in, masks and cutouts out."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from petseg_runtime.cli.text import PATH, SCHEMA_VERSION, UNIT, parse_size, shown
from petseg_runtime.errors import EXIT_PARTIAL, InputError

if TYPE_CHECKING:
    from petseg_runtime.pipeline import Outcome, Report

__all__ = ["infer"]


@click.command()
@click.argument("paths", nargs=-1, required=True, type=PATH, metavar="PATH...")
@click.option("--model", type=PATH, help="A file that `petseg export` made.  [default: the one that ships]")
@click.option("--output", type=PATH, help="Folder for the results.  [default: petseg-output/KIND]")
@click.option(
    "--as",
    "kind",
    type=click.Choice(["mask", "probability", "cutout", "overlay"]),
    default="cutout",
    show_default=True,
    help="What to write for each photo.",
)
@click.option("--threshold", type=UNIT, help="Pet from this probability on, 0 to 1.  [default: the model's own]")
@click.option("--backend", default="auto", show_default=True, help="The engine: onnxruntime, openvino, ...")
@click.option("--size", metavar="HxW", help="Of the model's input, if it takes any.  [default: the model's own]")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads.  [default: all]")
@click.option("--json", "as_json", is_flag=True, help="One JSON object per photo on stdout, then a summary.")
@click.option("-v", "--verbose", is_flag=True, help="Say what runs it, and how long it took.")
@click.option("-q", "--quiet", is_flag=True, help="Only errors.")
def infer(
    paths: tuple[Path, ...],
    model: Path | None,
    output: Path | None,
    kind: str,
    threshold: float | None,
    backend: str,
    size: str | None,
    threads: int | None,
    as_json: bool,
    verbose: bool,
    quiet: bool,
) -> int:
    """Segment photos: files, and folders with all their sub-folders.

    A photo that cannot be used is named, counted and passed over. Exit code 0: all done; 3: some failed; 1: all
    failed.
    """
    from petseg_runtime.pipeline import segment_photos
    from petseg_runtime.segmenter import Segmenter
    from petseg_runtime.sinks import ImageSink
    from petseg_runtime.sources import find_photos

    folder = output or Path("petseg-output") / kind
    items = find_photos(paths, folder)
    if not items:
        raise InputError(f"no photos in {', '.join(map(str, paths))}")
    with Segmenter(
        model,
        backend=backend,
        threads=threads,
        size=None if size is None else parse_size(size),
        threshold=threshold,
        cutout_threshold=threshold,
    ) as segmenter:
        if verbose:
            engine = segmenter.describe()
            click.echo(
                f"{segmenter.artifact.spec.name} in {engine.name} {engine.version} on {engine.device}, "
                f"{engine.precision}, {engine.threads} threads",
                err=True,
            )
        sink = ImageSink(folder, kind, items)
        with _watcher(len(items), as_json, quiet) as watch:
            report = segment_photos(items, segmenter, sink, watch)
    _print_report(report, folder, as_json, verbose, quiet)
    if report.failed:
        return EXIT_PARTIAL if report.done else InputError.exit_code
    return 0


class _watcher:  # noqa: N801 (used like a function)
    """Prints what becomes of each photo; a progress bar where people watch a batch."""

    def __init__(self, total: int, as_json: bool, quiet: bool) -> None:
        self._as_json, self._quiet = as_json, quiet
        self._progress: Any = None
        if total > 1 and sys.stderr.isatty() and not quiet:
            from rich.console import Console
            from rich.progress import Progress

            self._progress = Progress(console=Console(stderr=True), transient=True)
            self._task = self._progress.add_task("segmenting", total=total)

    def __enter__(self) -> Callable[[Outcome], None]:
        if self._progress:
            self._progress.start()
        return self._watch

    def __exit__(self, *_: object) -> None:
        if self._progress:
            self._progress.stop()

    def _watch(self, outcome: Outcome) -> None:
        source = shown(outcome.item.source)
        if outcome.failure is not None:
            click.echo(f"petseg: {shown(outcome.failure)}", err=True)
        else:
            assert outcome.result is not None
            for note in () if self._quiet else outcome.result.notes:
                click.echo(f"petseg: {source}: {note}", err=True)
            if not self._as_json and not self._quiet:
                click.echo(f"{source} -> {shown(outcome.path)}  {100 * outcome.result.coverage:.0f} % pet")
        if self._as_json:
            click.echo(json.dumps(_record(outcome)))
        if self._progress:
            self._progress.advance(self._task)


def _record(outcome: Outcome) -> dict[str, Any]:
    record: dict[str, Any] = {"schema_version": SCHEMA_VERSION, "input": str(outcome.item.source)}
    if outcome.result is None:
        return {**record, "event": "failure", "error": outcome.failure}
    height, width = outcome.result.probability.shape
    return {
        **record,
        "event": "result",
        "output": str(outcome.path),
        "height": height,
        "width": width,
        "coverage": round(outcome.result.coverage, 6),
        "notes": list(outcome.result.notes),
    }


def _print_report(report: Report, folder: Path, as_json: bool, verbose: bool, quiet: bool) -> None:
    total = report.done + len(report.failed)
    if as_json:
        counts = {"photos": total, "done": report.done, "failed": len(report.failed)}
        summary = {"schema_version": SCHEMA_VERSION, "event": "summary", **counts, "seconds": round(report.seconds, 4)}
        click.echo(json.dumps(summary))
    elif not quiet and (total > 1 or report.failed or verbose):
        took = f" in {report.seconds:.2f} s ({total / max(report.seconds, 1e-9):.1f} photos/s)" if verbose else ""
        failed = f", {len(report.failed)} failed" if report.failed else ""
        photos = "photo" if total == 1 else "photos"
        click.echo(f"{total} {photos}: {report.done} written to {shown(folder)}{failed}{took}")
