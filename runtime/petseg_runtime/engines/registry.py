"""The engines as data: which there are, what each needs, how each is loaded."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from petseg_runtime.artifact import Artifact
from petseg_runtime.engines.base import Engine
from petseg_runtime.errors import EngineError, EngineMissing

__all__ = ["ENGINES", "load_engine"]


@dataclass(frozen=True, kw_only=True)
class EngineEntry:
    """One engine.

    Attributes:
        loader: ``module:function`` that takes (artifact, threads).
        module: What it cannot do without.
        extra: What to install for it.
    """

    loader: str
    module: str
    extra: str


#: In the order in which ``auto`` tries them.
ENGINES: Final = {
    "onnxruntime": EngineEntry(loader="petseg_runtime.engines.onnxruntime:load", module="onnxruntime", extra="cpu"),
}


def load_engine(artifact: Artifact, backend: str = "auto", threads: int | None = None) -> Engine:
    """Load a model in an engine.

    Args:
        artifact: What to run.
        backend: A name in :data:`ENGINES`, or ``auto`` for the first that is installed.
        threads: CPU threads; None: as many as this process may use.

    Raises:
        EngineMissing: Not installed; the message says what to install.
        EngineError: No such engine, or it cannot load the model.
    """
    if threads is not None and threads < 1:
        raise EngineError(f"threads is {threads}; it must be 1 or more")
    if backend != "auto" and backend not in ENGINES:
        raise EngineError(f"there is no engine {backend!r}; there are: auto, {', '.join(ENGINES)}")
    for name in ENGINES if backend == "auto" else [backend]:
        entry = ENGINES[name]
        where, _, function = entry.loader.partition(":")
        try:
            load: Callable[[Artifact, int | None], Engine] = getattr(importlib.import_module(where), function)
        except ModuleNotFoundError as error:
            if (error.name or "").partition(".")[0] != entry.module:
                raise
            if backend != "auto":
                raise EngineMissing(f"{name} is not installed: pip install 'petseg[{entry.extra}]'") from error
            continue
        except ImportError as error:  # a shared library that it needs, or one of another version
            reason = " ".join(str(error).split())
            raise EngineError(f"{name} is installed but cannot be imported ({reason})") from error
        return load(artifact, threads)
    extras = ", ".join(f"pip install 'petseg[{entry.extra}]'" for entry in ENGINES.values())
    raise EngineMissing(f"no inference engine is installed: {extras}")
