"""The README's tables and plots, made from the records; ``--check`` fails where they have drifted apart."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from typing import Any, Final

import click

from benchmarks import records

README = records.ROOT / "README.md"


def accuracy() -> str:
    """IoU of the embedded model in the three readings, beside the published network."""
    lines = [
        "| | border counts as | IoU | Dice | pixel accuracy | precision | recall | mean IoU per photo |",
        "|---|---|---|---|---|---|---|---|",
        "| published attention U-Net, 29.3 M parameters, 3669 test images | background | 0.8375 | 0.9116 | 0.9460 "
        "| 0.8961 | 0.9276 | |",
    ]
    for name in ("embedded-test-128", "embedded-test-native"):
        record = records.load(name)
        own, lower = record["metrics"], record["metrics_at_threshold_for_ignored_border"]
        rows = [(own, border) for border in own["readings"]] + [(lower, "ignored")]
        for metrics, border in rows:
            values = metrics["readings"][border]
            numbers = " | ".join(
                f"{values[metric]:.4f}"
                for metric in ("iou", "dice", "accuracy", "precision", "recall", "mean_image_iou")
            )
            what = f"embedded model, 1.8 M, threshold {metrics['threshold']:.2f}; {record['data']}"
            lines.append(f"| {what} | {border} | {numbers} |")
    if (records.RESULTS / "accuracy.json").exists():
        record = records.load("accuracy")
        lines += ["", draws(record), "", *engines(record), "", *others(record)]
    return "\n".join(lines)


def draws(record: dict[str, Any]) -> str:
    """How far the first row of each set is from certain."""
    found = record["rows"][0]["sets"]
    told = [f"{within(found[what]['own']['readings']['background'])} on the {what}" for what in found]
    return f"What other draws of photos would give, 95 %, border as background: {'; '.join(told)}."


#: For each reading of the border, the threshold that was chosen for it.
CHOSEN: Final = {"background": "own", "pet": "cutout", "ignored": "ignored_border"}


def engines(record: dict[str, Any]) -> list[str]:
    """What each engine and precision really costs: IoU, and how many points that is from the checkpoint's."""
    heads = [f"set {number}: {border}" for number, _ in enumerate(record["photos"], 1) for border in CHOSEN]
    sets = ". ".join(f"Set {number}: {what}" for number, what in enumerate(record["photos"], 1))
    thresholds = ", ".join(f"{border}: {record['thresholds'][CHOSEN[border]]:.2f}" for border in CHOSEN)
    lines = [
        "The same file, and its int8 export, in each CPU engine: IoU, and in points how far that is from the "
        f"checkpoint in PyTorch; each reading of the border at the threshold that was chosen for it ({thresholds}; "
        f"`python -m benchmarks accuracy`). {sets}.",
        "",
        f"| computed by | {' | '.join(heads)} |",
        f"|---|{'---|' * len(heads)}",
    ]
    for row in record["rows"]:
        found = [
            row["sets"][what][kind]["readings"][border] for what in record["photos"] for border, kind in CHOSEN.items()
        ]
        cells = " | ".join(f"{values['iou']:.4f} ({0.0 - round(values['points_lost'], 2):+.2f})" for values in found)
        lines.append(f"| {row['name']} | {cells} |")
    return lines


def others(record: dict[str, Any]) -> list[str]:
    """Others, measured by us on photos that petseg is measured on, too; and figures that others published."""
    lines = [
        "Beside others. ISNet is a background remover, not trained on these labels: its threshold is 0.5, or the best "
        "on these very photos. In brackets what 95 % of other draws of photos would give. Times are of the network "
        "alone, one photo at a time, on the CPU:",
        "",
        "| model | photos | ms a photo | border background | pet | ignored |",
        "|---|---|---|---|---|---|",
    ]
    for what, beside in (record["isnet"] or {}).items():
        photos = f"{len(beside['photos'])} of: {what}"
        ours, isnet = beside["petseg"], beside["isnet"]
        best = {border: f"at_best_for_{border}" for border in CHOSEN}
        for name, found, kinds in (
            (f"petseg, {ours['engine']} {ours['precision']}", ours, CHOSEN),
            ("ISNet, ONNX Runtime f32, threshold 0.5", isnet, dict.fromkeys(CHOSEN, "at_0.5")),
            ("ISNet, ONNX Runtime f32, best threshold", isnet, best),
        ):
            ious = [within(found[kind]["readings"][border]) for border, kind in kinds.items()]
            lines.append(other(name, photos, f"{1e3 * found['median']:.{0 if found is isnet else 1}f}", ious))
        if "difference" in beside:
            points = [f"{100 * low:+.1f} to {100 * high:+.1f} points" for low, high in beside["difference"].values()]
            lines.append(other("petseg less ISNet at its best threshold, 95 %", photos, "", points))
    against = records.load("rival") if (records.RESULTS / "rival.json").exists() else None
    if against:
        lines += rival(against, record["rival_times"])
    for found in record["elsewhere"]:
        ious = [found["readings"].get(border, {}).get("iou") for border in CHOSEN]
        lines.append(other(f"{found['name']} ({found['source']})", found["data"], "", ious))
    return [*lines, "", in_turns(against["name"], record["rival_times"])] if against else lines


