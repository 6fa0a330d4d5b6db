"""Compare records of one benchmark, or folders of records: what became slower or faster beyond the noise.

    python -m benchmarks compare OLD [OLD ...] NEW

The raw times are compared wherever a record holds a list of five or more, by the ratio of their medians and its 95 %
interval (bootstrap, Efron 1979). That interval covers only the spread within one session. On a shared machine, sessions
of the same code differ by more than a tenth, so several OLD can be given: NEW is slower if it is slower than the
slowest of them, and faster if it is faster than the fastest. A change counts if the whole interval lies beyond the
tolerance.

Ratios that were measured side by side (times as fast as PyTorch, as a plain loop, as a peer) should repeat in every
session, however fast the machine is at the moment. Where a record holds the ratio of each round, it is judged like
times: lost if it is smaller than the smallest OLD and its whole interval lies beyond the tolerance. The end of the
output says how many ratios and how many times repeated, and how many of both could not be judged.

Records of different work (photos, clip, size, threads, ...) are not compared. Differences in machine (also its speed by
the matmul in each record), versions, model or options are printed first. A time or ratio that every OLD has and NEW
lacks counts as slower: what fails takes forever. In folders, records are compared by name; those of different work are
skipped and reported, and so are those that are missing from NEW.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeAlias

import click
import numpy as np

from petseg_runtime.files import write_atomic

Record: TypeAlias = dict[str, Any]
#: The records of a folder by name; the record of a single file has the name "".
Records: TypeAlias = dict[str, Record]
#: Keys of lists that hold times.
TIMES: Final = frozenset({"seconds", "milliseconds", "first_to_last"})
#: Keys of ratios (a number, a list or a table of them) whose two sides were measured in turns.
RATIOS: Final = frozenset(
    {
        "times_faster_than_pytorch",
        "share_of_matmul_peak",
        "ratio_to_loop",
        "share_of_allowed",
        "petseg_times_as_fast",
        "times_as_fast_as_loop",
        "times_as_fast_as_one_thread",
    }
)
#: In a ratio with its spread: the key of the list of each round's ratio, and all keys of the spread.
EACH: Final = "each"
SPREAD: Final = frozenset({"min", "max", EACH})
#: Keys that identify a row of a record if it has no ``name``. Versions in their values are ignored: they change.
LABELS: Final = ("backend", "kind", "engine", "stored", "precision", "device", "curve")
#: Keys that must be equal, or else times cannot be compared.
WORK: Final = ("photos", "clip", "frames", "size", "batch", "threads", "batch_at_size", "minutes")
#: Keys that may explain a difference.
CONDITIONS: Final = ("machine", "versions", "shipped_model", "command")
#: The machine's speed when the record was made, which is never quite the same.
CALIBRATION: Final = "calibration"
RESAMPLES: Final = 4000
#: With fewer times an interval is unreliable: with two on each side, one in five finds a difference that is not there.
FEWEST: Final = 5
TOO_FEW: Final = f"fewer than {FEWEST} times"
#: How far apart two figures, or two speeds of the machine, may be to count as repeated.
ALIKE: Final = 0.1


@dataclass(frozen=True)
class Figure:
    """A figure that all records hold.

    Attributes:
        what: Its path in the record.
        ratio: New over old; for times, the ratio of the medians: above 1 is slower.
    """

    what: str
    ratio: float


@dataclass(frozen=True)
class Change(Figure):
    """One list of times.

    Attributes:
        low: Lower bound of the 95 % interval of the ratio to the slowest OLD.
        high: Upper bound of the 95 % interval of the ratio to the fastest OLD.
        enough: Whether there are enough times for an interval.
        old: Median (of the medians), minimum and maximum of all OLD.
        new: The same for NEW.
    """

    low: float
    high: float
    enough: bool
    old: dict[str, float]
    new: dict[str, float]

    def verdict(self, tolerance: float) -> str:
        """Return ``slower``, ``faster``, "" (the interval is within the tolerance), or :data:`TOO_FEW`."""
        if not self.enough:
            return TOO_FEW
        if self.low > 1 + tolerance:
            return "slower"
        return "faster" if self.high < 1 / (1 + tolerance) else ""


@dataclass(frozen=True)
class Ratio(Figure):
    """A ratio that was measured side by side.

    Attributes:
        old: The median of all OLD.
        new: The ratio in NEW.
        high: Upper bound of the 95 % interval of the ratio to the smallest OLD; None: a record has too few rounds.
    """

    old: float
    new: float
    high: float | None = None

    def verdict(self, tolerance: float) -> str:
        """Return ``lost``, "" or :data:`TOO_FEW`."""
        if self.high is None:
            return TOO_FEW
        return "lost" if self.high < 1 / (1 + tolerance) else ""


@dataclass(frozen=True)
class Comparison:
    """The whole comparison.

    Attributes:
        changes: Times.
        ratios: Ratios that were measured side by side.
        gone: Times and ratios that NEW lacks.
        said: Differences in conditions, to be printed first.
        refused: Records of different work, with the reason.
    """

    changes: list[Change]
    ratios: list[Ratio]
    gone: list[str]
    said: list[str]
    refused: list[str]

    def fails(self, tolerance: float) -> bool:
        """Return whether NEW is slower, has lost a ratio, lacks a figure, or has a record of different work."""
        slower = any(change.verdict(tolerance) == "slower" for change in self.changes)
        lost = any(ratio.verdict(tolerance) == "lost" for ratio in self.ratios)
        return slower or lost or bool(self.gone or self.refused)


@click.command()
@click.argument("old", type=click.Path(path_type=Path), nargs=-1, required=True)
@click.argument("new", type=click.Path(path_type=Path))
@click.option("--tolerance", type=float, default=0.05, show_default=True, help="Ignore changes smaller than this.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--output", type=click.Path(path_type=Path), help="Also write the JSON to this file.")
def compare(old: Sequence[Path], new: Path, tolerance: float, as_json: bool, output: Path | None) -> None:
    """Report what is slower in NEW, a record or a folder of records, than in every OLD.

    The exit code is 1 if something is slower, missing or of different work.
    """
    before, after = [read(path) for path in old], read(new)
    if other := [path for path in old if path.is_dir() is not new.is_dir()]:
        folder, record = (new, other[0]) if new.is_dir() else (other[0], new)
        sys.exit(f"{folder} is a folder, {record} a record; compare a folder with folders, or a record with records")
    found = comparison(before, after)
    if not found.changes and not found.ratios:
        why = "; ".join(found.refused) or "no times in common"
        sys.exit(f"{', '.join(map(str, old))} and {new}: {why}")
    for line in (*(f"skipped: {why}" for why in found.refused), *found.said):
        click.echo(line, err=True)
    answer = as_record(found, tolerance)
    if output:
        names = " ".join(path.name for path in (*old, new))
        command = f"python -m benchmarks compare {names} --tolerance {tolerance:g}"
        about = {"command": command, "sessions": [session(records) for records in (*before, after)]}
        write_atomic(output, (json.dumps({**about, **answer}, indent=1) + "\n").encode())
    for line in [json.dumps(answer)] if as_json else table(found, tolerance):
        click.echo(line)
    if found.fails(tolerance):
        sys.exit(1)


# What is compared


def read(path: Path) -> Records:
    """Read a record, or all records of a folder.

    Raises:
        SystemExit: A file cannot be read, or is not a record.
    """
    if path.is_dir():
        return {file.stem: one for file in sorted(path.glob("*.json")) for one in read(file).values()}
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        sys.exit(f"{path}: {error}")
    if not isinstance(record, dict):
        sys.exit(f"{path}: not a record of a benchmark")
    return {"": record}


def comparison(old: Sequence[Records], new: Records) -> Comparison:
    """Compare each record of NEW with those of the same name in OLD."""
    said: dict[str, None] = {}
    refused = {}
    for name, after in new.items():
        before = [records[name] for records in old if name in records]
        if other := [line for record in before for line in differences(record, after, WORK)]:
            refused[name] = f"{f'{name} ' if name else ''}of different work: {'; '.join(dict.fromkeys(other))}"
            continue
        for record in before:
            said |= dict.fromkeys([*differences(record, after, CONDITIONS), *own_speed(name, record, after)])
    missing = {name for records in old for name in records} - new.keys()
    if missing:
        said[f"not in NEW: {', '.join(sorted(missing))}"] = None
    kept_old, kept_new = [without(records, {*refused, *missing}) for records in old], without(new, refused)
    changes, ratios = changes_of(kept_old, kept_new), ratios_of(kept_old, kept_new)
    return Comparison(changes, ratios, missing_from(kept_old, kept_new), list(said), list(refused.values()))


def without(records: Records, names: Container[str]) -> Records:
    """Return the records except those of some names."""
    return {name: record for name, record in records.items() if name not in names}


def differences(old: Mapping[str, Any], new: Mapping[str, Any], keys: Sequence[str]) -> list[str]:
    """Return a line for each of the keys whose values differ between two records."""
    found = []
    for key in keys:
        before, now = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(now, dict):
            inner = [name for name in now if name != CALIBRATION]
            found += [f"{key} {line}" for line in differences(before, now, inner)]
        elif _is_plain(before) and _is_plain(now) and before != now:
            found.append(f"{key}: {before} before, {now} now")
    return found


def own_speed(name: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Return a line if the machine itself was slower or faster at its matmul when the record was made."""
    before, now = gflops(old), gflops(new)
    if not before or not now or alike(now / before):
        return []
    change = f"{100 * abs(now / before - 1):.0f} % {'slower' if now < before else 'faster'}"
    return [f"{f'{name}: ' if name else ''}the machine itself is {change}: {before:.0f} GFLOP/s before, {now:.0f} now"]


