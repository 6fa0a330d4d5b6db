"""``python -m benchmarks peers``: time petseg and its peers on a folder of photos, and on one photo from a cold start.

    python -m benchmarks peers --data data

Every figure is of a complete process, run by watch.py, in one session of alternating runs: A B C A D E A in each round,
where A is `petseg infer`. A speed ratio compares a contender with petseg's runs before and after it, one of them
directly adjacent, because a machine's speed changes from one minute to the next. Both process the very same photos:
slow contenders process the first few, and petseg's runs around theirs process copies of those few, repeated to a folder
of full length. (Photos differ in size, and petseg's rate over ten photos, a fifth of a second, would be noise.) Rates
are measured from the first mask on disk to the last, so that start-up time does not affect them. All but the fastest
peers take part in every second round only. The environments are made in ``.venv-peers`` at the first run (about 6 GB,
from the package index that pip is configured for).
"""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any, Final, TypeAlias

import click
from PIL import Image

from benchmarks import records
from benchmarks.peers import environments
from benchmarks.peers.contenders import MODELS, PLAIN, Contender, engine_of, ours, theirs
from benchmarks.photos import original_size_folders
from petseg_runtime.sources import find_photos

WATCH: Final = Path(__file__).with_name("watch.py")
PACKAGES: Final = (
    *("petseg", "rembg", "segmentation-models-pytorch", "torch", "torchvision"),
    *("onnxruntime", "openvino", "numpy", "pillow"),
)

#: Number of contenders between two runs of petseg.
BETWEEN: Final = 2

#: watch.py's report on a process.
Taken: TypeAlias = dict[str, float]


@click.command()
@click.option("--data", type=click.Path(path_type=Path), default=Path("data"), show_default=True)
@click.option("--photos", type=click.IntRange(20), default=100, show_default=True)
@click.option("--rounds", type=click.IntRange(1), default=9, show_default=True, help="Rounds over the folder.")
@click.option("--starts", type=click.IntRange(1), default=7, show_default=True, help="Cold starts with one photo.")
def peers(data: Path, photos: int, rounds: int, starts: int) -> None:
    """Measure throughput, start-up, memory and size of petseg, rembg, smp and torchvision."""
    pythons = {"petseg": environments.petseg_environment(), "peers": environments.peers_environment()}
    make_models(pythons["peers"])
    contenders = [*ours(pythons["petseg"]), *theirs(pythons["peers"])]
    with tempfile.TemporaryDirectory() as scratch:
        folders = Folders(data, photos, [1, *(count(one, photos) for one in contenders)], Path(scratch))
        results = measured(contenders, folders, rounds, starts)
    installed = {name: environments.packages_of(python) for name, python in pythons.items()}
    rows = [row(one, results[one.name], folders, installed[one.environment]) for one in contenders]
    command = f"python -m benchmarks peers --data DATA --photos {photos} --rounds {rounds} --starts {starts}"
    values = {
        "photos": photos,
        "between": BETWEEN,
        "environments": {name: versions(packages) for name, packages in installed.items()},
        "rows": with_ratios(rows),
    }
    click.echo(records.write("peers", command, values))


def make_models(python: Path) -> None:
    """Make the files of the networks with random weights, unless they are up to date with the code that makes them."""
    sources = [Path(__file__).with_name(name) for name in ("networks.py", "shape.py", "u2net.py", "requirements.txt")]
    stamp, wanted = MODELS / "stamp", environments.stamp_of(sources)
    if stamp.exists() and stamp.read_text(encoding="utf-8") == wanted:
        return
    click.echo("making the peers' models ...", err=True)
    subprocess.run([python, "-m", "benchmarks.peers.networks", MODELS], cwd=records.ROOT, check=True)
    stamp.write_text(wanted, encoding="utf-8")


def count(contender: Contender, photos: int) -> int:
    """The number of photos that a contender processes."""
    return max(2, round(photos * contender.share))


