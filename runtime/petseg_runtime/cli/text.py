"""What the commands share: option types, help texts, and the progress bar."""

from __future__ import annotations

import math
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

if TYPE_CHECKING:
    from rich.progress import Progress, ProgressColumn

__all__ = [
    *("BACKEND", "HELP", "MINUTES", "NAME", "PATH", "SCHEMA_VERSION", "SECONDS", "SHARE", "UNIT"),
    *("Finite", "bar", "parse_size", "watched"),
]

#: Version of everything that is printed as JSON.
SCHEMA_VERSION: Final = 1

#: Help texts of options that several commands have.
HELP: Final = {
    "backend": "Inference engine: auto, onnxruntime (ort), openvino (ov), tensorrt (trt) or tensorrt-rtx (rtx).",
    "device": "auto, cpu, cuda[:N] or intel-gpu[:N]; a device given here is never replaced by another.",
    "threads": "Number of CPU threads.  [default: all]",
    "json": "Print everything as one JSON object.",
    "quiet": "Print errors only.",
}

#: Short names of engines.
_SHORT: Final = {
    "ort": "onnxruntime",
    "ov": "openvino",
    "trt": "tensorrt",
    "rtx": "tensorrt-rtx",
    "trt-rtx": "tensorrt-rtx",
}

_EMPTY: Final = "it is empty; is a variable not set?"


class _Path(click.Path):
    """A path that is not empty: otherwise, an unset shell variable would mean the current folder."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Convert as click does, but reject empty values."""
        if not os.fspath(value):
            self.fail(_EMPTY, param, ctx)
        return super().convert(value, param, ctx)


class _Name(click.types.StringParamType):
    """The same for values that need not be paths: a URL, the number of a camera, a colour."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Convert as click does, but reject empty values."""
        if not value:
            self.fail(_EMPTY, param, ctx)
        return super().convert(value, param, ctx)


class _Backend(_Name):
    """An engine by its name, or by the short name that people and export formats use."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Replace a short name by the full one; unknown names are rejected later, when the engine is loaded."""
        name = super().convert(value, param, ctx)
        return _SHORT.get(name, name)


class Finite(click.FloatRange):
    """A number within bounds that is neither NaN nor infinite, even without an upper bound."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Convert as click does, but reject NaN and infinity."""
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{number} is not a finite number.", param, ctx)
        return number


PATH: Final = _Path(path_type=Path)
NAME: Final = _Name()
BACKEND: Final = _Backend()
UNIT: Final = Finite(0, 1, min_open=True, max_open=True)
SHARE: Final = Finite(0, 1, max_open=True)
SECONDS: Final = Finite(0, min_open=True)
MINUTES: Final = SECONDS


def parse_size(text: str, option: str = "--size") -> tuple[int, int]:
    """Parses ``192`` or ``192x256`` into (height, width).

    Raises:
        click.BadParameter: The text has neither form.
    """
    parts = text.lower().split("x")
    # Python refuses to convert numbers of thousands of digits.
    if len(parts) not in (1, 2) or not all(part.isdecimal() and len(part) < 10 for part in parts):
        raise click.BadParameter(f"{text!r}: expected HEIGHTxWIDTH, for example 192x256", param_hint=option)
    return int(parts[0]), int(parts[-1])


def watched() -> bool:
    """Whether standard error is a terminal; it is None if it was closed (``2>&-``)."""
    return sys.stderr is not None and sys.stderr.isatty()


def bar(*columns: ProgressColumn) -> Progress:
    """Returns a progress bar on standard error that is erased at its end; without columns, with rich's default ones.

    Rich's redirection of standard output and error is off: click bypasses it for a part of what it prints.
    """
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    return Progress(*columns, console=console, transient=True, redirect_stdout=False, redirect_stderr=False)
