"""Measure latency and throughput of every engine that works on this machine, alone and with pre- and postprocessing.

Every engine's ``run`` takes and returns host memory, so that a run that has returned is finished, on a GPU, too: no
measured time is that of an asynchronous launch alone. Everything is warmed up before it is timed. The engines take
turns, round after round, so that other load on the machine affects all of them alike; the spread of the rounds' medians
shows how large that effect was.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
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
from petseg_runtime.host import LOOK_UP, Gpu, Host, host, usable_cpus
from petseg_runtime.regions import without_doubtful
from petseg_runtime.segmenter import Prepared, finish
from petseg_runtime.signals import let_through
from petseg_runtime.text import counted

__all__ = ["ROUNDS", "STAGES", "Benchmark", "Row", "measure", "sample_batch"]

U8: TypeAlias = npt.NDArray[np.uint8]

ROUNDS: Final = 5
#: The stages of a photo, named as in `petseg infer --json` for videos. (For photos, "read" there is "decode" plus
#: "convert", and "write" is "finish" plus the encoding of the result.) "total" is measured over all of them.
STAGES: Final = ("decode", "convert", "infer", "finish", "total")

# The shares of an engine's turn.
_LATENCY, _THROUGHPUT, _PHOTOS = 0.45, 0.35, 0.2


@dataclass(frozen=True, kw_only=True)
class Row:
    """The measurements of one engine; times are in milliseconds.

    Attributes:
        info: The description of the engine.
        exact: Whether it was loaded with ``exact``, to compute float32 in float32.
        load: Time to load the file.
        first: Time of the first run after loading.
        latency: Time of every run of a batch with all threads and one caller: a list per round.
        callers: Concurrent callers in the measurement of throughput.
        throughput: Photos per second, per round.
        stages: Times of every sample photo in every pass, for each of :data:`STAGES`.
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
        """Return JSON values: percentiles over all runs, and the spread of the rounds' medians."""
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
        """Return JSON values: the summary, and the times from which it was computed."""
        raw = {"latency_ms": self.latency, "photos_per_second": self.throughput, "stages_ms": self.stages}
        about = {"exact": self.exact, "load_ms": self.load, "first_run_ms": self.first}
        return {**dataclasses.asdict(self.info), **about, **self.summary(), "raw": raw}


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """The results of a benchmark.

    Attributes:
        rows: One per engine, device and precision.
        failed: Engines that could not be measured, each with the reason.
        host: The machine.
        gpus: Its NVIDIA GPUs.
        threads: CPU threads of each engine.
        batch: Photos per run.
        seconds: The requested duration of the measurements.
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
    """A loaded engine: ``alone`` for one caller with all threads, ``shared`` for concurrent callers."""

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

    Each engine is first tried in a separate process (see :func:`petseg_runtime.doctor.check_engine`), so that one that
    crashes, or whose masks are wrong, becomes a line in the results instead of ending the benchmark.

    Args:
        artifact: The file.
        backends: The engines to measure; empty: all.
        device: A device, as in ``--device``.
        threads: CPU threads; None: as many as this process may use.
        batch: Photos per run.
        seconds: Total duration of the measurements, without loading. Each measurement is made at least once per round.
        cuda_graph: Whether TensorRT launches the network as one CUDA graph.
        watch: Called with the name of each step before it starts.

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
            if not doctor.not_tried(line, gpus):
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
    """The requested engines and kinds of device.

    Raises:
        EngineError: There are none.
    """
    kind = None if device == "auto" else Device.parse(device).kind
    for name in backends:
        if name not in ENGINES:
            raise EngineError(f"unknown engine {name!r}; choose one of: {', '.join(ENGINES)}")
    rule, problem = doctor.read_rule()
    every = {(line.engine, line.device): line for line in rule}
    lines = [
        line
        for line in every.values()
        if (not backends or line.engine in backends) and (kind is None or line.device == kind)
    ]
    if not lines:
        raise EngineError(problem or f"{', '.join(backends) or 'no engine'}: not available on {device}")
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
    """Load an engine for one caller, and for concurrent callers; ``stack`` closes both.

    Raises:
        EngineError: The engine cannot be loaded, or fails in its first run.
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
        stack.callback(_close, engine)
        return engine

    start = time.perf_counter()
    alone = load(1)
    loaded = time.perf_counter()
    alone.run(_blank(artifact, batch))
    done = time.perf_counter()
    # On an NVIDIA GPU callers take turns, so that more of them gain nothing.
    shared = alone if check.device.startswith("cuda") else load(threads)
    row = Row(
        info=alone.describe(),
        exact=exact,
        load=1000 * (loaded - start),
        first=1000 * (done - loaded),
        callers=shared.describe().streams,
    )
    return _Runner(check, row, alone, shared)


