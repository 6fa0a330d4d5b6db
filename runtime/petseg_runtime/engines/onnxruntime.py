"""ONNX Runtime on the CPU: the embedded default, on any laptop and board."""

from __future__ import annotations

import os
from types import TracebackType
from typing import Any, Self, TypeAlias

import numpy as np
import numpy.typing as npt
import onnxruntime

from petseg_runtime.artifact import INPUT, OUTPUT, Artifact
from petseg_runtime.engines.base import EngineInfo, check_batch
from petseg_runtime.errors import EngineError
from petseg_runtime.spec import ModelSpec

__all__ = ["OnnxRuntimeEngine", "load"]

U8: TypeAlias = npt.NDArray[np.uint8]

_ERRORS_ONLY = 3  # ONNX Runtime's log severity


class OnnxRuntimeEngine:
    """An ONNX Runtime session with the CPU provider, float32."""

    def __init__(self, artifact: Artifact, threads: int | None) -> None:
        """Load the model.

        Args:
            artifact: What to run.
            threads: CPU threads; None: as many as this process may use.

        Raises:
            EngineError: ONNX Runtime refuses the file, or runs it with another provider than asked for.
        """
        self._spec = artifact.spec
        self._threads = threads or _usable_cpus()
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self._threads
        options.log_severity_level = _ERRORS_ONLY
        try:
            self._session: Any = onnxruntime.InferenceSession(
                os.fspath(artifact.path), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:
            raise EngineError(f"{artifact.path}: ONNX Runtime cannot load it ({_one_line(error)})") from error
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
        try:
            (probability,) = self._session.run([OUTPUT], {INPUT: np.ascontiguousarray(images)})
        except Exception as error:
            raise EngineError(f"ONNX Runtime failed ({_one_line(error)})") from error
        return probability  # type: ignore[no-any-return]

    def describe(self) -> EngineInfo:
        """What is really running."""
        return EngineInfo(
            name="onnxruntime",
            version=onnxruntime.__version__,
            device="cpu",
            provider=self._provider,
            precision="f32",
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


def load(artifact: Artifact, threads: int | None) -> OnnxRuntimeEngine:
    """What the registry calls; see :class:`OnnxRuntimeEngine`."""
    return OnnxRuntimeEngine(artifact, threads)


def _usable_cpus() -> int:
    """CPUs this process may run on, which a container or taskset can make fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
