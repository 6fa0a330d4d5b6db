"""``python -m benchmarks receipts``: export a checkpoint to every format and precision, each with its parity receipt.

    python -m benchmarks receipts edge petseg/weights/edge.safetensors --about "the built-in model" --data data

The parity test uses test photos, on which nothing is tuned; int8 is calibrated on training photos and evaluated on
validation photos of the merged set (see benchmarks/embedded/merge.py).
"""

from __future__ import annotations

import shlex
import time
from pathlib import Path
from typing import Any

import click

from benchmarks import photos, records
from petseg_export import OnnxConfig, OpenVINOConfig, QuantizeConfig, TensorRTRTXConfig, export
from petseg_export.config import CompiledConfig, ExportConfig

PHOTOS = 200


def plan(data: Path, folder: Path) -> list[ExportConfig]:
    """The configs of all exports, in an order in which each compiled form follows its ONNX file."""
    common: dict[str, Any] = {
        "data": photos.original_size(data),
        "split": "test",
        "photos": PHOTOS,
    }
    quantize = {"int8": QuantizeConfig(data=photos.training_set(data))}
    onnx = {p: folder / f"{p}.onnx" for p in ("fp32", "fp16", "int8")}
    both = ("onnxruntime", "openvino")
    made: list[ExportConfig] = [
        OnnxConfig(output=file, precision=p, backends=both, quantize=quantize.get(p, QuantizeConfig()), **common)
        for p, file in onnx.items()
    ]
    made += [
        OpenVINOConfig(output=folder / f"{p}.xml", precision=p, onnx=onnx[source], **common)
        for p, source in {"fp32": "fp32", "fp16": "fp32", "int8": "int8"}.items()
    ]
    made += [
        TensorRTRTXConfig(output=folder / f"{p}.engine", precision=p, onnx=file, **common) for p, file in onnx.items()
    ]
    return made


@click.command()
@click.argument("name")
@click.argument("checkpoint", type=click.Path(path_type=Path, exists=True))
@click.option("--data", type=click.Path(path_type=Path), required=True, help="Folder of the data sets.")
@click.option("--output", type=click.Path(path_type=Path), help="Output folder.  [default: runs/receipts/NAME]")
@click.option("--about", required=True, help="Description of the checkpoint, for the record.")
def receipts(name: str, checkpoint: Path, data: Path, output: Path | None, about: str) -> None:
    """Export CHECKPOINT to every format that can be built here, and write results/receipts-NAME.json."""
    if not about.strip():
        raise click.UsageError("--about is empty: describe the checkpoint, for the table's title")
    folder = output or records.ROOT / "runs" / "receipts" / name
    rows = []
    for config in plan(data, folder):
        started = time.perf_counter()
        done = export(checkpoint, config)
        seconds = time.perf_counter() - started
        receipt = done.receipt.as_dict()
        size = sum(file.stat().st_size for file in done.files if file.suffix in (".onnx", ".xml", ".bin", ".engine"))
        rows.append(
            {
                "format": type(config).__name__.removesuffix("Config"),
                "precision": config.precision,
                "bytes": size,
                "seconds": round(seconds, 1),
                "compiled_from": config.onnx.name if isinstance(config, CompiledConfig) and config.onnx else None,
                # The names of 200 photos are redundant: the digest and the seed identify them.
                "receipt": {key: value for key, value in receipt.items() if key != "names"},
            }
        )
        click.echo(f"{done.path.name}: {size / 1e6:.1f} MB, {seconds:.0f} s: {done.receipt.summary}")
    values = {"about": about, "photos": PHOTOS, "exports": rows}
    command = f"python -m benchmarks receipts {name} CHECKPOINT --data DATA --about {shlex.quote(about)}"
    records.write(f"receipts-{name}", command, values)
