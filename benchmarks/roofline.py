"""Time that a graph takes at the machine's matmul peak: its operations, at the rate of the fastest square matmul.

A multiply-add counts as two operations. Convolutions and matmuls are counted, which are nearly everything; the rest of
a network (interpolation, concatenation, activations) takes time and counts as zero.

The peak of a precision is the rate that the best of three libraries reaches here on matmuls of 1024 x 1024, with the
same threads and in the same rounds as the engines that are compared with it: measured, not taken from a data sheet. It
is not an upper bound: convolutions with many channels exceed it by a tenth here. In an int8 file, the int8 layers are
compared with the int8 peak, the others with the peak of the precision that they are computed in.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, Final

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from benchmarks.turns import wait_until_idle
from petseg_runtime.errors import one_line

#: Size of the matrices: large enough for the peak, small enough for the caches.
SIZE: Final = 1024
#: Consecutive matmuls in a graph, so that the overhead at its edges (copies, int8's first rounding) is small.
CHAIN: Final = 4
#: Size of the matrices on a GPU, which needs larger ones to reach its peak.
GPU_SIZE: Final = 8192


def operations(graph: bytes, batch: int, height: int, width: int) -> dict[str, int]:
    """Count a graph's operations (input ``image``, uint8 [N, H, W, 3]): of its ``int8`` layers, and ``others``."""
    proto = _sized(graph, (batch, height, width, 3))
    shapes = _shapes(proto)
    makers = {output: node.op_type for node in proto.graph.node for output in node.output}
    found = {"int8": 0, "others": 0}
    for node in proto.graph.node:
        if node.op_type in _COUNTED:
            quantized = all(makers.get(name) == "DequantizeLinear" for name in node.input[:2])
            found["int8" if quantized else "others"] += 2 * _COUNTED[node.op_type](node, shapes)
    return found


def _convolution(node: NodeProto, shapes: Mapping[str, tuple[int, ...]]) -> int:
    return math.prod(shapes[node.output[0]]) * math.prod(shapes[node.input[1]][1:])  # weights are [O, I / groups, h, w]


def _transposed(node: NodeProto, shapes: Mapping[str, tuple[int, ...]]) -> int:
    return math.prod(shapes[node.input[0]]) * math.prod(shapes[node.input[1]][1:])  # weights are [I, O / groups, h, w]


def _matmul(node: NodeProto, shapes: Mapping[str, tuple[int, ...]]) -> int:
    return math.prod(shapes[node.output[0]]) * shapes[node.input[0]][-1]


def _gemm(node: NodeProto, shapes: Mapping[str, tuple[int, ...]]) -> int:
    turned = any(attribute.name == "transA" and attribute.i for attribute in node.attribute)
    return math.prod(shapes[node.output[0]]) * shapes[node.input[0]][0 if turned else 1]


#: Number of multiplications, for each operator that is counted.
_COUNTED: Final[dict[str, Callable[[NodeProto, Mapping[str, tuple[int, ...]]], int]]] = {
    "Conv": _convolution,
    "ConvTranspose": _transposed,
    "MatMul": _matmul,
    "Gemm": _gemm,
}


def _sized(graph: bytes, shape: Sequence[int]) -> ModelProto:
    """Return the graph with an input of that shape, and all other shapes inferred from it."""
    proto = onnx.load_from_string(graph)
    for dimension, size in zip(proto.graph.input[0].type.tensor_type.shape.dim, shape, strict=True):
        dimension.dim_value = size
    for output in proto.graph.output:
        output.type.tensor_type.ClearField("shape")
    del proto.graph.value_info[:]
    return onnx.shape_inference.infer_shapes(proto, strict_mode=True, data_prop=True)


def _shapes(proto: ModelProto) -> dict[str, tuple[int, ...]]:
    values = (*proto.graph.input, *proto.graph.output, *proto.graph.value_info)
    shapes = {value.name: tuple(d.dim_value for d in value.type.tensor_type.shape.dim) for value in values}
    return shapes | {tensor.name: tuple(tensor.dims) for tensor in proto.graph.initializer}


