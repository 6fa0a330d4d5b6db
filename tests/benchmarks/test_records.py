"""A record says what was measured, where, with what."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import records
from petseg_runtime.artifact import default_model, open_artifact


def test_a_record_says_which_model_commit_and_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = {"rev-parse": "abc\n", "status": " M runtime/petseg_runtime/live.py\n"}
    monkeypatch.setattr(records, "RESULTS", tmp_path)
    monkeypatch.setattr(records, "git", lambda *words: answers[words[0]])
    path = records.write("training/mine", "python -m benchmarks mine", {"milliseconds": [1.5]})
    found = json.loads(path.read_text(encoding="utf-8"))
    assert path == tmp_path / "training" / "mine.json"
    assert (found["commit"], found["uncommitted"]) == ("abc", [" M runtime/petseg_runtime/live.py"])
    assert open_artifact(default_model()).identity.startswith(found["shipped_model"].rpartition(", ")[2])
    assert {"cpu", "cores", "gpus", "python"} <= set(found["machine"])
    assert found["milliseconds"] == [1.5]
    assert records.load("training/mine") == found


def test_without_git_a_record_has_no_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(records, "RESULTS", tmp_path)
    found = json.loads(records.write("mine", "x", {}).read_text(encoding="utf-8"))
    assert (found["commit"], found["uncommitted"]) == (None, [])
