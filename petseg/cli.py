"""The ``petseg`` command: a table of subcommands, each imported only when it is used."""

from __future__ import annotations

import contextlib
import errno
import importlib
import io
import os
import signal
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import click

from petseg_runtime import __version__
from petseg_runtime.errors import EXIT_HUNG_UP, EXIT_INTERRUPTED, MissingExtra, OutputError, PetsegError, one_line
from petseg_runtime.signals import leave_terminal, silence, terminable
from petseg_runtime.text import shown

__all__ = ["COMMANDS", "LazyGroup", "main"]

#: Error numbers of a full disk, an exceeded quota and an exceeded size limit.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True)
class Command:
    """Where a subcommand is defined, its help text in the overview, and the extra that installs its packages."""

    where: str
    help: str
    extra: str | None = None


#: The locations are strings, so that `petseg --help` and `petseg infer` do not import the other commands.
COMMANDS = {
    "infer": Command("petseg_runtime.cli.infer:infer", "Segment photos, videos, cameras and streams."),
    "info": Command("petseg_runtime.cli.model:info", "Describe a model file: its format, input, origin and metrics."),
    "verify": Command("petseg_runtime.cli.model:verify", "Compare a model file with its checkpoint on this device."),
    "cache": Command("petseg_runtime.cli.cache:cache", "List or remove models compiled at first use."),
    "doctor": Command("petseg_runtime.cli.doctor:doctor", "Print what this machine has, and try every engine on it."),
    "benchmark": Command(
        "petseg_runtime.cli.benchmark:benchmark", "Measure the speed of every engine that works here."
    ),
    "train": Command("petseg.commands.train:train", "Train the attention U-Net.", "train"),
    "evaluate": Command("petseg.commands.evaluate:evaluate", "Measure a checkpoint or an exported file.", "train"),
    "data": Command("petseg.commands.data:data", "Download or check a data set.", "train"),
    "export": Command("petseg_export.cli:export", "Convert a checkpoint into a model file for devices.", "export"),
}


class LazyGroup(click.Group):
    """A group that knows the names of its subcommands, and imports one only when it is used."""

    def __init__(self, *args: Any, where: Mapping[str, str], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.where = where

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Returns the names in the order of ``where``."""
        return list(self.where)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Imports and returns the subcommand of that name; None if there is none."""
        if cmd_name not in self.where:
            return None
        module, _, name = self.where[cmd_name].partition(":")
        command = getattr(importlib.import_module(module), name)
        assert isinstance(command, click.Command)
        return command


class Petseg(LazyGroup):
    """The group of all :data:`COMMANDS`, whose overview imports none of them."""

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        try:
            return super().get_command(ctx, cmd_name)
        except ModuleNotFoundError as error:
            raise missing(cmd_name, error) from error

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, entry.help) for name, entry in COMMANDS.items()])


def missing(command: str, error: ModuleNotFoundError) -> MissingExtra:
    """Returns the error of a subcommand whose packages are not installed.

    Raises:
        ModuleNotFoundError: The module is not of these packages.
    """
    extra = COMMANDS[command].extra if command else None
    if extra is None or (error.name or "").partition(".")[0] in ("petseg", "petseg_export"):
        raise error
    from petseg_runtime.extras import install  # imports importlib.metadata, which would slow down every start

    return MissingExtra(f"`petseg {command}` needs {error.name}, which is not installed: {install(extra)}")


def unusable(error: ImportError) -> MissingExtra:
    """Returns the error of a package that is installed, but cannot be imported: it lacks a library, for example.

    Raises:
        ImportError: The error is in petseg itself.
    """
    if (error.name or "").partition(".")[0] in ("petseg", "petseg_export", "petseg_runtime"):
        raise error
    return MissingExtra(f"{error.path or error.name or 'a package'}: cannot be imported ({one_line(error)})")


