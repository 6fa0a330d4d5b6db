"""Pages match the records, and name records of an earlier model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import report

pytestmark = pytest.mark.usefixtures("results")


def test_a_section_is_regenerated_and_the_rest_stays() -> None:
    sections = {"speed": report.Section(lambda: r"fast \1")}
    text = "before\n<!-- speed -->\nslow\n<!-- /speed -->\nafter\n"
    new = report.rendered(text, sections, "README.md")
    assert new == text.replace("slow", r"fast \1")
    assert report.rendered(new, sections, "README.md") == new
    with pytest.raises(SystemExit, match=r"README.md has no section 'speed'"):
        report.rendered("before", sections, "README.md")


def test_records_of_an_earlier_model_are_named(tmp_path: Path) -> None:
    now = report.records.shipped_model()
    for name, model in {"new": now, "old": "petseg edge, 0123", "older": None}.items():
        (tmp_path / f"{name}.json").write_text(json.dumps({"shipped_model": model} if model else {}))
    assert report.earlier(("new",)) == report.earlier(()) == ""
    assert report.earlier(("new", "old", "older")) == "\n\nMeasured with an earlier built-in model: old, older."


def test_every_section_of_the_pages_exists() -> None:
    for page, sections in report.PAGES.items():
        text = page.read_text(encoding="utf-8")
        assert [name for name in sections if f"<!-- {name} -->\n" not in text] == []
