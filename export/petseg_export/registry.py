"""The formats as data; what cannot be done here is refused before anything heavy is imported."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from petseg_export.config import (
    CompiledConfig,
    ExportConfig,
    OnnxConfig,
    OpenVINOConfig,
    QuantizeConfig,
    TensorRTConfig,
    TensorRTRTXConfig,
)
from petseg_runtime.engines.registry import ENGINES, RULE
from petseg_runtime.engines.tensorrt_library import bindings
from petseg_runtime.errors import DataError, EngineError, EngineMissing, MissingExtra, ModelError, UsageError
from petseg_runtime.host import nvidia_gpus

__all__ = ["FORMATS", "Format", "Needs", "check", "format_of", "why_not"]


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
        cuda: Whether what runs it on one needs cuda-bindings, which a system's own TensorRT does not bring.
        compiler: ``module:function`` that makes it from ONNX; None for ONNX itself.
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
        compiler="petseg_export.tensorrt:compile_tensorrt",
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
            return MissingExtra(f"{need.module} is not installed: pip install 'petseg[{need.extra}]'")
    if form.gpu and not nvidia_gpus():
        return EngineError(
            "no NVIDIA GPU here: such an engine is built on the GPU that will run it, so export to ONNX here and "
            "compile that file there (or use trt-rtx, whose engines are built anywhere)"
        )
    if form.cuda and nvidia_gpus() and not _cuda_bindings():  # or it would fail after the minutes of building
        return MissingExtra(f"cuda-bindings is not installed, which the parity test needs: pip install {bindings()}")
    return None


def _cuda_bindings() -> bool:
    return bool(importlib.util.find_spec("cuda") and importlib.util.find_spec("cuda.bindings"))


def check(config: ExportConfig) -> None:
    """Refuse what cannot be done here, with the remedy; imports nothing heavy.

    Raises:
        MissingExtra: A package that is needed is not installed.
        EngineError: A GPU that is needed is not there; EngineMissing: no engine for the parity test.
        ModelError: The format does not come in that precision, or an option fights the ONNX file that was given.
        DataError: int8 without labelled data.
        UsageError: A setting has nothing to act on.
    """
    name, form = format_of(config)
    _check_applies(config)
    if config.precision not in form.precisions:
        raise ModelError(f"{name} comes in {', '.join(form.precisions)}, not in {config.precision}")
    if error := why_not(form):
        raise type(error)(f"{name}: {error}")
    if config.precision == "int8" and not (isinstance(config, CompiledConfig) and config.onnx):
        if (config.quantize.data or config.data) is None:
            raise DataError("int8 is calibrated and judged on labelled photos: give a folder of them with --data")
        if importlib.util.find_spec("onnxruntime") is None:
            raise MissingExtra("int8 is calibrated in onnxruntime, which is not installed: pip install 'petseg[cpu]'")
    for backend in config.backends:
        _check_backend(name, backend)


def _check_applies(config: ExportConfig) -> None:
    """Refuse settings that would be passed over in silence."""
    given = isinstance(config, CompiledConfig) and config.onnx is not None
    if config.quantize != QuantizeConfig() and (config.precision != "int8" or given):
        made = "an ONNX file is compiled as it is" if given else f"this is {config.precision}"
        raise UsageError(f"settings of int8 (--int8-...) are of an export that makes int8, and {made}")
    if config.split != ExportConfig().split and config.data is None:
        raise UsageError(f"split {config.split} is of labelled photos: give their folder with --data")
    if not isinstance(config, TensorRTConfig) or given:
        return
    if config.batch and config.max_batch != TensorRTConfig().max_batch:
        raise UsageError(f"max_batch is of a graph that takes any batch, and this one takes {config.batch}")
    if config.max_size and not config.dynamic_size:
        raise UsageError("max_size is of a graph that takes any size: ask for that with --dynamic-size")


def _check_backend(name: str, backend: str) -> None:
    """Refuse an engine that cannot run the parity test of a format."""
    able = {engine: entry for engine, entry in ENGINES.items() if name in entry.formats}
    if backend != "auto" and backend not in able:
        raise EngineError(f"{name}: {backend!r} is no engine that runs such files; there are: auto, {', '.join(able)}")
    # `auto` compiles nothing for a GPU that is not there.
    here = {line.engine for line in RULE if line.kind == "cpu" or nvidia_gpus()}
    entries = [entry for engine, entry in able.items() if backend in ("auto", engine) and engine in here | {backend}]
    if name in ("onnx", "openvino") and not any(importlib.util.find_spec(entry.module) for entry in entries):
        remedies = " or ".join(f"pip install 'petseg[{entry.extra}]'" for entry in entries)
        raise EngineMissing(f"{name}: the parity test needs an engine that runs such files: {remedies}")
