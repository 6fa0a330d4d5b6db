"""The engines as data: which there are, what each needs, how each is loaded."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from petseg_runtime.artifact import Artifact
from petseg_runtime.engines.base import Engine, EngineOptions, one_line
from petseg_runtime.errors import EngineError, EngineMissing

__all__ = ["ENGINES", "load_engine"]


@dataclass(frozen=True, kw_only=True)
class EngineEntry:
    """One engine.

    Attributes:
        loader: ``module:function`` that takes (artifact, options).
        module: What it cannot do without.
        extra: What to install for it.
        formats: What it runs.
    """

    loader: str
    module: str
    extra: str
    formats: tuple[str, ...]


#: In the order in which ``auto`` tries those that run the file's format.
ENGINES: Final = {
    "onnxruntime": EngineEntry(
        loader="petseg_runtime.engines.onnxruntime:load", module="onnxruntime", extra="cpu", formats=("onnx",)
    ),
    "openvino": EngineEntry(
        loader="petseg_runtime.engines.openvino:load", module="openvino", extra="openvino", formats=("onnx", "openvino")
    ),
    "tensorrt": EngineEntry(
        loader="petseg_runtime.engines.tensorrt:load", module="tensorrt", extra="trt", formats=("trt",)
    ),
    "tensorrt-rtx": EngineEntry(
        loader="petseg_runtime.engines.tensorrt:load", module="tensorrt_rtx", extra="rtx", formats=("trt-rtx",)
    ),
}


def load_engine(
    artifact: Artifact, backend: str = "auto", threads: int | None = None, *, exact: bool = False
) -> Engine:
    """Load a model in an engine.

    Args:
        artifact: What to run.
        backend: A name in :data:`ENGINES`, or ``auto`` for the first that is installed and runs such a file.
        threads: CPU threads; None: as many as this process may use.
        exact: Compute in float32 where the graph says so, even where the engine knows something faster.

    Raises:
        EngineMissing: Not installed; the message says what to install.
        EngineError: No such engine, or it cannot load the model.
    """
    if threads is not None and threads < 1:
        raise EngineError(f"threads is {threads}; it must be 1 or more")
    if backend != "auto" and backend not in ENGINES:
        raise EngineError(f"there is no engine {backend!r}; there are: auto, {', '.join(ENGINES)}")
    able = [name for name, entry in ENGINES.items() if artifact.format in entry.formats]
    if backend != "auto" and backend not in able:
        raise EngineError(
            f"{artifact.path}: {backend} does not run {artifact.format} files; what does: {', '.join(able)}"
        )
    for name in able if backend == "auto" else [backend]:
        entry = ENGINES[name]
        where, _, function = entry.loader.partition(":")
        try:
            load: Callable[[Artifact, EngineOptions], Engine] = getattr(importlib.import_module(where), function)
        except ModuleNotFoundError as error:
            if (error.name or "").partition(".")[0] != entry.module:
                raise
            if backend != "auto":
                raise EngineMissing(f"{name} is not installed: pip install 'petseg[{entry.extra}]'") from error
            continue
        except ImportError as error:  # a shared library that it needs, or one of another version
            raise EngineError(f"{name} is installed but cannot be imported ({one_line(error)})") from error
        return load(artifact, EngineOptions(threads=threads, exact=exact))
    extras = ", ".join(f"pip install 'petseg[{ENGINES[name].extra}]'" for name in able)
    raise EngineMissing(f"no inference engine for {artifact.format} files is installed: {extras}")
