"""Records of one benchmark: what became slower, or faster, beyond the noise.

    python -m benchmarks compare OLD [OLD ...] NEW

Compared are the raw times, wherever a record holds a list of five or more, by the ratio of their medians and its 95 %
interval (bootstrap, Efron 1979). That interval knows the spread within one session. Sessions of the same code differ,
too, on a shared machine by more than a tenth. So several OLD can be given: NEW is slower if it is slower than the
slowest of them, and faster if it is faster than the fastest. A change counts if the whole interval is beyond the
tolerance.

Records of different work (photos, clip, size, threads, ...) are refused; another machine, other versions, another
model or other options are said first. What OLD has and NEW has not counts as slower: what fails takes for ever.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import click
import numpy as np

#: Keys of lists that hold times.
TIMES: Final = frozenset({"seconds", "milliseconds"})
#: What tells one row of a record from another; where there is a name, that alone (engines' versions change).
LABELS: Final = ("backend", "kind", "engine", "stored", "precision")
#: What has to be the same, or times say nothing about each other.
WORK: Final = ("photos", "clip", "frames", "size", "batch", "threads", "batch_at_size", "minutes")
#: What a difference may come from.
CONDITIONS: Final = ("machine", "versions", "shipped_model", "command")
RESAMPLES: Final = 4000
#: Of fewer, an interval is not to be trusted: of two alike sets of two times it parts one in five.
FEWEST: Final = 5
TOO_FEW: Final = f"fewer than {FEWEST} times"


@dataclass(frozen=True)
class Change:
    """One list of times in all records.

    Attributes:
        what: Which.
        ratio: Of the medians, new over old: above 1 is slower.
        low: Of the 95 % interval of the ratio to the slowest OLD.
        high: Of that to the fastest OLD.
        enough: Whether there are enough times for an interval.
    """

    what: str
    ratio: float
    low: float
    high: float
    enough: bool = True

    def verdict(self, tolerance: float) -> str:
        """``slower``, ``faster``, nothing (the interval is not beyond the tolerance), or that it cannot be told."""
        if not self.enough:
            return TOO_FEW
        if self.low > 1 + tolerance:
            return "slower"
        return "faster" if self.high < 1 / (1 + tolerance) else ""


@click.command()
@click.argument("old", type=click.Path(path_type=Path), nargs=-1, required=True)
@click.argument("new", type=click.Path(path_type=Path))
@click.option("--tolerance", type=float, default=0.05, show_default=True, help="A smaller change does not matter.")
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
def compare(old: Sequence[Path], new: Path, tolerance: float, as_json: bool) -> None:
    """Say what NEW, a record, is slower at than every OLD. Exit code 1: something is, or is gone."""
    before, after = [read(path) for path in old], read(new)
    for path, record in zip(old, before, strict=True):
        if other := differences(record, after, WORK):
            sys.exit(f"{path} and {new} are of different work: {'; '.join(other)}")
    for line in dict.fromkeys(line for record in before for line in differences(record, after, CONDITIONS)):
        click.echo(line, err=True)
    changes, gone = changes_of(before, after), gone_from(before, after)
    if not changes:
        sys.exit(f"{', '.join(map(str, old))} and {new} have no times in common")
    if as_json:
        rows = [{**vars(change), "verdict": change.verdict(tolerance)} for change in changes]
        click.echo(json.dumps({"schema_version": 2, "tolerance": tolerance, "rows": rows, "gone": gone}))
    else:
        for change in changes:
            interval = f"{change.low:.3f} to {change.high:.3f}" if change.enough else "?"
            click.echo(f"{change.ratio:6.3f}  ({interval:>14})  {change.verdict(tolerance):6}  {change.what}")
        for what in gone:
            click.echo(f"  gone  {what}")
    if gone or any(change.verdict(tolerance) == "slower" for change in changes):
        sys.exit(1)


def read(path: Path) -> dict[str, Any]:
    """A record.

    Raises:
        SystemExit: The file cannot be read, or is none.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        sys.exit(f"{path}: {error}")
    if not isinstance(record, dict):
        sys.exit(f"{path}: no record of a benchmark")
    return record


def differences(old: Mapping[str, Any], new: Mapping[str, Any], keys: Sequence[str]) -> list[str]:
    """What both records say of some keys, where they do not say the same."""
    found = []
    for key in keys:
        before, now = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(now, dict):
            found += [f"{key} {line}" for line in differences(before, now, list(now))]
        elif _is_plain(before) and _is_plain(now) and before != now:
            found.append(f"{key}: {before} before, {now} now")
    return found


def gone_from(old: Sequence[Mapping[str, Any]], new: Mapping[str, Any]) -> list[str]:
    """The lists of times that every OLD has and NEW has not."""
    there = {what for what, _ in times_in(new)}
    first, *others = [dict.fromkeys(what for what, _ in times_in(record)) for record in old]
    return [what for what in first if what not in there and all(what in other for other in others)]


def changes_of(old: Sequence[Mapping[str, Any]], new: Mapping[str, Any], seed: int = 0) -> list[Change]:
    """Every list of times that all records hold."""
    before, rng = [dict(times_in(record)) for record in old], np.random.default_rng(seed)
    return [
        change_of(what, [times[what] for times in before], now, rng)
        for what, now in times_in(new)
        if all(what in times for times in before)
    ]


def change_of(what: str, old: Sequence[Sequence[float]], new: Sequence[float], rng: np.random.Generator) -> Change:
    """The ratio to all OLD, and how far from 1 it may be at the 95 % level."""
    ratio = float(np.median(new) / np.median([np.median(times) for times in old]))
    enough = min(map(len, (*old, new))) >= FEWEST
    slowest, fastest = (chosen(old, key=np.median) for chosen in (max, min))
    low, high = interval(slowest, new, rng)[0], interval(fastest, new, rng)[1]
    return Change(what, ratio, low, high, enough)


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


def interval(old: Sequence[float], new: Sequence[float], rng: np.random.Generator) -> tuple[float, float]:
    """The 95 % interval of the ratio of medians, new over old."""
    resampled = [np.median(rng.choice(times, (RESAMPLES, len(times))), axis=1) for times in (old, new)]
    low, high = np.percentile(resampled[1] / resampled[0], (2.5, 97.5))
    return float(low), float(high)


def _is_plain(value: Any) -> bool:
    """Whether it is a value, or a list of values, and no table of results."""
    values = value if isinstance(value, list) else [value]
    return all(isinstance(one, str | int | float) for one in values)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
