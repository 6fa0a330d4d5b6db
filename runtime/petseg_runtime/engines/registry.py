"""The engines as data: which there are, what each needs, how each is loaded, and which one ``auto`` takes."""

from __future__ import annotations

import importlib
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from petseg_runtime import host
from petseg_runtime.artifact import Artifact
from petseg_runtime.engines.base import Device, Engine, EngineOptions
from petseg_runtime.errors import EngineError, EngineMissing, UsageError, one_line
from petseg_runtime.extras import install

__all__ = ["ENGINES", "RULE", "Choice", "EngineEntry", "choices", "load_engine"]


@dataclass(frozen=True, kw_only=True)
class EngineEntry:
    """One engine.

    Attributes:
        loader: ``module:function`` that takes (artifact, options).
        module: What it cannot do without.
        extra: What to install for it.
        formats: What it runs. One that runs ``onnx`` besides a compiled format of its own compiles at first use.
        run_by_us: The kinds of device that we have run it on. Docstrings point here, and do not say it themselves.
    """

    loader: str
    module: str
    extra: str
    formats: tuple[str, ...]
    run_by_us: tuple[str, ...]

    def extra_on(self, kind: str) -> str:
        """What to install for it where it shall run on a kind of device: ONNX Runtime has another package for CUDA."""
        return "gpu" if self.extra == "cpu" and kind == "cuda" else self.extra


ENGINES: Final = {
    "onnxruntime": EngineEntry(
        loader="petseg_runtime.engines.onnxruntime:load",
        module="onnxruntime",
        extra="cpu",
        formats=("onnx",),
        run_by_us=("cpu",),
    ),
    "openvino": EngineEntry(
        loader="petseg_runtime.engines.openvino:load",
        module="openvino",
        extra="openvino",
        formats=("onnx", "openvino"),
        run_by_us=("cpu",),
    ),
    "tensorrt": EngineEntry(
        loader="petseg_runtime.engines.tensorrt:load",
        module="tensorrt",
        extra="trt",
        formats=("onnx", "trt"),
        run_by_us=(),
    ),
    "tensorrt-rtx": EngineEntry(
        loader="petseg_runtime.engines.tensorrt:load_rtx",
        module="tensorrt_rtx",
        extra="rtx",
        formats=("onnx", "trt-rtx"),
        run_by_us=(),
    ),
}


@dataclass(frozen=True)
class Choice:
    """One line of the rule.

    Attributes:
        engine: A name in :data:`ENGINES`.
        kind: Of device.
        gain: ``module:function`` that takes (spec, options) and says whether the choice stands at this place.
        when: The condition, for people.
        asked_only: Taken only where its kind of device is asked for.
    """

    engine: str
    kind: str
    gain: str | None = None
    when: str = ""
    asked_only: bool = False

    def __str__(self) -> str:
        when = "only when asked for" if self.asked_only else self.when
        return f"{self.engine} on {self.kind}" + (f", {when}" if when else "")


#: What ``auto`` takes: the first of these that runs the file, is installed, and works. Where a device or an engine is
#: asked for, only its lines are left. In the order of speed, as far as we could measure it: OpenVINO is twice as fast
#: as ONNX Runtime on a CPU that it computes on in less than float32, and slower elsewhere.
RULE: Final = (
    Choice("tensorrt", "cuda"),
    Choice("tensorrt-rtx", "cuda"),
    Choice("onnxruntime", "cuda"),
    Choice(
        "openvino",
        "cpu",
        "petseg_runtime.engines.openvino:computes_in_less",
        "where it computes in bf16, fp16 or int8",
    ),
    Choice("onnxruntime", "cpu"),
    Choice("openvino", "cpu"),
    # No help where the lines above fail: OpenVINO has refused the file by then. NVIDIA's GPUs are taken unasked, though
    # we may not have run them: the gain is worth a try, and what does not load is passed over.
    Choice("openvino", "intel-gpu", asked_only=True),
)


def load_engine(
    artifact: Artifact,
    backend: str = "auto",
    threads: int | None = None,
    *,
    device: str = "auto",
    streams: int = 1,
    exact: bool = False,
    cuda_graph: bool = True,
    size: tuple[int, int] | None = None,
    tell: Callable[[str], None] | None = None,
    warn: Callable[[str], None] = lambda why: None,
) -> Engine:
    """Load a model in an engine, by the rule above.

    Args:
        artifact: What to run.
        backend: A name in :data:`ENGINES`, or ``auto``.
        threads: CPU threads; None: as many as this process may use.
        device: ``cpu``, ``cuda``, ``cuda:N``, ``intel-gpu``, ``intel-gpu:N`` or ``auto``. One that is asked for and
            is not there is an error, never another one.
        streams: See :class:`EngineOptions`.
        exact: Compute in float32 where the graph says so, even where the engine knows something faster.
        cuda_graph: See :class:`EngineOptions`.
        size: See :class:`EngineOptions`.
        tell: See :class:`EngineOptions`.
        warn: Told of each engine that is installed and was passed over, because it does not work;
            :attr:`EngineInfo.notes` say so, too.

    Raises:
        UsageError: No such number of threads or streams.
        EngineMissing: Not installed; the message says what to install.
        EngineError: No such engine or device, or it cannot load the model.
    """
    for name, value in (("threads", threads), ("streams", streams)):
        if value is not None and not (isinstance(value, int) and value >= 1):
            raise UsageError(f"{name} is {value}; it must be a whole number, 1 or more")
    wanted = None if device == "auto" else Device.parse(device)
    passed: list[EngineError] = []
    handled = sys.exception()
    for choice in choices(artifact.format, backend, wanted, what=str(artifact.path)):
        notes = tuple(str(error) for error in passed if not isinstance(error, EngineMissing))
        options = EngineOptions(
            threads=threads,
            streams=streams,
            exact=exact,
            device=wanted or Device(choice.kind),
            cuda_graph=cuda_graph,
            size=size,
            tell=tell,
            notes=notes,
        )
        try:
            if choice.gain is None or _function(choice, choice.gain)(artifact.spec, options):
                engine: Engine = _function(choice, ENGINES[choice.engine].loader)(artifact, options)
                for why in notes:
                    warn(why)
                return engine
        except EngineError as error:
            _let_go(error, handled)
            passed.append(error)
    raise _failure(artifact, backend, wanted, passed)


