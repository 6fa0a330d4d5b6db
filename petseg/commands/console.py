"""What the commands share: a progress line, and a look at the output before hours of work."""

from __future__ import annotations

import os
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from petseg_runtime.errors import OutputError

__all__ = ["check_writable", "progress_line"]


def progress_line(quiet: bool) -> Progress:
    """A progress line on stderr; silent where stderr is not a terminal."""
    console = Console(stderr=True)
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[detail]}"),
        console=console,
        disable=quiet or not console.is_terminal,
    )


def check_writable(*folders: Path | None) -> None:
    """Raises OutputError where a folder, or the nearest one above it that is there, is no folder or not ours."""
    for folder in filter(None, folders):
        there = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
        if not there.is_dir():
            raise OutputError(f"{folder}: cannot be written to ({there} is not a folder)")
        if not os.access(there, os.W_OK | os.X_OK):
            raise OutputError(f"{folder}: cannot be written to ({there}: permission denied)")
