"""ONNX Runtime: the default engine on the CPU of any laptop or board, and on NVIDIA GPUs through CUDA.

The code for CUDA was written from the documentation (:data:`petseg_runtime.engines.registry.ENGINES` lists what we have
run). That a session which silently fell back to the CPU is rejected was tested with the real GPU package. Single nodes
for which the CUDA execution provider has no kernel still run on the CPU.
"""

from __future__ import annotations

import contextlib
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
    rounded_batch,
)
from petseg_runtime.errors import EngineError, EngineMissing, one_line
from petseg_runtime.extras import install

__all__ = ["OnnxRuntimeCudaEngine", "OnnxRuntimeEngine", "load"]

if not hasattr(onnxruntime, "InferenceSession"):  # Python imports a folder without files as a namespace package
    raise ImportError(
        f"only its empty folder is left: pip uninstall onnxruntime onnxruntime-gpu, then {install('cpu')}, or "
        f"{install('gpu')} for an NVIDIA GPU"
    )

U8: TypeAlias = npt.NDArray[np.uint8]

_ERRORS_ONLY: Final = 3  # ONNX Runtime's log severity
_CPU: Final = "CPUExecutionProvider"
_CUDA: Final = "CUDAExecutionProvider"

_ARM: Final = platform.machine().lower() in ("aarch64", "arm64")

#: The largest batch on a GPU, if the graph accepts any.
_MAX_BATCH: Final = 8

#: Held while stdout, which all threads share, is redirected: of two threads that redirect it at once, the second would
#: restore the first one's buffer instead of stdout.
_REDIRECTING: Final = threading.Lock()

#: Packages that are both imported as `onnxruntime` and overwrite each other's files.
_PACKAGES: Final = ("onnxruntime", "onnxruntime-gpu")


class OnnxRuntimeEngine(Engine):
    """An ONNX Runtime session with the CPU execution provider."""

    def __init__(self, artifact: Artifact, options: EngineOptions) -> None:
        """Load the model.

        Args:
            artifact: The model to run.
            options: ``exact`` has no effect: the CPU execution provider always computes float32 in float32. Each stream
                is a caller's thread; the remaining threads help all callers.

        Raises:
            EngineError: ONNX Runtime rejects the file, or runs it with another execution provider than requested.
        """
        self.spec = artifact.spec
        self._threads = options.threads or host.usable_cpus()
        self._streams = min(options.streams, self._threads)
        self._notes = options.notes
        # A session has one thread pool for all callers, with intra_op_num_threads - 1 threads: the caller's own thread
        # counts as one. With as many callers as streams, `threads` threads are at work.
        self._session: Any = _session(artifact, _CPU, {}, self._threads - self._streams + 1)

    def run(self, images: U8) -> U8:
        """Segment a batch; see :class:`petseg_runtime.engines.base.Engine`."""
        session = self._session
        if session is None:
            raise EngineError("the engine is closed")
        check_batch(images, self.spec)

        def run(batch: U8) -> U8:
            (probability,) = session.run([OUTPUT], {INPUT: np.ascontiguousarray(batch)})
            return probability  # type: ignore[no-any-return]

        try:
            return in_batches(run, images, self.spec.batch)
        except Exception as error:
            raise EngineError(f"ONNX Runtime failed ({one_line(error)})") from error

    def describe(self) -> EngineInfo:
        """Describe what is actually running."""
        computed = {"fp32": "f32", "fp16": "fp16" if _fp16_on_cpu() else "f32", "int8": "int8"}
        return EngineInfo(
            name="onnxruntime",
            version=onnxruntime.__version__,
            device="cpu",
            provider=_CPU,
            precision=computed[self.spec.precision],
            threads=self._threads,
            streams=self._streams,
            batch=self.spec.batch or 1,
            notes=self._notes,
        )

    def close(self) -> None:
        """Free the session."""
        self._session = None


