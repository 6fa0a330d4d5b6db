"""``petseg benchmark``: measures the speed of all engines that work here, or of one under sustained load."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from petseg_runtime.cli.text import BACKEND, HELP, MINUTES, PATH, SCHEMA_VERSION, SECONDS
from petseg_runtime.errors import EngineError
from petseg_runtime.text import aligned, shown

if TYPE_CHECKING:
    from petseg_runtime.artifact import Artifact
    from petseg_runtime.benchmark import Benchmark, Row
    from petseg_runtime.host import Gpu, Host
    from petseg_runtime.sustained import Sustained

__all__ = ["benchmark"]

_METHOD = (
    "each run takes and returns host memory, so its time is that of the whole run, on a GPU too; engines take turns in "
    "rounds and are warmed up before they are timed; percentiles are over all runs; ranges are over the rounds' medians"
)
_SUSTAINED_METHOD = (
    "all callers run without pause; the rate of an interval is that of the runs in it, and a run that spans several "
    "intervals counts in each by its share; temperatures and frequencies are the kernel's at the end of the interval"
)


@click.command()
@click.argument("model", type=PATH, required=False)
@click.option(
    "--backend",
    "backends",
    type=BACKEND,
    multiple=True,
    metavar="NAME",
    help=f"{HELP['backend']} May be repeated; auto is for --sustained only.  [default: all]",
)
@click.option("--device", default="auto", show_default=True, help=HELP["device"])
@click.option("--threads", type=click.IntRange(min=1), help=HELP["threads"])
@click.option("--batch", type=click.IntRange(min=1), default=1, show_default=True, help="Photos per run.")
@click.option("--seconds", type=SECONDS, help="Total measuring time, without loading.  [default: 15]")
@click.option(
    "--sustained",
    type=MINUTES,
    metavar="MINUTES",
    help="Run one engine at full load for this many minutes, and print its rate in each tenth of that time.",
)
@click.option("--no-cuda-graph", is_flag=True, help="Run TensorRT without CUDA graphs, to see what they gain.")
@click.option("--json", "as_json", is_flag=True, help="Print the result, with every time measured, as one JSON object.")
@click.option("-q", "--quiet", is_flag=True, help="Print no progress.")
def benchmark(
    model: Path | None,
    backends: tuple[str, ...],
    device: str,
    threads: int | None,
    batch: int,
    seconds: float | None,
    sustained: float | None,
    no_cuda_graph: bool,
    as_json: bool,
    quiet: bool,
) -> int:
    """Measure the speed of MODEL (default: the built-in model) in every engine that works on this machine.

    Latency: one caller with all threads. Throughput: as many callers as threads. Stages: the sample photos from file to
    mask: decode, convert (to the model's size), infer, finish (low-confidence regions are dropped, the rest is resized
    to the photo's size, and the mask made). Engines take turns in rounds; the range of the rounds' medians shows how
    steady the machine is. An engine that computes a float32 model in a lower precision by default (bf16, TF32) is
    measured twice, the second time with float32 forced. Engines that cannot run the model are listed with the reason.
    Exit codes: 0 if something was measured, 5 if nothing was.

    With --sustained, find out whether the machine slows down under load: run the engine that `auto` chooses, or the one
    given with --backend, with as many callers as threads. Ctrl-C stops it and prints what was measured so far.
    """
    from petseg_runtime.artifact import default_model, open_artifact

    def tell(what: str) -> None:
        if not quiet:
            click.echo(f"petseg: {shown(what)}", err=True)

    if sustained is not None and (seconds is not None or len(backends) > 1):
        raise click.UsageError("--sustained is for one engine and sets the time: give one --backend and no --seconds")
    if sustained is None and "auto" in backends:
        raise click.UsageError(
            "--backend auto is for --sustained; leave it out to measure every engine that works here"
        )
    options = _Options(
        artifact=open_artifact(model or default_model()),
        device=device,
        threads=threads,
        batch=batch,
        cuda_graph=not no_cuda_graph,
        as_json=as_json,
        tell=tell,
    )
    if sustained is not None:
        return _sustain(options, next(iter(backends), "auto"), 60 * sustained)
    return _measure(options, backends, 15 if seconds is None else seconds)


@dataclass(frozen=True, kw_only=True)
class _Options:
    """What to measure and how to print it, from the command's options."""

    artifact: Artifact
    device: str
    threads: int | None
    batch: int
    cuda_graph: bool
    as_json: bool
    tell: Callable[[str], None]


def _measure(options: _Options, backends: tuple[str, ...], seconds: float) -> int:
    """Measure all engines in turns and print the result; returns the exit code."""
    from petseg_runtime.benchmark import measure

    done = measure(
        options.artifact,
        backends,
        options.device,
        threads=options.threads,
        batch=options.batch,
        seconds=seconds,
        cuda_graph=options.cuda_graph,
        watch=options.tell,
    )
    _print(_record(options.artifact, done) if options.as_json else _text(options.artifact, done))
    return 0 if done.rows else EngineError.exit_code


def _sustain(options: _Options, backend: str, seconds: float) -> int:
    """Keep one engine at full load, and print what was measured even if it is interrupted; returns the exit code."""
    from petseg_runtime import doctor, host
    from petseg_runtime.benchmark import sample_batch
    from petseg_runtime.engines.registry import load_engine
    from petseg_runtime.host import usable_cpus
    from petseg_runtime.sustained import INTERVALS, Sustained, sustain

    artifact, threads = options.artifact, options.threads or usable_cpus()
    with load_engine(
        artifact,
        backend,
        threads,
        device=options.device,
        streams=threads,
        cuda_graph=options.cuda_graph,
        tell=options.tell,
        warn=lambda why: options.tell(f"skipped: {why}"),
    ) as engine:
        done = Sustained(
            info=engine.describe(), batch=options.batch, seconds=seconds, host=host.host(), gpus=doctor.read_gpus()[0]
        )
        try:
            with contextlib.closing(sustain(engine, sample_batch(artifact, options.batch), seconds)) as intervals:
                for number, interval in enumerate(intervals, 1):
                    done.intervals.append(interval)
                    options.tell(f"interval {number} of {INTERVALS}: {interval.summary}")
        finally:
            if done.intervals:
                _print(_sustained_record(artifact, done) if options.as_json else _sustained_text(artifact, done))
    return 0


def _print(result: dict[str, Any] | Iterable[str]) -> None:
    """Print a record as JSON, or lines of text."""
    if isinstance(result, dict):
        click.echo(json.dumps(_rounded(result), indent=1))
    else:
        click.echo("\n".join(map(shown, result)))


def _record(artifact: Artifact, done: Benchmark) -> dict[str, Any]:
    return {
        **_about(artifact, _METHOD),
        "threads": done.threads,
        "batch": done.batch,
        "seconds": done.seconds,
        "host": dataclasses.asdict(done.host),
        "gpus": [dataclasses.asdict(gpu) for gpu in done.gpus],
        "rows": [row.as_dict() for row in done.rows],
        "failed": [{"engine": check.engine, "device": check.device, "why": check.why} for check in done.failed],
    }


def _sustained_record(artifact: Artifact, done: Sustained) -> dict[str, Any]:
    return {**_about(artifact, _SUSTAINED_METHOD), **done.as_dict()}


def _about(artifact: Artifact, method: str) -> dict[str, Any]:
    """The fields that all records begin with."""
    return {
        "schema_version": SCHEMA_VERSION,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "method": method,
        "model": {
            "file": artifact.path.name,
            "identity": artifact.identity,
            "format": artifact.format,
            "spec": dataclasses.asdict(artifact.spec),
        },
    }


def _rounded(value: Any) -> Any:
    """Rounds floats to 4 decimals; for milliseconds, anything below 0.1 µs is noise."""
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(item) for item in value]
    return round(value, 4) if isinstance(value, float) else value


