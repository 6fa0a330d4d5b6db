"""Fixtures shared by the tests of the benchmarks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks import records


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
