"""Signal handling: which signals stop a run cleanly, and with which exit code."""

from __future__ import annotations

import _thread
import contextlib
import errno
import os
import signal
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Final

from petseg_runtime.errors import EXIT_HUNG_UP, EXIT_INTERRUPTED, EXIT_TERMINATED

__all__ = ["ECHO", "EXITS", "HANG_UP", "handled", "held", "leave_terminal", "let_through", "silence", "terminable"]

#: Sent when the terminal is gone: its window was closed, or the connection to this machine broke.
HANG_UP: Final = signal.SIGHUP

#: The signals that stop a run cleanly, and the exit code of each.
EXITS: Final[dict[int, int]] = {
    signal.SIGINT: EXIT_INTERRUPTED,
    signal.SIGTERM: EXIT_TERMINATED,
    HANG_UP: EXIT_HUNG_UP,
}

#: A second signal within this many seconds counts as the first one: `timeout` signals the process, and then its process
#: group; `uv run` passes on the Ctrl-C that the terminal has sent to both.
ECHO: Final = 0.25

#: The seconds after which an exception that was held back is tried again, and the signal that does it: without a
#: handler, the system ignores this one.
_AGAIN: Final = 0.005
_TRY_AGAIN: Final = signal.SIGURG
#: Seconds in which it is surely tried again.
_MOMENT: Final = 4 * _AGAIN

#: The modules in which a signal raises no exception; see :func:`_is_held`.
_LOCKING: Final = ("threading", "concurrent.futures")

_MESSAGES: Final = {EXIT_TERMINATED: "terminated", EXIT_HUNG_UP: "hung up"}


@contextlib.contextmanager
def handled(handler: Callable[[int, FrameType | None], None], *numbers: int) -> Iterator[None]:
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

    def hung_up(number: int, frame: FrameType | None) -> None:
        leave_terminal()
        handler(number, frame)

    wanted = [number for number in numbers if number != HANG_UP or signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, hung_up if number == HANG_UP else handler) for number in wanted}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


#: In how many contexts of :func:`held` the main thread is.
_held = 0


@contextlib.contextmanager
def held() -> Iterator[None]:
    """Hold back the exception that a signal raises under :func:`terminable` until this context is left.

    For work that must not be done by half, and takes short: only a second Ctrl-C interrupts it.
    """
    global _held
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _held += 1
    try:
        yield
    finally:
        _held -= 1


def let_through() -> None:
    """Let a signal that came in a wait for a thread end the run; call it between the parts of a long wait.

    All of such a wait is within Python's functions for threads, where the exception is held back.
    """
    time.sleep(_MOMENT)


def _is_held(frame: FrameType | None) -> bool:
    """Whether an exception must not be raised in this frame of the main thread now.

    In the middle of Python's functions for threads (``Thread.start``, ``Future.result``) it would leave their lock
    locked: the thread that needs it waits for ever, and so does whoever waits for that thread. Likewise for imports.
    """
    if _held or (frame and frame.f_globals.get("__name__") == "importlib._bootstrap"):
        return True
    while frame:
        if str(frame.f_globals.get("__name__")).startswith(_LOCKING):
            return True
        frame = frame.f_back
    return False


class _Ending:
    """Ends the run at the first signal: with an exception in the main thread, as soon as that does no harm.

    Attributes:
        code: The exit code that the signal asks for; 0: none came.
        due: The exception that has not been raised yet.
    """

    def __init__(self) -> None:
        self.code = 0
        self.due: BaseException | None = None
        self._since = 0.0
        self._main = threading.get_ident()

    def begin(self, number: int, frame: FrameType | None) -> None:
        """Handler of the signals that end the run."""
        now = time.monotonic()
        if not self.code:
            self.code, self._since = EXITS[number], now
            self.due = KeyboardInterrupt() if number == signal.SIGINT else SystemExit(self.code)
            self.proceed(number, frame)
        elif number == signal.SIGINT and now - self._since >= ECHO:
            raise KeyboardInterrupt  # a person does not want to wait any longer
        # Any other signal must not interrupt the cleanup of the first.

    def proceed(self, number: int, frame: FrameType | None) -> None:
        """Raise the exception that is due, or try again a moment later."""
        if self.due and _is_held(frame):
            _thread.start_new_thread(self._try_again, ())  # not `threading`, whose locks the frame may hold
        elif self.due:
            due, self.due = self.due, None
            raise due

    def _try_again(self) -> None:
        time.sleep(_AGAIN)
        signal.pthread_kill(self._main, _TRY_AGAIN)  # a real signal, which also wakes the thread from a system call


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """Make SIGTERM and SIGHUP raise ``SystemExit``, so that cleanup runs; by default, they kill the process.

    That would leave child processes behind; and the first process of a container ignores these signals by default.
    Ctrl-C raises ``KeyboardInterrupt``, as everywhere in Python. Where an exception would do harm, it is raised later:
    see :func:`held`.
    """
    ending = _Ending()
    # A shell makes the jobs that it starts in the background ignore Ctrl-C.
    ignored = {signal.SIGINT} if signal.getsignal(signal.SIGINT) is signal.SIG_IGN else set()
    with handled(ending.proceed, _TRY_AGAIN), handled(ending.begin, *(EXITS.keys() - ignored)):
        try:
            try:
                yield
            finally:
                ending.proceed(_TRY_AGAIN, None)
        except SystemExit:
            # click also raises SystemExit, if the reader of stdout has gone away.
            if ending.code in _MESSAGES and sys.stderr is not None:
                with contextlib.suppress(OSError):  # nobody reads it; the exit code still says what happened
                    sys.stderr.write(f"petseg: {_MESSAGES[ending.code]}\n")
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
