"""OpenVINO: the fastest engine on CPUs that compute in bf16, fp16 or int8. Runs OpenVINO IR and ONNX files.

A model compiled from an ONNX file is cached (:mod:`petseg_runtime.cache`) where that pays: on CPUs for small files, and
on GPUs, where compilation takes longest. The CPU plugin exports the optimized graph with its weights, without kernels.
The cache saves a fifth of the time to load the built-in model in a new process (195 to 152 ms), but little for a file
of 117 MB (305 to 263 of 850 ms). An IR is compiled every time.

:data:`petseg_runtime.engines.registry.ENGINES` lists the devices that we have run it on.
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
from petseg_runtime.errors import EngineError, ModelError, UsageError, one_line
from petseg_runtime.spec import HALF_LIMIT, ModelSpec

__all__ = ["OpenVINOEngine", "computes_in_less", "load"]

U8: TypeAlias = npt.NDArray[np.uint8]

_NAMES: Final = {"f32": "f32", "f16": "fp16", "bf16": "bf16"}

#: OpenVINO's default precision depends on other properties on x86 CPUs than on all others.
_X86: Final = platform.machine().lower() in ("x86_64", "amd64")

#: Serializes loading and the first run. OpenVINO's Python binding imports numpy in the initializer of a C++ static when
#: a tensor's data is first accessed: a second thread that arrives then waits for the initializer while it holds the
#: GIL, and the first waits for the GIL: a deadlock (2026.4.1; in 3 of 12 processes with eight threads).
_FIRST: Final = threading.Lock()

#: Properties that the GPU plugin's own cache depends on, too: a model for a GPU is compiled by the driver's compiler.
_DRIVER: Final = "GPU_DRIVER_VERSION"
_ARCHITECTURE: Final = "DEVICE_ARCHITECTURE"

#: Largest ONNX file, in bytes, for which the cache pays on a CPU.
_SMALL: Final = 32 * 2**20


class OpenVINOEngine(Engine):
    """A compiled OpenVINO model.

    By default OpenVINO computes float32 models in bf16 or fp16 on devices that support it; ``describe`` says which.
    fp16 is not used if, according to the receipt, activations come near the end of its range.
    """

    def __init__(self, artifact: Artifact, options: EngineOptions) -> None:
        """Load and compile the model.

        Args:
            artifact: The model to run, an ONNX file or an OpenVINO IR.
            options: ``exact`` keeps it from computing in bf16 or fp16; ``size`` is the size of the first run, done
                here.

        Raises:
            EngineError: There is no such device, OpenVINO rejects the file, or it computes in the wrong precision.
            ModelError: The file has changed since it was opened.
            UsageError: The model does not accept ``size``.
        """
        self.spec, self._device = artifact.spec, options.device
        height, width = options.size or (artifact.spec.height, artifact.spec.width)
        cpu = options.device.kind == "cpu"
        self._threads = (options.threads or host.usable_cpus()) if cpu else 0
        self._streams = min(options.streams, self._threads) if cpu else options.streams
        # An infer request serves one call at a time, so each thread has its own.
        self._local = threading.local()
        with _FIRST:
            where = _plugin(options.device)
            try:
                wide = not options.exact and _too_wide(artifact, where)
                self._compiled, note = _compiled(artifact, where, self._settings(options, exact=options.exact or wide))
                computed = self._compiled.get_property(properties.hint.inference_precision()).get_type_name()
                self.run(np.zeros((1, height, width, 3), np.uint8))
            except (ModelError, UsageError):
                raise
            except Exception as error:
                raise EngineError(f"{artifact.path}: OpenVINO cannot load it ({one_line(error)})") from error
        if computed not in _NAMES or (options.exact and computed != "f32"):
            wanted = "f32" if options.exact else " or ".join(_NAMES)
            raise EngineError(f"{artifact.path}: OpenVINO computes in {computed} instead of {wanted}")
        self._float32 = _NAMES[computed]
        self._precision = "int8" if artifact.spec.precision == "int8" else self._float32
        rest = f", {self._float32} between the int8 layers" if self._precision == "int8" else ""
        self._provider = f"{where.partition('.')[0]} plugin{rest}"
        notes = (note, "computes in float32, because some activations are too large for float16" if wide else "")
        self._notes = (*options.notes, *(f"OpenVINO: {note}" for note in notes if note))

    def _settings(self, options: EngineOptions, *, exact: bool) -> dict[Any, Any]:
        settings: dict[Any, Any] = {
            properties.hint.performance_mode(): properties.hint.PerformanceMode.LATENCY,
            properties.num_streams(): self._streams,
        }
        if options.device.kind == "cpu":
            settings[properties.inference_num_threads()] = self._threads
            if self._threads < host.cores():  # otherwise all such processes would be pinned to the same first cores
                settings[properties.hint.enable_cpu_pinning()] = False
        if exact:
            settings[properties.hint.inference_precision()] = openvino.Type.f32
        return settings

    def run(self, images: U8) -> U8:
        """Segment a batch; see :class:`petseg_runtime.engines.base.Engine`."""
        if self._compiled is None:
            raise EngineError("the engine is closed")
        check_batch(images, self.spec)
        return in_batches(self._run, images, self.spec.batch)

    def _run(self, images: U8) -> U8:
        try:
            if not hasattr(self._local, "request"):
                self._local.request = self._compiled.create_infer_request()
            request = self._local.request
            request.infer({INPUT: np.ascontiguousarray(images)})
            output = np.array(request.get_output_tensor(0).data, copy=True)
            if output.shape != images.shape[:3]:  # with one thread, it ignores a failure and keeps its last output
                raise RuntimeError(f"it returned {list(output.shape)} for {list(images.shape)}")
            return output
        except Exception as error:
            raise EngineError(f"OpenVINO failed ({one_line(error)})") from error

    def describe(self) -> EngineInfo:
        """Describe what is actually running."""
        return EngineInfo(
            name="openvino",
            version=openvino.__version__.partition("-")[0],
            device=str(self._device),
            provider=self._provider,
            precision=self._precision,
            threads=self._threads,
            streams=self._streams,
            batch=self.spec.batch or 1,
            notes=self._notes,
            float32=self._float32,
        )

    def close(self) -> None:
        """Free the model."""
        self._compiled = None
        self._local = threading.local()


@functools.cache
def _core() -> Any:
    """The OpenVINO core, shared by all models: it takes a tenth of a second to start.

    Raises:
        EngineError: It does not start.
    """
    with _asking("start"):
        return openvino.Core()


@contextlib.contextmanager
def _asking(what: str) -> Iterator[None]:
    """Turn any exception of OpenVINO into an ``EngineError`` that names the operation."""
    try:
        yield
    except Exception as error:
        raise EngineError(f"OpenVINO cannot {what} ({one_line(error)})") from error


def _plugin(device: Device) -> str:
    """OpenVINO's name for a device.

    Raises:
        EngineError: OpenVINO finds no such device.
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
        f"{device} is not available: OpenVINO finds {', '.join(there) or 'no device'}; an Intel GPU needs its compute "
        "driver"
    )


