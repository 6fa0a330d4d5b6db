"""TensorRT and TensorRT for RTX: run an engine on the NVIDIA GPU that it was built for.

From an ONNX file, the engine is built when the file is first loaded on a GPU, and cached (:mod:`petseg_runtime.cache`).
If the file accepts any batch, the optimization profile covers batches of 1 to 8 photos; if it accepts any size, all
sizes up to twice its own or up to the requested one. TensorRT needs minutes to build, on a small board many. TensorRT
for RTX needs a second; it builds for the compute capability of this GPU.

Written from the documentation of the two libraries and of CUDA, and tested against stand-ins for them;
:data:`petseg_runtime.engines.registry.ENGINES` lists what we have run.

The two libraries share the part of the API that is used here. The differences: TensorRT for RTX compiles its kernels
when the engine is loaded, which the cache keeps for the next time, and captures CUDA graphs by itself.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import math
import platform
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from petseg_runtime import cache, onnx_metadata
from petseg_runtime.artifact import INPUT, OUTPUT, Artifact
from petseg_runtime.engines import tensorrt_build
from petseg_runtime.engines.base import Engine, EngineInfo, EngineOptions, check_batch, rounded_batch
from petseg_runtime.engines.cuda import Buffers, CudaGpu
from petseg_runtime.engines.tensorrt_library import CUDART, LIBRARIES, RTX, TRT, Library, imported, logger_of
from petseg_runtime.errors import EngineError, EngineForeign, ModelError, UsageError, one_line
from petseg_runtime.spec import ModelSpec

__all__ = ["TensorRTEngine", "load", "load_rtx"]

U8: TypeAlias = npt.NDArray[np.uint8]
Dims: TypeAlias = tuple[int, ...]


class _NotDeserialized(EngineForeign):
    """The library cannot deserialize an engine, for example because it does not support the GPU."""


class TensorRTEngine(Engine):
    """One execution context, one CUDA stream, and buffers for the largest batch that the engine was built for.

    Calls from several threads take turns. Batches above the profile's maximum are run in parts; batches below its
    minimum, or of a size that is not a power of two, are padded with copies of the last photo, whose results are
    dropped. A thread that loads, runs or closes the engine has the engine's GPU as its current CUDA device afterwards.
    """

    def __init__(
        self,
        path: Path,
        spec: ModelSpec,
        environment: Mapping[str, Any],
        device: int = 0,
        *,
        precision: str,
        data: bytes | None = None,
        cuda_graph: bool = True,
        size: tuple[int, int] | None = None,
        notes: tuple[str, ...] = (),
    ) -> None:
        """Load the engine and run it, so that failures occur here rather than in the first real run.

        Args:
            path: The file with the serialized engine, or the file that it was built from.
            spec: The model's specification.
            environment: What the engine was built for: ``library`` ("tensorrt" or "tensorrt_rtx"), its ``version``, and
                the ``compute_capability`` of the GPU ("8.9"), a list of these, or "portable".
            device: Number of the GPU, as CUDA counts them.
            precision: The precision that it computes in, for ``describe``: f32, tf32, fp16 or int8.
            data: The serialized engine, if ``path`` does not contain it.
            cuda_graph: Launch the network as one CUDA graph if possible.
            size: Height and width that the engine will be run at; None: the specification's.
            notes: Notes for ``describe``.

        Raises:
            EngineMissing: The library or cuda-bindings is not installed.
            EngineError: One of them is broken, there is no such GPU, the engine was built for another version or GPU,
                or a call of the library or of CUDA failed.
            ModelError: The file cannot be read, breaks the contract, or was not built for the specification's size.
            UsageError: The engine was not built for ``size``.
        """
        self._path, self.spec, self._precision, self._notes = path, spec, precision, notes
        self._size = size or (spec.height, spec.width)
        self._library = _library_of(path, environment)
        self._trt = imported(self._library.module, self._library)
        self._logger = logger_of(self._trt.ILogger)
        self._gpu = CudaGpu(imported(CUDART, self._library), device, self._library.cuda12)
        _check_built_for(path, self._library, environment, self._trt.__version__, self._gpu.capability)
        self._kernels = _Kernels()
        self._lock = threading.Lock()
        self._runtime: Any = None
        self._engine: Any = None
        self._config: Any = None
        self._context: Any = None
        self._shape: Dims = ()  # the input shape that is set in the context
        self._graph: Any = None  # the executable CUDA graph for that shape, once it is captured
        self._graphs = cuda_graph
        self._may_capture = cuda_graph and self._library is not RTX
        self._graph_note = "CUDA graph" if self._may_capture else "CUDA graph left to the library"
        if not cuda_graph:
            self._graph_note = "no CUDA graph (as asked for)"
        try:
            self._gpu.activate()
            self._load(_contents(path) if data is None else data)
            self._allocate()
            self._run_once()
        except BaseException:
            self._release()
            raise

    def run(self, images: U8) -> U8:
        """Segment a batch; see :class:`petseg_runtime.engines.base.Engine`."""
        with self._lock:
            if self._context is None:
                raise EngineError("the engine is closed")
            check_batch(images, self.spec)
            self._check_size(images.shape[1], images.shape[2])
            self._gpu.activate()
            result = np.empty(images.shape[:3], np.uint8)
            for start in range(0, len(images), self._high[0]):
                part = slice(start, start + self._high[0])
                self._run_part(images[part], result[part])
            return result

    def describe(self) -> EngineInfo:
        """Describe what is actually running; ``provider`` says whether it runs as a CUDA graph, or why it does not."""
        kernels = self._kernels.notes
        return EngineInfo(
            name=self._library.engine,
            version=self._trt.__version__,
            device=f"cuda:{self._gpu.device}",
            provider=f"{self._gpu.name}, {self._graph_note}",
            precision=self._precision,
            threads=0,
            batch=self._high[0],
            # Notes do not count when engines are compared: the same engine compiles its kernels only the first time.
            notes=(*self._notes, f"{self._library.title}: {', '.join(kernels)}") if kernels else self._notes,
        )

    def close(self) -> None:
        """Free the engine, its buffers and its stream. Closing it again does nothing.

        Raises:
            EngineError: CUDA could not free a resource; all others are freed.
        """
        with self._lock:
            if self._context is None:
                return
            try:
                with contextlib.suppress(EngineError):  # if the GPU cannot be used, there are no new kernels to keep
                    self._gpu.activate()
                    self._kernels.keep()
            finally:
                failures = self._release()
        if failures:
            raise EngineError(f"{self._path}: {'; '.join(failures)}")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.close()
        except EngineError:
            if error is None:  # after a GPU failure nothing can be freed; the original error matters more
                raise

    def __del__(self) -> None:
        # Python does not collect what CUDA allocates. An engine whose constructor failed has already freed everything.
        with contextlib.suppress(EngineError, AttributeError):
            self.close()

    def _load(self, data: bytes) -> None:
        self._runtime = self._call("start", self._trt.Runtime, self._logger)
        try:
            self._engine = self._call("load it", self._runtime.deserialize_cuda_engine, data)
        except EngineError as error:
            raise _NotDeserialized(str(error)) from error
        self._low, self._high = _check_contract(self._path, self._trt, self._engine)
        try:
            self._check_size(*self._size)
        except UsageError as error:
            if self._size == (self.spec.height, self.spec.width):  # the engine contradicts its own specification
                raise ModelError(str(error)) from error
            raise
        if self._library is RTX:
            self._config = self._call("create a runtime configuration", self._engine.create_runtime_config)
            self._configure(self._config, data)
            self._context = self._call(
                "create an execution context", self._engine.create_execution_context, self._config
            )
        else:
            self._context = self._call("create an execution context", self._engine.create_execution_context)

    def _configure(self, config: Any, data: bytes) -> None:
        """Configure TensorRT for RTX to capture CUDA graphs, and to use one set of kernels, kept in the cache."""
        strategy = self._trt.CudaGraphStrategy
        config.cuda_graph_strategy = strategy.WHOLE_GRAPH_CAPTURE if self._graphs else strategy.DISABLED
        # LAZY would replace kernels, and with them the rounding of single pixels, in the middle of a video.
        strategies = self._trt.DynamicShapesKernelSpecializationStrategy
        config.dynamic_shapes_kernel_specialization_strategy = strategies.EAGER
        if cache.cache_folder() is not None:
            kernels = self._call("create a runtime cache", config.create_runtime_cache)
            key = _key(self._library, self._trt, self._gpu, hashlib.sha256(data).hexdigest(), self.spec.name)
            self._kernels.load_into(kernels, cache.Slot(key, "kernels"))
            self._call("set the runtime cache", config.set_runtime_cache, kernels)

    def _allocate(self) -> None:
        """Allocate buffers for the largest batch, and set their addresses in the execution context."""
        gpu = self._gpu
        gpu.open_stream()
        pixels = math.prod(self._high[:3])
        self._input, self._output = Buffers(gpu, 3 * pixels), Buffers(gpu, pixels)
        for name, buffers in ((INPUT, self._input), (OUTPUT, self._output)):
            self._call("set a tensor address", self._context.set_tensor_address, name, buffers.device)

    def _run_once(self) -> None:
        """Run a blank batch twice, so that kernels are compiled and the graph is captured before the first frame."""
        blank = np.zeros((self._low[0], *self._size, 3), np.uint8)
        for _ in range(2):  # the second run is captured as a CUDA graph
            self._run_part(blank, np.empty(blank.shape[:3], np.uint8))
        self._kernels.keep()  # now, because the program may be killed before it closes the engine

    def _check_size(self, height: int, width: int) -> None:
        """Raise a ``UsageError`` if a size is outside the range that the engine was built for."""
        low, high = self._low[1:3], self._high[1:3]
        if not (low[0] <= height <= high[0] and low[1] <= width <= high[1]):
            raise UsageError(
                f"{self._path}: the engine was built for photos of {low[0]} x {low[1]} to {high[0]} x {high[1]}, not "
                f"of {height} x {width}"
            )

    def _run_part(self, images: U8, result: U8) -> None:
        """Run uint8 [n, H, W, 3], n at most the profile's maximum, and write ``result``, uint8 [n, H, W]."""
        count = max(rounded_batch(len(images), self._high[0]), self._low[0])
        shape = (count, *images.shape[1:])
        staged = self._input.host[: math.prod(shape)].reshape(shape)
        staged[: len(images)] = images
        staged[len(images) :] = images[-1]
        gpu, cudart = self._gpu, self._gpu.cudart
        copy, kinds = cudart.cudaMemcpyAsync, cudart.cudaMemcpyKind
        sent, received = self._input, self._output
        upload = (sent.device, sent.address, staged.size, kinds.cudaMemcpyHostToDevice, gpu.stream)
        gpu.call("copy to the GPU", copy, *upload)
        self._enqueue(shape)
        download = (received.address, received.device, result.size, kinds.cudaMemcpyDeviceToHost, gpu.stream)
        gpu.call("copy from the GPU", copy, *download)
        gpu.call("compute", cudart.cudaStreamSynchronize, gpu.stream)
        result[:] = received.host[: result.size].reshape(result.shape)

    def _enqueue(self, shape: Dims) -> None:
        """Enqueue the network on the stream; its input is in the device buffer.

        A captured graph is valid only for the state that the execution context had, so there is one graph at a time. It
        is captured when a shape occurs the second time in a row (the first enqueue after a change of shape updates
        internal state, which is not allowed during capture), and destroyed when the shape changes.
        """
        gpu, cudart = self._gpu, self._gpu.cudart
        if shape != self._shape:
            self._drop_graph()
            self._shape = ()
            self._call(f"accept the input shape {list(shape)}", self._context.set_input_shape, INPUT, shape)
            self._launch()
            self._shape = shape
            return
        if self._graph is None and self._may_capture:
            self._graph = self._capture()
        if self._graph is None:
            self._launch()
        else:
            gpu.call("launch the CUDA graph", cudart.cudaGraphLaunch, self._graph, gpu.stream)

    def _launch(self) -> None:
        self._call("run", self._context.execute_async_v3, int(self._gpu.stream))

    def _capture(self) -> Any:
        """The launch as an executable CUDA graph; None, and a note for ``describe``, if it cannot be captured."""
        try:
            return self._captured()
        except EngineError as error:
            # A failed capture leaves its error code to the next caller of cudaGetLastError, which may be the library.
            self._gpu.cudart.cudaGetLastError()
            self._may_capture = False
            self._graph_note = f"no CUDA graph ({one_line(error)})"
            return None

    def _captured(self) -> Any:
        """Capture the launch on the stream and instantiate the graph."""
        gpu, cudart = self._gpu, self._gpu.cudart
        graph = None
        # CUDA calls of other threads are neither recorded nor forbidden during the capture.
        mode = cudart.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        gpu.call("capture", cudart.cudaStreamBeginCapture, gpu.stream, mode)
        try:
            try:
                self._launch()
            except BaseException:  # Ctrl-C, too: otherwise the stream would stay in capture mode
                _, graph = cudart.cudaStreamEndCapture(gpu.stream)
                raise
            graph = gpu.call("end the capture", cudart.cudaStreamEndCapture, gpu.stream)
            return gpu.call("instantiate the CUDA graph", cudart.cudaGraphInstantiate, graph, 0)
        finally:
            # The template, not the executable graph. If it cannot be freed, the GPU is lost, and the next call says so.
            if graph is not None:
                cudart.cudaGraphDestroy(graph)

    def _drop_graph(self) -> None:
        graph, self._graph = self._graph, None
        if graph is not None:
            self._gpu.call("free a CUDA graph", self._gpu.cudart.cudaGraphExecDestroy, graph)

    def _release(self) -> list[str]:
        """Free everything in reverse order of dependency; returns the error messages of what could not be freed."""
        failures = self._gpu.failures(self._gpu.synchronize, self._drop_graph)
        self._context = self._config = None
        self._kernels.release()
        self._engine = self._runtime = None
        return failures + self._gpu.free_all()

    def _call(self, what: str, function: Callable[..., Any], *args: Any) -> Any:
        """Call the library, which reports a failure as an exception, None or False, and the reason in its log.

        Args:
            what: What the library cannot do if the call fails, for the message.
            function: Returns anything but None or False if it succeeds.
            args: Its arguments.

        Raises:
            EngineError: The call failed.
        """
        self._logger.recent_errors.clear()
        try:
            value = function(*args)
        except Exception as error:
            raise self._error(what, one_line(error)) from error
        finally:
            del function, args  # otherwise an error's traceback would keep alive what is about to be freed
        if value is None or value is False:
            raise self._error(what, "no reason given")
        return value

    def _error(self, what: str, default: str) -> EngineError:
        reason = "; ".join(self._logger.recent_errors) or default
        return EngineError(f"{self._path}: {self._library.title} cannot {what} ({reason[:400]})")


