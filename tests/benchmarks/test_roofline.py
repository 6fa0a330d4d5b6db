"""Operations are those that PyTorch counts, and each precision is compared with its own peak."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import roofline
from petseg.model import AttentionUNet, AttentionUNetConfig
from petseg_runtime.artifact import default_model, open_artifact


def graph(*nodes: onnx.NodeProto, weights: dict[str, Any], output: Sequence[int]) -> bytes:
    """A graph with the input ``image`` of petseg's models."""
    image = helper.make_tensor_value_info("image", TensorProto.UINT8, ["N", 4, 6, 3])
    answer = helper.make_tensor_value_info("y", TensorProto.FLOAT, list(output))
    cast = helper.make_node("Cast", ["image"], ["float"], to=TensorProto.FLOAT)
    turned = helper.make_node("Transpose", ["float"], ["x"], perm=[0, 3, 1, 2])
    stored = [numpy_helper.from_array(np.asarray(value), name) for name, value in weights.items()]
    made = helper.make_graph([cast, turned, *nodes], "test", [image], [answer], stored)
    return bytes(helper.make_model(made, opset_imports=[helper.make_operatorsetid("", 20)]).SerializeToString())


def floats(*shape: int) -> Any:
    return np.ones(shape, np.float32)


def test_convolutions_and_matmuls_are_counted() -> None:
    conv = helper.make_node("Conv", ["x", "w"], ["a"], strides=[2, 2])  # [N, 5, 2, 3]
    up = helper.make_node("ConvTranspose", ["a", "v"], ["b"], strides=[2, 2])  # [N, 2, 4, 6]
    flat = helper.make_node("Reshape", ["b", "shape"], ["c"])  # [N * 8, 6]
    mat = helper.make_node("MatMul", ["c", "m"], ["d"])  # [N * 8, 7]
    gemm = helper.make_node("Gemm", ["d", "g"], ["y"], transB=1)  # [N * 8, 9]
    weights = {
        "w": floats(5, 3, 2, 2),
        "v": floats(5, 2, 2, 2),
        "shape": np.array([-1, 6], np.int64),
        "m": floats(6, 7),
        "g": floats(9, 7),
    }
    made = graph(conv, up, flat, mat, gemm, weights=weights, output=["M", 9])
    each = 5 * 2 * 3 * (3 * 2 * 2) + 5 * 2 * 3 * (2 * 2 * 2) + 8 * 7 * 6 + 8 * 9 * 7
    assert roofline.operations(made, 1, 4, 6) == {"int8": 0, "others": 2 * each}
    assert roofline.operations(made, 3, 4, 6) == {"int8": 0, "others": 3 * 2 * each}


def test_groups_divide_the_work_and_int8_is_counted_separately() -> None:
    def linear(kind: str, source: str, zero: str, output: str) -> onnx.NodeProto:
        return helper.make_node(f"{kind}Linear", [source, "scale", zero], [output])

    nodes = [
        linear("Quantize", "x", "zero", "x8"),
        linear("Dequantize", "x8", "zero", "xd"),
        linear("Dequantize", "w8", "zero", "wd"),
        helper.make_node("Conv", ["xd", "wd"], ["a"], group=3),
        helper.make_node("Conv", ["a", "v"], ["y"]),
    ]
    weights = {
        "scale": np.float32(0.1),
        "zero": np.int8(0),
        "w8": np.ones((3, 1, 1, 1), np.int8),
        "v": floats(2, 3, 1, 1),
    }
    found = roofline.operations(graph(*nodes, weights=weights, output=["N", 2, 4, 6]), 1, 4, 6)
    assert found == {"int8": 2 * 3 * 24, "others": 2 * 2 * 24 * 3}


def test_the_network_has_the_operations_that_pytorch_counts() -> None:
    ships = open_artifact(default_model())
    height, width = ships.spec.height, ships.spec.width
    described = {key: tuple(v) if isinstance(v, list) else v for key, v in ships.provenance["model"].items()}
    with torch.device("meta"), FlopCounterMode(display=False) as counter, torch.inference_mode():
        AttentionUNet(AttentionUNetConfig(**described)).eval()(torch.zeros(2, 3, height, width))
    work = roofline.operations(ships.path.read_bytes(), 2, height, width)
    assert work == {"int8": 0, "others": counter.get_total_flops()}


@pytest.mark.parametrize(
    ("precision", "expected"),
    [("f32", 1.2), ("bf16", 0.6), ("int8", 0.45), ("int8 and f32", 0.45), ("int8 and bf16", 0.35), ("fp16", None)],
)
def test_each_part_is_compared_with_the_peak_of_its_precision(precision: str, expected: float | None) -> None:
    work, peaks = {"int8": 10**9, "others": 2 * 10**8}, {"f32": 1e12, "bf16": 2e12, "int8": 4e12}
    assert roofline.least_ms(work, precision, peaks) == (expected and pytest.approx(expected))


def test_the_peak_of_a_precision_is_that_of_the_fastest_library() -> None:
    one, two, three = (
        roofline.Matmul(library, precision, 10, lambda: None)
        for library, precision in (("one", "f32"), ("two", "f32"), ("two", "bf16"))
    )
    rates = {one: [1.0, 9.0, 2.0], two: [3.0, 3.0, 1.0], three: [7.0, 8.0, 9.0]}
    assert roofline.peaks(rates) == {"f32": 3.0, "bf16": 8.0}
    assert roofline.best(rates) == {"f32": rates[two], "bf16": rates[three]}
    assert [row["name"] for row in roofline.as_rows(rates)] == ["one f32", "two f32", "two bf16"]


def test_every_library_multiplies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roofline, "SIZE", 32)
    for int8 in (False, True):
        onnx.checker.check_model(onnx.load_from_string(roofline.matmul_graph(int8)), full_check=True)
    found, failed = roofline.matmuls("cpu", 1)
    assert failed == []
    assert {matmul.library.partition(" ")[0] for matmul in found} == {"PyTorch", "openvino", "onnxruntime"}
    assert {"f32", "int8"} <= {matmul.precision for matmul in found}
    assert all(matmul.rate(runs=1) > 0 for matmul in found)


def test_a_failing_library_or_precision_is_reported_and_the_others_are_measured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def without_cuda(threads: int) -> list[Any]:
        raise AssertionError("Torch not compiled with CUDA enabled")

    def too_old() -> None:
        raise RuntimeError("_int_mm wants compute capability 7.5")

    good, bad = roofline.Matmul("fake", "f32", 1, lambda: None), roofline.Matmul("fake", "int8", 1, too_old)
    monkeypatch.setattr(roofline, "_in_torch", without_cuda)
    monkeypatch.setitem(sys.modules, "openvino", None)
    monkeypatch.setattr(roofline, "_in_onnxruntime", lambda threads: [good, bad])
    found, failed = roofline.matmuls("cpu", 1)
    assert found == [good]
    assert ["CUDA enabled" in failed[0], "openvino" in failed[1], "fake int8" in failed[2]] == [True] * 3
    assert len(failed) == 3