def _compiled(artifact: Artifact, where: str, settings: dict[Any, Any]) -> tuple[Any, str]:
    """Compile a model or load it from the cache; returns it with a note, which is "" if there is nothing to report."""
    fresh: list[Any] = []

    def compile_model() -> Any:
        fresh.append(_core().compile_model(os.fspath(artifact.path), where, settings))
        return fresh[-1]

    def make() -> tuple[bytes, dict[str, Any]]:
        exported = io.BytesIO()
        compile_model().export_model(exported)
        artifact.check_same(onnx_metadata.read(artifact.path).identity)  # else it would be cached under a wrong key
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
        except Exception as error:  # noqa: BLE001 (anything that OpenVINO may raise)
            kept = cache.compiled(slot, make, again=f"OpenVINO rejects the cached file ({one_line(error)})")
    return fresh[-1], kept.note if kept.why or kept.not_kept else ""


def _key(artifact: Artifact, where: str, able: set[str], settings: dict[Any, Any]) -> cache.Key:
    return cache.Key(
        model=artifact.identity,
        name=artifact.spec.name,
        engine="openvino",
        version=openvino.__version__,
        device=f"{where}, {_core().get_property(where, properties.device.full_name())}",
        driver=_optional_property(where, _DRIVER),
        settings={
            "machine": platform.machine(),
            "architecture": _optional_property(where, _ARCHITECTURE),
            "capabilities": sorted(able),
            **{str(name): str(value) for name, value in settings.items()},
        },
    )


def _optional_property(where: str, name: str) -> str:
    """A property that not every device has and not every version of OpenVINO knows; "" if it is missing."""
    try:
        return str(_core().get_property(where, name))
    except Exception:  # noqa: BLE001 (OpenVINO has no other way to report that)
        return ""


def computes_in_less(spec: ModelSpec, options: EngineOptions) -> bool:
    """Whether OpenVINO would compute in less than float32 on this CPU, which makes it the fastest engine here."""
    if spec.precision == "int8":
        return True
    return not options.exact and (_in_half("CPU") or _in_bfloat())


def _in_bfloat() -> bool:
    """Whether the default is bf16 on this CPU: on some with AVX2 only, it is supported but not the default."""
    return "BF16" in _capabilities("CPU") and "avx512_bf16" in host.features()


def _in_half(where: str) -> bool:
    """Whether the default on a device is fp16: on GPUs, and on CPUs other than x86, that support it."""
    return not (where == "CPU" and _X86) and "FP16" in _capabilities(where)


def _too_wide(artifact: Artifact, where: str) -> bool:
    """Whether a device would compute in fp16 although the scan at export found activations too large for it."""
    scan = artifact.receipt.get("scan")
    largest = scan.get("largest") if isinstance(scan, dict) else None
    return isinstance(largest, int | float) and largest > HALF_LIMIT and _in_half(where)


def _capabilities(where: str) -> set[str]:
    with _asking(f"compute on {where} here"):
        return set(_core().get_property(where, properties.device.capabilities()))


def load(artifact: Artifact, options: EngineOptions) -> OpenVINOEngine:
    """Load a model; called by the registry. See :class:`OpenVINOEngine`."""
    return OpenVINOEngine(artifact, options)
