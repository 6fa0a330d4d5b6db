"""Latency and throughput of every engine that works here, from the engine alone to the whole road of a photo.

Every engine's ``run`` takes and returns host memory, so a run that has returned is over, on a GPU too: no time here is
that of a launch alone. Before anything is timed it has been run. The engines take turns, round after round, so that
what else the machine does hits all of them alike; the spread of the rounds' medians says how much that was.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt

from petseg_runtime import doctor, images
from petseg_runtime.artifact import Artifact, sample_photos
from petseg_runtime.doctor import EngineCheck
from petseg_runtime.engines.base import Device, Engine, EngineInfo
from petseg_runtime.engines.registry import ENGINES, load_engine
from petseg_runtime.errors import EngineError
from petseg_runtime.host import Gpu, Host, host, usable_cpus

__all__ = ["ROUNDS", "STAGES", "Benchmark", "Row", "measure", "sample_batch"]

U8: TypeAlias = npt.NDArray[np.uint8]

ROUNDS: Final = 5
#: The road of a photo, in the words of `petseg infer --json` on videos. (On photos it has "read" for "decode" and
#: "convert", and "write" for "finish" and the encoding of the result.) "total" is measured over all of it.
STAGES: Final = ("decode", "convert", "infer", "finish", "total")

# How an engine's turn is divided.
_LATENCY, _THROUGHPUT, _PHOTOS = 0.45, 0.35, 0.2


@dataclass(frozen=True, kw_only=True)
class Row:
    """What was measured of one engine; times in milliseconds.

    Attributes:
        info: What ran.
        exact: Whether it was kept from computing float32 in anything less.
        load: From file to engine.
        first: The first run after that.
        latency: Of every run of a batch with all threads, one caller: a list per round.
        callers: Threads that called it at a time for the throughput.
        throughput: Photos a second, per round.
        stages: Of every sample photo in every pass, for each of :data:`STAGES`.
    """

    info: EngineInfo
    exact: bool
    load: float
    first: float
    callers: int = 1
    latency: list[list[float]] = field(default_factory=list)
    throughput: list[float] = field(default_factory=list)
    stages: dict[str, list[float]] = field(default_factory=lambda: {stage: [] for stage in STAGES})

    def summary(self) -> dict[str, Any]:
        """JSON values: percentiles over all runs, and the spread of the rounds' medians."""
        runs = [value for values in self.latency for value in values]
        medians = [float(np.median(values)) for values in self.latency]
        return {
            "latency_ms": {
                **{f"p{share}": float(np.percentile(runs, share)) for share in (50, 95, 99)},
                "runs": len(runs),
                "median_of_rounds": [min(medians), max(medians)],
            },
            "photos_per_second": {
                "median": float(np.median(self.throughput)),
                "range": [min(self.throughput), max(self.throughput)],
                "callers": self.callers,
            },
            "stages_p50_ms": {stage: float(np.median(values)) for stage, values in self.stages.items()},
        }

    def as_dict(self) -> dict[str, Any]:
        """JSON values: the summary, and the times that it was made of."""
        raw = {"latency_ms": self.latency, "photos_per_second": self.throughput, "stages_ms": self.stages}
        about = {"exact": self.exact, "load_ms": self.load, "first_run_ms": self.first}
        return {**dataclasses.asdict(self.info), **about, **self.summary(), "raw": raw}


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """What was measured, and on what.

    Attributes:
        rows: One per engine, device and precision.
        failed: Engines that could not be measured, each with the reason.
        host: The machine.
        gpus: NVIDIA's.
        threads: CPU threads that each engine had.
        batch: Photos a run.
        seconds: Of measuring, as asked for.
    """

    rows: tuple[Row, ...]
    failed: tuple[EngineCheck, ...]
    host: Host
    gpus: tuple[Gpu, ...]
    threads: int
    batch: int
    seconds: float


@dataclass
class _Runner:
    """An engine at work: ``alone`` for one caller with all threads, ``shared`` for as many callers as there are."""

    check: EngineCheck
    row: Row
    alone: Engine
    shared: Engine


