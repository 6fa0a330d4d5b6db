"""A checkpoint as an ONNX file: exported, described, proven, and only then put in its place."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import onnx
import torch
from onnx import checker

from petseg import checkpoint
from petseg.evaluate import torch_run
from petseg.model import AttentionUNet
from petseg_export import parity
from petseg_export.deploy import DeployedUNet
from petseg_runtime import __version__
from petseg_runtime.artifact import INPUT, OUTPUT, PROVENANCE_KEY, RECEIPT_KEY, open_artifact
from petseg_runtime.engines.registry import load_engine
from petseg_runtime.errors import CheckpointError, DataError, ModelError, OutputError, ParityError
from petseg_runtime.files import replacing
from petseg_runtime.onnx_metadata import with_metadata
from petseg_runtime.spec import SPEC_KEY, ModelSpec

__all__ = ["OPSET", "OnnxConfig", "export_onnx", "graph_bytes"]

#: Opset 20: every operator of the network as today's engines know it.
OPSET: Final = 20


@dataclass(frozen=True, kw_only=True)
class OnnxConfig:
    """How an ONNX file is made.

    Attributes:
        name: What the model is called in its specification.
        height: Input height; None: the checkpoint's training size.
        width: Input width; likewise.
        notes: Kept in the file's provenance as they are (measured metrics, for example). JSON values.
    """

    name: str = "petseg attention U-Net"
    height: int | None = None
    width: int | None = None
    notes: dict[str, Any] | None = None


def export_onnx(path: Path, output: Path, photos: Sequence[Path], config: OnnxConfig | None = None) -> parity.Receipt:
    """Turn a checkpoint into an ONNX file with its specification, provenance and parity receipt inside.

    Args:
        path: The checkpoint.
        output: Where the file goes; it appears there only when it has passed.
        photos: Real photos for the parity test.
        config: How it is made.

    Returns:
        The receipt that is also in the file.

    Raises:
        CheckpointError: The checkpoint cannot be used.
        ModelError: The network does not take that height and width.
        DataError: The notes would replace what the provenance says by itself.
        ParityError: The file does not do what the checkpoint does; nothing is left at ``output``.
        OutputError: It cannot be written.
    """
    config = config or OnnxConfig()
    model, loaded = checkpoint.load_model(path)
    spec = _spec(path, loaded, config)
    data = graph_bytes(model, spec)
    metadata = {SPEC_KEY: spec.to_json(), PROVENANCE_KEY: json.dumps(_provenance(path, loaded, config))}
    try:
        with replacing(output) as beside:
            beside.write_bytes(with_metadata(data, metadata))
            receipt = prove(model, beside, photos)
            metadata[RECEIPT_KEY] = json.dumps(receipt.as_dict())
            beside.write_bytes(with_metadata(data, metadata))
    except OSError as error:
        raise OutputError(f"{output}: cannot be written ({error.strerror or error})") from error
    return receipt


def prove(model: AttentionUNet, file: Path, photos: Sequence[Path]) -> parity.Receipt:
    """Compare a file, in the engine that will run it, with the network it was made from.

    Raises:
        ParityError: Its names, shapes or values are not the network's.
    """
    try:
        artifact = open_artifact(file)
    except ModelError as error:
        raise ParityError(str(error)) from error
    with load_engine(artifact) as engine:
        receipt = parity.compare(torch_run(model), engine.run, engine.describe(), photos, artifact.spec)
    parity.require(receipt, artifact.spec)
    return receipt


def graph_bytes(model: AttentionUNet, spec: ModelSpec) -> bytes:
    """The deployed network as a serialised ONNX graph without metadata; any batch size, fixed height and width."""
    example = torch.zeros(2, spec.height, spec.width, 3, dtype=torch.uint8)
    with _quiet():
        program = torch.onnx.export(
            DeployedUNet(model),
            (example,),
            dynamo=True,
            input_names=[INPUT],
            output_names=[OUTPUT],
            opset_version=OPSET,
            dynamic_shapes={"image": {0: torch.export.Dim("N", min=1, max=4096)}},
            external_data=False,
            verbose=False,
        )
    assert program is not None
    proto = program.model_proto
    _strip(proto)
    checker.check_model(proto, full_check=True)
    return proto.SerializeToString()  # type: ignore[no-any-return]


def _strip(proto: onnx.ModelProto) -> None:
    """Remove the exporter's notes about Python source lines and internal shapes: they hold paths of this machine."""
    del proto.metadata_props[:]
    proto.doc_string = ""
    proto.graph.doc_string = ""
    del proto.graph.metadata_props[:]
    del proto.graph.value_info[:]
    for node in proto.graph.node:
        node.doc_string = ""
        del node.metadata_props[:]
    for tensor in (*proto.graph.initializer, *proto.graph.input, *proto.graph.output):
        tensor.doc_string = ""
        del tensor.metadata_props[:]


def _spec(path: Path, loaded: checkpoint.Checkpoint, config: OnnxConfig) -> ModelSpec:
    raw = loaded.meta.get("spec")
    if not isinstance(raw, dict):
        raise CheckpointError(
            f"{path}: no input size and thresholds in it (it is the state of a run): export the best.safetensors "
            "beside it"
        )
    asked: dict[str, Any] = {"height": config.height, "width": config.width, "name": config.name}
    try:
        return ModelSpec(**{**raw, **{key: value for key, value in asked.items() if value is not None}})
    except TypeError as error:  # a field that is missing, unknown, or no number
        raise CheckpointError(f"{path}: its specification is damaged ({error})") from error


def _provenance(path: Path, loaded: checkpoint.Checkpoint, config: OnnxConfig) -> dict[str, Any]:
    meta = loaded.meta
    own = {
        "schema_version": 1,
        "checkpoint": path.name,
        "checkpoint_sha256": loaded.sha256,
        "model": asdict(loaded.model_config),
        "data": meta.get("data", {}),
        "validation": {k: round(v, 4) for k, v in meta.get("validation", {}).items() if k.startswith("val_")},
        "training": meta.get("provenance", {}),
        "versions": {**meta.get("versions", {}), "petseg_export": __version__, "onnx": onnx.__version__},
    }
    notes = config.notes or {}
    if taken := sorted(own.keys() & notes.keys()):
        raise DataError(f"the notes may not replace what the file says of itself: {', '.join(taken)}")
    return {**own, **notes}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter prints its progress and warns about its own internals; its errors still come through."""
    root = logging.getLogger("torch.onnx")
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        root.setLevel(level)
