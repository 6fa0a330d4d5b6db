"""Table of the export formats, and checks of a request before anything heavy is imported."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TypeAlias

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
from petseg_runtime.engines.tensorrt_build import known_targets
from petseg_runtime.engines.tensorrt_library import RTX, bindings, imported
from petseg_runtime.errors import EngineError, EngineMissing, MissingExtra, UsageError
from petseg_runtime.extras import install

__all__ = ["FORMATS", "Compiler", "Format", "Needs", "Watch", "check", "check_limits", "format_of", "why_not"]

#: Progress callback: called with the name of the stage, the steps done, and the steps in total (0: not known).
Watch: TypeAlias = Callable[[str, int, int], None]

#: Compiles an ONNX file: called with it, the file to write (others may accompany it), the format's config, and a
#: progress callback; returns what the file was built with and what it needs on a device, as JSON values.
Compiler: TypeAlias = Callable[[Artifact, Path, Any, Watch], dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Needs:
    """A package that building a format requires, and the extra that installs it."""

    module: str
    extra: str


@dataclass(frozen=True, kw_only=True)
class Format:
    """A format that a checkpoint can be exported to.

    Attributes:
        help: Description in a few words.
        suffix: Suffix of its files.
        config: Class of its config.
        precisions: Precisions that it supports.
        needs: Packages that build it, besides torch and onnx.
        gpu: Whether building it requires an NVIDIA GPU.
        cuda: Whether it runs on NVIDIA GPUs only, which requires cuda-bindings: a system's TensorRT does not bring it.
        foreign: Whether it may be built for other GPUs than this machine's.
        compiler: ``module:function`` of its :data:`Compiler`; None for ONNX itself.
        sources: For each precision, that of the ONNX file to compile, where it differs.
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
        proven="tested on CPUs",
    ),
    "openvino": Format(
        help="OpenVINO IR: for CPUs, the fastest where they compute in bf16, fp16 or int8",
        suffix=".xml",
        config=OpenVINOConfig,
        needs=(Needs(module="openvino", extra="openvino"),),
        compiler="petseg_export.openvino:compile_openvino",
        # In an IR, fp16 is only how weights are stored; OpenVINO runs an fp16 graph at half the speed on CPUs.
        sources={"fp16": "fp32"},
        proven="tested on CPUs",
    ),
    "trt": Format(
        help="TensorRT engine: for NVIDIA GPUs, built on the GPU that runs it",
        suffix=".engine",
        config=TensorRTConfig,
        needs=(Needs(module="tensorrt", extra="trt"),),
        gpu=True,
        cuda=True,
        compiler="petseg_export.tensorrt:compile_tensorrt",
        proven="not tested: never built or run by us",
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
    """Look up the name and the format that a config belongs to.

    Raises:
        TypeError: It is not the config of a format.
    """
    for name, form in FORMATS.items():
        if form.config is type(config):
            return name, form
    raise TypeError(f"{type(config).__name__} is not the config of a format: use OnnxConfig, OpenVINOConfig, ...")


def why_not(form: Format) -> EngineError | MissingExtra | None:
    """The reason why this machine cannot build a format, with the remedy; None if it can."""
    for need in (*form.needs, Needs(module="torch", extra="export"), Needs(module="onnxscript", extra="export")):
        if importlib.util.find_spec(need.module) is None:
            return MissingExtra(f"{need.module} is not installed: {install(need.extra)}")
    if form.gpu and not host.nvidia_gpus():
        why = host.driver_trouble() or "no NVIDIA GPU here"
        return EngineError(
            f"{why}; an engine must be built on the GPU that will run it, so export to ONNX here and "
            "compile that file there (or use trt-rtx, whose engines can be built on any machine)"
        )
    if form.cuda and host.nvidia_gpus() and not _cuda_bindings():  # else the export fails after minutes of building
        return MissingExtra(f"cuda-bindings is not installed; the parity test needs it: pip install {bindings()}")
    return None


def _cuda_bindings() -> bool:
    return bool(importlib.util.find_spec("cuda") and importlib.util.find_spec("cuda.bindings"))


def check(config: ExportConfig) -> None:
    """Check that this machine can do the requested export; imports nothing heavy, or only TensorRT for RTX.

    Raises:
        MissingExtra: A required package is not installed.
        EngineError: A required GPU is missing, or TensorRT for RTX does not know a requested compute capability;
            EngineMissing: no engine for the parity test is installed.
        UsageError: The suffix or the precision is not one of the format's, int8 has no data, or an option has no
            effect.
    """
    name, form = format_of(config)
    _check_applies(config)
    if config.output is not None and config.output.suffix != form.suffix:
        raise UsageError(f"{config.output}: {name} files end in {form.suffix}; rename it, or choose another --format")
    if config.precision not in form.precisions:
        raise UsageError(f"{name} supports {', '.join(form.precisions)}, not {config.precision}")
    if error := why_not(form):
        raise type(error)(f"{name}: {error}")
    if isinstance(config, TensorRTRTXConfig) and config.compute_capabilities:
        known_targets(imported(RTX.module, RTX), config.compute_capabilities)
    if config.precision == "int8" and not (isinstance(config, CompiledConfig) and config.onnx):
        if (config.quantize.data or config.data) is None:
            raise UsageError("int8 is calibrated and evaluated on labelled photos: give their folder with --data")
        if importlib.util.find_spec("onnxruntime") is None:
            raise MissingExtra(f"int8 is calibrated in onnxruntime, which is not installed: {install('cpu')}")
    for backend in config.backends:
        _check_engine(name, backend, config.device)


def _check_applies(config: ExportConfig) -> None:
    """Reject options that would silently have no effect."""
    given = isinstance(config, CompiledConfig) and config.onnx is not None
    if config.quantize != QuantizeConfig() and (config.precision != "int8" or given):
        reason = "--onnx is compiled unchanged" if given else f"the precision is {config.precision}"
        raise UsageError(f"int8 options (--int8-...) have no effect: {reason}")
    if config.split != ExportConfig().split and config.data is None:
        raise UsageError(f"split {config.split} needs labelled photos: give their folder with --data")
    if isinstance(config, EngineConfig) and not given:
        check_limits(config, batch=config.batch, dynamic_size=config.dynamic_size)


def check_limits(config: EngineConfig, *, batch: int, dynamic_size: bool) -> None:
    """Reject limits for an axis of the graph that is not dynamic.

    Args:
        config: Has ``max_batch`` and ``max_size``.
        batch: Batch of the graph; 0: dynamic.
        dynamic_size: Whether height and width of the graph are dynamic.

    Raises:
        UsageError: Names the limit.
    """
    if batch and config.max_batch != EngineConfig().max_batch:
        raise UsageError(f"max_batch needs a graph with a dynamic batch, and this one has a batch of {batch}")
    if config.max_size and not dynamic_size:
        remedy = "omit it, or export that file again with --dynamic-size" if config.onnx else "add --dynamic-size"
        graph = f", and that of {config.onnx} is fixed" if config.onnx else ""
        raise UsageError(f"max_size needs a graph of dynamic size{graph}: {remedy}")


def _check_engine(name: str, backend: str, device: str) -> None:
    """Check that the parity test of a format can run in an engine and on a device."""
    wanted = None if device == "auto" else Device.parse(device)
    lines = choices(name, backend, wanted, what=name)
    if wanted and wanted.kind == "cuda" and not host.nvidia_gpus():
        raise EngineError(f"{name}: {wanted} is not available: {host.no_gpu()}")
    entries = {line.engine: ENGINES[line.engine] for line in lines}.values()
    if not any(importlib.util.find_spec(entry.module) for entry in entries):
        remedies = " or ".join(dict.fromkeys(install(entry.extra) for entry in entries))
        raise EngineMissing(f"{name}: the parity test needs an engine that runs such files: {remedies}")
