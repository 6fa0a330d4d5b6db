"""The map of modules has the first sentence of each."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import module_map, records


def test_a_module_is_described_by_its_first_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    docstrings = {
        "__init__": "A package.",
        "teacher": "Learns from a ``--teacher`` (Hinton et al. 2015). More of it.",
        "usage": "Shows how:\n\n    python -m usage",
        "sub/__init__": "Commands. More.",
    }
    for name, docstring in docstrings.items():
        path = tmp_path / "package" / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f'"""{docstring}\n"""\n')
    monkeypatch.setattr(records, "ROOT", tmp_path)
    monkeypatch.setattr(module_map, "PACKAGES", ("package",))
    assert module_map.module_map().splitlines() == [
        "**package** A package",
        "",
        "- `teacher.py`: Learns from a `--teacher` (Hinton et al. 2015)",
        "- `usage.py`: Shows how",
        "- **sub/** Commands",
    ]
