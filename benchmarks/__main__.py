"""``python -m benchmarks NAME``."""

from __future__ import annotations

import click

from benchmarks.accuracy import accuracy
from benchmarks.budget import budget
from benchmarks.compare import compare
from benchmarks.embedded.measure import embedded
from benchmarks.flicker import flicker
from benchmarks.found import found
from benchmarks.gpu_check import gpu_check
from benchmarks.large import large
from benchmarks.latency import latency
from benchmarks.peers.pipeline import peers
from benchmarks.pet_free import pet_free
from benchmarks.receipts import receipts
from benchmarks.records import checkout
from benchmarks.reduced import reduced
from benchmarks.report import report
from benchmarks.rival import rival
from benchmarks.scaling import scaling
from benchmarks.soak import soak
from benchmarks.throughput import throughput
from benchmarks.training import training
from benchmarks.video import video
from benchmarks.video_road import video_road


@click.group()
def main() -> None:
    """What petseg measures of itself; records go to benchmarks/results."""


checkout()  # of the code that runs, before others commit more
main.add_command(accuracy)
main.add_command(budget)
main.add_command(compare)
main.add_command(embedded)
main.add_command(flicker)
main.add_command(found)
main.add_command(gpu_check)
main.add_command(large)
main.add_command(latency)
main.add_command(peers)
main.add_command(pet_free)
main.add_command(receipts)
main.add_command(reduced)
main.add_command(report)
main.add_command(rival)
main.add_command(scaling)
main.add_command(soak)
main.add_command(throughput)
main.add_command(training)
main.add_command(video)
main.add_command(video_road)
main(prog_name="python -m benchmarks")