def rival(record: dict[str, Any], times: Sequence[dict[str, Any]]) -> list[str]:
    """LR-ASPP from scratch, by the same trainer: its rows."""
    quickest = min(times, key=lambda row: float(row["median"]))
    name = (
        f"{record['name']}, {record['parameters'] / 1e6:.1f} M, from scratch by petseg's trainer, {record['epochs']} "
        f"epochs ({record['hours']:.1f} h), teacher: {record['teacher'] or 'none'}, "
        f"{quickest['engine']} {quickest['precision']}"
    )
    return [
        other(name, what, f"{quickest['median']:.1f}", [found["readings"][border]["iou"] for border in CHOSEN])
        for what, found in record["sets"].items()
    ]


def in_turns(rival: str, times: Sequence[dict[str, Any]]) -> str:
    """Its speed beside the embedded model's."""
    each = [
        f"{row['petseg_times_as_fast']:.2f} times as fast in {row['engine'].partition(' ')[0]} {row['precision']}"
        for row in times
    ]
    return f"The embedded model beside {rival}, the networks alone, in turns: {', '.join(each)}."


def other(name: str, photos: str, time: str, ious: Sequence[Any]) -> str:
    """A row; an IoU may be missing, a list of the least and the best, or a text."""
    cells = [iou if isinstance(iou, str) else " to ".join(f"{value:.4f}" for value in numbers(iou)) for iou in ious]
    return f"| {name} | {photos} | {time} | {' | '.join(cells)} |"


def numbers(iou: Any) -> list[float]:
    """None, a number or a list of them as a list."""
    return [] if iou is None else iou if isinstance(iou, list) else [iou]


def within(values: dict[str, Any]) -> str:
    """An IoU with its interval."""
    low, high = values["iou_interval_95"]
    return f"{values['iou']:.4f} ({low:.3f} to {high:.3f})"


def startup() -> str:
    """One photo, whole process."""
    record = records.load("embedded-startup")
    machine = record["machine"]
    times = record["seconds"]
    return (
        "One photo, whole process, with files and OpenVINO's compiled model in caches: "
        f"**{record['median']:.2f} s** (median of {len(times)}, "
        f"{min(times):.2f} to {max(times):.2f}; {machine['cores']} cores of {machine['cpu']})."
    )


#: The formats, as people write them.
FORMATS: Final = {"Onnx": "ONNX", "OpenVINO": "OpenVINO", "TensorRTRTX": "TensorRT for RTX"}


def receipts() -> str:
    """Every export of both ends of the family, in every engine that ran it."""
    return "\n\n".join(receipts_of(records.load(f"receipts-{name}")) for name in ("edge", "width64"))