def least_ms(work: Mapping[str, int], precision: str, peaks: Mapping[str, float]) -> float | None:
    """Return the milliseconds that the operations take at the matmul peak; None: a peak that is needed is missing.

    Args:
        work: The result of :func:`operations`.
        precision: The precision of the computation: ``f32``, ``bf16``, ...; with ``int8``, the layers that are not in
            int8 are computed in f32, with ``int8 and bf16`` in bf16.
        peaks: Operations per second of each precision.
    """
    first, _, rest = precision.partition(" and ")
    others = rest or ("f32" if first == "int8" else first)
    parts = {first: work["int8"], others: work["others"]} if first == "int8" else {first: sum(work.values())}
    needed = {name: count for name, count in parts.items() if count}
    if not needed or any(name not in peaks for name in needed):
        return None
    return 1e3 * sum(count / peaks[name] for name, count in needed.items())


@dataclass(frozen=True)
class Matmul:
    """Square matmuls in a library.

    Attributes:
        library: Name and version.
        precision: The precision that it computes in.
        operations: Operations of one run.
        run: Runs the matmuls, and returns when they are finished.
    """

    library: str
    precision: str
    operations: int
    run: Callable[[], object]

    def rate(self, runs: int = 3) -> float:
        """Return the operations per second: the median of ``runs`` runs, after waiting for idle and a warm-up run."""
        wait_until_idle()
        self.run()
        return self.operations / median(_seconds(self.run) for _ in range(runs))


def _seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def peaks(rates: Mapping[Matmul, Sequence[float]]) -> dict[str, float]:
    """Return the operations per second of each precision in the library that is fastest at it."""
    found: dict[str, float] = {}
    for matmul, values in rates.items():
        found[matmul.precision] = max(found.get(matmul.precision, 0), median(values))
    return found


def best(rates: Mapping[Matmul, Sequence[float]]) -> dict[str, Sequence[float]]:
    """Return the rates of the fastest library for each precision, round by round."""
    fastest = peaks(rates)
    return {m.precision: values for m, values in rates.items() if median(values) == fastest[m.precision]}


def as_rows(rates: Mapping[Matmul, Sequence[float]]) -> list[dict[str, Any]]:
    """Return the record's rows, one for each library and precision."""
    return [
        {
            "name": f"{matmul.library} {matmul.precision}",
            "precision": matmul.precision,
            "operations": matmul.operations,
            "milliseconds": [1e3 * matmul.operations / value for value in values],
            "tera_operations_per_second": median(values) / 1e12,
        }
        for matmul, values in rates.items()
    ]


def matmuls(device: str, threads: int) -> tuple[list[Matmul], list[str]]:
    """Make a matmul for every precision and library of a device (``cpu`` or ``cuda``); also return what failed.

    A library may be missing or built without CUDA, a GPU too old for a precision: the others are measured all the same.
    """
    makers = (_on_cuda,) if device == "cuda" else (_in_torch, _in_openvino, _in_onnxruntime)
    found, failed = [], []
    for make in makers:
        try:
            made = make(threads)
        except (ImportError, RuntimeError, AssertionError) as error:  # torch asserts that it was built with CUDA
            failed.append(f"matmuls on {device}: {one_line(error)}")
            continue
        for matmul in made:
            try:
                matmul.run()
                found.append(matmul)
            except RuntimeError as error:
                failed.append(f"matmuls on {device}, {matmul.library} {matmul.precision}: {one_line(error)}")
    return found, failed


def _in_torch(threads: int) -> list[Matmul]:
    import torch

    from petseg.device import pick_precision

    torch.set_num_threads(threads)
    version, count = torch.__version__.partition("+")[0], 2 * SIZE**3
    types = {"f32": torch.float32}
    if pick_precision("auto", torch.device("cpu")) is torch.bfloat16:  # emulated bf16 is slow, so not a peak
        types["bf16"] = torch.bfloat16
    found = []
    for precision, dtype in types.items():
        a, b, out = (torch.ones(SIZE, SIZE, dtype=dtype) for _ in range(3))
        run = functools.partial(torch.mm, a, b, out=out)
        found.append(Matmul(f"PyTorch {version}", precision, count, run))
    return found


