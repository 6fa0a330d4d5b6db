"""``petseg info`` and ``petseg verify``: describe a model file, and compare it with its checkpoint on this machine."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from petseg_runtime.cli.text import BACKEND, HELP, PATH, SCHEMA_VERSION
from petseg_runtime.errors import OutputError, ParityError
from petseg_runtime.text import counted, shown

if TYPE_CHECKING:
    from petseg_runtime.artifact import Artifact
    from petseg_runtime.verify import Verification

__all__ = ["info", "verify"]


@click.command()
@click.argument("file", metavar="[MODEL]", type=PATH, required=False)
@click.option("--json", "as_json", is_flag=True, help=HELP["json"])
def info(file: Path | None, as_json: bool) -> int:
    """Print what the file MODEL is, what input it expects, where it comes from and how it was verified.

    Without MODEL, describe the built-in model.
    """
    from petseg_runtime.artifact import default_model, open_artifact
    from petseg_runtime.verify import verified

    artifact = open_artifact(file or default_model())
    header = artifact.onnx
    record = {
        "schema_version": SCHEMA_VERSION,
        "file": str(artifact.path),
        "format": artifact.format,
        "bytes": artifact.size,
        "identity": artifact.identity,
        "spec": dataclasses.asdict(artifact.spec),
        "opset": header.opset if header else None,
        "inputs": [dataclasses.asdict(tensor) for tensor in header.inputs] if header else [],
        "outputs": [dataclasses.asdict(tensor) for tensor in header.outputs] if header else [],
        "environment": artifact.environment,
        "provenance": artifact.provenance,
        "receipt": artifact.receipt,
        "verified": verified(artifact),
    }
    if as_json:
        click.echo(json.dumps(record, indent=2))
    else:
        # The names are shown escaped, too: some are keys of the file's own metadata.
        click.echo("\n".join(f"{shown(name):>22}  {shown(value)}" for name, value in _lines(record)))
    return 0


def _lines(record: dict[str, Any]) -> list[tuple[str, str]]:
    """Returns title and text of each line that describes a record."""
    spec, provenance = record["spec"], record["provenance"]
    tensors = [
        (kind, f"{t['name']}: {t['dtype']} [{', '.join(map(str, t['shape']))}]")
        for kind in ("inputs", "outputs")
        for t in record[kind]
    ]
    opset = f", opset {record['opset']}" if record["opset"] else ""
    size = f"{spec['height']} x {spec['width']}" + (", or any multiples of 16" if spec["dynamic_size"] else "")
    lines = [
        ("file", f"{record['file']} ({record['bytes'] / 1e6:.1f} MB, {record['format']}, {spec['precision']}{opset})"),
        ("model", spec["name"]),
        ("identity", f"sha256 {record['identity']}"),
        *((kind[:-1], text) for kind, text in tensors),
        ("resize", f"{spec['resize']} to {size}, {spec['filter']}, antialiased"),
        ("threshold", f"{spec['threshold']:.2g} for masks, {spec['cutout_threshold']:.2g} for cutouts"),
        ("a pet is found if", _rule(spec["certain_share"])),
    ]
    environment = record["environment"].items()  # without its lists of layers and messages, which are for programs
    lines += [("built for", f"{k}: {_plain(v)}") for k, v in environment if v and k not in ("engine", "messages")]
    lines += [(name.replace("_", " "), str(value)) for name, value in provenance.items() if isinstance(value, str)]
    lines += [
        (name, f"{key}: {_plain(value)}")
        for name in ("training", "measured")
        if isinstance(provenance.get(name), dict)
        for key, value in _flat(provenance[name])
    ]
    return lines + _parity_lines(record)


def _rule(certain_share: float | None) -> str:
    """Describes the rule of :attr:`petseg_runtime.result.Segmentation.found`."""
    if certain_share is None:
        return "the mask is not empty (no rule was chosen for this model)"
    share = f"{100 * certain_share:.3g} %"
    return f"at least {share} of the pixels with a probability of 0.5 or more reach 0.98, and the mask is not empty"


def _flat(values: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yields each measurement with its name; those with several treatments of the border class, one for each."""
    for key, value in values.items():
        readings = isinstance(value, dict) and all(isinstance(inner, dict) for inner in value.values())
        yield from ((f"{key}; {name}", inner) for name, inner in value.items()) if readings else ((key, value),)


def _parity_lines(record: dict[str, Any]) -> list[tuple[str, str]]:
    """The lines about the parity receipt of the export, and about the results of `petseg verify` on this machine."""
    lines: list[tuple[str, str]] = []
    here = (record["verified"], *record["verified"].get("others", ()))
    for title, receipt in (("parity", record["receipt"]), *(("verified here", result) for result in here)):
        if rows := receipt.get("rows"):
            try:
                lines += [
                    (title, f"{receipt['kind']}, {counted(receipt['photos'], 'photo')}, {row['summary']}")
                    for row in rows
                ]
            except (KeyError, TypeError):
                lines.append((title, "this version of petseg cannot read the receipt"))
        elif receipt:
            lines.append((title, receipt.get("summary", "")))
    if record["verified"].get("rows"):
        lines.append(("verified here", _road_line(record["verified"])))
    return lines or [("parity", "no receipt: this file was never compared with its checkpoint")]


