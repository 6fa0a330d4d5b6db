"""OpenVINO: the fastest path on CPUs that compute in bf16, fp16 or int8. Takes its own IR and ONNX files.

On Intel's GPUs it was never run by us.
"""

from __future__ import annotations

import functools
import os
import threading
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt
import openvino
from openvino import properties

from petseg_runtime.artifact import INPUT, Artifact
from petseg_runtime.engines.base import (
    Device,
    Engine,
    EngineInfo,
    EngineOptions,
    check_batch,
    in_batches,
    one_line,
    usable_cpus,
)
from petseg_runtime.errors import EngineError
from petseg_runtime.spec import ModelSpec

__all__ = ["OpenVINOEngine", "computes_in_less", "load"]

U8: TypeAlias = npt.NDArray[np.uint8]

_NAMES: Final = {"f32": "f32", "f16": "fp16", "bf16": "bf16"}


class OpenVINOEngine(Engine):
    """A compiled OpenVINO model.

    On devices that have it, OpenVINO computes float32 models in bf16 or fp16 unless told otherwise; ``describe`` says
    which.
    """

    def __init__(self, artifact: Artifact, options: EngineOptions) -> None:
        """Load and compile the model.

        Args:
            artifact: What to run, an ONNX file or an OpenVINO IR.
            options: ``exact`` keeps it from computing in bf16 or fp16.

        Raises:
            EngineError: There is no such device, OpenVINO refuses the file, or computes in something it should not.
        """
        self._spec, self._device, self._notes = artifact.spec, options.device, options.notes
        cpu = options.device.kind == "cpu"
        self._threads = (options.threads or usable_cpus()) if cpu else 0
        self._streams = min(options.streams, self._threads) if cpu else options.streams
        where = _plugin(options.device)
        try:
            self._compiled: Any = _core().compile_model(os.fspath(artifact.path), where, self._settings(options))
            computed = self._compiled.get_property(properties.hint.inference_precision()).get_type_name()
        except Exception as error:
            raise EngineError(f"{artifact.path}: OpenVINO cannot load it ({one_line(error)})") from error
        if computed not in _NAMES or (options.exact and computed != "f32"):
            raise EngineError(f"{artifact.path}: OpenVINO computes in {computed}, which is not what was asked for")
        self._precision = "int8" if artifact.spec.precision == "int8" else _NAMES[computed]
        rest = f", {_NAMES[computed]} between the int8 layers" if self._precision == "int8" else ""
        self._provider = f"{where.partition('.')[0]} plugin{rest}"
        # An infer request serves one call at a time; each thread has its own.
        self._local = threading.local()

    def _settings(self, options: EngineOptions) -> dict[Any, Any]:
        settings: dict[Any, Any] = {
            properties.hint.performance_mode(): properties.hint.PerformanceMode.LATENCY,
            properties.num_streams(): self._streams,
        }
        if options.device.kind == "cpu":
            settings[properties.inference_num_threads()] = self._threads
        if options.exact:
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
            return np.array(request.get_output_tensor(0).data, copy=True)
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
            notes=self._notes,
        )

    def close(self) -> None:
        """Free the model."""
        self._compiled = None
        self._local = threading.local()


@functools.cache
def _core() -> Any:
    """OpenVINO itself, once for all models: it takes a tenth of a second to start."""
    return openvino.Core()


def _plugin(device: Device) -> str:
    """What OpenVINO calls a device.

    Raises:
        EngineError: It sees no such device.
    """
    there: list[str] = _core().available_devices
    if device.kind == "cpu":
        return "CPU"
    names = [name for name in there if name.partition(".")[0] == "GPU"]
    for name in names:
        if int(name.partition(".")[2] or 0) == device.index:
            return name
    raise EngineError(
        f"{device} cannot be had: OpenVINO sees {', '.join(there) or 'nothing'}; an Intel GPU needs its compute driver"
    )


def computes_in_less(spec: ModelSpec, options: EngineOptions) -> bool:
    """Whether it would compute in less than float32 on this CPU, and so be the fastest there is."""
    if spec.precision == "int8":
        return True
    able = _core().get_property("CPU", properties.device.capabilities())
    return not options.exact and bool({"BF16", "FP16"} & set(able))


def load(artifact: Artifact, options: EngineOptions) -> OpenVINOEngine:
    """What the registry calls; see :class:`OpenVINOEngine`."""
    return OpenVINOEngine(artifact, options)
