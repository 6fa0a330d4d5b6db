"""The ONNX file: its graph in fp32 and fp16, with fixed and dynamic axes, its metadata, and its output."""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, checker, numpy_helper

from petseg.checkpoint import Checkpoint, save_checkpoint
from petseg.config import TrainConfig, to_dict
from petseg.model import AttentionUNetConfig
from petseg.reference import torch_run
from petseg_export import OnnxConfig, build, export
from petseg_export.deploy import DeployedUNet, activation_peaks
from petseg_export.onnx import Session, _quiet, provenance_of, scan, spec_of
from petseg_runtime import __version__, images
from petseg_runtime.artifact import PROVENANCE_KEY, RECEIPT_KEY, open_artifact
from petseg_runtime.engines.registry import load_engine
from petseg_runtime.errors import CheckpointError, ParityTolerance, UsageError
from petseg_runtime.onnx_metadata import with_metadata
from petseg_runtime.spec import SPEC_KEY, ModelSpec

if TYPE_CHECKING:
    from petseg.model import AttentionUNet

pytestmark = pytest.mark.usefixtures("known_graph")

REPOSITORY = Path(__file__).parents[2]
VARIANTS = ["exported", "exported_half", "exported_any"]


@pytest.fixture(params=VARIANTS)
def variant(request: pytest.FixtureRequest) -> Any:
    """Each of the session's ONNX files: fp32, fp16, and fp32 of dynamic size."""
    return request.getfixturevalue(request.param)


@pytest.fixture
def proto(variant: Any) -> onnx.ModelProto:
    return onnx.load(variant.file)


def stored(proto: onnx.ModelProto) -> dict[str, int]:
    """The data types of the initializers, by name."""
    return {tensor.name: tensor.data_type for tensor in proto.graph.initializer}


def shape(tensor: onnx.ValueInfoProto) -> list[int | str]:
    assert tensor.type.tensor_type.elem_type == TensorProto.UINT8
    return [size.dim_param or size.dim_value for size in tensor.type.tensor_type.shape.dim]


def runs_like(file: Path, model: AttentionUNet, batch: np.ndarray, at_most: int = 1) -> None:
    """On a batch, the file agrees with the network in PyTorch, whose output is not constant."""
    with load_engine(open_artifact(file), "onnxruntime", threads=1) as engine:
        got = engine.run(batch)
    want = torch_run(model)(batch)
    assert got.shape == want.shape == batch.shape[:3]
    assert len(np.unique(want)) > 20
    assert np.abs(got.astype(int) - want).max() <= at_most


# ------------------------------------------------------------------------------------------------ the graph


def test_the_onnx_checker_accepts_the_file(proto: onnx.ModelProto) -> None:
    checker.check_model(proto, full_check=True)


def test_the_graph_uses_opset_20_and_standard_operators_only(proto: onnx.ModelProto) -> None:
    assert [(entry.domain, entry.version) for entry in proto.opset_import] == [("", 20)]
    assert not proto.functions
    assert {node.domain for node in proto.graph.node} == {""}


def test_the_graph_has_no_batchnorm_and_no_unused_tensors(proto: onnx.ModelProto) -> None:
    kinds = {node.op_type for node in proto.graph.node}
    assert "Conv" in kinds
    assert not kinds & {"BatchNormalization", "Identity", "Dropout", "Constant"}
    read = {name for node in proto.graph.node for name in node.input} | {out.name for out in proto.graph.output}
    assert {tensor.name for tensor in proto.graph.initializer} <= read
    for node in proto.graph.node:
        assert set(node.output) & read, f"{node.op_type} {node.name} is dead"


def test_the_first_and_last_nodes_are_casts(proto: onnx.ModelProto) -> None:
    nodes = list(proto.graph.node)
    assert [node for node in nodes if "image" in node.input] == [nodes[0]]
    assert [nodes[0].op_type, nodes[1].op_type] == ["Cast", "Transpose"]
    assert [nodes[-2].op_type, nodes[-1].op_type] == ["Squeeze", "Cast"]
    assert list(nodes[-1].output) == ["probability"]


