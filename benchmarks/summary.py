"""The README's short tables, and who is ahead of whom: all of it said by the records."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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
    """IoU of the embedded model, the published network and the rival, each reading at the threshold chosen for it."""
    record, against, shown = records.load("accuracy"), records.load("rival"), records.load("shown")["sets"]
    published = PUBLISHED["readings"]["background"]
    figures = f"{published['iou']:.4f} | {published['dice']:.4f}"
    at = {border: f"at {record['thresholds'][kind]:.2g}" for border, kind in CHOSEN.items()}
    lines = [
        f"| model | test photos | border as background, {at['background']}: IoU | Dice "
        f"| border as pet, {at['pet']}: IoU | border left out, {at['ignored']}: IoU |",
        "|---|---|---|---|---|---|",
        f"| published attention U-Net, 29.3 M | 3669, size not given | {figures} | | |",
    ]
    for what, sets in record["rows"][0]["sets"].items():
        ours = {border: sets[kind]["readings"][border] for border, kind in CHOSEN.items()}
        seen = {border: shown[what]["shown"][kind]["readings"][border] for border, kind in CHOSEN.items()}
        lines.append(row("**petseg's embedded model, 1.8 M**", what, ours))
        lines.append(row("**what `petseg infer` shows of it**", what, seen))
        lines.append(row("LR-ASPP MobileNetV3, 3.2 M, trained by us", what, against["sets"][what]["readings"]))
    return "\n".join(lines)


def row(name: str, photos: str, readings: dict[str, Any]) -> str:
    """A model on one set of photos."""
    background = readings["background"]
    rest = " | ".join(f"{readings[border]['iou']:.4f}" for border in ("pet", "ignored"))
    return f"| {name} | {photos} | {background['iou']:.4f} | {background['dice']:.4f} | {rest} |"


def ahead() -> str:
    """Where petseg is ahead, where it is behind, and by how much."""
    return "\n".join([*in_quality(), *the_aim(), *in_speed()])


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
        f"- **Published network, 16 times its size** ({published:.4f} on all 3669, of a size not given; trained from "
        f"scratch, where petseg's last teacher knew ImageNet): {each}.",
        "- **LR-ASPP MobileNetV3** trained by us from random weights on the same photos, with an embedded model as its "
        f"teacher ({against['epochs']} epochs; the embedded model had more, and a better teacher): "
        f"{' and '.join(f'{value:+.1f}' for value in lead.values())} points on the two sets; see below.",
    ]
    if record["isnet"]:
        lines.append(isnet(record["isnet"]))
    pet = first[copies]["cutout"]["readings"]["pet"]["iou"]
    least, best = PRETRAINED["readings"]["pet"]["iou"]
    return [
        *lines,
        f"- **Behind {PRETRAINED['name']}**: with the border as pet {pet:.4f}; its example shows {least:.4f} to "
        f"{best:.4f}.",
    ]


def isnet(found: Mapping[str, Any]) -> str:
    """Against the background remover, which sees few photos: intervals."""

    def lead(beside: Mapping[str, Any], border: str) -> str:
        return " to ".join(f"{100 * value:+.1f}" for value in beside["difference"][border])

    each = "; ".join(
        f"on {len(beside['photos'])} of {SHORT.get(what, what)} {lead(beside, 'background')} points, with the border "
        f"left out {lead(beside, 'ignored')}"
        for what, beside in found.items()
    )
    longer = [beside["isnet"]["median"] / beside["petseg"]["median"] for beside in found.values()]
    ours = next(iter(found.values()))["petseg"]
    return (
        f"- **ISNet** (a background remover, at its best threshold), intervals of 95 %: {each}. It takes "
        f"{min(longer):.0f} times as long (in ONNX Runtime f32, petseg in {ours['engine'].partition(' ')[0]} "
        f"{ours['precision']})."
    )


#: Of the mean IoU of an original-size photo, the border left out.
AIM: Final = 0.92


def the_aim() -> list[str]:
    """Whether :data:`AIM` is reached, by what is shown and by the network alone."""
    both = records.load("shown")["sets"][TEST_SETS[NATIVE]]
    alone, seen = (both[kind]["ignored_border"]["readings"]["ignored"]["mean_image_iou"] for kind in ("alone", "shown"))
    what = "the mean IoU of an original-size photo, with the border left out, at the threshold chosen for that"
    if seen < AIM:
        return [f"- **Short of our aim** of {AIM}, {what}: {seen:.4f} ({alone:.4f} of the network alone)."]
    if alone < AIM:
        of_both = f"the network alone has {alone:.4f}, what `petseg infer` shows {seen:.4f}"
        return [f"- **The network alone is short of our aim** of {AIM}, {what}: {of_both}."]
    return []


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
        f"- **Speed, a folder of small photos to masks**: `petseg infer` is {faster(nearest, 'once_running'):.2f} "
        f"times as fast as the nearest of {len(peers)} plain loops over other networks ({nearest['name']}), "
        f"{max(faster(row, 'once_running') for row in peers):.0f} times as fast as the slowest: it reads, computes and "
        f"writes side by side.{plainly(peers)}",
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


def fast() -> str:
    """The embedded model, in whole processes, beside some of its peers."""
    record = records.load("peers")
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
    return "\n".join([*lines, "", of_a_camera(), "", *everywhere()])


def of_a_camera() -> str:
    """How many large photos a second, and what their results take."""
    record = records.load("large")
    each = "; ".join(
        f"{row['name']}: {row['photos_per_second']:.1f} a second, {row['megabytes']:.2g} MB each"
        for row in record["rows"]
    )
    return (
        f"Those photos are small. Of {record['megapixels']:.0f} megapixels, as telephones make them, on "
        f"{record['machine']['cores']} cores of {record['machine']['cpu']}: {each}."
    )


#: The figures of each machine: rows of the README's second table.
OF_MACHINES: Final[Mapping[str, Callable[[machines.Machine], str]]] = {
    "photos to masks in a folder, a second": machines.folder,
    "times as fast as the nearest and the farthest peer": machines.over_peers,
    "the network alone, ms": lambda machine: "; ".join(
        f"{ms} ({engine})" for engine, ms in machines.alone(machine).items() if "PyTorch" not in engine
    ),
    "a video of 1280 × 720 to an overlay, times real time": machines.overlay,
}


def everywhere() -> list[str]:
    """A column for each machine, that of the table above first."""
    columns = [machine for machine in machines.every() if {"peers", "latency", "video"} <= machine.keys()]
    names = [machines.name_of(column) for column in columns]
    return [
        f"| | {' | '.join(names)} |",
        f"|---|{'---|' * len(columns)}",
        *(f"| {what} | {' | '.join(map(tell, columns))} |" for what, tell in OF_MACHINES.items()),
        *machines.earlier(columns),
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
    return f" Without that, in a plain loop of its own, it is this many times as fast as the fastest of theirs: {told}."


def faster(row: dict[str, Any], kind: str) -> float:
    """How many times as fast `petseg infer` is."""
    return float(row["petseg_times_as_fast"][kind]["median"])


def size_of(row: dict[str, Any]) -> float:
    """Megabytes of the packages that a way needs, CUDA's libraries apart."""
    return float(row["installed"]["megabytes"] - row["installed"]["of_these_cuda"])


def iou_of(found: dict[str, Any]) -> float:
    """With the border as background."""
    return float(found["readings"]["background"]["iou"])