def measure(
    artifact: Artifact,
    backends: Sequence[str] = (),
    device: str = "auto",
    *,
    threads: int | None = None,
    batch: int = 1,
    seconds: float = 15,
    cuda_graph: bool = True,
    watch: Callable[[str], None] = lambda what: None,
) -> Benchmark:
    """Measure every engine that works with a file.

    Each is first tried in a process of its own (see :func:`petseg_runtime.doctor.check_engine`), so that one that
    crashes, or whose masks are wrong, is a line in the result and not the end of it.

    Args:
        artifact: The file.
        backends: Engines; empty: all.
        device: As ``--device`` says it.
        threads: CPU threads; None: as many as this process may use.
        batch: Photos a run.
        seconds: Of measuring, in all; loading comes on top. Every measurement is taken at least once a round.
        cuda_graph: Let TensorRT launch the network as one CUDA graph.
        watch: Told what is about to be done.

    Raises:
        EngineError: There is no such engine or device.
    """
    threads = threads or usable_cpus()
    gpus, problem = doctor.read_gpus()
    failed: list[EngineCheck] = []
    runners: list[_Runner] = []
    with contextlib.ExitStack() as stack:
        load = functools.partial(_load, stack, artifact, threads=threads, batch=batch, cuda_graph=cuda_graph)
        for line in _lines(backends, device):
            watch(f"trying {line.trying}")
            which = "" if device == "auto" else device
            check = doctor.check_engine(line, gpus, which, artifact.path)
            if not check.works:
                failed.append(dataclasses.replace(check, why=check.why + (f" ({problem})" if problem else "")))
                continue
            try:
                runners.append(load(check, exact=False))
                if artifact.spec.precision == "fp32" and runners[-1].row.info.narrowed:
                    runners.append(load(check, exact=True))
            except EngineError as error:
                failed.append(dataclasses.replace(check, works=False, why=str(error)))
        rows = _rounds(artifact, runners, failed, batch, seconds, watch)
    return Benchmark(
        rows=rows, failed=tuple(failed), host=host(), gpus=gpus, threads=threads, batch=batch, seconds=seconds
    )


def _lines(backends: Sequence[str], device: str) -> list[doctor.RuleLine]:
    """The engines and kinds of device that are asked for.

    Raises:
        EngineError: There are none.
    """
    kind = None if device == "auto" else Device.parse(device).kind
    for name in backends:
        if name not in ENGINES:
            raise EngineError(f"there is no engine {name!r}; there are: {', '.join(ENGINES)}")
    rule, problem = doctor.read_rule()
    every = {(line.engine, line.device): line for line in rule}
    lines = [
        line
        for line in every.values()
        if (not backends or line.engine in backends) and (kind is None or line.device == kind)
    ]
    if not lines:
        raise EngineError(problem or f"{', '.join(backends)}: no such engine on {device}")
    return lines


def _load(
    stack: contextlib.ExitStack,
    artifact: Artifact,
    check: EngineCheck,
    *,
    threads: int,
    batch: int,
    exact: bool,
    cuda_graph: bool,
) -> _Runner:
    """An engine for one caller, and for many; ``stack`` closes both.

    Raises:
        EngineError: It cannot be loaded, or fails at its first run.
    """

    def load(streams: int) -> Engine:
        engine = load_engine(
            artifact,
            check.engine,
            threads,
            device=check.device,
            streams=streams,
            exact=exact,
            cuda_graph=cuda_graph,
        )
        stack.callback(_closed, engine)
        return engine

    start = time.perf_counter()
    alone = load(1)
    loaded = time.perf_counter()
    alone.run(_blank(artifact, batch))
    done = time.perf_counter()
    # On an NVIDIA GPU callers take turns: more of them gain nothing.
    shared = alone if check.device.startswith("cuda") else load(threads)
    row = Row(
        info=alone.describe(),
        exact=exact,
        load=1000 * (loaded - start),
        first=1000 * (done - loaded),
        callers=shared.describe().streams,
    )
    return _Runner(check, row, alone, shared)


