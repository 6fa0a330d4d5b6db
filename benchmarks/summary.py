"""The README's short tables, and where petseg is ahead of others or behind them, from the records."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import median
from typing import Any, Final

from benchmarks import machines, records
from benchmarks.peers.contenders import engine_of
from benchmarks.photos import COPIES, NATIVE, TEST_SETS
from benchmarks.published import CHOSEN, PRETRAINED, PUBLISHED
from benchmarks.tables import few, spread

#: The peers that the README shows; RESULTS.md has all of them.
SHOWN: Final = (
    "petseg, auto",
    "petseg, onnxruntime",
    "petseg, openvino",
    "torchvision lraspp mobilenet_v3_large, OpenVINO",
    "torchvision lraspp mobilenet_v3_large, ONNX Runtime",
    "smp FPN resnet34, OpenVINO",
    "rembg u2netp",
)


#: Short names of the test sets.
SHORT: Final = {TEST_SETS[COPIES]: "the 3000 copies of 128×128", TEST_SETS[NATIVE]: "the 242 original-size photos"}


def quality() -> str:
    """Returns the IoU of the built-in model and of others, each reading at a threshold of its own."""
    record, against, shown = records.load("accuracy"), records.load("rival"), records.load("shown")["sets"]
    taught, by_recipe = records.load("training/width64"), records.load("training/published-cpu")
    published = PUBLISHED["readings"]["background"]
    figures = f"{published['iou']:.4f} | {published['dice']:.4f}"
    lines = [
        "| model | test photos | IoU, border as background | Dice, border as background | IoU, border as pet "
        "| IoU, border ignored |",
        "|---|---|---|---|---|---|",
        f"| published attention U-Net, 29.3 M | 3669, size not given | {figures} | | |",
    ]
    for what, sets in record["rows"][0]["sets"].items():
        ours = {border: sets[kind]["readings"][border] for border, kind in CHOSEN.items()}
        seen = {border: shown[what]["shown"][kind]["readings"][border] for border, kind in CHOSEN.items()}
        lines.append(row("**petseg's built-in model, 1.8 M**", what, ours))
        lines.append(row("**the same, as shown by `petseg infer`**", what, seen))
        for how, wide in {"with a teacher": taught, "by its recipe": by_recipe}.items():
            by_us = wide["tests"][what]["at_thresholds_of_validation"]
            lines.append(row(f"the published network, 29.3 M, trained by us {how}, at 128×128", what, by_us))
        lines.append(row("LR-ASPP MobileNetV3, 3.2 M, trained by us", what, against["sets"][what]["readings"]))
    own = {border: record["thresholds"][kind] for border, kind in CHOSEN.items()}
    chosen = {
        "the built-in model": own,
        "the published network with a teacher": taught["thresholds"],
        "by its recipe": by_recipe["thresholds"],
        "LR-ASPP": against["thresholds"],
    }
    each = "; ".join(
        f"{name} {', '.join(f'{values[border]:.2g}' for border in CHOSEN)}" for name, values in chosen.items()
    )
    return "\n".join([*lines, "", f"Thresholds, for the border as background, as pet, and ignored: {each}."])


def row(name: str, photos: str, readings: dict[str, Any]) -> str:
    """Returns the table row of a model on one set of photos."""
    background = readings["background"]
    rest = " | ".join(f"{readings[border]['iou']:.4f}" for border in ("pet", "ignored"))
    return f"| {name} | {photos} | {background['iou']:.4f} | {background['dice']:.4f} | {rest} |"


def ahead() -> str:
    """Returns where petseg is ahead of others and where it is behind, and by how much."""
    return "\n".join([*in_quality(), *in_speed()])


def in_quality() -> list[str]:
    """Compares with the published network, LR-ASPP, ISNet and the network pretrained on ImageNet."""
    record, against = records.load("accuracy"), records.load("rival")
    first = record["rows"][0]["sets"]
    copies = next(iter(first))
    own = {what: sets["own"]["readings"]["background"] for what, sets in first.items()}
    theirs = {what: against["sets"][what]["readings"]["background"]["iou"] for what in first}
    lead = {what: 100 * (found["iou"] - theirs[what]) for what, found in own.items()}
    published = PUBLISHED["readings"]["background"]["iou"]
    taught, by_recipe = (
        " and ".join(f"{tests[what]['at_thresholds_of_validation']['background']['iou']:.4f}" for what in first)
        for tests in (records.load(f"training/{name}")["tests"] for name in ("width64", "published-cpu"))
    )
    each = "; ".join(
        f"{lead_over(published, found)} on {SHORT.get(what, what)} ({found['iou']:.4f}, 95 % interval "
        f"{found['iou_interval_95'][0]:.3f} to {found['iou_interval_95'][1]:.3f})"
        for what, found in own.items()
    )
    lines = [
        f"- **Against the published network**, 16 times the size, IoU {published:.4f} on all 3669 test photos (input "
        f"size not given): {each}. The published network was trained from scratch; the encoder of petseg's last "
        "teacher was pretrained on ImageNet. Trained by us at 128×128, the same network reaches "
        f"{by_recipe} by its recipe, and {taught} with the built-in model as its teacher.",
        "- **Against LR-ASPP MobileNetV3**: "
        f"{' and '.join(f'{value:+.1f}' for value in lead.values())} points on the two sets. We trained it from random "
        "weights on the same photos, with an earlier built-in model as its teacher, but for a shorter time "
        f"({against['epochs']} epochs) and with a weaker teacher than petseg's; see below.",
    ]
    if record["isnet"]:
        lines.append(isnet(record["isnet"]))
    pet = first[copies]["cutout"]["readings"]["pet"]["iou"]
    least, best = PRETRAINED["readings"]["pet"]["iou"]
    return [
        *lines,
        f"- **Behind {PRETRAINED['name']}**: {pet:.4f} with the border as pet, where its example shows {least:.4f} to "
        f"{best:.4f}.",
    ]


def lead_over(published: float, found: Mapping[str, Any]) -> str:
    """Returns the difference from a published IoU, or that none is shown if the interval contains it."""
    low, high = found["iou_interval_95"]
    return "level" if low <= published <= high else f"{100 * (found['iou'] - published):+.1f} points of IoU"


def isnet(found: Mapping[str, Any]) -> str:
    """Compares with the background remover: intervals, because it was measured on few photos."""
    readings = {"background": "as background", "pet": "as pet", "ignored": "ignored"}
    each = "; ".join(
        f"with the border {how} "
        + " and ".join(
            " to ".join(f"{100 * value:+.1f}" for value in beside["difference"][border]) for beside in found.values()
        )
        for border, how in readings.items()
    )
    sets = " and ".join(f"{len(beside['photos'])} of {SHORT.get(what, what)}" for what, beside in found.items())
    longer = [beside["isnet"]["median"] / beside["petseg"]["median"] for beside in found.values()]
    ours = next(iter(found.values()))["petseg"]
    return (
        f"- **Against ISNet**, a background remover, at its best threshold, on {sets}; 95 % intervals in points: "
        f"{each} (an interval that contains 0 shows no difference). The border as background is the convention of our "
        "labels, not of ISNet, and the copies are enlarged eight times for it. ISNet takes "
        f"{min(longer):.0f} times as long (in ONNX Runtime f32, petseg in {ours['engine'].partition(' ')[0]} "
        f"{ours['precision']})."
    )


def in_speed() -> list[str]:
    """Compares with the peers' whole processes, and with LR-ASPP's network alone."""
    record = records.load("peers")
    rows, columns = record["rows"], machines.every()
    peers = [row for row in rows if not row["name"].startswith("petseg")]
    (first, *_), nearest = rows, min(peers, key=lambda row: faster(row, "once_running"))
    sooner = [row for row in peers if row["petseg_times_as_fast"]["startup"]["median"] < 1]
    smaller = {size_of(row) for row in peers if size_of(row) < size_of(first)}
    times, fastest = machines.with_start(columns[0])
    elsewhere = [f"{machines.with_start(column)[0]:.2f}" for column in columns[1:] if "peers" in column]
    others = f", and {', '.join(elsewhere)} times on the other machines below" if elsewhere else ""
    lines = [
        f"- **Speed in a folder of small photos**: once running, `petseg infer` makes masks "
        f"{faster(nearest, 'once_running'):.2f} times as fast as the nearest of {len(peers)} plain loops over other "
        f"networks ({nearest['name']}), and {max(faster(row, 'once_running') for row in peers):.0f} times as fast as "
        f"the slowest. Start included, it is {times:.2f} times as fast on {record['photos']} photos as the fastest "
        f"loop ({fastest}){others}. It reads, computes and writes in parallel, and compresses PNG files less."
        f"{in_a_plain_loop(peers)}",
        f"- **Speed of the network alone**, relative to LR-ASPP's, on {len(columns)} machines: "
        f"{beside_rival(columns)}.",
    ]
    if sooner:
        quickest = min(median(row["startup"]["seconds"]) for row in sooner)
        lines.append(
            f"- **Behind in starting**: one photo takes {first['startup_seconds']['median']:.2f} s, start included; "
            f"{len(sooner)} of the peers' plain loops take less, the quickest {quickest:.2f} s."
        )
    if smaller:
        lines.append(
            f"- **Behind in size**: {size_of(first):.0f} MB installed with the engine that `auto` chooses; plain loops "
            f"need {min(smaller):.0f} MB or more."
        )
    return lines


def fast() -> str:
    """Returns the speed of petseg as a whole process, beside some of its peers, and on each machine."""
    record = records.load("peers")
    named = {row["name"]: row for row in record["rows"]}
    lines = [
        f"From photos to masks, whole processes on {record['machine']['cores']} cores of {record['machine']['cpu']}: "
        "medians, with the lowest and highest in brackets. The rate in a folder is measured from the first mask to the "
        f"last, over {record['photos']} photos ({few(record)}). Peers (other networks and tools) "
        "run in plain loops, one photo after the other; their weights are random, so only their speed is meaningful.",
        "",
        "| | photos/s in a folder | `petseg infer` is this many times as fast | one photo, start included, s "
        "| memory, MB | installed, MB |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['name']} | {spread(row['photos_per_second_once_running'])} | {faster(row, 'once_running'):.1f} "
        f"| {row['startup_seconds']['median']:.2f} | {row['memory_mb']['median']:.0f} | {size_of(row):.0f} |"
        for row in (named[name] for name in SHOWN if name in named)
    ]
    return "\n".join(
        [
            *(*lines, "", STARTS, "", large_photos(), ""),
            *("Every machine that was measured, the one above first:", "", *by_machine()),
        ]
    )


#: What the column of starts does not contain.
STARTS: Final = (
    "Starts are from the second on: at its first, petseg compiles the model for OpenVINO and keeps the result "
    "(`petseg cache`); the peers' loops compile theirs each time."
)


def large_photos() -> str:
    """Returns how many photos of a camera's size are processed per second, and the size of the results."""
    record = records.load("large")
    each = "; ".join(
        f"{row['name']}: {row['photos_per_second']:.1f} photos/s ({row['megabytes']:.2g} MB each)"
        for row in record["rows"]
    )
    return (
        f"Those photos are small. On photos enlarged to {record['megapixels']:.0f} megapixels (a phone's size, without "
        f"its detail), `petseg infer` reaches these rates on {record['machine']['cores']} cores of "
        f"{record['machine']['cpu']}: "
        f"{each}."
    )


