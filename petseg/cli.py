"""The ``petseg`` command: a table of subcommands, each imported only when it is called."""

from __future__ import annotations

import contextlib
import errno
import importlib
import io
import os
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import click

from petseg_runtime import __version__
from petseg_runtime.errors import EXIT_HUNG_UP, EXIT_INTERRUPTED, MissingExtra, OutputError, PetsegError
from petseg_runtime.signals import leave_terminal, terminable
from petseg_runtime.text import shown

__all__ = ["COMMANDS", "LazyGroup", "main"]

#: What a disk says that is full, or that this user may write no more to.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True)
class Command:
    """Where a subcommand is, what the overview says of it, and the extra that has the packages it may lack."""

    where: str
    help: str
    extra: str | None = None


#: Named as strings, so that `petseg --help` and `petseg infer` import nothing of the others.
COMMANDS = {
    "infer": Command("petseg_runtime.cli.infer:infer", "Segment photos, videos, cameras and streams."),
    "info": Command("petseg_runtime.cli.model:info", "Say what a model file is, expects and was measured at."),
    "verify": Command("petseg_runtime.cli.model:verify", "Compare a model file, on this device, with its checkpoint."),
    "cache": Command("petseg_runtime.cli.cache:cache", "List or clear what was compiled at first use and kept."),
    "doctor": Command("petseg_runtime.cli.doctor:doctor", "Say what this machine has, and try every engine on it."),
    "benchmark": Command("petseg_runtime.cli.benchmark:benchmark", "Time every engine that works on this machine."),
    "train": Command("petseg.commands.train:train", "Train the attention U-Net.", "train"),
    "evaluate": Command("petseg.commands.evaluate:evaluate", "Measure a checkpoint or an exported file.", "train"),
    "data": Command("petseg.commands.data:data", "Download or check a data set.", "train"),
    "export": Command("petseg_export.cli:export", "Turn a checkpoint into a file that devices run.", "export"),
}


class LazyGroup(click.Group):
    """A group that knows its subcommands' names, and imports one when it is called."""

    def __init__(self, *args: Any, where: Mapping[str, str], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.where = where

    def list_commands(self, ctx: click.Context) -> list[str]:
        """In the order of ``where``."""
        return list(self.where)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Where there is one of that name, imported now."""
        if cmd_name not in self.where:
            return None
        module, _, name = self.where[cmd_name].partition(":")
        command = getattr(importlib.import_module(module), name)
        assert isinstance(command, click.Command)
        return command


class Petseg(LazyGroup):
    """Those of :data:`COMMANDS`, whose overview imports none of them."""

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        try:
            return super().get_command(ctx, cmd_name)
        except ModuleNotFoundError as error:
            extra = COMMANDS[cmd_name].extra
            if extra is None or (error.name or "").partition(".")[0] in ("petseg", "petseg_export"):
                raise
            raise MissingExtra(missing(cmd_name, extra, error)) from error

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, entry.help) for name, entry in COMMANDS.items()])


def missing(command: str, extra: str, error: ModuleNotFoundError) -> str:
    """What to say when a subcommand's packages are not installed."""
    from petseg_runtime.extras import install  # brings importlib.metadata along, which every start would pay for

    return f"`petseg {command}` needs {error.name}, which is not installed: {install(extra)}"


@click.group(
    cls=Petseg,
    where={name: entry.where for name, entry in COMMANDS.items()},
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.version_option(__version__, prog_name="petseg")
def petseg() -> None:
    """Find the pet: train, export and run one attention U-Net.

    Exit codes: 0 done, 1 failed, 2 wrong usage, 3 some inputs failed, 4 bad model file, 5 engine or device not
    there, 6 output not writable, 7 an extra is missing, 8 bad data set, 9 training stopped, 10 parity failed,
    130, 143 and 129 stopped by Ctrl-C, SIGTERM and SIGHUP (the terminal is gone; nohup has it ignored).
    """


def main(args: list[str] | None = None) -> None:
    """Run the command line and exit; an error raised on purpose becomes one line and its exit code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a file's name may hold what the locale cannot show
    try:
        sys.exit(run(sys.argv[1:] if args is None else args))
    except BaseException as end:
        if any(thread.daemon and thread.name.startswith("petseg-") for thread in threading.enumerate()):
            leave(end)
        raise


def leave(end: BaseException) -> NoReturn:
    """End the process as this exception would, but beside a thread that waits for a source.

    FFmpeg has that ask Python now and then whether its time is over; where Python has been taken down and the process
    is not gone yet, that would crash it.
    """
    if isinstance(end, SystemExit) and isinstance(end.code, int | None):
        code = end.code or 0
    else:
        code = EXIT_INTERRUPTED if isinstance(end, KeyboardInterrupt) else 1
        sys.excepthook(type(end), end, end.__traceback__)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):  # it is closed, or its reader has gone away
            stream.flush()
    os._exit(code)


def run(args: list[str]) -> int:
    """Run the command line; returns the exit code."""
    try:
        with terminable():
            result: Any = petseg.main(args=args, prog_name="petseg", standalone_mode=False)
        return result if isinstance(result, int) else 0
    except PetsegError as error:
        click.echo(f"petseg: {shown(error)}", err=True)
        return error.exit_code
    except ModuleNotFoundError as error:
        # A command whose heavy imports happen when it runs, not when it is found.
        name = next((word for word in args if word in COMMANDS), "")
        extra = COMMANDS[name].extra if name else None
        if extra is None or (error.name or "").partition(".")[0] in ("petseg", "petseg_export"):
            raise
        click.echo(f"petseg: {missing(name, extra, error)}", err=True)
        return MissingExtra.exit_code
    except click.exceptions.Exit as error:
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        click.echo("petseg: interrupted", err=True)
        return EXIT_INTERRUPTED
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except BrokenPipeError:
        # The reader of our output went away (`| head`): not an error of ours, and nobody is left to tell.
        sys.stderr.close()
        return 1
    except OSError as error:
        return of_output(error)


def of_output(error: OSError) -> int:
    """The exit code where standard output cannot be written to.

    Raises:
        OSError: It is about something else.
    """
    if error.errno == errno.EIO and leave_terminal():  # what was written to it came before the signal
        return EXIT_HUNG_UP
    # Whoever writes a file tells which one cannot be written; what is left is standard output.
    if error.errno not in FULL or error.filename is not None:
        raise error
    click.echo(f"petseg: standard output cannot be written to ({error.strerror})", err=True)
    with contextlib.suppress(OSError):
        sys.stdout.close()  # else Python would try again at the end, and say so
    return OutputError.exit_code


if __name__ == "__main__":
    main()
