"""A table of the same figures on every machine that ran ``make bench``, to show which of them hold on all."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import median
from typing import Any, Final, TypeAlias

from benchmarks import records
from benchmarks.compare import gflops

#: A machine's records by name.
Machine: TypeAlias = Mapping[str, Mapping[str, Any]]
#: The records that a column is made from; a missing record leaves its cells empty.
MADE_OF: Final = ("latency", "peers", "video", "accuracy")


def machines() -> str:
    """The table, with a column for each machine; the machine of the other tables comes first."""
    columns = every()
    heads = " | ".join(name_of(column) for column in columns)
    lines = [
        line(what, with_work(what, columns, [tell(column) if needs in column else "" for column in columns]))
        for what, (needs, tell) in SINGLE.items()
    ]
    for what, (needs, several) in SEVERAL.items():
        found = [several(column) if needs in column else {} for column in columns]
        names = dict.fromkeys(name for cells in found for name in cells)
        lines += [line(f"{what} {name}", [cells.get(name, "") for cells in found]) for name in names]
    return "\n".join(
        [
            "Results of `make bench` on two cores each (`make bench RESULTS=benchmarks/results/machines/NAME` adds a "
            "machine); medians; where the work differed between machines, it is given in brackets:",
            "",
            f"| | {heads} |",
            f"|---|{'---|' * len(columns)}",
            *lines,
            *earlier(columns),
        ]
    )


def earlier(columns: Sequence[Machine]) -> list[str]:
    """Lines that name the other machines whose records are of an earlier built-in model; none if there are none."""
    now = records.shipped_model()
    old = [name_of(each) for each in columns[1:] if any(record.get("shipped_model") != now for record in each.values())]
    if not old:
        return []
    return ["", f"With an earlier built-in model (speeds hold, masks differ): {'; '.join(old)}."]


def every() -> list[Machine]:
    """The records of each machine; the machine of the other tables comes first."""
    folders = (records.RESULTS, *records.machines())
    return [
        {name: records.load(name, folder) for name in MADE_OF if (folder / f"{name}.json").exists()}
        for folder in folders
    ]


def name_of(machine: Machine) -> str:
    """A machine's processor, and the date of its records."""
    record = machine[next(iter(machine))]
    return f"{record['machine']['cpu']}, {record['date']}"


def line(what: str, cells: Iterable[str]) -> str:
    """A row of the table."""
    return f"| {what} | {' | '.join(cells)} |"


def with_work(what: str, columns: Sequence[Machine], cells: Sequence[str]) -> list[str]:
    """The cells of a row, each with its workload if the workloads differ."""
    works = [WORK[what](column) if what in WORK else "" for column in columns]
    differ = len(set(filter(None, works))) > 1
    return [f"{cell} ({work})" if differ and work else cell for cell, work in zip(cells, works, strict=True)]


def speed(machine: Machine) -> str:
    """The machine's GFLOP/s in numpy's matmul."""
    found = gflops(machine["latency"])
    return "" if found is None else f"{found:.0f}"


def folder(machine: Machine) -> str:
    """Photos per second, and the engine that was chosen."""
    first = machine["peers"]["rows"][0]
    return f"{first['photos_per_second_once_running']['median']:.0f} ({first['engine']})"


def over_peers(machine: Machine) -> str:
    """How many times as fast as the peers `petseg infer` is on a folder, from the fastest peer to the slowest."""
    rows = peers(machine)
    found = {row["name"]: row["petseg_times_as_fast"]["once_running"]["median"] for row in rows}
    fastest = min(found, key=lambda name: found[name])
    return f"{found[fastest]:.2f} ({fastest}) to {max(found.values()):.0f}"


def with_start(machine: Machine) -> tuple[float, str]:
    """How many times as fast as the fastest peer the whole process is on the same folder, and that peer's name."""
    first, *_ = machine["peers"]["rows"]
    alike = [row for row in peers(machine) if row["folder"]["photos"] == first["folder"]["photos"]]
    fastest = min(alike, key=lambda row: median(row["folder"]["seconds"]))
    return median(fastest["folder"]["seconds"]) / median(first["folder"]["seconds"]), fastest["name"]


def over_peers_with_start(machine: Machine) -> str:
    """:func:`with_start` as a cell."""
    times, name = with_start(machine)
    return f"{times:.2f} ({name})"


def start(machine: Machine) -> str:
    """Seconds of a process for one photo, and those of the fastest peer."""
    own = machine["peers"]["rows"][0]["startup_seconds"]["median"]
    return f"{own:.2f} ({min(median(row['startup']['seconds']) for row in peers(machine)):.2f})"


def overlay(machine: Machine) -> str:
    """Speed of a video in the engine that `auto` chooses, in multiples of real time."""
    return f"{next(row['times_real_time'] for row in machine['video']['rows'] if row['kind'] == 'overlay'):.2f}"


def photos(machine: Machine) -> str:
    """The number of photos in the folder of the peers' record."""
    number = machine.get("peers", {}).get("photos")
    return f"{number} photos" if number else ""


def ways(machine: Machine) -> str:
    """The number of the peers' loops and of the photos in their folder."""
    number = photos(machine)
    return f"{len(peers(machine))} of them, {number}" if number else ""


def frames(machine: Machine) -> str:
    """The number of frames in the clip."""
    number = machine.get("video", {}).get("frames")
    return f"{number} frames" if number else ""


def peers(machine: Machine) -> list[Mapping[str, Any]]:
    """The rows of the peers."""
    return [row for row in machine["peers"]["rows"] if not row["name"].startswith("petseg")]


def alone(machine: Machine) -> dict[str, str]:
    """Milliseconds of the network alone, by engine and computation precision."""
    rows = machine["latency"]["rows"]
    return {
        f"{row['engine'].split()[0]}, {row['precision']}": f"{row['median']:.1f}"
        for row in rows
        if row["stored"] in ("as trained", "fp32", "int8")
    }


def rival(machine: Machine) -> dict[str, str]:
    """How many times as fast as LR-ASPP petseg's network is, the networks alone, measured in turns."""
    rows = machine["accuracy"]["rival_times"]
    return {f"{row['engine'].split()[0]}, {row['precision']}": f"{row['petseg_times_as_fast']:.2f}" for row in rows}


#: The row of :func:`with_start`.
NEAREST: Final = "start included, times as fast as the fastest peer"
#: Rows with a single figure (SINGLE) and with one for each engine (SEVERAL): the record it needs, and the function.
SINGLE: Final[Mapping[str, tuple[str, Callable[[Machine], str]]]] = {
    "numpy's matmul in float32, GFLOP/s": ("latency", speed),
    "`petseg infer` on a folder, photos/s": ("peers", folder),
    "once running, times as fast as the peers on that folder": ("peers", over_peers),
    NEAREST: ("peers", over_peers_with_start),
    "one photo, start included, s (the quickest peer)": ("peers", start),
    "a video to an overlay, start included, times real time": ("video", overlay),
}
SEVERAL: Final[Mapping[str, tuple[str, Callable[[Machine], Mapping[str, str]]]]] = {
    "the network alone, ms:": ("latency", alone),
    "times as fast as LR-ASPP's, alone:": ("accuracy", rival),
}
#: The workload of some single figures, in a few words; "" if the record does not tell it.
WORK: Final[Mapping[str, Callable[[Machine], str]]] = {
    "`petseg infer` on a folder, photos/s": photos,
    "once running, times as fast as the peers on that folder": ways,
    NEAREST: photos,
    "a video to an overlay, start included, times real time": frames,
}
