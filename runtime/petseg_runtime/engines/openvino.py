"""OpenVINO: the fastest path on CPUs that compute in bf16, fp16 or int8. Takes its own IR and ONNX files.

What it compiles of an ONNX file is kept (:mod:`petseg_runtime.cache`) where that gains: on CPUs for small files, and on
GPUs, where compiling takes longest. What a CPU's plugin gives to keep is the optimised graph with its weights, without
kernels. It spares a fifth of the time of loading the embedded model in a new process (195 to 152 ms), but nothing that
counts of a file of 117 MB (305 to 263 of 850 ms). An IR is compiled every time.

On which devices we have run it is in :data:`petseg_runtime.engines.registry.ENGINES`.
"""

from __future__ import annotations

import contextlib
import functools
import io
import os
import platform
import threading
from collections.abc import Iterator
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt
import openvino
from openvino import properties

from petseg_runtime import cache, host, onnx_metadata
from petseg_runtime.artifact import INPUT, Artifact
from petseg_runtime.engines.base import (
    Device,
    Engine,
    EngineInfo,
    EngineOptions,
    check_batch,
    in_batches,
)
from petseg_runtime.errors import EngineError, ModelError, one_line
from petseg_runtime.spec import HALF_LIMIT, ModelSpec

__all__ = ["OpenVINOEngine", "computes_in_less", "load"]

U8: TypeAlias = npt.NDArray[np.uint8]

_NAMES: Final = {"f32": "f32", "f16": "fp16", "bf16": "bf16"}

#: Of x86 CPUs and of all others, what is computed in unless told otherwise is known in different words.
_X86: Final = platform.machine().lower() in ("x86_64", "amd64")

#: One model is loaded, and run for the first time, at a time. OpenVINO's Python binding looks up numpy when it is first
#: asked for a tensor's data, in a C++ static: a second thread that comes then waits for it while it holds the GIL, and
#: the first one waits for the GIL, for ever (2026.4.1; three of twelve processes with eight threads).
_FIRST: Final = threading.Lock()

#: What its GPU plugin's own cache depends on besides: what is compiled for a GPU belongs to the driver's compiler.
_DRIVER: Final = "GPU_DRIVER_VERSION"
_ARCHITECTURE: Final = "DEVICE_ARCHITECTURE"

#: Up to so many bytes of ONNX, the cache gains on a CPU.
_SMALL: Final = 32 * 2**20


