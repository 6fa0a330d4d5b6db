"""``petseg benchmark``: how fast every engine is that works here."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from petseg_runtime.cli.signals import terminable
from petseg_runtime.cli.text import PATH, SCHEMA_VERSION, SECONDS, shown
from petseg_runtime.errors import EngineError

if TYPE_CHECKING:
    from petseg_runtime.artifact import Artifact
    from petseg_runtime.benchmark import Benchmark, Row

__all__ = ["benchmark"]

_METHOD = (
    "run takes and returns host memory, so its time is that of the whole run, on a GPU too; engines take turns in "
    "rounds, each run before it is timed; percentiles are over all runs; ranges are those of the rounds' medians"
)


@click.command()
@click.argument("model", type=PATH, required=False)
@click.option(
    "--backend", "backends", multiple=True, metavar="NAME", help="An engine; may be repeated.  [default: all]"
)
@click.option("--device", default="auto", show_default=True, help="cpu, cuda, cuda:N, intel-gpu.")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads.  [default: all]")
@click.option("--batch", type=click.IntRange(min=1), default=1, show_default=True, help="Photos a run.")
@click.option(
    "--seconds",
    type=SECONDS,
    default=15,
    show_default=True,
    help="Of measuring, in all; loading comes on top.",
)
@click.option("--no-cuda-graph", is_flag=True, help="TensorRT without CUDA graphs, to see what they gain.")
@click.option("--json", "as_json", is_flag=True, help="Everything, every time too, as one JSON object.")
@click.option("-q", "--quiet", is_flag=True, help="No progress.")
@terminable()
def benchmark(
    model: Path | None,
    backends: tuple[str, ...],
    device: str,
    threads: int | None,
    batch: int,
    seconds: float,
    no_cuda_graph: bool,
    as_json: bool,
    quiet: bool,
) -> int:
    """Time MODEL (the one that ships, if none is named) in every engine that works here.

    Latency: one caller, all threads. Throughput: as many callers as threads. Stages: the sample photos, from file to
    mask. Engines that cannot run it are listed with the reason. Exit code 0: something was measured; 5: nothing.
    """
    from petseg_runtime.artifact import default_model, open_artifact
    from petseg_runtime.benchmark import measure

    artifact = open_artifact(model or default_model())
    done = measure(
        artifact,
        backends,
        device,
        threads=threads,
        batch=batch,
        seconds=seconds,
        cuda_graph=not no_cuda_graph,
        watch=lambda what: None if quiet else click.echo(f"petseg: {what}", err=True),
    )
    if as_json:
        click.echo(json.dumps(_rounded(_record(artifact, done)), indent=1))
    else:
        click.echo("\n".join(map(shown, _text(artifact, done))))
    return 0 if done.rows else EngineError.exit_code


def _record(artifact: Artifact, done: Benchmark) -> dict[str, Any]:
    return {
        "schema_version": SCHEMA_VERSION,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "method": _METHOD,
        "model": {
            "file": artifact.path.name,
            "identity": artifact.identity,
            "format": artifact.format,
            "spec": dataclasses.asdict(artifact.spec),
        },
        "threads": done.threads,
        "batch": done.batch,
        "seconds": done.seconds,
        "host": dataclasses.asdict(done.host),
        "gpus": [dataclasses.asdict(gpu) for gpu in done.gpus],
        "rows": [row.as_dict() for row in done.rows],
        "failed": [{"engine": check.engine, "device": check.device, "why": check.why} for check in done.failed],
    }


def _rounded(value: Any) -> Any:
    """Floats to a tenth of a microsecond, if milliseconds: what is finer is noise."""
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return round(value, 4) if isinstance(value, float) else value


def _text(artifact: Artifact, done: Benchmark) -> Iterable[str]:
    spec = artifact.spec
    batch = f", batches of {done.batch}" if done.batch > 1 else ""
    yield f"{artifact.path.name}: {spec.name}, {spec.height} x {spec.width}, {spec.precision}{batch}"
    yield f"{done.host.cpu.name}, {done.threads} threads" + "".join(f", {gpu.name}" for gpu in done.gpus)
    if done.rows:
        summaries = [row.summary() for row in done.rows]
        yield ""
        yield from _table(
            (
                *("engine", "computes", "load", "first", "p50", "p95", "p99 ms", "runs", "rounds"),
                *("photos/s", "rounds", "callers"),
            ),
            [_speed(row, summary) for row, summary in zip(done.rows, summaries, strict=True)],
        )
        yield ""
        stages = [[f"{value:.2f}" for value in summary["stages_p50_ms"].values()] for summary in summaries]
        yield from _table(
            ("one photo, p50 ms", "computes", *summaries[0]["stages_p50_ms"]),
            [(*_title(row), *values) for row, values in zip(done.rows, stages, strict=True)],
        )
        yield ""
    for check in done.failed:
        yield f"not measured: {check.engine} on {check.device}: {check.why}"


def _title(row: Row) -> tuple[str, str]:
    return f"{row.info.name} on {row.info.device}", row.info.precision + (", asked for" if row.exact else "")


def _speed(row: Row, summary: dict[str, Any]) -> tuple[str, ...]:
    """A line of the table; the 95th percentile of ten runs, or the 99th of fifty, is about the slowest of them."""
    latency, photos = summary["latency_ms"], summary["photos_per_second"]
    return (
        *_title(row),
        f"{row.load:.0f}",
        f"{row.first:.1f}",
        *(
            f"{latency[name]:.2f}" if latency["runs"] >= least else "-"
            for name, least in (("p50", 1), ("p95", 20), ("p99", 100))
        ),
        str(latency["runs"]),
        "{:.2f}-{:.2f}".format(*latency["median_of_rounds"]),
        f"{photos['median']:.1f}",
        "{:.1f}-{:.1f}".format(*photos["range"]),
        str(photos["callers"]),
    )


def _table(header: tuple[str, ...], lines: list[tuple[str, ...]]) -> Iterable[str]:
    """Columns as wide as their widest cell; words to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(header, *lines, strict=True)]
    for line in (header, *lines):
        cells = zip(line, widths, range(len(widths)), strict=True)
        yield "  ".join(cell.ljust(width) if index < 2 else cell.rjust(width) for cell, width, index in cells).rstrip()
