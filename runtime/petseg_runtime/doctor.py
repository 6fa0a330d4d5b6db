"""``petseg doctor``: finds out what this machine has, which engines work on it, and why the others do not.

Everything that may crash or hang (a driver, an engine, even numpy on a processor it was not built for) is tried in a
separate process, with a deadline; see :mod:`petseg_runtime.doctor_probe`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.metadata
import importlib.util
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from petseg_runtime.artifact import default_model
from petseg_runtime.cameras import Camera, cameras
from petseg_runtime.errors import OutputError
from petseg_runtime.extras import install
from petseg_runtime.host import JETSON_TENSORRT, ONNXRUNTIME_CUDA12, Gpu, Host, host, jetson, old_driver, versions

__all__ = [
    "EngineCheck",
    "Examination",
    "Ffmpeg",
    "RuleLine",
    "ask",
    "check_engine",
    "examine",
    "not_tried",
    "probe",
    "read_gpus",
    "read_rule",
]

# Seconds. TensorRT compiles a model when it loads it for the first time on a GPU: for minutes, on small boards many.
_DEADLINE: Final = 60.0
_DEADLINE_GPU: Final = 300.0
_DEADLINE_COMPILING: Final = 1800.0

#: The compute capabilities, from Ampere on, that NVIDIA lists for TensorRT for RTX.
_RTX_GPUS: Final = ("8.6", "8.9", "12.0", "12.1")

_SIGNALS: Final = {
    signal.SIGILL: "it uses instructions that this processor does not have: install another version or engine",
    signal.SIGKILL: "the system killed it, most likely because memory ran out",
}


@dataclass(frozen=True, kw_only=True)
class RuleLine:
    """One line of the rule by which ``auto`` chooses, and what it needs.

    Attributes:
        engine: Its name for ``--backend``.
        device: A type of device.
        text: The line as printed.
        module: The Python module that the engine requires.
        extra: The extra of petseg that installs it.
        run_by_us: Whether we have ever run that engine on that type of device.
        compiles: Whether it may compile for minutes when it loads a file for the first time.
    """

    engine: str
    device: str
    text: str
    module: str
    extra: str
    run_by_us: bool
    compiles: bool = False

    @property
    def trying(self) -> str:
        """What to print while it is being tried."""
        return f"{self.engine} on {self.device}{', which may compile for minutes' if self.compiles else ''}"


@dataclass(frozen=True, kw_only=True)
class EngineCheck:
    """The result of trying one engine on one type of device.

    Attributes:
        engine: Its name for ``--backend``.
        device: The device as requested: a type, or one device of it ("cuda:1").
        packages: Its installed packages, with versions; empty if there are none, or none that pip knows.
        works: It loaded the model, and its masks are right.
        why: Why it does not work, and what to do about it; "" if it works.
        run_by_us: Whether we have ever run it on that type of device.
        wrong: It ran, and its masks are wrong.
        version: Of the library, as reported by it; "" if the engine did not run, in which case all fields below are
            empty, too.
        provider: What the library calls the component that runs the model.
        precision: The type that it computes in.
        load_seconds: Time to load the model file.
        milliseconds: Median time of a run of one photo.
        photos: Photos that were compared with the checkpoint's outputs; 0 if the model has no parity record beside it.
        mean_mask_iou: Over these photos.
        notes: How it was loaded: compiled, or from the cache.
    """

    engine: str
    device: str
    packages: tuple[str, ...]
    works: bool
    why: str
    run_by_us: bool
    wrong: bool = False
    version: str = ""
    provider: str = ""
    precision: str = ""
    load_seconds: float | None = None
    milliseconds: float | None = None
    photos: int = 0
    mean_mask_iou: float | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Ffmpeg:
    """FFmpeg as it comes with PyAV.

    Attributes:
        pyav: Version of PyAV; "" if it cannot be used.
        libraries: Versions of FFmpeg's libraries.
        decoders: The decoders that matter, and whether they are available.
        encoders: The same for encoders.
        error: Why it cannot be used; "" if it can.
    """

    pyav: str = ""
    libraries: dict[str, str] = dataclasses.field(default_factory=dict)
    decoders: dict[str, bool] = dataclasses.field(default_factory=dict)
    encoders: dict[str, bool] = dataclasses.field(default_factory=dict)
    error: str = ""


@dataclass(frozen=True, kw_only=True)
class Examination:
    """Everything that ``petseg doctor`` finds out.

    Attributes:
        host: The machine and its Python.
        gpus: NVIDIA GPUs.
        openvino_devices: The devices that OpenVINO sees, by its names for them; an Intel GPU is "GPU".
        rule: How ``auto`` chooses: the first line that is installed and works.
        engines: Every engine on every type of device that it could use.
        auto: The engine that ``auto`` chooses here (:class:`petseg_runtime.engines.base.EngineInfo` as a dictionary),
            or ``error``.
        ffmpeg: The library that reads and writes video.
        cameras: The cameras that the system lists.
        heic: Version of the package that reads HEIC, the format of iPhone photos; "" if it is not installed.
        cache: The folder of compiled engines; "" if they are not kept.
        cache_bytes: Total size of its entries.
        problems: What should be fixed, each with the remedy.
    """

    host: Host
    gpus: tuple[Gpu, ...]
    openvino_devices: dict[str, str]
    rule: tuple[RuleLine, ...]
    engines: tuple[EngineCheck, ...]
    auto: dict[str, Any]
    ffmpeg: Ffmpeg
    cameras: tuple[Camera, ...]
    heic: str
    cache: str
    cache_bytes: int
    problems: tuple[str, ...]

    @property
    def works(self) -> bool:
        """Whether any engine works, and ``auto`` does not choose one whose masks are wrong."""
        return any(check.works for check in self.engines) and not _wrong(self.auto, self.engines)


def examine(watch: Callable[[str], None] = lambda what: None) -> Examination:
    """Examine this machine; takes a few seconds.

    Args:
        watch: Called with what is about to be tried.
    """
    watch("NVIDIA's driver")
    gpus, no_driver = read_gpus()
    rule, no_rule = read_rule()
    checks = []
    for line in {(line.engine, line.device): line for line in rule}.values():
        if not not_tried(line, gpus):
            watch(line.trying)
        checks.append(check_engine(line, gpus))
    devices = {}
    if _installed("openvino"):
        watch("the devices of OpenVINO")
        devices = probe("intel").get("devices", {})  # if this fails, so did the engine's check, which says why
    watch("what auto chooses")
    auto = probe("auto", deadline=_DEADLINE_COMPILING if gpus else _DEADLINE_GPU)
    auto = auto.get("info", auto)
    watch("FFmpeg")
    ffmpeg = Ffmpeg(**probe("ffmpeg"))
    cache, cache_bytes, no_cache = _cache()
    problems = (
        no_driver,
        no_rule,
        no_cache,
        *_problems(gpus, checks, ffmpeg),
        *_wrong(auto, checks),
    )
    return Examination(
        host=host(),
        gpus=gpus,
        openvino_devices=devices,
        rule=rule,
        engines=tuple(checks),
        auto=auto,
        ffmpeg=ffmpeg,
        cameras=cameras(),
        heic=versions(("pillow-heif",)).get("pillow-heif", ""),
        cache=cache,
        cache_bytes=cache_bytes,
        problems=tuple(filter(None, problems)),
    )


def read_gpus() -> tuple[tuple[Gpu, ...], str]:
    """Returns the NVIDIA GPUs, and why they cannot be listed ("" if they can)."""
    answer = probe("gpus")
    if "error" in answer:
        return (), f"NVIDIA's driver does not work: {answer['error']}; reinstall it"
    return tuple(Gpu(**gpu) for gpu in answer["gpus"]), answer["trouble"]


def read_rule() -> tuple[tuple[RuleLine, ...], str]:
    """Returns the rule by which ``auto`` chooses, and why it cannot be read ("" if it can): numpy does not work."""
    answer = probe("rule")
    lines = tuple(RuleLine(**line) for line in answer.get("rule", ()))
    return lines, f"no engine can be tried: {answer['error']}" if "error" in answer else ""


def not_tried(line: RuleLine, gpus: Sequence[Gpu]) -> str:
    """Why an engine is not tried at all: its GPU or its package is missing; "" if it is."""
    there = _installed(line.module)
    if line.device == "cuda" and not gpus:
        return f"not tried: no NVIDIA GPU was found{'' if there else ', and the engine is not installed'}"
    return "" if there else f"not installed: {install(line.extra)}"


def check_engine(line: RuleLine, gpus: Sequence[Gpu], device: str = "", model: Path | None = None) -> EngineCheck:
    """Load a model in one engine, and check whether its masks are right.

    Args:
        line: The engine and the type of device.
        gpus: The NVIDIA GPUs of this machine; without any, engines that need one are not tried.
        device: One device of that type ("cuda:1"); "": the first one.
        model: The file; None: the built-in model, which has a parity record.
    """
    check = EngineCheck(
        engine=line.engine,
        device=device or line.device,
        packages=tuple(f"{name} {version}" for name, version in versions(_packages_of(line.module)).items()),
        works=False,
        why="",
        run_by_us=line.run_by_us,
    )
    if why := not_tried(line, gpus):
        return dataclasses.replace(check, why=why)
    deadline, late = _DEADLINE if line.device == "cpu" else _DEADLINE_GPU, "it hangs"
    if line.compiles:
        asked = f"--backend {line.engine} --device {check.device}" + (f" --model {model}" if model else "")
        deadline = _DEADLINE_COMPILING
        late = f"it was still compiling, or hangs; `petseg infer PHOTO {asked}` compiles it once, without a time limit"
    file = os.fspath(model or default_model())
    answer = probe("engine", line.engine, check.device, file, deadline=deadline, late=late)
    if "error" in answer:
        return dataclasses.replace(check, why=answer["error"])
    info, parity = answer["info"], answer["parity"]
    failures = parity["failures"] if parity else []
    return dataclasses.replace(
        check,
        works=not failures,
        wrong=bool(failures),
        why=f"its masks are wrong: {'; '.join(failures)}" if failures else "",
        version=info["version"],
        provider=info["provider"],
        precision=info["precision"],
        load_seconds=answer["load_seconds"],
        milliseconds=answer["milliseconds"],
        photos=answer["photos"],
        mean_mask_iou=parity["mean_mask_iou"] if parity else None,
        notes=tuple(info["notes"]),
    )


def probe(question: str, *words: str, deadline: float = _DEADLINE, late: str = "it hangs") -> dict[str, Any]:
    """Ask one of :data:`petseg_runtime.doctor_probe.QUESTIONS` in a separate process; see :func:`ask`."""
    # -P: petseg itself does not import from the current folder (a numpy.py, say), so the probe must not either.
    return ask((sys.executable, "-P", "-m", "petseg_runtime.doctor_probe", question, *words), deadline, late)


def ask(command: Sequence[str], deadline: float, late: str = "it hangs") -> dict[str, Any]:
    """Run a program that prints a JSON object to stdout.

    Args:
        command: Program and arguments.
        deadline: Seconds after which it is killed, together with its child processes.
        late: What the error says in that case.

    Returns:
        The object; or ``error``: one line that says why there is none, or that the program crashed after printing it.
    """
    pipe, nothing = subprocess.PIPE, subprocess.DEVNULL
    with subprocess.Popen(  # noqa: S603 (runs only our own programs)
        command, stdin=nothing, stdout=pipe, stderr=pipe, text=True, errors="replace", start_new_session=True
    ) as process:
        try:
            out, said = process.communicate(timeout=deadline)
        except subprocess.TimeoutExpired:
            _end(process)
            return {"error": f"no answer within {deadline:g} s: {late}"}
        except BaseException:  # Ctrl-C, which does not reach a process in another session
            _end(process)
            raise
    last = next((f" ({' '.join(line.split())[:300]})" for line in reversed(said.splitlines()) if line.strip()), "")
    try:
        answer = json.loads(out)
    except ValueError:
        answer = None
    code = process.returncode
    if code < 0:
        return {"error": f"it crashed: {_signal(-code)}{last}"}
    if code or not isinstance(answer, dict):
        return {"error": f"it exited with code {code} and " + (f"no answer{last}" if answer is None else "an answer")}
    return answer


def _end(process: subprocess.Popen[str]) -> None:
    """Kill a program and its child processes, which could otherwise keep its pipes open."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _signal(number: int) -> str:
    name = signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
    return f"{name}, {_SIGNALS[signal.Signals(number)]}" if number in _SIGNALS else name


