"""Signal handlers: while they are installed, and in threads that cannot install any."""

from __future__ import annotations

import signal
import threading

import pytest

from petseg_runtime.signals import EXITS, handled

BOTH = (signal.SIGINT, signal.SIGTERM)


def test_signals_call_the_handler_inside_the_context_and_are_restored_after() -> None:
    before, numbers = [signal.getsignal(number) for number in BOTH], []
    with handled(lambda number, frame: numbers.append(number), *BOTH):
        for number in BOTH:
            signal.raise_signal(number)
    assert numbers == list(BOTH)
    assert [signal.getsignal(number) for number in BOTH] == before


def test_only_the_innermost_handler_is_called() -> None:
    heard: list[str] = []
    with handled(lambda number, frame: heard.append("outer"), *BOTH):
        with handled(lambda number, frame: heard.append("inner"), signal.SIGTERM):
            for number in BOTH:
                signal.raise_signal(number)
        signal.raise_signal(signal.SIGTERM)
    assert heard == ["outer", "inner", "outer"]


def test_an_error_restores_the_signal_handlers() -> None:
    before = signal.getsignal(signal.SIGTERM)

    def ends(number: int, frame: object) -> None:
        raise SystemExit(number)

    with pytest.raises(SystemExit), handled(ends, signal.SIGTERM):
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before


def test_an_ignored_hang_up_stays_ignored() -> None:
    """As under `nohup`: the run should continue when its terminal is gone."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    heard: list[int] = []
    try:
        with handled(lambda number, frame: heard.append(number), *EXITS):
            signal.raise_signal(signal.SIGHUP)
            signal.raise_signal(signal.SIGTERM)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
    assert heard == [signal.SIGTERM]


def test_every_terminating_signal_has_the_shells_exit_code() -> None:
    assert {number: 128 + number for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)} == EXITS


def test_outside_the_main_thread_no_handler_is_installed() -> None:
    found: list[object] = []

    def look() -> None:
        with handled(lambda number, frame: None, *BOTH):
            found.extend(signal.getsignal(number) for number in BOTH)

    before = [signal.getsignal(number) for number in BOTH]
    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert found == before
