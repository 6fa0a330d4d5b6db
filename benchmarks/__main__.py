"""``python -m benchmarks NAME``."""

from __future__ import annotations

import click

from benchmarks.embedded.measure import embedded
from benchmarks.receipts import receipts
from benchmarks.report import report


@click.group()
def main() -> None:
    """What petseg measures of itself; records go to benchmarks/results."""


main.add_command(embedded)
main.add_command(receipts)
main.add_command(report)
main(prog_name="python -m benchmarks")
