"""The memory that photos may take at once, where several threads read them."""

from __future__ import annotations

import threading
import time
from concurrent.futures import CancelledError
from dataclasses import dataclass

from petseg_runtime import host

__all__ = ["MemoryBudget", "Reservation"]


@dataclass
class Reservation:
    """What one photo has of a budget.

    Attributes:
        size: Bytes reserved.
        waited: Seconds spent waiting for them.
        awaited: The consumer is blocked on this photo; what it asks for is granted at once.
        released: The reservation was given back; nothing more is granted.
    """

    size: int = 0
    waited: float = 0.0
    awaited: bool = False
    released: bool = False


class MemoryBudget:
    """Bytes that photos may take at once; a thread that asks for more than is left waits until others give theirs back.

    Two requests are granted whatever is left, since nothing else could ever end their wait: that of the photo whose
    result the consumer is blocked on, and that of a photo while no other has anything.
    """

    def __init__(self, size: int) -> None:
        """Begin with nothing reserved.

        Args:
            size: Bytes.
        """
        self._size, self._reserved, self._waiting, self._closed = size, 0, 0, False
        self._changed = threading.Condition()

    def reserve(self, reservation: Reservation, size: int) -> None:
        """Add ``size`` bytes to a reservation; waits until that many are left.

        Raises:
            CancelledError: The budget was closed, or the reservation released.
        """
        start = time.perf_counter()
        with self._changed:
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
        """Grant what this photo asks for at once from now on: the consumer is blocked on it."""
        with self._changed:
            reservation.awaited = True
            self._changed.notify_all()

    def release(self, *reservations: Reservation) -> None:
        """Give reservations back; the memory itself must be free by now. Nothing more is granted to them."""
        with self._changed:
            for reservation in reservations:
                reservation.released = True
                self._reserved -= reservation.size
            if not self._waiting:
                return  # the allocator may keep the memory: nobody needs it, and using it again is faster
        host.give_back_memory()
        with self._changed:
            self._changed.notify_all()

    def close(self) -> None:
        """Cancel all waits."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _fits(self, size: int) -> bool:
        return not self._reserved or self._reserved + size <= self._size
