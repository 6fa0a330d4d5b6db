"""int8: activation ranges, the QDQ graph, its output in the engines, and the layers that stay in float."""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, checker, helper, numpy_helper

from petseg.data import Split, find
from petseg_export import QuantizeConfig, parity
from petseg_export.quantize import (
    BINS,
    LARGEST_BIAS,
    METHODS,
    PROBES,
    SECOND_TRIES,
    Magnitudes,
    Quantized,
    _change_from,
    _divergence,
    _Search,
    calibrate,
    int8_weight,
    judge_on,
    quantize,
    with_int8,
)
from petseg_runtime.errors import DataError, ModelError, ParityTolerance
from petseg_runtime.spec import ModelSpec

SIZE = 32
LAYERS = 35
ONE = QuantizeConfig(methods=("minmax",))


@pytest.fixture(scope="module")
def graph(exported: Any) -> bytes:
    """The float graph, without metadata."""
    proto = onnx.load(exported.file)
    del proto.metadata_props[:]
    return bytes(proto.SerializeToString())


@pytest.fixture(scope="module")
def labelled(oxford_root: Any) -> parity.Photos:
    spec = ModelSpec(name="small", height=SIZE, width=SIZE, threshold=0.5)
    return parity.read(find(oxford_root, Split.TRAINVAL), spec)


@pytest.fixture(scope="module")
def done(graph: bytes, labelled: parity.Photos) -> Quantized:
    return quantize(graph, labelled.images[:8], judge_on(labelled), QuantizeConfig(budget=1.0))


@pytest.fixture(scope="module")
def ranges(graph: bytes, labelled: parity.Photos) -> dict[str, float]:
    return ranges_of(graph, labelled)


def ranges_of(graph: bytes, photos: parity.Photos, method: str = "percentile") -> dict[str, float]:
    seen = calibrate(onnx.load_from_string(graph), photos.images[:8], lambda what, done, total: None)
    return {name: METHODS[method](magnitudes) for name, magnitudes in seen.items()}


def constants(graph: bytes) -> dict[str, np.ndarray]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load_from_string(graph).graph.initializer}


def layers_in_int8(graph: bytes) -> set[str]:
    names = [name.removesuffix(".weight_int8") for name in constants(graph) if name.endswith("_int8")]
    return {name.removeprefix("network.") for name in names}


def all_layers(graph: bytes) -> list[str]:
    weights = [name for name in constants(graph) if name.endswith(".weight")]
    return [name.removeprefix("network.").removesuffix(".weight") for name in weights]


def loses(points: dict[str, float]) -> Callable[[bytes], float]:
    """A judge with a given loss in points for each of these layers in int8, and none for the others."""
    return lambda graph: 0.9 - sum(points.get(layer, 0.0) for layer in layers_in_int8(graph)) / 100


def changed(graph: bytes, change: Callable[[dict[str, np.ndarray]], None]) -> bytes:
    """The graph with some of its constants changed in place."""
    proto = onnx.load_from_string(graph)
    values = {tensor.name: numpy_helper.to_array(tensor).copy() for tensor in proto.graph.initializer}
    change(values)
    for tensor in proto.graph.initializer:
        tensor.CopyFrom(numpy_helper.from_array(values[tensor.name], tensor.name))
    return bytes(proto.SerializeToString())


