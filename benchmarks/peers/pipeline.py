"""``python -m benchmarks peers``: a folder of photos to masks, and one photo from a cold start, in petseg and peers.

    python -m benchmarks peers --data data --isnet isnet.onnx

Every figure is of a whole process, run by watch.py, in one session, in alternation: A B C A D E A, round by round,
where A is `petseg infer`. How many times as fast it is is told by its own runs around a contender's, one of them right
beside it: machines change their speed from one minute to the next. Photos are the same; slow contenders take the first
few of them only, and their rate is that from the first mask on the disk to the last, so that the start does not weigh
on them more. The environments are made in ``.venv-peers`` at the first run (about 6 GB, from the package index that pip
is set up for).
"""

from __future__ import annotations

import json
import random
import re
import shutil
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any, Final, TypeAlias

import click

from benchmarks import records
from benchmarks.peers import environments
from benchmarks.peers.contenders import MODELS, PLAIN, Contender, ours, theirs
from benchmarks.photos import of_any_use
from petseg_runtime.sources import find_photos

WATCH: Final = Path(__file__).with_name("watch.py")
PACKAGES: Final = (
    *("petseg", "rembg", "segmentation-models-pytorch", "torch", "torchvision"),
    *("onnxruntime", "openvino", "numpy", "pillow"),
)

#: Contenders from one run of petseg's to its next.
BETWEEN: Final = 2

#: What watch.py says of a process.
Taken: TypeAlias = dict[str, float]


@click.command()
@click.option("--data", type=click.Path(path_type=Path), default=Path("data"), show_default=True)
@click.option("--photos", type=click.IntRange(40), default=300, show_default=True)
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True, help="Over the folder.")
@click.option("--starts", type=click.IntRange(1), default=5, show_default=True, help="Cold starts with one photo.")
@click.option(
    "--isnet", type=click.Path(path_type=Path, exists=True, dir_okay=False), help="See benchmarks.peers.isnet."
)
def peers(data: Path, photos: int, rounds: int, starts: int, isnet: Path | None) -> None:
    """Throughput, start-up, memory and size of petseg beside rembg, smp and torchvision."""
    pythons = {"petseg": environments.petseg_environment(), "peers": environments.peers_environment()}
    make_models(pythons["peers"])
    contenders = [*ours(pythons["petseg"]), *theirs(pythons["peers"], isnet)]
    with tempfile.TemporaryDirectory() as scratch:
        folders = chosen(data, photos, [1, *(count(one, photos) for one in contenders)], Path(scratch))
        results = measured(contenders, folders, photos, rounds, starts)
    installed = {name: environments.packages_of(python) for name, python in pythons.items()}
    rows = [row(one, results[one.name], count(one, photos), installed[one.environment]) for one in contenders]
    command = f"python -m benchmarks peers --data DATA --photos {photos} --rounds {rounds} --starts {starts}"
    values = {
        "photos": photos,
        "between": BETWEEN,
        "environments": {name: versions(packages) for name, packages in installed.items()},
        "rows": with_ratios(rows),
    }
    click.echo(records.write("peers", command + (" --isnet FILE" if isnet else ""), values))


def make_models(python: Path) -> None:
    """The files of the networks with random weights, once for each state of the code that makes them."""
    sources = [Path(__file__).with_name(name) for name in ("networks.py", "u2net.py", "requirements.txt")]
    stamp, wanted = MODELS / "stamp", environments.stamp_of(sources)
    if stamp.exists() and stamp.read_text(encoding="utf-8") == wanted:
        return
    click.echo("making the peers' models ...", err=True)
    subprocess.run([python, "-m", "benchmarks.peers.networks", MODELS], cwd=records.ROOT, check=True)
    stamp.write_text(wanted, encoding="utf-8")


def count(contender: Contender, photos: int) -> int:
    """How many of the photos a contender takes."""
    return max(2, round(photos * contender.share))


def chosen(data: Path, photos: int, counts: Sequence[int], scratch: Path) -> dict[int, Path]:
    """A folder with the first photos for each count; those of one are among those of another.

    Raises:
        SystemExit: There are not so many.
    """
    found = [item.source for item in find_photos(of_any_use(data))]
    if len(found) < photos:
        sys.exit(f"{data}: {len(found)} photos at their own size; {photos} are wanted: give fewer with --photos")
    picked = random.Random(0).sample(found, photos)  # mixed, so that the first few are like the rest
    folders = {}
    for number in set(counts):
        folders[number] = scratch / f"photos-{number}"
        folders[number].mkdir()
        for index, source in enumerate(picked[:number]):
            shutil.copyfile(source, folders[number] / f"{index:04d}{source.suffix}")
    return folders


def measured(
    contenders: Sequence[Contender], folders: Mapping[int, Path], photos: int, rounds: int, starts: int
) -> dict[str, dict[str, list[Taken]]]:
    """Every run of every contender: ``folder`` and ``startup``. The first start of each is not counted.

    The first of them runs before and after each two of the others; these runs are the others' ``folder before``,
    ``folder after``, ``startup before`` and ``startup after``.
    """
    results: dict[str, dict[str, list[Taken]]] = {one.name: defaultdict(list) for one in contenders}

    def run(one: Contender, kind: str) -> Taken:
        taken = watched(one, folders[count(one, photos) if kind == "folder" else 1])
        results[one.name][kind].append(taken)
        click.echo(f"{kind:>7} {one.name}: {taken}", err=True)
        return taken

    first, *others = contenders
    for one in contenders:
        watched(one, folders[1])  # compiles bytecode and kernels, fills the disk cache
    wanted = {"folder": rounds, "startup": starts}
    for number in range(max(rounds, starts)):
        for kind in (kind for kind, times in wanted.items() if number < times):
            beside = run(first, kind)
            for pair in (others[start : start + BETWEEN] for start in range(0, len(others), BETWEEN)):
                for one in pair:
                    results[one.name][f"{kind} before"].append(beside)
                    run(one, kind)
                beside = run(first, kind)
                for one in pair:
                    results[one.name][f"{kind} after"].append(beside)
    return results


