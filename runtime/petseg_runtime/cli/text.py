"""What the commands share: types and texts of options, and progress where people watch."""

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

#: Of everything that is printed as JSON.
SCHEMA_VERSION: Final = 1

#: What the options that several commands have in common say of themselves.
HELP: Final = {
    "backend": "The engine: onnxruntime (ort), openvino (ov), tensorrt (trt), tensorrt-rtx (rtx).",
    "device": "cpu, cuda[:N], intel-gpu[:N]; no other device stands in.",
    "threads": "CPU threads.  [default: all]",
    "json": "Everything, as one JSON object.",
    "quiet": "Only errors.",
}

#: What engines are called for short.
_SHORT: Final = {
    "ort": "onnxruntime",
    "ov": "openvino",
    "trt": "tensorrt",
    "rtx": "tensorrt-rtx",
    "trt-rtx": "tensorrt-rtx",
}

_EMPTY: Final = "it is empty; is a variable not set?"


class _Path(click.Path):
    """A path that is not empty: a shell variable that is not set would else mean the current folder."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """As click does; what is empty is wrong usage."""
        if not os.fspath(value):
            self.fail(_EMPTY, param, ctx)
        return super().convert(value, param, ctx)


class _Name(click.types.StringParamType):
    """The same for what may be more than a path: a URL, a camera's number, a colour."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """As click does; what is empty is wrong usage."""
        if not value:
            self.fail(_EMPTY, param, ctx)
        return super().convert(value, param, ctx)


class _Backend(_Name):
    """An engine by its name, or by what people and export formats call it for short."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """As click does; a name that there is not is refused by who loads the engine, and knows them."""
        name = super().convert(value, param, ctx)
        return _SHORT.get(name, name)


class Finite(click.FloatRange):
    """A number within bounds, which NaN and infinity, where there is no upper one, are not."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """As click does; what is not finite is wrong usage."""
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


def parse_size(text: str) -> tuple[int, int]:
    """``192`` or ``192x256`` to (height, width).

    Raises:
        click.BadParameter: Neither form.
    """
    parts = text.lower().split("x")
    if len(parts) not in (1, 2) or not all(part.isdecimal() for part in parts):
        raise click.BadParameter(f"{text!r}: HEIGHTxWIDTH is expected, for example 192x256", param_hint="--size")
    return int(parts[0]), int(parts[-1])


def watched() -> bool:
    """Whether people see standard error, which may be closed (``2>&-``): then there is none."""
    return sys.stderr is not None and sys.stderr.isatty()


def bar(*columns: ProgressColumn) -> Progress:
    """A bar on standard error, which leaves nothing behind; without columns, with the usual ones.

    What is printed meanwhile goes its own way: rich would redirect it, and click writes a part of it past that.
    """
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    return Progress(*columns, console=console, transient=True, redirect_stdout=False, redirect_stderr=False)