def by_machine() -> list[str]:
    """Returns a table with a column for each machine, the one of the first table first."""
    columns = [machine for machine in machines.every() if {"peers", "latency", "video"} <= machine.keys()]
    alone = [machines.alone(column) for column in columns]
    engines = dict.fromkeys(engine for times in alone for engine in times if "PyTorch" not in engine)
    rows: dict[str, Iterable[str]] = {
        "photos to masks in a folder, photos/s": map(machines.folder, columns),
        "once running, times as fast as the nearest and the farthest peer": map(machines.over_peers, columns),
        machines.NEAREST: map(machines.over_peers_with_start, columns),
        **{f"the network alone, ms: {engine}": [ms.get(engine, "") for ms in alone] for engine in engines},
        f"a video ({columns[0]['video']['clip']}) to an overlay, start included, times real time": map(
            machines.overlay, columns
        ),
    }
    return [
        f"| | {' | '.join(map(machines.name_of, columns))} |",
        f"|---|{'---|' * len(columns)}",
        *(f"| {what} | {' | '.join(cells)} |" for what, cells in rows.items()),
        *machines.earlier(columns),
    ]


def in_a_plain_loop(peers: Sequence[Mapping[str, Any]]) -> str:
    """Compares a plain loop over petseg with the nearest peer in each engine, so that pipelining does not count."""
    of_engines: dict[str, float] = {}
    for row in peers:
        if alike := row["petseg_times_as_fast"].get("loop_once_running"):
            name = engine_of(row["engine"])
            of_engines[name] = min(of_engines.get(name, alike["median"]), alike["median"])
    if not of_engines:
        return ""
    each = ", ".join(f"{times:.2f} in {name}" for name, times in of_engines.items())
    return f" In a plain loop, petseg's speed relative to the fastest peer in the same engine is {each}."


def beside_rival(columns: Sequence[machines.Machine]) -> str:
    """Returns the lowest and the highest ratio to LR-ASPP's speed in each engine, over the machines that have it."""
    found: dict[str, list[float]] = {}
    for column in columns:
        for row in column.get("accuracy", {}).get("rival_times", ()):
            engine = f"{row['engine'].partition(' ')[0]} {row['precision']}"
            found.setdefault(engine, []).append(row["petseg_times_as_fast"])
    return ", ".join(
        f"{min(ratios):.2f} to {max(ratios):.2f} in {engine}"
        + ("" if len(ratios) == len(columns) else f" (on {len(ratios)} of them)")
        for engine, ratios in found.items()
    )


def faster(row: dict[str, Any], kind: str) -> float:
    """Returns how many times as fast as this row `petseg infer` is."""
    return float(row["petseg_times_as_fast"][kind]["median"])


def size_of(row: dict[str, Any]) -> float:
    """Returns the size in MB of the packages that a row needs, without CUDA's libraries."""
    return float(row["installed"]["megabytes"] - row["installed"]["of_these_cuda"])
