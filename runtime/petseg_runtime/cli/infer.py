"""``petseg infer``: photos in, masks and cutouts out."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from petseg_runtime.cli.text import PATH, SCHEMA_VERSION, UNIT, parse_size, shown
from petseg_runtime.errors import EXIT_PARTIAL, InputError, OutputError

if TYPE_CHECKING:
    from petseg_runtime.batch import Done, Report
    from petseg_runtime.pipeline import Outcome
    from petseg_runtime.segmenter import Segmenter
    from petseg_runtime.sinks import Sink
    from petseg_runtime.sources import Item

__all__ = ["infer"]

AREA = click.FloatRange(0, 1, max_open=True)


@click.command()
@click.argument("paths", nargs=-1, required=True, type=PATH, metavar="PATH...")
@click.option("--model", type=PATH, help="A file that `petseg export` made.  [default: the one that ships]")
@click.option("--output", type=PATH, help="Folder for the results.  [default: petseg-output/KIND]")
@click.option(
    "--as",
    "kind",
    type=click.Choice(["mask", "probability", "cutout", "overlay", "background", "coco-polygons", "coco-rle"]),
    help="What to write for each photo; COCO is one file for all.  [default: cutout]",
)
@click.option(
    "--format",
    type=click.Choice(["png", "jpg", "webp"]),
    help="Of pictures.  [default: jpg where nothing is transparent or exact, else png]",
)
@click.option("--background", metavar="COLOUR|FILE", help="What to put behind the pet: white, '#00ff00', beach.jpg.")
@click.option("--threshold", type=UNIT, help="Pet from this probability on, 0 to 1.  [default: the model's own]")
@click.option("--min-area", type=AREA, default=0.0, help="Drop regions below this share of the photo, 0 to 1.")
@click.option("--backend", default="auto", show_default=True, help="The engine: onnxruntime, openvino, ...")
@click.option("--device", default="auto", show_default=True, help="cpu, cuda, cuda:N, intel-gpu; never another one.")
@click.option("--size", metavar="HxW", help="Of the model's input, if it takes any.  [default: the model's own]")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads.  [default: all]")
@click.option("--resume", is_flag=True, help="Go on with a run of several photos that was stopped.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object per photo on stdout, then a summary.")
@click.option("-v", "--verbose", is_flag=True, help="Say what runs it, and what each step took.")
@click.option("-q", "--quiet", is_flag=True, help="Only errors.")
def infer(
    paths: tuple[Path, ...],
    output: Path | None,
    kind: str | None,
    background: str | None,
    resume: bool,
    as_json: bool,
    verbose: bool,
    quiet: bool,
    **options: Any,
) -> int:
    """Segment photos: files, folders with their sub-folders, 'patterns/**/*.jpg'; - is stdin, and then stdout.

    A photo that cannot be used is named, counted and passed over. Exit code 0: all done; 3: some failed; 1: all
    failed.
    """
    from petseg_runtime.batch import segment_photos
    from petseg_runtime.journal import Journal
    from petseg_runtime.sinks import KINDS, check_looks
    from petseg_runtime.sources import STDIN, find_photos

    kind = kind or ("background" if background else "cutout")
    folder = None if paths == (STDIN,) and not output else output or Path("petseg-output") / kind
    if folder is None and (as_json or resume or not KINDS[kind].formats):
        raise OutputError(
            "a picture goes to standard output: for --json, --resume or COCO, give a folder with --output"
        )
    items = find_photos(paths, folder)
    if not items:
        raise InputError(f"no photos in {', '.join(map(str, paths))}")
    looks = {"as": kind, "format": options.pop("format"), "background": background}
    check_looks(kind, looks["format"], background)
    with contextlib.ExitStack() as stack:
        segmenter = stack.enter_context(_segmenter(len(items), quiet, **options))
        _tell(segmenter, verbose, quiet)
        sink = _sink(items, folder, resume, **looks)  # makes the folder, so not before there is something to write
        journal = None
        if folder and (resume or len(items) > 1 or not KINDS[kind].formats):
            journal = stack.enter_context(Journal(folder, looks | _settings(segmenter), resume=resume))
        watch = stack.enter_context(_watcher(len(items), as_json, quiet or folder is None))
        mask_only = not KINDS[kind].needs_photo
        report = segment_photos(items, segmenter, sink, watch, journal=journal, mask_only=mask_only)
    _print_report(report, folder, as_json, verbose, quiet)
    if report.failed:
        return EXIT_PARTIAL if report.done or report.skipped else InputError.exit_code
    return 0


def _sink(items: Sequence[Item], folder: Path | None, resume: bool, **looks: str | None) -> Sink:
    """Where the results go."""
    from petseg_runtime import sinks
    from petseg_runtime.journal import JOURNAL

    kind = str(looks.pop("as"))
    if folder and not sinks.KINDS[kind].formats:
        return sinks.CocoSink(folder, kind)
    picture = sinks.picture(kind, **looks)
    if folder is None:
        return sinks.StreamSink(sys.stdout.buffer, picture)
    # Without a journal, no run was here, and what lies there is not its own.
    return sinks.ImageSink(folder, picture, items, resume=resume and (folder / JOURNAL).exists())


def _segmenter(
    photos: int, quiet: bool, threshold: float | None, threads: int | None, size: str | None, **options: Any
) -> Segmenter:
    from petseg_runtime.engines.base import usable_cpus
    from petseg_runtime.segmenter import Segmenter

    return Segmenter(
        **options,
        threads=threads,
        streams=min(threads or usable_cpus(), photos),
        size=None if size is None else parse_size(size),
        threshold=threshold,
        cutout_threshold=threshold,
        tell=None if quiet else lambda what: click.echo(f"petseg: {shown(what)}", err=True),
    )


def _settings(segmenter: Segmenter) -> dict[str, Any]:
    """What decides how results look, beside their kind."""
    engine = segmenter.describe()
    return {
        "model": segmenter.artifact.identity,
        "size": list(segmenter.size),
        "threshold": segmenter.threshold,
        "cutout_threshold": segmenter.cutout_threshold,
        "min_area": segmenter.min_area,
        "engine": f"{engine.name} {engine.version} on {engine.device}, {engine.precision}",
    }


def _tell(segmenter: Segmenter, verbose: bool, quiet: bool) -> None:
    engine = segmenter.describe()
    for note in () if quiet else engine.notes:
        click.echo(f"petseg: {shown(note)}", err=True)
    if verbose:
        click.echo(
            f"{shown(segmenter.artifact.spec.name)} in {engine.name} {engine.version} on {engine.device}, "
            f"{engine.precision}, {engine.threads} threads",
            err=True,
        )


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

    def __enter__(self) -> Callable[[Outcome[Item, Done]], None]:
        if self._progress:
            self._progress.start()
        return self._watch

    def __exit__(self, *_: object) -> None:
        if self._progress:
            self._progress.stop()

    def _watch(self, outcome: Outcome[Item, Done]) -> None:
        source, done = shown(outcome.source.source), outcome.value
        if done is None:
            click.echo(f"petseg: {shown(outcome.error)}", err=True)
        else:
            for note in () if self._quiet else done.notes:
                click.echo(f"petseg: {source}: {note}", err=True)
            if not self._as_json and not self._quiet:
                where = f" -> {shown(done.path)}" if done.path else ""
                pet = f"{100 * done.coverage:.0f} % pet" if done.found else "no pet, it seems"
                click.echo(f"{source}{where}  {pet}")
        if self._as_json:
            click.echo(json.dumps(_record(outcome)))
        if self._progress:
            self._progress.advance(self._task)


def _record(outcome: Outcome[Item, Done]) -> dict[str, Any]:
    record: dict[str, Any] = {"schema_version": SCHEMA_VERSION, "input": str(outcome.source.source)}
    if outcome.value is None:
        return {**record, "event": "failure", "error": str(outcome.error)}
    done = dataclasses.asdict(outcome.value)
    path, value = done.pop("path"), done.pop("value")
    done["coverage"] = round(done["coverage"], 6)
    annotation = {"annotation": value["annotation"]} if value else {}
    return {**record, "event": "result", "output": path and str(path), **done, **annotation}


def _print_report(report: Report, folder: Path | None, as_json: bool, verbose: bool, quiet: bool) -> None:
    total = report.done + len(report.failed) + report.skipped
    if as_json:
        counts = {"photos": total, "done": report.done, "failed": len(report.failed), "skipped": report.skipped}
        timing = {"seconds": round(report.seconds, 4), "steps": report.steps}
        output = {"output": str(report.path)} if report.path else {}
        click.echo(json.dumps({"schema_version": SCHEMA_VERSION, "event": "summary", **counts, **timing, **output}))
        return
    if folder and not quiet and (total > 1 or report.failed or verbose or report.path):
        failed = f", {len(report.failed)} failed" if report.failed else ""
        skipped = f", {report.skipped} there already" if report.skipped else ""
        photos = "photo" if total == 1 else "photos"
        where = shown(report.path or folder)
        click.echo(f"{total} {photos}: {report.done} written to {where}{skipped}{failed}{_took(report, verbose)}")
    if verbose:
        for step, seconds in report.steps.items():
            p50, p95 = 1e3 * seconds["p50"], 1e3 * seconds["p95"]
            click.echo(
                f"{step:>6}: median {p50:.1f} ms, 95 % below {p95:.1f} ms, {seconds['sum']:.2f} s in all", err=True
            )


def _took(report: Report, verbose: bool) -> str:
    worked = report.done + len(report.failed)
    return f" in {report.seconds:.2f} s ({worked / max(report.seconds, 1e-9):.1f} photos/s)" if verbose else ""