def gflops(record: Mapping[str, Any]) -> float | None:
    """Return the machine's speed when the record was made; None: an older record, without it."""
    value = record.get("machine", {}).get(CALIBRATION, {}).get("gflops")
    return float(value) if _is_number(value) else None


def alike(ratio: float) -> bool:
    """Return whether two figures with this ratio are within :data:`ALIKE` of each other."""
    return ratio > 0 and max(ratio, 1 / ratio) <= 1 + ALIKE


def missing_from(old: Sequence[Mapping[str, Any]], new: Mapping[str, Any]) -> list[str]:
    """Return the times and ratios that every OLD has and NEW lacks."""

    def figures(record: Mapping[str, Any]) -> dict[str, None]:
        return dict.fromkeys([*dict(times_in(record)), *dict(ratios_in(record))])

    there = figures(new)
    first, *others = map(figures, old)
    return [what for what in first if what not in there and all(what in other for other in others)]


def changes_of(old: Sequence[Mapping[str, Any]], new: Mapping[str, Any]) -> list[Change]:
    """Compare every list of times that all records hold."""
    before, rng = [dict(times_in(record)) for record in old], np.random.default_rng(0)
    return [
        change_of(what, [times[what] for times in before], now, rng)
        for what, now in times_in(new)
        if all(what in times for times in before)
    ]


