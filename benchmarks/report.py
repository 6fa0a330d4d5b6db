"""The README's tables, made from the records; ``--check`` fails where they have drifted apart."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
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
    return "\n".join(lines)


def startup() -> str:
    """One photo, whole process."""
    record = records.load("embedded-startup")
    machine = record["machine"]
    times = record["seconds"]
    return (
        f"One photo, whole process, cold: **{record['median']:.2f} s** (median of {len(times)}, "
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
    lines = [
        f"{latency['model']}, one photo of {height} × {width} at a time, {latency['threads']} threads of "
        f"{machine['cpu']}; medians of rounds in alternation (`python -m benchmarks latency`):",
        "",
        "| engine | file | computes in | ms | times as fast as PyTorch |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['engine']} | {row['stored']} | {row['precision']} | {row['median']:.2f} "
        f"| {row['times_faster_than_pytorch']:.1f} |"
        for row in latency["rows"]
    ]
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
    return "\n".join(lines)


SECTIONS: Final[dict[str, Callable[[], str]]] = {
    "accuracy": accuracy,
    "startup": startup,
    "speed": speed,
    "receipts": receipts,
}


def rendered(text: str) -> str:
    """The README with every ``<!-- NAME -->`` section made anew."""
    for name, make in SECTIONS.items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        if not pattern.search(text):
            raise SystemExit(f"{README.name} has no section {name!r}")
        body = make()
        text = pattern.sub(lambda match, body=body: match[1] + body + "\n" + match[2], text)  # type: ignore[misc]
    return text


@click.command()
@click.option("--check", is_flag=True, help="Only say whether the README is what the records say.")
def report(check: bool) -> None:
    """Write the README's tables from the records."""
    old = README.read_text(encoding="utf-8")
    new = rendered(old)
    if not check:
        README.write_text(new, encoding="utf-8")
    elif old != new:
        sys.exit("README.md is not what the records say: run `python -m benchmarks report`")
