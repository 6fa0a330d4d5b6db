"""Signal handling: which signals stop a run cleanly, and with which exit code."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import sys
import termios
import threading
from collections.abc import Callable, Iterator
from typing import Final

from petseg_runtime.errors import EXIT_HUNG_UP, EXIT_INTERRUPTED, EXIT_TERMINATED

__all__ = ["EXITS", "HANG_UP", "handled", "leave_terminal", "silence", "terminable"]

#: Sent when the terminal is gone: its window was closed, or the connection to this machine broke.
HANG_UP: Final = signal.SIGHUP

#: The signals that stop a run cleanly, and the exit code of each.
EXITS: Final[dict[int, int]] = {
    signal.SIGINT: EXIT_INTERRUPTED,
    signal.SIGTERM: EXIT_TERMINATED,
    HANG_UP: EXIT_HUNG_UP,
}

_MESSAGES: Final = {EXIT_TERMINATED: "terminated", EXIT_HUNG_UP: "hung up"}


@contextlib.contextmanager
def handled(handler: Callable[[int, object], None], *numbers: int) -> Iterator[None]:
    """Install a handler for signals within this context, and restore the previous handlers afterwards.

    What the handler does depends on the command: a photo can be abandoned at once, the file of a video has to be
    completed, and training continues to the end of its step.

    A SIGHUP that is ignored, as by ``nohup``, stays ignored; otherwise :func:`leave_terminal` is called before the
    handler. Outside the main thread, where Python allows no signal handlers, nothing changes.

    Args:
        handler: Called with the signal's number and the interrupted stack frame; it may interrupt the main thread
            between any two bytecode instructions.
        numbers: The signals.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def hung_up(number: int, frame: object) -> None:
        leave_terminal()
        handler(number, frame)

    wanted = [number for number in numbers if number != HANG_UP or signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, hung_up if number == HANG_UP else handler) for number in wanted}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """Make SIGTERM and SIGHUP raise ``SystemExit``, so that cleanup runs; by default, they kill the process.

    That would leave child processes behind; and the first process of a container ignores these signals by default.
    """
    code = 0

    def stop(number: int, frame: object) -> None:
        nonlocal code
        if not code:  # `timeout` sends the signal twice; the second one must not interrupt the cleanup of the first
            code = EXITS[number]
            raise SystemExit(code)

    with handled(stop, *(number for number in EXITS if number != signal.SIGINT)):
        try:
            yield
        except SystemExit:
            if code and sys.stderr is not None:  # click also raises SystemExit, if the reader of stdout has gone away
                with contextlib.suppress(OSError):  # nobody reads it; the exit code still says what happened
                    sys.stderr.write(f"petseg: {_MESSAGES[code]}\n")
                    sys.stderr.flush()
            raise


def leave_terminal() -> bool:
    """Redirect standard output and standard error to the null device if they are a terminal that is gone.

    Writing to such a terminal would raise an error in the middle of the cleanup.

    Returns:
        Whether standard output or standard error was such a terminal.
    """
    gone = [number for number in (1, 2) if _is_gone(number)]
    for number in gone:
        silence(number)
    return bool(gone)


def silence(number: int) -> None:
    """Redirect an open file descriptor to the null device: what is written to it from now on is discarded."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, number)
    os.close(nowhere)


def _is_gone(number: int) -> bool:
    """Whether a file descriptor refers to a terminal that is gone."""
    try:
        termios.tcgetattr(number)
    except termios.error as error:
        return bool(error.args[0] == errno.EIO)  # other errors: not a terminal, or a closed descriptor
    return False
