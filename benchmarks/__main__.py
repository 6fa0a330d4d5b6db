"""``python -m benchmarks NAME``."""

from __future__ import annotations

from typing import Final

import click

from benchmarks.records import checkout
from petseg.cli import LazyGroup

#: Named as strings, so that one needs only what it imports itself: a machine may lack what others do.
COMMANDS: Final = {
    "accuracy": "benchmarks.accuracy:accuracy",
    "budget": "benchmarks.budget:budget",
    "compare": "benchmarks.compare:compare",
    "embedded": "benchmarks.embedded.measure:embedded",
    "flicker": "benchmarks.flicker:flicker",
    "found": "benchmarks.found:found",
    "gpu-check": "benchmarks.gpu_check:gpu_check",
    "large": "benchmarks.large:large",
    "latency": "benchmarks.latency:latency",
    "peers": "benchmarks.peers.pipeline:peers",
    "pet-free": "benchmarks.pet_free:pet_free",
    "receipts": "benchmarks.receipts:receipts",
    "reduced": "benchmarks.reduced:reduced",
    "report": "benchmarks.report:report",
    "rival": "benchmarks.rival:rival",
    "scaling": "benchmarks.scaling:scaling",
    "shown": "benchmarks.shown:shown",
    "soak": "benchmarks.soak:soak",
    "throughput": "benchmarks.throughput:throughput",
    "training": "benchmarks.training:training",
    "video": "benchmarks.video:video",
    "video-road": "benchmarks.video_road:video_road",
}


@click.group(cls=LazyGroup, where=COMMANDS)
def main() -> None:
    """What petseg measures of itself; records go to benchmarks/results."""


if __name__ == "__main__":
    checkout()  # of the code that runs, before others commit more
    main(prog_name="python -m benchmarks")