def test_the_file_contains_no_local_path(variant: Any, checkpoint_file: Path) -> None:
    data = variant.file.read_bytes()
    for path in (REPOSITORY, Path.home(), Path(sys.prefix), Path(torch.__file__).parent, checkpoint_file.parent):
        if len(path.parts) > 2:  # "/" or "/root" could occur in the weights by chance
            assert str(path).encode() not in data
    assert b"site-packages" not in data
    proto = onnx.load_from_string(data)
    for tensor in proto.graph.initializer:
        tensor.ClearField("raw_data")  # three letters occur by chance in half a megabyte of weights
    assert b".py" not in proto.SerializeToString()


def test_fp32_computes_only_in_float32(exported: Any) -> None:
    kinds = set(stored(onnx.load(exported.file)).values())
    assert TensorProto.FLOAT in kinds
    assert not kinds & {TensorProto.DOUBLE, TensorProto.FLOAT16, TensorProto.BFLOAT16}


def test_fp16_computes_in_float16_with_float32_at_both_ends(exported_half: Any) -> None:
    proto = onnx.load(exported_half.file)
    kinds = stored(proto)
    weights = {name: kind for name, kind in kinds.items() if name.startswith("network.")}
    assert len(weights) > 50
    assert set(weights.values()) == {TensorProto.FLOAT16}
    assert {name for name, kind in kinds.items() if kind == TensorProto.FLOAT} >= {"scale", "offset"}
    inferred = {
        value.name: value.type.tensor_type.elem_type
        for value in onnx.shape_inference.infer_shapes(proto, strict_mode=True).graph.value_info
    }
    nodes = list(proto.graph.node)
    for node in nodes:
        if node.op_type in ("Conv", "Relu", "MaxPool", "Resize", "Concat"):
            assert inferred[node.output[0]] == TensorProto.FLOAT16
    last = [node for node in nodes if node.op_type == "Sigmoid"][-1]
    first = nodes[2:4]
    assert [node.op_type for node in first] == ["Mul", "Add"], "the normalisation"
    assert {inferred[node.output[0]] for node in (*first, last)} == {TensorProto.FLOAT}
    casts = [node for node in nodes if node.op_type == "Cast"]
    assert len(casts) == 4, "input, to float16, from float16, output; none between layers"


def test_fp16_halves_the_file_size(exported: Any, exported_half: Any) -> None:
    assert exported_half.file.stat().st_size < 0.6 * exported.file.stat().st_size


def test_the_exporters_logger_is_quiet_only_during_the_export() -> None:
    logger = logging.getLogger("torch.onnx")
    level = logger.level

    @_quiet()
    def fail() -> None:
        assert not logger.isEnabledFor(logging.WARNING)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert logger.level == level


# ------------------------------------------------------------------------------------------------ batch and size


def test_by_default_the_size_is_fixed_and_the_batch_dynamic(exported: Any) -> None:
    graph = onnx.load(exported.file).graph
    batch, *rest = shape(graph.input[0])
    assert isinstance(batch, str)
    assert rest == [32, 32, 3]
    assert shape(graph.output[0]) == [batch, 32, 32]


@pytest.mark.parametrize("name", ["exported", "exported_half"])
@pytest.mark.parametrize("count", [1, 5])
def test_the_file_matches_the_network_at_any_batch_size(
    name: str, count: int, trained: Any, random_images: Any, request: pytest.FixtureRequest
) -> None:
    file = request.getfixturevalue(name).file
    runs_like(file, trained.model, random_images(count, 32, 32, count), 1 if name == "exported" else 8)


