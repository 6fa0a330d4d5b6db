"""Reservations are counted, and no thread waits forever."""

from __future__ import annotations

import threading
from concurrent.futures import CancelledError

import pytest

from petseg_runtime.memory_budget import MemoryBudget, Reservation


def waiting(budget: MemoryBudget, reservation: Reservation, size: int) -> tuple[threading.Thread, list[str]]:
    """Start a thread that must wait because too little memory is left."""
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


def test_a_reservation_waits_until_enough_memory_is_released() -> None:
    budget, first, second = MemoryBudget(10), Reservation(), Reservation()
    budget.reserve(first, 6)
    thread, came = waiting(budget, second, 5)
    budget.release(first)
    thread.join(10)
    assert came == ["taken"]
    assert second.size == 5
    assert second.waited > 0


def test_an_expedited_reservation_ignores_the_budget() -> None:
    budget, first, second = MemoryBudget(10), Reservation(), Reservation()
    budget.reserve(first, 6)
    thread, came = waiting(budget, second, 50)
    budget.expedite(second)
    thread.join(10)
    assert came == ["taken"]


def test_a_sole_reservation_may_exceed_the_budget() -> None:
    MemoryBudget(10).reserve(Reservation(), 1000)


@pytest.mark.parametrize("closed", [True, False])
def test_closing_or_releasing_cancels_a_waiting_reservation(closed: bool) -> None:
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