def _text(artifact: Artifact, done: Benchmark) -> Iterable[str]:
    yield from _head(artifact, done.batch, done.host, done.threads, done.gpus)
    if done.rows:
        yield ""
        for title, header, cells in _tables(done):
            yield title
            heads = ("engine", "computes", *header)
            yield from aligned([heads, *((*_title(row), *cells(row)) for row in done.rows)], words=2)
            yield ""
    for check in done.failed:
        yield f"not measured: {check.engine} on {check.device}: {check.why}"


def _tables(done: Benchmark) -> Iterable[tuple[str, tuple[str, ...], Callable[[Row], Iterable[str]]]]:
    """Yields each table's title, its columns after the engine's, and the function that makes an engine's cells."""
    from petseg_runtime.benchmark import ROUNDS, STAGES

    spread = f"range of {ROUNDS} rounds"
    batch = f"batch of {done.batch}" if done.batch > 1 else "photo"
    latency = ("median", "p95", "p99", spread, "runs")
    yield f"Latency: milliseconds per {batch}, one at a time with all threads", latency, _latency
    yield "Throughput: photos per second with several concurrent callers", ("median", spread, "callers"), _throughput
    yield "Start: milliseconds for loading and for the first run", ("load", "first run"), _start
    yield "Stages: median milliseconds per photo, from file to mask", STAGES, _stages


