"""The memory that photos may take at once, where several threads read them."""

from __future__ import annotations

import threading
import time
from concurrent.futures import CancelledError
from dataclasses import dataclass

from petseg_runtime import host

__all__ = ["Room", "Share"]


@dataclass
class Share:
    """What one photo has of a room.

    Attributes:
        size: Bytes.
        waited: For them, in seconds.
        awaited: Who asks for results waits for this photo's.
        left: Nobody will.
    """

    size: int = 0
    waited: float = 0.0
    awaited: bool = False
    left: bool = False


class Room:
    """The memory that photos may take at once; who finds too little left waits until others have gone.

    The photo whose result is waited for gets as much as it wants, and so does one that is alone: those behind it go
    after it, and would wait for ever.
    """

    def __init__(self, size: int) -> None:
        """An empty room.

        Args:
            size: Bytes.
        """
        self._size, self._taken, self._waiting, self._closed = size, 0, 0, False
        self._changed = threading.Condition()

    def take(self, share: Share, size: int) -> None:
        """Wait until there are so many bytes left, and take them.

        Raises:
            CancelledError: The room was closed, or the photo has left it.
        """
        start = time.perf_counter()
        with self._changed:
            self._waiting += 1
            self._changed.wait_for(lambda: self._closed or share.left or share.awaited or self._fits(size))
            self._waiting -= 1
            if self._closed or share.left:
                raise CancelledError
            share.size += size
            self._taken += size
        share.waited += time.perf_counter() - start

    def hurry(self, share: Share) -> None:
        """Let a photo, for whose result somebody waits, take what it wants."""
        with self._changed:
            share.awaited = True
            self._changed.notify_all()

    def leave(self, *shares: Share) -> None:
        """Count as free what photos have taken; whoever held them has let them go."""
        with self._changed:
            for share in shares:
                share.left = True
                self._taken -= share.size
            if not self._waiting:
                return  # it is quicker to keep it
        host.give_back_memory()
        with self._changed:
            self._changed.notify_all()

    def close(self) -> None:
        """Let nobody wait any more."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _fits(self, size: int) -> bool:
        return not self._taken or self._taken + size <= self._size
