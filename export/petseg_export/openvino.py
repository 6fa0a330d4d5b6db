"""Convert an ONNX file to OpenVINO IR: an ``.xml`` with the graph and a ``.bin`` with the weights."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import openvino

from petseg_export.config import OpenVINOConfig
from petseg_export.registry import Watch
from petseg_runtime.artifact import Artifact
from petseg_runtime.errors import ModelError, one_line

__all__ = ["compile_openvino"]


def compile_openvino(onnx: Artifact, output: Path, config: OpenVINOConfig, _: Watch, /) -> dict[str, Any]:
    """Write the IR of an ONNX file: a :data:`petseg_export.registry.Compiler` that reports no progress.

    fp16 is how the weights are stored; the device computes in the precision that it prefers.

    Args:
        onnx: The ONNX file.
        output: The ``.xml`` file; the ``.bin`` file is written beside it.
        config: Its precision is used; an IR is the same for every device.

    Returns:
        What the IR was made with and what it needs; JSON values.

    Raises:
        ModelError: OpenVINO cannot read the graph.
        OSError: OpenVINO cannot write the files.
    """
    try:
        model = openvino.Core().read_model(onnx.path)
    except RuntimeError as error:
        raise ModelError(f"OpenVINO cannot read the graph ({one_line(error)})") from error
    try:
        openvino.save_model(model, output, compress_to_fp16=config.precision == "fp16")
    except RuntimeError as error:
        raise OSError(f"OpenVINO: {one_line(error)}") from error
    return {
        "library": "openvino",
        "version": openvino.__version__.partition("-")[0],
        "platform": f"any that OpenVINO runs on (written on {platform.system()} {platform.machine()})",
        "precision": config.precision,
    }
