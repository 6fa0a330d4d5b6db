"""Trace a checkpoint's network to an ONNX graph, clean and check it, and write its metadata."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx
import torch
from onnx import checker

from petseg import checkpoint
from petseg_export.config import RESERVED, ExportConfig
from petseg_export.deploy import DeployedUNet
from petseg_runtime import __version__
from petseg_runtime.artifact import INPUT, OUTPUT
from petseg_runtime.errors import CheckpointError, ModelError
from petseg_runtime.spec import STRIDE, ModelSpec

__all__ = ["OPSET", "Session", "graph_bytes", "provenance_of", "scan", "spec_of"]

U8: TypeAlias = npt.NDArray[np.uint8]

#: Opset 20 has every operator of the network in a form that today's engines support.
OPSET: Final = 20


def graph_bytes(deployed: DeployedUNet, spec: ModelSpec) -> bytes:
    """Trace the deployed network to a serialized ONNX graph with the spec's batch and size, without metadata."""
    # Traced at 16, where the deepest level is one pixel, a dynamic height or width would be specialized to a constant.
    height, width = (max(size, 2 * STRIDE) if spec.dynamic_size else size for size in (spec.height, spec.width))
    example = torch.zeros(spec.batch or 2, height, width, 3, dtype=torch.uint8)
    axes: dict[int, Any] = {}
    if not spec.batch:
        axes[0] = torch.export.Dim("N", min=1, max=4096)
    if spec.dynamic_size:
        axes[1] = STRIDE * torch.export.Dim("h", min=1, max=1024)
        axes[2] = STRIDE * torch.export.Dim("w", min=1, max=1024)
    with _quiet():
        program = torch.onnx.export(
            deployed,
            (example,),
            dynamo=True,
            input_names=[INPUT],
            output_names=[OUTPUT],
            opset_version=OPSET,
            dynamic_shapes={"image": axes},
            external_data=False,
            verbose=False,
        )
    assert program is not None
    proto = program.model_proto
    _pad_small_poolings(proto)
    _strip(proto)
    checker.check_model(proto, full_check=True)
    return proto.SerializeToString()  # type: ignore[no-any-return]


def spec_of(loaded: checkpoint.Checkpoint, config: ExportConfig) -> ModelSpec:
    """The specification of the exported file: the checkpoint's, with the options of the config.

    Raises:
        CheckpointError: The checkpoint has no specification, or a damaged one.
    """
    raw = loaded.meta.get("spec")
    if not isinstance(raw, dict):
        raise CheckpointError(
            "no input size and thresholds in it, as in the saved state of a run: export the best.safetensors beside it"
        )
    options = {
        "name": config.name,
        "height": config.height,
        "width": config.width,
        "dynamic_size": config.dynamic_size,
        "batch": config.batch,
        "precision": config.precision,
        "certain_share": config.certain_share,
    }
    try:
        return ModelSpec(**{**raw, **{key: value for key, value in options.items() if value is not None}})
    except (TypeError, ModelError) as error:  # a field that is missing, unknown, not a number, or out of range
        raise CheckpointError(f"its specification is damaged ({error})") from error


def provenance_of(name: str, loaded: checkpoint.Checkpoint, config: ExportConfig) -> str:
    """The provenance of an exported file, as JSON: which checkpoint it is made from, and how that was trained.

    Args:
        name: The name of the checkpoint file.
        loaded: The checkpoint.
        config: Its notes are added.

    Raises:
        CheckpointError: The checkpoint's training metadata is damaged.
    """
    meta = loaded.meta
    try:
        validation = {k: round(v, 4) for k, v in meta.get("validation", {}).items() if k.startswith("val_")}
        versions = {**meta.get("versions", {}), "petseg_export": __version__, "onnx": onnx.__version__}
    except (AttributeError, TypeError) as error:
        raise CheckpointError(f"its training metadata is damaged ({error})") from error
    own = {
        "schema_version": 1,
        "checkpoint": name,
        "checkpoint_sha256": loaded.sha256,
        "model": asdict(loaded.model_config),
        "data": meta.get("data", {}),
        "validation": validation,
        "training": meta.get("provenance", {}),
        "versions": versions,
    }
    assert own.keys() == RESERVED
    return json.dumps({**own, **(config.notes or {})})


def scan(graph: bytes, images: Sequence[U8]) -> dict[str, Any]:
    """Run a graph with all its floating-point activations as outputs, and look for NaN and infinity.

    The uint8 output cannot show them: they become arbitrary bytes.

    Args:
        graph: The ONNX graph.
        images: uint8 [H, W, 3] each.

    Returns:
        ``photos``, ``tensors`` (number of activations), ``non_finite`` (names of activations with NaN or infinity) and
        ``largest`` (largest finite absolute value).

    Raises:
        ModuleNotFoundError: onnxruntime is not installed.
    """
    proto = onnx.shape_inference.infer_shapes(onnx.load_from_string(graph))
    floats = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16)
    inside = [value for value in proto.graph.value_info if value.type.tensor_type.elem_type in floats]
    proto.graph.output.extend(inside)
    names = [value.name for value in inside]
    session = Session(proto.SerializeToString())
    bad: dict[str, None] = {}
    largest = 0.0
    for image in images:
        for name, value in zip(names, session.run(names, image), strict=True):
            finite = np.isfinite(value)
            if not finite.all():
                bad[name] = None
            largest = max(largest, float(np.abs(value[finite]).max(initial=0)))
    return {"photos": len(images), "tensors": len(names), "non_finite": list(bad), "largest": round(largest, 3)}


class Session:
    """A graph in ONNX Runtime on the CPU, run one photo at a time.

    A graph with a fixed batch is changed to a batch of 1, which needs no other change: our nodes do not depend on it.
    """

    def __init__(self, graph: bytes) -> None:
        import onnxruntime  # installed by the `cpu` or `gpu` extra, not by `export`

        proto = onnx.load_from_string(graph)
        proto.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1
        for output in proto.graph.output:
            output.type.tensor_type.ClearField("shape")
        del proto.graph.value_info[:]
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # errors only
        options.intra_op_num_threads = torch.get_num_threads()
        self._session = onnxruntime.InferenceSession(
            proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )

    def run(self, names: Sequence[str], photo: U8) -> list[npt.NDArray[Any]]:
        """Run a photo, uint8 [H, W, 3], and return the named outputs, each [1, ...]."""
        return self._session.run(list(names), {INPUT: photo[None]})  # type: ignore[no-any-return]


def _pad_small_poolings(proto: onnx.ModelProto) -> None:
    """Replace a MaxPool's ``ceil_mode`` by padding of one row and one column, where a side may be one pixel long.

    The output is the same: padding is never the maximum, and beside an even side it lies in no window. OpenVINO rejects
    a window that is larger than the input.
    """
    known = {v.name: [size.dim_value for size in v.type.tensor_type.shape.dim[2:]] for v in proto.graph.value_info}
    for node in proto.graph.node:
        attributes = {attribute.name: attribute for attribute in node.attribute}
        # A dynamic axis has the size 0 here.
        if node.op_type == "MaxPool" and attributes["ceil_mode"].i and min(known.get(node.input[0], [0])) < 2:
            attributes["ceil_mode"].i = 0
            attributes["pads"].ints[:] = [0, 0, 1, 1]


def _strip(proto: onnx.ModelProto) -> None:
    """Remove the exporter's notes on Python source lines and internal shapes: they contain paths of this machine."""
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


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporter's progress and its warnings about its internals; errors still propagate."""
    root = logging.getLogger("torch.onnx")
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        root.setLevel(level)