def change_of(what: str, old: Sequence[Sequence[float]], new: Sequence[float], rng: np.random.Generator) -> Change:
    """Return the ratio of NEW to all OLD, with its 95 % bounds."""
    before, now = spread(old), spread([new])
    enough = min(map(len, (*old, new))) >= FEWEST
    slowest, fastest = (chosen(old, key=np.median) for chosen in (max, min))
    low, high = interval(slowest, new, rng)[0], interval(fastest, new, rng)[1]
    return Change(what, now["median"] / before["median"], low, high, enough, before, now)


def spread(sessions: Sequence[Sequence[float]]) -> dict[str, float]:
    """Return the median (of the sessions' medians), the minimum and the maximum."""
    every = np.concatenate(sessions)
    middle = float(np.median([np.median(times) for times in sessions]))
    return {"median": middle, "min": float(every.min()), "max": float(every.max())}


def ratios_of(old: Sequence[Mapping[str, Any]], new: Mapping[str, Any]) -> list[Ratio]:
    """Compare every ratio that all records hold, except those that are 1 because a side is compared with itself."""
    rng, rounds = np.random.default_rng(0), [dict(rounds_in(record)) for record in (*old, new)]
    before = [dict(ratios_in(record)) for record in old]
    common = {what: now for what, now in ratios_in(new) if all(found.get(what) for found in before)}
    middle = {what: float(np.median([found[what] for found in before])) for what in common}
    real = {what: now for what, now in common.items() if not now == middle[what] == 1}
    return [
        Ratio(what, now / middle[what], middle[what], now, highest([found.get(what, ()) for found in rounds], rng))
        for what, now in real.items()
    ]


