"""Sentences, lists and small tables with measured figures for the pages, made from the same records as the tables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from benchmarks import records
from benchmarks.published import CHOSEN

#: Kinds of still clips in the flicker record: uncompressed, and compressed by H.264.
UNCOMPRESSED: Final = ("noise 3", "noise 8", "noise 16", "exposure +-4 %")
COMPRESSED: Final = {"CRF 28": "noise 8, H.264 crf 28", "CRF 38": "noise 8, H.264 crf 38"}
#: The README's first training example: photos of trainval that are trained on, and epochs of the recipe.
EXAMPLE_PHOTOS: Final = 3490
EXAMPLE_EPOCHS: Final = 30
#: The row of the training record that has this example's network and size.
EXAMPLE_ROW: Final = "width 16"


def cannot() -> str:
    """Returns what users must know about its limits before they trust petseg."""
    wrong = records.load("found")["report"]
    photos, animals = (
        f"{100 * found['rate']:.0f} % of {found['photos']} photos"
        for found in (wrong[kind]["all"] for kind in ("photos", "animals"))
    )
    return (
        "**Limits.** petseg expects one cat or dog that fills much of the photo. It does not tell cats from dogs, and "
        f"it does not separate one pet from another. It also reports a pet in [{photos} without any animal and in "
        f"{animals} of other animals](runtime/README.md#no-pet-here); where it reports none, the mask need not be "
        "empty. It runs on Linux, and in WSL on Windows; macOS was not tried. It was developed on machines without a "
        "GPU: **everything for GPUs, from training to TensorRT, is built and tested against stand-ins, and has never "
        "been run on a GPU by us.**"
    )


def smooth() -> str:
    """Returns what ``--smooth`` gains in flicker and costs in IoU."""
    record = records.load("flicker")
    kinds: Mapping[str, Mapping[str, Any]] = record["report"][str(record["recommended"])]
    easy = [kinds[name]["times_less_flicker"] for name in UNCOMPRESSED]
    compressed = " and ".join(
        f"{kinds[name]['times_less_flicker']:.1f} times at {how}" for how, name in COMPRESSED.items()
    )
    largest_loss = max(0.0, *(-kind["iou_points_gained"] for kind in kinds.values()))
    still, residue = kinds["all still"], kinds["cut"]["residue"]
    after_a_cut = (
        f"differ from the unsmoothed ones by at most {residue:.1f} of 255, averaged over the clips"
        if residue
        else "equal the unsmoothed ones"
    )
    slower = record["report"][f"10/s, {record['recommended']}"]["all still"]["times_less_flicker"]
    rate = record["frames_per_second"]
    return (
        f"On clips of a second, made from {record['scenes_of_each_half']} test photos, `--smooth "
        f"{record['recommended']}` reduces flicker in still scenes {still['times_less_flicker']:.1f} times at {rate} "
        f"frames/s and {slower:.1f} times at 10. At {rate}, that is {min(easy):.1f} to {max(easy):.1f} times with "
        f"sensor noise or unsteady light, and on noisy video compressed with H.264 {compressed}. The IoU of still "
        f"scenes changes by {still['iou_points_gained']:+.2f} points on average, and no kind of clip, still or moving, "
        f"loses more than {largest_loss:.2f}. In the first frame after a scene cut, probabilities {after_a_cut} "
        "(`benchmarks/results/flicker.json`)."
    )


def training_time() -> str:
    """Returns how long the README's first training example takes on each machine that was measured."""
    others = [folder for folder in records.machines() if (folder / "training.json").exists()]
    lines = [
        "Time that the steps of the first `petseg train` above take, estimated from the speed of a few steps of the "
        "same network ([records](benchmarks/RESULTS.md#training)):",
        "",
    ]
    for record in (records.load("training"), *(records.load("training", folder) for folder in others)):
        row = next((row for row in record["rows"] if row["name"] == EXAMPLE_ROW), None)
        if row is None:  # records made on a GPU have other networks
            continue
        minutes = EXAMPLE_PHOTOS * EXAMPLE_EPOCHS / row["images_per_second"] / 60
        duration = f"{minutes / 60:.1f} hours" if minutes > 120 else f"{minutes:.0f} minutes"
        where, rate = record["machine"], f"{row['images_per_second']:.1f} photos/s"
        lines.append(f"- {duration} on {where['cores']} cores of {where['cpu']} ({rate})")
    return "\n".join(lines)


def fast_decode() -> str:
    """Returns what ``--fast-decode`` gains in time and costs in mask IoU."""
    record = records.load("reduced-decoding")
    lines = [
        f"`--fast-decode` compared with full decoding, on {record['photos']} photos of each size (enlarged from small "
        "ones):",
        "",
        "| size | photos decoded at a reduced size | times as fast to read | mean mask IoU | lowest mask IoU |",
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
    """Returns how often the rule behind ``found`` is wrong."""
    wrong = records.load("found")["report"]
    pets, crops = wrong["pets"], wrong["crops"]["test, 128×128 copies"]
    rows = [
        ("pets, {photos} test photos, 128×128 copies", pets["test, 128×128 copies"], "missed"),
        ("pets, {photos} test photos at their original size", pets["test, original size"], "missed"),
        ("{photos} strips of test photos beside the pet", crops, "reported as a pet"),
        ("{photos} photos of places, things, people", wrong["photos"]["all"], "reported as a pet"),
        ("{photos} photos of other animals", wrong["animals"]["all"], "reported as a pet"),
    ]
    lines = [
        f"| {what.format(**found)} | {_percent(found['rate'])} % {error} "
        f"({' to '.join(map(_percent, found['interval_95']))}) |"
        for what, found, error in rows
    ]
    return "\n".join(["| photos | wrong answers (95 % interval) |", "|---|---|", *lines])


def _percent(share: float) -> str:
    """Returns a share in per cent, with a decimal if it is small."""
    return f"{100 * share:.{1 if share < 0.1 else 0}f}"


def card() -> str:
    """Returns the built-in model's quality for its card, the only page in the wheel."""
    record = records.load("accuracy")
    each = []
    for what, kinds in record["rows"][0]["sets"].items():
        found = {border: kinds[kind]["readings"][border] for border, kind in CHOSEN.items()}
        each.append(
            f"on {what}, IoU {found['background']['iou']:.3f} and Dice {found['background']['dice']:.3f} with the "
            f"border as background, IoU {found['pet']['iou']:.3f} as pet, and {found['ignored']['iou']:.3f} ignored"
        )
    wrong = records.load("found")["report"]
    photos, animals = (f"{100 * wrong[kind]['all']['rate']:.0f} %" for kind in ("photos", "animals"))
    return (
        f"**Quality:** {'; '.join(each)}, each reading at the threshold chosen for it on validation photos. It reports "
        f"a pet in {photos} of photos without any animal, and in {animals} of photos of other animals."
    )
