"""The formats as data; what cannot be done here is refused before anything heavy is imported."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Protocol, TypeAlias

from petseg_export.config import (
    CompiledConfig,
    EngineConfig,
    ExportConfig,
    OnnxConfig,
    OpenVINOConfig,
    QuantizeConfig,
    TensorRTConfig,
    TensorRTRTXConfig,
)
from petseg_runtime import host
from petseg_runtime.artifact import Artifact
from petseg_runtime.engines.base import Device
from petseg_runtime.engines.registry import ENGINES, choices
from petseg_runtime.engines.tensorrt_library import bindings
from petseg_runtime.errors import EngineError, EngineMissing, MissingExtra, UsageError
from petseg_runtime.extras import install

__all__ = ["FORMATS", "Compiler", "Format", "Needs", "Watch", "check", "check_limits", "format_of", "why_not"]

#: Called with what is being done, how far it is, and of how much (0: not known).
Watch: TypeAlias = Callable[[str, int, int], None]


class Compiler(Protocol):
    """Makes a format's file from ONNX."""

    def __call__(self, onnx: Artifact, output: Path, config: Any, watch: Watch, /) -> dict[str, Any]:
        """Write ``output``, and what belongs to it beside it.

        Args:
            onnx: The ONNX file.
            output: The file to write.
            config: The format's own config.
            watch: Told about progress.

        Returns:
            What the file was made with and needs on a device; JSON values.
        """


@dataclass(frozen=True, kw_only=True)
class Needs:
    """A package that a format is built with, and the extra that brings it."""

    module: str
    extra: str


@dataclass(frozen=True, kw_only=True)
class Format:
    """One format that a checkpoint can be exported to.

    Attributes:
        help: What it is, in a few words.
        suffix: Of its files.
        config: What may be asked of it.
        precisions: That it comes in.
        needs: Packages that build it, beside torch and onnx.
        gpu: Whether it is built on an NVIDIA GPU.
        cuda: Whether it is run on an NVIDIA GPU alone, which needs cuda-bindings: a system's own TensorRT brings none.
        foreign: Whether it may be built for other GPUs than the one that is here.
        compiler: ``module:function`` of its :class:`Compiler`; None for ONNX itself.
        sources: The precision of the ONNX it is compiled from, where that is not its own.
        proven: Where we have run such files.
    """

    help: str
    suffix: str
    config: type[ExportConfig]
    precisions: tuple[str, ...] = ("fp32", "fp16", "int8")
    needs: tuple[Needs, ...] = ()
    gpu: bool = False
    cuda: bool = False
    foreign: bool = False
    compiler: str | None = None
    sources: Mapping[str, str] = field(default_factory=dict)
    proven: str


FORMATS: Final = {
    "onnx": Format(
        help="ONNX: runs in ONNX Runtime and OpenVINO; every other format is compiled from it",
        suffix=".onnx",
        config=OnnxConfig,
        proven="run on CPUs",
    ),
    "openvino": Format(
        help="OpenVINO IR: for CPUs, the fastest where they compute in bf16, fp16 or int8",
        suffix=".xml",
        config=OpenVINOConfig,
        needs=(Needs(module="openvino", extra="openvino"),),
        compiler="petseg_export.openvino:compile_openvino",
        # fp16 there is a way to store weights; from a graph in fp16, OpenVINO's CPU code takes twice as long.
        sources={"fp16": "fp32"},
        proven="run on CPUs",
    ),
    "trt": Format(
        help="TensorRT engine: for NVIDIA GPUs, built on the GPU that runs it",
        suffix=".engine",
        config=TensorRTConfig,
        needs=(Needs(module="tensorrt", extra="trt"),),
        gpu=True,
        cuda=True,
        compiler="petseg_export.tensorrt:compile_tensorrt",
        proven="never built or run by us",
    ),
    "trt-rtx": Format(
        help="TensorRT for RTX engine: for RTX GPUs, built on any machine",
        suffix=".engine",
        config=TensorRTRTXConfig,
        needs=(Needs(module="tensorrt_rtx", extra="rtx"),),
        cuda=True,
        foreign=True,
        compiler="petseg_export.tensorrt:compile_tensorrt_rtx",
        proven="built in our tests, never run by us",
    ),
}


def format_of(config: ExportConfig) -> tuple[str, Format]:
    """The format whose config this is.

    Raises:
        TypeError: It is no format's config.
    """
    for name, form in FORMATS.items():
        if form.config is type(config):
            return name, form
    raise TypeError(f"{type(config).__name__} is no format's config: use one of OnnxConfig, OpenVINOConfig, ...")