def highest(rounds: Sequence[Sequence[float]], rng: np.random.Generator) -> float | None:
    """Return the upper 95 % bound of NEW's ratio over the smallest OLD's; None: too few rounds.

    Args:
        rounds: The ratio's value in each round, for each OLD and, last, for NEW.
        rng: For the bootstrap.
    """
    if min(map(len, rounds)) < FEWEST:
        return None
    *before, now = rounds
    smallest = min(before, key=np.median)
    return interval(smallest, now, rng)[1]


def times_in(value: Any) -> Iterator[tuple[str, list[float]]]:
    """Yield each list of two or more positive times with its path; the span of a single photo, 0 s, is not a time."""
    for where, numbers in numbers_in(value):
        if TIMES & set(where) and len(numbers) > 1 and min(numbers) > 0:
            yield " ".join(where), numbers


def ratios_in(value: Any) -> Iterator[tuple[str, float]]:
    """Yield each ratio that was measured in turns, with its path and, in a list, its position."""
    for where, numbers in numbers_in(value):
        if RATIOS & set(where) and where[-1] not in SPREAD:
            for place, number in enumerate(numbers, start=1):
                yield " ".join([*where, str(place)] if len(numbers) > 1 else where), number


def rounds_in(value: Any) -> Iterator[tuple[str, list[float]]]:
    """Yield the rounds of each ratio that has them, with the path of the ratio."""
    for where, numbers in numbers_in(value):
        *there, last = where
        if last == EACH and RATIOS & set(there):
            yield " ".join([*there, "median"]), numbers
        elif last.removesuffix(f"_{EACH}") in RATIOS:
            yield " ".join([*there, last.removesuffix(f"_{EACH}")]), numbers


def numbers_in(value: Any, where: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], list[float]]]:
    """Yield each list of numbers, and each number as a list of one, with the keys and labels of its path."""
    if isinstance(value, dict):
        keys = ("name",) if "name" in value else LABELS
        label = tuple(without_version(value[key]) for key in keys if isinstance(value.get(key), str))
        for key, item in value.items():
            yield from numbers_in(item, tuple(filter(None, (*where, *label, key))))
    elif isinstance(value, list) and value and all(map(_is_number, value)):
        yield where, value
    elif isinstance(value, list):
        for item in value:
            yield from numbers_in(item, where)
    elif _is_number(value):
        yield where, [value]


def without_version(label: str) -> str:
    """Remove versions (``onnxruntime 1.32.0, f32``), which have two dots or more; "width 64" and "at 1.5" stay."""
    return re.sub(r"(?<=\w) \d+(\.\d+){2,}\b", "", label)


