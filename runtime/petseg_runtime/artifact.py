"""A model file as a whole: its specification, where it comes from, and the receipt of its parity test."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from petseg_runtime import onnx_metadata
from petseg_runtime.errors import ModelError
from petseg_runtime.spec import SPEC_KEY, ModelSpec

__all__ = [
    "INPUT",
    "OUTPUT",
    "PROVENANCE_KEY",
    "RECEIPT_KEY",
    "Artifact",
    "default_model",
    "open_artifact",
    "sample_photos",
]

PROVENANCE_KEY: Final = "petseg.provenance"
RECEIPT_KEY: Final = "petseg.receipt"
#: The names of the graph's one input and one output.
INPUT: Final = "image"
OUTPUT: Final = "probability"

_MODELS: Final = Path(__file__).parent / "models"


@dataclass(frozen=True)
class Artifact:
    """An exported model file, read without its engine.

    Attributes:
        path: The file.
        spec: What it expects and returns.
        provenance: Where it comes from: checkpoint digest, training, measured metrics, versions.
        receipt: What its parity test measured; empty if it has none.
        onnx: The file's own header: identity, inputs, outputs, opset.
    """

    path: Path
    spec: ModelSpec
    provenance: dict[str, Any]
    receipt: dict[str, Any]
    onnx: onnx_metadata.OnnxFile


def default_model() -> Path:
    """The model that ships with petseg."""
    return _MODELS / "edge.onnx"


def sample_photos() -> list[Path]:
    """The sample photos that ship with petseg, sorted."""
    return sorted(path for path in (_MODELS / "samples").iterdir() if path.suffix == ".jpg")


def open_artifact(path: Path) -> Artifact:
    """Read what a model file says of itself and hold its graph against the contract.

    Raises:
        ModelError: Missing, damaged, not exported by petseg, or with inputs and outputs other than
            ``image`` uint8 [N, H, W, 3] and ``probability`` uint8 [N, H, W].
    """
    onnx = onnx_metadata.read(path)
    if SPEC_KEY not in onnx.metadata:
        raise ModelError(f"{path}: an ONNX file, but not one that petseg exported (it has no {SPEC_KEY!r} metadata)")
    try:
        spec = ModelSpec.from_json(onnx.metadata[SPEC_KEY])
        provenance = _object(onnx.metadata, PROVENANCE_KEY)
        receipt = _object(onnx.metadata, RECEIPT_KEY)
    except ModelError as error:
        raise ModelError(f"{path}: {error}") from error
    _check_contract(path, onnx, spec)
    return Artifact(path, spec, provenance, receipt, onnx)


def _object(metadata: dict[str, str], key: str) -> dict[str, Any]:
    try:
        value = json.loads(metadata.get(key, "{}"))
    except (ValueError, RecursionError) as error:
        raise ModelError(f"its {key} is not JSON ({error})") from error
    if not isinstance(value, dict):
        raise ModelError(f"its {key} is not a JSON object")
    return value


def _check_contract(path: Path, onnx: onnx_metadata.OnnxFile, spec: ModelSpec) -> None:
    for kind, tensors, name, shape in (
        ("input", onnx.inputs, INPUT, (spec.height, spec.width, 3)),
        ("output", onnx.outputs, OUTPUT, (spec.height, spec.width)),
    ):
        if [tensor.name for tensor in tensors] != [name]:
            found = ", ".join(tensor.name for tensor in tensors) or "none"
            raise ModelError(f"{path}: its {kind}s are {found}; exactly one named {name!r} is expected")
        if tensors[0].dtype != "uint8" or tensors[0].shape[1:] != shape or len(tensors[0].shape) != len(shape) + 1:
            raise ModelError(
                f"{path}: {kind} {name!r} is {tensors[0].dtype} {list(tensors[0].shape)}; "
                f"uint8 [N, {', '.join(map(str, shape))}] is expected"
            )
