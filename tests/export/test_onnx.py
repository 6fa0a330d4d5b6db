"""The ONNX file: its graph, what it says of itself, and that nothing appears where a proof has failed."""

from __future__ import annotations

import copy
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import checker

from petseg.checkpoint import save_checkpoint
from petseg.evaluate import torch_run
from petseg_export import parity
from petseg_export.deploy import DeployedUNet
from petseg_export.onnx import OnnxConfig, export_onnx, prove
from petseg_runtime import __version__
from petseg_runtime.artifact import PROVENANCE_KEY, RECEIPT_KEY, open_artifact
from petseg_runtime.engines.registry import load_engine
from petseg_runtime.errors import (
    CheckpointError,
    DataError,
    ModelError,
    OutputError,
    ParityError,
    ParityTolerance,
    UnreadableImage,
)
from petseg_runtime.onnx_metadata import with_metadata
from petseg_runtime.spec import SPEC_KEY

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def proto(exported: Any) -> onnx.ModelProto:
    return onnx.load(exported.file)


def random_batch(count: int, height: int, width: int) -> np.ndarray:
    return np.random.default_rng(count).integers(0, 256, (count, height, width, 3), np.uint8)


# ------------------------------------------------------------------------------------------------ the graph


def test_onnx_itself_finds_the_file_valid(proto: onnx.ModelProto) -> None:
    checker.check_model(proto, full_check=True)


def test_the_graph_is_of_opset_20_and_of_onnx_alone(proto: onnx.ModelProto) -> None:
    assert [(entry.domain, entry.version) for entry in proto.opset_import] == [("", 20)]
    assert not proto.functions
    assert {node.domain for node in proto.graph.node} == {""}


def test_the_graph_has_no_batchnorm_and_no_weight_that_nothing_reads(proto: onnx.ModelProto) -> None:
    kinds = {node.op_type for node in proto.graph.node}
    assert "Conv" in kinds
    assert "BatchNormalization" not in kinds
    read = {name for node in proto.graph.node for name in node.input}
    assert {tensor.name for tensor in proto.graph.initializer} <= read


def test_a_cast_is_the_very_first_and_the_very_last_node(proto: onnx.ModelProto) -> None:
    nodes = list(proto.graph.node)
    assert [node for node in nodes if "image" in node.input] == [nodes[0]]
    assert nodes[0].op_type == "Cast"
    assert nodes[-1].op_type == "Cast"
    assert list(nodes[-1].output) == ["probability"]


def test_height_and_width_are_fixed_and_the_batch_is_free(proto: onnx.ModelProto) -> None:
    def shape(tensor: onnx.ValueInfoProto) -> tuple[int, list[int | str]]:
        sizes = tensor.type.tensor_type.shape.dim
        return tensor.type.tensor_type.elem_type, [size.dim_param or size.dim_value for size in sizes]

    (image,), (probability,) = proto.graph.input, proto.graph.output
    kind, (batch, *rest) = shape(image)
    assert (kind, rest) == (onnx.TensorProto.UINT8, [32, 32, 3])
    assert isinstance(batch, str)
    assert shape(probability) == (onnx.TensorProto.UINT8, [batch, 32, 32])


def test_all_arithmetic_is_in_float32(proto: onnx.ModelProto) -> None:
    kinds = {tensor.data_type for tensor in proto.graph.initializer}
    assert onnx.TensorProto.FLOAT in kinds
    assert not kinds & {onnx.TensorProto.DOUBLE, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16}


def test_no_path_of_this_machine_is_anywhere_in_the_file(exported: Any, checkpoint_file: Path) -> None:
    data = exported.file.read_bytes()
    for path in (REPOSITORY, Path.home(), Path(sys.prefix), Path(torch.__file__).parent, checkpoint_file.parent):
        if len(path.parts) > 2:  # "/" or "/root" could occur in the weights by chance
            assert str(path).encode() not in data
    assert b"site-packages" not in data
    proto = onnx.load_from_string(data)
    for tensor in proto.graph.initializer:
        tensor.ClearField("raw_data")  # three letters do occur by chance in half a megabyte of weights
    assert b".py" not in proto.SerializeToString()


# ------------------------------------------------------------------------------------------------ what it says


def test_the_file_opens_and_says_what_the_checkpoint_said(exported: Any, meta: dict[str, Any]) -> None:
    artifact = open_artifact(exported.file)
    spec = json.loads(artifact.spec.to_json())
    assert spec == {**spec, **meta["spec"]}
    assert spec["name"] == OnnxConfig().name
    assert artifact.onnx.opset == 20


