"""The edge network, with its strided stem and rounded-up level, in every export that the published one has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import helper

from petseg.checkpoint import load_model, save_checkpoint
from petseg.config import TrainConfig, to_dict
from petseg.data import Split, find, read_pair
from petseg.losses import bce_dice
from petseg.model import AttentionUNet, AttentionUNetConfig, normalize
from petseg.reference import torch_run
from petseg_export import OnnxConfig, OpenVINOConfig, QuantizeConfig, TensorRTRTXConfig, build, export
from petseg_export.deploy import DeployedUNet
from petseg_export.onnx import _pad_small_poolings
from petseg_runtime import images
from petseg_runtime.artifact import open_artifact
from petseg_runtime.engines.registry import load_engine
from petseg_runtime.spec import ModelSpec

pytestmark = pytest.mark.usefixtures("known_graph")

#: The fifth halving has an input of 3 x 3: it rounds up, and the decoder crops a row and a column.
SIZE = 48
STEPS = 60
CONFIG = AttentionUNetConfig(width=4, stem="strided", ungated=(1,))
QUANTIZE = QuantizeConfig(photos=6, judges=6, methods=("minmax",))


@pytest.fixture(scope="module")
def edge(oxford_root: Path, meta: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that finds the ellipses, with a quarter of the photos for validation."""
    pairs = [read_pair(pair) for pair in find(oxford_root, Split.TRAINVAL)]
    photos = torch.from_numpy(np.stack([images.to_model(photo, SIZE, SIZE) for photo, _ in pairs]))
    pets = [images.to_model(np.repeat((mask == 1)[..., None] * np.uint8(255), 3, 2), SIZE, SIZE) for _, mask in pairs]
    target = torch.from_numpy(np.stack(pets))[..., 0].unsqueeze(1) / 255
    torch.manual_seed(0)
    model = AttentionUNet(CONFIG).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(STEPS):
        chosen = torch.randperm(len(photos))[:8]
        loss = bce_dice(model(normalize(photos[chosen])), target[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    path = tmp_path_factory.mktemp("edge") / "best.safetensors"
    about = {
        "model": to_dict(TrainConfig(model=CONFIG))["model"],
        "spec": {**meta["spec"], "height": SIZE, "width": SIZE},
        "config": {"data": {"val_fraction": 0.25, "split_seed": 7}},
    }
    save_checkpoint(path, model.eval().state_dict(), {**meta, **about})
    return path


@pytest.fixture(scope="module")
def int8(edge: Path, oxford_root: Path, tracer: Any, tmp_path_factory: pytest.TempPathFactory) -> build.Exported:
    file = tmp_path_factory.mktemp("edge-int8") / "edge.onnx"
    backends = ("onnxruntime", "openvino")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "graph_bytes", tracer)
        return export(
            edge, OnnxConfig(output=file, precision="int8", data=oxford_root, quantize=QUANTIZE, backends=backends)
        )


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_the_onnx_file_passes_in_both_engines(precision: str, edge: Path, oxford_root: Path, tmp_path: Path) -> None:
    config = OnnxConfig(
        output=tmp_path / "x.onnx",
        precision=precision,
        data=oxford_root / "images",
        backends=("onnxruntime", "openvino"),
    )
    done = export(edge, config)
    assert done.receipt.passed
    assert {row.engine.split()[0] for row in done.receipt.rows} == {"onnxruntime", "openvino"}
    operators = {node.op_type for node in onnx.load(done.path).graph.node}
    assert {"DepthToSpace", "Slice"} <= operators, "the head and the rounded level"
    assert open_artifact(done.path).provenance["model"] == to_dict(TrainConfig(model=CONFIG))["model"]


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_a_dynamic_size_graph_matches_the_network(
    engine: str, edge: Path, oxford_root: Path, tmp_path: Path, random_images: Any
) -> None:
    """At a side of 16, the input of the last pooling is a single pixel, which OpenVINO rejects with ceil_mode."""
    config = OnnxConfig(
        output=tmp_path / "x.onnx", data=oxford_root / "images", dynamic_size=True, photos=2, backends=(engine,)
    )
    assert export(edge, config).receipt.passed
    network = torch_run(load_model(edge)[0])
    with load_engine(open_artifact(tmp_path / "x.onnx"), engine, threads=1, exact=True) as loaded:
        for size in ((48, 80), (16, 16), (16, 48), (48, 16), (64, 64)):
            batch = random_images(2, *size)
            assert np.abs(loaded.run(batch).astype(int) - network(batch)).max() <= 1


def test_only_poolings_of_possibly_one_pixel_are_rewritten(edge: Path) -> None:
    model, _ = load_model(edge)
    for dynamic in (False, True):  # the graphs that are traced above
        spec = ModelSpec(name="x", height=SIZE, width=SIZE, dynamic_size=dynamic)
        proto = onnx.load_from_string(build.graph_bytes(DeployedUNet(model), spec))
        pools = [{a.name: a for a in node.attribute} for node in proto.graph.node if node.op_type == "MaxPool"]
        assert [pool["ceil_mode"].i for pool in pools] == [0, 0, 0, not dynamic]
        assert [any(pool["pads"].ints) for pool in pools] == [False, False, False, dynamic]


@pytest.mark.parametrize(
    ("sides", "rounds"),
    [((2, 2), 1), ((3, 2), 1), ((2, 1), 0), ((1, 3), 0), ((1, 1), 0), (("h", 4), 0), ((4, "w"), 0), (None, 0)],
)
def test_a_pooling_is_rewritten_where_a_side_may_be_one_pixel(sides: Any, rounds: int) -> None:
    """Also where the graph does not state the sides."""
    inside = [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1, 1, *sides])] if sides else []
    window = {"kernel_shape": [2, 2], "strides": [2, 2], "pads": [0, 0, 0, 0]}
    nodes = [
        helper.make_node("Relu", ["image"], ["x"]),
        helper.make_node("MaxPool", ["x"], ["rounded"], ceil_mode=1, **window),
        helper.make_node("MaxPool", ["x"], ["exact"], ceil_mode=0, **window),
    ]
    proto = helper.make_model(helper.make_graph(nodes, "poolings", [], [], value_info=inside))
    _pad_small_poolings(proto)
    _, rounded, exact = ({a.name: helper.get_attribute_value(a) for a in node.attribute} for node in proto.graph.node)
    assert rounded == {**window, "ceil_mode": rounds, "pads": [0, 0, 0, 0] if rounds else [0, 0, 1, 1]}
    assert exact == {**window, "ceil_mode": 0}


def test_int8_passes_in_both_engines(int8: build.Exported) -> None:
    assert int8.receipt.passed
    assert int8.receipt.quantization is not None
    assert int8.receipt.quantization["layers"] == 32  # one gate less than the published network


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_the_openvino_ir_passes(
    precision: str, edge: Path, int8: build.Exported, oxford_root: Path, tmp_path: Path
) -> None:
    given = int8.path if precision == "int8" else None
    config = OpenVINOConfig(
        output=tmp_path / "x.xml", precision=precision, data=oxford_root / "images", photos=16, onnx=given
    )
    assert export(edge, config).receipt.passed


@pytest.mark.tensorrt
@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_an_rtx_engine_is_built(precision: str, edge: Path, int8: build.Exported, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="needs TensorRT for RTX: pip install 'petseg[rtx]'")
    given = int8.path if precision == "int8" else None
    done = export(edge, TensorRTRTXConfig(output=tmp_path / "x.engine", precision=precision, onnx=given))
    computed = {kind for row in open_artifact(done.path).environment["engine"]["computed"] for kind in row["reads"]}
    assert precision in computed
    assert any("int8 convolutions write float" in note for note in done.notes) == (precision == "int8")