@pytest.mark.parametrize("size", [(16, 16), (16, 48), (32, 32), (64, 32), (80, 112)])
@pytest.mark.parametrize("count", [1, 3])
def test_one_file_runs_at_any_size_and_batch(
    size: tuple[int, int], count: int, exported_any: Any, trained: Any, random_images: Any
) -> None:
    runs_like(exported_any.file, trained.model, random_images(count, *size))


def test_a_dynamic_size_file_says_so_and_was_tested_at_one_size(exported_any: Any, photos: list[Path]) -> None:
    artifact = open_artifact(exported_any.file)
    assert artifact.spec.dynamic_size
    assert (artifact.spec.height, artifact.spec.width, artifact.spec.batch) == (32, 32, 0)
    assert artifact.receipt["photos"] == len(photos)
    sizes = shape(onnx.load(exported_any.file).graph.input[0])
    assert [isinstance(size, str) for size in sizes] == [True, True, True, False]


def test_a_dynamic_size_file_rejects_sizes_not_divisible_by_16(exported_any: Any, random_images: Any) -> None:
    with (
        load_engine(open_artifact(exported_any.file), threads=1) as engine,
        pytest.raises(UsageError, match="multiple of 16"),
    ):
        engine.run(random_images(1, 40, 32))


def test_a_custom_size_and_batch_can_be_exported(
    checkpoint_file: Path, trained: Any, oxford_root: Path, random_images: Any, tmp_path: Path
) -> None:
    """The graph has a fixed batch of three; the runtime runs any number of photos in it."""
    file = tmp_path / "wide.onnx"
    config = OnnxConfig(output=file, data=oxford_root / "images", photos=3, height=16, width=48, batch=3)
    receipt = export(checkpoint_file, config).receipt
    assert receipt.passed
    assert receipt.kind == "smoke"
    artifact = open_artifact(file)
    assert (artifact.spec.height, artifact.spec.width, artifact.spec.batch) == (16, 48, 3)
    assert artifact.spec.threshold == 0.6
    graph = onnx.load(file).graph
    assert (shape(graph.input[0]), shape(graph.output[0])) == ([3, 16, 48, 3], [3, 16, 48])
    for count in (1, 3, 4):
        runs_like(file, trained.model, random_images(count, 16, 48))


