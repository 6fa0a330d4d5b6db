"""ONNX to engine: with the real TensorRT for RTX, and through the `tensorrt` branch with that library in its place."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import json
import os
import signal
import sys
import threading
import types
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from torch import nn

import petseg_runtime
from petseg_export.deploy import DeployedUNet
from petseg_runtime import cache, host
from petseg_runtime.artifact import open_artifact
from petseg_runtime.engines import tensorrt_build
from petseg_runtime.engines.tensorrt_build import Built, Profile, build, timings_slot
from petseg_runtime.engines.tensorrt_library import RTX, TRT
from petseg_runtime.errors import EngineError, ModelError
from petseg_runtime.signals import terminable
from petseg_runtime.spec import ModelSpec

if TYPE_CHECKING:
    from petseg.model import AttentionUNet

EDGE = Path(petseg_runtime.__file__).with_name("models") / "edge.onnx"
CONVOLUTIONS = 35
GPU = host.Gpu(index=0, name="NVIDIA Fake", compute_capability="8.7", memory=2**33, driver="CUDA 12.6")

Test = TypeVar("Test", bound=Callable[..., None])
#: Returns the ONNX graph of a network; see `graph`.
Graph: TypeAlias = Callable[..., bytes]


@pytest.fixture(scope="session")
def rtx() -> Any:
    return pytest.importorskip("tensorrt_rtx", reason="needs TensorRT for RTX: pip install 'petseg[rtx]'")


def needs_rtx(test: Test) -> Test:
    return pytest.mark.tensorrt(pytest.mark.usefixtures("rtx")(test))


def profile(height: int = 32, width: int = 32, batch: int = 4) -> Profile:
    return Profile(minimum=(1, height, width, 3), optimum=(1, height, width, 3), maximum=(batch, height, width, 3))


@pytest.fixture(scope="module")
def graph(trained: Any, random_network: Callable[..., AttentionUNet], tracer: Any) -> Graph:
    """Graphs of the networks that other tests export, which are traced once for all."""

    @functools.cache
    def make(width: int = 4, *, half: bool = False, dynamic: bool = False) -> bytes:
        model = trained.model if width == 4 else random_network(0, width=width)
        names = {name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}
        spec = ModelSpec(name="small", height=32, width=32, dynamic_size=dynamic)
        return tracer(DeployedUNet(model, names if half else frozenset()), spec)  # type: ignore[no-any-return]

    return make


def fixed(graph: Graph, batch: int) -> bytes:
    """The graph with a fixed instead of a dynamic batch."""
    model = onnx.load_from_string(graph())
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = batch
    return bytes(model.SerializeToString())


def quantized(data: bytes, *, activations: type = np.int8, weights: str = "int8", biases: str = "float") -> bytes:
    """QDQ around every convolution: activations per tensor, weights per output channel, zero points 0.

    Weights are stored as int8, or as float with a QuantizeLinear; biases as float, or as int32.
    """
    model = onnx.load_from_string(data)
    values = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    nodes: list[onnx.NodeProto] = []

    def constant(name: str, array: np.ndarray) -> str:
        model.graph.initializer.append(numpy_helper.from_array(array, name))
        return name

    def pair(name: str, scale: np.ndarray, dtype: type, stored: np.ndarray | None = None) -> str:
        parameters = [constant(f"{name}.scale", scale), constant(f"{name}.zero", np.zeros(scale.shape, dtype))]
        axis = {"axis": 0} if scale.ndim else {}
        if stored is None:
            nodes.append(helper.make_node("QuantizeLinear", [name, *parameters], [f"{name}.q"], f"{name}.Q", **axis))
        else:
            constant(f"{name}.q", stored)
        nodes.append(
            helper.make_node("DequantizeLinear", [f"{name}.q", *parameters], [f"{name}.dq"], f"{name}.DQ", **axis)
        )
        return f"{name}.dq"

    done: dict[str, str] = {}
    step = np.array(0.05, np.float32)
    for node in model.graph.node:
        if node.op_type == "Conv":
            image, kernel, bias = node.input
            if image not in done:
                done[image] = pair(image, step, activations)
            scale = np.abs(values[kernel]).max(axis=(1, 2, 3)) / np.float32(127)
            stored = np.rint(values[kernel] / scale[:, None, None, None]).astype(np.int8)
            node.input[0] = done[image]
            node.input[1] = pair(kernel, scale, np.int8, stored if weights == "int8" else None)
            if biases == "int32":
                stored = np.rint(values[bias] / (scale * step)).astype(np.int32)
                node.input[2] = pair(bias, scale * step, np.int32, stored)
        nodes.append(node)
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del model.graph.node[:]
    model.graph.node.extend(copies)
    onnx.checker.check_model(model, full_check=True)
    return bytes(model.SerializeToString())


def convolutions(built: Built) -> Counter[str]:
    """How many convolutions read which types: TensorRT for RTX calls them correlations."""
    counts: Counter[str] = Counter()
    for row in built.description["computed"]:
        if row["layer"] == "correlation":
            counts["+".join(row["reads"])] += row["count"]
    return counts


# --- the graphs that we export ---


@needs_rtx
@pytest.mark.parametrize(
    ("make", "shapes", "expected"),
    [
        pytest.param(lambda graph: graph(), profile(), "fp32", id="any batch"),
        pytest.param(lambda graph: fixed(graph, 2), None, "fp32", id="fixed batch without a profile"),
        pytest.param(
            lambda graph: fixed(graph, 2),
            Profile(minimum=(2, 32, 32, 3), optimum=(2, 32, 32, 3), maximum=(2, 32, 32, 3)),
            "fp32",
            id="fixed batch with its profile",
        ),
        pytest.param(
            lambda graph: graph(dynamic=True),
            Profile(minimum=(1, 32, 16, 3), optimum=(1, 64, 64, 3), maximum=(2, 96, 128, 3)),
            "fp32",
            id="any size",
        ),
        pytest.param(lambda graph: graph(64), profile(), "fp32", id="published width"),
        pytest.param(lambda graph: graph(half=True), profile(), "fp16", id="fp16"),
        pytest.param(lambda graph: quantized(graph()), profile(), "int8", id="int8"),
        pytest.param(lambda graph: quantized(graph(), weights="float"), profile(), "int8", id="int8, float weights"),
        pytest.param(lambda graph: quantized(graph(dynamic=True)), profile(48, 64), "int8", id="int8, any size"),
    ],
)
def test_an_engine_computes_in_the_graphs_types(
    make: Callable[[Graph], bytes],
    shapes: Profile | None,
    expected: str,
    graph: Graph,
    capfd: pytest.CaptureFixture[str],
) -> None:
    data = make(graph)
    capfd.readouterr()
    built = build(data, shapes, library=RTX)
    assert capfd.readouterr() == ("", "")
    ((dtypes, count),) = convolutions(built).items()
    assert dtypes == expected
    assert CONVOLUTIONS - 5 <= count <= CONVOLUTIONS  # with four channels, some are fused into other kernels
    assert built.messages == ()
    described = built.description
    assert described["bytes"] == len(built.engine) > 100_000
    assert described["layers"] == sum(row["count"] for row in described["computed"])
    (image,), (probability,) = described["inputs"], described["outputs"]
    assert (image["name"], image["dtype"], image["shape"][3]) == ("image", "uint8", 3)
    assert (probability["name"], probability["dtype"]) == ("probability", "uint8")
    assert probability["shape"] == image["shape"][:3]
    assert json.loads(json.dumps(described)) == described


@needs_rtx
def test_the_embedded_model_compiles_and_records_its_target() -> None:
    spec = open_artifact(EDGE).spec
    one, eight = ([batch, spec.height, spec.width, 3] for batch in (1, 8))
    built = build(EDGE.read_bytes(), profile(spec.height, spec.width, 8), library=RTX)
    version = importlib.import_module("tensorrt_rtx").__version__
    assert built.environment == {
        "library": "tensorrt_rtx",
        "version": version,
        "platform": f"linux {os.uname().machine}",
        "gpu": None,
        "driver": None,
        "compute_capability": "portable",
        "profile": {"minimum": one, "optimum": one, "maximum": eight},
        "flags": {"strongly_typed": True, "tf32": False},
    }
    assert convolutions(built) == {"fp32": CONVOLUTIONS}
    assert built.description["unknown"] == ["kernels: the device compiles them when it loads the engine"]
    assert len(built.engine) < 2 * EDGE.stat().st_size


@needs_rtx
def test_two_builds_have_the_same_description(graph: Graph) -> None:
    one, other = (build(graph(), profile(), library=RTX) for _ in range(2))
    assert (one.environment, one.description) == (other.environment, other.description)


@needs_rtx
def test_target_gpus_can_be_specified(graph: Graph) -> None:
    built = build(graph(), profile(), library=RTX, compute_capabilities=("8.9", "12.0"))
    assert built.environment["compute_capability"] == ["8.9", "12.0"]
    with pytest.raises(EngineError, match=r"cannot build for compute capability 9\.0; it supports .*8\.6, 8\.9.*12\.0"):
        build(graph(), profile(), library=RTX, compute_capabilities=("8.9", "9.0"))


# --- graphs and profiles that are rejected ---


@needs_rtx
def test_int32_biases_are_rejected_naming_the_node(capfd: pytest.CaptureFixture[str], graph: Graph) -> None:
    with pytest.raises(
        ModelError, match=r"cannot read the graph \(DequantizeLinear .*bias\.DQ: .* has type Int32"
    ) as error:
        build(quantized(graph(), biases="int32"), profile(), library=RTX)
    assert "\n" not in str(error.value)
    assert "driver" not in str(error.value)
    assert capfd.readouterr() == ("", "")


@needs_rtx
def test_uint8_activations_are_rejected(graph: Graph) -> None:
    with pytest.raises(ModelError, match=r"would change the meaning of the graph \(.*UINT8 zero_point"):
        build(quantized(graph(), activations=np.uint8), profile(), library=RTX)


@needs_rtx
@pytest.mark.parametrize("data", [b"not a graph", EDGE.read_bytes()[:5000]])
def test_an_invalid_graph_is_rejected(data: bytes, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ModelError, match=r"cannot read the graph .*Failed to parse"):
        build(data, profile(), library=RTX)
    assert capfd.readouterr() == ("", "")


def changed(graph: Graph, change: Callable[[onnx.GraphProto], None]) -> bytes:
    model = onnx.load_from_string(graph())
    change(model.graph)
    return bytes(model.SerializeToString())


def float_input(proto: onnx.GraphProto) -> None:
    proto.input[0].type.tensor_type.elem_type = onnx.TensorProto.FLOAT


def other_output(proto: onnx.GraphProto) -> None:
    proto.output[0].name = proto.node[-1].output[0] = "mask"


def unknown_operator(proto: onnx.GraphProto) -> None:
    proto.node[-2].op_type = "NoSuchOperator"


@needs_rtx
@pytest.mark.parametrize(
    ("data", "words"),
    [
        (lambda graph: b"", "input is none; image of uint8 with 4 dimensions is expected"),
        (lambda graph: changed(graph, float_input), r"input is image float \[-1, 32, 32, 3\]; image of uint8"),
        (
            lambda graph: changed(graph, other_output),
            r"output is mask uint8 \[-1, 32, 32\]; probability of uint8 with 3 dimensions",
        ),
        (lambda graph: changed(graph, unknown_operator), "cannot read the graph .*NoSuchOperator"),
    ],
    ids=["empty", "float input", "other output", "unknown operator"],
)
def test_a_graph_that_violates_the_contract_is_rejected(
    data: Callable[[Graph], bytes], words: str, graph: Graph
) -> None:
    with pytest.raises(ModelError, match=words):
        build(data(graph), profile(), library=RTX)


@needs_rtx
@pytest.mark.parametrize(
    ("batch", "shapes", "words"),
    [
        (0, profile(64, 64), r"\[1, 64, 64, 3\] to \[4, 64, 64, 3\].* contradicts the graph, .* \[-1, 32, 32, 3\]"),
        (2, profile(batch=2), r"\[1, 32, 32, 3\] to \[2, .* contradicts the graph, .* \[2, 32, 32, 3\]"),
        (0, None, r"image is \[-1, 32, 32, 3\]: an optimization profile for -1 is needed"),
    ],
    ids=["size", "batch", "none"],
)
def test_a_profile_that_contradicts_the_graph_is_rejected(
    batch: int, shapes: Profile | None, words: str, graph: Graph
) -> None:
    with pytest.raises(ModelError, match=words):
        build(fixed(graph, batch) if batch else graph(), shapes, library=RTX)


# --- progress and Ctrl-C ---


@needs_rtx
def test_progress_is_reported(graph: Graph) -> None:
    news: list[tuple[str, int, int]] = []
    build(graph(), profile(), library=RTX, watch=lambda *step: news.append(step))
    assert len({phase for phase, _, _ in news}) > 3
    assert all(0 <= done <= total for _, done, total in news)
    assert news[0][1] == 0
    phase, done, total = news[-1]
    assert (phase, done) == (news[0][0], total)


@needs_rtx
@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("a broken bar")])
def test_an_exception_in_the_progress_callback_cancels_the_build(
    error: BaseException, capfd: pytest.CaptureFixture[str], graph: Graph
) -> None:
    graph()
    calls = []

    def watch(phase: str, done: int, total: int) -> None:
        calls.append(phase)
        if len(calls) == 5:
            raise error

    capfd.readouterr()
    with pytest.raises(type(error)) as caught:
        build(graph(), profile(), library=RTX, watch=watch)
    assert caught.value is error
    assert len(calls) == 5
    assert capfd.readouterr() == ("", "")


@needs_rtx
@pytest.mark.parametrize("wakes", [True, False])
def test_ctrl_c_cancels_the_build(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], wakes: bool, graph: Graph
) -> None:
    """Even if nothing wakes the waiting thread, for example because another thread receives the signal."""
    graph()  # traced before, so that Ctrl-C arrives during the build
    made: list[tensorrt_build._Progress] = []
    news: list[str] = []

    class Progress(tensorrt_build._Progress):
        def __init__(self, watch: Any) -> None:
            super().__init__(watch)
            made.append(self)

    def watch(phase: str, done: int, total: int) -> None:
        news.append(phase)
        if wakes:
            os.kill(os.getpid(), signal.SIGINT)
        else:
            signal.pthread_kill(threading.get_ident(), signal.SIGINT)
        assert made[0].stop.wait(60)

    monkeypatch.setattr(tensorrt_build, "_Progress", Progress)
    capfd.readouterr()
    with pytest.raises(KeyboardInterrupt), terminable():  # as in a command
        build(graph(), profile(), library=RTX, watch=watch)
    assert len(news) == 1
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("petseg-tensorrt")]
    assert capfd.readouterr() == ("", "")


# --- the `tensorrt` branch, with TensorRT for RTX under that name ---


@pytest.fixture
def disguised(rtx: Any, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """`import tensorrt` returns TensorRT for RTX, on a machine with a GPU. Returns a record of the calls."""
    asked: dict[str, Any] = {}

    class Builder:
        def __init__(self, logger: Any) -> None:
            self.real = rtx.Builder(logger)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.real, name)

        def create_network(self, flags: int = 0) -> Any:
            asked["flags"] = flags
            return self.real.create_network(flags)

        def build_serialized_network(self, network: Any, config: Any) -> Any:
            asked["tf32"] = config.get_flag(rtx.BuilderFlag.TF32)
            if "fail" in asked:
                self.real.logger.log(rtx.ILogger.ERROR, "could not find\nany implementation for node_conv2d_7")
                return None
            return self.real.build_serialized_network(network, config)

    module = types.ModuleType("tensorrt")
    vars(module).update({**vars(rtx), "Builder": Builder, "__version__": "10.9.0.34"})
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    monkeypatch.setattr(host, "gpus", lambda: (GPU, dataclasses.replace(GPU, index=1, name="NVIDIA Other")))
    return asked


@pytest.mark.tensorrt
def test_the_tensorrt_branch_uses_strong_typing_without_tf32(disguised: dict[str, Any], rtx: Any, graph: Graph) -> None:
    built = build(graph(), profile(), library=TRT)
    assert disguised == {"flags": 1 << int(rtx.NetworkDefinitionCreationFlag.STRONGLY_TYPED), "tf32": False}
    assert built.environment["library"] == "tensorrt"
    environment = [built.environment[name] for name in ("gpu", "compute_capability", "driver")]
    assert environment == ["NVIDIA Fake", "8.7", "CUDA 12.6"]
    assert built.description["unknown"] == []


@pytest.mark.tensorrt
def test_tensorrt_builds_for_the_gpu_current_in_its_thread(disguised: dict[str, Any], graph: Graph) -> None:
    threads: list[str] = []
    built = build(
        graph(),
        profile(),
        library=TRT,
        device=1,
        activate=lambda: threads.append(threading.current_thread().name),
    )
    assert built.environment["gpu"] == "NVIDIA Other"
    assert [name.rpartition("_")[0] for name in threads] == ["petseg-tensorrt"]


@pytest.mark.tensorrt
def test_a_failed_build_gives_the_reason(disguised: dict[str, Any], graph: Graph) -> None:
    disguised["fail"] = True
    words = r"TensorRT 10\.9\.0\.34 cannot build the engine \(could not find any implementation for node_conv2d_7\)"
    with pytest.raises(EngineError, match=words):
        build(graph(), profile(), library=TRT)


@pytest.mark.tensorrt
def test_a_builder_that_fails_to_start_is_an_error(
    disguised: dict[str, Any], monkeypatch: pytest.MonkeyPatch, graph: Graph
) -> None:
    def builder(logger: Any) -> None:
        logger.log(type(logger).ERROR, "CUDA initialization failure with error: 35")
        raise TypeError("pybind11::init(): factory function returned nullptr")

    monkeypatch.setattr(sys.modules["tensorrt"], "Builder", builder)
    with pytest.raises(EngineError, match=r"does not start \(CUDA initialization failure with error: 35"):
        build(graph(), profile(), library=TRT)


@pytest.mark.tensorrt
@pytest.mark.filterwarnings("ignore:Use Deprecated in TensorRT-RTX:DeprecationWarning")
def test_a_timing_cache_is_saved_and_a_damaged_one_recreated(
    disguised: dict[str, Any], tmp_path: Path, graph: Graph
) -> None:
    path = tmp_path / "caches" / "timing"

    def messages() -> tuple[str, ...]:
        return build(graph(), profile(), library=TRT, timing_cache=path).messages

    assert messages() == ()
    saved = path.read_bytes()
    assert saved
    path.write_bytes(b"damaged" * 40)
    said = messages()[-1]
    assert said.startswith(f"{path}: the timing cache is created again: damaged, or of another GPU or version")
    assert "Failed to deserialize" in said
    assert len(path.read_bytes()) == len(saved)
    assert [file.name for file in path.parent.iterdir()] == ["timing"]
    path.unlink()
    path.mkdir()
    unreadable, unwritten = messages()
    assert "is created again: cannot be read (Is a directory)" in unreadable
    assert "cannot be written (Is a directory)" in unwritten


@pytest.mark.tensorrt
@pytest.mark.filterwarnings("ignore:Use Deprecated in TensorRT-RTX:DeprecationWarning")
def test_timing_caches_are_separate_per_gpu_and_version(disguised: dict[str, Any], graph: Graph) -> None:
    slot = timings_slot()
    assert (slot.key.version, slot.key.device) == ("10.9.0.34", "NVIDIA Fake, compute capability 8.7")
    assert timings_slot(1).key != slot.key

    def messages() -> tuple[str, ...]:
        return build(graph(), profile(), library=TRT, timing_cache=slot).messages

    assert messages() == ()
    (entry,) = cache.entries()
    assert (entry.path.suffix, entry.problem) == (".timings", "")
    entry.path.write_bytes(b"damaged" * 40)
    assert messages() == ("the timing cache is created again: the cached file's SHA-256 differs",)
    assert slot.read()[1] == ""
    entry.path.unlink()
    entry.path.mkdir()
    unreadable, unwritten = messages()
    assert unreadable.startswith("the timing cache is created again: the cached file cannot be used (")
    assert unwritten == "the timing cache cannot be written (Is a directory)"


@needs_rtx
def test_builds_share_a_logger_but_not_messages(graph: Graph) -> None:
    with pytest.raises(ModelError) as kept:  # its traceback keeps a builder alive, and the builder its logger
        build(b"not a graph", profile(), library=RTX)
    built = build(graph(), profile(), library=RTX)
    assert built.messages == ()
    assert kept.value.__traceback__


@needs_rtx
def test_unlisted_layers_are_reported_as_unknown(monkeypatch: pytest.MonkeyPatch, graph: Graph) -> None:
    monkeypatch.setattr(tensorrt_build, "_layers", lambda text: Counter())
    described = build(graph(), profile(), library=RTX).description
    assert (described["layers"], described["computed"]) == (None, None)
    assert described["unknown"][0] == "layers: the library did not list them"


@needs_rtx
def test_tensorrt_for_rtx_reports_that_it_has_no_timing_cache(tmp_path: Path, graph: Graph) -> None:
    path = tmp_path / "timing"
    built = build(graph(), profile(), library=RTX, timing_cache=path)
    assert built.messages == (f"{path}: not used; TensorRT for RTX times nothing and has no timing cache",)
    assert not path.exists()
