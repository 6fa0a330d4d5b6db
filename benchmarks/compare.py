"""Two records of one benchmark: what became slower, or faster, beyond the noise of both.

Compared are the raw times, wherever a record holds a list of them, by the ratio of their medians and its 95 % interval
(bootstrap, Efron 1979). A change counts if the whole interval lies beyond the tolerance: two records of the same code
should show none. Other machines, or other versions of an engine, are said first.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import click
import numpy as np

#: Keys of lists that hold times.
TIMES: Final = frozenset({"seconds", "milliseconds"})
#: What tells one row of a record from another; where there is a name, that alone (engines' versions change).
LABELS: Final = ("backend", "kind", "engine", "stored", "precision")
RESAMPLES: Final = 4000


@dataclass(frozen=True)
class Change:
    """One list of times in both records.

    Attributes:
        what: Which.
        ratio: Of the medians, new over old: above 1 is slower.
        low: Of the ratio's 95 % interval.
        high: Likewise.
    """

    what: str
    ratio: float
    low: float
    high: float

    def verdict(self, tolerance: float) -> str:
        """``slower``, ``faster``, or nothing: the interval is not beyond the tolerance."""
        if self.low > 1 + tolerance:
            return "slower"
        return "faster" if self.high < 1 / (1 + tolerance) else ""


@click.command()
@click.argument("old", type=click.Path(path_type=Path))
@click.argument("new", type=click.Path(path_type=Path))
@click.option("--tolerance", type=float, default=0.05, show_default=True, help="A smaller change does not matter.")
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
def compare(old: Path, new: Path, tolerance: float, as_json: bool) -> None:
    """Say what NEW, a record, is slower at than OLD. Exit code 1: something is."""
    before, after = (json.loads(path.read_text(encoding="utf-8")) for path in (old, new))
    for line in other_conditions(before, after):
        click.echo(line, err=True)
    changes = changes_of(before, after)
    if not changes:
        sys.exit(f"{old} and {new} have no times in common")
    if as_json:
        rows = [{**vars(change), "verdict": change.verdict(tolerance)} for change in changes]
        click.echo(json.dumps({"schema_version": 1, "tolerance": tolerance, "rows": rows}))
    else:
        for change in changes:
            interval = f"{change.low:.3f} to {change.high:.3f}"
            click.echo(f"{change.ratio:6.3f}  ({interval})  {change.verdict(tolerance):6}  {change.what}")
    if any(change.verdict(tolerance) == "slower" for change in changes):
        sys.exit(1)


def other_conditions(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """What a difference may also come from."""
    return [
        f"{section} {key}: {old.get(section, {}).get(key)} before, {value} now"
        for section in ("machine", "versions")
        for key, value in new.get(section, {}).items()
        if old.get(section, {}).get(key) != value
    ]


def changes_of(old: dict[str, Any], new: dict[str, Any], seed: int = 0) -> list[Change]:
    """Every list of times that both records hold."""
    before, rng = dict(times_in(old)), np.random.default_rng(seed)
    return [
        Change(what, *ratio_of_medians(before[what], times, rng)) for what, times in times_in(new) if what in before
    ]


def times_in(value: Any, where: tuple[str, ...] = ()) -> Iterator[tuple[str, list[float]]]:
    """Each list of two times or more, with the path that leads to it."""
    if isinstance(value, dict):
        keys = ("name",) if "name" in value else LABELS
        label = tuple(value[key] for key in keys if isinstance(value.get(key), str))
        for key, item in value.items():
            yield from times_in(item, (*where, *label, key))
    elif isinstance(value, list) and TIMES & set(where) and len(value) > 1 and all(map(_is_number, value)):
        yield " ".join(where), value
    elif isinstance(value, list):
        for item in value:
            yield from times_in(item, where)


def ratio_of_medians(old: list[float], new: list[float], rng: np.random.Generator) -> tuple[float, float, float]:
    """The ratio, and its 95 % interval."""
    before, after = np.asarray(old), np.asarray(new)
    resampled = [np.median(rng.choice(times, (RESAMPLES, len(times))), axis=1) for times in (before, after)]
    low, high = np.percentile(resampled[1] / resampled[0], (2.5, 97.5))
    return float(np.median(after) / np.median(before)), float(low), float(high)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
