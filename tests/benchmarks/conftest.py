"""Fixtures that the tests of the benchmarks share."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import records


@pytest.fixture
def results(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Where the records are, in place of the project's: empty, but for what a test puts there."""
    monkeypatch.setattr(records, "RESULTS", tmp_path)
    return tmp_path