class _Kernels:
    """The kernels that TensorRT for RTX compiles for an engine (its runtime cache), and their entry in petseg's cache.

    Without the cache only loading takes longer, so problems with it become notes for ``describe``, not errors.
    """

    def __init__(self) -> None:
        self.notes: list[str] = []
        self._slot: cache.Slot | None = None
        self._cache: Any = None
        self._kept = b""

    def load_into(self, kernels: Any, slot: cache.Slot) -> None:
        """Fill the library's runtime cache with the kernels that were kept, if they fit."""
        self._cache, self._slot = kernels, slot
        kept, why = slot.read()
        if kept is None:
            self.notes = [f"kernels compiled again: {why}" if why else "kernels compiled"]
        elif problem := self._deserialize(kernels, kept.data):
            self.notes = [f"kernels compiled again: {problem}"]
        else:
            self._kept, self.notes = kept.data, []

    def keep(self) -> None:
        """Write the compiled kernels to the cache, unless they are there already."""
        if self._cache is None or self._slot is None:
            return
        try:
            serialized = self._cache.serialize()
            data = b"" if serialized is None else bytes(memoryview(serialized))
        except Exception as error:  # noqa: BLE001 (anything that the library may raise)
            self._note_not_kept(one_line(error))
            return
        if data in (b"", self._kept):
            return
        if problem := self._slot.write(data):
            self._note_not_kept(problem)
        else:
            self._kept = data

    def _note_not_kept(self, problem: str) -> None:
        self.notes = [*self.notes[:1], f"which cannot be kept ({problem})"]

    @staticmethod
    def _deserialize(kernels: Any, data: bytes) -> str:
        """Load cached kernels into the library's runtime cache; returns why it rejects them, "" if it does not."""
        try:
            return "" if kernels.deserialize(data) else "the library rejects those in the cache"
        except Exception as error:  # noqa: BLE001 (anything that the library may raise)
            return f"the library rejects those in the cache ({one_line(error)})"

    def release(self) -> None:
        """Release the library's runtime cache; the notes stay."""
        self._cache = None