def _road_line(verified: dict[str, Any]) -> str:
    """The line about pre- and postprocessing in a result of `petseg verify`, which any program may have written."""
    road = verified.get("road")
    summary = road.get("summary") if isinstance(road, dict) else None
    return f"pre- and postprocessing: {summary or 'this version of petseg cannot read the result'}"


def _plain(value: Any) -> str:
    return json.dumps(value).replace('"', "")


def _verdict(artifact: Artifact, done: Verification, place: Path | None) -> list[tuple[str, str]]:
    """The printed report: what was measured, which limits apply, for which file and on which machine."""
    from petseg_runtime.host import host
    from petseg_runtime.parity import SMOKE

    here, receipt = host(), done.network
    does = "matches its checkpoint" if receipt.passed else "does NOT match its checkpoint"
    few = f" (a smoke test: a full one needs {SMOKE})" if receipt.kind == "smoke" else ""
    lines = [
        ("PASSED" if done.passed else "FAILED", f"{artifact.path} {does}, on {counted(receipt.photos, 'photo')}{few}"),
        ("model", f"sha256 {artifact.identity}"),
        ("machine", f"{here.cpu.name}, {here.cpu.machine}, {here.system}"),
    ]
    for row in receipt.rows:
        allowed = row.tolerance
        steps = (
            ("maximum", row.max_difference, allowed.max_difference),
            ("mean", f"{row.mean_difference:.4f}", allowed.mean_difference),
            ("99th percentile", row.p99_difference, allowed.p99_difference),
        )
        ious = (
            ("minimum", row.min_mask_iou, allowed.min_mask_iou),
            ("mean", row.mean_mask_iou, allowed.mean_mask_iou),
        )
        lines += [
            ("engine", f"{row.engine}, computes in {row.precision}: {'passed' if row.passed else 'FAILED'}"),
            ("difference", ", ".join(f"{what} {found}/255{_limit(limit, '/255')}" for what, found, limit in steps)),
            ("masks", "IoU " + ", ".join(f"{what} {found:.4f}{_limit(limit)}" for what, found, limit in ious)),
        ]
    lines.append(("processing", done.road.summary))
    return [*lines, ("result", f"in {place}")] if place else lines


def _tell(what: str) -> None:
    click.echo(f"petseg: {shown(what)}", err=True)


def _limit(allowed: float | None, unit: str = "") -> str:
    return "" if allowed is None else f" (limit {allowed:g}{unit})"


@click.command()
@click.argument("file", metavar="[MODEL]", type=PATH, required=False)
@click.option("--backend", type=BACKEND, default="auto", show_default=True, help=HELP["backend"])
@click.option("--device", default="auto", show_default=True, help=HELP["device"])
@click.option("--threads", type=click.IntRange(min=1), help=HELP["threads"])
@click.option(
    "--proof",
    type=PATH,
    help="Parity record: photos and the checkpoint's outputs for them.  [default: MODEL.parity.npz]",
)
@click.option("--output", type=PATH, help="File for the result.  [default: MODEL.verified.json]")
@click.option("--json", "as_json", is_flag=True, help=HELP["json"])
@click.option("-q", "--quiet", is_flag=True, help=HELP["quiet"])
def verify(
    file: Path | None,
    backend: str,
    device: str,
    threads: int | None,
    proof: Path | None,
    output: Path | None,
    as_json: bool,
    quiet: bool,
) -> int:
    """Run MODEL on this device and compare its outputs with those of its checkpoint, recorded at export.

    Also run pre- and postprocessing on sample photos: decoding, resizing, and resizing a mask back to the photo's size
    must match the results recorded where petseg was built, within limits. Without MODEL, verify the built-in model;
    its result is written only if --output is given.

    Exit codes: 0 if everything matches; 10 if not, and the report says where and by how much.

    In scripts, give the device with --device: otherwise, the first engine that works is verified, which may not be the
    one that you use. If that engine computes a float32 model in a lower precision (bf16, TF32), a second run verifies
    the model in float32, for which `auto` may choose another engine.
    """
    from petseg_runtime.artifact import default_model, open_artifact
    from petseg_runtime.verify import parts_of, record, save, sidecar_of, verify_file, with_others

    artifact = open_artifact(file or default_model())
    place = output or (sidecar_of(artifact.path) if file else None)
    if place and place.exists() and any(place.samefile(part) for part in parts_of(artifact, proof) if part.exists()):
        raise OutputError(f"{place}: is part of the model and must not be overwritten; choose another --output")
    done = verify_file(artifact, backend, threads, proof, device, None if quiet else _tell)
    receipt, result = done.network, record(artifact, done)
    result = with_others(result, artifact, place) if place else result
    if as_json:
        click.echo(json.dumps(result, indent=2))
    elif not quiet:
        click.echo("\n".join(f"{name:>10}  {shown(value)}" for name, value in _verdict(artifact, done, place)))
    for note in () if quiet else dict.fromkeys(note for row in receipt.rows for note in row.notes):
        _tell(note)
    for failure in done.failures:
        _tell(failure)
    try:
        if place:
            save(result, place)  # last, so that the report is printed even if this fails
    except OutputError as error:
        if done.passed:
            raise
        _tell(str(error))  # the failed verification matters more: it sets the exit code
    return 0 if done.passed else ParityError.exit_code
