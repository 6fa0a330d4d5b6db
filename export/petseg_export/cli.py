"""``petseg export``: a checkpoint in, a proven file out."""

from __future__ import annotations

import importlib
import json
import random
from pathlib import Path
from typing import Any

import click

from petseg_export.registry import FORMATS
from petseg_runtime.artifact import sample_photos
from petseg_runtime.errors import DataError
from petseg_runtime.sources import find_photos

__all__ = ["export"]

PATH = click.Path(path_type=Path)


@click.command()
@click.argument("checkpoint", type=PATH)
@click.option("--format", "format_name", type=click.Choice(list(FORMATS)), default="onnx", show_default=True)
@click.option("-o", "--output", type=PATH, help="The file to write.  [default: the checkpoint's name beside it]")
@click.option("--size", metavar="HxW", help="Input size, multiples of 16.  [default: the training size]")
@click.option("--name", default="petseg attention U-Net", show_default=True, help="What the model calls itself.")
@click.option("--data", type=PATH, help="Photos for the parity test.  [default: the samples that ship]")
@click.option("--photos", type=click.IntRange(min=1), default=200, show_default=True, help="At most this many.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the choice of those photos.")
@click.option("--notes", type=PATH, help="A JSON object to keep in the file's provenance (measured metrics).")
@click.option("--json", "as_json", is_flag=True, help="Print the receipt as JSON on stdout.")
@click.option("-q", "--quiet", is_flag=True, help="Only errors.")
def export(
    checkpoint: Path,
    format_name: str,
    output: Path | None,
    size: str | None,
    name: str,
    data: Path | None,
    photos: int,
    seed: int,
    notes: Path | None,
    as_json: bool,
    quiet: bool,
) -> int:
    """Export CHECKPOINT, compare the file with it on real photos, and write it only if it does the same.

    The file says what it expects (`petseg info FILE`) and carries the receipt of that comparison.
    """
    chosen = FORMATS[format_name]
    pictures = _photos(data, photos, seed)
    extra_notes = _notes(notes)
    config: dict[str, Any] = {"name": name, "notes": extra_notes}
    if size is not None:
        from petseg.commands import parse_size

        config["height"], config["width"] = parse_size(size)
    destination = output or checkpoint.with_suffix(chosen.suffix)
    receipt = _load(chosen.exporter)(checkpoint, destination, pictures, _load(chosen.config)(**config))
    if as_json:
        click.echo(json.dumps({"file": str(destination), **receipt.as_dict()}, indent=2))
    elif not quiet:
        click.echo(f"{destination} ({destination.stat().st_size / 1e6:.1f} MB)")
        click.echo(f"parity {receipt.summary}")
    return 0


def _photos(data: Path | None, limit: int, seed: int) -> list[Path]:
    """The photos of the parity test: all samples, or a seeded choice from a folder."""
    if data is None:
        return sample_photos()[:limit]
    if not data.is_dir():
        raise DataError(f"--data {data}: not a folder")
    folder = data / "images" if (data / "images").is_dir() else data
    found = [item.source for item in find_photos([folder])]
    if not found:
        raise DataError(f"--data {data}: no photos in it")
    return sorted(random.Random(seed).sample(found, min(limit, len(found))))


def _notes(path: Path | None) -> dict[str, Any] | None:
    if path is None:
        return None
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"--notes {path}: not readable as JSON ({error})") from error
    if not isinstance(value, dict):
        raise DataError(f"--notes {path}: a JSON object is expected")
    return value


def _load(where: str) -> Any:
    module, _, name = where.partition(":")
    return getattr(importlib.import_module(module), name)