def load(artifact: Artifact, options: EngineOptions) -> TensorRTEngine:
    """Load a model in TensorRT; called by the registry. See :class:`TensorRTEngine`.

    Args:
        artifact: A compiled file, or an ONNX file.
        options: The GPU and the size to prepare for. ``threads`` and ``exact`` have no effect: the GPU computes, and
            engines are built with TF32 off.
    """
    return _load_with(artifact, options, TRT)


def load_rtx(artifact: Artifact, options: EngineOptions) -> TensorRTEngine:
    """Load a model in TensorRT for RTX; see :func:`load`."""
    return _load_with(artifact, options, RTX)


def _load_with(artifact: Artifact, options: EngineOptions, library: Library) -> TensorRTEngine:
    computed = {"fp32": "f32", "fp16": "fp16", "int8": "int8"}[artifact.spec.precision]
    opened = functools.partial(
        TensorRTEngine,
        artifact.path,
        artifact.spec,
        device=options.device.index,
        precision=computed,
        cuda_graph=options.cuda_graph,
        size=options.size,
    )
    if artifact.format != "onnx":
        return opened(artifact.environment, notes=options.notes)
    trt = imported(library.module, library)
    # Raises if there is no GPU, before anything is built.
    gpu = CudaGpu(imported(CUDART, library), options.device.index, library.cuda12)
    targets = (gpu.capability,) if library is RTX else ()
    profile = _profile(artifact.spec, options)
    tell = options.tell or (lambda text: None)
    name = artifact.path.name
    wait = functools.partial(tell, f"waiting for another process that builds the {library.title} engine of {name}")

    def make() -> tuple[bytes, dict[str, Any]]:
        if library is RTX:  # said now, and not after an announcement of minutes
            tensorrt_build.known_targets(trt, targets)
        tell(f"{library.title} builds an engine of {name} for {gpu.name}; the first time, this can take minutes")
        graph = _graph(artifact)
        try:
            built = tensorrt_build.build(
                graph,
                profile,
                library=library,
                timing_cache=None if library is RTX else tensorrt_build.timings_slot(options.device.index),
                compute_capabilities=targets,
                device=options.device.index,
                activate=gpu.activate,
            )
        except ModelError as error:  # the file is sound; `auto` may try another engine for what this library rejects
            raise EngineError(f"{artifact.path}: {error}") from error
        return built.engine, built.record

    key = _key(library, trt, gpu, artifact.identity, artifact.spec.name)
    shapes = profile and dataclasses.asdict(profile)
    slot = cache.Slot(dataclasses.replace(key, settings={**key.settings, "profile": shapes}), "engine")
    engine = cache.compiled(slot, make, wait=wait)
    try:
        return opened(engine.environment, data=engine.data, notes=_notes(options, library, engine))
    except _NotDeserialized as error:
        if engine.seconds is not None:
            raise
        engine = cache.compiled(slot, make, again=one_line(error), wait=wait)
    return opened(engine.environment, data=engine.data, notes=_notes(options, library, engine))


