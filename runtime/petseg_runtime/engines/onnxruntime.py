"""ONNX Runtime: on the CPU the embedded default, on any laptop and board; on an NVIDIA GPU through CUDA.

The road over CUDA was built from the documentation (:data:`petseg_runtime.engines.registry.ENGINES` says what of it we
have run); that a session which silently fell back to the CPU is refused was tested with the real GPU package. Single
nodes for which CUDA has no code run on the CPU all the same.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import io
import os
import platform
import sys
import threading
from pathlib import Path
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt
import onnxruntime

from petseg_runtime import host
from petseg_runtime.artifact import INPUT, OUTPUT, Artifact
from petseg_runtime.engines.base import (
    Device,
    Engine,
    EngineInfo,
    EngineOptions,
    check_batch,
    in_batches,
)
from petseg_runtime.errors import EngineError, EngineMissing, one_line
from petseg_runtime.extras import install
from petseg_runtime.spec import ModelSpec

__all__ = ["OnnxRuntimeCudaEngine", "OnnxRuntimeEngine", "load"]

if not hasattr(onnxruntime, "InferenceSession"):  # a folder without its files is imported as an empty package
    raise ImportError(
        f"only its empty folder is left: pip uninstall onnxruntime onnxruntime-gpu, then {install('cpu')}, or "
        f"{install('gpu')} for an NVIDIA GPU"
    )

U8: TypeAlias = npt.NDArray[np.uint8]

_ERRORS_ONLY: Final = 3  # ONNX Runtime's log severity
_CPU: Final = "CPUExecutionProvider"
_CUDA: Final = "CUDAExecutionProvider"

_ARM: Final = platform.machine().lower() in ("aarch64", "arm64")

#: Held while stdout is caught, which is one for all threads: of two that catch it at once, the second to begin would
#: put back what the first had put in its place.
_CATCHING: Final = threading.Lock()

#: The packages that are all imported as `onnxruntime`, and overwrite each other's files.
_PACKAGES: Final = ("onnxruntime", "onnxruntime-gpu")


class OnnxRuntimeEngine(Engine):
    """An ONNX Runtime session with the CPU provider."""

    def __init__(self, artifact: Artifact, options: EngineOptions) -> None:
        """Load the model.

        Args:
            artifact: What to run.
            options: Its CPU provider never computes float32 in anything else, so ``exact`` changes nothing. Each
                stream is a caller's thread; what is left of the threads helps all of them.

        Raises:
            EngineError: ONNX Runtime refuses the file, or runs it with another provider than asked for.
        """
        self._spec = artifact.spec
        self._threads = options.threads or host.usable_cpus()
        self._streams = min(options.streams, self._threads)
        self._notes = options.notes
        # A session has one pool for all callers, of one thread less than it is told: the caller's counts. With as many
        # callers as streams, this makes `threads` at work.
        self._session: Any = _session(artifact, _CPU, {}, self._threads - self._streams + 1)

    @property
    def spec(self) -> ModelSpec:
        """What the model expects and returns."""
        return self._spec

    def run(self, images: U8) -> U8:
        """Segment a batch; see :class:`petseg_runtime.engines.base.Engine`."""
        session = self._session
        if session is None:
            raise EngineError("the engine is closed")
        check_batch(images, self._spec)

        def run(batch: U8) -> U8:
            (probability,) = session.run([OUTPUT], {INPUT: np.ascontiguousarray(batch)})
            return probability  # type: ignore[no-any-return]

        try:
            return in_batches(run, images, self._spec.batch)
        except Exception as error:
            raise EngineError(f"ONNX Runtime failed ({one_line(error)})") from error

    def describe(self) -> EngineInfo:
        """What is really running."""
        computed = {"fp32": "f32", "fp16": "fp16" if _fp16_on_cpu() else "f32", "int8": "int8"}
        return EngineInfo(
            name="onnxruntime",
            version=onnxruntime.__version__,
            device="cpu",
            provider=_CPU,
            precision=computed[self._spec.precision],
            threads=self._threads,
            streams=self._streams,
            batch=self._spec.batch or 1,
            notes=self._notes,
        )

    def close(self) -> None:
        """Free the session."""
        self._session = None


class OnnxRuntimeCudaEngine(Engine):
    """An ONNX Runtime session with the CUDA provider.

    Input and output are bound to buffers on the GPU that are used again for every batch of the same shape; calls from
    several threads take turns.
    """

    def __init__(self, artifact: Artifact, options: EngineOptions) -> None:
        """Load the model and run it, so that whatever can fail does so here.

        Args:
            artifact: What to run.
            options: ``exact`` switches TF32 off; ``size`` is what it is run at.

        Raises:
            EngineMissing: This ONNX Runtime was built without CUDA.
            EngineError: There is no such GPU, or ONNX Runtime would run on something else.
        """
        self._spec, self._device, self._notes = artifact.spec, options.device, options.notes
        self._tf32 = not options.exact
        self._lock = threading.Lock()
        self._session: Any = _cuda_session(artifact, options.device, tf32=self._tf32)
        self._bound = _Bound(self._session, options.device)
        try:
            self.warm_up(max(1, artifact.spec.batch), options.size)
        except BaseException:
            self.close()
            raise

    @property
    def spec(self) -> ModelSpec:
        """What the model expects and returns."""
        return self._spec

    def run(self, images: U8) -> U8:
        """Segment a batch; see :class:`petseg_runtime.engines.base.Engine`."""
        check_batch(images, self._spec)
        with self._lock:
            if self._session is None:
                raise EngineError("the engine is closed")
            try:
                return in_batches(self._bound.run, images, self._spec.batch)
            except Exception as error:
                raise EngineError(f"ONNX Runtime on {self._device} failed ({one_line(error)})") from error

    def describe(self) -> EngineInfo:
        """What is really running."""
        there = {gpu.index: gpu for gpu in host.gpus()}
        gpu = there.get(self._device.index)
        ampere = gpu is not None and int(gpu.compute_capability.partition(".")[0]) >= 8  # the first with TF32
        wide = "tf32" if self._tf32 and ampere else "f32"
        computed = {"fp32": wide, "fp16": "fp16", "int8": "int8"}
        # Layers that are left in float, and convolutions between QuantizeLinear and DequantizeLinear.
        rest = "" if self._spec.precision == "fp32" else f", {wide} in what is float32 in the file"
        return EngineInfo(
            name="onnxruntime",
            version=onnxruntime.__version__,
            device=str(self._device),
            provider=f"{_CUDA}, {gpu.name if gpu else 'unknown GPU'}{rest}",
            precision=computed[self._spec.precision],
            threads=0,
            batch=self._spec.batch or 8,
            notes=self._notes,
            float32=wide,
        )

    def close(self) -> None:
        """Free the session and its buffers."""
        with self._lock:
            self._session = None
            self._bound = None  # type: ignore[assignment]


class _Bound:
    """A session's input and output in buffers on a device."""

    def __init__(self, session: Any, device: Device) -> None:
        self._session, self._device = session, device
        self._binding: Any = session.io_binding()
        self._sent: Any = None
        self._received: Any = None

    def run(self, images: U8) -> U8:
        """uint8 [N, H, W, 3] to uint8 [N, H, W], the caller's own."""
        images = np.ascontiguousarray(images)
        if self._sent is None or tuple(self._sent.shape()) != images.shape:
            self._bind(images.shape)
        self._sent.update_inplace(images)
        self._session.run_with_iobinding(self._binding)
        # On the CPU the array is a view of the buffer that the next run writes to; from a GPU it is a copy already.
        return np.array(self._received.numpy())

    def _bind(self, shape: tuple[int, ...]) -> None:
        make = onnxruntime.OrtValue.ortvalue_from_shape_and_type
        where = (self._device.kind, self._device.index)
        self._sent, self._received = make(shape, np.uint8, *where), make(shape[:3], np.uint8, *where)
        self._binding.bind_ortvalue_input(INPUT, self._sent)
        self._binding.bind_ortvalue_output(OUTPUT, self._received)


