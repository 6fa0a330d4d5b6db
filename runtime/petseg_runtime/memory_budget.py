"""A budget for the memory of the photos that several threads are reading."""

from __future__ import annotations

import threading
import time
from concurrent.futures import CancelledError
from dataclasses import dataclass

from petseg_runtime import host

__all__ = ["MemoryBudget", "Reservation"]


@dataclass
class Reservation:
    """One photo's share of a budget.

    Attributes:
        size: Bytes reserved.
        waited: Seconds spent waiting for them.
        awaited: Whether the consumer is blocked on this photo; its requests are then granted at once.
        released: Whether the reservation was released; nothing more is granted.
    """

    size: int = 0
    waited: float = 0.0
    awaited: bool = False
    released: bool = False


class MemoryBudget:
    """Bytes that photos may take together; a thread that requests more than is left waits until others release theirs.

    Two requests are granted whatever is left, because waiting would deadlock: that of the photo whose result the
    consumer is blocked on, and that of a photo while nothing is reserved.
    """

    def __init__(self, size: int) -> None:
        """Create a budget of which nothing is reserved.

        Args:
            size: Its bytes.
        """
        self._size, self._reserved, self._waiting, self._closed = size, 0, 0, False
        # `with self._lock`, never `with self._changed`: that calls a function in Python, and if Ctrl-C comes inside it,
        # the lock stays locked for ever.
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)

    def reserve(self, reservation: Reservation, size: int) -> None:
        """Add ``size`` bytes to a reservation; blocks until that many are left.

        Raises:
            CancelledError: The budget was closed, or the reservation released.
        """
        start = time.perf_counter()
        with self._lock:
            self._waiting += 1
            self._changed.wait_for(
                lambda: self._closed or reservation.released or reservation.awaited or self._fits(size)
            )
            self._waiting -= 1
            if self._closed or reservation.released:
                raise CancelledError
            reservation.size += size
            self._reserved += size
        reservation.waited += time.perf_counter() - start

    def expedite(self, reservation: Reservation) -> None:
        """Grant this photo's requests at once from now on: the consumer is blocked on it."""
        with self._lock:
            reservation.awaited = True
            self._changed.notify_all()

    def release(self, *reservations: Reservation) -> None:
        """Return reservations, whose memory must be free by now, to the budget. Nothing more is granted to them."""
        with self._lock:
            for reservation in reservations:
                reservation.released = True
                self._reserved -= reservation.size
            if not self._waiting:
                return  # leave the memory with the allocator: no thread needs it, and reusing it is faster
        host.give_back_memory()
        with self._lock:
            self._changed.notify_all()

    def close(self) -> None:
        """Cancel all waiting and future requests."""
        with self._lock:
            self._closed = True
            self._changed.notify_all()

    def _fits(self, size: int) -> bool:
        return not self._reserved or self._reserved + size <= self._size