class OpenVINOEngine(Engine):
    """A compiled OpenVINO model.

    On devices that have it, OpenVINO computes float32 models in bf16 or fp16 unless told otherwise; ``describe`` says
    which. Not in fp16 where the receipt says that activations come near its end.
    """

    def __init__(self, artifact: Artifact, options: EngineOptions) -> None:
        """Load and compile the model.

        Args:
            artifact: What to run, an ONNX file or an OpenVINO IR.
            options: ``exact`` keeps it from computing in bf16 or fp16; ``size`` is what it is run at, once.

        Raises:
            EngineError: There is no such device, OpenVINO refuses the file, or computes in something it should not.
            ModelError: The file has changed since it was opened.
        """
        self._spec, self._device = artifact.spec, options.device
        height, width = options.size or (artifact.spec.height, artifact.spec.width)
        cpu = options.device.kind == "cpu"
        self._threads = (options.threads or host.usable_cpus()) if cpu else 0
        self._streams = min(options.streams, self._threads) if cpu else options.streams
        # An infer request serves one call at a time; each thread has its own.
        self._local = threading.local()
        with _FIRST:
            where = _plugin(options.device)
            try:
                wide = not options.exact and _too_wide(artifact, where)
                self._compiled, note = _compiled(artifact, where, self._settings(options, exact=options.exact or wide))
                computed = self._compiled.get_property(properties.hint.inference_precision()).get_type_name()
                self.run(np.zeros((max(1, self._spec.batch), height, width, 3), np.uint8))
            except ModelError:
                raise
            except Exception as error:
                raise EngineError(f"{artifact.path}: OpenVINO cannot load it ({one_line(error)})") from error
        if computed not in _NAMES or (options.exact and computed != "f32"):
            raise EngineError(f"{artifact.path}: OpenVINO computes in {computed}, which is not what was asked for")
        self._float32 = _NAMES[computed]
        self._precision = "int8" if artifact.spec.precision == "int8" else self._float32
        rest = f", {self._float32} between the int8 layers" if self._precision == "int8" else ""
        self._provider = f"{where.partition('.')[0]} plugin{rest}"
        notes = (note, "in float32, as some activations are too large for float16" if wide else "")
        self._notes = (*options.notes, *(f"OpenVINO: {note}" for note in notes if note))

    def _settings(self, options: EngineOptions, *, exact: bool) -> dict[Any, Any]:
        settings: dict[Any, Any] = {
            properties.hint.performance_mode(): properties.hint.PerformanceMode.LATENCY,
            properties.num_streams(): self._streams,
        }
        if options.device.kind == "cpu":
            settings[properties.inference_num_threads()] = self._threads
            if self._threads < host.cores():  # else every process with so many threads runs on the same, first cores
                settings[properties.hint.enable_cpu_pinning()] = False
        if exact:
            settings[properties.hint.inference_precision()] = openvino.Type.f32
        return settings

    @property
    def spec(self) -> ModelSpec:
        """What the model expects and returns."""
        return self._spec

    def run(self, images: U8) -> U8:
        """Segment a batch; see :class:`petseg_runtime.engines.base.Engine`."""
        if self._compiled is None:
            raise EngineError("the engine is closed")
        check_batch(images, self._spec)
        return in_batches(self._run, images, self._spec.batch)

    def _run(self, images: U8) -> U8:
        try:
            if not hasattr(self._local, "request"):
                self._local.request = self._compiled.create_infer_request()
            request = self._local.request
            request.infer({INPUT: np.ascontiguousarray(images)})
            answer = np.array(request.get_output_tensor(0).data, copy=True)
            if answer.shape != images.shape[:3]:  # in one thread, it passes over what fails, and has its last answer
                raise RuntimeError(f"it answers {list(images.shape)} with {list(answer.shape)}")
            return answer
        except Exception as error:
            raise EngineError(f"OpenVINO failed ({one_line(error)})") from error

    def describe(self) -> EngineInfo:
        """What is really running."""
        return EngineInfo(
            name="openvino",
            version=openvino.__version__.partition("-")[0],
            device=str(self._device),
            provider=self._provider,
            precision=self._precision,
            threads=self._threads,
            streams=self._streams,
            batch=self._spec.batch or 1,
            notes=self._notes,
            float32=self._float32,
        )

    def close(self) -> None:
        """Free the model."""
        self._compiled = None
        self._local = threading.local()


@functools.cache
def _core() -> Any:
    """OpenVINO itself, once for all models: it takes a tenth of a second to start.

    Raises:
        EngineError: It does not start.
    """
    with _asking("start"):
        return openvino.Core()


@contextlib.contextmanager
def _asking(what: str) -> Iterator[None]:
    """Turns whatever OpenVINO raises into an ``EngineError`` that says what was asked of it."""
    try:
        yield
    except Exception as error:
        raise EngineError(f"OpenVINO cannot {what} ({one_line(error)})") from error


def _plugin(device: Device) -> str:
    """What OpenVINO calls a device.

    Raises:
        EngineError: It sees no such device.
    """
    if device.kind == "cpu":
        return "CPU"
    with _asking("look for devices"):
        there: list[str] = _core().available_devices
    names = [name for name in there if name.partition(".")[0] == "GPU"]
    for name in names:
        if int(name.partition(".")[2] or 0) == device.index:
            return name
    raise EngineError(
        f"{device} cannot be had: OpenVINO sees {', '.join(there) or 'nothing'}; an Intel GPU needs its compute driver"
    )