def _closed(engine: Engine) -> None:
    """Close an engine; one whose GPU has failed cannot be, which must not cost the others their results."""
    with contextlib.suppress(EngineError):
        engine.close()


def _rounds(
    artifact: Artifact,
    runners: list[_Runner],
    failed: list[EngineCheck],
    batch: int,
    seconds: float,
    watch: Callable[[str], None],
) -> tuple[Row, ...]:
    """Let the engines take turns; one that fails leaves, with its reason, for ``failed``."""
    photos = sample_batch(artifact, batch)
    for number in range(ROUNDS if runners else 0):
        watch(f"round {number + 1} of {ROUNDS}: {len(runners)} engines")
        for runner in list(runners):
            turn = seconds / ROUNDS / len(runners)
            try:
                _warm(runner.alone, photos)
                runner.row.latency.append(_timed(functools.partial(runner.alone.run, photos), turn * _LATENCY))
                runner.row.throughput.append(
                    batch * _runs_per_second(runner.shared, photos, runner.row.callers, turn * _THROUGHPUT)
                )
                _time_stages(runner, turn * _PHOTOS)
            except EngineError as error:
                runners.remove(runner)
                failed.append(dataclasses.replace(runner.check, works=False, why=f"failed while timed: {error}"))
    return tuple(runner.row for runner in runners)


def sample_batch(artifact: Artifact, batch: int) -> U8:
    """Sample photos as the model takes them, repeated if need be: uint8 [batch, H, W, 3]."""
    spec, paths = artifact.spec, sample_photos()
    ready = [images.to_model(images.read(path).pixels, spec.height, spec.width) for path in paths[:batch]]
    return np.stack([ready[index % len(ready)] for index in range(batch)])


def _blank(artifact: Artifact, batch: int) -> U8:
    return np.zeros((batch, artifact.spec.height, artifact.spec.width, 3), np.uint8)


def _warm(engine: Engine, photos: U8) -> None:
    """Bring an engine's threads and caches back to it, after another engine's turn."""
    for _ in range(2):
        engine.run(photos)


def _timed(run: Callable[[], object], seconds: float) -> list[float]:
    """Milliseconds of each run, for so long; at least one."""
    times = []
    end = time.perf_counter() + seconds
    while True:
        start = time.perf_counter()
        run()
        stop = time.perf_counter()
        times.append(1000 * (stop - start))
        if stop >= end:
            return times


def _runs_per_second(engine: Engine, photos: U8, callers: int, seconds: float) -> float:
    """Runs a second of all callers together, each in a thread of its own.

    Raises:
        EngineError: A run failed.
    """
    stop = threading.Event()

    def call() -> float:
        engine.run(photos)  # a thread's first run makes what is the thread's own
        count, start = 0, time.perf_counter()
        while True:
            engine.run(photos)
            count += 1
            taken = time.perf_counter() - start
            if taken >= seconds or stop.is_set():
                return count / taken

    with ThreadPoolExecutor(callers) as pool:
        try:
            return sum(future.result() for future in [pool.submit(call) for _ in range(callers)])
        finally:
            stop.set()  # after Ctrl-C, or the failure of one, the others end with their run


def _time_stages(runner: _Runner, seconds: float) -> None:
    """Take all sample photos the whole way, pass after pass, for so long; at least once."""
    spec, end = runner.alone.spec, time.perf_counter() + seconds
    while True:
        for path in sample_photos():
            times = [time.perf_counter()]
            photo = images.read(path)
            times.append(time.perf_counter())
            sent = images.to_model(photo.pixels, spec.height, spec.width)
            times.append(time.perf_counter())
            probability = runner.alone.run(sent[None])[0]
            times.append(time.perf_counter())
            images.from_model(probability, *photo.pixels.shape[:2])
            times.append(time.perf_counter())
            taken = [*np.diff(times), times[-1] - times[0]]
            for stage, value in zip(STAGES, taken, strict=True):
                runner.row.stages[stage].append(1000 * float(value))
        if time.perf_counter() >= end:
            return
