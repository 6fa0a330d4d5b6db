"""The table of engines: what each needs, how each is loaded, and which one ``auto`` chooses."""

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
from petseg_runtime.errors import EngineError, EngineMissing, ModelError, UsageError, one_line
from petseg_runtime.extras import install

__all__ = ["ENGINES", "MAX_THREADS", "RULE", "Choice", "EngineEntry", "choices", "load_engine"]


@dataclass(frozen=True, kw_only=True)
class EngineEntry:
    """One engine.

    Attributes:
        loader: ``module:function``; the function takes (artifact, options).
        module: The Python module that it requires.
        extra: The extra that installs it.
        formats: The file formats that it runs. An engine that runs ``onnx`` besides its compiled format compiles at
            first use.
        run_by_us: The kinds of device that we have run it on. Docstrings refer to this instead of repeating it.
    """

    loader: str
    module: str
    extra: str
    formats: tuple[str, ...]
    run_by_us: tuple[str, ...]

    def extra_on(self, kind: str) -> str:
        """The extra to install for a kind of device: ONNX Runtime has a separate package for CUDA."""
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
    """One line of the rule by which ``auto`` chooses.

    Attributes:
        engine: A name in :data:`ENGINES`.
        kind: The kind of device.
        gain: ``module:function``; the function takes (spec, options) and returns whether this line applies.
        when: The condition, in words.
        asked_only: Used only if this kind of device was requested.
    """

    engine: str
    kind: str
    gain: str | None = None
    when: str = ""
    asked_only: bool = False

    def __str__(self) -> str:
        when = "only if requested" if self.asked_only else self.when
        return f"{self.engine} on {self.kind}" + (f", {when}" if when else "")


#: ``auto`` chooses the first line whose engine runs the file, is installed, and works. If a device or an engine was
#: requested, only its lines count. They are in the order of speed, as far as we could measure it: OpenVINO is twice as
#: fast as ONNX Runtime on a CPU on which it computes in less than float32, and slower on others.
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
    # Never a fallback: if the lines above have failed, OpenVINO has already rejected the file. NVIDIA GPUs are used
    # unrequested although we may not have run on them: the gain is worth a try, and what does not load is skipped.
    Choice("openvino", "intel-gpu", asked_only=True),
)

#: Most threads, and streams, that are accepted: far above, the engines crash, hang, or take them for negative numbers.
MAX_THREADS: Final = 1024


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
    """Load a model in the engine that :data:`RULE` chooses.

    Args:
        artifact: The model to run.
        backend: A name in :data:`ENGINES`, or ``auto``.
        threads: CPU threads; None: as many as this process may use.
        device: ``cpu``, ``cuda``, ``cuda:N``, ``intel-gpu``, ``intel-gpu:N`` or ``auto``. A requested device that is
            not available is an error; another device is never used instead.
        streams: See :class:`EngineOptions`.
        exact: Compute in float32 where the graph says so, even if the engine has a faster precision.
        cuda_graph: See :class:`EngineOptions`.
        size: See :class:`EngineOptions`.
        tell: See :class:`EngineOptions`.
        warn: Called with the reason for each engine that is installed but was skipped because it does not work;
            :attr:`EngineInfo.notes` has the same reasons.

    Raises:
        UsageError: The number of threads or streams is out of range, or the engine was not built for ``size``.
        EngineMissing: The engine is not installed; the message says what to install.
        EngineError: There is no such engine or device, or it cannot load the model.
        ModelError: The file cannot be read, breaks the contract, or has changed since it was opened.
    """
    for name, value in (("threads", threads), ("streams", streams)):
        if value is not None and not (isinstance(value, int) and 1 <= value <= MAX_THREADS):
            raise UsageError(f"{name} is {value}; it must be a whole number, 1 to {MAX_THREADS}")
    wanted = None if device == "auto" else Device.parse(device)
    skipped: list[EngineError] = []
    handled = sys.exception()
    for choice in choices(artifact.format, backend, wanted, what=str(artifact.path)):
        notes = tuple(str(error) for error in skipped if not isinstance(error, EngineMissing))
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
                engine = _loaded(choice, artifact, options)
                for why in notes:
                    warn(why)
                return engine
        except EngineError as error:
            _clear_frames(error, handled)
            skipped.append(error)
    raise _failure(artifact, backend, wanted, skipped)


