"""Shared by the commands: a progress line, and a check that the output folder is writable, before hours of work."""

from __future__ import annotations

import os
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from petseg_runtime.errors import OutputError

__all__ = ["check_writable", "progress_line"]


def progress_line(quiet: bool) -> Progress:
    """Returns a progress line on stderr; it is disabled if stderr is not a terminal."""
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
    """Raises OutputError if a folder, or its nearest existing parent, is not a folder or not writable."""
    for folder in filter(None, folders):
        there = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
        if not there.is_dir():
            raise OutputError(f"{folder}: cannot be written to ({there} is not a folder)")
        if not os.access(there, os.W_OK | os.X_OK):
            raise OutputError(f"{folder}: cannot be written to ({there}: permission denied)")
