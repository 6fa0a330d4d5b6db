"""OpenVINO on the CPU: the fastest path on Intel, AMD and ARM CPUs. Takes its own IR and ONNX files."""

from __future__ import annotations

import os
import threading
from types import TracebackType
from typing import Any, Final, Self, TypeAlias

import numpy as np
import numpy.typing as npt
import openvino
from openvino import properties

from petseg_runtime.artifact import INPUT, Artifact
from petseg_runtime.engines.base import EngineInfo, EngineOptions, check_batch, in_batches, one_line, usable_cpus
from petseg_runtime.errors import EngineError
from petseg_runtime.spec import ModelSpec

__all__ = ["OpenVINOEngine", "load"]

U8: TypeAlias = npt.NDArray[np.uint8]

_NAMES: Final = {"f32": "f32", "f16": "fp16", "bf16": "bf16"}


class OpenVINOEngine:
    """A compiled OpenVINO model on the CPU.

    On CPUs that have it, OpenVINO computes float32 models in bf16 unless told otherwise; ``describe`` says which.
    """

    def __init__(self, artifact: Artifact, options: EngineOptions) -> None:
        """Load and compile the model.

        Args:
            artifact: What to run, an ONNX file or an OpenVINO IR.
            options: ``exact`` keeps it from computing in bf16 or fp16.

        Raises:
            EngineError: OpenVINO refuses the file, or computes in something it should not.
        """
        self._spec = artifact.spec
        self._threads = options.threads or usable_cpus()
        config: dict[Any, Any] = {
            properties.inference_num_threads(): self._threads,
            properties.hint.performance_mode(): properties.hint.PerformanceMode.LATENCY,
        }
        if options.exact:
            config[properties.hint.inference_precision()] = openvino.Type.f32
        try:
            self._compiled: Any = openvino.Core().compile_model(os.fspath(artifact.path), "CPU", config)
            computed = self._compiled.get_property(properties.hint.inference_precision()).get_type_name()
        except Exception as error:
            raise EngineError(f"{artifact.path}: OpenVINO cannot load it ({one_line(error)})") from error
        if computed not in _NAMES or (options.exact and computed != "f32"):
            raise EngineError(f"{artifact.path}: OpenVINO computes in {computed}, which is not what was asked for")
        self._precision = "int8" if artifact.spec.precision == "int8" else _NAMES[computed]
        self._rest = _NAMES[computed]
        # An infer request serves one call at a time; each thread has its own.
        self._local = threading.local()

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
        rest = f", {self._rest} between the int8 layers" if self._precision == "int8" else ""
        return EngineInfo(
            name="openvino",
            version=openvino.__version__.partition("-")[0],
            device="cpu",
            provider=f"CPU plugin{rest}",
            precision=self._precision,
            threads=self._threads,
        )

    def close(self) -> None:
        """Free the model."""
        self._compiled = None
        self._local = threading.local()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def load(artifact: Artifact, options: EngineOptions) -> OpenVINOEngine:
    """What the registry calls; see :class:`OpenVINOEngine`."""
    return OpenVINOEngine(artifact, options)