def _loaded(choice: Choice, artifact: Artifact, options: EngineOptions) -> Engine:
    """Load a model in an engine, which reads the files again, and check that they are still those that were opened.

    Raises:
        EngineError: The engine cannot load it.
        ModelError: The files have changed, so that neither their digests nor the receipt apply.
    """
    engine: Engine = _function(choice, ENGINES[choice.engine].loader)(artifact, options)
    try:
        artifact.check_unchanged()
    except ModelError:
        engine.close()
        raise
    return engine


def _clear_frames(error: BaseException, handled: BaseException | None) -> None:
    """Clear the frames of an error and of its causes: they hold the engine that failed, and with it GPU memory.

    The next engine may need that memory. The error is in a reference cycle with its frame, so that otherwise only the
    garbage collector would free it, at some later time.

    Args:
        error: Why an engine was skipped.
        handled: The exception that was being handled before; its frames belong to others and stay as they are.
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
    """The lines of the rule that apply to a file format, and to the engine and device that were requested.

    Args:
        form: The format, as in :attr:`petseg_runtime.artifact.Artifact.format`.
        backend: A name in :data:`ENGINES`, or ``auto``.
        wanted: The requested device; None: those that this machine has.
        what: The subject of error messages: a file, or a format.

    Raises:
        EngineError: No line applies; the message says what contradicts what.
    """
    if backend != "auto" and backend not in ENGINES:
        raise EngineError(f"unknown engine {backend!r}; choose one of: auto, {', '.join(ENGINES)}")
    able = [name for name, entry in ENGINES.items() if form in entry.formats]
    if backend != "auto" and backend not in able:
        raise EngineError(f"{what}: {backend} does not run {form} files; engines that do: {', '.join(able)}")
    lines = [line for line in RULE if line.engine in able and backend in ("auto", line.engine)]
    if wanted:
        fitting = [line for line in lines if line.kind == wanted.kind]
        if not fitting:
            raise EngineError(
                f"{what}: {', '.join(dict.fromkeys(line.engine for line in lines))} cannot run it on "
                f"{wanted}; supported: {'; '.join(map(str, lines))}"
            )
        return fitting
    lines = [line for line in lines if not line.asked_only]
    # If the driver does not start, engines that are installed for a GPU say so.
    there = [line for line in lines if line.kind != "cuda" or host.nvidia_gpus() or host.driver_trouble()]
    return there or lines  # without a GPU, engines that need one raise their own error


def _function(choice: Choice, where: str) -> Callable[..., Any]:
    """Import a function of an engine's module.

    Raises:
        EngineMissing: The engine's library is not installed.
        EngineError: The library is installed but cannot be imported.
    """
    entry = ENGINES[choice.engine]
    module, _, name = where.partition(":")
    try:
        function: Callable[..., Any] = getattr(importlib.import_module(module), name)
    except Exception as error:  # a shared library of another version, a missing package, anything an import may raise
        lacks = (error.name or "").partition(".")[0] if isinstance(error, ModuleNotFoundError) else ""
        if lacks == __name__.partition(".")[0]:
            raise
        if lacks == entry.module:
            raise EngineMissing(f"{choice.engine} is not installed: {install(entry.extra_on(choice.kind))}") from error
        raise EngineError(f"{choice.engine} is installed but cannot be imported ({one_line(error)})") from error
    return function


def _failure(artifact: Artifact, backend: str, wanted: Device | None, skipped: Sequence[EngineError]) -> EngineError:
    """Combine the errors of all engines that were tried into one."""
    if backend == "auto" and wanted and wanted.kind == "cuda" and not host.nvidia_gpus():
        # Without a GPU it does not matter what the engines lack.
        return EngineError(f"{wanted} is not available: {host.no_gpu()}, or use --device cpu")
    reasons = list(dict.fromkeys(map(str, skipped)))
    if len(reasons) == 1:
        return skipped[0]
    if not all(isinstance(error, EngineMissing) for error in skipped):
        return EngineError("; ".join(reasons))
    if backend == "auto" and not wanted:
        able = [entry for entry in ENGINES.values() if artifact.format in entry.formats]
        remedies = " or ".join(dict.fromkeys(install(entry.extra) for entry in able))
        return EngineMissing(f"no inference engine for {artifact.format} files is installed: {remedies}")
    return EngineMissing("; ".join(reasons))
