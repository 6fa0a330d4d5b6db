"""The formats as data; read before anything heavy is imported."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

__all__ = ["FORMATS", "Format"]


@dataclass(frozen=True, kw_only=True)
class Format:
    """One format that a checkpoint can be exported to.

    Attributes:
        suffix: Of its files.
        exporter: ``module:function`` that takes (checkpoint, output, photos, config) and returns a receipt.
        config: ``module:class`` of that function's config.
        help: What it is, in a few words.
    """

    suffix: str
    exporter: str
    config: str
    help: str


FORMATS: Final = {
    "onnx": Format(
        suffix=".onnx",
        exporter="petseg_export.onnx:export_onnx",
        config="petseg_export.onnx:OnnxConfig",
        help="ONNX, float32: runs in ONNX Runtime, and every other format is compiled from it",
    ),
}
