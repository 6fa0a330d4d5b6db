"""A model file is opened only if it is petseg's, whole, and keeps the contract; whatever is wrong names the file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import onnx
import pytest
from onnx import TensorProto, helper
from PIL import Image

from petseg_runtime.artifact import PROVENANCE_KEY, RECEIPT_KEY, default_model, open_artifact, sample_photos
from petseg_runtime.errors import ModelError
from petseg_runtime.spec import SPEC_KEY, ModelSpec

Tensors: TypeAlias = list[tuple[str, int, list[int | str]]]
Make: TypeAlias = Callable[..., Path]

SPEC = ModelSpec(name="toy", height=16, width=32, threshold=0.3, cutout_threshold=0.2)
IMAGE: tuple[str, int, list[int | str]] = ("image", TensorProto.UINT8, ["N", 16, 32, 3])
PROBABILITY: tuple[str, int, list[int | str]] = ("probability", TensorProto.UINT8, ["N", 16, 32])


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Writes an ONNX file that keeps the contract, but for what the test asks to be otherwise."""

    def write(inputs: Tensors | None = None, outputs: Tensors | None = None, **metadata: str | None) -> Path:
        graph = helper.make_graph(
            [helper.make_node("Identity", ["image"], ["probability"])],
            "toy",
            [helper.make_tensor_value_info(*tensor) for tensor in ([IMAGE] if inputs is None else inputs)],
            [helper.make_tensor_value_info(*tensor) for tensor in ([PROBABILITY] if outputs is None else outputs)],
        )
        model = helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 20)])
        values = {"spec": SPEC.to_json(), "provenance": '{"data": "pets"}', "receipt": '{"passed": true}', **metadata}
        helper.set_model_props(model, {f"petseg.{key}": text for key, text in values.items() if text is not None})
        path = tmp_path / "some model.onnx"
        onnx.save(model, path)
        return path

    return write


