"""What pages say in sentences with figures in them, of the same records as the tables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from benchmarks import records

#: The still clips of the record of flicker: as a sensor gives them, and as an encoder leaves them.
UNCOMPRESSED: Final = ("noise 3", "noise 8", "noise 16", "exposure +-4 %")
COMPRESSED: Final = {"CRF 28": "noise 8, H.264 crf 28", "CRF 38": "noise 8, H.264 crf 38"}
#: What the first example of training is given: the photos of trainval to train on, and the recipe's epochs.
EXAMPLE_PHOTOS: Final = 3490
EXAMPLE_EPOCHS: Final = 30
#: The row of the record of training that is of that example's network and size.
EXAMPLE_ROW: Final = "width 16"


def cannot() -> str:
    """What a newcomer must know before trusting it."""
    wrong = records.load("found")["report"]
    photos, animals = (f"{100 * wrong[kind]['all']['rate']:.0f} %" for kind in ("photos", "animals"))
    return (
        "**What it cannot do.** It expects one cat or dog that fills much of the photo, and tells neither which of "
        "them it is nor one pet from the next. It also reports a pet in "
        f"[{photos} of photos without any animal, and in {animals} of photos of other animals]"
        "(runtime/README.md#no-pet-here), and where it reports none, its mask need not be empty. It runs on Linux. "
        "It was made on machines without a GPU: **what is for GPUs, from training to TensorRT, is built and tested "
        "against stand-ins, and has never been run on one by us.**"
    )


def smooth() -> str:
    """What ``--smooth`` does to flicker, and to the masks."""
    record = records.load("flicker")
    kinds: Mapping[str, Mapping[str, Any]] = record["report"][str(record["recommended"])]
    easy = [kinds[name]["times_less_flicker"] for name in UNCOMPRESSED]
    pressed = " and ".join(
        f"{kinds[name]['times_less_flicker']:.1f} times at {how}" for how, name in COMPRESSED.items()
    )
    most = max(0.0, *(-kind["iou_points_gained"] for kind in kinds.values()))
    residue = kinds["cut"]["residue"]
    after = (
        f"probabilities after a scene cut differ by {residue:.0f} of 255 at most from those without the scene before"
    )
    still = kinds["all still"]
    return (
        f"`--smooth {record['recommended']}` reduces flicker on still scenes {still['times_less_flicker']:.1f} times: "
        f"{min(easy):.1f} to {max(easy):.1f} times with a sensor's noise or unsteady light, on noisy video compressed "
        f"by H.264 {pressed}. Still scenes' IoU changes by {still['iou_points_gained']:+.2f} points on average; no "
        f"kind of clip, still or moving, loses more than {most:.2f}, and {after} (`benchmarks/results/flicker.json`)."
    )


def training_time() -> str:
    """How long the README's first example of training takes, on each machine that has been measured."""
    others = [folder for folder in records.machines() if (folder / "training.json").exists()]
    times = []
    for record in (records.load("training"), *(records.load("training", folder) for folder in others)):
        row = next((row for row in record["rows"] if row["name"] == EXAMPLE_ROW), None)
        if row is None:  # a GPU's record is of other networks
            continue
        minutes = EXAMPLE_PHOTOS * EXAMPLE_EPOCHS / row["images_per_second"] / 60
        long = f"{minutes / 60:.1f} hours" if minutes > 120 else f"{minutes:.0f} minutes"
        rate, where = f"{row['images_per_second']:.1f} photos a second", record["machine"]
        times.append(f"{long} on {where['cores']} cores of {where['cpu']} ({rate})")
    return (
        f"The first `petseg train` above takes, in steps alone, {', '.join(times)} "
        "([the records](benchmarks/RESULTS.md#speed))."
    )


def fast_decode() -> str:
    """What ``--fast-decode`` gains, and what it costs."""
    record = records.load("reduced-decoding")
    lines = [
        f"`--fast-decode` on {record['photos']} photos of each size (small ones, enlarged), against whole decoding:",
        "",
        "| photos | decoded at a reduced size | read so many times as fast | mask IoU: mean | lowest |",
        "|---|---|---|---|---|",
    ]
    for took in record["milliseconds"]:
        row = next(
            row
            for row in record["agreement"]
            if row["size"] == took["size"] and row["margin"] == record["margin_in_use"]
        )
        if row["reduced"]:
            ious = f"{row['mean_iou']:.3f} | {row['min_iou']:.2f}"
            lines.append(f"| {row['size']} | {row['reduced']} | {took['wall']['ratio']:.1f} | {ious} |")
    return "\n".join(lines)


def no_pet() -> str:
    """How often the rule of ``found`` is wrong."""
    wrong = records.load("found")["report"]
    pets, crops = wrong["pets"], wrong["crops"]["test, 128×128 copies"]
    rows = [
        ("pets, {photos} test photos, 128×128 copies", pets["test, 128×128 copies"], "{rate:.1f} % missed"),
        ("pets, {photos} test photos at their original size", pets["test, original size"], "{rate:.1f} % missed"),
        ("{photos} strips of test photos, beside their pet", crops, "{rate:.1f} % taken for a pet"),
        ("{photos} photos of places, things, people", wrong["photos"]["all"], "{rate:.0f} %"),
        ("{photos} photos of other animals", wrong["animals"]["all"], "{rate:.0f} %"),
    ]
    lines = [f"| {what.format(**found)} | {told.format(rate=100 * found['rate'])} |" for what, found, told in rows]
    return "\n".join(["| | wrong |", "|---|---|", *lines])