def test_the_provenance_leads_back_to_the_checkpoint(
    exported: Any, checkpoint_file: Path, meta: dict[str, Any]
) -> None:
    provenance = open_artifact(exported.file).provenance
    assert provenance["schema_version"] == 1
    assert provenance["checkpoint"] == checkpoint_file.name
    assert provenance["checkpoint_sha256"] == hashlib.sha256(checkpoint_file.read_bytes()).hexdigest()
    assert provenance["model"] == meta["model"]
    assert provenance["data"] == meta["data"]
    assert provenance["validation"] == {"val_iou": 0.9123, "val_dice": 0.9543}
    assert provenance["training"] == meta["provenance"]
    versions = {"petseg": "0.1.0", "torch": "2.0", "petseg_export": __version__, "onnx": onnx.__version__}
    assert provenance["versions"] == versions


def test_the_receipt_in_the_file_is_the_one_that_was_returned(exported: Any, photos: list[Path]) -> None:
    assert exported.receipt.passed
    assert exported.receipt.kind == "full"
    assert exported.receipt.photos == len(photos)
    assert exported.receipt.precision == "f32"
    assert open_artifact(exported.file).receipt == json.loads(json.dumps(exported.receipt.as_dict()))


def test_the_file_carries_nothing_but_the_three_entries(exported: Any) -> None:
    assert set(open_artifact(exported.file).onnx.metadata) == {SPEC_KEY, PROVENANCE_KEY, RECEIPT_KEY}


# ------------------------------------------------------------------------------------------------ what it does


@pytest.mark.parametrize("count", [1, 5])
def test_the_file_does_what_the_network_does_at_any_batch(exported: Any, trained: Any, count: int) -> None:
    batch = random_batch(count, 32, 32)
    with load_engine(open_artifact(exported.file), threads=1) as engine:
        got = engine.run(batch)
    want = torch_run(trained.model)(batch)
    assert got.shape == want.shape == (count, 32, 32)
    assert len(np.unique(want)) > 20
    assert np.abs(got.astype(int) - want).max() <= 1


def test_another_size_than_the_training_size(
    checkpoint_file: Path, trained: Any, photos: list[Path], tmp_path: Path
) -> None:
    receipt = export_onnx(checkpoint_file, tmp_path / "wide.onnx", photos[:3], OnnxConfig(height=16, width=48))
    assert receipt.passed
    assert receipt.kind == "smoke"
    artifact = open_artifact(tmp_path / "wide.onnx")
    assert (artifact.spec.height, artifact.spec.width) == (16, 48)
    assert artifact.spec.threshold == 0.6
    batch = random_batch(2, 16, 48)
    with load_engine(artifact, threads=1) as engine:
        assert np.abs(engine.run(batch).astype(int) - torch_run(trained.model)(batch)).max() <= 1


def test_a_second_export_gives_the_same_bytes_and_notes_leave_the_identity_alone(
    exported: Any, checkpoint_file: Path, photos: list[Path], tmp_path: Path
) -> None:
    """The exporter is deterministic, so whoever has the checkpoint can check a file that was given to them."""
    noted = {"measured": {"iou": 0.9}}
    export_onnx(checkpoint_file, tmp_path / "noted.onnx", photos, OnnxConfig(notes=noted))
    first, second = open_artifact(exported.file), open_artifact(tmp_path / "noted.onnx")
    assert second.provenance == {**first.provenance, **noted}
    assert second.identity == first.identity
    again = with_metadata((tmp_path / "noted.onnx").read_bytes(), first.onnx.metadata)
    assert again == exported.file.read_bytes()


# ------------------------------------------------------------------------------------------------ what is refused


def test_the_state_of_a_run_is_refused_with_the_remedy(trained: Any, photos: list[Path], tmp_path: Path) -> None:
    state = {f"ema/{name}": tensor for name, tensor in trained.model.state_dict().items()}
    save_checkpoint(tmp_path / "last.safetensors", state, {"kind": "training", "model": {"width": 4}})
    with pytest.raises(CheckpointError, match=r"best\.safetensors"):
        export_onnx(tmp_path / "last.safetensors", tmp_path / "out.onnx", photos)
    assert not (tmp_path / "out.onnx").exists()


@pytest.mark.parametrize(
    "spec",
    [{"width": 32}, {"height": 32, "width": 32, "colour": "red"}, {"height": 32, "width": 32, "threshold": "0.5"}],
)
def test_a_checkpoint_whose_spec_is_damaged_is_refused(
    trained: Any, photos: list[Path], tmp_path: Path, meta: dict[str, Any], spec: dict[str, Any]
) -> None:
    save_checkpoint(tmp_path / "odd.safetensors", trained.model.state_dict(), {**meta, "spec": spec})
    with pytest.raises(CheckpointError, match=r"odd\.safetensors"):
        export_onnx(tmp_path / "odd.safetensors", tmp_path / "out.onnx", photos)


