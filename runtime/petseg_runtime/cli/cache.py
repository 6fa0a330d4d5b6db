"""``petseg cache``: lists or removes compiled models."""

from __future__ import annotations

import dataclasses
import datetime
import json
from typing import TYPE_CHECKING, Any

import click

from petseg_runtime.cli.text import HELP, SCHEMA_VERSION
from petseg_runtime.text import aligned, counted, shown

if TYPE_CHECKING:
    from petseg_runtime.cache import Entry

__all__ = ["cache"]


@click.command()
@click.option("--clear", is_flag=True, help="Remove all entries.")
@click.option("--json", "as_json", is_flag=True, help=HELP["json"])
def cache(clear: bool, as_json: bool) -> int:
    """List the models that engines compiled at first use, or remove them.

    They are kept in the user's cache folder, or in the folder that the environment variable PETSEG_CACHE names; if the
    variable is empty, nothing is kept. Exit code 6: the folder cannot be read, or not every entry can be removed.
    """
    from petseg_runtime import cache as kept

    folder = kept.cache_folder()
    record: dict[str, Any] = {"schema_version": SCHEMA_VERSION, "folder": None if folder is None else str(folder)}
    if clear:
        count, size = kept.clear()
        record |= {"removed": count, "bytes": size}
        lines = [f"{counted(count, 'file')} removed, {_size(size)}"]
    else:
        found = kept.entries()
        record |= {"bytes": sum(entry.size for entry in found), "entries": [_record(entry) for entry in found]}
        rows = [("model", "compiled for", "device", "size", "age", ""), *map(_row, found)] if found else []
        lines = list(aligned(rows, words=6))
        lines.append(f"{len(found)} {'entry' if len(found) == 1 else 'entries'}, {_size(record['bytes'])}")
    if as_json:
        click.echo(json.dumps(record, indent=2))
        return 0
    why = kept.no_folder() or f"{kept.VARIABLE} is empty"
    lines[-1] += f" in {shown(folder)}" if folder else f": nothing is kept, because {why}"
    click.echo("\n".join(lines))
    return 0


def _record(entry: Entry) -> dict[str, Any]:
    return {**dataclasses.asdict(entry), "path": str(entry.path), "kind": entry.kind}


def _row(entry: Entry) -> tuple[str, ...]:
    """The cells of an entry: model, engine, device, size, age, and what is wrong with it."""
    name = engine = device = "?"
    if key := entry.key:
        # Compiled models are what people expect here; entries of other kinds are labelled.
        what = "" if entry.kind in ("engine", "blob") else f" ({entry.kind})"
        name, engine, device = key.name, f"{key.engine} {key.version.partition('-')[0]}{what}", key.device
    problem = f"will be compiled again: {entry.problem}" if entry.problem else ""
    return tuple(map(shown, (name, engine, device, _size(entry.size), _age(entry.created), problem)))


def _size(size: int) -> str:
    return f"{size / 1e6:.1f} MB"


def _age(created: str, now: datetime.datetime | None = None) -> str:
    """The age of an entry, in the largest unit of which it has at least one; "?" if unknown."""
    if not created:
        return "?"
    now = now or datetime.datetime.now(datetime.UTC)
    seconds = (now - datetime.datetime.fromisoformat(created)).total_seconds()
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds // length:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"