def _installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _packages_of(module: str) -> list[str]:
    """The installed packages that contain a module; if there are two, they have overwritten each other's files."""
    return sorted(set(_packages().get(module, ())))


@functools.cache
def _packages() -> Mapping[str, list[str]]:
    """The packages of every module that can be imported; cached because the search takes a tenth of a second."""
    return importlib.metadata.packages_distributions()


def _cache() -> tuple[str, int, str]:
    """The cache's folder ("": nothing is kept), the size of its entries in bytes, and what is wrong with it."""
    from petseg_runtime.cache import cache_folder, entries, no_folder

    folder = cache_folder()
    try:
        size, problem = sum(entry.size for entry in entries()), no_folder() and f"no cache: {no_folder()}"
    except OutputError as error:
        size, problem = 0, str(error)
    return "" if folder is None else str(folder), size, problem


def _wrong(auto: Mapping[str, Any], checks: Sequence[EngineCheck]) -> list[str]:
    """A problem if ``auto``, which only checks that an engine loads, chooses one whose masks are wrong."""
    taken = auto.get("name"), str(auto.get("device")).partition(":")[0]
    right = next((check for check in checks if check.works), None)
    remedy = f"give --backend {right.engine} --device {right.device}" if right else "install another version"
    return [
        f"auto chooses {check.engine} on {check.device}, and {check.why}: {remedy}"
        for check in checks
        if (check.engine, check.device.partition(":")[0]) == taken and check.wrong
    ]