def _profile(spec: ModelSpec, options: EngineOptions) -> tensorrt_build.Profile | None:
    """The optimization profile that an engine is built for.

    If the requested size is at most twice the specification's, the maximum is twice the specification's, so that one
    engine serves all such sizes. For a larger size, that size is both the maximum and the optimum.
    """
    height, width = options.size or (0, 0)
    room = (2 * spec.height, 2 * spec.width)
    largest = (max(room[0], height), max(room[1], width))
    return tensorrt_build.profile_of(spec, max_size=largest, best=None if largest == room else options.size)


def _notes(options: EngineOptions, library: Library, engine: cache.Compiled) -> tuple[str, ...]:
    """The options' notes, and those on a build; an engine from the cache adds none."""
    if engine.seconds is None:
        return options.notes
    return (*options.notes, f"{library.title}: {engine.note}", *engine.environment["messages"])


def _key(library: Library, trt: Any, gpu: CudaGpu, model: str, name: str) -> cache.Key:
    return cache.Key(
        model=model,
        name=name,
        engine=library.engine,
        version=trt.__version__,
        device=f"{gpu.name}, compute capability {gpu.capability}",
        driver=gpu.driver(),
        settings={"machine": platform.machine()},
    )


def _graph(artifact: Artifact) -> bytes:
    """Read an ONNX file.

    Raises:
        ModelError: It cannot be read, or has changed since it was opened: its engine would be cached under a wrong key.
    """
    graph = _contents(artifact.path)
    artifact.check_same(onnx_metadata.parse(graph, str(artifact.path)).identity)
    return graph