class OnnxRuntimeCudaEngine(Engine):
    """An ONNX Runtime session with the CUDA execution provider.

    Input and output are bound to device buffers, which are reused for consecutive batches of the same shape. Batches
    above eight photos are run in parts; those of a size that is not a power of two are padded, as in TensorRT. Calls
    from several threads take turns.
    """

    def __init__(self, artifact: Artifact, options: EngineOptions) -> None:
        """Load the model and run it once, so that failures occur here rather than in the first real run.

        Args:
            artifact: The model to run.
            options: ``exact`` switches TF32 off; ``size`` is the size of the warm-up run.

        Raises:
            EngineMissing: This ONNX Runtime was built without CUDA.
            EngineError: There is no such GPU, or ONNX Runtime would run the model on another device.
        """
        self.spec, self._device, self._notes = artifact.spec, options.device, options.notes
        self._tf32 = not options.exact
        self._lock = threading.Lock()
        self._session: Any = _cuda_session(artifact, options.device, tf32=self._tf32)
        self._bound = _Bound(self._session, options.device)
        try:
            self.warm_up(size=options.size)
        except BaseException:
            self.close()
            raise

    def run(self, images: U8) -> U8:
        """Segment a batch; see :class:`petseg_runtime.engines.base.Engine`."""
        check_batch(images, self.spec)
        with self._lock:
            if self._session is None:
                raise EngineError("the engine is closed")
            try:
                size = self.spec.batch or rounded_batch(len(images), _MAX_BATCH)
                return in_batches(self._bound.run, images, size)
            except Exception as error:
                raise EngineError(f"ONNX Runtime on {self._device} failed ({one_line(error)})") from error

    def describe(self) -> EngineInfo:
        """Describe what is actually running."""
        gpu = next((gpu for gpu in host.gpus() if gpu.index == self._device.index), None)
        ampere = gpu is not None and int(gpu.compute_capability.partition(".")[0]) >= 8  # the first with TF32
        wide = "tf32" if self._tf32 and ampere else "f32"
        computed = {"fp32": wide, "fp16": "fp16", "int8": "int8"}
        # float32 layers, and convolutions between QuantizeLinear and DequantizeLinear.
        rest = "" if self.spec.precision == "fp32" else f", {wide} for the graph's float32 operations"
        return EngineInfo(
            name="onnxruntime",
            version=onnxruntime.__version__,
            device=str(self._device),
            provider=f"{_CUDA}, {gpu.name if gpu else 'unknown GPU'}{rest}",
            precision=computed[self.spec.precision],
            threads=0,
            batch=self.spec.batch or _MAX_BATCH,
            notes=self._notes,
            float32=wide,
        )

    def close(self) -> None:
        """Free the session and its buffers."""
        with self._lock:
            self._session = None
            self._bound = None  # type: ignore[assignment]


class _Bound:
    """An I/O binding of a session's input and output to device buffers."""

    def __init__(self, session: Any, device: Device) -> None:
        self._session, self._device = session, device
        self._binding: Any = session.io_binding()
        self._sent: Any = None
        self._received: Any = None

    def run(self, images: U8) -> U8:
        """Run uint8 [N, H, W, 3]; returns a new array, uint8 [N, H, W]."""
        images = np.ascontiguousarray(images)
        if self._sent is None or tuple(self._sent.shape()) != images.shape:
            self._bind(images.shape)
        self._sent.update_inplace(images)
        self._session.run_with_iobinding(self._binding)
        # On the CPU, numpy() is a view of the buffer, which the next run overwrites; from a GPU it is already a copy.
        return np.array(self._received.numpy())

    def _bind(self, shape: tuple[int, ...]) -> None:
        make = onnxruntime.OrtValue.ortvalue_from_shape_and_type
        where = (self._device.kind, self._device.index)
        self._sent, self._received = make(shape, np.uint8, *where), make(shape[:3], np.uint8, *where)
        self._binding.bind_ortvalue_input(INPUT, self._sent)
        self._binding.bind_ortvalue_output(OUTPUT, self._received)


def _fp16_on_cpu() -> bool:
    """Whether the CPU execution provider computes an fp16 graph in fp16 instead of casting it to float32.

    It has fp16 kernels for ARM only, and uses them only if the processor has fp16 arithmetic, which a Cortex-A72 lacks.
    Linux reports that; all Apple processors have it.
    """
    return _ARM and (sys.platform != "linux" or "asimdhp" in host.features())


