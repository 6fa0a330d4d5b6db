"""Whole Python processes, and how long they took."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks import records


def seconds_of(arguments: Sequence[str | Path], python: str | Path = sys.executable) -> float:
    """Wall seconds of a process, start and all.

    Raises:
        subprocess.CalledProcessError: It failed.
    """
    start = time.perf_counter()
    subprocess.run([python, *arguments], check=True, cwd=records.ROOT)
    return time.perf_counter() - start


def first_to_last(folder: Path, suffix: str) -> tuple[int, float]:
    """How many results a process has written below a folder, and the seconds from the first of them to the last.

    So that the start, of a length of its own, does not weigh on a rate. Only files with the suffix of results count:
    petseg's journal of a run is written beside them, and to its end.
    """
    written = [path.stat().st_mtime_ns for path in folder.rglob(f"*{suffix}")]
    return len(written), (max(written) - min(written)) / 1e9