def _contents(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror or error})") from error


def _library_of(path: Path, environment: Mapping[str, Any]) -> Library:
    name = environment.get("library")
    if not isinstance(name, str) or name not in LIBRARIES:
        raise ModelError(f"{path}: built with {name!r}; {' or '.join(LIBRARIES)} is expected")
    return LIBRARIES[name]


def _check_built_for(
    path: Path, library: Library, environment: Mapping[str, Any], version: str, capability: str
) -> None:
    """Check the library version and the GPU that an engine was built for against those of this machine.

    Raises:
        ModelError: The environment does not state them.
        EngineForeign: The GPU differs.
        EngineError: The version differs.
    """
    built, target = environment.get("version"), environment.get("compute_capability")
    targets = [target] if isinstance(target, str) else target
    if not (isinstance(built, str) and built and isinstance(targets, list) and targets):
        raise ModelError(f"{path}: its environment does not state what it was built for: export it again")
    # Either version may lack the last number, the build.
    if any(ours != theirs for ours, theirs in zip(version.split("."), built.split("."), strict=False)):
        raise EngineError(
            f"{path}: built with {library.title} {built}, and {version} is installed, which cannot load it: "
            f"install {built}, {library.remedy(capability)}"
        )
    if "portable" not in targets and capability not in targets:
        raise EngineForeign(
            f"{path}: built for GPUs of compute capability {', '.join(map(str, targets))}, and this one has "
            f"{capability}: {library.remedy(capability)}"
        )