def receipts_of(record: dict[str, Any]) -> str:
    """A table for one checkpoint."""
    lines = [
        f"**{record['about']}**, {record['photos']} original-size test photos:",
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


def speed() -> str:
    """One photo at a time in every engine; a folder against its steps and a plain loop."""
    latency, folder = records.load("latency"), records.load("throughput")
    height, width = latency["size"]
    machine = latency["machine"]
    wide = all("share_of_matmul_peak" in row for row in latency["rows"])
    lines = [
        f"{latency['model']}, one photo of {height} × {width} at a time, {latency['threads']} threads of "
        f"{machine['cpu']}; medians of rounds in alternation (`python -m benchmarks latency`):",
        "",
        "| engine | file | computes in | ms | times as fast as PyTorch |"
        + (" p95, p99 ms (runs) | of a matmul's speed | from file to first answer, ms | memory, MB |" if wide else ""),
        "|---|---|---|---|---|" + ("---|---|---|---|" if wide else ""),
    ]
    lines += [
        f"| {row['engine']} | {row['stored']} | {row['precision']} | {row['median']:.2f} "
        f"| {row['times_faster_than_pytorch']:.1f} |{engine_alone(row) if wide else ''}"
        for row in latency["rows"]
    ]
    lines += ["", BESIDE_THE_TIME] if wide else []
    lines += ["", *relatives(latency)] if latency.get("networks") else []
    lines += [
        "",
        f"`petseg infer FOLDER` on {folder['photos']} photos, the whole process, start-up and all. Allowed: what "
        "the slowest step alone reaches, or the cores over the CPU time of all steps, whichever is less "
        "(`python -m benchmarks throughput`):",
        "",
        "| engine | writes | photos/s | of what is allowed | a plain loop in the same engine | times as fast |",
        "|---|---|---|---|---|---|",
    ]
    for row in folder["rows"]:
        rate = row["photos_per_second"]
        lines.append(
            f"| {row['backend']} | {row['kind']} | {rate['command']:.0f} | {100 * row['share_of_allowed']:.0f} % "
            f"| {rate['loop']:.0f} | {row['ratio_to_loop']:.1f} |"
        )
    return "\n".join([*lines, *scaling(), *training()])


#: What the columns of the first table mean.
BESIDE_THE_TIME: Final = (
    "Of a matmul's speed: the network's multiplications at the rate of the machine's fastest 1024 × 1024 matmul in the "
    "same precision and the same minutes, over its time; that is a yardstick, which a wide convolution can pass. First "
    "answer and memory are those of a process that has imported the library; a process as a whole is told "
    "[below](#whole-processes)."
)


def scaling() -> list[str]:
    """Where the curves of cost bend, if they were measured."""
    if not (records.RESULTS / "scaling.json").exists():
        return []
    record = records.load("scaling")
    lines = ["", "More pixels, photos and minutes (`python -m benchmarks scaling`), cost by size and by batch:", ""]
    lines += [f"- {curve['name']}: {curve['bend']['statement']}." for curve in record["curves"]]
    for gain in record["threads"]:
        ratios = gain["times_as_fast_as_one_thread"]
        lines.append(f"- {gain['curve']}: {min(ratios):.2f} to {max(ratios):.2f} times as fast as 1 thread.")
    memory = record["memory"]
    return [*lines, f"- Memory of a whole `petseg infer CLIP` ({memory['clip']}) is {memory['statement']}."]


def training() -> list[str]:
    """How fast `petseg train` is, if it was measured."""
    if not (records.RESULTS / "training.json").exists():
        return []
    lines = [
        "",
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
    return lines


def engine_alone(row: dict[str, Any]) -> str:
    """The other columns of an engine: how its times spread, its share of the peak, its start, its memory."""
    share, start = row["share_of_matmul_peak"], row["load_ms"] + row["first_run_ms"]
    of_peak = f"{100 * share:.0f} %" if share else ""
    return f" {row['p95']:.2f}, {row['p99']:.2f} ({row['runs']}) | {of_peak} | {start:.0f} | {row['memory_mb']:.0f} |"


def relatives(latency: dict[str, Any]) -> list[str]:
    """The other networks and batches: milliseconds a run, and the share of the matmul peak."""
    groups = [latency, *latency["networks"]]
    found = [{(r["engine"], r["stored"], r["precision"]): r for r in group["rows"]} for group in groups]
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
    """Whole processes of petseg and of its peers, on the same photos, in turns; if they were measured."""
    if not (records.RESULTS / "peers.json").exists():
        return ""
    record = records.load("peers")
    lines = [
        f"A folder of {record['photos']} photos to masks (slow ones take the first few), and one photo from a start "
        "with files in the disk's cache, and OpenVINO's compiled model in petseg's: whole processes, `petseg infer` "
        "right before and after each other, on "
        f"{record['machine']['cores']} cores of {record['machine']['cpu']} (`python -m benchmarks peers`). Peers are "
        "called in a plain loop, one photo after the other, as their pages show it; `petseg infer` reads, computes and "
        "writes beside each other, and petseg's own plain loop shows what that is worth. Rates are from the first mask "
        "to the last; medians, lowest and highest. Memory is the most that the process held. Installed: the packages "
        "that this way needs, CUDA's libraries apart. Weights of peers are random, good for speed only, but for "
        "ISNet's:",
        "",
        "| | network's input | photos/s | `petseg infer` is so many times as fast | petseg's plain loop in the same "
        "engine is | start, s | memory, MB | installed, MB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in record["rows"]:
        size, disk = " × ".join(map(str, row["input"])), row["installed"]
        faster, alike = (row["petseg_times_as_fast"].get(name) for name in ("once_running", "loop_once_running"))
        own_loop = f"{alike['median']:.2f}" if alike else ""
        lines.append(
            f"| {row['name']} ({row['engine'].partition(',')[0]}) | {size} "
            f"| {spread(row['photos_per_second_once_running'])} | {faster['median']:.1f} "
            f"| {own_loop} | {row['startup_seconds']['median']:.2f} "
            f"| {row['memory_mb']['median']:.0f} | {disk['megabytes'] - disk['of_these_cuda']:.0f} |"
        )
    return "\n".join(lines)


def spread(rate: dict[str, float]) -> str:
    """A median, with the lowest and the highest."""
    digits = 0 if rate["median"] >= 20 else 1 if rate["median"] >= 1 else 2
    median, low, high = (f"{rate[name]:.{digits}f}" for name in ("median", "min", "max"))
    return f"{median} ({low} to {high})"


def video() -> str:
    """A minute of video through the whole command; live sources that break, for half an hour."""
    clip, live = records.load("video"), records.load("soak")
    machine = clip["machine"]
    steps = ("decode", "convert", "infer", "finish", "write")
    lines = [
        f"A clip of {clip['clip']}, `petseg infer CLIP`, the whole process on {machine['cores']} cores of "
        f"{machine['cpu']}; medians of {len(clip['rows'][0]['seconds'])} rounds in alternation; the steps run beside "
        "each other, in ms per frame, median and 99th percentile (`python -m benchmarks video`):",
        "",
        f"| engine | writes | frames/s | times real time | times a plain loop | {' | '.join(steps)} |",
        f"|---|---|---|---|---|{'---|' * len(steps)}",
    ]
    for row in clip["rows"]:
        times = (f"{1000 * row['steps'][step]['p50']:.1f}, {1000 * row['steps'][step]['p99']:.1f}" for step in steps)
        loop = row["times_as_fast_as_loop"]
        lines.append(
            f"| {row['backend']} | {row['kind']} | {row['frames_per_second']:.0f} | {row['times_real_time']:.2f} "
            f"| {f'{loop:.1f}' if loop else ''} | {' | '.join(times)} |"
        )
    frames = [source["frames"] for source in live["sources"]]
    rss = live["memory"]["rss_mb"]
    whole = all(source["accounted"] and source["all_in_files"] for source in live["sources"])
    model = "" if live.get("shipped_model") == records.shipped_model() else ", with an earlier embedded model"
    lines += [
        "",
        f"Live sources (RTSP, UDP, HTTP at once, {live['minutes']:.0f} minutes, overlays in pieces{model}): "
        f"{live['disconnects']} disconnects, {live['changes_of_size']} changes of size, "
        f"{100 * live['packet_loss']:.0f} % of UDP's packets lost, one silence of {live['frozen_seconds']:.0f} s: "
        f"{sum(f['decoded'] for f in frames)} frames decoded, {sum(f['delivered'] for f in frames)} written, "
        f"{sum(f['dropped'] for f in frames)} dropped for want of time, {sum(f['failed'] for f in frames)} failed, "
        f"{'all' if whole else 'not all'} accounted for; memory {rss['after_warm_up']:.0f} MB after "
        f"{live['memory']['warm_up_seconds'] / 60:.0f} minutes, {rss['at_the_end']:.0f} MB at the end "
        "(`python -m benchmarks soak`).",
    ]
    return "\n".join(lines)


SECTIONS: Final[dict[str, Callable[[], str]]] = {
    "accuracy": accuracy,
    "startup": startup,
    "speed": speed,
    "peers": peers,
    "video": video,
    "receipts": receipts,
}


def rendered(text: str) -> str:
    """The README with every ``<!-- NAME -->`` section made anew."""
    for name, make in SECTIONS.items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        if not pattern.search(text):
            raise SystemExit(f"{README.name} has no section {name!r}")
        body = make()
        text = pattern.sub(lambda match, body=body: match[1] + f"{body}\n".lstrip() + match[2], text)  # type: ignore[misc]
    return text


@click.command()
@click.option("--check", is_flag=True, help="Only say whether README and plots are what the records say.")
def report(check: bool) -> None:
    """Write the README's tables, and the plots, from the records."""
    from benchmarks import plots  # matplotlib takes a second to import

    old = README.read_text(encoding="utf-8")
    new = rendered(old)
    if check:
        drifted = ([README.name] if old != new else []) + plots.stale()
        sys.exit(f"not what the records say: {', '.join(drifted)}; `python -m benchmarks report`" if drifted else 0)
    README.write_text(new, encoding="utf-8")
    for path in plots.write():
        click.echo(path.relative_to(records.ROOT))
