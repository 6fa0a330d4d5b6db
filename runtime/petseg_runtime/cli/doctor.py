"""``petseg doctor``: prints what this machine has and which engines work on it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from typing import TYPE_CHECKING

import click

from petseg_runtime.cameras import why_not
from petseg_runtime.cli.text import HELP, SCHEMA_VERSION, watched
from petseg_runtime.errors import EngineError
from petseg_runtime.extras import install
from petseg_runtime.text import shown

if TYPE_CHECKING:
    from petseg_runtime.cameras import Camera
    from petseg_runtime.doctor import EngineCheck, Examination
    from petseg_runtime.host import Cpu, Gpu

__all__ = ["cpu_lines", "doctor"]


@click.command()
@click.option("--json", "as_json", is_flag=True, help=HELP["json"])
def doctor(as_json: bool) -> int:
    """Print what this machine has, and try every engine on it.

    Each engine loads the built-in model, and works if its masks match those of the checkpoint. Exit codes: 0 if at
    least one engine works; 5 if none does, or if the one that `auto` chooses produces wrong masks.
    """
    from petseg_runtime.doctor import examine

    found = examine(lambda what: click.echo(f"petseg: trying {what}", err=True) if watched() else None)
    if as_json:
        click.echo(json.dumps({"schema_version": SCHEMA_VERSION, **dataclasses.asdict(found)}, indent=2))
    else:
        click.echo("\n".join(f"{name:>12}  {shown(value)}".rstrip() for name, value in _lines(found)))
    for problem in found.problems:
        click.echo(f"petseg: {shown(problem)}", err=True)
    return 0 if found.works else EngineError.exit_code


def _lines(found: Examination) -> Iterable[tuple[str, str]]:
    """Yields title and text of each line; a repeated title is empty."""
    host = found.host
    yield "petseg", f"{host.petseg}, Python {host.python}, {host.system}"
    yield "environment", host.environment or "none: the system's own Python"
    yield from cpu_lines(host.cpu)
    yield "NVIDIA", "; ".join(map(_gpu, found.gpus)) or "no GPU"
    if host.nvidia_driver:
        yield "", f"driver {host.nvidia_driver}"
    intel = [f"{name}: {text}" for name, text in found.openvino_devices.items() if name.startswith("GPU")]
    yield "Intel GPU", "; ".join(intel) or "none that OpenVINO sees"
    for index, check in enumerate(found.engines):
        yield "" if index else "engines", f"{'works' if check.works else '  no '}  {_check(check)}"
    if "error" in found.auto:
        yield "auto chooses", f"none: {found.auto['error']}"
    else:
        auto = found.auto
        yield "auto chooses", f"{auto['name']} {auto['version']} on {auto['device']}, {auto['precision']}"
    for index, line in enumerate(found.rule):
        yield "" if index else "the first of", f"{index + 1}. {line.text}"
    yield "cameras", "; ".join(map(_camera, found.cameras)) or "none"
    yield "HEIC", f"pillow-heif {found.heic}" if found.heic else f"not supported (iPhone photos): {install('heic')}"
    yield from _ffmpeg_lines(found)
    yield "cache", f"{found.cache} ({found.cache_bytes / 1e6:.1f} MB)" if found.cache else "none: nothing is kept"


def cpu_lines(cpu: Cpu) -> Iterable[tuple[str, str]]:
    """Yields the lines that describe a processor and its memory."""
    quota = f", of which the control group allows {cpu.quota:g}" if cpu.quota is not None else ""
    limit = f", of which the control group allows {cpu.memory_limit / 1e9:.1f}" if cpu.memory_limit else ""
    yield "processor", f"{cpu.name}, {cpu.machine}, {cpu.cores} usable cores{quota}"
    yield "", " ".join(cpu.features) or "no instruction set that engines have special kernels for"
    yield "memory", f"{cpu.memory / 1e9:.1f} GB{limit}"


def _gpu(gpu: Gpu) -> str:
    return (
        f"cuda:{gpu.index} {gpu.name}, compute capability {gpu.compute_capability}, {gpu.memory / 1e9:.1f} GB, "
        f"driver supports {gpu.driver}"
    )


def _camera(camera: Camera) -> str:
    why = why_not(camera.device)
    return f"{camera}: {why}" if why else str(camera)


def _check(check: EngineCheck) -> str:
    unproven = "" if check.run_by_us else "; never run there by us"
    name = f"{check.engine} on {check.device}"
    packages = f" ({', '.join(check.packages)})" if check.packages else ""
    if not check.works:
        return f"{name}{packages}: {check.why}{unproven}"
    masks = f"mask IoU {check.mean_mask_iou:.4f} on {check.photos} photos" if check.photos else "masks not checked"
    notes = "".join(f"; {note}" for note in check.notes)
    return f"{name}{packages}: {check.precision}, {check.milliseconds:.1f} ms, {masks}{notes}{unproven}"


def _ffmpeg_lines(found: Examination) -> Iterable[tuple[str, str]]:
    if found.ffmpeg.error:
        yield "FFmpeg", f"none: {found.ffmpeg.error}"
        return
    yield "FFmpeg", f"PyAV {found.ffmpeg.pyav}, libavcodec {found.ffmpeg.libraries['libavcodec']}"
    for name, codecs in (("decodes", found.ffmpeg.decoders), ("encodes", found.ffmpeg.encoders)):
        missing = [codec for codec, there in codecs.items() if not there]
        there = " ".join(codec for codec, there in codecs.items() if there)
        yield name, there + (f"; missing: {' '.join(missing)}" if missing else "")