def _compiled(artifact: Artifact, where: str, settings: dict[Any, Any]) -> tuple[Any, str]:
    """The compiled model, new or from the cache, and what is to be said of that: "" if all is as it should be."""
    fresh: list[Any] = []

    def compile_model() -> Any:
        fresh.append(_core().compile_model(os.fspath(artifact.path), where, settings))
        return fresh[-1]

    def make() -> tuple[bytes, dict[str, Any]]:
        exported = io.BytesIO()
        compile_model().export_model(exported)
        artifact.check_same(onnx_metadata.read(artifact.path).identity)  # or it would be kept under a wrong name
        return exported.getvalue(), {}

    gains = artifact.format == "onnx" and (where != "CPU" or artifact.size <= _SMALL)
    if not gains or cache.cache_folder() is None:
        return compile_model(), ""
    able = _capabilities(where)
    if "EXPORT_IMPORT" not in able:
        return compile_model(), ""
    slot = cache.Slot(_key(artifact, where, able, settings), "blob")
    kept = cache.compiled(slot, make)
    if not fresh:
        try:
            return _core().import_model(kept.data, where, settings), ""
        except Exception as error:  # noqa: BLE001 (whatever OpenVINO raises of a file that it wrote)
            kept = cache.compiled(slot, make, again=f"OpenVINO refuses the cached file ({one_line(error)})")
    return fresh[-1], kept.note if kept.why or kept.not_kept else ""


def _key(artifact: Artifact, where: str, able: set[str], settings: dict[Any, Any]) -> cache.Key:
    return cache.Key(
        model=artifact.identity,
        name=artifact.spec.name,
        engine="openvino",
        version=openvino.__version__,
        device=f"{where}, {_core().get_property(where, properties.device.full_name())}",
        driver=_said(where, _DRIVER),
        settings={
            "machine": platform.machine(),
            "architecture": _said(where, _ARCHITECTURE),
            "capabilities": sorted(able),
            **{str(name): str(value) for name, value in settings.items()},
        },
    )


def _said(where: str, name: str) -> str:
    """A property that not every device has, nor every version of OpenVINO knows; "" where this one says nothing."""
    try:
        return str(_core().get_property(where, name))
    except Exception:  # noqa: BLE001 (OpenVINO has no other way to say so)
        return ""


def computes_in_less(spec: ModelSpec, options: EngineOptions) -> bool:
    """Whether it would compute in less than float32 on this CPU, and so be the fastest there is."""
    if spec.precision == "int8":
        return True
    return not options.exact and (_in_half("CPU") or _in_bfloat())


def _in_bfloat() -> bool:
    """Whether it computes in bf16 on this CPU: it can on some with AVX2 only, too, but does so only when told."""
    return "BF16" in _capabilities("CPU") and "avx512_bf16" in host.features()


def _in_half(where: str) -> bool:
    """Whether it computes in fp16 on a device unless told otherwise: on GPUs, and on CPUs that are not x86."""
    return not (where == "CPU" and _X86) and "FP16" in _capabilities(where)


def _too_wide(artifact: Artifact, where: str) -> bool:
    """Whether a device would compute in fp16 what the scan at export found too large for it."""
    scan = artifact.receipt.get("scan")
    largest = scan.get("largest") if isinstance(scan, dict) else None
    return isinstance(largest, int | float) and largest > HALF_LIMIT and _in_half(where)


def _capabilities(where: str) -> set[str]:
    with _asking(f"compute on {where} here"):
        return set(_core().get_property(where, properties.device.capabilities()))


def load(artifact: Artifact, options: EngineOptions) -> OpenVINOEngine:
    """What the registry calls; see :class:`OpenVINOEngine`."""
    return OpenVINOEngine(artifact, options)
