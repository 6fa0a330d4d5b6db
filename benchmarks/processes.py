"""Run Python as a separate process, and time it."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks import records


def seconds_of(arguments: Sequence[str | Path], python: str | Path = sys.executable) -> float:
    """Run a process and return its wall seconds, start-up included.

    Raises:
        subprocess.CalledProcessError: The process failed.
    """
    start = time.perf_counter()
    subprocess.run([python, *arguments], check=True, cwd=records.ROOT)
    return time.perf_counter() - start


def first_to_last(folder: Path, suffix: str) -> tuple[int, float]:
    """Return the number of results below a folder, and the seconds from the first to the last.

    This leaves start-up out of a rate. Only files with the suffix of results count: petseg writes its journal beside
    them until the end of a run.
    """
    written = [path.stat().st_mtime_ns for path in folder.rglob(f"*{suffix}")]
    return len(written), (max(written) - min(written)) / 1e9