def _sustained_text(artifact: Artifact, done: Sustained) -> Iterable[str]:
    info, first = done.info, done.intervals[0].photos_per_second
    yield from _head(artifact, done.batch, done.host, info.threads, done.gpus)
    yield f"{info.name} {info.version} on {info.device}, {info.precision}, {info.streams} callers without pause"
    yield ""
    rows = [
        (
            f"{interval.start:.0f} to {interval.end:.0f}",
            f"{interval.photos_per_second:.1f}",
            f"{100 * interval.photos_per_second / first:.0f} %" if first else "-",
            interval.state,
        )
        for interval in done.intervals
    ]
    yield from aligned([("seconds", "photos/s", "relative to first", ""), *rows], words=1)
    yield ""
    yield done.verdict


def _head(artifact: Artifact, batch: int, host: Host, threads: int, gpus: Iterable[Gpu]) -> Iterable[str]:
    """Yields the lines that describe the model and the machine."""
    spec = artifact.spec
    batches = f", batches of {batch}" if batch > 1 else ""
    yield f"{artifact.path.name}: {spec.name}, {spec.height} x {spec.width}, {spec.precision}{batches}"
    yield f"{host.cpu.name}, {threads} threads" + "".join(f", {gpu.name}" for gpu in gpus)


def _title(row: Row) -> tuple[str, str]:
    return f"{row.info.name} on {row.info.device}", row.info.precision + (", forced" if row.exact else "")


def _latency(row: Row) -> Iterable[str]:
    """Cells of the latency table; a p95 of ten runs or a p99 of fifty, about the slowest run, is shown as "-"."""
    latency = row.summary()["latency_ms"]
    for name, least in (("p50", 1), ("p95", 20), ("p99", 100)):
        yield f"{latency[name]:.2f}" if latency["runs"] >= least else "-"
    yield "{:.2f} to {:.2f}".format(*latency["median_of_rounds"])
    yield str(latency["runs"])


def _throughput(row: Row) -> Iterable[str]:
    photos = row.summary()["photos_per_second"]
    yield f"{photos['median']:.1f}"
    yield "{:.1f} to {:.1f}".format(*photos["range"])
    yield str(photos["callers"])


def _start(row: Row) -> Iterable[str]:
    yield f"{row.load:.0f}"
    yield f"{row.first:.1f}"


def _stages(row: Row) -> Iterable[str]:
    return (f"{value:.2f}" for value in row.summary()["stages_p50_ms"].values())
