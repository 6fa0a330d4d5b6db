"""Signals, as the commands handle them."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator

import click

from petseg_runtime.errors import EXIT_TERMINATED

__all__ = ["handled", "terminable"]


@contextlib.contextmanager
def handled(handler: Callable[[int, object], None], *numbers: int) -> Iterator[None]:
    """Have signals call a function while this lasts, and do afterwards what they did before.

    What the function does differs from command to command: a photo can be given up at once, a video's file has to be
    brought to its end, and training goes on to the end of its step.

    Outside of the main thread, where Python lets nobody handle signals, nothing is changed.

    Args:
        handler: Called with the signal's number and the frame that it interrupted, between any two steps of the main
            thread.
        numbers: The signals.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """Make SIGTERM raise ``SystemExit``, so that cleanup runs; by default it would kill the process at once.

    Child processes would then be left behind; and the first process of a container would ignore the signal.
    """
    ending = False

    def stop(number: int, frame: object) -> None:
        nonlocal ending
        if not ending:  # `timeout` sends it twice: the second one would cut short what the first one cleans up
            ending = True
            raise SystemExit(EXIT_TERMINATED)

    with handled(stop, signal.SIGTERM):
        try:
            yield
        except SystemExit:
            if ending:  # a reader of our output that is gone ends the process so, too
                click.echo("petseg: terminated", err=True)
            raise