class Folders:
    """Folders with the first photos for each count, and for petseg's runs beside them, the same photos repeated.

    Args:
        data: Folder of the data sets.
        photos: The largest count.
        counts: All counts of photos that a contender processes.
        scratch: Parent of the folders.

    Raises:
        SystemExit: There are not enough photos.
    """

    def __init__(self, data: Path, photos: int, counts: Sequence[int], scratch: Path) -> None:
        found = [item.source for item in find_photos(original_size_folders(data))]
        if len(found) < photos:
            sys.exit(f"{data}: {len(found)} original-size photos, and {photos} are required: lower --photos")
        self.photos = photos
        picked = mixed(random.Random(0).sample(found, photos))
        self._scratch = scratch
        for number in set(counts):
            self._fill(self.of(number), picked[:number])
            if number > 1:
                self._fill(self.beside(number), self.times(number) * picked[:number])

    def of(self, count: int) -> Path:
        """The folder with the first ``count`` photos."""
        return self._scratch / f"photos-{count}"

    def times(self, count: int) -> int:
        """How often petseg processes each of ``count`` photos; a single photo is for cold starts, processed once."""
        return max(1, round(self.photos / count)) if count > 1 else 1

    def beside(self, count: int) -> Path:
        """The folder with the same photos for petseg, repeated to full length, so that all its rates are as steady."""
        times = self.times(count)
        return self.of(count) if times == 1 else self._scratch / f"photos-{count}-times-{times}"

    @staticmethod
    def _fill(folder: Path, photos: Sequence[Path]) -> None:
        if folder.exists():
            return
        folder.mkdir()
        for index, source in enumerate(photos):
            shutil.copyfile(source, folder / f"{index:04d}{source.suffix}")


def mixed(photos: Sequence[Path]) -> list[Path]:
    """Order photos so that the first few cover all sizes: the median, then the quartiles, the octiles, ...

    In random order, the first ten of two hundred had 0.12 megapixels on average, the first hundred 0.18, and all 0.16.
    """
    by_size = sorted(photos, key=pixels)
    bits = (len(photos) - 1).bit_length()
    places = (int(f"{number:0{bits}b}"[::-1], 2) for number in (*range(1, 2**bits), 0))
    return [by_size[place] for place in places if place < len(photos)]


def pixels(photo: Path) -> int:
    """The number of pixels in a photo."""
    with Image.open(photo) as image:
        return image.width * image.height


def measured(
    contenders: Sequence[Contender], folders: Folders, rounds: int, starts: int
) -> dict[str, dict[str, list[Taken]]]:
    """Measure all runs of all contenders, as ``folder`` and ``startup``; the first start of each is a warm-up.

    The first contender, `petseg infer`, runs before and after every two others, on their photos; these runs are the
    others' ``folder before``, ``folder after``, ``startup before`` and ``startup after``. Those on all photos, and all
    start-ups, are also its ``folder`` and ``startup``.
    """
    results: dict[str, dict[str, list[Taken]]] = {one.name: defaultdict(list) for one in contenders}

    def run(one: Contender, kind: str, photos: Path) -> Taken:
        taken = watched(one, photos)
        click.echo(f"{kind:>7} {one.name}, {photos.name}: {taken}", err=True)
        return taken

    first, *others = contenders
    for one in contenders:
        watched(one, folders.of(1))  # warm-up: compiles bytecode and kernels, fills the disk cache
    wanted = {"folder": rounds, "startup": starts}
    for number in range(max(rounds, starts)):
        for kind in (kind for kind, times in wanted.items() if number < times):
            taking_part = [one for one in others if number % one.every == 0]
            for photos, pairs in in_pairs(taking_part, folders.photos if kind == "folder" else None):
                beside = [run(first, kind, folders.beside(photos))]
                for pair in pairs:
                    for one in pair:
                        results[one.name][f"{kind} before"].append(beside[-1])
                        results[one.name][kind].append(run(one, kind, folders.of(photos)))
                    beside.append(run(first, kind, folders.beside(photos)))
                    for one in pair:
                        results[one.name][f"{kind} after"].append(beside[-1])
                if kind == "startup" or photos == folders.photos:
                    results[first.name][kind] += beside
    return results


