"""What the commands share of signals."""

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
    """SIGTERM ends this thread's work as Ctrl-C does. It would end the process in the middle of it, and leave processes
    that it has started; or, where that is the first of a container, it would not end it at all.
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
        click.echo("petseg: terminated", err=True)
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
