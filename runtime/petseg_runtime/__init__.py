"""petseg's runtime: runs a pet segmentation model on images and videos, without PyTorch.

>>> from petseg_runtime import Segmenter
>>> Segmenter()("cat.jpg").mask  # doctest: +SKIP

Importing this package turns off the telemetry of ONNX Runtime and OpenVINO, which otherwise report their use to
Microsoft and Google, and keep an identifier in the home folder. Where a program imported one of them before petseg, or
set ORT_DISABLE_TELEMETRY itself, its choice stands.
"""

from __future__ import annotations

import importlib
import os
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from petseg_runtime.artifact import default_model, sample_photos
    from petseg_runtime.errors import EngineError, InputError, ModelError, OutputError, PetsegError, UsageError
    from petseg_runtime.images import Photo
    from petseg_runtime.result import Segmentation
    from petseg_runtime.segmenter import Segmenter
    from petseg_runtime.spec import ModelSpec
    from petseg_runtime.video.stream import Stream

if sys.platform == "win32":
    raise ImportError("petseg does not run on Windows itself; install it in WSL, the Windows Subsystem for Linux")

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # ONNX Runtime reads it when it is imported
# OpenVINO reports every import. No setting of a program prevents that, but without this package it does not report.
sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]

__version__ = "0.1.0"

__all__ = [
    "EngineError",
    "InputError",
    "ModelError",
    "ModelSpec",
    "OutputError",
    "PetsegError",
    "Photo",
    "Segmentation",
    "Segmenter",
    "Stream",
    "UsageError",
    "__version__",
    "default_model",
    "sample_photos",
]

# Imported on first use, so that `petseg --help` and `--version` load neither NumPy nor Pillow.
_HOMES = {
    "EngineError": "errors",
    "InputError": "errors",
    "ModelError": "errors",
    "ModelSpec": "spec",
    "OutputError": "errors",
    "PetsegError": "errors",
    "Photo": "images",
    "Segmentation": "result",
    "Segmenter": "segmenter",
    "Stream": "video.stream",
    "UsageError": "errors",
    "default_model": "artifact",
    "sample_photos": "artifact",
}


if not TYPE_CHECKING:  # a type checker would accept any attribute of the module

    def __getattr__(name: str) -> Any:
        if name in _HOMES:
            return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
