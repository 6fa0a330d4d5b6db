"""What building and running have in common: TensorRT's two libraries, how they are imported, and their loggers."""

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
    """One of the two libraries: its module, and what people call it, its engine, its extra and its export format."""

    module: str
    title: str
    engine: str
    extra: str
    format: str

    @property
    def remedy(self) -> str:
        """What to do about an engine that does not fit."""
        return f"build it again on this device: `petseg export CHECKPOINT --format {self.format}`"

    @property
    def cuda12(self) -> str:
        """Its packages for CUDA 12, for pip."""
        return f"{self.engine}-cu12 'cuda-bindings<13'"


TRT: Final = Library(module="tensorrt", title="TensorRT", engine="tensorrt", extra="trt", format="trt")
RTX: Final = Library(
    module="tensorrt_rtx", title="TensorRT for RTX", engine="tensorrt-rtx", extra="rtx", format="trt-rtx"
)
#: By the name of the module.
LIBRARIES: Final = {library.module: library for library in (TRT, RTX)}


@dataclass
class Record:
    """What a library says while it builds, on whatever thread it does."""

    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    layers: str = ""


def imported(module: str, library: Library) -> Any:
    """Import what an engine cannot do without.

    Raises:
        EngineMissing: It is not installed.
        EngineError: It is, but does not work.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if not f"{module}.".startswith(f"{error.name}."):  # a part of it, or something that it needs
            raise EngineError(f"{module} is installed but cannot be imported ({one_line(error)})") from error
        if module == CUDART:  # its extra brings it; without it, the library is the system's own
            raise EngineMissing(f"cuda-bindings is not installed: pip install {bindings()}") from error
        raise EngineMissing(f"{library.engine} is not installed: {install(library.extra)}") from error
    except Exception as error:  # whatever its search for shared libraries ends in
        raise EngineError(f"{module} is installed but cannot be imported ({one_line(error)})") from error


def bindings() -> str:
    """The cuda-bindings that run with this machine's driver, for pip."""
    old = any(host.old_driver(gpu.driver, "") for gpu in host.gpus())
    return "'cuda-bindings<13'" if old else "cuda-bindings"


@functools.cache
def logger_of(base: Any) -> Any:
    """The one logger of a library: it uses the first that it is given, for builders and for engines.

    Args:
        base: The library's ``ILogger``.

    Returns:
        A logger whose ``heard`` has the latest errors, and whose ``record`` is filled while one is set.
    """

    class Logger(base):  # type: ignore[misc]
        def __init__(self) -> None:
            base.__init__(self)  # pybind11 wants it by name
            self.heard: deque[str] = deque(maxlen=4)
            self.record: Record | None = None

        def log(self, severity: Any, msg: str) -> None:
            if severity in (base.Severity.INTERNAL_ERROR, base.Severity.ERROR):
                self.heard.append(" ".join(msg.split()))
                if self.record is not None:
                    self.record.errors.append(msg)
            elif self.record is not None and severity == base.Severity.WARNING:
                self.record.warnings.append(msg)
            elif self.record is not None and "LayerType: " in msg:
                self.record.layers = msg

    return Logger()
