"""Small models that keep the contract and whose outputs one line of numpy can predict, and their parity records."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from petseg_runtime.artifact import PROVENANCE_KEY, Artifact, open_artifact, sidecar_of, sidecar_text
from petseg_runtime.parity import Proof, proof_of
from petseg_runtime.spec import SPEC_KEY, ModelSpec

CHECKPOINT = "c0ffee" * 10 + "0000"

Toy: TypeAlias = Callable[..., Artifact]


def write_toy(path: Path, channel: int = 0, op: str = "Gather", *, nodes: Any = None, **spec: Any) -> Artifact:
    """Write a model that keeps the contract; if ``op`` is Gather, it returns channel ``channel`` of the image."""
    expected = ModelSpec(**{"name": "toy", "height": 16, "width": 32, **spec})
    batch = expected.batch or "N"
    size = ("H", "W") if expected.dynamic_size else (expected.height, expected.width)
    graph = helper.make_graph(
        nodes or [helper.make_node(op, ["image", "index"], ["probability"], axis=3)],
        "toy",
        [helper.make_tensor_value_info("image", TensorProto.UINT8, [batch, *size, 3])],
        [helper.make_tensor_value_info("probability", TensorProto.UINT8, [batch, *size])],
        [helper.make_tensor("index", TensorProto.INT64, [], [channel])],
    )
    model = helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 20)])
    provenance = f'{{"checkpoint_sha256": "{CHECKPOINT}"}}'
    helper.set_model_props(model, {SPEC_KEY: expected.to_json(), PROVENANCE_KEY: provenance})
    onnx.save(model, path)
    return open_artifact(path)


def write_blur(path: Path) -> Artifact:
    """Write a 3 x 3 convolution in float32, clipped at 255; computing it in less than float32 changes its output."""
    weight = np.random.default_rng(1).random((1, 3, 3, 3)) * 0.1
    constants = {
        "weight": helper.make_tensor("", TensorProto.FLOAT, weight.shape, weight.ravel().tolist()),
        "axis": helper.make_tensor("", TensorProto.INT64, [1], [1]),
        "low": helper.make_tensor("", TensorProto.FLOAT, [], [0.0]),
        "high": helper.make_tensor("", TensorProto.FLOAT, [], [255.0]),
    }
    node = helper.make_node
    return write_toy(
        path,
        nodes=[
            *(node("Constant", [], [name], value=value) for name, value in constants.items()),
            node("Cast", ["image"], ["float"], to=TensorProto.FLOAT),
            node("Transpose", ["float"], ["planes"], perm=[0, 3, 1, 2]),
            node("Conv", ["planes", "weight"], ["sum"], pads=[1, 1, 1, 1]),
            node("Squeeze", ["sum", "axis"], ["map"]),
            node("Clip", ["map", "low", "high"], ["clipped"]),
            node("Cast", ["clipped"], ["probability"], to=TensorProto.UINT8),
        ],
    )


def write_ir(artifact: Artifact) -> Artifact:
    """Convert an ONNX file to an OpenVINO IR, with its sidecar, in the same folder."""
    openvino = pytest.importorskip("openvino")
    path = artifact.path.with_suffix(".xml")
    openvino.save_model(openvino.Core().read_model(artifact.path), path)
    environment = {"library": "openvino", "version": "2026.1"}
    values = (artifact.spec, artifact.provenance, {"passed": True}, artifact.identity, 0, None, environment)
    sidecar_of(path).write_text(sidecar_text(Artifact(path, "openvino", *values)), encoding="utf-8")
    return open_artifact(path)


def noise(count: int, spec: ModelSpec, seed: int = 0) -> np.ndarray:
    shape = (count, spec.height, spec.width, 3)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def red_proof(spec: ModelSpec, count: int = 4, channel: int = 0) -> Proof:
    """A parity record for the toy: noise, and its red channel as the expected output."""
    images = noise(count, spec)
    names = tuple(f"{index:02d}.png" for index in range(count))
    return Proof(names, images, np.ascontiguousarray(images[..., channel]), CHECKPOINT, "numpy")


@pytest.fixture(scope="session")
def toy() -> Toy:
    """See :func:`write_toy`."""
    return write_toy


@pytest.fixture(scope="session")
def blur() -> Toy:
    """See :func:`write_blur`."""
    return write_blur


@pytest.fixture(scope="session")
def ir() -> Toy:
    """See :func:`write_ir`."""
    return write_ir


@pytest.fixture
def toy_ir(tmp_path: Path) -> Artifact:
    """The toy as an OpenVINO IR."""
    return write_ir(write_toy(tmp_path / "toy.onnx"))


@pytest.fixture(scope="session")
def prove() -> Callable[..., Proof]:
    """See :func:`red_proof`."""
    return red_proof


@pytest.fixture
def proven(tmp_path: Path) -> Artifact:
    """The toy with a parity record of four photos."""
    artifact = write_toy(tmp_path / "toy.onnx")
    proof_of(artifact.path).write_bytes(red_proof(artifact.spec).to_bytes())
    return artifact
