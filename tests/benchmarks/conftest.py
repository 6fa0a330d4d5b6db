"""Fixtures shared by the tests of the benchmarks."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import records


@pytest.fixture
def results(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder that replaces the project's records; empty unless a test adds some."""
    monkeypatch.setattr(records, "RESULTS", tmp_path)
    return tmp_path
