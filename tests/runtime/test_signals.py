"""Signal handlers: while they are installed, and where none can be."""

from __future__ import annotations

import signal
import threading

import pytest

from petseg_runtime.signals import EXITS, handled

BOTH = (signal.SIGINT, signal.SIGTERM)


def test_signals_call_the_function_as_long_as_it_lasts_and_then_do_what_they_did() -> None:
    before, numbers = [signal.getsignal(number) for number in BOTH], []
    with handled(lambda number, frame: numbers.append(number), *BOTH):
        for number in BOTH:
            signal.raise_signal(number)
    assert numbers == list(BOTH)
    assert [signal.getsignal(number) for number in BOTH] == before


def test_one_inside_another_has_its_turn_alone() -> None:
    heard: list[str] = []
    with handled(lambda number, frame: heard.append("outer"), *BOTH):
        with handled(lambda number, frame: heard.append("inner"), signal.SIGTERM):
            for number in BOTH:
                signal.raise_signal(number)
        signal.raise_signal(signal.SIGTERM)
    assert heard == ["outer", "inner", "outer"]


def test_an_error_gives_the_signals_back() -> None:
    before = signal.getsignal(signal.SIGTERM)

    def ends(number: int, frame: object) -> None:
        raise SystemExit(number)

    with pytest.raises(SystemExit), handled(ends, signal.SIGTERM):
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_hang_up_that_is_ignored_stays_ignored() -> None:
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


def test_every_signal_that_ends_a_run_in_order_has_the_exit_code_that_shells_give_it() -> None:
    assert {number: 128 + number for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)} == EXITS


def test_outside_of_the_main_thread_nothing_is_changed() -> None:
    found: list[object] = []

    def look() -> None:
        with handled(lambda number, frame: None, *BOTH):
            found.extend(signal.getsignal(number) for number in BOTH)

    before = [signal.getsignal(number) for number in BOTH]
    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert found == before
