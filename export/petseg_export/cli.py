"""``petseg export``: export a checkpoint to a file, with a parity test."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import click

from petseg_export.config import QuantizeConfig
from petseg_export.registry import FORMATS, check, why_not
from petseg_runtime.cli.text import BACKEND, HELP, PATH, SCHEMA_VERSION, Finite, parse_size
from petseg_runtime.errors import DataError
from petseg_runtime.spec import PRECISIONS
from petseg_runtime.text import counted, shown

__all__ = ["export"]

#: Options whose names differ from the config fields.
_OPTIONS: Final = {"compute_capabilities": "--compute-capability"}


@click.command()
@click.argument("checkpoint", type=PATH, required=False)
@click.option(
    "--list", "listed", is_flag=True, help="List all formats, and why one cannot be built here; needs no CHECKPOINT."
)
@click.option("--format", "format_name", type=click.Choice(list(FORMATS)), default="onnx", show_default=True)
@click.option("--precision", type=click.Choice(PRECISIONS), default="fp32", show_default=True)
@click.option("-o", "--output", type=PATH, help="File to write.  [default: beside CHECKPOINT, with its name]")
@click.option("--size", metavar="HxW", help="Input height and width, multiples of 16.  [default: the training size]")
@click.option("--dynamic-size", is_flag=True, help="Make height and width dynamic: any multiples of 16.")
@click.option("--batch", default="dynamic", show_default=True, metavar="N|dynamic", help="Batch size.")
@click.option("--name", default="petseg attention U-Net", show_default=True, help="Name of the model.")
@click.option(
    "--certain-share",
    type=Finite(0, 1, min_open=True),
    metavar="SHARE",
    help="A photo shows a pet if at least this share of its pixels with a probability of 0.5 or more reaches 0.98.  "
    "[default: the checkpoint's, if any]",
)
@click.option("--data", type=PATH, help="Photos for the parity test, and for int8.  [default: petseg's sample photos]")
@click.option(
    "--split",
    type=click.Choice(["val", "test"]),
    default="val",
    show_default=True,
    help="Split of labelled --data that the parity test uses.",
)
@click.option(
    "--photos",
    type=click.IntRange(min=1),
    default=200,
    show_default=True,
    help="Largest number of photos in the parity test.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Seed for choosing these photos.")
@click.option("--backend", "backends", type=BACKEND, multiple=True, help="Engine of the parity test; repeatable.")
@click.option(
    "--device",
    default="auto",
    show_default=True,
    help="Device of the parity test: cpu, cuda[:N], intel-gpu[:N]; there is no fallback to another device. "
    "trt builds for this GPU.",
)
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads of the parity test.  [default: all]")
@click.option("--onnx", type=PATH, help="Compile this ONNX file, exported from CHECKPOINT, instead of a new one.")
@click.option("--int8-data", type=PATH, help="Labelled photos for int8.  [default: those of --data]")
@click.option("--int8-budget", type=Finite(0), metavar="POINTS", help="Largest loss of IoU.  [default: 0.5]")
@click.option("--int8-photos", type=int, metavar="N", help="Number of calibration photos.  [default: 64]")
@click.option("--int8-judges", type=int, metavar="N", help="Required number of validation photos.  [default: 100]")
@click.option("--max-batch", type=int, help="trt, trt-rtx: largest dynamic batch.  [default: 8]")
@click.option("--max-size", metavar="HxW", help="trt, trt-rtx: largest dynamic size.  [default: twice the input size]")
@click.option("--timing-cache", type=PATH, help="trt: timing cache file.  [default: in the user's cache folder]")
@click.option(
    "--compute-capability",
    "capabilities",
    multiple=True,
    metavar="N.N",
    help="trt-rtx: GPU to build for; repeatable.  [default: Ampere and later]",
)
@click.option("--notes", type=PATH, help="JSON object to add to the file's provenance (measured metrics, for example).")
@click.option("--json", "as_json", is_flag=True, help="Print the receipt, or the list, as JSON on stdout.")
@click.option("-q", "--quiet", is_flag=True, help=HELP["quiet"])
def export(checkpoint: Path | None, listed: bool, format_name: str, as_json: bool, quiet: bool, **options: Any) -> int:
    """Export CHECKPOINT, and write the file only if it agrees with CHECKPOINT on real photos.

    The file contains its specification (`petseg info FILE`) and the receipt of this parity test. A format that cannot
    run here is built, marked as not run, and tested on the device with `petseg verify FILE`.
    """
    if listed:
        click.echo(json.dumps(_listed(), indent=2) if as_json else _table())
        return 0
    if checkpoint is None:
        raise click.UsageError("Missing argument 'CHECKPOINT'.")
    config = FORMATS[format_name].config(**_settings(format_name, options))
    check(config)
    Path.cwd()  # if it was deleted, importing torch would end the process, with another message
    tempfile.gettempdir()  # torch.export needs the folder, and would hide the error that there is none
    from petseg_export.build import export as build  # torch and onnx are imported only once the request is valid

    with _progress(quiet) as watch:
        done = build(checkpoint, config, watch)
    receipt = done.receipt
    for note in () if quiet else done.notes:
        click.echo(f"petseg: {shown(note)}", err=True)
    if as_json:
        files = [str(file) for file in done.files]
        click.echo(json.dumps({"file": str(done.path), "files": files, **receipt.as_dict()}, indent=2))
    elif not quiet:
        for file in done.files:
            size = file.stat().st_size
            click.echo(f"{file} ({size / 1e6:.1f} MB)" if size >= 1e5 else f"{file} ({size / 1e3:.1f} kB)")
        from petseg_runtime.parity import SMOKE

        few = f" (a full test needs {SMOKE})" if receipt.kind == "smoke" else ""
        tested = f"{receipt.kind}, {counted(receipt.photos, 'photo')}{few}" if receipt.rows else receipt.summary
        click.echo(f"parity {tested}")
        for row in receipt.rows:
            click.echo(f"  {row.summary}")
    return 0


def _settings(format_name: str, options: dict[str, Any]) -> dict[str, Any]:
    """Convert the command-line options to fields of the format's config.

    Raises:
        click.UsageError: A value cannot be parsed, or an option does not apply to the format.
        UsageError: A value is invalid.
        DataError: The notes cannot be read.
    """
    values = {key: value for key, value in options.items() if value is not None and value != ()}
    if "size" in values:
        values["height"], values["width"] = parse_size(values.pop("size"))
    if "max_size" in values:
        values["max_size"] = parse_size(values["max_size"], "--max-size")
    if "capabilities" in values:
        values["compute_capabilities"] = values.pop("capabilities")
    values["batch"] = _batch(values["batch"])
    if "notes" in values:
        values["notes"] = _notes(values["notes"])
    int8 = {key: values.pop(f"int8_{key}") for key in ("data", "budget", "photos", "judges") if f"int8_{key}" in values}
    values["quantize"] = QuantizeConfig(**int8)
    fields = {field.name for field in dataclasses.fields(FORMATS[format_name].config)}
    if odd := sorted(values.keys() - fields):
        names = ", ".join(_OPTIONS.get(name, f"--{name.replace('_', '-')}") for name in odd)
        raise click.UsageError(f"{names}: does not apply to --format {format_name}")
    return values


def _batch(text: str) -> int:
    if text == "dynamic":
        return 0
    if not (text.isdecimal() and len(text) < 10) or int(text) < 1:  # `int` refuses thousands of digits
        raise click.BadParameter(f"{text!r}; a positive integer or 'dynamic' is expected", param_hint="--batch")
    return int(text)


def _notes(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"--notes {path}: cannot be read as JSON ({error})") from error
    if not isinstance(value, dict):
        raise DataError(f"--notes {path}: a JSON object is expected")
    return value


def _listed() -> dict[str, Any]:
    """The formats as JSON values; ``why_not`` says why this machine cannot build one, or is None."""
    formats = []
    for name, form in FORMATS.items():
        reason = why_not(form)
        about = {"name": name, "help": form.help, "suffix": form.suffix, "precisions": form.precisions}
        formats.append({**about, "proven": form.proven, "why_not": None if reason is None else str(reason)})
    return {"schema_version": SCHEMA_VERSION, "formats": formats}


def _table() -> str:
    """The formats as text."""
    lines = []
    for form in _listed()["formats"]:
        reason = form["why_not"]
        lines += [
            f"{form['name']:10} {form['help']}",
            f"{'':10} files {form['suffix']}; {', '.join(form['precisions'])}; {form['proven']}",
            f"{'':10} {'available here' if reason is None else f'not available here: {reason}'}",
        ]
    return "\n".join(lines)


@contextmanager
def _progress(quiet: bool) -> Iterator[Callable[[str, int, int], None]]:
    """Show a progress bar on stderr for each stage, if stderr is a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=quiet or not console.is_terminal, transient=True) as progress:
        tasks: dict[str, Any] = {}

        def watch(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = progress.add_task(what, total=None)
            progress.update(tasks[what], completed=done, total=total or None)

        yield watch
