"""ONNX Runtime on the CPU: the embedded default, on any laptop and board."""

from __future__ import annotations

import os
import platform
from types import TracebackType
from typing import Any, Final, Self, TypeAlias

import numpy as np
import numpy.typing as npt
import onnxruntime

from petseg_runtime.artifact import INPUT, OUTPUT, Artifact
from petseg_runtime.engines.base import EngineInfo, EngineOptions, check_batch, in_batches, one_line, usable_cpus
from petseg_runtime.errors import EngineError
from petseg_runtime.spec import ModelSpec

__all__ = ["OnnxRuntimeEngine", "load"]

U8: TypeAlias = npt.NDArray[np.uint8]

_ERRORS_ONLY: Final = 3  # ONNX Runtime's log severity

#: Its CPU provider has fp16 kernels for ARM only; elsewhere it casts an fp16 graph to float32 and computes in that.
_FP16_ON_CPU: Final = platform.machine().lower() in ("aarch64", "arm64")


class OnnxRuntimeEngine:
    """An ONNX Runtime session with the CPU provider."""

    def __init__(self, artifact: Artifact, options: EngineOptions) -> None:
        """Load the model.

        Args:
            artifact: What to run.
            options: Its CPU provider never computes float32 in anything else, so ``exact`` changes nothing.

        Raises:
            EngineError: ONNX Runtime refuses the file, or runs it with another provider than asked for.
        """
        self._spec = artifact.spec
        self._threads = options.threads or usable_cpus()
        settings = onnxruntime.SessionOptions()
        settings.intra_op_num_threads = self._threads
        settings.log_severity_level = _ERRORS_ONLY
        try:
            self._session: Any = onnxruntime.InferenceSession(
                os.fspath(artifact.path), settings, providers=["CPUExecutionProvider"]
            )
        except Exception as error:
            raise EngineError(f"{artifact.path}: ONNX Runtime cannot load it ({one_line(error)})") from error
        self._provider: str = self._session.get_providers()[0]
        if self._provider != "CPUExecutionProvider":
            raise EngineError(f"{artifact.path}: ONNX Runtime chose {self._provider} instead of the CPU")

    @property
    def spec(self) -> ModelSpec:
        """What the model expects and returns."""
        return self._spec

    def run(self, images: U8) -> U8:
        """Segment a batch; see :class:`petseg_runtime.engines.base.Engine`."""
        if self._session is None:
            raise EngineError("the engine is closed")
        check_batch(images, self._spec)
        return in_batches(self._run, images, self._spec.batch)

    def _run(self, images: U8) -> U8:
        try:
            (probability,) = self._session.run([OUTPUT], {INPUT: np.ascontiguousarray(images)})
        except Exception as error:
            raise EngineError(f"ONNX Runtime failed ({one_line(error)})") from error
        return probability  # type: ignore[no-any-return]

    def describe(self) -> EngineInfo:
        """What is really running."""
        computed = {"fp32": "f32", "fp16": "fp16" if _FP16_ON_CPU else "f32", "int8": "int8"}
        return EngineInfo(
            name="onnxruntime",
            version=onnxruntime.__version__,
            device="cpu",
            provider=self._provider,
            precision=computed[self._spec.precision],
            threads=self._threads,
        )

    def close(self) -> None:
        """Free the session."""
        self._session = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def load(artifact: Artifact, options: EngineOptions) -> OnnxRuntimeEngine:
    """What the registry calls; see :class:`OnnxRuntimeEngine`."""
    return OnnxRuntimeEngine(artifact, options)
