"""Tests of the TensorRT engine with fakes for CUDA and the library, and of the fakes against the real modules.

The fakes are as strict as the originals: work on a stream runs at the next synchronization and not before. Leaks,
double frees, use after free, and use on the wrong device are recorded in ``World.misuse``.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import gc
import importlib.util
import inspect
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import textwrap
import threading
import types
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from petseg_runtime import cache, host
from petseg_runtime.artifact import Artifact, open_artifact, sidecar_of, sidecar_text
from petseg_runtime.engines import tensorrt, tensorrt_build
from petseg_runtime.engines.base import Device, EngineOptions
from petseg_runtime.engines.registry import load_engine
from petseg_runtime.engines.tensorrt import TensorRTEngine, load, load_rtx
from petseg_runtime.engines.tensorrt_library import logger_of
from petseg_runtime.errors import EngineError, EngineMissing, ModelError, UsageError
from petseg_runtime.extras import install
from petseg_runtime.segmenter import Segmenter
from petseg_runtime.spec import ModelSpec

H, W = 16, 32
SPEC = ModelSpec(name="toy", height=H, width=W)
CUDART = "cuda.bindings.runtime"
LIBRARIES = ["tensorrt", "tensorrt_rtx"]
NAMES = {"tensorrt": "tensorrt", "tensorrt_rtx": "tensorrt-rtx"}
VERSION = "10.13.2.6"


class World:
    """The state of the fake machine, the calls that were made, and the errors in their use."""

    def __init__(self) -> None:
        self.devices, self.driver, self.capability = 2, 13000, (8, 9)
        self.memory: dict[int, np.ndarray] = {}  # device memory, by address
        self.pinned: dict[int, np.ndarray] = {}  # page-locked host memory, by address
        self.streams: dict[int, FakeStream] = {}
        self.handles: set[object] = set()  # graphs and executable graphs
        self.objects: weakref.WeakSet[Object] = weakref.WeakSet()  # objects of the library
        self.graveyard: list[np.ndarray] = []  # freed memory, kept so that a use after free does not crash
        self.misuse: list[str] = []
        self.last_error = 0
        self.calls: list[str] = []
        self.fail_at = -1
        self.fail_names: set[str] = set()
        self.raises = False
        self.refuses_capture = self.invalidates_capture = False
        self.addresses = iter(range(0x7F00_0000_0000, 0x7FFF_0000_0000, 0x1000_0000))
        self.local = threading.local()
        self.caches: list[FakeRuntimeCache] = []
        self.configs: list[FakeRuntimeConfig] = []

    def fails(self, name: str) -> bool:
        self.calls.append(name)
        return len(self.calls) - 1 == self.fail_at or name in self.fail_names

    def record_misuse(self, what: str) -> None:
        self.misuse.append(what)

    def check_clean(self) -> None:
        assert self.misuse == []
        assert (self.memory, self.pinned, self.streams, self.handles, set(self.objects)) == ({}, {}, {}, set(), set())
        assert self.last_error == 0

    def buffer(self, where: dict[int, np.ndarray], address: int, size: int) -> np.ndarray:
        if address not in where or where[address].size < size:
            self.record_misuse(f"{size} bytes at {address:#x} used, which is not there")
            return np.zeros(size, np.uint8)
        return where[address][:size]

    def stream(self, handle: Any) -> FakeStream:
        stream = self.streams.get(int(handle))
        if stream is None:
            self.record_misuse("a stream used that is not there")
            return FakeStream(0)
        if getattr(self.local, "device", 0) != stream.device:
            self.record_misuse("a stream used on another device than its own")
        return stream


class Stand:
    world: World  # a new one for each test


class CudaFailure(Exception):
    pass


class cudaError_t(enum.IntEnum):
    cudaSuccess = 0
    cudaErrorMemoryAllocation = 2
    cudaErrorInsufficientDriver = 35
    cudaErrorNoDevice = 100
    cudaErrorStreamCaptureInvalidated = 901
    cudaErrorUnknown = 999


class cudaMemcpyKind(enum.IntEnum):
    cudaMemcpyHostToDevice = 1
    cudaMemcpyDeviceToHost = 2


class cudaStreamCaptureMode(enum.IntEnum):
    cudaStreamCaptureModeThreadLocal = 1


class FakeStream:
    def __init__(self, device: int) -> None:
        self.device = device
        self.work: list[Callable[[], None]] = []
        self.recording: list[Callable[[], None]] | None = None
        self.invalid = False

    def __int__(self) -> int:
        return id(self)

    def add(self, work: Callable[[], None]) -> None:
        (self.work if self.recording is None else self.recording).append(work)


class Graph:
    def __init__(self, work: list[Callable[[], None]]) -> None:
        self.work = work


def cuda(values: int = 0, frees: bool = False) -> Callable[[Callable[..., Any]], Any]:
    """Give a function the calling convention of cuda.bindings: it returns an error code and `values` values, and can be
    made to fail; functions that free are made to fail by name only."""

    def decorate(function: Callable[..., Any]) -> Any:
        @functools.wraps(function)
        def call(self: FakeCudart, *args: Any) -> tuple[Any, ...]:
            name, world = function.__name__, Stand.world
            failing = name in world.fail_names if frees else world.fails(name)
            try:
                if failing and not name.startswith("cudaStreamEndCapture"):
                    raise CudaFailure(cudaError_t.cudaErrorUnknown)
                value = function(self, *args)
                if failing:  # EndCapture ends the capture even if it fails
                    world.handles.discard(value)
                    raise CudaFailure(cudaError_t.cudaErrorUnknown)
            except CudaFailure as failure:
                return (failure.args[0], *[None] * values)
            return (cudaError_t.cudaSuccess, *([value] if values else []))

        call.values = values  # type: ignore[attr-defined]
        return call

    return decorate


class FakeCudart:
    """A fake of the part of `cuda.bindings.runtime` that is used."""

    cudaError_t = cudaError_t
    cudaMemcpyKind = cudaMemcpyKind
    cudaStreamCaptureMode = cudaStreamCaptureMode
    cudaStreamNonBlocking = 1
    cudaHostAllocDefault = 0

    @cuda(1)
    def cudaGetDeviceCount(self) -> int:
        if not Stand.world.driver:
            raise CudaFailure(cudaError_t.cudaErrorInsufficientDriver)
        if not Stand.world.devices:
            raise CudaFailure(cudaError_t.cudaErrorNoDevice)
        return Stand.world.devices

    @cuda(1)
    def cudaDriverGetVersion(self) -> int:
        return Stand.world.driver

    def cudaGetErrorString(self, error: cudaError_t) -> tuple[cudaError_t, bytes]:
        return cudaError_t.cudaSuccess, f"in the words of CUDA: {error.name}".encode()

    cudaGetErrorString.values = 1  # type: ignore[attr-defined]

    def cudaGetLastError(self) -> tuple[int]:
        error, Stand.world.last_error = Stand.world.last_error, 0
        return (error,)

    cudaGetLastError.values = 0  # type: ignore[attr-defined]

    @cuda(1)
    def cudaGetDeviceProperties(self, device: int) -> Any:
        major, minor = Stand.world.capability
        return types.SimpleNamespace(name=b"NVIDIA Toy", major=major, minor=minor)

    @cuda()
    def cudaSetDevice(self, device: int) -> None:
        Stand.world.local.device = device

    @cuda(1)
    def cudaMalloc(self, size: int) -> int:
        address = next(Stand.world.addresses)
        Stand.world.memory[address] = np.full(size, 0xAA, np.uint8)
        return address

    @cuda(frees=True)
    def cudaFree(self, devPtr: int) -> None:
        self._free(Stand.world.memory, devPtr)

    @cuda(1)
    def cudaHostAlloc(self, size: int, flags: int) -> int:
        memory = np.full(size, 0xAA, np.uint8)
        Stand.world.pinned[memory.ctypes.data] = memory
        return int(memory.ctypes.data)

    @cuda(frees=True)
    def cudaFreeHost(self, ptr: int) -> None:
        self._free(Stand.world.pinned, ptr)

    def _free(self, where: dict[int, np.ndarray], address: int) -> None:
        world = Stand.world
        if any(stream.work for stream in world.streams.values()):
            world.record_misuse("memory freed while a stream may use it")
        if any(address in thing.addresses.values() for thing in world.objects if isinstance(thing, FakeContext)):
            world.record_misuse("memory freed before the context that knows its address")
        memory = where.pop(address, None)
        if memory is None:
            world.record_misuse("memory freed that is not there")
        else:
            memory[:] = 0xDD
            world.graveyard.append(memory)

    @cuda(1)
    def cudaStreamCreateWithFlags(self, flags: int) -> FakeStream:
        stream = FakeStream(getattr(Stand.world.local, "device", 0))
        Stand.world.streams[int(stream)] = stream
        return stream

    @cuda(frees=True)
    def cudaStreamDestroy(self, stream: Any) -> None:
        if Stand.world.stream(stream).work:
            Stand.world.record_misuse("a stream destroyed with work to do")
        Stand.world.streams.pop(int(stream), None)

    @cuda()
    def cudaStreamSynchronize(self, stream: Any) -> None:
        found = Stand.world.stream(stream)
        if found.recording is not None:
            Stand.world.record_misuse("waited for a stream that records")
        work, found.work = found.work, []
        for step in work:
            step()

    @cuda()
    def cudaMemcpyAsync(self, dst: int, src: int, count: int, kind: cudaMemcpyKind, stream: Any) -> None:
        world = Stand.world
        up = kind is cudaMemcpyKind.cudaMemcpyHostToDevice
        to, of = (world.memory, world.pinned) if up else (world.pinned, world.memory)

        def copy() -> None:
            world.buffer(to, dst, count)[:] = world.buffer(of, src, count)

        world.stream(stream).add(copy)

    @cuda()
    def cudaStreamBeginCapture(self, stream: Any, mode: cudaStreamCaptureMode) -> None:
        found = Stand.world.stream(stream)
        if found.recording is not None:
            Stand.world.record_misuse("a capture begun on a stream that is capturing")
        found.recording = []

    @cuda(1)
    def cudaStreamEndCapture(self, stream: Any) -> Graph:
        found = Stand.world.stream(stream)
        recorded, found.recording = found.recording, None
        assert recorded is not None
        if found.invalid:
            found.invalid = False
            raise CudaFailure(cudaError_t.cudaErrorStreamCaptureInvalidated)
        graph = Graph(recorded)
        Stand.world.handles.add(graph)
        return graph

    @cuda(1)
    def cudaGraphInstantiate(self, graph: Graph, flags: int) -> Graph:
        executable = Graph(graph.work)
        Stand.world.handles.add(executable)
        return executable

    @cuda()
    def cudaGraphLaunch(self, graphExec: Graph, stream: Any) -> None:
        if graphExec not in Stand.world.handles:
            Stand.world.record_misuse("a graph launched that is not there")
        for work in graphExec.work:
            Stand.world.stream(stream).add(work)

    @cuda(frees=True)
    def cudaGraphDestroy(self, graph: Graph) -> None:
        self._forget(graph)

    @cuda(frees=True)
    def cudaGraphExecDestroy(self, graphExec: Graph) -> None:
        self._forget(graphExec)

    def _forget(self, graph: Graph) -> None:
        if graph not in Stand.world.handles:
            Stand.world.record_misuse("a graph freed that is not there")
        Stand.world.handles.discard(graph)


class TensorIOMode(enum.Enum):
    NONE, INPUT, OUTPUT = range(3)


class DataType(enum.Enum):
    FLOAT, UINT8 = range(2)


class CudaGraphStrategy(enum.Enum):
    DISABLED, WHOLE_GRAPH_CAPTURE = range(2)


class KernelStrategy(enum.Enum):
    LAZY, EAGER, NONE = range(3)


class Severity(enum.Enum):
    INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)


class ILogger:
    Severity = Severity

    def __init__(self) -> None:
        self.initialised = True

    def log(self, severity: Severity, msg: str) -> None:
        raise AssertionError("to be overridden")


class Object:
    """An object of the library, which must be freed before the CUDA resources."""

    def __init__(self, logger: ILogger) -> None:
        self.logger = logger
        Stand.world.objects.add(self)


def can_fail(refusal: object) -> Callable[[Callable[..., Any]], Any]:
    """Make it possible for a method of the library to fail: it logs, and returns `refusal` or raises."""

    def decorate(method: Callable[..., Any]) -> Any:
        @functools.wraps(method)
        def call(self: Object, *args: Any) -> Any:
            if not Stand.world.fails(method.__name__):
                return method(self, *args)
            if Stand.world.raises:
                del self, args  # a traceback through C++ does not keep these alive
                raise RuntimeError("pybind11\nhas an exception")
            self.logger.log(Severity.WARNING, "of no interest")
            self.logger.log(Severity.ERROR, f"{method.__name__}: Error Code 1:\n  injected")
            return refusal

        return call

    return decorate


class FakeRuntime(Object):
    def __init__(self, logger: ILogger) -> None:
        assert logger.initialised
        super().__init__(logger)

    @can_fail(None)
    def deserialize_cuda_engine(self, serialized_engine: bytes) -> FakeEngine | None:
        try:
            return FakeEngine(self.logger, json.loads(serialized_engine))
        except ValueError:
            self.logger.log(Severity.ERROR, "Serialization assertion header.magicTag\n failed")
            return None


class FakeEngine(Object):
    def __init__(self, logger: ILogger, content: dict[str, Any]) -> None:
        super().__init__(logger)
        self.tensors, self.profile = content["tensors"], content["profile"]
        self.num_io_tensors = len(self.tensors)

    def get_tensor_name(self, index: int) -> str:
        return list(self.tensors)[index]

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        return TensorIOMode[self.tensors[name][0]]

    def get_tensor_dtype(self, name: str) -> DataType:
        return DataType[self.tensors[name][1]]

    def get_tensor_shape(self, name: str) -> list[int]:
        return self.tensors[name][2]

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[list[int]]:
        assert profile_index == 0
        assert self.tensors[name][0] == "INPUT"
        return self.profile

    @can_fail(None)
    def create_runtime_config(self) -> FakeRuntimeConfig:
        return FakeRuntimeConfig(self.logger)

    @can_fail(None)
    def create_execution_context(self, runtime_config: FakeRuntimeConfig | None = None) -> FakeContext:
        return FakeContext(self, runtime_config)


class FakeRuntimeConfig(Object):
    def __init__(self, logger: ILogger) -> None:
        super().__init__(logger)
        self.cuda_graph_strategy = CudaGraphStrategy.DISABLED
        self.dynamic_shapes_kernel_specialization_strategy = KernelStrategy.LAZY
        self.cache: FakeRuntimeCache | None = None

    @can_fail(None)
    def create_runtime_cache(self) -> FakeRuntimeCache:
        return FakeRuntimeCache(self.logger)

    @can_fail(False)
    def set_runtime_cache(self, cache: FakeRuntimeCache) -> bool:
        self.cache = cache
        return True


class FakeRuntimeCache(Object):
    """Contains the shapes that kernels were compiled for, as JSON."""

    def __init__(self, logger: ILogger) -> None:
        super().__init__(logger)
        self.shapes: list[list[int]] = []

    def deserialize(self, blob: bytes) -> bool:
        try:
            self.shapes = json.loads(blob)
        except ValueError:
            return False
        return True

    def serialize(self) -> bytearray | None:
        return bytearray(json.dumps(self.shapes).encode()) if self.shapes else None


class FakeContext(Object):
    """Its network returns the red channel."""

    def __init__(self, engine: FakeEngine, config: FakeRuntimeConfig | None) -> None:
        super().__init__(engine.logger)
        self.engine, self.config = engine, config
        self.shape: tuple[int, ...] = ()
        self.addresses: dict[str, int] = {}
        self.state = 0  # a captured graph is valid for this state only
        self.warm = False
        if config is not None:
            assert config.cuda_graph_strategy is CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
            assert config.dynamic_shapes_kernel_specialization_strategy is KernelStrategy.EAGER

    @can_fail(False)
    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        low, _, high = self.engine.profile
        assert name == "image"
        if not all(a <= b <= c for a, b, c in zip(low, shape, high, strict=True)):
            self.logger.log(Severity.ERROR, f"{shape} is not in the profile")
            return False
        self.shape, self.state, self.warm = shape, self.state + 1, False
        return True

    @can_fail(False)
    def set_tensor_address(self, name: str, memory: int) -> bool:
        self.addresses[name] = memory
        self.state, self.warm = self.state + 1, False
        return True

    @can_fail(False)
    def execute_async_v3(self, stream_handle: int) -> bool:
        world = Stand.world
        assert isinstance(stream_handle, int)
        stream = world.stream(stream_handle)
        if stream.recording is not None:
            if not self.warm:
                world.record_misuse("captured without a launch before it")
            if world.refuses_capture:
                world.last_error, stream.invalid = 901, world.invalidates_capture
                self.logger.log(Severity.ERROR, "operation not permitted\nwhen stream is capturing")
                return False
        if (
            self.config is not None
            and self.config.cache is not None
            and list(self.shape) not in self.config.cache.shapes
        ):
            self.config.cache.shapes.append(list(self.shape))
        stream.add(self._computation())
        self.warm = True
        return True

    def _computation(self) -> Callable[[], None]:
        world, state, shape = Stand.world, self.state, self.shape
        size, (source, target) = int(np.prod(shape)), (self.addresses["image"], self.addresses["probability"])
        me = weakref.ref(self)

        def compute() -> None:
            context = me()
            if context is None or context.state != state:
                world.record_misuse("a graph launched after its context had changed")
            pixels = world.buffer(world.memory, source, size).reshape(shape)
            world.buffer(world.memory, target, size // 3)[:] = pixels[..., 0].reshape(-1)

        return compute


class ComputeCapability(enum.Enum):
    """Those of the stand-ins for GPUs, and one with three digits."""

    NONE, SM86, SM89, SM120 = 0, 86, 89, 120


def fake_library(name: str) -> types.ModuleType:
    module = types.ModuleType(name)
    common = {"Runtime": FakeRuntime, "ILogger": ILogger, "TensorIOMode": TensorIOMode, "DataType": DataType}
    rtx = {
        "CudaGraphStrategy": CudaGraphStrategy,
        "DynamicShapesKernelSpecializationStrategy": KernelStrategy,
        "ComputeCapability": ComputeCapability,
    }
    vars(module).update(common, __version__=VERSION, **(rtx if name == "tensorrt_rtx" else {}))
    return module


@pytest.fixture(autouse=True)
def world(monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    """A new fake machine for each test; at the end nothing may have leaked or been misused, in every test."""
    world = World()
    monkeypatch.setattr(Stand, "world", world, raising=False)
    gc.freeze()  # otherwise the collection below would scan all modules that other tests have imported: half a second
    yield world
    gc.collect()  # errors that a test has caught hold frames, which hold objects of the library
    world.check_clean()


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in LIBRARIES:
        monkeypatch.setitem(sys.modules, name, fake_library(name))
    monkeypatch.setitem(sys.modules, "cuda", types.ModuleType("cuda"))
    monkeypatch.setitem(sys.modules, "cuda.bindings", types.ModuleType("cuda.bindings"))
    monkeypatch.setitem(sys.modules, CUDART, FakeCudart())


@pytest.fixture(params=LIBRARIES)
def library(request: pytest.FixtureRequest, fakes: None) -> str:
    return str(request.param)


def content(
    low: tuple[int, ...] = (1, H, W, 3), high: tuple[int, ...] = (4, H, W, 3), **tensors: tuple[str, str, list[int]]
) -> dict[str, Any]:
    """The content of a serialized engine of the fake library."""
    shape = [a if a == b else -1 for a, b in zip(low, high, strict=True)]
    default = {"image": ("INPUT", "UINT8", shape), "probability": ("OUTPUT", "UINT8", shape[:3])}
    return {"tensors": tensors or default, "profile": [low, low, high]}


def open_engine(
    folder: Path, library: str, made: dict[str, Any] | None = None, spec: ModelSpec = SPEC, **arguments: Any
) -> TensorRTEngine:
    path = folder / "toy.engine"
    path.write_text(json.dumps(made or content()))
    environment = {"library": library, "version": VERSION, "compute_capability": "8.9"}
    environment |= arguments.pop("environment", {})
    return TensorRTEngine(path, spec, environment, **{"precision": "fp16", **arguments})


def photos(count: int, height: int = H, width: int = W) -> np.ndarray:
    return np.random.default_rng(count).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


# ------------------------------------------------------------------------------------------------------------ running


@pytest.mark.parametrize("low", [1, 3])
@pytest.mark.parametrize("high", [3, 4])
def test_any_number_of_photos_is_run_in_padded_batches(
    library: str, low: int, high: int, tmp_path: Path, world: World
) -> None:
    made = content((low, H, W, 3), (high, H, W, 3))
    with open_engine(tmp_path, library, made) as engine:
        for count in (1, 2, 3, 4, 5, 8, 9, 13, 1, 1):
            batch = photos(count)
            result = engine.run(batch)
            assert (result.dtype, result.shape) == (np.uint8, (count, H, W))
            np.testing.assert_array_equal(result, batch[..., 0])
        assert {memory.size for memory in world.memory.values()} == {high * H * W * 3, high * H * W}


@pytest.mark.parametrize(("high", "sizes"), [(8, {1, 2, 4, 8}), (6, {1, 2, 4, 6})])
def test_there_are_few_batch_sizes_because_each_new_one_costs_time(
    library: str, high: int, sizes: set[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: set[int] = set()
    set_shape = FakeContext.set_input_shape

    def recorded(context: FakeContext, name: str, shape: tuple[int, ...]) -> Any:
        seen.add(shape[0])
        return set_shape(context, name, shape)

    monkeypatch.setattr(FakeContext, "set_input_shape", recorded)
    with open_engine(tmp_path, library, content(high=(high, H, W, 3))) as engine:
        for count in range(1, 9):
            np.testing.assert_array_equal(engine.run(photos(count)), photos(count)[..., 0])
    assert seen == sizes


def test_a_fixed_batch_engines_profile_is_not_queried(library: str, tmp_path: Path) -> None:
    made = content((2, H, W, 3), (2, H, W, 3))
    with open_engine(tmp_path, library, made) as engine:
        batch = photos(5)
        np.testing.assert_array_equal(engine.run(batch), batch[..., 0])


def test_a_dynamic_size_runs_within_the_profile(library: str, tmp_path: Path) -> None:
    made = content((1, 16, 16, 3), (2, 48, 64, 3))
    spec = ModelSpec(name="toy", height=H, width=W, dynamic_size=True)
    with open_engine(tmp_path, library, made, spec) as engine:
        for height, width in ((16, 16), (48, 64), (32, 16), (32, 16)):
            batch = photos(3, height, width)
            np.testing.assert_array_equal(engine.run(batch), batch[..., 0])
        with pytest.raises(UsageError, match="built for photos of 16 x 16 to 48 x 64, not of 64 x 64"):
            engine.run(photos(1, 64, 64))


def test_batches_are_padded_with_the_last_photo(library: str, tmp_path: Path, world: World) -> None:
    with open_engine(tmp_path, library, content((4, H, W, 3), (4, H, W, 3))) as engine:
        batch = photos(2)
        engine.run(photos(4))
        engine.run(batch)
        (sent,) = (memory for memory in world.memory.values() if memory.size == 4 * H * W * 3)
        np.testing.assert_array_equal(sent.reshape(4, H, W, 3), batch[[0, 1, 1, 1]])


@pytest.mark.parametrize("name", ["set_input_shape", "execute_async_v3", "cudaMemcpyAsync"])
def test_a_call_after_a_failed_one_is_correct(library: str, name: str, tmp_path: Path, world: World) -> None:
    with open_engine(tmp_path, library) as engine:
        for count in (2, 1, 1, 2, 2):
            world.fail_names = {name}
            with pytest.raises(EngineError):
                engine.run(photos(3))
            world.fail_names = set()
            np.testing.assert_array_equal(engine.run(photos(count)), photos(count)[..., 0])
        world.fail_names = {name}
        with pytest.raises(EngineError):
            engine.run(photos(3))
        world.fail_names = set()
        for _ in range(3):
            np.testing.assert_array_equal(engine.run(photos(3)), photos(3)[..., 0])


def test_results_are_not_shared_buffers(library: str, tmp_path: Path) -> None:
    batch = photos(2)
    with open_engine(tmp_path, library) as engine:
        first = engine.run(batch)
        kept = first.copy()
        engine.run(255 - batch)
        np.testing.assert_array_equal(first, kept)
        first[:] = 7
        np.testing.assert_array_equal(engine.run(batch), kept)
    np.testing.assert_array_equal(kept, batch[..., 0])


def test_memory_layout_does_not_matter_and_input_is_not_modified(library: str, tmp_path: Path) -> None:
    batch = np.asfortranarray(photos(3))
    before = batch.copy()
    with open_engine(tmp_path, library) as engine:
        np.testing.assert_array_equal(engine.run(batch), before[..., 0])
        np.testing.assert_array_equal(engine.run(batch[::-1]), before[::-1, ..., 0])
    np.testing.assert_array_equal(batch, before)


def test_a_batch_of_another_shape_is_rejected(library: str, tmp_path: Path) -> None:
    with open_engine(tmp_path, library) as engine:
        for batch in (photos(1).astype(np.float32), photos(1)[0], photos(0), photos(1, 32, 32), photos(1, 15, 32)):
            with pytest.raises(UsageError):
                engine.run(batch)


@pytest.mark.parametrize("device", [0, 1])
def test_eight_threads_take_turns_on_the_selected_gpu(library: str, device: int, tmp_path: Path, world: World) -> None:
    batches = [photos(count) for count in range(1, 7)]
    with open_engine(tmp_path, library, device=device) as engine, ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda i: engine.run(batches[i % 6]), range(120)))
        for i, result in enumerate(results):
            np.testing.assert_array_equal(result, batches[i % 6][..., 0])
        pool.submit(engine.close).result()
    assert world.misuse == []


def test_an_engine_describes_what_is_actually_running(library: str, tmp_path: Path) -> None:
    with open_engine(tmp_path, library, device=1, precision="tf32") as engine:
        info = engine.describe()
        assert engine.spec is SPEC
    assert (info.name, info.version, info.device) == (NAMES[library], VERSION, "cuda:1")
    assert (info.precision, info.threads) == ("tf32", 0)
    rtx = library == "tensorrt_rtx"
    assert info.provider == f"NVIDIA Toy, {'CUDA graph left to the library' if rtx else 'CUDA graph'}"
    assert (info.batch, info.notes) == (4, ("TensorRT for RTX: kernels compiled",) if rtx else ())


# -------------------------------------------------------------------------------------------------------- CUDA graphs


def test_a_repeated_shape_runs_as_a_graph_captured_once(fakes: None, tmp_path: Path, world: World) -> None:
    with open_engine(tmp_path, "tensorrt") as engine:
        assert len(world.handles) == 1
        world.calls.clear()
        for _ in range(5):
            engine.run(photos(1))
        assert world.calls.count("cudaGraphLaunch") == 5
        assert world.calls.count("execute_async_v3") == 0
        engine.run(photos(2))
        assert len(world.handles) == 0  # a graph is invalid once its context has changed
        engine.run(photos(2))
        engine.run(photos(2))
        assert len(world.handles) == 1
        assert world.calls.count("cudaGraphInstantiate") == 1
        assert world.calls.count("cudaGraphLaunch") == 7


@pytest.mark.parametrize("invalidates", [True, False])
def test_a_failed_capture_is_noted_and_not_retried(
    fakes: None, invalidates: bool, tmp_path: Path, world: World
) -> None:
    world.refuses_capture, world.invalidates_capture = True, invalidates
    with open_engine(tmp_path, "tensorrt") as engine:
        provider = engine.describe().provider
        assert provider.startswith("NVIDIA Toy, no CUDA graph (")
        assert "operation not permitted when stream is capturing" in provider
        for count in (1, 1, 2, 2):
            np.testing.assert_array_equal(engine.run(photos(count)), photos(count)[..., 0])
        assert world.calls.count("cudaStreamBeginCapture") == 1
        assert engine.describe().provider == provider


@pytest.mark.parametrize("name", ["cudaStreamBeginCapture", "cudaStreamEndCapture", "cudaGraphInstantiate"])
def test_a_graph_rejected_by_cuda_is_noted(fakes: None, name: str, tmp_path: Path, world: World) -> None:
    world.fail_names = {name}
    with open_engine(tmp_path, "tensorrt") as engine:
        assert re.search(r"no CUDA graph \(cuda:0 cannot .*words of CUDA", engine.describe().provider)
        np.testing.assert_array_equal(engine.run(photos(1)), photos(1)[..., 0])


def test_the_engine_works_after_ctrl_c_during_the_capture(
    fakes: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    with open_engine(tmp_path, "tensorrt") as engine:
        engine.run(photos(2))
        with monkeypatch.context() as patch:
            patch.setattr(engine, "_launch", interrupted)
            with pytest.raises(KeyboardInterrupt):
                engine.run(photos(2))
        for batch in (255 - photos(2), photos(2)):
            np.testing.assert_array_equal(engine.run(batch), batch[..., 0])
        assert engine.describe().provider == "NVIDIA Toy, CUDA graph"


def test_a_capture_that_ends_with_a_null_graph_leaves_no_error_behind(
    fakes: None, tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Freeing it sets CUDA's last error again, which the library would attribute to one of its launches."""
    null, end, destroy = Graph([]), FakeCudart.cudaStreamEndCapture, FakeCudart.cudaGraphDestroy

    def ended(cudart: FakeCudart, stream: Any) -> tuple[Any, Any]:
        status, graph = end(cudart, stream)
        return status, graph or null

    def destroyed(cudart: FakeCudart, graph: Graph) -> Any:
        if graph is not null:
            return destroy(cudart, graph)
        world.last_error = 1
        return (cudaError_t.cudaErrorUnknown,)

    monkeypatch.setattr(FakeCudart, "cudaStreamEndCapture", ended)
    monkeypatch.setattr(FakeCudart, "cudaGraphDestroy", destroyed)
    world.refuses_capture = world.invalidates_capture = True
    with open_engine(tmp_path, "tensorrt") as engine:
        assert "no CUDA graph" in engine.describe().provider
        assert world.last_error == 0