@pytest.mark.parametrize(("height", "width"), [(33, 32), (0, 32), (32, -16)])
def test_a_size_that_the_network_does_not_take_is_refused(
    checkpoint_file: Path, photos: list[Path], tmp_path: Path, height: int, width: int
) -> None:
    with pytest.raises(ModelError, match="multiple of 16"):
        export_onnx(checkpoint_file, tmp_path / "out.onnx", photos, OnnxConfig(height=height, width=width))
    assert not list(tmp_path.iterdir())


def test_what_petseg_itself_says_of_a_file_is_not_replaced_by_notes(
    checkpoint_file: Path, photos: list[Path], tmp_path: Path, known_graph: bytes
) -> None:
    with pytest.raises(DataError, match="checkpoint_sha256"):
        export_onnx(checkpoint_file, tmp_path / "out.onnx", photos, OnnxConfig(notes={"checkpoint_sha256": "0" * 64}))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("before", [None, b"the file of an earlier export"])
def test_a_failed_receipt_leaves_nothing_new_at_the_output(
    checkpoint_file: Path,
    photos: list[Path],
    tmp_path: Path,
    known_graph: bytes,
    monkeypatch: pytest.MonkeyPatch,
    before: bytes | None,
) -> None:
    output = tmp_path / "out.onnx"
    if before:
        output.write_bytes(before)
    monkeypatch.setitem(parity.TOLERANCES, "f32", parity.Tolerance(max_difference=-1, min_mask_iou=0.999))
    with pytest.raises(ParityTolerance, match="FAILED"):
        export_onnx(checkpoint_file, output, photos, OnnxConfig())
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == ({"out.onnx": before} if before else {})


def test_an_exporter_that_exports_another_network_is_caught(
    checkpoint_file: Path, photos: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = DeployedUNet.forward
    monkeypatch.setattr(DeployedUNet, "forward", lambda self, image: honest(self, image.flip(3)))  # BGR
    with pytest.raises(ParityTolerance, match="FAILED"):
        export_onnx(checkpoint_file, tmp_path / "out.onnx", photos)
    assert not list(tmp_path.iterdir())


def test_a_photo_that_cannot_be_read_leaves_nothing_at_the_output(
    checkpoint_file: Path, photos: list[Path], tmp_path: Path, known_graph: bytes
) -> None:
    (tmp_path / "broken.jpg").write_bytes(b"no photo")
    with pytest.raises(UnreadableImage, match=r"broken\.jpg"):
        export_onnx(checkpoint_file, tmp_path / "out.onnx", [*photos, tmp_path / "broken.jpg"])
    assert [path.name for path in tmp_path.iterdir()] == ["broken.jpg"]


def test_a_graph_that_breaks_the_contract_is_a_parity_error(exported: Any, trained: Any, tmp_path: Path) -> None:
    proto = onnx.load(exported.file)
    proto.graph.input[0].name = "picture"
    proto.graph.node[0].input[0] = "picture"
    onnx.save(proto, tmp_path / "odd.onnx")
    with pytest.raises(ParityError, match="picture"):
        prove(trained.model, tmp_path / "odd.onnx", [])


def test_a_file_with_other_weights_is_not_proven(exported: Any, trained: Any, photos: list[Path]) -> None:
    other = copy.deepcopy(trained.model)
    with torch.no_grad():
        other.head.bias += 0.1
    assert prove(trained.model, exported.file, photos).passed
    with pytest.raises(ParityTolerance):
        prove(other, exported.file, photos)


@pytest.mark.parametrize("place", ["file/out.onnx", "folder"])
def test_an_output_that_cannot_be_written_is_an_error_of_its_own(
    checkpoint_file: Path, photos: list[Path], tmp_path: Path, known_graph: bytes, place: str
) -> None:
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "folder").mkdir()
    with pytest.raises(OutputError, match="cannot be written"):
        export_onnx(checkpoint_file, tmp_path / place, photos[:2])
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "folder"]


def test_missing_folders_are_made(
    checkpoint_file: Path, photos: list[Path], tmp_path: Path, known_graph: bytes
) -> None:
    assert export_onnx(checkpoint_file, tmp_path / "a" / "b" / "out.onnx", photos[:2]).passed
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["out.onnx"]
