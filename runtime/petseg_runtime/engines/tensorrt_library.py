"""TensorRT and TensorRT for RTX as libraries: how they are imported, and their loggers; for building and running."""

from __future__ import annotations

import functools
import importlib
from collections import deque
from dataclasses import dataclass, field
from typing import Any, Final

from petseg_runtime import host
from petseg_runtime.errors import EngineError, EngineMissing, one_line
from petseg_runtime.extras import install

__all__ = ["CUDART", "LIBRARIES", "RTX", "TRT", "Library", "Record", "bindings", "imported", "logger_of"]

CUDART: Final = "cuda.bindings.runtime"


@dataclass(frozen=True, kw_only=True)
class Library:
    """One of the two libraries: its module, its title, and the names of its engine, extra and export format."""

    module: str
    title: str
    engine: str
    extra: str
    format: str

    def remedy(self, capability: str) -> str:
        """The remedy for an engine that does not fit this device, whose GPU has that compute capability."""
        again = f"petseg export CHECKPOINT --format {self.format}"
        # Only TensorRT for RTX builds for GPUs of other machines.
        again = f"`{again} --compute-capability {capability}`" if self is RTX else f"`{again}` on this device"
        run = "run the ONNX file that it was made from, which is compiled here at first use"
        return f"{run}, or build it again: {again}"

    @property
    def cuda12(self) -> str:
        """The pip packages of this library for CUDA 12."""
        return f"{self.engine}-cu12 'cuda-bindings<13'"


TRT: Final = Library(module="tensorrt", title="TensorRT", engine="tensorrt", extra="trt", format="trt")
RTX: Final = Library(
    module="tensorrt_rtx", title="TensorRT for RTX", engine="tensorrt-rtx", extra="rtx", format="trt-rtx"
)
#: The libraries by the name of their module.
LIBRARIES: Final = {library.module: library for library in (TRT, RTX)}


@dataclass
class Record:
    """What a library logs during a build, on any of its threads."""

    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    layers: str = ""


def imported(module: str, library: Library) -> Any:
    """Import a module that an engine requires.

    Raises:
        EngineMissing: It is not installed.
        EngineError: It is installed but does not work.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if not f"{module}.".startswith(f"{error.name}."):  # a submodule or a dependency is missing
            raise EngineError(f"{module} is installed but cannot be imported ({one_line(error)})") from error
        if module == CUDART:  # the extra installs both; if only this is missing, the library came with the system
            raise EngineMissing(f"cuda-bindings is not installed: pip install {bindings()}") from error
        raise EngineMissing(f"{library.engine} is not installed: {install(library.extra)}") from error
    except Exception as error:  # anything that the search for shared libraries may raise
        raise EngineError(f"{module} is installed but cannot be imported ({one_line(error)})") from error


def bindings() -> str:
    """The requirement, for pip, of the cuda-bindings that work with this machine's driver."""
    old = any(host.old_driver(gpu.driver, "") for gpu in host.gpus())
    return "'cuda-bindings<13'" if old else "cuda-bindings"


@functools.cache
def logger_of(base: Any) -> Any:
    """The single logger of a library, which uses the first logger that it is given for all builders and runtimes.

    Args:
        base: The library's ``ILogger``.

    Returns:
        A logger. ``recent_errors`` has its latest errors; ``record``, while it is set, collects all that is logged.
    """

    class Logger(base):  # type: ignore[misc]
        def __init__(self) -> None:
            base.__init__(self)  # pybind11 requires the explicit call
            self.recent_errors: deque[str] = deque(maxlen=4)
            self.record: Record | None = None

        def log(self, severity: Any, msg: str) -> None:
            if severity in (base.Severity.INTERNAL_ERROR, base.Severity.ERROR):
                self.recent_errors.append(" ".join(msg.split()))
                if self.record is not None:
                    self.record.errors.append(msg)
            elif self.record is not None and severity == base.Severity.WARNING:
                self.record.warnings.append(msg)
            elif self.record is not None and "LayerType: " in msg:
                self.record.layers = msg

    return Logger()
