"""``python -m benchmarks NAME``."""

from __future__ import annotations

from typing import Final

import click

from benchmarks.records import checkout
from petseg.cli import LazyGroup

#: Strings, so that a command needs only its own imports: a machine may lack the packages of the others.
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
    """Benchmarks of petseg. Records go to benchmarks/results."""


if __name__ == "__main__":
    checkout()  # now, so that records name the commit that runs even if others commit meanwhile
    main(prog_name="python -m benchmarks")