@pytest.mark.parametrize(
    "spec",
    [
        ModelSpec(name="small", height=16, width=48, batch=3),
        # Traced for the next test, too, so of its size, at which the tracer would specialize.
        ModelSpec(name="small", height=16, width=16, batch=3, dynamic_size=True),
    ],
    ids=["fixed size", "dynamic size"],
)
def test_a_fixed_batch_graph_is_scanned_one_photo_at_a_time(
    spec: ModelSpec, exported_any: Any, trained: Any, random_images: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scanning a full batch of copies would multiply the memory of all activations."""
    onnxruntime = pytest.importorskip("onnxruntime")
    photos, asked = list(random_images(2, 16, 48)), []
    run = onnxruntime.InferenceSession.run

    def watched(self: Any, names: list[str], inputs: dict[str, np.ndarray]) -> Any:
        values = run(self, names, inputs)
        asked.append((inputs["image"].shape, {len(value) for value in values}))
        return values

    monkeypatch.setattr(onnxruntime.InferenceSession, "run", watched)
    graphs = exported_any.file.read_bytes(), build.graph_bytes(DeployedUNet(trained.model), spec)
    found = [scan(graph, photos) for graph in graphs]
    assert asked == [((1, 16, 48, 3), {1})] * 4
    assert found[0] == {**found[1], "largest": pytest.approx(found[1]["largest"], rel=1e-5)}


def test_a_dynamic_size_starts_at_16_by_16(
    checkpoint_file: Path, trained: Any, oxford_root: Path, random_images: Any, tmp_path: Path
) -> None:
    """At 16 the deepest level is one pixel, which the tracer would specialize to a constant."""
    file = tmp_path / "tiny.onnx"
    config = OnnxConfig(output=file, data=oxford_root, height=16, width=16, dynamic_size=True, batch=3)
    assert export(checkpoint_file, config).receipt.passed
    spec = open_artifact(file).spec
    assert (spec.height, spec.width, spec.dynamic_size, spec.batch) == (16, 16, True, 3)
    for size in ((16, 16), (16, 64), (48, 32)):
        runs_like(file, trained.model, random_images(2, *size))


# ------------------------------------------------------------------------------------------------ float16's range


def too_large_for_half(model: AttentionUNet, factor: float = 1e5) -> AttentionUNet:
    """The same function with two activations out of float16's range: in an encoder block, and before a gate."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        conv, norm, _, following, *_ = other.down2
        for tensor in (conv.weight, norm.running_mean, norm.bias):
            tensor.mul_(factor)
        following.weight.div_(factor)
        up = other.up1
        for tensor in (up.project.weight, up.project.bias):
            tensor.mul_(factor)
        up.gate.w_g[0].weight.div_(factor)
        up.block[0].weight[:, up.project.out_channels :].div_(factor)
    return other


#: The layers with an input or output out of range.
IN_FLOAT = {"down2.0", "down2.3", "up1.project", "up1.gate.w_g.0", "up1.block.0"}


@pytest.fixture(scope="module")
def large(trained: Any, meta: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("large") / "large.safetensors"
    save_checkpoint(path, too_large_for_half(trained.model).state_dict(), meta)
    return path


def test_layers_that_overflow_float16_stay_in_float32(
    large: Path, trained: Any, oxford_root: Path, tmp_path: Path, photos: list[Path]
) -> None:
    file = tmp_path / "large.onnx"
    done = export(large, OnnxConfig(output=file, precision="fp16", data=oxford_root / "images"))
    assert done.receipt.passed
    assert done.receipt.scan is not None
    assert done.receipt.scan["non_finite"] == []
    assert done.receipt.scan["largest"] > 65504
    kinds = stored(onnx.load(file))
    in_float = {
        name.removeprefix("network.").removesuffix(".conv.weight")
        for name, kind in kinds.items()
        if name.endswith(".weight") and kind == TensorProto.FLOAT
    }
    assert in_float == IN_FLOAT
    assert sum(kind == TensorProto.FLOAT16 for kind in kinds.values()) > 40
    pixels = np.stack([images.to_model(images.read(photo).pixels, 32, 32) for photo in photos[:4]])
    runs_like(file, trained.model, pixels, 8)
    # On most CPUs, ONNX Runtime computes fp16 in float32; PyTorch really computes in float16 here.
    peaks = activation_peaks(too_large_for_half(trained.model), pixels)
    with torch.inference_mode():
        half = DeployedUNet(too_large_for_half(trained.model), peaks.keys() - IN_FLOAT)(torch.from_numpy(pixels))
    want = torch_run(trained.model)(pixels)
    assert np.percentile(np.abs(half.numpy().astype(int) - want), 99) <= 4


def test_overflow_in_a_pure_float16_graph_is_detected_and_named(
    large: Path, oxford_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even if the engine here has no overflow: a device that computes in float16 would have one."""
    monkeypatch.setattr(build, "HALF_LIMIT", float("inf"))
    file = tmp_path / "large.onnx"
    with pytest.raises(ParityTolerance, match=r"NaN or infinity in \S+"):
        export(large, OnnxConfig(output=file, precision="fp16", data=oxford_root / "images"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["exported", "exported_half"])
def test_a_scan_checks_every_activation(name: str, random_images: Any, request: pytest.FixtureRequest) -> None:
    data = request.getfixturevalue(name).file.read_bytes()
    found = scan(data, list(random_images(2, 32, 32)))
    floats = [node for node in onnx.load_from_string(data).graph.node if node.op_type not in ("Cast", "Squeeze")]
    assert found["photos"] == 2
    assert found["tensors"] >= len(floats)
    assert found["non_finite"] == []
    assert 1 < found["largest"] <= 255


def test_a_scan_finds_large_negative_activations(exported: Any, random_images: Any) -> None:
    proto = onnx.load(exported.file)
    (bias,) = (tensor for tensor in proto.graph.initializer if tensor.name == "network.head.bias")
    bias.CopyFrom(numpy_helper.from_array(np.full(1, -1e4, np.float32), bias.name))
    assert scan(proto.SerializeToString(), list(random_images(1, 32, 32)))["largest"] > 9e3


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_scan_names_nonfinite_activations(exported: Any, random_images: Any, value: float) -> None:
    """The uint8 output cannot show it. One channel is enough."""
    proto = onnx.load(exported.file)
    for tensor in proto.graph.initializer:
        if tensor.name == "network.up2.block.0.bias":
            spoilt = numpy_helper.to_array(tensor).copy()
            spoilt[0] = value
            tensor.CopyFrom(numpy_helper.from_array(spoilt, tensor.name))
    found = scan(proto.SerializeToString(), list(random_images(1, 32, 32)))
    behind = next(node for node in proto.graph.node if "network.up2.block.0.bias" in node.input)
    assert found["non_finite"][0] == behind.output[0]


# ---------------------------------------------------------------------------------------------------- metadata


def test_the_file_opens_with_the_checkpoints_specification(exported: Any, meta: dict[str, Any]) -> None:
    artifact = open_artifact(exported.file)
    spec = json.loads(artifact.spec.to_json())
    assert spec == {**spec, **meta["spec"], "precision": "fp32", "batch": 0, "dynamic_size": False}
    assert spec["name"] == OnnxConfig().name
    assert artifact.onnx.opset == 20


@pytest.mark.parametrize(
    ("said", "asked", "written"), [(None, None, None), (0.4, None, 0.4), (None, 0.3, 0.3), (0.4, 0.3, 0.3)]
)
def test_the_found_rule_comes_from_the_checkpoint_or_the_option(
    meta: dict[str, Any], said: float | None, asked: float | None, written: float | None
) -> None:
    loaded = Checkpoint({}, {**meta, "spec": {**meta["spec"], "certain_share": said}}, "0" * 64)
    assert spec_of(loaded, OnnxConfig(certain_share=asked)).certain_share == written


def test_fp16_is_declared_and_tested_with_fp16_tolerances(exported_half: Any) -> None:
    artifact = open_artifact(exported_half.file)
    assert artifact.spec.precision == artifact.receipt["stored"] == "fp16"
    (row,) = artifact.receipt["rows"]
    assert row["precision"] in ("f32", "fp16"), "the precision in which ONNX Runtime computes it depends on the CPU"
    assert row["tolerance"]["p99_difference"] == 4
    assert row["max_difference"] > 0


def test_the_provenance_identifies_the_checkpoint(variant: Any, checkpoint_file: Path, meta: dict[str, Any]) -> None:
    provenance = open_artifact(variant.file).provenance
    assert provenance["schema_version"] == 1
    assert provenance["checkpoint"] == checkpoint_file.name
    assert provenance["checkpoint_sha256"] == hashlib.sha256(checkpoint_file.read_bytes()).hexdigest()
    assert provenance["model"] == to_dict(TrainConfig(model=AttentionUNetConfig(**meta["model"])))["model"]
    assert provenance["data"] == meta["data"]
    assert provenance["validation"] == {"val_iou": 0.9123, "val_dice": 0.9543}
    assert provenance["training"] == meta["provenance"]
    versions = {"petseg": "0.1.0", "torch": "2.0", "petseg_export": __version__, "onnx": onnx.__version__}
    assert provenance["versions"] == versions


def test_the_receipt_in_the_file_equals_the_returned_one(variant: Any, photos: list[Path]) -> None:
    assert variant.receipt.passed
    assert variant.receipt.kind == "full"
    assert variant.receipt.photos == len(photos)
    assert list(variant.receipt.names) == [photo.name for photo in photos]
    artifact = open_artifact(variant.file)
    assert artifact.receipt == json.loads(json.dumps(variant.receipt.as_dict(), allow_nan=False))
    assert artifact.receipt["spec"] == json.loads(artifact.spec.to_json())


def test_the_files_metadata_has_exactly_three_entries(variant: Any) -> None:
    assert set(open_artifact(variant.file).onnx.metadata) == {SPEC_KEY, PROVENANCE_KEY, RECEIPT_KEY}


def test_notes_do_not_change_graph_or_identity(
    exported: Any, checkpoint_file: Path, oxford_root: Path, tmp_path: Path
) -> None:
    """`test_cli` shows that tracing again, in another process, gives the same bytes."""
    noted = {"measured": {"iou": 0.9}}
    config = OnnxConfig(output=tmp_path / "noted.onnx", data=oxford_root / "images", notes=noted)
    export(checkpoint_file, config)
    first, second = open_artifact(exported.file), open_artifact(tmp_path / "noted.onnx")
    assert second.provenance == {**first.provenance, **noted}
    assert second.identity == first.identity
    again = with_metadata((tmp_path / "noted.onnx").read_bytes(), first.onnx.metadata)
    assert again == exported.file.read_bytes()


@pytest.mark.parametrize(
    "spec",
    [
        None,
        "32x32",
        {"width": 32},
        {"height": 32, "width": 32, "colour": "red"},
        {"height": 32, "width": 32, "threshold": "0.5"},
    ],
)
def test_a_checkpoint_with_a_damaged_spec_is_rejected(meta: dict[str, Any], spec: Any) -> None:
    with pytest.raises(CheckpointError, match=r"specification is damaged|no input size"):
        spec_of(Checkpoint({}, {**meta, "spec": spec}, "0" * 64), OnnxConfig())


@pytest.mark.parametrize(
    "damaged", [{"validation": 5}, {"validation": {"val_iou": "high"}}, {"versions": 5}, {"model": 5}]
)
def test_a_checkpoint_with_invalid_training_metadata_is_rejected(meta: dict[str, Any], damaged: dict[str, Any]) -> None:
    loaded = Checkpoint({}, {**meta, **damaged}, "0" * 64)
    with pytest.raises(CheckpointError, match=r"damaged|does not describe its network"):
        provenance_of("odd.safetensors", loaded, OnnxConfig())


# ------------------------------------------------------------------------------------------------ the published width


@pytest.mark.slow
def test_the_published_width_exports_and_passes(
    random_network: Callable[..., AttentionUNet],
    random_images: Any,
    meta: dict[str, Any],
    tracer: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """29 million random weights: the result does not depend on training. Before fp16, fp32 is traced and checked."""
    model = random_network(0, width=64)
    checkpoint, file = tmp_path / "wide.safetensors", tmp_path / "wide.onnx"
    spec = {**meta["spec"], "threshold": 0.5}
    save_checkpoint(checkpoint, model.state_dict(), {**meta, "model": {"width": 64}, "spec": spec})
    graphs: list[bytes] = []

    def kept(deployed: DeployedUNet, spec: ModelSpec) -> bytes:
        graphs.append(tracer(deployed, spec))
        return graphs[-1]

    monkeypatch.setattr(build, "graph_bytes", kept)
    receipt = export(checkpoint, OnnxConfig(output=file, precision="fp16")).receipt
    assert receipt.passed
    assert receipt.scan is not None
    assert receipt.scan["non_finite"] == []
    photos = random_images(1, 32, 32, 1)
    runs_like(file, model, photos, 12)
    single, half = graphs
    assert [len(graph) // 29_000_000 for graph in (single, half)] == [4, 2], "bytes per weight"
    assert scan(single, list(photos))["non_finite"] == []
    (got,) = Session(single).run(["probability"], photos[0])
    assert np.abs(got.astype(int) - torch_run(model)(photos)).max() <= 1
