"""Record reference results of pre- and postprocessing, for ``petseg verify`` (``python -m benchmarks.embedded.road``).

Writes ``runtime/petseg_runtime/models/road.npz``: the results of reading, resizing and resizing back on this machine,
which must be one that computes them correctly. Run it again when the sample photos change or ``petseg_runtime.images``
changes on purpose; ``tests/runtime/test_road.py`` compares the record with the code.
"""

from __future__ import annotations

import click
import numpy as np
import numpy.typing as npt

from petseg_runtime.files import write_atomic
from petseg_runtime.road import RECORD, SIZE, record_road


def answer() -> npt.NDArray[np.uint8]:
    """uint8 [SIZE, SIZE]: a pet-like shape, off-centre and asymmetric, with a hole, and edges five pixels soft."""
    y, x = np.mgrid[:SIZE, :SIZE]

    def inside(top: int, left: int, height: int, width: int) -> npt.NDArray[np.float64]:
        """How far inside an ellipse each pixel is: 1 at its centre, 0 at its edge."""
        depth: npt.NDArray[np.float64] = 1 - np.hypot((y - top) / height, (x - left) / width)
        return depth

    body, head, gap = inside(36, 25, 19, 15), inside(17, 42, 10, 12), inside(38, 22, 6, 5)
    depth = np.minimum(np.maximum(body, 0.8 * head), -0.6 * gap)
    probability: npt.NDArray[np.uint8] = np.rint(255 / (1 + np.exp(-16 * depth))).astype(np.uint8)
    return probability


@click.command()
def main() -> None:
    """Write the reference results that `petseg verify` compares a device's with."""
    data = record_road(answer()).to_bytes()
    write_atomic(RECORD, data)
    click.echo(f"{RECORD}: {len(data)} bytes")


if __name__ == "__main__":
    main()
