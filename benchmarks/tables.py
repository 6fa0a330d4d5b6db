"""The tables of ``benchmarks/RESULTS.md``: everything that was measured, a function for each section."""

from __future__ import annotations

import re
from collections.abc import Sequence
from statistics import median
from typing import Any, Final

from benchmarks import records
from benchmarks.published import CHOSEN, ELSEWHERE, PUBLISHED


def accuracy() -> str:
    """The embedded model in the three readings of the border, beside the published network."""
    published = PUBLISHED["readings"]["background"]
    figures = " | ".join(f"{published[metric]:.4f}" for metric in ("iou", "dice", "accuracy", "precision", "recall"))
    lines = [
        "| | border counts as | IoU | Dice | pixel accuracy | precision | recall | mean IoU per photo |",
        "|---|---|---|---|---|---|---|---|",
        f"| {PUBLISHED['name']}; {PUBLISHED['data']} | background | {figures} | |",
    ]
    for name in ("embedded-test-128", "embedded-test-native"):
        record = records.load(name)
        own, lower = record["metrics"], record["metrics_at_threshold_for_ignored_border"]
        rows = [(own, border) for border in own["readings"]] + [(lower, "ignored")]
        for metrics, border in rows:
            values = metrics["readings"][border]
            cells = " | ".join(
                f"{values[metric]:.4f}"
                for metric in ("iou", "dice", "accuracy", "precision", "recall", "mean_image_iou")
            )
            what = f"embedded model, 1.8 M, threshold {metrics['threshold']:.2f}; {record['data']}"
            lines.append(f"| {what} | {border} | {cells} |")
    engine = record["model"]["engine"]
    return "\n".join([*lines, "", f"Computed by {engine}. {draws(records.load('accuracy'))}"])


def shown() -> str:
    """What leaving doubtful regions out gains, and the numbers of its rule beside others."""
    record = records.load("shown")
    heads = " | ".join(f"{said}: IoU, mean of photos" for said in ("as background", "as pet", "left out"))
    lines = [f"| photos | | {heads} | photos better and worse by a point |", "|---|---|---|---|---|---|"]
    for what, found in record["sets"].items():
        changed = f"{found['better']}, {found['worse']}"
        lines.append(f"| {what} | all that the network says | {_pairs(found['alone'])} | |")
        lines.append(f"| | without what is doubtful | {_pairs(found['shown'])} | {changed} |")
    of_choice = record["validation"]
    about = f"{of_choice['photos']} validation photos"
    for name, found in of_choice.items():
        if name != "photos":
            said = {"alone": "all that the network says", "shown": "**without what is doubtful**"}.get(name, name)
            lines.append(f"| {about} | {said} | {_pairs(found)} | |")
            about = ""
    return "\n".join(lines)


def _pairs(found: dict[str, Any]) -> str:
    """Of each reading, at the threshold that was chosen for it, the IoU and the mean of the photos' own."""
    readings = [found[kind]["readings"][border] for border, kind in CHOSEN.items()]
    return " | ".join(f"{values['iou']:.4f}, {values['mean_image_iou']:.4f}" for values in readings)


def draws(record: dict[str, Any]) -> str:
    """How far the first row of each set is from certain."""
    row = record["rows"][0]
    told = [f"{within(found['own']['readings']['background'])} on the {what}" for what, found in row["sets"].items()]
    return f"What other draws of photos would give, 95 %, border as background, {row['name']}: {'; '.join(told)}."


