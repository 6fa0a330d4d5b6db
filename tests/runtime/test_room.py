"""What photos take of a room is counted, and nobody waits in it for ever."""

from __future__ import annotations

import threading
from concurrent.futures import CancelledError

import pytest

from petseg_runtime.room import Room, Share


def waiting(room: Room, share: Share, size: int) -> tuple[threading.Thread, list[str]]:
    """Somebody who finds too little left."""
    came: list[str] = []

    def take() -> None:
        try:
            room.take(share, size)
            came.append("taken")
        except CancelledError:
            came.append("cancelled")

    thread = threading.Thread(target=take)
    thread.start()
    thread.join(0.05)
    assert thread.is_alive()
    return thread, came


def test_who_finds_too_little_left_waits_until_others_have_gone() -> None:
    room, first, second = Room(10), Share(), Share()
    room.take(first, 6)
    thread, came = waiting(room, second, 5)
    room.leave(first)
    thread.join(10)
    assert came == ["taken"]
    assert second.size == 5
    assert second.waited > 0


def test_who_is_waited_for_takes_what_it_wants() -> None:
    room, first, second = Room(10), Share(), Share()
    room.take(first, 6)
    thread, came = waiting(room, second, 50)
    room.hurry(second)
    thread.join(10)
    assert came == ["taken"]


def test_one_that_is_alone_may_be_larger_than_the_room() -> None:
    Room(10).take(Share(), 1000)


@pytest.mark.parametrize("closed", [True, False])
def test_whom_nobody_waits_for_any_more_waits_no_longer(closed: bool) -> None:
    room, first, second = Room(10), Share(), Share()
    room.take(first, 6)
    thread, came = waiting(room, second, 5)
    if closed:
        room.close()
    else:
        room.leave(second)
    thread.join(10)
    assert came == ["cancelled"]
    assert second.size == 0
