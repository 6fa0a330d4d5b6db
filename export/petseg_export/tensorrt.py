"""An ONNX file as a TensorRT engine; what builds it is the runtime's, which compiles at first use with it as well."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from petseg_export.config import TensorRTConfig, TensorRTRTXConfig
from petseg_runtime.artifact import Artifact
from petseg_runtime.engines import tensorrt_build
from petseg_runtime.engines.tensorrt_build import Profile, Watch
from petseg_runtime.engines.tensorrt_library import RTX, TRT
from petseg_runtime.spec import ModelSpec

__all__ = ["compile_tensorrt", "profile_of"]


def compile_tensorrt(
    onnx: Artifact, output: Path, config: TensorRTConfig, watch: Watch | None = None
) -> dict[str, Any]:
    """Write the engine of an ONNX file.

    Args:
        onnx: The ONNX file.
        output: The engine.
        config: Its class decides between TensorRT and TensorRT for RTX.
        watch: Told about progress.

    Returns:
        :attr:`Built.record`; JSON values.

    Raises:
        EngineMissing: As for :func:`petseg_runtime.engines.tensorrt_build.build`; likewise EngineError and ModelError.
    """
    rtx = isinstance(config, TensorRTRTXConfig)
    built = tensorrt_build.build(
        onnx.path.read_bytes(),
        profile_of(onnx.spec, config),
        library=RTX if rtx else TRT,
        # Touching it in the library for RTX, where it does nothing, is a deprecation warning.
        timing_cache=config.timing_cache or (None if rtx else tensorrt_build.timings_slot()),
        watch=watch,
        compute_capabilities=config.compute_capabilities if isinstance(config, TensorRTRTXConfig) else (),
    )
    output.write_bytes(built.engine)
    return built.record


def profile_of(spec: ModelSpec, config: TensorRTConfig) -> Profile | None:
    """The shapes that an engine is built for; None for a graph without free dimensions."""
    return tensorrt_build.profile_of(spec, config.max_batch, config.max_size)