def engines() -> str:
    """What each engine and precision really costs: IoU, and how many points that is from the checkpoint's."""
    record = records.load("accuracy")
    compared = record.get("compared", record)  # older records have every engine on all photos
    heads = [f"set {number}: {border}" for number, _ in enumerate(compared["photos"], 1) for border in CHOSEN]
    sets = ". ".join(
        f"Set {number}: {f'{photos} of the ' if photos < record['photos'][what] else ''}{what}"
        for number, (what, photos) in enumerate(compared["photos"].items(), 1)
    )
    thresholds = ", ".join(f"{border}: {record['thresholds'][CHOSEN[border]]:.2g}" for border in CHOSEN)
    lines = [
        "The same file, and its int8 export, in each CPU engine: IoU, and in points how far that is from the "
        f"checkpoint in PyTorch; each reading of the border at the threshold that was chosen for it ({thresholds}; "
        f"`python -m benchmarks accuracy`). {sets}.",
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
    """Others, measured by us on photos that petseg is measured on, too; and figures that others published."""
    record, against = records.load("accuracy"), records.load("rival")
    parts = [
        rival(record, against),
        alike(records.load("budget")) if (records.RESULTS / "budget.json").exists() else "",
        isnet(record["isnet"]) if record["isnet"] else "",
        published(ELSEWHERE),
    ]
    return "\n\n".join(part for part in parts if part)


def rival(record: dict[str, Any], against: dict[str, Any]) -> str:
    """LR-ASPP from scratch by the same trainer, beside the embedded model: all photos of each set."""
    lines = [
        f"{against['name']}, {against['parameters'] / 1e6:.1f} M parameters, from scratch by petseg's trainer, "
        f"{against['epochs']} epochs ({against['hours']:.1f} h of steps), teacher: {against['teacher'] or 'none'}; all "
        "photos of each set, thresholds chosen on the same validation photos:",
        "",
        "| model | photos | border background | pet | ignored |",
        "|---|---|---|---|---|",
    ]
    for what in record["photos"]:
        first = record["rows"][0]["sets"][what]
        own = [within(first[kind]["readings"][border]) for border, kind in CHOSEN.items()]
        theirs = [against["sets"][what]["readings"][border]["iou"] for border in CHOSEN]
        lines += [other("petseg's embedded model", what, own), other("LR-ASPP", what, theirs)]
    each = [
        f"{row['engine'].partition(' ')[0]} {row['precision']}: {median(row['petseg_milliseconds']):.2f} against "
        f"{row['median']:.2f} ms, {row['petseg_times_as_fast']:.2f} times as fast"
        for row in record["rival_times"]
    ]
    return "\n".join([*lines, "", f"The networks alone, in turns, petseg against LR-ASPP: {'; '.join(each)}."])


def alike(record: dict[str, Any]) -> str:
    """The two networks after the same short training."""
    side, what = f"{record['size'][0]} × {record['size'][1]}", list(record["networks"][0]["sets"])
    lines = [
        f"The two networks trained alike from random weights, {record['epochs']} epochs at {side}, no teacher, one "
        "seed, with the settings of the edge network's recipe (`python -m benchmarks budget`): IoU, border as "
        "background:",
        "",
        f"| network | M parameters | an epoch's steps, s | validation photos | {' | '.join(what)} |",
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
    """A background remover beside the embedded model, on the same few photos."""
    lines = [
        "ISNet, with its own weights, is a background remover, not trained on these labels: its threshold is 0.5, or "
        "the best on these very photos. A few photos of each set, the same for both. In brackets what 95 % of other "
        "draws of photos would give. Times are of the network alone, one photo at a time, on the CPU:",
        "",
        "| model | photos | ms a photo | border background | pet | ignored |",
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
        lines.append(other("petseg less ISNet at its best threshold, 95 %", f"{photos} |", points))
    return "\n".join(lines)


def published(elsewhere: Sequence[dict[str, Any]]) -> str:
    """Figures that we have not measured with this program."""
    lines = [
        "Figures of others, as they give them:",
        "",
        "| model | photos | border background | pet | ignored |",
        "|---|---|---|---|---|",
    ]
    for found in elsewhere:
        ious = [found["readings"].get(border, {}).get("iou") for border in CHOSEN]
        lines.append(other(f"{found['name']} ({found['source']})", found["data"], ious))
    return "\n".join(lines)


def other(name: str, photos: str, ious: Sequence[Any]) -> str:
    """A row; an IoU may be missing, a list of the least and the best, or a text."""
    cells = [iou if isinstance(iou, str) else " to ".join(f"{value:.4f}" for value in numbers(iou)) for iou in ious]
    return f"| {name} | {photos} | {' | '.join(cells)} |"


def numbers(iou: Any) -> list[float]:
    """None, a number or a list of them as a list."""
    return [] if iou is None else iou if isinstance(iou, list) else [iou]


def within(values: dict[str, Any]) -> str:
    """An IoU with its interval."""
    low, high = values["iou_interval_95"]
    return f"{values['iou']:.4f} ({low:.3f} to {high:.3f})"


#: The formats, as people write them.
FORMATS: Final = {"Onnx": "ONNX", "OpenVINO": "OpenVINO", "TensorRTRTX": "TensorRT for RTX"}


def receipts() -> str:
    """Every export of the embedded model, in every engine that ran it."""
    return receipts_of(records.load("receipts-edge"))


def receipts_wide() -> str:
    """Likewise of a network of the published shape."""
    return receipts_of(records.load("receipts-width64"))


def receipts_of(record: dict[str, Any]) -> str:
    """A table for one checkpoint."""
    lines = [
        f"**{record['about'] or record['shipped_model']}**, {record['photos']} original-size test photos:",
        "",
        "| file | MB | engine, computed in | difference max, mean, p99 (of 255) | mask IoU min, mean | task IoU |",
        "|---|---|---|---|---|---|",
    ]
    for export in record["exports"]:
        what = f"| {FORMATS[export['format']]} {export['precision']} | {export['bytes'] / 1e6:.1f} |"
        if not export["receipt"]["rows"]:
            lines.append(f"{what} built, not run | | | |")
        lines += [f"{what} {receipt_row(row)}" for row in export["receipt"]["rows"]]
    return "\n".join(lines)


def receipt_row(row: dict[str, Any]) -> str:
    """The columns of one engine."""
    engine, version = row["engine"].split()[:2]
    between = re.search(r", (\w+) between the int8 layers", row["engine"])
    computed = row["precision"] + (f" and {between[1]}" if between else "")
    task = f"{row['task']['this']:.4f} ({0.0 - round(row['task']['loss'], 2):+.2f} points)" if row["task"] else ""
    return (
        f"{engine} {version}, {computed} | {row['max_difference']}, {row['mean_difference']:.3f}, "
        f"{row['p99_difference']} | {row['min_mask_iou']:.4f}, {row['mean_mask_iou']:.4f} | {task} |"
    )


def latency() -> str:
    """One photo at a time in every engine; other sizes and batches."""
    record = records.load("latency")
    height, width = record["size"]
    lines = [
        f"{record['model']}, one photo of {height} × {width} at a time, {record['threads']} threads of "
        f"{record['machine']['cpu']}; medians of rounds in alternation (`python -m benchmarks latency`):",
        "",
        "| engine | file | computes in | ms | times as fast as PyTorch | p95, p99 ms (runs) | of a matmul's speed "
        "| from file to first answer, ms | memory, MB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {engine_of(row)} | {row['stored']} | {row['precision']} | {row['median']:.2f} "
        f"| {'' if (faster := row['times_faster_than_pytorch']) is None else f'{faster:.1f}'} |{engine_alone(row)}"
        for row in record["rows"]
    ]
    beside = BESIDE_THE_TIME.format(percentiles=record["percentiles"])
    return "\n".join([*lines, "", beside, "", *relatives(record)])


def folders() -> str:
    """`petseg infer FOLDER` against its own steps and a plain loop."""
    record = records.load("throughput")
    lines = [
        f"`petseg infer FOLDER` on {record['photos']} photos, from the first result on the disk to the last. Allowed: "
        "what the slowest step alone reaches, or the cores over the CPU time of all steps, whichever is less "
        "(`python -m benchmarks throughput`):",
        "",
        "| engine | writes | photos/s | of what is allowed | a plain loop in the same engine | times as fast "
        "| with the start: photos/s |",
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
    """`petseg infer FOLDER` on photos of a camera's size."""
    record = records.load("large")
    lines = [
        f"`petseg infer FOLDER` on {record['photos']} photos of {record['megapixels']:.0f} megapixels (small ones, "
        f"enlarged), from the first result to the last, {record['machine']['cores']} cores of "
        f"{record['machine']['cpu']} (`python -m benchmarks large`):",
        "",
        "| writes | photos/s | MB a photo |",
        "|---|---|---|",
    ]
    lines += [f"| {row['name']} | {row['photos_per_second']:.1f} | {row['megabytes']:.2f} |" for row in record["rows"]]
    return "\n".join(lines)


#: What the columns of the first table mean.
BESIDE_THE_TIME: Final = (
    "Of a matmul's speed: the network's multiplications at the rate of the machine's fastest 1024 × 1024 matmul "
    "(8192 × 8192 on a GPU) in the same precision and the same minutes, over its time; that is a yardstick, which a "
    "wide convolution can pass. Percentiles are {percentiles}. First answer and memory are those of a process that has "
    "imported the library."
)


def scaling() -> str:
    """Where the curves of cost bend."""
    record = records.load("scaling")
    lines = ["More pixels, photos and minutes (`python -m benchmarks scaling`), cost by size and by batch:", ""]
    lines += [f"- {curve['name']}: {curve['bend']['statement']}." for curve in record["curves"]]
    for gain in record["threads"]:
        ratios = gain["times_as_fast_as_one_thread"]
        lines.append(f"- {gain['curve']}: {min(ratios):.2f} to {max(ratios):.2f} times as fast as 1 thread.")
    memory = record["memory"]
    return "\n".join([*lines, f"- Memory of a whole `petseg infer CLIP` ({memory['clip']}) is {memory['statement']}."])


def training() -> str:
    """How fast `petseg train` is."""
    lines = [
        "`petseg train` (`python -m benchmarks training`):",
        "",
        "| network | size | batch | on | in | photos/s (lowest, highest) | waiting for data |",
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
    """The engine, and what it computes on where that is no CPU; older records know nothing else."""
    device = row.get("device", "cpu")
    return str(row["engine"]) + (f" on {device}" if device != "cpu" else "")


def engine_alone(row: dict[str, Any]) -> str:
    """The other columns of an engine: how its times spread, its share of the peak, its start, its memory."""
    share, start = row["share_of_matmul_peak"], row["load_ms"] + row["first_run_ms"]
    of_peak = f"{100 * share:.0f} %" if share else ""
    spread = ", ".join(f"{row[name]:.2f}" for name in ("p95", "p99") if row[name] is not None)
    spread += f" ({row['runs']})" if spread else ""
    return f" {spread} | {of_peak} | {start:.0f} | {row['memory_mb']:.0f} |"


def relatives(latency: dict[str, Any]) -> list[str]:
    """The other networks and batches: milliseconds a run, and the share of the matmul peak."""
    groups = [latency, *latency["networks"]]
    found = [{(engine_of(r), r["stored"], r["precision"]): r for r in group["rows"]} for group in groups]
    heads = []
    for group in groups:
        name, (height, width) = group["model"].removeprefix("attention U-Net, "), group["size"]
        work = group["operations"] / 1e9
        heads.append(f"{name}, {height} × {width}, batch {group['batch']} ({work:.1f} GFLOP)")
    lines = [
        "Other sizes of the family, and several photos at a time: ms a run, and the share of a matmul's speed; weights "
        "of networks that do not ship are random.",
        "",
        f"| engine | file | computes in | {' | '.join(heads)} |",
        f"|---|---|---|{'---|' * len(heads)}",
    ]
    for key in dict.fromkeys(key for rows in found for key in rows):
        cells = [milliseconds(rows[key]) if key in rows else "" for rows in found]
        lines.append(f"| {' | '.join((*key, *cells))} |")
    return lines


def milliseconds(row: dict[str, Any]) -> str:
    """A median, and its share of the peak where there is one."""
    share = row["share_of_matmul_peak"]
    return f"{row['median']:.1f}" + (f" ({100 * share:.0f} %)" if share else "")


def peers() -> str:
    """Whole processes of petseg and of its peers, on the same photos, in turns."""
    record = records.load("peers")
    but_one = ", but for ISNet's" if any("isnet" in row["name"] for row in record["rows"]) else ""
    others = "every other one" if record.get("between", 1) == 1 else f"every {record['between']} others"
    lines = [
        f"A folder of {record['photos']} photos to masks ({few(record)}), and one photo from a start "
        "with files in the disk's cache, and OpenVINO's compiled model in petseg's: whole processes in turns, "
        f"`petseg infer` before and after {others}, on "
        f"{record['machine']['cores']} cores of {record['machine']['cpu']} (`python -m benchmarks peers`). Peers are "
        "called in a plain loop, one photo after the other, as their pages show it; `petseg infer` reads, computes and "
        "writes beside each other, and packs PNG with zlib's quickest level, where the loops leave that to Pillow; "
        "petseg's own plain loop shows what both are worth. Rates are from the first mask "
        "to the last; medians, lowest and highest. Memory is the most that the process held. Installed: the packages "
        f"that this way needs, CUDA's libraries apart. Weights of peers are random, good for speed only{but_one}:",
        "",
        "| | network's input | photos/s | `petseg infer` is N times as fast: N | petseg's plain loop in the same "
        "engine is N times as fast: N | start, s | memory, MB | installed, MB |",
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
    """What slow peers take in place of a whole folder."""
    fewer = sorted({row["folder"]["photos"] for row in record["rows"]} - {record["photos"]}, reverse=True)
    if not fewer:
        return "all of them the same"
    return f"slow ones take the first {' or '.join(map(str, fewer))}, and petseg beside them the same, several times"


def title(row: dict[str, Any]) -> str:
    """A peer's name, and the engine's where the name does not hold it."""
    name, engine = str(row["name"]), str(row["engine"]).partition(",")[0]
    return name if engine in name else f"{name} ({engine})"


def spread(rate: dict[str, float]) -> str:
    """A median, with the lowest and the highest."""
    digits = 0 if rate["median"] >= 20 else 1 if rate["median"] >= 1 else 2
    middle, low, high = (f"{rate[name]:.{digits}f}" for name in ("median", "min", "max"))
    return f"{middle} ({low} to {high})"


def video() -> str:
    """A clip through the whole command, and through plain loops."""
    clip = records.load("video")
    machine = clip["machine"]
    steps = ("decode", "convert", "infer", "finish", "write")
    lines = [
        f"A clip of {clip['clip']}, `petseg infer CLIP`, the whole process on {machine['cores']} cores of "
        f"{machine['cpu']}; medians of {rounds_of(clip['rows'])} rounds in alternation; the steps run beside "
        "each other, in ms per frame, median and 99th percentile (`python -m benchmarks video`):",
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
        "The same clip to the same overlay in plain loops, PyAV and one frame after the other (weights of peers are "
        "random, for speed only):",
        "",
        "| | frames/s | `petseg infer` in the same engine is N times as fast: N |",
        "|---|---|---|",
    ]
    lines += [
        f"| {row['name']} | {row['frames_per_second']:.0f} | {row['petseg_times_as_fast']:.2f} |"
        for row in clip["loops"]
    ]
    return "\n".join(lines)


def rounds_of(rows: Sequence[dict[str, Any]]) -> str:
    """How many rounds each row has; the first may have more than others."""
    return " to ".join(map(str, sorted({len(row["seconds"]) for row in rows})))


def live() -> str:
    """Live sources that break, for half an hour."""
    record = records.load("soak")
    frames = [source["frames"] for source in record["sources"]]
    rss = record["memory"]["rss_mb"]
    whole = all(source["accounted"] and source["all_in_files"] for source in record["sources"])
    return (
        f"Live sources (RTSP, UDP, HTTP at once, {record['minutes']:.0f} minutes, overlays in pieces): "
        f"{record['disconnects']} disconnects, {record['changes_of_size']} changes of size, "
        f"{100 * record['packet_loss']:.0f} % of UDP's packets lost, one silence of {record['frozen_seconds']:.0f} s: "
        f"{sum(f['decoded'] for f in frames)} frames decoded, {sum(f['delivered'] for f in frames)} written, "
        f"{sum(f['dropped'] for f in frames)} dropped for want of time, {sum(f['failed'] for f in frames)} failed, "
        f"{'all' if whole else 'not all'} accounted for; memory {rss['after_warm_up']:.0f} MB after "
        f"{record['memory']['warm_up_seconds'] / 60:.0f} minutes, {rss['at_the_end']:.0f} MB at the end "
        "(`python -m benchmarks soak`)."
    )
