"""What a machine takes at least for a graph, by a yardstick: its operations, at the rate of the fastest square matmul.

A multiplication with its addition counts as two operations. Counted are convolutions and matmuls, which are nearly
everything; what a network does besides (interpolation, concatenation, activations) costs time and counts as nothing.

The yardstick of a precision is what the best of three libraries reaches here on matmuls of 1024 x 1024, with the same
threads and in the same rounds as what is held against it: measured, not taken from a data sheet. It is no upper bound:
convolutions of many channels pass it by a tenth here. Of an int8 file the layers in int8 are held against the int8
peak, the others against the peak of what they are computed in.
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

from benchmarks.turns import rest
from petseg_runtime.errors import one_line

#: Of the matrices: large enough for the peak, small enough for the caches.
SIZE: Final = 1024
#: Matmuls behind each other in a graph, so that what happens at its edges (copies, int8's first rounding) is little.
CHAIN: Final = 4
#: A GPU wants more.
GPU_SIZE: Final = 8192


def operations(graph: bytes, batch: int, height: int, width: int) -> dict[str, int]:
    """Operations of a graph ``image`` uint8 [N, H, W, 3]: those of its ``int8`` layers, and the ``others``."""
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


#: Multiplications of the operators that count.
_COUNTED: Final[dict[str, Callable[[NodeProto, Mapping[str, tuple[int, ...]]], int]]] = {
    "Conv": _convolution,
    "ConvTranspose": _transposed,
    "MatMul": _matmul,
    "Gemm": _gemm,
}


def _sized(graph: bytes, shape: Sequence[int]) -> ModelProto:
    """The graph with an input of that shape, and with nothing said of what follows from it."""
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
    """Milliseconds that the matmul peak would take for the operations; None where a peak that is needed is missing.

    Args:
        work: What :func:`operations` counted.
        precision: What is computed in: ``f32``, ``bf16``, ...; ``int8`` or ``int8 and bf16``: what the layers in int8
            leave is computed in f32, or in the one that is named.
        peaks: Operations a second of each precision.
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
        library: Which, with its version.
        precision: What it computes in.
        operations: Of one run.
        run: Runs them to their end.
    """

    library: str
    precision: str
    operations: int
    run: Callable[[], object]

    def rate(self, runs: int = 3) -> float:
        """Operations a second: the median of some runs, after one that does not count; all else has come to rest."""
        rest()
        self.run()
        return self.operations / median(_seconds(self.run) for _ in range(runs))


def _seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def peaks(rates: Mapping[Matmul, Sequence[float]]) -> dict[str, float]:
    """Operations a second of each precision, by the library that is fastest at it."""
    found: dict[str, float] = {}
    for matmul, values in rates.items():
        found[matmul.precision] = max(found.get(matmul.precision, 0), median(values))
    return found


def best(rates: Mapping[Matmul, Sequence[float]]) -> dict[str, Sequence[float]]:
    """The same, round by round."""
    fastest = peaks(rates)
    return {m.precision: values for m, values in rates.items() if median(values) == fastest[m.precision]}


def told(rates: Mapping[Matmul, Sequence[float]]) -> list[dict[str, Any]]:
    """For the record: a row for each library and precision."""
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
    """Every precision that a device (``cpu`` or ``cuda``) has, in every library that computes in it; what failed.

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
    if pick_precision("auto", torch.device("cpu")) is torch.bfloat16:  # emulated, it would be no peak
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
    """The precisions of an NVIDIA GPU in PyTorch, whatever the CPU's threads. Never run by us."""
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
    """A chain of matmuls ``x`` float32 [SIZE, SIZE] to ``y``, with Q/DQ nodes as an int8 file has them.

    Activations are unsigned here: every int8 kernel takes them, and some are faster at it.
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
