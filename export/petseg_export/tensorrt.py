"""Compile an ONNX file to a TensorRT engine, with the builder that the runtime also uses to compile at first use."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from petseg_export.config import TensorRTConfig, TensorRTRTXConfig
from petseg_export.registry import Watch
from petseg_runtime.artifact import Artifact
from petseg_runtime.engines.base import Device
from petseg_runtime.engines.tensorrt_build import build, profile_of, timings_slot
from petseg_runtime.engines.tensorrt_library import CUDART, RTX, TRT, imported
from petseg_runtime.errors import EngineError

__all__ = ["compile_tensorrt", "compile_tensorrt_rtx"]


def compile_tensorrt(onnx: Artifact, output: Path, config: TensorRTConfig, watch: Watch, /) -> dict[str, Any]:
    """Write a TensorRT engine for the GPU that the config names: a :data:`petseg_export.registry.Compiler`.

    Returns:
        :attr:`petseg_runtime.engines.tensorrt_build.Built.record`; JSON values.

    Raises:
        EngineMissing: As :func:`petseg_runtime.engines.tensorrt_build.build`; likewise EngineError and ModelError.
    """
    gpu = 0 if config.device == "auto" else Device.parse(config.device).index
    built = build(
        onnx.path.read_bytes(),
        profile_of(onnx.spec, config.max_batch, config.max_size),
        library=TRT,
        timing_cache=config.timing_cache or timings_slot(gpu),
        watch=watch,
        device=gpu,
        activate=functools.partial(_activate, gpu),
    )
    output.write_bytes(built.engine)
    return built.record


def compile_tensorrt_rtx(onnx: Artifact, output: Path, config: TensorRTRTXConfig, watch: Watch, /) -> dict[str, Any]:
    """Write a TensorRT for RTX engine, which needs no GPU; otherwise as :func:`compile_tensorrt`."""
    built = build(
        onnx.path.read_bytes(),
        profile_of(onnx.spec, config.max_batch, config.max_size),
        library=RTX,
        watch=watch,
        compute_capabilities=config.compute_capabilities,
    )
    output.write_bytes(built.engine)
    return built.record


def _activate(gpu: int) -> None:
    """Make a GPU the current device of the calling thread.

    Raises:
        EngineMissing: cuda-bindings is not installed.
        EngineError: CUDA has no such GPU.
    """
    cudart = imported(CUDART, TRT)
    (status,) = cudart.cudaSetDevice(gpu)
    if status != cudart.cudaError_t.cudaSuccess:
        raise EngineError(f"cuda:{gpu} cannot be used to build an engine ({status.name})")