def _check_contract(path: Path, trt: Any, engine: Any) -> tuple[Dims, Dims]:
    """Check that an engine keeps the contract; returns its smallest and its largest input shape [N, H, W, 3].

    Raises:
        ModelError: Names, types or shapes differ from the contract.
    """
    names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
    if sorted(names) != sorted((INPUT, OUTPUT)):
        raise ModelError(f"{path}: its tensors are {', '.join(names)}; {INPUT!r} and {OUTPUT!r} are expected")
    sent, received = (tuple(engine.get_tensor_shape(name)) for name in (INPUT, OUTPUT))
    modes = trt.TensorIOMode
    for name, mode, shape, fits, expected in (
        (INPUT, modes.INPUT, sent, len(sent) == 4 and sent[3] == 3, "input, uint8 [N, H, W, 3]"),
        (OUTPUT, modes.OUTPUT, received, received == sent[:3], f"output, uint8 {list(sent[:3])}"),
    ):
        found, kind = engine.get_tensor_mode(name), engine.get_tensor_dtype(name)
        if found != mode or kind != trt.DataType.UINT8 or not fits:
            described = f"{found.name.lower()}, {kind.name.lower()} {list(shape)}"
            raise ModelError(f"{path}: {name!r} is an {described}; an {expected} is expected")
    if -1 not in sent:
        return sent, sent
    low, _, high = engine.get_tensor_profile_shape(INPUT, 0)
    return tuple(low), tuple(high)
