"""Signals: what ends a run in order, and with which exit code."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Final

from petseg_runtime.errors import EXIT_HUNG_UP, EXIT_INTERRUPTED, EXIT_TERMINATED

__all__ = ["EXITS", "HANG_UP", "handled", "leave_terminal", "terminable"]

#: The terminal is gone: its window was closed, or the connection to this machine broke. None where the system has no
#: such signal.
HANG_UP: Final[int | None] = getattr(signal, "SIGHUP", None)

#: The signals that end a run in order, and the exit code of each.
EXITS: Final[dict[int, int]] = {
    signal.SIGINT: EXIT_INTERRUPTED,
    signal.SIGTERM: EXIT_TERMINATED,
    **({} if HANG_UP is None else {HANG_UP: EXIT_HUNG_UP}),
}

_SAID: Final = {EXIT_TERMINATED: "terminated", EXIT_HUNG_UP: "hung up"}


@contextlib.contextmanager
def handled(handler: Callable[[int, object], None], *numbers: int) -> Iterator[None]:
    """Have signals call a function while this lasts, and do afterwards what they did before.

    What the function does differs from command to command: a photo can be given up at once, a video's file has to be
    brought to its end, and training goes on to the end of its step.

    A hang-up that is ignored, as by ``nohup``, stays ignored; of one that comes, see :func:`leave_terminal`, too.
    Outside of the main thread, where Python lets nobody handle signals, nothing is changed.

    Args:
        handler: Called with the signal's number and the frame that it interrupted, between any two steps of the main
            thread.
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
    """Make SIGTERM and SIGHUP raise ``SystemExit``, so that cleanup runs; by default they would kill the process.

    Child processes would then be left behind; and the first process of a container would ignore the signal.
    """
    code = 0

    def stop(number: int, frame: object) -> None:
        nonlocal code
        if not code:  # `timeout` sends it twice: the second one would cut short what the first one cleans up
            code = EXITS[number]
            raise SystemExit(code)

    with handled(stop, *(number for number in EXITS if number != signal.SIGINT)):
        try:
            yield
        except SystemExit:
            if code and sys.stderr is not None:  # a reader of our output that is gone ends the process so, too
                sys.stderr.write(f"petseg: {_SAID[code]}\n")
                sys.stderr.flush()
            raise


def leave_terminal() -> bool:
    """Send to nowhere what would still be written to a terminal that is gone.

    Each word to it would be an error, in the middle of what has to be brought to its end.

    Returns:
        Whether standard output or standard error was such a terminal.
    """
    gone = [number for number in (1, 2) if _is_gone(number)]
    for number in gone:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, number)
        os.close(nowhere)
    return bool(gone)


def _is_gone(number: int) -> bool:
    """Whether a file's number is of a terminal that is gone."""
    try:
        import termios  # POSIX only
    except ImportError:
        return False
    try:
        termios.tcgetattr(number)
    except termios.error as error:
        return bool(error.args[0] == errno.EIO)  # what is no terminal, or closed, says something else
    return False
