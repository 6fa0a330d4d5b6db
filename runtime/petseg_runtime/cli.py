"""``petseg infer``, ``info`` and ``verify``: what a device runs; no torch, and nothing imported that is not used."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from petseg_runtime.errors import EXIT_PARTIAL, InputError, OutputError, ParityError

if TYPE_CHECKING:
    from petseg_runtime.pipeline import Outcome, Report

__all__ = ["infer", "info", "parse_size", "verify"]

SCHEMA_VERSION = 1
PATH = click.Path(path_type=Path)
UNIT = click.FloatRange(0, 1, min_open=True, max_open=True)


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
        source = _shown(outcome.item.source)
        if outcome.failure is not None:
            click.echo(f"petseg: {_shown(outcome.failure)}", err=True)
        else:
            assert outcome.result is not None
            for note in () if self._quiet else outcome.result.notes:
                click.echo(f"petseg: {source}: {note}", err=True)
            if not self._as_json and not self._quiet:
                click.echo(f"{source} -> {_shown(outcome.path)}  {100 * outcome.result.coverage:.0f} % pet")
        if self._as_json:
            click.echo(json.dumps(_record(outcome)))
        if self._progress:
            self._progress.advance(self._task)


def _shown(text: object) -> str:
    """Text with all that is not printable escaped: a file's name may hold line breaks, or bytes that are no UTF-8."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


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
        click.echo(f"{total} {photos}: {report.done} written to {_shown(folder)}{failed}{took}")


def parse_size(text: str) -> tuple[int, int]:
    """``192`` or ``192x256`` to (height, width).

    Raises:
        click.BadParameter: Neither form.
    """
    parts = text.lower().split("x")
    if len(parts) not in (1, 2) or not all(part.isdecimal() for part in parts):
        raise click.BadParameter(f"{text!r}: HEIGHTxWIDTH is expected, for example 192x256", param_hint="--size")
    return int(parts[0]), int(parts[-1])


@click.command()
@click.argument("file", type=PATH)
@click.option("--json", "as_json", is_flag=True, help="Everything, as one JSON object.")
def info(file: Path, as_json: bool) -> int:
    """Say what a model file is, what it expects, where it comes from and how it was proven."""
    from petseg_runtime.artifact import open_artifact
    from petseg_runtime.verify import verified

    artifact = open_artifact(file)
    header = artifact.onnx
    record = {
        "schema_version": SCHEMA_VERSION,
        "file": str(file),
        "format": artifact.format,
        "bytes": artifact.size,
        "identity": artifact.identity,
        "spec": dataclasses.asdict(artifact.spec),
        "opset": header.opset if header else None,
        "inputs": [dataclasses.asdict(tensor) for tensor in header.inputs] if header else [],
        "outputs": [dataclasses.asdict(tensor) for tensor in header.outputs] if header else [],
        "environment": artifact.environment,
        "provenance": artifact.provenance,
        "receipt": artifact.receipt,
        "verified": verified(artifact),
    }
    if as_json:
        click.echo(json.dumps(record, indent=2))
    else:
        click.echo("\n".join(f"{name:>22}  {value}" for name, value in _lines(record)))
    return 0


def _lines(record: dict[str, Any]) -> list[tuple[str, str]]:
    """What people want of a record, one thing a line."""
    spec, provenance = record["spec"], record["provenance"]
    tensors = [
        (kind, f"{t['name']}: {t['dtype']} [{', '.join(map(str, t['shape']))}]")
        for kind in ("inputs", "outputs")
        for t in record[kind]
    ]
    opset = f", opset {record['opset']}" if record["opset"] else ""
    size = f"{spec['height']} x {spec['width']}" + (", or any multiples of 16" if spec["dynamic_size"] else "")
    lines = [
        ("file", f"{record['file']} ({record['bytes'] / 1e6:.1f} MB, {record['format']}, {spec['precision']}{opset})"),
        ("model", spec["name"]),
        ("identity", f"sha256 {record['identity']}"),
        *((kind[:-1], text) for kind, text in tensors),
        ("resize", f"{spec['resize']} to {size}, {spec['filter']}, antialiased"),
        ("threshold", f"{spec['threshold']} for masks, {spec['cutout_threshold']} for cutouts"),
    ]
    environment = record["environment"].items()  # its lists of layers and messages are for programs
    lines += [("built for", f"{k}: {_plain(v)}") for k, v in environment if v and k not in ("engine", "messages")]
    lines += [(name.replace("_", " "), str(value)) for name, value in provenance.items() if isinstance(value, str)]
    lines += [
        (name, f"{key}: {_plain(value)}")
        for name in ("training", "measured")
        if isinstance(provenance.get(name), dict)
        for key, value in provenance[name].items()
    ]
    return lines + _parity_lines(record)


def _parity_lines(record: dict[str, Any]) -> list[tuple[str, str]]:
    """What was proven where the file was made, and what on this device."""
    lines = []
    for title, receipt in (("parity", record["receipt"]), ("verified here", record["verified"])):
        if rows := receipt.get("rows"):
            try:
                lines += [(title, f"{receipt['kind']}, {receipt['photos']} photos, {row['summary']}") for row in rows]
            except (KeyError, TypeError):
                lines.append((title, "not a receipt that this version of petseg can read"))
        elif receipt:
            lines.append((title, receipt.get("summary", "")))
    return lines or [("parity", "no receipt: this file was never compared with its checkpoint")]


def _plain(value: Any) -> str:
    return json.dumps(value).replace('"', "")


@click.command()
@click.argument("file", type=PATH, required=False)
@click.option("--backend", default="auto", show_default=True, help="The engine that runs it.")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads.  [default: all]")
@click.option("--proof", type=PATH, help="Photos and the checkpoint's answers.  [default: FILE.parity.npz]")
@click.option("--output", type=PATH, help="Where the result goes.  [default: FILE.verified.json]")
@click.option("--json", "as_json", is_flag=True, help="Print the receipt as JSON on stdout.")
@click.option("-q", "--quiet", is_flag=True, help="Only errors.")
def verify(
    file: Path | None,
    backend: str,
    threads: int | None,
    proof: Path | None,
    output: Path | None,
    as_json: bool,
    quiet: bool,
) -> int:
    """Run FILE on this device and compare it with what its checkpoint said when it was exported.

    Without FILE, the model that ships with petseg (whose result is written only where --output says). Exit code 0: it
    does what the checkpoint does; 10: it does not, and the report says where and by how much.
    """
    from petseg_runtime.artifact import default_model, open_artifact
    from petseg_runtime.verify import parts_of, save, sidecar_of, verify_artifact

    artifact = open_artifact(file or default_model())
    place = output or (sidecar_of(artifact.path) if file else None)
    if place and place.exists() and any(place.samefile(part) for part in parts_of(artifact, proof) if part.exists()):
        raise OutputError(f"{place}: belongs to the model, which is not written to: give another file with --output")
    receipt = verify_artifact(artifact, backend, threads, proof)
    if as_json:
        click.echo(json.dumps(receipt.as_dict(), indent=2))
    elif not quiet:
        for row in receipt.rows:
            click.echo(f"{_shown(artifact.path)}: {receipt.kind}, {receipt.photos} photos, {row.summary}")
    for failure in receipt.failures:
        click.echo(f"petseg: {failure}", err=True)
    if place:
        save(artifact, receipt, place)  # last: what was found is not lost with it
    return 0 if receipt.passed else ParityError.exit_code