def test_tensorrt_for_rtx_captures_graphs_itself(fakes: None, tmp_path: Path, world: World) -> None:
    with open_engine(tmp_path, "tensorrt_rtx") as engine:
        for _ in range(3):
            engine.run(photos(1))
    assert "cudaStreamBeginCapture" not in world.calls


# ----------------------------------------------------------------------------------------------------- the kernel cache


def kernels() -> list[Any]:
    """The kernels compiled by the fake TensorRT for RTX, as stored in the cache."""
    (entry,) = (entry for entry in cache.entries() if entry.path.suffix == ".kernels")
    return list(json.loads(entry.path.read_bytes()))


def test_kernels_are_cached_once_compiled_and_reused(fakes: None, tmp_path: Path) -> None:
    with open_engine(tmp_path, "tensorrt_rtx") as engine:
        assert engine.describe().notes == ("TensorRT for RTX: kernels compiled",)
        assert kernels() == [[1, H, W, 3]]
        engine.run(photos(3))
    assert kernels() == [[1, H, W, 3], [4, H, W, 3]]
    (entry,) = cache.entries()
    before = entry.path.stat()
    with open_engine(tmp_path, "tensorrt_rtx") as engine:
        assert engine.describe().notes == ()
        engine.run(photos(3))
    assert entry.path.stat() == before  # nothing new was compiled, so nothing is written
    assert len(cache.entries()) == 1