def in_pairs(contenders: Sequence[Contender], photos: int | None) -> Iterator[tuple[int, list[Sequence[Contender]]]]:
    """For each count of photos (None: one photo for all), its contenders in groups that fit between two petseg runs.

    Plain loops in the same engine are adjacent, because they are also compared with each other.
    """
    alike: dict[int, list[Contender]] = defaultdict(list)
    for one in sorted(contenders, key=lambda one: (one.how != PLAIN, engine_of(one.engine))):
        alike[1 if photos is None else count(one, photos)].append(one)
    for number, group in alike.items():
        yield number, [group[start : start + BETWEEN] for start in range(0, len(group), BETWEEN)]


def watched(contender: Contender, photos: Path) -> Taken:
    """Run a contender, and return what watch.py reports and the seconds from its first mask to its last.

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
    one: Contender, results: dict[str, list[Taken]], folders: Folders, packages: environments.Packages
) -> dict[str, Any]:
    """The row of a contender in the record."""
    photos = count(one, folders.photos)
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
        "photos_of_petseg": {"photos": photos, "times": folders.times(photos)},
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
    """Photos per second, from the seconds between the first mask and the last.

    Subtracting the time of a one-photo run from the total would need constant start times: with a few photos after a
    start of four seconds, it leaves noise. By its first mask, `petseg infer` has read a few more photos than a plain
    loop, at most those in its pipeline's window (eight on two cores); the rate favours it by that reading.
    """
    return [(photos - 1) / max(seconds, 1e-3) for seconds in first_to_last]


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, smallest, largest."""
    return {"median": round(median(values), 4), "min": round(min(values), 4), "max": round(max(values), 4)}


def with_ratios(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Add to each row how many times as fast petseg, the first row, is: per round, once running and in start-up.

    petseg's rate or start-up time is the mean of its runs before and after the row's. ``loop_once_running`` compares
    petseg's plain loop in the row's engine, in the same round, so that neither the engine nor petseg's concurrent steps
    count; None if petseg has no such engine, or its loop processed other photos.
    """
    first = rows[0]

    def faster(row: dict[str, Any]) -> list[float]:
        if row is first:
            return [1.0]
        photos = row["photos_of_petseg"]["photos"] * row["photos_of_petseg"]["times"]
        before, after = (running(times, photos) for times in row["first_to_last_of_petseg"].values())
        rates = running(row["folder"]["first_to_last"], row["folder"]["photos"])
        return [(a + b) / 2 / rate for a, b, rate in zip(before, after, rates, strict=True)]

    def sooner(row: dict[str, Any]) -> list[float]:
        if row is first:
            return [1.0]
        before, after = row["startup_seconds_of_petseg"].values()
        return [2 * b / (a + c) for a, b, c in zip(before, row["startup"]["seconds"], after, strict=True)]

    loops = {engine_of(row["engine"]): row for row in rows if row["name"].startswith("petseg") and row["how"] == PLAIN}
    for row in rows:
        loop = loops.get(engine_of(row["engine"]))
        same = loop is not None and row is not first and loop["photos_of_petseg"] == row["photos_of_petseg"]
        alike = ratios(row["folder"]["first_to_last"], loop["folder"]["first_to_last"]) if loop and same else None
        row["petseg_times_as_fast"] = {
            "once_running": with_rounds(faster(row)),
            "startup": with_rounds(sooner(row)),
            "loop_once_running": alike and with_rounds(alike),
        }
    return rows


def ratios(theirs: Sequence[float], ours: Sequence[float]) -> list[float]:
    """Ratio of their times to ours over the same photos, per round."""
    return [a / b for a, b in zip(theirs, ours, strict=True)]


def with_rounds(each: Sequence[float]) -> dict[str, Any]:
    """Median, smallest and largest ratio, and those of all rounds, which ``compare`` uses."""
    return {**spread(each), "each": [round(ratio, 4) for ratio in each]}


def versions(packages: environments.Packages) -> dict[str, str]:
    """Versions of the relevant packages that an environment has."""
    return {name: packages[name]["version"] for name in PACKAGES if name in packages}