def _let_go(error: BaseException, handled: BaseException | None) -> None:
    """Empty the frames of an error and of those behind it, which hold what failed, and a GPU's memory with that.

    What is loaded next may need that memory, and only the collector would free it, whenever it comes: the error is kept
    in a frame that it holds itself.

    Args:
        error: Why an engine was passed over.
        handled: What was being handled before; its frames are others' and stay as they are.
    """
    waiting: list[BaseException | None] = [error]
    done = {id(handled)}
    while waiting:
        link = waiting.pop()
        if link is None or id(link) in done:
            continue
        done.add(id(link))
        traceback.clear_frames(link.__traceback__)
        waiting += [link.__cause__, link.__context__]


def choices(form: str, backend: str, wanted: Device | None, *, what: str) -> list[Choice]:
    """The lines of the rule that are left for files of a format, where an engine or a device is asked for.

    Args:
        form: The format, as :attr:`petseg_runtime.artifact.Artifact.format` calls it.
        backend: A name in :data:`ENGINES`, or ``auto``.
        wanted: The device that is asked for; None: those that are here.
        what: What an error is about: a file, or a format.

    Raises:
        EngineError: None; says what contradicts what.
    """
    if backend != "auto" and backend not in ENGINES:
        raise EngineError(f"there is no engine {backend!r}; there are: auto, {', '.join(ENGINES)}")
    able = [name for name, entry in ENGINES.items() if form in entry.formats]
    if backend != "auto" and backend not in able:
        raise EngineError(f"{what}: {backend} does not run {form} files; what does: {', '.join(able)}")
    lines = [line for line in RULE if line.engine in able and backend in ("auto", line.engine)]
    if wanted:
        fitting = [line for line in lines if line.kind == wanted.kind]
        if not fitting:
            raise EngineError(
                f"{what}: {', '.join(dict.fromkeys(line.engine for line in lines))} cannot run it on "
                f"{wanted}; what can: {'; '.join(map(str, lines))}"
            )
        return fitting
    lines = [line for line in lines if not line.asked_only]
    there = [line for line in lines if line.kind != "cuda" or host.nvidia_gpus()]
    return there or lines  # without a GPU, what needs one says so itself


def _function(choice: Choice, where: str) -> Callable[..., Any]:
    """A function of an engine's module.

    Raises:
        EngineMissing: Its library is not installed.
        EngineError: It is, but cannot be imported.
    """
    entry = ENGINES[choice.engine]
    module, _, name = where.partition(":")
    try:
        function: Callable[..., Any] = getattr(importlib.import_module(module), name)
    except Exception as error:  # a shared library of another version, a package that is missing, whatever it does there
        lacks = (error.name or "").partition(".")[0] if isinstance(error, ModuleNotFoundError) else ""
        if lacks == __name__.partition(".")[0]:
            raise
        if lacks == entry.module:
            raise EngineMissing(f"{choice.engine} is not installed: {install(entry.extra_on(choice.kind))}") from error
        raise EngineError(f"{choice.engine} is installed but cannot be imported ({one_line(error)})") from error
    return function


def _failure(artifact: Artifact, backend: str, wanted: Device | None, passed: Sequence[EngineError]) -> EngineError:
    """One error of all that was tried."""
    if backend == "auto" and wanted and wanted.kind == "cuda" and not host.nvidia_gpus():
        # What the engines lack is beside the point.
        return EngineError(
            f"{wanted} cannot be had: this machine shows no NVIDIA GPU: install its driver, or use --device cpu"
        )
    reasons = list(dict.fromkeys(map(str, passed)))
    if len(reasons) == 1:
        return passed[0]
    if not all(isinstance(error, EngineMissing) for error in passed):
        return EngineError("; ".join(reasons))
    if backend == "auto" and not wanted:
        able = [entry for entry in ENGINES.values() if artifact.format in entry.formats]
        remedies = " or ".join(install(entry.extra) for entry in able)
        return EngineMissing(f"no inference engine for {artifact.format} files is installed: {remedies}")
    return EngineMissing("; ".join(reasons))