def why_not(form: Format) -> EngineError | MissingExtra | None:
    """Why this machine cannot build a format, with the remedy; None if it can."""
    for need in (*form.needs, Needs(module="torch", extra="export"), Needs(module="onnxscript", extra="export")):
        if importlib.util.find_spec(need.module) is None:
            return MissingExtra(f"{need.module} is not installed: {install(need.extra)}")
    if form.gpu and not host.nvidia_gpus():
        return EngineError(
            "no NVIDIA GPU here: such an engine is built on the GPU that will run it, so export to ONNX here and "
            "compile that file there (or use trt-rtx, whose engines are built anywhere)"
        )
    if form.cuda and host.nvidia_gpus() and not _cuda_bindings():  # or it would fail after the minutes of building
        return MissingExtra(f"cuda-bindings is not installed, which the parity test needs: pip install {bindings()}")
    return None


def _cuda_bindings() -> bool:
    return bool(importlib.util.find_spec("cuda") and importlib.util.find_spec("cuda.bindings"))


def check(config: ExportConfig) -> None:
    """Refuse what cannot be done here, with the remedy; imports nothing heavy.

    Raises:
        MissingExtra: A package that is needed is not installed.
        EngineError: A GPU that is needed is not there; EngineMissing: no engine for the parity test.
        UsageError: The format has another suffix, or does not come in that precision; int8 has no data; a setting has
            nothing to act on.
    """
    name, form = format_of(config)
    _check_applies(config)
    if config.output is not None and config.output.suffix != form.suffix:
        raise UsageError(f"{config.output}: {name} files end in {form.suffix}; another --format has another suffix")
    if config.precision not in form.precisions:
        raise UsageError(f"{name} comes in {', '.join(form.precisions)}, not in {config.precision}")
    if error := why_not(form):
        raise type(error)(f"{name}: {error}")
    if config.precision == "int8" and not (isinstance(config, CompiledConfig) and config.onnx):
        if (config.quantize.data or config.data) is None:
            raise UsageError("int8 is calibrated and judged on labelled photos: give a folder of them with --data")
        if importlib.util.find_spec("onnxruntime") is None:
            raise MissingExtra(f"int8 is calibrated in onnxruntime, which is not installed: {install('cpu')}")
    for backend in config.backends:
        _check_engine(name, backend, config.device)


def _check_applies(config: ExportConfig) -> None:
    """Refuse settings that would be passed over in silence."""
    given = isinstance(config, CompiledConfig) and config.onnx is not None
    if config.quantize != QuantizeConfig() and (config.precision != "int8" or given):
        made = "an ONNX file is compiled as it is" if given else f"this is {config.precision}"
        raise UsageError(f"settings of int8 (--int8-...) are of an export that makes int8, and {made}")
    if config.split != ExportConfig().split and config.data is None:
        raise UsageError(f"split {config.split} is of labelled photos: give their folder with --data")
    if isinstance(config, EngineConfig) and not given:
        check_limits(config, batch=config.batch, dynamic_size=config.dynamic_size)


def check_limits(config: EngineConfig, *, batch: int, dynamic_size: bool) -> None:
    """Refuse limits of what a graph takes where it takes one thing only.

    Args:
        config: Has ``max_batch`` and ``max_size``.
        batch: Of the graph; 0: any.
        dynamic_size: Of the graph.

    Raises:
        UsageError: Names the limit.
    """
    if batch and config.max_batch != EngineConfig().max_batch:
        raise UsageError(f"max_batch is of a graph that takes any batch, and this one takes {batch}")
    if config.max_size and not dynamic_size:
        asked = ": ask for that with --dynamic-size"
        given = f", as {config.onnx} does not: leave it out, or export that file anew with --dynamic-size"
        raise UsageError(f"max_size is of a graph that takes any size{given if config.onnx else asked}")


def _check_engine(name: str, backend: str, device: str) -> None:
    """Refuse an engine, or a device, that the parity test of a format cannot be run in."""
    wanted = None if device == "auto" else Device.parse(device)
    lines = choices(name, backend, wanted, what=name)
    if wanted and wanted.kind == "cuda" and not host.nvidia_gpus():
        raise EngineError(f"{name}: {wanted} cannot be had: this machine shows no NVIDIA GPU")
    entries = {line.engine: ENGINES[line.engine] for line in lines}.values()
    if not any(importlib.util.find_spec(entry.module) for entry in entries):
        remedies = " or ".join(install(entry.extra) for entry in entries)
        raise EngineMissing(f"{name}: the parity test needs an engine that runs such files: {remedies}")
