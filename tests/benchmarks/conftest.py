"""Fixtures shared by the tests of the benchmarks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks import records


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Undo what measuring with all cores leaves behind: the networks that later tests train are small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", autouse=True)
def brief_calibration() -> Iterator[None]:
    """Each record that a test writes would take a second for the machine's speed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(records, "CALIBRATION_SECONDS", 0)
        yield


@pytest.fixture
def results(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder that replaces the project's records; empty unless a test adds some."""
    monkeypatch.setattr(records, "RESULTS", tmp_path)
    return tmp_path
