"""The README's short tables, and who is ahead of whom: all of it said by the records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any, Final

from benchmarks import machines, records
from benchmarks.peers.contenders import engine_of
from benchmarks.photos import COPIES, NATIVE, TEST_SETS
from benchmarks.published import CHOSEN, PRETRAINED, PUBLISHED
from benchmarks.tables import few, is_unfair, spread

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
    """IoU of the embedded model, the published network and the rival, each reading at the threshold chosen for it."""
    record, against = records.load("accuracy"), records.load("rival")
    published = PUBLISHED["readings"]["background"]
    figures = f"{published['iou']:.4f} | {published['dice']:.4f}"
    at = {border: f"at {record['thresholds'][kind]:.2f}" for border, kind in CHOSEN.items()}
    lines = [
        f"| model | test photos | border as background, {at['background']}: IoU | Dice "
        f"| border as pet, {at['pet']}: IoU | border left out, {at['ignored']}: IoU |",
        "|---|---|---|---|---|---|",
        f"| published attention U-Net, 29.3 M | 3669, size not given | {figures} | | |",
    ]
    for what, sets in record["rows"][0]["sets"].items():
        ours = {border: sets[kind]["readings"][border] for border, kind in CHOSEN.items()}
        lines.append(row("**petseg's embedded model, 1.8 M**", what, ours))
        lines.append(row("LR-ASPP MobileNetV3, 3.2 M, trained by us", what, against["sets"][what]["readings"]))
    return "\n".join(lines)


def row(name: str, photos: str, readings: dict[str, Any]) -> str:
    """A model on one set of photos."""
    background = readings["background"]
    rest = " | ".join(f"{readings[border]['iou']:.4f}" for border in ("pet", "ignored"))
    return f"| {name} | {photos} | {background['iou']:.4f} | {background['dice']:.4f} | {rest} |"


def ahead() -> str:
    """Where petseg is ahead, where it is behind, and by how much."""
    return "\n".join([*in_quality(), *short_of_our_aim(), *in_speed()])


def in_quality() -> list[str]:
    """Against the published network, the rival, the background remover and the pretrained network."""
    record, against = records.load("accuracy"), records.load("rival")
    first = record["rows"][0]["sets"]
    copies = next(iter(first))
    own = {what: sets["own"]["readings"]["background"] for what, sets in first.items()}
    lead = {
        what: 100 * (sets["own"]["readings"]["background"]["iou"] - iou_of(against["sets"][what]))
        for what, sets in first.items()
    }
    published = PUBLISHED["readings"]["background"]["iou"]
    each = "; ".join(
        f"{100 * (found['iou'] - published):+.1f} points of IoU on {SHORT.get(what, what)} ({found['iou']:.4f}, 95 %: "
        f"{found['iou_interval_95'][0]:.3f} to {found['iou_interval_95'][1]:.3f})"
        for what, found in own.items()
    )
    lines = [
        f"- **Published network, 16 times its size** ({published:.4f} on all 3669, of a size not given): {each}.",
        "- **LR-ASPP MobileNetV3** trained by us from random weights on the same photos, with an embedded model as its "
        f"teacher ({against['epochs']} epochs; the embedded model had more): "
        f"{' and '.join(f'{value:+.1f}' for value in lead.values())} points on the two sets; see below.",
    ]
    for what, beside in (record["isnet"] or {}).items():
        low, high = beside["difference"]["background"]
        left_out = " to ".join(f"{100 * value:+.1f}" for value in beside["difference"]["ignored"])
        longer = beside["isnet"]["median"] / beside["petseg"]["median"]
        lines.append(
            f"- **ISNet** (a background remover, at the threshold best for it) on {len(beside['photos'])} of "
            f"{SHORT.get(what, what)}: {100 * low:+.1f} to {100 * high:+.1f} points (95 %), "
            f"with the border left out {left_out}; it takes {longer:.0f} times as long (in ONNX Runtime f32, "
            f"petseg in {beside['petseg']['engine'].partition(' ')[0]} {beside['petseg']['precision']})."
        )
    pet = first[copies]["cutout"]["readings"]["pet"]["iou"]
    least, best = PRETRAINED["readings"]["pet"]["iou"]
    return [
        *lines,
        f"- **Behind {PRETRAINED['name']}**: with the border as pet {pet:.4f}; its example shows {least:.4f} to "
        f"{best:.4f}.",
    ]


#: Of the mean IoU of an original-size photo, the border left out.
AIM: Final = 0.92


def short_of_our_aim() -> list[str]:
    """Likewise."""
    reached = records.load("embedded-test-native")["metrics_at_threshold_for_ignored_border"]
    iou = reached["readings"]["ignored"]["mean_image_iou"]
    if iou >= AIM:
        return []
    what = "with the border left out, at the threshold chosen for that, the mean IoU of an original-size photo"
    return [f"- **Short of our aim**: {what} is {iou:.4f}, not {AIM}."]


def in_speed() -> list[str]:
    """Against the peers' whole processes, and the rival's network alone."""
    rows = records.load("peers")["rows"]
    peers = [row for row in rows if not row["name"].startswith("petseg")]
    (first, *_), nearest = rows, min(peers, key=lambda row: faster(row, "once_running"))
    sooner = [row for row in peers if row["petseg_times_as_fast"]["startup"]["median"] < 1]
    smaller = {size_of(row) for row in peers if size_of(row) < size_of(first)}
    each = [
        f"{row['petseg_times_as_fast']:.2f} in {row['engine'].partition(' ')[0]} {row['precision']}"
        for row in records.load("accuracy")["rival_times"]
    ]
    lines = [
        f"- **Folders of photos to masks**: `petseg infer` is {faster(nearest, 'once_running'):.2f} to "
        f"{max(faster(row, 'once_running') for row in peers):.0f} times as fast as each of {len(peers)} ways to run a "
        f"peer, each a plain loop; the next is {nearest['name']}.{plainly(peers)}",
        f"- **The network alone** against LR-ASPP's, times as fast: {', '.join(each)}.",
    ]
    if sooner:
        quickest = min(median(row["startup"]["seconds"]) for row in sooner)
        lines.append(
            f"- **Behind in starting**: one photo takes {first['startup_seconds']['median']:.2f} s; {len(sooner)} of "
            f"the peers' plain loops take less, the quickest {quickest:.2f} s."
        )
    if smaller:
        lines.append(
            f"- **Behind in size**: {size_of(first):.0f} MB installed with the engine that is chosen, where plain "
            f"loops need {min(smaller):.0f} MB or more."
        )
    return lines


#: Of records that were made before; see benchmarks/LOG.md.
FAVOURED: Final = (
    "These ratios favour petseg: its photos were others than those of its nearest peers (by 6 %), and masks of random "
    "weights were noise, which smp's and U²-Net's loops took 5 to 15 ms a photo to write. In newer records all take "
    "the same photos, and masks are as smooth as real ones."
)


def fast() -> str:
    """The embedded model, in whole processes, beside some of its peers."""
    record, clip = records.load("peers"), records.load("video")
    named = {row["name"]: row for row in record["rows"]}
    lines = [
        f"Photos to masks, whole processes on {record['machine']['cores']} cores of {record['machine']['cpu']}; "
        f"medians, lowest and highest; a folder's rate is from the first mask to the last ({record['photos']} photos; "
        f"{few(record)}); peers are plain loops, and their weights are random, good for speed only:",
        "",
        "| | photos/s in a folder | `petseg infer` is N times as fast: N | one photo from a cold start, s | memory, MB "
        "| installed, MB |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['name']} | {spread(row['photos_per_second_once_running'])} | {faster(row, 'once_running'):.1f} "
        f"| {row['startup_seconds']['median']:.2f} | {row['memory_mb']['median']:.0f} | {size_of(row):.0f} |"
        for row in (named[name] for name in SHOWN if name in named)
    ]
    alone = ", ".join(
        f"{row['median']:.1f} ms in {row['engine']} ({row['precision']})"
        for row in records.load("latency")["rows"]
        if row["stored"] == "fp32" and row.get("device", "cpu") == "cpu"
    )
    overlay = next(row for row in clip["rows"] if row["kind"] == "overlay")
    return "\n".join(
        [
            *lines,
            "",
            f"The network alone, one photo: {alone}. A clip of {clip['clip']}, to an overlay with `petseg infer`: "
            f"{overlay['times_real_time']:.2f} times real time.",
            *([f"\n{FAVOURED}"] if is_unfair(record) else []),
            *elsewhere(),
        ]
    )


def elsewhere() -> list[str]:
    """The machines beside the one of the table, a line each."""
    return [
        f"\nThe same on {machines.name_of(machine)}: {machines.folder(machine)} photos/s in a folder, "
        f"{machines.over_peers(machine)} times as fast as the peers; the network alone "
        f"{', '.join(f'{ms} ms in {engine}' for engine, ms in machines.alone(machine).items())}."
        + plainly(machines.peers(machine))
        + (f" {FAVOURED}" if is_unfair(machine["peers"]) else "")
        for machine in machines.every()[1:]
        if {"peers", "latency"} <= machine.keys()
    ]


def plainly(peers: Sequence[Mapping[str, Any]]) -> str:
    """How a plain loop of petseg's compares with the nearest peer of each engine: neither threads nor files count."""
    of_engines: dict[str, float] = {}
    for row in peers:
        if alike := row["petseg_times_as_fast"].get("loop_once_running"):
            name = engine_of(row["engine"])
            of_engines[name] = min(of_engines.get(name, alike["median"]), alike["median"])
    if not of_engines:
        return ""
    told = ", ".join(f"{times:.2f} in {name}" for name, times in of_engines.items())
    return f" Petseg's own plain loop against the fastest of theirs in the same engine, times as fast: {told}."


def faster(row: dict[str, Any], kind: str) -> float:
    """How many times as fast `petseg infer` is."""
    return float(row["petseg_times_as_fast"][kind]["median"])


def size_of(row: dict[str, Any]) -> float:
    """Megabytes of the packages that a way needs, CUDA's libraries apart."""
    return float(row["installed"]["megabytes"] - row["installed"]["of_these_cuda"])


def iou_of(found: dict[str, Any]) -> float:
    """With the border as background."""
    return float(found["readings"]["background"]["iou"])