def refused(path: Path) -> str:
    """The message with which a file is refused; it must be one line that begins with the file."""
    with pytest.raises(ModelError) as caught:
        open_artifact(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert len(message.splitlines()) == 1
    return message.removeprefix(f"{path}: ")


def test_what_was_written_into_a_file_is_read_back(make: Make) -> None:
    path = make()
    artifact = open_artifact(path)
    assert artifact.path == path
    assert artifact.spec == SPEC
    assert artifact.provenance == {"data": "pets"}
    assert artifact.receipt == {"passed": True}
    assert artifact.onnx.opset == 20
    assert artifact.onnx.size == path.stat().st_size


def test_provenance_and_receipt_may_be_absent(make: Make) -> None:
    artifact = open_artifact(make(provenance=None, receipt=None))
    assert artifact.provenance == artifact.receipt == {}


def test_the_keys_are_those_that_files_in_the_field_carry() -> None:
    assert (SPEC_KEY, PROVENANCE_KEY, RECEIPT_KEY) == ("petseg.spec", "petseg.provenance", "petseg.receipt")


def test_a_foreign_onnx_file_is_said_to_be_foreign(make: Make) -> None:
    assert "not one that petseg exported" in refused(make(spec=None))


@pytest.mark.parametrize(
    ("broken", "named"),
    [
        pytest.param({"inputs": [("picture", *IMAGE[1:])]}, "picture", id="input-name"),
        pytest.param({"inputs": [IMAGE, ("mean", *IMAGE[1:])]}, "image, mean", id="two-inputs"),
        pytest.param({"inputs": []}, "inputs are none", id="no-input"),
        pytest.param({"inputs": [("image", TensorProto.FLOAT, IMAGE[2])]}, "float32", id="input-dtype"),
        pytest.param({"inputs": [("image", TensorProto.INT8, IMAGE[2])]}, "int8", id="input-signed"),
        pytest.param({"inputs": [(*IMAGE[:2], ["N", 3, 16, 32])]}, "3, 16, 32", id="input-channels-first"),
        pytest.param({"inputs": [(*IMAGE[:2], ["N", 32, 16, 3])]}, "32, 16, 3", id="input-turned"),
        pytest.param({"inputs": [(*IMAGE[:2], ["N", 16, 32, 4])]}, "16, 32, 4", id="input-four-channels"),
        pytest.param({"inputs": [(*IMAGE[:2], [16, 32, 3])]}, "16, 32, 3", id="input-without-batch"),
        pytest.param({"inputs": [(*IMAGE[:2], ["N", "H", "W", 3])]}, "H", id="input-dynamic"),
        pytest.param({"outputs": [("mask", *PROBABILITY[1:])]}, "mask", id="output-name"),
        pytest.param({"outputs": [PROBABILITY, ("logits", *PROBABILITY[1:])]}, "logits", id="two-outputs"),
        pytest.param({"outputs": []}, "outputs are none", id="no-output"),
        pytest.param({"outputs": [("probability", TensorProto.FLOAT, PROBABILITY[2])]}, "float32", id="output-dtype"),
        pytest.param({"outputs": [(*PROBABILITY[:2], ["N", 16, 16])]}, "16, 16", id="output-size"),
        pytest.param({"outputs": [(*PROBABILITY[:2], ["N", 1, 16, 32])]}, "1, 16, 32", id="output-channel"),
    ],
)
def test_a_graph_that_breaks_the_contract_is_refused_with_what_was_found(
    make: Make, broken: dict[str, Tensors], named: str
) -> None:
    message = refused(make(**broken))
    assert named in message
    assert "expected" in message
    assert ("output" if "outputs" in broken else "input") in message


@pytest.mark.parametrize("key", ["spec", "provenance", "receipt"])
@pytest.mark.parametrize(
    "text", ["", "{", "[1]", "null", '"text"', "7", "[" * 100_000], ids=lambda text: text[:6] or "empty"
)
def test_damaged_json_is_refused(make: Make, key: str, text: str) -> None:
    assert "JSON" in refused(make(**{key: text}))


def spec_with(**changes: Any) -> str:
    return json.dumps({**json.loads(SPEC.to_json()), **changes})


def test_a_spec_of_a_newer_schema_says_to_upgrade(make: Make) -> None:
    message = refused(make(spec=spec_with(schema_version=2)))
    assert "schema_version 2" in message
    assert "upgrade" in message


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"threshold": float("nan")}, "threshold"),
        ({"cutout_threshold": 1}, "cutout_threshold"),
        ({"height": "16"}, "height"),
        ({"height": 17}, "height"),
        ({"resize": "letterbox"}, "letterbox"),
    ],
)
def test_a_spec_that_cannot_be_honoured_names_the_file_and_the_field(
    make: Make, changes: dict[str, Any], named: str
) -> None:
    assert named in refused(make(spec=spec_with(**changes)))


def test_a_spec_of_another_size_than_the_graph_is_refused(make: Make) -> None:
    assert "[N, 16, 48, 3] is expected" in refused(make(spec=spec_with(width=48)))


def test_what_is_no_onnx_file_is_refused(tmp_path: Path) -> None:
    empty, photo, folder = tmp_path / "empty.onnx", tmp_path / "photo.onnx", tmp_path / "folder.onnx"
    empty.touch()
    Image.new("RGB", (8, 8)).save(photo, format="JPEG")
    folder.mkdir()
    for path in (empty, photo, folder, tmp_path / "missing.onnx"):
        assert refused(path)


def test_a_truncated_model_is_refused(make: Make) -> None:
    path = make()
    path.write_bytes(path.read_bytes()[:-40])
    refused(path)


def test_the_model_that_ships_keeps_the_contract() -> None:
    artifact = open_artifact(default_model())
    assert artifact.spec.name
    assert artifact.receipt["passed"] is True
    assert artifact.provenance


def test_sample_photos_ship_sorted() -> None:
    photos = sample_photos()
    assert len(photos) >= 3
    assert photos == sorted(photos)
    assert all(photo.is_file() for photo in photos)