def _in_openvino(threads: int) -> list[Matmul]:
    import openvino
    from openvino import properties

    core, version = openvino.Core(), openvino.__version__.partition("-")[0]
    types = {"f32": openvino.Type.f32, "int8": openvino.Type.f32}
    if "BF16" in core.get_property("CPU", properties.device.capabilities()):
        types["bf16"] = openvino.Type.bf16
    found = []
    for precision, between in types.items():
        model = core.read_model(matmul_graph(precision == "int8"))
        settings = {properties.inference_num_threads(): threads, properties.hint.inference_precision(): between}
        request = core.compile_model(model, "CPU", settings).create_infer_request()
        request.set_input_tensor(openvino.Tensor(np.ones((SIZE, SIZE), np.float32)))
        found.append(Matmul(f"openvino {version}", precision, CHAIN * 2 * SIZE**3, request.infer))
    return found


def _in_onnxruntime(threads: int) -> list[Matmul]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    inputs = {"x": np.ones((SIZE, SIZE), np.float32)}
    found = []
    for precision in ("f32", "int8"):
        graph = matmul_graph(precision == "int8")
        session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        name = f"onnxruntime {onnxruntime.__version__}"
        found.append(Matmul(name, precision, CHAIN * 2 * SIZE**3, functools.partial(session.run, None, inputs)))
    return found


def _on_cuda(threads: int) -> list[Matmul]:
    """Make matmuls on an NVIDIA GPU in PyTorch; ``threads`` is unused. We have never run it."""
    import torch

    def run(a: torch.Tensor, b: torch.Tensor, tf32: bool) -> None:
        torch.backends.cuda.matmul.allow_tf32 = tf32
        torch._int_mm(a, b) if a.dtype is torch.int8 else torch.mm(a, b)
        torch.cuda.synchronize()

    version, found = torch.__version__.partition("+")[0], []
    types = {
        "f32": torch.float32,
        "tf32": torch.float32,
        "bf16": torch.bfloat16,
        "fp16": torch.half,
        "int8": torch.int8,
    }
    for precision, dtype in types.items():
        a, b = (torch.ones(GPU_SIZE, GPU_SIZE, device="cuda", dtype=dtype) for _ in range(2))
        name = f"PyTorch {version} on {torch.cuda.get_device_name()}"
        found.append(Matmul(name, precision, 2 * GPU_SIZE**3, functools.partial(run, a, b, precision == "tf32")))
    return found


def matmul_graph(int8: bool) -> bytes:
    """Build a chain of matmuls from ``x`` float32 [SIZE, SIZE] to ``y``, with Q/DQ nodes as in an int8 file.

    Activations are unsigned here: every int8 kernel accepts them, and some are faster with them.
    """
    shape = (SIZE, SIZE)
    weights = numpy_helper.from_array(np.ones(shape, np.int8 if int8 else np.float32), "w")
    stored = [weights, numpy_helper.from_array(np.array(0.01, np.float32), "scale")] if int8 else [weights]
    nodes = [helper.make_node("DequantizeLinear", ["w", "scale", "zero"], ["w_float"])] if int8 else []
    if int8:
        zeros = {"zero": np.int8, "unsigned_zero": np.uint8}
        stored += [numpy_helper.from_array(np.array(0, dtype), name) for name, dtype in zeros.items()]
    value = "x"
    for step in range(CHAIN):
        if int8:
            inputs, rounded = [value, "scale", "unsigned_zero"], f"rounded{step}"
            nodes.append(helper.make_node("QuantizeLinear", inputs, [f"int{step}"]))
            nodes.append(helper.make_node("DequantizeLinear", [f"int{step}", *inputs[1:]], [rounded]))
            value = rounded
        output = "y" if step == CHAIN - 1 else f"value{step}"
        nodes.append(helper.make_node("MatMul", [value, "w_float" if int8 else "w"], [output]))
        value = output
    edges = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in ("x", "y")]
    graph = helper.make_graph(nodes, "matmuls", edges[:1], edges[1:], stored)
    opset = helper.make_operatorsetid("", 20)
    proto: bytes = helper.make_model(graph, opset_imports=[opset], ir_version=9).SerializeToString()
    return proto