def _close(engine: Engine) -> None:
    """Close an engine; if that fails because its GPU has failed, the other engines' results must not be lost."""
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
    """Measure the engines in turn; an engine that fails is moved to ``failed``, with the reason."""
    photos = sample_batch(artifact, batch)
    for number in range(ROUNDS if runners else 0):
        watch(f"round {number + 1} of {ROUNDS}: {counted(len(runners), 'engine')}")
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
                failed.append(
                    dataclasses.replace(runner.check, works=False, why=f"failed while it was measured: {error}")
                )
    return tuple(runner.row for runner in runners)


def sample_batch(artifact: Artifact, batch: int) -> U8:
    """Preprocessed sample photos, repeated if necessary: uint8 [batch, H, W, 3]."""
    spec, paths = artifact.spec, sample_photos()
    ready = [images.to_model(images.read(path).pixels, spec.height, spec.width) for path in paths[:batch]]
    return np.stack([ready[index % len(ready)] for index in range(batch)])


def _blank(artifact: Artifact, batch: int) -> U8:
    return np.zeros((batch, artifact.spec.height, artifact.spec.width, 3), np.uint8)


def _warm(engine: Engine, photos: U8) -> None:
    """Warm up an engine after another engine's turn, so that its threads run and its data is in the CPU caches."""
    for _ in range(2):
        engine.run(photos)


def _timed(run: Callable[[], object], seconds: float) -> list[float]:
    """Run for that many seconds, at least once; returns the milliseconds of each run."""
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
    """Total runs per second of all callers, each in its own thread.

    Raises:
        EngineError: A run failed.
    """
    stop = threading.Event()

    def call() -> float:
        engine.run(photos)  # a thread's first run creates per-thread resources
        count, start = 0, time.perf_counter()
        while True:
            engine.run(photos)
            count += 1
            taken = time.perf_counter() - start
            if taken >= seconds or stop.is_set():
                return count / taken

    with ThreadPoolExecutor(callers) as pool:
        try:
            running = [pool.submit(call) for _ in range(callers)]
            for future in running:
                while not wait([future], LOOK_UP).done:
                    let_through()
            return sum(future.result() for future in running)
        finally:
            stop.set()  # after Ctrl-C or a failure, the other callers stop after their current run


def _time_stages(runner: _Runner, seconds: float) -> None:
    """Time the stages of all sample photos, pass after pass, for that many seconds; at least once."""
    spec, end = runner.alone.spec, time.perf_counter() + seconds
    while True:
        for path in sample_photos():
            times = [time.perf_counter()]
            photo = images.read(path)
            times.append(time.perf_counter())
            sent = images.to_model(photo.pixels, spec.height, spec.width)
            prepared = Prepared(sent, photo.pixels, photo.height, photo.width, photo.notes)
            times.append(time.perf_counter())
            probability = runner.alone.run(sent[None])[0]
            times.append(time.perf_counter())
            result = finish(prepared, without_doubtful(probability), spec.threshold, spec.cutout_threshold)
            result.mask  # noqa: B018 (computed when it is first asked for)
            times.append(time.perf_counter())
            taken = [*np.diff(times), times[-1] - times[0]]
            for stage, value in zip(STAGES, taken, strict=True):
                runner.row.stages[stage].append(1000 * float(value))
        if time.perf_counter() >= end:
            return