def interval(old: Sequence[float], new: Sequence[float], rng: np.random.Generator) -> tuple[float, float]:
    """Return the 95 % interval of the ratio of medians, new over old."""
    resampled = [np.median(rng.choice(times, (RESAMPLES, len(times))), axis=1) for times in (old, new)]
    low, high = np.percentile(resampled[1] / resampled[0], (2.5, 97.5))
    return float(low), float(high)


def _is_plain(value: Any) -> bool:
    """Return whether a value is a scalar or a list of scalars, not a table of results."""
    values = value if isinstance(value, list) else [value]
    return all(isinstance(one, str | int | float) for one in values)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


# Output


def as_record(found: Comparison, tolerance: float) -> dict[str, Any]:
    """Return the comparison as JSON values; the summary counts the times and the ratios that repeated."""
    return {
        "schema_version": 2,
        "tolerance": tolerance,
        "said": found.said,
        "refused": found.refused,
        "summary": {
            name: {**repeated(rows), "not_judged": sum(row.verdict(tolerance) == TOO_FEW for row in rows)}
            for name, rows in (("times", found.changes), ("ratios", found.ratios))
        },
        "rows": [{**vars(change), "verdict": change.verdict(tolerance)} for change in found.changes],
        "ratios": [{**vars(ratio), "verdict": ratio.verdict(tolerance)} for ratio in found.ratios],
        "gone": found.gone,
    }


def repeated(rows: Sequence[Figure]) -> dict[str, Any]:
    """Count the figures within a tenth (:data:`ALIKE`) of the earlier one, and name the one farthest from it."""
    worst = max(rows, key=lambda row: abs(np.log(row.ratio)), default=None)
    return {
        "within": ALIKE,
        "alike": sum(alike(row.ratio) for row in rows),
        "of": len(rows),
        "worst": {"what": worst.what, "ratio": worst.ratio} if worst else None,
    }


def table(found: Comparison, tolerance: float) -> Iterator[str]:
    """Yield the lines of the console output; ratios only if they did not repeat or are lost."""
    for change in found.changes:
        between = f"{change.low:.3f} to {change.high:.3f}" if change.enough else "?"
        yield f"{change.ratio:6.3f}  ({between:>14})  {change.verdict(tolerance):6}  {change.what}"
    for what in found.gone:
        yield f"  gone  {what}"
    if found.ratios:
        for ratio in found.ratios:
            lost = ratio.verdict(tolerance) == "lost"
            if lost or not alike(ratio.ratio):
                about = f"side by side{', lost' if lost else ''}: {ratio.old:.3g} before, {ratio.new:.3g} now"
                yield f"{ratio.ratio:6.3f}  {about}  {ratio.what}"
        yield f"times: {in_words(found.changes)}"
        yield f"ratios that were measured side by side: {in_words(found.ratios)}"
    every: list[Change | Ratio] = [*found.changes, *found.ratios]
    if unknown := sum(row.verdict(tolerance) == TOO_FEW for row in every):
        yield f"{unknown} of {len(every)} figures could not be judged: {TOO_FEW}, or no values of single rounds"


def in_words(rows: Sequence[Figure]) -> str:
    """Return a sentence: how many figures repeated, and which is the worst."""
    found = repeated(rows)
    worst = f"; the worst: {found['worst']['ratio']:.3f}, {found['worst']['what']}" if found["worst"] else ""
    return f"{found['alike']} of {found['of']} within {100 * ALIKE:.0f} % of each other{worst}"


def session(records: Records) -> dict[str, Any]:
    """Return the dates, commits and CPUs of one session's records, and the machine's speed."""
    about: dict[str, Any] = {}
    for name, values in (
        ("dates", [record.get("date") for record in records.values()]),
        ("commits", [record.get("commit") for record in records.values()]),
        ("cpus", [record.get("machine", {}).get("cpu") for record in records.values()]),
    ):
        about[name] = sorted({value for value in values if value})
    speeds = [speed for record in records.values() if (speed := gflops(record))]
    return {**about, "gflops": [min(speeds), max(speeds)] if speeds else None}