def test_cached_kernels_are_keyed_by_engine_version_gpu_and_driver(
    fakes: None, tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def count() -> int:
        open_engine(
            tmp_path, "tensorrt_rtx", made, environment={"version": "10", "compute_capability": "portable"}
        ).close()
        return len(cache.entries())

    made = content()
    assert [count(), count()] == [1, 1]
    made = content((1, H, W, 3), (5, H, W, 3))
    assert count() == 2
    world.driver = 13010
    assert count() == 3
    world.capability = (12, 0)
    assert count() == 4
    monkeypatch.setattr(sys.modules["tensorrt_rtx"], "__version__", "10.14.1")
    assert [count(), count()] == [5, 5]
    keys = [entry.key for entry in cache.entries()]
    assert {key.name for key in keys if key} == {"toy"}


def test_kernels_rejected_by_the_library_are_noted_and_replaced(fakes: None, tmp_path: Path) -> None:
    open_engine(tmp_path, "tensorrt_rtx").close()
    (entry,) = cache.entries()
    assert entry.key
    cache.Slot(entry.key, "kernels").write(b"of another driver")
    with open_engine(tmp_path, "tensorrt_rtx") as engine:
        note = "kernels compiled again: the library rejects those in the cache"
        assert engine.describe().notes == (f"TensorRT for RTX: {note}",)
    assert kernels() == [[1, H, W, 3]]


def test_kernels_on_which_the_library_raises_are_noted_and_recompiled(
    fakes: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def raises(self: FakeRuntimeCache, blob: bytes) -> bool:
        raise RuntimeError("not a cache\nof kernels")

    open_engine(tmp_path, "tensorrt_rtx").close()
    monkeypatch.setattr(FakeRuntimeCache, "deserialize", raises)
    with open_engine(tmp_path, "tensorrt_rtx") as engine:
        note = "kernels compiled again: the library rejects those in the cache (not a cache of kernels)"
        assert engine.describe().notes == (f"TensorRT for RTX: {note}",)
        np.testing.assert_array_equal(engine.run(photos(2)), photos(2)[..., 0])


def test_kernels_that_cannot_be_serialized_are_noted_and_everything_is_freed(
    fakes: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, world: World
) -> None:
    def raises(self: FakeRuntimeCache) -> bytearray:
        raise RuntimeError("no memory")

    monkeypatch.setattr(FakeRuntimeCache, "serialize", raises)
    with open_engine(tmp_path, "tensorrt_rtx") as engine:
        note = "kernels compiled, which cannot be kept (no memory)"
        assert engine.describe().notes == (f"TensorRT for RTX: {note}",)
    assert cache.entries() == []
    world.check_clean()


def test_closing_frees_everything_even_if_saving_kernels_is_interrupted(
    fakes: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, world: World
) -> None:
    def interrupted(self: FakeRuntimeCache) -> bytearray:
        raise KeyboardInterrupt

    engine = open_engine(tmp_path, "tensorrt_rtx")
    monkeypatch.setattr(FakeRuntimeCache, "serialize", interrupted)
    with pytest.raises(KeyboardInterrupt):
        engine.close()
    assert world.memory == {}


def test_modified_kernels_are_never_passed_to_the_library(fakes: None, tmp_path: Path) -> None:
    open_engine(tmp_path, "tensorrt_rtx").close()
    (entry,) = cache.entries()
    entry.path.write_text("[[2, 16, 32, 3]]")
    with open_engine(tmp_path, "tensorrt_rtx") as engine:
        (note,) = engine.describe().notes
        assert note == "TensorRT for RTX: kernels compiled again: the cached file's SHA-256 differs"
    assert kernels() == [[1, H, W, 3]]


def test_an_unusable_cache_is_noted_and_only_costs_time(fakes: None, tmp_path: Path) -> None:
    folder = cache.cache_folder()
    assert folder
    folder.parent.mkdir(parents=True)
    folder.touch()
    with open_engine(tmp_path, "tensorrt_rtx") as engine:
        notes = engine.describe().notes
        assert notes == ("TensorRT for RTX: kernels compiled, which cannot be kept (File exists)",)
        np.testing.assert_array_equal(engine.run(photos(2)), photos(2)[..., 0])
        engine.run(photos(3))
    assert engine.describe().notes == notes


def test_without_a_cache_kernels_are_not_saved(
    fakes: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, world: World
) -> None:
    monkeypatch.setenv(cache.VARIABLE, "")
    with open_engine(tmp_path, "tensorrt_rtx") as engine:
        assert engine.describe().provider == "NVIDIA Toy, CUDA graph left to the library"
    assert "create_runtime_cache" not in world.calls


def test_tensorrt_has_no_kernel_cache(fakes: None, tmp_path: Path) -> None:
    with open_engine(tmp_path, "tensorrt") as engine:
        assert engine.describe().provider == "NVIDIA Toy, CUDA graph"
    assert cache.entries() == []


# ------------------------------------------------------------------------------------------------- compiling ONNX files


class Factory:
    """A fake builder: records its arguments, and returns engines of the fake library."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.engine = json.dumps(content()).encode()

    def build(self, graph: bytes, profile: Any, **asked: Any) -> tensorrt_build.Built:
        trt = sys.modules[asked["library"].module]
        asked["activate"]()
        self.asked.append({"graph": graph, "profile": profile, "current": Stand.world.local.device, **asked})
        capability = list(asked["compute_capabilities"]) or "8.9"
        return tensorrt_build.Built(
            engine=self.engine,
            environment={
                "library": asked["library"].module,
                "version": trt.__version__,
                "compute_capability": capability,
            },
            description={},
            messages=("a warning of the library",),
        )


@pytest.fixture
def factory(fakes: None, monkeypatch: pytest.MonkeyPatch) -> Factory:
    factory = Factory()
    monkeypatch.setattr(tensorrt_build, "build", factory.build)
    for name in LIBRARIES:  # what `timings_slot` needs of it
        vars(sys.modules[name]).update(Builder=None, OnnxParser=None)
    gpu = host.Gpu(index=0, name="NVIDIA Toy", compute_capability="8.9", memory=2**33, driver="CUDA 13.0")
    monkeypatch.setattr(host, "gpus", lambda: (gpu, dataclasses.replace(gpu, index=1)))
    return factory


def opened(artifact: Artifact, library: str, **options: Any) -> TensorRTEngine:
    asked = EngineOptions(**{"device": Device("cuda"), "notes": ("passed over",), **options})
    return (load if library == "tensorrt" else load_rtx)(artifact, asked)


TITLES = {"tensorrt": "TensorRT", "tensorrt_rtx": "TensorRT for RTX"}


def test_an_onnx_file_is_compiled_once_for_the_requested_gpu(
    library: str, factory: Factory, toy: Callable[..., Artifact], tmp_path: Path, world: World
) -> None:
    artifact = toy(tmp_path / "toy.onnx")
    with opened(artifact, library, device=Device("cuda", 1)) as engine:
        np.testing.assert_array_equal(engine.run(photos(6)), photos(6)[..., 0])
        info = engine.describe()
    assert (info.name, info.device, info.precision, info.batch) == (NAMES[library], "cuda:1", "f32", 4)
    passed, note, message, *kernels = info.notes
    assert kernels == (["TensorRT for RTX: kernels compiled"] if library == "tensorrt_rtx" else [])
    assert (passed, message) == ("passed over", "a warning of the library")
    assert re.fullmatch(rf"{TITLES[library]}: compiled in \d+\.\d s", note)
    (asked,) = factory.asked
    assert asked["graph"] == artifact.path.read_bytes()
    assert asked["profile"].maximum == (8, H, W, 3)
    assert (asked["device"], asked["current"]) == (1, 1)
    assert asked["compute_capabilities"] == (("8.9",) if library == "tensorrt_rtx" else ())
    assert (asked["timing_cache"] is None) == (library == "tensorrt_rtx")
    with opened(artifact, library, device=Device("cuda", 1)) as engine:
        np.testing.assert_array_equal(engine.run(photos(2)), photos(2)[..., 0])
        assert engine.describe().notes == ("passed over",)
    assert len(factory.asked) == 1


def test_a_compilation_and_the_wait_for_another_are_announced(
    library: str, factory: Factory, toy: Callable[..., Artifact], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact, told, waits = toy(tmp_path / "toy.onnx"), [], threading.Event()
    builds, build = threading.Event(), factory.build

    def build_slowly(*asked: Any, **more: Any) -> tensorrt_build.Built:
        builds.set()
        assert waits.wait(60)
        return build(*asked, **more)

    def tell(what: str) -> None:
        told.append(what)
        waits.set()

    monkeypatch.setattr(tensorrt_build, "build", build_slowly)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(opened, artifact, library, tell=told.append)
        assert builds.wait(60)
        opened(artifact, library, tell=tell).close()
        first.result().close()
    title = TITLES[library]
    assert told == [
        f"{title} builds an engine of toy.onnx for NVIDIA Toy; the first time, this can take minutes",
        f"waiting for another process that builds the {title} engine of toy.onnx",
    ]


def test_an_engine_for_a_gpu_that_the_library_does_not_know_is_not_announced(
    factory: Factory, toy: Callable[..., Artifact], tmp_path: Path, world: World
) -> None:
    """Such as a data centre's: each command would announce minutes of compilation, and go on with another engine."""
    world.capability = (9, 0)
    told: list[str] = []
    with pytest.raises(EngineError, match=r"cannot build for compute capability 9\.0; it supports 8\.6, 8\.9, 12\.0"):
        opened(toy(tmp_path / "toy.onnx"), "tensorrt_rtx", tell=told.append)
    assert (told, factory.asked) == ([], [])


def test_each_gpu_driver_version_and_model_is_compiled_separately(
    library: str,
    factory: Factory,
    toy: Callable[..., Artifact],
    tmp_path: Path,
    world: World,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def compilations(artifact: Artifact) -> tuple[int, str]:
        with opened(artifact, library) as engine:
            notes = engine.describe().notes
        return len(factory.asked), " ".join(notes[1:2])

    artifact = toy(tmp_path / "toy.onnx")
    assert compilations(artifact)[0] == 1
    assert compilations(toy(tmp_path / "other.onnx", channel=1))[0] == 2
    world.driver = 13010
    count, note = compilations(artifact)
    assert (count, note.partition(" s: ")[2]) == (3, "driver CUDA 13.1 instead of CUDA 13.0")
    assert "compiled again in" in note
    monkeypatch.setattr(sys.modules[library], "__version__", "10.14.1")
    count, note = compilations(artifact)
    assert (count, note.partition(" s: ")[2]) == (4, f"{NAMES[library]} 10.14.1 instead of {VERSION}")
    assert compilations(artifact) == (4, "")


def test_a_cached_engine_rejected_by_the_library_is_recompiled(
    library: str, factory: Factory, toy: Callable[..., Artifact], tmp_path: Path
) -> None:
    artifact = toy(tmp_path / "toy.onnx")
    good, factory.engine = factory.engine, b"of no use"
    for _ in range(2):  # a newly built engine that is rejected is not built a second time
        with pytest.raises(EngineError, match=r"toy\.onnx: TensorRT.* cannot load it \(Serialization assertion"):
            opened(artifact, library)
        factory.engine = b"of no use either" if len(factory.asked) == 1 else good
    assert len(factory.asked) == 2
    with opened(artifact, library) as engine:
        np.testing.assert_array_equal(engine.run(photos(2)), photos(2)[..., 0])
        note = engine.describe().notes[1]
    assert re.search(r"compiled again in .* s: .*toy\.onnx: TensorRT.* cannot load it \(Serialization", note)
    with opened(artifact, library) as engine:
        assert engine.describe().notes == ("passed over",)
    assert len(factory.asked) == 3


def test_without_the_gpu_nothing_is_compiled(
    library: str, factory: Factory, toy: Callable[..., Artifact], tmp_path: Path, world: World
) -> None:
    artifact = toy(tmp_path / "toy.onnx")
    with pytest.raises(EngineError, match=r"there is no GPU cuda:5; CUDA finds 2"):
        opened(artifact, library, device=Device("cuda", 5))
    world.devices = 0
    with pytest.raises(EngineError, match="no NVIDIA GPU can be used"):
        opened(artifact, library)
    assert factory.asked == []


def test_a_file_changed_while_loading_is_not_cached_under_a_wrong_key(
    library: str, factory: Factory, toy: Callable[..., Artifact], tmp_path: Path
) -> None:
    artifact = toy(tmp_path / "toy.onnx")
    toy(tmp_path / "toy.onnx", channel=2)
    with pytest.raises(ModelError, match=r"toy\.onnx: changed while it was loaded"):
        opened(artifact, library)
    artifact.path.unlink()
    with pytest.raises(ModelError, match=r"toy\.onnx: cannot be read \(No such file"):
        opened(artifact, library)
    assert (factory.asked, cache.entries()) == ([], [])


def test_a_graph_unsupported_by_tensorrt_goes_to_the_next_engine(
    factory: Factory, toy: Callable[..., Artifact], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(graph: bytes, profile: Any, *, library: Any, **_: Any) -> None:
        raise ModelError(f"{library.title} {VERSION} cannot read the graph (Gather /x: no importer)")

    monkeypatch.setattr(tensorrt_build, "build", refuse)
    artifact = toy(tmp_path / "toy.onnx")
    with load_engine(artifact, threads=1) as engine:
        np.testing.assert_array_equal(engine.run(photos(2)), photos(2)[..., 0])
        info = engine.describe()
    assert info.device == "cpu"
    for title, note in zip(TITLES.values(), info.notes, strict=False):
        assert note == f"{artifact.path}: {title} {VERSION} cannot read the graph (Gather /x: no importer)"
    for name in NAMES.values():
        with pytest.raises(EngineError, match=r"toy\.onnx: TensorRT.* cannot read the graph"):
            load_engine(artifact, name)


def test_an_engine_is_compiled_for_the_requested_size(
    library: str, factory: Factory, toy: Callable[..., Artifact], tmp_path: Path
) -> None:
    artifact = toy(tmp_path / "toy.onnx", dynamic_size=True)
    factory.engine = json.dumps(content((1, 16, 16, 3), (8, 96, 64, 3))).encode()
    for size, largest in (((96, 16), (96, 64)), ((32, 48), (32, 64)), (None, (32, 64))):
        with Segmenter(artifact.path, backend=NAMES[library], device="cuda", size=size) as segmenter:
            batch = photos(2, *(size or (H, W)))
            np.testing.assert_array_equal(segmenter.infer(batch), batch[..., 0])
        assert factory.asked[-1]["profile"].maximum == (8, *largest, 3)
        best = size if size == (96, 16) else (H, W)  # an engine built for a single large size is tuned for it
        assert factory.asked[-1]["profile"].optimum == (1, *best, 3)
    assert len(factory.asked) == 2, "sizes within the usual profile share an engine"


def test_a_compiled_file_for_smaller_sizes_fails_when_it_is_loaded(library: str, tmp_path: Path) -> None:
    spec = ModelSpec(name="toy", height=H, width=W, dynamic_size=True)
    with pytest.raises(UsageError, match="built for photos of 16 x 16 to 48 x 64, not of 64 x 64"):
        open_engine(tmp_path, library, content((1, 16, 16, 3), (2, 48, 64, 3)), spec, size=(64, 64))


def test_a_compiled_file_is_loaded_unchanged(library: str, factory: Factory, tmp_path: Path) -> None:
    path = tmp_path / "toy.engine"
    path.write_text(json.dumps(content()))
    environment = {"library": library, "version": VERSION, "compute_capability": "8.9"}
    artifact = Artifact(path, "trt", SPEC, {}, {}, "", 0, None, environment)
    with opened(artifact, library) as engine:
        assert engine.describe().notes[0] == "passed over"
        assert not any("compiled in" in note for note in engine.describe().notes)
    assert factory.asked == []


def test_a_compiled_file_that_changed_after_it_was_opened_is_rejected(library: str, tmp_path: Path) -> None:
    path, name = tmp_path / "toy.engine", "trt" if library == "tensorrt" else "trt-rtx"
    path.write_text(json.dumps(content()))
    environment = {"library": library, "version": VERSION, "compute_capability": "8.9"}
    sidecar_of(path).write_text(sidecar_text(Artifact(path, name, SPEC, {}, {}, "", 0, None, environment)))
    artifact = open_artifact(path)
    load_engine(artifact, NAMES[library], device="cuda").close()
    path.write_text(json.dumps(content(high=(16, H, W, 3))))
    with pytest.raises(ModelError, match=r"toy\.engine: changed while it was loaded"):
        load_engine(artifact, NAMES[library], device="cuda")


@pytest.mark.tensorrt
def test_the_tensorrt_for_rtx_builder_works_with_the_cache(
    fakes: None, toy: Callable[..., Artifact], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the GPU is fake: the engine is built for the GPU that it reports, and the cached bytes are loaded."""
    monkeypatch.delitem(sys.modules, "tensorrt_rtx")
    trt = real("tensorrt_rtx")
    loaded: list[bytes] = []

    def refuse(self: Any, data: bytes) -> None:
        loaded.append(data)
        raise EngineError("far enough")

    monkeypatch.setattr(tensorrt.TensorRTEngine, "_load", refuse)
    artifact = toy(tmp_path / "float.onnx", nodes=red_in_float())
    for _ in range(2):
        with pytest.raises(EngineError, match="far enough"):
            opened(artifact, "tensorrt_rtx")
    (entry,) = cache.entries()
    assert loaded == [entry.path.read_bytes()] * 2
    assert entry.key
    assert (entry.key.version, entry.key.device) == (trt.__version__, "NVIDIA Toy, compute capability 8.9")
    assert entry.environment["compute_capability"] == ["8.9"]
    assert entry.environment["profile"]["maximum"] == [8, H, W, 3]
    assert entry.key.settings["profile"] == entry.environment["profile"]


# -------------------------------------------------------------------------------------------------- freeing resources


def scenario(folder: Path, library: str) -> None:
    """Everything that an engine does, once."""
    with open_engine(folder, library) as engine:
        for count in (1, 3, 3, 6):
            np.testing.assert_array_equal(engine.run(photos(count)), photos(count)[..., 0])
        engine.describe()


@pytest.mark.parametrize("raises", [False, True], ids=["refuses", "raises"])
def test_any_failure_is_a_petseg_error_and_everything_is_freed(
    library: str, raises: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = Stand.world
    scenario(tmp_path, library)
    calls = world.calls.copy()
    assert len(calls) > 40
    world.check_clean()
    spared, messages, held = set(), [], []
    for index, name in enumerate(calls):
        world = World()
        world.fail_at, world.raises = index, raises
        monkeypatch.setattr(Stand, "world", world)
        cache.clear()
        try:
            scenario(tmp_path, library)
        except EngineError as error:
            messages.append(str(error))
            held += [
                *world.memory,
                *world.pinned,
                *world.streams,
                *world.handles,
            ]  # while the error is still referenced
        else:
            spared.add(name)
        assert world.calls[index] == name
        world.check_clean()
    assert held == []
    reason = re.compile("in the words of CUDA: cuda|Error Code 1: injected|pybind11 has an exception")
    assert [message for message in messages if not reason.search(message) or "\n" in message] == []
    # Failures of the capture are notes, not errors. (The driver's version is queried only after an error.)
    graph = {"cudaStreamBeginCapture", "execute_async_v3", "cudaStreamEndCapture", "cudaGraphInstantiate"}
    assert spared <= {*graph, "cudaSetDevice"} if library == "tensorrt" else spared <= {"cudaSetDevice"}


@pytest.mark.parametrize("name", ["cudaFree", "cudaFreeHost", "cudaStreamDestroy", "cudaGraphExecDestroy"])
def test_a_failure_to_free_is_reported_once_and_the_rest_is_freed(
    fakes: None, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World()
    monkeypatch.setattr(Stand, "world", world)
    engine = open_engine(tmp_path, "tensorrt")
    world.fail_names = {name}
    with pytest.raises(EngineError, match=r"cuda:0 cannot free .*words of CUDA"):
        engine.close()
    engine.close()
    left = {"cudaFree": world.memory, "cudaFreeHost": world.pinned, "cudaStreamDestroy": world.streams}
    left["cudaGraphExecDestroy"] = dict.fromkeys(map(id, world.handles))  # type: ignore[assignment]
    assert [key for key, value in left.items() if value] == [name]
    assert (world.misuse, set(world.objects)) == ([], set())


def test_a_failure_to_free_does_not_hide_the_first_error(
    fakes: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World()
    monkeypatch.setattr(Stand, "world", world)
    engine = open_engine(tmp_path, "tensorrt")
    world.fail_names = {"cudaStreamSynchronize", "cudaFree", "cudaFreeHost"}
    with pytest.raises(EngineError, match="cannot compute"), engine:
        engine.run(photos(1))
    assert world.memory


def test_a_closed_engine_raises_and_can_be_closed_again(library: str, tmp_path: Path, world: World) -> None:
    engine = open_engine(tmp_path, library)
    engine.run(photos(1))
    engine.close()
    world.check_clean()
    engine.close()
    with engine, pytest.raises(EngineError, match="closed"):
        engine.run(photos(1))
    assert engine.describe().device == "cuda:0"


def test_an_unclosed_engine_is_freed_with_its_last_reference(library: str, tmp_path: Path, world: World) -> None:
    engine = open_engine(tmp_path, library)
    assert world.memory
    del engine
    world.check_clean()


def test_two_engines_are_independent(library: str, tmp_path: Path) -> None:
    with open_engine(tmp_path, library) as one:
        with open_engine(tmp_path, library) as other:
            np.testing.assert_array_equal(other.run(photos(2)), photos(2)[..., 0])
        np.testing.assert_array_equal(one.run(photos(3)), photos(3)[..., 0])


# --------------------------------------------------------------------------------- engines that do not fit this machine


#: How an engine for this GPU is built again; the device itself may have neither torch nor the checkpoint.
AGAIN = {
    "tensorrt": "`petseg export CHECKPOINT --format trt` on this device",
    "tensorrt_rtx": "`petseg export CHECKPOINT --format trt-rtx --compute-capability 8.9`",
}


@pytest.mark.parametrize("built", ["10.13.1.6", "10.12", "11.13.2.6", "10.13.2.60"])
def test_another_version_is_rejected_with_both_versions_and_a_remedy(
    library: str, built: str, tmp_path: Path, world: World
) -> None:
    with pytest.raises(EngineError, match=rf"built with .* {re.escape(built)}, and {VERSION} is installed") as caught:
        open_engine(tmp_path, library, environment={"version": built})
    assert str(caught.value).startswith(f"{tmp_path / 'toy.engine'}: ")
    assert f": install {built}, run the ONNX file that it was made from, " in str(caught.value)
    assert str(caught.value).endswith(f", or build it again: {AGAIN[library]}")
    assert "deserialize_cuda_engine" not in world.calls


def test_a_version_may_omit_the_build_number(library: str, tmp_path: Path) -> None:
    open_engine(tmp_path, library, environment={"version": "10.13.2"}).close()


@pytest.mark.parametrize("targets", ["8.9", ["8.6", "8.9"], "portable", ["portable"]])
def test_an_engine_for_this_gpu_is_loaded(library: str, targets: object, tmp_path: Path) -> None:
    open_engine(tmp_path, library, environment={"compute_capability": targets}).close()


@pytest.mark.parametrize("targets", ["8.6", ["7.5", "9.0"]])
def test_another_gpu_is_rejected_with_both_gpus_and_a_remedy(
    library: str, targets: str | list[str], tmp_path: Path, world: World
) -> None:
    named = targets if isinstance(targets, str) else ", ".join(targets)
    said = rf"compute capability {named}, and this one has 8\.9: run the ONNX file that it was made from, "
    with pytest.raises(EngineError, match=said) as caught:
        open_engine(tmp_path, library, environment={"compute_capability": targets})
    assert str(caught.value).endswith(f", or build it again: {AGAIN[library]}")
    assert "deserialize_cuda_engine" not in world.calls


@pytest.mark.parametrize("environment", [{"version": None}, {"version": ""}, {"compute_capability": None}])
def test_a_build_environment_with_missing_entries_is_rejected(
    library: str, environment: dict[str, object], tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match="does not state what it was built for"):
        open_engine(tmp_path, library, environment=environment)


def test_an_unknown_library_is_rejected(fakes: None, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="built with 'torch'; tensorrt or tensorrt_rtx is expected"):
        open_engine(tmp_path, "torch")


@pytest.mark.parametrize(
    ("driver", "devices", "device", "message"),
    [
        (0, 1, 0, "no NVIDIA GPU can be used: .*InsufficientDriver .there is no driver: install it"),
        (12040, 0, 0, "no NVIDIA GPU can be used: .*NoDevice .the driver is for CUDA 12.4"),
        (13000, 2, 2, "there is no GPU cuda:2; CUDA finds 2"),
        (13000, 2, -1, "there is no GPU cuda:-1"),
    ],
)
def test_a_nonexistent_gpu_is_an_error(
    library: str, driver: int, devices: int, device: int, message: str, tmp_path: Path, world: World
) -> None:
    world.driver, world.devices = driver, devices
    with pytest.raises(EngineError, match=message):
        open_engine(tmp_path, library, device=device)


def test_a_driver_that_does_not_start_is_the_reason(
    library: str, tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.driver = 0
    monkeypatch.setattr(host, "driver_trouble", lambda: "the driver does not start: reboot")
    with pytest.raises(EngineError, match=r"^no NVIDIA GPU can be used: the driver does not start: reboot$"):
        open_engine(tmp_path, library)


def test_a_driver_that_is_too_old_has_two_remedies(
    library: str, tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def insufficient(self: FakeCudart) -> tuple[Any, None]:
        return cudaError_t.cudaErrorInsufficientDriver, None

    monkeypatch.setattr(FakeCudart, "cudaGetDeviceCount", insufficient)
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    world.driver = 12040
    with pytest.raises(EngineError, match=r"the driver is for CUDA 12\.4.*: update it to 580 or newer, or") as caught:
        open_engine(tmp_path, library)
    assert f"pip install {NAMES[library]}-cu12 'cuda-bindings<13'" in str(caught.value)


def test_out_of_memory_is_reported_with_the_size(library: str, tmp_path: Path, world: World) -> None:
    world.fail_names = {"cudaHostAlloc"}
    with pytest.raises(EngineError, match=f"cuda:0 cannot allocate {4 * H * W * 3} bytes of page-locked memory"):
        open_engine(tmp_path, library)


def test_a_missing_package_is_named_with_its_extra(
    library: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    extra = "trt" if library == "tensorrt" else "rtx"
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, CUDART, None)
        for driver, package in (("CUDA 13.0", "cuda-bindings"), ("CUDA 12.6", "'cuda-bindings<13'")):
            gpu = host.Gpu(index=0, name="Toy", compute_capability="8.7", memory=2**33, driver=driver)
            patch.setattr(host, "gpus", lambda gpu=gpu: (gpu,))
            with pytest.raises(EngineMissing, match=f"^cuda-bindings is not installed: pip install {package}$"):
                open_engine(tmp_path, library)
        patch.delitem(sys.modules, CUDART)
        patch.setitem(sys.modules, "cuda.bindings", None)
        with pytest.raises(EngineMissing, match="cuda-bindings is not installed"):
            open_engine(tmp_path, library)
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(EngineMissing, match="^" + re.escape(f"{NAMES[library]} is not installed: {install(extra)}")):
        open_engine(tmp_path, library)


@pytest.mark.parametrize(
    "line",
    [
        "raise ImportError('libnvinfer.so.10: cannot open\\nshared object file')",
        "raise FileNotFoundError('cannot open shared object file')",
        "raise ModuleNotFoundError('cannot open shared object file', name='tensorrt_libs')",
    ],
)
def test_a_broken_package_is_an_error_with_the_reason(
    library: str, line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / f"{library}.py").write_text(line)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, library)
    with pytest.raises(EngineError, match=f"{library} is installed but cannot be imported .*shared object") as caught:
        open_engine(tmp_path, library)
    assert not isinstance(caught.value, EngineMissing)
    assert len(str(caught.value).splitlines()) == 1


def test_a_damaged_file_is_an_error_with_the_librarys_log(library: str, tmp_path: Path) -> None:
    path = tmp_path / "toy.engine"
    path.write_bytes(b"\x00 garbage")
    environment = {"library": library, "version": VERSION, "compute_capability": "8.9"}
    with pytest.raises(
        EngineError, match=r"cannot load it \(Serialization assertion header.magicTag failed\)"
    ) as caught:
        TensorRTEngine(path, SPEC, environment, precision="f32")
    assert str(caught.value).startswith(f"{path}: TensorRT")
    with pytest.raises(ModelError, match=r"missing\.engine: cannot be read \(No such file"):
        TensorRTEngine(tmp_path / "missing.engine", SPEC, environment, precision="f32")


def test_a_library_error_without_a_reason_says_so(
    library: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As if another program's logger had been registered first: a library uses only one.
    monkeypatch.setattr(FakeRuntime, "deserialize_cuda_engine", lambda self, data: None)
    with pytest.raises(EngineError, match=r"cannot load it \(no reason given\)"):
        open_engine(tmp_path, library)


IMAGE, PROBABILITY = ("INPUT", "UINT8", [-1, H, W, 3]), ("OUTPUT", "UINT8", [-1, H, W])


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"image": IMAGE}, "its tensors are image; 'image' and 'probability' are expected"),
        ({"x": IMAGE, "probability": PROBABILITY}, "its tensors are x, probability;"),
        ({"image": IMAGE, "probability": PROBABILITY, "more": PROBABILITY}, "probability, more;"),
        (
            {"image": ("INPUT", "FLOAT", [-1, H, W, 3]), "probability": PROBABILITY},
            r"an input, float \[-1, 16, 32, 3\]",
        ),
        ({"image": ("INPUT", "UINT8", [-1, 3, H, W]), "probability": PROBABILITY}, r"uint8 \[N, H, W, 3\] is expected"),
        ({"image": ("INPUT", "UINT8", [H, W, 3]), "probability": PROBABILITY}, r"uint8 \[16, 32, 3\]; an input"),
        ({"image": IMAGE, "probability": ("OUTPUT", "FLOAT", [-1, H, W])}, r"an output, float \[-1, 16, 32\]"),
        ({"image": IMAGE, "probability": ("OUTPUT", "UINT8", [-1, 1, H, W])}, r"uint8 \[-1, 1, 16, 32\]; an output"),
        ({"image": IMAGE, "probability": ("OUTPUT", "UINT8", [1, H, W])}, r"uint8 \[1, 16, 32\]; an output"),
        ({"image": PROBABILITY, "probability": IMAGE}, "'image' is an output"),
    ],
)
def test_an_engine_that_violates_the_contract_is_rejected(
    library: str, tensors: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        open_engine(tmp_path, library, content(**tensors))
    assert str(caught.value).startswith(f"{tmp_path / 'toy.engine'}: ")


def test_an_engine_of_another_size_than_its_spec_is_rejected(library: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="built for photos of 32 x 32 to 32 x 32, not of 16 x 32"):
        open_engine(tmp_path, library, content((1, 32, 32, 3), (4, 32, 32, 3)))


def test_importing_the_module_imports_neither_the_library_nor_cuda() -> None:
    unwanted = {"tensorrt", "tensorrt_rtx", "cuda.bindings"}  # cuda-bindings 12 imports "cuda" whenever Python starts
    program = f"import sys, petseg_runtime.engines.tensorrt; print({{*sys.modules}} & {unwanted})"
    done = subprocess.run([sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, timeout=100)
    assert (done.stdout.strip(), done.stderr) == ("set()", "")


# ------------------------------------------------------------------------------------- the real libraries, if installed


def real(name: str) -> Any:
    """The real module. TensorRT is installed only where `make gpu-check` is run."""
    return pytest.importorskip(name, reason=f"{name} is not installed")


def has_gpu() -> bool:
    try:
        cudart = importlib.import_module(CUDART)
    except ImportError:
        return False
    status, count = cudart.cudaGetDeviceCount()
    return status == cudart.cudaError_t.cudaSuccess and count > 0


@pytest.mark.tensorrt
@pytest.mark.parametrize("name", [name for name in vars(FakeCudart) if name.startswith("cuda")])
def test_the_cuda_fake_matches_the_real_module(name: str) -> None:
    mine, real_one = getattr(FakeCudart, name), getattr(real(CUDART), name)
    if isinstance(mine, int):
        assert mine == real_one
    elif isinstance(mine, type):
        for member in mine:  # type: ignore[attr-defined]
            assert int(getattr(real_one, member.name)) == member
    else:
        assert [*inspect.signature(mine).parameters][1:] == [*inspect.signature(real_one).parameters]
        # cuda-bindings 12 indents all lines but the first two, and has empty ones within a section.
        returns = re.split(r" *Returns\n *-+\n", inspect.getdoc(real_one) or "")[1]
        lines = textwrap.dedent(re.split(r"\n *[A-Z][\w ]*\n *-+\n", returns)[0]).splitlines()
        assert len([line for line in lines if line and not line.startswith(" ")]) == 1 + mine.values


STANDS = {
    "Runtime": FakeRuntime,
    "ICudaEngine": FakeEngine,
    "IExecutionContext": FakeContext,
    "ILogger": ILogger,
    "IRuntimeConfig": FakeRuntimeConfig,
    "IRuntimeCache": FakeRuntimeCache,
}


@pytest.mark.tensorrt
@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("name", STANDS)
def test_the_library_fake_matches_the_real_module(name: str, library: str) -> None:
    trt = real(library)
    if name in ("IRuntimeConfig", "IRuntimeCache") and library == "tensorrt":
        pytest.skip("not used with TensorRT")
    configured = ("create_runtime_config", "create_execution_context")  # TensorRT's is created without a parameter
    for method, function in inspect.getmembers(STANDS[name], inspect.isfunction):
        if method.startswith("_") or (method in configured and library == "tensorrt"):
            continue
        assert [*inspect.signature(function).parameters][1:] in parameters(trt, name, method)


#: The calls of a build, with the names of their parameters.
CALLS = {
    "Builder.create_network": ["flags"],
    "Builder.create_builder_config": [],
    "Builder.create_optimization_profile": [],
    "Builder.build_serialized_network": ["network", "config"],
    "IBuilderConfig.clear_flag": ["flag"],
    "IBuilderConfig.add_optimization_profile": ["profile"],
    "IBuilderConfig.create_timing_cache": ["serialized_timing_cache"],
    "IBuilderConfig.set_timing_cache": ["cache", "ignore_mismatch"],
    "IOptimizationProfile.set_shape": ["input", "min", "opt", "max"],
    "INetworkDefinition.get_input": ["index"],
    "INetworkDefinition.get_output": ["index"],
    "ITimingCache.serialize": [],
    "OnnxParser.parse": ["model", "path"],
    "OnnxParser.get_error": ["index"],
    "ParserError.desc": [],
    "ParserError.node_name": [],
    "ParserError.node_operator": [],
}


def parameters(trt: Any, name: str, method: str) -> list[list[str]]:
    """The parameters of each overload; pybind11 documents them as "method(self: ..., name: str, index: int) -> str"."""
    signatures = re.findall(rf"\b{method}\(self: [\w.]+(.*)\) ->", getattr(getattr(trt, name), method).__doc__)
    return [re.findall(r", (\w+):", signature) for signature in signatures]


@pytest.mark.tensorrt
@pytest.mark.parametrize("library", LIBRARIES)
def test_the_calls_of_a_build_exist_in_the_real_library(library: str) -> None:
    trt = real(library)
    for call, expected in CALLS.items():
        assert expected in parameters(trt, *call.split(".")), call


@pytest.mark.tensorrt
@pytest.mark.parametrize("library", LIBRARIES)
def test_the_names_of_a_build_exist_in_the_real_library(library: str) -> None:
    trt = real(library)
    assert trt.BuilderFlag.TF32.name == "TF32"
    assert trt.ProfilingVerbosity.DETAILED.name == "DETAILED"
    assert int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED) >= 0
    for attribute in ("profiling_verbosity", "progress_monitor"):
        assert vars(trt.IBuilderConfig)[attribute].fset is not None
    for attribute in ("num_inputs", "num_outputs"):
        assert isinstance(vars(trt.INetworkDefinition)[attribute], property)
    assert {"phase_start", "step_complete", "phase_finish"} <= vars(trt.IProgressMonitor).keys()
    assert isinstance(vars(trt.OnnxParser)["num_errors"], property)


@pytest.mark.tensorrt
@pytest.mark.parametrize("library", LIBRARIES)
def test_the_names_used_exist_in_the_real_library(library: str) -> None:
    trt = real(library)
    assert re.fullmatch(r"\d+(\.\d+)+", trt.__version__)
    rtx = (CudaGraphStrategy, ComputeCapability) if library == "tensorrt_rtx" else ()
    for stand in (TensorIOMode, DataType, *rtx):
        for member in stand:
            assert getattr(getattr(trt, stand.__name__), member.name).name == member.name
    for severity in Severity:
        assert hasattr(trt.ILogger.Severity, severity.name)
    assert isinstance(vars(trt.ICudaEngine)["num_io_tensors"], property)
    assert hasattr(trt.ICudaEngine, "create_execution_context")
    if library == "tensorrt_rtx":
        assert all(hasattr(trt.DynamicShapesKernelSpecializationStrategy, member.name) for member in KernelStrategy)
        for attribute in ("cuda_graph_strategy", "dynamic_shapes_kernel_specialization_strategy"):
            assert vars(trt.IRuntimeConfig)[attribute].fset is not None


#: All that TensorRT's Python module looks up in its libraries when it is imported.
SYMBOLS = [
    *(f"create{kind}_INTERNAL" for kind in ("InferBuilder", "InferRefitter", "InferRuntime")),
    *(f"create{kind}_INTERNAL" for kind in ("NvOnnxParser", "NvOnnxParserRefitter")),
    *("getBuilderPluginRegistry", "getNvOnnxParserVersion", "getPluginRegistry", "initLibNvInferPlugins"),
]


@pytest.mark.skipif(importlib.util.find_spec("tensorrt_bindings") is None, reason="no tensorrt-cu12-bindings")
@pytest.mark.skipif(importlib.util.find_spec("tensorrt") is not None, reason="TensorRT is installed, and tested above")
@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
def test_everything_used_of_tensorrt_exists_in_its_own_module(tmp_path: Path) -> None:
    """Its Python module imports with empty libraries. The real ones are not in the package, but at NVIDIA."""
    (spec,) = importlib.util.find_spec("tensorrt_bindings").submodule_search_locations
    needed = set(
        re.findall(rb"lib(?:nvinfer|nvinfer_plugin|nvonnxparser)\.so\.\d+", (Path(spec) / "tensorrt.so").read_bytes())
    )
    empty = "".join(f"void *{symbol}(void) {{ return 0; }}\n" for symbol in SYMBOLS)
    for name in map(bytes.decode, needed):
        # Found by the name in the file, once it is loaded; nothing calls it.
        words = ["cc", "-shared", "-fPIC", "-x", "c", "-o", str(tmp_path / name), f"-Wl,-soname,{name}", "-"]
        subprocess.run(words, input=empty, text=True, check=True)
    (tmp_path / "tensorrt.py").write_text(
        "import ctypes, pathlib\n"
        "for library in pathlib.Path(__file__).parent.glob('*.so.*'):\n"
        "    ctypes.CDLL(str(library))\n"
        "from tensorrt_bindings import *\n"
        "from tensorrt_bindings import __version__\n"
    )
    tests = [
        test_the_library_fake_matches_the_real_module,
        test_the_calls_of_a_build_exist_in_the_real_library,
        test_the_names_of_a_build_exist_in_the_real_library,
        test_the_names_used_exist_in_the_real_library,
    ]
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-k", "not rtx"]
    words += [f"{__file__}::{test.__name__}" for test in tests]
    path = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(words, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    unused = 2  # the two objects of TensorRT for RTX
    assert f"{len(STANDS) - unused + 3} passed, {unused} skipped" in done.stdout


@pytest.mark.tensorrt
def test_a_real_gpus_properties_have_the_fields_used() -> None:
    properties = real(CUDART).cudaDeviceProp()
    assert (type(properties.name), type(properties.major), type(properties.minor)) == (bytes, int, int)


def red_in_float() -> list[Any]:
    """The nodes of a graph that returns the red channel; TensorRT accepts uint8 only as the input of a cast."""
    onnx = real("onnx")
    node = onnx.helper.make_node
    return [
        node("Cast", ["image"], ["float"], to=onnx.TensorProto.FLOAT),
        node("Gather", ["float", "index"], ["red"], axis=3),
        node("Cast", ["red"], ["probability"], to=onnx.TensorProto.UINT8),
    ]


def build(library: str, path: Path) -> Any:
    """A real engine that returns the red channel of 1 to 4 photos."""
    trt, onnx = real(library), real("onnx")
    value, u8 = onnx.helper.make_tensor_value_info, onnx.TensorProto.UINT8
    index = onnx.helper.make_tensor("index", onnx.TensorProto.INT64, [], [0])
    image, probability = value("image", u8, ["N", H, W, 3]), value("probability", u8, ["N", H, W])
    graph = onnx.helper.make_graph(red_in_float(), "toy", [image], [probability], [index])
    model = onnx.helper.make_model(graph, ir_version=10, opset_imports=[onnx.helper.make_opsetid("", 20)])
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    typed = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if typed is None else 1 << int(typed))
    parser = trt.OnnxParser(network, logger)
    assert parser.parse(model.SerializeToString())
    profile, config = builder.create_optimization_profile(), builder.create_builder_config()
    profile.set_shape("image", (1, H, W, 3), (2, H, W, 3), (4, H, W, 3))
    config.add_optimization_profile(profile)
    path.write_bytes(bytes(memoryview(builder.build_serialized_network(network, config))))
    return trt


@pytest.mark.tensorrt
@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.skipif(has_gpu(), reason="there is a GPU")
def test_the_real_library_without_a_gpu_gives_a_clear_error(library: str, tmp_path: Path) -> None:
    trt = real(library)
    real(CUDART)
    (tmp_path / "toy.engine").write_bytes(b"never read")
    environment = {"library": library, "version": trt.__version__, "compute_capability": "portable"}
    with pytest.raises(EngineError, match=r"no NVIDIA GPU can be used: .*CUDA") as caught:
        TensorRTEngine(tmp_path / "toy.engine", SPEC, environment, precision="f32")
    assert not isinstance(caught.value, EngineMissing)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.tensorrt
def test_the_real_library_uses_our_logger_and_returns_bytes(tmp_path: Path) -> None:
    # What works of the real library without a GPU: its logger, a rejected file, and the memory of a built engine.
    trt = build("tensorrt_rtx", tmp_path / "toy.engine")
    assert (tmp_path / "toy.engine").stat().st_size > 1000
    logger = logger_of(trt.ILogger)
    logger.recent_errors.clear()
    assert trt.Runtime(logger).deserialize_cuda_engine(b"garbage" * 100) is None
    assert any("Serialization" in message and "\n" not in message for message in logger.recent_errors)
    assert logger_of(trt.ILogger) is logger


@pytest.mark.gpu
@pytest.mark.tensorrt
@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.skipif(not has_gpu(), reason="no NVIDIA GPU")
def test_a_real_engine_runs_on_a_real_gpu(library: str, tmp_path: Path) -> None:
    path = tmp_path / "toy.engine"
    trt = build(library, path)
    capability = host.gpus()[0].compute_capability
    if library == "tensorrt_rtx" and f"SM{capability.replace('.', '')}" not in trt.ComputeCapability.__members__:
        pytest.skip(f"TensorRT for RTX is not made for GPUs of compute capability {capability}")
    environment = {"library": library, "version": trt.__version__, "compute_capability": "portable"}
    for turn in range(2):
        with TensorRTEngine(path, SPEC, environment, precision="f32") as engine:
            for count in (1, 1, 3, 3, 9):
                np.testing.assert_array_equal(engine.run(photos(count)), photos(count)[..., 0])
            with ThreadPoolExecutor(4) as pool:
                for result in pool.map(engine.run, [photos(2)] * 20):
                    np.testing.assert_array_equal(result, photos(2)[..., 0])
            assert "no CUDA graph" not in engine.describe().provider
            assert not any("kernels compiled" in note for note in engine.describe().notes) or turn == 0
    assert bool(cache.entries()) == (library == "tensorrt_rtx")
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(EngineError, match="cannot load it"):
        TensorRTEngine(path, SPEC, environment, precision="f32")
