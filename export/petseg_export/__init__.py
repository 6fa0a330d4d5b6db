"""petseg's export: convert a checkpoint to files that devices run, each with a parity receipt.

>>> from petseg_export import OnnxConfig, export
>>> export("best.safetensors", OnnxConfig(precision="fp16")).receipt.passed  # doctest: +SKIP
True
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from petseg_export.config import (
    ExportConfig,
    OnnxConfig,
    OpenVINOConfig,
    QuantizeConfig,
    TensorRTConfig,
    TensorRTRTXConfig,
)

if TYPE_CHECKING:
    from petseg_export.build import Exported, export

__all__ = [
    "ExportConfig",
    "Exported",
    "OnnxConfig",
    "OpenVINOConfig",
    "QuantizeConfig",
    "TensorRTConfig",
    "TensorRTRTXConfig",
    "export",
]


def __getattr__(name: str) -> Any:
    """Import torch only when something is exported, not when a config is made."""
    if name not in ("Exported", "export"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from petseg_export import build

    return getattr(build, name)