def _fp16_on_cpu() -> bool:
    """Whether its CPU provider computes an fp16 graph in fp16; where not, it casts it to float32.

    It has such kernels for ARM only, and takes them only where the processor has fp16 arithmetic: a Cortex-A72 does
    not. Of that, Linux tells; Apple's processors all have it.
    """
    return _ARM and (sys.platform != "linux" or "asimdhp" in host.features())


def _session(artifact: Artifact, provider: str, settings: dict[str, str], threads: int) -> Any:
    """A session that really has ``provider`` for its first.

    Raises:
        EngineError: It has not, or there is none.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = _ERRORS_ONLY
    try:
        session = onnxruntime.InferenceSession(
            _model(artifact.path),
            options,
            providers=[(provider, settings)],
            enable_fallback=0,  # which would print to stdout, and go on with the CPU
        )
    except Exception as error:
        raise EngineError(f"{artifact.path}: ONNX Runtime cannot load it ({one_line(error)})") from error
    active = session.get_providers()[0]
    if active != provider:  # without an exception: it only says so in its log
        raise EngineError(f"{artifact.path}: ONNX Runtime would run it with {active} instead of {provider}")
    return session


def _model(path: Path) -> str | bytes:
    """The path, or the file's content where ONNX Runtime cannot be given the path because it is not valid UTF-8."""
    name = os.fspath(path)
    try:
        name.encode()
    except UnicodeEncodeError:
        return path.read_bytes()
    return name


