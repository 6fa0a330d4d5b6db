"""Signals, as the commands handle them."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator

import click

from petseg_runtime.errors import EXIT_TERMINATED

__all__ = ["terminable"]


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

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except SystemExit:
        if ending:  # a reader of our output that is gone ends the process so, too
            click.echo("petseg: terminated", err=True)
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