def _session(artifact: Artifact, provider: str, settings: dict[str, str], threads: int) -> Any:
    """Open a session and make sure that ``provider`` is its first execution provider.

    Raises:
        EngineError: The session cannot be opened, or has another execution provider.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = _ERRORS_ONLY
    try:
        session = onnxruntime.InferenceSession(
            _model(artifact.path),
            options,
            providers=[(provider, settings)],
            enable_fallback=0,  # the fallback would print to stdout and continue on the CPU
        )
    except Exception as error:
        raise EngineError(f"{artifact.path}: ONNX Runtime cannot load it ({one_line(error)})") from error
    active = session.get_providers()[0]
    if active != provider:  # ONNX Runtime raises nothing: it only logs this
        raise EngineError(f"{artifact.path}: ONNX Runtime would run it with {active} instead of {provider}")
    return session


def _model(path: Path) -> str | bytes:
    """The path of a model, or the content of the file: ONNX Runtime cannot open a path that is not valid UTF-8."""
    name = os.fspath(path)
    try:
        name.encode()
    except UnicodeEncodeError:
        return path.read_bytes()
    return name


def _cuda_session(artifact: Artifact, device: Device, *, tf32: bool) -> Any:
    """Open a session on an NVIDIA GPU.

    Raises:
        EngineMissing: This ONNX Runtime was built without CUDA.
        EngineError: The session cannot be opened on that GPU, or two packages of ONNX Runtime have overwritten each
            other; the message says what may be wrong.
    """
    if _CUDA not in onnxruntime.get_available_providers():
        both = list(host.versions(_PACKAGES))
        # Neither: a package of another name, such as those of conda and of board vendors.
        away = f"pip uninstall {' '.join(both)}" if both else "uninstall it"
        remedy = f"{away}, then {install('gpu')}"
        if len(both) == 2:
            raise EngineError(f"onnxruntime and onnxruntime-gpu are both installed and break each other: {remedy}")
        if host.jetson():  # the remedy is another engine, beside which this package can stay
            remedy = host.JETSON_TENSORRT
        raise EngineMissing(f"the installed onnxruntime was built without CUDA: {remedy}")
    printed = io.StringIO()
    if hasattr(onnxruntime, "preload_dlls"):  # from 1.21 on; before, the system's CUDA is needed
        with _REDIRECTING, contextlib.redirect_stdout(printed):  # it prints which libraries it cannot find
            onnxruntime.preload_dlls()
    try:
        settings = {
            "device_id": str(device.index),
            "use_tf32": str(int(tf32)),
            # The default, EXHAUSTIVE, is slow, and is done for every convolution at each new batch size; in a folder of
            # photos, there are several.
            "cudnn_conv_algo_search": "HEURISTIC",
        }
        # One thread, since the GPU computes. 0 would start a thread for each core, pinned to it, and log an error for
        # each core that this process may not use.
        return _session(artifact, _CUDA, settings, 1)
    except EngineError as error:
        there = host.gpus()
        why = f"{host.no_gpu()}, or use --device cpu"
        if there:
            shown = ", ".join(f"cuda:{gpu.index} {gpu.name}, {gpu.driver}" for gpu in there)
            remedy = host.old_driver(there[0].driver, host.ONNXRUNTIME_CUDA12) or (
                f"the versions of CUDA and cuDNN that this ONNX Runtime was built for are needed: {install('gpu')}"
            )
            if device.index >= len(there):  # ONNX Runtime says only "Parse Failed"
                remedy = f"there is no {device}"
            why = f"GPUs of this machine: {shown}; {remedy}"
        heard = f"; {one_line(printed.getvalue())}" if printed.getvalue() else ""
        raise EngineError(f"{device} is not available: {error} ({why}{heard})") from error


def load(artifact: Artifact, options: EngineOptions) -> Engine:
    """Load a model on the CPU or on an NVIDIA GPU, as ``options.device`` says; called by the registry."""
    if options.device.kind == "cuda":
        return OnnxRuntimeCudaEngine(artifact, options)
    return OnnxRuntimeEngine(artifact, options)