def _cuda_session(artifact: Artifact, device: Device, *, tf32: bool) -> Any:
    """A session on an NVIDIA GPU.

    Raises:
        EngineMissing: This ONNX Runtime was built without CUDA.
        EngineError: It does not start on that GPU, or two packages of ONNX Runtime are in each other's way; says what
            may be wrong.
    """
    if _CUDA not in onnxruntime.get_available_providers():
        both = [name for name in _PACKAGES if _installed(name)]
        # None: a package of another name, which conda and boards have.
        away = f"pip uninstall {' '.join(both)}" if both else "uninstall it"
        remedy = f"{away}, then {install('gpu')}"
        if len(both) == 2:
            raise EngineError(f"onnxruntime and onnxruntime-gpu are both installed and break each other: {remedy}")
        raise EngineMissing(f"the onnxruntime that is installed has no CUDA: {remedy}")
    said = io.StringIO()
    with _CATCHING, contextlib.redirect_stdout(said):  # it prints what it cannot find
        onnxruntime.preload_dlls()
    try:
        settings = {"device_id": str(device.index), "use_tf32": str(int(tf32))}
        # The GPU computes; 0 would be a thread for each core, pinned to it, with errors where it may not be used.
        return _session(artifact, _CUDA, settings, 1)
    except EngineError as error:
        there = host.gpus()
        why = "this machine shows no NVIDIA GPU: install its driver, or use --device cpu"
        if there:
            shown = ", ".join(f"cuda:{gpu.index} {gpu.name}, {gpu.driver}" for gpu in there)
            remedy = host.old_driver(there[0].driver, host.ONNXRUNTIME_CUDA12) or (
                f"CUDA and cuDNN of the version that this onnxruntime-gpu wants are needed: {install('gpu')}"
            )
            why = f"its GPUs: {shown}; {remedy}"
        heard = f"; {one_line(said.getvalue())}" if said.getvalue() else ""
        raise EngineError(f"{device} cannot be had: {error} ({why}{heard})") from error


def _installed(package: str) -> bool:
    try:
        importlib.metadata.distribution(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def load(artifact: Artifact, options: EngineOptions) -> Engine:
    """What the registry calls; the device decides between the two."""
    if options.device.kind == "cuda":
        return OnnxRuntimeCudaEngine(artifact, options)
    return OnnxRuntimeEngine(artifact, options)
