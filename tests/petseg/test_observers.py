"""Several observers as one."""

from __future__ import annotations

from typing import Any

import pytest

from petseg.observers import Observer, Observers
from petseg.run_state import RunState
from tiny_runs import Recorder, a_row


def test_each_observer_gets_excluded_photos_and_once_the_length_of_an_epoch() -> None:
    one, two = Recorder(), Recorder()
    both = Observers(one, two)
    both.begin(7, 4)
    both.excluded("excluded: pet")
    both.step(RunState(), 0.5, 0.1)
    assert one.messages == two.messages == ["excluded: pet"]
    assert one.begun == two.begun == [(7, 4)]


@pytest.mark.parametrize("told", ["begin", "started", "excluded", "step", "epoch", "validated"])
def test_several_observers_get_every_call_in_order(monkeypatch: pytest.MonkeyPatch, told: str) -> None:
    row = a_row()
    words: dict[str, tuple[Any, ...]] = {
        "begin": (7, 4),
        "started": ("a word",),
        "excluded": ("excluded: pet",),
        "step": (RunState(), 0.5, 0.1),
        "epoch": (row,),
        "validated": (lambda batch: batch[..., 0], [], row),
    }
    heard: list[tuple[Any, ...]] = []
    each = [Observer(), Observer()]
    for number, one in enumerate(each):
        monkeypatch.setattr(one, told, lambda *given, number=number: heard.append((number, *given)))
    getattr(Observers(*each), told)(*words[told])
    assert heard == [(0, *words[told]), (1, *words[told])]