def run_onnxruntime(graph: bytes, photos: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    return np.concatenate([session.run(None, {"image": photo[None]})[0] for photo in photos]).astype(np.int16)


# --- ranges ---

numbers = st.floats(-1e4, 1e4, width=32).filter(lambda x: x == 0 or abs(x) > 1e-4)


@given(st.lists(st.lists(numbers, min_size=1, max_size=20), min_size=1, max_size=8), st.randoms())
def test_magnitudes_do_not_depend_on_photo_order(batches: list[list[float]], random: Any) -> None:
    one, other, at_once = Magnitudes(), Magnitudes(), Magnitudes()
    shuffled = random.sample(batches, len(batches))
    flat = [value for batch in batches for value in batch]
    for seen, parts in ((one, batches), (other, shuffled), (at_once, [flat])):
        for part in parts:
            seen.add(np.array(part, np.float32))
    values = np.abs(np.array(flat, np.float32))
    for seen in (one, other, at_once):
        assert seen.peak == values.max()
        assert seen.counts.sum() == (values > 0).sum()
        assert np.array_equal(seen.counts, one.counts)
        assert seen.top == one.top
        assert len(seen.counts) == BINS
    if values.any():
        assert one.top / 2 <= one.peak < one.top
        assert one.counts[int(one.peak * BINS / one.top)] > 0


@pytest.mark.parametrize("method", list(METHODS))
@settings(max_examples=25)
@given(values=st.lists(numbers, max_size=30))
def test_a_range_lies_between_zero_and_the_peak(method: str, values: list[float]) -> None:
    seen = Magnitudes()
    seen.add(np.array(values, np.float32))
    assert 0 <= METHODS[method](seen) <= seen.peak
    assert (METHODS[method](seen) > 0) == any(values)


def test_each_calibration_method_treats_outliers_as_documented() -> None:
    seen = Magnitudes()
    seen.add(np.abs(np.random.default_rng(0).normal(size=100_000)).astype(np.float32))
    seen.add(np.array([50.0], np.float32))
    assert METHODS["minmax"](seen) == 50
    assert 3.5 < METHODS["percentile"](seen) < 4.5  # for the normal distribution, it is 3.89
    assert 2.5 < METHODS["entropy"](seen) < 6


def test_entropy_does_not_clip_without_outliers() -> None:
    seen = Magnitudes()
    seen.add(np.random.default_rng(0).uniform(0, 3, 100_000).astype(np.float32))
    assert METHODS["entropy"](seen) == pytest.approx(3, rel=0.05)


def test_a_merge_that_changes_no_count_loses_no_information() -> None:
    """Empty bins stay empty, and the others of a level have its mean."""
    assert _divergence(np.array([4.0, 0.0, 2.0, 2.0]), 4, 2) == pytest.approx(0)
    assert _divergence(np.array([4.0, 0.0, 3.0, 1.0]), 4, 2) > 0.01


def test_zeros_are_ignored_by_calibration() -> None:
    seen, with_zeros = Magnitudes(), Magnitudes()
    values = np.random.default_rng(0).normal(size=1000).astype(np.float32)
    seen.add(values)
    with_zeros.add(np.concatenate([values, np.zeros(10_000, np.float32)]))
    assert [method(seen) for method in METHODS.values()] == [method(with_zeros) for method in METHODS.values()]


@pytest.mark.parametrize("method", list(METHODS))
@pytest.mark.parametrize(
    ("value", "expected"), [(3 + 2**-12, 3 + 2**-12), (1e-20, 0.0)]
)  # a scale as small would be subnormal
def test_equal_magnitudes_are_not_clipped_unless_negligible(method: str, value: float, expected: float) -> None:
    seen = Magnitudes()
    seen.add(np.full(10, value, np.float32))
    assert METHODS[method](seen) == expected


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_an_activation_that_is_not_finite_is_an_error(value: float) -> None:
    with pytest.raises(ModelError, match="NaN or infinite"):
        Magnitudes().add(np.array([1, value], np.float32))


def test_calibration_does_not_retain_activations(
    graph: bytes, labelled: parity.Photos, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: list[weakref.ref[np.ndarray]] = []
    real = onnxruntime.InferenceSession.run

    def run(self: Any, *arguments: Any) -> list[np.ndarray]:
        outputs: list[np.ndarray] = real(self, *arguments)
        alive.extend(weakref.ref(output) for output in outputs)
        return outputs

    most = 0

    def watch(what: str, done: int, total: int) -> None:
        nonlocal most
        assert (what, total) == ("calibrating", 8)
        most = max(most, sum(output() is not None for output in alive))

    monkeypatch.setattr(onnxruntime.InferenceSession, "run", run)
    seen = calibrate(onnx.load_from_string(graph), labelled.images[:8], watch)
    assert len(alive) == 8 * len(seen)
    assert most <= len(seen)  # of the previous photo


def test_a_fixed_batch_counts_each_photo_once(graph: bytes, labelled: parity.Photos) -> None:
    fixed = onnx.load_from_string(graph)
    for value in (*fixed.graph.input, *fixed.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 3
    silent = lambda what, done, total: None  # noqa: E731
    one, other = (calibrate(g, labelled.images[:3], silent) for g in (onnx.load_from_string(graph), fixed))
    for name, seen in one.items():
        assert seen.counts.sum() == pytest.approx(other[name].counts.sum(), rel=1e-3)
        assert seen.peak == pytest.approx(other[name].peak, rel=1e-4)
    judge = judge_on(labelled)
    assert judge(fixed.SerializeToString()) == pytest.approx(judge(graph), abs=1e-3)


# --- the graph ---


@given(
    st.integers(0, 2**32 - 1), st.integers(1, 4), st.sampled_from([1e-20, 1e-6, 1.0, 1e4]), st.sampled_from([0.0, 1.0])
)
def test_quantized_weights_are_within_half_a_step(seed: int, channels: int, size: float, first: float) -> None:
    weight = (np.random.default_rng(seed).normal(size=(channels, 2, 3, 3)) * size).astype(np.float32)
    weight[0] *= first
    values, scales = int8_weight(weight)
    assert (values.dtype, scales.dtype) == (np.int8, np.float32)
    assert values.shape == weight.shape
    assert scales.shape == (channels,)
    assert (scales * scales >= np.finfo(np.float32).tiny).all()  # so their product with another scale is not 0
    assert np.abs(values.astype(int)).max() * 255 * 2 < 2**15  # two products fit 16 bits, for CPUs without VNNI
    steps = scales.reshape(-1, 1, 1, 1).astype(np.float64)
    assert (np.abs(values * steps - weight) <= 0.5001 * steps).all()


@settings(max_examples=12)
@given(chosen=st.sets(st.integers(0, LAYERS - 1)))
def test_any_subset_of_layers_can_be_int8(graph: bytes, ranges: dict[str, float], chosen: set[int]) -> None:
    layers = [all_layers(graph)[i] for i in sorted(chosen)]
    made = with_int8(onnx.load_from_string(graph), set(layers), ranges)
    proto = onnx.load_from_string(made)
    checker.check_model(proto, full_check=True)
    assert layers_in_int8(made) == set(layers)
    before, after = constants(graph), constants(made)
    makers = {output: node for node in proto.graph.node for output in node.output}
    convolutions = [node for node in proto.graph.node if node.op_type == "Conv"]
    assert len(convolutions) == LAYERS
    for node in convolutions:
        assert np.array_equal(after[node.input[2]], before[node.input[2]])  # biases do not change
        weight = node.input[1].removesuffix("_rounded")
        if weight.removeprefix("network.").removesuffix(".weight") in layers:
            assert [makers[name].op_type for name in node.input[:2]] == ["DequantizeLinear"] * 2
            steps = after[f"{weight}_scale"].reshape(-1, 1, 1, 1)
            assert (np.abs(after[f"{weight}_int8"] * steps - before[weight]) <= 0.5001 * steps).all()
            assert weight not in after
        else:
            assert np.array_equal(after[weight], before[weight])
            maker = makers[node.input[0]]
            while maker.op_type == "MaxPool":
                maker = makers[maker.input[0]]
            assert maker.op_type != "DequantizeLinear"
    of_scales = {node.input[1] for node in proto.graph.node if node.op_type.endswith("Linear")}
    of_zeros = {node.input[2] for node in proto.graph.node if node.op_type.endswith("Linear")}
    assert all((after[name] > 0).all() and after[name].dtype == np.float32 for name in of_scales)
    assert all((after[name] == 0).all() and after[name].dtype == np.int8 for name in of_zeros)


def test_excluding_all_layers_returns_the_float_graph(graph: bytes, ranges: dict[str, float]) -> None:
    made, before = map(onnx.load_from_string, (with_int8(onnx.load_from_string(graph), set(), ranges), graph))
    for proto in (made, before):
        proto.ClearField("doc_string")  # the exporter writes empty ones
        proto.graph.ClearField("doc_string")
    assert made == before


def test_a_quantized_activation_is_stored_only_as_int8(done: Quantized) -> None:
    """Only the QuantizeLinear reads a tensor that is quantized."""
    nodes = onnx.load_from_string(done.graph).graph.node
    rounded = {name.removesuffix("_rounded") for node in nodes for name in node.output if name.endswith("_rounded")}
    takers = [(node.op_type, name) for node in nodes for name in node.input if name in rounded]
    assert {kind for kind, _ in takers} == {"QuantizeLinear", "Clip"}
    assert len(takers) == len({name for _, name in takers}) == LAYERS


def test_a_pools_output_keeps_its_inputs_scale(done: Quantized) -> None:
    proto, values = onnx.load_from_string(done.graph), constants(done.graph)
    pools = [node for node in proto.graph.node if node.op_type == "MaxPool"]
    assert len(pools) == 4
    for pool in pools:
        before, after = pool.input[0].removesuffix("_rounded"), pool.output[0]
        assert values[f"{before}_scale"] == values[f"{after}_scale"]


def test_dead_channels_and_layers_are_quantized(graph: bytes, labelled: parity.Photos) -> None:
    def kill(values: dict[str, np.ndarray]) -> None:
        values["network.down1.0.weight"][:] = 0
        values["network.down1.0.bias"][:] = -1  # its ReLU's output is 0
        values["network.down2.0.weight"][1] = 0

    dead = changed(graph, kill)
    made = with_int8(onnx.load_from_string(dead), set(all_layers(graph)), ranges_of(dead, labelled))
    assert np.abs(run_onnxruntime(made, labelled.images[:4]) - run_onnxruntime(dead, labelled.images[:4])).mean() < 8


def convolutions(*parts: tuple[np.ndarray, np.ndarray]) -> bytes:
    """A float graph of 1x1 convolutions, weights [O, I] and biases [O], one after the other: float32 in and out."""
    nodes, constants = [helper.make_node("Identity", ["image"], ["x0"])], []
    for number, (weight, bias) in enumerate(parts):
        constants += [
            numpy_helper.from_array(weight[..., None, None].astype(np.float32), f"{number}.weight"),
            numpy_helper.from_array(bias.astype(np.float32), f"{number}.bias"),
        ]
        nodes.append(helper.make_node("Conv", [f"x{number}", f"{number}.weight", f"{number}.bias"], [f"x{number + 1}"]))
    shapes = [len(parts[0][0][0]), *(len(weight) for weight, _ in parts)]
    ends = [
        helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, [1, c, 4, 4])
        for n, c in (("image", shapes[0]), (f"x{len(parts)}", shapes[-1]))
    ]
    graph = helper.make_graph(nodes, "convolutions", ends[:1], ends[1:], constants)
    opsets = [helper.make_opsetid("", 20)]
    return bytes(helper.make_model(graph, opset_imports=opsets, ir_version=9).SerializeToString())


@pytest.mark.parametrize("tiny", [0.0, 1e-10, 1e-6, 1e-3])
@pytest.mark.parametrize("bias", [0.05, -0.5, 3.0])
def test_biases_do_not_overflow_in_onnxruntime_with_tiny_weights(tiny: float, bias: float) -> None:
    """ONNX Runtime quantizes it to int32 with the product of the scales, and does not check for overflow."""
    weights = np.array([[tiny, -tiny], [0.5, 0.25]])
    float_graph = convolutions((weights, np.array([bias, 0.1])), (np.array([[1.0, 1.0]]), np.array([0.0])))
    made = with_int8(onnx.load_from_string(float_graph), {"0", "1"}, {"x0": 20.0, "x1": 20.0})
    photo = np.random.default_rng(0).uniform(-20, 20, (1, 2, 4, 4)).astype(np.float32)
    answers = []
    for level in (
        onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL,
        onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL,
    ):
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = level
        session = onnxruntime.InferenceSession(made, options, providers=["CPUExecutionProvider"])
        answers.append(session.run(None, {"image": photo})[0])
    np.testing.assert_allclose(answers[1], answers[0], atol=20 / 127 + 1e-5)  # one step of the activation between them
    assert np.abs(answers[1] - answers[0]).mean() < 0.03
    exact = onnxruntime.InferenceSession(float_graph, providers=["CPUExecutionProvider"]).run(None, {"image": photo})[0]
    assert np.abs(answers[1] - exact).mean() < 0.15


def test_convolutions_that_share_a_weight_share_a_scale_that_fits_all_their_biases() -> None:
    """A graph may store equal weights once."""
    unit = np.array([[0.0]])
    proto = onnx.load_from_string(convolutions(*((unit, np.array([bias])) for bias in (1.0, 4.0, 2.0))))
    for node in proto.graph.node[2:]:
        node.input[1] = "0.weight"
    made = with_int8(proto, {"0"}, {"x0": 127.0, "x1": 127.0, "x2": 127.0})
    checker.check_model(onnx.load_from_string(made), full_check=True)
    assert constants(made)["0.weight_scale"] == [4 / LARGEST_BIAS]


# --- its output in the engines ---


@pytest.mark.parametrize(
    "left", [(), ("down1.0", "head"), ("down2.0", "up4.gate.w_x.0"), ("up2.block.0", "up1.project")]
)
def test_openvino_output_matches_onnxruntime(
    graph: bytes, ranges: dict[str, float], labelled: parity.Photos, left: tuple[str, ...]
) -> None:
    """Without the workarounds in the module docstring, it would not after a MaxPool or a Concat."""
    openvino = pytest.importorskip("openvino")
    layers = set(all_layers(graph)) - set(left)
    made = with_int8(onnx.load_from_string(graph), layers, ranges)
    core = openvino.Core()
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    compiled = core.compile_model(core.read_model(made), "CPU", settings)
    photos = labelled.images[:8]
    answers = np.concatenate([compiled({0: photo[None]})[0] for photo in photos])
    assert np.abs(answers - run_onnxruntime(made, photos)).mean() < 1
    kinds = [node.get_rt_info() for node in compiled.get_runtime_model().get_ops()]
    ran = [info["runtimePrecision"].astype(str) for info in kinds if info["layerType"].astype(str) == "Convolution"]
    assert len(ran) == LAYERS
    assert sum(precision in ("u8", "i8") for precision in ran) == len(layers)


@pytest.mark.tensorrt
def test_tensorrt_for_rtx_parses_the_int8_graph(done: Quantized) -> None:
    rtx = pytest.importorskip("tensorrt_rtx", reason="needs TensorRT for RTX: pip install 'petseg[rtx]'")
    logger = rtx.Logger(rtx.Logger.ERROR)
    network = rtx.Builder(logger).create_network(0)
    parser = rtx.OnnxParser(network, logger)
    assert parser.parse(done.graph), [parser.get_error(i).desc() for i in range(parser.num_errors)]
    kinds = [network.get_layer(i).type for i in range(network.num_layers)]
    assert kinds.count(rtx.LayerType.CONVOLUTION) == LAYERS
    assert kinds.count(rtx.LayerType.DEQUANTIZE) >= LAYERS


# --- the choice ---


def test_a_network_that_tolerates_int8_is_fully_int8(graph: bytes, done: Quantized, labelled: parity.Photos) -> None:
    proto = onnx.load_from_string(done.graph)
    assert not proto.metadata_props
    checker.check_model(proto, full_check=True)
    for one, other in zip((*proto.graph.input, *proto.graph.output), _ends(graph), strict=True):
        assert one == other
    types = {tensor.data_type for tensor in proto.graph.initializer if tensor.name.endswith(("_int8", "_zero"))}
    assert types == {TensorProto.INT8}
    assert TensorProto.INT32 not in {tensor.data_type for tensor in proto.graph.initializer}
    choice = done.choice
    assert json.loads(json.dumps(choice)) == choice
    judge = judge_on(labelled)
    assert choice["iou"]["float"] == judge(graph)
    assert choice["iou"]["int8"] == pytest.approx(judge(done.graph), abs=1e-12)
    assert choice["loss"] == pytest.approx(100 * (judge(graph) - judge(done.graph)), abs=1e-4)
    assert choice["loss"] <= choice["budget"] == 1.0
    assert set(choice["methods"]) == set(METHODS)
    assert choice["loss"] == choice["methods"][choice["method"]]["loss"]
    assert (choice["layers"], choice["layers_int8"], choice["in_float"]) == (LAYERS, LAYERS, [])
    assert list(choice["sensitivity"].values()) == sorted(choice["sensitivity"].values(), reverse=True)
    assert set(choice["sensitivity"]) == set(all_layers(graph))
    assert choice["search"] == [{"in_float": 0, "loss": choice["loss"]}]


def _ends(graph: bytes) -> list[onnx.ValueInfoProto]:
    proto = onnx.load_from_string(graph)
    return [*proto.graph.input, *proto.graph.output]


def test_the_same_photos_give_the_same_bytes(graph: bytes, done: Quantized, labelled: parity.Photos) -> None:
    again = quantize(graph, labelled.images[:8], judge_on(labelled), QuantizeConfig(budget=1.0))
    assert again == done


def test_progress_is_reported(graph: bytes, labelled: parity.Photos) -> None:
    told: list[tuple[str, int, int]] = []
    quantize(graph, labelled.images[:2], loses({"head": 1.0}), ONE, lambda *progress: told.append(progress))
    assert list(dict.fromkeys(what for what, _, _ in told)) == [
        "calibrating",
        "evaluating the float graph",
        "evaluating calibration methods",
        "measuring the sensitivity of layers",
        "choosing layers",
    ]
    assert all(done < total or total == 0 for _, done, total in told)


def test_a_sensitive_layer_is_found_and_stays_in_float(graph: bytes, labelled: parity.Photos) -> None:
    """One channel scaled by 1000 and back: no change in float, but in int8 it swamps the other channels."""

    def spread(values: dict[str, np.ndarray]) -> None:
        values["network.up1.block.0.weight"][0] *= 1000
        values["network.up1.block.0.bias"][0] *= 1000
        values["network.up1.block.3.weight"][:, 0] /= 1000

    hard = changed(graph, spread)
    photos = labelled.images[:8]
    assert np.abs(run_onnxruntime(hard, photos) - run_onnxruntime(graph, photos)).max() <= 1
    result = quantize(hard, photos, judge_on(labelled), QuantizeConfig(budget=1.0))
    choice = result.choice
    assert next(iter(choice["sensitivity"])) == "up1.block.3"
    alone = with_int8(onnx.load_from_string(hard), {"up1.block.3"}, ranges_of(hard, labelled, choice["method"]))
    assert choice["sensitivity"]["up1.block.3"] == round(_change_from(hard, photos)(alone), 4)
    assert choice["in_float"] == ["up1.block.3"]
    assert all(verdict["loss"] > 1 for verdict in choice["methods"].values())
    assert choice["loss"] <= 1
    assert choice["iou"]["int8"] == pytest.approx(judge_on(labelled)(result.graph), abs=1e-12)
    assert choice["layers_int8"] == LAYERS - 1
    assert np.array_equal(
        constants(result.graph)["network.up1.block.3.weight"], constants(hard)["network.up1.block.3.weight"]
    )


@pytest.mark.parametrize(
    ("losses", "kept"),
    [
        ((0.0, 0.4, 0.3), {"minmax"}),
        ((0.4, 0.3, 0.0), {"entropy"}),
        ((0.4, -3.0, 0.01), {"percentile", "entropy"}),  # a gain counts as no loss, and a hundredth of a point is noise
    ],
)
def test_the_calibration_method_with_the_least_loss_is_chosen(
    graph: bytes, labelled: parity.Photos, losses: tuple[float, ...], kept: set[str]
) -> None:
    answers = iter([0.9, *(0.9 - loss / 100 for loss in losses)])
    choice = quantize(graph, labelled.images[:1], lambda graph: next(answers), QuantizeConfig()).choice
    changes = {name: choice["methods"][name]["change"] for name in kept}
    assert choice["method"] in kept
    assert changes[choice["method"]] == min(changes.values())


def test_only_layers_that_lose_accuracy_stay_in_float(graph: bytes, labelled: parity.Photos) -> None:
    order = list(quantize(graph, labelled.images[:2], loses({}), ONE).choice["sensitivity"])
    costly = {order[1]: 1.0, order[4]: 2.0, order[7]: 0.7}
    choice = quantize(graph, labelled.images[:2], loses(costly), ONE).choice
    assert choice["in_float"] == list(costly)
    assert choice["loss"] == 0
    assert len(choice["search"]) <= 2 + 5 + SECOND_TRIES  # both ends, the bisection of 27, the second tries


def test_the_loss_budget_is_used(graph: bytes, labelled: parity.Photos) -> None:
    points = dict.fromkeys(all_layers(graph), 0.1)
    choice = quantize(
        graph, labelled.images[:2], loses(points), QuantizeConfig(budget=1.55, methods=("minmax",))
    ).choice
    assert choice["layers_int8"] == 15
    assert choice["loss"] == pytest.approx(1.5)


def test_the_change_is_measured_on_evenly_spaced_photos(
    graph: bytes, ranges: dict[str, float], labelled: parity.Photos
) -> None:
    photos = labelled.images[: PROBES + 2]
    made = with_int8(onnx.load_from_string(graph), set(all_layers(graph)), ranges)
    probes = photos[::2]
    expected = np.abs(run_onnxruntime(made, probes) - run_onnxruntime(graph, probes)).mean()
    assert _change_from(graph, photos)(made) == pytest.approx(expected)


def search(points: tuple[float, ...], budget: float) -> _Search:
    """A search in which each layer loses some points in int8; the layers are called by their place in the order."""
    order = tuple(map(str, range(len(points))))
    return _Search(order, lambda left: sum(points[int(layer)] for layer in set(order) - left), budget, {})


@pytest.mark.parametrize(
    ("points", "budget", "kept"), [((0.5, 0.5, 0.5, 0.5), 1.0, {"0", "1"}), ((0.0, 0.5, 1.5, 0.0), 0.5, {"2"})]
)
def test_the_budget_itself_may_be_lost(points: tuple[float, ...], budget: float, kept: set[str]) -> None:
    assert search(points, budget).fewest_in_float() == kept


def test_few_layers_are_tried_again() -> None:
    """Those that seemed the least harmful, because each costs an evaluation."""
    points = [0.0] * 40
    points[25] = 1.0
    begun = search(tuple(points), 0.5)
    assert begun.fewest_in_float() == {*map(str, range(25 - SECOND_TRIES)), "25"}
    assert len(begun.judged) <= 2 + 5 + SECOND_TRIES  # both ends, the bisection of 30, the second tries


def test_an_unmet_budget_names_what_both_ends_lose() -> None:
    with pytest.raises(
        ParityTolerance, match=r"loses 8\.00 points of IoU, and still 2\.00 with 3 of the 4 layers left"
    ):
        search((2.0, 2.0, 2.0, 2.0), 1.0).fewest_in_float()


# --- errors ---


def test_int8_without_photos_is_an_error(graph: bytes) -> None:
    with pytest.raises(DataError, match="photos to calibrate on"):
        quantize(graph, [], loses({}), ONE)


def test_the_judge_requires_labels(labelled: parity.Photos) -> None:
    with pytest.raises(DataError, match="no labels"):
        judge_on(parity.Photos(labelled.names, labelled.images, None))


@pytest.mark.parametrize("iou", [0.0, float("nan")])
def test_a_float_graph_that_finds_no_pet_is_an_error(graph: bytes, labelled: parity.Photos, iou: float) -> None:
    with pytest.raises(DataError, match=r"IoU of (0\.0|nan)"):
        quantize(graph, labelled.images[:1], lambda graph: iou, ONE)


@pytest.mark.parametrize("iou", [0.0, float("nan")])
def test_a_budget_that_cannot_be_met_is_an_error(graph: bytes, labelled: parity.Photos, iou: float) -> None:
    with pytest.raises(ParityTolerance, match=r"loses (90\.00|nan) .* 26 of the 35 layers .* the budget is 0\.5"):
        quantize(graph, labelled.images[:1], lambda graph: iou if layers_in_int8(graph) else 0.9, ONE)


def test_a_graph_without_convolutions_is_an_error(labelled: parity.Photos) -> None:
    value = onnx.helper.make_tensor_value_info
    ends = [value("image", TensorProto.UINT8, ["N", SIZE, SIZE, 3])], [value("x", TensorProto.UINT8, None)]
    empty = onnx.helper.make_graph([onnx.helper.make_node("Identity", ["image"], ["x"])], "empty", *ends)
    with pytest.raises(ModelError, match="no convolution"):
        quantize(onnx.helper.make_model(empty).SerializeToString(), labelled.images, loses({}), ONE)


def test_a_graph_with_nan_activations_is_an_error(graph: bytes, labelled: parity.Photos) -> None:
    def spoil(values: dict[str, np.ndarray]) -> None:
        values["network.bottom.0.bias"][0] = np.nan

    with pytest.raises(ModelError, match="NaN or infinite"):
        quantize(changed(graph, spoil), labelled.images[:1], loses({}), ONE)