@click.group(
    cls=Petseg,
    where={name: entry.where for name, entry in COMMANDS.items()},
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.version_option(__version__, prog_name="petseg")
def petseg() -> None:
    """Segment pets in photos and videos: train, export and run an attention U-Net.

    Exit codes: 0 success, 1 failure, 2 wrong usage, 3 some inputs failed, 4 bad model file, 5 engine or device not
    available, 6 output not writable, 7 extra not installed, 8 bad data set, 9 training failed, 10 parity
    test failed; 130, 143 and 129 stopped by Ctrl-C, SIGTERM and SIGHUP (the terminal is gone; ignored under nohup).
    """


def main(args: list[str] | None = None) -> None:
    """Run the command line and exit; an error raised on purpose is printed as one line and sets the exit code."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # outside `run`, Ctrl-C ends the process without a traceback
    fill_standard_descriptors()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a file name may have characters that the locale lacks
    for stream in filter(None, (sys.stdin, sys.stdout, sys.stderr)):
        os.set_blocking(stream.fileno(), True)  # another program may share them and have changed that
    try:
        sys.exit(run(sys.argv[1:] if args is None else args))
    except BaseException as end:
        discard_unwritten()
        if any(thread.daemon and thread.name.startswith("petseg-") for thread in threading.enumerate()):
            leave(end)
        raise


def fill_standard_descriptors() -> None:
    """Open the null device in place of standard streams that are closed (`2>&-`); for Python, they remain closed.

    Otherwise, the next files would get their descriptors, and what a C library prints, such as libtiff on a damaged
    photo, would be written into a result or the journal.
    """
    if None in (sys.stdin, sys.stdout, sys.stderr):
        while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
            os.set_inheritable(descriptor, True)
        os.close(descriptor)


def leave(end: BaseException) -> NoReturn:
    """Exit as this exception would, while a daemon thread still waits for a source, without finalizing Python.

    FFmpeg regularly calls back into Python from such a thread, to ask whether to stop waiting. A call after Python has
    been finalized, but before the process is gone, would crash.
    """
    if isinstance(end, SystemExit) and isinstance(end.code, int | None):
        code = end.code or 0
    else:
        code = EXIT_INTERRUPTED if isinstance(end, KeyboardInterrupt) else 1
        sys.excepthook(type(end), end, end.__traceback__)
        discard_unwritten()
    os._exit(code)


def discard_unwritten() -> None:
    """Flush standard output and standard error, and discard what they do not accept, after that was reported.

    At exit, Python would try again, print another error, and change the exit code to 120.
    """
    sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__  # click's wrappers of them fail if one was closed (`2>&-`)
    for stream in filter(None, (sys.stdout, sys.stderr)):
        try:
            stream.flush()
        except OSError:
            silence(stream.fileno())


def run(args: list[str]) -> int:
    """Run the command line; returns the exit code."""
    try:
        with terminable():
            result: Any = petseg.main(args=args, prog_name="petseg", standalone_mode=False)
        return result if isinstance(result, int) else 0
    except PetsegError as error:
        report(shown(error))
        return error.exit_code
    except ImportError as error:
        # From a command that does its heavy imports when it runs, not when it is imported.
        command = next((word for word in args if word in COMMANDS), "")
        problem = missing(command, error) if isinstance(error, ModuleNotFoundError) else unusable(error)
        report(shown(problem))
        return problem.exit_code
    except click.exceptions.Exit as error:
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        report("interrupted")
        return EXIT_INTERRUPTED
    except click.ClickException as error:
        with contextlib.suppress(OSError):  # as in `report`
            error.show()
        return error.exit_code
    except (OSError, RuntimeError, MemoryError) as error:
        return of_system(error)


def report(problem: str) -> None:
    """Print an error to stderr; if that cannot be written to, the exit code still says what happened."""
    with contextlib.suppress(OSError):
        click.echo(f"petseg: {problem}", err=True)


def of_limits(error: BaseException) -> str | None:
    """Which limit of this process was reached, and the remedy, if that is the error. None: it is not."""
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return "not enough memory"
    if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
        return "too many open files: raise the limit (ulimit -n)"
    no_process = isinstance(error, OSError) and error.errno == errno.EAGAIN and not hasattr(error, "characters_written")
    if no_process or str(error) == "can't start new thread":
        return "no more threads or processes can be started: raise the limit (ulimit -u, or the container's)"
    return None


def of_place(error: OSError) -> str | None:
    """Why no command can work here, if that is the error: every path may be the first to show it. None: it is not."""
    if error.errno == errno.ENAMETOOLONG and error.filename is not None:
        return f"{shown(os.fsdecode(error.filename))}: no file can have so long a name"
    if error.errno == errno.ENOENT and error.filename is None:
        try:
            Path.cwd()
        except FileNotFoundError:
            return "the current folder was deleted; change to another (cd)"
        if error.strerror and error.strerror.startswith("No usable temporary directory"):
            return "no folder for temporary files can be written to; name one in the variable TMPDIR"
    return None


def of_system(error: Exception) -> int:
    """Returns the exit code if the error means that a limit is reached, that no command can work in this place, or that
    standard output cannot be written to.

    Raises:
        Exception: The error has another cause.
    """
    if why := of_limits(error):
        report(why)
        return 1
    if not isinstance(error, OSError):
        raise error
    if error.errno == errno.EIO and leave_terminal():  # the write failed before SIGHUP arrived
        return EXIT_HUNG_UP
    if why := of_place(error):
        report(why)
        return 1
    if error.filename is None and isinstance(error.__context__, KeyboardInterrupt):
        return EXIT_INTERRUPTED  # click ends the terminal's line after ^C, but standard error cannot be written to
    # Errors on files name the file, so this one is about standard output.
    if error.errno not in FULL or error.filename is not None:
        raise error
    report(f"standard output cannot be written to ({error.strerror})")
    return OutputError.exit_code


if __name__ == "__main__":
    main()
