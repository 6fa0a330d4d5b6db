"""Signal handlers: while they are installed, and in threads that cannot install any."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait

import pytest

from petseg_runtime.signals import EXITS, handled, held, let_through, terminable

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


# ------------------------------------------------------------------------- signals at a moment that would do harm


@contextlib.contextmanager
def ended(number: int) -> Iterator[list[str]]:
    """Check that the signal ends the body, which appends to the list what it has done."""
    done: list[str] = []
    with pytest.raises((KeyboardInterrupt, SystemExit)) as end, terminable():
        yield done
    assert end.type is (KeyboardInterrupt if number == signal.SIGINT else SystemExit)


@pytest.mark.parametrize("number", EXITS)
def test_a_signal_in_pythons_functions_for_threads_raises_its_exception_after_them(number: int) -> None:
    """In the middle of them, it would leave their lock locked, and other threads waiting for ever."""
    with ended(number) as done:

        def inside() -> None:
            signal.raise_signal(number)
            done.append("the function")

        threading.Thread(target=inside).run()  # a function of `threading` calls it, in this thread
        time.sleep(60)
        done.append("the rest")
    assert done == ["the function"]


def test_a_long_wait_for_a_thread_is_ended_between_its_parts() -> None:
    with ended(signal.SIGTERM) as done, ThreadPoolExecutor(1) as pool:
        leave = threading.Event()
        working = pool.submit(leave.wait, 60)
        threading.Timer(0.1, signal.pthread_kill, (threading.get_ident(), signal.SIGTERM)).start()
        try:
            for _ in range(10):
                wait([working], 0.2)
                let_through()
            done.append("the whole wait")
        finally:
            leave.set()
    assert done == []


def test_a_signal_in_an_imports_locks_raises_its_exception_after_them() -> None:
    with ended(signal.SIGTERM) as done:
        names = {"__name__": "importlib._bootstrap", "signal": signal, "done": done}
        exec("signal.raise_signal(signal.SIGTERM); done.append('the import')", names)
        time.sleep(60)
        done.append("the rest")
    assert done == ["the import"]


@pytest.mark.parametrize("number", EXITS)
def test_a_held_signal_raises_its_exception_after_the_context(number: int) -> None:
    with ended(number) as done:
        with held(), held():
            signal.raise_signal(number)
            time.sleep(0.05)
            done.append("the held part")
        time.sleep(60)
        done.append("the rest")
    assert done == ["the held part"]


def test_a_held_signal_is_not_lost_at_the_end_or_on_an_error() -> None:
    with ended(signal.SIGTERM), held():
        signal.raise_signal(signal.SIGTERM)
    with ended(signal.SIGTERM), held():
        signal.raise_signal(signal.SIGTERM)
        raise OSError("the terminal is gone")


def test_only_a_second_ctrl_c_after_a_moment_interrupts_what_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first one may arrive twice: from the terminal, and from a program that passes it on."""
    with ended(signal.SIGINT) as done, held():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        done.append("so far")
        monkeypatch.setattr("petseg_runtime.signals.ECHO", 0.0)
        signal.raise_signal(signal.SIGTERM)
        done.append("and so on")
        signal.raise_signal(signal.SIGINT)
        done.append("the rest")
    assert done == ["so far", "and so on"]


def test_outside_the_main_thread_nothing_is_held() -> None:
    with ended(signal.SIGTERM) as done:
        holding, leave = threading.Event(), threading.Event()

        def hold() -> None:
            with held():
                holding.set()
                leave.wait(60)

        thread = threading.Thread(target=hold)
        thread.start()
        holding.wait(60)
        try:
            signal.raise_signal(signal.SIGTERM)
            done.append("the rest")
        finally:
            leave.set()
            thread.join()
    assert done == []


def test_an_ignored_ctrl_c_stays_ignored() -> None:
    """A shell makes its background jobs ignore it: it is for the job in the foreground."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with terminable():
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
