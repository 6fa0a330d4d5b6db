"""Reservations are counted, and no thread waits forever."""

from __future__ import annotations

import threading
from concurrent.futures import CancelledError

import pytest

from petseg_runtime.memory_budget import MemoryBudget, Reservation


def waiting(budget: MemoryBudget, reservation: Reservation, size: int) -> tuple[threading.Thread, list[str]]:
    """A thread that must wait because too little is left."""
    came: list[str] = []

    def take() -> None:
        try:
            budget.reserve(reservation, size)
            came.append("taken")
        except CancelledError:
            came.append("cancelled")

    thread = threading.Thread(target=take)
    thread.start()
    thread.join(0.05)
    assert thread.is_alive()
    return thread, came


def test_who_finds_too_little_left_waits_until_others_have_gone() -> None:
    budget, first, second = MemoryBudget(10), Reservation(), Reservation()
    budget.reserve(first, 6)
    thread, came = waiting(budget, second, 5)
    budget.release(first)
    thread.join(10)
    assert came == ["taken"]
    assert second.size == 5
    assert second.waited > 0


def test_who_is_waited_for_takes_what_it_wants() -> None:
    budget, first, second = MemoryBudget(10), Reservation(), Reservation()
    budget.reserve(first, 6)
    thread, came = waiting(budget, second, 50)
    budget.expedite(second)
    thread.join(10)
    assert came == ["taken"]


def test_one_that_is_alone_may_be_larger_than_the_budget() -> None:
    MemoryBudget(10).reserve(Reservation(), 1000)


@pytest.mark.parametrize("closed", [True, False])
def test_whom_nobody_waits_for_any_more_waits_no_longer(closed: bool) -> None:
    budget, first, second = MemoryBudget(10), Reservation(), Reservation()
    budget.reserve(first, 6)
    thread, came = waiting(budget, second, 5)
    if closed:
        budget.close()
    else:
        budget.release(second)
    thread.join(10)
    assert came == ["cancelled"]
    assert second.size == 0