def _gpu_engine(gpu: Gpu) -> str:
    """How to install an engine that uses an NVIDIA GPU."""
    if jetson():
        return JETSON_TENSORRT
    # The CPU package of ONNX Runtime has to be removed before that for GPUs is installed.
    away = "pip uninstall onnxruntime, then " if "onnxruntime" in _packages_of("onnxruntime") else ""
    rtx = f"{install('rtx')}, or " if gpu.compute_capability in _RTX_GPUS else ""
    return f"{rtx}{away}{install('gpu')}"


def _problems(gpus: Sequence[Gpu], checks: Sequence[EngineCheck], ffmpeg: Ffmpeg) -> list[str]:
    """What should be fixed, each with the remedy."""
    found = []
    if len(both := _packages_of("onnxruntime")) > 1:
        found.append(
            f"{' and '.join(both)} are both installed and overwrite each other's files: pip uninstall "
            f"{' '.join(both)}, then {install('gpu')} (NVIDIA GPU) or {install('cpu')}"
        )
    if gpus and not any(check.works for check in checks if check.device == "cuda"):
        remedy = old_driver(gpus[0].driver, ONNXRUNTIME_CUDA12) or _gpu_engine(gpus[0])
        found.append(f"there is an NVIDIA GPU, but no engine that uses it works: {remedy}")
    if checks and not any(check.works for check in checks):
        found.append(f"no engine works: {install('cpu')}")
    if ffmpeg.error:
        found.append(f"videos cannot be read or written: PyAV does not work ({ffmpeg.error}): pip install av")
    return found