def watched(contender: Contender, photos: Path) -> Taken:
    """What one run took.

    Raises:
        SystemExit: It failed, or did not write a mask for each photo.
    """
    with tempfile.TemporaryDirectory() as output:
        command = [sys.executable, "-I", "-S", str(WATCH), *contender.command(photos, Path(output))]
        done = subprocess.run(command, cwd=records.ROOT, capture_output=True, text=True, check=False)
        written = [mask.stat().st_mtime for mask in Path(output).rglob("*.png")]
    wanted = len(list(photos.iterdir()))
    if done.returncode or len(written) != wanted:
        said = f"exit code {done.returncode}, {len(written)} masks of {wanted} photos\n{done.stderr}"
        sys.exit(f"{contender.name}: {said}")
    taken: Taken = json.loads(done.stdout)
    return {**taken, "first_to_last": round(max(written) - min(written), 4)}


def row(
    one: Contender, results: dict[str, list[Taken]], photos: int, packages: environments.Packages
) -> dict[str, Any]:
    """A contender's row of the record."""
    folder, startup = (
        {key: [taken[key] for taken in results[kind]] for key in results[kind][0]} for kind in ("folder", "startup")
    )

    def beside(kind: str, key: str) -> dict[str, list[float]]:
        return {when: [taken[key] for taken in results[f"{kind} {when}"]] for when in ("before", "after")}

    model = {"model_megabytes": round(one.model.stat().st_size / 1e6, 1)} if one.model else {}
    return {
        "name": one.name,
        "how": one.how,
        "engine": one.engine,
        "input": list(one.size),
        "weights": one.weights,
        "folder": {"photos": photos, **folder},
        "first_to_last_of_petseg": beside("folder", "first_to_last"),
        "startup": startup,
        "startup_seconds_of_petseg": beside("startup", "seconds"),
        "installed": {"needs": list(one.needs), **environments.size_of(packages, one.needs), **model},
        "photos_per_second": spread([photos / seconds for seconds in folder["seconds"]]),
        "photos_per_second_once_running": spread(running(folder["first_to_last"], photos)),
        "startup_seconds": spread(startup["seconds"]),
        "memory_mb": spread(folder["memory_mb"]),
    }


def running(first_to_last: Sequence[float], photos: int) -> list[float]:
    """Photos a second from the first mask to the last, whose seconds these are.

    Taking the start with one photo from the whole would do if starts were alike: of a few photos behind a start of four
    seconds it leaves noise. `petseg infer` has read a few photos more by its first mask than a plain loop has.
    """
    return [(photos - 1) / max(seconds, 1e-3) for seconds in first_to_last]


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, smallest, largest."""
    return {"median": round(median(values), 4), "min": round(min(values), 4), "max": round(max(values), 4)}


def with_ratios(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Adds how many times as fast as each row petseg, the first, is: round by round, once running and in starting.

    Its own rate, or time to start, is the mean of those before and after the run of the row. ``loop_once_running``:
    the same of petseg's plain loop in the row's engine, by way of the first row, so that neither the engine nor the
    steps that run beside each other count; None where petseg has no such engine.
    """
    first = rows[0]

    def faster(row: dict[str, Any]) -> list[float]:
        if row is first:
            return [1.0]
        before, after = (running(times, first["folder"]["photos"]) for times in row["first_to_last_of_petseg"].values())
        rates = running(row["folder"]["first_to_last"], row["folder"]["photos"])
        return [(a + b) / 2 / rate for a, b, rate in zip(before, after, rates, strict=True)]

    def sooner(row: dict[str, Any]) -> list[float]:
        if row is first:
            return [1.0]
        before, after = row["startup_seconds_of_petseg"].values()
        return [2 * b / (a + c) for a, b, c in zip(before, row["startup"]["seconds"], after, strict=True)]

    loops = {engine_of(row): faster(row) for row in rows if row["name"].startswith("petseg") and row["how"] == PLAIN}
    for row in rows:
        quicker, loop = faster(row), loops.get(engine_of(row))
        alike = spread([a / b for a, b in zip(quicker, loop, strict=True)]) if loop and row is not first else None
        times = {"once_running": spread(quicker), "startup": spread(sooner(row)), "loop_once_running": alike}
        row["petseg_times_as_fast"] = times
    return rows


def engine_of(row: Mapping[str, Any]) -> str:
    """The engine's name alone, however a row writes it."""
    return re.split(r"\d", str(row["engine"]).lower().replace(" ", ""), maxsplit=1)[0]


def versions(packages: environments.Packages) -> dict[str, str]:
    """Versions of the packages that matter, of those that an environment has."""
    return {name: packages[name]["version"] for name in PACKAGES if name in packages}
